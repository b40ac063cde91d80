from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from qigen.errors import Unsupported
from qigen.ir import Graph, Node
from qigen.ir.interpreter import Interpreter
from qigen.ir.ops.fused import attention_parts, group_parts
from qigen.ir.verify import verify
from qigen.passes import PASSES, fuse, optimize
from qigen.passes.pipeline import KERNEL_OPERATORS
from tests.ir.tiny import FAMILIES, build

IDS = np.array([3, 1, 4, 1, 5, 9, 2])


def find(graph: Graph, name: str) -> Node:
    return next(n for n in graph.nodes if n.name == name)


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def results(graph: Graph, **options: object) -> list[np.ndarray]:
    """Logits of a prompt (some rows), a step without logits, and single tokens."""
    run = Interpreter(graph, **options)  # type: ignore[arg-type]
    steps = [(IDS, [1, 6, 0]), (IDS[:2], []), (IDS[:1], [0]), (IDS[3:5], [0, 1])]
    return [run.step({"input_ids": i, "rows": r})["logits"] for i, r in steps]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_keeps_the_numbers(family: str) -> None:
    graph = build(FAMILIES[family])
    dump = graph.to_json()
    want = results(graph, dtype=np.float64)
    for run in PASSES:
        before = graph.to_json()
        after = run(graph)
        assert graph.to_json() == before, "a pass leaves its argument alone"
        assert verify(after) == []
        for a, b in zip(results(after, dtype=np.float64), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
        graph = after
    assert set(ops(graph)) <= KERNEL_OPERATORS
    again = optimize(build(FAMILIES[family]))
    assert again.to_json() == graph.to_json()
    assert optimize(again).to_json() == again.to_json(), "a second run changes nothing"
    assert set(again.constants) == set(dump["constants"])
    assert again.states == build(FAMILIES[family]).states


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixed"])
def test_rounding_modes_see_the_same_roundings(family: str) -> None:
    flat = build(FAMILIES[family])
    for options in ({"activations": "int8"}, {"kv": "int8"}, {"kv": "f16"}):
        pairs = zip(
            results(flat, dtype=np.float64, **options),
            results(optimize(flat), dtype=np.float64, **options),
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_llama() -> None:
    graph = optimize(build(FAMILIES["llama"]))
    assert [n.op for n in graph.nodes] == [
        "Embedding",
        *("MatMulGroup", "RopeAttention", "MatMulGroup", "MatMulGroup", "MatMulGroup"),
        *("MatMulGroup", "RopeAttention"),
        *("SelectRows", "SelectRows", "MatMulGroup", "MatMulGroup", "MatMulGroup"),
        "MatMulGroup",
    ]
    qkv = find(graph, "l0.q+k+v")
    assert qkv.inputs == ["x", "l0.attn_norm.w", "l0.q.w", "l0.k.w", "l0.v.w"]
    assert qkv.outputs == ["l0.q", "l0.k", "l0.v"]
    assert qkv.attrs == {"prologue": "rmsnorm", "eps": 1e-5, "n_weights": 3, "biases": (),
                         "epilogue": "store", "act": "none", "softcap": 0.0}  # fmt: skip
    attention = find(graph, "l0.attention")
    assert attention.inputs == ["l0.q", "l0.k", "l0.v", "positions"]
    assert attention.attrs["style"] == "interleaved"
    assert attention.attrs["rotary_dim"] == 16
    out = find(graph, "l0.o")
    assert out.inputs == ["l0.attention", "l0.o.w", "x"]
    assert out.outputs == ["l0.x_attn"]
    assert (out.attrs["prologue"], out.attrs["epilogue"]) == ("none", "add")
    gated = find(graph, "l0.gate+up")
    assert gated.inputs == ["l0.x_attn", "l0.ffn_norm.w", "l0.gate.w", "l0.up.w"]
    assert gated.outputs == ["l0.act"]
    assert (gated.attrs["epilogue"], gated.attrs["act"]) == ("gated", "silu")
    head = find(graph, "logits")
    assert head.inputs == ["l1.x_ffn", "final_norm.w", "embedding"]
    assert [n.layer for n in graph.nodes[:7]] == [None, 0, 0, 0, 0, 0, 1]


def test_biases_keep_their_segments() -> None:
    graph = optimize(build(FAMILIES["qwen2"]))
    qkv = group_parts(find(graph, "l0.q+k+v"))
    assert qkv.biases == ("l0.q.b", "l0.k.b", "l0.v.b")
    pair = find(graph, "l0.gate+up")  # with a bias, the gate stays a step of its own
    assert (pair.attrs["epilogue"], pair.attrs["biases"]) == ("store", (0,))
    assert group_parts(pair).biases == ("l0.gate.b", None)
    assert find(graph, "l0.act").inputs == pair.outputs
    down = group_parts(find(graph, "l0.down"))
    assert (down.biases, down.residual) == (("l0.down.b",), "l0.x_attn")


def test_gemma() -> None:
    graph = optimize(build(FAMILIES["gemma2"]))
    assert ops(graph)["NormAdd"] == 4
    assert find(graph, "l0.x_attn").inputs == ["x", "l0.o", "l0.post_attn.w"]
    assert find(graph, "l0.x_ffn").inputs == ["l0.x_attn", "l0.down", "l0.post_ffn.w"]
    assert all(n.attrs.get("epilogue") != "add" for n in graph.nodes)
    head = find(graph, "raw")
    assert (head.outputs, head.attrs["softcap"]) == (["logits"], 5.0)
    assert find(graph, "l0.attention").attrs["window"] == 3
    assert find(graph, "l1.attention").attrs["window"] == 0


def test_head_norms_and_factors() -> None:
    parts = attention_parts(find(optimize(build(FAMILIES["qwen3"])), "l0.attention"))
    assert (parts.q_norm, parts.k_norm) == ("l0.q_norm.w", "l0.k_norm.w")
    parts = attention_parts(find(optimize(build(FAMILIES["llama3"])), "l1.attention"))
    assert (parts.q_norm, parts.freq_factors) == (None, "factors")
    both = replace(FAMILIES["qwen3"], factors=True)
    node = find(optimize(build(both)), "l0.attention")
    assert node.inputs[3:] == ["positions", "l0.q_norm.w", "l0.k_norm.w", "factors"]
    assert find(optimize(build(FAMILIES["no_rope"])), "l0.attention").attrs["rotary_dim"] == 0


def test_gate_and_up_of_two_formats_stay_apart() -> None:
    graph = optimize(build(FAMILIES["mixed"]))
    group = find(graph, "l0.gate+up")
    assert (group.outputs, group.attrs["epilogue"]) == (["l0.gate", "l0.up"], "store")
    assert find(graph, "l0.act").op == "GatedAct"


def test_selected_rows_end_behind_the_last_attention() -> None:
    graph = fuse.select_rows_early(build(FAMILIES["llama"]))
    chosen = [n for n in graph.nodes if n.op == "SelectRows"]
    assert [n.inputs for n in chosen] == [["l1.attention", "rows"], ["l0.x_ffn", "rows"]]
    for name in ("l1.o", "l1.act", "l1.x_ffn", "final_norm", "logits"):
        assert graph.values[name].shape[0] == "R", name
    for name in ("l1.attention", "l1.q", "l0.x_ffn"):
        assert graph.values[name].shape[0] == "T", name


def test_selection_of_a_value_that_others_read() -> None:
    """All rows of the last feed-forward part are needed, so nothing moves but names."""
    flat = build(FAMILIES["llama"])
    flat.outputs.append("l1.x_ffn")
    graph = optimize(flat)
    assert verify(graph) == []
    assert find(graph, "l1.x_ffn.selected").inputs == ["l1.x_ffn", "rows"]
    assert graph.values["l1.x_ffn"].shape == ("T", 64)
    a, b = (Interpreter(g, dtype=np.float64).step({"input_ids": IDS}) for g in (flat, graph))
    for name in ("logits", "l1.x_ffn"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12)


def test_selected_rows_as_graph_output() -> None:
    flat = build(FAMILIES["llama"])
    flat.outputs = ["selected"]
    graph = fuse.select_rows_early(flat)
    assert graph.outputs == ["selected"]
    assert graph.nodes[-1].inputs == ["l1.x_ffn", "rows"]


def test_a_result_that_others_read_is_not_fused_away() -> None:
    flat = build(FAMILIES["gemma2"])
    wanted = ["l0.q", "l0.gate", "l0.o", "l0.post_attn", "raw", "l0.attn_norm", "l1.rope_k"]
    flat.outputs += wanted
    graph = flat
    for run in PASSES:
        graph = run(graph)
        verify(graph)
    found = ops(graph)
    assert (found["RMSNorm"], found["Add"], found["Softcap"], found["KVAppend"]) == (2, 1, 1, 1)
    a, b = (Interpreter(g, dtype=np.float64).step({"input_ids": IDS}) for g in (flat, graph))
    for name in ("logits", *wanted):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12, err_msg=name)
    with pytest.raises(Unsupported, match="no kernel covers it"):
        optimize(flat)


def test_both_inputs_of_an_add_are_products() -> None:
    """The later product takes the Add: the earlier one is there by then."""
    graph = Graph("g")
    x = graph.add_input("x", ("T", 8), "f32")
    w = graph.add_constant("w", np.ones((8, 8), np.float32))
    first = graph.add("MatMul", graph.add("Add", x, x, name="xx"), w, name="first")
    second = graph.add("MatMul", x, w, name="second")
    graph.outputs.append(graph.add("Add", second, first, name="sum"))
    fused = fuse.fuse_epilogues(fuse.group_matmuls(graph))
    assert find(fused, "second").inputs == ["x", "w", "first"]
    assert find(fused, "first").attrs["epilogue"] == "store"
    doubled = Graph("g")
    x = doubled.add_input("x", ("T", 8), "f32")
    y = doubled.add("MatMul", x, doubled.add_constant("w", np.ones((8, 8), np.float32)), name="y")
    doubled.outputs.append(doubled.add("Add", y, y, name="twice"))
    assert ops(fuse.fuse_epilogues(fuse.group_matmuls(doubled))) == {"MatMulGroup": 1, "Add": 1}


def test_query_and_key_that_are_treated_differently_stay_flat() -> None:
    for change in ("base", "norm", "factors"):
        flat = build(FAMILIES["qwen3"])
        if change == "base":
            find(flat, "l0.rope_k").attrs["base"] = 123.0
        elif change == "norm":
            find(flat, "l0.k_norm").attrs["eps"] = 1e-3
        else:
            flat.add_constant("f", np.ones(16, np.float32))
            find(flat, "l0.rope_k").inputs.append("f")
        graph = fuse.fuse_attention(flat)
        verify(graph)
        node = find(graph, "l0.attention")
        if change == "norm":  # the norms stay outside, the rest is fused
            assert (node.op, node.attrs["qk_norm"]) == ("RopeAttention", False)
            assert node.inputs[0] == "l0.q_norm"
        else:
            assert node.op == "Attention"
        for a, b in zip(
            results(flat, dtype=np.float64), results(graph, dtype=np.float64), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_one_norm_before_attention_and_feed_forward() -> None:
    """Parallel blocks: one x feeds q, k, v and a gated pair; two groups, each with the norm."""
    graph = Graph("g")
    x = graph.add_input("x", ("T", 8), "f32")
    h = graph.add("RMSNorm", x, graph.add_constant("n", np.ones(8, np.float32)), name="h", eps=0.1)
    for name in ("q", "gate", "up", "k"):
        w = graph.add_constant(f"{name}.w", np.ones((8, 8), np.float32))
        graph.add("MatMul", h, w, name=name)
    graph.add("GatedAct", "gate", "up", name="act", kind="silu")
    graph.outputs += ["q", "k", "act"]
    fused = fuse.group_matmuls(graph)
    verify(fused)
    assert {n.name: n.attrs["epilogue"] for n in fused.nodes} == {
        "q+k": "store",
        "gate+up": "gated",
    }
    assert all(n.attrs["prologue"] == "rmsnorm" for n in fused.nodes)
