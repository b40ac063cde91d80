"""Kernels of graph models that are translation units of their own: which, and how they are called.

Fused nodes carry a description (a chain, the shape of a product); here it becomes the specification
of a kernel of the CPU backend for one ISA, and the call that the step makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qigen import targets
from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu import gemm
from qigen.backends.cpu.elementwise import LoopSpec, Step, render_loops
from qigen.backends.cpu.matmul import (
    ActivationRecord,
    MatmulSpec,
    activation_needs,
    render_matmul,
)
from qigen.backends.cpu.ops import render_ops
from qigen.backends.cpu.rowops import render_rowops
from qigen.codegen.lower import PackedTensor, align
from qigen.codegen.render import render
from qigen.formats.kv import kv_format
from qigen.formats.layout import packed_shape, row_block_bytes
from qigen.ir.graph import Graph, Node
from qigen.ir.ops.graph import BIAS, CHAIN, SCALE, X_SCALE, X_ZERO, ZERO, W, X
from qigen.ir.tensor import Alias, Argument, Call, Epilogue, Ints, Ref, Refs, Word, given
from qigen.ir.types import TYPES
from qigen.passes.tensor.rewrite import Rewriter

_HEADERS = {
    "gemm.h": "cpu/gemm.h.j2",
    "loop.h": "cpu/loop.h.j2",
    "rowops.h": "cpu/rowops.h.j2",
}


FormatSpecs: TypeAlias = Mapping[tuple[str, int, int], MatmulSpec]
"""The kernel of a matrix in a format of the catalog, by (format, N, K)."""

_CODES = {"i8": "s8"}
"""What the kernels call an element type."""

LOOPS_IN_UNIT = 12
"""Loops that are compiled together: most of the time of a small unit goes into headers."""


class GraphKernels:
    """Collects the kernels that the calls of one model need."""

    def __init__(
        self,
        isa: Isa,
        machine: targets.Machine,
        formats: FormatSpecs | None = None,
        tiles: Mapping[str, gemm.Tiles] | None = None,
    ) -> None:
        """``tiles``: register tiles of gemm kernels by what :attr:`GemmSpec.suffix` says of them,
        where they are not those of the rule."""
        self.isa = isa
        self.tiles = tiles or {}
        self.machine = machine
        self.formats = formats or {}
        self._sources: dict[str, KernelSource] = {}
        self._declarations: dict[str, None] = {}
        self._choices: list[dict[str, Any]] = []
        self._loops: dict[str, LoopSpec] = {}
        self._calls: dict[str, Callable[[Node, Graph], Call]] = {
            "Loop": self._loop,
            "Product": self._product,
            "Convolution": self._convolution,
            "Depthwise": self._depthwise,
            "FormatProduct": self._format_product,
            "FormatRows": self._format_rows,
            "PadImage": self._pad,
            "ToBf16": self._to_bf16,
            "QuantizeImage": self._quantize_image,
            "QuantizeRows": self._quantize_rows,
            "QuantizeTensor": self._quantize_tensor,
            "LayerNorm": self._layer_norm,
            "SoftmaxRows": self._softmax,
            "ReduceAxes": self._reduce,
            "SwapAxes": self._swap,
            "JoinImages": self._join,
            "Pool": self._pool,
            "EncoderAttention": self._attention,
        }

    def call(self, node: Node, graph: Graph) -> Call | Alias | None:
        """The call of a node with a kernel of its own, else None."""
        function = self._calls.get(node.op)
        return None if function is None else function(node, graph)

    def sources(self) -> list[KernelSource]:
        """The translation units."""
        loops = [self._loops[name] for name in sorted(self._loops)]
        units = [
            render_loops(f"loops_{i}", loops[i : i + LOOPS_IN_UNIT])
            for i in range(0, len(loops), LOOPS_IN_UNIT)
        ]
        return [*self._sources.values(), *units]

    def declarations(self) -> list[str]:
        """C++ declarations of their functions."""
        return list(self._declarations)

    def headers(self) -> dict[str, str]:
        """Rendered headers that the units and the model include."""
        headers = {name: render(template) for name, template in _HEADERS.items()}
        headers[self.isa.header] = render(self.isa.template)
        headers["epilogue.h"] = render("cpu/epilogue.h.j2")
        headers["kernels.h"] = render("cpu/kernels.h.j2")
        headers["ops.h"] = render("cpu/ops.h.j2", head_dims=(), kv=kv_format("f16"))
        return headers

    def choices(self) -> list[dict[str, Any]]:
        """What was chosen for each node and why, for the manifest."""
        return list(self._choices)

    def _use(self, source: Callable[[], KernelSource], name: str, struct: str) -> Word:
        """The kernel ``name``, rendered once, as an argument."""
        if name not in self._sources:
            self._sources[name] = source()
        self._declarations[f"void {name}(const {struct}& a, int thread, int threads);"] = None
        return Word(name)

    def _choice(self, node: Node, kernel: str, **about: Any) -> None:
        self._choices.append({"node": node.name, "kernel": kernel, **about})

    # -- products ---------------------------------------------------------------------------------

    def _epilogue(self, node: Node) -> Epilogue:
        a = node.attrs
        chain = [given(node, CHAIN + i) for i in range(len(a["kinds"]))]
        return Epilogue(
            tuple(given(node, i) for i in (BIAS, SCALE, ZERO, X_SCALE, X_ZERO)),
            tuple(chain),
            tuple(int(k == "full") for k in a["kinds"]),
            a["y_scale"],
            a["y_zero"],
        )

    def _output(self, node: Node) -> dict[str, Any]:
        """What the specification of a product's kernel says of its output."""
        a = node.attrs
        return {
            "isa": self.isa,
            "arithmetic": a["arithmetic"],
            "chain": tuple(Step(f, args, params) for f, args, params in a["chain"]),
            "inputs": a["kinds"],
            "output": _CODES.get(a["out"], a["out"]),
            "dynamic": bool(given(node, X_SCALE)),
        }

    def gemm_spec(self, node: Node) -> gemm.GemmSpec:
        """The kernel of a Product or Convolution."""
        spec = gemm.GemmSpec(**self._output(node))
        return replace(spec, chosen=self.tiles.get(spec.suffix))

    def _product(self, node: Node, graph: Graph) -> Call:
        a = node.attrs
        spec = self.gemm_spec(node)
        kernel = self._use(lambda: gemm.render_gemm(spec), spec.name, "GemmArgs")
        steps = gemm.steps(a["k"], a["arithmetic"])
        self._choice(
            node,
            spec.name,
            n=a["n"],
            k=a["k"],
            weight=a["weight"],
            x=str(graph.values[node.inputs[X]]),
        )
        return _call(
            "call_gemm.h",
            "run_product",
            kernel,
            node.outputs[:1],
            [given(node, X), given(node, W)],
            a["n"],
            steps,
            gemm.row_block_bytes(1, a["k"], a["arithmetic"]),
            self._epilogue(node),
        )

    def _convolution(self, node: Node, graph: Graph) -> Call:
        a = node.attrs
        spec = self.gemm_spec(node)
        kernel = self._use(lambda: gemm.render_gemm(spec), spec.name, "GemmArgs")
        taps = a["kernel"][0] * a["kernel"][1]
        self._choice(
            node,
            spec.name,
            n=a["n"],
            k=a["k"] * taps,
            weight=a["weight"],
            x=str(graph.values[node.inputs[X]]),
        )
        return _call(
            "call_gemm.h",
            "run_convolution",
            kernel,
            node.outputs[:1],
            [given(node, X), given(node, W)],
            a["n"],
            gemm.steps(a["k"], a["arithmetic"]),
            gemm.row_block_bytes(taps, a["k"], a["arithmetic"]),
            TYPES[graph.values[node.inputs[X]].dtype].bytes,
            Ints(a["kernel"]),
            Ints(a["strides"]),
            Ints(a["dilations"]),
            a["group"],
            self._epilogue(node),
        )

    def _depthwise(self, node: Node, graph: Graph) -> Call:
        a = node.attrs
        spec = gemm.DepthwiseSpec(**self._output(node))
        kernel = self._use(lambda: gemm.render_depthwise(spec), spec.name, "DepthwiseArgs")
        self._choice(
            node,
            spec.name,
            n=a["n"],
            k=a["kernel"][0] * a["kernel"][1],
            weight=a["weight"],
            x=str(graph.values[node.inputs[X]]),
        )
        return _call(
            "call_gemm.h",
            "run_depthwise",
            kernel,
            node.outputs[:1],
            [given(node, X), given(node, W)],
            Ints(a["kernel"]),
            Ints(a["strides"]),
            Ints(a["dilations"]),
            Ints(a["pads"]),
            self._epilogue(node),
        )

    def _spec(self, node: Node, graph: Graph) -> MatmulSpec:
        format_ = graph.values[node.inputs[1]].dtype
        return self.formats[format_, node.attrs["n"], node.attrs["k"]]

    def _format_product(self, node: Node, graph: Graph) -> Call:
        spec, a = self._spec(node, graph), node.attrs
        self._sources.setdefault(spec.name, render_matmul(spec, ("store",)))
        self._declarations[f"void {spec.entry('store')}(const MatmulArgs& a, int b0, int b1);"] = (
            None
        )
        blocks, kblocks, _ = packed_shape(spec.format, (a["n"], a["k"]), spec.layout)
        record = row_record(spec, a["k"])
        self._choice(
            node,
            spec.name,
            n=a["n"],
            k=a["k"],
            weight=a["weight"],
            x=str(graph.values[node.inputs[0]]),
        )
        rows = given(node, 3) or node.inputs[0]
        return Call(
            "call_format.h",
            "run_format_product",
            (),
            (
                Word(spec.entry("store")),
                Ref(node.outputs[0]),
                Ref(rows),
                Ref(node.inputs[1]),
                Ref(given(node, 2)),
                blocks,
                kblocks,
                row_block_bytes(spec.format, a["k"], spec.layout),
                record.stride,
                record.scale,
                record.zero,
                record.sum,
            ),
        )

    def _format_rows(self, node: Node, graph: Graph) -> Call:
        """Rows as one of the products that read them wants them (all want the same)."""
        reader = next(
            n for n in graph.nodes if n.op == "FormatProduct" and n.name == node.attrs["of"]
        )
        spec, k = self._spec(reader, graph), reader.attrs["k"]
        record = row_record(spec, k)
        tiles = next((s.tiles for s in self.formats.values() if s.integer), (1,))
        self._sources.setdefault("ops", render_ops(self.isa, (), kv_format("f16"), tiles, ()))
        corrections = [Ints(c) for c in record.corrections]
        return Call(
            "call_format.h",
            "run_format_rows",
            (),
            (
                Word(record.kernel),
                Ref(node.outputs[0]),
                Ref(node.inputs[0]),
                k,
                record.padded,
                record.scale,
                spec.token_scale,
                *(corrections + [Ints((0, 0, 0))] * (2 - len(corrections))),
                len(corrections),
            ),
        )

    def _prepare(self, name: str) -> Word:
        self._sources.setdefault("gemm_prepare", gemm.render_prepare(self.isa))
        struct = gemm.PREPARE_ENTRIES[name]
        self._declarations[f"void {name}(const {struct}& a, int thread, int threads);"] = None
        return Word(name)

    def _pad(self, node: Node, graph: Graph) -> Call:
        a = node.attrs
        of_bytes = graph.values[node.inputs[0]].dtype == "u8"
        kernel = self._prepare("gemm_pad_bytes" if of_bytes else f"gemm_pad_{a['to']}")
        return _call(
            "call_gemm.h",
            "run_pad",
            kernel,
            node.outputs,
            node.inputs,
            Ints(a["pads"]),
            float(a["scale"]),
            a["zero"],
        )

    def _to_bf16(self, node: Node, graph: Graph) -> Call:
        return _call(
            "call_gemm.h",
            "run_convert_rows",
            self._prepare("gemm_pad_bf16"),
            node.outputs,
            node.inputs,
        )

    def _quantize_image(self, node: Node, graph: Graph) -> Call:
        kernels = (self._prepare("gemm_minmax"), self._prepare("gemm_pad_u8_dynamic"))
        tensors = [Ref(n) for n in (*node.outputs, *node.inputs)]
        return Call(
            "call_gemm.h", "run_quantize_image", (), (*kernels, *tensors, Ints(node.attrs["pads"]))
        )

    def _quantize_rows(self, node: Node, graph: Graph) -> Call:
        kind = "_symmetric" if node.attrs["symmetric"] else ""
        return _call(
            "call_gemm.h",
            "run_quantize_rows",
            self._prepare(f"gemm_quantize_rows{kind}"),
            node.outputs,
            node.inputs,
        )

    def _quantize_tensor(self, node: Node, graph: Graph) -> Call:
        kernels = (self._prepare("gemm_minmax"), self._prepare("gemm_pad_u8_dynamic"))
        tensors = [Ref(n) for n in (*node.outputs, *node.inputs)]
        return Call("call_gemm.h", "run_quantize_tensor", (), (*kernels, *tensors))

    # -- loops and rows ---------------------------------------------------------------------------

    def _loop(self, node: Node, graph: Graph) -> Call:
        steps = tuple(Step(f, args, params) for f, args, params in node.attrs["chain"])
        types = tuple(_CODES.get(t, t) for t in (graph.values[n].dtype for n in node.inputs))
        result = _CODES.get(node.attrs["out"], node.attrs["out"])
        spec = LoopSpec(self.isa, steps, types, ((f"t{len(steps) - 1}", result),))
        self._loops[spec.name] = spec
        self._declarations[f"void {spec.name}(const LoopArgs& a, int thread, int threads);"] = None
        kernel = Word(spec.name)
        return Call(
            "call_loop.h", "run_loop", (), (kernel, Ref(node.outputs[0]), Refs(tuple(node.inputs)))
        )

    def _use_rows(self) -> None:
        self._sources.setdefault("rowops", render_rowops(self.isa))

    def _rows(self, function: str, node: Node, *attributes: Argument) -> Call:
        self._use_rows()
        tensors = [Ref(n) for n in (*node.outputs, *node.inputs)]
        return Call("call_rows.h", function, (), (*tensors, *attributes))

    def _layer_norm(self, node: Node, graph: Graph) -> Call:
        self._use_rows()
        sum_ = node.outputs[1] if node.attrs["sum"] else ""
        inputs = [given(node, i) for i in range(4)]
        tensors = [Ref(n) for n in (node.outputs[0], sum_, *inputs)]
        return Call("call_rows.h", "run_layer_norm", (), (*tensors, float(node.attrs["eps"])))

    def _softmax(self, node: Node, graph: Graph) -> Call:
        return self._rows("run_softmax", node, bool(node.attrs["log"]))

    def _reduce(self, node: Node, graph: Graph) -> Call:
        a = node.attrs
        return self._rows(
            "run_reduce", node, Word(f"Reduction::{a['kind']}"), a["first"], a["last"]
        )

    def _swap(self, node: Node, graph: Graph) -> Call:
        size = TYPES[graph.values[node.inputs[0]].dtype].bytes
        return self._rows("run_swap", node, Ints(node.attrs["axes"]), size)

    def _join(self, node: Node, graph: Graph) -> Call:
        self._use_rows()
        tensors = (Ref(node.outputs[0]), Refs(tuple(node.inputs)))
        attributes = (Ints(node.attrs["factors"]), Ints(node.attrs["pads"]))
        return Call("call_rows.h", "run_join_images", (), (*tensors, *attributes))

    def _pool(self, node: Node, graph: Graph) -> Call:
        a = node.attrs
        return self._rows(
            "run_pool",
            node,
            a["kind"] == "max",
            Ints(a["kernel"]),
            Ints(a["strides"]),
            Ints(a["dilations"]),
            Ints(a["pads"]),
            bool(a["include_pad"]),
        )

    def _attention(self, node: Node, graph: Graph) -> Call:
        self._use_rows()
        tensors = [Ref(node.outputs[0]), *(Ref(given(node, i)) for i in range(4))]
        return Call(
            "call_rows.h",
            "run_attention",
            (),
            (
                *tensors,
                node.attrs["heads"],
                node.attrs["head_dim"],
                Ints(node.attrs["offsets"]),
                float(node.attrs["scale"]),
            ),
        )


@dataclass(frozen=True)
class RowRecord:
    """How a kernel of a format reads a row of x: bytes from row to row, and where in them scales,
    zeros and sums lie. ``kernel`` makes them; '' if x is read as it is."""

    kernel: str
    stride: int
    padded: int
    scale: int = 0
    zero: int = 0
    sum: int = 0
    corrections: tuple[tuple[int, int, int], ...] = ()  # offset, segment, zero


def row_record(spec: MatmulSpec, k: int) -> RowRecord:
    """The rows that a kernel reads for K columns (as codegen/lower.py has them)."""
    block = spec.format.block * spec.layout.blocks
    if spec.integer:
        zeros, sums = activation_needs(spec)
        record = ActivationRecord(
            align(k, max(block, 32)), spec.token_scale, zeros, sums
        )
        corrections = tuple((record.offset("zero", n, z), n, z) for n, z in zeros) + tuple(
            (record.offset("sum", n), n, 0) for n in sums
        )
        return RowRecord(
            "rows_int8",
            record.nbytes,
            record.k,
            record.scale_offset,
            record.offset("zero", *zeros[0]) if zeros else 0,
            record.offset("sum", sums[0]) if sums else 0,
            corrections,
        )
    if spec.activations == "bf16":
        padded = align(k, max(block, 16))
        return RowRecord("rows_bf16", 2 * padded, padded)
    if align(k, block) == k:
        return RowRecord("", 4 * k, k)
    padded = align(align(k, block), 16)
    return RowRecord("rows_f32", 4 * padded, padded)


def with_rows(graph: Graph, formats: FormatSpecs) -> Graph:
    """Products of formats with the rows that their kernels read, made once for equal readers."""
    r = Rewriter(graph)
    made: dict[tuple[str, RowRecord], str] = {}
    for node in r.nodes():
        if node.op != "FormatProduct":
            continue
        x, a = node.inputs[0], node.attrs
        spec = formats[r.dtype(node.inputs[1]), a["n"], a["k"]]
        record = row_record(spec, a["k"])
        if not record.kernel:
            continue
        if (x, record) not in made:
            made[x, record] = r.name(f"{x}/rows")
            r.make(
                "FormatRows",
                [x],
                [made[x, record]],
                {"stride": record.stride, "of": node.name},
                before=node,
            )
        r.replace(
            node, "FormatProduct", [*node.inputs[:2], given(node, 2), made[x, record]], dict(a)
        )
    return r.done()


def packed_formats(graph: Graph, formats: FormatSpecs) -> list[PackedTensor]:
    """The matrices in formats as weights.bin has them."""
    return [
        PackedTensor(
            n.inputs[1],
            (n.inputs[1],),
            formats[graph.values[n.inputs[1]].dtype, n.attrs["n"], n.attrs["k"]],
        )
        for n in graph.nodes
        if n.op == "FormatProduct"
    ]


def _call(
    header: str, function: str, kernel: Word, outputs: list[str], inputs: list[str], *rest: Argument
) -> Call:
    """``function(c, kernel, outputs.., inputs.., rest..)``."""
    return Call(header, function, (), (kernel, *(Ref(n) for n in (*outputs, *inputs)), *rest))
