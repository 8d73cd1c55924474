"""Where a value of a deployed network is needed: sets of pixels, written down before any is known.

A demand is an expression over masks. It is made once, when a network is lowered, and evaluated in
each forward pass, when gates have decided; equal demands are evaluated once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pag_retrofit import kernels
from pag_retrofit.functional import Window

Size = tuple[int, int]


class Demand:
    """A set of pixels of a map."""


@dataclass(frozen=True)
class Everywhere(Demand):
    """All pixels."""


@dataclass(frozen=True)
class Masked(Demand):
    """Pixels where a mask is open, or where it is closed.

    Args:
        mask: Name of the value that holds it, (B, 1, h, w); zero is closed.
        wanted: True for the open ones.
    """

    mask: str
    wanted: bool = True


@dataclass(frozen=True)
class Grid(Demand):
    """Every second pixel of every second row, or all others.

    Args:
        mask: Name of a mask of the map's size.
        wanted: False for the others.
    """

    mask: str
    wanted: bool = True


@dataclass(frozen=True)
class Both(Demand):
    """Pixels in both of two sets."""

    first: Demand
    second: Demand


@dataclass(frozen=True)
class Either(Demand):
    """Pixels in at least one of two sets."""

    first: Demand
    second: Demand


@dataclass(frozen=True)
class Outside(Demand):
    """Pixels that are not in a set."""

    of: Demand


@dataclass(frozen=True)
class Read(Demand):
    """Pixels that a convolution reads to compute those of a set.

    Args:
        by: The output pixels.
        window: Of the convolution.
        size: (H, W) of the map that it reads.
        upsampling: Of that map, before it is read.
    """

    by: Demand
    window: Window
    size: Size
    upsampling: int = 1


EVERYWHERE = Everywhere()


def both(first: Demand, second: Demand) -> Demand:
    """The intersection, simplified."""
    if first == EVERYWHERE or first == second:
        return second
    return first if second == EVERYWHERE else Both(first, second)


def either(first: Demand, second: Demand) -> Demand:
    """The union, simplified."""
    terms: list[Demand] = []
    for term in (*_terms(first), *_terms(second)):
        if not any(_lies_in(term, other) for other in terms):
            terms = [other for other in terms if not _lies_in(other, term)] + [term]
    if any(_complement(term) in terms for term in terms):
        return EVERYWHERE
    return functools.reduce(Either, terms)


def _complement(demand: Demand) -> Demand | None:
    """All other pixels, if that is as simple a set."""
    if isinstance(demand, Masked | Grid):
        return replace(demand, wanted=not demand.wanted)
    return None


def _terms(demand: Demand) -> Iterator[Demand]:
    """The sets of a union."""
    if isinstance(demand, Either):
        yield from _terms(demand.first)
        yield from _terms(demand.second)
    else:
        yield demand


def _lies_in(part: Demand, whole: Demand) -> bool:
    """Whether the form of two sets of pixels of one map tells that one lies in the other."""
    if whole in (EVERYWHERE, part):
        return True
    if isinstance(part, Both):
        return whole in (part.first, part.second)
    if not (isinstance(part, Read) and isinstance(whole, Grid) and whole.wanted):
        return False
    window = part.window
    even = not any(step % 2 for step in (*window.stride, *window.padding))
    return even and window.kernel == (1, 1) and part.upsampling == 1


def read(by: Demand, window: Window, size: Size, upsampling: int = 1) -> Demand:
    """The pixels a convolution reads, simplified."""
    if by == EVERYWHERE:
        return EVERYWHERE  # a stride may skip pixels; to find out which costs more than it saves
    pointwise = window.kernel == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0)
    return by if pointwise and upsampling == 1 else Read(by, window, size, upsampling)


class Demands:
    """Evaluates demands in one forward pass.

    Args:
        values: Name -> tensor; masks are looked up here.
    """

    def __init__(self, values: Mapping[str, Any]):
        """Nothing is evaluated yet."""
        self.values = values
        self._maps: dict[Demand, Tensor] = {}
        self._lists: dict[Demand, kernels.PixelList] = {}

    def listed(self, demand: Demand) -> kernels.PixelList | None:
        """The pixels as a list; None for all."""
        if demand == EVERYWHERE:
            return None
        found = self._lists.get(demand)
        if found is None:
            closed = isinstance(demand, Outside)
            found = self._list(demand.of if isinstance(demand, Outside) else demand, closed)
            self._lists[demand] = found
        return found

    def _list(self, demand: Demand, closed: bool) -> kernels.PixelList:
        """The pixels, or the others; the map of a union or an intersection is not made."""
        if isinstance(demand, Masked):
            return kernels.list_pixels(self.values[demand.mask], closed=closed == demand.wanted)
        if isinstance(demand, Both | Either) and demand not in self._maps:
            first, second = self.map(demand.first), self.map(demand.second)
            operation = "and" if isinstance(demand, Both) else "or"
            return kernels.list_pixels(first, closed=closed, other=second, operation=operation)
        return kernels.list_pixels(self.map(demand), closed=closed)

    def map(self, demand: Demand) -> Tensor:
        """The pixels as a bool map (B, 1, h, w)."""
        found = self._maps.get(demand)
        if found is None:
            found = self._maps[demand] = _EVALUATIONS[type(demand)](self, demand)
        return found

    def _masked(self, demand: Masked) -> Tensor:
        mask: Tensor = self.values[demand.mask]
        if mask.dtype is not torch.bool:
            mask = kernels.is_open(mask)
        return mask if demand.wanted else kernels.combine(mask, None, "not")

    def _grid(self, demand: Grid) -> Tensor:
        mask: Tensor = self.values[demand.mask]
        grid = mask.new_full(mask.shape, not demand.wanted, dtype=torch.bool)
        grid[:, :, ::2, ::2] = demand.wanted
        return grid

    def _both(self, demand: Both) -> Tensor:
        return kernels.combine(self.map(demand.first), self.map(demand.second), "and")

    def _either(self, demand: Either) -> Tensor:
        return kernels.combine(self.map(demand.first), self.map(demand.second), "or")

    def _outside(self, demand: Outside) -> Tensor:
        return kernels.combine(self.map(demand.of), None, "not")

    def _read(self, demand: Read) -> Tensor:
        by = self.map(demand.by)
        return kernels.needed_inputs(by, demand.window, demand.size, demand.upsampling)


_EVALUATIONS: dict[type[Demand], Callable[[Demands, Any], Tensor]] = {
    Masked: Demands._masked,
    Grid: Demands._grid,
    Both: Demands._both,
    Either: Demands._either,
    Outside: Demands._outside,
    Read: Demands._read,
}
