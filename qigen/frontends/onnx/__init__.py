"""ONNX files to tensor graphs."""

from qigen.frontends.onnx.importer import import_model
from qigen.frontends.onnx.reader import read_model

__all__ = ["import_model", "read_model"]
