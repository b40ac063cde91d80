"""What ``qigen compile --weights auto`` prints of the formats that it chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import click

from qigen.cli.output import print_table, size_text

_WIDTH, _HEIGHT = 64, 16


def print_mix(mix: Mapping[str, Any], explain: bool) -> None:
    """One line, and with ``explain`` the curve and the table of what else there is."""
    expected, measured = mix["expected"], mix["divergence_measured"]
    tokens = mix["measure"] == "kl"
    what = "divergence" if tokens else "error of the outputs"
    hurt = f"{what} unknown without --calibration"
    if measured:
        hurt = f"expected {what} {expected['kl']:.4g}" + (
            " nats a token" if tokens else f" (cosine {(1 + expected['kl']) ** -0.5:.5f})")
    click.echo(f"mix for {mix['budget']}: {expected['bits']:.3f} bits a weight, "
               f"{size_text(expected['bytes'])}, products {expected['us'] / 1e3:.3f} ms a "
               f"{'token' if tokens else 'run'}, {hurt} ({mix['how']})")
    if not explain:
        return
    word = what if measured else "sum of errors"
    click.echo(f"\n{word} (log) over stored bits a weight: * best mixes, o single formats, "
               "X this one")
    for line in drawn(mix["curve"], mix["uniform"], expected):
        click.echo(line)
    rows = [*mix["curve"], *mix["uniform"]]
    print_table(
        ("mix or format", ">bits", ">size", ">ms", f">{word}"),
        ((p["label"], f"{p['bits']:.3f}", size_text(p["bytes"]), f"{p['us'] / 1e3:.3f}",
          f"{p['kl']:.4g}") for p in sorted(rows, key=lambda p: p["bits"])),
    )  # fmt: skip


def drawn(curve: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]],
          point: Mapping[str, Any]) -> list[str]:
    """The lines of a drawing of bits and divergence, on a logarithmic scale."""
    layers = (("o", uniform), ("*", curve), ("X", [point]))
    places = [(p["bits"], math.log10(p["kl"]), mark) for mark, points in layers for p in points
              if p["kl"] > 0]
    if not places:
        return []
    left, right = min(x for x, _, _ in places), max(x for x, _, _ in places)
    low, high = min(y for _, y, _ in places), max(y for _, y, _ in places)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x, y, mark in places:
        column = round((x - left) / ((right - left) or 1) * (_WIDTH - 1))
        row = round((high - y) / ((high - low) or 1) * (_HEIGHT - 1))
        grid[row][column] = mark
    lines = []
    for i, cells in enumerate(grid):
        value = 10 ** (high - i / (_HEIGHT - 1) * (high - low))
        shown = f"{value:9.2g}" if i % 5 == 0 or i == _HEIGHT - 1 else " " * 9
        lines.append(f"{shown} |{''.join(cells)}".rstrip())
    lines.append(f"{'':9} +{'-' * _WIDTH}")
    lines.append(f"{'':9}  {left:<{_WIDTH // 2}.2f}{right:>{_WIDTH // 2}.2f}")
    return lines
