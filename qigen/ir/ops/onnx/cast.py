"""Casts between element types, by value and by bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.ir.dims import Sym
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Known,
    TensorOp,
    Word,
    check_inputs,
    constant,
    element,
    given,
    kernel,
    shape,
)
from qigen.ir.types import ElementType, of_onnx

ROUNDING = {"up": "Round::kUp", "down": "Round::kDown", "nearest": "Round::kNearest"}

_BITS = {"f4e2m1": 4, "i4": 4, "u4": 4, "i2": 2, "u2": 2}


def target(node: Node, attr: str = "to") -> ElementType:
    """The type that an attribute names by its number in onnx.TensorProto."""
    return of_onnx(node.attrs[attr], node.name)


@register
class Cast(TensorOp):
    """``x`` as the type ``to``; ``saturate`` and ``round_mode`` are for floats of 8 bits."""

    name = "onnx.Cast"
    inputs = "x"
    attrs = (
        Attr("to", int),
        Attr("saturate", int, 1, choices=(0, 1)),
        Attr("round_mode", str, "up", choices=tuple(ROUNDING)),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        element(node, graph, 0)
        return [(shape(node, graph, 0), target(node).name)]

    def values(
        self, node: Node, graph: Graph, inputs: Sequence[Known | None]
    ) -> list[Known | None]:
        to = target(node)
        found = inputs[0]
        if found is None:
            found = self._whole(constant(graph, given(node, 0)))
        if found is None or to.name not in ("i64", "i32", "f32", "f64", "bool"):
            return [None]
        result = [self._value(v, to) for v in found.reshape(-1)]
        if any(v is None for v in result):
            return [None]
        array = np.empty(len(result), object)
        array[:] = result
        return [array.reshape(found.shape)]

    def _value(self, v: Any, to: ElementType) -> Any:
        if to.name == "bool":
            return None if isinstance(v, Sym) else bool(v)
        if isinstance(v, Sym):
            return v
        exact = {"i32": 31, "i64": 63, "f32": 24, "f64": 53}[to.name]
        return int(v) if abs(int(v)) < 2**exact else None

    def _whole(self, data: Array | None) -> Known | None:
        """Floats without fractions as integers."""
        if data is None or data.dtype.kind != "f" or data.size > 64:
            return None
        if not np.all(np.isfinite(data)) or np.any(data != np.trunc(data)):
            return None
        return np.array([int(v) for v in data.reshape(-1)], object).reshape(data.shape)

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        to = target(node).name
        if to in _BITS or to.startswith("f8"):
            # ml_dtypes rounds twice and saturates otherwise
            raise NotImplementedError
        return super().reference(node, inputs, ev)

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        source, to = element(node, graph, 0).name, target(node).name
        if source == to:
            return Alias(node.inputs[0])
        return kernel(node, "cast.h", "cast", (to, source), bool(node.attrs["saturate"]),
                      Word(ROUNDING[node.attrs["round_mode"]]))


@register
class BitCast(TensorOp):
    """The bits of ``x`` as the type ``to``, which must have as many."""

    name = "onnx.BitCast"
    inputs = "x"
    attrs = (Attr("to", int),)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        source, to = element(node, graph, 0), target(node)
        if _bits(source) != _bits(to):
            raise BadInput(f"BitCast of {source.name} to {to.name}: they differ in their bits",
                           node.name)
        if to.name == "bool" and source.name != "bool":
            raise Unsupported(f"BitCast of {source.name} to bool has no kernel: not all of its "
                              "codes are bools", node.name)
        return [(shape(node, graph, 0), to.name)]

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        to = target(node)
        bits = np.ascontiguousarray(inputs[0]).view(f"u{to.bytes}")
        if _bits(to) < 8:
            bits = bits & ((1 << _bits(to)) - 1)
        return [bits.view(to.numpy).reshape(inputs[0].shape)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        bits = _bits(target(node))
        if bits >= 8:
            return Alias(node.inputs[0])
        return kernel(node, "cast.h", "copy_low_bits", (), (1 << bits) - 1)


def _bits(kind: ElementType) -> int:
    return _BITS.get(kind.name, 8 * kind.bytes)
