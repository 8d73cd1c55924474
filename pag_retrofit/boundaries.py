"""Scores of boundary maps by the protocol of BSDS500 (Martin et al. 2004; Arbelaez et al. 2011).

A map is cut at each threshold and thinned; its pixels are matched one to one with those of each
annotator, at most `TOLERANCE` of the image's diagonal apart. A pixel of the map is right if any
annotator's was matched with it; recall counts each annotator's pixels.

The original solver finds a cheapest assignment by cost scaling, in which an outlier costs more than
any pair, so that as many pixels are matched as can be. Here pairs are alike at any distance, and a
largest matching is a maximum flow, which is several times faster: of each annotator as many pixels
are matched, but not always with the same pixels of the map, so that precision differs a little.
(scipy's `maximum_bipartite_matching` takes up to minutes for one image.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from pag_retrofit.errors import PagError
from pag_retrofit.thinning import thin_cuts

TOLERANCE = 0.0075
"""Largest distance of matched pixels, as a share of the image's diagonal."""
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
    reached = np.searchsorted(thresholds, prediction, side="right")
    # At thresholds that no pixel lies between, cuts are equal.
    heights = np.setdiff1d(np.append(reached, len(thresholds)), 0)
    counts = np.array([_match_all(cut, annotators) for cut in thin_cuts(reached, heights)], float)
    rows = counts[np.searchsorted(heights, np.arange(len(thresholds)) + 1)]
    scores = _f_measure(*_recall_precision(rows))
    best = len(scores) - 1 - int(np.argmax(scores[::-1]))  # of equal ones the highest threshold
    return np.concatenate((rows, rows[best : best + 1]))


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
        radius = tolerance * float(np.hypot(*mask.shape))
        self.margin = int(radius)
        down = np.arange(-self.margin, self.margin + 1)
        half_widths = (down[:, None] ** 2 + down**2 <= radius**2).sum(1) // 2
        stride = mask.shape[1] + 2 * self.margin
        rows, columns = np.nonzero(mask)
        # Places in the padded map, (pixels, rows of the disc of possible matches).
        middle = ((rows + self.margin) * stride + columns + self.margin)[:, None] + down * stride
        self.first, self.stop = middle - half_widths, middle + half_widths + 1

    def pairs(self, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the predicted pixels near each pixel of the annotation.

        Args:
            before: How many predicted pixels come before each place of the padded map.

        Returns:
            The rows' starts and the numbers, rising in each row, as of a sparse matrix.
        """
        # In a row of the disc the numbers are consecutive.
        first = before[self.first].ravel()
        lengths = before[self.stop].ravel() - first
        ends = lengths.cumsum()
        numbers = np.repeat(first + lengths - ends, lengths) + np.arange(lengths.sum())
        starts = np.concatenate(([0], ends[self.first.shape[1] - 1 :: self.first.shape[1]]))
        return starts, numbers

    def matched(self, before: np.ndarray) -> np.ndarray:
        """Numbers of the predicted pixels of a largest matching.

        Args:
            before: See `pairs`.
        """
        starts, numbers = self.pairs(before)
        pixels, count = len(self.first), int(before[-1])
        # From the source to each pixel, to predicted ones nearby, to the sink, one unit each.
        source, sink = pixels + count, pixels + count + 1
        drawn, predicted = np.diff(starts) > 0, np.bincount(numbers, minlength=count) > 0
        heads = (pixels + numbers, np.full(predicted.sum(), sink), np.flatnonzero(drawn))
        last = starts[-1] + predicted.sum() + drawn.sum()
        ends = np.concatenate((starts, starts[-1] + predicted.cumsum(), [last, last]))
        capacities = np.ones(last, np.int32)
        graph = csr_matrix((capacities, np.concatenate(heads), ends), shape=(sink + 1, sink + 1))
        flow = maximum_flow(graph, source, sink).flow[:pixels]
        return flow.indices[flow.data > 0] - pixels


def _match_all(cut: np.ndarray, annotators: Sequence[_Annotator]) -> tuple[int, int, int, int]:
    """Matched and all annotated pixels, matched and all predicted ones."""
    padded = np.pad(cut, annotators[0].margin)
    before = np.concatenate(([0], padded.cumsum(dtype=np.int32)), dtype=np.int32)
    right = np.zeros(before[-1], bool)
    found = 0
    for annotator in annotators:
        matched = annotator.matched(before)
        found += len(matched)
        right[matched] = True
    return found, sum(len(a.first) for a in annotators), int(right.sum()), len(right)


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
