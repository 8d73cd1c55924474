"""The maths: masks and their gradients, halos against brute force, identities of open masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F

from pag_retrofit import functional as pf
from pag_retrofit.errors import PagError

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sample_mask_is_binary_and_follows_the_tempered_sigmoid(
    logit: float, temperature: float
) -> None:
    count = 200_000
    mask = pf.sample_mask(torch.full((count,), logit), temperature)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    expected = 1 / (1 + math.exp(-logit / temperature))
    deviation = math.sqrt(expected * (1 - expected) / count)
    assert abs(mask.double().mean().item() - expected) < 5 * deviation + 1e-6


def test_sample_mask_gradient_is_that_of_the_relaxation() -> None:
    logits = torch.randn(1000, requires_grad=True)
    torch.manual_seed(3)
    mask = pf.sample_mask(logits, 0.7)
    weights = torch.randn(1000)
    (straight_through,) = torch.autograd.grad((mask * weights).sum(), logits)
    torch.manual_seed(3)
    uniform = torch.rand(1000)
    relaxed = torch.sigmoid(logits / 0.7 + torch.logit(uniform))
    (gradient,) = torch.autograd.grad((relaxed * weights).sum(), logits)
    torch.testing.assert_close(straight_through, gradient)
    assert torch.equal(mask, (relaxed >= 0.5).float())


def test_sample_mask_stays_finite_for_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 1e4], requires_grad=True)
    mask = pf.sample_mask(logits, 0.1)
    mask.sum().backward()
    assert mask.tolist() == [0.0, 1.0]
    assert torch.isfinite(logits.grad).all()


def test_sample_mask_keeps_the_dtype() -> None:
    assert pf.sample_mask(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_bernoulli_kl_agrees_with_torch(target: float, probability: float) -> None:
    p, q = (torch.tensor(value, dtype=torch.float64) for value in (target, probability))
    torch.testing.assert_close(pf.bernoulli_kl(p, q), kl_divergence(Bernoulli(p), Bernoulli(q)))


def test_bernoulli_kl_is_finite_at_the_ends() -> None:
    q = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = pf.bernoulli_kl(0.5, q)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(q.grad).all()
    assert pf.bernoulli_kl(1.0, torch.ones(1)).item() == pytest.approx(0, abs=1e-6)


@st.composite
def windows(draw: st.DrawFn) -> tuple[pf.Window, tuple[int, int], Tensor]:
    """A window, the size of its input, and a random mask of its output."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, dilation = draw(PAIRS), draw(PAIRS)
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, r)) for r in reach)
    size = tuple(draw(st.integers(r + 1, r + 9)) for r in reach)
    out = [(n + 2 * p - r - 1) // s + 1 for n, p, r, s in zip(size, padding, reach, stride)]  # noqa: B905
    seed = draw(st.integers(0, 1000))
    mask = torch.rand(2, 1, *out, generator=torch.Generator().manual_seed(seed))
    return pf.Window(kernel, stride, dilation, padding), size, mask  # type: ignore[arg-type]


def brute_force_needed(mask: Tensor, window: pf.Window, size: tuple[int, int]) -> Tensor:
    """Input pixels with a gradient, through a convolution with ones."""
    x = torch.zeros(mask.shape[0], 1, *size, requires_grad=True)
    y = F.conv2d(
        x, torch.ones(1, 1, *window.kernel), None, window.stride, window.padding, window.dilation
    )
    (gradient,) = torch.autograd.grad((y * mask).sum(), x)
    return (gradient != 0).float()


@given(windows(), st.floats(0, 1))
def test_needed_inputs_are_those_a_convolution_reads(
    case: tuple[pf.Window, tuple[int, int], Tensor], density: float
) -> None:
    window, size, noise = case
    mask = (noise < density).float()
    needed = pf.needed_inputs(mask, window, size)
    assert torch.equal(needed, brute_force_needed(mask, window, size))


@given(windows())
def test_needed_inputs_of_a_soft_mask_are_the_largest_value_that_needs_them(
    case: tuple[pf.Window, tuple[int, int], Tensor],
) -> None:
    window, size, soft = case
    needed = pf.needed_inputs(soft, window, size)
    for threshold in (0.2, 0.5, 0.8):
        hard = brute_force_needed((soft >= threshold).float(), window, size)
        assert torch.equal((needed >= threshold).float(), hard)


def test_needed_inputs_has_a_gradient() -> None:
    mask = torch.rand(1, 1, 5, 5, requires_grad=True)
    pf.needed_inputs(mask, pf.Window((3, 3), (2, 2), (1, 1), (1, 1)), (9, 9)).sum().backward()
    assert (mask.grad > 0).all()


@pytest.mark.parametrize("pattern", ["blobs", "random", "rows"])
@given(st.floats(0, 1), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_pattern_masks_count_repeat_and_nest(
    pattern: str, density: float, height: int, width: int, seed: int
) -> None:
    shape = (2, height, width)
    mask = pf.pattern_mask(pattern, density, shape, seed)
    assert mask.shape == (2, 1, height, width) and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.sum((1, 2, 3)).tolist() == [round(density * height * width)] * 2
    assert torch.equal(mask, pf.pattern_mask(pattern, density, shape, seed))
    assert (pf.pattern_mask(pattern, density / 2, shape, seed) <= mask).all()


def test_pattern_masks_look_as_named() -> None:
    shape = (1, 24, 24)
    blobs, noise, rows = (
        pf.pattern_mask(p, 0.5, shape, 1)[0, 0] for p in ("blobs", "random", "rows")
    )
    assert set(rows.mean(1).tolist()) == {0.0, 1.0}
    edges = [mask.diff(dim=0).abs().sum() + mask.diff(dim=1).abs().sum() for mask in (blobs, noise)]
    assert edges[0] < edges[1] / 2  # smooth regions have short borders
    assert not torch.equal(blobs, pf.pattern_mask("blobs", 0.5, shape, 2)[0, 0])
    assert pf.pattern_mask("all", 0.1, shape, 0).min() == 1
    assert pf.pattern_mask("none", 0.9, shape, 0).max() == 0


def test_blobs_stay_in_place_when_the_resolution_changes() -> None:
    coarse = pf.pattern_mask("blobs", 0.5, (1, 32, 32), 5)
    fine = pf.pattern_mask("blobs", 0.5, (1, 64, 64), 5)
    assert (F.avg_pool2d(fine, 2).round() == coarse).float().mean() > 0.95


@pytest.mark.parametrize(
    ("pattern", "density", "word"),
    [("stripes", 0.5, "pattern"), ("blobs", 1.5, "density"), ("blobs", float("nan"), "density")],
)
def test_pattern_mask_refuses(pattern: str, density: float, word: str) -> None:
    with pytest.raises(PagError, match=word):
        pf.pattern_mask(pattern, density, (1, 4, 4), 0)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_mix_takes_exactly_one_side(with_gradient: bool) -> None:
    active, bypass = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    mask = (torch.rand(2, 1, 5, 7) < 0.5).float().requires_grad_(with_gradient)
    mixed = pf.mix(active, bypass, mask)
    assert torch.equal(mixed, torch.where(mask.bool(), active, bypass))
    if with_gradient:
        mixed.sum().backward()
        torch.testing.assert_close(mask.grad, (active - bypass).sum(1, keepdim=True))


def test_open_masks_change_no_bit() -> None:
    x = torch.randn(2, 3, 5, 7)
    ones = torch.ones(2, 1, 5, 7)
    assert torch.equal(pf.apply_mask(x, ones), x)
    pooled = x.mean((2, 3), keepdim=True)
    assert torch.equal(pf.mask_pool_input(x, ones), x)
    assert torch.equal(pf.renormalize_pool(pooled, ones), pooled)
    assert pf.subsample(x, (1, 1)) is x
    assert torch.equal(pf.subsample(x, (2, 3)), x[:, :, ::2, ::3])


@pytest.mark.parametrize("keepdim", [False, True])
def test_masked_mean_pools_over_open_pixels(keepdim: bool) -> None:
    x = torch.randn(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1, :3] = 1  # the second image has no open pixel
    pooled = pf.mask_pool_input(x, mask).mean((2, 3), keepdim=keepdim)
    result = pf.renormalize_pool(pooled, mask)
    assert result.shape == ((2, 3, 1, 1) if keepdim else (2, 3))
    torch.testing.assert_close(result[0].flatten(), x[0, :, 1, :3].mean(1))
    assert not result[1].any()


def test_functions_stay_one_call_when_traced_again() -> None:
    class Uses(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mixed = pf.mix(pf.apply_mask(x, mask), pf.subsample(x, (1, 1)), mask)
            pooled = pf.mask_pool_input(mixed, mask).mean((2, 3))
            return pf.renormalize_pool(pooled, mask)

    traced = fx.symbolic_trace(Uses())
    calls = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert calls == {
        pf.mix, pf.apply_mask, pf.subsample, pf.mask_pool_input, pf.renormalize_pool
    }  # fmt: skip
    x, mask = torch.randn(1, 2, 4, 4), (torch.rand(1, 1, 4, 4) < 0.5).float()
    assert torch.equal(traced(x, mask), Uses()(x, mask))
