"""aarch64 with the dot products of bytes and of bf16 pairs (FEAT_I8MM, FEAT_BF16: Apple M2)."""

from dataclasses import replace

from qigen.backends.cpu.isa.neoni8mm import NEONI8MM

NEONBF16 = replace(
    NEONI8MM,
    name="neonbf16",
    template="cpu/isa/neonbf16.h.j2",
    features=("neon", "dotprod", "i8mm", "bf16"),
    flags=("-march=armv8.2-a+dotprod+i8mm+bf16",),
    native_bf16=True,
    source="Arm Architecture Reference Manual (DDI 0487): BFDOT rounds sums to odd",
)
