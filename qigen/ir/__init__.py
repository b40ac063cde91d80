"""The intermediate representation: graph, operators, verifier, reference interpreter and plan."""

from qigen.ir import ops as ops
from qigen.ir.graph import Constant, Graph, LazyConstant, Node, State, Value

__all__ = ["Constant", "Graph", "LazyConstant", "Node", "State", "Value"]
