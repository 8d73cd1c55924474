from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import default_collate
from typer.testing import CliRunner

from pag_retrofit.cli import app
from pag_retrofit.data import EvaluationDataset, PadToMultiple, Scenes
from pag_retrofit.errors import RecipeError, TrainingError
from pag_retrofit.recipe import load_recipe
from pag_retrofit.stages import finetune
from pag_retrofit.tasks import (
    BoundaryTask,
    DepthTask,
    MultiTask,
    NormalsTask,
    SegmentationTask,
)


@pytest.fixture
def batch():
    """Two scenes, padded, so that some pixels have no depth and no normal."""
    data = Scenes(2, size=(24, 40))
    samples = [PadToMultiple(32)(data[index]) for index in range(2)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def test_depth_loss_by_hand():
    depth = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    output = torch.tensor([[[[1.0, 2.0], [3.0, 9.0]]]])
    # d = 1, 2, 3: mean square 14/3, squared mean 4; one step of 1 in the row, of 2 in the column.
    loss = DepthTask(gradient_weight=0.5).loss(output, {"depth": depth})
    assert loss.item() == pytest.approx(14 / 3 - 2 + 0.5 * 1 + 0.5 * 2)


def test_normals_loss_by_hand():
    normals = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]]).T.reshape(1, 3, 1, 3)
    output = torch.tensor([[0.0, 0, 5], [0, 2, 0], [1, 1, 1]]).T.reshape(1, 3, 1, 3)
    assert NormalsTask().loss(output, {"normals": normals}).item() == pytest.approx(0.5)


def test_the_truth_scores_best_and_padding_does_not_count(batch):
    depth = torch.where(batch["depth"] > 0, batch["depth"].log(), 7.0)
    scores = DepthTask().metrics(DepthTask().counts(depth, batch).sum(0))
    assert scores["abs_rel"] == pytest.approx(0, abs=1e-6) and scores["delta1"] == 1
    assert DepthTask().loss(depth, batch).item() == pytest.approx(0, abs=1e-9)
    known = (batch["normals"] != 0).any(1, keepdim=True)
    normals = torch.where(known, 3 * batch["normals"], 1.0)
    counts = NormalsTask().counts(normals, batch).sum(0)
    assert counts[:-1].sum() == 2 * 24 * 40
    assert NormalsTask().metrics(counts)["mean"] < 0.05
    assert NormalsTask().loss(normals, batch).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("task", "key"), [(DepthTask(), "depth"), (NormalsTask(), "normals")])
def test_losses_stay_finite_and_outputs_are_checked(task, key, batch):
    output = torch.zeros_like(batch[key]).requires_grad_()
    empty = {key: torch.zeros_like(batch[key])}
    for target in (batch, empty):
        loss = task.loss(output, target)
        (gradient,) = torch.autograd.grad(loss, output)
        assert math.isfinite(loss.item()) and torch.isfinite(gradient).all()
    with pytest.raises(TrainingError, match="model.arguments"):
        task.loss(output[:, :, 1:], batch)


def test_boundaries_drawn_as_they_are_score_high_and_cost_little():
    data = EvaluationDataset(Scenes(2, size=(60, 84)))
    batch = default_collate([data[0], data[1]])
    assert (batch["boundary"][:, :, 60:] == -1).all()
    task = BoundaryTask(thresholds=3)
    right = torch.where(batch["boundary"] > 0, 9.0, -9.0)
    padding_is_ignored = torch.where(batch["boundary"] < 0, 9.0, right)
    scores = [task.metrics(task.counts(o, batch).sum(0)) for o in (right, padding_is_ignored)]
    assert scores[0] == scores[1]
    assert scores[0]["ods"] > 0.97
    assert task.loss(right, batch) == task.loss(padding_is_ignored, batch) < 1e-3
    assert task.loss(-right, batch) > 8  # of at most 9: however rare boundaries are
    assert task.loss(torch.zeros_like(right), batch).item() == pytest.approx(math.log(2))
    blind = task.metrics(task.counts(torch.full_like(right, -9), batch).sum(0))
    assert blind["ods"] == 0


def test_annotators_are_bits_and_disputed_pixels_do_not_train():
    drawn = torch.zeros(1, 1, 40, 40, dtype=torch.int64)
    drawn[..., 10] = 0b111
    drawn[..., 30] = 0b100
    share = torch.where(drawn == 0b111, 1.0, torch.where(drawn == 0b100, 0.2, 0.0))
    batch = {"boundary": share, "annotators": drawn}
    output = torch.where(drawn == 0b111, 9.0, -9.0)
    counts = BoundaryTask(thresholds=1).counts(output, batch)[0, 0].tolist()
    assert counts == [120, 160, 40, 40]
    disputed = torch.where(drawn == 0b100, 5.0, output)
    task = BoundaryTask()
    assert task.loss(disputed, batch) == task.loss(output, batch)


@pytest.mark.parametrize("task", ["boundaries", "depth", "normals"])
def test_recipes_train_and_keep_the_lowest_error(task, tmp_path):
    settings = ("data.train_count=6", "data.val_count=2", "data.batch_size=2", "dense.epochs=3",
                "gated.epochs=1", "stages=[dense, gated]", "runtime.trackers=[]",
                "runtime.evaluate_every=1", f"output={tmp_path}")  # fmt: skip
    results = finetune(load_recipe(f"recipes/scenes_{task}.yaml", settings))
    dense = results["dense"]
    values = [record[dense["metric"]] for record in dense["history"]]
    best = max(values) if task == "boundaries" else min(values)
    assert dense["best"][dense["metric"]] == best
    names = {"boundaries": "ods", "depth": "abs_rel", "normals": "mean"}
    assert dense["metric"] == names[task]
    assert abs(results["gated-0.70"]["final"]["fraction"] - 0.7) < 0.1


def test_data_without_depth_is_refused(tmp_path):
    overrides = ("task.name=depth", "data.name=camvid", f"data.root={tmp_path}",
                 "data={name: camvid, root: " + str(tmp_path) + ", crop: [8, 8]}")  # fmt: skip
    with pytest.raises(RecipeError, match="the data camvid has targets for segmentation"):
        load_recipe("recipes/scenes_quick.yaml", overrides)


def test_several_tasks_learn_and_score_as_each_alone(batch):
    tasks = {
        "depth": DepthTask(),
        "segmentation": SegmentationTask(Scenes.classes),
        "normals": NormalsTask(),
        "boundaries": BoundaryTask(thresholds=3),
    }
    channels = {"segmentation": 6, "depth": 1, "normals": 3, "boundaries": 1}
    weights = {"depth": 2.0, "segmentation": 0.5, "normals": 1.0, "boundaries": 3.0}
    several = MultiTask(tasks, channels, weights)
    assert several.metric == "depth_abs_rel" and not several.higher_is_better
    output = torch.randn(2, 11, 32, 64, generator=torch.Generator().manual_seed(0))
    parts = dict(zip(tasks, output.split([1, 6, 3, 1], dim=1), strict=True))
    expected = sum(weights[k] * tasks[k].loss(parts[k], batch) for k in tasks)
    torch.testing.assert_close(several.loss(output, batch), expected)
    counts = several.counts(output, batch)
    assert counts.shape == (2, *several.count_shape)
    scores = several.metrics(counts.sum(0))
    for name, task in tasks.items():
        alone = task.metrics(task.counts(parts[name], batch).sum(0))
        assert {f"{name}_{key}": value for key, value in alone.items()}.items() <= scores.items()
        assert several.predict(output)[name].equal(task.predict(parts[name]))
    with pytest.raises(TrainingError, match=r"10 channels; the tasks need 11 \(1 for depth"):
        several.loss(output[:, 1:], batch)


def multitask_recipe(folder, *overrides):
    path = folder / "several.yaml"
    path.write_text(
        f"""name: several
output: {folder / "out"}
stages: [dense, gated]
model: {{name: Unet, arguments: {{encoder_name: tu-test_resnet, encoder_weights: null,
        classes: 10}}}}
data: {{name: scenes, train_count: 4, val_count: 3, size: [64, 64], crop: [64, 64],
       batch_size: 2, eval_batch_size: 2}}
task: {{name: multitask, tasks: [segmentation, depth, normals], weights: [1, 2, 0.5]}}
dense: {{epochs: 1, lr: 1e-3}}
gated: {{epochs: 1, lr: 1e-3, gate_lr: 0.1, budgets: [0.8], calibration_batches: 1}}
runtime: {{trackers: []}}
"""
    )
    return load_recipe(path, overrides)


def test_a_recipe_of_several_tasks(tmp_path):
    results = finetune(multitask_recipe(tmp_path))["gated-0.80"]
    assert results["metric"] == "segmentation_miou"
    assert {"segmentation_miou", "depth_abs_rel", "normals_mean"} <= set(results["final"])
    trained, recipe = tmp_path / "out/gated-0.80", tmp_path / "several.yaml"
    shown = CliRunner().invoke(app, ["evaluate", str(trained), str(recipe)])
    assert "segmentation IoU sphere" in shown.output and "normals_mean" in shown.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.tasks=[depth]", "two or more different tasks"),
        ("task.weights=[1]", "1 weights for 3 tasks"),
        ("task.name=depth", "belong to name: multitask"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(override, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        multitask_recipe(tmp_path, override)
