"""Tiny language models, built by hand: one flat graph for every family's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qigen.formats import by_name
from qigen.ir import Graph, State
from qigen.ir.graph import Array, Constant
from qigen.quantize.rtn import quantize_rtn


@dataclass(frozen=True)
class Tiny:
    """What the families differ in."""

    d: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    vocab: int = 50
    layers: int = 2
    attn_format: str = "q4_0"
    v_format: str = "q4_0"
    gate_format: str = "q4_1"
    up_format: str = "q4_1"
    head_format: str = "q8_0"
    act: str = "silu"
    qkv_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    window: int = 0  # of the even layers
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    style: str = "half"
    rotary_dim: int = 16
    factors: bool = False
    tied: bool = False


FAMILIES = {
    "llama": Tiny(style="interleaved", tied=True),
    "llama3": Tiny(factors=True, v_format="q5_0", style="interleaved"),
    "stories": Tiny(attn_format="f32", v_format="f32", gate_format="f32", up_format="f32",
                    head_format="f32", ffn=172, style="interleaved", tied=True),
    "qwen2": Tiny(qkv_bias=True, ffn_bias=True),
    "qwen3": Tiny(qk_norm=True, head_dim=32, rotary_dim=32),
    "gemma2": Tiny(post_norms=True, window=3, attn_softcap=20.0, final_softcap=5.0,
                   act="gelu_tanh", embedding_scale=8.0, tied=True, head_dim=32, rotary_dim=32),
    "gemma3": Tiny(post_norms=True, window=4, qk_norm=True, act="gelu_tanh", embedding_scale=8.0,
                   n_kv_heads=1, tied=True),
    "phi3": Tiny(rotary_dim=12, n_kv_heads=4),
    "mixed": Tiny(gate_format="u3g32", up_format="s6g32"),
    "no_rope": Tiny(rotary_dim=0),
}  # fmt: skip


def build(tiny: Tiny, seed: int = 0) -> Graph:
    """The flat graph of a tiny model with random weights."""
    rng = np.random.default_rng(seed)
    graph = Graph("tiny")

    def vector(name: str, n: int, mean: float = 1.0) -> str:
        data = (mean + 0.2 * rng.standard_normal(n)).astype(np.float32)
        return graph.add_constant(name, data)

    def matrix(name: str, n: int, k: int, format: str) -> str:
        w: Array = (rng.standard_normal((n, k)) / math.sqrt(k)).astype(np.float32)
        data: Constant = w if format == "f32" else quantize_rtn(w, by_name(format))
        return graph.add_constant(name, data)

    t = tiny
    ids = graph.add_input("input_ids", ("T",), "i32")
    positions = graph.add_input("positions", ("T",), "i32")
    rows = graph.add_input("rows", ("R",), "i32")
    table = matrix("embedding", t.vocab, t.d, t.head_format)
    x = graph.add("Embedding", ids, table, name="x", scale=t.embedding_scale)
    factors = [vector("factors", t.rotary_dim // 2, 2.0)] if t.factors else []
    for layer in range(t.layers):

        def name(stem: str, layer: int = layer) -> str:
            return f"l{layer}.{stem}"

        def norm(x: str, stem: str, n: int = t.d, head_dim: int = 0, layer: int = layer) -> str:
            w = vector(f"l{layer}.{stem}.w", n)
            return graph.add("RMSNorm", x, w, name=f"l{layer}.{stem}", layer=layer, eps=1e-5,
                             head_dim=head_dim)  # fmt: skip

        def product(x: str, stem: str, n: int, k: int, format: str, bias: bool = False,
                    layer: int = layer) -> str:  # fmt: skip
            full = f"l{layer}.{stem}"
            extra = [vector(f"{full}.b", n, 0.0)] if bias else []
            w = matrix(f"{full}.w", n, k, format)
            return graph.add("MatMul", x, w, *extra, name=full, layer=layer)

        h = norm(x, "attn_norm")
        q_width, kv_width = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
        q = product(h, "q", q_width, t.d, t.attn_format, t.qkv_bias)
        k = product(h, "k", kv_width, t.d, t.attn_format, t.qkv_bias)
        v = product(h, "v", kv_width, t.d, t.v_format, t.qkv_bias)
        if t.qk_norm:
            q = norm(q, "q_norm", t.head_dim, t.head_dim)
            k = norm(k, "k_norm", t.head_dim, t.head_dim)
        if t.rotary_dim:
            base = 1e4 if layer % 2 else 1e3
            q, k = (
                graph.add("Rope", z, positions, *factors, name=name(f"rope_{which}"), layer=layer,
                          head_dim=t.head_dim, rotary_dim=t.rotary_dim, base=base, style=t.style,
                          position_scale=0.5, attn_factor=1.1)
                for which, z in (("q", q), ("k", k))
            )  # fmt: skip
        state = graph.add_state(State(name("kv"), "kv", t.n_kv_heads, t.head_dim))
        kv = graph.add("KVAppend", k, v, positions, name=name("append"), layer=layer, state=state)
        h = graph.add(
            "Attention", q, kv, positions, name=name("attention"), layer=layer, state=state,
            n_heads=t.n_heads, n_kv_heads=t.n_kv_heads, head_dim=t.head_dim,
            scale=t.head_dim**-0.5, window=0 if layer % 2 else t.window, softcap=t.attn_softcap,
        )  # fmt: skip
        h = product(h, "o", t.d, q_width, t.attn_format)
        if t.post_norms:
            h = norm(h, "post_attn")
        x = graph.add("Add", x, h, name=name("x_attn"), layer=layer)
        h = norm(x, "ffn_norm")
        gate = product(h, "gate", t.ffn, t.d, t.gate_format, t.ffn_bias)
        up = product(h, "up", t.ffn, t.d, t.up_format)
        h = graph.add("GatedAct", gate, up, name=name("act"), layer=layer, kind=t.act)
        h = product(h, "down", t.d, t.ffn, t.gate_format, t.ffn_bias)
        if t.post_norms:
            h = norm(h, "post_ffn")
        x = graph.add("Add", h, x, name=name("x_ffn"), layer=layer)
    x = graph.add("SelectRows", x, rows, name="selected")
    x = graph.add("RMSNorm", x, vector("final_norm.w", t.d), name="final_norm", eps=1e-5)
    head = table if t.tied else matrix("head.w", t.vocab, t.d, t.head_format)
    x = graph.add("MatMul", x, head, name="raw" if t.final_softcap else "logits")
    if t.final_softcap:
        x = graph.add("Softcap", x, name="logits", cap=t.final_softcap)
    graph.outputs.append(x)
    return graph
