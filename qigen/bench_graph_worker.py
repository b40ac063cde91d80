"""One side of a benchmark of a graph model, in a process of its own; see :mod:`qigen.bench_worker`.

Sides are run on the same arrays. What makes a model of another precision is a side too, so that the
memory it takes is not counted.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray

from qigen import bench_worker
from qigen.errors import ToolchainError, Unsupported

Array = NDArray[Any]
Specification = list[dict[str, str]]
"""Of every input 'name', 'file' (.npy) and 'dtype'."""


class Side(Protocol):
    """A loaded model with its inputs."""

    threads: int
    load_s: float

    def run(self) -> list[Array]:
        """The outputs, in the model's order."""


def load_arrays(inputs: Specification) -> dict[str, Array]:
    """The arrays; numpy's files do not know the types of ml_dtypes, so they are named apart."""
    arrays = {}
    for entry in inputs:
        array = np.load(entry["file"])
        if array.dtype.kind == "V":
            array = array.view(np.dtype(getattr(ml_dtypes, entry["dtype"])))
        arrays[entry["name"]] = array
    return arrays


class Qigen:
    """An artifact."""

    def __init__(self, path: str, inputs: Specification, threads: int, pin: bool) -> None:
        from qigen.model import load

        self.arrays = load_arrays(inputs)
        start = time.perf_counter()
        self.model = load(path, threads, pin)
        self.load_s = time.perf_counter() - start
        self.threads = self.model.info["threads"]

    def run(self) -> list[Array]:
        """See :class:`Side`."""
        return list(self.model.run(self.arrays).values())


class OnnxRuntime:
    """ONNX Runtime with all optimisations, its defaults but for the number of threads."""

    def __init__(
        self, path: str, inputs: Specification, threads: int, fixed: dict[str, int]
    ) -> None:
        import onnxruntime as ort  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.arrays = load_arrays(inputs)
        self.threads = threads
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        for name, size in fixed.items():
            options.add_free_dimension_override_by_name(name, size)
        start = time.perf_counter()
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            raise ToolchainError(f"ONNX Runtime cannot load it ({_line(error)})", path) from None
        self.load_s = time.perf_counter() - start
        self.about = {"version": ort.__version__}

    def run(self) -> list[Array]:
        """See :class:`Side`."""
        return list(self.session.run(None, self.arrays))


class OpenVino:
    """OpenVINO on the CPU, for latency."""

    def __init__(
        self, path: str, inputs: Specification, threads: int, fixed: bool, precision: str
    ) -> None:
        import openvino as ov  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.threads = threads
        arrays = load_arrays(inputs)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
        }
        start = time.perf_counter()
        try:
            core = ov.Core()
            model = core.read_model(path)
            if fixed:
                model.reshape({name: list(array.shape) for name, array in arrays.items()})
            self.compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise ToolchainError(f"OpenVINO cannot load it ({_line(error)})", path) from None
        self.load_s = time.perf_counter() - start
        self.request = self.compiled.create_infer_request()
        self.arrays = arrays
        self.about = {"version": ov.__version__.partition("-")[0]}

    def run(self) -> list[Array]:
        """See :class:`Side`."""
        results = self.request.infer(self.arrays, share_inputs=True)
        return [results[port] for port in self.compiled.outputs]


class Tvm:
    """TVM's importer and compiler; ``trials`` schedules of every fused operator are tried (0: none,
    as it comes)."""

    def __init__(self, path: str, inputs: Specification, threads: int, trials: int) -> None:
        from qigen.kernel_peers.tvm import Tvm as Side

        arrays = load_arrays(inputs)
        self.threads = threads
        start = time.perf_counter()
        side = Side(threads)
        relax: Any = side.relax
        frontend: Any = importlib.import_module("tvm.relax.frontend.onnx")
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        try:
            module = frontend.from_onnx(onnx.load(path), shape_dict=shapes)
            module = relax.transform.DecomposeOpsForInference()(module)
            with side.target:
                module = relax.get_pipeline("zero")(module)
            order = [str(p.name) for p in module["main"].params]
            built = self._tuned(side, module, trials) if trials else side.tvm.compile(
                module, target=side.target
            )
        except Exception as error:
            raise ToolchainError(f"TVM cannot compile it ({_line(error)})", path) from None
        self.machine = relax.VirtualMachine(built, side.tvm.cpu())
        self.arrays = [side.tensor(arrays[name]) for name in order]
        self.load_s = time.perf_counter() - start
        tuned = f"{trials} trials an operator" if trials else "untuned"
        self.about = {"version": f"{side.version}, {tuned}"}

    @staticmethod
    def _tuned(side: Any, module: Any, trials: int) -> Any:
        tuning = side.tuning()
        with tempfile.TemporaryDirectory(prefix="qigen-tvm-") as folder:
            tasks = len(tuning.relax_integration.extract_tasks(module, side.target))
            found = tuning.relax_integration.tune_relax(
                module, {}, side.target, folder, trials * tasks,
                **side.options(tuning, trials),
            )  # fmt: skip
            return tuning.relax_integration.compile_relax(found, module, side.target, {})

    def run(self) -> list[Array]:
        """See :class:`Side`."""
        found: Any = self.machine["main"](*self.arrays)
        outputs = [found] if hasattr(found, "numpy") else list(found)
        return [
            output.numpy() if hasattr(output, "numpy") else np.array(list(output), np.int64)
            for output in outputs  # a shape is none of TVM's tensors
        ]


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


# ---- models of other precisions ------------------------------------------------------------------


class _Prepared:
    """A side that has done its work when it is loaded."""

    threads, load_s = 1, 0.0

    def run(self) -> list[Array]:
        """Nothing is there to run."""
        return []


class OnnxRuntimeInt8(_Prepared):
    """Writes an int8 model for ONNX Runtime: dynamic quantization of products if there are no
    convolutions, else static with the inputs as calibration data."""

    def __init__(self, path: str, inputs: Specification, output: str) -> None:
        import onnxruntime as ort
        from onnxruntime import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            quantization as q,
        )

        model = onnx.load(path)
        folder = Path(output).parent
        prepared = str(folder / "prepared.onnx")
        try:
            # scales by channel need opset 13
            if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 13:
                model = onnx.version_converter.convert_version(model, 13)
            q.shape_inference.quant_pre_process(model, prepared, skip_symbolic_shape=True)
        except Exception:  # it is not needed, only better
            prepared = path
        try:
            if any(node.op_type == "Conv" for node in model.graph.node):
                q.quantize_static(
                    prepared, output, _Reader(load_arrays(inputs)), per_channel=True,
                    quant_format=q.QuantFormat.QDQ,
                )  # fmt: skip
            else:
                q.quantize_dynamic(
                    prepared, output, op_types_to_quantize=["MatMul"], per_channel=True,
                    weight_type=q.QuantType.QInt8,
                )  # fmt: skip
            ort.InferenceSession(output, providers=["CPUExecutionProvider"])  # is it one?
        except Exception as error:
            problem = f"ONNX Runtime cannot quantize it ({_line(error)})"
            raise ToolchainError(problem, path) from None
        finally:
            (folder / "prepared.onnx").unlink(missing_ok=True)


class _Reader:
    """Calibration data: one sample."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self.rest = [arrays]

    def get_next(self) -> dict[str, Array] | None:
        """The next sample."""
        return self.rest.pop() if self.rest else None

    def rewind(self) -> None:
        """Only one pass is made."""


class OpenVinoInt8(_Prepared):
    """Writes an int8 model for OpenVINO, quantized by nncf with the inputs as calibration data."""

    def __init__(self, path: str, inputs: Specification, output: str) -> None:
        import nncf  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import openvino as ov

        arrays = load_arrays(inputs)
        transformer = not any(
            node.op_type == "Conv" for node in onnx.load(path, load_external_data=False).graph.node
        )
        try:
            model = nncf.quantize(
                ov.Core().read_model(path),
                nncf.Dataset([arrays]),
                subset_size=1,
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            )
            ov.save_model(model, output, compress_to_fp16=False)
        except Exception as error:
            raise ToolchainError(f"nncf cannot quantize it ({_line(error)})", path) from None


SIDES: dict[str, Callable[..., Side]] = {
    "qigen": Qigen,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "tvm": Tvm,
    "tvm-tuned": Tvm,
    "onnxruntime-int8": OnnxRuntimeInt8,
    "openvino-int8": OpenVinoInt8,
}


def serve(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Answers a request: 'memory', 'run' so many times after one that does not count, or 'outputs'
    into a folder."""
    if request["do"] == "memory":
        return {"peak_rss_bytes": bench_worker.peak_rss_bytes()}
    if request["do"] == "outputs":
        outputs = side.run()
        for i, array in enumerate(outputs):
            np.save(Path(request["folder"]) / f"{i}.npy", _widened(array))
        return {"count": len(outputs)}
    try:
        side.run()
        seconds = []
        for _ in range(request["runs"]):
            start = time.perf_counter()
            side.run()
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # those of peers have no common class
        raise ToolchainError(f"a run failed ({_line(error)})") from None
    return {"seconds": seconds}


def _widened(array: Array) -> Array:
    """As numbers that can be compared; 64 bits hold all types but long integers."""
    if array.dtype == object:
        raise Unsupported("outputs that are strings cannot be compared")
    return np.asarray(array, np.float64)


def main() -> None:
    """See :func:`qigen.bench_worker.main`."""
    bench_worker.main(SIDES, serve)


if __name__ == "__main__":
    main()
