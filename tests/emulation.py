"""Kernels compiled for another processor, run by an emulator: see `runner.cpp` and `make arm`."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct
from types import ModuleType
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pag_retrofit.kernels import native

COMMAND = os.environ.get("PAG_RETROFIT_RUNNER", "")
_HEADER, _SEGMENT, _STATUS = Struct("4q"), Struct("Qq"), Struct("q")


class Runner:
    """A process that takes the place of the library."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(shlex.split(COMMAND), stdin=pipe, stdout=pipe)
        self.lock = threading.Lock()

    def call(self, kind: int, packed: bytes, *kept: Any) -> int:
        """What `native._call` does."""
        given, taken = self.process.stdin, self.process.stdout
        assert given is not None and taken is not None
        tensors = [x for x in pytree.tree_leaves(kept) if isinstance(x, Tensor)]
        storages = [x.untyped_storage() for x in tensors]
        memory = {(x.data_ptr(), x.nbytes()) for x in storages if x.nbytes()}
        header = _HEADER.pack(kind, len(packed), len(memory), torch.get_num_threads())
        with self.lock:
            given.write(header + packed)
            for address, size in memory:
                given.write(_SEGMENT.pack(address, size) + ctypes.string_at(address, size))
            given.flush()
            (status,) = _STATUS.unpack(_read(taken, _STATUS.size))
            for address, size in memory:
                ctypes.memmove(address, _read(taken, size), size)
        return int(status)


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    assert len(data) == size, "the runner ended"
    return data


@contextmanager
def emulated() -> Iterator[ModuleType]:
    """Have `native` call a runner inside the block."""
    runner, own = Runner(), native._call
    try:
        native._call = runner.call
        yield native
    finally:
        native._call = own
        runner.process.communicate()
