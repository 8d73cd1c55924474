"""What a gated site costs, in multiply-accumulates (MACs; 1 MAC = 2 FLOPs)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pag_retrofit.functional import Window, needed_inputs

Size = tuple[int, int]
Choices = Mapping[str, Tensor]
_NO_CHOICES: Choices = MappingProxyType({})


@dataclass(frozen=True)
class GatedOperation:
    """One convolution or linear layer whose pixels are computed on demand.

    Args:
        name: Module path in the network.
        macs: MACs per output pixel.
        paths: Ways from the site's output back to this operation's output, each the windows
            met on the way; pixels are needed where any of them needs one (the halo).
        selector: Name of the selector that has a say in where it is computed, if one has.
        branches: It is computed where that selector chose one of these.
    """

    name: str
    macs: int
    paths: tuple[tuple[Window, ...], ...] = ((),)
    selector: str = ""
    branches: tuple[int, ...] = ()


@dataclass(frozen=True)
class SelectorSpec:
    """Shape of a branch selector, and what its choices mean.

    Args:
        channels: Of its input.
        width: Channels of its two hidden maps.
        factors: Per branch: how often the convolution's own dilation, 0 for the identity or a 1x1
            kernel; -1 for all branches of an ASPP at once.
        start: Index of the branch that a new selector chooses everywhere.
        closed: Index of the cheapest branch.
        priced: Per branch, whether calibration moves its logit: those that cost more.
    """

    channels: int
    width: int
    factors: tuple[int, ...]
    start: int
    closed: int
    priced: tuple[bool, ...]

    @property
    def reduce_macs(self) -> int:
        """MACs of its first layer, per pixel."""
        return self.channels * self.width

    @property
    def choose_macs(self) -> int:
        """MACs of its later layers, per pixel."""
        return self.width * (9 * self.width + len(self.factors))


@dataclass(frozen=True)
class SiteCost:
    """Cost model of one site.

    Args:
        operations: What the gate saves.
        gate_macs: Of the gate, per output pixel of the site.
        bypass_macs: Per closed output pixel.
        stride: From the site's input to its output, (vertical, horizontal).
        offset: Input pixel at the centre of the first output pixel's window.
        coarse: Every second pixel of every second row is computed even if it is closed.
        added: Operations that the original network does not have: more branches, and selectors
            inside a gated branch.
        selector: Name of the selector that decides instead of a gate; the mask is then all ones
            and `gate_macs` are the selector's.
    """

    operations: tuple[GatedOperation, ...]
    gate_macs: int
    bypass_macs: int = 0
    stride: Size = (1, 1)
    offset: Size = (0, 0)
    coarse: bool = False
    added: tuple[GatedOperation, ...] = ()
    selector: str = ""

    @property
    def halo(self) -> int:
        """Largest distance in pixels, at the site's output, that a mask grows inside the site."""
        reaches = [
            sum((w.kernel[0] - 1) * w.dilation[0] * max(w.factors, default=1) // 2 for w in path)
            for operation in self.operations
            for path in operation.paths
        ]
        return max(reaches, default=0)

    def operation_masks(
        self, mask: Tensor, input_size: Size, choices: Choices = _NO_CHOICES
    ) -> list[Tensor]:
        """Pixels of each operation's output that `mask` (B, 1, h, w) needs, hard or soft.

        Args:
            mask: Of the site's gate.
            input_size: (H, W) of the site's input.
            choices: Selector -> (B, K, h, w), one-hot or probabilities.
        """
        return [self._needed(operation, mask, input_size, choices) for operation in self.operations]

    def charges(
        self, mask: Tensor, input_size: Size, choices: Choices = _NO_CHOICES
    ) -> list[tuple[int, Tensor]]:
        """MACs per pixel, and at which pixels (B, 1, h, w), of all that the site computes.

        The gate, the bypass, and each operation; arguments as in `operation_masks`.
        """
        return [
            (self.gate_macs, torch.ones_like(mask)),
            (self.bypass_macs, 1 - mask),
            *(
                (operation.macs, self._needed(operation, mask, input_size, choices))
                for operation in self.operations + self.added
            ),
        ]

    def active_macs(self, mask: Tensor, input_size: Size, choices: Choices = _NO_CHOICES) -> Tensor:
        """MACs of the site under a mask (B, 1, h, w), all `charges` together. Shape (B,)."""
        totals = [
            macs * pixels.sum((1, 2, 3)) for macs, pixels in self.charges(mask, input_size, choices)
        ]
        return torch.stack(totals).sum(0)

    def full_macs(self, input_size: Size, output_size: Size) -> int:
        """MACs per image of the operations in the original network, all pixels computed."""
        return sum(
            operation.macs
            * math.prod([output_size, *self._inner_sizes(operation.paths[0], input_size)][-1])
            for operation in self.operations
        )

    def floor_macs(self, output_size: Size) -> int:
        """MACs per image with every pixel closed."""
        always = 0
        if self.coarse:
            grid = math.prod(_ceil_div(output_size, (2, 2)))
            always = grid * sum(operation.macs for operation in self.operations)
        cheapest = min(self.branch_costs().values(), default=0)
        return always + math.prod(output_size) * (self.gate_macs + self.bypass_macs + cheapest)

    def gate_macs_total(self, output_size: Size) -> int:
        """MACs per image of the gate alone."""
        return self.gate_macs * math.prod(output_size)

    def branch_costs(self) -> dict[int, int]:
        """Branch -> MACs per pixel that chose it, if the site has a selector instead of a gate."""
        costs: dict[int, int] = {}
        for operation in self.operations + self.added:
            for branch in operation.branches if self.selector else ():
                costs[branch] = costs.get(branch, 0) + operation.macs
        return costs

    def _inner_sizes(self, path: tuple[Window, ...], input_size: Size) -> list[Size]:
        """Sizes of the maps met on a path back from the site's output; strided maps round up."""
        stride, sizes = self.stride, []
        for window in path:
            stride = (stride[0] // window.stride[0], stride[1] // window.stride[1])
            sizes.append(_ceil_div(input_size, stride))
        return sizes

    def _needed(
        self, operation: GatedOperation, mask: Tensor, input_size: Size, choices: Choices
    ) -> Tensor:
        if self.coarse:
            mask = torch.maximum(mask, _coarse_grid(mask))
        walked = [self._walk(mask, path, input_size, choices) for path in operation.paths]
        needed = torch.stack(walked).amax(0) if len(walked) > 1 else walked[0]
        if operation.selector:
            chosen = choices[operation.selector][:, list(operation.branches)]
            needed = needed * chosen.sum(1, keepdim=True)
        return needed

    def _walk(
        self, mask: Tensor, path: tuple[Window, ...], input_size: Size, choices: Choices
    ) -> Tensor:
        for window, size in zip(path, self._inner_sizes(path, input_size), strict=True):
            mask = needed_inputs(mask, window, size, choices)
        return mask


def _coarse_grid(mask: Tensor) -> Tensor:
    grid = torch.zeros_like(mask)
    grid[:, :, ::2, ::2] = 1
    return grid


def _ceil_div(size: Size, stride: Size) -> Size:
    return (-(-size[0] // stride[0]), -(-size[1] // stride[1]))
