"""The approach of the first QIGen as a peer of ``qigen bench-kernel``: float32 on AVX2.

``templates/tools/original_qigen.cpp`` is written after the paper; its memory order is the best case
(every tile is one sequential stream). The threads of a run share no barrier between products.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qigen import toolchain
from qigen.errors import Unsupported
from qigen.formats.catalog import by_name
from qigen.kernel_peers.base import Array, copies, shared_codes, weight
from qigen.paths import resource_folder
from qigen.targets.features import of_this_machine
from qigen.tuning.problem import random_x

_OUTPUTS = 32
_PRODUCTS = 64
_FLAGS = ("-std=c++17", "-O3", "-mavx2", "-mfma", "-fPIC", "-shared", "-pthread")


class _Product(ctypes.Structure):
    """``Product`` of the source."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n", "k", "group")),
        *((name, ctypes.c_void_p) for name in ("w", "scales", "x", "sums", "y")),
    )


class OriginalQigen:
    """Codes of 4 or 2 bits, unpacked to float32 and multiplied by FMA; tokens one by one."""

    def __init__(self, format: str, n: int, k: int, m: int, threads: int, total: int) -> None:
        row = by_name(format)
        shared_codes(row, (2, 4), (32, 64, 128, 256))
        if n % _OUTPUTS or k % row.group:
            raise Unsupported("it multiplies whole tiles of 32 rows and groups of columns")
        if not {"avx2", "fma"} <= set(of_this_machine()):
            raise Unsupported("it needs AVX2")
        start = time.perf_counter()
        codes, scales = weight(row, n, k)
        bits, per = row.code_bits, 32 // row.code_bits
        parts = codes.reshape(n // _OUTPUTS, _OUTPUTS, k // per, per).astype(np.uint32)
        words = np.zeros(parts.shape[:3], np.uint32)
        for i in range(per):
            words |= parts[..., i] << np.uint32(bits * i)
        w = np.ascontiguousarray(words.transpose(0, 2, 1))
        tiles = scales.astype(np.float32).reshape(n // _OUTPUTS, _OUTPUTS, -1)
        s = np.ascontiguousarray(tiles.transpose(0, 2, 1))
        x = np.ascontiguousarray(random_x(m, k))
        sums = x.reshape(m, -1, row.group).sum(axis=2, dtype=np.float32)
        self.y = np.empty((m, n), np.float32)
        self.bits, self.threads = bits, threads
        self.count = copies(w.nbytes + s.nbytes, total, m)
        self.kept: list[Any] = [x, sums]
        products = []
        for _ in range(self.count):
            own = w.copy(), s.copy()
            self.kept.append(own)
            for token in range(m):
                arrays = (*own, x[token], sums[token], self.y[token])
                products.append(_Product(n, k, row.group, *(a.ctypes.data for a in arrays)))
        # threads are started once a run: enough products that this does not count
        passes = max(1, _PRODUCTS // len(products))
        self.products = (_Product * (len(products) * passes))(*products * passes)
        self.count *= passes
        self.function = ctypes.CDLL(str(_library())).original_qigen
        self.load_s = time.perf_counter() - start
        self.about = {"version": "as published in 2023", "setting": "float32, AVX2"}

    def run(self) -> int:
        """See :class:`Peer`."""
        self.function(self.bits, self.products, len(self.products), self.threads)
        return self.count

    def result(self) -> Array:
        """See :class:`Peer`."""
        return self.y


def _library() -> Path:
    """The compiled source, made once for a compiler."""
    source = resource_folder("templates") / "tools" / "original_qigen.cpp"
    compiler = toolchain.find_compiler()
    text = repr((compiler.version, _FLAGS)).encode() + source.read_bytes()
    folder = toolchain.cache_folder() / "peers"
    target = folder / f"original-{hashlib.blake2b(text, digest_size=8).hexdigest()}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="qigen-", dir=folder) as name:
            out = Path(name) / "out.so"
            compiler.run([*_FLAGS, str(source), "-o", str(out)], source.name)
            out.replace(target)
    return target
