"""Images streamed from WebDataset shards: data that does not fit one machine."""

from __future__ import annotations

import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DataError
from .augment import Augmentation, Normalize
from .base import IGNORE_INDEX, PixelDataset, Sample
from .folder import distinct_colours
from .pairs import PairDecoder, as_sample

_SHARD = re.compile(r"https?://.+|[^:]+")
"""What names a shard: a path or an address; other schemes of WebDataset start programs."""
_IMAGES = ("jpg", "jpeg", "png")
_LABEL = "label.png"


class StreamedImages(IterableDataset[Sample]):
    """Training images read from shards in passing, augmented and normalised.

    A shard is a tar file with, next to each other, `KEY.jpg` (or jpeg, png) and `KEY.label.png`,
    whose values are the places of the classes, 255 for void. An epoch takes the shards in random
    order, and of a buffer of images one at random; it begins again when it runs out of them. What
    is read follows from seed, epoch and number of loader workers alone, so an interrupted epoch
    can be gone on with. Workers read different shards.

    Items: `image` (3, H, W) float32, `label` (H, W) int64.

    Args:
        shards: Paths or http(s) addresses; `{000..999}` stands for all numbers between.
        classes: Names.
        count: Images of an epoch; it need not be that of the shards.
        batch_size: Of the loader: each worker fills whole batches.
        augmentation: The random step.
        normalize: The last step.
        seed: At least 0. Default: 0.
        buffer: Images to draw the next one of, kept as they are stored. Default: 1000.

    Raises:
        DataError: If there is no such shard, or WebDataset is not installed.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        shards: str,
        classes: Sequence[str],
        *,
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
        self._decoder = _decoder(classes)
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
            sample = as_sample(*self._decoder(*next(stream)))
            yield self.normalize(self.augmentation(sample, generator))

    def _contents(self, worker: int, workers: int) -> Iterator[tuple[Path, Path, Any]]:
        """Names and contents of images without end: in each round each one once."""
        from webdataset.filters import shuffle

        order = np.random.default_rng((self.seed, self._epoch)).permutation(len(self.shards))
        shards = [self.shards[k] for k in order[worker::workers]]
        draw = random.Random(f"{self.seed} {self._epoch} {worker}")
        while True:  # a buffer filled over several rounds would hold images several times
            yield from shuffle(self.buffer, rng=draw)(_read(shards))


class ShardImages(PixelDataset):
    """The images of a few shards, kept in memory as they are stored: for evaluation.

    Args:
        shards: As those of `StreamedImages`.
        classes: Names.
        limit: Only so many of them. Default: all.

    Raises:
        DataError: If there is no such shard, it holds no images, or WebDataset is not installed.
    """

    def __init__(self, shards: str, classes: Sequence[str], limit: int | None = None) -> None:
        self.classes = tuple(classes)
        self.palette = distinct_colours(len(classes))
        self._decoder = _decoder(classes)
        self._stored: list[tuple[Path, Path, Any]] = []
        for stored in _read(expand_shards(shards)):
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
        return as_sample(*self._decoder(*self._stored[self._position(index)]))


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


def _decoder(classes: Sequence[str]) -> PairDecoder:
    values = {k: k for k in range(len(classes))} | {IGNORE_INDEX: IGNORE_INDEX}
    expected = f"0..{len(classes) - 1} for the classes and {IGNORE_INDEX} for void"
    return PairDecoder("shards", values, expected)


def _read(shards: Sequence[str]) -> Iterator[tuple[Path, Path, Any]]:
    """Names of image and label, and their contents, of all samples of shards, in order."""
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found = 0
    for shard in shards:
        try:
            with gopen(shard) as stream:
                files = tar_file_expander([{"url": shard, "stream": stream}])
                for sample in group_by_keys(files):
                    yield _pair(shard, sample)
                    found += 1
        except (OSError, ValueError, tarfile.TarError) as error:
            raise DataError(f"shards: cannot read {shard}: {error}") from error
    if not found:
        raise DataError(f"shards: no images in {', '.join(shards)}")


def _pair(shard: str, sample: dict[str, Any]) -> tuple[Path, Path, Any]:
    name = f"{shard}/{sample['__key__']}"
    image = next((ending for ending in _IMAGES if ending in sample), None)
    if image is None or _LABEL not in sample:
        raise DataError(f"shards: {name} needs an image ({', '.join(_IMAGES)}) and a {_LABEL}")
    return Path(f"{name}.{image}"), Path(f"{name}.{_LABEL}"), (sample[image], sample[_LABEL])
