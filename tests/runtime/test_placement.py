"""Where weights lie on machines with several memory nodes: made-up ones, and this one."""

from __future__ import annotations

import ctypes as c
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.conftest import HERE, INCLUDE, RUNTIME, cxx
from tests.runtime.test_c_api import LoadOptions, ModelInfo

SHARED, PARTITIONED, INTERLEAVED, REPLICATED = range(4)
GIB = 1 << 30


class PlacedInfo(ModelInfo):
    _fields_ = [("placement", c.c_char_p)]  # noqa: RUF012


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("placement") / "probe"
    sources = [RUNTIME / "src" / f"{name}.cpp" for name in ("placement", "cpu", "memory", "error")]
    cxx("-std=c++17", "-pthread", "-I", INCLUDE, "-I", RUNTIME / "src",
        HERE / "placement_probe.cpp", *sources, "-o", program)  # fmt: skip
    return program


def machine(root: Path, nodes: dict[int, str], distances: dict[int, str], free_gib: int) -> Path:
    """A folder like /sys of a machine: the cores and the distances of each memory node."""
    system = root / "sys/devices/system/node"
    for node, cores in nodes.items():
        folder = system / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
        (folder / "distance").write_text(distances[node] + "\n")
        (folder / "meminfo").write_text(
            f"Node {node} MemTotal:  999999999 kB\nNode {node} MemFree:  {free_gib << 20} kB\n")
    (system / "online").write_text(",".join(map(str, nodes)) + "\n")
    return root


def ask(
    probe: Path, root: Path, cores: int, threads: int, gib: float, rows: bool
) -> dict[str, Any]:
    arguments = [root, cores, threads, int(gib * GIB), int(rows)]
    done = subprocess.run([probe, *map(str, arguments)], capture_output=True, text=True, check=True)
    return {key: rest.split() for key, _, rest in
            (line.partition(":") for line in done.stdout.splitlines())}


def test_two_sockets(probe: Path, tmp_path: Path) -> None:
    root = machine(tmp_path, {0: "0-3", 1: "4-7"}, {0: "10 21", 1: "21 10"}, free_gib=64)
    found = ask(probe, root, cores=8, threads=4, gib=4, rows=True)
    assert found["cores"] == ["0", "1", "4", "5"]  # both memories are read from
    assert found["nodes"] == [f"0:{64 * GIB}:10:21", f"1:{64 * GIB}:21:10"]
    # half local, half remote: all of it from node 0; each its own half; half of each; all its own
    assert found["times"] == ["1.550", "0.500", "0.775", "0.500"]
    assert found["chosen"] == [str(PARTITIONED)]
    half = ["0"] * 8 + ["1"] * 8
    assert found["pages"] == ["0", *half, *half]
    # graph models are not dealt out by rows: a copy for each socket, if there is room
    assert ask(probe, root, 8, 8, 4, rows=False)["chosen"] == [str(REPLICATED)]
    assert ask(probe, root, 8, 8, 60, rows=False)["chosen"] == [str(INTERLEAVED)]
    # what caches hold stays, as does what threads of one node read
    assert ask(probe, root, 8, 8, 0.01, rows=True)["chosen"] == [str(SHARED)]
    assert ask(probe, root, 4, 4, 4, rows=True)["chosen"] == [str(SHARED)]


def test_uneven_nodes(probe: Path, tmp_path: Path) -> None:
    """Four nodes, the third without cores, the fourth far away and with fewer cores."""
    root = machine(tmp_path, {0: "0-3", 1: "4-7", 2: "", 4: "8-9"},
                   {0: "10 12 17 32", 1: "12 10 17 32", 2: "17 17 10 28", 4: "32 32 28 10"}, 8)
    found = ask(probe, root, cores=10, threads=10, gib=4, rows=True)
    assert [node.split(":")[0] for node in found["nodes"]] == ["0", "1", "4"]
    assert found["nodes"][2] == f"4:{8 * GIB}:32:32:10"
    assert found["times"][1:2] == ["0.400"]  # the threads of node 0 read 4 of 10 parts
    assert found["pages"][1:17] == ["0"] * 6 + ["1"] * 6 + ["4"] * 4
    # three threads: one on each node; five: the nodes with more cores get the second ones
    assert ask(probe, root, 10, 3, 4, rows=True)["cores"] == ["0", "4", "8"]
    assert ask(probe, root, 10, 5, 4, rows=True)["cores"] == ["0", "1", "4", "5", "8"]


def test_nodes_that_the_system_does_not_tell(probe: Path, tmp_path: Path) -> None:
    found = ask(probe, tmp_path, cores=4, threads=4, gib=4, rows=True)
    assert found["nodes"] == ["0:0:10"] and found["chosen"] == [str(SHARED)]


@pytest.mark.parametrize("placement", ["auto", "shared", "interleaved", "replicated"])
def test_placements_compute_the_same(
    fake: Any, artifact: Path, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, whatever it has: the pages move, or the model says that they could not."""
    monkeypatch.setenv("QIGEN_PLACEMENT", placement)
    status, library, model = opened(fake, artifact)
    assert status == 0, library.qigen_last_error()
    info = PlacedInfo(struct_size=c.sizeof(PlacedInfo))
    assert library.qigen_model_get_info(model, c.byref(info)) == 0
    text = info.placement.decode()
    assert text.startswith("shared" if placement == "auto" else (placement, "shared (the system"))
    session, logits = c.c_void_p(), (c.c_float * 37)()
    assert library.qigen_session_create(model, 0, c.byref(session)) == 0
    tokens = (c.c_int32 * 3)(1, 2, 3)
    assert library.qigen_session_eval(session, tokens, 3, logits, 0) == 0
    assert list(logits) == fake.logits([1, 2, 3])[-1].tolist()
    library.qigen_session_free(session)
    library.qigen_model_free(model)


@pytest.mark.parametrize(("placement", "status"), [("near", 2), ("partitioned", 4)])
def test_placements_that_are_refused(
    fake: Any, artifact: Path, placement: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIGEN_PLACEMENT", placement)
    found, library, _ = opened(fake, artifact)
    assert found == status
    assert f"QIGEN_PLACEMENT is {'partitioned' if status == 4 else repr('near')}" in (
        library.qigen_last_error().decode())


def opened(fake: Any, artifact: Path) -> tuple[int, c.CDLL, c.c_void_p]:
    library = c.CDLL(str(fake.library()))
    library.qigen_last_error.restype = c.c_char_p
    options = LoadOptions(struct_size=c.sizeof(LoadOptions), threads=2)
    model = c.c_void_p()
    status = library.qigen_model_load(str(artifact).encode(), c.byref(options), c.byref(model))
    return status, library, model
