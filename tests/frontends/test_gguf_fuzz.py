"""Thousands of damaged GGUF files: each loads, or is one clear BadInput or Unsupported."""

from __future__ import annotations

import contextlib
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from qigen.errors import BadInput, Unsupported
from qigen.frontends import build_graph, load_gguf
from tests.frontends.tiny import write_tiny_gguf

STORIES = Path(__file__).parents[1] / "data" / "stories260k" / "stories260K-f32.gguf"
ROOM = 512 << 20  # address space that reading one file may take
EDGES = [
    0, 1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, (1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 32, (1 << 64) - 1,
]  # fmt: skip


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let giant allocations fail: they would be a MemoryError, which no test expects."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


Spans = list[tuple[int, int]]


def header_fields(path: Path) -> tuple[Spans, Spans]:
    """(offset, bytes) of the numbers of the header.

    First those that hold it together (counts, lengths, types, dimensions, offsets; of an array the
    first elements too), then the values of the settings.
    """
    reader = gguf.GGUFReader(path)
    start = reader.data.ctypes.data
    frame: Spans = []
    values: Spans = []
    for entry in [*reader.fields.values(), *(t.field for t in reader.tensors)]:
        spans = [(p.ctypes.data - start, p.nbytes) for p in entry.parts[:40]]
        frame += [span for span in spans if span[1] in (1, 2, 4, 8)]
        if len(entry.types) == 1 and entry.types[0] != gguf.GGUFValueType.STRING:
            values.append(spans[-1])
    return frame, values


def mutate(data: bytes, fields: tuple[Spans, Spans], header: int, rng: random.Random) -> bytes:
    """One to three random damages, most of them in the header."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(8)
        at = rng.randrange(min(header, len(result)) or 1)
        if not result:
            break
        if kind <= 3:  # a field of the header gets an edge value, a neighbour or a flipped bit
            at, size = rng.choice(fields[kind // 2])
            old = int.from_bytes(result[at : at + size], "little")
            new = rng.choice([*EDGES, old + 1, old - 1, old * 2, old ^ (1 << rng.randrange(64))])
            result[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 4:  # flipped bytes
            for _ in range(rng.choice((1, 4, 32))):
                result[(at + rng.randrange(64)) % len(result)] = rng.randrange(256)
        elif kind == 5:  # truncated
            del result[rng.choice((at, rng.randrange(len(result)))) :]
        elif kind == 6:  # bytes inserted
            result[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32, 100)))
        else:  # bytes removed or moved
            size = rng.choice((1, 4, 8, 32))
            chunk = result[at : at + size]
            del result[at : at + size]
            if rng.random() < 0.5:
                other = rng.randrange(len(result) + 1)
                result[other:other] = chunk
    return bytes(result)


def attempt(path: Path) -> bool:
    """Read the file to the last weight; False if it was refused, as it should be."""
    try:
        model = load_gguf(path)
        build_graph(model)
        for handle in model.tensors.values():
            handle.load()
    except (BadInput, Unsupported) as error:
        assert error.where.startswith(str(path))
        assert 10 < len(error.message) < 300
        assert error.message.isprintable(), error.message
        return False
    return True


CASES = [
    # seed, mutations, family, formats
    (1, 2500, "llama", "q4_0", {"token_embd": "q8_0"}),
    (2, 1300, "gemma3", "q8_0", {"ffn": "q4_0"}),
    (3, 1300, "phi3", "q4_0", {}),
    (4, 300, "", "", {}),  # stories260K
]


@pytest.mark.parametrize(("seed", "count", "family", "quant", "mixed"), CASES)
def test_damaged_files_are_refused_cleanly(
    seed: int, count: int, family: str, quant: str, mixed: dict[str, str], tmp_path: Path
) -> None:
    source = STORIES
    if family:
        dims = {"d_model": 32, "head_dim": 8, "d_ff": 32, "n_layers": 2}
        if family == "phi3":
            dims["head_dim"] = 16
        source = write_tiny_gguf(tmp_path / "tiny.gguf", family, quant, mixed=mixed, **dims)
    data = source.read_bytes()
    header = min(int(t.data_offset) for t in gguf.GGUFReader(source).tensors)
    fields = header_fields(source)
    rng = random.Random(seed)
    path = tmp_path / "damaged.gguf"
    refused, slowest = 0, 0.0
    with little_memory(), np.errstate(all="ignore"):
        for _ in range(count):
            path.write_bytes(mutate(data, fields, header, rng))
            start = time.perf_counter()
            refused += not attempt(path)
            slowest = max(slowest, time.perf_counter() - start)
    # Damage in a weight or in the text of a token cannot be seen; most other damage must be.
    assert refused > 0.6 * count
    assert slowest < 5.0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_truncation_of_the_header_and_every_padding(family: str, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", family, "q8_0", n_layers=1)
    data = source.read_bytes()
    header = min(int(t.data_offset) for t in gguf.GGUFReader(source).tensors)
    path = tmp_path / "damaged.gguf"
    cuts = [*range(0, header, 7), *range(header, len(data) - 32, 997)]
    for end in cuts:
        path.write_bytes(data[:end])
        assert not attempt(path), end
    for extra in (1, 31, 32, 4096):
        path.write_bytes(data + bytes(extra))
        assert not attempt(path), extra
