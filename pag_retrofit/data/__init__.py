"""Data sets, augmentation and the form of a sample."""

from __future__ import annotations

from .augment import (
    Augmentation,
    AugmentedDataset,
    EvaluationDataset,
    Normalize,
    PadToMultiple,
)
from .base import IGNORE_INDEX, PixelDataset, Sample
from .camvid import CAMVID_CLASSES, CamVid
from .scenes import SCENE_CLASSES, Scenes

__all__ = [
    "CAMVID_CLASSES",
    "IGNORE_INDEX",
    "SCENE_CLASSES",
    "Augmentation",
    "AugmentedDataset",
    "CamVid",
    "EvaluationDataset",
    "Normalize",
    "PadToMultiple",
    "PixelDataset",
    "Sample",
    "Scenes",
]
