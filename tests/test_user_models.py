"""Networks that no library knows: gated without a change, or left alone with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from user_models import MODELS, UserModel, branch, with_stem

import pag_retrofit as pag

SHAPE = (2, 3, 32, 32)
EVERYTHING = pag.RetrofitConfig(min_share=0.0)


@pytest.fixture(params=MODELS)
def user(request: pytest.FixtureRequest) -> UserModel:
    return MODELS[request.param]


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in tensors(part)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_the_sites_are_those_expected_and_the_rest_has_its_reason(user: UserModel) -> None:
    found = pag.plan(user.build().eval(), 1.0, example_input=SHAPE, config=EVERYTHING)
    assert {site.name for site in found.sites} == set(user.sites)
    reasons = {layer.name: layer.reason for layer in found.dense}
    assert set(reasons) == set(user.reasons)
    for name, reason in user.reasons.items():
        assert reason in reasons[name]


def test_nothing_changes_until_gates_close(user: UserModel, capfd: Any) -> None:
    model = user.build().eval()
    twin = copy.deepcopy(model)
    gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=EVERYTHING)
    assert capfd.readouterr() == ("", "")
    x = torch.randn(SHAPE)
    with torch.no_grad():
        expected = twin(x.clone())
        assert same(gated(x.clone()), expected)
        assert same(model(x.clone()), expected)
        with FlopCounterMode(display=False) as counter:
            twin(x.clone())
        with pag.measure(gated) as measured:
            gated(x.clone())
    assert measured.total_macs == counter.get_total_flops() // 2
    kept = [key for key in gated.state_dict() if ".pag_" not in f".{key}"]
    assert kept == list(twin.state_dict())
    removed = pag.remove(gated)
    assert list(removed.state_dict()) == list(twin.state_dict())
    assert [type(m) for m in removed.modules()] == [type(m) for m in twin.modules()]
    with torch.no_grad():
        assert same(removed(x.clone()), expected)


def test_masks_count_and_training_goes_on(user: UserModel) -> None:
    gated = pag.retrofit(user.build().eval(), 1.0, example_input=SHAPE, config=EVERYTHING)
    x = torch.randn(SHAPE)
    fractions = []
    for density in (0.0, 0.5, 1.0):
        with pag.override_gates(gated, density), pag.measure(gated) as measured, torch.no_grad():
            output = gated(x.clone())
        assert all(torch.isfinite(part).all() for part in tensors(output))
        fractions.append(measured.fraction)
    assert fractions == sorted(fractions)
    assert fractions[0] == pytest.approx(gated.pag_state.floor)
    gated.train()
    with torch.no_grad():
        for parameter in pag.gate_parameters(gated):
            parameter.normal_()
    loss = sum(part.square().mean() for part in tensors(gated(x.clone())))
    (loss + pag.sparsity_loss(gated)).backward()
    for name, parameter in gated.named_parameters():
        unused = parameter.grad is None
        assert unused == (name.rpartition(".")[0] in user.reasons and "dark" in name), name
        assert unused or torch.isfinite(parameter.grad).all(), name


@torch.no_grad()
def test_closed_pixels_of_a_block_with_several_outputs_get_the_shortcut() -> None:
    gated = pag.retrofit(
        MODELS["several outputs and keywords"].build().eval(),
        1.0,
        example_input=SHAPE,
        config=EVERYTHING,
    )
    block, x = gated.get_submodule("block"), torch.randn(2, 8, 32, 32)
    with pag.override_gates(gated, 0.0):
        y, kept = block(x, scale=0.5, keep=True)
    assert torch.equal(y, x)
    assert torch.equal(kept, x)
    with pytest.raises(AssertionError, match="scale"):  # its graph is that of the call it was in
        block(x, scale=2.0, keep=True)


def test_a_model_in_half_precision_stays_in_it() -> None:
    model = with_stem(nn.Sequential(*branch())).eval().to(torch.bfloat16)
    gated = pag.retrofit(model, 1.0, example_input=SHAPE, config=EVERYTHING)
    x = torch.randn(SHAPE, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(gated(x), model(x))
    assert {p.dtype for p in gated.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyConv2d(8, 3), "example_input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), "nothing to gate"),
    ],
)
def test_what_cannot_be_gated_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(pag.PagError, match=message):
        pag.retrofit(model, 0.9, example_input=SHAPE)
