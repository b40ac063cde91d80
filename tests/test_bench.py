"""The benchmark: the shape of its results, and what each side is asked to do."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen import _runtime
from qigen.bench import Worker, bench, gguf_bytes_read_per_token, stream_read_gb_s
from qigen.bench_worker import peak_rss_bytes, serve
from qigen.cli import main
from qigen.errors import BadInput, QigenError, Unsupported, UsageError

SMALL = {"prefill": 32, "decode": 8, "repeat": 3}


def check(side: dict[str, Any], stream: float, batch: int = 1) -> None:
    """The part of the result that all sides have."""
    assert side["threads"] >= 1 and side["load_s"] > 0
    # the first prompt pays for what later ones find: it is never much faster than they are
    assert side["first_token_s"] > 0.2 * 32 / max(side["prefill"]["runs"])
    assert side["peak_rss_bytes"] > 1 << 20 and side["weight_bytes"] > 1e6
    for phase, tokens in (("prefill", 32), ("decode", 8)):
        values = side[phase]
        assert values["tokens"] == tokens and len(values["runs"]) == 3
        assert values["tok_s"] == statistics.median(values["runs"]) > 0
    decode = side["decode"]
    assert decode["gb_s"] == pytest.approx(side["weight_bytes"] * decode["tok_s"] / batch / 1e9)
    assert decode["fraction_of_stream"] == pytest.approx(decode["gb_s"] / stream)


def test_result(stories_artifact: Any) -> None:
    stages = []
    result = bench(
        stories_artifact(), **SMALL, threads=2, progress=lambda *state: stages.append(state)
    )
    check(result, result["stream_read_gb_s"])
    assert result["threads"] == 2 and result["peers"] == {}
    assert result["stream_read_gb_s"] == statistics.median(result["stream_read_runs"]) > 0
    assert result["machine"]["cores"] >= 1 and len(result["machine"]["load_average"]) == 3
    assert stages[0] == ("load", 0, 1) and stages[-1] == ("measure", 3, 3)
    json.dumps(result)


def test_the_table(
    stories_artifact: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code = main(["bench", str(stories_artifact()), "--prefill", "16", "--decode", "4", "--repeat",
                 "1", "--threads", "1"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "first token ms" in out and "peak memory" in out


def test_batch_and_context(stories_artifact: Any) -> None:
    result = bench(stories_artifact(), **SMALL, batch=3, context=20)
    check(result, result["stream_read_gb_s"], batch=3)
    assert (result["batch"], result["context"]) == (3, 20)


def test_defaults_fit_the_model(stories_artifact: Any) -> None:
    result = bench(stories_artifact(max_seq=40), repeat=1, context=10)
    assert (result["prefill"]["tokens"], result["decode"]["tokens"]) == (40, 30)


@pytest.mark.slow
def test_llama_cpp(
    stories_artifact: Any,
    stories_gguf: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("llama_cpp")
    options: dict[str, Any] = {"batch": 2, "context": 4, "threads": 2, "peers": ["llama.cpp"]}
    result = bench(stories_artifact(), **SMALL, **options)
    peer = result["peers"]["llama.cpp"]
    check(result, result["stream_read_gb_s"], batch=2)
    check(peer, result["stream_read_gb_s"], batch=2)
    assert peer["threads"] == result["threads"] == 2
    assert peer["model"] == str(stories_gguf)
    times = peer["first_token_s"] / result["first_token_s"]
    assert peer["ratio"]["first_token"] == pytest.approx(times)
    for phase in ("prefill", "decode"):
        pairs = zip(result[phase]["runs"], peer[phase]["runs"], strict=True)
        assert peer["ratio"][phase] == statistics.median(a / b for a, b in pairs)
        assert set(peer[phase]["settings"]) == {"repack", "flash_attention"}

    asked = {}

    def stored(path: Path, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return result

    monkeypatch.setattr("qigen.bench.bench", stored)
    arguments = ["bench", str(stories_artifact()), "--vs", "llama.cpp", "--peer-model", "x.gguf",
                 "--repeat", "3"]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert asked["peers"] == ["llama.cpp"] and asked["peer_model"] == Path("x.gguf")
    assert asked["repeat"] == 3 and asked["prefill"] is None
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "llama.cpp decode: repack=" in table and f"{peer['ratio']['decode']:.2f}" in table


def test_what_peers_need(
    stories_artifact: Any, artifact_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported, match="peer 'other'"):
        bench(stories_artifact(), peers=["other"])
    with pytest.raises(BadInput, match="--peer-model"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        bench(stories_artifact(), peers=["llama.cpp"], peer_model=tmp_path / "none.gguf")
    folder = Path(__file__).parent / "data" / "stories260k" / "hf"
    with pytest.raises(UsageError, match="--peer-model"):
        bench(artifact_of(folder), peers=["llama.cpp"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"qigen\[bench\]"):
        bench(stories_artifact(), peers=["llama.cpp"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": 513}, "513 positions"),
        ({"decode": 500, "context": 13}, "513 positions"),
        ({"decode": 0}, "at least one"),
        ({"context": 512}, "at least one"),
        ({"context": -1}, "at least one"),
        ({"repeat": 0}, "at least one"),
        ({"batch": 9}, "--max-batch"),
    ],
)
def test_what_makes_no_sense(stories_artifact: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(stories_artifact(), **options)


def test_errors_of_a_worker_are_ours(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such artifact"):
        Worker("qigen", path=str(tmp_path / "x"), threads=1, pin=False, positions=1, batch=1)
    with pytest.raises(QigenError, match="its process ended: KeyError"):
        Worker("nobody")


class Recorder:
    """A side that notes what it is asked for."""

    vocab, threads, load_s = 50, 1, 0.0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def rewind(self, position: int) -> None:
        self.calls.append(("rewind", position))

    def prefill(self, tokens: Any, sequence: int) -> None:
        self.calls.append(("prefill", len(tokens), sequence))

    def decode(self, tokens: Any) -> None:
        assert tokens.dtype == np.int32 and (tokens < 50).all()
        self.calls.append(("decode", len(tokens)))


def test_requests() -> None:
    side = Recorder()
    assert serve(side, {"do": "prefill", "tokens": 9, "batch": 2, "context": 0})["seconds"] > 0
    assert side.calls == [("rewind", 0), ("prefill", 9, 0)]
    side.calls.clear()
    assert serve(side, {"do": "decode", "tokens": 3, "batch": 2, "context": 5})["seconds"] > 0
    assert side.calls == [
        ("rewind", 0), ("prefill", 5, 0), ("prefill", 5, 1), *[("decode", 2)] * 3
    ]  # fmt: skip
    assert serve(side, {"do": "memory"}) == {"peak_rss_bytes": peak_rss_bytes()}


def test_weights_of_a_gguf(stories_gguf: Path) -> None:
    # The embedding is the output matrix too, so everything is read.
    assert gguf_bytes_read_per_token(stories_gguf) == 4 * 260032


def test_stream_read() -> None:
    # a machine that does other work reads slowly
    assert 0.02 < stream_read_gb_s(1) < 5000
    assert 0.02 < _runtime.stream_read_gb_s(3, (3 << 20) + 5, repeats=1) < 5000
    for threads, size, repeats in (
        (0, 1 << 24, 1),
        (1, 100, 1),
        (1, 1 << 24, 0),
        (2000, 1 << 40, 1),
    ):
        with pytest.raises(UsageError):
            _runtime.stream_read_gb_s(threads, size, repeats)
    with pytest.raises(MemoryError):
        _runtime.stream_read_gb_s(1, 1 << 60)
