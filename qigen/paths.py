"""Where the installed package keeps its templates and runtime sources.

In a wheel they lie inside the package; in the source tree they are its siblings.
"""

from __future__ import annotations

from pathlib import Path

from qigen.errors import ToolchainError


def resource_folder(name: str) -> Path:
    """The folder ``templates`` or ``runtime``; ToolchainError if the installation is broken."""
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ToolchainError(f"the folder {name} is missing: install qigen again", str(package))
