from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qigen.errors import BadInput
from qigen.ir import Graph
from qigen.passes import MemoryPlan, optimize, phases, plan_memory
from qigen.passes.memory import ALIGNMENT, in_place_input, row_floats
from tests.ir.tiny import FAMILIES, build


def lifetimes(graph: Graph, plan: MemoryPlan) -> dict[str, tuple[int, int]]:
    """First and last node that touch each value's bytes."""
    spans: dict[str, tuple[int, int]] = {}
    for i, node in enumerate(graph.nodes):
        for name in (*node.outputs, *node.inputs):
            if name in plan.offsets:
                first, _ = spans.get(name, (i, i))
                spans[name] = (first, i)
    return spans


def check(graph: Graph, plan: MemoryPlan) -> None:
    """No two values that are live at one time overlap, but a result and what it overwrites."""
    spans = lifetimes(graph, plan)
    outside = {*graph.inputs, *graph.outputs, *graph.constants}
    made = {out for node in graph.nodes for out in node.outputs if graph.values[out].dtype == "f32"}
    assert set(plan.offsets) == set(plan.sizes) == set(plan.row_floats) == made - outside
    names = sorted(plan.offsets, key=lambda n: plan.offsets[n])
    for name in names:
        assert plan.offsets[name] % ALIGNMENT == 0
        assert plan.sizes[name] % ALIGNMENT == 0
        assert plan.offsets[name] + plan.sizes[name] <= plan.arena_bytes
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if plan.offsets[b] >= plan.offsets[a] + plan.sizes[a]:
                break
            (_, a1), (b0, _) = sorted((spans[a], spans[b]))
            handover = a1 == b0 and (plan.aliases.get(b) == a or plan.aliases.get(a) == b)
            assert a1 < b0 or handover, (a, b)
    for name, source in plan.aliases.items():
        assert plan.offsets[name] == plan.offsets[source]
        assert plan.sizes[name] == plan.sizes[source]
        node = next(n for n in graph.nodes if name in n.outputs)
        assert source == in_place_input(node)
        assert spans[source][1] == graph.nodes.index(node)
    live = [
        sum(
            plan.sizes[n]
            for n, (first, last) in spans.items()
            if first <= i <= last and not (plan.aliases.get(n) and first == i)
        )
        for i in range(len(graph.nodes))
    ]
    assert plan.lower_bound_bytes == max(live, default=0) <= plan.arena_bytes
    if live:
        assert live[[n.name for n in graph.nodes].index(plan.peak_node)] == max(live)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    flat = build(FAMILIES[family])
    for graph in (flat, optimize(flat)):
        for tokens, rows in ((1, None), (64, None), (64, 1)):
            plan = plan_memory(graph, tokens, rows)
            check(graph, plan)
            assert json.loads(json.dumps(plan.to_json()))["arena_bytes"] == plan.arena_bytes
    fused = plan_memory(optimize(flat), 64)
    if family in ("mixed", "qwen2"):  # gate and up are values of their own
        assert fused.arena_bytes < 1.15 * fused.lower_bound_bytes
    else:
        assert fused.arena_bytes == fused.lower_bound_bytes
    assert fused.arena_bytes <= plan_memory(flat, 64).arena_bytes


def test_the_residual_stream_stays_in_place() -> None:
    graph = optimize(build(FAMILIES["llama"]))
    plan = plan_memory(graph, 8)
    stream = ["x", "l0.x_attn", "l0.x_ffn"]
    assert len({plan.offsets[name] for name in stream}) == 1
    assert [plan.aliases.get(name) for name in stream] == [None, "x", "l0.x_attn"]
    assert "logits" not in plan.offsets
    assert plan.sizes["x"] == 8 * 64 * 4
    gemma = plan_memory(optimize(build(FAMILIES["gemma3"])), 8)
    assert gemma.aliases["l0.x_attn"] == "x"


def test_rows_are_padded() -> None:
    assert [row_floats(n) for n in (1, 16, 17, 172, 576)] == [16, 16, 32, 176, 576]
    plan = plan_memory(optimize(build(FAMILIES["stories"])), 3)
    assert plan.row_floats["l0.act"] == 176
    assert plan.sizes["l0.act"] == 3 * 176 * 4


def test_no_result_overwrites_what_its_node_still_reads() -> None:
    graph = Graph("g")
    ids = graph.add_input("input_ids", ("T",), "i32")
    w = graph.add_constant("w", np.ones((8, 8), np.float32))
    x = graph.add("Embedding", ids, w, name="x")
    graph.add_node("MatMulGroup", [x, w, x], {"epilogue": "add"}, name="y")
    graph.add_node("MatMulGroup", ["y", w], name="z")
    graph.add_node("MatMulGroup", ["z", w, "y"], {"epilogue": "add"}, name="a")
    graph.add("NormAdd", "z", "a", graph.add_constant("n", np.ones(8, np.float32)), name="b",
              eps=0.0)  # fmt: skip
    graph.add("GatedAct", "b", "b", name="c", kind="silu")
    graph.outputs.append(graph.add("Add", "c", "c", name="out"))
    plan = plan_memory(graph, 4)
    check(graph, plan)
    assert plan.aliases == {"a": "y", "b": "z"}


@pytest.mark.parametrize("family", FAMILIES)
def test_phases(family: str) -> None:
    graph = optimize(build(FAMILIES[family]))
    plan = plan_memory(graph, 16)
    cut = phases(graph, plan)
    assert [node for phase in cut for node in phase] == graph.nodes

    def used(name: str) -> range:
        start = plan.offsets.get(name, 0)
        return range(start, start + plan.sizes.get(name, 0))

    for phase in cut:
        for i, a in enumerate(phase):
            for b in phase[i + 1 :]:
                assert not {*a.outputs} & {*b.inputs}
                for x, y in [(a, b), (b, a)]:
                    for out in x.outputs:
                        for name in (*y.inputs, *y.outputs):
                            r, s = used(out), used(name)
                            assert not range(max(r.start, s.start), min(r.stop, s.stop)), (
                                out,
                                name,
                            )
    assert len(cut) in (len(graph.nodes), len(graph.nodes) - 1)  # SelectRows, at most, share one


def test_phases_see_reused_memory() -> None:
    """b needs nothing of a, but may have got the memory that a still reads."""
    graph = Graph("g")
    ids = graph.add_input("input_ids", ("T",), "i32")
    w = graph.add_constant("w", np.ones((16, 16), np.float32))
    for name in ("x", "y"):
        graph.add("Embedding", ids, w, name=name)
    graph.add_node("MatMulGroup", ["x", w], name="a")
    graph.add_node("MatMulGroup", ["y", w], name="b")
    graph.outputs.append(graph.add("Add", "a", "b", name="out"))
    plan = plan_memory(graph, 4)
    names = [[node.name for node in phase] for phase in phases(graph, plan)]
    assert plan.offsets["b"] == plan.offsets["x"]
    assert names == [["x", "y"], ["a"], ["b"], ["out"]]


def test_limits() -> None:
    graph = optimize(build(FAMILIES["llama"]))
    for bad in ((0, None), (1, 0)):
        with pytest.raises(BadInput, match="at least 1"):
            plan_memory(graph, *bad)
    other = Graph("g")
    other.add("Add", *2 * [other.add_input("x", ("B", 4), "f32")], name="y")
    other.outputs.append(other.add("Add", "y", "y", name="z"))
    with pytest.raises(BadInput, match="'B' has no bound"):
        plan_memory(other, 4)
    assert plan_memory(Graph("empty"), 4).arena_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    graph = Graph("random")
    ids = graph.add_input("input_ids", ("T",), "i32")
    widths = [data.draw(st.sampled_from([8, 16, 40, 100])) for _ in range(3)]
    by_width: dict[int, list[str]] = {}
    for w in widths:
        table = f"table{w}"
        if table not in graph.constants:
            graph.add_constant(table, np.ones((4, w), np.float32))
            by_width[w] = [graph.add("Embedding", ids, table, name=f"e{w}")]
    for i in range(data.draw(st.integers(0, 25))):
        w = data.draw(st.sampled_from(sorted(by_width)))
        a, b = (data.draw(st.sampled_from(by_width[w])) for _ in range(2))
        kind = data.draw(st.sampled_from(["gated", "normadd", "add", "matmul"]))
        if kind == "gated":
            out = graph.add("GatedAct", a, b, name=f"v{i}", kind="silu")
        elif kind == "normadd":
            n = graph.add_constant(f"n{i}", np.ones(w, np.float32))
            out = graph.add("NormAdd", a, b, n, name=f"v{i}", eps=0.0)
        elif kind == "add":
            m = graph.add_constant(f"m{i}", np.ones((w, w), np.float32))
            attrs = {"epilogue": "add"}
            out = graph.add_node("MatMulGroup", [a, m, b], attrs, name=f"v{i}").output
        else:
            other = data.draw(st.sampled_from(sorted(by_width)))
            m = graph.add_constant(f"m{i}", np.ones((other, w), np.float32))
            out = graph.add("MatMul", a, m, name=f"v{i}")
            w = other
        by_width[w].append(out)
    graph.outputs = [by_width[w][-1] for w in sorted(by_width)]
    check(graph, plan_memory(graph, data.draw(st.integers(1, 40))))
