"""Smaller inputs: the simplest way to save compute, a baseline and an ally of gates."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pag_retrofit.errors import BudgetError, PagError
from pag_retrofit.tracing import MacCounter, example_tensor, in_mode

logger = logging.getLogger(__name__)

_FAR_OFF = 0.1
"""Of the share of the pixels: then the size's multiple is too coarse, which is told."""
_DISTORTION = 0.5  # how much a change of proportions counts, next to a change of area


class ResizedInput(nn.Module):
    """What is mixed into the class of a network that sees a smaller input.

    Attributes:
        pag_resized: Share of the pixels that it sees, and what its input's sizes are multiples of.
    """

    pag_resized: tuple[float, int]
    pag_compute_fraction: float

    def resizing(self) -> dict[str, Any]:
        """What `see_smaller` takes."""
        share, multiple = self.pag_resized
        return {"share": share, "multiple": multiple, "fraction": self.pag_compute_fraction}

    def forward(self, image: Tensor) -> Tensor:
        """Shrink the image, run the network, and enlarge its output, if it is a map."""
        size = (image.shape[2], image.shape[3])
        smaller = smaller_size(size, *self.pag_resized)
        shrunk = F.interpolate(image, smaller, mode="bilinear", antialias=True)
        output: Tensor = super().forward(shrunk)
        return F.interpolate(output, size, mode="bilinear") if output.dim() == 4 else output


def resize_input(
    network: nn.Module, share: float, *, example_input: Tensor | tuple[int, ...], multiple: int = 32
) -> nn.Module:
    """Let a network see a smaller input, and enlarge its output, in place.

    Both by bilinear interpolation. Weights keep their names; the network's class becomes one
    derived from it. Its attribute `pag_compute_fraction` holds the MACs on the smaller input over
    those on the example. `retrofit` may gate the result: its budget counts from what is left, so
    that the fraction of the whole is the product of both. Saved with the gates, and deployed. A
    share that multiples come nowhere near is logged as a warning.

    Args:
        network: It takes an image (B, C, H, W) and gives a map (B, C, h, w), or scores (B, C)
            that are left as they are. Not gated yet.
        share: Of the pixels, in (0, 1]; MACs of a fully convolutional network follow it.
        example_input: Tensor (B, C, H, W), or its shape.
        multiple: Of which the smaller sizes are. Default 32.

    Returns:
        The same object.

    Raises:
        BudgetError: The share is not in (0, 1].
        PagError: The network sees smaller inputs already, or is gated; or the multiple is larger
            than the example.
    """
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise BudgetError(f"share={share!r}: expected a fraction of the pixels in (0, 1]")
    if isinstance(network, ResizedInput):
        raise PagError(f"{type(network).__name__} sees smaller inputs already: pass the original")
    if hasattr(network, "pag_state"):
        raise PagError(f"{type(network).__name__} is gated: resize its input first, then retrofit")
    example = example_tensor(network, example_input)
    if not isinstance(multiple, int) or not 1 <= multiple <= min(example.shape[2:]):
        raise PagError(
            f"multiple={multiple!r}: expected an integer from 1 to the sides of the example, "
            f"{tuple(example.shape[2:])}"
        )
    whole = _macs(network, example)
    see_smaller(network, share=share, multiple=multiple, fraction=1.0)
    try:
        network.__dict__["pag_compute_fraction"] = _macs(network, example) / whole
    except Exception:
        restore_input(network)
        raise
    size = (example.shape[2], example.shape[3])
    smaller = smaller_size(size, share, multiple)
    seen = math.prod(smaller) / math.prod(size)
    if abs(seen - share) > _FAR_OFF:
        logger.warning(
            "of %dx%d pixels the network sees %dx%d, %.2f of them instead of %.2f: sizes are "
            "multiples of %d; take larger images, or a smaller multiple if the network allows it",
            *(*size, *smaller, seen, share, multiple),
        )
    return network


def see_smaller(network: nn.Module, *, share: float, multiple: int, fraction: float) -> None:
    """Let a network see what another one of its kind did after `resize_input`, in place."""
    network.__class__ = _resized_class(type(network))  # type: ignore[arg-type]
    network.__dict__["pag_resized"] = (share, multiple)
    network.__dict__["pag_compute_fraction"] = fraction


def restore_input(network: nn.Module) -> nn.Module:
    """Undo `resize_input`, in place; other networks are left as they are."""
    if isinstance(network, ResizedInput):
        network.__class__ = type(network).__mro__[2]
        for name in ("pag_resized", "pag_compute_fraction"):
            network.__dict__.pop(name, None)
    return network


def smaller_size(size: tuple[int, int], share: float, multiple: int) -> tuple[int, int]:
    """The size whose area and proportions come closest to those wanted.

    Args:
        size: (H, W).
        share: Of the area.
        multiple: Of which both sides of the result are.
    """
    choices = []
    for side in size:
        exact = side * math.sqrt(share) / multiple
        choices.append({multiple * max(1, round_(exact)) for round_ in (math.floor, math.ceil)})

    def badness(candidate: tuple[int, int]) -> float:
        factors = [new / old for new, old in zip(candidate, size, strict=True)]
        area = abs(math.log(factors[0] * factors[1] / share))
        return area + _DISTORTION * abs(math.log(factors[0] / factors[1]))

    candidates = ((height, width) for height, width in itertools.product(*choices))
    return min(candidates, key=badness)


@functools.cache
def _resized_class(original: type) -> type:
    name = f"Resized{original.__name__}"
    return type(name, (ResizedInput, original), {"__module__": original.__module__})


@torch.no_grad()
def _macs(network: nn.Module, example: Tensor) -> int:
    with in_mode(network), MacCounter() as counter:
        network(example)
    return counter.macs
