"""What the nodes of an exported network say: operators, shapes, layouts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pag_retrofit import kernels
from pag_retrofit.locality import ELEMENTWISE, Node, conv_arguments, operator_name, pair

_REGIONS = (
    torch.ops.higher_order.wrap_with_autocast,
    torch.ops.higher_order.wrap_with_set_grad_enabled,
)


def base_name(node: Node) -> str:
    """Operator, in place or not."""
    if node.target is operator.getitem:
        return "getitem"
    return operator_name(node).removesuffix("_")


def inline_regions(graph: fx.Graph, module: nn.Module) -> None:
    """Put what runs under autocast or gradient modes of its own among the other nodes, in place.

    Deployed networks know neither: all is computed in the type that it has.

    Args:
        graph: Of an exported program.
        module: Holds the regions' graphs.
    """
    for node in list(graph.nodes):
        if node.target not in _REGIONS:
            continue
        place = next(i for i, x in enumerate(node.args) if _holds_region(x, module))
        holder: Any = node.args[place]
        region = getattr(module, holder.target)
        inline_regions(region.graph, region)
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        values = dict(zip(inputs, node.args[place + 1 :], strict=True))
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(region.graph, values)
        for item in list(node.users):
            item.replace_all_uses_with(results[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def _holds_region(x: Any, module: nn.Module) -> bool:
    if not isinstance(x, fx.Node) or x.op != "get_attr":
        return False
    return isinstance(getattr(module, str(x.target), None), fx.GraphModule)


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a node's value; () if it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def is_float(node: Any) -> bool:
    """Whether a node's value is a tensor of the type that kernels take."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype is torch.float32


def spatial_size(node: Node, layout: str) -> tuple[int, int]:
    """Height and width of a value of a layout; (N, 1) for tokens, (1, 1) for a vector."""
    shape = shape_of(node)
    if layout == "BC":
        return 1, 1
    if layout == "BNC":
        return shape[1], 1
    return (shape[2], shape[3]) if layout == "BCHW" else (shape[1], shape[2])


def layouts_of(node: Node) -> tuple[str, str] | None:
    """Layouts of a map before and after a permutation of its axes; None for anything else."""
    if base_name(node) != "permute":
        return None
    order = "".join(str(int(axis) % len(node.args[1])) for axis in node.args[1])
    return {"0231": ("BCHW", "BHWC"), "0312": ("BHWC", "BCHW")}.get(order)


def is_whole_slice(node: Node) -> bool:
    """Whether a node is a slice that leaves nothing out."""
    return base_name(node) == "slice" and shape_of(node) == shape_of(node.args[0])


def keeps_type(node: Node) -> bool:
    """Whether a conversion changes neither type nor device."""
    before, after = node.args[0].meta["val"], node.meta["val"]
    return before.dtype == after.dtype and before.device == after.device


def padding_before(conv: Node) -> tuple[int, int]:
    """Padding at the top and at the left of a convolution."""
    values = conv_arguments(conv)
    if not isinstance(values["padding"], str):
        return pair(values["padding"])
    if values["padding"] == "valid":
        return 0, 0
    dilation, kernel = pair(values["dilation"]), conv.args[1].meta["val"].shape[2:]
    return (int(kernel[0]) - 1) * dilation[0] // 2, (int(kernel[1]) - 1) * dilation[1] // 2


def activation_of(node: Node) -> tuple[str, float] | None:
    """Name of a kernel's activation, and its slope."""
    name = base_name(node)
    if name == "hardtanh":
        bounds = tuple(float(x) for x in node.args[1:3])
        return ("relu6", 0.01) if bounds == (0.0, 6.0) else None
    if name == "leaky_relu":
        slope = float(node.args[1]) if len(node.args) > 1 else 0.01
        return "leaky_relu", slope
    if name == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        return "gelu_tanh", 0.01
    return (name, 0.01) if name in kernels.ACTIVATIONS else None


def is_global_mean(node: Node) -> bool:
    """Whether a node is the mean of each channel over all pixels."""
    name = base_name(node)
    if name == "adaptive_avg_pool2d":
        return pair(node.args[1]) == (1, 1)
    return name == "mean" and len(node.args) > 1 and mean_layout(node) != ""


def mean_layout(node: Node) -> str:
    """Layout of the map that a global mean reads; "" if it is none."""
    if base_name(node) == "adaptive_avg_pool2d":
        return "BCHW"
    shape = shape_of(node.args[0])
    if not shape or not isinstance(node.args[1], list | tuple):
        return ""
    axes = tuple(sorted(int(d) % len(shape) for d in node.args[1]))
    return {(4, (2, 3)): "BCHW", (4, (1, 2)): "BHWC", (3, (1,)): "BNC"}.get((len(shape), axes), "")


def is_pixelwise(node: Node) -> bool:
    """Whether each pixel of the result depends on that pixel of the maps it reads alone."""
    return base_name(node) in {name.removesuffix("_") for name in ELEMENTWISE} | {"batch_norm"}


def out_of_place(node: Node) -> Callable[..., Any]:
    """The operator itself, or the one that does the same but not in place, on any strides."""
    target = node.target
    name = operator_name(node)
    if name in ("view", "_unsafe_view"):  # strides may differ from those at export
        return torch.ops.aten.reshape.default
    if not name.endswith("_") or name.startswith("_"):
        return target
    packet = getattr(torch.ops.aten, name.removesuffix("_"))
    function: Callable[..., Any] = getattr(packet, target._overloadname)
    return function
