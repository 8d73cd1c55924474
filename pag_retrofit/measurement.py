"""Counting what a gated network computes, and forcing its masks for tests and benchmarks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pag_retrofit.errors import PagError
from pag_retrofit.functional import as_map, pattern_mask
from pag_retrofit.gates import (
    Gate,
    MaskOverride,
    NetworkTimes,
    named_gates,
    not_deployed,
    state_of,
)
from pag_retrofit.multipool import BranchSelector
from pag_retrofit.tracing import MacCounter


class Measurement:
    """Exact counts over all forward passes inside one `measure` block.

    Dense operations are counted as they run; for each gate the mask, its halos and its bypass
    say how many pixels each operation needs, as sparse execution would compute them.

    Attributes:
        images: Number of images.
        macs: Multiply-accumulates of the gated network, all images.
        total_macs: Those of the original network.
        open_rates: Site -> mean of its mask.
        masks: Site -> mask of the last forward pass, bool (B, 1, h, w), on the CPU; of a branch
            selector, the pixels that take more than the cheapest branch.
        branch_shares: Site of a branch selector -> factor on the dilation -> share of pixels that
            chose it; 0 is the identity (or a 1x1 branch), -1 all branches of an ASPP.
        branch_maps: Site of a branch selector -> factor that each pixel chose in the last forward
            pass, int64 (B, h, w), on the CPU.
        image_macs: MACs of each image of the last forward pass, float64 (B,), on the CPU.
        compute_map: MACs per input pixel of the last forward pass, float64 (B, H, W), on the
            CPU. What is computed densely is spread evenly; the sum is that pass's `macs`.
        time_fractions: Of each image of the last forward pass, float64 (B,), on the CPU: its time
            over that of the network without gates, told from what its sites compute; None if no
            `budget_in_time` measured what that takes.
    """

    def __init__(self, times: NetworkTimes | None = None) -> None:
        """Start at zero."""
        self.time_fractions: Tensor | None = None
        self._times = times
        self._time = 0.0
        self._ratios: dict[str, Tensor] = {}
        self.images = 0
        self.macs = 0
        self.total_macs = 0
        self.masks: dict[str, Tensor] = {}
        self.branch_maps: dict[str, Tensor] = {}
        self._chosen: dict[str, dict[int, int]] = {}
        self._open: dict[str, float] = {}
        self._pixels: dict[str, int] = {}
        self._charges: list[tuple[int, Tensor]] = []
        self._dense_macs = 0
        self.image_macs = torch.zeros(0, dtype=torch.float64)
        self._input_shape: tuple[int, ...] = ()
        self._pass: list[_Decision] = []

    @property
    def fraction(self) -> float:
        """Compute fraction: `macs / total_macs`.

        Raises:
            PagError: Nothing ran inside the block.
        """
        self._check_ran()
        return self.macs / self.total_macs

    @property
    def time_fraction(self) -> float | None:
        """Mean of `time_fractions` over all images."""
        self._check_ran()
        return self._time / self.images if self._times is not None else None

    @property
    def site_ratios(self) -> dict[str, float]:
        """Site -> its MACs over those of its operations with all pixels computed; the last pass.

        Sites inside others are left out.
        """
        return {site: float(ratios.mean()) for site, ratios in self._ratios.items()}

    @property
    def open_rates(self) -> dict[str, float]:
        """Mean of each site's mask over all images."""
        return {site: self._open[site] / self._pixels[site] for site in self._open}

    @property
    def branch_shares(self) -> dict[str, dict[int, float]]:
        """See the class; over all images."""
        return {
            site: {factor: n / self._pixels[site] for factor, n in counts.items()}
            for site, counts in self._chosen.items()
        }

    @property
    def compute_map(self) -> Tensor:
        """See the class.

        Raises:
            PagError: Nothing ran inside the block.
        """
        self._check_ran()
        batch, _, height, width = self._input_shape
        shape = (batch, height, width)
        total = torch.full(shape, self._dense_macs / math.prod(shape), dtype=torch.float64)
        for macs, where in self._charges:
            total += macs * _spread(where, shape)
        return total

    def _check_ran(self) -> None:
        if not self.images:
            raise PagError("nothing was measured: run the network inside the `with` block")

    def _start_pass(self, shape: tuple[int, ...]) -> None:
        self._pass = []
        self._input_shape = shape

    def _observe(self, gate: Gate, inputs: tuple[Any, ...], decision: Tensor) -> None:
        height, width = as_map(inputs[0], gate.layout).shape[2:]
        overhead = gate.overhead(decision)  # what ran depends on whether there is a gradient
        size = (int(height), int(width))
        self._pass.append(_Decision(gate, decision.detach().float(), size, overhead))

    def _finish_pass(self, executed_macs: int) -> None:
        """Turn what ran (everything, densely) into what was needed."""
        batch = self._input_shape[0]
        original, needed = executed_macs, torch.zeros(batch, dtype=torch.float64)
        self._charges = []
        dense = executed_macs
        choices = {seen.gate.site: seen.decision for seen in self._pass}
        for seen in self._pass:
            maps, _, out_height, out_width = seen.decision.shape
            original -= maps * seen.overhead
            dense -= maps * seen.overhead
            self._note(seen)
            if not seen.gate.inside:  # else the branch around it counts it
                full = maps * seen.gate.cost.full_macs(seen.size, (out_height, out_width))
                of_images = self._add_site(seen, choices)
                dense -= full
                needed += of_images
                self._ratios[seen.gate.site] = of_images * (batch / full)
        self._dense_macs = dense
        self.image_macs = needed + dense / batch
        if self._times is not None:
            self.time_fractions = self._times.fraction(self._ratios)
            self._time += float(self.time_fractions.sum())
        self.images += batch
        self.macs += dense + int(needed.sum())
        self.total_macs += original

    def _note(self, seen: _Decision) -> None:
        """Keep the mask and the branches of a decision."""
        site, mask = seen.gate.site, seen.gate.opened(seen.decision)
        self.masks[site] = mask.bool().cpu()
        self._open[site] = self._open.get(site, 0.0) + float(mask.double().sum())
        self._pixels[site] = self._pixels.get(site, 0) + mask.numel()
        if isinstance(seen.gate, BranchSelector):
            self.branch_maps[site] = chosen = seen.gate.factors_of(seen.decision).cpu()
            counts = self._chosen.setdefault(site, {})
            for factor in seen.gate.spec.factors:
                counts[factor] = counts.get(factor, 0) + int((chosen == factor).sum())

    def _add_site(self, seen: _Decision, choices: Mapping[str, Tensor]) -> Tensor:
        """Keep what a site computes and where; return its MACs in each image, float64 (B,)."""
        images = self._input_shape[0]
        total = torch.zeros(images, dtype=torch.float64)
        mask = seen.gate.site_mask(seen.decision)
        for macs, where in seen.gate.cost.charges(mask, seen.size, choices):
            counts = where.reshape(images, -1).sum(1, dtype=torch.float64).cpu()
            if macs and counts.any():
                total += macs * counts
                self._charges.append((macs, where.detach()))
        return total


class _Decision(NamedTuple):
    """What a gate decided in one forward pass, the size of its input, and its overhead."""

    gate: Gate
    decision: Tensor
    size: tuple[int, int]
    overhead: int


def _spread(where: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Share each pixel of a map (b, 1, h, w) out over the input pixels it covers; keeps sums.

    Tokens are laid out as the grid of the image's proportions that has as many, class tokens
    before it left out. Maps of other batches (windows) are spread evenly over their image.
    """
    batch, height, width = shape
    where = where.double().cpu()
    sums = where.reshape(batch, -1).sum(1)
    if where.shape[3] == 1 < width:
        where = _fold_tokens(where, height, width)
    if where.shape[0] != batch:
        where = where.new_ones(batch, 1, 1, 1)
    spread = F.interpolate(where, (height, width), mode="nearest-exact")[:, 0]
    totals = spread.sum((1, 2))
    spread[totals == 0] = 1.0
    return spread * (sums / spread.sum((1, 2)))[:, None, None]


def _fold_tokens(where: Tensor, height: int, width: int) -> Tensor:
    count = where.shape[2]
    for extra in range(min(8, count)):
        rows = round(math.sqrt((count - extra) * height / width))
        if rows and (count - extra) % rows == 0:
            columns = (count - extra) // rows
            if abs(rows / columns - height / width) < 0.1 * height / width:
                return where[:, :, extra:].reshape(-1, 1, rows, columns)
    return where


@contextlib.contextmanager
def measure(gated: nn.Module) -> Iterator[Measurement]:
    """Count the compute of every forward pass of a gated network inside the block.

    Works in evaluation and in training mode, and inside DistributedDataParallel if given the
    inner network; not on a network that `torch.compile` has wrapped (measure the one inside).

    Args:
        gated: A gated network.

    Yields:
        A `Measurement` that fills as the network runs.

    Raises:
        PagError: The network is not gated, or deployed; or a pass has no image (B, C, H, W).
    """
    result = Measurement(not_deployed(gated, "measured").times)
    counter = MacCounter()
    counted = [0]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        images = [a for a in tensors if a.dim() == 4 and len(a)]
        if not images:
            shapes = [tuple(a.shape) for a in tensors]
            raise PagError(f"nothing to measure: expected images (B, C, H, W), got {shapes}")
        result._start_pass(tuple(images[0].shape))
        counted[0] = counter.macs

    def after(_module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        with counter.paused():
            result._finish_pass(counter.macs - counted[0])

    def observe(gate: Gate, inputs: tuple[Any, ...], decision: Tensor) -> None:
        with counter.paused():
            result._observe(gate, inputs, decision)

    handles = [
        gated.register_forward_pre_hook(before, with_kwargs=True),
        gated.register_forward_hook(after),
    ]
    handles += [gate.register_forward_hook(observe) for _, gate in named_gates(gated)]
    try:
        with counter:
            yield result
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def override_gates(
    gated: nn.Module, density: float = 0.5, *, pattern: str = "blobs", seed: int = 0
) -> Iterator[None]:
    """Force made-up masks on all gates inside the block.

    A branch selector chooses the branch it started with at open pixels, and the cheapest one at
    closed ones.

    Args:
        gated: A gated network.
        density: Fraction of open pixels of every gate and image, in [0, 1].
        pattern: `"blobs"`, `"random"`, `"rows"`, `"all"` or `"none"`; see `pattern_mask`.
        seed: The same seed and shape give the same masks.

    Raises:
        PagError: The network is not gated, or an argument is not valid.
    """
    state_of(gated)
    pattern_mask(pattern, density, (1, 1, 1), seed)  # check before anything is changed
    gates = [gate for _, gate in named_gates(gated)]
    before = [gate.override for gate in gates]
    try:
        for gate in gates:
            gate.override = MaskOverride(density, pattern, seed)
        yield
    finally:
        for gate, override in zip(gates, before, strict=True):
            gate.override = override


@contextlib.contextmanager
def override_branches(gated: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Force random choices on all branch selectors inside the block; gates decide as before.

    Each pixel chooses any branch with the same probability. This goes before `override_gates`,
    which may be used together with it.

    Args:
        gated: A gated network.
        seed: The same seed and shape give the same choices.

    Raises:
        PagError: The network is not gated, or has no branch selector.
    """
    state_of(gated)
    selectors = [gate for _, gate in named_gates(gated) if isinstance(gate, BranchSelector)]
    if not selectors:
        raise PagError("the network has no branch selector: retrofit it with multipool")
    before = [selector.forced_seed for selector in selectors]
    try:
        for selector in selectors:
            selector.forced_seed = seed
        yield
    finally:
        for selector, forced in zip(selectors, before, strict=True):
            selector.forced_seed = forced
