"""Tasks: what a network learns (loss) and how it is scored (metric)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pag_retrofit.errors import TrainingError


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
    """Name of the metric by which networks are compared; higher is better."""

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
                for prediction, target in zip(output.argmax(dim=1), label, strict=True)
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

    def _check(self, output: Tensor, label: Tensor) -> None:
        expected = (len(label), len(self.classes), *label.shape[1:])
        if tuple(output.shape) != expected:
            raise TrainingError(
                f"the network returned logits of shape {tuple(output.shape)}, expected {expected}: "
                f"{len(self.classes)} classes at the size of the labels; "
                "set the number of classes in model.arguments"
            )
