"""Quantized Hugging Face checkpoints: one table from ``quant_method`` to what reads it.

A reader turns the packed tensors of every layer into codes, scales and zeros of the format catalog,
without rounding any of them. To add a family: write its reader, add a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qigen.errors import BadInput, Unsupported
from qigen.frontends.checkpoints import (
    aqlm,
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    hqq,
    mxfp4,
    spqr,
)
from qigen.frontends.checkpoints.grouped import PackedMatrix
from qigen.frontends.checkpoints.raw import RawTensor
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

Read = Callable[
    [Mapping[str, RawTensor], Settings], tuple[dict[str, SourceTensor], set[str]]
]


@dataclass(frozen=True)
class Reader:
    """A family of checkpoints: ``what`` it covers, and the ``source`` it was written from."""

    quant_method: str
    what: str
    source: str
    read: Read


READERS: tuple[Reader, ...] = (
    Reader(
        "gptq",
        "2, 3, 4 and 8 bits, any group, zeros of version 1 and 2, act-order (`g_idx`); "
        "the layout of Marlin",
        "AutoGPTQ `QuantLinear`, GPTQModel `checkpoint_format`; Marlin `Layer.pack`",
        gptq.read,
    ),
    Reader(
        "awq",
        "4 bits, `gemm` and `gemv` packing",
        "AutoAWQ `WQLinear_GEMM`, `WQLinear_GEMV`",
        awq.read,
    ),
    Reader(
        "hqq",
        "2, 3, 4 and 8 bits in groups along K (`axis` 1), float zeros; groups across rows "
        "(`axis` 0) as float32 numbers",
        "HQQ `BitPack`, `HQQLinear`",
        hqq.read,
    ),
    Reader(
        "compressed-tensors",
        "`pack-quantized` with 2, 3, 4 and 8 bits, symmetric or not, act-order; `int-quantized` "
        "int8; `float-quantized` fp8; `nvfp4-pack-quantized`",
        "compressed-tensors `compressors/`",
        compressed_tensors.read,
    ),
    Reader(
        "bitsandbytes",
        "int8 (`SCB`), nf4 and fp4 in blocks that divide K, double quantization",
        "bitsandbytes `Int8Params`, `QuantState`",
        bitsandbytes.read,
    ),
    Reader(
        "fp8",
        "E4M3 with scales of blocks (`weight_scale_inv`)",
        "DeepSeek-V3 `kernel.py`; transformers `integrations/finegrained_fp8.py`",
        fp8.read,
    ),
    Reader(
        "aqlm",
        "1 to 4 books of 4 to 16 bits for vectors of 4, 8 or 16 weights of a row",
        "AQLM `inference.py`",
        aqlm.read,
    ),
    Reader(
        "bitnet",
        "ternary weights of 2 bits, one scale a tensor",
        "transformers `integrations/bitnet.py`",
        bitnet.read,
    ),
    Reader(
        "mxfp4",
        "E2M1 codes in blocks of 32 with E8M0 scales (`_blocks`, `_scales`), of matrices and of "
        "experts",
        "transformers `integrations/mxfp4.py`; OCP Microscaling Formats 1.0",
        mxfp4.read,
    ),
    Reader(
        "spqr",
        "3 bits in tiles of 16 by 16 with quantized scales and zeros, outliers in CSR",
        "SpQR `spqr_quant/inference.py`, `spqr_cuda.cpp`",
        spqr.read,
    ),
)
_BY_METHOD = {reader.quant_method: reader for reader in READERS}


def read_quantized(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The quantized matrices by name (``….weight``), and the names of their parts in ``tensors``.

    ``settings`` are those of ``quantization_config``. Raises BadInput for damaged or contradictory
    tensors, Unsupported for methods and variants that no reader or catalog row covers.
    """
    method = settings.text("quant_method")
    reader = _BY_METHOD.get(method)
    if reader is None:
        raise Unsupported(
            f"the checkpoint is quantized by '{shown(method)}'; known are {', '.join(_BY_METHOD)}",
            settings.where,
        )
    matrices, used = reader.read(tensors, settings)
    if not matrices:
        raise BadInput(
            f"the configuration says that the checkpoint is quantized by '{shown(method)}', but no "
            "tensor is",
            settings.where,
        )
    return matrices, used


__all__ = ["READERS", "PackedMatrix", "RawTensor", "Reader", "read_quantized"]
