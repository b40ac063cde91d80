"""How fast single kernels are, beside the roofline of this machine and beside peers.

Every side runs in a process of its own and they take turns; in every turn the read bandwidth of the
memory is measured too, so that shares and ratios are of one and the same state of the machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from qigen import toolchain
from qigen.backends.base import Isa
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.bench import Worker, stream_read_gb_s
from qigen.costmodel import Prediction, Situation, predict, schedules
from qigen.errors import QigenError, Unsupported, UsageError
from qigen.kernel_peers import PEERS, copies
from qigen.planner import Product, activations_for, packed_bytes
from qigen.targets import Machine
from qigen.tune import Tuner, home
from qigen.tuning import Database
from qigen.tuning.measure import HUGE_PAGES, PAGES, SMALL_PAGES, Bench, huge_pages

Progress = Callable[[str, int, int], None]

ROUNDS = 5
"""How often a side goes through all copies of the weight in a turn ..."""
SECONDS = 0.1
"""... and for so long at most, if one call is done."""

_ROTATION_CACHES = 4
_ROTATION_BYTES = 256 << 20
_PASSES = 3  # over all weights, to measure the read bandwidth in a turn

_ACCURATE = 0.02  # of the sum of |w x|: a peer may round activations to 8 bits


# What makes malloc of glibc ask for huge pages, or leaves it as it is.
_MALLOC = {SMALL_PAGES: {}, HUGE_PAGES: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}


class KernelWorker(Worker):
    """A peer in its own process, whose memory lies on ``pages``."""

    module = "qigen.bench_kernel_worker"

    def __init__(self, side: str, pages: str, **options: Any) -> None:
        small = pages == SMALL_PAGES
        super().__init__(side, _MALLOC[pages], small_pages=small, **options)


def bench_kernel(
    products: Sequence[Product],
    *,
    isa: Isa,
    machine: Machine,
    tokens: Sequence[int] = (1, 16, 128),
    threads: Sequence[int] = (1,),
    activations: str = "auto",
    peers: Sequence[str] = (),
    cached: bool = False,
    pages: str = SMALL_PAGES,
    repeat: int = 7,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures our kernel and the peers' for every product, number of tokens and threads; each row
    as soon as it is measured.

    The kernel is the tuned one if the database has one, else the model's choice. Weights rotate
    over :func:`rotation` bytes, or stay in the caches with ``cached``; they lie on ``pages``, the
    peers' too ('huge_pages' is the share of a side's memory that does). The keys of a row are those
    of ``qigen bench-kernel --json``; times are medians of ``repeat`` turns. Our time does not
    include the rounding of activations, which is another kernel; the peers' does.

    Raises UsageError, Unsupported if a peer is unknown or not installed.
    """
    points = [
        Point(p, m, t, cached, tuple(peers)) for p in products for m in tokens for t in threads
    ]
    check_peers(peers)
    return bench_points(
        points, isa=isa, machine=machine, activations=activations, pages=pages, repeat=repeat,
        jobs=jobs, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What is measured for a row: ``product`` by ``m`` tokens on so many ``threads``, with weights
    from memory or ``cached``, beside ``peers``."""

    product: Product
    m: int
    threads: int
    cached: bool = False
    peers: tuple[str, ...] = ()


def bench_points(
    points: Sequence[Point],
    *,
    isa: Isa,
    machine: Machine,
    activations: str = "auto",
    pages: str = SMALL_PAGES,
    repeat: int = 7,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of :func:`bench_kernel` for any points, each as soon as it is measured."""
    if repeat < 1:
        raise UsageError("a benchmark needs at least one repeat")
    if pages not in PAGES:
        raise UsageError(f"there are no {pages} pages; choose {' or '.join(PAGES)}")
    check_peers(dict.fromkeys(name for point in points for name in point.peers))
    report = progress or (lambda stage, done, total: None)

    def rows() -> Iterator[dict[str, Any]]:
        with Bench(toolchain.find_compiler(), jobs) as bench, Database() as data:
            for done, p in enumerate(points):
                report("measure", done, len(points))
                run = _Run(p.product, p.m, p.threads, isa, machine, p.cached, pages, repeat)
                arithmetic = activations_for(p.product.format, activations)
                yield run.measure(bench, data, arithmetic, p.peers)
            report("measure", len(points), len(points))

    return rows()


def rotation(machine: Machine) -> int:
    """Bytes of weights that pass between two calls with the same: four times the last cache, but no
    more than 256 MiB, or one and a half times a cache that is larger still."""
    l3 = machine.l3_bytes
    return max(min(_ROTATION_CACHES * l3, _ROTATION_BYTES), 3 * l3 // 2)


def check_peers(names: Iterable[str]) -> None:
    """Unsupported if a peer is unknown or not installed."""
    for name in names:
        if name not in PEERS:
            raise Unsupported(f"peer '{name}' is not known; there is {', '.join(PEERS)}")
    for name in names:
        if importlib.util.find_spec(PEERS[name].module) is None:
            raise Unsupported(
                f"{name} is not installed; install it with pip install {PEERS[name].package}"
            )


def machine_state(machine: Machine) -> dict[str, Any]:
    """What the machine is and what else it does."""
    return {
        "processor": machine.description,
        "cores": machine.cores,
        "system": platform.platform(),
        "load_average": list(os.getloadavg()),
        "calibrated": machine.calibrated or None,
    }


class _Run:
    """One product, number of tokens and threads."""

    def __init__(
        self,
        p: Product,
        m: int,
        threads: int,
        isa: Isa,
        machine: Machine,
        cached: bool,
        pages: str,
        repeat: int,
    ) -> None:
        self.p, self.m, self.threads = p, m, threads
        self.isa, self.machine, self.pages, self.repeat = isa, machine, pages, repeat
        size = packed_bytes(p)
        self.total = 0 if cached else rotation(machine)
        self.working_set = size if cached else max(self.total, machine.l3_bytes)

    def predict(self, spec: MatmulSpec) -> Prediction:
        p = self.p
        at = Situation(p.n, p.k, self.m, self.threads, self.machine, self.working_set)
        return predict(spec, at)

    def choose(self, data: Database, activations: str) -> tuple[MatmulSpec, str]:
        """(our kernel, 'tuned' or 'model')."""
        tuner = Tuner(self.isa, self.machine, self.threads, data=data)
        where = home(self.working_set, self.machine)
        known = {
            spec: entry
            for spec, entry in tuner.known(self.p, self.m, where).items()
            if entry.status == "ok" and spec.activations == activations
        }
        if known:
            return min(known, key=lambda spec: known[spec].us), "tuned"
        specs = schedules(self.p.format, self.p.k, self.isa, activations, self.machine)
        return min(specs, key=lambda spec: self.predict(spec).us), "model"

    def measure(
        self, bench: Bench, data: Database, activations: str, peers: Sequence[str]
    ) -> dict[str, Any]:
        """The row of the result."""
        p, m = self.p, self.m
        spec, source = self.choose(data, activations)
        ours: list[float] = []
        streams: list[float] = []
        theirs: dict[str, list[float]] = {}
        abouts: dict[str, dict[str, Any]] = {}
        before = psutil.cpu_times()
        with contextlib.ExitStack() as stack:
            side = stack.enter_context(
                bench.running(spec, p.n, p.k, m, self.threads, self.total, self.pages)
            )
            (first,) = side.run(1)
            # as long as the peers: after some milliseconds a processor is faster than at first
            calls = ROUNDS * copies(packed_bytes(p), self.total, m)
            calls = max(1, min(calls, int(1e6 * SECONDS / first)))
            workers: dict[str, KernelWorker] = {}
            for name in peers:
                try:
                    workers[name], abouts[name] = stack.enter_context(self._best(name))
                    theirs[name] = []
                except Unsupported as error:
                    abouts[name] = {"unsupported": error.message}
            for _ in range(self.repeat):
                ours.append(statistics.median(side.run(calls)))
                for name, worker in workers.items():
                    times = worker.ask(do="run", rounds=ROUNDS, seconds=SECONDS)["us"]
                    theirs[name].append(statistics.median(times))
                if self.total:
                    streams.append(statistics.median(side.stream(_PASSES)))
            if not self.total:  # what is in the caches says nothing about the memory
                streams.append(stream_read_gb_s(self.threads))
            for name, worker in workers.items():
                abouts[name]["huge_pages"] = huge_pages(worker.pid)
            huge = side.huge()
        after = psutil.cpu_times()
        us, stream = statistics.median(ours), statistics.median(streams)
        prediction = self.predict(spec)
        operations = 2 * p.n * p.k * m
        gb_s = packed_bytes(p) / us / 1e3
        elapsed = sum(after) - sum(before)
        steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
        return {
            "n": p.n,
            "k": p.k,
            "m": m,
            "weights": p.format.name,
            "bits": p.format.bits_per_weight,
            "activations": spec.activations,
            "threads": self.threads,
            "kernel": spec.name,
            "tiles": list(spec.tiles),
            "chosen_by": source,
            "cached": self.total == 0,
            "pages": self.pages,
            "huge_pages": huge,
            "us": us,
            "spread": (max(ours) - min(ours)) / us,
            "runs": ours,
            "gb_s": gb_s,
            "gops": operations / us / 1e3,
            "stream_read_gb_s": stream,
            "fraction_of_stream": gb_s / stream,
            "roofline_us": prediction.roofline_us,
            "fraction_of_roofline": prediction.roofline_us / us,
            "predicted_us": prediction.us,
            "bound": prediction.bound,
            "traffic": dict(prediction.traffic),
            "steal_fraction": steal / elapsed if elapsed else 0.0,
            "load_average": os.getloadavg()[0],
            "peers": {
                name: about
                if "unsupported" in about
                else {
                    **about,
                    "us": statistics.median(theirs[name]),
                    "spread": (max(theirs[name]) - min(theirs[name]))
                    / statistics.median(theirs[name]),
                    "gops": operations / statistics.median(theirs[name]) / 1e3,
                    "ratio": statistics.median(
                        t / o for t, o in zip(theirs[name], ours, strict=True)
                    ),
                }
                for name, about in abouts.items()
            },
        }

    @contextlib.contextmanager
    def _best(self, name: str) -> Iterator[tuple[KernelWorker, dict[str, Any]]]:
        """A peer with the setting that is fastest in a trial, and what there is to say about it."""
        options = {
            "format": self.p.format.name, "n": self.p.n, "k": self.p.k, "m": self.m,
            "threads": self.threads, "total": self.total,
        }  # fmt: skip
        best: tuple[float, KernelWorker] | None = None
        failures: list[str] = []
        with contextlib.ExitStack() as stack:
            for setting in PEERS[name].settings:
                try:
                    with contextlib.ExitStack() as trial:
                        worker = trial.enter_context(
                            KernelWorker(name, self.pages, **options, **setting)
                        )
                        error = worker.ask(
                            do="check", **{k: options[k] for k in ("format", "n", "k", "m")}
                        )["largest"]
                        if error > _ACCURATE:
                            failures.append(f"its result is off by {error:.2g} of the sum of |w x|")
                            continue
                        us = min(worker.ask(do="run", rounds=3, seconds=SECONDS)["us"])
                        if best is None or us < best[0]:
                            stack.close()  # the best so far stays loaded, the one before does not
                            stack.push(trial.pop_all())
                            best = us, worker
                except Unsupported:
                    raise
                except QigenError as problem:
                    failures.append(problem.message)
            if best is None:
                raise Unsupported(f"it failed: {'; '.join(dict.fromkeys(failures))}")
            worker = best[1]
            worker.ask(do="run", rounds=1)
            yield worker, {key: worker.loaded[key] for key in ("version", "setting")}


def markdown(rows: Sequence[dict[str, Any]], state: dict[str, Any]) -> str:
    """The rows as a table, with the state of the machine below it."""
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    return "\n".join([*table_head(peers), *map(table_line, rows), "", about(rows, state)]) + "\n"


def table_head(peers: Sequence[str]) -> list[str]:
    """The first lines of the table of rows with these peers."""
    return [
        "| weights | shape | M | threads | µs | spread | GB/s | of read bandwidth | GOPS | "
        "of roofline | predicted µs |" + "".join(f" {name} µs (ratio) |" for name in peers),
        "|---|---|" + "---:|" * (9 + len(peers)),
    ]


def table_line(row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    cells = [
        row["weights"], f"{row['n']}x{row['k']}", row["m"], row["threads"],
        f"{row['us']:.1f}", f"{row['spread']:.0%}", f"{row['gb_s']:.1f}",
        f"{row['fraction_of_stream']:.0%}", f"{row['gops']:.0f}",
        f"{row['fraction_of_roofline']:.0%}", f"{row['predicted_us']:.1f}",
    ]  # fmt: skip
    for peer in row["peers"].values():
        cells.append(f"{peer['us']:.1f} ({peer['ratio']:.2f})" if "us" in peer else "–")
    return "| " + " | ".join(map(str, cells)) + " |"


def about(rows: Sequence[dict[str, Any]], state: dict[str, Any]) -> str:
    """The machine and what it does besides, and the versions of the peers, in a line."""
    pages = " and ".join(dict.fromkeys(row.get("pages", SMALL_PAGES) for row in rows))
    told = {
        name: peer["version"]
        for row in rows
        for name, peer in row["peers"].items()
        if "version" in peer
    }
    return (
        f"{state['processor']}; {state['cores']} cores; {state['system']}; load average "
        f"{state['load_average'][0]:.1f}; weights on {pages} pages; "
        + ("; ".join(f"{name} {version}" for name, version in told.items()) or "no peers")
    )


def plots(
    rows: Sequence[dict[str, Any]], folder: str | os.PathLike[str], machine: Machine
) -> list[Path]:
    """Draws roofline, time against bits, share of bandwidth and predicted against measured, as PNG
    in ``folder``; Unsupported if matplotlib is not installed. Of weights in the caches only the
    last, unless there are no others."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise Unsupported(
            "plots need matplotlib; install it with pip install 'qigen[bench]'"
        ) from None
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(target / f"{name}.png", dpi=120)
        plt.close(figure)
        written.append(target / f"{name}.png")

    def series(key: Callable[[dict[str, Any]], object]) -> dict[object, list[dict[str, Any]]]:
        found: dict[object, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(key(row), []).append(row)
        return found

    every, rows = rows, [r for r in rows if not r["cached"]] or rows
    figure, axes = plt.subplots(figsize=(7, 5))
    for threads, some in series(lambda r: r["threads"]).items():
        intensity = [r["gops"] / r["gb_s"] for r in some]
        label = f"{threads} threads"
        (points,) = axes.loglog(intensity, [r["gops"] for r in some], "o", label=label)
        stream = statistics.median(r["stream_read_gb_s"] for r in some)
        span = sorted({*intensity, 1.0, 1e4})
        rate = machine.rates[max(machine.rates)]
        top = 128 * rate.per_cycle["dot"] * rate.ghz * int(str(threads)) * max(machine.rates) / 512
        axes.loglog(span, [min(i * stream, top) for i in span], "-", color=points.get_color())
    axes.set_xlabel("operations a byte of weights")
    axes.set_ylabel("GOPS")
    axes.set_title("Roofline: measured read bandwidth, dot products a cycle")
    axes.legend()
    save(figure, "roofline")

    figure, axes = plt.subplots(figsize=(7, 5))
    shapes = series(lambda r: f"{r['n']}x{r['k']}, M={r['m']}, {r['threads']} threads")
    for shape, some in shapes.items():
        if len({r["bits"] for r in some}) < 3 < len({r["bits"] for r in rows}):
            continue  # a point or two say nothing, where others have a curve
        some = sorted(some, key=lambda r: float(r["bits"]))
        axes.semilogy([r["bits"] for r in some], [r["us"] for r in some], "o-", label=shape)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("µs")
    axes.set_title("Time against bits")
    axes.legend(fontsize="small")
    save(figure, "bits")

    decode = [r for r in rows if r["m"] == min(row["m"] for row in rows)]
    figure, axes = plt.subplots(figsize=(7, 5))
    names = [f"{r['weights']} {r['n']}x{r['k']} {r['threads']}T" for r in decode]
    axes.barh(names, [100 * r["fraction_of_stream"] for r in decode])
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlabel("% of the read bandwidth measured in the same turns")
    axes.set_title(f"Share of bandwidth, M={decode[0]['m']}")
    save(figure, "bandwidth")

    rows = every
    figure, axes = plt.subplots(figsize=(6, 6))
    for weights, some in series(lambda r: r["weights"]).items():
        axes.loglog([r["us"] for r in some], [r["predicted_us"] for r in some], "o", label=weights)
    ends = [min(r["us"] for r in rows), max(r["us"] for r in rows)]
    axes.loglog(ends, ends, "-", color="black", linewidth=1)
    axes.set_xlabel("measured µs")
    axes.set_ylabel("predicted µs")
    axes.set_title("Predicted against measured")
    axes.legend(fontsize="small")
    save(figure, "predicted")
    return written
