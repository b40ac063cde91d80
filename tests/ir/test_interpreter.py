from __future__ import annotations

import numpy as np
import pytest

from qigen.errors import BadInput, UsageError
from qigen.formats import QuantizedTensor, by_name
from qigen.ir import Graph, State
from qigen.ir.graph import Array
from qigen.ir.interpreter import Interpreter, KvCache, round_to_int8
from qigen.quantize.rtn import quantize_rtn
from tests.ir.test_graph import Lazy
from tests.ir.tiny import FAMILIES, build

IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_is_all_at_once(family: str) -> None:
    graph = build(FAMILIES[family])
    interpreter = Interpreter(graph, dtype=np.float64)
    rows = np.arange(len(IDS))
    whole = interpreter.step({"input_ids": IDS, "rows": rows})["logits"]
    assert whole.dtype == np.float64
    assert np.isfinite(whole).all()
    assert interpreter.position == len(IDS)
    interpreter.reset()
    parts = [interpreter.step({"input_ids": part, "rows": np.arange(len(part))})["logits"]
             for part in (IDS[:4], IDS[4:5], IDS[5:])]  # fmt: skip
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9, atol=1e-11)
    interpreter.rewind(3)
    again = interpreter.step({"input_ids": IDS[3:], "rows": np.arange(len(IDS) - 3)})["logits"]
    np.testing.assert_allclose(again, whole[3:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_close_to_float64(family: str) -> None:
    graph = build(FAMILIES[family])
    exact = Interpreter(graph, dtype=np.float64).step({"input_ids": IDS})["logits"]
    single = Interpreter(graph).step({"input_ids": IDS})["logits"]
    assert single.dtype == np.float32
    assert exact.shape == single.shape == (1, 50)
    np.testing.assert_allclose(single, exact, atol=2e-5 * float(np.abs(exact).max()))


def test_int8_rounding_by_definition() -> None:
    x = np.random.default_rng(0).standard_normal((3, 172)).astype(np.float32)
    x[1, 32:64] = 0.0
    x[2, 160:] = 1e-3  # the tail is a group of its own
    out = round_to_int8(x)
    assert out.dtype == np.float32
    for row in range(3):
        for start in range(0, 172, 32):
            group = x[row, start : start + 32]
            scale = np.abs(group).max() / np.float32(127)
            for i, value in enumerate(group):
                q = np.rint(value / scale) if scale else np.float32(0)
                assert abs(q) <= 127
                assert out[row, start + i] == np.float32(scale) * q
    assert round_to_int8(x[:0]).shape == (0, 172)


def test_int4_rounding_by_definition() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 70)).astype(np.float32)
    x[:, 40] *= 30
    x[2] = 0
    for group in (32, 70):
        out = round_to_int8(x, group, 7)
        apart = round_to_int8(x, group, 7, np.array([40]))
        for a in range(0, 70, group):
            part = x[:, a : a + group]
            s = np.abs(part).max(axis=1, keepdims=True) / np.float32(7)
            q = np.rint(np.divide(part, s, out=np.zeros_like(part), where=s > 0))
            np.testing.assert_array_equal(out[:, a : a + group], s * q)
            others = np.delete(part, 40 - a, axis=1) if a <= 40 < a + group else part
            s = np.abs(others).max(axis=1, keepdims=True) / np.float32(7)
            s = np.maximum(s, np.abs(part).max(axis=1, keepdims=True) / np.float32(127))
            q = np.rint(np.divide(part, s, out=np.zeros_like(part), where=s > 0))
            np.testing.assert_array_equal(apart[:, a : a + group], s * q)
        error = [np.square(y - x).sum() for y in (out, apart)]
        assert error[1] < 0.3 * error[0], "the others keep their steps beside an outlier"


def test_int8_mode_rounds_the_x_of_quantized_products_only() -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    graph = Graph("g")
    graph.add_input("input_ids", ("T",), "i32")
    graph.add_constant("x", x)
    graph.add("Embedding", "input_ids", "x", name="e")
    for name in ("f32", "f16", "q4_0"):
        graph.add_constant(f"w.{name}", quantize_rtn(w, by_name(name)))
        graph.outputs.append(graph.add("MatMul", "e", f"w.{name}", name=name))
    out = Interpreter(graph, activations="int8", dtype=np.float64).step({"input_ids": range(4)})
    codes: dict[str, Array] = {"f32": x, "f16": x, "q4_0": round_to_int8(x.astype(np.float64))}
    for name, rounded in codes.items():
        dense = quantize_rtn(w, by_name(name)).dequantize().astype(np.float64)
        np.testing.assert_allclose(out[name], rounded @ dense.T, rtol=1e-12)
    assert np.abs(out["q4_0"] - x @ dense.T).max() > 1e-4


def test_cache_rounding() -> None:
    state = State("kv", "kv", 3, 8)
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 5, 24)).astype(np.float32)
    k[2, 8:16] = 0.0
    positions = np.arange(5)
    stored = {}
    for kind in ("f32", "f16", "int8"):
        cache = KvCache(state, kind, np.dtype(np.float32))
        cache.append(positions, k, v)
        stored[kind] = cache.read(5)
    np.testing.assert_array_equal(stored["f32"][0].reshape(5, 24), k)
    np.testing.assert_array_equal(stored["f16"][1].reshape(5, 24), v.astype(np.float16))
    for array, got in zip((k, v), stored["int8"], strict=True):
        heads = array.reshape(5, 3, 8)
        scale = np.abs(heads).max(-1, keepdims=True) / np.float32(127)
        codes = np.rint(heads / np.where(scale > 0, scale, 1))
        np.testing.assert_array_equal(got, scale * codes)


@pytest.mark.parametrize(("kv", "tolerance"), [("f16", 2e-3), ("int8", 5e-2)])
def test_cache_kinds_stay_close(kv: str, tolerance: float) -> None:
    graph = build(FAMILIES["gemma3"])
    exact = Interpreter(graph).step({"input_ids": IDS})["logits"]
    rounded = Interpreter(graph, kv=kv).step({"input_ids": IDS})["logits"]
    difference = float(np.abs(exact - rounded).max())
    assert 0 < difference < tolerance * float(np.abs(exact).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_logits(family: str) -> None:
    interpreter = Interpreter(build(FAMILIES[family]), activations="int8", kv="int8")
    assert interpreter.step({"input_ids": IDS, "rows": []})["logits"].shape == (0, 50)
    assert interpreter.position == len(IDS)


def test_cache_grows_over_many_steps() -> None:
    graph = build(FAMILIES["stories"])
    ids = np.random.default_rng(4).integers(0, 50, 150)
    interpreter = Interpreter(graph, dtype=np.float64)
    whole = interpreter.step({"input_ids": ids})["logits"]
    interpreter.reset()
    for start in range(0, 150, 30):
        last = interpreter.step({"input_ids": ids[start : start + 30]})["logits"]
    np.testing.assert_allclose(last, whole, rtol=1e-9)


def test_matrices_beyond_the_cache_and_lazy_ones() -> None:
    graph = build(FAMILIES["llama"])
    handles = {}
    for name, data in graph.constants.items():
        if isinstance(data, QuantizedTensor):
            handles[name] = graph.constants[name] = Lazy(data)
    outs = []
    for cache_bytes in (0, 30_000, 1 << 30):
        interpreter = Interpreter(graph, cache_bytes=cache_bytes)
        interpreter.step({"input_ids": IDS})
        outs.append(interpreter.step({"input_ids": IDS})["logits"])
    np.testing.assert_allclose(outs[0], outs[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outs[1], outs[2], rtol=1e-5, atol=1e-6)
    assert {handle.loads for handle in handles.values()} == {3}  # once an interpreter


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs input_ids"),
        ({"input_ids": []}, "at least one token"),
        ({"input_ids": [[1]]}, "a vector"),
        ({"input_ids": [1.5]}, "must be integers"),
        ({"input_ids": [50]}, r"outside of 0\.\.49"),
        ({"input_ids": [-1]}, r"outside of 0\.\.49"),
        ({"input_ids": [1], "rows": [1]}, "numbers from 0 to 0"),
        ({"input_ids": [1], "rows": 0}, "must be a vector"),
        ({"input_ids": [1], "mask": [1]}, "inputs must be"),
        ({"input_ids": [1], "positions": [0]}, "leave them out"),
    ],
)
def test_wrong_inputs(inputs: dict[str, list[int]], message: str) -> None:
    interpreter = Interpreter(build(FAMILIES["llama"]))
    with pytest.raises(BadInput, match=message):
        interpreter.step(inputs)
    assert interpreter.position == 0


@pytest.mark.parametrize(
    "options", [{"dtype": np.float16}, {"activations": "int3"}, {"kv": "int3"}]
)
def test_wrong_options(options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        Interpreter(build(FAMILIES["llama"]), **options)  # type: ignore[arg-type]


def test_rewind_is_checked() -> None:
    interpreter = Interpreter(build(FAMILIES["llama"]))
    with pytest.raises(UsageError, match="cannot rewind to 1"):
        interpreter.rewind(1)
