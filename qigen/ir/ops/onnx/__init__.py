"""The operators of ONNX, a file a family; importing this package registers them."""

from qigen.ir.ops.onnx import elementwise, shape

__all__ = ["elementwise", "shape"]
