"""Collects finished runs of the two MultiPool recipes and draws which branches pixels chose.

    python benchmarks/multipool.py --camvid runs/camvid_multipool --scenes runs/scenes_multipool/*

Each argument is the output folder of a run, one per seed. Reads the `metrics.json` of every stage,
writes benchmarks/results/multipool.json, and draws docs/images/multipool_branches.png from the
first CamVid network.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pag_retrofit import from_pretrained, measure
from pag_retrofit.building import evaluation_data
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
SHOWN = (20, 75)
"""Validation images in the picture."""
PIXELS = 360
"""Rows of a CamVid image; the network sees padding below them."""
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
        "seed": recipe.seed,
        "epochs": recipe.gated.epochs,
        "commit": environment["commit"],
        "stages": stages,
    }


@torch.no_grad()
def chosen_branches(folder: Path) -> dict[str, dict[int, float]]:
    """Share of each dilation at each site on the validation images; draws the picture."""
    recipe = load_recipe(folder / "gated-1.00" / "recipe.yaml")
    data = evaluation_data(recipe)
    gated = from_pretrained(folder / "gated-1.00")
    with measure(gated) as measured:
        for sample in data:
            gated(sample["image"][None])
    shares = measured.branch_shares
    images = torch.stack([data[index]["image"] for index in SHOWN])
    with measure(gated) as measured:
        gated(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    sites = dict(list(measured.branch_maps.items())[-DRAWN_SITES:])
    rows = PIXELS / images.shape[2]
    figure = branch_panel(
        (images * std + mean)[..., :PIXELS, :],
        {name: chosen[:, : round(rows * chosen.shape[1])] for name, chosen in sites.items()},
        title="CamVid validation: the dilation that each pixel chose",
    )
    save_figure(figure, PICTURE)
    Image.open(PICTURE).convert("RGB").quantize(256).save(PICTURE, optimize=True)
    return shares


def main() -> None:
    """Collect, write the results, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name in ("camvid", "scenes"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    results = {
        "camvid": [read_run(folder) for folder in arguments.camvid],
        "scenes": [read_run(folder) for folder in arguments.scenes],
        "branch_shares": chosen_branches(arguments.camvid[0]),
    }
    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, RESULTS)


if __name__ == "__main__":
    main()
