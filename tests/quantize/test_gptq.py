"""Rounding with feedback: against a loop as the paper has it, and against rounding to nearest."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import qigen
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats.catalog import CATALOG, REPRESENTATIVE, by_name
from qigen.formats.tensor import validate
from qigen.quantize import quantize_matrix
from qigen.quantize.gptq import ordered
from qigen.quantize.hessian import Statistics, factor
from qigen.quantize.methods import METHODS
from tests.quantize.data import layer, output_error


def textbook(w, hessian, group, bits, order, again, damping=0.01):
    """GPTQ by its definition: after each weight the inverse Hessian of those left, in float64.

    Codes from the least to the greatest weight of a group, as they were at first or (``again``) as
    they are when the group begins.
    """
    w = w.astype(np.float64)
    k = w.shape[1]
    h = hessian.astype(np.float64) + damping * np.diag(hessian).mean() * np.eye(k)
    top = (1 << bits) - 1

    def ends(column):
        x = w[:, column // group * group : column // group * group + group]
        least, greatest = x.min(axis=1), x.max(axis=1)
        return (least.astype(np.float16).astype(np.float64),
                ((greatest - least) / top).astype(np.float16).astype(np.float64))

    first = [ends(column) for column in range(k)]
    q = np.zeros_like(w)
    left = list(order)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        column = left[0]
        if again and column % group == 0:
            current = ends(column)
        least, d = current if again else first[column]
        q[:, column] = np.clip(np.rint((w[:, column] - least) / d), 0, top) * d + least
        error = (w[:, column] - q[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return q


@pytest.mark.parametrize("order", ["none", "act"])
def test_equals_the_definition(order):
    w, _, hessian = layer(12, 96)
    columns = np.arange(96) if order == "none" else np.argsort(-np.diag(hessian), kind="stable")
    wanted = textbook(w, hessian, 32, 4, columns, again=order == "none")
    got, _ = quantize_matrix(w, by_name("u4g32"), "gptq", hessian, order=order, clip=False)
    # where a weight lies half way between two codes, rounding may turn a row from there on
    rows = np.isclose(got.dequantize(), wanted, rtol=1e-3, atol=1e-4).all(axis=1)
    assert rows.mean() >= 0.75


@pytest.mark.parametrize("name, factor", [
    ("s4g64", 10), ("u4g64", 10), ("s3g64", 10), ("u2g64", 8), ("z4g32", 10), ("h3g64", 10),
    ("s4gchannel", 8), ("nf4g64", 8), ("lut3_tensor_g64", 8), ("lut3_channel", 8),
    ("lut3_group_g64", 8), ("mxfp4", 8), ("nvfp4", 5), ("w4a8", 10), ("fp6_e3m2", 8),
    ("q4_0", 8), ("q4_1", 8), ("iq4_nl", 8), ("ternary2", 4), ("bipolar3", 8),
    ("spqr3", 8), ("s3g128_o3", 8), ("s4gchannel_c32", 15), ("s4g128_2of4", 10),
    ("s4g128_2of8v16", 10),
])
def test_beats_rounding_to_nearest(name, factor):
    w, x, hessian = layer()
    nearest, _ = quantize_matrix(w, by_name(name), "rtn", hessian)
    tensor, report = quantize_matrix(w, by_name(name), "gptq", hessian)
    validate(tensor, name)
    error = output_error(w, tensor.dequantize(), x)
    assert report.relative == pytest.approx(error, rel=0.05)
    assert error * factor < output_error(w, nearest.dequantize(), x)


def test_all_orders_beat_rounding():
    w, x, hessian = layer()
    nearest = output_error(w, qigen.quantize(w, "u3g64").dequantize(), x)
    for order in ("group", "act", "none"):
        tensor = qigen.quantize(w, "u3g64", method="gptq", hessian=hessian, order=order)
        assert output_error(w, tensor.dequantize(), x) < nearest / 5


FITTING = [name for name in REPRESENTATIVE if not METHODS["gptq"].fits(CATALOG[name])]


@pytest.mark.parametrize("name", FITTING)
def test_every_format(name):
    row = by_name(name)
    w, _, hessian = layer(6, 256, tokens=400)
    k = 256 if row.ggml_type is not None else 200  # the last block is short
    tensor, report = quantize_matrix(w[:, :k], row, "gptq", hessian[:k, :k])
    validate(tensor, name)
    nearest, rounded = quantize_matrix(w[:, :k], row, "rtn", hessian[:k, :k])
    assert tensor.format == nearest.format and report.relative <= rounded.relative


def test_order_of_columns():
    diagonal = np.array([1, 9, 2, 3] * 16 + [20, 1] * 20, np.float32)
    columns, starts = ordered(diagonal, by_name("s4g32"), "group", np.zeros(0, np.intp))
    assert sorted(columns) == list(range(104))
    assert starts == {0: 2, 32: 3, 40: 0, 72: 1}
    assert columns[:3].tolist() == [64, 66, 68] and columns[40] == 1
    apart = np.array([64, 65])
    columns, starts = ordered(diagonal, by_name("s4g32"), "none", apart)
    assert columns[-2:].tolist() == [64, 65] and starts == {0: 0, 32: 1, 64: 2, 94: 3}
    # the columns of a mask stay together
    columns, _ = ordered(diagonal, by_name("s4g128_2of4"), "group", np.zeros(0, np.intp))
    assert (columns.reshape(-1, 4) // 4 == columns.reshape(-1, 4)[:, :1] // 4).all()


@pytest.mark.parametrize("name", ["lut4_channel", "lut3_channel", "lut3_group_g64"])
def test_tables_are_those_of_k_means(name):
    """With the tables that a search for the range finds, the error is 1.2 to 2.5 times this."""
    w, x, hessian = layer(96, 256)
    plain, own = (output_error(w, qigen.quantize(w, name, method="gptq", hessian=hessian,
                                                 order="act", clip=clip).dequantize(), x)
                  for clip in (False, True))
    assert own < plain / 1.2
    fitted = qigen.quantize(w, name, method="kmeans", hessian=hessian)
    tables = qigen.quantize(w, name, method="gptq", hessian=hessian, order="act").fields["lut"]
    np.testing.assert_array_equal(tables, fitted.fields["lut"])


def test_mask_keeps_n_of_m_and_makes_up_for_the_rest():
    w, x, hessian = layer(16, 128)
    pruned = qigen.quantize(w, "s8g128_2of4", method="sparsegpt", hessian=hessian).dequantize()
    assert ((pruned.reshape(16, -1, 4) != 0).sum(axis=2) <= 2).all()
    magnitude = qigen.quantize(w, "s8g128_2of4").dequantize()
    assert output_error(w, pruned, x) < output_error(w, magnitude, x) / 5


def test_columns_apart_are_those_with_the_greatest_inputs():
    w, _, hessian = layer(8, 96)
    strong = [3, 40, 77, 90]
    scale = np.ones(96, np.float32)
    scale[strong] = 50
    tensor = qigen.quantize(w, "s4gchannel_c4", method="quik",
                            hessian=hessian * scale * scale[:, None])
    assert tensor.fields["qc"].reshape(-1).tolist() == strong


def test_dead_columns_and_damping_are_reported():
    w, _, hessian = layer(8, 64)
    hessian[:, 5] = hessian[5] = 0
    with pytest.warns(UserWarning, match="1 of 64 columns never had an input"):
        tensor = qigen.quantize(w, "s8g64", method="gptq", hessian=hessian)
    np.testing.assert_allclose(tensor.dequantize()[:, 5], w[:, 5], atol=0.01)
    # not positive definite by more than the usual damping makes up for
    bent = np.eye(64, dtype=np.float32)
    bent[0, 1] = bent[1, 0] = 1.3
    with pytest.warns(UserWarning, match=r"took a damping of 1 instead of 0\.01"):
        qigen.quantize(w, "s8g64", method="gptq", hessian=bent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qigen.quantize(w, "s8g64", method="gptq", hessian=np.eye(64))


def test_an_input_that_was_never_there():
    w, _, _ = layer(8, 64)
    tensor, report = quantize_matrix(w, by_name("s4g64"), "gptq", np.zeros((64, 64)))
    assert report.dead == 64
    np.testing.assert_array_equal(tensor.dequantize(), quantize_matrix(
        w, by_name("s4g64"), "clip")[0].dequantize())


def test_statistics():
    _, x, hessian = layer(8, 64)
    statistics = Statistics.empty(64)
    for part in np.array_split(x, 7):
        statistics.add(part)
    assert statistics.tokens == len(x)
    np.testing.assert_allclose(statistics.hessian, hessian, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(statistics.largest, np.abs(x).max(axis=0))
    np.testing.assert_allclose(statistics.mean_magnitude, np.abs(x).mean(axis=0), rtol=1e-5)
    x[3, 4] = np.nan
    with pytest.raises(BadInput, match="not finite"):
        statistics.add(x)
    with pytest.raises(BadInput, match="no calibration data"):
        qigen.quantize(np.ones((4, 64)), "s4g64", method="gptq", hessian=Statistics.empty(64))
    few = Statistics.empty(64)
    few.add(x[10:40])
    with pytest.warns(UserWarning, match="30 tokens of calibration are few for 64 columns"):
        qigen.quantize(np.ones((4, 64)), "s4g64", method="gptq", hessian=few)


def test_factor_is_of_the_inverse():
    _, _, hessian = layer(8, 64)
    order = np.random.default_rng(1).permutation(64)
    found = factor(hessian, order, 0.01)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(64)
    product = found.upper.T @ found.upper @ damped[np.ix_(order, order)]
    np.testing.assert_allclose(product, np.eye(64), atol=1e-3)
    assert not np.tril(found.upper, -1).any()


W, _, H = layer(4, 64)


@pytest.mark.parametrize("hessian, error, words", [
    (None, UsageError, "needs the Hessian"),
    (H[:32, :32], BadInput, r"\[32, 32\]; a weight of 64 columns needs \[64, 64\]"),
    (np.where(np.eye(64) > 0, np.nan, H), BadInput, "NaN or an infinity"),
    (-H, BadInput, "negative number on its diagonal"),
    (np.triu(H), BadInput, "not symmetric"),
    ([["a"]], BadInput, "not a matrix of numbers"),
    # every pair of columns stronger than the columns themselves
    (1e6 - (1e6 - 1) * np.eye(64), BadInput, "not positive definite"),
])
def test_damaged_hessians(hessian, error, words):
    with pytest.raises(error, match=words):
        qigen.quantize(W, "s4g64", method="gptq", hessian=hessian)


def test_wrong_use():
    with pytest.raises(Unsupported, match="'gtpq' is not known; did you mean gptq"):
        qigen.quantize(W, "s4g64", method="gtpq", hessian=H)
    with pytest.raises(Unsupported, match=r"spqr cannot .* it has no outliers"):
        qigen.quantize(W, "s4g64", method="spqr", hessian=H)
    with pytest.raises(Unsupported, match="no codes of single weights"):
        qigen.quantize(W, "aqlm_2x8", method="gptq", hessian=H)
    with pytest.raises(UsageError, match="no option 'beam'; it has damping, order, clip"):
        qigen.quantize(W, "s4g64", method="gptq", hessian=H, beam=3)
    with pytest.raises(UsageError, match="choose one of group, act, none"):
        qigen.quantize(W, "s4g64", method="gptq", hessian=H, order="desc")
    with pytest.raises(UsageError, match="greater than 0"):
        qigen.quantize(W, "s4g64", method="gptq", hessian=H, damping=0)
    with pytest.raises(BadInput, match="row 2 of the weight has a NaN"):
        qigen.quantize(np.where(np.arange(4)[:, None] == 2, np.nan, W), "s4g64", method="gptq",
                       hessian=H)
