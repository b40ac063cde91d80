"""Source blocks: lossless both ways, and dequantized to the last bit as ggml's reference does."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from qigen.errors import BadInput, Unsupported
from qigen.formats import (
    CATALOG,
    Format,
    Layout,
    QuantizedTensor,
    by_ggml_type,
    by_name,
    from_blocks,
    pack,
    to_blocks,
    unpack,
    validate,
)
from qigen.formats.algebra import FLOAT_FIELDS

GGUF_ROWS = [row for row in CATALOG.values() if row.ggml_type is not None]
INTEGER_ROWS = [row for row in GGUF_ROWS if row.float_kind is None]


def random_blocks(row: Format, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Random source bytes uint8 [n, K / block * block_bytes] whose f16 scales are finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, k // row.block, row.block_bytes), dtype=np.uint8)
    for field in row.fields:
        if field.name in FLOAT_FIELDS or row.float_kind:
            for run in field.runs:
                if run.low == field.bits - 8:  # the byte with the sign and the upper exponent bits
                    raw[:, :, run.byte] &= 0xBF
    return raw.reshape(n, -1)


def tensor_of(row: Format, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    return from_blocks(row, random_blocks(row, n, k, seed), (n, k))


def ids(row: Format) -> str:
    return row.name


@pytest.mark.parametrize("row", GGUF_ROWS, ids=ids)
@pytest.mark.parametrize("n,nblocks", [(1, 1), (21, 3), (16, 4), (33, 2)])
def test_lossless_through_blocks_and_layout(row: Format, n: int, nblocks: int) -> None:
    k = nblocks * row.block
    rng = np.random.default_rng(n)
    raw = rng.integers(0, 256, (n, nblocks * row.block_bytes), dtype=np.uint8)
    tensor = from_blocks(row, raw, (n, k))
    np.testing.assert_array_equal(to_blocks(tensor), raw)
    for layout in (Layout(), Layout(blocks=2), Layout(rows=8, blocks=3)):
        again = unpack(row, (n, k), layout, pack(tensor, layout))
        np.testing.assert_array_equal(to_blocks(again), raw)


@pytest.mark.filterwarnings("ignore:overflow")  # of the reference, for e8m0 scales near 2^127
@pytest.mark.parametrize("row", GGUF_ROWS, ids=ids)
@pytest.mark.parametrize("n,nblocks", [(1, 1), (21, 3), (16, 2)])
def test_dequantize_has_the_bits_of_the_reference(row: Format, n: int, nblocks: int) -> None:
    k = nblocks * row.block
    raw = random_blocks(row, n, k, seed=n)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(row.ggml_type))
    got = from_blocks(row, raw, (n, k)).dequantize()
    assert got.dtype == np.float32 and got.shape == (n, k)
    np.testing.assert_array_equal(got.view(np.uint32), want.reshape(n, k).view(np.uint32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row", GGUF_ROWS, ids=ids)
def test_any_bytes_dequantize_quietly(row: Format) -> None:
    raw = np.random.default_rng(1).integers(0, 256, 4 * row.block_bytes << 8, dtype=np.uint8)
    for n in (4, 0):
        tensor = from_blocks(row, raw[: n * row.block_bytes << 8], (n, row.block << 8))
        assert tensor.dequantize().shape == tensor.shape
        assert unpack(row, tensor.shape, Layout(), pack(tensor, Layout())).shape == tensor.shape


@pytest.mark.filterwarnings("ignore:overflow")
def test_e8m0_scales_of_every_exponent() -> None:
    row = by_name("mxfp4")
    raw = np.tile(np.arange(17, dtype=np.uint8) * 15, (256, 1))
    raw[:, 0] = np.arange(256)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(from_blocks(row, raw, (256, 32)).dequantize(), want)


@pytest.mark.parametrize("row", GGUF_ROWS, ids=ids)
def test_runs_cover_every_bit_once(row: Format) -> None:
    source = np.zeros((row.block_bytes, 8), int)
    for field in row.fields:
        elements = np.zeros((field.count, field.bits), int)
        for run in field.runs:
            for i in range(run.nbytes):
                source[run.byte + i, run.shift : run.shift + run.bits] += 1
                elements[run.start + i * run.step, run.low : run.low + run.bits] += 1
        assert (elements == 1).all(), field.name
    assert (source == 1).all()


@pytest.mark.parametrize("row", GGUF_ROWS, ids=ids)
def test_sizes_are_those_of_ggml(row: Format) -> None:
    kind = gguf.GGMLQuantizationType(row.ggml_type)
    assert row.name == kind.name.lower() and by_ggml_type(kind) is row is by_name(kind.name)
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    assert row.block_bytes * weights == nbytes * row.block
    assert row.bits_per_weight == 8 * nbytes / weights


@pytest.mark.parametrize("row", CATALOG.values(), ids=ids)
def test_rows_are_consistent(row: Format) -> None:
    assert row.fields[0].name == "codes" and row.source and CATALOG[row.name] is row
    per_group = [f.count for f in row.block_fields if f.name in ("sub", "d", "m", "z", "e", "lut")
                 and not (f.name == "d" and row.has("sub")) and f.name != "lut"]
    groups = per_group[0] if per_group else 1
    assert set(per_group) <= {groups}
    assert row.group * groups == row.block or row.float_kind
    assert not row.has("submin") or row.field("submin").count == groups
    stored = row.field("codes").count
    if row.vector:
        assert stored * row.vector % row.block == 0 and row.block % row.vector == 0
    elif row.mask is not None:
        keep, of = row.mask
        assert stored == row.block * keep // of
        assert row.field("bm").count * of == row.block if row.has("bm") else (
            row.field("ix").count == stored)
        assert not row.sharing or row.field("vm").count * of == row.block
        assert row.levels[row.hole] == 0
    else:
        assert row.base3 or row.words or stored == row.block
    assert all(f.scope in ("block", "row", "tensor", "column") for f in row.fields)
    assert row.values is None or len(row.values) == 1 << row.code_bits
    if row.integer:
        low, high = row.mapped_range
        assert row.table is None or len(row.table) == 1 << row.code_bits
        assert low < high


def test_rows_in_words() -> None:
    words = {name: (by_name(name).map_kind, by_name(name).scale_kind, by_name(name).zero_kind)
             for name in ("f16", "q4_0", "q4_k", "q6_k", "iq4_xs", "mxfp4", "tq1_0", "u4g128")}
    assert words == {
        "f16": ("float", "none", "none"),
        "q4_0": ("affine", "f16", "integer"),
        "q4_k": ("affine", "f16 x 6 bits", "f16 x 6 bits"),
        "q6_k": ("affine", "f16 x 8 bits", "integer"),
        "iq4_xs": ("table", "f16 x 6 bits", "none"),
        "mxfp4": ("table", "e8m0", "none"),
        "tq1_0": ("ternary", "f16", "integer"),
        "u4g128": ("affine", "f16", "f16"),
    }
    assert by_name("s4g128").bits_per_weight == 4.125 and by_name("U4G32").bits_per_weight == 5.0


def test_rows_are_a_view_that_dequantizes_alike() -> None:
    tensor = tensor_of(by_name("q4_k"), 37, 512)
    part = tensor.rows(5, 30)
    assert part.shape == (25, 512) and part.nbytes == 25 * 2 * 144
    assert np.shares_memory(part.fields["codes"], tensor.fields["codes"])
    np.testing.assert_array_equal(part.dequantize(), tensor.dequantize()[5:30])
    np.testing.assert_array_equal(to_blocks(part), to_blocks(tensor)[5:30])
    assert tensor.rows(30, 99).shape == (7, 512)


def test_dequantize_in_several_chunks() -> None:
    tensor = tensor_of(by_name("q5_1"), 67, 1 << 13)
    whole = tensor.dequantize()
    for row in (0, 15, 16, 66):
        np.testing.assert_array_equal(whole[row], tensor.rows(row, row + 1).dequantize()[0])


@pytest.mark.parametrize("row", INTEGER_ROWS, ids=ids)
def test_bad_sizes(row: Format) -> None:
    raw = random_blocks(row, 3, 2 * row.block)
    with pytest.raises(BadInput, match="bytes"):
        from_blocks(row, raw.reshape(-1)[:-1], (3, 2 * row.block))
    with pytest.raises(BadInput, match="bytes"):
        from_blocks(row, raw.astype(np.int16), (3, 2 * row.block))
    with pytest.raises(BadInput, match="multiple"):
        from_blocks(row, raw, (3, 2 * row.block - 1))
    with pytest.raises(BadInput, match="nothing"):
        from_blocks(row, raw[:, :0], (3, 0))


def test_fields_must_fit_the_format() -> None:
    tensor = tensor_of(by_name("q4_0"), 2, 64)
    with pytest.raises(BadInput, match="fields"):
        QuantizedTensor(tensor.format, (2, 64), {"codes": tensor.fields["codes"]})
    with pytest.raises(BadInput, match="'d'"):
        QuantizedTensor(tensor.format, (2, 64),
                        {**tensor.fields, "d": tensor.fields["d"].astype(np.uint32)})
    with pytest.raises(BadInput, match="'codes'"):
        QuantizedTensor(tensor.format, (3, 64), tensor.fields)


def test_formats_without_source_blocks() -> None:
    row = by_name("u4g32")
    fields = {field.name: np.zeros((1, 1, field.count), field.dtype) for field in row.fields}
    with pytest.raises(Unsupported):
        to_blocks(QuantizedTensor(row, (1, 32), fields))
    with pytest.raises(Unsupported):
        from_blocks(row, np.zeros(20, np.uint8), (1, 32))
    with pytest.raises(Unsupported):
        assert by_name("f16").mapped_range


@pytest.mark.parametrize("row", GGUF_ROWS, ids=ids)
def test_validate_finds_each_scale_that_is_no_number(row: Format) -> None:
    raw = random_blocks(row, 5, 2 * row.block)
    if row.has("e"):
        raw.reshape(5, 2, -1)[:, :, 0] &= 0x7F
    validate(from_blocks(row, raw, (5, 2 * row.block)), "blk.0.weight")
    for field in row.fields:
        if field.name in FLOAT_FIELDS or row.float_kind or field.name == "e":
            for bits in ((0x7F, 0xFF), (0xFF, 0xFF), (0x7F, 0x80)):  # NaN, -NaN, infinity
                if bits == (0x7F, 0x80) and (row.float_kind in ("f16", None)):
                    bits = (0x7C, 0x00)
                bad = raw.reshape(5, 2, -1).copy()
                for run in field.runs:
                    last = run.low == field.bits - 8
                    bad[3, 1, run.byte] = 0xFF if field.name == "e" else bits[0] if last else (
                        bits[1] if run.low == field.bits - 16 else 0)
                tensor = from_blocks(row, bad, (5, 2 * row.block))
                np.testing.assert_array_equal(to_blocks(tensor), bad.reshape(5, -1))
                with pytest.raises(BadInput, match="row 3") as caught:
                    validate(tensor, "blk.0.weight")
                assert caught.value.where == "blk.0.weight" and field.name in str(caught.value)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(Unsupported, match="q4_k"):
        by_name("q4_k_m")
    with pytest.raises(Unsupported, match="s4g128"):
        by_name("s4g127")
    with pytest.raises(Unsupported, match="q8_0"):
        by_name("?")
    with pytest.raises(Unsupported, match=r"16 \(IQ2_XXS\).*iq4_xs"):
        by_ggml_type(gguf.GGMLQuantizationType.IQ2_XXS)
    with pytest.raises(Unsupported, match="999"):
        by_ggml_type(999)
