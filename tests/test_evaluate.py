"""Perplexity on logits whose loss is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qigen.errors import BadInput, UsageError
from qigen.evaluate import log_softmax, percentile_interval, perplexity, standard_error


class Table:
    """A model whose logits are ``logits(position, token)``; records how it was called."""

    def __init__(self, logits, vocab):
        self.logits, self.vocab = logits, vocab
        self.position = 0
        self.chunks = []
        self.longest = 0

    def rewind(self, position):
        assert position == 0
        self.position = 0
        self.chunks.append([])

    def eval(self, tokens, *, all=False):
        assert tokens.dtype == np.int32
        rows = [self.logits(self.position + i, int(t)) for i, t in enumerate(tokens)]
        self.position += len(tokens)
        self.chunks[-1].extend(tokens.tolist())
        if all:
            self.longest = max(self.longest, len(tokens))
        return np.array(rows if all else rows[-1], np.float32)


def test_uniform_logits_give_the_vocabulary_size():
    model = Table(lambda p, t: np.zeros(97), 97)
    ids = np.random.default_rng(0).integers(0, 97, 3 * 512 + 100)
    result = perplexity(lambda: model, ids)
    assert result == {
        "perplexity": pytest.approx(97), "perplexity_se": pytest.approx(0, abs=1e-9),
        "tokens": 3 * 255, "chunks": 3,
    }  # fmt: skip
    # every chunk on its own, in order, without its last token, whose prediction is not scored
    assert model.chunks == [ids[i * 512 : i * 512 + 511].tolist() for i in range(3)]
    assert model.longest <= 128


def test_only_positions_of_the_second_half_are_scored():
    # Sure of the next token from position 256 on (which predicts 257), of the wrong one before.
    ids = np.arange(1024) % 7

    def logits(position, token):
        row = np.zeros(7)
        row[(token + (1 if position >= 256 else 2)) % 7] = 1e4
        return row

    assert perplexity(lambda: Table(logits, 7), ids[:512])["perplexity"] == 1.0


def test_known_loss_and_reference():
    # The model gives the next token probability 1/4, the reference 1/2, the rest shared by 2.
    ids = np.arange(64) % 3

    def table(share):
        def logits(position, token):
            p = np.full(3, (1 - share) / 2)
            p[(token + 1) % 3] = share
            return np.log(p) + 1000.0  # a shift changes nothing

        return lambda: Table(logits, 3)

    seen = []
    result = perplexity(
        table(0.25),
        ids.tolist(),
        context=16,
        chunks=2,
        reference_factory=table(0.5),
        progress=lambda *state: seen.append(state),
    )
    kl = 0.5 * math.log(0.5 / 0.25) + 2 * 0.25 * math.log(0.25 / 0.375)
    assert result["perplexity"] == pytest.approx(4.0, rel=1e-4)
    assert result["reference_perplexity"] == pytest.approx(2.0, rel=1e-4)
    assert result["tokens"] == 2 * 7
    assert result["kl_mean"] == pytest.approx(kl, rel=1e-3)
    assert result["kl_p99"] == pytest.approx(kl, rel=1e-3)
    assert result["top1_agreement"] == 0.0
    assert [state[:2] for state in seen] == [(1, 2), (2, 2)]
    assert seen[-1][2] == result["perplexity"]


def test_a_model_agrees_with_itself():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 50)) * 10
    ids = rng.integers(0, 50, 256)

    def factory():
        return Table(lambda p, t: rows[t], 50)

    result = perplexity(factory, ids, context=64, reference_factory=factory)
    assert result["kl_mean"] == result["kl_p99"] == 0.0
    assert result["top1_agreement"] == 1.0


def test_standard_errors_are_those_of_the_mean():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        # neighbours are alike: a standard error that took them as independent would be far too low
        noise = rng.normal(size=(6, 255 + 15))
        values = np.stack([np.convolve(row, np.ones(16), "valid") for row in noise])
        means.append(values.mean())
        errors.append(standard_error(values))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    naive = values.std() / math.sqrt(values.size)
    assert np.mean(errors) > 3 * naive
    assert standard_error(np.ones((2, 255))) == 0.0 and standard_error(np.ones((1, 7))) == 0.0
    assert math.isnan(standard_error(np.full((1, 255), np.inf)))


def test_the_interval_of_a_percentile_covers_it():
    rng = np.random.default_rng(0)
    truth = math.log(100)  # the 99th percentile of an exponential distribution
    intervals = [percentile_interval(rng.exponential(size=2000), 0.99) for _ in range(400)]
    hits = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.92 < hits <= 0.99


def test_paired_differences_are_sharper_than_either_side():
    # both lose about as much on hard tokens; one loses a little more everywhere
    rng = np.random.default_rng(2)
    hard = rng.uniform(-6, 6, 2048)

    def table(extra):
        def logits(position, token):
            row = np.zeros(64)
            row[(token + 1) % 64] = hard[(7 * position + token) % 2048] - extra
            return row

        return lambda: Table(logits, 64)

    ids = np.arange(2048) % 64
    result = perplexity(table(0.05), ids, reference_factory=table(0.0))
    assert 0 < result["log_ratio"] < 0.05
    assert result["log_ratio_se"] < result["perplexity_se"] / result["perplexity"] / 5
    ratio = math.log(result["perplexity"] / result["reference_perplexity"])
    assert result["log_ratio"] == pytest.approx(ratio)
    assert 0 < result["kl_mean_se"] < result["kl_mean"]
    assert result["kl_p99_low"] <= result["kl_p99"] <= result["kl_p99_high"]
    assert result["top1_agreement_se"] < 0.1


def test_log_softmax_is_stable():
    logits = np.array([[1e30, 0, -1e30], [-1e30, -1e30, -1e30], [0, -np.inf, 0]], np.float32)
    got = log_softmax(logits)
    np.testing.assert_allclose(got[0], [0, -1e30, -2e30], rtol=1e-6)
    np.testing.assert_allclose(got[1], -math.log(3))
    np.testing.assert_allclose(got[2], [-math.log(2), -np.inf, -math.log(2)])


def test_a_token_held_impossible_makes_the_perplexity_infinite():
    def logits(position, token):
        return np.array([0.0, -np.inf])

    assert (
        perplexity(lambda: Table(logits, 2), np.ones(8, int), context=8)["perplexity"] == math.inf
    )
    far = perplexity(
        lambda: Table(lambda p, t: np.array([0.0, -1e6]), 2), np.ones(8, int), context=8
    )
    assert far["perplexity"] == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad):
    with pytest.raises(BadInput, match="logits"):
        perplexity(lambda: Table(lambda p, t: np.array([0.0, bad]), 2), [0] * 8, context=8)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([0] * 511, {}, BadInput, "511 tokens"),
        ([0] * 1024, {"chunks": 3}, BadInput, "2 chunks"),
        ([0] * 512, {"chunks": 0}, UsageError, "at least 1"),
        ([0] * 512, {"context": 2}, UsageError, "too short"),
        ([0] * 511 + [5], {}, BadInput, "token id 5"),
        ([0] * 511 + [-1], {}, BadInput, "outside"),
        ([0.5] * 512, {}, BadInput, "whole numbers"),
        ([[0]] * 512, {}, BadInput, "whole numbers"),
    ],
)
def test_what_makes_no_sense(ids, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(lambda: Table(lambda p, t: np.zeros(5), 5), ids, **options)


def test_reference_of_another_vocabulary():
    with pytest.raises(BadInput, match="reference has 6"):
        perplexity(
            lambda: Table(lambda p, t: np.zeros(5), 5),
            [0] * 16,
            context=16,
            reference_factory=lambda: Table(lambda p, t: np.zeros(6), 6),
        )
