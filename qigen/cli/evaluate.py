"""``qigen eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qigen.cli.options import (
    Count,
    artifact_argument,
    command,
    load_model,
    thread_options,
)
from qigen.cli.output import (
    print_json,
    progress_bars,
)
from qigen.errors import BadInput


@command
@artifact_argument
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A text file, UTF-8.")
@click.option("--context", type=Count, default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=Count, help="Score only so many. [default: the whole text]")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another artifact of the model: also the divergence from it.",
)
@thread_options
def eval(
    artifact: Path,
    text: Path,
    context: int,
    chunks: int | None,
    against: Path | None,
    threads: int,
    pin: bool,
    as_json: bool,
) -> None:
    """Perplexity of a language model on a text.

    Each chunk starts on an empty cache and its second half is scored; no BOS token is added.
    """
    from qigen.evaluate import perplexity

    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", str(text)) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"the file is not UTF-8 (byte {error.start})", str(text)) from None
    model = load_model(artifact, threads, pin)
    reference = load_model(against, threads, pin) if against else None
    with progress_bars(as_json) as progress:
        result = perplexity(
            lambda: model.session(context),
            model.tokenizer.encode(content, add_special=False),
            context=context,
            chunks=chunks,
            reference_factory=(lambda: reference.session(context)) if reference else None,
            progress=lambda done, total, value: progress("evaluate", done, total),
        )
    values: dict[str, Any] = {"kl_mean": None, "kl_p99": None, "top1_agreement": None, **result}
    if as_json:
        print_json(values)
        return
    click.echo(
        f"perplexity {values['perplexity']:.4f} over {values['tokens']} tokens in "
        f"{values['chunks']} chunks"
    )
    if reference:
        click.echo(
            f"reference {values['reference_perplexity']:.4f}, divergence {values['kl_mean']:.6f} "
            f"nats a token (99th percentile {values['kl_p99']:.6f}), same best token "
            f"{values['top1_agreement']:.2%}"
        )
