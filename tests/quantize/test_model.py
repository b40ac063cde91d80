"""Whole language models: the walk through their layers, methods layer by layer, going on."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.ir.graph import load_constant
from qigen.ir.interpreter import Interpreter
from qigen.ir.verify import verify
from qigen.quantize.methods import parse
from qigen.quantize.model import Recipe, Store, matrices, quantize_model, sequences_of
from qigen.quantize.walk import Walk, segments
from tests.ir.tiny import FAMILIES, build

F32 = replace(FAMILIES["llama"], attn_format="f32", v_format="f32", gate_format="f32",
              up_format="f32", head_format="f32", d=64, ffn=128, layers=3)
RECIPE = Recipe("gptq", samples=6, context=24)


def sequences(count=6, length=24, vocab=50):
    """Text that repeats itself, so that inputs are correlated."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, vocab, (8, 6))
    return words[rng.integers(0, 8, (count, length // 6))].reshape(count, -1).astype(np.int32)


def layers_of(graph):
    return [n for n in matrices(graph) if graph.constants[n].shape != (50, 64)]


def logits(graph, ids):
    interpreter = Interpreter(graph)
    return interpreter.step({"input_ids": ids, "rows": np.arange(len(ids))})["logits"]


def divergence(graph, reference, texts):
    total = 0.0
    for ids in texts:
        p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True))
                for x in (logits(reference, ids), logits(graph, ids)))
        total += float((np.exp(p) * (p - q)).sum())
    return total / texts.size


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_walk_computes_what_the_interpreter_does(family):
    graph = build(FAMILIES[family])
    texts = sequences(3, 12)
    walk = Walk(graph, texts, memory=1 << 20)
    assert [s.layer for s in walk.segments] == [None, 0, 0, 0, 0, 1, 1, 1, 1, None]
    seen = []
    for segment in walk.segments[:-1]:
        walk.run(segment)
    walk.run(walk.segments[-1], {"logits": lambda name, value: seen.append(value)}, advance=False)
    for got, ids in zip(seen, texts, strict=True):
        np.testing.assert_allclose(got, logits(graph, ids), rtol=1e-4, atol=1e-5)


def test_a_walk_that_does_not_fit_into_memory(tmp_path):
    graph = build(F32)
    results = []
    for memory in (1 << 30, 1000):
        walk = Walk(graph, sequences(), memory=memory, scratch=tmp_path)
        for segment in walk.segments[:5]:
            walk.run(segment)
        assert sorted(walk._kept) == ["l0.x_ffn", "l1.attn_norm"]
        assert all(isinstance(v, np.memmap) == (memory == 1000) for v in walk._kept.values())
        results.append(np.array(walk._kept["l1.attn_norm"]))
    np.testing.assert_array_equal(*results)
    assert not list(tmp_path.iterdir())


def test_the_inputs_of_matrices_are_there_before_they_are_used():
    graph = build(F32)
    walk = Walk(graph, sequences(), memory=1 << 20)
    walk.run(walk.segments[0])
    one = walk.segments[1]
    products = one.products(graph)
    assert [n.inputs[1] for n in products] == ["l0.q.w", "l0.k.w", "l0.v.w"]
    seen = []
    for node in products:  # none of them can run
        graph.constants[node.inputs[1]] = None
    walk.run(one, {one.takes[0]: lambda name, value: seen.append(value.shape)}, advance=False)
    assert seen == [(6 * 24, 64)]


def test_gptq_beats_rounding_layer_by_layer_and_as_a_whole():
    graph, texts = build(F32), sequences(12)
    formats = dict.fromkeys(layers_of(graph), by_name("u3g32"))
    nearest, rounded = quantize_model(graph, formats, texts, replace(RECIPE, method="rtn"))
    made, reports = quantize_model(graph, formats, texts, RECIPE)
    assert [r["matrix"] for r in reports] == list(formats)
    assert all(made.values[n].dtype == "u3g32" for n in formats)
    pairs = list(zip(reports, rounded, strict=True))
    assert np.median([n["relative"] / g["relative"] for g, n in pairs]) > 2.5
    assert divergence(made, graph, texts) < divergence(nearest, graph, texts) / 3
    # the argument is as it was
    assert all(isinstance(graph.constants[n], np.ndarray) for n in formats)


def test_a_layer_is_calibrated_on_what_the_ones_before_hand_to_it():
    graph, texts = build(F32), sequences(12)
    formats = dict.fromkeys(layers_of(graph), by_name("u2g32"))
    apart, _ = quantize_model(graph, formats, texts, replace(RECIPE, sequential=False))
    made, _ = quantize_model(graph, formats, texts, RECIPE)
    first, *_, last = formats

    def same(name):
        return np.array_equal(*(load_constant(g.constants[name]).dequantize()
                                for g in (apart, made)))

    assert same(first) and not same(last)


def test_statistics_in_little_memory_are_the_same():
    graph, texts = build(F32), sequences()
    formats = dict.fromkeys(layers_of(graph), by_name("s4g32"))
    one, _ = quantize_model(graph, formats, texts, RECIPE)
    two, _ = quantize_model(graph, formats, texts, replace(RECIPE, memory=70000))
    for name in formats:
        np.testing.assert_array_equal(one.constants[name].dequantize(),
                                      two.constants[name].dequantize())


def test_mixed_formats_tables_and_matrices_with_tables_of_their_own():
    graph, texts = build(F32), sequences()
    names = matrices(graph)
    kinds = ["s4g32", "lut3_tensor_g64", "u2g32", "nf4g64"]
    formats = {name: by_name(kinds[i % 4]) for i, name in enumerate(names)}
    made, reports = quantize_model(graph, formats, texts, RECIPE)
    assert {r["matrix"]: r["format"] for r in reports} == {n: f.name for n, f in formats.items()}
    table = next(r for r in reports if r["matrix"] == "embedding")
    assert table["method"] == "clip" and table["damping"] is None
    assert divergence(made, graph, texts) < 0.5


@pytest.mark.parametrize(("after", "kept"), [(7, set()), (8, {0})])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, after, kept):
    graph, texts = build(F32), sequences()
    formats = dict.fromkeys(layers_of(graph), by_name("u3g32"))
    whole, reports = quantize_model(graph, formats, texts, RECIPE)

    class Killed(Exception):
        pass

    def stop_after_one(stage, done, total):
        if done >= after:
            raise Killed

    store = Store.of(tmp_path, "a run")
    with pytest.raises(Killed):
        quantize_model(graph, formats, texts, RECIPE, store=store, progress=stop_after_one)
    files = sorted(store.folder.glob("0*"))
    # of the first layer q, k and v; o; gate and up; down
    assert len(files) == (5 if kept else 4)
    before = files[0].stat().st_mtime_ns
    layers = []
    run = Walk.run

    def watched(walk, segment, *arguments, **options):
        layers.append(segment.layer)
        run(walk, segment, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "run", watched)
        again, same = quantize_model(graph, formats, texts, RECIPE,
                                     store=Store.of(tmp_path, "a run"))
    assert set(layers) == {0, 1, 2} - kept  # where it had come to is kept, too
    assert files[0].stat().st_mtime_ns == before and len(list(store.folder.iterdir())) == 12
    assert same == reports
    for name in formats:
        np.testing.assert_array_equal(again.constants[name].dequantize(),
                                      whole.constants[name].dequantize())
    # a finished run is not computed again, a damaged file is
    quantize_model(graph, formats, texts, RECIPE, store=store)
    assert files[0].stat().st_mtime_ns == before
    files[0].write_bytes(files[0].read_bytes()[:1000])
    quantize_model(graph, formats, texts, RECIPE, store=store)
    assert files[0].stat().st_size > 1000


def test_a_full_disk(tmp_path, monkeypatch):
    graph, texts = build(F32), sequences()
    formats = dict.fromkeys(layers_of(graph), by_name("u3g32"))
    store = Store.of(tmp_path, "a run")

    def full(stream, **arrays):
        stream.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, calls = np.savez, []

    def full_in_the_middle(stream, **arrays):
        calls.append(stream)
        (save if len(calls) <= 3 else full)(stream, **arrays)

    for action, left in ((full, 0), (full_in_the_middle, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", action)
            with pytest.raises(UsageError, match=r"the disk is full; .* goes on from here"):
                quantize_model(graph, formats, texts, RECIPE, store=store)
        assert len(list(store.folder.iterdir())) == left  # whole files alone
    before = {f: f.stat().st_mtime_ns for f in store.folder.glob("0*")}
    made, _ = quantize_model(graph, formats, texts, RECIPE, store=store)
    assert all(f.stat().st_mtime_ns == old for f, old in before.items())
    whole, _ = quantize_model(graph, formats, texts, RECIPE)
    for name in formats:
        np.testing.assert_array_equal(made.constants[name].dequantize(),
                                      whole.constants[name].dequantize())


def test_scales_and_tables_of_rows_and_weights_pass_the_verifier():
    graph = build(F32)
    names = layers_of(graph)
    for name, kind in zip(names, ("s4gchannel", "lut3_channel", "lut3_tensor_g64", "s3g64"),
                          strict=False):
        graph, _ = quantize_model(graph, {name: by_name(kind)}, None, Recipe("clip"))
    verify(graph)


def test_text_that_says_nothing():
    """One token again and again: Hessians of rank 1, which are damped, and columns without any
    input; both are reported for every matrix."""
    graph = build(F32)
    graph.constants["l1.attn_norm.w"][5] = 0
    formats = {n: by_name("s8g32") for n in ("l0.q.w", "l1.q.w", "l1.down.w")}
    made, reports = quantize_model(graph, formats, np.full((2, 24), 7, np.int32), RECIPE)
    assert [r["dead"] for r in reports] == [0, 1, 0]
    assert "1 of 64 columns never had an input" in " ".join(reports[1]["notes"])
    assert all("48 tokens of calibration are few" in r["notes"][0] for r in reports)
    for name in formats:
        w, got = graph.constants[name], made.constants[name].dequantize()
        assert np.isfinite(got).all() and np.square(got - w).sum() < 0.01 * np.square(w).sum()


def test_stores(tmp_path):
    store = Store.of(tmp_path, "a", 1)
    w = np.ones((2, 32), np.float32)
    tensor = QuantizedTensor(by_name("f32"), (2, 32), {"codes": w.view(np.uint32)[..., None]})
    store.put("x", {"w": tensor, "v": w}, {"n": 1})
    found, notes = Store.of(tmp_path, "a", 1).get("x")
    np.testing.assert_array_equal(found["w"].dequantize(), w)
    np.testing.assert_array_equal(found["v"], w)
    assert notes == {"n": 1} and store.get("y") is None
    for i in range(6):  # the oldest runs go
        os.utime(Store.of(tmp_path, i).folder, (1e9 + i, 1e9 + i))
    assert len(list(tmp_path.iterdir())) <= 5
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Store.of(tmp_path / "file" / "below", 1)


def test_sequences():
    ids = np.arange(1000)
    found = sequences_of(ids, 4, 100)
    assert found.shape == (4, 100) and found[:, 0].tolist() == [0, 300, 600, 900]
    assert sequences_of(ids, 128, 300).shape == (3, 300)
    assert sequences_of(ids[:20], 128, 512).shape == (1, 20)
    for few in (0, 3):  # an empty text, and a tiny one
        with pytest.raises(BadInput, match=f"has {few} tokens; give at least 16, better 65536"):
            sequences_of(ids[:few], 128, 512, "file")


def test_wrong_use():
    graph = build(F32)
    formats = {"l0.q.w": by_name("s4g32")}
    with pytest.raises(UsageError, match="gptq needs calibration data"):
        quantize_model(graph, formats, None, RECIPE)
    with pytest.raises(BadInput, match="l9: the model has no such matrix"):
        quantize_model(graph, {"l9": by_name("s4g32")}, sequences(), RECIPE)
    with pytest.raises(BadInput, match=r"l0\.q\.w.*row 3 of the weight has a NaN"):
        graph.constants["l0.q.w"][3, 4] = np.nan
        quantize_model(graph, formats, None, Recipe("clip"))
    with pytest.raises(UsageError, match=r"128 columns take 0\.1 MiB, .*-memory 1MiB or more"):
        quantize_model(build(F32), dict.fromkeys(layers_of(graph), by_name("s4g32")), sequences(),
                       replace(RECIPE, memory=40000))
    with pytest.raises(UsageError, match="too few"):
        Recipe("rtn", context=3).check()
    with pytest.raises(BadInput, match="activations that are not finite"):
        graph = build(F32)
        graph.constants["l0.attn_norm.w"][:] = np.inf
        quantize_model(graph, formats, sequences(), RECIPE)


def test_methods_by_text():
    assert parse("gptq") == (("gptq", {}),)
    assert parse("gptq:order=act,damping=0.05,clip=false") == (
        ("gptq", {"order": "act", "damping": 0.05, "clip": False}),)
    assert parse("hadamard:seed=3+awq+gptq") == (("hadamard", {"seed": 3}), ("awq", {}),
                                                 ("gptq", {}))
    for text, error, words in (
        ("gptq:damping=much", UsageError, "is a float; give, for example, damping=0.01"),
        ("gptq:damping", UsageError, "is a float"),
        ("gptq:clip=maybe", UsageError, "is a bool"),
        ("gptq:beam=1", UsageError, "no option 'beam'"),
        ("best", Unsupported, "'best' is not known"),
        ("gptq+rtn", UsageError, r"before a \+ there may be awq, smoothquant, hadamard"),
    ):
        with pytest.raises(error, match=words):
            parse(text)


def test_segments_are_cut_in_front_of_products():
    graph = build(F32)
    parts = segments(graph)
    assert [s.layer for s in parts] == [None, *([0] * 4 + [1] * 4 + [2] * 4), None]
    assert [len(s.products(graph)) for s in parts] == [0, *([3, 1, 2, 1] * 3), 1]
    assert all({n.inputs[0] for n in s.products(graph)} <= set(s.takes) for s in parts)
    assert sorted(n.name for s in parts for n in s.nodes) == sorted(n.name for n in graph.nodes)
