"""C++ level: sanitizers, static linking, processor features, cgroups, examples, CMake package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME = ROOT / "runtime"
INCLUDE = RUNTIME / "include"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def call(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers(artifact: Path, tmp_path: Path, sanitizers: str) -> None:
    driver = tmp_path / "driver"
    call(
        "g++", "-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all", *WARNINGS, "-DQIGEN_STATIC", "-I", INCLUDE,
        *sorted((RUNTIME / "src").glob("*.cpp")), HERE / "fake_model.cpp", HERE / "driver.cpp",
        "-o", driver,
    )  # fmt: skip
    assert call(driver, artifact, TSAN_OPTIONS="halt_on_error=1").stdout == "ok\n"


def test_driver_through_dlopen(artifact: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    call(
        "g++", "-std=c++17", "-O1", "-pthread", *WARNINGS, "-I", INCLUDE, HERE / "driver.cpp",
        "-o", driver, "-ldl",
    )  # fmt: skip
    assert call(driver, artifact).stdout == "ok\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads that wait yield")
def test_who_waits_for_long_sleeps(tmp_path: Path) -> None:
    """A thread at the barrier leaves its core to others while it waits for one that does not run,
    and none is forgotten there."""
    source, program = tmp_path / "wait.cpp", tmp_path / "wait"
    source.write_text(
        "#include <chrono>\n#include <ctime>\n#include <cstdio>\n#include <thread>\n"
        '#include "qigen/generated.h"\n'
        "int main() {\n"
        "  qigen::Barrier barrier(3);\n"
        "  const auto work = [&](int t) {\n"
        "    for (int i = 0; i < 20; ++i) {\n"
        "      if (t == i % 3) std::this_thread::sleep_for(std::chrono::milliseconds(20));\n"
        "      barrier.wait(t);\n"
        "    }\n"
        "    for (int i = 0; i < 2000; ++i) barrier.wait(t);\n"
        "  };\n"
        "  std::thread a(work, 1), b(work, 2);\n"
        "  work(0);\n"
        "  a.join();\n"
        "  b.join();\n"
        '  std::printf("%.3f\\n", double(std::clock()) / CLOCKS_PER_SEC);\n'
        "}\n"
    )
    call("g++", "-std=c++17", "-O2", "-pthread", *WARNINGS, "-I", INCLUDE, source, "-o", program)
    # 20 waits of two threads for 20 ms would be 0.8 s, and the short ones are a few ms
    assert float(call(program).stdout) < 0.6


@pytest.mark.parametrize("static", [False, True])
def test_headers_are_plain_c11(tmp_path: Path, static: bool) -> None:
    source = tmp_path / "use.c"
    source.write_text(
        '#include "qigen_loader.h"\n'
        "int main(void) { qigen_api api; char problem[9];\n"
        '  return qigen_api_open(&api, "x", problem, sizeof problem); }\n'
    )
    define = ["-DQIGEN_STATIC"] if static else []  # then the table must have the declared types
    call("gcc", "-std=c11", "-O2", *WARNINGS, *define, "-I", INCLUDE, "-c", source,
         "-o", tmp_path / "use.o")  # fmt: skip


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("probe") / "probe"
    call("g++", "-std=c++17", "-pthread", "-I", INCLUDE, "-I", RUNTIME / "src",
         HERE / "cpu_probe.cpp", RUNTIME / "src/cpu.cpp", RUNTIME / "src/error.cpp",
         "-o", program)  # fmt: skip
    return program


def test_features_are_those_of_the_kernel(probe: Path) -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)
    if not flags:
        pytest.skip("no x86 machine")
    linux = set(flags[1].split()) | {flag.replace("_", "") for flag in flags[1].split()}
    linux |= {{"pni": "sse3", "abm": "lzcnt", "bmi1": "bmi"}.get(flag, flag) for flag in linux}
    rows = re.findall(r'\{CpuFeature::\w+, "([\w.]+)", k', (RUNTIME / "src/cpu.cpp").read_text())
    found = call(probe).stdout.splitlines()[0].split()[1:]
    assert len(rows) == 33
    assert set(found) == {row for row in rows if row.replace(".", "") in linux}


def test_the_system_may_refuse_tile_registers(tmp_path: Path) -> None:
    """With a processor that has them: whether the library runs is what arch_prctl says."""
    source = (RUNTIME / "src/cpu.cpp").read_text()
    made_up = source.replace("  uint64_t features = 0;\n  for (const Row& row",
                             "  uint64_t features = kTileFeatures;\n  for (const Row& row", 1)
    assert made_up != source
    (tmp_path / "cpu.cpp").write_text(made_up)
    program = tmp_path / "probe"
    call("g++", "-std=c++17", "-pthread", "-I", INCLUDE, "-I", RUNTIME / "src",
         HERE / "tiles_probe.cpp", tmp_path / "cpu.cpp", RUNTIME / "src/error.cpp",
         "-o", program)  # fmt: skip
    lines = call(program).stdout.splitlines()
    assert lines[:2] == ["granted: 1 after 0x1023 18", "granted: 0 after 0x1023 18"]
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        assert lines[2] == "runs"
    else:
        assert lines[2].startswith("6: the artifact is compiled for amx, but the system does not")


def test_usable_cores(probe: Path, tmp_path: Path) -> None:
    output = call("taskset", "-c", "0", probe).stdout
    assert "allowed: 1\n" in output

    def cgroup(groups: str, files: dict[str, str]) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in {"proc/self/cgroup": groups, **files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return int(call(probe, root).stdout.split()[-1])

    unlimited = 2**31 - 1
    v2 = "sys/fs/cgroup/"
    v1 = "sys/fs/cgroup/cpu/"
    assert cgroup("0::/\n", {}) == unlimited
    assert cgroup("0::/a/b\n", {v2 + "a/b/cpu.max": "max 100000\n"}) == unlimited
    assert cgroup("0::/a/b\n", {v2 + "a/b/cpu.max": "350000 100000\n"}) == 3
    assert cgroup("0::/a/b\n", {v2 + "a/cpu.max": "200000 100000\n"}) == 2
    assert cgroup("0::/on/the/host\n", {v2 + "cpu.max": "50000 100000\n"}) == 1
    quota = {v1 + "x/cpu.cfs_quota_us": "400000", v1 + "x/cpu.cfs_period_us": "100000"}
    assert cgroup("3:cpuset:/\n2:cpu,cpuacct:/x\n", quota) == 4
    quota[v1 + "x/cpu.cfs_quota_us"] = "-1"
    assert cgroup("2:cpu,cpuacct:/x\n", quota) == unlimited


def test_order_of_cores(probe: Path, tmp_path: Path) -> None:
    """Made-up machines: fast cores first, second threads of a core last, nodes together."""

    def order(count: int, files: dict[str, str]) -> list[tuple[int, int]]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        for name, text in files.items():
            path = root / "sys" / "devices" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        lines = call(probe, root, str(count)).stdout.splitlines()
        words = next(line for line in lines if line.startswith("order:")).split()[1:]
        return [(int(w.split(":")[0]), int(w.split(":")[1])) for w in words]

    cpu = "system/cpu/cpu"
    assert order(3, {}) == [(0, 1024), (1, 1024), (2, 1024)]
    # a phone: little cores come first by number, and last by speed
    little = {f"{cpu}{i}/cpu_capacity": "512" if i < 2 else "1024" for i in range(4)}
    assert order(4, little) == [(2, 1024), (3, 1024), (0, 512), (1, 512)]
    # a laptop: two performance cores of two threads each, two efficiency cores at 3/4 of the clock
    laptop = {"cpu_atom/cpus": "4-5\n"}
    for i in range(6):
        laptop[f"{cpu}{i}/cpufreq/cpuinfo_max_freq"] = "4000000" if i < 4 else "3000000"
        core = f"{i // 2 * 2}-{i // 2 * 2 + 1}" if i < 4 else str(i)
        laptop[f"{cpu}{i}/topology/thread_siblings_list"] = core
    assert order(6, laptop) == [(0, 1024), (2, 1024), (4, 384), (5, 384), (1, 1024), (3, 1024)]
    # two sockets whose cores are numbered in turns
    sockets = {"system/node/online": "0-1", "system/node/node0/cpulist": "0,2",
               "system/node/node1/cpulist": "1,3"}
    assert [i for i, _ in order(4, sockets)] == [0, 2, 1, 3]


@pytest.mark.parametrize("example", ["cpp_embed", "c_embed"])
def test_examples(fake: Any, artifact: Path, tmp_path: Path, example: str) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    build = tmp_path / "build"
    call("cmake", "-S", ROOT / "examples" / example, "-B", build, f"-Dqigen_ROOT={RUNTIME}")
    call("cmake", "--build", build)
    program = build / example
    prompt = [1, 2, 3]
    done = call(program, artifact, *map(str, prompt), "-n", "6")
    expected = b""
    for _ in range(6):
        token = int(np.argmax(fake.logits(prompt)[-1]))
        if token in fake.eos:
            break
        expected += fake.texts[token]
        prompt.append(token)
    assert expected and done.stdout.encode() == expected + b"\n"
    assert re.search(r"[\d.]+ tokens/s", done.stderr) and re.search(r"peak \d+", done.stderr)

    for arguments, status, message in [
        ([], 2, "usage"),
        ([artifact, "x"], 2, "usage"),
        ([artifact, "99"], 3, "id 99"),
        ([tmp_path / "nowhere", "1"], 3, "model.so"),
    ]:
        failed = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        assert failed.returncode == status and message in failed.stderr
