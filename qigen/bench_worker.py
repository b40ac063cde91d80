"""One side of a benchmark, in a process of its own: ``python -m qigen.bench_worker``.

The first line of standard input says what to load, every further one what to do; a line of JSON
answers each. A process of its own makes peak memory and threads the side's own, and lets several
sides take turns while all stay loaded.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qigen.errors import QigenError, ToolchainError

Ids = NDArray[np.int32]

_PR_SET_PDEATHSIG, _PR_SET_THP_DISABLE = 1, 41  # linux/prctl.h


class Side(Protocol):
    """A loaded model that evaluates tokens without choosing any."""

    vocab: int
    threads: int
    load_s: float

    def rewind(self, position: int) -> None:
        """Forgets all tokens from ``position`` on, in every sequence."""

    def prefill(self, tokens: Ids, sequence: int) -> None:
        """Appends ``tokens`` ``[n]`` to a sequence; logits of the last one."""

    def decode(self, tokens: Ids) -> None:
        """Appends ``tokens[i]`` to sequence i, in one step, with logits."""


class Qigen:
    """An artifact."""

    def __init__(self, path: str, threads: int, pin: bool, positions: int, batch: int) -> None:
        from qigen.model import load

        start = time.perf_counter()
        self.model = load(path, threads, pin)
        self.load_s = time.perf_counter() - start
        self.vocab = self.model.info["vocab"]
        self.threads = self.model.info["threads"]
        self.sessions = [self.model.session(positions) for _ in range(batch)]

    def rewind(self, position: int) -> None:
        """See :class:`Side`."""
        for session in self.sessions:
            session.rewind(min(position, session.position))

    def prefill(self, tokens: Ids, sequence: int) -> None:
        """See :class:`Side`."""
        self.sessions[sequence].eval(tokens)

    def decode(self, tokens: Ids) -> None:
        """See :class:`Side`."""
        if len(self.sessions) == 1:
            self.sessions[0].eval(tokens)
        else:
            self.model.batch_eval(self.sessions, tokens)


class LlamaCpp:
    """llama.cpp through the low-level interface of llama-cpp-python, with its default settings
    but for the number of threads, ``repack`` (weights rearranged at load) and ``flash_attention``.
    """

    def __init__(
        self,
        path: str,
        threads: int,
        positions: int,
        batch: int,
        repack: bool,
        flash_attention: bool,
    ) -> None:
        import llama_cpp as lib  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.lib = lib
        start = time.perf_counter()
        lib.llama_backend_init()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = repack
        self.model = lib.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.model:
            raise ToolchainError("llama.cpp cannot load the model", path)
        context = lib.llama_context_default_params()
        context.n_ctx = positions * batch
        context.n_batch = max(positions, batch)
        context.n_seq_max = batch
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        if not flash_attention:
            context.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise ToolchainError("llama.cpp cannot make a context", path)
        self.load_s = time.perf_counter() - start
        self.memory = lib.llama_get_memory(self.context)
        self.vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)))
        self.threads = threads
        self.sequences = batch
        self.positions = [0] * batch
        self.batch = lib.llama_batch_init(context.n_batch, 0, 1)

    def rewind(self, position: int) -> None:
        """See :class:`Side`."""
        for sequence in range(self.sequences):
            self.lib.llama_memory_seq_rm(self.memory, sequence, position, -1)
        self.positions = [min(position, p) for p in self.positions]

    def prefill(self, tokens: Ids, sequence: int) -> None:
        """See :class:`Side`."""
        self._step([(token, sequence) for token in tokens.tolist()], [len(tokens) - 1])

    def decode(self, tokens: Ids) -> None:
        """See :class:`Side`."""
        self._step([(token, i) for i, token in enumerate(tokens.tolist())], range(len(tokens)))

    def _step(self, rows: list[tuple[int, int]], wanted: Iterable[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, sequence) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = self.positions[sequence]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = 0
            self.positions[sequence] += 1
        for i in wanted:
            batch.logits[i] = 1
        if self.lib.llama_decode(self.context, batch) != 0:
            raise ToolchainError("llama.cpp failed in the middle of a step")
        self.lib.llama_synchronize(self.context)


SIDES: dict[str, Callable[..., Side]] = {"qigen": Qigen, "llama.cpp": LlamaCpp}


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far.

    From /proc: ``getrusage`` begins with the size of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ToolchainError("the system does not tell peak memory", "/proc/self/status")


def serve(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Answers a request: 'memory', or 'prefill' or 'decode' of so many ``tokens``.

    A decode steps ``batch`` sequences at a time, which begin with ``context`` tokens.
    """
    if request["do"] == "memory":
        return {"peak_rss_bytes": peak_rss_bytes()}
    count, batch, context = request["tokens"], request["batch"], request["context"]
    # The same tokens for every side; which ones makes no difference to the time.
    ids = np.random.default_rng(0).integers(0, side.vocab, (context + count, batch), np.int32)
    side.rewind(0)
    if request["do"] == "prefill":
        start = time.perf_counter()
        side.prefill(ids[:, 0], 0)
        return {"seconds": time.perf_counter() - start}
    if context:
        for sequence in range(batch):
            side.prefill(ids[:context, sequence], sequence)
    start = time.perf_counter()
    for row in ids[context:]:
        side.decode(row)
    return {"seconds": time.perf_counter() - start}


def main(
    sides: Mapping[str, Callable[..., Any]] = SIDES,
    serve: Callable[[Any, dict[str, Any]], dict[str, Any]] = serve,
) -> None:
    """Loads a side and serves requests until standard input ends. With ``small_pages`` in the first
    line the process gets no huge pages, even if the system gives them to all."""
    # It stands still between requests, and so would not notice that nobody is there any more.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries write to standard output as they please, so the answers go elsewhere.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        options = json.loads(sys.stdin.readline())
        if options.pop("small_pages", False) and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
        side = sides[options.pop("side")](**options)
        about = getattr(side, "about", {})
        answer({"load_s": side.load_s, "threads": side.threads, **about})
        for line in sys.stdin:
            answer(serve(side, json.loads(line)))
    except QigenError as error:
        answer({"error": {"kind": error.kind, "message": error.message, "where": error.where}})
    except MemoryError:
        answer({"error": {"kind": "error", "message": "there is not enough memory", "where": ""}})
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
