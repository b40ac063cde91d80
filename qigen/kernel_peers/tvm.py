"""Apache TVM as a peer: of ``qigen bench-kernel``, and what ``qigen bench`` needs of it.

Untuned is what TVM makes of a computation without searching; tuned is the best of ``TRIALS`` random
schedules of its MetaSchedule, built and timed in this process, which is the peer's own.
"""

from __future__ import annotations

import importlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from qigen.errors import ToolchainError, Unsupported
from qigen.formats.catalog import by_name
from qigen.kernel_peers.base import Array, copies, shared_codes, weight
from qigen.tuning.problem import random_x

TRIALS = 64
"""Schedules of a computation that tuning tries."""

_TURNS = 3  # of a schedule; the median counts
_A_ROUND = 8  # schedules that are built before they are timed

_OTHERS = ("cuda", "hexagon", "metal", "riscv_cpu", "rocm")


class Tvm:
    """The modules of TVM with this machine as the target; ToolchainError where it cannot compile.

    ``threads`` are those of its pool, which is made when it is first used in a process.
    """

    def __init__(self, threads: int) -> None:
        os.environ["TVM_NUM_THREADS"] = str(threads)
        # it parses the tensor instructions of every processor when it tunes: 40 s
        for name in _OTHERS:
            module = f"tvm.s_tir.tensor_intrin.{name}"
            sys.modules.setdefault(module, ModuleType(module))
        try:
            self.tvm: Any = importlib.import_module("tvm")
            self.relax: Any = importlib.import_module("tvm.relax")
            self.te: Any = importlib.import_module("tvm.te")
            self.dlight: Any = importlib.import_module("tvm.s_tir.dlight")
        except (ImportError, AttributeError) as error:  # of an interface that does not fit
            raise ToolchainError(f"this TVM cannot be used: {error}", "tvm") from None
        if not self.tvm.runtime.enabled("llvm"):
            raise ToolchainError("this TVM was built without LLVM", "tvm")
        codegen = importlib.import_module("tvm.target.codegen")
        self.target = self.tvm.target.Target(
            {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "num-cores": threads}
        )
        self.version = f"{self.tvm.__version__} (LLVM {codegen.llvm_version_major()})"

    def tensor(self, array: Array) -> Any:
        """A copy of an array that TVM's functions take."""
        return self.tvm.runtime.tensor(array)

    def tuning(self) -> Any:
        """The module of MetaSchedule."""
        try:
            return importlib.import_module("tvm.s_tir.meta_schedule")
        except ImportError as error:
            raise ToolchainError(f"TVM cannot tune without a package: {error}", "tvm") from None

    def options(self, tuning: Any, trials: int) -> dict[str, Any]:
        """The arguments of its tuning functions: so many random schedules of every computation,
        built and timed in this process."""
        measure = _in_process(self, tuning)
        # it makes its own, and a second search in a process stumbles over those of the first
        logging.getLogger(tuning.__name__).handlers.clear()
        return {
            "num_trials_per_iter": min(_A_ROUND, trials), "max_trials_per_task": trials,
            "cost_model": "random", "strategy": "replay-trace", "database": "memory",
            "builder": measure[0], "runner": measure[1], "seed": 1,
            "measure_callbacks": [tuning.measure_callback.AddToDatabase()],
        }  # fmt: skip


def _in_process(side: Tvm, tuning: Any) -> tuple[Any, Any]:
    """(builder, runner): those of MetaSchedule start Python again for every schedule."""
    derived: Callable[[type], Any] = importlib.import_module("tvm.ir.utils").derived_object
    built: dict[str, Any] = {}

    def build(self: Any, inputs: Any) -> list[Any]:
        results = []
        for each in inputs:
            try:
                name = str(len(built))
                built[name] = side.tvm.compile(each.mod, target=each.target)
                results.append(tuning.builder.BuilderResult(name, None))
            except Exception as error:  # a schedule that cannot be built is none
                results.append(tuning.builder.BuilderResult(None, str(error)[:200]))
        return results

    def run(self: Any, inputs: Any) -> list[Any]:
        futures = []
        for each in inputs:
            arguments = [
                side.tensor(np.ones(tuple(map(int, info.shape)), str(info.dtype)))
                for info in each.args_info
            ]
            function = built.pop(each.artifact_path)["main"]
            function(*arguments)
            times = []
            for _ in range(_TURNS):
                start = time.perf_counter()
                function(*arguments)
                times.append(time.perf_counter() - start)
            result = tuning.runner.RunnerResult([statistics.median(times)], None)
            futures.append(tuning.runner.RunnerFuture(
                f_done=lambda: True, f_result=lambda result=result: result))
        return futures

    builder = type("Builder", (tuning.builder.PyBuilder,), {"build": build})
    runner = type("Runner", (tuning.runner.PyRunner,), {"run": run})
    return derived(builder)(), derived(runner)()


class TvmProduct:
    """A product by codes and scales that TVM unpacks; ``schedule`` is 'none', 'dlight' (its rules
    for products of a vector) or 'tuned'."""

    def __init__(
        self, format: str, n: int, k: int, m: int, threads: int, total: int, schedule: str
    ) -> None:
        row = by_name(format)
        shared_codes(row, (4, 8), (16, 32, 64, 128, 256))
        if k % row.group:
            raise Unsupported("it multiplies whole groups of columns")
        start = time.perf_counter()
        side = Tvm(threads)
        function = _scheduled(side, _product(side, row.code_bits, row.group, m, n, k), schedule)
        self.function = side.tvm.compile(function, target=side.target)["main"]
        codes, scales = weight(row, n, k)
        raw = codes.reshape(n, k).astype(np.uint8)
        if row.code_bits == 4:
            raw = raw[:, ::2] | raw[:, 1::2] << np.uint8(4)
        self.count = copies(raw.nbytes + scales.nbytes, total, m)
        self.weights = [
            (side.tensor(raw), side.tensor(np.ascontiguousarray(scales)))
            for _ in range(self.count)
        ]
        self.x = side.tensor(random_x(m, k))
        self.y = side.tensor(np.zeros((m, n), np.float32))
        self.threads, self.load_s = threads, time.perf_counter() - start
        tuned = f"{TRIALS} trials" if schedule == "tuned" else f"untuned, schedule={schedule}"
        self.about = {"version": side.version, "setting": tuned}

    def run(self) -> int:
        """See :class:`Peer`."""
        for codes, scales in self.weights:
            self.function(self.x, codes, scales, self.y)
        return self.count

    def result(self) -> Array:
        """See :class:`Peer`."""
        y: Array = self.y.numpy()
        return y


def _product(side: Tvm, bits: int, group: int, m: int, n: int, k: int) -> Any:
    """y float32 [m, n] = x [m, k] by codes uint8 [n, k * bits / 8] and scales float16."""
    te, tirx = side.te, importlib.import_module("tvm.tirx")
    per = 8 // bits
    x = te.placeholder((m, k), "float32", name="x")
    codes = te.placeholder((n, k // per), "uint8", name="codes")
    scales = te.placeholder((n, k // group), "float16", name="scales")

    def value(i: Any, j: Any) -> Any:
        code = codes[i, j // per]
        if per > 1:
            shift = (j % per * bits).astype("uint8")
            code = (code >> shift) & tirx.const((1 << bits) - 1, "uint8")
        centred = code.astype("float32") - float(1 << (bits - 1))
        return centred * scales[i, j // group].astype("float32")

    w = te.compute((n, k), value, name="w")
    r = te.reduce_axis((0, k), name="r")
    y = te.compute((m, n), lambda i, j: te.sum(x[i, r] * w[j, r], axis=r), name="y")
    function = te.create_prim_func([x, codes, scales, y]).with_attr("global_symbol", "main")
    return side.tvm.IRModule({"main": function})


def _scheduled(side: Tvm, module: Any, schedule: str) -> Any:
    if schedule == "dlight":
        rules = side.dlight.cpu
        with side.target:
            return side.dlight.ApplyDefaultSchedule(rules.GEMV(), rules.Reduction())(module)
    if schedule == "tuned":
        tuning = side.tuning()
        with tempfile.TemporaryDirectory(prefix="qigen-tvm-") as folder:
            found = tuning.tir_integration.tune_tir(
                module, side.target, folder, TRIALS, num_tuning_cores=1,
                **side.options(tuning, TRIALS),
            )  # fmt: skip
            best = tuning.tir_integration.compile_tir(found, module, side.target)
        if best is None:
            raise ToolchainError("none of the schedules that TVM tried works", "tvm")
        return best.mod
    return module
