"""Vector instructions of a rendered kernel, by class.

The rendered source is a sequence of primitives (``vi_and``, ``vq_dot``, ...), and what a primitive
is made of is written in the header of its ISA. So both are read: a new format, ISA or template
needs nothing here. Two rules of the compilers are known: a load whose result is used as an operand
becomes part of the instruction that uses it, and a constant stays in a register.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from qigen.backends.base import Isa
from qigen.backends.cpu.matmul import MatmulSpec, render_matmul
from qigen.codegen.render import render

# Intrinsics without their prefix (_mm512_ ...) by class; the first that matches counts.
_INTRINSICS: tuple[tuple[str, str | None], ...] = (
    (r"cast|setzero|undefined", None),
    (r"set1", "broadcast"),
    (r"broadcast", "shuffle"),
    (r"(maskz_)?loadu?_", "load"),
    (r"(mask_)?storeu?_", "store"),
    (r"dpbusd|dpbf16|maddubs|madd_", "dot"),
    (r"fn?madd|mul_ps|add_ps|sub_ps|div_ps|max_ps|min_ps|round|reduce", "fma"),
    (r"cvt|packs", "convert"),
    (r"s[rl]l|sra|avg", "shift"),
    (r"shuffle|permute|unpack|extract", "shuffle"),
    (r"and|or|xor|ternarylogic|add_epi|sub|abs|sign|min_ep|max_ep", "logic"),
    (r"prefetch", "load"),
)

# Plain C++ primitives (generic vectors): what one vector register of theirs takes, by name.
_PORTABLE: tuple[tuple[str, str | None], ...] = (
    (r"v[fi]_zero|vq_init|vq_finish|vf_from_bits|vq_flush|vb_table", None),
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

COMPUTE = ("dot", "fma", "logic", "shift", "shuffle", "convert")
"""Classes that need a vector port."""

Count = Counter[str]
"""Class -> how many; besides the classes of a machine's rates ``instructions`` and ``stream``."""

_CALL = re.compile(r"\b(v[fiqb]_\w+|prefetch)(?:<[^>]*>)?\(")
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


@functools.lru_cache(maxsize=None)
def primitives(isa: Isa) -> dict[str, Count]:
    """What each primitive of an ISA header is made of, by class (no folding yet)."""
    text = re.sub(r"//[^\n]*", "", render(isa.template))
    bodies = {}
    for found in re.finditer(r"QG_(?:INLINE|CALL)\s+\w+\s+(\w+)\(", text):
        bodies[found[1]] = _block(text, found.end())[0]
    intrinsics = re.compile(r"_mm(?:256|512)?_(\w+)\(")
    portable = not intrinsics.search(text)

    def expand(name: str) -> Count:
        if portable:
            kind = _classified(name, _PORTABLE) if _CALL.match(f"{name}(") else None
            each = isa.dot_instructions if kind == "dot" else isa.vectors
            return Count({kind: each} if kind else {})
        count = Count()
        for found in intrinsics.finditer(bodies[name]):
            kind = _classified(found[1], _INTRINSICS)
            if kind and not _NUMBER.match(_argument(bodies[name], found.end())):
                count[kind] += 1
        for found in re.finditer(r"\b(\w+)(?:<[^>]*>)?\(", bodies[name]):
            if found[1] in bodies:
                count.update(expand(found[1]))
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


def count_text(text: str, isa: Isa) -> Count:
    """Instructions of straight code, by class.

    ``load`` counts loads that take a port, whether alone or as the operand of another instruction,
    ``stream`` those among them that read whole words of the weights; ``instructions`` counts what is issued, the loop's own handful not included.
    """
    table = primitives(isa)
    wide = isa.vectors == 1  # EVEX: shifts take operands from memory, and broadcast them
    count: Count = Counter()
    words = re.findall(r"\b(?:const )?v[fi] (\w+) = (v[fi]_load)\(", text)
    for found in _CALL.finditer(text):
        name = found[1]
        if name not in table:
            continue  # a function of the kernel itself
        argument = _argument(text, found.end())
        cost = table[name]
        if name in ("vi_set1", "vf_set1"):
            if _NUMBER.match(argument):
                continue
            count["load"] += 1
            folded = wide and name == "vf_set1"
            count["instructions"] += not folded
            continue
        if name in ("vi_load", "vf_load"):
            continue  # by its uses, below
        for kind, n in cost.items():
            count["load" if kind == "broadcast" else kind] += n
            # the load of a conversion is its operand
            count["instructions"] += n if kind != "load" or name == "prefetch" else 0
    for name, load in words:
        # the first mention is the definition
        uses = re.findall(rf"(\w+)(?:<[^>]*>)?\((?:\w+, )?{name}\b|\b{name}\b", text)[1:]
        shifts = sum(use.startswith(("vi_srl", "vi_sll", "vi_sra")) for use in uses)
        ands = sum(use == "vi_and" for use in uses)
        n = table[load]["load"]
        count["stream"] += n * len(uses) if shifts + ands == len(uses) else n
        if shifts + ands == len(uses):
            count["load"] += n * len(uses)
            count["instructions"] += 0 if wide else n * shifts
        else:
            count["load"] += n
            count["instructions"] += n
    inline = len(_CALL.findall(text)) and sum(
        m[1] in ("vi_load", "vf_load") for m in _CALL.finditer(text)
    ) - len(words)
    count["load"] += inline * table["vf_load"]["load"]
    return count


@dataclass(frozen=True)
class KernelCounts:
    """Instructions of one tile of a kernel: of a K-block, and of what stands around the loop.

    ``decode`` is what an f32 kernel spends on unpacking a K-block once for all its tokens.
    """

    tokens: int
    kblock: Count
    decode: Count
    around: Count


LOOP = 5
"""Scalar instructions of a loop: pointers, the comparison and the jump."""


@functools.lru_cache(maxsize=4096)
def kernel_counts(spec: MatmulSpec, tokens: int) -> KernelCounts:
    """The counts of the tile of ``tokens`` tokens."""
    isa = spec.isa
    alone = MatmulSpec(
        spec.format, spec.layout, isa, spec.activations, (tokens,), spec.prefetch
    )
    text = re.sub(r"//[^\n]*", "", render_matmul(alone, ("store",)).text)
    if spec.activations != "f32":
        _, inside, outside = _loop(_function(text, f"tile_{tokens}"))
        kblock = count_text(inside, isa)
        kblock["instructions"] += LOOP
        return KernelCounts(tokens, kblock, Counter(), count_text(outside, isa))
    header, inside, outside = _loop(_function(text, f"fma_{tokens}"))
    step = re.search(r"k \+= (\d+)", header)
    weights = spec.format.block * spec.layout.blocks
    once = count_text(inside, isa)
    once["instructions"] += LOOP
    per_weight = weights / (int(step[1]) if step else 1)
    kblock = Counter({kind: n * per_weight for kind, n in once.items()})  # type: ignore[misc]
    decode: Count = Counter()
    if spec.format.float_kind != "f32":
        decode = count_text(_function(text, "decode"), isa)
        decode["instructions"] += LOOP
    return KernelCounts(tokens, kblock, decode, count_text(outside, isa))
