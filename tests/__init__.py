"""The tests. They are of the installed package.

``python -m pytest`` puts the source tree in front of it, where a fresh clone has neither the
backends nor the compiled module inside of ``qigen/``: then it is taken off the path again.

numpy's matrix products get one thread: several processes share the cores, and threads that spin
while they wait for each other make small products a hundred times slower then.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_ROOT = Path(__file__).parents[1]

if not (_ROOT / "qigen" / "backends").exists():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
