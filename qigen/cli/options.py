"""The group of commands, and the options and arguments that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from qigen import __version__
from qigen.errors import UsageError

if TYPE_CHECKING:
    from qigen.backends.base import Isa
    from qigen.model import Model
    from qigen.targets import Machine

Function = TypeVar("Function", bound=Callable[..., Any])

Count = click.IntRange(min=1)
Threads = click.IntRange(min=0)
ARITHMETICS = ("f32", "bf16", "int8", "int8-token", "int4", "int4-token")


class Bytes(click.ParamType[int]):
    """A number of bytes: 2GiB, 512MiB, 3e9."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        """The bytes; click's error for what is no size."""
        found = re.fullmatch(r"([\d.e+]+)\s*(?:([kmgt])(i)?)?b?", str(value).strip().lower())
        try:
            assert found is not None
            power = " kmgt".index(found[2] or " ")
            size = float(found[1]) * (1024 if found[3] else 1000) ** power
            if not 1 <= size < 2**63:
                raise ValueError
        except (AssertionError, ValueError):
            self.fail(f"{value} is no size; give one such as 2GiB", param, context)
        return int(size)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="qigen %(version)s")
@click.option("--cmake-dir", is_flag=True, help="Print the folder of the CMake package and exit.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, cmake_dir: bool) -> None:
    """Ahead-of-time compiler for quantized inference.

    A model goes in, a native library with its packed weights comes out.
    """
    if cmake_dir:
        from qigen.paths import resource_folder

        click.echo(resource_folder("runtime") / "cmake")
        context.exit()
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(UsageError.exit_code)


def command(function: Function) -> click.Command:
    """A command with the options that all have."""
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return cli.command()(as_json(debug(function)))


def together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def apply(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))
thread_options: Callable[[Function], Function] = together(
    click.option(
        "--threads",
        type=Threads,
        default=0,
        help="Threads of a step. [default: what was tuned, else usable cores]",
    ),
    click.option("--pin", is_flag=True, help="Bind the threads to cores."),
)


def input_shapes(help: str) -> Callable[[Function], Function]:
    """``--shape NAME=1x3x640x640`` of commands on ONNX models."""
    return click.option(
        "--shape", "shapes", multiple=True, metavar="NAME=1x3x640x640", help=help
    )


isa_option = click.option("--isa", help="Force an instruction set of `qigen targets`.")
jobs_option = click.option("--jobs", type=Count, help="Compilers at a time. [default: all cores]")


def repeat_option(turns: int) -> Callable[[Function], Function]:
    """``--repeat``, by default so many turns."""
    return click.option(
        "--repeat", type=Count, default=turns, show_default=True, help="Turns; medians count."
    )


def peers_option(help: str) -> Callable[[Function], Function]:
    """``--vs PEER[,PEER]``; see :func:`names`."""
    return click.option("--vs", default="", metavar="PEER[,PEER]", help=help)


def activations_option(*more: str, help: str = "Arithmetic.") -> Callable[[Function], Function]:
    """``--activations``: an arithmetic of kernels for processors, or one ``more``."""
    return click.option(
        "--activations",
        type=click.Choice([*ARITHMETICS, *more]),
        help=f"{help} [default: the planner's choice]",
    )


@dataclass(frozen=True)
class Measuring:
    """What the commands that measure kernels (``tune``, ``bench-kernel``) are told alike."""

    activations: str | None
    isa: str | None
    tokens: tuple[int, ...]
    jobs: int | None

    def machine(self) -> tuple[Machine, Isa]:
        """This machine, and the instruction set that was asked for or its best."""
        from qigen.tune import native_machine

        return native_machine(self.isa)


def measuring_options(tokens: str, **settings: Any) -> Callable[[Function], Function]:
    """The options of :class:`Measuring`, which become one argument ``measuring``; ``tokens`` and
    ``settings`` are the help and more of ``--m``."""

    def apply(function: Function) -> Function:
        @functools.wraps(function)
        def collected(
            activations: str | None, isa: str | None, tokens: str | None, jobs: int | None,
            **others: Any,
        ) -> Any:  # fmt: skip
            chosen = numbers(tokens, "--m") if tokens else ()
            return function(measuring=Measuring(activations, isa, chosen, jobs), **others)

        group = together(
            activations_option(),
            isa_option,
            click.option("--m", "tokens", metavar="M,M", help=tokens, **settings),
            jobs_option,
        )
        return group(cast(Function, collected))

    return apply


def names(text: str) -> list[str]:
    """The names of an option like ``llama.cpp,torch``, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of an option like ``1,16,128``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) < 1 << 20 for part in parts):
        raise UsageError(f"{option} {text} must be numbers from 1, separated by commas")
    return tuple(map(int, parts))


def load_model(path: Path, threads: int, pin: bool = False) -> Model:
    from qigen.model import load

    return load(path, threads, pin)
