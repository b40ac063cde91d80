"""What is done to a language model before its matrices are rounded: changes that leave the function
as it is, and make it easier to quantize.

A product does not change if its input is divided by s, column by column, and the columns of its
matrix multiplied. The division is folded into what makes the input: the weight of a norm, the rows
of the matrix behind a gate or of the values of attention (AWQ, Lin et al. 2023; SmoothQuant, Xiao
et al. 2022). Nor does it change if all that goes through the residual stream is rotated (QuaRot,
Ashkboos et al. 2024): a rotation of random signs and a Hadamard matrix spreads outliers over all
columns. Matrices keep a note of what was folded into them (:class:`Folded`), and are computed when
they are loaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qigen.errors import Unsupported, UsageError
from qigen.formats.algebra import Array, Float32Array, Format
from qigen.formats.catalog import by_name
from qigen.formats.tensor import QuantizedTensor
from qigen.ir.graph import Constant, Graph, Node, Value, constant_shape, load_constant
from qigen.quantize.hessian import Statistics, check_memory, output_error
from qigen.quantize.rtn import quantize_rtn
from qigen.quantize.walk import Walk

SEQUENCES = 32
"""Calibration sequences that scales are searched over."""

_SEARCH_ROWS = 1024
"""Rows of a matrix that an AWQ search looks at."""


class Keeper(Protocol):
    """Where finished parts are kept (:class:`qigen.quantize.model.Store`)."""

    def get(self, name: str, /) -> tuple[dict[str, Array | QuantizedTensor], dict[str, Any]] | None:
        ...

    def put(self, name: str, data: Mapping[str, Array | QuantizedTensor],
            notes: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Folded:
    """The matrix ``origin`` [N, K] with its columns times ``columns`` [K], its rows times ``rows``
    [N], and then rotated: ``left`` (N) and ``right`` (K) say by what, from behind."""

    origin: Constant
    columns: Float32Array | None = None
    rows: Float32Array | None = None
    left: Rotation | None = None
    right: Rotation | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return constant_shape(self.origin)

    @property
    def format(self) -> Format:
        """Dense float32."""
        return by_name("f32")

    def load(self) -> Float32Array:
        """float32 [N, K]."""
        w = _dense(self.origin).astype(np.float32)  # a copy
        if self.columns is not None:
            w *= self.columns
        if self.rows is not None:
            w *= self.rows[:, None]
        if self.right is not None:
            w = self.right.apply(w)
        if self.left is not None:
            w = np.ascontiguousarray(self.left.apply(np.ascontiguousarray(w.T)).T)
        return w


def _dense(constant: Constant) -> Float32Array:
    data = load_constant(constant)
    dense = data.dequantize() if isinstance(data, QuantizedTensor) else data
    return dense.reshape(constant_shape(constant))


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix [size, size] that is the same for every slice of ``size`` columns."""

    size: int
    seed: int

    @property
    def matrix(self) -> Float32Array:
        """float32 [size, size]."""
        return _orthogonal(self.size, self.seed)

    def apply(self, x: Float32Array) -> Float32Array:
        """x [.., n size] with every slice of a row times the matrix."""
        turned: Float32Array = x.reshape(-1, self.size) @ self.matrix
        return turned.reshape(x.shape)


@functools.lru_cache(maxsize=8)
def _orthogonal(size: int, seed: int) -> Float32Array:
    """Random signs times a Hadamard matrix; where none is known, a random orthogonal matrix."""
    rng = np.random.default_rng([size, seed])
    h = hadamard(size)
    if h is None:
        q, r = np.linalg.qr(rng.standard_normal((size, size)))
        return np.ascontiguousarray(q * np.sign(np.diagonal(r)), np.float32)
    signs = rng.choice(np.array([-1.0, 1.0]), size)
    return np.ascontiguousarray(signs[:, None] * h / math.sqrt(size), np.float32)


def hadamard(n: int) -> npt.NDArray[np.float64] | None:
    """float64 [n, n] of -1 and 1 with orthogonal rows; None if no construction here has it.

    Kronecker products of Sylvester's matrix of 2 and those of Paley (1933) for primes.
    """
    if n == 1:
        return np.ones((1, 1))
    if n % 2:
        return None
    if n == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    found = _paley(n)
    if found is not None:
        return found
    for factor in sorted((f for f in range(2, n) if n % f == 0), key=lambda f: (f % 4 == 2, f)):
        first = _paley(factor) if factor > 2 else hadamard(2)
        rest = hadamard(n // factor) if first is not None else None
        if first is not None and rest is not None:
            return np.kron(first, rest).astype(np.float64)
    return None


def _paley(n: int) -> npt.NDArray[np.float64] | None:
    """Paley's matrices of order q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4), q a prime."""
    for q, twice in ((n - 1, False), (n // 2 - 1, True)):
        if q % 4 != (1 if twice else 3) or any(q % f == 0 for f in range(2, math.isqrt(q) + 1)):
            continue
        squares = np.zeros(q)
        squares[list({i * i % q for i in range(1, q)})] = 2
        residue = squares - 1
        residue[0] = 0
        jacobsthal = residue[np.subtract.outer(np.arange(q), np.arange(q)) % q]
        s = np.zeros((q + 1, q + 1))
        s[1:, 1:] = jacobsthal
        s[0, 1:] = 1
        s[1:, 0] = 1 if twice else -1
        if not twice:
            return s + np.eye(q + 1)
        doubled = np.kron(s, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
        return doubled.astype(np.float64)
    return None


@dataclass
class Task:
    """A model on its way: ``graph`` is changed in place, ``formats`` name the matrices that may be
    (and what they will come to), ``sequences`` int32 [S, T] are what it is calibrated on."""

    graph: Graph
    formats: Mapping[str, Format]
    sequences: npt.NDArray[np.int32] | None
    memory: int
    store: Keeper
    report: Callable[[str, int, int], None]

    def fold(self, name: str, **changes: Any) -> None:
        """Change a matrix as :class:`Folded` does, or a vector (``columns``, ``left``)."""
        data = self.graph.constants[name]
        if len(constant_shape(data)) == 1:
            vector = _dense(data).astype(np.float32)
            if "columns" in changes:
                vector = vector * changes["columns"]
            if "left" in changes:
                vector = changes["left"].apply(vector[None])[0]
            self.graph.constants[name] = vector
        else:
            self.graph.constants[name] = Folded(data, **changes)
        self.graph.values[name] = replace(self.graph.values[name], dtype="f32")


Preparation = Callable[..., None]
"""Changes a :class:`Task`; its keyword-only arguments are options."""


# -- scales ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """A value ``x`` that products read, and where a scale of it can go.

    ``vector`` is the weight of the norm that makes it, or ``matrix`` (with its ``bias``) what its
    columns are rows of; ``heads`` (query heads, key heads, columns of a head) says that key heads
    are repeated.
    """

    x: str
    readers: tuple[str, ...]
    vector: str = ""
    matrix: str = ""
    bias: str = ""
    heads: tuple[int, int, int] | None = None


def _sites(task: Task) -> dict[str, _Site]:
    """The values whose scales can be folded exactly, by name."""
    graph = task.graph
    producers, consumers = graph.producers(), graph.consumers()
    found: dict[str, _Site] = {}
    for x, producer in producers.items():
        readers = consumers[x]
        if not readers or x in graph.outputs or not all(_product(n, graph) for n in readers):
            continue
        names = tuple(dict.fromkeys(n.inputs[1] for n in readers))
        if not set(names) <= set(task.formats):
            continue
        if any(len(consumers[name]) > 1 for name in names):
            continue
        if producer.op == "RMSNorm" and not producer.attrs["head_dim"]:
            weight = producer.inputs[1]
            if len(consumers[weight]) == 1:
                found[x] = _Site(x, names, vector=weight)
            continue
        heads = None
        if producer.op == "GatedAct":
            source = producers.get(producer.inputs[1])
        elif producer.op == "Attention":
            append = producers[producer.inputs[1]]
            source = producers.get(append.inputs[1])
            a = producer.attrs
            heads = a["n_heads"], a["n_kv_heads"], a["head_dim"]
        else:
            continue
        if source is None or not _product(source, graph) or len(consumers[source.output]) > 1:
            continue
        matrix = source.inputs[1]
        if matrix not in task.formats or len(consumers[matrix]) > 1:
            continue
        bias = source.inputs[2] if len(source.inputs) == 3 else ""
        found[x] = _Site(x, names, matrix=matrix, bias=bias, heads=heads)
    return found


def _product(node: Node, graph: Graph) -> bool:
    return node.op == "MatMul" and graph.is_constant(node.inputs[1])


def _shared(site: _Site, values: Float32Array) -> Float32Array:
    """What is known of the columns of ``x``, the same for all query heads of a key head."""
    if site.heads is None:
        return values
    n, kv, size = site.heads
    mean = values.reshape(kv, n // kv, size).max(axis=1, keepdims=True)
    return np.ascontiguousarray(np.broadcast_to(mean, (kv, n // kv, size)).reshape(-1))


def _divide(task: Task, site: _Site, scale: Float32Array) -> None:
    """Fold a division of ``x`` by ``scale``, and what makes up for it, into the neighbours."""
    for name in site.readers:
        task.fold(name, columns=scale)
    if site.vector:
        task.fold(site.vector, columns=1 / scale)
        return
    rows = 1 / scale
    if site.heads is not None:
        n, kv, size = site.heads
        rows = np.ascontiguousarray(rows.reshape(kv, n // kv, size)[:, 0].reshape(-1))
    task.fold(site.matrix, rows=rows)
    if site.bias:
        task.fold(site.bias, columns=rows)


def _scaled(task: Task, name: str, sites: Mapping[str, _Site],
            scale: Callable[[_Site, Sequence[str], Statistics], Float32Array]) -> None:
    """Walk through the model as it is, find a scale for every site and fold them all."""
    if task.sequences is None:
        raise UsageError(f"method {name} needs calibration data; give a text, or take method clip "
                         "or rtn")
    chosen = np.linspace(0, len(task.sequences) - 1, min(SEQUENCES, len(task.sequences)))
    walk = Walk(task.graph.copy(), task.sequences[chosen.astype(np.intp)], memory=task.memory)
    left = set(sites)
    found: dict[str, Float32Array] = {}
    task.report("prepare", 0, len(sites))
    for number, segment in enumerate(walk.segments):
        mine = [x for x in segment.takes if x in left]
        key = f"{name}-{number:04}"
        kept = task.store.get(key) if mine else None
        if kept is not None and set(mine) <= set(kept[0]):
            found |= {x: np.asarray(kept[0][x], np.float32) for x in mine
                      if not isinstance(kept[0][x], QuantizedTensor)}
        elif mine:
            for x in mine:  # one after the other: a Hessian each
                width = task.graph.values[x].shape[-1]
                assert isinstance(width, int)
                check_memory(width, task.memory, x)
                statistics = Statistics.empty(width)
                walk.run(segment, {x: lambda _, value, s=statistics: s.add(value)},  # type: ignore[misc]
                         advance=False)
                found[x] = scale(sites[x], sites[x].readers, statistics)
            task.store.put(key, {x: found[x] for x in mine}, {})
        left -= set(mine)
        task.report("prepare", len(found), len(sites))
        if not left:
            break
        walk.run(segment)
    for x, s in found.items():
        _divide(task, sites[x], s)


def _normalized(scale: Float32Array) -> Float32Array:
    """With a geometric mean of the extremes of 1, and within what f16 scales bear."""
    scale = np.maximum(scale, 1e-4)
    scale = scale / np.sqrt(scale.max() * scale.min())
    return np.clip(scale, 2.0**-8, 2.0**8).astype(np.float32)


def awq(task: Task, *, grid: int = 16) -> None:
    """Scales s = mean|x|^a for every product's input, with the a in [0, 1] of ``grid`` steps whose
    rounded matrices change the output least (AWQ). a = 0 is one of them."""
    if grid < 1:
        raise UsageError("method awq needs a grid of at least 1 step")
    graph = task.graph

    def scale(site: _Site, readers: Sequence[str], statistics: Statistics) -> Float32Array:
        hessian = statistics.hessian
        magnitude = _shared(site, statistics.mean_magnitude)
        weights = []
        for name in readers:
            w = _dense(graph.constants[name])
            weights.append(np.ascontiguousarray(w[:: -(-len(w) // _SEARCH_ROWS)]))
        best: tuple[float, Float32Array] | None = None
        for step in range(grid):
            s = _normalized(magnitude ** np.float32(step / grid))
            error = 0.0
            for name, w in zip(readers, weights, strict=True):
                rounded = quantize_rtn(w * s, task.formats[name]).dequantize()
                rounded /= s
                error += output_error(w, rounded, hessian)[0] * len(w)
            if best is None or error < best[0]:
                best = error, s
        assert best is not None
        return best[1]

    _scaled(task, "awq", _sites(task), scale)


def smoothquant(task: Task, *, alpha: float = 0.5) -> None:
    """Scales s = max|x|^alpha / max|w|^(1 - alpha) of every column, folded into norms, so that
    activations can be rounded to int8 (SmoothQuant)."""
    if not 0 <= alpha <= 1:
        raise UsageError("method smoothquant needs 0 <= alpha <= 1")
    graph = task.graph

    def scale(site: _Site, readers: Sequence[str], statistics: Statistics) -> Float32Array:
        largest = np.maximum(statistics.largest, 1e-5)
        weights = np.max([np.abs(_dense(graph.constants[n])).max(axis=0) for n in readers], axis=0)
        return _normalized(largest**alpha / np.maximum(weights, 1e-5) ** (1 - alpha))

    norms = {x: site for x, site in _sites(task).items() if site.vector}
    _scaled(task, "smoothquant", norms, scale)


# -- rotation --------------------------------------------------------------------------------------


def rotate(task: Task, *, seed: int = 0) -> None:
    """Rotate the residual stream, and the values of every attention head (QuaRot, what of it is
    offline). The weights of norms go into the matrices behind them.

    Where the table of embeddings is also the head it stays as it is, and the stream is turned
    behind it and back in front of the last norm, by a product of its own each. Unsupported, naming
    the node, for a model whose stream is not made of norms, products and sums alone.
    """
    graph = task.graph
    stream = _stream(graph)
    size = graph.values[stream.start].shape[-1]
    assert isinstance(size, int)
    turn = Rotation(size, seed)
    tables = {stream.table} | set(stream.heads)
    tied = stream.table in stream.heads
    turned = {*stream.readers, *stream.writers, *(set() if tied else tables)}
    missing = sorted(turned - set(task.formats))
    if missing:
        raise UsageError("it is kept as it is, and a rotation changes it; take it out of --keep",
                         missing[0])
    for norm, names in stream.norms.items():
        weight = _dense(graph.constants[norm])
        for name in names:
            task.fold(name, columns=weight)
        graph.constants[norm] = np.ones_like(weight, np.float32)
        graph.values[norm] = replace(graph.values[norm], dtype="f32")
    for name in stream.readers:
        task.fold(name, right=turn)
    for name in stream.writers:
        task.fold(name, left=turn)
    for name in stream.biases:
        task.fold(name, left=turn)
    if tied:
        _turn_between(graph, stream, turn)
    else:
        last = _dense(graph.constants[stream.last_norm])
        for name in stream.heads:
            task.fold(name, columns=last)
            task.fold(name, right=turn)
        graph.constants[stream.last_norm] = np.ones_like(last, np.float32)
        task.fold(stream.table, right=turn)
    for site in _sites(task).values():
        if site.heads is None or not site.matrix:
            continue
        head = Rotation(site.heads[2], seed)
        task.fold(site.matrix, left=head)
        if site.bias:
            task.fold(site.bias, left=head)
        for name in site.readers:
            task.fold(name, right=head)


@dataclass
class _Stream:
    """The residual stream: it starts at the embeddings and ends at the last norm.

    ``norms`` are the weights of norms and the matrices behind them, ``readers`` all those,
    ``writers`` (with ``biases``) the matrices whose products are added; ``heads`` the matrices
    behind the last norm, whose input is ``end``.
    """

    start: str
    table: str
    norms: dict[str, list[str]] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    last_norm: str = ""
    end: str = ""


def _stream(graph: Graph) -> _Stream:
    """Follow the stream; Unsupported, naming the node, for what a rotation does not go through."""

    def refuse(node: Node, why: str) -> Unsupported:
        return Unsupported(f"a rotation does not go through it: {why}; leave method hadamard out",
                           node.name)

    first = [n for n in graph.nodes if n.op == "Embedding"]
    if len(first) != 1:
        raise Unsupported("the model has no table of embeddings that a residual stream starts at; "
                          "leave method hadamard out", graph.name)
    consumers = graph.consumers()
    found = _Stream(first[0].output, first[0].inputs[1])
    inside = {found.start}
    norms = [n for n in graph.nodes if n.op == "RMSNorm" and not n.attrs["head_dim"]]
    producers = graph.producers()
    for node in graph.nodes:
        touched = [name for name in node.inputs if name in inside]
        if not touched:
            continue
        if node.op == "SelectRows":
            inside.add(node.output)
        elif node.op == "Add":
            for name in set(node.inputs) - inside:
                source = producers.get(name)
                if source is None or not _product(source, graph) or len(consumers[name]) > 1:
                    raise refuse(node, "what is added is no product of its own")
                if len(consumers[source.inputs[1]]) > 1:
                    raise refuse(node, "its matrix is used twice")
                found.writers.append(source.inputs[1])
                found.biases += source.inputs[2:3]
            inside.add(node.output)
        elif node in norms:
            readers = consumers[node.output]
            if not readers or not all(_product(n, graph) for n in readers):
                raise refuse(node, "its result goes to something other than products")
            names = list(dict.fromkeys(n.inputs[1] for n in readers))
            if len(consumers[node.inputs[1]]) > 1:
                raise refuse(node, "its weight is used twice")
            if set(names) & {found.table} or any(n.layer is None for n in readers):
                found.heads, found.last_norm, found.end = names, node.inputs[1], node.inputs[0]
            else:
                found.norms[node.inputs[1]] = names
                found.readers += names
        else:
            raise refuse(node, f"it is {node.op}")
    return found


def _turn_between(graph: Graph, stream: _Stream, turn: Rotation) -> None:
    """Two products that turn the stream behind its start, and back in front of its last norm."""
    there = graph.add_constant(f"{stream.table}/turn", np.ascontiguousarray(turn.matrix.T))
    back = graph.add_constant(f"{stream.table}/turn_back", turn.matrix)
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        last = node.op == "RMSNorm" and node.inputs[1] == stream.last_norm
        if last:
            turned = _inserted(graph, nodes, stream.end, back, node.layer)
            node = replace(node, inputs=[turned, node.inputs[1]])
        else:
            node = replace(node, inputs=[renamed.get(name, name) for name in node.inputs])
        nodes.append(node)
        if stream.start in node.outputs:
            renamed[stream.start] = _inserted(graph, nodes, stream.start, there, node.layer)
    graph.nodes = nodes


def _inserted(graph: Graph, nodes: list[Node], x: str, matrix: str, layer: int | None) -> str:
    name = f"{x}/turned"
    nodes.append(Node("MatMul", name, [x, matrix], [name], {}, layer))
    graph.values[name] = Value(name, graph.values[x].shape, "f32")
    return name
