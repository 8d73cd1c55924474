"""Maps that are read as they are computed, a few rows at a time, and never written as a whole.

A large map that one step writes and only the next one reads comes from memory and goes there, which
takes longer than a pool or a depthwise convolution does. So these, with the convolutions before and
behind, are computed in bands: some rows of each map, as many as stay in the cache of a core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pag_retrofit import kernels
from pag_retrofit.execution import (
    Allocate,
    Convolve,
    InBands,
    MakeLists,
    MaxPool,
    Step,
    Value,
)

_LEAST = 1 << 17  # floats of a map; smaller ones stay in the cache of any core


def in_bands(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Step]:
    """Let maps that one step alone reads be read a few rows after they were computed.

    Args:
        steps: Of a program, in order.
        outputs: Of the program.

    Returns:
        The steps, with an `InBands` before each run of convolutions, and maybe a pool, that may be
        computed so.
    """
    result = list(steps)
    chains = _Chains(steps, outputs)
    done: set[str] = set()
    for step in steps:
        if isinstance(step, Convolve) and step.writes not in done:
            stages = chains.starting_with(step)
            done |= {stage[0].writes for stage in stages}
            if stages:
                result = _announced(result, stages)
    return result


def _announced(steps: list[Step], stages: Sequence[Sequence[Step]]) -> list[Step]:
    """The steps, where nothing but a run of them is done between its first and its last one."""
    run = [step for stage in stages for step in stage]
    begin, end = steps.index(run[0]), steps.index(run[-1])
    between = steps[begin:end]
    # Made before, maps of the run lie in other memory than what it reads.
    allocations = [step for step in between if isinstance(step, Allocate) and _is_free(step)]
    convolutions = [tuple(step for step in stage if isinstance(step, Convolve)) for stage in stages]
    lists = [MakeLists(writes=some[0].writes, convolutions=some) for some in convolutions if some]
    mark = InBands(writes=run[0].writes, stages=tuple(len(stage) for stage in stages))
    rest = [step for step in between if step not in allocations]
    return [*steps[:begin], *allocations, *lists, mark, *rest, *steps[end:]]


class _Chains:
    """Finds maps that are written and read by one step after the other.

    Args:
        steps: Of a program, in order.
        outputs: Of the program.
    """

    def __init__(self, steps: Sequence[Step], outputs: Sequence[Any]):
        """Look at who writes and reads what."""
        self.steps, self.outputs = steps, outputs
        self.places = {id(step): place for place, step in enumerate(steps)}
        self.writing: dict[str, list[Step]] = defaultdict(list)
        self.reading: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            self.writing[step.writes].append(step)
            for name in set(step.reads()):
                self.reading[name].append(step)

    def starting_with(self, first: Convolve) -> list[list[Step]]:
        """The steps of each stage, or none."""
        stages: list[list[Step]] = [self._convolutions(first.writes)]
        while len(stages) < kernels.MOST_STAGES:
            following = self._following(stages[-1])
            if not following or not self._are_together([*stages, following]):
                break
            stages.append(following)
        return stages if len(stages) > 1 else []

    def _convolutions(self, name: str) -> list[Step]:
        return [step for step in self.writing[name] if isinstance(step, Convolve)]

    def _following(self, stage: Sequence[Step]) -> list[Step]:
        """The steps that alone read what a stage writes, if these may be the next stage."""
        name = stage[0].writes
        allocation, *writing = self.writing[name]
        if not isinstance(allocation, Allocate) or writing != list(stage):
            return []
        reading = self.reading[name]
        large = allocation.buffer.floats >= _LEAST and _is_free(allocation)
        if not large or Value(name) in self.outputs or not reading or not _write_anew(stage):
            return []
        if len(reading) == 1 and isinstance(reading[0], MaxPool):
            return reading
        alike = reading == self._convolutions(reading[0].writes)
        return reading if alike and _read_only(reading, name) and _is_light(stage, reading) else []

    def _are_together(self, stages: Sequence[Sequence[Step]]) -> bool:
        """Whether nothing else is done between steps; so masks are known before the first, too."""
        run = [step for stage in stages for step in stage]
        places = [self.places[id(step)] for step in run]
        between = [s for s in self.steps[places[0] : places[-1] + 1] if not isinstance(s, Allocate)]
        few = all(len(stage) <= kernels.MOST_TOGETHER for stage in stages)
        return few and between == run


def _write_anew(stage: Sequence[Step]) -> bool:
    """Whether convolutions add to nothing."""
    return all(
        isinstance(step, Convolve) and not step.accumulate and step.residual is None
        for step in stage
    )


def _read_only(steps: Sequence[Step], name: str) -> bool:
    """Whether convolutions read one map as it is, and do not add it."""
    return all(
        isinstance(step, Convolve)
        and [source.value for source in step.sources] == [name]
        and step.sources[0].upsampling == 1
        and not step.sources[0].scale
        and (step.residual is None or step.residual.value != name)
        for step in steps
    )


def _is_light(stage: Sequence[Step], following: Sequence[Step]) -> bool:
    """Whether one of two stages takes less time to multiply than to read and write."""
    return any(
        all(isinstance(step, Convolve) and step.layer.groups > 1 for step in steps)
        for steps in (stage, following)
    )


def _is_free(step: Allocate) -> bool:
    """Whether an allocation touches no memory, and takes none that others use."""
    return not (step.copied or step.overwritten or step.zero)
