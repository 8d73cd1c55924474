"""Budgets in time: what each gate saves is measured, and fractions then count that.

Multiply-accumulates of different layers take different time: those of a wide 3x3 convolution a
third of those of a 1x1 one, those of a depthwise one several times as much. A network trained to a
budget of multiply-accumulates closes gates that save little time; a budget in time prevents that.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pag_retrofit.deployment import DeployedNetwork, deploy
from pag_retrofit.errors import BudgetError
from pag_retrofit.gates import (
    Gate,
    MaskOverride,
    NetworkTimes,
    SiteTime,
    named_gates,
    state_of,
    use_times,
)
from pag_retrofit.kernels.arguments import ConvolutionArguments
from pag_retrofit.measurement import measure, override_gates
from pag_retrofit.surgery import remove
from pag_retrofit.tracing import example_tensor, in_mode

_OPEN, _HALF, _CLOSED = (
    MaskOverride(density, pattern, 0)
    for density, pattern in ((1.0, "all"), (0.5, "blobs"), (0.0, "none"))
)
_PASSES = 4
"""Of which the fastest call of each kernel counts, each time that a state has its turn."""


@torch.no_grad()
def budget_in_time(
    gated: nn.Module, *, example_input: Tensor | tuple[int, ...], rounds: int = 5
) -> NetworkTimes:
    """Let the budget of a gated network count time instead of multiply-accumulates.

    Deploys the network and times its kernels with all gates open, half open and closed; between
    these, a site's time is taken to be a parabola of its multiply-accumulates. From then on the
    sparsity loss, `Annealer` and `calibrate` understand fractions as those of the time that the
    deployed network takes without gates; `Measurement.time_fraction` tells it. The times are those
    of this machine with the present number of threads, and are saved with the network.

    Args:
        gated: A gated network; what is timed is a copy on the CPU.
        example_input: Tensor (B, C, H, W), or its shape: of the size that counts.
        rounds: How often all is timed in turn; the fastest call of each kernel counts.

    Returns:
        The times, which the network now knows.

    Raises:
        BudgetError: The network takes more than its budget with every pixel closed.
        PagError: There are no native kernels, or the network is not gated.
    """
    state = state_of(gated)
    copied = copy.deepcopy(gated).cpu()
    example = example_tensor(copied, example_input)
    sites = [site for site, gate in named_gates(copied) if not gate.inside]
    opened, closed = (_site_ratios(copied, example, override) for override in (_OPEN, _CLOSED))
    timing = _time_sites(copied, sites, example, rounds)
    # Of calls that serve several sites each has the whole: together they save what all do.
    alone = sum(saved for saved, _ in timing.sites.values())
    together = max(0.0, timing.opened - timing.closed)
    unit = together / (alone * timing.plain) if alone > 0 else 0.0
    found = {
        site: SiteTime(saved * unit, opened[site], closed[site], excess * unit)
        for site, (saved, excess) in timing.sites.items()
    }
    times = NetworkTimes(timing.opened / timing.plain, found)
    if state.budget < times.floor:
        raise BudgetError(
            f"budget={state.budget!r} in time: with every pixel closed the network still takes "
            f"{times.floor:.3f} of it; retrofit it with a larger budget"
        )
    use_times(gated, times)
    return times


def _site_ratios(gated: nn.Module, example: Tensor, override: MaskOverride) -> dict[str, float]:
    """MACs of each site over those of its operations."""
    with in_mode(gated), _all_gates(gated, override), measure(gated) as measured:
        gated(example)
    return measured.site_ratios


class _Timing(NamedTuple):
    """Seconds of a deployed network without gates, all open, and all closed; and of each site.

    A site's are what it saves with every pixel closed, and does not save with half of them.
    """

    plain: float
    opened: float
    closed: float
    sites: dict[str, tuple[float, float]]


def _time_sites(gated: nn.Module, sites: Sequence[str], example: Tensor, rounds: int) -> _Timing:
    """Time the network in a few states, and share what gates save out among them.

    Each alone saves too little to be timed. How many pixels a call computes says whose it is.
    """
    plain = deploy(remove(copy.deepcopy(gated)), backend="cpu")
    deployed = deploy(gated, backend="cpu")
    seconds_plain, *states = _fastest(plain, deployed, example, rounds)
    gates = dict(named_gates(deployed))
    found = {}
    for site in sites:
        with _all_gates(deployed, _OPEN), _closed(gates[site]):
            alone = _calls(deployed, example, 1)
        saved, excess = 0.0, 0.0
        for call, opened, half, closed in zip(alone, *states, strict=True):
            if opened.pixels != closed.pixels:
                share = (opened.pixels - call.pixels) / (opened.pixels - closed.pixels)
                saved += share * (opened.seconds - closed.seconds)
                excess += share * _excess(opened, half, closed)
        found[site] = max(saved, 0.0), max(excess, 0.0)
    totals = [sum(call.seconds for call in state) for state in (seconds_plain, *states)]
    return _Timing(totals[0], totals[1], totals[3], found)


def _fastest(
    plain: DeployedNetwork, deployed: DeployedNetwork, example: Tensor, rounds: int
) -> list[list[_Call]]:
    """The fastest of each call: without gates, and with all of them open, half open, closed."""
    states: list[list[_Call]] = []
    for _ in range(rounds):  # in turn: the machine's speed changes in the meantime
        calls = [_calls(plain, example, _PASSES)]
        for override in (_OPEN, _HALF, _CLOSED):
            with _all_gates(deployed, override):
                calls.append(_calls(deployed, example, _PASSES))
        states = [
            [min(pair) for pair in zip(new, old, strict=True)]
            for new, old in zip(calls, states or calls, strict=True)
        ]
    return states


def _excess(opened: _Call, half: _Call, closed: _Call) -> float:
    """Seconds that a call takes longer, half open, than its share of pixels says."""
    share = (half.pixels - closed.pixels) / (opened.pixels - closed.pixels)
    return half.seconds - closed.seconds - share * (opened.seconds - closed.seconds)


class _Call(NamedTuple):
    """Of a kernel: how long it took, and for how many listed pixels."""

    seconds: float
    pixels: int


def _calls(network: DeployedNetwork, example: Tensor, passes: int) -> list[_Call]:
    return [
        _Call(seconds, _listed(made_of))
        for _, made_of, seconds in network.profile(example, rounds=passes)
    ]


def _listed(made_of: tuple[Any, ...]) -> int:
    """Pixels that a call computes; 0 where it computes whole maps."""
    if made_of and isinstance(made_of[0], ConvolutionArguments):
        made_of = (made_of[0].length,)
    lengths = [x for x in made_of if isinstance(x, Tensor) and x.dtype == torch.int32]
    return int(lengths[-1]) if lengths and lengths[-1].numel() == 1 else 0


def _all_gates(
    network: nn.Module, override: MaskOverride
) -> contextlib.AbstractContextManager[None]:
    return override_gates(network, override.density, pattern=override.pattern)


@contextlib.contextmanager
def _closed(gate: Gate) -> Iterator[None]:
    before = gate.override
    gate.override = _CLOSED
    try:
        yield
    finally:
        gate.override = before
