"""Predicted time of matmul kernels.

A call multiplies m activation rows by a packed weight. Each thread takes its share of the
row-blocks; for each of them it goes through the tokens tile by tile. Its time is that of the
resource that binds it:

- ``memory`` (or ``l3``, ``l2``): the packed weights, streamed once from where they live;
- ``reload``: row-blocks and activations that come again from level 2 because level 1 is too small;
- ``vector``, ``load``, ``dot`` ...: ports, by the instructions counted in the rendered kernel;
- ``issue``: instructions of any kind;
- ``latency``: chains of dependent instructions that the reorder window cannot hide.

Resources that are nearly as busy as the binding one delay it: they are combined by a p-norm whose
exponent was fitted to measurements (benchmarks/cost_model.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qigen.backends.base import Isa
from qigen.backends.cpu.decode import STEP, decode_plan
from qigen.backends.cpu.matmul import (
    PANEL,
    ActivationRecord,
    MatmulSpec,
    accumulator_bound,
    activation_needs,
)
from qigen.costmodel.instructions import COMPUTE, Count, kernel_counts
from qigen.errors import Unsupported
from qigen.formats.algebra import Format
from qigen.formats.layout import Layout, kblock_bytes, packed_shape
from qigen.targets import Machine
from qigen.targets.machine import Rates

TOKEN_TILES = (2, 3, 4, 6, 8, 10, 12, 16)
"""Register tiles to consider besides 1."""

PREFETCH = (1024, 2048, 4096, 8192)
"""Prefetch distances to consider, in bytes."""

_OVERLAP = 4.0
_TILE_CYCLES = 40.0
_SLAB = 64  # tokens of an f32 slab (templates/cpu/matmul_f32.cpp.j2)


@dataclass(frozen=True)
class Prediction:
    """What one call takes: microseconds, bytes of weights and activations, instructions of all
    threads. ``limits`` are the microseconds that each resource alone would need; ``bound`` names
    the largest."""

    us: float
    bytes: int
    instructions: float
    bound: str
    limits: Mapping[str, float]


def _together(values: Iterable[float]) -> float:
    """Time of resources that work side by side: the largest, and a bit more if others come near."""
    top = [v for v in values if v > 0]
    largest = max(top, default=0.0)
    if not largest:
        return 0.0
    return float(largest * sum((v / largest) ** _OVERLAP for v in top) ** (1 / _OVERLAP))


def registers(spec: MatmulSpec, tokens: int) -> int:
    """Registers (of 16 lanes) that a tile keeps alive: accumulators, integer accumulators, the
    codes of a step, a scale and a minimum or broadcast."""
    if spec.activations == "f32":
        return (5 if tokens == 1 else tokens + 2) + (spec.isa.vectors > 1)
    return tokens * (1 + _accumulator(spec.isa)) + 3


def _accumulator(isa: Isa) -> int:
    """Registers of an integer accumulator: a narrow and a wide one if 16-bit lanes are flushed."""
    return 1 if isa.dot_limit is None else 2


def fits(spec: MatmulSpec, tokens: int) -> bool:
    """Whether the tile stays in registers (a tile of one token is always allowed)."""
    return tokens == 1 or registers(spec, tokens) <= spec.isa.registers


def _rates(machine: Machine, isa: Isa) -> Rates:
    return machine.rates[512 if isa.vectors == 1 else 256]


def _port_cycles(count: Count, rates: Rates, machine: Machine) -> dict[str, float]:
    """Cycles that each resource of a core needs for a count."""
    cycles = {
        kind: count[kind] / rates.per_cycle[kind] for kind in (*COMPUTE, "load", "store")
    }
    cycles["vector"] = sum(count[kind] for kind in COMPUTE) / rates.vector
    cycles["issue"] = count["instructions"] / machine.issue_width
    return cycles


@dataclass(frozen=True)
class _Tile:
    """Cycles of one tile: of each resource for a K-block, around the loop; instructions."""

    kblock: Mapping[str, float]
    around: float
    instructions: float
    instructions_around: float

    @property
    def cycles(self) -> float:
        return _together(self.kblock.values())


@functools.lru_cache(maxsize=4096)
def _decode_cycles(spec: MatmulSpec, machine_key: _Key) -> tuple[float, float]:
    """(cycles, instructions) of an f32 kernel to unpack a K-block."""
    machine = machine_key.machine
    count = kernel_counts(spec, 1).decode
    cycles = _together(_port_cycles(count, _rates(machine, spec.isa), machine).values())
    return cycles, count["instructions"]


class _Key:
    """A machine as a cache key: rows are compared by identity."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __hash__(self) -> int:
        return id(self.machine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.machine is self.machine


@functools.lru_cache(maxsize=4096)
def _tile(spec: MatmulSpec, tokens: int, key: _Key) -> _Tile:
    machine = key.machine
    counts = kernel_counts(spec, tokens)
    rates = _rates(machine, spec.isa)
    count = Count(counts.kblock)
    weights = spec.format.block * spec.layout.blocks
    steps = weights // STEP
    size = kblock_bytes(spec.format, spec.layout)
    # loads across two cache lines take the port twice
    count["load"] += count["stream"] * (1 - math.gcd(size, 64) / 64)
    spilled = not fits(spec, tokens)
    if spec.activations != "f32" and spilled:
        # accumulators that do not fit are stored and loaded again in every step
        moved = steps * tokens * spec.isa.vectors
        count["store"] += moved
        count["load"] += moved
        count["instructions"] += moved
    cycles = _port_cycles(count, rates, machine)
    latency = machine.latency
    if spec.activations == "f32":
        chains = 4 if tokens == 1 else 1
        cycles["latency"] = weights * latency["fma"] / chains
    else:
        plan = decode_plan(spec.format, spec.layout)
        segments = len(plan.segments)
        dot = latency["dot"] if spec.isa.dot_limit is None else latency["logic"]
        chain = plan.segment_length // STEP * dot + latency["convert"] + 2 * latency["fma"]
        at_once = max(1.0, machine.window * segments / count["instructions"])
        sums = 2 if plan.has_minimum else 1
        cycles["latency"] = segments * max(chain / at_once, sums * latency["fma"])
    around = _together(_port_cycles(counts.around, rates, machine).values())
    return _Tile(
        cycles, around + _TILE_CYCLES, count["instructions"], counts.around["instructions"] + 30
    )


def split(tiles: tuple[int, ...], m: int) -> dict[int, int]:
    """How often each register tile runs for m tokens: the largest first, as the kernels do."""
    times = {}
    for tile in tiles:
        times[tile], m = divmod(m, tile)
    return {tile: n for tile, n in times.items() if n}


def activation_bytes(spec: MatmulSpec, k: int) -> int:
    """Bytes of one activation row as the kernel reads it."""
    block = spec.format.block * spec.layout.blocks
    if spec.activations == "f32":
        return 4 * (-(-k // block) * block)
    zeros, sums = activation_needs(spec)
    step = math.lcm(block, 32)
    return ActivationRecord(
        -(-k // step) * step, spec.activations == "int8-token", zeros, sums
    ).nbytes


def predict(
    spec: MatmulSpec,
    n: int,
    k: int,
    m: int,
    threads: int,
    machine: Machine,
    working_set: int | None = None,
) -> Prediction:
    """What one call of a kernel takes for x [m, k] and W [n, k] on ``threads`` threads.

    ``working_set`` is what passes through the caches from one call to the next (all weights of the
    model); if it fits into a cache level, the weights come from there, else (and by default) from
    memory.
    """
    key = _Key(machine)
    row_blocks, kblocks, size = packed_shape(spec.format, (n, k), spec.layout)
    per_thread = -(-row_blocks // threads)
    ghz = _rates(machine, spec.isa).ghz
    us = 1e-3 / ghz  # of a cycle
    weights = row_blocks * kblocks * size
    x = activation_bytes(spec, k) * m

    limits: dict[str, float] = {}
    core = 0.0
    instructions = 0.0
    for tokens, times in split(spec.tiles, m).items():
        tile = _tile(spec, tokens, key)
        calls = per_thread * times
        core += calls * (kblocks * tile.cycles + tile.around) * us
        for name, cycles in tile.kblock.items():
            limits[name] = limits.get(name, 0.0) + calls * kblocks * cycles * us
        total = row_blocks * times
        instructions += total * (kblocks * tile.instructions + tile.instructions_around)
    if spec.activations == "f32" and spec.format.float_kind != "f32":
        slabs = -(-m // _SLAB)
        cycles, count = _decode_cycles(replace(spec, tiles=(1,)), key)
        limits["decode"] = per_thread * slabs * kblocks * cycles * us
        core += limits["decode"]
        instructions += row_blocks * slabs * kblocks * count

    level, bandwidth = _home(machine, threads, working_set)
    limits[level] = weights / bandwidth
    limits["reload"] = per_thread * _reloaded(spec, machine, kblocks * size, x, m) / (
        machine.l2_gb_s * 1e3
    )
    time = _together((core, limits[level], limits["reload"]))
    limits["barrier"] = machine.barrier_us if threads > 1 else 0.0
    bound = max(limits, key=lambda name: limits[name])
    return Prediction(time + limits["barrier"], weights + x, instructions, bound, limits)


def _home(machine: Machine, threads: int, working_set: int | None) -> tuple[str, float]:
    """(where the weights come from, bytes a microsecond of all threads from there)."""
    if working_set is not None:
        if working_set <= machine.l2_bytes * threads // 2:
            return "l2", machine.l2_gb_s * 1e3 * threads
        if working_set <= machine.l3_bytes // 2:
            return "l3", max(machine.l3_gb_s * 1e3 * threads, machine.read_bandwidth(threads))
    return "memory", machine.read_bandwidth(threads)


def _reloaded(spec: MatmulSpec, machine: Machine, block: int, x: int, m: int) -> float:
    """Bytes that one thread gets from level 2 for one row-block, its first reading apart."""
    tiles = sum(split(spec.tiles, m).values())
    if spec.activations == "f32":
        # a panel is unpacked once a slab and stays in level 1; x passes by for every row-block
        return float(x if x + 64 * PANEL > machine.l1d_bytes else 0)
    again = (tiles - 1) * block if block + x / max(tiles, 1) > 0.8 * machine.l1d_bytes else 0
    return float(again + (x if x + block > 0.8 * machine.l1d_bytes else 0))


@dataclass(frozen=True)
class Candidate:
    """A schedule of one weight and what it takes in each m bucket."""

    spec: MatmulSpec
    predictions: Mapping[int, Prediction]


def layouts(format: Format, k: int) -> tuple[Layout, ...]:
    """Layouts to consider: two source blocks a K-block where one is no whole number of lines."""
    one = Layout(16, 1)
    if kblock_bytes(format, one) % 64 == 0 or format.float_kind is not None:
        return (one,)
    two = Layout(16, 2)
    return (one, two) if k % (2 * format.block) == 0 else (one,)


def token_tiles(format: Format, isa: Isa, activations: str) -> tuple[int, ...]:
    """Register tiles besides 1 that fit, and whose accumulators are proven not to overflow."""
    spec = MatmulSpec(format, Layout(16, 1), isa, activations, (1,))
    if activations != "f32":
        accumulator_bound(decode_plan(format, spec.layout), isa)
    return tuple(t for t in TOKEN_TILES if fits(spec, t))


def tile_lists(sizes: Iterable[int]) -> list[tuple[int, ...]]:
    """Tile lists to consider: at most three sizes, descending, the last one 1."""
    sizes = sorted(sizes, reverse=True)
    lists: list[tuple[int, ...]] = [(1,)]
    for i, first in enumerate(sizes):
        lists.append((first, 1))
        lists += [(first, second, 1) for second in sizes[i + 1 :]]
    return lists


def candidates(
    format: Format,
    n: int,
    k: int,
    *,
    isa: Isa,
    machine: Machine,
    activations: str,
    threads: int,
    buckets: Iterable[int],
    tiles: Iterable[tuple[int, ...]] | None = None,
    working_set: int | None = None,
) -> list[Candidate]:
    """Every schedule of a weight with its predictions; Unsupported if there is none."""
    buckets = tuple(buckets)
    if tiles is None:
        tiles = tile_lists(token_tiles(format, isa, activations))
    prefetch = prefetch_distance(machine)
    found = []
    for layout in layouts(format, k):
        for chosen in tiles:
            spec = MatmulSpec(format, layout, isa, activations, chosen, prefetch)
            found.append(
                Candidate(
                    spec,
                    {m: predict(spec, n, k, m, threads, machine, working_set) for m in buckets},
                )
            )
    if not found:
        raise Unsupported(f"no schedule of {format.name} fits {isa.name}")
    return found


def prefetch_distance(machine: Machine) -> int:
    """Bytes ahead of the stream that a prefetch must run: what arrives during one access to memory,
    twice over, as accesses take longer when the memory is busy."""
    ahead = 2 * machine.memory_ns * machine.read_gb_s[0]
    return next((d for d in PREFETCH if d >= ahead), PREFETCH[-1])
