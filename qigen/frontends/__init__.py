"""Readers of model files: GGUF and Hugging Face folders in, a graph out."""

from __future__ import annotations

from pathlib import Path

from qigen.frontends.gguf import load_gguf
from qigen.frontends.huggingface import load_huggingface
from qigen.frontends.language import build_graph
from qigen.frontends.model import LanguageModel, ModelConfig, RopeConfig, TensorHandle

__all__ = [
    "LanguageModel",
    "ModelConfig",
    "RopeConfig",
    "TensorHandle",
    "build_graph",
    "load_gguf",
    "load_huggingface",
    "load_model",
]


def load_model(path: str | Path) -> LanguageModel:
    """Read a language model: a folder is a Hugging Face checkpoint, a file is GGUF."""
    return load_huggingface(path) if Path(path).is_dir() else load_gguf(path)
