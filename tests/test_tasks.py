from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from pag_retrofit.errors import DataError, TrainingError
from pag_retrofit.evaluation import evaluate_network
from pag_retrofit.tasks import DepthTask, NormalsTask, SegmentationTask

CLASSES = ("sky", "road", "car", "tree")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (3, 8, 10), generator=generator)
    label[:, :, 7:] = 255
    label[label == 2] = 1  # no car
    return {
        "image": torch.randn(3, 3, 8, 10, generator=generator),
        "label": label,
        "logits": torch.randn(3, 4, 8, 10, generator=generator),
    }


def test_cross_entropy_leaves_void_out(batch):
    loss = SegmentationTask(CLASSES).loss(batch["logits"], batch)
    torch.testing.assert_close(
        loss, F.cross_entropy(batch["logits"], batch["label"], ignore_index=255)
    )
    changed = batch["logits"].clone()
    changed[:, :, :, 7:] += torch.randn(3, 4, 8, 3)
    assert torch.equal(
        SegmentationTask(CLASSES, dice_weight=0.5).loss(changed, batch),
        SegmentationTask(CLASSES, dice_weight=0.5).loss(batch["logits"], batch),
    )


def test_loss_of_a_batch_of_void_is_zero_and_has_a_gradient(batch):
    logits = batch["logits"].requires_grad_()
    void = {"label": torch.full((3, 8, 10), 255)}
    loss = SegmentationTask(CLASSES, dice_weight=0.5).loss(logits, void)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_dice_is_weighted(batch):
    plain, half, full = (
        SegmentationTask(CLASSES, dice_weight=weight).loss(batch["logits"], batch)
        for weight in (0, 0.5, 1.0)
    )
    assert full > half > plain
    torch.testing.assert_close(full - half, half - plain)


def test_loss_is_float32_for_half_precision_logits(batch):
    loss = SegmentationTask(CLASSES, dice_weight=0.5).loss(batch["logits"].bfloat16(), batch)
    assert loss.dtype == torch.float32


def test_miou_equals_torchmetrics(batch):
    task = SegmentationTask(CLASSES)
    counts = task.counts(batch["logits"], batch)
    assert counts.shape == (3, 4, 4)
    metrics = task.metrics(counts.sum(0))
    reference = MulticlassJaccardIndex(4, ignore_index=255)
    assert metrics["miou"] == pytest.approx(
        reference(batch["logits"].argmax(1), batch["label"]).item()
    )
    known = batch["label"] != 255
    hits = (batch["logits"].argmax(1) == batch["label"])[known]
    assert metrics["pixel_accuracy"] == pytest.approx(hits.double().mean().item())


def test_counts_are_of_each_image(batch):
    task = SegmentationTask(CLASSES)
    counts = task.counts(batch["logits"], batch)
    for i in range(3):
        alone = task.counts(batch["logits"][i : i + 1], {"label": batch["label"][i : i + 1]})
        assert torch.equal(counts[i], alone[0])


def test_a_class_that_does_not_occur_counts_not(batch):
    task = SegmentationTask(CLASSES)
    logits = F.one_hot(batch["label"].clamp(max=3), 4).permute(0, 3, 1, 2).float()
    metrics = task.metrics(task.counts(logits, batch).sum(0))
    assert metrics["iou"]["car"] is None
    assert metrics["iou"]["sky"] == 1.0
    assert metrics["miou"] == 1.0


def test_logits_of_the_wrong_shape_are_refused(batch):
    task = SegmentationTask(CLASSES)
    with pytest.raises(TrainingError, match=r"\(3, 5, 8, 10\), expected \(3, 4, 8, 10\)"):
        task.loss(torch.zeros(3, 5, 8, 10), batch)
    with pytest.raises(TrainingError, match="size of the labels"):
        task.counts(torch.zeros(3, 4, 4, 5), batch)


def test_wrong_classes_are_refused():
    with pytest.raises(ValueError, match="classes is empty"):
        SegmentationTask(())
    with pytest.raises(ValueError, match="label of class 'road'"):
        SegmentationTask(CLASSES, ignore_index=1)


class Pixelwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_evaluation_does_not_depend_on_batches_and_restores_modes(batch):
    torch.manual_seed(0)
    network = Pixelwise().train()
    network.norm.eval()
    task = SegmentationTask(CLASSES)
    whole = evaluate_network(network, [batch], task)
    parts = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    split = evaluate_network(network, parts, task, channels_last=True)
    assert whole.metrics == split.metrics
    assert whole.images == split.images == 3
    assert whole.fraction == 1.0
    assert network.training and network.conv.training and not network.norm.training
    assert network.norm.num_batches_tracked == 0


def test_evaluation_without_batches():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_network(Pixelwise(), [], SegmentationTask(CLASSES))
    for task, target in ((DepthTask(), "depth"), (NormalsTask(), "normals")):
        channels = 1 if target == "depth" else 3
        unknown = {"image": torch.rand(2, 3, 8, 8), target: torch.zeros(2, channels, 8, 8)}
        with pytest.raises(DataError, match="none of the 2 images has a pixel with a reading"):
            evaluate_network(nn.Conv2d(3, channels, 1), [unknown], task)
