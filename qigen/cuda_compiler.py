"""From a language model to an artifact for GPUs: the launches, the kernels, the host's code.

The counterpart of :mod:`qigen.compiler` behind its passes. The artifact is the same: a folder whose
library has the C interface of qigen.h; it opens the CUDA driver when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qigen import build, targets, toolchain
from qigen.artifact import (
    ABI_VERSION,
    MANIFEST_VERSION,
    describe_tensors,
    place_tensors,
    write_header,
    write_weights,
)
from qigen.backends.cuda import toolchain as cuda
from qigen.build import Progress
from qigen.codegen.launches import (
    BUCKETS,
    MAX_SESSIONS,
    Argument,
    GpuLowering,
    GpuProgram,
    Launch,
    lower_launches,
)
from qigen.codegen.launches import (
    Sequence as LaunchSequence,
)
from qigen.codegen.lower import PackedTensor
from qigen.codegen.render import render
from qigen.errors import Unsupported, UsageError
from qigen.frontends.model import LanguageModel
from qigen.frontends.tokenizer import Tokenizer
from qigen.ir.graph import Graph
from qigen.passes.memory import MemoryPlan, plan_memory
from qigen.paths import resource_folder

# dlopen is in libc since glibc 2.34; before, in a library of its own
_DYNAMIC_LOADING = ("-Wl,--as-needed", "-ldl")


@dataclass(frozen=True)
class GpuOptions:
    """What a GPU artifact is compiled with; see :func:`qigen.compiler.compile`."""

    archs: tuple[str, ...]
    kv: str
    activations: str
    max_seq: int
    max_batch: int
    jobs: int
    keep_sources: Path | None
    form: str


@dataclass(frozen=True)
class Image:
    """Machine code of one architecture, or PTX, in the blob of an artifact."""

    capability: int
    ptx: bool
    offset: int
    bytes: int


def gpu_targets(target: str) -> tuple[str, ...]:
    """The GPU architectures that a target names, in ascending order; () if it names none.

    UsageError if it names others beside them.
    """
    names = target.split(",")
    gpus = [name for name in names if name.startswith("sm_")]
    if not gpus:
        return ()
    for name in gpus:
        cuda.check_arch(name)
    if len(gpus) < len(names):
        others = [name for name in names if name not in gpus]
        raise UsageError(
            f"--target {target}: an artifact is for GPUs or for processors; compile one for "
            f"{','.join(gpus)} and another one for {','.join(others)}"
        )
    return tuple(sorted(set(gpus), key=cuda.ARCHS.index))


def gpu_rows() -> Mapping[str, str]:
    """The GPU targets, each with examples of GPUs."""
    return cuda.EXAMPLES


def check_options(activations: str | None, tune: str, isa: str | None, max_batch: int) -> None:
    """Refuse the options of processors."""
    if max_batch > MAX_SESSIONS:
        raise Unsupported(f"GPU kernels take batches of at most {MAX_SESSIONS} sessions so far")
    if activations not in (None, *BUCKETS):
        raise Unsupported(
            f"activations {activations} have no GPU kernels yet; choose {' or '.join(BUCKETS)}"
        )
    if tune == "measure":
        raise UsageError("only kernels for this machine can be measured; leave --tune out")
    if isa is not None:
        raise UsageError("--isa is for processors; leave it out")


def compile_gpu(
    graph: Graph,
    source: LanguageModel,
    tokenizer: Tokenizer | None,
    out: Path,
    options: GpuOptions,
    report: Progress,
) -> None:
    """Compile an optimized graph into the folder ``out``.

    Raises Unsupported for formats without a kernel, ToolchainError without a CUDA compiler.
    """
    machine = targets.native()
    if machine.system != "linux":
        raise Unsupported(f"artifacts for GPUs are made on and for Linux, not {machine.system}")
    # what has no kernel is said before anybody has to install something
    memory = plan_memory(graph, BUCKETS[options.activations][-1])
    program = _lower(graph, source, memory, options)
    compiler = build.find_compiler(machine, options.form)
    cuda_compiler = cuda.find_compiler()
    with build.staging_folder(out) as staging, build.open_cache(
        options.form, compiler, options.jobs
    ) as cache:
        runtime = _runtime_units()
        total = len(program.modules) * (len(options.archs) + 1) + len(runtime) + 2
        done: list[str] = []

        def note(name: str) -> None:
            done.append(name)
            report("compile", len(done), total)

        futures = [cache.compile(unit, note) for unit in runtime]
        images, blob = _kernels(program, options, note)
        with (staging / "weights.bin").open("wb") as stream:
            hashes = write_weights(stream, program.tensors, graph.constants, report)
            program.uid = _uid(program, hashes)
            write_header(stream, program.weights_bytes, program.uid)
        flags = tuple(f for f in toolchain.KERNEL_FLAGS if f != "-O3")
        words = np.frombuffer(blob, "<u8").tolist()
        rows = [", ".join(f"{w:#x}u" for w in words[i : i + 8]) for i in range(0, len(words), 8)]
        data = render("model/cuda_images.cpp.j2", words=rows)
        version = 1000 * cuda_compiler.version[0] + 10 * cuda_compiler.version[1]
        text = render_model(program, images, version, _banner(program, memory))
        include = (resource_folder("runtime") / "include",)
        units = [
            toolchain.Unit("images", data, flags, {}),
            toolchain.Unit("model", text, flags, _headers(), include),
        ]
        futures += [cache.compile(unit, note) for unit in units]
        if options.keep_sources is not None:
            build.write_sources(options.keep_sources, _headers(), units[1:])
            for module in program.modules:
                (options.keep_sources / f"{module.name}.cu").write_text(module.text)
        report("link", 0, 1)
        build.link(
            compiler, cache, futures, staging, machine.system, options.form, _DYNAMIC_LOADING
        )
        if tokenizer is not None:
            tokenizer.save(staging)
        build.write_interface(staging, program, program.name, machine.system, options.form)
        build.finish(
            staging,
            {
                "manifest_version": MANIFEST_VERSION,
                "abi": ABI_VERSION,
                "name": program.name,
                "model_uid": program.uid.hex(),
                "target": {
                    "machine": program.isa,
                    "isa": program.isa,
                    "features": [],
                    "architecture": machine.architecture,
                    "system": machine.system,
                    "gpu": {
                        "machine_code": list(options.archs),
                        "ptx": options.archs[-1],
                        "cuda": ".".join(map(str, cuda_compiler.version)),
                    },
                },
                "source": source.metadata.to_json(),
                "config": source.config.to_json(),
                "plan": {
                    "target": program.isa,
                    "isa": program.isa,
                    "activations": options.activations,
                    "kv": program.kv,
                    "max_tokens": program.max_tokens,
                    "kernels": _choices(program, graph),
                },
                "memory": {
                    "activations_bytes": memory.arena_bytes,
                    "activations_lower_bound_bytes": memory.lower_bound_bytes,
                    "peak_node": memory.peak_node,
                    "arena_bytes": program.arena_bytes,
                    "arena_bytes_per_thread": 0,
                    "kv_bytes_per_position": program.kv_bytes,
                },
                "weights_read_per_token": _weights_read(graph, program),
                "launches_per_step": len(program.sequences[0].launches),
                "limits": {
                    "max_seq": program.max_seq,
                    "max_batch": program.max_batch,
                    "max_tokens": program.max_tokens,
                },
                "compiler": {
                    "version": compiler.version,
                    "flags": list(flags),
                    "cuda": cuda_compiler.label,
                    "objects_cached": cache.hits,
                    "objects_compiled": cache.misses,
                },
                "tensors": describe_tensors(program.tensors, graph.constants, hashes),
            },
        )
        report("link", 1, 1)


def _lower(
    graph: Graph, source: LanguageModel, memory: MemoryPlan, options: GpuOptions
) -> GpuProgram:
    sizes: list[int] = []

    def offsets_of(tensors: list[PackedTensor]) -> dict[str, int]:
        offsets, size = place_tensors(tensors, graph.constants)
        sizes.append(size)
        return offsets

    lowering = GpuLowering(
        graph, memory, options.kv, options.activations, options.max_seq, options.max_batch
    )
    program = lower_launches(
        lowering,
        offsets_of,
        name=build.shown_name(source.metadata.name),
        isa=",".join(options.archs),
        abi=ABI_VERSION,
        d_model=source.config.d_model,
        n_layers=source.config.n_layers,
    )
    program.weights_bytes = sizes[-1]
    return program


def _headers() -> dict[str, str]:
    """What the host's code of a GPU artifact includes beside the public headers."""
    runtime = resource_folder("runtime")
    files = [*sorted((runtime / "cuda").glob("*.h")), runtime / "src" / "device.h"]
    return {file.name: file.read_text() for file in files}


def _runtime_units() -> list[toolchain.Unit]:
    """The runtime and its part for GPUs."""
    runtime, headers = resource_folder("runtime"), _headers()
    folders = (runtime / "include", runtime / "src")
    return build.runtime_units() + [
        toolchain.Unit(file.stem, file.read_text(), toolchain.RUNTIME_FLAGS, headers, folders)
        for file in sorted((runtime / "cuda").glob("*.cpp"))
    ]


def _kernels(
    program: GpuProgram, options: GpuOptions, note: Any
) -> tuple[list[list[Image]], bytes]:
    """The images of every module, and the blob that holds them: machine code of every
    architecture, and PTX of the last."""
    wanted = [(arch, False) for arch in options.archs] + [(options.archs[-1], True)]

    def make(name: str, text: str, arch: str, ptx: bool) -> bytes:
        if ptx:
            made = cuda.compile_ptx(name, text, arch, lines=False).encode() + b"\0"
        else:
            made = cuda.compile_cubin(name, text, arch)
        note(name)
        return made

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [
            [pool.submit(make, module.name, module.text, arch, ptx) for arch, ptx in wanted]
            for module in program.modules
        ]
        made = [[future.result() for future in row] for row in futures]
    blob = bytearray()
    images: list[list[Image]] = []
    for row in made:
        images.append([])
        for (arch, ptx), code in zip(wanted, row, strict=True):
            images[-1].append(Image(int(arch.removeprefix("sm_")), ptx, len(blob), len(code)))
            blob += code + bytes(-len(code) % 16)
    return images, bytes(blob)


def _bits(argument: Argument) -> tuple[str, int]:
    """(kind in C++, the 64 bits of the value)."""
    kinds = {"arena": "kArena", "weights": "kWeights"}
    value = argument.value
    if argument.kind == "f32":
        return "kValue", int.from_bytes(struct.pack("<f", value), "little")
    assert isinstance(value, int), argument
    if argument.kind == "i32":
        return "kValue", value & 0xFFFFFFFF
    return kinds.get(argument.kind, "kValue"), value


def render_model(
    program: GpuProgram, images: Sequence[Sequence[Image]], cuda_version: int, banner: str
) -> str:
    """The source that describes the model to the runtime."""
    kernels = [(i, name) for i, module in enumerate(program.modules) for name in module.kernels]
    index = {name: i for i, (_, name) in enumerate(kernels)}
    arguments: list[tuple[str, int]] = []
    sequences: list[dict[str, Any]] = []
    known: dict[tuple[Argument, ...], int] = {}

    def place(launch: Launch) -> int:
        if launch.arguments not in known:
            known[launch.arguments] = len(arguments)
            arguments.extend(_bits(a) for a in launch.arguments)
        return known[launch.arguments]

    def rows(sequence: LaunchSequence) -> list[tuple[int, Launch, int]]:
        return [(index[n.kernel], n, place(n)) for n in sequence.launches]

    for sequence in program.sequences:
        sequences.append({"sequence": sequence, "launches": rows(sequence)})
    return render(
        "model/cuda_model.cpp.j2",
        model=program,
        banner=banner,
        images=images,
        kernels=kernels,
        arguments=arguments,
        sequences=sequences,
        cuda_version=cuda_version,
    )


def _uid(program: GpuProgram, hashes: Mapping[str, str]) -> bytes:
    """What ties the library to its weights: a hash of the launches and of every tensor."""
    text = json.dumps([repr(program.sequences), repr(program.modules), dict(hashes)])
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def _choices(program: GpuProgram, graph: Graph) -> list[dict[str, Any]]:
    """What the manifest's plan says of every product: no prediction of its time."""
    sizes = {
        (graph.values[name].dtype, *graph.values[name].shape): graph.constant_bytes(name)
        for name in graph.constants
        if len(graph.values[name].shape) == 2
    }
    return [
        {
            "name": kernel,
            "op": "matmul",
            "format": format,
            "n": n,
            "k": k,
            "m_bucket": m,
            "schedule": {"activations": _activations(kernel)},
            "bytes": sizes[format, n, k],
            "reason": "the only kernel for so many tokens; not measured on hardware",
        }
        for (format, n, k, m), kernel in program.kernels.items()
    ]


def _activations(kernel: str) -> str:
    """What a product multiplies weights with."""
    if not kernel.startswith("gemm"):
        return "f32"
    return "int4" if "_s4_" in kernel else "f16"


def _weights_read(graph: Graph, program: GpuProgram) -> int:
    """Bytes of packed matrices that a decode step streams: all but tables only looked up in."""
    streamed = {name for node in graph.nodes if node.op == "MatMulGroup" for name in node.inputs}
    return sum(
        graph.constant_bytes(tensor.name)
        for tensor in program.tensors
        if (tensor.spec is not None or tensor.form is not None) and tensor.name in streamed
    )


def _banner(program: GpuProgram, memory: MemoryPlan) -> str:
    return "\n".join(
        f"// {line}"
        for line in (
            f"{program.name}: one step of the model. Template: model/cuda_model.cpp.j2.",
            f"{program.isa}, KV cache {program.kv}; {len(program.sequences[0].launches)} launches "
            "a token.",
            f"Arena {program.arena_bytes:,} bytes ({memory.lower_bound_bytes:,} of activations "
            "live at the most),",
            f"{program.max_tokens} tokens a step, {program.max_seq} positions.",
        )
    )
