"""The emulator against compiled C++ and numpy, and that it finds what it should."""

from __future__ import annotations

import ctypes
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.cuda import toolchain
from qigen.backends.cuda.emulator import EmulatedDevice, Finding, Schedule
from qigen.toolchain import find_compiler

Array = npt.NDArray[Any]


def run(text: str, *arrays: Array, block: int = 32, grid: int = 1, **options: Any) -> list[Array]:
    """Run the only kernel of ``text`` on copies of the arrays and read them back."""
    device = EmulatedDevice(Schedule(**options))
    (kernel,) = device.load("test", text).values()
    addresses = [device.upload(a) for a in arrays]
    device.launch(kernel, (grid,), (block,), addresses)
    return [device.read(p, a.shape, a.dtype) for p, a in zip(addresses, arrays, strict=True)]


# -- random programs ------------------------------------------------------------------------------


class Expressions:
    """Random C expressions without undefined behaviour."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def signed(self, depth: int) -> str:
        pick = self.random.choice
        if not depth:
            return pick(
                ["a", "b", "c", "(int)u", "7", "-3", "(int)(l >> 9)", "(int)(short)a",
                 "(int)(signed char)b"]
            )  # fmt: skip
        x, y = self.signed(depth - 1), self.signed(depth - 1)
        return pick(
            [f"(int)((unsigned){x} + (unsigned){y})", f"(int)((unsigned){x} * (unsigned){y})",
             f"({x} & {y})", f"({x} | {y})", f"({x} ^ {y})", f"(~{x})",
             f"(int)((unsigned){x} << ({y} & 15))", f"({x} >> ({y} & 31))",
             f"({x} / (({y} & 1023) + 1))", f"({x} % (({y} & 1023) + 3))",
             f"(({x} < {y}) ? {x} : {y})", f"(int)({self.unsigned(depth - 1)})",
             f"(int)((long long){x} * {y} >> 32)", f"(({x} > {y} && {x} != 5) ? {y} : {x})"]
        )  # fmt: skip

    def unsigned(self, depth: int) -> str:
        pick = self.random.choice
        if not depth:
            return pick(["u", "(unsigned)a", "5u", "0x80000001u", "(unsigned)(l >> 20)"])
        x, y = self.unsigned(depth - 1), self.unsigned(depth - 1)
        return pick(
            [f"({x} + {y})", f"({x} * {y})", f"({x} >> ({y} & 31))", f"({x} << ({y} & 31))",
             f"({x} / ({y} | 1u))", f"({x} % ({y} | 3u))", f"({x} ^ {y})",
             f"(({x} << 11) | ({x} >> 21))", f"(({x} >> 5) & 0x3f)",
             f"(unsigned)((unsigned long long){x} * {y} >> 32)",
             f"(unsigned)(((unsigned long long){x} << 7 | {y}) >> 3)"]
        )  # fmt: skip

    def real(self, depth: int) -> str:
        pick = self.random.choice
        if not depth:
            return pick(["f", "g", "(float)a", "(float)u", "1.5f", "(float)(short)c"])
        x, y = self.real(depth - 1), self.real(depth - 1)
        return pick(
            [f"ADD({x}, {y})", f"ADD({x}, -{y})", f"MUL({x}, {y})", f"({x} / {y})",
             f"fmaf({x}, f, {y})", f"(({x} < {y}) ? {x} : {y})", f"(-{x})", f"fabsf({x})",
             f"sqrtf(fabsf({x}))",
             f"(float)({self.signed(depth - 1)})"]
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_equal_compiled_cpp(seed: int, tmp_path: Path) -> None:
    each, make = 40, Expressions(seed)
    body = "".join(
        f"o[t * {3 * each} + {i}] = (int)({make.signed(3)});\n"
        f"o[t * {3 * each} + {each + i}] = (int)({make.unsigned(3)});\n"
        f"{{ float q = {make.real(2)}; int w; memcpy(&w, &q, 4);"
        f" o[t * {3 * each} + {2 * each + i}] = q != q ? 0x7fffffff : w; }}\n"
        for i in range(each)
    )
    load = (
        "int a = A[t], b = A[t + 64], c = A[t + 128]; unsigned u = (unsigned)A[t + 192];"
        "long long l = ((long long)A[t + 256] << 32) | (unsigned)A[t + 320];"
        "float f = MUL((float)A[t + 384], 1e-4f), g = 1.0f / (float)(A[t + 192] | 1);"
    )
    function = f"(const int* A, int* o) {{ for (int t = T; t < 64; t += S) {{ {load}\n{body} }} }}"
    device = (
        "#define ADD(x, y) __fadd_rn(x, y)\n#define MUL(x, y) __fmul_rn(x, y)\n#define S 64\n"
        f'#define T threadIdx.x\nextern "C" __global__ void k{function}'
    )
    host = (
        "#include <math.h>\n#include <string.h>\n#define ADD(x, y) ((x) + (y))\n#define S 1\n"
        f'#define MUL(x, y) ((x) * (y))\n#define T 0\nextern "C" void k{function}'
    )
    source = tmp_path / "host.cpp"
    source.write_text(host)
    flags = ["-O0", "-fwrapv", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    find_compiler().run([*flags, str(source), "-o", str(tmp_path / "host.so")], "host")
    inputs = np.random.default_rng(seed).integers(-(2**31), 2**31, 448).astype(np.int32)
    inputs[::5] %= 100
    wanted = np.zeros((64, 3 * each), np.int32)
    library = ctypes.CDLL(str(tmp_path / "host.so"))
    library.k(ctypes.c_void_p(inputs.ctypes.data), ctypes.c_void_p(wanted.ctypes.data))
    got = run(device, inputs, np.zeros_like(wanted), block=64)[1]
    wrong = np.flatnonzero((got != wanted).any(axis=0))
    assert wrong.size == 0, wrong


# -- number formats and fragments, from the text of the PTX ISA ----------------------------------


def every(kind: str) -> Array:
    """All 65536 bit patterns of a 16-bit float."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    return bits.view(np.float16 if kind == "f16" else ml_dtypes.bfloat16)


@pytest.mark.parametrize(  # sm_80 has only fma for bf16
    ("op", "kind"),
    [("add", "f16"), ("sub", "f16"), ("mul", "f16"), ("fma", "f16"), ("fma", "bf16")],
)
def test_arithmetic_of_halves(op: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    x = rng.choice(every(kind), 8192)
    y, z = x[rng.permutation(x.size)], x[rng.permutation(x.size)]
    extra = ", %3" if op == "fma" else ""
    text = f"""extern "C" __global__ void k(const unsigned short* x, const unsigned short* y,
      const unsigned short* z, unsigned short* o) {{
      int i = blockIdx.x * 128 + threadIdx.x;
      asm("{op}.rn.{kind} %0, %1, %2{extra};" : "=h"(o[i]) : "h"(x[i]), "h"(y[i]), "h"(z[i])); }}"""
    raw = [a.view(np.uint16) for a in (x, y, z)]
    got = run(text, *raw, np.zeros(x.size, np.uint16), grid=64, block=128)[3].view(x.dtype)
    with np.errstate(all="ignore"):
        a, b, c = (v.astype(np.float64) for v in (x, y, z))
        wide = {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c}[op]
        for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
            if wide[i]:  # else the sign of zero is right already
                p, q, r = (Fraction(float(v[i])) for v in (a, b, c))
                wide[i] = to_odd({"add": p + q, "sub": p - q, "mul": p * q, "fma": p * q + r}[op])
        want = wide.astype(np.float16)
        if kind == "bf16":
            want = to_odd_float32(wide).astype(ml_dtypes.bfloat16)
    nan = np.isnan(want.astype(np.float32))
    assert (np.isnan(got.astype(np.float32)) == nan).all()
    assert (got.view(np.uint16) == want.view(np.uint16))[~nan].all()


def to_odd(exact: Fraction) -> float:
    """The float64 that is exact, or has the last bit set and lies next to ``exact``."""
    x = np.float64(float(exact))
    difference = exact - Fraction(float(x))
    if difference and not x.view(np.uint64) & np.uint64(1):
        x = np.nextafter(x, np.float64(np.inf if difference > 0 else -np.inf))
    return float(x)


def to_odd_float32(x: Array) -> Array:
    """float64 to float32 with the last bit set where the value is not exact."""
    y = x.astype(np.float32)
    y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    inexact = (y.astype(np.float64) != x) & np.isfinite(x)
    return (y.view(np.uint32) | inexact).view(np.float32)


FRAGMENTS = [
    ("m16n8k16", "f32", "f16", 16), ("m16n8k8", "f32", "f16", 8), ("m16n8k16", "f32", "bf16", 16),
    ("m16n8k16", "f16", "f16", 16), ("m16n8k16", "s32", "s8", 16), ("m16n8k32", "s32", "s8", 32),
    ("m16n8k32", "s32", "u8", 32), ("m16n8k64", "s32", "s4", 64), ("m16n8k64", "s32", "u4", 64),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "out", "kind", "k"), FRAGMENTS)
def test_mma_fragments(shape: str, out: str, kind: str, k: int) -> None:
    """D = A B + C with every element where section "Matrix Fragments for mma" puts it."""
    rng = np.random.default_rng(k)
    bits = {"f16": 16, "bf16": 16, "s8": 8, "u8": 8, "s4": 4, "u4": 4}[kind]
    if bits == 16:
        A, B = (rng.integers(-4, 5, s).astype(np.float64) / 4 for s in ((16, k), (k, 8)))
        C = rng.integers(-9, 9, (16, 8)).astype(np.float64)
    else:
        low = 0 if kind[0] == "u" else -(1 << (bits - 1))
        A, B = (rng.integers(low, low + (1 << bits), s).astype(np.int64) for s in ((16, k), (k, 8)))
        C = rng.integers(-1000, 1000, (16, 8))
    each = 32 // bits

    def raw(x: Any) -> int:
        if kind == "f16":
            return int(np.float16(x).view(np.uint16))
        if kind == "bf16":
            return int(np.array(x, ml_dtypes.bfloat16).view(np.uint16))
        return int(x) & ((1 << bits) - 1)

    def word(x: Any) -> int:
        return int(np.float32(x).view(np.uint32)) if out == "f32" else int(x) & 0xFFFFFFFF

    groups = k // (4 * each)  # registers along k
    na, nb, nc = 2 * groups, groups, 2 if out == "f16" else 4
    a, b, c = (np.zeros((32, n), np.uint32) for n in (na, nb, nc))
    for lane in range(32):
        row, quad = lane // 4, lane % 4
        for e in range(each):
            for g in range(groups):
                col = quad * each + 4 * each * g + e
                a[lane, 2 * g] |= np.uint32(raw(A[row, col]) << bits * e)
                a[lane, 2 * g + 1] |= np.uint32(raw(A[row + 8, col]) << bits * e)
                b[lane, g] |= np.uint32(raw(B[col, row]) << bits * e)
        for r in range(nc):
            if out == "f16":
                pair = C[row + 8 * r, 2 * quad : 2 * quad + 2].astype(np.float16)
                c[lane, r] = pair.view(np.uint32)[0]
            else:
                c[lane, r] = word(C[row + 8 * (r // 2), 2 * quad + r % 2])
    kinds = f"{out}.{kind}.{kind}.{out}"
    n = iter(range(100))

    def names(count: int) -> str:
        return "{" + ", ".join(f"%{next(n)}" for _ in range(count)) + "}"

    template = f"mma.sync.aligned.{shape}.row.col.{kinds} {names(nc)}, {names(na)}, {names(nb)}"
    inputs = [f'"r"(a[t * {na} + {i}])' for i in range(na)]
    inputs += [f'"r"(b[t * {nb} + {i}])' for i in range(nb)]
    inputs += [f'"r"(c[t * {nc} + {i}])' for i in range(nc)]
    text = f"""typedef unsigned u; extern "C" __global__ void k(const u* a, const u* b, u* c) {{
      int t = threadIdx.x; u d[{nc}];
      asm volatile("{template}, {names(nc)};" : {", ".join(f'"=r"(d[{i}])' for i in range(nc))}
        : {", ".join(inputs)});
      for (int i = 0; i < {nc}; ++i) c[t * {nc} + i] = d[i]; }}"""
    got = run(text, a, b, c)[2]
    want = A @ B + C
    for lane in range(32):
        row, quad = lane // 4, lane % 4
        for r in range(nc):
            if out == "f16":
                pair = want[row + 8 * r, 2 * quad : 2 * quad + 2].astype(np.float16)
                assert got[lane, r] == pair.view(np.uint32)[0]
            else:
                assert got[lane, r] == word(want[row + 8 * (r // 2), 2 * quad + r % 2])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("k", "selector"), [(16, 0), (16, 3), (32, 0), (32, 1)])
def test_mma_of_a_sparse_matrix(kind: str, k: int, selector: int) -> None:
    """Section "Multiply-and-Accumulate Instruction: mma.sp": two of every four numbers of A, and
    metadata in one (k = 16) or two (k = 32) of the four lanes of a row."""
    rng = np.random.default_rng(k + selector)
    kept = np.sort(rng.random((16, k // 4, 4)).argsort(axis=2)[..., :2], axis=2)
    values = rng.integers(-8, 9, (16, k // 4, 2)) / 4
    A = np.zeros((16, k // 4, 4))
    np.put_along_axis(A, kept, values, axis=2)
    B, C = rng.integers(-8, 9, (k, 8)) / 4, rng.integers(-9, 9, (16, 8)).astype(np.float32)

    def raw(x: Array) -> Array:
        return x.astype(np.float16 if kind == "f16" else ml_dtypes.bfloat16).view(np.uint16)

    packed, nb = values.reshape(16, k // 2), k // 8
    a, b, c = (np.zeros((32, n), np.uint32) for n in (nb, nb, 4))
    e = np.full(32, 0xDEADBEEF, np.uint32)  # what other lanes hold does not count
    for lane in range(32):
        row, quad = lane // 4, lane % 4
        for r in range(nb):
            column = 2 * quad + 8 * (r // 2)
            a[lane, r] = raw(packed[row + r % 2 * 8, column : column + 2]).view(np.uint32)[0]
            b[lane, r] = raw(B[8 * r + 2 * quad : 8 * r + 2 * quad + 2, row].copy()).view(
                np.uint32)[0]
        for r in range(4):
            c[lane, r] = C[row + 8 * (r // 2), 2 * quad + r % 2].view(np.uint32)
        part = quad - selector * (k // 16)
        if 0 <= part < k // 16:
            pairs = (kept[..., 0] | kept[..., 1] << 2)[:, 4 * part : 4 * part + 4]
            halves = (pairs << 4 * np.arange(4)).sum(axis=1)
            e[lane] = halves[row] | halves[row + 8] << 16
    names = [f"%{i}" for i in range(4 + 2 * nb + 4 + 1)]
    lists = [names[:4], names[4 : 4 + nb], names[4 + nb : 4 + 2 * nb], names[-5:-1]]
    text = ", ".join("{" + ", ".join(part) + "}" for part in lists)
    inputs = [*(f'"r"(a[t * {nb} + {i}])' for i in range(nb)),
              *(f'"r"(b[t * {nb} + {i}])' for i in range(nb)),
              *(f'"f"(c[t * 4 + {i}])' for i in range(4)), '"r"(e[t])']
    source = f"""typedef unsigned u; extern "C" __global__
      void k(const u* a, const u* b, float* c, const u* e) {{ int t = threadIdx.x; float d[4];
      asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 "
        "{text}, {names[-1]}, {selector};" : {", ".join(f'"=f"(d[{i}])' for i in range(4))}
        : {", ".join(inputs)});
      for (int i = 0; i < 4; ++i) c[t * 4 + i] = d[i]; }}"""
    got = run(source, a, b, c, e)[2].view(np.float32)
    want = A.reshape(16, k) @ B + C
    for lane in range(32):
        for r in range(4):
            assert got[lane, r] == want[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2]
    toolchain.compile_cubin("sparse", source, "sm_80")  # ptxas takes it
    with pytest.raises(Finding, match="do not ascend"):
        run(source, a, b, c, np.zeros_like(e))


def test_mma_of_a_sparse_matrix_of_bytes() -> None:
    """k = 64 of s8: A and B from the formulas of "Matrix Fragments for sparse mma.m16n8k64",
    the metadata as CUTLASS lays it out (ELayout of SM120_SPARSE_16x8x64_TN): lane
    t0 + 2 t1 + 4 t2 has 32 numbers along k, from 32 t1 on, of row 8 t0 + t2."""
    rng = np.random.default_rng(64)
    A = rng.integers(-128, 128, (16, 64))
    there = np.zeros((16, 64), bool)
    for chunk in there.reshape(-1, 4):
        chunk[rng.choice(4, 2, replace=False)] = True
    B, C = rng.integers(-128, 128, (64, 8)), rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    a, b, e = np.zeros((32, 16), np.int8), np.zeros((32, 16), np.int8), np.zeros(32, np.uint32)
    c = np.zeros((32, 4), np.int32)
    for lane in range(32):
        group, quad = lane // 4, lane % 4
        for first in range(0, 16, 4):  # a0 to a15: by registers
            row = group if first < 4 or 8 <= first < 12 else group + 8
            column = quad * 8 + (32 if first >= 8 else 0)
            chunk = A[row, column : column + 8][there[row, column : column + 8]]
            a[lane, first : first + 4] = chunk
            b[lane, first : first + 4] = B[4 * first + 4 * quad : 4 * first + 4 * quad + 4, group]
        row, column = 8 * (lane % 2) + lane // 4, 32 * (lane // 2 % 2)
        for place, four in enumerate(there[row, column : column + 32].reshape(8, 4)):
            low, high = np.flatnonzero(four)
            e[lane] |= np.uint32((int(low) | int(high) << 2) << 4 * place)
        for r in range(4):
            c[lane, r] = C[group + 8 * (r // 2), 2 * quad + r % 2]
    source = """typedef unsigned u; extern "C" __global__
      void k(const u* a, const u* b, int* c, const u* e) { int t = threadIdx.x;
      a += 4 * t, b += 4 * t, c += 4 * t;
      asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(e[t])); }"""
    got = run(source, a, b, c, e)[2]
    want = np.where(there, A, 0) @ B + C
    for lane in range(32):
        for r in range(4):
            assert got[lane, r] == want[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2]
    toolchain.compile_cubin("sparse_bytes", source, "sm_80")  # ptxas takes it
    with pytest.raises(Finding, match="do not ascend"):
        run(source, a, b, c, np.zeros_like(e))


def test_highest_bit() -> None:
    """bfind: the highest one, or zero of a negative number, or what shifts it to the top."""
    text = """extern "C" __global__ void k(const int* x, int* o) { int t = threadIdx.x;
      asm("bfind.u32 %0, %1;" : "=r"(o[t]) : "r"(x[t]));
      asm("bfind.s32 %0, %1;" : "=r"(o[t + 32]) : "r"(x[t]));
      asm("bfind.shiftamt.u32 %0, %1;" : "=r"(o[t + 64]) : "r"(x[t])); }"""
    x = np.random.default_rng(1).integers(-(2**31), 2**31, 32).astype(np.int32)
    x[:4] = 0, -1, 1, -(2**31)
    got = run(text, x, np.zeros(96, np.int32))[1].reshape(3, 32)
    for i, v in enumerate(x.tolist()):
        highest = (v & 0xFFFFFFFF).bit_length() - 1
        assert got[0, i] == highest
        assert got[1, i] == (~v if v < 0 else v).bit_length() - 1
        assert got[2, i] == (31 - highest if highest >= 0 else -1)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans: bool) -> None:
    """Row r of matrix m lies at the address of lane 8 m + r; lane l gets elements of row l / 4."""
    x = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    text = f"""extern "C" __global__ void k(const uint4* x, uint4* o) {{
      __shared__ uint4 s[32]; int t = threadIdx.x; s[t] = x[t]; __syncthreads(); uint4 r;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4{".trans" if trans else ""}.shared.b16"
        " {{%0, %1, %2, %3}}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
        : "r"((unsigned)__cvta_generic_to_shared(s + t)) : "memory"); o[t] = r; }}"""
    got = run(text, x, np.zeros((32, 4, 2), np.uint16))[1]
    source = x.transpose(0, 2, 1) if trans else x
    want = source.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4, 2)
    assert (got == want).all()


COPY = """
extern "C" __global__ void k(const uint4* x, uint4* o) {
  __shared__ uint4 s[64]; int t = threadIdx.x;
  unsigned to = (unsigned)__cvta_generic_to_shared(s + t);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(x + t) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  WAIT
  BARRIER
  o[t] = s[t ^ FLIP];
}
"""


def copied(flip: int, wait: str = "cp.async.wait_group 0;", barrier: str = "__syncthreads();",
           policy: str = "fair") -> Array:
    text = COPY.replace("FLIP", str(flip)).replace("BARRIER", barrier)
    text = text.replace("WAIT", f'asm volatile("{wait}" ::: "memory");' if wait else "")
    x = np.arange(256, dtype=np.uint32).reshape(64, 4)
    return run(text, x, np.zeros_like(x), block=64, policy=policy)[1]


@pytest.mark.parametrize("policy", ["fair", "random", "priority"])
def test_cp_async(policy: str) -> None:
    x = np.arange(256, dtype=np.uint32).reshape(64, 4)
    assert (copied(33, policy=policy) == x[np.arange(64) ^ 33]).all()


# -- findings -------------------------------------------------------------------------------------


def test_finds_what_is_wrong_with_copies() -> None:
    with pytest.raises(Finding, match="nobody waited for"):
        copied(0, wait="")
    with pytest.raises(Finding, match="nobody waited for"):
        copied(0, wait="cp.async.wait_group 1;")
    with pytest.raises(Finding, match=r"without a barrier|nobody wrote|nobody waited for"):
        copied(32, barrier="")


LAUNCH = 'extern "C" __global__ void k(int* x, int* o) {{ int t = threadIdx.x; {body} }}'
WRONG = {
    "past the end": ("o[t] = x[t + 1];", "outside of every allocation, 4 bytes past"),
    "write past the end": ("o[t + 1] = x[t];", "outside of every allocation"),
    "misaligned": ("o[t] = *(int*)((char*)x + 2);", "misaligned"),
    "shared never written": ("__shared__ int s[64]; if (t < 16) s[t] = t; __syncthreads(); "
                             "o[t] = s[t];",
                             "shared memory that nobody wrote"),
    "shared past the end": ("__shared__ int s[64]; s[t + x[0] + 1] = t; __syncthreads();"
                            "o[t] = s[t];", "outside of shared memory"),
    "write after read": ("__shared__ int s[64]; s[t] = t; __syncthreads(); int a = s[t ^ 32];"
                         "s[t] = a; __syncthreads(); o[t] = s[t];", "race in shared memory"),
    "barrier in a branch": ("if (t < 7) __syncthreads(); __syncthreads(); o[t] = t;",
                            "need all of it"),
    "deadlock": ("if (t < 32) __syncthreads(); else while (((volatile int*)x)[0] == 0) {} "
                 "o[t] = t;", "livelock"),
    "shuffle from outside": ("if (t < 4) o[t] = __shfl_sync(15, x[t], 9); else o[t] = 0;",
                             "does not take part"),
    "poisoned register": ('int a; asm volatile("{ .reg .b32 q; add.s32 %0, q, 1; }" : "=r"(a));'
                          "o[t] = a;", "nobody computed"),
    "trap": ("if (x[t] == 0) __trap(); o[t] = 1;", "trap"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_finds(name: str) -> None:
    body, message = WRONG[name]
    x = np.zeros(64, np.int32)
    with pytest.raises(Finding, match=message):
        run(LAUNCH.format(body=body), x, x.copy(), block=64, budget=100_000)


def test_memory_that_nobody_wrote_is_not_read() -> None:
    device = EmulatedDevice()
    (kernel,) = device.load("test", LAUNCH.format(body="o[t] = x[t];")).values()
    with pytest.raises(Finding, match="device memory that nobody wrote"):
        device.launch(kernel, (1,), (32,), [device.allocate(128), device.allocate(128)])


HANDOVER = """
extern "C" __global__ void k(int* x, int* flag, int* o) {
  if (blockIdx.x == 0) {
    x[threadIdx.x] = 7;
    FENCE
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(flag, 1);
  } else {
    if (threadIdx.x == 0) while (ACQUIRE == 0) {}
    __syncthreads();
    o[threadIdx.x] = x[threadIdx.x];
  }
}
"""


@pytest.mark.parametrize("policy", ["fair", "random", "priority"])
def test_blocks_hand_over_by_a_flag(policy: str) -> None:
    text = HANDOVER.replace("FENCE", "__threadfence();")
    text = text.replace("ACQUIRE", "*(volatile int*)flag")
    arrays = [np.zeros(64, np.int32), np.zeros(1, np.int32), np.zeros(64, np.int32)]
    assert (run(text, *arrays, block=64, grid=2, policy=policy)[2] == 7).all()
    with pytest.raises(Finding, match="has not published by a fence"):
        run(text.replace("__threadfence();", ""), *arrays, block=64, grid=2, policy=policy)


def test_priority_of_blocks_shows_a_missing_acquire() -> None:
    text = HANDOVER.replace("FENCE", "__threadfence();").replace("ACQUIRE", "1")
    arrays = [np.zeros(64, np.int32), np.zeros(1, np.int32), np.zeros(64, np.int32)]
    wrong = 0
    for seed in range(8):
        try:
            got = run(text, *arrays, block=64, grid=2, policy="priority", seed=seed)[2]
            wrong += bool((got != 7).any())
        except Finding:
            wrong += 1
    assert wrong


def test_divergent_lanes_meet_again() -> None:
    body = """int s = 0; for (int i = 0; i < (t & 7); ++i) s += (i & 1) ? x[i] : i;
      if (t & 1) s *= 3; else s -= 5; s += __shfl_xor_sync(~0u, s, 1); o[t] = s;"""
    x = np.arange(64, dtype=np.int32)
    got = run(LAUNCH.format(body=body), x, x.copy(), block=64)[1]
    alone = [sum(range(t & 7)) for t in range(64)]
    alone = [s * 3 if t & 1 else s - 5 for t, s in enumerate(alone)]
    assert got.tolist() == [alone[t] + alone[t ^ 1] for t in range(64)]


def test_wavefronts_and_sectors_are_counted() -> None:
    device = EmulatedDevice()
    text = """extern "C" __global__ void k(const int* x, int* o) {
      __shared__ int s[32 * 33]; int t = threadIdx.x;
      for (int i = 0; i < 33; ++i) s[i * 32 + t] = x[t * 8];
      __syncthreads(); o[t] = s[t * 33 + 1] + ((volatile int*)s)[t * 32]; }"""
    (kernel,) = device.load("test", text).values()
    x = device.upload(np.zeros(256, np.int32))
    device.launch(kernel, (1,), (32,), [x, device.allocate(128)])
    loads = [r for r in kernel.report() if r.opcode.startswith("ld.")]
    assert {r.wavefronts // r.executed for r in loads if r.wavefronts} == {1, 32}
    (fetch,) = [r for r in loads if r.sectors]
    assert fetch.sectors == 32 * fetch.executed
    assert fetch.ideal_sectors == 4 * fetch.executed

