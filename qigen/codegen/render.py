"""Rendering of templates: strict about undefined names, and indented like hand-written code."""

from __future__ import annotations

import functools
import re
from typing import Any

import jinja2

from qigen.paths import resource_folder


def _assert_domain(condition: bool, text: str) -> str:
    """For the first lines of a template: fail on parameters that it was not written for."""
    if not condition:
        raise AssertionError(f"template outside its domain: {text}")
    return ""


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(resource_folder("templates"))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["assert_domain"] = _assert_domain
    return environment


_NAMESPACE = re.compile(r'(namespace\b[^;]*|extern "C") {$')


def tidy(source: str) -> str:
    """Indent C++ by its braces and squeeze blank lines: macros know nothing of their caller."""
    lines: list[str] = []
    scopes: list[int] = []  # indentation that each open brace adds: none for a namespace
    hanging = False
    for raw in source.splitlines():
        line = raw.strip()
        if not line:
            # inside a function blank lines are left over from macros
            if lines and lines[-1] and not lines[-1].endswith("{") and not sum(scopes):
                lines.append("")
            continue
        if line.startswith("#"):
            lines.append(line)
            continue
        code = "" if line.startswith("//") else line.split(" //")[0].rstrip()
        closing = len(code) - len(code.lstrip("}"))
        del scopes[len(scopes) - closing :]
        if closing and lines and not lines[-1]:
            lines.pop()
        lines.append("  " * (sum(scopes) + 2 * hanging) + line)
        for character in code[closing:]:
            if character == "{":
                scopes.append(0 if _NAMESPACE.match(code) else 1)
            elif character == "}" and scopes:
                scopes.pop()
        hanging = bool(code) and not code.endswith((";", "{", "}", ":", ","))
    return "\n".join(lines).rstrip() + "\n"


def render(template: str, **parameters: Any) -> str:
    """The text of ``template`` (a path under ``templates/``) for the parameters; C++ is tidied."""
    text = _environment().get_template(template).render(**parameters)
    return text if template.endswith((".cmake.j2", ".ll.j2")) else tidy(text)
