"""qigen's kernels inside the Relax modules of Apache TVM (extra ``qigen[tvm]``).

:func:`offload` takes the products of a module whose weights are constants, rounds the weights to a
format, and hands them to the CPU kernels through TVM's interface for other code generators (BYOC).
What comes out is a Relax module like any other: it is built, exported and loaded by TVM alone.
"""

from qigen.backends.tvm.bridge import offload

__all__ = ["offload"]
