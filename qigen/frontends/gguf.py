"""GGUF files: strict validation of the container, then a language model of it.

The layout is that of the GGUF specification (ggml, ``docs/gguf.md``) with the names and sizes of
the ``gguf`` package. The walk over the header is our own for two reasons: every count, length and
offset is checked against the file's size before it is used, so that a damaged file is one clear
error; and it is some twenty times faster than the package's reader, which makes a numpy view of
every token of the vocabulary.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Format
from qigen.formats.catalog import by_ggml_type
from qigen.frontends.experts import of_gguf, renamed_gguf
from qigen.frontends.families import (
    MOST_EXPERTS,
    Family,
    bind,
    family_of_gguf,
    sliding_layers,
)
from qigen.frontends.model import (
    Bytes,
    ExpertsConfig,
    LanguageModel,
    ModelConfig,
    ModelMetadata,
    RopeConfig,
    SourceTensor,
    TensorHandle,
    TokenizerSource,
    map_file,
)
from qigen.frontends.rope import yarn, yarn_attention
from qigen.frontends.settings import Settings, positive, shown

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_LEAST_KEY_BYTES = 8 + 4 + 1  # length of the name, type, a value of one byte
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, n_dims, one dimension, type, offset
_MAX_DIMS = 4

_FREQ_BASE_SWA = "{arch}.rope.freq_base_swa"  # later versions of the package have it in Keys
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_LONG = "rope_factors_long.weight"
_ROPE_SHORT = "rope_factors_short.weight"


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor's entry in the header and its mapped bytes.

    ``shape`` is row-major, so the reverse of the stored dimensions; ``offset`` is from the start of
    the file.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    data: Bytes


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A validated GGUF file.

    ``fields``: metadata by key; strings are ``str``, numbers ``int`` or ``float``, flags ``bool``,
    arrays of strings ``list[str]``, other arrays numpy arrays.
    """

    path: Path
    version: int
    alignment: int
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads the header; never past the end of the file."""

    def __init__(self, data: Bytes, where: str) -> None:
        self.view = data.data
        self.size = len(self.view)
        self.where = where
        self.position = 0

    def need(self, count: int, what: str) -> int:
        """Claim ``count`` bytes and return where they start."""
        start = self.position
        if count > self.size - start:
            raise BadInput(
                f"the file ends inside {what} ({count} bytes wanted at {start}, "
                f"{self.size - start} left); it is truncated or damaged",
                self.where,
            )
        self.position = start + count
        return start

    def u32(self, what: str) -> int:
        value: int = struct.unpack_from("<I", self.view, self.need(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = struct.unpack_from("<Q", self.view, self.need(8, what))[0]
        return value

    def text(self, what: str) -> str:
        length = self.u64(what)
        start = self.need(length, what)
        try:
            return str(self.view[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{what} is not UTF-8; the file is damaged", self.where) from None

    def texts(self, count: int, what: str) -> list[str]:
        """``count`` strings. Written out because vocabularies have hundreds of thousands."""
        view, size, unpack = self.view, self.size, struct.Struct("<Q").unpack_from
        position, result = self.position, []
        try:
            for _ in range(count):
                (length,) = unpack(view, position)
                position += 8
                if length > size - position:
                    raise struct.error
                result.append(str(view[position : position + length], "utf-8"))
                position += length
        except struct.error:
            raise BadInput(
                f"the file ends inside {what}; it is truncated or damaged", self.where
            ) from None
        except UnicodeDecodeError:
            raise BadInput(f"{what} has a string that is not UTF-8", self.where) from None
        self.position = position
        return result

    def value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise BadInput(f"{what} has the unknown value type {number}", self.where) from None

    def value(self, what: str) -> Any:
        kind = self.value_type(what)
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind == GGUFValueType.ARRAY:
            return self.array(what)
        return self.scalars(kind, 1, what)[0].item()

    def array(self, what: str) -> Any:
        kind = self.value_type(what)
        count = self.u64(what)
        if kind == GGUFValueType.ARRAY:
            raise Unsupported(f"{what} is an array of arrays, which no model uses", self.where)
        least = 8 if kind == GGUFValueType.STRING else np.dtype(_SCALARS[kind]).itemsize
        if count > (self.size - self.position) // least:
            raise BadInput(
                f"{what} announces {count} elements, more than the file can hold; it is truncated "
                "or damaged",
                self.where,
            )
        if kind == GGUFValueType.STRING:
            return self.texts(count, what)
        return self.scalars(kind, count, what)

    def scalars(self, kind: GGUFValueType, count: int, what: str) -> npt.NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        start = self.need(count * dtype.itemsize, what)
        array: npt.NDArray[Any] = np.frombuffer(self.view, dtype, count, start).copy()
        if kind == GGUFValueType.BOOL:
            if (array > 1).any():
                raise BadInput(f"{what} has a flag that is neither 0 nor 1", self.where)
            flags: npt.NDArray[Any] = array.astype(np.bool_)
            return flags
        return array


def read_gguf(path: str | Path) -> GgufFile:
    """Validate a GGUF file and return its metadata and tensors; no weight is read.

    Raises BadInput for a file that is damaged, truncated or padded, and Unsupported for other
    versions, other byte orders, one part of a split model, and unknown tensor types. The message
    names the key or tensor.
    """
    path = Path(path)
    where = str(path)
    data = map_file(path)
    cursor = _Cursor(data, where)
    magic = cursor.u32("the magic number")
    if magic != GGUF_MAGIC:
        raise BadInput("this is no GGUF file (wrong magic number)", where)
    version = cursor.u32("the version")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            raise Unsupported("big-endian GGUF files are not supported; convert it again", where)
        raise Unsupported(f"GGUF version {version} is not supported; known are 2 and 3", where)
    n_tensors = cursor.u64("the number of tensors")
    n_fields = cursor.u64("the number of keys")
    for count, least, what in (
        (n_fields, _LEAST_KEY_BYTES, "keys"),
        (n_tensors, _LEAST_TENSOR_BYTES, "tensors"),
    ):
        if count > cursor.size // least:
            raise BadInput(f"the header announces {count} {what}, more than fit the file", where)
    fields: dict[str, Any] = {}
    for index in range(n_fields):
        key = cursor.text(f"the name of key {index}")
        if key in fields:
            raise BadInput(f"key '{shown(key)}' appears twice", where)
        fields[key] = cursor.value(f"key '{shown(key)}'")
    settings = Settings(fields, where)
    alignment = settings.integer(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if alignment & (alignment - 1):
        raise settings.bad(Keys.General.ALIGNMENT, "a power of two")
    if settings.integer(Keys.Split.LLM_KV_SPLIT_COUNT, 0, low=0) > 1:
        raise Unsupported("this is one part of a split GGUF; merge the parts first", where)
    entries = [_tensor_entry(cursor, index) for index in range(n_tensors)]
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(
        path, version, alignment, fields, _place_tensors(data, entries, start, alignment, where)
    )


@dataclass(frozen=True)
class _Entry:
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _tensor_entry(cursor: _Cursor, index: int) -> _Entry:
    name = cursor.text(f"the name of tensor {index}")
    what = f"tensor '{shown(name)}'"
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise BadInput(
            f"{what} has {n_dims} dimensions; 1 to {_MAX_DIMS} are possible", cursor.where
        )
    dims = [cursor.u64(what) for _ in range(n_dims)]
    number = cursor.u32(what)
    offset = cursor.u64(what)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise Unsupported(f"{what} has the unknown type {number}", cursor.where) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(dims) < 1:
        raise BadInput(f"{what} has a dimension of zero", cursor.where)
    if dims[0] % block:
        raise BadInput(
            f"{what} has rows of {dims[0]} weights, no multiple of the block of {block} of "
            f"{kind.name}",
            cursor.where,
        )
    # Python's integers do not overflow, so a huge product is seen as what it is.
    nbytes = math.prod(dims) // block * block_bytes
    if nbytes > cursor.size:
        raise BadInput(f"{what} of {dims} weights is larger than the file", cursor.where)
    return _Entry(name, kind, tuple(reversed(dims)), offset, nbytes)


def _place_tensors(
    data: Bytes, entries: list[_Entry], start: int, alignment: int, where: str
) -> dict[str, GgufTensor]:
    """Check that the tensors tile the data section without overlap, gap or rest."""
    tensors: dict[str, GgufTensor] = {}
    size = len(data)
    for entry in entries:
        what = f"tensor '{shown(entry.name)}'"
        if entry.name in tensors:
            raise BadInput(f"{what} appears twice", where)
        if entry.offset % alignment:
            raise BadInput(
                f"{what} starts at {entry.offset}, which is not aligned to {alignment} bytes", where
            )
        first = start + entry.offset
        if first + entry.nbytes > size:
            raise BadInput(
                f"{what} ends at byte {first + entry.nbytes} but the file has {size}; it is "
                "truncated or damaged",
                where,
            )
        tensors[entry.name] = GgufTensor(
            entry.name, entry.type, entry.shape, first, data[first : first + entry.nbytes]
        )
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "leaves a gap"
            raise BadInput(
                f"tensor '{shown(tensor.name)}' {problem} (it starts at byte {tensor.offset}, "
                f"expected {end})",
                where,
            )
        last = tensor.offset + len(tensor.data)
        end = -(-last // alignment) * alignment
        if last <= size <= end:
            end = size  # a writer may leave out the padding behind the last tensor
    if tensors and size != end:
        raise BadInput(f"the file has {size - end} bytes behind its last tensor", where)
    return tensors


def load_gguf(path: str | Path) -> LanguageModel:
    """Read a decoder-only language model of one of the known families from a GGUF file.

    No weight is read. Raises BadInput (damaged file, missing or wrong tensors or settings) and
    Unsupported (architecture, tensor type, rope scaling).
    """
    file = read_gguf(path)
    where = str(file.path)
    settings = Settings(file.fields, where)
    architecture = settings.text(Keys.General.ARCHITECTURE)
    experts = settings.integer(
        Keys.LLM.EXPERT_COUNT.format(arch=architecture), 0, low=0, high=MOST_EXPERTS
    )
    family = family_of_gguf(architecture, experts > 0, where)
    sources: dict[str, SourceTensor] = {}
    for tensor in file.tensors.values():
        sources |= _sources(tensor, file.path, experts)
    config = _config(family, settings, sources)
    ignored = {_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT}
    ignored |= {f"blk.{i}.attn_rot_embd.weight" for i in range(min(config.n_layers, len(sources)))}
    required = ("attn_q", "attn_k", "attn_v") if family.qkv_bias else ()
    tensors, biases = bind(
        config, family.gguf_names, sources, where, required_biases=required, ignored=ignored
    )
    return LanguageModel(
        config=replace(config, biases=biases),
        tensors=tensors,
        tokenizer_source=TokenizerSource(
            "gguf",
            file.path,
            {key: value for key, value in file.fields.items() if key.startswith("tokenizer.")},
        ),
        metadata=ModelMetadata(
            name=settings.text(Keys.General.NAME, file.path.stem),
            licence=settings.text(Keys.General.LICENSE, ""),
            container="gguf",
            path=file.path,
            files=(file.path,),
        ),
        source_tensors=sources,
    )


def _sources(tensor: GgufTensor, path: Path, experts: int) -> dict[str, SourceTensor]:
    """The matrix or vector of a tensor by its name, or those of the experts that it holds."""
    format = _format(tensor, path)
    stacked = of_gguf(tensor.name, tensor.shape, tensor.data, experts, str(path))
    if stacked is not None:
        name, shape, parts = stacked
        return {
            name.format(i): SourceTensor(path, told, shape, format, data)
            for i, (told, data) in enumerate(parts)
        }
    if len(tensor.shape) > 2:
        raise Unsupported(
            f"tensor '{shown(tensor.name)}' has {len(tensor.shape)} dimensions; stacked weights "
            "are not supported, but for those of experts",
            str(path),
        )
    name = renamed_gguf(tensor.name) if experts else tensor.name
    return {name: SourceTensor(path, tensor.name, tensor.shape, format, tensor.data)}


def _format(tensor: GgufTensor, path: Path) -> Format:
    try:
        return by_ggml_type(int(tensor.type))
    except Unsupported as error:
        raise Unsupported(
            f"tensor '{shown(tensor.name)}' is {tensor.type.name}: {error.message}", str(path)
        ) from None


def _config(family: Family, settings: Settings, sources: Mapping[str, SourceTensor]) -> ModelConfig:
    prefix = settings.text(Keys.General.ARCHITECTURE)
    where = settings.where
    defaults = {f"{prefix}.{key}": value for key, value in family.gguf_defaults.items()}
    s = Settings({**defaults, **settings.values}, where)

    def key(template: str) -> str:
        return template.format(arch=prefix)

    d_model = s.integer(key(Keys.LLM.EMBEDDING_LENGTH))
    n_layers = s.integer(key(Keys.LLM.BLOCK_COUNT))
    n_heads = _uniform(s, key(Keys.Attention.HEAD_COUNT))
    n_kv_heads = _uniform(s, key(Keys.Attention.HEAD_COUNT_KV), n_heads)
    if key(Keys.Attention.KEY_LENGTH) not in s and d_model % n_heads:
        raise BadInput(f"{n_heads} heads do not divide the width {d_model} evenly", where)
    head_dim = s.integer(key(Keys.Attention.KEY_LENGTH), d_model // n_heads)
    if s.integer(key(Keys.Attention.VALUE_LENGTH), head_dim) != head_dim:
        raise Unsupported("values of another head dimension than keys are not supported", where)
    vocab_size = _vocab_size(s, key(Keys.LLM.VOCAB_SIZE), sources)
    max_position = s.integer(key(Keys.LLM.CONTEXT_LENGTH))
    rope = _rope(family, s, key, sources, head_dim)
    window = s.integer(key(Keys.Attention.SLIDING_WINDOW), 0, low=0)
    if n_layers > len(sources):
        raise s.bad(key(Keys.LLM.BLOCK_COUNT), f"at most the {len(sources)} tensors of the file")
    sliding = _sliding(family, s, key(Keys.Attention.SLIDING_WINDOW_PATTERN), n_layers)
    local_base = s.number(key(_FREQ_BASE_SWA), family.local_rope_base or rope.base, low=1e-6)
    wide = n_layers in family.wide_query_layers
    d_ff = _uniform(s, key(Keys.LLM.FEED_FORWARD_LENGTH))
    config = ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        experts=_experts(family, s, key, d_ff),
        sinks=family.sinks,
        norm_eps=s.number(key(Keys.Attention.LAYERNORM_RMS_EPS), low=1e-12, high=1.0),
        max_position=max_position,
        rope=rope,
        local_rope=None
        if local_base == rope.base and family.local_rope_base is None
        else RopeConfig(local_base, family.gguf_rope, rope.rotary_dim),
        attn_scale=s.number(
            key(Keys.Attention.SCALE), (d_model / n_heads if wide else head_dim) ** -0.5, low=1e-6
        ),
        activation=family.activation,
        window=window if any(sliding) else 0,
        sliding_layers=sliding if window else (),
        attn_softcap=s.number(key(Keys.LLM.ATTN_LOGIT_SOFTCAPPING), 0.0),
        final_softcap=s.number(key(Keys.LLM.FINAL_LOGIT_SOFTCAPPING), 0.0),
        embedding_scale=math.sqrt(d_model) if family.embedding_scaled else 1.0,
        tied_embeddings="output.weight" not in sources,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        bos_id=s.token(Keys.Tokenizer.BOS_ID, vocab_size),
        eos_ids=_end_tokens(s, vocab_size),
    )
    config.check(where)
    return config


def _experts(
    family: Family, s: Settings, key: Callable[[str], str], d_ff: int
) -> ExpertsConfig | None:
    """The mixture of experts of a family that has one."""
    mixture = family.mixture
    if mixture is None:
        return None
    normalized = s.flag(key(Keys.LLM.EXPERT_WEIGHTS_NORM), True)
    return ExpertsConfig(
        count=s.integer(key(Keys.LLM.EXPERT_COUNT)),
        used=s.integer(key(Keys.LLM.EXPERT_USED_COUNT)),
        d_ff=s.integer(key(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH), d_ff),
        softmax="chosen" if normalized else "all",
        act=mixture.act or family.activation,
        alpha=mixture.alpha,
        limit=mixture.limit,
    )


def _uniform(s: Settings, key: str, default: int | None = None) -> int:
    """A number, or an array of one number a layer, which must all be equal."""
    value = s.values.get(key)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or not value.size or (value != value[0]).any():
            raise Unsupported(f"'{key}' differs between layers, which is not supported", s.where)
        s = Settings({key: int(value[0])}, s.where)
    return s.integer(key) if default is None else s.integer(key, default)


def _vocab_size(s: Settings, key: str, sources: Mapping[str, SourceTensor]) -> int:
    """The announced size; it must agree with the token list. Without both: the embedding's rows."""
    embedding = sources.get("token_embd.weight")
    if embedding is None:
        raise BadInput("tensor 'token_embd.weight' is missing", s.where)
    tokens = s.values.get(Keys.Tokenizer.LIST)
    if tokens is None:
        return s.integer(key, embedding.shape[0])
    if not isinstance(tokens, list) or not tokens:
        raise s.bad(Keys.Tokenizer.LIST, "a list of strings")
    announced = s.integer(key, len(tokens))
    if announced != len(tokens):
        raise BadInput(
            f"'{key}' is {announced} but the tokenizer has {len(tokens)} tokens", s.where
        )
    return announced


def _end_tokens(s: Settings, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a generation: end of text, of turn, of message."""
    found = (
        s.token(key, vocab_size)
        for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    )
    return tuple(dict.fromkeys(t for t in found if t is not None))


def _sliding(family: Family, s: Settings, key: str, n_layers: int) -> tuple[bool, ...]:
    """Which layers use the window: by the file's flags or period, or by the family's period."""
    pattern = s.values.get(key)
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != np.bool_ or len(pattern) < n_layers:
            raise s.bad(key, f"{n_layers} flags")
        return tuple(bool(x) for x in pattern[:n_layers])
    return sliding_layers(n_layers, s.integer(key, family.window_period))


def _rope(
    family: Family,
    s: Settings,
    key: Callable[[str], str],
    sources: Mapping[str, SourceTensor],
    head_dim: int,
) -> RopeConfig:
    rotary_dim = s.integer(key(Keys.Rope.DIMENSION_COUNT), head_dim)
    kind = s.text(key(Keys.Rope.SCALING_TYPE), "linear")
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise Unsupported(
            f"rope scaling '{shown(kind)}' is not supported; known are linear, llama3, longrope "
            "and yarn",
            s.where,
        )
    # The key of files from before there were several kinds of scaling.
    legacy = s.number(key("{arch}.rope.scale_linear"), 1.0)
    factor = s.number(key(Keys.Rope.SCALING_FACTOR), legacy) if kind == "linear" else 1.0
    if 0.0 < factor < 1e-3:
        raise s.bad(key(Keys.Rope.SCALING_FACTOR), "a number of at least 0.001")
    short, long = (
        _factors(sources, _ROPE_SHORT, rotary_dim),
        _factors(sources, _ROPE_LONG, rotary_dim),
    )
    if (short is None) != (long is None):
        raise BadInput(f"only one of '{_ROPE_SHORT}' and '{_ROPE_LONG}' is there", s.where)
    rope = RopeConfig(
        base=s.number(key(Keys.Rope.FREQ_BASE), 10000.0, low=1e-6),
        style=family.gguf_rope,
        rotary_dim=rotary_dim,
        position_scale=1.0 / factor if factor else 1.0,
        attn_factor=s.number(key(Keys.Rope.SCALING_ATTN_FACTOR), 1.0, low=1e-6),
        factors=short or _factors(sources, _ROPE_FREQS, rotary_dim),
        long_factors=long,
        original_context=s.integer(key(Keys.Rope.SCALING_ORIG_CTX_LEN)) if long else 0,
    )
    if kind != "yarn":
        return rope
    factor = s.number(key(Keys.Rope.SCALING_FACTOR), low=1e-3)
    return yarn(
        rope,
        factor,
        s.integer(key(Keys.Rope.SCALING_ORIG_CTX_LEN), s.values.get(key(Keys.LLM.CONTEXT_LENGTH))),
        fast=s.number(key(Keys.Rope.SCALING_YARN_BETA_FAST), 32.0, low=1e-3),
        slow=s.number(key(Keys.Rope.SCALING_YARN_BETA_SLOW), 1.0, low=1e-3),
        truncate=family.yarn_truncate,
        attn_factor=rope.attn_factor * yarn_attention(factor),
    )


def _factors(
    sources: Mapping[str, SourceTensor], name: str, rotary_dim: int
) -> tuple[float, ...] | None:
    """A tensor of ``rotary_dim/2`` frequency factors, None if the file has no such tensor."""
    source = sources.get(name)
    if source is None:
        return None
    where = str(source.file)
    if source.shape != (rotary_dim // 2,):
        raise BadInput(
            f"tensor '{name}' has the shape {list(source.shape)}, expected [{rotary_dim // 2}]",
            where,
        )
    loaded = TensorHandle(name, source, (0, source.shape[0])).load()
    assert isinstance(loaded, np.ndarray)
    return positive(loaded.tolist(), name, where)
