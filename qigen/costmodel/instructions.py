"""Vector instructions of a rendered kernel, by class.

The rendered source is a sequence of primitives (``vi_and``, ``vq_dot``, ...), and what a primitive
is made of is written in the header of its ISA. So both are read: a new format, ISA or template
needs nothing here. Three rules of the compilers are known: a load whose result is used as an
operand becomes part of the instruction that uses it, what is broadcast twice is loaded once, and a
constant stays in a register.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from qigen.backends.base import Isa
from qigen.backends.cpu.decode import ACTIVATION_GROUP
from qigen.backends.cpu.matmul import MatmulSpec, render_matmul
from qigen.codegen.render import render

# Intrinsics without their prefix (_mm512_ ...) by class; the first that matches counts.
_INTRINSICS: tuple[tuple[str, str | None], ...] = (
    (r"cast|setzero|setr|undefined|cvtss|cvtsi", None),
    (r"set1", "broadcast"),
    (r"broadcast", "shuffle"),
    (r"(maskz?_?)?loadu?_|(mask_)?i32gather", "load"),
    (r"(mask_?)?store[ul]?_", "store"),
    (r"dpbusd|dpbf16|maddubs|madd_", "dot"),
    (r"fn?madd|(mul|add|sub|div|max|min)_ps|round|reduce|sqrt|scalef|mul_ep|mullo", "fma"),
    (r"cvt|packu?s", "convert"),
    (r"s[rl]l|sra|avg", "shift"),
    (r"(mask_)?shuffle|permute|unpack|extract|insert|(mask_)?blend", "shuffle"),
    (r"and|or|xor|ternarylogic|cmp|test|mov|mask_(mov|and|sub)|kor", "logic"),
    (r"add_epi|sub|abs|sign|min_ep|max_ep", "logic"),
    (r"prefetch", "load"),
)

# NEON intrinsics without their v (addq_f32 ...).
_NEON: tuple[tuple[str, str | None], ...] = (
    (r"reinterpret|get|combine", None),
    (r"dup", "broadcast"),
    (r"ld[14]", "load"),
    (r"st1", "store"),
    (r"dotq|usdotq|bfdotq|ml[as]l|mull|pad", "dot"),
    (r"fm[as]q|(mul|add|sub|div|max|min|sqrt|rndn?|abs)v?q?_f|mulq|ml[as]q", "fma"),
    (r"cvt|movl|movn|uzp", "convert"),
    (r"sh[rl]|sri", "shift"),
    (r"qtbl|zip|ext", "shuffle"),
    (r"and|orr|eor|bic|bsl|c(lt|le|eq|ge|gt)z?q|neg|mvn|maxv|addv|maxq|minq|addq|subq", "logic"),
)

# Plain C++ primitives (generic vectors): what one vector register of theirs takes, by name.
_PORTABLE: tuple[tuple[str, str | None], ...] = (
    (r"v[fi]_zero|vq_init|vq_finish|vf_from_bits|vq_flush|v[fb]_table|v[fi]_part", None),
    (r"v[fi]_set1", "broadcast"),
    (r"vf_load_|vi_load_|vf_from_i32|vi_round|vi_store_|vf_store_f16", "convert"),
    (r"v[fi]_load", "load"),
    (r"v[fi]_store", "store"),
    (r"vf_", "fma"),
    (r"vq_", "dot"),
    (r"vi_s[rl][la]", "shift"),
    (r"vb_", "shuffle"),
    (r"vi_", "logic"),
    (r"prefetch", "load"),
)

_PLAIN_MULTIPLY = 3
"""Baseline x86-64 takes several instructions to multiply vectors of 32-bit integers."""

_TILES: dict[str, dict[str, float]] = {
    "vt_load": {"load": 16, "instructions": 8}, "vt_store": {"store": 16, "instructions": 16},
    "vt_dot_u8s8": {"tile": 16, "instructions": 1}, "vt_zero": {"instructions": 1},
    "vt_configure": {}, "vt_release": {},
}  # fmt: skip
"""What the instructions for whole tile registers take: a load for each row in 8 cycles, a store for
each in 16, and 16 cycles of the unit that multiplies (Intel, Optimization Reference Manual, chapter
on AMX). Not measured: no machine of ours has them."""

COMPUTE = ("dot", "fma", "logic", "shift", "shuffle", "convert")
"""Classes that need a vector port."""

Count: TypeAlias = defaultdict[str, float]
"""Class -> how many; also ``instructions``, ``stream`` and ``prefetch`` (see count_text)."""



def counted(counts: Mapping[str, float]) -> Count:
    """A count of its own with these numbers; classes that are not there count 0."""
    return defaultdict(float, counts)


_CALL = re.compile(r"\b(v[fiqbt]_\w+|prefetch)(?:<[^>]*>)?\(")
_NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|[0-9.]+(e-?[0-9]+)?)f?$|static_cast<int32_t>\(0x\w+\)$")


def _argument(text: str, start: int) -> str:
    """What stands in the parentheses that open just before ``start``."""
    depth, i = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        i += 1
    return text[start : i - 1]


def _block(text: str, start: int) -> tuple[str, int]:
    """The inside of the braces that open at or after ``start``, and where they close."""
    begin = text.index("{", start) + 1
    depth, i = 1, begin
    while depth:
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
    return text[begin : i - 1], i


def _classified(name: str, table: tuple[tuple[str, str | None], ...]) -> str | None:
    for pattern, kind in table:
        if re.match(pattern, name):
            return kind
    raise AssertionError(f"the cost model does not know what {name} costs")


@functools.cache
def primitives(isa: Isa) -> dict[str, Count]:
    """What each primitive of an ISA header is made of, by class (no folding yet)."""
    text = re.sub(r"//[^\n]*", "", render(isa.template))
    bodies = {}
    for found in re.finditer(r"QG_(?:INLINE|CALL)\s+\w+\s+(?!vt_)(\w+)\(", text):
        bodies[found[1]] = _block(text, found.end())[0]
    intrinsics = re.compile(
        r"\bv(?![fibq]_|next|prev)(\w+_(?:[sufp]|bf)(?:8|16|32|64))\("
        if isa.architecture == "aarch64"
        else r"_mm(?:256|512)?_(\w+)\("
    )
    table = _NEON if isa.architecture == "aarch64" else _INTRINSICS
    portable = not intrinsics.search(text)

    def expand(name: str) -> Count:
        if portable:
            kind = _classified(name, _PORTABLE) if _CALL.match(f"{name}(") else None
            each = _PLAIN_MULTIPLY * isa.dot_instructions if kind == "dot" else isa.vectors
            each *= 4 if name in ("vf_lookup4", "vf_small4", "vf_halves4", "vi_turn") else 1
            return counted({kind: each} if kind else {})
        count = counted({})
        for found in intrinsics.finditer(bodies[name]):
            kind = _classified(found[1], table)
            if kind and not _NUMBER.match(_argument(bodies[name], found.end())):
                count[kind] += 1
        for found in re.finditer(r"\b(\w+)(?:<[^>]*>)?\(", bodies[name]):
            if found[1] in bodies and found[1] != name:
                for kind, n in expand(found[1]).items():
                    count[kind] += n
        return count

    return {name: expand(name) for name in bodies}


def _function(text: str, name: str) -> str:
    """The body of a function of a rendered source."""
    found = re.search(rf"\b{name}\([^;{{]*\{{", text)
    assert found is not None, f"the kernel has no function {name}"
    return _block(text, found.end() - 1)[0]


def _loop(body: str) -> tuple[str, str, str]:
    """(header, inside, everything else) of the first loop of a function."""
    at = body.index("for (")
    header = _argument(body, at + 5)
    inside, end = _block(body, at + 5 + len(header))
    return header, inside, body[:at] + body[end:]


def _uses(text: str, names: set[str]) -> dict[str, list[str]]:
    """The primitive that each mention of a variable is an operand of ('' if of none), but for the
    first mention, which is its definition."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for token in re.finditer(r"\w+", text):
        if token[0] in names:
            before = re.search(
                r"(\w+)(?:<[^>]*>)?\((?:\w+, )?$", text[max(0, token.start() - 60) : token.start()]
            )
            found[token[0]].append(before[1] if before else "")
    return {name: mentions[1:] for name, mentions in found.items()}


def count_text(text: str, isa: Isa) -> Count:
    """Instructions of straight code, by class.

    ``load`` counts loads that take a port, whether alone or as the operand of another instruction,
    ``stream`` those among them that read whole words of the weights, ``prefetch`` prefetches;
    ``instructions`` counts what is issued, the loop's own handful not included.
    """
    table = primitives(isa)
    wide = isa.vectors == 1  # EVEX: shifts take operands from memory, and broadcast them
    count = counted({})
    words = dict(re.findall(r"\bv[fi] (\w+) = (v[fi]_load)\(", text))
    broadcast: Counter[str] = Counter()  # what is loaded into all lanes, once however often used
    folded = set()
    for found in _CALL.finditer(text):
        name = found[1]
        if name in _TILES:
            for kind, n in _TILES[name].items():
                count[kind] += n
            continue
        if name not in table or name in ("vi_load", "vf_load"):
            continue  # a function of the kernel itself; loads count by their uses, below
        argument = _argument(text, found.end())
        if name in ("vi_set1", "vf_set1"):
            if not _NUMBER.match(argument):
                broadcast[argument] += 1
                if wide and name == "vf_set1":
                    folded.add(argument)
            continue
        count["prefetch"] += name == "prefetch"
        for kind, n in table[name].items():
            if kind == "broadcast":
                broadcast[argument.rpartition(",")[2].strip()] += 1
                continue
            count[kind] += n
            # the load of a conversion is its operand
            count["instructions"] += n if kind != "load" or name == "prefetch" else 0
    for address, times in broadcast.items():
        count["load"] += 1
        count["instructions"] += not (address in folded and times == 1)
    uses = _uses(text, set(words))
    for name, load in words.items():
        shifts = sum(use in ("vi_srl", "vi_sll", "vi_sra") for use in uses[name])
        ands = uses[name].count("vi_and")
        n = table[load]["load"]
        if shifts + ands == len(uses[name]):
            loads = n * len(uses[name])
            count["instructions"] += 0 if wide else n * shifts
        else:
            loads = n
            count["instructions"] += n
        count["load"] += loads
        count["stream"] += loads
    inline = sum(m[1] in ("vi_load", "vf_load") for m in _CALL.finditer(text)) - len(words)
    count["load"] += inline * table["vf_load"]["load"]
    return count


@dataclass(frozen=True)
class KernelCounts:
    """Instructions of one tile of a kernel: of a K-block, and of what stands around the loop.

    ``unpack`` is what a kernel that unpacks weights into a panel spends on a K-block of a row-block
    once for all its tokens; ``panel`` a tile of an int8 kernel on a K-block of the panel.
    """

    kblock: Count
    unpack: Count
    around: Count
    panel: Count


LOOP = 5
"""Scalar instructions of a loop: pointers, the comparison and the jump."""


@functools.lru_cache(maxsize=4096)
def kernel_counts(spec: MatmulSpec, tokens: int, rows: int) -> KernelCounts:
    """The counts of the tile of ``tokens`` tokens and ``rows`` row-blocks."""
    text = re.sub(r"//[^\n]*", "", _rendered(replace(spec, tiles=(tokens,))))
    if spec.integer:
        unpack, panel, kblock = counted({}), counted({}), counted({})
        if replace(spec, tiles=(tokens,)).matrix:  # has tiles over panels only, a row-block each
            outside = _loop(_function(text, f"tile_panel_{tokens}x1"))[2]
        else:
            _, inside, outside = _loop(_function(text, f"tile_{tokens}x{rows}"))
            turns = rows if tokens == 1 else 1
            kblock = _turns(inside, text, spec, turns)
        if "tile_panel_" in text:
            body = _loop(_function(text, "unpack"))[1]
            unpack = _looped(body, spec.isa, 1)
            _expand(unpack, spec, body, text)
            groups = spec.format.block * spec.layout.blocks // ACTIVATION_GROUP
            if kblock:
                group = _loop(_function(text, f"tile_panel_{tokens}x{rows}"))[1]
            else:
                group = _loop(_function(text, f"tile_panel_{tokens}x1"))[1]
                groups *= rows
            panel = _looped(group, spec.isa, groups)
        return KernelCounts(kblock, unpack, count_text(outside, spec.isa), panel)
    if tokens == 1 and "void one_token(" in text:
        if "void find_entries(" in text:
            return _entries(spec, text)
        before, over_kblocks, rest = _function(text, "one_token").partition("for (int kb")
        _, inside, after = _loop(over_kblocks + rest)
        outside = before + after
        kblock = _turns(inside, text, spec, rows)
        return KernelCounts(kblock, counted({}), count_text(outside, spec.isa), counted({}))
    header, inside, outside = _loop(_function(text, f"fma_{tokens}"))
    unrolled = re.search(r"k \+= (\d+)", header)
    steps = spec.format.block * spec.layout.blocks / (2 if spec.activations == "bf16" else 1)
    kblock = _looped(inside, spec.isa, steps / (int(unrolled[1]) if unrolled else 1))
    row_block = _function(text, "row_block")
    unpack = counted({})
    if "decode(" in row_block:
        body = _function(text, "decode")
        unpack = _looped(body, spec.isa, 1)
        _expand(unpack, spec, body, text)
    for packing in re.findall(r"[^\n]*vi_pack_bf16[^\n]*", row_block):
        for kind, n in _looped(packing, spec.isa, steps).items():
            unpack[kind] += n
    return KernelCounts(kblock, unpack, count_text(outside, spec.isa), counted({}))


def _turns(rest: str, text: str, spec: MatmulSpec, rows: int) -> Count:
    """The counts of the loop over the K-blocks of a tile: of those in it, over ``rows`` row-blocks
    that take turns, and of the rest."""
    count = counted({})
    while "for (" in rest:
        _, inside, rest = _loop(rest)
        for kind, n in _looped(inside, spec.isa, rows).items():
            count[kind] += n
        _expand(count, spec, inside, text, rows)
    for kind, n in _looped(rest, spec.isa, 1).items():
        count[kind] += n
    _expand(count, spec, rest, text)
    return count


def _entries(spec: MatmulSpec, text: str) -> KernelCounts:
    """The counts of a kernel that reads the entries of codebooks in one piece, for one token."""
    kblock = count_text(_function(text, "find_entries"), spec.isa)
    _, inside, outside = _loop(_function(text, "fma_entries"))
    places = spec.format.field("codes").count * spec.layout.blocks
    for kind, n in _looped(inside, spec.isa, 4).items():  # 4 rows at a time
        kblock[kind] += n
    kblock["load"] += 16 * places
    kblock["instructions"] += 16 * places
    return KernelCounts(kblock, counted({}), count_text(outside, spec.isa), counted({}))


_WORD = {"instructions": 9.0, "load": 4.0, "store": 2.0}
"""What a word of a dictionary takes in a row: its entry is found, copied and measured."""


def _expand(count: Count, spec: MatmulSpec, caller: str, text: str, times: int = 1) -> None:
    """Adds what the expansion of words takes that ``caller``, run so often, asks for."""
    times *= caller.count("expand_words(")
    if times:
        words = 16 * spec.format.words * spec.layout.blocks
        once = count_text(_function(text, "expand_words"), spec.isa)
        for kind in {*once, *_WORD}:
            count[kind] += times * (once[kind] + words * _WORD.get(kind, 0.0))


def _looped(text: str, isa: Isa, times: float) -> Count:
    """The counts of ``times`` runs of a loop's inside."""
    once = count_text(text, isa)
    once["instructions"] += LOOP * (1 + text.count("for ("))
    return counted({kind: n * times for kind, n in once.items()})


@functools.lru_cache(maxsize=8)
def _rendered(spec: MatmulSpec) -> str:
    return render_matmul(spec, ("store",)).text
