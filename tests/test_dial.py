"""One network for a range of budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from networks import randomize
from torch import nn

import pag_retrofit as pag
from pag_retrofit.functional import largest
from pag_retrofit.gates import named_gates

SHAPE = (2, 3, 64, 64)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Gates that were taught to follow the dial, and nothing else."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("resnet18", num_classes=5))
    config = pag.RetrofitConfig(gate=pag.GateConfig(dial=True), min_share=0.0)
    gated = pag.retrofit(model, 0.4, example_input=SHAPE, config=config).train()
    annealer = pag.Annealer(gated, 180, dial=(0.4, 0.9), ramp=0.3)
    parameters = [p for _, gate in named_gates(gated) for p in gate.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(180):
        gated(torch.randn(SHAPE))
        optimizer.zero_grad()
        (10 * pag.sparsity_loss(gated)).backward()
        optimizer.step()
        annealer.step()
    return gated.eval()


def test_a_new_dial_changes_nothing() -> None:
    model = randomize(timm.create_model("resnet18")).eval()
    config = pag.RetrofitConfig(gate=pag.GateConfig(dial=True))
    gated = pag.retrofit(model, 0.5, example_input=SHAPE, config=config)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.equal(gated(x), model(x))


def test_steps_take_smallest_largest_and_random_budgets() -> None:
    config = pag.RetrofitConfig(gate=pag.GateConfig(dial=True))
    gated = pag.retrofit(timm.create_model("resnet18"), 0.4, example_input=SHAPE, config=config)
    annealer = pag.Annealer(gated, 30, dial=(0.4, 0.9), ramp=0.1)
    drawn = []
    for _ in range(30):
        annealer.step()
        drawn.append(annealer.rho)
        assert gated.pag_state.rho == annealer.rho
        for _, gate in named_gates(gated):
            expected = (1 - annealer.rho) / (1 - gated.pag_state.floor)
            assert float(gate.get_buffer("setting")) == pytest.approx(expected)
    low, high, between = (set(drawn[start::3]) for start in (5, 3, 4))
    assert low == {0.4} and high == {0.9}
    assert len(between) > 5 and all(0.4 < b < 0.9 for b in between)
    resumed = pag.Annealer(gated, 30, dial=(0.4, 0.9), ramp=0.1)
    resumed.load_state_dict({"steps": 17})
    assert resumed.rho == drawn[16]


def test_the_dial_moves_the_fraction_without_calibration(trained: nn.Module) -> None:
    fractions = []
    for budget in (0.9, 0.65, 0.4):
        from pag_retrofit.gates import turn_dials

        turn_dials(trained, budget)
        with torch.no_grad(), pag.measure(trained) as measured:
            trained(torch.randn(SHAPE))
        fractions.append(measured.fraction)
    assert fractions[0] > fractions[1] + 0.05 > fractions[2] + 0.1


@torch.no_grad()
def test_budgets_are_switched_saved_and_deployed(trained: nn.Module, tmp_path: Path) -> None:
    images = [torch.randn(SHAPE)]
    pag.calibrate(trained, images, budgets=(0.4, 0.6, 0.9))
    pag.save_file(trained, tmp_path / "dial.safetensors")
    model = timm.create_model("resnet18", num_classes=5)
    again = pag.load_file(tmp_path / "dial.safetensors", model=model).eval()
    deployed = pag.deploy(again)
    for budget in (0.9, 0.4, 0.6):
        for network in (trained, again, deployed):
            pag.set_budget(network, budget)
        with pag.measure(trained) as measured:
            expected = trained(images[0])
        assert measured.fraction == pytest.approx(budget, abs=0.03)
        assert torch.equal(again(images[0]), expected)
        scale = float(expected.abs().max())
        torch.testing.assert_close(deployed(images[0]) / scale, expected / scale, rtol=0, atol=1e-4)


def test_wrong_dials_are_refused() -> None:
    plain = pag.retrofit(timm.create_model("resnet18"), 0.5, example_input=SHAPE)
    with pytest.raises(pag.PagError, match="the gates have none"):
        pag.Annealer(plain, 10, dial=(0.4, 0.9))
    with pytest.raises(pag.PagError, match=r"dial=\(0.9, 0.4\)"):
        pag.Annealer(plain, 10, dial=(0.9, 0.4))
    with pytest.raises(pag.PagError, match="gate.dial=1"):
        pag.GateConfig(dial=1)  # type: ignore[arg-type]


# The same compute for every image -----------------------------------------------------------------


def fractions(network: nn.Module, x: torch.Tensor) -> list[float]:
    found = []
    for image in x:
        with torch.no_grad(), pag.measure(network) as measured:
            network(image[None])
        found.append(measured.fraction)
    return found


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    torch.manual_seed(4)  # of some networks the gates tell hardly any images apart
    model = randomize(timm.create_model("resnet18", num_classes=5))
    gated = pag.retrofit(
        model, 0.4, example_input=SHAPE, config=pag.RetrofitConfig(min_share=0.0)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, gate in named_gates(gated):
            weight = gate.get_parameter("weight")
            weight.copy_(torch.randn(weight.shape, generator=generator) * 3)
    pag.calibrate(gated, [images()], budgets=(0.4, 0.7))
    return gated


def images() -> torch.Tensor:
    strength = torch.linspace(0.2, 3, 6).view(-1, 1, 1, 1)
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * strength


def test_every_image_gets_the_same(calibrated: nn.Module) -> None:
    pag.set_budget(calibrated, 0.7)
    free = torch.tensor(fractions(calibrated, images()))
    pag.set_budget(calibrated, 0.7, mode="per_image")
    fixed = torch.tensor(fractions(calibrated, images()))
    assert fixed.std() < 0.3 * free.std()
    assert float(fixed.mean()) == pytest.approx(0.7, abs=0.03)
    with torch.no_grad(), pag.measure(calibrated) as measured:
        calibrated(images())
    for site, mask in measured.masks.items():
        counts = mask.sum((1, 2, 3))
        wanted = round(calibrated.pag_state.open_rates[0.7][site] * mask[0].numel())
        assert counts.tolist() == [wanted] * 6, site
    pag.set_budget(calibrated, 0.7)
    assert fractions(calibrated, images()) == pytest.approx(free.tolist())


@torch.no_grad()
def test_deployed_networks_rank_pixels_too(calibrated: nn.Module, tmp_path: Path) -> None:
    pag.save_file(calibrated, tmp_path / "gated.safetensors")
    model = timm.create_model("resnet18", num_classes=5)
    again = pag.load_file(tmp_path / "gated.safetensors", model=model).eval()
    deployed = pag.deploy(again)
    x = images()
    for mode in ("per_image", "average", "per_image"):
        for network in (calibrated, deployed):
            pag.set_budget(network, 0.4, mode=mode)
        for _ in range(2):
            expected = calibrated(x)
            scale = float(expected.abs().max())
            torch.testing.assert_close(deployed(x) / scale, expected / scale, rtol=0, atol=1e-4)
            x = x.flip(0)


def test_wrong_modes_are_refused(calibrated: nn.Module) -> None:
    with pytest.raises(pag.PagError, match="mode='exact'"):
        pag.set_budget(calibrated, 0.4, mode="exact")
    config = pag.RetrofitConfig(policy="layer")
    layers = pag.retrofit(timm.create_model("resnet18"), 0.9, example_input=SHAPE, config=config)
    layers.pag_state.operating_points = {0.9: 0.0}
    with pytest.raises(pag.PagError, match="LayerGate, which does not rank"):
        pag.set_budget(layers, 0.9, mode="per_image")
    calibrated.pag_state.open_rates.pop(0.7)
    with pytest.raises(pag.PagError, match="older release"):
        pag.set_budget(calibrated, 0.7, mode="per_image")


@pytest.mark.parametrize("count", [0, 19, 63])
def test_the_largest_are_as_many_as_asked_for_even_if_equal(count: int) -> None:
    scores = torch.randint(0, 3, (4, 1, 7, 9)).float()
    mask = largest(scores, count)
    assert mask.sum((1, 2, 3)).tolist() == [count] * 4
    if 0 < count < 63:
        lowest_open = torch.where(mask > 0, scores, 9).amin((1, 2, 3))
        highest_closed = torch.where(mask > 0, -1, scores).amax((1, 2, 3))
        assert (lowest_open >= highest_closed).all()
