"""Counted instructions against those of compiled kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qigen.backends.base import Isa
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.isa.primitives import PRIMITIVES
from qigen.backends.cpu.matmul import MatmulSpec, render_matmul
from qigen.codegen.render import render
from qigen.costmodel.instructions import counted, kernel_counts, primitives
from qigen.costmodel.matmul import tile_count
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")

# Vector instructions by class, as the disassembler writes them.
CLASSES = {
    r"vpdpbusd|vpmaddubsw|vpmaddwd": "dot",
    r"vfn?madd|vmulps|vaddps|vsubps": "fma",
    r"vcvt|vpmov": "convert",
    r"vpsrl|vpsll|vpsra|vpavg": "shift",
    r"vpshufb": "shuffle",
}


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_every_primitive_is_known(isa: Isa) -> None:
    table = primitives(isa)
    every = [p.name for p in PRIMITIVES if not (p.narrow or p.limited or p.tiles)]
    missing = {name for name in every if name.startswith("v")} - set(table)
    assert not {name for name in missing if name in render(isa.template)}
    if isa.features:
        assert table["vi_and"] == {"logic": isa.vectors}
        assert table["vf_fma"] == {"fma": isa.vectors}
        assert table["vi_srl"] == {"shift": isa.vectors}
        assert table["vq_dot"]["dot"] == isa.vectors * (2 if isa.name == "neon" else 1)
        assert table["vq_dot"]["broadcast"] == 1


def test_a_kernel_with_tile_registers() -> None:
    """A product of 16 tokens by 16 rows and 32 weights takes the tiles 16 cycles, its operands come
    in 8 and 4 loads, and 16 rows of sums are stored."""
    amx = replace(spec("amx", "u4g32", 16), tiles=(16, 1))
    count = kernel_counts(amx, 16, 1)
    assert amx.matrix and count.panel["tile"] == 16 and count.panel["store"] == 16
    assert kernel_counts(amx, 16, 2).panel["tile"] == 32
    assert count.unpack["shuffle"] >= 24 and count.panel["dot"] == 0


def test_a_kernel_without_prefetches() -> None:
    with_, without = (
        kernel_counts(replace(spec("avx512vnni", "q4_0", 1), prefetch=p), 1, 1).kblock
        for p in (4096, 0)
    )
    assert with_["prefetch"] == 5 and without["prefetch"] == 0
    assert with_["instructions"] == without["instructions"] + 5


def spec(isa: str, format: str, tokens: int, blocks: int = 1) -> MatmulSpec:
    return MatmulSpec(by_name(format), Layout(16, blocks), ISAS[isa], "int8", (tokens,))


def test_counts_of_q4_0() -> None:
    """By hand: 32 weights are 8 dot products; 4 words of codes are masked twice, shifted once."""
    count = kernel_counts(spec("avx512vnni", "q4_0", 1), 1, 1).kblock
    assert (count["dot"], count["logic"], count["shift"]) == (8, 8, 4)
    assert count["convert"] == 2  # the scale from f16, the sum to float
    assert count["fma"] == 2
    two = kernel_counts(spec("avx512vnni", "q4_0", 1, blocks=2), 1, 1).kblock
    assert (two["dot"], two["logic"]) == (16, 16)


def test_more_tokens_share_the_unpacking() -> None:
    one, four = (kernel_counts(spec("avx512vnni", "q4_k", t), t, 1).kblock for t in (1, 4))
    assert four["shift"] == one["shift"]
    assert four["dot"] == 4 * one["dot"]


def test_loads_across_cache_lines_count_twice() -> None:
    odd, even = spec("avx512vnni", "q4_0", 1), spec("avx512vnni", "q4_0", 1, blocks=2)
    assert 2 * tile_count(odd, 1, 1)["load"] > tile_count(even, 1, 1)["load"]


def test_counted_copies() -> None:
    first = counted({"dot": 1})
    second = counted(first)
    second["dot"] += 1
    assert first["dot"] == 1 and first["load"] == 0


def disassembled(kernel: MatmulSpec, folder: Path) -> list[tuple[int, str, str]]:
    """(address, mnemonic, operands) of a compiled kernel."""
    sources = {
        "kernel.cpp": render_matmul(kernel, ("store",)).text,
        kernel.isa.header: render(kernel.isa.template),
        "kernels.h": render("cpu/kernels.h.j2"),
        "epilogue.h": render("cpu/epilogue.h.j2"),
    }
    for name, text in sources.items():
        (folder / name).write_text(text)
    command = ["g++", *FLAGS, *kernel.isa.flags, "-c", "kernel.cpp", "-o", "kernel.o"]
    subprocess.run(command, cwd=folder, check=True)
    out = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "kernel.o"],
        cwd=folder, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = (re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line) for line in out.splitlines())
    return [(int(m[1], 16), m[2], m[3]) for m in found if m]


def inner_loops(code: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """The instructions of the innermost loops that have dot products, by class."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []
    for i, (address, mnemonic, operands) in enumerate(code):
        target = re.match(r"([0-9a-f]+)", operands) if mnemonic.startswith("j") else None
        if target and int(target[1], 16) <= address and int(target[1], 16) in at:
            loops.append((at[int(target[1], 16)], i))
    found = []
    for first, last in loops:
        count = Counter(instructions=last + 1 - first)
        for _, mnemonic, _ in code[first : last + 1]:
            for pattern, kind in CLASSES.items():
                count[kind] += bool(re.match(pattern, mnemonic))
        if count["dot"]:
            found.append((first, last, count))
    return [
        count
        for first, last, count in found
        if not any((f, to) != (first, last) and first <= f and to <= last for f, to, _ in found)
    ]


@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("objdump") is None, reason="no g++ or objdump"
)
@pytest.mark.parametrize(
    ("isa", "format", "tokens", "blocks"),
    [("avx512vnni", "q4_0", 1, 1), ("avx512vnni", "q4_k", 4, 1), ("avx512vnni", "iq4_nl", 8, 1),
     ("avx512vnni", "q4_0", 4, 4), ("avx512vnni", "u2g128", 1, 1), ("avx512vnni", "q8_0", 1, 2),
     ("avx512vnni", "u3g128", 4, 1), ("avx2", "q4_0", 1, 1), ("avx2", "q4_k", 2, 1)],
)  # fmt: skip
def test_counts_agree_with_the_compiler(
    isa: str, format: str, tokens: int, blocks: int, tmp_path: Path
) -> None:
    kernel = spec(isa, format, tokens, blocks)
    if subprocess.run(
        ["g++", *kernel.isa.flags, "-xc++", "-fsyntax-only", "-"], input=b"", check=False
    ).returncode:
        pytest.skip(f"g++ knows no {isa}")
    loops = inner_loops(disassembled(kernel, tmp_path))
    rows = kernel.row_tile if tokens > 1 else 1
    predicted = [tile_count(kernel, tokens, rows)]
    if kernel.panel:
        groups = kernel.format.block * blocks // 32
        panel = tile_count(kernel, tokens, rows, panel=True)
        predicted.append(counted({kind: n / groups for kind, n in panel.items()}))
    for count in predicted:
        kinds = ("instructions", *CLASSES.values())
        off = [
            max(abs(count[k] - loop[k]) / max(loop[k], count[k], 1) for k in kinds)
            for loop in loops
        ]
        assert min(off) <= 0.15, (count, loops)
