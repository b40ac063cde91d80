"""Windows over images: what convolutions and pools have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qigen.errors import BadInput, Unsupported
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Node, Shape
from qigen.ir.schema import Attr
from qigen.ir.tensor import Argument, Ints, show

AUTO_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
MAX_AXES = 3

WINDOW = (
    Attr("auto_pad", str, "NOTSET", choices=AUTO_PADS),
    Attr("dilations", tuple, None),
    Attr("kernel_shape", tuple, None),
    Attr("pads", tuple, None),
    Attr("strides", tuple, None),
)


@dataclass(frozen=True)
class Window:
    """A window by axis of the image; pads are all begins, then all ends."""

    kernel: tuple[Dim, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[Dim, ...]
    out: tuple[Dim, ...]

    def arguments(self, kernel: bool = True) -> tuple[Argument, ...]:
        """What kernels take: ``kernel`` (unless they have weights), strides, dilations, pads."""
        lists = (*((self.kernel,) if kernel else ()), self.strides, self.dilations, self.pads)
        return tuple(Ints(tuple(values)) for values in lists)


def image_axes(node: Node, source: Shape) -> Shape:
    """The sizes of the image in [batch, channels, ..]; one to three axes have kernels."""
    if len(source) < 3:
        raise BadInput(
            f"the input of {node.op} is {show(source)}; it must be [batch, channels, ..]", node.name
        )
    if len(source) - 2 > MAX_AXES:
        raise Unsupported(
            f"{node.op} over {len(source) - 2} axes has no kernel; {MAX_AXES} are the most",
            node.name,
        )
    return source[2:]


def per_axis(node: Node, attr: str, axes: int, default: int, least: int) -> tuple[int, ...]:
    """An attribute with a number an axis."""
    values = node.attrs.get(attr)
    values = (default,) * axes if values is None or not len(values) else tuple(values)
    if len(values) != axes or any(v < least for v in values):
        raise BadInput(f"{attr} are {values}; there must be {axes} of at least {least}", node.name)
    return values


def window(
    node: Node, source: Shape, kernel: Sequence[Any] | None = None, ceil: bool = False
) -> Window:
    """The window of a convolution or pool over ``source``; ``kernel`` are the sizes that weights
    have."""
    image: tuple[Any, ...] = image_axes(node, source)
    n = len(image)
    sizes = kernel_of(node, n, kernel)
    strides = per_axis(node, "strides", n, 1, 1)
    dilations = per_axis(node, "dilations", n, 1, 1)
    pads: list[Any] = list(per_axis(node, "pads", 2 * n, 0, 0))
    auto = node.attrs["auto_pad"]
    out: list[Any] = []
    for i, d in enumerate(image):
        span = dilations[i] * (sizes[i] - 1) + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            size = dims.ceildiv(d, strides[i])
            total = dims.call("max", (size - 1) * strides[i] + span - d, 0)
            pads[i], pads[n + i] = split_pads(total, auto)
        else:
            if auto == "VALID":
                pads[i] = pads[n + i] = 0
            room = d + pads[i] + pads[n + i] - span
            size = (dims.ceildiv if ceil else dims.floordiv)(room, strides[i]) + 1
            if ceil:  # no window begins behind the image
                size = dims.call("min", size, dims.floordiv(d + pads[i] - 1, strides[i]) + 1)
            if isinstance(size, int):
                if isinstance(room, int) and room < 0 and size < 0:
                    raise BadInput(f"the window does not fit into {show(source)}", node.name)
                size = max(size, 0)
        out.append(size)
    return Window(sizes, strides, dilations, tuple(pads), tuple(out))


def kernel_of(node: Node, axes: int, weights: Sequence[Any] | None) -> tuple[Any, ...]:
    """The sizes of the kernel: the attribute's, which those of the weights must equal."""
    given = node.attrs["kernel_shape"]
    if given is None:
        if weights is None:
            raise BadInput(f"{node.op} needs kernel_shape", node.name)
        return tuple(weights)
    if len(given) != axes or any(k < 1 for k in given):
        raise BadInput(f"kernel_shape {tuple(given)} does not fit {axes} axes", node.name)
    if weights is not None and any(
        not isinstance(w, Sym) and w != k for w, k in zip(weights, given, strict=True)
    ):
        raise BadInput(
            f"kernel_shape is {tuple(given)}, the weights have {show(tuple(weights))}", node.name
        )
    return tuple(given)


def split_pads(total: Any, auto: str) -> tuple[Any, Any]:
    """Borders before and after: the larger half comes after, with SAME_LOWER before."""
    small = dims.floordiv(total, 2)
    large = total - small
    return (large, small) if auto == "SAME_LOWER" else (small, large)
