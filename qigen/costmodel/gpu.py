"""Lower bounds of the time of GPU kernels, and an order of schedules. Not measured on hardware.

A GEMM (:mod:`qigen.backends.cuda.gemm`) cannot take less time than any of its resources needs:

- ``memory``: the packed weight, activations, results and parts of shared tiles, each byte once
  (what comes again stays in level 2), by the bandwidth that the maker publishes;
- ``issue``: instructions of the main loop, read from the machine code, one a cycle from each of the
  four schedulers of a multiprocessor;
- ``tensor``: products of whole tiles, by the published rate;
- ``shared``: wavefronts of shared memory, one a cycle.

The last three are those of the busiest multiprocessor, so that waves that are not full count whole.
The latency of memory, launches, barriers and the epilogue are left out: a bound is never a
prediction, and only the order of schedules of one kernel is made from it. Devices are rows of
``gpu_devices.toml``, each with its source.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qigen.backends.cuda.gates import Measured, measure
from qigen.backends.cuda.gemm import (
    GemmSpec,
    Schedule,
    check_schedule,
    render_gemm,
)
from qigen.backends.cuda.gemm_packing import gemm_bytes
from qigen.errors import Unsupported, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

NOTE = "not measured on hardware"
"""What stands beside every number of this module."""

_SCHEDULERS = 4  # of a multiprocessor; each has a quarter of the registers
_REGISTER_UNIT = 256  # registers are given to a warp in such pieces
_SHARED_UNIT = 128
_RESERVED_SHARED = 1024  # of every block, from compute capability 8.0 on


@dataclass(frozen=True)
class Device:
    """A row of published data. Clock in GHz, bandwidth in GB/s (1e9 bytes), tensor rates in 1e12
    operations a second (dense), limits of one multiprocessor."""

    arch: str
    name: str
    source: str
    sms: int
    ghz: float
    memory_gb_s: float
    l2_bytes: int
    tensor_f16_tflops: float
    tensor_s8_tops: float
    registers: int
    shared_bytes: int
    block_shared_bytes: int
    threads: int
    blocks: int


@functools.lru_cache(maxsize=1)
def devices() -> dict[str, Device]:
    """The rows by target."""
    text = Path(__file__).with_name("gpu_devices.toml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = tomllib.loads(text)
    return {arch: Device(arch=arch, **row) for arch, row in table.items()}


def device(arch: str) -> Device:
    """The row of a target; UsageError names those that there are."""
    if arch not in devices():
        raise UsageError(f"there is no data of a device for {arch}; choose among "
                         f"{', '.join(devices())}")
    return devices()[arch]


@dataclass(frozen=True)
class Bytes:
    """What a launch moves to and from device memory: every byte once, parts written and read."""

    weights: int
    activations: int
    results: int
    parts: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.results + self.parts


def _shares(spec: GemmSpec, m: int, n: int, k: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """(block, tile, steps) of every part of a tile that a block takes, as the kernel counts."""
    steps, tiles = spec.steps(k), spec.tiles(m, n)
    for block in range(blocks):
        at, end = steps * tiles * block // blocks, steps * tiles * (block + 1) // blocks
        while at < end:
            tile = at // steps
            last = min((tile + 1) * steps, end)
            yield block, tile, last - at
            at = last


def bytes_moved(spec: GemmSpec, m: int, n: int, k: int, blocks: int) -> Bytes:
    """Bytes of a launch of ``blocks`` blocks for x [m, k] and W [n, k].

    Holds while activations, results and parts of shared tiles fit into level 2.
    """
    steps = spec.steps(k)
    tiles_n = spec.tiles(1, n)
    parts = 0
    for _, tile, taken in _shares(spec, m, n, k, blocks):
        if taken < steps:
            left = m - tile // tiles_n * spec.rows
            # a lane writes rows r and r + 8 together, or (sparse) 2 r and 2 r + 1 of 8:
            # two such lanes are a sector
            tile, sparse = spec.decoding.tile, spec.decoding.sparse
            lefts = [max(0, left - tile * i) for i in range(spec.schedule.m_tiles)]
            rows = sum(min(4, 2 * -(-part // 4)) if sparse else min(8, part) for part in lefts)
            parts += 2 * rows * 512 * spec.schedule.warps_n
    out = 2 if spec.out == "f16" else 4
    activations = m * -(-k * spec.decoding.x_bits // 256) * 32
    return Bytes(gemm_bytes(spec, n, k), activations, m * n * out, parts)


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds at a time, and what keeps it from holding more."""

    blocks: int
    warps: int
    limit: str


def occupancy(row: Device, registers: int, shared: int, threads: int) -> Occupancy:
    """From registers a thread, shared memory a block and threads a block, by the rules of the CUDA
    occupancy calculator. No block at all if one needs more than there is."""
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    warps_held = row.registers // _SCHEDULERS // warp_registers * _SCHEDULERS
    taken = -(-(shared + _RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    limits = {
        "registers": warps_held // warps,
        "shared memory": row.shared_bytes // taken if shared <= row.block_shared_bytes else 0,
        "threads": row.threads // (warps * 32),
        "blocks": row.blocks,
    }
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limits[limit] * warps, limit)


@dataclass(frozen=True)
class Bound:
    """Lower bounds of a launch in microseconds by resource, and how full it leaves the device.

    ``balance`` is the mean work of a multiprocessor by that of the busiest one.
    """

    spec: GemmSpec
    blocks: int
    occupancy: Occupancy
    waves: int
    balance: float
    bytes: Bytes
    microseconds: dict[str, float]

    @property
    def resource(self) -> str:
        """What needs the most time."""
        return max(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def least(self) -> float:
        """The bound: no less than this many microseconds."""
        return self.microseconds[self.resource]

    def describe(self) -> str:
        """One line for people."""
        each = ", ".join(f"{name} {value:.1f}" for name, value in self.microseconds.items())
        return (f"{self.spec.name} x {self.blocks} blocks: at least {self.least:.1f} us "
                f"({each}; {self.occupancy.blocks} blocks a multiprocessor by "
                f"{self.occupancy.limit}, {self.waves} waves, balance {self.balance:.2f}); {NOTE}")


def bound(row: Device, spec: GemmSpec, m: int, n: int, k: int, blocks: int = 0,
          code: Measured | None = None) -> Bound:
    """Lower bounds of y [m, n] = x [m, k] W^T on a device.

    ``code`` is what the machine code has (:func:`qigen.backends.cuda.gates.measure`); without it
    the kernel is compiled for ``row.arch``. Raises Unsupported if no block fits the device.
    """
    s, d = spec.schedule, spec.decoding
    code = code or measure(spec.name, render_gemm(spec), row.arch)
    held = occupancy(row, code.registers, spec.shared_bytes, spec.block[0])
    if not held.blocks:
        raise Unsupported(f"a block does not fit {row.name}: {held.limit}", spec.name)
    blocks = spec.grid(m, n, k, blocks)[0]
    work = spec.tiles(m, n) * spec.steps(k)
    most = -(-blocks // row.sms) * -(-work // blocks)  # steps of the busiest multiprocessor
    warps = s.warps_n * s.warps_k
    # loops over units that are not unrolled run again for each
    times = 1 if s.m_tiles <= 2 else s.depth // spec.unit
    gather = 2 if d.name == "table2" else 1
    wavefronts = times * warps * (4 * code.loads128 + gather * code.loads + 4 * code.ldmatrix)
    wavefronts += spec.stage_bytes // 128
    products = 2 * spec.rows * 64 * s.warps_n * spec.block_depth
    if d.sparse:
        products //= 2  # half of the products of a mask are never made
    rate = row.tensor_s8_tops if d.integer else row.tensor_f16_tflops
    moved = bytes_moved(spec, m, n, k, blocks)
    cycle_us = 1e-3 / row.ghz
    times_us = {
        "memory": moved.total / row.memory_gb_s * 1e-3,
        "issue": most * times * warps * code.slots / _SCHEDULERS * cycle_us,
        "tensor": most * products * row.sms / rate * 1e-6,
        "shared": most * wavefronts * cycle_us,
    }
    return Bound(spec, blocks, held, -(-blocks // (row.sms * held.blocks)),
                 work / (most * row.sms), moved, times_us)


def candidates(spec: GemmSpec, m: int) -> list[GemmSpec]:
    """Schedules worth comparing for ``m`` rows of x: those that the template takes."""
    tiles = min(-(-m // spec.decoding.tile), spec.most_tiles)
    found = []
    for m_tiles in sorted({tiles, max(1, tiles - 1)}, reverse=True):
        for warps_n, warps_k, depth, stages in ((1, 4, 32, 4), (1, 2, 64, 4), (2, 2, 64, 4),
                                                (2, 4, 32, 4), (4, 2, 64, 3), (4, 1, 128, 3)):
            tried = replace(spec, schedule=Schedule(m_tiles, warps_n, warps_k, depth, stages))
            try:
                check_schedule(tried)
            except Unsupported:
                continue
            found.append(tried)
    return found


def choose(row: Device, spec: GemmSpec, m: int, n: int, k: int) -> list[Bound]:
    """Bounds of all candidates, each with one block a tile and with as many blocks as the device
    holds (Stream-K), the least first; those that spill are left out.

    Of equal bounds the one with more warps at a time comes first: they hide more latency.
    """
    found = []
    for tried in candidates(spec, m):
        code = measure(tried.name, render_gemm(tried), row.arch)
        if code.spills:
            continue
        held = occupancy(row, code.registers, tried.shared_bytes, tried.block[0])
        if not held.blocks:
            continue
        for blocks in {0, row.sms * held.blocks}:
            found.append(bound(row, tried, m, n, k, blocks, code))
    return sorted(found, key=lambda b: (round(b.least, 3), sum(b.microseconds.values()),
                                        -b.occupancy.warps))
