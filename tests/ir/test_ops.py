"""Every operator's reference against plain Python written from its definition."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest

from qigen.formats import by_name
from qigen.ir import Graph, State
from qigen.ir.graph import Array
from qigen.ir.interpreter import Interpreter
from qigen.quantize.rtn import quantize_rtn

RNG = np.random.default_rng(7)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


class Bench:
    """A graph around one operator whose activations come out of an embedding of all rows."""

    def __init__(self, tokens: int) -> None:
        self.graph = Graph("bench")
        self.tokens = tokens
        self.graph.add_input("input_ids", ("T",), "i32")
        self.graph.add_input("positions", ("T",), "i32")

    def activation(self, name: str, data: Array) -> str:
        self.graph.add_constant(f"{name}.data", data)
        return self.graph.add("Embedding", "input_ids", f"{name}.data", name=name)

    def constant(self, name: str, data: Any) -> str:
        return self.graph.add_constant(name, data)

    def run(self, op: str, *inputs: str, **attrs: Any) -> Array:
        self.graph.outputs = [self.graph.add(op, *inputs, name="result", **attrs)]
        interpreter = Interpreter(self.graph, dtype=np.float64)
        return interpreter.step({"input_ids": np.arange(self.tokens)})["result"]


def test_embedding_dequantizes_the_rows_it_needs() -> None:
    bench = Bench(0)
    table = quantize_rtn(floats(9, 64), by_name("q8_0"))
    bench.constant("table", table)
    bench.graph.outputs = [bench.graph.add("Embedding", "input_ids", "table", name="e", scale=3.0)]
    out = Interpreter(bench.graph).step({"input_ids": [4, 0, 8, 4]})["e"]
    np.testing.assert_array_equal(out, np.float32(3) * table.dequantize()[[4, 0, 8, 4]])


def test_select_rows() -> None:
    bench = Bench(5)
    x = floats(5, 8)
    bench.activation("x", x)
    bench.graph.add_input("rows", ("R",), "i32")
    bench.graph.outputs = [bench.graph.add("SelectRows", "x", "rows", name="s")]
    interpreter = Interpreter(bench.graph)
    out = interpreter.step({"input_ids": np.arange(5), "rows": [3, 1, 3]})["s"]
    np.testing.assert_array_equal(out, x[[3, 1, 3]])
    np.testing.assert_array_equal(interpreter.step({"input_ids": np.arange(5)})["s"], x[[4]])
    assert interpreter.step({"input_ids": np.arange(5), "rows": []})["s"].shape == (0, 8)


@pytest.mark.parametrize("head_dim", [0, 4])
def test_rms_norm(head_dim: int) -> None:
    x, n = floats(3, 12), head_dim or 12
    w = floats(n)
    bench = Bench(3)
    out = bench.run("RMSNorm", bench.activation("x", x), bench.constant("w", w),
                    eps=0.5, head_dim=head_dim)  # fmt: skip
    for t in range(3):
        for j in range(12):
            part = x[t, j // n * n : j // n * n + n]
            mean = sum(float(v) ** 2 for v in part) / n
            assert out[t, j] == pytest.approx(float(x[t, j] * w[j % n]) / math.sqrt(mean + 0.5))


@pytest.mark.parametrize("format", ["f32", "bf16", "q4_1", "u3g32", "s5g64"])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul(format: str, bias: bool) -> None:
    x, b = floats(4, 96), floats(10)
    w = quantize_rtn(floats(10, 96), by_name(format))
    bench = Bench(4)
    inputs = [bench.activation("x", x), bench.constant("w", w)]
    if bias:
        inputs.append(bench.constant("b", b))
    out = bench.run("MatMul", *inputs)
    exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T + (b if bias else 0)
    np.testing.assert_allclose(out, exact, rtol=1e-12)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_act(kind: str) -> None:
    gate, up = 4 * floats(3, 5), floats(3, 5)
    gate[0, :2] = -200.0, 200.0
    bench = Bench(3)
    out = bench.run("GatedAct", bench.activation("g", gate), bench.activation("u", up), kind=kind)
    for g, u, y in zip(gate.flat, up.flat, out.flat, strict=True):
        if kind == "silu":
            act = g / (1 + math.exp(-g)) if g > -100 else 0.0
        else:
            act = 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        assert y == pytest.approx(act * u, rel=1e-6, abs=1e-12)


def test_add_and_softcap() -> None:
    a, b = floats(3, 5), floats(3, 5)
    bench = Bench(3)
    total = bench.graph.add("Add", bench.activation("a", a), bench.activation("b", b), name="t")
    out = bench.run("Softcap", total, cap=0.7)
    np.testing.assert_allclose(out, 0.7 * np.tanh((a.astype(np.float64) + b) / 0.7), rtol=1e-12)


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("factors", [False, True])
def test_rope_is_a_complex_rotation(style: str, factors: bool) -> None:
    heads, head_dim, rot, tokens = 3, 10, 8, 6
    x = floats(tokens, heads * head_dim)
    f = np.abs(floats(rot // 2)) + 0.5
    bench = Bench(tokens)
    inputs = [bench.activation("x", x), "positions"]
    if factors:
        inputs.append(bench.constant("f", f))
    out = bench.run("Rope", *inputs, head_dim=head_dim, rotary_dim=rot, base=100.0, style=style,
                    position_scale=0.25, attn_factor=1.5)  # fmt: skip
    for t in range(tokens):
        for h in range(heads):
            row, got = x[t, h * head_dim :], out[t, h * head_dim :]
            for i in range(rot // 2):
                theta = t * 0.25 * 100.0 ** (-2 * i / rot) / (float(f[i]) if factors else 1.0)
                a, b = (2 * i, 2 * i + 1) if style == "interleaved" else (i, i + rot // 2)
                z = complex(row[a], row[b]) * 1.5 * cmath.exp(1j * theta)
                assert complex(got[a], got[b]) == pytest.approx(z, rel=1e-9)
            np.testing.assert_array_equal(got[rot:head_dim], row[rot:head_dim])


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("cap", [0.0, 0.8])
def test_attention(window: int, cap: float) -> None:
    nh, nkv, hd, tokens, scale = 4, 2, 6, 7, 0.3
    q, k, v = floats(tokens, nh * hd), floats(tokens, nkv * hd), floats(tokens, nkv * hd)
    bench = Bench(tokens)
    state = bench.graph.add_state(State("kv", "kv", nkv, hd))
    for name, data in (("q", q), ("k", k), ("v", v)):
        bench.activation(name, data)
    kv = bench.graph.add("KVAppend", "k", "v", "positions", name="kv", state=state)
    out = bench.run("Attention", "q", kv, "positions", state=state, n_heads=nh, n_kv_heads=nkv,
                    head_dim=hd, scale=scale, window=window, softcap=cap)  # fmt: skip
    for p in range(tokens):
        for h in range(nh):
            g = h // (nh // nkv)
            mine, theirs = slice(h * hd, h * hd + hd), slice(g * hd, g * hd + hd)
            seen = [j for j in range(p + 1) if not window or j > p - window]
            s = [scale * float(np.dot(q[p, mine].astype(float), k[j, theirs])) for j in seen]
            s = [cap * math.tanh(z / cap) if cap else z for z in s]
            e = [math.exp(z) for z in s]
            want = sum(w * v[j, theirs].astype(float) for w, j in zip(e, seen, strict=True))
            np.testing.assert_allclose(out[p, mine], want / sum(e), rtol=1e-9)


def test_attention_of_more_rows_than_one_chunk() -> None:
    """The rows are worked off in chunks; token by token must give the same."""
    nh, hd, tokens = 2, 4, 300
    bench = Bench(tokens)
    state = bench.graph.add_state(State("kv", "kv", 1, hd))
    for name, n in (("q", nh * hd), ("k", hd), ("v", hd)):
        bench.activation(name, floats(tokens, n))
    kv = bench.graph.add("KVAppend", "k", "v", "positions", name="kv", state=state)
    out = bench.run("Attention", "q", kv, "positions", state=state, n_heads=nh, n_kv_heads=1,
                    head_dim=hd, scale=0.5, window=200)  # fmt: skip
    one = Interpreter(bench.graph, dtype=np.float64)
    rows = [one.step({"input_ids": [i]})["result"][0] for i in range(tokens)]
    np.testing.assert_allclose(out, np.array(rows), rtol=1e-10)
