"""Scoring a network, gated or not, on a data set."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pag_retrofit.building import (
    WITHOUT_WEIGHTS,
    build_network,
    build_task,
    evaluation_data,
    load_weights,
    read_metadata,
)
from pag_retrofit.calibration import set_budget
from pag_retrofit.data.base import collate
from pag_retrofit.errors import DataError
from pag_retrofit.gates import state_of
from pag_retrofit.io import (
    CONFIG_NAME,
    METADATA_KEY,
    WEIGHTS_NAME,
    from_pretrained,
    load_file,
)
from pag_retrofit.measurement import Measurement, measure
from pag_retrofit.recipe import ModelSection, Recipe
from pag_retrofit.tasks import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        metrics: scores by name, as the task gives them.
        images: number of images.
        seconds: time taken, loading included.
        fraction: measured compute fraction; 1 for an ungated network, more for one whose branches
            are averaged.
        open_rates: share of open pixels by gate; empty for an ungated network.
        time_fraction: time told from what is computed, as a fraction of that without gates; only
            for networks whose budget is in time.
    """

    metrics: dict[str, Any]
    images: int
    seconds: float
    fraction: float = 1.0
    open_rates: dict[str, float] = field(default_factory=dict)
    time_fraction: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            **self.metrics,
            "fraction": self.fraction,
            "images": self.images,
            "seconds": round(self.seconds, 2),
            "open_rates": self.open_rates,
            **({} if self.time_fraction is None else {"time_fraction": self.time_fraction}),
        }


def evaluate_file(path: Path, recipe: Recipe, *, budget: float | None = None) -> Evaluation:
    """Scores saved weights on the validation images of a recipe.

    Args:
        path: a safetensors file or a folder: a gated network, or weights of the recipe's ungated
            one.
        recipe: gives the data, the task and, for ungated weights, the network.
        budget: operating point to set on a gated network; its active one if not given.

    Raises:
        CheckpointError: the file cannot be read or does not fit the network.
        BudgetError: the network is not calibrated for the budget.
        PagError: a budget was given for an ungated network.
    """
    from accelerate import Accelerator

    from pag_retrofit.processes import process_state

    process_state()
    network = load_network(path, recipe.model)
    if budget is not None:
        set_budget(network, budget)
    accelerator = Accelerator()
    data = evaluation_data(recipe)
    section = recipe.data
    loader = DataLoader(
        data,
        batch_size=section.eval_batch_size,
        collate_fn=collate,
        num_workers=section.workers,
    )
    return evaluate_network(
        network.to(accelerator.device),
        accelerator.prepare(loader),
        build_task(recipe, data),
        accelerator=accelerator,
        channels_last=recipe.runtime.channels_last,
    )


def load_network(path: Path, section: ModelSection) -> nn.Module:
    """Loads a gated network, or weights of the ungated network that a section describes.

    Args:
        path: what `save_pretrained` or `save_file` wrote, the folder of a stage, or a safetensors
            file with weights.
        section: builds the network if the weights are ungated; if it saw smaller inputs, it does.

    Raises:
        CheckpointError: the file cannot be read or does not fit the network.
    """
    if (path / CONFIG_NAME).is_file():
        return from_pretrained(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if METADATA_KEY in read_metadata(file):
        return load_file(file)
    network = build_network(section.model_copy(update=WITHOUT_WEIGHTS))
    load_weights(network, file)
    return network


def is_gated(network: nn.Module) -> bool:
    """Whether a network came out of `retrofit`."""
    return hasattr(network, "pag_state")


def is_timed(network: nn.Module) -> bool:
    """Whether a network is gated and its budget is in time."""
    return is_gated(network) and state_of(network).times is not None


@torch.no_grad()
def evaluate_network(
    network: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    task: Task,
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

    Raises:
        DataError: no image has a pixel that could be scored.
    """
    started = time.perf_counter()
    modes = {module: module.training for module in network.modules()}
    network.eval()
    counts: Tensor | None = None
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
                values = _shares_of_images(measured).to(image.device)
                shares.add(list(measured.masks), _gather(values, accelerator))
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
    metrics = task.metrics(counts)
    unknown = [k for k, value in metrics.items() if isinstance(value, float) and math.isnan(value)]
    if unknown and bool(counts.isfinite().all()):  # else the network's output is not
        raise DataError(
            f"{', '.join(unknown)} cannot be told: none of the {images} images has a pixel with a "
            "reading; look at the targets that the data section of the recipe names"
        )
    fraction, time_fraction, open_rates = shares.means()
    before = float(getattr(network, "pag_compute_fraction", 1.0))  # such as of a smaller input
    return Evaluation(
        metrics=metrics,
        images=images,
        seconds=time.perf_counter() - started,
        fraction=before * fraction,
        open_rates=open_rates,
        time_fraction=before * time_fraction if is_timed(network) else None,
    )


class _Shares:
    """Sums the compute fraction and the open rates over images."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, names: list[str], values: Tensor) -> None:
        """Adds rows of (fraction, time fraction, open rate of each gate), one per image."""
        self._names = names
        total = values.sum(0).cpu()
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(values)

    def means(self) -> tuple[float, float, dict[str, float]]:
        """Mean fraction, mean time fraction, and mean open rate by gate."""
        if self._sum is None:
            return 1.0, 1.0, {}
        fraction, time_fraction, *rates = (self._sum / self._count).tolist()
        return fraction, time_fraction, dict(zip(self._names, rates, strict=True))


def _shares_of_images(measured: Measurement) -> Tensor:
    """Fraction, time fraction and open rates of a single pass, (B, 2 + gates) float64.

    Without times the second is that of the compute.
    """
    fractions = measured.image_macs * measured.images / measured.total_macs  # (B,)
    times = fractions if measured.time_fractions is None else measured.time_fractions
    rates = [mask.double().mean((1, 2, 3)) for mask in measured.masks.values()]
    return torch.stack([fractions, times, *rates], dim=1)


def _gather(values: Tensor, accelerator: Accelerator | None) -> Tensor:
    return values if accelerator is None else accelerator.gather_for_metrics(values)
