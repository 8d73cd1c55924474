"""The plan of a retrofit: what would be gated, what not and why, and which budgets are possible."""

from __future__ import annotations

import fnmatch
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pag_retrofit.config import RetrofitConfig
from pag_retrofit.errors import BudgetError, NoSitesError, PagError
from pag_retrofit.gates import (
    Gate,
    GatedModule,
    PixelGate,
    collapsed_kernel,
    gate_branch_end,
    gate_convolution,
    gate_separable,
)
from pag_retrofit.multipool import BranchSelector, MultiPoolConv2d, PoolSelector
from pag_retrofit.policies import GATES
from pag_retrofit.pool_rewriting import PoolRewriter
from pag_retrofit.pool_sites import find_pools
from pag_retrofit.rewriting import GatedBlock
from pag_retrofit.sites import Findings, Site, find_sites, is_patched
from pag_retrofit.tracing import (
    NetworkGraph,
    Observation,
    UntraceableError,
    example_tensor,
    export_network,
)

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseLayer:
    """A layer that no gate covers."""

    name: str
    kind: str
    macs: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a retrofit does to a network. MACs are per image at the example input.

    Args:
        network: Class of the network.
        budget: Compute fraction asked for, in (0, 1].
        input_shape: (B, C, H, W) of the example.
        total_macs: Of the original network.
        sites: In the order of the forward pass.
        dense: Layers that stay dense, with the reason.
    """

    network: str
    budget: float
    input_shape: tuple[int, ...]
    total_macs: int
    sites: tuple[Site, ...]
    dense: tuple[DenseLayer, ...]

    @property
    def gateable_share(self) -> float:
        """Fraction of the network's MACs inside sites."""
        return sum(site.macs for site in self._outermost) / self.total_macs

    @property
    def _outermost(self) -> list[Site]:
        """Sites whose MACs no other site counts."""
        return [site for site in self.sites if not site.inside]

    @property
    def gate_share(self) -> float:
        """MACs of all gates and selectors as a fraction of the network's."""
        return sum(site.gate_macs for site in self.sites) / self.total_macs

    @property
    def floor(self) -> float:
        """Smallest compute fraction: every pixel takes the cheapest way, gates are paid."""
        closed = sum(site.floor_macs for site in self._outermost)
        return 1 - self.gateable_share + closed / self.total_macs

    @property
    def rho(self) -> float:
        """Open rate that would meet the budget if all gates had the same and masks no halo."""
        span = 1 + self.gate_share - self.floor
        return min(1.0, max(0.0, self.budget - self.floor) / span) if span > 0 else 1.0

    def check_budget(self) -> None:
        """Refuse a budget that the network cannot reach.

        Raises:
            NoSitesError: There is no site at all.
            BudgetError: The budget is below the floor.
        """
        if not self.sites:
            reasons = (
                "; ".join(f"{d.name}: {d.reason}" for d in self.dense[:5]) or "it has no layers"
            )
            raise NoSitesError(
                f"{self.network} has nothing to gate ({reasons}). Expected residual branches or "
                "convolutions larger than 1x1; print plan(...) for every layer and its reason"
            )
        if self.budget < min(self.floor, 1.0):  # 1 asks for no saving, selectors may cost more
            raise BudgetError(
                f"budget={self.budget}: {self.network} cannot go below its floor of "
                f"{self.floor:.3f} of its MACs. {self._advice()}"
            )

    def _advice(self) -> str:
        """What would lower the floor most."""
        bypass = self.floor - (1 - self.gateable_share) - self.gate_share
        heaviest = sorted(self.dense, key=lambda layer: -layer.macs)[:3]
        dense = ", ".join(
            f"{d.name} ({d.macs / self.total_macs:.1%}: {d.reason})" for d in heaviest if d.macs
        )
        parts = [f"Ask for at least {self.floor + 0.01:.2f}"]
        if bypass > 0.02:
            parts.append(f"bypass='identity' saves up to {bypass:.1%}")
        if dense:
            parts.append(f"the heaviest dense layers are {dense}")
        return "; ".join(parts) + "."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "network": self.network,
            "budget": self.budget,
            "input_shape": list(self.input_shape),
            "total_macs": self.total_macs,
            "gateable_share": self.gateable_share,
            "gate_share": self.gate_share,
            "floor": self.floor,
            "rho": self.rho,
            "sites": [
                {
                    "name": site.name,
                    "kind": site.kind,
                    "macs": site.macs,
                    "share": site.macs / self.total_macs,
                    "halo": site.cost.halo,
                    "bypass": site.bypass,
                    "inside": site.inside,
                    "rho": self.rho,
                    "layers": list(site.layers),
                }
                for site in self.sites
            ],
            "dense": [
                {"name": d.name, "kind": d.kind, "macs": d.macs, "reason": d.reason}
                for d in self.dense
            ],
        }

    def _caption(self) -> str:
        if self.budget < self.floor:
            return f"budget {self.budget:g} is below the floor: it cannot be met"
        return f"budget {self.budget:g}: open rate {self.rho:.3f} in every gate would meet it"

    def table(self) -> Table:
        """Render as a rich table: sites first, then dense layers grouped by reason."""
        from rich.table import Table

        shape = "x".join(map(str, self.input_shape))
        table = Table(
            title=f"{self.network} at {shape}: {self.total_macs / 1e9:.3f} GMACs, "
            f"{self.gateable_share:.1%} gateable, floor {self.floor:.3f}",
            caption=self._caption(),
        )
        table.add_column("site", no_wrap=True)
        table.add_column("kind")
        for heading in ("MMACs", "share", "halo"):
            table.add_column(heading, justify="right")
        table.add_column("bypass, or why it stays dense")
        for site in self.sites:
            share = f"{site.macs / self.total_macs:.1%}"
            halo = str(site.cost.halo)
            bypass = f"{site.bypass}, counted in {site.inside}" if site.inside else site.bypass
            table.add_row(site.name, site.kind, f"{site.macs / 1e6:.1f}", share, halo, bypass)
        table.add_section()
        for reason, layers in _grouped(self.dense).items():
            macs = sum(layer.macs for layer in layers)
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            share = f"{macs / self.total_macs:.1%}"
            table.add_row(
                f"{layers[0].name}{more}", "dense", f"{macs / 1e6:.1f}", share, "", reason
            )
        return table

    def __str__(self) -> str:
        """Render the table as text."""
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def plan(
    model: nn.Module,
    budget: float = 0.9,
    *,
    example_input: Tensor | tuple[int, ...],
    config: RetrofitConfig | None = None,
) -> Plan:
    """Tell what `retrofit` would do with the same arguments, without touching the network.

    Args:
        model: A network that takes one image tensor.
        budget: Target compute fraction, in (0, 1]; it may lie below the floor here.
        example_input: Tensor (B, C, H, W), or its shape; MACs and shares hold for this size.
        config: What is gated and how; default `RetrofitConfig()`.

    Raises:
        BudgetError: The budget is not in (0, 1].
        PagError: The network is gated already, does not run on the example, or has no layers.
    """
    return Surgery(model, budget, example_input, config or RetrofitConfig()).plan


class Surgery:
    """A plan together with the rewritten modules that carry it out.

    Everything that can fail happens here; the network is not modified until `install`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float,
        example_input: Tensor | tuple[int, ...],
        config: RetrofitConfig,
    ):
        """Find the sites of a network and rewrite their blocks beside it."""
        _check_model(model, budget)
        if not isinstance(config, RetrofitConfig):
            raise PagError(
                f"config={config!r}: expected a RetrofitConfig, such as "
                "RetrofitConfig.from_dict() makes of a mapping"
            )
        self.model = model
        self.config = config
        self.example = example = example_tensor(model, example_input)
        network = export_network(model, example)
        self.modules = dict(model.named_modules())
        self.replacements: dict[str, nn.Module] = {}
        findings = self._rewrite(network)
        self._tell_patterns_without_sites(findings)
        dense = tuple(
            DenseLayer(name, layer.kind, layer.macs, findings.reasons[name])
            for name, layer in findings.layers.items()
            if name in findings.reasons
        )
        if network.total_macs == 0:
            raise NoSitesError(
                f"{type(model).__name__} has no convolution or linear layer: nothing to gate"
            )
        self.plan = Plan(
            type(model).__name__,
            budget,
            tuple(example.shape),
            network.total_macs,
            tuple(findings.sites),
            dense,
        )

    def _tell_patterns_without_sites(self, findings: Findings) -> None:
        names = {*self.modules, *(site.name for site in findings.sites)}
        for pattern in (*self.config.include, *self.config.exclude):
            if not fnmatch.filter(names, pattern):
                logger.warning(
                    "the pattern %r of include or exclude is the name of nothing in the network",
                    pattern,
                )

    def install(self) -> None:
        """Put the rewritten modules into the network, outer ones first.

        A rewritten block keeps children of its own: what lies inside it must be put into it.
        """
        paths = sorted(self.replacements, key=len)
        self._put({path: self.replacements[path] for path in paths})
        try:
            self._check_that_gates_are_called()
        except PagError:
            self._put({path: self.modules[path] for path in paths})
            raise

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, module)

    def _check_that_gates_are_called(self) -> None:
        """Run what was made.

        Raises:
            PagError: The network holds on to modules that were replaced.
        """
        observed = Observation(1)
        observed.run(self.model, self.example)
        forgotten = [
            module.site
            for path, module in self.model.named_modules()
            if isinstance(module, Gate) and path not in observed.constants
        ]
        if forgotten:
            raise PagError(
                f"{len(forgotten)} gates are never called, such as that of {forgotten[0]}: the "
                "network reaches what they are in by another way than its name, such as a Python "
                "list; hold it in an nn.ModuleList, or leave it dense: "
                f"RetrofitConfig(exclude={forgotten[:1]})"
            )

    def _rewrite(self, network: NetworkGraph) -> Findings:
        """Find sites and build all replacements.

        What turns out not to be rewritable is refused, and the sites are looked for again: the
        convolutions of a refused block may be sites of their own.
        """
        refused: dict[str, str] = {}
        while True:
            pools = find_pools(self.model, network, self.config, refused)
            findings = find_sites(
                self.model,
                network,
                self.config,
                refused,
                pooled=pools.windows,
                covered=pools.covered,
            )
            pools.complete(findings)
            self.replacements = {}
            refusals = self._replace_modules(findings) | self._replace_blocks(findings, network)
            if not refusals:
                return findings
            refused |= refusals

    def _replace_modules(self, findings: Findings) -> dict[str, str]:
        """Gate single modules; return those that refuse, with the reason."""
        refusals = {}
        for site in findings.sites:
            try:
                if site.kind == "multipool":
                    self.replacements[site.name] = self._multipool(site)
                elif site.is_one_module:
                    self.replacements[site.name] = self._gated_module(site)
            except UntraceableError as reason:
                refusals[site.name] = str(reason)
        return refusals

    def _gated_module(self, site: Site) -> nn.Module:
        module, gate = self.modules[site.name], self._gate(site)
        assert isinstance(gate, PixelGate)
        if site.kind == "branch":
            return gate_branch_end(module, gate)
        if not isinstance(module, nn.Conv2d):
            return gate_separable(module, gate)
        bypass = collapsed_kernel(module) if site.bypass == "collapsed" else None
        return gate_convolution(module, gate, bypass)

    def _multipool(self, site: Site) -> MultiPoolConv2d:
        """A convolution with branches; its block holds the selector if closed pixels bypass it."""
        conv, factors = self.modules[site.name], site.selector.factors if site.selector else ()
        assert isinstance(conv, nn.Conv2d) and self.config.multipool is not None
        if not site.is_one_module:
            factors = tuple(factor for factor in factors if factor)
        pooled = MultiPoolConv2d.from_conv(conv, factors, shared=self.config.multipool.shared)
        if site.is_one_module:
            pooled.add_module("pag_pool", self._gate(site))
        return pooled

    def _replace_blocks(self, findings: Findings, network: NetworkGraph) -> dict[str, str]:
        """Rewrite blocks, inner ones first; return those that refuse, with the reason."""
        blocks: dict[str, list[Site]] = defaultdict(list)
        for site in findings.sites:
            if not site.is_one_module:
                blocks[site.owner].append(site)
        layers = frozenset(name for name, layer in findings.layers.items() if layer.macs)
        constants = network.observed.constants
        refusals = {}
        for path, sites in sorted(blocks.items(), key=lambda item: -len(item[0])):
            try:
                self.replacements[path] = self._rewrite_block(
                    path, sites, layers, constants.get(path)
                )
            except UntraceableError as reason:
                logger.info("%s is not rewritten: %s", path, reason)
                refusals[path] = str(reason)
        return refusals

    def _rewrite_block(
        self,
        path: str,
        sites: list[Site],
        layers: frozenset[str],
        constants: dict[str, Any] | None,
    ) -> GatedBlock:
        """Rewrite a block, tracing through as little of it as its sites allow."""
        if constants is None:
            raise UntraceableError("it is not called, or with other arguments each time")
        if is_patched(self.modules[path]):
            raise UntraceableError("its own forward was replaced, as some hooks do")
        inner = frozenset(
            other.removeprefix(f"{path}.")
            for other in self.replacements
            if other.startswith(f"{path}.")
        )
        for opened in (_opened(path, sites), None):
            try:
                rewriter = PoolRewriter(self.modules[path], path, layers, opened, inner, constants)
                for site in sites:
                    rewriter.insert(site, self._gate(site))
                return rewriter.finish()
            except UntraceableError as error:
                reason = error
        raise reason

    def _gate(self, site: Site) -> Gate:
        probability = self.config.gate.initial_probability
        gate: Gate
        if site.selector is None:
            gate = GATES[self.config.policy](
                site.channels,
                site.cost,
                layout=site.layout,
                site=site.name,
                initial_probability=probability,
                dial=self.config.gate.dial,
                copy_input=site.overwritten,
            )
        else:
            kind = PoolSelector if site.kind == "multipool" else BranchSelector
            gate = kind(
                site.selector,
                site.cost,
                site=site.name,
                inside=site.inside,
                initial_probability=probability,
            )
        like = next(self.modules[site.owner].parameters(), None)
        if like is not None and like.is_floating_point():
            gate.to(like.device, like.dtype)
        return gate.train(self.modules[site.owner].training)


def _check_model(model: nn.Module, budget: float) -> None:
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise BudgetError(
            f"budget={budget!r}: expected a compute fraction in (0, 1], such as 0.9 for nine "
            "tenths of the original MACs"
        )
    if not isinstance(model, nn.Module):
        raise PagError(f"model={model!r}: expected a torch.nn.Module")
    if any(isinstance(m, Gate | GatedModule | GatedBlock) for m in model.modules()):
        raise PagError(
            f"{type(model).__name__} is gated already: use set_budget() for another budget, or "
            "remove() before retrofitting it anew"
        )


def _opened(path: str, sites: list[Site]) -> frozenset[str]:
    """Modules of a block that its sites make it necessary to trace through."""
    owners = {pool.owner for site in sites for pool in site.pools}
    owners |= {site.name.rpartition(".")[0] for site in sites if site.kind in ("conv", "multipool")}
    opened: set[str] = set()
    for owner in owners:
        parts = owner.removeprefix(path).removeprefix(".").split(".")
        opened.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return frozenset(opened)


def _grouped(layers: tuple[DenseLayer, ...]) -> Mapping[str, list[DenseLayer]]:
    groups: dict[str, list[DenseLayer]] = defaultdict(list)
    for layer in layers:
        groups[layer.reason].append(layer)
    return dict(sorted(groups.items(), key=lambda item: -sum(d.macs for d in item[1])))
