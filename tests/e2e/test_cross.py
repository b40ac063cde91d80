"""Artifacts for other processors and systems: Linux ones run under qemu-user, the others are looked
at from outside."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qigen
from qigen import toolchain
from qigen.errors import MachineMismatch, ToolchainError
from qigen.targets.features import host_architecture, host_system
from tests.e2e.conftest import STORIES
from tests.e2e.harness import JOBS

ROOT = Path(__file__).parents[2]
CROSS = "aarch64-linux-gnu-"
SYSROOT = "/usr/aarch64-linux-gnu"
GGUF = STORIES / "stories260K-f32.gguf"


def reference() -> tuple[list[str], bytes]:
    """Arguments of the examples for the reference prompt, and what they must print."""
    data = json.loads((STORIES / "reference.json").read_text())
    arguments = [*map(str, data["prompt_ids"]), "-n", str(len(data["greedy_ids"]))]
    text = data["text"].lstrip().removeprefix(data["prompt"])
    return arguments, text.encode() + b"\n"


def embed(folder: Path, *compiler: str) -> Path:
    """The example for C, which opens any artifact."""
    program = folder / "c_embed"
    source = ROOT / "examples" / "c_embed" / "main.c"
    subprocess.run([*compiler, "-std=c11", "-O1", f"-I{ROOT / 'runtime' / 'include'}", str(source),
                    "-ldl", "-o", str(program)], check=True)  # fmt: skip
    return program


def test_aarch64_writes_the_same_tokens(tmp_path: Path) -> None:
    for tool in (f"{CROSS}g++", f"{CROSS}gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: apt-get install qemu-user g++-aarch64-linux-gnu)")
    artifact = qigen.compile(
        GGUF, tmp_path / "n1.qgn", target="aarch64-linux:neoverse-n1", jobs=JOBS
    )
    assert artifact.manifest["target"] == {
        "machine": "aarch64-linux:neoverse-n1", "isa": "neondot", "features": ["neon", "dotprod"],
        "architecture": "aarch64", "system": "linux",
    }  # fmt: skip
    program = embed(tmp_path, f"{CROSS}gcc")
    arguments, text = reference()

    def run(cpu: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["qemu-aarch64", "-cpu", cpu, "-L", SYSROOT, program, artifact.path, *arguments],
            capture_output=True, check=False,
        )  # fmt: skip

    done = run("cortex-a76")
    assert (done.returncode, done.stdout) == (0, text), done.stderr
    done = run("cortex-a57")
    assert done.returncode == 6 and b"lacks dotprod" in done.stderr
    if host_architecture() != "aarch64":
        with pytest.raises(MachineMismatch, match="another kind of processor"):
            qigen.load(artifact.path)


def test_an_artifact_of_another_system_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "mac.qgn"
    folder.mkdir()
    (folder / "model.dylib").write_bytes(b"\xcf\xfa\xed\xfe")
    with pytest.raises(MachineMismatch, match=r"compiled for macOS: it has model\.dylib"):
        qigen.load(folder)


def test_without_a_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("QIGEN_CXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(toolchain, "_find_zig", lambda architecture, system: None)
    other = "x86_64" if host_architecture() == "aarch64" else "aarch64"
    with pytest.raises(ToolchainError, match=rf"g\+\+-{other.replace('_', '-')}-linux-gnu.*zig"):
        toolchain.find_compiler(other, "linux")
    with pytest.raises(ToolchainError, match=r"no compiler for aarch64 macos.*qigen\[zig\]"):
        toolchain.find_compiler("aarch64", "macos")
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler on the PATH.*apt-get.*zig"):
        toolchain.find_compiler()


MAGICS = {"apple-m1": (b"\xcf\xfa\xed\xfe", "model.dylib"),
          "x86_64-windows:x86-64-v3": (b"MZ", "model.dll")}  # fmt: skip


def need_zig() -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs the package ziglang (pip install 'qigen[zig]')")


@pytest.mark.slow
@pytest.mark.parametrize("target", MAGICS)
def test_other_systems_are_built_by_zig(target: str, tmp_path: Path) -> None:
    need_zig()
    artifact = qigen.compile(GGUF, tmp_path / "out.qgn", target=target, jobs=JOBS)
    magic, name = MAGICS[target]
    library = (artifact.path / name).read_bytes()
    assert library.startswith(magic)
    assert b"qigen_model_load" in library
    assert (artifact.path / "model.lib").is_file() == (name == "model.dll")
    assert not list(artifact.path.glob("*.pdb"))
    artifact.verify()
    with pytest.raises(MachineMismatch, match="compiled for"):
        qigen.load(artifact.path)


@pytest.mark.slow
@pytest.mark.skipif(host_system() != "linux", reason="runs what it compiles")
def test_without_any_compiler_of_the_system(tmp_path: Path) -> None:
    """An empty PATH: zig, which is a Python package, does it all; the tokens are the same."""
    need_zig()
    out = tmp_path / "zig.qgn"
    environment = {**os.environ, "PATH": "/nonexistent"}
    for variable in ("CXX", "QIGEN_CXX"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "-m", "qigen", "compile", GGUF, "-o", out, "--jobs", str(JOBS)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads((STORIES / "reference.json").read_text())
    # in a process of its own: that it can end is part of the test
    program = ("import sys, qigen; model = qigen.load(sys.argv[1], threads=2); "
               "print(list(model.generate_tokens(eval(sys.argv[2]), max_tokens=int(sys.argv[3]))))")
    done = subprocess.run(
        [sys.executable, "-c", program, out, str(data["prompt_ids"]), str(len(data["greedy_ids"]))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == data["greedy_ids"]
    assert qigen.Artifact(out).manifest["compiler"]["version"].startswith("zig")
