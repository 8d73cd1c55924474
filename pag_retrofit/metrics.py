"""Scores of depth and surface normals, as sums per image that add up over a data set."""

from __future__ import annotations

import torch
from torch import Tensor

from pag_retrofit.errors import PagError

SMALLEST_DEPTH = 1e-3
"""Predicted depths below this, in metres, are raised to it: logarithms need positive numbers."""

_BINS_PER_DEGREE = 20
_BINS = 180 * _BINS_PER_DEGREE + 1  # the last one holds exactly 180 degrees
DEPTH_SUMS = 9
"""Length of a row of `depth_sums`."""
NORMAL_COUNTS = _BINS + 1
"""Length of a row of `normal_counts`."""
# Rows and columns (first, last), as fractions of the size; Garg et al. 2016, Eigen et al. 2014.
_CROPS = {
    "garg": ((0.40810811, 0.99189189), (0.03594771, 0.96405229)),
    "eigen": ((0.3324324, 0.91351351), (0.0359477, 0.96405229)),
}
_NYU_SIZE = (480, 640)
_NYU_CROP = ((45, 471), (41, 601))


def depth_sums(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Sums of the errors of each image; add them up, then call `depth_metrics`.

    Args:
        prediction: metres (B, H, W); values below `SMALLEST_DEPTH` are raised to it.
        target: metres (B, H, W), above 0 where valid.
        valid: bool (B, H, W); other pixels do not count.

    Returns:
        (B, 9) float64: pixels; sums of |d| / t, d^2 / t, d^2, log(p / t)^2, |log10(p / t)|, where
        d = p - t; and pixels with max(p / t, t / p) below 1.25, 1.25^2, 1.25^3.

    Raises:
        PagError: the shapes differ.
        PagError: a valid prediction or target is not finite, or a valid target is not above 0.
    """
    _check_shapes(prediction, target, valid, (len(target), *target.shape[-2:]))
    _check_finite(prediction, target, valid)
    if bool((target[valid] <= 0).any()):
        raise PagError("target has valid depths of 0 or less; leave these pixels out of valid")
    true = torch.where(valid, target.double(), 1.0)
    raised = torch.where(valid, prediction.double().clamp(min=SMALLEST_DEPTH), 1.0)
    difference = raised - true
    log_ratio = raised.log() - true.log()
    ratio = torch.maximum(raised / true, true / raised)
    terms = [
        torch.ones_like(true),
        difference.abs() / true,
        difference.square() / true,
        difference.square(),
        log_ratio.square(),
        (raised.log10() - true.log10()).abs(),
        *((ratio < 1.25**power).double() for power in (1, 2, 3)),
    ]
    return torch.stack([torch.where(valid, term, 0.0).sum((1, 2)) for term in terms], dim=1)


def depth_metrics(sums: Tensor) -> dict[str, float]:
    """Scores of a data set, over all its valid pixels alike (not the mean of images' scores).

    Args:
        sums: (9,), rows of `depth_sums` added up.

    Returns:
        `abs_rel`, `sq_rel`, `rmse` (metres), `rmse_log` (natural logarithm), `log10`, and
        `delta1`, `delta2`, `delta3`, the shares of pixels within a factor of 1.25, 1.25^2,
        1.25^3 (Eigen et al. 2014). All are NaN if no pixel is valid.
    """
    pixels, *rest = sums.double().cpu()
    means = [float(value / pixels) for value in rest]
    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "delta1", "delta2", "delta3")
    metrics = dict(zip(names, means, strict=True))
    for name in ("rmse", "rmse_log"):
        metrics[name] = metrics[name] ** 0.5
    return metrics


def normal_counts(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Histogram of the angles of each image; add them up, then call `normal_metrics`.

    Args:
        prediction: (B, 3, H, W), of any length; a vector of length 0 counts as 90 degrees off.
        target: (B, 3, H, W), of any length above 0 where valid.
        valid: bool (B, H, W); other pixels do not count.

    Returns:
        (B, 3602) float64: pixels by angle in steps of 0.05 degrees, then the sum of all angles
        in degrees.

    Raises:
        PagError: the shapes differ.
        PagError: a valid prediction or target is not finite.
    """
    _check_shapes(prediction, target, valid, (len(target), 3, *target.shape[-2:]))
    rows = []
    for first, second, kept in zip(prediction, target, valid, strict=True):
        p, t = first[:, kept].double(), second[:, kept].double()  # (3, pixels)
        _check_finite(p, t, torch.ones_like(p, dtype=torch.bool))
        sine = torch.linalg.cross(p, t, dim=0).norm(dim=0)
        cosine = (p * t).sum(0)
        # Unlike the arc cosine, exact near 0 and 180 degrees.
        angle = torch.rad2deg(torch.atan2(sine, cosine))
        angle = torch.where((sine == 0) & (cosine == 0), 90.0, angle)
        bins = (angle * _BINS_PER_DEGREE).long().clamp(max=_BINS - 1)
        histogram = torch.bincount(bins, minlength=_BINS).double()
        rows.append(torch.cat([histogram, angle.sum().view(1)]))
    return torch.stack(rows)


def normal_metrics(counts: Tensor) -> dict[str, float]:
    """Scores of a data set, over all its valid pixels alike (not the mean of images' scores).

    Args:
        counts: (3602,), rows of `normal_counts` added up.

    Returns:
        `mean` and `median` of the angles in degrees, the median to within 0.05; `within_11_25`,
        `within_22_5`, `within_30`, the shares of pixels below that many degrees. All are NaN if
        no pixel is valid.
    """
    counts = counts.double().cpu()
    histogram, total = counts[:-1], counts[-1]
    pixels = histogram.sum()
    if pixels == 0:
        names = ("mean", "median", "within_11_25", "within_22_5", "within_30")
        return dict.fromkeys(names, float("nan"))
    below = histogram.cumsum(0)
    place = int(torch.searchsorted(below, pixels / 2))
    inside = (pixels / 2 - below[place] + histogram[place]) / histogram[place]
    within = {
        name: float(histogram[: int(degrees * _BINS_PER_DEGREE)].sum() / pixels)
        for name, degrees in (("within_11_25", 11.25), ("within_22_5", 22.5), ("within_30", 30))
    }
    median = min((place + float(inside)) / _BINS_PER_DEGREE, 180.0)
    return {"mean": float(total / pixels), "median": median, **within}


def crop_mask(size: tuple[int, int], crop: str) -> Tensor:
    """The part of an image on which depth is customarily scored.

    Args:
        size: height and width in pixels.
        crop: `"eigen"`, rows 45..470 and columns 41..600 for images of 480x640 (NYUv2), and
            for other sizes KITTI's crop of Eigen et al. 2014; or `"garg"`, KITTI's crop of
            Garg et al. 2016. Those of KITTI are fractions of the size.

    Returns:
        bool (H, W), True inside.

    Raises:
        PagError: the crop is neither.
    """
    if crop not in _CROPS:
        raise PagError(f"crop={crop!r}: expected one of {sorted(_CROPS)}")
    if crop == "eigen" and tuple(size) == _NYU_SIZE:
        rows, columns = _NYU_CROP
    else:
        rows, columns = (
            (int(first * side), int(last * side))
            for (first, last), side in zip(_CROPS[crop], size, strict=True)
        )
    mask = torch.zeros(size, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def _check_shapes(
    prediction: Tensor, target: Tensor, valid: Tensor, expected: tuple[int, ...]
) -> None:
    pixels = (expected[0], *expected[-2:])
    wanted = (("prediction", prediction, expected), ("target", target, expected))
    for name, given, shape in (*wanted, ("valid", valid, pixels)):
        if tuple(given.shape) != shape:
            raise PagError(f"{name} has shape {tuple(given.shape)}: expected {shape}")
    if valid.dtype != torch.bool:
        raise PagError(f"valid has dtype {valid.dtype}: expected torch.bool")


def _check_finite(prediction: Tensor, target: Tensor, valid: Tensor) -> None:
    for name, given in (("prediction", prediction), ("target", target)):
        if not bool(torch.isfinite(given[valid]).all()):
            raise PagError(f"{name} has valid pixels that are not finite")
