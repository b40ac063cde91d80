"""Our kernels beside their peers on this machine, as a page with plots, in one command.

    python benchmarks/report.py                     # docs/kernels.md, .json and docs/kernels/*.png
    python benchmarks/report.py --minutes 3 --output /tmp/kernels.md --vs onnxruntime
    python benchmarks/report.py --compile           # only the kernels of the table of all rows

Every row goes to OUTPUT.jsonl as soon as it is measured. Started again on the same machine the
script skips what is there (--again: nothing), so that it can be killed at any time. It ends by
itself after --minutes; what was not measured then is named on the page. Points come in the order of
their weight: decoding beside the peers first, then every row of the format table (two shapes, 1 to
128 tokens, all threads and one), then the rest. Kernels are compiled once, and kept. A machine that
does other work gives a page that means nothing: the load average is on it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sweep

from qigen import toolchain
from qigen.backends.base import Isa
from qigen.bench_kernel import (
    Point,
    about,
    bench_points,
    check_peers,
    machine_state,
    plots,
    table_head,
    table_line,
)
from qigen.kernel_peers import PEERS
from qigen.planner import Product
from qigen.targets import Machine
from qigen.tune import native_machine, shapes_to_products
from qigen.tuning.database import machine_key
from qigen.tuning.measure import Bench

SHARED = ("q4_0", "s4g128")  # formats that peers have
BITS = ("tq2_0", "u2g128", "u3g128", "q4_k", "iq4_nl", "q5_k", "q6_k", "q8_0")
CACHED = ("u2g128", "q4_0")
TOKENS = (1, 4, 16, 128, 512)
SHAPE = "4096x4096"
SHAPES = ("4096x4096", "11008x4096")  # of the table of all rows
OUTPUT = Path(__file__).parents[1] / "docs" / "kernels.md"

SECTIONS = (
    ("Decoding, weights from memory", "One token; `of read bandwidth` is by what the same turns "
     "read of the same weights, one sequential stream a thread.",
     lambda row: row["m"] == 1 and not row["cached"]),
    ("Small batches and prompts", "More tokens; GOPS count a multiplication and an addition.",
     lambda row: row["m"] > 1 and not row["cached"]),
    ("Decoding, weights in the caches", "One token; what the kernel can do if the memory is no "
     "limit. A smaller matrix where the last cache holds no larger one.",
     lambda row: row["cached"]),
)  # fmt: skip
PLOTS = {
    "roofline": "Roofline", "bits": "Time against bits", "bandwidth": "Share of bandwidth",
    "predicted": "Predicted against measured", "weights": "Bits a weight against time",
}  # fmt: skip


def points(shape: str, cores: int, peers: Sequence[str], l3_bytes: int) -> list[Point]:
    """What is measured, the most telling first."""
    everyone = sorted({1, cores}, reverse=True)

    def of(names: Iterable[str], shape: str = shape) -> list[Product]:
        return [p for name in names for p in shapes_to_products([shape], [name])]

    found = [Point(p, 1, t, peers=tuple(peers)) for t in everyone for p in of(SHARED)]
    found += [Point(p, 1, cores) for p in of(BITS)]
    found += [Point(p, m, cores, peers=tuple(peers)) for m in TOKENS[1:] for p in of(SHARED)]
    # the weights must fit: in a virtual machine the last cache is shared with others
    n, k = (int(size) for size in shape.split("x"))
    while n * k > l3_bytes // 2 and n > 64:
        n //= 2
    found += [Point(p, 1, t, cached=True) for p in of(CACHED, f"{n}x{k}") for t in everyone]
    return found


def identity(point: Point) -> tuple[object, ...]:
    """What a row must have in common with a point to be its."""
    p = point.product
    return p.format.name, p.n, p.k, point.m, point.threads, point.cached, sorted(point.peers)


def stored(path: Path, machine: str) -> Iterator[dict[str, Any]]:
    """The rows of a file that were measured on this machine; a line that was cut short is not."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            if row["machine"] == machine:
                yield row
        except (ValueError, KeyError, TypeError):
            continue


def measured(
    wanted: Sequence[Point], file: Path, isa: Isa, machine: Machine, minutes: float, repeat: int
) -> Iterator[dict[str, Any]]:
    """The rows of the points, those of the file first; the time ends it."""
    key, end = machine_key(machine), time.monotonic() + 60 * minutes
    known = {json.dumps(row["point"]): row for row in stored(file, key)}
    missing = []
    for point in wanted:
        row = known.get(json.dumps(identity(point)))
        if row is None:
            missing.append(point)
        else:
            yield row
    rows = bench_points(missing, isa=isa, machine=machine, repeat=repeat) if missing else iter(())
    for point, row in zip(missing, rows, strict=True):
        row |= {"point": identity(point), "machine": key}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        yield row
        if time.monotonic() > end:
            return


def every_row(
    file: Path, isa: Isa, machine: Machine, shapes: Sequence[str], only: Sequence[str],
    end: float, compile_only: bool = False,
) -> Iterator[dict[str, Any]]:
    """The rows of the table of all formats, those of the file first; until the time ``end``."""
    key = machine_key(machine)
    known = list(stored(file, key))
    yield from known
    sizes = [tuple(map(int, shape.split("x"))) for shape in shapes]
    places = [sweep.Place(n, k, t) for t in sorted({1, machine.cores}, reverse=True)
              for n, k in sizes]  # fmt: skip
    with Bench(toolchain.find_compiler()) as bench:
        specs = sweep.kernels(isa, machine, places[0].k)
        specs = {name: spec for name, spec in specs.items() if not only or name in only}
        bench.build(list(specs.values()))
        if compile_only:
            return
        found = {sweep.identity(row) for row in known}
        for row in sweep.sweep(bench, machine, specs, places, found, end):
            row["machine"] = key
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            yield row


def page(
    rows: Sequence[dict[str, Any]], missing: Sequence[Point], machine: Machine,
    drawn: Sequence[str], table: Sequence[dict[str, Any]] = (),
) -> str:
    """The page, whose plots lie in a folder of its name beside it."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    lines = [
        "# Kernels and their peers",
        "",
        f"Measured {date} by `python benchmarks/report.py`: {about(rows, machine_state(machine))}.",
        "",
        "Every side runs in a process of its own, with as many threads, and they take turns; times "
        "are medians. Peers have the fastest of their settings; a ratio is their time by ours, so "
        "more than 1 is ours ahead. Ours leaves out the rounding of activations, the peers' "
        "include it. – means that a peer has no such format. [tuning.md](tuning.md) says more.",
    ]  # fmt: skip
    for title, text, own in SECTIONS:
        some = [row for row in rows if own(row)]
        if not some:
            continue
        peers = list(dict.fromkeys(name for row in some for name in row["peers"]))
        lines += ["", f"## {title}", "", text, "", *table_head(peers)]
        for row in some:
            missed = {name: {} for name in peers if name not in row["peers"]}
            lines.append(table_line({**row, "peers": {**row["peers"], **missed}}))
    if table:
        lines += [
            "", "## Every row of the format table", "",
            "Weights from memory; kernels have the tiles of one row's plan and are not tuned. Rows "
            "of the same family differ in numbers only; `qigen formats` lists all of them.",
            *sweep.tables(table),
        ]  # fmt: skip
    settings = sorted({
        f"{name}: {peer['setting']} for M = {row['m']}, {row['weights']}"
        for row in rows for name, peer in row["peers"].items() if "setting" in peer
    })  # fmt: skip
    if settings:
        lines += ["", "## Settings of the peers that were fastest", ""]
        lines += [f"- {setting}" for setting in settings]
    if missing:
        names = ", ".join(f"{p.product.format.name} M={p.m}" for p in missing)
        lines += ["", f"Not measured, the time was up: {names}."]
    if drawn:
        lines += ["", "## Plots"]
        lines += ["", *(f"![{PLOTS[name]}](kernels/{name}.png)\n" for name in drawn)]
    return "\n".join(lines).rstrip() + "\n"


def lined(summary: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    def value(one: Any) -> str:
        if isinstance(one, list):
            return "[\n" + ",\n".join(map(json.dumps, one)) + "\n]"
        return json.dumps(one)

    return "{" + ",\n".join(f"{json.dumps(k)}: {value(v)}" for k, v in summary.items()) + "}\n"


def report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures and writes everything; the rows."""
    machine, isa = native_machine(options.isa)
    peers = options.vs.replace("none", "").split(",") if options.vs else [
        name for name, row in PEERS.items() if importlib.util.find_spec(row.module)
    ]  # fmt: skip
    peers = [name for name in peers if name]
    check_peers(peers)
    output, lines = options.output, options.output.with_suffix(".jsonl")
    folder = output.parent / "kernels"
    output.parent.mkdir(parents=True, exist_ok=True)
    if options.again:
        lines.unlink(missing_ok=True)
    wanted = points(options.shape, options.threads or machine.cores, peers, machine.l3_bytes)
    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    swept = output.with_suffix(".rows.jsonl")
    if options.again:
        swept.unlink(missing_ok=True)
    end = time.monotonic() + 60 * options.minutes
    only = options.rows.split(",") if options.rows else []
    shapes = options.shapes.split(",")
    if options.compile:
        list(every_row(swept, isa, machine, shapes, only, end, compile_only=True))
        return []

    def take(points: Sequence[Point]) -> None:
        left = (end - time.monotonic()) / 60
        for row in measured(points, lines, isa, machine, left, options.repeat):
            rows.append(row)
            if len(rows) == 1:
                print("\n".join(table_head(peers)))
            print(table_line(row), flush=True)

    try:
        # decoding beside the peers, all rows, the rest
        take([p for p in wanted if p.peers and p.m == 1 and p.threads > 1])
        for row in every_row(swept, isa, machine, shapes, only, end):
            table.append(row)
            if row["m"] == 1:
                where = f"{row['n']}x{row['k']} {row['threads']}T"
                share = f"{row['us']:8.1f} us {row['fraction_of_stream']:5.0%}"
                print(f"{row['weights']:18} {where} {share}", flush=True)
        done = {json.dumps(row["point"]) for row in rows}
        take([p for p in wanted if json.dumps(identity(p)) not in done])
    finally:  # Ctrl-C, too
        if rows or table:
            drawn = []
            if importlib.util.find_spec("matplotlib"):
                one = [r for r in table if r["m"] == 1 and r["n"] == sweep.FIRST]
                drawn = [path.stem for path in plots(rows + one, folder, machine)]
                drawn += sweep.pictures(table, rows, folder)
            done = {json.dumps(row["point"]) for row in rows}
            missing = [p for p in wanted if json.dumps(identity(p)) not in done]
            output.write_text(page(rows, missing, machine, drawn, table), encoding="utf-8")
            summary = {"machine": machine_state(machine), "kernels": rows, "rows": table}
            output.with_suffix(".json").write_text(lined(summary), encoding="utf-8")
            print(f"{output}: {len(rows)} of {len(wanted)} points")
    if len(rows) == len(wanted):
        lines.unlink(missing_ok=True)  # all of it is in the .json
        swept.unlink(missing_ok=True)
    return rows


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the page [docs/kernels.md]")
    parser.add_argument("--minutes", type=float, default=8, help="stop after so long [8]")
    parser.add_argument("--vs", default="", help="peers, comma-separated, or none [the installed]")
    parser.add_argument("--shape", default=SHAPE, help=f"NxK [{SHAPE}]")
    parser.add_argument("--threads", type=int, default=0, help="the most [usable cores]")
    parser.add_argument("--repeat", type=int, default=7, help="turns [7]")
    parser.add_argument("--shapes", default=",".join(SHAPES),
                        help=f"of the table of all rows [{','.join(SHAPES)}]")  # fmt: skip
    parser.add_argument("--rows", default="", help="formats of that table [the representative]")
    parser.add_argument("--compile", action="store_true", help="only compile its kernels")
    parser.add_argument("--isa", help="an instruction set [the best]")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    report(parser.parse_args())


if __name__ == "__main__":
    main()
