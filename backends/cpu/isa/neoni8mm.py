"""aarch64 with dot products of unsigned by signed bytes (FEAT_I8MM: Neoverse V1, Graviton 3)."""

from dataclasses import replace

from qigen.backends.cpu.isa.neondot import NEONDOT

NEONI8MM = replace(
    NEONDOT,
    name="neoni8mm",
    template="cpu/isa/neoni8mm.h.j2",
    features=("neon", "dotprod", "i8mm"),
    flags=("-march=armv8.2-a+dotprod+i8mm",),
    code_max=255,
    source="Arm Architecture Reference Manual (DDI 0487): USDOT accumulates in 32 bits",
)
