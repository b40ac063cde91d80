"""Every generated matmul kernel against exact references in numpy.

The default run covers every format on every ISA with short token tiles; the schedules that the
planner picks, every activation kind and every epilogue are behind the ``slow`` marker.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.decode import ACTIVATION_GROUP, decode_plan
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa.primitives import PRIMITIVES
from qigen.backends.cpu.matmul import (
    PANEL_TOKENS,
    PANEL_WEIGHTS,
    ActivationRecord,
    MatmulSpec,
    accumulator_bound,
    activation_needs,
    activation_top,
    interleaved,
    render_matmul,
    turn_weights,
)
from qigen.errors import Unsupported
from qigen.formats import (
    CATALOG,
    REPRESENTATIVE,
    Format,
    Layout,
    QuantizedTensor,
    by_name,
    pack,
    packed_bytes,
    packed_shape,
    row_block_bytes,
    shared_bytes,
)
from qigen.formats.tensor import as_float32, kept_weights, mask_field
from qigen.formats.words import fitted, most_probable
from qigen.quantize.low_rank import without_low_rank
from tests.backends.cpu.foreign import foreign
from tests.backends.cpu.kernel_build import (
    EMULATED_TILES,
    MatmulArgs,
    build,
    compiler,
    load,
    pointer,
    why_not,
)

Array = npt.NDArray[Any]

SCALAR, AVX2 = ISAS["scalar"], ISAS["avx2"]
AVX512VNNI = ISAS["avx512vnni"]

EPILOGUES = ("store", "add", "silu", "gelu_tanh")
TOKENS = (1, 3, 16, 65)  # 65: one more than the f32 kernels' slab
ROWS = 56  # three row-blocks and a half: two pairs when they are gate and up

def planner_tiles(isa: Isa) -> tuple[int, ...]:
    """Token tiles like those of the planner: by the size of the register file."""
    return (1,) if not isa.features else (8, 4, 1) if isa.registers >= 32 else (2, 1)


GUARD = np.float32(-7.5)  # what y is filled with where nothing may be written

U = 2.0**-24
"""Unit roundoff of float32: a sum of n rounded terms is off by at most n U of their magnitudes."""
TINY = 2.0**-126  # products of subnormal scales are rounded absolutely
SLOPE = 1.13  # steepest slope of silu and gelu
GELU_ULPS, ACT_ULPS = 128, 8  # epilogue.h: gelu is relatively less accurate below -5


def bits_of(number: str, values: Array) -> Array:
    """The bits of ``values`` rounded to a kind of float (bf16: cut off)."""
    values = values.astype(np.float32)
    if number == "f32":
        return values.view(np.uint32)
    if number == "bf16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.asarray(values.astype(np.float16).view(np.uint16))


ONE = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000, "e4m3": 0x38}


def random_tensor(fmt: Format, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Random codes over their whole range; scales of both signs, zero and subnormal ones too."""
    rng = np.random.default_rng(seed)
    nblocks = -(-k // fmt.block)
    fields: dict[str, Array] = {}
    for field in fmt.fields:
        shape = field.shape(n, nblocks)
        if fmt.float_kind:
            values = rng.normal(0, 0.1, shape).astype(np.float32)
            values[..., 0][rng.random(shape[:2]) < 0.1] = 6e-8  # subnormal in f16
            fields[field.name] = bits_of(fmt.float_kind, values)
        elif field.number in ("f16", "bf16", "f32"):
            floats = rng.normal(0, 3 if field.name == "z" else 0.05, shape)
            floats[rng.random(shape) < 0.05] = 0
            floats[rng.random(shape) < 0.05] = 3e-6
            fields[field.name] = bits_of(field.number, floats)
        elif field.name == "e":
            fields["e"] = rng.integers(118, 126, shape).astype(np.uint8)
            fields["e"][1 % n] = rng.integers(0, 3, shape[1:])
            fields["e"][2 % n] = 200
        elif field.name == "qc":
            fields["qc"] = np.sort(rng.integers(0, k, shape)).astype(field.dtype)
        elif field.name == "dict":
            fields["dict"] = most_probable(fmt.code_bits).reshape(shape)
        elif field.name == "codes" and fmt.words:
            codes = rng.choice(3, (n * nblocks, fmt.block), p=[0.07, 0.86, 0.07]).astype(np.uint8)
            codes[0], codes[1, 100:] = 1, 1
            size = rng.random(codes.shape, np.float32)
            words = fitted(codes, size, most_probable(fmt.code_bits), fmt.words)
            fields["codes"] = words.reshape(shape).astype(field.dtype)
        elif field.name in ("ix", "bm", "vm"):
            assert fmt.mask is not None
            groups = nblocks * fmt.block // fmt.mask[1]
            kept = kept_weights(fmt, rng.random((n, groups, fmt.mask[1])))
            fields.update(mask_field(fmt, np.nonzero(kept)[2].reshape(n, nblocks, -1)))
        else:
            high = 1 << field.bits
            fields[field.name] = rng.integers(0, high, shape, dtype=np.uint32).astype(field.dtype)
    return QuantizedTensor(fmt, (n, k), fields)


def decompose(tensor: QuantizedTensor) -> tuple[Array, Array, Array]:
    """(V(c) less an integer zero, S, M) of every weight, float64 [N, nblocks * block], past K
    included. Zero points that are data or have a fraction are in M = - S Z."""
    f, fields = tensor.format, tensor.fields
    n, nblocks = fields["codes"].shape[:2]
    one = {"sub": f.sub_zero + 1, "e": 127}  # S = scale_factor, M = 0
    unit = {}
    for field in f.fields:
        unit[field.name] = array = fields[field.name]
        if field.name not in ("codes", "lut", "ix", "bm", "vm", "oc", "qc", "dict"):
            value = ONE[field.number] if field.name in ("d", "sub") and field.number else 0
            value = value or one.get(field.name, 0)
            unit[field.name] = np.full_like(array, value)
    full = (n, nblocks * f.block)
    levels = QuantizedTensor(f, full, unit).dequantize().astype(np.float64) / f.scale_factor
    if f.table is not None:  # integers, whatever rounding the factor brought in
        levels = np.rint(levels)

    def number(name: str) -> Array:
        kind = f.field(name).number
        return as_float32(kind, fields[name]).astype(np.float64) if kind else (
            fields[name].astype(np.float64))

    def weights(groups: Array) -> Array:
        return np.repeat(groups.reshape(n, -1), full[1] // (groups.size // n), axis=1)

    if f.has("e"):
        scale = 2.0 ** (fields["e"].astype(np.float64) - 127) * f.scale_factor
    else:
        scale = number("d") * f.scale_factor
    if f.has("sub"):
        sub = number("sub")
        if f.has("subz"):
            sub = sub - number("subz")
        elif not f.field("sub").number:
            sub = fields["sub"].view(np.int8) if f.sub_signed else fields["sub"].astype(np.int64)
            sub = sub.astype(np.int64) - f.sub_zero
        scale = scale * sub
    minimum = np.zeros((n, nblocks, 1))
    if f.has("m"):
        minimum = f.min_sign * number("m")
    elif f.has("dmin"):
        minimum = f.min_sign * number("dmin") * fields["submin"]
    elif f.has("zd"):
        minimum = -scale * number("zd") * (number("z") - number("zz"))
    elif f.has("z"):
        minimum = -scale * number("z")
    elif f.zero != int(f.zero):
        levels = levels + f.zero
        minimum = -scale * f.zero
    return levels, weights(scale), weights(minimum)


def outliers(tensor: QuantizedTensor) -> Array:
    """float64 [N, nblocks * block]: what is added to the weights of the base format."""
    f, fields = tensor.format, tensor.fields
    n, nblocks = fields["codes"].shape[:2]
    values = np.zeros((n, nblocks, f.block))
    rows, blocks, _ = np.ogrid[:n, :nblocks, :1]
    if f.has("oc"):
        np.add.at(values, (rows, blocks, fields["oc"].astype(np.intp)),
                  as_float32("f16", fields["ov"]).astype(np.float64))
    values = values.reshape(n, -1)
    if f.has("qc"):
        np.add.at(values, (rows[..., 0], fields["qc"][0].astype(np.intp)),
                  as_float32("f16", fields["qv"])[:, 0].astype(np.float64))
    return values


@dataclass(frozen=True)
class Activations:
    """Rows as a kernel reads them and what they stand for."""

    data: Array  # uint8 [M, stride], a record a token
    values: Array  # int64 or float64 [M, k]
    scales: Array  # float64 [M, k]
    scale_offset: int = 0
    zero_offset: int = 0
    sum_offset: int = 0

    def laid_out(self, spec: MatmulSpec, m: int) -> Array:
        """The first ``m`` rows as the kernel reads them."""
        rows = np.ascontiguousarray(self.data[:m])
        return interleaved(rows, spec.tiles) if spec.integer else rows


def quantize(x: Array, spec: MatmulSpec, q: Array | None = None) -> Activations:
    """Records of rows ``x`` float32 [M, k]; ``q`` int8 takes the place of the rounded values."""
    m, k = x.shape
    token = spec.token_scale
    zeros, sums = activation_needs(spec)
    record = ActivationRecord(k, token, zeros, sums)
    groups = x.reshape(m, 1 if token else k // ACTIVATION_GROUP, -1)
    scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(activation_top(spec.activations))
    if q is None:
        safe = np.where(scale > 0, scale, np.float32(1))
        q = np.rint(groups / safe).astype(np.int8).reshape(m, k)
    data = np.full((m, record.nbytes), 0xA5, np.uint8)

    def put(offset: int, array: Array) -> None:
        raw = np.ascontiguousarray(array).view(np.uint8)
        data[:, offset : offset + raw.shape[1]] = raw

    def segment_sums(length: int) -> Array:
        return np.asarray(q.astype(np.int32).reshape(m, -1, length).sum(axis=2, dtype=np.int32))

    put(0, q)
    put(record.scale_offset, scale[..., 0])
    zero_offset = sum_offset = -(2**30)  # never read
    for length, zero in zeros:
        zero_offset = record.offset("zero", length, zero)
        put(zero_offset, (-zero * segment_sums(length)).astype(np.int32))
    for length in sums:
        sum_offset = record.offset("sum", length)
        by_segment = scale[..., 0].repeat(1 if token else ACTIVATION_GROUP // length, axis=1)
        by_segment = np.float32(1) if token else by_segment
        put(sum_offset, segment_sums(length).astype(np.float32) * by_segment)
    scales = np.broadcast_to(scale, groups.shape).reshape(m, k).astype(np.float64)
    return Activations(data, q.astype(np.int64), scales, record.scale_offset, zero_offset,
                       sum_offset)


def nearest_bf16(x: Array) -> Array:
    """uint16: bf16 bits of float32, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.asarray((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def padded_k(spec: MatmulSpec, k: int) -> int:
    kblock = spec.format.block * spec.layout.blocks
    return packed_shape(spec.format, (1, k), spec.layout)[1] * kblock


def activate(spec: MatmulSpec, x: Array) -> Activations:
    """Activations of any kind from float32 rows [M, K], padded with zeros to whole K-blocks."""
    m, k = x.shape
    full = np.zeros((m, padded_k(spec, k)), np.float32)
    full[:, :k] = x
    if spec.integer:
        return quantize(full, spec)
    if spec.activations == "bf16":
        bits = nearest_bf16(np.pad(full, ((0, 0), (0, full.shape[1] % 2))))  # whole pairs
        values = bf16_values(bits).astype(np.float64)
        return Activations(bits.view(np.uint8), values, np.ones(values.shape))
    return Activations(full.view(np.uint8), full.astype(np.float64), np.ones(full.shape))


def reference(spec: MatmulSpec, tensor: QuantizedTensor, x: Activations) -> tuple[Array, Array]:
    """(y, error bound) float64 [M, N] of x W^T: exact for int8, float64 for float activations."""
    n, k = tensor.shape
    k_full = x.values.shape[1]
    if spec.format.rank:
        base = without_low_rank(spec.format)
        fields = {field.name: tensor.fields[field.name] for field in base.fields}
        y, bound = reference(replace(spec, format=base), QuantizedTensor(base, (n, k), fields), x)
        b = as_float32("f16", tensor.fields["lb"])[:, 0].astype(np.float64)
        a = as_float32("f16", tensor.fields["la"]).reshape(-1, b.shape[1])[:k].astype(np.float64)
        values = (x.values * x.scales)[:, :k]
        sums = np.abs(values) @ np.abs(a)
        # each product with A is rounded, and what is rounded is multiplied by B; Q + B A once more
        more = (k_full + b.shape[1] + 10) * U * (sums @ np.abs(b).T) + 4 * U * np.abs(y)
        return y + values @ a @ b.T, bound + more + k * TINY
    if not spec.integer:
        w = np.zeros((n, k_full))
        w[:, :k] = tensor.dequantize()
        if spec.activations == "bf16":
            w = bf16_values(nearest_bf16(w.astype(np.float32))).astype(np.float64)
        return x.values @ w.T, (k_full + 4) * U * (np.abs(x.values) @ np.abs(w).T) + k * TINY
    length = decode_plan(spec.format, spec.layout).segment_length
    levels, scale, minimum = (
        np.pad(a, ((0, 0), (0, k_full - a.shape[1]))).reshape(n, -1, length).transpose(1, 0, 2)
        for a in decompose(tensor))
    q, xs = (a.reshape(len(x.values), -1, length).transpose(1, 2, 0).astype(np.float64)
             for a in (x.values, x.scales))
    products = (levels @ q) * scale[:, :, :1] * xs[:, :1]  # the integer dot product is exact
    minima = q.sum(axis=1, keepdims=True) * xs[:, :1] * minimum[:, :, :1]
    magnitude = (np.abs(products) + np.abs(minima)).sum(axis=0)
    terms = len(products) * (2 if decode_plan(spec.format, spec.layout).has_minimum else 1)
    y, bound = (products + minima).sum(axis=0), (terms + 6) * U * magnitude + terms * TINY
    if spec.format.has("oc") or spec.format.has("qc"):
        apart = np.zeros((n, k_full))
        more = outliers(tensor)
        apart[:, : more.shape[1]] = more
        count = sum(f.count for f in spec.format.fields if f.name in ("oc", "qc")) * tensor.nblocks
        y = y + apart @ (x.values * x.scales).T
        bound = bound + (terms + count + 6) * U * (np.abs(apart) @ np.abs(x.values * x.scales).T)
    return y.T, bound.T


def act_reference(kind: str, x: Array) -> Array:
    z = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3) if kind == "gelu_tanh" else x
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-z)))


@dataclass(frozen=True)
class Case:
    """A weight and 65 tokens, with what the kernel should make of them."""

    packed: Array
    tensor: QuantizedTensor
    x: Activations
    y: Array
    bound: Array


@functools.lru_cache(maxsize=8)
def case(spec: MatmulSpec) -> Case:
    f = spec.format
    # several K-blocks, not a multiple of an f32 panel; a short last block where there may be one
    k = {1: 150, 2: 151}.get(f.block, max(3, 288 // f.block) * f.block)
    if f.ggml_type is None:
        k -= 13
        if f.block > 128:  # a last block with room for outliers that lie past K, at zeros
            k += 70
    tensor = random_tensor(f, ROWS, k)
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (max(TOKENS), k)).astype(np.float32)
    x[:, : k // 3] *= 20  # groups of different scales
    x[1] = 0
    x[2, 7] = 1000
    rows = activate(spec, x)
    y, bound = reference(spec, tensor, rows)
    return Case(pack(tensor, spec.layout), tensor, rows, y, bound)


def fill_args(
    spec: MatmulSpec, c: Case, m: int, x: Array, y: Array, bias: Array | None
) -> MatmulArgs:
    _, kblocks, _ = packed_shape(spec.format, c.tensor.shape, spec.layout)
    assert c.packed.size == packed_bytes(spec.format, c.tensor.shape, spec.layout)
    row_block = row_block_bytes(spec.format, c.tensor.shape[1], spec.layout)
    return MatmulArgs(pointer(c.packed), row_block, kblocks, m, ROWS, pointer(x),
                      x.shape[1], c.x.scale_offset, c.x.zero_offset, c.x.sum_offset,
                      pointer(y), y.shape[1], pointer(bias))


def run(library: ctypes.CDLL, spec: MatmulSpec, c: Case, epilogue: str, m: int,
        y: Array, bias: Array | None) -> None:
    """Call an entry for all row-blocks (or pairs of them), cut in two calls unless that leaves too
    few for all streams."""
    x = c.x.laid_out(spec, m)
    args = fill_args(spec, c, m, x, y, bias)
    gated = epilogue not in ("store", "add")
    # gate and up have their tensor fields one behind the other, then the pairs of row-blocks
    shared = shared_bytes(spec.format, c.tensor.shape[1], spec.layout)
    packed = np.concatenate([c.packed[: shared if gated else 0], c.packed])
    args.w = pointer(packed)
    entry = getattr(library, spec.entry(epilogue))
    blocks = -(-ROWS // 16) // (1 if epilogue in ("store", "add") else 2)
    for b0, b1 in ((0, blocks),) if spec.streams > 2 else ((0, 1), (1, blocks)):
        entry(ctypes.byref(args), ctypes.c_int(b0), ctypes.c_int(b1))


def check(library: ctypes.CDLL, spec: MatmulSpec, epilogue: str, m: int, with_bias: bool,
          known: Case | None = None) -> None:
    c = known or case(spec)
    rng = np.random.default_rng(2)
    bias = rng.normal(0, 3, 64).astype(np.float32) if with_bias else None
    # y's rows are padded to 16 floats, and a guard of 16 floats lies beyond
    y = np.full((m + 1, 64 + 16), GUARD, np.float32)
    before = rng.normal(0, 5, (m, 64)).astype(np.float32)
    if epilogue == "add":
        y[:m, :64] = before
    run(library, spec, c, epilogue, m, y, bias)
    want, bound = c.y[:m], c.bound[:m]
    if epilogue in ("store", "add"):
        width, written = ROWS, ROWS
        more = np.zeros((m, ROWS)) + (bias[:ROWS] if bias is not None else 0)
        size = np.abs(want) + np.abs(more)
        if epilogue == "add":
            more = more + before[:, :ROWS]
            size = size + np.abs(before[:, :ROWS])
        want, bound = want + more, bound + 4 * U * size
    else:
        width, written = 32, 32  # whole row-blocks: the rows past N are zeros
        gate, up, gate_bound, up_bound = (
            np.pad(a, ((0, 0), (0, 64 - ROWS))).reshape(m, 2, 2, 16)[:, :, i].reshape(m, 32)
            for a in (want, bound) for i in (0, 1))
        act = act_reference(epilogue, gate)
        ulps = GELU_ULPS if epilogue == "gelu_tanh" else ACT_ULPS
        # rows past N have codes of 0 and the least scale: -128 * 2^-127 in mxint8
        up_bound = up_bound + 2.0**-110
        act_bound = SLOPE * gate_bound + ulps * U * np.abs(act) + TINY
        want = act * up
        bound = act_bound * np.abs(up) + np.abs(act) * up_bound + act_bound * up_bound
        bound = bound + U * np.abs(want) + TINY
    if spec.activations == "bf16" and spec.isa.native_bf16:
        bound = bound + 2.0**-112  # its instruction takes subnormals for zeros
    got = y[:m, :width]
    wrong = ~(np.abs(got - want) <= bound)
    assert not wrong.any(), (f"{spec.entry(epilogue)} m={m}: {int(wrong.sum())} of {wrong.size} "
                             f"wrong, rows of W {sorted(set(np.nonzero(wrong)[1].tolist()))[:20]}, "
                             f"tokens {sorted(set(np.nonzero(wrong)[0].tolist()))[:20]}: "
                             f"{got[wrong][:4]} for {want[wrong][:4]} +- {bound[wrong][:4]}")
    outside = np.full_like(y, GUARD)
    if epilogue == "add":
        outside[:m, :64] = before
    outside[:m, :written] = got
    assert np.array_equal(y, outside), "written outside the rows of the output"


def formats() -> Iterator[tuple[int, Format]]:
    """The rows of the default run."""
    yield from enumerate(CATALOG[name] for name in REPRESENTATIVE)


OTHER_DOT = (ISAS["avxvnni"], ISAS["avx512"])
"""Rows that differ from AVX2 and from AVX-512 with VNNI in the integer dot product only."""


def thinned(isa: Isa) -> bool:
    """Whether the default run takes only a part of the rows that no GGUF has."""
    return not foreign(isa) and (isa is SCALAR or isa.native_bf16 or isa in OTHER_DOT)


MATRIX = (("q4_0", "int8"), ("q4_k", "int8-token"), ("q6_k", "int8"), ("q2_k", "int8"),
          ("u3g32", "int8-token"), ("iq4_nl", "int8"), ("q8_0", "int8"), ("u5g64", "int8"))
"""Formats of the kernels whose sums lie in tile registers: zeros, minima, groups of 16, tables."""


def default_specs() -> list[tuple[MatmulSpec, tuple[str, ...]]]:
    """Every format on AVX2 and AVX-512, most on the other ISAs; the kinds of activations are dealt
    out over formats and ISAs.

    AVX2 and AVX-512 get the same kind and tiles, so that their results can be compared. Rows with
    an instruction for bf16 differ from the ones before in bf16 arithmetic only, and those with
    another dot product in integer arithmetic only. Formats are dealt
    out over the rows that are emulated, which is slow.
    """
    kinds = ("f32", "int8", "bf16", "int8-token")
    specs: list[tuple[MatmulSpec, tuple[str, ...]]] = []
    emulated = [isa for isa in ISAS.values() if foreign(isa)]
    for isa in ISAS.values():
        for i, f in formats():
            if isa in emulated and i % len(emulated) != emulated.index(isa):
                continue
            if thinned(isa) and isa not in emulated and f.ggml_type is None and i % 3:
                continue  # a third of these rows; all of them are among the slow tests
            choice = i + (isa is SCALAR)
            kind = kinds[choice % 4] if f.integer else kinds[choice % 2 * 2]
            if isa.native_bf16:
                kind = "bf16"
            if isa in OTHER_DOT:
                if not f.integer:
                    continue
                kind = kinds[1 + 2 * (i % 2)]
            more = EPILOGUES[1 + (i // 3 + (isa is AVX2)) % 3]
            tiles = (1,) if isa is SCALAR else (2, 1)
            streams = (1, 2, 4)[i % 3] if isa.features else 1
            specs.append((MatmulSpec(f, Layout(), isa, kind, tiles, streams=streams),
                          ("store", more)))
    for i, name in enumerate(("q4_0", "s5g64", "u3g32", "iq4_nl", "mxfp4")):
        for isa in (AVX2, AVX512VNNI):
            specs.append((MatmulSpec(CATALOG[name], Layout(16, 2), isa, kinds[i % 4], (2, 1)),
                          ("store", "silu")))
    for name, kind in (("fp6_e2m3", "int8"), ("fp5_e2m2", "int8-token"), ("nf4g64_t8", "int8"),
                       ("qmoe12_512x36", "int8"), ("s4gchannel_c32_lr16", "int8-token"),
                       ("s4gchannel_c32", "int4-token"),
                       ("aqlm_2x8_lr16", "f32"), ("s2g128_1of32v16", "int8"),
                       ("s3g128_3of8v32_o3", "bf16"), ("q4_k_lr48", "bf16")):
        specs += [(MatmulSpec(by_name(name), Layout(), isa, kind, (2, 1)), ("store",))
                  for isa in (AVX2, AVX512VNNI)]  # tables of 64, 32 and 16 bytes
    for name in ("q4_0", "u3g32", "bf16"):
        spec = MatmulSpec(CATALOG[name], Layout(), EMULATED_TILES, "bf16", (2, 1))
        specs.append((spec, ("store", "silu")))
    for name, kind in MATRIX:
        spec = MatmulSpec(CATALOG[name], Layout(), EMULATED_TILES, kind, (16, 2, 1))
        specs.append((spec, ("store", "silu")))
    return specs


def slow_specs() -> list[tuple[MatmulSpec, tuple[str, ...]]]:
    """The whole product, with the tiles of the planner."""
    return [(MatmulSpec(f, Layout(16, blocks), isa, kind, planner_tiles(isa),
                        streams=4 if isa.features else 1), EPILOGUES)
            for isa in ISAS.values() for f in CATALOG.values()
            for kind in (("f32", "bf16", "int8", "int8-token") if f.integer else ("f32", "bf16"))
            for blocks in ((1,) if f.float_kind else (1, 2))]


def identity(spec: MatmulSpec) -> str:
    return f"{spec.isa.name}-{spec.format.name}-{spec.activations}-kb{spec.layout.blocks}"


DEFAULT, SLOW = default_specs(), slow_specs()
TOGETHER = 16  # kernels of a translation unit


def unit(specs: list[tuple[MatmulSpec, tuple[str, ...]]], index: int) -> int:
    """The translation unit of a kernel, among those of its ISA."""
    isa = specs[index][0].isa
    return sum(spec.isa is isa for spec, _ in specs[:index]) // TOGETHER


def grouped(index: int) -> Any:
    """The index of a kernel as a parameter; the tests of a translation unit run in one worker.
    Those of AVX2 and AVX-512 that are compared do, too."""
    isa = DEFAULT[index][0].isa
    name = "avx" if isa in (AVX2, AVX512VNNI) else isa.name
    group = f"matmul-{name}-{unit(DEFAULT, index)}"
    return pytest.param(index, marks=pytest.mark.xdist_group(group))


class Libraries:
    """Compiles the kernels of a list in groups, when one of the group is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: dict[tuple[int, Isa, int], ctypes.CDLL] = {}

    def get(self, specs: list[tuple[MatmulSpec, tuple[str, ...]]], index: int) -> ctypes.CDLL:
        isa = specs[index][0].isa
        mine = [i for i, (spec, _) in enumerate(specs) if spec.isa is isa]
        group = unit(specs, index)
        key = (id(specs), isa, group)
        if key not in self.loaded:
            part = [specs[i] for i in mine[group * TOGETHER : (group + 1) * TOGETHER]]
            kernels = [render_matmul(spec, epilogues, decode_rows=not spec.integer)
                       for spec, epilogues in part]
            self.loaded[key] = load(build(self.folder, isa, kernels))
        return self.loaded[key]


@pytest.fixture(scope="session")
def libraries(pytestconfig: pytest.Config) -> Libraries:
    return Libraries(pytestconfig.cache.mkdir("kernels"))


def check_kernel(libraries: Libraries, specs: list[tuple[MatmulSpec, tuple[str, ...]]],
                 index: int) -> None:
    spec, epilogues = specs[index]
    if why_not(spec.isa):
        pytest.skip(why_not(spec.isa))
    library = libraries.get(specs, index)
    for m in TOKENS:
        for epilogue in epilogues:
            check(library, spec, epilogue, m, with_bias=False)
            if epilogue in ("store", "add"):
                check(library, spec, epilogue, m, with_bias=True)
    if not spec.integer:
        check_rows(library, spec)


def check_rows(library: ctypes.CDLL, spec: MatmulSpec) -> None:
    """The embedding entry gives the dequantized rows to the last bit, and scales them."""
    c = case(spec)
    _, kblocks, _ = packed_shape(spec.format, c.tensor.shape, spec.layout)
    row_block = row_block_bytes(spec.format, c.tensor.shape[1], spec.layout)
    ids = np.array([0, 55, 17, 17, 1, 2, 31], np.int32)
    k = c.tensor.shape[1]
    w = c.tensor.dequantize()[ids]
    for scale in (1.0, 0.3):
        y = np.full((len(ids) + 1, padded_k(spec, k) + 16), GUARD, np.float32)
        getattr(library, f"{spec.name}__rows")(
            ctypes.c_void_p(pointer(c.packed)), ctypes.c_int64(row_block),
            ctypes.c_int(kblocks), ctypes.c_void_p(pointer(ids)), ctypes.c_int(len(ids)),
            ctypes.c_float(scale), ctypes.c_void_p(pointer(y)), ctypes.c_int64(y.shape[1]))
        assert np.array_equal(y[:-1, :k], w * np.float32(scale))
        assert (y[-1] == GUARD).all() and (y[:, -16:] == GUARD).all()


@pytest.mark.parametrize(
    "index", list(map(grouped, range(len(DEFAULT)))), ids=lambda i: identity(DEFAULT[i][0])
)
def test_kernel(index: int, libraries: Libraries) -> None:
    check_kernel(libraries, DEFAULT, index)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SLOW)), ids=lambda i: identity(SLOW[i][0]))
def test_every_kernel(index: int, libraries: Libraries) -> None:
    check_kernel(libraries, SLOW, index)


def pairs() -> list[tuple[int, int]]:
    """Indices in DEFAULT of the same kernel on AVX2 and on AVX-512."""
    found = {replace(spec, isa=AVX2): i for i, (spec, _) in enumerate(DEFAULT)
             if spec.isa is AVX512VNNI}
    return [(i, found[spec]) for i, (spec, _) in enumerate(DEFAULT) if spec in found]


@pytest.mark.parametrize(
    "indices", [pytest.param(p, marks=grouped(p[0]).marks) for p in pairs()],
    ids=lambda p: identity(DEFAULT[p[0]][0]),
)
def test_isas_agree_to_the_last_bit(indices: tuple[int, int], libraries: Libraries) -> None:
    """Integer sums are exact and float operations come in the same order on AVX2 and AVX-512."""
    results = []
    for index in indices:
        spec = DEFAULT[index][0]
        if why_not(spec.isa):
            pytest.skip(why_not(spec.isa))
        y = np.zeros((65, 64), np.float32)
        run(libraries.get(DEFAULT, index), spec, case(spec), "store", 65, y, None)
        results.append(y)
    assert np.array_equal(results[0].view(np.uint32), results[1].view(np.uint32))


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_kernels_compile_where_they_cannot_run(isa: Isa, libraries: Libraries) -> None:
    if compiler(isa) is None:
        pytest.skip(f"needs a C++ compiler for {isa.architecture}")
    if not why_not(isa):
        pytest.skip("its kernels run here")
    tiles = (16, 2, 1) if isa.tiles else (2, 1)
    kernels = [render_matmul(MatmulSpec(CATALOG[name], Layout(), isa, kind, tiles), ("store",))
               for name, kind in (("bf16", "bf16"), ("q4_0", "bf16"), ("u5g64", "int8"))]
    library = build(libraries.folder, isa, kernels, [
        p for p in PRIMITIVES if not (p.narrow or p.limited) and (isa.tiles or not p.tiles)])
    if isa.tiles and shutil.which("objdump"):
        text = subprocess.run(["objdump", "-d", library], check=True, capture_output=True,
                              text=True).stdout
        for instruction in ENCODINGS:
            assert re.search(instruction, text), instruction


ENCODINGS = (
    r"c4 e2 78 49 \S.*\bldtilecfg ", r"c4 e2 78 49 c0 +\ttilerelease",
    r"c4 e2 7b 49 \S.*\btilezero %tmm", r"c4 .2 7b 4b .*\btileloadd .*,%tmm2",
    r"c4 .2 7a 4b .*\btilestored %tmm0,", r"c4 e2 61 5e c2 +\ttdpbusd %tmm3,%tmm2,%tmm0",
    r"c4 e2 49 5e c5 +\ttdpbusd %tmm6,%tmm5,%tmm0",
    r"c4 e2 62 5c c2? .*\btdpbf16ps %tmm3,%tmm2,%tmm0",
)  # fmt: skip
"""How the instructions for tile registers are encoded (Intel SDM, volume 2), as objdump shows."""


def test_catalog_is_covered() -> None:
    for isa in ISAS.values():
        covered = {spec.format.name for spec, _ in DEFAULT if spec.isa is isa}
        assert covered >= set(REPRESENTATIVE) or foreign(isa) or thinned(isa)
        assert {spec.format.name for spec, _ in SLOW if spec.isa is isa} == set(CATALOG)
    if any(map(foreign, ISAS.values())):
        assert {spec.format.name for spec, _ in DEFAULT if foreign(spec.isa)} == set(
            REPRESENTATIVE)


def test_a_turn_loads_all_that_it_reads() -> None:
    """The turns of a K-block are its segments, and none relies on words that another one loaded."""
    for f in CATALOG.values():
        if f.float_kind is not None or f.vector:
            continue
        plan = decode_plan(f, Layout())
        turns = plan.turns(turn_weights(f, Layout()))
        steps = [step.k for turn in turns for segment in turn for step in segment.steps]
        assert steps == [step.k for segment in plan.segments for step in segment.steps]
        assert all(turn[0].new_group for turn in turns), f.name
        for turn in turns if len(turns) > 1 else ():
            loaded: set[str] = set()
            reads = [r for s in turn for x in (*s.fields, *s.steps) if s.new_group or x in s.steps
                     for r in x.reads]
            for read in reads:
                assert read.load == (read.word not in loaded), (f.name, read)
                loaded.add(read.word)
    assert len(decode_plan(CATALOG["q6_k"], Layout()).turns(64)) == 4
    assert len(decode_plan(CATALOG["tq1_0"], Layout()).turns(64)) == 1  # digits go on


# ---- panels ----

LONG = [(MatmulSpec(CATALOG[name], Layout(), isa, kind, (2, 1)), ("store", "silu"))
        for name, kind in (("q4_0", "int8"), ("q4_k", "int8-token"), ("s5g64", "int8-token"),
                           ("q3_k", "int8"))
        for isa in (AVX2, AVX512VNNI)]


@pytest.mark.parametrize("index", range(len(LONG)), ids=lambda i: identity(LONG[i][0]))
def test_panels(index: int, libraries: Libraries) -> None:
    """More weights than a panel holds, and more tokens than share one; the odd token goes alone."""
    spec, epilogues = LONG[index]
    if why_not(spec.isa):
        pytest.skip(why_not(spec.isa))
    assert spec.panel
    m = PANEL_TOKENS + 2 * spec.panel_tiles + 3
    k = 2 * PANEL_WEIGHTS + spec.format.block
    tensor = random_tensor(spec.format, ROWS, k)
    rows = activate(spec, np.random.default_rng(4).normal(0, 1, (m, k)).astype(np.float32))
    c = Case(pack(tensor, spec.layout), tensor, rows, *reference(spec, tensor, rows))
    for epilogue in epilogues:
        check(libraries.get(LONG, index), spec, epilogue, m, with_bias=False, known=c)


@pytest.mark.parametrize("kind", ["int8", "int8-token"])
def test_tile_registers_give_the_same_to_the_last_bit(kind: str, libraries: Libraries) -> None:
    """Integer sums are exact and floats come in the same order as without tile registers."""
    if why_not(EMULATED_TILES):
        pytest.skip(why_not(EMULATED_TILES))
    f = CATALOG["q4_k"]
    k, m = 2 * PANEL_WEIGHTS + f.block, PANEL_TOKENS + 16 + 3
    tensor = random_tensor(f, ROWS, k)
    x = np.random.default_rng(4).normal(0, 1, (m, k)).astype(np.float32)
    results = []
    for tiles in ((16, 1), (1,)):
        spec = MatmulSpec(f, Layout(), EMULATED_TILES, kind, tiles)
        assert spec.matrix == (tiles[0] == 16)
        library = load(build(libraries.folder, EMULATED_TILES, [render_matmul(spec, ("store",))]))
        rows = activate(spec, x)
        c = Case(pack(tensor, spec.layout), tensor, rows, *reference(spec, tensor, rows))
        y = np.zeros((m, 64), np.float32)
        run(library, spec, c, "store", m, y, None)
        results.append(y)
        check(library, spec, "store", m, with_bias=False, known=c)
    assert np.array_equal(results[0].view(np.uint32), results[1].view(np.uint32))


# ---- accumulators ----

def narrow_specs() -> list[tuple[MatmulSpec, tuple[str, ...]]]:
    """One AVX2 kernel for every distinct bound that the catalog leads to."""
    found: dict[object, MatmulSpec] = {}
    for f in CATALOG.values():
        if f.integer:
            bound = accumulator_bound(decode_plan(f, Layout()), AVX2)
            found.setdefault(bound, MatmulSpec(f, Layout(), AVX2, "int8", (1,)))
    return [(spec, ("store",)) for spec in found.values()]


NARROW = narrow_specs()


def extreme_case(spec: MatmulSpec) -> Case:
    """Codes that are all the least or all the greatest, activations of +-127: scales are 1."""
    f = spec.format
    k = 2 * spec.layout.blocks * f.block
    tensor = random_tensor(f, ROWS, k)
    order = np.argsort(f.byte_table) if f.byte_table is not None else np.arange(1 << f.code_bits)
    one = {"sub": f.sub_zero + 1, "e": 128 if f.scale_factor == 0.5 else 127}
    fields = {}
    for field in f.fields:
        value = ONE[field.number] if field.name in ("d", "sub") and field.number else 0
        value = value or one.get(field.name, 0)
        fields[field.name] = np.full_like(tensor.fields[field.name], value)
    for row in range(ROWS):
        if row % 3 == 2:
            fields["codes"][row] = tensor.fields["codes"][row]
        else:
            fields["codes"][row] = order[0 if row % 3 else -1]
    tensor = QuantizedTensor(f, (ROWS, k), fields)
    q = np.empty((max(TOKENS), k), np.int8)
    q[0], q[1] = 127, -127
    q[2] = np.where(np.arange(k) % 4 < 2, 127, -127)
    q[3:] = np.random.default_rng(3).choice(np.array([-127, 127], np.int8), q[3:].shape)
    x = quantize(np.full(q.shape, 127, np.float32), spec, q)
    y, _ = reference(spec, tensor, x)
    assert np.abs(y).max() < 2**24, "the exact result is a float32"
    return Case(pack(tensor, spec.layout), tensor, x, y, np.zeros_like(y))


@pytest.mark.parametrize("index", range(len(NARROW)), ids=lambda i: identity(NARROW[i][0]))
def test_extreme_sums_are_exact(index: int, libraries: Libraries) -> None:
    spec = NARROW[index][0]
    if why_not(spec.isa):
        pytest.skip(why_not(spec.isa))
    c = extreme_case(spec)
    y = np.zeros((65, 64), np.float32)
    run(libraries.get(NARROW, index), spec, c, "store", 65, y, None)
    if np.frexp(spec.format.scale_factor)[0] == 0.5:
        assert np.array_equal(y[:, :ROWS], c.y)
    else:  # the sums are exact, their product with the scale is rounded
        assert np.abs(y[:, :ROWS] - c.y).max() <= 8 * U * np.abs(c.y).max()


def test_a_wider_claim_overflows(libraries: Libraries) -> None:
    """The same check fails if the ISA row claims that its lanes hold twice as much."""
    if why_not(AVX2):
        pytest.skip(why_not(AVX2))
    claim = replace(AVX2, dot_limit=2 * 32767 + 1)
    for name in ("u6g32", "u5g32"):
        honest = MatmulSpec(CATALOG[name], Layout(), AVX2, "int8", (1,))
        spec = replace(honest, isa=claim)
        assert (accumulator_bound(decode_plan(spec.format, spec.layout), claim).flush
                != accumulator_bound(decode_plan(spec.format, spec.layout), AVX2).flush)
        library = load(build(libraries.folder, claim, [render_matmul(spec, ("store",))]))
        c = extreme_case(honest)
        y = np.zeros((65, 64), np.float32)
        run(library, spec, c, "store", 65, y, None)
        assert not np.array_equal(y[:, :ROWS], c.y)


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_every_integer_format_has_a_bound(isa: Isa) -> None:
    for f in CATALOG.values():
        if f.integer:
            bound = accumulator_bound(decode_plan(f, Layout()), isa)
            assert bound.lane is None or bound.lane <= (isa.dot_limit or 0)
            assert (bound.flush is None) == (isa.dot_limit is None)
            assert bound.signed or f.mapped_range[1] + bound.table_zero <= isa.code_max


def test_a_lane_that_cannot_hold_one_step_is_refused() -> None:
    with pytest.raises(Unsupported, match="overflows"):
        accumulator_bound(decode_plan(CATALOG["q8_0"], Layout()), replace(AVX2, dot_limit=32000))


def test_floats_need_float_activations() -> None:
    with pytest.raises(Unsupported, match="f32"):
        render_matmul(MatmulSpec(CATALOG["f16"], Layout(), SCALAR, "int8", (1,)), ("store",))


# ---- sanitizers ----

def write_case(path: Path, args: MatmulArgs, c: Case, x: Array, y: Array, bias: Array,
               call: Array) -> None:
    for name in ("w", "x", "y", "bias"):
        setattr(args, name, None)
    with path.open("wb") as file:
        file.write(bytes(args))
        for array in (c.packed, x, y, bias, call.astype(np.int32)):
            file.write(np.int64(array.size).tobytes() + np.ascontiguousarray(array).tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("names", [("q4_0", "q6_k"), ("tq1_0", "u5g64", "mxfp4"),
                                   ("q8_0", "f16", "bf16", "f32")], ids="-".join)
def test_sanitizers(isa: Isa, names: tuple[str, ...], libraries: Libraries,
                    tmp_path: Path) -> None:
    """Buffers of exactly the documented sizes, under ASan and UBSan, in a program of their own."""
    if why_not(isa):
        pytest.skip(why_not(isa))
    specs = [MatmulSpec(CATALOG[name], Layout(), isa, kind, (2, 1)) for name in names
             for kind in (("f32", "bf16") if CATALOG[name].float_kind else ("f32", "int8"))]
    epilogues = ("store", "silu")
    program = build(libraries.folder, isa, [render_matmul(s, epilogues) for s in specs],
                    sanitize=True)
    bias = np.ones(64, np.float32)
    for i, spec in enumerate(specs):
        c = case(spec)
        for j, epilogue in enumerate(epilogues):
            blocks = 4 if epilogue == "store" else 2
            y = np.zeros((65, 16 * blocks), np.float32)
            x = c.x.laid_out(spec, 65)
            args = fill_args(spec, c, 65, x, y, bias)
            file, out = tmp_path / "case", tmp_path / "out"
            write_case(file, args, c, x, y, bias, np.array([0, blocks, i * len(epilogues) + j]))
            done = subprocess.run([program, file, out], capture_output=True, text=True,
                                  check=False)
            assert done.returncode == 0, f"{spec.entry(epilogue)}: {done.stderr[:3000]}"
            if epilogue == "store":
                got = np.fromfile(out, np.float32).reshape(y.shape)[:, :ROWS]
                assert (np.abs(got - 1 - c.y) <= c.bound + 4 * U * (np.abs(c.y) + 1)).all()
