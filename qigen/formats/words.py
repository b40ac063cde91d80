"""Words of a dictionary: codes of a fixed number of bits for runs of weights of various lengths.

QMoE (Frantar and Alistarh 2023, arXiv:2310.16795) takes ternary weights below one bit: nearly nine
of ten are zeros, so that the most probable sequences make a dictionary, whose words have 16 bits.
Its stream of words is read from the start of a row. Here every block of weights has a number of
words of its own, so that any block can be found without those before.

An entry of a dictionary is ``ENTRY`` bytes: the length of the sequence, then its first codes. A
sequence that is longer goes on with zeros. Entry 0 is the empty sequence; it fills up the words
that a block does not need. With every sequence the dictionary has its beginnings, too: so the
longest match from the left is always found, one code after the other.
"""

from __future__ import annotations

import functools
import heapq

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]

ENTRY = 32
"""Bytes of an entry, its length included."""

LONGEST = 255

ZEROS = 0.885
"""The share of zeros that a dictionary is made for, as QMoE has it."""


@functools.cache
def most_probable(bits: int, zero: int = 1, levels: int = 3, zeros: float = ZEROS) -> Codes:
    """uint8 [2^bits, ENTRY]: the most probable sequences of independent codes below ``levels``,
    where ``zero`` has the probability ``zeros`` and the others share the rest; sequences longer
    than an entry go on with zeros."""
    share = [(1 - zeros) / (levels - 1)] * levels
    share[zero] = zeros
    table = np.full((1 << bits, ENTRY), zero, np.uint8)
    table[0, 0] = 0
    heap: list[tuple[float, tuple[int, ...]]] = [(-p, (code,)) for code, p in enumerate(share)]
    heapq.heapify(heap)
    for i in range(1, 1 << bits):
        p, sequence = heapq.heappop(heap)
        table[i, 0] = len(sequence)
        head = sequence[: ENTRY - 1]
        table[i, 1 : 1 + len(head)] = head
        if len(sequence) == LONGEST:
            continue
        for code in range(levels) if len(sequence) < ENTRY - 1 else (zero,):
            heapq.heappush(heap, (p * share[code], (*sequence, code)))
    table.setflags(write=False)
    return table


def _trie(table: Codes, zero: int, levels: int) -> npt.NDArray[np.int32]:
    """int32 [entries, levels]: the entry that an entry and one more code make, -1 if none does."""
    found = {}
    for i, entry in enumerate(table):
        length = int(entry[0])
        head = bytes(entry[1 : 1 + min(length, ENTRY - 1)])
        found[head + bytes([zero]) * (length - len(head))] = i
    children = np.full((len(table), levels), -1, np.int32)
    for sequence, i in found.items():
        if sequence and sequence[:-1] in found:
            children[found[sequence[:-1]], sequence[-1]] = i
    return children


def encoded(codes: Codes, table: Codes, zero: int = 1,
            levels: int = 3) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(words int32 [blocks, most], how many of them each block needs) of ``codes`` [blocks, block],
    by the longest match; what a block does not need is the empty word."""
    children = _trie(table, zero, levels)
    blocks, length = codes.shape
    words = np.zeros((blocks, length), np.int32)
    count = np.zeros(blocks, np.int64)
    node = np.zeros(blocks, np.int32)
    each = np.arange(blocks)
    for j in range(length):
        code = codes[:, j]
        onward = children[node, code]
        ends = onward < 0
        words[each[ends], count[ends]] = node[ends]
        count += ends
        node = np.where(ends, children[0, code], onward)
    if length:
        words[each, count] = node
        count += 1
    return words[:, : int(count.max(initial=0))], count


def fitted(codes: Codes, magnitude: npt.NDArray[np.float32], table: Codes, most: int,
           zero: int = 1) -> npt.NDArray[np.int32]:
    """int32 [blocks, most]: words of ``codes`` [blocks, block]. Where a block would need more, the
    codes of least ``magnitude`` become zeros, some at a time, until ``most`` words are enough."""
    codes = codes.copy()
    blocks = len(codes)
    out = np.zeros((blocks, most), np.int32)
    left = np.arange(blocks)
    while len(left):
        words, count = encoded(codes[left], table, zero)
        good = count <= most
        width = min(most, words.shape[1])
        out[left[good], :width] = words[good, :width]
        left, over = left[~good], count[~good] - most
        for block, excess in zip(left.tolist(), over.tolist(), strict=True):
            there = np.flatnonzero(codes[block] != zero)
            least = there[np.argsort(magnitude[block, there], kind="stable")]
            codes[block, least[: max(1, int(excess))]] = zero
    return out


def expanded_words(words: npt.NDArray[np.integer], table: Codes, block: int,
                   zero: int) -> Codes:
    """uint8 [..., block]: the codes that ``words`` [..., W] stand for, one after the other."""
    lengths = table[words, 0].astype(np.int64)
    starts = np.minimum(np.cumsum(lengths, axis=-1) - lengths, block)
    flat = words.reshape(-1, words.shape[-1])
    out = np.full((len(flat), block + ENTRY), zero, np.uint8)
    each = np.arange(len(flat))[:, None]
    place = np.arange(ENTRY - 1)
    for i in range(words.shape[-1]):
        out[each, starts.reshape(flat.shape)[:, i : i + 1] + place] = table[flat[:, i], 1:]
    return out[:, :block].reshape(*words.shape[:-1], block)
