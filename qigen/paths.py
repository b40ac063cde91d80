"""Where the installed package keeps its templates and runtime sources, and where users' data lie.

In a wheel they lie inside the package; in the source tree they are its siblings.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from qigen.errors import ToolchainError


def resource_folder(name: str) -> Path:
    """The folder ``templates`` or ``runtime``; ToolchainError if the installation is broken."""
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ToolchainError(f"the folder {name} is missing: install qigen again", str(package))


def data_folder() -> Path:
    """The folder of what is measured here: QIGEN_DATA, else the user's data folder."""
    named = os.environ.get("QIGEN_DATA")
    return Path(named) if named else Path(platformdirs.user_data_dir("qigen"))
