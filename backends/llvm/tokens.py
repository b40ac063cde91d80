"""Tokens of a translation unit: the small part of the C++ preprocessor that the templates use."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from qigen.errors import Unsupported

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v]+|//[^\n]*|/\*.*?\*/)
      |(?P<line>\n)
      |(?P<id>[A-Za-z_]\w*)
      |(?P<num>0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fFuUlL]*)
      |(?P<str>"(?:\\.|[^"\\])*")
      |(?P<op><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|::|[-+*/%<>=!~&|^?:;,.(){}\[\]])
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Tokens:
    """The texts of tokens, and the place of each in its file for messages."""

    text: list[str]
    place: list[tuple[str, int]]


def _condition(text: str, macros: dict[str, list[str]]) -> bool:
    """The value of an ``#if``: ``defined(X)``, numbers, names, ``!``, ``&&`` and ``||``."""
    python = re.sub(r"defined\s*\(?\s*(\w+)\s*\)?", lambda m: str(m[1] in macros), text)
    words = re.findall(r"\w+|&&|\|\||!|[()]|\S", python)
    table = {"&&": "and", "||": "or", "!": "not", "True": "True", "False": "False"}
    allowed = [
        table.get(w) or (w if w in "()" else str(w.isdigit() and int(w) != 0)) for w in words
    ]
    return bool(eval(" ".join(allowed), {"__builtins__": {}}))  # words of the table alone


def tokenize(
    text: str, name: str, header: Callable[[str], str | None], macros: dict[str, list[str]]
) -> Tokens:
    """Tokens of a source and of the headers that it includes.

    ``header`` gives the text of a header, or None for one that is left out. ``macros`` are
    object-like ones, by name; what the source defines is added. Unsupported for what the
    templates do not use.
    """
    texts: list[str] = []
    places: list[tuple[str, int]] = []
    _tokenize(text, name, header, macros, set(), texts, places)
    return Tokens(texts, places)


def _tokenize(
    text: str,
    name: str,
    header: Callable[[str], str | None],
    macros: dict[str, list[str]],
    once: set[str],
    texts: list[str],
    places: list[tuple[str, int]],
) -> None:
    taken: list[bool] = []  # of every open #if, whether its branch is read
    lines = text.replace("\\\n", " ").split("\n")
    pending: list[str] = []
    start = 1

    def flush() -> None:
        _lex("\n".join(pending), name, start, macros, texts, places)
        pending.clear()

    for number, line in enumerate(lines, 1):
        stripped = line.lstrip()
        if not stripped.startswith("#"):
            pending.append(line if all(taken) else "")
            continue
        flush()
        start = number + 1
        word, _, rest = stripped[1:].strip().partition(" ")
        rest = rest.split("//")[0].strip()
        if word in ("if", "ifdef", "ifndef"):
            value = all(taken) and (
                _condition(rest, macros) if word == "if" else (rest in macros) == (word == "ifdef")
            )
            taken.append(value)
        elif word == "else":
            taken[-1] = not taken[-1]
        elif word == "elif":
            # a branch that was taken ends the choice: the templates have no third one
            taken[-1] = not taken[-1] and _condition(rest, macros)
        elif word == "endif":
            taken.pop()
        elif not all(taken):
            continue
        elif word == "include":
            found = re.match(r'[<"]([^>"]+)[>"]', rest)
            inner = header(found[1]) if found else None
            if found and inner is not None and found[1] not in once:
                once.add(found[1])
                _tokenize(inner, found[1], header, macros, once, texts, places)
        elif word == "define":
            macro, _, body = rest.partition(" ")
            if "(" in macro:
                raise Unsupported("macros with arguments cannot be translated", f"{name}:{number}")
            found_texts: list[str] = []
            _lex(body, name, number, macros, found_texts, [])
            macros[macro] = found_texts
        elif word == "undef":
            macros.pop(rest, None)
        elif word != "pragma":
            raise Unsupported(f"#{word} cannot be translated", f"{name}:{number}")
    flush()


def _lex(
    text: str,
    name: str,
    line: int,
    macros: dict[str, list[str]],
    texts: list[str],
    places: list[tuple[str, int]],
) -> None:
    at = 0
    end = len(text)
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None:
            raise Unsupported(f"'{text[at]}' cannot be translated", f"{name}:{line}")
        kind = found.lastgroup
        word = found[0]
        at = found.end()
        if kind == "line":
            line += 1
        elif kind == "space":
            line += word.count("\n")
        elif word in macros:
            texts.extend(macros[word])
            places.extend([(name, line)] * len(macros[word]))
        else:
            texts.append(word)
            places.append((name, line))
