"""The two verbs of surgery: put gates into a network, and take them out again."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from pag_retrofit.config import RetrofitConfig
from pag_retrofit.errors import PagError
from pag_retrofit.gates import (
    GatedModule,
    RetrofitState,
    forget_last_pass,
    named_gates,
    not_deployed,
)
from pag_retrofit.multipool import MultiPoolConv2d
from pag_retrofit.planning import Surgery
from pag_retrofit.policies import FixedGate, truncated
from pag_retrofit.rewriting import GatedBlock


def retrofit(
    model: nn.Module,
    budget: float = 0.9,
    *,
    example_input: Tensor | tuple[int, ...],
    config: RetrofitConfig | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Gate a network: each pixel will decide at each site whether to compute.

    In evaluation mode the result gives bit-identical outputs until it is trained (but with policies
    that close pixels without looking at them, see `RetrofitConfig.policy`). It is an
    instance of the network's own class with all its state-dict keys; gates add keys whose last
    part but one, or last part, starts with `pag_`.

    Args:
        model: A network that takes one image tensor.
        budget: Target compute fraction, in (0, 1]: expected MACs of the gated network over those
            of the original one; gates, bypasses and halos count.
        example_input: Tensor (B, C, H, W) in the range of the network, or its shape. Shares of
            MACs are taken at this size; the gated network accepts others.
        config: What is gated and how; default `RetrofitConfig()`.
        inplace: Modify `model` itself instead of a deep copy. A call that raises leaves it as it
            was either way.

    Returns:
        The gated network.

    Raises:
        BudgetError: The budget is not in (0, 1], or below the floor.
        NoSitesError: Nothing in the network can be gated.
        PagError: The network is gated already, or does not run on the example.
    """
    config = RetrofitConfig() if config is None else config
    target = model if inplace or not isinstance(model, nn.Module) else _copy(model)
    surgery = Surgery(target, budget, example_input, config)
    plan = surgery.plan
    plan.check_budget()
    surgery.install()
    if config.policy == "truncation":
        dropped = set(truncated(plan.sites, plan.total_macs, budget))
        for name, gate in named_gates(target):
            if isinstance(gate, FixedGate):
                gate.kept.fill_(name not in dropped)
    target.pag_state = RetrofitState(  # type: ignore[assignment]
        config=config,
        budget=float(budget),
        example_shape=plan.input_shape,
        total_macs=plan.total_macs,
        gateable_share=plan.gateable_share,
        gate_share=plan.gate_share,
        floor=plan.floor,
    )
    target.register_forward_pre_hook(forget_last_pass)
    return target


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise PagError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pass "
            "inplace=True to gate the network itself"
        ) from error


def remove(gated: nn.Module) -> nn.Module:
    """Take the gates out of a network, in place; its other weights stay as they are now.

    Args:
        gated: A network that `retrofit` or `load_file` returned.

    Returns:
        The same object, with the modules and state-dict keys of the original.

    Raises:
        PagError: The network is not gated, or deployed.
    """
    not_deployed(gated, "ungated")
    for kind in (GatedBlock, GatedModule, MultiPoolConv2d):  # blocks may hold the others
        for path, module in list(gated.named_modules()):
            if isinstance(module, kind):
                parent, _, name = path.rpartition(".")
                setattr(gated.get_submodule(parent), name, module.ungated())
    for key, hook in list(gated._forward_pre_hooks.items()):
        if hook is forget_last_pass:
            del gated._forward_pre_hooks[key]
    del gated.pag_state
    return gated
