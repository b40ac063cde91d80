"""The table of quantization methods: one row each, the work in a file of its own.

A method brings one matrix to one format. Some change the whole model first, so that it is easier to
quantize and computes the same (:mod:`qigen.quantize.prepare`); these go before others, as in
"hadamard+gptq".
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qigen.errors import BadInput, Unsupported, UsageError
from qigen.formats.algebra import Float32Array, Format
from qigen.formats.tensor import QuantizedTensor
from qigen.quantize.aqlm import aqlm
from qigen.quantize.gptq import gptq
from qigen.quantize.hessian import Statistics, check_hessian, importance, output_error
from qigen.quantize.hqq import hqq
from qigen.quantize.low_rank import STEPS, with_residual, without_low_rank
from qigen.quantize.prepare import Preparation, awq, rotate, smoothquant
from qigen.quantize.rtn import Clip, quantize_rtn
from qigen.quantize.tables import kmeans
from qigen.quantize.ternary import ternary


@dataclass(frozen=True)
class Report:
    """What became of one matrix.

    ``error`` is the squared error of an output, ``relative`` its share of the output's square (of
    the weights, where there is no Hessian). ``damping`` is what the Hessian took (None: no Hessian
    was factored), ``dead`` the columns that never had an input.
    """

    format: str
    method: str
    error: float
    relative: float
    damping: float | None = None
    dead: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class Result:
    """A quantized weight and what the method has to say of it."""

    tensor: QuantizedTensor
    damping: float | None = None
    dead: int = 0
    notes: tuple[str, ...] = ()


Quantizer = Callable[..., Result]


@dataclass(frozen=True)
class Method:
    """``function(w, format, hessian, **options)``; ``hessian`` float32 [K, K], or None where the
    method does not need one. ``fits`` says what is wrong with a format, '' if nothing is.

    ``prepare`` changes a whole model before its matrices are rounded. A matrix alone has no
    neighbours for that: it is only rounded. ``minimises`` is for the documents.
    """

    name: str
    source: str
    about: str
    minimises: str
    function: Quantizer
    needs_hessian: bool
    fits: Callable[[Format], str] = lambda fmt: ""
    prepare: Preparation | None = None

    @property
    def data(self) -> str:
        """'needed', 'may help' or 'not looked at': the calibration data."""
        if self.needs_hessian or (self.prepare is not None and self.prepare is not rotate):
            return "needed"
        return "may help" if self.function in (_clip, _kmeans) else "not looked at"

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options by name, those of the preparation among them."""
        return {**_options_of(self.prepare), **_options_of(self.function)}

    def split(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the options of the preparation, those of the rounding)."""
        first = _options_of(self.prepare)
        return ({name: value for name, value in options.items() if name in first},
                {name: value for name, value in options.items() if name not in first})


def _options_of(function: Callable[..., Any] | None) -> dict[str, inspect.Parameter]:
    if function is None:
        return {}
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _rtn(w: Float32Array, fmt: Format, hessian: Float32Array | None) -> Result:
    return Result(quantize_rtn(w, fmt))


def _clip(w: Float32Array, fmt: Format, hessian: Float32Array | None) -> Result:
    return Result(quantize_rtn(w, fmt, Clip(importance(hessian))))


def _gptq(w: Float32Array, fmt: Format, hessian: Float32Array | None, *, damping: float = 0.01,
          order: str = "group", clip: bool = True) -> Result:
    assert hessian is not None
    tensor, factor = gptq(w, fmt, hessian, damping=damping, order=order, clip=clip)
    return Result(tensor, factor.damping, int(factor.dead.sum()))


def _kmeans(w: Float32Array, fmt: Format, hessian: Float32Array | None, *,
            steps: int = 60) -> Result:
    if steps < 1:
        raise UsageError("method kmeans needs at least 1 step")
    return Result(kmeans(w, fmt, importance(hessian), steps=steps))


def _hqq(w: Float32Array, fmt: Format, hessian: Float32Array | None, *, p: float = 0.7,
         beta: float = 10.0, kappa: float = 1.01, steps: int = 20) -> Result:
    return Result(hqq(w, fmt, p=p, beta=beta, kappa=kappa, steps=steps))


def _ternary(w: Float32Array, fmt: Format, hessian: Float32Array | None, *,
             scale: str = "absmean") -> Result:
    return Result(ternary(w, fmt, scale=scale))


def _aqlm(w: Float32Array, fmt: Format, hessian: Float32Array | None, *, beam: int = 4,
          rounds: int = 3, steps: int = 12) -> Result:
    assert hessian is not None
    return Result(aqlm(w, fmt, hessian, beam=beam, rounds=rounds, steps=steps))


def _of_codes(fmt: Format) -> str:
    if fmt.float_kind or not fmt.single_codes:
        return "it has no codes of single weights"
    if (fmt.has("sub") and not (fmt.field("sub").number or fmt.has("z"))) or fmt.has("dmin"):
        return "there is no rule yet for its scales, which are quantized themselves"
    return ""


def _having(field: str, wanted: str) -> Callable[[Format], str]:
    return lambda fmt: _of_codes(fmt) or ("" if fmt.has(field) else f"it has no {wanted}")


def _table(fmt: Format) -> str:
    return "" if fmt.has("lut") and not fmt.mask and not fmt.has("oc") else (
        "it has no table that is data; take lut4_tensor_g64, lut3_channel or the like")


def _zero(fmt: Format) -> str:
    plain = not (fmt.has("sub") or fmt.mask or fmt.has("oc") or fmt.has("qc"))
    float_zero = fmt.has("z") and fmt.field("z").number
    return "" if plain and fmt.min_sign == 1 and (fmt.has("m") or float_zero) else (
        "its groups have no float zero point or minimum; take a format such as u4g64 or h4g64")


def _three_levels(fmt: Format) -> str:
    levels = fmt.levels if not (fmt.vector or fmt.float_kind or fmt.has("lut")) else ()
    three = sorted({float(v) for v in levels}) == [-1.0, 0.0, 1.0]
    plain = three and {f.name for f in fmt.fields} == {"codes", "d"}
    return "" if plain else "its values are not -1, 0 and 1; take ternary2 or ternary5"


METHODS: dict[str, Method] = {row.name: row for row in (
    Method("rtn", "", "round to nearest", "the distance of every weight", _rtn, False),
    Method("clip", "AWQ (clipping); OmniQuant, Shao et al. 2023, arXiv:2308.13137",
           "round to nearest, each group's range searched",
           "Σ h (w − q)² of a group, h the diagonal of the Hessian (1 without data)", _clip, False),
    Method("hqq", "Badri and Shaji 2023, HQQ",
           "zero points of groups by half-quadratic splitting, without data",
           "Σ |w − q|^p of a group, p = 0.7", _hqq, False, _zero),
    Method("kmeans", "Kim et al. 2023, arXiv:2306.07629 (SqueezeLLM); Lloyd 1982; Max 1960",
           "tables by k-means, weighted by the inputs",
           "Σ h (w − t[c])² over tables t and codes c", _kmeans, False, _table),
    Method("ternary", "Ma et al. 2024, arXiv:2402.17764 (BitNet b1.58); `scale=least`: Li and Liu "
           "2016, arXiv:1605.04711", "round to −1, 0 and 1 times the mean magnitude",
           "nothing (absmean); Σ (w − q)² of a group (least)", _ternary, False, _three_levels),
    Method("gptq", "Frantar et al. 2023, arXiv:2210.17323",
           "rounding with feedback by the inverse Hessian",
           "E‖x (W − Q)ᵀ‖², weight by weight", _gptq, True, _of_codes),
    Method("spqr", "Dettmers et al. 2023, arXiv:2306.03078",
           "gptq with the most sensitive weights apart", "as gptq", _gptq, True,
           _having("oc", "outliers; take spqr3, or a format that ends in _o3")),
    Method("quik", "Ashkboos et al. 2023, arXiv:2310.09259",
           "gptq with the columns of the greatest inputs apart", "as gptq", _gptq, True,
           _having("qc", "columns apart; take a format that ends in _c32")),
    Method("sparsegpt", "Frantar and Alistarh 2023, arXiv:2301.00774",
           "N:M pruning and rounding with feedback", "as gptq", _gptq, True,
           lambda fmt: _of_codes(fmt) or ("" if fmt.mask else
                                          "it has no mask; take a format such as s4g128_2of4")),
    Method("aqlm", "Egiazarian et al. 2024, arXiv:2401.06118",
           "codebooks: beam search over codes, books by least squares",
           "E‖x (W − Q)ᵀ‖² over codes, books and scales in turn", _aqlm, True,
           lambda fmt: "" if fmt.vector else "it has no codebooks; take aqlm_2x8 or aqlm_1x16"),
    Method("awq", "Lin et al. 2023, arXiv:2306.00978",
           "scales of columns searched and folded into norms, up and v; then clip",
           "E‖x (W − Q(W s) / s)ᵀ‖² over s = mean|x|^a", _clip, False, prepare=awq),
    Method("smoothquant", "Xiao et al. 2022, arXiv:2211.10438",
           "scales of columns folded into norms, for int8 activations; then rtn",
           "nothing: s = max|x|^alpha / max|w|^(1 − alpha)", _rtn, False, prepare=smoothquant),
    Method("hadamard", "Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot, what is offline)",
           "the residual stream and the values of heads rotated; then clip",
           "nothing: outliers are spread over all columns", _clip, False, prepare=rotate),
)}
"""The methods by name."""


def by_name(name: str) -> Method:
    """The method called ``name``; Unsupported, naming the nearest, if there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=2)
        about = f"did you mean {' or '.join(near)}? " if near else ""
        raise Unsupported(f"quantization method '{name}' is not known; {about}there is "
                          f"{', '.join(METHODS)}")
    return METHODS[name]


Step = tuple[str, dict[str, Any]]
"""A method by name, and its options."""


def parse(text: str) -> tuple[Step, ...]:
    """The steps of ``gptq``, ``gptq:order=act,damping=0.05`` or ``hadamard:seed=1+gptq``.

    UsageError for options that make no sense, and for methods before the last one that do not
    change a model.
    """
    steps = tuple(_step(part) for part in text.split("+"))
    for name, _ in steps[:-1]:
        if METHODS[name].prepare is None:
            known = ", ".join(row.name for row in METHODS.values() if row.prepare)
            raise UsageError(f"method {name} rounds, so that nothing can come after it; before a "
                             f"+ there may be {known}")
    return steps


def _step(text: str) -> Step:
    name, _, rest = text.partition(":")
    known = by_name(name).options
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        check_options(by_name(name), {key: value})
        kind = type(known[key].default)
        try:
            if not equals:
                raise ValueError
            options[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UsageError(f"{part}: option {key} of method {name} is a {kind.__name__}; give, "
                             f"for example, {key}={known[key].default}") from None
    return name, options


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """UsageError if the method does not know one of the options."""
    for name in options:
        if name not in method.options:
            known = ", ".join(method.options) or "none"
            raise UsageError(f"method {method.name} has no option '{name}'; it has {known}")


def quantize_matrix(
    weight: npt.ArrayLike,
    fmt: Format,
    method: str = "rtn",
    hessian: npt.ArrayLike | Statistics | None = None,
    **options: Any,
) -> tuple[QuantizedTensor, Report]:
    """Quantize a matrix ``[N, K]``, and say how well that went; see :func:`qigen.quantize`."""
    row = by_name(method)
    check_options(row, options)
    base = without_low_rank(fmt)
    wrong = row.fits(base)
    if wrong:
        raise Unsupported(f"method {method} cannot bring a weight to this format: {wrong}",
                          fmt.name)
    try:
        w = np.ascontiguousarray(weight, np.float32)
    except (TypeError, ValueError):
        raise BadInput("the weight is not a matrix of numbers", "weight") from None
    if w.ndim != 2:
        raise BadInput(f"the weight is {list(w.shape)}; give a matrix [N, K]", "weight")
    notes: list[str] = []
    h: Float32Array | None = None
    if isinstance(hessian, Statistics):
        if not hessian.tokens:
            raise BadInput("there are no calibration data; give some", "calibration")
        if hessian.tokens < w.shape[1] and row.needs_hessian:
            notes.append(f"{hessian.tokens} tokens of calibration are few for {w.shape[1]} columns")
        hessian = hessian.hessian
    if hessian is not None:
        h = check_hessian(hessian, w.shape[1])
    elif row.needs_hessian:
        raise UsageError(f"method {method} needs the Hessian of the weight's inputs; calibrate, or "
                         "take method clip or rtn")
    if not np.isfinite(w).all():
        bad = int(np.argmin(np.isfinite(w).all(axis=1)))
        raise BadInput(f"row {bad} of the weight has a NaN or an infinity; repair the model first",
                       fmt.name)
    found: list[Result] = []

    def rounded(x: Float32Array, to: Format) -> QuantizedTensor:
        found.append(row.function(x, to, h, **row.split(options)[1]))
        return found[-1].tensor

    if fmt.rank:
        tensor = with_residual(w, fmt, rounded, importance(h), 1 if row.needs_hessian else STEPS)
        result = replace(found[0], tensor=tensor)
    else:
        rounded(w, fmt)
        result = found[0]
    error, relative = output_error(w, result.tensor.dequantize(), h)
    wanted = options.get("damping", 0.01)
    if result.damping is not None and result.damping > wanted:
        notes.append(f"the Hessian was not positive definite and took a damping of "
                     f"{result.damping:g} instead of {wanted:g}")
    if result.dead:
        notes.append(f"{result.dead} of {w.shape[1]} columns never had an input in the calibration "
                     "data; they are rounded to nearest")
    return result.tensor, Report(fmt.name, method, error, relative, result.damping, result.dead,
                                 (*notes, *result.notes))
