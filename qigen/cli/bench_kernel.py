"""``qigen bench-kernel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qigen.cli.options import (
    Count,
    command,
    numbers,
)
from qigen.cli.output import (
    print_json,
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
    "--vs", default="", metavar="PEER[,PEER]", help="Take turns with onnxruntime, openvino, torch."
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
    """Measure single kernels beside the roofline and peers, weights from memory."""
    from qigen import bench_kernel as benchmark
    from qigen.tune import native_machine, shapes_to_products

    machine, row = native_machine(isa)
    products = shapes_to_products(shapes, [name.strip() for name in weights.split(",")])
    with progress_bars(as_json) as progress:
        rows = benchmark.bench_kernel(
            products,
            isa=row,
            machine=machine,
            tokens=numbers(tokens, "--m"),
            threads=numbers(threads, "--threads") if threads else (machine.cores,),
            activations=activations or "auto",
            peers=[name.strip() for name in vs.split(",") if name.strip()],
            progress=progress,
            **options,
        )
    table = benchmark.markdown(rows, benchmark.machine_state(machine))
    if markdown is not None:
        markdown.write_text(table, encoding="utf-8")
    drawn = benchmark.plots(rows, plots, machine) if plots is not None else []
    if as_json:
        print_json(rows)
        return
    click.echo(table, nl=False)
    for row_ in rows:
        for name, peer in row_["peers"].items():
            about = peer.get("unsupported") or f"{peer['version']}, {peer['setting']}"
            click.echo(
                f"{name} at {row_['weights']} {row_['n']}x{row_['k']}, M = {row_['m']}: {about}"
            )
    for path in drawn:
        click.echo(path)
