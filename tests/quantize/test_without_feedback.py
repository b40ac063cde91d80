"""Methods that look at one group at a time: tables by k-means, zero points of HQQ, ternary."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import qigen
from qigen.errors import Unsupported, UsageError
from qigen.formats.catalog import CATALOG, by_name
from qigen.formats.tensor import as_float32, validate
from qigen.quantize.methods import METHODS
from tests.quantize.data import layer

W, _, H = layer(48, 200)  # the last group is short
HEAVY = (0.05 * np.random.default_rng(0).standard_t(4, (32, 400))).astype(np.float32)


def weighted(w, tensor, hessian=None):
    h = 1 if hessian is None else np.diagonal(hessian)
    return float((np.square(tensor.dequantize() - w) * h).sum())


def fitting(method):
    return [name for name, row in CATALOG.items() if not METHODS[method].fits(row)]


@pytest.mark.parametrize("name", fitting("kmeans"))
def test_tables_by_kmeans(name):
    found = qigen.quantize(W, name, method="kmeans", hessian=H)
    validate(found, name)
    assert weighted(W, found, H) <= weighted(W, qigen.quantize(
        W, name, method="clip", hessian=H), H)
    alike = qigen.quantize(W, name, method="kmeans")
    assert weighted(W, alike) < (1 if name == "lut2_channel" else 0.97) * weighted(
        W, qigen.quantize(W, name))


def test_a_table_is_near_the_best_there_is():
    """Within 15 % of the best of all ways to cut 24 sorted weights into four."""
    rng = np.random.default_rng(2)
    w = np.sort(rng.standard_normal((8, 24)), axis=1).astype(np.float32)
    found = weighted(w, qigen.quantize(w, "lut2_channel", method="kmeans"))
    best = 0.0
    for row in w.astype(np.float64):
        best += min(
            sum(float(part.var() * len(part)) for part in np.split(row, cuts))
            for cuts in itertools.combinations(range(1, 24), 3))
    assert found <= 1.15 * best


def test_a_shared_table_of_known_values():
    rng = np.random.default_rng(1)
    table = np.array([-1, -0.3, 0.2, 1], np.float32)
    scale = np.repeat(2.0 ** rng.integers(-3, 3, (64, 4)), 64, axis=1).astype(np.float32)
    w = table[rng.integers(0, 4, (64, 256))] * scale
    found = qigen.quantize(w, "lut2_tensor_g64", method="kmeans")
    np.testing.assert_allclose(found.dequantize(), w, rtol=2e-3)


@pytest.mark.parametrize("name", ["u4g64", "u2g64", "h4g64", "h2g64", "u3gchannel", "q4_1"])
def test_hqq_has_the_least_norm(name):
    w = HEAVY[:, :384] if name == "q4_1" else HEAVY

    def norm(method, p=0.7):
        tensor = qigen.quantize(w, name, method=method)
        validate(tensor, name)
        return float((np.abs(tensor.dequantize() - w) ** p).sum())

    assert norm("hqq") < 0.995 * norm("rtn")
    assert norm("hqq", 1) < norm("rtn", 1)


def test_hqq_of_formats_that_may_not_improve():
    for name in fitting("hqq")[::4]:
        k = 512 if CATALOG[name].ggml_type is not None else 400
        w = np.ascontiguousarray(np.pad(HEAVY, ((0, 0), (0, 112)))[:, :k])
        w[3] = 0
        tensor = qigen.quantize(w, name, method="hqq")
        validate(tensor, name)
        assert np.abs(tensor.dequantize()[3]).max() < 1e-6
        nearest = qigen.quantize(w, name)
        assert weighted(w, tensor) < 1.1 * weighted(w, nearest)


def test_ternary_scales():
    w = np.array([[0.9, -1.1, 0.1, -0.1] * 16, [0] * 64], np.float32)
    tensor = qigen.quantize(w, "ternary2", method="ternary")
    np.testing.assert_allclose(as_float32("f32", tensor.fields["d"]).reshape(-1), [0.55, 0],
                               rtol=1e-6)
    np.testing.assert_array_equal(np.sign(tensor.dequantize()[0, :4]), [1, -1, 0, 0])
    assert not tensor.dequantize()[1].any()
    least = qigen.quantize(w, "ternary2", method="ternary", scale="least")
    np.testing.assert_allclose(np.abs(least.dequantize()[0, :2]), 1, rtol=1e-6)


@pytest.mark.parametrize("name", fitting("ternary"))
def test_the_least_ternary_error(name):
    w = np.ascontiguousarray(HEAVY[:, :256])
    errors = [weighted(w, qigen.quantize(w, name, method="ternary", scale=scale))
              for scale in ("absmean", "least")]
    assert errors[1] < errors[0]
    block = w[5:6]  # one group of 256: against every scale
    exact = qigen.quantize(block, name, method="ternary", scale="least")
    scales = np.linspace(0.01, 0.3, 400)[:, None]
    levels = np.rint(block / scales).clip(-1, 1)
    best = np.square(levels * scales - block).sum(axis=1).min()
    assert weighted(block, exact) <= best * 1.001


def test_formats_that_do_not_fit():
    for method, name, words in (
        ("kmeans", "s4g64", "no table that is data"), ("hqq", "z4g64", "no float zero point"),
        ("ternary", "s2g64", "not -1, 0 and 1"),
    ):
        with pytest.raises(Unsupported, match=words):
            qigen.quantize(W, name, method=method)
    for method, name, options in (
        ("hqq", "u4g64", {"p": 2.0}), ("hqq", "u4g64", {"beta": 0.0}),
        ("ternary", "ternary2", {"scale": "most"}), ("kmeans", "lut3_channel", {"steps": 0}),
    ):
        with pytest.raises(UsageError):
            qigen.quantize(W, name, method=method, **options)
    assert by_name("lut3_channel").name in fitting("kmeans")
