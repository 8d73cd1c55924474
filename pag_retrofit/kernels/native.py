"""The compiled kernels, called through ctypes. Signatures, shapes and results as in `reference`.

Arguments are taken as they come: check them with `arguments` first. Only the entries of lists are
checked here, by the kernels themselves. Kernels run on up to `torch.get_num_threads()` threads and
may be called from several Python threads at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import time
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from struct import Struct, calcsize
from typing import Any

import torch
from torch import Tensor

from pag_retrofit.errors import PagError
from pag_retrofit.kernels.arguments import (
    ACTIVATIONS,
    MAX_SOURCES,
    ConvolutionArguments,
    Taps,
    bad_list,
    pixel_stride,
)
from pag_retrofit.kernels.tape import Tape, contiguous, is_open, recording

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx")
INSTRUCTION_SET_VARIABLE = "PAG_RETROFIT_INSTRUCTION_SET"
LIBRARY_VARIABLE = "PAG_RETROFIT_KERNELS"  # path of a library to load in place of the built one
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_FLOATS, _WHOLE_NUMBERS, _IN_DIGITS = range(3)  # of pag_weights
_NO_MEMORY = 3  # of pag_status; 1 and 2 are faults of a list
_NO_SCRATCH = "the native kernels got no memory for their scratch space"
_NO_SOURCES = (0,) * (6 * MAX_SOURCES)


MOST_STAGES, MOST_TOGETHER = 4, 4  # that are computed in bands, and calls of each

# The structures of interface.h, packed by hand: ctypes takes longer to fill one than small layers
# take to run.
_LIST = "PPq"
_CONVOLUTION = Struct("8i 8i 2i f 4i" + "Pq4i" * MAX_SOURCES + _LIST + "6P2qPq")
_ROWS = Struct("3i" + _LIST + "PqPq2Pf")
_CHANGED = Struct("4i" + _LIST + "PqPif")
_GATE = Struct("4i 4i 2i" + "Pq4i" * MAX_SOURCES + "7Pf")
_LISTING = Struct("2P3q2P")
_READING = Struct("6i8i2P")
_COMBINATION = Struct("3P2q")
_COPY = Struct("2P4q")
_POOL = Struct("6i8iPqPq")
_RESIZING = Struct("8i4PPqPq")
_GROUPING = Struct("4iPqPq2Pfif")
_BANDS = Struct(f"q{MOST_STAGES}q")
_CALL = Struct("qP")
_LARGE = 1 << 20  # bytes from which on large pages are worth asking for

KINDS = (
    "", "convolution", "layer norm", "mean", "interpolate", "gate", "list", "halo", "combine",
    "copy", "max pool", "activation", "resize", "group norm", "bands",
)  # of pag_kind  # fmt: skip
_CONVOLVE, _LAYER_NORM, _MEAN, _INTERPOLATE, _DECIDE = range(1, 6)
_LIST_PIXELS, _READ, _COMBINE, _COPY_BYTES, _MAX_POOL, _ACTIVATE, _RESIZE = range(6, 13)
_GROUP_NORM, _IN_BANDS = 13, 14
OPERATIONS = ("and", "or", "not")  # of pag_operation
_STRUCTURES = {
    _CONVOLVE: _CONVOLUTION,
    _LAYER_NORM: _ROWS,
    _MEAN: _ROWS,
    _INTERPOLATE: _CHANGED,
    _DECIDE: _GATE,
    _LIST_PIXELS: _LISTING,
    _READ: _READING,
    _COMBINE: _COMBINATION,
    _COPY_BYTES: _COPY,
    _MAX_POOL: _POOL,
    _ACTIVATE: _CHANGED,
    _RESIZE: _RESIZING,
    _GROUP_NORM: _GROUPING,
    _IN_BANDS: _BANDS,
}

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "pag_argument_bytes": (c_int64, [c_int]),
    "pag_instruction_set": (c_char_p, []),
    "pag_expands": (c_int, []),
    "pag_multiplies_digits": (c_int, []),
    "pag_use_instruction_set": (c_int, [c_char_p]),
    "pag_use_openmp": (None, [c_void_p]),
    "pag_run": (c_int, [c_void_p, c_int64, c_int]),
    "pag_use_large_pages": (None, [c_void_p, c_int64]),
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
        function = getattr(loaded, name, None)
        if function is None:
            raise PagError(
                f"the native kernels {path} are of another version: they lack {name}; install this "
                "package again"
            )
        function.restype, function.argtypes = result, arguments
    for kind, structure in _STRUCTURES.items():
        there, here = loaded.pag_argument_bytes(kind), -(-structure.size // 8) * 8
        if there != here:
            raise PagError(
                f"the native kernels {path} are of another version: they take {there} bytes for a "
                f"{KINDS[kind]}, expected {here}; install this package again"
            )
    # torch loads its OpenMP runtime for the whole process; where it is another one, the library
    # starts threads of its own.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    loaded.pag_use_openmp(ctypes.cast(parallel, c_void_p) if parallel else None)
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if wanted:
        _use(loaded, wanted)
    return loaded


def is_asked_for() -> bool:
    """Whether the environment names a library or an instruction set."""
    return bool(os.environ.get(LIBRARY_VARIABLE) or os.environ.get(INSTRUCTION_SET_VARIABLE))


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


def expands() -> bool:
    """Whether the instruction set in use reads compressed weights as fast as others.

    Raises:
        PagError: There is no compiled library.
    """
    return bool(library().pag_expands())


def multiplies_digits() -> bool:
    """Whether the instruction set in use multiplies matrices of digits.

    Raises:
        PagError: There is no compiled library.
    """
    return bool(library().pag_multiplies_digits())


def _use(loaded: ctypes.CDLL, name: str) -> None:
    if not loaded.pag_use_instruction_set(name.encode()):
        raise PagError(
            f"instruction set {name!r}: expected one of {INSTRUCTION_SETS} that this processor has"
        )


def _call(kind: int, packed: bytes, *kept: Any) -> int:
    """Run a kernel, and record that; its status."""
    buffer = ctypes.create_string_buffer(packed, len(packed))
    call = _CALL.pack(kind, ctypes.addressof(buffer))
    status: int = library().pag_run(call, 1, torch.get_num_threads())
    tape = recording()
    if tape is not None:
        tape.record(kind, packed, _pointers(kind), *kept)
    return status


@functools.cache
def _pointers(kind: int) -> tuple[int, ...]:
    """Where in the structure of a kind of call addresses are, bytes."""
    fields = re.findall(r"(\d*)([a-zA-Z])", _STRUCTURES[kind].format)
    each = "".join(letter * int(count or 1) for count, letter in fields)
    ends = [calcsize(each[: i + 1]) for i, letter in enumerate(each) if letter == "P"]
    return tuple(end - calcsize("P") for end in ends)


def replay(tape: Tape) -> None:
    """Do again what was recorded.

    Raises:
        MemoryError: There is no memory for scratch space.
    """
    run, threads = library().pag_run, torch.get_num_threads()

    def checked(address: int, count: int) -> None:
        if run(address, count, threads):
            raise MemoryError(_NO_SCRATCH)

    tape.replay(checked)


def time_calls(tape: Tape) -> list[tuple[str, tuple[Any, ...], float]]:
    """Replay, and time each call: its kind (of `KINDS`), what it was made of, seconds."""
    run, threads = library().pag_run, torch.get_num_threads()
    seconds: list[float] = []

    def timed(address: int, count: int) -> None:
        for index in range(count):
            begin = time.perf_counter()
            run(address + index * _CALL.size, 1, threads)
            seconds.append(time.perf_counter() - begin)

    tape.replay(timed)
    return [
        (KINDS[kind], kept, taken)
        for (kind, kept), taken in zip(tape.calls(), seconds, strict=True)
    ]


def empty(floats: int) -> Tensor:
    """Flat memory for a map, uninitialised."""
    flat = torch.empty(floats, dtype=torch.float32, device="cpu")
    if floats * flat.element_size() >= _LARGE:
        library().pag_use_large_pages(flat.data_ptr(), floats * flat.element_size())
    return flat


def convolution(a: ConvolutionArguments) -> None:
    """Convolve at listed pixels; see the arguments."""
    batch, out_height, out_width, out_channels = a.out.shape
    channels = sum(source.shape[3] for source in a.sources)
    out, out_stride = _map(a.out)
    residual, residual_stride = (out, out_stride) if a.accumulate else (0, 0)
    residual_shift = 0
    if a.residual is not None:
        residual, residual_stride = _map(a.residual)
        residual_shift = a.residual_upsampling.bit_length() - 1
    dense = batch * out_height * out_width
    steps, form = 0, _FLOATS
    if a.compressed or a.in_digits:  # they are the last words
        steps = a.weights.data_ptr() + a.weights.nbytes - 4 * out_channels
        form = _IN_DIGITS if a.in_digits else _WHOLE_NUMBERS
    packed = _CONVOLUTION.pack(
        batch, *a.size, out_height, out_width, channels, out_channels, a.groups,
        *a.window,
        _ACTIVATION_NUMBERS[a.activation], a.residual_after, a.slope, len(a.sources),
        a.winograd, a.activate_if_all, form,
        *_sources(a.sources, a.upsampling),
        *_list(a.pixels, a.length, dense),
        a.weights.data_ptr(), steps, _address(a.bias), _address(a.scale), _address(a.input_scale),
        residual, residual_stride, residual_shift, out, out_stride,
    )  # fmt: skip
    status = _call(_CONVOLVE, packed, a)
    if status:
        raise _error(status, a.pixels, a.length, dense)


def layer_norm(
    out: Tensor,
    x: Tensor,
    pixels: Tensor | None,
    length: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
) -> None:
    """Layer norm over the channels of listed pixels of `x` (B, H, W, C) into `out`, or in place."""
    rest = (*_map(out), _address(weight), _address(bias), epsilon)
    packed = _pack_rows(x, pixels, length, rest)
    status = _call(_LAYER_NORM, packed, out, x, pixels, length, weight, bias)
    if status:
        raise _error(status, pixels, length, x.shape[:3].numel())


def masked_mean(x: Tensor, pixels: Tensor | None, length: Tensor | None) -> Tensor:
    """Mean (B, C) of `x` (B, H, W, C) over each image's listed pixels; zero over none."""
    out = x.new_empty(x.shape[0], x.shape[3])
    packed = _pack_rows(x, pixels, length, (out.data_ptr(), 0, 0, 0, 0.0))
    status = _call(_MEAN, packed, out, x, pixels, length)
    if status:
        raise _error(status, pixels, length, x.shape[:3].numel())
    return out


def interpolate(
    x: Tensor, pixels: Tensor | None, length: Tensor | None, activation: str, slope: float
) -> None:
    """Fill listed pixels of `x` (B, H, W, C) from those at even rows and columns, activated."""
    _change(_INTERPOLATE, x, pixels, length, activation, slope, None)


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
    batch = len(sources[0])
    mask = torch.empty(batch, 1, *size, dtype=torch.bool, device="cpu")
    packed = _GATE.pack(
        batch, *size, weight.numel(), *stride, *offset,
        len(sources), _ACTIVATION_NUMBERS[activation], *_sources(sources, upsampling),
        _address(scale), weight.data_ptr(), bias.data_ptr(), _address(keep), mask.data_ptr(), 0,
        _address(computed), slope,
    )  # fmt: skip
    status = _call(_DECIDE, packed, sources, weight, bias, scale, keep, mask, computed)
    if status:
        raise MemoryError("no memory to rank the pixels of a gate")
    return mask


def list_pixels(
    mask: Tensor, wanted: bool, other: Tensor | None = None, operation: str = "and"
) -> tuple[Tensor, Tensor]:
    """Flat indices where a mask is, or is not, zero, padded with zeros, and how many they are.

    With another mask: where both ("and"), or one of them ("or"), are, or are not, zero.
    """
    mask, other = _bytes(mask), None if other is None else _bytes(other)
    pixels = torch.zeros(mask.numel(), dtype=torch.int32)
    found = torch.empty(1, dtype=torch.int32, device="cpu")
    packed = _LISTING.pack(
        mask.data_ptr(), _address(other), mask.numel(), wanted, OPERATIONS.index(operation),
        pixels.data_ptr(), found.data_ptr(),
    )  # fmt: skip
    _call(_LIST_PIXELS, packed, mask, pixels, found, other)
    return pixels, found


def needed_inputs(
    mask: Tensor, window: tuple[int, ...], size: tuple[int, int], upsampling: int = 1
) -> Tensor:
    """Bool (B, 1, H, W): pixels of a map that a window reads for the open pixels of a mask."""
    mask = _bytes(mask)
    batch, _, height, width = mask.shape
    needed = torch.empty(batch, 1, *size, dtype=torch.bool, device="cpu")
    packed = _READING.pack(
        batch, height, width, *size, upsampling.bit_length() - 1, *window,
        mask.data_ptr(), needed.data_ptr(),
    )  # fmt: skip
    _call(_READ, packed, mask, needed)
    return needed


def combine(first: Tensor, second: Tensor | None, operation: str) -> Tensor:
    """One of `OPERATIONS` on bool masks; `second` is None for "not"."""
    first = contiguous(first)
    second = first if second is None else contiguous(second)
    result = torch.empty_like(first)
    packed = _COMBINATION.pack(
        first.data_ptr(), second.data_ptr(), result.data_ptr(), first.numel(),
        OPERATIONS.index(operation),
    )  # fmt: skip
    _call(_COMBINE, packed, first, second, result)
    return result


def copy(out: Tensor, x: Tensor | None) -> None:
    """Copy a map, or a contiguous mask, into another one of its size, or zero it."""
    size = out.element_size()
    if out.is_contiguous() and (x is None or x.is_contiguous()):
        rows = (1, out.numel() * size, 0, 0)
    else:
        step = _map(out)[1]
        from_step = step if x is None else _map(x)[1]
        rows = (out.shape[:3].numel(), out.shape[3] * size, step * size, from_step * size)
    _call(_COPY_BYTES, _COPY.pack(out.data_ptr(), _address(x), *rows), out, x)


def max_pool(out: Tensor, x: Tensor, window: tuple[int, ...]) -> None:
    """Maximum over the windows of `x` (B, H, W, C), into `out` (B, h, w, C)."""
    batch, height, width, channels = x.shape
    packed = _POOL.pack(
        batch, height, width, *out.shape[1:3], channels, *window, *_map(x), *_map(out)
    )
    _call(_MAX_POOL, packed, out, x)


def in_bands(stages: Sequence[int]) -> None:
    """Replays may make the next calls a few rows at a time; see `kernels.in_bands`."""
    _call(_IN_BANDS, _BANDS.pack(len(stages), *stages, *(0,) * (MOST_STAGES - len(stages))))


def resize(out: Tensor, x: Tensor, rows: Taps, columns: Taps) -> None:
    """Weighted sums of rows and columns of `x` (B, H, W, C); see `kernels.resize`."""
    batch, height, width, channels = x.shape
    packed = _RESIZING.pack(
        batch, height, width, *out.shape[1:3], channels, rows.reach, columns.reach,
        rows.first.data_ptr(), columns.first.data_ptr(),
        rows.weights.data_ptr(), columns.weights.data_ptr(), *_map(x), *_map(out),
    )  # fmt: skip
    _call(_RESIZE, packed, out, x, *rows, *columns)


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
    batch, height, width, channels = x.shape
    packed = _GROUPING.pack(
        batch, height * width, channels, groups, *_map(x), *_map(out),
        _address(weight), _address(bias), epsilon, _ACTIVATION_NUMBERS[activation], slope,
    )  # fmt: skip
    if _call(_GROUP_NORM, packed, out, x, weight, bias):
        raise MemoryError(_NO_SCRATCH)


def activate(
    x: Tensor,
    pixels: Tensor | None,
    length: Tensor | None,
    activation: str,
    slope: float,
    computed: Tensor | None = None,
) -> None:
    """Activate listed pixels of `x` (B, H, W, C), in place; see `kernels.activate`."""
    _change(_ACTIVATE, x, pixels, length, activation, slope, computed)


def _change(
    kind: int,
    x: Tensor,
    pixels: Tensor | None,
    length: Tensor | None,
    activation: str,
    slope: float,
    computed: Tensor | None,
) -> None:
    dense = x.shape[:3].numel()
    packed = _CHANGED.pack(
        *x.shape, *_list(pixels, length, dense), *_map(x), _address(computed),
        _ACTIVATION_NUMBERS[activation], slope,
    )  # fmt: skip
    status = _call(kind, packed, x, pixels, length, computed)
    if status:
        raise _error(status, pixels, length, dense)


def _pack_rows(
    x: Tensor, pixels: Tensor | None, length: Tensor | None, rest: tuple[float, ...]
) -> bytes:
    batch, height, width, channels = x.shape
    dense = batch * height * width
    return _ROWS.pack(
        batch, height * width, channels, *_list(pixels, length, dense), *_map(x), *rest
    )


def _bytes(mask: Tensor) -> Tensor:
    """A mask as contiguous bytes, of which only zero and not zero matter."""
    return contiguous(mask if mask.dtype is torch.bool else is_open(mask))


def _sources(maps: Sequence[Tensor], upsampling: Sequence[int]) -> tuple[int, ...]:
    """The fields of all sources, those that are not there included."""
    fields: list[int] = []
    for source, factor in zip(maps, upsampling, strict=True):
        _, height, width, own = source.shape
        address, stride = _map(source)
        fields += (address, stride, own, height, width, factor.bit_length() - 1)
    return (*fields, *_NO_SOURCES[len(fields) :])


def _map(x: Tensor) -> tuple[int, int]:
    """Address and pixel stride of a map."""
    return x.data_ptr(), x.stride(2) if x.shape[2] > 1 else pixel_stride("map", x)


def _list(pixels: Tensor | None, length: Tensor | None, dense: int) -> tuple[int, int, int]:
    if pixels is None:
        return 0, 0, dense
    return pixels.data_ptr(), _address(length), pixels.numel()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _error(
    status: int, pixels: Tensor | None, length: Tensor | None, dense: int
) -> PagError | MemoryError:
    if status == _NO_MEMORY:
        return MemoryError(_NO_SCRATCH)
    return bad_list(pixels, length, dense)
