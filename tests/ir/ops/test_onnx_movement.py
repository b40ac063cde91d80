"""Movement, indexing and selection where ONNX's own tests do not reach: symbolic sizes, parameters
that only the run knows, numbers of threads, bad data. All cases of a test are one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import qigen
from qigen.errors import QigenError
from qigen.frontends.onnx import import_model
from qigen.ir.dims import Sym

TENSOR = onnx.TensorProto
Node = onnx.NodeProto


def node(op: str, inputs: str, outputs: str, **attrs: Any) -> Node:
    """Names are separated by blanks; '_' is absent."""
    first, second = (["" if n == "_" else n for n in names.split()] for names in (inputs, outputs))
    return onnx.helper.make_node(op, first, second, **attrs)


def model(
    nodes: list[Node],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: list[str],
    constants: dict[str, Any],
    feed: dict[str, Any],
) -> onnx.ModelProto:
    """A model of the newest opset; of the outputs' sizes it says only how many there are."""
    own = {n: np.asarray(a) for n, a in constants.items()}
    graph = onnx.helper.make_graph(
        nodes,
        "cases",
        [onnx.helper.make_tensor_value_info(n, *i) for n, i in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in own.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 24)]
    m = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    for info, found in zip(m.graph.output, ReferenceEvaluator(m).run(None, feed), strict=True):
        a = np.asarray(found)
        kind = onnx.helper.np_dtype_to_tensor_dtype(a.dtype)
        info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, [None] * a.ndim))
    return m


def compiled(m: onnx.ModelProto, folder: Path) -> Path:
    """The artifact of a model."""
    onnx.save(m, folder / "model.onnx")
    return Path(qigen.compile(folder / "model.onnx", folder / "model.qgn").path)


def check(m: onnx.ModelProto, folder: Path, *feeds: dict[str, Any]) -> None:
    """Results for every feed are those of onnx.reference, bit by bit for any number of threads."""
    path = compiled(m, folder)
    reference = ReferenceEvaluator(m)
    names = [o.name for o in m.graph.output]
    for threads in (1, 2, 3):
        loaded = qigen.load(path, threads=threads)
        for number, feed in enumerate(feeds):
            wanted = reference.run(None, feed)
            got = loaded.run(feed)
            for name, w in zip(names, wanted, strict=True):
                w = np.asarray(w)
                where = f"{name} of feed {number}, {threads} threads"
                assert got[name].shape == w.shape, where
                np.testing.assert_allclose(got[name], w, 1e-5, 1e-5, err_msg=where)


def test_shape_arithmetic_vanishes() -> None:
    m = model(
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape zero", "n", axis=0),
            node("Slice", "shape one two", "tail"),
            node("Unsqueeze", "n zero1", "n1"),
            node("Mul", "n1 two", "twice"),
            node("Concat", "n1 minus tail", "wide", axis=0),
            node("Reshape", "x wide", "a"),
            node("Split", "shape", "s0 s1 s2", axis=0, num_outputs=3),
            node("Concat", "s0 s2 s1", "turned", axis=0),
            node("Reshape", "x turned", "b"),
            node("ConstantOfShape", "three", "ones",
                 value=onnx.numpy_helper.from_array(np.ones(1, np.int64))),
            node("Concat", "n1 minus minus", "hope", axis=0),
            node("Equal", "hope minus", "is"),
            node("Where", "is ones hope", "size"),
            node("Expand", "scalar size", "c"),
            node("Tile", "twice two", "four"),
            node("Range", "zero n step", "steps"),
            node("Slice", "x zero1 n1 zero1 one", "head"),
            node("Slice", "x last far one1", "end"),
        ],
        {"x": (TENSOR.FLOAT, ["N", 4, 6])},
        ["a", "b", "c", "four", "steps", "head", "end"],
        {
            "zero": np.int64(0), "zero1": np.array([0]), "one": np.array([1]),
            "one1": np.array([1]), "two": np.array([2]), "minus": np.array([-1]),
            "three": np.array([3]), "step": np.int64(1),
            "scalar": np.float32(2), "last": np.array([-2]),
            "far": np.array([2**63 - 1]),
        },
        {"x": np.zeros((2, 4, 6), np.float32)},
    )
    graph = import_model(m, "test")
    shapes = {o: [str(d) for d in graph.values[o].shape] for o in graph.outputs}
    assert shapes["a"] == ["N", "6", "4"]
    assert shapes["b"] == ["N", "6", "4"]
    assert shapes["c"] == ["N", "1", "1"]
    assert [str(d) for d in graph.values["steps"].shape] == ["N"]
    assert shapes["head"] == ["N", "4", "6"] and shapes["end"] == ["N", "2", "6"]
    known = graph.known["four"]
    assert known.tolist() == [Sym.named("N") * 2] * 2
    # none of the sizes is for the run to find
    assert not any("run_" in d for s in shapes.values() for d in s)


def test_sizes_that_only_the_run_knows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def feed(n: int, rows: int) -> dict[str, Any]:
        def floats(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(np.float32)

        return {
            "x": floats(n, rows, 5), "row": floats(5), "starts": np.array([-1, 1]),
            "ends": np.array([-(2**63), 2**63 - 1]), "axes": np.array([1, -1]),
            "steps": np.array([-2, 2]), "parts": np.array([2, 3]), "pads": np.array([1, 2, 0, 3]),
            "pad_axes": np.array([1, -1]), "all_pads": np.array([0, 1, 2, 1, 3, 1]),
            "value": np.float32(7), "repeats": np.array([2, 1, 3]), "shape": np.array([2, n, 1]),
            "low": np.int32(10), "high": np.int32(-n), "step": np.int32(-3),
            "index": rng.integers(-5, 5, 2 * n), "k": np.array([2]),
            "elements": rng.integers(-rows, rows, (n, 3, 5)).astype(np.int32),
            "axis": np.array(-2), "mask": rng.integers(0, 2, 4).astype(bool),
            "depth": np.array(5), "pair": np.array([1, 3], np.float32), "diagonal": np.array(-1),
            "scales": np.array([1, 1, 1.7, 2], np.float32), "sizes": np.array([3, 9]),
            "deep": floats(n, 8, rows, 3),
        }

    feeds = (feed(3, 4), feed(1, 37), feed(70, 3))
    m = model(
        [
            node("Transpose", "x", "transposed", perm=[2, 0, 1]),
            node("Concat", "x x", "joined", axis=1),
            node("Slice", "x starts ends axes steps", "sliced"),
            node("Slice", "x starts ends", "plain"),
            node("Split", "x parts", "part0 part1", axis=2),
            node("Split", "x", "third0 third1", axis=1, num_outputs=2),
            node("Pad", "x pads _ pad_axes", "padded", mode="reflect"),
            node("Pad", "x all_pads value", "filled"),
            node("Pad", "x all_pads", "edged", mode="edge"),
            node("Tile", "x repeats", "tiled"),
            node("Expand", "row shape", "expanded"),
            node("Range", "low high step", "ranged"),
            node("GreaterOrEqual", "x zero", "positive"),
            node("Where", "positive x row", "chosen"),
            node("NonZero", "positive", "places"),
            node("Transpose", "places", "tuples"),
            node("GatherND", "x tuples", "found"),
            node("ScatterND", "x tuples found", "back", reduction="add"),
            node("Gather", "x index", "gathered", axis=2),
            node("GatherElements", "x elements", "picked", axis=1),
            node("ScatterElements", "x elements picked", "scattered", axis=1, reduction="max"),
            node("TopK", "x k", "top where", axis=1),
            node("TopK", "x k", "low_top low_where", axis=2, largest=0),
            node("ArgMax", "x", "best", axis=1, keepdims=0),
            node("CumSum", "x axis", "sums", reverse=1),
            node("Compress", "x mask", "kept", axis=2),
            node("OneHot", "index depth pair", "hot", axis=0),
            node("Trilu", "x diagonal", "lower", upper=0),
            node("Unique", "index", "different first inverse count"),
            node("Unsqueeze", "x front", "image"),
            node("Resize", "image _ scales", "grown", mode="linear"),
            node("Resize", "image _ _ sizes", "small", mode="cubic", axes=[2, 3]),
            node("DepthToSpace", "deep", "spread", blocksize=2),
            node("SpaceToDepth", "spread", "again", blocksize=2),
        ],
        {
            "x": (TENSOR.FLOAT, ["N", "M", 5]), "row": (TENSOR.FLOAT, [5]),
            "starts": (TENSOR.INT64, [2]), "ends": (TENSOR.INT64, [2]), "axes": (TENSOR.INT64, [2]),
            "steps": (TENSOR.INT64, [2]), "parts": (TENSOR.INT64, [2]), "pads": (TENSOR.INT64, [4]),
            "pad_axes": (TENSOR.INT64, [2]), "all_pads": (TENSOR.INT64, [6]),
            "value": (TENSOR.FLOAT, []), "repeats": (TENSOR.INT64, [3]),
            "shape": (TENSOR.INT64, [3]), "low": (TENSOR.INT32, []), "high": (TENSOR.INT32, []),
            "step": (TENSOR.INT32, []), "index": (TENSOR.INT64, ["I"]),
            "elements": (TENSOR.INT32, ["N", "J", 5]), "k": (TENSOR.INT64, [1]),
            "axis": (TENSOR.INT64, []), "mask": (TENSOR.BOOL, ["B"]), "depth": (TENSOR.INT64, []),
            "pair": (TENSOR.FLOAT, [2]), "diagonal": (TENSOR.INT64, []),
            "scales": (TENSOR.FLOAT, [4]), "sizes": (TENSOR.INT64, [2]),
            "deep": (TENSOR.FLOAT, ["N", 8, "H", 3]),
        },
        ["transposed", "joined", "sliced", "plain", "part0", "part1", "third0", "third1", "padded",
         "filled", "edged", "tiled", "expanded", "ranged", "chosen", "places", "found", "back",
         "gathered", "picked", "scattered", "top", "where", "low_top", "low_where", "best", "sums",
         "kept", "hot", "lower", "different", "first", "inverse", "count", "grown", "small",
         "spread", "again"],
        {"zero": np.float32(0), "front": np.array([0])},
        feeds[0],
    )
    check(m, tmp_path, *feeds)


def test_bad_data_is_reported(tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "x": np.arange(12, dtype=np.float32).reshape(4, 3), "index": np.array([0, -4]),
        "tuples": np.array([[3], [0]]), "pads": np.array([1, 0, 0, 1]), "parts": np.array([1, 3]),
        "starts": np.array([0]), "steps": np.array([1]), "k": np.array([3]),
        "repeats": np.array([1, 2]), "step": np.array(2), "boxes": np.array([0], np.int64),
        "image": np.ones((1, 1, 4, 4), np.float32),
    }  # fmt: skip
    m = model(
        [
            node("Gather", "x index", "a", axis=0),
            node("GatherND", "x tuples", "b"),
            node("ScatterND", "x tuples updates", "c"),
            node("Pad", "x pads", "d", mode="reflect"),
            node("Split", "x parts", "e f", axis=0),
            node("Slice", "x starts index1 starts steps", "g"),
            node("TopK", "x k", "h i", axis=0),
            node("Tile", "x repeats", "j"),
            node("Range", "zero ten step", "l"),
            node("RoiAlign", "image rois boxes", "m"),
        ],
        {name: (onnx.helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape))
         for name, a in good.items()},
        list("abcdefghijlm"),
        {"updates": np.zeros((2, 3), np.float32), "index1": np.array([2]), "zero": np.int64(0),
         "ten": np.int64(10), "rois": np.array([[0, 0, 3, 3]], np.float32)},
        good,
    )
    loaded = qigen.load(compiled(m, tmp_path), threads=2)
    loaded.run(good)
    cropped = loaded.run({**good, "pads": np.array([-1, 0, 0, 1])})["d"]
    np.testing.assert_array_equal(cropped, good["x"][1:][:, [0, 1, 2, 1]])
    bad: list[tuple[str, Any, str]] = [
        ("index", [0, 4], "Gather"), ("index", [-(2**63), 0], "Gather"),
        ("tuples", [[4], [0]], "an index is out of range"),
        ("pads", [-5, 0, 0, 0], "pads"), ("pads", [2**62, 0, 2**62, 0], "pads"),
        ("parts", [1, 4], "sizes of the parts"), ("parts", [-1, 5], "sizes of the parts"),
        ("starts", [2], "make no sense"), ("steps", [0], "make no sense"),
        ("k", [5], "k is out of range"), ("k", [-1], "k is out of range"),
        ("repeats", [-1, 1], "repeats"), ("repeats", [2**62, 2**62], "repeats|memory"),
        ("step", 0, "never reached"), ("boxes", [7], "out of range"),
    ]
    for name, value, message in bad:
        feed = {**good, name: np.array(value, good[name].dtype)}
        with pytest.raises(QigenError, match=message):
            loaded.run(feed)
    loaded.run(good)
