"""Weights that lie in a file, and in memory only while somebody reads them.

A deployed network needs the weights it was made from again only when it meets a new input shape;
between, its packed weights are all it reads.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import tempfile

import torch
from torch import Tensor, nn

_LEAST = 1 << 14  # elements; smaller tensors stay where they are


class MappedWeights:
    """The large float32 weights of a network, moved into a temporary file without a name.

    The network stays usable and its weights writable: the system reads them from the file when
    they are touched. Where no file can be written they stay in memory.

    Args:
        network: Its parameters and buffers are moved.
    """

    def __init__(self, network: nn.Module):
        """Write the file, and point the network's tensors into it."""
        self._mapping: mmap.mmap | None = None
        weights = [
            x
            for x in (*network.parameters(), *network.buffers())
            if x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() >= _LEAST
        ]
        sizes = [weight.numel() for weight in weights]
        self._any = bool(weights)
        if not weights:
            return
        try:
            with tempfile.TemporaryFile(prefix="pag_retrofit-") as file:
                for weight in weights:
                    file.write(_flat(weight).numpy().tobytes())
                file.flush()
                self._mapping = mmap.mmap(file.fileno(), 4 * sum(sizes))
        except OSError:
            return
        parts = torch.frombuffer(self._mapping, dtype=torch.float32).split(sizes)
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part.view(weight.shape)

    def leave_memory(self) -> None:
        """Give back the memory of the weights, and what else is free, to the system."""
        if not self._any:
            return
        gc.collect()  # exported graphs are cycles that hold as much as the network
        if self._mapping is not None and hasattr(self._mapping, "madvise"):
            self._mapping.madvise(mmap.MADV_DONTNEED)
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
            if trim is not None:
                trim(0)


def _flat(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().flatten()
