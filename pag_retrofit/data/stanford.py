"""Stanford 2D-3D-S: perspective indoor images with labels, depth and normals."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .base import IGNORE_INDEX, PixelDataset, Sample, check_targets
from .folder import distinct_colours
from .pairs import channels_first, decode, decode_depth
from .surfaces import normals_from_colours

STANFORD_CLASSES = (
    "beam",
    "board",
    "bookcase",
    "ceiling",
    "chair",
    "clutter",
    "column",
    "door",
    "floor",
    "sofa",
    "table",
    "wall",
    "window",
)
"""The 13 classes, in alphabetical order."""

_AREAS = {"train": ("1", "2", "3", "4", "6"), "val": ("5a", "5b")}
_FOLDERS = {"segmentation": "semantic", "depth": "depth", "normals": "normal"}
_ENDINGS = {"segmentation": "semantic", "depth": "depth", "normals": "normals"}
_PER_METRE = 512.0
_NO_DEPTH = 65535
_NO_NORMAL = 128


class Stanford2D3D(PixelDataset):
    """The perspective images of Stanford 2D-3D-S (Armeni et al., 2017).

    `{root}/area_{n}/data/{rgb,semantic,depth,normal}/*.png` and
    `{root}/assets/semantic_labels.json`. Depth is stored in 1/512 m, 65535 where there is none;
    normals as colours around 127.5 (red to the right, green down, blue to the camera), 128 in all
    channels where there is none; labels as 24-bit numbers into the list of instances, whose names
    begin with the class.

    Items: `image` (3, H, W) float32 in [0, 1]; and what is asked for: `label` (H, W) int64, `depth`
    (1, H, W) float32 in metres, `normals` (3, H, W) float32.

    Args:
        root: Folder of the areas.
        split: `"train"` (areas 1, 2, 3, 4, 6) or `"val"` (area 5). Default: `"train"`.
        targets: Among `"segmentation"`, `"depth"`, `"normals"`. Default: all.

    Raises:
        DataError: If the split is neither, a target is unknown, or no area or a file is missing.
    """

    classes = STANFORD_CLASSES

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        targets: Collection[str] = tuple(_FOLDERS),
    ) -> None:
        if split not in _AREAS:
            raise DataError(f"Stanford 2D-3D-S: unknown split {split!r}; use train or val")
        check_targets("Stanford 2D-3D-S", targets, _FOLDERS)
        self.root = Path(root)
        self.targets = tuple(targets)
        self.palette = distinct_colours(len(STANFORD_CLASSES))
        folders = [self.root / f"area_{area}" / "data" / "rgb" for area in _AREAS[split]]
        self.images = tuple(p for folder in folders for p in sorted(folder.glob("*_rgb.png")))
        if not self.images:
            raise DataError(
                f"Stanford 2D-3D-S: no area_*/data/rgb/*_rgb.png of areas {_AREAS[split]} in {root}"
            )
        paths = [self._target(image, name) for image in self.images for name in self.targets]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"Stanford 2D-3D-S: {len(missing)} targets are missing, such as {missing[0]}"
            )
        if "segmentation" in self.targets:
            self._class_of = _read_classes(self.root / "assets" / "semantic_labels.json")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Loads one image.

        Raises:
            IndexError: If the index is out of range.
            DataError: If a file cannot be decoded.
        """
        path = self.images[self._position(index)]
        sample = {"image": channels_first(decode("Stanford 2D-3D-S", path)) / 255.0}
        for name in self.targets:
            target = self._target(path, name)
            if name == "depth":
                stored = decode_depth("Stanford 2D-3D-S", target).astype(np.float32)
                metres = np.where(stored == _NO_DEPTH, 0.0, stored / _PER_METRE)
                sample["depth"] = torch.from_numpy(metres.astype(np.float32))[None]
            elif name == "normals":
                colours = decode("Stanford 2D-3D-S", target)
                sample["normals"] = normals_from_colours(colours, _NO_NORMAL, (1, 1, -1))
            else:
                sample["label"] = self._labels(decode("Stanford 2D-3D-S", target))
        return sample

    def _labels(self, colours: np.ndarray) -> torch.Tensor:
        numbers = colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        known = np.minimum(numbers, len(self._class_of) - 1)  # the last one is void
        return torch.from_numpy(self._class_of[known])

    @staticmethod
    def _target(image: Path, name: str) -> Path:
        ending = image.name.removesuffix("rgb.png") + f"{_ENDINGS[name]}.png"
        return image.parent.parent / _FOLDERS[name] / ending


def _read_classes(path: Path) -> np.ndarray:
    """Class of each instance, int64; one more for numbers beyond the list, which are void."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Stanford 2D-3D-S: cannot read {path}: {error}") from error
    if not isinstance(names, list):
        raise DataError(f"Stanford 2D-3D-S: {path} holds {names!r:.40}; expected a list of names")
    known = {name: k for k, name in enumerate(STANFORD_CLASSES)}
    classes = [known.get(str(name).partition("_")[0], IGNORE_INDEX) for name in names]
    return np.array([*classes, IGNORE_INDEX], dtype=np.int64)
