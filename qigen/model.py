"""Artifacts at run time: load one, run it, let it write text.

    model = qigen.load("smollm2.qgn", threads=2)
    print(model.generate("1, 2, 3, 4, 5, 6,", max_tokens=24))

    session = model.session()                # owns a KV cache; many sessions share the weights
    logits = session.eval(model.encode("1, 2, 3,"))   # float32[vocab] of the last token

A model can be used from any number of threads, a session by one at a time. The interpreter lock is
released while the model computes; Ctrl-C ends a long prompt between two steps and leaves the
session as it was.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qigen import _runtime
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.tuned import tuned_threads

if TYPE_CHECKING:
    from qigen.text import Tokenizer

DEFAULT_MAX_TOKENS = 128


class Session:
    """A sequence of tokens with its KV cache; made by :meth:`Model.session`."""

    def __init__(self, raw: _runtime.Session, max_seq: int) -> None:
        self._raw = raw
        self.max_seq = max_seq

    def eval(self, tokens: ArrayLike, *, all: bool = False) -> NDArray[np.float32]:
        """Appends ``tokens``, integers ``[n]``.

        Returns the logits of the last one, float32 ``[vocab]``, or with ``all`` those of every
        one, float32 ``[n, vocab]``. Raises BadInput for no tokens, ids outside the vocabulary and
        more positions than the session has; the session is then as it was.
        """
        return self._raw.eval(tokens, all)

    def next(
        self, tokens: ArrayLike, sampler: _runtime.Sampler, history: ArrayLike = ()
    ) -> int:
        """Appends ``tokens``, integers ``[n]``, and returns the next one.

        The sampler (:meth:`Model.sampler`) chooses it from the logits of the last token, which are
        not copied from a GPU; ``history``, the tokens so far, is for its repetition penalty. Raises
        as :meth:`eval`, and BadInput if no logit is a finite maximum.
        """
        return self._raw.next(tokens, sampler, history)

    def rewind(self, position: int) -> None:
        """Forgets all tokens from ``position`` on."""
        self._raw.rewind(position)

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self._raw.position

    def __repr__(self) -> str:
        return f"<qigen.Session at {self.position} of {self.max_seq}>"


class Model:
    """An open artifact.

    ``threads`` is the number of threads of a step (0: what was found best on this machine when the
    artifact was tuned, else all cores that this process may use), ``pin`` binds them to cores.
    Raises BadInput if the artifact is missing or damaged, MachineMismatch if it does not fit this
    machine.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, pin: bool = False) -> None:
        self.path = Path(path)
        where = str(self.path)
        if not self.path.is_dir():
            problem = (
                "this is a file and no artifact; make one of a model with `qigen compile`"
                if self.path.exists()
                else "there is no such artifact; `qigen compile` writes one"
            )
            raise BadInput(problem, where)
        self._raw = _runtime.Model(where, threads or tuned_threads(self.path), pin)
        self.info = self._raw.info

    @property
    def is_language_model(self) -> bool:
        """Whether it evaluates tokens; else it has :meth:`run` alone."""
        return self.info["vocab"] > 0

    def _require_tokens(self) -> None:
        if not self.is_language_model:
            raise Unsupported(
                "this is no language model: it has no tokens; run it on arrays with `qigen run` or "
                "Model.run",
                str(self.path),
            )

    @property
    def inputs(self) -> list[_runtime.TensorInfo]:
        """Name, dtype and shape of every input of :meth:`run`; -1 is any size."""
        return self._raw.inputs

    @property
    def outputs(self) -> list[_runtime.TensorInfo]:
        """Name, dtype and shape of every output of :meth:`run`."""
        return self._raw.outputs

    def run(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """Runs the model once, without state, on arrays by name.

        A language model takes ``input_ids``, int32 or int64 ``[n]`` or ``[1, n]``, and gives
        ``logits``, float32 ``[1, n, vocab]``. Raises BadInput for a name, dtype or shape that the
        model does not have, and for data that the model cannot work on.
        """
        return self._raw.run({name: np.asarray(array) for name, array in inputs.items()})

    def session(self, max_seq: int = 0) -> Session:
        """An empty session for up to ``max_seq`` positions (0: as many as the model has)."""
        self._require_tokens()
        return Session(self._raw.session(max_seq), max_seq or self.info["max_seq"])

    def batch_eval(self, sessions: Sequence[Session], tokens: ArrayLike) -> NDArray[np.float32]:
        """Appends ``tokens[i]`` to ``sessions[i]``, all in one step: float32 ``[n, vocab]``."""
        self._require_tokens()
        return self._raw.batch_eval([session._raw for session in sessions], tokens)

    def sampler(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> _runtime.Sampler:
        """What chooses tokens; ``sample(logits, history)`` returns an id.

        ``temperature`` 0 is greedy. ``top_k`` keeps the k most probable tokens (0: all), ``top_p``
        the fewest that together have that probability, ``min_p`` those at least that many times as
        probable as the best one. The ``repetition_penalty`` divides the logits of tokens in the
        history. The same ``seed`` gives the same choices; None draws a seed.
        """
        if seed is None:
            seed = secrets.randbits(64)
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"the seed {seed} is no number from 0 to 2^64 - 1")
        return self._raw.sampler(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; Unsupported if it has none."""
        from qigen.text import TOKENIZER_FILE, Tokenizer  # slow to import

        self._require_tokens()
        if not (self.path / TOKENIZER_FILE).is_file():
            raise Unsupported(
                "the artifact has no tokenizer; evaluate token ids with a session instead",
                str(self.path),
            )
        return Tokenizer.load(self.path)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with ``chat`` of a user's message in the chat template."""
        if chat:
            return self.tokenizer.encode_chat([{"role": "user", "content": text}])
        return self.tokenizer.encode(text)

    def generate_tokens(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampler: _runtime.Sampler | None = None,
    ) -> Iterator[int]:
        """The token ids that continue ``prompt``, as they are made.

        Ends after ``max_tokens``, before a token that ends a text, or when the model has no more
        positions. Without a ``sampler`` the most probable token is taken.
        """
        self._require_tokens()
        if max_tokens < 1:
            raise UsageError(f"cannot generate {max_tokens} tokens; ask for at least 1")
        limit = self.info["max_seq"]
        if len(prompt) == 0:
            raise BadInput("the prompt is empty; give at least one token", "prompt")
        if len(prompt) > limit:
            raise BadInput(
                f"the prompt has {len(prompt)} tokens but the model {limit} positions; shorten it "
                "or compile the model with a larger --max-seq",
                "prompt",
            )
        # The last token is not evaluated.
        session = self.session(min(limit, len(prompt) + max_tokens - 1))
        return self._generate(session, prompt, max_tokens, sampler or self.sampler(seed=0))

    def _generate(
        self, session: Session, prompt: Sequence[int], max_tokens: int, sampler: _runtime.Sampler
    ) -> Iterator[int]:
        history = np.empty(len(prompt) + max_tokens, np.int64)
        history[: len(prompt)] = prompt
        done = 0
        for end in range(len(prompt), len(history)):
            token = session.next(history[done:end], sampler, history[:end])
            if self._raw.is_eos(token):
                return
            history[end] = token
            yield token
            if session.position == session.max_seq:
                return
            done = end

    @overload
    def generate(
        self,
        text: str,
        max_tokens: int = ...,
        *,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        seed: int | None = ...,
        chat: bool = ...,
        stream: Literal[False] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        text: str,
        max_tokens: int = ...,
        *,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        seed: int | None = ...,
        chat: bool = ...,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def generate(
        self,
        text: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        chat: bool = False,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """The text that continues ``text``; with ``stream`` its pieces as they are made.

        With ``chat``, ``text`` is a user's message in the model's chat template. See
        :meth:`sampler` for the choice of tokens and :meth:`generate_tokens` for the end.
        """
        sampler = self.sampler(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        ids = self.encode(text, chat=chat)
        tokens = self.generate_tokens(ids, max_tokens=max_tokens, sampler=sampler)
        pieces = self.stream_text(tokens)
        return pieces if stream else "".join(pieces)

    def stream_text(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens that continue a prompt, in pieces of whole characters."""
        decoder = self.tokenizer.stream()
        for token in tokens:
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.finish():
            yield rest

    def __repr__(self) -> str:
        return f"<qigen.Model {self.info['name']} ({self.info['isa']}) in {self.path}>"


def load(path: str | os.PathLike[str], threads: int = 0, pin: bool = False) -> Model:
    """Opens an artifact; see :class:`Model`."""
    return Model(path, threads, pin)
