"""Runs a graph with numpy: the reference that every kernel is compared with.

It is slow on purpose where that makes it plain. The options mimic, one by one, the roundings that
generated code makes: int8 activations, and a key/value cache of fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, UsageError
from qigen.formats.kv import BLOCK, KV_FORMATS, kv_format, round_block
from qigen.formats.tensor import QuantizedTensor, select_rows
from qigen.ir import schema
from qigen.ir.graph import Array, Graph, State, constant_shape, load_constant
from qigen.ir.ops.experts import expert_parts
from qigen.ir.ops.fused import group_parts

ACTIVATION_GROUP = 32
"""Numbers along K that share one scale in the int8 mode."""

_CHUNK_FLOATS = 1 << 22


def round_to_int8(x: Array, group: int = ACTIVATION_GROUP, top: int = 127,
                  apart: Array | None = None) -> Array:  # fmt: skip
    """``x [M,K]`` rounded as the integer kernels round activations, in the type of ``x``.

    Per row and ``group`` columns (the last group may be shorter): s = absmax/``top`` in float32,
    q = rint(x/s), result s*q; a group of zeros stays zero. The columns ``apart`` count by
    absmax/127 instead: with a ``top`` of 7 they keep 8 bits where the others have 4.
    """
    rows, k = x.shape
    groups = -(-k // group)
    padded = np.zeros((rows, groups * group), dtype=np.float32)
    padded[:, :k] = x
    parts = padded.reshape(rows, groups, group)
    scale = np.abs(parts).max(axis=-1, keepdims=True) / np.float32(127)
    if top != 127:
        kept = padded.copy()
        if apart is not None:
            kept[:, apart] = 0
        others = np.abs(kept.reshape(parts.shape)).max(axis=-1, keepdims=True) / np.float32(top)
        scale = np.maximum(scale, others)
    codes = np.rint(np.divide(parts, scale, out=np.zeros_like(parts), where=scale > 0))
    exact = scale.astype(x.dtype) * codes.astype(x.dtype)
    result: Array = exact.reshape(padded.shape)[:, :k]
    return result


class KvCache:
    """Keys and values of one attention layer, for one sequence.

    ``kind``: ``f32`` keeps the arithmetic's type, the others are rows of
    :mod:`qigen.formats.kv`: ``f16`` rounds to half precision, ``int8`` each head of each position
    to 8 bits with one float32 scale absmax/127, ``int4`` and ``int2`` blocks of positions that are
    older than a window.
    """

    def __init__(self, state: State, kind: str, dtype: np.dtype[Any]) -> None:
        self._state, self._dtype = state, dtype
        self._format = None if kind == "f32" else kv_format(kind)
        shape = (2, 0, state.n_kv_heads, state.head_dim)
        self._data = np.zeros(shape, dtype=dtype)  # what a window holds
        self._rounded_blocks = np.zeros(shape, dtype=dtype)
        self._sealed = 0

    def _rounded(self, x: Array) -> Array:
        heads = x.reshape(len(x), self._state.n_kv_heads, self._state.head_dim)
        if self._format is None:
            return heads
        if self._format.name == "int8":
            head_dim = self._state.head_dim
            rounded = round_to_int8(heads.reshape(-1, head_dim), head_dim)
            return rounded.reshape(heads.shape)
        return heads.astype(np.float16).astype(self._dtype)

    def _grown(self, data: Array, stop: int) -> Array:
        grown = np.zeros((2, max(64, 2 * stop), *data.shape[2:]), dtype=self._dtype)
        grown[:, : data.shape[1]] = data
        return grown

    def append(self, positions: Array, k: Array, v: Array) -> None:
        """Store ``k, v [T, n_kv_heads*head_dim]`` at ascending ``positions [T]``."""
        stop = int(positions.max(initial=-1)) + 1
        if stop > self._data.shape[1]:
            self._data = self._grown(self._data, stop)
            self._rounded_blocks = self._grown(self._rounded_blocks, stop)
        self._data[0, positions] = self._rounded(k)
        self._data[1, positions] = self._rounded(v)
        if self._format is None or not self._format.window or not len(positions):
            return
        first, end = (int(n) for n in self._format.sealed(positions[[0, -1]]))
        # blocks that the first query sees rounded and that have been, are; what lies behind them
        # has lost what it was and goes on as what its codes say
        again = min(self._sealed, first)
        lost = slice(again * BLOCK, min(self._sealed * BLOCK, int(positions[0])))
        old = self._rounded_blocks[:, lost].astype(np.float16)
        self._data[:, lost] = old
        for block in range(again, end):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            if block < self._format.first:  # stays as it is
                self._rounded_blocks[:, place] = self._data[:, place]
                continue
            keys, values = round_block(self._data[0, place], self._data[1, place], self._format)
            self._rounded_blocks[0, place] = keys.dequantize().reshape(self._data[0, place].shape)
            dense = values.dequantize().reshape(BLOCK, self._state.n_kv_heads, -1)
            self._rounded_blocks[1, place] = dense[..., : self._state.head_dim]
        self._sealed = end

    def sealed(self, positions: Array) -> Array:
        """Blocks of :data:`~qigen.formats.kv.BLOCK` positions that each query sees rounded."""
        if self._format is None:
            return np.zeros(len(positions), dtype=np.int64)
        return self._format.sealed(positions)

    def read(self, stop: int, sealed: int = 0) -> tuple[Array, Array]:
        """Keys and values ``[stop, n_kv_heads, head_dim]``, the first ``sealed`` blocks rounded."""
        border = sealed * BLOCK
        if not border:
            return self._data[0, :stop], self._data[1, :stop]
        both = np.concatenate(
            [self._rounded_blocks[:, :border], self._data[:, border:stop]], axis=1
        )
        return both[0], both[1]


class Interpreter:
    """Runs the steps of one sequence.

    ``dtype``: float32, or float64 for an exact reference. ``activations``: ``f32``, or ``int8``
    (``int4``), which rounds the x of every product with a quantized weight (not with f32, f16 or
    bf16 ones) as :func:`round_to_int8` does; with ``-token`` a row has one scale. Columns that a
    weight keeps apart are so for all weights that read the same 4-bit x. ``kv``: see
    :class:`KvCache`. ``cache_bytes`` bounds the float32
    matrices that are kept; others are dequantized in chunks of rows at every use.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        dtype: npt.DTypeLike = np.float32,
        activations: str = "f32",
        kv: str = "f32",
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if self.dtype.name not in ("float32", "float64"):
            raise UsageError(f"dtype must be float32 or float64, not {self.dtype.name}")
        if activations not in ("f32", "int8", "int8-token", "int4", "int4-token"):
            raise UsageError("activations must be f32, int8, int8-token, int4 or int4-token, not "
                             f"{activations}")  # fmt: skip
        if kv not in ("f32", *KV_FORMATS):
            raise UsageError(f"kv must be f32 or one of {', '.join(KV_FORMATS)}, not {kv}")
        self.graph = graph
        self.position = 0
        self._integer = activations != "f32"
        self._top = 7 if activations.startswith("int4") else 127
        self._token_scale = activations.endswith("-token")
        self._readers = _readers(graph)
        self._apart: dict[tuple[str, ...], Array] = {}
        self._kv_kind = kv
        self._room = cache_bytes
        self._dense: dict[str, Array] = {}
        self._loaded: dict[str, Array | QuantizedTensor] = {}
        self._kv: dict[str, KvCache] = {}
        self._tables = {node.inputs[1] for node in graph.nodes if node.op == "Embedding"}
        self._last_use = {n: i for i, node in enumerate(graph.nodes) for n in node.inputs}
        self.reset()

    def reset(self) -> None:
        """Forget the sequence: empty caches, position 0."""
        self.position = 0
        self._kv = {
            s.name: KvCache(s, self._kv_kind, self.dtype) for s in self.graph.states.values()
        }

    def rewind(self, position: int) -> None:
        """Go on from an earlier position; what was cached from there on is overwritten. What a
        cache of 4 or 2 bits has rounded already stays so."""
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}; the position is {self.position}")
        self.position = position

    def step(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """Run one step.

        ``inputs``: ``input_ids [T]`` and, where the graph has it, ``rows [R]`` (default: the last
        token's row). ``positions`` is filled in from the sequence's position. Returns every graph
        output by name, for a language model ``{'logits': [R,V]}``. BadInput for names, shapes, ids
        or rows that do not fit.
        """
        graph = self.graph
        given = {name: _integers(name, x) for name, x in inputs.items()}
        if "input_ids" not in given or given["input_ids"].ndim != 1 or not len(given["input_ids"]):
            raise BadInput("a step needs input_ids, a vector of at least one token", graph.name)
        tokens = len(given["input_ids"])
        positions = np.arange(self.position, self.position + tokens, dtype=np.int32)
        values: dict[str, Array] = {
            "positions": positions,
            "rows": np.array([tokens - 1], dtype=np.int32),
            **given,
        }
        unknown = set(given) - set(graph.inputs)
        missing = set(graph.inputs) - set(values)
        if unknown or missing:
            raise BadInput(f"inputs must be {graph.inputs}, got {sorted(given)}", graph.name)
        if "positions" in given:
            raise BadInput("positions come from the sequence; leave them out", graph.name)
        rows = values["rows"]
        if rows.ndim != 1 or (rows.size and not 0 <= rows.min() <= rows.max() < tokens):
            raise BadInput(f"rows must be a vector of numbers from 0 to {tokens - 1}", graph.name)
        empty = np.empty(0, dtype=self.dtype)
        for index, node in enumerate(graph.nodes):
            arrays = [empty if graph.is_constant(n) else values[n] for n in node.inputs]
            results = schema.operator(node.op, node.name).reference(node, arrays, self)
            values.update(zip(node.outputs, results, strict=True))
            for name in node.inputs:
                if self._last_use[name] == index and name not in graph.outputs:
                    values.pop(name, None)
        self.position += tokens
        return {name: values[name] for name in graph.outputs}

    # -- what the operators ask for (schema.Evaluation) -------------------------------------------

    def kv(self, state: str) -> KvCache:
        """The cache of ``state``."""
        return self._kv[state]

    def _columns_apart(self, weight: str) -> Array | None:
        """The columns of 4-bit activations that the weight, or one beside it, keeps apart."""
        if self._top == 127:
            return None
        group = self._readers[weight]
        if group not in self._apart:
            lists = []
            for name in group:
                constant = self.graph.constants[name]
                if not isinstance(constant, np.ndarray) and constant.format.has("qc"):
                    data = load_constant(constant)
                    assert isinstance(data, QuantizedTensor)
                    lists.append(data.fields["qc"].reshape(-1))
            self._apart[group] = np.concatenate([np.zeros(0, np.uint16), *lists]).astype(np.intp)
        return self._apart[group]

    def _data(self, name: str) -> Array | QuantizedTensor:
        data = self._loaded.get(name)
        if data is None:
            data = self._loaded[name] = load_constant(self.graph.constants[name])
        return data

    def vector(self, name: str) -> Array:
        """The constant ``name`` in the arithmetic's type, in its own shape."""
        data = self._data(name)
        dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
        return dense.reshape(constant_shape(self.graph.constants[name])).astype(self.dtype)

    def gather(self, table: str, rows: Array) -> Array:
        """Rows ``[len(rows), d]`` of a table; only these are dequantized."""
        data = self._data(table)
        n = constant_shape(data)[0]
        if rows.size and not 0 <= rows.min() <= rows.max() < n:
            raise BadInput(f"a token id is outside of 0..{n - 1}", table)
        if isinstance(data, np.ndarray):
            return data[rows].astype(self.dtype)
        fields = select_rows(data.format, data.fields, rows)
        picked = QuantizedTensor(data.format, (len(rows), data.shape[1]), fields)
        return picked.dequantize().astype(self.dtype)

    def matmul(self, x: Array, weight: str) -> Array:
        """``x [M,K]`` times the transpose of the dequantized ``weight [N,K]``."""
        constant = self.graph.constants[weight]
        n, k = constant_shape(constant)
        if self._integer and not isinstance(constant, np.ndarray) and constant.format.integer:
            group = k if self._token_scale else ACTIVATION_GROUP
            x = round_to_int8(x, group, self._top, self._columns_apart(weight))
        data: Array | QuantizedTensor | None = self._dense.get(weight)
        if data is None:
            data = self._data(weight)
            if isinstance(data, QuantizedTensor) and 4 * n * k <= self._room:
                self._room -= 4 * n * k
                data = self._dense[weight] = data.dequantize()
                if weight not in self._tables:
                    del self._loaded[weight]
        out = np.empty((len(x), n), dtype=self.dtype)
        step = max(1, _CHUNK_FLOATS // k)
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            chunk = (
                data.rows(part.start, part.stop).dequantize()
                if isinstance(data, QuantizedTensor)
                else data[part]
            )
            out[:, part] = x @ chunk.astype(self.dtype, copy=False).T
        return out


def _readers(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For every weight of a product, the weights that are multiplied by the same activations."""
    by_input: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "MatMul":
            by_input.setdefault(node.inputs[0], []).append(node.inputs[1])
        elif node.op == "MatMulGroup":
            by_input.setdefault(node.name, []).extend(group_parts(node).weights)
        elif node.op in ("Experts", "RoutedExperts"):
            for names in expert_parts(node).weights.values():
                by_input.update({name: [name] for name in names})
    return {name: tuple(names) for names in by_input.values() for name in names}


def _integers(name: str, x: npt.ArrayLike) -> Array:
    """An input as int32; BadInput if it is none (an empty list counts as integers)."""
    array = np.asarray(x)
    if array.size and array.dtype.kind not in "iu":
        raise BadInput(f"the input must be integers, not {array.dtype}", name)
    return array.astype(np.int32)
