"""x86-64 with AVX2, FMA and F16C (x86-64-v3)."""

from qigen.backends.base import Isa

AVX2 = Isa(
    name="avx2",
    template="cpu/isa/avx2.h.j2",
    features=("avx", "avx2", "fma", "f16c"),
    flags=("-mavx2", "-mfma", "-mf16c"),
    registers=8,
    vectors=2,
    dot_limit=32767,
    dot_instructions=2,
    flush_instructions=2,
    source="Intel SDM: VPMADDUBSW saturates at 16 bits",
)
