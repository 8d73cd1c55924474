"""Collects a finished run of recipes/camvid_mobilenetv2.yaml and draws its pictures.

    pag-retrofit finetune recipes/camvid_mobilenetv2.yaml
    python benchmarks/camvid.py runs/camvid_mobilenetv2

Reads the `metrics.json` of every stage, writes benchmarks/results/camvid_mobilenetv2.json, and
draws docs/images/camvid_*.png from the saved networks on validation images.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from pag_retrofit import from_pretrained, measure, plan
from pag_retrofit.building import evaluation_data
from pag_retrofit.evaluation import load_network
from pag_retrofit.pictures import (
    open_rates_chart,
    prediction_panel,
    relative_compute_map,
    save_figure,
    tradeoff_chart,
)
from pag_retrofit.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "camvid_mobilenetv2.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "camvid_mobilenetv2.json"
IMAGES = ROOT / "docs" / "images"
SHOWN = (20, 75)
"""Validation images in the panel."""
PIXELS = 360
"""Rows of a CamVid image; the network sees padding below them."""


def read_stage(folder: Path) -> dict[str, Any]:
    """Final figures of a stage.

    Raises:
        SystemExit: The stage is not complete.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if not metrics["complete"]:
        raise SystemExit(f"{folder} is not complete: run the recipe to its end first")
    final = metrics["final"]
    kept = ("miou", "pixel_accuracy", "iou", "fraction", "open_rates")
    figures = {key: final[key] for key in kept}
    best = metrics["best"]
    figures["best_miou"] = best["miou"] if best else None
    figures["seconds"] = metrics["seconds"]
    return figures


def collect(run: Path, recipe: Recipe) -> dict[str, Any]:
    """Everything the README and the docs show, as plain values."""
    assert recipe.dense is not None and recipe.gated is not None
    gated = [
        {"budget": budget, **read_stage(run / f"gated-{budget:.2f}")}
        for budget in recipe.gated.budgets
    ]
    environment = {
        name: json.loads((run / name / "environment.json").read_text(encoding="utf-8"))
        for name in ("dense", "reference")
    }
    size = tuple(evaluation_data(recipe)[0]["image"].shape)
    network = load_network(run / "dense", recipe.model)
    layers = plan(network, min(recipe.gated.budgets), example_input=(1, *size)).to_dict()
    return {
        "seed": recipe.seed,
        "commit": environment["reference"]["commit"],
        "environment": environment,
        "images": len(evaluation_data(recipe)),
        "input": "x".join(map(str, size)),
        "total_macs": layers["total_macs"],
        "gateable_share": layers["gateable_share"],
        "floor": layers["floor"],
        "shares": {site["name"]: site["share"] for site in layers["sites"]},
        "dense_epochs": recipe.dense.epochs,
        "gated_epochs": recipe.gated.epochs,
        "dense": read_stage(run / "dense"),
        "reference": read_stage(run / "reference"),
        "gated": gated,
    }


def draw_panel(run: Path, recipe: Recipe, budget: float) -> Figure:
    """Predictions and compute maps of one gated network."""
    data = evaluation_data(recipe)
    samples = [data[index] for index in SHOWN]
    images = torch.stack([sample["image"] for sample in samples])
    gated = from_pretrained(run / f"gated-{budget:.2f}")
    with torch.no_grad(), measure(gated) as measured:
        predictions = gated(images).argmax(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    height = PIXELS  # without the rows that pad the image to a multiple of 32
    return prediction_panel(
        (images * std + mean)[..., :height, :],
        torch.stack([sample["label"] for sample in samples])[:, :height],
        predictions[:, :height],
        relative_compute_map(measured)[:, :height],
        palette=data.palette,
        classes=data.classes,
        title=f"CamVid validation, U-Net MobileNetV2 gated to {budget:.0%} of the compute",
    )


def draw(run: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Draw the pictures of README and docs from the results and the saved networks."""
    lowest = min(results["gated"], key=lambda entry: entry["budget"])
    points = [(entry["fraction"], entry["miou"]) for entry in results["gated"]]
    references = {
        "dense": results["dense"]["miou"],
        "dense, as long": results["reference"]["miou"],
    }
    figures = {
        "panel": draw_panel(run, recipe, lowest["budget"]),
        "tradeoff": tradeoff_chart(
            {"gated": points}, references, title="CamVid, U-Net MobileNetV2, one network per budget"
        ),
        "open_rates": open_rates_chart(
            lowest["open_rates"],
            results["shares"],
            title=f"Which layers stay open at {lowest['budget']:.0%} of the compute",
        ),
    }
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = IMAGES / f"camvid_{name}.png"
        save_figure(figure, path)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third the size


def main() -> None:
    """Collect, write the results, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of the recipe")
    run = parser.parse_args().run
    recipe = load_recipe(RECIPE, [f"output={run}"])
    results = collect(run, recipe)
    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, RESULTS)
    draw(run, recipe, results)


if __name__ == "__main__":
    main()
