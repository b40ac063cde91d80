"""The peers of ``qigen bench-kernel``: a row of :data:`PEERS` each, libraries imported late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qigen.kernel_peers.base import Peer, copies, shared_codes, weight
from qigen.kernel_peers.llamacpp import LlamaCpp
from qigen.kernel_peers.onnxruntime import OnnxRuntime
from qigen.kernel_peers.openvino import OpenVino
from qigen.kernel_peers.original import OriginalQigen
from qigen.kernel_peers.torch import Torch
from qigen.kernel_peers.tvm import TvmProduct

__all__ = ["PEERS", "Peer", "PeerRow", "copies", "shared_codes", "weight"]


@dataclass(frozen=True)
class PeerRow:
    """One peer: its class, the module that must be installed and the package that brings it.

    ``settings`` make it faster at one product and slower at another: the best counts.
    """

    make: Callable[..., Peer]
    module: str
    package: str
    settings: tuple[dict[str, Any], ...]


PEERS = {
    "llama.cpp": PeerRow(
        LlamaCpp, "llama_cpp", "llama-cpp-python", ({"repack": True}, {"repack": False})
    ),
    "onnxruntime": PeerRow(OnnxRuntime, "onnxruntime", "onnxruntime", ({"level": 4}, {"level": 0})),
    "openvino": PeerRow(
        OpenVino,
        "openvino",
        "openvino",
        ({"precision": "int8"}, {"precision": "bf16"}, {"precision": "f32"}),
    ),
    "original-qigen": PeerRow(OriginalQigen, "qigen", "qigen", ({},)),
    "torch": PeerRow(Torch, "torch", "torch", ({"precision": "bf16"}, {"precision": "f32"})),
    "tvm": PeerRow(
        TvmProduct, "tvm", "'qigen[tvm]'", ({"schedule": "none"}, {"schedule": "dlight"})
    ),
    "tvm-tuned": PeerRow(TvmProduct, "tvm", "'qigen[tvm]'", ({"schedule": "tuned"},)),
}
