from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pag_retrofit.errors import PagError
from pag_retrofit.metrics import (
    crop_mask,
    depth_metrics,
    depth_sums,
    normal_counts,
    normal_metrics,
)


def rotated(degrees):
    """Unit vectors (1, 3, 1, N) at these angles to z."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.sin(), torch.zeros_like(angles), angles.cos()])[None, :, None]


def scores_of_angles(degrees):
    valid = torch.ones(1, 1, len(degrees), dtype=torch.bool)
    return normal_metrics(normal_counts(rotated(degrees), rotated([0.0] * len(degrees)), valid)[0])


def test_depth_by_hand():
    prediction = torch.tensor([[[1.0, 3.0, 8.0, 99.0]]])
    target = torch.tensor([[[2.0, 3.0, 5.0, 0.0]]])
    scores = depth_metrics(depth_sums(prediction, target, target > 0)[0])
    expected = {
        "abs_rel": (0.5 + 0 + 0.6) / 3,
        "sq_rel": (0.5 + 0 + 1.8) / 3,
        "rmse": math.sqrt(10 / 3),
        "rmse_log": math.sqrt((math.log(2) ** 2 + math.log(1.6) ** 2) / 3),
        "log10": (math.log10(2) + math.log10(1.6)) / 3,
        "delta1": 1 / 3,
        "delta2": 1 / 3,  # 1.6 > 1.5625
        "delta3": 2 / 3,  # 1.6 < 1.953
    }
    assert scores == pytest.approx(expected, rel=1e-12)


def test_predictions_of_no_distance_are_raised():
    target = torch.ones(1, 1, 2)
    sums = depth_sums(torch.tensor([[[-4.0, 0.0]]]), target, target > 0)
    scores = depth_metrics(sums[0])
    assert scores["rmse"] == pytest.approx(0.999) and scores["log10"] == pytest.approx(3)


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_sums_of_images_are_those_of_one_large_image(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    depths = torch.rand(2, 5, 4, 6, generator=generator) + 0.1
    normals = torch.randn(2, 5, 3, 4, 6, generator=generator)
    valid = torch.rand(5, 4, 6, generator=generator) > 0.3
    for function, (first, second) in ((depth_sums, depths), (normal_counts, normals)):
        whole = function(first, second, valid).sum(0)
        parts = [function(first[s], second[s], valid[s]) for s in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(torch.cat(parts).sum(0), whole)
    assert whole[:-1].sum() == valid.sum()


def test_normals_by_hand():
    scores = scores_of_angles([0.0, 10.0, 20.0, 25.0, 100.0])
    assert scores["mean"] == pytest.approx(31.0)
    assert scores["median"] == pytest.approx(20.0, abs=0.05)
    assert scores["within_11_25"] == 0.4
    assert scores["within_22_5"] == 0.6
    assert scores["within_30"] == 0.8


@given(degrees=st.lists(st.floats(0, 180), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_mean_and_median_are_those_of_the_angles(degrees):
    scores = scores_of_angles(degrees)
    assert scores["mean"] == pytest.approx(sum(degrees) / len(degrees), abs=1e-6)
    low, high = sorted(degrees)[(len(degrees) - 1) // 2], sorted(degrees)[len(degrees) // 2]
    assert low - 0.0501 <= scores["median"] <= high + 0.0501


def test_length_does_not_count_and_no_direction_is_90_degrees_off():
    target = rotated([0.0, 0.0])
    prediction = 7 * rotated([40.0, 0.0])
    prediction[..., 1] = 0
    counts = normal_counts(prediction, target, torch.ones(1, 1, 2, dtype=torch.bool))
    assert normal_metrics(counts[0])["mean"] == pytest.approx(65)


def test_without_valid_pixels_there_are_no_scores():
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    depth = depth_metrics(depth_sums(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), nothing)[0])
    zeros = torch.zeros(1, 3, 2, 2)
    normals = normal_metrics(normal_counts(zeros, zeros, nothing)[0])
    assert all(math.isnan(value) for value in (*depth.values(), *normals.values()))


@pytest.mark.parametrize(
    ("size", "crop", "rows", "columns"),
    [
        ((480, 640), "eigen", (45, 471), (41, 601)),
        ((375, 1242), "garg", (153, 371), (44, 1197)),
        ((375, 1242), "eigen", (124, 342), (44, 1197)),
    ],
)
def test_crops(size, crop, rows, columns):
    inside = crop_mask(size, crop).nonzero()
    assert tuple(inside.min(0).values) == (rows[0], columns[0])
    assert tuple(inside.max(0).values + 1) == (rows[1], columns[1])
    assert len(inside) == (rows[1] - rows[0]) * (columns[1] - columns[0])


def test_what_cannot_be_scored_is_refused():
    ones, valid = torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(PagError, match=r"prediction has shape \(1, 1, 2, 2\)"):
        depth_sums(ones[None], ones, valid)
    with pytest.raises(PagError, match="target has valid depths of 0"):
        depth_sums(ones, 0 * ones, valid)
    with pytest.raises(PagError, match="prediction has valid pixels that are not finite"):
        depth_sums(ones * math.nan, ones, valid)
    with pytest.raises(PagError, match="expected torch.bool"):
        depth_sums(ones, ones, ones)
    with pytest.raises(PagError, match="crop='nyu'"):
        crop_mask((4, 4), "nyu")
