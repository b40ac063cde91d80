"""A language model as it was read: configuration, tensors that load on demand, provenance.

The frontends make a :class:`LanguageModel`; :func:`qigen.frontends.build_graph` turns it into a
graph. Tensors have canonical names, those of GGUF (``blk.0.attn_q.weight``), whatever the
container called them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput
from qigen.formats.algebra import Format
from qigen.formats.blocks import from_blocks
from qigen.formats.tensor import QuantizedTensor, select_rows, validate

Bytes = npt.NDArray[np.uint8]


def map_file(path: Path) -> Bytes:
    """The bytes of a file, mapped read-only; BadInput if it cannot be read or is empty."""
    try:
        if not path.is_file():
            raise BadInput("there is no such file", str(path))
        if path.stat().st_size == 0:
            raise BadInput("the file is empty", str(path))
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", str(path)) from error


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: ``theta_i = pos * position_scale * base^(-2i/rotary_dim) / factors[i]``.

    ``factors`` (``rotary_dim/2`` numbers) is llama3's scaling or longrope's short list;
    ``long_factors`` replaces it in a model compiled for more than ``original_context`` positions.
    ``attn_factor`` multiplies cosine and sine.
    """

    base: float
    style: str  # 'interleaved': pairs (2i, 2i+1) | 'half': pairs (i, i + rotary_dim/2)
    rotary_dim: int
    position_scale: float = 1.0
    attn_factor: float = 1.0
    factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    original_context: int = 0

    def factors_for(self, max_seq: int) -> tuple[float, ...] | None:
        """The factors of a model that will see ``max_seq`` positions."""
        if self.long_factors is not None and max_seq > self.original_context:
            return self.long_factors
        return self.factors


@dataclass(frozen=True)
class ExpertsConfig:
    """The feed-forward parts of a mixture of experts: ``used`` of ``count`` experts, each ``d_ff``
    wide, compute a row. ``softmax``, ``act``, ``alpha`` and ``limit`` as in
    :mod:`qigen.ir.ops.experts`.
    """

    count: int
    used: int
    d_ff: int
    softmax: str = "chosen"
    act: str = "silu"
    alpha: float = 1.0
    limit: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a decoder-only language model that is not a weight."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    max_position: int
    rope: RopeConfig
    attn_scale: float
    activation: str  # 'silu' | 'gelu_tanh'
    local_rope: RopeConfig | None = None  # rope of the sliding layers where it differs (gemma3)
    window: int = 0  # 0: no sliding layers
    sliding_layers: tuple[bool, ...] = ()
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    tied_embeddings: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    experts: ExpertsConfig | None = None
    sinks: bool = False  # attention heads have a score without a value
    biases: tuple[str, ...] = ()  # the projections with a bias: 'attn_q', 'ffn_down', ...
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def untied_embeddings(self) -> bool:
        """Whether the output projection is a tensor of its own."""
        return not self.tied_embeddings

    @property
    def routed(self) -> bool:
        """Whether the feed-forward parts are mixtures of experts."""
        return self.experts is not None

    @property
    def dense(self) -> bool:
        """Whether every row goes through the same feed-forward part."""
        return self.experts is None

    def window_of(self, layer: int) -> int:
        """Attention window of a layer; 0 is none."""
        return self.window if self.sliding_layers and self.sliding_layers[layer] else 0

    def rope_of(self, layer: int) -> RopeConfig:
        """Rotary embedding of a layer."""
        if self.local_rope is not None and self.window_of(layer):
            return self.local_rope
        return self.rope

    def check(self, where: str) -> None:
        """BadInput naming the file if the numbers contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise BadInput(
                f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key/value heads",
                where,
            )
        if self.experts is not None and self.experts.used > self.experts.count:
            raise BadInput(
                f"{self.experts.used} experts are to compute a token, but there are "
                f"{self.experts.count}",
                where,
            )
        for rope in (self.rope, self.local_rope):
            if rope is not None and (rope.rotary_dim % 2 or rope.rotary_dim > self.head_dim):
                raise BadInput(
                    f"rotary dimension {rope.rotary_dim} must be even and at most the head "
                    f"dimension {self.head_dim}",
                    where,
                )

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain data for a manifest."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """A tensor as it lies in a file: ``data`` is a 1-D view of its mapped bytes.

    ``shape`` is row-major: ``(N, K)`` or ``(N,)``.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    format: Format
    data: Bytes

    def load(self, first: int, last: int) -> QuantizedTensor:
        """Rows ``[first, last)`` (of a vector the numbers, as one row) in their stored codes."""
        rows, columns = (last - first, self.shape[1]) if len(self.shape) == 2 else (1, last - first)
        if len(self.shape) == 1:
            size = self.data.size // self.shape[0]
            raw = self.data[first * size : last * size].reshape(1, -1)
        else:
            raw = self.data.reshape(self.shape[0], -1)[first:last]
        missing = -(-columns // self.format.block) * self.format.block_bytes - raw.shape[1]
        if missing:  # bf16 comes in pairs: an odd row gets a zero at its end
            raw = np.pad(raw, ((0, 0), (0, missing)))
        return from_blocks(self.format, raw, (rows, columns))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its codes, with scales and all that belongs to them."""
        return len(self.data)

    @property
    def columns(self) -> npt.NDArray[Any] | None:
        """Which column of the model's matrix each column is; None: column j is column j."""
        return None


@dataclass(frozen=True)
class TensorSource:
    """Where a canonical tensor comes from: rows ``rows[0] <= n < rows[1]`` of ``tensor``."""

    file: Path
    tensor: str
    rows: tuple[int, int]
    whole: bool  # all rows of the source tensor


@dataclass(frozen=True, eq=False)
class TensorHandle:
    """A tensor of the model that stays in its file until :meth:`load` is called.

    ``add`` is added to a vector when it is loaded (gemma's norms are stored minus one in Hugging
    Face folders). ``step``: only every so many of the rows belong to it (gpt-oss stores the rows of
    gate and up in turns).
    """

    name: str
    origin: SourceTensor
    rows: tuple[int, int]
    add: float = 0.0
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)`` in weights, or ``(N,)``."""
        return (-(-(self.rows[1] - self.rows[0]) // self.step), *self.origin.shape[1:])

    @property
    def format(self) -> Format:
        """Catalog row of the stored codes."""
        return self.origin.format

    @property
    def columns(self) -> npt.NDArray[Any] | None:
        """Which column of the model's matrix each column is (GPTQ's act-order); None: the same."""
        return self.origin.columns

    @property
    def source(self) -> TensorSource:
        """File, source tensor and row range."""
        return TensorSource(
            self.origin.file,
            self.origin.name,
            self.rows,
            self.rows == (0, self.origin.shape[0]) and self.step == 1,
        )

    def raw(self) -> Bytes:
        """The source's own bytes, mapped and not copied: uint8 ``[N, bytes of a row]``.

        A vector has a single row.
        """
        if len(self.shape) == 1:
            size = self.origin.data.size // self.origin.shape[0]
            numbers = self.origin.data.reshape(-1, size)[self.rows[0] : self.rows[1] : self.step]
            return numbers.reshape(1, -1)
        rows = slice(self.rows[0], self.rows[1], self.step)
        return self.origin.data.reshape(self.origin.shape[0], -1)[rows]

    def load(self) -> QuantizedTensor | npt.NDArray[np.float32]:
        """A matrix as QuantizedTensor ``[N, K]`` of its stored codes, a vector as float32 ``[N]``.

        Raises BadInput naming file and tensor if a scale or a dense number is not finite.
        """
        tensor = self.origin.load(*self.rows)
        validate(tensor, f"{self.origin.file}: {self.origin.name}")
        if len(self.shape) == 2:
            if self.step == 1:
                return tensor
            every = np.arange(0, tensor.shape[0], self.step)
            fields = select_rows(tensor.format, tensor.fields, every)
            return QuantizedTensor(tensor.format, (len(every), tensor.shape[1]), fields)
        numbers = tensor.dequantize()[0, :: self.step]
        vector: npt.NDArray[np.float32] = numbers + np.float32(self.add)
        return vector


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer is: ``container`` 'gguf' with the ``tokenizer.*`` metadata in ``fields``,
    or 'huggingface' with the folder in ``path``.
    """

    container: str
    path: Path
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelMetadata:
    """Provenance for the artifact's manifest."""

    name: str
    licence: str  # as the file states it, '' if it does not
    container: str  # 'gguf' | 'huggingface'
    path: Path
    files: tuple[Path, ...]  # all files with weights
    notes: tuple[str, ...] = ()  # what was left out or assumed, for the user

    def sha256(self) -> str:
        """SHA-256 of the files' contents, one after the other. Reads everything: call it once."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def to_json(self) -> dict[str, object]:
        """The manifest's ``source``. Reads all files for their checksum: call it once."""
        return {
            "path": str(self.path.resolve()),
            "container": self.container,
            "licence": self.licence,
            "sha256": self.sha256(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A language model that was read and checked: every tensor the graph needs is there, with the
    shape the configuration asks for. ``source_tensors`` are the container's own, by their names.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorHandle]
    tokenizer_source: TokenizerSource
    metadata: ModelMetadata
    source_tensors: Mapping[str, SourceTensor]

    def parameters(self) -> int:
        """Number of weights, tied embeddings counted once."""
        return sum(math.prod(handle.shape) for handle in self.tensors.values())
