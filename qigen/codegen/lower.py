"""Lowering: the fused graph becomes the program that ``templates/model/model.cpp.j2`` writes down.

Nothing is decided here: kernels come from the plan, offsets from the memory plan. Layers whose
steps are equal but for the places of their weights share one function and a table of offsets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qigen.backends.cpu.matmul import (
    ActivationRecord,
    MatmulSpec,
    activation_needs,
    activation_top,
)
from qigen.errors import Unsupported
from qigen.formats.algebra import Format
from qigen.formats.kv import BLOCK, half_block_bytes, kv_format
from qigen.formats.layout import Layout, packed_shape, row_block_bytes, shared_bytes
from qigen.formats.tensor import QuantizedTensor
from qigen.ir.dims import whole
from qigen.ir.graph import Graph, Node, constant_shape
from qigen.ir.ops.experts import expert_parts
from qigen.ir.ops.fused import attention_parts, group_parts
from qigen.passes.memory import MemoryPlan

MAX_CHUNKS = 64
"""Partial results of a head at most: bounds their scratch memory."""

MIN_CHUNK = 256
"""Positions of a partial result at least."""

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}

TILE_FLOATS = 1 << 14
"""Results of an expert's product that a thread makes before it goes on with them: 64 KiB."""


LOWERED = {
    "Embedding": "_embedding",
    "SelectRows": "_select",
    "SelectColumns": "_columns",
    "MatMulGroup": "_matmul",
    "RopeAttention": "_attention",
    "NormAdd": "_norm_add",
    "GatedAct": "_gated",
    "RoutedExperts": "_experts",
}
"""The operators that a step is made of, and the method that lowers each, for CPUs and GPUs."""


@dataclass(frozen=True)
class Buffer:
    """A matrix in the arena: byte offset, and floats from row to row."""

    offset: int
    stride: int


class Packing(Protocol):
    """How a matrix lies in weights.bin: what kernels of every backend say of it."""

    @property
    def format(self) -> Format: ...

    @property
    def layout(self) -> Layout: ...


class PackedForm(Protocol):
    """A form of a matrix that a backend packs by itself."""

    @property
    def name(self) -> str: ...

    def nbytes(self, shape: tuple[int, int]) -> int: ...

    @property
    def format(self) -> Format: ...

    @property
    def activations(self) -> str: ...

    def pack(self, weight: QuantizedTensor) -> npt.NDArray[np.uint8]: ...

    def unpack(
        self, shape: tuple[int, int], packed: npt.NDArray[np.uint8]
    ) -> QuantizedTensor: ...


@dataclass(frozen=True)
class PackedTensor:
    """A constant of weights.bin: ``parts`` are interleaved by row-block (gate, up)."""

    name: str
    parts: tuple[str, ...]
    spec: Packing | None  # None: an f32 vector, padded to whole vectors of 16
    raw: bool = False  # the array as it is
    form: PackedForm | None = None  # how a backend packs it by itself; spec is then None


@dataclass(frozen=True)
class RopeTable:
    """Angles of one rotary embedding, tabulated once a step."""

    name: str
    base: float
    pairs: int
    frequencies: tuple[float, ...]
    position_scale: float
    factor: float
    offset: int = 0


@dataclass(frozen=True)
class Segment:
    """One matrix of a matmul step."""

    kernel: str
    weight: str
    blocks: int
    cost: int
    row_block: int
    kblocks: int
    n: int
    zero_offset: int
    sum_offset: int
    columns: int  # kept apart
    shared: int  # bytes that each of the matrices has once
    y: str
    y_stride: str
    bias: str


@dataclass(frozen=True)
class RowsForm:
    """What is done to rows of ``k`` activations before products read them: the arguments of a
    ``kernel`` of ops.cpp; '': they are read as they are."""

    x: Buffer
    k: int
    k_padded: int
    norm: str
    eps: float
    kernel: str
    stride: int
    scale_offset: int
    token_scale: bool
    top: int
    corrections: tuple[dict[str, int], ...] = ()
    record: ActivationRecord | None = None
    apart: tuple[tuple[int, int], ...] = ()

    def offsets(self, spec: MatmulSpec) -> tuple[int, int]:
        """Where a kernel finds the corrections of its zero and its sums in a row."""
        if self.record is None:
            return 0, 0
        zeros, sums = activation_needs(spec)
        return (self.record.offset("zero", *zeros[0]) if zeros else 0,
                self.record.offset("sum", sums[0]) if sums else 0)  # fmt: skip


@dataclass(frozen=True)
class ExpertMatrix:
    """The matrices of one role, one an expert; ``weights`` and ``biases`` are constants, then the
    name of the table that has their places."""

    role: str
    kernel: str
    weights: tuple[str, ...] | str
    biases: tuple[str, ...] | str
    row_block: int
    kblocks: int
    blocks: int
    n: int
    zero_offset: int
    sum_offset: int


@dataclass(frozen=True)
class ExpertsStep:
    """Rows go to some of many experts. ``places`` are (field, type, offset) in the memory that
    experts share, ``own_places`` in that of a thread."""

    comment: str
    rows: str
    chosen: int
    n_experts: int
    softmax_all: bool
    logits: Buffer
    x_rows: RowsForm
    h_rows: RowsForm
    matrices: tuple[ExpertMatrix, ...]
    act: int
    alpha: float
    limit: float
    places: tuple[tuple[str, str, int], ...]
    own_places: tuple[tuple[str, str, int], ...]
    tile_floats: int
    kind: str = "experts"


@dataclass(frozen=True)
class MatmulStep:
    """Matrices that read the same activation rows."""

    comment: str
    rows: str
    form: RowsForm
    segments: tuple[Segment, ...]
    kind: str = "matmul"


@dataclass(frozen=True)
class Step:
    """Any other step; ``fields`` are what the template asks of its kind."""

    kind: str
    comment: str
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Part:
    """A function of the generated source and the table of its weights, a row a call."""

    title: str
    struct: str
    table: str
    function: str
    layered: bool
    fields: tuple[str, ...]
    steps: tuple[Any, ...]
    rows: list[tuple[int | tuple[int, ...], ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """``count`` calls of a part from row ``first`` of its table on."""

    function: str
    table: str
    struct: str
    first: int
    count: int
    whole: bool


@dataclass
class Program:
    """All that the templates of a model need."""

    name: str
    isa: str
    kv: str
    abi: int
    cpu_features: str
    vocab: int
    max_seq: int
    max_batch: int
    max_tokens: int
    d_model: int
    n_layers: int
    arena_bytes: int
    thread_bytes: int
    kv_bytes: int
    kv_session_bytes: int
    shared_rows: int
    partials: int
    chunk: int
    chunks: int
    halves: int
    step_blocks: int
    experts: int
    experts_bytes: int
    head_dims: tuple[int, ...]
    head_groups: tuple[int, ...]
    rope_tables: tuple[RopeTable, ...]
    parts: list[Part]
    calls: list[Call]
    tensors: list[PackedTensor]
    kernels: dict[MatmulSpec, tuple[tuple[str, ...], bool]]
    barriers: int
    token_tiles: tuple[int, ...]
    matrices: tuple[tuple[int, int, int], ...] = ()
    weights_bytes: int = 0
    uid: bytes = bytes(32)
    symbol: str = "qigen_model_description"  # of the description that the runtime reads
    next: str = ""  # symbol of the variant for machines that lack what this one needs


def align(n: int, to: int = 64) -> int:
    """``n`` rounded up to a multiple of ``to``."""
    return -(-n // to) * to


def attention_chunk(max_seq: int) -> tuple[int, int]:
    """(positions of a partial result, partial results at most) for contexts of ``max_seq``."""
    chunk = max(MIN_CHUNK, align(-(-max_seq // MAX_CHUNKS), BLOCK))
    return chunk, -(-max_seq // chunk) + 1


def rope_table(name: str, a: Mapping[str, Any], divisors: Any, offset: int) -> RopeTable:
    """The table of a rotation with the attributes ``a`` of its node; ``divisors`` of the
    frequencies, an array, or None."""
    pairs = a["rotary_dim"] // 2
    frequencies = [float(a["base"]) ** (-2.0 * i / a["rotary_dim"]) for i in range(pairs)]
    if divisors is not None:
        frequencies = [f / float(d) for f, d in zip(frequencies, divisors, strict=True)]
    return RopeTable(
        name,
        float(a["base"]),
        pairs,
        tuple(frequencies),
        float(a["position_scale"]),
        float(a["attn_factor"]),
        offset,
    )


MOST_LISTS = 4
"""Lists of columns apart that rows of activations know (``RowsArgs::apart``)."""


def _columns_apart(
    node: Node, spec: MatmulSpec, segments: Sequence[Segment], matrices: int
) -> tuple[tuple[int, int], ...]:
    """Where the lists of columns lie that 4-bit activations keep in 8 bits: those of all
    ``matrices`` of every segment, which read the same rows."""
    if not spec.activations.startswith("int4"):
        return ()
    found = tuple((i, j * s.shared) for i, s in enumerate(segments) if s.columns
                  for j in range(matrices))  # fmt: skip
    if len(found) > MOST_LISTS:
        raise Unsupported(
            f"{len(found)} matrices with columns apart read the same activations; {MOST_LISTS} are "
            "the most with int4 activations",
            node.name,
        )
    return found


class Lowering:
    """Lowers a fused graph; ``spec_of(constant, role)`` is the plan's kernel for a matrix."""

    def __init__(
        self,
        graph: Graph,
        memory: MemoryPlan,
        spec_of: Callable[[str, str], MatmulSpec],
        *,
        max_batch: int,
        max_seq: int,
    ) -> None:
        self.graph = graph
        self.memory = memory
        self.spec_of = spec_of
        self.max_seq = max_seq
        self.max_batch = max_batch
        self.tensors: dict[str, PackedTensor] = {}
        self.kernels: dict[MatmulSpec, tuple[set[str], bool]] = {}
        self.rope: dict[tuple[Any, ...], RopeTable] = {}
        self.rows_bytes = 0
        self.single_rows_bytes = 64
        self.experts_bytes = 0
        self.chunk, self.chunks = attention_chunk(max_seq)
        self.partial_floats = 0
        self.barriers = 0
        self.rope_bytes = 0

    # -- names and places -------------------------------------------------------------------------

    def buffer(self, name: str) -> Buffer:
        return Buffer(self.memory.offsets[name], self.memory.row_floats[name])

    def rows(self, name: str) -> str:
        """C++ expression of the number of rows of a value."""
        return "c.step.n_logits" if self.graph.values[name].shape[0] == "R" else "c.step.n_tokens"

    def vector(self, name: str) -> str:
        self.tensors.setdefault(name, PackedTensor(name, (name,), None))
        return name

    def matrix(self, parts: tuple[str, ...], spec: MatmulSpec) -> str:
        """Packed tensor of one matrix, or of a gate and up pair interleaved by row-block."""
        name = "+".join(parts)
        known = self.tensors.setdefault(name, PackedTensor(name, parts, spec))
        assert known.spec is not None and known.spec.layout == spec.layout, name
        return name

    def use(self, spec: MatmulSpec, epilogue: str | None = None, lookup: bool = False) -> None:
        epilogues, rows = self.kernels.get(spec, (set(), False))
        self.kernels[spec] = (epilogues | ({epilogue} if epilogue else set()), rows or lookup)

    # -- nodes ------------------------------------------------------------------------------------

    def lower(self, node: Node) -> list[Any]:
        """The steps of a node. Weights are named by constants; offsets come later."""
        steps: list[Any] = getattr(self, LOWERED[node.op])(node)
        return steps

    def _embedding(self, node: Node) -> list[Any]:
        table = node.inputs[1]
        spec = replace(self.spec_of(table, "embedding"), activations="f32")
        self.use(spec, lookup=True)
        shape = constant_shape(self.graph.constants[table])
        _, kblocks, _ = packed_shape(spec.format, (shape[0], shape[1]), spec.layout)
        self.barriers += 1
        return [
            Step(
                "embedding",
                f"{table} [{shape[0]}, {shape[1]}] ({spec.format.name}): rows of the tokens",
                {
                    "kernel": f"{spec.name}__rows",
                    "weight": self.matrix((table,), spec),
                    "row_block": row_block_bytes(spec.format, shape[1], spec.layout),
                    "kblocks": kblocks,
                    "scale": float(node.attrs["scale"]),
                    "y": self.buffer(node.output),
                },
            )
        ]

    def _select(self, node: Node) -> list[Any]:
        self.barriers += 1
        fields = {"x": self.buffer(node.inputs[0]), "y": self.buffer(node.output)}
        return [Step("select", "the rows whose logits are wanted", fields)]

    def _columns(self, node: Node) -> list[Any]:
        x, columns = node.inputs
        self.tensors.setdefault(columns, PackedTensor(columns, (columns,), None, raw=True))
        self.barriers += 1
        fields = {
            "x": self.buffer(x),
            "y": self.buffer(node.output),
            "columns": columns,
            "n": whole(self.graph.values[x].shape[1]),
            "rows": self.rows(node.output),
        }
        return [Step("columns", "the columns in the order of the next weights'", fields)]

    def _matmul(self, node: Node) -> list[Any]:
        a, parts = node.attrs, group_parts(node)
        gated = a["epilogue"] == "gated"
        if gated and any(parts.biases):
            raise Unsupported("gate and up projections with a bias have no kernel", node.name)
        epilogue = a["act"] if gated else a["epilogue"]
        specs = [self.spec_of(w, "matmul") for w in parts.weights]
        steps: list[Any] = []
        for activations in dict.fromkeys(s.activations for s in specs):
            chosen = [i for i, s in enumerate(specs) if s.activations == activations]
            steps.append(self._product(node, parts, specs, chosen, epilogue, gated))
        if a["softcap"]:
            n = constant_shape(self.graph.constants[parts.weights[0]])[0]
            steps.append(Step("softcap", "soft cap of the logits", {"cap": a["softcap"], "n": n}))
        return steps

    def _product(
        self,
        node: Node,
        parts: Any,
        specs: list[MatmulSpec],
        chosen: list[int],
        epilogue: str,
        gated: bool,
    ) -> MatmulStep:
        """Segments of a group that read the same form of the activations."""
        graph, a = self.graph, node.attrs
        k = whole(graph.values[parts.x].shape[1])
        form = self._form([specs[i] for i in chosen], k, self.buffer(parts.x), parts.norm, a["eps"])
        if form.kernel:
            self.rows_bytes = max(self.rows_bytes, form.stride * self.memory.max_tokens)
            self.single_rows_bytes = max(self.single_rows_bytes, form.stride)
        segments = []
        groups = [tuple(chosen)] if gated else [(i,) for i in chosen]
        for group in groups:
            i = group[0]
            spec = specs[i]
            names = tuple(parts.weights[j] for j in group)
            n = constant_shape(graph.constants[names[0]])[0]
            row_blocks, kblocks, _ = packed_shape(spec.format, (n, k), spec.layout)
            row_block = row_block_bytes(spec.format, k, spec.layout)
            self.use(spec, epilogue)
            zero_offset, sum_offset = form.offsets(spec)
            output = node.outputs[i if a["epilogue"] == "store" else 0]
            bias = parts.biases[i]
            if output in graph.outputs:
                y, y_stride = "c.step.logits", "c.step.logits_stride"
            else:
                target = self.buffer(output)
                y, y_stride = f"c.arena<float>({target.offset})", str(target.stride)
            segments.append(
                Segment(
                    kernel=spec.entry(epilogue),
                    weight=self.matrix(names, spec),
                    blocks=row_blocks,
                    cost=row_block * len(group),
                    row_block=row_block,
                    kblocks=kblocks,
                    n=n,
                    zero_offset=zero_offset,
                    sum_offset=sum_offset,
                    columns=spec.format.field("qc").count if spec.format.has("qc") else 0,
                    shared=shared_bytes(spec.format, k, spec.layout),
                    y=y,
                    y_stride=y_stride,
                    bias=self.vector(bias) if bias else "",
                )
            )
        self.barriers += 1
        return MatmulStep(
            comment=self._describe(node, parts, [parts.weights[i] for i in chosen]),
            rows=self.rows(node.outputs[0]),
            form=replace(
                form, apart=_columns_apart(node, specs[chosen[0]], segments, 2 if gated else 1)
            ),
            segments=tuple(segments),
        )

    def _form(
        self, specs: Sequence[MatmulSpec], k: int, x: Buffer, norm: str | None, eps: float
    ) -> RowsForm:
        """The form of rows of ``k`` activations at ``x`` that kernels with the same arithmetic
        read; the one for integers has what all of them need."""
        blocks = [spec.format.block * spec.layout.blocks for spec in specs]
        kind = specs[0].activations
        record: ActivationRecord | None = None
        corrections: tuple[dict[str, int], ...] = ()
        if specs[0].integer:
            needs = [activation_needs(spec) for spec in specs]
            record = ActivationRecord(
                max(align(k, max(b, 32)) for b in blocks),
                specs[0].token_scale,
                tuple(sorted({z for zeros, _ in needs for z in zeros})),
                tuple(sorted({n for _, sums in needs for n in sums})),
            )
            kernel, stride, k_padded = "rows_int8", record.nbytes, record.k
            corrections = tuple(
                {"offset": record.offset("zero", n, z), "segment": n, "zero": z}
                for n, z in record.zeros
            ) + tuple(
                {"offset": record.offset("sum", n), "segment": n, "zero": 0} for n in record.sums
            )
        elif kind == "bf16":
            k_padded = max(align(k, max(b, 16)) for b in blocks)
            kernel, stride = "rows_bf16", 2 * k_padded + 64 * (k_padded % 512 == 0)
        else:
            k_padded = max(align(k, b) for b in blocks)
            if norm is None and k_padded == k:
                kernel, stride = "", 4 * x.stride
            else:
                k_padded = align(k_padded, 16)
                kernel, stride = "rows_f32", 4 * k_padded + 64 * (k_padded % 256 == 0)
        return RowsForm(
            x, k, k_padded, self.vector(norm) if norm else "", float(eps), kernel, stride,
            record.scale_offset if record else 0, specs[0].token_scale, activation_top(kind),
            corrections, record,
        )  # fmt: skip

    def _experts(self, node: Node) -> list[Any]:
        graph, a, parts = self.graph, node.attrs, expert_parts(node)
        x, logits, norm = node.inputs[:3]
        assert self.memory.offsets[x] == self.memory.offsets[node.output], "experts are in place"
        specs = {role: self.spec_of(names[0], "matmul") for role, names in parts.weights.items()}
        for role, spec in specs.items():
            if spec.activations.startswith("int4") and spec.format.has("qc"):
                raise Unsupported("experts with columns apart have no kernel for int4 activations; "
                                  "take int8", parts.weights[role][0])  # fmt: skip
        if specs["gate"].activations != specs["up"].activations:
            raise Unsupported(
                f"gate matrices in {specs['gate'].format.name} and up matrices in "
                f"{specs['up'].format.name} read different activations; bring them to one format "
                "with --weights, or give --activations f32", node.name,
            )  # fmt: skip
        d = whole(graph.values[x].shape[1])
        hidden = constant_shape(graph.constants[parts.weights["gate"][0]])[0]
        pairs = self.memory.max_tokens * a["k"]
        places, all_bytes = _laid_out((
            ("ids", "int32_t", pairs), ("weights", "float", pairs), ("tokens", "int32_t", pairs),
            ("gains", "float", pairs), ("h", "float", pairs * align(hidden, 16)),
        ))  # fmt: skip
        self.experts_bytes = max(self.experts_bytes, all_bytes)
        x_rows = self._form([specs["gate"], specs["up"]], d, self.buffer(x), norm, a["eps"])
        h = Buffer({name: at for name, _, at in places}["h"], align(hidden, 16))
        h_rows = self._form([specs["down"]], hidden, h, None, 0.0)
        strides = [form.stride for form in (x_rows, h_rows) if form.kernel]
        self.rows_bytes = max(self.rows_bytes, max(strides) * pairs)
        tile = max(TILE_FLOATS, 32 * self.memory.max_tokens)
        own_places, own_bytes = _laid_out((
            ("own_records", "uint8_t", max(strides) * a["k"]), ("own_ids", "int32_t", a["k"]),
            ("own_weights", "float", a["k"]), ("start", "int32_t", a["n_experts"] + 1),
            ("next", "int32_t", a["n_experts"]), ("tile", "float", tile),
        ))  # fmt: skip
        self.single_rows_bytes = max(self.single_rows_bytes, own_bytes)
        matrices = []
        for role, names in parts.weights.items():
            spec, form = specs[role], h_rows if role == "down" else x_rows
            n, k = constant_shape(graph.constants[names[0]])
            blocks, kblocks, _ = packed_shape(spec.format, (n, k), spec.layout)
            self.use(spec, "store")
            matrices.append(ExpertMatrix(
                role, spec.entry("store"), tuple(self.matrix((name,), spec) for name in names),
                tuple(self.vector(name) for name in parts.biases[role]),
                row_block_bytes(spec.format, k, spec.layout), kblocks, blocks, n,
                *form.offsets(spec),
            ))  # fmt: skip
        self.barriers += 2
        formats = " ".join(dict.fromkeys(spec.format.name for spec in specs.values()))
        return [ExpertsStep(
            f"{_stem(norm)}, then {a['k']} of {a['n_experts']} experts of {hidden} in {formats}; "
            "added to the residual",
            self.rows(node.output), a["k"], a["n_experts"], a["softmax"] == "all",
            self.buffer(logits), x_rows, h_rows, tuple(matrices), _ACTIVATIONS[a["act"]],
            float(a["alpha"]), float(a["limit"]), places, own_places, tile,
        )]  # fmt: skip

    def _describe(self, node: Node, parts: Any, weights: list[str]) -> str:
        """E.g. ``rmsnorm, then attn_q [576, 576] q4_1 + attn_k ...; added to the residual``."""
        graph = self.graph
        shown = []
        for w in weights:
            shape = constant_shape(graph.constants[w])
            shown.append(f"{_stem(w)} [{shape[0]}, {shape[1]}] {graph.values[w].dtype}")
        text = ", ".join(shown)
        if parts.norm:
            text = f"{_stem(parts.norm)}, then {text}"
        ending = {"add": "; added to the residual", "gated": f"; {node.attrs['act']}(gate) * up"}
        return text + ending.get(node.attrs["epilogue"], "")

    def _attention(self, node: Node) -> list[Any]:
        a, parts = node.attrs, attention_parts(node)
        self.partial_floats = max(
            self.partial_floats,
            self.max_batch * a["n_heads"] * self.chunks * (align(a["head_dim"], 16) + 16),
        )
        self.barriers += 2
        rope = self._rope(a, parts.freq_factors) if a["rotary_dim"] else None
        window = f", window {a['window']}" if a["window"] else ""
        fields = {
            "head_dim": a["head_dim"],
            "q": self.buffer(parts.q),
            "k": self.buffer(parts.k),
            "v": self.buffer(parts.v),
            "y": self.buffer(node.output),
            "rope": rope,
            "interleaved": a["style"] == "interleaved",
            "q_norm": self.vector(parts.q_norm) if parts.q_norm else "",
            "k_norm": self.vector(parts.k_norm) if parts.k_norm else "",
            "sinks": self.vector(parts.sinks) if parts.sinks else "",
            "eps": float(a["eps"]),
            "scale": float(a["scale"]),
            "softcap": float(a["softcap"]),
            "window": a["window"],
            "heads": a["n_heads"],
            "kv_heads": a["n_kv_heads"],
        }
        comment = (
            f"attention: {a['n_heads']} heads of {a['head_dim']} over {a['n_kv_heads']} "
            f"key/value heads{window}"
        )
        return [Step("attention", comment, fields)]

    def _rope(self, a: dict[str, Any], factors: str | None) -> RopeTable:
        key = (a["base"], a["rotary_dim"], a["position_scale"], a["attn_factor"], factors)
        if key not in self.rope:
            divisors = None if factors is None else self.graph.constants[factors]
            offset = align(self.memory.arena_bytes) + self.rope_bytes
            table = rope_table(f"kRope{len(self.rope)}", a, divisors, offset)
            self.rope[key] = table
            self.rope_bytes += align(8 * table.pairs * self.memory.max_tokens)
        return self.rope[key]

    def _norm_add(self, node: Node) -> list[Any]:
        x, t, w = node.inputs
        self.barriers += 1
        assert self.memory.offsets[x] == self.memory.offsets[node.output], "norm_add is in place"
        fields = {
            "x": self.buffer(x),
            "t": self.buffer(t),
            "weight": self.vector(w),
            "n": whole(self.graph.values[x].shape[1]),
            "eps": float(node.attrs["eps"]),
            "rows": self.rows(node.output),
        }
        return [Step("norm_add", f"residual + {_stem(w)}", fields)]

    def _gated(self, node: Node) -> list[Any]:
        gate, up = node.inputs
        self.barriers += 1
        fields = {
            "gate": self.buffer(gate),
            "up": self.buffer(up),
            "y": self.buffer(node.output),
            "n": whole(self.graph.values[gate].shape[1]),
            "activation": _ACTIVATIONS[node.attrs["kind"]],
            "rows": self.rows(node.output),
        }
        return [Step("gated", f"{node.attrs['kind']}(gate) * up", fields)]


def _stem(name: str) -> str:
    """A constant's name without its layer: ``blk.3.attn_q.weight`` -> ``attn_q``."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _field(name: str) -> str:
    """A constant's (or interleaved pair's) name as a C++ field."""
    return re.sub(r"\W+", "_", "_".join(_stem(part) for part in name.split("+")))


def _letters(n: int) -> str:
    """A, B ... Z, AA, AB ..."""
    tail = chr(ord("A") + n % 26)
    return _letters(n // 26 - 1) + tail if n >= 26 else tail


def _layers(graph: Graph) -> list[tuple[int | None, list[Node]]]:
    """Nodes in runs of one layer; a selection of rows inside a layer belongs to it."""
    runs: list[tuple[int | None, list[Node]]] = []
    later = [node.layer for node in graph.nodes]
    for i, node in enumerate(graph.nodes):
        layer = node.layer
        if layer is None and runs and runs[-1][0] is not None and runs[-1][0] in later[i:]:
            layer = runs[-1][0]
        if not runs or runs[-1][0] != layer:
            runs.append((layer, []))
        runs[-1][1].append(node)
    return runs


def lower_program(
    lowering: Lowering,
    offsets_of: Callable[[list[PackedTensor]], dict[str, int]],
    **about: Any,
) -> Program:
    """Lower all nodes. ``offsets_of`` lays out the packed tensors in weights.bin.

    ``about`` are the fields of :class:`Program` that the graph does not say: name, isa, kv, abi,
    cpu_features, vocab, max_tokens, d_model, n_layers.
    """
    graph = lowering.graph
    runs = [(layer, [s for node in nodes for s in lowering.lower(node)])
            for layer, nodes in _layers(graph)]
    offsets = offsets_of(list(lowering.tensors.values()))
    states = {name: i for i, name in enumerate(graph.states)}
    layer_state = {
        n.layer: states[n.attrs["state"]] for n in graph.nodes if n.op == "RopeAttention"
    }
    parts: dict[Any, Part] = {}
    calls: list[Call] = []
    for layer, steps in runs:
        names: dict[str | tuple[str, ...], str] = {}
        renamed = tuple(_rename(step, names) for step in steps)
        key = (layer is not None, repr(renamed))
        if key not in parts:
            letter = _letters(sum(p.layered for p in parts.values()))
            first = not parts
            if layer is None:
                stem, title = ("Begin", "the start of a step") if first else ("End", "the end")
                table = f"k{stem}"
            else:
                stem, title = f"Layer{letter}", f"layers of kind {letter}"
                table = f"kLayers{letter}"
            function = f"run_{stem.lower()}" if layer is None else f"layer_{letter.lower()}"
            parts[key] = Part(title, stem, table, function, layer is not None,
                              tuple(names.values()), renamed)
        part = parts[key]
        row = tuple(offsets[name] if isinstance(name, str) else tuple(offsets[n] for n in name)
                    for name in names)
        part.rows.append(((layer_state[layer],) if layer is not None else ()) + row)
        last = calls[-1] if calls else None
        if last is not None and last.function == part.function:
            calls[-1] = replace(last, count=last.count + 1)
        else:
            calls.append(Call(part.function, part.table, part.struct, len(part.rows) - 1, 1, False))
    calls = [replace(c, whole=c.count == len(next(p for p in parts.values()
                                                  if p.function == c.function).rows))
             for c in calls]
    base = align(lowering.memory.arena_bytes)
    shared = base + lowering.rope_bytes
    scratch = max(align(lowering.rows_bytes), align(4 * lowering.partial_floats))
    heads = [n.attrs for n in graph.nodes if n.op == "RopeAttention"]
    cache = kv_format(about["kv"])
    step_blocks = cache.step_blocks(about["max_tokens"])
    halves = max((a["n_kv_heads"] * half_block_bytes(a["head_dim"]) for a in heads), default=0)
    experts = shared + scratch + step_blocks * align(halves)
    return Program(
        max_seq=lowering.max_seq,
        max_batch=lowering.max_batch,
        arena_bytes=experts + lowering.experts_bytes,
        thread_bytes=align(lowering.single_rows_bytes),
        kv_bytes=sum(a["n_kv_heads"] * cache.block_bytes(a["head_dim"]) for a in heads) // BLOCK,
        kv_session_bytes=sum(a["n_kv_heads"] * cache.window_bytes(a["head_dim"]) for a in heads),
        shared_rows=shared,
        partials=shared,
        chunk=lowering.chunk,
        chunks=lowering.chunks,
        halves=shared + scratch,
        step_blocks=step_blocks,
        experts=experts,
        experts_bytes=lowering.experts_bytes,
        head_dims=tuple(sorted({a["head_dim"] for a in heads})),
        head_groups=tuple(sorted({a["n_heads"] // a["n_kv_heads"] for a in heads})),
        rope_tables=tuple(lowering.rope.values()),
        parts=list(parts.values()),
        calls=calls,
        tensors=list(lowering.tensors.values()),
        kernels={s: (tuple(sorted(e)), r) for s, (e, r) in lowering.kernels.items()},
        barriers=lowering.barriers,
        token_tiles=_token_tiles(lowering.kernels),
        matrices=_matrices([step for _, steps in runs for step in steps], offsets),
        **about,
    )


def _matrices(
    steps: Sequence[Any], offsets: Mapping[str, int]
) -> tuple[tuple[int, int, int], ...]:
    """(offset, bytes, number of the step) of every matrix, in the order in which rows are dealt
    out to threads."""
    found: list[tuple[int, int, int]] = []
    number = 0
    for step in steps:
        if isinstance(step, MatmulStep):
            found += [(offsets[s.weight], s.blocks * s.cost, number) for s in step.segments]
            number += 1
        elif isinstance(step, ExpertsStep):  # every matrix is dealt out by itself
            for m in step.matrices:
                for name in m.weights:
                    found.append((offsets[name], m.blocks * m.row_block, number))
                    number += 1
    return tuple(found)


def _token_tiles(specs: Iterable[MatmulSpec]) -> tuple[int, ...]:
    """The register tiles of the int8 kernels: all of a model read the same activation records."""
    tiles = {s.tiles for s in specs if s.integer}
    assert len(tiles) <= 1, f"the plan has int8 kernels of different token tiles: {sorted(tiles)}"
    return tiles.pop() if tiles else (1,)


_WEIGHT_FIELDS = ("weight", "norm", "bias", "q_norm", "k_norm", "columns", "sinks")


def _laid_out(
    arrays: Sequence[tuple[str, str, int]],
) -> tuple[tuple[tuple[str, str, int], ...], int]:
    """(name, type, byte offset) of arrays (name, type, elements) one behind the other, each on a
    line of its own, and the bytes of all."""
    at, places = 0, []
    for name, kind, count in arrays:
        places.append((name, kind, at))
        at += align(count * (1 if kind == "uint8_t" else 4))
    return tuple(places), at


def _rename(step: Any, names: dict[str | tuple[str, ...], str]) -> Any:
    """The step with constants replaced by field names, which ``names`` collects."""

    def field_of(constant: str) -> str:
        return names.setdefault(constant, _field(constant)) if constant else ""

    def table_of(constants: tuple[str, ...] | str) -> str:
        """Of the constants of all experts: ``blk.0.ffn_up_exps.0.bias`` and those after it."""
        assert not isinstance(constants, str)
        if not constants:
            return ""
        name = re.sub(r"\W+", "_", re.sub(r"\.0\b", "", _stem(constants[0])))
        names.setdefault(constants, f"{name}[{len(constants)}]")
        return name

    if isinstance(step, ExpertsStep):
        return replace(
            step,
            x_rows=replace(step.x_rows, norm=field_of(step.x_rows.norm)),
            matrices=tuple(
                replace(m, weights=table_of(m.weights), biases=table_of(m.biases))
                for m in step.matrices
            ),
        )
    if isinstance(step, MatmulStep):
        return replace(
            step,
            form=replace(step.form, norm=field_of(step.form.norm)),
            segments=tuple(
                replace(s, weight=field_of(s.weight), bias=field_of(s.bias)) for s in step.segments
            ),
        )
    fields = {
        k: field_of(v) if k in _WEIGHT_FIELDS and isinstance(v, str) else v
        for k, v in step.fields.items()
    }
    # an only row of the model's end may have names with layers in them: keep comments equal
    return replace(step, fields=fields)
