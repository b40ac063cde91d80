"""Operators of com.microsoft against onnxruntime: all cases are nodes of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen.errors import Unsupported
from qigen.frontends.onnx import import_model
from tests.ir.ops.cases import Cases


def test_products_with_weights_of_few_bits(tmp_path: Path) -> None:
    m = Cases()
    n, k = 10, 96
    for bits in (2, 4, 8):
        for block in (16, 32, 64):
            blocks = -(-k // block)
            codes = m.codes(n, blocks, block * bits // 8)
            scales = m.floats(n, blocks, scale=0.1)
            zeros = m.codes(n, -(-blocks * bits // 8))
            attrs: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block}
            m.case("MatMulNBits", [m.floats(3, k)], [codes, scales], **attrs, tolerance=1e-4)
            m.case(
                "MatMulNBits", [m.floats(2, 9, k)], [codes, scales, zeros], **attrs, tolerance=1e-4
            )
            if bits == 4 and block == 32:
                m.case(
                    "MatMulNBits",
                    [m.floats(1, k)],
                    [codes, scales, zeros, None, m.floats(n)],
                    **attrs,
                    tolerance=1e-4,
                )
                m.case(
                    "MatMulNBits",
                    [m.floats(4, k)],
                    [codes, scales, m.floats(n, blocks, scale=4)],
                    **attrs,
                    tolerance=1e-4,
                )
                groups = m.rng.integers(0, blocks, k).astype(np.int32)
                # onnxruntime forgets the zero points where there are groups
                m.case(
                    "MatMulNBits",
                    [m.floats(4, k)],
                    [codes, scales, None, groups],
                    **attrs,
                    tolerance=1e-4,
                )
                half = np.float16
                m.case(
                    "MatMulNBits",
                    [m.floats(4, k, dtype=half)],
                    [codes, scales.astype(half), zeros],
                    out=half,
                    **attrs,
                    tolerance=5e-3,
                )
    m.check(tmp_path)


def test_quantized_products(tmp_path: Path) -> None:
    m = Cases(1)
    for kind in (np.int8, np.uint8):
        b, zero = m.codes(8, 6, dtype=kind), m.codes(1, dtype=kind)[0]
        m.case("DynamicQuantizeMatMul", [m.floats(5, 8)], [b, np.float32(0.02), zero, m.floats(6)])
        m.case("DynamicQuantizeMatMul", [m.floats(2, 5, 8)], [b, np.full(6, 0.02, np.float32)])
        m.case(
            "MatMulIntegerToFloat",
            [m.codes(5, 8)],
            [b, np.float32(0.1), np.abs(m.floats(6)), np.uint8(120), zero, m.floats(6)],
        )
    m.case(
        "MatMulIntegerToFloat",
        [m.codes(2, 5, 8, dtype=np.int8)],
        [m.codes(8, 6, dtype=np.int8), np.float32(0.1), np.float32(0.3)],
    )
    m.case("FusedMatMul", [m.floats(3, 4, 5)], [m.floats(7, 4)], alpha=0.5, transA=1, transB=1)
    for bits in (np.int8, np.uint8):  # the standard's own operators, which ONNX tests little
        x, w = m.codes(2, 4, 7, 6), m.codes(6, 2, 3, 3, dtype=bits)
        m.case(
            "QLinearConv",
            [x],
            [
                np.float32(0.05),
                np.uint8(100),
                w,
                np.abs(m.floats(6, scale=0.1)) + 0.01,
                np.zeros(6, bits) if bits is np.int8 else np.full(6, 128, bits),
                np.float32(1.5),
                np.uint8(90),
                m.rng.integers(-900, 900, 6).astype(np.int32),
            ],
            out=np.uint8,
            tolerance=0,
            domain="",
            group=2,
            strides=[2, 1],
            pads=[1, 0, 2, 1],
            dilations=[1, 2],
        )
    m.case(
        "ConvInteger",
        [m.codes(1, 2, 6, 6)],
        [m.codes(3, 2, 3, 3), np.uint8(7), np.uint8(9)],
        out=np.int32,
        tolerance=0,
        domain="",
        auto_pad="SAME_LOWER",
        strides=[2, 2],
    )
    m.check(tmp_path)


def test_quantized_functions(tmp_path: Path) -> None:
    m = Cases(2)
    one = 1  # code: float sums in another order may turn a half
    for kind in (np.uint8, np.int8):
        zero = kind(3)
        quantized = [np.float32(0.05), zero]
        x = m.codes(2, 3, 6, 5, dtype=kind)
        for op in ("QLinearAdd", "QLinearMul"):
            m.case(
                op,
                [x],
                [
                    *quantized,
                    m.codes(3, 1, 5, dtype=kind),
                    np.float32(0.03),
                    kind(9),
                    np.float32(0.09),
                    kind(5),
                ],
                out=kind,
                tolerance=one,
            )
        m.case(
            "QLinearLeakyRelu",
            [x],
            [*quantized, np.float32(0.04), kind(1)],
            out=kind,
            tolerance=one,
            alpha=0.1,
        )
        m.case(
            "QLinearSigmoid",
            [x],
            [*quantized, np.float32(1 / 256), kind(0)],
            out=kind,
            tolerance=one,
        )
        m.case(
            "QLinearGlobalAveragePool",
            [x],
            [*quantized, np.float32(0.02), kind(1)],
            out=kind,
            tolerance=one,
        )
        m.case(
            "QLinearAveragePool",
            [x],
            [*quantized, np.float32(0.04), kind(1)],
            out=kind,
            tolerance=one,
            kernel_shape=[3, 2],
            pads=[1, 0, 1, 1],
            strides=[2, 2],
        )
    m.case(
        "QLinearSoftmax",
        [m.codes(3, 9)],
        [np.float32(0.05), np.uint8(4), np.float32(1 / 256), np.uint8(0)],
        out=np.uint8,
        tolerance=one,
        opset=13,
        axis=-1,
    )
    m.check(tmp_path)


def test_fused_functions(tmp_path: Path) -> None:
    m = Cases(3)
    m.case("Gelu", [m.floats(3, 7)], [])
    m.case("BiasGelu", [m.floats(3, 7)], [m.floats(7)])
    m.case("FastGelu", [m.floats(3, 7)], [m.floats(7)])
    m.case("QuickGelu", [m.floats(3, 7)], [], alpha=1.5)
    m.case(
        "SkipLayerNormalization",
        [m.floats(2, 3, 8), m.floats(2, 3, 8)],
        [m.floats(8), m.floats(8), m.floats(8)],
        epsilon=1e-5,
    )
    m.case(
        "SkipSimplifiedLayerNormalization",
        [m.floats(2, 3, 8), m.floats(2, 3, 8)],
        [m.floats(8)],
        epsilon=1e-5,
    )
    m.case(
        "FusedConv",
        [m.floats(2, 3, 6, 6)],
        [m.floats(4, 3, 3, 3), m.floats(4)],
        activation="LeakyRelu",
        activation_params=[0.2],
        pads=[1, 1, 1, 1],
        tolerance=1e-4,
    )
    m.case(
        "FusedGemm",
        [m.floats(3, 4)],
        [m.floats(5, 4), m.floats(5)],
        activation="Relu",
        alpha=0.5,
        transB=1,
    )
    m.check(tmp_path)


def test_recurrent_layers(tmp_path: Path) -> None:
    """Of the standard: what ONNX has no tests for. DynamicQuantizeLSTM rounds more than we do."""
    m = Cases(4)
    steps, batch, inputs, hidden = 5, 3, 4, 6
    lengths = np.array([5, 2, 3], np.int32)
    for op, gates, states in (("RNN", 1, 1), ("GRU", 3, 1), ("LSTM", 4, 2)):
        for direction, n in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            constants = [
                m.floats(n, gates * hidden, inputs),
                m.floats(n, gates * hidden, hidden, scale=0.5),
                m.floats(n, 2 * gates * hidden),
                lengths,
                *(m.floats(n, batch, hidden) for _ in range(states)),
            ]
            attrs: dict[str, Any] = {"direction": direction, "hidden_size": hidden}
            if op == "LSTM":
                constants.append(m.floats(n, 3 * hidden))
            if op == "GRU":
                attrs["linear_before_reset"] = int(direction == "reverse")
            if direction != "reverse":
                attrs["clip"] = 0.9
            x = m.floats(steps, batch, inputs)
            m.case(op, [x], constants, domain="", ranks=(4, 3, 3)[: 1 + states], **attrs)
    functions = ["HardSigmoid", "ScaledTanh", "LeakyRelu"]
    m.case(
        "LSTM",
        [m.floats(steps, batch, inputs)],
        [m.floats(1, 4 * hidden, inputs), m.floats(1, 4 * hidden, hidden, scale=0.5)],
        domain="",
        ranks=(4, 3, 3),
        hidden_size=hidden,
        activations=functions,
        activation_alpha=[0.3, 1.2, 0.1],
        activation_beta=[0.4, 0.7],
    )
    w, r = (
        m.codes(1, inputs, 4 * hidden, dtype=np.int8),
        m.codes(1, hidden, 4 * hidden, dtype=np.int8),
    )
    scale = [np.full(1, 0.01, np.float32), np.zeros(1, np.int8)]
    m.case(
        "DynamicQuantizeLSTM",
        [m.floats(steps, batch, inputs)],
        [w, r, m.floats(1, 8 * hidden), None, None, None, None, *scale, *scale],
        ranks=(4, 3, 3),
        hidden_size=hidden,
        tolerance=0.03,
    )
    m.check(tmp_path)


def test_refusals_name_what_has_no_kernel() -> None:
    m = Cases()
    m.case(
        "MatMulNBits",
        [m.floats(1, 32)],
        [m.codes(4, 1, 12), m.floats(4, 1)],
        K=32,
        N=4,
        bits=3,
        block_size=32,
    )
    with pytest.raises(Unsupported, match="MatMulNBits of 3 bits has no kernel"):
        import_model(m.model(), "m.onnx")
