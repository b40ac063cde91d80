"""The cost model of the gemm family: what holds for any machine, and the tiles that it picks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qigen.backends.cpu.gemm import PER, Tiles, tiles_for
from qigen.backends.cpu.isa import ISAS
from qigen.costmodel.gemm import GemmShape, candidates, choose_tiles, predict_gemm
from qigen.targets import by_name

ICELAKE, ZEN3 = by_name("icelake-server"), by_name("znver3")
VNNI, AVX2 = ISAS["avx512vnni"], ISAS["avx2"]
PRODUCT = GemmShape(384, 384, 1, 128, 1, 1, 1536)
IMAGE = GemmShape(64, 64, 9, 80, 80, 1, 256)


@pytest.mark.parametrize("kind", PER)
@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_candidates_stay_in_the_registers(isa: object, kind: str) -> None:
    found = candidates(isa, kind)  # type: ignore[arg-type]
    assert found[0] == tiles_for(isa, kind)  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
    for tiles in found:
        if not tiles.matrix:
            for blocks, pixels in tiles.shapes:
                assert pixels * blocks + blocks + 1 <= isa.registers  # type: ignore[attr-defined]
                assert 0 <= tiles.tall <= tiles.pixels


@pytest.mark.parametrize("shape", [PRODUCT, IMAGE], ids=["product", "image"])
def test_full_registers_and_integers_pay(shape: GemmShape) -> None:
    def us(tiles: Tiles, kind: str = "f32") -> float:
        return predict_gemm(tiles, kind, shape, VNNI, 2, ICELAKE, True).us

    assert us(Tiles(12, 2, 4, 1 << 19)) < 0.7 * us(Tiles(1, 1, 0, 1 << 19))
    assert us(tiles_for(VNNI, "u8s8"), "u8s8") < 0.4 * us(tiles_for(VNNI, "f32"))


@pytest.mark.parametrize("machine", [ICELAKE, ZEN3], ids=lambda m: m.name)
def test_time_grows_with_everything(machine: object) -> None:
    tiles = tiles_for(AVX2, "f32")

    def us(threads: int = 1, **more: int) -> float:
        shape = replace(PRODUCT, **more)
        return predict_gemm(tiles, "f32", shape, AVX2, threads, machine).us  # type: ignore[arg-type]

    assert us() < us(n=768) and us() < us(k=768) and us() < us(columns=256) and us() < us(rows=2)
    assert us(threads=2) < us() and us(threads=4) < us(threads=2)


def test_the_multiply_adds_bound_a_large_product() -> None:
    """No prediction is below what the cores can issue, and a large product comes near it."""
    shape = GemmShape(1536, 768, 1, 4096, 1, 1, 3072)
    rates = ICELAKE.rates[512]
    found = predict_gemm(tiles_for(VNNI, "f32"), "f32", shape, VNNI, 2, ICELAKE)
    least = shape.n * shape.k * shape.columns / 16 / rates.per_cycle["fma"] / rates.ghz / 2e3
    assert least <= found.us < 1.6 * least and found.bound == "fma"


def test_one_row_is_bound_by_its_weights() -> None:
    shape = GemmShape(4096, 4096, 1, 1, 1, 1, 16384)
    assert predict_gemm(tiles_for(VNNI, "f32"), "f32", shape, VNNI, 2, ICELAKE).bound == "memory"


def test_choice() -> None:
    choice = choose_tiles("f32", [PRODUCT, IMAGE], VNNI, 2, ICELAKE)
    assert choice.us <= choice.rule_us and len(choice.runners_up) == 4
    assert [us for _, us in choice.runners_up] == sorted(us for _, us in choice.runners_up)
    assert all(tiles != choice.tiles for tiles, _ in choice.runners_up)
    # a machine with a tiny level 2 takes fewer tiles together
    large = GemmShape(512, 2048, 1, 2048, 1, 1, 8192)
    small = replace(ICELAKE, l2_bytes=1 << 17, l3_gb_s=10.0)
    assert choose_tiles("f32", [large], VNNI, 2, small).tiles.block_bytes < 1 << 19
