"""The tests. They are of the installed package.

``python -m pytest`` puts the source tree in front of it, where a fresh clone has neither the
backends nor the compiled module inside of ``qigen/``: then it is taken off the path again.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]

if not (_ROOT / "qigen" / "backends").exists():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
