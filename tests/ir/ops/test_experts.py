"""Routers and experts: the references against plain loops, shape rules, and their fusion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qigen.errors import BadInput
from qigen.formats.catalog import by_name
from qigen.ir.graph import Graph
from qigen.ir.interpreter import Interpreter
from qigen.ir.ops.experts import gated, gates
from qigen.ir.verify import verify
from qigen.passes.memory import plan_memory
from qigen.passes.pipeline import optimize
from qigen.quantize.rtn import quantize_rtn

D, FF, EXPERTS, K = 32, 64, 5, 2


def model(
    *, softmax: str = "chosen", act: str = "silu", biases: bool = False, format: str = "",
    residual: bool = True, k: int = K,
) -> Graph:  # fmt: skip
    """Embedding, a layer of experts, logits of all rows."""
    rng = np.random.default_rng(4)
    graph = Graph("experts")

    def matrix(name: str, n: int, columns: int) -> str:
        w = (rng.standard_normal((n, columns)) / math.sqrt(columns)).astype(np.float32)
        return graph.add_constant(name, quantize_rtn(w, by_name(format)) if format else w)

    def vector(name: str, n: int) -> str:
        return graph.add_constant(name, rng.standard_normal(n).astype(np.float32))

    ids = graph.add_input("input_ids", ("T",), "i32")
    graph.add_input("positions", ("T",), "i32")
    rows = graph.add_input("rows", ("R",), "i32")
    table = matrix("table", 20, D)
    x = graph.add("Embedding", ids, table, name="x", scale=1.0)
    h = graph.add("RMSNorm", x, vector("norm", D), name="h", eps=1e-5, layer=0)
    logits = graph.add("MatMul", h, matrix("router", EXPERTS, D), vector("router.bias", EXPERTS),
                       name="routing", layer=0)  # fmt: skip
    weights = graph.add("Router", logits, name="gates", layer=0, k=k, softmax=softmax)
    shapes = {"gate": (FF, D), "up": (FF, D), "down": (D, FF)}
    constants = [matrix(f"{role}.{e}", *shape) for role, shape in shapes.items()
                 for e in range(EXPERTS)]  # fmt: skip
    if biases:
        constants += [vector(f"{role}.{e}.bias", shape[0]) for role, shape in shapes.items()
                      for e in range(EXPERTS)]  # fmt: skip
    y = graph.add("Experts", h, weights, *constants, name="experts", layer=0, act=act,
                  n_experts=EXPERTS, biases=biases, alpha=1.702, limit=0.5)  # fmt: skip
    x = graph.add("Add", x, y, name="sum", layer=0) if residual else y
    x = graph.add("SelectRows", x, rows, name="selected")
    graph.outputs.append(graph.add("MatMul", x, table, name="logits"))
    return graph


def test_gates_are_the_softmax_of_the_chosen() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    e = np.exp([0.0, 0.0, -1.0, -2.0])
    chosen = gates(logits, 3, "chosen")
    assert np.allclose(chosen[0], np.array([0, e[0], e[2], e[1]]) / e[:3].sum())
    assert np.allclose(chosen[1], [1 / 3, 1 / 3, 1 / 3, 0])  # of equal ones the first
    share = gates(logits, 3, "all")
    assert np.allclose(share[0], np.array([0, e[0], e[2], e[1]]) / e.sum())
    assert np.allclose(share / share.sum(axis=1, keepdims=True), chosen)


def test_clamped_swiglu() -> None:
    """gpt-oss's own text: clamp, ``gate * sigmoid(alpha * gate)``, ``(up + 1) * that``."""
    gate, up = np.array([-9.0, 0.5, 8.0]), np.array([-8.0, 0.25, 9.0])
    attrs = {"act": "clamped_swiglu", "alpha": 1.702, "limit": 7.0}
    g, u = np.array([-9.0, 0.5, 7.0]), np.array([-7.0, 0.25, 7.0])
    assert np.allclose(gated(gate, up, attrs), (u + 1) * g / (1 + np.exp(-1.702 * g)))


@pytest.mark.parametrize("act", ["silu", "clamped_swiglu"])
@pytest.mark.parametrize("softmax", ["chosen", "all"])
def test_flat_and_fused_graphs_agree_with_loops(act: str, softmax: str) -> None:
    graph = model(softmax=softmax, act=act, biases=True)
    verify(graph)
    fused = optimize(graph)
    assert [n.op for n in fused.nodes if n.layer == 0] == ["MatMulGroup", "RoutedExperts"]
    experts = next(n for n in fused.nodes if n.op == "RoutedExperts")
    plan = plan_memory(fused, 4)
    assert plan.offsets[experts.output] == plan.offsets[experts.inputs[0]]
    ids = [3, 7, 7, 19]
    found = [Interpreter(g, dtype=np.float64).step({"input_ids": ids, "rows": [0, 1, 2, 3]})
             for g in (graph, fused)]  # fmt: skip
    c = {n: np.asarray(a, np.float64) for n, a in graph.constants.items()
         if isinstance(a, np.ndarray)}  # fmt: skip
    for row, token in enumerate(ids):
        x = c["table"][token]
        h = x / np.sqrt(np.mean(x * x) + 1e-5) * c["norm"]
        logits = c["router"] @ h + c["router.bias"]
        best = sorted(range(EXPERTS), key=lambda e: -logits[e])[:K]
        over = best if softmax == "chosen" else range(EXPERTS)
        total = sum(math.exp(logits[e]) for e in over)
        for e in best:
            g, u = (c[f"{role}.{e}"] @ h + c[f"{role}.{e}.bias"] for role in ("gate", "up"))
            if act == "silu":
                inner = g / (1 + np.exp(-g)) * u
            else:
                g, u = np.minimum(g, 0.5), np.clip(u, -0.5, 0.5)
                inner = g / (1 + np.exp(-1.702 * g)) * (u + 1)
            x = x + math.exp(logits[e]) / total * (c[f"down.{e}"] @ inner + c[f"down.{e}.bias"])
        for step in found:
            assert np.allclose(step["logits"][row], c["table"] @ x, atol=1e-10)


def test_int8_rounds_the_rows_of_every_expert() -> None:
    graph = model(format="q8_0")
    ids = {"input_ids": [1, 2, 3], "rows": [0, 1, 2]}
    exact, rounded = (Interpreter(graph, activations=kind).step(ids)["logits"]
                      for kind in ("f32", "int8"))  # fmt: skip
    assert 0 < np.abs(exact - rounded).max() < 0.1 * exact.std()


def test_what_does_not_fit() -> None:
    with pytest.raises(BadInput, match="6 of 5 experts cannot be chosen"):
        model(k=6)

    def changed(name: str, data: Any) -> Graph:
        graph = model(format="q8_0")
        del graph.constants[name], graph.values[name]
        graph.add_constant(name, data)
        return graph

    w = np.ones((FF, D), np.float32)
    with pytest.raises(BadInput, match=r"up.3: f32\[16,32\] must have the shape \[64, 32\]"):
        verify(changed("up.3", w[:16]))
    with pytest.raises(BadInput, match=r"up matrices .* different formats \(q4_0, q8_0\)"):
        verify(changed("up.3", quantize_rtn(w, by_name("q4_0"))))
    graph = model()
    node = next(n for n in graph.nodes if n.op == "Experts")
    node.inputs.pop()
    with pytest.raises(BadInput, match="takes 17 inputs, not 16"):
        verify(graph)
