"""Tiny random models of every family, as GGUF file and as Hugging Face folder.

Both containers hold the same float weights, made from a seed in the layout of Hugging Face; the
GGUF is derived from it the way llama.cpp's converter does (names by the ``gguf`` package's map,
query and key rows of llama permuted, gemma's norms plus one). So the frontends can be compared
with each other, and with llama.cpp: ``python tests/frontends/tiny.py`` writes
``tests/data/frontends/llama_cpp_logits.json`` anew where the package llama-cpp-python is installed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from qigen.formats.algebra import Format
from qigen.formats.blocks import to_blocks
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor

Weights = dict[str, np.ndarray]
Tensors = dict[str, tuple[str, np.ndarray]]
"""By name: safetensors' type, and the numbers or their bits."""


@dataclass(frozen=True)
class Tiny:
    """A model's dimensions; ``family`` is a name of the table in ``qigen.frontends.families``."""

    family: str
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    d_ff: int = 96
    vocab_size: int = 96
    context: int = 64
    window: int = 0
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # of config.json
    partial_rotary: float = 1.0
    original_context: int = 0
    tied: bool = False
    bias: bool = False  # of llama: attention_bias and mlp_bias
    experts: int = 0
    used: int = 2
    expert_ff: int = 0  # where it is not d_ff
    normalize: bool = True  # of qwen3moe: norm_topk_prob
    seed: int = 1

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary)

    @property
    def of_experts(self) -> int:
        return self.expert_ff or self.d_ff

    @property
    def is_gemma(self) -> bool:
        return self.family in ("gemma2", "gemma3")


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.3,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
TINY = {
    tiny.family: tiny
    for tiny in (
        Tiny("llama"),
        Tiny("mistral", window=5),
        Tiny("qwen2", tied=True),
        Tiny("qwen3", head_dim=24),
        Tiny("gemma2", n_layers=4, window=6, tied=True),
        Tiny(
            "gemma3",
            n_layers=7,
            head_dim=24,
            window=6,
            tied=True,
            rope_base=1e6,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        Tiny(
            "phi3",
            partial_rotary=0.75,
            context=1024,
            original_context=256,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
            },
        ),
        Tiny("mixtral", n_layers=2, experts=4),
        Tiny("qwen3moe", n_layers=2, head_dim=24, experts=6, used=3, expert_ff=40),
        Tiny("gpt-oss", n_layers=2, head_dim=32, window=5, experts=5, used=2, rope_scaling=YARN),
    )
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
}
_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gpt-oss": gguf.MODEL_ARCH.GPT_OSS,
}


def tiny(family: str, **overrides: Any) -> Tiny:
    """The tiny model of a family with some dimensions changed."""
    return replace(TINY[family], **overrides)


def weights(spec: Tiny) -> Weights:
    """float32 weights by their Hugging Face names, the same for the same spec everywhere."""
    rng = np.random.RandomState(spec.seed)  # its streams are frozen, unlike those of Generator
    result: Weights = {}

    def matrix(name: str, n: int, k: int, scale: float | None = None) -> None:
        values = rng.standard_normal((n, k)) * (scale or 1.5 / math.sqrt(k))
        result[f"{name}.weight"] = values.astype(np.float32)

    def vector(name: str, n: int, centre: float) -> None:
        result[name] = (centre + 0.2 * rng.standard_normal(n)).astype(np.float32)

    def norm(name: str, n: int) -> None:
        vector(f"{name}.weight", n, 0.0 if spec.is_gemma else 1.0)

    d, ff = spec.d_model, spec.d_ff
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    matrix("model.embed_tokens", spec.vocab_size, d, 0.1 if spec.tied else 1.0)
    for i in range(spec.n_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", d)
        if spec.family == "phi3":
            matrix(f"{layer}.self_attn.qkv_proj", q + 2 * kv, d)
        else:
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                matrix(f"{layer}.self_attn.{part}_proj", rows, d)
                if spec.bias or spec.family in ("qwen2", "gpt-oss"):
                    vector(f"{layer}.self_attn.{part}_proj.bias", rows, 0.0)
        if spec.family in ("qwen3", "gemma3", "qwen3moe"):
            norm(f"{layer}.self_attn.q_norm", spec.head_dim)
            norm(f"{layer}.self_attn.k_norm", spec.head_dim)
        matrix(f"{layer}.self_attn.o_proj", d, q)
        if spec.family == "gpt-oss":
            vector(f"{layer}.self_attn.o_proj.bias", d, 0.0)
            vector(f"{layer}.self_attn.sinks", spec.n_heads, 0.5)
        norm(f"{layer}.post_attention_layernorm", d)
        if spec.is_gemma:
            norm(f"{layer}.pre_feedforward_layernorm", d)
            norm(f"{layer}.post_feedforward_layernorm", d)
        if spec.experts:
            _add_experts(spec, layer, matrix, vector, result)
            continue
        if spec.family == "phi3":
            matrix(f"{layer}.mlp.gate_up_proj", 2 * ff, d)
        else:
            matrix(f"{layer}.mlp.gate_proj", ff, d)
            matrix(f"{layer}.mlp.up_proj", ff, d)
        matrix(f"{layer}.mlp.down_proj", d, ff)
        if spec.bias:
            vector(f"{layer}.self_attn.o_proj.bias", d, 0.0)
            vector(f"{layer}.mlp.gate_proj.bias", ff, 0.0)
            vector(f"{layer}.mlp.up_proj.bias", ff, 0.0)
            vector(f"{layer}.mlp.down_proj.bias", d, 0.0)
    norm("model.norm", d)
    if not spec.tied:
        matrix("lm_head", spec.vocab_size, d)
    return result


def _add_experts(
    spec: Tiny,
    layer: str,
    matrix: Callable[..., None],
    vector: Callable[..., None],
    result: Weights,
) -> None:
    """The router and the experts of a layer."""
    d, ff, count = spec.d_model, spec.of_experts, spec.experts
    if spec.family == "mixtral":
        matrix(f"{layer}.block_sparse_moe.gate", count, d)
        for e in range(count):
            for name, n, k in (("w1", ff, d), ("w2", d, ff), ("w3", ff, d)):
                matrix(f"{layer}.block_sparse_moe.experts.{e}.{name}", n, k)
    elif spec.family == "qwen3moe":
        matrix(f"{layer}.mlp.gate", count, d)
        for e in range(count):
            for name, n, k in (("gate_proj", ff, d), ("up_proj", ff, d), ("down_proj", d, ff)):
                matrix(f"{layer}.mlp.experts.{e}.{name}", n, k)
    else:  # gpt-oss: stacked, and transposed where they are floats
        matrix(f"{layer}.mlp.router", count, d)
        vector(f"{layer}.mlp.router.bias", count, 0.0)
        for name, n, k in (("gate_up_proj", 2 * ff, d), ("down_proj", d, ff)):
            matrix("all", count * n, k, 4.0 / math.sqrt(k))  # wide enough to be cut at the limit
            stacked = result.pop("all.weight").reshape(count, n, k)
            result[f"{layer}.mlp.experts.{name}"] = np.ascontiguousarray(stacked.swapaxes(1, 2))
            vector("all", count * n, 0.0)
            result[f"{layer}.mlp.experts.{name}_bias"] = result.pop("all").reshape(count, n)


def tokens(spec: Tiny) -> list[str]:
    """A SentencePiece vocabulary: control tokens, the newline byte, single characters, words."""
    characters = ["\u2581", *"etaoinshrdlcumwfgypbvkjxqz", *"0123456789", *".,!?'\"-:;()"]
    made = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<0x0A>", *characters]
    return (made + [f"\u2581word{i}" for i in range(spec.vocab_size)])[: spec.vocab_size]


# -- Hugging Face ---------------------------------------------------------------------------------


def hf_config(spec: Tiny) -> dict[str, Any]:
    """``config.json`` of the model."""
    config: dict[str, Any] = {
        "architectures": [_CLASSES[spec.family]],
        "model_type": _MODEL_TYPES.get(spec.family, spec.family),
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": 1e-6,
        "rope_theta": spec.rope_base,
        "rope_scaling": spec.rope_scaling or None,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    if spec.family in ("llama", "mistral"):
        config["attention_bias"] = config["mlp_bias"] = spec.bias
    if spec.family in ("mistral", "gemma2", "gemma3"):
        config["sliding_window"] = spec.window or None
    if spec.is_gemma:
        del config["hidden_act"]
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["query_pre_attn_scalar"] = spec.head_dim
    if spec.family == "gemma2":
        config["attn_logit_softcapping"] = 4.0
        config["final_logit_softcapping"] = 3.0
    if spec.family == "gemma3":
        config["rope_local_base_freq"] = 10000.0
        config["sliding_window_pattern"] = 6
    if spec.family == "gpt-oss":
        config["sliding_window"] = spec.window or None
        config["attention_bias"] = True
    if spec.experts:
        config["num_experts_per_tok"] = spec.used
        config["num_experts" if spec.family == "qwen3moe" else "num_local_experts"] = spec.experts
    if spec.family == "qwen3moe":
        config["moe_intermediate_size"] = spec.of_experts
        config["norm_topk_prob"] = spec.normalize
    if spec.family == "phi3":
        config["partial_rotary_factor"] = spec.partial_rotary
        config["original_max_position_embeddings"] = spec.original_context
        config["sliding_window"] = spec.window or None
    return config


_TO_DTYPE = {
    "F32": lambda x: x.astype("<f4"),
    "F16": lambda x: x.astype("<f2"),
    # Truncated to its upper half, which is a bfloat16 (rounded towards zero).
    "BF16": lambda x: (x.astype("<f4").view("<u4") >> 16).astype("<u2"),
}


_SIZES = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1,
          "F8_E4M3": 1}  # fmt: skip


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file by its specification."""
    header: dict[str, Any] = {}
    chunks, offset = [], 0
    for name, (dtype, array) in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        assert len(data) == _SIZES[dtype] * array.size, (name, dtype, array.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def write_floats(path: Path, tensors: Weights, dtype: str = "F32") -> None:
    """Write a safetensors file whose tensors are all of one kind of float."""
    write_safetensors(path, {n: (dtype, _TO_DTYPE[dtype](x)) for n, x in tensors.items()})


def write_tiny_hf(
    folder: str | Path,
    family: str,
    *,
    dtype: str = "F32",
    shards: int = 1,
    config: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny model as a Hugging Face folder and return it.

    ``dtype``: F32, F16 or BF16. ``config``: settings that replace those of ``config.json`` (None
    removes one). ``overrides``: fields of :class:`Tiny`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = tiny(family, **overrides)
    settings = {k: v for k, v in {**hf_config(spec), **(config or {})}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    made = weights(spec)
    if shards == 1:
        write_floats(folder / "model.safetensors", made, dtype)
    else:
        weight_map = {}
        for i in range(shards):
            name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(made.items())[i::shards])
            write_floats(folder / name, part, dtype)
            weight_map.update(dict.fromkeys(part, name))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vocab = {token: i for i, token in enumerate(tokens(spec))}
    special = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token, i in list(vocab.items())[:4]
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


# -- GGUF -----------------------------------------------------------------------------------------


def _permute(x: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    split = x.reshape(n_heads, 2, x.shape[0] // n_heads // 2, *x.shape[1:])
    return split.swapaxes(1, 2).reshape(x.shape)


def gguf_weights(spec: Tiny) -> Weights:
    """The float32 weights by their GGUF names, converted as llama.cpp's converter does."""
    names = gguf.get_tensor_name_map(_ARCHITECTURES[spec.family], spec.n_layers)
    result: Weights = {}
    for name, tensor in _stacked(weights(spec)).items():
        if spec.family in ("llama", "mistral", "mixtral"):
            if ".q_proj." in name:
                tensor = _permute(tensor, spec.n_heads)
            elif ".k_proj." in name:
                tensor = _permute(tensor, spec.n_kv_heads)
        if spec.is_gemma and "norm" in name:
            tensor = tensor + np.float32(1.0)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        result[new if new.endswith((".weight", ".bias")) else f"{new}.weight"] = tensor
    scaling = spec.rope_scaling
    if scaling.get("type") == "longrope":
        result["rope_factors_short.weight"] = np.array(scaling["short_factor"], np.float32)
        result["rope_factors_long.weight"] = np.array(scaling["long_factor"], np.float32)
    if scaling.get("rope_type") == "llama3":
        result["rope_freqs.weight"] = llama3_factors(spec)
    return result


def _stacked(weights: Weights) -> Weights:
    """The weights with those of experts in one tensor a role, as llama.cpp's converter names it."""
    result: Weights = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in weights.items():
        several = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        fused = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|down)_proj(_bias)?", name)
        if several:
            experts.setdefault(f"{several[1]}.{several[3]}.weight", []).append(tensor)
        elif fused:
            kind = "bias" if fused[3] else "weight"
            tensor = tensor if fused[3] else tensor.swapaxes(1, 2)
            parts = {"down_proj": tensor} if fused[2] == "down" else {
                "gate_proj": tensor[:, 0::2], "up_proj": tensor[:, 1::2]}  # fmt: skip
            for part, values in parts.items():
                result[f"{fused[1]}.{part}.{kind}"] = np.ascontiguousarray(values)
        else:
            result[name] = tensor
    return result | {name: np.stack(tensors) for name, tensors in experts.items()}


def llama3_factors(spec: Tiny) -> np.ndarray:
    """Llama 3's factors, written with numpy after the formula of its release."""
    s = spec.rope_scaling
    low, high, factor = s["low_freq_factor"], s["high_freq_factor"], s["factor"]
    context = s["original_max_position_embeddings"]
    frequency = spec.rope_base ** (-np.arange(0, spec.rotary_dim, 2) / spec.rotary_dim)
    wave = 2 * np.pi / frequency
    smooth = (context / wave - low) / (high - low)
    scaled = np.where(
        wave < context / high,
        frequency,
        np.where(
            wave > context / low,
            frequency / factor,
            (1 - smooth) * frequency / factor + smooth * frequency,
        ),
    )
    return (frequency / scaled).astype(np.float32)


def random_blocks(format: Format, n: int, k: int, rng: np.random.RandomState) -> np.ndarray:
    """uint8 ``[n, row bytes]``: random codes with scales that keep the values moderate.

    For the formats that the gguf package can only dequantize.
    """
    fields = {}
    shape = (n, k // format.block)
    for f in format.fields:
        if f.name in ("d", "dmin", "m"):
            top = format.mapped_range[1] * (
                1 << format.field("sub").bits if format.has("sub") else 2
            )
            values = (0.5 + rng.random_sample((*shape, f.count))) / top
            array = values.astype(np.float16).view(np.uint16)
        elif f.name == "e":
            array = rng.randint(118, 123, (*shape, f.count))
        else:
            array = rng.randint(0, 1 << f.bits, (*shape, f.count))
        fields[f.name] = array.astype(f.dtype)
    return to_blocks(QuantizedTensor(format, (n, k), fields))


def write_tiny_gguf(
    path: str | Path,
    family: str,
    quant: str = "f32",
    *,
    keys: dict[str, Any] | None = None,
    tensors: Weights | None = None,
    mixed: dict[str, str] | None = None,
    without: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny model as a GGUF file and return its path.

    ``quant`` is the format of the matrices (``f32 f16 bf16 q8_0 q4_0 ... q4_k ...``); rows that are
    no multiple of its block become f16, as llama.cpp does. ``mixed``: other formats by a part of
    the tensor's name. ``keys``: metadata by name that is added (str, int, float or bool).
    ``tensors``: tensors that replace or join the others; those with ``without`` in their name go.
    ``overrides``: fields of :class:`Tiny`.
    """
    path = Path(path)
    spec = tiny(family, **overrides)
    arch = gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[family]]
    w = gguf.GGUFWriter(path, arch)
    w.add_name(f"tiny {family}")
    w.add_license("mit")
    w.add_block_count(spec.n_layers)
    w.add_context_length(spec.context)
    w.add_embedding_length(spec.d_model)
    w.add_feed_forward_length(spec.d_ff)
    w.add_head_count(spec.n_heads)
    w.add_head_count_kv(spec.n_kv_heads)
    if spec.head_dim * spec.n_heads != spec.d_model:
        w.add_key_length(spec.head_dim)
        w.add_value_length(spec.head_dim)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(spec.rotary_dim)
    w.add_rope_freq_base(spec.rope_base)
    w.add_vocab_size(spec.vocab_size)
    if spec.window:
        w.add_sliding_window(spec.window)
    if family == "gemma2":
        w.add_attn_logit_softcapping(4.0)
        w.add_final_logit_softcapping(3.0)
    kind = spec.rope_scaling.get("rope_type") or spec.rope_scaling.get("type")
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(spec.rope_scaling["factor"])
    if kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(spec.rope_scaling["factor"])
        w.add_rope_scaling_orig_ctx_len(spec.rope_scaling["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_beta_fast(spec.rope_scaling["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(spec.rope_scaling["beta_slow"])
    if not spec.normalize:
        w.add_expert_weights_norm(False)
    if spec.experts:
        w.add_expert_count(spec.experts)
        w.add_expert_used_count(spec.used)
        w.add_expert_feed_forward_length(spec.of_experts)
    if kind == "longrope":
        stretch = spec.context / spec.original_context
        w.add_rope_scaling_orig_ctx_len(spec.original_context)
        w.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(stretch) / math.log(spec.original_context))
        )
    words = tokens(spec)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(words)
    w.add_token_scores([float(-i) for i in range(len(words))])
    w.add_token_types([2, 3, 3, 3, 6] + [1] * (len(words) - 5))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    adders = {str: w.add_string, bool: w.add_bool, int: w.add_uint32, float: w.add_float32}
    for key, value in (keys or {}).items():
        adders[type(value)](key, value)
    rng = np.random.RandomState(spec.seed)
    for name, tensor in {**gguf_weights(spec), **(tensors or {})}.items():
        if without is not None and without in name:
            continue
        chosen = next((f for part, f in (mixed or {}).items() if part in name), quant)
        _add_tensor(w, name, tensor, chosen, rng)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _add_tensor(
    w: gguf.GGUFWriter, name: str, tensor: np.ndarray, quant: str, rng: np.random.RandomState
) -> None:
    if tensor.ndim == 1 or quant == "f32" or tensor.dtype != np.float32 or name.endswith(".bias"):
        w.add_tensor(name, tensor)
        return
    format = by_name(quant)
    if tensor.shape[-1] % format.block and not format.float_kind:
        format = by_name("f16")
    assert format.ggml_type is not None
    kind = GGMLQuantizationType(format.ggml_type)
    try:
        data = gguf.quantize(tensor, kind)
    except NotImplementedError:
        rows = math.prod(tensor.shape[:-1])
        data = random_blocks(format, rows, tensor.shape[-1], rng)
        data = data.reshape(*tensor.shape[:-1], -1)
    w.add_tensor(name, data.view(np.uint8), raw_dtype=kind) if kind.name != "F16" else w.add_tensor(
        name, data
    )


# -- the reference of llama.cpp -------------------------------------------------------------------

REFERENCE = Path(__file__).parents[1] / "data" / "frontends" / "llama_cpp_logits.json"
REFERENCE_CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-bias": {"family": "llama", "bias": True, "tied": True},
    "llama-linear": {"family": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-llama3": {"family": "llama", "rope_scaling": LLAMA3_SCALING},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "gemma2": {"family": "gemma2"},
    "gemma3": {"family": "gemma3"},
    "phi3": {"family": "phi3"},
    "mixtral": {"family": "mixtral"},
    "qwen3moe": {"family": "qwen3moe"},
    "gpt-oss": {"family": "gpt-oss", "rope_scaling": {}},  # it has whole pairs for yarn's ramp
    "llama-yarn": {"family": "llama", "rope_scaling": {**YARN, "truncate": True}},
}
REFERENCE_TOKENS = [1, 5, 9, 33, 12, 7, 80, 41, 22, 5, 5, 60, 71, 3, 18, 29, 44, 8, 90, 17]


def write_reference() -> None:
    """Evaluate the cases with llama.cpp (float32 cache) and store the last row's logits."""
    import tempfile

    import llama_cpp

    result = {}
    for name, case in REFERENCE_CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write_tiny_gguf(Path(folder) / "tiny.gguf", **case)
            for n_ctx in (256, 512) if case["family"] == "phi3" else (256,):
                yarn = case.get("rope_scaling", {})
                model = llama_cpp.Llama(
                    str(path),
                    n_ctx=n_ctx,
                    n_threads=1,
                    type_k=0,
                    type_v=0,
                    verbose=False,
                    logits_all=True,
                    offload_kqv=False,
                    flash_attn=False,
                    # what the package is told goes before the file
                    yarn_beta_fast=yarn.get("beta_fast", 32.0),
                    yarn_beta_slow=yarn.get("beta_slow", 1.0),
                )
                model.eval(REFERENCE_TOKENS)
                logits = np.array(model.scores[len(REFERENCE_TOKENS) - 1], dtype=np.float64)
                result[f"{name}-{n_ctx}"] = [round(float(x), 5) for x in logits]
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"llama_cpp": llama_cpp.__version__, "logits": result})
    REFERENCE.write_text(text.replace('], "', '],\n"') + "\n")


if __name__ == "__main__":
    write_reference()
    sys.exit(0)
