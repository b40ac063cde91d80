"""Recurrent layers: RNN, GRU and LSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qigen.errors import BadInput, Unsupported
from qigen.ir.graph import Graph, Node, Shape
from qigen.ir.ops.onnx.linear import FLOATS, must_match, same_type
from qigen.ir.schema import Attr, register
from qigen.ir.tensor import (
    Alias,
    Argument,
    Call,
    Floats,
    Ints,
    Problem,
    TensorOp,
    check_inputs,
    element,
    given,
    kernel,
    require_type,
    shape,
    show,
)


@dataclass(frozen=True)
class Function:
    """An activation: which of alpha and beta it takes, and what they are if not given."""

    name: str
    alpha: float | None = None
    beta: float | None = None


FUNCTIONS: tuple[Function, ...] = (
    Function("Relu"),
    Function("Tanh"),
    Function("Sigmoid"),
    Function("Affine", 1.0, 0.0),
    Function("LeakyRelu", 0.01),
    Function("ThresholdedRelu", 1.0),
    Function("ScaledTanh", 1.0, 1.0),
    Function("HardSigmoid", 0.2, 0.5),
    Function("Elu", 1.0),
    Function("Softsign"),
    Function("Softplus"),
)
"""In the order of ``Activation`` in recurrent.h."""

_NUMBERS = {f.name.lower(): i for i, f in enumerate(FUNCTIONS)}

ATTRS = (
    Attr("activation_alpha", tuple, None),
    Attr("activation_beta", tuple, None),
    Attr("activations", tuple, None),
    Attr("clip", float, None),
    Attr("direction", str, "forward", choices=("forward", "reverse", "bidirectional")),
    Attr("hidden_size", int, None),
    Attr("layout", int, 0, choices=(0, 1)),
)


class _Recurrent(TensorOp):
    """``gates`` matrices in W and R, ``functions`` the usual activations of a direction, ``states``
    the inputs that hold initial states."""

    gates: int
    functions: tuple[str, ...]
    states: tuple[int, ...] = (5,)
    most = 6
    fold = False
    attrs: ClassVar[tuple[Attr, ...]] = ATTRS

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 3, self.most)
        floats = [i for i in range(self.most) if i != 4]
        kind = same_type(node, graph, FLOATS, floats)
        if given(node, 4):
            require_type(node, graph, 4, ("i32",))
        x, w, r = (shape(node, graph, i) for i in range(3))
        if len(x) != 3 or len(w) != 3 or len(r) != 3:
            raise BadInput(
                f"X, W and R are {show(x)}, {show(w)} and {show(r)}; all need 3 axes", node.name
            )
        directions = 2 if node.attrs["direction"] == "bidirectional" else 1
        hidden = r[2]
        for a, b, what in (
            (w[0], directions, "the directions of W and of the attribute"),
            (r[0], directions, "the directions of R and of the attribute"),
            (w[1], self.gates * hidden, "the rows of W and what the hidden size asks for"),
            (r[1], self.gates * hidden, "the rows of R and what the hidden size asks for"),
            (w[2], x[2], "the columns of W and of X"),
            (node.attrs["hidden_size"] or hidden, hidden, "hidden_size and the columns of R"),
        ):
            must_match(node, a, b, what)
        first = node.attrs["layout"]
        steps, batch = x[first], x[1 - first]
        state = (batch, directions, hidden) if first else (directions, batch, hidden)
        for i in self.states:
            if given(node, i):
                found = shape(node, graph, i)
                if len(found) != 3:
                    raise BadInput(f"an initial state is {show(found)}; it needs 3 axes", node.name)
                for a, b in zip(found, state, strict=True):
                    must_match(node, a, b, "sizes of an initial state and of the layer")
        self.activations(node)
        y = (batch, steps, directions, hidden) if first else (steps, directions, batch, hidden)
        return [(y, kind), *[(state, kind)] * (self.results - 1)]

    def activations(self, node: Node) -> tuple[Ints, Floats, Floats]:
        """Numbers, alphas and betas of the functions of all directions."""
        a = node.attrs
        directions = 2 if a["direction"] == "bidirectional" else 1
        names = a["activations"] or self.functions * directions
        if len(names) != len(self.functions) * directions:
            raise BadInput(
                f"there are {len(names)} activations; "
                f"{len(self.functions) * directions} are needed",
                node.name,
            )
        given_alpha, given_beta = (
            iter(a[n] or ()) for n in ("activation_alpha", "activation_beta")
        )
        numbers, alphas, betas = [], [], []
        for name in names:
            number = _NUMBERS.get(name.lower())
            if number is None:
                raise Unsupported(
                    f"{node.op} with the activation {name} is not supported", node.name
                )
            row = FUNCTIONS[number]
            numbers.append(number)
            alphas.append(0.0 if row.alpha is None else float(next(given_alpha, row.alpha)))
            betas.append(0.0 if row.beta is None else float(next(given_beta, row.beta)))
        return Ints(tuple(numbers)), Floats(tuple(alphas)), Floats(tuple(betas))

    def layer(self, node: Node, graph: Graph, function: str, *attributes: Argument) -> Call:
        """The call: results, inputs, activations, and what the layer is like."""
        a = node.attrs
        clip = float(a["clip"] or 0.0)
        types = (element(node, graph, 0).name,)
        wrong = Problem(
            "the sizes of its inputs do not fit together, or a length of a sequence is out of range"
        )
        return kernel(
            node,
            "recurrent.h",
            function,
            types,
            *self.activations(node),
            clip,
            a["direction"] == "reverse",
            bool(a["layout"]),
            *attributes,
            wrong,
            inputs=range(self.most),
        )


@register
class RNN(_Recurrent):
    """h = f(x W + h R + b), step by step."""

    name = "onnx.RNN"
    inputs = "X, W, R, B?, sequence_lens?, initial_h?"
    gates = 1
    functions = ("Tanh",)
    results = 2

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.layer(node, graph, "rnn")

    def activations(self, node: Node) -> tuple[Ints, Floats, Floats]:
        if node.attrs["direction"] != "bidirectional" and len(node.attrs["activations"] or ()) == 2:
            # the standard's default has one for each of two directions
            node.attrs["activations"] = node.attrs["activations"][:1]
        return super().activations(node)


@register
class GRU(_Recurrent):
    """A gated recurrent unit: gates z and r decide how much of the state is kept and read."""

    name = "onnx.GRU"
    inputs = "X, W, R, B?, sequence_lens?, initial_h?"
    attrs = (*ATTRS, Attr("linear_before_reset", int, 0))
    gates = 3
    functions = ("Sigmoid", "Tanh")
    results = 2

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.layer(node, graph, "gru", bool(node.attrs["linear_before_reset"]))


@register
class LSTM(_Recurrent):
    """Long short-term memory: a cell state with gates i, o and f; P are peepholes."""

    name = "onnx.LSTM"
    inputs = "X, W, R, B?, sequence_lens?, initial_h?, initial_c?, P?"
    attrs = (*ATTRS, Attr("input_forget", int, 0))
    gates = 4
    functions = ("Sigmoid", "Tanh", "Tanh")
    states = (5, 6)
    most = 8
    results = 3

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return self.layer(node, graph, "lstm", bool(node.attrs["input_forget"]))


__all__ = ["FUNCTIONS", "GRU", "LSTM", "RNN"]
