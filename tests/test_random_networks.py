"""Random networks against references by hand: outputs, masks, dependencies, counts, gradients."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grammar import Block, Case, LayerScale, SqueezeExcite, cases
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from networks import coarse_by_hand
from torch import Tensor, nn
from torch.nn import functional as F

import pag_retrofit as pag
from pag_retrofit.gates import named_gates

LAYERS = (nn.Conv2d, nn.Linear)
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
masks = st.tuples(
    st.sampled_from(["random", "blobs", "rows", "none"]), st.floats(0, 1), st.integers(0, 9)
)


def gate(case: Case, **changes: object) -> nn.Module | None:
    """Gate the network of a case; None, noted, if it has no site."""
    config = pag.RetrofitConfig(**{**vars(case.config), **changes})  # type: ignore[arg-type]
    try:
        return pag.retrofit(case.model, 1.0, example_input=case.shape, config=config)
    except pag.NoSitesError:
        event("no site")
        return None


def plan(case: Case) -> pag.Plan:
    return pag.plan(case.model, 1.0, example_input=case.shape, config=case.config)


def layer_macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    """MACs of each convolution and linear layer over a batch, from hooks."""
    counts: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda m, _, y, n=name: counts.update({n: y.numel() * m.weight[0].numel()})
        )
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    with torch.no_grad():
        model(x.clone())
    for handle in handles:
        handle.remove()
    return counts


# --- what a masked network gives, by hand ---------------------------------------------------------


class MaskedConv(nn.Module):
    """Closed pixels get the kernel summed over its taps, or interpolated neighbours."""

    def __init__(self, conv: nn.Module, mask: Tensor, bypass: str):
        super().__init__()
        self.conv, self.mask, self.bypass = conv, mask, bypass

    def forward(self, x: Tensor) -> Tensor:
        full = self.conv(x)
        if self.bypass == "coarse":
            return torch.where(self.mask > 0, full, coarse_by_hand(full))
        kernel = self.conv.weight.sum((2, 3), keepdim=True)
        collapsed = F.conv2d(
            self._centres(x, full), kernel, self.conv.bias, 1, 0, 1, self.conv.groups
        )
        return torch.where(self.mask > 0, full, collapsed)

    def _centres(self, x: Tensor, full: Tensor) -> Tensor:
        """The input pixel in the middle of each output pixel's window."""
        for axis in (0, 1):
            reach = (self.conv.kernel_size[axis] - 1) * self.conv.dilation[axis] // 2
            padded = {"same": reach, "valid": 0}.get(str(self.conv.padding))
            first = reach - (self.conv.padding[axis] if padded is None else padded)
            places = first + self.conv.stride[axis] * torch.arange(full.shape[axis + 2])
            x = x.index_select(axis + 2, places)
        return x


def masked_reference(case: Case, sites: pag.Plan, opened: dict[str, Tensor]) -> nn.Module:
    """The network with each site's mask written out; branches keep their shortcut."""
    model = copy.deepcopy(case.model)
    for site in sites.sites:
        if site.kind == "conv":
            parent, _, name = site.name.rpartition(".")
            conv = model.get_submodule(site.name)
            masked = MaskedConv(conv, opened[site.name], site.bypass)
            setattr(model.get_submodule(parent), name, masked)
        elif site.add_index is None:
            hook = lambda m, a, y, n=site.name: torch.where(opened[n] > 0, y, 0)  # noqa: E731
            model.get_submodule(site.name).register_forward_hook(hook)
    for name, block in model.named_modules():
        if isinstance(block, Block):
            names = [name if i == 0 else f"{name}.add{i}" for i in range(len(block.branches()))]
            given_masks = [opened.get(n) for n in names]
            block.forward = lambda x, b=block, m=given_masks: b.masked(x, m)
    return model


# --- which pixels a mask needs, by gradients ------------------------------------------------------


def needed_macs(branch: nn.Module, x: Tensor, mask: Tensor) -> dict[str, int]:
    """MACs of each layer of a branch at the pixels that open output pixels depend on.

    Gradients of a copy in which all weights are one and nothing but windows is left, so that
    nothing cancels.
    """
    ones = copy.deepcopy(branch).double()
    counts: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, module in list(ones.named_modules()):
        if isinstance(module, LAYERS):
            nn.init.ones_(module.weight)
            module.bias = None
            module.register_forward_hook(lambda m, _, y, n=name: counts.update({n: (m, y)}))
        elif name and (not any(True for _ in module.children()) or _is_pointwise(module)):
            if not any(part in type(module).__name__ for part in ("ToLast", "ToFirst")):
                parent, _, last = name.rpartition(".")
                setattr(ones.get_submodule(parent), last, nn.Identity())
    with torch.enable_grad():
        y = ones(torch.zeros(x.shape, dtype=torch.float64, requires_grad=True))
        outputs = [output for _, output in counts.values()]
        gradients = torch.autograd.grad((y * mask).sum(), outputs)
    total = {}
    for (name, (module, _)), gradient in zip(counts.items(), gradients, strict=True):
        channel = 1 if isinstance(module, nn.Conv2d) else 3
        total[name] = int((gradient != 0).any(channel).sum()) * module.weight.numel()
    return total


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, LayerScale | SqueezeExcite) or hasattr(module, "norm")


def expected_macs(case: Case, sites: pag.Plan, x: Tensor, opened: dict[str, Tensor]) -> int:
    """MACs of the gated network under masks, without looking at any cost model."""
    dense = layer_macs(case.model, x)
    total = sum(dense.values())
    alone = [site.name for site in sites.sites if site.kind == "branch" and site.add_index is None]
    inputs = branch_inputs(case.model, x, alone)
    for site in sites.sites:
        mask = opened[site.name]
        if site.kind == "conv":
            convs = [case.model.get_submodule(name) for name in site.layers]
            outputs, fan_in, *_ = convs[0].weight.shape
            bypass = outputs * fan_in if site.bypass == "collapsed" else 0
            total += mask.numel() * convs[0].in_channels - sum(dense[name] for name in site.layers)
            if site.bypass == "coarse":
                mask = mask.clone()
                mask[:, :, ::2, ::2] = 1
            weights = sum(conv.weight.numel() for conv in convs)
            total += int(mask.sum()) * weights + int((1 - mask).sum()) * bypass
            continue
        branch, entry = inputs[site.name]
        for name, macs in needed_macs(branch, entry, mask).items():
            total += macs - dense[f"{path_of(case.model, branch)}.{name}".removesuffix(".")]
        total += mask.numel() * entry.shape[1]
    return total


def branch_inputs(
    model: nn.Module, x: Tensor, alone: list[str]
) -> dict[str, tuple[nn.Module, Tensor]]:
    """Site name -> branch and what it reads, of every branch and of the modules named."""
    branches = {name: model.get_submodule(name) for name in alone}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            for index, branch in enumerate(block.branches()):
                branches.setdefault(name if index == 0 else f"{name}.add{index}", branch)
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    handles = [
        branch.register_forward_pre_hook(
            lambda m, a, s=site: found.update({s: (m, a[0].detach().clone())})
        )
        for site, branch in branches.items()
    ]
    with torch.no_grad():
        model(x.clone())
    for handle in handles:
        handle.remove()
    return found


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


# --- the properties -------------------------------------------------------------------------------


@torch.no_grad()
def open_gates_change_nothing(case: Case, mask: tuple[str, float, int]) -> None:
    """Bits, keys, the network passed; saving, loading, removing; gating twice is refused."""
    before = copy.deepcopy(case.model)
    gated = gate(case)
    if gated is None:
        return
    x = torch.randn(case.shape)
    expected = before(x.clone())
    assert torch.equal(gated(x.clone()), expected)
    assert torch.equal(case.model(x.clone()), expected)
    keys = [key for key in gated.state_dict() if ".pag_" not in f".{key}"]
    assert keys == list(before.state_dict()) == list(case.model.state_dict())
    assert types(case.model) == types(before)
    for again in (pag.retrofit, pag.plan):
        with pytest.raises(pag.PagError, match="gated already"):
            again(gated, 1.0, example_input=case.shape)
    pattern, density, seed = mask
    for parameter in pag.gate_parameters(gated):
        parameter.normal_()
    with tempfile.TemporaryDirectory() as folder:
        pag.save_file(gated, Path(folder) / "gated.safetensors")
        loaded = pag.load_file(Path(folder) / "gated.safetensors", model=case.model)
    assert torch.equal(loaded(x.clone()), gated(x.clone()))
    with pag.override_gates(loaded, density, pattern=pattern, seed=seed):
        masked = loaded(x.clone())
    with pag.override_gates(gated, density, pattern=pattern, seed=seed):
        assert torch.equal(gated(x.clone()), masked)
    pag.remove(gated)
    assert types(gated) == types(before)
    assert list(gated.state_dict()) == list(before.state_dict())
    assert torch.equal(gated(x.clone()), expected)


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@torch.no_grad()
def masks_mean_what_they_say(case: Case, mask: tuple[str, float, int]) -> None:
    """Outputs against the written-out masks, MACs against gradients, the plan against hooks."""
    gated, sites = gate(case), plan(case)
    plan_is_complete(case, sites)
    if gated is None:
        assert not sites.sites
        return
    x = torch.randn(case.shape)
    pattern, density, seed = mask
    with pag.override_gates(gated, density, pattern=pattern, seed=seed), pag.measure(gated) as m:
        y = gated(x.clone())
    opened = {name: value.float() for name, value in m.masks.items()}
    assert set(opened) == {site.name for site in sites.sites}
    assert torch.isfinite(y).all()
    if not any(site.bypass == "identity" for site in sites.sites):
        reference = masked_reference(case, sites, opened)(x.clone())
        torch.testing.assert_close(y, reference, atol=1e-4, rtol=1e-4)
    assert m.total_macs == sum(layer_macs(case.model, x).values())
    assert m.macs == expected_macs(case, sites, x, opened)
    assert m.compute_map.sum().item() == pytest.approx(m.macs, rel=1e-9)


def plan_is_complete(case: Case, sites: pag.Plan) -> None:
    """Every layer is gated or dense with a reason, once, and the MACs add up."""
    gated = [operation.name for site in sites.sites for operation in site.cost.operations]
    dense = [layer.name for layer in sites.dense]
    macs = layer_macs(case.model, torch.zeros(1, *case.shape[1:]))
    assert sorted(gated + dense) == sorted(macs)
    for layer in sites.dense:
        assert layer.reason.strip() and layer.macs == macs[layer.name]
    for site in sites.sites:
        assert site.macs == sum(macs[operation.name] for operation in site.cost.operations)
    assert sites.total_macs == sum(macs.values())


@torch.no_grad()
def masks_reach_their_dependents_only(case: Case, mask: tuple[str, float, int]) -> None:
    """What no closed pixel reaches keeps its bits.

    Reached is what turns into NaN in the original when closed pixels of the site are NaN.
    """
    sites = [site for site in plan(case).sites if site.pools == 0]
    if not sites:
        event("no site without a mean")
        return
    site = sites[mask[2] % len(sites)]
    gated = gate(case, include=(site.name,))
    assert gated is not None
    assert [name for name, _ in named_gates(gated)] == [site.name]
    x = torch.randn(case.shape)
    with pag.override_gates(gated, 0.97, seed=mask[2]), pag.measure(gated) as m:
        y = gated(x.clone())
    expected = case.model(x.clone())
    reached = poisoned(case.model, source_of(case.model, site), x, ~m.masks[site.name])
    event(f"clean pixels: {bool((~reached).any())}")
    assert torch.equal(y[~reached], expected[~reached])


def source_of(model: nn.Module, site: object) -> nn.Module:
    """The module whose output a site masks."""
    if site.kind == "conv" or site.add_index is None:  # type: ignore[attr-defined]
        return model.get_submodule(site.name)  # type: ignore[attr-defined]
    block = model.get_submodule(site.owner)  # type: ignore[attr-defined]
    assert isinstance(block, Block)
    return block.branches()[site.add_index]  # type: ignore[attr-defined]


def poisoned(model: nn.Module, source: nn.Module, x: Tensor, where: Tensor) -> Tensor:
    """Which outputs are NaN if those of one module are NaN at some pixels."""
    handle = source.register_forward_hook(lambda m, a, y: y.masked_fill(where, torch.nan))
    try:
        return model(x.clone()).isnan()
    finally:
        handle.remove()


def trains(case: Case) -> bool:
    """Whether autograd accepts what the network does in place."""
    original = copy.deepcopy(case.model).train()
    try:
        original(torch.randn(case.shape)).square().mean().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return False
    return True


def training_gives_finite_gradients(case: Case, mask: tuple[str, float, int]) -> None:
    """Random gates: every trainable parameter gets a finite gradient, unless it is frozen."""
    gated = gate(case)
    if gated is None:
        return
    if not trains(case):
        event("the original cannot be trained")
        return
    gated.train()
    with torch.no_grad():
        for parameter in pag.gate_parameters(gated):
            parameter.normal_()
    torch.manual_seed(mask[2])
    loss = gated(torch.randn(case.shape)).square().mean()
    (loss + pag.sparsity_loss(gated) + pag.sparsity_loss(gated, "layer")).backward()
    assert torch.isfinite(loss)
    for name, parameter in gated.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


PROPERTIES = (
    open_gates_change_nothing,
    masks_mean_what_they_say,
    masks_reach_their_dependents_only,
    training_gives_finite_gradients,
)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@given(case=cases(), mask=masks)
@settings(max_examples=25, derandomize=True, **SLOW)
def test_random_networks(check: Callable[..., None], case: Case, mask: tuple) -> None:
    check(case, mask)


@pytest.mark.sweep
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@given(case=cases(), mask=masks)
@settings(max_examples=150, derandomize=False, **SLOW)
def test_more_random_networks(check: Callable[..., None], case: Case, mask: tuple) -> None:
    check(case, mask)
