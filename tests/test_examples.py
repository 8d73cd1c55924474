"""Every script in examples/ runs, warnings being errors, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
PROMISES = {
    "custom_model": ["left out by include/exclude", "same outputs after loading: True"],
    "demo": ["outputs are bit-identical", "dense, trained equally long", "What next"],
    "own_training_loop": ["epoch 4", r"budget 0\.7: 0\.(69[5-9]|70[0-5]) measured"],
    "retrofit_smp": ["same outputs as before: True", "same outputs after loading: True"],
}
TINY_DEMO = (
    "data.train_count=4",
    "data.val_count=2",
    "data.size=[32,64]",
    "data.crop=[32,64]",
    "data.batch_size=2",
    "dense.epochs=1",
    "gated.epochs=1",
    "gated.calibration_batches=1",
    "runtime.threads=1",
)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(script, tmp_path):
    arguments = ["--output", str(tmp_path / "demo"), *TINY_DEMO] if script.stem == "demo" else []
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script), *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for promise in PROMISES[script.stem]:
        assert re.search(promise, done.stdout), f"{promise!r} is not in:\n{done.stdout}"
    if script.stem == "demo":
        check_demo(tmp_path / "demo", done.stdout)


def check_demo(folder: Path, output: str) -> None:
    for name in ("gated.safetensors", "panel.png", "open_rates.png"):
        assert (folder / name).stat().st_size > 1000
        assert str(folder / name) in output
    assert re.search(r"gated, budget 0\.7 .* [+-]0\.\d{3} .*\d%", output)
