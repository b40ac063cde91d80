"""Elementwise functions on 16 f32 lanes: one row an operator, and chains of them as C++ lines.

A chain is what a fused loop computes for every element, and what a matmul or convolution does to its
accumulators before they are stored. The vector text of a row uses the primitives of the ISA headers
and of ``epilogue.h``; ``meaning`` is the numpy reference that the differential test compares with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One function. ``vector``: C++ text, ``{0}``, ``{1}``.. its operands (vf), ``{p0}``, ``{p1}``..
    its parameters (float literals). ``meaning(*operands, *params)`` in float64 or float32."""

    name: str
    operands: int
    vector: str
    meaning: Callable[..., Any]
    params: int = 0


@dataclass(frozen=True)
class Step:
    """One function of a chain. ``args`` are names: ``acc`` (what a matmul summed up), ``in0``,
    ``in1``.. (inputs of the loop) or ``t0``, ``t1``.. (results of earlier steps)."""

    op: str
    args: tuple[str, ...]
    params: tuple[float, ...] = ()


def _rows(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


ELEMENTWISE: dict[str, Row] = _rows(
    Row("add", 2, "vf_add({0}, {1})", np.add),
    Row("sub", 2, "vf_sub({0}, {1})", np.subtract),
    Row("mul", 2, "vf_mul({0}, {1})", np.multiply),
    Row("div", 2, "vf_div({0}, {1})", np.divide),
    Row("neg", 1, "vf_sub(vf_zero(), {0})", np.negative),
    Row("abs", 1, "vf_abs({0})", np.abs),
    Row("relu", 1, "vf_max(vf_zero(), {0})", lambda x: np.maximum(x, 0)),
    Row("silu", 1, "vf_silu({0})", lambda x: x / (1 + np.exp(-x))),
    Row("tanh", 1, "vf_tanh({0})", np.tanh),
    Row("exp", 1, "vf_exp({0})", np.exp),
    Row("gelu_tanh", 1, "vf_gelu_tanh({0})",
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    Row("clip", 1, "vf_clamp({0}, {p0}, {p1})", lambda x, a, b: np.clip(x, a, b), 2),
    Row("leaky_relu", 1, "vf_add(vf_max(vf_zero(), {0}), vf_mul(vf_set1({p0}), vf_min(vf_zero(), {0})))",
        lambda x, a: np.where(x < 0, a * x, x), 1),
    Row("hard_sigmoid", 1, "vf_clamp(vf_fma({0}, vf_set1({p0}), vf_set1({p1})), 0.0f, 1.0f)",
        lambda x, a, b: np.clip(a * x + b, 0, 1), 2),
)  # fmt: skip


def literal(value: float) -> str:
    """A C++ float literal that reads back as ``np.float32(value)``."""
    x = float(np.float32(value))
    if math.isnan(x):
        return "__builtin_nanf(\"\")"
    if math.isinf(x):
        return "__builtin_inff()" if x > 0 else "-__builtin_inff()"
    text = np.format_float_scientific(np.float32(x), unique=True, trim="0")
    return f"{text}f"


def chain_lines(steps: Sequence[Step], rows: Mapping[str, Row] = ELEMENTWISE) -> list[str]:
    """C++ declarations ``const vf t0 = ...;``, one a step; the last is the result of the chain."""
    lines = []
    for i, step in enumerate(steps):
        row = rows[step.op]
        params = {f"p{j}": literal(p) for j, p in enumerate(step.params)}
        lines.append(f"const vf t{i} = {row.vector.format(*step.args, **params)};")
    return lines


def chain_reference(steps: Sequence[Step], values: Mapping[str, Array]) -> Array:
    """What the chain computes, by numpy: ``values`` has the arrays of ``acc``, ``in0``, ..."""
    known = dict(values)
    for i, step in enumerate(steps):
        row = ELEMENTWISE[step.op]
        known[f"t{i}"] = row.meaning(*(known[a] for a in step.args), *step.params)
    return known[f"t{len(steps) - 1}"]
