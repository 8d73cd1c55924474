"""Calibration: logit offsets that make the measured compute fraction equal a budget."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pag_retrofit.errors import BudgetError, PagError
from pag_retrofit.gates import (
    Gate,
    PixelGate,
    named_gates,
    not_deployed,
    state_of,
    turn_dials,
)
from pag_retrofit.measurement import measure
from pag_retrofit.tracing import in_mode

logger = logging.getLogger(__name__)

MODES = ("average", "per_image")
TOLERANCE = 0.005
"""A calibrated fraction further from its budget than this (0.5 points) is warned about."""

_FIRST_STEP = 0.25
_MOST_TRIALS = 20


def calibrate(
    gated: nn.Module, batches: Iterable[Tensor], budgets: Sequence[float] | None = None
) -> dict[float, float]:
    """Find, per budget, the offset added to every gate's logit that meets it on given images.

    One offset for all gates acts as a price per pixel: gates whose decision is clear keep it. A
    branch selector has it added to the logits of the branches that cost more than the cheapest.
    It is found by bisection on the measured fraction, which later gates' inputs depend on
    earlier masks for. Each budget becomes an operating point of the network, saved with it; the
    last one asked for is set, in the mode of `set_budget` that was.

    Args:
        gated: A gated network, trained; evaluated here in evaluation mode.
        batches: Input tensors (B, C, H, W), prepared as for evaluation; kept in memory.
        budgets: Fractions of the compute, or of the time after `budget_in_time`; default the
            budget of the retrofit.

    Returns:
        Budget -> fraction measured on the batches. One that is more than 0.5 points off is
        logged as a warning (gates that were never trained cannot tell pixels apart).

    Raises:
        BudgetError: A budget is not in (0, 1] or below the floor.
        PagError: There is no batch, or something else than tensors in it; the network is not gated,
            or deployed, or its gates are overridden.

    A call that raises leaves the network as it was.
    """
    state = not_deployed(gated, "calibrated")
    budgets = [state.budget] if budgets is None else _budgets(budgets)
    for budget in budgets:
        if not 0 < budget <= 1 or budget < state.lowest_budget:
            raise BudgetError(
                f"budgets contains {budget!r}: expected fractions from the floor "
                f"{state.lowest_budget:.3f} to 1"
            )
    images, mode = _images(batches), budget_mode(gated)
    if not images or not budgets:
        raise PagError("batches or budgets is empty: expected at least one of each")
    if any(gate.override is not None for _, gate in named_gates(gated)):
        raise PagError("the gates are overridden: calibrate outside of override_gates()")
    found = {}
    with _unchanged_if_it_fails(gated):
        for _, gate in named_gates(gated):
            gate.rate = None
        for budget in budgets:
            turn_dials(gated, budget)
            with in_mode(gated):
                found[float(budget)] = _search(gated, images, budget)
    reached = {}
    for budget, (offset, fraction, rates) in found.items():
        state.operating_points[budget] = offset
        state.open_rates[budget] = rates
        reached[budget] = fraction
        sure = budget == 1 and min(rates.values()) == 1  # gates cost something, too
        if abs(fraction - budget) > TOLERANCE and not sure:
            logger.warning(
                "calibrated to %.3f of the compute instead of %.3f: the gates do not tell enough "
                "pixels apart; train them longer",
                fraction,
                budget,
            )
    set_budget(gated, budgets[-1], mode)
    return reached


def _budgets(budgets: Sequence[float]) -> list[float]:
    if isinstance(budgets, Sequence) and not isinstance(budgets, str):
        if all(isinstance(budget, int | float) for budget in budgets):
            return list(budgets)
    raise BudgetError(f"budgets={budgets!r}: expected a list of fractions, such as [0.9, 0.7]")


def _images(batches: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(batches, Tensor):
        raise PagError(
            f"batches is a tensor of shape {tuple(batches.shape)}: expected a list of such batches"
        )
    if not isinstance(batches, Iterable):
        raise PagError(f"batches={batches!r}: expected a list of tensors (B, C, H, W)")
    images: list[Tensor] = []
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise PagError(
                f"batches has a {type(batch).__name__} in it: expected tensors alone, such as "
                "[image for image, label in loader]"
            )
        if not torch.isfinite(batch).all():
            raise PagError(f"batches[{len(images)}] holds values that are not finite")
        images.append(batch.detach())
    return images


@contextlib.contextmanager
def _unchanged_if_it_fails(gated: nn.Module) -> Iterator[None]:
    """Give gates back what steers them."""
    before = [
        (gate, gate.rate, {name: x.clone() for name, x in gate.named_buffers(recurse=False)})
        for _, gate in named_gates(gated)
    ]
    try:
        yield
    except BaseException:
        for gate, rate, buffers in before:
            gate.rate = rate
            for name, x in buffers.items():
                gate.get_buffer(name).copy_(x)
        Gate.changes += 1
        raise


def set_budget(gated: nn.Module, budget: float, mode: str = "average") -> None:
    """Switch a calibrated network to another compute budget.

    Args:
        gated: A gated network, or a deployed one.
        budget: One of its operating points.
        mode: `"average"` meets the budget over many images: hard ones take more. `"per_image"`
            lets every gate open the same number of pixels in each image, those with the largest
            logits, for steady latency: what a gate opened on average in calibration. What is left
            of a difference between images is halos.

    Raises:
        BudgetError: The network was not calibrated for the budget.
        PagError: The mode is unknown, or the network has gates that do not rank pixels.
    """
    if mode not in MODES:
        raise PagError(f"mode={mode!r}: expected one of {MODES}")
    state = state_of(gated)
    if not isinstance(budget, int | float) or budget not in state.operating_points:
        raise BudgetError(
            f"budget={budget!r}: calibrated budgets are {sorted(state.operating_points)}; run "
            "calibrate(gated, batches, budgets=...) for others"
        )
    state.active_budget = float(budget)
    turn_dials(gated, budget)
    _set_offset(gated, state.operating_points[budget])
    rates = _rates_per_image(gated, budget) if mode == "per_image" else {}
    for site, gate in named_gates(gated):
        gate.rate = rates.get(site)


def budget_mode(gated: nn.Module) -> str:
    """The mode that `set_budget` was called with last."""
    rated = any(gate.rate is not None for _, gate in named_gates(gated))
    return "per_image" if rated else "average"


def _rates_per_image(gated: nn.Module, budget: float) -> dict[str, float]:
    """Share of its pixels that each gate is to open in every image.

    Raises:
        PagError: A gate does not rank pixels, or the rates were not measured.
    """
    for site, gate in named_gates(gated):
        if type(gate) is not PixelGate:
            raise PagError(
                f"mode='per_image': {site} has a {type(gate).__name__}, which does not rank "
                "pixels; use mode='average'"
            )
    rates = state_of(gated).open_rates.get(budget)
    if rates is None:
        raise PagError(
            "mode='per_image': the network was calibrated by an older release; run "
            "calibrate(gated, batches) again"
        )
    return rates


def _search(
    gated: nn.Module, images: list[Tensor], budget: float
) -> tuple[float, float, dict[str, float]]:
    """Find an offset by bracketing and bisection.

    Returns:
        The closest one, its fraction, and the open rate of each gate there.
    """
    rates: dict[float, dict[str, float]] = {}

    def fraction_at(offset: float) -> float:
        _set_offset(gated, offset)
        fraction, rates[offset] = measured_fraction(gated, images)
        return fraction

    tried = {0.0: fraction_at(0.0)}
    for _ in range(_MOST_TRIALS):
        if min(abs(fraction - budget) for fraction in tried.values()) < TOLERANCE / 5:
            break
        offset = _next_offset(tried, budget)
        tried[offset] = fraction_at(offset)
    best = min(tried, key=lambda offset: (abs(tried[offset] - budget), abs(offset)))
    return best, tried[best], rates[best]


def _next_offset(tried: dict[float, float], budget: float) -> float:
    """Widen the bracket around the budget by doubling, or cut it where a line would meet it."""
    below = max((o for o, fraction in tried.items() if fraction < budget), default=None)
    above = min((o for o, fraction in tried.items() if fraction >= budget), default=None)
    if below is None:
        return min(-_FIRST_STEP, 2 * min(tried))
    if above is None:
        return max(_FIRST_STEP, 2 * max(tried))
    share = (budget - tried[below]) / max(tried[above] - tried[below], 1e-9)
    return below + min(max(share, 0.2), 0.8) * (above - below)  # away from the ends: it shrinks


@torch.no_grad()
def measured_fraction(gated: nn.Module, images: Iterable[Tensor]) -> tuple[float, dict[str, float]]:
    """Fraction of the compute, or of the time if budgets are in time, and each gate's open rate."""
    with measure(gated) as measured:
        for batch in images:
            gated(batch)
    timed = measured.time_fraction
    return measured.fraction if timed is None else timed, measured.open_rates


def _set_offset(gated: nn.Module, offset: float) -> None:
    for _, gate in named_gates(gated):
        gate.set_offset(offset)
