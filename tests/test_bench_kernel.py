"""The benchmark of kernels: rows, peers, table, plots."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen import bench_kernel as benchmark
from qigen import targets, toolchain
from qigen.backends.cpu.isa import ISAS
from qigen.bench_kernel_worker import serve
from qigen.errors import ToolchainError, Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.kernel_peers import PEERS, copies, shared_codes, weight
from qigen.kernel_peers import tvm as tvm_peer
from qigen.planner import Product
from qigen.tuning.problem import random_rows, random_x


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``rows(...)`` -> a measurement of plain C++ kernels, which every machine runs."""
    try:
        toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(benchmark, "stream_read_gb_s", lambda threads: 10.0 * threads)

    def measure(*formats: str, **more: object) -> list[dict[str, Any]]:
        arguments = {"isa": ISAS["scalar"], "machine": targets.native(), "tokens": (1, 2),
                     "cached": True, "repeat": 2, **more}  # fmt: skip
        products = [Product(by_name(name), 64, 128, 1) for name in formats]
        return list(benchmark.bench_kernel(products, **arguments))  # type: ignore[arg-type]

    return measure


def test_rows(rows: Any) -> None:
    found = rows("q4_0", threads=(1, 2))
    assert [(r["m"], r["threads"]) for r in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in found:
        assert (row["n"], row["k"], row["weights"], row["activations"]) == (64, 128, "q4_0", "int8")
        assert row["kernel"].startswith("matmul_q4_0_a8__scalar") and row["chosen_by"] == "model"
        assert row["us"] > 0 and row["predicted_us"] > 0 and len(row["runs"]) == 2
        assert row["gb_s"] == pytest.approx(64 * 128 * 18 / 32 / row["us"] / 1e3)
        assert row["gops"] == pytest.approx(2 * 64 * 128 * row["m"] / row["us"] / 1e3)
        assert row["fraction_of_stream"] == pytest.approx(row["gb_s"] / (10 * row["threads"]))
        assert row["fraction_of_roofline"] == pytest.approx(row["roofline_us"] / row["us"])
        assert row["peers"] == {}


def test_weights_from_memory(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth is that of reading the very same weights."""
    monkeypatch.setattr(benchmark, "rotation", lambda machine: 1 << 20)
    (row,) = rows("q4_0", tokens=(1,), cached=False)
    assert not row["cached"] and row["stream_read_gb_s"] > 0.1
    assert row["fraction_of_stream"] == pytest.approx(row["gb_s"] / row["stream_read_gb_s"])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says which pages are huge")
def test_pages(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie on the pages that were asked for, if the system has such."""
    monkeypatch.setattr(benchmark, "rotation", lambda machine: 64 << 20)
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has = switch.exists() and "[never]" not in switch.read_text()
    (small,) = rows("q4_0", tokens=(1,), cached=False)
    (huge,) = rows("q4_0", tokens=(1,), cached=False, pages="huge")
    assert (small["pages"], small["huge_pages"]) == ("small", 0)
    assert huge["pages"] == "huge" and (huge["huge_pages"] > 0.5) == has
    with pytest.raises(UsageError, match="small or huge"):
        rows("q4_0", pages="large")


def test_weights_rotate_beyond_the_last_cache() -> None:
    machine, mib = targets.native(), 1 << 20
    for l3, total in ((0, 0), (32, 128), (64, 256), (96, 256), (272, 408)):
        assert benchmark.rotation(replace(machine, l3_bytes=l3 * mib)) == total * mib


def test_rows_come_as_they_are_measured(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a point is measured before the row of the one before is there."""
    measured = []
    measure = benchmark._Run.measure

    def noted(self: Any, *arguments: Any) -> dict[str, Any]:
        measured.append(self.m)
        return measure(self, *arguments)

    monkeypatch.setattr(benchmark._Run, "measure", noted)
    products = [Product(by_name("q4_0"), 32, 64, 1)]
    found = benchmark.bench_kernel(
        products, isa=ISAS["scalar"], machine=targets.native(), tokens=(1, 2, 3), cached=True,
        repeat=1, jobs=1,
    )  # fmt: skip
    assert next(found)["m"] == 1 and measured == [1]
    assert next(found)["m"] == 2 and measured == [1, 2]
    found.close()  # type: ignore[attr-defined]
    assert measured == [1, 2]


def test_a_tuned_kernel_is_taken(rows: Any) -> None:
    from qigen.tune import tune_products

    tune_products(
        [Product(by_name("q4_0"), 64, 128, 1)], isa=ISAS["scalar"], machine=targets.native(),
        threads=1, buckets=(1,), top=1, seconds=0.01, working_set=1000, jobs=1,
    )  # fmt: skip
    assert [r["chosen_by"] for r in rows("q4_0", threads=(1,))] == ["tuned", "model"]


def test_table_and_plots(rows: Any, tmp_path: Path) -> None:
    found = rows("q4_0", "q8_0", tokens=(1,))
    machine = targets.native()
    found[0]["peers"] = {
        "onnxruntime": {"us": 20.0, "ratio": 2.0, "version": "1.2.3", "setting": "x"}
    }
    found[1]["peers"] = {"onnxruntime": {"unsupported": "no such format"}}
    table = benchmark.markdown(found, benchmark.machine_state(machine))
    assert "onnxruntime 1.2.3" in table and "20.0 (2.00)" in table and "load average" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(Unsupported, match="matplotlib"):
            benchmark.plots(found, tmp_path, machine)
        return
    drawn = benchmark.plots(found, tmp_path / "plots", machine)
    assert [p.stem for p in drawn] == ["roofline", "bits", "bandwidth", "predicted"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


def test_usage() -> None:
    with pytest.raises(Unsupported, match="not known"):
        benchmark.check_peers(["openvino", "abacus"])
    with pytest.raises(UsageError):
        benchmark.bench_kernel([], isa=ISAS["scalar"], machine=targets.native(), repeat=0)


def test_which_formats_are_shared() -> None:
    shared_codes(by_name("q4_0"), (4,), (32,))
    shared_codes(by_name("q8_0"), (8,), (32,))
    for name in ("q4_k", "u4g128", "iq4_nl", "f16", "tq1_0"):
        with pytest.raises(Unsupported, match="nothing like"):
            shared_codes(by_name(name), (2, 4, 8), (32, 128))
    with pytest.raises(Unsupported, match="no 4 bits in groups of 128"):
        shared_codes(by_name("s4g128"), (4,), (32,))


def test_peers_have_our_codes() -> None:
    row = by_name("s4g128")
    codes, scales = weight(row, 40, 256)
    w = ((codes.astype(np.float32) - 8) * scales.astype(np.float32)[..., None]).reshape(40, 256)
    rows_ = random_rows(row, 256).dequantize()
    np.testing.assert_allclose(w, rows_[np.arange(40) % 16], rtol=1e-6)


def test_how_many_weights_a_run_reads() -> None:
    assert copies(1 << 20, 0, 1) == 1
    assert copies(1 << 20, 64 << 20, 1) == 64
    assert copies(1 << 10, 1 << 30, 1) == 512
    assert copies(1 << 20, 1 << 30, 512) == 4


@pytest.mark.parametrize("format", ["s4g128", "q4_0", "q8_0", "q4_k"])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_are_right(peer: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting of an installed peer, without a process of its own."""
    row = PEERS[peer]
    if importlib.util.find_spec(row.module) is None:
        pytest.skip(f"{peer} is not installed")
    monkeypatch.setattr(tvm_peer, "TRIALS", 2)
    measured = 0
    for setting in row.settings:
        try:
            side = row.make(format, 64, 256, 3, 1, 0, **setting)
        except Unsupported as error:
            assert format in str(error) or "groups of" in str(error)
            continue
        except ToolchainError as error:  # a type that llama.cpp does not rearrange
            assert setting == {"repack": True} and "rearranged" in str(error)
            continue
        asked = {"format": format, "n": 64, "k": 256, "m": 3}
        assert serve(side, {"do": "check", **asked})["largest"] < 0.02
        times = serve(side, {"do": "run", "rounds": 2})["us"]
        assert len(times) == 2 and min(times) > 0
        assert side.about["version"] and side.about["setting"]
        measured += 1
    assert measured or (peer, format) not in {
        ("llama.cpp", "q4_0"), ("onnxruntime", "q8_0"), ("tvm", "s4g128"), ("tvm-tuned", "q8_0")
    }  # fmt: skip


def test_a_tvm_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is installed, but broken, is a failed peer and no crash."""
    for name in ("tvm", "tvm.relax"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ToolchainError, match="cannot be used"):
        tvm_peer.Tvm(1)


def test_a_wrong_peer_is_found() -> None:
    class Wrong:
        def run(self) -> int:
            return 1

        def result(self) -> Any:
            return np.zeros((2, 16), np.float32)

    asked = {"do": "check", "format": "q4_0", "n": 16, "k": 64, "m": 2}
    assert serve(Wrong(), asked)["largest"] > 0.05  # type: ignore[arg-type]
    assert random_x(2, 64).shape == (2, 64)


def test_beside_onnxruntime(rows: Any) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    shared, other = (
        rows(name, tokens=(1,), peers=("onnxruntime",))[0]["peers"]["onnxruntime"]
        for name in ("s4g128", "iq4_nl")
    )
    assert shared["us"] > 0 and shared["ratio"] > 0
    assert shared["setting"].startswith("accuracy_level")
    assert "nothing like iq4_nl" in other["unsupported"]
