"""Data sets of images with a label image each: finding, decoding and checking the files."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .base import PixelDataset, Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png",)
_STORED_VALUES = 1 << 16


class ImageLabelPairs(PixelDataset):
    """Images, and for each a single-channel image of stored label values.

    Files are decoded and checked when first asked for. Items: `image` (3, H, W) float32 in [0, 1],
    `label` (H, W) int64.

    Args:
        title: Of the data set, for messages.
        pairs: Image and label files.
        classes: Names of the classes.
        palette: (classes, 3) uint8.
        values: Stored value -> class, or `ignore_index`. Other values are an error.
        expected: What values a label may have, for messages.
        cache: Keep decoded images in memory, as uint8, in each worker process of a loader.
    """

    def __init__(
        self,
        title: str,
        pairs: tuple[tuple[Path, Path], ...],
        classes: tuple[str, ...],
        palette: np.ndarray,
        values: Mapping[int, int],
        *,
        expected: str,
        cache: bool,
    ) -> None:
        self.title = title
        self.pairs = pairs
        self.classes = classes
        self.palette = palette
        self._decoder = LabelDecoder(title, values, expected)
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
            DataError: If the label has values that mean no class.
        """
        position = self._position(index)
        if self._cache is None:
            image, label = self._load(position)
        else:
            if position not in self._cache:
                self._cache[position] = self._load(position)
            image, label = self._cache[position]
        return {
            "image": torch.from_numpy(image).to(torch.float32).div_(255.0),
            "label": torch.from_numpy(label).to(torch.int64),
        }

    def _load(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Decodes and checks a pair; uint8 arrays (3, H, W) and (H, W), void as 255."""
        image, label = self.pairs[position]
        pixels, classes = decode(self.title, image), self._decoder(label)
        check_size(self.title, image, pixels, label, classes)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), classes


class LabelDecoder:
    """Decodes label images, and turns stored values into classes.

    Args:
        title: Of the data set, for messages.
        values: Stored value -> class, or `IGNORE_INDEX`. Other values are an error.
        expected: What values a label may have, for messages.
    """

    def __init__(self, title: str, values: Mapping[int, int], expected: str) -> None:
        self._title = title
        self._expected = expected
        self._class_of = np.full(_STORED_VALUES, -1, dtype=np.int64)
        self._class_of[list(values)] = list(values.values())

    def __call__(self, path: Path, data: bytes | None = None) -> np.ndarray:
        """Classes (H, W) uint8, void as 255; of a file, or of its content if that is given.

        Raises:
            DataError: If it cannot be decoded, or a value means no class.
        """
        stored = decode_label(self._title, path, data)
        known = (stored >= 0) & (stored < _STORED_VALUES)
        classes = np.where(known, self._class_of[np.where(known, stored, 0)], -1)
        if classes.min() < 0:
            wrong = np.unique(stored[classes < 0])
            shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            raise DataError(
                f"{self._title}: {path} has label values {shown}; expected {self._expected}"
            )
        return classes.astype(np.uint8)


def check_size(
    title: str, image: Path, pixels: np.ndarray, target: Path, values: np.ndarray
) -> None:
    """Refuses a target whose height and width are not those of its image.

    Raises:
        DataError: They differ.
    """
    if values.shape[:2] != pixels.shape[:2]:
        raise DataError(
            f"{title}: {target} is {values.shape[1]}x{values.shape[0]} pixels but its image "
            f"{image} is {pixels.shape[1]}x{pixels.shape[0]}"
        )


def channels_first(array: np.ndarray) -> torch.Tensor:
    """(C, H, W) of (H, W, C), in memory of its own."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def pairs_by_stem(
    title: str, images: Path, labels: Path, *, root: Path, layout: str
) -> tuple[tuple[Path, Path], ...]:
    """Matches the images and labels of two folders by stem, sorted by name.

    Args:
        title: Of the data set, for messages.
        images: Folder of images.
        labels: Folder of labels.
        root: Of the data set.
        layout: What the folders should be, for messages.

    Raises:
        DataError: If a folder is missing, holds no images or two of one stem.
        DataError: If an image has no label or a label has no image.
    """
    if not root.is_dir():
        raise DataError(f"{title}: folder {root} does not exist; pass the folder of the data set")
    found = files_by_stem(title, images, IMAGE_SUFFIXES, layout)
    partners = files_by_stem(title, labels, LABEL_SUFFIXES, layout)
    if not found:
        raise DataError(
            f"{title}: no images in {images}; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    check_matched(title, "image without a label", found, partners, labels)
    check_matched(title, "label without an image", partners, found, images)
    return tuple((found[stem], partners[stem]) for stem in sorted(found))


def files_by_stem(
    title: str, folder: Path, suffixes: tuple[str, ...], layout: str
) -> dict[str, Path]:
    """Lists the files of a folder that end in one of the suffixes, hidden ones left out.

    Raises:
        DataError: If the folder is missing, or two files share a stem.
    """
    if not folder.is_dir():
        raise DataError(f"{title}: folder {folder} does not exist; the layout is {layout}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if path.stem in found:
            raise DataError(
                f"{title}: {found[path.stem]} and {path} share a stem, so that their label is "
                f"ambiguous; remove one of them"
            )
        found[path.stem] = path
    return found


def check_matched(
    title: str, what: str, files: dict[str, Path], partners: dict[str, Path], folder: Path
) -> None:
    """Raises a DataError that names the first file without a partner."""
    alone = [path for stem, path in files.items() if stem not in partners]
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise DataError(
            f"{title}: {what}: {alone[0]}{more}; expected a file named {alone[0].stem} in {folder}"
        )


def decode(title: str, path: Path, data: bytes | None = None) -> np.ndarray:
    """Reads an image as (H, W, 3) uint8; of a file, or of its content if that is given.

    Raises:
        DataError: If it cannot be decoded, or does not have 8 bits a channel.
    """
    array, mode = _read(title, path, data, convert=True)
    if mode.startswith(("I", "F")):
        raise DataError(f"{title}: {path} has pixels of mode {mode}; expected 8 bits a channel")
    return array


def decode_label(title: str, path: Path, data: bytes | None = None) -> np.ndarray:
    """Reads a single-channel image as (H, W) of its stored values.

    Those of a palette image are its indices.

    Raises:
        DataError: If it cannot be decoded, or has several channels.
    """
    array, mode = _read(title, path, data, convert=False)
    if array.ndim != 2:
        raise DataError(
            f"{title}: {path} has {array.shape[2]} channels (mode {mode}); expected a "
            f"single-channel image of class indices"
        )
    return array


def decode_depth(title: str, path: Path, data: bytes | None = None) -> np.ndarray:
    """Reads a depth image as (H, W) of its stored values; of a file, or of its content.

    Raises:
        DataError: If it cannot be decoded, or is not one channel of 16 bits.
    """
    array, mode = _read(title, path, data, convert=False)
    if not mode.startswith("I"):
        raise DataError(
            f"{title}: {path} has pixels of mode {mode}; expected depth in one channel of 16 bits"
        )
    return array


def _read(title: str, path: Path, data: bytes | None, *, convert: bool) -> tuple[np.ndarray, str]:
    try:
        with Image.open(path if data is None else BytesIO(data)) as file:
            return np.array(file.convert("RGB") if convert else file), file.mode
    # Pillow reports damage in several ways, a broken PNG chunk among them as a SyntaxError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{title}: cannot decode {path}: {error}") from error
