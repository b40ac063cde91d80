"""PyTorch as a peer of ``qigen bench-kernel``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from qigen.formats.catalog import by_name
from qigen.kernel_peers.base import Array, copies, shared_codes, weight
from qigen.tuning.problem import random_x


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
        self.torch = torch
        self.y: Any = None
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
