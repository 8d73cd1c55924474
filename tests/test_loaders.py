"""Data sets on tiny trees of their official layouts, and on the real ones where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from pag_retrofit.data import (
    BSDS500,
    CITYSCAPES_CLASSES,
    IGNORE_INDEX,
    Cityscapes,
    KITTISemantic,
    LabelledFolder,
    NYUv2,
    RGBDFolder,
    Stanford2D3D,
)
from pag_retrofit.data.base import collate
from pag_retrofit.data.surfaces import normals_from_depth
from pag_retrofit.errors import DataError

SIZE = (6, 8)
GENERATOR = np.random.default_rng(0)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def image() -> np.ndarray:
    return GENERATOR.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def label(*values: int) -> np.ndarray:
    return np.resize(np.array(values, dtype=np.uint8), SIZE)


def test_cityscapes(tmp_path: Path) -> None:
    for city, name in (("ulm", "ulm_0_1"), ("bern", "bern_0_2")):
        save(tmp_path / f"leftImg8bit/val/{city}/{name}_leftImg8bit.png", image())
        save(tmp_path / f"gtFine/val/{city}/{name}_gtFine_labelIds.png", label(0, 7, 26, 33))
    data = Cityscapes(tmp_path, "val")
    assert len(data) == 2
    first = [IGNORE_INDEX, *(CITYSCAPES_CLASSES.index(n) for n in ("road", "car", "bicycle"))]
    assert data[0]["label"].flatten()[:4].tolist() == first
    assert data[1]["image"].shape == (3, *SIZE)
    with pytest.raises(DataError, match="leftImg8bit"):
        Cityscapes(tmp_path, "train")
    next((tmp_path / "gtFine").rglob("ulm_0_1*")).unlink()
    with pytest.raises(DataError, match="1 labels are missing"):
        Cityscapes(tmp_path, "val")


def test_kitti_holds_out_every_fifth(tmp_path: Path) -> None:
    for number in range(11):
        save(tmp_path / f"training/image_2/{number:06d}_10.png", image())
        save(tmp_path / f"training/semantic/{number:06d}_10.png", label(8, 24))
    train, val = (KITTISemantic(tmp_path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 3)
    assert not {pair[0] for pair in train.pairs} & {pair[0] for pair in val.pairs}
    assert set(val[0]["label"].unique().tolist()) == {1, 11}
    with pytest.raises(DataError, match="use train or val"):
        KITTISemantic(tmp_path, "test")


def test_labelled_folder(tmp_path: Path) -> None:
    save(tmp_path / "train/images/a.jpg", image())
    save(tmp_path / "train/labels/a.png", label(0, 1, 255))
    data = LabelledFolder(tmp_path, classes=["no", "yes"])
    assert set(data[0]["label"].unique().tolist()) == {0, 1, IGNORE_INDEX}
    assert data.palette.shape == (2, 3) and len(np.unique(data.palette, axis=0)) == 2
    save(tmp_path / "train/labels/a.png", label(0, 2))
    with pytest.raises(DataError, match=r"label values 2; expected 0\.\.1"):
        LabelledFolder(tmp_path, classes=["no", "yes"])[0]
    save(tmp_path / "train/labels/b.png", label(0))
    with pytest.raises(DataError, match="label without an image"):
        LabelledFolder(tmp_path, classes=["no", "yes"])
    with pytest.raises(DataError, match="0 classes"):
        LabelledFolder(tmp_path, classes=[])


def test_images_of_several_sizes_are_no_batch() -> None:
    samples = [{"image": torch.zeros(3, height, 32)} for height in (32, 48)]
    with pytest.raises(DataError, match=r"sizes, .*48, 32.*: set data.eval_batch_size=1"):
        collate(samples)
    assert collate(samples[:1] * 2)["image"].shape == (2, 3, 32, 32)


def save_annotations(path: Path, masks: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.empty((1, len(masks)), dtype=object)
    for k, mask in enumerate(masks):
        cells[0, k] = {"Boundaries": mask.astype(np.uint8), "Segmentation": mask.astype(np.uint16)}
    savemat(path, {"groundTruth": cells})


def test_bsds(tmp_path: Path) -> None:
    masks = [GENERATOR.random(SIZE) < 0.4 for _ in range(3)]
    save(tmp_path / "data/images/val/12.jpg", image())
    save_annotations(tmp_path / "data/groundTruth/val/12.mat", masks)
    data = BSDS500(tmp_path, "val")
    sample = data[0]
    torch.testing.assert_close(sample["boundary"][0].numpy(), np.mean(masks, 0).astype(np.float32))
    for k, mask in enumerate(masks):
        assert np.array_equal((sample["annotators"][0].numpy() >> k) & 1, mask)
        assert np.array_equal(data.annotations(0)[k], mask)
    path = tmp_path / "data/groundTruth/val/12.mat"
    cells = loadmat(path)["groundTruth"]
    savemat(path, {"groundTruth": cells}, do_compression=True)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    for content in (b"no matlab", bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot read .*12.mat"):
            BSDS500(tmp_path, "val")[0]
    with pytest.raises(DataError, match="unknown split"):
        BSDS500(tmp_path, "all")


def rgbd(root: Path, **options: Any) -> RGBDFolder:
    for name in ("00", "01"):
        save(root / f"rgb/{name}.jpg", np.zeros((30, 40, 3), np.uint8))
        depth = np.full((30, 40), 2000, np.uint16)
        depth[:5] = 0
        save(root / f"depth/{name}.png", depth)
    (root / "K.txt").write_text("50 0 19.5\n0 50 14.5\n0 0 1\n")
    (root / "train.txt").write_text("01\n")
    return RGBDFolder(root, **options)


def test_rgbd(tmp_path: Path) -> None:
    data = rgbd(tmp_path, normals=True)
    sample = data[0]
    assert len(data) == 1
    assert sample["depth"].shape == (1, 30, 40)
    assert set(sample["depth"].unique().tolist()) == {0.0, 2.0}
    known = (sample["normals"] != 0).any(0)
    assert known[8:].all() and not known[:5].any()
    facing = torch.tensor([0.0, 0.0, -1.0]).expand(int(known.sum()), 3)
    torch.testing.assert_close(sample["normals"][:, known].T, facing, atol=1e-3, rtol=0)
    (tmp_path / "val.txt").write_text("01\n07\n")
    with pytest.raises(DataError, match="names 07"):
        RGBDFolder(tmp_path, "val")
    (tmp_path / "val.txt").write_text("\ufeff01\r\n\r\n", encoding="utf-8")
    assert len(RGBDFolder(tmp_path, "val")) == 1
    for wrong in ("1 2 3", "50 0 0 0 50 0 19.5 14.5 1", "50 0 nan 0 50 14.5 0 0 1"):
        (tmp_path / "K.txt").write_text(wrong)
        with pytest.raises(DataError, match="3x3 intrinsics"):
            RGBDFolder(tmp_path)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_depth_has_16_bits(tmp_path: Path, mode: str) -> None:
    data = rgbd(tmp_path)
    Image.new(mode, (40, 30), 7).save(tmp_path / "depth/01.png")
    with pytest.raises(DataError, match=f"mode {mode}; expected depth in one channel of 16 bits"):
        data[0]


def nyu(root: Path) -> None:
    """Three frames in MATLAB's order: columns before rows."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.arange(3, dtype=np.uint8).repeat(3 * 640 * 480).reshape(3, 3, 640, 480)
        labels = np.zeros((3, 640, 480), dtype=np.uint16)
        labels[:, 5, 7], labels[:, 6, 7] = 1, 3
        file["labels"] = labels
        file["depths"] = np.full((3, 640, 480), 2.0, dtype=np.float32)
        raw = np.full((3, 640, 480), 2.0, dtype=np.float32)
        raw[:, :, :100] = 0
        file["rawDepths"] = raw
    savemat(root / "splits.mat", {"trainNdxs": [[1], [3]], "testNdxs": [[2]]})
    savemat(root / "classMapping40.mat", {"mapClass": [[40, 2, 7]]})


def test_nyu(tmp_path: Path) -> None:
    nyu(tmp_path)
    data = NYUv2(tmp_path, targets=("segmentation", "depth", "normals"))
    sample = data[1]
    assert (len(data), len(NYUv2(tmp_path, "val")), len(data.classes)) == (2, 1, 40)
    assert sample["image"].shape == (3, 480, 640)
    assert set(sample["image"].unique().tolist()) == {np.float32(2 / 255)}
    assert sample["label"][7, 5] == 39 and sample["label"][7, 6] == 6
    assert (sample["label"] == IGNORE_INDEX).sum() == 480 * 640 - 2
    assert (sample["depth"][0, 100:] == 2).all() and (sample["depth"][0, :100] == 0).all()
    facing = torch.tensor([0.0, 0.0, -1.0]).view(3, 1, 1).expand(3, 300, 600)
    torch.testing.assert_close(sample["normals"][:, 150:450, 20:620], facing, atol=1e-3, rtol=0)
    assert data[1]["image"].equal(sample["image"])  # from the cache, which nobody wrote to
    (tmp_path / "classMapping40.mat").unlink()
    assert set(NYUv2(tmp_path, targets=("depth",))[0]) == {"image", "depth"}
    with pytest.raises(DataError, match="classMapping40"):
        NYUv2(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[4]], "testNdxs": [[2]]})
    with pytest.raises(DataError, match="beyond the 3"):
        NYUv2(tmp_path, targets=("depth",))
    (tmp_path / "splits.mat").write_bytes(b"")
    with pytest.raises(DataError, match="cannot read trainNdxs"):
        NYUv2(tmp_path, targets=("depth",))


def test_nyu_without_depth(tmp_path: Path) -> None:
    nyu(tmp_path)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "a") as file:
        del file["rawDepths"]
    assert "label" in NYUv2(tmp_path, targets=("segmentation",))[0]
    with pytest.raises(DataError, match="has no rawDepths"):
        NYUv2(tmp_path, targets=("depth",))[0]


@pytest.mark.parametrize("targets", ["depth", ("depths",)])
def test_targets_that_are_none(tmp_path: Path, targets: Any) -> None:
    for kind in (NYUv2, Stanford2D3D):
        with pytest.raises(DataError, match="targets.*segmentation, depth, normals"):
            kind(tmp_path, targets=targets)


def test_stanford(tmp_path: Path) -> None:
    names = ["<UNK>_0_<UNK>_0_0", "wall_1_office_3_1", "beam_2_hall_1_5", "sofa_1_office_3_1"]
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/semantic_labels.json").write_text(json.dumps(names * 100))
    folder, stem = tmp_path / "area_5a/data", "camera_ab_office_3_frame_7_domain"
    save(folder / f"rgb/{stem}_rgb.png", image())
    semantic = np.zeros((*SIZE, 3), dtype=np.uint8)
    semantic[0, 0] = (0, 1, 2)  # instance 258
    semantic[0, 1] = (0, 0, 3)
    semantic[0, 2] = (13, 13, 13)  # missing
    save(folder / f"semantic/{stem}_semantic.png", semantic)
    depth = np.full(SIZE, 1024, dtype=np.uint16)
    depth[0, 0] = 65535
    save(folder / f"depth/{stem}_depth.png", depth)
    normals = np.full((*SIZE, 3), 128, dtype=np.uint8)
    normals[0, 0], normals[0, 1] = (128, 127, 255), (255, 128, 127)
    save(folder / f"normal/{stem}_normals.png", normals)
    sample = Stanford2D3D(tmp_path, "val")[0]
    first = ["beam", "sofa"]
    assert [Stanford2D3D.classes[k] for k in sample["label"][0, :2]] == first
    assert (sample["label"].flatten()[2:] == IGNORE_INDEX).all()
    assert sample["depth"].unique().tolist() == [0.0, 2.0] and sample["depth"][0, 0, 0] == 0
    found = sample["normals"][:, 0, :2].T
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, -1], [1.0, 0, 0]]), atol=6e-3, rtol=0)
    assert not sample["normals"][:, 1:].any()
    save(folder / f"depth/{stem}_depth.png", depth.astype(np.uint8))
    with pytest.raises(DataError, match="mode L; expected depth in one channel of 16 bits"):
        Stanford2D3D(tmp_path, "val")[0]
    (tmp_path / "assets/semantic_labels.json").write_text("3")
    with pytest.raises(DataError, match="holds 3; expected a list"):
        Stanford2D3D(tmp_path, "val")
    with pytest.raises(DataError, match="no area"):
        Stanford2D3D(tmp_path, "train")
    (folder / f"depth/{stem}_depth.png").unlink()
    assert len(Stanford2D3D(tmp_path, "val", targets=("normals",))) == 1
    (tmp_path / "assets/semantic_labels.json").write_text("[]")
    with pytest.raises(DataError, match="1 targets are missing"):
        Stanford2D3D(tmp_path, "val")


def test_normals_of_tilted_planes_with_an_edge_and_noise() -> None:
    height, width, focal = 60, 80, 70.0
    intrinsics = torch.tensor([[focal, 0, 39.5], [0, focal, 29.5], [0, 0, 1]], dtype=torch.float64)
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    rays = torch.stack(((columns - 39.5) / focal, (rows - 29.5) / focal, torch.ones_like(rows)))
    planes = [((0.3, -0.2, -0.9), 2.0), ((-0.6, 0.1, -0.8), 4.0)]
    normals = [torch.nn.functional.normalize(torch.tensor(n).double(), dim=0) for n, _ in planes]
    depths = [
        distance / -(normal.view(3, 1, 1) * rays).sum(0)
        for normal, (_, distance) in zip(normals, planes, strict=True)
    ]
    left = columns < 40
    depth = torch.where(left, depths[0], depths[1])[None]
    noise = 1 + 0.001 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(0))
    found = normals_from_depth((depth * noise).float(), intrinsics)
    expected = torch.where(left, normals[0].view(3, 1, 1), normals[1].view(3, 1, 1)).float()
    cosine = (found * expected).sum(0)
    known = (found != 0).any(0)
    assert known.float().mean() > 0.97
    angle = torch.rad2deg(torch.acos(cosine[known].clamp(-1, 1)))
    assert angle.median() < 3 and angle.quantile(0.95) < 12


@pytest.mark.parametrize("name", ["BSDS500", "hololens"])
def test_real_data(name: str) -> None:
    root = Path(os.environ.get("PAG_DATA", "")) / name
    if not root.is_dir():
        pytest.skip(f"needs {name} in the folder that PAG_DATA names")
    if name == "BSDS500":
        data: Any = BSDS500(root, "val")
        assert len(data) == 100 and 4 <= len(data.annotations(0)) <= 9
    else:
        data = RGBDFolder(root, "val", normals=True)
        assert len(data) == 74
        sample = data[0]
        known = (sample["normals"] != 0).any(0)
        assert known.float().mean() > 0.8 * (sample["depth"] > 0).float().mean()
    assert data[0]["image"].shape[0] == 3
