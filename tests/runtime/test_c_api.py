"""The C interface through ctypes: null pointers, older callers, sampling, the ELF file."""

from __future__ import annotations

import ctypes as c
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

HEADER = Path(__file__).parents[2] / "runtime" / "include" / "qigen.h"
OK, USAGE, BAD_INPUT, MACHINE = 0, 2, 3, 6


class LoadOptions(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("threads", c.c_int32),
        ("pin", c.c_int32),
        ("spin_us", c.c_int32),
    ]


class ModelInfo(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        *((name, c.c_char_p) for name in ("name", "isa", "kv_format")),
        *(
            (name, c.c_int32)
            for name in (
                "vocab", "max_seq", "max_batch", "max_tokens", "d_model", "n_layers", "threads",
                "n_inputs", "n_outputs", "n_eos",
            )
        ),
        ("eos", c.POINTER(c.c_int32)),
        *((name, c.c_uint64) for name in ("weights_bytes", "arena_bytes", "kv_bytes_per_position")),
    ]  # fmt: skip


class Sampler(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("repetition_penalty", c.c_float),
        ("temperature", c.c_float),
        ("top_k", c.c_int32),
        ("top_p", c.c_float),
        ("min_p", c.c_float),
    ]


@pytest.fixture(scope="module")
def library(fake: Any) -> c.CDLL:
    library = c.CDLL(str(fake.library()))
    library.qigen_last_error.restype = c.c_char_p
    library.qigen_model_free.argtypes = [c.c_void_p]
    library.qigen_session_free.argtypes = [c.c_void_p]
    return library


@pytest.fixture
def model(library: c.CDLL, artifact: Path) -> Iterator[c.c_void_p]:
    handle = c.c_void_p()
    options = LoadOptions(c.sizeof(LoadOptions), 2, 0, 0)
    status = library.qigen_model_load(str(artifact).encode(), c.byref(options), c.byref(handle))
    assert status == OK, library.qigen_last_error()
    yield handle
    library.qigen_model_free(handle)


def pointer(array: NDArray[Any]) -> c.c_void_p:
    return c.c_void_p(array.ctypes.data)


def test_exports_and_needs(fake: Any) -> None:
    def lines(*command: str) -> list[str]:
        done = subprocess.run(
            [*command, str(fake.library())], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    exported = {line.split()[-1] for line in lines("nm", "-D", "--defined-only")}
    declared = set(re.findall(r"QIGEN_API [\w* ]+?\b(qigen_\w+)\(", HEADER.read_text()))
    assert exported == declared
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", "\n".join(lines("readelf", "-d"))))
    allowed = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libstdc++.so.6", "libgcc_s.so.1"}
    assert needed <= allowed
    # The runtime must run where the kernels can't, to say so.
    assert not re.search(r"%[yz]mm", "\n".join(lines("objdump", "-d", "--no-show-raw-insn")))


def test_load_and_eval(fake: Any, library: c.CDLL, model: c.c_void_p) -> None:
    assert library.qigen_abi_version() == 2
    session = c.c_void_p()
    assert library.qigen_session_create(model, 0, c.byref(session)) == OK
    tokens = np.arange(20, dtype=np.int32)
    logits = np.zeros((20, fake.vocab), np.float32)
    assert library.qigen_session_eval(session, pointer(tokens), 19, None, 0) == OK
    assert library.qigen_session_eval(session, pointer(tokens[19:]), 1, pointer(logits), 0) == OK
    assert np.array_equal(logits[0], fake.logits(tokens)[-1])
    assert library.qigen_session_position(session) == 20
    assert library.qigen_session_rewind(session, 0) == OK
    assert library.qigen_session_eval(session, pointer(tokens), 20, pointer(logits), 1) == OK
    assert np.array_equal(logits, fake.logits(tokens))
    assert library.qigen_session_eval(session, pointer(tokens), 1, None, 1) == USAGE
    assert library.qigen_session_eval(session, pointer(tokens), -1, None, 0) == BAD_INPUT
    library.qigen_session_free(session)


def test_older_callers_know_fewer_fields(library: c.CDLL, model: c.c_void_p) -> None:
    info = ModelInfo(struct_size=c.sizeof(ModelInfo))
    assert library.qigen_model_get_info(model, c.byref(info)) == OK
    assert (info.name, info.vocab, info.threads, info.kv_bytes_per_position) == (b"fake", 37, 2, 8)
    assert (info.n_eos, info.eos[0], info.eos[1]) == (2, 2, 5)
    short = ModelInfo(struct_size=ModelInfo.max_seq.offset, max_seq=-7)
    assert library.qigen_model_get_info(model, c.byref(short)) == OK
    assert (short.vocab, short.max_seq) == (37, -7)
    empty = ModelInfo()
    assert library.qigen_model_get_info(model, c.byref(empty)) == USAGE


def test_null_pointers(library: c.CDLL, model: c.c_void_p, artifact: Path) -> None:
    handle = c.c_void_p()
    assert library.qigen_model_load(None, None, c.byref(handle)) == USAGE
    assert library.qigen_model_load(str(artifact).encode(), None, None) == USAGE
    assert library.qigen_model_get_info(model, None) == USAGE
    assert library.qigen_session_create(None, 0, c.byref(handle)) == USAGE
    assert library.qigen_session_eval(None, None, 0, None, 0) == USAGE
    assert library.qigen_session_rewind(None, 0) == USAGE
    assert library.qigen_batch_eval(None, None, 1, None) == USAGE
    assert library.qigen_model_run(model, None, 1, None, 0) == USAGE
    assert library.qigen_model_get_input(model, 1, None) == USAGE
    assert library.qigen_token_text(model, 0, None, None) == USAGE
    assert library.qigen_sample(None, 0, None, None, 0, None, None) == USAGE
    assert library.qigen_argmax(None, 5) == -1
    assert library.qigen_model_is_eos(None, 1) == 0
    assert library.qigen_session_position(None) == 0
    library.qigen_model_free(None)
    library.qigen_session_free(None)


def test_statuses_and_messages(library: c.CDLL, tmp_path: Path) -> None:
    handle = c.c_void_p()
    assert library.qigen_model_load(str(tmp_path).encode(), None, c.byref(handle)) == BAD_INPUT
    assert b"weights.bin: No such file" in library.qigen_last_error()
    assert handle.value is None


# ---- sampling ------------------------------------------------------------------------------------


def splitmix64(state: int) -> tuple[int, float]:
    """Next state and number in [0, 1)."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return state, (z >> 11) * 2.0**-53


def reference_distribution(
    logits: NDArray[np.float32],
    history: list[int],
    repetition_penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> NDArray[np.float64]:
    """Probability of each token, written from the documentation in qigen.h."""
    logits = logits.copy()
    for token in set(history):
        penalty = np.float32(repetition_penalty)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    weights = np.exp((logits.astype(np.float64) - logits.max()) / np.float32(temperature))
    order = np.lexsort((np.arange(len(logits)), -logits))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        shares = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(shares, np.float32(top_p))) + 1]
    order = order[weights[order] >= np.float32(min_p)]
    kept = np.zeros_like(weights)
    kept[order] = weights[order]
    return kept / kept.sum()


CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.9, "top_k": 20},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5, "top_k": 10},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampling_follows_the_documentation(library: c.CDLL, case: dict[str, Any]) -> None:
    parameters = {
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        **case,
    }
    sampler = Sampler(c.sizeof(Sampler), **parameters)
    rng = np.random.default_rng(3)
    logits = (3 * rng.standard_normal(200)).astype(np.float32)
    logits[17] = logits[4]  # ties
    history = np.array([4, 4, 9, int(logits.argmax())], np.int32)
    probabilities = reference_distribution(logits, history.tolist(), **parameters)
    edges = np.cumsum(probabilities)

    state = seed = 12345
    c_state, token = c.c_uint64(seed), c.c_int32()
    counts = np.zeros(200)
    draws = 4000
    for _ in range(draws):
        status = library.qigen_sample(
            pointer(logits), 200, c.byref(sampler), pointer(history), len(history),
            c.byref(c_state), c.byref(token),
        )  # fmt: skip
        assert status == OK
        state, uniform = splitmix64(state)
        assert c_state.value == state
        counts[token.value] += 1
        # The same draw, up to rounding at an edge.
        lower = edges[token.value] - probabilities[token.value]
        assert lower - 1e-9 <= uniform <= edges[token.value] + 1e-9
    assert not counts[probabilities == 0].any()
    expected = draws * probabilities
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = int(likely.sum())
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 5


def test_greedy_and_bad_sampling(library: c.CDLL) -> None:
    token = c.c_int32()

    def sample(logits: list[float], history: list[int], **parameters: Any) -> int:
        array, past = np.array(logits, np.float32), np.array(history, np.int32)
        sampler = Sampler(c.sizeof(Sampler), **parameters)
        rng = c.c_uint64(1)
        return int(library.qigen_sample(
            pointer(array), len(logits), c.byref(sampler), pointer(past), len(past),
            c.byref(rng), c.byref(token),
        ))  # fmt: skip

    assert sample([1, 3, 3, 2], []) == OK and token.value == 1
    assert sample([1, 3, 2.9, 2], [1], repetition_penalty=1.2) == OK and token.value == 2
    assert sample([-1, -1.1], [0], repetition_penalty=1.2) == OK and token.value == 1
    for _ in range(50):  # one candidate is always drawn
        assert sample([1, 3, 3, float("nan")], [], temperature=1, top_k=1) == OK
        assert token.value == 1
        assert sample([1, 3, 3, 2], [], temperature=1, top_p=1e-6) == OK
        assert token.value == 1
        assert sample([0, float("-inf"), float("nan")], [], temperature=5.0) == OK
        assert token.value == 0
    for bad in [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_p": -0.1},
        {"min_p": 2}, {"top_k": -1}, {"repetition_penalty": -1},
    ]:  # fmt: skip
        assert sample([1, 2], [], **bad) == USAGE
    assert sample([float("nan")] * 3, []) == BAD_INPUT
    assert sample([float("inf"), 0], [], temperature=1) == BAD_INPUT
    assert sample([1, 2], [2], repetition_penalty=1.1) == BAD_INPUT
    sampler = Sampler(c.sizeof(Sampler), temperature=1)
    row = np.zeros(3, np.float32)
    status = library.qigen_sample(pointer(row), 3, c.byref(sampler), None, 0, None, c.byref(token))
    assert status == USAGE  # no generator


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 511, 512, 513, 5000])
def test_argmax(library: c.CDLL, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(50):
        logits = rng.integers(-9, 9, vocab).astype(np.float32)  # many ties
        assert library.qigen_argmax(pointer(logits), vocab) == logits.argmax()
    logits[:] = np.nan
    assert library.qigen_argmax(pointer(logits), vocab) == -1
    logits[vocab // 2] = -5
    assert library.qigen_argmax(pointer(logits), vocab) == vocab // 2
    assert library.qigen_argmax(pointer(logits), 0) == -1


# ---- another ABI ---------------------------------------------------------------------------------


def test_loader_asks_for_the_abi_first(artifact: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("qigen._runtime")
    from qigen.errors import MachineMismatch

    compiler = shutil.which("gcc")
    assert compiler
    source = tmp_path / "other.c"
    source.write_text("unsigned qigen_abi_version(void) { return 3; }\n")
    (artifact / "model.so").unlink()
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", artifact / "model.so"], check=True)
    with pytest.raises(MachineMismatch, match="ABI version 3"):
        runtime.Model(str(artifact))
