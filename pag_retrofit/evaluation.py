"""Scoring a network, gated or not, on a data set."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pag_retrofit.measurement import measure
from pag_retrofit.tasks import SegmentationTask

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        metrics: scores by name, as the task gives them.
        images: number of images.
        seconds: time taken, loading included.
        fraction: measured compute fraction; 1 for an ungated network.
        open_rates: share of open pixels by gate; empty for an ungated network.
    """

    metrics: dict[str, Any]
    images: int
    seconds: float
    fraction: float = 1.0
    open_rates: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            **self.metrics,
            "fraction": self.fraction,
            "images": self.images,
            "seconds": round(self.seconds, 2),
            "open_rates": self.open_rates,
        }


def is_gated(network: nn.Module) -> bool:
    """Whether a network came out of `retrofit`."""
    return hasattr(network, "pag_state")


@torch.no_grad()
def evaluate_network(
    network: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    task: SegmentationTask,
    *,
    accelerator: Accelerator | None = None,
    channels_last: bool = False,
) -> Evaluation:
    """Scores a network in float32; its training mode is restored afterwards.

    Args:
        network: the network, on the device of the batches.
        batches: have `image` (B, 3, H, W) float32 and what the task needs. With an accelerator, a
            loader that it prepared.
        task: the task.
        accelerator: collects the counts of all processes; images that were repeated to even out
            the last batch count once.
        channels_last: memory layout of the images.
    """
    started = time.perf_counter()
    modes = {module: module.training for module in network.modules()}
    network.eval()
    counts: Tensor | None = None  # (num_classes, num_classes)
    shares = _Shares()
    images = 0
    try:
        for batch in batches:
            image = batch["image"]
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            if is_gated(network):
                with measure(network) as measured:
                    output = network(image)
                part = [measured.fraction, *measured.open_rates.values()]
                names = list(measured.open_rates)
                values = torch.tensor([part] * len(image), device=image.device)
                shares.add(names, _gather(values, accelerator))
            else:
                output = network(image)
            per_image = _gather(task.counts(output, batch), accelerator)
            images += len(per_image)
            counts = per_image.sum(0) + (0 if counts is None else counts)
    finally:
        for module, training in modes.items():
            module.training = training
    if counts is None:
        raise ValueError("batches is empty; there is nothing to evaluate")
    fraction, open_rates = shares.means()
    return Evaluation(
        metrics=task.metrics(counts),
        images=images,
        seconds=time.perf_counter() - started,
        fraction=fraction,
        open_rates=open_rates,
    )


class _Shares:
    """Sums the compute fraction and the open rates over images."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, names: list[str], values: Tensor) -> None:
        """Adds rows of (fraction, open rate of each gate), one per image."""
        self._names = names
        total = values.double().sum(0).cpu()
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(values)

    def means(self) -> tuple[float, dict[str, float]]:
        """Mean fraction, and mean open rate by gate."""
        if self._sum is None:
            return 1.0, {}
        fraction, *rates = (self._sum / self._count).tolist()
        return fraction, dict(zip(self._names, rates, strict=True))


def _gather(values: Tensor, accelerator: Accelerator | None) -> Tensor:
    return values if accelerator is None else accelerator.gather_for_metrics(values)
