"""Errors a user can meet, each with the exit code of the command line.

Every message is one sentence that says what is wrong and what to do; ``where`` names the file,
tensor or node it is about.
"""

from __future__ import annotations


class QigenError(Exception):
    """Base of all errors that qigen raises on purpose."""

    kind = "error"
    exit_code = 1

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UsageError(QigenError):
    """An option or argument that makes no sense."""

    kind = "usage"
    exit_code = 2


class BadInput(QigenError):
    """A file or array that is damaged, contradicts itself or is out of range."""

    kind = "bad-input"
    exit_code = 3


class Unsupported(QigenError):
    """A valid operator, format, architecture or target that qigen does not implement."""

    kind = "unsupported"
    exit_code = 4


class ToolchainError(QigenError):
    """The C++ compiler is missing or failed."""

    kind = "toolchain"
    exit_code = 5


class MachineMismatch(QigenError):
    """The artifact does not fit this machine: ISA, ABI version or operating system."""

    kind = "machine"
    exit_code = 6
