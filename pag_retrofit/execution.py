"""The steps a deployed network takes, and the order in which it takes them.

Values are tensors by name, with the shapes they have in the network: a map is (B, C, H, W) with its
channels last in memory, or (B, H, W, C), or tokens (B, N, C). Kernels see all of them as
(B, H, W, C). A map whose demand is not everywhere is valid at the pixels of the demand only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pag_retrofit import kernels
from pag_retrofit.demand import (
    EVERYWHERE,
    Demand,
    Demands,
    Either,
    Grid,
    Masked,
    Outside,
    both,
    either,
    read,
)
from pag_retrofit.functional import POINTWISE, Window
from pag_retrofit.gates import Gate, MaskOverride, PixelGate
from pag_retrofit.multipool import BranchSelector
from pag_retrofit.policies import InputFreeGate, LayerGate

_MOST_MADE_UP = 16
_LARGE = 1 << 15  # floats of a result
_MOST_FREE = 2  # the last result is often still there while the next one is computed
_LINE = 16  # floats of a cache line


class Range(NamedTuple):
    """Floats [begin, end) of a block of memory, the block by its number."""

    block: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Floats."""
        return self.end - self.begin


class Memory:
    """Memory of maps, given out again as soon as nothing looks into them.

    Fresh memory costs a page fault every few kilobytes, more than a small layer takes; and where
    others lay is still cached. So each map takes the smallest free range that it fits in; what is
    left of the range stays free.

    Args:
        floats: How many to have at once; more come as they are asked for.
    """

    def __init__(self, floats: int):
        """Nothing is taken yet."""
        self.blocks = [kernels.backend().empty(floats)]
        self._free = [Range(0, 0, floats)]

    def take(self, floats: int) -> tuple[Tensor, Range]:
        """Flat memory, uninitialised, and what to give back."""
        size = _whole_lines(floats)
        fitting = [free for free in self._free if free.size >= size]
        if fitting:
            found = min(fitting, key=lambda free: free.size)
            self._free.remove(found)
        else:
            found = Range(len(self.blocks), 0, size)
            self.blocks.append(kernels.backend().empty(size))
        taken = Range(found.block, found.begin, found.begin + size)
        if found.size > size:
            self._free.append(Range(found.block, taken.end, found.end))
        return self.blocks[taken.block][taken.begin : taken.begin + floats], taken

    def give(self, given: Range) -> None:
        """Give memory back that nothing looks into any more."""
        for free in [free for free in self._free if free.block == given.block]:
            if free.end == given.begin or free.begin == given.end:
                self._free.remove(free)
                begin, end = min(free.begin, given.begin), max(free.end, given.end)
                given = Range(given.block, begin, end)
        self._free.append(given)


def _whole_lines(floats: int) -> int:
    return max(1, -(-floats // _LINE)) * _LINE


class ResultMemory:
    """Memory of a result, handed out anew once nobody looks at an earlier result in it any more.

    To allocate large results each time costs a page fault every few kilobytes.

    Args:
        floats: Of the result.
    """

    def __init__(self, floats: int):
        """Nothing is there yet."""
        self._floats = floats
        self._free: deque[mmap.mmap] = deque(maxlen=_MOST_FREE)

    def take(self) -> Tensor:
        """Flat memory, uninitialised; given back when the last tensor that looks into it goes."""
        try:
            block = self._free.pop()
        except IndexError:
            block = _private_memory(self._floats * torch.float32.itemsize)
        lease = (ctypes.c_float * self._floats).from_buffer(block)  # kept by the tensor's storage
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.float32)


def _private_memory(size: int) -> mmap.mmap:
    """Bytes of this process alone, in large pages if there are any; a forked one gets a copy."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


class Values(dict[str, Any]):
    """The values of one forward pass by name, and the memory behind them.

    Args:
        start: Inputs and constants.
        memory: Where maps take their memory from.
        apart: Names of maps that have memory of their own.
    """

    def __init__(self, start: Mapping[str, Any], memory: Memory, apart: Collection[str]):
        """Start with what is there."""
        super().__init__(start)
        self.memory, self.apart = memory, apart
        self.taken: dict[str, Range] = {}

    def allocate(self, name: str, shape: Sequence[int], gap: int = 0) -> Tensor:
        """Memory for a map, as rows (B, H, W, C), with so many floats free behind each pixel."""
        if name in self.apart:
            return kernels.backend().empty(math.prod(shape)).view(tuple(shape))
        if not gap:
            flat, self.taken[name] = self.memory.take(math.prod(shape))
            return flat.view(tuple(shape))
        *size, channels = shape
        flat, self.taken[name] = self.memory.take(math.prod(size) * (channels + gap))
        return flat.view(*size, channels + gap)[..., :channels]

    def hold(self, name: str, x: Tensor) -> Tensor:
        """A copy of a value in this memory, where it can be."""
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        rows = x.permute(0, 2, 3, 1) if last else x
        if x.dtype is not torch.float32 or not rows.is_contiguous():
            return x
        held = self.allocate(name, rows.shape).copy_(rows)
        return held.permute(0, 3, 1, 2) if last else held


class Source(NamedTuple):
    """One of the maps whose channels a convolution reads.

    Args:
        value: Name.
        layout: Axes of the value: `"BCHW"`, `"BHWC"`, `"BNC"` or `"BC"`.
        upsampling: Factor by which it is nearest-neighbour upsampled as it is read.
        scale: Name of a value (B, C, ...) of factors per channel, or "".
        size: Its (H, W), if it is upsampled and made for this reader; else None.
    """

    value: str
    layout: str
    upsampling: int = 1
    scale: str = ""
    size: tuple[int, int] | None = None


def as_rows(x: Tensor, layout: str) -> Tensor:
    """View a value as (B, H, W, C), one stride from each pixel to the next; copies any other."""
    if layout == "BCHW":
        x = x.permute(0, 2, 3, 1)
    elif layout == "BNC":
        x = x.unsqueeze(2)
    elif layout == "BC":
        x = x[:, None, None]
    return x if x.numel() and kernels.is_map(x) else kernels.contiguous(x)


def from_rows(rows: Tensor, layout: str) -> Tensor:
    """Undo `as_rows`."""
    if layout == "BCHW":
        return rows.permute(0, 3, 1, 2)
    if layout == "BC":
        return rows[:, 0, 0]
    return rows.squeeze(2) if layout == "BNC" else rows


class Buffer(NamedTuple):
    """A map that kernels write.

    Args:
        shape: (B, H, W, C).
        layout: Of the value it becomes.
    """

    shape: tuple[int, int, int, int]
    layout: str

    @property
    def gap(self) -> int:
        """Floats that are free behind each pixel."""
        return kernels.gap_between_pixels(self.shape[3])

    @property
    def floats(self) -> int:
        """All it takes."""
        return math.prod(self.shape[:3]) * (self.shape[3] + self.gap)


@dataclass(kw_only=True)
class Step:
    """What a forward pass does at one point.

    Args:
        writes: Name of the value that it makes or changes.
    """

    writes: str

    def reads(self) -> Iterator[str]:
        """Names of the values it reads."""
        return iter(())

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """Where it reads values, if what it writes is demanded somewhere."""
        for name in self.reads():
            yield name, EVERYWHERE

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Do it."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Allocate(Step):
    """Make a map: uninitialised, zero, or a copy of another value.

    Args:
        buffer: Its shape.
        copied: Name of a value to start from, or "".
        copied_layout: Of that value, or of the one that is overwritten.
        overwritten: Name of a value each pixel of which the next step reads before it writes it;
            or "".
        in_place: Take the memory of the one or the other: nothing reads it afterwards.
        zero: Fill with zeros.
    """

    buffer: Buffer
    copied: str = ""
    copied_layout: str = "BCHW"
    overwritten: str = ""
    in_place: bool = False
    zero: bool = False

    def reads(self) -> Iterator[str]:
        """The value copied."""
        if self.copied:
            yield self.copied

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """Pixel by pixel."""
        if self.copied:
            yield self.copied, demanded

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Allocate."""
        if self.in_place:
            rows = as_rows(values[self.copied or self.overwritten], self.copied_layout)
        else:
            rows = values.allocate(self.writes, self.buffer.shape, self.buffer.gap)
            if self.copied:
                kernels.copy(rows, as_rows(values[self.copied], self.copied_layout))
            elif self.zero:
                kernels.copy(rows, None)
        values[self.writes] = from_rows(rows, self.buffer.layout)


@dataclass(kw_only=True)
class Convolve(Step):
    """Convolve at listed pixels, into a map that is there.

    Args:
        layer: The packed convolution.
        layout: Of the map written.
        sources: What is read.
        where: Which of the demanded pixels.
        residual: Source of what is added, or None.
        accumulate: Add what the map holds.
        residual_after: Add after the activation.
        size: (H, W) of the input.
    """

    layer: kernels.PerforatedConvolution
    layout: str
    sources: tuple[Source, ...]
    size: tuple[int, int]
    where: Demand = EVERYWHERE
    residual: Source | None = None
    accumulate: bool = False
    residual_after: bool = False
    _ran: bool = False

    def reads(self) -> Iterator[str]:
        """Sources, their scales, and the residual."""
        for source in self.sources:
            yield source.value
            if source.scale:
                yield source.scale
        if self.residual:
            yield self.residual.value

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """Sources in the windows of the pixels computed."""
        computed = both(demanded, self.where)
        for source in self.sources:
            if source.scale:
                yield source.scale, EVERYWHERE
            size = source.size or (self.size if source.upsampling == 1 else None)
            window, factor = self.layer.window, source.upsampling
            yield source.value, read(computed, window, size, factor) if size else EVERYWHERE
        if self.residual:
            size, factor = self.residual.size or self.size, self.residual.upsampling
            yield self.residual.value, read(computed, POINTWISE, size, factor)

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Convolve."""
        maps = [as_rows(values[source.value], source.layout) for source in self.sources]
        name, residual = self.sources[0].scale, self.residual
        scale = _per_image(values[name]) if name else None
        grouped = self.layer.groups > 1  # one channel each: scaled before or after is the same
        epilogue = kernels.Epilogue(
            residual=as_rows(values[residual.value], residual.layout) if residual else None,
            accumulate=self.accumulate,
            residual_after=self.residual_after,
            scale=scale if grouped else None,
            input_scale=None if grouped else scale,
        )
        self.layer.forward(
            as_rows(values[self.writes], self.layout),
            maps,
            demands.listed(both(demanded, self.where)),
            upsampling=[source.upsampling for source in self.sources],
            epilogue=epilogue,
            checked=self._ran,  # shapes are those of the program
        )
        self._ran = True


@dataclass(kw_only=True)
class Interpolate(Step):
    """Fill pixels of a map by those at every second row and column, and activate all of it.

    The others are activated last: what lies between them is interpolated as they were. Only where
    there is nothing between them was the convolution free to activate them.

    Args:
        layout: Of the map.
        mask: Name of the mask of the pixels that were computed, besides those of the grid.
        activation: One of `kernels.ACTIVATIONS`.
        slope: Of a leaky ReLU.
        spared: Name of a mask whose open pixels are activated later, by a convolution that adds to
            them, and all others here; "" if there is none.
        grid_apart: The convolution of open pixels is one, that of others on the grid another, which
            activates nothing.
    """

    layout: str
    mask: str
    activation: str
    slope: float
    spared: str = ""
    grid_apart: bool = False

    def reads(self) -> Iterator[str]:
        """The mask that is looked at besides its own."""
        if self.spared:
            yield self.spared

    @property
    def where(self) -> Demand:
        """The pixels between those that were computed."""
        return Outside(self.computed)

    @property
    def computed(self) -> Demand:
        """The pixels that were computed."""
        return on_grid_or_open(self.mask)

    @property
    def activated(self) -> Demand:
        """What was activated as it was computed, if that is all of the map."""
        return Masked(self.mask) if self.grid_apart else self.computed

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """All that can be computed: what is demanded may be known only now."""
        yield self.writes, EVERYWHERE

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Interpolate and activate in place."""
        rows = as_rows(values[self.writes], self.layout)
        demanded = either(demanded, Grid(self.mask))  # no more work, and a simpler set
        between, computed = both(demanded, self.where), both(demanded, self.computed)
        activated = demands.listed(self.activated)
        if self.spared:
            kernels.interpolate(rows, demands.listed(both(between, Masked(self.spared))))
            others = Masked(self.spared, wanted=False)
            between, computed, activated = both(between, others), both(computed, others), None
        listed = demands.listed(between)
        kernels.interpolate(rows, listed, activation=self.activation, slope=self.slope)
        if self.activation != "none":
            listed = demands.listed(computed)
            kernels.activate(rows, self.activation, self.slope, listed, computed=activated)


def on_grid_or_open(mask: str) -> Demand:
    """The pixels at which a convolution with a coarse bypass is computed."""
    return Either(Masked(mask), Grid(mask))


@dataclass(kw_only=True)
class Activate(Step):
    """An activation of a map, in place.

    Args:
        layout: Of the map.
        activation: One of `kernels.ACTIVATIONS`.
        slope: Of a leaky ReLU.
    """

    layout: str
    activation: str
    slope: float

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Apply it."""
        rows = as_rows(values[self.writes], self.layout)
        kernels.activate(rows, self.activation, self.slope, demands.listed(demanded))


@dataclass(kw_only=True)
class MaxPool(Step):
    """Maximum over the windows of a map.

    Args:
        source: Name of the map, (B, C, H, W).
        window: The windows.
    """

    source: str
    window: Window

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Take the maxima."""
        rows = as_rows(values[self.source], "BCHW")
        kernels.max_pool(as_rows(values[self.writes], "BCHW"), rows, self.window)


@dataclass(kw_only=True)
class MakeLists(Step):
    """List the pixels of a map that convolutions will compute.

    Args:
        convolutions: Steps that follow and write the map.
    """

    convolutions: tuple[Convolve, ...]

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Make the lists; those who need them later find them."""
        for step in self.convolutions:
            demands.listed(both(demanded, step.where))


@dataclass(kw_only=True)
class InBands(Step):
    """Let the convolutions that follow be computed a few rows at a time.

    Args:
        stages: How many write each map; the last one may be a pool.
    """

    stages: tuple[int, ...]

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Announce them."""
        kernels.in_bands(self.stages)


@dataclass(kw_only=True)
class Resize(Step):
    """A map of another size: bilinear interpolation, antialiased or not, or the nearest pixels.

    Args:
        source: Name of the map, (B, C, H, W).
        rows: Of which rows of the map those of the result are made.
        columns: The same of columns.
    """

    source: str
    rows: kernels.Taps
    columns: kernels.Taps

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Interpolate."""
        out, source = as_rows(values[self.writes], "BCHW"), as_rows(values[self.source], "BCHW")
        kernels.resize(out, source, self.rows, self.columns)


@dataclass(kw_only=True)
class Normalize(Step):
    """Layer norm over channels at the demanded pixels.

    Args:
        source: What is read.
        weight: (C,), or None.
        bias: (C,), or None.
        epsilon: Added to the variance.
        layout: Of the map written.
    """

    source: Source
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    layout: str

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source.value

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """Pixel by pixel."""
        yield self.source.value, demanded

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Normalise."""
        kernels.layer_norm(
            as_rows(values[self.writes], self.layout),
            as_rows(values[self.source.value], self.source.layout),
            demands.listed(demanded),
            weight=self.weight,
            bias=self.bias,
            epsilon=self.epsilon,
        )


@dataclass(kw_only=True)
class NormalizeGroups(Step):
    """Group norm of a whole map, and an activation.

    Args:
        source: Name of the map, (B, C, H, W).
        groups: Of channels.
        weight: (C,), or None.
        bias: (C,), or None.
        epsilon: Added to the variance.
        activation: One of `kernels.ACTIVATIONS`.
        slope: Of a leaky ReLU.
    """

    source: str
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    activation: str
    slope: float

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Normalise and activate."""
        kernels.group_norm(
            as_rows(values[self.writes], "BCHW"),
            as_rows(values[self.source], "BCHW"),
            self.groups,
            weight=self.weight,
            bias=self.bias,
            epsilon=self.epsilon,
            activation=self.activation,
            slope=self.slope,
        )


@dataclass(kw_only=True)
class Average(Step):
    """Mean of each channel over pixels.

    Args:
        source: What is read.
        where: The pixels.
        shape: Of the result.
    """

    source: Source
    where: Demand
    shape: tuple[int, ...]

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source.value

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """The pixels."""
        yield self.source.value, self.where

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Average."""
        rows = as_rows(values[self.source.value], self.source.layout)
        values[self.writes] = kernels.masked_mean(rows, demands.listed(self.where)).view(self.shape)


@dataclass(kw_only=True)
class Weigh(Step):
    """What the weights of several gates, not scaled, make of the pixels of one map.

    Args:
        gates: Theirs are the last channels of the map written.
        source: What they read.
        where: Which pixels.
    """

    gates: tuple[PixelGate, ...]
    source: Source
    where: Demand

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source.value

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """Pixel by pixel."""
        yield self.source.value, self.where

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Weigh."""
        weight = self._weight()
        layer = kernels.PerforatedConvolution(weight, None, window=POINTWISE)
        tape = kernels.recording()
        if tape is not None:
            watched = [x for gate in self.gates for x in gate.watched()]
            tape.first(lambda: layer.replace_weight(self._weight()), *watched)
        scores = as_rows(values[self.writes], "BCHW")[..., -len(self.gates) :]
        source = as_rows(values[self.source.value], self.source.layout)
        layer.forward(scores, source, demands.listed(self.where))

    def _weight(self) -> Tensor:
        return torch.cat([gate.weight.detach() for gate in self.gates])


@dataclass(kw_only=True)
class Decide(Step):
    """A gate's decision, or made-up masks in place of it.

    Args:
        gate: The gate.
        sources: What it reads.
        shape: (B, 1, h, w) of the mask.
        offset: First pixel decided.
        before: What will fill and activate the map that is read, if all pixels read are on its grid
            and this need not wait for that; else None.
        weighed: Channel of the one source that holds what the gate's weights, not scaled, make of
            each pixel; default None: the source is the gate's input.
    """

    gate: PixelGate
    sources: tuple[Source, ...]
    shape: tuple[int, int, int, int]
    offset: tuple[int, int]
    before: Interpolate | None = None
    weighed: int | None = None
    _made_up: dict[MaskOverride, Tensor] = field(default_factory=dict, repr=False)

    def reads(self) -> Iterator[str]:
        """Its sources and their scales."""
        for source in self.sources:
            yield source.value
            if source.scale:
                yield source.scale

    @property
    def reads_grid(self) -> bool:
        """Whether all it reads is every second pixel of every second row of one map, or fewer."""
        plain = len(self.sources) == 1 and self.sources[0].upsampling == 1
        steps = (*self.gate.cost.stride, *self.offset)
        return plain and not self.sources[0].scale and not any(step % 2 for step in steps)

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """All it reads, everywhere, or the grid."""
        for name in self.reads():
            yield name, Grid(self.before.mask) if self.before else EVERYWHERE

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Decide."""
        tape = kernels.recording()
        computed = demands.listed(self.before.activated) if self.before else None
        if tape is not None:
            values[self.writes] = self._record(tape, values, computed)
        elif self.gate.override is not None:
            values[self.writes] = self._from(self.gate.override)
        else:
            values[self.writes] = self._own(values, computed, *self._parameters())

    def _record(
        self, tape: kernels.Tape, values: Values, computed: kernels.PixelList | None
    ) -> Tensor:
        """The mask, which replays decide anew; then one made up stays in its place.

        The gate decides all the same, elsewhere, so that made-up masks cost what its own would.
        """
        weight, bias, keep = self._parameters()
        mask = self._own(values, computed, weight, bias, keep)
        call, elsewhere = tape.last, torch.empty_like(mask)
        places: list[tuple[int, int]] = []
        shown: list[MaskOverride | None] = [None]

        def show() -> None:
            override = self.gate.override
            if override is not None and override != shown[0]:
                mask.copy_(self._from(override))
            shown[0] = override

        def steer() -> None:
            show()
            if not places:
                places.extend(tape.pointers_into(mask, call))
            tape.aim(places, (mask if shown[0] is None else elsewhere).data_ptr())
            for held, new in zip((weight, bias, keep), self._parameters(), strict=True):
                held.copy_(new)

        show()
        tape.first(steer, *self.gate.watched())
        return mask

    def _from(self, override: MaskOverride) -> Tensor:
        """A made-up mask."""
        made_up = self._made_up.get(override)
        if made_up is None:
            made_up = override.mask(torch.empty(self.shape, device="cpu")).bool()
            if len(self._made_up) >= _MOST_MADE_UP:
                self._made_up.clear()
            self._made_up[override] = made_up
        return made_up

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (C,) and bias (1,) of the logit, and how many pixels to open, if that is given."""
        gate = self.gate
        keep = -1 if gate.rate is None else round(gate.rate * self.shape[2] * self.shape[3])
        weight = gate.weight.flatten() if self.weighed is None else torch.ones(1)
        return weight * gate.scale, gate.bias + gate.shift, torch.tensor([keep])

    def _own(
        self,
        values: Mapping[str, Any],
        computed: kernels.PixelList | None,
        weight: Tensor,
        bias: Tensor,
        keep: Tensor,
    ) -> Tensor:
        name = self.sources[0].scale
        maps = [as_rows(values[source.value], source.layout) for source in self.sources]
        if self.weighed is not None:
            maps = [maps[0][..., self.weighed : self.weighed + 1]]
        return kernels.gate_mask(
            maps,
            weight,
            bias,
            stride=self.gate.cost.stride,
            offset=self.offset,
            size=(self.shape[2], self.shape[3]),
            upsampling=[source.upsampling for source in self.sources],
            scale=_per_image(values[name]) if name else None,
            keep=keep,
            activation=self.before.activation if self.before else "none",
            slope=self.before.slope if self.before else 0.0,
            computed=computed,
        )


@dataclass(kw_only=True)
class Stand(Step):
    """The mask of a gate that does not look at its input.

    Args:
        gate: The gate.
        sources: What another gate would read: they are made before, and everywhere.
        shape: (B, 1, h, w) of the mask.
    """

    gate: InputFreeGate
    sources: tuple[Source, ...]
    shape: tuple[int, int, int, int]

    def reads(self) -> Iterator[str]:
        """Its sources, and no scales."""
        for source in self.sources:
            yield source.value

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Give the mask; replays change it when the gate or its override has changed."""
        mask = values[self.writes] = self._mask()
        shown = [self._version()]

        def refresh() -> None:
            version = self._version()
            if version != shown[0]:
                mask.copy_(self._mask())
                shown[0] = version

        _repeat(refresh)

    def _mask(self) -> Tensor:
        override = self.gate.override
        if override is not None:
            return override.mask(torch.empty(self.shape, device="cpu")).bool()
        return self.gate.standing_mask(self.shape).expand(self.shape).bool().contiguous()

    def _version(self) -> tuple[Any, ...]:
        tensors = (*self.gate.parameters(), *self.gate.buffers())
        return (self.gate.override, *(number for x in tensors for number in (id(x), x._version)))


@dataclass(kw_only=True)
class DecidePerImage(Step):
    """The decision of a gate that looks at a whole image, run as it is.

    Args:
        gate: The gate.
        source: What it reads.
        shape: (B, 1, h, w) of the mask.
    """

    gate: LayerGate
    source: Source
    shape: tuple[int, int, int, int]

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source.value

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Decide."""
        x = values[self.source.value]
        if self.gate.cost.stride == (1, 1):
            mean = kernels.masked_mean(as_rows(x, self.source.layout))
            decide = functools.partial(self._from_mean, mean)
        else:
            decide = functools.partial(self._from_map, x)
        mask = values[self.writes] = decide()
        _repeat(lambda: mask.copy_(decide()))

    def _from_mean(self, mean: Tensor) -> Tensor:
        gate = self.gate
        logits = mean @ (gate.weight.flatten() * gate.scale) + gate.bias + gate.shift
        whole = logits.view(-1, 1, 1, 1).expand(self.shape)
        mask = gate.decide(whole) if gate.override is None else gate.override.mask(whole)
        return mask.bool().contiguous()

    def _from_map(self, x: Tensor) -> Tensor:
        mask: Tensor = self.gate(x, self.shape[2:])
        return mask.bool().contiguous()


def _per_image(scale: Tensor) -> Tensor:
    """Factors of channels as (B, C)."""
    return kernels.contiguous(scale).view(len(scale), -1)


@dataclass(kw_only=True)
class Choose(Step):
    """What a branch selector chooses.

    Args:
        selector: The selector, run as it is.
        source: What it reads.
    """

    selector: BranchSelector
    source: Source

    def reads(self) -> Iterator[str]:
        """Its source."""
        yield self.source.value

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Choose."""
        x = values[self.source.value]
        chosen = values[self.writes] = self.selector(x)
        _repeat(lambda: chosen.copy_(self.selector(x)))


@dataclass(kw_only=True)
class Call(Step):
    """An operator of torch, everywhere.

    Args:
        function: The operator.
        arguments: Positional ones; `Value` for those that are values.
        keywords: Keyword arguments.
        pixelwise: Each pixel of the result depends on the same pixel of the maps it reads.
        gives_a_view: The result may look into the memory of an argument.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    pixelwise: tuple[str, ...] = ()
    gives_a_view: bool = False

    def reads(self) -> Iterator[str]:
        """All values among its arguments."""
        for leaf in pytree.tree_leaves((self.arguments, self.keywords), is_leaf=_is_value):
            if isinstance(leaf, Value):
                yield leaf.name

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        """Everywhere, or pixel by pixel."""
        for name in self.reads():
            yield name, demanded if name in self.pixelwise else EVERYWHERE

    def run(self, values: Values, demands: Demands, demanded: Demand) -> None:
        """Call it."""

        def filled(x: Any) -> Any:
            if isinstance(x, Value):
                return values[x.name]
            if isinstance(x, list | tuple):
                return type(x)(map(filled, x))
            return x

        arguments = tuple(map(filled, self.arguments))
        keywords = {k: filled(v) for k, v in self.keywords.items()}
        result = self.function(*arguments, **keywords)
        if kernels.recording() is not None:
            result = self._record(values, arguments, keywords, result)
        values[self.writes] = result

    def _record(
        self, values: Values, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> Any:
        """Give the result memory of its own, which replays fill; a view has it already."""
        read = {x.untyped_storage().data_ptr() for x in _tensors((arguments, keywords))}
        leaves = _tensors(result)
        if self.gives_a_view and all(x.untyped_storage().data_ptr() in read for x in leaves):
            return result
        if isinstance(result, Tensor):
            result = values.hold(self.writes, result)
            leaves = [result]
            if (write := _writing(self.function)) is not None:
                _repeat(functools.partial(write, *arguments, **keywords, out=result))
                return result

        def again() -> None:
            for held, new in zip(
                leaves, _tensors(self.function(*arguments, **keywords)), strict=True
            ):
                held.copy_(new)

        _repeat(again)
        return result


@functools.cache
def _writing(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The form of an operator of torch that writes its result where `out` says, if it has one."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return None
    packet: Any = function._overloadpacket  # type: ignore[attr-defined]
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    for name in packet.overloads():
        form = getattr(packet, name)
        arguments = form._schema.arguments
        taken = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if taken == wanted and [a.name for a in arguments if a.is_out] == ["out"]:
            found: Callable[..., Any] = form
            return found
    return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _repeat(function: Callable[[], Any]) -> None:
    """Have replays call a function at this point."""
    tape = kernels.recording()
    if tape is not None:
        tape.then(function)


class Value(NamedTuple):
    """A value's name among the arguments of a call."""

    name: str


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


class _Recording:
    """A forward pass whose maps stay where they are.

    Args:
        steps: Called with inputs, gives the results.
        arguments: Inputs.
        seen: Which of the inputs nothing but kernels look at: they read the caller's. Others are
            copied.
        apart: Which of the results kernels write, into memory of their own. Others, and small ones,
            are copied.
    """

    def __init__(
        self,
        steps: Callable[[Sequence[Any]], list[Any]],
        arguments: Sequence[Any],
        seen: Collection[int],
        apart: Collection[int],
    ):
        """Pass forward, and record that."""
        self._inputs = [_own_copy(x) for x in arguments]
        self._tape = kernels.Tape()
        self._seen = (-1, -1)  # nothing: the first replay has to be prepared
        with kernels.record_on(self._tape):
            self._results = steps(self._inputs)
        self._readings = {
            index: self._tape.pointers_into(self._inputs[index])
            for index in seen
            if not self._tape.reads_by_python(self._inputs[index])
        }
        self._apart = {
            index: (ResultMemory(x.numel()), self._tape.pointers_into(x))
            for index, x in enumerate(self._results)
            if index in apart and x.numel() >= _LARGE
        }

    def results(self) -> list[Any]:
        """Those of the last pass; no later one changes them, and they may be changed in any way."""

        def given(index: int, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach() if index in self._apart else x.clone()

        return [given(index, x) for index, x in enumerate(self._results)]

    def repeat(self, arguments: Sequence[Any]) -> None:
        """Pass forward with other inputs."""
        for index, new in enumerate(arguments):
            self._take(index, new)
        for index, (memory, pointers) in self._apart.items():
            last, flat = self._results[index], memory.take()
            self._results[index] = flat.as_strided(last.shape, last.stride())
            self._tape.aim(pointers, flat.data_ptr())
        # Looking at every gate takes longer than small layers do.
        seen = (Gate.changes, self._tape.version())
        if seen != self._seen:
            self._tape.prepare()
            self._seen = seen
        kernels.replay(self._tape)

    def _take(self, index: int, new: Any) -> None:
        """Let the next replay read an input: where it is, if it is laid out as here."""
        held, readings = self._inputs[index], self._readings.get(index)
        if readings is None:
            held.copy_(new)
        elif type(new) is Tensor and new.stride() == held.stride():
            self._tape.aim(readings, new.data_ptr())
        else:
            self._tape.aim(readings, held.copy_(new).data_ptr())

    def time_calls(self, rounds: int) -> list[tuple[str, tuple[Any, ...], float]]:
        """Pass forward more often, and time what is called: the fastest of each call."""
        passes = [kernels.time_calls(self._tape) for _ in range(rounds)]
        return [min(times, key=lambda call: call[2]) for times in zip(*passes, strict=True)]


_BY_KERNELS = (
    Allocate, Convolve, Interpolate, Activate, MaxPool, Resize, Normalize, NormalizeGroups, Average,
    Weigh, MakeLists, InBands,
)  # fmt: skip


def _own_copy(x: Tensor) -> Tensor:
    """A copy whose channels are last in memory."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.clone(memory_format=layout)


class Program:
    """Steps in order, what of each value they need, and when memory can be let go.

    Args:
        steps: In order; maps that kernels write are allocated before.
        inputs: Names of the values that a forward pass starts from.
        outputs: Names of the values that it ends with, or constants.
        constants: Values that are always there.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[str],
        outputs: Sequence[Any],
        constants: Mapping[str, Any],
    ):
        """Work out demands, what may happen in place, and the last use of every value."""
        self.steps, self.inputs, self.outputs = list(steps), list(inputs), list(outputs)
        self.constants = constants
        self.demanded = demands_of(self.steps, outputs)
        kept = {output.name for output in outputs if isinstance(output, Value)}
        last: dict[str, int] = {}
        for index, step in enumerate(self.steps):
            where = getattr(step, "where", EVERYWHERE)
            looked_at = masks_of(self.demanded[index], where)
            for name in (*step.reads(), step.writes, *looked_at):
                last[name] = index
        self._mark_in_place(last, kept | set(inputs) | set(constants))
        self._apart = self._written_by_kernels()
        self._seen = self._read_by_kernels()
        self._recorded: list[_Recording] = []  # those that no thread is in
        self.free = self._releases(last, kept)
        self._most = self._most_at_once()
        self.dead: list[list[str]] = [[] for _ in self.steps]
        for name, index in last.items():
            if name not in kept and name not in constants:
                self.dead[index].append(name)

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        """One forward pass: recorded, or a replay of one that was."""
        if not kernels.can_record():
            return self._steps(arguments)
        found = self.replay(arguments)
        if found is not None:
            return found
        recorded = _Recording(self._steps, arguments, self._seen, self._apart.values())
        results = recorded.results()
        self._recorded.append(recorded)
        return results

    def replay(self, arguments: Sequence[Any]) -> list[Any] | None:
        """One forward pass as recorded before; None if no recording is free."""
        try:
            recorded = self._recorded.pop()
        except IndexError:
            return None
        recorded.repeat(arguments)
        results = recorded.results()
        self._recorded.append(recorded)
        return results

    def time_calls(
        self, arguments: Sequence[Any], rounds: int
    ) -> list[tuple[str, tuple[Any, ...], float]]:
        """Kernel calls of a pass: kind, what it was made of, seconds; native kernels only."""
        recorded = _Recording(self._steps, arguments, self._seen, self._apart.values())
        recorded.repeat(arguments)
        return recorded.time_calls(rounds)

    def forget(self) -> None:
        """Let go of the memory that later passes would use; they record anew."""
        self._recorded.clear()

    def share_weights(self, others: Iterable[Program]) -> None:
        """Use packed weights of programs of the same network; what they lack is laid together."""
        known: dict[tuple[int, torch.Size], list[Tensor]] = {}
        for other in others:
            for index, layer in enumerate(other.layers):
                known.setdefault((index, layer.weights.shape), []).append(layer.weights)
        lacking = []
        for index, own in enumerate(self.layers):
            candidates = known.get((index, own.weights.shape), [])
            same = next((w for w in candidates if torch.equal(own.weights, w)), None)
            if same is None:
                lacking.append(own)
            else:
                own.weights = same
        kernels.lay_together(lacking)

    @property
    def layers(self) -> list[kernels.PerforatedConvolution]:
        """Its convolutions, in order."""
        return [step.layer for step in self.steps if isinstance(step, Convolve)]

    def _steps(self, arguments: Sequence[Any]) -> list[Any]:
        given = dict(zip(self.inputs, arguments, strict=True))
        values = Values({**self.constants, **given}, Memory(self._most), self._apart)
        demands = Demands(values)
        for step, demanded, dead, free in zip(
            self.steps, self.demanded, self.dead, self.free, strict=True
        ):
            step.run(values, demands, demanded)
            for name in dead:
                del values[name]
            for name in free:
                if name in values.taken:
                    values.memory.give(values.taken[name])
        return [values[o.name] if isinstance(o, Value) else o for o in self.outputs]

    def _written_by_kernels(self) -> dict[str, int]:
        """Outputs that nothing but kernels look at, and where they are among all."""
        names = [output.name for output in self.outputs if isinstance(output, Value)]
        made = {s.writes for s in self.steps if isinstance(s, Allocate) and not s.in_place}
        others = [step for step in self.steps if not isinstance(step, _BY_KERNELS)]
        seen = {name for step in others for name in (*step.reads(), step.writes)}
        return {
            output.name: index
            for index, output in enumerate(self.outputs)
            if isinstance(output, Value)
            and output.name in made - seen
            and names.count(output.name) == 1
        }

    def _read_by_kernels(self) -> list[int]:
        """Inputs that nothing but kernels look at: their places among all."""
        others = [step for step in self.steps if not isinstance(step, (*_BY_KERNELS, Decide))]
        looked_at = {name for step in others for name in (*step.reads(), step.writes)}
        looked_at |= {output.name for output in self.outputs if isinstance(output, Value)}
        return [i for i, name in enumerate(self.inputs) if name not in looked_at]

    def _mark_in_place(self, last: dict[str, int], kept: set[str]) -> None:
        """Let copies take over the memory of values that nothing reads afterwards."""
        owned: set[str] = set()  # memory of their own, which no other value looks into
        calls = [step for step in self.steps if isinstance(step, Call)]
        viewed = {name for call in calls if call.gives_a_view for name in call.reads()}
        for index, step in enumerate(self.steps):
            if isinstance(step, Call) and _writing(step.function) is not None:
                owned.add(step.writes)
            if not isinstance(step, Allocate):
                continue
            owned.add(step.writes)
            taken = step.copied or step.overwritten
            if taken in owned and taken not in kept and taken not in viewed:
                step.in_place = last[taken] == (index if step.copied else index + 1)

    def _releases(self, last: Mapping[str, int], kept: set[str]) -> list[list[str]]:
        """Per step: allocations whose memory nothing looks into afterwards."""
        owners: dict[str, set[str]] = {}  # value -> allocations whose memory it may look into
        for step in self.steps:
            if isinstance(step, Allocate) and not step.in_place:
                owners[step.writes] = {step.writes}
            elif isinstance(step, Allocate):
                owners[step.writes] = owners[step.copied or step.overwritten]
            elif isinstance(step, Call):
                owners[step.writes] = {step.writes}
                if step.gives_a_view:
                    owners[step.writes] |= {o for n in step.reads() for o in owners.get(n, ())}
        ends: dict[str, int] = {}
        for name, own in owners.items():
            end = len(self.steps) if name in kept else last[name]
            for owner in own:
                ends[owner] = max(ends.get(owner, 0), end)
        free: list[list[str]] = [[] for _ in self.steps]
        for owner, end in ends.items():
            if end < len(self.steps):
                free[end].append(owner)
        return free

    def _most_at_once(self) -> int:
        """Floats of the maps that are there at once, where those are most."""
        sizes: dict[str, int] = {}
        most = 0
        for step, free in zip(self.steps, self.free, strict=True):
            if isinstance(step, Allocate) and not (step.in_place or step.writes in self._apart):
                sizes[step.writes] = _whole_lines(step.buffer.floats)
                most = max(most, sum(sizes.values()))
            for name in free:
                sizes.pop(name, None)
        return most


def demands_of(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Demand]:
    """Per step: where what it writes is needed; everywhere, if that is not known by then.

    Args:
        steps: Of a program, in order.
        outputs: Names of the values that it ends with, or constants.
    """
    first: dict[str, int] = {}
    for index, step in enumerate(steps):
        first.setdefault(step.writes, index)
    needed: dict[str, Demand] = {
        output.name: EVERYWHERE for output in outputs if isinstance(output, Value)
    }
    demanded: list[Demand] = []
    for index, step in reversed(list(enumerate(steps))):
        # A value that nothing reads is a map all of whose pixels are written by others.
        here = needed.get(step.writes, EVERYWHERE)
        if any(first.get(mask, -1) > index for mask in masks_of(here)):
            here = needed[step.writes] = EVERYWHERE  # for those that write it before, too
        demanded.append(here)
        for name, where in step.needs(here):
            needed[name] = either(needed[name], where) if name in needed else where
    return demanded[::-1]


def masks_of(*demands: Demand) -> Iterator[str]:
    """Masks that sets of pixels are made of."""
    pending: list[Demand] = list(demands)
    while pending:
        demand = pending.pop()
        pending += [part for part in vars(demand).values() if isinstance(part, Demand)]
        name = getattr(demand, "mask", "")
        if name:
            yield name
