"""Memory that an exported graph has several names for, and writes into it.

In an exported graph the result of an operator that works in place stands for the tensor it wrote
from then on, but not for other views of that memory, nor for what it is a view of: after
`mask[:8] = 1` the graph still reads `mask` by its old name. Deployed networks compute out of place,
so what is read later has to be put together from what was there and what was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pag_retrofit.locality import VIEWS, Node, operator_name

Place = tuple[tuple[int, ...], tuple[int, ...], int]
"""Size, strides and offset of a tensor in its memory."""


def spread_writes(graph: fx.Graph) -> None:
    """Let whatever is read after a write in place hold what was written; changes the graph.

    Args:
        graph: Of an exported program, with the values that it was traced with.

    Raises:
        TypeError: What is written is read as another type.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    names: dict[int, list[Node]] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        sharing = names.setdefault(int(value.untyped_storage()._cdata), [])
        stale = [name for name in sharing if _is_stale(name, node, order)]
        sharing.append(node)
        if stale:
            sharing += _spread(graph, node, stale, sharing, order)


def may_give_a_view(node: Node, function: Callable[..., Any]) -> bool:
    """Whether a result may look into the memory of an argument.

    Not all operators of torch that do so say so (`meshgrid` does not), and of some it depends on
    how arguments lie in memory.

    Args:
        node: Of an exported program, with the values that it was traced with.
        function: What is called in its place.
    """
    schema = getattr(function, "_schema", None)
    if schema is None or operator_name(node) in VIEWS or any(r.alias_info for r in schema.returns):
        return True
    read = {memory for parent in node.all_input_nodes for memory in _memories(parent)}
    return function is node.target and not read.isdisjoint(_memories(node))


def _memories(node: Node) -> list[int]:
    """Of the tensors that a node stands for."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [int(x.untyped_storage()._cdata) for x in leaves if isinstance(x, Tensor)]


def _is_stale(name: Node, write: Node, order: dict[Node, int]) -> bool:
    """Whether something reads by a name, later, what an operator writes."""
    if not operator_name(write).endswith("_") or operator_name(write).startswith("_"):
        return False
    if not any(_is_later(user, write, order) for user in name.users):
        return False
    types = name.meta["val"].dtype, write.meta["val"].dtype
    if types[0] is not types[1]:
        raise TypeError(f"{write} writes {types[1]} in place where {name} reads {types[0]}")
    return _overlap(_place(name), _place(write))


def _is_later(node: Node, write: Node, order: dict[Node, int]) -> bool:
    """Whether a node of the original graph comes after another."""
    return order.get(node, -1) > order[write]


def _spread(
    graph: fx.Graph, write: Node, stale: list[Node], sharing: list[Node], order: dict[Node, int]
) -> list[Node]:
    """Replace stale names among those that share memory; return the new ones."""
    whole = _place(sharing[0])
    before = [name for name in sharing[:-1] if _place(name) == whole][-1]
    with graph.inserting_after(write):
        after = graph.call_function(written, (before, write, whole, _place(write)))
    after.meta["val"] = before.meta["val"]
    new = [after]
    for name in stale:
        found = after
        if _place(name) != whole:
            with graph.inserting_after(new[-1]):
                found = graph.call_function(seen, (after, whole, _place(name)))
            found.meta["val"] = name.meta["val"]
            new.append(found)
        name.replace_all_uses_with(found, lambda user: _is_later(user, write, order))
    return new


def _place(node: Node) -> Place:
    value = node.meta["val"]
    return tuple(value.shape), tuple(value.stride()), int(value.storage_offset())


def _overlap(first: Place, second: Place) -> bool:
    """Whether two tensors have an element in common."""
    if first == second:
        return True
    if not all(first[0]) or not all(second[0]):
        return False
    end = max(
        1 + offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
        for size, strides, offset in (first, second)
    )
    marks = torch.zeros(end, dtype=torch.bool)
    marks.as_strided(*first).fill_(True)
    return bool(marks.as_strided(*second).any())


def written(before: Tensor, part: Tensor, whole: Place, place: Place) -> Tensor:
    """A tensor of which a part was overwritten.

    Args:
        before: The tensor.
        part: What is in that part now.
        whole: Where the tensor lies in its memory.
        place: Where the part does.
    """
    result, start = _laid(before, whole)
    start.as_strided(*place).copy_(part)
    return result


def seen(after: Tensor, whole: Place, place: Place) -> Tensor:
    """A part of a tensor; arguments as those of `written`."""
    return _laid(after, whole)[1].as_strided(*place)


def _laid(x: Tensor, whole: Place) -> tuple[Tensor, Tensor]:
    """A copy that lies in its memory as the tensor did when it was traced, and that memory."""
    size, strides, offset = whole
    end = 1 + offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
    memory = x.new_empty(end)
    result = memory.as_strided(*whole)
    result.copy_(x)
    return result, memory
