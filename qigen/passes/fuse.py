"""Fusion: pattern passes from the flat graph to the operators that kernels exist for.

Every pass is a function ``Graph -> Graph`` that leaves its argument alone and computes the same
numbers in the same order of operations. A pattern that does not match is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qigen.ir import schema
from qigen.ir.graph import Graph, Node


class _Uses:
    """Who makes and who reads the values of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.order = {node.name: i for i, node in enumerate(graph.nodes)}

    def made_by(self, name: str, op: str) -> Node | None:
        """The node that makes ``name``, if its operator is ``op``."""
        node = self.producers.get(name)
        return node if node is not None and node.op == op else None

    def only_reader(self, name: str) -> Node | None:
        """The node that reads ``name``, if it is read once and is no graph output."""
        readers = self.consumers[name]
        return readers[0] if len(readers) == 1 and name not in self.graph.outputs else None

    def private(self, name: str, op: str) -> Node | None:
        """The node of operator ``op`` that makes ``name`` for one reader only."""
        return self.made_by(name, op) if self.only_reader(name) is not None else None


def _replaced(graph: Graph, changes: Mapping[str, Node | None]) -> Graph:
    """The graph with nodes exchanged by name (None: taken out); dead nodes go as well."""
    nodes = [changes.get(node.name, node) for node in graph.nodes]
    return graph.rebuilt(node for node in nodes if node is not None)


def _fused(
    op: str, name: str, layer: int | None, ins: list[str], outs: list[str], **attrs: object
) -> Node:
    node = Node(op, name, ins, outs, {}, layer)
    node.attrs = schema.operator(op).complete(node, attrs)
    return node


def select_rows_early(graph: Graph) -> Graph:
    """Move SelectRows up, so that what only feeds selected rows is computed for these alone.

    In a language model it ends behind the last attention: the output projection and the
    feed-forward part of the last layer then run on R rows instead of T. Only results change shape
    ([T,d] becomes [R,d]), never a number.
    """
    for rows in sorted({n.inputs[1] for n in graph.nodes if n.op == "SelectRows"}):
        graph = _select_early(graph, rows)
    return graph


def _select_early(graph: Graph, rows: str) -> Graph:
    consumers = graph.consumers()
    narrow: set[str] = set()  # names of the nodes that may run on the selected rows

    def selecting(node: Node) -> bool:
        return (
            node.op == "SelectRows" and node.inputs[1] == rows and node.output not in graph.outputs
        )

    for node in reversed(graph.nodes):
        results = [name for name in node.outputs if name not in graph.outputs]
        if (
            schema.operator(node.op).rowwise
            and len(results) == len(node.outputs)
            and all(selecting(c) or c.name in narrow for n in results for c in consumers[n])
        ):
            narrow.add(node.name)

    narrow_values = {out for node in graph.nodes if node.name in narrow for out in node.outputs}
    nodes: list[Node] = []
    selections: dict[str, str] = {}  # a value of all rows -> that of its selected rows
    renamed: dict[str, str] = {}  # the result of a SelectRows that goes -> what stands for it

    def selected(name: str) -> str:
        if name in narrow_values:
            return name
        if name not in selections:
            result = selections[name] = f"{name}.selected"
            nodes.append(_fused("SelectRows", result, None, [name, rows], [result]))
        return selections[name]

    for node in graph.copy().nodes:
        if selecting(node):
            renamed[node.output] = selected(node.inputs[0])
            continue
        if node.name in narrow:
            node.inputs = [n if graph.is_constant(n) else selected(n) for n in node.inputs]
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        nodes.append(node)
    return graph.rebuilt(nodes)


def columns_before_norms(graph: Graph) -> Graph:
    """SelectColumns(RMSNorm(x, w)) -> RMSNorm(SelectColumns(x), w in that order).

    The norm can then be the prologue of the products that read it. Its sum of squares is taken in
    the new order; nothing else changes.
    """
    graph = graph.copy()
    producers = graph.producers()
    changes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "SelectColumns":
            continue
        norm = producers.get(node.inputs[0])
        if norm is None or norm.op != "RMSNorm" or not _whole_row(graph, norm):
            continue
        x, weight = norm.inputs
        columns = np.asarray(graph.constants[node.inputs[1]])
        values = graph.constants[weight]
        if not isinstance(values, np.ndarray):
            continue
        ordered = graph.add_constant(f"{node.name}.{weight}", values[columns])
        early = _fused("SelectColumns", f"{node.name}.early", node.layer,
                       [x, node.inputs[1]], [f"{node.name}.early"])
        late = Node("RMSNorm", node.name, [early.output, ordered], list(node.outputs),
                    dict(norm.attrs), node.layer)
        changes[node.name] = [early, late]
    return graph.rebuilt(new for node in graph.nodes for new in changes.get(node.name, [node]))


def fuse_attention(graph: Graph) -> Graph:
    """Head norms, Rope of q and k, KVAppend and Attention -> RopeAttention.

    Query and key must be treated alike (both rotated with equal attributes, or none; both normed
    with equal eps, or none), and what is fused must have no other reader.
    """
    uses = _Uses(graph)
    changes: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op != "Attention":
            continue
        q, kv, positions, *sinks = node.inputs
        append = uses.private(kv, "KVAppend")
        if append is None or append.inputs[2] != positions:
            continue
        k, v, _ = append.inputs
        head_dim = node.attrs["head_dim"]
        attrs = dict(node.attrs, rotary_dim=0, sinks=bool(sinks))
        extra: list[str] = []
        ropes = [uses.private(name, "Rope") for name in (q, k)]
        factors: list[str] = []
        if ropes != [None, None]:
            rope_q, rope_k = ropes
            if rope_q is None or rope_k is None or rope_q.attrs != rope_k.attrs:
                continue
            if rope_q.inputs[1:] != rope_k.inputs[1:] or rope_q.inputs[1] != positions:
                continue
            if rope_q.attrs["head_dim"] != head_dim:
                continue
            attrs.update(rope_q.attrs)
            factors = rope_q.inputs[2:]
            attrs["freq_factors"] = bool(factors)
            q, k = rope_q.inputs[0], rope_k.inputs[0]
        norm_q, norm_k = (uses.private(name, "RMSNorm") for name in (q, k))
        if (
            norm_q is not None
            and norm_k is not None
            and norm_q.attrs["eps"] == norm_k.attrs["eps"]
            and all(graph.values[n.inputs[1]].shape == (head_dim,) for n in (norm_q, norm_k))
        ):
            attrs.update(qk_norm=True, eps=norm_q.attrs["eps"])
            extra = [norm_q.inputs[1], norm_k.inputs[1]]
            q, k = norm_q.inputs[0], norm_k.inputs[0]
        inputs = [q, k, v, positions, *extra, *factors, *sinks]
        changes[append.name] = None
        changes[node.name] = _fused(
            "RopeAttention", node.name, node.layer, inputs, node.outputs, **attrs
        )
    return _replaced(graph, changes)


def fuse_norm_add(graph: Graph) -> Graph:
    """Add(x, RMSNorm(t, w)) -> NormAdd(x, t, w): gemma's post-norms."""
    uses = _Uses(graph)
    changes: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op != "Add":
            continue
        for x, normed in (node.inputs, node.inputs[::-1]):
            norm = uses.private(normed, "RMSNorm")
            if norm is not None and _whole_row(graph, norm):
                inputs = [x, *norm.inputs]
                changes[node.name] = _fused(
                    "NormAdd", node.name, node.layer, inputs, node.outputs, eps=norm.attrs["eps"]
                )
                break
    return _replaced(graph, changes)


def fuse_experts(graph: Graph) -> Graph:
    """Add(x, Experts(RMSNorm(x, w), Router(logits))) -> RoutedExperts(x, logits, w).

    The norm stays for the router's product, which takes it as its prologue: both make the same
    numbers, and none is kept.
    """
    uses = _Uses(graph)
    changes: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op != "Add":
            continue
        for x, result in (node.inputs, node.inputs[::-1]):
            experts = uses.private(result, "Experts")
            if experts is None:
                continue
            norm = uses.made_by(experts.inputs[0], "RMSNorm")
            router = uses.private(experts.inputs[1], "Router")
            if norm is None or router is None or norm.inputs[0] != x or not _whole_row(graph, norm):
                continue
            inputs = [x, router.inputs[0], norm.inputs[1], *experts.inputs[2:]]
            attrs = {**router.attrs, **experts.attrs, "eps": norm.attrs["eps"]}
            changes |= {router.name: None, experts.name: None}
            changes[node.name] = _fused(
                "RoutedExperts", experts.name, experts.layer, inputs, node.outputs, **attrs
            )
            break
    return _replaced(graph, changes)


def _whole_row(graph: Graph, norm: Node) -> bool:
    return graph.values[norm.inputs[1]].shape[0] == graph.values[norm.inputs[0]].shape[1]


def group_matmuls(graph: Graph) -> Graph:
    """MatMuls of one x -> MatMulGroups, with the norm before and the gate behind them.

    An RMSNorm that only MatMuls read becomes their prologue. Two MatMuls whose results only meet
    in a GatedAct, with weights of one format and shape and no bias, become a group with the
    epilogue 'gated'; the others of the same x one group with the epilogue 'store', one output a
    weight.
    """
    uses = _Uses(graph)
    changes: dict[str, Node | None] = {}
    by_x: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "MatMul":
            by_x.setdefault(node.inputs[0], []).append(node)
    for x, matmuls in by_x.items():
        norm = uses.made_by(x, "RMSNorm")
        if norm is not None:
            alone = all(c.op == "MatMul" for c in uses.consumers[x]) and x not in graph.outputs
            if not (alone and _whole_row(graph, norm)):
                norm = None
        rest = list(matmuls)
        for gate in matmuls:
            act = uses.only_reader(gate.output)
            if act is None or act.op != "GatedAct" or act.inputs[0] != gate.output:
                continue
            up = uses.private(act.inputs[1], "MatMul")
            if up is None or up not in rest:
                continue
            a, b = (graph.values[m.inputs[1]] for m in (gate, up))
            biased = len(gate.inputs) == 3 or len(up.inputs) == 3
            if (a.shape, a.dtype) != (b.shape, b.dtype) or biased:
                continue
            group = _group(x, norm, [gate, up])
            group.attrs.update(epilogue="gated", act=act.attrs["kind"])
            group.outputs = list(act.outputs)
            changes[act.name] = group
            for member in (gate, up):
                changes[member.name] = None
                rest.remove(member)
        if rest:
            changes.update({member.name: None for member in rest})
            changes[rest[0].name] = _group(x, norm, rest)
    return _replaced(graph, changes)


def _group(x: str, norm: Node | None, members: list[Node]) -> Node:
    """A MatMulGroup of the members, which share x, with the epilogue 'store'."""
    inputs = [x] if norm is None else list(norm.inputs)
    inputs += [m.inputs[1] for m in members]
    inputs += [m.inputs[2] for m in members if len(m.inputs) == 3]
    # blk.0.attn_q, blk.0.attn_k -> blk.0.attn_q+attn_k
    prefix = members[0].name.rpartition(".")[0] + "."
    short = [members[0].name, *(m.name.removeprefix(prefix) for m in members[1:])]
    return _fused(
        "MatMulGroup",
        "+".join(short),
        members[0].layer,
        inputs,
        [m.output for m in members],
        prologue="none" if norm is None else "rmsnorm",
        eps=0.0 if norm is None else norm.attrs["eps"],
        n_weights=len(members),
        biases=tuple(i for i, m in enumerate(members) if len(m.inputs) == 3),
    )


def fuse_epilogues(graph: Graph) -> Graph:
    """MatMulGroup of one weight, then Add or Softcap -> its epilogue 'add' or soft cap.

    The fused node stands where the Add stood, so that the residual is there by then. If both
    inputs of the Add are such products, the later one takes it.
    """
    uses = _Uses(graph)
    changes: dict[str, Node | None] = {}

    def plain_group(name: str) -> Node | None:
        node = uses.private(name, "MatMulGroup")
        fits = node is not None and len(node.outputs) == 1 and node.attrs["epilogue"] == "store"
        return node if fits else None

    for node in graph.nodes:
        if node.op == "Softcap":
            group = plain_group(node.inputs[0])
            if group is None:
                continue
            attrs = dict(group.attrs, softcap=node.attrs["cap"])
            inputs = list(group.inputs)
        elif node.op == "Add":
            found = [(g, name) for name in node.inputs if (g := plain_group(name)) is not None]
            if not found:
                continue
            group, product = max(found, key=lambda pair: uses.order[pair[0].name])
            residual = node.inputs[1 - node.inputs.index(product)]
            attrs = dict(group.attrs, epilogue="add")
            inputs = [*group.inputs, residual]
        else:
            continue
        changes[group.name] = None
        changes[node.name] = _fused(
            "MatMulGroup", group.name, group.layer, inputs, node.outputs, **attrs
        )
    return _replaced(graph, changes)
