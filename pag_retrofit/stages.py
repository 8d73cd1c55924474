"""The stages of a recipe: dense, reference, average, gated and baselines, each in a folder.

A stage that is complete is skipped, one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Subset

from pag_retrofit.building import (
    WITHOUT_WEIGHTS,
    build_network,
    evaluation_data,
    load_weights,
    save_weights,
)
from pag_retrofit.calibration import calibrate, measured_fraction, set_budget
from pag_retrofit.checkpoints import locked, write_json, write_text
from pag_retrofit.config import POLICIES, RetrofitConfig
from pag_retrofit.conversion import average_branches
from pag_retrofit.data.base import collate
from pag_retrofit.errors import RecipeError
from pag_retrofit.evaluation import Evaluation
from pag_retrofit.gates import NetworkTimes, state_of, use_times
from pag_retrofit.io import WEIGHTS_NAME, save_pretrained
from pag_retrofit.processes import process_state
from pag_retrofit.pruning import prune_gates
from pag_retrofit.recipe import BASELINES, GatedSection, Recipe, Schedule, default_value
from pag_retrofit.resizing import resize_input
from pag_retrofit.surgery import retrofit
from pag_retrofit.timing import budget_in_time
from pag_retrofit.tracing import in_mode
from pag_retrofit.training import Stage, Trainer

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
_PACKAGES = ("torch", "timm", "segmentation-models-pytorch", "accelerate", "pag-retrofit")
_UNFINISHED = 0.05
# Where things lie and how a run is carried out, without effect on its result.
_WITHOUT_EFFECT = {
    "data.root",
    "data.workers",
    "data.eval_batch_size",
    "runtime.threads",
    "runtime.checkpoint_every",
    "runtime.evaluate_every",
    "runtime.keep_best",
    "runtime.trackers",
}


def finetune(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Runs the stages of a recipe, in the order of `plan_stages`.

    Writes `{output}/{stage}/` with `model.safetensors` (the last weights), `best.safetensors`,
    `metrics.json`, `recipe.yaml` and `environment.json`. A gated stage is named by its budget,
    such as `gated-0.90`, and its folder can be loaded with `from_pretrained`; so are the
    baselines that are policies of gates.

    Returns:
        The content of `metrics.json` by stage.

    Raises:
        RecipeError: there is no dense network to start from.
        RecipeError: a stage's folder holds the results of another recipe.
        TrainingError: a loss or a weight is not finite, or another process trains in a folder.
    """
    process_state()  # before anything else can start it
    if recipe.runtime.threads is not None:
        torch.set_num_threads(recipe.runtime.threads)
    return {stage.name: _run_stage(stage, recipe) for stage in plan_stages(recipe)}


def plan_stages(recipe: Recipe) -> list[Stage]:
    """The training runs of a recipe, in order."""
    stages = []
    if "dense" in recipe.stages:
        assert recipe.dense is not None
        stages.append(Stage("dense", recipe.output / "dense", recipe.dense))
    for name in ("reference", "average"):
        if recipe.gated is not None and name in recipe.stages:
            stages.append(Stage(name, recipe.output / name, recipe.gated))
    if recipe.gated is not None and "dial" in recipe.stages:
        lowest = min(recipe.gated.budgets)
        stages.append(Stage("dial", recipe.output / "dial", recipe.gated, lowest, "dial"))
    for kind in ("gated", "combined", *BASELINES):
        if recipe.gated is not None and kind in recipe.stages:
            for budget in recipe.gated.budgets:
                name = f"{kind}-{budget:.2f}"
                stages.append(Stage(name, recipe.output / name, recipe.gated, budget, kind))
    return stages


def _run_stage(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Runs one stage, or returns what it left if it is complete."""
    _check_same_recipe(stage, recipe)
    metrics_file = stage.folder / METRICS
    if metrics_file.is_file():
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
        if metrics["complete"]:
            logger.info("%s: complete, skipped (%s)", stage.name, stage.folder)
            return metrics
    try:
        stage.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output={str(recipe.output)!r}: no folder: {error}") from error
    with locked(stage.folder) if process_state().is_main_process else nullcontext():
        return _train_stage(stage, recipe)


def _train_stage(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Trains, calibrates, evaluates and writes what came out."""
    _write_head(stage, recipe)
    set_seed(recipe.seed)
    network = _starting_network(stage, recipe)
    trainer = Trainer(network, stage, recipe)
    evaluation = trainer.run()
    if stage.is_gated and stage.kind != "truncation":
        evaluation = _calibrate_and_evaluate(network, stage, recipe, trainer)
    if trainer.is_main and stage.is_gated:
        save_pretrained(network, stage.folder)
    elif trainer.is_main:
        save_weights(network, stage.folder / WEIGHTS_NAME)
    metrics = trainer.write_metrics(evaluation)
    process_state().wait_for_everyone()
    return metrics


def _starting_network(stage: Stage, recipe: Recipe) -> nn.Module:
    """The network a stage begins with: pretrained, or the dense result, gated if it has a budget.

    Raises:
        RecipeError: there is no dense network to start from.
    """
    if stage.name == "dense":
        return build_network(recipe.model)
    network = _dense_network(recipe)
    if stage.name == "reference":
        return network
    shape = (1, *evaluation_data(recipe)[0]["image"].shape)
    if stage.name == "average":
        return average_branches(network, example_input=shape, config=recipe.multipool, inplace=True)
    assert stage.budget is not None and isinstance(stage.schedule, GatedSection)
    budget = stage.budget
    if stage.kind == "resizing":
        return resize_input(network, budget, example_input=shape)
    if stage.kind == "combined":
        resize_input(network, math.sqrt(budget), example_input=shape)
        budget = min(1.0, budget / float(network.pag_compute_fraction))  # type: ignore[arg-type]
    config = RetrofitConfig.from_dict(stage.schedule.retrofit)
    if stage.kind == "dial":
        config = replace(config, gate=replace(config.gate, dial=True))
    elif stage.kind in POLICIES:
        config = replace(config, policy=stage.kind)
    retrofit(network, budget, example_input=shape, config=config, inplace=True)
    if stage.schedule.budget_in == "time":
        _count_time(network, shape, stage.folder / "times.json")
    return network


def _count_time(network: nn.Module, shape: tuple[int, ...], file: Path) -> None:
    """Let a gated network's budget be in time, measured once: what goes on must not differ."""
    state = process_state()
    if state.is_main_process and not file.is_file():
        write_json(file, asdict(budget_in_time(network, example_input=shape)))
    state.wait_for_everyone()
    use_times(network, NetworkTimes.from_dict(json.loads(file.read_text(encoding="utf-8"))))


def _dense_network(recipe: Recipe) -> nn.Module:
    if "dense" not in recipe.stages and recipe.model.checkpoint is not None:
        return build_network(recipe.model)
    folder = recipe.output / "dense"
    if not (folder / WEIGHTS_NAME).is_file():
        raise RecipeError(
            f"there is no dense network to start from: {folder / WEIGHTS_NAME} does not exist; "
            "add dense to stages, or give the weights as model.checkpoint"
        )
    network = build_network(recipe.model.model_copy(update=WITHOUT_WEIGHTS))
    load_weights(network, folder / WEIGHTS_NAME)
    return network


def _calibrate_and_evaluate(
    network: nn.Module, stage: Stage, recipe: Recipe, trainer: Trainer
) -> Evaluation:
    """Sets the gates' thresholds so that training images, not augmented, meet the budget.

    Returns:
        The evaluation at the stage's budget; those at other operating points are noted.
    """
    assert isinstance(stage.schedule, GatedSection)
    data = evaluation_data(recipe, "train")
    size = recipe.data.eval_batch_size
    count = min(len(data), size * stage.schedule.calibration_batches)
    # Spread over the data set: neighbours are often frames of one sequence.
    chosen = Subset(data, [i * len(data) // count for i in range(count)])
    layout = torch.channels_last if recipe.runtime.channels_last else torch.contiguous_format
    images = [
        batch["image"].to(trainer.device, memory_format=layout)
        for batch in DataLoader(chosen, batch_size=size, collate_fn=collate)
    ]
    own = state_of(network).budget  # of what a smaller input leaves, if it sees one
    budgets = sorted(stage.schedule.budgets) if stage.kind == "dial" else (own,)
    if stage.kind != "dial":
        _warn_if_unfinished(network, stage, images)
    calibrate(network, images, budgets=budgets)
    if pruned := prune_gates(network, least=stage.schedule.prune):
        logger.info("%s: %d gates stay open and are taken out", stage.name, len(pruned))
        if stage.schedule.budget_in == "time":
            shape = state_of(network).example_shape
            _count_time(network, shape, stage.folder / "times_pruned.json")
        calibrate(network, images, budgets=budgets)
    evaluations = {}
    for budget in budgets:
        set_budget(network, budget)
        evaluations[budget] = trainer.evaluate()
    set_budget(network, own)
    if len(budgets) > 1:
        trainer.operating_points = {f"{b:.2f}": e.to_dict() for b, e in evaluations.items()}
    return evaluations[own]


def _warn_if_unfinished(network: nn.Module, stage: Stage, images: list[torch.Tensor]) -> None:
    """Gates that training left far above the budget will be closed by calibration alone."""
    with in_mode(network):
        fraction, _ = measured_fraction(network, images)
    if fraction > state_of(network).budget + _UNFINISHED:
        logger.warning(
            "%s: training ended at a fraction of %.2f, not of %.2f; calibration closes gates that "
            "the network relies on: train for more epochs, or with a larger gated.sparsity.weight",
            stage.name,
            fraction,
            state_of(network).budget,
        )


# What is written beside the weights -------------------------------------------------------------


def _write_head(stage: Stage, recipe: Recipe) -> None:
    """Writes the recipe and the environment of a stage."""
    if process_state().is_main_process:
        write_json(stage.folder / "environment.json", environment())
        write_text(stage.folder / "recipe.yaml", recipe.to_yaml())
    process_state().wait_for_everyone()


def environment() -> dict[str, Any]:
    """Versions, source revision and machine of this process."""
    state = process_state()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": state.num_processes,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Revision of the package's source, marked if files differ; None for an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    """Name of the processor, with family and model: virtual machines name many alike."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return platform.processor()
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    if not {"model name", "cpu family", "model"} <= facts.keys():
        return facts.get("model name", platform.processor())
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"


# Whether a folder belongs to this recipe --------------------------------------------------------


def _check_same_recipe(stage: Stage, recipe: Recipe) -> None:
    """Compares the recipe with the one a stage's folder was begun with.

    Raises:
        RecipeError: they differ in a setting that has an effect on this stage.
    """
    file = stage.folder / "recipe.yaml"
    if not file.is_file():
        return
    there = dict(_settings(stage, yaml.safe_load(file.read_text(encoding="utf-8"))))
    here = dict(_settings(stage, recipe.model_dump(mode="json")))
    for key in here.keys() - there.keys():  # what the release that began it did not know
        there[key] = default_value(key, recipe.model_dump(mode="json"))
    metrics = stage.folder / METRICS
    if metrics.is_file():  # the name of the folder is rounded
        there["budget"] = json.loads(metrics.read_text(encoding="utf-8")).get("budget")
        here["budget"] = stage.budget
    differences = [
        f"{key}: {there[key]!r} there, {here.get(key)!r} here"
        for key in sorted(there)
        if there[key] != here.get(key)
    ]
    if differences:
        raise RecipeError(
            f"{stage.folder} holds results of another recipe ({'; '.join(differences)}); "
            "choose another output, or remove the folder"
        )


def _settings(stage: Stage, values: Any) -> Iterator[tuple[str, Any]]:
    """The values of a recipe that have an effect on a stage, by dotted key."""
    skipped = {"name", "output", "stages"}
    if stage.name == "dense":
        skipped.add("gated")
    for key, value in _flatten(values):
        section, _, rest = key.partition(".")
        if section in skipped or (key in _WITHOUT_EFFECT and not _has_effect(stage, key, values)):
            continue
        if key == "gated.budgets" and stage.kind != "dial":  # each has a folder of its own
            continue
        if section == "gated" and not _is_used(stage, rest):
            continue
        yield key, value


def _has_effect(stage: Stage, key: str, values: Any) -> bool:
    """Whether a key that most stages can do with any value of has an effect on this one."""
    if key == "data.workers":
        return bool(values["data"]["name"] == "shards")  # each reads shards of its own
    return key == "data.eval_batch_size" and stage.is_gated  # calibration counts batches


def _is_used(stage: Stage, key: str) -> bool:
    """Whether a key of the section gated has an effect on a stage."""
    if stage.is_gated or key in Schedule.model_fields:
        return True
    return stage.name == "average" and key.startswith("retrofit.multipool")


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(values, dict):
        yield prefix, values
        return
    for key, value in values.items():
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
