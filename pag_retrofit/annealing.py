"""Annealing: the target falls from 1 to the budget, the temperature to almost zero."""

from __future__ import annotations

import math
import random
from typing import Any

from torch import nn

from pag_retrofit.errors import PagError
from pag_retrofit.gates import named_gates, not_deployed, turn_dials
from pag_retrofit.losses import decided_fraction

_DRIFT = 10.0
"""Over as many steps as a whole training has, while the fraction misses its target by 1."""
_LARGEST_DRIFT = 0.3


class Annealer:
    """Moves the target fraction and the gates' temperature as training goes on.

    Both follow a cosine over the first `ramp` of the steps and then stay. What the temperature
    does is said at `sample_mask`.

    A quadratic loss stops short of a target that the task pulls away from, and what gates decide
    in evaluation is not what their probabilities expect. So after the ramp the sparsity loss aims
    at `aim`, which drifts away from the target `rho` for as long as the decided fraction misses it
    (integral control): at the end calibration has little left to change. On the ramp the fraction
    lags behind anyway, and a drift that adds that up would overshoot. Not with a dial, whose target
    is another one in every step.

    Args:
        gated: A gated network.
        total_steps: Optimiser steps of the whole training.
        ramp: Fraction of the steps after which the targets are reached, in (0, 1].
        temperature: (first, last), both > 0.
        budget: Compute fraction to end at; default the budget of the retrofit.
        dial: (smallest, largest) budget to train one network for. Steps then take in turn the
            smallest, the largest and a random one between (the sandwich of Yu & Huang, ICCV 2019),
            and gates are told which. Needs `GateConfig.dial`.

    Raises:
        PagError: An argument is out of range, or the gates have no dial.
    """

    def __init__(
        self,
        gated: nn.Module,
        total_steps: int,
        *,
        ramp: float = 0.5,
        temperature: tuple[float, float] = (1.0, 0.2),
        budget: float | None = None,
        dial: tuple[float, float] | None = None,
    ):
        """Start at rho = 1."""
        self.state = not_deployed(gated, "trained")
        self.gates = [gate for _, gate in named_gates(gated)]
        two = isinstance(temperature, tuple | list) and len(temperature) == 2
        numbers = two and _are_numbers(total_steps, ramp, *temperature)
        if not numbers or total_steps < 1 or not 0 < ramp <= 1 or min(temperature) <= 0:
            raise PagError(
                f"total_steps={total_steps!r}, ramp={ramp!r}, temperature={temperature!r}: "
                "expected at least one step, a ramp in (0, 1] and two temperatures above zero"
            )
        self.budget = self.state.budget if budget is None else budget
        lowest = self.state.lowest_budget
        if not (_are_numbers(self.budget) and lowest <= self.budget <= 1):
            raise PagError(
                f"budget={budget!r}: expected a compute fraction from the floor "
                f"{self.state.lowest_budget:.3f} to 1"
            )
        pair = isinstance(dial, tuple | list) and len(dial) == 2 and _are_numbers(*dial)
        if dial is not None and not (pair and lowest <= dial[0] < dial[1] <= 1):
            raise PagError(
                f"dial={dial!r}: expected (smallest, largest) budget, from the floor "
                f"{self.state.lowest_budget:.3f} to 1"
            )
        if dial is not None and not self.state.config.gate.dial:
            raise PagError("dial: the gates have none; retrofit with GateConfig(dial=True)")
        self.dial = dial
        self.gated = gated
        self.ramp_steps = max(1, round(total_steps * ramp))
        self.temperature = temperature
        self.steps = 0
        self.drift = 0.0
        self.drift_per_step = _DRIFT / total_steps
        self._apply()

    @property
    def rho(self) -> float:
        """Target fraction now."""
        return self._between(1.0, self._target())

    @property
    def aim(self) -> float:
        """What the sparsity loss aims at, to meet the target."""
        return self.rho - self.drift

    @property
    def tau(self) -> float:
        """Temperature now."""
        return self._between(*self.temperature)

    def step(self) -> None:
        """Go one optimiser step further."""
        drifts = self.dial is None and self.steps >= self.ramp_steps
        if drifts and any(gate.last_probability is not None for gate in self.gates):
            missed = decided_fraction(self.gated) - self.rho
            drift = self.drift + self.drift_per_step * missed
            self.drift = min(max(drift, -_LARGEST_DRIFT), _LARGEST_DRIFT)
        self.steps += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {"steps": self.steps, "drift": self.drift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a training was."""
        self.steps, self.drift = int(state["steps"]), float(state.get("drift", 0.0))
        self._apply()

    def _between(self, first: float, last: float) -> float:
        progress = min(1.0, self.steps / self.ramp_steps)
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))

    def _target(self) -> float:
        """The budget, or that of the dial in this step."""
        if self.dial is None:
            return self.budget
        low, high = self.dial
        # Of the step alone, so that a resumed training draws the same.
        drawn = random.Random(self.steps).uniform(low, high)
        return (low, high, drawn)[self.steps % 3]

    def _apply(self) -> None:
        self.state.rho = self.aim
        turn_dials(self.gated, self.rho)
        for gate in self.gates:
            gate.temperature.fill_(self.tau)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(x, int | float) and math.isfinite(x) for x in values)
