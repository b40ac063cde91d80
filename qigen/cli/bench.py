"""``qigen bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qigen.cli.options import (
    Count,
    artifact_argument,
    command,
    input_shapes,
    names,
    peers_option,
    repeat_option,
    thread_options,
)
from qigen.cli.output import (
    print_json,
    print_table,
    progress_bars,
    schedule_text,
    shape_text,
    size_text,
)
from qigen.errors import UsageError

_LANGUAGE_OPTIONS = ("prefill", "decode", "context", "batch")
_GRAPH_OPTIONS = ("inputs", "shapes", "peer_precision")


@command
@artifact_argument
@click.option("--prefill", type=Count, help="Tokens of a prompt. [default: 512]")
@click.option("--decode", type=Count, help="Tokens one by one. [default: 64]")
@click.option(
    "--context",
    type=click.IntRange(min=0),
    help="Tokens in the cache when the decode begins. [default: 0]",
)
@click.option("--batch", type=Count, help="Sequences a decode step. [default: 1]")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="An input of an ONNX model. [default: random numbers; ones where integers are wanted]",
)
@input_shapes("Sizes of an input that the artifact leaves open.")
@repeat_option(5)
@peers_option(
    "Take turns with: llama.cpp; for an ONNX model onnxruntime, openvino, tvm, tvm-tuned"
)
@click.option(
    "--peer-model",
    "--source",
    type=click.Path(path_type=Path),
    help="The peers' file. [default: what the artifact was made of]",
)
@click.option(
    "--peer-precision",
    type=click.Choice(["f32", "bf16", "int8"]),
    help="Arithmetic of the peers of an ONNX model. [default: f32]",
)
@thread_options
def bench(artifact: Path, vs: str, as_json: bool, **options: Any) -> None:
    """Measure how fast an artifact is, beside peers.

    Of a language model tokens a second, beside the memory's read bandwidth; of an ONNX model the
    time of a run.
    """
    from qigen.arrays import parse_files, parse_shapes
    from qigen.artifact import Artifact

    peers = names(vs)
    is_graph = Artifact(artifact).is_graph
    kind = "a language model" if is_graph else "an ONNX model"
    for option in _LANGUAGE_OPTIONS if is_graph else _GRAPH_OPTIONS:
        if options[option] in (None, ()):
            del options[option]
        else:
            name = option.rstrip("s") if option in ("inputs", "shapes") else option
            raise UsageError(f"--{name.replace('_', '-')} is for benchmarks of {kind}")
    options = {name: value for name, value in options.items() if value is not None}
    if is_graph:
        options["inputs"] = parse_files(options["inputs"])
        options["shapes"] = parse_shapes(options["shapes"])
        _bench_graph(artifact, peers, as_json, options)
    else:
        _bench_language_model(artifact, peers, as_json, options)


def _bench_graph(artifact: Path, peers: list[str], as_json: bool, options: dict[str, Any]) -> None:
    from qigen.bench_graph import bench_graph

    with progress_bars(as_json) as progress:
        result = bench_graph(artifact, peers=peers, progress=progress, **options)
    if as_json:
        print_json(result)
        return
    sides = {"qigen": result, **result["peers"]}
    print_table(
        ("", "precision", ">ms", ">fastest", ">slowest", ">ours/theirs", ">peak memory", ">load ms",
         ">largest difference"),
        (
            (
                name,
                side["precision"],
                f"{side['latency_ms']:.3f}",
                f"{min(side['runs']):.3f}",
                f"{max(side['runs']):.3f}",
                f"{side['ratio']:.2f}" if "ratio" in side else "",
                size_text(side["peak_rss_bytes"]),
                f"{side['load_s'] * 1e3:.0f}",
                f"{side['max_difference']:.2g}" if side.get("max_difference") is not None else "",
            )
            for name, side in sides.items()
        ),
    )  # fmt: skip
    click.echo(
        f"{result['model']} ({result['isa']}), {result['threads']} threads, "
        + ", ".join(f"{i['name']} {shape_text(i['shape'])}" for i in result["inputs"])
        + f"; {len(result['runs'])} turns of {result['runs_a_turn']} runs, ratios of speeds; "
        f"load average {result['machine']['load_average'][0]:.1f}"
    )
    _note_load(result)


def _note_load(result: dict[str, Any]) -> None:
    machine = result["machine"]
    if machine["load_average"][0] > machine["cores"] + result["threads"]:
        click.echo("note: other programs are running, so neither figures nor ratios are reliable")


def _bench_language_model(
    artifact: Path, peers: list[str], as_json: bool, options: dict[str, Any]
) -> None:
    from qigen.bench import PHASES, bench

    with progress_bars(as_json) as progress:
        result = bench(artifact, peers=peers, progress=progress, **options)
    if as_json:
        print_json(result)
        return
    sides = {"qigen": result, **result["peers"]}
    print_table(
        (
            "", *(f">{phase} tok/s" for phase in PHASES), ">GB/s", ">of read bandwidth",
            ">peak memory", ">load ms", ">first token ms",
            *(f">ours/theirs {phase}" for phase in (*PHASES, "first token")),
        ),
        (
            (
                name,
                *(f"{side[phase]['tok_s']:.1f}" for phase in PHASES),
                f"{side['decode']['gb_s']:.1f}",
                f"{side['decode']['fraction_of_stream']:.0%}",
                size_text(side["peak_rss_bytes"]),
                f"{side['load_s'] * 1e3:.0f}",
                f"{side['first_token_s'] * 1e3:.0f}",
                *(
                    f"{side['ratio'][phase]:.2f}" if "ratio" in side else ""
                    for phase in (*PHASES, "first_token")
                ),
            )
            for name, side in sides.items()
        ),
    )  # fmt: skip
    click.echo(
        f"{result['model']} ({result['isa']}), {result['threads']} threads, prefill of "
        f"{result['prefill']['tokens']} and decode of {result['decode']['tokens']} tokens, "
        f"first token after a prompt as long, {size_text(result['weight_bytes'])} of weights a "
        "token; memory reads "
        f"{result['stream_read_gb_s']:.1f} GB/s; load average "
        f"{result['machine']['load_average'][0]:.1f}"
    )
    _note_load(result)
    for name, side in result["peers"].items():
        for phase in PHASES:
            click.echo(f"{name} {phase}: {schedule_text(side[phase]['settings'])}")
