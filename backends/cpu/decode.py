"""How a kernel reads one K-block: the bridge from a format row to the statements of a template.

A K-block is cut into *segments* of at most 32 weights that share one scale and one activation
scale. A segment is read in *steps* of 4 weights: one vector of 16 rows x 4 codes, which is what a
byte dot product takes. Everything here is derived from the format row and the layout; adding a
format adds nothing to this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qigen.formats.algebra import Field, Format
from qigen.formats.layout import Layout, field_offsets, field_planes, row_offsets
from qigen.formats.words import ENTRY

ACTIVATION_GROUP = 32
"""Activations are quantized in groups of this many values along K."""

_WORD_INSTRUCTIONS = 8  # to copy an entry of a dictionary behind the one before

STEP = 4
"""Weights of one row that a byte dot product consumes."""


@dataclass(frozen=True)
class PlaneRead:
    """Bits of a step (or of one field element) inside a word of 16 lanes.

    ``right`` is the shift to the right (negative: to the left) that brings the bits to their place
    ``low`` in the code; ``mask`` keeps them (a byte mask for codes, a lane mask for fields).
    """

    word: str
    offset: int
    lane_bits: int
    load: bool
    right: int
    mask: int
    masked: bool


@dataclass(frozen=True)
class Kept:
    """A weight that a mask keeps: byte ``byte`` of the vector ``codes`` of kept codes, which goes
    to the place that ``place`` reads, less 32 bits for every step of the M weights before."""

    codes: int
    byte: int
    place: tuple[PlaneRead, ...]
    before: int


@dataclass(frozen=True)
class Stream:
    """The codes of the M weights that a bitmap describes, taken one by one in each row.

    ``bitmap`` and ``words`` are read at the ``first`` step of the M; ``bit`` is the bit of the
    step's first weight. ``name`` is that of what is left of the words.
    """

    name: str
    first: bool
    last: bool
    bit: int
    bits: int
    bitmap: tuple[PlaneRead, ...]
    words: tuple[PlaneRead, ...]


@dataclass(frozen=True)
class Pick:
    """The kept codes of the M weights of a mask whose columns rows share: at the ``first`` step of
    the M they are brought into a vector of four codes, of which the bits of the selection, a scalar
    of ``bits`` bits at byte ``offset`` of the K-block, pick those of each step."""

    name: str
    first: bool
    step: int
    offset: int
    bits: int


@dataclass(frozen=True)
class Fetch:
    """Four kept codes and the activations that they are multiplied by: byte b of ``codes`` by the
    one of weight ``k`` + byte b of ``base`` + the place that ``places`` has in its byte b."""

    k: int
    codes: Step
    places: Step
    base: int


@dataclass(frozen=True)
class Step:
    """Weights ``k .. k+3`` of the K-block for 16 rows; ``digit`` is the base-3 digit to take.

    Of a masked format, ``packed`` are the steps of kept codes that this step is the first to need
    (their ``k`` counts kept codes), and ``kept`` the weights that may fall into it; ``stream``
    takes their place where a bitmap says what is kept, ``pick`` goes with them where rows share the
    columns of what is kept.
    """

    k: int
    reads: tuple[PlaneRead, ...]
    digit: int | None
    packed: tuple[Step, ...] = ()
    kept: tuple[Kept, ...] = ()
    stream: Stream | None = None
    pick: Pick | None = None
    row: bool = False
    """Whether the codes lie expanded, row by row: those of words of a dictionary."""


@dataclass(frozen=True)
class Outlier:
    """An outlier of the 16 rows: its place in the block that begins at weight ``k``, its value."""

    k: int
    place: tuple[PlaneRead, ...]
    value: tuple[PlaneRead, ...]


@dataclass(frozen=True)
class VectorRead:
    """Weights ``k .. k + vector - 1``: the codes of all books."""

    k: int
    codes: tuple[tuple[PlaneRead, ...], ...]


@dataclass(frozen=True)
class ScaleRead:
    """Field elements that make the scale and minimum of a segment, by field name.

    ``number`` is the kind of float, '' for integers.
    """

    name: str
    reads: tuple[PlaneRead, ...]
    signed: bool
    number: str = ""


@dataclass(frozen=True)
class Segment:
    """Steps that share one scale; ``group`` counts the segments of the K-block's scale groups."""

    k: int
    length: int
    group: int
    new_group: bool
    steps: tuple[Step, ...]
    fields: tuple[ScaleRead, ...]
    fetches: tuple[Fetch, ...] = ()
    """The kept codes of a masked format, for a kernel that fetches activations by their places."""


@dataclass(frozen=True)
class DecodePlan:
    """All that a template needs to read one K-block of a format."""

    format: Format
    layout: Layout
    kblock: int
    segments: tuple[Segment, ...]
    segment_length: int
    masks: tuple[int, ...]
    lane_masks: tuple[int, ...]
    row: tuple[ScaleRead, ...] = ()
    """Row fields with one element, read once a row-block."""
    row_lut: int | None = None
    """Byte offset in the row-block of a table that is a row field."""
    outliers: tuple[Outlier, ...] = ()
    vectors: tuple[VectorRead, ...] = ()
    words: tuple[tuple[PlaneRead, ...], ...] = ()
    """The words of every source block of the K-block, one after the other."""
    word_masks: tuple[int, ...] = ()

    @property
    def fetches(self) -> bool:
        """Whether kernels of one token fetch activations by the places of the kept codes."""
        return self.format.dot_places

    def turns(self, weights: int) -> tuple[tuple[Segment, ...], ...]:
        """The segments in parts of ``weights`` weights, each of which loads all that it reads; one
        part where what is left of a word goes on (digits, bitmaps) or places are shared."""
        f = self.format
        if f.base3 or f.mask or f.words or self.kblock <= weights or self.kblock % weights:
            return (self.segments,)
        parts = []
        for first in range(0, self.kblock, weights):
            seen: set[str] = set()
            part = [s for s in self.segments if first <= s.k < first + weights]
            part[0] = replace(part[0], new_group=True)
            parts.append(tuple(
                replace(s, steps=tuple(replace(t, reads=_loaded(t.reads, seen)) for t in s.steps),
                        fields=tuple(replace(x, reads=_loaded(x.reads, seen)) for x in s.fields)
                        if s.new_group else s.fields)
                for s in part
            ))
        return tuple(parts)

    @property
    def row_stride(self) -> int:
        """Bytes from the expanded codes of a row to those of the next: the last entry of a row
        may reach that far."""
        return self.kblock + ENTRY if self.words else 0

    @property
    def has_minimum(self) -> bool:
        """Whether an integer kernel adds a product of the sum of the activations: a minimum, a zero
        point that is data, or a zero that is no integer."""
        names = {f.name for f in self.format.fields}
        return bool(names & {"m", "dmin", "z"}) or self.format.zero != int(self.format.zero)

    @property
    def min_sign(self) -> int:
        """The sign of that product."""
        return self.format.min_sign if self.format.has("m") or self.format.has("dmin") else -1

    @property
    def unpack_instructions(self) -> int:
        """Vector instructions that turn one K-block's words into step vectors (cost model)."""
        count = 0
        count += 16 * _WORD_INSTRUCTIONS * len(self.words)
        for segment in self.segments:
            for step in segment.steps:
                if step.digit is not None:
                    count += 6
                    continue
                for i, read in enumerate(step.reads):
                    count += (read.right != 0) + (read.masked or i > 0)
                count += self.format.byte_table is not None
                count += 5 * len(step.kept) + (step.pick is not None)
                if step.stream is not None:
                    count += STEP * (5 + 4 * len(step.stream.words))
        return count

    @property
    def scale_instructions(self) -> int:
        """Vector instructions that make the scales and minima of one K-block (cost model)."""
        count = 0
        for segment in self.segments:
            if not segment.new_group:
                continue
            for scale in segment.fields:
                count += 1 + sum((r.right != 0) + r.masked for r in scale.reads)
            count += 2 * (len(segment.fields) > 1)
        return count


def _loaded(reads: tuple[PlaneRead, ...], seen: set[str]) -> tuple[PlaneRead, ...]:
    """The reads, which load the words that are not in ``seen``; they are added to it."""
    found = tuple(replace(read, load=read.word not in seen) for read in reads)
    seen.update(read.word for read in reads)
    return found


def _lane_reads(
    format: Format,
    field: Field,
    block: int,
    element: int,
    offsets: dict[tuple[str, int, int], int],
    seen: set[str],
) -> tuple[PlaneRead, ...]:
    """Reads of one element of a field in lane order (scales and minima)."""
    reads = []
    for plane in field_planes(format, field):
        bit = element * plane.bits
        word = bit // plane.word_bits
        name = f"{field.name}{block}_{plane.index}_{word}"
        reads.append(
            PlaneRead(
                word=name,
                offset=offsets[field.name, block, plane.index] + word * 2 * plane.word_bits,
                lane_bits=plane.word_bits,
                load=name not in seen,
                right=bit % plane.word_bits - plane.low,
                mask=((1 << plane.bits) - 1) << plane.low,
                masked=plane.bits != plane.word_bits,
            )
        )
        seen.add(name)
    return tuple(reads)


def _byte_reads(
    format: Format,
    field: Field,
    block: int,
    element: int,
    offsets: dict[tuple[str, int, int], int],
    seen: set[str],
) -> tuple[PlaneRead, ...]:
    """Reads of one element of a field that lies in dot order, as an integer of every row."""
    step = _code_step(format, field, block, element // STEP * STEP, offsets, seen)
    return tuple(
        replace(read, right=read.right + 8 * (element % STEP), masked=True) for read in step.reads
    )


def _fetches(
    format: Format,
    block: int,
    k: int,
    length: int,
    offsets: dict[tuple[str, int, int], int],
    seen: set[str],
) -> tuple[Fetch, ...]:
    """The kept codes of weights ``k .. k + length - 1`` of a block."""
    assert format.mask is not None
    keep, of = format.mask
    codes, places = format.field("codes"), format.field("ix")
    found = []
    for e in range(k // of * keep, (k + length) // of * keep, STEP):
        step = _code_step(format, codes, block, e, offsets, seen)
        at = _code_step(format, places, block, e, offsets, seen)
        base = sum(of * ((e + b) // keep - e // keep) << 8 * b for b in range(STEP))
        found.append(Fetch(block * format.block + e // keep * of, step, at, base))
    return tuple(found)


def _code_step(
    format: Format,
    field: Field,
    block: int,
    k: int,
    offsets: dict[tuple[str, int, int], int],
    seen: set[str],
) -> Step:
    """The step that holds weights ``k .. k+3`` of a source block, in dot order."""
    if format.base3:
        # ggml's TQ1_0: 32 bytes of 5 digits, 16 bytes of 5 digits, 4 bytes of 4 digits
        if k < 160:
            word, digit = (k % 32) // STEP, k // 32
        elif k < 240:
            word, digit = 8 + ((k - 160) % 16) // STEP, (k - 160) // 16
        else:
            word, digit = 12, (k - 240) // STEP
        name = f"{field.name}{block}_0_{word}"
        read = PlaneRead(
            name, offsets[field.name, block, 0] + 64 * word, 32, name not in seen, 0, 0xFF, False
        )
        seen.add(name)
        return Step(block * format.block + k, (read,), digit)
    reads = []
    for plane in field_planes(format, field):
        per_word = 32 // plane.bits
        word = k // per_word
        slot = (k % per_word) // STEP
        name = f"{field.name}{block}_{plane.index}_{word}"
        reads.append(
            PlaneRead(
                word=name,
                offset=offsets[field.name, block, plane.index] + 64 * word,
                lane_bits=32,
                load=name not in seen,
                right=plane.bits * slot - plane.low,
                mask=((1 << plane.bits) - 1) << plane.low,
                masked=plane.bits != 8,
            )
        )
        seen.add(name)
    return Step(block * format.block + k, tuple(reads), None)


def _masked_step(
    format: Format,
    block: int,
    k: int,
    offsets: dict[tuple[str, int, int], int],
    seen: set[str],
) -> Step:
    """The step of weights ``k .. k+3`` of a block of which a mask keeps some."""
    assert format.mask is not None
    keep, of = format.mask
    if format.has("bm"):
        return _bitmap_step(format, block, k, offsets, seen)
    codes, places = format.field("codes"), format.field("ix")
    packed, kept = [], []
    pick = None
    if format.sharing:
        group, bits = k // of, format.field("vm").bits
        pick = Pick(f"{block}_{group}", k % of == 0, k % of // STEP,
                    offsets["vm", block, 0] + group * bits // 8, bits)  # fmt: skip
        if not pick.first:
            return Step(block * format.block + k, (), None, pick=pick)
    first_code = block * codes.count
    for e in range(k // of * keep, k // of * keep + keep):
        at = e // STEP * STEP
        name = f"packed {first_code + at}"
        if name not in seen:
            seen.add(name)
            step = _code_step(format, codes, block, at, offsets, seen)
            packed.append(replace(step, k=first_code + at))
        read = _byte_reads if format.dot_places else _lane_reads
        place = read(format, places, block, e, offsets, seen)
        kept.append(Kept(first_code + at, e % STEP, place, k % of // STEP * 32))
    return Step(block * format.block + k, (), None, tuple(packed), tuple(kept), pick=pick)


def _bitmap_step(
    format: Format,
    block: int,
    k: int,
    offsets: dict[tuple[str, int, int], int],
    seen: set[str],
) -> Step:
    """The step of weights ``k .. k+3`` of a block of which a bitmap keeps some."""
    assert format.mask is not None
    keep, of = format.mask
    codes, group = format.field("codes"), k // of
    count = keep * codes.bits // 32
    at = offsets["codes", block, 0]
    first = k % of == 0
    stream = Stream(
        f"{block}_{group}",
        first,
        k % of == of - STEP,
        k % of,
        codes.bits,
        _lane_reads(format, format.field("bm"), block, group, offsets,
                    seen if first else set()),
        tuple(
            PlaneRead(f"codes{block}_{group}_{i}", at + 64 * (group * count + i), 32, True, 0, 0,
                      False)
            for i in range(count)
        ),
    )  # fmt: skip
    return Step(block * format.block + k, (), None, stream=stream)


def decode_plan(format: Format, layout: Layout) -> DecodePlan:
    """The decode plan of a quantized format (``float_kind`` is None) in a layout."""
    assert format.float_kind is None, f"{format.name} holds floats: nothing to decode"
    offsets = field_offsets(format, layout)
    codes = next(f for f in format.fields if f.name == "codes")
    apart = ("codes", "lut", "ix", "bm", "vm", "oc", "ov")
    others = [f for f in format.block_fields if f.name not in apart]
    length = min(format.group, ACTIVATION_GROUP)
    seen: set[str] = set()
    seen_of_fetches: set[str] = set()
    segments = []
    outliers: list[Outlier] = []
    vectors: list[VectorRead] = []
    words: list[tuple[PlaneRead, ...]] = []
    for block in range(layout.blocks):
        if format.vector:
            books = codes.count * format.vector // format.block
            vectors += [
                VectorRead(
                    block * format.block + v * format.vector,
                    tuple(
                        _lane_reads(format, codes, block, v * books + i, offsets, seen)
                        for i in range(books)
                    ),
                )
                for v in range(format.block // format.vector)
            ]
            continue
        words += [
            _lane_reads(format, codes, block, i, offsets, seen) for i in range(format.words)
        ]
        for k in range(0, format.block, length):
            group = k // format.group
            new_group = k % format.group == 0
            steps = tuple(
                Step(block * format.block + j, (), None, row=True)
                if format.words
                else _masked_step(format, block, j, offsets, seen)
                if format.mask
                else _code_step(format, codes, block, j, offsets, seen)
                for j in range(k, k + length, STEP)
            )
            fields = tuple(
                ScaleRead(
                    f.name,
                    _lane_reads(
                        format,
                        f,
                        block,
                        group * f.count // (format.block // format.group),
                        offsets,
                        seen,
                    ),
                    f.name == "sub" and format.sub_signed,
                    f.number,
                )
                for f in others
            )
            segments.append(
                Segment(
                    block * format.block + k,
                    length,
                    block * (format.block // format.group) + group,
                    new_group,
                    steps,
                    fields,
                    _fetches(format, block, k, length, offsets, seen_of_fetches)
                    if format.dot_places
                    else (),
                )
            )
        if format.has("oc"):
            outliers += [
                Outlier(
                    block * format.block,
                    _lane_reads(format, format.field("oc"), block, j, offsets, seen),
                    _lane_reads(format, format.field("ov"), block, j, offsets, seen),
                )
                for j in range(format.field("oc").count)
            ]
    steps_ = [t for s in segments for t in s.steps]
    steps_ += [p for t in steps_ for p in t.packed]
    steps_ += [t for s in segments for p in s.fetches for t in (p.codes, p.places)]
    masks = sorted({r.mask for t in steps_ for r in t.reads if r.masked})
    lane_reads = [r for s in segments for f in s.fields if not f.signed for r in f.reads]
    lane_reads += [r for t in steps_ for kept in t.kept for r in kept.place]
    lane_reads += [r for t in steps_ if t.stream for r in t.stream.bitmap]
    lane_reads += [r for o in outliers for r in o.place]
    lane_reads += [r for v in vectors for reads in v.codes for r in reads]
    lane_masks = sorted({r.mask for r in lane_reads if r.masked})
    return DecodePlan(
        format, layout, layout.blocks * format.block, tuple(segments), length,
        tuple(masks), tuple(lane_masks), *_row_reads(format, layout), tuple(outliers),
        tuple(vectors), tuple(words), tuple(sorted({r.mask for w in words for r in w if r.masked})),
    )


def _row_reads(format: Format, layout: Layout) -> tuple[tuple[ScaleRead, ...], int | None]:
    """(reads of row fields that are one word a row, where a row's table lies)."""
    offsets = row_offsets(format, layout)
    reads = []
    for field in format.fields:
        if field.scope == "row" and field.name in ("d", "m", "z"):
            (plane,) = field_planes(format, field)
            read = PlaneRead(f"row_{field.name}", offsets[field.name, 0], plane.word_bits, True, 0,
                             0, False)
            reads.append(ScaleRead(field.name, (read,), False, field.number))
    return tuple(reads), offsets.get(("lut", 0))
