"""A gated network as one graph in which gates and masks are still to be seen.

While it is exported for deployment, each decision of a gate and each use of a mask becomes one
node, an operator of the namespace `pag_marker`; `lowering` turns the graph into steps that compute
listed pixels only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pag_retrofit.aliasing import spread_writes
from pag_retrofit.exported import inline_regions
from pag_retrofit.functional import (
    apply_mask,
    coarse,
    marking,
    mask_pool_input,
    mix,
    renormalize_pool,
)
from pag_retrofit.gates import Gate, PixelGate
from pag_retrofit.multipool import BranchSelector
from pag_retrofit.tracing import in_mode, quietly

_LIBRARY = torch.library.Library("pag_marker", "DEF")
_FUNCTIONS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "apply_mask": ("(Tensor x, Tensor mask) -> Tensor", apply_mask),
    "mix": ("(Tensor active, Tensor bypass, Tensor mask) -> Tensor", mix),
    "coarse": ("(Tensor x) -> Tensor", coarse),
    "mask_pool_input": ("(Tensor x, Tensor mask) -> Tensor", mask_pool_input),
    "renormalize_pool": ("(Tensor pooled, Tensor mask) -> Tensor", renormalize_pool),
}


def _define(name: str, schema: str, function: Callable[..., Tensor]) -> None:
    """Define an operator that gives a tensor of its own, as operators must."""
    plain = inspect.unwrap(function)

    def computed(*arguments: Tensor) -> Tensor:
        result: Tensor = plain(*arguments)
        return result.clone() if any(result is argument for argument in arguments) else result

    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, computed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pag_marker::{name}", computed, lib=_LIBRARY)


for _name, (_schema, _function) in _FUNCTIONS.items():
    _define(_name, _schema, _function)
_LIBRARY.define("decide(Tensor x, str site, int channels, int height, int width) -> Tensor")


@torch.library.register_fake("pag_marker::decide", lib=_LIBRARY)
def _(x: Tensor, site: str, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], channels, height, width, dtype=torch.float32)


class MarkedGate(nn.Module):
    """Stands for a gate while its network is exported.

    Args:
        gate: The gate or selector.
    """

    def __init__(self, gate: Gate):
        """Remember what the graph is to say of the gate."""
        super().__init__()
        self.cost, self.layout, self.site = gate.cost, gate.layout, gate.site
        self.channels = len(gate.spec.factors) if isinstance(gate, BranchSelector) else 1

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Give the mask (B, 1, h, w), or the choice (B, K, h, w), as one node."""
        if size is None:
            height, width = _spatial(x, self.layout)
            down, right = self.cost.stride
            size = (-(-height // down), -(-width // right))
        decision: Tensor = torch.ops.pag_marker.decide(x, self.site, self.channels, *size)
        return decision


def _spatial(x: Tensor, layout: str) -> tuple[int, int]:
    if layout == "BNC":
        return x.shape[1], 1
    return (x.shape[2], x.shape[3]) if layout == "BCHW" else (x.shape[1], x.shape[2])


def export_marked(
    gated: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """Export a gated network in evaluation mode, with one node per decision and per use of a mask.

    Raises:
        Exception: Whatever `torch.export` raises where it cannot follow the network.
    """
    marked = copy.deepcopy(gated)
    for module in list(marked.modules()):
        for name, child in module.named_children():
            if isinstance(child, PixelGate | BranchSelector):
                setattr(module, name, MarkedGate(child))
    with in_mode(marked), quietly(), marking(), torch.no_grad():
        exported = torch.export.export(marked, arguments, keywords, strict=False)
    inline_regions(exported.graph, exported.graph_module)
    spread_writes(exported.graph)
    return exported
