"""The analytical cost model: what a kernel will take, and what binds it."""

from qigen.costmodel.matmul import Prediction, predict, schedules

__all__ = ["Prediction", "predict", "schedules"]
