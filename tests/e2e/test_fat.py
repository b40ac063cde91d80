"""One artifact for several targets: what is taken at load, and that all of it computes the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qigen
from qigen import compiler, targets
from qigen.backends.cpu.isa import ISAS
from qigen.describe import variants
from qigen.errors import UsageError
from qigen.formats.layout import Layout
from qigen.targets.features import host_architecture
from tests.e2e.harness import JOBS
from tests.e2e.test_cross import GGUF, embed, reference

TARGETS = "x86-64-v3,x86-64-v4"
FORMAT = "s4g32"  # its K-blocks lie alone or in pairs

pytestmark = pytest.mark.skipif(host_architecture() != "x86_64", reason="needs an x86-64 machine")


def run(cpu: str, artifact: Path, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """The example for C on an emulated processor ('' for this one)."""
    if cpu and shutil.which("qemu-x86_64") is None:
        pytest.skip("needs qemu-x86_64 (Debian: apt-get install qemu-user)")
    program = folder / "c_embed"
    if not program.exists():
        embed(folder, shutil.which("gcc") or "cc")
    emulator = ["qemu-x86_64", "-cpu", cpu] if cpu else []
    return subprocess.run(
        [*emulator, program, artifact, *reference()[0]], capture_output=True, check=False
    )


def test_one_library_for_two_processors(tmp_path: Path) -> None:
    artifact = qigen.compile(GGUF, tmp_path / "fat.qgn", target=TARGETS, jobs=JOBS)
    manifest = artifact.manifest
    isas = [t["isa"] for t in (manifest["target"], *manifest["variants"])]
    assert isas == ["avx512", "avx2"]
    here = targets.native()
    taken = next((isa for isa in isas if here.has(ISAS[isa].features)), None)
    assert [v["isa"] for v in variants(manifest) if v["taken"]] == ([taken] if taken else [])
    if taken:
        assert qigen.load(artifact.path).info["isa"] == taken
        done = run("", artifact.path, tmp_path)
        assert (done.returncode, done.stdout) == (0, reference()[1]), done.stderr
    done = run("Haswell", artifact.path, tmp_path)
    assert (done.returncode, done.stdout) == (0, reference()[1]), done.stderr
    done = run("Nehalem", artifact.path, tmp_path)
    assert done.returncode == 6
    assert b"compiled for avx512 or avx2" in done.stderr and b"lacks avx" in done.stderr


def test_why_a_variant_is_taken() -> None:
    here = targets.native()
    base = {"architecture": here.architecture, "system": here.system, "machine": "m"}
    rows = variants({
        "target": {**base, "isa": "a", "features": ["sve"]},
        "variants": [{**base, "isa": "b", "features": []}, {**base, "isa": "c", "features": []},
                     {**base, "isa": "d", "features": [], "system": "windows"}],
    })  # fmt: skip
    assert [row["taken"] for row in rows] == [False, True, False, False]
    assert "lacks sve" in rows[0]["why"] and "faster" in rows[2]["why"]
    assert "windows" in rows[3]["why"]


@pytest.mark.slow
def test_a_layout_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second target is better off with another layout, its matrices are stored again."""
    plain = qigen.compile(GGUF, tmp_path / "one.qgn", target=TARGETS, weights=FORMAT, jobs=JOBS)

    def other_layouts(graph: Any, plan: Any, *_: Any) -> dict[Any, tuple[Layout, float]]:
        keys = {(c.format, c.n, c.k): int(c.schedule["blocks"]) for c in plan.kernels}
        return {key: (Layout(16, 3 - blocks), 0.0) for key, blocks in keys.items()
                if key[2] % 64 == 0 and key[0] == FORMAT}  # fmt: skip

    monkeypatch.setattr(compiler, "shared_layouts", other_layouts)
    artifact = qigen.compile(GGUF, tmp_path / "two.qgn", target=TARGETS, weights=FORMAT, jobs=JOBS)
    again = [name for name in artifact.tensors if name.endswith("@avx2")]
    assert again and not [name for name in plain.tensors if "@" in name]
    artifact.verify()
    cpus = ["Haswell"]
    if targets.native().has(ISAS["avx512"].features):
        cpus.append("")
    outputs = {run(cpu, a.path, tmp_path).stdout for cpu in cpus for a in (plain, artifact)}
    assert len(outputs) == 1 and b"Lily" in outputs.pop()


def test_targets_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="aarch64 linux and x86_64 linux"):
        qigen.compile(GGUF, tmp_path / "a.qgn", target="x86-64-v3,neoverse-n1")
    with pytest.raises(UsageError, match="avx512vnni contradicts --target x86-64-v3"):
        qigen.compile(GGUF, tmp_path / "a.qgn", target="x86-64-v3", isa="avx512vnni")
    with pytest.raises(UsageError, match="neon is for aarch64"):
        qigen.compile(GGUF, tmp_path / "a.qgn", isa="neon")
