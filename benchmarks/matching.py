"""How scores of boundaries differ if pixels are matched by the cheapest assignment.

    python benchmarks/matching.py PATH_OF_BSDS500

The original code of BSDS500 prefers near pairs, the package counts all within the tolerance alike.
Scores gradient magnitudes of every tenth validation image both ways, and writes
benchmarks/results/matching.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from skimage.filters import gaussian, sobel

from pag_retrofit import boundaries
from pag_retrofit.boundaries import boundary_counts, boundary_metrics
from pag_retrofit.checkpoints import write_json
from pag_retrofit.data import BSDS500
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results" / "matching.json"
THRESHOLDS = np.array([0.1, 0.2, 0.3, 0.5, 0.7])
STEP = 10
OUTLIER = 500.0  # above any distance


class Cheapest(boundaries._Annotator):
    """An annotation that is matched by the cheapest assignment of distances."""

    def __init__(self, mask: np.ndarray, tolerance: float) -> None:
        """Also keep how far each place of `near` is."""
        super().__init__(mask, tolerance)
        reach = np.arange(-self.margin, self.margin + 1)
        down, right = (axis.ravel() for axis in np.meshgrid(reach, reach, indexing="ij"))
        distance = np.hypot(down, right)
        self.distance = distance[distance <= tolerance * np.hypot(*mask.shape)]

    def matched(self, numbers: np.ndarray, count: int) -> np.ndarray:
        """As the base class says."""
        found = numbers.ravel()[self.near]
        own = count + np.arange(len(found))[:, None]  # for those that are not matched
        columns = np.concatenate((found, own), axis=1)
        near = np.broadcast_to(self.distance + 0.01, found.shape)
        costs = np.concatenate((near, np.full(own.shape, OUTLIER)), axis=1)
        there = columns >= 0
        starts = np.concatenate(([0], there.sum(1).cumsum()))
        shape = (len(found), count + len(found))
        graph = csr_matrix((costs[there], columns[there], starts), shape=shape)
        _, partners = min_weight_full_bipartite_matching(graph)
        return np.where(partners < count, partners, -1)


def score(data: BSDS500) -> dict[str, Any]:
    """Scores of gradient magnitudes, and how long they took."""
    counts, start = np.zeros((len(THRESHOLDS) + 1, 4)), time.perf_counter()
    for index in range(0, len(data), STEP):
        gray = data[index]["image"].mean(0).numpy()
        strength = np.clip(8 * sobel(gaussian(gray, 1.5)), 0, 1)
        counts += boundary_counts(strength, data.annotations(index), THRESHOLDS)
    seconds = time.perf_counter() - start
    return {**boundary_metrics(counts, THRESHOLDS), "seconds": round(seconds, 1)}


def main() -> None:
    """Score both ways, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds data")
    data = BSDS500(parser.parse_args().root, "val")
    results = {"images": len(range(0, len(data), STEP)), "thresholds": len(THRESHOLDS)}
    results["alike"] = score(data)
    boundaries._Annotator = Cheapest
    results["cheapest"] = score(data)
    write_json(RESULTS, {**results, "environment": environment()})


if __name__ == "__main__":
    main()
