"""Gates on machine code: what ptxas may make of a template, and golden numbers of what it made.

A row of :func:`gated` names a kernel and its bounds; :func:`check` reads the cubin of every target
against them. Golden numbers of each (kernel, target) lie in ``templates/cuda/gates.toml`` and
change only on purpose::

    python -m qigen.backends.cuda.gates          # prints what is measured and what fails
    python -m qigen.backends.cuda.gates --write  # and makes it the golden numbers

Numbers of another version of the compiler are not compared, the bounds hold all the same.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qigen.backends.cuda import gemv, ops, toolchain
from qigen.backends.cuda.gemm import GemmSpec, Schedule, render_gemm, usual_schedule
from qigen.formats import by_name
from qigen.paths import resource_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_MMA = ("HMMA", "IMMA")


@dataclass(frozen=True)
class Measured:
    """What the machine code of a kernel has: registers a thread, bytes of stack and local memory,
    spills; and in its main loop issue slots, mma, asynchronous copies (and narrow ones, in all of
    the kernel), ldmatrix, loads from shared memory of 128 bits and narrower."""

    registers: int
    stack: int
    spills: int
    slots: int
    mma: int
    copies: int
    narrow_copies: int
    ldmatrix: int
    loads128: int
    loads: int

    @property
    def slots_per_mma(self) -> float:
        """Issue slots of the main loop for every mma."""
        return self.slots / self.mma


def _main_loop(code: Sequence[toolchain.Instruction]) -> Sequence[toolchain.Instruction]:
    """The innermost loop with an mma in it: from the target of a branch back to the branch."""
    best: Sequence[toolchain.Instruction] = ()
    for i, instruction in enumerate(code):
        found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        if not instruction.opcode.startswith("BRA") or not found:
            continue
        first = int(found[1], 16) // 16  # an instruction has 16 bytes
        body = code[first : i + 1]
        if first < i and any(c.opcode.startswith(_MMA) for c in body) and (
                not best or len(body) < len(best)):
            best = body
    return best


def _filler(i: toolchain.Instruction) -> bool:
    """What never executes: alignment, and the loads under a false guard that ptxas puts behind
    asynchronous copies on sm_80."""
    return i.opcode.startswith("NOP") or (i.opcode.startswith("LDS") and i.guard == "@!PT")


def measure(name: str, text: str, arch: str) -> Measured:
    """Compile a kernel and read its machine code; ToolchainError if that fails."""
    cubin = toolchain.compile_cubin(name, text, arch)
    resources = toolchain.read_resources(cubin)[name]
    code = toolchain.read_sass(cubin)[name]
    loop = [i for i in _main_loop(code) if not _filler(i)]

    def count(where: Sequence[toolchain.Instruction], *starts: str, having: str = "") -> int:
        return sum(i.opcode.startswith(starts) and having in i.opcode for i in where)

    loads = count(loop, "LDS") - count(loop, "LDSM")
    wide = count(loop, "LDS", having=".128")
    return Measured(
        resources.registers, resources.stack, count(code, "LDL", "STL"), len(loop),
        count(loop, *_MMA), count(loop, "LDGSTS", having=".128"),
        count(code, "LDGSTS") - count(code, "LDGSTS", having=".128"), count(loop, "LDSM"), wide,
        loads - wide)


@dataclass(frozen=True)
class Gated:
    """A kernel with its bounds: issue slots for every mma, and the loop as the template counts it
    (mma, copies of 128 bits, loads of 128 bits)."""

    name: str
    text: Callable[[], str]
    slots_per_mma: float
    mma: int
    copies: int
    loads128: int
    loads: int = 0


def _gemm(format: str, slots: float, activations: str = "f16",
          schedule: Schedule | None = None) -> Gated:
    row = by_name(format)
    spec = GemmSpec(row, activations, schedule=schedule or usual_schedule(row, activations))
    s, d = spec.schedule, spec.decoding
    units = s.depth // spec.unit if s.m_tiles <= 2 else 1  # more are not unrolled
    steps = spec.unit // d.step
    # words of a plane come by vectors of four, or as few as a unit has
    wide = sum(units * steps * words // 4 for _, _, words in d.planes if steps * words >= 4)
    narrow = sum(units for _, _, words in d.planes if steps * words < 4)
    side = units * (spec.scale_bytes + spec.zero_bytes) if spec.group else 0
    side //= 2 if d.sparse else 1
    gathers = {"table2": 1, "table3": 2, "table4": 2}.get(d.name, 0)
    threads = spec.block[0]
    x = spec.x_bytes(spec.rows * spec.block_depth) // 16
    weights = s.warps_n * spec.block_depth // d.step * 8
    groups = max(spec.block_depth // spec.group, 1) if spec.group else 0
    sections = [x, *(weights * words for _, _, words in d.planes),
                s.warps_n * groups * 4 * spec.scale_bytes, s.warps_n * groups * 4 * spec.zero_bytes]
    copies = sum(-(-vectors // threads) for vectors in sections) if s.m_tiles <= 2 else 0
    return Gated(spec.name, lambda: render_gemm(spec), slots,
                 units * steps * s.m_tiles * (d.fragments + (spec.zero_bytes > 0)), copies,
                 wide + side, narrow + units * steps * 8 * gathers)


def _attention(kv: str, head_dim: int, slots: float) -> Gated:
    """Attention of prompts: 64 keys and values of a round are copied, turned into halves if the
    cache has codes, and multiplied."""
    spec = ops.AttentionSpec(ops.KvSpec(kv, 2, head_dim), 8, False)
    width, keys = spec.mma_width, spec.mma_keys
    copies = 2 * (keys * spec.cache.row_bytes // 16 // 128)
    unpacked = 2 * (keys * width // 8 // 128)
    if kv == "f16":
        unpacked = 0
    else:
        copies += 2  # of scales
    # wide: what looks for values that are no numbers, and takes them out; narrow: what it adds
    return Gated(spec.mma_name, lambda: ops.render_attention_mma(spec), slots,
                 keys // 8 * (width // 16) + keys // 16 * (width // 8), copies, 2,
                 2 * unpacked + width // 8 + 1)


def gated() -> tuple[Gated, ...]:
    """The kernels that are gated. Bounds come from what decoding takes, not from what is measured:
    int4 at most 12 issue slots for an mma of 16 rows, tables of 4 bits 16."""
    wide = Schedule(2, 2, 2, 64, 3)
    return (
        _gemm("s4g128", 12),
        _gemm("z4g64", 12),
        _gemm("q4_0", 12),
        _gemm("s8g128", 12),
        _gemm("nf4g64", 16),
        _gemm("mxfp4", 16),
        _gemm("nf2g64", 12),
        _gemm("nf3g64", 20),
        _gemm("s4g128", 8, schedule=wide),
        _gemm("nf4g64", 10, schedule=wide),
        _gemm("s4g128", 8, schedule=Schedule(3, 2, 2, 64, 3)),
        _gemm("s4gchannel", 4, schedule=Schedule(4, 2, 2, 64, 3)),
        # widths between powers of two: two or three planes, five instructions more for a pair
        _gemm("s5g128", 24),
        _gemm("s6g128", 24),
        _gemm("z7g64", 28),
        _gemm("fp6_e3m2", 24),
        _gemm("fp6_e2m3", 24),
        _gemm("mxfp8_e4m3", 20),
        _gemm("f16", 10),
        # sparse: an mma decodes twice as many weights of W, for half as many rows of x
        _gemm("s4g128_2of4", 26),
        _gemm("s4g128_2of4", 16, schedule=Schedule(2)),
        _gemm("s8g128_2of4", 26, "s8"),
        _gemm("s4g128_2of4", 30, "s8"),
        _gemm("s8g128", 16, "s8"),
        _gemm("w4a8", 20, "s8"),
        # a round of softmax and what no number needs beside half as many mma for heads of 64
        _attention("f16", 64, 13),
        _attention("f16", 128, 10),
        _attention("int8", 128, 14),
        _attention("int4", 128, 14),
    )


@dataclass(frozen=True)
class Plain:
    """What the machine code of a kernel without tensor cores has: registers a thread, bytes of
    stack and of static shared memory, spills, instructions; loads from device memory of 128 bits
    and narrower ones."""

    registers: int
    stack: int
    shared: int
    spills: int
    instructions: int
    loads128: int
    loads: int


def measure_plain(name: str, text: str, arch: str) -> dict[str, Plain]:
    """Compile a module and read the machine code of its kernels; ToolchainError if that fails."""
    cubin = toolchain.compile_cubin(name, text, arch)
    resources, found = toolchain.read_resources(cubin), {}
    for kernel, code in toolchain.read_sass(cubin).items():
        r = resources[kernel]
        loads = [i.opcode for i in code if i.opcode.startswith("LDG.") or i.opcode == "LDG"]
        wide = sum(".128" in opcode for opcode in loads)
        found[kernel] = Plain(r.registers, r.stack, r.shared,
                              sum(i.opcode.startswith(("LDL", "STL")) for i in code),
                              sum(not _filler(i) for i in code), wide, len(loads) - wide)
    return found


def plain() -> dict[str, Callable[[], str]]:
    """The modules without tensor cores that are gated, and their text."""
    specs = [gemv.GemvSpec(by_name(name), m) for name, m in (
        ("q4_0", 1), ("q4_k", 1), ("s4g128", 8), ("nf4g64", 1), ("aqlm_2x8", 1),
        ("s4g128_2of4", 1))]  # fmt: skip
    table, halves = gemv.EmbeddingSpec(by_name("q6_k")), gemv.HalvesSpec(by_name("q4_k"))
    cache = ops.KvSpec("int8", 2, 64)
    attention, rope = ops.AttentionSpec(cache, 8, False), ops.RopeSpec(cache, 8, 64, False, False)
    norm = ops.NormSpec()
    return {
        **{spec.name: functools.partial(gemv.render_gemv, spec) for spec in specs},
        table.name: lambda: gemv.render_embedding(table),
        halves.name: lambda: gemv.render_halves(halves),
        attention.name: lambda: ops.render_attention(attention),
        rope.name: lambda: ops.render_rope(rope),
        norm.name: lambda: ops.render_norm(norm),
        "choose": ops.render_choose,
        "quantize_4_c32": lambda: ops.render_quantize(4, 32),
    }


def check_plain(
    names: Sequence[str], archs: Sequence[str] = toolchain.ARCHS
) -> tuple[dict[str, Plain], list[str]]:
    """Measure modules of :func:`plain`: numbers by 'kernel target', and what spills or takes more
    shared memory than every launch has without asking."""
    numbers, broken = {}, []
    for name in names:
        for arch in archs:
            for kernel, m in measure_plain(name, plain()[name](), arch).items():
                numbers[f"{kernel} {arch}"] = m
                broken += [f"{kernel} {arch}: {what} {value}" for what, value, most in (
                    ("stack", m.stack, 0), ("spills", m.spills, 0),
                    ("shared memory", m.shared, 48 << 10)) if value > most]  # fmt: skip
    return numbers, broken


def golden_file() -> Path:
    """The table of golden numbers."""
    return resource_folder("templates") / "cuda" / "gates.toml"


def read_golden() -> tuple[str, Mapping[str, Mapping[str, int]], Mapping[str, Mapping[str, int]]]:
    """The version of the compiler, and the numbers by 'kernel target' of kernels with and without
    tensor cores."""
    table: dict[str, Any] = tomllib.loads(golden_file().read_text())
    return table["compiler"], table["kernels"], table["plain"]


def compiler_version() -> str:
    """The version that the numbers here come from."""
    return toolchain.find_compiler().label


def faults(gate: Gated, m: Measured) -> list[str]:
    """What of a kernel breaks its gate."""
    found = []
    for what, value in (("stack", m.stack), ("spills", m.spills),
                        ("copies of less than 128 bits", m.narrow_copies)):
        if value:
            found.append(f"{what}: {value}")
    for what, got, want in (("mma", m.mma, gate.mma), ("copies of 128 bits", m.copies, gate.copies),
                            ("loads of 128 bits", m.loads128, gate.loads128),
                            ("narrow loads", m.loads, gate.loads)):
        if got != want:
            found.append(f"{what} in the main loop: {got}, the template has {want}")
    if m.slots_per_mma > gate.slots_per_mma:
        found.append(f"{m.slots_per_mma:.2f} issue slots an mma, at most {gate.slots_per_mma:g}")
    return found


def check(
    gates: Sequence[Gated], archs: Sequence[str] = toolchain.ARCHS
) -> tuple[dict[str, Measured], list[str]]:
    """Measure kernels: numbers by 'kernel target', and all that breaks a gate."""
    numbers, broken = {}, []
    for gate in gates:
        text = gate.text()
        for arch in archs:
            m = numbers[f"{gate.name} {arch}"] = measure(gate.name, text, arch)
            broken += [f"{gate.name} {arch}: {fault}" for fault in faults(gate, m)]
    return numbers, broken


def differences(numbers: Mapping[str, Measured] | Mapping[str, Plain]) -> list[str]:
    """What differs from the golden numbers, if those are of this version of the compiler."""
    version, tensor, others = read_golden()
    golden = {**tensor, **others}
    if version != compiler_version():
        return []
    return [f"{key}: {asdict(m)}, golden {dict(golden.get(key, {}))}; if it is meant: python -m "
            "qigen.backends.cuda.gates --write"
            for key, m in numbers.items() if asdict(m) != golden.get(key)]


def main(arguments: Sequence[str]) -> int:
    """Print the numbers and what breaks a gate; ``--write`` makes them the golden ones. Other
    arguments are what the names of kernels begin with: those alone, else all."""
    starts = tuple(a for a in arguments if not a.startswith("-")) or ("",)
    numbers, broken = check([g for g in gated() if g.name.startswith(starts)])
    others, more = check_plain([name for name in plain() if name.startswith(starts)])
    broken += more
    for key, m in numbers.items():
        print(f"{key}: {m.slots_per_mma:.2f} issue slots an mma, {m.registers} registers, "
              f"{m.copies} copies, {m.loads128} + {m.loads} loads")
    for key, p in others.items():
        print(f"{key}: {p.instructions} instructions, {p.registers} registers")
    if "--write" in arguments:
        _, tensor, rest = read_golden()
        _write({**tensor, **{key: asdict(m) for key, m in numbers.items()}},
               {**rest, **{key: asdict(p) for key, p in others.items()}})
    else:
        broken += differences(numbers) + differences(others)
    print("\n".join(broken))
    return 1 if broken else 0


def _write(tensor: Mapping[str, Mapping[str, int]],
           others: Mapping[str, Mapping[str, int]]) -> None:
    lines = ["# Golden numbers of the machine code (backends/cuda/gates.py); written by",
             "# python -m qigen.backends.cuda.gates --write", "",
             f'compiler = "{compiler_version()}"']
    known = {f"{g.name} {arch}" for g in gated() for arch in toolchain.ARCHS}
    for section, rows in (("kernels", {k: r for k, r in tensor.items() if k in known}),
                          ("plain", others)):
        lines += ["", f"[{section}]"]
        for key, row in rows.items():
            values = ", ".join(f"{name} = {value}" for name, value in row.items())
            lines.append(f'"{key}" = {{ {values} }}')
    golden_file().write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
