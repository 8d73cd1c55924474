"""What training and calibration steer by: losses, annealing, operating points."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import timm
import torch
from conftest import Pair
from networks import CustomNet, randomize
from timm.models.resnet import BasicBlock
from torch import nn

import pag_retrofit as pag
from pag_retrofit import losses
from pag_retrofit.gates import named_gates

SHAPE = (2, 3, 32, 32)


@pytest.fixture
def gated() -> nn.Module:
    config = pag.RetrofitConfig(min_share=0.0)
    model = randomize(CustomNet()).eval()
    return pag.retrofit(model, 0.7, example_input=SHAPE, config=config)


@torch.no_grad()
def shuffle_gates(gated: nn.Module, scale: float, seed: int = 0) -> None:
    """Random gates that tell pixels apart."""
    generator = torch.Generator().manual_seed(seed)
    for _, gate in named_gates(gated):
        gate.weight.copy_(scale * torch.randn(gate.weight.shape, generator=generator))
        # Not zero: a feature that is dead everywhere leaves the logit to the bias.
        gate.bias.copy_(1e-3 * scale * torch.randn(1, generator=generator))


def set_probability(gated: nn.Module, probability: float) -> None:
    for _, gate in named_gates(gated):
        gate.weight.data.zero_()
        gate.bias.data.fill_(math.log(probability / (1 - probability)))


# --- losses ---------------------------------------------------------------------------------------


def test_expected_fraction_is_the_measured_one_when_gates_are_sure(pair: Pair) -> None:
    gated = pair.fresh().train()
    shuffle_gates(gated, 1e7)
    with torch.no_grad(), pag.measure(gated) as m:
        gated(pair.x)
    sure = [
        torch.minimum(g.last_probability, 1 - g.last_probability).mean()
        for _, g in named_gates(gated)
    ]
    assert max(sure) < 1e-3
    assert pag.expected_fraction(gated).item() == pytest.approx(m.fraction, abs=2e-3)
    assert pair.plan.floor + 0.01 < m.fraction < 1


@pytest.mark.parametrize(("bias", "closed"), [(20.0, False), (-20.0, True)])
def test_expected_fraction_at_the_ends(gated: nn.Module, bias: float, closed: bool) -> None:
    for _, gate in named_gates(gated):
        gate.bias.data.fill_(bias)
    gated.train()
    with pag.measure(gated) as m:
        gated(torch.randn(SHAPE))
    assert pag.expected_fraction(gated).item() == pytest.approx(m.fraction, abs=1e-6)
    assert (m.fraction == pytest.approx(gated.pag_state.floor)) == closed


@pytest.mark.parametrize("kind", ["global", "layer"])
@pytest.mark.parametrize(("rho", "sign"), [(0.5, 1), (1.0, -1)])
def test_losses_push_towards_the_target(gated: nn.Module, kind: str, rho: float, sign: int) -> None:
    """Too much compute: a falling loss closes gates; too little: it opens them."""
    set_probability(gated, 0.8)
    gated.pag_state.rho = rho
    gated.train()(torch.randn(SHAPE))
    pag.sparsity_loss(gated, kind).backward()
    for _, gate in named_gates(gated):
        assert gate.bias.grad.item() * sign > 0


def test_layer_loss_is_zero_only_at_its_target(gated: nn.Module) -> None:
    state = gated.pag_state
    state.rho = 0.7
    rate = (state.rho - state.floor) / (1 + state.gate_share - state.floor)
    losses = []
    for probability in (rate, rate + 0.1, rate - 0.1):
        set_probability(gated, probability)
        gated.train()(torch.randn(SHAPE))
        losses.append(pag.sparsity_loss(gated, "layer").item())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    gates = len(list(named_gates(gated)))
    for loss, q in zip(losses[1:], (rate + 0.1, rate - 0.1), strict=True):
        kl = rate * math.log(rate / q) + (1 - rate) * math.log((1 - rate) / (1 - q))
        assert loss == pytest.approx(gates * kl, rel=1e-3)


def test_global_loss_is_the_squared_distance_over_the_span(gated: nn.Module) -> None:
    set_probability(gated, 0.6)
    gated.train()(torch.randn(SHAPE))
    state = gated.pag_state
    fraction = pag.expected_fraction(gated).item()
    state.rho = fraction
    assert pag.sparsity_loss(gated).item() == pytest.approx(0, abs=1e-10)
    state.rho = fraction - 0.1
    expected = (0.1 / (1 - state.floor)) ** 2
    assert pag.sparsity_loss(gated).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_descending_the_loss_alone_reaches_the_target(gated: nn.Module, kind: str) -> None:
    gated.pag_state.rho = 0.7
    gated.train()
    optimizer = torch.optim.Adam(pag.gate_parameters(gated), lr=0.3)
    x = torch.randn(SHAPE)
    for _ in range(60):
        gated(x)
        loss = pag.sparsity_loss(gated, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gated(x)
    tolerance = 0.02 if kind == "global" else 0.1  # the layer form does not know halos
    assert pag.expected_fraction(gated).item() == pytest.approx(0.7, abs=tolerance)


@pytest.mark.parametrize(("probability", "rho"), [(0.95, 0.3), (0.05, 0.7)])
def test_gates_decided_at_low_temperature_still_hear_the_loss(
    gated: nn.Module, probability: float, rho: float
) -> None:
    set_probability(gated, probability)
    gated.train()
    gated.pag_state.rho = rho
    x = torch.randn(SHAPE)
    found = {}
    for temperature in (1.0, 0.05):
        for _, gate in named_gates(gated):
            gate.temperature.fill_(temperature)
        gated.zero_grad()
        gated(x)
        pag.sparsity_loss(gated).backward()
        found[temperature] = torch.stack([gate.bias.grad for _, gate in named_gates(gated)])
    assert (found[0.05].sign() == (1 if probability > rho else -1)).all()
    assert (found[0.05].abs() > 0.5 * found[1.0].abs()).all()


def test_temperature_sharpens_the_expected_masks(gated: nn.Module) -> None:
    set_probability(gated, 0.8)
    gated.train()
    for _, gate in named_gates(gated):
        gate.temperature.fill_(0.25)
    with pag.measure(gated) as m:
        gated(torch.randn(8, 3, 32, 32))
    rate = 1 / (1 + 0.25**4)  # odds of 4 to the power of 1 / 0.25
    for site, gate in named_gates(gated):
        assert gate.last_probability.mean().item() == pytest.approx(rate, abs=1e-4)
        assert m.open_rates[site] == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_the_loss_is_of_the_mean_over_processes(
    gated: nn.Module, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process whose value is 0.2 larger: value of the mean, gradient of one's own."""
    set_probability(gated, 0.6)
    gated.pag_state.rho = 0.5
    gated.train()(torch.randn(SHAPE))
    alone = pag.expected_fraction(gated).item()
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda t: t.copy_(2 * t + 0.2))
    assert pag.expected_fraction(gated).item() == pytest.approx(alone + 0.1, abs=1e-6)
    pag.sparsity_loss(gated, kind).backward()
    if kind == "layer":
        state = gated.pag_state
        rate = (0.5 - state.floor) / (1 + state.gate_share - state.floor)
        slope = (0.7 - rate) / (0.7 * 0.3) * 0.6 * 0.4  # dKL/dq at the mean, times dq/dbias
        for _, gate in named_gates(gated):
            assert gate.bias.grad.item() == pytest.approx(slope, rel=1e-3)


def test_parts_in_evaluation_mode_count_with_what_they_decide(pair: Pair) -> None:
    gated = pair.fresh().train()
    gates = [gate for _, gate in named_gates(gated)]
    for index, gate in enumerate(gates):
        gate.bias.data.fill_(-20.0 if index % 2 else 20.0)
        gate.train(index % 3 > 0)
    with pag.measure(gated) as m:
        gated(pair.x)
    assert pag.expected_fraction(gated).item() == pytest.approx(m.fraction, abs=1e-5)
    with pag.override_gates(gated, 0.3, pattern="random"), pag.measure(gated) as m:
        gated(pair.x)
    assert pag.expected_fraction(gated).item() == pytest.approx(m.fraction, abs=1e-5)


class Skipping(nn.Module):
    """Leaves a block out, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(2))
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        return x if self.skips else self.blocks[1](x)


def test_losses_do_not_count_what_an_earlier_forward_left() -> None:
    gated = pag.retrofit(Skipping(), 0.5, example_input=(1, 8, 16, 16)).train()
    first, second = (gate for _, gate in named_gates(gated))
    for skips in (False, True):
        gated.skips = skips
        (gated(torch.randn(2, 8, 16, 16)).mean() + pag.sparsity_loss(gated)).backward()
        assert first.last_probability is not None
        assert (second.last_probability is None) == skips
    with torch.no_grad():
        gated(torch.randn(2, 8, 16, 16))
    assert not pag.remove(gated)._forward_pre_hooks


def test_losses_ask_for_a_training_forward(gated: nn.Module) -> None:
    gated(torch.randn(SHAPE))
    with pytest.raises(pag.PagError, match="training mode"):
        pag.sparsity_loss(gated)
    with pytest.raises(pag.PagError, match="training mode"):
        pag.expected_fraction(gated)
    gated.train()(torch.randn(SHAPE))
    with pytest.raises(pag.PagError, match="kind='both'"):
        pag.sparsity_loss(gated, "both")
    with pytest.raises(pag.PagError, match="not a gated network"):
        pag.sparsity_loss(CustomNet())


# --- annealing ------------------------------------------------------------------------------------


def test_annealer_goes_from_open_to_the_budget(gated: nn.Module) -> None:
    annealer = pag.Annealer(gated, 20, ramp=0.5, temperature=(2.0, 0.1))
    rhos, taus = [annealer.rho], [annealer.tau]
    for _ in range(20):
        annealer.step()
        assert gated.pag_state.rho == annealer.rho
        for _, gate in named_gates(gated):
            assert gate.temperature.item() == pytest.approx(annealer.tau)
        rhos.append(annealer.rho)
        taus.append(annealer.tau)
    assert (rhos[0], taus[0]) == (1.0, 2.0)
    assert rhos[10:] == pytest.approx([0.7] * 11) and taus[10:] == pytest.approx([0.1] * 11)
    assert rhos[5] == pytest.approx(0.85) and taus[5] == pytest.approx(1.05)  # half a cosine
    for values in (rhos, taus):
        assert values == sorted(values, reverse=True) and len(set(values[:11])) == 11


def test_annealer_resumes(gated: nn.Module) -> None:
    first = pag.Annealer(gated, 10)
    for _ in range(3):
        first.step()
    state = first.state_dict()
    rho, tau = first.rho, first.tau
    resumed = pag.Annealer(gated, 10)
    assert gated.pag_state.rho == 1.0
    resumed.load_state_dict(state)
    assert (resumed.rho, resumed.tau) == (rho, tau)
    assert gated.pag_state.rho == rho
    first.step(), resumed.step()
    assert first.rho == resumed.rho


def after_a_pass(gated: nn.Module, logit: float) -> nn.Module:
    with torch.no_grad():
        for _, gate in named_gates(gated):
            gate.bias.fill_(logit)
    gated.train()(torch.randn(SHAPE))
    return gated


def test_the_aim_drifts_until_the_target_is_met(gated: nn.Module) -> None:
    after_a_pass(gated, 3.0)  # every pixel is decided to be open
    annealer = pag.Annealer(gated, 100, ramp=0.1)
    decided = losses.decided_fraction(gated)
    assert decided == pytest.approx(1 + gated.pag_state.floor, abs=0.2) and decided > 0.99
    aims = []
    for step in range(100):
        missed, drift = decided - annealer.rho, annealer.drift
        annealer.step()
        drifts = step >= 10  # after the ramp, on which it lags behind anyway
        assert annealer.drift == pytest.approx(min(drift + 0.1 * missed * drifts, 0.3))
        assert gated.pag_state.rho == annealer.aim == pytest.approx(annealer.rho - annealer.drift)
        aims.append(annealer.aim)
    assert annealer.rho == pytest.approx(0.7) and aims[-1] == pytest.approx(0.4)

    resumed = pag.Annealer(gated, 100, ramp=0.1)
    resumed.load_state_dict(annealer.state_dict())
    assert (resumed.rho, resumed.aim) == (annealer.rho, annealer.aim)
    resumed.load_state_dict({"steps": 3})  # of an earlier release
    assert resumed.aim == resumed.rho

    after_a_pass(gated, -3.0)
    for _ in range(100):
        annealer.step()
    assert annealer.aim > annealer.rho + 0.1


def test_what_is_decided_is_what_evaluation_measures() -> None:
    network = timm.create_model("test_resnet").eval()
    config = pag.RetrofitConfig(include=("conv1.0",), min_share=0.0)
    gated = pag.retrofit(network, 0.99, example_input=(2, 3, 64, 64), config=config)
    ((_, gate),) = named_gates(gated)
    with torch.no_grad():
        gate.weight.normal_()
        gate.bias.fill_(0.5)
    x = torch.randn(2, 3, 64, 64)
    with pag.measure(gated) as measured, torch.no_grad():
        gated(x)
    gated.train()(x)
    assert 0.1 < measured.open_rates["conv1.0"] < 0.9
    assert losses.decided_fraction(gated) == pytest.approx(measured.fraction)
    assert losses.decided_fraction(gated) != pytest.approx(
        float(pag.expected_fraction(gated).detach()), abs=1e-4
    )


@pytest.mark.parametrize("policy", ["random", "grid"])
def test_what_is_decided_without_looking_is_what_evaluation_measures(policy: str) -> None:
    network = timm.create_model("test_resnet").eval()
    config = pag.RetrofitConfig(policy=policy)
    gated = pag.retrofit(network, 0.9, example_input=SHAPE, config=config)
    after_a_pass(gated, 0.0)  # half of the pixels
    expected = float(pag.expected_fraction(gated).detach())
    decided = losses.decided_fraction(gated)
    with pag.measure(gated.eval()) as measured, torch.no_grad():
        gated(torch.randn(SHAPE))
    assert decided == pytest.approx(measured.fraction)
    assert decided > expected + 0.02  # scattered pixels need more halos than one rate for all


def test_annealer_takes_another_budget(gated: nn.Module) -> None:
    annealer = pag.Annealer(gated, 2, budget=0.9)
    for _ in range(3):
        annealer.step()
    assert annealer.rho == pytest.approx(0.9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"total_steps": 0},
        {"total_steps": "a"},
        {"ramp": 0.0},
        {"ramp": 1.5},
        {"temperature": (1.0, 0.0)},
        {"budget": 5.0},
        {"budget": 0.01},
    ],
    ids=str,
)
def test_annealer_refuses(gated: nn.Module, arguments: dict[str, Any]) -> None:
    with pytest.raises(pag.PagError, match=next(iter(arguments))):
        pag.Annealer(gated, **{"total_steps": 10, **arguments})


# --- calibration ----------------------------------------------------------------------------------


def test_calibrate_hits_every_budget(gated: nn.Module) -> None:
    shuffle_gates(gated, 3.0)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    budgets = (0.9, 0.5, 0.75)
    reached = pag.calibrate(gated.train(), iter(batches), budgets)
    assert gated.training
    gated.eval()
    assert gated.pag_state.active_budget == 0.75
    for budget in budgets:
        pag.set_budget(gated, budget)
        with torch.no_grad(), pag.measure(gated) as m:
            for batch in batches:
                gated(batch)
        assert m.fraction == pytest.approx(budget, abs=0.005)
        assert reached[budget] == m.fraction


def test_calibrate_defaults_to_the_budget_of_the_retrofit(gated: nn.Module) -> None:
    shuffle_gates(gated, 3.0)
    assert list(pag.calibrate(gated, [torch.randn(SHAPE)])) == [0.7]


def test_calibrate_keeps_single_modes_and_weights(gated: nn.Module) -> None:
    shuffle_gates(gated, 3.0)
    gated.train()
    gated.stem[1].eval()
    modes = [module.training for module in gated.modules()]
    before = {k: v.clone() for k, v in gated.state_dict().items() if not k.endswith("offset")}
    pag.calibrate(gated, [torch.randn(SHAPE)], (0.8,))
    assert [module.training for module in gated.modules()] == modes
    state = gated.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_calibrate_warns_when_gates_cannot_tell_pixels_apart(
    gated: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pag_retrofit"):
        reached = pag.calibrate(gated, [torch.randn(SHAPE)], (0.75,))
    assert abs(reached[0.75] - 0.75) > 0.005
    assert "train them longer" in caplog.text


def test_calibrate_refuses(gated: nn.Module) -> None:
    x = [torch.randn(SHAPE)]
    for budget in (0.0, 1.2, gated.pag_state.floor - 0.01, float("nan")):
        with pytest.raises(pag.BudgetError, match="floor"):
            pag.calibrate(gated, x, (0.9, budget))
    assert gated.pag_state.operating_points == {}
    with pytest.raises(pag.PagError, match="empty"):
        pag.calibrate(gated, [], (0.9,))
    with pytest.raises(pag.PagError, match="not a gated network"):
        pag.calibrate(CustomNet(), x, (0.9,))
    for budgets in (0.9, ["a"], "0.9"):
        with pytest.raises(pag.BudgetError, match="expected a list of fractions"):
            pag.calibrate(gated, x, budgets)  # type: ignore[arg-type]
    with pytest.raises(pag.PagError, match="expected a list of such batches"):
        pag.calibrate(gated, x[0], (0.9,))
    with pytest.raises(pag.PagError, match="has a tuple in it"):
        pag.calibrate(gated, [(x[0], 1)], (0.9,))  # type: ignore[list-item]
    with pytest.raises(pag.PagError, match="overridden"), pag.override_gates(gated):
        pag.calibrate(gated, x, (0.9,))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["average", "per_image"])
def test_a_calibration_that_fails_leaves_the_network_as_it_was(gated: nn.Module, mode: str) -> None:
    shuffle_gates(gated, 3.0)
    gated.eval()
    x = torch.randn(SHAPE)
    pag.calibrate(gated, [x], (0.9,))
    pag.set_budget(gated, 0.9, mode=mode)
    expected, state = gated(x), copy.deepcopy(gated.pag_state)
    wrong = torch.randn(SHAPE[0], SHAPE[1] + 1, *SHAPE[2:])
    with pytest.raises(RuntimeError):
        pag.calibrate(gated, [x, wrong], (0.7,))
    assert torch.equal(gated(x), expected)
    assert gated.pag_state == state


def test_set_budget_names_what_was_calibrated(gated: nn.Module) -> None:
    shuffle_gates(gated, 3.0)
    pag.calibrate(gated, [torch.randn(SHAPE)], (0.6, 0.8))
    with pytest.raises(pag.BudgetError, match=r"budget=\[0.8\]: calibrated budgets are"):
        pag.set_budget(gated, [0.8])  # type: ignore[arg-type]
    with pytest.raises(pag.BudgetError, match=r"\[0.6, 0.8\]"):
        pag.set_budget(gated, 0.7)
