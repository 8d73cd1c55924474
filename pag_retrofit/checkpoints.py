"""Checkpoints of a run, and other files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import load

from pag_retrofit.errors import TrainingError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


_STATES = "states.json"


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        epoch: completed epochs.
        batch: completed batches of the current epoch.
        step: completed optimizer steps.
        seconds: training time so far, all sessions together.
        sums: sums of the losses over the batches of the current epoch, by name.
        history: one record per epoch.
        best: the record of the best evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go of it even if this process is killed.

    Raises:
        TrainingError: another process holds the folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"another process is training in {folder}; wait for it, or choose another output"
            ) from error
        yield
    finally:
        os.close(descriptor)


class Stateful(Protocol):
    """What tells its state in plain values, and takes it over."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""


class Checkpoints:
    """The checkpoints of one run, of which the last is kept.

    Args:
        folder: where they lie; made when the first one is saved.
        accelerator: holds what is saved: network, optimizer, generators.

    Attributes:
        states: what else is saved, by name, as JSON.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.states: dict[str, Stateful] = {}

    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        # Partial ones start with a dot.
        return max(self.folder.glob("epoch-*"), default=None)

    def save(self, name: str) -> None:
        """Writes a checkpoint under a temporary name, renames it and removes older ones.

        To be called by all processes.

        Args:
            name: such as `epoch-00002-step-00000010`; later ones sort behind earlier ones.
        """
        final, temporary = self.folder / name, self.folder / f".{name}.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if main:
            states = {name: state.state_dict() for name, state in self.states.items()}
            processes = self.accelerator.num_processes
            write_json(temporary / _STATES, {"processes": processes, **states})
            os.replace(temporary, final)
            for old in self.folder.iterdir():
                if old != final:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_last(self) -> Path | None:
        """Restores the newest complete checkpoint, if there is one; returns where it lies.

        Raises:
            TrainingError: a file is missing or damaged, or it was written by another number of
                processes.
        """
        checkpoint = self.last()
        if checkpoint is None:
            return None
        try:
            self._load(checkpoint)
        except TrainingError:
            raise
        except Exception as error:
            raise TrainingError(
                f"cannot go on from {checkpoint} ({type(error).__name__}: {error}); remove "
                f"{self.folder} to begin the stage anew"
            ) from error
        return checkpoint

    def _load(self, checkpoint: Path) -> None:
        states = json.loads((checkpoint / _STATES).read_text(encoding="utf-8"))
        processes = self.accelerator.num_processes
        if states["processes"] != processes:
            raise TrainingError(
                f"{checkpoint} was written by {states['processes']} processes, this run has "
                f"{processes}: launch as many (images of an epoch and the schedule are shared out "
                f"among them), or remove {self.folder} to begin the stage anew"
            )
        # Accelerate goes on without them, with other noise.
        load(checkpoint / f"random_states_{self.accelerator.process_index}.pkl")
        self.accelerator.load_state(str(checkpoint))
        for name, state in self.states.items():
            state.load_state_dict(states[name])


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
