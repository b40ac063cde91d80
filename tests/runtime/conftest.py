"""A fake artifact: the runtime and a hand-written model that a test can compute by itself."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

HERE = Path(__file__).parent
RUNTIME = HERE.parents[1] / "runtime"
INCLUDE = RUNTIME / "include"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
# The flags that artifacts are compiled with, and warnings.
FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    "-fno-gnu-unique", *WARNINGS,
]  # fmt: skip
LINK = ["-shared", "-pthread", f"-Wl,--version-script={RUNTIME / 'qigen.map'}", "-Wl,-z,defs"]


def cxx(*arguments: str | Path) -> None:
    """Runs g++; a failure shows what it printed."""
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def write_weights(
    path: Path,
    *,
    magic: bytes = b"QIGENWB1",
    abi: int = 2,
    file_bytes: int = 8192,
    uid: int = 0x5A,
    weights: NDArray[np.float32] | None = None,
) -> None:
    """weights.bin: header of 4 KiB, then float32 weights[37]."""
    header = magic + struct.pack("<IIQ", abi, 4096, file_bytes) + bytes([uid]) * 32
    header += struct.pack("<I", zlib.crc32(header))
    body = b"" if weights is None else weights.tobytes()
    path.write_bytes(header.ljust(4096, b"\0") + body.ljust(4096, b"\0"))


def write_vocab(path: Path, texts: Sequence[bytes], eos: Sequence[int]) -> None:
    """vocab.bin: header, end tokens, offsets, texts."""
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype("<u4")
    header = b"QIGENVB1" + struct.pack("<II", len(texts), len(eos))
    path.write_bytes(header + np.array(eos, "<i4").tobytes() + offsets.tobytes() + b"".join(texts))


@dataclass
class Fake:
    """Compiles variants of the fake model and writes artifacts of them."""

    folder: Path
    weights: NDArray[np.float32]
    texts: list[bytes]
    vocab: int = 37
    max_seq: int = 100
    max_batch: int = 4
    max_tokens: int = 8
    eos: tuple[int, ...] = (2, 5)
    _libraries: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def objects(self) -> list[Path]:
        """Object files of the runtime, compiled once."""
        objects = []
        for source in sorted((RUNTIME / "src").glob("*.cpp")):
            target = self.folder / f"{source.stem}.o"
            if not target.exists():
                cxx(*FLAGS, "-I", INCLUDE, "-c", source, "-o", target)
            objects.append(target)
        return objects

    def library(self, *defines: str) -> Path:
        """model.so of the fake model with macros such as FAKE_ABI=2."""
        if defines not in self._libraries:
            stem = self.folder / f"fake{len(self._libraries)}"
            generated = stem.with_suffix(".o")
            macros = [f"-D{define}" for define in defines]
            cxx(*FLAGS, *macros, "-I", INCLUDE, "-c", HERE / "fake_model.cpp", "-o", generated)
            library = stem.with_suffix(".so")
            cxx(*LINK, *self.objects(), generated, "-o", library)
            self._libraries[defines] = library
        return self._libraries[defines]

    def artifact(self, folder: Path, *defines: str) -> Path:
        """A whole artifact in a new folder."""
        folder.mkdir(parents=True)
        shutil.copy(self.library(*defines), folder / "model.so")
        write_weights(folder / "weights.bin", weights=self.weights)
        write_vocab(folder / "vocab.bin", self.texts, self.eos)
        return folder

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What the model must say after each of the tokens, float32[n, vocab]."""
        ids = np.asarray(tokens, np.int64)
        totals = np.cumsum((ids + 1) * np.arange(1, len(ids) + 1)) % 65521
        columns = np.arange(1, self.vocab + 1)
        hashed = (totals[:, None] * columns) % 1009
        return hashed.astype(np.float32) / np.float32(1009) + self.weights


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    weights = np.random.default_rng(1).random(37, np.float32)
    texts = [b"", b"", b"", *(f" t{i}".encode() for i in range(3, 37))]
    return Fake(tmp_path_factory.mktemp("fake"), weights, texts)


@pytest.fixture
def artifact(fake: Fake, tmp_path: Path) -> Path:
    return fake.artifact(tmp_path / "fake.qgn")


@pytest.fixture
def weights_writer() -> Callable[..., None]:
    return write_weights


@pytest.fixture
def vocab_writer() -> Callable[..., None]:
    return write_vocab
