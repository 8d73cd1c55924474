"""What every data set of the package has in common: the form of a sample, and a base class."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pag_retrofit.errors import DataError

Sample = dict[str, Tensor]
"""One item, channels first: `image` (3, H, W) float32 in [0, 1] and `label` (H, W) int64, and
where the data has them `depth` (1, H, W) float32 in metres, `normals` (3, H, W) float32 of unit
length in the camera frame, `boundary` (1, H, W) float32, the share of annotators who see one, and
`annotators` (1, H, W) int64, in which bit k is set where annotator k sees one. Where padding was
added both are -1, and depth and normals 0."""

IGNORE_INDEX = 255
"""Label of pixels that belong to no class: they count in no loss and in no metric."""


class PixelDataset(Dataset[Sample]):
    """A map-style data set of images with per-pixel targets.

    Attributes:
        classes: Class names; the label value is the position in this tuple.
        palette: Display colours, (num_classes, 3) uint8 RGB.
        ignore_index: Label of void pixels.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    ignore_index: int = IGNORE_INDEX

    def __len__(self) -> int:
        """Number of samples."""
        raise NotImplementedError

    def _position(self, index: int) -> int:
        """Turns an index, negative ones counting from the end, into 0..len-1.

        Raises:
            IndexError: If the index is out of range; this also ends plain iteration.
        """
        size = len(self)
        position = operator.index(index)
        if not -size <= position < size:
            raise IndexError(f"index {position} is out of range for a data set of {size} samples")
        return position % size


def check_targets(title: str, targets: Collection[str], known: Collection[str]) -> None:
    """Refuses targets that a data set does not have.

    Raises:
        DataError: One is unknown, or they are not a collection of names.
    """
    unknown = [targets] if isinstance(targets, str) else [t for t in targets if t not in known]
    if unknown:
        raise DataError(f"{title}: targets {unknown}: expected a tuple of {', '.join(known)}")


def collate(samples: Sequence[Sample]) -> Sample:
    """One batch of samples.

    Raises:
        DataError: Their images are of several sizes.
    """
    sizes = {tuple(sample["image"].shape[1:]) for sample in samples}
    if len(sizes) > 1:
        raise DataError(
            f"images of one batch are of several sizes, {sorted(sizes)}: set data.eval_batch_size=1"
        )
    batch: Sample = default_collate(list(samples))
    return batch
