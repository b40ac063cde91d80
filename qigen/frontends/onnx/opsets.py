"""Older versions of operators in terms of the newest: attributes that became inputs, new defaults.

A rule takes the node's attributes and inputs and changes them in place; ``add`` makes a constant
and returns its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Add: TypeAlias = Callable[[Any], str]
Rule: TypeAlias = Callable[[dict[str, Any], list[str], Add], None]


def _to_input(attr: str, index: int, dtype: Any = np.int64) -> Rule:
    """The attribute ``attr`` became input number ``index``."""

    def rule(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
        if attr in attrs:
            inputs += [""] * (index + 1 - len(inputs))
            inputs[index] = add(np.array(attrs.pop(attr), dtype))

    return rule


def _default(attr: str, value: Any) -> Rule:
    """The attribute had another default."""

    def rule(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
        attrs.setdefault(attr, value)

    return rule


def _drop(*names: str) -> Rule:
    def rule(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
        for name in names:
            attrs.pop(name, None)

    return rule


def _clip(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    low, high = attrs.pop("min", None), attrs.pop("max", None)
    if low is not None or high is not None:
        inputs.append(add(np.float32(low)) if low is not None else "")
        inputs.append(add(np.float32(high)) if high is not None else "")


def _old_softmax(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    attrs.setdefault("axis", 1)
    attrs["flatten"] = True  # all axes from `axis` on together


def _pad(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    pads = attrs.pop("pads", attrs.pop("paddings", None))
    inputs.append(add(np.array(pads, np.int64)))
    value = np.float32(attrs.pop("value", 0.0))
    if value:
        inputs.append(add(value))


def _slice(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    inputs.append(add(np.array(attrs.pop("starts"), np.int64)))
    inputs.append(add(np.array(attrs.pop("ends"), np.int64)))
    if "axes" in attrs:
        inputs.append(add(np.array(attrs.pop("axes"), np.int64)))


def _resize10(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    inputs.insert(1, "")  # roi
    attrs["coordinate_transformation_mode"] = "asymmetric"
    attrs["nearest_mode"] = "floor"


def _upsample7(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    inputs.append(add(np.array(attrs.pop("scales"), np.float32)))


def _batch_norm_old(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    if attrs.get("spatial") == 1:  # moments of every pixel stay an attribute that is refused
        del attrs["spatial"]


def _dft17(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    inputs += [""] * (2 - len(inputs))
    inputs.append(add(np.int64(attrs.pop("axis", 1))))


def _dropout_old(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    attrs.pop("ratio", None)


def _topk(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    inputs.append(add(np.array([attrs.pop("k")], np.int64)))


def _constant_of_shape(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    value = np.asarray(attrs.pop("value", np.zeros(1, np.float32)))
    inputs.insert(0, add(value.reshape(())))


def _grid_sample(attrs: dict[str, Any], inputs: list[str], add: Add) -> None:
    old = {"bilinear": "linear", "bicubic": "cubic"}
    if "mode" in attrs:
        attrs["mode"] = old.get(attrs["mode"], attrs["mode"])


EVERY = 1 << 30
"""For a rule that no version is too new for."""

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip

RULES: dict[str, tuple[tuple[int, Rule], ...]] = {
    "Squeeze": ((13, _to_input("axes", 1)),),
    "Unsqueeze": ((13, _to_input("axes", 1)),),
    "ReduceSum": ((13, _to_input("axes", 1)),),
    **{name: ((18, _to_input("axes", 1)),) for name in _REDUCTIONS},
    "Split": ((13, _to_input("split", 1)),),
    "Clip": ((11, _clip),),
    "Softmax": ((13, _old_softmax),),
    "LogSoftmax": ((13, _old_softmax),),
    "Hardmax": ((13, _old_softmax),),
    "Pad": ((11, _pad),),
    "Slice": ((10, _slice),),
    "Resize": ((11, _resize10),),
    "Upsample": ((9, _upsample7),),
    "BatchNormalization": ((9, _batch_norm_old),),
    "DFT": ((20, _dft17),),
    "Dropout": ((12, _dropout_old),),
    "TopK": ((10, _topk),),
    "Cast": ((6, _drop()),),
    "GridSample": ((20, _grid_sample),),
    "RoiAlign": ((16, _default("coordinate_transformation_mode", "output_half_pixel")),),
    "ConstantOfShape": ((EVERY, _constant_of_shape),),
}
"""Operator -> (first version without need of the rule, the rule), the oldest first."""

RENAMED = {"Upsample": "Resize", "Scatter": "ScatterElements", "ConstantOfShape": "Expand"}
"""Operators that another one replaces, with its attributes as the rules leave them."""


def upgrade(
    op_type: str, version: int, attrs: dict[str, Any], inputs: list[str], add: Add
) -> str:
    """Bring a node of opset ``version`` to the newest form; returns the operator's name there."""
    for first, rule in RULES.get(op_type, ()):
        if version < first:
            rule(attrs, inputs, add)
    if op_type == "Upsample":
        _resize10(attrs, inputs, add)
    return RENAMED.get(op_type, op_type)
