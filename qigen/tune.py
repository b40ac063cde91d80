"""Tuning: the candidates of the planner, measured on this machine and remembered.

What is in the database is not measured again. Every product and number of tokens is stored as soon
as it is measured, so that an interruption loses nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qigen import targets, toolchain
from qigen.artifact import Artifact
from qigen.backends import base
from qigen.backends.base import Isa
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.costmodel import Situation, predict
from qigen.errors import BadInput, QigenError, ToolchainError, Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.planner import (
    BUCKETS,
    Measured,
    Product,
    isa_candidates,
    packed_bytes,
    plan_products,
    tuning_candidates,
)
from qigen.targets import Machine
from qigen.targets.calibrate import thread_counts
from qigen.tuned import write_tuned
from qigen.tuning import database
from qigen.tuning.database import Database, Entry, spec_from_json, spec_to_json
from qigen.tuning.measure import Bench, Outcome, Spec, kernel_text

TOP = 8
"""Candidates of a product that are measured, by default."""

FINALISTS = 4
"""Kernels of a product that are compiled for good after many others were tried with LLVM."""

SECONDS = 1.5
"""Of measuring for one product and number of tokens at most; compiling comes on top."""

TIMES_CACHE = 2
"""Weights that pass between two calls with the same weight, by the last cache ..."""
BYTES_AT_MOST = 1 << 30
"""... and at most so many bytes."""

Progress = Callable[[str, int, int], None]

Found = TypeVar("Found")
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Row:
    """What was found out about one product and number of tokens.

    ``best`` and ``first`` are the times of the best kernel and of the one that the model ranks
    first (0 if it failed), ``failures`` what is wrong with others, in words.
    """

    format: str
    n: int
    k: int
    m: int
    kernel: str
    spec: dict[str, Any]
    best_us: float
    first_us: float
    predicted_us: float
    spread: float
    candidates: int
    measured: int
    failures: tuple[str, ...]


def home(working_set: int, machine: Machine) -> str:
    """Where weights come from if so many bytes pass through the caches."""
    return "cache" if working_set <= machine.l3_bytes // 2 else "memory"


def _known(
    data: Database | None,
    p: Product,
    m: int,
    where: str,
    isa: Isa,
    threads: int,
    machine: str,
    compiler: str,
    kernel: Callable[[MatmulSpec], str],
) -> dict[MatmulSpec, Entry]:
    """Valid entries for a product: the user's, then those that came with the package.

    Of the latter the compiler may be another: it makes other code of the same source, but hardly
    another order.
    """
    wanted = {
        "machine": machine, "n": p.n, "k": p.k, "m": m, "threads": threads, "home": where
    }  # fmt: skip
    entries = list(data.entries(**wanted, compiler=compiler)) if data is not None else []
    entries += [
        e for e in database.shipped() if all(getattr(e, c) == v for c, v in wanted.items())
    ]
    found: dict[MatmulSpec, Entry] = {}
    for entry in entries:
        if entry.spec.get("format") != p.format.name or entry.spec["isa"] != isa.name:
            continue
        spec = spec_from_json(entry.spec)
        if spec not in found and kernel(spec) == entry.kernel:
            found[spec] = entry
    return found


def _times(p: Product, entries: Mapping[int, Mapping[MatmulSpec, Entry]]) -> Measured:
    """What the planner takes, from the entries of a product by number of tokens. A kernel that
    failed once is not to be trusted with any number of tokens."""
    bad = {spec for known in entries.values() for spec, e in known.items() if e.status != "ok"}
    times = {
        (spec, p.n, p.k, m): entry.us
        for m, known in entries.items()
        for spec, entry in known.items()
        if spec not in bad
    }
    return times | {(spec, p.n, p.k, m): math.inf for spec in bad for m in BUCKETS}


def _working_set(products: Iterable[Product]) -> int:
    """Bytes of weights that pass through the caches in a step."""
    return sum(max(1, p.uses) * packed_bytes(p) for p in products)


def remembered(
    products: Sequence[Product],
    *,
    isa: Isa,
    machine: Machine,
    threads: int,
    kernels: toolchain.Compiler | None = None,
) -> tuple[Measured, str]:
    """What was measured before of the products of a model on this machine, without measuring: from
    the user's database, else from what came with the package. ``kernels`` is what compiles the
    kernels, if that is not the C++ compiler.

    Returns what ``plan_model`` takes as ``measured``, and a sentence for the user if the database
    cannot be used (a model can do without).
    """
    where = home(_working_set(products), machine)

    def find(data: Database | None, compiler: str) -> Measured:
        return remembered_times(
            data, compiler, products, where, isa=isa, machine=machine, threads=threads
        )

    return look_up(machine, find, {}, kernels)


def remembered_times(
    data: Database | None,
    compiler: str,
    products: Sequence[Product],
    where: str,
    *,
    isa: Isa,
    machine: Machine,
    threads: int,
) -> Measured:
    """What is known of products whose weights come from ``where``."""
    key = database.machine_key(machine)
    kernel = functools.lru_cache(None)(lambda spec: kernel_text(spec)[1])
    times: dict[tuple[MatmulSpec, int, int, int], float] = {}
    for p in products:
        entries = {
            m: _known(data, p, m, where, isa, threads, key, compiler, kernel) for m in BUCKETS
        }
        times.update(_times(p, entries))
    return times


def look_up(
    machine: Machine,
    find: Callable[[Database | None, str], Found],
    nothing: Found,
    kernels: toolchain.Compiler | None = None,
) -> tuple[Found, str]:
    """What ``find`` finds in the user's database (None if there is none) for a compiler's key, and
    a sentence for the user if the database cannot be used."""
    key, note = database.machine_key(machine), ""
    data: Database | None = None
    try:
        if database.database_file().exists():
            data = Database()
    except (QigenError, OSError) as error:  # a folder that may not even be looked into
        note = f"{error}; kernels are chosen without it"
    try:
        if data is None and not any(e.machine == key for e in database.shipped()):
            return nothing, note
        try:
            compiler = database.compiler_key((kernels or toolchain.find_compiler()).version)
        except ToolchainError:  # sources: what was shipped is for any compiler
            compiler = ""
        return find(data, compiler), note
    except BadInput as error:  # an entry that is none
        return nothing, f"{error}; kernels are chosen without it"
    finally:
        if data is not None:
            data.__exit__()


class Tuner:
    """Measures products with the database at hand. Use as a context manager.

    ``jit`` compiles the kernels instead of the compiler for models, in less time.
    """

    def __init__(
        self,
        isa: Isa,
        machine: Machine,
        threads: int,
        *,
        data: Database | None = None,
        jobs: int | None = None,
        again: bool = False,
        progress: Progress | None = None,
        jit: toolchain.Compiler | None = None,
    ) -> None:
        self.isa = isa
        self.machine = machine
        self.threads = threads
        self.again = again
        self.report = progress or (lambda stage, done, total: None)
        compiler = toolchain.find_compiler()
        self.compiler = jit or compiler  # of the kernels
        self.data = data or Database()
        self._own = data is None
        self.bench = Bench(compiler, jobs, jit, "qg." if jit else "")
        self.key = database.machine_key(machine)
        self._kernels: dict[Spec, str] = {}

    def __enter__(self) -> Tuner:
        self.bench.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bench.__exit__(*exception)
        if self._own:
            self.data.__exit__()

    def kernel(self, spec: Spec) -> str:
        """The hash of a kernel's source."""
        if spec not in self._kernels:
            self._kernels[spec] = kernel_text(spec)[1]
        return self._kernels[spec]

    def known(self, p: Product, m: int, where: str) -> dict[MatmulSpec, Entry]:
        """Valid entries of the database for a product, else those that came with the package."""
        return _known(
            self.data, p, m, where, self.isa, self.threads, self.key,
            database.compiler_key(self.compiler.version), self.kernel,
        )  # fmt: skip

    def tune(
        self,
        products: Sequence[Product],
        candidates: dict[tuple[str, int, int], list[MatmulSpec]],
        working_set: int,
        buckets: Sequence[int] = BUCKETS,
        seconds: float = SECONDS,
    ) -> tuple[Measured, list[Row]]:
        """Measures the candidates of every product that the database does not know."""
        where = home(working_set, self.machine)
        total = working_set
        if where == "memory":
            total = min(BYTES_AT_MOST, max(working_set, TIMES_CACHE * self.machine.l3_bytes))
        elif total == 0:
            total = 1
        wanted = {
            (p.key, m): [
                spec
                for spec in candidates[p.key]
                if self.again or spec not in self.known(p, m, where)
            ]
            for p in products
            for m in buckets
        }
        missing = [spec for specs in wanted.values() for spec in specs]
        built: list[str] = []
        distinct = len(set(missing))

        def done(name: str) -> None:
            built.append(name)
            self.report("compile", len(built), distinct)

        libraries = self.bench.build(missing, done) if missing else {}
        steps = [(p, m) for p in products for m in buckets]
        entries: dict[tuple[str, int, int], dict[int, Mapping[MatmulSpec, Entry]]] = {}
        rows = []
        for step, (p, m) in enumerate(steps):
            self.report("measure", step, len(steps))
            new = wanted[p.key, m]
            if new:
                self._measure(p, m, {s: libraries[s] for s in new}, where, total, seconds)
            known = self.known(p, m, where)
            own = [s for s in candidates[p.key] if s in known]
            entries.setdefault(p.key, {})[m] = known
            rows.append(self._row(p, m, own, known, len(new), working_set))
        self.report("measure", len(steps), len(steps))
        measured: dict[tuple[MatmulSpec, int, int, int], float] = {}
        for p in products:
            measured.update(_times(p, entries[p.key]))
        return measured, rows

    def _measure(
        self,
        p: Product,
        m: int,
        libraries: dict[MatmulSpec, Path],
        where: str,
        total: int,
        seconds: float,
    ) -> None:
        outcomes = self.bench.measure(libraries, p.n, p.k, m, self.threads, total, seconds)
        self.data.add(
            self.entry(
                o, kernel=self.kernel(o.spec), n=p.n, k=p.k, m=m, home=where,
                spec=spec_to_json(o.spec),
            )
            for o in outcomes
        )  # fmt: skip

    def entry(
        self, o: Outcome[Any], *, kernel: str, n: int, k: int, m: int, home: str,
        spec: dict[str, Any],
    ) -> Entry:  # fmt: skip
        """What the database keeps of a measurement."""
        return Entry(
            machine=self.key,
            compiler=database.compiler_key(self.compiler.version),
            kernel=kernel,
            n=n,
            k=k,
            m=m,
            threads=self.threads,
            home=home,
            spec=spec,
            status=o.status,
            us=o.us if o.status == "ok" else 0.0,
            spread=o.spread,
            runs=o.runs,
            date=database.now(),
            about=o.message or self.machine.description,
        )

    def _row(
        self,
        p: Product,
        m: int,
        specs: list[MatmulSpec],
        known: dict[MatmulSpec, Entry],
        measured: int,
        working_set: int,
    ) -> Row:
        best, times = best_of(specs, known, lambda s: s.name, f"{p.format.name} {p.n}x{p.k}")
        at = Situation(p.n, p.k, m, self.threads, self.machine, working_set)
        return Row(
            format=p.format.name,
            n=p.n,
            k=p.k,
            m=m,
            kernel=best.name,
            spec=spec_to_json(best),
            predicted_us=predict(best, at).us,
            measured=measured,
            **times,
        )


def best_of(
    candidates: Sequence[Candidate],
    known: Mapping[Candidate, Entry],
    name: Callable[[Candidate], str],
    what: str,
) -> tuple[Candidate, dict[str, Any]]:
    """The fastest candidate that works, and what a :class:`Row` says of it and of the others, the
    model's first before them; QigenError if none works."""
    good = [c for c in candidates if known[c].status == "ok"]
    failures = tuple(
        f"{name(c)}: {known[c].status}, {known[c].about}" for c in candidates if c not in good
    )
    if not good:
        raise QigenError(f"no kernel for {what} works: {'; '.join(failures)}")
    best = min(good, key=lambda c: known[c].us)
    return best, {
        "best_us": known[best].us,
        "first_us": known[candidates[0]].us,
        "spread": known[best].spread,
        "candidates": len(candidates),
        "failures": failures,
    }


def tune_products(
    products: Sequence[Product],
    *,
    isa: Isa,
    machine: Machine,
    activations: str = "auto",
    threads: int = 1,
    top: int = TOP,
    exhaustive: bool = False,
    again: bool = False,
    buckets: Sequence[int] = BUCKETS,
    seconds: float = SECONDS,
    working_set: int | None = None,
    jobs: int | None = None,
    data: Database | None = None,
    progress: Progress | None = None,
    kernels: toolchain.Compiler | None = None,
) -> tuple[Measured, list[Row]]:
    """Measures the best ``top`` candidates of every product (all with ``exhaustive``).

    ``working_set``: bytes of weights from one call to the next with the same (default: those of
    the products by their uses). Where there are many candidates and the llvm backend is installed,
    it compiles them, and the best ``FINALISTS`` are measured again as the compiler makes them.
    With ``kernels`` that compiler makes all of them.
    Returns what ``plan_model`` takes as ``measured``, and a row for every product and number of
    tokens.
    """
    if top < 1:
        raise UsageError("at least one candidate must be measured")
    candidates = tuning_candidates(
        products, isa, machine, activations, threads, None if exhaustive else top
    )
    if working_set is None:
        working_set = _working_set(products)
    with contextlib.ExitStack() as stack:
        if data is None:
            data = Database()
            stack.callback(data.__exit__)
        make = functools.partial(
            Tuner, isa, machine, threads, data=data, jobs=jobs, again=again, progress=progress
        )
        if kernels is not None:
            with make(jit=kernels) as tuner:
                return tuner.tune(products, candidates, working_set, buckets, seconds)
        jit = fast_compiler(isa, machine)
        if jit is not None and max(map(len, candidates.values())) > 2 * FINALISTS:
            with make(jit=jit) as screen:
                times, _ = screen.tune(products, candidates, working_set, buckets, seconds / 2)
            chosen, _ = plan_products(products, isa, machine, activations, threads, times)
            candidates = {
                p.key: _finalists(p, candidates[p.key], chosen[p.key], times, buckets)
                for p in products
            }
        with make() as tuner:
            return tuner.tune(products, candidates, working_set, buckets, seconds)


def fast_compiler(isa: Isa, machine: Machine) -> toolchain.Compiler | None:
    """LLVM, which compiles a kernel in a quarter of the time of g++ (0.2 to 0.9 s instead of 1.6 to
    2.7 s on AVX2) to code that takes about as long; None if it is not installed or has no
    primitives for the row."""
    if isa.tiles:
        return None
    try:
        compiler: toolchain.Compiler = base.backend("llvm").find_compiler(machine)
    except (Unsupported, ToolchainError):
        return None
    return compiler


def _finalists(
    p: Product,
    candidates: Sequence[MatmulSpec],
    chosen: MatmulSpec,
    times: Measured,
    buckets: Sequence[int],
) -> list[MatmulSpec]:
    """The choice of the model, what the times choose, and the fastest others with its register
    tiles: kernels of a model that share activations must agree on these."""

    def score(spec: MatmulSpec) -> float:
        return sum(
            times.get((spec, p.n, p.k, m), math.inf) / times[chosen, p.n, p.k, m] for m in buckets
        )

    if any((chosen, p.n, p.k, m) not in times for m in buckets):
        return list(candidates)
    rivals = sorted((s for s in candidates if s.tiles == chosen.tiles), key=score)
    return list(dict.fromkeys((candidates[0], chosen, *rivals)))[:FINALISTS]


def shapes_to_products(shapes: Iterable[str], formats: Iterable[str]) -> list[Product]:
    """Products ``NxK`` in every format; UsageError for what is no shape."""
    found = []
    for text in shapes:
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() and 0 < int(p) < 1 << 24 for p in parts):
            raise UsageError(f"--shape {text} is no shape; write NxK, for example 4096x4096")
        for name in formats:
            found.append(Product(by_name(name), int(parts[0]), int(parts[1]), 1))
    return found


def model_products(
    path: Path, weights: str = "keep", activations: str | None = None
) -> list[Product]:
    """The matrices of a language model, a file or an artifact, as they are for ``activations``."""
    from qigen.frontends import build_graph, load_model
    from qigen.graph_compiler import SHORT_FORMATS
    from qigen.passes.pipeline import optimize
    from qigen.planner import products
    from qigen.quantize.weights import requantized, with_byte_tables

    if (path / "manifest.json").is_file():
        artifact = Artifact(path)
        seen: dict[tuple[str, int, int], int] = {}
        for tensor in artifact.tensors.values():
            if "layout" in tensor:
                for part in tensor["parts"]:
                    key = (tensor["format"], part["shape"][0], part["shape"][1])
                    seen[key] = seen.get(key, 0) + 1
        return [Product(by_name(f), n, k, uses) for (f, n, k), uses in seen.items()]
    if not path.exists():
        raise BadInput("there is no such file", str(path))
    source = load_model(path)
    graph = optimize(build_graph(source, min(source.config.max_position, 4096)))
    if weights != "keep":
        graph = requantized(graph, by_name(SHORT_FORMATS.get(weights, weights)))
    return products(with_byte_tables(graph, activations)[0])


def native_machine(isa: str | None = None) -> tuple[Machine, Isa]:
    """This machine, and the instruction set to tune for."""
    from qigen.backends.cpu.isa import by_name as isa_by_name

    machine = targets.native()
    row = isa_by_name(isa) if isa else isa_candidates(machine)[0]
    if not machine.has(row.features):
        raise UsageError(f"this machine has no {row.name}: its kernels cannot be measured here")
    return machine, row


# ---- whole models ----

BLOCKS = (16, 32, 64, 128, 256, 512)
"""Tokens of a prefill step to try."""

_REPEATS = 3
_DECODE = 16
_BETTER = 1.02  # a knob is turned only for more than the noise


@dataclass(frozen=True)
class Knobs:
    """What suits a compiled model: threads and tokens of a prefill step, with the tokens a second
    that each value reached (of a graph model runs a second, and no block). ``note`` says why the
    artifact does not remember the threads, if so."""

    threads: int
    block: int
    decode_tok_s: dict[int, float]
    prefill_tok_s: dict[int, float]
    note: str = ""


def tune_model(
    path: str | os.PathLike[str],
    *,
    data: Database | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Knobs:
    """Measures the whole-model knobs of a compiled language model; remembered by its uid, and the
    threads in the artifact too: ``qigen.load`` starts so many unless it is told a number.

    Each value is the median of turns in which all values run once. The fewest threads and the
    smallest block within 2 % of the best are chosen.
    """
    artifact = Artifact(path)
    machine = targets.native()
    key, uid = database.machine_key(machine), str(artifact.manifest["model_uid"])
    report = progress or (lambda stage, done, total: None)
    limits = artifact.manifest["limits"]
    own = Database() if data is None else None
    store = data or own
    assert store is not None
    try:
        threads = store.model(key, uid, "threads") if not again else {}
        wanted = [t for t in thread_counts(machine.cores) if t not in threads]
        if wanted:
            rates = _rates_by_threads(path, wanted, limits["max_seq"], report)
            threads.update(rates)
            for value, rate in rates.items():
                store.add_model(key, uid, "threads", value, rate)
        chosen = least(threads)
        blocks = store.model(key, uid, "block") if not again else {}
        most = min(limits["max_tokens"], limits["max_seq"])
        sizes = [b for b in (*BLOCKS, most) if b <= most and b not in blocks]
        if sizes:
            rates = _rates_by_block(path, chosen, sorted(set(sizes)), limits["max_seq"], report)
            blocks.update(rates)
            for value, rate in rates.items():
                store.add_model(key, uid, "block", value, rate)
        block = least(blocks)
        return Knobs(chosen, block, threads, blocks, remember(path, chosen, block))
    finally:
        if own is not None:
            own.__exit__()


def remember(path: str | os.PathLike[str], threads: int, block: int) -> str:
    """Writes the knobs into the artifact; what the user should know if that is not possible."""
    try:
        write_tuned(Path(path), threads, block)
    except OSError as error:
        return (
            f"{path} cannot be written ({error.strerror}); load it with --threads {threads}"
        )
    return ""


def least(rates: dict[int, float]) -> int:
    """The smallest value that is as good as the best."""
    best = max(rates.values())
    return min(value for value, rate in rates.items() if rate * _BETTER >= best)


def _rates_by_threads(
    path: str | os.PathLike[str], counts: Sequence[int], max_seq: int, report: Progress
) -> dict[int, float]:
    import numpy as np

    from qigen.model import load

    tokens = max(1, min(_DECODE, max_seq - 1))
    rates: dict[int, list[float]] = {t: [] for t in counts}
    for turn in range(_REPEATS):
        report("threads", turn, _REPEATS)
        for count in counts:
            session = load(path, count).session(max_seq)
            session.eval(np.zeros(1, np.int32))
            start = time.perf_counter()
            for _ in range(tokens):
                session.rewind(0)
                session.eval(np.zeros(1, np.int32))
            rates[count].append(tokens / (time.perf_counter() - start))
    report("threads", _REPEATS, _REPEATS)
    return {count: statistics.median(found) for count, found in rates.items()}


def _rates_by_block(
    path: str | os.PathLike[str],
    threads: int,
    blocks: Sequence[int],
    max_seq: int,
    report: Progress,
) -> dict[int, float]:
    import numpy as np

    from qigen.model import load

    session = load(path, threads).session(max_seq)
    length = min(max_seq, max(blocks))
    ids = np.zeros(length, np.int32)
    rates: dict[int, list[float]] = {b: [] for b in blocks}
    for turn in range(_REPEATS):
        report("prefill block", turn, _REPEATS)
        for block in blocks:
            session.rewind(0)
            start = time.perf_counter()
            for first in range(0, length, block):
                session.eval(ids[first : first + block])
            rates[block].append(length / (time.perf_counter() - start))
    report("prefill block", _REPEATS, _REPEATS)
    return {block: statistics.median(found) for block, found in rates.items()}
