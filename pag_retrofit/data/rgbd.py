"""A folder of RGB-D frames, as recorded by a HoloLens."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .base import PixelDataset, Sample
from .pairs import IMAGE_SUFFIXES, check_size, decode, decode_depth, files_by_stem
from .surfaces import normals_from_depth

_LAYOUT = "rgb/*.jpg, depth/*.png, K.txt, train.txt, val.txt"
_MILLIMETRES = 1000.0


class RGBDFolder(PixelDataset):
    """Colour images with depth, and normals made of it.

    `{root}/rgb/{name}.jpg` (or jpeg, png), `{root}/depth/{name}.png` of the same size in uint16
    millimetres, 0 where there is no reading; `{root}/K.txt`, the 3x3 intrinsics in pixels; and
    `{root}/{split}.txt`, one name per line.

    Items: `image` (3, H, W) float32 in [0, 1]; `depth` (1, H, W) float32 in metres; if asked for
    `normals` (3, H, W), see `normals_from_depth`.

    Args:
        root: Folder of the data set.
        split: Which list of names, such as `"train"`. Default: `"train"`.
        normals: Give normals; the first access to an item takes a second for it. Default: False.
        cache: Keep decoded frames in memory: 2 MB each at 540x360. Default: True.

    Raises:
        DataError: If a folder or list is missing, or a name in it has no files.
    """

    classes = ("surface",)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        normals: bool = False,
        cache: bool = True,
    ) -> None:
        self.root = Path(root)
        images = files_by_stem("RGB-D", self.root / "rgb", IMAGE_SUFFIXES, _LAYOUT)
        depths = files_by_stem("RGB-D", self.root / "depth", (".png",), _LAYOUT)
        names = _names(self.root / f"{split}.txt")
        missing = [name for name in names if name not in images or name not in depths]
        if missing:
            raise DataError(
                f"RGB-D: {split}.txt names {missing[0]} (and {len(missing) - 1} more) without an "
                f"image and a depth image in {self.root}; the layout is {_LAYOUT}"
            )
        self.frames = tuple((images[name], depths[name]) for name in names)
        self.intrinsics = _read_intrinsics(self.root / "K.txt")
        self.palette = np.array([[255, 255, 255]], dtype=np.uint8)
        self._with_normals = normals
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        """Loads one frame.

        Raises:
            IndexError: If the index is out of range.
            DataError: If a file cannot be decoded, or sizes differ.
        """
        position = self._position(index)
        stored = self._cache.get(position) if self._cache is not None else None
        if stored is None:
            stored = self._load(position)
            if self._cache is not None:
                self._cache[position] = stored
        sample = {
            "image": stored["image"].to(torch.float32) / 255.0,
            "depth": stored["depth"].to(torch.float32) / _MILLIMETRES,
        }
        if self._with_normals:
            sample["normals"] = stored["normals"].to(torch.float32)
        return sample

    def _load(self, position: int) -> Sample:
        """Decodes a frame: uint8, millimetres, and normals as float16."""
        image_path, depth_path = self.frames[position]
        image = decode("RGB-D", image_path)
        depth = decode_depth("RGB-D", depth_path).astype(np.int32)
        check_size("RGB-D", image_path, image, depth_path, depth)
        stored = {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "depth": torch.from_numpy(depth)[None],
        }
        if self._with_normals:
            metres = stored["depth"] / _MILLIMETRES
            stored["normals"] = normals_from_depth(metres, self.intrinsics).half()
        return stored


def _names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"RGB-D: cannot read {path}: {error}; the layout is {_LAYOUT}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"RGB-D: {path} is empty; expected one name per line")
    return names


def _read_intrinsics(path: Path) -> Tensor:
    try:
        values = [float(text) for text in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise DataError(f"RGB-D: cannot read {path}: {error}") from error
    finite = all(math.isfinite(value) for value in values)
    if not finite or len(values) != 9 or min(values[0], values[4]) <= 0 or values[6:] != [0, 0, 1]:
        raise DataError(
            f"RGB-D: {path} holds {values}; expected 3x3 intrinsics in pixels, row by row"
        )
    return torch.tensor(values, dtype=torch.float64).view(3, 3)
