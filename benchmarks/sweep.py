"""Every row of the format table: one kernel each, for one token and for many, timed quickly.

The kernels of a row have the register tiles that the planner gives ``s4g128`` (``nf4g64`` where
activations are floats), so that two searches serve all rows. A process runs 1 and 4 tokens in
turns, another 16 and 128; the read bandwidth is that of the same turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qigen.backends.base import Isa
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.bench_kernel import rotation
from qigen.costmodel import Situation, predict, schedules
from qigen.costmodel.matmul import token_tiles
from qigen.formats.catalog import REPRESENTATIVE, by_name
from qigen.planner import Product, activations_for, plan_products
from qigen.targets import Machine
from qigen.tuning.measure import Bench
from qigen.tuning.problem import Problem

MODELS = {True: "s4g128", False: "nf4g64"}
"""Rows whose tiles the others have, by whether activations are integers."""

MORE = ("s2g32", "s3g32", "s4g32", "s8g32", "u2g128", "u3g128", "s4g128", "s8g128", "z4g128",
        "bipolar2", "bipolar4")  # fmt: skip
"""Rows beside the representative ones: those that peers have, and widths to compare."""

TURNS = (((1, 4), 9), ((16, 128), 2))
"""Tokens that take turns, and how often; many tokens by floats once, as they take long."""

FIRST = 4096
"""Rows of the matrix of the picture."""

FEW = 64 << 20
"""Bytes of weights that pass between calls with many tokens, which are not bound by reading."""


@dataclass(frozen=True)
class Place:
    """A shape on so many threads."""

    n: int
    k: int
    threads: int


def names() -> list[str]:
    """The rows, those of fewer bits first."""
    every = dict.fromkeys((*REPRESENTATIVE, *MORE))
    return sorted(every, key=lambda name: (by_name(name).bits_per_weight, name))


def kernels(isa: Isa, machine: Machine, k: int) -> dict[str, MatmulSpec]:
    """The kernel of each row for ``k`` columns."""
    tiles = {}
    for integer, name in MODELS.items():
        p = Product(by_name(name), 4096, k, 1)
        kind = activations_for(p.format, "auto")
        chosen, _ = plan_products([p], isa, machine, kind, machine.cores)
        tiles[integer] = chosen[p.key].tiles
    found = {}
    for name in names():
        format = by_name(name)
        kind = activations_for(format, "auto")
        own = tiles[kind.startswith("int8")]
        known = token_tiles(format, isa, kind)
        own = (*(t for t in own if t in known), 1)
        found[name] = schedules(format, k, isa, kind, machine, own)[-1]
    return found


def sweep(
    bench: Bench, machine: Machine, specs: dict[str, MatmulSpec], places: Sequence[Place],
    known: set[tuple[object, ...]], end: float,
) -> Iterator[dict[str, Any]]:
    """The rows of the table that are not ``known`` (:func:`identity`), until the time ``end``."""
    for place in places:
        for name, spec in specs.items():
            for tokens, rounds in TURNS:
                if all((name, place.n, place.k, m, place.threads) in known for m in tokens):
                    continue
                if time.monotonic() > end:
                    return
                yield from _turn(bench, machine, spec, place, tokens, rounds)


def identity(row: dict[str, Any]) -> tuple[object, ...]:
    """What tells rows apart."""
    return row["weights"], row["n"], row["k"], row["m"], row["threads"]


def _turn(
    bench: Bench, machine: Machine, spec: MatmulSpec, place: Place, tokens: Sequence[int],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    problems = [Problem(spec, place.n, place.k, m) for m in tokens]
    total = rotation(machine) if tokens[0] == 1 else min(FEW, rotation(machine))
    with bench.turns([(spec, p) for p in problems], place.threads, total) as running:
        times = running.run(1 if tokens[0] > 1 and not spec.integer else rounds)
        stream = statistics.median(running.stream(2))
    for problem, runs in zip(problems, times, strict=True):
        us, m = statistics.median(runs), problem.m
        working_set = max(total, machine.l3_bytes)
        p = predict(spec, Situation(place.n, place.k, m, place.threads, machine, working_set))
        gb_s = problem.weight_bytes / us / 1e3
        yield {
            "n": place.n, "k": place.k, "m": m, "threads": place.threads,
            "weights": spec.format.name, "bits": 8 * problem.weight_bytes / (place.n * place.k),
            "activations": spec.activations, "kernel": spec.name, "cached": False,
            "us": us, "spread": (max(runs) - min(runs)) / us, "gb_s": gb_s,
            "gops": 2 * place.n * place.k * m / us / 1e3, "stream_read_gb_s": stream,
            "fraction_of_stream": gb_s / stream, "roofline_us": p.roofline_us,
            "fraction_of_roofline": p.roofline_us / us, "predicted_us": p.us, "bound": p.bound,
            "peers": {},
        }  # fmt: skip


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a table for each shape and number of threads."""
    lines: list[str] = []
    places: dict[tuple[int, int, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        by_weights = places.setdefault((row["n"], row["k"], row["threads"]), {})
        by_weights.setdefault(row["weights"], {})[row["m"]] = row
    for (n, k, threads), by_weights in places.items():
        stream = statistics.median(
            r["stream_read_gb_s"] for some in by_weights.values() for r in some.values())
        lines += [
            "", f"### {n}x{k}, {threads} thread{'s' if threads > 1 else ''}", "",
            f"One stream a thread reads {stream:.1f} GB/s in the median of all turns.", "",
            "| weights | bits | activations | M=1 µs | GB/s | of one stream | "
            "M=4 GOPS | M=16 GOPS | M=128 GOPS |",
            "|---|---:|---|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, some in by_weights.items():
            first = next(iter(some.values()))
            one = some.get(1)
            cells = [name, f"{first['bits']:.2f}", first["activations"]]
            cells += [f"{one['us']:.0f}", f"{one['gb_s']:.1f}",
                      f"{one['fraction_of_stream']:.0%}"] if one else ["–"] * 3
            cells += [f"{some[m]['gops']:.0f}" if m in some else "–" for m in (4, 16, 128)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def pictures(
    table: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], folder: Path
) -> list[str]:
    """Draws bits a weight against the time of one token on all threads, with the peers of
    ``others``; the names of the pictures."""
    import matplotlib.pyplot as plt

    threads = max((r["threads"] for r in table), default=0)
    some = [r for r in table if (r["m"], r["n"], r["threads"]) == (1, FIRST, threads)]
    if not some:
        return []
    figure, axes = plt.subplots(figsize=(9, 6))
    for kind, label in (("int8", "ours, int8 activations"), ("f32", "ours, f32 activations")):
        ours = [r for r in some if r["activations"].startswith(kind)]
        axes.plot([r["bits"] for r in ours], [r["us"] for r in ours], "o", label=label)
    for r in some:
        axes.annotate(r["weights"], (r["bits"], r["us"]), fontsize=5, xytext=(2, 2),
                      textcoords="offset points")  # fmt: skip
    theirs: dict[str, list[tuple[float, float]]] = {}
    for r in others:
        if (r["m"], r["n"], r["threads"], r["cached"]) == (1, FIRST, threads, False):
            for name, peer in r["peers"].items():
                if "us" in peer:
                    theirs.setdefault(name, []).append((r["bits"], peer["us"]))
    for name, points in theirs.items():
        axes.plot([x for x, _ in points], [y for _, y in points], "x", label=name)
    stream = statistics.median(r["stream_read_gb_s"] for r in some)
    ends = [min(r["bits"] for r in some), max(r["bits"] for r in some)]
    k = some[0]["k"]
    axes.plot(ends, [b / 8 * FIRST * k / stream / 1e3 for b in ends], "-", color="black",
              linewidth=1, label="one sequential stream a thread")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("µs")
    axes.set_title(f"One token, {FIRST}x{k}, {threads} threads, weights from memory")
    axes.legend(fontsize="small")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "weights.png", dpi=120)
    plt.close(figure)
    return ["weights"]
