"""Augmentation: all maps of a sample move together, and randomness is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pag_retrofit.data import (
    IGNORE_INDEX,
    Augmentation,
    AugmentedDataset,
    EvaluationDataset,
    Normalize,
    PadToMultiple,
    PixelDataset,
    Sample,
    Scenes,
)
from pag_retrofit.errors import DataError

sides = st.integers(4, 50)
seeds = st.integers(0, 2**32)
STILL = Augmentation(scale=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0)


def coordinates(height: int, width: int) -> Sample:
    """A sample that knows its places: every map but the boundary holds pixel coordinates."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([(columns + 0.5) / width, (rows + 0.5) / height])
    return {
        "image": torch.cat([centres, torch.full((1, height, width), 0.25)]),
        "label": columns,
        "depth": 1.0 + rows[None].float(),
        "normals": torch.stack([columns + 1.0, rows + 1.0, torch.ones(height, width)]),
        "boundary": ((rows + columns) % 2)[None].float(),
    }


def apply(augmentation: Augmentation, sample: Mapping[str, Tensor], seed: int = 0) -> Sample:
    """Augments with a fresh generator."""
    return augmentation(sample, np.random.default_rng(seed))


@given(height=sides, width=sides, crop=st.tuples(sides, sides), seed=seeds, low=st.floats(0.2, 3))
@settings(max_examples=60, deadline=None)
def test_form_and_values_of_the_result(
    height: int, width: int, crop: tuple[int, int], seed: int, low: float
) -> None:
    sample = coordinates(height, width)
    before = {key: value.clone() for key, value in sample.items()}
    out = apply(Augmentation(crop, scale=(low, 2 * low)), sample, seed)
    assert set(out) == set(sample)
    for key, value in out.items():
        assert value.shape == (*sample[key].shape[:-2], *crop)
        assert value.dtype == sample[key].dtype
        assert torch.equal(sample[key], before[key])
    padded = out["label"] == IGNORE_INDEX
    assert set(out["label"][~padded].tolist()) <= set(range(width))
    assert torch.equal(padded, out["depth"][0] == 0)
    assert torch.equal(padded, (out["normals"] == 0).all(0))
    assert (out["image"][:, padded] == 0.5).all()
    assert (out["boundary"][0, padded] == -1).all()
    assert set(out["boundary"].unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert (~padded).any()


@given(height=sides, width=sides, crop=st.tuples(sides, sides), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_at_scale_1_the_result_is_a_window_of_the_sample(
    height: int, width: int, crop: tuple[int, int], seed: int
) -> None:
    sample = coordinates(height, width)
    out = apply(replace(STILL, crop=crop), sample, seed)
    inside = out["label"] != IGNORE_INDEX
    assert inside.sum() == min(height, crop[0]) * min(width, crop[1])
    rows = (out["depth"][0, inside] - 1).long()
    columns = out["label"][inside]
    for key, value in out.items():
        assert torch.equal(value[..., inside], sample[key][..., rows, columns])
    assert rows.unique().numel() == min(height, crop[0])
    assert columns.unique().numel() == min(width, crop[1])


@given(seed=seeds, scale=st.floats(0.3, 3.0), flip=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_image_and_maps_stay_aligned_when_resized(seed: int, scale: float, flip: float) -> None:
    size = 96
    augmentation = Augmentation((48, 64), scale=(scale, scale), flip=flip, brightness=0, contrast=0)
    out = apply(augmentation, coordinates(size, size), seed)
    inside = F.pad((out["label"] != IGNORE_INDEX)[None].float(), (1, 1, 1, 1))
    # Away from the edges, where bilinear resizing cannot extrapolate the ramps.
    inside = -F.max_pool2d(-inside, 7, stride=1, padding=2)[0] > 0
    assert inside.sum() > 50
    # The image's ramps give the exact place in pixels; the maps name the nearest pixel.
    for ramp, place in ((0, out["label"] + 0.5), (1, out["depth"][0] - 0.5)):
        error = (out["image"][ramp] * size - place)[inside]
        assert error.abs().max() < 0.501
    steps = (out["image"][0].diff(dim=-1) * size)[inside[:, 1:] & inside[:, :-1]]
    # The scale is met within the rounding of sizes to whole pixels.
    assert float(steps.median()) == pytest.approx((-1 if flip else 1) / scale, rel=0.05)


def test_scales_are_drawn_from_the_whole_range() -> None:
    augmentation = Augmentation((32, 32), scale=(0.5, 2.0), flip=0, brightness=0, contrast=0)
    sample = coordinates(100, 100)
    steps = [
        float(apply(augmentation, sample, seed)["image"][0, 16].diff()[12:20].mean() * 100)
        for seed in range(200)
    ]
    drawn = np.log2(1 / np.array(steps))
    assert drawn.min() < -0.9 and drawn.max() > 0.9
    assert np.mean(drawn > 0) == pytest.approx(0.5, abs=0.12)


def test_flip_mirrors_every_map_and_the_x_of_normals() -> None:
    sample = coordinates(10, 12)
    out = apply(replace(STILL, crop=(10, 12), flip=1.0), sample)
    for key in ("image", "label", "depth", "boundary"):
        assert torch.equal(out[key], sample[key].flip(-1))
    assert torch.equal(out["normals"][0], -sample["normals"][0].flip(-1))
    assert torch.equal(out["normals"][1:], sample["normals"][1:].flip(-1))


def test_flip_has_its_probability() -> None:
    augmentation = replace(STILL, crop=(4, 6), flip=0.25)
    sample = coordinates(4, 6)
    flipped = [int(apply(augmentation, sample, seed)["label"][0, 0]) == 5 for seed in range(400)]
    assert np.mean(flipped) == pytest.approx(0.25, abs=0.07)


def test_normals_of_a_flipped_scene_agree_with_its_depth() -> None:
    data = Scenes(1)
    out = apply(replace(STILL, crop=(96, 128), flip=1.0), data[0])
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    x, y = (columns - data.K[0, 2]) / data.K[0, 0], (rows - data.K[1, 2]) / data.K[1, 1]
    points = torch.stack([x, y, torch.ones_like(x)]) * out["depth"]
    flat = (out["label"] <= 2) & (out["boundary"][0] == 0)
    both = flat[:, 1:] & flat[:, :-1]
    slope = (points.diff(dim=-1) * out["normals"][:, :, 1:]).sum(0)[both]
    assert both.sum() > 1000 and slope.abs().max() < 1e-4


def test_brightness_and_contrast() -> None:
    flat = {"image": torch.full((3, 6, 8), 0.5)}
    bright = replace(STILL, crop=(6, 8), brightness=0.2)
    values = [float(apply(bright, flat, seed)["image"][0, 0, 0]) for seed in range(200)]
    assert 0.4 <= min(values) < 0.41 and 0.59 < max(values) <= 0.6

    ramp = {"image": torch.linspace(0.3, 0.7, 48).view(1, 6, 8).repeat(3, 1, 1)}
    contrast = replace(STILL, crop=(6, 8), contrast=0.25)
    images = [apply(contrast, ramp, seed)["image"] for seed in range(200)]
    assert all(abs(float(image.mean()) - 0.5) < 1e-5 for image in images)
    spans = [float(image.max() - image.min()) / 0.4 for image in images]
    assert 0.75 <= min(spans) < 0.77 and 1.23 < max(spans) < 1.2501


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_images_stay_in_0_1(seed: int) -> None:
    noise = {"image": torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(seed))}
    out = apply(Augmentation((12, 12), brightness=1.0, contrast=1.0), noise, seed)["image"]
    assert 0 <= out.min() and out.max() <= 1


def test_same_generator_same_result() -> None:
    augmentation, sample = Augmentation((20, 20)), coordinates(30, 40)
    first, again, other = (apply(augmentation, sample, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])


@given(height=sides, width=sides, multiple=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_padding_to_a_multiple(height: int, width: int, multiple: int) -> None:
    sample = coordinates(height, width)
    out = PadToMultiple(multiple)(sample)
    padded = torch.ones(out["label"].shape, dtype=torch.bool)
    padded[:height, :width] = False
    for key, value in out.items():
        assert value.shape[-2] % multiple == 0 and 0 <= value.shape[-2] - height < multiple
        assert value.shape[-1] % multiple == 0 and 0 <= value.shape[-1] - width < multiple
        assert torch.equal(value[..., :height, :width], sample[key])
    assert (out["label"][padded] == IGNORE_INDEX).all()
    assert (out["image"][:, padded] == 0.5).all()
    assert (out["depth"][:, padded] == 0).all()


def test_normalize_touches_the_image_alone() -> None:
    sample = coordinates(5, 7)
    out = Normalize((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))(sample)
    assert torch.allclose(out["image"][1], (sample["image"][1] - 0.2) / 0.25)
    assert torch.allclose(out["image"][2], torch.full((5, 7), -0.025))
    assert all(out[key] is sample[key] for key in sample if key != "image")


class Numbered(PixelDataset):
    """Coordinate samples, each with its own constant in the third channel."""

    classes = ("a", "b")
    palette = np.zeros((2, 3), np.uint8)
    ignore_index = 7

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Sample:
        sample = coordinates(20, 24)
        sample["image"][2] = index / 10
        return sample


def images(data: PixelDataset) -> Tensor:
    """All images of a data set, read in reverse order, stacked in order."""
    return torch.stack([data[index]["image"] for index in reversed(range(len(data)))]).flip(0)


def test_augmented_items_depend_on_seed_epoch_and_index() -> None:
    augmentation = Augmentation((16, 16))
    first, second = (AugmentedDataset(Numbered(), augmentation, seed=4) for _ in range(2))
    at_0 = images(first)
    first.set_epoch(3)
    at_3 = images(first)
    assert not torch.equal(at_0, at_3)
    second.set_epoch(3)  # as after a resume
    assert torch.equal(images(second), at_3)
    assert torch.equal(second[-1]["image"], at_3[5])
    first.set_epoch(0)
    assert torch.equal(images(first), at_0)
    assert not torch.equal(images(AugmentedDataset(Numbered(), augmentation, seed=5)), at_0)
    windows = at_0[:, :2].flatten(1)
    assert len(torch.unique(windows, dim=0)) == 6  # indices draw differently


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_change_nothing_and_follow_the_epoch() -> None:
    data = AugmentedDataset(Numbered(), Augmentation((16, 16)), seed=1)
    loader = DataLoader(data, batch_size=2, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 5):
        data.set_epoch(epoch)
        got = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(got, images(data))


def test_datasets_pass_on_what_describes_the_classes() -> None:
    for data in (AugmentedDataset(Numbered(), Augmentation()), EvaluationDataset(Numbered())):
        assert data.classes == ("a", "b") and data.ignore_index == 7 and len(data) == 6
        assert data.palette.shape == (2, 3)
        with pytest.raises(IndexError, match="6 samples"):
            data[6]


def test_normalization_comes_last() -> None:
    normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    plain = EvaluationDataset(Numbered())[2]
    out = EvaluationDataset(Numbered(), normalize=normalize)[2]
    assert plain["image"].shape == (3, 32, 32)
    assert torch.equal(out["image"], plain["image"] * 2 - 1)
    assert EvaluationDataset(Numbered(), pad=PadToMultiple(20))[0]["label"].shape == (20, 40)
    train = [
        AugmentedDataset(Numbered(), Augmentation((9, 9)), normalize=n) for n in (None, normalize)
    ]
    assert torch.allclose(train[1][3]["image"], train[0][3]["image"] * 2 - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation((0, 4)), r"crop .* got \(0, 4\)"),
        (lambda: Augmentation((4.5, 4)), "crop"),  # type: ignore[arg-type]
        (lambda: Augmentation((4, 4), scale=(1.5, 0.6)), "scale"),
        (lambda: Augmentation((4, 4), scale=(0.0, 1.0)), "scale"),
        (lambda: Augmentation((4, 4), scale=(0.5, float("nan"))), "scale"),
        (lambda: Augmentation((4, 4), flip=1.5), "flip must lie in"),
        (lambda: Augmentation((4, 4), brightness=-0.1), "brightness must lie in"),
        (lambda: Augmentation((4, 4), contrast=2), "contrast must lie in"),
        (lambda: PadToMultiple(0), "multiple must be a positive integer, got 0"),
        (lambda: Normalize((0.5,), (0.5,)), "three values"),
        (lambda: Normalize((0.5, 0.5, 0.5), (0.5, 0.0, 0.5)), "std must be above 0"),
        (lambda: AugmentedDataset(Numbered(), Augmentation(), seed=-1), "seed"),
        (lambda: AugmentedDataset(Numbered(), Augmentation()).set_epoch(-1), "epoch"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("step", [PadToMultiple(), lambda s: apply(Augmentation((4, 4)), s)])
def test_bad_samples(step: Callable[[Sample], Sample]) -> None:
    sample = coordinates(8, 8)
    with pytest.raises(DataError, match="flow"):
        step({**sample, "flow": sample["depth"]})
    with pytest.raises(DataError, match="needs 'image'"):
        step({"label": sample["label"]})
    with pytest.raises(DataError, match=r"'depth' is \(8, 7\) pixels but 'image' is \(8, 8\)"):
        step({**sample, "depth": sample["depth"][..., 1:]})
