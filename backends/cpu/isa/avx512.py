"""x86-64 with AVX-512 F/BW/DQ/VL (x86-64-v4: Skylake-SP)."""

from dataclasses import replace

from qigen.backends.cpu.isa.avx512vnni import AVX512VNNI

AVX512 = replace(
    AVX512VNNI,
    name="avx512",
    template="cpu/isa/avx512.h.j2",
    features=tuple(f for f in AVX512VNNI.features if f != "avx512vnni"),
    flags=tuple(f for f in AVX512VNNI.flags if f != "-mavx512vnni"),
    dot_limit=32767,
    dot_instructions=2,
    flush_instructions=2,
    source="Intel SDM: VPMADDUBSW saturates at 16 bits",
)
