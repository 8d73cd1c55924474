"""The compiled kernels, called through ctypes. Signatures, shapes and results as in `reference`.

Arguments are taken as they come: check them with `arguments` first. Only the entries of lists are
checked here, by the kernels themselves. Kernels run on up to `torch.get_num_threads()` threads and
may be called from several Python threads at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from pag_retrofit.errors import PagError
from pag_retrofit.kernels.arguments import (
    ACTIVATIONS,
    MAX_SOURCES,
    ConvolutionArguments,
    bad_index,
    list_length,
    pixel_stride,
)

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
INSTRUCTION_SET_VARIABLE = "PAG_RETROFIT_INSTRUCTION_SET"
LIBRARY_VARIABLE = "PAG_RETROFIT_KERNELS"  # path of a library to load in place of the built one
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_OK, _BAD_INDEX = 0, 1


class _Source(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("stride", c_int64),
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("shift", c_int32),
    ]


class _List(ctypes.Structure):
    _fields_ = [("pixels", c_void_p), ("count", c_int64)]


_Sources = _Source * MAX_SOURCES
_Pair = c_int32 * 2
_Window = c_int32 * 8


class _Convolution(ctypes.Structure):
    _fields_ = [
        ("batch", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("out_height", c_int32),
        ("out_width", c_int32),
        ("channels", c_int32),
        ("out_channels", c_int32),
        ("groups", c_int32),
        ("window", _Window),
        ("activation", c_int32),
        ("residual_after_activation", c_int32),
        ("slope", c_float),
        ("source_count", c_int32),
        ("sources", _Sources),
        ("list", _List),
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("input_scale", c_void_p),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("batch", c_int32),
        ("pixels", c_int32),
        ("channels", c_int32),
        ("list", _List),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("epsilon", c_float),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [
        ("batch", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("out_height", c_int32),
        ("out_width", c_int32),
        ("channels", c_int32),
        ("stride", _Pair),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("mask", c_void_p),
    ]


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "pag_instruction_set": (c_char_p, []),
    "pag_use_instruction_set": (c_int, [c_char_p]),
    "pag_use_openmp": (None, [c_void_p]),
    "pag_convolve": (c_int, [POINTER(_Convolution), c_int]),
    "pag_layer_norm": (c_int, [POINTER(_Rows), c_int]),
    "pag_mean": (c_int, [POINTER(_Rows), c_int]),
    "pag_decide": (c_int, [POINTER(_Gate), c_int]),
    "pag_list_pixels": (c_int64, [c_void_p, c_int64, c_int, c_void_p]),
    "pag_needed_inputs": (
        None,
        [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32],
    ),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, loaded at the first call.

    Raises:
        PagError: It was not built, or cannot be loaded.
        PagError: The environment asks for an instruction set that is unknown or not there.
    """
    built = sorted(Path(__file__).parent.glob("_kernels*.so"))
    path = os.environ.get(LIBRARY_VARIABLE) or (str(built[0]) if built else "")
    try:
        loaded = ctypes.CDLL(path) if path else None
    except OSError as error:
        raise PagError(f"the native kernels {path} cannot be loaded: {error}") from error
    if loaded is None:
        raise PagError(
            "the native kernels were not built: expected a C++17 compiler at installation; install "
            "one (g++ or clang++) and then this package again"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    # torch loads its OpenMP runtime for the whole process; where it is another one, the library
    # starts threads of its own.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    loaded.pag_use_openmp(ctypes.cast(parallel, c_void_p) if parallel else None)
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if wanted:
        _use(loaded, wanted)
    return loaded


def instruction_set() -> str:
    """Name of the instruction set in use: one of `INSTRUCTION_SETS`.

    Raises:
        PagError: There is no compiled library.
    """
    name: bytes = library().pag_instruction_set()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Use another instruction set than the best one, in the whole process.

    Args:
        name: One of `INSTRUCTION_SETS`. The environment variable PAG_RETROFIT_INSTRUCTION_SET
            does the same from the start.

    Raises:
        PagError: The name is unknown, or the processor has no such instructions.
    """
    _use(library(), name)


def _use(loaded: ctypes.CDLL, name: str) -> None:
    if not loaded.pag_use_instruction_set(name.encode()):
        raise PagError(
            f"instruction set {name!r}: expected one of {INSTRUCTION_SETS} that this processor has"
        )


def convolution(a: ConvolutionArguments) -> None:
    """Convolve at listed pixels; see the arguments."""
    batch, out_height, out_width, out_channels = a.out.shape
    dense = batch * out_height * out_width
    sources = _Sources()
    channels = 0
    for i, (source, factor) in enumerate(zip(a.sources, a.upsampling, strict=True)):
        _, height, width, own_channels = source.shape
        channels += own_channels
        sources[i] = (
            source.data_ptr(),
            pixel_stride("source", source),
            own_channels,
            height,
            width,
            factor.bit_length() - 1,
        )
    out_stride = pixel_stride("out", a.out)
    out = a.out.data_ptr()
    residual, residual_stride = (out, out_stride) if a.accumulate else (None, 0)
    if a.residual is not None:
        residual = a.residual.data_ptr()
        residual_stride = pixel_stride("residual", a.residual)
    length = list_length(a.pixels, a.count, dense)
    call = _Convolution(
        batch,
        a.size[0],
        a.size[1],
        out_height,
        out_width,
        channels,
        out_channels,
        a.groups,
        tuple(a.window),
        _ACTIVATION_NUMBERS[a.activation],
        a.residual_after,
        a.slope,
        len(a.sources),
        sources,
        (_address(a.pixels), length),
        a.weights.data_ptr(),
        _address(a.bias),
        _address(a.scale),
        _address(a.input_scale),
        residual,
        residual_stride,
        out,
        out_stride,
    )
    status = library().pag_convolve(byref(call), torch.get_num_threads())
    _check(status, a.pixels, length, dense)


def layer_norm(
    out: Tensor,
    x: Tensor,
    pixels: Tensor | None,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
) -> None:
    """Layer norm over the channels of listed pixels of `x` (B, H, W, C) into `out`, or in place."""
    call, length, dense = _rows(x, pixels, count)
    call.out, call.out_stride = out.data_ptr(), pixel_stride("out", out)
    call.weight, call.bias, call.epsilon = _address(weight), _address(bias), epsilon
    _check(library().pag_layer_norm(byref(call), torch.get_num_threads()), pixels, length, dense)


def masked_mean(x: Tensor, pixels: Tensor | None, count: Tensor | None) -> Tensor:
    """Mean (B, C) of `x` (B, H, W, C) over each image's listed pixels; zero over none."""
    call, length, dense = _rows(x, pixels, count)
    out = x.new_empty(x.shape[0], x.shape[3])
    call.out = out.data_ptr()
    _check(library().pag_mean(byref(call), torch.get_num_threads()), pixels, length, dense)
    return out


def gate(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
    """Mask, bool (B, 1, h, w): where weight . x + bias >= 0 at strided pixels of (B, H, W, C)."""
    batch, height, width, channels = x.shape
    size = (height - 1) // stride[0] + 1, (width - 1) // stride[1] + 1
    mask = torch.empty(batch, 1, *size, dtype=torch.bool)
    call = _Gate(
        batch,
        height,
        width,
        *size,
        channels,
        stride,
        x.data_ptr(),
        pixel_stride("x", x),
        weight.data_ptr(),
        bias.data_ptr(),
        mask.data_ptr(),
    )
    library().pag_decide(byref(call), torch.get_num_threads())
    return mask


def list_pixels(mask: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Flat indices where a mask is, or is not, zero, and how many they are.

    What lies behind the valid entries of the list is not defined.
    """
    mask = _bytes(mask)
    pixels = torch.empty(mask.numel(), dtype=torch.int32)
    count = library().pag_list_pixels(mask.data_ptr(), mask.numel(), wanted, pixels.data_ptr())
    return pixels, torch.tensor([count], dtype=torch.int32)


def needed_inputs(mask: Tensor, window: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Bool (B, 1, H, W): input pixels that a window reads for the open pixels of a mask."""
    mask = _bytes(mask)
    batch, _, height, width = mask.shape
    needed = torch.empty(batch, 1, *size, dtype=torch.bool)
    library().pag_needed_inputs(
        mask.data_ptr(), batch, height, width, byref(_Window(*window)), needed.data_ptr(), *size
    )
    return needed


def _rows(x: Tensor, pixels: Tensor | None, count: Tensor | None) -> tuple[_Rows, int, int]:
    batch, height, width, channels = x.shape
    dense = batch * height * width
    length = list_length(pixels, count, dense)
    call = _Rows(batch, height * width, channels, (_address(pixels), length))
    call.x, call.x_stride = x.data_ptr(), pixel_stride("x", x)
    return call, length, dense


def _bytes(mask: Tensor) -> Tensor:
    """A mask as contiguous bytes, of which only zero and not zero matter."""
    return (mask if mask.dtype is torch.bool else mask != 0).contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(status: int, pixels: Tensor | None, length: int, dense: int) -> None:
    if status == _BAD_INDEX:
        assert pixels is not None
        raise bad_index(pixels, length, dense)
    if status != _OK:
        raise MemoryError("the native kernels got no memory for their scratch space")
