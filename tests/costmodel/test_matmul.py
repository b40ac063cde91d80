"""The cost model: what must hold for any machine, and the limits it finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.costmodel import Situation, predict, resources, roofline, schedules, space
from qigen.costmodel.matmul import (
    PREFETCH,
    TOKEN_TILES,
    activation_bytes,
    fits,
    layouts,
    prefetch_distance,
    split,
    tile_lists,
    token_tiles,
)
from qigen.formats.catalog import CATALOG, by_name
from qigen.formats.layout import Layout
from qigen.targets import by_name as machine_by_name
from qigen.targets import rows

ICELAKE = machine_by_name("icelake-server")
VNNI = ISAS["avx512vnni"]


def kernel(format: str = "q4_0", tiles: tuple[int, ...] = (4, 1), **more: object) -> MatmulSpec:
    arguments = {"isa": VNNI, "activations": "int8", "layout": Layout(16, 1), **more}
    return MatmulSpec(format=by_name(format), tiles=tiles, **arguments)  # type: ignore[arg-type]


def test_decoding_is_bound_by_memory() -> None:
    for threads in (1, 2):
        p = predict(kernel(), Situation(4096, 4096, 1, threads, ICELAKE))
        weights = 4096 * 4096 * 18 // 32
        assert p.bound == "memory"
        assert p.limits["memory"] == pytest.approx(weights / ICELAKE.read_bandwidth(threads))
        assert p.limits["memory"] <= p.us < 1.1 * p.limits["memory"]
        assert weights < p.bytes < 1.01 * weights


@pytest.mark.parametrize(("activations", "m"), [("int8", 1), ("int8", 64), ("f32", 5)])
def test_resources_are_the_limits_in_detail(activations: str, m: int) -> None:
    """Times are those of the prediction, amounts what takes so long at the machine's rates."""
    spec, threads = kernel(activations=activations), 3
    p = predict(spec, Situation(1024, 1024, m, threads, ICELAKE))
    rows_ = resources(spec, Situation(1024, 1024, m, threads, ICELAKE))
    found = {r.name: r for r in rows_}
    assert len(found) == len(rows_)
    for name, us in p.limits.items():
        if name != "reload" and us:
            assert found[name].us == us
    assert sum(r.us for r in rows_ if r.name.startswith("reload")) == pytest.approx(
        p.limits["reload"]
    )
    assert found["memory"].amount == 1024 * 1024 * 18 // 32
    assert found["l1"].amount == p.traffic["l1"]
    classes = [r for r in rows_ if r.kind == "instructions" and r.name not in ("issue", "vector")]
    assert {"load", "fma"} <= {r.name for r in classes}
    if activations == "int8":  # 4 weights of 16 rows by an activation each: exactly so many
        assert found["dot"].amount == pytest.approx(1024 * 1024 * m / 64)
        assert sum(r.amount for r in classes) < 1.5 * found["issue"].amount
    assert found["barrier"].amount == 1


def test_weights_in_the_caches_are_faster() -> None:
    at = Situation(1024, 1024, 1, 1, ICELAKE)
    near, far = (predict(kernel(), replace(at, working_set=w)) for w in (600_000, None))
    assert near.us < far.us / 2
    assert near.bound != "memory"
    middle = predict(kernel(), replace(at, working_set=10_000_000))
    assert near.us < middle.us < far.us and "l3" in middle.limits


def test_many_tokens_are_bound_by_the_core() -> None:
    p = predict(kernel(), Situation(4096, 4096, 128, 2, ICELAKE))
    assert p.bound in ("load", "vector", "dot", "issue")
    assert p.us > p.limits[p.bound]


def test_a_register_tile_pays() -> None:
    at = Situation(1024, 1024, 48, 1, ICELAKE)
    one, four = (predict(kernel(tiles=t), at).us for t in ((1,), (4, 1)))
    assert four < 0.8 * one


def test_fewer_bits_never_take_longer() -> None:
    at = Situation(4096, 4096, 1, 2, ICELAKE)
    us = [predict(kernel(f"u{b}g128"), at).us for b in (2, 3, 4, 8)]
    assert us == sorted(us)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_time_grows_with_everything(threads: int) -> None:
    def us(n: int, k: int, m: int) -> float:
        return predict(kernel(), Situation(n, k, m, threads, ICELAKE)).us

    assert us(1024, 1024, 1) < us(1024, 1024, 16) < us(1024, 1024, 128)
    assert us(1024, 1024, 16) < us(2048, 1024, 16) < us(2048, 4096, 16)
    more = Situation(1024, 1024, 16, 2 * threads, ICELAKE)
    assert predict(kernel(), more).us < us(1024, 1024, 16)


def test_barriers_bound_tiny_products() -> None:
    p = predict(kernel(), Situation(16, 64, 1, 2, replace(ICELAKE, barrier_us=5.0)))
    assert p.bound == "barrier"
    assert p.us > 5.0
    assert predict(kernel(), Situation(16, 64, 1, 1, ICELAKE)).limits["barrier"] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activations", ["f32", "bf16", "int8", "int8-token"])
@pytest.mark.parametrize("format", ["q8_0", "q3_k", "tq1_0", "mxfp4", "f16", "bf16"])
def test_every_kernel_has_a_prediction(isa: str, activations: str, format: str) -> None:
    row = by_name(format)
    if row.float_kind and activations.startswith("int8"):
        return
    machine = machine_by_name("znver4")
    spec = kernel(format, (2, 1), isa=ISAS[isa], activations=activations)
    p = predict(spec, Situation(256, 512, 5, 2, machine))
    assert p.us > 0 and p.instructions > 0 and p.bytes > 0
    assert p.bound in p.limits


@pytest.mark.parametrize("machine", rows().values(), ids=rows())
def test_every_machine_has_predictions(machine: object) -> None:
    row = machine_by_name(machine.name)  # type: ignore[attr-defined]
    for isa in ISAS.values():
        if row.has(isa.features):
            assert predict(kernel(isa=isa), Situation(512, 512, 8, 2, row)).us > 0
    assert prefetch_distance(row) in (1024, 2048, 4096, 8192)


def test_split_is_greedy() -> None:
    assert split((8, 4, 1), 23) == {8: 2, 4: 1, 1: 3}
    assert split((6, 1), 12) == {6: 2}


def test_space_is_enumerated() -> None:
    lists = tile_lists((2, 4, 8))
    assert (1,) in lists and (8, 1) in lists and (8, 2, 1) in lists
    assert all(list(t) == sorted(t, reverse=True) and t[-1] == 1 for t in lists)
    assert len(set(lists)) == len(lists) == 1 + 3 + 3
    specs = schedules(by_name("q4_0"), 64, VNNI, "int8", ICELAKE)
    assert len(set(specs)) == len(specs) == 2 * len(
        tile_lists(token_tiles(by_name("q4_0"), VNNI, "int8"))
    )
    everything = space(by_name("q4_0"), 64, VNNI, "int8", ICELAKE)
    assert everything[: len(specs)] == specs
    assert len(set(everything)) == len(everything) == 3 * len(specs) * (1 + len(PREFETCH))
    assert len({s.name for s in everything if s.tiles == (1,)}) == 6 * (1 + len(PREFETCH))
    floats = space(by_name("q4_0"), 64, VNNI, "f32", ICELAKE)
    assert floats == schedules(by_name("q4_0"), 64, VNNI, "f32", ICELAKE)


def test_the_choice_of_the_prefetch_is_the_best_of_the_space() -> None:
    """That is why the planner looks at one distance only."""
    for m in (1, 16):
        times: dict[int, float] = {}
        for spec in space(by_name("q4_0"), 4096, VNNI, "int8", ICELAKE):
            us = predict(spec, Situation(4096, 4096, m, 2, ICELAKE)).us
            times[spec.prefetch] = min(us, times.get(spec.prefetch, us))
        assert times[prefetch_distance(ICELAKE)] == min(times.values())
        if m == 1:
            assert times[0] > times[1024] > times[4096]


def test_nothing_beats_the_roofline() -> None:
    for m in (1, 4, 128):
        for working_set in (None, 100_000):
            p = predict(kernel(), Situation(512, 512, m, 2, ICELAKE, working_set))
            assert p.roofline_us <= p.us
    memory, compute = roofline(kernel(), Situation(4096, 4096, 1, 2, ICELAKE))
    assert memory > compute
    assert memory == pytest.approx(4096 * 4096 * 18 / 32 / ICELAKE.read_bandwidth(2))
    memory, compute = roofline(kernel(), Situation(4096, 4096, 256, 2, ICELAKE))
    rate = ICELAKE.rates[512]
    gops = 2 * 128 / 2 * rate.per_cycle["dot"] * rate.ghz * 2  # 64 multiply-adds an instruction
    assert compute == pytest.approx(2 * 4096 * 4096 * 256 / gops / 1e3) and compute > memory
    slow = roofline(kernel(isa=ISAS["scalar"]), Situation(4096, 4096, 256, 2, ICELAKE))[1]
    assert slow > 4 * compute


def test_tile_registers_have_a_roofline_of_their_own() -> None:
    """16 tokens at a time take less than byte dot products could; fewer tokens use those."""
    machine = machine_by_name("sapphirerapids")
    amx = kernel(isa=ISAS["amx"], tiles=(16, 4, 1))
    vnni = replace(amx, isa=ISAS["avx512bf16"])
    assert amx.matrix
    for m in (8, 512):
        at = Situation(4096, 4096, m, 32, machine)
        assert predict(amx, at).roofline_us <= predict(amx, at).us
        assert (roofline(amx, at)[1] < roofline(vnni, at)[1]) == (m == 512)


def test_bytes_by_level() -> None:
    p = predict(kernel(), Situation(4096, 4096, 1, 2, ICELAKE))
    weights = 4096 * 4096 * 18 // 32
    assert p.traffic["memory"] == weights
    # every byte of the weights is loaded once, and the activations once a row-block
    assert p.traffic["l1"] == weights + 256 * activation_bytes(kernel(tiles=(1,)), 4096)
    many = predict(kernel(), Situation(4096, 4096, 128, 2, ICELAKE))
    assert many.traffic["l2"] > 0
    assert "l3" in predict(kernel(), Situation(1024, 1024, 1, 1, ICELAKE, 10_000_000)).traffic


def test_layouts() -> None:
    # up to 128 weights a K-block, if they divide K
    wide, narrow = ISAS["avx512vnni"], ISAS["avx2"]
    assert [x.blocks for x in layouts(by_name("q4_0"), 64, wide)] == [1, 2]
    assert [x.blocks for x in layouts(by_name("q4_0"), 96, wide)] == [1]
    assert [x.blocks for x in layouts(by_name("q4_0"), 4096, wide)] == [1, 2]
    assert [x.blocks for x in layouts(by_name("q4_0"), 4096, narrow)] == [1]
    assert [x.blocks for x in layouts(by_name("u2g128"), 4096, wide)] == [1]
    assert [x.blocks for x in layouts(by_name("q4_k"), 512, wide)] == [1]
    assert [x.blocks for x in layouts(by_name("f16"), 512, wide)] == [1]


def test_tiles_must_not_need_twice_the_registers() -> None:
    assert token_tiles(by_name("q4_0"), ISAS["scalar"], "int8") == ()
    assert set(token_tiles(by_name("q4_0"), VNNI, "int8")) <= set(TOKEN_TILES)
    assert not fits(kernel(), 8, 2) and fits(kernel(), 6, 2) and fits(kernel(), 1, 1)
    avx2 = token_tiles(by_name("q4_0"), ISAS["avx2"], "int8")
    assert avx2 and max(avx2) < max(token_tiles(by_name("q4_0"), VNNI, "int8"))


@pytest.mark.parametrize("format", [f for f in CATALOG.values() if f.integer][::5])
def test_activation_rows_hold_the_padded_columns(format: object) -> None:
    spec = replace(kernel(), format=format)  # type: ignore[arg-type]
    assert activation_bytes(spec, 1000) >= 1000
