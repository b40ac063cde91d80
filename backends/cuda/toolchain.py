"""The CUDA compiler and the SASS readers: CUDA text to PTX and cubins, without a driver.

The compiler is NVRTC, which needs no host compiler: the shared library of the wheels
``nvidia-cuda-nvrtc-cu12`` or ``-cu13``, or the one that QIGEN_NVRTC names. Without one it is the
``nvcc`` of an installed CUDA toolkit (on the PATH); QIGEN_NVCC names one that is taken in any case.
``nvdisasm`` and ``cuobjdump`` come from their wheels or the PATH. Results are cached by content, as
objects of the C++ compiler are (:mod:`qigen.toolchain`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qigen.errors import ToolchainError, UsageError
from qigen.toolchain import cache_folder

EXAMPLES = {
    "sm_80": "Ampere: A100, A30",
    "sm_86": "Ampere: A40, A10, RTX 3090",
    "sm_89": "Ada: L40S, L4, RTX 4090",
    "sm_90": "Hopper: H100, H200",
    "sm_120": "Blackwell: RTX 5090, RTX PRO 6000",
}
"""GPUs of each architecture (developer.nvidia.com/cuda-gpus)."""

ARCHS = tuple(EXAMPLES)
"""Targets that kernels are compiled and gated for."""

_OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--extra-device-vectorization")
_NVCC_OPTIONS = ("--std=c++17", "--extra-device-vectorization")
_LEAST = (12, 8)  # the first that knows sm_120
_INSTALL = ("pip install 'qigen[cuda]', or set QIGEN_NVRTC to libnvrtc.so or QIGEN_NVCC to nvcc of "
            "CUDA 12.8 or later")


def check_arch(arch: str) -> str:
    """``arch`` if it is a row of :data:`ARCHS`; UsageError names the rows otherwise."""
    if arch not in ARCHS:
        raise UsageError(f"GPU target {arch}: choose among {', '.join(ARCHS)}")
    return arch


def _wheel_folders() -> list[Path]:
    """The folders of the ``nvidia`` namespace package, which every wheel of NVIDIA adds to."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def _libraries() -> list[Path]:
    named = os.environ.get("QIGEN_NVRTC")
    if named:
        return [Path(named)]
    found: list[Path] = []
    for folder in _wheel_folders():
        for pattern in ("cuda_nvrtc/lib/libnvrtc.so.1?", "cu13/lib/libnvrtc.so.1?"):
            found += sorted(folder.glob(pattern))
    return found


@dataclass(frozen=True)
class Nvrtc:
    """The loaded compiler library and its version, such as (12, 9)."""

    library: ctypes.CDLL
    version: tuple[int, int]

    @property
    def label(self) -> str:
        """What the manifest and the golden numbers call it."""
        return ".".join(map(str, self.version))

    def compile(self, text: str, name: str, arch: str, kind: str, lines: bool) -> bytes:
        """``text`` as 'PTX' (of the virtual architecture) or 'CUBIN' of ``arch``; ``lines``: it
        says which line of the text an instruction comes from.

        Raises ToolchainError with the first lines of the compiler's complaint.
        """
        library = self.library
        virtual = arch if kind == "CUBIN" else arch.replace("sm_", "compute_")
        options = [o.encode() for o in (f"--gpu-architecture={virtual}", *_OPTIONS)]
        if lines:
            options.append(b"--generate-line-info")
        program = ctypes.c_void_p()
        self._check(
            library.nvrtcCreateProgram(
                ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None
            ),
            name,
        )
        try:
            array = (ctypes.c_char_p * len(options))(*options)
            code = library.nvrtcCompileProgram(program, len(options), array)
            if code:
                log = self._fetch(program, "ProgramLog", name).decode(errors="replace")
                said = [line for line in log.splitlines() if "error" in line.lower()]
                shown = " | ".join((said or log.splitlines())[:3])
                raise ToolchainError(f"NVRTC failed for {arch}: {shown}", name)
            return self._fetch(program, kind, name)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _check(self, code: int, name: str) -> None:
        if code:
            text = self.library.nvrtcGetErrorString(code).decode()
            raise ToolchainError(f"NVRTC: {text}", name)

    def _fetch(self, program: ctypes.c_void_p, what: str, name: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(
            getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), name
        )
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer), name)
        return buffer.raw if what == "CUBIN" else buffer.raw.rstrip(b"\0")


@dataclass(frozen=True)
class Nvcc:
    """The compiler driver of an installed CUDA toolkit, and its version."""

    path: str
    version: tuple[int, int]

    @property
    def label(self) -> str:
        """What the manifest calls it."""
        return f"nvcc {self.version[0]}.{self.version[1]}"

    def compile(self, text: str, name: str, arch: str, kind: str, lines: bool) -> bytes:
        """As :meth:`Nvrtc.compile`."""
        target = arch if kind == "CUBIN" else arch.replace("sm_", "compute_")
        options = [f"--{kind.lower()}", f"--gpu-architecture={target}", *_NVCC_OPTIONS,
                   *(["--generate-line-info"] if lines else [])]
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder, f"{name[:80]}.cu"), Path(folder, "made")
            source.write_text(text)
            done = subprocess.run([self.path, *options, "-o", str(made), str(source)],
                                  capture_output=True, text=True)
            if done.returncode:
                log = (done.stderr + done.stdout).splitlines()
                said = [line for line in log if "error" in line.lower()]
                shown = " | ".join((said or log)[:3])
                raise ToolchainError(f"nvcc failed for {arch}: {shown}", name)
            return made.read_bytes()


def _nvcc() -> str | None:
    return os.environ.get("QIGEN_NVCC") or shutil.which("nvcc")


def _find_nvcc(path: str) -> Nvcc:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise ToolchainError(f"nvcc cannot be started ({error}); {_INSTALL}", path) from None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if found is None:
        raise ToolchainError(f"this is no nvcc: it says no release; {_INSTALL}", path)
    return Nvcc(path, (int(found[1]), int(found[2])))


def _checked(compiler: Nvrtc | Nvcc, path: str) -> Nvrtc | Nvcc:
    if compiler.version < _LEAST:
        name = "NVRTC" if isinstance(compiler, Nvrtc) else "nvcc"
        raise ToolchainError(f"{name} {compiler.version[0]}.{compiler.version[1]} knows no sm_120; "
                             f"{_INSTALL}", path)
    return compiler


@functools.lru_cache(maxsize=1)
def find_compiler() -> Nvrtc | Nvcc:
    """The compiler; ToolchainError says what to install if there is none or it is too old."""
    libraries, nvcc = _libraries(), _nvcc()
    if nvcc is not None and (not libraries or "QIGEN_NVCC" in os.environ):
        return _checked(_find_nvcc(nvcc), nvcc)
    if not libraries:
        raise ToolchainError(f"there is no CUDA compiler (NVRTC or nvcc); {_INSTALL}")
    path = libraries[-1]
    try:
        # it looks for this one by name, outside of every search path when it came by pip
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ToolchainError(f"NVRTC cannot be loaded ({error}); {_INSTALL}", str(path)) from None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return _checked(Nvrtc(library, (major.value, minor.value)), str(path))


def available() -> bool:
    """Whether CUDA text can be compiled here."""
    return bool(_libraries()) or _nvcc() is not None


def _cached(text: str, name: str, arch: str, kind: str, lines: bool = False) -> bytes:
    check_arch(arch)
    compiler = find_compiler()
    digest = hashlib.blake2b(digest_size=20)
    which = str(compiler.version) if isinstance(compiler, Nvrtc) else compiler.label
    for part in (which, arch, kind, str(lines), *_OPTIONS, text):
        digest.update(part.encode() + b"\0")
    target = cache_folder() / "cuda" / f"{name[:80]}-{arch}-{digest.hexdigest()}.{kind.lower()}"
    if target.exists():
        os.utime(target)
        return target.read_bytes()
    made = compiler.compile(text, name, arch, kind, lines)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as stream:
        stream.write(made)
    Path(stream.name).replace(target)
    return made


def compile_ptx(name: str, text: str, arch: str = "sm_80", lines: bool = True) -> str:
    """The PTX of CUDA ``text``: what the emulator runs and what later devices compile at load.

    ``lines``: with the lines of the text, which the emulator's findings name.
    """
    return _cached(text, name, arch, "PTX", lines).decode()


def compile_cubin(name: str, text: str, arch: str) -> bytes:
    """The machine code of CUDA ``text`` for ``arch``, a row of :data:`ARCHS`."""
    return _cached(text, name, arch, "CUBIN")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: its guard ('' or such as '@!P0'), opcode with modifiers, operands."""

    guard: str
    opcode: str
    operands: str


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes of stack, static shared and local memory."""

    registers: int
    stack: int
    shared: int
    local: int


def _find_tool(name: str) -> str | None:
    for folder in _wheel_folders():
        for path in (*folder.glob(f"cu1?/bin/{name}"), *folder.glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name)


def reads_sass() -> bool:
    """Whether machine code can be read back here: not all toolkits have the tools."""
    return all(_find_tool(name) is not None for name in ("nvdisasm", "cuobjdump"))


def _run_tool(arguments: Sequence[str], cubin: bytes) -> str:
    tool = _find_tool(arguments[0])
    if tool is None:
        raise ToolchainError(f"{arguments[0]} is missing; pip install nvidia-cuda-{arguments[0]}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        done = subprocess.run(
            [tool, *arguments[1:], stream.name], capture_output=True, text=True
        )
    if done.returncode:
        raise ToolchainError(f"{arguments[0]} failed: {done.stderr.strip()[:200]}")
    return done.stdout


def read_sass(cubin: bytes) -> Mapping[str, tuple[Instruction, ...]]:
    """The instructions of every function of a cubin, in the order of their addresses."""
    document: list[Any] = json.loads(_run_tool(["nvdisasm", "-json"], cubin))
    return {
        function["function-name"]: tuple(
            Instruction(i.get("predicate", ""), i["opcode"], i.get("operands", ""))
            for i in function["sass-instructions"]
        )
        for function in document[1]
    }


def read_resources(cubin: bytes) -> Mapping[str, Resources]:
    """Registers, stack, shared and local memory of every function of a cubin."""
    text = _run_tool(["cuobjdump", "-res-usage"], cubin)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {m[1]: Resources(*(int(m[i]) for i in range(2, 6))) for m in re.finditer(pattern, text)}
