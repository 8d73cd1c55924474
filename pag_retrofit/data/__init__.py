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
from .nyu import NYU_CLASSES, NYUv2
from .rgbd import RGBDFolder
from .scenes import SCENE_CLASSES, Scenes
from .shards import ShardImages, StreamedImages
from .stanford import STANFORD_CLASSES, Stanford2D3D

__all__ = [
    "Augmentation",
    "AugmentedDataset",
    "BSDS500",
    "CAMVID_CLASSES",
    "CITYSCAPES_CLASSES",
    "CamVid",
    "Cityscapes",
    "EvaluationDataset",
    "IGNORE_INDEX",
    "KITTISemantic",
    "LabelledFolder",
    "NYU_CLASSES",
    "NYUv2",
    "Normalize",
    "PadToMultiple",
    "PixelDataset",
    "RGBDFolder",
    "SCENE_CLASSES",
    "STANFORD_CLASSES",
    "Sample",
    "Scenes",
    "ShardImages",
    "Stanford2D3D",
    "StreamedImages",
]
