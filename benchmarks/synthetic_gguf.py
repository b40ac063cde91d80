"""Write a GGUF with random blocks: the shapes of a real model, for speed alone.

    python benchmarks/synthetic_gguf.py out.gguf --size 1.1b --type Q4_K
    python benchmarks/synthetic_gguf.py out.gguf --size experts --type MXFP4

The scales are chosen so that activations stay finite; the text that comes out means nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """Dimensions of a llama: width, layers, feed-forward width, heads, key/value heads.

    With ``experts``, of a gpt-oss: ``used`` of them compute a token, and what is no expert is Q8_0.
    """

    d_model: int
    layers: int
    d_ff: int
    heads: int
    kv_heads: int
    experts: int = 0
    used: int = 0


SHAPES = {
    "1.1b": Shape(2048, 22, 5632, 32, 4),  # TinyLlama
    "7b": Shape(4096, 32, 11008, 32, 32),  # Llama 2
    # gpt-oss-20b has a width of 2880, 24 layers, 64 and 8 heads of 64, 4 of 32 experts
    "experts": Shape(1440, 8, 1440, 32, 4, 16, 4),
    "gpt-oss-20b": Shape(2880, 24, 2880, 64, 8, 32, 4),
}

# type -> ((byte of a scale in the block, its value: of an f16, or the exponent of a byte), ...)
SCALES: dict[str, tuple[tuple[int, float | int], ...]] = {
    "Q8_0": ((0, 3e-4),),
    "Q4_0": ((0, 4e-3),),
    "Q4_1": ((0, 4e-3), (2, -3e-2)),
    "Q5_0": ((0, 2e-3),),
    "Q2_K": ((80, 3e-3), (82, 3e-3)),
    "Q3_K": ((108, 5e-4),),
    "Q4_K": ((0, 2e-4), (2, 1e-3)),
    "Q5_K": ((0, 1e-4), (2, 1e-3)),
    "Q6_K": ((208, 2e-5),),
    "MXFP4": ((0, 118),),
}


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random codes, fixed scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, size=(rows * columns // block, size), dtype=np.uint8)
    for at, value in SCALES[kind]:
        scale = np.uint8(value) if isinstance(value, int) else np.float16(value)
        data[:, at : at + scale.nbytes] = np.frombuffer(scale.tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, shape: Shape, kind: str) -> None:
    """Write the model to ``path``."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "gpt-oss" if shape.experts else "llama")
    head_dim = 64 if shape.experts else shape.d_model // shape.heads
    q_width = head_dim * shape.heads
    kv_width = head_dim * shape.kv_heads
    writer.add_name(f"synthetic {path.stem}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    byte_tokens = [b"<0x%02X>" % i for i in range(256)]
    words = [b"t%d" % i for i in range(VOCABULARY - 259)]
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *byte_tokens, *words])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCABULARY - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if shape.experts:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_sliding_window(128)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.used)
        writer.add_expert_feed_forward_length(shape.d_ff)

    def add(name: str, rows: int, columns: int, experts: int = 0) -> None:
        chosen = kind if experts or not shape.experts else "Q8_0"
        data = random_blocks(rng, chosen, max(experts, 1) * rows, columns)
        if experts:
            data = data.reshape(experts, rows, -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[chosen])

    def vector(name: str, *shape: int) -> None:
        writer.add_tensor(name, np.full(shape, 0.01, np.float32))

    ones = np.ones(shape.d_model, np.float32)
    add("token_embd.weight", VOCABULARY, shape.d_model)
    add("output.weight", VOCABULARY, shape.d_model)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(shape.layers):
        prefix = f"blk.{i}."
        writer.add_tensor(prefix + "attn_norm.weight", ones)
        norm = "post_attention_norm" if shape.experts else "ffn_norm"
        writer.add_tensor(f"{prefix}{norm}.weight", ones)
        add(prefix + "attn_q.weight", q_width, shape.d_model)
        add(prefix + "attn_k.weight", kv_width, shape.d_model)
        add(prefix + "attn_v.weight", kv_width, shape.d_model)
        add(prefix + "attn_output.weight", shape.d_model, q_width)
        if shape.experts:
            for name, n in (("q", q_width), ("k", kv_width), ("v", kv_width),
                            ("output", shape.d_model)):  # fmt: skip
                vector(f"{prefix}attn_{name}.bias", n)
            vector(f"{prefix}attn_sinks.weight", shape.heads)
            router = rng.standard_normal((shape.experts, shape.d_model)).astype(np.float32)
            writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router)
            vector(f"{prefix}ffn_gate_inp.bias", shape.experts)
            d, ff = shape.d_model, shape.d_ff
            for name, n, k in (("gate", ff, d), ("up", ff, d), ("down", d, ff)):
                add(f"{prefix}ffn_{name}_exps.weight", n, k, shape.experts)
                vector(f"{prefix}ffn_{name}_exps.bias", shape.experts, n)
            continue
        add(prefix + "ffn_gate.weight", shape.d_ff, shape.d_model)
        add(prefix + "ffn_up.weight", shape.d_ff, shape.d_model)
        add(prefix + "ffn_down.weight", shape.d_model, shape.d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--type", choices=sorted(SCALES), default="Q4_0", dest="kind")
    arguments = parser.parse_args()
    write(arguments.output, SHAPES[arguments.size], arguments.kind)


if __name__ == "__main__":
    main()
