"""``qigen compile --weights auto`` and ``--plan`` on a model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qigen
from qigen.cli.mix import print_mix
from qigen.mix.curve import save_plot
from qigen.mix.plan import WeightPlan

NAMES = ("u3g32", "u8g32")


@pytest.fixture(scope="module")
def mixed(stories_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact under a budget of bits, with its plan beside it."""
    out = tmp_path_factory.mktemp("mix") / "a.qgn"
    qigen.compile(stories_gguf, out, weights="auto", budget="bits=5", candidates=NAMES,
                  curve=True, max_seq=64)
    return out


def formats(artifact: Path) -> dict[str, str]:
    manifest = json.loads((artifact / "manifest.json").read_text())
    return {part["name"]: t["format"] for t in manifest["tensors"] if "layout" in t
            for part in t["parts"]}


def test_the_artifact_has_the_formats_of_the_plan_beside_it(mixed: Path) -> None:
    plan = WeightPlan.read(mixed.with_suffix(".plan.toml"))
    assert formats(mixed) == {n: m.format for n, m in plan.matrices.items()}
    assert len(set(formats(mixed).values())) > 1
    assert 4.5 < plan.expected["bits"] <= 5 and plan.budget == "bits=5"
    manifest = json.loads((mixed / "manifest.json").read_text())
    assert manifest["mix"]["expected"]["bits"] == pytest.approx(plan.expected["bits"], rel=1e-5)
    logits = qigen.load(mixed, threads=1).session().eval([1, 2, 3])
    assert np.isfinite(logits).all()


def test_an_edited_plan_is_followed(run: Any, mixed: Path, stories_gguf: Path, tmp_path: Path
                                    ) -> None:
    file, out = tmp_path / "own.toml", tmp_path / "b.qgn"
    text = mixed.with_suffix(".plan.toml").read_text()
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "attn_k" in line)
    name = json.loads(lines[at].partition(" =")[0])
    lines[at] = f'{json.dumps(name)} = {{ format = "u8g32", method = "clip" }}'
    file.write_text("\n".join(lines))
    code, _, err = run("compile", stories_gguf, "-o", out, "--plan", file, "--max-seq", 64)
    assert (code, err) == (0, "")
    assert formats(out) == {**formats(mixed), name: "u8g32"}
    assert WeightPlan.read(tmp_path / "b.plan.toml").matrices[name].method == "clip"


def test_the_trade_off_is_shown(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                ) -> None:
    mix = json.loads((mixed / "manifest.json").read_text())["mix"]
    print_mix(mix, True)
    out = capsys.readouterr().out
    assert "mix for bits=5" in out and "divergence unknown" in out
    assert "X" in out and "u3g32" in out and " bits=9" in out.replace("\n", " ")
    pytest.importorskip("matplotlib")
    save_plot(mix, tmp_path / "curve.png", "a model")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("options", "code", "message"), [
    ("--weights auto", 2, "needs a --budget"),
    ("--weights auto --budget bits=1", 2, "the least that there is is bits="),
    ("--weights auto --budget speed=1", 2, "a budget is of bits"),
    ("--weights auto --budget kl=0.1", 2, "--calibration"),
    ("--weights auto --budget bits=4 --candidates u9g9", 4, "u9g9"),
    ("--weights auto --budget bits=4 --calibration LITTLE", 3, "too few"),
    ("--budget bits=4", 2, "--weights auto"),
    ("--weights u4g32 --budget bits=4", 2, "--weights auto"),
    ("--weights u4g32 --plan PLAN", 2, "leave --weights"),
    ("--weights auto --budget bits=4 --plan PLAN", 2, "leave --weights, --budget"),
    ("--plan PLAN --plot x.png", 2, "--plot"),
    ("--weights auto --budget bits=4 --plot x.txt", 2, "must end in"),
    ("--plan none.toml", 3, "cannot be read"),
    ("--plan OTHER", 3, "another model"),
    ("--weights auto --budget bits=4 --target sm_80", 4, "name a format for a GPU"),
])  # fmt: skip
def test_wrong_use(run: Any, mixed: Path, stories_gguf: Path, tmp_path: Path, options: str,
                   code: int, message: str) -> None:
    plan = mixed.with_suffix(".plan.toml")
    other, little = tmp_path / "other.toml", tmp_path / "little.txt"
    sha = WeightPlan.read(plan).sha256
    other.write_text(plan.read_text().replace(sha, "0" * 64))
    little.write_text("Once upon a time there was a little girl who had a dog and a cat, both big.")
    words = {"PLAN": plan, "OTHER": other, "LITTLE": little}
    arguments = [words.get(word, word) for word in options.split()]
    out = tmp_path / "x.qgn"
    got, _, err = run("compile", stories_gguf, "-o", out, "--max-seq", 64, *arguments)
    assert (got, message in err) == (code, True), err
    assert not out.exists()
