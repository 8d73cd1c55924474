"""Gates that never close only cost: they are taken out."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from pag_retrofit.calibration import budget_mode, set_budget
from pag_retrofit.errors import PagError
from pag_retrofit.gates import (
    NetworkTimes,
    PixelGate,
    RetrofitState,
    named_gates,
    state_of,
    use_times,
)
from pag_retrofit.planning import plan
from pag_retrofit.surgery import remove, retrofit


def prune_gates(gated: nn.Module, least: float = 1.0) -> tuple[str, ...]:
    """Take out the gates that left every pixel open in calibration, in place.

    Training often leaves the gates of whole stages open. Without them there is nothing to decide,
    list or bypass. Outputs change only where such a gate closes a pixel after all. Branch
    selectors stay, and so do all gates if all would go, and those without which the network could
    not be brought down to an operating point. Calibrate again afterwards: gates have
    costs. Those that are left are new objects: who trains on makes the optimiser and the
    `Annealer` anew.

    Args:
        gated: A gated network after `calibrate`. With several operating points a gate goes if it
            is open at all of them.
        least: Share of the pixels, in (0, 1], from which on a gate counts as open. Default 1.

    Returns:
        Names of the sites without gates now.

    Raises:
        PagError: The network is not gated, or was not calibrated, or the share is not valid.
    """
    if not isinstance(least, int | float) or not 0 < least <= 1:
        raise PagError(f"least={least!r}: expected a share of the pixels in (0, 1]")
    state = state_of(gated)
    if not state.open_rates:
        raise PagError("gates are pruned by what they did in calibration: run calibrate() first")
    gates = dict(named_gates(gated))
    pruned = {site for site, gate in gates.items() if _is_open(site, gate, state, least)}
    if not pruned or pruned == set(gates):
        return ()
    values, mode = gated.state_dict(), budget_mode(gated)
    _gate_anew(gated, state, gates.keys() - pruned)
    if _floor(gated, state) > min(state.open_rates):
        pruned -= _needed(gated, state, pruned)
        _gate_anew(gated, state, gates.keys() - pruned)
    own = gated.state_dict()
    for name, tensor in (*gated.named_parameters(), *gated.named_buffers()):
        if name in values:  # all that is saved
            tensor.data = tensor.data.to(values[name])
    gated.load_state_dict({name: values[name] for name in own})
    _hand_over(state, gated, mode)
    return tuple(site for site in gates if site in pruned)


def _is_open(site: str, gate: nn.Module, state: RetrofitState, least: float) -> bool:
    rates = [of[site] for of in state.open_rates.values()]
    return isinstance(gate, PixelGate) and min(rates) >= least


def _gate_anew(gated: nn.Module, state: RetrofitState, kept: Iterable[str]) -> None:
    retrofit(
        remove(gated),
        1.0,
        example_input=state.example_shape,
        config=state.config.only(kept),
        inplace=True,
    )


def _floor(gated: nn.Module, state: RetrofitState) -> float:
    """That of the gates that are left, in time if the network's budget is."""
    if state.times is None:
        return state_of(gated).floor
    return _times_of(gated, state.times).floor


def _times_of(gated: nn.Module, times: NetworkTimes) -> NetworkTimes:
    names = {site for site, _ in named_gates(gated)}
    left = {site: of for site, of in times.sites.items() if site in names}
    return NetworkTimes(times.opened, left)


def _needed(gated: nn.Module, state: RetrofitState, pruned: set[str]) -> set[str]:
    """Sites that need gates, lest the floor rises above a budget: those that save most."""
    if state.times is not None:
        savings = {site: of.saved for site, of in state.times.sites.items()}
    else:
        plain = remove(copy.deepcopy(gated))
        found = plan(plain, example_input=state.example_shape, config=state.config.only(pruned))
        savings = {
            site.name: (site.macs - site.floor_macs) / found.total_macs for site in found.sites
        }
    floor, needed = _floor(gated, state), set()
    for site in sorted(pruned, key=lambda name: -savings[name]):
        if floor <= min(state.open_rates):
            break
        needed.add(site)
        floor -= savings[site]
    return needed


def _hand_over(state: RetrofitState, gated: nn.Module, mode: str) -> None:
    """What the network knew before still holds for the sites that are left."""
    own = state_of(gated)
    sites = {site for site, _ in named_gates(gated)}
    own.config, own.budget, own.rho = state.config, state.budget, state.rho
    own.operating_points = dict(state.operating_points)
    own.open_rates = {
        budget: {site: rate for site, rate in of.items() if site in sites}
        for budget, of in state.open_rates.items()
    }
    if state.times is not None:
        use_times(gated, _times_of(gated, state.times))
    if state.active_budget is not None:
        set_budget(gated, state.active_budget, mode)
