"""The plan: which kernel, with which schedule, for every product of a model. Data only.

The planner writes it, the code generator reads it, the artifact's manifest stores it as JSON, and a
user may edit it: so :meth:`Plan.from_json` checks everything that it is given.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args, get_type_hints

from qigen.errors import BadInput

ScheduleValue: TypeAlias = int | float | str | bool
"""A parameter of a schedule; which there are is the backend's business."""

PLAN_VERSION = 1


@dataclass(frozen=True)
class Resource:
    """What a kernel needs of one resource of the machine.

    ``kind`` says what ``amount`` counts: "bytes" (``rate`` in GB/s), "instructions" (``rate`` of a
    core in a cycle), "cycles" of dependent instructions and "barriers" (``rate`` 0). ``us`` is what
    the call would take if there were no other resource; amounts are of all threads.
    """

    name: str
    kind: str
    amount: float
    rate: float
    us: float

    def __post_init__(self) -> None:
        _check(self, f"resource {self.name}")


@dataclass(frozen=True)
class Alternative:
    """A schedule that was considered and not chosen; ``reason`` says why, in words."""

    schedule: dict[str, ScheduleValue]
    predicted_us: float
    bound: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        _check(self, "runner-up")


@dataclass(frozen=True)
class KernelChoice:
    """One kernel of the model and why it is this one.

    ``name`` carries the specification (format, activations, ISA, tile). ``n``, ``k``: shape of the
    weight; ``m_bucket``: the number of rows of x that the kernel is made for (1, 4, 16, ...).
    ``schedule``: the backend's parameters (``m_tile``, ``row_tile``, ``kblocks``,
    ``prefetch_bytes``, ...). The predictions are for one call; ``bound`` says what limits it
    (``"memory"``, ``"instructions"``, ``"barrier"``). ``measured_us`` is 0 until somebody measures.
    ``roofline_us`` is what no kernel with this arithmetic can beat on the machine, ``resources``
    what each resource of the machine has to do.
    """

    name: str
    op: str
    format: str
    n: int
    k: int
    m_bucket: int
    schedule: dict[str, ScheduleValue]
    predicted_us: float
    predicted_bytes: int
    predicted_instructions: float
    bound: str
    runners_up: tuple[Alternative, ...] = ()
    reason: str = ""
    measured_us: float = 0.0
    roofline_us: float = 0.0
    resources: tuple[Resource, ...] = ()

    def __post_init__(self) -> None:
        _check(self, f"kernel {self.name}")
        for name in ("n", "k", "m_bucket"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1", f"kernel {self.name}")
        if not self.name:
            raise BadInput("a kernel needs a name", "plan")

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What the kernel is chosen for: (op, format, n, k, m_bucket)."""
        return (self.op, self.format, self.n, self.k, self.m_bucket)


@dataclass(frozen=True)
class Plan:
    """Everything that the planner decided about one model for one target."""

    target: str
    isa: str
    activations: str
    kv: str
    threads_hint: int
    max_tokens: int
    kernels: tuple[KernelChoice, ...] = field(default=())

    def __post_init__(self) -> None:
        _check(self, "plan")
        for name in ("threads_hint", "max_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1", "plan")
        seen: set[tuple[str, str, int, int, int]] = set()
        for kernel in self.kernels:
            if kernel.key in seen:
                raise BadInput("the plan has two kernels for one product", f"kernel {kernel.name}")
            seen.add(kernel.key)

    def find(self, op: str, format: str, n: int, k: int, m_bucket: int) -> KernelChoice:
        """The kernel for a product; BadInput if the plan has none."""
        for kernel in self.kernels:
            if kernel.key == (op, format, n, k, m_bucket):
                return kernel
        raise BadInput(f"the plan has no kernel for {op} {format} {n}x{k} m={m_bucket}", "plan")

    def buckets(self, op: str, format: str, n: int, k: int) -> tuple[int, ...]:
        """The values of ``m_bucket`` that the plan has for a product, ascending."""
        return tuple(sorted(c.m_bucket for c in self.kernels if c.key[:4] == (op, format, n, k)))

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``json.dumps`` accepts; :meth:`from_json` is its inverse."""
        data = dataclasses.asdict(self)
        data["kernels"] = [
            {
                **kernel,
                "runners_up": list(kernel["runners_up"]),
                "resources": list(kernel["resources"]),
            }
            for kernel in data["kernels"]
        ]
        return {"version": PLAN_VERSION, **data}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """A plan from what ``json.loads`` gave; BadInput names the field that does not fit."""
        fields = dict(_mapping(data, "plan"))
        version = fields.pop("version", None)
        if version != PLAN_VERSION:
            raise BadInput(f"the plan's version is {version!r}, not {PLAN_VERSION}", "plan")
        kernels = []
        for i, entry in enumerate(_list(fields.get("kernels", []), "plan.kernels")):
            where = f"plan.kernels[{i}]"
            kernel = dict(_mapping(entry, where))
            for name, part in (("runners_up", Alternative), ("resources", Resource)):
                entries = _list(kernel.get(name, []), f"{where}.{name}")
                kernel[name] = tuple(
                    _build(part, dict(_mapping(e, where)), f"{where}.{name}[{j}]")
                    for j, e in enumerate(entries)
                )
            kernels.append(_build(KernelChoice, kernel, where))
        fields["kernels"] = tuple(kernels)
        plan: Plan = _build(cls, fields, "plan")
        return plan


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise BadInput(f"an object was expected, not {type(data).__name__}", where)
    return data


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, (list, tuple)):
        raise BadInput(f"a list was expected, not {type(data).__name__}", where)
    return list(data)


def _build(cls: Any, data: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass of this module from its fields by name."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"there is no field '{name}'{hint}", where)
    for name, spec in fields.items():
        if name not in data and spec.default is dataclasses.MISSING:
            raise BadInput(f"the field '{name}' is missing", where)
    hints = get_type_hints(cls)
    # JSON does not tell 3.0 from 3, so a whole number may stand where a float belongs.
    return cls(
        **{
            name: float(value) if hints[name] is float and type(value) is int else value
            for name, value in data.items()
        }
    )


def _check(instance: Any, where: str) -> None:
    """BadInput unless the plain fields of a dataclass have their types and no negative numbers."""
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        if hint in (str, int, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            allowed: Any = (int, float) if hint is float else hint
            if not isinstance(value, allowed) or (hint is not str and not number):
                raise BadInput(f"{name} must be a {hint.__name__}, not {value!r}", where)
            if number and not (math.isfinite(value) and value >= 0):
                raise BadInput(f"{name} is {value}; it must be a finite number from 0", where)
        elif name == "schedule":
            for key, entry in _mapping(value, f"{where}, schedule").items():
                if not isinstance(entry, get_args(ScheduleValue)):
                    raise BadInput(f"schedule entry {key} cannot be {entry!r}", where)
