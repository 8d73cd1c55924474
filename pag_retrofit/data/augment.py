"""Random training augmentation, and the deterministic steps that follow it.

Everything works on samples (see `pag_retrofit.data.base.Sample`) and treats all maps of one
sample alike. Padding has a fixed value for each map: 0.5 for `image`, `IGNORE_INDEX` for
`label`, 0 for `depth` and `normals` (no reading), -1 for `boundary` and `annotators`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .base import IGNORE_INDEX, PixelDataset, Sample

_PADDING = {
    "image": 0.5,
    "label": IGNORE_INDEX,
    "depth": 0.0,
    "normals": 0.0,
    "boundary": -1.0,
    "annotators": -1,
}


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop, horizontal flip, brightness and contrast.

    A window of about `crop / s` pixels is cut out at a random place and resized to the crop, so
    that only pixels which are needed are resized. Where the image is smaller than the window,
    all of it is used and the result is padded to the crop, at a random place. The image is
    resized bilinearly, with antialiasing where it shrinks; the other maps by their nearest pixel.

    A flip also changes the sign of the normals' x component. Depth is kept in metres and is not
    divided by the scale: resizing acts like a longer or shorter focal length.

    Attributes:
        crop: Height and width of the result, in pixels. Default: (256, 320).
        scale: Lowest and highest resizing factor s, drawn log-uniformly. Default: (0.6, 1.5).
        flip: Probability of a horizontal flip. Default: 0.5.
        brightness: The image is multiplied by 1 + U(-brightness, brightness). Default: 0.2.
        contrast: Distances to the image's mean are multiplied by 1 + U(-contrast, contrast);
            the result is clipped to [0, 1]. Default: 0.25.

    Raises:
        ValueError: If the crop is not two positive integers.
        ValueError: If the scale is not 0 < lowest <= highest.
        ValueError: If flip, brightness or contrast is outside [0, 1].
    """

    crop: tuple[int, int] = (256, 320)
    scale: tuple[float, float] = (0.6, 1.5)
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.25

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or any(side != int(side) or side < 1 for side in self.crop):
            raise ValueError(f"crop must be (height, width) in whole pixels, got {self.crop}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be (lowest, highest), both above 0, got {self.scale}")
        for name in ("flip", "brightness", "contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def __call__(self, sample: Mapping[str, Tensor], generator: np.random.Generator) -> Sample:
        """Augments one sample; the input is left as it was.

        Args:
            sample: The maps, all of one height and width.
            generator: Source of all random numbers.

        Returns:
            The same maps at the size of the crop, in memory of their own.

        Raises:
            DataError: If the sample has a key this module does not know, or lacks the image.
            DataError: If the maps differ in height or width.
        """
        height, width = _spatial_size(sample)
        # Always the same draws in the same order, whatever the sample and the settings are.
        log_scale, at_y, at_x, flip, brightness, contrast = generator.random(6)
        low, high = (math.log(limit) for limit in self.scale)
        scale = math.exp(low + (high - low) * log_scale)
        rows, top = _fit(height, self.crop[0], scale, at_y)
        columns, left = _fit(width, self.crop[1], scale, at_x)

        out: Sample = {}
        for key, value in sample.items():
            value = _resize(key, value[..., rows.source, columns.source], (rows.size, columns.size))
            if flip < self.flip:
                value = value.flip(-1)
                if key == "normals":
                    value = value * value.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
            if key == "image":
                value = _jitter(
                    value,
                    1 + self.brightness * (2 * brightness - 1),
                    1 + self.contrast * (2 * contrast - 1),
                )
            below, right = self.crop[0] - rows.size - top, self.crop[1] - columns.size - left
            out[key] = _pad(key, value, (left, right, top, below))
        return out


@dataclass(frozen=True)
class PadToMultiple:
    """Pads a sample at the right and at the bottom until its sides are multiples of a number.

    Attributes:
        multiple: The number, usually the total stride of the network. Default: 32.

    Raises:
        ValueError: If the multiple is not a positive integer.
    """

    multiple: int = 32

    def __post_init__(self) -> None:
        if self.multiple != int(self.multiple) or self.multiple < 1:
            raise ValueError(f"multiple must be a positive integer, got {self.multiple}")

    def __call__(self, sample: Mapping[str, Tensor]) -> Sample:
        """Pads one sample.

        Raises:
            DataError: If the sample has a key this module does not know, or lacks the image.
            DataError: If the maps differ in height or width.
        """
        height, width = _spatial_size(sample)
        margins = (0, -width % self.multiple, 0, -height % self.multiple)
        return {key: _pad(key, value, margins) for key, value in sample.items()}


@dataclass(frozen=True)
class Normalize:
    """Normalises the image: (image - mean) / std, per channel. Meant as the last step.

    Attributes:
        mean: Three values, for an image in [0, 1].
        std: Three values, all above 0.

    Raises:
        ValueError: If mean or std does not have three values.
        ValueError: If a std is not above 0.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need three values, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}")

    def __call__(self, sample: Mapping[str, Tensor]) -> Sample:
        """Normalises the image of one sample; the other maps are passed on."""
        image = sample["image"]
        mean = image.new_tensor(self.mean).view(3, 1, 1)
        std = image.new_tensor(self.std).view(3, 1, 1)
        return {**sample, "image": (image - mean) / std}


class AugmentedDataset(PixelDataset):
    """A data set for training: augmentation, then normalisation.

    The randomness of an item depends on (seed, epoch, index) alone: neither the number of
    workers nor the order of access matters, and a resumed run sees what an uninterrupted one
    would have seen.

    Args:
        dataset: Data set with un-normalised samples.
        augmentation: The random step.
        normalize: The last step. Default: None, images stay in [0, 1].
        seed: Seed of the augmentation, at least 0. Default: 0.

    Raises:
        ValueError: If the seed is negative.
    """

    def __init__(
        self,
        dataset: PixelDataset,
        augmentation: Augmentation,
        *,
        normalize: Normalize | None = None,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.dataset = dataset
        self.augmentation = augmentation
        self.normalize = normalize
        self.seed = seed
        self.classes = dataset.classes
        self.palette = dataset.palette
        self.ignore_index = dataset.ignore_index
        # In shared memory, so that `set_epoch` reaches workers that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next items belong to; call it before iterating a loader.

        Raises:
            ValueError: If the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """The augmented sample of this index in the current epoch."""
        position = self._position(index)
        generator = np.random.default_rng((self.seed, int(self._epoch), position))
        sample = self.augmentation(self.dataset[position], generator)
        return self.normalize(sample) if self.normalize else sample


class EvaluationDataset(PixelDataset):
    """A data set for evaluation: full images, padded, then normalised.

    Args:
        dataset: Data set with un-normalised samples.
        pad: Padding step. Default: to multiples of 32.
        normalize: The last step. Default: None, images stay in [0, 1].
    """

    def __init__(
        self,
        dataset: PixelDataset,
        *,
        pad: PadToMultiple | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        self.dataset = dataset
        self.pad = PadToMultiple() if pad is None else pad
        self.normalize = normalize
        self.classes = dataset.classes
        self.palette = dataset.palette
        self.ignore_index = dataset.ignore_index

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """The padded sample of this index."""
        sample = self.pad(self.dataset[self._position(index)])
        return self.normalize(sample) if self.normalize else sample


@dataclass(frozen=True)
class _Span:
    """One axis of a crop: the pixels that are read, and how many they become."""

    source: slice
    size: int


def _fit(side: int, crop: int, scale: float, where: float) -> tuple[_Span, int]:
    """Places a crop along one axis.

    Args:
        side: Pixels of the image along this axis.
        crop: Pixels of the crop.
        scale: Resizing factor.
        where: Random place in [0, 1).

    Returns:
        What to read and its size after resizing, and the padding in front of it.
    """
    window = max(1, round(crop / scale))
    if window <= side:
        start = int(where * (side - window + 1))
        return _Span(slice(start, start + window), crop), 0
    # Rounding could exceed the crop by a pixel or vanish.
    size = min(crop, max(1, round(side * scale)))
    return _Span(slice(0, side), size), int(where * (crop - size + 1))


def _resize(key: str, value: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (..., h, w) to (..., *size) the way this map needs."""
    height, width = value.shape[-2:]
    if (height, width) == size:
        return value
    if key == "image":
        shrinks = size[0] < height or size[1] < width
        return F.interpolate(value[None], size, mode="bilinear", antialias=shrinks)[0]
    # Nearest pixel by centres, the same geometry as the bilinear resize of the image. By
    # indexing, as `interpolate` takes no integers.
    rows = _nearest(height, size[0])
    columns = _nearest(width, size[1])
    return value.index_select(-2, rows).index_select(-1, columns)


def _nearest(source: int, target: int) -> Tensor:
    """Source index of each target index, floor((i + 1/2) * source / target), in integers."""
    return (2 * torch.arange(target) + 1) * source // (2 * target)


def _jitter(image: Tensor, brightness: float, contrast: float) -> Tensor:
    """Scales brightness, then the distance to the mean, and clips to [0, 1]."""
    mean = float(image.mean()) * brightness
    return (image * (brightness * contrast)).add_(mean * (1 - contrast)).clamp_(0, 1)


def _pad(key: str, value: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """Pads (..., h, w) by (left, right, top, bottom); always returns new memory."""
    left, right, top, bottom = margins
    height, width = value.shape[-2:]
    shape = (*value.shape[:-2], top + height + bottom, left + width + right)
    out = value.new_full(shape, _PADDING[key])
    out[..., top : top + height, left : left + width] = value
    return out


def _spatial_size(sample: Mapping[str, Tensor]) -> tuple[int, int]:
    """Height and width of a sample, after checking that its maps are known and agree."""
    unknown = sorted(set(sample) - set(_PADDING))
    if unknown or "image" not in sample:
        raise DataError(
            f"a sample needs 'image' and may have {', '.join(sorted(set(_PADDING) - {'image'}))}; "
            f"got {', '.join(sorted(sample)) or 'nothing'}"
        )
    height, width = sample["image"].shape[-2:]
    for key, value in sample.items():
        if value.shape[-2:] != (height, width):
            raise DataError(
                f"{key!r} is {tuple(value.shape[-2:])} pixels but 'image' is {(height, width)}"
            )
    return height, width
