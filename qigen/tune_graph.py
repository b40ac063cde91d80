"""Tuning of graph models: the register tiles of their products and convolutions, measured like the
schedules of matrices, into the same database; then the threads of a compiled one."""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from qigen import targets
from qigen.artifact import Artifact
from qigen.backends.base import Isa
from qigen.backends.cpu.gemm import GemmSpec, Tiles
from qigen.costmodel.gemm import GemmShape, MeasuredTiles, predict_gemm, ranked_tiles
from qigen.errors import BadInput
from qigen.graph_tiles import GemmCalls, GraphCalls, GraphMeasured, artifact_calls, graph_calls
from qigen.targets import Machine
from qigen.targets.calibrate import thread_counts
from qigen.tune import (
    BYTES_AT_MOST,
    SECONDS,
    TIMES_CACHE,
    TOP,
    Knobs,
    Progress,
    Row,
    Tuner,
    best_of,
    home,
    least,
    look_up,
    remember,
    remembered_times,
    tune_products,
)
from qigen.tuning import database
from qigen.tuning.database import (
    Database,
    Entry,
    gemm_from_json,
    gemm_key,
    gemm_spec,
    gemm_to_json,
)
from qigen.tuning.measure import kernel_text
from qigen.tuning.problem import GemmProblem

Call: TypeAlias = tuple[str, GemmShape]
"""(arithmetic, shape): what is measured once, however many nodes are alike."""


def tile_candidates(
    calls: GemmCalls, isa: Isa, machine: Machine, threads: int, cached: bool, top: int | None
) -> list[Tiles]:
    """The tiles that are worth measuring, the rule's own first: the best of each register tile,
    then what else the model ranks first. None: all."""
    times = ranked_tiles(calls.arithmetic, calls.shapes, isa, threads, machine, cached)
    own, *_ = times
    ranked = sorted(times, key=lambda tiles: times[tiles])
    distinct: dict[tuple[int, int], Tiles] = {}
    for tiles in ranked:
        distinct.setdefault((tiles.pixels, tiles.blocks), tiles)
    registers = list(distinct.values())[: max(1, (top or 0) * 3 // 4)]
    return list(dict.fromkeys((own, ranked[0], *registers, *ranked)))[:top]


def _known(
    data: Database | None, call: Call, isa: Isa, threads: int, where: str, machine: str,
    compiler: str, kernel: Any,
) -> dict[Tiles, Entry]:  # fmt: skip
    """Valid entries for a call: the user's, then those that came with the package."""
    shape = call[1]
    wanted = {
        "machine": machine, "n": shape.n, "k": shape.taps * shape.k, "m": shape.pixels,
        "threads": threads, "home": where,
    }  # fmt: skip
    entries = list(data.entries(**wanted, compiler=compiler)) if data is not None else []
    entries += [
        e for e in database.shipped() if all(getattr(e, c) == v for c, v in wanted.items())
    ]
    found: dict[Tiles, Entry] = {}
    for entry in entries:
        if entry.spec.get("family") != database.GEMM or entry.spec["isa"] != isa.name:
            continue
        spec, of = gemm_from_json(entry.spec)
        if (spec.arithmetic, of) == call and gemm_key(kernel(spec), shape) == entry.kernel:
            found.setdefault(spec.tiles, entry)
    return found


def _times(known: Mapping[Call, Mapping[Tiles, Entry]]) -> MeasuredTiles:
    """What the planner takes. Tiles that failed once are not to be trusted with any shape."""
    bad = {
        (arithmetic, tiles)
        for (arithmetic, _), entries in known.items()
        for tiles, entry in entries.items()
        if entry.status != "ok"
    }
    return {
        (arithmetic, tiles, shape): math.inf if (arithmetic, tiles) in bad else entry.us
        for (arithmetic, shape), entries in known.items()
        for tiles, entry in entries.items()
    }


def remembered_graph(
    calls: GraphCalls, *, isa: Isa, machine: Machine, threads: int
) -> tuple[GraphMeasured, str]:
    """What was measured before of the kernels of a graph on this machine, without measuring, and a
    sentence for the user if the database cannot be used."""
    where, key = home(calls.weight_bytes, machine), database.machine_key(machine)
    wanted = [(c.arithmetic, shape) for c in calls.gemms for shape in c.shapes]

    def find(data: Database | None, compiler: str) -> GraphMeasured:
        kernel = functools.lru_cache(None)(lambda spec: kernel_text(spec)[1])
        known = {
            call: _known(data, call, isa, threads, where, key, compiler, kernel)
            for call in dict.fromkeys(wanted)
        }
        formats = remembered_times(
            data, compiler, calls.products, where, isa=isa, machine=machine, threads=threads
        )
        return GraphMeasured(formats, _times(known))

    return look_up(machine, find, GraphMeasured())


def tune_graph(
    calls: GraphCalls,
    *,
    isa: Isa,
    machine: Machine,
    threads: int,
    top: int = TOP,
    exhaustive: bool = False,
    again: bool = False,
    seconds: float = SECONDS,
    jobs: int | None = None,
    data: Database | None = None,
    progress: Progress | None = None,
) -> tuple[GraphMeasured, list[Row]]:
    """Measures the best ``top`` tiles of every product and convolution of a graph (all with
    ``exhaustive``), and the schedules of its matrices in formats of the catalog.

    Kernels are measured without their epilogues, which all tiles have alike; ``k`` of a row are the
    products of a sum, ``m`` its pixels. Returns what the planner takes, and a row for each.
    """
    store = data or Database()
    try:
        formats, rows = tune_products(
            calls.products, isa=isa, machine=machine, activations=calls.activations,
            threads=threads, top=top, exhaustive=exhaustive, again=again, seconds=seconds,
            working_set=calls.weight_bytes, jobs=jobs, data=store, progress=progress,
        ) if calls.products else ({}, [])  # fmt: skip
        tuner = Tuner(
            isa, machine, threads, data=store, jobs=jobs, again=again, progress=progress
        )
        with tuner:
            tiles, more = _tune_tiles(tuner, calls, None if exhaustive else top, seconds)
        return GraphMeasured(formats, tiles), rows + more
    finally:
        if data is None:
            store.__exit__()


def _tune_tiles(
    tuner: Tuner, calls: GraphCalls, top: int | None, seconds: float
) -> tuple[MeasuredTiles, list[Row]]:
    machine, isa, threads = tuner.machine, tuner.isa, tuner.threads
    working_set = calls.weight_bytes
    where = home(working_set, machine)
    candidates: dict[Call, list[Tiles]] = {}
    for some in calls.gemms:
        tiles = tile_candidates(some, isa, machine, threads, where == "cache", top)
        for shape in some.shapes:
            call = some.arithmetic, shape
            candidates[call] = list(dict.fromkeys((*candidates.get(call, ()), *tiles)))

    def known(call: Call) -> dict[Tiles, Entry]:
        return _known(
            tuner.data, call, isa, threads, where, tuner.key,
            database.compiler_key(tuner.compiler.version), tuner.kernel,
        )  # fmt: skip

    wanted: dict[Call, list[GemmSpec]] = {}
    for call, tiles in candidates.items():
        there = {} if tuner.again else known(call)
        wanted[call] = [gemm_spec(isa, call[0], t) for t in tiles if t not in there]
    missing = list(dict.fromkeys(spec for specs in wanted.values() for spec in specs))
    built: list[str] = []

    def done(name: str) -> None:
        built.append(name)
        tuner.report("compile", len(built), len(missing))

    libraries = tuner.bench.build(missing, done) if missing else {}
    total = 1
    if where == "memory":
        total = min(BYTES_AT_MOST, max(working_set, TIMES_CACHE * machine.l3_bytes))
    rows: list[Row] = []
    entries: dict[Call, dict[Tiles, Entry]] = {}
    for step, (call, specs) in enumerate(wanted.items()):
        tuner.report("measure", step, len(wanted))
        if specs:
            _measure(tuner, call, {s: libraries[s] for s in specs}, where, total, seconds)
        entries[call] = known(call)
        rows.append(_row(tuner, call, candidates[call], entries[call], len(specs), where))
    tuner.report("measure", len(wanted), len(wanted))
    return _times(entries), rows


def _measure(
    tuner: Tuner, call: Call, libraries: Mapping[GemmSpec, Path], where: str, total: int,
    seconds: float,
) -> None:  # fmt: skip
    shape = call[1]
    problems = {spec: GemmProblem(spec, shape) for spec in libraries}
    outcomes = tuner.bench.compete(libraries, problems, tuner.threads, total, seconds)
    tuner.data.add(
        tuner.entry(
            o, kernel=gemm_key(tuner.kernel(o.spec), shape), n=shape.n, k=shape.taps * shape.k,
            m=shape.pixels, home=where, spec=gemm_to_json(o.spec, shape),
        )
        for o in outcomes
    )  # fmt: skip


def _row(
    tuner: Tuner, call: Call, candidates: Sequence[Tiles], known: Mapping[Tiles, Entry],
    measured: int, where: str,
) -> Row:  # fmt: skip
    arithmetic, shape = call
    best, times = best_of(
        candidates, known, lambda t: gemm_spec(tuner.isa, arithmetic, t).name,
        f"{arithmetic} {shape.n}x{shape.k} with {shape.taps} taps",
    )  # fmt: skip
    spec = gemm_spec(tuner.isa, arithmetic, best)
    predicted = predict_gemm(
        best, arithmetic, shape, tuner.isa, tuner.threads, tuner.machine, where == "cache"
    )
    return Row(
        format=arithmetic,
        n=shape.n,
        k=shape.taps * shape.k,
        m=shape.pixels,
        kernel=spec.name,
        spec=gemm_to_json(spec, shape),
        predicted_us=predicted.us,
        measured=measured,
        **times,
    )


def calls_of(path: Path, options: Any, isa: Isa, machine: Machine) -> GraphCalls:
    """The calls of an ONNX file (with its :class:`qigen.graph_compiler.GraphOptions`) or of an
    artifact of one; BadInput for an artifact of an older version."""
    from qigen.graph_compiler import optimized

    if not (path / "manifest.json").is_file():
        return graph_calls(optimized(path, options), isa, machine, options.activations)
    try:
        return artifact_calls(Artifact(path).manifest)
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            "the artifact does not say what its kernels multiply; compile it again", str(path)
        ) from None


# ---- threads of a compiled model ----

_REPEATS = 3
_TURN_S = 0.2  # that a turn of a number of threads takes at least


def tune_graph_model(
    path: str | os.PathLike[str],
    *,
    data: Database | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Knobs:
    """Measures the number of threads that suits a compiled graph model, as ``tune_model`` does of a
    language model; rates are runs a second on made-up inputs, open sizes at their limits."""
    artifact = Artifact(path)
    machine = targets.native()
    key, uid = database.machine_key(machine), str(artifact.manifest["model_uid"])
    store = data or Database()
    try:
        threads = {} if again else store.model(key, uid, "threads")
        wanted = [t for t in thread_counts(machine.cores) if t not in threads]
        if wanted:
            rates = _rates(artifact, path, wanted, progress or (lambda stage, done, total: None))
            threads.update(rates)
            for value, rate in rates.items():
                store.add_model(key, uid, "threads", value, rate)
        chosen = least(threads)
        return Knobs(chosen, 0, threads, {}, remember(path, chosen, 0))
    finally:
        if data is None:
            store.__exit__()


def _rates(
    artifact: Artifact, path: str | os.PathLike[str], counts: Iterable[int], report: Progress
) -> dict[int, float]:
    from qigen.bench_graph import model_inputs
    from qigen.model import load

    interface = artifact.manifest["interface"]
    sizes = {
        entry["name"]: [
            d if isinstance(d, int) else interface["limits"].get(d, 64 if axis else 1)
            for axis, d in enumerate(entry["shape"])
        ]
        for entry in interface["inputs"]
    }
    inputs = model_inputs(artifact, {}, sizes)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(_REPEATS):
        report("threads", turn, _REPEATS)
        for count in rates:
            model = load(path, count)
            model.run(inputs)
            start, runs = time.perf_counter(), 0
            while (took := time.perf_counter() - start) < _TURN_S or not runs:
                model.run(inputs)
                runs += 1
            rates[count].append(runs / took)
    report("threads", _REPEATS, _REPEATS)
    return {count: statistics.median(found) for count, found in rates.items()}
