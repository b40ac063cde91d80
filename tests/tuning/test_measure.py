"""Measuring: right kernels get times; wrong, crashing and hanging ones are found and left out."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qigen import targets, toolchain
from qigen import tune as tuning
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.errors import BadInput, ToolchainError, UsageError
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout
from qigen.planner import Product
from qigen.tune import Tuner, home, shapes_to_products, tune_products
from qigen.tuning import Bench, Database, Outcome, database, measure
from qigen.tuning.measure import kernel_text, settled
from qigen.tuning.problem import Problem, wrong

CRASHES = "#include <csignal>\n", "std::raise(SIGSEGV);"
WRONG = "", "a.y[0] += 1.0f;"
HANGS = "", "for (;;) asm volatile(\"pause\");"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    try:
        compiler = toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    with Bench(compiler, 1) as opened:
        yield opened


def spec(tiles: tuple[int, ...] = (1,), isa: str = "scalar", **more: object) -> MatmulSpec:
    known = {"format": by_name("q4_0"), "activations": "int8", "layout": Layout(16, 1), **more}
    return MatmulSpec(isa=ISAS[isa], tiles=tiles, **known)  # type: ignore[arg-type]


def sabotaged(library: Path, folder: Path, change: tuple[str, str],
              header: str = "kernels.h", args: str = "MatmulArgs") -> Path:  # fmt: skip
    """A library that calls another one's kernel and does something bad after it."""
    head, statement = change
    (folder / header).write_text(measure.render(f"cpu/{header}.j2"))
    source = folder / "bad.cpp"
    source.write_text(
        f'#include "{header}"\n#include <dlfcn.h>\n{head}'
        f'extern "C" void qigen_kernel(const qg::{args}& a, int b0, int b1) {{\n'
        f'  void* l = dlopen("{library}", RTLD_NOW | RTLD_LOCAL);\n'
        f'  reinterpret_cast<void (*)(const qg::{args}&, int, int)>'
        '(dlsym(l, "qigen_kernel"))(a, b0, b1);\n'
        f"  {statement}\n}}\n"
    )
    out = folder / "bad.so"
    toolchain.find_compiler().run(
        ["-shared", "-fPIC", f"-I{folder}", str(source), "-o", str(out), "-ldl"], "bad"
    )
    return out


@pytest.mark.parametrize(
    ("format", "activations"),
    [("q4_0", "int8"), ("q4_k", "int8"), ("q4_k", "int8-token"), ("mxfp4", "int8"),
     ("u3g128", "f32"), ("u3g128", "bf16"), ("f16", "f32")],
)  # fmt: skip
def test_generated_kernels_are_right(bench: Bench, format: str, activations: str) -> None:
    kernel = spec((2, 1), "avx2", format=by_name(format), activations=activations)
    if not targets.native().has(kernel.isa.features):
        pytest.skip("no AVX2")
    (outcome,) = bench.measure(bench.build([kernel]), 40, 256, 3, 2, 0, 0.01)
    assert (outcome.status, outcome.message) == ("ok", "")
    assert outcome.us > 0 and outcome.runs >= 15 and outcome.spread >= 0


@pytest.mark.parametrize(
    ("change", "status"), [(CRASHES, "crash"), (WRONG, "wrong"), (HANGS, "timeout")]
)
def test_bad_kernels_are_reported_and_the_others_measured(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, str],
    status: str,
) -> None:
    good, bad = spec((1,)), spec((2, 1))
    libraries = bench.build([good, bad])
    libraries[bad] = sabotaged(libraries[bad], tmp_path, change)
    monkeypatch.setattr(measure, "_SILENCE", 2.0)
    for order in ([good, bad], [bad, good]):
        found = bench.measure({s: libraries[s] for s in order}, 32, 64, 2, 1, 0, 0.01)
        outcomes = {o.spec: o for o in found}
        assert outcomes[good].status == "ok" and outcomes[good].us > 0
        assert outcomes[bad].status == status and outcomes[bad].us == 0 and outcomes[bad].message


def test_no_kernel_works(bench: Bench, tmp_path: Path) -> None:
    libraries = {spec(): sabotaged(bench.build([spec()])[spec()], tmp_path, CRASHES)}
    (outcome,) = bench.measure(libraries, 32, 64, 1, 1, 0, 0.01)
    assert outcome.status == "crash" and "SIGSEGV" in outcome.message


def test_one_wrong_weight_is_found() -> None:
    _, y, bound = Problem(spec(), 40, 4096, 3).build()
    exact = y[:, np.arange(40) % 16].astype(np.float32)
    assert wrong(exact, y, bound) == ""
    other = exact.copy()
    other[2, 39] += 0.05  # a step of one code times an activation
    assert "1 of 120" in wrong(other, y, bound) and "y[2, 39]" in wrong(other, y, bound)
    other[2, 39] = np.nan
    assert wrong(other, y, bound)


def test_the_hash_follows_the_code() -> None:
    hashes = {kernel_text(s)[1] for s in (spec(), spec((2, 1)), spec(isa="avx2"))}
    assert len(hashes) == 3
    assert kernel_text(spec())[1] == kernel_text(spec())[1]


def outcome(us: float, spread: float, runs: int = 50) -> Outcome:
    return Outcome(spec(), us=us, spread=spread, runs=runs)


def test_when_to_stop() -> None:
    assert settled([outcome(10, 0.05), outcome(12, 0.05)])  # clear
    assert not settled([outcome(10, 0.5), outcome(10.4, 0.5)])  # noise as large as the difference
    assert settled([outcome(10, 0.01), outcome(10.01, 0.01)])  # equal
    assert settled([outcome(10, 0.5)])
    assert not settled([outcome(10, 0.5, runs=5)])


def tune(data: Database, **more: object) -> tuple[object, list[object]]:
    arguments = {
        "isa": ISAS["scalar"], "machine": targets.native(), "threads": 1, "buckets": (1, 2),
        "top": 2, "seconds": 0.01, "jobs": 1, "data": data, "working_set": 1000, **more,
    }  # fmt: skip
    products = [Product(by_name("q4_0"), 32, 64, 1)]
    return tune_products(products, **arguments)  # type: ignore[arg-type, return-value]


def test_what_is_known_is_not_measured_again(bench: Bench, tmp_path: Path) -> None:
    with Database(tmp_path / "tuning.sqlite") as data:
        measured, rows = tune(data)
        assert [(r.m, r.measured, r.failures) for r in rows] == [(1, 2, ()), (2, 2, ())]  # type: ignore[attr-defined]
        assert len(data.entries()) == 4 and len(measured) == 4  # type: ignore[arg-type]
        again, rows = tune(data)
        assert [r.measured for r in rows] == [0, 0] and again == measured  # type: ignore[attr-defined]
        _, rows = tune(data, again=True)
        assert [r.measured for r in rows] == [2, 2]  # type: ignore[attr-defined]
        _, rows = tune(data, threads=2)  # another key
        assert [r.measured for r in rows] == [2, 2]  # type: ignore[attr-defined]


def test_the_first_candidate_is_the_choice_of_the_model(bench: Bench, tmp_path: Path) -> None:
    with Database(tmp_path / "tuning.sqlite") as data:
        _, rows = tune(data)
        for row in rows:
            assert row.best_us <= row.first_us  # type: ignore[attr-defined]


def test_many_candidates_are_tried_with_llvm_first(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler for models makes of the best ones is what counts."""
    jit = tuning.fast_compiler(ISAS["scalar"], targets.native())
    if jit is None:
        pytest.skip("needs llvmlite on Linux on x86-64")
    monkeypatch.setattr(tuning, "FINALISTS", 1)
    keys = [database.compiler_key(c.version) for c in (jit, bench.compiler)]
    with Database(tmp_path / "tuning.sqlite") as data:
        measured, rows = tune(data, top=4)
        found = data.entries(status="ok")
        counts = [len([e for e in found if e.compiler == key]) for key in keys]
        assert counts[0] > 2 * len(rows) and counts[1] == len(rows) == 2
        assert len(measured) == 2  # type: ignore[arg-type]
        _, rows = tune(data, top=4)
        assert [r.measured for r in rows] == [0, 0]  # type: ignore[attr-defined]


def test_failures_are_remembered_and_never_chosen(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Bench.build

    def with_a_bad_one(self: Bench, specs: object, done: object = None) -> dict[MatmulSpec, Path]:
        libraries = build(self, specs, done)  # type: ignore[arg-type]
        first = next(iter(libraries))
        libraries[first] = sabotaged(libraries[first], tmp_path, CRASHES)
        return libraries

    monkeypatch.setattr(Bench, "build", with_a_bad_one)
    with Database(tmp_path / "tuning.sqlite") as data:
        measured, rows = tune(data)
        assert all("crash" in r.failures[0] for r in rows)  # type: ignore[attr-defined]
        failed = {database.spec_from_json(e.spec) for e in data.entries(status="crash")}
        assert 0 < len(failed) < len({s for s, *_ in measured})  # type: ignore[attr-defined]
        for (s, *_), us in measured.items():  # type: ignore[attr-defined]
            assert math.isinf(us) == (s in failed)
        _, rows = tune(data)
        assert [r.measured for r in rows] == [0, 0]  # type: ignore[attr-defined]


def test_an_interruption_loses_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    take = Tuner._measure

    def interrupted(self: Tuner, *arguments: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        take(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Tuner, "_measure", interrupted)
    with Database(tmp_path / "tuning.sqlite") as data:
        with pytest.raises(KeyboardInterrupt):
            tune(data)
        assert {e.m for e in data.entries()} == {1}
        monkeypatch.setattr(Tuner, "_measure", take)
        _, rows = tune(data)
        assert [r.measured for r in rows] == [0, 2]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_killed_while_measuring(tmp_path: Path) -> None:
    """The command is killed for good; what it had stored is there and it goes on from there."""
    environment = {**os.environ, "QIGEN_DATA": str(tmp_path)}
    command = [sys.executable, "-m", "qigen", "tune", "--shape", "512x512", "--isa", "scalar",
               "--m", "1,2,3,4,5,6,7,8", "--seconds", "1", "--threads", "1"]  # fmt: skip
    running = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    stored = 0
    while not stored and time.monotonic() < deadline:
        time.sleep(0.3)
        if (tmp_path / "tuning.sqlite").exists():
            with Database(tmp_path / "tuning.sqlite") as data:
                stored = len(data.entries())
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert stored
    with Database(tmp_path / "tuning.sqlite") as data:
        assert len(data.entries()) >= stored


def test_kernels_take_turns() -> None:
    """Several tokens of one row in a process: as many times for each as there are rounds."""
    isa = ISAS["scalar"]
    spec = MatmulSpec(by_name("q4_0"), Layout(), isa, "int8", (1,))
    with (
        Bench(toolchain.find_compiler()) as bench,
        bench.turns([(spec, Problem(spec, 64, 128, m)) for m in (1, 3)], 1, 0) as turns,
    ):
        times = turns.run(4)
        assert [len(runs) for runs in times] == [4, 4] and min(map(min, times)) > 0
        assert len(turns.stream(2)) == 2


def test_shapes() -> None:
    found = shapes_to_products(["64x128", "32X32"], ["q4_0", "u2g128"])
    assert [p.key for p in found] == [
        ("q4_0", 64, 128), ("u2g128", 64, 128), ("q4_0", 32, 32), ("u2g128", 32, 32),
    ]  # fmt: skip
    for text in ("64", "64x", "0x3", "ax3", "1x2x3"):
        with pytest.raises(UsageError, match="NxK"):
            shapes_to_products([text], ["q4_0"])


def test_where_weights_come_from() -> None:
    machine = targets.native()
    assert home(1, machine) == "cache" and home(machine.l3_bytes, machine) == "memory"


def test_models_that_are_none(tmp_path: Path) -> None:
    from qigen.tune import model_products

    with pytest.raises(BadInput, match="no such file"):
        model_products(tmp_path / "missing.gguf")


# ---- machines that change, and clocks that are wrong ----


@pytest.mark.parametrize("cpus", ["one", "one that is gone too", "only one that is gone"])
def test_processors_that_are_not_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, cpus: str
) -> None:
    """A machine with one core, or with less than when the process began: threads run where they
    may, and results stay right."""
    gone = 1023  # the last that a set of processors holds
    first = min(measure.allowed_cpus())
    found = {"one": {first}, "one that is gone too": {first, gone}, "only one that is gone": {gone}}
    monkeypatch.setattr(measure, "allowed_cpus", lambda: frozenset(found[cpus]))
    (outcome,) = bench.measure(bench.build([spec()]), 32, 64, 1, 2, 0, 0.01)
    assert (outcome.status, outcome.message) == ("ok", "") and outcome.us > 0


def test_dates_decide_nothing_here(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured while the clock was wrong counts, and a later measurement replaces it
    though its date is earlier."""
    with Database(tmp_path / "tuning.sqlite") as data:
        for year, again, count in (("2999", False, 2), ("1970", False, 0), ("1970", True, 2)):
            monkeypatch.setattr("qigen.tuning.database.now", lambda year=year: f"{year}-01-01")
            _, rows = tune(data, buckets=(1,), again=again)
            assert [r.measured for r in rows] == [count]  # type: ignore[attr-defined]
        assert {e.date for e in data.entries()} == {"1970-01-01"}
