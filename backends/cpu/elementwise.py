"""Elementwise functions on 16 f32 lanes: one row an operator; chains of them as C++ lines; loops.

A chain is what a fused loop computes for every element, and what a matmul or convolution does to
its accumulators before they are stored. The vector text of a row uses the primitives of the ISA
headers and of ``epilogue.h``; ``meaning`` is the numpy reference that the differential test
compares with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.backends.base import Isa, KernelSource
from qigen.codegen.render import render

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One function. ``vector``: C++ text, ``{0}``, ``{1}``.. its operands (vf), ``{p0}``,
    ``{p1}``.. its parameters (float literals). ``meaning(*operands, *params)`` in float64 or
    float32.

    A result lies within ``ulps`` of the meaning, or within ``near`` where that is more.
    """

    name: str
    operands: int
    vector: str
    meaning: Callable[..., Any]
    params: int = 0
    ulps: float = 0.5
    near: float = 0.0


@dataclass(frozen=True)
class Step:
    """One function of a chain. ``args`` are names: ``acc`` (what a matmul summed up), ``in0``,
    ``in1``.. (inputs of the loop) or ``t0``, ``t1``.. (results of earlier steps)."""

    op: str
    args: tuple[str, ...]
    params: tuple[float, ...] = ()


def _rows(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


def _erf(x: Any) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _softplus(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _true(x: Any) -> Any:
    return np.asarray(x).astype(np.float64)


# At infinity the formulas of silu, gelu, mish, hard_swish and softsign give NaN on one side: so do
# the kernels.
ELEMENTWISE: dict[str, Row] = _rows(
    Row("const", 0, "vf_set1({p0})", lambda c: np.float32(c), 1),
    Row("add", 2, "vf_add({0}, {1})", np.add),
    Row("sub", 2, "vf_sub({0}, {1})", np.subtract),
    Row("mul", 2, "vf_mul({0}, {1})", np.multiply),
    Row("div", 2, "vf_div({0}, {1})", np.divide),
    Row("max", 2, "vf_maximum({0}, {1})", np.maximum),
    Row("min", 2, "vf_minimum({0}, {1})", np.minimum),
    Row("pow", 2, "vf_each<powf>({0}, {1})", np.power, ulps=1),
    Row("fmod", 2, "vf_each<fmodf>({0}, {1})", np.fmod),
    Row("neg", 1, "vf_neg({0})", np.negative),
    Row("abs", 1, "vf_abs({0})", np.abs),
    Row("sign", 1, "vf_sign({0})", np.sign),
    Row("floor", 1, "vf_floor({0})", np.floor),
    Row("ceil", 1, "vf_ceil({0})", np.ceil),
    Row("round", 1, "vf_round({0})", np.rint),
    Row("square", 1, "vf_mul({0}, {0})", np.square),
    Row("cube", 1, "vf_mul({0}, vf_mul({0}, {0}))", lambda x: x * x * x, ulps=1.5, near=1e-44),
    Row("sqrt", 1, "vf_sqrt({0})", np.sqrt),
    Row("rsqrt", 1, "vf_div(vf_set1(1.0f), vf_sqrt({0}))", lambda x: 1 / np.sqrt(x), ulps=1.5),
    Row("reciprocal", 1, "vf_div(vf_set1(1.0f), {0})", np.reciprocal),
    # transcendental functions
    Row("exp", 1, "vf_exp({0})", np.exp, ulps=1),
    Row("expm1", 1, "vf_expm1(vf_min(vf_set1(88.0f), {0}))", lambda x: np.expm1(np.minimum(x, 88)),
        ulps=2),
    Row("log", 1, "vf_log({0})", np.log, ulps=1),
    Row("erf", 1, "vf_erf({0})", _erf, ulps=7),
    Row("tanh", 1, "vf_tanh({0})", np.tanh, ulps=2.5),
    Row("sin", 1, "vf_sin({0})", np.sin, ulps=1, near=1e-7),
    Row("cos", 1, "vf_cos({0})", np.cos, ulps=1, near=1e-7),
    Row("tan", 1, "vf_each<tanf>({0})", np.tan, ulps=1),
    Row("asin", 1, "vf_each<asinf>({0})", np.arcsin, ulps=1),
    Row("acos", 1, "vf_each<acosf>({0})", np.arccos, ulps=1),
    Row("atan", 1, "vf_each<atanf>({0})", np.arctan, ulps=1),
    Row("sinh", 1, "vf_each<sinhf>({0})", np.sinh, ulps=2),
    Row("cosh", 1, "vf_each<coshf>({0})", np.cosh, ulps=2),
    Row("asinh", 1, "vf_each<asinhf>({0})", np.arcsinh, ulps=2),
    Row("acosh", 1, "vf_each<acoshf>({0})", np.arccosh, ulps=2),
    Row("atanh", 1, "vf_each<atanhf>({0})", np.arctanh, ulps=2),
    # activations
    Row("relu", 1, "vf_max(vf_zero(), {0})", lambda x: np.maximum(x, 0)),
    Row("leaky_relu", 1, "vf_select(vf_lt({0}, vf_zero()), vf_mul({0}, vf_set1({p0})), {0})",
        lambda x, a: np.where(x < 0, np.float32(a) * x, x), 1),
    Row("prelu", 2, "vf_select(vf_lt({0}, vf_zero()), vf_mul({0}, {1}), {0})",
        lambda x, a: np.where(x < 0, a * x, x)),
    Row("clip", 1, "vf_clamp({0}, {p0}, {p1})", lambda x, a, b: np.clip(x, a, b), 2),
    Row("sigmoid", 1, "vf_sigmoid({0})", _sigmoid, ulps=2.5, near=1.2e-38),
    Row("hard_sigmoid", 1, "vf_clamp(vf_fma({0}, vf_set1({p0}), vf_set1({p1})), 0.0f, 1.0f)",
        lambda x, a, b: np.clip(a * x + b, 0, 1), 2, ulps=2, near=2e-7),
    Row("hard_swish", 1,
        "vf_mul({0}, vf_clamp(vf_fma({0}, vf_set1(1.0f / 6.0f), vf_set1(0.5f)), 0.0f, 1.0f))",
        lambda x: x * np.clip(x / 6 + 0.5, 0, 1), ulps=3, near=1e-6),
    Row("silu", 1, "vf_silu({0})", lambda x: x / (1 + np.exp(-x)), ulps=2.5, near=1.2e-36),
    Row("swish", 1, "vf_mul({0}, vf_sigmoid(vf_mul({0}, vf_set1({p0}))))",
        lambda x, a: x * _sigmoid(np.float32(a) * x), 1, ulps=64, near=1.2e-36),
    Row("gelu_erf", 1, "vf_gelu_erf({0})", lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
        ulps=6, near=2e-6),
    Row("gelu_tanh", 1, "vf_gelu_tanh({0})",
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ulps=4, near=1e-7),
    Row("softplus", 1, "vf_softplus({0})", _softplus, ulps=2, near=1.2e-38),
    Row("softsign", 1, "vf_div({0}, vf_add(vf_set1(1.0f), vf_abs({0})))",
        lambda x: x / (1 + np.abs(x)), ulps=1.5),
    Row("mish", 1, "vf_mish({0})", lambda x: x * np.tanh(_softplus(x)), ulps=4, near=1.2e-36),
    Row("elu", 1, "vf_elu({0}, {p0}, 1.0f)", lambda x, a: np.where(x < 0, a * np.expm1(x), x), 1,
        ulps=3),
    Row("celu", 1, "vf_elu({0}, {p0}, {p0})",
        lambda x, a: np.maximum(x, 0) + np.minimum(a * np.expm1(x / a), 0), 1, ulps=4),
    Row("selu", 1, "vf_mul(vf_set1({p1}), vf_elu({0}, {p0}, 1.0f))",
        lambda x, a, g: g * np.where(x < 0, a * np.expm1(x), x), 2, ulps=4),
    Row("thresholded_relu", 1, "vf_select(vf_lt(vf_set1({p0}), {0}), {0}, vf_zero())",
        lambda x, a: np.where(x > np.float32(a), x, 0), 1),
    # parameters lambd, bias
    Row("shrink", 1,
        "vf_select(vf_lt(vf_set1({p0}), {0}), vf_sub({0}, vf_set1({p1})), "
        "vf_select(vf_lt({0}, vf_set1(-({p0}))), vf_add({0}, vf_set1({p1})), vf_zero()))",
        lambda x, a, b: np.where(x < -np.float32(a), x + b, np.where(x > np.float32(a), x - b, 0)),
        2),
    # truth values: 1 and 0, anything but 0 is true
    Row("equal", 2, "vf_flag(vf_eq({0}, {1}))", lambda a, b: _true(a == b)),
    Row("less", 2, "vf_flag(vf_lt({0}, {1}))", lambda a, b: _true(a < b)),
    Row("less_equal", 2, "vf_flag(vf_le({0}, {1}))", lambda a, b: _true(a <= b)),
    Row("greater", 2, "vf_flag(vf_lt({1}, {0}))", lambda a, b: _true(a > b)),
    Row("greater_equal", 2, "vf_flag(vf_le({1}, {0}))", lambda a, b: _true(a >= b)),
    Row("not", 1, "vf_flag(vf_eq({0}, vf_zero()))", lambda a: _true(a == 0)),
    Row("and", 2, "vf_select(vf_eq({0}, vf_zero()), vf_zero(), vf_select(vf_eq({1}, vf_zero()), "
        "vf_zero(), vf_set1(1.0f)))", lambda a, b: _true((a != 0) & (b != 0))),
    Row("or", 2, "vf_select(vf_eq({0}, vf_zero()), vf_select(vf_eq({1}, vf_zero()), vf_zero(), "
        "vf_set1(1.0f)), vf_set1(1.0f))", lambda a, b: _true((a != 0) | (b != 0))),
    Row("xor", 2, "vf_sub(vf_set1(1.0f), vf_flag(vf_eq(vf_flag(vf_eq({0}, vf_zero())), "
        "vf_flag(vf_eq({1}, vf_zero())))))", lambda a, b: _true((a != 0) ^ (b != 0))),
    Row("is_nan", 1, "vf_select(vf_eq({0}, {0}), vf_zero(), vf_set1(1.0f))",
        lambda a: _true(np.isnan(a))),
    Row("where", 3, "vf_select(vf_eq({0}, vf_zero()), {2}, {1})",
        lambda m, a, b: np.where(m != 0, a, b)),
    # x / scale rounded to even, plus zero: a loop's outputs of u8 and s8 saturate it
    Row("quantize", 1, "vf_add(vf_round(vf_div({0}, vf_set1({p0}))), vf_set1({p1}))",
        lambda x, s, z: np.rint(np.float32(x) / np.float32(s)) + z, 2),
    Row("quantize_linear", 3, "vf_add(vf_round(vf_div({0}, {1})), {2})",
        lambda x, s, z: np.rint(np.float32(x) / np.float32(s)) + z),
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


# ---- fused loops ----

INPUTS = ("f32", "u8", "s8", "i32", "bf16")
OUTPUTS = ("f32", "u8", "s8", "bf16")
MAX_INPUTS, MAX_OUTPUTS, MAX_RANK = 8, 4, 8
"""Sizes of the arrays of LoopArgs."""


@dataclass(frozen=True)
class LoopSpec:
    """A loop that computes a chain for every element of its outputs.

    ``inputs`` are the element types of ``in0``, ``in1``..; each becomes f32 as it is, so quantized
    ones are followed by steps that subtract the zero and multiply by the scale. ``outputs`` are
    pairs of a name of the chain and a type; what becomes u8 or s8 is rounded to even and saturates
    (``quantize`` divides by the scale and adds the zero).
    """

    isa: Isa
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        assert len(self.inputs) <= MAX_INPUTS and set(self.inputs) <= set(INPUTS)
        assert 1 <= len(self.outputs) <= MAX_OUTPUTS
        known = {f"in{i}" for i in range(len(self.inputs))}
        for i, step in enumerate(self.steps):
            row = ELEMENTWISE[step.op]
            assert (len(step.args), len(step.params)) == (row.operands, row.params), step
            assert set(step.args) <= known, f"{step} comes before its arguments"
            known.add(f"t{i}")
        assert all(name in known and kind in OUTPUTS for name, kind in self.outputs)

    @property
    def name(self) -> str:
        """E.g. ``loop_add_relu_1f0c22ab__avx2``: also the entry."""
        ops = "_".join(step.op for step in self.steps if step.op != "const") or "copy"
        text = repr((self.steps, self.inputs, self.outputs))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"loop_{ops[:32].rstrip('_')}_{digest}__{self.isa.name}"

    @property
    def summary(self) -> str:
        """A line of the banner, e.g. ``t1:f32 = relu(add(in0:f32, in1:f32))``."""
        known = {f"in{i}": f"in{i}:{kind}" for i, kind in enumerate(self.inputs)}
        for i, step in enumerate(self.steps):
            operands = [known[a] for a in step.args] + [f"{p:g}" for p in step.params]
            text = f"{step.op}({', '.join(operands)})"
            known[f"t{i}"] = text if len(text) < 80 else f"{step.op}(..)"
        return "; ".join(f"{name}:{kind} = {known[name]}" for name, kind in self.outputs)


def render_loop(spec: LoopSpec) -> KernelSource:
    """The translation unit of one loop: ``void <spec.name>(const LoopArgs&, int thread, int
    threads)``. It includes kernels.h, loop.h, epilogue.h and the header of the ISA."""
    return render_loops(spec.name, (spec,))


def render_loops(name: str, specs: Sequence[LoopSpec]) -> KernelSource:
    """One translation unit of several loops for one ISA: most of its compile time is shared."""
    isa = specs[0].isa
    assert all(spec.isa == isa for spec in specs)
    loops = [
        {
            "name": spec.name,
            "summary": spec.summary,
            "inputs": spec.inputs,
            "outputs": spec.outputs,
            "lines": chain_lines(spec.steps),
        }
        for spec in specs
    ]
    text = render("cpu/loop.cpp.j2", isa=isa, loops=loops)
    return KernelSource(name, text, isa.name, tuple(spec.name for spec in specs))
