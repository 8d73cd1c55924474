"""Rewriting one block: gates go into its traced graph, and the block goes back under its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from pag_retrofit.functional import (
    apply_mask,
    mask_as,
    mask_pool_input,
    mix,
    renormalize_pool,
    subsample,
)
from pag_retrofit.gates import Gate
from pag_retrofit.locality import ACTIVATIONS, Node, Pool
from pag_retrofit.sites import Site
from pag_retrofit.tracing import UntraceableError, ancestors, trace_block

_ADDS = ("add", "iadd", "add_")
_POOLS = {
    "mean": "mean",
    "adaptive_avg_pool2d": "mean",
    "AdaptiveAvgPool2d": "mean",
    "norm": "norm",
}


class GatedBlock(fx.GraphModule):
    """A block with gates in its forward; everything else of the original block is still there.

    `fx.GraphModule` keeps only what its graph refers to, also when it is copied or unpickled;
    this class keeps all children, parameters, buffers and plain attributes of the block, so that
    state-dict keys and code that looks at the block do not change.
    """

    @classmethod
    def from_block(
        cls, block: nn.Module, graph: fx.Graph, gates: Mapping[str, nn.Module]
    ) -> GatedBlock:
        """Wrap a block whose graph calls the given gates; its content is shared, not copied."""
        shell = nn.Module()
        shell.__dict__.update(_contents(block))
        shell.__dict__["_modules"].update(gates)
        gated = cls(shell, graph, class_name=f"Gated{type(block).__name__}")
        for key, value in shell.__dict__.items():
            gated.__dict__[key] = value
        gated.__dict__["pag_original"] = (block,)  # a tuple: not registered as a child
        return gated

    def ungated(self) -> nn.Module:
        """Give the original block back, with the current weights."""
        block: nn.Module = self.__dict__["pag_original"][0]
        for registry in ("_parameters", "_buffers", "_modules"):
            own = block.__dict__[registry]
            for key in own:
                own[key] = self.__dict__[registry][key]
        block.training = self.training
        return block

    def __deepcopy__(self, memo: dict[int, Any]) -> GatedBlock:
        """Copy everything, not only what the graph refers to."""
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        for key, value in self.__dict__.items():
            if key != "_graph":
                result.__dict__[key] = copy.deepcopy(value, memo)
        result.graph = copy.deepcopy(self._graph)
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle what the graph module pickles, and the rest of the block."""
        build, arguments = super().__reduce__()
        rest = {k: v for k, v in self.__dict__.items() if k != "_graph"}
        return _rebuild, (build, arguments, rest)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module, with registries of its own (so that adding to them is safe)."""
    return {
        key: dict(value) if key in ("_parameters", "_buffers", "_modules") else value
        for key, value in module.__dict__.items()
    }


def _rebuild(
    build: Callable[..., Any], arguments: tuple[Any, ...], rest: dict[str, Any]
) -> nn.Module:
    module: nn.Module = build(*arguments)
    module.__dict__.update(rest)
    return module


class BlockRewriter:
    """Inserts the gates of all sites that one block owns.

    Args:
        block: The module that owns the sites; it is not modified.
        path: Its path in the network.
        layers: All layers that the network's forward pass uses.
        opened: Paths inside the block of modules to trace through; None for all.
        leaves: Paths inside the block of modules that are rewritten themselves.
        constants: Arguments of the block that have one value in every call.

    Raises:
        UntraceableError: The block cannot be traced.
    """

    def __init__(
        self,
        block: nn.Module,
        path: str,
        layers: frozenset[str],
        opened: frozenset[str] | None,
        leaves: frozenset[str],
        constants: dict[str, Any],
    ):
        """Trace the block."""
        self.block = block
        self.path = path
        self.layers = layers
        self.graph = trace_block(block, opened, leaves, constants)
        self.gates: dict[str, nn.Module] = {}

    def insert(self, site: Site, gate: Gate) -> None:
        """Put a site's gate into the graph.

        Raises:
            UntraceableError: The block's own graph does not show what the exported one did.
        """
        if site.kind == "branch":
            self._insert_branch(site, gate)
        else:
            self._insert_identity(site, gate)

    def finish(self) -> GatedBlock:
        """Return the block with its gates."""
        self.graph.lint()
        return GatedBlock.from_block(self.block, self.graph, self.gates)

    def _insert_branch(self, site: Site, gate: Gate) -> None:
        assert site.add_index is not None
        add = self._addition(site.add_index)
        branch, shortcut = add.args[site.operand], add.args[1 - site.operand]
        inside = self._exclusive(branch, shortcut)
        entry = self._entry(inside)
        self._check_layers(site, inside)
        pools = [n for n in inside if self._is_pool(n) and n.args[0] in inside]
        if [_POOLS[self._kind(n)] for n in pools] != [pool.operator for pool in site.pools]:
            raise UntraceableError(
                f"{len(pools)} reductions over pixels found in the block, {len(site.pools)} in "
                "the exported graph"
            )
        mask = self._call_gate(
            "pag_gate" + (f"_{site.add_index}" if site.add_index else ""), gate, entry
        )
        for node, pool in zip(pools, site.pools, strict=True):
            self._mask_pool(node, mask, pool)
        with self.graph.inserting_before(add):
            gated = self.graph.call_function(apply_mask, (branch, self._laid(mask, site.layout)))
        arguments = list(add.args)
        arguments[site.operand] = gated
        add.args = tuple(arguments)

    def _laid(self, mask: Node, layout: str) -> Node:
        return mask if layout == "BCHW" else self.graph.call_function(mask_as, (mask, layout))

    def _insert_identity(self, site: Site, gate: Gate) -> None:
        call = self._only_call(site)
        mask = self._call_gate("pag_gate_" + call.target.replace(".", "_"), gate, call.args[0])
        self._mix_in(call, mask, site)

    def _only_call(self, site: Site) -> Node:
        """The call of the convolution that a site is named after."""
        relative = site.name.removeprefix(self.path + ".")
        calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == relative]
        if len(calls) != 1:
            raise UntraceableError(f"{relative} is called {len(calls)} times in the block")
        return calls[0]

    def _mix_in(self, call: Node, mask: Node, site: Site) -> None:
        """Let the closed pixels of conv -> norm -> activation pass the input on."""
        entry, end = call.args[0], self._chain_end(call)
        with self.graph.inserting_after(end):
            mixed = self.graph.call_function(mix)
        end.replace_all_uses_with(mixed)
        with self.graph.inserting_before(mixed):
            bypass = self.graph.call_function(subsample, (entry, site.cost.stride))
        mixed.args = (end, bypass, mask)

    def _chain_end(self, node: Node) -> Node:
        """Last node of the norm and activation that follow a convolution."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self._is_norm_or_activation(user):
                break
            node = user
        return node

    def _is_norm_or_activation(self, node: Node) -> bool:
        if node.op == "call_module":
            module = self.block.get_submodule(str(node.target))
            if isinstance(module, nn.BatchNorm2d):
                return True
            origin = type(module).__module__
            return origin in ("torch.nn.modules.activation", "timm.layers.activations") and (
                next(module.children(), None) is None
            )
        return self._kind(node) in ACTIVATIONS

    def _call_gate(self, name: str, gate: Gate, entry: Node) -> Node:
        while name in self.gates:  # a.b_c and a_b.c
            name += "_"
        self.gates[name] = gate
        after = entry
        if entry.op == "placeholder":  # placeholders stay together at the top
            after = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(after):
            return self.graph.create_node("call_module", name, (entry,))

    def _is_pool(self, node: Node) -> bool:
        """Tell a reduction over pixels from one over channels: it goes over two axes, or pools."""
        kind = self._kind(node)
        if kind not in _POOLS or not node.args:
            return False
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return "pool" in kind.lower() or (isinstance(dims, list | tuple) and len(dims) == 2)

    def _mask_pool(self, node: Node, mask: Node, pool: Pool) -> None:
        with self.graph.inserting_before(node):
            laid = self._laid(mask, pool.layout)
            masked = self.graph.call_function(mask_pool_input, (node.args[0], laid))
        node.args = (masked, *node.args[1:])
        if pool.operator == "norm":
            return  # the sum of squares over computed pixels; only its ratios are used
        with self.graph.inserting_after(node):
            renormalized = self.graph.call_function(renormalize_pool)
        node.replace_all_uses_with(renormalized)
        renormalized.args = (node, mask)

    def _addition(self, index: int) -> Node:
        """The block's own addition with an index, counted as in the exported graph."""
        own = [
            node
            for node in self.graph.nodes
            if self._kind(node) in _ADDS
            and len(node.args) == 2
            and all(isinstance(argument, fx.Node) for argument in node.args)
            and not node.meta.get("nn_module_stack")
        ]
        if index >= len(own):
            raise UntraceableError(f"the block shows {len(own)} additions of its own")
        return own[index]

    def _exclusive(self, branch: Any, shortcut: Any) -> list[Node]:
        found = ancestors(self.graph)
        bits = found[branch] & ~found[shortcut]
        return [
            node
            for position, node in enumerate(self.graph.nodes)
            if bits >> position & 1 and node.op not in ("placeholder", "get_attr")
        ]

    def _entry(self, inside: list[Node]) -> Node:
        members = set(inside)
        entries = {
            parent
            for node in inside
            for parent in node.all_input_nodes
            if parent not in members and parent.op != "get_attr"
        }
        if len(entries) != 1:
            raise UntraceableError(f"the branch reads {len(entries)} tensors in the block")
        return entries.pop()

    def _check_layers(self, site: Site, inside: list[Node]) -> None:
        """The traced branch must hold exactly the layers of the exported one."""
        traced = set()
        for node in inside:
            if node.op == "call_module":
                module = self.block.get_submodule(str(node.target))
                for name, _ in module.named_modules(prefix=f"{self.path}.{node.target}"):
                    traced.add(name)
        if traced & self.layers != set(site.layers) & self.layers:
            raise UntraceableError(
                f"the traced branch holds {sorted(traced & self.layers)}, the exported one "
                f"{sorted(site.layers)}"
            )

    def _kind(self, node: Node) -> str:
        if node.op == "call_module":
            gate = self.gates.get(str(node.target))
            return type(gate or self.block.get_submodule(str(node.target))).__name__
        if node.op == "call_method":
            return str(node.target)
        return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
