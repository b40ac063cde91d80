"""``qigen bench-kernel``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from qigen.cli.options import (
    Count,
    command,
    numbers,
)
from qigen.cli.output import (
    JsonList,
    progress_bars,
)


@command
@click.option("--shape", "shapes", multiple=True, required=True, metavar="NxK", help="Of a weight.")
@click.option("--weights", required=True, help="Names of `qigen formats`, separated by commas.")
@click.option(
    "--activations",
    type=click.Choice(["f32", "bf16", "int8", "int8-token"]),
    help="Arithmetic. [default: the planner's choice]",
)
@click.option("--isa", help="An instruction set of this machine. [default: its best]")
@click.option(
    "--m", "tokens", default="1,16,128", show_default=True, metavar="M,M", help="Tokens of a call."
)
@click.option("--threads", metavar="T,T", help="Numbers of threads. [default: usable cores]")
@click.option("--repeat", type=Count, default=7, show_default=True, help="Turns; medians count.")
@click.option("--cached", is_flag=True, help="The weights stay in the caches.")
@click.option(
    "--vs",
    default="",
    metavar="PEER[,PEER]",
    help="Take turns with llama.cpp, onnxruntime, openvino, torch.",
)
@click.option("--jobs", type=Count, help="Compilers at a time. [default: all cores]")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the table here.")
@click.option("--plots", type=click.Path(path_type=Path), help="Also draw plots in this folder.")
def bench_kernel(
    shapes: tuple[str, ...],
    weights: str,
    activations: str | None,
    isa: str | None,
    tokens: str,
    threads: str | None,
    vs: str,
    markdown: Path | None,
    plots: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure single kernels beside the roofline and peers, weights from memory.

    Every row is printed as soon as it is measured, and the file of --markdown written anew; what
    was measured stays when the command is interrupted.
    """
    from qigen import bench_kernel as benchmark
    from qigen.tune import native_machine, shapes_to_products

    machine, row = native_machine(isa)
    products = shapes_to_products(shapes, [name.strip() for name in weights.split(",")])
    peers = list(dict.fromkeys(name.strip() for name in vs.split(",") if name.strip()))
    rows: list[dict[str, Any]] = []
    with progress_bars(as_json) as progress, _printed(as_json, peers, rows) as show:
        for found in benchmark.bench_kernel(
            products,
            isa=row,
            machine=machine,
            tokens=numbers(tokens, "--m"),
            threads=numbers(threads, "--threads") if threads else (machine.cores,),
            activations=activations or "auto",
            peers=peers,
            progress=progress,
            **options,
        ):
            rows.append(found)
            show(found)
            if markdown is not None:
                state = benchmark.machine_state(machine)
                markdown.write_text(benchmark.markdown(rows, state), encoding="utf-8")
    drawn = benchmark.plots(rows, plots, machine) if plots is not None else []
    if as_json:
        return
    click.echo("\n" + benchmark.about(rows, benchmark.machine_state(machine)))
    for row_ in rows:
        for name, peer in row_["peers"].items():
            about = peer.get("unsupported") or f"{peer['version']}, {peer['setting']}"
            click.echo(
                f"{name} at {row_['weights']} {row_['n']}x{row_['k']}, M = {row_['m']}: {about}"
            )
    for path in drawn:
        click.echo(path)


@contextlib.contextmanager
def _printed(
    as_json: bool, peers: list[str], rows: list[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Prints each row when it comes: a line of the table, or an item of one list of JSON, which is
    complete even if Ctrl-C or an error ends it."""
    from qigen.bench_kernel import table_head, table_line

    if not as_json:

        def show(row: dict[str, Any]) -> None:
            if len(rows) == 1:
                click.echo("\n".join(table_head(peers)))
            click.echo(table_line(row))

        yield show
        return
    lines = JsonList()
    try:
        yield lines.add
    except BaseException:
        if rows:  # else what is printed is the error alone
            lines.close()
        raise
    lines.close()
