"""Checkpoints of a run, and other files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pag_retrofit.errors import TrainingError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


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


class Checkpoints:
    """The checkpoints of one run, of which the last is kept.

    Args:
        folder: where they lie; made when the first one is saved.
        accelerator: holds what is saved: network, optimizer, generators, registered objects.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator

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
            os.replace(temporary, final)
            for old in self.folder.iterdir():
                if old != final:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_last(self) -> Path | None:
        """Restores the newest complete checkpoint, if there is one; returns where it lies."""
        checkpoint = self.last()
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
        return checkpoint


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
