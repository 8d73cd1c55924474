"""Calls of the native kernels, recorded once and replayed without Python in between.

A forward pass of a deployed network makes the same calls each time, on memory that stays where it
is. Preparing a call in Python takes longer than a small layer, so the first pass records them.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import Any

import torch
from torch import Tensor

_CALL = Struct("qP")  # pag_call
_POINTER = Struct("P")
_VERSION = operator.attrgetter("_version")
_ALIGNMENT = 8

_RECORDING: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("tape", default=None)


class Tape:
    """What one forward pass did, in order.

    All that is written here looks into memory at fixed addresses; the tape keeps it.
    """

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        self._kinds: list[int] = []
        self._packed: list[bytes] = []
        self._pointers: list[Sequence[int]] = []
        self._kept: list[tuple[Any, ...]] = []
        self._between: list[tuple[int, Callable[[], Any]]] = []
        self._first: list[Callable[[], Any]] = []
        self._read: dict[int, Tensor] = {}
        self._copied: list[Tensor] = []
        self._calls: Any = None
        self._segments: list[tuple[int, int, Callable[[], Any] | None]] = []

    def record(self, kind: int, packed: bytes, pointers: Sequence[int], *kept: Any) -> None:
        """Add a call.

        Args:
            kind: Of the call (`pag_kind`).
            packed: Its arguments.
            pointers: Where in them addresses are, bytes.
            kept: What owns the memory that the arguments point to.
        """
        self._kinds.append(kind)
        self._packed.append(packed)
        self._pointers.append(pointers)
        self._kept.append(kept)

    def calls(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Kind of each call, and what owns its memory."""
        return zip(self._kinds, self._kept, strict=True)

    def then(self, function: Callable[[], Any], *read: Tensor) -> None:
        """Add a Python function, called between the calls before and after, and what it reads."""
        self._between.append((len(self._kinds), function))
        self._copied += read

    def first(self, function: Callable[[], Any], *read: Tensor) -> None:
        """Add a function that `prepare` calls, and the tensors that it reads."""
        self._first.append(function)
        self._read |= {id(x): x for x in read}

    def version(self) -> int:
        """Higher after a tensor was changed that functions of `first` read."""
        return sum(map(_VERSION, self._read.values()))

    @property
    def last(self) -> int:
        """Index of the call that was recorded last."""
        return len(self._kinds) - 1

    def finish(self) -> None:
        """Lay the calls out as the native code reads them."""
        self._offsets, size = [], 0
        for packed in self._packed:
            self._offsets.append(size)
            size += -(-len(packed) // _ALIGNMENT) * _ALIGNMENT
        self._arguments = ctypes.create_string_buffer(max(size, 1))
        for index, packed in enumerate(self._packed):
            ctypes.memmove(self._address(index), packed, len(packed))
        self._calls = ctypes.create_string_buffer(max(len(self._kinds), 1) * _CALL.size)
        for index, kind in enumerate(self._kinds):
            _CALL.pack_into(self._calls, index * _CALL.size, kind, self._address(index))
        begin, address = 0, ctypes.addressof(self._calls)
        for at, function in [*self._between, (len(self._kinds), None)]:
            self._segments.append((address + begin * _CALL.size, at - begin, function))
            begin = at

    def pointers_into(self, memory: Tensor, call: int | None = None) -> list[tuple[int, int]]:
        """Where arguments point into the memory of a tensor: byte among all, and how far in.

        Args:
            memory: The tensor, without gaps.
            call: Index of the one to look at; default all.
        """
        begin = memory.data_ptr()
        end = begin + memory.numel() * memory.element_size()
        found = []
        for index, (offset, packed, pointers) in enumerate(
            zip(self._offsets, self._packed, self._pointers, strict=True)
        ):
            if call not in (None, index):
                continue
            for at in pointers:
                (address,) = _POINTER.unpack_from(packed, at)
                if begin <= address < end:
                    found.append((offset + at, address - begin))
        return found

    def reads_by_python(self, memory: Tensor) -> bool:
        """Whether a function of `then` reads the memory of a tensor, which `aim` cannot move."""
        begin = memory.data_ptr()
        end = begin + memory.numel() * memory.element_size()
        return any(begin <= tensor.data_ptr() < end for tensor in self._copied)

    def aim(self, pointers: Sequence[tuple[int, int]], address: int) -> None:
        """Let replays use other memory where `pointers_into` found some."""
        for at, inside in pointers:
            _POINTER.pack_into(self._arguments, at, address + inside)

    def prepare(self) -> None:
        """Call what has to be called before a replay once gates have changed."""
        for function in self._first:
            function()

    def replay(self, run: Callable[[int, int], Any]) -> None:
        """Do all of it again.

        Args:
            run: Called with the address of calls and how many there are.
        """
        for address, count, then in self._segments:
            if count:
                run(address, count)
            if then is not None:
                then()

    def _address(self, index: int) -> int:
        return ctypes.addressof(self._arguments) + self._offsets[index]


def recording() -> Tape | None:
    """The tape that calls of this thread are recorded on."""
    return _RECORDING.get()


@contextlib.contextmanager
def record_on(tape: Tape) -> Iterator[None]:
    """Record what is called inside the block, in this thread."""
    token = _RECORDING.set(tape)
    try:
        yield
    finally:
        _RECORDING.reset(token)
    tape.finish()


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`, also in replays."""
    if not x.numel():
        return x.new_empty(x.shape)  # what holds nothing is contiguous whatever its strides
    if x.is_contiguous():
        return x
    copy = x.contiguous()
    tape = recording()
    if tape is not None:
        tape.then(lambda: copy.copy_(x), x)
    return copy


def is_open(mask: Tensor) -> Tensor:
    """`mask != 0`, also in replays."""
    result = torch.ne(mask, 0)
    tape = recording()
    if tape is not None:
        tape.then(lambda: result.copy_(torch.ne(mask, 0)), mask)
    return result
