"""The trade-off as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qigen.errors import BadInput, UsageError


def check_plot(path: Path) -> None:
    """UsageError if no picture can be drawn there, before anything is computed."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path} must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it, or take --explain for the terminal")
    if not path.resolve().parent.is_dir():
        raise UsageError("there is no such folder", str(path.resolve().parent))


def save_plot(mix: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw the curve of :meth:`qigen.mix.Choice.to_json`: divergence over bits, and over time."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    tokens = mix["measure"] == "kl"
    what = "sum of errors"
    if mix["divergence_measured"]:
        what = "expected divergence, nats a token" if tokens else "expected error of the outputs"
    for axes, key, label, factor in (
        (left, "bits", "stored bits a weight", 1.0),
        (right, "us", f"predicted time of a {'token' if tokens else 'run'}'s products, ms", 1e-3),
    ):
        curve = sorted((p[key] * factor, p["kl"]) for p in mix["curve"] if p["kl"] > 0)
        axes.plot([x for x, _ in curve], [y for _, y in curve], "-", label="mixes")
        for p in mix["uniform"]:
            axes.plot(p[key] * factor, p["kl"], ".", color="0.5")
            axes.annotate(p["label"], (p[key] * factor, p["kl"]), fontsize=6, color="0.4",
                          xytext=(2, 2), textcoords="offset points")
        point = mix["expected"]
        if point["kl"] > 0:
            axes.plot(point[key] * factor, point["kl"], "o", color="tab:red", label=mix["budget"])
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    left.set_ylabel(what)
    left.legend()
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise BadInput(f"the picture cannot be written ({error.strerror})", str(path)) from None
