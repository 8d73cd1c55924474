"""Finding sites: which parts of a network can be computed pixel by pixel on demand.

Works on the exported graph alone (operators, shapes, owners), so it knows no class names.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from pag_retrofit.config import RetrofitConfig
from pag_retrofit.cost import GatedOperation, SelectorSpec, SiteCost
from pag_retrofit.functional import Window
from pag_retrofit.tracing import NetworkGraph, ancestors

# An fx.Node. Its arguments are typed as a union of all that a graph may hold, which only operator
# names narrow, so a checker can make nothing of them.
Node = Any

ACTIVATIONS = frozenset(
    "relu relu_ relu6 silu silu_ gelu hardswish hardswish_ hardsigmoid hardsigmoid_ hardtanh "
    "hardtanh_ leaky_relu leaky_relu_ elu elu_ mish mish_ sigmoid sigmoid_ tanh softplus "
    "prelu".split()
)
POINTWISE = ACTIVATIONS | frozenset(
    "add add_ sub mul mul_ div neg exp sqrt rsqrt pow clamp clamp_min dropout dropout_ "
    "feature_dropout clone contiguous to alias detach batch_norm".split()
)
CONVOLUTIONS = frozenset({"conv2d"})
GLOBAL_MEANS = frozenset({"mean", "adaptive_avg_pool2d"})


class NotPixelLocalError(Exception):
    """A branch that cannot be computed pixel by pixel; the message says why."""


@dataclass(frozen=True)
class Site:
    """A place whose per-pixel compute can be gated.

    Args:
        name: Path of the block (branch) or of the convolution.
        kind: `"branch"`, `"conv"`, `"multipool"` or `"aspp"`.
        owner: Path of the module that is rewritten.
        bypass: What closed pixels get: `"shortcut"`, `"identity"` or `"collapsed"`.
        channels: Of the gate's input.
        cost: Model of its MACs.
        input_size: (H, W) of the gate's input, at the example input.
        add_index: Branch: which of the owner's own additions joins it to the shortcut.
        operand: Branch: which side of that addition it is.
        pools: Branch: how many global means inside it pool over gated pixels.
        layers: Branch: every convolution and linear layer inside, per-image ones included.
        selector: MultiPool, ASPP: shape of the selector.
        window: MultiPool: of the convolution.
        inside: MultiPool: the branch site that it lies in and that counts its MACs, if one does.
    """

    name: str
    kind: str
    owner: str
    bypass: str
    channels: int
    cost: SiteCost
    input_size: tuple[int, int]
    add_index: int = 0
    operand: int = 0
    pools: int = 0
    layers: tuple[str, ...] = ()
    selector: SelectorSpec | None = None
    window: Window | None = None
    inside: str = ""

    @property
    def macs(self) -> int:
        """MACs of the gated operations in the original network, per image at the example."""
        return self.cost.full_macs(self.input_size)


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
    *,
    pooled: Mapping[str, Window] = MappingProxyType({}),
    covered: Collection[str] = (),
) -> Findings:
    """List every layer of a network, and the sites that a configuration asks for.

    A layer that no site covers has an entry in `reasons`.

    Args:
        model: The network.
        network: Its graph.
        config: What is gated and how.
        pooled: MultiPool convolution -> window; such a one gets no site here, yet branches may
            hold it.
        covered: Layers that other sites hold.
    """
    finder = _Finder(model, network, config)
    finder.pooled = pooled
    finder.covered.update(covered)
    return finder.run()


def operator_name(node: Node) -> str:
    """Name of an ATen operator without namespace and overload; "" for anything else."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema.name.split("::")[1] if schema is not None else ""


class _Finder:
    def __init__(self, model: nn.Module, network: NetworkGraph, config: RetrofitConfig):
        self.network = network
        self.config = config
        self.modules = dict(model.named_modules(remove_duplicate=False))
        names = Counter(id(module) for module in self.modules.values())
        self.aliased = {path for path, module in self.modules.items() if names[id(module)] > 1}
        self.nodes = list(network.graph.nodes)
        self.ancestors = ancestors(network.graph)
        self.layer_of: dict[Node, str] = {}
        self.calls: dict[str, int] = {}
        self.covered: set[str] = set()
        self.pooled: Mapping[str, Window] = {}
        self.found = Findings()

    def run(self) -> Findings:
        self._list_layers()
        if self.config.scope == "branch":
            self._find_branches()
        self._find_convolutions()
        for name in self.found.layers:
            if name not in self.covered:
                self.found.reasons.setdefault(name, "not inside a site")
        return self.found

    # --- layers ---------------------------------------------------------------------------

    def _list_layers(self) -> None:
        for node in self.nodes:
            if operator_name(node) not in ("conv2d", "linear", "conv_transpose2d", "conv1d"):
                continue
            weight = self.network.parameter_of.get(node.args[1].name, "")
            name = weight.removesuffix(".weight") if weight.endswith(".weight") else node.name
            if name != node.name:
                self.layer_of[node] = name
            self.calls[name] = self.calls.get(name, 0) + 1
            earlier = self.found.layers.get(name)
            macs = _node_macs(node) + (earlier.macs if earlier else 0)
            self.found.layers[name] = Layer(name, operator_name(node), macs)
            if name == node.name:
                self.found.reasons[name] = "its weight is computed in the forward pass"
        for name, module in self.modules.items():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                if name not in self.found.layers:
                    self.found.layers[name] = Layer(name, type(module).__name__.lower(), 0)
                    self.found.reasons[name] = "the forward pass does not use it"

    # --- residual branches ----------------------------------------------------------------

    def _find_branches(self) -> None:
        seen: dict[str, int] = {}
        for node in self.nodes:
            operands = _added_tensors(node)
            if operands is None:
                continue
            owner = self.network.owner(node)
            index = seen.get(owner, 0)
            seen[owner] = index + 1
            self._try_add(node, operands, owner, index)

    def _try_add(self, add: Node, operands: tuple[Node, Node], owner: str, index: int) -> None:
        """Accept the heavier side of an addition as a branch, or note why not."""
        sides = []
        for side in (0, 1):
            inside = self._exclusive(operands[side], operands[1 - side])
            macs = sum(_node_macs(node) for node in inside)
            if macs and all(self._is_inside(node, owner) for node in inside):
                sides.append((macs, side, inside))
        if not sides:
            return
        macs, side, inside = max(sides, key=lambda item: item[0])
        names = tuple(self.layer_of.get(node, node.name) for node in inside if _node_macs(node))
        name = owner if index == 0 else f"{owner}.add{index}"
        try:
            site = self._branch_site(add, operands[side], inside, (name, owner, index, side))
        except NotPixelLocalError as reason:
            for layer in names:
                self.found.reasons[layer] = f"residual branch of {owner or 'the network'}: {reason}"
            return
        self.found.sites.append(site)
        self.covered.update(operation.name for operation in site.cost.operations)
        for layer in set(names) - self.covered:
            self.found.reasons[layer] = f"computed once per image, inside the branch {name}"

    def _branch_site(
        self, add: Node, end: Node, inside: list[Node], key: tuple[str, str, int, int]
    ) -> Site:
        name, owner, index, side = key
        if not owner:
            raise NotPixelLocalError("the addition is in the forward of the network itself")
        if owner in self.aliased:
            raise NotPixelLocalError(f"{owner} has several names in the network")
        self._check_wanted(name)
        entry = self._entry(end, inside, add)
        analysis = _BranchAnalysis(self.network, set(inside), entry, end)
        names = {node: self.layer_of.get(node, "") for node in inside}
        analysis.choosing = {
            node: self.pooled[name] for node, name in names.items() if name in self.pooled
        }
        operations = analysis.run()
        for node in inside:
            layer = self.layer_of.get(node)
            if layer in self.covered:
                raise NotPixelLocalError("it holds another site")
            if _node_macs(node) and self.calls.get(layer or node.name, 1) > 1:
                raise NotPixelLocalError(f"{layer} is used more than once")
        channels = self.network.value(entry).shape[1]
        cost = SiteCost(
            tuple(
                GatedOperation(self.layer_of.get(node, node.name), macs_per_pixel(node), paths)
                for node, paths in operations
            ),
            gate_macs=channels,
            stride=analysis.stride,
        )
        self._check_worth(cost, self._input_size(entry))
        return Site(
            name=name,
            kind="branch",
            owner=owner,
            bypass="shortcut",
            channels=channels,
            cost=cost,
            input_size=self._input_size(entry),
            add_index=index,
            operand=side,
            pools=analysis.pools,
            layers=tuple(self.layer_of.get(n, n.name) for n in inside if _node_macs(n)),
        )

    def _entry(self, end: Node, inside: list[Node], add: Node) -> Node:
        """The one tensor that a branch reads; nothing in it may be read from elsewhere."""
        members = set(inside)
        for node in inside:
            allowed = {add} if node is end else members
            if any(user not in allowed for user in node.users):
                raise NotPixelLocalError(f"{operator_name(node)} inside it is read from outside")
        entries = {
            parent
            for node in inside
            for parent in node.all_input_nodes
            if parent not in members and parent.name not in self.network.parameter_of
        }
        if len(entries) != 1:
            raise NotPixelLocalError(f"it reads {len(entries)} tensors, not one")
        return entries.pop()

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

    # --- plain convolutions ---------------------------------------------------------------

    def _find_convolutions(self) -> None:
        for node in self.nodes:
            name = self.layer_of.get(node)
            if name is None or name in self.covered or name in self.pooled:
                continue
            if operator_name(node) != "conv2d":
                kind = operator_name(node).replace("_", " ")
                self.found.reasons.setdefault(name, f"a {kind} layer outside a residual branch")
                continue
            try:
                site = self._conv_site(node, name)
            except NotPixelLocalError as reason:
                text = str(reason)
                earlier = self.found.reasons.get(name)
                self.found.reasons[name] = f"{earlier}; alone: {text}" if earlier else text
                continue
            self.found.reasons.pop(name, None)
            self.found.sites.append(site)
            self.covered.add(name)

    def _conv_site(self, node: Node, name: str) -> Site:
        module = self.modules[name]
        window = conv_window(node)
        if window.kernel == (1, 1):
            raise NotPixelLocalError("a 1x1 convolution has no cheaper bypass")
        if type(module) is not nn.Conv2d:
            raise NotPixelLocalError(f"{type(module).__name__} computes its own way")
        if self.calls[name] > 1:
            raise NotPixelLocalError("it is used more than once")
        if name in self.aliased:
            raise NotPixelLocalError("it has several names in the network")
        self._check_wanted(name)
        check_same(window, padding_total(node))
        owner = identity_owner(node, self.network, self.config, self.aliased)
        channels = self.network.value(node.args[0]).shape[1]
        taps = window.kernel[0] * window.kernel[1]
        cost = SiteCost(
            (GatedOperation(name, macs_per_pixel(node)),),
            gate_macs=channels,
            bypass_macs=0 if owner else macs_per_pixel(node) // taps,
            stride=window.stride,
        )
        input_size = self._input_size(node.args[0])
        self._check_worth(cost, input_size)
        return Site(
            name=name,
            kind="conv",
            owner=owner or name,
            bypass="identity" if owner else "collapsed",
            channels=channels,
            cost=cost,
            input_size=input_size,
            layers=(name,),
        )

    # --- checks and counts ----------------------------------------------------------------

    def _check_wanted(self, name: str) -> None:
        included = any(fnmatch.fnmatchcase(name, p) for p in self.config.include)
        if not included or any(fnmatch.fnmatchcase(name, p) for p in self.config.exclude):
            raise NotPixelLocalError("left out by include/exclude")

    def _check_worth(self, cost: SiteCost, size: tuple[int, int]) -> None:
        share = cost.full_macs(size) / max(self.network.total_macs, 1)
        if share < self.config.min_share:
            raise NotPixelLocalError(f"below min_share={self.config.min_share:g} of the MACs")
        if cost.floor_macs(size) >= cost.full_macs(size):
            raise NotPixelLocalError("its gate and bypass cost as much as it does")

    def _input_size(self, node: Node) -> tuple[int, int]:
        shape = self.network.value(node).shape
        return int(shape[2]), int(shape[3])


def identity_owner(
    conv: Node, network: NetworkGraph, config: RetrofitConfig, aliased: Collection[str]
) -> str:
    """Module in which conv -> norm -> activation can be bypassed by the input; "" if none."""
    wanted = config.bypass
    if wanted == "collapsed" or (wanted == "auto" and config.scope == "branch"):
        return ""
    if network.value(conv).shape[1] != network.value(conv.args[0]).shape[1]:
        return ""
    paths = [network.owner(conv)]
    node = conv
    while len(node.users) == 1:
        node = next(iter(node.users))
        if operator_name(node) not in ACTIVATIONS | {"batch_norm"}:
            break
        paths.append(network.owner(node))
    owner = _common_parent(paths)
    return "" if owner in aliased else owner


class _BranchAnalysis:
    """Walks a branch to learn which pixels of each operation an output mask needs.

    Forward it follows the order of the axes and the stride, backward the windows.
    """

    def __init__(self, network: NetworkGraph, inside: set[Node], entry: Node, end: Node):
        self.network = network
        self.order = [node for node in network.graph.nodes if node in inside]
        self.inside = inside
        self.entry = entry
        self.end = end
        self.axes: dict[Node, str] = {entry: "BCHW"}
        self.strides: dict[Node, tuple[int, int]] = {entry: (1, 1)}
        self.per_image: set[Node] = set()
        self.pooled: list[Node] = []
        self.choosing: Mapping[Node, Window] = {}

    @property
    def stride(self) -> tuple[int, int]:
        return self.strides[self.end]

    @property
    def pools(self) -> int:
        return len(self.pooled)

    def run(self) -> list[tuple[Node, tuple[tuple[Window, ...], ...]]]:
        """Return the operations with the windows between the branch's end and them."""
        shape = self.network.value(self.entry).shape
        if len(shape) != 4:
            raise NotPixelLocalError(f"its input has {len(shape)} axes, not (B, C, H, W)")
        for node in self.order:
            self._forward(node)
        if self.end in self.per_image or self.axes[self.end] != "BCHW":
            raise NotPixelLocalError("its output is not laid out as (B, C, H, W)")
        return self._backward()

    def _tensors(self, node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if n in self.inside or n is self.entry]

    def _forward(self, node: Node) -> None:
        name = operator_name(node)
        inputs = self._tensors(node)
        spatial = [n for n in inputs if n not in self.per_image]
        if inputs and not spatial:
            self.per_image.add(node)
            return
        if not inputs:  # a value made of parameters, such as a layer scale
            self.per_image.add(node)
            return
        if len({self.axes[n] for n in spatial}) > 1 or len({self.strides[n] for n in spatial}) > 1:
            raise NotPixelLocalError(f"{name} joins maps of different layouts")
        axes, stride = self.axes[spatial[0]], self.strides[spatial[0]]
        if name in GLOBAL_MEANS:
            self._pool(node, spatial[0], axes)
            return
        self.axes[node], self.strides[node] = self._local(node, name, axes, stride)

    def _local(
        self, node: Node, name: str, axes: str, stride: tuple[int, int]
    ) -> tuple[str, tuple[int, int]]:
        """Axes and stride after a pixel-local or window operation."""
        if name in POINTWISE:
            if name == "batch_norm" and (axes != "BCHW" or node.args[5]):
                raise NotPixelLocalError("its batch norm uses statistics of the batch")
            return axes, stride
        if name == "permute":
            return "".join(axes[i] for i in node.args[1]), stride
        if name in ("linear", "layer_norm") and axes[-1] == "C":
            if name == "linear" or len(node.args[1]) == 1:
                return axes, stride
        if name in ("pad", "constant_pad_nd") and all(
            operator_name(user) == "conv2d" for user in node.users
        ):
            return axes, stride  # counted as padding of the convolution that reads it
        if name in CONVOLUTIONS and axes == "BCHW":
            window = conv_window(node)
            check_same(window, padding_total(node))
            return axes, (stride[0] * window.stride[0], stride[1] * window.stride[1])
        raise NotPixelLocalError(f"it uses {name or node.name}, not known to be pixel-local")

    def _pool(self, node: Node, source: Node, axes: str) -> None:
        rank = len(axes)
        if operator_name(node) == "mean":
            dims = node.args[1] if len(node.args) > 1 else ()
            good = sorted(d % rank for d in dims) == [axes.index("H"), axes.index("W")]
        else:
            good = axes == "BCHW" and _pair(node.args[1]) == (1, 1)
        if not good:
            raise NotPixelLocalError(f"it pools over other axes than H and W ({node.name})")
        self.per_image.add(node)
        if source is not self.entry:
            if axes != "BCHW":
                raise NotPixelLocalError("it pools a map that is not laid out as (B, C, H, W)")
            self.pooled.append(source)

    def _backward(self) -> list[tuple[Node, tuple[tuple[Window, ...], ...]]]:
        paths: dict[Node, set[tuple[Window, ...]]] = {n: set() for n in self.order}
        paths[self.end] = {()}
        spatial = [node for node in self.order if node not in self.per_image]
        for node in reversed(spatial):
            if not paths[node]:
                raise NotPixelLocalError(f"nothing but a global mean reads {node.name}")
            needs = _through(node, paths[node], self.choosing.get(node))
            for parent in self._tensors(node):
                if parent is not self.entry:
                    paths[parent] |= needs
        if any(paths[source] != {()} for source in self.pooled):
            raise NotPixelLocalError("it pools over pixels that only the halo computes")
        layers = [node for node in spatial if operator_name(node) in ("conv2d", "linear")]
        return [(node, tuple(sorted(paths[node]))) for node in layers]


def _through(
    node: Node, paths: set[tuple[Window, ...]], pooled: Window | None
) -> set[tuple[Window, ...]]:
    """Paths to the inputs of a node, given those to its output."""
    if operator_name(node) not in CONVOLUTIONS:
        return paths
    window = pooled or conv_window(node)
    if window.kernel == (1, 1) and window.stride == (1, 1):
        return paths
    return {(*path, window) for path in paths}


def conv_window(conv: Node) -> Window:
    """Window of a conv2d node; a zero padding right before it counts as its own."""
    kernel = conv.args[1].meta["val"].shape[2:]
    arguments = _conv_arguments(conv)
    top, left = _padding_before(conv)
    return Window(
        (int(kernel[0]), int(kernel[1])),
        _pair(arguments["stride"]),
        _pair(arguments["dilation"]),
        (top, left),
    )


def _conv_arguments(conv: Node) -> dict[str, Any]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **dict(zip(names, conv.args, strict=False)), **conv.kwargs}


def _own_padding(conv: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """(total vertical, total horizontal), (top, left) of the convolution's own padding."""
    arguments = _conv_arguments(conv)
    if arguments["padding"] == "valid":
        return (0, 0), (0, 0)
    if arguments["padding"] == "same":
        kernel = conv.args[1].meta["val"].shape[2:]
        dilation = _pair(arguments["dilation"])
        vertical, horizontal = (int((k - 1) * d) for k, d in zip(kernel, dilation, strict=True))
        return (vertical, horizontal), (vertical // 2, horizontal // 2)
    vertical, horizontal = _pair(arguments["padding"])
    return (2 * vertical, 2 * horizontal), (vertical, horizontal)


def pad_before(conv: Node) -> list[int]:
    """[left, right, top, bottom] of a padding node that feeds a convolution."""
    source = conv.args[0]
    if operator_name(source) not in ("pad", "constant_pad_nd"):
        return [0, 0, 0, 0]
    mode = source.args[2] if len(source.args) > 2 else source.kwargs.get("mode", "constant")
    if mode not in ("constant", 0, 0.0) or len(source.args[1]) != 4:
        raise NotPixelLocalError("it pads with something else than zeros")
    return list(source.args[1])


def _padding_before(conv: Node) -> tuple[int, int]:
    left, _, top, _ = pad_before(conv)
    own = _own_padding(conv)[1]
    return own[0] + top, own[1] + left


def padding_total(conv: Node) -> tuple[int, int]:
    left, right, top, bottom = pad_before(conv)
    own = _own_padding(conv)[0]
    return own[0] + top + bottom, own[1] + left + right


def check_same(window: Window, padding: tuple[int, int]) -> None:
    """Refuse a convolution whose map is not its input's size divided by the stride, rounded up.

    Only then is the output pixel of a gate that of the convolution for every input size.
    """
    for axis in (0, 1):
        reach = (window.kernel[axis] - 1) * window.dilation[axis]
        centred = window.padding[axis] == reach // 2 or window.stride[axis] == 1
        if padding[axis] != reach or not centred:
            raise NotPixelLocalError(
                f"kernel {window.kernel} with padding {padding} in all does not keep the size"
            )


def _added_tensors(node: Node) -> tuple[Node, Node] | None:
    """The two operands of an addition of tensors of one shape."""
    if operator_name(node) not in ("add", "add_") or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if node.kwargs.get("alpha", 1) != 1:
        return None
    return a, b


def _node_macs(node: Node) -> int:
    """MACs per image of a convolution or linear node, 0 for anything else."""
    name = operator_name(node)
    if name not in ("conv2d", "linear", "conv_transpose2d", "conv1d"):
        return 0
    value = node.meta["val"]
    batch = max(int(value.shape[0]), 1)
    weight = node.args[1].meta["val"].shape
    if name == "conv_transpose2d":
        pixels = math.prod(int(n) for n in node.args[0].meta["val"].shape)
        return pixels * math.prod(int(n) for n in weight[1:]) // batch
    return math.prod(int(n) for n in value.shape) * math.prod(int(n) for n in weight[1:]) // batch


def macs_per_pixel(node: Node) -> int:
    return math.prod(int(n) for n in node.args[1].meta["val"].shape)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = list(value)
    return (values[0], values[-1])


def _common_parent(paths: list[str]) -> str:
    """Path of the innermost module that holds all modules of the paths as descendants."""
    if len(paths) == 1:
        return paths[0].rpartition(".")[0]
    columns = zip(*(path.split(".") for path in paths), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, columns)
    return ".".join(names[0] for names in shared)
