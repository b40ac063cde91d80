"""All operators; importing this package registers them. One file a family."""

from qigen.ir.ops import (
    attention,
    columns,
    elementwise,
    embedding,
    experts,
    fused,
    graph,
    matmul,
    norm,
    onnx,
    rope,
)

__all__ = [
    "attention",
    "columns",
    "elementwise",
    "embedding",
    "experts",
    "fused",
    "graph",
    "matmul",
    "norm",
    "onnx",
    "rope",
]
