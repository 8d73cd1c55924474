"""Tasks: what a network learns (loss) and how it is scored (metric)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from skimage.morphology import thin
from torch import Tensor

from pag_retrofit.boundaries import boundary_counts, boundary_metrics, boundary_thresholds
from pag_retrofit.errors import TrainingError
from pag_retrofit.metrics import (
    DEPTH_SUMS,
    NORMAL_COUNTS,
    SMALLEST_DEPTH,
    depth_metrics,
    depth_sums,
    normal_counts,
    normal_metrics,
)

AGREEMENT = 0.3
"""Share of annotators from which a pixel is a boundary in training."""


class Task(Protocol):
    """What training and evaluation ask of a task.

    Attributes:
        metric: name of the metric by which networks are compared.
        higher_is_better: whether the better network has the higher metric.
        count_shape: of the counts of one image.
    """

    metric: str
    higher_is_better: bool
    count_shape: tuple[int, ...]

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Training loss, a float32 scalar."""

    def counts(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What the metrics are made of, a row (B, ...) per image; rows add up."""

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Scores of a data set from its added-up counts."""

    def predict(self, output: Tensor) -> Any:
        """What a network's output says, in the units of `pag-retrofit score`; a map per task."""


class SegmentationTask:
    """Semantic segmentation: cross entropy plus Dice loss, scored by mean intersection over union.

    Pixels of the ignored label count neither in the loss nor in the metrics.

    Args:
        classes: names of the classes; class k has label k.
        ignore_index: label of void pixels. Default: 255.
        dice_weight: weight of the Dice loss next to the cross entropy. Default: 0.

    Raises:
        ValueError: no classes were given.
        ValueError: the ignored label is the label of a class.
    """

    metric = "miou"
    higher_is_better = True

    def __init__(
        self, classes: Sequence[str], *, ignore_index: int = 255, dice_weight: float = 0.0
    ) -> None:
        if not classes:
            raise ValueError("classes is empty; a segmentation task needs at least one class")
        if 0 <= ignore_index < len(classes):
            raise ValueError(
                f"ignore_index {ignore_index} is the label of class {classes[ignore_index]!r}; "
                f"use a number outside 0..{len(classes) - 1}"
            )
        self.classes = tuple(classes)
        self.count_shape: tuple[int, ...] = (len(classes), len(classes))
        self.ignore_index = ignore_index
        self.dice_weight = dice_weight
        self._dice = None
        if dice_weight > 0:
            from segmentation_models_pytorch.losses import DiceLoss

            self._dice = DiceLoss("multiclass", ignore_index=ignore_index)

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Training loss, a float32 scalar.

        Args:
            output: logits (B, num_classes, H, W), any floating dtype.
            batch: has `label` (B, H, W) int64.

        Raises:
            TrainingError: the logits do not fit the classes or the size of the labels.
        """
        label = batch["label"]
        self._check(output, label)
        logits = output.float()
        # Summed and divided here, as a mean over a batch of void pixels only would be NaN.
        total = F.cross_entropy(logits, label, ignore_index=self.ignore_index, reduction="sum")
        loss = total / (label != self.ignore_index).sum().clamp(min=1)
        if self._dice is not None:
            loss = loss + self.dice_weight * self._dice(logits, label)
        return loss

    def counts(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Confusion matrix of each image; sum them over a data set, then call `metrics`.

        Args:
            output: logits (B, num_classes, H, W).
            batch: has `label` (B, H, W) int64.

        Returns:
            Pixel counts (B, num_classes, num_classes) int64, rows are labels, columns predictions.

        Raises:
            TrainingError: the logits do not fit the classes or the size of the labels.
        """
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        label = batch["label"]
        self._check(output, label)
        return torch.stack(
            [
                multiclass_confusion_matrix(
                    prediction,
                    target,
                    num_classes=len(self.classes),
                    ignore_index=self.ignore_index,
                    validate_args=False,
                )
                for prediction, target in zip(self.predict(output), label, strict=True)
            ]
        )

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Scores of a data set.

        Args:
            counts: confusion matrix (num_classes, num_classes), rows are labels.

        Returns:
            `miou`, the mean intersection over union of the classes that occur as label or as
            prediction; `pixel_accuracy`; `iou`, by class name, None where a class does not occur.
        """
        counts = counts.double().cpu()
        hits = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - hits
        present = union > 0
        iou = hits / union.clamp(min=1)
        return {
            "miou": float(iou[present].mean()) if present.any() else 0.0,
            "pixel_accuracy": float(hits.sum() / counts.sum().clamp(min=1)),
            "iou": {
                name: float(iou[k]) if present[k] else None for k, name in enumerate(self.classes)
            },
        }

    def predict(self, output: Tensor) -> Tensor:
        """Class of each pixel, int64 (B, H, W)."""
        return output.argmax(dim=1)

    def _check(self, output: Tensor, label: Tensor) -> None:
        expected = (len(label), len(self.classes), *label.shape[1:])
        if tuple(output.shape) != expected:
            raise TrainingError(
                f"the network returned logits of shape {tuple(output.shape)}, expected {expected}: "
                f"{len(self.classes)} classes at the size of the labels; "
                "set the number of classes in model.arguments"
            )


class DepthTask:
    """Depth: scale-invariant log loss plus gradient matching, scored by relative error.

    The network's one output channel is the natural logarithm of the depth in metres. Pixels of
    depth 0 (no reading, padding) count neither in the loss nor in the metrics.

    With d the difference of logarithms at valid pixels, the loss is
    mean(d^2) - mean(d)^2 / 2 over the batch (Eigen et al. 2014), plus `gradient_weight` times
    the mean of |d(x) - d(x + 1)| over neighbours in a row or a column, both valid (Li and
    Snavely 2018, at one scale).

    Args:
        gradient_weight: weight of gradient matching. Default: 0.5.
    """

    metric = "abs_rel"
    higher_is_better = False
    count_shape: tuple[int, ...] = (DEPTH_SUMS,)

    def __init__(self, *, gradient_weight: float = 0.5) -> None:
        self.gradient_weight = gradient_weight

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Training loss, a float32 scalar; 0 where no pixel is valid.

        Args:
            output: log depth (B, 1, H, W), any floating dtype.
            batch: has `depth` (B, 1, H, W) float32 in metres.

        Raises:
            TrainingError: the output does not have the shape of the depth.
        """
        depth = batch["depth"]
        _check_output(output, depth)
        valid = depth > 0
        target = depth.clamp(min=SMALLEST_DEPTH).log()
        difference = torch.where(valid, output.float() - target, 0.0)
        pixels = valid.sum().clamp(min=1)
        mean = difference.sum() / pixels
        loss = difference.square().sum() / pixels - 0.5 * mean.square()
        for axis in (-1, -2):
            last = difference.shape[axis] - 1
            both = valid.narrow(axis, 0, last) & valid.narrow(axis, 1, last)
            steps = (difference.diff(dim=axis) * both).abs().sum()
            loss = loss + self.gradient_weight * steps / both.sum().clamp(min=1)
        return loss

    def counts(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Sums (B, 9) float64 of `pag_retrofit.metrics.depth_sums`.

        Raises:
            TrainingError: the output does not have the shape of the depth.
        """
        depth = batch["depth"]
        _check_output(output, depth)
        return depth_sums(self.predict(output)[:, 0], depth[:, 0], depth[:, 0] > 0)

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Scores of `pag_retrofit.metrics.depth_metrics`; lower `abs_rel` is better."""
        return depth_metrics(counts)

    def predict(self, output: Tensor) -> Tensor:
        """Metres, float64 (B, 1, H, W)."""
        # An untrained network may ask for depths beyond every float.
        return output.double().clamp(max=20).exp()


class NormalsTask:
    """Surface normals: one minus the cosine, scored by the mean angle.

    The network's three output channels, brought to length 1, are the normal in the camera frame.
    Pixels whose normal has length 0 (no reading, padding) count neither in the loss nor in the
    metrics.
    """

    metric = "mean"
    higher_is_better = False
    count_shape: tuple[int, ...] = (NORMAL_COUNTS,)

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Training loss, a float32 scalar; 0 where no pixel is valid.

        Args:
            output: (B, 3, H, W) of any length, any floating dtype.
            batch: has `normals` (B, 3, H, W) float32 of length 1, or 0 where unknown.

        Raises:
            TrainingError: the output does not have the shape of the normals.
        """
        normals = batch["normals"]
        _check_output(output, normals)
        valid = _has_normal(normals)
        cosine = F.cosine_similarity(output.float(), normals, dim=1)
        return ((1 - cosine) * valid).sum() / valid.sum().clamp(min=1)

    def counts(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Histograms (B, 3602) float64 of `pag_retrofit.metrics.normal_counts`.

        Raises:
            TrainingError: the output does not have the shape of the normals.
        """
        normals = batch["normals"]
        _check_output(output, normals)
        return normal_counts(output, normals, _has_normal(normals))

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Scores of `pag_retrofit.metrics.normal_metrics`; a lower `mean` is better."""
        return normal_metrics(counts)

    def predict(self, output: Tensor) -> Tensor:
        """Unit normals, float32 (B, 3, H, W)."""
        return F.normalize(output.float(), dim=1)


class BoundaryTask:
    """Boundaries: balanced cross entropy, scored by the F measure of the BSDS protocol.

    The network's one output channel is the logit of a boundary. Where at least `AGREEMENT` of the
    annotators see a boundary there is one, where some do the pixel does not count, and elsewhere
    there is none (Liu et al., CVPR 2017). Both kinds of pixels weigh alike in each image (Xie & Tu,
    ICCV 2015). The loss is a mean by weight, as large as a cross entropy of balanced classes: the
    mean over all pixels would be a tenth of that, and the budget's term outweigh it.

    Args:
        thresholds: at which evaluations match boundaries. Default: 19; papers use 99, as
            `pag-retrofit score boundaries` does.
    """

    metric = "ods"
    higher_is_better = True

    def __init__(self, *, thresholds: int = 19) -> None:
        self.thresholds = boundary_thresholds(thresholds)
        self.count_shape: tuple[int, ...] = (thresholds + 1, 4)

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Training loss, a float32 scalar.

        Args:
            output: logits (B, 1, H, W), any floating dtype.
            batch: has `boundary` (B, 1, H, W) float32, the share of annotators; negative where
                there is no image.

        Raises:
            TrainingError: the output does not have the shape of the boundaries.
        """
        boundary = batch["boundary"]
        _check_output(output, boundary)
        positive, negative = boundary >= AGREEMENT, boundary == 0
        counts = [mask.sum((1, 2, 3), keepdim=True).float() for mask in (positive, negative)]
        total = (counts[0] + counts[1]).clamp(min=1)
        weight = positive * (counts[1] / total) + negative * (counts[0] / total)
        losses = F.binary_cross_entropy_with_logits(
            output.float(), positive.float(), weight=weight, reduction="sum"
        )
        return losses / weight.sum().clamp(min=1)

    def counts(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Counts (B, T + 1, 4) float64 of `pag_retrofit.boundaries.boundary_counts`.

        Args:
            output: logits (B, 1, H, W).
            batch: has `annotators` (B, 1, H, W) int64, or a `boundary`, which is thinned.

        Raises:
            TrainingError: the output does not have the shape of the boundaries.
        """
        _check_output(output, batch["boundary"])
        strength = self.predict(output)[:, 0].cpu().numpy()
        drawn = batch.get("annotators", batch["boundary"])[:, 0].cpu().numpy()
        rows = []
        for prediction, bits in zip(strength, drawn, strict=True):
            height, width = ((bits >= 0).any(axis).sum() for axis in (1, 0))  # without padding
            bits = bits[:height, :width].astype(np.int64)
            annotators = range(max(1, int(bits.max()).bit_length()))
            masks = [(bits >> k & 1).astype(bool) for k in annotators]
            if "annotators" not in batch:
                masks = [thin(mask) for mask in masks]
            rows.append(boundary_counts(prediction[:height, :width], masks, self.thresholds))
        return torch.from_numpy(np.stack(rows)).to(output.device)

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Scores of `pag_retrofit.boundaries.boundary_metrics`; a higher `ods` is better."""
        scores = boundary_metrics(counts.cpu().numpy(), self.thresholds)
        return dict(scores)

    def predict(self, output: Tensor) -> Tensor:
        """Boundary strength in [0, 1], float32 (B, 1, H, W)."""
        return torch.sigmoid(output.float())


class MultiTask:
    """Several tasks of one network, each with channels of its own in the output.

    The loss is the weighted sum of the tasks' losses. Metrics carry the task's name in front, such
    as `depth_abs_rel`; networks are compared by that of the first task.

    Args:
        tasks: by name, in the order of their channels.
        channels: output channels of each task, by name.
        weights: of the losses, by name. Default: 1 each.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks = dict(tasks)
        self.channels = [channels[name] for name in self.tasks]
        self.weights = weights or dict.fromkeys(self.tasks, 1.0)
        first = next(iter(self.tasks))
        self.metric = f"{first}_{self.tasks[first].metric}"
        self.higher_is_better = self.tasks[first].higher_is_better
        self._sizes = [math.prod(task.count_shape) for task in self.tasks.values()]
        self.count_shape: tuple[int, ...] = (sum(self._sizes),)

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the tasks' losses, a float32 scalar.

        Raises:
            TrainingError: the output does not have the channels of all tasks.
        """
        parts = self._parts(output)
        losses = [self.weights[k] * task.loss(parts[k], batch) for k, task in self.tasks.items()]
        return torch.stack(losses).sum()

    def counts(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Counts (B, ...) float64 of all tasks, one after the other.

        Raises:
            TrainingError: the output does not have the channels of all tasks.
        """
        parts = self._parts(output)
        # Exact: no count reaches 2^53.
        rows = [task.counts(parts[k], batch).double().flatten(1) for k, task in self.tasks.items()]
        return torch.cat(rows, dim=1)

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Scores of every task, with its name in front."""
        scores: dict[str, Any] = {}
        for name, part in zip(self.tasks, counts.split(self._sizes), strict=True):
            task = self.tasks[name]
            found = task.metrics(part.view(task.count_shape))
            scores |= {f"{name}_{key}": value for key, value in found.items()}
        return scores

    def predict(self, output: Tensor) -> dict[str, Any]:
        """Prediction of every task, by name."""
        return {k: self.tasks[k].predict(part) for k, part in self._parts(output).items()}

    def _parts(self, output: Tensor) -> dict[str, Tensor]:
        if output.shape[1] != sum(self.channels):
            needed = ", ".join(
                f"{count} for {k}" for k, count in zip(self.tasks, self.channels, strict=True)
            )
            raise TrainingError(
                f"the network returned {output.shape[1]} channels; the tasks need "
                f"{sum(self.channels)} ({needed}): set the number of output channels (classes for "
                "SMP) in model.arguments"
            )
        return dict(zip(self.tasks, output.split(self.channels, dim=1), strict=True))


def _has_normal(normals: Tensor) -> Tensor:
    return (normals != 0).any(dim=1)


def _check_output(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise TrainingError(
            f"the network returned shape {tuple(output.shape)}, expected {tuple(target.shape)}: "
            "the channels and the size of the target; set the number of output channels "
            "(classes for SMP) in model.arguments"
        )
