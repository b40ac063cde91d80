"""aarch64 with NEON, which every such processor has (Armv8.0-A; Raspberry Pi 3 and 4)."""

from qigen.backends.base import Isa

NEON = Isa(
    name="neon",
    template="cpu/isa/neon.h.j2",
    features=("neon",),
    flags=("-march=armv8-a",),
    registers=8,
    vectors=4,
    dot_limit=32767,
    dot_instructions=8,
    flush_instructions=8,
    code_max=127,
    source="Arm Architecture Reference Manual (DDI 0487): SMLAL wraps at 16 bits",
)
