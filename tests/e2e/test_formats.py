"""Every weight format through the compiler: right logits, and kept codes come back unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qigen import targets
from qigen.artifact import Artifact
from qigen.compiler import compile
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats import catalog
from qigen.frontends import build_graph
from qigen.planner import isa_candidates
from qigen.quantize.rtn import quantize_rtn
from qigen.quantize.weights import requantized, with_byte_tables
from tests.e2e.harness import Compiled
from tests.e2e.test_families import TOKENS, check
from tests.frontends.tiny import write_tiny_hf

ISAS = [isa.name for isa in isa_candidates(targets.native())]
GGUF_TYPES = [name for name, row in catalog.CATALOG.items() if row.ggml_type is not None]

# All rows of weights are whole blocks of 256.
WIDE = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ff": 256}

Build = Callable[..., Compiled]


def activations_of(name: str) -> str:
    return "f32" if catalog.by_name(name).float_kind else "int8"


def file_rows(path: Path) -> dict[str, np.ndarray]:
    """uint8[N, bytes of a row] of every matrix in a GGUF, as the gguf package reads it."""
    return {
        tensor.name: np.ascontiguousarray(tensor.data).view(np.uint8).reshape(tensor.shape[1], -1)
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) == 2
    }


def check_lossless(compiled: Compiled) -> None:
    """The packed weights hold every byte of every matrix of the file, and no other matrix."""
    matrices = file_rows(compiled.path)
    found = {name: np.zeros(len(rows), int) for name, rows in matrices.items()}
    for tensor in compiled.artifact.tensors.values():
        if tensor["format"] == "vector":
            continue
        for part in tensor["parts"]:
            name, (first, last) = part["source"]["tensor"], part["source"]["rows"]
            blocks = compiled.artifact.source_blocks(part["name"])
            assert np.array_equal(blocks, matrices[name][first:last]), part["name"]
            found[name][first:last] += 1
    assert all((count == 1).all() for count in found.values())


def test_the_types_of_the_issue_are_all_here() -> None:
    assert len(GGUF_TYPES) == 18


@pytest.mark.parametrize("quant", GGUF_TYPES)
def test_gguf_type(compiled: Build, quant: str) -> None:
    model = compiled(quant=quant, activations=activations_of(quant), overrides=WIDE)
    formats = {t["format"] for t in model.artifact.tensors.values()}
    assert formats == {quant, "vector"}
    check_lossless(model)
    check(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant", "activations", "isa"),
    [(quant, "f32", None) for quant in GGUF_TYPES if activations_of(quant) == "int8"]
    + [(q, "int8", isa) for isa in ISAS[1:] for q in ("q3_k", "q6_k", "iq4_xs", "tq1_0", "mxfp4")],
)
def test_gguf_type_otherwise(
    compiled: Build, quant: str, activations: str, isa: str | None
) -> None:
    """In float arithmetic; and on the other ISAs, whose kernels have tests of their own, a few."""
    check(compiled(quant=quant, activations=activations, isa=isa, overrides=WIDE))


@pytest.mark.parametrize("case", [
    {"family": "phi3"},  # q, k, v and gate, up are rows of one tensor of the file
    {"family": "qwen2"},  # tied
    {"family": "gemma3", "quant": "q4_0"},  # 24 columns a head
    {"family": "llama", "quant": "q4_1", "overrides": {"d_ff": 172}},  # a row-block of 12 rows
], ids=lambda case: case["family"])  # fmt: skip
def test_kept_codes_come_back(compiled: Build, case: dict[str, Any]) -> None:
    check_lossless(compiled(**case))


# K of the matrices is 64 and 172: no multiple of any of these blocks but the first's.
TAILS = {"d_ff": 172, "vocab_size": 97, "n_layers": 2}


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("u4g32", "int8"),
        ("s4g128", "int8"),
        ("u3g64", "int8"),
        ("s8g32", "int8"),
        ("u2g32", "int8"),
        ("s4g128", "f32"),
        ("q8_0", "int8"),
        ("f16", "f32"),
        ("bf16", "f32"),
        ("s4gchannel", "int8"),
        ("z4g64_f32", "int8"),
        ("w4a8", "int8-token"),
        ("nvfp4", "int8"),
        ("nf4g64", "f32"),
        ("lut3_channel", "f32"),
        ("lut4_tensor_g64", "f32"),
        ("fp6_e3m2", "f32"),
        ("ternary5", "int8"),
        ("aqlm_2x8", "f32"),
        ("spqr3", "int8"),
        ("s4g128_2of4_o3", "int8"),
        *(
            pytest.param(weights, activations, marks=pytest.mark.slow)
            for weights, activations in (
                ("h4g64", "int8"),
                ("s4g16", "int8"),
                ("mxfp8_e4m3", "f32"),
                ("fp8_e4m3_f32", "bf16"),
                ("ternary2", "int8"),
                ("bipolar3", "int8"),
                ("lut2_group_g64", "f32"),
                ("spqr3", "f32"),
                ("nf4g64_2of4", "f32"),
                ("s8g128_2of4", "int8"),
                ("s4g128_16of32b", "int8"),
                ("fp6_e2m3", "int8"),
                ("nf3g64_t8", "int8"),
            )
        ),
        pytest.param("u8g128", "int8", marks=pytest.mark.slow),
        pytest.param("s6g64", "int8", marks=pytest.mark.slow),
        pytest.param("s5g128", "int8", marks=pytest.mark.slow),
        pytest.param("s3g32", "int8", marks=pytest.mark.slow),
        pytest.param("s2g64", "int8", marks=pytest.mark.slow),
        ("s4g32_lr16", "int8"),
        ("s4gchannel_c32", "int4-token"),
        ("z4g32", "int4"),
        pytest.param("aqlm_1x8_lr16", "f32", marks=pytest.mark.slow),
        pytest.param("u5g64", "f32", marks=pytest.mark.slow),
        pytest.param("u6g128", "f32", marks=pytest.mark.slow),
    ],
)
def test_rounded_weights(compiled: Build, weights: str, activations: str) -> None:
    """A float checkpoint, its matrices rounded to nearest on the way in."""
    fmt = catalog.by_name(weights)
    whole_blocks = fmt.ggml_type is not None and not fmt.float_kind
    overrides = {**TAILS, "d_ff": 96} if whole_blocks else TAILS
    model = compiled(container="hf", weights=weights, activations=activations, overrides=overrides)
    assert {t["format"] for t in model.artifact.tensors.values()} == {weights, "vector"}
    for name in ("token_embd.weight", "blk.1.attn_q.weight", "blk.1.ffn_up.weight",
                 "blk.0.ffn_down.weight"):  # fmt: skip
        kept = model.artifact.unpack(name)
        wanted = quantize_rtn(model.source.tensors[name].load().dequantize(), fmt)
        for field, codes in wanted.fields.items():
            assert np.array_equal(kept.fields[field], codes), (name, field)
    check(model)


def test_tables_are_rounded_to_bytes_if_int8_is_asked_for(compiled: Build) -> None:
    """Codes stay; the row of the catalog, whose table is one of bytes, and a note say it."""
    weights = "nf4g64_f32"
    model = compiled(container="hf", weights=weights, activations="int8", overrides=TAILS)
    assert {t["format"] for t in model.artifact.tensors.values()} == {f"{weights}_t8", "vector"}
    (note,) = model.artifact.manifest["source"]["notes"]
    assert "--activations int8" in note and f"{weights}_t8" in note and "0.35%" in note
    name, fmt = "blk.1.ffn_up.weight", catalog.by_name(weights)
    kept = model.artifact.unpack(name)
    wanted = quantize_rtn(model.source.tensors[name].load().dequantize(), fmt)
    assert all(np.array_equal(kept.fields[field], a) for field, a in wanted.fields.items())
    check(model)
    graph = requantized(build_graph(model.source, 64), fmt)
    assert with_byte_tables(graph, None) == (graph, ()), "nobody asked for it"


def test_rounding_quantized_weights_again(compiled: Build) -> None:
    """A GGUF of q8_0 brought to 4 bits; matrices that are there already stay as they are."""
    mixed = (("attn_v", "q4_0"),)
    model = compiled(quant="q8_0", mixed=mixed, weights="q4_0", activations="int8")
    check(model)
    for layer in range(3):
        name = f"blk.{layer}.attn_v.weight"
        kept, source = model.artifact.source_blocks(name), file_rows(model.path)[name]
        assert np.array_equal(kept, source)


@pytest.mark.parametrize(("weights", "error"), [
    ("q8_0", Unsupported),  # blocks of 32 do not fit 172 columns
    ("q4_k", Unsupported),  # no round to nearest for two levels of scales
    ("q4_9", Unsupported),
])  # fmt: skip
def test_formats_that_cannot_be_rounded_to(
    tmp_path: Path, weights: str, error: type[Exception]
) -> None:
    source = write_tiny_hf(tmp_path / "model", "llama", d_ff=172)
    stages: list[str] = []
    with pytest.raises(error) as caught:
        compile(source, tmp_path / "out.qgn", weights=weights,
                progress=lambda stage, done, total: stages.append(stage))  # fmt: skip
    assert weights in str(caught.value)
    if weights == "q8_0":
        assert "ffn_down" in str(caught.value) and "172" in str(caught.value)
    assert set(stages) <= {"read"}, "found before anything was compiled"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("options", [
    {"activations": "int3"}, {"kv": "int3"}, {"kv": "f8"},
    {"max_batch": 0}, {"max_seq": 0}, {"max_seq": 65}, {"tune": "guess"}, {"isa": "mmx"},
    {"target": "z80"},
], ids=str)  # fmt: skip
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write_tiny_hf(tmp_path / "model", "llama")
    with pytest.raises((UsageError, Unsupported)):
        compile(source, tmp_path / "out.qgn", **options)
    assert not (tmp_path / "out.qgn").exists()


def test_an_artifact_says_what_it_holds(compiled: Build) -> None:
    artifact: Artifact = compiled(family="llama", quant="q8_0").artifact
    assert len(TOKENS) < artifact.manifest["limits"]["max_seq"] == 64
    with pytest.raises(BadInput, match=r"no matrix blk\.9"):
        artifact.unpack("blk.9.attn_q.weight")
    with pytest.raises(BadInput, match="no matrix output_norm"):
        artifact.unpack("output_norm.weight")


def test_embedding_rows_shorter_than_a_block(compiled: Build) -> None:
    """64 columns in blocks of 128: what the block holds beyond them must not reach the next row,
    which another thread may have written already."""
    model = compiled(container="hf", weights="s4g128", activations="int8", overrides=TAILS)
    expected = model.session(threads=1).eval(TOKENS, all=True)
    session = model.session(threads=8)
    for _ in range(50):
        session.rewind(0)
        assert np.array_equal(session.eval(TOKENS, all=True), expected)
