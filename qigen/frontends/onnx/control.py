"""If, Loop and Scan: what is known while compiling is written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from qigen.errors import BadInput, Unsupported
from qigen.frontends.onnx.builder import Builder, Scope, label
from qigen.ir.dims import Sym
from qigen.ir.tensor import known

MAX_UNROLLED = 1024
"""Iterations of a loop that are written out, at most."""

MAX_UNROLLED_IN_ALL = 4 * MAX_UNROLLED
"""The same of all loops together: they may lie in each other."""

OPERATORS = ("If", "Loop", "Scan")

Inline = Callable[[Scope, onnx.GraphProto, Mapping[str, str], onnx.NodeProto, int], list[str]]
"""Puts the nodes of a subgraph in place; (scope, body, feeds, node, round) -> its outputs."""


class Control:
    """Writes control flow out into a builder's graph."""

    def __init__(self, builder: Builder, inline: Inline) -> None:
        self.builder = builder
        self.graph = builder.graph
        self.inline = inline
        self.unrolled = 0  # iterations

    def write_out(self, scope: Scope, proto: onnx.NodeProto) -> None:
        graphs = {a.name: a.g for a in proto.attribute if a.type == onnx.AttributeProto.GRAPH}
        if proto.op_type == "If":
            condition = known(self.graph, self.builder.operand(scope, proto.input[0], proto))
            if condition is None or condition.size != 1 or isinstance(condition.item(), Sym):
                raise Unsupported(
                    "If whose condition is only known at run time is not supported; fix the sizes "
                    "it depends on with --shape",
                    label(proto),
                )
            branch = graphs.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
            if branch is None or len(branch.output) != len(proto.output):
                raise BadInput("a branch is missing or has other outputs", label(proto))
            results = self.inline(scope, branch, {}, proto, 0)
            scope.names.update(
                {name: own for name, own in zip(proto.output, results, strict=True) if name}
            )
            return
        if proto.op_type == "Loop":
            if "body" not in graphs:
                raise BadInput("the body is missing", label(proto))
            self._loop(scope, proto, graphs["body"])
            return
        if "body" not in graphs:
            raise BadInput("the body is missing", label(proto))
        self._scan(scope, proto, graphs["body"])

    def _scan(self, scope: Scope, proto: onnx.NodeProto, body: onnx.GraphProto) -> None:
        """A scan over axes of known size is written out."""
        a = {x.name: x for x in proto.attribute}
        count = a["num_scan_inputs"].i if "num_scan_inputs" in a else 0
        operands = [self.builder.operand(scope, name, proto) for name in proto.input]
        if scope.opsets.get("", 9) < 9 or any(not name for name in operands):
            raise Unsupported("Scan of opset 8 is not supported; export a newer one", label(proto))
        n_states = len(operands) - count
        n_scans = len(body.output) - n_states
        if not 0 < count <= len(operands) or n_scans < 0 or len(body.input) != len(operands):
            raise BadInput("the body has not as many inputs and outputs as the scan", label(proto))

        def list_of(name: str, length: int) -> list[int]:
            return list(a[name].ints) if name in a and a[name].ints else [0] * length

        state, sources = operands[:n_states], operands[n_states:]
        lengths = set()
        for source, axis in zip(sources, list_of("scan_input_axes", count), strict=True):
            shape = self.graph.values[source].shape
            if not -len(shape) <= axis < len(shape):
                raise BadInput(f"scan axis {axis} is out of range", label(proto))
            lengths.add(shape[axis])
        length = lengths.pop()
        if lengths or not isinstance(length, int) or length > MAX_UNROLLED:
            raise Unsupported(
                "a Scan whose length is only known at run time, or is long, is not supported; fix "
                "sizes with --shape",
                label(proto),
            )
        rows: list[list[str]] = [[] for _ in range(n_scans)]
        for i in range(length):
            if self.unrolled >= MAX_UNROLLED_IN_ALL:
                raise Unsupported("its loops are too long to be written out", label(proto))
            self.unrolled += 1
            slices = []
            for source, axis, backwards in zip(
                sources,
                list_of("scan_input_axes", count),
                list_of("scan_input_directions", count),
                strict=True,
            ):
                at = length - 1 - i if backwards else i
                index = self.graph.add_constant(
                    self.builder.name(f"{source}/at{at}"), np.array(at, np.int64)
                )
                part = self.builder.add_raw(
                    "onnx.Gather", [source, index], {"axis": axis}, f"{source}/part{at}"
                )
                slices.append(part)
            feeds = dict(zip((x.name for x in body.input), (*state, *slices), strict=True))
            results = self.inline(scope, body, feeds, proto, i)
            state = results[:n_states]
            for collected, name in zip(rows, results[n_states:], strict=True):
                collected.append(name)
        axes = list_of("scan_output_axes", n_scans)
        directions = list_of("scan_output_directions", n_scans)
        stacked = [
            self._stacked(names[::-1] if backwards else names, axis, proto)
            for names, axis, backwards in zip(rows, axes, directions, strict=True)
        ]
        for name, own in zip(proto.output, (*state, *stacked), strict=False):
            if name:
                scope.names[name] = own

    def _loop(self, scope: Scope, proto: onnx.NodeProto, body: onnx.GraphProto) -> None:
        """A loop whose number of iterations is known is written out."""
        refused = Unsupported(
            "a Loop whose number of iterations is only known at run time is not supported; export "
            "the model with its loops unrolled, or fix sizes with --shape",
            label(proto),
        )

        def number(name: str) -> Any:
            found = known(self.graph, name) if name else None
            one = None if found is None or found.size != 1 else found.reshape(-1)[0]
            return None if isinstance(one, Sym) else one

        operands = [self.builder.operand(scope, name, proto) for name in proto.input]
        trips = number(operands[0]) if operands[0] else MAX_UNROLLED + 1
        state = operands[2:]
        condition = operands[1] if len(operands) > 1 else ""
        n_scans = len(body.output) - 1 - len(state)
        if n_scans < 0 or len(body.input) != 2 + len(state):
            raise BadInput("the body has not as many inputs and outputs as the loop", label(proto))
        scans: list[list[str]] = [[] for _ in range(n_scans)]
        iteration = 0
        while True:
            go = True if not condition else number(condition)
            if go is None or trips is None:
                raise refused
            if not go or iteration >= int(trips):
                break
            if iteration >= MAX_UNROLLED or self.unrolled >= MAX_UNROLLED_IN_ALL:
                raise refused
            self.unrolled += 1
            index = self.graph.add_constant(
                self.builder.name(f"{scope.prefix}{label(proto)}/i{iteration}"),
                np.array(iteration, np.int64),
            )
            true = self.graph.add_constant(
                self.builder.name(f"{scope.prefix}{label(proto)}/c{iteration}"), np.array(True)
            )
            feeds = dict(zip((i.name for i in body.input), (index, true, *state), strict=False))
            results = self.inline(scope, body, feeds, proto, iteration)
            condition, state = results[0], results[1 : 1 + len(state)]
            for rows, name in zip(scans, results[1 + len(state) :], strict=True):
                rows.append(name)
            iteration += 1
        collected = [self._stacked(rows, 0, proto) for rows in scans]
        for name, own in zip(proto.output, (*state, *collected), strict=False):
            if name:
                scope.names[name] = own

    def _stacked(self, rows: list[str], axis: int, proto: onnx.NodeProto) -> str:
        """What the iterations of a loop made, along a new axis."""
        if not rows:
            raise Unsupported("a loop without iterations makes nothing to collect", label(proto))
        parts = [
            self.builder.add_raw("onnx.Unsqueeze", [row], {"axes": (axis,)}, f"{row}/row")
            for row in rows
        ]
        return self.builder.add_raw("onnx.Concat", parts, {"axis": axis}, f"{rows[0]}/scan")
