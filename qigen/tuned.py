"""What an artifact remembers of its tuning: ``tuned.json`` beside its manifest.

A file of its own, because an artifact can be tuned long after it was compiled, and on every machine
that it is copied to.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from qigen.targets.calibrate import processor
from qigen.targets.topology import usable_cores

TUNED = "tuned.json"


def write_tuned(folder: Path, threads: int, block: int) -> None:
    """Writes into an artifact what :func:`tuned_threads` reads; OSError if that is not allowed."""
    text = json.dumps(
        {"threads": threads, "block": block, "cores": usable_cores(), "processor": processor()}
    )
    with tempfile.TemporaryDirectory(prefix=".tuned-", dir=folder) as scratch:
        file = Path(scratch) / TUNED
        file.write_text(text + "\n", encoding="utf-8")
        file.replace(folder / TUNED)


def tuned_threads(folder: Path) -> int:
    """The number of threads that was found best for an artifact; 0 if none was measured, or on
    another processor or with other cores than this process may use now."""
    try:
        known = json.loads((folder / TUNED).read_text(encoding="utf-8"))
        threads, cores, where = int(known["threads"]), known["cores"], known["processor"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # nothing that a model needs: all usable cores are a good number, too
    here = cores == usable_cores() and where == processor()
    return threads if here and 1 <= threads <= cores else 0
