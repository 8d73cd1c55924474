"""Scores of boundary maps by the protocol of BSDS500 (Martin et al. 2004; Arbelaez et al. 2011).

A map is cut at each threshold and thinned; its pixels are matched one to one with those of each
annotator, at most `TOLERANCE` of the image's diagonal apart. A pixel of the map is right if any
annotator's was matched with it; recall counts each annotator's pixels.

The original solver finds a cheapest assignment by cost scaling, in which an outlier costs more than
any pair, so that as many pixels are matched as can be. Here the assignment is scipy's (Jonker and
Volgenant, sparse), and a pair costs the same at any distance, which is several times faster: as
many pixels are matched, but where annotators compete not always the same ones.
(scipy's `maximum_bipartite_matching` takes up to minutes for one image.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from skimage.morphology import thin

from pag_retrofit.errors import PagError

TOLERANCE = 0.0075
"""Largest distance of matched pixels, as a share of the image's diagonal."""
_PAIR_COST, _OUTLIER_COST = 1.0, 2.0
_STEPS_BETWEEN = 100  # points at which the best F measure is looked for between two thresholds


def boundary_thresholds(count: int) -> np.ndarray:
    """The customary thresholds: k / (count + 1) for k = 1 .. count.

    Raises:
        PagError: There is not at least one.
    """
    if count < 1:
        raise PagError(f"thresholds={count!r}: expected a number of thresholds, such as 99")
    return np.arange(1, count + 1) / (count + 1)


def boundary_counts(
    prediction: np.ndarray,
    annotations: Sequence[np.ndarray],
    thresholds: np.ndarray,
    *,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """Counts of one image; add them up over a data set, then call `boundary_metrics`.

    Args:
        prediction: (H, W), boundary strength in [0, 1].
        annotations: Boundary maps (H, W) bool, one per annotator.
        thresholds: Rising, of `boundary_thresholds`.
        tolerance: Largest distance of matched pixels, as a share of the diagonal.

    Returns:
        (T + 1, 4) float64. Per threshold: annotated pixels that were matched, annotated pixels,
        predicted pixels that were matched, predicted pixels. The last row is that of the image's
        best threshold, for OIS.

    Raises:
        PagError: A shape does not fit, no annotation was given, or a strength is not in [0, 1].
    """
    _check(prediction, annotations)
    annotators = [_Annotator(mask.astype(bool), tolerance) for mask in annotations]
    rows = np.zeros((len(thresholds) + 1, 4))
    previous: np.ndarray | None = None
    for index, threshold in enumerate(thresholds):
        cut = prediction >= threshold
        if previous is not None and np.array_equal(cut, previous):
            rows[index] = rows[index - 1]
            continue
        previous = cut
        rows[index] = _match_all(thin(cut), annotators)
    scores = _f_measure(*_recall_precision(rows[:-1]))
    best = len(scores) - 1 - int(np.argmax(scores[::-1]))  # of equal ones the highest threshold
    rows[-1] = rows[best]
    return rows


def boundary_metrics(counts: np.ndarray, thresholds: np.ndarray) -> dict[str, float]:
    """Scores of a data set.

    Args:
        counts: (T + 1, 4), `boundary_counts` of all images added up.
        thresholds: Those of the counts.

    Returns:
        `ods`, the F measure at the threshold that is best for the whole data set, with
        `ods_threshold`, `ods_recall` and `ods_precision`; `ois`, with each image's best threshold;
        `ap`, the area under the curve of precision over recall. Between thresholds recall and
        precision are interpolated, as in the original code.
    """
    recall, precision = _recall_precision(counts[:-1])
    threshold, best_recall, best_precision, ods = _best(thresholds, recall, precision)
    ois = _f_measure(*_recall_precision(counts[-1:]))[0]
    return {
        "ods": ods,
        "ods_threshold": threshold,
        "ods_recall": best_recall,
        "ods_precision": best_precision,
        "ois": float(ois),
        "ap": _average_precision(recall, precision),
    }


class _Annotator:
    """One annotation, and for each of its pixels where a match may lie."""

    def __init__(self, mask: np.ndarray, tolerance: float) -> None:
        self.mask = mask
        radius = tolerance * float(np.hypot(*mask.shape))
        self.margin = int(radius)
        reach = np.arange(-self.margin, self.margin + 1)
        down, right = (offsets.ravel() for offsets in np.meshgrid(reach, reach, indexing="ij"))
        near = down**2 + right**2 <= radius**2
        self.stride = mask.shape[1] + 2 * self.margin
        rows, columns = np.nonzero(mask)
        places = (rows + self.margin) * self.stride + columns + self.margin
        offsets = down[near] * self.stride + right[near]
        self.near = places[:, None] + offsets[None]  # (pixels, offsets), into the padded map

    def matched(self, numbers: np.ndarray, count: int) -> np.ndarray:
        """For each pixel of the annotation the predicted pixel matched with it, or -1.

        Args:
            numbers: (H + 2 margin, W + 2 margin), number of each predicted pixel, -1 elsewhere.
            count: Of predicted pixels.
        """
        found = numbers.ravel()[self.near]
        pixels = len(found)
        # A column of its own for each pixel, which it gets if it is not matched.
        columns = np.concatenate((found, count + np.arange(pixels)[:, None]), axis=1)
        costs = np.full(columns.shape, _PAIR_COST)
        costs[:, -1] = _OUTLIER_COST
        there = columns >= 0
        starts = np.concatenate(([0], there.sum(1).cumsum()))
        graph = csr_matrix((costs[there], columns[there], starts), shape=(pixels, count + pixels))
        _, partners = min_weight_full_bipartite_matching(graph)
        return np.where(partners < count, partners, -1)


def _match_all(cut: np.ndarray, annotators: Sequence[_Annotator]) -> tuple[float, ...]:
    """Matched and all annotated pixels, matched and all predicted ones."""
    count = int(cut.sum())
    margin = annotators[0].margin
    numbers = np.full((cut.shape[0] + 2 * margin, cut.shape[1] + 2 * margin), -1)
    inside = numbers[margin : margin + cut.shape[0], margin : margin + cut.shape[1]]
    inside[cut] = np.arange(count)
    right = np.zeros(count, bool)
    found = annotated = 0
    for annotator in annotators:
        annotated += len(annotator.near)
        if not count or not len(annotator.near):
            continue
        partners = annotator.matched(numbers, count)
        partners = partners[partners >= 0]
        found += len(partners)
        right[partners] = True
    return found, annotated, int(right.sum()), count


def _recall_precision(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, annotated, right, predicted = rows.T
    return found / np.maximum(annotated, 1), right / np.maximum(predicted, 1)


def _f_measure(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    total = recall + precision
    return np.where(total > 0, 2 * recall * precision / np.where(total > 0, total, 1), 0)


def _best(
    thresholds: np.ndarray, recall: np.ndarray, precision: np.ndarray
) -> tuple[float, float, float, float]:
    """Threshold, recall, precision and F measure at the best point of the curve."""
    places = np.arange(len(thresholds))
    fine = np.linspace(0, len(places) - 1, (len(places) - 1) * _STEPS_BETWEEN + 1)
    curves = [np.interp(fine, places, values) for values in (thresholds, recall, precision)]
    scores = _f_measure(curves[1], curves[2])
    best = int(np.argmax(scores))
    return (*(float(curve[best]) for curve in curves), float(scores[best]))  # type: ignore[return-value]


def _average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve at recalls 0, 0.01, .. 1; nothing beyond its ends."""
    known, first = np.unique(recall, return_index=True)
    if len(known) < 2:
        return 0.0
    at = np.linspace(0, 1, 101)
    return float(np.interp(at, known, precision[first], left=0.0, right=0.0).sum() / 100)


def _check(prediction: np.ndarray, annotations: Sequence[np.ndarray]) -> None:
    if not annotations:
        raise PagError("annotations is empty: expected at least one boundary map")
    if prediction.ndim != 2:
        raise PagError(f"prediction has shape {prediction.shape}: expected (height, width)")
    for mask in annotations:
        if mask.shape != prediction.shape:
            raise PagError(
                f"an annotation has shape {mask.shape}, the prediction {prediction.shape}: "
                "expected the same"
            )
    if not np.isfinite(prediction).all() or prediction.min() < 0 or prediction.max() > 1:
        raise PagError(
            f"prediction lies in {prediction.min()!r}..{prediction.max()!r}: expected boundary "
            "strengths from 0 to 1"
        )
