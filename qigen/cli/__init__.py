"""The command line: ``qigen`` or ``python -m qigen``.

Results go to standard output (with ``--json`` as one JSON value), progress and errors to standard
error. Exit codes: 0 done, 1 a defect or the system's refusal, 2 wrong usage, 3 bad input file, 4
not supported, 5 toolchain failed, 6 the artifact does not fit this machine, 130 Ctrl-C.

Every command group is a file here: it reads the options, calls one function of the public interface
and prints what that returns. A new command is a new file and its name in the import below. What a
command needs beyond this folder it imports when it runs, so that ``qigen --help`` is fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

# the import of a file is what adds its commands to the group
from qigen.cli import (  # noqa: F401
    bench,
    bench_kernel,
    compile,
    evaluate,
    generate,
    inspect,
    run,
    tune,
)
from qigen.cli.errors import INTERRUPTED, PIPE_CLOSED, fail, report
from qigen.cli.options import cli
from qigen.cli.output import JsonList

__all__ = ["cli", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this program's) and returns its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # Taken from the raw arguments, because parsing them may fail.
    as_json, debug = "--json" in argv, "--debug" in argv
    JsonList.begun = False
    try:
        with cli.make_context("qigen", argv) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (KeyboardInterrupt, click.Abort):
        return fail("interrupted", "interrupted", "", INTERRUPTED, as_json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return report(error, as_json)
