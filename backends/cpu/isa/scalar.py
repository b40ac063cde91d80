"""Plain C++: the reference row, which builds and runs everywhere."""

from qigen.backends.base import Isa

SCALAR = Isa(
    name="scalar",
    template="cpu/isa/scalar.h.j2",
    features=(),
    flags=("-O2",),
    registers=16,
    vectors=4,
    dot_limit=None,
    dot_instructions=32,
    flush_instructions=0,
    source="C++17",
)
