"""``qigen bench-kernel``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from qigen.cli.options import (
    Measuring,
    command,
    measuring_options,
    names,
    numbers,
    peers_option,
    repeat_option,
)
from qigen.cli.output import (
    JsonList,
    progress_bars,
)


@command
@click.option("--shape", "shapes", multiple=True, required=True, metavar="NxK", help="Of a weight.")
@click.option("--weights", required=True, help="Names of `qigen formats`, separated by commas.")
@measuring_options("Tokens of a call.", default="1,16,128", show_default=True)
@click.option("--threads", metavar="T,T", help="Numbers of threads. [default: usable cores]")
@repeat_option(7)
@click.option("--cached", is_flag=True, help="The weights stay in the caches.")
@click.option(
    "--pages",
    type=click.Choice(["small", "huge"]),
    default="small",
    show_default=True,
    help="Pages that the weights lie on, the peers' too: of 4 KiB, or of 2 MiB.",
)
@peers_option(
    "Take turns with llama.cpp, onnxruntime, openvino, original-qigen, torch, tvm, tvm-tuned."
)
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the table here.")
@click.option("--plots", type=click.Path(path_type=Path), help="Also draw plots in this folder.")
def bench_kernel(
    shapes: tuple[str, ...],
    weights: str,
    measuring: Measuring,
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
    from qigen.tune import shapes_to_products

    machine, row = measuring.machine()
    products = shapes_to_products(shapes, [name.strip() for name in weights.split(",")])
    peers = names(vs)
    rows: list[dict[str, Any]] = []
    with progress_bars(as_json) as progress, _printed(as_json, peers, rows) as show:
        for found in benchmark.bench_kernel(
            products,
            isa=row,
            machine=machine,
            tokens=measuring.tokens,
            threads=numbers(threads, "--threads") if threads else (machine.cores,),
            activations=measuring.activations or "auto",
            peers=peers,
            jobs=measuring.jobs,
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
