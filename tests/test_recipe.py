from __future__ import annotations

import re
from pathlib import Path

import pytest

from pag_retrofit.errors import RecipeError
from pag_retrofit.recipe import Recipe, ScenesSection, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))

TEXT = """\
name: small
output: runs/small
stages: [dense]
model:
  name: Unet
  arguments: {classes: 6}
data:
  name: scenes
  crop: [64, 64]
dense:
  epochs: 2
  lr: 1e-3
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def problems(path, overrides=()) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    first, *rest = str(error.value).splitlines()
    assert str(path) in first
    assert first.endswith(f"{len(rest)} problem(s)")
    return [line.strip() for line in rest]


def test_values_defaults_and_immutability(write):
    recipe = load_recipe(write(TEXT))
    assert recipe.dense is not None and recipe.dense.lr == 1e-3  # YAML 1.1 reads a string here
    assert isinstance(recipe.data, ScenesSection)
    assert recipe.data.crop == (64, 64)
    assert recipe.runtime.trackers == ("tensorboard",)
    assert recipe.gated is None
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_all_problems_are_reported_at_once_with_key_line_and_hint(write):
    text = TEXT.replace("lr: 1e-3", "lr: fast\n  warm_up: 0.1") + "sead: 3\n"
    found = problems(write(text))
    assert len(found) == 3
    assert any("line 12: dense.lr: got 'fast'" in p and "number" in p for p in found)
    assert any("line 13: unknown key dense.warm_up; did you mean warmup?" in p for p in found)
    assert any("line 14: unknown key sead; did you mean seed?" in p for p in found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dense.epochs=2.5", "dense.epochs: got 2.5"),
        ("dense.epochs=true", "dense.epochs: got True"),
        ("dense.epochs='3'", "dense.epochs: got '3'"),
        ("dense.epochs=0", "dense.epochs: got 0"),
        ("dense.lr=.nan", "dense.lr: got nan"),
        ("data.crop=[64]", "data.crop.1"),
        ("data.crop=[64, a]", "data.crop.1: got 'a'"),
        ("data.scale=[1.5, 0.5]", "scale must be [smallest, largest]"),
        ("data.name=imagenet", "data.name: expected one of camvid, scenes"),
        ("data.rooot=x", "unknown key data.rooot"),
        ("data=3", "data"),
        ("data.size=[4, 64]", "data.size.0: got 4"),
        ("data.mean=[.nan, 0.5, 0.5]", "data.mean.0: got nan"),
        ("model.checkpoint=nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("model.encoder_checkpoint=${NOT_SET}/x", "environment variable NOT_SET is not set"),
        ("runtime.mixed_precision=fp8", "'no', 'bf16' or 'fp16'"),
        ("stages=[gated]", "the stage gated needs the section gated"),
        ("stages=[]", "stages: expected at least one item, got []"),
    ],
)
def test_a_wrong_value_is_named(write, override, message):
    (found,) = problems(write(TEXT), [override])
    assert message in found
    assert f"override {override!r}" in found or "stage" in found or "scale" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budgets=[0.9, 0]", "gated.budgets.1: got 0"),
        ("budgets=[1.1]", "gated.budgets.0: got 1.1"),
        ("budgets=[0.9, 0.901]", "budgets must differ"),
        ("retrofit={scope: pixel}", "scope='pixel'"),
        ("retrofit={bypas: auto}", "unknown keys ['bypas']"),
        ("annealing.ramp=0", "gated.annealing.ramp: got 0"),
        ("sparsity.kid=global", "unknown key gated.sparsity.kid; did you mean kind?"),
    ],
)
def test_gated_section(write, override, message):
    base = ["gated={epochs: 1, lr: 0.1, gate_lr: 0.1, budgets: [0.9]}", "stages=[dense, gated]"]
    recipe = load_recipe(write(TEXT), base)
    assert recipe.gated is not None and recipe.gated.budgets == (0.9,)
    (found,) = problems(write(TEXT), [*base, f"gated.{override}"])
    assert message in found


def test_missing_keys(write):
    found = problems(write("name: small\n"))
    assert {"missing key output", "missing key model", "missing key data"} <= set(found)


def test_a_missing_key_inside_a_section_names_the_line_of_the_section(write):
    (found,) = problems(write(TEXT.replace("  epochs: 2\n", "")))
    assert found == "line 10: missing key dense.epochs"


def test_duplicate_keys(write):
    (found,) = problems(write(TEXT + "name: other\n"))
    assert found == "line 13: name is given twice (line 1 too)"


def test_merged_keys_may_be_overridden(write):
    text = TEXT.replace("dense:\n", "dense: &dense\n") + "gated:\n  <<: *dense\n  epochs: 3\n"
    settings = ["gated.gate_lr=0.1", "gated.budgets=[0.9]", "stages=[dense, gated]"]
    recipe = load_recipe(write(text), settings)
    assert recipe.gated is not None and recipe.dense is not None
    assert (recipe.gated.epochs, recipe.dense.epochs) == (3, 2)
    assert recipe.gated.lr == recipe.dense.lr
    (found,) = problems(write(text + "  epochs: 4\n"), settings)
    assert "gated.epochs is given twice" in found


def test_files_that_are_no_recipe(write, tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match=r"not valid YAML[\s\S]*line 1"):
        load_recipe(write("name: [unclosed"))
    with pytest.raises(RecipeError, match="must hold a mapping"):
        load_recipe(write("- a\n- b\n"))
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(write("name: !!python/object/apply:os.getcwd []\n"))
    assert "missing key model" in problems(write(""))
    for text in (TEXT + "2026-11-29: {}\n", TEXT + "stages: &a [*a]\n"):
        with pytest.raises(RecipeError, match="not valid YAML with text for keys"):
            load_recipe(write(text))


def test_overrides_that_are_no_values(write):
    for override in ("name=[", "name=2026-13-45"):
        with pytest.raises(RecipeError, match="is not valid YAML"):
            load_recipe(write(TEXT), [override])


def test_overrides(write):
    recipe = load_recipe(
        write(TEXT), ["runtime.threads=1", "dense.lr=2e-4", "name=other", "data.size=[32, 48]"]
    )
    assert recipe.runtime.threads == 1
    assert recipe.dense is not None and recipe.dense.lr == 2e-4
    assert recipe.name == "other"
    assert isinstance(recipe.data, ScenesSection) and recipe.data.size == (32, 48)


@pytest.mark.parametrize("word", ["no", "bf16"])
def test_precision_may_be_a_word_that_yaml_reads_as_false(write, word):
    recipe = load_recipe(write(TEXT), [f"runtime.mixed_precision={word}"])
    assert recipe.runtime.mixed_precision == word


@pytest.mark.parametrize("override", ["dense.lr", "=3", "dense..lr=3", "name.deep=3", "name=[1"])
def test_malformed_overrides(write, override):
    with pytest.raises(RecipeError):
        load_recipe(write(TEXT), [override])


def test_variables_in_paths(write, tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", str(tmp_path))
    (tmp_path / "w.safetensors").touch()
    recipe = load_recipe(
        write(TEXT), ["model.checkpoint=${WHERE}/w.safetensors", "output=${WHERE}/out"]
    )
    assert recipe.model.checkpoint == tmp_path / "w.safetensors"
    assert recipe.output == tmp_path / "out"


def test_resolved_recipe_reads_back_equal(write):
    recipe = load_recipe(
        write(TEXT), ["gated={epochs: 1, lr: 0.1, gate_lr: 0.1, budgets: [0.9, 0.7]}"]
    )
    assert load_recipe(write(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_to_launch_it(path, tmp_path, monkeypatch):
    text = path.read_text()
    launch = r"# (accelerate launch -m pag_retrofit|pag-retrofit) (finetune|tradeoff) recipes/"
    assert re.match(launch, text)
    for variable, rest in re.findall(r"\$\{(\w+)\}/(\S+)", text):
        monkeypatch.setenv(variable, str(tmp_path))
        target = tmp_path / rest
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch() if target.suffix else target.mkdir(exist_ok=True)
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert recipe.name == path.stem


def test_there_are_recipes():
    assert {"camvid_mobilenetv2", "scenes_quick"} <= {path.stem for path in RECIPES}
