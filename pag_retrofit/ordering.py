"""Interpolation that waits for gates: they tell which of its pixels anyone will read.

A map with a coarse bypass is computed at its open pixels and on its grid, every second pixel of
every second row; what lies between is interpolated. A layer with stride 2 that follows has a gate
that reads the grid alone. Once that has decided, interpolation is needed around its open pixels
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pag_retrofit.demand import EVERYWHERE
from pag_retrofit.execution import Decide, Interpolate, Step, demands_of


def put_off(steps: Sequence[Step], outputs: Sequence[Any]) -> list[Step]:
    """Let interpolation happen after gates that read nothing but the grid, where it can.

    Args:
        steps: Of a program, in order.
        outputs: Of the program.

    Returns:
        The steps in their new order.
    """
    result = list(steps)
    for step in steps:
        if isinstance(step, Interpolate):
            later = _after_gates(result, result.index(step))
            if later is not None and _is_limited(later, outputs, later.index(step)):
                result = later
    return result


def _after_gates(steps: list[Step], begin: int) -> list[Step] | None:
    """The steps with one interpolation behind gates on its grid; None if there is no such gate."""
    step = steps[begin]
    assert isinstance(step, Interpolate)
    result = steps[:begin]
    waiting = True
    for following in steps[begin + 1 :]:
        if waiting and step.writes in (*following.reads(), following.writes):
            if isinstance(following, Decide) and following.reads_grid:
                following = replace(following, before=step)
            else:
                result.append(step)
                waiting = False
        result.append(following)
    return None if waiting or result[begin] is step else result


def _is_limited(steps: Sequence[Step], outputs: Sequence[Any], index: int) -> bool:
    """Whether masks tell, when a step runs, which of its pixels anyone will read."""
    return demands_of(steps, outputs)[index] != EVERYWHERE
