"""llama.cpp as a peer of ``qigen bench-kernel``: ``ggml_mul_mat`` of llama-cpp-python.

The library of that package is called through ctypes as
``ggml.h``, ``ggml-alloc.h`` and ``ggml-backend.h`` declare it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from typing import Any

import numpy as np

from qigen.errors import ToolchainError, Unsupported
from qigen.formats.blocks import to_blocks
from qigen.formats.catalog import by_name
from qigen.kernel_peers.base import Array, copies
from qigen.tuning.problem import ROWS, random_rows, random_x

_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_F32 = 0  # GGML_TYPE_F32

_pointer, _int, _long, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool))


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_tensor_overhead": (_size, ()),
    "ggml_graph_overhead_custom": (_size, (_size, ctypes.c_bool)),
    "ggml_init": (_pointer, (_InitParams,)),
    "ggml_new_tensor_2d": (_pointer, (_pointer, _int, _long, _long)),
    "ggml_mul_mat": (_pointer, (_pointer, _pointer, _pointer)),
    "ggml_new_graph_custom": (_pointer, (_pointer, _size, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_pointer, _pointer)),
    "ggml_backend_load_all": (None, ()),
    "ggml_backend_dev_by_type": (_pointer, (_int,)),
    "ggml_backend_dev_init": (_pointer, (_pointer, ctypes.c_char_p)),
    "ggml_backend_dev_backend_reg": (_pointer, (_pointer,)),
    "ggml_backend_dev_buffer_type": (_pointer, (_pointer,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_pointer, _pointer)),
    "ggml_backend_reg_get_proc_address": (_pointer, (_pointer, ctypes.c_char_p)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_pointer,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_pointer, (_pointer, _pointer)),
    "ggml_backend_tensor_set": (None, (_pointer, _pointer, _size, _size)),
    "ggml_backend_tensor_get": (None, (_pointer, _pointer, _size, _size)),
    "ggml_backend_graph_compute": (_int, (_pointer, _pointer)),
}


class LlamaCpp:
    """The product of a GGUF type as llama.cpp computes it on the CPU; with ``repack`` its weights
    are rearranged at load, for the types and shapes for which it can."""

    def __init__(
        self, format: str, n: int, k: int, m: int, threads: int, total: int, repack: bool
    ) -> None:
        row = by_name(format)
        if row.ggml_type is None:
            raise Unsupported(f"it has nothing like {format}; the GGUF types are shared")
        if k % row.block:
            raise Unsupported(f"its rows of {format} are whole blocks of {row.block}")
        start = time.perf_counter()
        lib = self.lib = _library()
        device = lib.ggml_backend_dev_by_type(_CPU)
        if not device:  # a build whose backends are libraries of their own
            lib.ggml_backend_load_all()
            device = lib.ggml_backend_dev_by_type(_CPU)
        self.backend = lib.ggml_backend_dev_init(device, None)
        if not self.backend:
            raise ToolchainError("llama.cpp has no CPU backend", "llama.cpp")
        self._of_backend(device, "ggml_backend_set_n_threads", None, (_pointer, _int))(
            self.backend, threads
        )
        plain = lib.ggml_backend_dev_buffer_type(device)
        kinds = self._repacked(device) if repack else [plain]

        blocks = to_blocks(random_rows(row, k))
        data = np.ascontiguousarray(blocks[np.arange(n) % ROWS])
        self.count = copies(data.nbytes, total, m)
        for kind in kinds:
            weights, self.graph, x, self.y = self._graph(row.ggml_type, n, k, m, kind, plain)
            if all(lib.ggml_backend_dev_supports_op(device, y) for y in self.y):
                break
        else:
            raise ToolchainError(f"it has no rearranged {format} of {n}x{k}", "llama.cpp")
        for w in weights:
            lib.ggml_backend_tensor_set(w, data.ctypes.data, 0, data.nbytes)
        values = random_x(m, k)
        lib.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        self.shape = (m, n)
        self.threads, self.load_s = threads, time.perf_counter() - start
        version = importlib.metadata.version("llama-cpp-python")
        self.about = {
            "version": f"{version} (ggml {lib.ggml_version().decode()})",
            "setting": "repack" if repack else "no repack",
        }

    def _of_backend(self, device: int, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        """A function that only the backend knows."""
        registry = self.lib.ggml_backend_dev_backend_reg(device)
        address = self.lib.ggml_backend_reg_get_proc_address(registry, name.encode())
        if not address:
            raise ToolchainError(f"this llama.cpp has no {name}", "llama.cpp")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def _repacked(self, device: int) -> list[int]:
        """The kinds of memory whose weights are rearranged: a list that ends with NULL."""
        find = self._of_backend(
            device, "ggml_backend_dev_get_extra_bufts", ctypes.POINTER(_pointer), (_pointer,)
        )
        found = find(device)
        kinds: list[int] = []
        while found and (kind := found[len(kinds)]):
            kinds.append(kind)
        return kinds

    def _context(self, tensors: int, more: int = 0) -> int:
        size = self.lib.ggml_tensor_overhead() * tensors + more
        found: int = self.lib.ggml_init(_InitParams(size, None, True))
        return found

    def _graph(
        self, kind: int, n: int, k: int, m: int, memory: int, plain: int
    ) -> tuple[list[int], int, int, list[int]]:
        """(weights in ``memory``, graph, x, products) of ``count`` products by one x."""
        lib, count = self.lib, self.count
        size = count + 8
        of_weights = self._context(count)
        weights = [lib.ggml_new_tensor_2d(of_weights, kind, k, n) for _ in range(count)]
        rest = self._context(count + 1, lib.ggml_graph_overhead_custom(size, False))
        x = lib.ggml_new_tensor_2d(rest, _F32, k, m)
        graph = lib.ggml_new_graph_custom(rest, size, False)
        products = [lib.ggml_mul_mat(rest, w, x) for w in weights]
        for y in products:
            lib.ggml_build_forward_expand(graph, y)
        for context, where in ((of_weights, memory), (rest, plain)):
            if not lib.ggml_backend_alloc_ctx_tensors_from_buft(context, where):
                raise ToolchainError("there is not enough memory", "llama.cpp")
        return weights, graph, x, products

    def run(self) -> int:
        """See :class:`Peer`."""
        if self.lib.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            raise ToolchainError("it failed in the middle of a product", "llama.cpp")
        return self.count

    def result(self) -> Array:
        """See :class:`Peer`."""
        y = np.empty(self.shape, np.float32)
        self.lib.ggml_backend_tensor_get(self.y[-1], y.ctypes.data, 0, y.nbytes)
        return y


def _library() -> Any:
    """The functions of ggml, with their types."""
    from llama_cpp import _ggml  # type: ignore[import-not-found, import-untyped, unused-ignore]

    # dlsym looks into the libraries that this one needs, too
    lib = _ggml.libggml
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name, None)
        if function is None:
            raise ToolchainError(f"this llama.cpp has no {name}", "llama.cpp")
        function.restype, function.argtypes = result, arguments
    return lib
