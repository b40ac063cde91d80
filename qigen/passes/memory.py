"""Static memory plan of the activations of one step: an offset in one arena for every value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qigen.errors import BadInput
from qigen.ir import dims
from qigen.ir.graph import Graph, Node, Value

ALIGNMENT = 64
"""Bytes; offsets and rows are multiples of it, so that every row starts a cache line."""

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Where the activations of a step lie.

    ``offsets``: bytes from the start of the arena, multiples of 64. ``sizes``: bytes of a value for
    the largest step. ``row_floats``: distance between rows of a value in floats, a multiple of 16.
    ``aliases``: result -> the input whose memory it takes over (it has the same offset).
    ``lower_bound_bytes``: the most bytes that are live at one time, ``peak_node`` when that is.
    Graph inputs and outputs lie outside of the arena, in buffers of the caller.
    """

    offsets: dict[str, int]
    sizes: dict[str, int]
    row_floats: dict[str, int]
    aliases: dict[str, str]
    arena_bytes: int
    lower_bound_bytes: int
    peak_node: str
    max_tokens: int
    max_rows: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``json.dumps`` accepts."""
        return dataclasses.asdict(self)


@dataclass
class Buffer:
    """Memory of one value, or of several that take it over from each other, while it is live."""

    values: list[str]
    size: int
    first: int  # index of the node that writes it first
    last: int  # index of the node that reads it last
    offset: int = 0

    def meets(self, other: Buffer) -> bool:
        return self.first <= other.last and other.first <= self.last


def row_floats(columns: int) -> int:
    """Floats from one row of ``columns`` numbers to the next: rounded up to a cache line."""
    per_line = ALIGNMENT // _FLOAT_BYTES
    return -(-columns // per_line) * per_line


def in_place_input(node: Node) -> str | None:
    """The input whose memory the only result may take: it is read and written number by number."""
    if node.op == "MatMulGroup" and node.attrs["epilogue"] == "add":
        candidate = node.inputs[-1]
    elif node.op in ("NormAdd", "GatedAct", "RoutedExperts"):
        candidate = node.inputs[0]
    else:
        return None
    return candidate if node.inputs.count(candidate) == 1 else None


def plan_memory(graph: Graph, max_tokens: int, max_rows: int | None = None) -> MemoryPlan:
    """Plan the arena for steps of at most ``max_tokens`` tokens and ``max_rows`` logits rows.

    ``max_rows`` defaults to ``max_tokens``. Buffers are placed one after the other, each in the
    smallest gap between those live at the same time: largest first; again by size times lifetime,
    which suits a residual stream; and again in the order of use. The smallest arena wins. Raises
    BadInput for dimensions other than T and R, and for a limit below 1.
    """
    max_rows = max_tokens if max_rows is None else max_rows
    if max_tokens < 1 or max_rows < 1:
        raise BadInput("max_tokens and max_rows must be at least 1", graph.name)
    bounds = {"T": max_tokens, "R": max_rows}
    external = {*graph.inputs, *graph.outputs, *graph.constants}
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    strides: dict[str, int] = {}
    sizes: dict[str, int] = {}
    aliases: dict[str, str] = {}
    owner: dict[str, Buffer] = {}
    buffers: list[Buffer] = []
    for i, node in enumerate(graph.nodes):
        for name in node.outputs:
            value = graph.values[name]
            if name in external or value.dtype == "kv":
                continue
            rows, columns = _extent(value, bounds)
            strides[name] = row_floats(columns)
            sizes[name] = rows * strides[name] * _FLOAT_BYTES
            last = last_use.get(name, i)
            source = in_place_input(node)
            if source is not None and source in owner and last_use[source] == i:
                buffer = owner[source]
                aliases[name] = source
                buffer.values.append(name)
                buffer.last = last
            else:
                buffer = Buffer([name], sizes[name], i, last)
                buffers.append(buffer)
            owner[name] = buffer
    live = [sum(b.size for b in buffers if b.first <= i <= b.last) for i in range(len(graph.nodes))]
    peak = max(range(len(live)), key=live.__getitem__, default=-1)
    buffers, arena_bytes = place(buffers)
    offsets = {name: buffer.offset for buffer in buffers for name in buffer.values}
    return MemoryPlan(
        offsets={name: offsets[name] for name in sizes},
        sizes=sizes,
        row_floats=strides,
        aliases=aliases,
        arena_bytes=arena_bytes,
        lower_bound_bytes=live[peak] if live else 0,
        peak_node=graph.nodes[peak].name if live else "",
        max_tokens=max_tokens,
        max_rows=max_rows,
    )


def _extent(value: Value, bounds: Mapping[str, int]) -> tuple[int, int]:
    """Rows and columns of the largest instance of a value."""
    if value.dtype != "f32" or len(value.shape) != 2:
        raise BadInput(f"{value} is no f32 matrix", value.name)
    rows, columns = value.shape
    if isinstance(columns, str):
        raise BadInput(f"{value} has rows of unknown length", value.name)
    if isinstance(rows, str):
        if rows not in bounds:
            raise BadInput(f"dimension '{rows}' has no bound; known are T and R", value.name)
        return bounds[rows], dims.whole(columns)
    return dims.whole(rows), dims.whole(columns)


_ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.first),
    lambda b: (-b.size * (b.last - b.first + 1), b.first),
    lambda b: (b.first, -b.size),
)


def place(buffers: list[Buffer]) -> tuple[list[Buffer], int]:
    """The buffers with offsets, and the bytes they take: the best of three orders (plan_memory)."""
    return min((_place(buffers, key) for key in _ORDERS), key=lambda p: p[1])


def _place(
    buffers: list[Buffer], order: Callable[[Buffer], tuple[int, ...]]
) -> tuple[list[Buffer], int]:
    """The buffers with offsets by best fit in the given order, and the bytes they take."""
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=order):
        end, best = 0, None
        for other in sorted((b for b in placed if b.meets(buffer)), key=lambda b: b.offset):
            gap = other.offset - end
            if gap >= buffer.size and (best is None or gap < best[0]):
                best = (gap, end)
            end = max(end, other.offset + other.size)
        offset = end if best is None else best[1]
        placed.append(dataclasses.replace(buffer, offset=offset))
        total = max(total, offset + buffer.size)
    return placed, total


def phases(graph: Graph, plan: MemoryPlan) -> list[list[Node]]:
    """The nodes in order, cut into phases: a barrier between phases makes the step correct.

    Threads may work on all nodes of a phase at once: none reads what another one writes, and none
    writes into memory that another one uses, be it for a different value.
    """
    result: list[list[Node]] = []
    for node in graph.nodes:
        if result and not any(_collide(plan, other, node) for other in result[-1]):
            result[-1].append(node)
        else:
            result.append([node])
    return result


def _collide(plan: MemoryPlan, a: Node, b: Node) -> bool:
    """Whether one node writes what the other one touches."""
    pairs = [(w, name) for w in a.outputs for name in (*b.inputs, *b.outputs)]
    pairs += [(name, w) for name in a.inputs for w in b.outputs]
    return any(_overlap(plan, first, second) for first, second in pairs)


def _overlap(plan: MemoryPlan, a: str, b: str) -> bool:
    if a not in plan.offsets or b not in plan.offsets:
        return a == b
    low, high = sorted((a, b), key=plan.offsets.__getitem__)
    return plan.offsets[high] < plan.offsets[low] + plan.sizes[low]
