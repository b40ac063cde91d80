"""The translator by itself: what it makes of C++, and how it refuses the rest."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from qigen import targets
from qigen.backends.cpu.isa import ISAS
from qigen.backends.llvm import find_compiler, host_library
from qigen.backends.llvm.attach import attach
from qigen.backends.llvm.compile import to_ir
from qigen.errors import ToolchainError, Unsupported
from qigen.toolchain import KERNEL_FLAGS, ObjectCache, Unit
from tests.backends.llvm.translated import headers, library

ISA = ISAS["scalar"]
SOURCE = """
#include "isa_scalar.h"
#include "kernels.h"
namespace qg {
namespace {
template <int N>
struct Fold {
  static constexpr int kTwice = 2 * N;
  int64_t sum = 1;
  Fold() {}
  void add(const int32_t (&values)[N]) {
    for (const int32_t v : values) sum = sum * 31 + v;
  }
};
struct Span {
  const int32_t* first;
  int32_t n = 7, spare = 3;
  const int32_t& last;
  int64_t none;
  Span(const int32_t* p, const int32_t& end, int32_t m)
      : first(p + 1), n{m}, last(end), none() {
    n += spare;
  }
  int32_t sum() const { return first[0] * n + last + static_cast<int32_t>(none); }
};
struct Pair {
  int32_t low, high;
};
Pair parts(int64_t x) { return {static_cast<int32_t>(x & 0xffff), static_cast<int32_t>(x >> 16)}; }
template <int N>
int64_t times(const Fold<N>* fold, int32_t x) { return fold->sum * x + N; }
template <class F>
int32_t twice(F f, int32_t x) { return f(f(x)); }
int32_t odd(int32_t x) { return x % 2 ? -x / 2 : x + 7; }
constexpr int32_t kTable[2][3] = {{1, -2, 3}, {4, 5, -6}};
}  // namespace
extern "C" {
int64_t matmul_args_bytes() { return sizeof(qg::MatmulArgs); }
int64_t folded(int32_t a, int32_t b) {
  Fold<3> fold;
  int32_t values[3] = {a, b};
  fold.add(values);
  const auto more = [&](int32_t c) {
    if (c < 0) return fold.sum;
    return fold.sum + c * Fold<5>::kTwice;
  };
  int64_t total = more(a) + more(-1);
  for (int i = 0, k = 2; i < 10 && total; ++i) {
    if (i == 3) continue;
    if (i == 7) break;
    total += kTable[i % 2][i % 3] * (k -= 1);
  }
  const Span span(values, values[0], 2);
  total += span.sum() + times(&fold, 2);
  const Pair p = parts(total);
  uint32_t bits = static_cast<uint32_t>(p.low) << 20 >> 3;
  bits ^= ~0u;
  return static_cast<int64_t>(bits) * 8 + twice(odd, p.high) + (a > b || b ? 1 : 0);
}
}
}  // namespace qg
"""


def folded(a: int, b: int) -> int:
    """The same in Python."""

    def quotient(x: int, y: int) -> int:
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    def odd(x: int) -> int:
        return quotient(-x, 2) if x % 2 else x + 7

    s = 1
    for v in (a, b, 0):
        s = s * 31 + v
    total = (s if a < 0 else s + a * 10) + s
    k = 2
    for i in range(7):
        if i != 3 and total:
            k -= 1
            total += ((1, -2, 3), (4, 5, -6))[i % 2][i % 3] * k
    total += b * (2 + 3) + a + s * 2 + 3
    low, high = total & 0xFFFF, total >> 16
    bits = (low << 20 & 0xFFFFFFFF) >> 3 ^ 0xFFFFFFFF
    return bits * 8 + odd(odd(high)) + int(a > b or b != 0)


def test_what_it_translates(tmp_path: Path) -> None:
    unit = Unit("folded", SOURCE, KERNEL_FLAGS, headers(ISA))
    call: Any = library(tmp_path, "folded", [unit]).folded
    call.restype = ctypes.c_int64
    for a, b in ((0, 0), (1, 2), (-5, 3), (100, -7), (30000, 11), (-30000, -1)):
        assert call(a, b) == folded(a, b), (a, b)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("int f(int x) { return missing(x); }", "missingf()"),
        ("int f(int x) { try { return x; } catch (...) {} }", "try"),
        ("int f(Unknown x) { return 0; }", "the type Unknown"),
        ("int f(int x) { 3 = x; return x; }", "an assignment to what has no place"),
        ("struct A { int x; A(int y) : z(y) {} }; int f(int x) { A a(x); return a.x; }",
         "an initialiser of z, which is no field"),
        ("constexpr float kHalf = 0.5f * 3;\nfloat f(float x) { return x * kHalf; }",
         "kHalf is no constant"),
        ("#define TWICE(x) (2 * x)\nint f(int x) { return TWICE(x); }", "macros with arguments"),
    ],
)
def test_what_it_refuses(body: str, message: str) -> None:
    with pytest.raises(Unsupported) as error:
        to_ir(f"namespace qg {{\n{body}\n}}", "bad.cpp", {}, [], ISA)
    assert message in error.value.message
    assert error.value.where.startswith("bad.cpp:")


def test_a_model_that_is_not_whole(tmp_path: Path) -> None:
    """Symbols that nothing defines, models without a description, what is no object."""
    text = """#include "isa_scalar.h"
    namespace qg { void other(int x); extern "C" void f(int x) { other(x); } }"""
    with ObjectCache(find_compiler(targets.by_name("x86-64-v3")), 1) as cache:
        unit = Unit("undefined", text, KERNEL_FLAGS, headers(ISA))
        undefined = cache.compile(unit).result().read_bytes()
        empty = Unit("empty", text.replace("other(x);", ""), KERNEL_FLAGS, headers(ISA))
        no_model = cache.compile(empty).result().read_bytes()
    host = host_library().read_bytes()
    with pytest.raises(ToolchainError, match=r"nothing defines qg\.other"):
        attach(host, [("a.o", undefined)])
    with pytest.raises(ToolchainError, match="nothing defines qigen_model_description"):
        attach(host, [("a.o", no_model)])
    with pytest.raises(ToolchainError, match="f is defined twice"):
        attach(host, [("a.o", no_model), ("b.o", no_model)])
    with pytest.raises(ToolchainError, match="no ELF file"):
        attach(host, [("a.o", b"something else")])
