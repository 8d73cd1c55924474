"""Other ways to choose what is computed, in place of the pixel gate: the baselines.

They sit at the same sites, with the same bypasses, training and counting; `RetrofitConfig.policy`
names them. What they cost themselves (an average, noise) holds no convolution and counts nothing.
"""

from __future__ import annotations

import functools
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pag_retrofit.functional import sample_mask
from pag_retrofit.gates import PixelGate

if TYPE_CHECKING:
    from pag_retrofit.sites import Site

_GRID_DOUBLINGS = 3  # the order of a grid's pixels repeats every 2^3 rows and columns
_PACE = 5.0  # a bias alone has to move as fast as the weights of a pixel gate together
_ALWAYS = 1e9  # a logit that no offset changes the sign of


class LayerGate(PixelGate):
    """One decision per image and site: compute all of its pixels, or none.

    The logit is linear in the input's mean over pixels, as in networks that skip layers
    (Veit & Belongie, ECCV 2018); the decision is drawn in training as a pixel's is.
    """

    def logits(self, x: Tensor) -> Tensor:
        """One per image, (B, 1, 1, 1) seen as (B, 1, h, w)."""
        mean = x.float().mean((2, 3), keepdim=True)
        logit = (mean * self.weight * self.scale).sum(1, keepdim=True) + self.bias
        return logit.expand(-1, 1, x.shape[2], x.shape[3])

    def sample(self, logits: Tensor) -> Tensor:
        """Draw once per image."""
        return sample_mask(logits[:, :, :1, :1], self.temperature).expand_as(logits)


class InputFreeGate(PixelGate):
    """A gate that does not look at its input."""

    def __init__(self, *arguments: Any, **keywords: Any):
        """Build it, without weights for the input's channels."""
        super().__init__(*arguments, **keywords)
        del self.weight
        with torch.no_grad():
            self.bias.div_(_PACE)

    def logits(self, x: Tensor) -> Tensor:
        """The same at every pixel, (B, 1, h, w)."""
        logit = self.bias.float() * _PACE
        return logit.view(1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])

    def standing_mask(self, shape: tuple[int, int, int, int]) -> Tensor:
        """The mask (B, 1, h, w) of evaluation, for any input."""
        return self.decide(self.logits(torch.empty(shape, device="meta")) + self.shift)

    def decided(self, probability: Tensor) -> Tensor:
        """The mask of that rate: how many halos it needs depends on how it is scattered."""
        return self.decide(torch.logit(probability))

    def extra_repr(self) -> str:
        """Show the stride."""
        return f"stride={self.cost.stride}"


class RandomGate(InputFreeGate):
    """Random perforation: pixels are computed at random, at a rate that each site learns.

    Drawn anew for every image in training; in evaluation one draw per site serves all images.
    The rate is the sigmoid of the logit, whatever the temperature.
    """

    def decide(self, logits: Tensor) -> Tensor:
        """Compare with the site's noise."""
        noise = _logistic_noise(self.site, logits.shape[2], logits.shape[3])
        return (logits + noise.to(logits.device) >= 0).float()

    def probability(self, logits: Tensor) -> Tensor:
        """The rate."""
        return torch.sigmoid(logits)

    def sample(self, logits: Tensor) -> Tensor:
        """Draw with noise of constant strength: noise is all that tells pixels apart."""
        return sample_mask(logits)


class GridGate(InputFreeGate):
    """Grid perforation: pixels are computed on a regular grid, at a rate that each site learns.

    Pixels open in the order of an 8x8 dither matrix (Bayer 1973): a rate of 1/4 opens every second
    pixel of every second row (as in PerforatedCNNs, Figurnov et al., NeurIPS 2016). The
    gradient is that of the rate.
    """

    def decide(self, logits: Tensor) -> Tensor:
        """Compare with the grid's order."""
        order = _grid_order(logits.shape[2], logits.shape[3]).to(logits.device)
        return (torch.sigmoid(logits) > order).float()

    def probability(self, logits: Tensor) -> Tensor:
        """The rate."""
        return torch.sigmoid(logits)

    def sample(self, logits: Tensor) -> Tensor:
        """The grid of evaluation, with a gradient."""
        rate = torch.sigmoid(logits)
        return self.decide(logits) + (rate - rate.detach())


class FixedGate(InputFreeGate):
    """Truncation: the site is computed at all pixels, or has been dropped for good."""

    kept: Tensor

    def __init__(self, *arguments: Any, **keywords: Any):
        """Keep the site."""
        super().__init__(*arguments, **keywords)
        del self.bias
        self.register_buffer("kept", torch.ones(()))

    def logits(self, x: Tensor) -> Tensor:
        """Far above or far below zero."""
        logit = (2 * self.kept - 1) * _ALWAYS
        return logit.view(1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])

    def probability(self, logits: Tensor) -> Tensor:
        """0 or 1."""
        return self.decide(logits)

    def sample(self, logits: Tensor) -> Tensor:
        """Nothing to draw."""
        return self.decide(logits)


GATES: dict[str, type[PixelGate]] = {
    "pixel": PixelGate,
    "layer": LayerGate,
    "random": RandomGate,
    "grid": GridGate,
    "truncation": FixedGate,
}
"""Policy -> class of its gates."""


def truncated(sites: Sequence[Site], total_macs: int, budget: float) -> list[str]:
    """Which sites truncation drops: the last ones of each stage.

    A stage is a run of sites of one part of the network (such as `encoder`) whose outputs have
    one size. Residual branches leave their shortcut, larger convolutions outside of them become
    1x1; what only a coarse bypass can stand in for stays. One site at a time goes, the last one
    left of the stage that has kept the largest share of its MACs, until the compute fraction is as
    close to the budget as it gets.

    Args:
        sites: Of a plan, in order.
        total_macs: Of the network.
        budget: Compute fraction wanted.

    Returns:
        Names, in the order in which they are dropped.
    """
    stages: dict[tuple[str, tuple[int, int]], list[Site]] = defaultdict(list)
    for site in sites:
        if site.bypass == "coarse":
            continue
        stages[site.owner.split(".")[0], site.output_size].append(site)
    whole = {key: sum(site.macs for site in stage) for key, stage in stages.items()}
    dropped: list[str] = []
    excess = (1 - budget) * total_macs  # still to be saved
    while stages:
        kept = {key: sum(site.macs for site in stage) / whole[key] for key, stage in stages.items()}
        key = max(reversed(stages), key=lambda key: kept[key])  # of equal ones the deepest
        site = stages[key].pop()
        if not stages[key]:
            del stages[key]
        saved = site.macs - site.floor_macs
        if abs(excess - saved) >= abs(excess):
            break
        dropped.append(site.name)
        excess -= saved
    return dropped


@functools.lru_cache(maxsize=512)
def _logistic_noise(site: str, height: int, width: int) -> Tensor:
    with unset_fake_temporarily():  # what is kept has to hold values
        generator = torch.Generator().manual_seed(zlib.crc32(site.encode()))
        uniform = torch.rand(1, 1, height, width, generator=generator)
        return torch.logit(uniform, eps=1e-6)


@functools.lru_cache(maxsize=512)
def _grid_order(height: int, width: int) -> Tensor:
    """At which rate each pixel opens, in (0, 1), (1, 1, h, w)."""
    with unset_fake_temporarily():  # what is kept has to hold values
        order = torch.zeros(1, 1)
        for _ in range(_GRID_DOUBLINGS):
            rows = (
                torch.cat((4 * order, 4 * order + 2), 1),
                torch.cat((4 * order + 3, 4 * order + 1), 1),
            )
            order = torch.cat(rows)
        side = len(order)
        tiled = order.repeat(-(-height // side), -(-width // side))[:height, :width]
        return (tiled[None, None] + 0.5) / side**2
