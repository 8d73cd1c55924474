"""Training one stage of a recipe on accelerate, with checkpoints and exact resume.

All randomness follows from the seed, the epoch and the saved generator states, so a run that was
killed and resumed ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast,
    set_seed,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from pag_retrofit.annealing import Annealer
from pag_retrofit.building import build_task, evaluation_data, save_weights, training_data
from pag_retrofit.checkpoints import Checkpoints, Progress, write_json
from pag_retrofit.data import StreamedImages
from pag_retrofit.data.base import collate
from pag_retrofit.errors import TrainingError
from pag_retrofit.evaluation import Evaluation, evaluate_network
from pag_retrofit.gates import state_of, turn_dials
from pag_retrofit.io import save_file
from pag_retrofit.losses import expected_fraction, sparsity_loss
from pag_retrofit.processes import forget_precision
from pag_retrofit.progress import StepDisplay
from pag_retrofit.recipe import GatedSection, Recipe, Schedule
from pag_retrofit.schedules import EpochSampler, one_cycle, parameter_groups

logger = logging.getLogger(__name__)

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Ways to train by which no process has the whole network."""


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe.

    Attributes:
        name: such as `dense` or `gated-0.90`; also the name of its folder.
        folder: where its results go.
        schedule: epochs and learning rates.
        budget: target compute fraction, if it has one.
        kind: `gated`, or how else the budget is met.
    """

    name: str
    folder: Path
    schedule: Schedule
    budget: float | None = None
    kind: str = "gated"

    @property
    def is_gated(self) -> bool:
        """Whether its network has gates."""
        return self.budget is not None and self.kind != "resizing"


class Trainer:
    """Trains a network through one stage.

    Args:
        network: the network, gated if the stage has a budget; trained in place.
        stage: the stage.
        recipe: the recipe that the stage belongs to.

    Raises:
        TrainingError: the training set is smaller than one batch for each process.
        TrainingError: half precision was asked for without a GPU.
        TrainingError: accelerate was launched with FSDP, DeepSpeed or the like.
    """

    def __init__(self, network: nn.Module, stage: Stage, recipe: Recipe) -> None:
        self.stage = stage
        self.recipe = recipe
        self.progress = Progress()
        self.accelerator = _accelerator(recipe, stage)
        self.operating_points: dict[str, dict[str, Any]] = {}
        self.checkpoints = Checkpoints(stage.folder / "checkpoints", self.accelerator)
        self.network = network.to(self.accelerator.device)
        if recipe.runtime.channels_last:
            self.network.to(memory_format=torch.channels_last)
        set_seed(recipe.seed, device_specific=True)
        self._prepare_data()
        self._prepare_model()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.accelerator.device

    def run(self) -> Evaluation:
        """Trains from the last checkpoint, or from the start, to the end of the stage.

        Returns:
            The evaluation of the last weights.

        Raises:
            TrainingError: the loss or a weight is not finite; the last checkpoint is kept.
        """
        self._resume()
        schedule = self.stage.schedule
        evaluation = None
        total = self.total_steps
        with StepDisplay(self.stage.name, total, self.is_main) as self._display:
            self._clock = time.perf_counter()
            while self.progress.epoch < schedule.epochs:
                self._run_epoch()
                self._check_weights()
                self.progress.epoch += 1
                record = self._close_epoch()
                evaluation = self._evaluate_between() if self._evaluation_due() else None
                self._record(record, evaluation)
                self._save_checkpoint()
                self.write_metrics()
        # Not `end_training`: it would end the process group, which later stages need.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        # A run that was killed after its last checkpoint has nothing left but to evaluate.
        return evaluation or self.evaluate()

    def evaluate(self) -> Evaluation:
        """Scores the network, as it is now, on the validation images."""
        # Each process has statistics of its own images; what is scored and saved is one network.
        for buffer in self.network.buffers():
            broadcast(buffer)
        return evaluate_network(
            self.network,
            self.val_loader,
            self.task,
            accelerator=self.accelerator,
            channels_last=self.recipe.runtime.channels_last,
        )

    def _evaluate_between(self) -> Evaluation:
        """Scores the network in training: with a dial, at the lowest budget."""
        if self.annealer is None:
            return self.evaluate()
        assert self.stage.budget is not None
        turn_dials(self.network, self.stage.budget)
        evaluation = self.evaluate()
        turn_dials(self.network, self.annealer.rho)
        return evaluation

    def write_metrics(self, final: Evaluation | None = None) -> dict[str, Any]:
        """Writes `metrics.json`, complete once there is a final evaluation; returns its content."""
        progress = self.progress
        metrics: dict[str, Any] = {
            "stage": self.stage.name,
            "complete": final is not None,
            "metric": self.task.metric,
            "budget": self.stage.budget,
            "final": final.to_dict() if final is not None else None,
            "best": progress.best,
            "seconds": round(progress.seconds, 1),
            "steps": progress.step,
            "history": progress.history,
        }
        if self.stage.is_gated:
            state = state_of(self.network)
            metrics["operating_points"] = self.operating_points
            metrics["floor"] = state.floor
            metrics["gateable_share"] = state.gateable_share
            metrics["total_macs"] = state.total_macs
        if self.is_main:
            write_json(self.stage.folder / "metrics.json", metrics)
        return metrics

    # Preparation -----------------------------------------------------------------------------

    def _prepare_data(self) -> None:
        section = self.recipe.data
        self.train_set = training_data(self.recipe)
        self.val_set = evaluation_data(self.recipe)
        self.task = build_task(self.recipe, self.train_set)
        needed = section.batch_size * self.accelerator.num_processes
        if len(self.train_set) < needed:
            raise TrainingError(
                f"{len(self.train_set)} training images do not fill one batch of {needed} "
                f"(data.batch_size {section.batch_size} x {self.accelerator.num_processes} "
                "processes); use a smaller data.batch_size"
            )
        self.sampler = None  # a stream has an order of its own
        if not isinstance(self.train_set, StreamedImages):
            self.sampler = EpochSampler(len(self.train_set), self.recipe.seed)
        # The loaders draw worker seeds from generators of their own; from the global one, a
        # resumed epoch would shift the noise of the gates.
        train = DataLoader(
            self.train_set,
            batch_size=section.batch_size,
            sampler=self.sampler,
            drop_last=True,
            num_workers=section.workers,
            generator=torch.Generator(),
            # They keep what they have decoded; a stream's begin each epoch where that begins.
            persistent_workers=section.workers > 0 and self.sampler is not None,
        )
        val = DataLoader(
            self.val_set,
            batch_size=section.eval_batch_size,
            collate_fn=collate,
            num_workers=section.workers,
            generator=torch.Generator(),
            persistent_workers=section.workers > 0,
        )
        self.train_loader, self.val_loader = self.accelerator.prepare(train, val)
        accumulation = self.recipe.runtime.gradient_accumulation
        steps = math.ceil(len(self.train_loader) / accumulation)
        self.total_steps = steps * self.stage.schedule.epochs

    def _prepare_model(self) -> None:
        schedule = self.stage.schedule
        optimizer = torch.optim.AdamW(
            parameter_groups(self.network, schedule), weight_decay=schedule.weight_decay
        )
        # Wrapped, so that accelerate's mixed precision does not change the network's own forward.
        self.model, self.optimizer = self.accelerator.prepare(_Forward(self.network), optimizer)
        self.checkpoints.states["progress"] = self.progress
        self.annealer: Annealer | None = None
        if self.stage.is_gated:
            assert isinstance(schedule, GatedSection)
            annealing = schedule.annealing
            budgets = schedule.budgets
            self.annealer = Annealer(
                self.network,
                self.total_steps,
                ramp=annealing.ramp,
                temperature=annealing.temperature,
                dial=(min(budgets), max(budgets)) if self.stage.kind == "dial" else None,
            )
            self.checkpoints.states["annealer"] = self.annealer

    # Training --------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        epoch, done = self.progress.epoch, self.progress.batch
        self.train_set.set_epoch(epoch)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        # Accelerate sets the epoch of sampler and data set from this count when it iterates.
        self.train_loader.iteration = epoch
        loader = self.train_loader
        if done:
            loader = self.accelerator.skip_first_batches(loader, done)
        self._train_mode()
        for batch in loader:
            self._train_batch(batch)

    def _train_mode(self) -> None:
        self.model.train()
        if self.stage.schedule.freeze_norm:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _train_batch(self, batch: Mapping[str, Tensor]) -> None:
        self._set_learning_rates()
        with self.accelerator.accumulate(self.model):
            output = self.model(self._image(batch))
            losses = self._losses(output, batch)
            self._check_finite(losses)
            self.accelerator.backward(losses["loss"])
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.progress.batch += 1
        for name, value in losses.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value.item()
        if self.accelerator.sync_gradients:
            self._close_step(losses)

    def _image(self, batch: Mapping[str, Tensor]) -> Tensor:
        image = batch["image"]
        if self.recipe.runtime.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image

    def _losses(self, output: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss that is minimised, and under other names what to report with it."""
        task = self.task.loss(output, batch)
        if self.annealer is None:
            return {"loss": task}
        schedule = self.stage.schedule
        assert isinstance(schedule, GatedSection)
        sparsity = sparsity_loss(self.network, kind=schedule.sparsity.kind)
        total = task + schedule.sparsity.weight * sparsity
        with torch.no_grad():
            expected = expected_fraction(self.network)
        return {
            "loss": total,
            "task_loss": task,
            "sparsity_loss": sparsity,
            "expected_fraction": expected,
        }

    def _check_finite(self, losses: Mapping[str, Tensor]) -> None:
        if all(math.isfinite(value.item()) for value in losses.values()):
            return
        shown = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
        raise TrainingError(self._stopped(f"the loss is not finite ({shown})"))

    def _check_weights(self) -> None:
        """Looks at all weights, as a step after a finite loss can ruin them."""
        for name, value in self.network.state_dict().items():
            if not torch.isfinite(value).all():
                raise TrainingError(self._stopped(f"{name} is not finite"))

    def _stopped(self, reason: str) -> str:
        checkpoint = self.checkpoints.last()
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint yet"
        return (
            f"stage {self.stage.name}: {reason} at step {self.progress.step + 1} "
            f"(epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}); {kept}; "
            "try a lower learning rate, or runtime.mixed_precision: no"
        )

    def _set_learning_rates(self) -> None:
        share = one_cycle(self.progress.step, self.total_steps, self.stage.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share

    def _close_step(self, losses: Mapping[str, Tensor]) -> None:
        self.progress.step += 1
        if self.annealer is not None:
            self.annealer.step()
        values = {name: value.item() for name, value in losses.items()} | self._gate_state()
        self._display.update(self.progress.step, values)
        every = self.recipe.runtime.checkpoint_every
        if every and self.progress.step % every == 0:
            self._save_checkpoint()

    def _gate_state(self) -> dict[str, float]:
        if self.annealer is None:
            return {}
        return {name: float(getattr(self.annealer, name)) for name in ("tau", "rho", "aim")}

    # Ends of epochs --------------------------------------------------------------------------

    def _close_epoch(self) -> dict[str, Any]:
        """The record of the epoch that just ended; resets the sums."""
        progress = self.progress
        names = sorted(progress.sums)
        means = torch.tensor([progress.sums[n] for n in names], dtype=torch.float64)
        means = self.accelerator.reduce(
            (means / progress.batch).float().to(self.accelerator.device), reduction="mean"
        )
        progress.sums, progress.batch = {}, 0
        return {
            "epoch": progress.epoch,
            "step": progress.step,
            **dict(zip(names, means.tolist(), strict=True)),
            **self._gate_state(),
        }

    def _evaluation_due(self) -> bool:
        epoch, last = self.progress.epoch, self.stage.schedule.epochs
        return epoch == last or epoch % self.recipe.runtime.evaluate_every == 0

    def _record(self, record: dict[str, Any], evaluation: Evaluation | None) -> None:
        """Adds an epoch to the history, the trackers and the log; keeps the best weights."""
        progress = self.progress
        if evaluation is not None:
            record |= evaluation.to_dict()
        progress.history.append(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, float) and k != "seconds"}
        self.accelerator.log(numbers, step=progress.step)
        self._display.note(numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.is_main:
            epochs = self.stage.schedule.epochs
            logger.info("%s: epoch %d/%d  %s", self.stage.name, progress.epoch, epochs, shown)
        if evaluation is not None and self._is_best(record):
            progress.best = {k: v for k, v in record.items() if k != "open_rates"}
            if self.is_main and self.recipe.runtime.keep_best:
                save = save_file if self.stage.is_gated else save_weights
                save(self.network, self.stage.folder / "best.safetensors")

    def _is_best(self, record: Mapping[str, Any]) -> bool:
        """Whether a record beats the best one; gates must be within their budget."""
        budget = self.stage.budget
        spent = record.get("time_fraction", record["fraction"])
        chooses = self.stage.is_gated and self.stage.kind != "truncation"
        if chooses and budget is not None and spent > budget + 0.01:
            return False
        best, metric = self.progress.best, self.task.metric
        if best is None:
            return True
        better = record[metric] > best[metric]
        return better if self.task.higher_is_better else record[metric] < best[metric]

    # Checkpoints -----------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint, unless a weight is not finite."""
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now
        self._check_weights()
        name = f"epoch-{self.progress.epoch:05d}-step-{self.progress.step:08d}"
        self.checkpoints.save(name)

    def _resume(self) -> None:
        checkpoint = self.checkpoints.load_last()
        if checkpoint is not None and self.is_main:
            logger.info("%s: resumed from %s", self.stage.name, checkpoint)


class _Forward(nn.Module):
    """Calls a network; what accelerate wraps instead of the network itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


def _accelerator(recipe: Recipe, stage: Stage) -> Accelerator:
    runtime = recipe.runtime
    if runtime.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError("runtime.mixed_precision: fp16 needs a GPU; use bf16 or no")
    forget_precision(runtime.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=runtime.mixed_precision,
        gradient_accumulation_steps=runtime.gradient_accumulation,
        log_with=list(runtime.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(stage.folder), logging_dir=str(stage.folder / "tracking")
        ),
        # Encoders have layers that some decoders do not read.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type in _SHARDED:
        raise TrainingError(
            f"accelerate was launched with {accelerator.distributed_type.value}, but recipes train "
            "a whole network in each process; launch without it, or shard the network in a "
            "training loop of your own, as examples/sharded_training.py does"
        )
    if runtime.trackers:
        accelerator.init_trackers(recipe.name)
    known = {tracker.name for tracker in accelerator.trackers}
    missing = sorted(set(runtime.trackers) - known)
    if accelerator.is_main_process and missing:
        logger.warning("without trackers %s: not installed", ", ".join(missing))
    return accelerator
