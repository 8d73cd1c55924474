"""Finding sites: which parts of a network can be computed pixel by pixel on demand.

Works on the exported graph (operators, shapes, owners), so it knows no class names of networks.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import fx, nn

from pag_retrofit.config import RetrofitConfig
from pag_retrofit.cost import GatedOperation, SelectorSpec, SiteCost
from pag_retrofit.functional import POINTWISE, Window
from pag_retrofit.locality import (
    ACTIVATIONS,
    LAYERS,
    VIEWS,
    ZERO_PRESERVING,
    BranchAnalysis,
    Node,
    NotPixelLocalError,
    Pool,
    check_same,
    conv_arguments,
    macs_per_pixel,
    node_macs,
    node_window,
    operator_name,
    padding_total,
    pair,
)
from pag_retrofit.tracing import LAYER_TYPES, ConvCall, NetworkGraph, ancestors

LAYOUTS = ("BCHW", "BHWC", "BNC")


@dataclass(frozen=True)
class Site:
    """A place whose per-pixel compute can be gated.

    Args:
        name: Path of the block (branch) or of the module.
        kind: `"branch"`, `"conv"` (also a depthwise one with the 1x1 behind it), `"multipool"` or
            `"aspp"`.
        owner: Path of the module that is rewritten.
        bypass: What closed pixels get: `"shortcut"`, `"identity"`, `"collapsed"`, `"coarse"`.
        channels: Of the gate's input.
        cost: Model of its MACs.
        input_size: (H, W) of the gate's input, at the example input; (N, 1) for tokens.
        output_size: (h, w) of its mask.
        maps: Of that size per image; more than one for windows of a transformer.
        layout: Axes of the gate's input.
        add_index: Branch: which of the owner's own additions joins it to the shortcut; None if
            the module `name` alone is rewritten, whose output reaches the addition unchanged.
        operand: Branch: which side of that addition it is.
        pools: Branch: reductions inside it that go over gated pixels.
        layers: Every convolution and linear layer inside, per-image ones included.
        selector: MultiPool, ASPP: shape of the selector.
        window: MultiPool: of the convolution.
        inside: MultiPool: the branch site that it lies in and that counts its MACs, if one does.
        overwritten: Branch: its input is changed in place once the gate has read it.
    """

    name: str
    kind: str
    owner: str
    bypass: str
    channels: int
    cost: SiteCost
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    maps: int = 1
    layout: str = "BCHW"
    add_index: int | None = None
    operand: int = 0
    pools: tuple[Pool, ...] = ()
    layers: tuple[str, ...] = ()
    selector: SelectorSpec | None = None
    window: Window | None = None
    inside: str = ""
    overwritten: bool = False

    @property
    def is_one_module(self) -> bool:
        """Whether the module `name` is replaced as a whole, and no block around it rewritten."""
        if self.kind == "branch":
            return self.add_index is None
        return self.kind != "aspp" and self.owner == self.name

    @property
    def macs(self) -> int:
        """MACs of the gated operations in the original network, per image at the example."""
        return self.maps * self.cost.full_macs(self.input_size, self.output_size)

    @property
    def gate_macs(self) -> int:
        """MACs of the gate, per image at the example."""
        return self.maps * self.cost.gate_macs_total(self.output_size)

    @property
    def floor_macs(self) -> int:
        """MACs with every pixel closed, per image at the example."""
        return self.maps * self.cost.floor_macs(self.output_size)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as the forward pass uses it."""

    name: str
    kind: str
    macs: int


@dataclass
class Findings:
    """All layers of a network, the sites among them, and why the others stay dense."""

    layers: dict[str, Layer] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def find_sites(
    model: nn.Module,
    network: NetworkGraph,
    config: RetrofitConfig,
    refused: Mapping[str, str],
    *,
    pooled: Mapping[str, Window] = MappingProxyType({}),
    covered: Collection[str] = (),
) -> Findings:
    """List every layer of a network, and the sites that a configuration asks for.

    A layer that no site covers has an entry in `reasons`.

    Args:
        model: The network.
        network: Its exported graph.
        config: What is asked for.
        refused: Owners whose blocks turned out not to be rewritable, with the reason.
        pooled: MultiPool convolution -> window; such a one gets no site here, yet branches may
            hold it.
        covered: Layers that other sites hold.
    """
    finder = _Finder(model, network, config, refused)
    finder.pooled = pooled
    finder.covered.update(covered)
    return finder.run()


class _Finder:
    def __init__(
        self,
        model: nn.Module,
        network: NetworkGraph,
        config: RetrofitConfig,
        refused: Mapping[str, str],
    ):
        self.network = network
        self.config = config
        self.refused = refused
        self.modules = dict(model.named_modules(remove_duplicate=False))
        names = Counter(id(module) for module in self.modules.values())
        self.aliased = {path for path, module in self.modules.items() if names[id(module)] > 1}
        self.nodes = list(network.graph.nodes)
        self.ancestors = ancestors(network.graph)
        self.owned: dict[str, set[Node]] = defaultdict(set)
        self.layer_of: dict[Node, str] = {}
        self.calls: Counter[str] = Counter()
        self.covered: set[str] = set()
        self.per_image: set[str] = set()
        self.pooled: Mapping[str, Window] = {}
        self.found = Findings()

    def run(self) -> Findings:
        self._list_layers()
        if self.config.scope == "branch":
            self._find_branches()
            self._find_separable()
        self._find_convolutions()
        for name in self.found.layers:
            if name not in self.covered:
                self.found.reasons.setdefault(name, "not inside a site")
        return self.found

    # --- layers ---------------------------------------------------------------------------

    def _list_layers(self) -> None:
        for node in self.nodes:
            if node.op == "call_function":
                for path in _prefixes(self.network.owner(node)):
                    self.owned[path].add(node)
            if operator_name(node) in LAYERS:
                self._list_layer(node)
        counted: set[nn.Module] = set()
        for name, module in self.modules.items():
            if isinstance(module, LAYER_TYPES) and name not in self.found.layers:
                known = self.network.failure and module not in counted
                macs = self.network.observed.layer_macs.get(name, 0) if known else 0
                counted.add(module)
                self.found.layers[name] = Layer(name, type(module).__name__.lower(), macs)
                unused = "the forward pass does not use it"
                self.found.reasons[name] = self.network.failure if macs else unused

    def _list_layer(self, node: Node) -> None:
        name = self._layer_name(node)
        self.layer_of[node] = name
        self.calls[name] += 1
        earlier = self.found.layers.get(name)
        macs = node_macs(node) // self.network.observed.images + (earlier.macs if earlier else 0)
        self.found.layers[name] = Layer(name, operator_name(node), macs)
        if name not in self.modules:
            self.found.reasons[name] = "its weight belongs to no layer"

    def _layer_name(self, node: Node) -> str:
        """Path of the layer; of the weight, or the node's name, where no layer computes it."""
        weight = self.network.parameter_of.get(node.args[1].name, "")
        owner = self.network.owner(node)
        for path in (owner, weight.removesuffix(".weight")):
            if isinstance(self.modules.get(path), LAYER_TYPES):
                return path
        return weight or node.name

    # --- residual branches ----------------------------------------------------------------

    def _find_branches(self) -> None:
        seen: Counter[str] = Counter()
        for node in self.nodes:
            operands = _added_tensors(node)
            if operands is None:
                continue
            owner = self.network.owner(node)
            self._try_add(node, operands, owner, seen[owner])
            seen[owner] += 1

    def _try_add(self, add: Node, operands: tuple[Node, Node], owner: str, index: int) -> None:
        """Accept the heavier side of an addition as a branch, or its end, or note why not."""
        sides = []
        for side in (0, 1):
            inside = self._exclusive(operands[side], operands[1 - side])
            macs = sum(node_macs(node) for node in inside)
            if macs and all(self._is_inside(node, owner) for node in inside):
                sides.append((macs, side, inside))
        if not sides:
            return
        macs, side, inside = max(sides, key=lambda item: item[0])
        key = (owner if index == 0 else f"{owner}.add{index}", owner, index, side)
        try:
            site = self._branch_site(add, operands[side], inside, key)
        except NotPixelLocalError as reason:
            for node in inside:
                if node in self.layer_of and self.layer_of[node] not in self.covered:
                    self.found.reasons[self.layer_of[node]] = (
                        f"residual branch of {owner or 'the network'}: {reason}"
                    )
            wrapped = self._branch_end_site(operands[side], inside, owner)
            if wrapped is None:
                return
            site = wrapped
        self.found.sites.append(site)
        self.covered.update(operation.name for operation in site.cost.operations)
        for layer in self.covered:
            self.found.reasons.pop(layer, None)
        for layer in set(site.layers) - self.covered:
            self.per_image.add(layer)
            self.found.reasons[layer] = f"computed once per image, inside the branch {site.name}"

    def _branch_site(
        self, add: Node, end: Node, inside: list[Node], key: tuple[str, str, int, int]
    ) -> Site:
        name, owner, index, side = key
        if not owner:
            raise NotPixelLocalError("the addition is in the forward of the network itself")
        if owner in self.aliased:
            raise NotPixelLocalError(f"{owner} has several names in the network")
        if owner in self.refused:
            raise NotPixelLocalError(self.refused[owner])
        entry = _entry(end, inside, {add}, self.network)
        return self._pixel_local_site(name, owner, entry, end, inside, (index, side))

    def _branch_end_site(self, end: Node, inside: list[Node], owner: str) -> Site | None:
        """The heaviest module whose masked output reaches the addition as it is, if any."""
        members = set(inside)
        paths = {p for n in inside if node_macs(n) for p in _prefixes(self.network.owner(n))}
        for path in sorted(paths, key=lambda p: -sum(node_macs(n) for n in self.owned[p])):
            if not path or path in self.aliased or path in self.refused:
                continue
            if path not in self.network.observed.maps or is_patched(self.modules[path]):
                continue
            nodes = self.owned[path]
            if not nodes <= members or path == owner:
                continue
            ordered = [node for node in inside if node in nodes]
            try:
                if not _reaches(ordered[-1], end):
                    continue
                readers = set(ordered[-1].users)
                entry = _entry(ordered[-1], ordered, readers, self.network)
                return self._pixel_local_site(path, path, entry, ordered[-1], ordered, None)
            except NotPixelLocalError:
                continue
        return None

    def _pixel_local_site(
        self,
        name: str,
        owner: str,
        entry: Node,
        end: Node,
        inside: list[Node],
        place: tuple[int, int] | None,
    ) -> Site:
        self._check_wanted(name)
        layers = [self.layer_of[node] for node in inside if node_macs(node)]
        for layer in layers:
            if layer in self.covered:
                raise NotPixelLocalError("it holds another site")
            if self.calls[layer] > 1:
                raise NotPixelLocalError(f"{layer} is used more than once")
        analysis, operations = self._analyse(entry, end, inside)
        if place is None and analysis.pools:
            raise NotPixelLocalError("it pools over its pixels")
        shape = tuple(int(n) for n in self.network.value(entry).shape)
        channels = shape[analysis.layout.index("C")]
        cost = SiteCost(
            tuple(
                GatedOperation(self.layer_of[node], macs_per_pixel(node), paths)
                for node, paths in operations
            ),
            gate_macs=channels if self.config.policy == "pixel" else 0,
            stride=analysis.stride,
        )
        if not operations:
            raise NotPixelLocalError("nothing in it is computed per pixel")
        sizes = [
            _map_size(self.network.value(node).shape, analysis.layout) for node in (entry, end)
        ]
        site = Site(
            name=name,
            kind="branch",
            owner=owner,
            bypass="shortcut",
            channels=channels,
            cost=cost,
            input_size=sizes[0],
            output_size=sizes[1],
            maps=max(shape[0] // self.network.observed.images, 1),
            layout=analysis.layout,
            add_index=place[0] if place else None,
            operand=place[1] if place else 0,
            pools=tuple(analysis.pools),
            layers=tuple(layers),
            overwritten=self._is_overwritten(entry, owner),
        )
        self._check_worth(site)
        return site

    def _is_overwritten(self, entry: Node, owner: str) -> bool:
        """Tell whether the site changes what its gate reads.

        In the exported graph the result of an operator that works in place stands for its input
        from then on; in the block's own graph the gate may come before that operator.
        """
        own = f"{self.network.owner(entry)}.".startswith(f"{owner}.")
        return _is_overwritten(entry) or (own and operator_name(entry).endswith("_"))

    def _analyse(
        self, entry: Node, end: Node, inside: list[Node]
    ) -> tuple[BranchAnalysis, list[tuple[Node, tuple]]]:
        """Analyse a branch in the first layout that explains it."""
        rank = len(self.network.value(entry).shape)
        layouts = [layout for layout in LAYOUTS if len(layout) == rank]
        if not layouts:
            raise NotPixelLocalError(f"its input has {rank} axes: neither a map nor tokens")
        names = {node: self.layer_of.get(node, "") for node in inside}
        choosing = {n: self.pooled[name] for n, name in names.items() if name in self.pooled}
        furthest: tuple[int, NotPixelLocalError] | None = None
        for layout in layouts:
            analysis = BranchAnalysis(self.network, set(inside), entry, end, layout, choosing)
            try:
                return analysis, analysis.run()
            except NotPixelLocalError as reason:
                if furthest is None or len(analysis.axes) > furthest[0]:
                    furthest = len(analysis.axes), reason
        assert furthest is not None
        raise furthest[1]

    def _exclusive(self, branch: Node, shortcut: Node) -> list[Node]:
        """Nodes that only one side of an addition depends on, in the order of the graph."""
        bits = self.ancestors[branch] & ~self.ancestors[shortcut]
        return [
            node
            for position, node in enumerate(self.nodes)
            if bits >> position & 1 and node.op == "call_function"
        ]

    def _is_inside(self, node: Node, owner: str) -> bool:
        path = self.network.owner(node)
        return not owner or path == owner or path.startswith(owner + ".")

    # --- separable convolutions -----------------------------------------------------------

    def _find_separable(self) -> None:
        """Modules that are a depthwise convolution and a 1x1 behind it.

        A gate of the 1x1 alone would read what the depthwise one makes, and so all of it.
        """
        for node in list(self.layer_of):
            before = node.args[0]
            try:
                if before not in self.layer_of or not _is_separable(before, node):
                    continue
                site = self._separable_site(before, node)
            except NotPixelLocalError:
                continue  # the 1x1 may be a site by itself
            self.found.sites.append(site)
            self.covered.update(site.layers)
            for layer in site.layers:
                self.found.reasons.pop(layer, None)

    def _separable_site(self, depthwise: Node, pointwise: Node) -> Site:
        layers = self.layer_of[depthwise], self.layer_of[pointwise]
        name = _common_parent(list(layers))
        calls = [self.network.observed.calls.get(layer) for layer in layers]
        alone = self.owned[name] == {depthwise, pointwise}
        if not (name and alone and name in self.network.observed.maps):
            raise NotPixelLocalError("no module holds the two, and nothing else")
        if any(layer in self.covered | self.per_image | self.pooled.keys() for layer in layers):
            raise NotPixelLocalError("another site holds one of them")
        if not all(call is not None and call.times == 1 for call in calls):
            raise NotPixelLocalError("it is used more than once")
        for path in (name, *layers):
            if path in self.aliased or path in self.refused or is_patched(self.modules[path]):
                raise NotPixelLocalError(f"{path} cannot be replaced")
        self._check_wanted(name)
        check_same(node_window(depthwise), padding_total(depthwise))
        conv, call = self.modules[layers[0]], calls[0]
        assert isinstance(conv, nn.Conv2d) and call is not None
        cost = SiteCost(
            tuple(
                GatedOperation(layer, macs_per_pixel(node))
                for layer, node in zip(layers, (depthwise, pointwise), strict=True)
            ),
            gate_macs=conv.in_channels if self.config.policy == "pixel" else 0,
            stride=pair(conv.stride),
            coarse=True,
        )
        site = Site(
            name=name,
            kind="conv",
            owner=name,
            bypass="coarse",
            channels=conv.in_channels,
            cost=cost,
            input_size=call.input_size,
            output_size=call.output_size,
            maps=max(call.maps // self.network.observed.images, 1),
            layers=layers,
        )
        self._check_worth(site)
        return site

    # --- single convolutions --------------------------------------------------------------

    def _find_convolutions(self) -> None:
        node_of = {name: node for node, name in self.layer_of.items()}
        for name, layer in self.found.layers.items():
            if name in self.covered | self.per_image | self.pooled.keys() or not layer.macs:
                continue
            call = self.network.observed.calls.get(name)
            if call is None:
                kind = layer.kind.replace("_", " ")
                self.found.reasons.setdefault(name, f"a {kind} layer outside a residual branch")
                continue
            try:
                site = self._conv_site(name, call, node_of.get(name))
            except NotPixelLocalError as reason:
                text = str(reason)
                earlier = self.found.reasons.get(name)
                self.found.reasons[name] = f"{earlier}; alone: {text}" if earlier else text
                continue
            self.found.reasons.pop(name, None)
            self.found.sites.append(site)
            self.covered.add(name)

    def _conv_site(self, name: str, call: ConvCall, node: Node | None) -> Site:
        conv = self.modules[name]
        assert isinstance(conv, nn.Conv2d)
        taps = math.prod(conv.kernel_size)
        if taps == 1 and self.config.scope == "conv":
            raise NotPixelLocalError("scope='conv' gates convolutions larger than 1x1")
        if call.times > 1:
            raise NotPixelLocalError("it is used more than once")
        if name in self.aliased:
            raise NotPixelLocalError("it has several names in the network")
        if name in self.refused:
            raise NotPixelLocalError(self.refused[name])
        if is_patched(conv):
            raise NotPixelLocalError("its own forward was replaced, as some hooks do")
        self._check_wanted(name)
        offset = _centre_offset(conv, call)
        excluded = self.aliased | self.refused.keys()
        owner = "" if node is None else identity_owner(node, self.network, self.config, excluded)
        collapsible = taps > 1 and self._collapses
        bypass = "identity" if owner else "collapsed" if collapsible else "coarse"
        macs = math.prod(conv.weight.shape)
        cost = SiteCost(
            (GatedOperation(name, macs),),
            gate_macs=conv.in_channels if self.config.policy == "pixel" else 0,
            bypass_macs=macs // taps if bypass == "collapsed" else 0,
            stride=pair(conv.stride),
            offset=offset,
            coarse=bypass == "coarse",
        )
        site = Site(
            name=name,
            kind="conv",
            owner=owner or name,
            bypass=bypass,
            channels=conv.in_channels,
            cost=cost,
            input_size=call.input_size,
            output_size=call.output_size,
            maps=max(call.maps // self.network.observed.images, 1),
            layers=(name,),
        )
        self._check_worth(site)
        return site

    @property
    def _collapses(self) -> bool:
        """Whether convolutions larger than 1x1 are collapsed; truncation can do nothing else."""
        return self.config.bypass != "coarse" or self.config.policy == "truncation"

    # --- checks ---------------------------------------------------------------------------

    def _check_wanted(self, name: str) -> None:
        included = any(fnmatch.fnmatchcase(name, p) for p in self.config.include)
        if not included or any(fnmatch.fnmatchcase(name, p) for p in self.config.exclude):
            raise NotPixelLocalError("left out by include/exclude")

    def _check_worth(self, site: Site) -> None:
        share = site.macs / max(self.network.total_macs, 1)
        if share < self.config.min_share:
            raise NotPixelLocalError(f"below min_share={self.config.min_share:g} of the MACs")
        if site.floor_macs >= site.macs:
            raise NotPixelLocalError("its gate and bypass cost as much as it does")


def identity_owner(
    conv: Node, network: NetworkGraph, config: RetrofitConfig, excluded: Collection[str]
) -> str:
    """Module in which conv -> norm -> activation can be bypassed by the input; "" if none."""
    wanted = config.bypass
    if wanted in ("collapsed", "coarse") or (wanted == "auto" and config.scope == "branch"):
        return ""
    if network.value(conv).shape[1] != network.value(conv.args[0]).shape[1]:
        return ""
    try:
        check_same(node_window(conv), padding_total(conv))
    except NotPixelLocalError:
        return ""
    paths = [network.owner(conv)]
    node = conv
    while len(node.users) == 1:
        node = next(iter(node.users))
        if operator_name(node) not in ACTIVATIONS | {"batch_norm"}:
            break
        paths.append(network.owner(node))
    owner = _common_parent(paths)
    return "" if owner in excluded else owner


def _entry(end: Node, inside: list[Node], readers: set[Node], network: NetworkGraph) -> Node:
    """The one tensor that a branch reads; nothing in it may be read from elsewhere."""
    members = set(inside)
    for node in inside:
        allowed = readers if node is end else members
        if any(user not in allowed for user in node.users):
            raise NotPixelLocalError(f"{operator_name(node)} inside it is read from outside")
    entries = {
        parent
        for node in inside
        for parent in node.all_input_nodes
        if parent not in members and parent.name not in network.parameter_of
    }
    if len(entries) != 1:
        raise NotPixelLocalError(f"it reads {len(entries)} tensors, not one")
    return entries.pop()


def _is_separable(first: Node, second: Node) -> bool:
    """Tell whether two layers are a depthwise convolution and the 1x1 that alone reads it."""
    if {operator_name(first), operator_name(second)} != {"conv2d"} or len(first.users) > 1:
        return False
    channels, groups = first.args[1].meta["val"].shape[1], conv_arguments(second)["groups"]
    larger = node_window(first).kernel != (1, 1)
    return channels == 1 and larger and node_window(second) == POINTWISE and groups == 1


def _is_overwritten(node: Node) -> bool:
    """Tell whether an operator changes a tensor in place, or a view of it."""
    for user in node.users:
        if user.args and user.args[0] is node:
            name = operator_name(user)
            if name.endswith("_") or (name in VIEWS and _is_overwritten(user)):
                return True
    return False


def _reaches(node: Node, end: Node) -> bool:
    """Tell whether a value reaches another node with its zeros where they are."""
    while node is not end:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
        if operator_name(node) not in ZERO_PRESERVING:
            return False
    return True


def _added_tensors(node: Node) -> tuple[Node, Node] | None:
    """The two operands of an addition of tensors."""
    if operator_name(node) not in ("add", "add_") or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if node.kwargs.get("alpha", 1) != 1:
        return None
    return a, b


def is_patched(module: nn.Module) -> bool:
    """Whether a module has a forward that is not its class's, and would hide that of a gate."""
    return "forward" in vars(module)


def _map_size(shape: Iterable[int], layout: str) -> tuple[int, int]:
    sizes = dict(zip(layout, (int(n) for n in shape), strict=True))
    return (sizes["N"], 1) if "N" in sizes else (sizes["H"], sizes["W"])


def _centre_offset(conv: nn.Conv2d, call: ConvCall) -> tuple[int, int]:
    """Input pixel at the centre of the first output pixel's window.

    Raises:
        NotPixelLocalError: The map grows, so that output pixels lack an input pixel.
    """
    offset = []
    for axis in (0, 1):
        reach = (conv.kernel_size[axis] - 1) * conv.dilation[axis]
        stride, size, output = conv.stride[axis], call.input_size[axis], call.output_size[axis]
        used = (output - 1) * stride + reach + 1  # rows that the windows span, padding included
        if type(conv) is nn.Conv2d and not isinstance(conv.padding, str):
            top = conv.padding[axis]
        else:
            top = max(used - size, 0) // 2
        start = max(reach // 2 - top, 0)
        grows = type(conv) is nn.Conv2d and 2 * top > reach  # at some sizes, if not at this one
        if grows or start + (output - 1) * stride >= size:
            raise NotPixelLocalError("its output has pixels beyond its input")
        offset.append(start)
    return (offset[0], offset[1])


def _prefixes(path: str) -> list[str]:
    """A path and all that hold it, the network's own "" included."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _common_parent(paths: list[str]) -> str:
    """Path of the innermost module that holds all modules of the paths as descendants."""
    if len(paths) == 1:
        return paths[0].rpartition(".")[0]
    columns = zip(*(path.split(".") for path in paths), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, columns)
    return ".".join(names[0] for names in shared)
