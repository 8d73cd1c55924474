"""Kernels for sparse execution on the CPU: convolutions evaluated at listed pixels only."""

from __future__ import annotations

from pag_retrofit.kernels.arguments import ACTIVATIONS
from pag_retrofit.kernels.native import instruction_set, use_instruction_set
from pag_retrofit.kernels.operators import backend, using
from pag_retrofit.kernels.perforated import (
    Epilogue,
    PerforatedConvolution,
    PixelList,
    gate_mask,
    interpolate,
    layer_norm,
    list_pixels,
    masked_mean,
    needed_inputs,
)

__all__ = [
    "ACTIVATIONS",
    "Epilogue",
    "PerforatedConvolution",
    "PixelList",
    "backend",
    "gate_mask",
    "instruction_set",
    "interpolate",
    "layer_norm",
    "list_pixels",
    "masked_mean",
    "needed_inputs",
    "use_instruction_set",
    "using",
]
