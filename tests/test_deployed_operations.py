"""Operations around convolutions: deployed networks take each for what it is, on any input."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from networks import conv
from test_deployment import close, gate_all, needs_kernels
from torch import Tensor, nn
from torch.nn import functional as F

import pag_retrofit as pag
from pag_retrofit import kernels
from pag_retrofit.deployment import DeployedNetwork


class Around(nn.Module):
    """Two convolutions, and a function that says what is done with them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point = nn.Conv2d(8, 8, 1)
        self.conv = conv(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.function = function

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.function(self, x, *others)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "slice from the end": lambda m, x: m.point(x[:, :, -9:-1]),
    "slice of a slice from the end": lambda m, x: m.point(x[:, :, ::2][:, :, -5:, -7::3]),
    "slice from beyond": lambda m, x: m.point(m.conv(x)[:, :, -99:, 2:]),
    "slices of two axes": lambda m, x: m.point(m.conv(x)[:, :, -8:, -8:]),
    "nearest, by a factor that is almost 4": lambda m, x: m.conv(
        F.interpolate(x[:, :, :4, :4], scale_factor=4.1)
    ),
    "nearest, by 4": lambda m, x: m.conv(F.interpolate(x[:, :, :4, :4], scale_factor=4)),
    "nearest, to a size": lambda m, x: m.conv(F.interpolate(x[:, :, :4, :4], (8, 8))),
    "sum of booleans": lambda m, x: torch.stack([m.conv(x) > 0, x > 0, x < 1]).sum(0),
    "sum of integers": lambda m, x: torch.stack([(x > 0).long(), (x < 1).long()]).sum(0),
    "an input is pooled": lambda m, x: m.conv(F.max_pool2d(x, 2)),
    "a truth is added": lambda m, x: m.conv(x) + (m.conv(x) > 0),
    "truths are concatenated": lambda m, x: F.conv2d(
        torch.cat([m.conv(x), x > 0], 1), m.conv.weight.repeat(1, 2, 1, 1)
    ),
    "truths scale channels": lambda m, x: m.conv(x * (x.mean((2, 3), keepdim=True) > 0)),
    "one image without a batch": lambda m, x: m.conv(x[0]),
    "norm in float64": lambda m, x: F.layer_norm(x.double(), (16,)).float() + x,
}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, backend: str) -> None:
    network = Around(OPERATIONS[name]).eval()
    deployed = pag.deploy(network, backend)
    for seed in range(3):
        x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(seed))
        found, expected = deployed(x), network(x)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("other", [torch.ones(2, 8, 16, 16).bool(), torch.full((2, 8, 16, 16), 3)])
def test_a_second_input_of_another_type(other: Tensor) -> None:
    network = Around(lambda m, x, y: m.conv(x) + y).eval()
    x = torch.randn(2, 8, 16, 16)
    close(pag.deploy(network)(x, other), network(x, other))


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [lambda m, x: m.norm(x), lambda m, x: F.linear(x, m.point.weight[:, :, 0, 0])],
    ids=["norm", "linear"],
)
def test_inputs_whose_channels_are_last_already(function: Callable[..., Any]) -> None:
    network = Around(function).eval()
    deployed = pag.deploy(network)
    for seed in range(4):
        x = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(seed))
        for layout in (torch.channels_last, torch.contiguous_format):
            close(deployed(x.contiguous(memory_format=layout)), network(x))


@torch.no_grad()
def test_dropout_that_is_on_in_evaluation_stays_on() -> None:
    for function in (F.dropout, F.dropout2d):
        deployed = pag.deploy(Around(lambda m, x, f=function: f(m.conv(x), 0.5, True)).eval())
        x = torch.randn(2, 8, 16, 16)
        found = [deployed(x) for _ in range(3)]
        assert all(0.2 < float((y == 0).float().mean()) < 0.8 for y in found)
        assert not torch.equal(found[1], found[2])


@torch.no_grad()
def test_results_do_not_depend_on_autocast() -> None:
    network = Around(
        lambda m, x: m.conv(F.linear(m.conv(x).flatten(2), torch.eye(256)).view_as(x))
    ).eval()
    x = torch.randn(2, 8, 16, 16)
    expected = network(x)
    deployed, recorded_inside = pag.deploy(network), pag.deploy(network)
    for _ in range(3):
        close(deployed(x), expected, 1e-5)
        for each in (deployed, recorded_inside):
            with torch.autocast("cpu", torch.bfloat16):
                found = each(x)
            assert found.dtype is torch.float32
            close(found, expected, 1e-5)


def test_networks_are_deployed_in_several_threads_at_once() -> None:
    failures: list[Exception] = []

    def work(network: nn.Module, deployed: nn.Module) -> None:
        try:
            for size in (8, 12, 16, 20):
                x = torch.randn(1, 8, size, size)
                with torch.no_grad():
                    close(deployed(x), network(x))
        except Exception as error:
            failures.append(error)

    networks = [Around(lambda m, x: m.conv(m.conv(x).relu()) + x).eval() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(n, pag.deploy(n))) for n in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_kernels
@torch.no_grad()
def test_any_order_of_sizes_shares_weights() -> None:
    deployed = pag.deploy(timm.create_model("resnet18").eval())

    def kept() -> int:
        programs = [program for program, _ in deployed._programs.values()]
        blocks = {
            layer.weights.untyped_storage().data_ptr(): layer.weights.untyped_storage().nbytes()
            for program in programs
            for layer in program.layers
        }
        return sum(blocks.values())

    sizes = []
    for size in (64, 128, 224, 256, 288):
        deployed(torch.randn(1, 3, size, size))
        sizes.append(kept())
    assert sizes[0] < sizes[-1] < 2 * sizes[0]  # some are computed in another way in larger maps
    assert sizes[2:] == [sizes[2]] * 3


class Growing(nn.Module):
    """A convolution whose output is larger than its input divided by the stride."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3)
        self.down = nn.Conv2d(8, 16, kernel, 2, kernel // 2)
        self.end = conv(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.down(self.stem(x)).relu())


@torch.no_grad()
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_sizes_at_which_a_map_outgrows_its_input(kernel: int) -> None:
    gated = gate_all(Growing(kernel), (1, 3, 17, 17))
    sites = {gate.site for gate in gated.modules() if isinstance(gate, pag.gates.Gate)}
    assert ("down" in sites) == (kernel == 3)
    deployed = pag.deploy(gated)
    for size in ((17, 17), (16, 16), (16, 17), (2, 3)):
        x = torch.randn(2, 3, *size)
        with pag.override_gates(gated, 0.4), pag.override_gates(deployed, 0.4):
            close(deployed(x), gated(x))


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_out_of_closed_pixels(value: float) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(8, 8, 3), conv(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(x).relu())

    gated = gate_all(nn.Sequential(Block(), Block()), (1, 8, 12, 12))
    for parameter in gated[0].first.parameters():
        parameter.fill_(value)
    for gate in gated.modules():
        if isinstance(gate, pag.gates.PixelGate):
            gate.bias.fill_(-1.0)
    x = torch.randn(1, 8, 12, 12)
    assert torch.equal(gated(x), x)
    close(pag.deploy(gated)(x), x)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_a_nan_wins_wherever_it_lies_in_a_window(backend: str) -> None:
    x = torch.zeros(4, 1, 4, 20)  # 20 channels: whole vectors, and a rest
    for place in range(4):
        x[place, 0, place, 3] = float("nan")
    out = torch.empty(4, 1, 1, 20)
    with kernels.using(backend):
        kernels.backend().max_pool(out, x, (1, 4, 1, 4, 1, 1, 0, 0))
    assert out.isnan().nonzero()[:, [0, 3]].tolist() == [[image, 3] for image in range(4)]


def test_deployed_networks_refuse_other_weights() -> None:
    network = Around(lambda m, x: m.conv(x)).eval()
    deployed = pag.deploy(network)
    with pytest.raises(pag.PagError, match="load them into the gated one"):
        deployed.load_state_dict(deployed.state_dict())


def test_profiles_take_any_type_and_tell_that_no_kernels_run() -> None:
    network = Around(lambda m, x: m.conv(x)).eval()
    x = torch.randn(1, 8, 8, 8).double()
    deployed: DeployedNetwork = pag.deploy(network, "reference")
    with pytest.raises(pag.PagError, match="native kernels"):
        deployed.profile(x)
    if kernels.can_record():
        assert [kind for kind, *_ in pag.deploy(network).profile(x)] == ["convolution"]


@pytest.mark.parametrize("name", ["PAG_RETROFIT_INSTRUCTION_SET", "PAG_RETROFIT_KERNELS"])
def test_what_the_environment_asks_for_is_not_replaced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "unknown")
    for cached in (kernels.native.library, kernels.operators._best_backend):
        cached.cache_clear()
    try:
        with pytest.raises(pag.PagError, match="unknown"):
            kernels.backend()
    finally:
        monkeypatch.undo()
        for cached in (kernels.native.library, kernels.operators._best_backend):
            cached.cache_clear()


@torch.no_grad()
def test_no_images_at_a_fixed_share() -> None:
    gated = gate_all(nn.Sequential(conv(3, 8, 3), conv(8, 8, 3)))
    pag.calibrate(gated, [torch.randn(1, 3, 64, 64)], budgets=[1.0])
    pag.set_budget(gated, 1.0, mode="per_image")
    assert gated(torch.randn(0, 3, 64, 64)).shape == (0, 8, 64, 64)
