"""Signals: DFT, STFT and the mel filter bank. The windows are functions of other operators."""

from __future__ import annotations

from typing import Any, ClassVar

from qigen.errors import BadInput, Unsupported
from qigen.ir import types
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.ops.onnx.linear import FLOATS, must_match, same_type
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Argument,
    Call,
    Ints,
    Problem,
    Ref,
    RunInts,
    TensorOp,
    argument,
    axis_of,
    check_inputs,
    element,
    fresh,
    fresh_shape,
    given,
    kernel,
    parameter,
    require_type,
    shape,
    show,
)

INTEGERS = ("i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")
WRONG = Problem("its lengths make no sense for its input")
ONE_SIDED = Attr("onesided", int, 0, choices=(0, 1))


def scalar(node: Node, graph: Graph, index: int, attr: str) -> int | Sym | RunInts | None:
    """A parameter that is one number: known, known at run time, or absent."""
    found = parameter(node, graph, index, attr)
    if isinstance(found, RunInts) or found is None:
        return found
    if len(found) != 1:
        raise BadInput(f"{attr} has {len(found)} numbers; it must be one", node.name)
    number: int | Sym = found[0]
    if not isinstance(number, Sym) and number < 1:
        raise BadInput(f"{attr} is {number}; it must be positive", node.name)
    return number


def half(n: Any) -> Any:
    """Bins of the spectrum of n real numbers that are no mirror images of others."""
    return n // 2 + 1


@register
class DFT(TensorOp):
    """The discrete Fourier transform along an axis of [.., 1 (real) or 2 (complex)]."""

    name = "onnx.DFT"
    inputs = "input, dft_length?, axis?"
    attrs = (
        Attr("inverse", int, 0, choices=(0, 1)),
        ONE_SIDED,
        Attr("dft_length", tuple, None),
        Attr("axis", tuple, None),
    )
    parameters: ClassVar[dict[int, str]] = {1: "dft_length", 2: "axis"}
    fold = False

    def _axis(self, node: Node, graph: Graph) -> int | RunInts:
        found = parameter(node, graph, 2, "axis")
        if isinstance(found, RunInts):
            return found
        rank = len(shape(node, graph, 0))
        axis = axis_of(node, int(found[0]) if found else -2, rank)
        if axis == rank - 1:
            raise BadInput("the last axis holds the parts of numbers", node.name)
        return axis

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, 3)
        kind = require_type(node, graph, 0, FLOATS)
        source: tuple[Any, ...] = shape(node, graph, 0)
        if len(source) < 2 or (isinstance(source[-1], int) and source[-1] not in (1, 2)):
            raise BadInput(f"the input is {show(source)}; it must be [.., 1 or 2]", node.name)
        axis = self._axis(node, graph)
        inverse, onesided = node.attrs["inverse"], node.attrs["onesided"]
        parts = 1 if inverse and onesided else 2
        length = scalar(node, graph, 1, "dft_length")
        if isinstance(axis, RunInts):
            return [((*fresh_shape(node, 0, len(source) - 1), parts), kind)]
        n: Dim
        if isinstance(length, RunInts):
            n = fresh(node, 0, axis)
        else:
            n = length if length is not None else source[axis]
            if length is None and inverse and onesided:
                n = 2 * (source[axis] - 1)
            if onesided and not inverse:
                n = half(n)
        return [((*source[:axis], n, *source[axis + 1 : -1], parts), kind)]

    def _arguments(self, node: Node, graph: Graph) -> tuple[Argument, ...]:
        axis = self._axis(node, graph)
        return (
            argument(parameter(node, graph, 1, "dft_length")),
            axis if isinstance(axis, RunInts) else Ints((axis,)),
            bool(node.attrs["inverse"]),
            bool(node.attrs["onesided"]),
        )

    def measure(self, node: Node, graph: Graph) -> Call | None:
        arguments = self._arguments(node, graph)
        if not any(isinstance(a, RunInts) for a in arguments):
            return None
        every = isinstance(arguments[1], RunInts)
        return Call("signal.h", "dft_sizes", (), (Ref(node.inputs[0]), *arguments, every, WRONG))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        types = (element(node, graph, 0).name,)
        return kernel(
            node, "signal.h", "dft", types, *self._arguments(node, graph), WRONG, inputs=(0,)
        )


@register
class STFT(TensorOp):
    """DFTs of frames of a signal [B, samples, 1 or 2], times a window."""

    name = "onnx.STFT"
    inputs = "signal, frame_step, window?, frame_length?"
    attrs = (
        Attr("onesided", int, 1, choices=(0, 1)),
        Attr("frame_step", tuple, None),
        Attr("frame_length", tuple, None),
    )
    parameters: ClassVar[dict[int, str]] = {1: "frame_step", 3: "frame_length"}
    fold = False

    def _lengths(self, node: Node, graph: Graph) -> tuple[Any, Any]:
        """Step and length of frames: numbers or RunInts."""
        step = scalar(node, graph, 1, "frame_step")
        length: Any = scalar(node, graph, 3, "frame_length")
        if step is None:
            raise BadInput("STFT needs frame_step", node.name)
        if length is None:
            length = shape(node, graph, 2 if given(node, 2) else 0)[0 if given(node, 2) else 1]
        return step, length

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        kind = same_type(node, graph, FLOATS, (0, 2))
        source = shape(node, graph, 0)
        if len(source) not in (2, 3) or (
            len(source) == 3 and isinstance(source[2], int) and source[2] not in (1, 2)
        ):
            raise BadInput(
                f"signal is {show(source)}; it must be [batch, samples, 1 or 2]", node.name
            )
        if given(node, 2) and len(shape(node, graph, 2)) != 1:
            raise BadInput("window must have one axis", node.name)
        step, length = self._lengths(node, graph)
        if isinstance(step, RunInts) or isinstance(length, RunInts):
            sizes: tuple[Dim, Dim] = (fresh(node, 0, 1), fresh(node, 0, 2))
        else:
            if given(node, 2):
                must_match(node, shape(node, graph, 2)[0], length, "the window and frame_length")
            if isinstance(source[1], int) and isinstance(length, int) and length > source[1]:
                raise BadInput(f"frames of {length} do not fit into {source[1]} samples", node.name)
            sizes = (
                (source[1] - length) // step + 1,
                half(length) if node.attrs["onesided"] else length,
            )
        return [((source[0], *sizes, 2), kind)]

    def _arguments(self, node: Node, graph: Graph) -> tuple[Any, ...]:
        return tuple(
            x if isinstance(x, RunInts) else Ints((x,)) for x in self._lengths(node, graph)
        )

    def measure(self, node: Node, graph: Graph) -> Call | None:
        arguments = self._arguments(node, graph)
        if not any(isinstance(a, RunInts) for a in arguments):
            return None
        return Call(
            "signal.h",
            "stft_sizes",
            (),
            (Ref(node.inputs[0]), *arguments, bool(node.attrs["onesided"]), WRONG),
        )

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(
            node,
            "signal.h",
            "stft",
            (element(node, graph, 0).name,),
            *self._arguments(node, graph),
            bool(node.attrs["onesided"]),
            WRONG,
            inputs=(0, 2),
        )


@register
class MelWeightMatrix(TensorOp):
    """Triangles that turn a spectrum into bands of the mel scale: [bins of the spectrum, bands]."""

    name = "onnx.MelWeightMatrix"
    inputs = "num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz"
    attrs = (
        Attr("output_datatype", int, 1),
        Attr("num_mel_bins", tuple, None),
        Attr("dft_length", tuple, None),
        Attr("sample_rate", tuple, None),
    )
    parameters: ClassVar[dict[int, str]] = {0: "num_mel_bins", 1: "dft_length", 2: "sample_rate"}
    fold = False

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        same_type(node, graph, FLOATS, (3, 4))
        kind = types.of_onnx(node.attrs["output_datatype"], node.name).name
        if kind not in (*FLOATS, *INTEGERS):
            raise Unsupported(f"MelWeightMatrix of {kind} has no kernel", node.name)
        bands = scalar(node, graph, 0, "num_mel_bins")
        length = scalar(node, graph, 1, "dft_length")
        if bands is None or length is None or scalar(node, graph, 2, "sample_rate") is None:
            raise BadInput("MelWeightMatrix takes 5 inputs", node.name)
        if isinstance(bands, RunInts) or isinstance(length, RunInts):
            return [((fresh(node, 0, 0), fresh(node, 0, 1)), kind)]
        return [((half(length), bands), kind)]

    def measure(self, node: Node, graph: Graph) -> Call | None:
        bands, length = (parameter(node, graph, i, self.parameters[i]) for i in (0, 1))
        if not isinstance(bands, RunInts) and not isinstance(length, RunInts):
            return None
        return Call("signal.h", "mel_sizes", (), (argument(bands), argument(length), WRONG))

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        length, rate = (argument(parameter(node, graph, i, self.parameters[i])) for i in (1, 2))
        kinds = (graph.values[node.outputs[0]].dtype, element(node, graph, 3).name)
        return kernel(node, "signal.h", "mel_weights", kinds, length, rate, WRONG, inputs=(3, 4))


__all__ = ["DFT", "STFT", "MelWeightMatrix"]
