"""Scales and rotations that are folded: the model computes the same, and is easier to quantize."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qigen.errors import Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.ir.verify import verify
from qigen.passes.pipeline import optimize
from qigen.quantize.model import Recipe, Store, matrices, prepared, quantize_model
from qigen.quantize.prepare import Rotation, hadamard
from tests.ir.tiny import FAMILIES, build
from tests.quantize.test_model import F32, divergence, layers_of, logits, sequences

TEXTS = sequences(6, 12)


def changed(graph, name, formats=None, **options):
    recipe = Recipe("rtn", before=((name, options),), samples=6, context=24)
    formats = formats or dict.fromkeys(matrices(graph), by_name("s4g32"))
    return prepared(graph, formats, TEXTS, recipe, Store(None), lambda *_: None)


def outliers(graph):
    """A model whose norms have a few great weights, as real ones do."""
    rng = np.random.default_rng(1)
    for name, data in graph.constants.items():
        if "norm" in name and data.ndim == 1:
            data[rng.integers(0, len(data), 3)] *= 12
    return graph


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 64, 96, 576])
def test_hadamard_matrices(n):
    h = hadamard(n)
    assert h is not None and set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


def test_rotations_of_any_size():
    assert hadamard(30) is None and hadamard(7) is None
    for size in (7, 30, 64):
        q = Rotation(size, 3).matrix
        np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-5)
        assert not np.array_equal(q, Rotation(size, 4).matrix)
    x = np.random.default_rng(0).standard_normal((3, 28)).astype(np.float32)
    np.testing.assert_allclose(Rotation(7, 0).apply(x)[:, 7:14], x[:, 7:14] @ Rotation(7, 0).matrix,
                               rtol=1e-6)


@pytest.mark.parametrize("name", ["awq", "smoothquant", "hadamard"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("gemma")])
def test_the_function_is_the_same(family, name):
    graph = outliers(build(replace(FAMILIES[family], head_format="f32")))
    made = changed(graph, name)
    verify(made)
    verify(optimize(made.copy()))
    before = {n: np.asarray(c).copy() for n, c in graph.constants.items() if c is not None
              and isinstance(c, np.ndarray)}
    for ids in TEXTS[:2]:
        wanted = logits(graph, ids)
        most = float(np.abs(wanted).max())
        np.testing.assert_allclose(logits(made, ids), wanted, atol=3e-5 * most + 2e-4)
    moved = [n for n in graph.constants if made.constants[n] is not graph.constants[n]]
    assert len(moved) >= 2 * len([n for n in graph.nodes if n.op == "Attention"])
    for n, data in before.items():
        np.testing.assert_array_equal(graph.constants[n], data)


def test_scales_are_folded_into_v_and_up_and_norms():
    graph = build(replace(FAMILIES["qwen2"], ffn_bias=True))
    made = changed(graph, "awq")
    for layer in "01":
        for name in ("attn_norm.w", "ffn_norm.w", "v.w", "v.b", "up.w", "o.w", "down.w", "q.w"):
            assert made.constants[f"l{layer}.{name}"] is not graph.constants[f"l{layer}.{name}"]
    # what is not to be quantized stays
    names = [n for n in matrices(graph) if "down" not in n and n != "l0.k.w"]
    made = changed(graph, "awq", dict.fromkeys(names, by_name("s4g32")))
    for name in ("l0.down.w", "l0.k.w", "l0.attn_norm.w"):
        assert made.constants[name] is graph.constants[name]
    assert made.constants["l1.attn_norm.w"] is not graph.constants["l1.attn_norm.w"]


def test_awq_beats_clipping_where_inputs_differ():
    graph = outliers(build(F32))
    formats = dict.fromkeys(layers_of(graph), by_name("s3g32"))
    texts = sequences(12)
    errors = {}
    for name in ("clip", "awq"):
        made, reports = quantize_model(graph, formats, texts, Recipe(name))
        errors[name] = divergence(made, graph, texts)
        assert all(r["method"] == name for r in reports)
    assert errors["awq"] < 0.95 * errors["clip"]


def test_smoothquant_evens_out_inputs():
    graph = outliers(build(F32))
    made = changed(graph, "smoothquant")

    def spread(g):
        w = np.asarray(g.constants["l1.ffn_norm.w"])
        return float(np.abs(w).max() / np.median(np.abs(w)))

    assert spread(made) < 0.6 * spread(graph)


def test_a_rotation_spreads_outliers():
    graph = outliers(build(F32))
    made = changed(graph, "hadamard")

    def kurtosis(g):
        w = g.constants["l1.gate.w"]
        w = w if isinstance(w, np.ndarray) else w.load()
        return float((w**4).mean() / (w**2).mean() ** 2)

    folded = graph.constants["l1.gate.w"] * graph.constants["l1.ffn_norm.w"]
    assert kurtosis(made) < 3.5 < (folded**4).mean() / (folded**2).mean() ** 2
    formats = dict.fromkeys(layers_of(graph), by_name("s4g32"))
    turned, reports = quantize_model(graph, formats, TEXTS,
                                     Recipe("gptq", before=(("hadamard", {}),)))
    assert reports[0]["method"] == "hadamard+gptq"
    assert divergence(turned, graph, TEXTS) < 0.2


def test_a_tied_table_stays(tmp_path):
    graph = build(replace(FAMILIES["llama"]))
    made = changed(graph, "hadamard")
    assert made.constants["embedding"] is graph.constants["embedding"]
    assert [n.op for n in made.nodes if n.layer is None] == [
        "Embedding", "MatMul", "SelectRows", "MatMul", "RMSNorm", "MatMul"]
    apart = build(replace(FAMILIES["llama"], tied=False))
    made = changed(apart, "hadamard")
    assert made.constants["embedding"] is not apart.constants["embedding"]
    assert len(made.nodes) == len(apart.nodes)


def test_a_killed_search_goes_on(tmp_path):
    graph = outliers(build(F32))
    formats = dict.fromkeys(matrices(graph), by_name("s4g32"))
    recipe = Recipe("rtn", before=(("awq", {}),))

    class Killed(Exception):
        pass

    def stop(stage, done, total):
        if done > total // 2:
            raise Killed

    def run(progress):
        return prepared(graph, formats, TEXTS, recipe, Store.of(tmp_path, 1), progress)

    with pytest.raises(Killed):
        run(stop)
    files = sorted(Store.of(tmp_path, 1).folder.iterdir())
    assert 0 < len(files) < 12
    before = files[0].stat().st_mtime_ns
    again, whole = run(lambda *_: None), changed(graph, "awq")
    assert files[0].stat().st_mtime_ns == before
    for name in layers_of(graph):
        np.testing.assert_array_equal(again.constants[name].load(), whole.constants[name].load())


def test_what_cannot_be_prepared():
    with pytest.raises(Unsupported, match=r"l0\.x_attn.*what is added is no product"):
        changed(build(FAMILIES["gemma2"]), "hadamard")
    graph = build(F32)
    names = [n for n in matrices(graph) if n != "l1.o.w"]
    with pytest.raises(UsageError, match=r"l1\.o\.w.*out of --keep"):
        changed(graph, "hadamard", dict.fromkeys(names, by_name("s4g32")))
    with pytest.raises(UsageError, match="awq needs calibration data"):
        prepared(graph, dict.fromkeys(names, by_name("s4g32")), None, Recipe("awq"), Store(None),
                 lambda *_: None)
    for name, options in (("awq", {"grid": 0}), ("smoothquant", {"alpha": 2.0})):
        with pytest.raises(UsageError, match=f"method {name} needs"):
            changed(graph, name, **options)
