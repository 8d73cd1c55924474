"""The progress bar of a training run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# What the bar shows, in this order, with short labels.
_SHOWN = {
    "loss": "loss",
    "miou": "mIoU",
    "ods": "ODS",
    "abs_rel": "abs_rel",
    "mean": "mean angle",
    "tau": "tau",
    "rho": "rho",
    "fraction": "compute",
}


class StepDisplay:
    """A progress bar on the main process of a terminal; elsewhere it does nothing.

    Args:
        title: shown in front.
        total: number of steps.
        main: whether this is the main process.
    """

    def __init__(self, title: str, total: int, main: bool) -> None:
        self._values: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(file=sys.stderr),
            disable=not (main and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(title, total=total, values="")

    def __enter__(self) -> StepDisplay:
        """Starts drawing."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops drawing and leaves the bar as it is."""
        self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the number of completed steps and new values."""
        self._values |= values
        shown = [
            f"{label} {self._values[name]:.3f}"
            for name, label in _SHOWN.items()
            if name in self._values
        ]
        self._bar.update(self._task, completed=step, values="  ".join(shown))

    def note(self, values: Mapping[str, float]) -> None:
        """Keeps values, such as those of an evaluation, for the next update."""
        self._values |= values
