"""A small network of TVM's, its products computed by qigen's kernels on 4-bit weights.

    pip install 'qigen[tvm]'
    python offload.py

Prints how far the result lies from that of plain TVM with the float weights, and the size of both
libraries. The library that is written needs TVM's runtime, but not qigen.
"""

import tempfile
from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend import nn

from qigen.backends.tvm import offload

WIDTH, HIDDEN = 512, 2048


class FeedForward(nn.Module):
    """silu(x A^T) B^T"""

    def __init__(self) -> None:
        self.a = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.b = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.b(nn.op.silu(self.a(x)))


def main() -> None:
    rng = np.random.default_rng(0)
    spec = {"forward": {"x": nn.spec.Tensor(["m", WIDTH], "float32")}}
    mod, parameters = FeedForward().export_tvm(spec=spec)
    # the weights become constants of the module: only those are offloaded
    weights = {
        variable: tvm.runtime.tensor(rng.normal(0, 0.05, p.shape).astype("float32"))
        for variable, (_, p) in zip(mod["forward"].params[1:], parameters, strict=True)
    }
    mod = relax.transform.BindParams("forward", weights)(mod)
    x = rng.normal(0, 1, (4, WIDTH)).astype("float32")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, module in (("plain", mod), ("qigen", offload(mod, weights="u4g32"))):
            library = Path(folder) / f"{name}.so"
            tvm.compile(module, target="llvm").export_library(str(library))
            vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
            results.append(vm["forward"](tvm.runtime.tensor(x)).numpy())
            print(f"{name}: {library.stat().st_size / 1e6:.1f} MB")
    error = np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0])
    print(f"relative difference: {error:.3f}")


if __name__ == "__main__":
    main()
