"""The installed package has what it needs, once, and nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

import qigen
from qigen.paths import resource_folder

ROOT = Path(__file__).parents[1]

# Folder of the source tree -> where it is installed.
PLACES = {
    "qigen": "qigen",
    "backends": "qigen/backends",
    "templates": "qigen/templates",
    "runtime/src": "qigen/runtime/src",
    "runtime/include": "qigen/runtime/include",
    "runtime/cmake": "qigen/runtime/cmake",
    "runtime/cuda": "qigen/runtime/cuda",
    "runtime/host": "qigen/runtime/host",
}


@pytest.fixture(scope="module")
def installed() -> list[PurePosixPath]:
    """Files of the distribution, if qigen is imported from one."""
    here = Path(qigen.__file__)
    try:
        files = importlib.metadata.files("qigen") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    if not any(Path(str(f.locate())) == here for f in files):
        pytest.skip("qigen is not installed from a wheel")
    return [PurePosixPath(f) for f in files if "__pycache__" not in f.parts]


def test_files(installed: list[PurePosixPath]) -> None:
    expected = {"qigen/runtime/qigen.map"}
    for source, target in PLACES.items():
        for file in (ROOT / source).rglob("*"):
            inner = file.relative_to(ROOT / source)
            if not file.is_file() or file.suffix in (".pyc", ".so"):
                continue
            if source == "qigen" and inner.parts[0] == "backends":
                continue  # the link of some working trees
            expected.add(f"{target}/{inner.as_posix()}")
    found = [str(f) for f in installed if f.parts[0] == "qigen"]
    assert len(found) == len(set(found))
    compiled = {name for name in found if PurePosixPath(name).suffix == ".so"}
    module = compiled - {"qigen/runtime/lib/libqigen_host.so"}  # what --backend llvm attaches to
    assert len(module) == 1 and next(iter(module)).startswith("qigen/_runtime.")
    assert set(found) - compiled == expected
    strangers = {f.parts[0] for f in installed} - {"qigen", ".."}  # ..: the command in bin
    assert all(name.endswith(".dist-info") for name in strangers), strangers


def test_size(installed: list[PurePosixPath]) -> None:
    folder = Path(qigen.__file__).parents[1]
    size = sum((folder / f).stat().st_size for f in installed)
    assert size < 4 << 20


def test_metadata(installed: list[PurePosixPath]) -> None:
    about = importlib.metadata.metadata("qigen")
    assert about["Version"] == qigen.__version__
    assert any(f.name == "LICENSE" for f in installed)


def test_resources_are_inside(installed: list[PurePosixPath]) -> None:
    package = Path(qigen.__file__).parent
    for name in ("templates", "runtime"):
        assert resource_folder(name) == package / name


def test_import_is_light(tmp_path: Path) -> None:
    """``import qigen`` loads neither numpy nor the compiled module."""
    code = "import sys, qigen; sys.exit(sum(m in sys.modules for m in ('numpy', 'qigen._runtime')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
