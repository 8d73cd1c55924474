"""Natural images with boundaries drawn by several people (BSDS500)."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from ..errors import DataError
from .base import PixelDataset, Sample
from .pairs import IMAGE_SUFFIXES, check_matched, decode, files_by_stem

_SPLITS = ("train", "val", "test")
_LAYOUT = "data/images/{split}/*.jpg with data/groundTruth/{split}/*.mat"


class BSDS500(PixelDataset):
    """BSDS500 (Arbelaez et al. 2011) in its official layout.

    Images are `{root}/data/images/{split}/*.jpg`, upright or lying, so evaluate with batches of
    one. Annotations are `{root}/data/groundTruth/{split}/*.mat` of the same stem, MATLAB files of
    version 5 (numbers only: nothing in them is run).

    Items: `image` (3, H, W) float32 in [0, 1]; `boundary` (1, H, W) float32, share of annotators
    who drew a boundary there; `annotators` (1, H, W) int64, in which bit k is that of annotator k.

    Args:
        root: Folder that holds `data`.
        split: `"train"`, `"val"` or `"test"`. Default: `"train"`.
        cache: Keep decoded images in memory: 2 MB each. Default: True.

    Raises:
        DataError: If the split is not one of the three, or a folder is missing or empty.
        DataError: If an image has no annotations, or annotations have no image.
    """

    classes = ("boundary",)

    def __init__(
        self, root: str | os.PathLike[str], split: str = "train", *, cache: bool = True
    ) -> None:
        if split not in _SPLITS:
            raise DataError(f"BSDS500: unknown split {split!r}; use one of {', '.join(_SPLITS)}")
        folder = Path(root) / "data"
        images = files_by_stem("BSDS500", folder / "images" / split, IMAGE_SUFFIXES, _LAYOUT)
        drawn = files_by_stem("BSDS500", folder / "groundTruth" / split, (".mat",), _LAYOUT)
        if not images:
            raise DataError(f"BSDS500: no images in {folder / 'images' / split}")
        check_matched("BSDS500", "image without annotations", images, drawn, folder / "groundTruth")
        check_matched("BSDS500", "annotations without an image", drawn, images, folder / "images")
        self.pairs = tuple((images[stem], drawn[stem]) for stem in sorted(images))
        self.palette = np.array([[255, 255, 255]], dtype=np.uint8)
        self._cache: dict[int, tuple[np.ndarray, list[np.ndarray]]] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Loads one image and what was drawn on it.

        Raises:
            IndexError: If the index is out of range.
            DataError: If a file cannot be read, or sizes differ.
        """
        image, masks = self._load(self._position(index))
        bits = sum(mask.astype(np.int64) << k for k, mask in enumerate(masks))
        return {
            "image": torch.from_numpy(image).to(torch.float32).div_(255.0),
            "boundary": torch.from_numpy(np.stack(masks).mean(0, dtype=np.float32)[None]),
            "annotators": torch.from_numpy(np.asarray(bits)[None]),
        }

    def annotations(self, index: int) -> list[np.ndarray]:
        """Boundary maps (H, W) bool of an image, one per annotator."""
        return self._load(self._position(index))[1]

    def _load(self, position: int) -> tuple[np.ndarray, list[np.ndarray]]:
        if self._cache is not None and position in self._cache:
            return self._cache[position]
        image_path, drawn_path = self.pairs[position]
        image = np.ascontiguousarray(decode("BSDS500", image_path).transpose(2, 0, 1))
        masks = read_annotations(drawn_path)
        if masks[0].shape != image.shape[1:]:
            raise DataError(
                f"BSDS500: {drawn_path} is {masks[0].shape[1]}x{masks[0].shape[0]} pixels but its "
                f"image {image_path} is {image.shape[2]}x{image.shape[1]}"
            )
        if self._cache is not None:
            self._cache[position] = image, masks
        return image, masks


def read_annotations(path: Path) -> list[np.ndarray]:
    """Boundary maps (H, W) bool of a ground-truth file of BSDS500, one per annotator.

    Raises:
        DataError: If the file is not one of BSDS500's.
    """
    try:
        cells = loadmat(path)["groundTruth"]
        masks = [cell["Boundaries"][0, 0].astype(bool) for cell in cells.ravel()]
    except (
        MatReadError, zlib.error, OSError, ValueError, KeyError, IndexError, TypeError,
        NotImplementedError,
    ) as error:  # fmt: skip
        raise DataError(
            f"BSDS500: cannot read {path}: expected groundTruth{{k}}.Boundaries ({error})"
        ) from error
    if not masks or any(mask.ndim != 2 or mask.shape != masks[0].shape for mask in masks):
        raise DataError(f"BSDS500: {path} has no annotations, or of different sizes")
    return masks
