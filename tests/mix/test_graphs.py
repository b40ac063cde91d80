"""Formats for the matrices of ONNX graphs: costs, what is measured, the choice, its use."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qigen
from qigen.backends.cpu.isa import ISAS
from qigen.codegen.reference import evaluate
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.ir.graph import Graph
from qigen.mix import Budget, Choice, Wishes, choose_graph
from qigen.mix.candidates import KEEP, costs
from qigen.mix.graphs import _Kept, matrices_of_graph
from qigen.mix.plan import WeightPlan
from qigen.passes.tensor import before_products
from qigen.targets import by_name as machine_by_name
from tests.passes.test_tensor import cnn, imported

WIDTH = 64
NAMES = ("u2g32", "u3g32", "u4g32", "u8g32")
HERE: dict[str, Any] = {"isa": ISAS["avx2"], "machine": machine_by_name("x86-64-v3"), "threads": 1}


def branches(weights: tuple[float, float] = (10.0, 0.1)) -> onnx.ModelProto:
    """x [B, T, 64] -> y, the weighted sum of two branches of two products each, and z, the
    second."""
    rng, helper, floats = np.random.default_rng(0), onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants = [], []
    for i, scale in enumerate(weights):
        for j, (n, k) in enumerate(((96, WIDTH), (WIDTH, 96))):
            w = (rng.standard_normal((k, n)) / k**0.5).astype(np.float32)
            constants.append(onnx.numpy_helper.from_array(w, f"w{i}{j}"))
        constants.append(onnx.numpy_helper.from_array(np.float32(scale), f"s{i}"))
        nodes += [helper.make_node("MatMul", ["x", f"w{i}0"], [f"a{i}"]),
                  helper.make_node("Relu", [f"a{i}"], [f"r{i}"]),
                  helper.make_node("MatMul", [f"r{i}", f"w{i}1"], [f"b{i}"]),
                  helper.make_node("Mul", [f"b{i}", f"s{i}"], ["z" if i else "c0"])]
    nodes.append(helper.make_node("Add", ["c0", "z"], ["y"]))
    info = helper.make_tensor_value_info
    shape = ["B", "T", WIDTH]
    graph = helper.make_graph(nodes, "branches", [info("x", floats, shape)],
                              [info("y", floats, shape), info("z", floats, shape)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def samples(count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(7).standard_normal((16, WIDTH))
    return [{"x": (rng.standard_normal((2, 12, 16)) @ common).astype(np.float32)}
            for _ in range(count)]


def chosen(budget: str, given: list[dict[str, Any]] | None = None, method: str = "rtn",
           model: onnx.ModelProto | None = None, **options: Any) -> Choice:
    wishes = Wishes(Budget.parse(budget), method, options.pop("candidates", NAMES), **options)
    graph = imported(model or branches())
    return choose_graph(graph, wishes, samples() if given is None else given, model="m",
                        sha256="0" * 64, memory=1 << 30, **HERE)


def formats(choice: Choice) -> dict[str, str]:
    return {name: m.format for name, m in choice.plan.matrices.items()}


def bits(choice: Choice, *names: str) -> float:
    return sum(choice.plan.matrices[name].bits for name in names)


def test_matrices_and_what_they_cost() -> None:
    graph = before_products(imported(branches()))
    found = matrices_of_graph(graph, samples()[0])
    assert {n: (m.n, m.k, m.uses, m.rows) for n, m in found.items()} == {
        "w00": (96, 64, 1, 24), "w01": (64, 96, 1, 24),
        "w10": (96, 64, 1, 24), "w11": (64, 96, 1, 24)}
    assert {m.rows for m in matrices_of_graph(graph, {}).values()} == {64}
    kept = _Kept(found, *HERE.values())
    row = costs(found, (*NAMES, KEEP), (), activations="f32", own=kept, **HERE)["w00"]
    assert row["u2g32"].bytes < row["u8g32"].bytes < row[KEEP].bytes == 4 * 96 * 64
    one = costs(matrices_of_graph(graph, {"x": np.zeros((1, 1, WIDTH), np.float32)}),
                (*NAMES, KEEP), (), activations="f32", own=kept, **HERE)["w00"]
    assert all(one[c].us < row[c].us for c in row)  # more rows take longer


@pytest.mark.parametrize(("output", "more", "fewer"), [("y", 0, 1), ("z", 1, 0)])
def test_what_counts_for_the_expected_outputs_gets_the_bits(output: str, more: int, fewer: int
                                                            ) -> None:
    """y is mostly the first branch, z the second alone."""
    given = samples()
    for sample in given:
        sample[output] = evaluate(imported(branches()), sample)[output]
    choice = chosen("bits=5", given)
    assert choice.measured and choice.measure == "error"
    assert bits(choice, f"w{more}0", f"w{more}1") > bits(choice, f"w{fewer}0", f"w{fewer}1")
    assert 4.4 < choice.point.bits <= 5 and "error" in choice.plan.expected
    assert {p["group"] for p in choice.probes} >= {"96x64 0", "64x96 3", "all"}
    given[0][output] = given[0][output][:1]
    with pytest.raises(BadInput, match=f"expected output {output}"):
        chosen("bits=5", given)


def test_the_choice_is_the_best_of_all() -> None:
    choice = chosen("bits=5", curve=True)
    # every mix by its bits and by its share of the error, as the plan says it for single choices
    graph = before_products(imported(branches()))
    matrices = matrices_of_graph(graph, samples()[0])
    from qigen.mix.choose import Problem
    from qigen.mix.graphs import _groups, _Trial
    from qigen.mix.sensitivity import fitted
    from qigen.quantize.model import Store

    priced = costs(matrices, NAMES, (), activations="f32", own=_Kept(matrices, *HERE.values()),
                   **HERE)
    trial = _Trial(graph, matrices, samples(), 1 << 30)
    errors = trial.errors(priced, "rtn", lambda *_: None)
    sensitivity = fitted(matrices, errors, _groups(matrices), trial.measure, Store(None),
                         lambda *_: None, "error")
    problem = Problem(matrices, priced, sensitivity)
    every = [problem.point(dict(zip(matrices, picks, strict=True)))
             for picks in itertools.product(*(priced[n] for n in matrices))]
    best = min(p.kl for p in every if p.bits <= 5)
    assert choice.point.kl == pytest.approx(best, rel=1e-6)
    limit = 3 * best
    fastest = min(p.us for p in every if p.kl <= limit)
    assert chosen(f"error={limit}").point.us == pytest.approx(fastest, abs=1e-3)
    kls = [p.kl for p in choice.curve]
    assert kls == sorted(kls, reverse=True) and len(choice.uniform) == len(NAMES)


def test_the_expected_error_is_about_what_is_got(run: Any, tmp_path: Path) -> None:
    onnx.save(branches((1.0, 1.0)), tmp_path / "m.onnx")
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, sample in enumerate(samples(8)):
        np.savez(folder / f"{i}.npz", **sample)
    code, out, err = run("compile", tmp_path / "m.onnx", "-o", tmp_path / "m.qgn", "--weights",
                         "auto", "--budget", "bits=5", "--candidates", ",".join(NAMES),
                         "--calibration", folder, "--explain")
    assert (code, err) == (0, "")
    assert "mix for bits=5" in out and "expected error of the outputs" in out and "cosine 0." in out
    assert "u3g32" in out and "a run" in out
    plan = WeightPlan.read(tmp_path / "m.plan.toml")
    (sample,) = samples(1, seed=99)
    wanted = evaluate(imported(branches((1.0, 1.0))), sample)
    got = qigen.load(tmp_path / "m.qgn", threads=1).run(sample)
    error = np.mean([np.square(got[n] - wanted[n]).sum() / np.square(wanted[n]).sum()
                     for n in wanted])
    assert 0.4 < error / plan.expected["error"] < 2.5
    manifest = json.loads((tmp_path / "m.qgn" / "manifest.json").read_text())
    held = {t["format"] for t in manifest["tensors"] if "layout" in t}
    assert held == {m.format for m in plan.matrices.values()}
    assert {m.method for m in plan.matrices.values()} == {"gptq"}
    assert manifest["mix"]["measure"] == "error" and manifest["mix"]["curve"]


def test_a_mix_of_methods_and_kept_matrices(tmp_path: Path) -> None:
    onnx.save(branches(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", **samples(1)[0])
    plan = tmp_path / "p.toml"
    plan.write_text("version = 1\n[matrices]\n"
                    'w00 = { format = "u4g32", method = "gptq:order=act" }\n'
                    'w01 = { format = "keep" }\nw10 = { format = "s3g32", method = "rtn" }\n'
                    'w11 = { format = "u3g32", method = "clip" }\n')
    with pytest.raises(UsageError, match="method gptq:order=act for w00, which needs calibration"):
        qigen.compile(tmp_path / "m.onnx", tmp_path / "m.qgn", plan=plan)
    made = qigen.compile(tmp_path / "m.onnx", tmp_path / "m.qgn", plan=plan,
                         calibration=tmp_path / "s.npz")
    done = {r["matrix"]: (r["format"], r["method"]) for r in made.manifest["quantization"]}
    assert done == {"w00": ("u4g32", "gptq"), "w11": ("u3g32", "clip")}  # rtn has no report
    held = {t["format"] for t in made.manifest["tensors"] if "layout" in t}
    assert held == {"u4g32", "s3g32", "u3g32"}
    (sample,) = samples(1, seed=99)
    (wanted, _), (got, _) = (list(r.values()) for r in (
        evaluate(imported(branches()), sample), qigen.load(made.path, threads=1).run(sample)))
    assert np.square(got - wanted).sum() < 0.02 * np.square(wanted).sum()


@pytest.mark.parametrize(("options", "code", "message"), [
    ("--weights auto", 2, "needs a --budget"),
    ("--weights auto --budget bits=1", 2, "the least that there is is bits=3"),
    ("--weights auto --budget cosine=0.99", 2, "give a --calibration file"),
    ("--weights auto --budget cosine=1", 2, "a cosine below 1"),
    ("--weights auto --budget kl=0.1", 2, "cosine=0.99"),
    ("--weights auto --budget error=1e-9 --calibration SAMPLES", 2, "the least .* error="),
    ("--weights auto --budget bits=4 --activations int8", 4, "leave --activations int8 out"),
    ("--weights auto --budget bits=4 --method hadamard+gptq", 4, "take rtn, clip or gptq"),
    ("--weights auto --budget bits=4 --keep v*", 2, "no matrix is called v"),
    ("--budget bits=4", 2, "also give that"),
    ("--plan OTHER", 3, "another model"),
    ("--plan OTHER --weights u4g32", 2, "leave --weights"),
])  # fmt: skip
def test_wrong_use(run: Any, tmp_path: Path, options: str, code: int, message: str) -> None:
    import re

    onnx.save(branches(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", **samples(1)[0])
    other = tmp_path / "other.toml"
    other.write_text(chosen("bits=5").plan.to_toml())
    words = {"OTHER": other, "SAMPLES": tmp_path / "s.npz"}
    extra = [] if "plan" in options else ["--candidates", ",".join(NAMES)]
    extra = extra if "auto" in options else []
    out = tmp_path / "x.qgn"
    got, _, err = run("compile", tmp_path / "m.onnx", "-o", out, *extra,
                      *(words.get(word, word) for word in options.split()))
    assert (got, bool(re.search(message, err))) == (code, True), err
    assert not out.exists()


def test_graphs_without_products() -> None:
    with pytest.raises(Unsupported, match="no matrix products"):
        convolutions: Graph = imported(cnn())
        for node in [n for n in convolutions.nodes if n.op in ("onnx.MatMul", "onnx.Gemm")]:
            convolutions.nodes.remove(node)
        choose_graph(convolutions, Wishes(Budget(bits=4), "rtn"), [], model="m", sha256="",
                     memory=1 << 30, **HERE)
