"""Products, windows, norms and signals where ONNX has no tests: open sizes, types, bad sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qigen
from qigen.errors import BadInput, QigenError, Unsupported
from qigen.frontends.onnx import import_model
from tests.ir.ops.cases import Cases


def test_products_of_open_sizes_and_all_types(tmp_path: Path) -> None:
    m = Cases()
    # rows and columns that are no multiples of a kernel's block
    m.case(
        "MatMul",
        [m.floats(3, 1, 7, 5), m.floats(2, 5, 19)],
        [],
        domain="",
        free=(0, 1, 2),
        ranks=(4,),
    )
    m.case("MatMul", [m.floats(5, 9), m.floats(2, 9)[0]], [], domain="", free=(0, 1), ranks=(1,))
    for kind in (np.float64, np.int32, np.int64, np.uint32, np.uint64):
        a, b = (m.rng.integers(0, 99, s).astype(kind) for s in ((6, 4), (4, 18)))
        m.case("MatMul", [a], [b], out=kind, domain="", tolerance=0)
    m.case(
        "Gemm",
        [m.floats(5, 6)],
        [m.floats(20, 5), m.floats(20)],
        domain="",
        free=(1,),
        transA=1,
        transB=1,
        alpha=0.5,
        beta=2.0,
    )
    m.case(
        "Einsum",
        [m.floats(2, 3, 4), m.floats(2, 5, 4)],
        [],
        domain="",
        free=(0, 1),
        ranks=(3,),
        equation="bij,bkj->bik",
    )
    m.case(
        "MatMulInteger",
        [m.codes(2, 5, 8)],
        [m.codes(8, 20, dtype=np.int8), np.uint8(7), m.codes(20, dtype=np.int8)],
        out=np.int32,
        domain="",
        tolerance=0,
        free=(0, 1),
    )
    m.check(tmp_path)


def test_windows_over_images_of_open_sizes(tmp_path: Path) -> None:
    m = Cases(1)
    image: dict[str, Any] = {"domain": "", "free": (0, 2, 3), "tolerance": 1e-4}
    x = m.floats(2, 4, 9, 70)
    w = m.floats(6, 2, 3, 3)
    for pad in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        m.case("Conv", [x], [w, m.floats(6)], **image, group=2, auto_pad=pad, strides=[2, 2])
        if pad != "VALID":
            m.case("MaxPool", [x], [], **image, kernel_shape=[3, 2], auto_pad=pad, strides=[2, 2])
    m.case("Conv", [x], [w], **image, group=2, dilations=[2, 1], pads=[2, 1, 0, 3])
    pools: tuple[tuple[str, dict[str, Any]], ...] = (
        ("MaxPool", {}),
        ("AveragePool", {"count_include_pad": 1}),
    )
    for op, attrs in pools:
        m.case(
            op,
            [x],
            [],
            **image,
            kernel_shape=[2, 3],
            strides=[2, 2],
            ceil_mode=1,
            pads=[1, 1, 0, 1],
            **attrs,
        )
    m.case(
        "ConvTranspose",
        [x],
        [m.floats(4, 3, 3, 2), m.floats(6)],
        **image,
        group=2,
        strides=[2, 3],
        pads=[1, 0, 0, 1],
        output_padding=[1, 0],
        dilations=[1, 2],
    )
    m.case(
        "Conv",
        [m.floats(1, 2, 4, 5, 6)],
        [m.floats(3, 2, 2, 2, 2)],
        domain="",
        free=(2, 3, 4),
        tolerance=1e-4,
        pads=[1, 0, 1, 0, 1, 0],
    )
    m.case("GlobalAveragePool", [x], [], **image)
    m.case("LpPool", [x], [], **image, kernel_shape=[2, 2], p=3)
    m.check(tmp_path)


def test_norms_of_open_sizes(tmp_path: Path) -> None:
    m = Cases(2)
    x = m.floats(2, 4, 5, 6)
    m.case(
        "LayerNormalization",
        [x],
        [m.floats(5, 6), m.floats(5, 6)],
        domain="",
        free=(0, 1),
        axis=2,
        tolerance=1e-4,
    )
    m.case(
        "InstanceNormalization",
        [x],
        [m.floats(4), m.floats(4)],
        domain="",
        free=(0, 2, 3),
        tolerance=1e-4,
    )
    m.case("LpNormalization", [x], [], domain="", free=(0, 1, 2, 3), axis=1, p=1)
    m.case("LRN", [x], [], domain="", free=(0, 2), size=3)
    m.case(
        "BatchNormalization",
        [x],
        [m.floats(4), m.floats(4), m.floats(4), np.abs(m.floats(4)) + 0.1],
        domain="",
        free=(0, 2, 3),
        tolerance=1e-4,
    )
    m.check(tmp_path)


def test_signals_whose_sizes_the_run_decides(tmp_path: Path) -> None:
    m = Cases(3)
    signal = m.floats(2, 700, 1)
    m.case("DFT", [signal, np.array(512)], [np.array(1)], domain="", onesided=1, tolerance=1e-4)
    m.case("DFT", [m.floats(2, 33, 2), np.array(40), np.array(-2)], [], domain="", inverse=1)
    m.case(
        "STFT",
        [signal, np.array(100)],
        [np.hanning(256).astype(np.float32)],
        domain="",
        free=(0, 1),
        ranks=(4,),
        tolerance=1e-4,
    )
    rate = [np.array(64), np.array(8000), np.float32(0), np.float32(4000)]
    m.case("MelWeightMatrix", [np.array(9)], rate, domain="", ranks=(2,))
    m.check(tmp_path)


def _one(
    op: str, shapes: list[Any], rank: int = 2, kind: int = TensorProto.FLOAT, **attrs: Any
) -> onnx.ModelProto:
    names = [f"x{i}" for i in range(len(shapes))]
    inputs = [helper.make_tensor_value_info(n, kind, s) for n, s in zip(names, shapes, strict=True)]
    output = helper.make_tensor_value_info("y", kind, [None] * rank)
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **attrs)], "g", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_sizes_that_do_not_fit_are_reported_at_run_time(tmp_path: Path) -> None:
    onnx.save(_one("MatMul", [[None, None], [None, None]]), tmp_path / "m.onnx")
    qigen.compile(tmp_path / "m.onnx", tmp_path / "m.qgn")
    model = qigen.load(tmp_path / "m.qgn", threads=2)
    a, b = np.ones((2, 3), np.float32), np.ones((4, 5), np.float32)
    with pytest.raises(QigenError, match=r"MatMul.*do not fit"):
        model.run({"x0": a, "x1": b})
    assert (model.run({"x0": a, "x1": b[:3]})["y"] == 3).all()


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (_one("MatMul", [[2, 3], [4, 5]]), BadInput, "inner sizes"),
        (_one("Conv", [[1, 3, 8, 8], [4, 2, 3, 3]], 4), BadInput, "channels"),
        (_one("Conv", [[1, 1, 4, 4, 4, 4], [1, 1, 1, 1, 1, 1]], 6), Unsupported, "3 are the most"),
        (_one("Einsum", [[2, 3], [3, 4]], equation="ij,kl->im"), BadInput, "does not fit"),
        (_one("MaxPool", [[1, 1, 2, 2]], 4, kernel_shape=[5, 5]), BadInput, "does not fit"),
        (_one("LSTM", [[3, 1, 4], [1, 8, 4], [1, 8, 3]], 4), BadInput, "rows of W"),
    ],
)
def test_contradictions_are_refused(model: Any, error: type[QigenError], message: str) -> None:
    with pytest.raises(error, match=message):
        import_model(model, "m.onnx")
