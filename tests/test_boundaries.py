"""The BSDS protocol: what is matched, counted and scored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin

from pag_retrofit.boundaries import (
    TOLERANCE,
    boundary_counts,
    boundary_metrics,
    boundary_thresholds,
)
from pag_retrofit.errors import PagError

HALF = np.array([0.5])


def line(column: int, size: tuple[int, int] = (100, 120)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[10:90, column] = True
    return mask


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_tolerance_is_a_share_of_the_diagonal(shift: int) -> None:
    within = shift <= TOLERANCE * np.hypot(100, 120)  # 1.17 pixels
    counts = boundary_counts(line(50 + shift).astype(float), [line(50)], HALF)
    assert counts[0].tolist() == ([80, 80, 80, 80] if within else [0, 80, 0, 80])


def test_each_pixel_is_matched_once() -> None:
    counts = boundary_counts((line(49) | line(51)).astype(float), [line(50)], HALF)
    assert counts[0].tolist() == [80, 80, 80, 160]


def test_a_pixel_is_right_if_any_annotator_drew_it_and_recall_counts_all() -> None:
    annotations = [line(20), line(20) | line(70), np.zeros((100, 120), bool)]
    counts = boundary_counts(line(20).astype(float), annotations, HALF)
    assert counts[0].tolist() == [160, 240, 80, 80]


def test_thick_boundaries_are_thinned() -> None:
    thick = np.zeros((100, 120))
    thick[10:90, 48:53] = 1
    _, _, right, predicted = boundary_counts(thick, [line(50)], HALF)[0]
    assert predicted <= 84
    assert right >= 70


def brute_force(cut: np.ndarray, mask: np.ndarray, radius: float) -> int:
    """Largest matching as an assignment that costs 1 per unmatched pixel."""
    first, second = np.argwhere(cut), np.argwhere(mask)
    if not len(first) or not len(second):
        return 0
    near = np.hypot(*(first[:, None] - second[None]).transpose(2, 0, 1)) <= radius
    rows, columns = linear_sum_assignment(~near)
    return int(near[rows, columns].sum())


@given(st.integers(0, 10**6), st.floats(0.01, 0.3), st.floats(0.0, 0.2))
@settings(max_examples=60, deadline=None)
def test_matching_is_as_large_as_it_can_be(seed: int, density: float, tolerance: float) -> None:
    generator = np.random.default_rng(seed)
    prediction = (generator.random((14, 17)) < density).astype(float)
    mask = generator.random((14, 17)) < density
    found, annotated, right, predicted = boundary_counts(
        prediction, [mask], HALF, tolerance=tolerance
    )[0]
    cut = thin(prediction > 0)
    expected = brute_force(cut, mask, tolerance * np.hypot(14, 17))
    assert found == right == expected
    assert (annotated, predicted) == (mask.sum(), cut.sum())


@given(
    st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.sampled_from([0, 1, 2.5, 3, 5])
)
@settings(max_examples=60, deadline=None)
def test_each_threshold_has_its_own_largest_matchings(
    seed: int, count: int, annotators: int, radius: float
) -> None:
    """Of winding lines, some strengths being thresholds and some cuts equal."""
    generator = np.random.default_rng(seed)
    shape = (30, 40)  # with a diagonal of 50
    strength = gaussian_filter(generator.random(shape), 1.5)
    strength = np.round((strength - strength.min()) / np.ptp(strength) * (count + 1)) / (count + 1)
    masks = [
        thin(np.roll(strength, generator.integers(-2, 3, 2), (0, 1)) > generator.uniform(0.3, 0.9))
        for _ in range(annotators)
    ]
    thresholds = boundary_thresholds(count)
    rows = boundary_counts(strength, masks, thresholds, tolerance=radius / 50)
    for row, threshold in zip(rows[:-1], thresholds, strict=True):
        cut = thin(strength >= threshold)
        most = [brute_force(cut, mask, radius) for mask in masks]
        found, annotated, right, predicted = row
        assert found == sum(most)
        assert max(most) <= right <= min(sum(most), predicted)
        assert (annotated, predicted) == (sum(mask.sum() for mask in masks), cut.sum())
    assert rows[-1].tolist() in rows[:-1].tolist()


def test_scores_of_a_known_curve() -> None:
    thresholds = boundary_thresholds(3)
    assert thresholds.tolist() == [0.25, 0.5, 0.75]
    # Recall 0.8, 0.6, 0.2 and precision 0.4, 0.6, 1.
    rows = [[80, 100, 40, 100], [60, 100, 30, 50], [20, 100, 10, 10]]
    counts = np.array([*rows, [70, 100, 30, 40]], float)
    scores = boundary_metrics(counts, thresholds)
    assert scores["ods"] == pytest.approx(0.6, abs=1e-3)
    assert scores["ods_threshold"] == pytest.approx(0.5, abs=0.05)
    assert scores["ois"] == pytest.approx(2 * 0.7 * 0.75 / 1.45)
    # Trapezes 0.2 x 0.8 + 0.4 x 0.5... by the sum over recalls 0.20, 0.21, .. 0.80.
    at = np.arange(20, 81) / 100
    expected = np.interp(at, [0.2, 0.6, 0.8], [1, 0.6, 0.4]).sum() / 100
    assert scores["ap"] == pytest.approx(expected)


def test_the_best_threshold_of_each_image_is_kept() -> None:
    prediction = 0.9 * line(50).astype(float) + 0.4 * line(90)
    counts = boundary_counts(prediction, [line(50)], boundary_thresholds(9))
    assert counts[-1].tolist() == [80, 80, 80, 80]
    assert counts[0].tolist() == [80, 80, 80, 160]


def test_an_annotator_scored_by_himself_is_perfect() -> None:
    counts = boundary_counts(line(50).astype(float), [line(50)], boundary_thresholds(5))
    scores = boundary_metrics(counts, boundary_thresholds(5))
    assert scores["ods"] == scores["ois"] == 1


def test_nothing_predicted_scores_zero() -> None:
    scores = boundary_metrics(boundary_counts(np.zeros((100, 120)), [line(5)], HALF), HALF)
    assert scores["ods"] == scores["ois"] == scores["ap"] == 0


@pytest.mark.parametrize(
    ("prediction", "annotations", "message"),
    [
        (np.zeros((4, 5)), [], "annotations is empty"),
        (np.zeros((4, 5)), [np.zeros((5, 4))], "shape"),
        (np.full((4, 5), 2.0), [np.zeros((4, 5))], "from 0 to 1"),
        (np.zeros((1, 4, 5)), [np.zeros((4, 5))], "height, width"),
    ],
)
def test_bad_input_is_named(
    prediction: np.ndarray, annotations: list[np.ndarray], message: str
) -> None:
    with pytest.raises(PagError, match=message):
        boundary_counts(prediction, annotations, HALF)


def test_human_agreement_on_real_images() -> None:
    """One annotator against the others scores about 0.8 on BSDS500."""
    root = Path(os.environ.get("PAG_DATA", "")) / "BSDS500"
    if not root.is_dir():
        pytest.skip("needs BSDS500 in the folder that PAG_DATA names")
    from pag_retrofit.data import BSDS500

    data = BSDS500(root, "val")
    total = np.zeros((2, 4))
    for index in range(0, len(data), 12):
        masks = data.annotations(index)
        total += boundary_counts(masks[0].astype(float), masks[1:], HALF)
    assert 0.65 < boundary_metrics(total, HALF)["ods"] < 0.95
