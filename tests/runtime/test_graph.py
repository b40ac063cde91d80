"""Graph models: the C interface on a hand-written one, with sanitizers too, and the example."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.conftest import FLAGS, HERE, INCLUDE, LINK, RUNTIME, WARNINGS, cxx, write_weights

VARIANTS = {"dynamic": [], "static": ["-DFAKE_STATIC"]}
WEIGHT = np.float32(0.25)


def call(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment or None
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(params=VARIANTS)
def graph(request: pytest.FixtureRequest, fake: Any, tmp_path: Path) -> tuple[Path, list[str]]:
    """A whole artifact of the fake graph, and the macros that make it this one."""
    defines = VARIANTS[request.param]
    folder = tmp_path / "graph.qgn"
    folder.mkdir()
    generated = tmp_path / "graph.o"
    cxx(*FLAGS, *defines, "-I", INCLUDE, "-c", HERE / "fake_graph.cpp", "-o", generated)
    cxx(*LINK, *fake.objects(), generated, "-o", folder / "model.so")
    write_weights(folder / "weights.bin", weights=np.full(37, WEIGHT))
    return folder, defines


def test_driver(graph: tuple[Path, list[str]], tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    cxx("-std=c++17", "-O1", "-pthread", *WARNINGS, "-I", INCLUDE, HERE / "graph_driver.cpp",
        "-o", driver, "-ldl")  # fmt: skip
    assert call(driver, graph[0], WEIGHT).stdout == "ok\n"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers(graph: tuple[Path, list[str]], tmp_path: Path, sanitizers: str) -> None:
    driver = tmp_path / "driver"
    cxx("-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all", *WARNINGS, "-DQIGEN_STATIC", *graph[1], "-I", INCLUDE,
        *sorted((RUNTIME / "src").glob("*.cpp")), HERE / "fake_graph.cpp",
        HERE / "graph_driver.cpp", "-o", driver)  # fmt: skip
    assert call(driver, graph[0], WEIGHT, TSAN_OPTIONS="halt_on_error=1").stdout == "ok\n"


def test_from_python(graph: tuple[Path, list[str]]) -> None:
    runtime = pytest.importorskip("qigen._runtime")
    from qigen.errors import BadInput

    model = runtime.Model(str(graph[0]), threads=2)
    size = -1 if not graph[1] else 4
    assert model.inputs[0] == {"name": "a", "dtype": "float32", "shape": (size, 3)}
    assert model.outputs[2] == {"name": "positive", "dtype": "int64", "shape": (-1,)}
    a = np.array([[1, 2, 3], [-1, 0, 1], [2, 2, 2], [0, 9, 9]], np.float32)
    # transposed: not contiguous
    b = np.arange(20, dtype=np.float32).reshape(5, 4).T
    results = model.run({"a": a, "b": b, "shift": np.array([10, 0])})
    assert np.array_equal(results["sum"], a + 10 + WEIGHT)
    assert np.array_equal(results["totals"], b.sum(axis=0))
    assert results["positive"].tolist() == [0, 2] and results["positive"].dtype == np.int64
    with pytest.raises(BadInput, match=r"shift\[1\] is negative"):
        model.run({"a": a, "b": b, "shift": np.array([10, -1])})


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_example(graph: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, defines = graph
    build = tmp_path / "build"
    example = HERE.parents[1] / "examples" / "cpp_embed"
    call("cmake", "-S", example, "-B", build, f"-Dqigen_ROOT={RUNTIME}")
    call("cmake", "--build", build)
    program = build / "cpp_embed"
    rows = 4 if defines else 1
    lines = call(program, folder).stdout.splitlines()
    zeros = f"sum [{rows}, 3]:" + " 0.25" * min(3 * rows, 8) + (" ..." if rows > 2 else "")
    assert lines[0] == zeros and lines[2] == "positive [0]:"

    a = np.arange(12, dtype=np.float32).reshape(4, 3) - 4
    arrays = {"a": a, "b": np.ones((4, 5), np.float32), "shift": np.array([100, 0])}
    files = []
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        files.append(f"{name}={tmp_path / name}.npy")
    lines = call(program, folder, *files).stdout.splitlines()
    shown = " ".join(f"{value:g}" for value in (a + 100.25).reshape(-1)[:8])
    assert lines == [
        f"sum [4, 3]: {shown} ...", "totals [5]: 4 4 4 4 4", "positive [2]: 2 3"
    ]  # fmt: skip

    np.save(tmp_path / "double.npy", a.astype(float))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(a))
    np.save(tmp_path / "complex.npy", a.astype(complex))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "header.npy").write_bytes(whole[:50])
    (tmp_path / "text.npy").write_text("these are no numbers")
    for arguments, status, message in [
        (["1", "2"], 2, "usage"),
        (["none=a.npy"], 3, "no input"),
        ([f"a={tmp_path / 'nowhere'}.npy"], 3, "cannot be read"),
        ([f"a={tmp_path / 'double'}.npy"], 3, "must be float32, not float64"),
        ([f"a={tmp_path / 'fortran'}.npy"], 3, "contiguous"),
        ([f"a={tmp_path / 'complex'}.npy"], 3, "does not know"),
        ([f"a={tmp_path / 'cut'}.npy"], 3, "47 bytes"),
        ([f"a={tmp_path / 'header'}.npy"], 3, "truncated"),
        ([f"a={tmp_path / 'text'}.npy"], 3, "no .npy file"),
    ]:
        failed = subprocess.run(
            [program, folder, *arguments], capture_output=True, text=True, check=False
        )
        assert failed.returncode == status, failed.stderr
        assert re.search(re.escape(message), failed.stderr), failed.stderr
