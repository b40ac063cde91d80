"""The analytical cost model: what a kernel will take, and what binds it."""

from qigen.costmodel.matmul import Candidate, Prediction, candidates, fits, predict

__all__ = ["Candidate", "Prediction", "candidates", "fits", "predict"]
