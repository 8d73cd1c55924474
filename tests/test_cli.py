from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from typer.testing import CliRunner

from pag_retrofit import cli

ROOT = Path(__file__).parent.parent
TINY = [
    "data.train_count=4",
    "data.val_count=2",
    "data.size=[64, 64]",
    "data.crop=[64, 64]",
    "data.batch_size=2",
    "dense.epochs=1",
    "gated.epochs=1",
    "gated.calibration_batches=1",
    "model.arguments.decoder_channels=[16, 16, 8, 8]",
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pag-retrofit", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def test_the_scenes_recipe_runs_and_its_results_can_be_evaluated(tmp_path, monkeypatch, capsys):
    recipe = str(ROOT / "recipes" / "scenes_quick.yaml")
    overrides = [*TINY, f"output={tmp_path}"]
    out = run("finetune", recipe, *overrides)
    assert "reference" in out and "gated-0.70" in out

    saved = json.loads((tmp_path / "gated-0.70" / "metrics.json").read_text())["final"]
    shown = json.loads(run("evaluate", str(tmp_path / "gated-0.70"), recipe, *overrides, "--json"))
    for name in ("miou", "fraction", "open_rates", "iou"):
        assert shown[name] == saved[name]
    table = run("evaluate", str(tmp_path / "dense"), recipe, *overrides)
    assert "IoU sphere" in table and "miou" in table
    run("evaluate", str(tmp_path / "gated-0.70"), recipe, *overrides, "--budget", "0.7")

    budget = ["evaluate", str(tmp_path / "gated-0.70"), recipe, *overrides, "--budget", "0.2"]
    assert "BudgetError" in fail(monkeypatch, capsys, *budget)
    missing = ["evaluate", str(tmp_path / "nowhere"), recipe, *overrides]
    assert "CheckpointError" in fail(monkeypatch, capsys, *missing)


def test_outputs_that_are_no_folder(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    recipe = str(ROOT / "recipes" / "scenes_quick.yaml")
    message = fail(monkeypatch, capsys, "finetune", recipe, *TINY, f"output={file}")
    assert "RecipeError" in message and "no folder" in message


def test_scores_by_no_process_are_refused(tmp_path):
    arguments = ["score", "depth", str(tmp_path), str(tmp_path), "--workers", "-1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and "--workers" in result.output


def test_plan():
    network = ["--model", "smp:Unet", "--argument", "encoder_name=resnet18"]
    shape = ["--input", "1x3x64x64"]
    made = json.loads(run("plan", *network, *shape, "--budget", "0.8", "--json"))
    assert made["budget"] == 0.8 and made["input_shape"] == [1, 3, 64, 64]
    assert 0 < made["floor"] < made["gateable_share"] <= 1
    assert made["sites"]
    fewer = json.loads(run("plan", *network, *shape, "--config", "include=['decoder.*']", "--json"))
    assert 0 < len(fewer["sites"]) < len(made["sites"])
    assert "resnet18" in run("plan", *network, *shape) or "Unet" in run("plan", *network, *shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "Unet", "--input", "1x3x64x64"], "expected library:name"),
        (["plan", "--model", "smp:Unet", "--input", "64x64"], "1x3x384x480"),
        (["plan", "--model", "smp:Nope", "--input", "1x3x64x64"], "Nope"),
        (
            ["plan", "--model", "smp:Unet", "--input", "1x3x64x64", "--argument", "x"],
            "expected name=value",
        ),
        (["finetune", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["finetune", str(ROOT / "recipes" / "scenes_quick.yaml"), "sed=1"], "did you mean seed?"),
    ],
)
def test_errors_are_one_message_and_status_one(arguments, message, monkeypatch, capsys):
    assert message in fail(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize("option", ["rounds", "threads"])
def test_numbers_that_time_nothing_are_refused(option):
    arguments = ["benchmark", "latency", "--model", "timm:resnet10t", "--input", "1x3x64x64"]
    result = CliRunner().invoke(cli.app, [*arguments, f"--{option}", "0"])
    assert result.exit_code == 2 and f"--{option}" in result.output


def test_module_and_help():
    done = subprocess.run(
        [sys.executable, "-m", "pag_retrofit", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("finetune", "evaluate", "plan"))


def test_help_and_wrong_recipes_need_no_heavy_imports():
    code = (
        "import sys; from pag_retrofit import cli, recipe;"
        "print([m for m in ('accelerate', 'segmentation_models_pytorch', 'matplotlib',"
        " 'torchmetrics', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
