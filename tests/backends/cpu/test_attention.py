"""The attention over every KV format, step by step as a session makes them, against numpy.

Keys and values are the same numbers on both sides, so that no code differs and what is left is the
rounding of the arithmetic: that of f32, and that of the factors of codes (queries and weights with
the scales folded in, see cpu/attention/factor.j2). Each number of a factor is off by at most half a
unit, evenly, so that its variance is unit² / 12; what that does to a result is linear in it, and
:func:`deviation` adds it up. A result is right if it lies within SIGMAS standard deviations.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.ops import render_ops
from qigen.codegen.render import render
from qigen.formats.kv import BLOCK, KV_FORMATS, KvFormat, half_block_bytes
from qigen.ir.graph import State
from qigen.ir.interpreter import KvCache
from qigen.ir.ops.attention import attend
from qigen.paths import resource_folder
from tests.backends.cpu.foreign import foreign, open_library
from tests.backends.cpu.kernel_build import FLAGS, SANITIZERS, compiler, why_not

Array = npt.NDArray[Any]

_P, _L, _I, _F, _B = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_bool,
)  # fmt: skip

SIGMAS = 6  # of the roundings of factors: one result in 5e8 lies beyond that by chance
FLOAT = 1e-5  # f32 sums of up to CAPACITY weighted values of about 1, and 5 ulp of the weights
EXACT = 127 * 128  # units of the greatest number of a factor of codes of 8 bits
ROUGH = 127  # of 4 and 2 bits

MAX_TOKENS = 80  # of a step
CHUNK = 256
CAPACITY = 832


class AttentionArgs(ctypes.Structure):
    """``qg::AttentionArgs`` of ops.h."""

    _fields_ = [("q", _P), ("q_stride", _L), ("k", _P), ("k_stride", _L), ("v", _P),
                ("v_stride", _L), ("out", _P), ("out_stride", _L), ("rope", _P), ("pairs", _I),
                ("interleaved", _B), ("q_norm", _P), ("k_norm", _P), ("eps", _F), ("sinks", _P),
                ("scale", _F),
                ("softcap", _F), ("window", _I), ("heads", _I), ("kv_heads", _I), ("layer", _L),
                ("chunk", _I), ("chunks", _I), ("partial", _P), ("positions", _P), ("kv", _P),
                ("position_bytes", _L), ("halves", _P), ("step_blocks", _I), ("m", _I),
                ("batch", _B)]  # fmt: skip


WRITE, SEALS, SEAL, ATTEND, SEALED, PARTIAL, COMBINE = range(7)
HARNESS = """\
#include "ops.cpp"
extern "C" int64_t args_bytes() { return sizeof(qg::AttentionArgs); }
extern "C" int phase(const qg::AttentionArgs* a, int what, int thread, int threads) {
  switch (what) {
    case 0: qg::attention_write_HD(*a, thread, threads); return 0;
#ifdef WINDOW
    case 1: return qg::attention_seals_HD(*a);
    case 2: qg::attention_seal_HD(*a, thread, threads); return 0;
    case 4: qg::attention_sealed_HD(*a); return 0;
#endif
    case 3: qg::attention_attend_HD(*a, thread, threads); return 0;
    case 5: return qg::attention_partial_HD(*a);
    case 6: qg::attention_combine_HD(*a, thread, threads); return 0;
  }
  return 0;
}
"""


def library(folder: Path, isa: Isa, kv: str, head_dim: int, group: int, sanitize: bool = False):
    """The unit of one head size, compiled once."""
    row = KV_FORMATS[kv]
    sources = {
        isa.header: render(isa.template),
        "kernels.h": render("cpu/kernels.h.j2"),
        "epilogue.h": render("cpu/epilogue.h.j2"),
        "ops.h": render("cpu/ops.h.j2", head_dims=(head_dim,), kv=row),
        "ops.cpp": render_ops(isa, (head_dim,), row, (1,), (group,)).text,
        "harness.cpp": HARNESS.replace("_HD", f"_{head_dim}"),
    }
    window = ["-DWINDOW"] if row.window else []
    command = [compiler(isa) or "g++", *FLAGS, *isa.flags, *(SANITIZERS if sanitize else ()),
               *window, f"-I{resource_folder('runtime') / 'include'}", "-shared", "-fPIC"]
    digest = hashlib.sha256(repr((command, sorted(sources.items()))).encode()).hexdigest()[:20]
    target = folder / f"attention-{isa.name}-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for name, text in sources.items():
                Path(scratch, name).write_text(text, encoding="utf-8")
            done = subprocess.run([*command, "harness.cpp", "-o", "out"], cwd=scratch, check=False,
                                  capture_output=True, text=True)  # fmt: skip
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
            Path(scratch, "out").replace(target)
    handle = open_library(target)
    handle.args_bytes.restype = _L
    assert handle.args_bytes() == ctypes.sizeof(AttentionArgs)
    return handle


def factor_scales(numbers: Array, group: int, bits: int) -> Array:
    """Scales ``[n / group, ...]`` of dequantized ``numbers [n, ...]`` that ``group`` rows share:
    the least has code 0, the greatest the greatest code."""
    parts = numbers.reshape(-1, group, *numbers.shape[1:])
    return np.asarray(np.ptp(parts, axis=1) / ((1 << bits) - 1))


def deviation(row: KvFormat, q: Array, keys: Array, values: Array, rounded: int, weights: Array,
              slope: Array, out: Array) -> Array:
    """Standard deviation ``[head_dim]`` of one head's result by the rounding of its factors.

    ``q [head_dim]`` is scaled; ``keys, values [n, head_dim]`` are what the query sees, the first
    ``rounded`` of them (blocks without those that stay f16 before) as codes; ``weights [n]`` are
    those of the softmax, ``slope [n]`` the derivative of a score by q . k, ``out [head_dim]`` the
    result.
    """
    lift = weights * slope  # what a result gains by a score, beside value - out
    rest = values - out
    variance = np.zeros(len(out))
    if row.bits == 8:
        unit = np.abs(q).max() / EXACT
        gain = (lift[:, None] * keys).T @ rest  # by q's number, by channel of the result
        variance += unit**2 / 12 * (gain**2).sum(axis=0)
    half, begin = ((1 << row.bits) - 1) / 2, row.first * BLOCK
    for start in range(begin, rounded, BLOCK):
        k, v = keys[start : start + BLOCK], values[start : start + BLOCK]
        w = weights[start : start + BLOCK]
        if row.bits < 8:
            scales = factor_scales(k, row.key_group, row.bits)  # [groups, head_dim]
            unit = np.abs(q * scales).max() / ROUGH
            for g, scale in enumerate(scales):
                rows = slice(g * row.key_group, (g + 1) * row.key_group)
                middle = k[rows].min(axis=0) + half * scale
                centred = np.divide(k[rows] - middle, scale, out=np.zeros_like(k[rows]),
                                    where=scale > 0)  # fmt: skip
                at = slice(start + rows.start, start + rows.stop)
                gain = (lift[at, None] * centred).T @ rest[at]
                variance += unit**2 / 12 * (gain**2).sum(axis=0)
        group = row.group(len(out)) if row.window else len(out)
        for c in range(0, len(out), group):
            part = v[:, c : c + group]
            if row.bits == 8:
                scale, middle = np.abs(part).max(axis=1) / 127, 0.0
            else:
                scale = factor_scales(part.T, part.shape[1], row.bits)[0]
                middle = (part.min(axis=1) + half * scale)[:, None]
            unit = (w * scale).max(initial=0.0) / (EXACT if row.bits == 8 else ROUGH)
            centred = np.divide(part - middle, scale[:, None], out=np.zeros_like(part),
                                where=scale[:, None] > 0)  # fmt: skip
            variance[c : c + group] += unit**2 / 12 * (centred**2).sum(axis=0)
    return np.asarray(np.sqrt(variance))


class Layer:
    """The attention of one of two layers, for several sessions, and the reference beside it."""

    def __init__(self, handle: Any, kv: str, head_dim: int, kv_heads: int, group: int,
                 sessions: int = 1, window: int = 0, softcap: float = 0.0, seed: int = 0,
                 sinks: bool = False) -> None:
        self.handle, self.row, self.head_dim = handle, KV_FORMATS[kv], head_dim
        self.kv_heads, self.heads = kv_heads, kv_heads * group
        self.window, self.softcap = window, softcap
        self.rng = np.random.default_rng(seed)
        self.position = [0] * sessions
        self.deviant: list[Array] = []  # squares of errors in standard deviations
        self.position_bytes = 2 * kv_heads * self.row.block_bytes(head_dim) // BLOCK
        session_bytes = 2 * kv_heads * self.row.window_bytes(head_dim)
        size = CAPACITY * self.position_bytes + session_bytes
        self.memory = [np.zeros(size + 4096, np.uint8) for _ in range(sessions)]
        self.bases = [-(-m.ctypes.data // 4096) * 4096 for m in self.memory]
        state = State("kv", "kv", kv_heads, head_dim)
        self.caches = [KvCache(state, kv, np.dtype(np.float64)) for _ in range(sessions)]
        # channels of keys have offsets and sizes of their own, as they have in models
        self.k_offset = self.rng.standard_normal(kv_heads * head_dim)
        self.k_size = np.exp(0.5 * self.rng.standard_normal(kv_heads * head_dim))
        # some far above all scores, where next to nothing is left of the values
        self.sinks = (4 * self.rng.standard_normal(self.heads) + 2).astype(np.float32) if (
            sinks) else None

    def step(self, sessions: list[int], m: int, threads: int = 1,
             rng: np.random.Generator | None = None) -> tuple[Array, Array, Array]:
        """``m`` tokens of one session or one of each: what was computed, the reference, and the
        standard deviation of what rounding made of it."""
        rng = rng or self.rng
        batch = len(sessions) > 1
        tokens = len(sessions) if batch else m
        positions = np.array([self.position[s] for s in sessions] if batch else
                             self.position[sessions[0]] + np.arange(m), np.int32)
        q = rng.standard_normal((tokens, self.heads * self.head_dim)).astype(np.float32)
        k, v = rng.standard_normal((2, tokens, self.kv_heads * self.head_dim)).astype(np.float32)
        k = (k * self.k_size + self.k_offset).astype(np.float32)
        scale = self.head_dim**-0.5
        expected = np.empty((tokens, self.heads * self.head_dim))
        sigma = np.zeros_like(expected)
        attrs = {"state": "kv", "n_heads": self.heads, "n_kv_heads": self.kv_heads,
                 "head_dim": self.head_dim, "scale": scale, "window": self.window,
                 "softcap": self.softcap}
        for i, s in enumerate(sessions):
            rows = slice(i, i + 1) if batch else slice(None)
            self.caches[s].append(positions[rows], k[rows], v[rows])
            ev: Any = SimpleNamespace(kv=lambda _, s=s: self.caches[s])
            sinks = None if self.sinks is None else self.sinks.astype(np.float64)
            expected[rows] = attend(q[rows].astype(np.float64), positions[rows], attrs, ev, sinks)
            if self.row.integer:
                sigma[rows] = self.deviations(s, q[rows] * scale, positions[rows], expected[rows])
            self.position[s] = int(positions[rows][-1]) + 1

        caches = np.array([[self.bases[s], CAPACITY] for s in (sessions if batch else
                                                               sessions * tokens)], np.int64)
        out = np.zeros((tokens, self.heads * self.head_dim), np.float32)
        chunks = CAPACITY // CHUNK + 2
        partial = np.zeros(tokens * self.heads * chunks * (self.head_dim + 32) + 16, np.float32)
        step_blocks = self.row.step_blocks(MAX_TOKENS)
        # f16 scratch of an earlier step: NaNs, which must not be read
        halves = np.full(max(step_blocks, 1) * self.kv_heads * half_block_bytes(self.head_dim) + 64,
                         0xFF, np.uint8)  # fmt: skip
        q = q.copy()
        args = AttentionArgs(
            q=q.ctypes.data, q_stride=q.shape[1], k=k.ctypes.data, k_stride=k.shape[1],
            v=v.ctypes.data, v_stride=v.shape[1], out=out.ctypes.data, out_stride=out.shape[1],
            sinks=None if self.sinks is None else self.sinks.ctypes.data,
            scale=scale, softcap=self.softcap, window=self.window, heads=self.heads,
            kv_heads=self.kv_heads, layer=1, chunk=CHUNK, chunks=chunks,
            partial=-(-partial.ctypes.data // 64) * 64, positions=positions.ctypes.data,
            kv=caches.ctypes.data, position_bytes=self.position_bytes,
            halves=-(-halves.ctypes.data // 64) * 64, step_blocks=step_blocks, m=tokens,
            batch=batch,
        )  # fmt: skip

        def phase(what: int) -> int:
            return [int(self.handle.phase(ctypes.byref(args), _I(what), _I(t), _I(threads)))
                    for t in range(threads)][-1]  # fmt: skip

        phase(WRITE)
        if phase(SEALS):
            phase(SEAL)
        phase(ATTEND)
        phase(SEALED)
        if phase(PARTIAL):
            phase(COMBINE)
        assert not self.memory[sessions[0]][: self.bases[sessions[0]]
                                            - self.memory[sessions[0]].ctypes.data].any()
        return out, expected, sigma

    def deviations(self, session: int, q: Array, positions: Array, expected: Array) -> Array:
        """:func:`deviation` of every row and head; of long prompts that of every 7th row."""
        sigma = np.full_like(expected, np.nan)
        cache = self.caches[session]
        for i in range(0, len(positions), 7 if len(positions) > 7 else 1):
            p = int(positions[i])
            sealed = int(cache.sealed(positions[i : i + 1])[0])
            keys, values = cache.read(p + 1, sealed)
            for h in range(self.heads):
                head = h * self.kv_heads // self.heads
                part = slice(h * self.head_dim, (h + 1) * self.head_dim)
                raw = q[i, part].astype(np.float64) @ keys[:, head].T
                cap = self.softcap
                score = cap * np.tanh(raw / cap) if cap else raw
                slope = 1 - (score / cap) ** 2 if cap else np.ones_like(raw)
                if self.window:
                    score[: max(0, p - self.window + 1)] = -np.inf
                weights = np.exp(score - score.max())
                sink = 0.0 if self.sinks is None else np.exp(self.sinks[h] - score.max())
                weights /= weights.sum() + sink
                rounded = sealed * BLOCK if self.row.window else p + 1
                sigma[i, part] = deviation(self.row, q[i, part], keys[:, head], values[:, head],
                                           rounded, weights, slope, expected[i, part])
        return sigma

    def check(self, sessions: list[int], m: int, threads: int = 1) -> Array:
        found, expected, sigma = self.step(sessions, m, threads)
        assert np.isfinite(found).all()
        known = np.isfinite(sigma)
        error = np.abs(found - expected)[known]
        assert (error < SIGMAS * sigma[known] + FLOAT).all(), self.position
        self.deviant.append(np.square(error / (sigma[known] + FLOAT)))
        return found

    def check_spread(self) -> None:
        """Over many steps errors are of one standard deviation in the mean: more is no rounding."""
        assert np.concatenate(self.deviant).mean() < 1.2**2


def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "attention"
    folder.mkdir(exist_ok=True)
    return folder


# Every row with one format, dealt out; all pairs are slow.
FAST = {"scalar": "int4", "avx2": "int4", "avx512": "int8", "avxvnni": "int2", "avx512vnni": "int2",
        "avx512bf16": "f16", "neon": "int4", "neondot": "int8"}  # fmt: skip
CASES = [
    pytest.param(isa, kv, id=f"{name}-{kv}", marks=[
        pytest.mark.skipif(bool(why_not(isa)), reason=why_not(isa)),
        *([] if FAST.get(name) == kv else [pytest.mark.slow]),
    ])
    for name, isa in ISAS.items() for kv in KV_FORMATS
]  # fmt: skip


@pytest.mark.parametrize(("isa", "kv"), CASES)
def test_a_session(isa: Isa, kv: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompts and single tokens over the borders of blocks, windows and chunks."""
    layer = Layer(library(folder_of(tmp_path_factory), isa, kv, 32, 3), kv, 32, 2, 3)
    steps = [1, 62, 1, 1, 62, 1, 80, 1, 79, *[1] * 3, 80, 80]
    if foreign(isa):
        steps = [70, 80, 80, *[1] * 30, 5]
    for m in steps:
        layer.check([0], m)
    layer.check_spread()


@pytest.mark.parametrize("kv", ["int8", "int2"])
@pytest.mark.parametrize(("head_dim", "group"), [(24, 7), (80, 2)])
def test_heads(kv: str, head_dim: int, group: int,
               tmp_path_factory: pytest.TempPathFactory) -> None:
    """Heads that are no whole vectors, and groups that are no whole tiles of rows."""
    isa = next(i for i in reversed(list(ISAS.values())) if not why_not(i) and not foreign(i))
    handle = library(folder_of(tmp_path_factory), isa, kv, head_dim, group)
    for window, softcap, sinks in ((0, 0.0, False), (100, 30.0, False), (0, 0.0, True)):
        layer = Layer(handle, kv, head_dim, 1, group, window=window, softcap=softcap, sinks=sinks)
        for m in (80, 80, 47, 1, 1, 80, *[1] * 20):
            layer.check([0], m)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["int4", "int2"])
def test_sanitized(kv: str, tmp_path: Path) -> None:
    """Without undefined behaviour, the scalar row."""
    isa = ISAS["scalar"]
    if why_not(isa):
        pytest.skip(why_not(isa))
    flags = [f for f in SANITIZERS if "address" not in f]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.SANITIZERS", [*flags, "-fsanitize=undefined"])
        layer = Layer(library(tmp_path, isa, kv, 24, 3, sanitize=True), kv, 24, 1, 3)
    for m in (80, 80, 47, *[1] * 5):
        layer.check([0], m)


@pytest.fixture(params=["f16", "int8", "int4", "int2"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A maker of layers for this machine's best instruction set."""
    isa = next(i for i in reversed(list(ISAS.values())) if not why_not(i) and not foreign(i))
    handle = library(folder_of(tmp_path_factory), isa, request.param, 32, 3)
    return lambda sessions=1: Layer(handle, request.param, 32, 2, 3, sessions=sessions)


def test_threads(native: Any) -> None:
    """To the last bit the same for any number."""
    results = []
    for threads in (1, 2, 3, 4):
        layer = native(2)
        results.append([layer.step([0], m, threads)[0] for m in (80, 80, 80, *[1] * 70)])
        layer.step([1], 30, threads)
        results[-1] += [layer.step([0, 1], 1, threads)[0] for _ in range(70)]
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_batches(native: Any) -> None:
    """Sessions of different lengths; each token gets what it would get alone."""
    layer, lengths = native(4), [1, 63, 200, 310]
    for s, n in enumerate(lengths):
        for begin in range(0, n, MAX_TOKENS):
            layer.check([s], min(MAX_TOKENS, n - begin))
    for _ in range(70):
        layer.check([0, 1, 2, 3], 1)


def test_rewinding(native: Any) -> None:
    """To any position, near and far, and on from there by one token and by several."""
    layer = native()
    for m in (80, 80, 80, 80, 30):
        layer.check([0], m)
    for back, steps in ((1, [1, 1]), (40, [1] * 90), (100, [80, 20]), (170, [1, 1, 80]),
                        (300, [7, 1, 80, 80]), (64, [1] * 70), (200, [80, 80, 80])):  # fmt: skip
        layer.position[0] = max(0, layer.position[0] - back)
        for m in steps:
            layer.check([0], m)
    layer.position[0] = 0
    for m in (1, 1, 80, 80, 80):
        layer.check([0], m)


def test_what_is_rounded_once_stays(native: Any) -> None:
    """A step that is taken back and made again gives the same bits, over the border of a block."""
    layer = native()
    layer.step([0], 80)
    layer.step([0], 45)
    first = []
    for i in range(140):
        first.append(layer.step([0], 1, rng=np.random.default_rng(i))[0])
        layer.position[0] -= 1
        again = layer.step([0], 1, rng=np.random.default_rng(i))[0]
        assert np.array_equal(first[-1], again)


def test_bytes() -> None:
    """What a position and a session take; the documents name them."""
    for row in KV_FORMATS.values():
        for head_dim in (16, 24, 64, 80, 96, 128, 256):
            assert row.block_bytes(head_dim) % BLOCK == 0
            assert row.window_bytes(head_dim) % 32 == 0
    assert KV_FORMATS["f16"].block_bytes(64) == BLOCK * 256
    assert KV_FORMATS["int8"].block_bytes(64) == BLOCK * 136
    assert KV_FORMATS["int4"].block_bytes(64) == BLOCK * 76
    assert KV_FORMATS["int2"].block_bytes(64) == BLOCK * 44
