"""x86-64 with AVX-512 F/BW/DQ/VL and VNNI."""

from qigen.backends.base import Isa

AVX512VNNI = Isa(
    name="avx512vnni",
    template="cpu/isa/avx512vnni.h.j2",
    features=(
        "avx", "avx2", "fma", "f16c",
        "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni",
    ),
    flags=(
        "-mavx2", "-mfma", "-mf16c",
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
        "-mprefer-vector-width=512",
    ),
    registers=32,
    vectors=1,
    dot_limit=None,
    dot_instructions=1,
    flush_instructions=0,
    row_tile=2,
    source="Intel SDM: VPDPBUSD accumulates in 32 bits without saturation",
)
