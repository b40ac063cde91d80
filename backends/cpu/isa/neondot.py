"""aarch64 with dot products of signed bytes (Armv8.2: Neoverse N1, Apple M1, Raspberry Pi 5)."""

from dataclasses import replace

from qigen.backends.cpu.isa.neon import NEON

NEONDOT = replace(
    NEON,
    name="neondot",
    template="cpu/isa/neondot.h.j2",
    features=("neon", "dotprod"),
    flags=("-march=armv8.2-a+dotprod",),
    dot_limit=None,
    dot_instructions=4,
    flush_instructions=0,
    source="Arm Architecture Reference Manual (DDI 0487): SDOT accumulates in 32 bits",
)
