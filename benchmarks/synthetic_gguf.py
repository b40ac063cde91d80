"""Write a llama-family GGUF with random blocks: the shapes of a real model, for speed alone.

    python benchmarks/synthetic_gguf.py out.gguf --size 1.1b --type Q4_K

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
    """Dimensions of a llama: width, layers, feed-forward width, heads, key/value heads."""

    d_model: int
    layers: int
    d_ff: int
    heads: int
    kv_heads: int


SHAPES = {
    "1.1b": Shape(2048, 22, 5632, 32, 4),  # TinyLlama
    "7b": Shape(4096, 32, 11008, 32, 32),  # Llama 2
}

# type -> ((byte of an f16 scale in the block, its value), ...)
SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q8_0": ((0, 3e-4),),
    "Q4_0": ((0, 4e-3),),
    "Q4_1": ((0, 4e-3), (2, -3e-2)),
    "Q5_0": ((0, 2e-3),),
    "Q2_K": ((80, 3e-3), (82, 3e-3)),
    "Q3_K": ((108, 5e-4),),
    "Q4_K": ((0, 2e-4), (2, 1e-3)),
    "Q5_K": ((0, 1e-4), (2, 1e-3)),
    "Q6_K": ((208, 2e-5),),
}


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random codes, fixed scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, size=(rows * columns // block, size), dtype=np.uint8)
    for at, value in SCALES[kind]:
        data[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, shape: Shape, kind: str) -> None:
    """Write the model to ``path``."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    head_dim = shape.d_model // shape.heads
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
    raw = gguf.GGMLQuantizationType[kind]

    def add(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, random_blocks(rng, kind, rows, columns), raw_dtype=raw)

    ones = np.ones(shape.d_model, np.float32)
    add("token_embd.weight", VOCABULARY, shape.d_model)
    add("output.weight", VOCABULARY, shape.d_model)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(shape.layers):
        prefix = f"blk.{i}."
        writer.add_tensor(prefix + "attn_norm.weight", ones)
        writer.add_tensor(prefix + "ffn_norm.weight", ones)
        add(prefix + "attn_q.weight", shape.d_model, shape.d_model)
        add(prefix + "attn_k.weight", kv_width, shape.d_model)
        add(prefix + "attn_v.weight", kv_width, shape.d_model)
        add(prefix + "attn_output.weight", shape.d_model, shape.d_model)
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
