"""``qigen eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qigen.cli.options import (
    Count,
    artifact_argument,
    command,
    input_shapes,
    load_model,
    thread_options,
)
from qigen.cli.output import (
    print_json,
    print_table,
    progress_bars,
)
from qigen.errors import BadInput, UsageError

if TYPE_CHECKING:
    from qigen.model import Model

_NONE = (
    "perplexity_se", "reference_perplexity", "reference_perplexity_se", "log_ratio",
    "log_ratio_se", "kl_mean", "kl_mean_se", "kl_p99", "kl_p99_low", "kl_p99_high",
    "top1_agreement", "top1_agreement_se",
)  # fmt: skip


@command
@artifact_argument
@click.option(
    "--text", type=click.Path(path_type=Path), help="A text file, UTF-8, for language models."
)
@click.option("--context", type=Count, default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=Count, help="Score only so many. [default: the whole text]")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another artifact of the model: also the divergence from it.",
)
@click.option(
    "--layers",
    is_flag=True,
    help="Also the error of every layer's output, on the first chunk, beside --against.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Of an ONNX model: an .npz with an array by input, or a folder of such; without --against "
    "also with the outputs that are expected. [default: one made-up sample]",
)
@input_shapes("Open sizes of an ONNX model's made-up inputs.")
@thread_options
def eval(
    artifact: Path,
    text: Path | None,
    context: int,
    chunks: int | None,
    against: Path | None,
    layers: bool,
    samples: Path | None,
    shapes: tuple[str, ...],
    threads: int,
    pin: bool,
    as_json: bool,
) -> None:
    """Perplexity of a language model on a text, outputs of an ONNX model beside a reference's.

    Each chunk starts on an empty cache and its second half is scored; no BOS token is added.
    Figures after +- are standard errors; differences are of the same tokens.
    """
    model = load_model(artifact, threads, pin)
    if not model.is_language_model:
        if text is not None:
            model.session()  # says that it is no language model
        return _graph(artifact, against, samples, shapes, threads, as_json)
    if text is None or samples is not None or shapes:
        raise UsageError("a language model is evaluated on a --text; --samples and --shape are for "
                         "ONNX models")
    if layers and against is None:
        raise UsageError("--layers compares with another artifact; give --against")
    return _language(model, text, context, chunks, against, layers, threads, pin, as_json)


def _language(
    model: Model,
    text: Path,
    context: int,
    chunks: int | None,
    against: Path | None,
    layers: bool,
    threads: int,
    pin: bool,
    as_json: bool,
) -> None:
    import numpy as np

    from qigen.compare import layer_errors
    from qigen.evaluate import perplexity

    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", str(text)) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"the file is not UTF-8 (byte {error.start})", str(text)) from None
    reference = load_model(against, threads, pin) if against else None
    ids = model.tokenizer.encode(content, add_special=False)
    rows: list[dict[str, Any]] = []
    with progress_bars(as_json) as progress:
        result = perplexity(
            lambda: model.session(context),
            ids,
            context=context,
            chunks=chunks,
            reference_factory=(lambda: reference.session(context)) if reference else None,
            progress=lambda done, total, value: progress("evaluate", done, total),
        )
        if layers and against is not None:
            first = np.asarray(ids[:context], np.int32)[None]
            rows = layer_errors(model.path, against, first, progress)
    values: dict[str, Any] = {**dict.fromkeys(_NONE), **result}
    if as_json:
        print_json(values | ({"layers": rows} if layers else {}))
        return
    click.echo(
        f"perplexity {values['perplexity']:.4f} +- {values['perplexity_se']:.4f} over "
        f"{values['tokens']} tokens in {values['chunks']} chunks"
    )
    if reference:
        click.echo(
            f"reference {values['reference_perplexity']:.4f}; log of the ratio "
            f"{values['log_ratio']:+.5f} +- {values['log_ratio_se']:.5f}\n"
            f"divergence {values['kl_mean']:.6f} +- {values['kl_mean_se']:.6f} nats a token, 99th "
            f"percentile {values['kl_p99']:.6f} ({values['kl_p99_low']:.6f} to "
            f"{values['kl_p99_high']:.6f})\n"
            f"same best token {values['top1_agreement']:.2%} +- {values['top1_agreement_se']:.2%}"
        )
    if rows:
        print_table(
            ("layer", ">error", ">cosine", ">error of its own", ">cosine of its own"),
            ((r["layer"], f"{r['relative_error']:.5f}", f"{r['cosine']:.6f}",
              f"{r['own_relative_error']:.5f}", f"{r['own_cosine']:.6f}") for r in rows),
        )  # fmt: skip


def _graph(
    artifact: Path,
    against: Path | None,
    samples: Path | None,
    shapes: Sequence[str],
    threads: int,
    as_json: bool,
) -> None:
    from qigen.arrays import parse_shapes
    from qigen.compare import evaluate_graph

    result = evaluate_graph(artifact, against, samples, parse_shapes(shapes), threads)
    if as_json:
        print_json(result)
        return
    if result["made_up"]:
        click.echo("on one made-up sample; give --samples for figures that mean something")
    print_table(
        ("output", ">samples", ">least cosine", ">mean cosine", ">mean error", ">greatest error"),
        ((r["output"], r["samples"], f"{r['cosine_min']:.6f}", f"{r['cosine_mean']:.6f}",
          f"{r['relative_error']:.5f}", f"{r['relative_error_max']:.5f}")
         for r in result["outputs"]),
    )  # fmt: skip
