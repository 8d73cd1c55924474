"""The two graphs of the surgery: the whole network's, to find sites, and one block's, to rewrite.

The whole network is exported (`torch.export`, ATen operators with shapes and owners): nothing is
ever run from that graph. A block is traced symbolically with every module that holds no other
module as a leaf, so that state-dict keys and train/eval behaviour stay those of the modules.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
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
class ConvCall:
    """How a forward pass calls an `nn.Conv2d`, or an instance of a derived class.

    Args:
        input_size: (H, W).
        output_size: (h, w).
        maps: Batch size that it sees.
        macs: Per image of the network's input, all calls together.
        times: Number of calls.
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    maps: int
    macs: int
    times: int = 1


@dataclass(frozen=True)
class NetworkGraph:
    """The exported network.

    Args:
        graph: ATen-level graph in evaluation mode; empty if there is a `failure`.
        parameter_of: Placeholder name -> state-dict name of the parameter or buffer.
        total_macs: Per image, everything that `FlopCounterMode` counts.
        images: Batch size of the example.
        calls: Convolution module -> how it is called.
        failure: Why `torch.export` cannot follow the network, or "".
    """

    graph: fx.Graph
    parameter_of: dict[str, str]
    total_macs: int
    images: int
    calls: dict[str, ConvCall]
    failure: str = ""

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

    A network that runs but cannot be exported gives an empty graph: its convolutions are known
    from their calls alone.

    Raises:
        PagError: The network does not run on the example.
    """
    images = max(example.shape[0], 1)
    with in_mode(model):
        macs, calls = _run(model, example)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(model, (example,), strict=False)
        except Exception as error:
            failure = f"torch.export cannot follow the network: {_first_line(error)}"
            return NetworkGraph(fx.Graph(), {}, macs // images, images, calls, failure)
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return NetworkGraph(exported.graph, dict(names), macs // images, images, calls)


def _run(model: nn.Module, example: Tensor) -> tuple[int, dict[str, ConvCall]]:
    """Run once; return the MACs of the batch and the calls of convolutions.

    Nothing is computed, unless the network looks at values to decide what to do.
    """
    calls: dict[str, ConvCall] = {}
    handles = [
        module.register_forward_hook(_record_call(calls, name, max(example.shape[0], 1)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    return _count_macs(model, mode.from_tensor(example)), calls
            except Exception:
                calls.clear()
                return _count_macs(model, example), calls
    except Exception as error:
        raise PagError(
            f"example_input of shape {tuple(example.shape)}: {type(model).__name__} does not run "
            f"on it ({_first_line(error)}); pass a shape that the network accepts"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _count_macs(model: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


def _record_call(calls: dict[str, ConvCall], name: str, images: int) -> Callable[..., None]:
    def hook(conv: nn.Conv2d, inputs: tuple[Any, ...], output: Any) -> None:
        if not inputs or not isinstance(output, Tensor) or output.dim() != 4:
            return
        earlier = calls.get(name)
        macs = output.numel() * math.prod(conv.weight.shape[1:]) // images
        calls[name] = ConvCall(
            (inputs[0].shape[2], inputs[0].shape[3]),
            (output.shape[2], output.shape[3]),
            output.shape[0],
            macs + (earlier.macs if earlier else 0),
            1 + (earlier.times if earlier else 0),
        )

    return hook


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
    """Traces one block; modules inside it are called, as far as they need not be looked into.

    Args:
        opened: Paths inside the block of modules to trace through; None for every module that
            holds others, except timm's own leaves.
        leaves: Paths of modules never to trace through.
    """

    def __init__(
        self, opened: frozenset[str] | None = None, leaves: frozenset[str] = frozenset()
    ) -> None:
        """Register timm's leaf functions."""
        from timm.models import get_notrace_functions, get_notrace_modules

        super().__init__(
            autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True
        )
        self._leaf_types = (fx.GraphModule, *get_notrace_modules())
        self._leaf_paths = leaves
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is called rather than traced through."""
        if module_qualified_name in self._leaf_paths:
            return True
        if self._opened is not None:
            return module_qualified_name not in self._opened
        return next(m.children(), None) is None or isinstance(m, self._leaf_types)


def trace_block(
    block: nn.Module, opened: frozenset[str] | None, leaves: frozenset[str] = frozenset()
) -> fx.Graph:
    """Trace a block so that the graph holds in training and in evaluation.

    Args:
        block: The block.
        opened: Paths inside it of modules to trace through; None for all that hold others.
        leaves: Paths inside it of modules to call rather than trace through.

    Raises:
        UntraceableError: It cannot be traced, or its forward depends on the mode.
    """
    graphs = []
    for training in (True, False):
        try:
            with in_mode(block, training):
                graphs.append(BlockTracer(opened, leaves).trace(block))
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
