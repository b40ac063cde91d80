"""The operators of ONNX, a file a family; importing this package registers them."""

from qigen.ir.ops.onnx import (
    cast,
    conv,
    elementwise,
    images,
    indexing,
    linear,
    movement,
    norm,
    pool,
    quantize,
    random,
    recurrent,
    reduce,
    selection,
    shape,
    signal,
)

__all__ = [
    "cast",
    "conv",
    "elementwise",
    "images",
    "indexing",
    "linear",
    "movement",
    "norm",
    "pool",
    "quantize",
    "random",
    "recurrent",
    "reduce",
    "selection",
    "shape",
    "signal",
]
