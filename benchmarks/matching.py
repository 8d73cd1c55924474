"""How scores of boundaries and their time depend on how pixels are matched.

    python benchmarks/matching.py PATH_OF_BSDS500

Scores gradient magnitudes of every tenth validation image three ways: as the package does, by a
maximum flow; by an assignment that counts all pairs within the tolerance alike, too; and by the
cheapest assignment of distances, as the original code of BSDS500, which prefers near pairs. Writes
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
from pag_retrofit.boundaries import boundary_counts, boundary_metrics, boundary_thresholds
from pag_retrofit.checkpoints import write_json
from pag_retrofit.data import BSDS500
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results" / "matching.json"
THRESHOLDS = boundary_thresholds(99)
STEP = 10


class Alike(boundaries._Annotator):
    """An annotation that is matched by an assignment in which all pairs cost the same."""

    outlier = 2.0

    def matched(self, before: np.ndarray) -> np.ndarray:
        """As the base class says."""
        starts, numbers = self.pairs(before)
        pixels, count = len(self.first), int(before[-1])
        # A column of its own for each pixel, which it gets if it is not matched.
        columns = np.insert(numbers, starts[1:], count + np.arange(pixels))
        costs = np.insert(self.costs(before, starts, numbers), starts[1:], self.outlier)
        ends = starts + np.arange(pixels + 1)
        graph = csr_matrix((costs, columns, ends), shape=(pixels, count + pixels))
        _, partners = min_weight_full_bipartite_matching(graph)
        return partners[partners < count]

    def costs(self, before: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Of each pair."""
        return np.ones(len(numbers))


class Cheapest(Alike):
    """An annotation that is matched by the cheapest assignment of distances."""

    outlier = 500.0  # above any distance

    def __init__(self, mask: np.ndarray, tolerance: float) -> None:
        """Also keep where the pixels are."""
        super().__init__(mask, tolerance)
        self.stride = mask.shape[1] + 2 * self.margin
        self.where = np.stack(np.nonzero(mask)) + self.margin

    def costs(self, before: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Of each pair."""
        predicted = np.stack(np.divmod(np.flatnonzero(np.diff(before)), self.stride))
        drawn = np.repeat(self.where, np.diff(starts), axis=1)
        return np.hypot(*(predicted[:, numbers] - drawn)) + 0.01  # a cost of 0 is no pair


def score(data: BSDS500) -> dict[str, Any]:
    """Scores of gradient magnitudes, and the seconds of processor time that an image took."""
    indices = range(0, len(data), STEP)
    counts, seconds = np.zeros((len(THRESHOLDS) + 1, 4)), 0.0
    for index in indices:
        gray = data[index]["image"].mean(0).numpy()
        strength = np.clip(8 * sobel(gaussian(gray, 1.5)), 0, 1)
        masks, start = data.annotations(index), time.process_time()
        counts += boundary_counts(strength, masks, THRESHOLDS)
        seconds += time.process_time() - start
    return {**boundary_metrics(counts, THRESHOLDS), "seconds": round(seconds / len(indices), 2)}


def main() -> None:
    """Score each way, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that holds data")
    data = BSDS500(parser.parse_args().root, "val")
    results = {"images": len(range(0, len(data), STEP)), "thresholds": len(THRESHOLDS)}
    ways = {"flow": boundaries._Annotator, "alike": Alike, "cheapest": Cheapest}
    for name, annotator in ways.items():
        boundaries._Annotator = annotator
        results[name] = score(data)
    write_json(RESULTS, {**results, "environment": environment()})


if __name__ == "__main__":
    main()
