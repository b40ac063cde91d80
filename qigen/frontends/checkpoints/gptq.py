"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound).

A layer ``[N, K]`` with b bits and groups of g weights has, by the packing of AutoGPTQ's
``QuantLinear``:

* ``qweight`` int32 ``[K * b / 32, N]``: the codes of a column of words are one string of bits along
  K, the lowest first (3 bits: 32 codes in 3 words);
* ``scales`` f16 ``[G, N]``;
* ``qzeros`` int32 ``[G, N * b / 32]``: the zeros, packed the same way along N. Version 1 stores
  ``zero - 1``, version 2 (``checkpoint_format: gptq_v2``) the zero;
* ``g_idx`` int32 ``[K]``: the group of each column. With ``desc_act`` columns were quantized in the
  order of their activations, so that the columns of a group lie apart.

    W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array
from qigen.formats.grouped import Grouped, unpack_bits
from qigen.frontends.checkpoints import marlin
from qigen.frontends.checkpoints.grouped import group_of, matrix, ordered
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 2}


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of a GPTQ checkpoint, and the names of the tensors that they consist of."""
    bits = settings.integer("bits", high=8)
    if bits not in BITS:
        raise Unsupported(f"GPTQ with {bits} bits is not read; known are {BITS}", settings.where)
    stated = settings.text("checkpoint_format", "gptq")
    if stated == "marlin":
        return marlin.read(tensors, settings)
    if stated not in _FORMATS:
        raise Unsupported(
            f"the GPTQ layout '{shown(stated)}' is not read; known are {', '.join(_FORMATS)} "
            "and marlin",
            settings.where,
        )
    if settings.values.get("dynamic"):
        raise Unsupported("GPTQ with 'dynamic' settings of layers is not read", settings.where)
    setting = settings.integer("group_size", 128, low=-1)
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "qweight"):
        result[f"{module.name}.weight"] = _layer(module, bits, setting, _FORMATS[stated], settings)
        used |= module.used
    return result, used


def _layer(
    module: Module, bits: int, setting: int, version: int, settings: Settings
) -> SourceTensor:
    qweight = module.get("qweight", "qweight")
    if len(qweight.shape) != 2 or qweight.shape[0] * 32 % bits:
        raise qweight.bad(f"has the shape {list(qweight.shape)}, no whole codes of {bits} bits")
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    words: Array = qweight.expect(qweight.shape, "I32").array()
    has_order = module.has("g_idx")
    if not has_order and settings.flag("desc_act"):
        raise BadInput(
            f"tensor '{shown(module.name)}.g_idx' is missing, though 'desc_act' says that columns "
            "were reordered: without it the scales cannot be told apart; export the model again",
            str(qweight.file),
        )
    group = group_of(setting, k, settings.where)
    groups = -(-k // group)
    if n * bits % 32:
        raise qweight.bad(f"has {n} rows, which fill no whole words of zeros of {bits} bits")
    scales = module.get("scales", "qweight").expect((groups, n), "F16", "BF16", "F32")
    qzeros = module.get("qzeros", "qweight").expect((groups, n * bits // 32), "I32")
    order = None
    if has_order:
        order = ordered(qweight, module.get("g_idx", "qweight"), k, group)
    zeros = _zeros(unpack_bits(qzeros.array(), bits), bits, version, qzeros, settings)

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        found = unpack_bits(words[:, first:last].T, bits)
        return found if order is None else found[:, order]

    grouped = Grouped(
        (n, k), bits, group, codes, scales.floats().T, zeros.T, order
    )
    return matrix(f"{module.name}.weight", qweight, grouped, "gptq")


def _zeros(stored: Array, bits: int, version: int, qzeros: RawTensor, settings: Settings) -> Array:
    """The zeros of groups. What only a mistaken version can explain is refused.

    In version 1 a zero of 0 is stored as -1, whose borrow damages its neighbours, and one of
    2^bits - 1 is what its version-2 twin would store as a zero of 2^bits: neither can be told from
    a version-2 file that calls itself version 1. Symmetric files have their zero in the middle.
    """
    other = "gptq_v2" if version == 1 else "gptq"
    advice = (
        f"this looks like a file of checkpoint_format '{other}' (version 1 stores zero - 1, "
        f"version 2 the zero); correct 'checkpoint_format' in {shown(settings.where)}"
    )
    middle = 1 << (bits - 1)
    if settings.flag("sym"):
        wrong = middle if version == 1 else middle - 1
        if np.all(stored == wrong):
            raise qzeros.bad(
                f"stores {wrong} for every zero, but a symmetric model of {bits} bits has zeros of "
                f"{middle}: {advice}"
            )
    if version == 1 and np.any(stored == 2 * middle - 1):
        at = [int(i) for i in np.argwhere(stored == 2 * middle - 1)[0]]
        raise qzeros.bad(
            f"stores {2 * middle - 1} at {at}, which in version 1 means a zero of {2 * middle}, "
            f"more than {bits} bits hold: {advice}"
        )
    return stored + np.uint8(1) if version == 1 else stored
