"""Takes turns with several artifacts of one language model: what backends and compilers are worth.

    python benchmarks/turns.py cpu.qgn llvm.qgn --threads 2

Prints tokens/s of each (medians) and the median of the ratios of its times to those of the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import qigen


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--turns", type=int, default=13)
    options = parser.parse_args()
    prompt = np.arange(100, 100 + options.prefill, dtype=np.int32)
    models = [qigen.load(path, threads=options.threads) for path in options.artifacts]
    sessions = [model.session(max_seq=options.prefill + options.decode) for model in models]
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    for turn in range(options.turns):
        order = range(len(models))
        for i in order if turn % 2 else reversed(order):
            session = sessions[i]
            session.rewind(0)
            prefill[i].append(seconds(lambda s=session: s.eval(prompt)))  # type: ignore[misc]
            decode[i].append(seconds(lambda s=session: [  # type: ignore[misc]
                s.eval(np.array([token + 5], np.int32)) for token in range(options.decode)
            ]))  # fmt: skip
    for i, path in enumerate(options.artifacts):
        for name, count, times in (
            ("prefill", options.prefill, prefill), ("decode", options.decode, decode),
        ):  # fmt: skip
            ratio = statistics.median(a / b for a, b in zip(times[i], times[0], strict=True))
            speed = count / statistics.median(times[i])
            print(f"{path.name:20} {name:8} {speed:8.1f} tokens/s, time x {ratio:.3f}")


if __name__ == "__main__":
    main()
