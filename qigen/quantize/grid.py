"""The values that a format offers to every weight, group by group, with its scales fixed.

A method that looks at more than one weight at a time finds the scales first (by
:mod:`qigen.quantize.rtn`, with or without a search) and then chooses codes; this is what it asks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.tensor import QuantizedTensor, as_float32, group_values, mask_field
from qigen.quantize.rtn import Clip, blocks_of_codes, coded, quantize_rtn
from qigen.quantize.tables import kmeans

_TABLE_STEPS = 60


def plain(fmt: Format) -> Format:
    """The format without its mask and what it keeps apart: its codes, scales and zeros alone."""
    fields = tuple(replace(f, count=fmt.block) if f.name == "codes" and fmt.mask else f
                   for f in fmt.fields if f.name not in ("ix", "bm", "vm", "oc", "ov", "qc", "qv"))
    return replace(fmt, fields=fields, mask=None)


class Grid:
    """The values of a :func:`plain` format for a weight [N, K].

    ``fit`` finds scales for columns of whole blocks; ``nearest`` rounds one column. A group's
    values are scale * (level - zero) + least, all float32 [N], or a table [N, 2^bits].
    """

    def __init__(self, w: Float32Array, fmt: Format, clip: Clip | None) -> None:
        if fmt.float_kind or not fmt.single_codes:
            raise Unsupported("this method rounds weight by weight to codes; take a format of "
                              "codes with scales", fmt.name)
        self.fmt = fmt
        self.clip = clip
        self.n, self.k = w.shape
        # where tables are data, those of k-means, which a search by groups only begins with
        first = kmeans(w, fmt, clip.importance, steps=_TABLE_STEPS) if (
            clip is not None and fmt.has("lut")) else quantize_rtn(w, fmt, clip)
        self.fields: dict[str, Array] = {name: array.copy() for name, array in first.fields.items()}
        self.table: Float32Array | None = None
        if fmt.has("lut") and fmt.field("lut").scope == "tensor":
            self.table = as_float32("f16", self.fields["lut"]).reshape(-1)
        self.codes = np.zeros((self.k, self.n), np.uint8)  # by column
        side = [f for f in fmt.fields if f.name != "codes"]
        self.refits = all(f.scope == "block" for f in side if f.name != "lut") and all(
            f.scope != "row" for f in side)
        """Whether a block's scales follow from its own weights alone."""
        levels = fmt.levels if not fmt.has("lut") else np.zeros(0, np.float32)
        limit = fmt.minifloat.top if fmt.minifloat is not None else np.inf
        order = np.argsort(levels, kind="stable")
        self._order = order[np.abs(levels[order]) <= limit]
        self._ordered = levels[self._order]
        self._middles = (self._ordered[1:] + self._ordered[:-1]) / np.float32(2)
        self._even = (not fmt.has("lut") and fmt.minifloat is None and fmt.values is None
                      and fmt.table is None)
        self._expand(0, first.nblocks)

    def _expand(self, first: int, last: int) -> None:
        """Scales, zeros and minima of blocks [first, last) from the fields."""
        part = {f.name: self.fields[f.name][:, first:last] if f.scope == "block"
                else self.fields[f.name] for f in self.fmt.fields}
        scale, zero, least = group_values(self.fmt, part)
        groups = self.fmt.block // self.fmt.group
        total = self.fields["codes"].shape[1] * groups
        if first == 0 and last * groups == total:
            self._scale, self._zero, self._least = (
                np.zeros((total, self.n), np.float32) for _ in range(3))
        at = slice(first * groups, last * groups)
        for target, source in ((self._scale, scale), (self._zero, zero), (self._least, least)):
            wide = np.broadcast_to(source, (self.n, last - first, groups))
            target[at] = wide.reshape(self.n, -1).T
        if self.fmt.has("lut"):
            lut = as_float32("f16", self.fields["lut"])
            self._lut = np.broadcast_to(
                lut, (self.n, lut.shape[1], lut.shape[2])).transpose(1, 2, 0)

    def fit(self, x: Float32Array, block: int) -> None:
        """Find the scales of one block anew for its weights as they are now: x [N, its columns]."""
        start = block * self.fmt.block
        clip = self.clip.columns(start, start + x.shape[1]) if self.clip else None
        if clip is not None and self.fmt.has("lut") and self.table is None:
            part = kmeans(x, self.fmt, clip.importance, steps=_TABLE_STEPS).fields
        else:
            part = coded(x, self.fmt, self.table, clip)
        for field in self.fmt.fields:
            if field.scope == "block" and field.name != "codes":
                self.fields[field.name][:, block] = part[field.name].reshape(self.n, -1)
        self._expand(block, block + 1)

    def nearest(self, w: Float32Array, column: int) -> Float32Array:
        """float32 [N]: the values nearest to ``w`` [N] in a column, whose codes are kept."""
        group = column // self.fmt.group
        scale = self._scale[group]
        target = (w - self._least[group]) / np.where(scale == 0, 1, scale)
        target[scale == 0] = 0
        target += self._zero[group]
        if self._even:
            offset = np.float32(self.fmt.zero)
            code = np.rint(target + offset).clip(0, self.fmt.level_count - 1)
            values = code - offset
        elif self.fmt.has("lut"):
            lut = self._lut[column // self.fmt.block if self._lut.shape[0] > 1 else 0]
            code = (target > (lut[1:] + lut[:-1]) / np.float32(2)).sum(axis=0)
            values = np.take_along_axis(lut, code[None], axis=0)[0]
        else:
            at = np.searchsorted(self._middles, target)
            code, values = self._order[at], self._ordered[at]
        self.codes[column] = code
        values = (values - self._zero[group]) * scale + self._least[group]
        rounded: Float32Array = values.astype(np.float32, copy=False)
        return rounded

    def tensor(self) -> QuantizedTensor:
        """The weight with the codes chosen so far."""
        codes = blocks_of_codes(np.ascontiguousarray(self.codes.T), self.k, self.fmt)
        return QuantizedTensor(self.fmt, (self.n, self.k), {**self.fields, "codes": codes})


def with_parts(base: QuantizedTensor, fmt: Format, parts: dict[str, Array],
               kept: npt.NDArray[np.bool_] | None = None) -> QuantizedTensor:
    """``base`` (of the plain format) in ``fmt``, with ``parts`` for what is kept apart.

    ``kept`` [N, K] says which weights a mask keeps, N of every M in each row.
    """
    fields = dict(base.fields)
    if fmt.mask is not None:
        assert kept is not None
        keep, of = fmt.mask
        n, k = base.shape
        width = base.nblocks * fmt.block
        full = np.zeros((n, width), bool)
        full[:, :k] = kept
        # groups that are short, or past K, are filled up with places that hold zeros,
        # the same in all rows (which may share columns)
        missing = keep - full.reshape(n, -1, of).sum(axis=2, keepdims=True)
        empty = ~full.reshape(n, -1, of)
        fill = empty & (np.cumsum(empty, axis=2) <= missing)
        found = np.nonzero((full.reshape(n, -1, of) | fill).reshape(-1, of))[1]
        places = found.reshape(n, -1, keep)
        codes = np.full((n, width), fmt.hole, np.uint8)
        codes[:, :k] = np.where(kept, base.fields["codes"].reshape(n, -1)[:, :k], fmt.hole)
        chosen = np.take_along_axis(codes.reshape(n, -1, of), places, axis=2)
        count = fmt.field("codes").count
        fields["codes"] = chosen.reshape(n, -1, count)
        fields.update(mask_field(fmt, places.reshape(n, -1, count)))
    return QuantizedTensor(fmt, base.shape, {**fields, **parts})
