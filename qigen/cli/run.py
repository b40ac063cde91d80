"""``qigen run``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from qigen.cli.options import (
    artifact_argument,
    command,
    load_model,
    thread_options,
)
from qigen.cli.output import (
    print_json,
)
from qigen.errors import UsageError


@command
@artifact_argument
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An array.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder for the results, NAME.npy each.",
)
@thread_options
def run(
    artifact: Path,
    inputs: tuple[str, ...],
    output: Path,
    threads: int,
    pin: bool,
    as_json: bool,
) -> None:
    """Run the model once on arrays in .npy files.

    Results are written all or none; characters that are unfit for a file's name become _.
    """
    from qigen.arrays import parse_files, read_inputs, write_arrays

    files = parse_files(inputs)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    model = load_model(artifact, threads, pin)
    arrays = read_inputs(files, model.inputs)
    start = time.perf_counter()
    results = model.run(arrays)
    seconds = time.perf_counter() - start
    written = write_arrays(output, results)

    def about(files: dict[str, Path], arrays: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"name": n, "file": str(files[n]), "dtype": str(a.dtype), "shape": list(a.shape)}
            for n, a in arrays.items()
        ]

    outputs = about(written, results)
    if as_json:
        print_json(
            {
                "artifact": str(artifact),
                "threads": model.info["threads"],
                "run_s": seconds,
                "inputs": about(files, arrays),
                "outputs": outputs,
            }
        )
        return
    for row in outputs:
        click.echo(f"{row['file']}: {row['name']}, {row['dtype']}{row['shape']}")
