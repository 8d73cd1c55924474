"""A 3x3 convolution of an upsampled map, computed on the small map.

Where a map is nearest-neighbour upsampled by two, the window of an output pixel sees 2x2 of its
pixels; which taps meet which of them depends on the *phase*: whether the row is even or odd, and
the column. Taps that read the same pixel can be added up beforehand. Four convolutions of 2x2 taps,
each at the pixels of one phase, give the same sums up to rounding, with 4/9 of the
multiply-accumulates (the sub-pixel convolution of Shi et al., CVPR 2016, read from right to left).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pag_retrofit.functional import Window

Phase = tuple[int, int]

POINTWISE = Window((1, 1), (1, 1), (1, 1), (0, 0))
WHOLE = Window((3, 3), (1, 1), (1, 1), (1, 1))
# Two taps of the upsampled map that lie two pixels apart, from the one before: in both phases they
# meet the two pixels of the small map.
OF_A_PHASE = Window((2, 2), (1, 1), (2, 2), (1, 1))


def phase_weights(weight: Tensor) -> Iterator[tuple[Phase, Tensor]]:
    """Each phase (of rows, of columns) and its weight (C', C, 2, 2).

    Args:
        weight: (C', C, 3, 3), of window `WHOLE`.
    """
    for row in (0, 1):
        for column in (0, 1):
            taps = _merged(_merged(weight.double(), 2, row), 3, column)
            yield (row, column), taps.to(weight.dtype)


def _merged(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Even pixels share their small pixel with the one after, odd ones with the one before."""
    before, here, after = weight.unbind(axis)
    pair = (before + here, after) if phase else (before, here + after)
    return torch.stack(pair, axis)
