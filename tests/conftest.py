"""Fixtures: each tiny network, plain and gated, built once for all tests that look at it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from networks import NETWORKS, Tiny, randomize
from torch import Tensor, nn

import pag_retrofit as pag

settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: collections, which deployments ask for, pass it by


@dataclass(frozen=True)
class Pair:
    """A network and its gated copy, in evaluation mode; copy before changing either."""

    tiny: Tiny
    original: nn.Module
    snapshot: nn.Module  # of the original, before it was retrofitted
    gated: nn.Module
    plan: pag.Plan
    x: Tensor

    def other(self) -> Tensor:
        return torch.randn(1, 3, *self.tiny.other_size)

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.gated)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(tiny, id=tiny.name, marks=[pytest.mark.sweep] if tiny.sweep else [])
        for tiny in NETWORKS
    ],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    tiny: Tiny = request.param
    torch.manual_seed(0)
    original = randomize(tiny.build()).eval()
    snapshot = copy.deepcopy(original)
    gated = pag.retrofit(original, 0.99, example_input=tiny.shape)
    plan = pag.plan(original, 0.99, example_input=tiny.shape)
    return Pair(tiny, original, snapshot, gated, plan, torch.randn(tiny.shape))
