"""Images streamed from WebDataset shards: data that does not fit one machine."""

from __future__ import annotations

import random
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DataError
from .augment import Augmentation, Normalize
from .base import IGNORE_INDEX, PixelDataset, Sample, check_targets
from .folder import distinct_colours
from .pairs import LabelDecoder, channels_first, check_size, decode, decode_depth, decode_label
from .surfaces import normals_from_colours

_SHARD = re.compile(r"https?://.+|[^:]+")
"""What names a shard: a path or an address; other schemes of WebDataset start programs."""
_IMAGES = ("jpg", "jpeg", "png")
_ENDINGS = {
    "segmentation": "label.png",
    "boundaries": "boundary.png",
    "depth": "depth.png",
    "normals": "normals.png",
}
_MILLIMETRES = 1000.0
_Stored = tuple[str, dict[str, bytes]]  # a sample's name, and the contents of its files by ending


class StreamedImages(IterableDataset[Sample]):
    """Training images read from shards in passing, augmented and normalised.

    A shard is a tar file with, next to each other, `KEY.jpg` (or jpeg, png) and for each target

    - segmentation: `KEY.label.png`, the places of the classes, 255 for void;
    - boundaries: `KEY.boundary.png`, 8 or 16 bits, a boundary above half of the range;
    - depth: `KEY.depth.png`, 16 bits, millimetres, 0 where there is no reading;
    - normals: `KEY.normals.png`, 8 bits, (r, g, b) / 127.5 - 1 to the right, down and
      away from the camera, black where there is none.

    An epoch takes the shards in random order, and of a buffer of images one at random; it begins
    again when it runs out of them. What is read follows from seed, epoch and number of loader
    workers alone, so an interrupted epoch can be gone on with. Workers read different shards.

    Items: `image` (3, H, W) float32, and of the targets asked for `label` (H, W) int64, `boundary`
    (1, H, W) float32, `depth` (1, H, W) float32 in metres, `normals` (3, H, W) float32 of unit
    length.

    Args:
        shards: Paths or http(s) addresses; `{000..999}` stands for all numbers between.
        classes: Names, for segmentation.
        targets: What to read beside the image. Default: segmentation.
        count: Images of an epoch; it need not be that of the shards.
        batch_size: Of the loader: each worker fills whole batches.
        augmentation: The random step.
        normalize: The last step.
        seed: At least 0. Default: 0.
        buffer: Images to draw the next one of, kept as they are stored. Default: 1000.

    Raises:
        DataError: If there is no such shard, a target is unknown, or WebDataset is not installed.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        shards: str,
        classes: Sequence[str] = (),
        *,
        targets: Collection[str] = ("segmentation",),
        count: int,
        batch_size: int,
        augmentation: Augmentation,
        normalize: Normalize,
        seed: int = 0,
        buffer: int = 1000,
    ) -> None:
        self.shards = expand_shards(shards)
        self.classes = tuple(classes)
        self.palette = distinct_colours(len(classes))
        self.count = count
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.normalize = normalize
        self.seed = seed
        self.buffer = buffer
        self._decoder = _Decoder(classes, targets)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration belongs to."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of images of an epoch."""
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        """Images of this worker's share of the epoch.

        Raises:
            DataError: If there are fewer shards than workers, or a shard cannot be read.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if len(self.shards) < workers:
            raise DataError(f"{len(self.shards)} shards for {workers} workers; lower data.workers")
        batches = self.count // self.batch_size
        mine = batches // workers + (worker < batches % workers)
        generator = np.random.default_rng((self.seed, self._epoch, worker))
        stream = self._contents(worker, workers)
        for _ in range(mine * self.batch_size):
            yield self.normalize(self.augmentation(self._decoder(*next(stream)), generator))

    def _contents(self, worker: int, workers: int) -> Iterator[_Stored]:
        """Names and contents of images without end: in each round each one once."""
        from webdataset.filters import shuffle

        order = np.random.default_rng((self.seed, self._epoch)).permutation(len(self.shards))
        shards = [self.shards[k] for k in order[worker::workers]]
        draw = random.Random(f"{self.seed} {self._epoch} {worker}")
        while True:  # a buffer filled over several rounds would hold images several times
            yield from shuffle(self.buffer, rng=draw)(self._decoder.read(shards))


class ShardImages(PixelDataset):
    """The images of a few shards, kept in memory as they are stored: for evaluation.

    Args:
        shards: As those of `StreamedImages`.
        classes: Names, for segmentation.
        targets: As those of `StreamedImages`. Default: segmentation.
        limit: Only so many of them. Default: all.

    Raises:
        DataError: If there is no such shard, it holds no images, a target is unknown, or
            WebDataset is not installed.
    """

    def __init__(
        self,
        shards: str,
        classes: Sequence[str] = (),
        *,
        targets: Collection[str] = ("segmentation",),
        limit: int | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.palette = distinct_colours(len(classes))
        self._decoder = _Decoder(classes, targets)
        self._stored: list[_Stored] = []
        for stored in self._decoder.read(expand_shards(shards)):
            self._stored.append(stored)
            if len(self._stored) == limit:
                break

    def __len__(self) -> int:
        """Number of images."""
        return len(self._stored)

    def __getitem__(self, index: int) -> Sample:
        """Decodes one image.

        Raises:
            IndexError: If the index is out of range.
            DataError: If it cannot be decoded.
        """
        return self._decoder(*self._stored[self._position(index)])


def expand_shards(pattern: str) -> tuple[str, ...]:
    """The shards that a pattern with braces stands for.

    Raises:
        DataError: If it is neither a path nor an http(s) address, or a file is missing.
        DataError: If WebDataset is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError("shards need WebDataset: pip install 'pag-retrofit[streaming]'") from error
    shards = tuple(expand_urls(pattern))
    refused = [shard for shard in shards if not _SHARD.fullmatch(shard)]
    if refused or not shards:
        raise DataError(
            f"shards {pattern!r}: expected a path or an http(s) address, got {refused or 'nothing'}"
        )
    missing = [s for s in shards if not s.startswith("http") and not Path(s).is_file()]
    if missing:
        raise DataError(f"shards {pattern!r}: {len(missing)} are missing, such as {missing[0]}")
    return shards


class _Decoder:
    """Finds the files of samples in shards, and decodes them."""

    def __init__(self, classes: Sequence[str], targets: Collection[str]) -> None:
        check_targets("shards", targets, _ENDINGS)
        self._endings = {name: _ENDINGS[name] for name in targets}
        values = {k: k for k in range(len(classes))} | {IGNORE_INDEX: IGNORE_INDEX}
        expected = f"0..{len(classes) - 1} for the classes and {IGNORE_INDEX} for void"
        self._labels = LabelDecoder("shards", values, expected)

    def read(self, shards: Sequence[str]) -> Iterator[_Stored]:
        """All samples of shards, in order."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        found = 0
        for shard in shards:
            try:
                with gopen(shard) as stream:
                    files = tar_file_expander([{"url": shard, "stream": stream}])
                    for sample in group_by_keys(files):
                        yield self._stored(shard, sample)
                        found += 1
            except (OSError, ValueError, tarfile.TarError) as error:
                raise DataError(f"shards: cannot read {shard}: {error}") from error
        if not found:
            raise DataError(f"shards: no images in {', '.join(shards)}")

    def _stored(self, shard: str, sample: dict[str, Any]) -> _Stored:
        name = f"{shard}/{sample['__key__']}"
        image = next((ending for ending in _IMAGES if ending in sample), None)
        missing = [ending for ending in self._endings.values() if ending not in sample]
        if image is None or missing:
            needed = " and a ".join(self._endings.values())
            raise DataError(f"shards: {name} needs an image ({', '.join(_IMAGES)}) and a {needed}")
        return name, {ending: sample[ending] for ending in (image, *self._endings.values())}

    def __call__(self, name: str, files: dict[str, bytes]) -> Sample:
        """Decodes a sample.

        Raises:
            DataError: A file cannot be decoded, sizes differ, or a label means no class.
        """
        image, *_ = (Path(f"{name}.{ending}") for ending in files)  # the first one
        pixels = decode("shards", image, next(iter(files.values())))
        sample = {"image": channels_first(pixels) / 255.0}
        for target, ending in self._endings.items():
            path = Path(f"{name}.{ending}")
            values, tensors = self._target(target, path, files[ending])
            check_size("shards", image, pixels, path, values)
            sample |= tensors
        return sample

    def _target(self, target: str, path: Path, data: bytes) -> tuple[np.ndarray, Sample]:
        """What is stored, and what it means."""
        if target == "segmentation":
            values = self._labels(path, data)
            return values, {"label": torch.from_numpy(values.astype(np.int64))}
        if target == "depth":
            values = decode_depth("shards", path, data)
            metres = values.astype(np.float32) / np.float32(_MILLIMETRES)
            return values, {"depth": torch.from_numpy(metres)[None]}
        if target == "normals":
            values = decode("shards", path, data)
            return values, {"normals": normals_from_colours(values, missing=0)}
        values = decode_label("shards", path, data)
        largest = {"bool": 1, "uint8": 255}.get(values.dtype.name, 65535)
        drawn = 2 * values.astype(np.int64) > largest
        return values, {"boundary": torch.from_numpy(drawn.astype(np.float32))[None]}
