"""Images streamed from shards: what an epoch holds, and that runs on them resume exactly."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import (
    RECIPE,
    Killed,
    assert_same_weights,
    each_batch,
    fresh_accelerate,  # noqa: F401
    kill_at,
    without_times,
)
from torch.utils.data import DataLoader

from pag_retrofit.building import evaluation_data
from pag_retrofit.data import Augmentation, Normalize, Scenes, ShardImages, StreamedImages
from pag_retrofit.data.shards import expand_shards
from pag_retrofit.errors import DataError, RecipeError
from pag_retrofit.recipe import load_recipe
from pag_retrofit.stages import finetune

pytest.importorskip("webdataset")
CLASSES = ["a", "b", "c", "d", "e", "f"]


def png(array: np.ndarray) -> bytes:
    with io.BytesIO() as buffer:
        Image.fromarray(array).save(buffer, "PNG")
        return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as file:
        for key, parts in samples.items():
            for ending, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def constant(value: int) -> dict[str, bytes]:
    """An image that is its own name."""
    return {
        "png": png(np.full((8, 8, 3), value, dtype=np.uint8)),
        "label.png": png(np.full((8, 8), value % 6, dtype=np.uint8)),
    }


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Four shards of five images, 0 to 19."""
    for shard in range(4):
        samples = {f"{k:03d}": constant(5 * shard + k) for k in range(5)}
        write_shard(tmp_path / f"train-{shard}.tar", samples)
    return str(tmp_path / "train-{0..3}.tar")


def streamed(shards: str, count: int = 20, **options: int) -> StreamedImages:
    still = Augmentation(crop=(8, 8), scale=(1, 1), flip=0, brightness=0, contrast=0)
    same = Normalize(mean=(0, 0, 0), std=(1, 1, 1))
    return StreamedImages(
        shards, CLASSES, count=count, batch_size=4, augmentation=still, normalize=same, **options
    )


def names(data: StreamedImages, workers: int = 0) -> list[list[int]]:
    batches = DataLoader(data, batch_size=4, drop_last=True, num_workers=workers)
    found = [(255 * batch["image"][:, 0, 0, 0]).round().int().tolist() for batch in batches]
    for batch, numbers in zip(batches, found, strict=True):
        assert batch["label"][:, 0, 0].tolist() == [number % 6 for number in numbers]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_holds_whole_batches_in_an_order_of_seed_and_epoch(
    numbered: str, workers: int
) -> None:
    data = streamed(numbered, buffer=3)
    first = names(data, workers)
    assert len(first) == 5 and all(len(batch) == 4 for batch in first)
    again = streamed(numbered, buffer=3)
    assert names(again, workers) == first
    again.set_epoch(1)
    assert names(again, workers) != first
    assert names(streamed(numbered, buffer=3, seed=1), workers) != first


@pytest.mark.parametrize("buffer", [2, 7, 1000])
def test_rounds_hold_every_image_once(numbered: str, buffer: int) -> None:
    read = [number for batch in names(streamed(numbered, 60, buffer=buffer)) for number in batch]
    for begin in (0, 20, 40):
        assert Counter(read[begin : begin + 20]) == Counter(range(20))
    assert read[:20] != read[20:40]


def test_evaluation_keeps_the_order_of_the_shards(numbered: str) -> None:
    data = ShardImages(numbered, CLASSES, limit=12)
    found = [round(255 * float(data[k]["image"][0, 0, 0])) for k in range(len(data))]
    assert found == list(range(12))


def test_shards_that_cannot_be_read(numbered: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 are missing"):
        ShardImages(str(tmp_path / "train-{3..4}.tar"), CLASSES)
    programs = ("pipe:cat x.tar", "gs://bucket/x.tar", "http://a/x.tar::pipe:cat", "{pipe,x}:cat")
    for program in programs:
        with pytest.raises(DataError, match="expected a path or an http"):
            ShardImages(program, CLASSES)
    addresses = "http://user:word@localhost:8000/x-{0..1}.tar?signed=a:b"
    assert expand_shards(addresses) == tuple(addresses.replace("{0..1}", k) for k in "01")
    path = tmp_path / "broken.tar"
    write_shard(path, {"1": {"png": constant(1)["png"]}})
    with pytest.raises(DataError, match=r"broken.tar/1 needs an image .* and a label.png"):
        ShardImages(str(path), CLASSES)
    write_shard(path, {"1": {**constant(1), "label.png": png(np.full((8, 8), 9, np.uint8))}})
    with pytest.raises(DataError, match=r"1.label.png has label values 9"):
        ShardImages(str(path), CLASSES)[0]
    path.write_bytes((tmp_path / "train-0.tar").read_bytes()[:1500])
    with pytest.raises(DataError, match="cannot read"):
        ShardImages(str(path), CLASSES)
    write_shard(path, {})
    with pytest.raises(DataError, match="no images"):
        next(iter(streamed(str(path))))
    with pytest.raises(DataError, match="1 shards for 2 workers"):
        names(streamed(numbered.replace("{0..3}", "0")), 2)


def as_files(sample: dict[str, torch.Tensor]) -> dict[str, bytes]:
    image = (255 * sample["image"]).round().byte().permute(1, 2, 0)
    normals = (127.5 * (sample["normals"] + 1)).round().byte().permute(1, 2, 0)
    normals[(sample["normals"] == 0).all(0)] = 0
    return {
        "png": png(image.numpy()),
        "label.png": png(sample["label"].byte().numpy()),
        "boundary.png": png((255 * sample["boundary"][0]).byte().numpy()),
        "depth.png": png((1000 * sample["depth"][0]).round().numpy().astype(np.uint16)),
        "normals.png": png(normals.numpy()),
    }


def test_targets_of_all_tasks(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    scenes = Scenes(10, size=(64, 64))
    tasks = ("segmentation", "boundaries", "depth", "normals")
    stored = ShardImages(str(tmp_path / "train-{0..1}.tar"), CLASSES, targets=tasks)
    assert len(stored) == 10
    for index in (0, 9):
        expected, found = scenes[index], stored[index]
        assert found.keys() == expected.keys()
        tolerances = {"image": 1 / 255, "depth": 1e-3, "normals": 1 / 127}
        for name, value in expected.items():
            atol = tolerances.get(name, 0)
            torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)
        there = (expected["normals"] != 0).any(0)
        assert torch.equal(there, (found["normals"] != 0).any(0))
        lengths = found["normals"].norm(dim=0)[there]
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    with pytest.raises(DataError, match=r"targets \['flow'\]"):
        ShardImages(str(tmp_path / "train-0.tar"), targets=("flow",))


@pytest.mark.parametrize("largest", [True, 255, 65535])
def test_boundaries_are_above_half_of_what_a_file_can_hold(largest: int, tmp_path: Path) -> None:
    kind = {True: np.bool_, 255: np.uint8, 65535: np.uint16}[largest]
    strengths = np.zeros((8, 8), kind)
    strengths[:, 2:4], strengths[:, 6:] = largest // 2, largest
    write_shard(tmp_path / "x.tar", {"1": {**constant(1), "boundary.png": png(strengths)}})
    sample = ShardImages(str(tmp_path / "x.tar"), targets=("boundaries",))[0]
    assert torch.equal(sample["boundary"], torch.from_numpy(strengths == largest)[None].float())


def test_normals_are_missing_where_a_file_is_black(tmp_path: Path) -> None:
    colours = np.full((8, 8, 3), (128, 128, 255), np.uint8)
    colours[:2], colours[2:4] = 0, (1, 1, 1)
    write_shard(tmp_path / "x.tar", {"1": {**constant(1), "normals.png": png(colours)}})
    normals = ShardImages(str(tmp_path / "x.tar"), targets=("normals",))[0]["normals"]
    assert normals.dtype == torch.float32 and (normals[:, :2] == 0).all()
    torch.testing.assert_close(normals[:, 2:4], torch.full((3, 2, 8), -(3**-0.5)))
    assert (normals[2, 4:] > 0.999).all()


def test_targets_of_another_size_or_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    half = np.full((4, 8), 1000, np.uint16)
    write_shard(path, {"1": {**constant(1), "depth.png": png(half)}})
    with pytest.raises(DataError, match=r"1.depth.png is 8x4 pixels but its image .* is 8x8"):
        ShardImages(str(path), targets=("depth",))[0]
    with pytest.raises(DataError, match=r"needs an image .* and a depth.png and a normals.png"):
        ShardImages(str(path), targets=("depth", "normals"))
    write_shard(path, {"1": {**constant(1), "depth.png": constant(1)["label.png"]}})
    with pytest.raises(DataError, match=r"1.depth.png .* one channel of 16 bits"):
        ShardImages(str(path), targets=("depth",))[0]


@pytest.mark.parametrize(
    "task, channels, metric", [("depth", 1, "abs_rel"), ("boundaries", 1, "ods")]
)
def test_other_tasks_train_on_shards(task: str, channels: int, metric: str, tmp_path: Path) -> None:
    section = write_scenes(tmp_path).replace(f"classes: [{', '.join(CLASSES)}], ", "")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out"))
    settings = [section, "stages=[dense]", "dense.epochs=1"]
    with pytest.raises(RecipeError, match=r"names of the classes in data.classes"):
        load_recipe(path, settings)
    settings += [f"task={{name: {task}}}", f"model.arguments.classes={channels}"]
    recipe = load_recipe(path, settings)
    assert len(evaluation_data(recipe, "train")) == 10  # what gates are calibrated on
    final = finetune(recipe)["dense"]["final"]
    assert final["images"] == 5 and np.isfinite(final[metric])


def write_scenes(folder: Path) -> str:
    """Ten scenes in two shards; the section of a recipe that reads them."""
    scenes = Scenes(10, size=(64, 64))
    for shard in range(2):
        samples = {}
        for index in range(5 * shard, 5 * shard + 5):
            samples[f"{index:03d}"] = as_files(scenes[index])
        write_shard(folder / f"train-{shard}.tar", samples)
    return (
        f"data={{name: shards, train: '{folder}/train-{{0..1}}.tar', "
        f"val: '{folder}/train-1.tar', train_count: 8, buffer: 4, crop: [64, 64], "
        f"classes: [{', '.join(CLASSES)}], batch_size: 2, eval_batch_size: 2}}"
    )


def test_a_killed_run_on_shards_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    shards = write_scenes(tmp_path)
    path = tmp_path / "tiny.yaml"

    def recipe(output: str, *overrides: str):
        path.write_text(RECIPE.format(output=tmp_path / output))
        settings = ["runtime.checkpoint_every=1", shards, *overrides]
        return load_recipe(path, settings)

    expected = finetune(recipe("whole"))
    for batch in (3, 4):  # in the middle of an epoch
        with each_batch(kill_at(batch)), pytest.raises(Killed):
            finetune(recipe("killed"))
        torch.manual_seed(99)
    result = finetune(recipe("killed"))
    assert without_times(result["dense"]) == without_times(expected["dense"])
    files = [tmp_path / run / "dense" / "model.safetensors" for run in ("whole", "killed")]
    assert_same_weights(*files)
    with pytest.raises(RecipeError, match="data.workers: 0 there, 1 here"):
        finetune(recipe("whole", "data.workers=1"))


@pytest.mark.sweep
def test_two_processes_read_what_one_reads(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    # Each process divides by the pixels of its own images: none may be void. The weights hardly
    # move, so that the losses of the second epoch tell which images it had.
    settings = [write_scenes(tmp_path), "data.scale=[1, 1]", "dense.freeze_norm=true"]
    settings += ["dense.lr=1e-6"]
    path.write_text(RECIPE.format(output=tmp_path / "one"))
    one = finetune(load_recipe(path, settings))["dense"]
    path.write_text(RECIPE.format(output=tmp_path / "two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "pag_retrofit", "finetune", str(path), *settings, "data.batch_size=1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/dense/metrics.json").read_text())
    assert two["steps"] == one["steps"] and two["final"]["images"] == 5
    for mine, theirs in zip(two["history"], one["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
