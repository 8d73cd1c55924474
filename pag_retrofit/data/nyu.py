"""NYU Depth V2: indoor frames with labels, depth, and normals made of it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from ..errors import DataError
from .base import IGNORE_INDEX, PixelDataset, Sample, check_targets
from .folder import distinct_colours
from .surfaces import normals_from_depth

NYU_CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk "
    "shelves curtain dresser pillow mirror floor-mat clothes ceiling books refrigerator television "
    "paper towel shower-curtain box whiteboard person night-stand toilet sink lamp bathtub bag "
    "other-structure other-furniture other-prop"
).split()
"""The 40 classes of Gupta et al. (CVPR 2013), in the order of their labels 1 to 40."""

_FILE, _SPLITS, _CLASSES = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"
_SPLIT_KEYS = {"train": "trainNdxs", "val": "testNdxs"}
# Of the colour camera, onto which the data set's depth is projected: from its toolbox, which counts
# pixels from one.
_INTRINSICS = torch.tensor(
    [[518.85790117, 0.0, 324.58244941], [0.0, 519.46961112, 252.73616633], [0.0, 0.0, 1.0]],
    dtype=torch.float64,
)


class NYUv2(PixelDataset):
    """The 1449 labelled frames of NYU Depth V2 (Silberman et al., ECCV 2012).

    `{root}/nyu_depth_v2_labeled.mat` and `{root}/splits.mat` as they are distributed, and for
    labels `{root}/classMapping40.mat`, the map from the 894 names to 40 classes. Reading them
    needs h5py (`pip install pag-retrofit[nyu]`).

    Depth is that of the data set where the raw recording has a reading, and 0 where it was filled
    in. Normals are made of it, see `normals_from_depth`.

    Items: `image` (3, 480, 640) float32 in [0, 1]; and what is asked for: `label` (480, 640) int64,
    `depth` (1, 480, 640) float32 in metres, `normals` (3, 480, 640) float32.

    Args:
        root: Folder of the files.
        split: `"train"` (795 frames) or `"val"` (the official 654 test frames). Default: `"train"`.
        targets: Among `"segmentation"`, `"depth"`, `"normals"`. Default: the first two.
        cache: Keep decoded frames in memory: 1 MB each, 2 more with depth, 2 more with normals.
            Default: True.

    Raises:
        DataError: If the split is neither, a target is unknown, a file is missing or not what it
            should be, or h5py is not installed.
    """

    classes = tuple(NYU_CLASSES)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        targets: Collection[str] = ("segmentation", "depth"),
        cache: bool = True,
    ) -> None:
        if split not in _SPLIT_KEYS:
            raise DataError(f"NYUv2: unknown split {split!r}; use train or val")
        check_targets("NYUv2", targets, ("segmentation", "depth", "normals"))
        self.root = Path(root)
        self.targets = frozenset(targets)
        self.palette = distinct_colours(len(NYU_CLASSES))
        self.frames = _read(self.root / _SPLITS, _SPLIT_KEYS[split]) - 1
        if "segmentation" in self.targets:
            mapping = _read(self.root / _CLASSES, "mapClass")
            self._class_of = np.concatenate(([IGNORE_INDEX], mapping - 1)).astype(np.uint8)
        with _opened(self.root / _FILE) as file:
            count = len(_part(file, "images"))
        if self.frames.size and not 0 <= self.frames.min() <= self.frames.max() < count:
            raise DataError(f"NYUv2: {_SPLITS} names frames beyond the {count} of {_FILE}")
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        """Loads one frame.

        Raises:
            IndexError: If the index is out of range.
            DataError: If the file cannot be read, or has a label without a class.
        """
        position = self._position(index)
        stored = self._cache.get(position) if self._cache is not None else None
        if stored is None:
            stored = self._load(int(self.frames[position]))
            if self._cache is not None:
                self._cache[position] = stored
        kinds = {"label": torch.int64}
        sample = {key: value.to(kinds.get(key, torch.float32)) for key, value in stored.items()}
        sample["image"] /= 255.0
        return sample

    def _load(self, frame: int) -> Sample:
        """Decodes a frame, in small types; MATLAB stores columns first."""
        with _opened(self.root / _FILE) as file:
            stored = {
                "image": torch.from_numpy(_part(file, "images")[frame].transpose(0, 2, 1).copy())
            }
            if "segmentation" in self.targets:
                stored["label"] = torch.from_numpy(
                    self._labels(_part(file, "labels")[frame].T, frame)
                )
            if self.targets & {"depth", "normals"}:
                raw, filled = (_part(file, key)[frame] for key in ("rawDepths", "depths"))
                depth = np.where(raw > 0, filled, 0.0).T
                stored["depth"] = torch.from_numpy(depth.astype(np.float32))[None]
        if "normals" in self.targets:
            stored["normals"] = normals_from_depth(stored["depth"], _INTRINSICS).half()
        return stored

    def _labels(self, stored: np.ndarray, frame: int) -> np.ndarray:
        if stored.max() >= len(self._class_of):
            raise DataError(
                f"NYUv2: frame {frame + 1} has label {stored.max()}, {_CLASSES} maps those up to "
                f"{len(self._class_of) - 1}"
            )
        return np.asarray(self._class_of[stored])


def _opened(path: Path) -> Any:
    """The HDF5 file; opened for each access, as handles do not survive a fork."""
    try:
        import h5py
    except ImportError as error:
        raise DataError("NYUv2 needs h5py: pip install 'pag-retrofit[nyu]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"NYUv2: cannot read {path}: {error}") from error


def _part(file: Any, key: str) -> Any:
    """One array of the HDF5 file."""
    if key not in file:
        raise DataError(f"NYUv2: {file.filename} has no {key}; expected it as distributed")
    return file[key]


def _read(path: Path, key: str) -> np.ndarray:
    """A vector of whole numbers of a MATLAB file."""
    try:
        return np.asarray(loadmat(path)[key]).reshape(-1).astype(np.int64)
    except (
        MatReadError, zlib.error, OSError, ValueError, KeyError, TypeError, NotImplementedError,
    ) as error:  # fmt: skip
        raise DataError(f"NYUv2: cannot read {key} of {path}: {error!r}") from error
