"""Rendered scenes: the maps must agree with each other and with exact geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pag_retrofit.data import SCENE_CLASSES, Sample, Scenes, scenes

FLOOR, WALL, CEILING, BOX, SPHERE, CYLINDER = range(6)
FLAT = (FLOOR, WALL, CEILING, BOX)
MANY = Scenes(40, size=(72, 96), seed=3)

indices = st.integers(0, len(MANY) - 1)


def points_of(data: Scenes, item: Sample) -> np.ndarray:
    """Back-projects the depth: (H, W, 3) points in the camera frame."""
    depth = item["depth"][0].double().numpy()
    rows, columns = np.mgrid[0 : depth.shape[0], 0 : depth.shape[1]]
    k = data.K.double().numpy()
    return np.stack(
        [(columns - k[0, 2]) / k[0, 0] * depth, (rows - k[1, 2]) / k[1, 1] * depth, depth], axis=-1
    )


def normals_of(item: Sample) -> np.ndarray:
    """Normals as (H, W, 3) float64."""
    return item["normals"].double().numpy().transpose(1, 2, 0)


def neighbours(array: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Views of all horizontally and all vertically adjacent pairs."""
    return [(array[:, 1:], array[:, :-1]), (array[1:], array[:-1])]


def regions(item: Sample, label: int) -> list[np.ndarray]:
    """Masks of the connected parts of smooth surfaces of one class, boundaries left out."""
    inside = (item["label"].numpy() == label) & (item["boundary"][0].numpy() == 0)
    parts, count = ndimage.label(inside)
    masks = [parts == number + 1 for number in range(count)]
    return [mask for mask in masks if mask.sum() >= 20]


@given(
    height=st.integers(8, 60), width=st.integers(8, 60), seed=st.integers(0, 2**40), index=indices
)
@settings(max_examples=25, deadline=None)
def test_form_of_an_item(height: int, width: int, seed: int, index: int) -> None:
    item = Scenes(len(MANY), size=(height, width), seed=seed)[index]
    assert list(item) == ["image", "label", "depth", "normals", "boundary"]
    channels = {"image": (3,), "label": (), "depth": (1,), "normals": (3,), "boundary": (1,)}
    for key, value in item.items():
        assert value.shape == (*channels[key], height, width)
        assert value.dtype == (torch.int64 if key == "label" else torch.float32)
    assert 0 <= item["image"].min() and item["image"].max() <= 1
    assert 0 <= item["label"].min() and item["label"].max() < len(SCENE_CLASSES)
    assert 0.1 < item["depth"].min() and item["depth"].max() < 15
    assert torch.allclose(item["normals"].norm(dim=0), torch.ones(height, width), atol=1e-5)
    assert set(item["boundary"].unique().tolist()) <= {0.0, 1.0}


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    first = Scenes(3, size=(24, 32), seed=5)
    second = Scenes(9, size=(24, 32), seed=5, cache=False)
    for index in (2, 0, 1):
        for key, value in first[index].items():
            assert torch.equal(value, second[index][key])
            assert torch.equal(value, first[index - 3][key])


def test_other_seeds_and_indices_give_other_scenes() -> None:
    items = [Scenes(3, size=(24, 32), seed=seed)[index] for seed in (0, 1) for index in range(3)]
    for number, item in enumerate(items):
        for other in items[:number]:
            assert not torch.equal(item["image"], other["image"])
            assert not torch.equal(item["depth"], other["depth"])


def test_geometry_does_not_depend_on_the_resolution() -> None:
    # The centres of the fine grid's pixels 3i + 1 are those of the coarse grid's pixels i.
    coarse, fine = Scenes(4, size=(24, 32)), Scenes(4, size=(72, 96))
    for index in range(4):
        picked = fine[index]["depth"][:, 1::3, 1::3]
        same = torch.isclose(picked, coarse[index]["depth"], rtol=1e-4)
        assert same.float().mean() > 0.999


def test_items_are_copies_of_the_cache() -> None:
    data = Scenes(1, size=(24, 32))
    for value in data[0].values():
        value.zero_()
    for key, value in data[0].items():
        assert torch.equal(value, Scenes(1, size=(24, 32))[0][key])


@given(index=indices)
@settings(max_examples=20, deadline=None)
def test_depth_differences_are_orthogonal_to_the_normals_of_planes(index: int) -> None:
    item = MANY[index]
    inside = np.isin(item["label"].numpy(), FLAT) & (item["boundary"][0].numpy() == 0)
    points, normals = points_of(MANY, item), normals_of(item)
    for (p, q), (n, m), (a, b) in zip(
        neighbours(points), neighbours(normals), neighbours(inside), strict=True
    ):
        both = a & b
        assert both.sum() > 500
        step = (p - q)[both]
        slope = np.einsum("ij,ij->i", step, n[both]) / np.linalg.norm(step, axis=1)
        assert np.abs(slope).max() < 1e-3
        assert np.abs(n[both] - m[both]).max() < 1e-6


def test_spheres_are_exact() -> None:
    found = 0
    for index in range(len(MANY)):
        points, normals = points_of(MANY, MANY[index]), normals_of(MANY[index])
        for mask in regions(MANY[index], SPHERE):
            found += 1
            centre, radius, error = fit_round(points[mask], normals[mask])
            assert 0.02 < radius < 2 and error < 1e-4
            # Depth from the other formula for a ray and a sphere, b^2 - 4ac.
            rays = points[mask] / points[mask][:, 2:]
            a, b = (rays**2).sum(1), -2 * rays @ centre
            expected = (-b - np.sqrt(b**2 - 4 * a * (centre @ centre - radius**2))) / (2 * a)
            assert np.abs(expected - points[mask][:, 2]).max() < 2e-3
    assert found > 20


def test_sides_of_cylinders_are_exact() -> None:
    found = 0
    for index in range(len(MANY)):
        points, normals = points_of(MANY, MANY[index]), normals_of(MANY[index])
        for mask in regions(MANY[index], CYLINDER):
            _, spread, directions = np.linalg.svd(normals[mask], full_matrices=False)
            if spread[1] < 0.3:  # an end, which is flat
                continue
            found += 1
            assert spread[2] < 1e-4  # the normals of the side lie in one plane
            across = directions[:2]
            _, radius, error = fit_round(points[mask] @ across.T, normals[mask] @ across.T)
            assert 0.01 < radius < 1.5 and error < 1e-4
    assert found > 15


def fit_round(points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Fits points = centre + radius * normals; returns centre, radius and largest residual."""
    centred, turned = points - points.mean(0), normals - normals.mean(0)
    radius = float((centred * turned).sum() / (turned**2).sum())
    residual = np.abs(centred - radius * turned).max()
    return points.mean(0) - radius * normals.mean(0), radius, float(residual)


def test_intrinsics_are_those_of_square_pixels_and_65_degrees() -> None:
    k = Scenes(1, size=(48, 80)).K
    half_view = torch.rad2deg(torch.atan(40 / k[0, 0]))
    assert float(half_view) == pytest.approx(32.5) and k[0, 0] == k[1, 1]
    assert k[:2, 2].tolist() == [39.5, 23.5] and k[2].tolist() == [0, 0, 1]


def test_trace_of_a_scene_made_by_hand() -> None:
    axes = np.eye(3)
    room = scenes._Solid(scenes._BOX, np.array([0, 0, 2.0]), axes, np.array([5.0, 5.0, 2.0]))
    ball = scenes._Solid(scenes._SPHERE, np.array([3.0, 0, 1.0]), axes, np.full(3, 0.5))
    post = scenes._Solid(scenes._CYLINDER, np.array([0, 3.0, 1.0]), axes, np.array([0.2, 0.2, 1.0]))
    crate = scenes._Solid(scenes._BOX, np.array([-3.0, 0, 0.5]), axes, np.array([1.0, 1.0, 0.5]))
    eye = np.array([0, 0, 1.0])
    scene = scenes._Scene(room, (ball, post, crate), eye, axes, eye)
    rays = np.array(
        [[1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [-3, 0, -0.1], [2, 0, 0]], float
    )
    hits = scenes._trace(scene, eye, rays)
    assert hits.distance == pytest.approx([2.5, 2.8, 5, 3, 1, 2 / 3, 1.25], abs=1e-12)
    assert hits.owner.tolist() == [1, 2, 0, 0, 0, 3, 1]
    labels = scenes._labels(scene, hits).tolist()
    assert labels == [SPHERE, CYLINDER, WALL, CEILING, FLOOR, BOX, SPHERE]
    normals, _ = scenes._surfaces(scene, hits, eye + hits.distance[:, None] * rays)
    expected = [[-1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1], [1, 0, 0], [-1, 0, 0]]
    assert np.allclose(normals, expected)


@given(index=indices)
@settings(max_examples=20, deadline=None)
def test_normals_look_towards_the_camera(index: int) -> None:
    points, normals = points_of(MANY, MANY[index]), normals_of(MANY[index])
    assert (np.einsum("hwi,hwi->hw", points, normals) < 0).all()


def test_floor_wall_and_ceiling_are_at_right_angles() -> None:
    for index in range(len(MANY)):
        label, normals = MANY[index]["label"].numpy(), normals_of(MANY[index])
        if not (label == FLOOR).any():
            continue
        up = normals[label == FLOOR][0]
        assert up[1] < -0.7  # the camera's y axis points down
        assert np.abs(normals[label == FLOOR] - up).max() < 1e-6
        assert np.abs(normals[label == WALL] @ up).max() < 1e-6
        assert np.abs(normals[label == CEILING] + up).max(initial=0) < 1e-6


@given(index=indices)
@settings(max_examples=20, deadline=None)
def test_boundaries_are_where_the_surface_changes(index: int) -> None:
    item = MANY[index]
    label, boundary = item["label"].numpy(), item["boundary"][0].numpy() == 1
    points, normals = points_of(MANY, item), normals_of(item)
    explained = np.zeros_like(boundary)  # pixels with a visible reason to be a boundary
    curved = np.isin(label, (SPHERE, CYLINDER))
    for first, second in (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1]):
        offset = np.einsum("hwi,hwi->hw", points[first] - points[second], normals[second])
        change = label[first] != label[second]
        bend = np.abs(normals[first] - normals[second]).max(-1) > 1e-4
        jump = np.abs(offset) > 1e-3
        assert boundary[first][change].all() and boundary[second][change].all()
        flat = ~curved[first] & ~curved[second]
        assert boundary[first][flat & (bend | jump)].all()
        reason = change | bend | jump | ~flat
        explained[first] |= reason
        explained[second] |= reason
    assert not (boundary & ~explained).any()
    assert 0.02 < boundary.mean() < 0.6


def test_boundary_of_a_surface_map_made_by_hand() -> None:
    surfaces = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 1, 1], [3, 1, 1, 1]])
    expected = [[0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]]
    assert scenes._boundaries(surfaces).tolist() == expected


def test_every_class_has_its_share() -> None:
    labels = torch.cat([MANY[index]["label"].flatten() for index in range(len(MANY))])
    shares = torch.bincount(labels, minlength=6) / len(labels)
    assert (shares > 0.01).all() and shares.max() < 0.7


def test_colour_alone_does_not_give_the_class_away() -> None:
    """A Bayes classifier on an RGB histogram must stay near chance (1/6) on other scenes."""
    table = np.ones((6, 512))
    hits, totals = np.zeros(6), np.zeros(6)
    for index in range(len(MANY)):
        image = (MANY[index]["image"] * 7.999).long()
        colour = (image[0] * 64 + image[1] * 8 + image[2]).flatten().numpy()
        label = MANY[index]["label"].flatten().numpy()
        if index < 30:
            np.add.at(table, (label, colour), 1)
        else:
            guess = (table / table.sum(1, keepdims=True))[:, colour].argmax(0)
            hits += np.bincount(label[guess == label], minlength=6)
            totals += np.bincount(label, minlength=6)
    assert (hits / totals).mean() < 0.35


def test_shadows_and_texture_leave_contrast() -> None:
    deviations = [float(MANY[index]["image"].std()) for index in range(len(MANY))]
    means = [float(MANY[index]["image"].mean()) for index in range(len(MANY))]
    assert min(deviations) > 0.04 and 0.25 < min(means) and max(means) < 0.8


def test_palette_has_one_colour_per_class() -> None:
    assert MANY.palette.shape == (6, 3) and len(np.unique(MANY.palette, axis=0)) == 6
    assert MANY.classes == SCENE_CLASSES and MANY.ignore_index == 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 1, "size": (96, 4)}, r"size must be .* got \(96, 4\)"),
        ({"count": 1, "size": (96,)}, "size must be"),
        ({"count": 1, "seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)


def test_index_out_of_range() -> None:
    with pytest.raises(IndexError, match="2 samples"):
        Scenes(2)[2]
