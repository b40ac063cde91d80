"""Every elementwise row, and fused loops over broadcast operands, against numpy in float64."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.elementwise import (
    ELEMENTWISE,
    LoopSpec,
    Row,
    Step,
    chain_reference,
    render_loops,
)
from qigen.backends.cpu.isa import ISAS
from tests.backends.cpu.entry_build import LOOP_SANITIZERS, build, load, run
from tests.backends.cpu.kernel_build import compiler, why_not

Array = npt.NDArray[Any]


class LoopArgs(ctypes.Structure):
    """``qg::LoopArgs`` of loop.h."""

    _fields_ = [("rank", ctypes.c_int32), ("shape", ctypes.c_int64 * 8),
                ("inputs", ctypes.c_void_p * 8), ("strides", ctypes.c_int64 * 8 * 8),
                ("out", ctypes.c_void_p * 4)]


PARAMS: dict[str, tuple[float, ...]] = {
    "const": (0.7,), "leaky_relu": (0.1,), "clip": (-1.5, 2.5), "hard_sigmoid": (0.2, 0.5),
    "swish": (1.702,), "elu": (1.3,), "celu": (1.5,), "selu": (1.67326319, 1.05070102),
    "thresholded_relu": (1.0,), "shrink": (0.5, 0.25), "quantize": (0.037, 3.0),
}  # fmt: skip
EDGES = np.array([0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 8388607.5, -4194304.5,
                  1e-45, -1e-45, 1.1754942e-38, 6e-8, -3e-8, 88.3, 88.72, 88.73, -87.4, -103.9,
                  -104, 20, -20, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan], np.float32)

# -- rows --

def row_spec(isa: Isa, row: Row) -> LoopSpec:
    inputs = tuple(f"in{i}" for i in range(row.operands))
    step = Step(row.name, inputs, PARAMS.get(row.name, ()))
    return LoopSpec(isa, (step,), ("f32",) * row.operands, (("t0", "f32"),))


# -- fused loops --

QUANTIZED = (Step("const", (), (128.0,)), Step("sub", ("in0", "t0")), Step("mul", ("t1", "in1")),
             Step("add", ("t2", "in2")), Step("relu", ("t3",)),
             Step("quantize", ("t4",), (0.05, 7)))


def loop_specs(isa: Isa) -> dict[str, LoopSpec]:
    """Loops of several types, inputs and outputs."""
    f32 = (Step("add", ("in0", "in1")), Step("sigmoid", ("t0",)), Step("mul", ("t1", "in2")))
    return {
        "f32": LoopSpec(isa, f32, ("f32",) * 3, (("t2", "f32"),)),
        "two": LoopSpec(isa, f32, ("f32",) * 3, (("t0", "f32"), ("t2", "f32"))),
        "u8": LoopSpec(isa, QUANTIZED, ("u8", "f32", "f32"), (("t4", "f32"), ("t5", "u8"))),
        "s8": LoopSpec(isa, QUANTIZED, ("s8", "bf16", "i32"), (("t4", "bf16"), ("t5", "s8"))),
        "copy": LoopSpec(isa, (), ("f32",), (("in0", "f32"),)),
    }  # fmt: skip


_made: dict[str, ctypes.CDLL] = {}


def library(isa: Isa, folder: Path, sanitize: bool = False) -> ctypes.CDLL:
    """The library of an ISA; the sanitizers get the loops, as rows touch no memory."""
    if isa.name not in _made:
        specs = list(loop_specs(isa).values())
        if not sanitize:
            specs += [row_spec(isa, row) for row in ELEMENTWISE.values()]
        kernel = render_loops("loops", specs)
        struct = dict.fromkeys(kernel.entries, "LoopArgs")
        path = build(folder, isa, [kernel], "loop.h", struct, LOOP_SANITIZERS * sanitize)
        _made[isa.name] = load(path, [LoopArgs])
    return _made[isa.name]


@pytest.fixture(params=ISAS.values(), ids=lambda isa: isa.name)
def built(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> tuple[Isa, ctypes.CDLL]:
    """An ISA that this machine has, and its library."""
    isa: Isa = request.param
    if why_not(isa):
        pytest.skip(why_not(isa))
    return isa, library(isa, pytestconfig.cache.mkdir("kernels"))


def compute(lib: ctypes.CDLL, spec: LoopSpec, inputs: Sequence[Array], shape: tuple[int, ...],
            threads: int = 1, out: Sequence[Array] = ()) -> list[Array]:
    """The outputs of a loop over inputs that are broadcast to ``shape``."""
    types = {"f32": np.float32, "u8": np.uint8, "s8": np.int8, "bf16": np.uint16}
    results = list(out) or [np.full(shape, 77, types[kind]) for _, kind in spec.outputs]
    args = LoopArgs(rank=len(shape))
    for i, size in enumerate(shape):
        args.shape[i] = size
    for k, x in enumerate(inputs):
        args.inputs[k] = x.ctypes.data
        view = np.broadcast_to(x, shape)
        for axis in range(len(shape)):
            # numpy leaves any stride on axes of one element, as the callers may
            args.strides[k][axis] = view.strides[axis] // x.itemsize
    for k, y in enumerate(results):
        args.out[k] = y.ctypes.data
    run(lib, spec.name, args, threads)
    return results


def operands(row: Row, rng: np.random.Generator) -> list[Array]:
    """Edge values, in all pairs if there are two operands, and random ones of all magnitudes."""
    n = 3000
    columns = [np.concatenate([rng.normal(0, 3, n), rng.uniform(-100, 100, n),
                               rng.choice([-1, 1], n) * np.exp(rng.uniform(-100, 88, n))])
               .astype(np.float32) for _ in range(row.operands)]
    edges = [EDGES] if row.operands == 1 else zip(*itertools.product(*[EDGES] * row.operands),
                                                  strict=True)
    return [np.concatenate([np.array(e, np.float32), c])
            for e, c in zip(edges, columns, strict=True)]


def wrong(got: Array, want: Array, ulps: float, near: float) -> Array:
    """Which float32 results are neither within ulps nor near, NaN for NaN."""
    rounded = want.astype(np.float32)
    unit = np.spacing(np.abs(rounded)).astype(np.float64)
    unit = np.where(np.isinf(rounded), np.spacing(np.float32(3e38)), unit)
    limit = np.clip(want, -3.4028235e38, 3.4028235e38)  # from here on infinity is as near
    value = np.clip(got.astype(np.float64), -3.4028235e38, 3.4028235e38)
    off = np.abs(value - limit)
    close = (off <= ulps * unit * 1.001) | (off <= near)
    return np.asarray(np.where(np.isnan(want), ~np.isnan(got), np.isnan(got) | ~close))


def check_row(lib: ctypes.CDLL, isa: Isa, row: Row) -> None:
    x = operands(row, np.random.default_rng(len(row.name)))
    shape = x[0].shape if x else (100,)
    got, = compute(lib, row_spec(isa, row), x, shape, threads=2)
    params = [float(np.float32(p)) for p in PARAMS.get(row.name, ())]
    with np.errstate(all="ignore"):
        want = np.broadcast_to(row.meaning(*(a.astype(np.float64) for a in x), *params), shape)
        bad = wrong(got, want.astype(np.float64), row.ulps, row.near)
    worst = [(*(float(a[i]) for a in x), float(got[i]), float(want[i])) for i in np.nonzero(bad)[0]]
    assert not worst, f"{len(worst)} wrong: operands, got, want: {worst[:8]}"


def bf16(x: Array) -> Array:
    """The bits of the nearest bf16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.asarray(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def widened(x: Array) -> Array:
    """The float32 values of an input, uint16 holding the bits of bf16."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else \
        x.astype(np.float32)


def random_input(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Elements of an input type, of sizes that become no infinities."""
    values = np.asarray(rng.normal(0, 2, shape), np.float32)
    if kind == "f32":
        return values
    if kind == "bf16":
        return bf16(values / np.float32(20))
    low, high, dtype = {"u8": (0, 256, np.uint8), "s8": (-128, 128, np.int8),
                        "i32": (-9, 9, np.int32)}[kind]
    return np.asarray(rng.integers(low, high, shape), dtype)


# shape of the outputs, shapes of three inputs
SHAPES: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = [
    ((1,), [(1,), (1,), (1,)]),
    ((), [(), (), ()]),
    ((0, 3), [(0, 3), (1, 3), (0, 1)]),
    ((1000,), [(1000,), (1,), (1000,)]),
    ((3, 5, 67), [(3, 5, 67), (5, 1), (67,)]),
    ((2, 3, 16, 5), [(2, 3, 16, 5), (3, 1, 1), (1, 1, 16, 5)]),  # short rows
    ((7, 300, 3), [(7, 300, 3), (3,), (7, 1, 1)]),
    ((2, 1, 31, 1, 33), [(2, 1, 31, 1, 33), (2, 1, 1, 1, 33), (31, 1, 1)]),
    ((5, 4, 640), [(1, 4, 640), (5, 1, 640), (5, 4, 1)]),
]


def check_loops(lib: ctypes.CDLL, isa: Isa) -> None:
    rng = np.random.default_rng(3)
    for (name, spec), (shape, shapes) in itertools.product(loop_specs(isa).items(), SHAPES):
        x = [random_input(kind, of, rng)
             for kind, of in zip(spec.inputs, shapes[: len(spec.inputs)], strict=True)]
        compare(lib, spec, x, shape, f"{name} {shape}")
    # strides that are neither 0 nor 1, and in place
    spec = loop_specs(isa)["f32"]
    base = rng.normal(0, 1, (40, 3, 70, 2)).astype(np.float32)
    views = [base[:, 0, :, 0], base.transpose(3, 1, 2, 0)[0, 0].T, base[:, 2, ::-1, 1]]
    compare(lib, spec, views, (40, 70), "strided")
    small = [v[:, :9] for v in views]
    compare(lib, spec, small, (40, 9), "strided, short rows")
    x = [rng.normal(0, 1, (9, 45)).astype(np.float32) for _ in range(3)]
    want, = compute(lib, spec, x, (9, 45))
    for k in range(3):
        y = [a.copy() for a in x]
        assert np.array_equal(compute(lib, spec, y, (9, 45), out=[y[k]])[0], want)


def compare(lib: ctypes.CDLL, spec: LoopSpec, x: Sequence[Array], shape: tuple[int, ...],
            label: str) -> None:
    values = {f"in{i}": np.broadcast_to(widened(a), shape) for i, a in enumerate(x)}
    results = compute(lib, spec, x, shape)
    for threads in (2, 3):
        again = compute(lib, spec, x, shape, threads)
        assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True)), label
    for (name, kind), got in zip(spec.outputs, results, strict=True):
        want = np.asarray(values[name] if name in values else
                          chain_reference(spec.steps[: int(name[1:]) + 1], values), np.float64)
        want = np.broadcast_to(want, shape)
        if kind == "f32":
            assert np.allclose(got, want, rtol=1e-6, atol=1e-6), label
        elif kind == "bf16":
            assert np.array_equal(got, bf16(want)), label
        else:
            low, high = (0, 255) if kind == "u8" else (-128, 127)
            assert np.array_equal(got, np.clip(want, low, high).astype(got.dtype)), label


@pytest.mark.parametrize("row", ELEMENTWISE.values(), ids=lambda row: row.name)
def test_row(row: Row, built: tuple[Isa, ctypes.CDLL]) -> None:
    check_row(built[1], built[0], row)


def test_loops(built: tuple[Isa, ctypes.CDLL]) -> None:
    check_loops(built[1], built[0])


def test_specification_is_checked() -> None:
    with pytest.raises(AssertionError, match="comes before its arguments"):
        LoopSpec(ISAS["scalar"], (Step("neg", ("t0",)),), ("f32",), (("t0", "f32"),))
    with pytest.raises(AssertionError):
        LoopSpec(ISAS["scalar"], (Step("clip", ("in0",), (1.0,)),), ("f32",), (("t0", "f32"),))


def sanitized(isa_name: str, folder: str) -> None:
    """What the child process below runs."""
    isa = ISAS[isa_name]
    lib = library(isa, Path(folder), sanitize=True)
    check_loops(lib, isa)


def run_sanitized(module: str, isa: Isa, folder: Path) -> None:
    """Call ``module.sanitized`` in a child process that has AddressSanitizer in it."""
    asan = subprocess.run([compiler() or "g++", "-print-file-name=libasan.so"], check=True,
                          capture_output=True, text=True).stdout.strip()
    code = f"import {module} as m; m.sanitized({isa.name!r}, {str(folder)!r})"
    root = Path(__file__).parents[3]
    # numpy's arrays come from malloc: accesses beyond them are seen
    child = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0",
             "PYTHONMALLOC": "malloc", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=child, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_sanitizers(pytestconfig: pytest.Config) -> None:
    if why_not(ISAS["scalar"]):
        pytest.skip(why_not(ISAS["scalar"]))
    run_sanitized(__name__, ISAS["scalar"], pytestconfig.cache.mkdir("kernels"))
