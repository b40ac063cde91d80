"""The planner: one kernel a weight, what kernels must share, measured times before predicted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.costmodel import schedules, space
from qigen.errors import BadInput, UsageError
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.ir.graph import Graph
from qigen.ir.plan import KernelChoice, Plan
from qigen.passes.pipeline import optimize
from qigen.planner import (
    BUCKETS,
    activations_for,
    explain,
    isa_candidates,
    plan_model,
    products,
    schedule_of,
    spec_for,
    tuning_candidates,
)
from qigen.targets import by_name as machine_by_name
from qigen.targets import rows

ICELAKE = machine_by_name("icelake-server")
VNNI = ISAS["avx512vnni"]


def weight(format: str, n: int, k: int) -> QuantizedTensor:
    """A weight of zeros: the planner only looks at formats and shapes."""
    row = by_name(format)
    nblocks = -(-k // row.block)
    fields = {f.name: np.zeros((n, nblocks, f.count), f.dtype) for f in row.fields}
    return QuantizedTensor(row, (n, k), fields)


def model(first: str = "q4_0", second: str = "q6_k", d: int = 512, hidden: int = 1536) -> Graph:
    """Two gated layers between an embedding and tied logits, after the passes."""
    g = Graph("tiny")
    ids = g.add_input("input_ids", ("T",), "i32")
    wanted = g.add_input("rows", ("R",), "i32")
    table = g.add_constant("embedding", weight("q8_0", 4096, d))
    x = g.add("Embedding", ids, table, scale=1.0)
    for layer in range(2):
        h = g.add("RMSNorm", x, g.add_constant(f"{layer}.norm", np.ones(d, np.float32)), eps=1e-5)
        gate = g.add("MatMul", h, g.add_constant(f"{layer}.gate", weight(first, hidden, d)))
        up = g.add("MatMul", h, g.add_constant(f"{layer}.up", weight(first, hidden, d)))
        h = g.add("GatedAct", gate, up, kind="silu")
        h = g.add("MatMul", h, g.add_constant(f"{layer}.down", weight(second, d, hidden)))
        x = g.add("Add", x, h)
    last = g.add("SelectRows", x, wanted)
    logits = g.add("MatMul", last, table)
    g.outputs.append(logits)
    return optimize(g)


def plan(graph: Graph | None = None, **more: object) -> Plan:
    arguments = {"isa": VNNI, "machine": ICELAKE, "threads": 2, **more}
    return plan_model(graph or model(), **arguments)  # type: ignore[arg-type]


def test_products_are_counted() -> None:
    assert [(p.format.name, p.n, p.k, p.uses) for p in products(model())] == [
        ("q8_0", 4096, 512, 1), ("q4_0", 1536, 512, 4), ("q6_k", 512, 1536, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_every_weight_has_a_kernel(isa: str) -> None:
    machine = machine_by_name("znver4")
    result = plan(isa=ISAS[isa], machine=machine)
    assert result.target == "znver4" and result.isa == isa
    for p in products(model()):
        assert result.buckets("matmul", *p.key) == BUCKETS
        spec = spec_for(result, *p.key)
        assert spec.activations == "int8" and spec.isa.name == isa
        assert p.k % (spec.layout.blocks * spec.format.block) == 0
    assert all(c.predicted_us > 0 and c.predicted_instructions > 0 for c in result.kernels)
    assert Plan.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_int8_kernels_share_their_tiles() -> None:
    """All kernels of a step read the same records of activations, interleaved by tiles."""
    tiles = {c.schedule["tiles"] for c in plan(model("q4_k", "q3_k")).kernels}
    assert len(tiles) == 1
    assert str(tiles.pop()).endswith(",1")


def test_kernels_have_names_of_their_own() -> None:
    result = plan(model("q4_0", "q4_0"))
    specs: dict[str, set[MatmulSpec]] = {}
    for c in result.kernels:
        specs.setdefault(c.name, set()).add(spec_for(result, c.format, c.n, c.k))
    assert all(len(found) == 1 for found in specs.values())


def test_choices_are_explained() -> None:
    result = plan()
    table = explain(result)
    assert len(table) == len(result.kernels) == 3 * len(BUCKETS)
    for row in table:
        assert row["us"] > 0 and row["gops"] > 0 and row["bound"] in row["reason"]
        assert row["runners_up"]
    for c in result.kernels:
        busiest = max(c.resources, key=lambda r: r.us)
        assert busiest.name.split()[0] == c.bound and 0 < busiest.us <= c.predicted_us
        assert {"memory", "l3", "l2"} & {r.name for r in c.resources if r.kind == "bytes"}
        assert {"dot", "load", "issue"} <= {
            r.name for r in c.resources if r.kind == "instructions" and r.amount > 0
        }
        for a in c.runners_up:
            slower = a.predicted_us > c.predicted_us * 1.001
            assert a.reason and ("slower" in a.reason or not slower)
    choice = result.find("matmul", "q4_0", 1536, 512, 16)
    others = [a.predicted_us for a in choice.runners_up]
    assert others == sorted(others)
    assert schedule_of(spec_for(result, "q4_0", 1536, 512)) not in [
        a.schedule for a in choice.runners_up
    ]


def test_the_choice_is_close_to_the_best() -> None:
    """One list of tiles serves all numbers of tokens: none may lose much."""
    for c in plan().kernels:
        assert c.predicted_us <= 1.25 * min(a.predicted_us for a in c.runners_up), c.name


def test_activations() -> None:
    q4, f16 = by_name("q4_0"), by_name("f16")
    assert activations_for(q4, "auto") == "int8" and activations_for(f16, "auto") == "f32"
    assert activations_for(f16, "int8") == "f32" and activations_for(f16, "bf16") == "bf16"
    assert activations_for(q4, "int8-token") == "int8-token"
    with pytest.raises(UsageError, match="int3"):
        activations_for(q4, "int3")
    floats = plan(model("f16", "f16"), activations="f32")
    assert {c.schedule["activations"] for c in floats.kernels} == {"f32"}


def test_tokens_of_a_step() -> None:
    automatic = plan().max_tokens
    assert 16 <= automatic <= 512
    small = plan(machine=replace(ICELAKE, l2_bytes=64 << 10))
    assert small.max_tokens < automatic
    assert plan(max_tokens=24).max_tokens == 24
    assert plan(max_tokens=4, max_batch=8).max_tokens == 8
    assert plan(max_seq=10).max_tokens == 10
    assert plan(max_batch=20, max_seq=10).max_tokens == 20  # one token of each of 20 sessions
    for limit in ("threads", "max_batch"):
        with pytest.raises(UsageError):
            plan(**{limit: 0})


def test_measured_times_win() -> None:
    graph = model()
    first = plan(graph)
    key = ("q4_0", 1536, 512)
    chosen = spec_for(first, *key)
    slow = {
        (s, 1536, 512, m): 1000.0 * m if s.tiles == chosen.tiles else 10.0 * m
        for s in schedules(by_name("q4_0"), 512, VNNI, "int8", ICELAKE)
        for m in BUCKETS
    }
    second = plan(graph, measured=slow)
    other = spec_for(second, *key)
    assert other.tiles != chosen.tiles
    assert second.find("matmul", *key, 16).measured_us == 160.0
    assert first.find("matmul", *key, 16).measured_us == 0.0


def test_measured_times_correct_predictions_of_the_same_product() -> None:
    """A kernel that is measured as slow as predicted times 3 does not lose to a mere prediction."""
    graph = model()
    first = plan(graph)
    measured = {}
    for p in products(graph):
        spec = spec_for(first, *p.key)
        for m in BUCKETS:
            measured[spec, p.n, p.k, m] = 3 * first.find("matmul", *p.key, m).predicted_us
    second = plan(graph, measured=measured)
    for p in products(graph):
        assert spec_for(second, *p.key) == spec_for(first, *p.key)


def test_isa_candidates() -> None:
    assert [i.name for i in isa_candidates(ICELAKE)] == ["avx512vnni", "avx512", "avx2", "scalar"]
    assert [i.name for i in isa_candidates(rows()["generic"])] == ["scalar"]
    assert isa_candidates(machine_by_name("znver4"))[0].name == "avx512bf16"


@pytest.mark.parametrize(
    "change", [{"tiles": "1,4"}, {"tiles": "4"}, {"tiles": "x"}, {"activations": "f8"}]
)
def test_edited_plans_are_checked(change: dict[str, str]) -> None:
    result = plan()

    def edited(c: KernelChoice) -> KernelChoice:
        return replace(c, schedule={**c.schedule, **change})

    broken = replace(result, kernels=tuple(edited(c) for c in result.kernels))
    with pytest.raises(BadInput, match="kernel matmul_q4_0"):
        spec_for(broken, "q4_0", 1536, 512)
    with pytest.raises(BadInput, match="no kernel"):
        spec_for(result, "q4_0", 7, 7)


def test_only_what_was_measured_is_chosen() -> None:
    """A prediction does not stand against measured kernels, however good it is."""
    graph = model()
    candidates = tuning_candidates(products(graph), VNNI, ICELAKE, "auto", 2, 4)
    measured = {
        (spec, p.n, p.k, m): 1e6 + m
        for p in products(graph)
        for spec in candidates[p.key]
        for m in BUCKETS
    }
    result = plan(graph, measured=measured)
    for p in products(graph):
        assert spec_for(result, *p.key) in candidates[p.key]


def test_candidates_of_tuning() -> None:
    found = products(model())
    first = plan(model())
    for top in (1, 4, 8):
        candidates = tuning_candidates(found, VNNI, ICELAKE, "auto", 2, top)
        for p in found:
            specs = candidates[p.key]
            assert 1 <= len(specs) == len(set(specs)) <= top
            assert specs[0] == spec_for(first, *p.key)
        tiles = [tuple(dict.fromkeys(s.tiles for s in candidates[p.key])) for p in found]
        assert len(set(tiles)) == 1  # kernels that share their tiles can be put together
    everything = tuning_candidates(found[:1], VNNI, ICELAKE, "auto", 2, None)[found[0].key]
    assert set(everything) == set(space(found[0].format, found[0].k, VNNI, "int8", ICELAKE))
