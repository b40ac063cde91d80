"""OpenVINO as a peer of ``qigen bench-kernel``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from qigen.formats.catalog import by_name
from qigen.kernel_peers.base import Array, copies, shared_codes, weight
from qigen.tuning.problem import random_x


class OpenVino:
    """A product by compressed weights; ``precision`` f32 or bf16, or int8 for activations that are
    rounded in groups (dynamic quantization)."""

    def __init__(
        self, format: str, n: int, k: int, m: int, threads: int, total: int, precision: str
    ) -> None:
        import openvino as ov  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from openvino import opset13 as op

        row = by_name(format)
        shared_codes(row, (4, 8), (16, 32, 64, 128, 256))
        start = time.perf_counter()
        codes, scales = weight(row, n, k)
        shape = codes.shape
        x = op.parameter([m, k], ov.Type.f32, name="x")
        self.keep: list[Any] = []
        raw = codes
        if row.code_bits == 4:
            pairs = codes.reshape(-1, 2)
            raw = np.ascontiguousarray(pairs[:, 0] | pairs[:, 1] << np.uint8(4))
        self.count = copies(raw.nbytes + scales.nbytes, total, m)
        results = []
        for i in range(self.count):
            # of every copy one scale is a bit different: equal constants would become one
            own = scales.copy()
            own[0, 0] += np.float16(1e-5 * (self.count - 1 - i))
            if row.code_bits == 4:
                data = raw.copy()
                tensor = ov.Tensor(data, ov.Shape(shape), ov.Type.u4)
                self.keep.append((data, tensor))
                zero = ov.Tensor(np.array([8], np.uint8), ov.Shape([1, 1, 1]), ov.Type.u4)
            else:
                tensor = ov.Tensor(raw.copy())
                zero = ov.Tensor(np.array([[[128]]], np.uint8))
            w = op.subtract(
                op.convert(op.constant(tensor), ov.Type.f16),
                op.convert(op.constant(zero), ov.Type.f16),
            )
            w = op.multiply(w, op.constant(own[..., None]))
            w = op.reshape(w, op.constant(np.array([n, k], np.int64)), False)
            results.append(op.result(op.matmul(x, op.convert(w, ov.Type.f32), False, True)))
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": row.group if precision == "int8" else 0,
        }  # fmt: skip
        model = ov.Model(results, [x], "m")
        self.request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        self.request.set_input_tensor(ov.Tensor(random_x(m, k)))
        self.threads, self.load_s = threads, time.perf_counter() - start
        self.about = {"version": ov.__version__, "setting": f"activations={precision}"}

    def run(self) -> int:
        """See :class:`Peer`."""
        self.request.start_async()
        self.request.wait()
        return self.count

    def result(self) -> Array:
        """See :class:`Peer`."""
        return np.array(self.request.get_output_tensor(self.count - 1).data)
