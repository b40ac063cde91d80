"""Every primitive of every ISA header against its numpy meaning, on edge and random inputs."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa.primitives import (
    ELEMENTWISE,
    KINDS,
    PRIMITIVES,
    TILE_NAMES,
    Operand,
    Primitive,
    names,
)
from qigen.codegen.render import render
from tests.backends.cpu.kernel_build import (
    EMULATED_TILES,
    build,
    call_primitive,
    load,
    why_not,
)

Array = npt.NDArray[Any]

ALL = (*PRIMITIVES, *ELEMENTWISE)
ROWS = {**ISAS, EMULATED_TILES.name: EMULATED_TILES}


def needed(p: Primitive, isa: Isa) -> bool:
    return (
        (not p.narrow or isa.signed_dot)
        and (not p.limited or isa.dot_limit is not None)
        and (not p.tiles or isa.tiles)
    )


CASES = [(isa, index) for isa in ISAS.values() for index, p in enumerate(ALL) if needed(p, isa)]
CASES += [(EMULATED_TILES, index) for index, p in enumerate(ALL) if p.tiles]
RANDOM = 4096  # values of a random argument

EDGES = {
    "float32": np.array([0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 4194303.5,
                         4194304.5, 8388607.5, 8388608.0, -4194304.5, 1e-45, -1e-45, 1.1754942e-38,
                         1.17549435e-38, 6.1e-5, 5.96e-8, 2.98e-8, 65504, 65519.996, 65520, -65520,
                         3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan], np.float32),
    "int32": np.array([0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**23 + 1, 2**24 + 1, 2**30,
                       2**31 - 1, -(2**31), 0x0F0F0F0F, -0x0F0F0F10], np.int32),
}


def half_way() -> Array:
    """float32: every finite f16, the points half way to the next one, and their neighbours."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / np.float32(2)
    around = [np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf)]
    points = np.concatenate([halves, middles, *around]).astype(np.float32)
    return np.concatenate([points, -points])


def values(operand: Operand, rng: np.random.Generator) -> tuple[Array, Array]:
    """(edge values, random values) of an operand, both one-dimensional."""
    dtype = np.dtype(KINDS[operand.kind][0])
    if operand.low is None or operand.high is None:
        raw = rng.integers(0, 256, RANDOM * dtype.itemsize, dtype=np.uint8).view(dtype)
        if dtype.itemsize <= 2:
            return np.arange(1 << 8 * dtype.itemsize).astype(f"u{dtype.itemsize}").view(dtype), raw
        if dtype == np.float32:
            raw[::2] = rng.normal(0, 8, len(raw[::2]))
        return EDGES[dtype.name], raw
    low, high = operand.low, operand.high
    if dtype == np.float32:
        near = rng.normal(0, 4, RANDOM // 2)
        # small magnitudes and the whole range, with its ends
        raw = np.concatenate([np.linspace(low, high, RANDOM // 4), near,
                              np.exp(rng.uniform(-80, 5, RANDOM // 4))]).astype(dtype)
        edges = EDGES["float32"][np.isfinite(EDGES["float32"])]
        return edges[(edges >= low) & (edges <= high)], raw[(raw >= low) & (raw <= high)]
    raw = rng.integers(int(low), int(high), RANDOM, endpoint=True).astype(dtype)
    edges = [v for v in (low, high, 0, 1) if low <= v <= high]
    return np.array(edges, np.int64).astype(dtype), raw


def arguments(p: Primitive, rng: np.random.Generator) -> list[Array]:
    """Arrays [cases, count]: the product of the edges first, then random values."""
    both = [values(operand, rng) for operand in p.arguments]
    if len(both) == 1:
        columns = [np.concatenate(both[0])]
        if p.arguments[0] == Operand("vf"):
            columns = [np.concatenate([columns[0], half_way()])]
    else:
        edges = [e if len(e) < 64 else rng.choice(e, 16) for e, _ in both]
        product = list(zip(*itertools.product(*edges), strict=True))
        columns = [np.concatenate([np.array(column, e.dtype), r[:RANDOM // 2]])
                   for column, (e, _), (_, r) in zip(product, both, both, strict=True)]
    # One value a lane. The lanes of all arguments stay side by side where the kinds have as many.
    most = max((KINDS[o.kind][1] for o in p.arguments), default=1)
    cases = max(-(-len(c) // most) for c in columns) if columns else 1
    if any(KINDS[o.kind][1] == 1 for o in p.arguments):
        cases = max(cases, 256)
    return [np.resize(c, (cases, KINDS[o.kind][1]))
            for c, o in zip(columns, p.arguments, strict=True)]


def ordered(x: Array) -> Array:
    """int64 that counts float32 values in order: neighbours differ by one."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def agrees(got: Array, want: Array, ulps: float) -> Array:
    """Which elements are equal, NaN for NaN, or for floats within ``ulps``."""
    if got.dtype != np.float32:
        return np.asarray(got == want)
    near = np.abs(ordered(got) - ordered(want)) <= ulps
    return np.asarray(np.where(np.isnan(want), np.isnan(got), near & ~np.isnan(got)))


@pytest.fixture(scope="module")
def libraries(pytestconfig: pytest.Config) -> dict[str, ctypes.CDLL]:
    folder = pytestconfig.cache.mkdir("kernels")
    return {isa.name: load(build(folder, isa, primitives=[p for p in ALL if needed(p, isa)]))
            for isa in ROWS.values() if not why_not(isa)}


@pytest.mark.parametrize(("isa", "index"), CASES,
                         ids=lambda v: ALL[v].label if isinstance(v, int) else v.name)
def test_primitive(isa: Any, index: int, libraries: dict[str, ctypes.CDLL]) -> None:
    if why_not(isa):
        pytest.skip(why_not(isa))
    p = ALL[index]
    mine = [q for q in ALL if needed(q, isa)]
    if p.name == "vq_dot":  # codes up to what the ISA takes
        high = min(isa.code_max, (isa.dot_limit or 1 << 16) // 254)
        p = replace(p, arguments=(p.arguments[0], Operand("vb", 0, high), p.arguments[2]))
    given = arguments(p, np.random.default_rng(index))
    got = call_primitive(libraries[isa.name], mine.index(ALL[index]), p, given)
    with np.errstate(all="ignore"):
        want = p.meaning(*given).astype(KINDS[p.result][0], copy=False)
        right = agrees(got, want, p.ulps)
        if p.result == "half*":  # the payload of a NaN is free
            right |= np.isnan(got.view(np.float16)) & np.isnan(want.view(np.float16))
        if p.or_else is not None:
            right |= agrees(got, p.or_else(*given), p.ulps)
    case, lane = (int(i[0]) for i in np.nonzero(~right)) if not right.all() else (0, 0)
    assert right.all(), (f"{p.expression}: {int((~right).sum())} of {right.size} wrong; "
                         f"case {case} lane {lane}: {got[case, lane]!r} for {want[case, lane]!r} "
                         f"of {[a[case].tolist()[:64] for a in given]}")


def test_half_precision_is_exhaustive(libraries: dict[str, ctypes.CDLL]) -> None:
    load_f16 = next(p for p in PRIMITIVES if p.name == "vf_load_f16")
    assert len(np.unique(arguments(load_f16, np.random.default_rng(0))[0])) == 1 << 16


@pytest.mark.parametrize("isa", ROWS.values(), ids=lambda isa: isa.name)
def test_header_is_complete(isa: Any) -> None:
    """A header defines each primitive of the table and nothing else under their prefixes."""
    header = render(isa.template)
    found = set(re.findall(r"^ *QG_(?:INLINE|CALL) \w+ (v[fibqt]_\w+)\(", header, re.M))
    some = {p.name for p in PRIMITIVES if needed(p, isa) and not p.tiles}
    assert found == names() | some | (set(TILE_NAMES) if isa.tiles else set())


@pytest.mark.parametrize("isa", [i for i in ISAS.values()
                                 if i.architecture in ("", "x86_64") and not i.tiles],
                         ids=lambda isa: isa.name)
def test_ir_is_complete(isa: Any) -> None:
    """templates/llvm/primitives.ll.j2 has what the llvm backend needs in place of the header; its
    code generator has the shifts by constants itself."""
    text = render("llvm/primitives.ll.j2", isa=isa, features=list(isa.features))
    found = set(re.findall(r"^define internal .+? @(v[fibq]_?\w+?)(?:_\d)?\(", text, re.M))
    some = {p.name for p in PRIMITIVES if needed(p, isa)}
    assert (names() | some) - {"vi_srl", "vi_sll", "vi_sra"} <= found
