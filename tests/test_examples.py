"""Every script in examples/ runs, warnings being errors, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pag_retrofit as pag

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMISES = {
    "custom_model": ["left out by include/exclude", "same outputs after loading: True"],
    "demo": ["outputs are bit-identical", "dense, trained equally long", "What next"],
    "own_training_loop": ["epoch 4", r"budget 0\.7: 0\.(69[5-9]|70[0-5]) measured"],
    "retrofit_smp": ["same outputs as before: True", "same outputs after loading: True"],
}
SEVERAL_PROCESSES = "sharded_training"
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
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


def launched(script, arguments, folder):
    done = subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PROMISES, SEVERAL_PROCESSES}


@pytest.mark.parametrize("name", PROMISES)
def test_it_runs(name, tmp_path):
    arguments = ["--output", str(tmp_path / "demo"), *TINY_DEMO] if name == "demo" else []
    script = ["-W", "error::UserWarning", str(EXAMPLES / f"{name}.py")]
    output = launched(script, arguments, tmp_path)
    for promise in PROMISES[name]:
        assert re.search(promise, output), f"{promise!r} is not in:\n{output}"
    if name == "demo":
        check_demo(tmp_path / "demo", output)


@pytest.mark.sweep
def test_a_loop_of_ones_own_runs_in_two_processes(tmp_path):
    script = [*TWO_PROCESSES, str(EXAMPLES / "own_training_loop.py")]
    output = launched(script, [], tmp_path)
    for promise in PROMISES["own_training_loop"]:
        assert len(re.findall(promise, output)) == 1, f"{promise!r} is not once in:\n{output}"


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """What the example prints whose processes have a copy of the network each."""
    return sharded("ddp", tmp_path_factory.mktemp("copies"))


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_a_sharded_network_trains_as_copies_do(strategy, copies, tmp_path):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    numbers = sharded(strategy, tmp_path)
    assert numbers == pytest.approx(copies, rel=2e-3 if strategy == "zero3" else 1e-4)
    assert pag.load_file(tmp_path / "gated.safetensors")


def sharded(strategy, folder):
    script = [*TWO_PROCESSES, str(EXAMPLES / f"{SEVERAL_PROCESSES}.py")]
    output = launched(script, ["--strategy", strategy], folder)
    numbers = re.findall(r"task loss ([\d.]+), compute ([\d.]+)", output)
    assert len(numbers) == 2, output
    assert re.search(r"budget 0\.7: 0\.(69[5-9]|70[0-5]) measured", output)
    return [float(number) for pair in numbers for number in pair]


def check_demo(folder: Path, output: str) -> None:
    for name in ("gated.safetensors", "panel.png", "open_rates.png"):
        assert (folder / name).stat().st_size > 1000
        assert str(folder / name) in output
    assert re.search(r"gated, budget 0\.7 .* [+-]0\.\d{3} .*\d%", output)
