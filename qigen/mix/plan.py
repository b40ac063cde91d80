"""The plan as a file: which format every matrix gets, and how it is brought to it (TOML).

It is written beside the artifact. Only ``format`` has to be there for a matrix; the rest says why
it is so and may go. A plan is for the model whose checksum it names; without ``sha256`` it is taken
for any model with the same matrices.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qigen.errors import BadInput, QigenError, UsageError
from qigen.formats.catalog import by_name
from qigen.mix.candidates import KEEP, Matrix, method_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

VERSION = 1

_KEYS = ("format", "method", "bits", "us", "kl", "error")


@dataclass(frozen=True)
class MatrixPlan:
    """``format`` of the catalog or 'keep'; ``method`` as ``--method`` takes it, '' if it is kept.
    ``bits``, ``us`` and ``kl`` are what was expected: stored bits a weight, microseconds of a
    token, divergence; of a model that has no tokens ``us`` of a run, and the ``error`` of its
    outputs."""

    format: str
    method: str = ""
    bits: float = 0.0
    us: float = 0.0
    kl: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class WeightPlan:
    """The formats of a model's matrices, by their names, with the ``budget`` that they keep and
    what is expected of the whole (``expected``: bits, bytes, us, kl or error; ``how`` in words)."""

    model: str
    sha256: str
    matrices: Mapping[str, MatrixPlan]
    budget: str = ""
    expected: Mapping[str, float] = field(default_factory=dict)
    how: str = ""

    def to_toml(self) -> str:
        """The file's text."""
        quoted = {name: json.dumps(name, ensure_ascii=False) for name in self.matrices}
        width = max(map(len, quoted.values()), default=0)
        lines = [
            "# Which format every matrix gets. Edit what you like and give it back:",
            "#     qigen compile MODEL -o OUT.qgn --plan THIS-FILE",
            "# 'keep' leaves a matrix as it is; methods are those of `qigen compile --method`.",
            f"version = {VERSION}",
            f"model = {json.dumps(self.model, ensure_ascii=False)}",
            f'sha256 = "{self.sha256}"  # without this line for any model with these matrices',
            f"budget = {json.dumps(self.budget)}",
        ]
        if self.how:
            lines.append(f"how = {json.dumps(self.how)}")
        lines += ["", "[expected]  # of all matrices together"]
        lines += [f"{name} = {_number(value)}" for name, value in self.expected.items()]
        hurt = "error" if "error" in self.expected else "kl"
        told = "us: of a run; error: of the outputs, squared" if hurt == "error" else (
            "us: of a token; kl: nats a token")
        lines += ["", f"[matrices]  # bits: stored bits a weight; {told}"]
        for name, m in self.matrices.items():
            parts = [f'format = "{m.format}"']
            if m.method:
                parts.append(f"method = {json.dumps(m.method)}")
            parts += [f"{key} = {_number(getattr(m, key))}" for key in ("bits", "us", hurt)]
            lines.append(f"{quoted[name]:{width}} = {{ {', '.join(parts)} }}")
        return "\n".join(lines) + "\n"

    def write_beside(self, artifact: Path, given: Path | None) -> None:
        """As ARTIFACT.plan.toml, unless that is the file that it was ``given`` in."""
        file = artifact.with_suffix(".plan.toml")
        if given is None or not (file.exists() and file.samefile(given)):
            file.write_text(self.to_toml(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> WeightPlan:
        """The plan in a file; BadInput, naming file and matrix, for what is none."""
        where = str(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"the file cannot be read ({error.strerror})", where) from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadInput(f"this is no TOML ({error})", where) from None
        if data.get("version") != VERSION or not isinstance(data.get("matrices"), dict):
            raise BadInput(f"this is no plan of version {VERSION}; `qigen compile --weights auto` "
                           "writes one", where)
        matrices = {name: _matrix(entry, f"{where}: {name}")
                    for name, entry in data["matrices"].items()}
        expected = data.get("expected", {})
        texts = {key: data.get(key, "") for key in ("model", "sha256", "budget", "how")}
        if not all(isinstance(t, str) for t in texts.values()) or not isinstance(expected, dict):
            raise BadInput("model, sha256, budget and how are texts, expected a table", where)
        return cls(texts["model"], texts["sha256"], matrices, texts["budget"],
                   {k: float(v) for k, v in expected.items() if isinstance(v, (int, float))},
                   texts["how"])

    def check(self, matrices: Mapping[str, Matrix], model: str, sha256: str, where: str,
              calibrated: bool) -> None:
        """BadInput if the plan is for another model than the one with these matrices; UsageError
        if a method needs calibration data and there are none."""
        unknown = [name for name in self.matrices if name not in matrices]
        if self.sha256 and self.sha256 != sha256:
            raise BadInput(f"the plan is for another model, {self.model or self.sha256[:12]}, not "
                           f"{model or sha256[:12]}; take its line sha256 out to use it all the "
                           "same", where)
        if unknown:
            near = difflib.get_close_matches(unknown[0], matrices, n=1)
            hint = f"did you mean {near[0]}?" if near else "it is a plan for another model"
            raise BadInput(f"the model has no matrix {unknown[0]}; {hint}", where)
        missing = [name for name in matrices if name not in self.matrices]
        if missing:
            raise BadInput(f"the plan says nothing of {missing[0]}"
                           f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; give it a "
                           'line, such as { format = "keep" }', where)
        for name, m in self.matrices.items():
            method = method_of(m.method) if m.method else None
            if method is not None and method.needs_hessian and not calibrated:
                raise UsageError(f"the plan has method {m.method} for {name}, which needs "
                                 "calibration data; give --calibration")


def _matrix(entry: Any, where: str) -> MatrixPlan:
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise BadInput('a matrix has a format: write { format = "u4g64" }', where)
    for key, value in entry.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            raise BadInput(f"there is no '{key}'{f'; did you mean {near[0]}?' if near else ''}",
                           where)
        wanted = str if key in ("format", "method") else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise BadInput(f"{key} cannot be {value!r}", where)
    found = MatrixPlan(**entry)
    try:
        if found.format != KEEP:
            fmt = by_name(found.format)
            row = method_of(found.method or "rtn")
            wrong = row.fits(fmt)
            if wrong:
                raise BadInput(f"method {row.name} cannot bring a weight to {fmt.name}: {wrong}")
    except QigenError as error:
        raise BadInput(str(error), where) from None
    return found


def _number(value: float) -> str:
    text = f"{value:.6g}"
    return text if any(c in text for c in ".en") or value != int(value) else f"{int(value)}"
