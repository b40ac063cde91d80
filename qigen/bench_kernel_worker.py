"""A peer of ``qigen bench-kernel`` in a process of its own; see :mod:`qigen.bench_worker`.

A peer multiplies by the same codes and scales as our kernel, where it knows the format. It is given
many copies of the weight, so that every call reads one that is not in the caches, and its result is
compared with the same reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qigen import bench_worker
from qigen.errors import Unsupported
from qigen.formats.algebra import Format
from qigen.formats.catalog import by_name
from qigen.tuning.problem import ROWS, random_rows, random_x

Array = npt.NDArray[Any]

_NODES = 512  # products of one run at most


class Peer(Protocol):
    """A loaded peer. ``version`` and ``setting`` say what was measured."""

    threads: int
    load_s: float
    about: dict[str, str]

    def run(self) -> int:
        """Multiplies some times in turn by different weights; how many."""

    def result(self) -> Array:
        """float32 [m, n]: x W^T of the last run."""


def shared_codes(format: Format, bits: tuple[int, ...], groups: tuple[int, ...]) -> None:
    """Unsupported unless the format is (code - 2^(bits-1)) * scale with such bits and groups."""
    plain = format.float_kind is None and format.table is None and not format.base3
    symmetric = plain and {(f.name, f.scope) for f in format.fields} == {
        ("codes", "block"), ("d", "block")
    } and format.field("d").number == "f16"  # fmt: skip
    if not symmetric or format.zero != 1 << (format.code_bits - 1):
        raise Unsupported(f"it has nothing like {format.name}; s4g128 and its like are shared")
    if format.code_bits not in bits or format.group not in groups or format.scale_factor != 1.0:
        raise Unsupported(f"it has no {format.code_bits} bits in groups of {format.group}")


def weight(format: Format, n: int, k: int) -> tuple[Array, Array]:
    """(codes uint8 [n, groups, group], scales float16 [n, groups]) of the weight that our kernel
    has."""
    rows = random_rows(format, k)
    codes = rows.fields["codes"].reshape(ROWS, -1, format.group)
    scales = rows.fields["d"].view(np.float16).reshape(ROWS, -1)
    order = np.arange(n) % ROWS
    return codes[order], scales[order]


def copies(nbytes: int, total: int, m: int) -> int:
    """How many weights one run goes through: as many as the caches do not hold, but for products
    so large that computing binds them."""
    return max(1, min(_NODES, -(-total // nbytes), max(4, 4096 // m)))


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


class Torch:
    """``_weight_int4pack_mm_for_cpu`` with bf16 or f32 activations."""

    def __init__(
        self, format: str, n: int, k: int, m: int, threads: int, total: int, precision: str
    ) -> None:
        import torch  # type: ignore[import-not-found, unused-ignore]

        row = by_name(format)
        shared_codes(row, (4,), (32, 64, 128, 256))
        start = time.perf_counter()
        torch.set_num_threads(threads)
        codes, scales = weight(row, n, k)
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        pair = np.stack([scales.T, np.zeros_like(scales.T)], axis=2)  # (code - 8) scale + zero
        self.group = row.group
        flat = torch.from_numpy(codes.reshape(n, k).astype(np.int32))
        packed = torch._convert_weight_to_int4pack_for_cpu(flat, 1)
        scale = torch.from_numpy(np.ascontiguousarray(pair)).to(kind)
        self.count = copies(packed.nbytes + scale.nbytes, total, m)
        self.weights = [(packed.clone(), scale.clone()) for _ in range(self.count)]
        self.x = torch.from_numpy(random_x(m, k)).to(kind)
        self.torch, self.y = torch, None
        self.threads, self.load_s = threads, time.perf_counter() - start
        self.about = {"version": torch.__version__, "setting": f"activations={precision}"}

    def run(self) -> int:
        """See :class:`Peer`."""
        with self.torch.inference_mode():
            for packed, scale in self.weights:
                self.y = self.torch._weight_int4pack_mm_for_cpu(self.x, packed, self.group, scale)
        return self.count

    def result(self) -> Array:
        """See :class:`Peer`."""
        assert self.y is not None
        y: Array = self.y.float().numpy()
        return y


PEERS: dict[str, Callable[..., Peer]] = {
    "onnxruntime": OnnxRuntime, "openvino": OpenVino, "torch": Torch
}  # fmt: skip

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "onnxruntime": ({"level": 4}, {"level": 0}),
    "openvino": ({"precision": "int8"}, {"precision": "bf16"}, {"precision": "f32"}),
    "torch": ({"precision": "bf16"}, {"precision": "f32"}),
}
"""What makes a peer faster at one product and slower at another: the best counts."""


def serve(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Answers 'check' with the largest error by the sum of |w x|, 'run' with the microseconds of a
    product in each of ``rounds`` runs."""
    if request["do"] == "check":
        peer.run()
        row, m, n, k = by_name(request["format"]), request["m"], request["n"], request["k"]
        w, x = random_rows(row, k).dequantize()[:, :k].astype(np.float64), random_x(m, k)
        order = np.arange(n) % ROWS
        error = np.abs(peer.result() - (x @ w.T)[:, order])
        magnitude = (np.abs(x) @ np.abs(w).T)[:, order]
        return {"largest": float((error / magnitude).max())}
    times = []
    for _ in range(request["rounds"]):
        start = time.perf_counter()
        count = peer.run()
        times.append((time.perf_counter() - start) * 1e6 / count)
    return {"us": times}


def main() -> None:
    """Loads a peer and serves requests until standard input ends."""
    bench_worker.main(PEERS, serve)


if __name__ == "__main__":
    main()
