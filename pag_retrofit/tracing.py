"""The two graphs of the surgery: the whole network's, to find sites, and one block's, to rewrite.

The whole network is exported (`torch.export`, ATen operators with shapes and owners): nothing is
ever run from that graph. A block is traced symbolically with every module that holds no other
module as a leaf, so that state-dict keys and train/eval behaviour stay those of the modules.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pag_retrofit.errors import PagError


class UntraceableError(PagError):
    """A block that cannot be rewritten; the message is the reason that the plan shows."""


@dataclass(frozen=True)
class NetworkGraph:
    """The exported network.

    Args:
        graph: ATen-level graph in evaluation mode.
        parameter_of: Placeholder name -> state-dict name of the parameter or buffer.
        total_macs: Of one forward pass, everything that `FlopCounterMode` counts.
    """

    graph: fx.Graph
    parameter_of: dict[str, str]
    total_macs: int

    def owner(self, node: fx.Node) -> str:
        """Path of the innermost module whose forward created a node; "" is the network."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return stack[-1][0].split("@")[0] if stack else ""

    def value(self, node: fx.Node) -> Any:
        """Shape-carrying value of a node."""
        return node.meta.get("val")


def example_tensor(model: nn.Module, example_input: Tensor | tuple[int, ...]) -> Tensor:
    """Make an input from a shape, on the device and in the dtype of the network.

    Raises:
        PagError: It is neither a tensor nor four positive integers.
    """
    if isinstance(example_input, Tensor):
        shape = tuple(example_input.shape)
    else:
        shape = tuple(example_input) if isinstance(example_input, Sequence) else ()
    if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise PagError(
            f"example_input={example_input!r}: expected a tensor (B, C, H, W) or its shape as "
            "four positive integers, such as (1, 3, 360, 480)"
        )
    if isinstance(example_input, Tensor):
        return example_input.detach()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.zeros(shape)
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)


def export_network(model: nn.Module, example: Tensor) -> NetworkGraph:
    """Export a network in evaluation mode; the network itself is left as it was.

    Raises:
        PagError: The network does not run on the example, or cannot be exported.
    """
    with in_mode(model):
        macs = _count_macs(model, example)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(model, (example,), strict=False)
        except Exception as error:
            raise PagError(
                f"{type(model).__name__} runs on {tuple(example.shape)} but torch.export cannot "
                f"follow it: {_first_line(error)}; retrofit the part of the network that can be "
                "exported (its encoder, say)"
            ) from error
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return NetworkGraph(exported.graph, dict(names), macs)


def _count_macs(model: nn.Module, example: Tensor) -> int:
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            warnings.simplefilter("ignore")
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                model(mode.from_tensor(example))
    except Exception as error:
        raise PagError(
            f"example_input of shape {tuple(example.shape)}: {type(model).__name__} does not run "
            f"on it ({_first_line(error)}); pass a shape that the network accepts"
        ) from error
    return counter.get_total_flops() // 2


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Put a network into evaluation (or training) mode; every module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class BlockTracer(fx.Tracer):
    """Traces one block down to modules that hold no other module, and timm's own leaves."""

    def __init__(self, leaves: frozenset[str] = frozenset()) -> None:
        """Register timm's leaf functions; `leaves` are paths of further leaf modules."""
        from timm.models import get_notrace_functions, get_notrace_modules

        super().__init__(
            autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True
        )
        self._leaf_types = (fx.GraphModule, *get_notrace_modules())
        self._leaf_paths = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is called rather than traced through."""
        childless = next(m.children(), None) is None
        named = module_qualified_name in self._leaf_paths
        return childless or named or isinstance(m, self._leaf_types)


def trace_block(block: nn.Module, leaves: frozenset[str] = frozenset()) -> fx.Graph:
    """Trace a block so that the graph holds in training and in evaluation.

    Args:
        block: The block.
        leaves: Paths inside it of modules to call rather than trace through.

    Raises:
        UntraceableError: It cannot be traced, or its forward depends on the mode.
    """
    graphs = []
    for training in (True, False):
        try:
            with in_mode(block, training):
                graphs.append(BlockTracer(leaves).trace(block))
        except Exception as error:
            raise UntraceableError(
                f"{type(block).__name__} cannot be traced ({_first_line(error)})"
            ) from error
    sources = [graph.python_code("self").src for graph in graphs]
    if sources[0] != sources[1]:
        raise UntraceableError(
            f"the forward of {type(block).__name__} differs between training and evaluation"
        )
    return graphs[1]


def ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """Every node a node depends on and itself, as bits in the order of the graph."""
    found: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        bits = 1 << position
        for parent in node.all_input_nodes:
            bits |= found[parent]
        found[node] = bits
    return found
