"""Commands that look at things: ``inspect``, ``formats``, ``targets`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qigen.cli.options import (
    artifact_argument,
    command,
)
from qigen.cli.output import (
    memory_text,
    print_json,
    print_rows,
    print_table,
    progress_bars,
    shape_text,
    size_text,
)

if TYPE_CHECKING:
    from qigen.targets import Machine


@command
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show what is in FILE: an artifact, a GGUF or ONNX file or a Hugging Face folder."""
    from qigen.describe import describe

    about = describe(file)
    if as_json:
        print_json(about)
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
    if experts := (about["config"] or {}).get("experts"):
        rows.append(("experts", f"{experts['used']} of {experts['count']}, {experts['d_ff']} wide"))
    if about["kind"] == "artifact":
        manifest = about["manifest"]
        is_graph = manifest.get("kind") == "graph"
        rows += [
            *(
                (f"isa {v['isa']}" + " (taken)" * v["taken"], f"{v['target']}: {v['why']}")
                for v in about["variants"]
            ),
            ("weights", size_text(manifest["files"]["weights.bin"]["bytes"])),
            *([("memory", memory_text(manifest))] if is_graph else _language_rows(manifest)),
            ("source", manifest["source"]["path"]),
            ("compiler", manifest["compiler"]["version"]),
        ]
    if about["kind"] == "onnx":
        rows += [
            ("producer", about["producer"]),
            ("opsets", ", ".join(f"{n or 'ai.onnx'} {v}" for n, v in about["opsets"].items())),
            ("bytes", size_text(about["bytes"])),
        ]
    print_table(("", ""), rows)
    for title in ("inputs", "outputs"):
        print_rows(title, [e | {"shape": shape_text(e["shape"])} for e in about.get(title, ())])
    operators = about.get("operators", {})
    print_rows("operators", [{"operator": name, "nodes": n} for name, n in operators.items()])
    print_table(
        ("format", ">tensors", ">weights", ">size", ">bits a weight"),
        (
            (
                name,
                total["tensors"],
                total["weights"],
                size_text(total["bytes"]),
                f"{8 * total['bytes'] / total['weights']:.3f}" if total["weights"] else "",
            )
            for name, total in about["formats"].items()
        ),
    )
    if tensors:
        print_table(
            ("tensor", "format", ">shape", ">size"),
            (
                (t["name"], t["format"], shape_text(t["shape"]), size_text(t["bytes"]))
                for t in about["tensors"]
            ),
        )


def _language_rows(manifest: dict[str, Any]) -> list[tuple[str, object]]:
    """Of a language model's artifact."""
    memory = manifest["memory"]
    return [
        ("KV cache", manifest["plan"]["kv"]),
        *((key.replace("_", " "), value) for key, value in manifest["limits"].items()),
        ("weights read a token", size_text(manifest["weights_read_per_token"])),
        ("KV cache a position", size_text(memory["kv_bytes_per_position"])),
        ("arena", size_text(memory["arena_bytes"])),
    ]


@command
def formats(as_json: bool) -> None:
    """List the weight formats."""
    from qigen.describe import formats

    rows = formats()
    if as_json:
        print_json(rows)
        return
    print_table(
        (
            "name",
            ">bits a weight",
            ">code bits",
            ">group",
            "map",
            "scale",
            "zero",
            "mask, apart",
            "--weights",
            "activations on cpu",
            "on gpu",
            "source",
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
                " ".join(row["gpu"]) or "-",
                row["source"],
            )
            for row in rows
        ),
    )


@command
@click.option("--calibrate", is_flag=True, help="Measure this machine first and keep the result.")
def targets(calibrate: bool, as_json: bool) -> None:
    """List instruction sets and machines, and this machine."""
    import dataclasses

    from qigen import targets
    from qigen.backends.cpu.isa import ISAS
    from qigen.cuda_compiler import gpu_rows

    if calibrate:
        from qigen.targets.calibrate import calibrate as measure
        from qigen.targets.calibrate import check_data_folder, save
        from qigen.targets.detect import described
        from qigen.toolchain import find_compiler

        check_data_folder()
        found = measure(described(), find_compiler().run)
        save(found)
        if doubts := found.doubts(described()):
            click.echo(f"note: {doubts}", err=True)
        targets.native.cache_clear()
    here = targets.native()
    machines = {"native": here, **targets.rows()}
    if as_json:
        print_json(
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
                "gpus": [
                    {"name": name, "description": text} for name, text in gpu_rows().items()
                ],
            }
        )
        return
    print_table(
        ("isa", "runs here", "needs"),
        (
            (isa.name, "yes" if here.has(isa.features) else "no", " ".join(isa.features))
            for isa in ISAS.values()
        ),
    )
    print_table(
        ("target", ">cores", ">GHz", ">L2", ">L3", ">read GB/s", "isa", "description"),
        (
            (
                name,
                row.cores,
                f"{row.rates[max(row.rates)].ghz:.1f}",
                size_text(row.l2_bytes),
                size_text(row.l3_bytes),
                f"{row.read_gb_s[0]:.0f}/{row.read_gb_s[-1]:.0f}",
                [isa.name for isa in ISAS.values() if row.has(isa.features)][-1],
                row.description,
            )
            for name, row in machines.items()
        ),
    )
    print_table(("GPU target", "description"), list(gpu_rows().items()))
    _print_machine(here)


def _print_machine(here: Machine) -> None:
    """What is known of this machine."""
    said = f"measured on {here.calibrated}" if here.calibrated else "from the table of machines"
    caches = " ".join(size_text(b) for b in (here.l1d_bytes, here.l2_bytes, here.l3_bytes))
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
    print_table(
        ("instructions a cycle", *(f">{name}" for name in classes), ">all vector", ">GHz"),
        (
            (f"{width} bits", *(f"{rate:.2f}" for rate in row.per_cycle.values()),
             f"{row.vector:.2f}", f"{row.ghz:.2f}")
            for width, row in sorted(here.rates.items())
        ),
    )  # fmt: skip


@command
@artifact_argument
def verify(artifact: Path, as_json: bool) -> None:
    """Check every file and tensor of an artifact against its checksum."""
    from qigen.artifact import Artifact

    opened = Artifact(artifact)
    with progress_bars(as_json) as progress:
        opened.verify(progress)
    size = opened.manifest["files"]["weights.bin"]["bytes"]
    files = len(opened.manifest["files"])
    if as_json:
        print_json(
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
        f"{artifact}: {len(opened.tensors)} tensors ({size_text(size)}) and {files} files are as "
        "they were written"
    )
