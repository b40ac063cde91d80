"""Types of the extension module; runtime/python/module.cpp documents it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

class ModelInfo(TypedDict):
    name: str
    isa: str
    kv_format: str
    vocab: int
    max_seq: int
    max_batch: int
    max_tokens: int
    d_model: int
    n_layers: int
    threads: int
    eos: list[int]
    weights_bytes: int
    arena_bytes: int
    kv_bytes_per_position: int

class TensorInfo(TypedDict):
    name: str
    dtype: str
    shape: tuple[int, ...]

def stream_read_gb_s(threads: int, bytes: int, repeats: int = 5) -> float: ...

class Session:
    def eval(self, tokens: ArrayLike, all: bool = False) -> NDArray[np.float32]: ...
    def next(self, tokens: ArrayLike, sampler: Sampler, history: ArrayLike = ...) -> int: ...
    def rewind(self, position: int) -> None: ...
    @property
    def position(self) -> int: ...

class Sampler:
    def sample(self, logits: ArrayLike, history: ArrayLike = ...) -> int: ...

class Model:
    def __init__(
        self, folder: str, threads: int = 0, pin: bool = False, spin_us: int = 0
    ) -> None: ...
    @property
    def info(self) -> ModelInfo: ...
    @property
    def inputs(self) -> list[TensorInfo]: ...
    @property
    def outputs(self) -> list[TensorInfo]: ...
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...
    def session(self, max_seq: int = 0) -> Session: ...
    def batch_eval(self, sessions: Sequence[Session], tokens: ArrayLike) -> NDArray[np.float32]: ...
    def sampler(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Sampler: ...
    def argmax(self, logits: ArrayLike) -> int: ...
    def token_text(self, id: int) -> bytes: ...
    def is_eos(self, id: int) -> bool: ...
