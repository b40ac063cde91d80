"""Names of processor features: what an ISA row asks for and what a machine has.

The names are those of ``CpuFeature`` in ``runtime/include/qigen/generated.h``: the compiler flag
without ``-m``. Linux and archspec write some of them in other ways.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable
from pathlib import Path

import archspec.cpu  # type: ignore[import-untyped]

_X86: tuple[str, ...] = (
    "sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "avx", "f16c", "fma", "avx2", "bmi", "bmi2",
    "lzcnt", "movbe", "gfni", "avxvnni", "avxvnniint8", "avxifma", "avx512f", "avx512bw",
    "avx512dq", "avx512vl", "avx512cd", "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512bitalg",
    "avx512vpopcntdq", "avx512ifma", "avx512bf16", "avx512fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
_ARM: tuple[str, ...] = ("neon", "dotprod", "i8mm", "bf16", "sve")
FEATURES: tuple[str, ...] = (*_X86, *_ARM)

_SPELLED = {
    "pni": "sse3",
    "bmi1": "bmi",
    "abm": "lzcnt",
    "avx_vnni": "avxvnni",
    "avx_vnni_int8": "avxvnniint8",
    "avx_ifma": "avxifma",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "asimd": "neon",
    "asimddp": "dotprod",
}
"""What Linux (/proc/cpuinfo) and archspec call a feature that has another name here."""


def named(flags: Iterable[str]) -> tuple[str, ...]:
    """The features among the flags of /proc/cpuinfo or archspec, in the order of FEATURES."""
    found = {_SPELLED.get(flag, flag) for flag in flags}
    return tuple(name for name in FEATURES if name in found)


@functools.lru_cache(maxsize=1)
def of_this_machine() -> tuple[str, ...]:
    """The features that this processor and its operating system offer.

    Linux lists a feature in /proc/cpuinfo only if the kernel saves its registers, so that is asked
    first; elsewhere archspec knows.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):  # x86, ARM
                return named(value.split())
    return named(archspec.cpu.host().features)


def architecture(features: Iterable[str]) -> str:
    """x86_64 or aarch64, whichever has these features; '' if there are none."""
    found = {"x86_64" if name in _X86 else "aarch64" for name in features}
    assert len(found) <= 1, "features of two architectures"
    return found.pop() if found else ""


def host_system() -> str:
    """linux, macos or windows."""
    return {"Darwin": "macos"}.get(platform.system(), platform.system().lower())


def host_architecture() -> str:
    """x86_64 or aarch64: what this machine is, by one name on every system."""
    machine = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
