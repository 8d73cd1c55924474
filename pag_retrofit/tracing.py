"""The two graphs of the surgery: the whole network's, to find sites, and one block's, to rewrite.

The whole network is exported (`torch.export`, ATen operators with shapes and owners): nothing is
ever run from that graph. A block is traced symbolically with every module that holds no other
module as a leaf, so that state-dict keys and train/eval behaviour stay those of the modules.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config
from torch.fx._symbolic_trace import _assert_is_none
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)
from torch.utils.flop_counter import flop_registry

from pag_retrofit.errors import PagError

LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear)


class UntraceableError(PagError):
    """A block that cannot be rewritten; the message is the reason that the plan shows."""


@dataclass(frozen=True)
class ConvCall:
    """How a forward pass calls an `nn.Conv2d`, or an instance of a derived class.

    Args:
        input_size: (H, W).
        output_size: (h, w).
        maps: Batch size that it sees.
        times: Number of calls.
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    maps: int
    times: int = 1


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Of the two products of (B, heads, L, D) tensors, masked pairs included."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(pairs * (query.shape[-1] + value.shape[-1]))


def _multi_head_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """The same with the four projections, of (B, L, E) tensors."""
    batch, length, width = query.shape
    projections = 2 * batch * (length + key.shape[1]) * width**2
    return int(projections) + _attention_macs(query, key, value)


def _encoder_layer_macs(source: Tensor, *others: Any, **_: Any) -> int:
    """The same with the two linear layers that follow."""
    first, second = others[13], others[15]
    tokens = math.prod(source.shape[:-1])
    return _multi_head_macs(source, source, source) + tokens * (first.numel() + second.numel())


_FUSED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_macs,
    torch.ops.aten._native_multi_head_attention: _multi_head_macs,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer_macs,
}
"""Operators of the CPU that `torch.utils.flop_counter` has no formula for."""


@functools.cache
def _is_composite(operator: Any) -> bool:
    """Whether an operator is made of others on every device."""
    return operator is not torch.ops.prim.device.default and bool(operator._can_decompose())


class MacCounter(TorchDispatchMode):
    """Counts multiply-accumulates by the formulas of `torch.utils.flop_counter`.

    Its own mode follows modules as well, which fails where a parameter is passed to a module
    without gradients being recorded. And it leaves out attention that is one operator on the CPU,
    as it counts it elsewhere: a network would have other budgets there.

    Attributes:
        macs: So far.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        flops, macs = flop_registry.get(func._overloadpacket), _FUSED.get(func._overloadpacket)
        if flops is macs is None and _is_composite(func):
            with self:  # in inference mode, operators made of others arrive here whole
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if macs is not None:
            self.macs += macs(*args, **kwargs)
        elif flops is not None:
            self.macs += flops(*args, **kwargs, out_val=result) // 2
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operators run as fast as without it; those within another mode are counted on."""
        innermost = _get_current_dispatch_mode() is self
        with _pop_mode_temporarily() if innermost else contextlib.nullcontext():
            yield


class Observation:
    """What one forward pass shows: MACs, calls of convolutions, plain arguments of modules.

    Args:
        images: Batch size of the example.

    Attributes:
        macs: MACs per image of all operators.
        layer_macs: Path of a convolution or linear layer -> its MACs per image; a layer with
            several names is under each of them, here and below.
        calls: Path of an `nn.Conv2d` -> how it is called.
        constants: Module path -> its arguments that do not depend on the input (None, flags,
            rates, names), if every call has the same; None if they differ. All modules that are
            called have an entry.
        maps: Paths of modules that take one tensor, the first argument, and give one, in all calls.
    """

    def __init__(self, images: int) -> None:
        """Start with nothing."""
        self.images = images
        self.macs = 0
        self.layer_macs: dict[str, int] = {}
        self.calls: dict[str, ConvCall] = {}
        self.constants: dict[str, dict[str, Any] | None] = {}
        self.maps: set[str] = set()

    def run(self, model: nn.Module, example: Tensor) -> None:
        """Run a copy of a network in evaluation mode.

        Nothing is computed, unless the network looks at values to decide what to do.

        Raises:
            PagError: The network does not run on the example.
        """
        copied = shadow(model)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, quietly():
                self._run(copied, mode.from_tensor(example))
        except Exception:
            try:
                self._run(shadow(model), example)
            except Exception as error:
                raise PagError(
                    f"example_input of shape {tuple(example.shape)}: {type(model).__name__} does "
                    f"not run on it ({_first_line(error)}); pass a shape that the network accepts"
                ) from error

    def _run(self, model: nn.Module, example: Tensor) -> None:
        for found in (self.layer_macs, self.calls, self.constants, self.maps):
            found.clear()
        with contextlib.ExitStack() as hooks:  # the model may be the user's own: see `shadow`
            for name, module in model.named_modules(remove_duplicate=False):
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no such hooks
                for handle in self._watch(name, module):
                    hooks.callback(handle.remove)
            with warnings.catch_warnings(), torch.no_grad(), in_mode(model):
                warnings.simplefilter("ignore")
                with MacCounter() as counter:
                    model(example)
        self.macs = counter.macs // self.images

    def _watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Register hooks; their handles."""
        yield module.register_forward_pre_hook(self._note_arguments(name), with_kwargs=True)
        yield module.register_forward_hook(self._note_tensors(name), with_kwargs=True)
        if isinstance(module, LAYER_TYPES):
            yield module.register_forward_hook(self._note_layer(name))

    def _note_layer(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not isinstance(output, Tensor):
                return
            weight = layer.weight
            assert isinstance(weight, Tensor)
            counted = inputs[0] if getattr(layer, "transposed", False) else output
            macs = counted.numel() * math.prod(weight.shape[1:]) // self.images
            self.layer_macs[name] = self.layer_macs.get(name, 0) + macs
            if isinstance(layer, nn.Conv2d) and output.dim() == 4:
                earlier = self.calls.get(name)
                sizes = [(int(t.shape[2]), int(t.shape[3])) for t in (inputs[0], output)]
                times = earlier.times + 1 if earlier else 1
                self.calls[name] = ConvCall(sizes[0], sizes[1], int(output.shape[0]), times)

        return hook

    def _note_arguments(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            constants = {
                key: value
                for key, value in bound.arguments.items()
                if value is None or isinstance(value, bool | float | str)
            }
            first = name not in self.constants
            if first:
                self.maps.add(name)
            self.constants[name] = constants if first or self.constants[name] == constants else None

        return hook

    def _note_tensors(self, name: str) -> Callable[..., None]:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            one = len(given) == 1 and bool(args) and args[0] is given[0]
            if not (one and isinstance(output, Tensor)):
                self.maps.discard(name)

        return hook


@dataclass(frozen=True)
class NetworkGraph:
    """The exported network.

    Args:
        graph: ATen-level graph in evaluation mode; empty if there is a `failure`.
        parameter_of: Placeholder name -> state-dict name of the parameter or buffer.
        observed: What a forward pass showed.
        failure: Why `torch.export` cannot follow the network, or "".
    """

    graph: fx.Graph
    parameter_of: dict[str, str]
    observed: Observation
    failure: str = ""

    @property
    def total_macs(self) -> int:
        """Of the network, per image."""
        return self.observed.macs

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


def shadow(module: nn.Module) -> nn.Module:
    """Copy a module but not its tensors, so that what a trial run caches in it does no harm."""
    tensors = [*module.parameters(), *module.buffers()]
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    except Exception:  # it cannot be copied: hope that it caches nothing
        return module


def export_network(model: nn.Module, example: Tensor) -> NetworkGraph:
    """Export a network in evaluation mode; the network itself is left as it was.

    A network that runs but cannot be exported gives an empty graph: its convolutions are known
    from their calls alone.

    Raises:
        PagError: The network does not run on the example.
    """
    observed = Observation(max(example.shape[0], 1))
    observed.run(model, example)
    copied = shadow(model)
    with in_mode(copied), quietly():
        try:
            exported = torch.export.export(copied, (example,), strict=False)
        except Exception as error:
            failure = f"torch.export cannot follow the network: {_first_line(error)}"
            return NetworkGraph(fx.Graph(), {}, observed, failure)
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return NetworkGraph(exported.graph, dict(names), observed)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence what torch says of a network that it cannot follow: one line says it later.

    Nor are stack traces kept of every node: to make them takes long, and nobody reads them.
    """
    disabled = logging.root.manager.disable
    traceless = getattr(fx_config, "do_not_emit_stack_traces", False)  # not in every release
    logging.disable(logging.ERROR)
    fx_config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        fx_config.do_not_emit_stack_traces = traceless


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
    block: nn.Module,
    opened: frozenset[str] | None,
    leaves: frozenset[str],
    constants: dict[str, Any],
) -> fx.Graph:
    """Trace a block so that the graph holds in training and in evaluation.

    Args:
        block: The block.
        opened: Paths inside it of modules to trace through; None for all that hold others.
        leaves: Paths inside it of modules to call rather than trace through.
        constants: Arguments that have one value in every call; the graph checks that they do.

    Raises:
        UntraceableError: It cannot be traced, or its forward depends on the mode.
    """
    block = shadow(block)
    graphs = []
    for training in (True, False):
        try:
            with in_mode(block, training):
                graphs.append(BlockTracer(opened, leaves).trace(block, constants))
        except Exception as error:
            raise UntraceableError(
                f"{type(block).__name__} cannot be traced ({_first_line(error)})"
            ) from error
    sources = [graph.python_code("self").src for graph in graphs]
    if sources[0] != sources[1]:
        raise UntraceableError(
            f"the forward of {type(block).__name__} differs between training and evaluation"
        )
    _compare_with_none(graphs[1])
    names = inspect.signature(block.forward).parameters
    for node, name in zip(graphs[1].find_nodes(op="placeholder"), names, strict=False):
        if node.target == f"{name}_{str(node.target).rpartition('_')[2]}":
            node.target = name  # constants are numbered, which callers by keyword do not know
    return graphs[1]


def _compare_with_none(graph: fx.Graph) -> None:
    """Check arguments that are None by operators: fx cannot unpickle its own check (torch 2.15)."""
    for node in graph.find_nodes(op="call_function", target=_assert_is_none):
        with graph.inserting_before(node):
            equal = graph.call_function(operator.eq, (node.args[0], None))
            graph.call_function(torch._assert, (equal, node.args[1]))
        graph.erase_node(node)


def ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """Every node a node depends on and itself, as bits in the order of the graph."""
    found: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        bits = 1 << position
        for parent in node.all_input_nodes:
            bits |= found[parent]
        found[node] = bits
    return found
