"""Collects finished stages of recipes: quality against compute and time, for docs/tradeoff.md.

    pag-retrofit tradeoff recipes/camvid_mobilenetv2.yaml --seeds 0,1 stages=[...]
    python benchmarks/tradeoff.py runs/camvid_mobilenetv2,runs/camvid_mobilenetv2/seed-1

Each argument is the output folder of a recipe, and after commas those of further seeds that began
with its dense network or have budgets in time; stages that are not complete are left out. Adds to
benchmarks/results/tradeoff.json and draws docs/images/tradeoff_NAME_*.png. With `--timed` it
measures how long the networks take, deployed (gated ones) or in the fastest dense runtime.
With `--add` points that are not in the folders stay: files of earlier runs may be gone, and where
the dense network scores the same to all digits it is the same one.
With `--name` the results stand beside the recipe's. With `--note`, too, they are a variant, of
which no pictures are drawn: what begins with a dense network that was trained anew is compared
with nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from pag_retrofit import from_pretrained, measure
from pag_retrofit.building import build_task, evaluation_data
from pag_retrofit.checkpoints import write_json
from pag_retrofit.pictures import map_panel, relative_compute_map, save_figure
from pag_retrofit.recipe import Recipe, load_recipe
from pag_retrofit.stages import environment
from pag_retrofit.tradeoff import NAMES, Point, charts, is_timed, with_times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tradeoff.json"
IMAGES = ROOT / "docs" / "images"
KINDS = ("dense", "reference", *NAMES)
SHOWN = 2
"""Validation images in a panel."""
_PANEL = (900, 900)
KEPT = ("scores", "trained")
"""What is kept of a point beside itself."""
NOT_SCORES = ("fraction", "images", "seconds", "open_rates", "iou")


def read_points(folder: Path) -> list[tuple[Point, dict[str, Any]]]:
    """Points of the complete stages in a folder, and what else is kept of them.

    That is all scores, and fraction and metric at the end of training, before calibration.
    """
    found = []
    for file in sorted(folder.glob("*/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        kind = re.sub(r"-\d\.\d\d$", "", metrics["stage"])
        if not metrics["complete"] or kind not in KINDS:
            continue
        recipe = load_recipe(file.parent / "recipe.yaml")
        name = metrics["stage"]
        if is_timed(kind, recipe):
            kind, name = "timed", f"{folder.name}/{name}"
        scores = {name: (metrics["budget"], metrics["final"])}
        if kind == "dial":
            points = metrics["operating_points"]
            scores = {f"dial@{budget}": (float(budget), found) for budget, found in points.items()}
        for name, (budget, final) in scores.items():
            point = Point(
                name, kind, recipe.seed, budget, final["fraction"], final[metrics["metric"]]
            )
            kept = {k: v for k, v in final.items() if k not in NOT_SCORES}
            found.append((point, {"scores": kept, "trained": _before_calibration(metrics)}))
    return found


def _before_calibration(metrics: dict[str, Any]) -> dict[str, float] | None:
    records = [record for record in metrics["history"] if "fraction" in record]
    if not records:
        return None
    return {"fraction": records[-1]["fraction"], "metric": records[-1][metrics["metric"]]}


def collect(folders: list[Path], recipe: Recipe, timed: bool) -> dict[str, Any]:
    """All that the docs show of a recipe."""
    found = [entry for folder in folders for entry in read_points(folder)]
    points = [point for point, _ in found]
    if timed:
        seed = next(point.seed for point in points if point.kind == "dense")
        points = with_times(points, recipe, seed, 1, 24)
    trained = load_recipe(next(folders[0].glob("*-0.??/recipe.yaml")))
    assert recipe.dense is not None and trained.gated is not None
    return {
        "recipe": recipe.name,
        "task": recipe.task.name,
        "data": recipe.data.name,
        "metric": build_task(recipe, evaluation_data(recipe)).metric,
        "images": len(evaluation_data(recipe)),
        "epochs": [recipe.dense.epochs, trained.gated.epochs],
        "points": [
            {**asdict(point), **kept} for point, (_, kept) in zip(points, found, strict=True)
        ],
        "environment": environment(),
    }


def added_to(before: dict[str, Any], collected: dict[str, Any]) -> dict[str, Any]:
    """The points of earlier runs that were not run anew, and those that were.

    Raises:
        ValueError: They began with another dense network.
    """
    dense = {
        point["metric"]
        for run in (before, collected)
        for point in run["points"]
        if point["kind"] == "dense"
    }
    if len(dense) != 1:
        raise ValueError(f"dense networks score {sorted(dense)}: use --name and --note")
    found = {_what(point): point for point in before["points"]}
    for point in collected["points"]:
        earlier = found.get(_what(point), {})
        if earlier.get("metric") == point["metric"]:  # the same network
            point["times"] = point["times"] or earlier["times"]
        found[_what(point)] = point
    return {**collected, "points": list(found.values())}


def _what(point: dict[str, Any]) -> tuple[str, int, float | None]:
    return point["kind"], point["seed"], point["budget"]


def draw_panel(folder: Path, recipe: Recipe) -> Figure:
    """What the network gated to about half sees, and where it computes."""
    nearest = min(folder.glob("gated-*"), key=lambda path: abs(float(path.name[6:]) - 0.5))
    gated = from_pretrained(nearest)
    data, task = evaluation_data(recipe), recipe.task.name
    chosen = [data[k * len(data) // SHOWN] for k in range(SHOWN)]
    samples = [sample for sample in chosen if sample["image"].shape == chosen[0]["image"].shape]
    images = torch.stack([sample["image"] for sample in samples])
    with torch.no_grad(), measure(gated) as measured:
        predictions = build_task(recipe, data).predict(gated(images))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    key = {"boundaries": "boundary"}.get(task, task)
    return map_panel(
        images * std + mean,
        torch.stack([sample[key] for sample in samples]),
        predictions,
        relative_compute_map(measured),
        kind=task,
        title=f"{recipe.name}, gated to {measured.fraction:.0%} of the compute",
    )


def main() -> None:
    """Collect, write, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", help="FOLDER[,FOLDER...] of the seeds of a recipe")
    parser.add_argument("--timed", action="store_true", help="measure times as well")
    parser.add_argument("--add", action="store_true", help="keep points that are not found")
    parser.add_argument("--name", help="in the results; default: the recipe's")
    parser.add_argument("--note", default="", help="above the table; without pictures")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for run in arguments.runs:
        folders = [Path(folder) for folder in run.split(",")]
        recipe = load_recipe(folders[0] / "dense" / "recipe.yaml", [f"output={folders[0]}"])
        collected = {**collect(folders, recipe, arguments.timed), "note": arguments.note}
        name = arguments.name or recipe.name
        if arguments.add and name in results:
            collected = added_to(results[name], collected)
        results[name] = collected
        write_json(RESULTS, results)
        if arguments.note:
            continue
        points = [
            Point(**{key: value for key, value in point.items() if key not in KEPT})
            for point in collected["points"]
            # Each seed renders other images: curves of several are comparable in one of them.
            if recipe.data.name != "scenes" or point["seed"] == recipe.seed
        ]
        figures = charts(points, collected["metric"], name)
        gated = any(folders[0].glob("gated-*"))
        if gated and recipe.task.name not in ("segmentation", "multitask"):
            figures["panel"] = draw_panel(folders[0], recipe)
        for part, figure in figures.items():
            path = IMAGES / f"tradeoff_{name}_{part}.png"
            save_figure(figure, path)
            picture = Image.open(path).convert("RGB")
            if part == "panel":
                picture.thumbnail(_PANEL)
            else:
                picture = picture.quantize(256)  # enough for lines
            picture.save(path, optimize=True)


if __name__ == "__main__":
    main()
