"""From an ONNX file to an artifact: import -> passes -> lower -> render -> compile -> manifest."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from qigen import _runtime, build, targets, toolchain
from qigen.artifact import (
    ABI_VERSION,
    MANIFEST_VERSION,
    Artifact,
    TensorUnion,
    describe_tensors,
    write_header,
    write_weights,
)
from qigen.backends.base import Isa
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.build import Progress, check_output, staging_folder
from qigen.calibration import GraphRounder, Rounding, read_samples, with_static_codes
from qigen.codegen.graph import GraphProgram, lower_graph
from qigen.codegen.graph_kernels import GraphKernels, packed_formats, with_rows
from qigen.codegen.render import render
from qigen.errors import Unsupported, UsageError
from qigen.formats.layout import Layout
from qigen.frontends.onnx import import_model, read_model
from qigen.frontends.onnx.dimensions import Size
from qigen.frontends.onnx.reader import checksum, opsets
from qigen.graph_tiles import GraphCalls, GraphMeasured, graph_calls, plan_tiles
from qigen.ir.dims import Sym
from qigen.ir.graph import Array, Graph
from qigen.ir.plan import KernelChoice
from qigen.ir.verify import verify
from qigen.mix import Budget, WeightPlan, Wishes, choose_graph
from qigen.mix.candidates import KEEP
from qigen.mix.graphs import matrices_of_graph
from qigen.passes.tensor import before_products, optimize_graph
from qigen.paths import resource_folder
from qigen.planner import plan_products, shared_product_layouts
from qigen.quantize.model import MEMORY, SAMPLES

Measure: TypeAlias = Callable[[GraphCalls, Progress], tuple[GraphMeasured, str]]
"""Finds what was measured of the kernels of a graph, or measures it; with a note for the user."""

SHORT_FORMATS = {"int8": "s8g32", "int4": "u4g32"}
"""Short names of formats."""


@dataclass(frozen=True)
class GraphOptions:
    """What a user may ask of the compilation of a graph model."""

    weights: str = "keep"
    activations: str | None = None
    shapes: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    calibration: Path | None = None
    method: str | None = None
    keep: tuple[str, ...] = ()
    samples: int = SAMPLES
    memory: int = MEMORY
    budget: str | None = None
    plan: Path | None = None
    candidates: tuple[str, ...] = ()
    curve: bool = False
    by_matrix: Mapping[str, tuple[str, str]] | None = None

    @property
    def static(self) -> bool:
        """Whether the calibration is for activations, which are then int8 by scales of the model;
        else it is for weights."""
        return self.calibration is not None and self.activations == "int8"


def is_onnx(path: Path) -> bool:
    """Whether a path names an ONNX file (by its ending: a protobuf has no magic)."""
    return path.suffix == ".onnx" or path.name.endswith(".onnx.pb")


def parse_shapes(shapes: Mapping[str, Sequence[int | str]]) -> dict[str, tuple[Size, ...]]:
    """Dimensions as the user gives them: a number, ``?`` (open) or ``..N`` (open up to N)."""
    result: dict[str, tuple[Size, ...]] = {}
    for name, sizes in shapes.items():
        parsed = []
        for size in sizes:
            text = str(size)
            limit = text.removeprefix("..")
            if text == "?":
                parsed.append(Size("?"))
            elif text.isdecimal():
                parsed.append(Size(int(text)))
            elif text.startswith("..") and limit.isdecimal() and int(limit) > 0:
                parsed.append(Size("?", int(limit)))
            else:
                raise UsageError(
                    f"{text} in the shape of {name} is no size; give a number, ? or ..LIMIT"
                )
        result[name] = tuple(parsed)
    return result


def compile_graph(
    path: Path,
    out: Path,
    *,
    pairs: Sequence[tuple[targets.Machine, Isa]],
    options: GraphOptions,
    jobs: int,
    keep_sources: Path | None = None,
    form: str = "library",
    progress: Progress | None = None,
    model: onnx.ModelProto | None = None,
    measure: Measure | None = None,
) -> Artifact:
    """Compile an ONNX model (the file at ``path``, or ``model``) into the folder ``out``.

    ``pairs`` are the machines that it is for, each with its ISA row, the fastest first. What
    ``measure`` finds counts before the predictions of the cost model.
    """
    report = progress or (lambda stage, done, total: None)
    check_output(out)
    if options.weights == "auto" and options.activations not in (None, "f32"):
        raise Unsupported("formats are chosen for matrices with float inputs; leave --activations "
                          f"{options.activations} out")
    build.find_compiler(pairs[0][0], form)
    report("read", 0, 1)
    source = read_model(path) if model is None else model
    graph = import_model(source, str(path), options.shapes)
    verify(graph)
    about = {
        "path": str(path.resolve()),
        "container": "onnx",
        "producer": f"{source.producer_name} {source.producer_version}".strip(),
        "opsets": opsets(source),
        "licence": None,
        "sha256": checksum(source),
    }
    if options.weights == "keep" and not options.static and (
        options.calibration is not None or options.method is not None or options.keep
    ):
        raise UsageError(
            "--calibration is for --activations int8 or --weights FORMAT, --method and --keep are "
            "for --weights FORMAT; give one of these"
        )
    if options.static:
        if options.method is not None or options.keep:
            raise UsageError("--method and --keep are not for --activations int8 with a "
                             "--calibration; leave them out")
        assert options.calibration is not None
        here = targets.native()
        runs = next((pair for pair in pairs if here.has(pair[1].features)), pairs[0])
        observed = functools.partial(_observed, pairs=[runs], jobs=jobs)
        samples = read_samples(options.calibration, graph)
        graph = with_static_codes(graph, samples, observed, report)
        # what is left stays float
        options = dataclasses.replace(options, activations=None, calibration=None)
    options, plan = _mixed(graph, about, options, pairs[0], report)
    build_artifact(graph, about, out, pairs, options, jobs, keep_sources, report, form, measure)
    if plan is not None:
        plan.write_beside(out, options.plan)
    return Artifact(out)


def optimized(path: Path, options: GraphOptions) -> Graph:
    """The graph of an ONNX file as its kernels are chosen for."""
    source = read_model(path)
    graph = import_model(source, str(path), options.shapes)
    verify(graph)
    about = {"sha256": checksum(source)}
    rounder = _rounder(graph, about, options, lambda stage, done, total: None)
    return optimize_graph(graph, options.activations, rounder)


def _mixed(
    graph: Graph,
    about: Mapping[str, Any],
    options: GraphOptions,
    pair: tuple[targets.Machine, Isa],
    report: Progress,
) -> tuple[GraphOptions, WeightPlan | None]:
    """The options with a format for every matrix, and the plan that says so, if there is to be
    one. What the manifest has of it goes into the graph."""
    if options.weights != "auto":
        return options, None
    calibrated, (machine, isa) = options.calibration is not None, pair
    default = "gptq" if calibrated else "rtn"
    name, sha256 = Path(str(about["path"])).stem, str(about["sha256"])
    if options.plan is not None:
        plan = WeightPlan.read(options.plan)
        matrices = matrices_of_graph(before_products(graph), {})
        plan.check(matrices, name, sha256, str(options.plan), calibrated)
        graph.meta["mix"] = {"budget": plan.budget}
    else:
        wishes = Wishes(Budget.parse(options.budget) if options.budget else Budget(),
                        options.method or default, options.candidates, options.keep, options.curve)
        samples = []
        if options.calibration is not None:
            samples = read_samples(options.calibration, graph, outputs=True)[: options.samples]
        choice = choose_graph(
            graph, wishes, samples, model=name, sha256=sha256, isa=isa, machine=machine,
            threads=machine.cores, memory=options.memory,
            cache=toolchain.cache_folder() / "sensitivity", report=report,
        )  # fmt: skip
        plan = choice.plan
        graph.meta["mix"] = choice.to_json()
    hows = {n: (m.format, m.method or default) for n, m in plan.matrices.items()
            if m.format != KEEP}
    return dataclasses.replace(options, by_matrix=hows), plan


def _observed(
    graph: Graph,
    samples: Sequence[Mapping[str, Array]],
    *,
    pairs: Sequence[tuple[targets.Machine, Isa]],
    jobs: int,
) -> Iterator[dict[str, Array]]:
    """The outputs of a float graph for each sample, by its own compiled artifact."""
    with tempfile.TemporaryDirectory(prefix="qigen-") as name:
        out = Path(name) / "observed"
        build_artifact(graph, {"notes": []}, out, pairs, GraphOptions(), jobs)
        model = _runtime.Model(str(out))
        for sample in samples:
            yield model.run(sample)


def build_artifact(
    graph: Graph,
    about: Mapping[str, Any],
    out: Path,
    pairs: Sequence[tuple[targets.Machine, Isa]],
    options: GraphOptions,
    jobs: int,
    keep_sources: Path | None = None,
    report: Progress = lambda stage, done, total: None,
    form: str = "library",
    measure: Measure | None = None,
) -> None:
    """Optimize, lower and compile an imported graph; ``about`` is its source for the manifest."""
    machine = pairs[0][0]
    compiler = build.find_compiler(machine, form)
    rounder = _rounder(graph, about, options, report)
    graph = optimize_graph(graph, options.activations, rounder)
    if rounder is not None:
        graph.meta["quantization"] = [*graph.meta.get("quantization", []), *rounder.outcomes]
    notes = list(graph.meta.get("notes", ()))
    measured = GraphMeasured()
    if measure is not None:
        calls = graph_calls(graph, pairs[0][1], machine, options.activations)
        measured, note = measure(calls, report)
        notes += [note] if note else []
    variants = _variants(graph, pairs, options.activations, measured)
    first = variants[0]
    program, tensors = first.program, variants[-1].program.tensors
    report("read", 1, 1)
    with staging_folder(out) as staging, build.open_cache(form, compiler, jobs) as cache:
        runtime = build.runtime_units()
        parts = [_kernel_units(variant, len(variants) == 1) for variant in variants]
        total = len(runtime) + sum(len(units) + 1 for _, units, _ in parts)
        compiled: list[str] = []

        def done(name: str) -> None:
            compiled.append(name)
            report("compile", len(compiled), total)

        futures = [cache.compile(unit, done) for unit in runtime]
        futures += [cache.compile(unit, done) for _, units, _ in parts for unit in units]
        with (staging / "weights.bin").open("wb") as stream:
            hashes = write_weights(stream, tensors, graph.constants, report)
            uid = _uid([variant.program for variant in variants], hashes)
            write_header(stream, program.weights_bytes, uid)
        for variant, (headers, units, flags) in zip(variants, parts, strict=True):
            variant.program.uid = uid
            unit = _model_unit(variant, headers, flags)
            futures.append(cache.compile(unit, done))
            if keep_sources is not None:
                alone = len(variants) == 1
                folder = keep_sources if alone else keep_sources / variant.isa.name
                build.write_sources(folder, {**headers, **unit.headers}, [*units, unit])
        report("link", 0, 1)
        build.link(compiler, cache, futures, staging, machine.system, form)
        build.write_interface(staging, program, program.name, machine.system, form)
        build.finish(
            staging,
            {
                "manifest_version": MANIFEST_VERSION,
                "abi": ABI_VERSION,
                "kind": "graph",
                "name": program.name,
                "model_uid": program.uid.hex(),
                "target": build.describe_target(machine, first.isa),
                "variants": [
                    {
                        **build.describe_target(variant.machine, variant.isa),
                        "layout_losses": variant.layout_losses,
                        "plan": variant.plan(),
                    }
                    for variant in variants[1:]
                ],
                "source": {**about, "notes": notes},
                "interface": {
                    "inputs": _interface(graph, graph.inputs),
                    "outputs": _interface(graph, graph.outputs),
                    "limits": dict(graph.meta.get("limits", {})),
                },
                "operators": _count(node.op for node in graph.nodes),
                "plan": first.plan(),
                "quantization": graph.meta.get("quantization", []),
                **({"mix": graph.meta["mix"]} if "mix" in graph.meta else {}),
                "memory": {
                    "activations_bytes": program.arena_bytes,
                    "activations_lower_bound_bytes": program.lower_bound_bytes,
                    "peak_node": program.peak_node,
                    "arena_bytes": program.arena_bytes,
                    "planned_at": "compile" if program.lifetimes is None else "run",
                },
                "barriers_per_step": program.barriers,
                "compiler": {
                    "version": compiler.version,
                    "flags": list(parts[0][2]),
                    "objects_cached": cache.hits,
                    "objects_compiled": cache.misses,
                },
                "tensors": describe_tensors(tensors, graph.constants, hashes),
            },
        )
        report("link", 1, 1)


def _rounder(
    graph: Graph, about: Mapping[str, Any], options: GraphOptions, report: Progress
) -> GraphRounder | None:
    """What brings the float weights of a matrix to the format that was asked for.

    int8 weights and activations need no format: they have integer products of their own.
    """
    weights = options.weights
    if weights == "auto" and options.by_matrix is None:
        raise Unsupported("formats are chosen when a model is compiled; compile it, and tune the "
                          "artifact")
    if weights == "keep" or (weights == "int8" and options.activations == "int8"):
        return None
    rounding = Rounding(
        SHORT_FORMATS.get(weights, weights), options.method, options.keep, options.calibration,
        options.samples, memory=options.memory, by_matrix=options.by_matrix,
    )
    return GraphRounder(graph, rounding, str(about.get("sha256", "")), report)


@dataclass
class _Variant:
    """What is compiled for one of the targets of an artifact.

    ``tilings`` say why gemm kernels have their register tiles, ``choices`` why matrices in formats
    of the catalog have their kernels, ``layout_losses`` by how much the layout of another variant
    is predicted to slow this one down.
    """

    machine: targets.Machine
    isa: Isa
    kernels: GraphKernels
    tilings: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    layout_losses: dict[str, float]
    program: GraphProgram

    def plan(self) -> dict[str, Any]:
        """The manifest's entry of the kernels."""
        return {
            "kernels": self.kernels.choices(), "tiles": self.tilings, "formats": self.choices
        }  # fmt: skip


def _variants(
    graph: Graph,
    pairs: Sequence[tuple[targets.Machine, Isa]],
    activations: str | None,
    measured: GraphMeasured,
) -> list[_Variant]:
    """The programs of an optimized graph for each target; weights that lie alike are shared. What
    was ``measured`` is of the first."""
    union = TensorUnion(graph.constants)
    arithmetic = activations or "f32"
    layouts: dict[tuple[str, int, int], Layout] = {}
    variants: list[_Variant] = []
    for number, (machine, isa) in enumerate(pairs):
        shared = {}
        known = GraphMeasured() if number else measured
        calls = graph_calls(graph, isa, machine, activations)
        wanted = calls.products
        if number and wanted:
            shared = shared_product_layouts(
                wanted, layouts, isa, machine, arithmetic, machine.cores
            )
        formats: dict[tuple[str, int, int], MatmulSpec] = {}
        choices: list[KernelChoice] = []
        if wanted:
            formats, choices = plan_products(
                wanted, isa, machine, arithmetic, machine.cores, known.formats,
                layouts={key: layout for key, (layout, _) in shared.items()},
            )  # fmt: skip
        if not number:
            layouts = {key: spec.layout for key, spec in formats.items()}
        own = with_rows(graph, formats)
        verify(own)
        tiles, tilings = plan_tiles(calls, isa, machine, known.tiles)
        kernels = GraphKernels(isa, machine, formats, tiles)
        program = lower_graph(
            own,
            kernels.call,
            functools.partial(union.add, isa=isa.name),
            name=build.shown_name(graph.name),
            isa=isa.name,
            abi=ABI_VERSION,
            cpu_features=" | ".join(f"CpuFeature::{name}" for name in isa.features) or "0",
            kernels=kernels.declarations,
            packed=packed_formats(own, formats),
        )
        if number:
            program.symbol = f"qigen_model_description_{number}"
            variants[-1].program.next = program.symbol
        losses = {"x".join(map(str, key)): round(loss, 4) for key, (_, loss) in shared.items()}
        described = [dataclasses.asdict(c) for c in choices]
        variants.append(_Variant(machine, isa, kernels, tilings, described, losses, program))
    variants[-1].program.tensors = union.tensors  # the last one knows those of all
    for variant in variants:
        variant.program.weights_bytes = union.size
    return variants


def _kernel_units(
    variant: _Variant, alone: bool
) -> tuple[dict[str, str], list[toolchain.Unit], tuple[str, ...]]:
    """(headers, units of the kernels, flags) of a variant. Names of several in one library are kept
    apart by their namespace."""
    isa = variant.isa
    include = (resource_folder("runtime") / "include",)
    flags = (*toolchain.KERNEL_FLAGS, *isa.flags, *(() if alone else (f"-Dqg=qg_{isa.name}",)))
    headers = variant.kernels.headers()
    units = [
        toolchain.Unit(k.name, k.text, flags, build.included(k.text, headers), include)
        for k in variant.kernels.sources()
    ]
    return headers, units, flags


def _model_unit(
    variant: _Variant, headers: Mapping[str, str], flags: tuple[str, ...]
) -> toolchain.Unit:
    """The program of a variant."""
    program = variant.program
    text = render("tensor/model.cpp.j2", model=program, banner=_banner(program))
    # the kernels that take the time are units of their own; -O2 halves the time of this one
    model_flags = tuple("-O2" if f == "-O3" else f for f in flags)
    include = (resource_folder("runtime") / "include",)
    used = build.included(text, {**headers, **_plain_headers()})
    return toolchain.Unit("model", text, model_flags, used, include)


def _interface(graph: Graph, names: list[str]) -> list[dict[str, Any]]:
    shown: dict[str, str] = graph.meta.get("output_names", {})
    return [
        {
            "name": shown.get(name, name),
            "dtype": graph.values[name].dtype,
            "shape": [str(d) if isinstance(d, Sym) else d for d in graph.values[name].shape],
        }
        for name in names
    ]


def _count(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _plain_headers() -> dict[str, str]:
    """The headers of templates/tensor, which need no rendering."""
    folder = resource_folder("templates") / "tensor"
    return {file.name: file.read_text() for file in sorted(folder.glob("*.h"))}


def _uid(programs: Sequence[GraphProgram], hashes: Mapping[str, str]) -> bytes:
    """What ties model.so to its weights."""
    lines = [[line.text for line in program.lines] for program in programs]
    text = json.dumps([lines, dict(hashes), programs[0].name])
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def _banner(program: GraphProgram) -> str:
    arena = (
        f"Arena {program.arena_bytes:,} bytes ({program.lower_bound_bytes:,} live at the most, at "
        f"{program.peak_node})"
        if program.lifetimes is None
        else f"Arena placed at run time for {len(program.lifetimes)} values"
    )
    return "\n".join(
        f"// {line}"
        for line in (
            f"{program.name}: one run of the model. Template: tensor/model.cpp.j2.",
            f"ISA {program.isa}; {program.barriers} barriers a run.",
            f"{arena}.",
        )
    )
