"""ONNX's own node tests through compile and run.

    python tests/conformance/runner.py [--only REGEX] [--jobs N] [--isa NAME] [--list STATUS]

Each test is a small model with inputs and expected outputs. It passes, is refused with a message,
or is wrong; a crash counts as wrong. Cases run in processes of their own.
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import qigen
from qigen import targets
from qigen.backends.cpu.isa import by_name
from qigen.errors import BadInput, QigenError, Unsupported
from qigen.frontends.onnx.reader import prepare_model
from qigen.graph_compiler import GraphOptions, compile_graph
from qigen.planner import isa_candidates


@dataclass(frozen=True)
class Outcome:
    """``status`` is passed, refused or wrong; ``message`` says why."""

    name: str
    status: str
    message: str = ""


RANDOM = r"bernoulli|training_dropout(?!.*zero_ratio)"
"""Cases that compare with numpy's own stream of random numbers, which nobody else has."""


def cases(pattern: str = "") -> list[Any]:
    """The node tests whose names match, but for those on numpy's random numbers."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return [
        case for case in found if re.search(pattern, case.name) and not re.search(RANDOM, case.name)
    ]


def run(
    chosen: Sequence[Any], jobs: int = 2, isa: str = "", progress: bool = False
) -> list[Outcome]:
    """The outcome of every case."""
    done: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(prefix="qigen-nodes-") as name,
        ThreadPoolExecutor(jobs) as pool,
    ):
        for outcome in pool.map(lambda case: _isolated(case, Path(name), isa), chosen):
            done.append(outcome)
            if progress and outcome.status == "wrong":
                print(f"wrong {outcome.name}: {outcome.message[:300]}", file=sys.stderr)
            if progress and len(done) % 25 == 0:
                counts = collections.Counter(o.status for o in done)
                print(f"{len(done)}/{len(chosen)} {dict(counts)}", file=sys.stderr)
    return done


def _isolated(case: Any, folder: Path, isa: str) -> Outcome:
    """Run a case in a child, so that a crash is an outcome too."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            outcome = _run(case, folder, isa)
        except BaseException as error:
            outcome = Outcome(case.name, "wrong", f"{type(error).__name__}: {error}")
        with os.fdopen(write, "wb") as stream:
            stream.write(pickle.dumps(outcome))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(child, 0)
    if not data:
        return Outcome(case.name, "wrong", f"crashed with status {status}")
    result: Outcome = pickle.loads(data)
    return result


def _run(case: Any, folder: Path, isa: str) -> Outcome:
    path = folder / case.name
    machine = targets.native()
    row = by_name(isa) if isa else isa_candidates(machine)[0]
    warnings.simplefilter("ignore")
    try:
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model = prepare_model(model, path.with_suffix(".onnx"))
        compile_graph(
            path.with_suffix(".onnx"),
            path,
            pairs=[(machine, row)],
            options=GraphOptions(),
            jobs=1,
            model=model,
        )
    except (Unsupported, BadInput) as error:
        # the tests are right, so what we call bad input is something that we do not understand
        kind = "refused" if isinstance(error, Unsupported) else "wrong"
        return Outcome(case.name, kind, f"{type(error).__name__}: {error}")
    except QigenError as error:
        return Outcome(case.name, "wrong", f"{type(error).__name__}: {error}")
    loaded = qigen.load(path, threads=2)
    names = [i.name for i in model.graph.input]
    for inputs, expected in case.data_sets:
        feeds = dict(zip(names, inputs, strict=False))
        wanted_names = {i["name"] for i in loaded.inputs}
        results = loaded.run({n: _array(a) for n, a in feeds.items() if n in wanted_names})
        for info, wanted in zip(model.graph.output, expected, strict=True):
            problem = difference(results[info.name], _array(wanted), case.rtol, case.atol)
            if problem:
                return Outcome(case.name, "wrong", f"{info.name}: {problem}")
    return Outcome(case.name, "passed")


def _array(data: Any) -> np.ndarray[Any, Any]:
    """Test data as an array: some cases have it as TensorProto."""
    if isinstance(data, onnx.TensorProto):
        return np.asarray(onnx.numpy_helper.to_array(data))
    return np.asarray(data)


STEP = {"bfloat16": 2.0**-6, "float16": 2.0**-9}
"""Relative difference of two steps of a type."""

CANCELLED = 5e-7
"""What a sum that cancels may be off by, relative to the largest number of the result."""


def difference(
    got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], rtol: float, atol: float
) -> str:
    """What differs, or ''."""
    if got.shape != wanted.shape:
        return f"shape {got.shape} instead of {wanted.shape}"
    if got.dtype != wanted.dtype:
        return f"type {got.dtype} instead of {wanted.dtype}"
    if got.dtype.kind in "iub":
        bad = got != wanted
    else:
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        # the expected data has rounding errors of its own
        rtol = max(rtol, STEP.get(wanted.dtype.name, 0.0))
        finite = np.abs(b[np.isfinite(b)])
        atol = max(atol, CANCELLED * float(finite.max(initial=0)))
        bad = ~np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    if not bad.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(bad)[0]) if bad.ndim else ()
    return (
        f"{int(bad.sum())} of {bad.size} elements differ, first {at}: {got[at]}, not {wanted[at]}"
    )


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--isa", default="")
    parser.add_argument("--list", default="wrong", help="statuses to list, joined by commas")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    outcomes = run(cases(options.only), options.jobs, options.isa, progress=True)
    for outcome in outcomes:
        if outcome.status in options.list.split(","):
            print(f"{outcome.status} {outcome.name}: {outcome.message[:300]}")
    counts = collections.Counter(o.status for o in outcomes)
    print(
        f"{counts['passed']} passed, {counts['refused']} refused, {counts['wrong']} wrong, "
        f"of {len(outcomes)}"
    )
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
