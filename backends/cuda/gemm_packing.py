"""Weights in the order of the tensor cores, for the kernels of :mod:`qigen.backends.cuda.gemm`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qigen.backends.cuda.gemm import COLUMNS, DECODINGS, FIRST_TWO, Decoding, GemmSpec, up
from qigen.errors import BadInput
from qigen.formats.algebra import MINIFLOATS, Array
from qigen.formats.tensor import QuantizedTensor, as_float32, float_bits


def _fragments(codes: Array, step: int) -> Array:
    """[blocks of 64 columns, steps, lanes, tiles of 8 columns, codes of a lane]: the operand B of
    mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") or k32."""
    n, k = codes.shape
    lane = np.arange(32)
    each = step // 8  # codes a register: 2 halves or 4 bytes
    index = np.arange(step // 4)
    column = lane[:, None] % 4 * each + index % each + index // each * 4 * each
    blocked = codes.reshape(n // COLUMNS, 8, 8, k // step, step)
    picked = blocked[:, :, lane[:, None] // 4, :, column]  # [32, codes, blocks, tiles, steps]
    return np.ascontiguousarray(picked.transpose(2, 4, 0, 3, 1))


def _words(parts: Array, bits: int) -> Array:
    """uint32: the last axis of ``parts`` as bit fields of one word, lowest first."""
    shifts = np.arange(parts.shape[-1], dtype=np.uint32) * np.uint32(bits)
    words: Array = np.bitwise_or.reduce(parts.astype(np.uint32) << shifts, axis=-1)
    return words


def _plane(words: Array) -> Array:
    """uint8: words [blocks, steps, lanes, words of a step] as vectors of four words a lane."""
    blocks, steps, lanes, each = words.shape
    lined = words.transpose(0, 2, 1, 3).reshape(blocks, lanes, steps * each // 4, 4)
    return np.ascontiguousarray(lined.transpose(0, 2, 1, 3)).view(np.uint8).reshape(-1)


def _sparse_fragments(codes: Array, step: int) -> Array:
    """[blocks of 64 rows of W, steps, lanes, 8, codes of two registers]: the operand A of
    mma.sp.m16n8k32 of halves or k64 of bytes (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32")
    from the kept codes [n, k / 2]: of each of four tiles of 16 rows the registers 0 and 1, then 2
    and 3."""
    n, kept = codes.shape
    steps, each = kept // (step // 2), step // 16  # codes a register: 2 halves or 4 bytes
    # blocks, tile, upper or lower rows, row, steps, half of K, quad, codes of a register
    split = codes.reshape(n // COLUMNS, 4, 2, 8, steps, 2, 4, each)
    lanes = split.transpose(0, 4, 3, 6, 1, 5, 2, 7)
    return np.ascontiguousarray(lanes).reshape(n // COLUMNS, steps, 32, 8, 2 * each)


def _which(places: Array, step: int) -> Array:
    """uint8: the metadata of mma.sp from places [n, k / 2] of the kept weights. Words of zeros,
    which a stage past K is filled with, stand for the first two weights of every four.

    Of halves (k32) a lane has two words a step: of tiles 0 and 1 of 16 rows (the selector says
    which) and of 2 and 3; a word has row l / 4 and, in its upper half, row l / 4 + 8, of 16 weights
    along K. Of bytes (k64) it has a word a tile: 32 weights of row l / 4 (even lanes) or l / 4 + 8,
    the second half of K in the third and fourth of every four lanes."""
    n, kept = places.shape
    pairs = places[:, ::2].astype(np.uint32) | places[:, 1::2].astype(np.uint32) << np.uint32(2)
    pairs ^= np.uint32(FIRST_TWO)
    if step == 64:
        # blocks, tile, upper or lower rows, row, steps, half of K
        rows = _words(pairs.reshape(n, -1, 8), 4).reshape(n // COLUMNS, 4, 2, 8, kept // 32, 2)
        return _plane(np.ascontiguousarray(rows.transpose(0, 4, 3, 5, 2, 1)).reshape(
            n // COLUMNS, kept // 32, 32, 4))
    fours = _words(pairs.reshape(n, -1, 4), 4)
    # blocks, word, selector, upper or lower rows, row, steps, half of K
    split = fours.reshape(n // COLUMNS, 2, 2, 2, 8, kept // 16, 2)
    lanes = np.ascontiguousarray(split.transpose(0, 5, 4, 2, 6, 1, 3))
    return _plane(_words(lanes.reshape(n // COLUMNS, kept // 16, 32, 2, 2), 16))


def _pairs(parts: Array, bits: int) -> Array:
    """uint8: a plane of 1, 2 or 4 bits whose halves of words are the halves of registers: code
    2 r + h of tile j lies at bit 16 h + bits (2 j + r), modulo what a word holds."""
    blocks, steps, lanes = parts.shape[:3]
    tiles = 8 // bits  # words, registers of a word, halves
    split = parts.reshape(blocks, steps, lanes, 8 // tiles, 2 * tiles, 2)
    halves = np.concatenate([split[..., 0], split[..., 1]], axis=-1)
    return _plane(_words(halves, bits))


def _code_planes(codes: Array, d: Decoding) -> list[Array]:
    parts = (_sparse_fragments if d.sparse else _fragments)(codes, d.step)
    blocks, steps, lanes = parts.shape[:3]  # of [blocks, steps, lanes, 8 tiles, codes]
    if d.name == "half":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 16, 2), 16))]
    if d.name in ("affine8", "small8"):
        return [_plane(_words(parts, 8))]
    if d.name.startswith(("affine", "small")):
        found = [_pairs(parts & 15, 4)]
        if d.bits > 5:
            found.append(_pairs(parts >> 4 & 3, 2))
        if d.bits & 1:
            found.append(_pairs(parts >> d.bits - 1, 1))
        return found
    if d.name == "table4":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 4, 8), 4))]
    if d.name in ("table2", "table3"):
        low = _words((parts & 3).reshape(blocks, steps, lanes, 2, 16), 2)
        if d.name == "table2":
            return [_plane(low)]
        top = _words((parts >> 2).reshape(blocks, steps, lanes, 1, 32), 1)
        return [_plane(low), _plane(top)]
    if d.name == "signed8":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 16, 4) ^ 0x80, 8))]
    if d.name == "signed4by4":
        return [_plane(_words(parts.reshape(blocks, steps, lanes, 16, 8) ^ 8, 4))]
    # signed4: the high nibbles of the bytes are the first register, the low ones the second
    signed = parts ^ 8
    pairs = np.stack([signed[..., 4:], signed[..., :4]], -1).reshape(blocks, steps, lanes, 8, 8)
    return [_plane(_words(pairs, 4))]


def _by_rows(values: Array) -> Array:
    """uint8: values [N, groups] as [blocks of 64, groups, l / 4, tiles of 16, rows of a lane]."""
    n, groups = values.shape
    split = values.reshape(n // COLUMNS, 4, 2, 8, groups)
    return np.ascontiguousarray(split.transpose(0, 4, 3, 1, 2)).view(np.uint8).reshape(-1)


def _by_quads(values: Array) -> Array:
    """uint8: values [N, groups] as [blocks of 64, groups, quads, tiles, 2 columns of a lane]."""
    n, groups = values.shape
    split = values.reshape(n // COLUMNS, 8, 4, 2, groups)
    return np.ascontiguousarray(split.transpose(0, 4, 2, 1, 3)).view(np.uint8).reshape(-1)


def _padded(array: Array, rows: int, columns: int) -> Array:
    return np.pad(array, ((0, rows - array.shape[0]), (0, columns - array.shape[1])))


def _side(spec: GemmSpec, weight: QuantizedTensor, name: str, kind: str, below: int = 0,
          sign: int = 1) -> Array:
    """[N, groups] or [N, 1]: ``sign * value - below`` of a field of scales or zeros, as bits of
    floats of a kind that holds it exactly."""
    raw = weight.fields[name].reshape(weight.shape[0], -1)
    number = spec.format.field(name).number
    values = as_float32(number, raw) if number else raw.astype(np.float32)
    return float_bits(np.float32(sign) * values - np.float32(below), kind)


def pack_gemm(spec: GemmSpec, weight: QuantizedTensor) -> npt.NDArray[np.uint8]:
    """uint8: the weight in the order in which the kernel's lanes multiply.

    Sections, each of whole vectors of 16 bytes: codes by blocks of 64 rows of W, steps along K,
    lanes; their top bits (3 bits); scales and zeros by blocks and groups; a float factor of every
    row (two levels); the table; of columns apart their weights as halves, their places and their
    values. Rows and columns past N and K are zero. Raises BadInput for a weight of another
    format.
    """
    fmt, d = spec.format, spec.decoding
    if weight.format != fmt:
        raise BadInput(f"the weight is {weight.format.name}, the kernel takes {fmt.name}")
    n, k = weight.shape
    rows, columns = up(n, COLUMNS), up(k, spec.padding)
    groups = columns // spec.group if spec.group else 1
    kept = columns // (2 if d.sparse else 1)
    codes = weight.fields["codes"].reshape(n, -1)[:, :kept]
    sections = _code_planes(_padded(codes, rows, kept), d)
    if d.sparse:
        places = np.tile(np.array([0, 1], np.uint8), (rows, kept // 2))
        places[:n, : codes.shape[1]] = weight.fields["ix"].reshape(n, -1)[:, :kept]
        sections.append(_which(places, d.step))
    if not spec.scale_kind:
        return np.concatenate(sections)
    in_order = _by_rows if d.sparse else _by_quads
    if fmt.has("e"):
        e = weight.fields["e"].reshape(n, -1).astype(np.uint16)
        scale = np.where(e == 255, 0x7FC0, np.where(e, e << 7, 0x40)).astype(np.uint16)
    else:
        scale = _side(spec, weight, "sub" if fmt.has("sub") else "d", spec.scale_kind)
    sections.append(in_order(_padded(scale[:, :groups], rows, groups)))
    if spec.zero_kind and spec.fraction:
        sections.append(_by_quads(np.full((rows, groups), fmt.zero, np.float16)))
    elif spec.zero_kind:
        below = (1 << fmt.code_bits - 1) if d.integer and fmt.has("z") else 0
        zero = _side(spec, weight, "m" if fmt.has("m") else "z", spec.zero_kind, below,
                     fmt.min_sign if fmt.has("m") else 1)
        sections.append(_by_quads(_padded(zero[:, :groups], rows, groups)))
    if fmt.has("sub"):
        factor = _side(spec, weight, "d", "f32")
        sections.append(_by_quads(_padded(factor, rows, 1)))
    if spec.table_entries:
        sections.append(_table(spec, weight).view(np.uint8))
    if spec.columns:
        # whole weights: what int4 activations leave out; a column that is named twice counts once
        places = weight.fields["qc"].reshape(-1).astype(np.int64)
        halves = weight.dequantize()[:, places].astype(np.float16)
        halves[:, 1:][:, places[1:] == places[:-1]] = 0
        sections += _code_planes(_padded(halves.view(np.uint16), rows, spec.columns),
                                 DECODINGS["half"])
        sections += [weight.fields["qc"].reshape(-1).view(np.uint8),
                     weight.fields["qv"].reshape(-1).view(np.uint8)]
    return np.concatenate(sections)


def gemm_bytes(spec: GemmSpec, n: int, k: int) -> int:
    """Bytes of :func:`pack_gemm` of a weight [n, k]."""
    rows, columns = up(n, COLUMNS), up(k, spec.padding)
    groups = columns // spec.group if spec.group else 1
    d = spec.decoding
    total = sum(words for _, _, words in d.planes) * columns // d.step * rows * 2
    total += rows * groups * (spec.scale_bytes + spec.zero_bytes)
    total += 4 * rows * spec.format.has("sub") + 2 * rows * spec.columns
    total += 2 * max(1 << spec.format.code_bits, 8) if spec.table_entries else 0
    return total + 2 * spec.columns * (1 + n)


def columns_at(spec: GemmSpec, n: int, k: int) -> int:
    """Where :func:`pack_gemm` has the uint16 places of the columns apart, in bytes."""
    return gemm_bytes(spec, n, k) - 2 * spec.columns * (1 + n)


def _table(spec: GemmSpec, weight: QuantizedTensor) -> npt.NDArray[np.float16]:
    """f16 [2^bits]: what the codes stand for, a power of two of the scales included."""
    fmt = spec.format
    if fmt.has("lut"):
        values: Array = weight.fields["lut"].reshape(-1).view(np.float16).astype(np.float32)
    elif fmt.table is None and fmt.values is None and fmt.minifloat is None:
        values = np.arange(1 << fmt.code_bits) - np.float32(fmt.zero)
    else:
        values = fmt.levels
    if spec.scaled_table:
        values = values * np.float32(fmt.scale_factor)
    table = np.zeros(max(1 << fmt.code_bits, 8), np.float16)
    table[: len(values)] = values.astype(np.float16)
    return table


# -- and back -------------------------------------------------------------------------------------


def _unplane(data: Array, blocks: int, steps: int, each: int) -> Array:
    """uint32 [blocks, steps, lanes, words of a step]: the inverse of :func:`_plane`."""
    lined = data.view(np.uint32).reshape(blocks, steps * each // 4, 32, 4).transpose(0, 2, 1, 3)
    words: Array = lined.reshape(blocks, 32, steps, each).transpose(0, 2, 1, 3)
    return words


def _unwords(words: Array, bits: int) -> Array:
    """uint32 [..., 32 / bits]: the fields of words, lowest first."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields: Array = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return fields


def _unpairs(words: Array, bits: int) -> Array:
    """[blocks, steps, lanes, 8 tiles, 4 codes]: the inverse of :func:`_pairs`."""
    halves = _unwords(words, bits).reshape(*words.shape, 2, 16 // bits)
    return np.moveaxis(halves, -2, -1).reshape(*words.shape[:3], 8, 4)


def _unfragments(parts: Array, d: Decoding) -> Array:
    """[n, kept columns]: codes from [blocks, steps, lanes, tiles of 8 columns, codes]."""
    blocks, steps = parts.shape[:2]
    if d.sparse:
        split = parts.reshape(blocks, steps, 8, 4, 4, 2, 2, 2)
        lined = split.transpose(0, 4, 6, 2, 1, 5, 3, 7)
    else:  # quads, tiles, register and element of it
        split = parts.reshape(blocks, steps, 8, 4, 8, 2, d.step // 8)
        lined = split.transpose(0, 4, 2, 1, 5, 3, 6)
    codes: Array = lined.reshape(blocks * COLUMNS, -1)
    return codes


def _codes_of(planes: list[Array], d: Decoding) -> Array:
    """[blocks, steps, lanes, 8, codes]: the inverse of :func:`_code_planes` from words."""
    low = planes[0]
    shape = (*low.shape[:3], 8, -1)
    codes: Array
    if d.name == "half":
        codes = _unwords(low, 16).reshape(shape)
        return codes
    if d.name in ("affine8", "small8"):
        codes = _unwords(low, 8).reshape(shape)
        return codes
    if d.name.startswith(("affine", "small")):
        codes = _unpairs(low, 4)
        if d.bits > 5:
            codes = codes | _unpairs(planes[1], 2) << np.uint32(4)
        if d.bits & 1:
            codes = codes | _unpairs(planes[-1], 1) << np.uint32(d.bits - 1)
        return codes
    if d.name.startswith("table"):
        codes = _unwords(low, min(d.bits & ~1, 4)).reshape(shape)
        if d.name == "table3":
            codes = codes | _unwords(planes[1], 1).reshape(shape) << np.uint32(2)
        return codes
    if d.name == "signed8":
        codes = _unwords(low, 8).reshape(shape) ^ np.uint32(0x80)
        return codes
    if d.name == "signed4by4":
        codes = _unwords(low, 4).reshape(shape) ^ np.uint32(8)
        return codes
    pairs = _unwords(low, 4).reshape(*shape[:4], 4, 2)
    codes = np.concatenate([pairs[..., 1], pairs[..., 0]], axis=-1) ^ np.uint32(8)
    return codes


def unpack_gemm(spec: GemmSpec, shape: tuple[int, int],
                packed: npt.NDArray[np.uint8]) -> QuantizedTensor:
    """The exact inverse of :func:`pack_gemm` for kernels of f16 and int4 activations."""
    fmt, d, (n, k) = spec.format, spec.decoding, shape
    if packed.size != gemm_bytes(spec, n, k):
        raise BadInput(f"a {n}x{k} weight for tensor cores takes {gemm_bytes(spec, n, k)} bytes, "
                       f"but {packed.size} are here; pack it again", fmt.name)
    rows, columns = up(n, COLUMNS), up(k, spec.padding)
    blocks, steps = rows // COLUMNS, columns // d.step
    groups = columns // spec.group if spec.group else 1
    packed, at = np.ascontiguousarray(packed), 0

    def section(nbytes: int) -> Array:
        nonlocal at
        at += nbytes
        taken: Array = packed[at - nbytes : at].copy()
        return taken

    planes = [_unplane(section(blocks * steps * 128 * words), blocks, steps, words)
              for _, _, words in d.planes]
    nblocks = -(-k // fmt.block)
    fields: dict[str, Array] = {}

    def fill(name: str, values: Array) -> None:
        """A field from values [rows, elements of a row]: what is past K is padding, or zero."""
        field = fmt.field(name)
        want = field.shape(n, nblocks)
        flat = np.zeros((n, want[1] * want[2]), field.dtype)
        given = values[:n, : flat.shape[1]]
        flat[:, : given.shape[1]] = given
        fields[name] = flat.reshape(want)

    fill("codes", _unfragments(_codes_of(planes, d), d))
    if d.sparse:
        lanes = _unwords(planes[-1], 16).reshape(blocks, steps, 8, 2, 2, 2, 2)
        fours = lanes.transpose(0, 5, 3, 6, 2, 1, 4).reshape(rows, steps * 2)
        pairs = _unwords(fours, 4)[..., :4].reshape(rows, -1) ^ np.uint32(FIRST_TWO)
        fill("ix", np.stack([pairs & 3, pairs >> 2], axis=-1).reshape(rows, -1))
    if not spec.scale_kind:
        return QuantizedTensor(fmt, shape, fields)

    def side(kind: str, count: int) -> Array:
        """Bits [rows, count] of floats of a kind."""
        raw = section(rows * count * (4 if kind == "f32" else 2))
        bits = raw.view(np.uint32 if kind == "f32" else np.uint16)
        if d.sparse:
            bits = bits.reshape(blocks, count, 8, 4, 2).transpose(0, 3, 4, 2, 1)
        else:
            bits = bits.reshape(blocks, count, 4, 8, 2).transpose(0, 3, 2, 4, 1)
        lined: Array = bits.reshape(rows, count)
        return lined

    def restored(name: str, bits: Array, kind: str, sign: int = 1) -> None:
        """A field from the floats that stand for it exactly."""
        number, values = fmt.field(name).number, np.float32(sign) * as_float32(kind, bits)
        if number in MINIFLOATS:
            codes = np.zeros(1 << 16, np.uint8)
            every = np.arange(1 << MINIFLOATS[number].bits)
            codes[float_bits(MINIFLOATS[number].values(every), kind)] = every
            fill(name, codes[bits])
        elif number:
            fill(name, bits if number == kind and sign == 1 else float_bits(values, number))
        else:
            fill(name, values.astype(np.int64))

    scale = side(spec.scale_kind, groups)
    if fmt.has("e"):
        fill("e", scale >> np.uint16(7) & np.uint16(0xFF))
    else:
        restored("sub" if fmt.has("sub") else "d", scale, spec.scale_kind)
    if spec.zero_kind:
        zero = side(spec.zero_kind, groups)
        if fmt.has("m"):
            restored("m", zero, spec.zero_kind, fmt.min_sign)
        elif fmt.has("z"):
            restored("z", zero, spec.zero_kind)
    if fmt.has("sub"):
        restored("d", side("f32", 1), "f32")
    if spec.columns:
        section(2 * rows * spec.columns)  # halves: what codes and values of the columns give
        fields["qc"] = section(2 * spec.columns).view(np.uint16).reshape(1, 1, -1)
        fields["qv"] = section(2 * n * spec.columns).view(np.uint16).reshape(n, 1, -1)
    if fmt.has("lut"):
        count = fmt.field("lut").count
        fields["lut"] = section(2 * max(count, 8)).view(np.uint16)[:count].reshape(1, 1, count)
    return QuantizedTensor(fmt, shape, fields)
