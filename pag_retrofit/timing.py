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

_PASSES = 4
"""Of which the fastest call of each kernel counts, each time that a state has its turn."""


@torch.no_grad()
def budget_in_time(
    gated: nn.Module, *, example_input: Tensor | tuple[int, ...], rounds: int = 5
) -> NetworkTimes:
    """Let the budget of a gated network count time instead of multiply-accumulates.

    Deploys the network and times its kernels with all gates open and all closed; between the two,
    time is taken to follow each site's multiply-accumulates. From then on the sparsity loss,
    `Annealer` and `calibrate` understand fractions as those of the time that the deployed network
    takes without gates; `Measurement.time_fraction` tells it. The times are those of this machine
    with the present number of threads, and are saved with the network.

    Args:
        gated: A gated network, on the CPU.
        example_input: Tensor (B, C, H, W), or its shape: of the size that counts.
        rounds: How often both are timed in turn; the fastest call of each kernel counts.

    Returns:
        The times, which the network now knows.

    Raises:
        BudgetError: The network takes more than its budget with every pixel closed.
        PagError: There are no native kernels, or the network is not gated.
    """
    state = state_of(gated)
    example = example_tensor(gated, example_input)
    gates = {site: gate for site, gate in named_gates(gated) if not gate.inside}
    opened, closed = (_site_ratios(gated, example, share) for share in (1.0, 0.0))
    timing = _time_sites(gated, list(gates), example, rounds)
    # Of calls that serve several sites each has the whole: together they save what all do.
    alone = sum(timing.saved.values())
    together = max(0.0, timing.opened - timing.closed)
    share = together / (alone * timing.plain) if alone > 0 else 0.0
    sites = {
        site: SiteTime(timing.saved[site] * share, opened[site], closed[site]) for site in gates
    }
    times = NetworkTimes(timing.opened / timing.plain, sites)
    if state.budget < times.floor:
        raise BudgetError(
            f"budget={state.budget!r} in time: with every pixel closed the network still takes "
            f"{times.floor:.3f} of it; retrofit it with a larger budget"
        )
    use_times(gated, times)
    return times


def _site_ratios(gated: nn.Module, example: Tensor, density: float) -> dict[str, float]:
    """MACs of each site over those of its operations, with all gates open or closed."""
    pattern = "all" if density else "none"
    with in_mode(gated), override_gates(gated, density, pattern=pattern), measure(gated) as found:
        gated(example)
    return found.site_ratios


class _Timing(NamedTuple):
    """Seconds of a deployed network without gates, all open, and all closed; saved by each one."""

    plain: float
    opened: float
    closed: float
    saved: dict[str, float]


def _time_sites(gated: nn.Module, sites: Sequence[str], example: Tensor, rounds: int) -> _Timing:
    """Time three states of the network, and share what closing saves out among the gates.

    Each alone saves too little to be timed. How many pixels a call computes says whose it is.
    """
    plain = deploy(remove(copy.deepcopy(gated)), backend="cpu")
    deployed = deploy(gated, backend="cpu")
    states: dict[float | None, list[_Call]] = {}
    for _ in range(rounds):  # in turn: the machine's speed changes in the meantime
        for density in (None, 1.0, 0.0):
            with _all_gates(deployed, density or 0.0):
                calls = _calls(plain if density is None else deployed, example, _PASSES)
            earlier = states.get(density, calls)
            states[density] = [min(pair) for pair in zip(calls, earlier, strict=True)]
    gates = dict(named_gates(deployed))
    saved = {}
    for site in sites:
        with _all_gates(deployed, 1.0), _closed(gates[site]):
            alone = _calls(deployed, example, 1)
        triples = zip(alone, states[1.0], states[0.0], strict=True)
        saved[site] = max(0.0, sum(_saved(*triple) for triple in triples))
    seconds = {density: sum(call.seconds for call in calls) for density, calls in states.items()}
    return _Timing(seconds[None], seconds[1.0], seconds[0.0], saved)


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
    first = made_of[0]
    if isinstance(first, ConvolutionArguments):
        made_of = (first.length,)
    lengths = [x for x in made_of if isinstance(x, Tensor) and x.dtype == torch.int32]
    return int(lengths[-1]) if lengths and lengths[-1].numel() == 1 else 0


def _saved(alone: _Call, opened: _Call, closed: _Call) -> float:
    """Seconds that a call takes less with one gate closed: its time follows its pixels."""
    if opened.pixels == closed.pixels:
        return 0.0
    per_pixel = (opened.seconds - closed.seconds) / (opened.pixels - closed.pixels)
    return per_pixel * (opened.pixels - alone.pixels)


@contextlib.contextmanager
def _all_gates(deployed: DeployedNetwork, density: float) -> Iterator[None]:
    with override_gates(deployed, density, pattern="all" if density else "none"):
        yield


@contextlib.contextmanager
def _closed(gate: Gate) -> Iterator[None]:
    before = gate.override
    gate.override = MaskOverride(0.0, "none", 0)
    try:
        yield
    finally:
        gate.override = before
