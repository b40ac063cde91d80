"""The search for scales."""

from __future__ import annotations

import numpy as np
import pytest

from qigen.formats.catalog import by_name
from qigen.quantize.rtn import Clip, lloyd, quantize_rtn
from tests.quantize.data import layer


@pytest.mark.parametrize("name, factor", [
    ("u4g64", 1.1), ("s4g64", 1.05), ("u2g64", 1.6), ("z3g64", 1.2), ("h2g64", 1.5),
    ("nf3g64", 1.03), ("spqr3", 1.05), ("lut2_tensor_g64", 1.02), ("s3g128_o3", 1.03),
    ("fp5_e2m2", 1.0), ("nvfp4", 1.05), ("mxfp4", 1.0), ("s4gchannel_c32", 1.05),
])
def test_less_squared_error(name, factor):
    w, _, _ = layer(32, 256)
    plain = np.square(quantize_rtn(w, by_name(name)).dequantize() - w).sum()
    found = np.square(quantize_rtn(w, by_name(name), Clip()).dequantize() - w).sum()
    assert found * factor <= plain


@pytest.mark.parametrize("name", ["u3g64", "s3g64", "nf4g64", "lut3_channel", "lut3_group_g64",
                                  "lut3_tensor_g64", "mxfp4", "nvfp4", "spqr3"])
def test_importance_counts(name):
    w, _, _ = layer(32, 192)
    h = np.exp(2 * np.random.default_rng(3).standard_normal(192)).astype(np.float32)

    def error(clip):
        return (np.square(quantize_rtn(w, by_name(name), clip).dequantize() - w) * h).sum()

    assert error(Clip(h)) < error(Clip())


def test_weighted_lloyd_finds_the_centres():
    x = np.array([[0, 0.1, 1, 1.2, 5, 5.2]], np.float32)
    np.testing.assert_allclose(lloyd(x, 3), [[0.05, 1.1, 5.1]], atol=1e-6)
    h = np.array([[3, 1, 1, 1, 1, 0]], np.float32)
    np.testing.assert_allclose(lloyd(x, 3, h), [[0.025, 1.1, 5.0]], atol=1e-4)
    # against many values at once: the error falls as 1/count^2
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5000)).astype(np.float32)
    errors = []
    for count in (4, 8, 16):
        table = lloyd(x, count, steps=100)
        nearest = np.abs(x[..., None] - table[:, None, :]).min(axis=2)
        errors.append(float(np.square(nearest).mean()))
    # Max 1960, table I: the distortion of a normal distribution
    np.testing.assert_allclose(errors, [0.1175, 0.03454, 0.009497], rtol=0.05)
