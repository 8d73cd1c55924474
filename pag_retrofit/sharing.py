"""Fewer passes over whole maps: the fewer pixels are computed, the more of the time they take.

Gates: the blocks of a stage read one map, which each changes at its open pixels only. The weights
of all their gates are applied when the first one reads the map; later, only changed pixels are
weighed again.

Activations: a shortcut that is interpolated, and then added to at open pixels, is activated as it
is interpolated, and at open pixels by the convolution that adds.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pag_retrofit.demand import EVERYWHERE, Demand, Masked, either
from pag_retrofit.execution import (
    Activate,
    Allocate,
    Buffer,
    Convolve,
    Decide,
    Interpolate,
    Source,
    Step,
    Value,
    Weigh,
)

_LEAST = 1 << 19  # floats of a map; smaller ones lie in the cache of a core, and are read fast


@dataclass(frozen=True)
class _Version:
    """A value as one that was changed at the open pixels of masks, one after the other."""

    of: str
    changes: tuple[str, ...] = ()


def weigh_together(steps: Sequence[Step]) -> list[Step]:
    """Let gates that read the same map, or changed versions of it, weigh its pixels together.

    Args:
        steps: Of a program, in order.

    Returns:
        The steps, with others before each such gate.
    """
    versions = _versions(steps)
    before: dict[int, list[Step]] = defaultdict(list)
    result = list(steps)
    for indices in _groups(steps, versions):
        _join(result, indices, versions, before)
    return [step for index, last in enumerate(result) for step in (*before[index], last)]


def _versions(steps: Sequence[Step]) -> dict[str, _Version]:
    """Of which map each map that is allocated is a version."""
    writers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        writers[step.writes].append(step)
    versions: dict[str, _Version] = {}
    for name, (first, *others) in writers.items():
        masks = tuple(dict.fromkeys(_changing(others)))
        versions[name] = _Version(name)
        if isinstance(first, Allocate) and first.copied and "" not in masks:
            before = versions.get(first.copied, _Version(first.copied))
            versions[name] = _Version(before.of, before.changes + masks)
    return versions


def _changing(steps: Sequence[Step]) -> Iterator[str]:
    """Mask of the pixels that each step writes; "" if that is not known."""
    for step in steps:
        where = step.where if isinstance(step, Convolve) else None
        yield where.mask if isinstance(where, Masked) and where.wanted else ""


def _groups(steps: Sequence[Step], versions: dict[str, _Version]) -> Iterator[list[int]]:
    """Places of gates, in order, each of which reads a later version of one map."""
    open_: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        if not (isinstance(step, Decide) and _reads_all(step)):
            continue
        version = _read_by(step, versions)
        group = open_.setdefault(version.of, [])
        if group:
            last = _read_by(steps[group[-1]], versions).changes
            if version.changes[: len(last)] != last:
                yield group
                group = open_[version.of] = []
        group.append(index)
    yield from open_.values()


def _read_by(step: Step, versions: dict[str, _Version]) -> _Version:
    assert isinstance(step, Decide)
    name = step.sources[0].value
    return versions.get(name, _Version(name))


def _reads_all(step: Decide) -> bool:
    """Whether a gate reads every pixel of one large map as it is."""
    source, channels = step.sources[0], step.gate.weight.numel()
    plain = len(step.sources) == 1 and source.upsampling == 1 and not source.scale
    whole = step.gate.cost.stride == (1, 1) and step.offset == (0, 0) and step.before is None
    return plain and whole and math.prod(step.shape) * channels >= _LEAST


def _join(
    steps: list[Step],
    indices: Sequence[int],
    versions: dict[str, _Version],
    before: dict[int, list[Step]],
) -> None:
    """Let the gates at some places share one map of what they make of the pixels."""
    gates = [step for step in (steps[index] for index in indices) if isinstance(step, Decide)]
    if len(gates) < 2:
        return
    batch, _, height, width = gates[0].shape
    weighed = f"{gates[0].writes}.weighed"
    buffer = Buffer((batch, height, width, len(gates)), "BCHW")
    before[indices[0]].append(Allocate(writes=weighed, buffer=buffer))
    seen: tuple[str, ...] = ()
    where: Demand
    changed: list[Demand]
    for number, (index, gate) in enumerate(zip(indices, gates, strict=True)):
        changes = _read_by(gate, versions).changes
        changed = [Masked(mask) for mask in changes[len(seen) :]]
        if number == 0 or changed:
            left = tuple(later.gate for later in gates[number:])
            where = functools.reduce(either, changed) if number else EVERYWHERE
            before[index].append(
                Weigh(writes=weighed, gates=left, source=gate.sources[0], where=where)
            )
        seen = changes
        source = Source(weighed, "BCHW")
        steps[index] = replace(gate, sources=(source,), weighed=number)


def activate_early(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Step]:
    """Let interpolations and convolutions activate what they write, where a later step would.

    Args:
        steps: Of a program, in order.
        outputs: Of the program.

    Returns:
        The steps, without those that are not needed any more.
    """
    result = list(steps)
    for step in steps:
        if isinstance(step, Activate):
            shared = _activated_early(result, step, outputs)
            result = result if shared is None else shared
    return result


def _activated_early(
    steps: list[Step], last: Activate, outputs: Sequence[Any]
) -> list[Step] | None:
    """The steps without one activation; None if it is needed."""
    first, *adding = [step for step in steps if step.writes == last.writes and step is not last]
    masks = set(_changing(adding))
    if not isinstance(first, Allocate) or len(masks) != 1 or not _add_before_activation(adding):
        return None
    filling = [step for step in steps if step.writes == first.copied]
    readers = [step for step in steps if first.copied in step.reads()]
    interpolation, (mask,) = filling[-1] if filling else first, masks
    if not isinstance(interpolation, Interpolate) or interpolation.activation != "none":
        return None
    known = [step.writes for step in steps[: steps.index(interpolation)]]
    if mask not in known or readers != [first] or Value(first.copied) in outputs:
        return None
    for step in adding:
        assert isinstance(step, Convolve)
        step.layer.activation, step.layer.slope = last.activation, last.slope
    activating = replace(interpolation, activation=last.activation, slope=last.slope, spared=mask)
    changed = [activating if step is interpolation else step for step in steps]
    return [step for step in changed if step is not last]


def _add_before_activation(steps: Sequence[Step]) -> bool:
    """Whether all steps are convolutions that add to what is there, and activate nothing."""
    return all(
        isinstance(step, Convolve)
        and step.accumulate
        and not step.residual_after
        and step.layer.activation == "none"
        for step in steps
    )
