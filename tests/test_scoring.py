"""`pag-retrofit score`: files in, the field's metrics out."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_loaders import save_annotations

from pag_retrofit.errors import PagError
from pag_retrofit.scoring import ScoreOptions, score

SIZE = (40, 60)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "truth").mkdir()
    return tmp_path / "predictions", tmp_path / "truth"


def save(path: Path, array: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_segmentation(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    label = np.zeros(SIZE, np.uint8)
    label[:, 30:] = 3
    label[:4] = 255
    predicted = np.where(np.arange(60) < 40, 0, 3).astype(np.uint8) * np.ones(SIZE, np.uint8)
    save(predictions / "a.png", predicted)
    save(truth / "a.png", label)
    scores = score("segmentation", *folders, workers=1)
    assert scores["pixel_accuracy"] == pytest.approx(50 / 60)
    assert scores["iou"] == pytest.approx({"0": 30 / 40, "3": 20 / 30})
    assert scores["miou"] == pytest.approx((30 / 40 + 20 / 30) / 2)


def test_void_in_a_prediction_is_a_miss_and_no_class(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    label = np.zeros((10, 10), np.uint8)
    label[5:] = 1
    predicted = label.copy()
    predicted[0, 0] = 255
    save(predictions / "a.png", predicted)
    save(truth / "a.png", label)
    scores = score("segmentation", *folders, workers=1)
    assert scores["iou"] == pytest.approx({"0": 49 / 50, "1": 1.0})
    assert scores["miou"] == pytest.approx(0.99)
    assert scores["pixel_accuracy"] == pytest.approx(0.99)


@pytest.mark.parametrize("form", [np.uint8, np.int64, np.bool_, np.float32])
def test_numbers_of_arrays_are_taken_as_they_are(
    folders: tuple[Path, Path], form: type[np.generic]
) -> None:
    predictions, truth = folders
    line = np.zeros(SIZE)
    line[20] = 1
    for folder in folders:
        save(folder / "a.npy", line.astype(form))
    assert score("boundaries", *folders, workers=1)["ods"] == pytest.approx(1)
    for folder in folders:
        save(folder / "a.npy", (2 + line).astype(np.int64 if form is np.bool_ else form))
    scores = score("depth", *folders, workers=1)
    assert scores["abs_rel"] == 0 and scores["rmse"] == 0


@pytest.mark.parametrize("kind", ["npy", "8", "16"])
def test_depth_in_any_format(folders: tuple[Path, Path], kind: str) -> None:
    predictions, truth = folders
    metres = generator().uniform(1, 4, SIZE)
    if kind == "npy":
        save(predictions / "a.npy", (1.1 * metres).astype(np.float32))
        save(truth / "a.npy", np.where(metres < 1.5, 0, metres).astype(np.float32))
        options = ScoreOptions()
    else:
        scale, form = (50.0, np.uint8) if kind == "8" else (5000.0, np.uint16)
        metres = np.round(metres * scale / 10) * 10 / scale
        save(predictions / "a.png", (1.1 * metres * scale).round().astype(form))
        save(truth / "a.png", (np.where(metres < 1.5, 0, metres) * scale).round().astype(form))
        options = ScoreOptions(depth_scale=scale)
    scores = score("depth", *folders, options, workers=1)
    assert scores["abs_rel"] == pytest.approx(0.1, abs=2e-3)
    assert scores["delta1"] == 1


def test_normals(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    flat = np.zeros((*SIZE, 3))
    flat[..., 2] = -1
    tilted = np.zeros((*SIZE, 3))
    tilted[..., 0], tilted[..., 2] = np.sin(np.radians(20)), -np.cos(np.radians(20))
    save(predictions / "a.png", np.round((tilted + 1) * 127.5).astype(np.uint8))
    flat[:10] = 0
    save(truth / "a.npy", flat.transpose(2, 0, 1))
    scores = score("normals", *folders, workers=1)
    assert scores["mean"] == pytest.approx(20, abs=0.5)
    assert (scores["within_11_25"], scores["within_22_5"]) == (0, 1)


def test_boundaries_from_the_command_line(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    for name in ("a", "b", "c"):
        drawn = np.zeros(SIZE, bool)
        drawn[:, generator().integers(5, 50)] = True
        save_annotations(truth / f"{name}.mat", [drawn, drawn])
        strength = np.where(drawn, 200, 0).astype(np.uint8)
        save(predictions / f"{name}.png", strength)
    save(predictions / "extra.png", strength)
    command = [sys.executable, "-m", "pag_retrofit", "score", "boundaries"]
    command += [str(predictions), str(truth), "--thresholds", "9", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores: dict[str, Any] = json.loads(done.stdout)
    assert scores["images"] == 3
    assert scores["ods"] == scores["ois"] == scores["ods_recall"] == scores["ods_precision"] == 1
    assert 0 < scores["ods_threshold"] <= 0.8
    assert "1 predictions without ground truth" in done.stderr


def test_endings_and_hidden_files(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    drawn = np.zeros(SIZE, bool)
    drawn[:, 20] = True
    save_annotations(truth / "a.mat", [drawn])
    (truth / "a.mat").rename(truth / "a.MAT")
    np.save(predictions / "a.npy", drawn.astype(np.float32))
    (predictions / "a.npy").rename(predictions / "a.NPY")
    (truth / "._a.mat").write_bytes(b"of another system")
    assert score("boundaries", *folders, workers=1)["ods"] == 1


def test_colours_of_16_bits_are_refused(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    np.save(truth / "a.npy", np.ones((3, 2, 2)))
    rows = b"".join(b"\0" + bytes(2 * 6) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in chunks
    )
    (predictions / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(PagError, match=r"a\.png: colours of 16 bits"):
        score("normals", *folders, workers=1)


def test_void_alone_is_no_ground_truth(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        save(folder / "a.png", np.full(SIZE, 255, np.uint8))
    with pytest.raises(PagError, match="no label but 255"):
        score("segmentation", *folders, workers=1)


def test_bad_input_is_named(folders: tuple[Path, Path]) -> None:
    predictions, truth = folders
    with pytest.raises(PagError, match="task='poses'"):
        score("poses", *folders)
    with pytest.raises(PagError, match="workers=0"):
        score("depth", *folders, workers=0)
    with pytest.raises(PagError, match="no files"):
        score("depth", *folders)
    save(truth / "a.npy", np.ones(SIZE))
    save(truth / "b.npy", np.ones(SIZE))
    save(predictions / "a.npy", np.ones((3, 3)))
    with pytest.raises(PagError, match=r"1 of 2 images have no prediction.* such as b"):
        score("depth", *folders)
    save(predictions / "b.npy", np.ones(SIZE))
    with pytest.raises(PagError, match=r"a\.npy: .*shape"):
        score("depth", *folders, workers=1)
    with pytest.raises(PagError, match="there is no folder"):
        score("depth", predictions / "none", truth)
    for task, array, message in (
        ("boundaries", np.full(SIZE, 7), "strengths from 0 to 1"),
        ("boundaries", np.full(SIZE, np.nan), "strengths from 0 to 1"),
        ("segmentation", np.full(SIZE, 1.5), "whole and below 256"),
        ("segmentation", np.full(SIZE, np.nan), "whole and below 256"),
        ("depth", np.full(SIZE, np.nan), "not finite"),
        ("depth", np.ones((*SIZE, 1)), r"expected \(height, width\)"),
        ("depth", np.array([["a"]]), "expected numbers"),
        ("depth", np.ones((0, 3)), "expected numbers"),
    ):
        save(predictions / "a.npy", array)
        with pytest.raises(PagError, match=message):
            score(task, *folders, workers=1)
    for options in ({"tolerance": -1.0}, {"depth_scale": -1.0}, {"thresholds": 0}):
        with pytest.raises(PagError, match=next(iter(options))):
            ScoreOptions(**options)  # type: ignore[arg-type]
    np.save(predictions / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(PagError, match="cannot read"):
        score("depth", *folders, workers=1)
