"""Tuning of graphs: products and convolutions are measured and verified, remembered, taken."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import qigen
from qigen import targets, toolchain
from qigen.backends.cpu.gemm import PER, Tiles, tiles_for
from qigen.backends.cpu.isa import ISAS
from qigen.costmodel.gemm import GemmShape, choose_tiles
from qigen.errors import QigenError, ToolchainError
from qigen.graph_tiles import GemmCalls, GraphCalls
from qigen.planner import isa_candidates
from qigen.tune_graph import remembered_graph, tile_candidates, tune_graph
from qigen.tuning import Bench, Database, database
from qigen.tuning.database import (
    gemm_from_json,
    gemm_key,
    gemm_spec,
    gemm_to_json,
    read_export,
    shape_from_json,
)
from qigen.tuning.problem import GemmProblem
from tests.frontends.tiny_onnx import model
from tests.tuning.test_measure import CRASHES, WRONG, sabotaged

PRODUCT = GemmShape(40, 24, 1, 19, 1, 1, 96)


def convolution(channels: int, width: int) -> GemmShape:
    """3x3, stride 2 across, dilation 2 down, two images with a border; ``width`` bytes of an
    element."""
    pixel = channels * width
    row = 17 * pixel
    taps = tuple(2 * i * row + j * pixel for i in range(3) for j in range(3))
    return GemmShape(21, channels, 9, 8, 5, 2, 2 * pixel, row, 9 * row, taps)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    try:
        compiler = toolchain.find_compiler()
    except ToolchainError:
        pytest.skip("no C++ compiler")
    with Bench(compiler, 1) as opened:
        yield opened


@pytest.mark.parametrize("arithmetic", PER)
def test_generated_kernels_are_right(bench: Bench, arithmetic: str) -> None:
    """On the best instructions of this machine, with two tilings, a product and a convolution."""
    isa = isa_candidates(targets.native())[0]
    own = tiles_for(isa, arithmetic)
    other = own if own.matrix else Tiles(max(1, own.pixels - 1), 1, 1, 1 << 16)
    specs = list(dict.fromkeys(gemm_spec(isa, arithmetic, tiles) for tiles in (own, other)))
    libraries = bench.build(specs)
    width = 4 // PER[arithmetic]
    for shape in (PRODUCT, convolution(8, width)):
        problems = {spec: GemmProblem(spec, shape) for spec in specs}
        outcomes = bench.compete(libraries, problems, 2, 0, 0.01)
        assert [(o.spec, o.status, o.message) for o in outcomes] == [(s, "ok", "") for s in specs]
        assert all(o.us > 0 for o in outcomes)


def test_a_wrong_sum_is_found() -> None:
    from qigen.tuning.problem import wrong

    problem = GemmProblem(gemm_spec(ISAS["scalar"], "u8s8", Tiles(2, 1, 0, 1 << 17)), PRODUCT)
    _, y, bound = problem.build()
    exact = y[:, np.arange(PRODUCT.n) % 16].astype(np.int32)
    assert exact.shape == (19, 40) and wrong(exact, y, bound) == ""
    exact[18, 39] += 1
    assert "1 of 760" in wrong(exact, y, bound)


def test_calls_are_data() -> None:
    spec = gemm_spec(ISAS["avx2"], "f32", Tiles(4, 1, 2, 1 << 16))
    shape = convolution(8, 4)
    assert gemm_from_json(json.loads(json.dumps(gemm_to_json(spec, shape)))) == (spec, shape)
    plain = dataclasses.replace(shape, row=0, image=0, offsets=())
    assert len({gemm_key("k", s) for s in (shape, plain, PRODUCT)}) == 3
    assert plain.image_bytes == 5 * 8 * plain.pixel and len(plain.tap_offsets("f32")) == 9
    for change in ({"taps": 2}, {"n": 0}, {"more": 1}, {"k": "4"}, {"offsets": [-1] * 9}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            shape_from_json(dataclasses.asdict(shape) | change)


CALLS = GraphCalls(
    (GemmCalls("f32_f32__scalar", "f32", (PRODUCT, PRODUCT)),), (), "f32"
)
MACHINE, SCALAR = targets.native(), ISAS["scalar"]
OWN, OTHER = tiles_for(SCALAR, "f32"), Tiles(1, 1, 0, 1 << 16)


@pytest.fixture
def two_tilings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plain C++ has two tilings to measure, and a database of its own."""
    monkeypatch.setattr("qigen.costmodel.gemm.candidates", lambda isa, arithmetic: (OWN, OTHER))
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("qigen.tuning.measure._AT_LEAST", 1)
    monkeypatch.setattr("qigen.tuning.measure._AT_MOST", 1)


def tune(**more: object) -> tuple[Any, list[Any]]:
    arguments = {"isa": SCALAR, "machine": MACHINE, "threads": 1, "seconds": 0.01, "jobs": 1}
    return tune_graph(CALLS, **{**arguments, **more})  # type: ignore[arg-type]


def test_what_is_known_is_not_measured_again(bench: Bench, two_tilings: None) -> None:
    measured, rows = tune()
    assert [(r.m, r.measured, r.failures) for r in rows] == [(19, 2, ())], "one call, used twice"
    assert set(measured.tiles) == {("f32", OWN, PRODUCT), ("f32", OTHER, PRODUCT)}
    again, rows = tune()
    assert rows[0].measured == 0 and again == measured
    assert tune(again=True)[1][0].measured == 2
    assert tune(threads=2)[1][0].measured == 2  # another key
    found, note = remembered_graph(CALLS, isa=SCALAR, machine=MACHINE, threads=2)
    assert set(found.tiles) == set(measured.tiles) and note == ""
    with Database() as data:
        data.add(dataclasses.replace(e, compiler="another") for e in data.entries(threads=2))
    assert tune(threads=2)[1][0].measured == 0, "the entries of our compiler are still there"


@pytest.mark.parametrize(("change", "status"), [(CRASHES, "crash"), (WRONG, "wrong")])
def test_failures_are_remembered_and_never_chosen(
    bench: Bench, two_tilings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, str], status: str,
) -> None:  # fmt: skip
    build = Bench.build
    head, statement = change
    statement = statement.replace("a.y[0]", "static_cast<float*>(a.out.y)[0]")

    def bad(self: Bench, specs: Any, done: Any = None) -> Any:
        found = build(self, specs, done)
        for spec in [s for s in found if s.tiles == OTHER]:
            found[spec] = sabotaged(
                found[spec], tmp_path, (head, statement), "gemm.h", "GemmArgs")
        return found

    monkeypatch.setattr(Bench, "build", bad)
    for measured in (2, 0):
        found, rows = tune()
        assert rows[0].measured == measured and status in rows[0].failures[0]
        assert found.tiles["f32", OTHER, PRODUCT] == math.inf
        choice = choose_tiles("f32", [PRODUCT], SCALAR, 1, MACHINE, True, found.tiles)
        assert choice.tiles == OWN and choice.measured


def test_measured_times_choose() -> None:
    """All calls count, what failed does not, and less than the noise changes nothing."""
    machine, isa = targets.by_name("znver3"), ISAS["avx2"]
    own, other, third = tiles_for(isa, "f32"), Tiles(3, 2, 1, 1 << 17), Tiles(2, 1, 1, 1 << 17)
    second = dataclasses.replace(PRODUCT, n=80)

    def chosen(*times: tuple[Tiles, float, float]) -> Any:
        measured = {("f32", t, s): us for t, *both in times
                    for s, us in zip((PRODUCT, second), both, strict=True)}  # fmt: skip
        return choose_tiles("f32", [PRODUCT, second], isa, 2, machine, True, measured)

    choice = chosen((own, 5, 5), (other, 9, 2), (third, 2, 7))
    assert choice.tiles == third and choice.measured and (choice.us, choice.rule_us) == (9, 10)
    assert choice.runners_up == ((own, 10), (other, 11)) and choice.predicted_us > 0
    assert chosen((own, 5, 5), (other, 5, 4.95)).tiles == own
    assert chosen((own, 5, 5), (other, math.inf, 1)).tiles == own
    failed = chosen((own, math.inf, math.inf), (other, 9, 9))
    assert failed.tiles == other and failed.measured
    unknown = chosen((other, 1, 1))  # the rule's own was not measured: predictions count
    assert not unknown.measured
    with pytest.raises(QigenError, match="no kernel for f32"):
        choose_tiles("f32", [PRODUCT], SCALAR, 1, machine, True, {
            ("f32", tiles_for(SCALAR, "f32"), PRODUCT): math.inf})  # fmt: skip


def test_candidates() -> None:
    isa, machine = ISAS["avx512vnni"], targets.by_name("icelake-server")
    calls = GemmCalls("", "f32", (PRODUCT,))
    eight = tile_candidates(calls, isa, machine, 2, True, 8)
    assert eight[0] == tiles_for(isa, "f32") and len(set(eight)) == 8
    assert len({(t.pixels, t.blocks) for t in eight}) >= 6
    assert set(eight) < set(tile_candidates(calls, isa, machine, 2, True, None))
    assert tile_candidates(calls, isa, machine, 2, True, 1) == eight[:1]


# ---- commands ----


@pytest.fixture
def product(tmp_path: Path) -> Path:
    info = helper.make_tensor_value_info
    w = np.random.default_rng(0).standard_normal((32, 48), np.float32)
    made = onnx.ModelProto()
    made.CopyFrom(
        model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [info("x", onnx.TensorProto.FLOAT, ["n", 32])],
            [info("y", onnx.TensorProto.FLOAT, ["n", 48])],
        )
    )
    made.graph.initializer.append(numpy_helper.from_array(w, "w"))
    onnx.save(made, tmp_path / "p.onnx")
    return tmp_path / "p.onnx"


def test_compile_and_tune(
    bench: Bench, two_tilings: None, run: Any, product: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured times are in the manifest and remembered: by a later compilation, by `tune` of the
    file and of the artifact; they come along with an export."""
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "p.qgn"
    sized = ("--shape", "x=..9x32", "--isa", "scalar")
    code, _, err = run("compile", product, "-o", out, *sized, "--tune", "measure")
    assert (code, err) == (0, "")
    (first,) = qigen.Artifact(out).manifest["plan"]["tiles"]
    assert first["measured_us"] > 0 and first["predicted_us"] > 0
    assert json.loads((out / "tuned.json").read_text())["threads"] >= 1
    for file in (product, out):
        more = sized if file == product else sized[2:]
        code, text, err = run("tune", file, *more, "--json")
        found = json.loads(text)
        assert (code, err) == (0, "") and [r["measured"] for r in found["kernels"]] == [0]
        assert (found["kernels"][0]["m"], found["kernels"][0]["k"]) == (9, 32)
        assert (found["model"] is None) == (file == product)
    code, text, _ = run("tune", out, "--isa", "scalar")
    assert code == 0 and "runs/s" in text and "channels" not in text and "tiles=" in text
    code, text, err = run("compile", product, "-o", out, *sized, "--explain")
    assert (code, err) == (0, "") and "measured" in text
    assert qigen.Artifact(out).manifest["plan"]["tiles"][0] == first
    run("compile", product, "-o", out, *sized, "--tune", "off")
    assert qigen.Artifact(out).manifest["plan"]["tiles"][0]["measured_us"] is None

    entries = [e for e in read_export(exported(run, tmp_path)) if e.spec.get("family")]
    assert {e.m for e in entries} == {9} and all(e.k == 32 for e in entries)
    code, _, err = run("tune", product, "--m", "1")
    assert code == 2 and "--m" in err
    code, _, err = run("tune", product, "--shape", "64x64")
    assert code == 2


def exported(run: Any, folder: Path) -> Path:
    file = folder / "shared.json"
    assert run("tune", "export", file)[0] == 0
    with Database(folder / "other.sqlite") as data:
        assert data.import_(file)[0] > 0
        assert data.export_defaults(folder / "d.json", database.machine_key(MACHINE)) > 0
    return file


def test_a_damaged_entry(two_tilings: None, tmp_path: Path) -> None:
    spec = gemm_spec(SCALAR, "f32", OWN)
    good = gemm_to_json(spec, PRODUCT)
    for change in ({"arithmetic": "f8"}, {"tiles": {"pixels": 1}}, {"shape": {}}, {"isa": "z80"}):
        with pytest.raises(ValueError, match="kernel is unknown"):
            database.checked(
                {"machine": "m", "compiler": "c", "kernel": "k", "n": 1, "k": 1, "m": 1,
                 "threads": 1, "home": "cache", "spec": good | change, "status": "ok", "us": 1.0,
                 "spread": 0.0, "runs": 1, "date": "", "about": ""}
            )  # fmt: skip
