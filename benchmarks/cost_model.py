"""Predicted against measured time of matmul kernels on this machine.

    python benchmarks/cost_model.py                        a table of some formats, tiles and sizes
    python benchmarks/cost_model.py --format q4_k --n 2048 --k 2048 --m 1,16

Each candidate is rendered, compiled and timed with weights that rotate over more memory than the
caches hold (or, with --cached, stay there). Prints medians and the rank correlation.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from qigen import toolchain
from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import ActivationRecord, MatmulSpec, activation_needs, render_matmul
from qigen.codegen.render import render
from qigen.formats.algebra import QuantizedTensor
from qigen.formats.catalog import by_name
from qigen.formats.layout import pack, packed_shape
from qigen.paths import resource_folder

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")


def random_weight(spec: MatmulSpec, n: int, k: int) -> bytes:
    """A packed weight with random codes and harmless scales (no denormals, no infinities)."""
    rng = np.random.default_rng(0)
    nblocks = -(-k // spec.format.block)
    fields = {}
    for f in spec.format.fields:
        shape = (16, nblocks, f.count)
        if f.name in ("d", "dmin", "m"):
            fields[f.name] = rng.uniform(0.01, 0.02, shape).astype(np.float16).view(np.uint16)
        elif spec.format.float_kind:
            values = rng.uniform(-1, 1, shape).astype(np.float32)
            bits = {"f32": values, "f16": values.astype(np.float16)}.get(spec.format.float_kind)
            fields[f.name] = (
                (values.view(np.uint32) >> 16).astype(np.uint16)
                if bits is None
                else bits.view(f.dtype)
            )
        else:
            low, high = (120, 128) if f.name == "e" else (0, 1 << f.bits)
            fields[f.name] = rng.integers(low, high, shape).astype(f.dtype)
    block = pack(QuantizedTensor(spec.format, (16, nblocks * spec.format.block), fields), spec.layout)
    return block.tobytes() * -(-n // 16)


def case(spec: MatmulSpec, n: int, k: int) -> bytes:
    """The file that the timing program reads."""
    _, kblocks, size = packed_shape(spec.format, (n, k), spec.layout)
    weight = random_weight(spec, n, k)
    padded = kblocks * spec.layout.blocks * spec.format.block
    rng = np.random.default_rng(1)
    if spec.activations == "f32":
        x = rng.standard_normal(-(-padded // 16) * 16).astype(np.float32).tobytes()
        x += bytes(64 * (len(x) % 1024 == 0))
        offsets = (0, 0, 0)
    else:
        zeros, sums = activation_needs(spec)
        record = ActivationRecord(-(-padded // 32) * 32, spec.activations == "int8-token", zeros, sums)
        row = np.zeros(record.nbytes, np.uint8)
        row[: record.scale_offset] = rng.integers(0, 256, record.scale_offset)
        row[record.scale_offset :].view(np.float32)[:] = 0.01
        x = row.tobytes()
        offsets = (
            record.scale_offset,
            record.offset("zero", *zeros[0]) if zeros else 0,
            record.offset("sum", sums[0]) if sums else 0,
        )
    return struct.pack("<3q5i4x", len(weight), len(x), kblocks * size, n, kblocks, *offsets) + weight + x


class Timer:
    """Builds and runs timing programs in a folder; the programs are cached by their kernel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiler = toolchain.find_compiler()

    def program(self, spec: MatmulSpec) -> Path:
        """The program that times a kernel."""
        tag = f"{spec.name}_t{'_'.join(map(str, spec.tiles))}_p{spec.prefetch}"
        target = self.folder / tag
        sources = {
            "kernel.cpp": render_matmul(spec, ("store",)).text,
            spec.isa.header: render(spec.isa.template),
            "kernels.h": render("cpu/kernels.h.j2"),
            "epilogue.h": render("cpu/epilogue.h.j2"),
            "main.cpp": (HERE / "time_matmul.cpp.j2")
            .read_text()
            .split("-#}\n", 1)[1]
            .replace("{{ entry }}", spec.entry("store")),
        }
        stamp = target.with_suffix(".json")
        content = json.dumps(sources)
        if target.exists() and stamp.exists() and stamp.read_text() == content:
            return target
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            for name, text in sources.items():
                Path(scratch, name).write_text(text)
            include = f"-I{resource_folder('runtime') / 'include'}"
            kernel = Path(scratch, "kernel.o")
            self.compiler.run(
                [*FLAGS, *spec.isa.flags, "-c", f"{scratch}/kernel.cpp", "-o", str(kernel)], tag
            )
            self.compiler.run(
                [*FLAGS, include, "-pthread", f"{scratch}/main.cpp", str(kernel), "-o", str(target)],
                tag,
            )
        stamp.write_text(content)
        return target

    def measure(
        self, spec: MatmulSpec, n: int, k: int, m: int, threads: int, mib: int, repeats: int
    ) -> list[float]:
        """Microseconds of every repeat but the first ones, ascending."""
        program = self.program(spec)
        with tempfile.NamedTemporaryFile(dir=self.folder) as f:
            f.write(case(spec, n, k))
            f.flush()
            out = subprocess.run(
                [program, f.name, str(m), str(threads), str(repeats), str(mib)],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
        return sorted(map(float, out.split()[2:]))
