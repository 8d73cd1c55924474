"""Counts of compute against FlopCounterMode, the plan and each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Pair
from networks import CustomNet, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pag_retrofit as pag
from pag_retrofit.functional import pattern_mask
from pag_retrofit.gates import named_gates
from pag_retrofit.tracing import MacCounter


@pytest.fixture
def gated() -> nn.Module:
    config = pag.RetrofitConfig(min_share=0.0)
    model = randomize(CustomNet()).eval()
    return pag.retrofit(model, 1.0, example_input=(1, 3, 32, 32), config=config)


def original_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Attention is computed as products of matrices: not all torch counts it otherwise."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


@torch.no_grad()
def test_open_gates_cost_the_original_and_themselves(pair: Pair) -> None:
    """A stride may leave pixels of a halo that no output reads, so slightly less is right."""
    batch = pair.x.shape[0]
    with pag.measure(pair.gated) as m:
        pair.gated(pair.x)
    gates = batch * sum(s.gate_macs for s in pair.plan.sites)
    assert m.total_macs == original_macs(pair.original, pair.x) == batch * pair.plan.total_macs
    unread = sum(
        s.macs + s.gate_macs
        - s.maps * int(s.cost.active_macs(torch.ones(1, 1, *s.output_size), s.input_size))
        for s in pair.plan.sites
    )  # fmt: skip
    assert m.macs == m.total_macs + gates - batch * unread
    assert unread <= 0.02 * pair.plan.total_macs
    assert set(m.open_rates) == {site.name for site in pair.plan.sites}
    assert set(m.open_rates.values()) == {1.0}


@torch.no_grad()
def test_closed_gates_cost_the_floor(pair: Pair) -> None:
    with pag.override_gates(pair.gated, pattern="none"), pag.measure(pair.gated) as m:
        pair.gated(pair.x)
    assert m.fraction == pytest.approx(pair.plan.floor, abs=1e-9)
    assert set(m.open_rates.values()) == {0.0}


@torch.no_grad()
@pytest.mark.parametrize("size", ["example", "other"])
def test_the_compute_map_sums_to_the_count(pair: Pair, size: str) -> None:
    x = pair.x if size == "example" else pair.other()
    with pag.override_gates(pair.gated, 0.4), pag.measure(pair.gated) as m:
        pair.gated(x)
    assert m.compute_map.shape == (x.shape[0], *x.shape[2:])
    assert m.compute_map.min() >= 0
    assert m.compute_map.sum().item() == pytest.approx(m.macs, rel=1e-9)
    torch.testing.assert_close(m.compute_map.sum((1, 2)), m.image_macs, rtol=1e-9, atol=0)
    assert m.total_macs == original_macs(pair.original, x)
    assert pair.plan.floor - 0.02 < m.fraction < 1


@torch.no_grad()
def test_open_rates_and_masks_are_those_forced(gated: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    with pag.override_gates(gated, 0.25, pattern="random", seed=7), pag.measure(gated) as m:
        gated(x)
    for site, rate in m.open_rates.items():
        mask = m.masks[site]
        assert mask.dtype == torch.bool
        height, width = mask.shape[2:]
        assert rate == round(0.25 * height * width) / (height * width)
        assert torch.equal(mask.float(), pattern_mask("random", 0.25, (2, height, width), 7))


@torch.no_grad()
def test_more_open_pixels_cost_more(gated: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    fractions = []
    for density in (0.0, 0.2, 0.5, 0.8, 1.0):
        with pag.override_gates(gated, density), pag.measure(gated) as m:
            gated(x)
        fractions.append(m.fraction)
    assert fractions == sorted(fractions) and len(set(fractions)) == 5


@torch.no_grad()
def test_the_compute_map_shows_where(gated: nn.Module) -> None:
    """One open patch makes its place in the map the most expensive one."""
    for _, gate in named_gates(gated):
        gate.bias.fill_(-0.5)
        gate.weight.zero_()
    block_gate = dict(named_gates(gated))["block"]
    block_gate.weight.fill_(1.0)
    gated.stem[1].reset_parameters()
    gated.stem[1].reset_running_stats()
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 20:28, 4:12] = 10 * torch.sign(gated.stem[0].pag_bypass_weight.sum())
    gated.stem[0].pag_bypass_weight.fill_(1.0)
    x = x.abs()
    with pag.measure(gated) as m:
        gated(x)
    assert 0 < m.open_rates["block"] < 0.2
    inside = m.compute_map[0, 20:28, 4:12].mean()
    assert inside > 1.5 * m.compute_map[0, :16, 16:].mean()


@torch.no_grad()
def test_passes_accumulate(gated: nn.Module) -> None:
    xs = [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 48, 40)]
    single = []
    for x in xs:
        with pag.override_gates(gated, 0.3), pag.measure(gated) as m:
            gated(x)
        single.append(m)
    with pag.override_gates(gated, 0.3), pag.measure(gated) as both:
        for x in xs:
            gated(x)
    assert both.images == 3
    assert both.macs == sum(m.macs for m in single)
    assert both.total_macs == sum(m.total_macs for m in single)
    assert both.fraction == both.macs / both.total_macs
    assert torch.equal(both.compute_map, single[-1].compute_map)
    pixels = {m: sum(v.numel() for v in [m.masks["block"]]) for m in single}
    opened = sum(m.open_rates["block"] * pixels[m] for m in single)
    assert both.open_rates["block"] == pytest.approx(opened / sum(pixels.values()))


@torch.no_grad()
def test_other_modes_count_beside_it(gated: nn.Module) -> None:
    """Around it, and between it and the network."""
    x = torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False) as around, pag.override_gates(gated, 0.3):
        with pag.measure(gated) as alone:
            gated(x)
        first = around.get_total_flops()
        with pag.measure(gated) as outer, FlopCounterMode(display=False) as between:
            gated(x)
    assert outer.macs == alone.macs and outer.total_macs == alone.total_macs > 0
    assert first == between.get_total_flops() == around.get_total_flops() - first > 0


@torch.no_grad()
def test_what_measuring_does_itself_is_not_counted(
    gated: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take as long as a small network; a mode of others' sees all the same."""
    seen: list[MacCounter] = []
    x, count = torch.randn(1, 3, 32, 32), MacCounter.__torch_dispatch__

    def watch(self: MacCounter, func: Any, *rest: Any) -> Any:
        seen.append(self)
        return count(self, func, *rest)

    monkeypatch.setattr(MacCounter, "__torch_dispatch__", watch)
    with MacCounter():
        gated(x)
    of_the_network = len(seen)
    with pag.measure(gated):
        gated(x)
    assert len(seen) == 2 * of_the_network > 0
    with pag.measure(gated), MacCounter() as between:
        gated(x)
    assert seen.count(between) > of_the_network


def test_training_passes_count_too(gated: nn.Module) -> None:
    gated.train()
    with pag.measure(gated) as m:
        gated(torch.randn(4, 3, 32, 32)).sum().backward()
    mask = m.masks["block"]
    assert m.open_rates["block"] == mask.float().mean().item()
    assert 0.9 < m.fraction < 1.1  # the backward pass is not counted


def hooks_of(network: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]


@torch.no_grad()
def test_measuring_changes_nothing(gated: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    expected = gated(x)
    hooks = hooks_of(gated)
    with pag.measure(gated):
        assert torch.equal(gated(x), expected)
    assert hooks_of(gated) == hooks
    with pytest.raises(RuntimeError), pag.measure(gated):
        gated(torch.randn(1, 4, 32, 32))
    assert hooks_of(gated) == hooks


@torch.no_grad()
def test_overrides_nest_and_end(gated: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    plain = gated(x)
    with pag.override_gates(gated, 0.5, seed=1):
        outer = gated(x)
        with pag.override_gates(gated, 0.5, seed=2):
            assert not torch.equal(gated(x), outer)
        assert torch.equal(gated(x), outer)
    assert torch.equal(gated(x), plain) and not torch.equal(outer, plain)
    with pytest.raises(KeyError), pag.override_gates(gated, pattern="none"):
        raise KeyError
    assert torch.equal(gated(x), plain)


def test_refusals(gated: nn.Module) -> None:
    plain = copy.deepcopy(pag.remove(copy.deepcopy(gated)))
    with pytest.raises(pag.PagError, match="not a gated network"), pag.measure(plain):
        pass
    with pytest.raises(pag.PagError, match="not a gated network"), pag.override_gates(plain):
        pass
    with pytest.raises(pag.PagError, match="pattern"), pag.override_gates(gated, pattern="dots"):
        pass
    with pytest.raises(pag.PagError, match="density"), pag.override_gates(gated, 2.0):
        pass
    with pytest.raises(pag.PagError, match="seed"), pag.override_gates(gated, seed=1.5):  # type: ignore[arg-type]
        pass
    with pytest.raises(pag.PagError, match="nothing to measure"), pag.measure(gated):
        gated(torch.zeros(0, 3, 32, 32))
    with pag.measure(gated) as m:
        pass
    for name in ("fraction", "compute_map"):
        with pytest.raises(pag.PagError, match="nothing was measured"):
            getattr(m, name)


class Attends(nn.Module):
    """Attention of queries to more keys than there are queries, of wider values."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        keys, values = torch.cat([heads, heads], 2), torch.cat([heads, heads], 3).repeat(1, 1, 2, 1)
        return F.scaled_dot_product_attention(heads, keys, values)


class AttendsToOthers(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x[:, :3], x[:, :3], need_weights=False)[0]


class AttendsToItself(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "layer",
    [
        Attends(),
        AttendsToItself(32, 4, batch_first=True),
        AttendsToOthers(32, 4, batch_first=True),
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
    ],
)
def test_attention_counts_however_it_is_computed(layer: nn.Module, mode: Any) -> None:
    layer.eval()
    x = torch.randn(2, 7, 32)
    with mode(), MacCounter() as counter:
        layer(x)
    assert counter.macs == original_macs(layer, x) > 0


def test_no_layer_costs_more_than_the_network() -> None:
    """Also where layers are not called in evaluation, for one operator does what they would."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 32, 4, 4)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.mlp(x)

    model, x = nn.Sequential(Block()).eval(), torch.randn(1, 3, 32, 32)
    plan = pag.plan(model, 1.0, example_input=x)
    assert plan.total_macs == original_macs(model, x)
    assert 0.2 < plan.gateable_share < 0.8
    gated = pag.retrofit(model, 1.0, example_input=x)
    with torch.no_grad(), pag.measure(gated) as m:
        gated(x)
    assert m.total_macs == plan.total_macs
