"""The table of model families, and what both containers share because of it.

A family is one row: what its layers hold, what its tensors are called, and the defaults that its
files leave out. A decoder layer is always

    x += [post_norm] attn_output(attention(rope([qk_norm] attn_{q,k,v}(norm(x)))))
    x += [post_norm] ffn_down(act(ffn_gate(norm(x))) * ffn_up(norm(x)))

or, of a mixture of experts, the second of these is a sum over the experts that ``ffn_gate_inp``
chooses for a row.

Sources: ``gguf.constants`` (names of keys and tensors), the model code of the Hugging Face
transformers library (configuration defaults, arithmetic), and llama.cpp (which rope a GGUF needs:
its converter permutes the query and key rows of llama models, so they rotate neighbouring pairs).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from qigen.errors import BadInput, Unsupported
from qigen.frontends.model import ModelConfig, SourceTensor, TensorHandle
from qigen.frontends.settings import shown


@dataclass(frozen=True)
class TensorRow:
    """A tensor of a layer (or of the model). ``shape`` is in the symbols of :func:`sizes`."""

    stem: str
    shape: tuple[str, ...]
    when: str = ""  # the flag of ModelConfig that asks for it; '': always there
    may_have_bias: bool = False
    each: bool = False  # there is one an expert


LAYER_TENSORS = (
    TensorRow("attn_norm", ("d",)),
    TensorRow("attn_q", ("q", "d"), may_have_bias=True),
    TensorRow("attn_k", ("kv", "d"), may_have_bias=True),
    TensorRow("attn_v", ("kv", "d"), may_have_bias=True),
    TensorRow("attn_q_norm", ("head",), when="qk_norm"),
    TensorRow("attn_k_norm", ("head",), when="qk_norm"),
    TensorRow("attn_sinks", ("heads",), when="sinks"),
    TensorRow("attn_output", ("d", "q"), may_have_bias=True),
    TensorRow("post_attention_norm", ("d",), when="post_norms"),
    TensorRow("ffn_norm", ("d",)),
    TensorRow("ffn_gate", ("ff", "d"), when="dense", may_have_bias=True),
    TensorRow("ffn_up", ("ff", "d"), when="dense", may_have_bias=True),
    TensorRow("ffn_down", ("d", "ff"), when="dense", may_have_bias=True),
    TensorRow("ffn_gate_inp", ("experts", "d"), when="routed", may_have_bias=True),
    TensorRow("ffn_gate_exps", ("expert_ff", "d"), when="routed", may_have_bias=True, each=True),
    TensorRow("ffn_up_exps", ("expert_ff", "d"), when="routed", may_have_bias=True, each=True),
    TensorRow("ffn_down_exps", ("d", "expert_ff"), when="routed", may_have_bias=True, each=True),
    TensorRow("post_ffw_norm", ("d",), when="post_norms"),
)
MODEL_TENSORS = (
    TensorRow("token_embd", ("vocab", "d")),
    TensorRow("output_norm", ("d",)),
    TensorRow("output", ("vocab", "d"), when="untied_embeddings"),
)

FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Tensors that hold the rows of several, one after the other; :data:`IN_TURNS`: row by row."""

IN_TURNS = ("ffn_gate_up_exps",)

_GGUF_NAMES = {
    row.stem: f"blk.{{}}.{row.stem}" + ".{}" * row.each for row in LAYER_TENSORS
} | {
    "attn_qkv": "blk.{}.attn_qkv",
    "token_embd": "token_embd",
    "output_norm": "output_norm",
    "output": "output",
}
_LLAMA_NAMES = {
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GEMMA_NAMES = _LLAMA_NAMES | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_MIXTRAL_NAMES = _LLAMA_NAMES | {
    "ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
    "ffn_gate_exps": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
_QWEN3_MOE_NAMES = _LLAMA_NAMES | {
    "ffn_gate_inp": "model.layers.{}.mlp.gate",
    "ffn_gate_exps": "model.layers.{}.mlp.experts.{}.gate_proj",
    "ffn_up_exps": "model.layers.{}.mlp.experts.{}.up_proj",
    "ffn_down_exps": "model.layers.{}.mlp.experts.{}.down_proj",
}
_GPT_OSS_NAMES = _LLAMA_NAMES | {
    "attn_sinks": "model.layers.{}.self_attn.sinks",
    "ffn_gate_inp": "model.layers.{}.mlp.router",
    "ffn_gate_up_exps": "model.layers.{}.mlp.experts.gate_up_proj.{}",
    "ffn_down_exps": "model.layers.{}.mlp.experts.down_proj.{}",
}
_PHI3_NAMES = _LLAMA_NAMES | {
    "attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "ffn_gate_up": "model.layers.{}.mlp.gate_up_proj",
}


@dataclass(frozen=True)
class Mixture:
    """What sets the experts of a family apart: keys of config.json for their number and width, and
    for a flag that asks for weights of the chosen that add up to 1 ('': they always do). ``act``
    (the family's, if '') with its ``alpha`` and the ``limit`` that files may replace; ``biases``
    of router and experts.
    """

    hf_count: str
    hf_d_ff: str = "intermediate_size"
    hf_normalize: str = ""
    act: str = ""
    alpha: float = 1.0
    limit: float = 1.0
    biases: bool = False


@dataclass(frozen=True)
class Family:
    """A row of the table.

    ``gguf_defaults`` are metadata keys without the architecture prefix, ``hf_defaults`` keys of
    config.json; both are what the family's reference implementation assumes where a file is silent.
    ``window_period``: of so many layers the last attends globally and the others through the
    window; 1: all layers use the window (where the file gives one).
    ``wide_query_layers``: numbers of layers of the released models that scale queries by
    ``(d_model/n_heads)^-0.5`` instead of ``head_dim^-0.5``; GGUF has no key for it.
    """

    name: str
    gguf: tuple[str, ...]  # values of general.architecture
    model_types: tuple[str, ...]  # values of model_type
    classes: tuple[str, ...]  # values of architectures
    activation: str = "silu"
    gguf_rope: str = "half"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scaled: bool = False  # by sqrt(d_model)
    hf_norm_offset: float = 0.0
    mixture: Mixture | None = None
    sinks: bool = False
    yarn_truncate: bool = True  # of GGUF, which has no key for it
    local_rope_base: float | None = None
    window_period: int = 1
    wide_query_layers: tuple[int, ...] = ()
    gguf_names: Mapping[str, str] = field(default_factory=lambda: _GGUF_NAMES)
    hf_names: Mapping[str, str] = field(default_factory=lambda: _LLAMA_NAMES)
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Family(
    name="llama",
    gguf=("llama",),
    model_types=("llama",),
    classes=("LlamaForCausalLM",),
    gguf_rope="interleaved",
)
_GEMMA2 = Family(
    name="gemma2",
    gguf=("gemma2",),
    model_types=("gemma2",),
    classes=("Gemma2ForCausalLM",),
    activation="gelu_tanh",
    post_norms=True,
    embedding_scaled=True,
    hf_norm_offset=1.0,
    window_period=2,
    wide_query_layers=(46,),
    hf_names=_GEMMA_NAMES,
    gguf_defaults={
        "attention.sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    hf_defaults={
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
)

FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    # Converters write Mistral as architecture llama; only its configuration has other defaults.
    replace(
        _LLAMA,
        name="mistral",
        gguf=(),
        model_types=("mistral",),
        classes=("MistralForCausalLM",),
        hf_defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        name="qwen2",
        gguf=("qwen2",),
        model_types=("qwen2",),
        classes=("Qwen2ForCausalLM",),
        qkv_bias=True,
        hf_defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    ),
    Family(
        name="qwen3",
        gguf=("qwen3",),
        model_types=("qwen3",),
        classes=("Qwen3ForCausalLM",),
        qk_norm=True,
        hf_defaults={
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        name="gemma3",
        gguf=("gemma3",),
        model_types=("gemma3_text", "gemma3"),
        classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        qk_norm=True,
        local_rope_base=10000.0,
        window_period=6,
        wide_query_layers=(62,),
        gguf_defaults={"rope.freq_base": 1e6},
        hf_defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    ),
    Family(
        name="phi3",
        gguf=("phi3",),
        model_types=("phi3",),
        classes=("Phi3ForCausalLM",),
        gguf_names=_GGUF_NAMES | {"ffn_gate_up": "blk.{}.ffn_up"},
        hf_names=_PHI3_NAMES,
        hf_defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    # Converters write Mixtral as architecture llama with experts.
    replace(
        _LLAMA,
        name="mixtral",
        model_types=("mixtral",),
        classes=("MixtralForCausalLM",),
        mixture=Mixture("num_local_experts"),
        hf_names=_MIXTRAL_NAMES,
        hf_defaults={
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
    ),
    Family(
        name="qwen3moe",
        gguf=("qwen3moe",),
        model_types=("qwen3_moe",),
        classes=("Qwen3MoeForCausalLM",),
        qk_norm=True,
        mixture=Mixture("num_experts", "moe_intermediate_size", "norm_topk_prob"),
        hf_names=_QWEN3_MOE_NAMES,
        hf_defaults={
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        name="gpt-oss",
        gguf=("gpt-oss",),
        model_types=("gpt_oss",),
        classes=("GptOssForCausalLM",),
        qkv_bias=True,
        mixture=Mixture(
            "num_local_experts", act="clamped_swiglu", alpha=1.702, limit=7.0, biases=True
        ),
        sinks=True,
        yarn_truncate=False,
        window_period=2,
        gguf_names=_GGUF_NAMES | {"ffn_norm": "blk.{}.post_attention_norm"},
        hf_names=_GPT_OSS_NAMES,
        hf_defaults={
            "attention_bias": True,
            "head_dim": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        },
    ),
)


def family_of_gguf(architecture: str, routed: bool, where: str) -> Family:
    """The row of a GGUF architecture, with or without experts; Unsupported listing the known."""
    found = [family for family in FAMILIES if architecture in family.gguf]
    for family in found:
        if (family.mixture is not None) == routed:
            return family
    if found:
        kind = "with" if routed else "without"
        raise Unsupported(
            f"models of architecture '{shown(architecture)}' {kind} experts are not supported",
            where,
        )
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.gguf))
    raise Unsupported(
        f"architecture '{shown(architecture)}' is not supported; known are {known}", where
    )


MOST_EXPERTS = 1 << 12
"""Experts of a layer at most: what a damaged file may announce is no reason to loop for hours."""


def family_of_model_type(model_type: str, where: str) -> Family:
    """The row of a Hugging Face ``model_type``; Unsupported listing the known ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise Unsupported(
        f"model type '{shown(model_type)}' is not supported; known are {known}", where
    )


def sliding_layers(n_layers: int, period: int) -> tuple[bool, ...]:
    """Which layers use the window: all but every ``period``-th, or all for 1."""
    return tuple(period == 1 or (i + 1) % period != 0 for i in range(n_layers))


def sizes(config: ModelConfig) -> dict[str, int]:
    """The symbols of the tensor rows."""
    return {
        "vocab": config.vocab_size,
        "d": config.d_model,
        "q": config.n_heads * config.head_dim,
        "kv": config.n_kv_heads * config.head_dim,
        "head": config.head_dim,
        "heads": config.n_heads,
        "ff": config.d_ff,
        "experts": config.experts.count if config.experts else 0,
        "expert_ff": config.experts.d_ff if config.experts else 0,
    }


def bind(
    config: ModelConfig,
    names: Mapping[str, str],
    sources: Mapping[str, SourceTensor],
    where: str,
    *,
    norm_offset: float = 0.0,
    required_biases: Collection[str] = (),
    optional_biases: bool = True,
    ignored: Collection[str] = (),
) -> tuple[dict[str, TensorHandle], tuple[str, ...]]:
    """Give every tensor of the model its place in the file.

    Args:
        names: stem -> the container's name (without ``.weight``), ``{}`` for the layer, and
            another for the expert.
        sources: the container's tensors.
        norm_offset: what is added to stored norm weights.
        required_biases: stems whose bias must be there.
        optional_biases: whether other biases are used if layer 0 has them.
        ignored: source tensors that the model does not need.

    Returns the handles by canonical name, and the stems that have a bias. Raises BadInput naming
    the tensor that is missing, left over or of the wrong shape.
    """
    if config.n_layers > len(sources):
        raise BadInput(
            f"{config.n_layers} layers are announced but the file holds {len(sources)} tensors",
            where,
        )
    binder = _Binder(names, sources, where, sizes(config), norm_offset)
    present = [
        row for row in (*MODEL_TENSORS, *LAYER_TENSORS) if not row.when or getattr(config, row.when)
    ]
    layer_rows = [row for row in present if row in LAYER_TENSORS]
    biases = tuple(
        row.stem
        for row in layer_rows
        if row.may_have_bias
        and (row.stem in required_biases
             or (optional_biases and binder.has(row, (0, 0) if row.each else (0,), "bias")))
    )  # fmt: skip
    for row in present:
        if row in MODEL_TENSORS:
            binder.take(row, (), "weight")
    for layer in range(config.n_layers):
        for row in layer_rows:
            for place in [(layer, e) for e in range(binder.sizes["experts"])] if row.each else (
                [(layer,)]):
                binder.take(row, place, "weight")
                if row.stem in biases:
                    binder.take(row, place, "bias")
    left = sorted(set(sources) - binder.used - set(ignored))
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        experts = f" and {config.experts.count} experts" if config.experts else ""
        raise BadInput(
            f"tensor '{shown(left[0])}'{more} does not belong to a {config.family} model of "
            f"{config.n_layers} layers{experts}",
            where,
        )
    return binder.handles, biases


_FUSED_OF = {part: whole for whole, parts in FUSED.items() for part in parts}

Place: TypeAlias = tuple[int, ...]
"""Of a tensor: nothing, its layer, or layer and expert."""


@dataclass
class _Binder:
    names: Mapping[str, str]
    sources: Mapping[str, SourceTensor]
    where: str
    sizes: Mapping[str, int]
    norm_offset: float
    handles: dict[str, TensorHandle] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def _name(self, stem: str, place: Place, kind: str) -> str:
        return f"{self.names[stem].format(*place)}.{kind}" if stem in self.names else ""

    def _whole(self, row: TensorRow, place: Place, kind: str) -> str:
        """Stem of the fused tensor that holds the row, '' if it stands alone.

        Where the first part stands alone all parts do: phi3's GGUF calls the fused tensor ffn_up.
        """
        whole = _FUSED_OF.get(row.stem, "")
        if whole not in self.names or self._name(FUSED[whole][0], place, kind) in self.sources:
            return ""
        return whole if self._name(whole, place, kind) in self.sources else ""

    def has(self, row: TensorRow, place: Place, kind: str) -> bool:
        return bool(
            self._whole(row, place, kind) or self._name(row.stem, place, kind) in self.sources
        )

    def _rows(self, stem: str) -> int:
        row = next(r for r in LAYER_TENSORS if r.stem == stem)
        return self.sizes[row.shape[0]]

    def take(self, row: TensorRow, place: Place, kind: str) -> None:
        whole = self._whole(row, place, kind)
        name = self._name(whole or row.stem, place, kind)
        if name not in self.sources:
            fused = self._name(_FUSED_OF.get(row.stem, ""), place, kind)
            name, fused = name or fused, fused if name else ""
            other = f", and so is '{fused}' that could hold it" if fused not in ("", name) else ""
            if row.each:
                other += f"; the configuration announces {self.sizes['experts']} experts"
            raise BadInput(f"tensor '{name}' is missing{other}", self.where)
        source = self.sources[name]
        parts = FUSED[whole] if whole else (row.stem,)
        columns = tuple(self.sizes[s] for s in row.shape[1:]) if kind == "weight" else ()
        count = self.sizes[row.shape[0]]
        total = sum(self._rows(part) for part in parts) if whole else count
        if source.shape != (total, *columns):
            if row.stem == "token_embd" and source.shape[1:] == columns:
                raise BadInput(
                    f"the vocabulary has {count} tokens but the embedding '{name}' has "
                    f"{source.shape[0]} rows",
                    self.where,
                )
            raise BadInput(
                f"tensor '{name}' has the shape {list(source.shape)}, but the configuration asks "
                f"for {[total, *columns]}",
                self.where,
            )
        first = sum(self._rows(part) for part in parts[: parts.index(row.stem)])
        rows, step = (first, first + count), 1
        if whole in IN_TURNS:
            rows, step = (parts.index(row.stem), total), len(parts)
        canonical = "blk.{}.".format(*place) + row.stem if place else row.stem
        canonical += f".{place[1]}" if row.each else ""
        is_norm = row.stem.endswith("norm")
        self.handles[f"{canonical}.{kind}"] = TensorHandle(
            f"{canonical}.{kind}",
            source,
            rows,
            self.norm_offset if is_norm else 0.0,
            step,
        )
        self.used.add(name)
