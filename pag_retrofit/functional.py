"""The maths of pixel-wise attentional gating, as functions of tensors. Shapes are NCHW."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pag_retrofit.errors import PagError

PATTERNS = ("blobs", "random", "rows", "all", "none")


_MARKING = contextvars.ContextVar("marking", default=False)


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Call the operators of `markers` in place of the functions that use masks."""
    token = _MARKING.set(True)
    try:
        yield
    finally:
        _MARKING.reset(token)


def _marked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function one node of an exported graph, inside `marking`."""

    @functools.wraps(function)
    def wrapper(*args: Tensor) -> Tensor:
        if _MARKING.get():
            marked: Tensor = getattr(torch.ops.pag_marker, function.__name__)(*args)
            return marked
        return function(*args)

    return wrapper


def _traced_as_call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function one node of any fx graph, also when a gated network is traced again."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        proxy = next((argument for argument in args if isinstance(argument, fx.Proxy)), None)
        if proxy is None:
            return function(*args)
        return proxy.tracer.create_proxy("call_function", wrapper, args, {})  # type: ignore

    return wrapper


class Window(NamedTuple):
    """What one output pixel of a convolution or pooling reads, as (vertical, horizontal) pairs.

    Of a MultiPool convolution, what it reads at dilation 1; `selector` then names whose choice
    multiplies the dilation of a pixel, by one of `factors`.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]  # at the top and at the left
    selector: str = ""
    factors: tuple[int, ...] = ()


POINTWISE = Window((1, 1), (1, 1), (1, 1), (0, 0))


def dilated(window: Window, factor: int) -> Window:
    """The window of a convolution that keeps the size, with its dilation times a factor.

    A factor of zero leaves the centre, which is what a collapsed kernel and the identity read.
    """
    if factor == 0:
        return Window((1, 1), window.stride, (1, 1), (0, 0))
    dilation = (window.dilation[0] * factor, window.dilation[1] * factor)
    padding = tuple((window.kernel[axis] - 1) * dilation[axis] // 2 for axis in (0, 1))
    return Window(window.kernel, window.stride, dilation, (padding[0], padding[1]))


def selector_window(stride: tuple[int, int]) -> Window:
    """What a branch selector reads: the 3x3 neighbours among the pixels that a stride keeps."""
    return Window((3, 3), stride, stride, stride)


def sample_mask(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Draw a hard mask with a straight-through gradient.

    The hard Gumbel-softmax of two classes (Jang et al., arXiv 1611.01144; Kong & Fowlkes,
    section 3) depends on the difference of the two logits alone, and the difference of two
    Gumbel variables is logistic. Here the temperature scales the noise as well as the relaxation,
    P(mask = 1) = sigmoid(logits / temperature): as it falls, the masks of training become those
    of evaluation, logits >= 0, and a network never meets masks that it was not trained with.

    Args:
        logits: Compute minus skip, any shape.
        temperature: > 0.

    Returns:
        Exactly 0 or 1, of the shape and dtype of `logits`.
    """
    uniform = torch.rand_like(logits, dtype=torch.float32)
    uniform = uniform.clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)
    noise = uniform.log() - torch.log1p(-uniform)
    soft = torch.sigmoid(logits / temperature + noise)
    hard = (soft >= 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly zero


def largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the pixels with the largest scores, the same number in every image.

    Args:
        scores: (B, 1, H, W).
        count: Of pixels, at most H * W.

    Returns:
        Float32 (B, 1, H, W), with `count` ones per image; of equal scores those that come first.
    """
    flat = scores.flatten(1)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.float32)
    # One selection, not a sort: maps have up to millions of pixels.
    last = flat.kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = flat > last, flat == last
    left = count - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= left))).float().view(scores.shape)


def sample_choice(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Draw one of K classes per pixel with a straight-through gradient.

    The hard Gumbel-softmax (Jang et al., arXiv 1611.01144). As in `sample_mask`, the temperature
    scales the noise as well as the relaxation: P(class) = softmax(logits / temperature).

    Args:
        logits: (B, K, H, W).
        temperature: > 0.

    Returns:
        Exactly one-hot along the second axis, of the shape and dtype of `logits`.
    """
    uniform = torch.rand_like(logits, dtype=torch.float32)
    uniform = uniform.clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)
    gumbel = -(-uniform.log()).log()
    soft = torch.softmax(logits / temperature + gumbel, 1)
    return one_hot_maximum(soft).to(soft.dtype) + (soft - soft.detach())  # the bracket is zero


def one_hot_maximum(scores: Tensor) -> Tensor:
    """One-hot map of the largest of the classes (B, K, H, W); the first one of equals."""
    return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)


def bernoulli_kl(target: Tensor | float, probability: Tensor) -> Tensor:
    """KL(Bernoulli(target) || Bernoulli(probability)), elementwise, in nats.

    The paper's sparsity loss (Kong & Fowlkes, section 3). Both sides are kept 1e-6 away from
    0 and 1.
    """
    q = probability.clamp(1e-6, 1 - 1e-6)
    p = torch.as_tensor(target, dtype=q.dtype, device=q.device).clamp(1e-6, 1 - 1e-6)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def needed_inputs(
    mask: Tensor,
    window: Window,
    size: tuple[int, int],
    choices: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Which input pixels a window operation reads to compute the output pixels of a mask.

    Args:
        mask: (B, 1, h, w), non-negative; hard, or soft (then the largest value that needs a
            pixel is taken).
        window: Of the operation.
        size: (H, W) of its input.
        choices: Selector -> (B, K, h, w), one-hot or probabilities; for a MultiPool convolution,
            whose selector has to read pixels too.

    Returns:
        (B, 1, H, W).
    """
    if window.selector:
        choice = choices[window.selector]
        needed = [needed_inputs(mask, selector_window(window.stride), size)]
        needed += [
            needed_inputs(mask * choice[:, k : k + 1], dilated(window, factor), size)
            for k, factor in enumerate(window.factors)
        ]
        return torch.stack(needed).amax(0)
    if window.stride != (1, 1):
        dot = mask.new_ones(1, 1, 1, 1)
        mask = F.conv_transpose2d(mask, dot, stride=window.stride)  # zeros between the pixels
    borders: list[int] = []
    for axis in (1, 0):  # F.pad starts with the last axis
        reach = (window.kernel[axis] - 1) * window.dilation[axis]
        before = reach - window.padding[axis]
        borders += [before, size[axis] + reach - before - mask.shape[2 + axis]]
    mask = F.pad(mask, borders)
    if window.kernel == (1, 1):
        return mask
    return F.max_pool2d(mask, window.kernel, stride=1, dilation=window.dilation)


@_traced_as_call
@_marked
def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Zero the closed pixels of `x`; its layout and the mask's agree, see `mask_as`."""
    if not mask.requires_grad:  # what is not finite stays out, as where it is not computed
        return torch.where(mask > 0, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x * mask.to(x.dtype)


@_traced_as_call
@_marked
def mix(active: Tensor, bypass: Tensor, mask: Tensor) -> Tensor:
    """Take `active` at open pixels and `bypass` at closed ones; the mask gets a gradient."""
    if not mask.requires_grad:
        return torch.where(mask > 0, active, bypass)
    mask = mask.to(active.dtype)
    return mask * active + (1 - mask) * bypass  # exact at both values, unlike a difference


@_traced_as_call
def computed_mask(choice: Tensor) -> Tensor:
    """Pixels (B, 1, H, W) that chose any branch but the first, of a choice (B, K, H, W)."""
    return choice[:, 1:].sum(1, keepdim=True)


@_traced_as_call
def computed_choice(choice: Tensor) -> Tensor:
    """The choice (B, K - 1, H, W) among the other branches, given that it is not the first.

    Pixels that chose the first one get the second: they are computed only where everything is
    (in training), for the sake of batch statistics. The gradient is that of the conditional
    probability, so the product with `computed_mask` has the gradient of the choice itself.
    """
    others = choice[:, 1:]
    computed = others.sum(1, keepdim=True)
    second = torch.zeros_like(others)
    second[:, 0] = 1
    return torch.where(computed > 0, others / computed.clamp_min(0.5), second)


@_traced_as_call
@_marked
def mask_pool_input(x: Tensor, mask: Tensor) -> Tensor:
    """Prepare `x` for a reduction over computed pixels only; see `renormalize_pool`."""
    return apply_mask(x, mask.detach())


@_traced_as_call
@_marked
def renormalize_pool(pooled: Tensor, mask: Tensor) -> Tensor:
    """Turn the mean over all pixels of a masked map into the mean over its open pixels.

    With every pixel open this divides by exactly one. With none open the result is zero.

    Args:
        pooled: (B, ...), any shape.
        mask: (B, 1, H, W).
    """
    share = mask.detach().float().mean((1, 2, 3)).reshape(-1, *([1] * (pooled.dim() - 1)))
    smallest = 1 / (mask.shape[2] * mask.shape[3])
    return (pooled / share.clamp_min(smallest)).to(pooled.dtype)


@_traced_as_call
def subsample(
    x: Tensor,
    stride: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Keep every stride-th pixel of `x` (B, C, H, W), from an offset on, `size` of them.

    The offset is made smaller where the map would end too early.
    """
    if size is not None:
        ends = [
            n - 1 - (count - 1) * s for n, count, s in zip(x.shape[2:], size, stride, strict=True)
        ]
        offset = (min(offset[0], ends[0]), min(offset[1], ends[1]))
    if stride != (1, 1) or offset != (0, 0):
        x = x[:, :, offset[0] :: stride[0], offset[1] :: stride[1]]
    return x if size is None else x[:, :, : size[0], : size[1]]


@_marked
def coarse(x: Tensor) -> Tensor:
    """Replace all pixels but every second one of every second row by linear interpolation.

    Args:
        x: (B, C, H, W). The last row or column of an even size repeats its neighbour.
    """
    return _interpolate(_interpolate(x, 2), 3)


def _interpolate(x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    kept = x[(slice(None),) * axis + (slice(None, None, 2),)]
    following = torch.cat(
        [kept.narrow(axis, 1, kept.shape[axis] - 1), kept.narrow(axis, -1, 1)], axis
    )
    between = (kept + following) / 2
    return torch.stack([kept, between], axis + 1).flatten(axis, axis + 1).narrow(axis, 0, size)


@_traced_as_call
def as_map(x: Tensor, layout: str) -> Tensor:
    """View a tensor of a layout as (B, C, H, W); N tokens become N rows of one pixel."""
    if layout == "BHWC":
        return x.permute(0, 3, 1, 2)
    return x.transpose(1, 2).unsqueeze(-1) if layout == "BNC" else x


@_traced_as_call
def mask_as(mask: Tensor, layout: str) -> Tensor:
    """Bring a mask (B, 1, H, W) into a layout, so that it multiplies a tensor of that layout."""
    if layout == "BHWC":
        return mask.permute(0, 2, 3, 1)
    return mask.flatten(2).transpose(1, 2) if layout == "BNC" else mask


def pattern_mask(pattern: str, density: float, shape: tuple[int, int, int], seed: int) -> Tensor:
    """A made-up mask with exactly `round(density * H * W)` open pixels per image.

    Args:
        pattern: `"blobs"` (smooth regions, at the same place of the image at any resolution),
            `"random"` pixels, `"rows"` (whole rows, the last one maybe cut), `"all"`, `"none"`.
        density: Fraction of open pixels, in [0, 1]; not looked at for `"all"` and `"none"`.
        shape: (B, H, W).
        seed: The same seed and shape give the same mask.

    Returns:
        (B, 1, H, W), float32, on the CPU.

    Raises:
        PagError: The pattern is unknown, the density is not a fraction, or the seed no integer.
    """
    if pattern not in PATTERNS:
        raise PagError(f"pattern={pattern!r}: expected one of {PATTERNS}")
    if not isinstance(seed, int):
        raise PagError(f"seed={seed!r}: expected an integer")
    if not (isinstance(density, int | float) and 0 <= density <= 1):
        raise PagError(f"density={density!r}: expected a fraction in [0, 1]")
    batch, height, width = shape
    if pattern in ("all", "none"):
        return torch.full((batch, 1, height, width), float(pattern == "all"))
    generator = torch.Generator().manual_seed(seed)
    if pattern == "random":
        score = torch.rand(batch, height * width, generator=generator)
    elif pattern == "rows":
        order = torch.rand(batch, height, generator=generator).argsort().argsort()
        score = (order[:, :, None] - torch.arange(width) / width).flatten(1)
    else:
        coarse = torch.randn(batch, 1, 9, 12, generator=generator)
        score = F.interpolate(coarse, (height, width), mode="bicubic").flatten(1)
    count = round(density * height * width)
    mask = torch.zeros(batch, height * width)
    mask.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :count], 1.0)
    return mask.reshape(batch, 1, height, width)
