"""Elementwise operators, casts, reductions, quantization where ONNX has no tests: open sizes,
parameters of the run, all types, random numbers, bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

import qigen
from qigen.errors import BadInput, Unsupported
from qigen.frontends.onnx import import_model
from qigen.ir.types import TYPES

HEAD = '<ir_version: 10, opset_import: ["" : {opset}]>\ng {signature} {{\n{body}\n}}'


def parsed(signature: str, body: str, opset: int = 21) -> onnx.ModelProto:
    text = HEAD.format(opset=opset, signature=signature, body=body)
    return onnx.parser.parse_model(text)


def runs(model: onnx.ModelProto, folder: Path, *feeds: dict[str, Any]) -> list[dict[str, Any]]:
    """The results for each of the feeds; every number of threads must give the same."""
    onnx.save(model, folder / "m.onnx")
    qigen.compile(folder / "m.onnx", folder / "m.qgn")
    loaded = [qigen.load(folder / "m.qgn", threads=n) for n in (1, 2, 3)]
    results = []
    for f in feeds:
        first, *others = [m.run(f) for m in loaded]
        for other in others:
            for name, array in first.items():
                assert array.tobytes() == other[name].tobytes(), f"{name}: threads"
        results.append(first)
    return results


def test_open_sizes_and_parameters_of_the_run(tmp_path: Path) -> None:
    model = parsed(
        "(float16[n,1,m] a, float16[3,1] b, double[n,k,m] d, int64[1] axis, int32[n,m] i) "
        "=> (float16[n,3,m] sum, double[n,k,m] kept, double[p,q] gone, int32[m] total, "
        "double[n,1,m] top, double logs, float16[n,1,m] soft, int32[n,m] rest, float mean)",
        """sum = Add(a, b)
        kept = ReduceSum(d, axis)
        gone = ReduceSum <keepdims = 0> (d, axis)
        first = Constant <value = int64[1] {0}> ()
        total = ReduceSum <keepdims = 0> (i, first)
        middle = Constant <value = int64[1] {1}> ()
        top = ReduceMax(d, middle)
        logs = ReduceLogSumExp <keepdims = 0> (d)
        soft = Softmax <axis = 0> (a)
        three = Constant <value = int32[1] {3}> ()
        rest = Mod(i, three)
        f = Cast <to = 1> (d)
        mean = ReduceMean <keepdims = 0> (f)""",
    )
    rng = np.random.default_rng(0)
    feeds: list[dict[str, Any]] = []
    for n, k, m, axis in ((2, 5, 70, -1), (3, 1, 7, 0), (1, 9, 200, 1), (0, 4, 3, 2)):
        feeds.append({
            "a": rng.standard_normal((n, 1, m)).astype(np.float16),
            "b": rng.standard_normal((3, 1)).astype(np.float16),
            "d": rng.standard_normal((n, k, m)),
            "axis": np.array([axis]),
            "i": rng.integers(-(2**31), 2**31, (n, m)).astype(np.int32),
        })
    for f, got in zip(feeds, runs(model, tmp_path, *feeds), strict=True):
        d, axis = f["d"], int(f["axis"][0])
        np.testing.assert_array_equal(got["sum"], f["a"] + f["b"])
        np.testing.assert_allclose(got["kept"], d.sum(axis, keepdims=True), atol=1e-12)
        np.testing.assert_allclose(got["gone"], d.sum(axis), atol=1e-12)
        np.testing.assert_array_equal(got["total"], f["i"].sum(0, dtype=np.int32))
        np.testing.assert_array_equal(got["top"], d.max(1, keepdims=True))
        np.testing.assert_array_equal(got["rest"], f["i"] % 3)
        with np.errstate(all="ignore"):
            logs = np.log(np.exp(d).sum())
        np.testing.assert_allclose(got["logs"], logs)
        if d.size:
            np.testing.assert_allclose(got["mean"], d.mean(), atol=1e-6)
            e = np.exp(f["a"].astype(np.float32))
            np.testing.assert_allclose(got["soft"], e / e.sum(0), rtol=1e-3)
    bad = dict(feeds[0], axis=np.array([3]))
    with pytest.raises(BadInput, match=r"ReduceSum.*axes are out of range"):
        qigen.load(tmp_path / "m.qgn", threads=2).run(bad)


def test_softmax_before_opset_13_takes_all_axes_from_one_on(tmp_path: Path) -> None:
    model = parsed("(float[n,3,m] x) => (float[n,3,m] y, float[n,3,m] last)",
                   "y = Softmax(x)\nlast = Softmax <axis = 2> (x)", opset=11)
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    (got,) = runs(model, tmp_path, {"x": x})
    e = np.exp(x)
    np.testing.assert_allclose(got["y"], e / e.sum((1, 2), keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(got["last"], e / e.sum(2, keepdims=True), rtol=1e-5)


def test_casts_to_and_from_every_type(tmp_path: Path) -> None:
    names = [n for n in TYPES if n != "f8e8m0"]
    nodes, outputs = [], []
    for name in names:
        for source, to, result in (("x", TYPES[name].onnx, name), (name, 1, f"{name}_f32"),
                                   (name, 7, f"{name}_i64")):
            nodes.append(helper.make_node("Cast", [source], [result], to=to))
            outputs.append(helper.make_tensor_value_info(result, to, ["n"]))
    graph = helper.make_graph(
        nodes, "casts", [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n"])], outputs
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    # the second is just above what rounds down: it must not be rounded to f32 on the way
    x = np.array([0, 1, -1, 0.5, 1.0625 + 2**-40, 3.25, -1.75, 1, 2**-9 * 1.5])
    (got,) = runs(model, tmp_path, {"x": x})
    for name in names:
        kind = TYPES[name]
        integer = name[0] in "iu"
        wanted = (x.astype(np.int64) if integer else x).astype(kind.numpy).astype(np.float64)
        if name.startswith("f8e4m3"):
            wanted[4] = 1.125  # ml_dtypes does round to f32 on the way
        assert got[name].dtype == kind.numpy
        np.testing.assert_array_equal(got[name].astype(np.float64), wanted, name)
        own = got[name].astype(np.float64)
        np.testing.assert_array_equal(got[f"{name}_f32"], own.astype(np.float32), name)
        whole = got[name] if kind.numpy.kind == "u" else own
        np.testing.assert_array_equal(got[f"{name}_i64"], whole.astype(np.int64), name)


def test_quantization_of_open_sizes(tmp_path: Path) -> None:
    model = parsed(
        "(float[n,k] x, float[k] s, int8[k] z, float16[b,k] t) "
        "=> (int8[n,k] by_axis, float[n,k] back, uint4[n,k] blocks, float16[n,k] coarse, "
        "uint8[n,k] q, float scale, uint8 zero)",
        """by_axis = QuantizeLinear <axis = 1> (x, s, z)
        back = DequantizeLinear <axis = 1> (by_axis, s, z)
        h = Cast <to = 10> (x)
        blocks = QuantizeLinear <axis = 0, block_size = 4, output_dtype = 21> (h, t)
        coarse = DequantizeLinear <axis = 0, block_size = 4> (blocks, t)
        q, scale, zero = DynamicQuantizeLinear (x)""",
    )
    rng = np.random.default_rng(0)
    n, k = 10, 33
    x = (rng.standard_normal((n, k)) * 9).astype(np.float32)
    s = rng.uniform(0.01, 0.2, k).astype(np.float32)
    z = rng.integers(-100, 100, k).astype(np.int8)
    t = rng.uniform(0.5, 1, (3, k)).astype(np.float16)
    feeds: dict[str, Any] = {"x": x, "s": s, "z": z, "t": t}
    (got,) = runs(model, tmp_path, feeds)
    codes = np.clip(np.rint(x / s) + z, -128, 127)
    np.testing.assert_array_equal(got["by_axis"], codes)
    np.testing.assert_array_equal(got["back"], (codes - z).astype(np.float32) * s)
    each = np.repeat(t, 4, 0)[:n]
    small = np.clip(np.rint(x.astype(np.float16) / each), 0, 15)
    assert got["blocks"].dtype == ml_dtypes.uint4
    np.testing.assert_array_equal(got["blocks"].astype(int), small)
    np.testing.assert_array_equal(got["coarse"], small.astype(np.float16) * each)
    scale = np.float32((x.max() - x.min()) / np.float32(255))
    assert got["scale"] == scale
    zero = np.rint(-x.min() / scale)
    assert got["zero"] == zero
    np.testing.assert_array_equal(got["q"], np.clip(np.rint(x / scale) + zero, 0, 255))
    with pytest.raises(BadInput, match=r"scale or zero point does not fit"):
        qigen.load(tmp_path / "m.qgn").run(dict(feeds, t=t[:2]))


def test_random_numbers_repeat_and_are_distributed_as_asked(tmp_path: Path) -> None:
    model = parsed(
        "(float[n] x, float[1,3] logits, bool training) "
        "=> (float[20000] u, float[20000] normal, double[n] like, float[n] coin, "
        "int32[1,9000] drawn, float[n] dropped, bool[n] mask)",
        """u = RandomUniform <shape = [20000], low = -1.0, high = 3.0> ()
        normal = RandomNormal <shape = [20000], mean = 2.0, scale = 0.5, seed = 7.0> ()
        like = RandomUniformLike <dtype = 11, seed = 7.0> (x)
        coin = Bernoulli <seed = 1.0> (x)
        drawn = Multinomial <sample_size = 9000> (logits)
        ratio = Constant <value = float {0.25}> ()
        dropped, mask = Dropout (x, ratio, training)""",
    )
    x = np.full(20000, 0.3, np.float32)
    feeds: dict[str, Any] = {
        "x": x, "logits": np.log(np.array([[0.2, 0.5, 0.3]], np.float32)),
        "training": np.array(True),
    }
    got, again, plain = runs(model, tmp_path, feeds, feeds, dict(feeds, training=np.array(False)))
    for name in got:
        assert got[name].tobytes() == again[name].tobytes(), name
    assert got["u"].min() >= -1 and got["u"].max() < 3 and abs(got["u"].mean() - 1) < 0.03
    assert abs(got["normal"].mean() - 2) < 0.02 and abs(got["normal"].std() - 0.5) < 0.02
    assert got["like"].dtype == np.float64 and abs(got["like"].mean() - 0.5) < 0.02
    assert abs(got["coin"].mean() - 0.3) < 0.02
    np.testing.assert_allclose(np.bincount(got["drawn"][0]) / 9000, [0.2, 0.5, 0.3], atol=0.02)
    assert abs(got["mask"].mean() - 0.75) < 0.02
    np.testing.assert_allclose(got["dropped"], np.where(got["mask"], x / np.float32(0.75), 0))
    assert plain["mask"].all()
    np.testing.assert_array_equal(plain["dropped"], x)


def test_sizes_are_computed_when_compiling() -> None:
    model = parsed(
        "(float[n,4] x) => (float[a,b] y)",
        """s = Shape(x)
        f = Cast <to = 1> (s)
        two = Constant <value = float {2.0}> ()
        d = Mul(f, two)
        l = Floor(d)
        i = Cast <to = 7> (l)
        zero = Constant <value = int64[1] {0}> ()
        n = Gather(i, zero)
        all = ReduceProd <keepdims = 1> (s)
        h = Constant <value = int64[1] {2}> ()
        twice = Mul(all, h)
        rest = Div(twice, n)
        target = Concat <axis = 0> (n, rest)
        z = Concat <axis = 0> (x, x)
        v = Flatten(z)
        y = Reshape(v, target)""",
    )
    graph = import_model(model, "m")
    shape = graph.values[graph.outputs[0]].shape
    assert [str(d) for d in shape] == ["2*n", "4"]


@pytest.mark.parametrize(("signature", "body", "problem"), [
    ("(uint8[2] x) => (uint8[2] y)", "y = Neg(x)", r"of u8 has no kernel"),
    ("(float[2,3] x, float[4] s) => (uint8[2,3] y)", "y = QuantizeLinear(x, s)", r"does not fit"),
    ("(float[2,3] x) => (float[2,3] y)", "y = Softmax <axis = 2> (x)", r"out of range"),
    ("(float[2,3] x) => (float y)",
     "a = Constant <value = int64[2] {0, -2}> ()\ny = ReduceSum <keepdims = 0> (x, a)", r"twice"),
])
def test_what_does_not_fit_is_refused(signature: str, body: str, problem: str) -> None:
    with pytest.raises((Unsupported, BadInput), match=problem):
        import_model(parsed(signature, body), "m")
