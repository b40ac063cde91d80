"""Quantized checkpoints through the compiler: logits of the float model with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qigen._runtime import Model
from qigen.compiler import compile
from qigen.frontends import build_graph, load_huggingface
from qigen.ir.interpreter import Interpreter
from qigen.quantize.weights import with_byte_tables
from tests.e2e.harness import JOBS, relative_error
from tests.e2e.test_families import TOLERANCE
from tests.frontends.packing import write_model
from tests.frontends.test_checkpoints import FAMILIES, TOKENS

F32 = 5e-3
"""Of f32 activations, in standard deviations of the logits: order of the sums, and so numbers of
the f16 cache that are rounded the other way. Largest with 2 bits, whose logits are the flattest."""

INT8 = TOLERANCE["int8", "f16"]
"""Of int8 activations: also values that lie between two codes."""

FAST = ("gptq-act-order", "awq-gemm", "hqq-4", "ct-nvfp4")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES]
)
def test_logits(name: str, tmp_path: Path) -> None:
    family, rows = FAMILIES[name]
    packed, dense, _ = write_model(tmp_path, family)
    rows_of_logits = np.arange(len(TOKENS), dtype=np.int32)
    step = {"input_ids": TOKENS, "rows": rows_of_logits}
    for activations, tolerance in (("f32", F32), ("int8", INT8)):
        # int8 activations have a scale for 32 columns in their order: for that, ours is compared
        source = load_huggingface(dense if activations == "f32" else packed)
        graph, _ = with_byte_tables(build_graph(source), activations)
        expected = Interpreter(graph, activations=activations, kv="f16").step(step)
        artifact = compile(packed, tmp_path / f"{activations}.qgn", activations=activations,
                           jobs=JOBS)
        found_rows = {t["format"].removesuffix("_t8") for t in artifact.tensors.values()}
        assert rows <= found_rows
        session = Model(str(artifact.path), threads=2).session()
        found = session.eval(TOKENS, all=True)
        assert relative_error(found, expected["logits"]) < tolerance
        artifact.verify()
        # the packed weights give the checkpoint's own codes back
        handle = load_huggingface(packed).tensors["blk.1.ffn_up.weight"]
        again, kept = artifact.unpack("blk.1.ffn_up.weight"), handle.load()
        for field, array in kept.fields.items():
            assert np.array_equal(again.fields[field], array), field
