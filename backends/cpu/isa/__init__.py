"""The ISA table of the CPU backend: one file a row."""

from __future__ import annotations

from qigen.backends.base import Isa
from qigen.backends.cpu.isa.amx import AMX
from qigen.backends.cpu.isa.avx2 import AVX2
from qigen.backends.cpu.isa.avx512 import AVX512
from qigen.backends.cpu.isa.avx512bf16 import AVX512BF16
from qigen.backends.cpu.isa.avx512vnni import AVX512VNNI
from qigen.backends.cpu.isa.avxvnni import AVXVNNI
from qigen.backends.cpu.isa.neon import NEON
from qigen.backends.cpu.isa.neonbf16 import NEONBF16
from qigen.backends.cpu.isa.neondot import NEONDOT
from qigen.backends.cpu.isa.neoni8mm import NEONI8MM
from qigen.backends.cpu.isa.scalar import SCALAR
from qigen.errors import Unsupported

ISAS: dict[str, Isa] = {isa.name: isa for isa in (
    SCALAR,
    AVX2, AVXVNNI, AVX512, AVX512VNNI, AVX512BF16, AMX,
    NEON, NEONDOT, NEONI8MM, NEONBF16,
)}  # fmt: skip
"""Rows from the most portable to the fastest, one architecture after the other."""


def by_name(name: str) -> Isa:
    """The ISA row ``name``; Unsupported names the known ones."""
    if name not in ISAS:
        raise Unsupported(f"ISA {name} is unknown; choose one of {', '.join(ISAS)}")
    return ISAS[name]
