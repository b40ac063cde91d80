from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from qigen.errors import BadInput, QigenError, Unsupported
from qigen.formats import QuantizedTensor, by_name
from qigen.ir import Graph, State, Value
from qigen.ir.verify import verify
from qigen.passes import optimize
from tests.ir.tiny import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_good_graphs(family: str) -> None:
    graph = build(FAMILIES[family])
    assert verify(graph) == []
    assert verify(optimize(graph)) == []


def test_dead_values_are_reported() -> None:
    graph = build(FAMILIES["llama"])
    graph.add_constant("lonely", np.ones(3, np.float32))
    graph.add("Add", "x", "x", name="unread")
    assert verify(graph) == ["lonely", "unread"]


def node(graph: Graph, name: str) -> int:
    return next(i for i, n in enumerate(graph.nodes) if n.name == name)


def twice(g: Graph) -> None:
    g.nodes.append(dataclasses.replace(g.nodes[0], name="other"))


def same_name(g: Graph) -> None:
    g.nodes[1].name = g.nodes[0].name


def too_early(g: Graph) -> None:
    i = node(g, "l0.q")
    g.nodes.insert(0, g.nodes.pop(i))


def unknown_operator(g: Graph) -> None:
    g.nodes[node(g, "l0.q")].op = "Conv"


def unknown_attribute(g: Graph) -> None:
    g.nodes[node(g, "l0.q")].attrs["transposed"] = True


def missing_attribute(g: Graph) -> None:
    del g.nodes[node(g, "l0.attn_norm")].attrs["head_dim"]


def attribute_of_wrong_type(g: Graph) -> None:
    g.nodes[node(g, "l0.attn_norm")].attrs["head_dim"] = 0.0


def integer_for_float(g: Graph) -> None:
    g.nodes[node(g, "x")].attrs["scale"] = 1


def wrong_shape(g: Graph) -> None:
    g.values["l0.q"] = Value("l0.q", ("T", 32), "f32")


def wrong_symbol(g: Graph) -> None:
    g.values["logits"] = Value("logits", ("T", 50), "f32")


def wrong_dtype(g: Graph) -> None:
    g.values["l0.q"] = Value("l0.q", ("T", 64), "f16")


def missing_value(g: Graph) -> None:
    del g.values["l0.q"]


def orphan(g: Graph) -> None:
    g.values["orphan"] = Value("orphan", ("T", 64), "f32")


def misnamed(g: Graph) -> None:
    g.values["l0.q"] = Value("l9.q", ("T", 64), "f32")


def impossible_dimension(g: Graph) -> None:
    g.values["x"] = Value("x", ("", 64), "f32")


def input_twice(g: Graph) -> None:
    g.inputs.append("rows")


def input_of_wrong_type(g: Graph) -> None:
    g.values["rows"] = Value("rows", ("R",), "q4_0")


def no_output(g: Graph) -> None:
    g.outputs.clear()


def output_twice(g: Graph) -> None:
    g.outputs *= 2


def output_not_computed(g: Graph) -> None:
    g.outputs.append("embedding")


def one_output_too_many(g: Graph) -> None:
    g.nodes[0].outputs.append("more")


def constant_of_other_format(g: Graph) -> None:
    g.values["l0.q.w"] = Value("l0.q.w", (64, 64), "q4_1")


def input_is_constant(g: Graph) -> None:
    g.inputs.append("l0.q.w")


def two_writers(g: Graph) -> None:
    g.add("KVAppend", "l0.k", "l0.v", "positions", name="again", state="l0.kv")


def unused_state(g: Graph) -> None:
    g.add_state(State("spare", "kv", 2, 16))


def other_state(g: Graph) -> None:
    g.nodes[node(g, "l1.attention")].attrs["state"] = "l0.kv"


def state_of_other_shape(g: Graph) -> None:
    g.states["l0.kv"] = State("l0.kv", "kv", 2, 8)


def state_of_no_heads(g: Graph) -> None:
    g.states["spare"] = State("spare")


@pytest.mark.parametrize(
    ("damage", "where", "message"),
    [
        (twice, "other", "'x' is defined a second time"),
        (same_name, "x", "two nodes have this name"),
        (too_early, "l0.q", "'l0.attn_norm' is not defined before"),
        (unknown_operator, "l0.q", "operator 'Conv' is not known"),
        (unknown_attribute, "l0.q", "no attribute 'transposed'"),
        (missing_attribute, "l0.attn_norm", "head_dim is None"),
        (attribute_of_wrong_type, "l0.attn_norm", "head_dim must be a int"),
        (integer_for_float, "x", "scale is 1; its schema asks for 1.0"),
        (wrong_shape, "l0.q", r"f32\[T,32\] should be l0.q: f32\[T,64\]"),
        (wrong_symbol, "logits", r"should be logits: f32\[R,50\]"),
        (wrong_dtype, "l0.q", r"should be l0.q: f32\[T,64\]"),
        (missing_value, "l0.q", "'l0.q' does not exist"),
        (orphan, "orphan", "no node makes this value"),
        (misnamed, "l9.q", "knows it as 'l0.q'"),
        (impossible_dimension, "x", "impossible dimension"),
        (input_twice, "tiny", "input is listed twice"),
        (input_of_wrong_type, "rows", "must be one of"),
        (no_output, "tiny", "no output"),
        (output_twice, "tiny", "output is listed twice"),
        (output_not_computed, "tiny", "'embedding' is not computed"),
        (one_output_too_many, "x", "makes 1 outputs, not 2"),
        (constant_of_other_format, "l0.q.w", r"what it is: q4_0\[64, 64\]"),
        (input_is_constant, "l0.q.w", "must be one of"),
        (two_writers, "l0.kv", "writers: l0.append, again"),
        (unused_state, "spare", "writers: none"),
        (other_state, "l1.attention", "does not write state 'l0.kv'"),
        (state_of_other_shape, "l0.append", "2 heads of 8"),
        (state_of_no_heads, "spare", "no key/value cache"),
    ],
)
def test_damage_is_named(damage: Callable[[Graph], None], where: str, message: str) -> None:
    graph = build(FAMILIES["llama"])
    damage(graph)
    with pytest.raises(QigenError, match=message) as error:
        verify(graph)
    assert error.value.where == where
    assert isinstance(error.value, Unsupported if damage is unknown_operator else BadInput)


class Handle:
    """A lazy constant that must not be loaded by the verifier."""

    def __init__(self, shape: tuple[int, ...], format: str) -> None:
        self.shape, self.format = shape, by_name(format)

    def load(self) -> QuantizedTensor:
        raise AssertionError("the verifier does not read weights")


@pytest.mark.parametrize(
    ("shape", "format", "message"),
    [
        ((50, 40), "q4_0", "no multiple of the block of 32"),
        ((50, 128), "q4_k", "no multiple of the block of 256"),
        ((50, 40), "u4g64", ""),
        ((50, 33), "bf16", ""),
        ((0, 32), "q4_0", "1 or 2 dimensions"),
        ((2, 2, 32), "q4_0", "1 or 2 dimensions"),
    ],
)
def test_formats_against_shapes(shape: tuple[int, ...], format: str, message: str) -> None:
    graph = Graph("g")
    graph.outputs.append(graph.add("Add", *2 * [graph.add_input("x", ("T", 4), "f32")], name="y"))
    graph.add_constant("w", Handle(shape, format))
    if not message:
        assert verify(graph) == ["w"]
        return
    with pytest.raises(BadInput, match=message) as error:
        verify(graph)
    assert error.value.where == "w"
