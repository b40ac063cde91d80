"""Products of Relax modules by our kernels, against plain TVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qigen
from qigen.errors import Unsupported, UsageError

pytest.importorskip("tvm")

import tvm
from tvm import relax
from tvm.relax.frontend import nn

from qigen.backends.tvm import offload

Array = npt.NDArray[Any]
WIDTH, HIDDEN, OUT = 128, 96, 50  # OUT is no multiple of 16, WIDTH and HIDDEN are of 32
FORMAT = "u4g32"


class Net(nn.Module):  # type: ignore[misc]
    """Two layers, the first without a bias; their weights are [N, K]."""

    def __init__(self) -> None:
        self.a = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.b = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Any) -> Any:
        return self.b(nn.op.silu(self.a(x)))


def parameters() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(0, 0.1, (HIDDEN, WIDTH)).astype(np.float32),
        "b.weight": rng.normal(0, 0.1, (OUT, HIDDEN)).astype(np.float32),
        "b.bias": rng.normal(0, 1, OUT).astype(np.float32),
    }


def module(values: dict[str, Array]) -> Any:
    """The module with its parameters bound; any number of rows."""
    spec = {"forward": {"x": nn.spec.Tensor(["m", WIDTH], "float32")}}
    mod, names = Net().export_tvm(spec=spec)
    bound = {p: tvm.runtime.tensor(values[name]) for p, (name, _) in
             zip(mod["forward"].params[1:], names, strict=True)}  # fmt: skip
    return relax.transform.BindParams("forward", bound)(mod)


def run(built: Any, x: Array) -> Array:
    vm = relax.VirtualMachine(built, tvm.cpu())
    return np.asarray(vm["forward"](tvm.runtime.tensor(x)).numpy())


def rounded(values: dict[str, Array]) -> dict[str, Array]:
    """The parameters as the kernels see them."""
    return {name: qigen.quantize(w, FORMAT).dequantize() if w.ndim == 2 else w
            for name, w in values.items()}  # fmt: skip


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_against_plain_tvm(activations: str, tmp_path: Path) -> None:
    """The same as TVM with the rounded weights; after export and reload too."""
    values = parameters()
    mod = offload(module(values), weights=FORMAT, activations=activations)
    assert "call_dps_packed" in mod.script() and "R.matmul" not in mod.script()
    assert not mod.attrs["const_name_to_constant"]  # no float weights are left
    built = tvm.compile(mod, target="llvm")
    plain = tvm.compile(module(rounded(values)), target="llvm")
    library = tmp_path / "net.so"
    built.export_library(str(library))
    loaded = tvm.runtime.load_module(str(library))
    for m in (1, 5, 300):  # a vector, a tile and more than one pass
        x = np.random.default_rng(m).normal(0, 1, (m, WIDTH)).astype(np.float32)
        want, got = run(plain, x), run(built, x)
        tolerance = 1e-4 if activations == "f32" else 0.08
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
        assert np.array_equal(run(loaded, x), got)


def test_weights_by_columns_and_what_is_left_alone() -> None:
    """W [K, N] is taken too; products of two variables and of float64 are not."""
    values = np.random.default_rng(3).normal(0, 0.1, (64, 48)).astype(np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 64), "float32"))
    with builder.function("forward", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(values)))
            z = builder.emit(relax.op.matmul(y, relax.op.permute_dims(y)))
            out = builder.emit_output(z)
        builder.emit_func_output(out)
    mod = offload(builder.get(), weights=FORMAT, activations="f32")
    assert mod.script().count("call_dps_packed") == 1 and mod.script().count("R.matmul") == 1
    data = np.random.default_rng(4).normal(0, 1, (4, 64)).astype(np.float32)
    product = data @ qigen.quantize(values.T, FORMAT).dequantize().T
    got = run(tvm.compile(mod, target="llvm"), data)
    assert np.allclose(got, product @ product.T, rtol=1e-4, atol=1e-4)


def test_what_is_refused() -> None:
    mod = module(parameters())
    with pytest.raises(Unsupported, match="u9g32"):
        offload(mod, weights="u9g32")
    with pytest.raises(UsageError, match="activations fp4"):
        offload(mod, activations="fp4")
