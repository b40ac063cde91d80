"""Which format every matrix of a model gets: ``--weights auto --budget ...``.

Not to be confused with :mod:`qigen.planner`, which chooses the kernel of a matrix whose format is
given. The parts, in the order in which they work:

- :mod:`~qigen.mix.budget`: what the user allows (bits, bytes, time of a token, divergence);
- :mod:`~qigen.mix.candidates`: the formats to choose from, and what each costs a matrix in bytes
  and in time on the machine (performance model, or tuning database where that has an entry);
- :mod:`~qigen.mix.sensitivity`: how much each hurts, in expected divergence of the whole model;
- :mod:`~qigen.mix.graphs`: all that of models that have no tokens (ONNX), by their outputs;
- :mod:`~qigen.mix.allocate`: the exact solver;
- :mod:`~qigen.mix.choose`: the three together, and the curve of what could be had instead;
- :mod:`~qigen.mix.plan`: the result as a file that can be read, edited and given back.
"""

from qigen.mix.budget import Budget
from qigen.mix.choose import Choice, Wishes, choose
from qigen.mix.graphs import choose_graph
from qigen.mix.plan import MatrixPlan, WeightPlan

__all__ = ["Budget", "Choice", "MatrixPlan", "WeightPlan", "Wishes", "choose",
           "choose_graph"]
