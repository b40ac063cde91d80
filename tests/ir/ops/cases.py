"""Models of many nodes, each with operands of its own, compared with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import qigen

MS = "com.microsoft"


class Cases:
    """A model in the making: every case is a node with operands of its own."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.feeds: dict[str, Any] = {}
        self.tolerance: dict[str, float] = {}

    def floats(self, *shape: int, scale: float = 1.0, dtype: Any = np.float32) -> Any:
        return (self.rng.standard_normal(shape) * scale).astype(dtype)

    def codes(self, *shape: int, dtype: Any = np.uint8) -> Any:
        info = np.iinfo(dtype)
        return self.rng.integers(info.min, info.max + 1, shape).astype(dtype)

    def case(
        self,
        op: str,
        feeds: list[Any],
        constants: list[Any],
        out: Any = np.float32,
        ranks: tuple[int, ...] = (),
        free: tuple[int, ...] = (0,),
        tolerance: float = 1e-5,
        domain: str = MS,
        **attrs: Any,
    ) -> None:
        """A node whose inputs are ``feeds`` of the run, then ``constants`` (None: absent).

        ``ranks`` are those of the results; by default there is one, as the first input's. ``free``
        are the axes of the first input that the model leaves open.
        """
        ranks = ranks or (feeds[0].ndim,)
        label = f"{op}{len(self.nodes)}"
        names = []
        for i, array in enumerate([*feeds, *constants]):
            name = f"{label}_i{i}" if array is not None else ""
            names.append(name)
            if array is None:
                continue
            array = np.asarray(array)
            if i < len(feeds):
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                open_axes = free if array.ndim > 1 else ()
                shape = [None if a in open_axes else d for a, d in enumerate(array.shape)]
                self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
                self.feeds[name] = array
            else:
                self.constants.append(numpy_helper.from_array(array, name))
        results = [f"{label}_o{i}" for i in range(len(ranks))]
        self.nodes.append(helper.make_node(op, names, results, label, domain=domain, **attrs))
        for result, rank in zip(results, ranks, strict=True):
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(out))
            self.outputs.append(helper.make_tensor_value_info(result, kind, [None] * rank))
            self.tolerance[result] = tolerance

    def model(self) -> onnx.ModelProto:
        """The model of all cases."""
        graph = helper.make_graph(self.nodes, "contrib", self.inputs, self.outputs, self.constants)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)],
            ir_version=10,
        )

    def check(self, folder: Path) -> None:
        """Compile and run the model: equal for all numbers of threads, and as onnxruntime's."""
        ort = pytest.importorskip("onnxruntime")
        onnx.save(self.model(), folder / "m.onnx")
        qigen.compile(folder / "m.onnx", folder / "m.qgn")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(
            str(folder / "m.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [o.name for o in self.outputs]
        wanted = dict(zip(names, session.run(names, self.feeds), strict=True))
        first: dict[str, Any] = {}
        for threads in (1, 2, 3):
            got = qigen.load(folder / "m.qgn", threads=threads).run(self.feeds)
            if threads == 1:
                first = got
            for name in names:
                assert got[name].tobytes() == first[name].tobytes(), f"{name}: threads"
        for name in names:
            assert first[name].shape == wanted[name].shape, name
            assert first[name].dtype == wanted[name].dtype, name
            apart = np.abs(first[name].astype(np.float64) - wanted[name].astype(np.float64))
            limit = self.tolerance[name]
            if wanted[name].dtype.kind == "f":
                limit = limit * (1 + np.abs(wanted[name].astype(np.float64)))
            assert (apart <= limit).all(), f"{name}: {apart.max()}"
