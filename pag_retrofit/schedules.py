"""The order of the data and the learning rates: functions of seed, epoch and step alone.

Nothing here has a state that a resumed run would need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Sampler

from pag_retrofit.gates import gate_parameters
from pag_retrofit.recipe import GatedSection, Schedule

# Learning rates start at this share of their peak and end at the square of it, as a fraction.
_START_SHARE = 1 / 25
_END_SHARE = 1e-4


class EpochSampler(Sampler[int]):
    """A random order of a data set that depends on (seed, epoch) only."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of samples."""
        return self.size

    def __iter__(self) -> Iterator[int]:
        """Each index once."""
        generator = np.random.default_rng((self.seed, self.epoch))
        return iter(generator.permutation(self.size).tolist())


def one_cycle(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate in a one-cycle schedule (Smith & Topin, arXiv 1708.07120).

    Rises from 1/25 to 1 over the warmup, then falls along a cosine to 4e-6.

    Args:
        step: optimizer steps done, from 0.
        total: optimizer steps of the whole run.
        warmup: share of the steps in which it rises.
    """
    rise = warmup * total
    if step < rise:
        return _START_SHARE + (1 - _START_SHARE) * (1 - math.cos(math.pi * step / rise)) / 2
    fall = min(1.0, (step - rise) / max(1.0, total - 1 - rise))
    low = _START_SHARE * _END_SHARE
    return low + (1 - low) * (1 + math.cos(math.pi * fall)) / 2


def parameter_groups(network: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """Groups for the optimizer: encoder, gates and the rest, each with its peak learning rate."""
    gates = {id(parameter) for parameter in gate_parameters(network)}
    encoder = getattr(network, "encoder", None)
    inner = {id(p) for p in encoder.parameters()} if isinstance(encoder, nn.Module) else set()
    parameters = [p for p in network.parameters() if p.requires_grad]
    gate_lr = schedule.gate_lr if isinstance(schedule, GatedSection) else schedule.lr
    groups = [
        {
            "name": "encoder",
            "params": [p for p in parameters if id(p) in inner - gates],
            "peak_lr": schedule.encoder_lr or schedule.lr,
        },
        {
            "name": "rest",
            "params": [p for p in parameters if id(p) not in inner | gates],
            "peak_lr": schedule.lr,
        },
        # No decay: it would pull decided gates back to undecided ones.
        {
            "name": "gates",
            "params": [p for p in parameters if id(p) in gates],
            "peak_lr": gate_lr,
            "weight_decay": 0.0,
        },
    ]
    return [{**group, "lr": group["peak_lr"]} for group in groups if group["params"]]
