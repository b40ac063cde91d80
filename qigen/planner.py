"""The planner: which kernel, with which schedule, for every matrix of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa import by_name as isa_by_name
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.errors import UsageError
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout, packed_shape
from qigen.ir.graph import Graph, constant_shape
from qigen.ir.ops.fused import group_parts
from qigen.ir.plan import KernelChoice, Plan, ScheduleValue
from qigen.targets import Machine

BUCKETS = (1, 4, 16, 128)
ACTIVATIONS = ("auto", "f32", "bf16", "int8", "int8-token")
_TILES = {"avx512bf16": (8, 4, 1), "avx512vnni": (8, 4, 1), "avx2": (2, 1), "scalar": (1,)}


def isa_candidates(machine: Machine) -> tuple[Isa, ...]:
    """The ISA rows that the machine can run, the fastest first."""
    return tuple(isa for isa in reversed(ISAS.values()) if machine.has(isa.features))


def matrices(graph: Graph) -> Iterator[tuple[str, int, int]]:
    """(format, n, k) of every distinct matrix that a kernel reads, in the order of use."""
    seen: set[tuple[str, int, int]] = set()
    for node in graph.nodes:
        if node.op == "MatMulGroup":
            names = group_parts(node).weights
        elif node.op == "Embedding":
            names = (node.inputs[1],)
        else:
            continue
        for name in names:
            n, k = constant_shape(graph.constants[name])
            key = (graph.values[name].dtype, n, k)
            if key not in seen:
                seen.add(key)
                yield key


def activations_for(format_name: str, asked: str) -> str:
    """The arithmetic of a matmul: 'auto' is int8 for integer formats, f32 for float formats."""
    if asked not in ACTIVATIONS:
        raise UsageError(f"activations '{asked}' are not one of {', '.join(ACTIVATIONS)}")
    if asked == "bf16":
        return "bf16"
    if by_name(format_name).float_kind is not None:
        return "f32"
    return "int8" if asked == "auto" else asked


def plan_model(
    graph: Graph,
    *,
    isa: Isa,
    machine: Machine,
    activations: str = "auto",
    kv: str = "f16",
    threads: int = 1,
    max_tokens: int | None = None,
    max_seq: int = 2048,
    max_batch: int = 1,
    measured: Mapping[tuple[str, str, int, int, int, str], float] | None = None,
) -> Plan:
    """The plan of a fused graph."""
    kernels = []
    for name, n, k in matrices(graph):
        spec = MatmulSpec(
            by_name(name), Layout(16, 1), isa, activations_for(name, activations), _TILES[isa.name]
        )
        row_blocks, kblocks, size = packed_shape(spec.format, (n, k), spec.layout)
        for m in BUCKETS:
            kernels.append(
                KernelChoice(
                    name=spec.name,
                    op="matmul",
                    format=name,
                    n=n,
                    k=k,
                    m_bucket=m,
                    schedule=schedule_of(spec),
                    predicted_us=0.0,
                    predicted_bytes=row_blocks * kblocks * size,
                    predicted_instructions=0.0,
                    bound="memory",
                )
            )
    return Plan(
        target=machine.name,
        isa=isa.name,
        activations=activations,
        kv=kv,
        threads_hint=threads,
        max_tokens=max(max_batch, min(max_tokens or 128, max_seq)),
        kernels=tuple(kernels),
    )


def schedule_of(spec: MatmulSpec) -> dict[str, ScheduleValue]:
    """The schedule of a kernel as a plan stores it."""
    return {
        "activations": spec.activations,
        "rows": spec.layout.rows,
        "blocks": spec.layout.blocks,
        "tiles": ",".join(map(str, spec.tiles)),
        "prefetch": spec.prefetch,
    }


def spec_for(plan: Plan, format: str, n: int, k: int) -> MatmulSpec:
    """The kernel that a plan gives to a matrix; BadInput if it has none."""
    s = plan.find("matmul", format, n, k, 1).schedule
    return MatmulSpec(
        by_name(format),
        Layout(int(s["rows"]), int(s["blocks"])),
        isa_by_name(plan.isa),
        str(s["activations"]),
        tuple(int(t) for t in str(s["tiles"]).split(",")),
        int(s["prefetch"]),
    )
