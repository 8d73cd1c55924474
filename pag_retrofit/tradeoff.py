"""Quality against compute and against time: PAG and its baselines, over budgets and seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor, nn

from pag_retrofit.building import build_task, evaluation_data
from pag_retrofit.calibration import set_budget
from pag_retrofit.checkpoints import write_json
from pag_retrofit.errors import RecipeError
from pag_retrofit.evaluation import load_network
from pag_retrofit.io import WEIGHTS_NAME
from pag_retrofit.latency import time_networks
from pag_retrofit.pictures import save_figure, tradeoff_chart
from pag_retrofit.recipe import Recipe
from pag_retrofit.resizing import ResizedInput, resize_input
from pag_retrofit.stages import environment, finetune, plan_stages

NAMES = {
    "gated": "PAG",
    "timed": "PAG, budget in time",
    "combined": "PAG on a smaller input",
    "dial": "PAG, one network",
    "layer": "whole layers, per image",
    "random": "random perforation",
    "grid": "grid perforation",
    "truncation": "truncation",
    "resizing": "smaller input",
}
"""Stage -> name in charts; `timed` is a gated stage whose budget is in time."""
_METRICS = {
    "miou": "mIoU",
    "ods": "F measure (ODS)",
    "abs_rel": "relative error (lower is better)",
    "mean": "mean angle in degrees (lower is better)",
}
_IMAGES = 8
"""Validation images that networks are timed on."""


@dataclass(frozen=True)
class Point:
    """One trained network.

    Args:
        stage: Its name, such as `gated-0.50`.
        kind: `dense`, `reference`, or a stage of `NAMES`.
        seed: Of its training.
        budget: Asked for; None for dense networks.
        fraction: Measured compute fraction.
        metric: By which networks are compared.
        times: Runtime -> median milliseconds of one image; empty if they were not measured.
    """

    stage: str
    kind: str
    seed: int
    budget: float | None
    fraction: float
    metric: float
    times: dict[str, float] = field(default_factory=dict)

    @property
    def milliseconds(self) -> float | None:
        """Of the fastest runtime."""
        return min(self.times.values(), default=None)


def run_tradeoff(
    recipe: Recipe, seeds: Sequence[int], *, threads: int = 1, rounds: int = 16, timed: bool = True
) -> dict[str, Any]:
    """Run the stages of a recipe with several seeds, time the networks, and draw the curves.

    The first seed's results lie in the recipe's folder, those of others in `seed-N` beneath it.
    All start from the first one's dense network. What is complete is not run again. Writes
    `tradeoff.json`, `tradeoff_compute.png` and `tradeoff_latency.png`.

    Args:
        recipe: List baselines in its stages.
        seeds: At least one.
        threads: Of the timed networks.
        rounds: How often each is called.
        timed: Measure times, of the first seed's networks.

    Returns:
        The content of `tradeoff.json`.

    Raises:
        RecipeError: A stage cannot be run, or none has a budget.
    """
    if not NAMES.keys() & set(recipe.stages):
        expected = ", ".join(name for name in NAMES if name != "timed")
        raise RecipeError(
            f"stages={list(recipe.stages)}: nothing that has a budget; expected one or more of "
            f"{expected} (`pag-retrofit finetune` trains dense networks alone)"
        )
    points: list[Point] = []
    for seed in seeds:
        points += _points(_with_seed(recipe, seed, seeds[0]), seed)
    if timed:
        points = with_times(points, recipe, seeds[0], threads, rounds)
    metric = build_task(recipe, evaluation_data(recipe)).metric
    results = {
        "metric": metric,
        "seeds": list(seeds),
        "threads": threads,
        "points": [asdict(point) for point in points],
        "environment": environment(),
    }
    write_json(recipe.output / "tradeoff.json", results)
    for name, figure in charts(points, metric, recipe.name).items():
        save_figure(figure, recipe.output / f"tradeoff_{name}.png")
    return results


def charts(points: Sequence[Point], metric: str, title: str) -> dict[str, Figure]:
    """The curves: `compute`, and `latency` if times were measured; means over seeds."""
    reference = _mean(points, "reference") or _mean(points, "dense")
    lines = {"dense": reference} if reference is not None else {}
    metric = _METRICS.get(metric, metric)
    figures = {
        "compute": tradeoff_chart(
            _series([(p, p.fraction) for p in points]), lines, metric=metric, title=title
        )
    }
    dense = [p.milliseconds for p in points if p.kind == "dense" and p.milliseconds]
    if dense:
        timed = {(p.kind, p.stage): p.milliseconds for p in points if p.milliseconds}
        places = [(p, timed.get((p.kind, p.stage))) for p in points]  # of one seed, for all
        times = [(p, place / dense[0]) for p, place in places if place]
        figures["latency"] = tradeoff_chart(
            _series(times),
            lines,
            metric=metric,
            title=title,
            axis="measured time (% of the dense network's)",
        )
    return figures


def _series(places: Sequence[tuple[Point, float]]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (place, metric) of each budget, means over seeds."""
    by_stage: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for point, place in places:
        if point.kind in NAMES:
            by_stage[point.kind, point.stage].append((place, point.metric))
    series: dict[str, list[tuple[float, float]]] = {NAMES[kind]: [] for kind, _ in by_stage}
    for (kind, _), found in by_stage.items():
        mean = tuple(statistics.mean(values) for values in zip(*found, strict=True))
        series[NAMES[kind]].append((mean[0], mean[1]))
    return {name: sorted(found) for name, found in series.items()}


def _mean(points: Sequence[Point], kind: str) -> float | None:
    found = [point.metric for point in points if point.kind == kind]
    return statistics.mean(found) if found else None


def _with_seed(recipe: Recipe, seed: int, first: int) -> Recipe:
    if seed == first:
        return recipe.model_copy(update={"seed": seed})
    checkpoint = recipe.output / "dense" / WEIGHTS_NAME
    update: dict[str, Any] = {
        "seed": seed,
        "output": recipe.output / f"seed-{seed}",
        "stages": tuple(stage for stage in recipe.stages if stage != "dense"),
    }
    if "dense" in recipe.stages or recipe.model.checkpoint is None:
        update["model"] = recipe.model.model_copy(update={"checkpoint": checkpoint})
    return recipe.model_copy(update=update)


def is_timed(kind: str, recipe: Recipe) -> bool:
    """Whether a stage's gates were trained to a budget in time."""
    return kind == "gated" and recipe.gated is not None and recipe.gated.budget_in == "time"


def _points(recipe: Recipe, seed: int) -> list[Point]:
    """Run a recipe and read what came out."""
    points = []
    stages = {stage.name: stage for stage in plan_stages(recipe)}
    for name, metrics in finetune(recipe).items():
        stage, final = stages[name], metrics["final"]
        kind = stage.kind if stage.budget is not None else name
        kind = "timed" if is_timed(kind, recipe) else kind
        scores = {None: final} if kind != "dial" else metrics["operating_points"]
        for budget, found in scores.items():
            points.append(
                Point(
                    name if budget is None else f"{name}@{budget}",
                    kind,
                    seed,
                    stage.budget if budget is None else float(budget),
                    found["fraction"],
                    found[metrics["metric"]],
                )
            )
    return points


def with_times(
    points: Sequence[Point], recipe: Recipe, seed: int, threads: int, rounds: int
) -> list[Point]:
    """Points with the times of the first seed's networks; averages of branches are left out."""
    data = evaluation_data(recipe)
    chosen = [data[k * len(data) // _IMAGES]["image"][None] for k in range(_IMAGES)]
    shape = max((image.shape for image in chosen), key=[i.shape for i in chosen].count)
    images = [image for image in chosen if image.shape == shape]  # some data sets have two
    networks = {
        point.stage: _load(point, recipe, images)
        for point in points
        if point.seed == seed and point.kind in ("dense", *NAMES)
    }
    times = time_networks(networks, images, threads=threads, rounds=rounds)
    timed = []
    for point in points:
        if point.seed == seed and point.stage in times:
            point = replace(point, times=times[point.stage])
        timed.append(point)
    return timed


def _load(point: Point, recipe: Recipe, images: Sequence[Tensor]) -> nn.Module:
    network = load_network(recipe.output / point.stage.partition("@")[0], recipe.model).eval()
    if point.kind == "resizing" and not isinstance(network, ResizedInput):  # of earlier releases
        assert point.budget is not None
        return resize_input(network, point.budget, example_input=tuple(images[0].shape))
    if point.kind == "dial":
        assert point.budget is not None
        set_budget(network, point.budget)
    return network
