"""The Python API over a compiled model."""

from __future__ import annotations

import importlib
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qigen

PROMPT = "Once upon a time"

# Another order of float32 additions can round keys and values to another f16.
F16_CACHE = 0.03


@pytest.fixture(scope="module")
def model(stories_artifact: Any) -> qigen.Model:
    return qigen.load(stories_artifact(), threads=2)


def test_importing_the_package_imports_nothing_large() -> None:
    code = "import sys, qigen; print([m for m in ('numpy', 'rich', 'jinja2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"[]\n"


def test_public_names() -> None:
    for name in qigen.__all__:
        assert getattr(qigen, name) is not None
        assert name in dir(qigen)
    with pytest.raises(AttributeError, match="nothing"):
        _ = qigen.nothing  # type: ignore[attr-defined]


def test_greedy_tokens_are_the_reference(
    isa: str, stories_artifact: Any, stories_reference: dict[str, Any]
) -> None:
    expected = stories_reference["greedy_ids"]
    for threads in (1, 2, 3):
        model = qigen.load(stories_artifact(isa=isa), threads=threads)
        assert model.info["isa"] == isa and model.info["threads"] == threads
        assert model.encode(stories_reference["prompt"]) == stories_reference["prompt_ids"]
        made = model.generate_tokens(stories_reference["prompt_ids"], max_tokens=len(expected))
        assert list(made) == expected


def test_a_token_at_a_time_gives_the_logits_of_the_prompt(model: qigen.Model) -> None:
    ids = np.random.default_rng(0).integers(3, 512, 300)
    session = model.session()
    together = session.eval(ids, all=True)
    assert together.shape == (300, 512) and together.dtype == np.float32
    assert session.position == 300
    session.rewind(0)
    one_by_one = np.stack([session.eval([token]) for token in ids])
    np.testing.assert_allclose(one_by_one, together, atol=F16_CACHE)
    session.rewind(10)
    assert session.position == 10
    np.testing.assert_allclose(session.eval(ids[10:200]), together[199], atol=F16_CACHE)
    outputs = model.run({"input_ids": ids})
    np.testing.assert_allclose(outputs["logits"][0], together, atol=F16_CACHE)


def test_inputs_and_outputs(model: qigen.Model) -> None:
    assert model.inputs == [{"name": "input_ids", "dtype": "int32", "shape": (1, -1)}]
    assert model.outputs == [{"name": "logits", "dtype": "float32", "shape": (1, -1, 512)}]
    with pytest.raises(qigen.BadInput, match="input_ids"):
        model.run({"ids": [1, 2]})


def test_a_batch_is_its_sessions(model: qigen.Model) -> None:
    prompts = [[1, 403, 407], [1, 261], [1, 5, 6, 7, 8]]
    expected = []
    sessions = []
    for prompt in prompts:
        session = model.session(max_seq=16)
        session.eval(prompt)
        expected.append(session.eval([9]))
        session.rewind(len(prompt))
        sessions.append(session)
    logits = model.batch_eval(sessions, [9, 9, 9])
    np.testing.assert_allclose(logits, expected, atol=F16_CACHE)
    assert [session.position for session in sessions] == [4, 3, 6]


def test_generate(model: qigen.Model, stories_reference: dict[str, Any]) -> None:
    length = len(stories_reference["greedy_ids"])
    whole = model.generate(PROMPT, max_tokens=length)
    assert whole == stories_reference["text"].removeprefix(f" {PROMPT}")
    pieces = model.generate(PROMPT, max_tokens=length, stream=True)
    assert next(pieces) == ","
    assert "," + "".join(pieces) == whole


def test_next_is_eval_and_sample(model: qigen.Model) -> None:
    """For prompts of many steps too, and a penalty for what there was before."""
    prompt = [1, *np.random.default_rng(2).integers(259, 512, 150).tolist()]
    options = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
    one, two = model.sampler(**options), model.sampler(**options)
    session, reference = model.session(), model.session()
    history, fed = list(prompt), prompt
    for _ in range(6):
        token = session.next(fed, one, history)
        assert token == two.sample(reference.eval(fed), history)
        assert session.position == reference.position
        history.append(token)
        fed = [token]
    with pytest.raises(qigen.BadInput, match="-1"):
        session.next([5, -1], one)
    assert session.position == reference.position


def test_sampling_repeats_with_its_seed(model: qigen.Model) -> None:
    def text(**options: Any) -> str:
        return model.generate(PROMPT, 40, temperature=1.0, **options)

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len({text() for _ in range(4)}) > 1
    greedy = model.generate(PROMPT, 40)
    assert text(top_k=1) == text(top_p=1e-6) == text(min_p=1.0) == greedy
    assert model.generate(PROMPT, 40, repetition_penalty=1.5) != greedy


def test_generation_ends(model: qigen.Model) -> None:
    # At the model's last position: every position is evaluated, and one token more comes out.
    ids = [1, *np.random.default_rng(1).integers(259, 512, 499).tolist()]
    sampler = model.sampler(temperature=0.0)
    made = list(model.generate_tokens(ids, max_tokens=100, sampler=sampler))
    assert len(made) <= 512 - 500 + 1
    assert len(list(model.generate_tokens([1] * 512, max_tokens=5))) <= 1
    # At the end of a text.
    story = list(model.generate_tokens([1], max_tokens=500))
    assert not set(story) & set(model.info["eos"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(PROMPT, 0), qigen.UsageError, "at least 1"),
        (lambda m: m.generate("word " * 600), qigen.BadInput, "larger --max-seq"),
        (lambda m: m.generate_tokens([]), qigen.BadInput, "empty"),
        (lambda m: m.generate(PROMPT, chat=True), qigen.BadInput, "chat template"),
        (lambda m: m.generate(PROMPT, top_p=2.0), qigen.UsageError, "top_p"),
        (lambda m: m.generate(PROMPT, seed=-1), qigen.UsageError, "seed"),
        (lambda m: list(m.generate_tokens([600])), qigen.BadInput, "600"),
        (lambda m: m.session(10_000), qigen.BadInput, "larger --max-seq"),
        (lambda m: m.session(10).eval([1] * 11), qigen.BadInput, "11 more tokens"),
        (lambda m: m.session().eval([]), qigen.BadInput, "at least one"),
        (lambda m: m.session().eval([-1]), qigen.BadInput, "-1"),
        (lambda m: m.session().rewind(1), qigen.BadInput, "rewind"),
    ],
)
def test_what_makes_no_sense(
    model: qigen.Model, call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(model)


def test_a_refused_prompt_changes_nothing(model: qigen.Model) -> None:
    session = model.session(400)
    session.eval([1, 2, 3])
    for tokens in ([1] * 398, [1] * 300 + [512]):
        with pytest.raises(qigen.BadInput):
            session.eval(tokens)
        assert session.position == 3


def test_control_c_ends_a_long_prompt(model: qigen.Model) -> None:
    session = model.session()
    session.eval([1, 2, 3])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                session.rewind(3)
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                session.eval([5] * 500)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert session.position in (3, 503)  # 503: it came just after the call
    session.rewind(3)
    fresh = model.session()
    fresh.eval([1, 2, 3])
    assert np.array_equal(session.eval([9]), fresh.eval([9]))


def test_sessions_in_threads(model: qigen.Model, stories_reference: dict[str, Any]) -> None:
    results: list[list[int]] = []

    def work() -> None:
        prompt = stories_reference["prompt_ids"]
        results.append(list(model.generate_tokens(prompt, max_tokens=20)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [stories_reference["greedy_ids"][:20]] * 4


def test_what_cannot_be_loaded(tmp_path: Path, stories_artifact: Any, stories_gguf: Path) -> None:
    with pytest.raises(qigen.BadInput, match="no such artifact"):
        qigen.load(tmp_path / "none.qgn")
    with pytest.raises(qigen.BadInput, match="qigen compile"):
        qigen.load(stories_gguf)
    with pytest.raises(qigen.BadInput, match=r"model\.so"):
        qigen.load(tmp_path)
    bare = tmp_path / "bare.qgn"
    shutil.copytree(stories_artifact(), bare)
    (bare / "tokenizer.json").unlink()
    model = qigen.load(bare)
    assert model.session().eval([1]).shape == (512,)
    with pytest.raises(qigen.Unsupported, match="no tokenizer"):
        model.generate(PROMPT)


def test_quantize() -> None:
    weight = np.random.default_rng(0).normal(size=(20, 128)).astype(np.float32)
    tensor = qigen.quantize(weight, "s8g32")
    assert isinstance(tensor, qigen.QuantizedTensor) and tensor.shape == (20, 128)
    np.testing.assert_allclose(tensor.dequantize(), weight, atol=0.03)
    assert tensor.pack().dtype == np.uint8
    importlib.import_module("qigen.quantize.rtn")  # puts the module in the place of the name
    assert qigen.quantize(weight.tolist(), "s8g32", method="rtn").shape == (20, 128)
    with pytest.raises(qigen.Unsupported, match="gtpq"):
        qigen.quantize(weight, "s8g32", method="gtpq")
    with pytest.raises(qigen.Unsupported, match="s9g32"):
        qigen.quantize(weight, "s9g32")
    for bad in (weight[0], [["a"]], weight * np.nan):
        with pytest.raises(qigen.BadInput):
            qigen.quantize(bad, "s8g32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("1, 2, 3, 4, 5, 6,", " 7, 8, 9, 10, 11, 12, 13, 14, 15"),
        ("2 4 6 8 10 12 14", " 16 18 20 22 24 26 28 30 32 36 3"),
    ],
)
def test_smollm2_counts(isa: str, smollm2_artifact: Any, prompt: str, continuation: str) -> None:
    for threads in (1, 2):
        model = qigen.load(smollm2_artifact(isa=isa), threads=threads)
        length = len(model.tokenizer.encode(continuation, add_special=False))
        assert model.generate(prompt, length) == continuation
