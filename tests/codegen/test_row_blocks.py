"""Row blocks: many rows through neighbouring nodes a block at a time; the results stay the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qigen
from qigen.codegen import row_blocks
from qigen.frontends.onnx.importer import import_model
from qigen.frontends.onnx.reader import prepare_model
from qigen.ir.graph import Graph
from qigen.passes.tensor import optimize_graph

WIDTH, HIDDEN = 40, 84


def mlp(rows: list[int]) -> onnx.ModelProto:
    """x + gelu(x W) V, normalised, then a product whose result is read twice."""
    rng = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), name)

    weights = [weight("w", WIDTH, HIDDEN), weight("b", HIDDEN), weight("v", HIDDEN, WIDTH),
               weight("g", WIDTH), weight("h", WIDTH), weight("u", WIDTH, 33)]  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["xwb"]),
        helper.make_node("Gelu", ["xwb"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["av"]),
        helper.make_node("Add", ["av", "x"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "g", "h"], ["n"]),
        helper.make_node("MatMul", ["n", "u"], ["y"]),
        helper.make_node("Sigmoid", ["n"], ["z"]),
    ]
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*rows, WIDTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*rows, 33]),
               helper.make_tensor_value_info("z", TensorProto.FLOAT, [*rows, WIDTH])]  # fmt: skip
    graph = helper.make_graph(nodes, "mlp", infos, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def reference(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same in float64."""
    w, b, v, g, h, u = (
        numpy_helper.to_array(t).astype(np.float64) for t in mlp([1]).graph.initializer
    )
    a = x.astype(np.float64) @ w + b
    r = 0.5 * a * (1 + np.vectorize(math.erf)(a / np.sqrt(2))) @ v + x
    centred = r - r.mean(-1, keepdims=True)
    n = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * g + h
    return {"y": n @ u, "z": 1 / (1 + np.exp(-n))}


def imported(rows: list[int]) -> Graph:
    return import_model(prepare_model(mlp(rows), Path("mlp.onnx")), "mlp.onnx")


@pytest.mark.parametrize("activations", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [[1024], [13, 101]])
def test_blocks_change_no_bit(
    rows: list[int], activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mlp.onnx"
    onnx.save(mlp(rows), source)
    x = np.random.default_rng(2).standard_normal((*rows, WIDTH), np.float32)
    blocked = tmp_path / "blocked.qgn"
    qigen.compile(source, blocked, activations=activations)
    monkeypatch.setattr(row_blocks, "LEAST_ROWS", 1 << 40)
    qigen.compile(source, tmp_path / "whole.qgn", activations=activations)
    whole = qigen.load(tmp_path / "whole.qgn", threads=1).run({"x": x})
    for threads in (1, 2, 3):
        found = qigen.load(blocked, threads=threads).run({"x": x})
        for name, value in whole.items():
            np.testing.assert_array_equal(found[name], value)
    if activations == "f32":
        for name, value in reference(x).items():
            np.testing.assert_allclose(whole[name], value, rtol=0, atol=2e-5)


def test_what_becomes_a_block() -> None:
    graph = optimize_graph(imported([1030]))
    blocks = row_blocks.find_row_blocks(graph, lambda name, *_: name not in graph.outputs)
    assert len(blocks) == 1
    block = blocks[0]
    nodes = graph.nodes[block.first : block.last + 1]
    assert sum(n.op == "Product" for n in nodes) == 3
    # nothing inside but what the nodes hand to each other, and it fits
    assert block.scratch and not set(block.scratch) & set(graph.outputs)
    assert block.scratch_bytes <= row_blocks.CACHE_BYTES
    assert block.total == 1030 and block.rows in row_blocks.BLOCKS


def test_few_rows_are_left_to_all_threads() -> None:
    graph = optimize_graph(imported([128]))
    assert not row_blocks.find_row_blocks(graph, lambda *_: True)
