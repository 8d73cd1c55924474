"""Surgery: a gated network is the network it was, until its gates close."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from conftest import Pair
from grammar import Separable
from networks import (
    ONE_EACH,
    CustomNet,
    Residual,
    coarse_by_hand,
    conv,
    randomize,
)
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pag_retrofit as pag
from pag_retrofit.gates import GatedConv, PixelGate, named_gates
from pag_retrofit.rewriting import GatedBlock

EVERYTHING = pag.RetrofitConfig(min_share=0.0)


def gate_all(model: nn.Module, shape: tuple[int, ...], **config: Any) -> nn.Module:
    """Gate a tiny network wherever it can be."""
    settings = pag.RetrofitConfig(**{"min_share": 0.0, **config})
    return pag.retrofit(model, 1.0, example_input=shape, config=settings)


def own_keys(gated: nn.Module) -> list[str]:
    return [key for key in gated.state_dict() if ".pag_" not in f".{key}"]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@torch.no_grad()
def dense_macs(model: nn.Module, x: Tensor) -> int:
    """MACs of a plain network, from the outputs of its convolutions."""
    counts: list[int] = []
    handles = [
        module.register_forward_hook(lambda m, _, y: counts.append(y.numel() * m.weight[0].numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(x.clone())
    for handle in handles:
        handle.remove()
    return sum(counts)


# --- every family: outputs, keys, copies, training ------------------------------------------------


@torch.no_grad()
def test_outputs_are_bit_identical(pair: Pair) -> None:
    assert torch.equal(pair.gated(pair.x), pair.original(pair.x))
    other = pair.other()
    assert torch.equal(pair.gated(other), pair.original(other))


def test_class_keys_and_attributes_remain(pair: Pair) -> None:
    assert type(pair.gated) is type(pair.original)
    assert own_keys(pair.gated) == list(pair.original.state_dict())
    for name, module in pair.original.named_modules():
        counterpart = pair.gated.get_submodule(name)
        for registry in ("_modules", "_parameters", "_buffers"):
            assert set(vars(module)[registry]) <= set(vars(counterpart)[registry]), name
        assert set(vars(module)) <= set(vars(counterpart)), name
    assert isinstance(pair.gated.pag_state.floor, float)


def test_the_network_passed_is_untouched(pair: Pair) -> None:
    assert same_state(pair.original, pair.snapshot)
    assert modes(pair.original) == modes(pair.snapshot)
    types = [type(module) for module in pair.original.modules()]
    assert types == [type(module) for module in pair.snapshot.modules()]
    assert not hasattr(pair.original, "pag_state")


@torch.no_grad()
def test_copies_are_complete(pair: Pair) -> None:
    gated = pair.fresh()
    unpickled = pickle.loads(pickle.dumps(gated))
    for copied in (gated, unpickled):
        assert same_state(copied, pair.gated)
        assert type(copied) is type(pair.gated)
        with pag.override_gates(copied), pag.override_gates(pair.gated):
            assert torch.equal(copied(pair.x), pair.gated(pair.x))
    with pag.override_gates(gated, pattern="none"):
        assert torch.equal(unpickled(pair.x), pair.original(pair.x))  # nothing is shared


MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, DropPath)


def test_open_training_forward_is_bit_identical(pair: Pair) -> None:
    """Batch statistics, dropout and drop-path follow the mode as in the original."""
    original, gated = copy.deepcopy(pair.original).train(), pair.fresh().train()
    with pag.override_gates(gated, pattern="all"):
        torch.manual_seed(1)
        expected = original(pair.x)
        torch.manual_seed(1)
        assert torch.equal(gated(pair.x), expected)
    if any(isinstance(module, MODE_DEPENDENT) for module in original.modules()):
        assert not torch.equal(expected, pair.original(pair.x))
    state = gated.state_dict()
    for key, value in original.state_dict().items():
        assert torch.equal(state[key], value), key


def test_gradients_reach_all_that_had_one(pair: Pair) -> None:
    original, gated = copy.deepcopy(pair.original).train(), pair.fresh().train()
    original(pair.x).square().mean().backward()
    loss = gated(pair.x).square().mean()
    loss = loss + pag.sparsity_loss(gated) + pag.sparsity_loss(gated, "layer")
    loss.backward()
    gradients = {name: p.grad for name, p in gated.named_parameters()}
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            assert gradients[name] is not None, name
    for parameter in pag.gate_parameters(gated):
        assert parameter.grad is not None
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)


@torch.no_grad()
def test_channels_last_and_autocast(pair: Pair) -> None:
    x = pair.x.to(memory_format=torch.channels_last)
    original = copy.deepcopy(pair.original).to(memory_format=torch.channels_last)
    gated = pair.fresh().to(memory_format=torch.channels_last)
    assert torch.equal(gated(x), original(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pair.gated(pair.x), pair.original(pair.x))


@torch.no_grad()
def test_remove_restores(pair: Pair) -> None:
    restored = pair.fresh()
    assert pag.remove(restored) is restored
    assert same_state(restored, pair.snapshot)
    assert [type(m) for m in restored.modules()] == [type(m) for m in pair.snapshot.modules()]
    assert torch.equal(restored(pair.x), pair.original(pair.x))
    assert not hasattr(restored, "pag_state")
    again = pag.retrofit(restored, 0.99, example_input=pair.tiny.shape)
    assert list(again.state_dict()) == list(pair.gated.state_dict())


OPERATORS_OF_LAYERS = ("aten.convolution", "aten.addmm", "aten.mm")


def test_plan_lists_every_layer_once(pair: Pair) -> None:
    kinds = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    layers = {n for n, m in pair.original.named_modules() if isinstance(m, kinds)}
    dense = [layer.name for layer in pair.plan.dense]
    gated = [operation.name for site in pair.plan.sites for operation in site.cost.operations]
    assert sorted(dense + gated) == sorted(layers)
    assert all(layer.reason for layer in pair.plan.dense)
    assert [site.name for site in pair.plan.sites if site.macs <= 0] == []
    assert {site.name for site in pair.plan.sites} == {name for name, _ in named_gates(pair.gated)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy.deepcopy(pair.original).requires_grad_(False)(pair.x[:1])
    flops = counter.get_flop_counts()["Global"]
    attention = sum(flops[op] for op in flops if str(op) not in OPERATORS_OF_LAYERS) // 2
    listed = sum(layer.macs for layer in pair.plan.dense) + sum(s.macs for s in pair.plan.sites)
    assert listed == pair.plan.total_macs - attention
    assert 0 < pair.plan.floor < 1 and 0 < pair.plan.gateable_share <= 1


def test_gated_twice_is_refused(pair: Pair) -> None:
    with pytest.raises(pag.PagError, match="gated already"):
        pag.retrofit(pair.gated, 0.99, example_input=pair.tiny.shape)
    with pytest.raises(pag.PagError, match="gated already"):
        pag.plan(pair.gated, 0.99, example_input=pair.tiny.shape)


# --- what belongs to the libraries ----------------------------------------------------------------


@torch.no_grad()
def test_parts_of_timm_networks_work() -> None:
    model = randomize(timm.create_model("resnet18", layers=ONE_EACH, num_classes=5)).eval()
    gated = gate_all(model, (1, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(gated.forward_features(x), model.forward_features(x))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            gated.forward_intermediates(x, intermediates_only=True),
            model.forward_intermediates(x, intermediates_only=True),
            strict=True,
        )
    )
    gated.reset_classifier(7)
    assert gated(x).shape == (1, 7)


@torch.no_grad()
def test_features_only() -> None:
    model = timm.create_model("resnet18", layers=ONE_EACH, features_only=True)
    model = randomize(model).eval()
    gated = gate_all(model, (1, 3, 64, 64))
    x = torch.randn(1, 3, 75, 53)
    for a, b in zip(gated(x), model(x), strict=True):
        assert torch.equal(a, b)
    assert gated.feature_info.channels() == model.feature_info.channels()


@torch.no_grad()
def test_parts_of_smp_networks_work() -> None:
    model = randomize(smp.Unet("resnet18", encoder_weights=None)).eval()
    gated = gate_all(model, (1, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(gated.encoder(x), model.encoder(x), strict=True):
        assert torch.equal(a, b)
    features = gated.decoder(gated.encoder(x))
    assert torch.equal(gated.segmentation_head(features), model(x))
    assert torch.equal(gated.predict(x), model.predict(x))


def test_gradient_checkpointing() -> None:
    model = randomize(timm.create_model("resnet18", layers=ONE_EACH, num_classes=5))
    gated = gate_all(model.train(), (2, 3, 64, 64))
    gated.set_grad_checkpointing()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 64, 64)
    (gated(x).sum() + pag.sparsity_loss(gated)).backward()
    assert all(p.grad is not None for p in gated.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_compile_in_one_graph(training: bool) -> None:
    gated = gate_all(CustomNet(), (2, 3, 32, 32)).train(training)
    compiled = torch.compile(gated, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    y = compiled(x)
    if not training:
        assert torch.equal(y, gated(x))
        with pag.override_gates(gated, pattern="none"):
            assert torch.equal(compiled(x), gated(x))
        return
    (y.sum() + pag.sparsity_loss(gated)).backward()
    assert all(torch.isfinite(p.grad).all() for p in gated.parameters())
    torch._dynamo.reset()


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    gated = gate_all(CustomNet(), (2, 3, 32, 32)).train()
    parallel = nn.parallel.DistributedDataParallel(gated, find_unused_parameters=False)
    for _ in range(2):  # a second pass complains about gradients that never came
        parallel.zero_grad()
        (parallel(torch.randn(2, 3, 32, 32)).mean() + pag.sparsity_loss(gated)).backward()
    assert all(p.grad is not None for p in gated.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = randomize(CustomNet()).eval().to(dtype)
    gated = gate_all(model, (1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    assert torch.equal(gated(x), model(x))
    with pag.override_gates(gated):
        assert gated(x).dtype == dtype


@pytest.mark.parametrize("kept", [False, True])
def test_settings_of_torch_come_back(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "do_not_emit_stack_traces"
    monkeypatch.setattr(torch.fx.config, name, kept, raising=False)
    silenced = logging.root.manager.disable
    gate_all(CustomNet(), (1, 3, 32, 32))
    assert getattr(torch.fx.config, name) == kept
    assert logging.root.manager.disable == silenced


# --- closed gates ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_closed_basic_block_is_its_shortcut() -> None:
    model = randomize(timm.create_model("resnet18", layers=ONE_EACH, num_classes=5)).eval()
    gated = gate_all(model, (1, 3, 64, 64), include=("layer2.0",))
    x = torch.randn(1, 3, 64, 64)
    reference = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    reference = model.layer1(reference)
    reference = F.relu(model.layer2[0].downsample(reference))
    reference = model.forward_head(model.layer4(model.layer3(reference)))
    with pag.override_gates(gated, pattern="none"):
        assert torch.equal(gated(x), reference)
    assert not torch.equal(model(x), reference)


@torch.no_grad()
def test_a_closed_decoder_convolution_is_its_collapsed_kernel() -> None:
    model = randomize(smp.Unet("resnet18", encoder_weights=None)).eval()
    name = "decoder.blocks.0.conv2"
    gated = gate_all(model, (1, 3, 64, 64), include=(f"{name}.*",))
    block = model.get_submodule(name)
    x = torch.randn(1, block[0].in_channels, 9, 7)
    collapsed = block[0].weight.sum((2, 3), keepdim=True)
    reference = F.relu(block[1](F.conv2d(x, collapsed, block[0].bias)))
    with pag.override_gates(gated, pattern="none"):
        assert torch.equal(gated.get_submodule(name)(x), reference)
    flat = x[..., :1, :1].expand(-1, -1, 9, 7)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(  # exact where the map is locally constant
        F.conv2d(flat, collapsed)[inner], block[0](flat)[inner], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_identity_bypass_passes_the_input_on() -> None:
    model = nn.Sequential(
        nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(conv(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 2, 1),
    )
    randomize(model).eval()
    gated = gate_all(model, (1, 3, 16, 16), bypass="identity")
    plan = pag.plan(
        model,
        1.0,
        example_input=(1, 3, 16, 16),
        config=pag.RetrofitConfig(min_share=0.0, bypass="identity"),
    )
    assert [site.bypass for site in plan.sites] == ["collapsed", "identity", "coarse"]
    x = torch.randn(2, 3, 17, 13)
    assert torch.equal(gated(x), model(x))
    with pag.override_gates(gated, pattern="none"):
        stem = model[0]
        first = stem[0].weight.sum((2, 3), keepdim=True)
        reference = F.relu(stem[1](F.conv2d(x, first, stem[0].bias)))
        wanted = coarse_by_hand(model[2](reference[:, :, ::2, ::2]))
        torch.testing.assert_close(gated(x), wanted)
    pag.remove(gated)
    assert torch.equal(gated(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_a_map_that_shrinks_is_not_passed_on(stride: int) -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, stride), nn.ReLU())
    model = randomize(nn.Sequential(block, nn.Conv2d(8, 2, 1))).eval()
    gated = gate_all(model, (1, 8, 21, 21), scope="conv")
    x = torch.randn(2, 8, 17, 12)
    assert torch.equal(gated(x), model(x))
    with pag.override_gates(gated, pattern="none"):
        collapsed = block[0].weight.sum((2, 3), keepdim=True)
        size = block(x).shape[2:]
        kept = x[:, :, 1::stride, 1::stride][:, :, : size[0], : size[1]]
        wanted = model[1](F.conv2d(kept, collapsed, block[0].bias).relu())
        torch.testing.assert_close(gated(x), wanted)


@torch.no_grad()
def test_coarse_bypass_interpolates_larger_convolutions_but_does_not_truncate() -> None:
    block = nn.Sequential(conv(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    model = randomize(nn.Sequential(block, nn.Conv2d(8, 2, 1))).eval()
    x = torch.randn(2, 8, 17, 13)
    gated = gate_all(model, (1, 8, 16, 16), bypass="coarse")
    with pag.override_gates(gated, pattern="none"):
        wanted = F.relu(block[1](coarse_by_hand(block[0](x))))
        torch.testing.assert_close(gated(x), coarse_by_hand(model[1](wanted)))
    assert torch.equal(gated(x), model(x))
    for policy, kinds in (("pixel", ["coarse"] * 2), ("truncation", ["collapsed", "coarse"])):
        config = pag.RetrofitConfig(min_share=0.0, bypass="coarse", policy=policy)
        plan = pag.plan(model, 1.0, example_input=(1, 8, 16, 16), config=config)
        assert [site.bypass for site in plan.sites] == kinds


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Sequential, Separable])
@pytest.mark.parametrize("stride", [1, 2])
def test_separable_convolutions_are_one_site(kind: type[nn.Module], stride: int) -> None:
    depthwise = nn.Conv2d(8, 8, 3, stride, 2, 2, groups=8)
    model = randomize(nn.Sequential(kind(depthwise, conv(8, 6, 1)), nn.ReLU())).eval()
    shape = (1, 8, 16, 16)
    (site,) = pag.plan(model, 1.0, example_input=shape, config=EVERYTHING).sites
    assert (site.name, site.bypass, len(site.layers)) == ("0", "coarse", 2)
    assert site.macs == (8 * 9 + 8 * 6) * (16 // stride) ** 2
    gated = gate_all(model, shape)
    assert isinstance(gated[0], kind)
    if isinstance(gated[0], nn.Sequential):
        assert len(gated[0]) == len(gated[0][:]) == 2
        assert list(gated[0]) == [gated[0][0], gated[0][1]] == list(gated[0].children())[:2]
    assert [type(m) for m in gated[0].children()][:2] == [nn.Conv2d, nn.Conv2d]
    x = torch.randn(2, 8, 17, 13)
    assert torch.equal(gated(x), model(x))
    with pag.override_gates(gated, pattern="none"), pag.measure(gated) as m:
        torch.testing.assert_close(gated(x), coarse_by_hand(model[0](x)).relu())
    pixels, grid = (-(-17 // stride)) * (-(-13 // stride)), 9 * 7 if stride == 1 else 5 * 4
    assert m.macs == 2 * (8 * pixels + (8 * 9 + 8 * 6) * grid)
    with pytest.raises(pag.PagError, match="batches"):
        gated(x[0])
    assert [type(m) for m in pag.remove(gated).modules()] == [type(m) for m in model.modules()]
    assert torch.equal(gated(x), model(x))


class AddsInItsOwnForward(nn.Module):
    """Holds a branch that cannot be gated as one: there is no block to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Separable(nn.Conv2d(8, 8, 3, padding=1, groups=8), conv(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.softmax(self.pair(x), 2)


def test_separable_convolutions_of_a_branch_that_is_refused_are_listed_once() -> None:
    plan = pag.plan(AddsInItsOwnForward(), 1.0, example_input=(1, 8, 16, 16), config=EVERYTHING)
    assert [site.name for site in plan.sites] == ["pair"] and plan.dense == ()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"exclude": ("0",)}, ["0.0", "0.1"]),
        ({"exclude": ("0*",)}, []),
        ({"include": ("0.1",)}, ["0.1"]),
        ({"scope": "conv"}, ["0.0"]),
    ],
)
def test_separable_convolutions_that_are_not_wanted_as_one(
    change: dict[str, Any], names: list[str]
) -> None:
    pair = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), conv(8, 6, 1))
    config = pag.RetrofitConfig(min_share=0.0, **change)
    plan = pag.plan(
        nn.Sequential(pair, nn.ReLU()), 1.0, example_input=(1, 8, 16, 16), config=config
    )
    assert [site.name for site in plan.sites] == names


@pytest.mark.parametrize(
    "pair",
    [
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), conv(8, 6, 1)),  # the map shrinks
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), conv(8, 6, 1)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), conv(8, 6, 1)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1, groups=2)),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, 1, 8, padding_mode="reflect"), conv(8, 6, 1)),
    ],
)
def test_of_other_pairs_the_pointwise_convolution_is_a_site(pair: nn.Sequential) -> None:
    model = nn.Sequential(pair, nn.ReLU())
    plan = pag.plan(model, 1.0, example_input=(1, 8, 16, 16), config=EVERYTHING)
    assert f"0.{len(pair) - 1}" in [site.name for site in plan.sites]


def test_the_network_itself_and_what_holds_more_than_a_separable_convolution_are_no_site() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), conv(8, 6, 1), nn.ReLU())
    sites = pag.plan(block, 1.0, example_input=(1, 8, 16, 16), config=EVERYTHING).sites
    assert sorted(site.name for site in sites) == ["0", "1"]
    network = gate_all(block[:2], (1, 8, 16, 16))  # there is no module around it to be replaced
    assert [name for name, _ in named_gates(network)] == ["0", "1"]
    nested = nn.Sequential(block, nn.Identity())
    sites = pag.plan(nested, 1.0, example_input=(1, 8, 16, 16), config=EVERYTHING).sites
    assert sorted(site.name for site in sites) == ["0.0", "0.1"]


@torch.no_grad()
def test_conv_scope_gates_only_larger_kernels() -> None:
    model = randomize(timm.create_model("resnet50", layers=ONE_EACH, num_classes=5)).eval()
    config = pag.RetrofitConfig(scope="conv", min_share=0.0)
    plan = pag.plan(model, 0.9, example_input=(1, 3, 64, 64), config=config)
    gated = pag.retrofit(model, 0.9, example_input=(1, 3, 64, 64), config=config)
    for site in plan.sites:
        module = model.get_submodule(site.name)
        assert site.kind == "conv" and module.kernel_size != (1, 1)
        same = module.in_channels == module.out_channels
        assert site.bypass == ("identity" if same else "collapsed"), site.name
    bottleneck = model.layer1[0]
    x = torch.randn(1, 64, 8, 8)
    inner = F.relu(bottleneck.bn1(bottleneck.conv1(x)))  # closed: the 3x3 passes this on
    reference = bottleneck.bn3(bottleneck.conv3(inner)) + bottleneck.downsample(x)
    with pag.override_gates(gated, pattern="none"):
        assert torch.equal(gated.layer1[0](x), F.relu(reference))
    assert torch.equal(gated.layer1[0](x), bottleneck(x))


# --- user code ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_custom_network() -> None:
    model = randomize(CustomNet()).eval()
    gated = gate_all(model, (1, 3, 32, 32))
    names = {name for name, _ in named_gates(gated)}
    assert names == {"stem.0", "block", "head.0", "head.2"}
    x = torch.randn(2, 3, 31, 45)
    assert torch.equal(gated(x), model(x))


class JoinsAtTheTop(nn.Module):
    """A residual add in the forward of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 3, 3), conv(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


@torch.no_grad()
def test_an_addition_in_the_network_itself_leaves_its_convolutions() -> None:
    model = JoinsAtTheTop().eval()
    gated = gate_all(model, (1, 3, 16, 16))
    assert {name for name, _ in named_gates(gated)} == {"first", "second"}
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(gated(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "shortcut",
    [
        lambda: conv(8, 8, 3),
        lambda: nn.Sequential(conv(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: Residual(nn.Sequential(conv(8, 4, 3), nn.ReLU(), conv(4, 8, 3))),
    ],
    ids=["convolution", "sequence", "block"],
)
@pytest.mark.parametrize("bypass", ["collapsed", "identity"])
def test_a_site_in_the_shortcut_keeps_its_own_gate(
    shortcut: Callable[[], nn.Module], bypass: str
) -> None:
    """Its module is a child of a block that is rewritten, too."""
    branch = nn.Sequential(conv(8, 16, 3), nn.ReLU(), conv(16, 8, 3))
    model = nn.Sequential(conv(3, 8, 1), Residual(branch, shortcut()))
    randomize(model).eval()
    shape = (1, 3, 16, 16)
    config = pag.RetrofitConfig(min_share=0.0, bypass=bypass, exclude=("0",))
    plan = pag.plan(model, 0.9, example_input=shape, config=config)
    gated = gate_all(model, shape, bypass=bypass, exclude=("0",))
    assert len(plan.sites) == 2
    assert {s.name for s in plan.sites} == {name for name, _ in named_gates(gated)}
    x = torch.randn(shape)
    assert torch.equal(gated(x), model(x))
    with pag.override_gates(gated, pattern="none"), pag.measure(gated) as m:
        gated(x)
    assert set(m.open_rates) == {s.name for s in plan.sites}
    assert m.fraction == pytest.approx(plan.floor)
    for copied in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        with pag.override_gates(copied), pag.override_gates(gated):
            assert torch.equal(copied(x), gated(x))
    assert same_state(pag.remove(gated), model)
    assert torch.equal(gated(x), model(x))


class SharesAConvolution(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls
        self.one = conv(3, 3, 3)
        self.other_name = self.one
        self.last = conv(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.other_name(x)
        return self.last(x)


@torch.no_grad()
@pytest.mark.parametrize("calls", [1, 2])
def test_shared_convolutions(calls: int) -> None:
    model = SharesAConvolution(calls).eval()
    gated = gate_all(model, (1, 3, 16, 16))
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(gated(x), model(x))
    assert own_keys(gated) == list(model.state_dict())
    with pag.override_gates(gated), pag.measure(gated) as m:
        gated(x)
    assert m.total_macs == dense_macs(model, x)
    if calls == 2:
        plan = pag.plan(model, 0.9, example_input=(1, 3, 16, 16), config=EVERYTHING)
        assert any("more than once" in layer.reason for layer in plan.dense)


class DropsByFlag(nn.Module):
    """Functional dropout, whose mode a trace would bake in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.conv(x), 0.5, self.training)


@torch.no_grad()
def test_of_a_block_that_depends_on_the_mode_the_last_layer_is_gated() -> None:
    model = nn.Sequential(conv(3, 8, 3), DropsByFlag()).eval()
    gated = gate_all(model, (1, 3, 16, 16))
    assert {name for name, _ in named_gates(gated)} == {"0", "1.conv"}
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(gated(x), model(x))
    with pag.override_gates(gated, pattern="none"):
        gated[0].pag_gate.override = None
        assert torch.equal(gated(x), model[0](x))  # the branch adds nothing
    assert [type(m) for m in pag.remove(gated).modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"include": ("block",)}, {"block"}),
        ({"exclude": ("block*",)}, {"stem.0", "head.0", "head.2"}),
        ({"include": ("stem*", "head*"), "exclude": ("*head.0",)}, {"stem.0", "head.2"}),
    ],
)
def test_include_and_exclude(config: dict[str, Any], names: set[str]) -> None:
    settings = pag.RetrofitConfig(min_share=0.0, **config)
    plan = pag.plan(CustomNet(), 0.9, example_input=(1, 3, 32, 32), config=settings)
    assert {site.name for site in plan.sites} == names
    assert sum("include/exclude" in layer.reason for layer in plan.dense) >= 1


def test_min_share_leaves_small_sites_dense() -> None:
    plan = pag.plan(CustomNet(), 0.9, example_input=(1, 3, 32, 32), config=EVERYTHING)
    shares = {site.name: site.macs / plan.total_macs for site in plan.sites}
    smallest = min(shares, key=shares.__getitem__)
    config = pag.RetrofitConfig(min_share=shares[smallest] * 1.01)
    fewer = pag.plan(CustomNet(), 0.9, example_input=(1, 3, 32, 32), config=config)
    assert {site.name for site in fewer.sites} == set(shares) - {smallest}
    assert any("min_share" in layer.reason for layer in fewer.dense)


def test_inplace_returns_the_same_object_and_ends_as_the_copy() -> None:
    model = randomize(CustomNet()).train()
    copied = gate_all(model, (1, 3, 32, 32))
    result = pag.retrofit(model, 1.0, example_input=(1, 3, 32, 32), config=EVERYTHING, inplace=True)
    assert result is model and model.training
    assert same_state(model, copied)


def test_modes_of_single_modules_survive() -> None:
    """A frozen norm stays frozen through retrofit and remove."""
    model = CustomNet().train()
    model.block.branch[1].eval()
    before = modes(model)
    gated = gate_all(model, (1, 3, 32, 32))
    assert modes(model) == before
    assert {n: t for n, t in modes(gated).items() if n in before} == before
    assert modes(pag.remove(gated)) == before


def test_fresh_gates_are_open_with_the_configured_probability() -> None:
    config = pag.RetrofitConfig(min_share=0.0, gate=pag.GateConfig(initial_probability=0.8))
    gated = pag.retrofit(CustomNet(), 1.0, example_input=(1, 3, 32, 32), config=config).train()
    gated(torch.randn(1, 3, 32, 32))
    for _, gate in named_gates(gated):
        torch.testing.assert_close(
            gate.last_probability, torch.full_like(gate.last_probability, 0.8)
        )


def test_gated_modules_show_their_gates() -> None:
    gated = gate_all(CustomNet(), (1, 3, 32, 32))
    assert isinstance(gated.block, GatedBlock) and isinstance(gated.head[0], GatedConv)
    assert isinstance(gated.head[0], nn.Conv2d)
    count = sum(isinstance(module, PixelGate) for module in gated.modules())
    assert str(gated).count("PixelGate") == count == 4
    assert len(pag.gate_parameters(gated)) == 2 * count


# --- plans as text and JSON -----------------------------------------------------------------------


def test_plan_prints_and_turns_into_json() -> None:
    plan = pag.plan(CustomNet(), 0.9, example_input=(1, 3, 32, 32), config=EVERYTHING)
    text = str(plan)
    for word in ("block", "stem.0", "head.2", "shortcut", "collapsed", f"{plan.floor:.3f}"):
        assert word in text
    values = plan.to_dict()
    assert values["floor"] == plan.floor and values["total_macs"] == plan.total_macs
    assert [site["name"] for site in values["sites"]] == [site.name for site in plan.sites]
    assert sum(site["share"] for site in values["sites"]) == pytest.approx(plan.gateable_share)


def test_rho_meets_the_budget_for_masks_without_halo() -> None:
    model = nn.Sequential(conv(3, 16, 3), nn.ReLU(), conv(16, 16, 3)).eval()
    plan = pag.plan(model, 0.6, example_input=(1, 3, 32, 32), config=EVERYTHING)
    gated = gate_all(model, (1, 3, 32, 32))
    with torch.no_grad(), pag.override_gates(gated, plan.rho, pattern="random"):
        with pag.measure(gated) as m:
            gated(torch.randn(1, 3, 32, 32))
    assert m.fraction == pytest.approx(0.6, abs=0.002)


def test_config_round_trip() -> None:
    config = pag.RetrofitConfig(
        scope="conv", include=["a*"], exclude=("b",), gate=pag.GateConfig(initial_probability=0.9)
    )
    assert pag.RetrofitConfig.from_dict(config.to_dict()) == config
    assert pag.RetrofitConfig.from_dict({}) == pag.RetrofitConfig()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan"), True, "0.9", None])
def test_a_budget_must_be_a_fraction(budget: Any) -> None:
    with pytest.raises(pag.BudgetError, match=r"\(0, 1\]"):
        pag.retrofit(CustomNet(), budget, example_input=(1, 3, 32, 32))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_budget_below_the_floor_is_refused_and_changes_nothing(inplace: bool) -> None:
    model = CustomNet().train()
    snapshot = copy.deepcopy(model)
    shape = (1, 3, 32, 32)
    floor = pag.plan(model, 0.9, example_input=shape, config=EVERYTHING).floor
    below = floor - 0.001
    found = pag.plan(model, below, example_input=shape, config=EVERYTHING)
    assert found.budget == below and "cannot be met" in str(found.table().caption)
    with pytest.raises(pag.BudgetError, match=f"floor of {floor:.3f}.*at least") as caught:
        pag.retrofit(model, below, example_input=shape, config=EVERYTHING, inplace=inplace)
    assert "head.2" in str(caught.value) or "bypass" in str(caught.value)
    assert same_state(model, snapshot) and modes(model) == modes(snapshot)
    assert [type(m) for m in model.modules()] == [type(m) for m in snapshot.modules()]


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Sequential(nn.Conv2d(3, 1, 1)), nn.Sequential(nn.Flatten(), nn.Linear(48, 2))],
    ids=["no layers", "as cheap as its gate", "linear only"],
)
def test_a_network_without_sites(model: nn.Module) -> None:
    with pytest.raises(pag.NoSitesError, match="nothing to gate"):
        pag.retrofit(model, 0.9, example_input=(1, 3, 4, 4))


@pytest.mark.parametrize(
    "example",
    [
        (1, 4, 32, 32), (3, 32, 32), (1, 3, 32, 0), (1, 3, 32.0, 32), 64, None,
        torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_example_is_named(example: Any) -> None:
    model = CustomNet().train()
    snapshot = copy.deepcopy(model)
    with pytest.raises(pag.PagError, match="example_input"):
        pag.retrofit(model, 0.9, example_input=example, inplace=True)
    assert same_state(model, snapshot) and modes(model) == modes(snapshot)


def test_an_example_that_the_network_refuses_takes_one_line(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shrinking = nn.Sequential(conv(3, 8, 3), nn.MaxPool2d(8), nn.MaxPool2d(4))
    with caplog.at_level("ERROR"), pytest.raises(pag.PagError) as error:
        pag.plan(shrinking, 0.9, example_input=(1, 3, 16, 16))
    assert "does not run on it" in str(error.value) and "\n" not in str(error.value)
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda: pag.RetrofitConfig(gate=None), "gate=None"),
        (lambda: pag.RetrofitConfig(multipool=3), "multipool=3"),
        (lambda: pag.RetrofitConfig(min_share="a"), "min_share='a'"),
        (lambda: pag.GateConfig(initial_probability="a"), "initial_probability='a'"),
        (lambda: pag.retrofit(CustomNet(), example_input=(1, 3, 32, 32), config={}), "config={}"),
    ],
)
def test_configurations_of_a_wrong_type_are_named(wrong: Callable[[], Any], word: str) -> None:
    with pytest.raises(pag.PagError, match=word):
        wrong()


def test_an_image_that_is_no_batch_is_named() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    config = pag.RetrofitConfig(min_share=0.0)
    gated = pag.retrofit(plain, 1.0, example_input=(1, 3, 16, 16), config=config)
    image = torch.randn(3, 16, 16)
    with pytest.raises(pag.PagError, match=r"shape \(.*, 16, 16\): gated networks take batches"):
        gated(image)
    assert torch.equal(gated(image[None])[0], plain(image))


def test_a_size_that_the_network_refuses_is_named() -> None:
    model = smp.FPN("resnet18", encoder_weights=None)
    with pytest.raises(pag.PagError, match=r"example_input.*\(1, 3, 65, 64\)"):
        pag.retrofit(model, 0.9, example_input=(1, 3, 65, 64))


def test_something_else_than_a_network() -> None:
    with pytest.raises(pag.PagError, match="model="):
        pag.retrofit("resnet18", 0.9, example_input=(1, 3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(pag.PagError, match="not a gated network"):
        pag.remove(CustomNet())


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"scope": "layer"}, "scope"),
        ({"bypass": "none"}, "bypass"),
        ({"include": "decoder.*"}, "include"),
        ({"exclude": (1,)}, "exclude"),
        ({"include": None}, "include"),
        ({"min_share": 1.0}, "min_share"),
        ({"min_share": float("nan")}, "min_share"),
        ({"gate": {"initial_probability": 0.5}}, "initial_probability"),
        ({"gate": {"heat": 1}}, "heat"),
        ({"widht": 3}, "widht"),
        ({"version": 99}, "version"),
    ],
)
def test_a_wrong_configuration_is_named(values: dict[str, Any], word: str) -> None:
    with pytest.raises(pag.PagError, match=word):
        pag.RetrofitConfig.from_dict(values)


def test_state_dict_of_a_gated_network_loads_into_another() -> None:
    source = randomize(gate_all(CustomNet(), (1, 3, 32, 32)), seed=5)
    target = gate_all(CustomNet(), (1, 3, 32, 32))
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    target.load_state_dict(torch.load(stream, weights_only=True))
    assert same_state(source, target)
    plain = CustomNet()
    missing = target.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(".pag_" in key for key in missing)
