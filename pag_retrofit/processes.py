"""The processes of a launch."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """The state that all processes of a launch share; the first call connects them.

    Accelerate's own default connects processes on the CPU only if it is told that they are on
    the CPU; without that, each would train alone and all would write the same files.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def forget_precision(wanted: str) -> None:
    """Let the next `Accelerator` have another precision than the last one, which it refuses."""
    if is_initialized() and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
