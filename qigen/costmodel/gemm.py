"""Predicted time of the gemm family: products and convolutions of graphs, by their register tiles.

A call has pixels (rows of x) by output channels in row-blocks of 16. The kernel cuts both into
tiles, deals them out over a grid of threads and takes as many tiles of pixels together as leave
their x in level 2, while the row-blocks pass (templates/cpu/gemm.cpp.j2). Time is that of the
resource that binds the slowest thread, as in :mod:`qigen.costmodel.matmul`; instructions are those
of the ISA's primitives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from qigen.backends.base import Isa
from qigen.backends.cpu.gemm import LANES, Tiles, row_block_bytes, steps, tiles_for
from qigen.costmodel.instructions import Count, counted, primitives
from qigen.costmodel.matmul import FULL, TILE_CYCLES, combined, port_cycles, rates_of
from qigen.errors import QigenError
from qigen.targets import Machine

_PRIMITIVES = {
    "f32": ("vf_fma", "vf_load"), "f32s8": ("vf_fma", "vf_load_i8"),
    "bf16": ("vf_dot_bf16", "vi_load"), "u8s8": ("vi_dot_u8s8", "vi_load"),
}  # fmt: skip
"""By arithmetic: what multiplies a step of x by 16 channels, and what loads their weights."""

PIXELS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24)
"""Pixels of a tile to consider."""

_FINISH = 6.0  # instructions of an output vector: bias, scale, chain, rounding, store


@dataclass(frozen=True)
class GemmShape:
    """A product or convolution as the kernel sees it: ``columns`` x ``rows`` x ``images`` pixels,
    of which neighbours are merged where x and y have no gaps, by ``n`` output channels; a sum has
    ``taps`` x ``k`` products. ``pixel``, ``row`` and ``image`` are bytes from one pixel, row or
    image of x to the next, ``offsets`` those from a pixel to what its taps read; the latter three
    follow each other without gaps if they are not given."""

    n: int
    k: int
    taps: int
    columns: int
    rows: int
    images: int
    pixel: int
    row: int = 0
    image: int = 0
    offsets: tuple[int, ...] = ()

    @property
    def pixels(self) -> int:
        """Rows of y."""
        return self.columns * self.rows * self.images

    @property
    def row_bytes(self) -> int:
        """Bytes from a row of x to the next."""
        return self.row or self.columns * self.pixel

    @property
    def image_bytes(self) -> int:
        """Bytes from an image of x to the next."""
        return self.image or self.rows * self.row_bytes

    @property
    def last_pixel(self) -> int:
        """Bytes from the first pixel to the last."""
        return (
            (self.images - 1) * self.image_bytes
            + (self.rows - 1) * self.row_bytes
            + (self.columns - 1) * self.pixel
        )

    def tap_offsets(self, arithmetic: str) -> tuple[int, ...]:
        """Bytes from a pixel to each of its taps."""
        return self.offsets or tuple(4 * steps(self.k, arithmetic) * t for t in range(self.taps))


@dataclass(frozen=True)
class GemmPrediction:
    """Microseconds of a call; ``limits`` are those that each resource alone would need, ``bound``
    names the largest."""

    us: float
    bound: str
    limits: Mapping[str, float]


def candidates(isa: Isa, arithmetic: str) -> tuple[Tiles, ...]:
    """The register tiles to consider, the rule's own (:func:`tiles_for`) first: all whose sums and
    weights stay in the registers that it fills, with every block of x for level 2."""
    own = tiles_for(isa, arithmetic)
    if own.matrix or not isa.features:  # tile registers have one shape; plain C++ has no registers
        return (own,)
    room = own.pixels * own.blocks + own.blocks
    found = {own: None}
    for blocks in (1, 2):
        for pixels in PIXELS:
            if blocks * (pixels + 1) > room:
                continue
            tall = max((p for p in (1, 2, 4) if p <= pixels and 2 * blocks * (p + 1) <= room),
                       default=0)  # fmt: skip
            for size in (1 << 16, 1 << 17, 1 << 18, 1 << 19):
                found[Tiles(pixels, blocks, tall, size)] = None
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _step(isa: Isa, arithmetic: str, pixels: int, blocks: int) -> Count:
    """Instructions of one step of a tile: 4 bytes of x of every pixel by the weights.

    Where a product is emulated, it splits both operands (shift and logic): x once for each pixel,
    weights once for each row-block.
    """
    table, (multiply, load) = primitives(isa), _PRIMITIVES[arithmetic]
    count = counted({})
    for name, times in ((multiply, pixels * blocks), (load, blocks)):
        for kind, n in table[name].items():
            if kind == "broadcast":
                continue
            if name == multiply and kind in ("shift", "logic"):
                n, times = n / 2, pixels + blocks
            elif name == multiply:
                times = pixels * blocks
            count[kind] += n * times
            count["instructions"] += n * times
    # what is broadcast from memory is loaded once a pixel
    count["load"] += pixels
    count["instructions"] += pixels + 4  # and the loop's own
    return count


def _split(shape: GemmShape, pixels: int) -> tuple[int, dict[int, float]]:
    """(tiles, the part of them by their pixels), as the kernel cuts them: a row into tiles that
    differ by one pixel at most."""
    length, rows = shape.columns, shape.rows * shape.images
    if length < pixels and rows > length:  # the longer loop is cut
        length, rows = rows, length
    per_row = -(-length // pixels)
    least, larger = divmod(length, per_row)
    parts = {least: 1 - larger / per_row, least + 1: larger / per_row}
    return per_row * rows, {size: part for size, part in parts.items() if part}


def _share(tiles: int, blocks: int, threads: int) -> tuple[int, int]:
    """(tiles, row-blocks) of the slowest thread in the grid that the kernel takes."""
    grids = []
    for columns in range(1, min(threads, blocks) + 1):
        rows = min(threads // columns, tiles)
        grids.append((-(-tiles // rows), -(-blocks // columns)))
    return min(grids, key=lambda grid: grid[0] * grid[1])


def predict_gemm(
    tiles: Tiles, arithmetic: str, shape: GemmShape, isa: Isa, threads: int, machine: Machine,
    cached: bool = False,
) -> GemmPrediction:  # fmt: skip
    """What one call takes; with ``cached`` its weights come from level 3, else from memory."""
    rates = rates_of(machine, isa)
    us = 1e-3 / rates.ghz  # of a cycle
    cut, parts = _split(shape, tiles.pixels)
    most = max(parts)
    row_blocks = -(-shape.n // LANES)
    mine, own = _share(cut, row_blocks, threads)
    at_once = 2 * tiles.blocks if tiles.tall and most <= tiles.tall else tiles.blocks
    count = steps(shape.k, arithmetic) * shape.taps
    block = row_block_bytes(shape.taps, shape.k, arithmetic)
    # tiles whose x stays in level 2 while the row-blocks pass
    tile_bytes = most * max(shape.pixel, 4 * steps(shape.k, arithmetic))
    group = max(1, min(mine, tiles.block_bytes // max(1, tile_bytes)))
    groups = -(-mine // group)

    limits: dict[str, float] = {}
    time = 0.0
    passes = [(at_once, own // at_once)]
    rest = own % at_once
    while rest:
        blocks = 1 << (rest.bit_length() - 1)
        passes.append((blocks, 1))
        rest -= blocks
    table = counted(primitives(isa)[_PRIMITIVES[arithmetic][0]])
    latency = machine.latency["dot" if table["dot"] else "fma" if table["fma"] else "logic"]
    for blocks, times in passes:
        if not times:
            continue
        work = 0.0
        for pixels, part in parts.items():
            cycles = port_cycles(_step(isa, arithmetic, pixels, blocks), rates, machine)
            cycles["latency"] = latency
            around = TILE_CYCLES + _FINISH * pixels * blocks * isa.vectors / machine.issue_width
            calls = times * mine * part
            for name, value in cycles.items():
                limits[name] = limits.get(name, 0.0) + calls * count * value * us
            work += calls * (count * combined(cycles.values()) + around) * us
        near = FULL * machine.l1d_bytes
        again = blocks * block if blocks * block + tile_bytes > near else 0
        reload = times * (mine - groups) * again / (machine.l2_gb_s * 1e3)
        reload += times * mine * tile_bytes / (machine.l2_gb_s * 1e3)
        limits["reload"] = limits.get("reload", 0.0) + reload
        time += combined((work, reload))
    total = row_blocks * block
    far = machine.l3_gb_s * 1e3 * threads
    home = "l3" if cached else "memory"
    weights = total / (far if cached else machine.read_bandwidth(threads))
    weights += (groups - 1) * total / far
    spilled = max(0, group * tile_bytes - int(FULL * machine.l2_bytes))
    if spilled:  # more x than level 2 holds passes with every row-block
        limits["l2 missed"] = own / at_once * groups * group * tile_bytes / (machine.l3_gb_s * 1e3)
        time = combined((time, limits["l2 missed"]))
    limits[home] = weights
    time = combined((time, weights))
    limits["barrier"] = machine.barrier_us if threads > 1 else 0.0
    bound = max(limits, key=lambda name: limits[name])
    return GemmPrediction(time + limits["barrier"], bound, limits)


MeasuredTiles: TypeAlias = Mapping[tuple[str, Tiles, GemmShape], float]
"""Microseconds of a call by (arithmetic, tiles, shape), measured with all threads; infinity if the
kernel crashed or was wrong, so that it is never chosen."""


@dataclass(frozen=True)
class TileChoice:
    """The tiles of a kernel and what the calls of it take with them, with the rule's own and with
    the runners-up: as predicted, or all as ``measured``."""

    tiles: Tiles
    us: float
    predicted_us: float
    rule_us: float
    bound: str
    runners_up: tuple[tuple[Tiles, float], ...]
    measured: bool = False


_WORTH = 0.04  # of the time: for less the rule's own tiles stay
_NOISE = 0.01  # the same of measured times
_RUNNERS_UP = 4


def weight_bytes(arithmetic: str, shapes: Iterable[GemmShape]) -> int:
    """Bytes of the packed weights of calls."""
    return sum(-(-s.n // LANES) * row_block_bytes(s.taps, s.k, arithmetic) for s in shapes)


def ranked_tiles(
    arithmetic: str, shapes: Iterable[GemmShape], isa: Isa, threads: int, machine: Machine,
    cached: bool,
) -> dict[Tiles, float]:  # fmt: skip
    """Predicted microseconds of all calls together by tiles, the rule's own first."""
    every = list(shapes)
    return {
        tiles: sum(
            predict_gemm(tiles, arithmetic, s, isa, threads, machine, cached).us for s in every
        )
        for tiles in candidates(isa, arithmetic)
    }


def _measured_times(
    arithmetic: str, shapes: Iterable[GemmShape], measured: MeasuredTiles
) -> dict[Tiles, float]:
    """Microseconds of all calls together by tiles, of those that all were measured with."""
    every = list(shapes)
    known = {tiles for of, tiles, _ in measured if of == arithmetic}
    times = {t: sum(measured.get((arithmetic, t, s), math.nan) for s in every) for t in known}
    return {tiles: us for tiles, us in times.items() if us < math.inf}


def choose_tiles(
    arithmetic: str, shapes: Iterable[GemmShape], isa: Isa, threads: int, machine: Machine,
    cached: bool | None = None, measured: MeasuredTiles | None = None,
) -> TileChoice:  # fmt: skip
    """The tiles that all calls of one kernel together take the least time with.

    ``cached``: the weights come from level 3 (default: if those of the calls fit in half of it).
    Where the rule's own tiles were ``measured`` for all calls, only what was measured counts.
    """
    every = list(shapes)
    if cached is None:
        cached = weight_bytes(arithmetic, every) <= machine.l3_bytes // 2
    own = tiles_for(isa, arithmetic)
    times = _measured_times(arithmetic, every, measured or {})
    bad = {tiles for (of, tiles, _), us in (measured or {}).items()
           if of == arithmetic and math.isinf(us)}  # fmt: skip
    predicted = ranked_tiles(arithmetic, every, isa, threads, machine, cached)
    counts = own in times or (own in bad and bool(times))
    if not counts:
        times = {tiles: us for tiles, us in predicted.items() if tiles not in bad}
    if not times:
        raise QigenError(f"no kernel for {arithmetic} products works on this machine")
    best = min(times, key=lambda tiles: times[tiles])
    worth = _NOISE if counts else _WORTH
    chosen = best if times[best] < (1 - worth) * times.get(own, math.inf) else own
    calls = [predict_gemm(chosen, arithmetic, s, isa, threads, machine, cached) for s in every]
    bound = max(calls, key=lambda p: p.us).bound
    ranked = sorted((t for t in times if t != chosen), key=lambda tiles: times[tiles])
    # block sizes alone make no difference to most: one of each register tile
    shown: dict[tuple[int, int], Tiles] = {}
    for tiles in ranked:
        shown.setdefault((tiles.pixels, tiles.blocks), tiles)
    return TileChoice(
        chosen, times[chosen], sum(p.us for p in calls), times.get(own, math.inf), bound,
        tuple((t, times[t]) for t in list(shown.values())[:_RUNNERS_UP]), counts,
    )  # fmt: skip

