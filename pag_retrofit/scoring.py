"""Scores of stored predictions, whatever made them: one file per image, matched by name."""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pag_retrofit.boundaries import boundary_counts, boundary_metrics, boundary_thresholds
from pag_retrofit.data.bsds import read_annotations
from pag_retrofit.errors import PagError
from pag_retrofit.metrics import (
    crop_mask,
    depth_metrics,
    depth_sums,
    normal_counts,
    normal_metrics,
)

logger = logging.getLogger(__name__)

TASKS = ("segmentation", "boundaries", "depth", "normals")
_SUFFIXES = (".png", ".npy")
_TRUTH_SUFFIXES = (".png", ".npy", ".mat")
_MOST_CLASSES = 256


@dataclass(frozen=True)
class ScoreOptions:
    """What the tasks can be told.

    Args:
        thresholds: Boundaries: number of thresholds.
        tolerance: Boundaries: largest distance of matched pixels, as a share of the diagonal.
        ignore: Segmentation: label that does not count.
        depth_scale: Depth: what a 16-bit png's values are divided by to give metres.
        crop: Depth: `"eigen"`, `"garg"`, or "" for the whole image.

    Raises:
        PagError: A value is out of range.
    """

    thresholds: int = 99
    tolerance: float = 0.0075
    ignore: int = 255
    depth_scale: float = 1000.0
    crop: str = ""

    def __post_init__(self) -> None:
        """Refuse what no image can be scored with."""
        wanted = {
            "thresholds": (self.thresholds >= 1, "at least one"),
            "tolerance": (0 < self.tolerance <= 1, "a share of the diagonal in (0, 1]"),
            "depth_scale": (0 < self.depth_scale < math.inf, "a number above 0"),
        }
        for name, (fits, expected) in wanted.items():
            if not fits:
                raise PagError(f"{name}={getattr(self, name)!r}: expected {expected}")


def score(
    task: str,
    predictions: Path,
    ground_truth: Path,
    options: ScoreOptions | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Score a folder of predictions against a folder of ground truth.

    Files are png (8 or 16 bits, of normals 8) or npy and have the same name but for the ending:

    - segmentation: class numbers. What a prediction leaves void is a miss of the class there.
    - boundaries: strengths from 0 to 1, of a png its values over the largest it can hold; ground
      truth is BSDS500's mat files, or maps that are not 0 at boundaries.
    - depth: metres, of a png its values over `depth_scale`; 0 where there is no reading.
    - normals: vectors, of a png (r, g, b) / 127.5 - 1; ground truth of length 0 (png: 0, 0, 0)
      where there is none.

    Numbers of an npy file are taken as they are, whatever their type.

    Args:
        task: One of `TASKS`.
        predictions: Folder; files without ground truth are left out.
        ground_truth: Folder; each file needs a prediction.
        options: See `ScoreOptions`.
        workers: Processes; default one per core.
        progress: Called with the numbers of images done and of all.

    Returns:
        The metrics of the task, and `images`, their number.

    Raises:
        PagError: The task is unknown, a folder is missing, a prediction is missing, a file does
            not fit, or there would be no process.
    """
    if task not in TASKS:
        raise PagError(f"task={task!r}: expected one of {TASKS}")
    if workers is not None and workers < 1:
        raise PagError(f"workers={workers!r}: expected 1 or more processes, or None")
    options = options or ScoreOptions()
    pairs = _pairs(predictions, ground_truth)
    count = functools.partial(_count, task, options)
    total: Any = 0
    for done, counts in enumerate(_map(count, pairs, workers), 1):
        total = total + counts
        progress(done, len(pairs))
    if task == "segmentation" and not total.any():
        raise PagError(f"{ground_truth} has no label but {options.ignore}, which does not count")
    scores = _metrics(task, total, options)
    if any(isinstance(value, float) and not math.isfinite(value) for value in scores.values()):
        raise PagError(
            f"{predictions} cannot be scored ({scores}): no pixel of {ground_truth} is valid, or "
            "a prediction is not finite"
        )
    return {**scores, "images": len(pairs)}


def _pairs(predictions: Path, ground_truth: Path) -> list[tuple[Path, Path]]:
    found = _files(predictions, _SUFFIXES)
    truth = _files(ground_truth, _TRUTH_SUFFIXES)
    missing = sorted(truth.keys() - found.keys())
    if missing:
        raise PagError(
            f"{len(missing)} of {len(truth)} images have no prediction in {predictions}, such as "
            f"{missing[0]}: expected {missing[0]}.png or {missing[0]}.npy"
        )
    extra = len(found.keys() - truth.keys())
    if extra:
        logger.warning("%d predictions without ground truth are left out", extra)
    return [(found[name], truth[name]) for name in sorted(truth)]


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise PagError(f"there is no folder {folder}")
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    ]
    found = {path.stem: path for path in paths}
    if not found or len(found) < len(paths):
        problem = "two files of one name" if found else "no files"
        raise PagError(f"{folder} has {problem} ending in {', '.join(suffixes)}")
    return found


def _map(
    function: Callable[[tuple[Path, Path]], np.ndarray],
    pairs: list[tuple[Path, Path]],
    workers: int | None,
) -> Iterator[np.ndarray]:
    workers = min(workers or os.cpu_count() or 1, len(pairs))
    if workers == 1:
        yield from map(function, pairs)
        return
    # Not forked: threads of torch do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(function, pairs)


# Counts of one image ----------------------------------------------------------------------------


def _count(task: str, options: ScoreOptions, pair: tuple[Path, Path]) -> Any:
    prediction, truth = pair
    try:
        return _COUNTS[task](prediction, truth, options)
    except PagError as error:
        raise PagError(f"{prediction}: {error}") from error


def _count_labels(prediction: Path, truth: Path, options: ScoreOptions) -> np.ndarray:
    """Confusion matrix (256, 256), rows are labels."""
    predicted, label = _labels(prediction), _labels(truth)
    if predicted.shape != label.shape:
        raise PagError(f"it has shape {predicted.shape}, {truth} {label.shape}: expected the same")
    kept = label != options.ignore
    joint = label[kept].astype(np.int64) * _MOST_CLASSES + predicted[kept]
    return np.bincount(joint, minlength=_MOST_CLASSES**2).reshape(_MOST_CLASSES, -1)


def _count_boundaries(prediction: Path, truth: Path, options: ScoreOptions) -> np.ndarray:
    strength, largest = _read_map(prediction)
    if not (strength.min() >= 0 and strength.max() <= largest):  # nor NaN
        raise PagError(
            f"it has values from {strength.min():g} to {strength.max():g}: expected strengths from "
            "0 to 1 in an npy file"
        )
    if truth.suffix.lower() == ".mat":
        annotations = read_annotations(truth)
    else:
        annotations = [_read_map(truth)[0] > 0]
    return boundary_counts(
        strength / largest,
        annotations,
        boundary_thresholds(options.thresholds),
        tolerance=options.tolerance,
    )


def _count_depth(prediction: Path, truth: Path, options: ScoreOptions) -> np.ndarray:
    maps = []
    for path in (prediction, truth):
        values, largest = _read_map(path)
        maps.append(torch.from_numpy(values / (options.depth_scale if largest > 1 else 1.0))[None])
    valid = maps[1] > 0
    if options.crop:
        valid &= crop_mask((valid.shape[1], valid.shape[2]), options.crop)
    return depth_sums(maps[0], maps[1], valid)[0].numpy()


def _count_normals(prediction: Path, truth: Path, options: ScoreOptions) -> np.ndarray:
    predicted, target = _vectors(prediction), _vectors(truth)
    return normal_counts(predicted, target, (target != 0).any(1))[0].numpy()


_COUNTS: dict[str, Callable[[Path, Path, ScoreOptions], np.ndarray]] = {
    "segmentation": _count_labels,
    "boundaries": _count_boundaries,
    "depth": _count_depth,
    "normals": _count_normals,
}


def _metrics(task: str, counts: np.ndarray, options: ScoreOptions) -> dict[str, Any]:
    if task == "boundaries":
        return dict(boundary_metrics(counts, boundary_thresholds(options.thresholds)))
    if task == "depth":
        return dict(depth_metrics(torch.from_numpy(counts)))
    if task == "normals":
        return dict(normal_metrics(torch.from_numpy(counts)))
    hits, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = union > 0
    if 0 <= options.ignore < _MOST_CLASSES:
        present[options.ignore] = False  # void is not a class, but counts against the others
    iou = hits[present] / union[present]
    return {
        "miou": float(iou.mean()) if present.any() else 0.0,
        "pixel_accuracy": float(hits.sum() / max(counts.sum(), 1)),
        "iou": {str(k): float(v) for k, v in zip(np.flatnonzero(present), iou, strict=True)},
    }


# Files ------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[np.ndarray, float]:
    """Values as float64, and the largest that an image file can hold; 1 for an array."""
    is_array = path.suffix.lower() == ".npy"
    try:
        if is_array:
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as file:
                stored = str(file.tile[0][3]) if file.tile else ""
                values = np.array(file)
            if values.ndim > 2 and "16" in stored:  # Pillow leaves half of the bits out
                raise ValueError("colours of 16 bits; expected 8 bits a channel, or an npy file")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise PagError(f"cannot read {path}: {error}") from error
    if values.size == 0 or values.dtype.kind not in "buif":
        raise PagError(f"{path} has shape {values.shape} and type {values.dtype}: expected numbers")
    if is_array or values.dtype.kind in "bf":
        return values.astype(np.float64), 1.0
    if values.dtype == np.int32:  # what older Pillow makes of 16 bits
        return values.astype(np.float64), 65535.0
    return values.astype(np.float64), float(np.iinfo(values.dtype).max)


def _read_map(path: Path) -> tuple[np.ndarray, float]:
    values, largest = _read(path)
    if values.ndim != 2:
        raise PagError(f"{path} has shape {values.shape}: expected (height, width)")
    return values, largest


def _labels(path: Path) -> np.ndarray:
    values, _ = _read(path)
    numbers = (values >= 0) & (values < _MOST_CLASSES) & (values % 1 == 0)
    if values.ndim != 2 or not numbers.all():
        raise PagError(
            f"{path} has shape {values.shape} and values from {values.min():g} to "
            f"{values.max():g}: expected class numbers (height, width), whole and below "
            f"{_MOST_CLASSES}"
        )
    return values.astype(np.uint8)


def _vectors(path: Path) -> torch.Tensor:
    """(1, 3, H, W); 0 where a png is black."""
    values, largest = _read(path)
    if values.ndim == 3 and values.shape[2] == 3:
        values = values.transpose(2, 0, 1)
    if values.ndim != 3 or values.shape[0] != 3:
        raise PagError(f"{path} has shape {values.shape}: expected three channels")
    if largest > 1:
        black = (values == 0).all(0)
        values = np.where(black, 0.0, values * 2 / largest - 1)
    return torch.from_numpy(values.copy())[None]
