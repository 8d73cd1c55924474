"""What a gated site costs, in multiply-accumulates (MACs; 1 MAC = 2 FLOPs)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pag_retrofit.functional import Window, needed_inputs

Size = tuple[int, int]


@dataclass(frozen=True)
class GatedOperation:
    """One convolution or linear layer whose pixels are computed on demand.

    Args:
        name: Module path in the network.
        macs: MACs per output pixel.
        paths: Ways from the site's output back to this operation's output, each the windows
            met on the way; pixels are needed where any of them needs one (the halo).
    """

    name: str
    macs: int
    paths: tuple[tuple[Window, ...], ...] = ((),)


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
    """

    operations: tuple[GatedOperation, ...]
    gate_macs: int
    bypass_macs: int = 0
    stride: Size = (1, 1)
    offset: Size = (0, 0)
    coarse: bool = False

    @property
    def halo(self) -> int:
        """Largest distance in pixels, at the site's output, that a mask grows inside the site."""
        reaches = [
            sum((w.kernel[0] - 1) * w.dilation[0] // 2 for w in path)
            for operation in self.operations
            for path in operation.paths
        ]
        return max(reaches, default=0)

    def operation_masks(self, mask: Tensor, input_size: Size) -> list[Tensor]:
        """Pixels of each operation's output that `mask` (B, 1, h, w) needs, hard or soft."""
        if self.coarse:
            mask = torch.maximum(mask, _coarse_grid(mask))
        return [
            torch.stack([self._walk(mask, path, input_size) for path in operation.paths]).amax(0)
            if len(operation.paths) > 1
            else self._walk(mask, operation.paths[0], input_size)
            for operation in self.operations
        ]

    def active_macs(self, mask: Tensor, input_size: Size) -> Tensor:
        """MACs of the site under a mask (B, 1, h, w): operations, gate and bypass. Shape (B,)."""
        pixels = mask.shape[2] * mask.shape[3]
        total = self.gate_macs * pixels + self.bypass_macs * (1 - mask).sum((1, 2, 3))
        needed = self.operation_masks(mask, input_size)
        for operation, pixels_needed in zip(self.operations, needed, strict=True):
            total = total + operation.macs * pixels_needed.sum((1, 2, 3))
        return total

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
        return always + math.prod(output_size) * (self.gate_macs + self.bypass_macs)

    def gate_macs_total(self, output_size: Size) -> int:
        """MACs per image of the gate alone."""
        return self.gate_macs * math.prod(output_size)

    def _inner_sizes(self, path: tuple[Window, ...], input_size: Size) -> list[Size]:
        """Sizes of the maps met on a path back from the site's output; strided maps round up."""
        stride, sizes = self.stride, []
        for window in path:
            stride = (stride[0] // window.stride[0], stride[1] // window.stride[1])
            sizes.append(_ceil_div(input_size, stride))
        return sizes

    def _walk(self, mask: Tensor, path: tuple[Window, ...], input_size: Size) -> Tensor:
        for window, size in zip(path, self._inner_sizes(path, input_size), strict=True):
            mask = needed_inputs(mask, window, size)
        return mask


def _coarse_grid(mask: Tensor) -> Tensor:
    grid = torch.zeros_like(mask)
    grid[:, :, ::2, ::2] = 1
    return grid


def _ceil_div(size: Size, stride: Size) -> Size:
    return (-(-size[0] // stride[0]), -(-size[1] // stride[1]))
