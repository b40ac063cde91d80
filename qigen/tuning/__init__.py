"""Measuring kernels on this machine, and remembering what was measured."""

from qigen.tuning.database import Database, Entry
from qigen.tuning.measure import Bench, Outcome

__all__ = ["Bench", "Database", "Entry", "Outcome"]
