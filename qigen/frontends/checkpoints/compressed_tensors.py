"""compressed-tensors checkpoints (llm-compressor).

``config_groups`` say which layers have which ``weights`` (bits, type, symmetric, strategy, group).

* ``pack-quantized``: ``weight_packed`` int32 ``[N, ceil(K / p)]`` with ``p = 32 // bits`` codes a
  word along K, the lowest bits first, each plus ``2^(bits-1)``; ``weight_shape`` holds N and K;
  ``weight_scale`` float ``[N, G]``; where it is not symmetric ``weight_zero_point``, packed like
  the codes but along N (older files: int8 ``[N, G]``); with ``actorder: group`` ``weight_g_idx``
  int32 ``[K]``.
* ``int-quantized`` (``naive-quantized``): ``weight`` int8 ``[N, K]``, ``weight_scale`` a number a
  tensor, row or group, perhaps an int8 ``weight_zero_point``.
* ``float-quantized``: ``weight`` E4M3 ``[N, K]`` with ``weight_scale`` in the same places.
* ``nvfp4-pack-quantized``: ``weight_packed`` uint8 ``[N, K / 2]``, E2M1 codes, the lower nibble
  first; ``weight_scale`` E4M3 ``[N, K / 16]``; ``weight_global_scale`` f32 ``[1]``, which divides.

    W = scale * (q - zero),    NVFP4: W = weight_scale / weight_global_scale * e2m1

The reciprocal of ``weight_global_scale`` is rounded to float32 once, as the kernels of vLLM do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported
from qigen.formats.algebra import Array, Float32Array
from qigen.formats.catalog import by_name
from qigen.formats.grouped import Grouped, bits_of, padded
from qigen.formats.tensor import QuantizedTensor
from qigen.frontends.checkpoints.grouped import (
    PackedMatrix,
    group_of,
    matrix,
    no_row,
    ordered,
    small_floats,
)
from qigen.frontends.checkpoints.raw import Module, RawTensor, modules
from qigen.frontends.model import SourceTensor
from qigen.frontends.settings import Settings, shown

_METHOD = "compressed-tensors"
_FLOATS = ("F16", "BF16", "F32")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group")


def read(
    tensors: Mapping[str, RawTensor], settings: Settings
) -> tuple[dict[str, SourceTensor], set[str]]:
    """The matrices of a checkpoint, and the names of the tensors that they consist of."""
    sparsity = settings.values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise Unsupported(
            f"sparse weights ('{shown(str(sparsity['format']))}') of compressed-tensors are not "
            "read",
            settings.where,
        )
    schemes = _schemes(settings)
    result: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for module in modules(tensors, "weight_scale"):
        scheme = _scheme_of(module, schemes, settings.where)
        result[f"{module.name}.weight"] = _layer(module, scheme)
        used |= module.used
        # what quantizes activations and caches statically is not needed
        for part in ("input_scale", "input_zero_point", "input_global_scale", "output_scale"):
            if module.has(part):
                used.add(f"{module.name}.{part}")
    return result, used


def _schemes(settings: Settings) -> list[tuple[list[str], Settings]]:
    """The targets and the weight settings of every group of the configuration."""
    groups = settings.values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise settings.bad("config_groups", "an object of groups of layers")
    result = []
    for name, group in groups.items():
        where = f"{settings.where}: config_groups.{shown(str(name))}"
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise BadInput("a group of layers needs a list of 'targets'", where)
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise BadInput("a group of layers needs the settings of its 'weights'", where)
        result.append(([str(t) for t in group["targets"]], Settings(weights, where)))
    return result


def _scheme_of(
    module: Module, schemes: list[tuple[list[str], Settings]], where: str
) -> Settings:
    for targets, scheme in schemes:
        for target in targets:
            if target in ("Linear", module.name):
                return scheme
            try:
                if target.startswith("re:") and re.match(target[3:], module.name):
                    return scheme
            except re.error as error:
                raise BadInput(f"the target '{shown(target)}' is no pattern ({error})", where
                               ) from None
    raise BadInput(f"layer '{shown(module.name)}' is quantized, but no group of layers names it",
                   where)


def _layer(module: Module, scheme: Settings) -> SourceTensor:
    packed = module.has("weight_packed")
    weight = module.get("weight_packed" if packed else "weight", "weight_scale")
    if len(weight.shape) != 2:
        raise weight.bad(f"has the shape {list(weight.shape)}, expected a matrix")
    strategy = scheme.text("strategy")
    if strategy not in _STRATEGIES:
        raise no_row(weight, _METHOD, f"scales by {shown(strategy)}")
    if packed and weight.dtype == "U8":
        return _nvfp4(module, weight)
    if weight.dtype == "F8_E4M3":
        n, k = weight.shape
        return small_floats(module.name, weight, *_scales(module, (n, k), scheme), _METHOD)
    bits = scheme.integer("num_bits", high=8)
    if scheme.text("type", "int") != "int":
        raise no_row(weight, _METHOD, f"codes of the type {shown(scheme.text('type'))}")
    return _packed(module, weight, scheme, bits) if packed else _int8(module, weight, scheme)


def _scales(module: Module, shape: tuple[int, int], scheme: Settings) -> tuple[int, Float32Array]:
    """Weights of a group, and float32 ``[N, G]`` scales, whatever the strategy."""
    n, k = shape
    strategy = scheme.text("strategy")
    scale = module.get("weight_scale", "weight_scale")
    if strategy in ("tensor", "channel"):
        count = 1 if strategy == "tensor" else n
        if scale.shape not in ((count,), (count, 1)):
            raise scale.bad(f"has the shape {list(scale.shape)}, expected {[count, 1]}")
        return k, np.repeat(scale.floats().reshape(count, 1), n // count, axis=0)
    group = group_of(scheme.integer("group_size", low=-1), k, scheme.where)
    return group, scale.expect((n, -(-k // group)), *_FLOATS).floats()


def _unpacked(words: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """uint8 [..., count]: the numbers of ``bits`` bits of int32 words, ``32 // bits`` each."""
    per = 32 // bits
    out = np.empty((*words.shape, per), np.uint8)
    for i in range(per):
        out[..., i] = words.view(np.uint32) >> np.uint32(bits * i) & np.uint32((1 << bits) - 1)
    numbers: npt.NDArray[np.uint8] = out.reshape(*words.shape[:-1], -1)[..., :count]
    return numbers


def _packed(module: Module, weight: RawTensor, scheme: Settings, bits: int) -> SourceTensor:
    shape = module.get("weight_shape", "weight_packed")
    if shape.dtype not in ("I64", "I32") or shape.shape != (2,):
        raise shape.bad(f"is {shown(shape.dtype)}{list(shape.shape)}, expected two integers")
    n, k = (int(i) for i in shape.array())
    per = 32 // bits
    if n < 1 or k < 1 or weight.shape != (n, -(-k // per)):
        raise weight.bad(
            f"has the shape {list(weight.shape)}, but {bits} bits of a matrix {[n, k]} take "
            f"{[n, -(-k // per)]}"
        )
    words: Array = weight.expect(weight.shape, "I32").array()
    group, scales = _scales(module, (n, k), scheme)
    order = None
    if module.has("weight_g_idx"):
        order = ordered(weight, module.get("weight_g_idx", "weight_packed"), k, group)
    elif scheme.values.get("actorder") in ("group", "dynamic", True):
        module.get("weight_g_idx", "weight_packed")

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        found = _unpacked(np.ascontiguousarray(words[first:last]), bits, k)
        return found if order is None else found[:, order]

    zeros = _zeros(module, scheme, bits, scales.shape, "weight_packed")
    grouped = Grouped((n, k), bits, group, codes, scales, zeros, order)
    return matrix(f"{module.name}.weight", weight, grouped, _METHOD)


def _zeros(
    module: Module, scheme: Settings, bits: int, shape: tuple[int, ...], other: str
) -> int | Array:
    """The zeros among unsigned codes."""
    middle, symmetric = 1 << (bits - 1), scheme.flag("symmetric", True)
    if symmetric and not module.has("weight_zero_point"):
        return middle
    stored = module.get("weight_zero_point", other)
    n, groups = shape
    zeros: Array
    if stored.dtype == "I32":
        stored.expect((-(-n // (32 // bits)), groups), "I32")
        zeros = _unpacked(np.ascontiguousarray(stored.array().T), bits, n).T
    else:
        one_for_all = stored.shape in ((1,), (1, 1))
        stored.expect(stored.shape if one_for_all or stored.shape == (n,) else (n, groups), "I8")
        zeros = np.broadcast_to(stored.array().reshape(-1, 1) if stored.shape != (n, groups)
                                else stored.array(), (n, groups)).astype(np.int16) + middle
    if symmetric and (zeros != middle).any():
        raise stored.bad("holds zeros, though the scheme says that the weights are symmetric")
    return zeros


def _int8(module: Module, weight: RawTensor, scheme: Settings) -> SourceTensor:
    n, k = weight.shape
    stored: Array = weight.expect((n, k), "I8").array()
    if scheme.integer("num_bits", high=8) != 8:
        raise no_row(weight, _METHOD, f"{scheme.integer('num_bits')} bits in bytes of their own")
    group, scales = _scales(module, (n, k), scheme)

    def codes(first: int, last: int) -> npt.NDArray[np.uint8]:
        unsigned: npt.NDArray[np.uint8] = stored[first:last].view(np.uint8) ^ np.uint8(0x80)
        return unsigned

    zeros = _zeros(module, scheme, 8, scales.shape, "weight")
    grouped = Grouped((n, k), 8, group, codes, scales, zeros)
    return matrix(f"{module.name}.weight", weight, grouped, _METHOD)


def _nvfp4(module: Module, weight: RawTensor) -> SourceTensor:
    n, k = weight.shape[0], 2 * weight.shape[1]
    if k % 16:
        raise weight.bad(f"has rows of {k} weights, no multiple of the group of 16")
    stored: Array = weight.array()
    scale = module.get("weight_scale", "weight_packed").expect((n, k // 16), "F8_E4M3")
    whole = module.get("weight_global_scale", "weight_packed")
    divisor = whole.floats().reshape(-1)
    if divisor.size != 1 or not divisor[0]:
        raise whole.bad(f"holds {divisor[:4].tolist()}, expected one number other than zero")
    row = by_name("nvfp4")
    factor = np.float32(1) / divisor[0]
    subs = np.zeros((n, -(-k // 32) * 2), np.uint8)
    subs[:, : k // 16] = scale.array()
    wrong = subs & np.uint8(0x7F) == 0x7F
    if wrong.any():
        raise scale.bad(f"holds a NaN in row {int(np.argwhere(wrong)[0][0])}")

    def read(first: int, last: int) -> QuantizedTensor:
        part = stored[first:last]
        codes = np.stack((part & np.uint8(15), part >> np.uint8(4)), axis=-1)
        d = np.full((last - first, 1, 1), factor, np.float32)
        fields = {
            "codes": padded(codes.reshape(last - first, k), row),
            "sub": subs[first:last].reshape(last - first, -1, 2),
            "d": bits_of(d, row.field("d")),
        }
        return QuantizedTensor(row, (last - first, k), fields)

    return PackedMatrix(weight.file, f"{module.name}.weight", (n, k), row, weight.data, read)
