"""How fast an artifact is, beside what memory allows and beside its peers.

Every side runs in a process of its own (:mod:`qigen.bench_worker`); all stay loaded and take turns,
so that a disturbance of the machine hits all of them, and ratios are medians over such pairs. The
read bandwidth of the memory is measured in every turn as well.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from qigen import _runtime, targets
from qigen.artifact import Artifact
from qigen.errors import BadInput, QigenError, Unsupported, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

Progress = Callable[[str, int, int], None]

PHASES = ("prefill", "decode")
PEERS = ("llama.cpp",)

# llama.cpp's settings that make it faster for some models and slower for others; the best for each
# phase counts.
_LLAMA_SETTINGS = tuple(
    {"repack": repack, "flash_attention": flash}
    for repack in (True, False)
    for flash in (True, False)
)
_TRIALS = 2  # runs that choose among them
_STREAM_BYTES = 256 << 20
_STREAM_CACHES = 4  # times the last cache's size at least
_PREFILL = 512
_DECODE = 64

# without the working directory: in a checkout it would hide the installed package
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + [{!r}]; "
    "from {} import main; main()"
)


def stream_read_gb_s(threads: int) -> float:
    """GB/s that ``threads`` threads read from memory together, one sequential stream each.

    The buffer is 256 MiB or four times the last cache, if a quarter of the free memory allows.
    """
    size = max(_STREAM_BYTES, _STREAM_CACHES * targets.native().l3_bytes)
    limit = max(psutil.virtual_memory().available // 4, threads << 20)
    return _runtime.stream_read_gb_s(threads, min(size, limit))


def bench(
    path: str | os.PathLike[str],
    *,
    prefill: int | None = None,
    decode: int | None = None,
    context: int = 0,
    batch: int = 1,
    threads: int = 0,
    pin: bool = False,
    repeat: int = 5,
    peers: Sequence[str] = (),
    peer_model: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an artifact; the keys of the result are those of ``qigen bench --json``.

    ``prefill``: tokens of a prompt (512, or what the model has room for), from an empty cache.
    ``decode``: single tokens after ``context`` others, in ``batch`` sequences at a time (64). No
    token is chosen. ``peers`` run ``peer_model``, by default the GGUF that the artifact was made
    of, with the same threads. 'tok_s' is the median of ``repeat`` runs, 'gb_s' the bytes of weights
    read a second, 'first_token_s' the time from the loaded model to the logits after its first
    prompt of ``prefill`` tokens (what is done at load or at first use is in one of 'load_s' and
    'first_token_s'), 'ratio' ours by theirs, of speeds.

    Raises UsageError, BadInput, MachineMismatch; Unsupported if a peer is unknown or not installed.
    """
    artifact = Artifact(path)
    if artifact.is_graph:
        raise Unsupported(
            "this is no language model; measure it with qigen.bench_graph", str(artifact.path)
        )
    limits = artifact.manifest["limits"]
    tokens = {
        "prefill": min(_PREFILL, limits["max_seq"]) if prefill is None else prefill,
        "decode": min(_DECODE, limits["max_seq"] - context) if decode is None else decode,
    }
    if min(tokens.values()) < 1 or context < 0 or batch < 1 or repeat < 1:
        raise UsageError("a benchmark needs at least one token, sequence and repeat")
    positions = max(tokens["prefill"], context + tokens["decode"])
    if positions > limits["max_seq"]:
        raise UsageError(
            f"{positions} positions are asked for but the model has {limits['max_seq']}; compile "
            "it with a larger --max-seq"
        )
    if batch > limits["max_batch"]:
        raise UsageError(
            f"a batch of {batch} is asked for but the model takes {limits['max_batch']}; compile "
            "it with a larger --max-batch"
        )
    _check_peers(peers)
    model = _peer_model(artifact, peer_model) if peers else None
    report = progress or (lambda stage, done, total: None)
    run = _Run(tokens, context, batch)

    with contextlib.ExitStack() as stack:
        report("load", 0, 1)
        before = psutil.cpu_times()
        ours = Worker(
            "qigen", path=str(path), threads=threads, pin=pin, positions=positions, batch=batch
        )
        stack.enter_context(ours)
        threads = ours.threads
        first = {"qigen": run.warm_up(ours)}
        sides = {"qigen": dict.fromkeys(PHASES, ours)}
        settings: dict[str, dict[str, Any]] = {}
        for name in peers:
            options = {
                "path": str(model), "threads": threads, "positions": positions, "batch": batch
            }  # fmt: skip
            settings[name] = run.best_settings(name, options, report)
            workers: list[tuple[dict[str, Any], Worker]] = []
            for chosen in settings[name].values():
                if chosen not in [known for known, _ in workers]:
                    worker = stack.enter_context(Worker(name, **options, **chosen))
                    seconds = run.warm_up(worker)
                    if chosen == settings[name]["prefill"]:
                        first[name] = seconds
                    workers.append((chosen, worker))
            sides[name] = {
                phase: next(w for known, w in workers if known == settings[name][phase])
                for phase in PHASES
            }
        report("load", 1, 1)

        streams: list[float] = []
        rates: dict[str, dict[str, list[float]]] = {
            name: {phase: [] for phase in PHASES} for name in sides
        }
        for turn in range(repeat):
            report("measure", turn, repeat)
            # Nobody always goes first.
            order = list(sides) if turn % 2 == 0 else list(reversed(sides))
            for phase in PHASES:
                for name in order:
                    rates[name][phase].append(run.rate(sides[name][phase], phase))
            streams.append(stream_read_gb_s(threads))
        report("measure", repeat, repeat)
        stream = statistics.median(streams)
        memory = {name: side["decode"].ask(do="memory") for name, side in sides.items()}
        after = psutil.cpu_times()

    def result(name: str, weight_bytes: int) -> dict[str, Any]:
        side = sides[name]["decode"]
        values: dict[str, Any] = {
            "threads": threads,
            "weight_bytes": weight_bytes,
            "peak_rss_bytes": memory[name]["peak_rss_bytes"],
            "load_s": side.load_s,
            "first_token_s": first[name],
        }
        for phase in PHASES:
            runs = rates[name][phase]
            values[phase] = {"tokens": tokens[phase], "tok_s": statistics.median(runs)}
            if phase == "decode":
                gb_s = weight_bytes * values[phase]["tok_s"] / batch / 1e9
                values[phase] |= {"gb_s": gb_s, "fraction_of_stream": gb_s / stream}
            values[phase]["runs"] = runs
            if name in settings:
                values[phase]["settings"] = settings[name][phase]
        return values

    summary = result("qigen", artifact.manifest["weights_read_per_token"])
    summary |= {
        "stream_read_gb_s": stream,
        "stream_read_runs": streams,
        "model": artifact.manifest["name"],
        "isa": artifact.manifest["target"]["isa"],
        "batch": batch,
        "context": context,
        "machine": machine(before, after),
        "peers": {},
    }
    for name in peers:
        assert model is not None
        entry = result(name, gguf_bytes_read_per_token(model))
        entry["ratio"] = {
            phase: statistics.median(
                mine / theirs
                for mine, theirs in zip(rates["qigen"][phase], rates[name][phase], strict=True)
            )
            for phase in PHASES
        }
        entry["ratio"]["first_token"] = first[name] / first["qigen"]
        entry["model"] = str(model)
        entry["version"] = importlib.metadata.version("llama-cpp-python")
        summary["peers"][name] = entry
    return summary


class _Run:
    """What is measured."""

    def __init__(self, tokens: dict[str, int], context: int, batch: int) -> None:
        self.tokens = tokens
        self.context = context
        self.batch = batch

    def rate(self, worker: Worker, phase: str) -> float:
        """Tokens a second."""
        prefill = phase == "prefill"
        count = self.tokens[phase]
        seconds = worker.ask(
            do=phase, tokens=count, batch=self.batch, context=0 if prefill else self.context
        )["seconds"]
        return count * (1 if prefill else self.batch) / float(seconds)

    def warm_up(self, worker: Worker) -> float:
        """One run of each phase, so that memory is resident and clocks are up; the seconds of the
        first, a prompt."""
        first = self.tokens["prefill"] / self.rate(worker, "prefill")
        self.rate(worker, "decode")
        return first

    def best_settings(
        self, name: str, options: dict[str, Any], report: Progress
    ) -> dict[str, dict[str, Any]]:
        """The settings of a peer that are fastest in a trial, by phase."""
        best: dict[str, tuple[float, dict[str, Any]]] = {}
        for done, candidate in enumerate(_LLAMA_SETTINGS):
            report(f"settings of {name}", done, len(_LLAMA_SETTINGS))
            with Worker(name, **options, **candidate) as worker:
                self.warm_up(worker)
                for phase in PHASES:
                    rate = max(self.rate(worker, phase) for _ in range(_TRIALS))
                    if phase not in best or rate > best[phase][0]:
                        best[phase] = (rate, candidate)
        report(f"settings of {name}", len(_LLAMA_SETTINGS), len(_LLAMA_SETTINGS))
        return {phase: candidate for phase, (_, candidate) in best.items()}


class Worker:
    """A side in its own process. Use as a context manager.

    It stands still between requests: threads that wait in a loop would take the others' time.
    """

    module = "qigen.bench_worker"

    def __init__(
        self, side: str, environment: Mapping[str, str] | None = None, /, **options: Any
    ) -> None:
        self.side = side
        # What libraries print is wanted only if the process fails.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed in __exit__
        # Last on the path, so that an installed package is taken as it is.
        start = _START.format(str(Path(__file__).resolve().parents[1]), self.module)
        self._process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._process.pid
        try:
            self.loaded = self.ask(side=side, **options)
        except BaseException:
            self._close()
            raise
        self.load_s = float(self.loaded["load_s"])
        self.threads = int(self.loaded["threads"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises what the process reports."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.send_signal(signal.SIGCONT)
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
        except BrokenPipeError:
            line = ""
        if not line:
            self._stderr.seek(0)
            text = self._stderr.read().decode("utf-8", "replace").strip()
            last = text.splitlines()[-1] if text else f"exit code {process.wait()}"
            raise QigenError(f"its process ended: {last}", self.side)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = answer["error"]
            classes: tuple[type[QigenError], ...] = (QigenError, *QigenError.__subclasses__())
            kinds = {kind.kind: kind for kind in classes}
            raise kinds[error["kind"]](error["message"], error["where"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


def _check_peers(names: Sequence[str]) -> None:
    for name in names:
        if name not in PEERS:
            raise Unsupported(f"peer '{name}' is not known; there is {', '.join(PEERS)}")
    for name in names:
        if importlib.util.find_spec("llama_cpp") is None:
            raise Unsupported(
                "llama-cpp-python is not installed; install it with pip install 'qigen[bench]'",
                name,
            )


def _peer_model(artifact: Artifact, given: str | os.PathLike[str] | None) -> Path:
    """The GGUF file that peers run."""
    source = artifact.manifest["source"]
    if given is None and source["container"] != "gguf":
        raise UsageError(
            "the artifact was not made of a GGUF file; give the peers one with --peer-model"
        )
    model = Path(source["path"] if given is None else given)
    if not model.is_file():
        raise BadInput("there is no such file; give the GGUF with --peer-model", str(model))
    return model


def gguf_bytes_read_per_token(path: str | os.PathLike[str]) -> int:
    """Bytes of a GGUF file's tensors that a decode step streams.

    All but the embedding, of which a step reads one row, unless it is the output matrix too; of
    experts those of as many as are chosen.
    """
    from qigen.frontends.gguf import read_gguf

    file = read_gguf(Path(path))
    looked_up = {"token_embd.weight"} if "output.weight" in file.tensors else set()
    architecture = file.fields.get("general.architecture")
    experts = int(file.fields.get(f"{architecture}.expert_count", 0))
    used = int(file.fields.get(f"{architecture}.expert_used_count", 0))
    return sum(
        len(t.data) * used // experts if experts and "_exps." in name else len(t.data)
        for name, t in file.tensors.items()
        if name not in looked_up
    )


def machine(before: Any, after: Any) -> dict[str, Any]:
    """The machine and what else went on while it was measured."""
    elapsed = sum(after) - sum(before)
    steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return {
        "processor": targets.native().description,
        "cores": len(psutil.Process().cpu_affinity()),
        "system": platform.platform(),
        "load_average": list(os.getloadavg()),
        "steal_fraction": steal / elapsed if elapsed else 0.0,
        "memory_bytes": psutil.virtual_memory().total,
    }
