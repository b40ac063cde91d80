"""Perplexity of a language model, and how far it is from a reference.

The token ids are cut into chunks of ``context`` tokens that do not overlap; no BOS is added. Each
chunk starts on an empty KV cache, its first half is context only, and the predictions of the
tokens at positions ``context // 2 + 1`` to ``context - 1`` are scored (the convention of
llama.cpp's perplexity tool, so that figures compare).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, UsageError

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]

BLOCK = 64
"""Predictions of a block. Errors of neighbouring tokens are alike, so standard errors are those of
sums over blocks (and of at least two: a chunk has as many as fit)."""

_STEP = 128  # tokens a call with all logits: bounds their memory, long enough for the GEMMs
_ROWS = 16  # rows in float64 at a time


class Session(Protocol):
    """What is evaluated: a session of the public API or anything else that has these."""

    def eval(self, tokens: npt.NDArray[np.int32], *, all: bool = False) -> Logits:
        """Appends int32 ``tokens`` ``[n]``; float32 logits ``[n, vocab]`` if ``all``."""

    def rewind(self, position: int, /) -> None:
        """Forgets everything from ``position`` on."""


def perplexity(
    session_factory: Callable[[], Session],
    ids: Sequence[int] | npt.NDArray[np.integer],
    *,
    context: int = 512,
    chunks: int | None = None,
    reference_factory: Callable[[], Session] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float | int]:
    """Perplexity over the first ``chunks`` chunks of ``ids`` (default: all that are whole).

    Returns ``perplexity``, ``tokens`` (predictions that were scored) and ``chunks``. With a
    reference also ``reference_perplexity``, ``log_ratio`` (the mean of what the model loses more
    than the reference on the same token, so that exp(log_ratio) is the ratio of the perplexities),
    ``kl_mean`` and ``kl_p99`` (Kullback-Leibler divergence of the model from the reference, in nats
    a token: mean and 99th percentile) and ``top1_agreement`` (share of positions where both have
    the same most likely token). What ends in ``_se`` is a standard error, by blocks of
    :data:`BLOCK` predictions; that of log_ratio is of the paired differences and so much smaller
    than those of the perplexities. ``kl_p99_low`` and ``kl_p99_high`` are a 95 % interval of order
    statistics. ``progress`` gets (chunks done, chunks, perplexity so far).

    Raises UsageError for a context or number of chunks that makes no sense, BadInput for text
    that is too short, ids outside the vocabulary and logits that are not numbers.
    """
    if context < 4:
        raise UsageError(f"a context of {context} tokens is too short; use at least 4")
    if chunks is not None and chunks < 1:
        raise UsageError(f"cannot score {chunks} chunks; ask for at least 1")
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise BadInput("the token ids are not a list of whole numbers", "text")
    available = tokens.size // context
    wanted = available if chunks is None else chunks
    if not 1 <= wanted <= available:
        raise BadInput(
            f"the text has {tokens.size} tokens, which is {available} chunks of {context}; "
            f"give a longer text{' or ask for fewer chunks' if available else ''}",
            "text",
        )
    if int(tokens.min()) < 0 or int(tokens.max()) > np.iinfo(np.int32).max:
        raise BadInput("the text has token ids outside the vocabulary of the model", "text")
    model = _Scorer(session_factory(), context)
    reference = _Scorer(reference_factory(), context) if reference_factory else None
    kl: list[Floats] = []
    agreed: list[Floats] = []
    for chunk in range(wanted):
        text = tokens[chunk * context : (chunk + 1) * context].astype(np.int32)
        model.begin(text)
        if reference is not None:
            reference.begin(text)
        for start in range(context // 2, context - 1, _STEP):
            stop = min(start + _STEP, context - 1)
            logits = model.advance(text, start, stop)
            if reference is None:
                for row in range(0, len(logits), _ROWS):
                    model.score(logits[row : row + _ROWS], text[start + row + 1 :])
                continue
            expected = reference.advance(text, start, stop)
            if expected.shape != logits.shape:
                raise BadInput(
                    f"the reference has {expected.shape[1]} logits, the model {logits.shape[1]}",
                    "reference",
                )
            for row in range(0, len(logits), _ROWS):
                targets = text[start + row + 1 :]
                ours = model.score(logits[row : row + _ROWS], targets)
                theirs = reference.score(expected[row : row + _ROWS], targets)
                kl.append(divergence_rows(theirs, ours))
                agreed.append((ours.argmax(axis=1) == theirs.argmax(axis=1)).astype(np.float64))
        if progress is not None:
            progress(chunk + 1, wanted, model.perplexity)
    losses = model.losses(wanted)
    result: dict[str, float | int] = {
        "perplexity": model.perplexity,
        "perplexity_se": model.perplexity * standard_error(losses),
        "tokens": model.scored,
        "chunks": wanted,
    }
    if reference is not None:
        expected_losses = reference.losses(wanted)
        divergences = np.concatenate(kl)
        same = np.concatenate(agreed)
        low, high = percentile_interval(divergences, 0.99)
        result |= {
            "reference_perplexity": reference.perplexity,
            "reference_perplexity_se": reference.perplexity * standard_error(expected_losses),
            "log_ratio": float((losses - expected_losses).mean()),
            "log_ratio_se": standard_error(losses - expected_losses),
            "kl_mean": float(divergences.mean()),
            "kl_mean_se": standard_error(divergences.reshape(wanted, -1)),
            "kl_p99": float(np.percentile(divergences, 99)),
            "kl_p99_low": low,
            "kl_p99_high": high,
            "top1_agreement": float(same.mean()),
            "top1_agreement_se": standard_error(same.reshape(wanted, -1)),
        }
    return result


def standard_error(values: Floats) -> float:
    """Standard error of the mean of ``values`` [chunks, predictions], by the sums over blocks that
    do not overlap: as many of about :data:`BLOCK` as make a chunk, and two at least.

    NaN if some are not finite.
    """
    chunks, length = values.shape
    blocks = max(round(length / BLOCK), 2 if chunks == 1 else 1)
    with np.errstate(invalid="ignore"):
        sums = np.concatenate([
            part.sum(axis=1) - part.shape[1] * values.mean()
            for part in np.array_split(values, min(blocks, length), axis=1)])  # fmt: skip
        count = len(sums)
        spread = float(np.square(sums).sum()) * count / max(1, count - 1)
        return math.sqrt(spread) / values.size if spread == spread else math.nan


def percentile_interval(values: Floats, share: float) -> tuple[float, float]:
    """A 95 % interval of the ``share`` quantile of ``values`` [n], by order statistics (the number
    of values below the quantile is binomial)."""
    ordered = np.sort(values)
    n = len(ordered)
    width = 1.96 * math.sqrt(n * share * (1 - share))
    low, high = math.floor(n * share - width), math.ceil(n * share + width)
    return float(ordered[max(0, low)]), float(ordered[min(n - 1, high)])


class _Scorer:
    """A session and the sum of what it was scored with."""

    def __init__(self, session: Session, context: int) -> None:
        self.session = session
        self.context = context
        self.scored = 0
        self._loss = 0.0
        self._losses: list[Floats] = []

    def losses(self, chunks: int) -> Floats:
        """float64 [chunks, predictions]: what every token cost, -log p."""
        return np.concatenate(self._losses).reshape(chunks, -1)

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self._loss / self.scored)
        except OverflowError:
            return math.inf

    def begin(self, text: npt.NDArray[np.int32]) -> None:
        """Forgets the last chunk and reads the first half of the next one."""
        self.session.rewind(0)
        self.session.eval(text[: self.context // 2])

    def advance(self, text: npt.NDArray[np.int32], start: int, stop: int) -> Logits:
        """Logits of the tokens ``start <= i < stop``, which predict the tokens after them."""
        logits = np.asarray(self.session.eval(text[start:stop], all=True))
        if logits.ndim != 2 or len(logits) != stop - start:
            raise BadInput(
                f"expected logits of {stop - start} tokens, got the shape {logits.shape}", "logits"
            )
        if int(text.max()) >= logits.shape[1]:
            raise BadInput(
                f"the text has the token id {int(text.max())}, the model only "
                f"{logits.shape[1]} tokens; is it the model's own tokenizer?",
                "text",
            )
        return logits

    def score(self, logits: Logits, following: npt.NDArray[np.int32]) -> Floats:
        """Adds the loss of the tokens that follow; the log probabilities ``[n, vocab]``."""
        log_p = log_softmax(logits)
        targets = following[: len(log_p)]
        losses = -log_p[np.arange(len(targets)), targets]
        self._losses.append(losses)
        self._loss += float(losses.sum())
        self.scored += len(targets)
        return log_p


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Log probabilities in float64 of logits ``[n, vocab]``; -inf is a probability of zero.

    Raises BadInput if a row has NaN, +inf or nothing but -inf.
    """
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)  # NaN if there is one in the row
    if not np.isfinite(top).all():
        raise BadInput("the logits are not finite numbers; the model is damaged", "logits")
    wide -= top
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def divergence_rows(reference: Floats, model: Floats) -> Floats:
    """``sum p_ref (log p_ref - log p)`` by row, for log probabilities ``[n, vocab]``."""
    p = np.exp(reference)
    with np.errstate(invalid="ignore"):  # -inf - -inf where both are certain
        terms = np.where(p > 0.0, p * (reference - model), 0.0)
    # Rounding can put equal distributions a hair below zero.
    divergence: Floats = np.maximum(terms.sum(axis=1), 0.0)
    return divergence
