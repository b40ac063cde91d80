"""Sessions of compiled models: long contexts, threads, batches, rewinding, prompts in pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from qigen.errors import BadInput, UsageError
from tests.e2e.harness import Compiled, relative_error
from tests.e2e.test_families import TOLERANCE

Build = Callable[..., Compiled]

# Attention over more than 256 positions is split into chunks whose results are combined.
LONG = {"context": 1200, "n_layers": 2}
WINDOW = 300  # of the second model: windows begin in the middle of a block of 64, and span chunks
MODELS = {
    "f32": {"family": "llama", "activations": "f32", "overrides": LONG},
    "int8": {"family": "llama", "activations": "int8", "kv": "int8", "overrides": LONG},
    "window": {"family": "mistral", "activations": "f32", "overrides": {**LONG, "window": WINDOW}},
}
# Positions before, at and after the borders of blocks, chunks, windows and steps.
BORDERS = [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 299, 300, 301, 511, 512, 513, 768, 1100]
TOKENS = np.random.default_rng(7).integers(3, 96, 1200).tolist()


@pytest.fixture(params=MODELS)
def model(compiled: Build, request: pytest.FixtureRequest) -> Compiled:
    return compiled(**MODELS[request.param])


def error_limit(model: Compiled) -> float:
    return TOLERANCE[model.options.activations, model.options.kv]


def test_long_prompts_agree_with_the_interpreter(model: Compiled) -> None:
    found = model.session().eval(TOKENS[:700], all=True)
    assert relative_error(found, model.expected(TOKENS[:700])) < error_limit(model)


def test_decoding_agrees_with_the_prompt(model: Compiled) -> None:
    """One token more, in the session of a prompt, gives the logits of the longer prompt."""
    prompt = model.session().eval(TOKENS[:1101], all=True)
    session = model.session()
    for position in BORDERS:
        if session.position < position:
            session.eval(TOKENS[session.position : position])
        found = session.eval([TOKENS[position]])
        assert relative_error(found, prompt[position]) < error_limit(model)


def test_threads_do_not_change_a_bit(model: Compiled) -> None:
    results = []
    for threads in (1, 2, 3, 4):
        session = model.session(threads)
        prompt = session.eval(TOKENS[:600], all=True)
        steps = [session.eval([token]) for token in TOKENS[600:606]]
        sessions = [model.session(threads) for _ in range(3)]
        for i, short in enumerate(sessions):
            short.eval(TOKENS[: 10 + 260 * i])
        batch = model.model(threads).batch_eval(sessions, TOKENS[:3])
        results.append((prompt, np.stack(steps), batch))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert np.array_equal(found, expected)


def test_a_batch_is_its_sessions(model: Compiled) -> None:
    """With int8 activations to the last bit: sums of products are integers there. A float product
    of one row is added up in another order than one of several."""
    lengths = [1, 40, 64, 256, 257, 700, 1, 333]
    together = [model.session() for _ in lengths]
    alone = [model.session() for _ in lengths]
    for length, a, b in zip(lengths, together, alone, strict=True):
        a.eval(TOKENS[:length])
        b.eval(TOKENS[:length])
    for step in range(3):
        tokens = [TOKENS[500 + step * 8 + i] for i in range(8)]
        found = model.model().batch_eval(together, tokens)
        for row, session, token in zip(found, alone, tokens, strict=True):
            expected = session.eval([token])
            if model.options.activations == "int8":
                assert np.array_equal(row, expected)
            assert relative_error(row, expected) < error_limit(model)
    assert [s.position for s in together] == [length + 3 for length in lengths]


def test_a_prompt_in_pieces(model: Compiled) -> None:
    """Prompts longer than a step are cut; any other cut gives the same logits."""
    step = model.model().info["max_tokens"]
    n = 2 * step + 44
    assert step < n < 1200
    whole = model.session().eval(TOKENS[:n], all=True)
    for pieces in ([1] * n, [step] * 2 + [44], [7, step + 1, n - step - 8], [n - 1, 1]):
        session = model.session()
        found = []
        for piece in pieces:
            start = session.position
            found.append(session.eval(TOKENS[start : start + piece], all=True))
        assert session.position == n
        assert relative_error(np.concatenate(found), whole) < error_limit(model)
    last = model.session().eval(TOKENS[:n])
    assert relative_error(last, whole[-1]) < error_limit(model)


def test_rewinding_forgets(model: Compiled) -> None:
    session = model.session()
    other = [95 - token % 90 for token in TOKENS]
    expected = session.eval(TOKENS[:400], all=True)
    for position in (300, 255, 64, 1, 0):
        session.rewind(position)
        assert session.position == position
        session.eval(other[position:390])  # stale keys and values behind the next end
        session.rewind(position)
        found = session.eval(TOKENS[position:400], all=True)
        assert relative_error(found, expected[position:]) < error_limit(model)


def test_the_context_fills_to_its_last_position(model: Compiled) -> None:
    session = model.session()
    session.eval(TOKENS[:1199])
    last = session.eval([TOKENS[1199]])
    assert np.isfinite(last).all() and session.position == 1200
    with pytest.raises(BadInput, match="1 more tokens after 1200"):
        session.eval([1])
    assert session.position == 1200
    small = model.model().session(max_seq=70)
    with pytest.raises(BadInput, match="71 more tokens"):
        small.eval(TOKENS[:71])
    small.eval(TOKENS[:70])
    for bad in (-1, 96, 2**40):
        with pytest.raises(BadInput, match="ids of this model are 0 to 95"):
            model.session().eval([1, bad])


def test_batches_that_cannot_be(model: Compiled) -> None:
    most = model.model().info["max_batch"]
    sessions = [model.session() for _ in range(most + 1)]
    with pytest.raises(BadInput, match="max-batch"):
        model.model().batch_eval(sessions, [1] * (most + 1))
    with pytest.raises(UsageError):
        model.model().batch_eval([sessions[0], sessions[0]], [1, 1])
    with pytest.raises(BadInput):
        model.model().batch_eval(sessions[:2], [1, 96])
    assert [s.position for s in sessions] == [0] * (most + 1)


def test_sessions_shorter_than_a_batch_is_wide(compiled: Build) -> None:
    """Two positions, eight sessions."""
    model = compiled(activations="int8", max_seq=2)
    sessions = [model.session() for _ in range(8)]
    for column in (TOKENS[:8], TOKENS[8:16]):
        found = model.model().batch_eval(sessions, column)
    for i, row in enumerate(found):
        alone = model.session()
        alone.eval([TOKENS[i]])
        assert np.array_equal(row, alone.eval([TOKENS[8 + i]]))
        with pytest.raises(BadInput, match="max-seq"):
            alone.eval([1])


def test_sessions_of_many_threads(model: Compiled) -> None:
    """Sessions share one pool; each gets what it would get alone."""
    prompts = [TOKENS[i * 50 : i * 50 + 150] for i in range(4)]
    expected = []
    for prompt in prompts:
        session = model.session()
        session.eval(prompt[:-3])
        expected.append([session.eval([token]) for token in prompt[-3:]])
    found: list[list[np.ndarray]] = [[] for _ in prompts]

    def run(i: int) -> None:
        session = model.session()
        session.eval(prompts[i][:-3])
        found[i] = [session.eval([token]) for token in prompts[i][-3:]]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(f, e) for f, e in zip(found, expected, strict=True))


def test_stateless_runs(model: Compiled) -> None:
    ids = np.array([TOKENS[:20]], np.int64)
    found = model.model().run({"input_ids": ids})["logits"]
    assert found.shape == (1, 20, 96)
    assert np.array_equal(found[0], model.session().eval(TOKENS[:20], all=True))
