"""Networks that call, hold or name their modules in ways that a gate cannot follow are told."""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import conv
from torch import Tensor, nn

import pag_retrofit as pag
from pag_retrofit.gates import named_gates

SHAPE = (1, 3, 16, 16)


class Residual(nn.Module):
    """A residual block whose branch is a module of its own."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(channels, channels, 3), nn.ReLU(), conv(channels, channels, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Listed(nn.Module):
    """Blocks that are called by way of a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 8, 3), Residual(), Residual()
        self.blocks = [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_gates_that_would_never_be_called_are_refused() -> None:
    model = Listed().eval()
    x = torch.randn(SHAPE)
    expected, before = model(x), dict(model.named_modules())
    with pytest.raises(pag.PagError, match=r"2 gates are never called.*first.*nn.ModuleList"):
        pag.retrofit(model, 0.9, example_input=SHAPE, inplace=True)
    assert dict(model.named_modules()) == before and torch.equal(model(x), expected)
    config = pag.RetrofitConfig(exclude=("first*", "second*"))
    gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=config)
    assert [name for name, _ in named_gates(gated)] == ["stem"]


def test_modules_whose_forward_was_replaced_stay_dense() -> None:
    model = nn.Sequential(conv(3, 8, 3), conv(8, 8, 3), Residual())
    for module in (model[1], model[2]):
        module.forward = types.MethodType(type(module).forward, module)
    gated = pag.retrofit(model, 0.9, example_input=SHAPE)
    assert {name for name, _ in named_gates(gated)} in (
        {"0", "2.branch"},
        {"0", "2.branch.0", "2.branch.2"},
    )
    reasons = {layer.name: layer.reason for layer in pag.plan(model, example_input=SHAPE).dense}
    assert "forward was replaced" in reasons["1"]


class Mlp(nn.Module):
    """Called in one of several ways, after which it is added."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = {"keyword": lambda: kwargs["hidden"], "list": lambda: args[0][0]}.get(
            self.way, lambda: args[-1]
        )()
        y = self.fc2(self.fc1(x).relu())
        return (y, None) if self.way == "tuple" else y


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda mlp, x: mlp(x),
    "unused": lambda mlp, x: mlp(x * 0 + 100, x),
    "size": lambda mlp, x: mlp((4, 4), x),
    "list": lambda mlp, x: mlp([x]),
    "tuple": lambda mlp, x: mlp(x)[0],
    "keyword": lambda mlp, x: mlp(hidden=x),
}


class Mixing(nn.Module):
    """Attention, and then an MLP."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.patches, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(16, 16)
        self.mlp = Mlp(way)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2)
        tokens = (tokens + self.mix(tokens)).transpose(1, 2)
        return tokens + CALLS[self.way](self.mlp, tokens)


@torch.no_grad()
@pytest.mark.parametrize("way", CALLS)
def test_branches_are_gated_by_what_they_compute_from(way: str) -> None:
    model = Mixing(way).eval()
    gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=pag.RetrofitConfig(min_share=0.0))
    seen: list[Tensor] = []
    for _, gate in named_gates(gated):
        gate.register_forward_hook(lambda _gate, inputs, _output: seen.append(inputs[0]))
    x = torch.randn(SHAPE)
    assert torch.equal(gated(x), model(x))
    assert not any((value == 100).any() for value in seen)
    if way == "plain":
        assert "mlp" in dict(named_gates(gated))


def test_what_cannot_be_copied_keeps_no_hooks() -> None:
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3))
    model.lock = threading.Lock()  # type: ignore[assignment]
    for _ in range(2):
        assert len(pag.plan(model, example_input=SHAPE).sites) == 2
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert not any(hooks)
    with pytest.raises(pag.PagError, match="cannot be copied.*inplace=True"):
        pag.retrofit(model, 0.9, example_input=SHAPE)
    assert pag.retrofit(model, 0.9, example_input=SHAPE, inplace=True) is model


def test_names_that_differ_by_a_dot() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b_c": conv(8, 8, 3)})
            self.a_b = nn.ModuleDict({"c": conv(8, 8, 3)})

        def forward(self, x: Tensor) -> Tensor:
            x = self.a["b_c"](x).relu()
            return self.a_b["c"](x).relu()

    model = nn.Sequential(conv(3, 8, 3), Block())
    config = pag.RetrofitConfig(scope="conv")
    plan = pag.plan(model, example_input=SHAPE, config=config)
    gated = pag.retrofit(model, 0.9, example_input=SHAPE, config=config)
    assert sorted(site.name for site in plan.sites) == sorted(dict(named_gates(gated)))
    assert len(plan.sites) == 3


def test_patterns_that_name_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(conv(3, 8, 3), Residual())
    config = pag.RetrofitConfig(exclude=("1.brunch*", "0"))
    pag.plan(model, example_input=SHAPE, config=config)
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "'1.brunch*'" in told[0]


def test_steps_of_a_gated_sequence() -> None:
    model = Mixing("plain")
    model.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=pag.RetrofitConfig(min_share=0.0))
    body = gated.mlp
    assert "mlp" in dict(named_gates(gated)) and len(body) == 3
    assert isinstance(body[-1], nn.Linear) and body[0].in_features == 8
    x = torch.randn(2, 5, 8)
    assert type(body[:2]) is nn.Sequential and body[:2](x).shape == (2, 5, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: pag.plan(m, example_input=SHAPE, config={"scope": "conv"}), "config="),
        (lambda m, g: pag.Annealer(g, 10, temperature=0.5), "temperature=0.5"),
        (lambda m, g: pag.Annealer(g, 10, temperature=(1.0,)), "two temperatures"),
        (lambda m, g: pag.Annealer(g, 10, dial=(0.5,)), "dial="),
        (lambda m, g: pag.Annealer(g, 10, budget="0.5"), "budget='0.5'"),
        (lambda m, g: pag.Annealer(g, float("nan")), "total_steps=nan"),
        (lambda m, g: pag.prune_gates(g, "a"), "least='a'"),
        (lambda m, g: pag.resize_input(m, "0.5", example_input=SHAPE), "share='0.5'"),
        (lambda m, g: pag.calibrate(g, None), "batches=None"),
        (lambda m, g: pag.calibrate(g, [torch.full(SHAPE, torch.nan)]), "not finite"),
        (lambda m, g: pag.RetrofitConfig.from_dict(None), "expected a mapping"),
        (lambda m, g: pag.save_file(g, "."), "it is a folder"),
    ],
)
def test_arguments_of_another_kind(call: Callable[..., Any], message: str) -> None:
    model = nn.Sequential(conv(3, 8, 3), Residual())
    gated = pag.retrofit(model, 0.9, example_input=SHAPE)
    with pytest.raises(pag.PagError, match=message):
        call(model, gated)


def test_calibration_keeps_the_mode_and_does_not_ask_for_training_where_all_is_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gated = pag.retrofit(nn.Sequential(conv(3, 8, 3), Residual()), 0.9, example_input=SHAPE)
    images = [torch.randn(2, 3, 16, 16)]
    reached = pag.calibrate(gated.eval(), images, budgets=[1.0])
    assert reached[1.0] > 1.006 and not [r for r in caplog.records if "train them" in r.message]
    pag.set_budget(gated, 1.0, mode="per_image")
    pag.calibrate(gated, images, budgets=[1.0])
    assert pag.calibration.budget_mode(gated) == "per_image"
