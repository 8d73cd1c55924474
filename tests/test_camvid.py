"""The CamVid loader: pairs, values, and bad input that must be named."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pag_retrofit.data import CamVid
from pag_retrofit.errors import DataError

WIDTH, HEIGHT = 20, 12


def write_pair(root: Path, stem: str, *, split: str = "train", suffix: str = ".png") -> np.ndarray:
    """Writes an image and a label with values 0..11; returns the stored label."""
    generator = np.random.default_rng(len(stem))
    for folder in (split, f"{split}annot"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    image = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    label = generator.integers(0, 12, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(image).save(root / split / f"{stem}{suffix}")
    Image.fromarray(label).save(root / f"{split}annot" / f"{stem}.png")
    return label


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A train split of two pairs."""
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "bb", suffix=".jpg")
    return tmp_path


def test_item_has_the_image_in_0_1_and_void_as_ignore_index(tmp_path: Path) -> None:
    stored = write_pair(tmp_path, "x")
    item = CamVid(tmp_path)[0]
    image = np.asarray(Image.open(tmp_path / "train/x.png"))
    assert item["image"].dtype == torch.float32 and item["label"].dtype == torch.int64
    assert item["image"].shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(item["image"].numpy().transpose(1, 2, 0), image / np.float32(255))
    assert np.array_equal(item["label"].numpy(), np.where(stored == 11, 255, stored))
    assert (item["label"] == 255).any()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".JPG"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_reads_each_split_and_suffix(tmp_path: Path, split: str, suffix: str) -> None:
    write_pair(tmp_path, "x", split=split, suffix=suffix)
    data = CamVid(tmp_path, split)
    assert len(data) == 1 and data[0]["label"].shape == (HEIGHT, WIDTH)


def test_pairs_are_sorted_by_name_and_indexed_from_both_ends(root: Path) -> None:
    data = CamVid(root)
    assert [image.name for image, _ in data.pairs] == ["a.png", "bb.jpg"]
    assert torch.equal(data[-1]["label"], data[1]["label"])
    assert not torch.equal(data[0]["label"], data[1]["label"])
    with pytest.raises(IndexError, match="2 samples"):
        data[2]


def test_other_and_hidden_files_are_left_out(root: Path) -> None:
    (root / "train/Thumbs.db").write_bytes(b"x")
    (root / "train/._a.png").write_bytes(b"x")
    assert len(CamVid(root)) == 2


def test_cache_keeps_the_decoded_pair_and_hands_out_copies(root: Path) -> None:
    cached, uncached = CamVid(root), CamVid(root, cache=False)
    before = cached[0]
    before["image"].zero_()
    before["label"].zero_()
    assert torch.equal(cached[0]["image"], uncached[0]["image"])
    assert torch.equal(cached[0]["label"], uncached[0]["label"])
    (root / "train/a.png").unlink()
    assert cached[0]["image"].any()
    with pytest.raises(DataError, match=r"cannot decode .*train/a\.png"):
        uncached[0]


def test_palette_label_keeps_its_indices(root: Path) -> None:
    stored = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 11
    label = Image.fromarray(stored, mode="L").convert("P")
    label.putpalette(bytes(range(255, -1, -1)) * 3)
    label.putdata(stored.ravel().tolist())
    label.save(root / "trainannot/a.png")
    assert np.array_equal(CamVid(root)[0]["label"].numpy(), stored)


def test_classes_and_palette() -> None:
    assert CamVid.classes[3] == "road" and len(CamVid.classes) == 11
    assert CamVid.ignore_index == 255


def test_unknown_split(root: Path) -> None:
    with pytest.raises(DataError, match="'training'; use one of train, val, test"):
        CamVid(root, "training")


@pytest.mark.parametrize("missing", ["", "val", "valannot"])
def test_missing_folder_is_named(tmp_path: Path, missing: str) -> None:
    for folder in {"val", "valannot"} - {missing}:
        (tmp_path / "camvid" / folder).mkdir(parents=True)
    target = tmp_path / ("nowhere" if not missing else "camvid")
    with pytest.raises(DataError, match=f"{target / missing} does not exist"):
        CamVid(target, "val")


def test_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(DataError, match=f"no images in {tmp_path / 'train'}"):
        CamVid(tmp_path)


def test_image_without_label_is_named(root: Path) -> None:
    (root / "trainannot/a.png").unlink()
    with pytest.raises(DataError, match=r"image without a label: .*train/a\.png; .*trainannot"):
        CamVid(root)


def test_label_without_image_is_named(root: Path) -> None:
    for stem in ("a", "bb"):
        write_pair(root, f"{stem}2")
        (root / f"train/{stem}2.png").unlink()
    with pytest.raises(DataError, match=r"label without an image: .*/a2\.png \(and 1 more\)"):
        CamVid(root)


def test_shared_stem_is_named(root: Path) -> None:
    (root / "train/a.jpg").write_bytes((root / "train/bb.jpg").read_bytes())
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png share a stem"):
        CamVid(root)


def test_size_mismatch_names_both_files(root: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), np.uint8)).save(root / "trainannot/a.png")
    with pytest.raises(DataError, match=r"trainannot/a\.png is 21x12 .*train/a\.png is 20x12"):
        CamVid(root)[0]


@given(wrong=st.integers(12, 255), seed=st.integers(0, 99))
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_label_value_out_of_range_is_named(root: Path, wrong: int, seed: int) -> None:
    label = np.random.default_rng(seed).integers(0, 12, (HEIGHT, WIDTH), dtype=np.uint8)
    label[seed % HEIGHT, seed % WIDTH] = wrong
    Image.fromarray(label).save(root / "trainannot/a.png")
    with pytest.raises(DataError, match=rf"trainannot/a\.png has label values {wrong}; .*11 for"):
        CamVid(root)[0]


def test_colour_label_is_refused(root: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(root / "trainannot/a.png")
    with pytest.raises(DataError, match=r"trainannot/a\.png has 3 channels \(mode RGB\)"):
        CamVid(root)[0]


def test_16_bit_image_is_refused(root: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 1000, np.uint16)).save(root / "train/a.png")
    with pytest.raises(DataError, match=r"train/a\.png has pixels of mode I"):
        CamVid(root)[0]


def break_second_chunk(png: bytes) -> bytes:
    """Splits a PNG's pixel data in two chunks, the second of a type that cannot be."""
    start = png.index(b"IDAT") + 4
    size = int.from_bytes(png[start - 8 : start - 4], "big")
    first, second = png[start : start + 10], png[start + 10 : start + size]
    chunk = (
        len(first).to_bytes(4, "big")
        + b"IDAT"
        + first
        + zlib.crc32(b"IDAT" + first).to_bytes(4, "big")
    )
    return (
        png[: start - 8] + chunk + len(second).to_bytes(4, "big") + b"\xff" * 4 + second + bytes(4)
    )


@pytest.mark.parametrize("name", ["train/a.png", "trainannot/a.png"])
@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "broken chunk"])
def test_undecodable_file_is_named(root: Path, name: str, damage: str) -> None:
    content = (root / name).read_bytes()
    damaged = {
        "text": b"not an image",
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "broken chunk": break_second_chunk(content),
    }
    (root / name).write_bytes(damaged[damage])
    with pytest.raises(DataError, match=f"cannot decode .*{name}"):
        CamVid(root)[0]


@pytest.mark.skipif("PAG_DATA" not in os.environ, reason="PAG_DATA (folder of the real data) unset")
def test_real_data() -> None:
    root = Path(os.environ["PAG_DATA"]) / "camvid"
    if not root.is_dir():
        pytest.skip(f"no camvid folder in PAG_DATA={os.environ['PAG_DATA']}")
    train, val = CamVid(root, "train", cache=False), CamVid(root, "val", cache=False)
    assert (len(train), len(val)) == (367, 101)
    counts = torch.zeros(256, dtype=torch.int64)
    for index in range(0, len(val), 10):
        item = val[index]
        assert item["image"].shape == (3, 360, 480)
        counts += torch.bincount(item["label"].flatten(), minlength=256)
    assert (counts[:11] > 0).all() and counts[255] > 0 and counts[11:255].sum() == 0
    # In street scenes the sky is above the road.
    label = val[0]["label"]
    assert (label == 0).nonzero()[:, 0].float().mean() < (label == 3).nonzero()[:, 0].float().mean()
