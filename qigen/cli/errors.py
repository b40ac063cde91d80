"""What a failed command says, and its exit code."""

from __future__ import annotations

import click

from qigen.cli.output import JsonList, print_json
from qigen.errors import QigenError, UsageError

INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE


def report(error: Exception, as_json: bool) -> int:
    """Tells the user what went wrong; the exit code."""
    if isinstance(error, QigenError):
        return fail(error.kind, error.message, error.where, error.exit_code, as_json)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        message = error.format_message().replace("\n", " ").rstrip(".")
        return fail(UsageError.kind, message + hint, "", UsageError.exit_code, as_json)
    if isinstance(error, OSError):
        where = str(error.filename or "")
        return fail("system", error.strerror or str(error), where, 1, as_json)
    if isinstance(error, MemoryError):
        return fail("system", f"there is not enough memory ({error})", "", 1, as_json)
    message = (
        f"internal error, {type(error).__name__}: {error}; please report it with what --debug shows"
    )
    return fail("internal", message, "", 1, as_json)


def fail(kind: str, message: str, where: str, code: int, as_json: bool) -> int:
    if as_json and not JsonList.begun:  # standard output holds one value
        print_json({"error": {"kind": kind, "message": message, "where": where}})
    click.echo(f"qigen: {where}: {message}" if where else f"qigen: {message}", err=True)
    return code
