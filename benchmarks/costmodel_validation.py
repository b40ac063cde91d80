"""How good the cost model's picks are: measured against the exhaustive best at many points.

    python benchmarks/costmodel_validation.py --points 300
    python benchmarks/costmodel_validation.py --points 300 --report docs/cost-model-validation.md

A point is a (shape, format, tokens, threads); at each, every schedule of the planner's space is
measured in turns (or, with --sample N, the model's first and a fixed stride through the rest).
What is fastest among many that are equal is so by luck of the draw: therefore the model's pick and
the apparent best three are measured once more, and that second time counts for the gap.
Every point is appended to a file as soon as it is done and skipped when the script is started
again, so that it can be killed at any time. It ends by itself before --minutes. Most of the time of
a first run goes into compilers, whose results are cached: --prepare does that part alone, which may
as well be done beside other work; 320 points are then measured in 8 minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qigen import targets, toolchain
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.costmodel import Situation, predict, schedules, space
from qigen.costmodel.matmul import panels, prefetch_distance, split
from qigen.formats.catalog import by_name
from qigen.paths import data_folder
from qigen.planner import activations_for, isa_candidates
from qigen.tuning.database import machine_key, spec_from_json, spec_to_json
from qigen.tuning.measure import Bench

FORMATS = ("q4_0", "s4g128", "q4_k", "q8_0", "u2g128", "q6_k", "u3g128", "iq4_nl")
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (256, 2048), (4096, 4096), (1024, 1024),
          (1536, 576), (576, 1536), (320, 960), (8192, 1024))  # fmt: skip
TOKENS = (1, 4, 16, 64)


def points(count: int, cores: int) -> list[tuple[str, int, int, int, int]]:
    """The first ``count`` of all points, spread over all of them by a fixed stride."""
    threads = sorted({1, cores})
    every = [
        (f, n, k, m, t)
        for f, (n, k), m, t in itertools.product(FORMATS, SHAPES, TOKENS, threads)
        if k % by_name(f).block == 0
    ]
    stride = next(s for s in (7, 11, 13, 17, 19, 23) if len(every) % s)
    order = [every[i * stride % len(every)] for i in range(len(every))]
    # formats stay together: their kernels are compiled once
    return sorted(order[:count], key=lambda p: FORMATS.index(p[0]))


def candidates_of(
    point: tuple[str, int, int, int, int], options: argparse.Namespace
) -> dict[MatmulSpec, float]:
    """The schedules that can be measured at a point, and their predicted microseconds. Of those
    that run the very same code for so many tokens only the first."""
    name, n, k, m, threads = point
    machine, format = targets.native(), by_name(name)
    isa = isa_candidates(machine)[0]
    # not the whole space: its prefetch distances and longest loops multiply the compilations
    tiles = {tuple(map(int, text.split("-"))) for text in options.tiles.split(",")}
    at = Situation(n, k, m, threads, machine, max(machine.l3_bytes, 1))
    found: dict[object, MatmulSpec] = {}
    for s in space(format, k, isa, activations_for(format, "auto"), machine):
        if options.exhaustive:
            found[s] = s
        elif s.tiles in tiles and s.prefetch == prefetch_distance(machine, s.streams):
            runs = tuple(split(s.tiles, m).items()), panels(s, m), s.streams if m == 1 else 0
            found.setdefault((s.layout, runs), s)
    return {s: predict(s, at).us for s in found.values()}


def sampled(us: dict[MatmulSpec, float], count: int) -> list[MatmulSpec]:
    """The schedule that the model ranks first and ``count - 1`` others at equal distances."""
    ranked = sorted(us, key=lambda s: us[s])
    if count >= len(ranked):
        return ranked
    step = (len(ranked) - 1) / max(1, count - 1)
    return list(dict.fromkeys(ranked[round(i * step)] for i in range(count)))


def known(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The points that are in the file already; a line that was cut short is left out."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                found[tuple(row["point"])] = row
            except (ValueError, KeyError, TypeError):
                continue
    return found


def measured(
    options: argparse.Namespace, rows: dict[tuple[Any, ...], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measures what is missing, a point at a time."""
    machine = targets.native()
    end = time.monotonic() + 60 * options.minutes
    with Bench(toolchain.find_compiler(), options.jobs) as bench:
        for point in points(options.points, machine.cores):
            if point in rows and "again" in rows[point]:
                continue
            if time.monotonic() > end:
                print("the time is up; start again to go on")
                return
            if point in rows:
                row = rows[point]
                row["again"] = rematch(
                    bench, point, row["candidates"], options.mib, options.seconds
                )
                yield row
                continue
            _, n, k, m, threads = point
            predicted = candidates_of(point, options)
            chosen = sampled(predicted, options.sample)
            if options.prepare:
                bench.build(chosen)
                print(f"{point}: {len(chosen)} schedules are compiled", flush=True)
                continue
            outcomes = bench.measure(
                bench.build(chosen), n, k, m, threads, options.mib << 20, options.seconds
            )
            candidates = [
                {"spec": spec_to_json(o.spec), "us": o.us, "spread": o.spread,
                 "predicted_us": predicted[o.spec]}
                for o in outcomes if o.status == "ok"
            ]  # fmt: skip
            yield {
                "point": list(point),
                "machine": machine_key(machine),
                "candidates": candidates,
                "again": rematch(bench, point, candidates, options.mib, options.seconds),
                "failed": [f"{o.spec.name}: {o.message}" for o in outcomes if o.status != "ok"],
            }  # fmt: skip


def rematch(
    bench: Bench, point: Sequence[Any], candidates: list[dict[str, Any]], mib: int, seconds: float
) -> dict[str, Any]:
    """The model's pick and the three that were fastest, measured once more."""
    _, n, k, m, threads = point
    machine = targets.native()
    specs = {spec_from_json(c["spec"]): c["us"] for c in candidates}
    any_ = next(iter(specs))
    allowed = set(schedules(any_.format, k, any_.isa, any_.activations, machine))
    at = Situation(n, k, m, threads, machine, machine.l3_bytes)
    predicted = {s: predict(s, at).us for s in specs if s in allowed}
    pick = min(predicted, key=lambda s: predicted[s])
    again = list(dict.fromkeys([pick, *sorted(specs, key=lambda s: specs[s])[:3]]))
    outcomes = bench.measure(bench.build(again), n, k, m, threads, mib << 20, seconds)
    return {
        "pick_us": outcomes[0].us,
        "best_us": min(o.us for o in outcomes if o.status == "ok"),
        "spread": max(o.spread for o in outcomes),
    }


def ranks(values: list[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    at = 0
    for _, group in itertools.groupby(order, key=values.__getitem__):
        same = list(group)
        for i in same:
            out[i] = at + (len(same) - 1) / 2
        at += len(same)
    return out


def gap(row: dict[str, Any]) -> float:
    """How much slower the model's pick is than the best, in the second measurement."""
    return float(row["again"]["pick_us"] / row["again"]["best_us"] - 1)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that are promised."""
    gaps = sorted(gap(row) for row in rows)
    everything = [c for row in rows for c in row["candidates"]]
    rho = statistics.correlation(
        ranks([c["us"] for c in everything]), ranks([c["predicted_us"] for c in everything])
    )
    within = [
        statistics.correlation(
            ranks([c["us"] for c in row["candidates"]]),
            ranks([c["predicted_us"] for c in row["candidates"]]),
        )
        for row in rows
        if len({c["us"] for c in row["candidates"]}) > 2
        and len({c["predicted_us"] for c in row["candidates"]}) > 2
    ]
    return {
        "points": len(rows),
        "measurements": len(everything),
        "gap_median": statistics.median(gaps),
        "gap_p95": gaps[min(len(gaps) - 1, int(0.95 * len(gaps)))],
        "gap_worst": gaps[-1],
        "spearman": rho,
        "spearman_within_points_median": statistics.median(within) if within else 0.0,
        "ratio_median": statistics.median(c["predicted_us"] / c["us"] for c in everything),
        "noise_median": statistics.median(c["spread"] for c in everything),
    }


def report(rows: list[dict[str, Any]], command: str) -> str:
    """Markdown: the figures, and the gaps by format and tokens."""
    s = summary(rows)
    lines = [
        "# How good the cost model's picks are", "",
        "The gap is the time of the model's pick by that of the best schedule that was measured, "
        "less one; both are measured once more for it.", "",
        f"{targets.native().description}. `{command}`", "",
        "| points | measurements | median gap | 95th percentile | worst | Spearman "
        "| within a point | predicted / measured | spread of calls |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| {s['points']:.0f} | {s['measurements']:.0f} | {s['gap_median']:.1%} "
        f"| {s['gap_p95']:.1%} | {s['gap_worst']:.1%} | {s['spearman']:.3f} "
        f"| {s['spearman_within_points_median']:.2f} | {s['ratio_median']:.2f} "
        f"| {s['noise_median']:.0%} |", "",
        "| weights | " + " | ".join(f"M={m}" for m in TOKENS) + " |",
        "|---|" + "---:|" * len(TOKENS),
    ]  # fmt: skip
    for name in FORMATS:
        cells = []
        for m in TOKENS:
            gaps = [gap(r) for r in rows if r["point"][0] == name and r["point"][3] == m]
            cells.append(f"{statistics.median(gaps):.1%}" if gaps else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured, a dot a measurement."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 6))
    for m in TOKENS:
        some = [c for r in rows if r["point"][3] == m for c in r["candidates"]]
        axes.loglog([c["us"] for c in some], [c["predicted_us"] for c in some], ".", label=f"M={m}")
    ends = [min(c["us"] for r in rows for c in r["candidates"]),
            max(c["us"] for r in rows for c in r["candidates"])]  # fmt: skip
    axes.loglog(ends, ends, "-", color="black", linewidth=1)
    axes.set_xlabel("measured µs")
    axes.set_ylabel("predicted µs")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=300)
    parser.add_argument("--sample", type=int, default=12, help="schedules of a point at most")
    parser.add_argument("--exhaustive", action="store_true", help="the whole space; takes hours")
    parser.add_argument("--tiles", default="1,2-1,3-1,4-1,6-1,8-1,12-1,8-4-1",
                        help="lists to measure")
    parser.add_argument("--seconds", type=float, default=0.4, help="of measuring a point at most")
    parser.add_argument("--mib", type=int, default=256, help="weights that rotate, all together")
    parser.add_argument("--prepare", action="store_true", help="compile, measure nothing")
    parser.add_argument("--minutes", type=float, default=14.0, help="stop after these")
    parser.add_argument("--jobs", type=int, help="compilers at a time")
    parser.add_argument("--data", type=Path, help="where points are kept [the user's data folder]")
    parser.add_argument("--report", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--plot", type=Path, help="draw predicted against measured to this PNG")
    options = parser.parse_args()
    if options.exhaustive:
        options.sample = 1 << 30
    path = options.data or data_folder() / "costmodel_validation.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        p: r for p, r in known(path).items() if r["machine"] == machine_key(targets.native())
    }
    with path.open("a", encoding="utf-8") as stream:
        for row in measured(options, rows):
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            rows[tuple(row["point"])] = row
            print(f"{len(rows)}/{options.points} {row['point']}: gap {gap(row):.1%} "
                  f"of {len(row['candidates'])} {row['failed'] or ''}", flush=True)  # fmt: skip
    wanted = points(options.points, targets.native().cores)
    found = [rows[p] for p in wanted if p in rows and rows[p]["candidates"]]
    if len(found) < 2:
        print("too few points for a summary")
        return
    print(json.dumps(summary(found), indent=1))
    if options.report:
        command = f"python benchmarks/costmodel_validation.py --points {options.points}"
        text = report(found, command)
        if options.plot:
            text += f"\n![Predicted against measured]({options.plot.name})\n"
        options.report.write_text(text, encoding="utf-8")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
