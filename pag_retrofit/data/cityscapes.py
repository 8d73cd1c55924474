"""Street scenes with the 19 classes of Cityscapes: Cityscapes itself and KITTI semantic."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import DataError
from .base import IGNORE_INDEX
from .pairs import ImageLabelPairs, pairs_by_stem

_CLASSES = (
    # stored label id, name, colour
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES_CLASSES = tuple(name for _, name, _ in _CLASSES)
"""The 19 classes that are scored, in the order of their training ids."""
_LAST_ID = 33
_HELD_OUT = 5  # of KITTI's training images, which alone have labels, every fifth is for validation


class _Streets(ImageLabelPairs):
    classes = CITYSCAPES_CLASSES

    def __init__(self, title: str, pairs: tuple[tuple[Path, Path], ...], cache: bool) -> None:
        values = dict.fromkeys(range(_LAST_ID + 1), IGNORE_INDEX)
        values |= {stored: k for k, (stored, _, _) in enumerate(_CLASSES)}
        super().__init__(
            title,
            pairs,
            CITYSCAPES_CLASSES,
            np.array([colour for _, _, colour in _CLASSES], dtype=np.uint8),
            values,
            expected=f"label ids 0..{_LAST_ID} of Cityscapes",
            cache=cache,
        )


class Cityscapes(_Streets):
    """Cityscapes (Cordts et al., CVPR 2016), fine annotations.

    Images are `{root}/leftImg8bit/{split}/{city}/{name}_leftImg8bit.png`, labels
    `{root}/gtFine/{split}/{city}/{name}_gtFine_labelIds.png`. Of the 34 label ids 19 are classes,
    the others void.

    Items: `image` (3, H, W) float32 in [0, 1], `label` (H, W) int64.

    Args:
        root: Folder that holds `leftImg8bit` and `gtFine`.
        split: `"train"` or `"val"`. Default: `"train"`.
        cache: Keep decoded images in memory: 8 MB each. Default: False.

    Raises:
        DataError: If the split is neither, a folder is missing or empty, or an image has no label.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str = "train", *, cache: bool = False
    ) -> None:
        _check_split("Cityscapes", split)
        images = Path(root) / "leftImg8bit" / split
        files = sorted(images.glob("*/*_leftImg8bit.png"))
        if not files:
            raise DataError(
                f"Cityscapes: no {images}/{{city}}/*_leftImg8bit.png; pass the folder that holds "
                "leftImg8bit and gtFine"
            )
        pairs = tuple((file, _label_of(Path(root), split, file)) for file in files)
        missing = [label for _, label in pairs if not label.is_file()]
        if missing:
            raise DataError(f"Cityscapes: {len(missing)} labels are missing, such as {missing[0]}")
        super().__init__("Cityscapes", pairs, cache)


class KITTISemantic(_Streets):
    """KITTI's semantic benchmark of 2015 (Alhaija et al., IJCV 2018).

    Images are `{root}/training/image_2/*.png`, labels `{root}/training/semantic/*.png` of the same
    name. Only these have labels: every fifth is for validation.

    Items: `image` (3, H, W) float32 in [0, 1], `label` (H, W) int64; sizes differ by a few pixels.

    Args:
        root: Folder that holds `training`.
        split: `"train"` or `"val"`. Default: `"train"`.
        cache: Keep decoded images in memory: 2 MB each. Default: True.

    Raises:
        DataError: If the split is neither, a folder is missing or empty, or an image has no label.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str = "train", *, cache: bool = True
    ) -> None:
        _check_split("KITTI semantic", split)
        folder = Path(root) / "training"
        pairs = pairs_by_stem(
            "KITTI semantic",
            folder / "image_2",
            folder / "semantic",
            root=Path(root),
            layout="training/image_2/*.png with training/semantic/*.png",
        )
        held_out = split == "val"
        chosen = tuple(p for k, p in enumerate(pairs) if (k % _HELD_OUT == 0) == held_out)
        super().__init__("KITTI semantic", chosen, cache)


def _check_split(title: str, split: str) -> None:
    if split not in ("train", "val"):
        raise DataError(f"{title}: unknown split {split!r}; use train or val")


def _label_of(root: Path, split: str, image: Path) -> Path:
    name = image.name.replace("_leftImg8bit", "_gtFine_labelIds")
    return root / "gtFine" / split / image.parent.name / name
