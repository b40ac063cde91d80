"""What an artifact holds, whether damage is found, and programs that embed it."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qigen import targets
from qigen._runtime import Model
from qigen.artifact import ABI_VERSION, HEADER_BYTES, Artifact
from qigen.compiler import compile
from qigen.errors import BadInput, MachineMismatch
from qigen.planner import isa_candidates
from tests.e2e.conftest import STORIES
from tests.e2e.harness import JOBS, Compiled, Options, write_source
from tests.e2e.test_families import MIXED_FORMATS

ROOT = Path(__file__).parents[2]
ISAS = [isa.name for isa in isa_candidates(targets.native())]
NEEDED = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libstdc++.so.6", "libgcc_s.so.1"}
NEEDED |= {"ld-linux-x86-64.so.2"}
MIB = 1 << 20

Build = Callable[..., Compiled]
Stories = Callable[..., Path]


def call(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


# -- what is in it --------------------------------------------------------------------------------


def matmul_functions(library: Path) -> set[str]:
    need("nm")
    return set(re.findall(r"qg::(matmul_\w+)\(", call("nm", "-C", library).stdout))


def test_only_kernels_of_the_plan(compiled: Build) -> None:
    artifact = compiled(**MIXED_FORMATS).artifact
    found = matmul_functions(artifact.path / "model.so")
    lookups = {name for name in found if name.endswith("__rows")}
    assert len(lookups) == 1 and "q8_0_a32" in lookups.pop()  # of the embedding
    kernels = {name.rpartition("__")[0] for name in found if not name.endswith("__rows")}
    assert kernels == {row["name"] for row in artifact.explain()}
    assert {row["format"] for row in artifact.explain()} == {"q8_0", "q6_k", "q4_k", "q4_0", "f16"}
    assert all(not name.endswith("gelu_tanh") for name in found)  # gemma's


@pytest.mark.parametrize("isa", ISAS)
def test_libraries_and_names(stories: Stories, isa: str) -> None:
    """Exports are the C interface; nothing else is needed than the C and C++ libraries."""
    need("nm", "readelf")
    library = stories(isa=isa) / "model.so"
    exported = re.findall(r" [A-Za-z] (\S+)$", call("nm", "-D", "--defined-only", library).stdout,
                          re.MULTILINE)  # fmt: skip
    header = (ROOT / "runtime" / "include" / "qigen.h").read_text()
    declared = set(re.findall(r"QIGEN_API [\w \*]*?\b(qigen_\w+)\(", header))
    assert {name.partition("@")[0] for name in exported} - {"QIGEN_1"} == declared
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", call("readelf", "-dW", library).stdout)
    assert set(needed) <= NEEDED
    # a GNU_UNIQUE symbol would keep the library loaded after dlclose
    assert " u " not in call("nm", library).stdout


def opcodes(library: Path) -> Iterator[tuple[str, list[str]]]:
    """(text, bytes) of every instruction."""
    for line in call("objdump", "-d", "-w", library).stdout.splitlines():
        fields = line.split("\t")
        if len(fields) == 3:
            yield fields[2], fields[1].split()


def test_instructions_are_those_of_the_isa(stories: Stories) -> None:
    """AVX2 code has no EVEX instruction (first byte 62), scalar code no VEX one (c4, c5) either."""
    need("objdump")
    first_bytes = {}
    for isa in ISAS:
        code = list(opcodes(stories(isa=isa) / "model.so"))
        first_bytes[isa] = {raw[0] for _, raw in code}
        if not isa.startswith("avx512"):
            assert "62" not in first_bytes[isa]
            assert not [text for text, _ in code if "%zmm" in text or re.search(r"%k[0-7]", text)]
    assert not {"c4", "c5", "62"} & first_bytes["scalar"]
    if "avx512vnni" in ISAS:
        assert "62" in first_bytes["avx512vnni"]  # the test can tell


# -- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def victim(stories: Stories, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stories(), tmp_path / "victim.qgn"))


def flipped(file: Path, position: int) -> Iterator[None]:
    """While the generator is suspended, one bit of the file is wrong."""
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ (1 << position % 8)]))
        stream.flush()
        yield
        stream.seek(position)
        stream.write(bytes([byte]))


def test_verify_finds_any_flipped_bit(compiled: Build, tmp_path: Path) -> None:
    overrides = {"d_model": 96, "n_kv_heads": 1, "n_layers": 1}  # a key has 1632 bytes: then a gap
    victim = tmp_path / "victim.qgn"
    shutil.copytree(compiled(overrides=overrides).artifact.path, victim)
    artifact = Artifact(victim)
    artifact.verify()
    size = artifact.weights_path.stat().st_size
    edges = {0, 8, 16, 59, 60, 63, 64, 2000, HEADER_BYTES - 1, size - 1}
    for tensor in artifact.tensors.values():
        edges |= {tensor["offset"], tensor["offset"] + tensor["bytes"] - 1}
    gap = next(t for t in artifact.tensors.values() if t["bytes"] % 64)
    edges.add(gap["offset"] + gap["bytes"])  # between two tensors
    for position in sorted(edges):
        for _ in flipped(artifact.weights_path, position):
            with pytest.raises(BadInput, match=r"weights\.bin"):
                Artifact(victim).verify()
    for name in artifact.manifest["files"]:
        file = victim / name
        end = file.stat().st_size
        if name == "weights.bin":
            continue
        for position in {0, end // 3, end - 1}:
            for _ in flipped(file, position):
                with pytest.raises(BadInput, match=re.escape(name)):
                    Artifact(victim).verify()
    manifest = victim / "manifest.json"
    end = manifest.stat().st_size
    for position in [*range(0, end, 61), *range(end - 60, end)]:
        for _ in flipped(manifest, position):
            with pytest.raises(BadInput, match="manifest"):
                Artifact(victim)
    Artifact(victim).verify()


def test_manifest_that_is_no_manifest(victim: Path) -> None:
    manifest = victim / "manifest.json"
    whole = manifest.read_text()
    damaged = ["", "{}", "[]", "null", '"x"', "[" * 100_000, "\xff\xfe"]
    damaged += [whole[:-3], whole + "\n", whole.replace(" ", "  ")]
    for text in damaged:
        manifest.write_text(text, encoding="latin-1")
        with pytest.raises(BadInput, match="manifest"):
            Artifact(victim)
    manifest.write_text(whole.replace('"manifest_version": 1', '"manifest_version": 99'))
    with pytest.raises(BadInput, match="version 99"):
        Artifact(victim)
    shutil.rmtree(victim)
    with pytest.raises(BadInput, match="no artifact"):
        Artifact(victim)


@pytest.mark.parametrize("change", ["truncated", "padded", "missing", "empty"])
@pytest.mark.parametrize("name", ["weights.bin", "model.so", "vocab.bin"])
def test_files_of_the_wrong_size(victim: Path, name: str, change: str) -> None:
    """verify() finds them all; loading finds all that it would stumble over."""
    file = victim / name
    size = file.stat().st_size
    if change == "missing":
        file.unlink()
    else:
        os.truncate(file, {"truncated": size - 1, "padded": size + 1, "empty": 0}[change])
    with pytest.raises(BadInput, match=name):
        Artifact(victim).verify()
    harmless = {("model.so", "padded"), ("model.so", "truncated"), ("vocab.bin", "missing")}
    if (name, change) not in harmless:
        with pytest.raises(BadInput, match=name):
            Model(str(victim))


def test_header_of_weights(victim: Path, compiled: Build) -> None:
    """The cheap check at load: magic, checksum, ABI version, size, and the model they belong to."""
    weights = victim / "weights.bin"
    for position in range(64):
        for _ in flipped(weights, position):
            with pytest.raises((BadInput, MachineMismatch), match=r"weights\.bin"):
                Model(str(victim))
    whole = weights.read_bytes()
    head = whole[:8] + struct.pack("<I", ABI_VERSION + 1) + whole[12:56]
    with weights.open("r+b") as stream:
        stream.write(head + struct.pack("<I", zlib.crc32(head)))
    with pytest.raises(MachineMismatch, match="ABI version"):
        Model(str(victim))
    with pytest.raises(BadInput, match="header"):
        Artifact(victim).verify()
    shutil.copyfile(compiled().artifact.weights_path, weights)
    with pytest.raises(BadInput, match="another model"):
        Model(str(victim))


# -- programs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``example("c_embed")``: the program, built with CMake."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        need("cmake")
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            call("cmake", "-S", ROOT / "examples" / name, "-B", folder,
                 f"-Dqigen_ROOT={ROOT / 'runtime'}")  # fmt: skip
            call("cmake", "--build", folder)
            built[name] = folder / name
        return built[name]

    return get


def reference() -> tuple[list[str], bytes]:
    """Arguments of the examples for the reference prompt, and what they must print."""
    data = json.loads((STORIES / "reference.json").read_text())
    arguments = [*map(str, data["prompt_ids"]), "-n", str(len(data["greedy_ids"]))]
    text = data["text"].lstrip().removeprefix(data["prompt"])
    return arguments, text.encode() + b"\n"


@pytest.mark.parametrize("name", ["c_embed", "cpp_embed"])
def test_examples_continue_the_story(
    stories: Stories, example: Callable[[str], Path], name: str
) -> None:
    arguments, text = reference()
    done = call(example(name), stories(), *arguments)
    assert done.stdout.encode() == text


def peak_of_c_example(program: Path, artifact: Path, arguments: list[str]) -> tuple[int, int]:
    """(peak resident bytes of the example, weights + cache of all positions + arena)."""
    # A process begins with the peak of the one that it was forked from: here a shell, not Python.
    done = call("sh", "-c", '"$@"; exit $?', "sh", program, artifact, *arguments)
    match = re.search(r"peak (\d+) KiB", done.stderr)
    assert match
    info = Model(str(artifact)).info
    kv = -(-info["max_seq"] // 64) * 64 * info["kv_bytes_per_position"]
    return 1024 * int(match[1]), info["weights_bytes"] + kv + info["arena_bytes"]


def test_memory_of_the_c_example(stories: Stories, example: Callable[[str], Path]) -> None:
    arguments, _ = reference()
    peak, model = peak_of_c_example(example("c_embed"), stories(), arguments)
    assert peak <= model + 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_memory_of_smollm2(
    smollm2_artifact: Callable[..., Path], example: Callable[[str], Path], activations: str
) -> None:
    artifact = smollm2_artifact(activations=activations, max_seq=2048)
    prompt = [str(token) for token in np.random.default_rng(1).integers(0, 49152, 600)]
    peak, model = peak_of_c_example(example("c_embed"), artifact, [*prompt, "-n", "40"])
    assert peak <= model + 32 * MIB


def test_cmake_package_of_the_model(stories: Stories, tmp_path: Path) -> None:
    """find_package(qigen_model) and one target_link_libraries embed the model in a C program."""
    need("cmake")
    artifact = Path(shutil.copytree(stories(), tmp_path / "model with a space.qgn"))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(app LANGUAGES C)\n"
        f'find_package(qigen_model CONFIG REQUIRED PATHS "{artifact}/cmake" NO_DEFAULT_PATH)\n'
        "add_executable(app main.c)\n"
        f"target_link_libraries(app PRIVATE {cmake_target(artifact)})\n"
        'target_compile_definitions(app PRIVATE "FOLDER=\\"${QIGEN_MODEL_FOLDER}\\"")\n'
    )
    header = (artifact / "model.h").read_text()
    vocab = re.search(r"#define (QIGEN_\w+_VOCAB) 512\n", header)
    assert vocab
    (tmp_path / "main.c").write_text(
        '#include <model.h>\n#include <stdio.h>\n'
        "int main(void) {\n"
        f"  static float logits[{vocab[1]}];\n"
        "  const int32_t prompt[] = {1, 403, 407, 261, 378};\n"
        "  qigen_model* model;\n  qigen_session* session;\n"
        "  if (qigen_model_load(FOLDER, NULL, &model) ||\n"
        "      qigen_session_create(model, 0, &session) ||\n"
        "      qigen_session_eval(session, prompt, 5, logits, 0)) {\n"
        '    fprintf(stderr, "%s\\n", qigen_last_error());\n    return 1;\n  }\n'
        f'  printf("%d\\n", (int)qigen_argmax(logits, {vocab[1]}));\n'
        "  qigen_session_free(session);\n  qigen_model_free(model);\n  return 0;\n}\n"
    )  # fmt: skip
    call("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror")
    call("cmake", "--build", tmp_path / "build")
    assert call(tmp_path / "build" / "app").stdout == "432\n"


def cmake_target(artifact: Path) -> str:
    config = (artifact / "cmake" / "qigen_model-config.cmake").read_text()
    match = re.search(r"add_library\((\S+) ", config)
    assert match
    return match[1]


# -- other machines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "isa", "status"),
    [
        ("Haswell", "avx512vnni", 6),
        ("Haswell", "avx2", 0),
        ("Nehalem", "avx2", 6),
        ("Opteron_G1", "scalar", 0),  # SSE2, the least of x86-64
    ],
)
def test_other_processors(
    stories: Stories, example: Callable[[str], Path], cpu: str, isa: str, status: int
) -> None:
    """On an emulated processor: run where the instruction set is there, refused where it is not."""
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("needs qemu-x86_64 (Debian: apt-get install qemu-user)")
    data = json.loads((STORIES / "reference.json").read_text())
    arguments = [*map(str, data["prompt_ids"]), "-n", "8"]
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, example("c_embed"), stories(isa=isa), *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    if status:
        lacking = "avx512f" if isa == "avx512vnni" else "avx2"
        assert lacking in done.stderr and "--target native" in done.stderr
    else:
        text = done.stdout.removesuffix("\n").encode()
        assert len(text) >= 8 and reference()[1].startswith(text)


@pytest.mark.parametrize("placement", ["partitioned", "interleaved", "replicated"])
def test_placements(
    stories: Stories, example: Callable[[str], Path], placement: str
) -> None:
    """What is for machines with several memory nodes computes the same here."""
    data = json.loads((STORIES / "reference.json").read_text())
    arguments = [*map(str, data["prompt_ids"]), "-n", "8"]
    done = subprocess.run(
        [example("c_embed"), stories(isa="scalar"), *arguments], capture_output=True, text=True,
        env={**os.environ, "QIGEN_PLACEMENT": placement},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n").encode()
    assert len(text) >= 8 and reference()[1].startswith(text)


# -- sanitizers -----------------------------------------------------------------------------------

LONG = (("context", 640), ("n_layers", 2))
SANITIZED: dict[str, tuple[Options, dict[str, object]]] = {
    ISAS[0]: (Options("llama", "hf", overrides=LONG), {"activations": "f32"}),
    "avx2": (
        Options("gemma3", overrides=(*LONG, ("window", 100))),
        {"activations": "int8", "kv": "int8"},
    ),
    "scalar": (
        Options("phi3", "hf", overrides=(*LONG, ("d_ff", 172), ("vocab_size", 97))),
        {"activations": "int8", "weights": "u4g128"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "sanitizers"),
    [(isa, "address,undefined") for isa in SANITIZED if isa in ISAS] + [("scalar", "thread")],
)
def test_sanitizers(tmp_path: Path, isa: str, sanitizers: str) -> None:
    """The artifact's own sources with the C example: a prompt longer than a step, then tokens past
    the first chunk of the context."""
    source, options = SANITIZED[isa]
    generated = tmp_path / "sources"
    artifact = compile(write_source(tmp_path, source), tmp_path / "m.qgn", isa=isa, jobs=JOBS,
                       keep_sources=generated, **options)  # type: ignore[arg-type]  # fmt: skip
    replaced = ("-O3", "-O2", "-fno-rtti")
    flags = [f for f in artifact.manifest["compiler"]["flags"]
             if f not in replaced and not f.startswith("-fvisibility")]  # fmt: skip
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
    include = ROOT / "runtime" / "include"

    def compile_one(file: Path) -> Path:
        target = tmp_path / f"{file.parent.name}-{file.stem}.o"
        own = flags if file.parent == generated else ["-std=c++17"]
        call("g++", *own, *sanitize, "-I", include, "-I", file.parent, "-c", file, "-o", target)
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        sources = [*generated.glob("*.cpp"), *(ROOT / "runtime" / "src").glob("*.cpp")]
        objects = list(pool.map(compile_one, sources))
    main = tmp_path / "main.o"
    call("gcc", "-std=gnu11", *sanitize, "-DQIGEN_STATIC", "-I", include, "-c",
         ROOT / "examples" / "c_embed" / "main.c", "-o", main)  # fmt: skip
    call("g++", *sanitize, "-pthread", main, *objects, "-o", tmp_path / "program")
    prompt = [str(3 + i * 7 % 90) for i in range(300)]
    done = call(tmp_path / "program", artifact.path, *prompt, "-n", "30")
    assert re.search(r"\d+ tokens, ", done.stderr)
