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
from torch import Tensor

from pag_retrofit import from_pretrained, measure, plan
from pag_retrofit.building import evaluation_data
from pag_retrofit.evaluation import load_network
from pag_retrofit.pictures import open_rates_chart, prediction_panel, save_figure, tradeoff_chart
from pag_retrofit.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "camvid_mobilenetv2.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "camvid_mobilenetv2.json"
IMAGES = ROOT / "docs" / "images"
SHOWN = (20, 75)
"""Validation images in the panel: one of each of the two drives."""


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
    gated = []
    for folder in sorted(run.glob("gated-*"), reverse=True):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        gated.append({"budget": metrics["budget"], **read_stage(folder)})
    environment = json.loads((run / "dense" / "environment.json").read_text(encoding="utf-8"))
    last = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    size = tuple(evaluation_data(recipe)[0]["image"].shape)
    network = load_network(run / "dense", recipe.model)
    layers = plan(network, min(recipe.gated.budgets), example_input=(1, *size)).to_dict()
    return {
        "seed": recipe.seed,
        "commit": last["commit"],
        "environment": environment,
        "images": len(evaluation_data(recipe)),
        "input": "x".join(map(str, size)),
        "total_macs": layers["total_macs"],
        "gateable_share": layers["gateable_share"],
        "floor": layers["floor"],
        "dense_epochs": recipe.dense.epochs,
        "gated_epochs": recipe.gated.epochs,
        "dense": read_stage(run / "dense"),
        "reference": read_stage(run / "reference"),
        "gated": gated,
    }


def predict(folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted labels (B, H, W) and compute as a fraction of dense compute per pixel."""
    gated = from_pretrained(folder)
    with torch.no_grad(), measure(gated) as measured:
        labels = gated(images).argmax(1)
    per_pixel = measured.total_macs / measured.compute_map.numel()
    return labels, measured.compute_map / per_pixel
