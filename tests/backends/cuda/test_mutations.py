"""Faults planted in kernels: each must be found, by a finding of the emulator or a wrong result.

The faults that nothing here can show (the emulator is sequentially consistent and warps run in
lock step) are named in docs/gpu.md: a missing fence on the side of the reader, a missing barrier
between the parts of a block and the counter, which only the rarest of schedules would show.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest

from qigen.backends.cuda import toolchain
from qigen.backends.cuda.emulator import EmulatedDevice, Finding
from qigen.backends.cuda.emulator import Schedule as Turns
from qigen.backends.cuda.gemm import GemmSpec, Schedule, render_gemm
from qigen.backends.cuda.ops import AttentionSpec, KvSpec, render_attention_mma
from qigen.formats import by_name
from tests.backends.cuda.test_attention import Prompt
from tests.backends.cuda.test_gemm import Launch, tolerance

TURNS = (("fair", 1), ("random", 1), ("priority", 1), ("priority", 2), ("priority", 3))


@dataclass(frozen=True)
class Case:
    """A kernel and a launch: tails of M, N and K, tiles that blocks share."""

    format: str
    activations: str = "f16"
    m: int = 17
    n: int = 70
    k: int = 600
    blocks: int = 5

    @functools.cached_property
    def spec(self) -> GemmSpec:
        depth = 128 if self.activations == "s4" else 64
        return GemmSpec(by_name(self.format), self.activations,
                        schedule=Schedule(1, 1, 2, depth, 3))

    @functools.cached_property
    def launch(self) -> Launch:
        return Launch(self.spec, self.m, self.n, self.k)

    @property
    def name(self) -> str:
        return self.spec.name

    def text(self) -> str:
        return render_gemm(self.spec)

    def attempt(self, ptx: str, turns: Turns) -> None:
        """Run it twice; AssertionError if a result is wrong."""
        got = self.launch.run(self.blocks, turns, ptx, launches=2)
        self.launch.check(got, tolerance(self.spec))


@dataclass(frozen=True)
class PromptCase:
    """Attention of a prompt on tensor cores: three tiles of keys, tails of tokens and keys."""

    kind: str
    window: int = 0
    nan: int = -1

    @functools.cached_property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(KvSpec(self.kind, 1, 24), 3, False)

    @property
    def name(self) -> str:
        return self.spec.mma_name

    def text(self) -> str:
        return render_attention_mma(self.spec)

    def attempt(self, ptx: str, turns: Turns) -> None:
        device = EmulatedDevice(turns)
        (kernel,) = device.load_ptx(ptx).values()
        prompt = Prompt(self.spec, self.window, 0.0, 123, 25, 1, self.nan, capacity=148)
        prompt.check(prompt.run(device, kernel, mma=True), halves=True)


INT4, ZERO4, TABLE, INT8 = Case("s4g128"), Case("z4g64"), Case("nf4g64"), Case("s4g64", "s8")
TABLE3, ONE = Case("nf3g64", m=1), Case("s8g128", m=1, n=1)
SPARSE, SIX, FP6 = Case("s4g128_2of4", m=9), Case("s6g128", m=9), Case("fp6_e3m2", m=9)
BYTES_KEPT = Case("s4g128_2of4", "s8", m=9)
APART = Case("s4gchannel_c32", "s4", m=17)
PROMPT, WINDOW, BYTES = PromptCase("f16"), PromptCase("f16", window=88), PromptCase("int8", 50)
NIBBLES, BROKEN = PromptCase("int4"), PromptCase("f16", nan=130)


@dataclass(frozen=True)
class Fault:
    """``pattern`` of the CUDA text (or of the PTX) becomes ``text``: at place ``nth``, or (-1) at
    all places."""

    name: str
    case: Case | PromptCase
    pattern: str
    text: str
    nth: int = -1
    ptx: bool = False

    def plant(self, source: str) -> str:
        """The text with the fault in it."""
        places = list(re.finditer(self.pattern, source))
        assert places, f"{self.name}: nothing to change"
        chosen = places if self.nth < 0 else [places[self.nth]]
        for place in reversed(chosen):
            source = source[: place.start()] + place.expand(self.text) + source[place.end() :]
        return source


LOOP_BARRIER = r"(wait_copies<1>\(\);\s*)__syncthreads\(\);"
FAULTS = (
    Fault("a wait for one group of copies too few", INT4, r"wait_copies<1>", "wait_copies<2>"),
    Fault("no wait for the copies", INT4, r"wait_copies<1>\(\);", ""),
    Fault("no barrier after the wait", INT4, LOOP_BARRIER, r"\1"),
    Fault("no commit in the loop", INT4, r"(stage - 1\);\s*)commit_copies\(\);", r"\1"),
    Fault("copies go to the stage that is read", INT4, r"stage == 0 \? 2 : stage - 1", "stage"),
    Fault("a step too early", INT4, r"load\(s \+ 2, stage", "load(s + 1, stage"),
    Fault("the ring of stages is one short", INT4, r"stage == 2 \? 0", "stage == 1 ? 0"),
    Fault("no barrier before partial sums overwrite stages", INT4,
          r"(wait_copies<0>\(\);\s*)__syncthreads\(\);", r"\1"),
    Fault("no barrier before partial sums are read", INT4,
          r"__syncthreads\(\);(\s*if \(warp_k == 0\) \{\s*for \(int p)", r"\1"),
    Fault("partial sums one place on", INT4, r"\(warp_k - 1\) \* 1", "warp_k * 1"),
    Fault("a warp's sums left out", TABLE, r"for \(int p = 0;", "for (int p = 1;"),
    Fault("no fence before the counter", INT4, r"__threadfence\(\);(\s*__syncthreads)", r"\1"),
    Fault("no barrier before the counter is looked at", INT4,
          r"__syncthreads\(\);(\s*finishes = )", r"\1"),
    Fault("a plain addition for an atomic", INT4, r"atomicAdd\(counters \+ tile, 1\)",
          "counters[tile]++"),
    Fault("a counter that is not set back", INT4, r"counters\[tile\] = 0;", ";"),
    Fault("a part of a shared tile left out", INT4, r"for \(int b = first_block;",
          "for (int b = first_block + 1;"),
    Fault("head and tail of a block exchanged", INT4, r"\(first == 0\)", "(first != 0)"),
    Fault("one block too many is waited for", INT4, r"== last_block - first_block",
          "== last_block - first_block + 1"),
    Fault("x without its swizzle", INT4, r"\(part \^ \(row & 7\)\)", "part"),
    Fault("the tail of K not cut", INT4, r"min\(max\((k \* 2[^;]*), 0\), 16\)", "16"),
    Fault("rows past M read", INT4, r"i < x_rows \? x_left : 0", "x_left"),
    Fault("columns past N written", ONE, r"if \(column < n\)", "", 0),
    Fault("columns past N written (second)", ONE, r"if \(column \+ 1 < n\)", ""),
    Fault("rows past M written", INT4, r"if \(row < m\)", ""),
    Fault("blocks past N read", Case("s4g128", n=70, blocks=0),
          r"min\(block_n \+ b, blocks_n - 1\)", "(block_n + b + 1)"),
    Fault("operands of the mma exchanged", INT4, r"a\[t\]\[i\], b\[0\], b\[1\]",
          "a[t][i], b[1], b[0]"),
    Fault("a magic number off by one", INT4, r"0x64006400u", "0x64006401u"),
    Fault("a zero off by one", INT4, r"0x64086408u", "0x64076407u"),
    Fault("the upper nibbles shifted wrongly", INT4, r">> 8", ">> 4"),
    Fault("scales of other columns", INT4, r"lane % 4 \* 32", "lane % 4 * 16"),
    Fault("scales of another group", ZERO4, r"group_row = \(", "group_row = 1 - ("),
    Fault("sums of x without odd columns", ZERO4, r"0x3c003c00u", "0x00003c00u"),
    Fault("zero points added", ZERO4, r"product - off \* total", "product + off * total"),
    Fault("pairs of the table exchanged", TABLE, r"values\[e & 15\] \| values\[e >> 4\] << 16",
          "values[e >> 4] | values[e & 15] << 16"),
    Fault("copies of the table mixed up", TABLE, r"lane % 8 \*", "lane % 16 *"),
    Fault("the table half filled", TABLE, r"i < 2048", "i < 1024"),
    Fault("a byte of the table twice", TABLE, r"0x4443", "0x4442"),
    Fault("top bits of another tile", TABLE3, r"tops\[0\] >> j \* 4", "tops[0] >> j * 2"),
    Fault("signed nibbles without a mask", INT8, r"codes\[j\] & 0xf0f0f0f0u", "codes[j]"),
    Fault("the scale of another row of x", INT8, r"x_scales\[row\]", "x_scales[0]"),
    Fault("an accumulator that is not cleared", INT8,
          r"(int whole\[1\]\[8\]\[4\]) = \{\};", r"\1; whole[0][0][0] = 1;"),
    Fault("registers of A exchanged", INT4,
          r"(mma\.sync\S+\s+\{[^}]*\}, \{ ?%\w+, )(%\w+), (%\w+)", r"\1\3, \2", ptx=True),
    Fault("matrices transposed", INT4, r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", ptx=True),
    Fault("a fragment read 16 bytes on", INT4, r"(ld\.shared\.v4\.u32 \{[^}]*\}, \[%\w+)\]",
          r"\1+16]", 0, ptx=True),
    Fault("a fragment read 4 bytes on", INT4, r"(ld\.shared\.v4\.u32 \{[^}]*\}, \[%\w+)\]",
          r"\1+4]", 0, ptx=True),
    Fault("the last barrier of a tile left out", INT4, r"bar\.sync\s+0;", "", 4, ptx=True),
    Fault("another table of lop3", INT4, r", 0xea;", ", 0xe8;", ptx=True),
    Fault("a sum overwritten", INT4, r"fma\.rn\.f32 (\s*%\w+, %\w+, %\w+), (%\w+);",
          r"fma.rn.f32 \1, 0f00000000;", 3, ptx=True),
    Fault("metadata of other tiles", SPARSE, r"kept\[t \* 2 \+ j / 2\]", "kept[t * 2]"),
    Fault("selectors exchanged", SPARSE, r"if \(j % 2\) multiply", "if (j % 2 == 0) multiply"),
    Fault("metadata of zeros", SPARSE, r" \^ 0x44444444u", ""),
    Fault("registers of a sparse A exchanged", SPARSE, r"w\[0\] = b\[0\], w\[1\] = b\[1\]",
          "w[1] = b[0], w[0] = b[1]"),
    Fault("scales of the other eight rows", SPARSE, r"e / 2 \? scale\.y : scale\.x",
          "e / 2 ? scale.x : scale.y"),
    Fault("x by 16 rows and not by 8", SPARSE, r"lane % 8, part", "lane % 16, part"),
    Fault("metadata of bytes of other tiles", BYTES_KEPT, r"kept\[t \* 4 \+ j\]", "kept[t * 4]"),
    Fault("metadata of bytes of zeros", BYTES_KEPT, r" \^ 0x44444444u", ""),
    Fault("rows of bytes scaled by their neighbours", BYTES_KEPT, r"factors\[e % 2\]",
          "factors[1 - e % 2]"),
    Fault("high bits of another tile", SIX, r"tops\[j / 4\]", "tops[0]"),
    Fault("high bits at the wrong place", SIX, r"r \* 2, 4, 0x00030003u", "r * 2, 5, 0x00030003u"),
    Fault("a sign that stays where it is", FP6, r"c << 10 & 0x80008000u", "c << 9 & 0x80008000u"),
    Fault("an exponent moved by a bit too few", FP6, r"\) << 8;", ") << 7;"),
    Fault("columns apart scaled by another row", APART, r"x_scales\[row \+ 8\]", "x_scales[row]"),
    Fault("columns apart of another half of K", APART, r"r / 2 \* 8 \+ lane", "lane"),
    Fault("columns apart left out", APART, r"t < 2; \+\+t", "t < 1; ++t"),
    Fault("keys read before they are here", PROMPT,
          r"wait_copies<0>\(\);(?=\s*__syncthreads\(\);  // keys)", ""),
    Fault("no barrier before keys are read", PROMPT, r"__syncthreads\(\);(?=  // keys)", ""),
    Fault("no barrier before values are read", PROMPT, r"__syncthreads\(\);(?=  // values)", ""),
    Fault("no barrier between codes and halves", BYTES,
          r"(unpack\(\d+\);\s*)__syncthreads\(\);(\s*float scores)", r"\1\2"),
    Fault("values for keys", PROMPT, r"load\(1, base", "load(0, base"),
    Fault("keys past the end read", PROMPT, r"key < left \? 16 : 0", "16"),
    Fault("scales past the end read", BYTES, r"min\(max\(left - thread \* 4, 0\), 4\) \* 4", "16"),
    Fault("scales that are not aligned", BYTES, r"begin = begin / 4 \* 4;", ""),
    Fault("a token does not see itself", PROMPT, r"key <= place\[h\]", "key < place[h]"),
    Fault("a token sees the next", PROMPT, r"key <= place\[h\]", "key <= place[h] + 1"),
    Fault("a window one short", WINDOW, r"key >= first\[h\]", "key > first[h]"),
    Fault("a tile that is clear for the last token only", PROMPT,
          r"clear_end = min\(clear_end, __shfl", "clear_end = max(clear_end, __shfl"),
    Fault("a window that is clear for the first token only", WINDOW,
          r"clear_begin = max\(clear_begin, __shfl", "clear_begin = min(clear_begin, __shfl"),
    Fault("sums not corrected for a new maximum", PROMPT,
          r"mixed\[n\]\[2 \* h \+ 1\] \*= correction", "mixed[n][2 * h + 1] *= 1.0f"),
    Fault("weights not corrected for a new maximum", PROMPT, r"weights\[h\] \*= correction;", ""),
    Fault("the maximum of a lane only", PROMPT,
          r"greatest = fmaxf\(greatest, __shfl_xor_sync\(0xffffffffu, greatest, 2\)\);", ""),
    Fault("the sum of two lanes only", PROMPT,
          r"sum \+= __shfl_xor_sync\(0xffffffffu, sum, 2\);", ""),
    Fault("an exponent of e for one of two", PROMPT, r"scale \* 1\.4426950408889634f", "scale"),
    Fault("values not transposed", PROMPT, r"x4\.trans\.shared", "x4.shared", ptx=True),
    Fault("weights of other keys", PROMPT, r"scores\[2 \* step \+ r / 2\]\[r % 2 \* 2\]",
          "scores[2 * step + r % 2][r / 2 * 2]"),
    Fault("queries of another head", PROMPT, r"\(head0 \+ r % 3\) \* 24 \+ 8",
          "(head0 + r % 2) * 24 + 8"),
    Fault("results of another half of the rows", PROMPT, r"mixed\[n\]\[2 \* h \+ e\] / sum",
          "mixed[n][2 * (1 - h) + e] / sum"),
    Fault("rows of padding in the middle of a step", PROMPT,
          r"if \(thread < 128\) \*\(uint4\*\)", "if (thread < 64) *(uint4*)"),
    Fault("a minimum left out", NIBBLES, r"step \* \(float\)\((\w+) >> 4 \* i & 15\) \+ minimum",
          r"step * (float)(\1 >> 4 * i & 15)"),
    Fault("what is no number times zero", BROKEN, r"if \(broken\)", "if (false)"),
    Fault("what is no number dropped", BROKEN, r"mixed\[n\]\[e\] \+= half_float",
          "(void)half_float"),
    Fault("no barrier before what is no number goes", BROKEN,
          r"__syncthreads\(\);(\s*#pragma unroll 1\s*for[^\n]*\n\s*uint4\* const at)", r"\1"),
    Fault("a barrier in a branch", INT4, LOOP_BARRIER, r"\1if (lane < 16) __syncthreads();"),
)

FAST = {"no barrier after the wait", "a wait for one group of copies too few",
        "a plain addition for an atomic", "rows past M read", "pairs of the table exchanged",
        "registers of A exchanged", "no fence before the counter", "selectors exchanged",
        "high bits of another tile", "no barrier before values are read",
        "sums not corrected for a new maximum"}


def how_found(fault: Fault) -> str:
    """What finds the fault, or '' if nothing does."""
    case = fault.case
    if fault.ptx:
        ptx = fault.plant(toolchain.compile_ptx(case.name, case.text()))
    else:
        ptx = toolchain.compile_ptx(case.name, fault.plant(case.text()))
    for policy, seed in TURNS:
        try:
            case.attempt(ptx, Turns(policy, seed, resident=4, quantum=24, budget=3_000_000))
        except Finding as finding:
            return f"{policy} {seed}: {str(finding).partition(' [')[0]}"
        except AssertionError:
            return f"{policy} {seed}: wrong result"
    return ""


CASES = [INT4, ZERO4, TABLE, INT8, TABLE3, ONE, SPARSE, BYTES_KEPT, SIX, FP6, APART, PROMPT, WINDOW,
         BYTES, NIBBLES, BROKEN]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_fault_nothing_is_found(case: Case | PromptCase) -> None:
    ptx = toolchain.compile_ptx(case.name, case.text())
    for policy, seed in TURNS:
        case.attempt(ptx, Turns(policy, seed, resident=4, quantum=24, budget=3_000_000))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in FAST], ids=lambda f: f.name)
def test_fault_is_found(fault: Fault) -> None:
    assert how_found(fault)


@pytest.mark.slow
def test_every_fault_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(FAULTS) >= 25
    found = {fault.name: how_found(fault) for fault in FAULTS}
    with capsys.disabled():
        print(f"\n{len(FAULTS)} planted faults:")
        for name, how in found.items():
            print(f"  {name}: {how or 'NOT FOUND'}")
    assert all(found.values())
