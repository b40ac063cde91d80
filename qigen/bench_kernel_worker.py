"""A peer of ``qigen bench-kernel`` in a process of its own; see :mod:`qigen.bench_worker`.

Its result is compared with the same reference as our kernel's.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from qigen import bench_worker
from qigen.formats.catalog import by_name
from qigen.kernel_peers import PEERS, Peer
from qigen.tuning.problem import ROWS, random_rows, random_x


def serve(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Answers 'check' with the largest error by the sum of |w x|, 'run' with the microseconds of a
    product in each of ``rounds`` runs, or as many as fit into ``seconds`` (one at least)."""
    if request["do"] == "check":
        peer.run()
        row, m, n, k = by_name(request["format"]), request["m"], request["n"], request["k"]
        w, x = random_rows(row, k).dequantize()[:, :k].astype(np.float64), random_x(m, k)
        order = np.arange(n) % ROWS
        error = np.abs(peer.result() - (x @ w.T)[:, order])
        magnitude = (np.abs(x) @ np.abs(w).T)[:, order]
        return {"largest": float((error / magnitude).max())}
    times: list[float] = []
    begin = time.perf_counter()
    for _ in range(request["rounds"]):
        start = time.perf_counter()
        if times and start - begin > request.get("seconds", math.inf):
            break
        count = peer.run()
        times.append((time.perf_counter() - start) * 1e6 / count)
    return {"us": times}


def main() -> None:
    """Loads a peer and serves requests until standard input ends."""
    bench_worker.main({name: row.make for name, row in PEERS.items()}, serve)


if __name__ == "__main__":
    main()
