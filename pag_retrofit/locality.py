"""Which operations of a branch can be computed pixel by pixel, and what each pixel needs.

Follows the axes of every tensor through a branch of the exported graph: where its pixels are,
which other axes are channels, and which values belong to the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pag_retrofit.functional import Window
from pag_retrofit.tracing import NetworkGraph

# An fx.Node. Its arguments are typed as a union of all that a graph may hold, which only operator
# names narrow, so a checker can make nothing of them.
Node = Any
Paths = tuple[tuple[Window, ...], ...]

ACTIVATIONS = frozenset(
    "relu relu_ relu6 relu6_ silu silu_ gelu hardswish hardswish_ hardsigmoid hardsigmoid_ "
    "hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ mish mish_ sigmoid "
    "sigmoid_ tanh tanh_ softplus prelu log_sigmoid".split()
)
# Work on every element by itself, or on elements at the same place of two tensors.
ELEMENTWISE = ACTIVATIONS | frozenset(
    "add add_ sub sub_ rsub mul mul_ div div_ neg abs exp sqrt rsqrt reciprocal pow square "
    "clamp clamp_min clamp_max addcmul maximum minimum dropout dropout_ feature_dropout clone "
    "contiguous to _to_copy alias detach".split()
)
CHANNELWISE = frozenset({"batch_norm", "layer_norm", "rms_norm", "linear"})
CONVOLUTIONS = frozenset({"conv2d"})
LAYERS = frozenset({"conv2d", "linear", "conv_transpose2d", "conv1d", "conv3d"})
POOL_WINDOWS = frozenset({"avg_pool2d", "max_pool2d"})
RESHAPES = frozenset({"view", "reshape", "flatten", "_unsafe_view", "unflatten"})
# Reductions along an axis that leave it (size kept) or remove it, by their first dim argument.
REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "linalg_vector_norm", "var", "std"})
ALONG_CHANNELS = frozenset({"softmax", "log_softmax", "cumsum", "glu"})
SPLITS = frozenset({"chunk", "split", "split_with_sizes", "unbind", "select", "slice", "narrow"})
VIEWS = RESHAPES | SPLITS | frozenset({"permute", "transpose", "squeeze", "unsqueeze"})
# What lies between a masked tensor and the addition may be any of these: zero stays zero.
ZERO_PRESERVING = frozenset(
    "mul mul_ div div_ dropout dropout_ feature_dropout clone contiguous to _to_copy alias detach "
    "permute transpose slice roll neg".split()
) | (RESHAPES - {"unflatten"})


class NotPixelLocalError(Exception):
    """A branch that cannot be computed pixel by pixel; the message says why."""


class Pool(NamedTuple):
    """A reduction over all pixels inside a branch; gated, it sees computed pixels only."""

    operator: str  # "mean", or "norm": the root of the sum of squares
    layout: str  # of the map it reduces
    owner: str  # path of the module whose forward calls it


class BranchAnalysis:
    """Walks a branch to learn which pixels of each operation an output mask needs.

    Forward it follows axes and strides, backward the windows.

    Args:
        network: The exported network.
        inside: Nodes of the branch.
        entry: The tensor it reads.
        end: Its last node.
        layout: Axes of the entry, and those the end must have: `"BCHW"`, `"BHWC"` or `"BNC"`.
        choosing: MultiPool convolutions, with the windows that name their selectors.
    """

    def __init__(
        self,
        network: NetworkGraph,
        inside: set[Node],
        entry: Node,
        end: Node,
        layout: str,
        choosing: Mapping[Node, Window],
    ):
        """Prepare; `run` does the work."""
        self.network = network
        self.order = [node for node in network.graph.nodes if node in inside]
        self.inside = inside
        self.entry = entry
        self.end = end
        self.layout = layout
        self.choosing = choosing
        self.axes: dict[Node, str] = {entry: layout}
        self.strides: dict[Node, tuple[int, int]] = {entry: (1, 1)}
        self.per_image: set[Node] = set()
        self.pools: list[Pool] = []
        self._pooled: list[Node] = []

    @property
    def stride(self) -> tuple[int, int]:
        """From the entry to the end."""
        return self.strides[self.end]

    def run(self) -> list[tuple[Node, Paths]]:
        """Return the layers with the windows between the branch's end and them.

        Raises:
            NotPixelLocalError: The branch cannot be computed pixel by pixel.
        """
        rank = len(_shape(self.entry))
        if rank != len(self.layout):
            raise NotPixelLocalError(f"its input has {rank} axes, not {len(self.layout)}")
        for node in self.order:
            self._forward(node)
        if self.end in self.per_image or self.axes[self.end] != self.layout:
            raise NotPixelLocalError("its output is laid out otherwise than its input")
        return self._backward()

    def _tensors(self, node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if n in self.inside or n is self.entry]

    def _forward(self, node: Node) -> None:
        spatial = [n for n in self._tensors(node) if n not in self.per_image]
        if not spatial:  # made of parameters (a layer scale), or of values of the whole image
            self.per_image.add(node)
            return
        name = operator_name(node)
        if len({self.axes[n] for n in spatial}) > 1 or len({self.strides[n] for n in spatial}) > 1:
            raise NotPixelLocalError(f"{name} joins maps of different layouts")
        axes, self.strides[node] = self.axes[spatial[0]], self.strides[spatial[0]]
        if name in REDUCTIONS or name == "adaptive_avg_pool2d":
            self._reduce(node, name, spatial[0], axes)
        elif name in CONVOLUTIONS | POOL_WINDOWS:
            self._slide(node, name, axes)
        else:
            self.axes[node] = _axes_after(node, name, axes)

    def _slide(self, node: Node, name: str, axes: str) -> None:
        """A window operation: the size is kept, or divided by the stride and rounded up."""
        if axes != "BCHW":
            raise NotPixelLocalError(f"{name} reads a tensor that is not laid out as (B, C, H, W)")
        window = node_window(node)
        padding = padding_total(node) if name in CONVOLUTIONS else _pool_padding(node)
        check_same(window, padding)
        if name in POOL_WINDOWS and _pool_arguments(node)["ceil_mode"][0]:
            raise NotPixelLocalError("its pooling rounds sizes otherwise than its stride")
        stride = self.strides[node]
        self.axes[node] = axes
        self.strides[node] = (stride[0] * window.stride[0], stride[1] * window.stride[1])

    def _reduce(self, node: Node, name: str, source: Node, axes: str) -> None:
        if name == "adaptive_avg_pool2d":
            dims, keep = [2, 3], True
            if axes != "BCHW" or pair(node.args[1]) != (1, 1):
                raise NotPixelLocalError("it pools to more than one value per image")
        else:
            dims, keep = _reduced_dims(node, name, len(axes))
        labels = {axes[d] for d in dims}
        if labels <= {"C"}:
            self.axes[node] = "".join(axis for d, axis in enumerate(axes) if keep or d not in dims)
            return
        operator = {"mean": "mean", "adaptive_avg_pool2d": "mean", "linalg_vector_norm": "norm"}
        if labels not in ({"H", "W"}, {"N"}) or name not in operator:
            raise NotPixelLocalError(f"it reduces over other axes than its pixels' ({node.name})")
        self.per_image.add(node)
        if source is not self.entry:
            if axes not in ("BCHW", "BHWC", "BNC"):
                raise NotPixelLocalError("it pools a map of an unusual layout")
            self.pools.append(Pool(operator[name], axes, self.network.owner(node)))
            self._pooled.append(source)

    def _backward(self) -> list[tuple[Node, Paths]]:
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
        if any(paths[source] != {()} for source in self._pooled):
            raise NotPixelLocalError("it pools over pixels that only the halo computes")
        layers = [node for node in spatial if operator_name(node) in ("conv2d", "linear")]
        return [(node, tuple(sorted(paths[node]))) for node in layers]


def operator_name(node: Node) -> str:
    """Name of an ATen operator without namespace and overload; "" for anything else."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else node.target.__name__


def node_macs(node: Node) -> int:
    """MACs of a convolution or linear node for the whole batch, 0 for anything else."""
    name = operator_name(node)
    if name not in LAYERS:
        return 0
    counted = _shape(node.args[0]) if name == "conv_transpose2d" else _shape(node)
    return math.prod(counted) * math.prod(_shape(node.args[1])[1:])


def macs_per_pixel(node: Node) -> int:
    """MACs of a convolution or linear node for one output pixel."""
    return math.prod(_shape(node.args[1]))


def node_window(node: Node) -> Window:
    """Window of a convolution or pooling; a zero padding right before a convolution is its own."""
    if operator_name(node) in POOL_WINDOWS:
        values = _pool_arguments(node)
        kernel, stride, dilation = values["kernel_size"], values["stride"], values["dilation"]
        return Window(kernel, stride, dilation, values["padding"])
    kernel = _shape(node.args[1])[2:]
    arguments = conv_arguments(node)
    left, _, top, _ = pad_before(node)
    own = _own_padding(node)[1]
    return Window(
        (kernel[0], kernel[1]),
        pair(arguments["stride"]),
        pair(arguments["dilation"]),
        (own[0] + top, own[1] + left),
    )


def padding_total(conv: Node) -> tuple[int, int]:
    """(vertical, horizontal) padding of a convolution, both sides together."""
    left, right, top, bottom = pad_before(conv)
    own = _own_padding(conv)[0]
    return own[0] + top + bottom, own[1] + left + right


def pair(value: Any) -> tuple[int, int]:
    """Two integers from one or two."""
    if isinstance(value, int):
        return value, value
    values = list(value)
    return (int(values[0]), int(values[-1]))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _axes_after(node: Node, name: str, axes: str) -> str:
    """Axes of the result of an operation without window or reduction."""
    if name in ELEMENTWISE | CHANNELWISE:
        return _kept(node, name, axes)
    if name in RESHAPES:
        return _reshaped(axes, _shape(node.args[0]), _shape(node), name)
    if name in ("permute", "transpose"):
        return _permuted(node, name, axes)
    if name in ALONG_CHANNELS | SPLITS:
        return _along_channels(node, name, axes)
    if name in ("cat", "concat", "concatenate", "stack"):
        return _joined(node, name, axes)
    if name in ("unsqueeze", "squeeze", "expand", "getitem"):
        return _resized(node, name, axes)
    if name in ("pad", "constant_pad_nd") and all(
        operator_name(user) == "conv2d" for user in node.users
    ):
        return axes  # counted as padding of the convolution that reads it
    raise NotPixelLocalError(f"it uses {name or node.name}, not known to be pixel-local")


def _kept(node: Node, name: str, axes: str) -> str:
    """Axes after an operation that keeps them, if it looks along channels at most."""
    if name in ELEMENTWISE:
        good = len(_shape(node)) == len(axes)
    elif name == "batch_norm":
        good = axes[:2] == "BC" and not node.args[5]
    elif name == "linear":
        good = axes[-1] == "C"
    else:
        good = set(axes[-len(node.args[1]) :]) == {"C"}
    if not good:
        raise NotPixelLocalError(f"its {name} works along other axes than the channels")
    return axes


def _permuted(node: Node, name: str, axes: str) -> str:
    if name == "permute":
        return "".join(axes[i] for i in node.args[1])
    order = list(axes)
    i, j = node.args[1:3]
    order[i], order[j] = order[j], order[i]
    return "".join(order)


def _along_channels(node: Node, name: str, axes: str) -> str:
    position = 2 if name in ("chunk", "split", "split_with_sizes") else 1
    dim = _dim(node, position, default=-1 if name == "glu" else 0)
    if axes[dim] != "C" and not (name == "slice" and _shape(node) == _shape(node.args[0])):
        raise NotPixelLocalError(f"{name} works along another axis than the channels")
    return axes[:dim] + axes[dim:][1:] if name in ("unbind", "select") else axes


def _joined(node: Node, name: str, axes: str) -> str:
    if any(len(_shape(n)) != len(axes) for n in node.args[0]):
        raise NotPixelLocalError(f"{name} joins maps of different layouts")
    dim = _dim(node, 1, default=0) % (len(axes) + (name == "stack"))
    if name == "stack":
        return axes[:dim] + "C" + axes[dim:]
    if axes[dim] != "C":
        raise NotPixelLocalError(f"{name} joins along another axis than the channels")
    return axes


def _resized(node: Node, name: str, axes: str) -> str:
    if name == "getitem":  # of what a split returned
        return axes
    if name == "unsqueeze":
        dim = node.args[1] % (len(axes) + 1)
        return axes[:dim] + "C" + axes[dim:]
    if name == "squeeze":
        dim = _dim(node, 1, default=len(axes)) % len(axes)
        if len(node.args) > 1 and axes[dim] == "C":
            return axes[:dim] + axes[dim + 1 :]
    if name == "expand" and len(_shape(node)) == len(axes):
        before, after = _shape(node.args[0]), _shape(node)
        if all(a == b or axis == "C" for axis, a, b in zip(axes, before, after, strict=True)):
            return axes
    raise NotPixelLocalError(f"{name} changes other axes than the channels")


def _reshaped(axes: str, before: tuple[int, ...], after: tuple[int, ...], name: str) -> str:
    """Axes after a reshape that splits or joins channels, or joins rows and columns.

    Raises:
        NotPixelLocalError: It mixes axes, or splits rows or columns.
    """
    result = ""
    i = j = 0
    while i < len(before) or j < len(after):
        if j < len(after) and after[j] == 1 and (i == len(before) or before[i] != 1):
            result, j = result + "C", j + 1
            continue
        if (
            i < len(before)
            and before[i] == 1
            and axes[i] == "C"
            and (j == len(after) or after[j] != 1)
        ):
            i += 1
            continue
        start, first = i, j
        if i == len(before) or j == len(after):
            raise NotPixelLocalError(f"{name} mixes axes")
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif left > right and j < len(after):
                right, j = right * after[j], j + 1
            else:
                raise NotPixelLocalError(f"{name} mixes axes")
        result += _regrouped(axes[start:i], j - first, name)
    return result


def _regrouped(labels: str, count: int, name: str) -> str:
    if len(labels) == count == 1:
        return labels
    if set(labels) == {"C"}:
        return "C" * count
    if labels == "HW" and count == 1:
        return "N"
    if labels == "N" and count == 2:
        return "HW"
    raise NotPixelLocalError(f"{name} mixes axes")


def _reduced_dims(node: Node, name: str, rank: int) -> tuple[list[int], bool]:
    """Axes that a reduction goes over, and whether it keeps them with size one."""
    position = 2 if name == "linalg_vector_norm" else 1
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if name == "linalg_vector_norm" and (node.args[1] if len(node.args) > 1 else 2) != 2:
        raise NotPixelLocalError("it uses another norm than the Euclidean")
    if dims is None or dims == []:
        dims = list(range(rank))
    dims = [dims] if isinstance(dims, int) else list(dims)
    kept = len(_shape(node)) == rank
    return [d % rank for d in dims], kept


def _dim(node: Node, position: int, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(value)


def _through(
    node: Node, paths: set[tuple[Window, ...]], choosing: Window | None
) -> set[tuple[Window, ...]]:
    """Paths to the inputs of a node, given those to its output."""
    if operator_name(node) not in CONVOLUTIONS | POOL_WINDOWS:
        return paths
    window = choosing or node_window(node)
    if window.kernel == (1, 1) and window.stride == (1, 1):
        return paths
    return {(*path, window) for path in paths}


def conv_arguments(conv: Node) -> dict[str, Any]:
    """Arguments of a convolution by name, with defaults."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **dict(zip(names, conv.args, strict=False)), **conv.kwargs}


def _pool_arguments(pool: Node) -> dict[str, Any]:
    """Arguments of avg_pool2d or max_pool2d, which agree in the first four."""
    names = ["kernel_size", "stride", "padding"]
    names += ["dilation"] if operator_name(pool) == "max_pool2d" else []
    names += ["ceil_mode"]
    values: dict[str, Any] = {"stride": [], "padding": 0, "dilation": 1, "ceil_mode": False}
    values |= dict(zip(names, pool.args[1:], strict=False))
    values["stride"] = values["stride"] or values["kernel_size"]
    return {name: pair(value) for name, value in values.items()}


def _pool_padding(pool: Node) -> tuple[int, int]:
    vertical, horizontal = _pool_arguments(pool)["padding"]
    return 2 * vertical, 2 * horizontal


def _own_padding(conv: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """(total vertical, total horizontal), (top, left) of the convolution's own padding."""
    arguments = conv_arguments(conv)
    if arguments["padding"] == "valid":
        return (0, 0), (0, 0)
    if arguments["padding"] == "same":
        kernel = _shape(conv.args[1])[2:]
        dilation = pair(arguments["dilation"])
        vertical, horizontal = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
        return (vertical, horizontal), (vertical // 2, horizontal // 2)
    vertical, horizontal = pair(arguments["padding"])
    return (2 * vertical, 2 * horizontal), (vertical, horizontal)


def pad_before(conv: Node) -> list[int]:
    """[left, right, top, bottom] of a padding node that feeds a convolution."""
    source: Node = conv.args[0]
    if operator_name(source) not in ("pad", "constant_pad_nd"):
        return [0, 0, 0, 0]
    mode = source.args[2] if len(source.args) > 2 else source.kwargs.get("mode", "constant")
    if mode not in ("constant", 0, 0.0) or len(source.args[1]) != 4:
        raise NotPixelLocalError("it pads with something else than zeros")
    return [int(n) for n in source.args[1]]


def check_same(window: Window, padding: tuple[int, int]) -> None:
    """Refuse a window whose map is not its input's size divided by the stride, rounded up.

    Only then is the output pixel of a gate that of the window for every input size.
    """
    for axis in (0, 1):
        reach = (window.kernel[axis] - 1) * window.dilation[axis]
        centred = window.padding[axis] == reach // 2 or window.stride[axis] == 1
        if padding[axis] != reach or not centred:
            raise NotPixelLocalError(
                f"kernel {window.kernel} with padding {padding} in all does not keep the size"
            )
