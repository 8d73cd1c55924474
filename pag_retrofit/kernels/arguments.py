"""What the kernels ask of their arguments, checked once, before any address is taken.

Maps are NHWC, (B, H, W, C), float32, on the CPU, *dense-addressed*: one stride leads from each
pixel to the next, through rows and images. A channels_last tensor permuted to NHWC is such a map,
and so is a slice of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pag_retrofit.errors import PagError
from pag_retrofit.kernels.packing import (
    MOST_DEPTH_IN_DIGITS,
    STRIDED_SIDE,
    TRANSFORMED_PARTS,
    compressed_sizes,
    digits_sizes,
    packed_size,
)

ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "leaky_relu",
)
MAX_SOURCES = 6  # PAG_MAX_SOURCES of the C interface
MAX_PIXELS = 2**31 - 1  # what an int32 index can address
MAX_EXTENT = 2**24  # of an axis and of a window, so that int32 coordinates cannot overflow
_MOST_STRIDED_CHANNELS = 4  # an image's
WINOGRAD_WINDOWS = (
    "expected kernel 3x3 with stride 1, or 7x7 with stride 2, no dilation and at most "
    f"{_MOST_STRIDED_CHANNELS} channels; one group"
)


class ConvolutionArguments(NamedTuple):
    """The arguments of one convolution; see `pag_retrofit.kernels.PerforatedConvolution`.

    Args:
        out: (B, h, w, C'), written at listed pixels only.
        sources: 1 to 4 maps whose channels, one after the other, are the input.
        weights: Packed by `pack_weight`; int32 if compressed by `compress`, int8 if `in_digits`.
        bias: (C').
        pixels: int32, flat indices into (B, h, w), each at most once; None: every pixel.
        length: int32, one element: how many of `pixels` are valid; None: all.
        window: Kernel, stride, dilation and padding (top and left; negative: the first window
            starts inside), each vertical, horizontal.
        size: (H, W) of the input after upsampling.
        groups: Of the convolution.
        upsampling: Factor of each source, a power of two.
        activation: One of `ACTIVATIONS`.
        slope: Of `"leaky_relu"`.
        scale: (B, C'), multiplies the sums (bias included).
        input_scale: (B, C), multiplies the input; ungrouped convolutions only.
        residual: Shaped as `out`, or a power of two smaller in height and width and read
            upsampled (nearest); added at listed pixels.
        accumulate: Add what `out` holds, as a residual that is updated in place.
        residual_after: Add the residual after the activation instead of before.
        winograd: The weights are `transformed` before they were packed, or packed by
            `pack_strided`: see `takes_winograd`.
        activate_if_all: The activation is left out unless every pixel is listed.
    """

    out: Tensor
    sources: Sequence[Tensor]
    weights: Tensor
    bias: Tensor | None
    pixels: Tensor | None
    length: Tensor | None
    window: Sequence[int]
    size: Sequence[int]
    groups: int
    upsampling: Sequence[int]
    activation: str
    slope: float
    scale: Tensor | None
    input_scale: Tensor | None
    residual: Tensor | None
    accumulate: bool
    residual_after: bool
    winograd: bool
    activate_if_all: bool = False

    @property
    def compressed(self) -> bool:
        """Whether the weights are whole numbers of 24 bits."""
        return self.weights.dtype is torch.int32

    @property
    def in_digits(self) -> bool:
        """Whether the weights are such numbers in three digits."""
        return self.weights.dtype is torch.int8

    @property
    def strided(self) -> bool:
        """Whether the weights are packed by `pack_strided`."""
        return self.winograd and self.window[2] > 1

    @property
    def matrices(self) -> int:
        """How many matrices the weights are: one for each tap, or part of a tile."""
        if self.strided:
            return STRIDED_SIDE**2
        return TRANSFORMED_PARTS if self.winograd else self.window[0] * self.window[1]

    @property
    def residual_upsampling(self) -> int:
        """How many pixels of `out`, in a row, one of the residual is added to."""
        if self.residual is None:
            return 1
        return self.out.shape[1] // max(self.residual.shape[1], 1)


def takes_winograd(window: Sequence[int], groups: int, channels: int) -> bool:
    """Whether Winograd's algorithm can compute a convolution.

    That is a window of 3x3 with stride 1, or of 7x7 with stride 2, not dilated and on up to four
    channels, in one group.

    Args:
        window: Kernel, stride and dilation, each vertical, horizontal, and what follows.
        groups: Of the convolution.
        channels: Of its input.
    """
    small = tuple(window[:4]) == (3, 3, 1, 1)
    strided = tuple(window[:6]) == (7, 7, 2, 2, 1, 1) and channels <= _MOST_STRIDED_CHANNELS
    return groups == 1 and (small or strided)


def is_map(x: Tensor) -> bool:
    """Whether one stride leads from each pixel of (B, H, W, C) to the next."""
    return x.dim() == 4 and _found_stride(x) is not None


def _found_stride(x: Tensor) -> int | None:
    batch, height, width, channels = x.shape
    strides = x.stride()
    if width > 1:
        stride = strides[2]
    elif height > 1:
        stride = strides[1]
    else:
        stride = strides[0] if batch > 1 else channels
    fits = (
        (channels == 1 or strides[3] == 1)
        and stride >= channels
        and (height == 1 or strides[1] == width * stride)
        and (batch == 1 or strides[0] == height * width * stride)
    )
    return stride if fits else None


def pixel_stride(name: str, x: Tensor) -> int:
    """Floats from one pixel of a map to the next.

    Raises:
        PagError: It is not a dense-addressed float32 map on the CPU.
    """
    if x.dtype is not torch.float32 or x.device.type != "cpu" or x.dim() != 4:
        raise PagError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected float32 "
            "(B, H, W, C) on the CPU; convert it with .float().cpu()"
        )
    batch, height, width, _ = x.shape
    stride = _found_stride(x)
    if stride is None:
        raise PagError(
            f"{name} {tuple(x.shape)} has strides {x.stride()}: expected one stride from pixel to "
            "pixel and contiguous channels; make it contiguous, or slice its channels only"
        )
    if batch * height * width > MAX_PIXELS or max(height, width) > MAX_EXTENT:
        raise PagError(f"{name} {tuple(x.shape)} has too many pixels: run smaller batches or tiles")
    return stride


def check_vector(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse an operand that is not float32, contiguous, on the CPU, and of a shape.

    Raises:
        PagError: It is not.
    """
    if x is None:
        return
    if x.shape != shape or x.dtype is not torch.float32 or not x.is_contiguous() or not x.is_cpu:
        raise PagError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected contiguous float32 "
            f"{shape} on the CPU"
        )


def check_list(pixels: Tensor | None, length: Tensor | None) -> None:
    """Refuse a list that is not int32, contiguous and flat; the kernels check its entries.

    Raises:
        PagError: It is not, or there is a length without a list.
    """
    for name, x in (("pixels", pixels), ("length", length)):
        if x is None:
            continue
        if x.dtype is not torch.int32 or x.dim() != 1 or not x.is_contiguous() or not x.is_cpu:
            raise PagError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected contiguous int32 "
                "with one axis on the CPU, as list_pixels returns it"
            )
    if length is not None and (pixels is None or length.numel() != 1):
        raise PagError(
            f"length has {length.numel()} elements: expected one, and a list that it belongs to"
        )


def bad_list(pixels: Tensor | None, length: Tensor | None, dense: int) -> PagError:
    """The error that names what is wrong with a list for a map of `dense` pixels."""
    assert pixels is not None
    valid = pixels.numel() if length is None else int(length)
    if not 0 <= valid <= pixels.numel():
        return PagError(f"length={valid}: expected 0 to {pixels.numel()}, the entries of its list")
    listed = pixels[:valid]
    wrong = listed[(listed < 0) | (listed >= dense)]
    return PagError(
        f"pixels holds {int(wrong[0])}: expected flat indices from 0 to {dense - 1}; make the list "
        "from a mask of the map it is used on"
    )


def check_window(name: str, window: Sequence[int]) -> None:
    """Refuse a window that is not (kernel, stride, dilation, padding) in two directions each.

    Raises:
        PagError: It is not.
    """
    if (
        len(window) != 8
        or min(window[:6]) < 1
        or (max(window[0], window[1]) - 1) * max(window[4], window[5]) > MAX_EXTENT
        or max(*window[2:4], *map(abs, window[6:])) > MAX_EXTENT
    ):
        raise PagError(
            f"{name}={tuple(window)}: expected kernel, stride, dilation (all >= 1) and padding, "
            f"each vertical and horizontal and at most {MAX_EXTENT}"
        )


def check_convolution(a: ConvolutionArguments) -> None:
    """Refuse arguments with which a convolution would be meaningless or leave its buffers.

    Raises:
        PagError: A shape, type, stride or value does not fit; the message says which.
    """
    check_window("window", a.window)
    pixel_stride("out", a.out)
    batch, out_height, out_width, out_channels = a.out.shape
    channels = check_sources(a.sources, a.upsampling, batch, a.size)
    _check_groups(a, channels)
    if max(out_height * a.window[2], out_width * a.window[3], *a.size) > 2 * MAX_EXTENT:
        raise PagError(f"out {tuple(a.out.shape)} with stride {a.window[2:4]} is too large")
    if a.activation not in ACTIVATIONS:
        raise PagError(f"activation={a.activation!r}: expected one of {ACTIVATIONS}")
    if a.winograd and not takes_winograd(a.window, a.groups, channels):
        raise PagError(
            f"winograd with window={tuple(a.window)}, {channels} channels and groups={a.groups}: "
            f"{WINOGRAD_WINDOWS}"
        )
    _check_weights(a, channels)
    check_vector("bias", a.bias, (out_channels,))
    check_vector("scale", a.scale, (batch, out_channels))
    check_vector("input_scale", a.input_scale, (batch, channels))
    check_list(a.pixels, a.length)
    if a.residual is not None:
        pixel_stride("residual", a.residual)
        factor = a.residual_upsampling
        own_batch, height, width, own_channels = a.residual.shape
        shape = (own_batch, height * factor, width * factor, own_channels)
        if shape != tuple(a.out.shape) or factor.bit_count() != 1 or a.accumulate:
            raise PagError(
                f"residual {tuple(a.residual.shape)}: expected the shape of out "
                f"{tuple(a.out.shape)} or a power of two fewer rows and columns, and "
                "accumulate=False"
            )


def check_sources(
    sources: Sequence[Tensor], upsampling: Sequence[int], batch: int, size: Sequence[int]
) -> int:
    """Check the maps that are read; return their channels in all.

    Raises:
        PagError: They are too many or none, or one of them is no map or does not cover the size.
    """
    if not 1 <= len(sources) <= MAX_SOURCES or len(upsampling) != len(sources):
        raise PagError(
            f"{len(sources)} sources with {len(upsampling)} upsampling factors: expected 1 to "
            f"{MAX_SOURCES} sources and a factor for each"
        )
    channels = 0
    for source, factor in zip(sources, upsampling, strict=True):
        pixel_stride("source", source)
        own_batch, height, width, own_channels = source.shape
        channels += own_channels
        if factor < 1 or factor & (factor - 1) or factor > MAX_EXTENT:
            raise PagError(f"upsampling={factor}: expected a power of two")
        if own_batch != batch or height * factor < size[0] or width * factor < size[1]:
            raise PagError(
                f"a source {tuple(source.shape)}, upsampled {factor} times, does not cover a batch "
                f"of {batch} of size {tuple(size)}"
            )
    return channels


def _check_weights(a: ConvolutionArguments, channels: int) -> None:
    taps = a.matrices
    size = packed_size(a.out.shape[3], channels, a.groups, taps)
    if not a.compressed and not a.in_digits:
        return check_vector("weights", a.weights, (size,))
    made_by = "in_digits" if a.in_digits else "compress"
    if a.in_digits:
        size = digits_sizes(a.out.shape[3], channels, taps)[1]
    else:
        size = compressed_sizes(a.out.shape[3], size)[1]
    if a.weights.shape != (size,) or not a.weights.is_contiguous() or not a.weights.is_cpu:
        raise PagError(
            f"weights is {a.weights.dtype} {tuple(a.weights.shape)} on {a.weights.device}: "
            f"expected contiguous {(size,)} on the CPU, as {made_by} returns it"
        )
    if a.groups > 1:
        raise PagError(f"weights from {made_by} with groups={a.groups}: expected one group")
    if a.in_digits and taps * channels > MOST_DEPTH_IN_DIGITS:
        raise PagError(
            f"weights in digits of {taps} taps and {channels} channels: expected at most "
            f"{MOST_DEPTH_IN_DIGITS} of them together, so that sums fit 32 bits"
        )
    if a.in_digits and a.winograd:
        raise PagError("winograd with weights in digits: expected floats, or compressed ones")
    if a.strided:
        raise PagError("winograd with stride 2 and compressed weights: expected floats")


def _check_groups(a: ConvolutionArguments, channels: int) -> None:
    out_channels = a.out.shape[3]
    if (
        a.groups < 1
        or channels % a.groups
        or out_channels % a.groups
        or not channels * out_channels
    ):
        raise PagError(
            f"groups={a.groups}: expected a divisor of {channels} input and {out_channels} output "
            "channels, neither of them 0"
        )
    if a.groups > 1 and (len(a.sources) > 1 or a.input_scale is not None):
        raise PagError(
            f"groups={a.groups} with several sources or an input_scale: expected one source; "
            "concatenate or scale first"
        )


class Taps(NamedTuple):
    """Of which rows of a map the rows of a resized one are made; or columns.

    Args:
        first: Index of the first one, int32 (n,).
        weights: Of it and those after it, float32 (n, reach).
    """

    first: Tensor
    weights: Tensor

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Taps:
        """Those of a matrix (n, N) by which a column of N rows is multiplied."""
        there = matrix != 0
        begin = there.int().argmax(1)
        end = matrix.shape[1] - there.flip(1).int().argmax(1)
        count = int((end - begin).amax())
        first = begin.clamp(max=matrix.shape[1] - count)
        weights = matrix.gather(1, first[:, None] + torch.arange(count))
        return cls(first.int(), weights.float().contiguous())

    @property
    def reach(self) -> int:
        """How many each is made of."""
        return int(self.weights.shape[1])

    def check(self, size: int, out_size: int) -> None:
        """Compare them with the number of rows that are there and wanted.

        Raises:
            PagError: They read rows that are not there, or are not as many as wanted.
        """
        first, weights = self
        kinds = first.dtype is torch.int32 and weights.dtype is torch.float32
        shapes = first.shape == (out_size,) and weights.shape == (out_size, self.reach)
        if not (kinds and shapes and first.is_contiguous() and weights.is_contiguous()):
            raise PagError(
                f"taps: expected int32 ({out_size},) and float32 ({out_size}, reach), contiguous"
            )
        low, high = int(first.amin()), int(first.amax()) + self.reach
        if low < 0 or high > size:
            raise PagError(f"taps read rows {low} to {high - 1}, of {size} that are there")
