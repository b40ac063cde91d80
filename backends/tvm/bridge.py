"""The code generator that TVM calls ``qigen``.

``FuseOpsByPattern`` cuts the products out, ``RunCodegen`` asks :func:`_generate` for their code: a
kernel of the CPU backend, the function that prepares its activations, and a function with TVM's
calling convention around them, which holds the packed weight (templates/tvm). All of it is one
object file. (TVM, "Bring Your Own Codegen to Relax".)
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen import targets, toolchain
from qigen.backends.base import Isa
from qigen.backends.cpu.matmul import (
    ActivationRecord,
    MatmulSpec,
    activation_needs,
    render_matmul,
)
from qigen.backends.cpu.ops import render_ops
from qigen.codegen.render import render
from qigen.errors import BadInput, ToolchainError, Unsupported, UsageError
from qigen.formats import catalog
from qigen.formats.algebra import Format
from qigen.formats.kv import kv_format
from qigen.formats.layout import pack, packed_shape, row_block_bytes
from qigen.formats.tensor import QuantizedTensor
from qigen.paths import resource_folder
from qigen.planner import Product, isa_candidates, plan_products
from qigen.quantize import quantize
from qigen.targets import Machine

NAME = "qigen"
"""What TVM calls the code generator."""

TOKENS = 256
"""Rows of x that are prepared at a time."""

_CONSTANTS = "const_name_to_constant"
"""The attribute in which TVM keeps the constants of what was cut out."""

_ACTIVATIONS = ("auto", "f32", "int8", "int8-token")


@dataclass(frozen=True)
class _Options:
    format: Format
    activations: str
    machine: Machine
    isa: Isa
    jobs: int


def _tvm(name: str) -> Any:
    """A module of TVM; ToolchainError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolchainError(
            f"the bridge to TVM needs it; install it with pip install 'qigen[tvm]' ({error})"
        ) from None


def offload(
    mod: Any,
    weights: str = "u4g32",
    *,
    activations: str = "auto",
    target: str = "native",
    jobs: int | None = None,
) -> Any:
    """A Relax module (``tvm.IRModule``) in which qigen computes the products with constants.

    Taken are ``relax.matmul(x, W)`` and ``relax.matmul(x, permute_dims(W))`` of float32 x [.., K]
    and a constant float32 W, [K, N] or [N, K] (bind the parameters first:
    ``relax.transform.BindParams``). W is rounded to the format ``weights``, a name of ``qigen
    formats``. ``activations``: "f32", "int8", "int8-token", or "auto", what qigen would choose.
    ``target`` is the machine to compile for, ``jobs`` compilers run at a time (default: all cores).

    The result is built by ``tvm.compile`` and exported by ``export_library``; it needs TVM's
    runtime, but not qigen. A module without such a product is returned as it is.

    Raises Unsupported (format, target), UsageError (activations), BadInput (weights with NaN),
    ToolchainError (no TVM, no compiler).
    """
    relax = _tvm("tvm.relax")
    ffi = _tvm("tvm_ffi")
    format = catalog.by_name(weights)
    if activations not in _ACTIVATIONS:
        raise UsageError(f"activations {activations}: choose one of {', '.join(_ACTIVATIONS)}")
    machine = targets.native() if target == "native" else targets.by_name(target)
    options = _Options(
        format, activations, machine, isa_candidates(machine)[0], jobs or os.cpu_count() or 1
    )

    symbols: list[str] = []

    def generate(functions: Any, _options: Any, _constants: Any) -> list[Any]:
        symbols.extend(str(function.attrs["global_symbol"]) for function in functions)
        return [_generate(list(functions), options)]

    ffi.register_global_func(f"relax.ext.{NAME}", generate, override=True)
    passes = [
        relax.transform.FuseOpsByPattern(_patterns(relax), bind_constants=True,
                                         annotate_codegen=True),
        relax.transform.RunCodegen(),
    ]  # fmt: skip
    mod = _tvm("tvm").transform.Sequential(passes)(mod)
    # TVM would keep the float weights beside ours
    constants = dict(mod.attrs.get(_CONSTANTS) or {}) if mod.attrs else {}
    left = {
        name: value for name, value in constants.items()
        if not any(str(name).startswith(f"{symbol}_") for symbol in symbols)
    }  # fmt: skip
    return mod if len(left) == len(constants) else mod.with_attr(_CONSTANTS, left)


def _patterns(relax: Any) -> list[Any]:
    dpl = relax.dpl
    found = []
    for name in ("matmul_transposed", "matmul"):
        x, w = dpl.wildcard(), dpl.is_const()
        right = dpl.is_op("relax.permute_dims")(w) if name == "matmul_transposed" else w
        product = dpl.is_op("relax.matmul")(x, right)
        parts = {"x": x, "w": w, "root": product}
        found.append(relax.transform.FusionPattern(f"{NAME}.{name}", product, parts, _takes))
    return found


def _takes(context: Any) -> bool:
    """Whether a product is one for the kernels: float32 x [.., K] and W with two dimensions."""
    parts = context.annotated_expr
    x, w, root = (_type_of(parts[name]) for name in ("x", "w", "root"))
    return (
        all(str(t.dtype) == "float32" for t in (x, w, root))
        and w.ndim == 2 and x.ndim >= 1 and root.ndim == x.ndim
    )  # fmt: skip


def _type_of(expression: Any) -> Any:
    return expression.ty if hasattr(expression, "ty") else expression.struct_info


def _weight_of(function: Any) -> npt.NDArray[np.float32]:
    """float32 [N, K]: the constant of a function that was cut out."""
    relax = _tvm("tvm.relax")
    constants: list[Any] = []
    transposed: list[bool] = []

    def visit(expression: Any) -> None:
        data: Any = getattr(expression, "value", getattr(expression, "data", None))
        if hasattr(data, "numpy") and len(data.shape) == 2:
            constants.append(data)
        elif getattr(getattr(expression, "op", None), "name", "") == "relax.permute_dims":
            transposed.append(True)

    relax.analysis.post_order_visit(function, visit)
    assert len(constants) == 1, "the patterns have one constant"
    w = constants[0].numpy()
    return np.ascontiguousarray(w if transposed else w.T)


def _generate(functions: Sequence[Any], options: _Options) -> Any:
    """The TVM module with the code of all functions that were cut out."""
    runtime = _tvm("tvm.runtime")
    compiler = toolchain.find_compiler(options.machine.architecture, options.machine.system)
    symbols = [str(function.attrs["global_symbol"]) for function in functions]
    with (
        tempfile.TemporaryDirectory(prefix="qigen-") as name,
        toolchain.ObjectCache(compiler, options.jobs) as cache,
    ):
        folder = Path(name)
        futures: list[Future[Path]] = []
        spaces: dict[tuple[int, int], str] = {}
        for symbol, function in zip(symbols, functions, strict=True):
            weight = _weight_of(function)
            try:
                tensor = quantize(weight, options.format)
            except (BadInput, Unsupported) as error:
                raise type(error)(error.message, symbol) from None
            futures += _units(folder, symbol, tensor, options, cache, spaces)
        objects = [str(future.result()) for future in futures]
        whole = folder / "qigen.o"
        compiler.run(["-r", "-nostdlib", *objects, "-o", str(whole)], whole.name)
        return runtime.load_static_library(str(whole), symbols)


def _units(
    folder: Path, symbol: str, tensor: QuantizedTensor, options: _Options,
    cache: toolchain.ObjectCache, spaces: dict[tuple[int, int], str],
) -> list[Future[Path]]:  # fmt: skip
    """Objects of a product. Products of one shape share all but their weight."""
    n, k = tensor.shape
    product = Product(tensor.format, n, k, 1)
    specs, _ = plan_products(
        [product], options.isa, options.machine, options.activations, options.machine.cores
    )
    spec = specs[product.key]
    ops = render_ops(
        options.isa, (), kv_format("f16"), spec.tiles if spec.integer else (1,), ()
    )
    headers = {
        options.isa.header: render(options.isa.template),
        "kernels.h": render("cpu/kernels.h.j2"),
        "epilogue.h": render("cpu/epilogue.h.j2"),
        "ops.h": render("cpu/ops.h.j2", head_dims=(), kv=kv_format("f16")),
    }
    shared = (n, k) not in spaces
    space = spaces.setdefault((n, k), f"qg_{n}x{k}")
    include = resource_folder("runtime") / "include"
    tvm_include = Path(_tvm("tvm_ffi.libinfo").find_include_path())
    flags = (*toolchain.KERNEL_FLAGS, *options.isa.flags, f"-Dqg={space}")
    weights = folder / f"{symbol}.bin"
    weights.write_bytes(pack(tensor, spec.layout).tobytes())
    text = render("tvm/matmul.cpp.j2", **_parameters(symbol, spec, (n, k), weights))
    source = folder / f"{symbol}.cpp"
    source.write_text(text)
    for header, body in headers.items():
        (folder / header).write_text(body)
    glue = folder / f"{symbol}.o"
    cache.compiler.run(
        [*flags, f"-I{folder}", f"-I{tvm_include}", "-c", str(source), "-o", str(glue)], symbol
    )
    done: Future[Path] = Future()
    done.set_result(glue)
    found = [done]
    if shared:
        kernel = render_matmul(spec, ("store",))
        found += [
            cache.compile(toolchain.Unit(kernel.name, kernel.text, flags, headers)),
            cache.compile(toolchain.Unit(ops.name, ops.text, flags, headers, (include,))),
        ]
    return found


def _parameters(
    symbol: str, spec: MatmulSpec, shape: tuple[int, int], weights: Path
) -> dict[str, Any]:
    """What the template reads."""
    n, k = shape
    blocks, kblocks, _ = packed_shape(spec.format, shape, spec.layout)
    kblock = spec.format.block * spec.layout.blocks
    record: dict[str, Any] = {
        "scale_offset": 0, "zero_offset": 0, "sum_offset": 0, "token_scale": False,
        "corrections": (),
    }  # fmt: skip
    if spec.integer:
        k_padded = -(-k // max(kblock, 32)) * max(kblock, 32)
        zeros, sums = activation_needs(spec)
        token = spec.token_scale
        rows = ActivationRecord(k_padded, token, zeros, sums)
        corrections = [(rows.offset("zero", length, zero), length, zero) for length, zero in zeros]
        corrections += [(rows.offset("sum", length), length, 0) for length in sums]
        record = {
            "scale_offset": rows.scale_offset, "token_scale": token, "corrections": corrections,
            "zero_offset": rows.offset("zero", *zeros[0]) if zeros else 0,
            "sum_offset": rows.offset("sum", sums[0]) if sums else 0,
        }  # fmt: skip
        stride, rows_kernel = rows.nbytes, "rows_int8"
    else:
        k_padded = -(-k // kblock) * kblock
        k_padded = -(-k_padded // 16) * 16
        stride, rows_kernel = 4 * k_padded, "rows_f32"
    banner = (
        f"// {symbol}: y[.., {n}] = x[.., {k}] W^T, W in {spec.format.name}.\n"
        f"// Template: tvm/matmul.cpp.j2; kernel {spec.name}."
    )
    return {
        "symbol": symbol, "banner": banner, "kernel": spec.entry("store"), "n": n, "k": k,
        "rows_kernel": rows_kernel, "k_padded": k_padded, "blocks": blocks, "kblocks": kblocks,
        "row_block": row_block_bytes(spec.format, k, spec.layout), "stride": stride,
        "record": record, "weights": weights, "tokens": TOKENS,
    }  # fmt: skip
