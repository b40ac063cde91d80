"""What a decoder step needs beside its products: norms, rotation and cache, attention, the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qigen.codegen.render import render
from qigen.errors import Unsupported, UsageError

KV_KINDS = ("f16", "int8", "int4")
MAX_HEAD_DIM = 256

MMA_ROWS = 64
"""Rows of queries of a block of attention on tensor cores."""

NORM_THREADS = 256
ELEMENTWISE_THREADS = 128
ARGMAX_THREADS = 256

CHUNK = 128
"""Positions that a block of decode attention takes at least, and what chunks are multiples of."""

MAX_CHUNKS = 64
"""Blocks that share the context of a head at most: bounds the memory of partial results."""


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def attention_chunk(max_seq: int) -> tuple[int, int]:
    """(positions of a partial result, partial results at most) for contexts of ``max_seq``."""
    chunk = max(CHUNK, _align(-(-max_seq // MAX_CHUNKS), CHUNK))
    return chunk, -(-max_seq // chunk)


@dataclass(frozen=True)
class KvSpec:
    """The cache of a layer: ``kind`` is f16, int8 or int4. See templates/cuda/kv.j2."""

    kind: str
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.kind not in KV_KINDS:
            raise UsageError(f"KV cache {self.kind}: choose one of {', '.join(KV_KINDS)}")
        if self.head_dim > MAX_HEAD_DIM:
            raise Unsupported(
                f"attention heads of {self.head_dim} have no GPU kernel; at most {MAX_HEAD_DIM}"
            )

    @property
    def padded(self) -> int:
        """Numbers of a row: what vector loads need."""
        return _align(self.head_dim, {"f16": 8, "int8": 16, "int4": 32}[self.kind])

    @property
    def row_bytes(self) -> int:
        """Bytes of the key or value of a head at a position, a multiple of 16."""
        return {"f16": 2 * self.padded, "int8": self.padded, "int4": self.padded // 2}[self.kind]

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scale."""
        return 0 if self.kind == "f16" else 4

    @property
    def position_bytes(self) -> int:
        """Bytes that a position takes in a layer."""
        return 2 * self.kv_heads * (self.row_bytes + self.scale_bytes)

    def parameters(self) -> dict[str, Any]:
        """What templates/cuda/kv.j2 asks for."""
        return {
            "kv": self.kind,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "padded": self.padded,
            "row_bytes": self.row_bytes,
            "scale_bytes": self.scale_bytes,
        }


@dataclass(frozen=True)
class RopeSpec:
    """Norm and rotation of the heads of q and k, and the write of k and v into the cache."""

    cache: KvSpec
    heads: int
    rotary_dim: int
    interleaved: bool
    qk_norm: bool

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        c = self.cache
        style = f"_{'i' if self.interleaved else 'h'}{self.rotary_dim}" if self.rotary_dim else ""
        norm = "_norm" * self.qk_norm
        return f"rope_{c.kind}_{self.heads}x{c.kv_heads}x{c.head_dim}{style}{norm}"

    def grid(self, tokens: int) -> tuple[int, int, int]:
        """Blocks of a step."""
        return self.heads + 2 * self.cache.kv_heads, tokens, 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return _align(self.cache.padded, 32), 1, 1


def render_rope(spec: RopeSpec) -> str:
    """CUDA text of ``spec.name(q, q_stride, k, k_stride, v, v_stride, positions, caches,
    layer_offset[, angles][, q_norm, k_norm, eps])``.

    ``angles`` are float pairs (cosine, sine) [positions][rotary_dim / 2].
    """
    return render(
        "cuda/rope.cu.j2",
        name=spec.name,
        heads=spec.heads,
        rotary_dim=spec.rotary_dim,
        interleaved=spec.interleaved,
        qk_norm=spec.qk_norm,
        threads=spec.block[0],
        **spec.cache.parameters(),
    )


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of a layer; ``softcap``: scores are capped (the cap is an argument)."""

    cache: KvSpec
    heads: int
    softcap: bool

    @property
    def name(self) -> str:
        """Name of the module, and what the names of its kernels begin with."""
        c = self.cache
        return f"attention_{c.kind}_{self.heads}x{c.kv_heads}x{c.head_dim}{'_cap' * self.softcap}"

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.cache.kv_heads

    def _shared(self, limit: int) -> int:
        """The most query heads of a group that a block of ``limit`` can share evenly."""
        return max(n for n in range(1, self.group + 1) if self.group % n == 0 and n <= limit)

    @property
    def shared_heads(self) -> int:
        """Query heads of a block of the split kernel."""
        return self._shared(max(1, min(8, 2048 // self.cache.padded)))

    @property
    def tile_heads(self) -> int:
        """Query heads of a block of the tiled kernel."""
        return self._shared(max(1, 4096 // (8 * max(self.cache.padded, 64))))

    @property
    def mma_name(self) -> str:
        """Name of the kernel on tensor cores and of its module."""
        return f"{self.name}_mma"

    @property
    def mma_heads(self) -> int:
        """Query heads of a block of the kernel on tensor cores."""
        return self._shared(16)

    @property
    def mma_tokens(self) -> int:
        """Tokens of a block of it: a row a token and head."""
        return MMA_ROWS // self.mma_heads

    @property
    def mma_width(self) -> int:
        """Numbers of a row of it: whole steps of an mma."""
        return _align(self.cache.padded, 16)

    @property
    def mma_keys(self) -> int:
        """Keys that it takes at a time."""
        return 64 if self.mma_width <= 128 else 32

    @property
    def mma_shared(self) -> int:
        """Its dynamic shared memory: queries, then keys and values as halves, or in one place what
        either is turned into, and the codes and scales of both."""
        pitch, c = 2 * self.mma_width + 16, self.cache
        if c.kind == "f16":
            return (MMA_ROWS + 2 * self.mma_keys) * pitch
        return (MMA_ROWS + self.mma_keys) * pitch + 2 * self.mma_keys * (c.row_bytes + 4)

    def mma_grid(self, tokens: int) -> tuple[int, int, int]:
        """Blocks of the kernel on tensor cores."""
        return self.heads // self.mma_heads, -(-tokens // self.mma_tokens), 1

    def split_grid(self, tokens: int, chunks: int) -> tuple[int, int, int]:
        """Blocks of the split kernel."""
        return chunks, self.heads // self.shared_heads, tokens

    def combine_grid(self, tokens: int) -> tuple[int, int, int]:
        """Blocks of the kernel that adds the parts of the split one."""
        return self.heads, tokens, 1

    def tiled_grid(self, tokens: int) -> tuple[int, int, int]:
        """Blocks of the tiled kernel."""
        return self.heads // self.tile_heads, -(-tokens // 8), 1

    @property
    def combine_block(self) -> tuple[int, int, int]:
        """Threads of a block of the combining kernel."""
        return _align(self.cache.head_dim, 32), 1, 1

    def partial_floats(self, tokens: int, chunks: int) -> int:
        """Floats of scratch memory between the split and the combining kernel."""
        return tokens * self.heads * chunks * (self.cache.head_dim + 2)


def render_attention(spec: AttentionSpec) -> str:
    """CUDA text of three kernels, ``common`` being ``positions, caches, layer_offset, scale,
    window[, cap]``.

    ``NAME_split(partial, q, q_stride, common, chunk, chunks)`` and ``NAME_combine(out, out_stride,
    partial, positions, window, chunk, chunks)``: the context of every token is split.
    ``NAME_tiled(out, out_stride, q, q_stride, common, tokens)``: tokens of one session.
    """
    lanes = 1
    while 8 * lanes < spec.cache.padded:
        lanes *= 2
    return render(
        "cuda/attention.cu.j2",
        prefix=spec.name,
        heads=spec.heads,
        group=spec.group,
        lanes=lanes,
        shared_heads=spec.shared_heads,
        tile_heads=spec.tile_heads,
        softcap=spec.softcap,
        combine_threads=spec.combine_block[0],
        **spec.cache.parameters(),
    )


def render_attention_mma(spec: AttentionSpec) -> str:
    """CUDA text of ``spec.mma_name(out, out_stride, q, q_stride, common, tokens)``: as
    ``NAME_tiled``, on tensor cores. Rows of the cache lie at multiples of 16 bytes and their scales
    by fours: its capacity is a multiple of 4 positions."""
    return render(
        "cuda/attention_mma.cu.j2",
        name=spec.mma_name,
        heads=spec.heads,
        group=spec.group,
        tile_heads=spec.mma_heads,
        tile_tokens=spec.mma_tokens,
        width=spec.mma_width,
        keys=spec.mma_keys,
        softcap=spec.softcap,
        sparse=False,
        x_bits=16,
        **spec.cache.parameters(),
    )


@dataclass(frozen=True)
class NormSpec:
    """Norm of rows: "rms" or "layer"; ``add``: a matrix is added behind it."""

    kind: str = "rms"
    add: bool = False

    @property
    def name(self) -> str:
        """Name of the kernel and of its module."""
        return f"norm_{self.kind}{'_add' * self.add}"

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block; a row takes a block."""
        return NORM_THREADS, 1, 1


def render_norm(spec: NormSpec) -> str:
    """CUDA text of ``spec.name(y, y_stride, x, x_stride, w, n, eps[, bias][, base, base_stride])``;
    ``bias`` of a layer norm, ``base`` is what the norm is added to and may be y."""
    return render(
        "cuda/norm.cu.j2", name=spec.name, kind=spec.kind, add=spec.add, threads=NORM_THREADS
    )


def elementwise_grid(rows: int, n: int) -> tuple[int, int, int]:
    """Blocks of an elementwise kernel."""
    return -(-n // ELEMENTWISE_THREADS), rows, 1


def render_elementwise(kind: str) -> str:
    """CUDA text of ``elementwise_KIND(y, y_stride, n, ...)`` for rows of n numbers.

    "silu", "gelu_tanh": (gate, gate_stride, up, up_stride); "softcap": (float cap), in place;
    "rows": (x, x_stride, int* rows); "columns": (x, x_stride, int* columns); "half": (x, x_stride,
    k) for halves y; "sum": (x, x_stride, z, z_stride); "bias": (bias), in place.
    """
    return render(
        "cuda/elementwise.cu.j2", name=f"elementwise_{kind}", kind=kind, threads=ELEMENTWISE_THREADS
    )


CHOOSE_THREADS = 512

SAMPLING_BYTES = 32
"""Of the numbers that say how the next token is chosen (struct Sampling of choose.cu.j2)."""


def render_choose() -> str:
    """CUDA text of ``choose(int* token, logits, sampling, n)``: the next token from one row of
    logits, as runtime/src/sampler.cpp draws it. One block of :data:`CHOOSE_THREADS` threads."""
    return render("cuda/choose.cu.j2", threads=CHOOSE_THREADS)


QUANTIZE_THREADS = 256

MAX_QUANTIZED = 32768
"""K of a row with columns apart at most: a block has a bit for every column."""


def quantize_name(bits: int, columns: int = 0) -> str:
    """Name of the kernel of :func:`render_quantize` and of its module."""
    return f"quantize_{bits}" + (f"_c{columns}" if columns else "")


def render_quantize(bits: int, columns: int = 0) -> str:
    """CUDA text of ``quantize_BITS[_cCOLUMNS](codes, ldx, scales, x, x_stride, k[, apart,
    columns])``: float rows as signed codes with a scale a row, codes two a byte if they
    have 4 bits; a block a row. ``columns`` of x, given as uint16 [columns], go to ``apart``
    f16 [rows, columns]."""
    return render("cuda/quantize.cu.j2", name=quantize_name(bits, columns), bits=bits,
                  columns=columns, flags=MAX_QUANTIZED // 32, threads=QUANTIZE_THREADS)


def render_argmax() -> str:
    """CUDA text of ``argmax(int* tokens, logits, int64 stride, n)``, a block a row."""
    return render("cuda/sample.cu.j2", threads=ARGMAX_THREADS)
