"""Thousands of damaged ONNX files: each is imported, or is one clear error."""

from __future__ import annotations

import functools
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from qigen.errors import BadInput, Unsupported, UsageError
from qigen.frontends.onnx import import_model, read_model
from qigen.ir.verify import verify
from qigen.passes.tensor import optimize_graph
from tests.frontends.test_gguf_fuzz import little_memory
from tests.frontends.tiny_onnx import F32, I64, model, write_tiny_onnx

DATA = Path(__file__).parents[1] / "data" / "onnx"
STRIPPED = 64  # elements of a tensor that stays in a stripped model
EDGES = [
    0, 1, -1, 2, 3, -2, 7, 8, 9, 63, 64, 127, 128, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31,
    -(1 << 31), 1 << 32, 1 << 40, (1 << 62), (1 << 63) - 1, -(1 << 63),
]  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, 3e38, 1e9]
OPERATORS = [
    "Add", "Relu", "Reshape", "Shape", "Gather", "Concat", "Slice", "MatMul", "Conv", "Softmax",
    "Transpose", "Cast", "QuantizeLinear", "DequantizeLinear", "If", "Loop", "Resize", "Split",
    "Constant", "ConstantOfShape", "Expand", "Tile", "Pad", "TopK", "Range", "NoSuchOperator",
]  # fmt: skip


# ---- models --------------------------------------------------------------------------------------


def write_shapes(path: Path) -> Path:
    """Sizes that are computed, a branch and a loop that are known, a function of the model."""
    info = helper.make_tensor_value_info
    node = helper.make_node
    cube = ["p", 2, 2]
    then = helper.make_graph([node("Relu", ["a"], ["t"])], "then", [], [info("t", F32, cube)])
    other = helper.make_graph([node("Abs", ["a"], ["e"])], "else", [], [info("e", F32, cube)])
    body = helper.make_graph(
        [node("Add", ["state", "w"], ["next"]), node("Identity", ["go"], ["on"])],
        "body",
        [info("i", I64, []), info("go", TensorProto.BOOL, []), info("state", F32, cube)],
        [info("on", TensorProto.BOOL, []), info("next", F32, cube)],
    )
    made = model(
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"], axis=0),
            node("Unsqueeze", ["n", "zeros"], ["n1"]),
            node("Concat", ["n1", "rest"], ["shape"], axis=0),
            node("Reshape", ["x", "shape"], ["a"]),
            node("If", ["yes"], ["b"], then_branch=then, else_branch=other),
            node("Loop", ["trips", "yes", "b"], ["c"], body=body),
            node("Double", ["c"], ["d"], domain="own"),
            node("Slice", ["d", "zeros", "rest_1", "last"], ["y"]),
            node("Constant", [], ["k"], value=helper.make_tensor("k", F32, [2], [1.0, 2.0])),
            node("Softmax", ["y"], ["z"], axis=-1),
        ],
        [info("x", F32, ["n", 4])],
        [info("z", F32, ["p", 2, 1]), info("k", F32, [2])],
        {
            "zero": np.array(0),
            "zeros": np.array([0]),
            "last": np.array([2]),
            "rest": np.array([2, 2]),
            "rest_1": np.array([1]),
            "trips": np.array(2),
            "yes": np.array(True),
            "w": np.array([1, 2], np.float32),
        },
    )
    made.opset_import.append(helper.make_opsetid("own", 1))
    made.functions.append(
        helper.make_function(
            "own", "Double", ["p"], ["q"], [node("Add", ["p", "p"], ["q"])],
            [helper.make_opsetid("", 18)],
        )
    )  # fmt: skip
    made.graph.sparse_initializer.append(sparse("sparse", [2, 2]))
    made.graph.node.append(node("Add", ["d", "sparse"], ["unused"]))
    onnx.save(made, path)
    return path


def sparse(name: str, dims: list[int]) -> onnx.SparseTensorProto:
    """A tensor of two ones."""
    values = helper.make_tensor(name, F32, [2], [1.0, 1.0])
    return helper.make_sparse_tensor(values, helper.make_tensor("", I64, [2], [0, 3]), dims)


def write_quantized(path: Path) -> Path:
    """A convolution and a product between codes, as quantizers write them, and data beside."""
    info = helper.make_tensor_value_info
    node = helper.make_node
    rng = np.random.default_rng(2)
    f32 = np.float32
    made = model(
        [
            node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            node("DequantizeLinear", ["xq", "xs", "xz"], ["xf"]),
            node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
            node("Conv", ["xf", "wf", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("QuantizeLinear", ["r", "ys", "xz"], ["rq"]),
            node("DequantizeLinear", ["rq", "ys", "xz"], ["rf"]),
            node("GlobalAveragePool", ["rf"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("DequantizeLinear", ["m", "ms", "mz"], ["mf"]),
            node("MatMul", ["f", "mf"], ["y"]),
            node("Add", ["y", "v"], ["z"]),
        ],
        [info("x", F32, ["n", 3, 8, 8])],
        [info("z", F32, ["n", 5])],
        {
            "xs": f32(0.02),
            "xz": np.uint8(128),
            "ys": f32(0.05),
            "w": rng.integers(-127, 128, (4, 3, 3, 3), np.int8),
            "ws": rng.random(4, f32) / 100,
            "wz": np.zeros(4, np.int8),
            "b": rng.random(4, f32),
            "m": rng.integers(-127, 128, (4, 5), np.int8),
            "ms": f32(0.01),
            "mz": np.int8(0),
            "v": rng.random(5, f32),
        },
    )
    onnx.save(made, path, save_as_external_data=True, location="beside.bin", size_threshold=0)
    return path


def stripped(source: Path, path: Path) -> Path:
    """A real model without its large tensors, which become inputs, and without most of its nodes'
    documentation."""
    made = onnx.load(source)
    graph = made.graph
    kept = [t for t in graph.initializer if math.prod(t.dims) <= STRIPPED]
    names = {i.name for i in graph.input}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > STRIPPED and tensor.name not in names:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(made, path)
    return path


# ---- damage --------------------------------------------------------------------------------------


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits, truncations, insertions and removals that know nothing of protobuf."""
    result = bytearray(data)
    kind, at = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        for _ in range(rng.choice((1, 1, 4, 32))):
            result[(at + rng.randrange(64)) % len(result)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del result[at:]
    elif kind == 2:
        result[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
    else:
        del result[at : at + rng.choice((1, 2, 8, 32))]
    return bytes(result)


class Damage:
    """One change of a field."""

    def __init__(self, made: onnx.ModelProto, rng: random.Random) -> None:
        self.model, self.graph, self.rng = made, made.graph, rng

    def apply(self) -> None:
        """A random one."""
        self.rng.choice(
            [
                self.node, self.node, self.attribute, self.attribute, self.initializer,
                self.initializer, self.values, self.external, self.interface, self.order,
                self.opset, self.subgraph,
            ]
        )()  # fmt: skip

    def number(self, old: int = 0) -> int:
        new = self.rng.choice([*EDGES, old + 1, old - 1, old * 2])
        return max(-(1 << 63), min(new, (1 << 63) - 1))

    def a_name(self) -> str:
        """Undefined, of a value before or behind, or none."""
        names = [name for n in self.graph.node for name in (*n.input, *n.output)]
        names += [t.name for t in self.graph.initializer] + [i.name for i in self.graph.input]
        return self.rng.choice([*names[:200], "undefined", "", "a\0b", "é" * 50])

    def a_node(self) -> onnx.NodeProto | None:
        return self.rng.choice(self.graph.node) if self.graph.node else None

    def node(self) -> None:
        """Names and operator: cycles, undefined inputs, results written twice."""
        node = self.a_node()
        if node is None:
            return
        kind = self.rng.randrange(7)
        if kind <= 1 and node.input:
            node.input[self.rng.randrange(len(node.input))] = self.a_name()
        elif kind == 2 and node.output:
            node.output[self.rng.randrange(len(node.output))] = self.a_name()
        elif kind == 3:
            node.op_type = self.rng.choice(OPERATORS)
        elif kind == 4:
            node.domain = self.rng.choice(["ai.onnx", "com.microsoft", "own", "none", "ai.onnx.ml"])
        elif kind == 5:
            names = self.rng.choice((node.input, node.output))
            if names and self.rng.random() < 0.5:
                names.pop()
            else:
                names.append(self.a_name())
        else:
            node.name = self.rng.choice(["", "same", node.name * 3])

    def attribute(self) -> None:
        """Values, types and names of attributes."""
        nodes = [n for n in self.graph.node if n.attribute]
        if not nodes:
            return
        node = self.rng.choice(nodes)
        attribute = self.rng.choice(node.attribute)
        kind = self.rng.randrange(7)
        if kind == 0:
            node.attribute.remove(attribute)
        elif kind == 1:
            attribute.name = self.rng.choice(["axis", "to", "value", "pads", "no_such", ""])
        elif kind == 2:
            attribute.type = self.rng.choice(AttributeProto.AttributeType.values())
        elif kind == 3:
            node.attribute.append(
                helper.make_attribute(
                    self.rng.choice(["axis", "group", "keepdims", "kernel_shape", "no_such"]),
                    self.rng.choice([self.number(), [self.number()] * 2, 1.5, "text", b"\xff\xfe"]),
                )
            )
        elif attribute.type == AttributeProto.INT:
            attribute.i = self.number(attribute.i)
        elif attribute.type == AttributeProto.FLOAT:
            attribute.f = self.rng.choice(FLOATS)
        elif attribute.type == AttributeProto.INTS:
            if attribute.ints and kind < 6:
                index = self.rng.randrange(len(attribute.ints))
                attribute.ints[index] = self.number(attribute.ints[index])
            else:
                attribute.ints.extend([self.number()] * self.rng.choice((1, 9, 100)))
        elif attribute.type == AttributeProto.STRING:
            attribute.s = self.rng.choice([b"", b"\xff", b"SAME_UPPER", b"linear", b"wrap"])
        elif attribute.type == AttributeProto.TENSOR:
            self.tensor(attribute.t)

    def initializer(self) -> None:
        rows = list(self.graph.initializer)
        for tensor in self.graph.sparse_initializer:
            rows += [tensor.values, tensor.indices]
            if self.rng.random() < 0.1:
                tensor.dims[self.rng.randrange(len(tensor.dims))] = self.number()
        if rows:
            self.tensor(self.rng.choice(rows))

    def tensor(self, tensor: TensorProto) -> None:
        """Shape, type and bytes of a constant."""
        kind = self.rng.randrange(7)
        if kind <= 1 and tensor.dims:
            index = self.rng.randrange(len(tensor.dims))
            tensor.dims[index] = self.number(tensor.dims[index])
        elif kind == 2:
            tensor.dims.append(self.number(1))
        elif kind == 3:
            tensor.data_type = self.rng.choice([*TensorProto.DataType.values(), 99, -1])
        elif kind == 4:
            data = tensor.raw_data
            cut = data[: len(data) // 2]
            tensor.raw_data = self.rng.choice([b"", data[:-1], data + b"\0", cut])
        elif kind == 5:
            self.rng.choice((tensor.float_data, tensor.int32_data, tensor.int64_data)).append(1)
        else:
            tensor.name = self.a_name()

    def values(self) -> None:
        """Numbers: scales that are NaN, zero points and indices out of range."""
        tensors = [
            t for t in self.graph.initializer
            if t.HasField("raw_data") and t.data_type != TensorProto.STRING
        ]  # fmt: skip
        if not tensors:
            return
        tensor = self.rng.choice(tensors)
        try:
            array = numpy_helper.to_array(tensor).copy()
        except Exception:  # it is damaged already
            return
        if not array.size:
            return
        if array.dtype.kind == "f":
            array.reshape(-1)[self.rng.randrange(array.size)] = self.rng.choice(FLOATS)
        else:
            array.reshape(-1)[self.rng.randrange(array.size)] = np.array(
                self.number() & 0x7FFFFFFFFFFFFFFF
            ).astype(array.dtype)
        tensor.raw_data = array.tobytes()

    def external(self) -> None:
        """Data in other files: outside of the folder, missing, cut."""
        if not self.graph.initializer:
            return
        tensor = self.rng.choice(self.graph.initializer)
        if not tensor.external_data or self.rng.random() < 0.3:
            del tensor.external_data[:]
            if tensor.HasField("raw_data"):
                tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        places = [
            "../beside.bin", "/etc/passwd", "none.bin", "", ".", "..", "beside.bin", "link.bin",
            "pipe", "a/../../x", "~/x", "beside.bin\0", "x" * 5000,
        ]  # fmt: skip
        kind = self.rng.randrange(3)
        if kind == 0 or not tensor.external_data:
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", self.rng.choice(places)
        elif kind == 1:
            self.rng.choice(tensor.external_data).value = self.rng.choice(
                [*places, *map(str, EDGES), "text", "1e3"]
            )
        else:
            entry = tensor.external_data.add()
            entry.key = self.rng.choice(["offset", "length", "checksum", "location", ""])
            entry.value = self.rng.choice(["text", *map(str, EDGES)])

    def interface(self) -> None:
        """Shapes and types of inputs and outputs."""
        infos = [*self.graph.input, *self.graph.output, *self.graph.value_info]
        if not infos:
            return
        info = self.rng.choice(infos)
        kind = self.rng.randrange(7)
        tensor = info.type.tensor_type
        if kind == 0:
            info.name = self.a_name()
        elif kind == 1:
            tensor.elem_type = self.rng.choice([*TensorProto.DataType.values(), 99, -1])
        elif kind == 2:
            tensor.ClearField("shape")
        elif kind == 3:
            for _ in range(self.rng.choice((1, 8))):
                tensor.shape.dim.add().dim_value = self.number(1)
        elif kind == 4:
            info.ClearField("type")
        elif kind == 5:
            info.type.sequence_type.elem_type.tensor_type.elem_type = 1
        elif tensor.shape.dim:
            d = self.rng.choice(tensor.shape.dim)
            if self.rng.random() < 0.5:
                d.dim_value = self.number(d.dim_value)
            else:
                names = ["", "?", "n + 1", "int", "n\n;", "é", "-1", "x" * 999]
                d.dim_param = self.rng.choice(names)

    def order(self) -> None:
        """Nodes, inputs and outputs moved, doubled or lost."""
        rows: Any = self.rng.choice(
            (self.graph.node, self.graph.node, self.graph.initializer, self.graph.output,
             self.graph.input)
        )  # fmt: skip
        if not rows:
            return
        row = type(self.rng.choice(rows))()
        row.CopyFrom(self.rng.choice(rows))
        kind = self.rng.randrange(3)
        if kind == 0:
            rows.append(row)
        elif kind == 1:
            rows.insert(0, row)
        else:
            del rows[self.rng.randrange(len(rows))]

    def opset(self) -> None:
        """Versions and domains."""
        entry = self.rng.choice(self.model.opset_import) if self.model.opset_import else None
        kind = self.rng.randrange(4)
        if kind == 0 and entry is not None:
            entry.version = self.number(entry.version)
        elif kind == 1 and entry is not None:
            entry.domain = self.rng.choice(["", "ai.onnx", "own", "none"])
        elif kind == 2:
            self.model.ir_version = self.rng.choice([0, 1, 3, 4, 99, 1 << 40])
        elif entry is not None:
            self.model.opset_import.remove(entry)

    def subgraph(self) -> None:
        """The same inside of a branch or loop."""
        graphs = [a.g for n in self.graph.node for a in n.attribute if a.HasField("g")]
        if not graphs:
            return self.node()
        inner = Damage(self.model, self.rng)
        inner.graph = self.rng.choice(graphs)
        self.rng.choice((inner.node, inner.order, inner.interface, inner.initializer))()
        return None


def damaged(source: onnx.ModelProto, data: bytes, rng: random.Random) -> bytes:
    """A file with one to three damages."""
    if rng.random() < 0.2:
        return damage_bytes(data, rng)
    made = onnx.ModelProto()
    made.CopyFrom(source)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            Damage(made, rng).apply()
        except (ValueError, TypeError):  # protobuf itself refuses it
            continue
    return made.SerializeToString()


# ---- attempts ------------------------------------------------------------------------------------


def attempt(path: Path) -> bool:
    """All up to the C++ code; False if it was refused, as it should be."""
    try:
        graph = import_model(read_model(path), str(path))
        verify(graph)
        optimize_graph(graph)
    except (BadInput, Unsupported, UsageError) as error:
        assert error.where or error.message
        assert 10 < len(error.message) < 1000, error.message
        return False
    return True


def fuzz(source: Path, path: Path, seed: int, count: int) -> int:
    """Damaged versions of a file that were refused."""
    data = source.read_bytes()
    base = onnx.ModelProto()
    base.ParseFromString(data)
    rng = random.Random(seed)
    refused, slowest = 0, 0.0
    with little_memory(), np.errstate(all="ignore"):
        for i in range(count):
            content = damaged(base, data, rng)
            path.write_bytes(content)
            start = time.perf_counter()
            try:
                refused += not attempt(path)
            except Exception as error:
                if keep := os.environ.get("QIGEN_FUZZ_KEEP"):
                    Path(keep, f"{source.stem}-{seed}-{i}.onnx").write_bytes(content)
                raise AssertionError(f"seed {seed}, number {i}") from error
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 30.0
    return refused


MODELS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "tiny": (write_tiny_onnx, 1500),
    "shapes": (write_shapes, 1500),
    "quantized": (write_quantized, 1500),
    "cls": (functools.partial(stripped, DATA / "ocr_v2_cls_qdq.onnx"), 40),
    "rec": (functools.partial(stripped, DATA / "ocr_v4_rec_qdq.onnx"), 12),
}


@pytest.mark.parametrize("name", MODELS)
def test_damaged_files_are_refused_cleanly(name: str, tmp_path: Path) -> None:
    write, count = MODELS[name]
    source = write(tmp_path / f"{name}.onnx")
    # what external data may name
    secret = tmp_path.parent / "beside.bin"
    secret.write_bytes(b"\0" * 4096)
    (tmp_path / "link.bin").symlink_to(secret)
    os.mkfifo(tmp_path / "pipe")
    refused = fuzz(source, tmp_path / "damaged.onnx", 1, count)
    # names, sizes and numbers may be other ones that make sense; most damage must be seen
    assert refused > 0.4 * count


def test_the_models_themselves_are_read(tmp_path: Path) -> None:
    for name in ("tiny", "shapes", "quantized"):
        graph = import_model(read_model(MODELS[name][0](tmp_path / f"{name}.onnx")), name)
        assert optimize_graph(graph).nodes


@pytest.mark.parametrize("name", ["tiny", "shapes"])
def test_every_truncation(name: str, tmp_path: Path) -> None:
    source = MODELS[name][0](tmp_path / f"{name}.onnx")
    data = source.read_bytes()
    path = tmp_path / "damaged.onnx"
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        attempt(path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../beside.bin", "outside"),
        ("/etc/passwd", "outside"),
        ("link.bin", "outside"),
        ("none.bin", "missing"),
        ("pipe", "missing"),
        ("", "missing"),
        ("x" * 5000, "missing"),
        ("beside.bin\0", "missing"),
    ],
)
def test_external_data_stays_in_its_folder(location: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "beside.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to(tmp_path / "beside.bin")
    os.mkfifo(folder / "pipe")
    made = onnx.load(write_tiny_onnx(folder / "m.onnx"))
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    onnx.save(made, folder / "m.onnx")
    with pytest.raises(BadInput, match=message):
        read_model(folder / "m.onnx")


@pytest.mark.parametrize("dims", [[1 << 40], [1 << 32, 1 << 32], [-4], [(1 << 63) - 1]])
def test_declared_sizes_allocate_nothing(dims: list[int], tmp_path: Path) -> None:
    made = onnx.load(write_tiny_onnx(tmp_path / "m.onnx"))
    tensor = made.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    onnx.save(made, tmp_path / "m.onnx")
    with little_memory(), pytest.raises(BadInput):
        import_model(read_model(tmp_path / "m.onnx"), "m.onnx")
    del made.graph.initializer[:]
    made.graph.sparse_initializer.append(sparse("w", dims))
    onnx.save(made, tmp_path / "m.onnx")
    with little_memory(), pytest.raises((BadInput, Unsupported)):
        import_model(read_model(tmp_path / "m.onnx"), "m.onnx")
    # operators that make large results of nothing
    info = helper.make_tensor_value_info
    large = model(
        [
            helper.make_node("ConstantOfShape", ["s"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["y"], keepdims=0),
        ],
        [],
        [info("y", F32, [])],
        {"s": np.array(dims)},
    )
    onnx.save(large, tmp_path / "l.onnx")
    with little_memory():
        attempt(tmp_path / "l.onnx")


def with_functions(calls: dict[str, list[str]]) -> onnx.ModelProto:
    """A model of functions: what each calls, one after the other. It calls the first."""
    info = helper.make_tensor_value_info
    opset_imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    first = next(iter(calls))
    made = model(
        [helper.make_node(first, ["x"], ["y"], domain="own")],
        [info("x", F32, [2])],
        [info("y", F32, [2])],
    )
    made.opset_import.append(opset_imports[1])
    for name, called in calls.items():
        values = ["a", *(f"v{i}" for i in range(len(called) - 1)), "b"]
        nodes = [
            helper.make_node(op, [values[i]], [values[i + 1]], domain="" if op == "Relu" else "own")
            for i, op in enumerate(called)
        ]
        made.functions.append(
            helper.make_function("own", name, ["a"], ["b"], nodes, opset_imports)
        )
    return made


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ({"A": ["A"]}, BadInput),
        ({"A": ["B"], "B": ["C"], "C": ["Relu", "A"]}, BadInput),
        ({"A": ["Relu"], "B": ["B"]}, BadInput),
        # 4^15 nodes
        ({**{f"F{i}": [f"F{i + 1}"] * 4 for i in range(15)}, "F15": ["Relu"]}, Unsupported),
        ({**{f"F{i}": [f"F{i + 1}"] for i in range(500)}, "F500": ["Relu"]}, BadInput),
    ],
)
def test_functions_without_end(
    calls: dict[str, list[str]], error: type[Exception], tmp_path: Path
) -> None:
    onnx.save(with_functions(calls), tmp_path / "m.onnx")
    with little_memory(), pytest.raises(error):
        read_model(tmp_path / "m.onnx")


def test_loops_in_loops_end(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info

    def loop(depth: int) -> onnx.NodeProto:
        state, result = f"s{depth}", f"r{depth}"
        inner = (
            helper.make_node("Add", [state, "x"], [result])
            if depth == 0
            else loop(depth - 1)
        )
        body = helper.make_graph(
            [inner, helper.make_node("Identity", [f"go{depth}"], [f"on{depth}"])],
            f"body{depth}",
            [
                info(f"i{depth}", I64, []),
                info(f"go{depth}", TensorProto.BOOL, []),
                info(state, F32, [2]),
            ],
            [info(f"on{depth}", TensorProto.BOOL, []), info(result, F32, [2])],
        )
        outer = f"s{depth + 1}"
        return helper.make_node("Loop", ["trips", "yes", outer], [f"r{depth + 1}"], body=body)

    made = model(
        [helper.make_node("Identity", ["x"], ["s3"]), loop(2)],
        [info("x", F32, [2])],
        [info("r3", F32, [2])],
        {"trips": np.array(1000), "yes": np.array(True)},
    )
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(Unsupported, match="Loop"):
        import_model(read_model(tmp_path / "m.onnx"), "m.onnx")
