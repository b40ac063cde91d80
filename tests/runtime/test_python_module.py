"""qigen._runtime: evaluation, sessions, batches, named tensors, bad input."""

from __future__ import annotations

import gc
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen.errors import BadInput, MachineMismatch, QigenError, Unsupported, UsageError

runtime = pytest.importorskip("qigen._runtime")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_are_those_of_the_model(fake: Any, artifact: Path, threads: int) -> None:
    model = runtime.Model(str(artifact), threads=threads)
    tokens = np.arange(30, dtype=np.int32) * 7 % fake.vocab
    expected = fake.logits(tokens)
    session = model.session()
    # 30 tokens are four steps of up to 8.
    assert np.array_equal(session.eval(tokens, all=True), expected)
    session.rewind(0)
    assert np.array_equal(session.eval(tokens), expected[-1])
    session.rewind(0)
    for token, row in zip(tokens, expected, strict=True):
        assert np.array_equal(session.eval([token]), row)
    assert session.position == 30


def test_sleeping_workers_wake(fake: Any, artifact: Path) -> None:
    session = runtime.Model(str(artifact), threads=2, spin_us=-1, pin=True).session()
    tokens = [3, 1, 4, 1, 5, 9, 2, 6] * 12
    rows = [session.eval([token]) for token in tokens]
    assert np.array_equal(rows, fake.logits(tokens))


def test_rewind_forgets_the_tail(fake: Any, artifact: Path) -> None:
    session = runtime.Model(str(artifact)).session()
    session.eval([1, 2, 3, 4, 5])
    session.rewind(2)
    assert session.position == 2
    assert np.array_equal(session.eval([9]), fake.logits([1, 2, 9])[-1])
    for position in (-1, 4):
        with pytest.raises(BadInput, match="rewind"):
            session.rewind(position)
    assert session.position == 3


def test_info(fake: Any, artifact: Path) -> None:
    model = runtime.Model(str(artifact), threads=3)
    info = model.info
    assert info["name"] == "fake" and info["isa"] == "fake-isa" and info["kv_format"] == "i64"
    assert (info["vocab"], info["max_seq"], info["max_batch"]) == (37, 100, 4)
    assert (info["threads"], info["arena_bytes"]) == (3, 3 * 64)
    assert info["weights_bytes"] == 8192 and info["kv_bytes_per_position"] == 8
    assert info["eos"] == list(fake.eos)
    assert [i for i in range(37) if model.is_eos(i)] == list(fake.eos)
    assert [model.token_text(i) for i in range(37)] == fake.texts
    with pytest.raises(BadInput):
        model.token_text(37)


def test_run(fake: Any, artifact: Path) -> None:
    model = runtime.Model(str(artifact))
    assert model.inputs == [{"name": "input_ids", "dtype": "int32", "shape": (1, -1)}]
    assert model.outputs == [{"name": "logits", "dtype": "float32", "shape": (1, -1, 37)}]
    ids = [5, 6, 7] * 5
    for array in (np.array(ids, np.int32), np.array([ids], np.int64)):
        logits = model.run({"input_ids": array})["logits"]
        assert logits.shape == (1, 15, 37)
        assert np.array_equal(logits[0], fake.logits(ids))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "one input"),
        ({"ids": np.zeros(1, np.int32)}, "one input"),
        ({"input_ids": np.zeros((2, 3), np.int32)}, "shape"),
        ({"input_ids": np.zeros((), np.int32)}, "shape"),
        ({"input_ids": np.zeros(3, np.float32)}, "int32 or int64"),
        ({"input_ids": np.zeros(3, np.int16)}, "int32 or int64"),
        ({"input_ids": np.zeros(0, np.int32)}, "0 elements"),
        ({"input_ids": np.array([37])}, "ids of this model are 0 to 36"),
        ({"input_ids": np.array([1 << 32])}, "ids of this model are 0 to 36"),
        ({"input_ids": np.zeros(101, np.int32)}, "at most 100"),
    ],
)
def test_run_refuses(artifact: Path, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        runtime.Model(str(artifact)).run(inputs)


def test_bad_tokens_leave_the_session_alone(fake: Any, artifact: Path) -> None:
    session = runtime.Model(str(artifact)).session(max_seq=10)
    session.eval([1, 2])
    for tokens, message in [
        ([], "at least one"),
        ([3, -1], "id -1"),
        ([37], "id 37"),
        (list(range(9)), "session's 10 positions"),
    ]:
        with pytest.raises(BadInput, match=message):
            session.eval(np.array(tokens, np.int32))
        assert session.position == 2
    for numbers, message in [
        (["text"], "integers"), ([1.5], "integers"), ([[1, 2]], "one-dim"), (3, "one-dim")
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            session.eval(numbers)
    for dtype in (np.int64, np.uint64):
        with pytest.raises(BadInput, match="id -1"):
            session.eval(np.array([(1 << 32) + 1], dtype))
    assert session.eval(np.array([4], np.int64)).shape == (37,)
    session.rewind(2)
    assert np.array_equal(session.eval(range(8)), fake.logits([1, 2, *range(8)])[-1])
    with pytest.raises(BadInput):
        session.eval([1])


def test_session_sizes(artifact: Path) -> None:
    model = runtime.Model(str(artifact))
    model.session(100).eval([1] * 100)
    for size in (101, -1):
        with pytest.raises(BadInput, match="at most 100"):
            model.session(size)


def test_batch(fake: Any, artifact: Path) -> None:
    model = runtime.Model(str(artifact), threads=2)
    histories = [[1], [2, 3], [4, 5, 6], [7] * 9]
    sessions = [model.session() for _ in histories]
    for session, history in zip(sessions, histories, strict=True):
        session.eval(history)
    for token in (10, 11):
        logits = model.batch_eval(sessions, [token + i for i in range(4)])
        for i, history in enumerate(histories):
            history.append(token + i)
            assert np.array_equal(logits[i], fake.logits(history)[-1])


def test_batch_refuses(artifact: Path) -> None:
    model = runtime.Model(str(artifact))
    first, second = model.session(), model.session(1)
    second.eval([1])
    other = runtime.Model(str(artifact)).session()
    cases: list[tuple[type[QigenError], list[Any], list[int], str]] = [
        (UsageError, [], [], "at least one"),
        (UsageError, [first], [1, 2], "one token for each"),
        (UsageError, [first, first], [1, 2], "in use"),
        (UsageError, [first, other], [1, 2], "another model"),
        (BadInput, [first, second], [1, 2], "1 positions"),
        (BadInput, [first], [99], "id 99"),
        (BadInput, [model.session() for _ in range(5)], [1] * 5, "at most 4"),
    ]
    for error, sessions, tokens, message in cases:
        with pytest.raises(error, match=message):
            model.batch_eval(sessions, np.array(tokens, np.int32))
        assert first.position == 0
    assert first.eval([1]).shape == (37,)  # nothing stayed locked


def test_sessions_outlive_their_model(fake: Any, artifact: Path) -> None:
    session = runtime.Model(str(artifact), threads=2).session()
    gc.collect()
    assert np.array_equal(session.eval([1, 2, 3]), fake.logits([1, 2, 3])[-1])


def test_two_artifacts_in_one_process(fake: Any, tmp_path: Path) -> None:
    a = runtime.Model(str(fake.artifact(tmp_path / "a")))
    b = runtime.Model(str(fake.artifact(tmp_path / "b")))
    assert np.array_equal(a.session().eval([1]), b.session().eval([1]))


def test_sessions_in_many_threads(fake: Any, artifact: Path) -> None:
    model = runtime.Model(str(artifact), threads=2)
    failures: list[str] = []

    def generate(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(5):
            tokens = rng.integers(0, fake.vocab, 60).astype(np.int32)
            session = model.session()
            rows = [session.eval(tokens[:20]), *(session.eval([t]) for t in tokens[20:])]
            if not np.array_equal(rows, fake.logits(tokens)[19:]):
                failures.append(f"seed {seed}")

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_usage(artifact: Path) -> None:
    for threads in (-1, 5000):
        with pytest.raises(UsageError, match="threads"):
            runtime.Model(str(artifact), threads=threads)


# ---- artifacts that don't load -------------------------------------------------------------------


def load_error(folder: Path) -> QigenError:
    with pytest.raises(QigenError) as caught:
        runtime.Model(str(folder))
    assert str(caught.value).count("\n") == 0
    return caught.value


def test_missing_files(artifact: Path) -> None:
    (artifact / "vocab.bin").unlink()
    model = runtime.Model(str(artifact))  # allowed: not every model has tokens
    assert model.info["eos"] == []
    with pytest.raises(Unsupported, match=r"vocab\.bin"):
        model.token_text(1)
    for name in ("weights.bin", "model.so"):
        (artifact / name).unlink()
        error = load_error(artifact)
        assert isinstance(error, BadInput) and name in str(error)
    assert isinstance(load_error(artifact / "nowhere"), BadInput)


def test_flipped_header_bytes(artifact: Path) -> None:
    path = artifact / "weights.bin"
    good = path.read_bytes()
    for index in [*range(64), 100, 4095]:
        damaged = bytearray(good)
        damaged[index] ^= 0x10
        path.write_bytes(damaged)
        error = load_error(artifact)
        assert isinstance(error, BadInput) and "weights.bin" in str(error), index


@pytest.mark.parametrize("size", [0, 10, 4095, 4096, 8191, 8193, 12288])
def test_wrong_size_of_weights(artifact: Path, size: int) -> None:
    path = artifact / "weights.bin"
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    error = load_error(artifact)
    assert isinstance(error, BadInput) and "truncated" in str(error)


def test_weights_of_another_model(
    fake: Any, artifact: Path, tmp_path: Path, weights_writer: Callable[..., None]
) -> None:
    for keywords in ({"uid": 1}, {"magic": b"QIGENWB2"}):
        weights_writer(artifact / "weights.bin", weights=fake.weights, **keywords)
        assert isinstance(load_error(artifact), BadInput)
    # Consistent in itself, but not what model.so was compiled for.
    weights_writer(artifact / "weights.bin", weights=fake.weights, file_bytes=12288)
    with (artifact / "weights.bin").open("ab") as file:
        file.write(bytes(4096))
    assert "another model" in str(load_error(artifact))
    other = fake.artifact(tmp_path / "other", "FAKE_UID=7")
    assert "another model" in str(load_error(other))


def test_other_abi(
    fake: Any, artifact: Path, tmp_path: Path, weights_writer: Callable[..., None]
) -> None:
    weights_writer(artifact / "weights.bin", weights=fake.weights, abi=3)
    error = load_error(artifact)
    assert isinstance(error, MachineMismatch) and "version 3" in str(error)
    error = load_error(fake.artifact(tmp_path / "kernels", "FAKE_ABI=9"))
    assert isinstance(error, MachineMismatch) and "version 9" in str(error)


def test_missing_instruction_set(fake: Any, tmp_path: Path) -> None:
    # Bit 40 belongs to no feature, so no machine has it.
    error = load_error(fake.artifact(tmp_path / "future", "FAKE_FEATURES=(1ull<<40)|1"))
    assert isinstance(error, MachineMismatch) and error.exit_code == 6
    assert "fake-isa" in str(error) and str(1 << 40) in str(error)


def test_damaged_vocabulary(fake: Any, artifact: Path, vocab_writer: Callable[..., None]) -> None:
    path = artifact / "vocab.bin"
    good = path.read_bytes()
    for damaged in [
        b"",
        b"QIGENVB2" + good[8:],
        good[:-1],
        good + b"x",
        good[:40],
        good[:8] + struct.pack("<I", 38) + good[12:],
        good[:12] + struct.pack("<I", 0xFFFFFFFF) + good[16:],
        good[:16] + struct.pack("<i", 37) + good[20:],
        good[:24] + struct.pack("<I", 1) + good[28:],
        good[:40] + struct.pack("<I", 1 << 30) + good[44:],
    ]:
        path.write_bytes(damaged)
        error = load_error(artifact)
        assert isinstance(error, BadInput) and "vocab.bin" in str(error)
    vocab_writer(path, fake.texts[:30], [])  # fewer tokens than logits: padded embeddings
    model = runtime.Model(str(artifact))
    assert model.token_text(29) == b" t29" and model.token_text(36) == b""


def test_damaged_library(artifact: Path) -> None:
    path = artifact / "model.so"
    good = path.read_bytes()
    for size in (0, 10, 64, 4096, len(good) - 1):
        path.unlink()  # a new file: the old one may still be mapped
        path.write_bytes(good[:size])
        assert isinstance(load_error(artifact), BadInput)
    path.unlink()
    path.write_bytes(good[:18] + struct.pack("<H", 20) + good[20:])  # PowerPC
    assert isinstance(load_error(artifact), MachineMismatch)
    path.unlink()
    shutil.copy(runtime.__file__, path)  # a library, but no model
    error = load_error(artifact)
    assert "qigen_abi_version" in str(error) or isinstance(error, MachineMismatch)
