"""The baselines at the sites of pixel gates: what they decide, count, learn, save and deploy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from networks import randomize
from torch import Tensor, nn

import pag_retrofit as pag
from pag_retrofit.gates import named_gates
from pag_retrofit.policies import GATES, GridGate
from pag_retrofit.resizing import resize_input, restore_input, smaller_size

SHAPE = (2, 3, 64, 64)
BASELINES = [policy for policy in GATES if policy != "pixel"]


def network() -> nn.Module:
    return randomize(timm.create_model("resnet26", num_classes=7)).eval()


def gated_by(policy: str, budget: float = 0.6) -> nn.Module:
    config = pag.RetrofitConfig(policy=policy, min_share=0.0)
    return pag.retrofit(network(), budget, example_input=SHAPE, config=config)


@torch.no_grad()
def half_open(policy: str) -> nn.Module:
    """Gates whose decisions differ between images and pixels as far as they can."""
    gated = gated_by(policy)
    generator = torch.Generator().manual_seed(0)
    for _, gate in named_gates(gated):
        for name, parameter in gate.named_parameters():
            scale = 0.5 if name == "bias" else 20.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return gated


def masks_of(gated: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad(), pag.measure(gated) as measured:
        gated(x)
    return measured.masks


def test_layers_are_computed_or_skipped_per_image() -> None:
    x = torch.randn(8, 3, 64, 64) * torch.linspace(0.1, 4, 8).view(-1, 1, 1, 1)
    masks = masks_of(half_open("layer"), x)
    shares = torch.stack([mask.float().mean((1, 2, 3)) for mask in masks.values()])
    assert set(shares.flatten().tolist()) == {0.0, 1.0}
    assert (shares.amin(1) < shares.amax(1)).any(), "no gate told images apart"


@pytest.mark.parametrize("policy", ["random", "grid", "truncation"])
def test_input_free_policies_do_not_look(policy: str) -> None:
    gated = half_open(policy)
    first, second = (masks_of(gated, torch.randn(SHAPE)) for _ in range(2))
    assert all(torch.equal(first[site], second[site]) for site in first)
    rates = {round(float(mask.float().mean()), 2) for mask in first.values()}
    assert len(rates) > 1


def test_random_pixels_are_open_at_the_rate_that_was_learned() -> None:
    gated = gated_by("random")
    with torch.no_grad():
        for _, gate in named_gates(gated):
            gate.get_parameter("bias").zero_()
            gate.offset.fill_(-1.0)
    mask = next(iter(masks_of(gated, torch.randn(2, 3, 256, 256)).values()))
    assert float(mask.float().mean()) == pytest.approx(0.269, abs=0.03)


@pytest.mark.parametrize(("rate", "step"), [(0.25, 2), (1 / 16, 4)])
def test_a_grid_is_regular(rate: float, step: int) -> None:
    gate = next(gate for _, gate in named_gates(gated_by("grid")) if isinstance(gate, GridGate))
    with torch.no_grad():
        gate.bias.zero_()
        gate.offset.fill_(float(torch.logit(torch.tensor(rate))))
    mask = gate.standing_mask((1, 1, 20, 24))[0, 0]
    expected = torch.zeros(20, 24)
    expected[::step, ::step] = 1
    assert torch.equal(mask, expected)


def test_truncation_drops_the_last_blocks_and_meets_the_budget() -> None:
    model = network()
    gated = gated_by("truncation", 0.6)
    closed = {site for site, mask in masks_of(gated, torch.randn(SHAPE)).items() if not mask.any()}
    residual = {name for name, _ in model.named_modules() if name.count(".") == 1}
    assert {name for name in closed if name in residual} <= {f"layer{n}.1" for n in range(1, 5)}
    with torch.no_grad(), pag.measure(gated) as measured:
        gated(torch.randn(SHAPE))
    assert measured.fraction == pytest.approx(0.6, abs=0.06)
    with torch.no_grad():  # it is the network without those blocks
        for name in closed & residual:
            branch_end = model.get_submodule(name).bn3
            branch_end.weight.zero_()
            branch_end.bias.zero_()
        if closed <= residual:
            x = torch.randn(SHAPE)
            torch.testing.assert_close(gated(x), model(x))


@pytest.mark.parametrize("policy", ["layer", "random", "grid"])
def test_rates_are_learned_and_calibrated(policy: str) -> None:
    torch.manual_seed(0)
    gated = gated_by(policy).train()
    annealer = pag.Annealer(gated, 60)
    parameters = [p for _, gate in named_gates(gated) for p in gate.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.15)
    for _ in range(60):
        gated(torch.randn(SHAPE))
        optimizer.zero_grad()
        pag.sparsity_loss(gated).backward()
        optimizer.step()
        annealer.step()
    images = [torch.randn(SHAPE)]
    reached = pag.calibrate(gated.eval(), images, budgets=(0.6,))
    assert reached[0.6] == pytest.approx(0.6, abs=0.08 if policy == "layer" else 0.02)


@pytest.mark.parametrize("policy", BASELINES)
@torch.no_grad()
def test_saved_and_loaded(policy: str, tmp_path: Path) -> None:
    gated, x = half_open(policy), torch.randn(SHAPE)
    pag.save_file(gated, tmp_path / "gated.safetensors")
    again = pag.load_file(tmp_path / "gated.safetensors", model=network()).eval()
    assert torch.equal(again(x), gated(x))


@pytest.mark.parametrize("policy", BASELINES)
@torch.no_grad()
def test_deployed(policy: str) -> None:
    gated = half_open(policy)
    deployed = pag.deploy(gated)
    for x in (torch.randn(SHAPE), torch.randn(SHAPE), 3 * torch.randn(SHAPE)):
        expected = gated(x)
        scale = float(expected.abs().max())
        torch.testing.assert_close(deployed(x) / scale, expected / scale, rtol=0, atol=1e-4)
    for network in (gated, deployed):
        for _, gate in named_gates(network):
            gate.offset.fill_(-0.4)
    torch.testing.assert_close(deployed(x) / scale, gated(x) / scale, rtol=0, atol=1e-4)
    with pag.override_gates(deployed, 0.3), pag.override_gates(gated, 0.3):
        torch.testing.assert_close(deployed(x) / scale, gated(x) / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", BASELINES)
@torch.no_grad()
def test_counts_are_the_originals(policy: str) -> None:
    gated, plan = half_open(policy), pag.plan(network(), example_input=SHAPE)
    with pag.measure(gated) as measured:
        gated(torch.randn(SHAPE))
    assert measured.total_macs == SHAPE[0] * plan.total_macs
    assert 0 < measured.fraction < 1


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(pag.PagError, match="policy='dice'"):
        pag.RetrofitConfig(policy="dice")


class Halves(nn.Module):
    """A map at half the size, enlarged again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.interpolate(self.conv(image), scale_factor=2.0)


def test_smaller_inputs_cost_less_and_give_whole_outputs() -> None:
    plain = Halves()
    resized = resize_input(copy.deepcopy(plain), 0.25, example_input=(1, 3, 128, 192))
    assert resized.pag_compute_fraction == pytest.approx(0.25)
    assert list(resized.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 128, 192)
    assert resized(x).shape == plain(x).shape
    shrunk = nn.functional.interpolate(x, (64, 96), mode="bilinear", antialias=True)
    expected = nn.functional.interpolate(plain(shrunk), (128, 192), mode="bilinear")
    assert torch.equal(resized(x), expected)
    assert torch.equal(copy.deepcopy(resized)(x), expected)
    with pytest.raises(pag.PagError, match="already"):
        resize_input(resized, 0.5, example_input=(1, 3, 128, 192))
    with pytest.raises(pag.BudgetError, match="share=0"):
        resize_input(Halves(), 0, example_input=(1, 3, 128, 192))
    with pytest.raises(pag.PagError, match="multiple=256"):
        resize_input(Halves(), 0.5, example_input=(1, 3, 128, 192), multiple=256)


def test_shares_that_multiples_do_not_come_near_are_told(caplog: pytest.LogCaptureFixture) -> None:
    resize_input(Halves(), 0.5, example_input=(1, 3, 128, 192))
    assert not caplog.records
    resized = resize_input(Halves(), 0.5, example_input=(1, 3, 32, 32))
    assert resized.pag_compute_fraction == 1
    assert "of 32x32 pixels the network sees 32x32, 1.00 of them instead of 0.50" in caplog.text
    caplog.clear()
    resize_input(Halves(), 0.5, example_input=(1, 3, 32, 32), multiple=8)
    assert not caplog.records


def test_scores_of_smaller_inputs_are_left_as_they_are() -> None:
    plain = network()
    resized = resize_input(copy.deepcopy(plain), 0.25, example_input=(1, 3, 128, 128))
    x = torch.randn(2, 3, 128, 128)
    shrunk = nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    assert torch.equal(resized(x), plain(shrunk))


def test_a_network_that_cannot_see_a_smaller_input_stays_as_it_was() -> None:
    stubborn = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2))
    with pytest.raises(RuntimeError):
        resize_input(stubborn, 0.25, example_input=(1, 3, 64, 64))
    assert type(stubborn) is nn.Sequential and not hasattr(stubborn, "pag_resized")
    assert stubborn(torch.randn(1, 3, 64, 64)).shape == (1, 2)


def test_gates_and_a_smaller_input_go_together(tmp_path: Path) -> None:
    shape = (1, 3, 96, 128)
    plain = randomize(smp.Unet("resnet18", encoder_weights=None, classes=3)).eval()
    resized = pag.resize_input(copy.deepcopy(plain), 0.5, example_input=shape)
    gated = pag.retrofit(resized, 0.6, example_input=shape)
    x = torch.randn(2, *shape[1:])
    assert torch.equal(gated(x), resized(x))
    pag.calibrate(gated, [x])
    with pag.override_gates(gated, 0.4), pag.measure(gated) as measured, torch.no_grad():
        expected = gated(x)
    assert measured.fraction < 0.75
    assert measured.compute_map.shape == (2, 96, 128)
    assert measured.compute_map.sum() == pytest.approx(measured.macs)

    pag.save_pretrained(gated, tmp_path)
    for model in (None, plain, resized):
        loaded = pag.from_pretrained(tmp_path, model=model)
        assert loaded.pag_compute_fraction == gated.pag_compute_fraction
        with pag.override_gates(loaded, 0.4):
            assert torch.equal(loaded(x), expected)
    fast = pag.deploy(loaded)
    with pag.override_gates(fast, 0.4):
        assert (fast(x) - expected).norm() < 1e-4 * expected.norm()

    assert torch.equal(restore_input(pag.remove(copy.deepcopy(gated)))(x), plain(x))
    with pytest.raises(pag.PagError, match="gated"):
        pag.resize_input(pag.retrofit(plain, 0.6, example_input=shape), 0.5, example_input=shape)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("size", [(384, 480), (256, 320), (321, 481)])
def test_smaller_sizes_are_multiples_near_the_share(size: tuple[int, int], share: float) -> None:
    height, width = smaller_size(size, share, 32)
    assert height % 32 == 0 == width % 32
    assert height * width / (size[0] * size[1]) == pytest.approx(share, rel=0.2)
    assert height / width == pytest.approx(size[0] / size[1], rel=0.3)
