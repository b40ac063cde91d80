"""Operators along rows and on NHWC images, against numpy in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.rowops import ENTRIES, MAX_HEAD_DIM, render_rowops
from tests.backends.cpu.entry_build import LOOP_SANITIZERS, build, load, run
from tests.backends.cpu.kernel_build import why_not
from tests.backends.cpu.test_elementwise import run_sanitized

Array = npt.NDArray[Any]

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class SoftmaxArgs(ctypes.Structure):
    """``qg::SoftmaxArgs`` of rowops.h."""

    _fields_ = [("x", _P), ("x_stride", _L), ("y", _P), ("y_stride", _L), ("rows", _L), ("n", _L),
                ("scale", _F), ("mask", _P), ("shape", _L * 3), ("mask_stride", _L * 3)]


class NormArgs(ctypes.Structure):
    """``qg::NormArgs``."""

    _fields_ = [("x", _P), ("x_stride", _L), ("residual", _P), ("residual_stride", _L), ("y", _P),
                ("y_stride", _L), ("sum", _P), ("sum_stride", _L), ("weight", _P), ("bias", _P),
                ("rows", _L), ("n", _L), ("eps", _F)]


class ReduceArgs(ctypes.Structure):
    """``qg::ReduceArgs``."""

    _fields_ = [("x", _P), ("y", _P), ("outer", _L), ("axis", _L), ("inner", _L), ("kind", _I)]


class TransposeArgs(ctypes.Structure):
    """``qg::TransposeArgs``."""

    _fields_ = [("x", _P), ("y", _P), ("outer", _L), ("a", _L), ("b", _L), ("inner", _L),
                ("bytes", _I)]


class PoolArgs(ctypes.Structure):
    """``qg::PoolArgs``."""

    _fields_ = [("x", _P), ("y", _P), ("images", _L), ("h", _L), ("w", _L), ("channels", _L),
                ("y_h", _L), ("y_w", _L), ("kernel_h", _I), ("kernel_w", _I), ("stride_h", _I),
                ("stride_w", _I), ("dilation_h", _I), ("dilation_w", _I), ("pad_top", _I),
                ("pad_left", _I), ("pad_bottom", _I), ("pad_right", _I), ("count_include_pad", _I)]


class JoinedImage(ctypes.Structure):
    """``qg::JoinImagesArgs::Part``."""

    _fields_ = [("x", _P), ("channels", _L), ("factor_h", _L), ("factor_w", _L)]


class JoinImagesArgs(ctypes.Structure):
    """``qg::JoinImagesArgs``."""

    _fields_ = [("y", _P), ("images", _L), ("h", _L), ("w", _L), ("channels", _L), ("top", _L),
                ("left", _L), ("bottom", _L), ("right", _L), ("n", _I), ("part", JoinedImage * 8)]


class EncoderAttentionArgs(ctypes.Structure):
    """``qg::EncoderAttentionArgs``."""

    _fields_ = [*((n, _P) for n in ("q", "k", "v", "mask", "out")),
                *((n, _L) for n in ("batch", "heads", "queries", "keys", "head_dim",
                                    "q_batch", "q_head", "q_row",
                                    "k_batch", "k_head", "k_row", "k_dim",
                                    "v_batch", "v_head", "v_row",
                                    "mask_batch", "mask_head", "mask_row",
                                    "out_batch", "out_head", "out_row")), ("scale", _F)]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    s.__name__: s for s in (SoftmaxArgs, NormArgs, ReduceArgs, TransposeArgs, PoolArgs,
                            JoinImagesArgs, EncoderAttentionArgs)}  # fmt: skip
_made: dict[str, ctypes.CDLL] = {}


def library(isa: Isa, folder: Path, sanitize: bool = False) -> ctypes.CDLL:
    if isa.name not in _made:
        path = build(folder, isa, [render_rowops(isa)], "rowops.h", ENTRIES,
                     LOOP_SANITIZERS * sanitize)
        _made[isa.name] = load(path, list(STRUCTS.values()))
    return _made[isa.name]


@pytest.fixture(params=ISAS.values(), ids=lambda isa: isa.name)
def lib(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> ctypes.CDLL:
    """The library of an ISA that this machine has."""
    if why_not(request.param):
        pytest.skip(why_not(request.param))
    return library(request.param, pytestconfig.cache.mkdir("kernels"))


def call(lib: ctypes.CDLL, entry: str, out: Array, **values: Any) -> Array:
    """What ``entry`` writes to ``out`` (member y or out); one, two and three threads agree."""
    args = STRUCTS[ENTRIES[entry]]()
    place = "out" if entry == "encoder_attention" else "y"
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            setattr(args, name, value.ctypes.data)
        elif isinstance(value, tuple):
            getattr(args, name)[:] = value
        else:
            setattr(args, name, value)
    results: list[Array] = []
    for threads in (1, 2, 3):
        y = out.copy()
        setattr(args, place, y.ctypes.data)
        run(lib, entry, args, threads)
        results.append(y)
    assert all(np.array_equal(results[0], y, equal_nan=y.dtype == np.float32) for y in results)
    return results[0]


def blank(*shape: int) -> Array:
    """Where a kernel writes: what it leaves out is seen."""
    return np.full(shape, -777, np.float32)


def normal(rng: np.random.Generator, *shape: int, spread: float = 1.0) -> Array:
    return rng.normal(0, spread, shape).astype(np.float32)


def close(got: Array, want: Array, rtol: float = 2e-6, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


# -- softmax --

def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def check_softmax(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    for rows, n in ((1, 1), (5, 15), (4, 16), (7, 77), (3, 1000), (2, 20000)):
        x = normal(rng, rows, n + 3, spread=5)
        for entry in ("softmax", "log_softmax"):
            got = call(lib, entry, blank(rows, n), x=x, x_stride=n + 3, y_stride=n, rows=rows, n=n,
                       scale=0.5)
            want = softmax(0.5 * x[:, :n].astype(np.float64))
            close(got, np.log(want) if entry == "log_softmax" else want, rtol=4e-6)
    # a mask of [batch][queries][keys] that all heads share; in place
    x, mask = normal(rng, 2, 3, 5, 37), normal(rng, 2, 5, 37)
    mask[0, 2, :20] = -np.inf
    got = call(lib, "softmax", blank(2, 3, 5, 37), x=x, x_stride=37, y_stride=37, rows=30, n=37,
               scale=1.0, mask=mask, shape=(2, 3, 5), mask_stride=(5 * 37, 0, 37))
    close(got, softmax(x.astype(np.float64) + mask[:, None]))
    args = SoftmaxArgs(x=x.ctypes.data, x_stride=37, y=x.ctypes.data, y_stride=37, rows=30, n=37,
                       scale=0.5)
    want = softmax(0.5 * x.astype(np.float64))
    run(lib, "softmax", args)
    close(x, want)
    bad = normal(rng, 2, 40)
    bad[0, 3], bad[1] = np.nan, -np.inf
    got = call(lib, "softmax", blank(2, 40), x=bad, x_stride=40, y_stride=40, rows=2, n=40, scale=1)
    assert np.isnan(got).all()


# -- norms --

def check_norms(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    for rows, n in ((1, 1), (3, 15), (2, 64), (5, 100), (3, 768), (2, 9000)):
        x, residual = normal(rng, rows, n) + 3, normal(rng, rows, n + 1)
        weight, bias = normal(rng, n), normal(rng, n)
        common: dict[str, Any] = {"x_stride": n, "y_stride": n, "rows": rows, "n": n, "eps": 1e-5}
        v = x.astype(np.float64)
        for affine in (False, True):
            given = {"weight": weight, "bias": bias} if affine else {}
            w, b = (weight, bias) if affine else (1, 0)
            centred = v - v.mean(axis=1, keepdims=True)
            want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * w + b
            close(call(lib, "layer_norm", blank(rows, n), x=x, **common, **given), want, atol=4e-6)
            want = v / np.sqrt((v**2).mean(axis=1, keepdims=True) + 1e-5) * w
            close(call(lib, "rms_norm", blank(rows, n), x=x, **common, **given), want)
        total = blank(rows, n)
        for sums in ({}, {"sum": total, "sum_stride": n}):
            got = call(lib, "layer_norm", blank(rows, n), x=x, residual=residual,
                       residual_stride=n + 1, **common, **sums)
            v = (x + residual[:, :n]).astype(np.float64)
            centred = v - v.mean(axis=1, keepdims=True)
            want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
            close(got, want, atol=4e-6)
        assert np.array_equal(total, x + residual[:, :n])


# -- reductions --

KINDS: dict[str, Callable[..., Any]] = {
    "sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min, "prod": np.prod,
    "sumsq": lambda x, axis: (x**2).sum(axis=axis), "l1": lambda x, axis: np.abs(x).sum(axis=axis),
    "l2": lambda x, axis: np.sqrt((x**2).sum(axis=axis)),
    "logsum": lambda x, axis: np.log(x.sum(axis=axis)),
    "logsumexp": lambda x, axis: np.log(np.exp(x).sum(axis=axis)),
}  # fmt: skip


def reduced(lib: ctypes.CDLL, kind: str, x: Array) -> Array:
    outer, axis, inner = x.shape
    return call(lib, "reduce", blank(outer, inner), x=x, outer=outer, axis=axis, inner=inner,
                kind=list(KINDS).index(kind))


def check_reductions(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(2)
    for shape in ((1, 1, 1), (7, 5, 1), (3, 100, 1), (2, 9000, 1), (2, 49, 3), (3, 130, 16),
                  (2, 5, 150), (1, 4200, 70)):
        x = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        for kind, meaning in KINDS.items():
            with np.errstate(all="ignore"):
                want = meaning(x.astype(np.float64), axis=1)
            if kind == "prod" and shape[1] > 200:
                continue
            close(reduced(lib, kind, x), want, rtol=1e-5 if kind == "prod" else 1e-6, atol=3e-7)
    # a million numbers of one sign, in either direction
    x = rng.uniform(0, 1, (1, 1 << 20, 1)).astype(np.float32)
    close(reduced(lib, "sum", x), x.sum(axis=1, dtype=np.float64), rtol=1e-6)
    x = x.reshape(1, 1 << 18, 4)
    close(reduced(lib, "sum", x), x.sum(axis=1, dtype=np.float64), rtol=1e-6)
    for inner in (1, 20):
        x = normal(rng, 3, 50, inner)
        x[0, 7], x[1, 3] = np.nan, np.inf
        x[2] = -np.inf
        for kind in ("max", "min", "sum", "logsumexp"):
            with np.errstate(all="ignore"):
                want = KINDS[kind](x.astype(np.float64), axis=1)
            if kind == "logsumexp":
                want[1], want[2] = np.inf, -np.inf
            close(reduced(lib, kind, x), want)


# -- moves --

def check_transpose(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        for shape in ((1, 1, 1, 1), (2, 3, 50, 1), (1, 64, 80, 1), (2, 100, 131, 1), (3, 16, 16, 1),
                      (2, 5, 7, 2), (2, 5, 7, 12), (0, 3, 3, 1)):
            x = rng.integers(0, 1 << 62, shape).astype(dtype)
            outer, a, b, inner = shape
            out = np.zeros((outer, b, a, inner), dtype)
            got = call(lib, "transpose", out, x=x, outer=outer, a=a, b=b, inner=inner,
                       bytes=x.itemsize)
            assert np.array_equal(got, x.transpose(0, 2, 1, 3)), (dtype, shape)


# -- pooling, resizing --

def pooled(x: Array, y_size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
           dilation: tuple[int, int], pads: tuple[int, int, int, int], kind: str) -> Array:
    """kind: max, mean (of what is there) or mean_pad (padding counts)."""
    x = x.astype(np.float64)
    n, h, w, c = x.shape
    top, left, bottom, right = pads
    y = np.zeros((n, *y_size, c))
    for i in range(y_size[0]):
        for j in range(y_size[1]):
            rows = i * stride[0] - top + np.arange(kernel[0]) * dilation[0]
            columns = j * stride[1] - left + np.arange(kernel[1]) * dilation[1]
            count = int((rows < h + bottom).sum() * (columns < w + right).sum())
            part = x[:, rows[(rows >= 0) & (rows < h)]]
            part = part[:, :, columns[(columns >= 0) & (columns < w)]]
            if kind == "max":
                y[:, i, j] = part.max(axis=(1, 2))
            else:
                valid = part.shape[1] * part.shape[2]
                y[:, i, j] = part.sum(axis=(1, 2)) / (count if kind == "mean_pad" else valid)
    return y


POOLS: list[tuple[tuple[int, ...], tuple[int, int], tuple[int, int], tuple[int, int],
                  tuple[int, int], tuple[int, int, int, int]]] = [
    # x, size of y, kernel, stride, dilation, pads
    ((1, 1, 1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((2, 9, 11, 3), (4, 5), (3, 3), (2, 2), (1, 1), (0, 0, 0, 0)),
    ((2, 8, 8, 70), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
    ((1, 10, 7, 128), (6, 4), (2, 3), (2, 1), (2, 2), (2, 0, 1, 1)),
    ((1, 7, 7, 33), (4, 4), (2, 2), (2, 2), (1, 1), (0, 0, 0, 0)),  # the last window sticks out
]


def check_pools(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(4)
    for shape, y_size, kernel, stride, dilation, pads in POOLS:
        names = ("images", "h", "w", "channels", "y_h", "y_w", "kernel_h", "kernel_w", "stride_h",
                 "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left", "pad_bottom",
                 "pad_right")
        sizes = dict(zip(names, (*shape, *y_size, *kernel, *stride, *dilation, *pads), strict=True))
        out = blank(shape[0], *y_size, shape[3])
        x = normal(rng, *shape)
        case = (y_size, kernel, stride, dilation, pads)
        assert np.array_equal(call(lib, "max_pool", out, x=x, **sizes), pooled(x, *case, "max"))
        for counts, kind in ((0, "mean"), (1, "mean_pad")):
            got = call(lib, "average_pool", out, x=x, count_include_pad=counts, **sizes)
            close(got, pooled(x, *case, kind))
        for entry, dtype in (("max_pool_u8", np.uint8), ("max_pool_s8", np.int8)):
            codes = rng.integers(0, 256, shape).astype(np.uint8).view(dtype)
            got = call(lib, entry, out.astype(dtype), x=codes, **sizes)
            assert np.array_equal(got, pooled(codes, *case, "max"))


def check_join_images(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(5)
    for pads in ((0, 0, 0, 0), (1, 2, 3, 4)):
        parts = [(normal(rng, 2, 12 // fh, 6 // fw, c), fh, fw)
                 for c, fh, fw in ((3, 1, 1), (16, 2, 2), (40, 4, 1), (1, 3, 6))]  # fmt: skip
        want = np.concatenate([x.repeat(fh, 1).repeat(fw, 2) for x, fh, fw in parts], axis=3)
        top, left, bottom, right = pads
        want = np.pad(want, ((0, 0), (top, bottom), (left, right), (0, 0)))
        array = (JoinedImage * 8)()
        for i, (x, fh, fw) in enumerate(parts):
            array[i] = JoinedImage(x.ctypes.data, x.shape[3], fh, fw)
        sizes = {"images": 2, "h": 12, "w": 6, "channels": 60, "n": 4, "top": top, "left": left,
                 "bottom": bottom, "right": right}  # fmt: skip
        got = call(lib, "join_images", blank(*want.shape), part=array, **sizes)
        assert np.array_equal(got, want)


# -- attention --

def check_attention(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(6)
    cases = ((1, 1, 1, 1, 4), (2, 3, 13, 17, 20), (1, 2, 31, 128, 32), (2, 2, 50, 300, 64),
             (1, 1, 200, 129, 16), (1, 1, 5, 70, MAX_HEAD_DIM))
    for batch, heads, queries, keys, dim in cases:
        width = heads * dim
        # q, k and v are parts of the rows of one product
        qkv = normal(rng, batch, max(queries, keys), 3 * width)
        parts = [qkv[..., i * width : (i + 1) * width] for i in range(3)]
        q, k, v = (p[:, :n].reshape(batch, n, heads, dim).transpose(0, 2, 1, 3).astype(np.float64)
                   for p, n in zip(parts, (queries, keys, keys), strict=True))
        row = 3 * width
        sizes: dict[str, Any] = {
            "batch": batch, "heads": heads, "queries": queries, "keys": keys, "head_dim": dim,
            "scale": dim**-0.5, "out_batch": queries * width, "out_head": dim, "out_row": width}
        for name, part in zip("qkv", parts, strict=True):
            sizes |= {name: part, f"{name}_batch": qkv[0].size, f"{name}_head": dim,
                      f"{name}_row": row}
        out = blank(batch, queries, heads, dim)
        none = np.zeros((1, 1, 1, keys), np.float32)
        by_key = np.where(rng.random((batch, 1, 1, keys)) < 0.3, -1e4, 0).astype(np.float32)
        by_pair = normal(rng, 1, heads, queries, keys)
        by_pair[..., 0, : keys // 2] = -np.inf
        for mask in (none, by_key, by_pair):
            strides = [0 if mask.shape[i] == 1 else mask.strides[i] // 4 for i in range(3)]
            given = {} if mask is none else {
                "mask": mask, "mask_batch": strides[0], "mask_head": strides[1],
                "mask_row": strides[2]}
            got = call(lib, "encoder_attention", out, k_dim=1, **sizes, **given)
            p = softmax(np.einsum("bhid,bhjd->bhij", q, k) * dim**-0.5 + mask)
            close(got, np.einsum("bhij,bhjd->bihd", p, v), rtol=1e-5, atol=4e-6)
        # keys as columns, and with neither stride 1
        want = call(lib, "encoder_attention", out, k_dim=1, **sizes)
        turned = np.ascontiguousarray(parts[1][:, :keys].reshape(batch, keys, heads, dim)
                                      .transpose(0, 2, 3, 1))
        sizes |= {"k": turned, "k_batch": width * keys, "k_head": dim * keys, "k_row": 1}
        got = call(lib, "encoder_attention", out, k_dim=keys, **sizes)
        assert np.array_equal(got, want)
        loose = np.zeros((*turned.shape, 2), np.float32)
        loose[..., 0] = turned
        sizes |= {"k": loose, "k_batch": 2 * width * keys, "k_head": 2 * dim * keys, "k_row": 2}
        got = call(lib, "encoder_attention", out, k_dim=2 * keys, **sizes)
        assert np.array_equal(got, want)


CHECKS: tuple[Callable[[ctypes.CDLL], None], ...] = (
    check_softmax, check_norms, check_reductions, check_transpose, check_pools, check_join_images,
    check_attention,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[len("check_") :])
def test_rowops(check: Callable[[ctypes.CDLL], None], lib: ctypes.CDLL) -> None:
    check(lib)


def sanitized(isa_name: str, folder: str) -> None:
    """What the child process below runs."""
    lib = library(ISAS[isa_name], Path(folder), sanitize=True)
    for check in CHECKS:
        check(lib)


def test_sanitizers(pytestconfig: pytest.Config) -> None:
    if why_not(ISAS["scalar"]):
        pytest.skip(why_not(ISAS["scalar"]))
    # of all rows it hides the fewest accesses in intrinsics
    run_sanitized(__name__, ISAS["scalar"], pytestconfig.cache.mkdir("kernels"))
