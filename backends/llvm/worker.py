"""A process that compiles sources: LLVM aborts where it has no instruction for an intrinsic.

Every line of standard input is a job, every line of standard output says how it went. The process
ends with its input, or when nothing was asked of it for a while.
"""

from __future__ import annotations

import importlib
import json
import select
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qigen.backends.llvm.compile import PREFIX, emit, isa_of, to_ir
from qigen.errors import QigenError

IDLE_SECONDS = 20.0


def compile_unit(arguments: Sequence[str], triple: str) -> None:
    """What a compiler does for ``-I.. -c SOURCE -o OBJECT`` and ``-D..``: other flags say nothing
    that the source does not."""
    folders = [Path(a[2:]) for a in arguments if a.startswith("-I")]
    source = Path(arguments[arguments.index("-c") + 1])
    output = Path(arguments[arguments.index("-o") + 1])
    prefix = next((a[6:] for a in arguments if a.startswith("-Dqg=")), PREFIX)
    headers = {f.name: f.read_text() for f in source.parent.glob("*.h")}
    text = source.read_text()
    isa = isa_of(text, headers)
    ir = to_ir(text, source.name, headers, folders, isa, prefix)
    output.write_bytes(emit(ir, isa, triple))


def answer(job: Mapping[str, Any]) -> dict[str, str]:
    """Do a job; the result is empty or an error's kind, message and place."""
    try:
        compile_unit(job["arguments"], job["triple"])
    except QigenError as error:
        return {"kind": type(error).__name__, "message": error.message, "where": error.where or ""}
    except OSError as error:
        return {"kind": "OSError", "message": error.strerror or "", "number": str(error.errno)}
    except (RuntimeError, AssertionError, KeyError, ValueError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()
        return {"kind": "ToolchainError", "message": " ".join(text[:3])[:400], "where": ""}
    return {}


def main() -> None:
    """Answer jobs."""
    importlib.import_module("llvmlite.binding")  # so that the first job does not wait for it
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
