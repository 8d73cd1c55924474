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
from .bsds import BSDS500
from .camvid import CAMVID_CLASSES, CamVid
from .cityscapes import CITYSCAPES_CLASSES, Cityscapes, KITTISemantic
from .folder import LabelledFolder
from .rgbd import RGBDFolder
from .scenes import SCENE_CLASSES, Scenes

__all__ = [
    "LabelledFolder",
    "KITTISemantic",
    "Cityscapes",
    "CITYSCAPES_CLASSES",
    "BSDS500",
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
    "RGBDFolder",
    "Sample",
    "Scenes",
]
