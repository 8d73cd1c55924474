"""Gates that stay open are taken out, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from networks import randomize
from torch import nn

import pag_retrofit as pag
from pag_retrofit.gates import named_gates, use_times
from pag_retrofit.multipool import BranchSelector

SHAPE = (2, 3, 64, 64)
X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def calibrated(
    budgets: tuple[float, ...] = (0.8,), multipool: pag.MultiPoolConfig | None = None
) -> nn.Module:
    """Every second gate decides, or could; the others stay open whatever the offset."""
    plain = randomize(timm.create_model("resnet26", num_classes=7))
    config = pag.RetrofitConfig(min_share=0.0, multipool=multipool)
    gated = pag.retrofit(plain, min(budgets), example_input=SHAPE, config=config).eval()
    generator = torch.Generator().manual_seed(0)
    gates = [g for _, g in named_gates(gated) if not isinstance(g, BranchSelector)]
    for k, gate in enumerate(gates):
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * (k % 2))
        gate.bias.fill_(0.5 if k % 2 else 1000.0)
    pag.calibrate(gated, [X], budgets=budgets)
    return gated


def sites(gated: nn.Module) -> list[str]:
    return [site for site, _ in named_gates(gated)]


def open_and_others(gated: nn.Module, budget: float) -> tuple[list[str], list[str]]:
    rates = gated.pag_state.open_rates[budget]
    found = [s for s in sites(gated) if rates[s] == 1], [s for s in sites(gated) if rates[s] < 1]
    assert len(found[0]) >= len(sites(gated)) // 2 and found[1]
    return found


@torch.no_grad()
def test_the_mode_of_the_budget_stays() -> None:
    gated = calibrated()
    pag.set_budget(gated, 0.8, mode="per_image")
    expected = gated(X)
    assert pag.prune_gates(gated)
    assert torch.equal(gated(X), expected)
    pag.set_budget(gated, 0.8)
    assert not torch.equal(gated(X), expected)


@torch.no_grad()
def test_open_gates_go_and_outputs_stay(tmp_path: Path) -> None:
    gated = calibrated()
    opened, others = open_and_others(gated, 0.8)
    total = gated.pag_state.total_macs
    expected = gated(X)
    with pag.measure(gated) as measured:
        gated(X)
    wanted = copy.deepcopy(gated.pag_state)
    costs = sum(
        gate.cost.gate_macs * measured.masks[site].numel() for site, gate in named_gates(gated)
    )
    pruned = pag.prune_gates(gated)

    assert pruned == tuple(opened) and sites(gated) == others
    assert torch.equal(gated(X), expected)
    with pag.measure(gated) as now:
        gated(X)
    left = sum(gate.cost.gate_macs * now.masks[site].numel() for site, gate in named_gates(gated))
    assert measured.macs - now.macs == costs - left > 0
    state = gated.pag_state
    assert (state.config, state.budget, state.rho) == (wanted.config, wanted.budget, wanted.rho)
    assert state.operating_points == wanted.operating_points
    assert state.active_budget == wanted.active_budget and state.total_macs == total
    assert state.open_rates[0.8].keys() == set(others)
    assert state.floor > wanted.floor
    assert pag.prune_gates(gated) == ()

    pag.save_pretrained(gated, tmp_path)
    assert torch.equal(pag.from_pretrained(tmp_path)(X), expected)
    assert (pag.deploy(gated)(X) - expected).norm() < 1e-4 * expected.norm()
    plain = pag.remove(copy.deepcopy(gated))
    assert not list(named_gates(plain)) and plain.state_dict().keys() <= gated.state_dict().keys()


def test_it_can_be_trained_on() -> None:
    gated = calibrated().train()
    pag.prune_gates(gated)
    assert gated.training and all(module.training for module in gated.modules())
    (gated(X).square().mean() + pag.sparsity_loss(gated)).backward()
    assert all(parameter.grad is not None for parameter in pag.gate_parameters(gated))


@torch.no_grad()
def test_a_gate_has_to_be_open_at_every_operating_point() -> None:
    gated = calibrated(budgets=(1.0, 0.8))
    more, fewer = (open_and_others(gated, budget)[0] for budget in (1.0, 0.8))
    assert len(more) > len(fewer)
    assert pag.prune_gates(gated) == tuple(fewer)


@torch.no_grad()
def test_almost_open_may_be_enough() -> None:
    gated = calibrated()
    rates = gated.pag_state.open_rates[0.8]
    middle = sorted(rates.values())[len(rates) // 4]
    pruned = pag.prune_gates(gated, least=middle)
    assert set(pruned) == {site for site, rate in rates.items() if rate >= middle}
    assert len(pruned) > len(rates) // 2


@torch.no_grad()
def test_selectors_stay() -> None:
    gated = calibrated(multipool=pag.MultiPoolConfig(dilations=(1, 2)))
    selectors = [s for s, g in named_gates(gated) if isinstance(g, BranchSelector)]
    expected = gated(X)
    assert pag.prune_gates(gated)
    assert [s for s, g in named_gates(gated) if isinstance(g, BranchSelector)] == selectors != []
    assert torch.equal(gated(X), expected)


@torch.no_grad()
@pytest.mark.parametrize("timed", [False, True])
def test_gates_without_which_a_budget_cannot_be_met_stay(timed: bool) -> None:
    from test_timing import made_up

    gated = calibrated((1.0,))  # some are open whatever the offset, and all are now
    state = gated.pag_state
    if timed:
        use_times(gated, made_up(gated))
    opened = sites(gated)[::2]
    others = {site: 0.5 for site in sites(gated)[1::2]}
    lowest = state.floor + 0.02
    state.open_rates = {lowest: {site: 1.0 for site in opened} | others}
    without_limit = set(opened)
    pruned = pag.prune_gates(gated)
    assert set(pruned) < without_limit
    assert gated.pag_state.floor <= lowest
    assert set(others) <= set(sites(gated))
    pag.calibrate(gated, [X], budgets=[lowest])


@torch.no_grad()
def test_times_of_the_other_sites_are_kept() -> None:
    from test_timing import made_up

    gated = calibrated()
    times = made_up(gated)
    use_times(gated, times)
    pag.prune_gates(gated)
    own = gated.pag_state.times
    assert own.opened == times.opened
    assert own.sites == {site: times.sites[site] for site in sites(gated)}


def test_what_cannot_be_pruned() -> None:
    plain = randomize(timm.create_model("resnet26", num_classes=7)).eval()
    gated = pag.retrofit(plain, 0.8, example_input=SHAPE)
    with pytest.raises(pag.PagError, match="calibrate"):
        pag.prune_gates(gated)
    with pytest.raises(pag.PagError, match="least=0"):
        pag.prune_gates(gated, least=0)
    pag.calibrate(gated, [X], budgets=[1.0])  # all open
    before = sites(gated)
    assert pag.prune_gates(gated) == () and sites(gated) == before
