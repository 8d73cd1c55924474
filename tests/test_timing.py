"""Budgets in time: whose time is whose, and what losses, calibration and checkpoints make of it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from networks import randomize
from torch import nn

import pag_retrofit as pag
from pag_retrofit import timing
from pag_retrofit.gates import NetworkTimes, SiteTime, named_gates, use_times
from pag_retrofit.kernels import native

SHAPE = (2, 3, 64, 64)
EVERYTHING = pag.RetrofitConfig(min_share=0.0)

try:
    native.library()
except pag.PagError:
    pytest.skip("there are no native kernels", allow_module_level=True)


def network(budget: float = 0.7, config: pag.RetrofitConfig = EVERYTHING) -> nn.Module:
    plain = randomize(timm.create_model("resnet26", num_classes=7)).eval()
    return pag.retrofit(plain, budget, example_input=SHAPE, config=config)


def made_up(gated: nn.Module, opened: float = 1.1, floor: float = 0.3) -> NetworkTimes:
    """Times of its sites that grow from the first one to the last."""
    sites = [site for site, gate in named_gates(gated) if not gate.inside]
    unit = (opened - floor) / sum(range(1, len(sites) + 1))
    found = {site: SiteTime(unit * k, 1.02, 0.1, 0.1 * unit) for k, site in enumerate(sites, 1)}
    return NetworkTimes(opened, found)


@torch.no_grad()
def undecided(gated: nn.Module) -> nn.Module:
    """Gates that tell pixels apart."""
    generator = torch.Generator().manual_seed(0)
    for _, gate in named_gates(gated):
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator))
        gate.bias.fill_(0.5)
    return gated


def test_time_follows_what_sites_compute() -> None:
    sites = {"a": SiteTime(0.4, 1.0, 0.2), "b": SiteTime(0.1, 1.1, 0.0)}
    times = NetworkTimes(1.05, sites)
    assert times.floor == pytest.approx(0.55)
    assert times.fraction({"a": 1.0, "b": 1.1}) == pytest.approx(1.05)
    assert times.fraction({"a": 0.2, "b": 0.0}) == pytest.approx(times.floor)
    assert times.fraction({"a": 0.6, "b": 1.1}) == pytest.approx(0.85)
    sites["a"] = SiteTime(0.4, 1.0, 0.2, excess=0.05)
    bent = NetworkTimes(1.05, sites)
    assert bent.floor == times.floor
    assert bent.fraction({"a": 0.6, "b": 1.1}) == pytest.approx(0.9)
    assert bent.fraction({"a": 0.2, "b": 0.0}) == pytest.approx(times.floor)
    assert NetworkTimes.from_dict(asdict(times)) == times


@pytest.mark.parametrize(
    "values", [(-0.1, 1, 0), (0.1, 1, 1), (math.nan, 1, 0), (0.1, math.inf, 0)]
)
def test_impossible_times_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(pag.PagError, match="SiteTime"):
        SiteTime(*values)


def test_times_of_another_network_are_refused() -> None:
    gated = network()
    with pytest.raises(pag.PagError, match="elsewhere"):
        use_times(gated, NetworkTimes(1.0, {"elsewhere": SiteTime(0.1, 1, 0)}))
    assert gated.pag_state.times is None


def test_the_loss_and_measurements_count_time() -> None:
    gated = undecided(network())
    times = made_up(gated)
    use_times(gated, times)
    x = torch.randn(SHAPE)
    alone = []
    for image in x:
        with torch.no_grad(), pag.measure(gated) as measured:
            gated(image[None])
        ratios = measured.site_ratios
        alone.append(times.fraction(ratios))
        assert measured.time_fraction == pytest.approx(alone[-1])
    with torch.no_grad(), pag.measure(gated) as measured:
        gated(x), gated(x.flip(0))
    assert measured.time_fractions.tolist() == pytest.approx(alone[::-1])
    assert measured.time_fraction == pytest.approx(sum(alone) / 2)
    assert measured.time_fraction != pytest.approx(measured.fraction, abs=0.01)

    gated.train()
    for _, gate in named_gates(gated):
        gate.bias.data.fill_(30.0)  # open with certainty, whatever the noise
    gated(x)
    opened = times.fraction({site: _open_ratio(gated, site) for site in ratios})
    assert float(pag.expected_fraction(gated).detach()) == pytest.approx(opened, abs=1e-4)


def test_gates_are_pulled_by_the_time_they_save() -> None:
    gated = network().train()
    times = made_up(gated)
    free = next(iter(times.sites))
    sites = {**times.sites, free: SiteTime(0.0, 1.02, 0.1)}
    use_times(gated, NetworkTimes(times.opened, sites))
    gated(torch.randn(SHAPE))
    pag.expected_fraction(gated).backward()
    slopes = {site: float(gate.bias.grad) for site, gate in named_gates(gated)}
    assert slopes.pop(free) == 0
    assert all(slope > 0 for slope in slopes.values())


def _open_ratio(gated: nn.Module, site: str) -> float:
    gate = dict(named_gates(gated))[site]
    height, width = gate.last_probability.shape[2:]
    full = gate.cost.full_macs(gate.last_input_size, (height, width))
    return 1 + gate.cost.gate_macs * height * width / full


def test_calibration_meets_a_budget_in_time() -> None:
    gated = undecided(network())
    use_times(gated, made_up(gated))
    x = torch.randn(4, *SHAPE[1:])
    reached = pag.calibrate(gated, [x], budgets=[0.8])
    with torch.no_grad(), pag.measure(gated) as measured:
        gated(x)
    assert reached[0.8] == pytest.approx(measured.time_fraction)
    assert measured.time_fraction == pytest.approx(0.8, abs=0.02)
    with pytest.raises(pag.BudgetError, match=r"floor 0\.300"):
        pag.calibrate(gated, [x], budgets=[0.25])


def test_times_are_saved(tmp_path: Path) -> None:
    gated = network()
    use_times(gated, made_up(gated))
    pag.save_pretrained(gated, tmp_path)
    loaded = pag.from_pretrained(tmp_path)
    assert loaded.pag_state.times == gated.pag_state.times
    assert loaded.pag_state.floor == gated.pag_state.floor
    description = json.loads((tmp_path / "config.json").read_text())
    description["times"]["sites"].popitem()
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(pag.CheckpointError, match="other sites"):
        pag.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "pooled"),
    [(smp.Unet, False), (smp.Unet, True), (smp.FPN, False)],
    ids=["gates", "and selectors", "in bands"],
)
def test_every_site_is_timed(kind: type[nn.Module], pooled: bool) -> None:
    plain = kind("resnet18", encoder_weights=None, classes=3).eval()
    multipool = pag.MultiPoolConfig(dilations=(1, 2)) if pooled else None
    config = pag.RetrofitConfig(multipool=multipool)
    gated = pag.retrofit(plain, 1.0, example_input=(1, 3, 96, 128), config=config)
    before = copy.deepcopy(gated.state_dict())
    found = timing._time_sites(gated, _outer(gated), torch.randn(1, 3, 96, 128), 2)
    assert found.sites.keys() == set(_outer(gated))
    # Wide layers: nothing takes longer if it computes nothing.
    assert 0 < found.closed < found.opened and found.plain > 0
    assert all(saved > 0 and excess >= 0 for saved, excess in found.sites.values())
    assert all(gate.override is None for _, gate in named_gates(gated))
    assert all(torch.equal(before[key], value) for key, value in gated.state_dict().items())


def _outer(gated: nn.Module) -> list[str]:
    return [site for site, gate in named_gates(gated) if not gate.inside]


def test_what_all_save_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = network(budget=0.5)
    sites = _outer(gated)
    saved = {site: float(k) for k, site in enumerate(sites)}
    found = {site: (seconds, 0.1 * seconds) for site, seconds in saved.items()}
    fake = timing._Timing(10.0, 11.0, 4.0, found)
    monkeypatch.setattr(timing, "_time_sites", lambda *_: fake)
    times = pag.budget_in_time(gated, example_input=SHAPE)
    assert gated.pag_state.times is times
    assert times.opened == pytest.approx(1.1) and times.floor == pytest.approx(0.4)
    whole = sum(saved.values())
    for site in sites:
        assert times.sites[site].saved == pytest.approx(0.7 * saved[site] / whole)
        assert times.sites[site].excess == pytest.approx(0.07 * saved[site] / whole)
        assert 0 <= times.sites[site].closed < 0.5 < 1 <= times.sites[site].opened

    hopeless = network(budget=0.3)
    with pytest.raises(pag.BudgetError, match=r"0\.400"):
        pag.budget_in_time(hopeless, example_input=SHAPE)
    assert hopeless.pag_state.times is None


@pytest.mark.parametrize("half", [50, 60])
def test_scattered_pixels_take_longer(half: int) -> None:
    call = timing._Call
    linear = call(0.5 + 0.015 * half, half)
    assert timing._excess(call(2.0, 100), linear, call(0.5, 0)) == pytest.approx(0)
    slower = call(linear.seconds + 0.2, half)
    assert timing._excess(call(2.0, 100), slower, call(0.5, 0)) == pytest.approx(0.2)
