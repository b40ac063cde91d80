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
from qigen.backends.cpu.decode import ACTIVATION_GROUP, STEP, decode_plan
from qigen.backends.cpu.matmul import (
    DEFAULT_PREFETCH,
    INTEGER_ACTIVATIONS,
    MATRIX_TILE,
    PANEL,
    PANEL_TOKENS,
    PANEL_WEIGHTS,
    ActivationRecord,
    MatmulSpec,
    accumulator_bound,
    activation_needs,
    chains,
)
from qigen.costmodel.instructions import (
    COMPUTE,
    Count,
    counted,
    kernel_counts,
    primitives,
)
from qigen.formats.algebra import Format
from qigen.formats.layout import Layout, kblock_bytes, packed_bytes, packed_shape
from qigen.ir.plan import Resource
from qigen.targets import Machine
from qigen.targets.machine import Rates

TOKEN_TILES = (2, 3, 4, 6, 8, 10, 12)
"""Tokens of a register tile to consider besides 1."""

PREFETCH = (1024, 2048, 4096, 8192)
"""Prefetch distances to consider, in bytes, besides none at all."""

BLOCKS = (1, 2)
"""Source blocks of a K-block to consider: the inner loop is unrolled over a K-block. Where a vector
fills a cache line, two take 3 to 5 % less time than one, and four up to 6 % more (Ice Lake);
shorter vectors lose up to 17 % by two (Zen 3; benchmarks/costmodel_validation.py)."""

STREAMS = (1, 2, 4)
"""Row-blocks to consider that one token alone reads side by side."""

_UNROLLED = 128
"""Weights of a K-block of several source blocks at most: longer loops gain nothing."""

_OVERLAP = 5.0
_MATRIX_LATENCY = 52  # cycles of a product of tile registers (Intel, Optimization Reference Manual)
_FORWARD = 5  # cycles from a store to the load of the same bytes
_EXPOSED = 0.5  # of the shorter of computing and reading adds to the longer without prefetches
_CROWDED = 2  # times the registers: tiles that need more are not considered
TILE_CYCLES = 40.0  # of a tile: call, pipeline filling and draining, results
FULL = 0.8  # of a cache can be used before what is needed again gets lost
_SLAB = 64  # tokens of an f32 slab (templates/cpu/matmul_f32.cpp.j2)


@dataclass(frozen=True)
class Situation:
    """What a kernel is asked for and where: x [``m``, ``k``] times W [``n``, ``k``] on ``threads``
    threads of a machine.

    ``working_set`` are the bytes that pass through the caches from one call to the next (all
    weights of the model); if they fit into a cache level, the weights come from there, else (and by
    default) from memory.
    """

    n: int
    k: int
    m: int
    threads: int
    machine: Machine
    working_set: int | None = None

    @property
    def home(self) -> tuple[str, float]:
        """(where the weights come from, bytes a microsecond of all threads from there)."""
        machine, threads = self.machine, self.threads
        if self.working_set is not None:
            if self.working_set <= machine.l2_bytes * threads // 2:
                return "l2", machine.l2_gb_s * 1e3 * threads
            if self.working_set <= machine.l3_bytes // 2:
                far = machine.l3_gb_s * 1e3 * threads
                return "l3", max(far, machine.read_bandwidth(threads))
        return "memory", machine.read_bandwidth(threads)

    def weights(self, spec: MatmulSpec) -> _Weights:
        """How the weights lie for a kernel."""
        row_blocks, kblocks, size = packed_shape(spec.format, (self.n, self.k), spec.layout)
        return _Weights(
            row_blocks, kblocks, size, packed_bytes(spec.format, (self.n, self.k), spec.layout),
            -(-row_blocks // self.threads),
        )  # fmt: skip


@dataclass(frozen=True)
class _Weights:
    """A packed weight: row-blocks, K-blocks of each, bytes of a K-block and of all, and the
    row-blocks of the slowest thread."""

    row_blocks: int
    kblocks: int
    kblock_bytes: int
    nbytes: int
    per_thread: int


@dataclass(frozen=True)
class Prediction:
    """What one call takes: microseconds, bytes of weights and activations, instructions of all
    threads. ``limits`` are the microseconds that each resource alone would need; ``bound`` names
    the largest. ``traffic`` are bytes by the level that they come from, of all threads;
    ``roofline_us`` is what no kernel of this arithmetic can beat (see :func:`roofline`)."""

    us: float
    bytes: int
    instructions: float
    bound: str
    limits: Mapping[str, float]
    traffic: Mapping[str, float]
    roofline_us: float


def roofline(spec: MatmulSpec, at: Situation) -> tuple[float, float]:
    """(microseconds to read the packed weights, microseconds of the multiply-adds alone).

    The greater is the roofline: weights once from where they live, and as many dot products (or
    float multiply-adds) as the cores issue.
    """
    w, rates = at.weights(spec), rates_of(at.machine, spec.isa)
    primitive, steps = _MULTIPLY[spec.activations]
    each = primitives(spec.isa)[primitive]
    cycles = max(each.get(kind, 0.0) / rates.per_cycle[kind] for kind in ("dot", "fma"))
    if spec.matrix and at.m >= MATRIX_TILE:  # 16 rows by 16 tokens by 64 bytes along K in 16 cycles
        steps, cycles = 64, 1.0
    busy = min(at.threads, w.row_blocks)
    us = w.row_blocks * at.m * (at.k / steps) * cycles * 1e-3 / rates.ghz / busy
    return w.nbytes / at.home[1], us


_MULTIPLY = {
    "f32": ("vf_fma", 1), "bf16": ("vf_dot_bf16", 2), "int8": ("vq_dot", 4),
    "int8-token": ("vq_dot", 4), "int4": ("vq_dot", 4), "int4-token": ("vq_dot", 4),
}  # fmt: skip
"""The primitive that multiplies, and the weights of a row that it takes in each lane."""


def combined(values: Iterable[float]) -> float:
    """Time of resources that work side by side: the largest, and a bit more if others come near."""
    top = [v for v in values if v > 0]
    largest = max(top, default=0.0)
    if not largest:
        return 0.0
    return float(largest * sum((v / largest) ** _OVERLAP for v in top) ** (1 / _OVERLAP))


def registers(spec: MatmulSpec, tokens: int, rows: int) -> int:
    """Registers (of 16 lanes) that a tile keeps alive: accumulators, integer accumulators, the
    codes of a step, its activation, a scale or minimum of each row-block, and the factors of all
    the scales of a K-block where they are two-level."""
    if not spec.integer:
        return (5 if tokens == 1 else tokens + 2) + (spec.isa.vectors > 1)
    factors = spec.format.has("sub") + spec.format.has("submin")
    rows = rows if tokens > 1 else 1  # row-blocks of one token take turns
    return tokens * rows * 2 + (2 + factors) * rows + 1


def fits(spec: MatmulSpec, tokens: int, rows: int) -> bool:
    """Whether the tile stays in registers (the smallest tile always does)."""
    return tokens * rows == 1 or registers(spec, tokens, rows) <= spec.isa.registers


def rates_of(machine: Machine, isa: Isa) -> Rates:
    width = 512 // isa.vectors
    return machine.rates[min(machine.rates, key=lambda bits: abs(bits - width))]


def port_cycles(count: Count, rates: Rates, machine: Machine) -> dict[str, float]:
    """Cycles that each resource of a core needs for a count."""
    cycles = {
        kind: count[kind] / rates.per_cycle[kind] for kind in (*COMPUTE, "load", "store")
    }
    cycles["vector"] = sum(count[kind] for kind in COMPUTE) / rates.vector
    cycles["issue"] = count["instructions"] / machine.issue_width
    if count["tile"]:
        cycles["tile"] = count["tile"]  # cycles of the one unit that multiplies tile registers
    return cycles


@dataclass(frozen=True)
class _Tile:
    """A tile of a kernel: cycles of each resource for a K-block, of waiting for stored
    accumulators, and around the loop; instructions of a K-block and around the loop; whether it
    prefetches the weights."""

    resources: Mapping[str, float]
    waiting: float
    around: float
    instructions: float
    instructions_around: float
    prefetches: bool

    @property
    def cycles(self) -> float:
        return combined(self.resources.values()) + self.waiting


@functools.lru_cache(maxsize=4096)
def _unpack(spec: MatmulSpec, tokens: int, machine: Machine) -> tuple[float, float]:
    """(cycles, instructions) that a kernel takes to unpack a K-block into a panel."""
    count = kernel_counts(spec, tokens, 1).unpack
    cycles = combined(port_cycles(count, rates_of(machine, spec.isa), machine).values())
    return cycles, count["instructions"]


def tile_count(spec: MatmulSpec, tokens: int, rows: int, panel: bool = False) -> Count:
    """Instructions of a tile for one K-block, by class.

    That is what the kernel's text says, and what becomes of it: loads across two cache lines take
    their port twice, and accumulators that do not fit the registers are stored and loaded again.
    """
    counts = kernel_counts(spec, tokens, rows)
    count = counted(counts.panel if panel else counts.kblock)
    if not panel:  # whose vectors are aligned
        size = kblock_bytes(spec.format, spec.layout)
        count["load"] += count["stream"] * (1 - math.gcd(size, 64) / 64)
    moved = _moved(spec, tokens, rows)
    for kind in ("store", "load", "instructions"):
        count[kind] += moved
    return count


def _moved(spec: MatmulSpec, tokens: int, rows: int) -> int:
    """Registers that a tile stores and loads again in a K-block, as g++ 12 was seen to do it."""
    if not spec.integer or _matrix(spec, tokens) or fits(spec, tokens, rows):
        return 0
    rows = rows if tokens > 1 else 1
    weights, sums = spec.format.block * spec.layout.blocks, tokens * rows
    # float accumulators first: they are needed once a segment
    excess = registers(spec, tokens, rows) - spec.isa.registers
    segments = len(decode_plan(spec.format, spec.layout).segments)
    return min(excess, sums) * segments + max(0, excess - sums) * weights // STEP


def _matrix(spec: MatmulSpec, tokens: int) -> bool:
    """Whether a tile of so many tokens lies in tile registers."""
    return replace(spec, tiles=(tokens,)).matrix


@functools.lru_cache(maxsize=4096)
def _tile(
    spec: MatmulSpec, tokens: int, rows: int, machine: Machine, panel: bool = False
) -> _Tile:
    """One tile of a kernel, whichever tiles the kernel has; with ``panel`` that of an int8 kernel
    over unpacked weights."""
    count = tile_count(spec, tokens, rows, panel)
    rates, latency = rates_of(machine, spec.isa), machine.latency
    cycles = port_cycles(count, rates, machine)
    weights = spec.format.block * spec.layout.blocks
    if not spec.integer:
        steps = weights // 2 if spec.activations == "bf16" else weights
        if tokens == 1:  # row-blocks take turns
            steps *= rows
            steps //= chains(spec.isa) if spec.format.float_kind is None else 4
        cycles["latency"] = steps * latency["fma"]
    else:
        steps = weights // STEP
        plan = decode_plan(spec.format, spec.layout)
        segments = len(plan.segments)
        filled = count["instructions"] / segments / machine.window
        step = latency["dot" if spec.isa.dot_limit is None else "logic"]
        if _moved(spec, tokens, rows) >= steps:
            step += _FORWARD
        chain = plan.segment_length // STEP * step + latency["convert"] + 2 * latency["fma"]
        if _matrix(spec, tokens):
            chain = _MATRIX_LATENCY + _FORWARD + latency["convert"] + 2 * latency["fma"]
        sums = 2 if plan.has_minimum else 1
        turns = rows if tokens == 1 else 1  # one row-block after the other
        cycles["latency"] = turns * segments * max(
            chain * min(1.0, filled / turns), sums * latency["fma"]
        )
    around = kernel_counts(spec, tokens, rows).around
    return _Tile(
        cycles,
        _moved(spec, tokens, rows) if spec.isa.dot_limit is None else 0.0,
        combined(port_cycles(around, rates, machine).values()) + TILE_CYCLES,
        count["instructions"],
        around["instructions"],
        count["prefetch"] > 0 or not spec.integer,
    )


def panels(spec: MatmulSpec, m: int) -> bool:
    """Whether an int8 kernel unpacks weights into panels for m tokens."""
    return spec.panel and m // spec.tiles[0] >= spec.panel_tiles


def split(tiles: tuple[int, ...], m: int) -> dict[int, int]:
    """How often each register tile runs for m tokens: the largest first, as the kernels do."""
    times = {}
    for tile in tiles:
        times[tile], m = divmod(m, tile)
    return {tile: n for tile, n in times.items() if n}


@functools.lru_cache(maxsize=4096)
def activation_bytes(spec: MatmulSpec, k: int) -> int:
    """Bytes of one activation row as the kernel reads it; tiles do not matter."""
    block = spec.format.block * spec.layout.blocks
    if not spec.integer:
        return (2 if spec.activations == "bf16" else 4) * (-(-k // block) * block)
    zeros, sums = activation_needs(spec)
    step = math.lcm(block, ACTIVATION_GROUP)
    return ActivationRecord(
        -(-k // step) * step, spec.token_scale, zeros, sums
    ).nbytes


def predict(spec: MatmulSpec, at: Situation) -> Prediction:
    """What one call of a kernel takes."""
    machine, m, w = at.machine, at.m, at.weights(spec)
    # tiles are told apart below; the distance of a prefetch does not change the instructions
    alone = replace(spec, tiles=(1,), prefetch=DEFAULT_PREFETCH if spec.prefetch else 0)
    side = spec.row_tile if m > 1 else spec.streams
    kblocks, per_thread = w.kblocks, w.per_thread
    us = 1e-3 / rates_of(machine, spec.isa).ghz  # of a cycle
    x = activation_bytes(alone, at.k) * m

    limits: dict[str, float] = {}
    instructions = 0.0
    level, bandwidth = at.home
    limits[level] = w.nbytes / bandwidth
    late = _late(spec, at) if level == "memory" else 0.0
    time = 0.0
    pairs = per_thread // side if side > 1 else 0
    for rows, groups in ((side, pairs), (1, per_thread - pairs * side)):
        arriving = limits[level] * groups * rows / per_thread
        for tokens, times in split(spec.tiles, m).items() if groups else ():
            together = rows if tokens > 1 or m == 1 else 1
            panel = tokens == spec.tiles[0] and panels(spec, m)
            tile = _tile(alone, tokens, together, machine, panel)
            calls = groups * times * (rows // together)
            around = tile.around
            if panel:
                around *= -(-kblocks * spec.format.block * spec.layout.blocks // PANEL_WEIGHTS)
            one = (kblocks * tile.cycles + around) * us
            for name, cycles in tile.resources.items():
                limits[name] = limits.get(name, 0.0) + calls * kblocks * cycles * us
            # weights arrive while the first tile works; partly before, if nobody prefetches them
            # (those of a panel while all tiles work)
            first = groups * one * (times if panel else rows // together) if arriving else 0.0
            time += combined((arriving, first))
            time += _EXPOSED * min(arriving, first) * (late if tile.prefetches else 1.0)
            time += calls * one - first
            arriving = 0.0
            shared = calls * w.row_blocks / per_thread
            instructions += shared * (kblocks * tile.instructions + tile.instructions_around)
    if not spec.integer or panels(spec, m):
        slabs = -(-m // (PANEL_TOKENS if spec.integer else _SLAB))
        cycles, count = _unpack(alone, spec.tiles[0] if spec.integer else min(m, 2), machine)
        limits["unpack"] = per_thread * slabs * kblocks * cycles * us
        time += limits["unpack"]
        instructions += w.row_blocks * slabs * kblocks * count
    reload, traffic = _reload(spec, machine, kblocks * w.kblock_bytes, x, m)
    limits["reload"] = per_thread * reload
    time = combined((time, limits["reload"]))
    limits["barrier"] = machine.barrier_us if at.threads > 1 else 0.0
    bound = max(limits, key=lambda name: limits[name])
    moved = {near: w.row_blocks * bytes_ for near, bytes_ in traffic.items()}
    moved[level] = moved.get(level, 0.0) + w.nbytes
    # a tile reads the row-blocks and the activations of its tokens
    passes = sum(split(spec.tiles, m).values())
    moved["l1"] = w.nbytes * passes + w.row_blocks * x / side
    roof = max(roofline(spec, at))
    return Prediction(
        time + limits["barrier"], w.nbytes + x, instructions, bound, limits, moved, roof
    )


def resources(spec: MatmulSpec, at: Situation) -> list[Resource]:
    """What each resource has to do in one call: bytes by the level that they come from,
    instructions by class of port, the chain, the barrier."""
    prediction, machine, w = predict(spec, at), at.machine, at.weights(spec)
    limits, rates = prediction.limits, rates_of(machine, spec.isa)
    busy = w.row_blocks / w.per_thread  # threads, if all had as much as the slowest
    level, bandwidth = at.home
    found = [Resource(level, "bytes", w.nbytes, bandwidth / 1e3, limits[level])]
    block, x = w.kblocks * w.kblock_bytes, prediction.bytes - w.nbytes
    _, again = _reload(spec, machine, block, x, at.m)
    for near, nbytes in again.items():
        gb_s = {"l2": machine.l2_gb_s, "l3": machine.l3_gb_s}[near]
        if nbytes:
            us, moved = w.per_thread * nbytes / gb_s / 1e3, w.row_blocks * nbytes
            found.append(Resource(f"reload {near}", "bytes", moved, busy * gb_s, us))
    width = 64 / spec.isa.vectors  # bytes
    l1 = machine.l1_gb_s or rates.per_cycle["load"] * width * rates.ghz
    nbytes = prediction.traffic["l1"]
    found.append(Resource("l1", "bytes", nbytes, busy * l1, nbytes / (busy * l1 * 1e3)))
    cycles = rates.ghz * 1e3  # a microsecond
    ports = {**rates.per_cycle, "vector": rates.vector, "issue": machine.issue_width}
    for name, us in limits.items():
        if name in ports and us:
            amount = us * cycles * ports[name] * busy
            found.append(Resource(name, "instructions", amount, ports[name], us))
    for name in ("tile", "unpack", "latency"):
        if limits.get(name):
            found.append(Resource(name, "cycles", limits[name] * cycles, 0.0, limits[name]))
    if limits["barrier"]:
        found.append(Resource("barrier", "barriers", 1, 0.0, limits["barrier"]))
    return found


def _late(spec: MatmulSpec, at: Situation) -> float:
    """The part of a stream whose prefetches come too late: a line is asked for ``prefetch`` bytes
    ahead, and takes one access to memory, in which the thread would read so many."""
    ahead = at.machine.memory_ns * at.machine.read_bandwidth(at.threads) / 1e3 / at.threads
    return max(0.0, 1.0 - spec.prefetch * spec.streams / ahead) if spec.integer else 0.0


def _reload(
    spec: MatmulSpec, machine: Machine, block: int, x: int, m: int
) -> tuple[float, dict[str, float]]:
    """(microseconds, bytes by level) that one row-block takes from level 2 or 3 besides its first
    reading: itself, for every tile of tokens but the first, if it does not stay in level 1; and the
    activations."""
    tiles = sum(split(spec.tiles, m).values())
    rows = spec.row_tile if m > 1 else spec.streams  # read together
    near = FULL * machine.l1d_bytes
    if not spec.integer:
        block = 64 * PANEL  # an unpacked panel takes the place of the row-block
    elif panels(spec, m):
        block = 20 * PANEL_WEIGHTS // rows
    again = (tiles - 1) * block if rows * block + x / tiles > near else 0
    us = again / (machine.l2_gb_s * 1e3)
    if x + rows * block <= near:
        return us, {"l2": again}
    if x + rows * block <= FULL * machine.l2_bytes:
        return us + x / rows / (machine.l2_gb_s * 1e3), {"l2": again + x / rows}
    return us + x / rows / (machine.l3_gb_s * 1e3), {"l2": again, "l3": x / rows}


def layouts(format: Format, k: int, isa: Isa) -> tuple[Layout, ...]:
    """Layouts to consider: several source blocks a K-block, while they are short and divide K, and
    where a vector fills a cache line."""
    if format.float_kind is not None or isa.vectors > 1:
        return (Layout(16, 1),)
    return tuple(
        Layout(16, blocks)
        for blocks in BLOCKS
        if blocks == 1 or (blocks * format.block <= _UNROLLED and k % (blocks * format.block) == 0)
    )


def token_tiles(format: Format, isa: Isa, activations: str) -> tuple[int, ...]:
    """Tokens of register tiles besides 1 to consider, their accumulators proven not to overflow.

    A tile may need more registers than there are: decoding the weights once for more tokens can pay
    for the stores and loads of accumulators. Plain C++ keeps everything in memory: no tiles. Where
    there are tile registers, the sums of 16 tokens lie in one of them.
    """
    spec = MatmulSpec(format, Layout(16, 1), isa, activations, (1,))
    if spec.integer:
        accumulator_bound(decode_plan(format, spec.layout), isa)
    if not isa.features:
        return ()
    most = _CROWDED * isa.registers
    found = tuple(t for t in TOKEN_TILES if registers(spec, t, spec.row_tile) <= most)
    return (*found, MATRIX_TILE) if _matrix(spec, MATRIX_TILE) else found


def tile_lists(sizes: Iterable[int]) -> list[tuple[int, ...]]:
    """Tile lists to consider: at most three sizes, descending, the last one 1; the least code
    first."""
    sizes = sorted(sizes)
    pairs = [(first, second) for first in sizes for second in sizes if second < first]
    return [(1,), *((size, 1) for size in sizes), *((*pair, 1) for pair in pairs)]


def schedules(
    format: Format,
    k: int,
    isa: Isa,
    activations: str,
    machine: Machine,
    tiles: tuple[int, ...] | None = None,
) -> list[MatmulSpec]:
    """The schedules of a weight of ``k`` columns that the model tells apart, the simplest first, or
    those with a given list of tiles; Unsupported if the codes overflow the ISA's accumulators."""
    lists = tile_lists(token_tiles(format, isa, activations)) if tiles is None else [tiles]
    alone = MatmulSpec(format, Layout(16, 1), isa, activations, (1,))
    most = machine.streams if alone.integer or alone.single else 1
    most = most if isa.features else 1
    prefetch = prefetch_distance(machine, most)
    return [
        MatmulSpec(
            format,
            layout,
            isa,
            activations,
            chosen,
            prefetch,
            most,
        )
        for layout in layouts(format, k, isa)
        for chosen in lists
    ]


def space(
    format: Format, k: int, isa: Isa, activations: str, machine: Machine
) -> list[MatmulSpec]:
    """Every schedule that can be rendered for a weight of ``k`` columns, the simplest first.

    That is every layout, list of register tiles, prefetch distance and number of streams.
    :func:`schedules` is the part of it whose distance and streams are the model's choice: in the
    model no others are faster.
    """
    if activations not in INTEGER_ACTIVATIONS:  # panels have a prefetch distance of their own
        return schedules(format, k, isa, activations, machine)
    best = schedules(format, k, isa, activations, machine, (1,))[0].prefetch
    distances = (best, *(d for d in (0, *PREFETCH) if d != best))
    return [
        replace(spec, prefetch=distance, streams=streams or spec.streams)
        for streams in (0, *STREAMS)  # the model's choice first
        for distance in distances
        for spec in schedules(format, k, isa, activations, machine)
        if streams != spec.streams
    ]


def prefetch_distance(machine: Machine, streams: int = 1) -> int:
    """Bytes ahead of a stream that a prefetch must run: what arrives during one access to memory,
    twice over, as accesses take longer when the memory is busy; several streams share that. No
    farther: what is asked for behind a thread's last row is of no use, and small matrices end
    soon."""
    ahead = 2 * machine.memory_ns * machine.read_gb_s[0] / streams
    return next((d for d in PREFETCH if d >= ahead), PREFETCH[-1])
