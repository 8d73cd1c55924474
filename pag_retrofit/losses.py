"""Sparsity losses: what pulls the expected compute towards the budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pag_retrofit.errors import PagError
from pag_retrofit.functional import bernoulli_kl
from pag_retrofit.gates import Gate, named_gates, state_of

KINDS = ("global", "layer")


def expected_fraction(gated: nn.Module) -> Tensor:
    """Compute fraction that the gates' probabilities of the last forward expect.

    Counts gates, selectors, bypasses and halos; a halo pixel is as probable as the most probable
    output pixel that needs it. Mean over the batch and, if `torch.distributed` is initialised,
    over all processes; the gradient is that of this process's share. After `budget_in_time` it is
    the fraction of the time.

    Raises:
        PagError: No forward pass in training mode came before.
    """
    return _average(_fraction(gated, dict(_observed(gated))))


@torch.no_grad()
def decided_fraction(gated: nn.Module) -> float:
    """Fraction if every pixel of the last forward did what is more probable.

    So gates decide in evaluation. Counts like `expected_fraction`.

    Raises:
        PagError: The last forward pass was not one in training mode.
    """
    decided = {gate: gate.decided(p) for gate, p in _observed(gated)}
    return float(_average(_fraction(gated, decided)))


def _fraction(gated: nn.Module, decisions: Mapping[Gate, Tensor]) -> Tensor:
    """Of the compute or the time under decisions, hard or soft."""
    state = state_of(gated)
    active: dict[str, Tensor] = {}
    full: dict[str, int] = {}
    by_site = {gate.site: decision for gate, decision in decisions.items()}
    for gate, decision in decisions.items():
        if gate.inside:  # counted by the branch that it lies in
            continue
        size, mask = gate.last_input_size, gate.site_mask(decision)
        height, width = mask.shape[2:]
        active[gate.site] = gate.cost.active_macs(mask, size, by_site).sum()
        full[gate.site] = mask.shape[0] * gate.cost.full_macs(size, (height, width))
    if state.times is not None:
        fraction: Tensor = state.times.fraction({s: active[s] / full[s] for s in active})
        return fraction
    computed = torch.stack(list(active.values())).sum() / sum(full.values())
    return 1 + (computed - 1) * state.gateable_share


def sparsity_loss(gated: nn.Module, kind: str = "global") -> Tensor:
    """Distance between expected and wanted compute; scalar, zero at the target.

    The target is `rho` of the network's state, which `Annealer` moves.

    Args:
        gated: A gated network after a forward pass in training mode.
        kind: `"global"`, one term on the compute fraction of the whole network, so that sites
            share the budget freely: ((fraction - rho) / (1 - floor))^2. `"layer"`, the paper's
            sum over gates of KL(Bernoulli(r) || Bernoulli(mean probability)) (Kong & Fowlkes,
            section 3), where r is the open rate that gives rho if all gates have it; a branch
            selector's is the rate of all but its cheapest branch. Where nothing can be saved
            (the floor is 1 or above) both are zero.

    Raises:
        PagError: The kind is unknown, or the last forward pass was not one in training mode.
    """
    if kind not in KINDS:
        raise PagError(f"kind={kind!r}: expected one of {KINDS}")
    state = state_of(gated)
    span = 1 - state.floor
    if span <= 0:
        return 0 * expected_fraction(gated)
    if kind == "global":
        return ((expected_fraction(gated) - state.rho) / span) ** 2
    rate = min((state.rho - state.floor) / (span + state.gate_share), 1.0)
    means = [
        _average(gate.opened(probability).mean())
        for gate, probability in _observed(gated)
        if not gate.inside
    ]
    return torch.stack([bernoulli_kl(rate, mean) for mean in means]).sum()


def _observed(gated: nn.Module) -> list[tuple[Gate, Tensor]]:
    """Gates and selectors with their probabilities in the last forward."""
    gates = [
        (gate, gate.last_probability)
        for _, gate in named_gates(gated)
        if gate.last_probability is not None
    ]
    if not any(gate.last_in_training for gate, _ in gates):
        raise PagError(
            "no gate took part in the last forward pass in training mode: call gated.train() and "
            "run a batch before asking for its sparsity loss"
        )
    return gates


def _average(value: Tensor) -> Tensor:
    """Average over processes; the gradient stays local, as DistributedDataParallel expects."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    mean = value.detach().clone()
    torch.distributed.all_reduce(mean)
    return value + (mean / torch.distributed.get_world_size() - value.detach())
