"""qigen: ahead-of-time compiler for quantized inference.

    artifact = qigen.compile("model.gguf", "model.qgn")   # weights keep the checkpoint's codes
    model = qigen.load("model.qgn")
    print(model.generate("Once upon a time"))

Names are imported when they are first used, so that ``import qigen`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qigen.errors import (
    BadInput,
    MachineMismatch,
    QigenError,
    ToolchainError,
    Unsupported,
    UsageError,
)

if TYPE_CHECKING:
    from qigen.artifact import Artifact
    from qigen.compiler import compile
    from qigen.evaluate import perplexity
    from qigen.formats.tensor import QuantizedTensor
    from qigen.model import Model, Session, load
    from qigen.quantize import quantize
    from qigen.text import Tokenizer

__version__ = "0.1.0"

_LAZY = {
    "Artifact": "qigen.artifact",
    "Model": "qigen.model",
    "QuantizedTensor": "qigen.formats.tensor",
    "Session": "qigen.model",
    "Tokenizer": "qigen.text",
    "compile": "qigen.compiler",
    "load": "qigen.model",
    "perplexity": "qigen.evaluate",
}

__all__ = [
    "Artifact",
    "BadInput",
    "MachineMismatch",
    "Model",
    "QigenError",
    "QuantizedTensor",
    "Session",
    "Tokenizer",
    "ToolchainError",
    "Unsupported",
    "UsageError",
    "__version__",
    "compile",
    "load",
    "perplexity",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name == "quantize":  # the package itself, which can be called
        return importlib.import_module("qigen.quantize")
    if name not in _LAZY:
        raise AttributeError(f"module 'qigen' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
