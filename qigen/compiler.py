"""From a model file to an artifact: the one way through.

read -> graph -> passes -> plan -> lower -> render -> compile and pack -> link -> manifest. The
output folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from qigen import targets, toolchain
from qigen.artifact import (
    ABI_VERSION,
    MANIFEST_VERSION,
    Artifact,
    TensorUnion,
    describe_tensors,
    write_header,
    write_weights,
)
from qigen.backends import base
from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa import by_name as isa_by_name
from qigen.backends.cpu.matmul import INTEGER_ACTIVATIONS, MatmulSpec, render_matmul
from qigen.backends.cpu.ops import render_experts, render_ops
from qigen.build import (
    FORMS,
    Progress,
    check_isa,
    check_output,
    describe_target,
    find_compiler,
    finish,
    included,
    link,
    open_cache,
    runtime_units,
    shown_name,
    staging_folder,
    write_interface,
    write_sources,
)
from qigen.calibration import (
    Rounding,
    calibration_sequences,
    quantize_by_matrix,
    quantize_language_model,
)
from qigen.codegen.lower import Lowering, Program, lower_program
from qigen.codegen.render import render
from qigen.cuda_compiler import GpuOptions, compile_gpu, gpu_targets
from qigen.cuda_compiler import check_options as check_gpu_options
from qigen.errors import QigenError, ToolchainError, Unsupported, UsageError
from qigen.formats import catalog
from qigen.formats.kv import kv_format
from qigen.frontends import build_graph, load_model
from qigen.frontends.model import LanguageModel
from qigen.frontends.tokenizer import Tokenizer
from qigen.graph_compiler import (
    SHORT_FORMATS,
    GraphOptions,
    Measure,
    compile_graph,
    is_onnx,
    parse_shapes,
)
from qigen.graph_tiles import GraphCalls, GraphMeasured
from qigen.ir.graph import Graph, constant_shape
from qigen.ir.ops.experts import expert_parts
from qigen.ir.plan import Plan
from qigen.mix import Budget, Choice, WeightPlan, Wishes, choose
from qigen.mix.candidates import KEEP, matrices_of
from qigen.passes.memory import MemoryPlan, plan_memory
from qigen.passes.pipeline import optimize
from qigen.paths import resource_folder
from qigen.planner import (
    Measured,
    Product,
    isa_candidates,
    plan_model,
    products,
    shared_layouts,
    spec_for,
)
from qigen.quantize.model import MEMORY, SAMPLES
from qigen.quantize.weights import with_byte_tables
from qigen.tune import remember, remembered, tune_model, tune_products
from qigen.tune_graph import remembered_graph, tune_graph, tune_graph_model

DEFAULT_MAX_SEQ = 4096
"""Positions of a session when the user does not say: what the model was made for, up to this."""

DEFAULT_MAX_BATCH = 8

ACTIVATIONS = ("f32", "bf16", "f16", *INTEGER_ACTIVATIONS)
TUNING = ("model", "measure", "off")


def compile(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str = "native",
    weights: str = "keep",
    activations: str | None = None,
    kv: str = "f16",
    max_seq: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    tune: str = "model",
    jobs: int | None = None,
    keep_sources: str | os.PathLike[str] | None = None,
    isa: str | None = None,
    threads: int | None = None,
    shape: Mapping[str, Sequence[int | str]] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    method: str | None = None,
    keep: Sequence[str] = (),
    samples: int = SAMPLES,
    memory: int = MEMORY,
    budget: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    candidates: Sequence[str] = (),
    curve: bool = False,
    emit: str = "library",
    backend: str = "cpu",
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model into the artifact folder ``output``.

    ``model`` is a GGUF file, a Hugging Face folder or an ONNX file.

    ``target`` is "native" or a name from :mod:`qigen.targets`; several, separated by commas, make
    one artifact that takes the fastest of them that the machine has. GPU architectures ("sm_80")
    make an artifact that opens the CUDA driver at load. ``isa`` forces an ISA row.
    ``weights`` is "keep" (the file's own codes), a format name that every matrix is rounded to, or
    "auto": a format for each that keeps the ``budget`` ("bits=3.5", "bytes=80M", "latency=5ms",
    "kl=0.02", of an ONNX model "error=0.01" or "cosine=0.99"; several separated by commas) and
    hurts least, from the ``candidates`` (none: a table of :mod:`qigen.mix`). The choice is written
    beside the artifact, as OUTPUT.plan.toml; ``plan``
    takes such a file, which may have been edited. ``curve`` also puts the best for other budgets
    into the manifest.
    ``activations``: "f32", "int8" (a scale for 32 values), "int8-token", and "int4" and
    "int4-token" alike; None lets the planner choose. ``kv`` is a row of
    :mod:`qigen.formats.kv`. ``max_seq`` bounds the positions of a session (default: the model's
    own, up to 4096), ``max_batch`` the sessions of one batched step.
    ``shape`` fixes dimensions of an ONNX model's inputs by name: numbers, "?" for one that stays
    open, "..64" for one that stays open up to 64.

    ``method`` is how weights come to a format: a name of :data:`qigen.quantize.METHODS`, with
    options as in "gptq:order=act" (default: gptq with ``calibration``, rtn without). ``keep`` are
    patterns of the names of matrices that stay as they are. ``calibration`` names a file with
    inputs that are typical of what the model will get: of a language model a text, of which
    ``samples`` sequences are looked at; of an ONNX model an .npz with an array by input, or a
    folder of such. ``memory`` bounds the bytes that calibration takes. Layers that a run before has
    finished (it may have been killed) are not quantized again.

    ``tune`` is "model" (the cost model chooses, among what was measured on this machine before if
    anything was: in the tuning database, or by the package's makers), "off" (the cost model alone)
    or "measure": candidates are measured on this machine first, and threads and prefill block of
    the model after.
    ``emit`` says what the artifact's code is: a shared "library", a "static" one to link into a
    program, or "source": C++ with a CMakeLists.txt that builds it. ``backend``: "cpu" compiles C++
    with a compiler, "llvm" the same kernels with llvmlite and no compiler at all.

    Raises BadInput (damaged model), Unsupported, UsageError, ToolchainError. An artifact that
    exists at ``output`` is replaced when all is done; on failure nothing is left behind.
    """
    gpus = gpu_targets(target)
    _check_options(activations, kv, max_batch, tune, weights, target)
    if emit not in FORMS:
        raise UsageError(f"cannot emit {emit}: choose one of {', '.join(FORMS)}")
    if tune == "measure" and emit != "library":
        raise UsageError(f"a model that is emitted as {emit} cannot be measured; leave --tune out")
    report = progress or (lambda stage, done, total: None)
    out = Path(output).resolve()  # of a link, the target is replaced
    check_output(out)
    if gpus:
        if backend != "cpu":
            raise Unsupported(f"a GPU target has kernels of its own; leave --backend {backend} out")
        check_gpu_options(activations, tune, isa, max_batch)
        if is_onnx(Path(model)):
            raise Unsupported("ONNX models have no GPU kernels yet; take a processor as the target")
    pairs = _pairs("native" if gpus else target, isa, tiles=backend == "cpu")
    machine, row = pairs[0]
    if backend == "llvm":
        _check_llvm(emit, tune)
        compiler = base.backend("llvm").find_compiler(machine)
    else:
        base.backend(backend)
        compiler = find_compiler(machine, emit)

    if plan is not None:
        if weights not in ("keep", "auto") or budget or candidates or keep:
            raise UsageError("a --plan says what every matrix gets; leave --weights, --budget, "
                             "--candidates and --keep out")
        weights = "auto"
    if weights != "auto" and (budget is not None or candidates):
        raise UsageError("--budget and --candidates are for --weights auto; also give that")
    if is_onnx(Path(model)):
        if backend != "cpu":
            raise Unsupported(f"ONNX models have no {backend} backend; leave --backend out")
        for option, given in (
            ("--max-seq", max_seq is not None),
            ("--max-batch", max_batch != DEFAULT_MAX_BATCH),
            ("--kv", kv != "f16"),
        ):
            if given:
                raise UsageError(f"{option} is for language models; leave it out for an ONNX model")
        if activations in INTEGER_ACTIVATIONS and activations != "int8":
            raise UsageError(f"--activations {activations} is for language models; an ONNX model "
                             "takes f32, bf16 or int8")
        artifact = compile_graph(
            Path(model),
            out,
            pairs=pairs,
            options=GraphOptions(
                weights,
                activations,
                parse_shapes(shape or {}),
                Path(calibration) if calibration is not None else None,
                method,
                tuple(keep),
                samples,
                memory,
                budget,
                Path(plan) if plan is not None else None,
                tuple(candidates),
                curve,
            ),
            jobs=jobs or os.cpu_count() or 1,
            keep_sources=Path(keep_sources) if keep_sources else None,
            form=emit,
            progress=progress,
            measure=_graph_measure(tune, row, machine, jobs) if target == "native" else None,
        )
        if tune == "measure":
            tune_graph_model(out, progress=progress)
        return artifact
    if shape:
        raise UsageError("--shape is for ONNX models; language models take any number of tokens")
    if weights == "keep" and (calibration is not None or method is not None or keep):
        raise UsageError(
            "--calibration, --method and --keep are for weights that are quantized; also give "
            "--weights FORMAT"
        )
    report("read", 0, 1)
    source = load_model(Path(model))
    limit = source.config.max_position
    max_seq = min(limit, DEFAULT_MAX_SEQ) if max_seq is None else max_seq
    tokenizer = _tokenizer(source)
    graph = build_graph(source, max_seq)
    report("read", 1, 1)
    outcomes: list[dict[str, Any]] = []
    mix: Choice | None = None
    if weights == "auto":
        if gpus:
            raise Unsupported("formats are chosen for processors so far; name a format for a GPU")
        rounding = Rounding("", method, tuple(keep),
                            Path(calibration) if calibration is not None else None, samples,
                            memory=memory)
        recipe = rounding.recipe(rounding.calibration is not None)
        sequences = calibration_sequences(graph, tokenizer, rounding, recipe)
        digest = source.metadata.sha256()
        if plan is not None:
            weight_plan = WeightPlan.read(Path(plan))
            weight_plan.check(matrices_of(graph), source.metadata.name, digest, str(plan),
                              sequences is not None)
        else:
            cores = threads or machine.cores
            mix = choose(
                graph,
                Wishes(Budget.parse(budget) if budget else Budget(), method or recipe.method,
                       tuple(candidates), tuple(keep), curve),
                sequences, model=source.metadata.name, sha256=digest, isa=row, machine=machine,
                activations=activations or "auto", threads=cores,
                measured=functools.partial(_remembered, isa=row, machine=machine, threads=cores)
                if target == "native" and tune != "off" else None,
                memory=memory, cache=toolchain.cache_folder() / "sensitivity", report=report,
            )  # fmt: skip
            weight_plan = mix.plan
        graph, outcomes = quantize_by_matrix(
            source, graph,
            {n: m.format for n, m in weight_plan.matrices.items() if m.format != KEEP},
            {n: m.method or recipe.method for n, m in weight_plan.matrices.items()
             if m.format != KEEP},
            sequences, recipe, report,
        )  # fmt: skip
        graph.meta["mix"] = mix.to_json() if mix else {"budget": weight_plan.budget}
    elif weights != "keep":
        rounding = Rounding(
            SHORT_FORMATS.get(weights, weights), method, tuple(keep),
            Path(calibration) if calibration is not None else None, samples, memory=memory,
        )
        graph, outcomes = quantize_language_model(source, graph, tokenizer, rounding, report)
    graph = optimize(graph)
    graph.meta["quantization"] = outcomes
    if gpus:
        options = GpuOptions(
            gpus, kv, activations or "f32", max_seq, max_batch, jobs or os.cpu_count() or 1,
            Path(keep_sources) if keep_sources else None, emit,
        )  # fmt: skip
        compile_gpu(graph, source, tokenizer, out, options, report)
        return Artifact(out)
    graph, notes = with_byte_tables(graph, activations)
    about = dataclasses.replace(source.metadata, notes=(*source.metadata.notes, *notes))
    source = dataclasses.replace(source, metadata=about)

    measured: Measured | None = None
    kernels = compiler if backend == "llvm" else None
    if tune == "model" and target == "native":
        measured, note = remembered(
            products(graph), isa=row, machine=machine, threads=threads or machine.cores,
            kernels=kernels,
        )  # fmt: skip
        if note:
            about = dataclasses.replace(source.metadata, notes=(*source.metadata.notes, note))
            source = dataclasses.replace(source, metadata=about)
    if tune == "measure":
        measured, _ = tune_products(
            products(graph),
            isa=row,
            machine=machine,
            activations=activations or "auto",
            threads=threads or machine.cores,
            jobs=jobs,
            progress=progress,
            kernels=kernels,
        )

    def build(threads: int | None, max_tokens: int | None) -> Plan:
        variants: list[Variant] = []
        union = TensorUnion(graph.constants)
        for number, (machine, row) in enumerate(pairs):
            cores = threads or machine.cores
            arithmetic = activations or "auto"
            shared = {}
            if number:
                shared = shared_layouts(graph, variants[0].plan, row, machine, arithmetic, cores)
            plan = plan_model(
                graph,
                isa=row,
                machine=machine,
                activations=arithmetic,
                kv=kv,
                threads=cores,
                max_tokens=max_tokens,
                max_seq=max_seq,
                max_batch=max_batch,
                measured=measured,
                layouts={key: layout for key, (layout, _) in shared.items()},
            )
            memory = plan_memory(graph, plan.max_tokens)
            program = _lower(graph, source, plan, memory, row, max_seq, max_batch, union)
            if number:
                program.symbol = f"qigen_model_description_{number}"
                variants[-1].program.next = program.symbol
            losses = {"x".join(map(str, key)): round(loss, 4) for key, (_, loss) in shared.items()}
            variants.append(Variant(row, machine, plan, memory, program, losses))
        variants[-1].program.tensors = union.tensors  # the last one knows those of all
        for variant in variants:
            variant.program.weights_bytes = union.size
        with staging_folder(out) as staging, open_cache(
            emit, compiler, jobs or os.cpu_count() or 1
        ) as cache:
            _build(graph, source, variants, tokenizer, compiler, cache, staging, emit, backend,
                   Path(keep_sources) if keep_sources else None, report)
        return variants[0].plan

    first = build(threads, None)
    if tune == "measure":
        knobs = tune_model(out, progress=progress)
        block = max(knobs.block, max_batch)
        if block < first.max_tokens or (
            threads is None and knobs.threads != first.threads_hint
        ):
            build(threads or knobs.threads, min(block, first.max_tokens))
            remember(out, knobs.threads, knobs.block)
    if weights == "auto":
        weight_plan.write_beside(out, Path(plan) if plan is not None else None)
    return Artifact(out)


def _remembered(some: Sequence[Product], *, isa: Isa, machine: targets.Machine, threads: int
                ) -> Measured:
    """What the tuning database knows of products."""
    return remembered(some, isa=isa, machine=machine, threads=threads)[0]


def _graph_measure(
    tune: str, isa: Isa, machine: targets.Machine, jobs: int | None
) -> Measure | None:
    """What finds, or with ``tune`` "measure" makes, the measurements of a graph's kernels."""
    if tune == "off":
        return None

    def measure(calls: GraphCalls, report: Progress) -> tuple[GraphMeasured, str]:
        if tune == "model":
            return remembered_graph(calls, isa=isa, machine=machine, threads=machine.cores)
        found, _ = tune_graph(
            calls, isa=isa, machine=machine, threads=machine.cores, jobs=jobs, progress=report
        )
        return found, ""

    return measure


@dataclasses.dataclass
class Variant:
    """What is compiled for one of the targets of an artifact.

    ``layout_losses``: of the weights that lie as the first variant wants them, by how much that is
    predicted to slow this one down. The tensors of a variant begin with those of the ones before.
    """

    isa: Isa
    machine: targets.Machine
    plan: Plan
    memory: MemoryPlan
    program: Program
    layout_losses: dict[str, float]


def _pairs(target: str, isa: str | None, tiles: bool) -> list[tuple[targets.Machine, Isa]]:
    """The machines that a target names, separated by commas, each with its instruction set; the
    fastest first. Of targets with the same instruction set the first one counts. ``tiles``: the
    backend knows tile registers."""
    names = target.split(",")
    pairs: dict[str, tuple[targets.Machine, Isa]] = {}
    for name in names:
        machine = targets.native() if name == "native" else targets.by_name(name)
        known = [row for row in isa_candidates(machine) if tiles or not row.tiles]
        row = isa_by_name(isa) if isa else known[0]
        if row.tiles and not tiles:
            raise Unsupported(f"the llvm backend has no tile registers; take {known[0].name} or "
                              "leave --backend out")
        check_isa(row, machine, name == "native")
        pairs.setdefault(row.name, (machine, row))
    platforms = {(machine.architecture, machine.system) for machine, _ in pairs.values()}
    if len(platforms) > 1:
        raise UsageError(
            f"--target {target}: one artifact is for one system and architecture, not for "
            f"{' and '.join(' '.join(p) for p in sorted(platforms))}; compile one for each"
        )
    order = list(ISAS)
    return sorted(pairs.values(), key=lambda pair: -order.index(pair[1].name))


def _check_options(
    activations: str | None, kv: str, max_batch: int, tune: str, weights: str, target: str
) -> None:
    if activations is not None and activations not in ACTIVATIONS:
        raise UsageError(f"activations {activations}: choose one of {', '.join(ACTIVATIONS)}")
    if activations == "f16" and not target.startswith("sm_"):
        raise Unsupported("f16 activations have kernels for GPUs only; choose bf16 or f32")
    kv_format(kv)
    if kv == "int2" and target.startswith("sm_"):
        raise Unsupported("an int2 KV cache has no GPU kernels yet; choose f16, int8 or int4")
    if max_batch < 1:
        raise UsageError("max_batch must be at least 1")
    if tune not in TUNING:
        raise UsageError(f"tuning '{tune}': choose one of {', '.join(TUNING)}")
    if tune == "measure" and target != "native":
        raise UsageError("only kernels for this machine can be measured; leave --target out")
    if weights not in ("keep", "auto"):
        catalog.by_name(SHORT_FORMATS.get(weights, weights))


def _check_llvm(emit: str, tune: str) -> None:
    if emit != "library":
        raise Unsupported(f"the llvm backend makes shared libraries, not --emit {emit}")
    if tune == "measure":
        try:
            toolchain.find_compiler()
        except ToolchainError as error:
            raise ToolchainError(
                "kernels of the llvm backend are measured by a program that a C++ compiler makes: "
                f"leave --tune measure out, or install one ({error.message})"
            ) from None


def _tokenizer(source: LanguageModel) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if it has none."""
    origin = source.tokenizer_source
    if origin.container == "gguf":
        if not any(key.startswith("tokenizer.ggml.") for key in origin.fields):
            return None
        return Tokenizer.from_gguf(origin.fields, where=str(origin.path))
    if not (origin.path / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_huggingface(origin.path)


def _lower(
    graph: Graph,
    source: LanguageModel,
    plan: Plan,
    memory: MemoryPlan,
    isa: Isa,
    max_seq: int,
    max_batch: int,
    union: TensorUnion,
) -> Program:
    """The program of a variant, whose tensors come to those of the variants before."""

    def spec_of(constant: str, role: str) -> MatmulSpec:
        data = graph.constants[constant]
        n, k = constant_shape(data)
        return spec_for(plan, graph.values[constant].dtype, n, k)

    lowering = Lowering(graph, memory, spec_of, max_batch=max_batch, max_seq=max_seq)
    features = " | ".join(f"CpuFeature::{name}" for name in isa.features) or "0"
    return lower_program(
        lowering,
        lambda tensors: union.add(tensors, isa.name),
        name=shown_name(source.metadata.name),
        isa=isa.name,
        kv=plan.kv,
        abi=ABI_VERSION,
        cpu_features=features,
        vocab=source.config.vocab_size,
        max_tokens=plan.max_tokens,
        d_model=source.config.d_model,
        n_layers=source.config.n_layers,
    )


def _variant_units(
    variant: Variant, alone: bool
) -> tuple[dict[str, str], list[toolchain.Unit], tuple[str, ...]]:
    """(headers, units of the kernels, flags) of a variant. Names of several in one library are kept
    apart by their namespace."""
    program, isa = variant.program, variant.isa
    headers = {
        isa.header: render(isa.template),
        "kernels.h": render("cpu/kernels.h.j2"),
        "epilogue.h": render("cpu/epilogue.h.j2"),
        "ops.h": render("cpu/ops.h.j2", head_dims=program.head_dims, kv=kv_format(program.kv)),
    }
    if program.experts_bytes:
        headers["experts.h"] = render("cpu/experts.h.j2")
    include = (resource_folder("runtime") / "include",)
    flags = (*toolchain.KERNEL_FLAGS, *isa.flags, *(() if alone else (f"-Dqg=qg_{isa.name}",)))
    units = [
        toolchain.Unit(k.name, k.text, flags, included(k.text, headers))
        for k in _kernels(program, variant.plan)
    ]
    ops = render_ops(
        isa, program.head_dims, kv_format(program.kv), program.token_tiles, program.head_groups
    )
    units.append(toolchain.Unit(ops.name, ops.text, flags, headers, include))
    if program.experts_bytes:
        between = render_experts(isa)
        needed = included(between.text, headers)
        units.append(toolchain.Unit(between.name, between.text, flags, needed))
    return headers, units, flags


def _model_unit(
    variant: Variant, headers: Mapping[str, str], flags: tuple[str, ...]
) -> toolchain.Unit:
    """The program of a variant, whose headers are its own."""
    program = variant.program
    # the kernels are being compiled with `headers`, so this gets a dictionary of its own
    model_headers = {
        **headers,
        "kernel_list.h": render(
            "model/kernel_list.h.j2",
            matmuls=sorted(s.entry(e) for s, (es, _) in program.kernels.items() for e in es),
            row_lookups=sorted(
                f"{s.name}__rows" for s, (_, rows) in program.kernels.items() if rows
            ),
        ),
        "support.h": render("model/support.h.j2"),
    }
    if program.experts_bytes:
        model_headers["experts_step.h"] = render("model/experts.h.j2")
    banner = _banner(program, variant.plan, variant.memory)
    text = render("model/model.cpp.j2", model=program, banner=banner)
    include = (resource_folder("runtime") / "include",)
    return toolchain.Unit("model", text, flags, model_headers, include)


def _build(
    graph: Graph,
    source: LanguageModel,
    variants: list[Variant],
    tokenizer: Tokenizer | None,
    compiler: toolchain.Compiler,
    cache: toolchain.ObjectCache | toolchain.SourceCollector,
    staging: Path,
    form: str,
    backend: str,
    keep_sources: Path | None,
    report: Progress,
) -> None:
    """Fill the staging folder."""
    first = variants[0]
    plan, memory, program, machine = first.plan, first.memory, first.program, first.machine
    tensors = variants[-1].program.tensors
    alone = len(variants) == 1
    runtime = [] if backend == "llvm" else runtime_units()
    parts = [_variant_units(variant, alone) for variant in variants]
    total = sum(len(units) + 1 for _, units, _ in parts) + len(runtime)
    compiled: list[str] = []

    def done(name: str) -> None:
        compiled.append(name)
        report("compile", len(compiled), total)

    futures = [cache.compile(unit, done) for unit in runtime]
    futures += [cache.compile(unit, done) for _, units, _ in parts for unit in units]

    with (staging / "weights.bin").open("wb") as stream:
        hashes = write_weights(stream, tensors, graph.constants, report)
        uid = _uid(variants, hashes)
        write_header(stream, program.weights_bytes, uid)

    for variant, (headers, units, flags) in zip(variants, parts, strict=True):
        variant.program.uid = uid
        unit = _model_unit(variant, headers, flags)
        futures.append(cache.compile(unit, done))
        if keep_sources is not None:
            folder = keep_sources if alone else keep_sources / variant.isa.name
            write_sources(folder, dict(unit.headers), [*units, unit])
    report("link", 0, 1)
    if backend == "llvm":
        base.backend("llvm").link(futures, staging / toolchain.LIBRARY_NAMES[machine.system])
    else:
        link(compiler, cache, futures, staging, machine.system, form)
    if tokenizer is not None:
        tokenizer.save(staging)
    write_interface(staging, program, program.name, machine.system, form)
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "abi": ABI_VERSION,
        "name": program.name,
        "model_uid": program.uid.hex(),
        "target": describe_target(machine, first.isa),
        "variants": [
            {
                **describe_target(variant.machine, variant.isa),
                "layout_losses": variant.layout_losses,
                "plan": variant.plan.to_json(),
            }
            for variant in variants[1:]
        ],
        "source": source.metadata.to_json(),
        "config": source.config.to_json(),
        "plan": plan.to_json(),
        "memory": {
            "activations_bytes": memory.arena_bytes,
            "activations_lower_bound_bytes": memory.lower_bound_bytes,
            "peak_node": memory.peak_node,
            "arena_bytes": program.arena_bytes,
            "arena_bytes_per_thread": program.thread_bytes,
            "kv_bytes_per_position": program.kv_bytes,
            "kv_bytes_per_session": program.kv_session_bytes,
        },
        "weights_read_per_token": weights_read_per_token(graph, program),
        "barriers_per_step": program.barriers,
        "limits": {
            "max_seq": program.max_seq,
            "max_batch": program.max_batch,
            "max_tokens": program.max_tokens,
        },
        "quantization": graph.meta.get("quantization", []),
        **({"mix": graph.meta["mix"]} if "mix" in graph.meta else {}),
        "compiler": {
            "backend": backend,
            "version": compiler.version,
            "flags": list(parts[0][2]),
            "objects_cached": cache.hits,
            "objects_compiled": cache.misses,
        },
        "tensors": describe_tensors(tensors, graph.constants, hashes),
    }
    finish(staging, manifest)
    report("link", 1, 1)


def weights_read_per_token(graph: Graph, program: Program) -> int:
    """Bytes of packed matrices that a decode step streams: all but tables only looked up in, and of
    experts those of as many as are chosen."""
    streamed: dict[str, Fraction] = {}
    for node in graph.nodes:
        if node.op == "MatMulGroup":
            streamed |= dict.fromkeys(node.inputs, Fraction(1))
        elif node.op == "RoutedExperts":
            share = Fraction(node.attrs["k"], node.attrs["n_experts"])
            for names in expert_parts(node).weights.values():
                streamed |= dict.fromkeys(names, share)
    return int(sum(
        streamed[part] * graph.constant_bytes(part)
        for tensor in program.tensors
        if tensor.spec is not None
        for part in tensor.parts
        if part in streamed
    ))


def _kernels(program: Program, plan: Plan) -> list[KernelSource]:
    """The kernels that the model uses, with what was predicted for each in its first lines."""
    notes: dict[str, list[str]] = {}
    for choice in plan.kernels:
        notes.setdefault(choice.name, []).append(
            f"Predicted for {choice.n}x{choice.k}, M = {choice.m_bucket}: "
            f"{choice.predicted_us:.1f} us, {choice.predicted_bytes} bytes, "
            f"bound by {choice.bound}."
        )
    kernels = []
    for spec, (epilogues, rows) in program.kernels.items():
        if spec.activations != "f32" or not rows or epilogues:
            kernels.append(render_matmul(spec, epilogues, rows, tuple(notes.get(spec.name, ()))))
        else:
            kernels.append(render_matmul(spec, (), True))
    return kernels


def _uid(variants: Sequence[Variant], hashes: dict[str, str]) -> bytes:
    """What ties the library to its weights: a hash of the programs and of every tensor."""
    programs = [
        [v.plan.to_json(), repr(v.program.parts), repr(v.program.calls)] for v in variants
    ]
    text = json.dumps([programs, hashes])
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def _banner(program: Program, plan: Plan, memory: MemoryPlan) -> str:
    arena = f"{program.arena_bytes:,} bytes ({memory.lower_bound_bytes:,} live at the most)"
    return "\n".join(
        f"// {line}"
        for line in (
            f"{program.name}: one step of the model. Template: model/model.cpp.j2.",
            f"ISA {program.isa}, activations {plan.activations}, KV cache {program.kv}; "
            f"{program.barriers} barriers a step.",
            f"Arena {arena}, {program.max_tokens} tokens a step, {program.max_seq} positions.",
        )
    )


__all__ = ["QigenError", "compile"]
