"""Matrix products: MatMul, Gemm, Einsum, those of 8-bit and of packed codes, and determinants."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from qigen.errors import BadInput, Unsupported
from qigen.formats.grouped import unpack_bits
from qigen.ir import dims
from qigen.ir.dims import Sym
from qigen.ir.graph import Dim, Graph, Node, Shape
from qigen.ir.schema import Array, Attr, Evaluation, register
from qigen.ir.tensor import (
    MAX_RANK,
    Alias,
    Call,
    Problem,
    Ref,
    Refs,
    TensorOp,
    Word,
    broadcast,
    check_inputs,
    element,
    given,
    kernel,
    require_type,
    shape,
    show,
)

FLOATS = ("f32", "f64", "f16", "bf16")
PRODUCT_TYPES = (*FLOATS, "i32", "i64", "u32", "u64")
CODES = ("i8", "u8")
SCALES = ("f32", "f16", "bf16")
WRONG = Problem("the sizes of its inputs do not fit together")


def same_type(node: Node, graph: Graph, allowed: Sequence[str], indices: Sequence[int]) -> str:
    """The type that the inputs at ``indices``, as far as they are there, have in common."""
    kinds = [require_type(node, graph, i, allowed) for i in indices if given(node, i)]
    if len(set(kinds)) != 1:
        raise BadInput(f"{node.op} of {' and '.join(kinds)}: the types must be equal", node.name)
    return kinds[0]


def must_match(node: Node, a: Dim, b: Dim, what: str) -> None:
    """BadInput if two sizes are known and differ; kernels check those that are not."""
    if not isinstance(a, Sym) and not isinstance(b, Sym) and a != b:
        raise BadInput(f"{what} are {a} and {b}; they must be equal", node.name)


def product_shape(node: Node, graph: Graph, a: int = 0, b: int = 1) -> Shape:
    """The shape of the matrix product of inputs number ``a`` and ``b``."""
    left, right = shape(node, graph, a), shape(node, graph, b)
    if not left or not right:
        raise BadInput(f"{node.op} of scalars: the inputs need a rank of at least 1", node.name)
    must_match(
        node,
        left[-1],
        right[-2] if len(right) > 1 else right[0],
        f"the inner sizes of {show(left)} and {show(right)}",
    )
    batch = broadcast(node, left[:-2], right[:-2])
    return (*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else ()))


@register
class MatMul(TensorOp):
    """The matrix product over broadcast leading axes, as numpy's matmul."""

    name = "onnx.MatMul"
    inputs = "A[.., M, K], B[.., K, N]"

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2)
        kind = same_type(node, graph, PRODUCT_TYPES, (0, 1))
        return [(product_shape(node, graph), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "linear.h", "matmul", (element(node, graph, 0).name,), WRONG)

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        return [np.matmul(inputs[0], inputs[1])]


@register
class Gemm(TensorOp):
    """alpha A B + beta C, A and B transposed if asked, C broadcast to the result."""

    name = "onnx.Gemm"
    inputs = "A[M, K], B[K, N], C?"
    attrs = (
        Attr("alpha", float, 1.0),
        Attr("beta", float, 1.0),
        Attr("transA", int, 0),
        Attr("transB", int, 0),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 3)
        kind = same_type(node, graph, PRODUCT_TYPES, (0, 1, 2))
        a, b = shape(node, graph, 0), shape(node, graph, 1)
        if len(a) != 2 or len(b) != 2:
            raise BadInput(f"A and B are {show(a)} and {show(b)}; they must be matrices", node.name)
        m, ka = a[::-1] if node.attrs["transA"] else a
        kb, n = b[::-1] if node.attrs["transB"] else b
        must_match(node, ka, kb, f"the inner sizes of {show(a)} and {show(b)}")
        if given(node, 2):
            c = shape(node, graph, 2)
            wanted = broadcast(node, (m, n), c)
            if len(c) > 2 or any(
                isinstance(d, int) and isinstance(w, int) and d != w
                for d, w in zip((m, n), wanted, strict=False)
            ):
                raise BadInput(f"C of {show(c)} cannot be broadcast to {show((m, n))}", node.name)
        return [((m, n), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        a = node.attrs
        return kernel(
            node,
            "linear.h",
            "gemm",
            (element(node, graph, 0).name,),
            float(a["alpha"]),
            float(a["beta"]),
            bool(a["transA"]),
            bool(a["transB"]),
            WRONG,
            inputs=(0, 1, 2),
        )


@register
class Einsum(TensorOp):
    """Sums of products by Einstein's convention; ``...`` stands for axes that are broadcast."""

    name = "onnx.Einsum"
    inputs = "x0, x1, .."
    attrs = (Attr("equation", str),)
    _TYPES = (*PRODUCT_TYPES, "i8", "i16", "u8", "u16")

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1, len(node.inputs))
        kind = same_type(node, graph, self._TYPES, range(len(node.inputs)))
        operands, result = self._axes(node, graph)
        sizes: dict[str, Dim] = {}
        for i, letters in enumerate(operands):
            for letter, d in zip(letters, shape(node, graph, i), strict=True):
                sizes[letter] = broadcast(node, (sizes.get(letter, 1),), (d,))[0]
        if len(set("".join(operands)) - set(result)) > MAX_RANK:
            raise Unsupported(f"Einsum sums over more than {MAX_RANK} axes", node.name)
        return [(tuple(sizes[letter] for letter in result), kind)]

    def _axes(self, node: Node, graph: Graph) -> tuple[list[str], str]:
        """The letters of every operand's axes and of the result's, from a on."""
        text = node.attrs["equation"].replace(" ", "")
        left, arrow, right = text.partition("->")
        terms = left.split(",")
        if len(terms) != len(node.inputs):
            raise BadInput(
                f"equation {text} has {len(terms)} terms for {len(node.inputs)} inputs", node.name
            )
        ranks = [len(shape(node, graph, i)) for i in range(len(terms))]
        spread = max(
            (
                rank - len(term.replace("...", ""))
                for term, rank in zip(terms, ranks, strict=True)
                if "..." in term
            ),
            default=0,
        )
        plain = left.replace("...", "").replace(",", "")
        if not arrow:
            once = "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
            right = ("..." if "..." in left else "") + once
        names: dict[str, int] = {}
        for c in plain:
            names.setdefault(c, len(names))
        if any(c not in string.ascii_letters for c in names) or spread < 0:
            raise BadInput(f"equation {text} does not fit its inputs", node.name)
        if len(names) + spread > 26:
            raise Unsupported(f"equation {text} has more than 26 axes", node.name)

        def letters(term: str, rank: int | None) -> str:
            before, dots, after = term.partition("...")
            count = 0 if not dots else spread if rank is None else rank - len(before + after)
            if count < 0 or any(c not in names for c in before + after):
                raise BadInput(f"equation {text} does not fit its inputs", node.name)
            middle = [len(names) + spread - count + i for i in range(count)]
            numbers = [*(names[c] for c in before), *middle, *(names[c] for c in after)]
            if rank is not None and len(numbers) != rank:
                raise BadInput(
                    f"term {term} of {text} has {len(numbers)} axes, the input {rank}", node.name
                )
            return "".join(string.ascii_lowercase[i] for i in numbers)

        operands = [letters(term, rank) for term, rank in zip(terms, ranks, strict=True)]
        result = letters(right, None)
        if len(set(result)) != len(result):
            raise BadInput(f"equation {text} repeats an axis of the result", node.name)
        return operands, result

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        operands, result = self._axes(node, graph)
        equation = Word(f'"{",".join(operands)}->{result}"')
        return Call(
            "linear.h",
            "einsum",
            (element(node, graph, 0).name,),
            (Ref(node.outputs[0]), Refs(tuple(node.inputs)), equation, WRONG),
        )


class _CodeProduct(TensorOp):
    """A product of 8-bit codes; ``places`` are the inputs a, b and their zero points."""

    places: tuple[int, int, int, int]

    def product(self, node: Node, graph: Graph) -> Shape:
        """The shape of the result, the types checked."""
        a, b, a_zero, b_zero = self.places
        for x, zero in ((a, a_zero), (b, b_zero)):
            same_type(node, graph, CODES, (x, zero))
        result = product_shape(node, graph, a, b)
        for zero, along in ((a_zero, 0), (b_zero, 1)):
            if given(node, zero) and len(shape(node, graph, zero)) == 1:
                size = shape(node, graph, zero)[0]
                side = shape(node, graph, a if along == 0 else b)
                length = side[-2 if along == 0 else -1] if len(side) > 1 else 1
                if size != 1:
                    must_match(node, size, length, "the zero points and what they belong to")
        return result


@register
class MatMulInteger(_CodeProduct):
    """The product of 8-bit matrices without their zero points, as i32."""

    name = "onnx.MatMulInteger"
    inputs = "A[.., M, K], B[.., K, N], a_zero_point?, b_zero_point?"
    places = (0, 1, 2, 3)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 2, 4)
        return [(self.product(node, graph), "i32")]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        types = (element(node, graph, 0).name, element(node, graph, 1).name)
        return kernel(node, "linear.h", "matmul_integer", types, WRONG, inputs=range(4))


@register
class QLinearMatMul(_CodeProduct):
    """The product of quantized matrices, quantized: rounded half to even, saturated."""

    name = "onnx.QLinearMatMul"
    inputs = "a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point"
    places = (0, 3, 2, 5)

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 8)
        same_type(node, graph, SCALES, (1, 4, 6))
        return [(self.product(node, graph), require_type(node, graph, 7, CODES))]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        types = tuple(element(node, graph, i).name for i in (0, 3, 7, 1))
        return kernel(node, "linear.h", "qlinear_matmul", types, WRONG)


@register
class MatMulNBits(TensorOp):
    """A times the transpose of weights of ``bits`` bits with a scale and zero by block of K."""

    name = "ms.MatMulNBits"
    inputs = "A[.., K], B u8[N, blocks, bytes], scales, zero_points?, g_idx?, bias?"
    attrs = (
        Attr("K", int, minimum=1),
        Attr("N", int, minimum=1),
        Attr("bits", int, 4),
        Attr("block_size", int, minimum=16),
        Attr("accuracy_level", int, 0, doc="a hint: the arithmetic is that of A's type at least"),
        Attr("weight_prepacked", int, 0),
    )

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 3, 6)
        a = node.attrs
        if a["bits"] not in (2, 4, 8):
            raise Unsupported(
                f"MatMulNBits of {a['bits']} bits has no kernel; 2, 4 and 8 have", node.name
            )
        if a["weight_prepacked"]:
            raise Unsupported("MatMulNBits of prepacked weights is not supported", node.name)
        if a["block_size"] & (a["block_size"] - 1):
            raise BadInput(f"block_size is {a['block_size']}; it must be a power of two", node.name)
        kind = same_type(node, graph, FLOATS, (0, 5))
        require_type(node, graph, 1, ("u8",))
        require_type(node, graph, 2, SCALES)
        if given(node, 3):
            require_type(node, graph, 3, ("u8", *SCALES))
        if given(node, 4):
            require_type(node, graph, 4, ("i32",))
        blocks = -(-a["K"] // a["block_size"])
        packed = -(-blocks * a["bits"] // 8)
        sizes = {
            1: a["N"] * blocks * (a["block_size"] * a["bits"] // 8),
            2: a["N"] * blocks,
            3: a["N"]
            * (packed if given(node, 3) and element(node, graph, 3).name == "u8" else blocks),
            5: a["N"],
        }
        for index, size in sizes.items():
            if given(node, index):
                must_match(
                    node,
                    dims.product(shape(node, graph, index)),
                    size,
                    f"the elements of input {index} and what K, N and block_size ask for",
                )
        source = shape(node, graph, 0)
        if not source:
            raise BadInput("A is a scalar", node.name)
        must_match(node, source[-1], a["K"], "the last size of A and K")
        return [((*source[:-1], a["N"]), kind)]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        a = node.attrs
        zeros = element(node, graph, 3).name if given(node, 3) else "u8"
        types = (element(node, graph, 0).name, element(node, graph, 2).name, zeros)
        return kernel(
            node,
            "linear.h",
            "matmul_nbits",
            types,
            a["K"],
            a["N"],
            a["bits"],
            a["block_size"],
            WRONG,
            inputs=range(6),
        )

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        k, n, bits, size = (node.attrs[name] for name in ("K", "N", "bits", "block_size"))
        blocks = -(-k // size)
        x, codes, scales, zeros, groups, bias = (
            inputs[i] if given(node, i) else None for i in range(6)
        )
        assert x is not None and codes is not None and scales is not None
        q = unpack_bits(codes.reshape(n, -1), bits)[:, : blocks * size][:, :k].astype(np.float64)
        block = np.arange(k) // size if groups is None else groups[:k]
        if zeros is None:
            z = np.full((n, blocks), 2.0 ** (bits - 1))
        elif zeros.dtype == np.uint8:
            z = unpack_bits(zeros.reshape(n, -1), bits)[:, :blocks].astype(np.float64)
        else:
            z = zeros.reshape(n, blocks).astype(np.float64)
        w = (q - z[:, block]) * scales.reshape(n, blocks).astype(np.float64)[:, block]
        y = x.astype(np.float64) @ w.T
        return [(y if bias is None else y + bias.astype(np.float64)).astype(x.dtype)]


@register
class Det(TensorOp):
    """Determinants of the matrices in the last two axes."""

    name = "onnx.Det"
    inputs = "x[.., M, M]"
    results = 2  # the second is memory for the elimination

    def infer(self, node: Node, graph: Graph) -> list[tuple[Shape, str]]:
        check_inputs(node, 1)
        kind = require_type(node, graph, 0, FLOATS)
        source = shape(node, graph, 0)
        if len(source) < 2:
            raise BadInput(f"x is {show(source)}; it must hold matrices", node.name)
        must_match(node, source[-1], source[-2], "the sizes of the matrices")
        return [(source[:-2], kind), (source, "f64" if kind == "f64" else "f32")]

    def call(self, node: Node, graph: Graph) -> Call | Alias:
        return kernel(node, "linear.h", "det", (element(node, graph, 0).name,), WRONG)

    def reference(self, node: Node, inputs: Sequence[Array], ev: Evaluation) -> list[Array]:
        x = inputs[0]
        wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        return [np.asarray(np.linalg.det(wide)).astype(x.dtype), wide]


__all__ = [
    "CODES", "FLOATS", "PRODUCT_TYPES", "SCALES", "WRONG", "must_match", "product_shape",
    "same_type",
]  # fmt: skip
