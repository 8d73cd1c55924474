"""Deployed networks compute what gated ones compute, at the pixels that are asked for."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from conftest import Pair
from grammar import Case, cases
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from networks import ONE_EACH, CustomNet, Residual, conv, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from user_models import MODELS

import pag_retrofit as pag
from pag_retrofit import kernels, sharing
from pag_retrofit.demand import EVERYWHERE, Demand, Demands, Grid, Masked, either
from pag_retrofit.deployment import DeployedNetwork
from pag_retrofit.execution import (
    Activate,
    Allocate,
    Buffer,
    Call,
    Convolve,
    Decide,
    InBands,
    Interpolate,
    MakeLists,
    Memory,
    Range,
    Resize,
    ResultMemory,
    Source,
    Step,
    Values,
    Weigh,
    demands_of,
)
from pag_retrofit.gates import named_gates
from pag_retrofit.kernels import native
from pag_retrofit.ordering import put_off
from pag_retrofit.sharing import weigh_together

SHAPE = (2, 3, 64, 64)


def _kernels_are_there() -> bool:
    try:
        native.library()
    except pag.PagError:
        return False
    return True


needs_kernels = pytest.mark.skipif(not _kernels_are_there(), reason="the kernels were not compiled")


def close(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    """Compare relative to the largest value, as rounding of long sums is."""
    for x, y in zip(tensors(a), tensors(b), strict=True):
        scale = max(float(y.abs().max()), 1e-3)
        torch.testing.assert_close(x / scale, y / scale, rtol=0, atol=tolerance)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in tensors(part)]


def gate_all(model: nn.Module, shape: tuple[int, ...] = SHAPE, **config: Any) -> nn.Module:
    configured = pag.RetrofitConfig(**{"min_share": 0.0, **config})
    return pag.retrofit(model, 1.0, example_input=shape, config=configured).eval()


@torch.no_grad()
def agree(
    gated: nn.Module, deployed: nn.Module, x: Tensor, density: float, pattern: str = "blobs"
) -> None:
    with pag.override_gates(gated, density, pattern=pattern):
        expected = gated(x.clone())
    with pag.override_gates(deployed, density, pattern=pattern):
        close(deployed(x.clone()), expected)


# --- the same outputs -----------------------------------------------------------------------------


def test_every_family(pair: Pair) -> None:
    deployed = pag.deploy(pair.gated)
    for density in (1.0, 0.6, 0.1, 0.0):
        agree(pair.gated, deployed, pair.x, density)
    agree(pair.gated, deployed, pair.other(), 0.5, "random")


@given(cases(), st.sampled_from(["random", "blobs", "rows", "none"]), st.floats(0, 1))
@settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
def test_random_networks(case: Case, pattern: str, density: float) -> None:
    try:
        gated = pag.retrofit(case.model, 1.0, example_input=case.shape, config=case.config)
    except pag.NoSitesError:
        event("no site")
        return
    x = torch.randn(case.shape)
    for backend in ("auto", "reference"):
        agree(gated.eval(), pag.deploy(gated, backend), x, density, pattern)


@pytest.mark.parametrize("name", [name for name in MODELS if "values" not in name])
def test_networks_of_users(name: str) -> None:
    model = randomize(MODELS[name].build()).eval()
    shape = (2, 3, 32, 32)
    gated = gate_all(model, shape)
    deployed = pag.deploy(gated)
    for density in (1.0, 0.5, 0.0):
        agree(gated, deployed, torch.randn(shape), density, "random")


class Decoder(nn.Module):
    """A 3x3 convolution of small maps, upsampled by two, beside large ones, maybe cropped."""

    def __init__(self, small: list[int], large: list[int], out: int, crop: int) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Conv2d(3, c, 1, stride=2) for c in small)
        self.large = nn.ModuleList(nn.Conv2d(3, c, 1) for c in large)
        self.block = conv(sum(small + large), out, 3)
        self.crop = crop

    def forward(self, x: Tensor) -> Tensor:
        up = [F.interpolate(layer(x), scale_factor=2.0, mode="nearest") for layer in self.small]
        height, width = up[0].shape[2] - self.crop, up[0].shape[3]
        maps = [layer(x) for layer in self.large] + up
        return self.block(torch.cat([m[:, :, :height, :width] for m in maps], 1))


channels = st.integers(1, 40)


@given(
    st.lists(channels, min_size=1, max_size=2), st.lists(channels, max_size=2), channels,
    st.sampled_from(["", "collapsed", "coarse"]),
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 17)), st.floats(0, 1),
    st.sampled_from(["random", "blobs", "rows"]), st.sampled_from([0, 0, 1]),
)  # fmt: skip
@settings(max_examples=36, deadline=None, derandomize=True)
def test_convolutions_of_upsampled_maps(
    small: list[int], large: list[int], out: int, bypass: str,
    half: tuple[int, int, int], density: float, pattern: str, crop: int,
) -> None:  # fmt: skip
    x = torch.randn(half[0], 3, 2 * half[1], 2 * half[2])
    model = nn.Sequential(randomize(Decoder(small, large, out, crop)), nn.Conv2d(out, 8, 1)).eval()
    config: dict[str, Any] = {"bypass": bypass} if bypass else {"exclude": ("0.*",)}
    gated = gate_all(model, tuple(x.shape), **config)
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        agree(gated, deployed, x, density, pattern)
        layers = [step.layer for step in steps_of(deployed) if isinstance(step, Convolve)]
        read_upsampled = not large and not crop  # a map that is cropped is made before
        enough = read_upsampled or out * sum(small + large) >= 512
        pixels = half[0] * (2 * half[1] - crop) * 2 * half[2]
        if not any(layer.digits and layer.window.kernel == (3, 3) for layer in layers):
            tiles = [layer.winograd for layer in layers].count(True)
            assert tiles == (enough and pixels >= 128)
            folded = [layer for layer in layers if layer.window.kernel == (2, 2)]
            assert len(folded) == (tiles and bypass == "coarse" and not crop)


@given(
    channels, st.integers(2, 40), st.sampled_from([nn.ReLU, nn.SiLU, nn.Identity]),
    st.tuples(st.integers(1, 2), st.integers(4, 18), st.integers(4, 34)), st.floats(0, 1),
    st.sampled_from(["random", "blobs", "rows"]), st.sampled_from([1, 1, 2]),
)  # fmt: skip
@settings(max_examples=24, deadline=None, derandomize=True)
def test_convolutions_between_whose_pixels_others_are_interpolated(
    inputs: int, out: int, activation: type[nn.Module], size: tuple[int, int, int],
    density: float, pattern: str, stride: int,
) -> None:  # fmt: skip
    block = nn.Sequential(conv(inputs, out, 3, stride), nn.BatchNorm2d(out), activation())
    model = randomize(nn.Sequential(block, conv(out, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = torch.randn(size[0], inputs, *size[1:])
    gated = gate_all(model.eval(), tuple(x.shape), bypass="coarse")
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for share in (density, 0.0, 1.0):
            agree(gated, deployed, x, share, pattern)


@given(
    st.integers(1, 5), st.sampled_from([8, 16, 40, 64]), st.sampled_from(["", "coarse"]),
    st.tuples(st.integers(1, 2), st.integers(20, 61), st.integers(20, 61)),
    st.floats(0, 1), st.sampled_from(["random", "blobs"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None, derandomize=True)
def test_first_layers_of_7x7_with_stride_2(
    inputs: int, out: int, bypass: str, size: tuple[int, int, int], density: float, pattern: str
) -> None:
    stem = nn.Sequential(conv(inputs, out, 7, 2), nn.BatchNorm2d(out), nn.ReLU())
    model = nn.Sequential(stem, nn.MaxPool2d(3, 2, 1), conv(out, 8, 3), nn.ReLU())
    model = randomize(model).eval()
    x = torch.randn(size[0], inputs, *size[1:])
    config: dict[str, Any] = {"bypass": bypass} if bypass else {"exclude": ("0.*",)}
    gated = gate_all(model, tuple(x.shape), **config)
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for share in (density, 0.0, 1.0):
            agree(gated, deployed, x, share, pattern)
            agree(gated, deployed, x, share, pattern)  # as it is replayed, too
        if backend == "auto" and _kernels_are_there() and native.instruction_set() != "avx2":
            layers = [step.layer for step in steps_of(deployed) if isinstance(step, Convolve)]
            tiles = any(layer.winograd for layer in layers if layer.window.kernel == (7, 7))
            pixels = size[0] * -(-size[1] // 2) * -(-size[2] // 2)
            assert tiles == (inputs <= 4 and out >= 16 and pixels >= 128)


@given(
    st.integers(1, 24), st.integers(1, 24), st.sampled_from([(3, 1), (3, 3), (5, 1)]),
    st.sampled_from([1, 1, 2]),
    st.tuples(st.integers(1, 2), st.integers(4, 18), st.integers(4, 18)),
    st.floats(0, 1), st.sampled_from(["random", "blobs", "rows"]),
)  # fmt: skip
@settings(max_examples=16, deadline=None, derandomize=True)
def test_depthwise_convolutions_are_computed_where_the_pointwise_one_is(
    inputs: int, out: int, window: tuple[int, int], stride: int, size: tuple[int, int, int],
    density: float, pattern: str,
) -> None:  # fmt: skip
    kernel, dilation = window
    padding = (kernel - 1) * dilation // 2
    depthwise = nn.Conv2d(inputs, inputs, kernel, stride, padding, dilation, groups=inputs)
    pair = nn.Sequential(depthwise, nn.Conv2d(inputs, out, 1))
    model = randomize(nn.Sequential(conv(inputs, inputs, 1), pair, nn.ReLU())).eval()
    x = torch.randn(size[0], inputs, *size[1:])
    gated = gate_all(model, tuple(x.shape), include=("1",))
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for share in (density, 0.0, 1.0):
            agree(gated, deployed, x, share, pattern)
        program, _ = next(iter(deployed._programs.values()))
        steps = zip(program.steps, program.demanded, strict=True)
        places = [demanded for step, demanded in steps if isinstance(step, Convolve)]
        assert [place == EVERYWHERE for place in places] == [True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("grid_is_open", [False, True])
def test_pixels_that_no_single_call_computes_are_activated_once(grid_is_open: bool) -> None:
    model = randomize(nn.Sequential(conv(24, 32, 3), nn.SiLU(), nn.Conv2d(32, 2, 1))).eval()
    gated = gate_all(model, (1, 24, 18, 34), bypass="coarse", include=("0",))
    gate = dict(named_gates(gated))["0"]
    gate.weight.zero_()
    gate.weight[:, 0], gate.bias[:] = 1.0, 0.0
    x = torch.randn(1, 24, 18, 34)
    x[:, 0] = -1.0 if grid_is_open else 1.0
    x[:, 0, ::2, ::2] *= -1
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        close(deployed(x), gated(x))
        close(deployed(x), gated(x))  # as it is replayed, too
        made = [step.layer for step in steps_of(deployed) if isinstance(step, Convolve)]
        if not any(layer.digits for layer in made):
            assert [layer.winograd for layer in made] == [True, False, False]


class Unskipped(nn.Module):
    """A convolution beside a skip connection without channels, as in SMP's U-Net on ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.block = nn.Conv2d(3, 8, 1, stride=2), conv(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        upsampled = F.interpolate(self.small(x), scale_factor=2.0, mode="nearest")
        result: Tensor = self.block(torch.cat([upsampled, x[:, :0]], 1)).relu()
        return result


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_maps_without_channels_are_left_out(density: float) -> None:
    gated = gate_all(randomize(Unskipped()).eval(), include=("block",))
    for backend in ("auto", "reference"):
        agree(gated, pag.deploy(gated, backend), torch.randn(SHAPE), density)


@torch.no_grad()
def test_gates_that_were_trained_decide_as_they_do_in_the_gated_network() -> None:
    gated = gate_all(randomize(CustomNet()))
    for parameter in pag.gate_parameters(gated):
        parameter.normal_()
    deployed = pag.deploy(gated)
    x = torch.randn(SHAPE)
    with pag.measure(gated) as measured:
        expected = gated(x)
    assert 0.05 < measured.fraction < 0.95
    different = (deployed(x) - expected).abs() > 1e-4  # logits within rounding of zero
    assert different.float().mean() < 0.01


def multipool(identity: bool, shared: bool) -> nn.Module:
    model = randomize(timm.create_model("resnet18", layers=ONE_EACH)).eval()
    config = pag.RetrofitConfig(
        multipool=pag.MultiPoolConfig(dilations=(1, 2, 4), identity=identity, shared=shared)
    )
    return pag.retrofit(model, 1.0, example_input=SHAPE, config=config).eval()


@pytest.mark.parametrize("identity", [True, False])
@torch.no_grad()
def test_multipool(identity: bool) -> None:
    gated = multipool(identity, shared=False)
    deployed = pag.deploy(gated)
    x = torch.randn(SHAPE)
    for density in (1.0, 0.5):
        with pag.override_branches(gated, seed=2), pag.override_gates(gated, density):
            expected = gated(x)
        with pag.override_branches(deployed, seed=2), pag.override_gates(deployed, density):
            close(deployed(x), expected)


@torch.no_grad()
def test_aspp() -> None:
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_channels=16, classes=3)
    gated = pag.convert_aspp(randomize(model).eval(), example_input=SHAPE).eval()
    deployed = pag.deploy(gated)
    x = torch.randn(SHAPE)
    with pag.override_branches(gated, seed=2):
        expected = gated(x)
    with pag.override_branches(deployed, seed=2):
        close(deployed(x), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "unet"])
def test_pixels_of_wide_maps_lie_apart(
    name: str, backend: str, unet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of 512 channels do; here of all maps, for which all kernels have to be ready."""
    gated = unet if name == "unet" else gate_all(randomize(timm.create_model(name)).eval())
    monkeypatch.setattr(kernels, "gap_between_pixels", lambda channels: 16)
    deployed = pag.deploy(gated, backend)
    x = torch.randn(2, 3, 32, 64)
    for density in (1.0, 0.3):
        agree(gated, deployed, x, density)
    program, _ = next(iter(deployed._programs.values()))
    allocated = [s for s in program.steps if isinstance(s, Allocate) and not s.in_place]
    assert allocated and all(s.buffer.gap == 16 for s in allocated)


@torch.no_grad()
@pytest.mark.parametrize("channels", [512, 3072, 500])
def test_lines_of_neighbours_do_not_compete(channels: int) -> None:
    pixel = torch.nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 4, 1)).eval()
    deployed, x = pag.deploy(pixel), torch.randn(2, 3, 5, 6)
    close(deployed(x), pixel(x))
    program, _ = next(iter(deployed._programs.values()))
    first, last = (s for s in program.steps if isinstance(s, Allocate))
    between, step = first.buffer, channels + first.buffer.gap
    assert (step * 4 * 2) % 4096 and between.gap == (0 if channels == 500 else 16)
    assert between.floats == 2 * 5 * 6 * step and last.buffer.gap == 0
    values = Values({}, Memory(between.floats), apart=())
    first.run(values, Demands(values), EVERYWHERE)
    assert values[first.writes].stride() == (5 * 6 * step, 1, 6 * step, step)
    assert len(values.memory.blocks) == 1


# --- what it is given -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    model = smp.Unet(
        "resnet18", encoder_weights=None, classes=3, decoder_channels=(32, 24, 16, 16, 8)
    )
    return pag.retrofit(randomize(model).eval(), 1.0, example_input=SHAPE).eval()


@pytest.fixture(scope="module")
def deployed(unet: nn.Module) -> DeployedNetwork:
    return pag.deploy(unet)


@torch.no_grad()
def test_any_size_and_batch(unet: nn.Module, deployed: nn.Module) -> None:
    for shape in ((1, 3, 32, 96), (3, 3, 64, 32)):
        agree(unet, deployed, torch.randn(shape), 0.4, "random")


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_nothing_to_do(unet: nn.Module, name: str) -> None:
    classifier = timm.create_model("resnet10t", num_classes=3).eval()
    gated = unet if name == "unet" else gate_all(classifier, SHAPE)
    own = pag.deploy(gated)
    nothing = torch.zeros(0, *SHAPE[1:])
    for _ in range(2):
        assert own(nothing).shape == gated(nothing).shape
    agree(gated, own, torch.randn(SHAPE), 0.4)


class Options(nn.Module):
    """A network that takes more than its image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = CustomNet()

    def forward(
        self, x: Tensor, factor: float = 1.0, mask: Tensor | None = None, *, flip: bool = False
    ) -> Tensor:
        factor = 0.5 if factor is True else factor  # not what 1 does, though they are equal
        y: Tensor = self.body(x.flip(-1) if flip else x) * factor
        return y if mask is None else y * mask


@torch.no_grad()
def test_any_arguments() -> None:
    gated = gate_all(Options().eval(), (2, 3, 32, 32))
    own, x = pag.deploy(gated), torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, *gated(x).shape[1:])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, 2.0), {}),
        ((x, 1), {"flip": True}),
        ((x, 1), {"flip": False}),
        ((x, True), {"flip": False}),
        ((x, 1.0, None), {}),
        ((x, 3.0, mask), {"flip": True}),
        ((x,), {"mask": mask}),
    ]
    for _ in range(2):
        for args, kwargs in calls:
            close(own(*args, **kwargs), gated(*args, **kwargs))


@torch.no_grad()
def test_whatever_torch_makes_by_default(unet: nn.Module) -> None:
    own, x = pag.deploy(unet), torch.randn(1, 3, 32, 64)
    expected = unet(x)
    torch.set_default_dtype(torch.float64)
    try:
        close(own(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_any_memory_format(unet: nn.Module, deployed: nn.Module) -> None:
    wide = torch.randn(2, 6, 64, 128)
    for x in (
        wide[:, ::2, :, ::2],
        torch.randn(SHAPE).contiguous(memory_format=torch.channels_last),
        torch.randn(64, 64, 3, 2).permute(3, 2, 0, 1),
    ):
        agree(unet, deployed, x, 0.4)


@torch.no_grad()
def test_other_types_are_computed_in_float32(unet: nn.Module, deployed: nn.Module) -> None:
    x = torch.randn(SHAPE).to(torch.bfloat16)
    result = deployed(x)
    assert result.dtype is torch.float32
    close(result, unet(x.float()))
    half = pag.deploy(copy.deepcopy(unet).to(torch.bfloat16))
    assert half(x).dtype is torch.float32


@torch.no_grad()
def test_inputs_and_weights_are_left_alone(unet: nn.Module) -> None:
    before = copy.deepcopy(unet.state_dict())
    own = pag.deploy(unet)
    x = torch.randn(SHAPE)
    kept = x.clone()
    first = own(x)
    result = first.clone()
    own(torch.randn(SHAPE))
    assert torch.equal(x, kept)
    assert torch.equal(first, result)  # no later pass writes into what an earlier one returned
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())


@torch.no_grad()
def test_several_threads_at_once(unet: nn.Module, deployed: nn.Module) -> None:
    inputs = [torch.randn(1, 3, 64, 32 * (1 + i % 2)) for i in range(6)]
    expected = [unet(x) for x in inputs]
    results: list[Tensor | None] = [None] * len(inputs)

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                results[index] = deployed(inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(results, expected)


@torch.no_grad()
def test_sizes_share_weights_and_few_hold_memory(unet: nn.Module) -> None:
    deployed = pag.deploy(unet)
    for width in (32, 64, 96, 64):
        deployed(torch.randn(1, 3, 64, width))
    programs = [program for program, _ in deployed._programs.values()]
    first = programs[0]
    assert len(programs) == 3 and len(first.layers) > 10
    for program in programs[1:]:
        for own, theirs in zip(program.layers, first.layers, strict=True):
            assert own.weights.data_ptr() == theirs.weights.data_ptr()
    assert [len(program._recorded) for program in programs] == [0, 1, 1]


@torch.no_grad()
@needs_kernels
def test_weights_wait_outside_of_memory_and_stay_writable() -> None:
    gated = gate_all(timm.create_model("resnet18"), (1, 3, 32, 32))
    randomize(gated, 0)
    deployed = pag.deploy(gated)
    x = torch.randn(1, 3, 32, 32)
    deployed(x)
    assert isinstance(deployed, DeployedNetwork)
    for own, copied in zip(gated.parameters(), deployed.gated.parameters(), strict=True):
        assert torch.equal(own, copied)
    with torch.no_grad():
        deployed.gated.get_submodule("fc").weight.zero_()
    deployed._weights.leave_memory()
    assert not deployed.gated.get_submodule("fc").weight.any()
    if sys.platform == "linux":
        assert resident_share(deployed.gated) < 0.1


def resident_share(network: nn.Module) -> float:
    """Share of the mapped weights that is in memory."""
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8").split("VmFlags:")
    weight = max(network.parameters(), key=Tensor.numel)
    for entry in maps:
        lines = [line for line in entry.splitlines() if line and not line.startswith(" ")]
        heads = [line for line in lines if "-" in line.split()[0] and ":" not in line.split()[0]]
        if not heads:
            continue
        first, last = (int(end, 16) for end in heads[0].split()[0].split("-"))
        if first <= weight.data_ptr() < last:
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if " kB" in line}
            return int(sizes["Rss"]) / int(sizes["Size"])
    raise AssertionError("the weight is in no mapping")


def test_copies_work(deployed: nn.Module) -> None:
    x = torch.randn(SHAPE)
    assert torch.equal(copy.deepcopy(deployed)(x), deployed(x))


@needs_kernels
@torch.no_grad()
def test_no_later_pass_changes_a_result() -> None:
    """Results lie in memory that is used again, but not while anything looks into it."""
    gated = gate_all(randomize(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())))
    deployed = pag.deploy(gated)
    kept: list[tuple[Tensor, Tensor]] = []
    places: list[int] = []
    for number in range(12):
        result = deployed(torch.randn(SHAPE))
        places.append(result.data_ptr())
        if number % 3 == 0:
            kept.append((result[1, 4:, 2], result[1, 4:, 2].clone()))  # a view, and nothing else
        elif number % 3 == 1:
            kept.append((result.detach(), result.clone()))
    assert all(torch.equal(view, copied) for view, copied in kept)
    result.unsqueeze_(0)
    assert deployed(torch.randn(SHAPE)).shape == (2, 32, 64, 64)
    del kept, result
    assert len({deployed(torch.randn(SHAPE)).data_ptr() for _ in range(8)}) <= 2
    assert len(set(places)) > 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_results_of_its_own() -> None:
    result = ResultMemory(1 << 16).take().fill_(1.0)
    seen = result.numpy()  # torch's threads are not there after a fork
    child = os.fork()
    if child == 0:
        seen[:] = 2.0
        os._exit(int(seen[-1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (seen == 1.0).all()


@needs_kernels
@torch.no_grad()
def test_results_that_torch_looks_at_are_copied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.conv(x)
            z = self.conv(x.flip(2))
            return y, z, z.softmax(1)

    model = randomize(Twice()).eval()
    deployed = pag.deploy(model)
    xs = [torch.randn(SHAPE) for _ in range(4)]
    results = [deployed(x) for x in xs]
    for x, result in zip(xs, results, strict=True):
        close(result, model(x))


def replayed() -> dict[str, nn.Module]:
    """Networks with gates on maps that are never made, selectors, and operators of torch."""
    unet = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse", classes=3)
    return {
        "attention": gate_all(randomize(unet)),
        "convnext": gate_all(randomize(timm.create_model("convnext_atto", depths=ONE_EACH))),
        "multipool": multipool(identity=True, shared=False),
    }


@pytest.mark.parametrize("name", ["attention", "convnext", "multipool"])
@torch.no_grad()
def test_later_passes_are_like_the_first(name: str) -> None:
    """The first pass records what later ones repeat: they must follow inputs, masks and gates."""
    gated = replayed()[name]
    for _, gate in named_gates(gated):
        for parameter in gate.parameters():
            parameter.normal_()
    deployed = pag.deploy(gated)

    def check(x: Tensor) -> Tensor:
        result: Tensor = deployed(x)
        assert torch.equal(result, pag.deploy(deployed.gated)(x))
        return result

    seen = [check(torch.randn(SHAPE)) for _ in range(2)]
    x = torch.randn(SHAPE)
    for density in (0.3, 0.7):
        with pag.override_gates(deployed, density):
            seen.append(check(x))
    seen.append(check(x))
    for _, gate in named_gates(deployed):
        for parameter in gate.parameters():
            parameter.mul_(-1)
    seen.append(check(x))
    with torch.inference_mode():
        assert torch.equal(deployed(x), seen[-1])
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@needs_kernels
@torch.no_grad()
def test_later_passes_read_inputs_where_they_are(deployed: DeployedNetwork) -> None:
    """Laid out as recorded they are not copied; laid out otherwise they are."""
    own = copy.deepcopy(deployed)
    wide = torch.randn(2, 6, 64, 64).contiguous(memory_format=torch.channels_last)
    images = [torch.randn(SHAPE) for _ in range(3)]
    images += [image.contiguous(memory_format=torch.channels_last) for image in images]
    images += [wide[:, :3], nn.Parameter(images[0].flip(0))]
    expected = [pag.deploy(deployed.gated)(image) for image in images]
    own(images[0])
    (program, _), *_ = own._programs.values()
    held = program._recorded[0]._inputs[0]
    before = held.clone()
    for index in (3, 4, 0, 5, 1, 1, 3, 6, 4, 7, 2, 5):
        kept = images[index].clone()
        assert torch.equal(own(images[index]), expected[index])
        assert torch.equal(images[index], kept)
        if index in (3, 4, 5):
            assert torch.equal(held, before)
        before = held.clone()


@torch.no_grad()
def test_inputs_that_torch_looks_at_are_copied() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.conv(x) + x.sin(), self.conv(y), y

    model = randomize(Returned()).eval()
    deployed = pag.deploy(model)
    for _ in range(3):
        images = [torch.randn(SHAPE).contiguous(memory_format=torch.channels_last) for _ in "xy"]
        results = deployed(*images)
        close(results, model(*images))
        assert results[2].data_ptr() != images[1].data_ptr()


@needs_kernels
@torch.no_grad()
def test_every_change_of_a_gate_is_noticed_in_a_copy_too(deployed: DeployedNetwork) -> None:
    own, x = copy.deepcopy(deployed), torch.randn(SHAPE)
    seen = [own(x), own(x)]
    assert torch.equal(*seen)
    gates = dict(named_gates(own))
    first, *_, last = gates.values()
    last.weight.normal_(0, 10)
    seen.append(own(x))
    first.bias.fill_(-1)
    seen.append(own(x))
    first.load_state_dict({**first.state_dict(), "offset": torch.tensor(2.0)})
    seen.append(own(x))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1:], seen[2:], strict=False))
    assert torch.equal(seen[-1], pag.deploy(own.gated)(x))
    assert torch.equal(deployed(x), seen[0])  # the one it was copied from has gates of its own


def test_all_of_it_in_inference_mode() -> None:
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        gated = gate_all(randomize(CustomNet()))
        deployed = pag.deploy(gated)
        first = deployed(x)
        close(first, gated(x))
        assert torch.equal(deployed(x), first)
    assert torch.equal(deployed(x), first)


@torch.no_grad()
@pytest.mark.parametrize("dial", [False, True])
def test_budgets_can_be_set_on_it(dial: bool) -> None:
    gated = gate_all(randomize(CustomNet()), gate=pag.GateConfig(dial=dial))
    for parameter in pag.gate_parameters(gated):
        parameter.normal_()
    images = [torch.randn(SHAPE) for _ in range(2)]
    pag.calibrate(gated, images, (0.9, 0.5))
    deployed = pag.deploy(gated)
    outputs = []
    for budget in (0.9, 0.5):
        pag.set_budget(gated, budget)
        pag.set_budget(deployed, budget)
        outputs.append(deployed(images[0]))
        different = (outputs[-1] - gated(images[0])).abs() > 1e-4
        assert different.float().mean() < 0.01
    assert not torch.equal(*outputs)


# --- what makes it fast ---------------------------------------------------------------------------


@torch.no_grad()
@needs_kernels
@pytest.mark.parametrize("density", [1.0, 0.4, 0.02])
def test_large_weights_are_compressed(density: float) -> None:
    block = timm.models.resnet.Bottleneck(512, 128)
    gated = gate_all(randomize(nn.Sequential(nn.Conv2d(3, 512, 1), block)), (1, 3, 20, 24))
    deployed = pag.deploy(gated)
    for size in ((20, 24), (5, 6)):  # by Winograd's algorithm and directly
        agree(gated, deployed, torch.randn(2, 3, *size), density)
    for program, _ in deployed._programs.values():
        (layer,) = (layer for layer in program.layers if layer.window.kernel == (3, 3))
        assert layer.digits == native.multiplies_digits()
        assert layer.compressed == (native.expands() and not layer.digits)


def steps_of(deployed: DeployedNetwork) -> list[Any]:
    program, _ = next(iter(deployed._programs.values()))
    return program.steps


@torch.no_grad()
def test_a_residual_network_is_convolutions_and_little_else() -> None:
    gated = gate_all(randomize(timm.create_model("resnet18", layers=(2, 1, 1, 1))))
    deployed = pag.deploy(gated)
    deployed(torch.randn(SHAPE))
    calls = [step.function for step in steps_of(deployed) if isinstance(step, Call)]
    names = [str(function).split(".")[1] for function in calls]
    assert names == ["flatten"]
    # A block whose input nothing else reads is updated in place.
    copied = [step for step in steps_of(deployed) if isinstance(step, Allocate) and step.copied]
    assert [step.in_place for step in copied].count(True) >= 4


@torch.no_grad()
def test_a_network_without_gates_runs_on_the_same_kernels() -> None:
    model = randomize(smp.Unet("resnet18", encoder_weights=None, classes=3)).eval()
    deployed, x = pag.deploy(model), torch.randn(SHAPE)
    close(deployed(x), model(x))
    with pytest.raises(pag.PagError, match="not a gated network"):
        pag.override_gates(deployed, 0.5).__enter__()


@torch.no_grad()
def test_a_decoder_reads_its_parts_where_they_are(deployed: DeployedNetwork) -> None:
    deployed(torch.randn(SHAPE))
    program, _ = deployed._programs[next(reversed(deployed._programs))]
    assert not any(isinstance(step, Call) for step in program.steps)
    read = [step.sources for step in program.steps if isinstance(step, Convolve | Decide)]
    assert any([s.upsampling for s in sources] == [2, 1] for sources in read)
    assert any([s.upsampling for s in sources] == [2] for sources in read)


class Summed(nn.Module):
    """Adds up maps that it stacks, as the decoder of an FPN does."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).sin() for layer in self.layers], self.axis).sum(self.axis)


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_maps_are_added_one_after_the_other(axis: int) -> None:
    gated = gate_all(randomize(Summed(axis)))
    deployed = pag.deploy(gated)
    for density in (1.0, 0.4):
        agree(gated, deployed, torch.randn(SHAPE), density, "random")
    names = [str(step.function) for step in steps_of(deployed) if isinstance(step, Call)]
    assert [name for name in names if "sin" not in name] == ["aten.add.Tensor"] * 2


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.Identity(), nn.Softplus()])
def test_group_norm(activation: nn.Module) -> None:
    norms = nn.GroupNorm(2, 8), nn.GroupNorm(8, 8, affine=False)
    layers = nn.Conv2d(3, 8, 3), norms[0], activation, nn.Conv2d(8, 8, 1), norms[1]
    gated = gate_all(randomize(nn.Sequential(*layers)))
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for _ in range(2):
            agree(gated, deployed, torch.randn(SHAPE), 0.5, "random")
        names = [str(step.function) for step in steps_of(deployed) if isinstance(step, Call)]
        assert names == ["aten.softplus.default"] * isinstance(activation, nn.Softplus)


@torch.no_grad()
@pytest.mark.parametrize("last", [torch.sin, torch.neg, lambda x: x], ids=["sin", "neg", "none"])
def test_a_shortcut_takes_over_what_was_made_for_it(last: Callable[[Tensor], Tensor]) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            low = self.low(F.avg_pool2d(x, 2)).cos()
            return last(F.interpolate(low, scale_factor=2.0, mode="nearest")) + self.high(x)

    gated = gate_all(randomize(Pyramid()))
    deployed = pag.deploy(gated)
    for density in (1.0, 0.4):
        agree(gated, deployed, torch.randn(SHAPE), density, "random")
    copies = [s for s in steps_of(deployed) if isinstance(s, Allocate) and s.copied]
    assert copies and all(step.in_place for step in copies)
    assert "upsample_nearest2d" not in str(
        [s.function for s in steps_of(deployed) if isinstance(s, Call)]
    )


class ChannelsLast(nn.Module):
    """A residual branch of a map whose channels are last, with a last layer of any kind."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, stride=4)
        self.block = Residual(nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), end))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return result


@torch.no_grad()
@pytest.mark.parametrize("end", [nn.LayerNorm(12), nn.Tanh(), nn.SiLU(), nn.Identity()])
@pytest.mark.parametrize(
    "size", [(48, 48), (20, 36), (4, 4)]
)  # as many rows as channels; one pixel
def test_channels_last_branches_end_in_any_layer(end: nn.Module, size: tuple[int, int]) -> None:
    shape = (2, 3, *size)
    gated = gate_all(randomize(ChannelsLast(end)).eval(), shape)
    assert "block" in [name for name, _ in named_gates(gated)]
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for density in (1.0, 0.4, 0.0):
            agree(gated, deployed, torch.randn(shape), density, "random")


class Normed(nn.Module):
    """A convolution, a layer norm of its channels, and blocks, as ConvNeXt begins."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 4, stride=4), timm.layers.LayerNorm2d(12)
        self.blocks = nn.Sequential(*(timm.models.convnext.ConvNeXtBlock(12) for _ in range(2)))
        self.again = again

    def forward(self, x: Tensor) -> Any:
        before = self.stem(x)
        last = F.layer_norm(before.permute(0, 2, 3, 1), (12,), self.norm.weight, self.norm.bias)
        after = last.permute(0, 3, 1, 2)
        y = self.blocks(after)
        if self.again == "before":
            return y + before
        if self.again in ("after", "last"):
            return y, (after if self.again == "after" else last).cos()
        return (y, before[:, 2:]) if self.again == "view" else y


@torch.no_grad()
@pytest.mark.parametrize("again", ["nothing", "before", "after", "last", "view"])
def test_layer_norms_overwrite_what_nothing_else_reads(again: str) -> None:
    gated = gate_all(randomize(Normed(again)).eval())
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for density in (1.0, 0.4, 0.0):
            for _ in range(2):  # the second pass is a replay
                agree(gated, deployed, torch.randn(SHAPE), density, "random")
    norms = [s for s in steps_of(deployed) if isinstance(s, Allocate) and s.overwritten]
    assert [norm.in_place for norm in norms] == [again not in ("before", "view"), True, True]
    if again == "nothing":
        assert not any(isinstance(step, Call) for step in steps_of(deployed))
        copies = [s for s in steps_of(deployed) if isinstance(s, Allocate) and s.copied]
        assert [step.in_place for step in copies] == [True, True]


@torch.no_grad()
@pytest.mark.parametrize(
    "last",
    [
        nn.Conv2d(SHAPE[2], 6, 3),
        nn.LayerNorm(8),
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)),
    ],
    ids=["convolution", "norm", "layers"],
)
@pytest.mark.parametrize("step", [1, 2])
def test_maps_whose_channels_were_moved_last(step: int, last: nn.Module) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Conv2d(3, 8, 1), last

        def forward(self, x: Tensor) -> Any:
            y = self.before(x).sin()
            return self.after(y.permute(0, 2, 3, 1)[:, :, ::step]), y

    model, x = randomize(Turned()).eval(), torch.randn(SHAPE)
    for backend in ("auto", "reference"):
        close(pag.deploy(model, backend)(x), model(x))


class Resized(nn.Module):
    """Interpolation to a size, or by factors that are not those of the sizes."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.conv, self.arguments = nn.Conv2d(3, 8, 3, stride=2), arguments

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), **self.arguments).relu()


@torch.no_grad()
@pytest.mark.parametrize(
    "way",
    [
        {"mode": "bilinear", "align_corners": True},
        {"mode": "bilinear", "align_corners": False},
        {"mode": "bilinear", "antialias": True},
        {"mode": "nearest"},
        {"mode": "nearest-exact"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "target",
    [
        {"size": (40, 50)},
        {"size": (9, 31)},
        {"scale_factor": (1.7, 2.3)},
        {"scale_factor": 0.37},
        {"scale_factor": 2.0},
    ],
    ids=str,
)
def test_interpolation(target: dict[str, Any], way: dict[str, Any]) -> None:
    gated = gate_all(randomize(Resized({**target, **way})))
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        agree(gated, deployed, torch.randn(SHAPE), 0.5, "random")
        assert [isinstance(step, Call) for step in steps_of(deployed)].count(True) == 1  # the ReLU


@torch.no_grad()
def test_interpolation_to_the_same_size_does_nothing() -> None:
    gated = gate_all(randomize(Resized({"size": (15, 23), "mode": "bilinear"})), (1, 3, 32, 48))
    deployed = pag.deploy(gated)
    agree(gated, deployed, torch.randn(1, 3, 32, 48), 0.5, "random")
    assert not any(isinstance(step, Resize) for step in steps_of(deployed))


@torch.no_grad()
def test_operators_write_where_later_passes_look() -> None:
    """With and without a form that takes `out`, and of several results."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Softplus(), nn.Conv2d(8, 4, 1))
    deployed = pag.deploy(randomize(model).eval())
    for _ in range(3):
        x = torch.randn(SHAPE)
        close(deployed(x), model(x))


class Stage(nn.Module):
    """Blocks that add to one map, the first of them to a shortcut that is computed.

    The map may be read elsewhere, too, before the last block.
    """

    def __init__(self, blocks: int, activation: type[nn.Module], also_read: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(conv(8 if i else 3, 6, 1), nn.ReLU(), conv(6, 8, 3))
            for i in range(blocks)
        )
        self.activation, self.also_read = activation(), also_read

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        x = self.activation(self.shortcut(x) + first(x))
        for branch in others:
            seen = x
            x = self.activation(x + branch(x))
        return x * seen.mean((2, 3), keepdim=True) if self.also_read else x


@pytest.mark.parametrize("blocks", [2, 3, 7])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("also_read", [False, True])
@torch.no_grad()
def test_gates_of_a_stage_weigh_its_map_once(
    blocks: int, activation: type[nn.Module], also_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_LEAST", 0)
    torch.manual_seed(0)
    gated = gate_all(randomize(Stage(blocks, activation, also_read)), (2, 3, 21, 16))
    gates = dict(named_gates(gated))
    assert len(gates) == blocks + 1
    for gate in gates.values():
        gate.weight.normal_()
        gate.bias.normal_()
    images = [torch.randn(2, 3, 21, 16) for _ in range(3)]
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for density in (1.0, 0.5, 0.0):
            agree(gated, deployed, images[0], density, "random")
        for x in images:
            close(deployed(x), gated(x))
        for name, gate in named_gates(deployed):
            gate.weight.normal_()
            gates[name].weight.copy_(gate.weight)
            gate.offset.fill_(0.1)
            gates[name].offset.fill_(0.1)
        for x in images:
            close(deployed(x), gated(x))
        weighing = [len(s.gates) for s in steps_of(deployed) if isinstance(s, Weigh)]
        # Two gates read the input. Outside of its open pixels, SiLU changes a map again.
        together = activation is nn.ReLU and blocks > 2
        assert weighing == [2, *(range(blocks - 1, 0, -1) if together else ())]


def test_pixels_that_several_blocks_changed_are_weighed_again() -> None:
    gated = gate_all(Stage(2, nn.ReLU, False), (1, 3, 512, 512))
    gate, layer = gated.get_submodule("shortcut.pag_gate"), nn.Identity()
    size, source = (512, 512), (Source("input", "BCHW"),)

    def changed(name: str, before: str, mask: str) -> list[Step]:
        buffer, where = Buffer((1, *size, 3), "BCHW"), Masked(mask)
        written = {"layer": layer, "layout": "BCHW", "sources": source, "size": size}
        return [
            Allocate(writes=name, buffer=buffer, copied=before),
            Convolve(writes=name, where=where, accumulate=True, **written),
        ]

    first, last = (
        Decide(writes=name, gate=gate, sources=(Source(read, "BCHW"),), shape=(1, 1, *size),
               offset=(0, 0))
        for name, read in (("a", "map"), ("c", "later"))
    )  # fmt: skip
    steps = [first, *changed("between", "map", "a"), *changed("later", "between", "b"), last]
    weighed = [step for step in weigh_together(steps) if isinstance(step, Weigh)]
    assert [step.where for step in weighed] == [EVERYWHERE, either(Masked("a"), Masked("b"))]
    assert [len(step.gates) for step in weighed] == [2, 1]
    steps[-1] = replace(last, sources=(Source("between", "BCHW"),))
    assert sum(isinstance(step, Weigh) for step in weigh_together([*steps, last])) == 3
    for other in (replace(first, offset=(1, 1)), replace(first, sources=(Source("x", "BCHW"),))):
        assert weigh_together([other, *steps[1:5], last]) == [other, *steps[1:5], last]


@torch.no_grad()
def test_gates_that_fix_their_share_weigh_a_map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_LEAST", 0)
    gated = gate_all(randomize(Stage(3, nn.ReLU, False)))
    for gate in pag.gate_parameters(gated):
        gate.normal_()
    x = torch.randn(SHAPE)
    pag.calibrate(gated, [x], (0.7,))
    deployed = pag.deploy(gated)
    pag.set_budget(gated, 0.7, mode="per_image")
    pag.set_budget(deployed, 0.7, mode="per_image")
    close(deployed(x), gated(x))
    assert any(isinstance(step, Weigh) for step in steps_of(deployed))


@pytest.mark.parametrize("also_read", [False, True])
@torch.no_grad()
def test_a_shortcut_is_activated_as_it_is_interpolated(also_read: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut, self.branch = nn.Conv2d(3, 8, 1), conv(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.shortcut(x)
            result: Tensor = (y + self.branch(x)).relu()
            return result + y.mean() if also_read else result

    gated = gate_all(randomize(Block()))
    deployed = pag.deploy(gated)
    for density in (1.0, 0.5, 0.1, 0.0):
        agree(gated, deployed, torch.randn(SHAPE), density, "random")
    by_itself = [step for step in steps_of(deployed) if isinstance(step, Activate)]
    assert len(by_itself) == also_read


@torch.no_grad()
def test_a_map_that_is_only_pooled_is_pooled_in_bands() -> None:
    for model, expected in (
        (timm.create_model("resnet18", layers=ONE_EACH), [(2, 1)]),  # open pixels, and others
        (smp.Unet("resnet18", encoder_weights=None), []),  # its decoder reads the map, too
    ):
        gated = gate_all(randomize(model))
        deployed, x = pag.deploy(gated), torch.randn(1, 3, 160, 256)
        for density in (1.0, 0.5, 0.1, 0.0):
            agree(gated, deployed, x, density)
            agree(gated, deployed, x, density)
        assert [s.stages for s in steps_of(deployed) if isinstance(s, InBands)] == expected


@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_inverted_bottlenecks_are_computed_in_bands(threads: int) -> None:
    torch.set_num_threads(threads)
    model = randomize(timm.create_model("mobilenetv2_050"))
    gated = gate_all(model, exclude=("conv_stem", "blocks.0.*", "blocks.1.0.*"))
    deployed, x = pag.deploy(gated), torch.randn(2, 3, 192, 224)
    for density in (1.0, 0.5, 0.1, 0.0):
        for pattern in ("blobs", "random"):
            agree(gated, deployed, x, density, pattern)
            agree(gated, deployed, x, density, pattern)
    steps = steps_of(deployed)
    marks = [at for at, step in enumerate(steps) if isinstance(step, InBands)]
    assert len(marks) > 2  # dense: the stem's, and the first that is wide; a residual branch
    for at in marks:
        assert steps[at].stages == (1, 1, 1)
        # Nothing is listed in between, and what is allocated there is the shortcut's memory.
        assert all(isinstance(step, MakeLists) for step in steps[at - 3 : at])
        between = [s for s in steps[at + 1 : at + 5] if not (isinstance(s, Allocate) and s.copied)]
        assert all(isinstance(step, Convolve) for step in between[:3])


@torch.no_grad()
def test_maps_that_others_see_are_not_computed_in_bands() -> None:
    class Network(nn.Module):
        def __init__(self, seen: str) -> None:
            super().__init__()
            self.expand, self.next = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, groups=64)
            self.seen = seen

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            wide = self.expand(x).relu()
            other = wide.mean((2, 3)) if self.seen == "read" else wide if self.seen else x
            return self.next(wide), other

    x = torch.randn(1, 3, 64, 130)
    for seen in ("", "read", "returned"):
        network = Network(seen).eval()
        deployed = pag.deploy(network)
        for _ in range(2):
            for found, expected in zip(deployed(x), network(x), strict=True):
                close(found, expected)
        assert len([s for s in steps_of(deployed) if isinstance(s, InBands)]) == (not seen)


class Inverted(nn.Module):
    """A wide map of a 1x1 convolution, read by another one and maybe by somebody else."""

    def __init__(
        self, activation: nn.Module, geometry: tuple[int, int, int], also_read: bool
    ) -> None:
        super().__init__()
        kernel, stride, padding = geometry
        self.expand = nn.Sequential(nn.Conv2d(3, 20, 1), nn.BatchNorm2d(20), activation)
        self.next = nn.Conv2d(20, 20, kernel, stride, padding, groups=20)
        self.last = nn.Conv2d(20, 5, 1)
        self.also_read = also_read

    def forward(self, x: Tensor) -> Tensor:
        wide = self.expand(x)
        result: Tensor = self.last(self.next(wide).relu())
        return result + wide.mean((2, 3))[:, :5, None, None] if self.also_read else result


@pytest.mark.parametrize(
    "geometry, waits",  # kernel, stride and padding
    [((3, 2, 1), True), ((2, 2, 0), True), ((3, 2, 0), False), ((3, 1, 1), False)],
)
@pytest.mark.parametrize("size", [(12, 18), (11, 17)])
@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.SiLU()])
@pytest.mark.parametrize("also_read", [False, True])
@torch.no_grad()
def test_interpolation_waits_for_a_gate_that_reads_none_of_it(
    geometry: tuple[int, int, int],
    waits: bool,
    size: tuple[int, int],
    activation: nn.Module,
    also_read: bool,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    model = randomize(Inverted(activation, geometry, also_read))
    gated = gate_all(model, tuple(x.shape), exclude=("last",))
    gate = dict(named_gates(gated))["next"]
    gate.weight.normal_()
    gate.bias.zero_()
    for backend in ("auto", "reference"):
        deployed = pag.deploy(gated, backend)
        for density in (1.0, 0.5, 0.1, 0.0):
            agree(gated, deployed, x, density, "random")
            with pag.override_gates(gated, density), pag.override_gates(deployed, density):
                gate.override = dict(named_gates(deployed))["next"].override = None
                close(deployed(x), gated(x))  # it may read values that are not activated yet
        kinds = [k for s in steps_of(deployed) if (k := type(s)) in (Decide, Interpolate)]
        limited = waits and not also_read  # else all of it is filled anyway
        expected = [Decide, Decide, Interpolate] if limited else [Decide, Interpolate, Decide]
        assert kinds == expected
    if _kernels_are_there():
        deployed = pag.deploy(gated)
        with pag.override_gates(deployed, 0.0):
            calls = deployed.profile(x)
        (filled,) = (args[2] for kind, args, _ in calls if kind == "interpolate")
        assert (int(filled) > 0) == (also_read or not waits)


@dataclass(kw_only=True)
class Reader(Step):
    """Reads a map where a mask is open."""

    mask: str

    def reads(self) -> Iterator[str]:
        yield "map"

    def needs(self, demanded: Demand) -> Iterator[tuple[str, Demand]]:
        yield "map", Masked(self.mask)


@pytest.mark.parametrize("mask", ["first", "later"])
def test_interpolation_waits_only_for_masks_that_are_decided_by_then(mask: str) -> None:
    gated = gate_all(Inverted(nn.ReLU6(), (3, 2, 1), False))
    gate, shape = gated.get_submodule("next.pag_gate"), (2, 1, 32, 32)
    filled = Interpolate(writes="map", layout="BCHW", mask="open", activation="relu6", slope=0.0)
    first, later = (
        Decide(writes=name, gate=gate, sources=(Source(read, "BCHW"),), shape=shape, offset=(0, 0))
        for name, read in (("first", "map"), ("later", "input"))
    )
    early, late = Reader(writes="a", mask="first"), Reader(writes="b", mask=mask)
    order = put_off([filled, first, early, later, late], [])
    kinds = [type(step) for step in order]
    if mask == "first":
        assert kinds == [Decide, Interpolate, Reader, Decide, Reader]
    else:
        assert order == [filled, first, early, later, late]


class Fused(nn.Module):
    """A convolution whose gate decides after the map that is added to it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.large = nn.Conv2d(3, 8, 1), conv(8, 16, 3, stride=2)
        self.small = nn.Sequential(conv(8, 4, 3), nn.ReLU(), conv(4, 16, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        small: Tensor = self.small(x)
        return small + self.large(x)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
def test_a_map_may_be_there_before_the_mask_that_it_is_read_under(density: float) -> None:
    gated = gate_all(randomize(Fused()).eval(), include=("large",))
    deployed = pag.deploy(gated)
    assert [name for name, _ in named_gates(gated)] == ["large"]
    agree(gated, deployed, torch.randn(SHAPE), density)


@pytest.mark.parametrize("known", [True, False])
def test_masks_that_are_decided_later_limit_nothing(known: bool) -> None:
    gate = gate_all(CustomNet()).get_submodule("block.pag_gate")
    decide = Decide(
        writes="mask", gate=gate, sources=(Source("input", "BCHW"),), shape=SHAPE, offset=(0, 0)
    )
    fill = Interpolate(writes="map", layout="BCHW", mask="", activation="relu6", slope=0.0)
    reader = Reader(writes="result", mask="mask")
    steps: list[Step] = [decide, fill, reader] if known else [fill, decide, reader]
    found = demands_of(steps, [])[steps.index(fill)]
    assert found == (Masked("mask") if known else EVERYWHERE)


def test_a_set_of_pixels_and_all_others_are_everywhere() -> None:
    read, other = Masked("read"), Masked("mask")
    for part in (Masked("mask"), Grid("mask")):
        rest = replace(part, wanted=False)
        assert either(either(part, read), rest) == EVERYWHERE
        assert either(read, rest) != EVERYWHERE
    assert either(other, Grid("mask", wanted=False)) != EVERYWHERE


class Exact(nn.Module):
    """Attention that is computed in float32 whatever surrounds it, as some of timm's is."""

    def __init__(self) -> None:
        super().__init__()
        self.block = CustomNet().block

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            weights = x.float().flatten(2).mean(1, keepdim=True).softmax(-1)
            with torch.autocast("cpu", enabled=False):
                summed, total = x.flatten(2) @ weights.mT, weights.sum()
        return x + summed[..., None] / total


def test_regions_without_autocast_are_like_any_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), randomize(Exact()), nn.Conv2d(8, 4, 1)).eval()
    gated = gate_all(model)
    deployed = pag.deploy(gated)
    for density in (1.0, 0.4):
        agree(gated, deployed, torch.randn(SHAPE), density)


@torch.no_grad()
def test_nothing_is_computed_where_nothing_is_open() -> None:
    """The convolutions of a closed branch run on empty lists: values there are never written."""
    gated = gate_all(nn.Sequential(nn.Conv2d(3, 8, 1), CustomNet().block), include=("1",))
    deployed = pag.deploy(gated)
    x = torch.randn(SHAPE)
    with pag.override_gates(deployed, 0.0):
        deployed(x)
        program, _ = next(iter(deployed._programs.values()))
        inside = [
            step
            for step, demanded in zip(program.steps, program.demanded, strict=True)
            if isinstance(step, Convolve) and step.layer.window.kernel == (3, 3)
        ]
    assert len(inside) == 2
    assert all(gate.override is None for _, gate in named_gates(deployed))


@needs_kernels
def test_profile_names_every_call(deployed: DeployedNetwork) -> None:
    x = torch.randn(SHAPE)
    with pag.override_gates(deployed, 0.5):
        calls = deployed.profile(x)
    steps = [step for step in steps_of(deployed) if isinstance(step, Convolve)]
    convolutions = [kept[0] for kind, kept, _ in calls if kind == "convolution"]
    assert [a.out.shape[3] for a in convolutions] == [step.layer.out_channels for step in steps]
    assert {"list", "halo", "max pool"} <= {kind for kind, _, _ in calls}
    assert all(seconds > 0 for _, _, seconds in calls)


@given(reserved=st.integers(1, 20), orders=st.lists(st.integers(-9, 60), max_size=40))
def test_memory_is_one_map_at_a_time(reserved: int, orders: list[int]) -> None:
    memory = Memory(16 * reserved)
    taken: list[tuple[Tensor, Range]] = []

    def give(index: int) -> None:
        flat, given = taken.pop(index)
        assert (flat == flat[:1]).all()  # what its owner wrote is still there
        memory.give(given)

    for number, order in enumerate(orders):
        if order >= 0:
            taken.append(memory.take(order))
            taken[-1][0].fill_(number)
        elif taken:
            give(order % len(taken))
    while taken:
        give(0)
    for block in list(memory.blocks):  # all of it is free again, in one piece each
        assert memory.take(block.numel())[0].numel() == block.numel()
    assert len(memory.blocks) <= 1 + sum(order >= 0 for order in orders)


@needs_kernels
def test_maps_lie_where_earlier_ones_lay(deployed: DeployedNetwork) -> None:
    calls = deployed.profile(torch.randn(SHAPE))
    outs = [kept[0].out for kind, kept, _ in calls if kind == "convolution"]
    blocks = {out.untyped_storage().data_ptr(): out.untyped_storage().nbytes() for out in outs}
    assert sum(blocks.values()) < sum(4 * out.numel() for out in outs) / 2


# --- refusals -------------------------------------------------------------------------------------


def test_saving_a_deployed_network_is_refused(deployed: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(pag.PagError, match="save the gated"):
        pag.save_file(deployed, tmp_path / "x.safetensors")
    with pytest.raises(pag.PagError, match="save the gated"):
        pag.save_pretrained(deployed, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_deployed_is_refused(deployed: nn.Module) -> None:
    with pytest.raises(pag.PagError, match="deployed already"):
        pag.deploy(deployed)
    with pytest.raises(pag.PagError, match="expected a network"):
        pag.deploy(None)  # type: ignore[arg-type]
    with pytest.raises(pag.PagError, match="backend='gpu'"):
        pag.deploy(gate_all(CustomNet()), backend="gpu")
    with pytest.raises(pag.PagError, match="cannot be trained"):
        deployed.train()
    with pytest.raises(pag.PagError, match="cannot be trained"):
        pag.Annealer(deployed, 10)
    with pytest.raises(pag.PagError, match="cannot be measured"), pag.measure(deployed):
        pass
    with pytest.raises(pag.PagError, match="cannot be calibrated"):
        pag.calibrate(deployed, [torch.randn(SHAPE)], [0.9])
    with pytest.raises(pag.PagError, match="cannot be ungated"):
        pag.remove(deployed)
    for convert in (deployed.half, deployed.double, deployed.bfloat16):
        with pytest.raises(pag.PagError, match="in float32 on the CPU"):
            convert()
    assert deployed.float() is deployed.cpu() is deployed
    for wrong in ((torch.randn(1, 5, 32, 32),), (None,), ()):
        with pytest.raises(pag.PagError, match="does not take these arguments"):
            deployed(*wrong)
    with pytest.raises(pag.PagError, match="holds a ndarray"):
        deployed(torch.randn(SHAPE).numpy())
    model = MODELS["control flow by values"].build().eval()
    gated = gate_all(model, (2, 3, 32, 32))
    with pytest.raises(pag.PagError, match="cannot be deployed"):
        pag.deploy(gated)(torch.randn(2, 3, 32, 32))
