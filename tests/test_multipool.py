"""MultiPool: each pixel chooses its pooling field; and one branch of an ASPP module."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ONE_EACH, CustomNet, conv, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import pag_retrofit as pag
from pag_retrofit.functional import (
    computed_choice,
    computed_mask,
    dilated,
    one_hot_maximum,
    sample_choice,
    selector_window,
)
from pag_retrofit.gates import named_gates
from pag_retrofit.multipool import (
    AveragedConv2d,
    BranchFill,
    BranchSelector,
    MultiPoolConv2d,
    branches_run,
    expected_relu,
)

SHAPE = (2, 3, 64, 64)


def pooled(model: nn.Module, shape: tuple[int, ...] = SHAPE, **multipool: Any) -> nn.Module:
    """Only MultiPool, no gates."""
    config = pag.RetrofitConfig(include=(), multipool=pag.MultiPoolConfig(**multipool))
    return pag.retrofit(model, 1.0, example_input=shape, config=config)


def selectors(gated: nn.Module) -> dict[str, BranchSelector]:
    return {name: gate for name, gate in named_gates(gated) if isinstance(gate, BranchSelector)}


@torch.no_grad()
def scramble(gated: nn.Module, seed: int = 0) -> nn.Module:
    """Train nothing, but let every selector choose by its input, all branches somewhere."""
    generator = torch.Generator().manual_seed(seed)
    for selector in selectors(gated).values():
        weight = selector.choose_weight
        weight.copy_(3 * torch.randn(weight.shape, generator=generator))
        selector.bias.zero_()
    return gated


def dense_macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=ONE_EACH, num_classes=5)


def deeplab(architecture: str = "DeepLabV3Plus") -> nn.Module:
    return smp.create_model(
        architecture, "resnet18", encoder_weights=None, classes=3, decoder_channels=16
    )


class Chain(nn.Module):
    """Convolutions outside residual branches: one that keeps its channels, one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.same = nn.Sequential(conv(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.wider = nn.Sequential(conv(8, 12, 5, groups=4), nn.ReLU())
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wider(self.same(self.stem(x))))


# --- the start ------------------------------------------------------------------------------------

NETWORKS = {
    "resnet18": (resnet, {}),
    "seresnet50": (lambda: timm.create_model("seresnet50", layers=ONE_EACH), {}),
    "mobilenetv2": (lambda: timm.create_model("mobilenetv2_035"), {}),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=ONE_EACH, dims=(16, 32, 48, 64)),
        {"dilations": (1, 2)},
    ),
    "chain": (Chain, {"sites": ("same.0", "wider.0")}),
    "Unet": (
        lambda: smp.create_model("Unet", "tu-mobilenetv3_small_050", encoder_weights=None),
        {"sites": ("*conv_dw", "decoder.blocks.0.conv1.0")},
    ),
    "DeepLabV3Plus": (deeplab, {}),
}


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_outputs_are_bit_identical_until_it_is_trained(name: str, identity: bool) -> None:
    build, multipool = NETWORKS[name]
    model = randomize(build()).eval()
    for gates in ((), ("*",)):
        config = pag.RetrofitConfig(
            include=gates, multipool=pag.MultiPoolConfig(identity=identity, **multipool)
        )
        gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=config)
        assert selectors(gated)
        for x in (torch.randn(SHAPE), torch.randn(1, 3, 96, 64)):
            assert torch.equal(gated(x), model(x))
        own = [key for key in gated.state_dict() if ".pag_" not in f".{key}"]
        assert own == list(model.state_dict())


@torch.no_grad()
def test_removal_gives_the_original_back() -> None:
    model = randomize(resnet()).eval()
    gated = pooled(model, shared=False)
    removed = pag.remove(gated)
    assert [type(m) for m in removed.modules()] == [type(m) for m in model.modules()]
    assert list(removed.state_dict()) == list(model.state_dict())
    x = torch.randn(SHAPE)
    assert torch.equal(removed(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_trained_network_survives_saving_and_copying(tmp_path: Path, shared: bool) -> None:
    model = randomize(Chain()).eval()
    config = pag.RetrofitConfig(
        multipool=pag.MultiPoolConfig(dilations=(1, 3), sites=("same.0", "wider.0"), shared=shared)
    )
    gated = scramble(pag.retrofit(model, 1.0, example_input=SHAPE, config=config)).eval()
    if not shared:
        gated.get_parameter("same.0.pag_weight_3").mul_(-1)
    x = torch.randn(SHAPE)
    expected = gated(x)
    assert not torch.equal(expected, model(x))
    pag.save_file(gated, tmp_path / "gated.safetensors")
    loaded = pag.load_file(tmp_path / "gated.safetensors", model=model)
    assert loaded.pag_state.config == config
    assert torch.equal(loaded(x), expected)
    assert torch.equal(copy.deepcopy(gated)(x), expected)


# --- the convolution ------------------------------------------------------------------------------

convolutions = st.builds(
    lambda kernel, stride, dilation, groups, same, bias: nn.Conv2d(
        4,
        8,
        kernel,
        1 if same else stride,
        "same" if same else tuple((k - 1) * dilation // 2 for k in kernel),
        dilation,
        groups,
        bias,
    ),
    st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)


def brute_force(layer: MultiPoolConv2d, x: Tensor, factors: Tensor) -> Tensor:
    """Each output pixel by itself: tap by tap, in double precision."""
    outputs = []
    rows, columns = layer.kernel_size
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in factors.shape)).tolist():
        factor = int(factors[b, i, j])
        weight = layer.weight if layer.pag_shared or factor < 2 else None
        if weight is None:
            weight = layer.get_parameter(f"pag_weight_{factor}")
        steps = [d * factor for d in layer.dilation]
        taps = torch.zeros(4, rows, columns, dtype=torch.float64)
        for u in range(rows):
            for v in range(columns):
                y = i * layer.stride[0] + (u - rows // 2) * steps[0]
                z = j * layer.stride[1] + (v - columns // 2) * steps[1]
                if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                    taps[:, u, v] = x[b, :, y, z]
        weight = weight.double().view(layer.groups, -1, *weight.shape[1:])
        outputs.append(torch.einsum("gcuv,gocuv->go", taps.view_as(weight[:, 0]), weight).flatten())
    result = torch.stack(outputs).view(*factors.shape, -1).permute(0, 3, 1, 2)
    return result if layer.bias is None else result + layer.bias.double().view(-1, 1, 1)


@given(
    convolutions,
    st.sampled_from([(1, 2), (0, 1), (0, 1, 2, 4), (1, 3)]),
    st.booleans(),
    st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 9),
)
@settings(max_examples=40)
@torch.no_grad()
def test_each_pixel_convolves_at_the_dilation_it_chose(
    layer: nn.Conv2d,
    factors: tuple[int, ...],
    shared: bool,
    size: tuple[int, int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    multipool = MultiPoolConv2d.from_conv(layer, factors, shared=shared)
    for name, parameter in multipool.named_parameters():
        if name.startswith("pag_weight"):
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(size[0], 4, *size[1:])
    scores = torch.rand(size[0], len(factors), *multipool.branch(x, 1).shape[2:])
    choice = one_hot_maximum(scores)
    chosen = torch.tensor(factors)[choice.argmax(1)]
    expected = brute_force(multipool, x, chosen)
    torch.testing.assert_close(multipool(x, choice).double(), expected, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        mixed = multipool(x, choice.requires_grad_())
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_only_branches_that_are_chosen_run() -> None:
    layer = MultiPoolConv2d.from_conv(conv(4, 4, 3), (1, 2, 4))
    choice = one_hot_maximum(torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 6, 6))
    x = torch.randn(1, 4, 6, 6)
    assert branches_run(choice) == (2,)
    assert dense_macs(lambda x: layer(x, choice), x) == 36 * 4 * 4 * 9
    assert torch.equal(layer(x, choice), F.conv2d(x, layer.weight, layer.bias, 1, 4, 4))
    assert branches_run(choice.requires_grad_()) == (0, 1, 2)


# --- the choice -----------------------------------------------------------------------------------


@given(st.integers(1, 6), st.floats(0.1, 4), st.integers(0, 99))
def test_a_drawn_choice_is_one_hot_and_has_the_gradient_of_the_softmax(
    branches: int, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = (3 * torch.randn(2, branches, 4, 5)).requires_grad_()
    choice = sample_choice(logits, temperature)
    assert set(choice.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(choice.sum(1), torch.ones(2, 4, 5))
    (gradient,) = torch.autograd.grad((choice * torch.randn_like(choice)).sum(), logits)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(2, 4, 5), rtol=0, atol=1e-5)


@torch.no_grad()
def test_choices_are_drawn_with_the_probability_of_the_softmax() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2]).view(1, 3, 1, 1)
    drawn = sample_choice(logits.expand(1, 3, 200, 200), 0.7).mean((0, 2, 3))
    expected = torch.softmax(logits.flatten() / 0.7, 0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.01)  # 4 standard deviations


def test_computed_mask_and_choice_multiply_to_the_choice() -> None:
    logits = torch.randn(2, 4, 6, 6, requires_grad=True)
    choice = sample_choice(logits)
    rest = computed_mask(choice) * computed_choice(choice)
    assert torch.equal(rest, choice[:, 1:])
    direction = torch.randn_like(rest)
    ours = torch.autograd.grad((rest * direction).sum(), logits, retain_graph=True)[0]
    theirs = torch.autograd.grad((choice[:, 1:] * direction).sum(), logits)[0]
    open_pixels = computed_mask(choice).bool().expand_as(ours)
    torch.testing.assert_close(ours[open_pixels], theirs[open_pixels])


@torch.no_grad()
def test_a_new_selector_prefers_its_start_whatever_it_sees() -> None:
    gated = pooled(resnet())
    for selector in selectors(gated).values():
        x = 100 * torch.randn(1, selector.spec.channels, 6, 6)
        assert (selector.eval()(x).argmax(1) == selector.spec.start).all()
        selector.train()(x)
        started = selector.last_probability[:, selector.spec.start]
        torch.testing.assert_close(started, torch.full_like(started, 0.99))


@torch.no_grad()
def test_a_choice_depends_on_the_neighbours_only() -> None:
    gated = scramble(pooled(Chain(), sites=("same.0",))).eval()
    selector = selectors(gated)["same.0"]
    x = torch.randn(50, 8, 12, 12)
    changed = x.clone()
    changed[..., 5, 5] = 10 * torch.randn(50, 8)
    differs = (selector(x) != selector(changed)).any(1).any(0).nonzero()
    assert len(differs) > 1
    assert (differs - 5).abs().max() == 1


def test_training_moves_every_selector_and_branch() -> None:
    gated = pag.retrofit(
        randomize(CustomNet()),
        0.7,
        example_input=SHAPE,
        config=pag.RetrofitConfig(
            min_share=0,
            multipool=pag.MultiPoolConfig(
                dilations=(1, 2), sites=("block.branch.3", "head.0"), shared=False
            ),
        ),
    )
    scramble(gated).train()
    (gated(torch.randn(SHAPE)) ** 2).mean().backward()
    for name, parameter in gated.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if "pag_pool" in name or "pag_weight" in name or "pag_bypass" in name:
            assert parameter.grad.abs().sum() > 0, name


# --- what it costs --------------------------------------------------------------------------------


def selector_macs(selector: BranchSelector, window_pixels: int, pixels: int) -> int:
    """Counted from its parameters."""
    reduce = selector.reduce_weight.numel()
    rest = selector.spatial_weight.numel() + selector.choose_weight.numel()
    return reduce * window_pixels + rest * pixels


@pytest.mark.parametrize("site", ["same.0", "wider.0"])
@pytest.mark.parametrize("bypass", ["", "identity", "collapsed"])
@torch.no_grad()
def test_measured_macs_are_those_of_the_branches_chosen(site: str, bypass: str) -> None:
    model = randomize(Chain()).eval()
    config = pag.RetrofitConfig(
        include=(),
        bypass=bypass or "auto",
        multipool=pag.MultiPoolConfig(dilations=(1, 2, 4), identity=bool(bypass), sites=(site,)),
    )
    gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=config).eval()
    x = torch.randn(SHAPE)
    with pag.override_branches(gated, seed=3), pag.measure(gated) as measured:
        gated(x)
    layer = model.get_submodule(site)
    factors = measured.branch_maps[site]
    pixels = factors.numel()
    full = layer.weight.numel()
    chosen = {factor: int((factors == factor).sum()) for factor in (0, 1, 2, 4)}
    assert all(chosen[factor] > pixels / 6 for factor in selectors(gated)[site].spec.factors)
    # Only where channels agree can the input stand for the output.
    passed_on = bypass == "identity" and site == "same.0"
    skipped = 0 if passed_on else layer.weight[..., 0, 0].numel()
    expected = dense_macs(model, x) - pixels * full
    expected += full * sum(chosen[f] for f in (1, 2, 4)) + skipped * chosen[0]
    expected += selector_macs(selectors(gated)[site], pixels, pixels)
    assert measured.macs == expected
    assert measured.total_macs == dense_macs(model, x)
    assert measured.compute_map.sum().item() == pytest.approx(expected, rel=1e-12)
    shares = measured.branch_shares[site]
    assert shares == {f: chosen[f] / pixels for f in selectors(gated)[site].spec.factors}


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("site", ["block.branch.0", "block.branch.3"])
@torch.no_grad()
def test_inside_a_gated_branch_only_what_open_pixels_need_counts(site: str, density: float) -> None:
    model = randomize(CustomNet()).eval()
    config = pag.RetrofitConfig(
        include=("block",),
        min_share=0,
        multipool=pag.MultiPoolConfig(dilations=(1, 2), sites=(site,)),
    )
    gated = scramble(pag.retrofit(model, 1.0, example_input=SHAPE, config=config)).eval()
    gate = dict(named_gates(gated))["block"]
    gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    gate.bias.fill_({0.0: -99.0, 0.4: -0.2, 1.0: 99.0}[density])
    x = torch.randn(SHAPE)
    with pag.override_branches(gated), pag.measure(gated) as measured:
        gated(x)
    mask, factors = measured.masks["block"][:, 0], measured.branch_maps[site]
    first, second = model.block.branch[0], model.block.branch[3]
    selector = selectors(gated)[site]
    expected = dense_macs(model, x) + gate.weight.numel() * mask.numel()
    expected -= mask.numel() * (first.weight.numel() + second.weight.numel())
    if site == "block.branch.3":
        near = windows(mask, torch.ones_like(factors))
        needed = windows(mask, factors) | near
        expected += first.weight.numel() * int(needed.sum())
        expected += selector_macs(selector, int(near.sum()), int(mask.sum()))
        expected += branch_macs(second, factors[mask])
    else:
        needed = windows(mask, torch.ones_like(factors))
        expected += branch_macs(first, factors[needed])
        near = windows(needed, torch.ones_like(factors))
        expected += selector_macs(selector, int(near.sum()), int(needed.sum()))
        expected += second.weight.numel() * int(mask.sum())
    assert measured.macs == expected
    assert measured.compute_map.sum().item() == pytest.approx(expected, rel=1e-12)


def windows(mask: Tensor, factors: Tensor) -> Tensor:
    """All pixels in the dilated 3x3 windows of the pixels of a mask (B, H, W), one by one."""
    needed = torch.zeros_like(mask)
    height, width = mask.shape[1:]
    for b, i, j in mask.nonzero().tolist():
        step = int(factors[b, i, j])
        for y in (i - step, i, i + step):
            for z in (j - step, j, j + step):
                if 0 <= y < height and 0 <= z < width:
                    needed[b, y, z] = True
    return needed


def branch_macs(layer: nn.Conv2d, factors: Tensor) -> int:
    """Of a 3x3 convolution and its collapsed kernel, at the pixels that chose these factors."""
    full = layer.weight.numel()
    return full * int((factors > 0).sum()) + full // 9 * int((factors == 0).sum())


@torch.no_grad()
def test_closed_pixels_of_a_gated_branch_do_not_depend_on_the_choices() -> None:
    gated = pag.retrofit(
        randomize(CustomNet()).eval(),
        1.0,
        example_input=SHAPE,
        config=pag.RetrofitConfig(
            min_share=0, multipool=pag.MultiPoolConfig(sites=("block.branch.3",))
        ),
    )
    x = torch.randn(SHAPE)
    with pag.override_gates(gated, 0.0):
        closed = gated(x)
        with pag.override_branches(gated, seed=5):
            assert torch.equal(gated(x), closed)
    with pag.override_branches(gated, seed=5):
        assert not torch.equal(gated(x), gated(x) * 0 + closed)


def test_a_dilated_window_reads_around_the_same_centre() -> None:
    window = selector_window((2, 2))
    assert (window.kernel, window.dilation, window.padding) == ((3, 3), (2, 2), (2, 2))
    assert dilated(window, 3).padding == (6, 6)
    assert dilated(window, 0).kernel == (1, 1)


@torch.no_grad()
def test_calibration_trades_neighbours_for_compute() -> None:
    model = randomize(Chain()).eval()
    gated = scramble(pooled(model, dilations=(1, 2), sites=("same.0", "wider.0"))).eval()
    images = [torch.randn(2, 3, 64, 64) for _ in range(3)]
    floor = gated.pag_state.floor
    budgets = [floor + share * (1 - floor) for share in (0.75, 0.4)]
    points = pag.calibrate(gated, images, budgets)
    assert points[budgets[0]] > points[budgets[1]]
    for budget in budgets:
        pag.set_budget(gated, budget)
        with pag.measure(gated) as measured:
            for image in images:
                gated(image)
        assert measured.fraction == pytest.approx(budget, abs=0.02)
    with pag.override_gates(gated, 0.0), pag.measure(gated) as measured:
        gated(images[0])
    assert measured.fraction == pytest.approx(floor, abs=1e-9)


def test_the_loss_pushes_pixels_to_the_identity_when_compute_is_dear() -> None:
    gated = pooled(randomize(Chain()), dilations=(1, 2), sites=("same.0",)).train()
    gated(torch.randn(SHAPE))
    gated.pag_state.rho = gated.pag_state.floor
    bias = selectors(gated)["same.0"].bias
    for kind in ("global", "layer"):
        (gradient,) = torch.autograd.grad(pag.sparsity_loss(gated, kind), bias, retain_graph=True)
        assert gradient[0] < 0 < gradient[1]  # towards branch 0, away from dilation 1


def test_nothing_to_save_is_no_loss() -> None:
    gated = pooled(randomize(Chain()), identity=False, sites=("same.0",)).train()
    assert gated.pag_state.floor > 1
    gated(torch.randn(SHAPE))
    for kind in ("global", "layer"):
        assert pag.sparsity_loss(gated, kind).item() == 0


# --- ASPP -----------------------------------------------------------------------------------------


def aspp_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("decoder.aspp.0")


@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus"])
@torch.no_grad()
def test_a_converted_aspp_starts_bit_identical(architecture: str) -> None:
    model = randomize(deeplab(architecture)).eval()
    gated = pag.convert_aspp(model, example_input=SHAPE)
    x = torch.randn(SHAPE)
    assert torch.equal(gated.eval()(x), model(x))
    assert 0 < gated.pag_state.floor < gated.pag_state.budget < 1
    removed = pag.remove(gated)
    assert list(removed.state_dict()) == list(model.state_dict())
    assert torch.equal(removed(x), model(x))


@torch.no_grad()
def test_each_pixel_of_an_aspp_takes_the_branch_it_chose() -> None:
    model = randomize(deeplab()).eval()
    gated = pag.convert_aspp(model, example_input=SHAPE).eval()
    fills = [m for m in gated.modules() if isinstance(m, BranchFill)]
    for fill in fills:
        fill.mean.uniform_()
    features = torch.randn(2, 512, 6, 5)
    seen: list[Tensor] = []
    (selector,) = selectors(gated).values()
    handle = selector.register_forward_hook(lambda *call: seen.append(call[2]))
    with pag.override_branches(gated, seed=1):
        ours = aspp_of(gated)(features)
    handle.remove()
    aspp, choice = aspp_of(model), seen[0].argmax(1)
    maps = [branch(features) for branch in aspp.convs]
    assert len(fills) == len(maps) - 1 == 4
    expected = torch.zeros_like(ours)
    for index in range(5):
        inputs = list(maps)
        for position, fill in enumerate(fills):
            if index not in (0, position + 1):
                inputs[position] = fill.mean.expand_as(maps[position])
        output = aspp.project(torch.cat(inputs, 1))
        expected = torch.where((choice == index)[:, None], output, expected)
        assert (choice == index).any()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_budget_counts_the_branches_of_an_aspp() -> None:
    model = randomize(deeplab()).eval()
    gated = pag.convert_aspp(model, example_input=SHAPE).eval()
    x = torch.randn(SHAPE)
    with pag.override_branches(gated, seed=2), pag.measure(gated) as measured:
        gated(x)
    aspp = aspp_of(model)
    (chosen,) = measured.branch_maps.values()
    (selector,) = selectors(gated).values()
    # Per branch: its own convolutions and its share of the projection.
    own = [
        sum(m.weight.numel() for m in branch.modules() if isinstance(m, nn.Conv2d)) + 16 * 16
        for branch in aspp.convs[:-1]
    ]
    rates = selector.spec.factors
    assert rates[0] == -1
    saved = sum(
        int((chosen == rate).sum()) * (sum(own) - own[k]) for k, rate in enumerate(rates[1:])
    )
    spent = selector_macs(selector, chosen.numel(), chosen.numel())
    assert measured.macs == dense_macs(model, x) - saved + spent
    assert measured.total_macs == dense_macs(model, x)


@torch.no_grad()
def test_a_fill_starts_at_what_its_branch_gives_on_average() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0]))
    norm.bias.copy_(torch.tensor([-0.5, 0.3, 0.7]))
    norm.running_mean.copy_(torch.tensor([2.0, -1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 9.0]))
    x = norm.running_mean.view(1, 3, 1, 1) + norm.running_var.sqrt().view(1, 3, 1, 1) * torch.randn(
        4, 3, 300, 300
    )
    simulated = F.relu(norm(x)).mean((0, 2, 3))
    torch.testing.assert_close(expected_relu(norm.weight, norm.bias), simulated, rtol=0, atol=0.01)


def test_an_aspp_learns_with_few_branches() -> None:
    gated = pag.convert_aspp(randomize(deeplab()), example_input=SHAPE).train()
    gated.pag_state.rho = gated.pag_state.floor
    ((gated(torch.randn(SHAPE)) ** 2).mean() + pag.sparsity_loss(gated)).backward()
    (selector,) = selectors(gated).values()
    assert selector.bias.grad[0] > 0 > selector.bias.grad[1:].max()  # away from all branches
    assert all(torch.isfinite(p.grad).all() for p in gated.parameters() if p.grad is not None)


# --- the average of all branches ------------------------------------------------------------------


@torch.no_grad()
def test_averaged_branches_are_the_mean_of_dilated_convolutions() -> None:
    model = randomize(Chain()).eval()
    config = pag.MultiPoolConfig(dilations=(1, 2, 4), sites=("same.0",))
    averaged = pag.average_branches(model, example_input=SHAPE, config=config).eval()
    layer = model.same[0]
    x = torch.randn(1, 8, 9, 9)
    expected = sum(F.conv2d(x, layer.weight, None, 1, d, d) for d in (1, 2, 4)) / 3
    torch.testing.assert_close(averaged.same[0](x), expected)
    image = torch.randn(SHAPE)
    share = dense_macs(averaged, image) / dense_macs(model, image)
    assert averaged.pag_compute_fraction == pytest.approx(share)
    assert isinstance(averaged.same[0], AveragedConv2d)
    with pytest.raises(RuntimeError, match="pag_averaged"):  # not to be taken for the plain one
        model.load_state_dict(averaged.state_dict())
    with pytest.raises(pag.PagError, match="already"):
        pag.average_branches(averaged, example_input=SHAPE, config=config)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"dilations": (2, 4)}, "1 among them"),
        ({"dilations": (1, 1)}, "rising"),
        ({"dilations": (1, 2.5)}, "integers"),
        ({"dilations": 3}, "dilations=3"),
        ({"dilations": (1,), "identity": False}, "one branch"),
        ({"identity": "yes"}, "identity='yes'"),
        ({"sites": "decoder.*"}, "sites='decoder"),
    ],
)
def test_a_wrong_configuration_is_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(pag.PagError, match=word):
        pag.MultiPoolConfig(**arguments)


@pytest.mark.parametrize(
    ("sites", "word"),
    [
        (("nothing.*",), "no convolution of the network matches"),
        (("head",), "no neighbours"),
    ],
)
def test_a_site_that_cannot_be_pooled_is_named(sites: tuple[str, ...], word: str) -> None:
    with pytest.raises(pag.PagError, match=word):
        pooled(Chain(), sites=sites)


def test_a_network_without_an_aspp_is_refused() -> None:
    with pytest.raises(pag.PagError, match="DeepLabV3"):
        pag.convert_aspp(resnet(), example_input=SHAPE)


def test_convolutions_of_an_aspp_cannot_be_pooled_twice() -> None:
    config = pag.RetrofitConfig(
        include=(), multipool=pag.MultiPoolConfig(sites=("decoder.aspp.0.convs.1.0.0",))
    )
    with pytest.raises(pag.PagError, match="leave them out"):
        pag.convert_aspp(deeplab(), example_input=SHAPE, config=config)


def test_branches_cannot_be_forced_where_there_are_none() -> None:
    gated = pag.retrofit(resnet(), 1.0, example_input=SHAPE)
    with pytest.raises(pag.PagError, match="no branch selector"), pag.override_branches(gated):
        pass


def test_a_pooled_network_is_gated_already() -> None:
    gated = pooled(resnet())
    with pytest.raises(pag.PagError, match="gated already"):
        pooled(gated)


def test_the_plan_lists_pooled_convolutions_once() -> None:
    config = pag.RetrofitConfig(
        min_share=0, multipool=pag.MultiPoolConfig(dilations=(1, 2), sites=("block.branch.3",))
    )
    found = pag.plan(CustomNet(), 1.0, example_input=SHAPE, config=config)
    assert 0 < found.gateable_share <= 1
    site = next(s for s in found.sites if s.name == "block.branch.3")
    assert (site.kind, site.inside) == ("multipool", "block")
    assert "counted in block" in str(found)
    config = pag.RetrofitConfig.from_dict(config.to_dict())
    assert config.multipool == pag.MultiPoolConfig(dilations=(1, 2), sites=("block.branch.3",))
    assert math.isclose(sum(s.macs for s in found.sites if not s.inside) / found.total_macs,
                        found.gateable_share)  # fmt: skip
