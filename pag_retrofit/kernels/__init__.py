"""Kernels for sparse execution on the CPU: convolutions evaluated at listed pixels only."""

from __future__ import annotations

from pag_retrofit.kernels.arguments import ACTIVATIONS, MAX_SOURCES, Taps
from pag_retrofit.kernels.native import instruction_set, replay, time_calls, use_instruction_set
from pag_retrofit.kernels.operators import backend, can_record, using, watched
from pag_retrofit.kernels.perforated import (
    Epilogue,
    PerforatedConvolution,
    PixelList,
    activate,
    combine,
    copy,
    gate_mask,
    group_norm,
    interpolate,
    lay_together,
    layer_norm,
    list_pixels,
    masked_mean,
    max_pool,
    needed_inputs,
    pool_at_once,
    prefers_compressed,
    prefers_digits,
    prefers_winograd,
    resize,
)
from pag_retrofit.kernels.tape import Tape, contiguous, is_open, record_on, recording

__all__ = [
    "ACTIVATIONS",
    "MAX_SOURCES",
    "Epilogue",
    "PerforatedConvolution",
    "PixelList",
    "Tape",
    "Taps",
    "activate",
    "backend",
    "can_record",
    "combine",
    "contiguous",
    "copy",
    "gate_mask",
    "group_norm",
    "instruction_set",
    "interpolate",
    "is_open",
    "lay_together",
    "layer_norm",
    "list_pixels",
    "masked_mean",
    "max_pool",
    "needed_inputs",
    "pool_at_once",
    "prefers_compressed",
    "prefers_digits",
    "prefers_winograd",
    "record_on",
    "recording",
    "replay",
    "resize",
    "time_calls",
    "use_instruction_set",
    "using",
    "watched",
]
