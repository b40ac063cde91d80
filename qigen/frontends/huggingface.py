"""Hugging Face folders: ``config.json`` and weights in ``*.safetensors``, floats or quantized.

The configuration keys and their defaults are those of the transformers library (its older flat
``rope_theta``/``rope_scaling`` and its newer ``rope_parameters``); the container is validated by
the ``safetensors`` package and then mapped, because numpy has no bfloat16.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from qigen.errors import BadInput, Unsupported
from qigen.formats.catalog import by_name
from qigen.frontends.checkpoints import RawTensor, read_quantized
from qigen.frontends.experts import renamed_gpt_oss, unstacked_gpt_oss
from qigen.frontends.families import (
    MOST_EXPERTS,
    Family,
    bind,
    family_of_model_type,
    sliding_layers,
)
from qigen.frontends.model import (
    ExpertsConfig,
    LanguageModel,
    ModelConfig,
    ModelMetadata,
    RopeConfig,
    SourceTensor,
    TokenizerSource,
    map_file,
)
from qigen.frontends.rope import yarn, yarn_attention
from qigen.frontends.settings import REQUIRED, Settings, shown

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_GPTQ = "quantize_config.json"  # where old versions of AutoGPTQ say what others say in config.json
_MAX_JSON = 64 << 20

_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Checkpoints with a vision tower keep the language model under a prefix.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")  # saved by old versions, computed anyway


def load_huggingface(folder: str | Path) -> LanguageModel:
    """Read a decoder-only language model of one of the known families from a folder.

    No weight is read. Raises BadInput (damaged or missing files, missing, surplus or wrong
    tensors, settings out of range) and Unsupported (model type, quantized checkpoint, rope
    scaling, tensor type).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput("there is no such folder", str(folder))
    path = folder / _CONFIG
    where = str(path)
    values = _json(path)
    notes: list[str] = []
    family = family_of_model_type(Settings(values, where).text("model_type"), where)
    classes = values.get("architectures")
    if isinstance(classes, list) and classes and not set(map(str, classes)) & set(family.classes):
        raise Unsupported(
            f"model class '{shown(str(classes[0]))}' is not supported; known is "
            f"{', '.join(family.classes)}",
            where,
        )
    if isinstance(values.get("text_config"), dict):
        kept = ("quantization_config",)
        outer = {k: v for k, v in values.items() if k.endswith("_token_id") or k in kept}
        values = {**outer, **values["text_config"]}
    quantization = _quantization(values, where)
    if quantization is None and (folder / _GPTQ).is_file():
        found = {"quant_method": "gptq", **_json(folder / _GPTQ)}
        quantization = Settings(found, str(folder / _GPTQ))
    settings = Settings({**family.hf_defaults, **values}, where)
    generation = _json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    config = _config(family, settings, Settings(generation, str(folder / _GENERATION)))
    sources, files = _weights(folder, config, quantization, notes)
    tied = {f"{family.hf_names['output']}.weight"} if config.tied_embeddings else set()
    required: list[str] = []
    if family.qkv_bias or settings.flag("attention_bias"):
        required += ["attn_q", "attn_k", "attn_v"]
    if settings.flag("attention_bias"):
        required.append("attn_output")
    if settings.flag("mlp_bias"):
        required += ["ffn_gate", "ffn_up", "ffn_down"]
    if family.mixture is not None and family.mixture.biases:
        required += ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
    tensors, biases = bind(
        config,
        family.hf_names,
        sources,
        str(folder),
        norm_offset=family.hf_norm_offset,
        required_biases=required,
        optional_biases=False,
        ignored=tied | {name for name in sources if _BUFFER.fullmatch(name)},
    )
    return LanguageModel(
        config=replace(config, biases=biases),
        tensors=tensors,
        tokenizer_source=TokenizerSource("huggingface", folder),
        metadata=ModelMetadata(
            name=folder.resolve().name,
            licence=_licence(folder),
            container="huggingface",
            path=folder,
            files=files,
            notes=tuple(notes),
        ),
        source_tensors=sources,
    )


def _json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; BadInput if it is anything else."""
    where = str(path)
    try:
        if not path.is_file():
            raise BadInput("there is no such file", where)
        if path.stat().st_size > _MAX_JSON:
            raise BadInput(f"the file is larger than {_MAX_JSON >> 20} MiB", where)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", where) from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are
        raise BadInput(f"the file is not valid JSON ({error})", where) from None
    if not isinstance(value, dict):
        raise BadInput("the file must hold a JSON object", where)
    return value


def _quantization(values: Mapping[str, Any], where: str) -> Settings | None:
    """The settings of ``quantization_config``, None for float weights."""
    quantization = values.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise BadInput("the setting 'quantization_config' must be an object", where)
    return Settings(quantization, where)


def _config(family: Family, s: Settings, generation: Settings) -> ModelConfig:
    d_model = s.integer("hidden_size")
    n_layers = s.integer("num_hidden_layers", high=1 << 16)
    n_heads = s.integer("num_attention_heads")
    if "head_dim" not in s and d_model % n_heads:
        raise BadInput(f"{n_heads} heads do not divide the width {d_model} evenly", s.where)
    head_dim = s.integer("head_dim", d_model // n_heads)
    vocab_size = s.integer("vocab_size")
    stated = "hidden_activation" if "hidden_activation" in s else "hidden_act"
    activation = s.text(stated, "silu")
    if _ACTIVATIONS.get(activation) != family.activation:
        raise Unsupported(
            f"activation '{shown(activation)}' is not supported for {family.name} models", s.where
        )
    if s.flag("use_bidirectional_attention"):
        raise Unsupported("bidirectional attention is not supported", s.where)
    window, sliding = _sliding(family, s, n_layers)
    config = ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=s.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=s.integer("intermediate_size"),
        experts=_experts(family, s),
        sinks=family.sinks,
        norm_eps=s.number("rms_norm_eps", 1e-6, low=1e-12, high=1.0),
        max_position=s.integer("max_position_embeddings", 2048),
        rope=_rope(s, "full_attention", head_dim),
        local_rope=None
        if family.local_rope_base is None
        else _rope(s, "sliding_attention", head_dim),
        attn_scale=s.number("query_pre_attn_scalar", head_dim, low=1e-6) ** -0.5,
        activation=family.activation,
        window=window,
        sliding_layers=sliding,
        attn_softcap=s.number("attn_logit_softcapping", 0.0),
        final_softcap=s.number("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(d_model) if family.embedding_scaled else 1.0,
        tied_embeddings=s.flag("tie_word_embeddings"),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        bos_id=s.token("bos_token_id", vocab_size),
        eos_ids=_end_tokens(generation if "eos_token_id" in generation else s, vocab_size),
    )
    config.check(s.where)
    return config


def _experts(family: Family, s: Settings) -> ExpertsConfig | None:
    """The mixture of experts of a family that has one; Unsupported if some layers have none."""
    mixture = family.mixture
    if mixture is None:
        return None
    if s.integer("decoder_sparse_step", 1) != 1 or s.values.get("mlp_only_layers"):
        raise Unsupported("layers without experts between others are not supported", s.where)
    normalized = not mixture.hf_normalize or s.flag(mixture.hf_normalize)
    return ExpertsConfig(
        count=s.integer(mixture.hf_count, high=MOST_EXPERTS),
        used=s.integer("num_experts_per_tok"),
        d_ff=s.integer(mixture.hf_d_ff),
        softmax="chosen" if normalized else "all",
        act=mixture.act or family.activation,
        alpha=mixture.alpha,
        limit=s.number("swiglu_limit", mixture.limit, low=1e-3),
    )


def _end_tokens(s: Settings, vocab_size: int) -> tuple[int, ...]:
    value = s.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise s.bad("eos_token_id", f"token ids below {vocab_size}")
    return tuple(dict.fromkeys(ids))


def _sliding(family: Family, s: Settings, n_layers: int) -> tuple[int, tuple[bool, ...]]:
    """The window and which layers use it: by ``layer_types``, or by the family's rule."""
    window = s.integer("sliding_window", 0, low=0)
    if "use_sliding_window" in s and not s.flag("use_sliding_window"):
        window = 0
    if "layer_types" in s:
        types = s.values["layer_types"]
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) < n_layers:
            raise s.bad("layer_types", f"a list of {n_layers} names")
        for kind in types:
            if kind not in known:
                raise Unsupported(f"layer type '{shown(str(kind))}' is not supported", s.where)
        sliding = tuple(kind == known[1] for kind in types[:n_layers])
    elif "max_window_layers" in s:
        first = s.integer("max_window_layers", low=0)
        sliding = tuple(i >= first for i in range(n_layers))
    else:
        sliding = sliding_layers(
            n_layers, s.integer("sliding_window_pattern", family.window_period)
        )
    return (window, sliding) if window and any(sliding) else (0, ())


def _rope(s: Settings, layer_type: str, head_dim: int) -> RopeConfig:
    """The rotary embedding of the layers of ``layer_type``.

    Flat settings speak of the full-attention layers; gemma3's sliding layers then have a base of
    their own (``rope_local_base_freq``) and no scaling.
    """
    nested = s.values.get("rope_parameters")
    flat = s.values.get("rope_scaling")
    for name, value in (("rope_parameters", nested), ("rope_scaling", flat)):
        if value is not None and not isinstance(value, dict):
            raise s.bad(name, "an object")
    local = layer_type == "sliding_attention"
    base = "rope_local_base_freq" if local else "rope_theta"
    merged: dict[str, Any] = {} if local else dict(flat or {})
    if nested and "full_attention" in nested:
        inner = nested.get(layer_type)
        if not isinstance(inner, dict):
            raise s.bad("rope_parameters", f"an object with '{layer_type}'")
        merged.update(inner)
    elif nested and not local:
        merged.update(nested)
    keys = ("max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor")
    outer = {key: s.values[key] for key in keys if key in s}
    r = Settings({"rope_theta": s.values.get(base), **outer, **merged}, s.where)
    share = r.number("partial_rotary_factor", 1.0, high=1.0)
    rotary_dim = int(head_dim * share)
    rope = RopeConfig(r.number("rope_theta", 10000.0, low=1e-6), "half", rotary_dim)
    kind = r.text("rope_type", r.values.get("type") or "default")
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, position_scale=1.0 / r.number("factor", low=1e-3))
    if kind == "llama3":
        return replace(rope, factors=_llama3_factors(rope, r))
    if kind in ("longrope", "su"):
        return _longrope(rope, r)
    if kind == "yarn":
        return _yarn(rope, r)
    raise Unsupported(
        f"rope scaling '{shown(kind)}' is not supported; known are linear, llama3, longrope and "
        "yarn",
        s.where,
    )


def _yarn(rope: RopeConfig, r: Settings) -> RopeConfig:
    """YaRN (Peng et al. 2023, arXiv:2309.00071) with the settings that transformers has for it."""
    if {"mscale", "mscale_all_dim"} & {key for key in r.values if key in r}:
        raise Unsupported("yarn with 'mscale' is not supported", r.where)
    if "original_max_position_embeddings" in r:
        context = r.integer("original_max_position_embeddings")
        default = r.integer("max_position_embeddings", context) / context
    else:
        context, default = r.integer("max_position_embeddings"), REQUIRED
    factor = r.number("factor", default, low=1e-3)
    return yarn(
        rope,
        factor,
        context,
        fast=r.number("beta_fast", 32.0, low=1e-3),
        slow=r.number("beta_slow", 1.0, low=1e-3),
        truncate=r.flag("truncate", True),
        attn_factor=r.number("attention_factor", yarn_attention(factor), low=1e-6),
    )


def _llama3_factors(rope: RopeConfig, r: Settings) -> tuple[float, ...]:
    """Llama 3's frequency factors: long waves are stretched by ``factor``, short ones are not,
    and those between are interpolated (transformers, ``modeling_rope_utils.py``).
    """
    factor = r.number("factor", low=1e-3)
    low, high = r.number("low_freq_factor", low=1e-3), r.number("high_freq_factor", low=1e-3)
    context = r.integer("original_max_position_embeddings")
    if high <= low:
        raise r.bad("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    result = []
    for i in range(rope.rotary_dim // 2):
        wave = 2.0 * math.pi * rope.base ** (2.0 * i / rope.rotary_dim)
        smooth = (context / wave - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        result.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(result)


def _longrope(rope: RopeConfig, r: Settings) -> RopeConfig:
    """Phi-3's two lists of factors and the attention factor that belongs to them."""
    context = r.integer("original_max_position_embeddings", low=2)
    stretch = r.integer("max_position_embeddings") / context
    default = 1.0 if stretch <= 1.0 else math.sqrt(1.0 + math.log(stretch) / math.log(context))
    return replace(
        rope,
        attn_factor=r.number("attention_factor", default, low=1e-6),
        factors=r.numbers("short_factor", rope.rotary_dim // 2),
        long_factors=r.numbers("long_factor", rope.rotary_dim // 2),
        original_context=context,
    )


def _weights(
    folder: Path, config: ModelConfig, quantization: Settings | None, notes: list[str]
) -> tuple[dict[str, SourceTensor], tuple[Path, ...]]:
    """All tensors of the language model by their names without a prefix, and their files."""
    found: dict[str, RawTensor] = {}
    if (folder / _INDEX).is_file():
        files = _shards(folder)
        for file, announced in files.items():
            tensors = read_safetensors(file)
            for name in announced.symmetric_difference(tensors):
                problem = "is not in the index" if name in tensors else "is missing"
                raise BadInput(f"tensor '{shown(name)}' {problem}", str(file))
            found.update(tensors)
        paths = tuple(files)
    elif (folder / _SINGLE).is_file():
        found = read_safetensors(folder / _SINGLE)
        paths = (folder / _SINGLE,)
    else:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        advice = f"; convert '{others[0]}' to safetensors" if others else ""
        raise BadInput(f"the folder has neither '{_SINGLE}' nor '{_INDEX}'{advice}", str(folder))
    raw: dict[str, RawTensor] = {}
    vision = 0
    for name, tensor in found.items():
        if _VISION.match(name):
            vision += 1
            continue
        for prefix, plain in _TEXT_PREFIXES:
            if name.startswith(prefix):
                name = plain + name[len(prefix) :]
                break
        raw[name] = tensor
    if vision:
        notes.append(f"the vision tower ({vision} tensors) is left out: text only")
    rename: Callable[[str], str] = str
    stacked: dict[str, SourceTensor] = {}
    if config.family == "gpt-oss" and config.experts is not None:
        raw, stacked = unstacked_gpt_oss(raw, config.experts.count)
        rename = renamed_gpt_oss
    if quantization is None:
        return {**{rename(name): _dense(tensor) for name, tensor in raw.items()}, **stacked}, paths
    matrices, parts = read_quantized(raw, quantization)
    wide = sum(matrix.format.float_kind is not None for matrix in matrices.values())
    if wide:
        notes.append(
            f"{wide} matrices have groups that no format has and are kept as float32 numbers: they "
            "take more room than the checkpoint; --weights rounds them"
        )
    dense = {name: _dense(tensor) for name, tensor in raw.items() if name not in parts}
    every = {**dense, **matrices, **stacked}
    return {rename(name): tensor for name, tensor in every.items()}, paths


def _dense(tensor: RawTensor) -> SourceTensor:
    """A tensor of floats; Unsupported if it holds anything else."""
    if tensor.dtype not in _DTYPES:
        raise Unsupported(
            f"tensor '{shown(tensor.name)}' has the type {shown(tensor.dtype)}; only floats are "
            "read, and the layers of quantized checkpoints",
            str(tensor.file),
        )
    if not 1 <= len(tensor.shape) <= 2 or min(tensor.shape) < 1:
        raise tensor.bad(f"has the shape {list(tensor.shape)}")
    row = by_name(_DTYPES[tensor.dtype])
    return SourceTensor(tensor.file, tensor.name, tensor.shape, row, tensor.data)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The index: file -> the tensors it must hold. File names may not leave the folder."""
    where = str(folder / _INDEX)
    weight_map = _json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput("'weight_map' must be an object that names a file for every tensor", where)
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or PurePosixPath(name).name != name
            or not name.endswith(".safetensors")
            or re.search(r"[\\:\x00]", name)
        ):
            raise BadInput(
                f"tensor '{shown(tensor)}' is said to be in {shown(repr(name))}, which is no plain "
                "file name of a .safetensors file",
                where,
            )
        files.setdefault(folder / name, set()).add(tensor)
    return files


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """The tensors of one file, mapped. The package checks header, sizes and offsets.

    Raises BadInput for anything that is no sound safetensors file.
    """
    where = str(path)
    data = map_file(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"the file is no valid safetensors file ({error})", where) from None
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    result: dict[str, RawTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (start + offset for offset in entry["data_offsets"])
        result[name] = RawTensor(
            path, name, entry["dtype"], tuple(entry["shape"]), data[first:last]
        )
    return result


def _licence(folder: Path) -> str:
    """The licence that the model card states in its YAML head, '' if there is none."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return ""
    found = re.match(r"---\n(?:.*\n)*?license:[ \t]*([\w.-]+)", head)
    return found[1] if found else ""
