"""What deployed networks call: packed convolutions, layer norms, means and gates at listed pixels.

Maps are NHWC here, (B, H, W, C), float32, on the CPU, dense-addressed and sparsely written: a map
has its full shape, and only the listed pixels of it are valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pag_retrofit.errors import PagError
from pag_retrofit.functional import Window
from pag_retrofit.kernels import native
from pag_retrofit.kernels.arguments import ACTIVATIONS, WINOGRAD_WINDOWS, Taps, takes_winograd
from pag_retrofit.kernels.operators import backend, convolve, visible
from pag_retrofit.kernels.packing import (
    DIGITS_DEPTH,
    MOST_DEPTH_IN_DIGITS,
    NARROW,
    compress,
    in_digits,
    pack_strided,
    pack_weight,
    transformed,
)
from pag_retrofit.kernels.tape import recording

_OPS = torch.ops.pag_retrofit
_PIXELS_FOR_WINOGRAD = 128
_CHANNELS_FOR_WINOGRAD = 512  # input times output channels
_GAINS_NOTHING_WITH_STRIDE = "avx2"
_WEIGHTS_TO_COMPRESS = 1 << 17
_MOST_TO_COMPRESS = 128.0  # times the middle one
_LEAST_DEPTH_IN_DIGITS = 32  # rows of its matrix
_MATRIX = DIGITS_DEPTH * NARROW  # bytes that are multiplied at once, of digits
_PAGE = 4096  # bytes; lines so far apart have one place in a first-level cache
_LINE = 64


class PixelList(NamedTuple):
    """Listed pixels of a map (B, h, w).

    Args:
        pixels: int32, one entry per pixel of the map; flat indices, each at most once.
        length: int32, one element: how many entries are valid.
    """

    pixels: Tensor
    length: Tensor


class Epilogue(NamedTuple):
    """What a perforated convolution does before it writes a pixel.

    y = after + activation(scale * (convolution + bias) + before)

    Args:
        residual: (B, h, w, C'), or a power of two smaller in height and width, read upsampled;
            `before` or `after`.
        accumulate: Take what the output holds as the residual: an update in place.
        residual_after: The residual is `after` instead of `before`.
        scale: (B, C').
        input_scale: (B, C), multiplies the input; ungrouped convolutions only.
    """

    residual: Tensor | None = None
    accumulate: bool = False
    residual_after: bool = False
    scale: Tensor | None = None
    input_scale: Tensor | None = None


class PerforatedConvolution(nn.Module):
    """A convolution (or linear layer) evaluated at listed output pixels.

    Args:
        weight: (out, in / groups, kh, kw).
        bias: (out,), or None.
        window: Kernel, stride, dilation, padding at the top and left (negative: the first window
            starts inside). Padding at the bottom and right is whatever the output's size asks for.
        groups: Default 1.
        activation: One of `ACTIVATIONS`; default `"none"`.
        slope: Of `"leaky_relu"`; default 0.01.
        winograd: Compute in tiles of 2x2 pixels, with 4/9 of the multiplications and 16/9 of the
            weights; worth it where there are many pixels and channels. For windows of 3x3 with
            stride 1, ungrouped; and for those of 7x7 with stride 2 on at most four channels, with
            0.41 of the multiplications. Default False.
        activate_if_all: Leave the activation out unless every pixel is listed: others will be
            interpolated between them first. Default False.
        compressed: Hold the weights as whole numbers of 24 bits, which rounds them (to 2^-23 of the
            largest of their output channel); worth it where so many have to be read from memory.
            For one group. Default False.
        digits: Hold them as such numbers in three digits, and multiply those by the input's,
            rounded likewise: to 2^-23 of the largest number that a pixel reads, or one of the 16
            that are computed with it. A pixel that reads what is not finite becomes NaN. For
            processors that multiply matrices of bytes, for one group, and instead of `winograd` and
            `compressed`. Default False.

    Raises:
        PagError: The activation is unknown, or the window is not one for Winograd's algorithm.
        PagError: Compressed weights, or digits, in several groups, or digits and one of the others,
            or compressed weights and tiles with stride 2.
    """

    weights: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        window: Window,
        groups: int = 1,
        activation: str = "none",
        slope: float = 0.01,
        winograd: bool = False,
        activate_if_all: bool = False,
        compressed: bool = False,
        digits: bool = False,
    ):
        """Pack the weight."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise PagError(f"activation={activation!r}: expected one of {ACTIVATIONS}")
        self.out_channels, own_channels = weight.shape[:2]
        self.channels = own_channels * groups
        self.window, self.groups = window, groups
        self.activation, self.slope, self.winograd = activation, slope, winograd
        self.activate_if_all = activate_if_all
        self._flat_window = [number for pair in window[:4] for number in pair]
        if winograd and not takes_winograd(self._flat_window, groups, self.channels):
            raise PagError(
                f"winograd=True with {window}, {self.channels} channels and groups={groups}: "
                f"{WINOGRAD_WINDOWS}"
            )
        self._strided = winograd and window.stride[0] > 1
        if compressed and groups > 1:
            raise PagError(f"compressed=True with groups={groups}: expected one group")
        if compressed and self._strided:
            raise PagError(f"compressed=True with winograd=True and {window}: expected stride 1")
        if digits and (groups > 1 or winograd or compressed):
            raise PagError(
                f"digits=True with groups={groups}, winograd={winograd}, compressed={compressed}: "
                "expected one group and nothing of the others"
            )
        self.compressed, self.digits = compressed, digits
        self.register_buffer("weights", self._packed(weight))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(
        self,
        out: Tensor,
        sources: Tensor | Sequence[Tensor],
        listed: PixelList | None = None,
        *,
        upsampling: Sequence[int] | None = None,
        epilogue: Epilogue | None = None,
        checked: bool = False,
    ) -> Tensor:
        """Write the listed pixels of `out` and return it.

        Args:
            out: (B, h, w, out), or a slice of the channels of a wider map.
            sources: Map, or up to six maps whose channels one after the other are the input;
                none may share memory with `out`, other channels of one map excepted.
            listed: Pixels of `out`; default all.
            upsampling: Power of two by which each source is (nearest-neighbour) upsampled as it
                is read; default 1 each. The input's size is that of the smallest source then.
            epilogue: Residuals and scales; default none.
            checked: An earlier call had the same types, shapes and strides; default False.

        Raises:
            PagError: A shape, type, stride or index does not fit.
        """
        maps = [sources] if isinstance(sources, Tensor) else list(sources)
        factors = [1] * len(maps) if upsampling is None else list(upsampling)
        pixels, length = (None, None) if listed is None else listed
        e = epilogue or _NOTHING
        pairs = list(zip(maps, factors, strict=True))
        size = [min(source.shape[axis] * factor for source, factor in pairs) for axis in (1, 2)]
        convolve(
            out, maps, self.weights, self.bias, pixels, length, self._flat_window, size,
            self.groups, factors, self.activation, self.slope, e.scale, e.input_scale,
            e.residual, e.accumulate, e.residual_after, self.winograd, self.activate_if_all,
            checked=checked,
        )  # fmt: skip
        return out

    def replace_weight(self, weight: Tensor) -> None:
        """Take another weight of the same shape, in the memory of the one before."""
        self.weights.copy_(self._packed(weight))

    def _packed(self, weight: Tensor) -> Tensor:
        if self._strided:
            return pack_strided(weight)
        weight = transformed(weight) if self.winograd else weight
        packed, taps = pack_weight(weight, self.groups), weight.shape[2] * weight.shape[3]
        if self.compressed:
            return compress(packed, self.out_channels, self.channels, taps)
        return in_digits(packed, self.out_channels, self.channels, taps) if self.digits else packed

    def new_output(self, source: Tensor, size: tuple[int, int]) -> Tensor:
        """An uninitialised map (B, h, w, out) for the batch of a source."""
        return source.new_empty(source.shape[0], *size, self.out_channels)

    def extra_repr(self) -> str:
        """Show what a convolution shows."""
        return (
            f"{self.channels}, {self.out_channels}, {self.window}, groups={self.groups}, "
            f"activation={self.activation!r}, winograd={self.winograd}, "
            f"compressed={self.compressed}, digits={self.digits}"
        )


_NOTHING = Epilogue()


def prefers_winograd(
    weight: Tensor, window: Window, groups: int, pixels: int, upsampled: bool = False
) -> bool:
    """Whether a convolution is faster by Winograd's algorithm, by measurement.

    It holds and reads 16/9 of the weights, which few pixels do not pay for, and transforms inputs
    and results, which few channels do not pay for. Upsampled maps, of which 7 of 16 products are
    zero, always do. With stride 2 weights are few; with AVX2 that gains nothing.

    Args:
        weight: (out, in / groups, kh, kw).
        window: Of the convolution.
        groups: Of the convolution.
        pixels: Of its output, all images together.
        upsampled: Its first source is; default False.
    """
    flat = [number for pair in window[:3] for number in pair]
    if not takes_winograd(flat, groups, weight.shape[1] * groups) or pixels < _PIXELS_FOR_WINOGRAD:
        return False
    if window.stride[0] > 1:
        faster = backend() is native and native.instruction_set() != _GAINS_NOTHING_WITH_STRIDE
        return faster and weight.shape[0] >= NARROW and not upsampled
    matrix = weight.shape[0] * weight.shape[1]
    return 2 * pixels**2 >= matrix and (matrix >= _CHANNELS_FOR_WINOGRAD or upsampled)


def gap_between_pixels(channels: int) -> int:
    """Floats to leave free behind each pixel of a map.

    A tile reads the same channel of 14 or more pixels in turn. Where these lie whole pages apart,
    or half of one and every other is read, their lines compete for the 8 places that many
    first-level caches have for them, and each is gone before its next channel is read.

    Args:
        channels: Of the map.
    """
    return _LINE // 4 if channels and 4 * channels % (_PAGE // 2) == 0 else 0


def prefers_compressed(weight: Tensor, groups: int) -> bool:
    """Whether a convolution is faster with compressed weights, by measurement.

    Small ones may stay in the cache, and many processors cannot expand any as fast as they compute.
    Of a channel whose largest weight is far above the others, those would lose too much.

    Args:
        weight: (out, in / groups, kh, kw).
        groups: Of the convolution.
    """
    large = weight.numel() >= _WEIGHTS_TO_COMPRESS
    return large and _may_round(weight, groups) and native.expands()


def prefers_digits(weight: Tensor, groups: int) -> bool:
    """Whether a convolution is faster in digits, by measurement.

    Where it is, neither Winograd's algorithm nor compressed weights are. Where each tap has whole
    steps of channels neighbours share digits; to make them for each takes longer than it saves.

    Args:
        weight: (out, in / groups, kh, kw).
        groups: Of the convolution.
    """
    depth, channels = weight[0].numel(), weight.shape[1]
    return (
        _LEAST_DEPTH_IN_DIGITS <= depth <= MOST_DEPTH_IN_DIGITS
        and (depth == channels or channels % DIGITS_DEPTH == 0)
        and _may_round(weight, groups)
        and native.multiplies_digits()
    )


def _may_round(weight: Tensor, groups: int) -> bool:
    """Whether native kernels take a weight as whole numbers, and it loses little by that."""
    return (
        groups == 1
        and weight.shape[0] >= NARROW
        and backend() is native
        and bool(weight.isfinite().all())
        and _is_even(weight)
    )


def _is_even(weight: Tensor) -> bool:
    """Whether no weight is far above half of those of its output channel, zeros left aside."""
    sizes = weight.detach().abs().flatten(1)
    given = sizes > 0
    # Those that the largest is too far above: with the median they would be half, or more.
    small = given & (_MOST_TO_COMPRESS * sizes < sizes.amax(1, keepdim=True))
    return not bool((2 * small.sum(1) >= given.sum(1).clamp(min=1)).any())


def lay_together(layers: Sequence[PerforatedConvolution]) -> None:
    """Move the packed weights of layers into one piece of memory, in their order.

    Weights of a whole network are read once in a pass, from memory: large pages help with that, and
    that no matrix of digits lies across pages.
    """
    sizes = [-(-layer.weights.nbytes // _MATRIX) * _MATRIX for layer in layers]
    memory = backend().empty((sum(sizes) + _PAGE) // 4).view(torch.int8)
    parts = memory[-memory.data_ptr() % _PAGE :][: sum(sizes)].split(sizes)
    for layer, part in zip(layers, parts, strict=True):
        weights = part[: layer.weights.nbytes].view(layer.weights.dtype)
        layer.weights = weights.copy_(layer.weights)


def layer_norm(
    out: Tensor,
    x: Tensor,
    listed: PixelList | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """Layer norm over the channels of the listed pixels of `x`, into `out` (which may be `x`).

    Args:
        out: (B, H, W, C).
        x: (B, H, W, C).
        listed: Default all pixels.
        weight: (C,); default ones.
        bias: (C,); default zeros.
        epsilon: Added to the variance.

    Returns:
        `out`.

    Raises:
        PagError: A shape, type, stride or index does not fit.
    """
    pixels, length = (None, None) if listed is None else listed
    _OPS.layer_norm(out, x, pixels, length, weight, bias, epsilon)
    return out


def interpolate(
    x: Tensor, listed: PixelList | None = None, *, activation: str = "none", slope: float = 0.01
) -> Tensor:
    """Interpolate the listed pixels of `x` linearly between those at even rows and columns.

    In place, as `pag_retrofit.functional.coarse` does; listed pixels at even rows and columns stay
    as they are.

    Args:
        x: (B, H, W, C).
        listed: Default all pixels.
        activation: One of `ACTIVATIONS`, of the interpolated pixels; default `"none"`.
        slope: Of `"leaky_relu"`; default 0.01.

    Returns:
        `x`.

    Raises:
        PagError: A shape, type, stride or index does not fit, or the activation is unknown.
    """
    pixels, length = (None, None) if listed is None else listed
    _OPS.interpolate(x, pixels, length, activation, slope)
    return x


def masked_mean(x: Tensor, listed: PixelList | None = None) -> Tensor:
    """Mean (B, C) of `x` (B, H, W, C) over each image's listed pixels; zero over none.

    Raises:
        PagError: A shape, type, stride or index does not fit.
    """
    pixels, length = (None, None) if listed is None else listed
    result: Tensor = _OPS.masked_mean(x, pixels, length)
    return result


def gate_mask(
    sources: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    offset: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
    upsampling: Sequence[int] | None = None,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
    computed: PixelList | None = None,
) -> Tensor:
    """Decide which pixels to compute: where weight . (scale * x) + bias >= 0.

    Args:
        sources: x (B, H, W, C), or up to six maps whose channels one after the other are x.
        weight: (C,).
        bias: (1,).
        stride: From one decided pixel to the next.
        offset: The first decided pixel.
        size: (h, w); default as many as fit into x.
        upsampling: Power of two by which each source is (nearest-neighbour) upsampled as it is
            read; default 1 each.
        scale: (B, C); default ones.
        keep: (1,) int64, read at each replay: open so many pixels of every image, those where the
            sum is largest, of equal ones the first. Default, and if negative: all of at least 0.
        activation: One of `ACTIVATIONS`, of x as it is read, if that is one map; default `"none"`.
        slope: Of `"leaky_relu"`; default 0.01.
        computed: Pixels of the one source that a convolution computed with `activate_if_all`: if
            they are all, x is activated already. Default: it is not.

    Returns:
        Bool (B, 1, h, w).

    Raises:
        PagError: A shape or type does not fit, or a decided pixel would not be in `x`.
    """
    maps = [sources] if isinstance(sources, Tensor) else list(sources)
    factors = [1] * len(maps) if upsampling is None else list(upsampling)
    if size is None:
        pairs = list(zip(maps, factors, strict=True))
        whole = [min(x.shape[axis] * factor for x, factor in pairs) for axis in (1, 2)]
        height, width = (
            -(-(n - o) // max(s, 1)) for n, o, s in zip(whole, offset, stride, strict=True)
        )
        size = (height, width)
    result: Tensor = _OPS.gate(
        maps, weight, bias, list(stride), list(offset), list(size), factors, scale, keep,
        activation, slope, None if computed is None else computed.length,
    )  # fmt: skip
    return result


def list_pixels(
    mask: Tensor, *, closed: bool = False, other: Tensor | None = None, operation: str = "and"
) -> PixelList:
    """List the pixels of a mask (B, 1, h, w), any type: those not zero, or the zero ones.

    Args:
        mask: Zero where a pixel is closed.
        closed: List the closed pixels.
        other: Another mask of the same shape, combined with the first; default none.
        operation: `"and"`, the default, or `"or"`.

    Raises:
        PagError: A mask has another shape, or the operation is unknown.
    """
    return PixelList(*_OPS.list_pixels(mask, not closed, other, operation))


def needed_inputs(
    mask: Tensor, window: Window, size: tuple[int, int], upsampling: int = 1
) -> Tensor:
    """Which pixels of a map a window operation reads for the open pixels of a mask.

    The same as `pag_retrofit.functional.needed_inputs`, for hard masks, and faster.

    Args:
        mask: (B, 1, h, w), any type.
        window: Of the operation.
        size: (H, W) of the map.
        upsampling: Power of two by which the map is (nearest-neighbour) upsampled before it is
            read; default 1.

    Returns:
        Bool (B, 1, H, W).

    Raises:
        PagError: The mask, window, size or upsampling is not valid.
    """
    flat = [number for pair in window[:4] for number in pair]
    result: Tensor = _OPS.needed_inputs(mask, flat, list(size), upsampling)
    return result


def combine(first: Tensor, second: Tensor | None, operation: str) -> Tensor:
    """Combine two bool masks of one shape.

    Args:
        first: A mask.
        second: Another one; None for "not".
        operation: `"and"`, `"or"` or `"not"`.
    """
    result: Tensor = visible().combine(first, second, operation)
    return result


def copy(out: Tensor, x: Tensor | None) -> None:
    """Copy a map, or a contiguous mask, into another one of its type and size, or zero it."""
    visible().copy(out, x)


def max_pool(out: Tensor, x: Tensor, window: Window) -> None:
    """Maximum over windows; what is outside of the map does not count.

    Args:
        out: (B, h, w, C).
        x: (B, H, W, C).
        window: Padding at the bottom and right is whatever the output's size asks for.
    """
    visible().max_pool(out, x, tuple(number for pair in window[:4] for number in pair))


def in_bands(stages: Sequence[int]) -> None:
    """Later passes may make the next calls a few rows at a time, while these are in the cache.

    Args:
        stages: How many calls there are of each, two to four stages of one to four. Those of a
            stage are convolutions that write one map, which nothing reads but those of the next
            stage; what is between need not be written. The last one may be a `max_pool`.
    """
    if recording() is not None:
        native.in_bands(stages)


def resize(out: Tensor, x: Tensor, rows: Taps, columns: Taps) -> None:
    """A whole map of another size, whose rows and columns are weighted sums of the given ones.

    Args:
        out: (B, h, w, C).
        x: (B, H, W, C).
        rows: Of which rows of `x` each of the h rows is made.
        columns: Of which columns each of the w columns is made.

    Raises:
        PagError: Taps lie outside of `x`, or are not those of `out`.
    """
    for taps, axis in ((rows, 1), (columns, 2)):
        taps.check(x.shape[axis], out.shape[axis])
    visible().resize(out, x, rows, columns)


def group_norm(
    out: Tensor,
    x: Tensor,
    groups: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    activation: str = "none",
    slope: float = 0.01,
) -> None:
    """Group norm of a whole map, as torch does it, and an activation.

    Args:
        out: (B, H, W, C).
        x: (B, H, W, C).
        groups: Of channels, a divisor of C; each is normalised over its channels and pixels.
        weight: (C,); default ones.
        bias: (C,); default zeros.
        epsilon: Added to the variance.
        activation: One of `ACTIVATIONS`, of the result.
        slope: Of `"leaky_relu"`.
    """
    visible().group_norm(out, x, groups, weight, bias, epsilon, activation, slope)


def activate(
    x: Tensor,
    activation: str,
    slope: float = 0.01,
    listed: PixelList | None = None,
    *,
    computed: PixelList | None = None,
) -> None:
    """Apply one of `ACTIVATIONS` to the listed pixels of a map (B, H, W, C), in place.

    Args:
        x: The map.
        activation: Which one.
        slope: Of `"leaky_relu"`; default 0.01.
        listed: Default all pixels.
        computed: Pixels that a convolution computed with `activate_if_all`: if they are all, this
            does nothing. Default: it does.
    """
    pixels, length = (None, None) if listed is None else listed
    done = None if computed is None else computed.length
    visible().activate(x, pixels, length, activation, slope, done)
