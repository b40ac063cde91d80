"""x86-64 with AVX2 and AVX-VNNI: 256-bit byte dot products without AVX-512 (Alder Lake, Zen 5)."""

from dataclasses import replace

from qigen.backends.cpu.isa.avx2 import AVX2

AVXVNNI = replace(
    AVX2,
    name="avxvnni",
    template="cpu/isa/avxvnni.h.j2",
    features=(*AVX2.features, "avxvnni"),
    flags=(*AVX2.flags, "-mavxvnni"),
    dot_limit=None,
    dot_instructions=2,
    flush_instructions=0,
    source="Intel SDM: VEX-encoded VPDPBUSD accumulates in 32 bits without saturation",
)
