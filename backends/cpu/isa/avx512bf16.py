"""x86-64 with AVX-512 F/BW/DQ/VL, VNNI and BF16 (Zen 4, Cooper Lake, Sapphire Rapids)."""

from dataclasses import replace

from qigen.backends.cpu.isa.avx512vnni import AVX512VNNI

AVX512BF16 = replace(
    AVX512VNNI,
    name="avx512bf16",
    template="cpu/isa/avx512bf16.h.j2",
    features=(*AVX512VNNI.features, "avx512bf16"),
    flags=(*AVX512VNNI.flags, "-mavx512bf16"),
    native_bf16=True,
    source="Intel SDM: VDPBF16PS",
)
