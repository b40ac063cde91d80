"""Tiny ONNX models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32, I64 = TensorProto.FLOAT, TensorProto.INT64

ODD = "y/out:0"
"""An output that cannot be the name of a file."""


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    name: str = "tiny",
) -> onnx.ModelProto:
    """A model of some nodes."""
    initial = [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), initial)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 9
    return made


def write_tiny_onnx(path: Path) -> Path:
    """``y/out:0 = relu(x + w) * z`` for x and z float32 [n, 4], and its shape ``s``."""
    info = helper.make_tensor_value_info
    onnx.save(
        model(
            [
                helper.make_node("Add", ["x", "w"], ["a"], name="add"),
                helper.make_node("Relu", ["a"], ["r"], name="relu"),
                helper.make_node("Mul", ["r", "z"], [ODD], name="mul"),
                helper.make_node("Shape", [ODD], ["s"], name="shape"),
            ],
            [info("x", F32, ["n", 4]), info("z", F32, ["n", 4])],
            [info(ODD, F32, ["n", 4]), info("s", I64, [2])],
            {"w": tiny_weights()},
        ),
        path,
    )
    return path


def tiny_weights() -> np.ndarray:
    """w of the tiny model."""
    return np.array([1, -2, 3, -4], np.float32)


def tiny_result(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """What the tiny model gives."""
    return np.maximum(x + tiny_weights(), 0) * z
