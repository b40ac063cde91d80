"""From a model file to an artifact: the one way through.

read -> graph -> passes -> plan -> lower -> render -> compile and pack -> link -> manifest. The
output folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qigen import targets, toolchain
from qigen.artifact import (
    ABI_VERSION,
    MANIFEST_VERSION,
    Artifact,
    describe_tensors,
    place_tensors,
    write_header,
    write_weights,
)
from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.isa import by_name as isa_by_name
from qigen.backends.cpu.matmul import MatmulSpec, render_matmul
from qigen.backends.cpu.ops import render_ops
from qigen.build import (
    Progress,
    check_isa,
    check_output,
    describe_target,
    find_compiler,
    finish,
    included,
    link,
    runtime_units,
    shown_name,
    staging_folder,
    write_interface,
    write_sources,
)
from qigen.codegen.lower import Lowering, PackedTensor, Program, lower_program
from qigen.codegen.render import render
from qigen.errors import QigenError, Unsupported, UsageError
from qigen.formats import catalog
from qigen.frontends import build_graph, load_model
from qigen.frontends.model import LanguageModel
from qigen.frontends.tokenizer import Tokenizer
from qigen.graph_compiler import (
    SHORT_FORMATS,
    GraphOptions,
    compile_graph,
    is_onnx,
    parse_shapes,
)
from qigen.ir.graph import Graph, constant_shape
from qigen.ir.plan import Plan
from qigen.passes.memory import MemoryPlan, plan_memory
from qigen.passes.pipeline import optimize
from qigen.paths import resource_folder
from qigen.planner import Measured, isa_candidates, plan_model, products, spec_for
from qigen.quantize.weights import requantized
from qigen.tune import tune_model, tune_products

DEFAULT_MAX_SEQ = 4096
"""Positions of a session when the user does not say: what the model was made for, up to this."""

DEFAULT_MAX_BATCH = 8

ACTIVATIONS = ("f32", "bf16", "int8", "int8-token")
TUNING = ("model", "measure", "off")
KV_FORMATS = ("f16", "int8", "int4")


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
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model into the artifact folder ``output``.

    ``model`` is a GGUF file, a Hugging Face folder or an ONNX file.

    ``target`` is "native" or a name from :mod:`qigen.targets`; ``isa`` forces an ISA row.
    ``weights`` is "keep" (the file's own codes) or a format name that every matrix is rounded to.
    ``activations``: "f32", "int8" (a scale for 32 values), "int8-token"; None lets the planner
    choose. ``kv`` is "f16" or "int8". ``max_seq`` bounds the positions of a session (default: the
    model's own, up to 4096), ``max_batch`` the sessions of one batched step. ``shape`` fixes
    dimensions of an ONNX model's inputs by name: numbers, "?" for one that stays open, "..64" for
    one that stays open up to 64. ``calibration`` names a file with inputs of an ONNX model that are
    typical of what it will get. ``tune`` is "model" or "off" (the cost model chooses) or "measure":
    candidates are measured on this machine first, and threads and prefill block of the model after.

    Raises BadInput (damaged model), Unsupported, UsageError, ToolchainError. An artifact that
    exists at ``output`` is replaced when all is done; on failure nothing is left behind.
    """
    _check_options(activations, kv, max_batch, tune, weights, target)
    report = progress or (lambda stage, done, total: None)
    out = Path(output).resolve()  # of a link, the target is replaced
    check_output(out)
    machine = targets.native() if target == "native" else targets.by_name(target)
    row = isa_by_name(isa) if isa else isa_candidates(machine)[0]
    check_isa(row, machine, target == "native")
    compiler = find_compiler(machine)

    if is_onnx(Path(model)):
        if tune == "measure":
            raise Unsupported("only language models can be tuned so far; leave --tune out")
        for option, given in (
            ("--max-seq", max_seq is not None),
            ("--max-batch", max_batch != DEFAULT_MAX_BATCH),
            ("--kv", kv != "f16"),
        ):
            if given:
                raise UsageError(f"{option} is for language models; leave it out for an ONNX model")
        return compile_graph(
            Path(model),
            out,
            isa=row,
            machine=machine,
            options=GraphOptions(
                weights,
                activations,
                parse_shapes(shape or {}),
                Path(calibration) if calibration is not None else None,
            ),
            jobs=jobs or os.cpu_count() or 1,
            keep_sources=Path(keep_sources) if keep_sources else None,
            progress=progress,
        )
    if shape:
        raise UsageError("--shape is for ONNX models; language models take any number of tokens")
    if calibration is not None:
        raise Unsupported("--calibration is for ONNX models; language models have no use for it")
    report("read", 0, 1)
    source = load_model(Path(model))
    limit = source.config.max_position
    max_seq = min(limit, DEFAULT_MAX_SEQ) if max_seq is None else max_seq
    graph = optimize(build_graph(source, max_seq))
    if weights != "keep":
        graph = requantized(graph, catalog.by_name(SHORT_FORMATS.get(weights, weights)))
    tokenizer = _tokenizer(source)
    report("read", 1, 1)

    measured: Measured | None = None
    if tune == "measure":
        measured, _ = tune_products(
            products(graph),
            isa=row,
            machine=machine,
            activations=activations or "auto",
            threads=threads or machine.cores,
            jobs=jobs,
            progress=progress,
        )

    def build(threads: int, max_tokens: int | None) -> Plan:
        plan = plan_model(
            graph,
            isa=row,
            machine=machine,
            activations=activations or "auto",
            kv=kv,
            threads=threads,
            max_tokens=max_tokens,
            max_seq=max_seq,
            max_batch=max_batch,
            measured=measured,
        )
        memory = plan_memory(graph, plan.max_tokens)
        program = _lower(graph, source, plan, memory, row, max_seq, max_batch)
        with staging_folder(out) as staging, toolchain.ObjectCache(
            compiler, jobs or os.cpu_count() or 1
        ) as cache:
            _build(graph, source, plan, memory, program, row, machine, tokenizer, compiler, cache,
                   staging, Path(keep_sources) if keep_sources else None, report)
        return plan

    plan = build(threads or machine.cores, None)
    if tune == "measure":
        knobs = tune_model(out, progress=progress)
        block = max(knobs.block, max_batch)
        if block < plan.max_tokens or (threads is None and knobs.threads != plan.threads_hint):
            build(threads or knobs.threads, min(block, plan.max_tokens))
    return Artifact(out)


def _check_options(
    activations: str | None, kv: str, max_batch: int, tune: str, weights: str, target: str
) -> None:
    if activations is not None and activations not in ACTIVATIONS:
        raise UsageError(f"activations {activations}: choose one of {', '.join(ACTIVATIONS)}")
    if kv not in KV_FORMATS:
        raise UsageError(f"KV cache {kv}: choose one of {', '.join(KV_FORMATS)}")
    if kv == "int4":
        raise Unsupported("an int4 KV cache has no kernels yet; choose f16 or int8")
    if max_batch < 1:
        raise UsageError("max_batch must be at least 1")
    if tune not in TUNING:
        raise UsageError(f"tuning '{tune}': choose one of {', '.join(TUNING)}")
    if tune == "measure" and target != "native":
        raise UsageError("only kernels for this machine can be measured; leave --target out")
    if weights == "auto":
        raise Unsupported("choosing formats by budget is not built yet; name a format")
    if weights != "keep":
        catalog.by_name(SHORT_FORMATS.get(weights, weights))


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
) -> Program:
    def spec_of(constant: str, role: str) -> MatmulSpec:
        data = graph.constants[constant]
        n, k = constant_shape(data)
        return spec_for(plan, graph.values[constant].dtype, n, k)

    lowering = Lowering(graph, memory, spec_of, max_batch=max_batch, max_seq=max_seq)
    sizes: list[int] = []

    def offsets_of(tensors: list[PackedTensor]) -> dict[str, int]:
        offsets, size = place_tensors(tensors, graph.constants)
        sizes.append(size)
        return offsets

    features = " | ".join(f"CpuFeature::{name}" for name in isa.features) or "0"
    program = lower_program(
        lowering,
        offsets_of,
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
    program.weights_bytes = sizes[-1]
    return program


def _build(
    graph: Graph,
    source: LanguageModel,
    plan: Plan,
    memory: MemoryPlan,
    program: Program,
    isa: Isa,
    machine: targets.Machine,
    tokenizer: Tokenizer | None,
    compiler: toolchain.Compiler,
    cache: toolchain.ObjectCache,
    staging: Path,
    keep_sources: Path | None,
    report: Progress,
) -> None:
    """Fill the staging folder."""
    runtime = runtime_units()
    headers = {
        isa.header: render(isa.template),
        "kernels.h": render("cpu/kernels.h.j2"),
        "epilogue.h": render("cpu/epilogue.h.j2"),
        "ops.h": render("cpu/ops.h.j2", head_dims=program.head_dims),
    }
    kernels = _kernels(program, plan)
    ops = render_ops(isa, program.head_dims, program.kv, program.token_tiles)
    total = len(kernels) + len(runtime) + 2
    compiled: list[str] = []

    def done(name: str) -> None:
        compiled.append(name)
        report("compile", len(compiled), total)

    include = (resource_folder("runtime") / "include",)
    flags = (*toolchain.KERNEL_FLAGS, *isa.flags)
    futures = [cache.compile(unit, done) for unit in runtime]
    units = [
        toolchain.Unit(k.name, k.text, flags, included(k.text, headers)) for k in kernels
    ]
    units.append(toolchain.Unit(ops.name, ops.text, flags, headers, include))
    futures += [cache.compile(unit, done) for unit in units]

    with (staging / "weights.bin").open("wb") as stream:
        hashes = write_weights(stream, program.tensors, graph.constants, report)
        program.uid = _uid(plan, program, hashes)
        write_header(stream, program.weights_bytes, program.uid)

    # the units above are being compiled with `headers`, so these get a dictionary of their own
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
    text = render("model/model.cpp.j2", model=program, banner=_banner(program, plan, memory))
    model_unit = toolchain.Unit("model", text, flags, model_headers, include)
    futures.append(cache.compile(model_unit, done))
    if keep_sources is not None:
        write_sources(keep_sources, model_headers, [*units, model_unit])
    report("link", 0, 1)
    link(compiler, futures, staging, machine.system)
    if tokenizer is not None:
        tokenizer.save(staging)
    write_interface(staging, program, program.name, machine.system)
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "abi": ABI_VERSION,
        "name": program.name,
        "model_uid": program.uid.hex(),
        "target": describe_target(machine, isa),
        "source": {
            "path": str(source.metadata.path.resolve()),
            "container": source.metadata.container,
            "licence": source.metadata.licence,
            "sha256": source.metadata.sha256(),
            "notes": list(source.metadata.notes),
        },
        "config": source.config.to_json(),
        "plan": plan.to_json(),
        "memory": {
            "activations_bytes": memory.arena_bytes,
            "activations_lower_bound_bytes": memory.lower_bound_bytes,
            "peak_node": memory.peak_node,
            "arena_bytes": program.arena_bytes,
            "arena_bytes_per_thread": program.thread_bytes,
            "kv_bytes_per_position": program.kv_bytes,
        },
        "weights_read_per_token": weights_read_per_token(graph, program),
        "barriers_per_step": program.barriers,
        "limits": {
            "max_seq": program.max_seq,
            "max_batch": program.max_batch,
            "max_tokens": program.max_tokens,
        },
        "compiler": {
            "version": compiler.version,
            "flags": list(flags),
            "objects_cached": cache.hits,
            "objects_compiled": cache.misses,
        },
        "tensors": describe_tensors(program.tensors, graph.constants, hashes),
    }
    finish(staging, manifest)
    report("link", 1, 1)


def weights_read_per_token(graph: Graph, program: Program) -> int:
    """Bytes of packed matrices that a decode step streams: all but tables only looked up in."""
    streamed = {name for node in graph.nodes if node.op == "MatMulGroup" for name in node.inputs}
    return sum(
        graph.constant_bytes(part)
        for tensor in program.tensors
        if tensor.spec is not None
        for part in tensor.parts
        if part in streamed
    )


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


def _uid(plan: Plan, program: Program, hashes: dict[str, str]) -> bytes:
    """What ties model.so to its weights: a hash of the program and of every tensor."""
    about = dataclasses.replace(program, uid=b"")
    text = json.dumps([plan.to_json(), hashes, repr(about.parts), repr(about.calls)])
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
