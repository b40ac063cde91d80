"""Lowering for GPUs: the fused graph becomes static sequences of kernel launches.

The same graph, passes and memory plan as on the CPU. Nothing in a launch changes from step to step
(tokens, positions and caches lie in the head of the arena), so a sequence can be recorded as a CUDA
graph. Steps are padded to the bucket of a sequence: padding has position -1.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace
from typing import Any

from qigen.backends.cuda import gemm, gemv, ops
from qigen.backends.cuda.gemm_packing import columns_at
from qigen.backends.cuda.gemv import LAYOUT, EmbeddingSpec, GemvSpec, HalvesSpec
from qigen.backends.cuda.ops import AttentionSpec, KvSpec, NormSpec, RopeSpec
from qigen.backends.cuda.prefill import GemmForm, panel_rows, panel_spec, product_spec
from qigen.codegen.lower import LOWERED, Buffer, PackedTensor, RopeTable, align, rope_table
from qigen.errors import Unsupported
from qigen.formats import catalog
from qigen.formats.algebra import Format
from qigen.formats.layout import Layout, packed_shape
from qigen.ir.dims import whole
from qigen.ir.graph import Graph, Node, constant_shape
from qigen.ir.ops.fused import attention_parts, group_parts
from qigen.passes.memory import MemoryPlan

INT4 = ("int4", "int4-token")
"""Names of activations of 4 bits; on GPUs both have a scale a token."""

BUCKETS = {"f32": (1, gemv.MAX_M), **dict.fromkeys(("f16", *INT4), (1, gemv.MAX_M, 64))}
"""Tokens that sequences of launches are made for, by activations; a step takes the smallest that it
fits into, and longer prompts are cut into several steps of the largest."""

MAX_SESSIONS = gemv.MAX_M
"""Sessions of a step."""

GRID_LIMIT = 65535
"""Of the second and third dimension of a grid."""


@dataclass(frozen=True)
class GpuPacking:
    """How a matrix lies in weights.bin."""

    format: Format
    layout: Layout


@dataclass(frozen=True)
class Argument:
    """``kind``: "arena" and "weights" are addresses by offset, "weight" one by the tensor's name
    (until tensors have offsets; ``offset`` bytes into it), "i32", "i64" and "f32" numbers."""

    kind: str
    value: int | float | str
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel of a sequence; ``logits``: only needed if logits are wanted; ``choice``: only if
    the next token is to be chosen from them."""

    kernel: str
    comment: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Argument, ...]
    logits: bool
    shared: int = 0
    choice: bool = False


@dataclass(frozen=True)
class Sequence:
    """The launches of a step of up to ``tokens`` tokens, ``rows`` of whose logits are wanted.

    ``sessions``: the tokens are of several sessions.
    """

    tokens: int
    rows: int
    sessions: bool
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class GpuModule:
    """A CUDA source and the kernels of it that a model launches."""

    name: str
    text: str
    kernels: tuple[str, ...]


@dataclass
class GpuProgram:
    """All that the templates of a GPU model need."""

    name: str
    isa: str
    kv: str
    abi: int
    vocab: int
    max_seq: int
    max_batch: int
    max_tokens: int
    d_model: int
    n_layers: int
    arena_bytes: int
    kv_bytes: int
    logits: int
    rope_tables: tuple[RopeTable, ...]
    sequences: list[Sequence]
    modules: list[GpuModule]
    tensors: list[PackedTensor]
    kernels: dict[tuple[str, int, int, int], str]  # (format, n, k, M) -> kernel of a product
    weights_bytes: int = 0
    uid: bytes = bytes(32)


def _arena(offset: int) -> Argument:
    return Argument("arena", offset)


def _weight(name: str, offset: int = 0) -> Argument:
    return Argument("weight", name, offset)


def _i32(value: int) -> Argument:
    return Argument("i32", value)


def _f32(value: float) -> Argument:
    return Argument("f32", float(value))


@dataclass
class GpuLowering:
    """Lowers a fused graph for one KV format and bound of positions."""

    graph: Graph
    memory: MemoryPlan  # of as many tokens and rows as the largest bucket has
    kv: str
    # "f16": many tokens at once go through tensor cores; "int4": so do matrices of 4 bits with
    # activations of 4 bits, at any number of tokens
    activations: str
    max_seq: int
    max_batch: int
    tensors: dict[str, PackedTensor] = field(default_factory=dict)
    modules: dict[str, GpuModule] = field(default_factory=dict)
    rope: dict[object, RopeTable] = field(default_factory=dict)
    products: dict[tuple[str, int, int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buckets = BUCKETS[self.activations]
        graph, m = self.graph, self.buckets[-1]
        self.chunk, self.chunks = ops.attention_chunk(self.max_seq)
        self.vocab = whole(graph.values[graph.outputs[0]].shape[1])
        # the head: tokens, positions, rows, caches, how the next token is chosen; behind it, that
        self.tokens, self.positions, self.rows_at = 0, 4 * m, 8 * m
        self.caches = align(12 * m, 16)
        self.sampling = self.caches + 16 * m
        self.chosen = self.sampling + ops.SAMPLING_BYTES
        self.base = align(self.chosen + 4)
        at = self.base + align(self.memory.arena_bytes)
        widths = [whole(graph.values[n.inputs[0]].shape[1]) for n in graph.nodes
                  if n.op == "MatMulGroup"]  # fmt: skip
        self.normed = at
        at += align(4 * m * max(widths, default=1))
        self.up = at
        gated = [whole(graph.values[n.output].shape[1]) for n in graph.nodes
                 if n.op == "MatMulGroup" and n.attrs["epilogue"] == "gated"]  # fmt: skip
        at += align(4 * m * max(gated, default=1))
        self.partial = at
        partials = [self._attention_spec(n).partial_floats(MAX_SESSIONS, self.chunks)
                    for n in graph.nodes if n.op == "RopeAttention"]  # fmt: skip
        at += align(4 * max(partials, default=1))
        if self.activations != "f32":
            self.halves = at
            at += align(2 * m * align(max(widths, default=1), 8))
            self.codes = at
            at += align(m * align(max(widths, default=1), 32) // 2)
            self.code_scales = at
            at += align(4 * m)
            self.apart = at
            forms = [self.form(name) for node in graph.nodes if node.op == "MatMulGroup"
                     for name in group_parts(node).weights]  # fmt: skip
            at += align(2 * m * max((form.spec.columns for form in forms if form), default=1))
            self.product = at
            outputs = [whole(graph.values[n.output].shape[1]) for n in graph.nodes
                       if n.op == "MatMulGroup" and n.attrs["epilogue"] == "add"]  # fmt: skip
            at += align(4 * m * max(outputs, default=1))
            self.panel = at
            panels = [2 * panel_rows(n, k) * align(k, 64) for n, k in self._panels()]
            at += align(max(panels, default=1))
        self.logits = at
        self.end = at + align(4 * m * self.vocab)
        offset, self.layer_offsets = 0, {}
        for name, state in graph.states.items():
            self.layer_offsets[name] = offset
            offset += KvSpec(self.kv, state.n_kv_heads, state.head_dim).position_bytes
        self.kv_bytes = offset

    # -- names and places -------------------------------------------------------------------------

    def buffer(self, name: str) -> Buffer:
        """Where a value lies: offset in the arena and floats from row to row."""
        if name in self.graph.outputs:
            return Buffer(self.logits, self.vocab)
        return Buffer(self.base + self.memory.offsets[name], self.memory.row_floats[name])

    def vector(self, name: str) -> Argument:
        """A constant vector of floats."""
        self.tensors.setdefault(name, PackedTensor(name, (name,), None))
        return _weight(name)

    def matrix(self, name: str) -> tuple[Format, Argument]:
        """The format of a constant matrix, and the matrix."""
        format = catalog.by_name(self.graph.values[name].dtype)
        self.tensors.setdefault(name, PackedTensor(name, (name,), GpuPacking(format, LAYOUT)))
        return format, _weight(name)

    def form(self, name: str) -> GemmForm | None:
        """How a matrix lies for tensor cores, where that is all that there is of it; None if it
        lies as GEMV takes it: it has no such kernel, or rows of it are looked up."""
        format = catalog.by_name(self.graph.values[name].dtype)
        looked_up = any(n.op == "Embedding" and name in n.inputs for n in self.graph.nodes)
        if self.activations == "f32" or looked_up:
            return None
        if self.activations in INT4 and gemm.supports(format, "s4"):
            return GemmForm(format, "s4")
        return GemmForm(format) if gemm.supports(format) else None

    def _panels(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that steps of many tokens turn into halves first."""
        found = []
        for node in self.graph.nodes:
            for weight in group_parts(node).weights if node.op == "MatMulGroup" else ():
                n, k = constant_shape(self.graph.constants[weight])
                found += [(n, k)] if self.form(weight) is None else []
        return found

    def use(self, module: str, kernel: str, text: Callable[[], str]) -> str:
        """The kernel, whose module's text is made if it is new."""
        known = self.modules.get(module)
        if known is None:
            self.modules[module] = GpuModule(module, text(), (kernel,))
        elif kernel not in known.kernels:
            self.modules[module] = replace(known, kernels=(*known.kernels, kernel))
        return kernel

    # -- sequences --------------------------------------------------------------------------------

    def sequences(self) -> list[Sequence]:
        """All sequences, those for smaller steps first."""
        found = []
        for tokens in self.buckets:
            for rows in dict.fromkeys((1, tokens)):
                found.append(self._sequence(tokens, rows, False))
        if self.max_batch > 1:
            found.append(self._sequence(MAX_SESSIONS, MAX_SESSIONS, True))
        return found

    def _sequence(self, tokens: int, rows: int, sessions: bool) -> Sequence:
        step = _Step(self, tokens, rows, sessions)
        for node in self.graph.nodes:
            step.lower(node)
        if rows == 1:
            step.choose()
        return Sequence(tokens, rows, sessions, tuple(step.launches))

    def _attention_spec(self, node: Node) -> AttentionSpec:
        a = node.attrs
        if a["sinks"]:
            raise Unsupported(
                "attention sinks have no GPU kernels yet; take a processor as the target", node.name
            )
        cache = KvSpec(self.kv, a["n_kv_heads"], a["head_dim"])
        return AttentionSpec(cache, a["n_heads"], bool(a["softcap"]))

    def angles(self, node: Node, factors: str | None) -> RopeTable:
        """The table of a node's rotation."""
        a = node.attrs
        key = (a["base"], a["rotary_dim"], a["position_scale"], a["attn_factor"], factors)
        if key not in self.rope:
            divisors = None if factors is None else self.graph.constants[factors]
            table = rope_table(f"kRope{len(self.rope)}", a, divisors, self.end)
            self.rope[key] = table
            self.end += align(8 * table.pairs * self.max_seq)
        return self.rope[key]


class _Step:
    """The launches of one sequence."""

    def __init__(self, lowering: GpuLowering, tokens: int, rows: int, sessions: bool) -> None:
        self.model = lowering
        self.tokens, self.rows, self.sessions = tokens, rows, sessions
        self.launches: list[Launch] = []

    def lower(self, node: Node) -> None:
        """Append the launches of a node."""
        getattr(self, LOWERED[node.op])(node)

    def choose(self) -> None:
        """Append the choice of the next token."""
        model = self.model
        kernel = model.use("choose", "choose", ops.render_choose)
        arguments = (_arena(model.chosen), _arena(model.logits), _arena(model.sampling),
                     _i32(model.vocab))  # fmt: skip
        self.launches.append(Launch(kernel, "the next token", (1, 1, 1), ops.CHOOSE_THREADS,
                                    arguments, logits=True, choice=True))  # fmt: skip

    def _count(self, value: str) -> int:
        """Rows of a value in this sequence."""
        return self.rows if self.model.graph.values[value].shape[0] == "R" else self.tokens

    def _add(
        self,
        node: Node,
        kernel: str,
        comment: str,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: Argument,
        shared: int = 0,
    ) -> None:
        if max(grid[1:]) > GRID_LIMIT:
            raise Unsupported(f"{comment}: too many blocks for a launch ({grid})", node.name)
        logits = self.model.graph.values[node.outputs[0]].shape[0] == "R"
        self.launches.append(Launch(kernel, comment, grid, threads, arguments, logits, shared))

    def _place(self, name: str) -> tuple[Argument, Argument]:
        """A value as two arguments: its address and its stride."""
        buffer = self.model.buffer(name)
        return _arena(buffer.offset), _i32(buffer.stride)

    def _elementwise(
        self,
        node: Node,
        kind: str,
        comment: str,
        n: int,
        *rest: Argument,
        y: tuple[Argument, Argument] | None = None,
    ) -> None:
        kernel = self.model.use(
            f"elementwise_{kind}", f"elementwise_{kind}", lambda: ops.render_elementwise(kind)
        )
        grid = ops.elementwise_grid(self._count(node.outputs[0]), n)
        place = self._place(node.outputs[0]) if y is None else y
        self._add(node, kernel, comment, grid, ops.ELEMENTWISE_THREADS, *place, _i32(n), *rest)

    def _embedding(self, node: Node) -> None:
        model, table = self.model, node.inputs[1]
        format, weight = model.matrix(table)
        spec = EmbeddingSpec(format)
        n, k = constant_shape(model.graph.constants[table])
        self._add(
            node,
            model.use(spec.name, spec.name, lambda: gemv.render_embedding(spec)),
            f"{table} [{n}, {k}] ({format.name}): rows of the tokens",
            spec.grid(self.tokens, k),
            spec.block[0],
            *self._place(node.output),
            weight,
            _arena(model.tokens),
            _i32(k),
            _i32(packed_shape(format, (n, k), LAYOUT)[1]),
            _f32(node.attrs["scale"]),
        )

    def _select(self, node: Node) -> None:
        n = whole(self.model.graph.values[node.output].shape[1])
        x = self._place(node.inputs[0])
        comment = "the rows whose logits are wanted"
        self._elementwise(node, "rows", comment, n, *x, _arena(self.model.rows_at))

    def _columns(self, node: Node) -> None:
        x, columns = node.inputs
        self.model.tensors.setdefault(columns, PackedTensor(columns, (columns,), None, raw=True))
        n = whole(self.model.graph.values[x].shape[1])
        comment = "the columns in the order of the next weights'"
        self._elementwise(node, "columns", comment, n, *self._place(x), _weight(columns))

    def _matmul(self, node: Node) -> None:
        model, a, parts = self.model, node.attrs, group_parts(node)
        gated = a["epilogue"] == "gated"
        if gated and any(parts.biases):
            raise Unsupported("gate and up projections with a bias have no kernel", node.name)
        k = whole(model.graph.values[parts.x].shape[1])
        x = self._place(parts.x)
        if parts.norm is not None:
            self._norm(node, parts.norm, a["eps"], (_arena(model.normed), _i32(k)), x, k)
            x = _arena(model.normed), _i32(k)
        many = model.activations != "f32" and self._count(node.outputs[0]) > gemv.MAX_M
        forms = [model.form(weight) for weight in parts.weights]
        if any(many if form is None else form.activations == "f16" for form in forms):
            ldx = align(k, 8)
            self._elementwise(node, "half", "activations as halves", ldx, *x, _i32(k),
                              y=(_arena(model.halves), _i32(ldx)))  # fmt: skip
        quantized = False  # without columns apart, codes of x are the same for all
        for i, (weight, bias) in enumerate(zip(parts.weights, parts.biases, strict=True)):
            output = node.outputs[i if a["epilogue"] == "store" else 0]
            n = constant_shape(model.graph.constants[weight])[0]
            y = (_arena(model.up), _i32(n)) if gated and i == 1 else self._place(output)
            residual = self._place(parts.residual) if parts.residual is not None else ()
            form = forms[i]
            if form is not None and form.activations == "s4":
                if form.spec.columns or not quantized:
                    self._quantize(node, form, weight, x)
                quantized = not form.spec.columns
            if form is not None or many:
                self._tensor_product(node, weight, form, y, bias, residual)
            else:
                self._product(node, weight, x, y, bias, residual)
            if gated and i == 1:
                comment = f"{a['act']}(gate) * up"
                self._elementwise(node, a["act"], comment, n, *self._place(output), *y)
        if a["softcap"]:
            n = whole(model.graph.values[node.output].shape[1])
            self._elementwise(node, "softcap", "soft cap of the logits", n, _f32(a["softcap"]))

    def _quantize(
        self, node: Node, form: GemmForm, weight: str, x: tuple[Argument, Argument]
    ) -> None:
        """Activations as codes of 4 bits, the columns apart of a weight as halves."""
        model, columns = self.model, form.spec.columns
        n, k = constant_shape(model.graph.constants[weight])
        if columns and k > ops.MAX_QUANTIZED:
            raise Unsupported(f"columns apart of rows of {k} have no GPU kernel; at most "
                              f"{ops.MAX_QUANTIZED}", node.name)  # fmt: skip
        name = ops.quantize_name(4, columns)
        kernel = model.use(name, name, lambda: ops.render_quantize(4, columns))
        apart: tuple[Argument, ...] = ()
        if columns:
            apart = _arena(model.apart), _weight(weight, columns_at(form.spec, n, k))
        self._add(node, kernel, "activations as int4", (self._count(node.outputs[0]), 1, 1),
                  ops.QUANTIZE_THREADS, _arena(model.codes), _i32(align(k, 32)),
                  _arena(model.code_scales), *x, _i32(k), *apart)  # fmt: skip

    def _product(
        self,
        node: Node,
        weight: str,
        x: tuple[Argument, Argument],
        y: tuple[Argument, Argument],
        bias: str | None,
        residual: tuple[Argument, ...],
    ) -> None:
        model = self.model
        format, packed = model.matrix(weight)
        total = self._count(node.outputs[0])
        if total > gemv.MAX_M:  # some rows at a time
            assert total % gemv.MAX_M == 0
            for first in range(0, total, gemv.MAX_M):
                part = _Step(model, gemv.MAX_M, gemv.MAX_M, self.sessions)
                part._product(node, weight, _rows_from(x, first), _rows_from(y, first), bias,
                              _rows_from(residual, first))  # fmt: skip
                self.launches += part.launches
            return
        m = total
        n, k = constant_shape(model.graph.constants[weight])
        spec = GemvSpec(format, m, bias=bias is not None, residual=bool(residual),
                        tail=k % (format.block * LAYOUT.blocks) != 0)  # fmt: skip
        kernel = model.use(spec.name, spec.name, lambda: gemv.render_gemv(spec))
        model.products[format.name, n, k, m] = kernel
        added = " + bias" * (bias is not None) + " + residual" * bool(residual)
        self._add(
            node,
            kernel,
            f"{weight} [{n}, {k}] {format.name}{added}",
            spec.grid(n),
            spec.block[0],
            *y,
            *x,
            packed,
            _i32(n),
            _i32(k),
            _i32(packed_shape(format, (n, k), LAYOUT)[1]),
            *([model.vector(bias)] if bias is not None else []),
            *residual,
        )

    def _tensor_product(
        self,
        node: Node,
        weight: str,
        form: GemmForm | None,
        y: tuple[Argument, Argument],
        bias: str | None,
        residual: tuple[Argument, ...],
    ) -> None:
        """A product on tensor cores, from the matrix's own codes or from halves made of them."""
        model, m = self.model, self._count(node.outputs[0])
        n, k = constant_shape(model.graph.constants[weight])
        target = (_arena(model.product), _i32(n)) if residual else y
        if form is not None:
            model.tensors.setdefault(weight, PackedTensor(weight, (weight,), None, form=form))
            spec = product_spec(form.format, m, form.activations)
            self._gemm(node, spec, weight, _weight(weight), target, n, k)
        else:
            format, packed = model.matrix(weight)
            halves = HalvesSpec(format)
            kernel = model.use(halves.name, halves.name, lambda: gemv.render_halves(halves))
            rows = panel_rows(n, k)
            for first in range(0, n, rows):
                taken = min(rows, n - first)
                self._add(
                    node, kernel, f"{weight}: rows from {first} on as halves",
                    halves.grid(align(taken, 64), k), halves.block[0], _arena(model.panel), packed,
                    _i32(n), _i32(k), _i32(packed_shape(format, (n, k), LAYOUT)[1]), _i32(first),
                )  # fmt: skip
                at = Argument(target[0].kind, int(target[0].value) + 4 * first), target[1]
                self._gemm(node, panel_spec(), weight, _arena(model.panel), at, taken, k)
        if residual:
            self._elementwise(node, "sum", "added to the residual", n, *target, *residual,
                              y=y)  # fmt: skip
        if bias is not None:
            self._elementwise(node, "bias", f"bias {bias}", n, model.vector(bias), y=y)

    def _gemm(
        self,
        node: Node,
        spec: gemm.GemmSpec,
        weight: str,
        w: Argument,
        y: tuple[Argument, Argument],
        n: int,
        k: int,
    ) -> None:
        model, m = self.model, self._count(node.outputs[0])
        kernel = model.use(spec.name, spec.name, lambda: gemm.render_gemm(spec))
        own = catalog.by_name(model.graph.values[weight].dtype)
        whole_n, whole_k = constant_shape(model.graph.constants[weight])
        model.products[own.name, whole_n, whole_k, m] = kernel
        unused = _arena(model.halves)  # no tile is shared by blocks
        x, ldx = [_arena(model.halves)], align(k, 8)
        if spec.activations == "s4":
            x, ldx = [_arena(model.codes), _arena(model.code_scales)], align(k, 32)
            x += [_arena(model.apart)] if spec.columns else []
        self._add(
            node,
            kernel,
            f"{weight} [{n}, {k}] {own.name} on tensor cores",
            spec.grid(m, n, k),
            spec.block[0],
            y[0],
            *x,
            w,
            unused,
            unused,
            _i32(m),
            _i32(n),
            _i32(k),
            _i32(ldx),
            y[1],
            shared=spec.shared_bytes,
        )

    def _norm(
        self,
        node: Node,
        weight: str,
        eps: float,
        y: tuple[Argument, Argument],
        x: tuple[Argument, Argument],
        n: int,
        base: tuple[Argument, ...] = (),
    ) -> None:
        spec = NormSpec("rms", bool(base))
        self._add(
            node,
            self.model.use(spec.name, spec.name, lambda: ops.render_norm(spec)),
            f"norm {weight}" + " + residual" * bool(base),
            (self._count(node.outputs[0]), 1, 1),
            spec.block[0],
            *y,
            *x,
            self.model.vector(weight),
            _i32(n),
            _f32(eps),
            *base,
        )

    def _norm_add(self, node: Node) -> None:
        x, t, w = node.inputs
        n = whole(self.model.graph.values[x].shape[1])
        y = self._place(node.output)
        self._norm(node, w, node.attrs["eps"], y, self._place(t), n, self._place(x))

    def _gated(self, node: Node) -> None:
        gate, up = node.inputs
        n = whole(self.model.graph.values[gate].shape[1])
        kind = node.attrs["kind"]
        comment = f"{kind}(gate) * up"
        self._elementwise(node, kind, comment, n, *self._place(gate), *self._place(up))

    def _experts(self, node: Node) -> None:
        raise Unsupported(
            "mixtures of experts have no GPU kernels yet; take a processor as the target", node.name
        )

    def _attention(self, node: Node) -> None:
        model, a, parts = self.model, node.attrs, attention_parts(node)
        attention = model._attention_spec(node)
        rope = RopeSpec(attention.cache, a["n_heads"], a["rotary_dim"],
                        a["style"] == "interleaved", parts.q_norm is not None)  # fmt: skip
        layer = Argument("i64", model.layer_offsets[a["state"]])
        places = _arena(model.positions), _arena(model.caches), layer
        norms: list[Argument] = []
        if parts.q_norm is not None and parts.k_norm is not None:
            norms = [model.vector(parts.q_norm), model.vector(parts.k_norm), _f32(a["eps"])]
        angles: list[Argument] = []
        if a["rotary_dim"]:
            angles = [_arena(model.angles(node, parts.freq_factors).offset)]
        self._add(
            node,
            model.use(rope.name, rope.name, lambda: ops.render_rope(rope)),
            f"rotation of {a['n_heads']} heads, keys and values into the cache",
            rope.grid(self.tokens),
            rope.block[0],
            *self._place(parts.q),
            *self._place(parts.k),
            *self._place(parts.v),
            *places,
            *angles,
            *norms,
        )
        text = f"{a['n_heads']} heads of {a['head_dim']} over {a['n_kv_heads']} key/value heads"
        common = (*places, _f32(a["scale"]), _i32(a["window"]),
                  *([_f32(a["softcap"])] if a["softcap"] else []))  # fmt: skip
        name, out, q = attention.name, self._place(node.output), self._place(parts.q)

        def use(which: str) -> str:
            return model.use(name, f"{name}_{which}", lambda: ops.render_attention(attention))

        if self.tokens > 1 and not self.sessions and model.activations != "f32":
            kernel = model.use(attention.mma_name, attention.mma_name,
                               lambda: ops.render_attention_mma(attention))  # fmt: skip
            self._add(node, kernel, f"attention on tensor cores: {text}",
                      attention.mma_grid(self.tokens), 128, *out, *q, *common,
                      _i32(self.tokens), shared=attention.mma_shared)  # fmt: skip
            return
        if self.tokens > 1 and not self.sessions:
            self._add(node, use("tiled"), f"attention, tiled: {text}",
                      attention.tiled_grid(self.tokens), 128, *out, *q, *common,
                      _i32(self.tokens))  # fmt: skip
            return
        chunks = (_i32(model.chunk), _i32(model.chunks))
        partial = _arena(model.partial)
        self._add(node, use("split"), f"attention, split: {text}",
                  attention.split_grid(self.tokens, model.chunks), 128, partial, *q, *common,
                  *chunks)  # fmt: skip
        self._add(node, use("combine"), "attention: the parts of the context together",
                  attention.combine_grid(self.tokens), attention.combine_block[0], *out,
                  partial, _arena(model.positions), _i32(a["window"]), *chunks)  # fmt: skip


def _rows_from(place: Sequence_[Argument], row: int) -> Any:
    """A matrix, an address and a stride in floats (or nothing), from a later row on."""
    if not place:
        return ()
    address, stride = place
    assert isinstance(address.value, int) and isinstance(stride.value, int)
    return Argument(address.kind, address.value + 4 * row * stride.value), stride


def lower_launches(
    lowering: GpuLowering,
    offsets_of: Callable[[list[PackedTensor]], dict[str, int]],
    **about: object,
) -> GpuProgram:
    """Lower all nodes into all sequences. ``offsets_of`` lays out the tensors in weights.bin.

    ``about`` are the fields of :class:`GpuProgram` that the graph does not say: name, isa, abi,
    d_model, n_layers.
    """
    sequences = lowering.sequences()
    offsets = offsets_of(list(lowering.tensors.values()))

    def placed(argument: Argument) -> Argument:
        if argument.kind != "weight":
            return argument
        return Argument("weights", offsets[str(argument.value)] + argument.offset)

    sequences = [
        replace(s, launches=tuple(
            replace(launch, arguments=tuple(placed(a) for a in launch.arguments))
            for launch in s.launches
        ))
        for s in sequences
    ]  # fmt: skip
    return GpuProgram(
        kv=lowering.kv,
        vocab=lowering.vocab,
        max_seq=lowering.max_seq,
        max_batch=lowering.max_batch,
        max_tokens=lowering.buckets[-1],
        arena_bytes=align(lowering.end, 256),
        kv_bytes=lowering.kv_bytes,
        logits=lowering.logits,
        rope_tables=tuple(lowering.rope.values()),
        sequences=sequences,
        modules=list(lowering.modules.values()),
        tensors=list(lowering.tensors.values()),
        kernels=lowering.products,
        **about,  # type: ignore[arg-type]
    )
