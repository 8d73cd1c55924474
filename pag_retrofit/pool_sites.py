"""Finding where each pixel can choose its pooling field: convolutions, and ASPP modules.

Like `sites`, on the exported graph alone. MultiPool convolutions are chosen by name; an atrous
spatial pyramid pooling (ASPP) is a concatenation of branches that all read one map, some of them
dilated and one a global mean, with a 1x1 projection after it.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import fx, nn

from pag_retrofit.config import MultiPoolConfig, RetrofitConfig
from pag_retrofit.cost import GatedOperation, SelectorSpec, SiteCost
from pag_retrofit.errors import PagError
from pag_retrofit.functional import Window, selector_window
from pag_retrofit.locality import (
    ACTIVATIONS,
    Node,
    NotPixelLocalError,
    check_same,
    conv_arguments,
    macs_per_pixel,
    node_window,
    operator_name,
    pad_before,
    padding_total,
)
from pag_retrofit.sites import Findings, Site, identity_owner
from pag_retrofit.tracing import NetworkGraph

_GLOBAL_MEANS = ("adaptive_avg_pool2d", "mean")
_WIDTHS = (32, 16, 8, 4)
_LARGEST_SHARE = 0.02
_ALL = 0  # index of the choice "all branches" of an ASPP


@dataclass(frozen=True)
class AsppBranch:
    """One pixel-local branch of an ASPP.

    Args:
        position: Among the inputs of the concatenation.
        norm: Path of the batch norm at its end if a ReLU follows it, else "".
        channels: Of its output.
    """

    position: int
    norm: str
    channels: int


@dataclass(frozen=True)
class AsppSite(Site):
    """An ASPP whose pixels choose one branch, or all.

    Args:
        branches: Pixel-local branches, in the order of the choices after "all".
        inputs: How many maps are concatenated.
    """

    branches: tuple[AsppBranch, ...] = ()
    inputs: int = 0

    @property
    def start(self) -> int:
        """Index of the choice that computes all branches."""
        return _ALL


@dataclass
class Pools:
    """What `find_pools` found.

    Args:
        windows: Name of each MultiPool convolution -> its window, which names its selector.
        sites: Sites of those convolutions, each as if it stood alone, and of ASPP modules.
    """

    windows: dict[str, Window] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    @property
    def covered(self) -> frozenset[str]:
        """Layers that ASPP sites hold."""
        return frozenset(
            layer for site in self.sites if site.kind == "aspp" for layer in site.layers
        )

    def complete(self, findings: Findings) -> None:
        """Add the sites to what `find_sites` found, and their costs to branches around them."""
        around = {layer: site for site in findings.sites for layer in site.layers}
        for site in self.sites:
            outer = around.get(site.name)
            if outer is not None:
                site = replace(site, inside=outer.name)
                if site.owner not in (outer.owner, site.name):  # one block cannot hold the other
                    site = collapsed(site)
            findings.sites.append(site)
            for layer in site.layers:
                findings.reasons.pop(layer, None)
        pooled = {site.name: site for site in findings.sites if site.inside}
        findings.sites = [_with_choices(site, pooled) for site in findings.sites]


def find_pools(
    model: nn.Module,
    network: NetworkGraph,
    config: RetrofitConfig,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Pools:
    """Find the convolutions and ASPP modules that `config.multipool` asks for.

    Args:
        model: The network.
        network: Its exported graph.
        config: What is asked for.
        refused: Owners whose blocks turned out not to be rewritable, with the reason.

    Raises:
        PagError: `torch.export` cannot follow the network.
        PagError: A pattern matches no convolution, or one that cannot be pooled.
        PagError: There is no ASPP, or nothing to pool by default.
    """
    pools = Pools()
    if config.multipool is not None:
        if network.failure:
            raise PagError(f"multipool: {network.failure}; retrofit it without multipool")
        finder = _PoolFinder(model, network, config, config.multipool, refused)
        for name in finder.chosen():
            window = finder.window(name)
            pools.windows[name] = window
            pools.sites.append(finder.conv_site(name, window))
        if config.multipool.aspp:
            pools.sites += finder.aspp_sites(taken=set(pools.windows))
    return pools


def collapsed(site: Site) -> Site:
    """The site of a MultiPool convolution whose identity is a 1x1 kernel, not its input."""
    operation, bypass = site.cost.operations[0], site.cost.added[0]
    window = site.window
    assert window is not None
    macs = operation.macs // (window.kernel[0] * window.kernel[1])
    cost = replace(site.cost, added=(replace(bypass, macs=macs),))
    return replace(site, owner=site.name, bypass="collapsed", cost=cost)


def _with_choices(site: Site, pooled: dict[str, Site]) -> Site:
    """Tell a branch's cost that pixels choose how some of its convolutions are computed.

    Inside a branch a selector, too, is only needed where its convolution is, and its first layer
    at the neighbours that its second one reads.
    """
    if site.kind != "branch" or not any(layer in pooled for layer in site.layers):
        return site
    operations, added = [], list(site.cost.added)
    for operation in site.cost.operations:
        inner = pooled.get(operation.name)
        if inner is None:
            operations.append(operation)
            continue
        assert inner.selector is not None
        own = inner.cost.operations[0]
        operations.append(replace(operation, selector=own.selector, branches=own.branches))
        added += [replace(extra, paths=operation.paths) for extra in inner.cost.added]
        widened = tuple((*path, selector_window((1, 1))) for path in operation.paths)
        added += [
            GatedOperation(inner.name, inner.selector.choose_macs, operation.paths),
            GatedOperation(inner.name, inner.selector.reduce_macs, widened),
        ]
    cost = replace(site.cost, operations=tuple(operations), added=tuple(added))
    return replace(site, cost=cost)


class _PoolFinder:
    def __init__(
        self,
        model: nn.Module,
        network: NetworkGraph,
        config: RetrofitConfig,
        multipool: MultiPoolConfig,
        refused: Mapping[str, str],
    ):
        self.network = network
        self.refused = refused
        self.config = config
        self.multipool = multipool
        self.modules = dict(model.named_modules(remove_duplicate=False))
        names = Counter(id(module) for module in self.modules.values())
        self.aliased = {path for path, module in self.modules.items() if names[id(module)] > 1}
        self.convolutions: dict[str, list[Node]] = {}
        for node in network.graph.nodes:
            if operator_name(node) == "conv2d":
                self.convolutions.setdefault(self._parameter_owner(node.args[1]), []).append(node)
        self.convolutions.pop("", None)
        encoder = isinstance(getattr(model, "encoder", None), nn.Module)
        self.prefix = "encoder." if encoder else ""

    # --- convolutions ---------------------------------------------------------------------

    def chosen(self) -> list[str]:
        """Names of the convolutions to pool, in the order of the forward pass."""
        patterns = self.multipool.sites
        if patterns is None:
            return self._last_stage()
        chosen = []
        for pattern in patterns:
            matched = fnmatch.filter(self.convolutions, pattern)
            if not matched:
                raise PagError(
                    f"multipool.sites has {pattern!r}: no convolution of the network matches; "
                    f"expected names such as {list(self.convolutions)[:5]}"
                )
            chosen += matched
        for name in chosen:
            problem = self._problem(name)
            if problem:
                raise PagError(
                    f"multipool.sites {list(patterns)}: {name} cannot be pooled, {problem}; "
                    "narrow the pattern"
                )
        return [name for name in self.convolutions if name in chosen]

    def _last_stage(self) -> list[str]:
        """Square convolutions with neighbours at the lowest resolution."""
        areas = {}
        for name, nodes in self.convolutions.items():
            shape = self.network.value(nodes[0]).shape
            kernel = conv_kernel(nodes[0])
            if name.startswith(self.prefix) and kernel[0] == kernel[1] and not self._problem(name):
                areas[name] = int(shape[2]) * int(shape[3])
        if not areas:
            raise PagError(
                "multipool: the network has no square convolution larger than 1x1 whose padding "
                "keeps the size; name others as multipool.sites, or use () for none"
            )
        return [name for name, area in areas.items() if area == min(areas.values())]

    def _problem(self, name: str) -> str:
        """Why a convolution cannot be pooled; "" if it can."""
        nodes, module = self.convolutions[name], self.modules[name]
        if conv_kernel(nodes[0]) == (1, 1):
            return "a 1x1 kernel has no neighbours to dilate"
        if type(module) is not nn.Conv2d:
            return f"{type(module).__name__} computes its own way"
        if len(nodes) > 1 or name in self.aliased:
            return "it is used more than once or has several names"
        try:
            if any(pad_before(nodes[0])):
                return "its padding is a layer of its own, which cannot follow the dilation"
            check_same(node_window(nodes[0]), padding_total(nodes[0]))
        except NotPixelLocalError as reason:
            return str(reason)
        return ""

    def window(self, name: str) -> Window:
        """Window of a convolution, with its selector."""
        window = node_window(self.convolutions[name][0])
        return window._replace(selector=name, factors=self.multipool.factors)

    def conv_site(self, name: str, window: Window) -> Site:
        """The site of a convolution that lies in no gated branch."""
        node = self.convolutions[name][0]
        shape = self.network.value(node.args[0]).shape
        factors, macs = self.multipool.factors, macs_per_pixel(node)
        closed = factors.index(0) if self.multipool.identity else factors.index(1)
        channels = int(shape[1])
        spec = SelectorSpec(
            channels,
            _width(channels, len(factors), macs),
            factors,
            start=factors.index(1),
            closed=closed,
            priced=tuple(k != closed or factor == 1 for k, factor in enumerate(factors)),
        )
        dilations = tuple(k for k, factor in enumerate(factors) if factor)
        owner = ""
        added: tuple[GatedOperation, ...] = ()
        if self.multipool.identity:
            excluded = self.aliased | self.refused.keys()
            owner = identity_owner(node, self.network, self.config, excluded)
            added = (GatedOperation(name, 0, selector=name, branches=(closed,)),)
        site = Site(
            name=name,
            kind="multipool",
            owner=owner or name,
            bypass="identity" if owner else "none",
            channels=channels,
            cost=SiteCost(
                (GatedOperation(name, macs, selector=name, branches=dilations),),
                gate_macs=spec.reduce_macs + spec.choose_macs,
                stride=window.stride,
                added=added,
                selector=name,
            ),
            input_size=(int(shape[2]), int(shape[3])),
            output_size=_size(node),
            layers=(name,),
            selector=spec,
            window=window,
        )
        return collapsed(site) if self.multipool.identity and not owner else site

    # --- ASPP -----------------------------------------------------------------------------

    def aspp_sites(self, taken: set[str]) -> list[AsppSite]:
        """All ASPP modules.

        Raises:
            PagError: There is none, one cannot be rewritten, or a convolution in one is pooled by
            itself.
        """
        sites = [site for node in self.network.graph.nodes for site in self._aspp_site(node)]
        if not sites:
            raise PagError(
                "multipool.aspp: the network has no concatenation of dilated convolutions and a "
                "global mean, followed by a 1x1 convolution, such as DeepLabV3 has"
            )
        for site in sites:
            if site.owner in self.refused:
                reason = self.refused[site.owner]
                raise PagError(f"multipool.aspp: {site.owner} cannot be rewritten: {reason}")
            if taken & set(site.layers):
                raise PagError(
                    f"multipool.sites: {sorted(taken & set(site.layers))} belong to the ASPP "
                    f"{site.name}, whose branches are chosen as a whole; leave them out"
                )
        return sites

    def _aspp_site(self, cat: Node) -> Iterator[AsppSite]:
        """The site whose branches a node concatenates, if they are those of an ASPP."""
        owner = self.network.owner(cat)
        projection = _only_user(cat)
        if operator_name(cat) != "cat" or not owner or owner in self.aliased:
            return
        if len(cat.args) < 2 or cat.args[1] not in (1, -3) or not self._projects(projection):
            return
        chains = [_chain(end) for end in cat.args[0]]
        entry = _common_start(chains)
        if entry is None or self._inside(entry, owner):
            return
        chains = [chain[: chain.index(entry)] for chain in chains]
        means = [any(operator_name(n) in _GLOBAL_MEANS for n in chain) for chain in chains]
        local = [k for k, mean in enumerate(means) if not mean]
        if sum(means) != 1 or not all(self._is_local(chains[k], cat, owner) for k in local):
            return
        rates = [_rate(chains[k]) for k in local]
        if len(set(rates)) < 3:
            return
        yield self._build_aspp(owner, entry, projection, [(k, chains[k]) for k in local], cat)

    def _build_aspp(
        self,
        name: str,
        entry: Node,
        projection: Node,
        chains: list[tuple[int, list[Node]]],
        cat: Node,
    ) -> AsppSite:
        shape = self.network.value(entry).shape
        width_out = int(self.network.value(projection).shape[1])
        layer = self._parameter_owner(projection.args[1])
        operations, branches = [], []
        for index, (position, chain) in enumerate(chains, 1):
            channels = int(self.network.value(chain[0]).shape[1])
            branches.append(AsppBranch(position, self._last_norm(chain), channels))
            costs = [
                (self._parameter_owner(node.args[1]), macs_per_pixel(node))
                for node in chain
                if operator_name(node) == "conv2d"
            ]
            for part, macs in (*costs, (layer, channels * width_out)):
                operations.append(GatedOperation(part, macs, selector=name, branches=(_ALL, index)))
        every = tuple(range(len(chains) + 1))
        rest = int(self.network.value(cat).shape[1]) - sum(b.channels for b in branches)
        operations.append(GatedOperation(layer, rest * width_out, selector=name, branches=every))
        single = [sum(o.macs for o in operations if index in o.branches) for index in every]
        channels = int(shape[1])
        spec = SelectorSpec(
            channels,
            _width(channels, len(every), single[_ALL]),
            factors=(-1, *(_rate(chain) for _, chain in chains)),
            start=_ALL,
            closed=single.index(min(single)),
            priced=tuple(index == _ALL for index in every),
        )
        return AsppSite(
            name=name,
            kind="aspp",
            owner=name,
            bypass="mean",
            channels=channels,
            cost=SiteCost(
                tuple(operations), gate_macs=spec.reduce_macs + spec.choose_macs, selector=name
            ),
            input_size=(int(shape[2]), int(shape[3])),
            output_size=_size(projection),
            layers=tuple(dict.fromkeys(operation.name for operation in operations)),
            selector=spec,
            branches=tuple(branches),
            inputs=len(cat.args[0]),
        )

    def _projects(self, node: Node | None) -> bool:
        """Tell whether a node is a 1x1 convolution of all channels."""
        if node is None or operator_name(node) != "conv2d" or not self._poolable(node):
            return False
        window = node_window(node)
        return (
            window.kernel == (1, 1)
            and window.stride == (1, 1)
            and conv_arguments(node)["groups"] == 1
        )

    def _poolable(self, node: Node) -> bool:
        name = self._parameter_owner(node.args[1])
        return name not in self.aliased and len(self.convolutions.get(name, ())) == 1

    def _is_local(self, chain: list[Node], cat: Node, owner: str) -> bool:
        """Tell whether only the concatenation reads a branch, and 3x3 windows come first."""
        users = (cat, *chain)
        for node, user in zip(chain, users, strict=False):
            if set(node.users) != {user} or not self._inside(node, owner):
                return False
            if operator_name(node) not in ACTIVATIONS | {"batch_norm", "conv2d"}:
                return False
        convolutions = [node for node in chain if operator_name(node) == "conv2d"]
        if not convolutions or not all(self._poolable(node) for node in convolutions):
            return False
        windows = [node_window(node) for node in convolutions]
        try:
            check_same(windows[-1], padding_total(convolutions[-1]))
        except NotPixelLocalError:
            return False
        # The chain runs backwards: a later window would need a halo of the earlier maps.
        return all(window.kernel == (1, 1) for window in windows[:-1]) and all(
            window.stride == (1, 1) for window in windows
        )

    def _last_norm(self, chain: list[Node]) -> str:
        if [operator_name(node).rstrip("_") for node in chain[:2]] != ["relu", "batch_norm"]:
            return ""
        return self._parameter_owner(chain[1].args[1])

    def _inside(self, node: Node, owner: str) -> bool:
        path = self.network.owner(node)
        return path == owner or path.startswith(f"{owner}.")

    def _parameter_owner(self, weight: object) -> str:
        """Path of the module whose `weight` a node is; "" if it is none's."""
        name = self.network.parameter_of.get(getattr(weight, "name", ""), "")
        return name.removesuffix(".weight") if name.endswith(".weight") else ""


def conv_kernel(node: Node) -> tuple[int, int]:
    """Size of the kernel of a conv2d node."""
    height, width = node.args[1].meta["val"].shape[2:]
    return int(height), int(width)


def _width(channels: int, branches: int, macs: int) -> int:
    """Hidden channels of a selector, as many as cost 2 % of what it chooses, 4 at least."""
    for width in _WIDTHS:
        if width * (channels + 9 * width + branches) <= _LARGEST_SHARE * macs:
            return width
    return _WIDTHS[-1]


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _size(node: Node) -> tuple[int, int]:
    height, width = node.meta["val"].shape[2:]
    return int(height), int(width)


def _chain(end: Node) -> list[Node]:
    """A node, the tensor it reads, the one that reads, ...: back to the input of the network."""
    chain = [end]
    while operator_name(chain[-1]) and chain[-1].args:
        source = chain[-1].args[0]
        if not isinstance(source, fx.Node):
            break
        chain.append(source)
    return chain


def _common_start(chains: list[list[Node]]) -> Node | None:
    """The last node that all chains go through, if none of them begins with it."""
    shared = set(chains[0]).intersection(*chains[1:])
    entry = next((node for node in chains[0] if node in shared), None)
    return None if any(chain[0] is entry for chain in chains) else entry


def _rate(chain: list[Node]) -> int:
    """Dilation of a branch; 0 if it has no kernel larger than 1x1."""
    windows = [node_window(node) for node in chain if operator_name(node) == "conv2d"]
    return max((w.dilation[0] for w in windows if w.kernel != (1, 1)), default=0)
