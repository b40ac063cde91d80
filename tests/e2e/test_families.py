"""Compiled logits against the interpreter on the flat graph, for everything a family can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qigen import targets
from qigen._runtime import Model
from qigen.planner import isa_candidates
from tests.e2e.conftest import STORIES
from tests.e2e.harness import Compiled, decode, prefill, relative_error
from tests.frontends.tiny import LLAMA3_SCALING, TINY

ISAS = [isa.name for isa in isa_candidates(targets.native())]

# Greatest error of a logit, in standard deviations of the logits. Float arithmetic alone is far
# below these: what they leave room for is a number that lies between two codes (of an activation,
# of a key or value) and is rounded up by one side and down by the other. One such key changes every
# later row a little, and so makes other numbers fall on the other side: up to the codes' own noise.
TOLERANCE = {
    ("f32", "f16"): 2e-3,
    ("f32", "int8"): 2e-2,
    ("int8", "f16"): 0.15,
    ("int8", "int8"): 0.15,
    ("int8-token", "f16"): 0.15,
    ("int4", "f16"): 0.4,
    ("int4-token", "f16"): 0.4,
    ("bf16", "f16"): 4e-2,
}
# Rounding as above moves few logits far, so all of them together stay near.
RMS_SHARE = 0.2

# 24 tokens: windows of 5 to 7 positions bite.
TOKENS = [1, 5, 9, 33, 12, 7, 80, 41, 22, 5, 5, 60, 71, 3, 18, 29, 44, 8, 90, 17, 2, 66, 31, 10]

Build = Callable[..., Compiled]


def check(compiled: Compiled, tokens: list[int] = TOKENS) -> None:
    options = compiled.options
    tolerance = TOLERANCE[options.activations, options.kv]
    expected = compiled.expected(tokens)
    for found in (prefill(compiled, tokens), decode(compiled, tokens)):
        assert relative_error(found, expected) < tolerance
        assert np.sqrt(np.mean((found - expected) ** 2)) < RMS_SHARE * tolerance * expected.std()


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gguf-f32": {"quant": "q8_0", "activations": "f32", "kv": "f16"},
    "gguf-int8": {"quant": "q8_0", "activations": "int8", "kv": "int8"},
    "hf-kv8": {"container": "hf", "activations": "f32", "kv": "int8"},
}


@pytest.mark.parametrize(
    ("family", "configuration"),
    [
        # of mixtures of experts, tests/e2e/test_experts.py has some that are not slow
        pytest.param(f, c, marks=pytest.mark.slow if TINY[f].experts else ())
        for f in TINY
        for c in CONFIGURATIONS
    ],
)
def test_family(compiled: Build, family: str, configuration: str) -> None:
    check(compiled(family=family, **CONFIGURATIONS[configuration]))


VARIANTS: dict[str, dict[str, Any]] = {
    "llama3-rope": {"family": "llama", "rope_scaling": LLAMA3_SCALING},
    "linear-rope": {"family": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "all-biases": {"family": "llama", "bias": True, "tied": True},
    "tails": {"family": "llama", "d_ff": 172, "vocab_size": 97},
    "one-kv-head": {"family": "llama", "n_kv_heads": 1},
    "no-gqa": {"family": "llama", "n_kv_heads": 4},
    "one-layer": {"family": "llama", "n_layers": 1, "d_model": 96, "n_kv_heads": 1},
    "three-heads-share": {"family": "llama", "n_heads": 6, "head_dim": 32},
    "longrope-window": {"family": "phi3", "window": 7},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(compiled: Build, variant: str) -> None:
    overrides = dict(VARIANTS[variant])
    check(compiled(family=overrides.pop("family"), overrides=overrides))


def test_long_factors_of_longrope(compiled: Build) -> None:
    """phi3 compiled for no more than its original context has the short factors, else the long."""
    short = compiled(family="phi3", max_seq=256)
    check(short)
    assert relative_error(prefill(short, TOKENS), prefill(compiled(family="phi3"), TOKENS)) > 0.01


HEAD_DIMS = (8, 64, 80, 128, 256)


@pytest.mark.parametrize(
    ("head_dim", "kv"),
    [(hd, "f16") for hd in HEAD_DIMS]
    + [(8, "int8")]
    + [pytest.param(hd, "int8", marks=pytest.mark.slow) for hd in HEAD_DIMS[1:]],
)
def test_head_dim(compiled: Build, head_dim: int, kv: str) -> None:
    """The other families have 16 and 24."""
    heads = {"n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": head_dim}
    check(compiled(kv=kv, overrides=heads))


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize(
    ("family", "configuration"),
    [
        pytest.param(f, c, marks=[] if (f, c) in kept else pytest.mark.slow)
        for kept in [{("llama", "gguf-f32"), ("gemma3", "gguf-int8")}]
        for c in CONFIGURATIONS
        for f in TINY
    ],
)
def test_other_isas(compiled: Build, isa: str, family: str, configuration: str) -> None:
    check(compiled(family=family, isa=isa, **CONFIGURATIONS[configuration]))


def test_one_scale_a_token(compiled: Build) -> None:
    check(compiled(quant="q8_0", activations="int8-token"))


@pytest.mark.parametrize("quant", ["f32", "q4_0"])
def test_bf16_activations(compiled: Build, quant: str) -> None:
    check(compiled(quant=quant, activations="bf16"))


# q, k and v of three formats, one of them float: two forms of one activation row. Gate and up of
# two formats: the activation is a step of its own.
MIXED_FORMATS: dict[str, Any] = {
    "quant": "q8_0",
    "activations": "int8",
    "mixed": (("attn_q", "q4_k"), ("attn_k", "f16"), ("attn_v", "q6_k"), ("ffn_gate", "q4_0")),
    "overrides": {"d_model": 256, "n_layers": 2, "d_ff": 256},
}


def test_mixed_formats(compiled: Build) -> None:
    check(compiled(**MIXED_FORMATS))


@pytest.mark.slow
def test_more_kinds_of_layers_than_letters(compiled: Build) -> None:
    """28 layers, no two with the same formats: each is a function of the generated source."""
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
    mixed = tuple(
        (f"blk.{layer}.{name}.", "f32")
        for layer in range(28)
        for bit, name in enumerate(matrices)
        if layer >> bit & 1
    )
    check(compiled(quant="q8_0", mixed=mixed, overrides={"n_layers": 28}))


@pytest.mark.parametrize("isa", ISAS)
def test_stories_continue_as_the_reference(stories: Callable[..., Path], isa: str) -> None:
    """A trained model with 172 feed-forward columns: 200 greedy tokens on every ISA."""
    reference = json.loads((STORIES / "reference.json").read_text())
    model = Model(str(stories(isa=isa)), threads=2)
    session = model.session()
    token = model.argmax(session.eval(reference["prompt_ids"]))
    found = [token]
    while len(found) < len(reference["greedy_ids"]):
        token = model.argmax(session.eval([token]))
        found.append(token)
    assert found == reference["greedy_ids"]
