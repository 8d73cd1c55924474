"""Collects finished runs of the MultiPool recipes and draws which branches pixels chose.

    for seed in 0 1; do
        pag-retrofit finetune recipes/scenes_multipool.yaml seed=$seed output=runs/scenes/$seed
    done
    python benchmarks/multipool.py runs/scenes/0 runs/scenes/1

Each argument is the output folder of a run. Reads the `metrics.json` of every stage, writes
benchmarks/results/multipool.json, and draws docs/images/multipool_branches.png from the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pag_retrofit import from_pretrained, measure
from pag_retrofit.building import evaluation_data
from pag_retrofit.checkpoints import write_json
from pag_retrofit.pictures import branch_panel, save_figure
from pag_retrofit.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "multipool.json"
PICTURE = ROOT / "docs" / "images" / "multipool_branches.png"
STAGES = {
    "dense": "dense",
    "reference": "dense, trained on equally long",
    "average": "all dilations, averaged",
    "gated-1.00": "one dilation per pixel",
}
SHOWN = (0, 3)
"""Validation images in the picture."""
DRAWN_SITES = 3


def read_run(folder: Path) -> dict[str, Any]:
    """Final figures of every stage of a run.

    Raises:
        SystemExit: A stage is not complete.
    """
    stages: dict[str, Any] = {}
    for stage in STAGES:
        metrics = json.loads((folder / stage / "metrics.json").read_text(encoding="utf-8"))
        if not metrics["complete"]:
            raise SystemExit(f"{folder / stage} is not complete: run the recipe to its end first")
        final = metrics["final"]
        stages[stage] = {key: final[key] for key in ("miou", "pixel_accuracy", "fraction")}
        stages[stage]["images"] = final["images"]
    environment = json.loads((folder / "gated-1.00" / "environment.json").read_text("utf-8"))
    recipe = load_recipe(folder / "gated-1.00" / "recipe.yaml")
    assert recipe.gated is not None
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "epochs": recipe.gated.epochs,
        "commit": environment["commit"],
        "stages": stages,
        "branch_shares": branch_shares(folder),
    }


@torch.no_grad()
def branch_shares(folder: Path) -> dict[str, dict[int, float]]:
    """Share of each dilation at each site on the validation images."""
    recipe = load_recipe(folder / "gated-1.00" / "recipe.yaml")
    gated = from_pretrained(folder / "gated-1.00")
    with measure(gated) as measured:
        for sample in evaluation_data(recipe):
            gated(sample["image"][None])
    return measured.branch_shares


@torch.no_grad()
def draw(folder: Path) -> None:
    """Draw the branches that pixels of validation images chose."""
    recipe = load_recipe(folder / "gated-1.00" / "recipe.yaml")
    data = evaluation_data(recipe)
    gated = from_pretrained(folder / "gated-1.00")
    images = torch.stack([data[index]["image"] for index in SHOWN])
    with measure(gated) as measured:
        gated(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    figure = branch_panel(
        images * std + mean,
        dict(list(measured.branch_maps.items())[-DRAWN_SITES:]),
        title=f"{recipe.name}: the dilation that each pixel chose",
    )
    save_figure(figure, PICTURE)
    Image.open(PICTURE).convert("RGB").quantize(256).save(PICTURE, optimize=True)


def main() -> None:
    """Collect, write the results, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="output folders")
    folders = parser.parse_args().runs
    write_json(RESULTS, {"runs": [read_run(folder) for folder in folders]})
    draw(folders[0])


if __name__ == "__main__":
    main()
