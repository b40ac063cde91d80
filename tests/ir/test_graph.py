from __future__ import annotations

import json

import numpy as np
import pytest

from qigen.errors import BadInput, Unsupported
from qigen.formats import Format, QuantizedTensor, by_name
from qigen.ir import Graph, State, schema
from qigen.ir.graph import Array
from qigen.ir.tensor import TensorOp
from qigen.quantize.rtn import quantize_rtn
from tests.ir.tiny import FAMILIES, build


class Lazy:
    """A handle as a frontend makes it."""

    def __init__(self, data: QuantizedTensor) -> None:
        self.data, self.loads = data, 0
        self.shape: tuple[int, ...] = data.shape

    @property
    def format(self) -> Format:
        return self.data.format

    def load(self) -> Array | QuantizedTensor:
        self.loads += 1
        return self.data


def weight(n: int, k: int, format: str) -> QuantizedTensor:
    w = np.random.default_rng(1).standard_normal((n, k)).astype(np.float32)
    return quantize_rtn(w, by_name(format))


def test_names_types_and_defaults() -> None:
    graph = Graph("g")
    x = graph.add_input("x", ("T", 64), "f32")
    w = graph.add_constant("w", Lazy(weight(32, 64, "q4_0")))
    node = graph.add_node("MatMul", [x, w], name="y", layer=3)
    assert (node.output, node.layer) == ("y", 3)
    assert str(graph.values["y"]) == "y: f32[T,32]"
    assert str(graph.values["w"]) == "w: q4_0[32,64]"
    norm = graph.add_node("RMSNorm", ["y", graph.add_constant("n", np.ones(8, np.float32))],
                          {"eps": 1, "head_dim": np.int64(8)})  # fmt: skip
    assert norm.attrs == {"eps": 1.0, "head_dim": 8}
    assert [type(v) for v in norm.attrs.values()] == [float, int]
    assert norm.output == norm.name == "rmsnorm_1"
    group = graph.add_node("MatMulGroup", [x, w, w], {"n_weights": 2}, name="two")
    assert group.outputs == ["two.0", "two.1"]
    with pytest.raises(BadInput, match="2 outputs"):
        _ = group.output


def test_sizes() -> None:
    graph = Graph("g")
    graph.add_constant("w", weight(32, 64, "q4_0"))
    graph.add_constant("lazy", Lazy(weight(8, 100, "u4g64")))
    graph.add_constant("n", np.ones(8, np.float32))
    graph.add_state(State("kv", "kv", 3, 64))
    row = by_name("u4g64")
    assert graph.constant_bytes("w") == 32 * 2 * 18
    assert graph.constant_bytes("lazy") == 8 * 2 * row.block_bytes
    assert graph.weight_bytes() == 32 * 2 * 18 + 16 * row.block_bytes + 32
    assert graph.parameters() == 32 * 64 + 800 + 8
    assert graph.kv_elements_per_position() == 384


def test_copy_is_independent_and_shares_data() -> None:
    graph = build(FAMILIES["llama"])
    before = graph.to_json()
    other = graph.copy()
    assert other.to_json() == before
    assert other.constants["embedding"] is graph.constants["embedding"]
    other.nodes[0].attrs["scale"] = 3.0
    other.nodes[1].inputs.clear()
    other.nodes.pop()
    other.outputs.clear()
    other.values.clear()
    assert graph.to_json() == before


def test_maps() -> None:
    graph = build(FAMILIES["llama"])
    assert graph.producers()["l0.q"].op == "MatMul"
    assert [n.name for n in graph.consumers()["l0.attn_norm"]] == ["l0.q", "l0.k", "l0.v"]
    assert [n.name for n in graph.consumers()["embedding"]] == ["x", "logits"]
    assert graph.consumers()["logits"] == []


def test_rebuilt_drops_what_is_not_needed() -> None:
    graph = build(FAMILIES["llama"])
    graph.add_constant("unused", np.ones(4, np.float32))
    graph.add_state(State("unused", "kv", 1, 4))
    graph.add("RMSNorm", "x", graph.add_constant("n", np.ones(64, np.float32)), name="d", eps=0.0)
    again = graph.rebuilt(graph.copy().nodes)
    assert {"unused", "n", "d"}.isdisjoint(again.values)
    assert "unused" not in again.states
    assert again.to_json()["nodes"] == build(FAMILIES["llama"]).to_json()["nodes"]


def test_dump() -> None:
    graph = build(FAMILIES["gemma2"])
    graph.meta = {"config": State("s", "kv", 1, 2), "n": np.int32(3), "t": (1, 2), "o": object}
    data = json.loads(json.dumps(graph.to_json()))
    assert data["inputs"]["rows"] == "i32[R]"
    assert data["constants"]["l0.q.w"] == {"shape": [128, 64], "format": "q4_0", "bytes": 4608}
    assert data["nodes"][0]["outputs"] == {"x": "f32[T,64]"}
    assert data["meta"]["config"]["head_dim"] == 2
    text = str(graph)
    assert "logits: f32[R,50] = Softcap(raw) cap=5.0" in text
    assert text.count("\n") == len(graph.nodes) + 1


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "message"),
    [
        ("RMSNorm", ["x", "n"], {}, "needs the attribute 'eps'"),
        ("RMSNorm", ["x", "n"], {"eps": 1e-5, "epsilon": 1}, "no attribute 'epsilon'"),
        ("RMSNorm", ["x", "n"], {"eps": "1e-5"}, "eps must be a float"),
        ("RMSNorm", ["x", "n"], {"eps": float("nan")}, "eps must be a float"),
        ("RMSNorm", ["x", "n"], {"eps": True}, "eps must be a float"),
        ("RMSNorm", ["x", "n"], {"eps": -1.0}, "the least is 0"),
        ("RMSNorm", ["x", "n"], {"eps": 0.0, "head_dim": 1.0}, "head_dim must be a int"),
        ("RMSNorm", ["x", "n"], {"eps": 0.0, "head_dim": 48}, "does not divide"),
        ("RMSNorm", ["x", "n"], {"eps": 0.0, "head_dim": 32}, r"must have the shape \[32\]"),
        ("RMSNorm", ["x", "w"], {"eps": 0.0}, "must be a float constant"),
        ("RMSNorm", ["ids", "n"], {"eps": 0.0}, "must be f32 of rank 2"),
        ("RMSNorm", ["x"], {"eps": 0.0}, "takes 2 inputs, not 1"),
        ("MatMul", ["x", "x"], {}, "must be a constant matrix"),
        ("MatMul", ["w", "w"], {}, "must be computed"),
        ("MatMul", ["x", "w32"], {}, "must have 64 columns"),
        ("MatMul", ["x", "w", "n"], {}, r"must have the shape \[32\]"),
        ("MatMul", ["x", "nothing"], {}, "'nothing' does not exist"),
        ("Add", ["x", "y"], {}, "differ in shape"),
        ("GatedAct", ["x", "x"], {"kind": "relu"}, "it can be silu, gelu_tanh"),
        ("Rope", ["x", "ids"], {"head_dim": 16, "rotary_dim": 18}, "must be even and at most 16"),
        ("Rope", ["x", "ids"], {"head_dim": 48, "rotary_dim": 16}, "does not divide"),
        ("KVAppend", ["x", "x", "ids"], {"state": "none"}, "'none' does not exist"),
        ("KVAppend", ["x", "x", "ids"], {"state": "kv"}, "row of 64 for state 'kv'"),
        ("MatMulGroup", ["x", "w", "w"], {"n_weights": 3}, "takes 4 inputs, not 3"),
        ("MatMulGroup", ["x", "w"], {"biases": (1,)}, "no ascending segment numbers"),
        ("MatMulGroup", ["x", "w", "w", "x"], {"n_weights": 2, "epilogue": "add"}, "takes 1 w"),
        ("MatMulGroup", ["x", "w"], {"epilogue": "gated"}, "takes 2 weights"),
        ("MatMulGroup", ["x", "w", "w"], {"n_weights": 2, "epilogue": "gated"}, "go together"),
        ("MatMulGroup", ["x", "w", "w"], {"n_weights": 2, "softcap": 1.0}, "soft cap needs one"),
        ("MatMulGroup", ["x", "w", "x"], {"epilogue": "add"}, "the residual has the shape"),
        ("NormAdd", ["x", "y", "n"], {"eps": 0.0}, "differ in shape"),
    ],
)  # fmt: skip
def test_wrong_nodes(op: str, inputs: list[str], attrs: dict[str, object], message: str) -> None:
    graph = Graph("g")
    graph.add_input("ids", ("T",), "i32")
    graph.add_input("x", ("T", 64), "f32")
    graph.add_input("y", ("T", 32), "f32")
    graph.add_constant("n", np.ones(64, np.float32))
    graph.add_constant("w", weight(32, 64, "q4_0"))
    graph.add_constant("w32", weight(32, 32, "q4_0"))
    graph.add_state(State("kv", "kv", 2, 16))
    before = graph.to_json()
    with pytest.raises(BadInput, match=message) as error:
        graph.add_node(op, inputs, attrs, name="culprit")
    assert error.value.where == "culprit"
    assert graph.to_json() == before


def test_gated_weights_must_agree() -> None:
    graph = Graph("g")
    graph.add_input("x", ("T", 64), "f32")
    graph.add_constant("a", weight(32, 64, "q4_0"))
    graph.add_constant("b", weight(32, 64, "q4_1"))
    attrs = {"n_weights": 2, "epilogue": "gated", "act": "silu"}
    with pytest.raises(BadInput, match="differ in shape or format"):
        graph.add_node("MatMulGroup", ["x", "a", "b"], attrs)


def test_unknown_operator_and_taken_names() -> None:
    graph = Graph("g")
    with pytest.raises(Unsupported, match="did you mean MatMul"):
        graph.add_node("Matmul", [])
    graph.add_input("x", ("T", 4), "f32")
    with pytest.raises(BadInput, match="name is taken"):
        graph.add_input("x", ("T",), "i32")
    with pytest.raises(BadInput, match="name is taken"):
        graph.add_constant("x", np.ones(4, np.float32))
    with pytest.raises(BadInput, match="name is taken"):
        graph.add("Add", "x", "x", name="x")
    graph.add_state(State("s", "kv", 1, 1))
    with pytest.raises(BadInput, match="exists already"):
        graph.add_state(State("s", "kv", 1, 1))
    with pytest.raises(Unsupported, match="complex64"):
        graph.add_constant("b", np.ones(4, np.complex64))


def test_every_operator_says_what_it_is() -> None:
    language = {
        name: op for name, op in schema.operators().items() if not isinstance(op, TensorOp)
    }
    fused = {name for name, op in language.items() if op.fused}
    assert fused == {"MatMulGroup", "RopeAttention", "NormAdd", "RoutedExperts"}
    for name, op in schema.operators().items():
        assert isinstance(op.inputs, str), name
        assert op.__doc__, name
    for name, op in language.items():  # attributes of ONNX are documented there
        assert all(attr.doc for attr in op.attrs), name
