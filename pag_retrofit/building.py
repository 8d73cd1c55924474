"""From the sections of a recipe to the objects they describe: network, data sets, task."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from torch import nn

from pag_retrofit.data import (
    BSDS500,
    Augmentation,
    AugmentedDataset,
    CamVid,
    Cityscapes,
    EvaluationDataset,
    KITTISemantic,
    LabelledFolder,
    Normalize,
    NYUv2,
    RGBDFolder,
    Scenes,
    ShardImages,
    Stanford2D3D,
    StreamedImages,
)
from pag_retrofit.data.base import PixelDataset
from pag_retrofit.errors import CheckpointError
from pag_retrofit.io import ModelSpec
from pag_retrofit.recipe import (
    BSDSSection,
    CamVidSection,
    CityscapesSection,
    FolderSection,
    ModelSection,
    NYUSection,
    Recipe,
    RGBDSection,
    ShardsSection,
    StanfordSection,
    TaskSection,
)
from pag_retrofit.resizing import ResizedInput, see_smaller
from pag_retrofit.tasks import (
    BoundaryTask,
    DepthTask,
    MultiTask,
    NormalsTask,
    SegmentationTask,
    Task,
)

logger = logging.getLogger(__name__)

WITHOUT_WEIGHTS = {"encoder_checkpoint": None, "checkpoint": None}
"""Update of a `ModelSection` for a network whose weights come from elsewhere."""
_RESIZED, _AVERAGED = "pag_resized", "pag_averaged"  # keys of the metadata of weights
_CALIBRATION_IMAGES = 256  # of streamed training images, the first ones; others choose among all


def build_network(section: ModelSection) -> nn.Module:
    """Builds the ungated network and loads the weights its section names.

    The weights of `encoder_checkpoint` are loaded first, those of `checkpoint` over them.

    Raises:
        CheckpointError: the weights do not fit the network.
    """
    network = ModelSpec(section.library, section.name, section.arguments).build()
    if section.encoder_checkpoint is not None:
        load_encoder(network, section.encoder_checkpoint)
    if section.checkpoint is not None:
        load_weights(network, section.checkpoint)
    return network


def load_encoder(network: nn.Module, path: Path) -> None:
    """Loads weights of a backbone into the encoder of a segmentation network.

    The keys may lack the prefix under which the encoder holds its backbone (SMP's `tu-` encoders
    hold a timm network as `model`). Keys that the encoder does not have, such as a classifier's,
    are logged and left out.

    Raises:
        CheckpointError: the network has no encoder.
        CheckpointError: a weight of the encoder is not in the file, or has another shape.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise CheckpointError(
            f"{type(network).__name__} has no encoder to load {path} into; "
            "give the weights of the whole network as model.checkpoint"
        )
    weights = _read_weights(path)
    own = encoder.state_dict()
    prefix = max(("", "model."), key=lambda p: sum(p + key in own for key in weights))
    weights = {prefix + key: value for key, value in weights.items()}
    # Older files lack the batch counters of batch norms; with a fixed momentum they are not used.
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    left_out = sorted(key for key in weights if key not in own)
    _check_weights(path, own, weights, missing)
    encoder.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
    logger.info(
        "encoder weights from %s: %d loaded, left out: %s",
        path,
        len(weights) - len(left_out),
        ", ".join(left_out) or "none",
    )


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads weights of the whole network.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, or the network's
            branches are averaged.
    """
    if _AVERAGED in read_metadata(path):
        raise CheckpointError(
            f"{path} holds a network whose branches are averaged, which cannot be rebuilt: its "
            "scores are in metrics.json beside it"
        )
    weights = _read_weights(path)
    own = network.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    _check_weights(path, own, weights, missing, unexpected)
    network.load_state_dict(weights)
    resized = read_metadata(path).get(_RESIZED)
    if resized is not None:
        see_smaller(network, **json.loads(resized))


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes the weights of a network as safetensors, whole or not at all.

    And how its input is resized, or that its branches are averaged.
    """
    from safetensors.torch import save_file

    weights = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    # Clones: safetensors wants each tensor contiguous and with memory of its own.
    weights = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()
    }
    notes = {"format": "pt"}
    if isinstance(network, ResizedInput):
        notes[_RESIZED] = json.dumps(network.resizing())
    elif hasattr(network, "pag_compute_fraction"):
        notes[_AVERAGED] = "true"
    temporary = path.with_name(f".{path.name}.partial")
    save_file(weights, temporary, notes)
    os.replace(temporary, path)


def training_data(recipe: Recipe) -> AugmentedDataset | StreamedImages:
    """The training images, augmented."""
    section = recipe.data
    augmentation = Augmentation(
        crop=section.crop,
        scale=section.scale,
        flip=section.flip,
        brightness=section.brightness,
        contrast=section.contrast,
    )
    if isinstance(section, ShardsSection):
        return StreamedImages(
            section.train,
            section.classes,
            targets=recipe.task.names,
            count=section.train_count,
            batch_size=section.batch_size,
            augmentation=augmentation,
            normalize=_normalize(recipe),
            seed=recipe.seed,
            buffer=section.buffer,
        )
    return AugmentedDataset(
        _split(recipe, "train"), augmentation, normalize=_normalize(recipe), seed=recipe.seed
    )


def evaluation_data(recipe: Recipe, split: str = "val") -> EvaluationDataset:
    """The images of a split at full size, padded and normalised."""
    return EvaluationDataset(_split(recipe, split), normalize=_normalize(recipe))


def build_task(recipe: Recipe, data: PixelDataset | StreamedImages) -> Task:
    """The task of a recipe, for segmentation on the classes of a data set."""
    section = recipe.task
    tasks = {name: _build_task(name, section, data) for name in section.names}
    if len(tasks) == 1:
        return next(iter(tasks.values()))
    channels = {"segmentation": len(data.classes), "boundaries": 1, "depth": 1, "normals": 3}
    weights = section.weights or (1.0,) * len(tasks)
    return MultiTask(tasks, channels, dict(zip(tasks, weights, strict=True)))


def _build_task(name: str, section: TaskSection, data: PixelDataset | StreamedImages) -> Task:
    if name == "depth":
        return DepthTask(gradient_weight=section.gradient_weight)
    if name == "normals":
        return NormalsTask()
    if name == "boundaries":
        return BoundaryTask(thresholds=section.thresholds)
    return SegmentationTask(
        data.classes, ignore_index=data.ignore_index, dice_weight=section.dice_weight
    )


def _normalize(recipe: Recipe) -> Normalize:
    return Normalize(mean=recipe.data.mean, std=recipe.data.std)


def _split(recipe: Recipe, split: str) -> PixelDataset:
    section = recipe.data
    if isinstance(section, CamVidSection):
        return CamVid(section.root, split)
    if isinstance(section, CityscapesSection):
        kind = Cityscapes if section.name == "cityscapes" else KITTISemantic
        return kind(section.root, split)
    if isinstance(section, FolderSection):
        return LabelledFolder(section.root, split, classes=section.classes)
    if isinstance(section, ShardsSection):
        shards, limit = section.val, None
        if split == "train":
            shards, limit = section.train, _CALIBRATION_IMAGES
        return ShardImages(shards, section.classes, targets=recipe.task.names, limit=limit)
    if isinstance(section, BSDSSection):
        return BSDS500(section.root, split)
    if isinstance(section, RGBDSection):
        return RGBDFolder(section.root, split, normals="normals" in recipe.task.names)
    if isinstance(section, NYUSection):
        return NYUv2(section.root, split, targets=recipe.task.names)
    if isinstance(section, StanfordSection):
        return Stanford2D3D(section.root, split, targets=recipe.task.names)
    count = section.train_count if split == "train" else section.val_count
    # Scenes of different seeds differ, so training and validation share none.
    return Scenes(count, size=section.size, seed=2 * recipe.seed + (split != "train"))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error


def _check_weights(
    path: Path,
    own: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    missing: list[str],
    unexpected: list[str] | None = None,
) -> None:
    """Raises one error that lists all that does not fit."""
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected or []),
            ("of another shape", shapes),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the network: {'; '.join(problems)}; "
            "check model.name and model.arguments"
        )
