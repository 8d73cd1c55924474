from __future__ import annotations

import itertools
import json
import logging
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from pag_retrofit import from_pretrained, measure, stages, timing
from pag_retrofit.building import build_network, save_weights
from pag_retrofit.checkpoints import locked
from pag_retrofit.errors import CheckpointError, RecipeError, TrainingError
from pag_retrofit.evaluation import evaluate_file
from pag_retrofit.gates import named_gates
from pag_retrofit.recipe import Recipe, load_recipe
from pag_retrofit.schedules import EpochSampler, one_cycle, parameter_groups
from pag_retrofit.stages import finetune
from pag_retrofit.tasks import SegmentationTask
from pag_retrofit.training import Trainer

RECIPE = """\
name: tiny
output: {output}
stages: [dense]
model:
  name: Unet
  arguments: {{encoder_name: tu-test_resnet, encoder_weights: null,
              decoder_channels: [16, 16, 8, 8, 8], classes: 6}}
data: {{name: scenes, train_count: 7, val_count: 3, size: [64, 64], crop: [64, 64],
       batch_size: 2, eval_batch_size: 2}}
dense: {{epochs: 2, lr: 1e-3}}
gated: {{epochs: 2, lr: 1e-3, gate_lr: 0.1, budgets: [0.8], calibration_batches: 2}}
runtime: {{trackers: [], channels_last: false}}
"""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def recipe(tmp_path):
    def recipe(*overrides: str, output: str = "out") -> Recipe:
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE.format(output=tmp_path / output))
        return load_recipe(path, overrides)

    return recipe


class Killed(Exception):
    """Stands for the end of the process."""


@contextmanager
def each_batch(action):
    """Multiplies the loss of batch 1, 2, ... by what a function makes of this number."""
    original = SegmentationTask.loss
    numbers = itertools.count(1)

    def loss(self, output, batch):
        return original(self, output, batch) * action(next(numbers))

    with mock.patch.object(SegmentationTask, "loss", loss):
        yield


def kill_at(number):
    def action(count):
        if count == number:
            raise Killed
        return 1.0

    return action


def without_times(metrics):
    metrics = json.loads(json.dumps(metrics))
    for record in [metrics, metrics["final"], metrics["best"] or {}, *metrics["history"]]:
        record.pop("seconds", None)
    return metrics


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = load_tensors(first), load_tensors(second)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


# What a stage leaves -----------------------------------------------------------------------------


def test_dense_stage_writes_its_results_and_is_skipped_when_complete(recipe, caplog):
    tiny = recipe("runtime.trackers=[tensorboard]")
    with caplog.at_level(logging.INFO, "pag_retrofit"):
        metrics = finetune(tiny)["dense"]
    folder = tiny.output / "dense"
    assert metrics["complete"] and len(metrics["history"]) == 2
    assert metrics["steps"] == 2 * 3  # 7 images, batches of 2, the rest dropped
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["final"]["images"] == 3
    assert metrics["best"]["miou"] == max(record["miou"] for record in metrics["history"])
    assert load_recipe(folder / "recipe.yaml") == tiny
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["threads"] >= 1
    assert list((folder / "tracking").rglob("events.*"))
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    epochs = [r.message for r in caplog.records if "dense: epoch" in r.message]
    assert len(epochs) == 2 and "loss" in epochs[0] and "miou" in epochs[0]
    assert evaluate_file(folder, tiny).metrics["miou"] == metrics["final"]["miou"]
    best = evaluate_file(folder / "best.safetensors", tiny)
    assert best.metrics["miou"] == metrics["best"]["miou"]

    caplog.clear()
    with caplog.at_level(logging.INFO, "pag_retrofit"), each_batch(kill_at(1)):
        assert finetune(tiny)["dense"] == metrics
    assert "complete, skipped" in caplog.text


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (
            "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A\n\nmodel\t: 1\n",
            "A (family 25, model 17)",
        ),
        ("processor\t: 0\nmodel name\t: ARM: v8\n\nprocessor\t: 1\n", "ARM: v8"),
    ],
)
def test_processors_of_one_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, facts: str, name: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: facts)
    assert stages._cpu_model() == name


def test_gated_stage_meets_its_budget_and_can_be_loaded(recipe):
    tiny = recipe("stages=[dense, reference, gated]", "dense.epochs=1")
    results = finetune(tiny)
    assert list(results) == ["dense", "reference", "gated-0.80"]
    assert tiny.gated is not None
    gated = results["gated-0.80"]
    assert gated["steps"] == results["reference"]["steps"]
    assert gated["budget"] == 0.8
    assert abs(gated["final"]["fraction"] - 0.8) < 0.1  # on other images than calibrated
    assert all(0 <= rate <= 1 for rate in gated["final"]["open_rates"].values())
    assert 0 < gated["floor"] < 0.8
    last = gated["history"][-1]
    assert last["rho"] == pytest.approx(0.8) and last["tau"] == pytest.approx(
        tiny.gated.annealing.temperature[1]
    )
    assert {"task_loss", "sparsity_loss", "expected_fraction"} <= last.keys()
    loaded = from_pretrained(tiny.output / "gated-0.80")
    assert type(loaded).__name__ == "Unet"
    again = evaluate_file(tiny.output / "gated-0.80", tiny, budget=0.8).to_dict()
    assert without_times({**gated, "final": again})["final"] == without_times(gated)["final"]


def test_average_and_multipool_are_stages_of_one_recipe(recipe):
    pools = "{include: [], multipool: {dilations: [1, 2], sites: ['encoder.model.layer2.0.conv?']}}"
    tiny = recipe("stages=[dense, average, gated]", "dense.epochs=1", "gated.epochs=1",
                  f"gated.retrofit={pools}", "gated.budgets=[1.0]")  # fmt: skip
    results = finetune(tiny)
    assert list(results) == ["dense", "average", "gated-1.00"]
    assert results["average"]["final"]["fraction"] > 1.05
    assert results["average"]["steps"] == results["gated-1.00"]["steps"]
    assert results["gated-1.00"]["final"]["fraction"] < 1.05
    with pytest.raises(CheckpointError, match="branches are averaged"):
        evaluate_file(tiny.output / "average", tiny)
    loaded = from_pretrained(tiny.output / "gated-1.00")
    with measure(loaded) as measured:
        loaded(torch.rand(1, 3, 64, 64))
    assert set(measured.branch_maps) == {
        "encoder.model.layer2.0.conv1",
        "encoder.model.layer2.0.conv2",
    }


def test_baselines_are_stages_at_every_budget(recipe):
    kinds = ("combined", "layer", "random", "grid", "truncation", "resizing")
    stages = f"stages=[dense, {', '.join(kinds)}]"
    epochs = ("dense.epochs=1", "gated.epochs=1", "gated.budgets=[0.5]")
    given = recipe(stages, *epochs, "data.size=[96, 64]", "data.crop=[96, 64]")
    results = finetune(given)
    assert list(results) == ["dense", *(f"{kind}-0.50" for kind in kinds)]
    for kind in kinds:
        final = results[f"{kind}-0.50"]["final"]
        assert final["fraction"] == pytest.approx(0.5, abs=0.25), kind
        folder = given.output / f"{kind}-0.50"
        if kind == "combined":
            check_combined(from_pretrained(folder), final["fraction"])
        elif kind != "resizing":
            assert from_pretrained(folder).pag_state.config.policy == kind
    weights = load_tensors(given.output / "resizing-0.50" / "model.safetensors")
    assert weights.keys() == load_tensors(given.output / "dense" / "model.safetensors").keys()


def test_a_smaller_input_may_be_the_best_though_no_size_meets_its_budget(recipe):
    sizes = ("data.size=[96, 64]", "data.crop=[96, 64]", "gated.budgets=[0.6]")
    given = recipe("stages=[dense, resizing]", "dense.epochs=1", "gated.epochs=1", *sizes)
    result = finetune(given)["resizing-0.60"]
    assert result["final"]["fraction"] == pytest.approx(2 / 3)
    assert result["best"] is not None
    again = evaluate_file(given.output / "resizing-0.60", given)
    assert again.fraction == pytest.approx(2 / 3)
    assert again.metrics["miou"] == pytest.approx(result["final"]["miou"], rel=1e-6)
    assert (given.output / "resizing-0.60" / "best.safetensors").is_file()


def check_combined(loaded, fraction):
    """A smaller input and gates share a budget of one half."""
    share = loaded.pag_compute_fraction
    assert 0.5 < share < 1
    assert loaded.pag_state.budget == pytest.approx(0.5 / share)
    assert loaded.pag_state.config.policy == "pixel"
    # Gates calibrated after one epoch are not exact; what was reported counts the whole image.
    assert fraction == pytest.approx(0.5, abs=0.1)


def test_budgets_may_be_in_time(recipe, monkeypatch):
    def time_sites(_gated, sites, *_):
        found = {site: (float(k), 0.1) for k, site in enumerate(sites, 1)}
        return timing._Timing(1.0, 1.1, 0.2, found)

    monkeypatch.setattr(timing, "_time_sites", time_sites)
    settings = ("stages=[dense, gated]", "dense.epochs=1", "gated.budget_in=time")
    given = recipe(*settings, "gated.budgets=[0.8]", "gated.gate_lr=0.5")
    final = finetune(given)["gated-0.80"]["final"]
    loaded = from_pretrained(given.output / "gated-0.80")
    times = loaded.pag_state.times
    assert times is not None and loaded.pag_state.floor == times.floor
    assert loaded.pag_state.operating_points.keys() == {0.8}
    assert final["time_fraction"] == pytest.approx(0.8, abs=0.1)
    assert final["time_fraction"] != final["fraction"]
    # What was measured is kept: a run that goes on must not see other times.
    measured = json.loads((given.output / "gated-0.80" / "times.json").read_text())
    assert measured["opened"] == times.opened


def test_gates_that_training_left_open_are_warned_about(recipe, caplog):
    settings = ("stages=[dense, gated]", "dense.epochs=1", "gated.epochs=1")
    with caplog.at_level(logging.WARNING, "pag_retrofit"):
        finetune(recipe(*settings, "gated.budgets=[0.8]", "gated.sparsity.weight=1e-9"))
    assert "gated-0.80: training ended at a fraction of 1.0" in caplog.text
    assert "larger gated.sparsity.weight" in caplog.text


def test_the_dial_is_one_network_scored_at_every_budget(recipe, monkeypatch):
    settings = ("stages=[dense, dial]", "gated.epochs=2", "dense.epochs=1", "gated.gate_lr=0.5",
                "data.train_count=9")  # fmt: skip
    given = recipe(*settings, "gated.budgets=[0.9, 0.6]")
    dials, evaluate = [], Trainer.evaluate

    def seen(self):
        dials.append({float(gate.setting) for _, gate in named_gates(self.network)})
        return evaluate(self)

    finetune(recipe(*settings, "stages=[dense]"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", seen)
        results = finetune(given)
    first, second, *_ = dials  # in training it is scored at the lowest budget
    assert first == second and len(first) == 1
    assert list(results) == ["dense", "dial"]
    points = results["dial"]["operating_points"]
    assert list(points) == ["0.60", "0.90"]
    assert points["0.60"]["fraction"] < points["0.90"]["fraction"]
    assert results["dial"]["final"] == points["0.60"]
    assert set(from_pretrained(given.output / "dial").pag_state.operating_points) == {0.6, 0.9}
    with pytest.raises(RecipeError, match=r"gated.budgets: \[0.9, 0.6\] there, \[0.95, 0.6\] here"):
        finetune(recipe(*settings, "gated.budgets=[0.95, 0.6]"))
    with pytest.raises(RecipeError, match="data.eval_batch_size: 2 there, 1 here"):
        finetune(recipe(*settings, "gated.budgets=[0.9, 0.6]", "data.eval_batch_size=1"))


def test_folders_of_releases_without_a_setting_are_taken_on(recipe):
    finetune(recipe("dense.epochs=1"))
    file = recipe().output / "dense" / "recipe.yaml"
    values = yaml.safe_load(file.read_text())
    del values["task"]["dice_weight"], values["data"]["flip"]
    file.write_text(yaml.safe_dump(values))
    finetune(recipe("dense.epochs=1"))  # complete: skipped
    with pytest.raises(RecipeError, match="dice_weight: 0.0 there, 0.5 here"):
        finetune(recipe("dense.epochs=1", "task.dice_weight=0.5"))


def test_the_average_needs_branches(recipe):
    with pytest.raises(RecipeError, match="the stage average needs gated.retrofit.multipool"):
        recipe("stages=[dense, average]")


def test_reference_and_gated_start_from_the_dense_result(recipe):
    finetune(recipe("dense.epochs=1"))
    settings = ("stages=[reference, gated]", "gated.lr=1e-12", "gated.gate_lr=1e-12",
                "gated.epochs=1", "gated.freeze_norm=true", "dense.epochs=1",
                "gated.sparsity.kind=layer")  # fmt: skip
    tiny = recipe(*settings)
    finetune(tiny)
    dense = load_tensors(tiny.output / "dense" / "model.safetensors")
    for name in ("reference", "gated-0.80"):
        tuned = load_tensors(tiny.output / name / "model.safetensors")
        assert dense.keys() <= tuned.keys()
        for key, value in dense.items():
            torch.testing.assert_close(tuned[key], value, rtol=0, atol=1e-6, msg=key)


def test_without_a_dense_network_there_is_nothing_to_gate(recipe):
    with pytest.raises(RecipeError, match="no dense network to start from.*model.checkpoint"):
        finetune(recipe("stages=[gated]"))


def test_gated_stage_can_start_from_a_checkpoint(recipe, tmp_path):
    network = build_network(recipe().model)
    save_weights(network, tmp_path / "whole.safetensors")
    overrides = ["stages=[gated]", "gated.epochs=1"]
    path = tmp_path / "whole.safetensors"
    overrides.append(f"model.checkpoint={path}")
    metrics = finetune(recipe(*overrides))["gated-0.80"]
    assert metrics["complete"]
    with pytest.raises(RecipeError, match=r"gated-0.80 .* \(budget: 0.8 there, 0.804 here"):
        finetune(recipe(*overrides, "gated.budgets=[0.804]"))


def test_results_of_another_recipe_are_not_overwritten(recipe):
    finetune(recipe("dense.epochs=1"))
    with pytest.raises(RecipeError, match=r"dense.lr: 0.001 there, 0.1 here.*another output"):
        finetune(recipe("dense.epochs=1", "dense.lr=0.1"))
    # What has no effect on the stage may differ.
    finetune(recipe("dense.epochs=1", "gated.lr=0.1", "runtime.threads=1", "data.workers=1"))


def test_a_folder_is_for_one_run_at_a_time(recipe):
    tiny = recipe()
    folder = tiny.output / "dense"
    folder.mkdir(parents=True)
    with locked(folder), pytest.raises(TrainingError, match="another process is training in"):
        finetune(tiny)
    assert not (folder / "recipe.yaml").exists()


# Exact resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("dense", []),
        ("dense", ["runtime.gradient_accumulation=2", "runtime.mixed_precision=bf16"]),
        ("dense", ["data.workers=1", "runtime.channels_last=true"]),
        ("gated-0.80", []),
    ],
    ids=["dense", "accumulation and bf16", "workers", "gated"],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(recipe, tmp_path, stage, settings):
    settings = [*settings, "data.train_count=9", "runtime.checkpoint_every=1"]
    if stage != "dense":
        save_weights(build_network(recipe().model), tmp_path / "whole.safetensors")
        path = tmp_path / "whole.safetensors"
        settings += ["stages=[gated]", f"model.checkpoint={path}"]
    whole = recipe(*settings, output="whole")
    expected = finetune(whole)[stage]

    resumed = recipe(*settings, output="killed")
    for _ in range(2):  # epochs have 4 batches: inside the first epoch, then inside the second
        with each_batch(kill_at(4)), pytest.raises(Killed):
            finetune(resumed)
        torch.manual_seed(99)
    result = finetune(resumed)[stage]

    assert without_times(result) == without_times(expected)
    for name in ("model.safetensors", "best.safetensors"):
        if (whole.output / stage / name).exists():
            assert_same_weights(whole.output / stage / name, resumed.output / stage / name)


def test_another_seed_gives_other_weights(recipe):
    """Else the tests above would prove nothing."""
    first, second = recipe(output="a"), recipe("seed=1", output="b")
    finetune(first), finetune(second)
    with pytest.raises(AssertionError):
        assert_same_weights(*(r.output / "dense" / "model.safetensors" for r in (first, second)))


def test_only_the_last_checkpoint_is_kept_and_partial_ones_are_ignored(recipe):
    tiny = recipe("runtime.checkpoint_every=1")
    folder = tiny.output / "dense" / "checkpoints"
    with each_batch(kill_at(3)), pytest.raises(Killed):
        finetune(tiny)
    assert [path.name for path in folder.iterdir()] == ["epoch-00000-step-00000002"]
    partial = folder / ".epoch-00000-step-00000003.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"cut off")
    finetune(tiny)
    assert [path.name for path in folder.iterdir()] == ["epoch-00002-step-00000006"]


def test_a_checkpoint_that_is_damaged_or_of_other_processes_is_refused(recipe):
    tiny = recipe("runtime.checkpoint_every=1")
    with each_batch(kill_at(3)), pytest.raises(Killed):
        finetune(tiny)
    (checkpoint,) = (tiny.output / "dense" / "checkpoints").iterdir()
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert {"states.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= set(
        files
    )
    assert not [name for name in files if name.startswith("custom")]  # those run code when read
    for name in ("states.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"):
        for content in (files[name][: len(files[name]) // 2], None):
            if content is None:
                (checkpoint / name).unlink()
            else:
                (checkpoint / name).write_bytes(content)
            with pytest.raises(TrainingError, match=f"cannot go on from {checkpoint}"):
                finetune(tiny)
            (checkpoint / name).write_bytes(files[name])
    states = json.loads(files["states.json"])
    (checkpoint / "states.json").write_text(json.dumps({**states, "processes": 2}))
    with pytest.raises(TrainingError, match="written by 2 processes, this run has 1"):
        finetune(tiny)
    (checkpoint / "states.json").write_bytes(files["states.json"])
    assert finetune(tiny)["dense"]["complete"]


def test_runs_of_one_process_may_differ_in_precision(recipe):
    for precision in ("bf16", "no", "bf16"):
        given = recipe("dense.epochs=1", f"runtime.mixed_precision={precision}", output=precision)
        assert finetune(given)["dense"]["complete"]


@pytest.mark.sweep
def test_two_processes_train_and_score_one_network(recipe, tmp_path):
    # A decoder that leaves the deepest layers of its encoder out: they have no gradient.
    arguments = (
        "{encoder_name: resnet18, encoder_depth: 3, decoder_channels: [16, 16, 8], classes: 6}"
    )
    settings = ["stages=[dense, gated]", "dense.epochs=1", "data.batch_size=1"]
    settings += [f"model.arguments={arguments}"]
    tiny = recipe(*settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "pag_retrofit", "finetune", str(tmp_path / "tiny.yaml"), *settings]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("dense: epoch 1/1") == 1
    for stage in ("dense", "gated-0.80"):
        metrics = json.loads((tiny.output / stage / "metrics.json").read_text())
        assert metrics["final"]["images"] == 3  # one is repeated to even out the processes
        assert metrics["steps"] == len(metrics["history"]) * 3
        again = evaluate_file(tiny.output / stage, tiny)
        assert again.metrics["miou"] == pytest.approx(metrics["final"]["miou"], rel=1e-6)
        assert again.fraction == pytest.approx(metrics["final"]["fraction"], rel=1e-6)


@pytest.mark.sweep
def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(recipe, tmp_path):
    # Norms are frozen: batch statistics are those of each process's images.
    settings = ["stages=[dense, gated]", "dense.freeze_norm=true", "gated.freeze_norm=true",
                "dense.epochs=3", "data.scale=[1, 1]"]  # fmt: skip
    one = finetune(recipe(*settings, "data.batch_size=2"))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "pag_retrofit", "finetune", str(path), *settings, "data.batch_size=1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for stage, names, tolerance in (
        ("dense", ["loss"], 1e-4),
        # Each process draws gate noise of its own, so pixels differ, their expected share hardly.
        ("gated-0.80", ["expected_fraction", "rho"], 1e-2),
    ):
        two = json.loads((tmp_path / "two" / stage / "metrics.json").read_text())
        assert two["steps"] == one[stage]["steps"]
        for mine, theirs in zip(two["history"], one[stage]["history"], strict=True):
            for name in names:
                assert mine[name] == pytest.approx(theirs[name], rel=tolerance), (stage, name)
    first, second = (
        load_tensors(folder / "dense" / "model.safetensors")
        for folder in (tmp_path / "out", tmp_path / "two")
    )
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-4, msg=key)


# Training that goes wrong ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(recipe):
    tiny = recipe()
    message = r"dense: the loss is not finite.*step 5 \(epoch 2"
    with each_batch(lambda number: math.nan if number == 5 else 1.0):
        with pytest.raises(TrainingError, match=message):
            finetune(tiny)
    (checkpoint,) = (tiny.output / "dense" / "checkpoints").iterdir()
    assert checkpoint.name == "epoch-00001-step-00000003"
    weights = load_tensors(checkpoint / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not json.loads((tiny.output / "dense" / "metrics.json").read_text())["complete"]
    assert not (tiny.output / "dense" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(recipe, monkeypatch):
    step = torch.optim.AdamW.step
    count = 0

    def ruin(self, *args, **kwargs):
        nonlocal count
        count += 1
        step(self, *args, **kwargs)
        if count == 6:  # the last step of the last epoch: no further loss would tell
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    tiny = recipe()
    with pytest.raises(TrainingError, match="is not finite"):
        finetune(tiny)
    (checkpoint,) = (tiny.output / "dense" / "checkpoints").iterdir()
    assert checkpoint.name == "epoch-00001-step-00000003"


def test_too_few_images_for_a_batch(recipe):
    with pytest.raises(TrainingError, match="7 training images do not fill one batch of 8"):
        finetune(recipe("data.batch_size=8"))


def test_wrong_number_of_classes(recipe):
    with pytest.raises(TrainingError, match="model.arguments"):
        finetune(recipe("model.arguments.classes=5"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_half_precision_needs_a_gpu(recipe):
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        finetune(recipe("runtime.mixed_precision=fp16"))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_recipes_do_not_shard(kind, recipe, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(TrainingError, match=f"{kind}.*examples/sharded_training.py"):
        finetune(recipe())


# Pretrained encoders -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "tu-mobilenetv2_050"])
def test_encoder_weights_are_loaded_with_or_without_prefix(recipe, tmp_path, name, caplog):
    settings = f"model.arguments.encoder_name={name}"
    donor = build_network(recipe(settings).model)
    weights = {
        key.removeprefix("model."): value.clone()
        for key, value in donor.encoder.state_dict().items()
    }
    path = tmp_path / "encoder.safetensors"
    save_tensors({**weights, "classifier.weight": torch.zeros(3)}, path)
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO, "pag_retrofit"):
        network = build_network(recipe(settings, f"model.encoder_checkpoint={path}").model)
    assert "classifier.weight" in caplog.text
    own = network.encoder.state_dict()
    assert all(torch.equal(own[key], value) for key, value in donor.encoder.state_dict().items())


def test_encoder_weights_that_do_not_fit_are_named(recipe, tmp_path):
    weights = build_network(recipe().model).encoder.state_dict()
    path = tmp_path / "encoder.safetensors"
    model = recipe().model.model_copy(update={"encoder_checkpoint": path})

    save_tensors({k: v for k, v in weights.items() if k != "model.bn1.weight"}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(model.bn1.weight\)"):
        build_network(model)
    save_tensors({**weights, "model.bn1.weight": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match=r"bn1.weight \(5,\) instead of"):
        build_network(model)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        build_network(model)


# Parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 10, 100])
def test_one_cycle(total):
    shares = [one_cycle(step, total, 0.1) for step in range(total)]
    assert all(0 < share <= 1 for share in shares)
    if total >= 10:
        assert max(shares) == pytest.approx(1.0, abs=0.02)
        assert shares[0] == pytest.approx(1 / 25)
        assert shares[-1] < 1e-3
        peak = shares.index(max(shares))
        assert shares[peak:] == sorted(shares[peak:], reverse=True)


def test_sampler_depends_on_seed_and_epoch():
    sampler = EpochSampler(20, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(20)) == sorted(range(len(sampler)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(20, seed=1)) != first


def test_each_parameter_is_in_one_group(recipe):
    import pag_retrofit as pag

    tiny = recipe("gated.encoder_lr=1e-4")
    assert tiny.gated is not None
    network = build_network(tiny.model)
    gated = pag.retrofit(network, 0.8, example_input=(1, 3, 64, 64), inplace=True)
    groups = {group["name"]: group for group in parameter_groups(gated, tiny.gated)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "encoder": 1e-4, "rest": 1e-3, "gates": 0.1,
    }  # fmt: skip
    assert groups["gates"]["weight_decay"] == 0
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(gated.parameters()))


def test_frozen_norms_keep_their_statistics(recipe):
    tiny = recipe("dense.freeze_norm=true", "dense.epochs=1")
    finetune(tiny)
    torch.manual_seed(0)
    tensors = load_tensors(tiny.output / "dense" / "model.safetensors")
    assert all(v.eq(0).all() for k, v in tensors.items() if k.endswith("running_mean"))
    assert all(v.eq(1).all() for k, v in tensors.items() if k.endswith("running_var"))
