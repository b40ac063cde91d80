"""Dimensions that are known only at run time: integer expressions over names.

A :class:`Sym` is a polynomial with integer coefficients whose atoms are names (``N``, ``height``)
and calls (``floordiv(h + 1, 2)``, ``mod``, ``min``, ``max``). It is kept in one canonical form, so
two dimensions are equal if their expressions simplify to the same text. Arithmetic between ``Sym``
and ``int`` gives an ``int`` where nothing symbolic is left. Arrays of dimensions are numpy object
arrays, which work elementwise with the operators below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

Term: TypeAlias = tuple[str, ...]
"""The atoms of a monomial, sorted; () for the constant."""

Number: TypeAlias = "int | Sym"

_NAME = re.compile(r"[A-Za-z_]\w*$")


def _floordiv(a: int, b: int) -> int:
    return a // b


def _mod(a: int, b: int) -> int:
    return a % b


FUNCTIONS: dict[str, Any] = {"floordiv": _floordiv, "mod": _mod, "min": min, "max": max}
"""Calls of an expression; the generated C++ has functions of these names."""


class Sym:
    """An integer that run time decides. Immutable; equal if the canonical texts are."""

    __slots__ = ("_terms", "_text", "calls")

    def __init__(
        self, terms: Mapping[Term, int], calls: Mapping[str, tuple[str, Any, Any]]
    ) -> None:
        self._terms = {t: c for t, c in sorted(terms.items()) if c}
        used = {atom for t in self._terms for atom in t}
        self.calls = {a: call for a, call in calls.items() if a in used}
        """The atoms that are calls: text -> (function, first argument, second argument)."""
        self._text = self._show()

    @classmethod
    def named(cls, name: str) -> Sym:
        """The symbol ``name``, an identifier."""
        if not _NAME.match(name):
            raise ValueError(f"{name!r} is no identifier")
        return cls({(name,): 1}, {})

    def _show(self) -> str:
        parts: list[str] = []
        # names first, the constant last
        for term, factor in sorted(self._terms.items(), key=lambda item: (not item[0], item[0])):
            atoms = "*".join(term)
            size = abs(factor)
            body = str(size) if not term else atoms if size == 1 else f"{size}*{atoms}"
            if not parts:
                parts.append(body if factor > 0 else f"-{body}")
            else:
                parts.append(f"{'+' if factor > 0 else '-'} {body}")
        return " ".join(parts)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Sym({self._text})"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sym) and other._text == self._text

    # -- arithmetic -------------------------------------------------------------------------------

    def __add__(self, other: Number) -> Number:
        if isinstance(other, Sym):
            terms = dict(self._terms)
            for t, c in other._terms.items():
                terms[t] = terms.get(t, 0) + c
            return _simplest(terms, {**self.calls, **other.calls})
        if _is_int(other):
            terms = dict(self._terms)
            terms[()] = terms.get((), 0) + int(other)
            return _simplest(terms, self.calls)
        return NotImplemented

    __radd__ = __add__

    def __neg__(self) -> Number:
        return _simplest({t: -c for t, c in self._terms.items()}, self.calls)

    def __sub__(self, other: Number) -> Number:
        return self + (-other)

    def __rsub__(self, other: Number) -> Number:
        return (-self) + other

    def __mul__(self, other: Number) -> Number:
        if isinstance(other, Sym):
            terms: dict[Term, int] = {}
            for t, c in self._terms.items():
                for u, d in other._terms.items():
                    key = tuple(sorted((*t, *u)))
                    terms[key] = terms.get(key, 0) + c * d
            return _simplest(terms, {**self.calls, **other.calls})
        if _is_int(other):
            return _simplest({t: c * int(other) for t, c in self._terms.items()}, self.calls)
        return NotImplemented

    __rmul__ = __mul__

    def __floordiv__(self, other: Number) -> Number:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Number) -> Number:
        return floordiv(other, self)

    def __mod__(self, other: Number) -> Number:
        return mod(self, other)

    # -- reading ----------------------------------------------------------------------------------

    def names(self) -> set[str]:
        """The names that the expression needs."""
        found: set[str] = set()
        for term in self._terms:
            for atom in term:
                if atom in self.calls:
                    _, a, b = self.calls[atom]
                    for part in (a, b):
                        if isinstance(part, Sym):
                            found |= part.names()
                else:
                    found.add(atom)
        return found

    def subs(self, values: Mapping[str, Number]) -> Number:
        """The expression with names replaced."""
        total: Number = 0
        for term, factor in self._terms.items():
            product: Number = factor
            for atom in term:
                value: Number
                if atom in self.calls:
                    function, a, b = self.calls[atom]
                    value = call(function, subs(a, values), subs(b, values))
                else:
                    value = values.get(atom, Sym.named(atom))
                product = product * value
            total = total + product
        return total

    def natural(self) -> bool:
        """Whether it is never negative, given that no name is, as far as can be told."""
        for term, factor in self._terms.items():
            if factor < 0 or not all(self._natural_atom(atom) for atom in term):
                return False
        return True

    def _natural_atom(self, atom: str) -> bool:
        if atom not in self.calls:
            return True
        function, a, b = self.calls[atom]
        if function == "max":
            return natural(a) or natural(b)
        return natural(b) and (function == "mod" or natural(a))

    def divided(self, other: Number) -> Number | None:
        """The quotient if ``other`` divides the expression as a polynomial, else None."""
        if not isinstance(other, Sym):
            n = int(other)
            if n and all(c % n == 0 for c in self._terms.values()):
                return _simplest({t: c // n for t, c in self._terms.items()}, self.calls)
            return None
        if len(other._terms) == 1:
            ((term, factor),) = other._terms.items()
            result: dict[Term, int] = {}
            for t, c in self._terms.items():
                rest = list(t)
                for atom in term:
                    if atom not in rest:
                        return None
                    rest.remove(atom)
                if c % factor:
                    return None
                result[tuple(rest)] = c // factor
            return _simplest(result, self.calls)
        if len(other._terms) == len(self._terms):
            pairs = zip(self._terms.items(), other._terms.items(), strict=True)
            ratios = {c / d if t == u else None for (t, c), (u, d) in pairs}
            if len(ratios) == 1:
                ratio = ratios.pop()
                if ratio is not None and ratio == int(ratio):
                    return int(ratio)
        return None


def _is_int(value: Any) -> bool:
    return not isinstance(value, (Sym, bool, float, str)) and hasattr(value, "__index__")


def _simplest(terms: Mapping[Term, int], calls: Mapping[str, tuple[str, Any, Any]]) -> Number:
    kept = {t: c for t, c in terms.items() if c}
    if not kept:
        return 0
    if list(kept) == [()]:
        return kept[()]
    return Sym(kept, calls)


def natural(value: Number) -> bool:
    """Whether a size or difference of sizes is certainly not negative."""
    return value.natural() if isinstance(value, Sym) else int(value) >= 0


def smaller(a: Number, b: Number) -> Number:
    """The minimum; without a call where it is clear which it is."""
    return a if natural(b - a) else b if natural(a - b) else call("min", a, b)


def larger(a: Number, b: Number) -> Number:
    """The maximum; without a call where it is clear which it is."""
    return a if natural(a - b) else b if natural(b - a) else call("max", a, b)


def call(function: str, a: Number, b: Number) -> Number:
    """``function`` of two dimensions, simplified."""
    if not isinstance(a, Sym) and not isinstance(b, Sym):
        return int(FUNCTIONS[function](int(a), int(b)))
    if function == "floordiv":
        if not isinstance(b, Sym) and int(b) == 1:
            return a
        exact = a.divided(b) if isinstance(a, Sym) else None
        if exact is not None:
            return exact
    if function == "mod" and isinstance(a, Sym) and a.divided(b) is not None:
        return 0
    if function in ("min", "max"):
        if a == b:
            return a
        inner = "max" if function == "min" else "min"
        for one, other in ((a, b), (b, a)):  # max(min(x, y), y) = y
            if isinstance(one, Sym) and list(one._terms.values()) == [1]:
                made = one.calls.get("*".join(next(iter(one._terms))))
                if made is not None and made[0] == inner and other in made[1:]:
                    return other
        a, b = sorted((a, b), key=str)
    text = f"{function}({a}, {b})"
    return Sym({(text,): 1}, {text: (function, a, b)})


def floordiv(a: Number, b: Number) -> Number:
    """a // b, towards minus infinity."""
    return call("floordiv", a, b)


def mod(a: Number, b: Number) -> Number:
    """a modulo b, with the sign of b."""
    return call("mod", a, b)


def ceildiv(a: Number, b: Number) -> Number:
    """a / b, rounded up."""
    return floordiv(a + (b - 1), b)


def subs(value: Any, values: Mapping[str, Number]) -> Any:
    """``value`` with names replaced; numbers stay."""
    return value.subs(values) if isinstance(value, Sym) else value


def product(values: Any) -> Number:
    """The product of dimensions; 1 of none."""
    result: Number = 1
    for v in values:
        result = result * v
    return result


def whole(value: Any) -> int:
    """A dimension that is a number; TypeError if only run time knows it."""
    if isinstance(value, (Sym, str)):
        raise TypeError(f"the size {value} is only known at run time")
    return int(value)


def is_static(shape: Any) -> bool:
    """Whether every dimension is a number."""
    return not any(isinstance(d, Sym) for d in shape)
