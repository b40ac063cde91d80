"""Budgets, candidates and their costs, sensitivities, and the choice as a whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qigen.backends.cpu.isa import ISAS
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.mix import Budget, Wishes, choose
from qigen.mix.candidates import CANDIDATES, KEEP, costs, matrices_of, named
from qigen.mix.choose import Problem
from qigen.mix.plan import MatrixPlan, WeightPlan
from qigen.mix.sensitivity import Sensitivity
from qigen.targets import by_name as machine_by_name
from tests.ir.tiny import FAMILIES, build

TINY = replace(FAMILIES["llama"], attn_format="f32", v_format="f32", gate_format="f32",
               up_format="f32", head_format="f32", d=64, ffn=128, layers=3)
HERE = {"isa": ISAS["avx2"], "machine": machine_by_name("x86-64-v3"), "activations": "auto",
        "threads": 1}
NAMES = ("u2g32", "u3g32", "u4g32", "u8g32")


def texts(count=8, length=64, vocab=50):
    rng = np.random.default_rng(0)
    words = rng.integers(0, vocab, (8, 8))
    return words[rng.integers(0, 8, (count, length // 8))].reshape(count, -1).astype(np.int32)


def chosen(budget, sequences=None, method="rtn", candidates=NAMES, **options):
    wishes = Wishes(Budget.parse(budget), method, candidates, **options)
    return choose(build(TINY), wishes, sequences, model="tiny", sha256="0" * 64, **HERE)


@pytest.mark.parametrize(("text", "budget"), [
    ("bits=3.5", Budget(bits=3.5)), ("bytes=80M", Budget(bytes=80_000_000)),
    ("bytes=64MiB", Budget(bytes=64 << 20)), ("bytes=12345", Budget(bytes=12345)),
    ("latency=5ms", Budget(us=5000)), ("latency=.5s", Budget(us=5e5)),
    ("latency=800us, kl=2e-2", Budget(us=800, kl=0.02)), ("error=.5", Budget(error=0.5)),
])  # fmt: skip
def test_budgets(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize(("text", "message"), [
    ("bit=3", "did you mean bits"), ("3.5", "a budget is of bits, bytes"), ("", "a budget is of"),
    ("bits=", "number of bits"), ("bits=3.5%", "number of bits"), ("bits=-1", "number of bits"),
    ("bits=0", "number of bits"), ("latency=5", "with its unit"), ("latency=5min", "with its unit"),
    ("bytes=5X", "a size"), ("kl=0.1nat", "nats a token"), ("bits=3,bits=4", "twice"),
    ("bits=nan", "number of bits"), ("cosine=1.0", "a cosine below 1"), ("error=0", "squared"),
])  # fmt: skip
def test_budgets_that_make_no_sense(text, message):
    with pytest.raises(UsageError, match=message):
        Budget.parse(text)


def test_a_cosine_is_an_error():
    assert Budget.parse("cosine=0.8").error == pytest.approx(0.5625)
    assert Budget.parse("cosine=0.8,error=0.1").error == 0.1
    with pytest.raises(UsageError, match=r"give kl=0\.02"):
        chosen("cosine=0.8", texts())


def test_candidates():
    assert set(CANDIDATES) - {KEEP} == {by_name(c).name for c in CANDIDATES if c != KEEP}
    assert named(("u3*", "keep", "U4G64")) == ("u3g32", "u3g64", "u3g128", KEEP, "u4g64")
    with pytest.raises(Unsupported, match="u5g6"):
        named(("u5g6",))
    with pytest.raises(UsageError, match="no candidate fits x"):
        named(("x*",))


def test_costs_are_those_of_the_layout_and_the_performance_model():
    matrices = matrices_of(build(TINY))
    found = costs(matrices, (*NAMES, KEEP, "nf4g64"), (), **HERE)
    name = next(n for n in matrices if matrices[n].n == 128)
    row = found[name]
    assert row["u2g32"].bytes < row["u4g32"].bytes < row["u8g32"].bytes < row[KEEP].bytes
    assert row[KEEP].bytes == 4 * matrices[name].n * matrices[name].k
    assert all(cost.us > 0 for cost in row.values())
    # a table of floats has kernels that take several times as long as those of the same bits
    assert "nf4g64" not in row
    kept = costs(matrices, NAMES, (name,), **HERE)
    assert list(kept[name]) == [KEEP] and len(kept) == len(found)


def test_measured_times_go_before_predicted_ones():
    matrices = matrices_of(build(TINY))

    def known(products):
        from qigen.planner import BUCKETS, _Search

        search = _Search(list(products), *list(HERE.values())[:4], {})
        picks = search.choose()
        return {(picks[p.key], p.n, p.k, m): 1234.0 for p in products for m in BUCKETS}

    found = costs(matrices, ("u4g32",), (), measured=known, **HERE)
    assert {row["u4g32"].us for row in found.values()} == {1234.0}


def test_a_budget_of_bits_is_kept_and_used():
    choice = chosen("bits=4")
    matrices = matrices_of(build(TINY))
    assert set(choice.plan.matrices) == set(matrices)
    size = sum(m.bits * matrices[n].n * matrices[n].k for n, m in choice.plan.matrices.items())
    weights = sum(m.n * m.k for m in matrices.values())
    assert size / weights == pytest.approx(choice.point.bits, abs=1e-3)
    assert 3.8 < choice.point.bits <= 4
    assert not choice.measured and choice.plan.budget == "bits=4"
    assert len({m.format for m in choice.plan.matrices.values()}) > 1
    # more bits hurt less
    assert chosen("bits=5").point.kl < choice.point.kl < chosen("bits=3.2").point.kl


def test_time_and_bytes_are_budgets_too():
    fast = chosen("bytes=1M").point
    slow = min(p.us for p in chosen("bits=32", curve=True).curve)
    limit = (fast.us + slow) / 2
    choice = chosen(f"latency={limit:.4f}us")
    assert choice.point.us <= limit and choice.point.kl > fast.kl
    both = chosen(f"latency={limit:.4f}us,bits=3.3")
    assert both.point.us <= limit and both.point.bits <= 3.3 and both.point.kl >= choice.point.kl


def test_what_is_measured_orders_the_matrices(tmp_path):
    seen = []

    def run():
        return choose(build(TINY), Wishes(Budget.parse("bits=4"), "gptq", NAMES, curve=True),
                      texts(), model="tiny", sha256="1" * 64, cache=tmp_path,
                      report=lambda stage, done, total: seen.append((stage, done, total)), **HERE)

    first = run()
    assert first.measured and {p["group"] for p in first.probes} >= {"all"}
    assert all(p["kl"] > 0 for p in first.probes)
    whole = [p["kl"] for p in first.probes if p["group"] == "all"]
    assert whole[0] > whole[1]  # 3 bits and 4
    assert ("probes", len(first.probes), len(first.probes)) in seen
    # matrices of layers have feedback, the table of embeddings is looked up in and has none
    methods = {n: m.method for n, m in first.plan.matrices.items()}
    table = next(n for n, m in matrices_of(build(TINY)).items() if m.table)
    assert methods.pop(table) == "clip" and set(methods.values()) == {"gptq"}
    kls = [p.kl for p in first.curve]
    assert kls == sorted(kls, reverse=True) and kls[0] > kls[-1]
    for uniform in first.uniform:  # no single format is better than a mix of its size
        best = min(p.kl for p in first.curve if p.bits <= uniform.bits + 0.3)
        assert best <= uniform.kl * 1.001
    # a second time nothing is measured again
    seen.clear()
    assert run().point == first.point
    assert not any(stage == "probes" for stage, _, _ in seen)


def test_time_is_least_under_a_bound_of_the_divergence(tmp_path):
    def run(budget):
        return choose(build(TINY), Wishes(Budget.parse(budget), "rtn", NAMES), texts(),
                      model="tiny", sha256="1" * 64, cache=tmp_path, **HERE).point

    best = run("bits=32")
    loose, tight = run(f"kl={best.kl * 100}"), run(f"kl={best.kl * 4}")
    assert loose.kl <= best.kl * 100 and tight.kl <= best.kl * 4
    assert loose.us < tight.us <= best.us
    with pytest.raises(UsageError, match=r"no mix .* kl=kl=|no mix .* the least .* kl="):
        run(f"kl={best.kl / 100}")


@pytest.mark.parametrize(("budget", "message"), [
    ("bits=1", r"no mix of the candidates keeps the budget bits=1; the least that there is is "
               r"bits=3\.0"),
    ("bytes=10", "the least that there is is"), ("latency=1us,bits=2", "each of them alone"),
    ("kl=0.1", "give a --calibration text"),
])  # fmt: skip
def test_budgets_that_cannot_be_met(budget, message):
    with pytest.raises(UsageError, match=message):
        chosen(budget)


def test_no_budget_and_little_text():
    with pytest.raises(Unsupported, match="take rtn, clip or gptq"):
        chosen("bits=4", method="hadamard+clip")
    with pytest.raises(UsageError, match="needs a --budget"):
        choose(build(TINY), Wishes(Budget(), "rtn"), None, model="", sha256="", **HERE)
    with pytest.raises(BadInput, match="128 tokens of calibration are too few"):
        chosen("bits=4", texts(2))
    with pytest.raises(UsageError, match="no matrix is called nothing"):
        chosen("bits=4", keep=("nothing*",))


@pytest.mark.parametrize("sequences", [None, texts()], ids=("plain", "calibrated"))
def test_what_is_kept_costs_and_hurts_nothing(sequences):
    names = list(matrices_of(build(TINY)))
    choice = chosen("bits=20", sequences, keep=(names[1], "l2.*"))
    assert choice.plan.matrices[names[1]].format == KEEP
    assert choice.plan.matrices[names[1]].kl == 0 and choice.plan.matrices[names[1]].bits == 32
    # and is not measured
    assert all(p["matrices"] == sum(not n.startswith("l2.") and n != names[1] for n in names)
               for p in choice.probes if p["group"] == "all")


def test_the_sum_that_has_a_divergence():
    s = Sensitivity({}, {}, gain=2.0, power=1.5, measured=True)
    assert s.divergence(s.total(0.3)) == pytest.approx(0.3) and s.divergence(0.0) == 0.0


def plan():
    return WeightPlan("tiny", "ab", {"a": MatrixPlan("u3g64", "gptq:order=act", 3.5, 1.25, 1e-6),
                                     'b "x"': MatrixPlan("keep", bits=32.0)}, "bits=4",
                      {"bits": 4.0, "kl": 1e-7}, "so")  # fmt: skip


def test_a_plan_comes_back_from_its_file(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(plan().to_toml(), encoding="utf-8")
    assert WeightPlan.read(file) == plan()


@pytest.mark.parametrize(("old", "new", "message"), [
    ("u3g64", "u3g65", "a: .*u3g65"), ("gptq:", "gtpq:", "did you mean gptq"),
    ('format = "keep"', 'fromat = "keep"', "a matrix has a format"),
    ('format = "keep"', 'format = "keep", bit = 2', "did you mean bits"),
    ("us = 1.25", 'us = "slow"', "us cannot be 'slow'"),
    ("version = 1", "version = 9", "version 1"),
    ("[matrices]", "[[matrices]]", "no plan|TOML"), ("budget", "budget budget", "TOML"),
    ('"u3g64"', '"q4_k"', "cannot bring"),
])  # fmt: skip
def test_plans_that_were_edited_badly(tmp_path, old, new, message):
    file = tmp_path / "plan.toml"
    file.write_text(plan().to_toml().replace(old, new), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        WeightPlan.read(file)
    with pytest.raises(BadInput, match="cannot be read"):
        WeightPlan.read(tmp_path / "none.toml")


def test_plans_for_other_models():
    matrices = matrices_of(build(TINY))
    good = chosen("bits=4").plan
    good.check(matrices, "tiny", "0" * 64, "p", False)
    with pytest.raises(BadInput, match="another model, tiny, not other"):
        good.check(matrices, "other", "1" * 64, "p", False)
    unnamed = replace(good, sha256="")
    unnamed.check(matrices, "other", "1" * 64, "p", False)
    name = next(iter(matrices))
    with pytest.raises(BadInput, match=f"no matrix {name}z; did you mean {name}"):
        replace(unnamed, matrices={**good.matrices, name + "z": MatrixPlan("keep")}).check(
            matrices, "", "", "p", False)
    with pytest.raises(BadInput, match=f"says nothing of {name}"):
        replace(unnamed, matrices={n: m for n, m in good.matrices.items() if n != name}).check(
            matrices, "", "", "p", False)
    with pytest.raises(UsageError, match="give --calibration"):
        replace(unnamed, matrices={**good.matrices, name: MatrixPlan("u4g32", "gptq")}).check(
            matrices, "", "", "p", False)


def test_hurt_is_never_rounded_below():
    matrices = matrices_of(build(TINY))
    priced = costs(matrices, NAMES, (), **HERE)
    errors = {n: {c: 2.0**-i for i, c in enumerate(NAMES)} for n in matrices}
    problem = Problem(matrices, priced, Sensitivity(errors, dict.fromkeys(matrices, 1.0)))
    assert problem.solve(Budget(bits=3.03)) == dict.fromkeys(matrices, "u2g32")
