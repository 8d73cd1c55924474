"""The kernels in plain torch: what the native ones are tested against, and the fallback.

Signatures, shapes and results are those of `native`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pag_retrofit.functional import Window, coarse, largest
from pag_retrofit.functional import needed_inputs as soft_needed_inputs
from pag_retrofit.kernels.arguments import ConvolutionArguments, Taps, bad_list
from pag_retrofit.kernels.packing import (
    TRANSFORMED_SIDE,
    expand,
    from_digits,
    is_depthwise,
    unpack_strided,
    unpack_weight,
    untransformed,
)

_PIXELS_AT_ONCE = 4096  # bounds the gathered input


def convolution(a: ConvolutionArguments) -> None:
    """Convolve at listed pixels: gather what each reads, then multiply; see the arguments."""
    batch, height, width, out_channels = a.out.shape
    channels = sum(source.shape[3] for source in a.sources)
    weight = _weight(a, channels)
    listed = _listed(a.pixels, a.length, batch * height * width)
    for pixels in listed.split(_PIXELS_AT_ONCE):
        where = _coordinates(pixels, height, width)
        y = _multiply(_gather(a, where), weight, a.groups)
        if a.bias is not None:
            y = y + a.bias
        if a.scale is not None:
            y = y * a.scale[where[0]]
        added = _added(a, where)
        if added is not None and not a.residual_after:
            y = y + added
        if not a.activate_if_all or len(listed) == batch * height * width:
            y = activated(y, a.activation, a.slope)
        if added is not None and a.residual_after:
            y = y + added
        a.out[where] = y


def _weight(a: ConvolutionArguments, channels: int) -> Tensor:
    """The weight (out, in / groups, kh, kw) as it was before it was packed."""
    out_channels, packed = a.out.shape[3], a.weights
    if a.strided:
        return unpack_strided(packed, out_channels, channels)
    if a.compressed:
        packed = expand(packed, out_channels, channels, a.matrices)
    elif a.in_digits:
        packed = from_digits(packed, out_channels, channels, a.matrices)
    kernel = (TRANSFORMED_SIDE,) * 2 if a.winograd else (a.window[0], a.window[1])
    weight = unpack_weight(packed, out_channels, channels, a.groups, kernel)
    return untransformed(weight) if a.winograd else weight


def _added(a: ConvolutionArguments, where: tuple[Tensor, ...]) -> Tensor | None:
    """What a convolution adds at pixels, or None."""
    if a.accumulate:
        return a.out[where]
    if a.residual is None:
        return None
    image, y, x = where
    return a.residual[image, y // a.residual_upsampling, x // a.residual_upsampling]


def activated(x: Tensor, activation: str, slope: float) -> Tensor:
    """An activation by name; `slope` is that of `"leaky_relu"`."""
    if activation == "none":
        return x
    if activation == "leaky_relu":
        return F.leaky_relu(x, slope)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "sigmoid":
        return torch.sigmoid(x)
    result: Tensor = getattr(F, activation)(x)
    return result


def activate(
    x: Tensor,
    pixels: Tensor | None,
    length: Tensor | None,
    activation: str,
    slope: float,
    computed: Tensor | None = None,
) -> None:
    """Activate listed pixels of `x` (B, H, W, C), in place; see `kernels.activate`."""
    batch, height, width, _ = x.shape
    if computed is not None and int(computed) == batch * height * width:
        return
    where = _coordinates(_listed(pixels, length, batch * height * width), height, width)
    x[where] = activated(x[where], activation, slope)


def resize(out: Tensor, x: Tensor, rows: Taps, columns: Taps) -> None:
    """Weighted sums of rows and columns of `x` (B, H, W, C); see `kernels.resize`."""
    down, across = (
        taps.first.long()[:, None] + torch.arange(taps.reach) for taps in (rows, columns)
    )
    lines = torch.einsum("bytwc,yt->bywc", x[:, down], rows.weights)
    out.copy_(torch.einsum("byxtc,xt->byxc", lines[:, :, across], columns.weights))


def max_pool(out: Tensor, x: Tensor, window: tuple[int, ...]) -> None:
    """Maximum over the windows of `x` (B, H, W, C), into `out` (B, h, w, C)."""
    kernel, stride, dilation, (top, left) = (window[i : i + 2] for i in range(0, 8, 2))
    sizes = zip(out.shape[1:3], x.shape[1:3], kernel, stride, dilation, (top, left), strict=True)
    ends = [(n - 1) * s + (k - 1) * d + 1 - p - size for n, size, k, s, d, p in sizes]
    outside = (left, max(ends[1], 0), top, max(ends[0], 0))
    padded = F.pad(x.permute(0, 3, 1, 2), outside, value=-torch.inf)
    pooled = F.max_pool2d(padded, kernel, stride, 0, dilation)
    out.copy_(pooled[:, :, : out.shape[1], : out.shape[2]].permute(0, 2, 3, 1))


def layer_norm(
    out: Tensor,
    x: Tensor,
    pixels: Tensor | None,
    length: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
) -> None:
    """Layer norm over the channels of listed pixels of `x` (B, H, W, C) into `out`."""
    batch, height, width, channels = x.shape
    where = _coordinates(_listed(pixels, length, batch * height * width), height, width)
    out[where] = F.layer_norm(x[where], (channels,), weight, bias, epsilon)


def group_norm(
    out: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    activation: str,
    slope: float,
) -> None:
    """Group norm of `x` (B, H, W, C) into `out`, and an activation; see `kernels.group_norm`."""
    normed = F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, epsilon)
    out.copy_(activated(normed.permute(0, 2, 3, 1), activation, slope))


def interpolate(
    x: Tensor, pixels: Tensor | None, length: Tensor | None, activation: str, slope: float
) -> None:
    """Fill listed pixels of `x` (B, H, W, C) from those at even rows and columns, activated."""
    batch, height, width, _ = x.shape
    listed = _listed(pixels, length, batch * height * width)
    image, row, column = _coordinates(listed, height, width)
    between = (row % 2 + column % 2) > 0
    where = image[between], row[between], column[between]
    filled = coarse(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[where]
    x[where] = activated(filled, activation, slope)


def masked_mean(x: Tensor, pixels: Tensor | None, length: Tensor | None) -> Tensor:
    """Mean (B, C) of `x` (B, H, W, C) over each image's listed pixels; zero over none."""
    batch, height, width, channels = x.shape
    where = _coordinates(_listed(pixels, length, batch * height * width), height, width)
    total = x.new_zeros(batch, channels).index_add_(0, where[0], x[where])
    counts = torch.bincount(where[0], minlength=batch).clamp_min(1)
    return total / counts[:, None]


def gate(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int],
    offset: tuple[int, int],
    size: tuple[int, int],
    upsampling: Sequence[int],
    scale: Tensor | None,
    keep: Tensor | None,
    activation: str = "none",
    slope: float = 0.01,
    computed: Tensor | None = None,
) -> Tensor:
    """Mask, bool (B, 1, h, w): where weight . (scale * x) + bias >= 0 at strided pixels.

    x (B, H, W, C) are the channels of the sources, upsampled. If `keep` is not negative, so many
    pixels of each image instead, those where it is largest. x is activated first, unless all of its
    pixels were computed.
    """
    rows = torch.arange(size[0]) * stride[0] + offset[0]
    columns = torch.arange(size[1]) * stride[1] + offset[1]
    kept = torch.cat(
        [
            source[:, rows[:, None] // factor, columns // factor]
            for source, factor in zip(sources, upsampling, strict=True)
        ],
        dim=3,
    )
    if computed is None or int(computed) < sources[0].shape[:3].numel():
        kept = activated(kept, activation, slope)
    if scale is not None:
        kept = kept * scale[:, None, None]
    scores = (kept @ weight + bias)[:, None]
    if keep is not None and keep >= 0:
        return largest(scores, min(int(keep), size[0] * size[1])).bool()
    return scores >= 0


def list_pixels(
    mask: Tensor, wanted: bool, other: Tensor | None = None, operation: str = "and"
) -> tuple[Tensor, Tensor]:
    """Flat indices where a mask is, or is not, zero, padded with zeros, and how many they are.

    With another mask: where both ("and"), or one of them ("or"), are, or are not, zero.
    """
    if other is not None:
        mask = combine(mask != 0, other != 0, operation)
    found = ((mask != 0).flatten() == wanted).nonzero()[:, 0].int()
    pixels = torch.zeros(mask.numel(), dtype=torch.int32)
    pixels[: found.numel()] = found
    return pixels, torch.tensor([found.numel()], dtype=torch.int32)


def needed_inputs(
    mask: Tensor, window: tuple[int, ...], size: tuple[int, int], upsampling: int = 1
) -> Tensor:
    """Bool (B, 1, H, W): pixels of a map that a window reads for the open pixels of a mask."""
    kernel, stride, dilation, padding = ((window[i], window[i + 1]) for i in (0, 2, 4, 6))
    whole = (size[0] * upsampling, size[1] * upsampling)
    flat = Window(kernel, stride, dilation, padding)
    return F.max_pool2d(soft_needed_inputs((mask != 0).float(), flat, whole), upsampling) > 0


def combine(first: Tensor, second: Tensor | None, operation: str) -> Tensor:
    """`first` "and" `second`, `first` "or" `second`, or "not" `first`: bool masks."""
    if second is None:
        return ~first
    return first & second if operation == "and" else first | second


def copy(out: Tensor, x: Tensor | None) -> None:
    """Copy a map or mask into another one of its size, or fill that with zeros."""
    if x is None:
        out.zero_()
    else:
        out.copy_(x)


def empty(floats: int) -> Tensor:
    """Flat memory for a map, uninitialised."""
    return torch.empty(floats, dtype=torch.float32, device="cpu")


def _listed(pixels: Tensor | None, length: Tensor | None, dense: int) -> Tensor:
    if pixels is None:
        return torch.arange(dense)
    valid = pixels.numel() if length is None else int(length)
    listed = pixels[: max(valid, 0)].long()
    wrong = bool(((listed < 0) | (listed >= dense)).any())
    if wrong or not 0 <= valid <= pixels.numel():
        raise bad_list(pixels, length, dense)
    return listed


def _coordinates(pixels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of flat indices."""
    line = pixels // width
    return line // height, line % height, pixels % width


def _gather(a: ConvolutionArguments, where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What listed pixels read, (pixels, taps, channels), with zeros outside the input."""
    image, row, column = where
    kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, top, left = a.window
    taps = []
    for tap in range(kernel_y * kernel_x):
        y = row * stride_y - top + tap // kernel_x * dilation_y
        x = column * stride_x - left + tap % kernel_x * dilation_x
        inside = (y >= 0) & (y < a.size[0]) & (x >= 0) & (x < a.size[1])
        y, x = y.clamp(0, a.size[0] - 1), x.clamp(0, a.size[1] - 1)
        parts = [
            source[image, y // factor, x // factor]
            for source, factor in zip(a.sources, a.upsampling, strict=True)
        ]
        taps.append(torch.where(inside[:, None], torch.cat(parts, 1), 0.0))
    gathered = torch.stack(taps, 1)
    return gathered if a.input_scale is None else gathered * a.input_scale[image][:, None]


def _multiply(gathered: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Multiply (pixels, taps, channels) by a weight (out, in / groups, kh, kw)."""
    out_channels, own_channels = weight.shape[:2]
    pixels, taps, channels = gathered.shape
    if groups == 1:
        return gathered.flatten(1) @ weight.permute(2, 3, 1, 0).reshape(-1, out_channels)
    if is_depthwise(out_channels, channels, groups):
        return (gathered * weight[:, 0].flatten(1).t()).sum(1)
    split = gathered.reshape(pixels, taps, groups, own_channels)
    kernels = weight.reshape(groups, -1, own_channels, taps)
    return torch.einsum("ptgi,goit->pgo", split, kernels).reshape(pixels, out_channels)
