"""CPU kernels without a C++ compiler.

The sources that the CPU backend renders are translated to LLVM IR (:mod:`.translate`), whose
primitives stand in ``templates/llvm``; llvmlite makes objects of it, in processes of their own
(:mod:`.worker`), and :mod:`.attach` puts them into a copy of the runtime's library.
"""

from qigen.backends.llvm.toolchain import find_compiler, host_library, link

__all__ = ["find_compiler", "host_library", "link"]
