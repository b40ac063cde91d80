"""``qigen tune``, ``tune export`` and ``tune import``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qigen.cli.options import (
    Count,
    Measuring,
    Threads,
    command,
    measuring_options,
)
from qigen.cli.output import (
    print_json,
    print_table,
    progress_bars,
)
from qigen.errors import UsageError

if TYPE_CHECKING:
    from qigen.tune import Knobs, Row


@command
@click.argument("what", nargs=-1, metavar="[MODEL | OUT.qgn | export FILE | import FILE]")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NxK | NAME=1x3x640x640",
    help="A weight's shape; with an ONNX model the sizes of an input, as for `compile`.",
)
@click.option(
    "--weights",
    default="keep",
    show_default=True,
    help="'keep', or a name of `qigen formats`; several for --shape, separated by commas.",
)
@measuring_options("Numbers of tokens. [default: 1,4,16,128]")
@click.option("--threads", type=Threads, default=0, help="Threads. [default: usable cores]")
@click.option("--top", type=Count, default=8, show_default=True, help="Candidates to measure.")
@click.option("--exhaustive", is_flag=True, help="Measure all candidates.")
@click.option("--again", is_flag=True, help="Measure also what is in the database.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.01),
    default=1.5,
    show_default=True,
    help="For a product and number of tokens at most.",
)
@click.option(
    "--defaults",
    is_flag=True,
    help="With export: of this machine what comes with the package. [file: in the package]",
)
def tune(
    what: tuple[str, ...],
    shapes: tuple[str, ...],
    weights: str,
    measuring: Measuring,
    threads: int,
    defaults: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the best candidates of a model's kernels on this machine and remember them.

    What is measured is used by every later `compile` for this machine. For an artifact its threads
    and (of a language model) prefill block are measured too. `export FILE` and `import FILE` share
    the database as JSON; `export --defaults [FILE]` writes what comes with the package for this
    machine.
    """
    from qigen.arrays import parse_shapes as parse_sizes
    from qigen.artifact import Artifact
    from qigen.graph_compiler import GraphOptions, is_onnx, parse_shapes
    from qigen.planner import BUCKETS
    from qigen.tune import (
        model_products,
        shapes_to_products,
        tune_model,
        tune_products,
    )
    from qigen.tune_graph import calls_of, tune_graph, tune_graph_model

    if what[:1] in (("export",), ("import",)):
        _share(what, bool(shapes), defaults, as_json)
        return
    if defaults:
        raise UsageError("--defaults is for qigen tune export")
    path = Path(what[0]) if len(what) == 1 else None
    graph = path is not None and (
        Artifact(path).is_graph if (path / "manifest.json").is_file() else is_onnx(path)
    )
    if len(what) + (bool(shapes) and not graph) != 1:
        raise UsageError("name one model, or shapes with --shape; see qigen tune --help")
    machine, row = measuring.machine()
    start = time.perf_counter()
    if path is not None and graph:
        if measuring.tokens:
            raise UsageError("--m is for language models; sizes of an input are --shape NAME=...")
        chosen = GraphOptions(weights, measuring.activations, parse_shapes(parse_sizes(shapes)))
        with progress_bars(as_json) as progress:
            calls = calls_of(path, chosen, row, machine)
            _, rows = tune_graph(
                calls, isa=row, machine=machine, threads=threads or machine.cores,
                jobs=measuring.jobs, progress=progress, **options,
            )  # fmt: skip
            knobs = None
            if (path / "manifest.json").is_file():
                knobs = tune_graph_model(path, again=options["again"], progress=progress)
        _print(rows, knobs, time.perf_counter() - start, "runs/s", as_json)
        return
    if path is None:
        formats = ["q4_0"] if weights == "keep" else [w.strip() for w in weights.split(",")]
        products = shapes_to_products(shapes, formats)
    else:
        products = model_products(path, weights, measuring.activations)
    with progress_bars(as_json) as progress:
        _, rows = tune_products(
            products,
            isa=row,
            machine=machine,
            activations=measuring.activations or "auto",
            threads=threads or machine.cores,
            # a shape alone: weights from memory, as in a model that does not fit the caches
            working_set=machine.l3_bytes if path is None else None,
            jobs=measuring.jobs,
            progress=progress,
            buckets=measuring.tokens or BUCKETS,
            **options,
        )
        knobs = None
        if path is not None and (path / "manifest.json").is_file():
            knobs = tune_model(path, again=options["again"], progress=progress)
    _print(rows, knobs, time.perf_counter() - start, "tok/s", as_json)


def _tiles(spec: dict[str, Any]) -> str:
    """The register tiles of a kernel in words."""
    tiles = spec["tiles"]
    if isinstance(tiles, dict):  # of the gemm family
        return f"tiles={tiles['pixels']}x{16 * tiles['blocks']}, {tiles['block_bytes'] >> 10} KiB"
    return f"tiles={','.join(map(str, tiles))}"


def _print(
    rows: list[Row], knobs: Knobs | None, seconds: float, unit: str, as_json: bool
) -> None:
    """What was measured: the kernels, then the threads and prefill block of an artifact."""
    if as_json:
        import dataclasses

        print_json(
            {
                "kernels": [dataclasses.asdict(r) for r in rows],
                "model": dataclasses.asdict(knobs) if knobs else None,
                "seconds": seconds,
            }
        )
        return
    print_table(
        ("format", "shape", ">M", ">us", ">of the model's first", ">predicted us", ">spread",
         ">measured", "kernel", "schedule"),
        (
            (
                r.format, f"{r.n}x{r.k}", r.m, f"{r.best_us:.1f}",
                f"{r.best_us / r.first_us:.3f}" if r.first_us else "failed",
                f"{r.predicted_us:.1f}", f"{r.spread:.0%}", f"{r.measured} of {r.candidates}",
                r.kernel, _tiles(r.spec),
            )
            for r in rows
        ),
    )  # fmt: skip
    for failure in dict.fromkeys(f for r in rows for f in r.failures):
        click.echo(f"note: {failure}; it is never chosen", err=True)
    if knobs:
        click.echo(
            "; ".join(
                f"{name}: {value} ("
                + ", ".join(f"{v}: {rate:.1f} {unit}" for v, rate in sorted(rates.items()))
                + ")"
                for name, value, rates in (
                    ("threads", knobs.threads, knobs.decode_tok_s),
                    ("prefill block", knobs.block, knobs.prefill_tok_s),
                )
                if rates
            )
        )
        if knobs.note:
            click.echo(f"note: {knobs.note}", err=True)
    click.echo(f"{sum(r.measured for r in rows)} measurements in {seconds:.1f} s")


def _share(what: tuple[str, ...], shapes: bool, defaults: bool, as_json: bool) -> None:
    """`tune export FILE`, `tune export --defaults [FILE]` and `tune import FILE`."""
    from qigen import targets
    from qigen.tuning import Database
    from qigen.tuning.database import defaults_file, machine_key

    if shapes or (defaults and what[0] == "import"):
        raise UsageError(f"qigen tune {what[0]} takes one file and nothing else")
    if defaults and len(what) == 1:
        what = (*what, str(defaults_file(targets.native())))
    if len(what) != 2:
        raise UsageError(f"qigen tune {what[0]} takes one file and nothing else")
    with Database() as data:
        if defaults:
            count = data.export_defaults(what[1], machine_key(targets.native()))
            summary = {"file": what[1], "entries": count}
            text = f"{what[1]}: {count} measurements of this machine"
        elif what[0] == "export":
            count = data.export(what[1])
            summary = {"file": what[1], "entries": count}
            text = f"{what[1]}: {count} measurements"
        else:
            taken, total = data.import_(what[1])
            summary = {"file": what[1], "entries": total, "taken": taken}
            text = f"{taken} of {total} measurements were new"
    if as_json:
        print_json(summary)
    else:
        click.echo(text)
