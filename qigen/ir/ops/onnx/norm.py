"""Normalisations. GroupNormalization and MeanVarianceNormalization are functions of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qigen.errors import BadInput
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.onnx.linear import FLOATS, WRONG, must_match, same_type
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    Alias,
    Call,
    Ref,
    TensorOp,
    axis_of,
    broadcast,
    check_inputs,
    element,
    given,
    kernel,
    require_type,
    shape,
    show,
)

EPSILON = Attr("epsilon", float, 1e-5)


def channels(node: Node, graph: Graph, vectors: Sequence[int]) -> None:
    """BadInput unless the inputs ``vectors`` have a number for every channel (axis 1)."""
    source = shape(node, graph, 0)
    for i in vectors:
        vector = shape(node, graph, i)
        if len(vector) != 1:
            raise BadInput(f"input {i} is {show(vector)}; it must have one axis", node.name)
        must_match(
            node,
            vector[0],
            source[1] if len(source) > 1 else 1,
            f"the channels and the size of input {i}",
        )


@register
class BatchNormalization(TensorOp):
    """By mean and variance of every channel: given ones, or (training_mode) those of the batch."""

    name = "onnx.BatchNormalization"
    inputs = "X[B, C, ..], scale[C], B[C], input_mean[C], input_var[C]"
    attrs = (EPSILON, Attr("momentum", float, 0.9), Attr("training_mode", int, 0, choices=(0, 1)))

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 5)
        kind = require_type(node, graph, 0, FLOATS)
        same_type(node, graph, FLOATS, (1, 2))
        moments = same_type(node, graph, FLOATS, (3, 4))
        channels(node, graph, (1, 2, 3, 4))
        extra = len(node.outputs) - 1
        if extra and not node.attrs["training_mode"]:
            raise BadInput(
                "the running mean and variance are results of training_mode only", node.name
            )
        vector = (shape(node, graph, 3), moments)
        return [(shape(node, graph, 0), kind), vector, vector][: 1 + extra]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        types = tuple(element(node, graph, i).name for i in (0, 1, 3))
        eps = float(np.float32(node.attrs["epsilon"]))
        if not node.attrs["training_mode"]:
            return kernel(node, "norm.h", "batch_norm", types, eps, WRONG)
        results = [*node.outputs, "", ""][:3]
        tensors = (Ref(name) for name in (*results, *node.inputs))
        return Call(
            "norm.h",
            "batch_norm_training",
            types,
            (*tensors, eps, float(node.attrs["momentum"]), WRONG),
        )


@register
class InstanceNormalization(TensorOp):
    """By mean and variance of every channel of every image."""

    name = "onnx.InstanceNormalization"
    inputs = "input[B, C, ..], scale[C], B[C]"
    attrs = (EPSILON,)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 3)
        kind = same_type(node, graph, FLOATS, (0, 1, 2))
        if len(shape(node, graph, 0)) < 2:
            raise BadInput("the input must be [batch, channels, ..]", node.name)
        channels(node, graph, (1, 2))
        return [(shape(node, graph, 0), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        types = (element(node, graph, 0).name,)
        eps = float(np.float32(node.attrs["epsilon"]))
        return kernel(node, "norm.h", "instance_norm", types, eps, WRONG)


class _RowNorm(TensorOp):
    """Normalisation over the axes from ``axis`` on."""

    def check(self, node: Node, graph: Graph) -> int:
        """The axis; BadInput unless scale and bias can be broadcast to x."""
        source = shape(node, graph, 0)
        if not source:
            raise BadInput("X is a scalar", node.name)
        for i in range(1, len(node.inputs)):
            wanted = broadcast(node, source, shape(node, graph, i))
            if len(wanted) != len(source):
                raise BadInput(
                    f"input {i} of {show(shape(node, graph, i))} cannot be broadcast to "
                    f"{show(source)}",
                    node.name,
                )
        return axis_of(node, node.attrs["axis"], len(source))

    def normalize(self, node: Node, graph: Graph, rms: bool) -> Call:
        """The call; absent results and bias are absent tensors."""
        result = graph.values[node.outputs[0]].dtype
        extra = [*node.outputs[1:], "", ""][:2]
        stash = next((graph.values[name].dtype for name in extra if name), "f32")
        tensors = (node.outputs[0], *extra, *(given(node, i) for i in range(3)))
        return Call(
            "norm.h",
            "layer_norm",
            (element(node, graph, 0).name, result, stash),
            (
                *(Ref(name) for name in tensors),
                self.check(node, graph),
                rms,
                float(np.float32(node.attrs["epsilon"])),
                WRONG,
            ),
        )


@register
class LayerNormalization(_RowNorm):
    """By mean and variance over the axes from ``axis`` on; both (the latter as 1 / deviation) are
    results too."""

    name = "onnx.LayerNormalization"
    inputs = "X, Scale, B?"
    attrs = (Attr("axis", int, -1), EPSILON, Attr("stash_type", int, 1, choices=(1, 16)))

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 3)
        kind = same_type(node, graph, FLOATS, (0, 1, 2))
        axis = self.check(node, graph)
        source = shape(node, graph, 0)
        row = (
            (*source[:axis], *(1,) * (len(source) - axis)),
            "f32" if node.attrs["stash_type"] == 1 else "bf16",
        )
        return [(source, kind), row, row][: len(node.outputs)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.normalize(node, graph, False)


@register
class RMSNormalization(_RowNorm):
    """By the root of the mean square over the axes from ``axis`` on."""

    name = "onnx.RMSNormalization"
    inputs = "X, scale"
    attrs = LayerNormalization.attrs

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2)
        require_type(node, graph, 0, FLOATS)
        self.check(node, graph)
        return [(shape(node, graph, 0), require_type(node, graph, 1, FLOATS))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.normalize(node, graph, True)


@register
class LRN(TensorOp):
    """By the squares of ``size`` neighbouring channels."""

    name = "onnx.LRN"
    inputs = "X[B, C, ..]"
    attrs = (
        Attr("alpha", float, 1e-4),
        Attr("beta", float, 0.75),
        Attr("bias", float, 1.0),
        Attr("size", int, minimum=1),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, FLOATS)
        if len(shape(node, graph, 0)) < 2:
            raise BadInput("X must be [batch, channels, ..]", node.name)
        return [(shape(node, graph, 0), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        numbers = (float(node.attrs[name]) for name in ("alpha", "beta", "bias"))
        types = (element(node, graph, 0).name,)
        return kernel(node, "norm.h", "lrn", types, *numbers, node.attrs["size"])


@register
class LpNormalization(TensorOp):
    """By the 1- or 2-norm along ``axis``; 0 where that is 0."""

    name = "onnx.LpNormalization"
    inputs = "input"
    attrs = (Attr("axis", int, -1), Attr("p", int, 2, choices=(1, 2)))

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, FLOATS)
        axis_of(node, node.attrs["axis"], len(shape(node, graph, 0)))
        return [(shape(node, graph, 0), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        axis = axis_of(node, node.attrs["axis"], len(shape(node, graph, 0)))
        types = (element(node, graph, 0).name,)
        return kernel(node, "norm.h", "lp_normalize", types, axis, node.attrs["p"])

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        # onnx.reference forgets the absolute value of the 1-norm
        x = inputs[0].astype(np.float64)
        norm = np.linalg.norm(x, ord=node.attrs["p"], axis=node.attrs["axis"], keepdims=True)
        result = np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)
        return [result.astype(inputs[0].dtype)]
