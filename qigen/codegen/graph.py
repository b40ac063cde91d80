"""Lowering of tensor graphs: the program that ``templates/tensor/model.cpp.j2`` writes down.

Every node is one call of a function (:class:`qigen.ir.tensor.Call`). Decided here is where values
lie (in the caller's memory, in weights.bin, in the arena or, where only the run knows the size, on
the heap) and where the threads must wait for each other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qigen.codegen.lower import PackedTensor, align
from qigen.codegen.row_blocks import RowBlock, find_row_blocks
from qigen.errors import Unsupported
from qigen.ir import dims, schema
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.ops.graph import chain_inputs
from qigen.ir.tensor import (
    Alias,
    Argument,
    Call,
    Epilogue,
    Floats,
    Ints,
    Problem,
    Ref,
    Refs,
    RunInts,
    TensorOp,
    Word,
    fresh_names,
)
from qigen.ir.types import TYPES
from qigen.passes.memory import Buffer, place


@dataclass
class Storage:
    """Where the memory of one value, and of its aliases, lies."""

    kind: str  # "input", "weight", "buffer", "output", "heap" or "scratch" (of a row block)
    index: int
    bytes: Dim = 0
    first: int = 0  # the nodes that touch it
    last: int = 0
    constant: str = ""


@dataclass(frozen=True)
class Line:
    """A statement of the step, or a comment line, or a barrier."""

    kind: str  # "comment", "call", "tensor", "size", "wait", "result"
    text: str


@dataclass(frozen=True)
class Interface:
    """An input or output: name, number of its type, sizes (numbers; -1 - i for symbol i)."""

    name: str
    dtype: int
    shape: tuple[int, ...]

    @property
    def literal(self) -> str:
        """The name as a C++ string."""
        return json.dumps(self.name, ensure_ascii=False)


@dataclass
class GraphProgram:
    """All that the template of a graph model needs."""

    name: str
    isa: str
    abi: int
    cpu_features: str
    headers: tuple[str, ...]
    kernels: tuple[str, ...]  # declarations of functions in other translation units
    inputs: tuple[Interface, ...]
    outputs: tuple[Interface, ...]
    output_shapes: tuple[tuple[str, ...], ...]  # C++ expressions; "-1": only the run decides
    symbols: tuple[str, ...]
    symbol_names: tuple[str, ...]
    limits: tuple[int, ...]
    slots: int
    buffer_bytes: tuple[str, ...]  # C++ expressions
    lifetimes: tuple[tuple[int, int], ...] | None
    offsets: tuple[int, ...]
    lines: tuple[Line, ...]
    tensors: list[PackedTensor]
    arena_bytes: int
    lower_bound_bytes: int
    peak_node: str
    barriers: int
    arena_bytes_per_thread: int = 0
    weights_bytes: int = 0
    uid: bytes = bytes(32)
    symbol: str = "qigen_model_description"
    next: str = ""  # symbol of what a machine takes that lacks the features
    notes: tuple[str, ...] = ()


KernelLookup = Callable[[Node, Graph], "Call | Alias | None"]
"""The call of a node whose kernel is a translation unit of its own; None for all others."""


class GraphLowering:
    """Lowers a tensor graph; ``special`` gives the calls of nodes with generated kernels."""

    def __init__(self, graph: Graph, special: KernelLookup) -> None:
        self.graph = graph
        self.special = special
        self.calls: list[Call | Alias] = []
        self.storage: dict[str, Storage] = {}
        self.identifiers: dict[str, str] = {}
        self.slots = 0
        self.lines: list[Line] = []
        self.defined: set[str] = set()
        self.symbols = _input_symbols(graph)
        self.row_blocks: list[RowBlock] = []
        self.block: RowBlock | None = None  # which is written down now
        self.sliced: frozenset[str] = frozenset()  # values of which the node sees the block's rows

    # -- where values lie -------------------------------------------------------------------------

    def _root(self, name: str) -> str:
        while name in self._aliases:
            name = self._aliases[name]
        return name

    def place_values(self) -> list[Storage]:
        """Decide the storage of every value; returns the arena's buffers."""
        graph = self.graph
        self._aliases: dict[str, str] = {}
        for node in graph.nodes:
            call = self.special(node, graph)
            if call is None:
                operator = schema.operator(node.op, node.name)
                assert isinstance(operator, TensorOp), node.op
                call = operator.call(node, graph)
            if isinstance(call, Alias) and node.outputs[0] in graph.outputs:
                call = Call(
                    "tensor.h",
                    "copy_tensor",
                    (),
                    (
                        Ref(node.outputs[0]),
                        Ref(call.source),
                        TYPES[graph.values[node.outputs[0]].dtype].bytes,
                    ),
                )
            if isinstance(call, Alias):
                self._aliases[node.outputs[0]] = call.source
            self.calls.append(call)
        for i, name in enumerate(graph.inputs):
            self.storage[name] = Storage("input", i)
        last_use: dict[str, int] = {}
        for i, node in enumerate(graph.nodes):
            last_use.update((self._root(n), i) for n in (*node.inputs, *node.outputs) if n)
        self.row_blocks = self._find_row_blocks(last_use)
        scratch = {n for b in self.row_blocks for n in b.scratch}
        buffers: list[Storage] = []
        for i, node in enumerate(graph.nodes):
            for name in node.outputs:
                if name in scratch:
                    self.storage[name] = Storage("scratch", 0)
                elif name and name not in self._aliases:
                    self.storage[name] = self._in_place(node, name, i, last_use) or self._storage(
                        name, i, buffers
                    )
            for name in (*node.inputs, *node.outputs):
                root = self._root(name)
                if root in self.storage:
                    self.storage[root].last = i
        for block in self.row_blocks:  # its nodes take turns: all are at work from first to last
            for node in graph.nodes[block.first : block.last + 1]:
                for name in (*node.inputs, *node.outputs):
                    storage = self.storage.get(self._root(name))
                    if storage is not None:
                        storage.first = min(storage.first, block.first)
                        storage.last = max(storage.last, block.last)
        return buffers

    def _find_row_blocks(self, last_use: Mapping[str, int]) -> list[RowBlock]:
        graph = self.graph
        if any(isinstance(d, Sym) for v in graph.values.values() for d in v.shape):
            return []  # the arena is placed at run time
        shared = set(self._aliases) | set(self._aliases.values()) | set(graph.outputs)

        def is_private(name: str, first: int, last: int) -> bool:
            return name not in shared and first <= last_use[name] <= last

        return find_row_blocks(graph, is_private)

    def _in_place(
        self, node: Node, name: str, index: int, last_use: Mapping[str, int]
    ) -> Storage | None:
        """The memory of an input that the node reads element by element and nobody needs later."""
        graph = self.graph
        if name in graph.outputs:
            return None
        value = graph.values[name]
        roots = [self._root(n) for n in node.inputs]
        for candidate in in_place_inputs(node):
            root = self._root(candidate)
            storage = self.storage.get(root)
            if storage is None or storage.kind != "buffer" or last_use[root] != index:
                continue
            source = graph.values[candidate]
            same = source.shape == value.shape and source.dtype == value.dtype
            size = dims.product(graph.values[root].shape) * TYPES[graph.values[root].dtype].bytes
            if same and size == storage.bytes and roots.count(root) == 1:
                return storage
        return None

    def _storage(self, name: str, node: int, buffers: list[Storage]) -> Storage:
        value = self.graph.values[name]
        size = dims.product(value.shape) * TYPES[value.dtype].bytes
        known = not isinstance(size, Sym) or size.names() <= set(self.symbols)
        if name in self.graph.outputs:
            index = self.graph.outputs.index(name)
            if known:
                return Storage("output", index, size, node, node)
            return Storage("heap", self._slot(), size, node, node)
        if not known:
            return Storage("heap", self._slot(), size, node, node)
        storage = Storage("buffer", len(buffers), size, node, node)
        buffers.append(storage)
        return storage

    def _slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    # -- text -------------------------------------------------------------------------------------

    def identifier(self, name: str) -> str:
        """The C++ name of a value's tensor."""
        if name not in self.identifiers:
            base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[-48:]
            self.identifiers[name] = f"t{len(self.identifiers)}_{base}".rstrip("_")
        return self.identifiers[name]

    def argument(self, a: Argument, node: Node) -> str:
        """An argument of a call as C++."""
        if isinstance(a, Ref):
            return self.tensor(a.name) if a.name else "Tensor{}"
        if isinstance(a, Refs):
            return f"{{{', '.join(self.tensor(n) if n else 'Tensor{}' for n in a.names)}}}"
        if isinstance(a, Ints):
            if len(a.values) > 16:
                raise Unsupported(
                    f"{node.op} has a list of {len(a.values)} numbers; 16 are the most", node.name
                )
            return f"Ints{{{len(a.values)}, {{{', '.join(integer(v) for v in a.values)}}}}}"
        if isinstance(a, Floats):
            return f"Floats{{{len(a.values)}, {{{', '.join(number(v) for v in a.values)}}}}}"
        if isinstance(a, RunInts):
            return f"ints<{TYPES[self.graph.values[a.name].dtype].c}>({self.tensor(a.name)})"
        if isinstance(a, Epilogue):
            tensors = ", ".join(self.argument(Ref(n), node) for n in a.tensors)
            chain = ", ".join(self.argument(Ref(n), node) for n in a.chain)
            full = self.argument(Ints(a.full), node)
            return f"{{{tensors}, {{{chain}}}, {full}, {number(a.y_scale)}f, {a.y_zero}}}"
        if isinstance(a, Word):
            return a.text
        if isinstance(a, Problem):
            return quoted(f"node {node.name} ({node.op.removeprefix('onnx.')}): {a.text}")
        if isinstance(a, bool):
            return "true" if a else "false"
        if isinstance(a, float):
            return number(a)
        return integer(a)

    def tensor(self, name: str) -> str:
        """The tensor of a value, which is declared first if it has not been yet."""
        identifier = self.identifier(name)
        if self.block is not None and name in self.sliced:
            if name not in self.block.scratch:
                return f"block.of({identifier}, {self.block.row_bytes(self.graph, name)})"
            if name not in self.defined:
                self.defined.add(name)
                self.lines.append(Line("tensor", self._scratch(identifier, name)))
            return identifier
        if name in self.defined:
            return identifier
        self.defined.add(name)
        value = self.graph.values[name]
        if name in self.graph.constants:
            root = name
            self.storage.setdefault(name, Storage("weight", 0, constant=name))
        else:
            root = self._root(name)
        if (root in self.graph.constants and root != name) or root != name:
            data = f"{self.tensor(root)}.data"
        else:
            storage = self.storage[root]
            data = {
                "input": f"c.input({storage.index})",
                "output": f"c.output({storage.index})",
                "buffer": f"c.buffer({storage.index})",
                "weight": f"c.weight(@{root}@)",
                "heap": f"c.heap({storage.index}, {integer(storage.bytes)})",
            }[storage.kind]
        shape = ", ".join(integer(d) for d in value.shape)
        self.lines.append(
            Line(
                "tensor",
                f"const Tensor {identifier} = {{{data}, {len(value.shape)}, {{{shape}}}}};",
            )
        )
        return identifier

    def _scratch(self, identifier: str, name: str) -> str:
        assert self.block is not None
        shape = self.graph.values[name].shape
        rank, columns = (1, 1) if len(shape) == 1 else (2, shape[-1])
        offset = self.block.scratch[name]
        return f"const Tensor {identifier} = block.scratch({offset}, {rank}, {columns});"

    def statement(self, call: Call, node: Node, first: str = "") -> str:
        types = ", ".join(TYPES[t].c if t in TYPES else t for t in call.types)
        arguments = [
            "c" if self.block is None else "block.context",
            *([first] if first else []),
            *(self.argument(a, node) for a in call.args),
        ]
        return f"{call.function}{f'<{types}>' if types else ''}({', '.join(arguments)});"


def in_place_inputs(node: Node) -> list[str]:
    """The inputs of which a fused node reads an element just before it writes the same one."""
    if node.op == "Loop":
        return list(node.inputs)
    if "kinds" in node.attrs:
        pairs = zip(chain_inputs(node), node.attrs["kinds"], strict=True)
        return [name for name, kind in pairs if kind == "full"]
    return []


def integer(value: Any) -> str:
    """A size or attribute as C++."""
    if isinstance(value, Sym):
        return str(value)
    n = int(value)
    if n == -(2**63):
        return "INT64_MIN"
    return f"{n}ll" if abs(n) >= 2**31 else str(n)


def number(value: float) -> str:
    """A double as C++."""
    if math.isnan(value):
        return '__builtin_nan("")'
    if math.isinf(value):
        return "__builtin_inf()" if value > 0 else "-__builtin_inf()"
    return repr(float(value))


def quoted(text: str) -> str:
    """A C++ string literal of printable ASCII."""
    safe = "".join(ch if " " <= ch <= "~" else "?" for ch in text)
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?") + '"'


def _input_symbols(graph: Graph) -> list[str]:
    names: dict[str, None] = {}
    for name in graph.inputs:
        for d in graph.values[name].shape:
            if isinstance(d, Sym):
                names[str(d)] = None
    return list(names)


def lower_graph(
    graph: Graph,
    special: KernelLookup,
    offsets_of: Callable[[list[PackedTensor]], Mapping[str, int]],
    *,
    name: str,
    isa: str,
    abi: int,
    cpu_features: str,
    kernels: Callable[[], Iterable[str]],
    packed: Iterable[PackedTensor] = (),
) -> GraphProgram:
    """The program of a graph.

    ``kernels`` gives the declarations that ``special`` calls need, ``packed`` the constants that
    are not stored as they are.
    """
    lowering = GraphLowering(graph, special)
    buffers = lowering.place_values()
    static = not any(isinstance(b.bytes, Sym) for b in buffers)
    placed = _place(buffers) if static else None
    used: dict[str, None] = {}
    barriers = _lines(lowering, placed, used)
    constants = [s.constant for s in lowering.storage.values() if s.kind == "weight"]
    given = {t.name: t for t in packed}
    tensors = [given.get(c) or PackedTensor(c, (c,), None, raw=True) for c in constants]
    weight_offsets = offsets_of(tensors)
    lines = tuple(
        Line(x.kind, re.sub(r"@(.+?)@\)", lambda m: f"{weight_offsets[m[1]]})", x.text))
        if x.kind == "tensor" and "c.weight(@" in x.text
        else x
        for x in lowering.lines
    )
    symbols = lowering.symbols
    limits: dict[str, int] = graph.meta.get("limits", {})
    output_names: dict[str, str] = graph.meta.get("output_names", {})
    live = [
        sum(dims.whole(b.bytes) for b in buffers if b.first <= i <= b.last) if static else 0
        for i in range(len(graph.nodes))
    ]
    peak = max(range(len(live)), key=live.__getitem__, default=-1)
    return GraphProgram(
        name=name,
        isa=isa,
        abi=abi,
        cpu_features=cpu_features,
        headers=tuple(used),
        kernels=tuple(kernels()),
        inputs=tuple(_interface(graph, n, n, symbols) for n in graph.inputs),
        outputs=tuple(_interface(graph, n, output_names.get(n, n), []) for n in graph.outputs),
        output_shapes=tuple(_planned(graph.values[n].shape, set(symbols)) for n in graph.outputs),
        symbols=tuple(symbols),
        symbol_names=tuple(symbols),
        limits=tuple(limits.get(s, 0) for s in symbols),
        slots=lowering.slots,
        buffer_bytes=tuple(integer(b.bytes) for b in buffers),
        lifetimes=None if placed is not None else tuple((b.first, b.last) for b in buffers),
        offsets=tuple(placed[0]) if placed is not None else (),
        lines=lines,
        tensors=tensors,
        arena_bytes=placed[1] if placed is not None else 0,
        arena_bytes_per_thread=max((b.scratch_bytes for b in lowering.row_blocks), default=0),
        lower_bound_bytes=live[peak] if live else 0,
        peak_node=graph.nodes[peak].name if live else "",
        barriers=barriers,
    )


def _interface(graph: Graph, name: str, shown: str, symbols: list[str]) -> Interface:
    value = graph.values[name]
    shape = tuple(
        int(d) if not isinstance(d, Sym) else -1 - symbols.index(str(d)) if symbols else -1
        for d in value.shape
    )
    return Interface(shown, TYPES[value.dtype].number, shape)


def _planned(shape: Shape, symbols: set[str]) -> tuple[str, ...]:
    return tuple(
        "-1" if isinstance(d, Sym) and not d.names() <= symbols else integer(d) for d in shape
    )


def _place(buffers: list[Storage]) -> tuple[list[int], int]:
    sizes = [align(max(dims.whole(b.bytes), 1)) for b in buffers]
    placed, total = place(
        [
            Buffer([str(b.index)], size, b.first, b.last)
            for b, size in zip(buffers, sizes, strict=True)
        ]
    )
    by_index = {int(b.values[0]): b.offset for b in placed}
    return [by_index[b.index] for b in buffers], total


def _lines(
    lowering: GraphLowering, placed: tuple[list[int], int] | None, used: dict[str, None]
) -> int:
    """Write the statements; returns the number of barriers of a run."""
    graph = lowering.graph
    barriers = 0
    reads: list[Storage] = []  # since the last barrier
    writes: list[Storage] = []

    def region(names: Iterable[str]) -> list[Storage]:
        found = []
        for n in names:
            root = lowering._root(n)
            if n and root in lowering.storage and lowering.storage[root].kind != "weight":
                found.append(lowering.storage[root])
        return found

    def meet(a: Storage, b: Storage) -> bool:
        if a is b:
            return True
        if a.kind != "buffer" or b.kind != "buffer":
            return False
        if placed is None:
            return a.last < b.first or b.last < a.first
        low, high = sorted((a, b), key=lambda s: placed[0][s.index])
        return placed[0][high.index] < placed[0][low.index] + align(dims.whole(low.bytes))

    def wait() -> None:
        nonlocal barriers
        lowering.lines.append(Line("wait", "c.wait();"))
        barriers += 1
        reads.clear()
        writes.clear()

    starts = {b.first: b for b in lowering.row_blocks}
    inside = {i for b in lowering.row_blocks for i in range(b.first, b.last + 1)}
    for i, (node, call) in enumerate(zip(graph.nodes, lowering.calls, strict=True)):
        if i in starts:
            block = starts[i]
            nodes = graph.nodes[i : block.last + 1]
            made = {n for b in nodes for n in b.outputs}
            ins = region(n for b in nodes for n in b.inputs if n not in made)
            outs = region(n for b in nodes for n in b.outputs if n not in block.scratch)
            if any(meet(r, w) for r in ins for w in writes) or any(
                meet(o, x) for o in outs for x in (*reads, *writes)
            ):
                wait()
            _block_lines(lowering, block, used)
            reads += ins
            writes += outs
        if i in inside:
            continue
        sizes = fresh_names(node, graph)
        if isinstance(call, Alias) and not sizes:
            continue
        ins, outs = region(node.inputs), region(node.outputs)
        clash = any(meet(r, w) for r in ins for w in writes) or any(
            meet(o, x) for o in outs for x in (*reads, *writes)
        )
        if clash or (sizes and writes):
            wait()
        results = ", ".join(str(graph.values[o]) for o in node.outputs if o)
        lowering.lines.append(Line("comment", f"{node.name} ({node.op}): {results}"))
        if sizes:
            operator = schema.operator(node.op, node.name)
            assert isinstance(operator, TensorOp)
            measure = operator.measure(node, graph)
            if measure is None:
                raise Unsupported("the sizes of its results depend on data", node.name)
            used[measure.header] = None
            first = lowering.slots
            lowering.slots += len(sizes)
            text = lowering.statement(measure, node, f"c.graph.slots + {first}")
            lowering.lines.append(Line("call", f"if (c.thread == 0) {text}"))
            wait()
            for i, symbol in enumerate(sizes):
                lowering.lines.append(
                    Line("size", f"const int64_t {symbol} = c.graph.slots[{first + i}];")
                )
                lowering.lines.append(Line("size", f"if ({symbol} < 0) return;"))
        for o in node.outputs:
            if o and lowering.storage[lowering._root(o)].kind == "heap":
                identifier = lowering.tensor(o)
                lowering.lines.append(Line("size", f"if (!{identifier}) return;"))
                barriers += 1
                reads.clear()
                writes.clear()
        if isinstance(call, Alias):
            continue
        used[call.header] = None
        lowering.lines.append(Line("call", lowering.statement(call, node)))
        reads += ins
        writes += outs
        for o in node.outputs:
            if o in graph.outputs and lowering.storage[o].kind == "heap":
                lowering.lines.append(
                    Line("result", f"c.result({graph.outputs.index(o)}, {lowering.identifier(o)});")
                )
    return barriers


def _block_lines(lowering: GraphLowering, block: RowBlock, used: dict[str, None]) -> None:
    """Write a row block: a loop of each thread over its rows, in which nobody waits."""
    graph = lowering.graph
    nodes = graph.nodes[block.first : block.last + 1]
    for node in nodes:  # what lives outside is declared outside
        for name in (*node.inputs, *node.outputs):
            if name and name not in block.scratch:
                lowering.tensor(name)
    lowering.lines.append(
        Line(
            "loop",
            f"for (RowBlock block(c, kArena, {block.total}, {block.rows}); block; ++block) {{",
        )
    )
    lowering.block = block
    for node, call, sliced in zip(
        nodes, lowering.calls[block.first : block.last + 1], block.sliced, strict=True
    ):
        assert isinstance(call, Call), node.op
        lowering.sliced = sliced
        results = ", ".join(str(graph.values[o]) for o in node.outputs if o)
        lowering.lines.append(Line("comment", f"{node.name} ({node.op}): {results}"))
        used[call.header] = None
        lowering.lines.append(Line("call", lowering.statement(call, node)))
    lowering.block, lowering.sliced = None, frozenset()
    lowering.lines.append(Line("loop", "}"))
