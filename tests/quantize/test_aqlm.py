"""Codebooks fitted to the output."""

from __future__ import annotations

import numpy as np
import pytest

import qigen
from qigen.errors import Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.formats.tensor import as_float32, validate
from qigen.quantize.aqlm import _State
from qigen.quantize.rtn import quantize_rtn
from tests.quantize.data import layer, output_error

W, X, H = layer(96, 128)


def state(name="aqlm_2x6v4"):
    return _State(W, quantize_rtn(W, by_name(name)), H)


@pytest.mark.parametrize("name, factor", [
    ("aqlm_2x6v4", 4), ("aqlm_1x8v4", 3), ("aqlm_2x8", 4), ("aqlm_3x4", 2.5),
])
def test_beats_kmeans(name, factor):
    tensor = qigen.quantize(W, name, method="aqlm", hessian=H)
    validate(tensor, name)
    nearest = output_error(W, qigen.quantize(W, name).dequantize(), X)
    assert output_error(W, tensor.dequantize(), X) * factor < nearest


def test_more_rounds_and_wider_beams_are_better():
    errors = [output_error(W, qigen.quantize(W, "aqlm_2x6v4", method="aqlm", hessian=H,
                                             **options).dequantize(), X)
              for options in ({"rounds": 0}, {"rounds": 1, "beam": 1}, {"rounds": 4, "beam": 8})]
    assert errors[2] < errors[1] < errors[0]


def test_beats_integers_of_as_many_bits():
    w, x, h = layer(256, 256)
    codebook = qigen.quantize(w, "aqlm_2x8", method="aqlm", hessian=h)
    integers = qigen.quantize(w, "s2g64", method="gptq", hessian=h)
    assert output_error(w, codebook.dequantize(), x) < output_error(w, integers.dequantize(), x)


def test_a_group_gets_the_best_of_all_combinations():
    one = state()
    g, at = 3, slice(12, 16)
    one.pull = (one.x - one.decoded(one.books)) @ one.h
    sums = (one.books[0][:, None] + one.books[1][None]).reshape(-1, 4)
    before = one._vectors(g)
    target = one.pull[:, at] + before @ one.h[at, at]
    cost = np.einsum("es,es->e", sums @ one.h[at, at], sums) - 2 * target @ sums.T
    turned = one.books @ one.h[at, at]
    own = np.einsum("bes,bes->be", turned, one.books)
    entries = np.concatenate([-2 * one.books, own[..., None]], axis=2).transpose(0, 2, 1)
    found = one._beam(target, one.codes[:, g], turned, entries, 64)
    chosen = cost[np.arange(96), found[:, 0] * 64 + found[:, 1]]
    np.testing.assert_allclose(chosen, cost.min(axis=1), rtol=1e-4, atol=1e-4)


def test_a_search_keeps_the_pull_and_never_harms():
    one = state()
    before = one.error()
    for _ in range(2):
        one.search(3)
        np.testing.assert_allclose(one.pull, (one.x - one.decoded(one.books)) @ one.h,
                                   rtol=1e-3, atol=1e-3 * np.abs(one.pull).max())
        after = one.error()
        assert after <= before * 1.0001
        before = after


def test_books_are_the_least_squares():
    one = state("aqlm_1x4v4")
    one.fit_books(200)
    fitted = one.error()
    # against a dense solution
    weight = np.square(one.d[:, 0]).astype(np.float64)
    root = np.linalg.cholesky(one.h.astype(np.float64)).T
    rows = []
    for n in range(96):
        use = np.zeros((128, 16, 4))
        for g in range(32):
            for j in range(4):
                use[g * 4 + j, one.codes[n, g, 0], j] = 1
        rows.append(np.sqrt(weight[n]) * (root @ use.reshape(128, 64)))
    wanted = np.sqrt(weight)[:, None] * (one.x @ root.T)
    _, rest, *_ = np.linalg.lstsq(np.concatenate(rows), wanted.reshape(-1), rcond=None)
    np.testing.assert_allclose(fitted, rest[0], rtol=0.01)


def test_scales_are_the_best():
    one = state()
    before = one.error()
    one.fit_scales()
    least = one.error()
    assert least <= before
    for factor in (0.98, 1.02):
        moved = state()
        moved.d = one.d * np.float32(factor)
        moved._normalize()
        assert moved.error() > least


def test_rows_of_zeros_short_blocks_and_dead_columns():
    w, _, h = layer(20, 100)
    w[4] = 0
    h[:, 7] = h[7] = 0
    tensor = qigen.quantize(w, "aqlm_2x4", method="aqlm", hessian=h)
    validate(tensor, "")
    assert not tensor.dequantize()[4].any()
    assert np.isfinite(as_float32("f16", tensor.fields["book"])).all()


def test_wrong_use():
    with pytest.raises(Unsupported, match="no codebooks; take aqlm_2x8"):
        qigen.quantize(W, "s4g64", method="aqlm", hessian=H)
    with pytest.raises(UsageError, match="beam >= 1"):
        qigen.quantize(W, "aqlm_2x4", method="aqlm", hessian=H, beam=0)
