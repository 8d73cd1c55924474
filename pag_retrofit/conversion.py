"""Conversions around MultiPool: an ASPP to one branch per pixel, and the averaged baseline."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from pag_retrofit.config import MultiPoolConfig, RetrofitConfig
from pag_retrofit.errors import PagError
from pag_retrofit.multipool import AveragedConv2d
from pag_retrofit.planning import Plan, plan
from pag_retrofit.pool_sites import AsppSite, find_pools
from pag_retrofit.surgery import retrofit
from pag_retrofit.tracing import example_tensor, export_network


def convert_aspp(
    model: nn.Module,
    budget: float | None = None,
    *,
    example_input: Tensor | tuple[int, ...],
    config: RetrofitConfig | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Let each pixel choose one branch of an atrous spatial pyramid pooling (ASPP).

    A pixel has one more choice, all branches, and makes it until it is trained to do otherwise:
    the network starts bit-identical, and the sparsity loss drives pixels to one branch each. Where
    a branch is not computed, a trainable constant stands for it, which starts at the branch's
    expected output (`BranchFill`) and costs the projection after the concatenation nothing. The
    image pooling branch is computed as before. The result is a gated network like any other:
    `sparsity_loss`, `Annealer`, `calibrate`, `measure`, `save_file` and `remove` work on it.

    Args:
        model: A network with an ASPP, such as SMP's DeepLabV3 and DeepLabV3Plus.
        budget: Target compute fraction; default that of one branch per pixel, the most expensive
            one at that, with all gates open.
        example_input: Tensor (B, C, H, W), or its shape.
        config: What else is gated; default nothing.
        inplace: Modify `model` itself instead of a deep copy.

    Returns:
        The gated network.

    Raises:
        BudgetError: The budget is not in (0, 1], or below the floor.
        PagError: The network has no ASPP, is gated already, or does not run on the example.
    """
    config = config or RetrofitConfig(include=())
    multipool = replace(config.multipool or MultiPoolConfig(sites=()), aspp=True)
    config = replace(config, multipool=multipool)
    if budget is None:
        found = plan(model, 1.0, example_input=example_input, config=config)
        budget = min(1.0, _one_branch_each(found))
    return retrofit(model, budget, example_input=example_input, config=config, inplace=inplace)


def _one_branch_each(found: Plan) -> float:
    """Compute fraction if all gates are open and each pixel takes its most expensive branch."""
    saved = 0
    for site in found.sites:
        if isinstance(site, AsppSite):
            costs = site.cost.branch_costs()
            dearest = max(macs for branch, macs in costs.items() if branch != site.start)
            saved += (costs[site.start] - dearest) * site.input_size[0] * site.input_size[1]
    return 1 + found.gate_share - saved / found.total_macs


def average_branches(
    model: nn.Module,
    *,
    example_input: Tensor | tuple[int, ...],
    config: MultiPoolConfig | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Average all dilations at every pixel: the baseline that MultiPool is compared with.

    Costs as many times the compute as there are dilations. It is an ungated network, to be
    trained as any other, whose outputs differ from the original's from the start. The attribute
    `pag_compute_fraction` of the result holds its MACs over those of the original network.

    Args:
        model: A network that takes one image tensor.
        example_input: Tensor (B, C, H, W), or its shape.
        config: Which convolutions and dilations, and whether they share weights; the identity,
            which is there to save compute, and ASPP modules take no part.
        inplace: Modify `model` itself instead of a deep copy.

    Raises:
        PagError: A pattern of `config.sites` does not fit, nothing is left to average, or the
            network is gated or averaged already.
    """
    config = replace(config or MultiPoolConfig(), identity=False, aspp=False)
    if any(isinstance(module, AveragedConv2d) for module in model.modules()) or hasattr(
        model, "pag_state"
    ):
        raise PagError(f"{type(model).__name__} is gated or averaged already: pass the original")
    target = model if inplace else copy.deepcopy(model)
    example = example_tensor(target, example_input)
    network = export_network(target, example)
    sites = find_pools(target, network, RetrofitConfig(multipool=config)).sites
    if not sites:
        raise PagError("multipool.sites is empty: expected a convolution whose branches to average")
    for site in sites:
        conv = target.get_submodule(site.name)
        assert isinstance(conv, nn.Conv2d)
        parent, _, name = site.name.rpartition(".")
        averaged = AveragedConv2d.from_conv(conv, config.dilations, shared=config.shared)
        setattr(target.get_submodule(parent), name, averaged)
    more = sum(site.macs for site in sites) * (len(config.dilations) - 1)
    target.__dict__["pag_compute_fraction"] = 1 + more / network.total_macs
    return target
