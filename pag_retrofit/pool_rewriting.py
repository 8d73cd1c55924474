"""Rewriting a block whose pixels choose a branch: MultiPool with an identity, and ASPP."""

from __future__ import annotations

from torch import nn

from pag_retrofit.functional import computed_choice, computed_mask
from pag_retrofit.gates import Gate
from pag_retrofit.locality import Node
from pag_retrofit.multipool import BranchFill
from pag_retrofit.pool_sites import AsppBranch, AsppSite
from pag_retrofit.rewriting import BlockRewriter
from pag_retrofit.sites import Site
from pag_retrofit.tracing import UntraceableError, ancestors


class PoolRewriter(BlockRewriter):
    """Inserts gates, and selectors that act outside the one module they belong to."""

    def insert(self, site: Site, gate: Gate) -> None:
        """Put a site's gate or selector into the graph.

        Raises:
            UntraceableError: The block's own graph does not show what the exported one did.
        """
        if site.kind == "multipool":
            self._insert_choice(site, gate)
        elif isinstance(site, AsppSite):
            self._insert_fills(site, gate)
        else:
            super().insert(site, gate)

    def _insert_choice(self, site: Site, selector: Gate) -> None:
        """Give a MultiPool convolution its choice, and pass the input on where it is identity."""
        call = self._only_call(site)
        entry = call.args[0]
        choice = self._call_gate("pag_pool_" + call.target.replace(".", "_"), selector, entry)
        with self.graph.inserting_before(call):
            mask = self.graph.call_function(computed_mask, (choice,))
            among = self.graph.call_function(computed_choice, (choice,))
        call.args = (entry, among)
        self._mix_in(call, mask, site)

    def _insert_fills(self, site: AsppSite, selector: Gate) -> None:
        """Replace each branch of a concatenation by a constant where it is not computed."""
        cats = [
            node
            for node in self.graph.nodes
            if self._kind(node) in ("cat", "concat") and len(node.args[0]) == site.inputs
        ]
        if len(cats) != 1:
            raise UntraceableError(f"the block shows {len(cats)} concatenations of its branches")
        choice = self._call_gate("pag_pool", selector, self._entry(self._above(cats[0])))
        inputs = list(cats[0].args[0])
        for index, branch in enumerate(site.branches, 1):
            name = f"pag_fill_{index}"
            self.gates[name] = self._fill(branch, (site.start, index))
            with self.graph.inserting_before(cats[0]):
                inputs[branch.position] = self.graph.create_node(
                    "call_module", name, (inputs[branch.position], choice)
                )
        cats[0].args = (inputs, *cats[0].args[1:])

    def _fill(self, branch: AsppBranch, choices: tuple[int, int]) -> BranchFill:
        norm = self.block.get_submodule(branch.norm.removeprefix(f"{self.path}."))
        known = norm if branch.norm and isinstance(norm, nn.BatchNorm2d) and norm.affine else None
        like = next(self.block.parameters())
        fill = BranchFill(known, branch.channels, choices).to(like.device, like.dtype)
        return fill.train(self.block.training)

    def _above(self, node: Node) -> list[Node]:
        """What a node depends on inside the block."""
        bits = ancestors(self.graph)[node]
        return [
            other
            for position, other in enumerate(self.graph.nodes)
            if bits >> position & 1
            and other is not node
            and other.op not in ("placeholder", "get_attr")
        ]
