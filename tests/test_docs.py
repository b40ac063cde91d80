"""The documents say what is so: tables, links, floors, and the commands of the README."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
STORIES = ROOT / "tests" / "data" / "stories260k" / "stories260K-f32.gguf"


def build_module() -> ModuleType:
    """docs/build.py."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = build_module()
DOCUMENTS = BUILD.documents()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_tables_are_current(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert BUILD.filled(text) == text, "run python docs/build.py"


def test_every_table_has_a_place() -> None:
    written = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert sorted(re.findall(r"<!-- begin (\S+) \(docs", written)) == sorted(BUILD.TABLES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_and_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text):
        assert (document.parent / link).exists(), link
    places = "qigen|backends|templates|runtime|tests|examples|benchmarks|docs"
    for path in re.findall(rf"`((?:{places})/[\w./-]*)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path


# -- floors ----------------------------------------------------------------------------------------


def floors() -> dict[str, int]:
    """Floor by room (a module or package), from docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+) \|$", text, re.MULTILINE)
    return {f"qigen.{room}": int(n) for n, rooms in rows for room in re.findall("`(.+?)`", rooms)}


def imports(file: Path) -> set[str]:
    """Modules and names of this project that a file imports when it is imported or used."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("qigen.")} - {"qigen.__version__"}


def test_nothing_imports_from_above() -> None:
    table = floors()

    def room(module: str) -> str:
        inside = [r for r in table if module == r or module.startswith(f"{r}.")]
        assert inside, f"{module} is in no room of docs/architecture.md"
        return max(inside, key=len)

    beside: dict[str, set[str]] = {}  # rooms of one floor that a room imports
    for folder, package in (("qigen", "qigen"), ("backends", "qigen.backends")):
        for file in (ROOT / folder).rglob("*.py"):
            inner = file.relative_to(ROOT / folder).with_suffix("").parts
            module = ".".join((package, *inner)).removesuffix(".__init__")
            if module in ("qigen", "qigen.__main__", "qigen.backends") or inner[0] == "backends":
                continue  # doors; and the link to backends/ of some working trees
            here = room(module)
            for name in imports(file):
                there = room(name)
                assert table[there] <= table[here], f"{module} imports {name}"
                if here != there and table[here] == table[there]:
                    beside.setdefault(here, set()).add(there)

    graphlib.TopologicalSorter(beside).prepare()  # raises CycleError


# -- README ----------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_readme_runs_as_written(tmp_path: Path) -> None:
    """Every block, in their order, in a folder with a model and the examples; pip apart."""
    commands = Path(sys.executable).parent
    if not (commands / "qigen").exists():
        pytest.skip("qigen is not installed in this environment")
    missing = [name for name in ("bash", "cmake", "g++") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {missing[0]}")
    shutil.copy(STORIES, tmp_path / "model.gguf")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "QIGEN_CACHE": str(tmp_path / "cache")}
    scripts = [["bash", "-euxc", block] for block in blocks("sh") if "pip install" not in block]
    scripts += [[sys.executable, "-c", block] for block in blocks("python")]
    assert len(scripts) >= 5
    for script in scripts:
        done = subprocess.run(
            script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script[-1]}\n{done.stdout}\n{done.stderr}"


def test_readme_gives_the_two_commands() -> None:
    given = "".join(blocks("sh")).splitlines()
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no checkout")
    run = re.findall(r'^readme "(.+)"$', script.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(run) == 2 and set(run) <= set(given)
