"""The execution layout against a slow reading of its rule, one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qigen.errors import BadInput, Unsupported
from qigen.formats import (
    CATALOG,
    Field,
    Format,
    Layout,
    QuantizedTensor,
    by_name,
    field_offsets,
    field_planes,
    kblock_bytes,
    pack,
    packed_bytes,
    packed_shape,
    planes,
    to_blocks,
    unpack,
)


def random_tensor(row: Format, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    nblocks = -(-k // row.block)
    fields = {field.name: rng.integers(0, 1 << field.bits, field.shape(n, nblocks))
              .astype(field.dtype) for field in row.fields}
    for field in row.fields:
        if field.rows > 1:
            first = np.arange(n) // field.rows * field.rows
            fields[field.name] = fields[field.name][first]
    return QuantizedTensor(row, (n, k), fields)


def scalar_pack(tensor: QuantizedTensor, rows: int, blocks: int) -> bytes:
    """The packed bytes, written from the text of the rule with a loop for each of its nouns."""
    row, (n, _) = tensor.format, tensor.shape
    out = bytearray()

    def element(r: int, b: int, name: str, e: int) -> int:
        array = tensor.fields[name]
        inside = r < n and b < array.shape[1]
        return int(array[r, b, e]) if inside else 0

    def fill() -> None:
        while len(out) % 64:
            out.append(0)

    def write(field: Field, first_row: int, b: int) -> None:
        dot = field.name == "codes" and field.bits <= 8 and not (
            row.vector or row.has("bm") or row.has("dict"))
        dot = dot or (field.name == "ix" and row.mask in ((2, 4), (2, 8), (1, 4))
                      and not row.has("vm"))
        low, rest = 0, field.bits
        for p in (32, 16, 8, 4, 2, 1):
            if not rest & p:
                continue
            total = field.count * p
            width = 32 if dot or total > 16 else 16 if total > 8 else 8
            if field.number and not dot:
                width = p
            words = [[0] * rows for _ in range(-(-total // width))]
            for lane in range(rows):
                for e in range(field.count):
                    x = element(first_row + lane, b, field.name, e)
                    x = x >> low & ((1 << p) - 1)
                    if dot:
                        w, byte, j = e // (32 // p), e % 4, e % (32 // p) // 4
                        words[w][lane] |= x << (8 * byte + p * j)
                    else:
                        words[p * e // width][lane] |= x << (p * e % width)
            for word in words:
                for value in word[: 1 if field.rows > 1 else rows]:
                    out.extend(value.to_bytes(width // 8, "little"))
            low, rest = low + p, rest & ~p

    for field in row.fields:
        if field.scope == "tensor":
            for value in tensor.fields[field.name][0, 0]:
                out.extend(int(value).to_bytes(field.dtype.itemsize, "little"))
            fill()
    kblocks = -(-tensor.nblocks // blocks)
    for field in row.fields:
        if field.scope == "column":
            values = tensor.fields[field.name].reshape(-1).tolist()
            values += [0] * (kblocks * blocks * field.count - len(values))
            for value in values:
                out.extend(int(value).to_bytes(field.dtype.itemsize, "little"))
    for first_row in range(0, n, rows):
        start = len(out)
        for field in row.fields:
            if field.scope == "row":
                write(field, first_row, 0)
        while (len(out) - start) % 64:
            out.append(0)
        for first_block in range(0, tensor.nblocks, blocks):
            for field in row.fields:
                for b in range(first_block, first_block + blocks):
                    if field.scope == "block":
                        write(field, first_row, b)
    return bytes(out)


def test_planes() -> None:
    assert {bits: planes(bits) for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)} == {
        1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
        16: (16,), 32: (32,)}


@pytest.mark.parametrize("layout", [Layout(), Layout(blocks=2)], ids=["1", "2"])
@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.name)
def test_pack_follows_the_rule(row: Format, layout: Layout) -> None:
    n, k = (5, 3 * row.block) if row.block < 64 else (3, row.block)
    tensor = random_tensor(row, n, k)
    packed = pack(tensor, layout)
    assert packed.dtype == np.uint8 and packed.ndim == 1
    assert packed.tobytes() == scalar_pack(tensor, layout.rows, layout.blocks)


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.name)
def test_as_many_bytes_as_the_source(row: Format) -> None:
    tensor = random_tensor(row, 32, 2 * row.block)
    for layout in (Layout(), Layout(blocks=2)):
        packed = pack(tensor, layout)
        assert packed.size == packed_bytes(row, tensor.shape, layout)
        assert kblock_bytes(row, layout) % layout.rows == 0
        if row.has("dict"):  # 36 numbers of 4 bits take five words of 32
            assert packed.size == tensor.nbytes + 32 * 2 * 2 + 2 * (64 - 16 * 2)
        elif row.has("oc"):  # three bytes take a word of four
            assert packed.size == tensor.nbytes + layout.blocks * 32 * (2 // layout.blocks)
        elif row.block_fields == row.fields:
            assert packed.size == tensor.nbytes == np.prod(packed_shape(row, tensor.shape, layout))
        elif row.rank:  # 16 or 32 columns of f16 fill a line of 64
            assert packed.size >= tensor.nbytes
        elif row.has("qc"):  # 32 columns fill one line
            assert tensor.nbytes <= packed.size
        else:  # row fields are filled up to whole lines
            assert tensor.nbytes <= packed.size < tensor.nbytes + (2 + 2) * 64


@pytest.mark.parametrize("layout", [Layout(), Layout(blocks=3)], ids=["1", "3"])
@pytest.mark.parametrize("name", ["q4_k", "q3_k", "q5_0", "q6_k", "iq4_xs", "tq1_0", "bf16",
                                  "u3g32"])
def test_field_offsets_point_at_the_words(name: str, layout: Layout) -> None:
    row = by_name(name)
    offsets = field_offsets(row, layout)
    end = 0
    for field in row.fields:
        for block in range(layout.blocks):
            for plane in field_planes(row, field):
                assert offsets.pop((field.name, block, plane.index)) == end
                # the first element's lowest bit of the plane, in lane 3, and nothing else
                fields = {f.name: np.zeros((16, layout.blocks, f.count), f.dtype)
                          for f in row.fields}
                fields[field.name][3, block, 0] = 1 << plane.low
                tensor = QuantizedTensor(row, (16, layout.blocks * row.block), fields)
                assert np.flatnonzero(pack(tensor, layout)).tolist() == [
                    end + 3 * plane.word_bits // 8]
                end += plane.nbytes(layout)
    assert not offsets and end == kblock_bytes(row, layout)


@st.composite
def formats(draw: st.DrawFn) -> Format:
    """Formats that no catalog has: odd widths, odd counts, several side fields."""
    codes = Field("codes", draw(st.integers(1, 8)), 32 * draw(st.integers(1, 2)))
    if draw(st.booleans()):
        codes = Field("codes", draw(st.integers(9, 32)), draw(st.integers(1, 5)))
    scopes = st.sampled_from(["block", "block", "row", "tensor"])
    side = [Field(name, draw(st.integers(1, 32)), draw(st.integers(1, 9)), scope=draw(scopes))
            for name in ("sub", "submin", "e")[: draw(st.integers(0, 3))]]
    if draw(st.booleans()):
        bits = draw(st.sampled_from([8, 16, 32]))
        side.append(Field("d", bits, draw(st.integers(1, 3)), scope=draw(scopes),
                          kind={8: "e4m3", 16: "bf16", 32: "f32"}[bits]))
    return Format("made_up", codes.count, codes.count, (codes, *side))


@settings(max_examples=80, deadline=None)
@given(row=formats(), n=st.integers(1, 9), nblocks=st.integers(1, 4), rows=st.sampled_from([4, 8]),
       blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_format(row: Format, n: int, nblocks: int, rows: int, blocks: int, seed: int) -> None:
    tensor, layout = random_tensor(row, n, nblocks * row.block, seed), Layout(rows, blocks)
    packed = pack(tensor, layout)
    assert packed.tobytes() == scalar_pack(tensor, rows, blocks)
    again = unpack(row, tensor.shape, layout, packed)
    for name, array in tensor.fields.items():
        assert again.fields[name].dtype == array.dtype
        np.testing.assert_array_equal(again.fields[name], array)


def test_several_row_chunks_and_a_column_tail() -> None:
    row = by_name("u5g64")
    tensor = random_tensor(row, 1043, 1000)
    again = unpack(row, tensor.shape, Layout(), pack(tensor, Layout()))
    for name, array in tensor.fields.items():
        np.testing.assert_array_equal(again.fields[name], array)


def test_pack_takes_strided_fields_and_leaves_them_alone() -> None:
    tensor = random_tensor(by_name("q4_k"), 40, 512)
    odd = QuantizedTensor(tensor.format, (20, 512), {k: v[::2] for k, v in tensor.fields.items()})
    before = to_blocks(tensor)
    even = QuantizedTensor(tensor.format, (20, 512),
                           {k: v[::2].copy() for k, v in tensor.fields.items()})
    np.testing.assert_array_equal(pack(odd, Layout()), pack(even, Layout()))
    np.testing.assert_array_equal(to_blocks(tensor), before)


def test_unpack_takes_a_read_only_buffer() -> None:
    tensor = random_tensor(by_name("q5_1"), 7, 96)
    packed = np.frombuffer(pack(tensor, Layout()).tobytes(), np.uint8)
    np.testing.assert_array_equal(unpack(tensor.format, (7, 96), Layout(), packed).dequantize(),
                                  tensor.dequantize())


def test_bad_sizes() -> None:
    tensor = random_tensor(by_name("q4_0"), 4, 64)
    packed = pack(tensor, Layout())
    for bad in (packed[:-1], packed.view(np.int8)):
        with pytest.raises(BadInput):
            unpack(tensor.format, (4, 64), Layout(), bad)
    for rows, blocks in ((6, 1), (0, 1), (16, 0)):
        with pytest.raises(Unsupported):
            Layout(rows, blocks)
    with pytest.raises(Unsupported):
        kblock_bytes(Format("half_words", 16, 16, (Field("codes", 1, 16),)), Layout())
