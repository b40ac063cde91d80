"""``qigen compile``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qigen.cli.mix import print_mix
from qigen.cli.options import (
    Bytes,
    Count,
    activations_option,
    command,
    input_shapes,
    isa_option,
    jobs_option,
    names,
)
from qigen.cli.output import (
    memory_text,
    print_json,
    print_rows,
    progress_bars,
    schedule_text,
    shape_text,
    size_text,
)
from qigen.errors import UsageError

if TYPE_CHECKING:
    from qigen.artifact import Artifact

_BAR = 24  # characters of the longest bar


@command
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
@isa_option
@click.option(
    "--weights",
    default="keep",
    show_default=True,
    help="'keep' the checkpoint's own codes, a name of `qigen formats`, or 'auto': a format for "
    "each matrix that keeps the --budget.",
)
@click.option(
    "--budget",
    metavar="bits=3.5|bytes=80M|latency=5ms|kl=0.02|cosine=0.99",
    help="What --weights auto may spend or lose; several are separated by commas. kl: of a "
    "language model; cosine, error (squared): of an ONNX model's outputs.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="The formats of all matrices: what --weights auto wrote, perhaps edited.",
)
@click.option(
    "--candidates",
    help="What --weights auto chooses from: formats, separated by commas, 'keep' among them. "
    "[default: a table of fast ones]",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the trade-off of --weights auto into a picture (needs matplotlib).",
)
@activations_option(
    "f16",
    help="Arithmetic of the quantized matmuls; int8 has a scale a group, int8-token one a token, "
    "int4 and int4-token alike; all round tables of floats (nf4) to bytes; f16 is for GPUs.",
)
@click.option(
    "--kv",
    type=click.Choice(["f16", "int8", "int4", "int2"]),
    default="f16",
    show_default=True,
    help="Format of the KV cache.",
)
@click.option(
    "--max-seq",
    type=Count,
    help="Positions of a session. [default: what the model was made for, up to 4096]",
)
@click.option(
    "--max-batch", type=Count, default=8, show_default=True, help="Sessions of a batched step."
)
@click.option(
    "--tune",
    type=click.Choice(["model", "measure", "off"]),
    default="model",
    show_default=True,
    help="Kernels by the cost model and what was measured before, measured now, or by the cost "
    "model alone.",
)
@input_shapes("Sizes of an ONNX model's input: numbers, ? (open) or ..N (open up to N).")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Inputs that are typical of what the model will get: a text, or .npz of an ONNX model.",
)
@click.option(
    "--method",
    help="How weights come to a format, with options: gptq:order=act. [default: gptq with "
    "--calibration, else rtn]",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Matrices that stay as they are, by name: 'token_embd.*'.",
)
@click.option(
    "--samples",
    type=Count,
    default=128,
    show_default=True,
    help="Sequences of 512 tokens of the calibration text that are looked at.",
)
@click.option(
    "--calibration-memory",
    "memory",
    type=Bytes(),
    default="2GiB",
    show_default=True,
    help="What calibration may take.",
)
@click.option(
    "--emit",
    type=click.Choice(["library", "static", "source"]),
    default="library",
    show_default=True,
    help="A shared library, a static one, or C++ with a CMakeLists.txt.",
)
@click.option("--static", is_flag=True, help="The same as --emit static.")
@click.option(
    "--backend",
    type=click.Choice(["cpu", "llvm"]),
    default="cpu",
    show_default=True,
    help="Kernels by a C++ compiler, or by llvmlite without one.",
)
@click.option("--explain", is_flag=True, help="Show what was chosen for every matrix, and why.")
@jobs_option
@click.option(
    "--keep-sources", type=click.Path(path_type=Path), help="Also write the C++ to this folder."
)
def compile(
    model: Path,
    output: Path,
    shapes: tuple[str, ...],
    static: bool,
    candidates: str | None,
    plot: Path | None,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile MODEL, a GGUF file, a Hugging Face folder or an ONNX file, into an artifact."""
    from qigen.arrays import parse_shapes
    from qigen.compiler import compile
    from qigen.mix.curve import check_plot, save_plot

    if static:
        options["emit"] = "static"
    mixed = options["weights"] == "auto" and options["plan"] is None
    if plot is not None:
        if not mixed:
            raise UsageError("--plot is for --weights auto with a --budget; leave it out")
        check_plot(plot)
    options["curve"] = mixed and (explain or plot is not None)
    options["candidates"] = tuple(names(candidates or ""))
    start = time.perf_counter()
    shape = parse_shapes(shapes)
    with progress_bars(as_json) as progress:
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
    mix = manifest.get("mix")
    if mix is not None:
        summary["mix"] = {"plan": str(output.with_suffix(".plan.toml")), **mix}
    if plot is not None and mix is not None:
        save_plot(mix, plot, manifest["name"])
    if as_json:
        print_json(summary | (_explanation(artifact) if explain else {}))
        return
    if artifact.is_graph:
        about = f", {sum(summary['operators'].values())} operators, {memory_text(manifest)}"
    else:
        arithmetic = ", ".join(f"{fmt} with {how}" for fmt, how in summary["activations"].items())
        about = (
            f" ({arithmetic} activations), {summary['limits']['max_seq']} positions of "
            f"{summary['kv']} KV cache"
        )
    isas = [t["isa"] for t in (manifest["target"], *manifest.get("variants", ()))]
    click.echo(
        f"{output}: {summary['name']} for {' and '.join(isas)} in {seconds:.1f} s, "
        f"{size_text(summary['weight_bytes'])} of weights{about}"
    )
    for note in summary["notes"]:
        click.echo(f"note: {note}")
    if mix is not None and "expected" in mix:
        print_mix(mix, explain)
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
        explained["tiles"] = artifact.manifest["plan"].get("tiles", [])
        explained["formats"] = artifact.manifest["plan"].get("formats", [])
        explained["quantization"] = artifact.manifest["quantization"]
    return explained


def _print_graph(manifest: dict[str, Any]) -> None:
    """What a graph model became: its interface, kernels, quantization and memory."""
    interface = manifest["interface"]
    for title in ("inputs", "outputs"):
        rows = [entry | {"shape": shape_text(entry["shape"])} for entry in interface[title]]
        print_rows(title, rows)
    limits = [{"size": name, "most": most} for name, most in interface["limits"].items()]
    print_rows("limits", limits)
    print_rows("kernels", manifest["plan"]["kernels"])
    for kernel in manifest["plan"].get("tiles", []):
        how = "measured" if kernel.get("measured_us") else "predicted"
        us = kernel[f"{how}_us"]
        rule = 1 - us / kernel["rule_us"]
        gain = f", {rule:.0%} less than with the tiles of the rule" if rule > 0 else ""
        click.echo(
            f"\n{kernel['kernel']}, {kernel['nodes']} nodes: {kernel['tiles']}; {how} "
            f"{us:.1f} us in all{gain}, bound by {kernel['bound']}"
        )
        for other in kernel["runners_up"]:
            click.echo(f"  or {other['tiles']}: {other[f'{how}_us']:.1f} us; {other['reason']}")
    _print_explanation(manifest["plan"].get("formats", []))
    print_rows("quantization", manifest["quantization"])
    memory = manifest["memory"]
    row: dict[str, Any] = {"arena": "laid out for the sizes of each run"}
    if memory["planned_at"] == "compile":
        row = {
            "arena": size_text(memory["arena_bytes"]),
            "lower_bound": size_text(memory["activations_lower_bound_bytes"]),
            "most_is_live_at": memory["peak_node"],
        }
    print_rows("memory", [row | {"barriers": manifest["barriers_per_step"]}])


def _activations(kernels: list[dict[str, Any]]) -> dict[str, str]:
    """The arithmetic by format of the weights."""
    return {k["format"]: str(k["schedule"].get("activations", "f32")) for k in kernels}


def _print_explanation(kernels: list[dict[str, Any]]) -> None:
    """What was chosen for every matrix, and how the runners-up differ."""
    for kernel in kernels:
        schedule = kernel["schedule"]
        if "predicted_us" not in kernel:  # of a GPU
            click.echo(
                f"\n{kernel['format']} {kernel['n']}x{kernel['k']}, M = {kernel['m_bucket']}: "
                f"{size_text(kernel['bytes'])}\n  {kernel['name']}: {kernel['reason']}"
            )
            continue
        measured = f", measured {kernel['measured_us']:.1f} us" if kernel["measured_us"] else ""
        click.echo(
            f"\n{kernel['format']} {kernel['n']}x{kernel['k']}, M = {kernel['m_bucket']}: "
            f"predicted {kernel['predicted_us']:.1f} us{measured}, bound by {kernel['bound']}, "
            f"{size_text(kernel['predicted_bytes'])}"
        )
        click.echo(f"  {kernel['name']}: {schedule_text(schedule)}")
        _print_roofline(kernel)
        if kernel["reason"]:
            click.echo(f"  {kernel['reason']}")
        for other in kernel["runners_up"]:
            differs = {k: v for k, v in other["schedule"].items() if schedule.get(k) != v}
            bound = f", bound by {other['bound']}" if other["bound"] else ""
            why = f"; {other['reason']}" if other.get("reason") else ""
            click.echo(
                f"  or {schedule_text(differs)}: {other['predicted_us']:.1f} us{bound}{why}"
            )


def _print_roofline(kernel: dict[str, Any]) -> None:
    """What each resource of the machine has to do for a kernel, the busiest marked."""
    rows = kernel.get("resources", [])  # artifacts of older versions have none
    if not rows:
        return
    most = max(row["us"] for row in rows)
    for row in rows:
        amount = {
            "bytes": f"{size_text(row['amount'])} at {row['rate']:.0f} GB/s",
            "instructions": f"{row['amount']:.3g} instructions, {row['rate']:.3g} a cycle",
            "cycles": f"{row['amount']:.3g} cycles one after the other",
            "barriers": f"{row['amount']:.0f} barrier",
        }[row["kind"]]
        filled = round(_BAR * row["us"] / most) if most else 0
        mark = "  <- binds" if row["name"].split()[0] == kernel["bound"] else ""
        bar = "#" * filled
        click.echo(
            f"  {row['name']:<9} {amount:<38} {row['us']:>10.1f} us  {bar:<{_BAR}}{mark}".rstrip()
        )
    roofline, us = kernel["roofline_us"], kernel["measured_us"] or kernel["predicted_us"]
    click.echo(f"  roofline  {roofline:.1f} us, of which this is {roofline / us:.0%}")
