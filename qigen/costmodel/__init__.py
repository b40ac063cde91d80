"""The analytical cost model: what a kernel will take, and what binds it."""

from qigen.costmodel.matmul import (
    Prediction,
    Situation,
    predict,
    resources,
    roofline,
    schedules,
    space,
)

__all__ = [
    "Prediction", "Situation", "predict", "resources", "roofline", "schedules", "space",
]  # fmt: skip
