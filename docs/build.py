"""Fills the tables of the documents from the tables of the code.

    python docs/build.py            # rewrites what changed
    python docs/build.py --check    # only says what is out of date; exit code 1 if anything is

A table stands between the lines ``<!-- begin NAME (docs/build.py) -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qigen import targets
from qigen.backends.cpu.decode import decode_plan
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import I32_MAX, accumulator_bound
from qigen.formats.algebra import Format
from qigen.formats.catalog import CATALOG
from qigen.formats.layout import Layout
from qigen.frontends.checkpoints import READERS
from qigen.frontends.families import FAMILIES
from qigen.ir import ops, schema  # noqa: F401  (ops registers the operators)
from qigen.ir.tensor import TensorOp
from qigen.quantize.methods import METHODS

ROOT = Path(__file__).parents[1]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; columns whose names begin with '>' are aligned to the right."""
    lines = [[column.removeprefix(">") for column in columns]]
    lines.append(["--:" if column.startswith(">") else "---" for column in columns])
    lines += [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _codes(fmt: Format) -> str:
    if fmt.float_kind:
        return "float"
    if fmt.base3:
        return "base 3, 5 a byte"
    if fmt.vector:
        return f"{fmt.code_bits} bits for {fmt.vector} weights"
    if fmt.words:
        return f"{fmt.words} words of {fmt.code_bits} bits for {fmt.block} weights"
    if not fmt.integer:
        return f"{fmt.code_bits} bits: {fmt.map_kind}"
    low, high = (value - fmt.zero for value in fmt.mapped_range)
    values = f"{fmt.code_bits} bits: {low:g} … {high:g}"
    return f"{values}, table of {len(fmt.table)}" if fmt.table else values


def gguf_formats() -> str:
    """Formats that a GGUF file can hold."""
    return markdown(
        ("name", ">bits a weight", ">block", ">group", "V(c) − Z", "scale", "zero or minimum",
         "written from"),
        (
            (f"`{f.name}`", f"{f.bits_per_weight:g}", f.block, f.group, _codes(f), f.scale_kind,
             f.zero_kind, f.source)
            for f in CATALOG.values()
            if f.ggml_type is not None
        ),
    )  # fmt: skip


def rounded_formats() -> str:
    """Formats that ``--weights`` can round to and no GGUF type has, a row for all group sizes."""
    rows: dict[str, list[Format]] = {}
    for fmt in CATALOG.values():
        if fmt.ggml_type is None:
            several = r"[suzh]\d(?=g\w+$)|bipolar|aqlm|qmoe|lut\d_[a-z]+|nf\d|fp4"
            family = re.match(several, fmt.name)
            rows.setdefault(family[0] if family else fmt.name, []).append(fmt)
    return markdown(
        ("names", "bits a weight", "V(c) − Z", "scale", "zero or minimum", "written from"),
        (
            (
                ", ".join(f"`{f.name}`" for f in row),
                ", ".join(f"{f.bits_per_weight:g}" for f in row),
                _codes(row[0]),
                row[0].scale_kind,
                row[0].zero_kind,
                row[0].source,
            )
            for row in rows.values()
        ),
    )


def checkpoints() -> str:
    """The quantized checkpoints that are read."""
    return markdown(
        ("`quant_method`", "what is read", "written from"),
        ((f"`{r.quant_method}`", r.what, r.source) for r in READERS),
    )


def families() -> str:
    """The model families and what sets their layers apart."""

    def traits(row: object) -> str:
        named = {
            "qkv_bias": "biases of q, k and v",
            "qk_norm": "norms of q and k",
            "post_norms": "norms behind both parts of a layer",
            "embedding_scaled": "embedding times √d",
            "sinks": "attention sinks",
            "mixture": "a mixture of experts",
        }
        found = [text for flag, text in named.items() if getattr(row, flag)]
        return ", ".join(found) or "–"

    return markdown(
        ("family", "`general.architecture`", "`model_type`", "activation", "sets it apart"),
        (
            (
                row.name,
                ", ".join(f"`{name}`" for name in row.gguf) or "(as llama)",
                ", ".join(f"`{name}`" for name in row.model_types),
                row.activation,
                traits(row),
            )
            for row in FAMILIES
        ),
    )


def methods() -> str:
    """The quantization methods: a row of ``qigen.quantize.METHODS`` each."""

    def shown(name: str, default: object) -> str:
        value = str(default).lower() if isinstance(default, bool) else default
        return f"`{name}={value}`"

    return markdown(
        ("`--method`", "what it does", "minimises", "data", "options", "written from"),
        (
            (
                f"`{m.name}`",
                m.about,
                m.minimises,
                m.data,
                ", ".join(shown(name, p.default) for name, p in m.options.items()) or "–",
                m.source or "–",
            )
            for m in METHODS.values()
        ),
    )


def operators() -> str:
    """The operators of language models."""
    return markdown(
        ("operator", "inputs", "attributes", "made by"),
        (
            (
                f"`{op.name}`",
                op.inputs,
                ", ".join(attr.name for attr in op.attrs) or "–",
                "a pass" if op.fused else "frontends",
            )
            for op in sorted(schema.operators().values(), key=lambda op: (op.fused, op.name))
            if not isinstance(op, TensorOp)
        ),
    )


def onnx_operators() -> str:
    """The operators of ONNX files, by domain."""
    rows: dict[str, list[str]] = {}
    for name, op in sorted(schema.operators().items()):
        domain, _, short = name.rpartition(".")
        if isinstance(op, TensorOp) and domain:
            rows.setdefault({"onnx": "ai.onnx", "ms": "com.microsoft"}[domain], []).append(short)
    return markdown(
        ("domain", "operators with kernels of their own"),
        ((f"`{domain}`", ", ".join(names)) for domain, names in rows.items()),
    )


def isas() -> str:
    """The ISA rows."""
    return markdown(
        ("name", "features", ">vectors of 16 lanes", ">instructions each", "byte dot product"),
        (
            (
                f"`{isa.name}`",
                ", ".join(isa.features) or "none",
                isa.registers,
                isa.vectors,
                ("32-bit lanes" if isa.dot_limit is None else f"16-bit lanes (≤ {isa.dot_limit})")
                + (", signed bytes" if isa.code_max < 255 else ""),
            )
            for isa in ISAS.values()
        ),
    )


def bounds() -> str:
    """What the generator proves of the int8 kernels: the narrowest lanes and the segment sums."""
    narrow = [isa for isa in ISAS.values() if isa.dot_limit is not None]
    columns = ["format", "segment", "32-bit sum at most"]
    columns += [f"{isa.name}: 16-bit lane at most, over steps" for isa in narrow]
    rows: dict[tuple[object, ...], list[str]] = {}
    for fmt in CATALOG.values():
        if not fmt.integer:
            continue
        plan = decode_plan(fmt, Layout())
        proven = [accumulator_bound(plan, isa) for isa in narrow]
        cells = [plan.segment_length, max(b.segment for b in proven)]
        cells += [f"{b.lane} over {b.flush}{', signed codes' * b.signed}" for b in proven]
        rows.setdefault(tuple(cells), []).append(f"`{fmt.name}`")
    table = markdown(columns, ([", ".join(names), *cells] for cells, names in rows.items()))
    limits = ", ".join(f"{isa.dot_limit} for the lanes of {isa.name}" for isa in narrow)
    return f"{table}\n\nThe limits are {limits} and {I32_MAX} for the sums."


def tolerances() -> str:
    """What the end-to-end tests allow a logit to differ by."""
    tree = ast.parse((ROOT / "tests" / "e2e" / "test_families.py").read_text(encoding="utf-8"))
    table = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TOLERANCE"
    )
    return markdown(
        ("activations", "KV cache", ">standard deviations"),
        (
            (f"`{activations}`", f"`{kv}`", f"{limit:g}")
            for (activations, kv), limit in table.items()
        ),
    )


def machines() -> str:
    """The machine rows."""
    return markdown(
        ("name", "machine", "source"),
        ((f"`{name}`", row.description, row.source) for name, row in targets.rows().items()),
    )


TABLES: dict[str, Callable[[], str]] = {
    table.__name__.replace("_", "-"): table
    for table in (
        gguf_formats,
        rounded_formats,
        checkpoints,
        families,
        methods,
        operators,
        onnx_operators,
        isas,
        bounds,
        tolerances,
        machines,
    )
}

_TABLE = re.compile(
    r"(?P<begin><!-- begin (?P<name>\S+) \(docs/build\.py\) -->\n).*?"
    r"(?P<end><!-- end (?P=name) -->)",
    re.DOTALL,
)


def filled(text: str) -> str:
    """The document with its tables as the code has them; KeyError for a table that is unknown."""
    return _TABLE.sub(lambda m: f"{m['begin']}\n{TABLES[m['name']]()}\n\n{m['end']}", text)


def documents() -> list[Path]:
    """README.md and what is in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: Sequence[str]) -> int:
    """Rewrites the documents (with --check: compares them); 1 if one was not current."""
    stale = 0
    for file in documents():
        before = file.read_text(encoding="utf-8")
        after = filled(before)
        if after == before:
            continue
        stale += 1
        if "--check" in arguments:
            print(f"{file.relative_to(ROOT)} is out of date: run python docs/build.py")
        else:
            file.write_text(after, encoding="utf-8")
            print(f"{file.relative_to(ROOT)}: written")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
