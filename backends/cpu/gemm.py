"""The gemm family: matrix products and NHWC convolutions of graphs whose activations are tensors.

``gemm.cpp`` is an implicit GEMM: a pixel's inputs are gathered through byte offsets (taps), so one
kernel serves products, pointwise and spatial convolutions. ``depthwise.cpp`` has one input channel
for each output channel, ``gemm_prepare.cpp`` pads, converts and quantizes what they read. Both
kernels end in a chain of elementwise functions before outputs are rounded to their type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.backends.base import Isa, KernelSource
from qigen.backends.cpu.elementwise import Step, chain_lines
from qigen.codegen.render import render
from qigen.errors import Unsupported

Array = npt.NDArray[Any]

LANES = 16
I32_MAX = 2**31 - 1
F32_INTEGERS = 2**24
"""Up to here float32 holds every integer."""
PRODUCT_MAX = 255 * 128
"""Largest magnitude of u8 times s8."""

STRIP_PIXELS, STRIP_ROWS = 1024, 64
"""What depthwise.cpp copies of x: 64 KiB of one row-block, a line for each row of the kernel."""

PER: dict[str, int] = {"f32": 1, "f32s8": 1, "bf16": 2, "u8s8": 4}
"""Channels of one step (4 bytes of x) by arithmetic; f32s8 is f32 by int8 weights with a scale by
output channel."""
_ELEMENT: dict[str, npt.DTypeLike] = {
    "f32": np.float32, "f32s8": np.int8, "bf16": np.uint16, "u8s8": np.int8,
}  # fmt: skip
OUTPUTS = ("f32", "bf16", "u8", "s8", "i32")
INPUT_KINDS = ("full", "channel")
MAX_INPUTS = 4


@dataclass(frozen=True)
class Tiles:
    """Register tiles: up to ``pixels`` by ``blocks`` row-blocks of 16 channels, twice as many
    blocks where there are at most ``tall`` pixels. ``block_bytes`` of x stay in the L2 cache.
    ``matrix``: the tiles lie in tile registers."""

    pixels: int
    blocks: int
    tall: int
    block_bytes: int
    matrix: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(row-blocks, most pixels), tall ones first, down to one row-block."""
        found = [(2 * self.blocks, self.tall)] if self.tall else []
        blocks = self.blocks
        while blocks:
            found.append((blocks, self.pixels))
            blocks //= 2
        return tuple(found)


def tiles_for(isa: Isa, arithmetic: str) -> Tiles:
    """The tiles that fill the registers of an ISA.

    A tile holds pixels x blocks sums, the weights of its blocks and what broadcasts x. Where a dot
    product is emulated, the weights are split into halves and x into two broadcasts.
    """
    if isa.tiles and arithmetic in ("u8s8", "bf16"):
        return Tiles(16, 2, 0, 1 << 19, matrix=True)
    if not isa.features:
        return Tiles(2, 1, 0, 1 << 17)
    native = {"f32": True, "f32s8": True, "bf16": isa.native_bf16,
              "u8s8": isa.dot_limit is None}[arithmetic]  # fmt: skip
    if isa.registers >= 32:
        return Tiles(12 if native else 10, 2, 4, 1 << 19)
    return Tiles(6 if native else 4, 1, 2 if native else 1, 1 << 17)


# ---- packed weights ----

def packed_bytes(n: int, taps: int, k: int, arithmetic: str) -> int:
    """Bytes of the packed weights of ``n`` output channels."""
    return -(-n // LANES) * row_block_bytes(taps, k, arithmetic)


def row_block_bytes(taps: int, k: int, arithmetic: str) -> int:
    """Bytes of 16 output channels (``GemmArgs::row_block``)."""
    return taps * steps(k, arithmetic) * step_bytes(arithmetic)


def step_bytes(arithmetic: str) -> int:
    """Packed weights of one step: 16 output channels by the inputs of a step."""
    return LANES * PER[arithmetic] * np.dtype(_ELEMENT[arithmetic]).itemsize


def steps(k: int, arithmetic: str) -> int:
    """Steps of ``k`` channels of a tap (``GemmArgs::steps``)."""
    return -(-k // PER[arithmetic])


def pack_weights(w: Array, arithmetic: str) -> npt.NDArray[np.uint8]:
    """Weights [N, taps, K] as the kernels stream them: [N / 16][tap][step][16][per], zeros after K.

    The elements are float32, bf16 bits (uint16) or int8, by the arithmetic.
    """
    n, taps, k = w.shape
    per = PER[arithmetic]
    if w.dtype != _ELEMENT[arithmetic]:
        raise TypeError(f"weights of {arithmetic} are {np.dtype(_ELEMENT[arithmetic])}")
    blocks, count = -(-n // LANES), steps(k, arithmetic)
    full = np.zeros((blocks * LANES, taps, count * per), w.dtype)
    full[:n, :, :k] = w
    order = full.reshape(blocks, LANES, taps, count, per).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(order).reshape(-1).view(np.uint8)


def unpack_weights(packed: npt.NDArray[np.uint8], n: int, taps: int, k: int,
                   arithmetic: str) -> Array:  # fmt: skip
    """The inverse of :func:`pack_weights`."""
    per, count = PER[arithmetic], steps(k, arithmetic)
    order = packed.view(_ELEMENT[arithmetic]).reshape(-1, taps, count, LANES, per)
    full = order.transpose(0, 3, 1, 2, 4).reshape(-1, taps, count * per)
    return np.ascontiguousarray(full[:n, :, :k])


def check_sums(products: int) -> None:
    """Unsupported if int32 could not hold a sum of ``products`` products of u8 and s8."""
    if products * PRODUCT_MAX > I32_MAX:
        raise Unsupported(f"sums of {products} products of bytes overflow 32 bits "
                          f"({I32_MAX // PRODUCT_MAX} are the most)")  # fmt: skip


# ---- kernels ----

@dataclass(frozen=True)
class _Output:
    """What is done to sums: zeros and scales (u8s8), bias, chain, type of the output.

    ``chain`` names the sums with their bias ``acc`` and the inputs ``in0``.. of kinds ``inputs``:
    "full" (f32, a value for each output) or "channel". ``dynamic``: scale and zero of x are read at
    run time. ``divide``: u8 and s8 outputs are divided by y_scale; else the caller folded it in.
    """

    isa: Isa
    arithmetic: str
    chain: tuple[Step, ...] = ()
    inputs: tuple[str, ...] = ()
    output: str = "f32"
    dynamic: bool = False
    divide: bool = True

    def __post_init__(self) -> None:
        assert self.arithmetic in PER and self.output in OUTPUTS
        assert len(self.inputs) <= MAX_INPUTS and set(self.inputs) <= set(INPUT_KINDS)
        used = {a for step in self.chain for a in step.args if a.startswith("in")}
        assert used == {f"in{i}" for i in range(len(self.inputs))}, "the chain reads all inputs"

    @property
    def suffix(self) -> str:
        """The part of the name that says what is done to sums."""
        kind = f"{self.arithmetic}{'_dynamic' if self.dynamic else ''}"
        ops = "_".join(step.op for step in self.chain)
        if ops:
            text = repr((self.chain, self.inputs))
            ops = f"{ops[:24].rstrip('_')}_{hashlib.sha256(text.encode()).hexdigest()[:8]}_"
        scaled = self.output in ("u8", "s8") and not self.divide
        return f"{kind}_{ops}{self.output}{'_folded' if scaled else ''}__{self.isa.name}"

    def parameters(self) -> dict[str, Any]:
        """What the templates read."""
        lines = chain_lines(self.chain)
        return {
            "isa": self.isa, "arithmetic": self.arithmetic, "inputs": self.inputs,
            "chain": lines, "result": f"t{len(lines) - 1}" if lines else "acc",
            "output": self.output, "dynamic": self.dynamic, "divide": self.divide,
        }  # fmt: skip

    def describe(self) -> list[str]:
        """Lines of a banner."""
        steps_ = ", ".join(step.op for step in self.chain) or "none"
        lines = [f"Chain: {steps_}; inputs: {', '.join(self.inputs) or 'none'}; "
                 f"output {self.output}."]  # fmt: skip
        if self.arithmetic == "u8s8":
            where = "read at run time" if self.dynamic else "constant"
            lines.append(f"x is u8, its scale and zero {where}.")
        return lines


@dataclass(frozen=True)
class GemmSpec(_Output):
    """A kernel for matrix products and convolutions; ``chosen`` takes the place of the tiles that
    :func:`tiles_for` gives. Every tiling has the same results to the last bit."""

    chosen: Tiles | None = None

    @property
    def tiles(self) -> Tiles:
        """Its register tiles."""
        return self.chosen or tiles_for(self.isa, self.arithmetic)

    @property
    def name(self) -> str:
        """E.g. ``gemm_f32_f32__avx512vnni_12x2``: also the entry."""
        own, tiles = tiles_for(self.isa, self.arithmetic), self.tiles
        name = f"gemm_{self.suffix}_{tiles.pixels}x{tiles.blocks}"
        if (tiles.tall, tiles.block_bytes) != (own.tall, own.block_bytes):
            name += f"_t{tiles.tall}_{tiles.block_bytes >> 10}k"
        return name


def render_gemm(spec: GemmSpec) -> KernelSource:
    """The translation unit of a kernel; ``spec.name(const GemmArgs&, int thread, int threads)``."""
    tiles = spec.tiles
    lines = [
        f"{spec.name}: {spec.arithmetic}, {spec.isa.name}.",
        "Template: cpu/gemm.cpp.j2; "
        f"tiles of {tiles.pixels} pixels by {16 * tiles.blocks} channels.",
        *spec.describe(),
    ]
    if spec.arithmetic == "u8s8":
        lines.append(f"Sums of up to {I32_MAX // PRODUCT_MAX} products are exact in 32 bits.")
    text = render("cpu/gemm.cpp.j2", kernel=spec.name, banner=_banner(lines), tiles=tiles,
                  shapes=tiles.shapes, step_bytes=step_bytes(spec.arithmetic),
                  **spec.parameters())  # fmt: skip
    return KernelSource(spec.name, text, spec.isa.name, (spec.name,))


@dataclass(frozen=True)
class DepthwiseSpec(_Output):
    """A kernel for depthwise convolutions (multiplier 1), f32 or u8s8."""

    @property
    def pixels(self) -> int:
        """The most pixels of a tile: their sums, one vector of weights and one of x."""
        if not self.isa.features:
            return 2
        return 8 if self.isa.registers >= 32 else 4

    @property
    def name(self) -> str:
        """E.g. ``depthwise_f32_f32__avx512vnni``: also the entry."""
        return f"depthwise_{self.suffix}"


def render_depthwise(spec: DepthwiseSpec) -> KernelSource:
    """The translation unit of a kernel; ``spec.name(const DepthwiseArgs&, int, int)``."""
    lines = [
        f"{spec.name}: {spec.arithmetic}, {spec.isa.name}.",
        f"Template: cpu/depthwise.cpp.j2; tiles of {spec.pixels} pixels by 16 channels.",
        *spec.describe(),
    ]
    if spec.arithmetic == "u8s8":
        lines.append(f"Sums of up to {F32_INTEGERS // PRODUCT_MAX} products are exact in float32.")
    text = render("cpu/depthwise.cpp.j2", kernel=spec.name, banner=_banner(lines),
                  pixels=spec.pixels, strip=STRIP_PIXELS, rows=STRIP_ROWS,
                  **spec.parameters())  # fmt: skip
    return KernelSource(spec.name, text, spec.isa.name, (spec.name,))


def pack_depthwise(w: Array) -> npt.NDArray[np.float32]:
    """Weights [taps, C], float32 or int8, as float32 [taps, C padded to 16]."""
    taps, channels = w.shape
    packed = np.zeros((taps, -(-channels // LANES) * LANES), np.float32)
    packed[:, :channels] = w
    return packed


def check_depthwise(kernel: tuple[int, int], dilation_w: int, arithmetic: str) -> None:
    """Unsupported for kernels (height, width) that depthwise.cpp was not written for.

    The products of bytes are summed in float32: integers up to 2^24 are exact, and the magnitude of
    every partial sum of (x - zero) w is at most taps * 255 * 128.
    """
    height, width = kernel
    if height > STRIP_ROWS or height * ((width - 1) * dilation_w + 1) > STRIP_PIXELS:
        raise Unsupported(f"depthwise kernels of {height} x {width} with dilation {dilation_w} are "
                          f"too large: {STRIP_PIXELS} pixels are the most")  # fmt: skip
    if arithmetic == "u8s8" and height * width * PRODUCT_MAX > F32_INTEGERS:
        raise Unsupported(f"sums of {height * width} products of bytes are not exact in float32 "
                          f"({F32_INTEGERS // PRODUCT_MAX} are the most)")  # fmt: skip


PREPARE_ENTRIES: dict[str, str] = {
    "gemm_pad_f32": "PadArgs", "gemm_pad_bf16": "PadArgs", "gemm_pad_bytes": "PadArgs",
    "gemm_pad_u8": "PadArgs", "gemm_minmax": "PadArgs", "gemm_pad_u8_dynamic": "PadArgs",
    "gemm_quantize_rows": "QuantizeRowsArgs", "gemm_quantize_rows_symmetric": "QuantizeRowsArgs",
}  # fmt: skip
"""The functions of gemm_prepare and the structs of their arguments."""


def render_prepare(isa: Isa) -> KernelSource:
    """The translation unit of the functions that pad, convert and quantize inputs."""
    banner = _banner([f"Inputs of the gemm and depthwise kernels, {isa.name}.",
                      "Template: cpu/gemm_prepare.cpp.j2."])  # fmt: skip
    text = render("cpu/gemm_prepare.cpp.j2", banner=banner, isa=isa)
    return KernelSource("gemm_prepare", text, isa.name, tuple(PREPARE_ENTRIES))


def _banner(lines: Sequence[str]) -> str:
    return "\n".join(f"// {line}" for line in lines)
