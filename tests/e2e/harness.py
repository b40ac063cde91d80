"""Compiles tiny models, runs them, and runs the flat graph in the interpreter beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qigen._runtime import Model, Session
from qigen.artifact import Artifact
from qigen.compiler import compile
from qigen.formats import catalog
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends import LanguageModel, build_graph, load_model
from qigen.ir.graph import Graph, load_constant
from qigen.ir.interpreter import Interpreter
from qigen.quantize.weights import requantized, with_byte_tables
from tests.frontends.tiny import write_tiny_gguf, write_tiny_hf

Logits = NDArray[np.float32]

# The vocabulary of the tiny models has no byte tokens, so its unknown token has to be named.
KEYS = {"tokenizer.ggml.unknown_token_id": 0}

# Compilers at a time; the processes of pytest-xdist have one each.
JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def nearest_bf16(x: NDArray[Any]) -> NDArray[np.float32]:
    """float32 numbers rounded to bf16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


class Bf16Interpreter(Interpreter):
    """The interpreter with both sides of a product rounded to bf16."""

    def matmul(self, x: NDArray[Any], weight: str) -> NDArray[Any]:
        data = load_constant(self.graph.constants[weight])
        dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
        return nearest_bf16(x) @ nearest_bf16(dense).T


@dataclass(frozen=True)
class Options:
    """What an artifact is compiled with; ``overrides`` are the tiny model's dimensions."""

    family: str = "llama"
    container: str = "gguf"  # or "hf"
    quant: str = "q8_0"  # of the matrices of a GGUF
    weights: str = "keep"
    isa: str | None = None
    activations: str = "f32"
    kv: str = "f16"
    max_seq: int | None = None
    mixed: tuple[tuple[str, str], ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass
class Compiled:
    """An artifact, the model it came from and the reference to compare with."""

    options: Options
    path: Path
    source: LanguageModel
    artifact: Artifact
    _models: dict[int, Model] = field(default_factory=dict)

    @cached_property
    def graph(self) -> Graph:
        """The flat graph, with the weights that were compiled."""
        graph = build_graph(self.source, self.artifact.manifest["limits"]["max_seq"])
        name = self.options.weights
        graph = graph if name == "keep" else requantized(graph, catalog.by_name(name))
        return with_byte_tables(graph, self.options.activations)[0]

    def model(self, threads: int = 2) -> Model:
        if threads not in self._models:
            self._models[threads] = Model(str(self.artifact.path), threads=threads)
        return self._models[threads]

    def session(self, threads: int = 2) -> Session:
        return self.model(threads).session()

    def interpreter(self) -> Interpreter:
        """The reference, with the roundings that the artifact makes."""
        activations, kv = self.options.activations, self.options.kv
        if activations == "bf16":
            return Bf16Interpreter(self.graph, kv=kv)
        return Interpreter(self.graph, activations=activations, kv=kv)

    def expected(self, tokens: Sequence[int]) -> Logits:
        """float32[n, vocab] of the interpreter, all tokens in one step."""
        rows = np.arange(len(tokens), dtype=np.int32)
        return self.interpreter().step({"input_ids": tokens, "rows": rows})["logits"]


def write_source(folder: Path, options: Options) -> Path:
    """The tiny model's file or folder."""
    overrides = dict(options.overrides)
    if options.container == "hf":
        return write_tiny_hf(folder / "model", options.family, **overrides)
    return write_tiny_gguf(
        folder / "model.gguf",
        options.family,
        options.quant,
        keys=KEYS,
        mixed=dict(options.mixed),
        **overrides,
    )


def build(folder: Path, options: Options) -> Compiled:
    """Write the model and compile it."""
    path = write_source(folder, options)
    artifact = compile(
        path,
        folder / "model.qgn",
        isa=options.isa,
        weights=options.weights,
        activations=options.activations,
        kv=options.kv,
        max_seq=options.max_seq,
        jobs=JOBS,
    )
    return Compiled(options, path, load_model(path), artifact)


def prefill(compiled: Compiled, tokens: Sequence[int], threads: int = 2) -> Logits:
    """float32[n, vocab], all tokens in one call."""
    return compiled.session(threads).eval(tokens, all=True)


def decode(compiled: Compiled, tokens: Sequence[int], threads: int = 2) -> Logits:
    """float32[n, vocab], token by token."""
    session = compiled.session(threads)
    return np.stack([session.eval([token]) for token in tokens])


def relative_error(found: Logits, expected: Logits) -> float:
    """The greatest difference, in standard deviations of the expected logits."""
    assert np.isfinite(found).all()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())
