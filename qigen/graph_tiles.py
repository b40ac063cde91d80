"""What a graph model asks of the kernels that can be cut differently: the products and convolutions
of its gemm kernels by their register tiles, and the matrices in formats of the catalog."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qigen.backends.base import Isa
from qigen.backends.cpu import gemm
from qigen.backends.cpu.gemm import Tiles
from qigen.codegen.graph_kernels import GraphKernels
from qigen.costmodel.gemm import GemmShape, MeasuredTiles, choose_tiles, weight_bytes
from qigen.formats import catalog
from qigen.ir.graph import Graph, Node
from qigen.ir.types import TYPES
from qigen.planner import Measured, Product, packed_bytes
from qigen.targets import Machine
from qigen.tuning.database import shape_from_json

OPEN = 64
"""What a size that run time decides is taken for, if there is no limit to it."""


@dataclass(frozen=True)
class GemmCalls:
    """The calls of one gemm kernel, which serves all nodes with its arithmetic and epilogue;
    ``suffix`` is what :attr:`GemmSpec.suffix` says of it."""

    suffix: str
    arithmetic: str
    shapes: tuple[GemmShape, ...]


@dataclass(frozen=True)
class GraphCalls:
    """All that a graph model multiplies: by gemm kernels, and by kernels of the catalog's formats
    with ``activations``."""

    gemms: tuple[GemmCalls, ...]
    products: tuple[Product, ...]
    activations: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that pass through the caches in a run."""
        return sum(weight_bytes(c.arithmetic, c.shapes) for c in self.gemms) + sum(
            p.uses * packed_bytes(p) for p in self.products
        )


@dataclass(frozen=True)
class GraphMeasured:
    """What was measured of a graph's kernels: what ``plan_products`` and ``choose_tiles`` take."""

    formats: Measured = dataclasses.field(default_factory=dict)
    tiles: MeasuredTiles = dataclasses.field(default_factory=dict)


def graph_calls(
    graph: Graph, isa: Isa, machine: Machine, activations: str | None = None
) -> GraphCalls:
    """The calls of an optimized graph; open sizes count as their limits, else as 1 in the first
    dimension and as 64 in others."""
    shapes: dict[str, list[GemmShape]] = {}
    arithmetic: dict[str, str] = {}
    uses: dict[tuple[str, int, int], int] = {}
    plain = GraphKernels(isa, machine)
    for node in graph.nodes:
        if node.op in ("Product", "Convolution"):
            spec = plain.gemm_spec(node)
            arithmetic[spec.suffix] = spec.arithmetic
            shapes.setdefault(spec.suffix, []).append(_gemm_shape(node, graph))
        elif node.op == "FormatProduct":
            key = graph.values[node.inputs[1]].dtype, node.attrs["n"], node.attrs["k"]
            uses[key] = uses.get(key, 0) + 1
    return GraphCalls(
        tuple(GemmCalls(s, arithmetic[s], tuple(some)) for s, some in shapes.items()),
        tuple(Product(catalog.by_name(f), n, k, count) for (f, n, k), count in uses.items()),
        activations or "f32",
    )


def artifact_calls(manifest: Mapping[str, Any]) -> GraphCalls:
    """The calls of an artifact of a graph; KeyError, ValueError or TypeError if it is of an older
    version, whose manifest does not have them."""
    plan = manifest["plan"]
    gemms = tuple(
        GemmCalls(
            entry["kernel"].removeprefix("gemm_"),
            entry["arithmetic"],
            tuple(shape_from_json(shape) for shape in entry["shapes"]),
        )
        for entry in plan["tiles"]
    )
    uses: dict[tuple[str, int, int], int] = {}
    for tensor in manifest["tensors"]:
        if "layout" in tensor:
            for part in tensor["parts"]:
                key = (tensor["format"], part["shape"][0], part["shape"][1])
                uses[key] = uses.get(key, 0) + 1
    known = {(c["format"], c["n"], c["k"]): c["schedule"]["activations"] for c in plan["formats"]}
    products = tuple(
        Product(catalog.by_name(f), n, k, count)
        for (f, n, k), count in uses.items()
        if (f, n, k) in known
    )
    return GraphCalls(gemms, products, next(iter(known.values()), "f32"))


def plan_tiles(
    calls: GraphCalls, isa: Isa, machine: Machine, measured: MeasuredTiles
) -> tuple[dict[str, Tiles], list[dict[str, Any]]]:
    """The register tiles of gemm kernels, by the kernels' suffixes, and why they are those: by the
    cost model, or as ``measured``."""
    cached = calls.weight_bytes <= machine.l3_bytes // 2
    tiles: dict[str, Tiles] = {}
    choices: list[dict[str, Any]] = []
    for some in calls.gemms:
        choice = choose_tiles(
            some.arithmetic, some.shapes, isa, machine.cores, machine, cached, measured
        )
        tiles[some.suffix] = choice.tiles
        time = "measured_us" if choice.measured else "predicted_us"
        choices.append(
            {
                "kernel": f"gemm_{some.suffix}",
                "nodes": len(some.shapes),
                "tiles": shown_tiles(choice.tiles),
                "predicted_us": choice.predicted_us,
                "measured_us": choice.us if choice.measured else None,
                "rule_us": choice.rule_us,
                "bound": choice.bound,
                "runners_up": [
                    {"tiles": shown_tiles(t), time: us, "reason":
                     f"{us / choice.us - 1:.1%} slower" if us > choice.us else
                     "faster by less than the error"}
                    for t, us in choice.runners_up
                ],
                "arithmetic": some.arithmetic,
                "shapes": [dataclasses.asdict(shape) for shape in some.shapes],
            }
        )  # fmt: skip
    return tiles, choices


def shown_tiles(tiles: Tiles) -> str:
    """Tiles in words."""
    return (
        f"{tiles.pixels} pixels x {16 * tiles.blocks} channels, "
        f"{tiles.block_bytes >> 10} KiB of x together"
    )


def _gemm_shape(node: Node, graph: Graph) -> GemmShape:
    """What a Product or Convolution asks of its kernel."""
    limits: dict[str, int] = graph.meta.get("limits", {})

    def sizes(name: str) -> list[int]:
        return [
            d if isinstance(d, int) else limits.get(str(d)) or (OPEN if axis else 1)
            for axis, d in enumerate(graph.values[name].shape)
        ]

    a, y = node.attrs, sizes(node.outputs[0])
    if node.op == "Product":
        pixel = 4 * gemm.steps(a["k"], a["arithmetic"])
        return GemmShape(a["n"], a["k"], 1, max(1, math.prod(y[:-1])), 1, 1, pixel)
    x = sizes(node.inputs[0])
    images, rows, columns = (max(1, size) for size in y[:3])
    channels = x[3] * TYPES[graph.values[node.inputs[0]].dtype].bytes
    across, down = a["strides"][1] * channels, a["strides"][0] * x[2] * channels
    offsets = tuple(
        i * a["dilations"][0] * x[2] * channels + j * a["dilations"][1] * channels
        for i in range(a["kernel"][0])
        for j in range(a["kernel"][1])
    )
    n = a["n"] // a["group"]
    if x[1:3] == y[1:3] and tuple(a["strides"]) == (1, 1):  # a point at a time, without a border
        pixels = images * rows * columns
        return GemmShape(n, a["k"], len(offsets), pixels, 1, 1, across, offsets=offsets)
    image = x[1] * x[2] * channels
    return GemmShape(
        n, a["k"], len(offsets), columns, rows, images, across, down, image, offsets
    )
