"""Predicted against measured time of matmul kernels on this machine.

    python benchmarks/cost_model.py                      some formats, register tiles and sizes
    python benchmarks/cost_model.py --formats q4_k --m 1,16 --threads 2 --cached

Each kernel is rendered, compiled and timed with weights that rotate over more memory than the
caches hold (or, with --cached, stay in them). The time shown is the lower quartile: others may use
the machine too. At the end: the rank correlation, and how far the model's pick is from the best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qigen import targets, toolchain
from qigen.backends.cpu.isa import by_name as isa_by_name
from qigen.backends.cpu.matmul import (
    ActivationRecord,
    MatmulSpec,
    activation_needs,
    interleaved,
    render_matmul,
)
from qigen.codegen.render import render
from qigen.costmodel import Situation, predict
from qigen.costmodel.matmul import prefetch_distance
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout, pack, packed_shape
from qigen.formats.tensor import QuantizedTensor
from qigen.paths import resource_folder
from qigen.planner import isa_candidates
from qigen.toolchain import cache_folder

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
    rows = QuantizedTensor(spec.format, (16, nblocks * spec.format.block), fields)
    block = pack(rows, spec.layout)
    return block.tobytes() * -(-n // 16)


def case(spec: MatmulSpec, n: int, k: int, m: int) -> bytes:
    """The file that the timing program reads."""
    _, kblocks, size = packed_shape(spec.format, (n, k), spec.layout)
    weight = random_weight(spec, n, k)
    padded = kblocks * spec.layout.blocks * spec.format.block
    rng = np.random.default_rng(1)
    if spec.activations == "f32":
        row = rng.standard_normal(-(-padded // 16) * 16 + 16).astype(np.float32)
        x = np.tile(row, (m, 1))
        offsets = (0, 0, 0)
    else:
        zeros, sums = activation_needs(spec)
        length = -(-padded // 32) * 32
        record = ActivationRecord(length, spec.token_scale, zeros, sums)
        codes = np.zeros(record.nbytes, np.uint8)
        codes[: record.scale_offset] = rng.integers(0, 256, record.scale_offset)
        codes[record.scale_offset :].view(np.float32)[:] = 0.01
        x = interleaved(np.tile(codes, (m, 1)), spec.tiles)
        offsets = (
            record.scale_offset,
            record.offset("zero", *zeros[0]) if zeros else 0,
            record.offset("sum", sums[0]) if sums else 0,
        )
    sizes = (len(weight), x.nbytes, x.nbytes // m, kblocks * size)
    return struct.pack("<4q5i4x", *sizes, n, kblocks, *offsets) + weight + x.tobytes()


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
            main = f"{scratch}/main.cpp"
            self.compiler.run(
                [*FLAGS, include, "-pthread", main, str(kernel), "-o", str(target)], tag
            )
        stamp.write_text(content)
        return target

    def measure(
        self, spec: MatmulSpec, n: int, k: int, m: int, threads: int, mib: int, repeats: int
    ) -> list[float]:
        """Microseconds of every repeat but the first ones, ascending."""
        program = self.program(spec)
        with tempfile.NamedTemporaryFile(dir=self.folder) as f:
            f.write(case(spec, n, k, m))
            f.flush()
            out = subprocess.run(
                [program, f.name, str(m), str(threads), str(repeats), str(mib)],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
        return sorted(map(float, out.split()[2:]))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def tile_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-"))


def cases(options: argparse.Namespace) -> Iterator[tuple[MatmulSpec, int, int, int, int]]:
    """(kernel, n, k, m, threads) of every point; kernels of one point are adjacent."""
    machine = targets.native()
    isa = isa_by_name(options.isa) if options.isa else isa_candidates(machine)[0]
    for name in options.formats.split(","):
        for shape in options.shapes.split(","):
            n, k = map(int, shape.split("x"))
            for m in numbers(options.m):
                for threads in numbers(options.threads):
                    for tiles in map(tile_list, options.tiles.split(",")):
                        for blocks in numbers(options.blocks):
                            format = by_name(name)
                            if tiles[0] > max(m, 1) or k % (blocks * format.block):
                                continue
                            layout = Layout(16, blocks)
                            arithmetic = "f32" if format.float_kind else options.activations
                            prefetch = prefetch_distance(machine)
                            yield (
                                MatmulSpec(format, layout, isa, arithmetic, tiles, prefetch),
                                n, k, m, threads,
                            )  # fmt: skip


def ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    for rank, i in enumerate(order):
        out[i] = float(rank)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", help="default: the machine's best")
    parser.add_argument("--formats", default="q4_0,q4_k,q8_0,q6_k,u2g128")
    parser.add_argument("--shapes", default="2048x2048", help="NxK, separated by commas")
    parser.add_argument("--m", default="1,4,16,48")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tiles", default="1,2-1,4-1,8-1,12-1", help="e.g. 8-4-1,4-1")
    parser.add_argument("--blocks", default="1")
    parser.add_argument("--activations", default="int8")
    parser.add_argument("--cached", action="store_true", help="weights stay in the caches")
    parser.add_argument("--seconds", type=float, default=0.5, help="for one measurement")
    parser.add_argument("--json", type=Path, help="write the points to this file")
    options = parser.parse_args()
    folder = cache_folder() / "cost_model"
    folder.mkdir(parents=True, exist_ok=True)
    timer, machine = Timer(folder), targets.native()
    mib = 0 if options.cached else 6 * (machine.l3_bytes >> 20)
    points = []
    print("| kernel | tiles | shape | m | threads | measured us | predicted us | ratio | bound |")
    print("|---|---|---|---|---|---|---|---|---|")
    for spec, n, k, m, threads in cases(options):
        working_set = len(random_weight(spec, 16, k)) * -(-n // 16) if options.cached else None
        predicted = predict(spec, Situation(n, k, m, threads, machine, working_set))
        repeats = min(2000, max(20, int(options.seconds * 1e6 / predicted.us)))
        times = timer.measure(spec, n, k, m, threads, mib, repeats)
        us = times[len(times) // 4]
        points.append(
            {"kernel": spec.name, "format": spec.format.name, "tiles": spec.tiles, "n": n, "k": k,
             "m": m, "threads": threads, "us": us, "predicted_us": predicted.us,
             "bound": predicted.bound}
        )  # fmt: skip
        print(
            f"| {spec.name} | {'-'.join(map(str, spec.tiles))} | {n}x{k} | {m} | {threads} "
            f"| {us:.1f} | {predicted.us:.1f} | {predicted.us / us:.2f} | {predicted.bound} |",
            flush=True,
        )
    if len(points) > 2:
        summary(points)
    if options.json:
        options.json.write_text(json.dumps(points, indent=1))


def summary(points: list[dict[str, object]]) -> None:
    """Rank correlation over all points, and the regret of the pick at each product."""
    measured = [float(str(p["us"])) for p in points]
    predicted = [float(str(p["predicted_us"])) for p in points]
    rho = statistics.correlation(ranks(measured), ranks(predicted))
    ratios = sorted(p / m for p, m in zip(predicted, measured, strict=True))
    products: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for point, p, m in zip(points, predicted, measured, strict=True):
        key = tuple(point[name] for name in ("format", "n", "k", "m", "threads"))
        products.setdefault(key, []).append((p, m))
    regrets = sorted(min(v)[1] / min(m for _, m in v) - 1 for v in products.values() if len(v) > 1)
    print(f"\n{len(points)} points: rank correlation {rho:.3f}; predicted over measured: median "
          f"{statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")
    if regrets:
        print(f"the pick is {statistics.median(regrets):.1%} slower than the best in the median, "
              f"{regrets[-1]:.1%} at worst ({len(regrets)} products)")


if __name__ == "__main__":
    main()
