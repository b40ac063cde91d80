"""Graph passes: fusion, memory planning and the pipeline that runs them."""

from qigen.passes.memory import MemoryPlan, phases, plan_memory
from qigen.passes.pipeline import PASSES, optimize

__all__ = ["PASSES", "MemoryPlan", "optimize", "phases", "plan_memory"]
