"""Machines: the rows of the table, and this machine."""

from qigen.targets.detect import native
from qigen.targets.machine import Machine, by_name, rows

__all__ = ["Machine", "by_name", "native", "rows"]
