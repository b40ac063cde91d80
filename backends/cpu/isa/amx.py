"""x86-64 with AVX-512 and AMX: tile registers that multiply matrices of bytes and of bf16 (Sapphire
Rapids). Products of several pixels or tokens use the tiles, all else is AVX-512."""

from dataclasses import replace

from qigen.backends.cpu.isa.avx512bf16 import AVX512BF16

AMX = replace(
    AVX512BF16,
    name="amx",
    template="cpu/isa/amx.h.j2",
    features=(*AVX512BF16.features, "amx_tile", "amx_int8", "amx_bf16"),
    tiles=True,
    source="Intel SDM: TDPBUSD, TDPBF16PS",
)
