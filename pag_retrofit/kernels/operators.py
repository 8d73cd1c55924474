"""The kernels as `torch.library` operators, namespace `pag_retrofit`.

Each checks its arguments, then runs the native kernel, or the reference where there is none. They
change only what their schema says, so `torch.compile` and `torch.export` may hold them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pag_retrofit.errors import PagError
from pag_retrofit.kernels import native, reference
from pag_retrofit.kernels.arguments import (
    ACTIVATIONS,
    MAX_EXTENT,
    MAX_PIXELS,
    ConvolutionArguments,
    check_convolution,
    check_list,
    check_sources,
    check_vector,
    check_window,
    pixel_stride,
)

_LIBRARY = torch.library.Library("pag_retrofit", "DEF")
_LIBRARY.define(
    "convolution(Tensor(a!) out, Tensor[] sources, Tensor weights, Tensor? bias, Tensor? pixels, "
    "Tensor? length, int[] window, int[] size, int groups, int[] upsampling, str activation, "
    "float slope, Tensor? scale, Tensor? input_scale, Tensor? residual, bool accumulate, "
    "bool residual_after, bool winograd, bool activate_if_all=False) -> ()"
)
_LIBRARY.define(
    "layer_norm(Tensor(a!) out, Tensor x, Tensor? pixels, Tensor? length, Tensor? weight, "
    "Tensor? bias, float epsilon) -> ()"
)
_LIBRARY.define(
    "interpolate(Tensor(a!) x, Tensor? pixels, Tensor? length, str activation, float slope) -> ()"
)
_LIBRARY.define("masked_mean(Tensor x, Tensor? pixels, Tensor? length) -> Tensor")
_LIBRARY.define(
    "gate(Tensor[] sources, Tensor weight, Tensor bias, int[] stride, int[] offset, int[] size, "
    "int[] upsampling, Tensor? scale, Tensor? keep, str activation='none', float slope=0.01, "
    "Tensor? computed=None) -> Tensor"
)
_LIBRARY.define(
    "list_pixels(Tensor mask, bool wanted, Tensor? other=None, str operation='and') "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define("needed_inputs(Tensor mask, int[] window, int[] size, int upsampling=1) -> Tensor")


_CHOSEN: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="auto")


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Compute with a backend inside the block, in this thread.

    Args:
        name: `"cpu"` for the native kernels, `"reference"` for plain torch, `"auto"` for the
            native ones where they are there.

    Raises:
        PagError: `"cpu"`, and there are no native kernels.
    """
    if name == "cpu":
        native.library()
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def backend() -> ModuleType:
    """The module that computes."""
    return reference if _CHOSEN.get() == "reference" else _best_backend()


@functools.cache
def _best_backend() -> ModuleType:
    """`native`, or where that is not there `reference`, and a warning."""
    try:
        native.library()
    except PagError as error:
        if native.is_asked_for():
            raise
        warnings.warn(f"sparse execution uses plain torch, which is slower: {error}", stacklevel=2)
        return reference
    return native


def can_record() -> bool:
    """Whether a forward pass may be recorded: native kernels, and nobody looks at operators."""
    return backend() is native and not watched()


def visible() -> ModuleType:
    """The module that computes, or plain torch where somebody looks at operators."""
    return reference if watched() else backend()


def watched() -> bool:
    """Whether somebody looks at operators: a compiler or a dispatch mode."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


@torch.library.impl(_LIBRARY, "convolution", "CPU")
def _convolution(*arguments: Any) -> None:
    checked = ConvolutionArguments(*arguments)
    check_convolution(checked)
    backend().convolution(checked)


def convolve(*arguments: Any, checked: bool = False) -> None:
    """Call the operator `convolution`, or straight what it runs where nobody looks at operators.

    Passing the dispatcher takes longer than a small layer does, and so do the checks: `checked`
    leaves them out where an earlier call had the same types, shapes and strides. The entries of a
    list are checked in any case.
    """
    if checked:
        backend().convolution(ConvolutionArguments(*arguments))
        return
    if watched() or type(arguments[0]) is not Tensor:
        torch.ops.pag_retrofit.convolution(*arguments)
    else:
        _convolution(*arguments)


@torch.library.impl(_LIBRARY, "layer_norm", "CPU")
def _layer_norm(
    out: Tensor,
    x: Tensor,
    pixels: Tensor | None,
    length: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
) -> None:
    pixel_stride("out", out)
    pixel_stride("x", x)
    if out.shape != x.shape:
        raise PagError(f"out is {tuple(out.shape)}: expected the shape of x, {tuple(x.shape)}")
    check_list(pixels, length)
    check_vector("weight", weight, (x.shape[3],))
    check_vector("bias", bias, (x.shape[3],))
    backend().layer_norm(out, x, pixels, length, weight, bias, epsilon)


@torch.library.impl(_LIBRARY, "interpolate", "CPU")
def _interpolate(
    x: Tensor, pixels: Tensor | None, length: Tensor | None, activation: str, slope: float
) -> None:
    pixel_stride("x", x)
    check_list(pixels, length)
    if activation not in ACTIVATIONS:
        raise PagError(f"activation={activation!r}: expected one of {ACTIVATIONS}")
    backend().interpolate(x, pixels, length, activation, slope)


@torch.library.impl(_LIBRARY, "masked_mean", "CPU")
def _masked_mean(x: Tensor, pixels: Tensor | None, length: Tensor | None) -> Tensor:
    pixel_stride("x", x)
    check_list(pixels, length)
    result: Tensor = backend().masked_mean(x, pixels, length)
    return result


@torch.library.impl(_LIBRARY, "gate", "CPU")
def _gate(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    offset: Sequence[int],
    size: Sequence[int],
    upsampling: Sequence[int],
    scale: Tensor | None,
    keep: Tensor | None,
    activation: str = "none",
    slope: float = 0.01,
    computed: Tensor | None = None,
) -> Tensor:
    batch = len(sources[0]) if sources else 0
    channels = check_sources(sources, upsampling, batch, (0, 0))
    check_vector("weight", weight, (channels,))
    check_vector("bias", bias, (1,))
    check_vector("scale", scale, (batch, channels))
    if keep is not None and (keep.shape != (1,) or keep.dtype != torch.int64):
        raise PagError(f"keep is {keep.dtype} {tuple(keep.shape)}: expected int64 (1,)")
    if activation not in ACTIVATIONS:
        raise PagError(f"activation={activation!r}: expected one of {ACTIVATIONS}")
    if activation != "none" and len(sources) > 1:
        raise PagError(f"activation={activation!r} of {len(sources)} sources: expected one source")
    if computed is not None and (computed.shape != (1,) or computed.dtype != torch.int32):
        raise PagError(f"computed is {computed.dtype} {tuple(computed.shape)}: expected int32 (1,)")
    _check_grid(sources, upsampling, stride, offset, size)
    result: Tensor = backend().gate(
        sources, weight, bias, tuple(stride), tuple(offset), tuple(size), upsampling, scale, keep,
        activation, slope, computed,
    )  # fmt: skip
    return result


def _check_grid(
    sources: Sequence[Tensor],
    upsampling: Sequence[int],
    stride: Sequence[int],
    offset: Sequence[int],
    size: Sequence[int],
) -> None:
    pairs = {"stride": stride, "offset": offset, "size": size}
    if any(len(pair) != 2 for pair in pairs.values()) or min(*stride, *size) < 1 or min(offset) < 0:
        raise PagError(f"{pairs}: expected pairs, stride and size >= 1, offset >= 0")
    last = [o + (n - 1) * s for o, n, s in zip(offset, size, stride, strict=True)]
    for x, factor in zip(sources, upsampling, strict=True):
        if last[0] >= x.shape[1] * factor or last[1] >= x.shape[2] * factor:
            raise PagError(
                f"{pairs}: the last pixel is at {tuple(last)}, expected inside x "
                f"{tuple(x.shape)}, upsampled by {factor}"
            )


@torch.library.impl(_LIBRARY, "list_pixels", "CPU")
def _list_pixels(
    mask: Tensor, wanted: bool, other: Tensor | None = None, operation: str = "and"
) -> tuple[Tensor, Tensor]:
    _check_mask(mask)
    if other is not None and (other.shape != mask.shape or operation not in ("and", "or")):
        raise PagError(
            f"other is {tuple(other.shape)}, operation={operation!r}: expected the shape of mask, "
            f"{tuple(mask.shape)}, and 'and' or 'or'"
        )
    result: tuple[Tensor, Tensor] = backend().list_pixels(mask, wanted, other, operation)
    return result


@torch.library.impl(_LIBRARY, "needed_inputs", "CPU")
def _needed_inputs(
    mask: Tensor, window: Sequence[int], size: Sequence[int], upsampling: int = 1
) -> Tensor:
    _check_mask(mask)
    check_window("window", window)
    if len(size) != 2 or min(size) < 1 or mask.shape[0] * size[0] * size[1] > MAX_PIXELS:
        raise PagError(f"size={tuple(size)}: expected the input's height and width, both >= 1")
    if upsampling < 1 or upsampling & (upsampling - 1) or upsampling * max(size) > MAX_EXTENT:
        raise PagError(
            f"upsampling={upsampling}: expected a power of two, and at most {MAX_EXTENT} pixels "
            "along each axis of the upsampled map"
        )
    result: Tensor = backend().needed_inputs(mask, tuple(window), tuple(size), upsampling)
    return result


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 4 or mask.shape[1] != 1 or not mask.is_cpu or mask.numel() > MAX_PIXELS:
        raise PagError(
            f"mask is {tuple(mask.shape)} on {mask.device}: expected (B, 1, h, w) on the CPU, at "
            f"most {MAX_PIXELS} pixels"
        )


@torch.library.register_fake("pag_retrofit::convolution", lib=_LIBRARY)
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("pag_retrofit::layer_norm", lib=_LIBRARY)
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("pag_retrofit::interpolate", lib=_LIBRARY)
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("pag_retrofit::masked_mean", lib=_LIBRARY)
def _(x: Tensor, pixels: Tensor | None, length: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[3])


@torch.library.register_fake("pag_retrofit::gate", lib=_LIBRARY)
def _(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    offset: Sequence[int],
    size: Sequence[int],
    upsampling: Sequence[int],
    scale: Tensor | None,
    keep: Tensor | None,
    activation: str = "none",
    slope: float = 0.01,
    computed: Tensor | None = None,
) -> Tensor:
    return weight.new_empty(sources[0].shape[0], 1, *size, dtype=torch.bool)


@torch.library.register_fake("pag_retrofit::list_pixels", lib=_LIBRARY)
def _(
    mask: Tensor, wanted: bool, other: Tensor | None = None, operation: str = "and"
) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.numel(), dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


@torch.library.register_fake("pag_retrofit::needed_inputs", lib=_LIBRARY)
def _(mask: Tensor, window: Sequence[int], size: Sequence[int], upsampling: int = 1) -> Tensor:
    return mask.new_empty(mask.shape[0], 1, *size, dtype=torch.bool)
