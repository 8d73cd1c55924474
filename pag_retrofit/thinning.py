"""Thinning of the cuts of a map (Guo and Hall 1989), eight at once.

Each pixel is a byte that holds a bit per cut, so that an operation on bytes decides for eight cuts.
The results are those of `skimage.morphology.thin`, which takes longer: it looks up each
neighbourhood of one cut in a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import and_, or_

import numpy as np

_AT_ONCE = 8  # bits of a byte


def thin_cuts(values: np.ndarray, heights: np.ndarray) -> Iterator[np.ndarray]:
    """For each height the pixels at least as high, thinned to lines one pixel wide.

    Args:
        values: (H, W).
        heights: (N,).

    Yields:
        (H, W) bool, as often as there are heights.
    """
    for start in range(0, len(heights), _AT_ONCE):
        group = heights[start : start + _AT_ONCE]
        padded = np.packbits(np.pad(values >= group[:, None, None], ((0, 0), (1, 1), (1, 1))), 0)[0]
        _thin(padded.ravel(), padded.shape[1])
        bits = np.unpackbits(padded[None, 1:-1, 1:-1], axis=0, count=len(group))
        yield from bits.view(bool)


def _thin(pixels: np.ndarray, stride: int) -> None:
    """Thin in place.

    Args:
        pixels: Bytes of all pixels, of a map with a border of zeros.
        stride: From one row to the next.
    """
    first, stop = stride + 1, len(pixels) - stride - 1
    inner = pixels[first:stop]
    # From the right counterclockwise: right, top right, top, .. bottom right.
    offsets = (1, 1 - stride, -stride, -stride - 1, -1, stride - 1, stride, stride + 1)
    around = [pixels[first + offset : stop + offset] for offset in offsets]
    before = None
    while before is None or not np.array_equal(inner, before):
        before = inner.copy()
        inner &= ~_removable(around)
        inner &= ~_removable(around[4:] + around[:4])  # from the left


def _removable(around: list[np.ndarray]) -> np.ndarray:
    """Where conditions G1, G2 and G3 of Guo and Hall hold, given the eight neighbours."""
    sides, corners = around[::2], around[1::2]
    after = [corner | side for corner, side in zip(corners, sides[1:] + sides[:1], strict=True)]
    before = [corner | side for corner, side in zip(corners, sides, strict=True)]
    components = [pair & ~side for pair, side in zip(after, sides, strict=True)]
    one_component = reduce(or_, components) & ~_at_least_two(components)
    # The smaller number of pairs is 2 or 3.
    edge = _at_least_two(after) & _at_least_two(before) & ~reduce(and_, after + before)
    return one_component & edge & ~(sides[0] & (after[0] | ~corners[3]))


def _at_least_two(maps: list[np.ndarray]) -> np.ndarray:
    """Where at least two of four hold."""
    first, second, third, fourth = maps
    return first & second | third & fourth | (first | second) & (third | fourth)
