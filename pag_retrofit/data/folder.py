"""Any folder of images with a label image each."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from .base import IGNORE_INDEX
from .pairs import ImageLabelPairs, pairs_by_stem

_GOLDEN = 0.618034


class LabelledFolder(ImageLabelPairs):
    """`{root}/{split}/images/*` with `{root}/{split}/labels/*.png` of the same stem.

    Labels are single-channel images whose values are the places of the classes, 255 for void.

    Items: `image` (3, H, W) float32 in [0, 1], `label` (H, W) int64.

    Args:
        root: Folder that holds the splits.
        split: Its name, such as `"train"`. Default: `"train"`.
        classes: Names, at most 255.
        cache: Keep decoded images in memory. Default: True.

    Raises:
        DataError: If there are no classes or too many.
        DataError: If a folder is missing or empty, or files have no partner.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        classes: Sequence[str],
        cache: bool = True,
    ) -> None:
        if not 0 < len(classes) <= IGNORE_INDEX:
            raise DataError(
                f"folder: {len(classes)} classes; expected 1 to {IGNORE_INDEX} (255 is void)"
            )
        folder = Path(root) / split
        pairs = pairs_by_stem(
            "folder",
            folder / "images",
            folder / "labels",
            root=Path(root),
            layout="{split}/images/* with {split}/labels/*.png",
        )
        values = {k: k for k in range(len(classes))} | {IGNORE_INDEX: IGNORE_INDEX}
        super().__init__(
            "folder",
            pairs,
            tuple(classes),
            distinct_colours(len(classes)),
            values,
            expected=f"0..{len(classes) - 1} for the classes and {IGNORE_INDEX} for void",
            cache=cache,
        )


def distinct_colours(count: int) -> np.ndarray:
    """Colours (count, 3) uint8: hues by the golden ratio, so that neighbours differ."""
    colours = [colorsys.hsv_to_rgb(k * _GOLDEN % 1, 0.65, 0.9) for k in range(count)]
    return (np.array(colours) * 255).astype(np.uint8)
