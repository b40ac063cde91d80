"""ONNX Runtime as a peer of ``qigen bench-kernel``."""

from __future__ import annotations

import time

import numpy as np

from qigen.formats.catalog import by_name
from qigen.kernel_peers.base import Array, copies, shared_codes, weight
from qigen.tuning.problem import random_x


class OnnxRuntime:
    """MatMulNBits; ``level`` is its accuracy_level: 4 rounds activations to int8, 0 does not."""

    def __init__(
        self, format: str, n: int, k: int, m: int, threads: int, total: int, level: int
    ) -> None:
        import onnxruntime as ort  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from onnx import TensorProto, helper, numpy_helper

        row = by_name(format)
        shared_codes(row, (2, 4, 8), (16, 32, 64, 128, 256))
        start = time.perf_counter()
        codes, scales = weight(row, n, k)
        width, per = row.code_bits, 8 // row.code_bits
        parts = codes.reshape(n, codes.shape[1], -1, per).astype(np.uint8)
        packed = np.zeros(parts.shape[:3], np.uint8)
        for i in range(per):
            packed |= parts[..., i] << np.uint8(width * i)
        s = scales.astype(np.float32).reshape(-1)
        self.count = copies(packed.nbytes + s.nbytes, total, m)
        tensors, nodes, outputs = [], [], []
        for i in range(self.count):
            tensors.append(numpy_helper.from_array(packed, f"w{i}"))
            tensors.append(numpy_helper.from_array(s, f"s{i}"))
            nodes.append(
                helper.make_node(
                    "MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
                    K=k, N=n, bits=width, block_size=row.group, accuracy_level=level,
                )
            )  # fmt: skip
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, n]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])
        graph = helper.make_graph(nodes, "g", [x], outputs, tensors)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.x = random_x(m, k)
        self.y = [np.empty((m, n), np.float32) for _ in range(self.count)]
        self.binding = self.session.io_binding()
        self.binding.bind_cpu_input("x", self.x)
        for i, y in enumerate(self.y):
            self.binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        self.threads, self.load_s = threads, time.perf_counter() - start
        self.about = {"version": ort.__version__, "setting": f"accuracy_level={level}"}

    def run(self) -> int:
        """See :class:`Peer`."""
        self.session.run_with_iobinding(self.binding)
        return self.count

    def result(self) -> Array:
        """See :class:`Peer`."""
        return self.y[-1]
