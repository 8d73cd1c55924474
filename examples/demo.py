"""The whole path in minutes: train, retrofit, anneal to a budget, save, load, look.

What `make demo` runs, on rendered scenes, without any download. It trains a small U-Net (dense),
trains it on for as long as the gated one will be (reference: the fair comparison), gates the dense
one and fine-tunes it to 70 % of the compute. Run again, it goes on where it was interrupted.

    python examples/demo.py
    python examples/demo.py gated.budgets=[0.7,0.5]     # adds a budget, trains only that
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pag_retrofit as pag
from pag_retrofit.building import evaluation_data
from pag_retrofit.latency import compare_latency
from pag_retrofit.pictures import (
    open_rates_chart,
    prediction_panel,
    relative_compute_map,
    save_figure,
)
from pag_retrofit.recipe import Recipe, load_recipe
from pag_retrofit.stages import finetune, plan_stages

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "scenes_quick.yaml"
SHOWN = 3
"""Validation scenes in the pictures."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="runs/demo", help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="values over the recipe: gated.budgets=[0.5]")
    options = parser.parse_args(arguments)
    recipe = load_recipe(RECIPE, ["name=demo", f"output={options.output}", *options.overrides])
    if set(recipe.stages) != {"dense", "reference", "gated"}:
        parser.error("the demo compares the stages dense, reference and gated: keep all three")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pag_retrofit").setLevel(logging.INFO)
    console = Console()
    console.rule("training: dense, reference, gated")
    results = finetune(recipe)
    gated_stage = plan_stages(recipe)[-1]
    gated = pag.from_pretrained(gated_stage.folder)

    console.rule("saving and loading")
    file = recipe.output / "gated.safetensors"
    save_and_compare(gated, recipe, file)
    size = file.stat().st_size / 1e6
    console.print(f"{file} ({size:.1f} MB): loaded, outputs are bit-identical", soft_wrap=True)

    console.rule("results on scenes that were not trained on")
    console.print(results_table(results))
    console.print(clock_table(gated, recipe))
    pictures = draw(gated, recipe, results[gated_stage.name])
    for picture in pictures:
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(next_steps(options.output), soft_wrap=True, highlight=False, markup=False)


def save_and_compare(gated: nn.Module, recipe: Recipe, file: Path) -> None:
    """Write one safetensors file, load it, and compare the outputs.

    Raises:
        RuntimeError: They differ in any bit.
    """
    pag.save_file(gated, file)
    image = evaluation_data(recipe)[0]["image"][None]
    with torch.no_grad():
        if not torch.equal(pag.load_file(file)(image), gated(image)):
            raise RuntimeError(f"{file}: the loaded network gives other outputs than the saved one")


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """A row per network; change is against the dense one that was trained equally long."""
    table = Table("network", "mIoU", "change", "compute", "training")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"dense": "dense", "reference": "dense, trained equally long"}
    reference = results["reference"]["final"]["miou"]
    for name, metrics in results.items():
        final = metrics["final"]
        table.add_row(
            names.get(name, f"gated, budget {metrics['budget']}"),
            f"{final['miou']:.3f}",
            "" if name in names else f"{final['miou'] - reference:+.3f}",
            f"{final['fraction']:.1%}",
            f"{metrics['seconds']:.0f} s",
        )
    return table


def clock_table(gated: nn.Module, recipe: Recipe) -> Table:
    """What a scene takes on this machine, dense and deployed, one thread."""
    image = evaluation_data(recipe)[0]["image"][None]
    compared = compare_latency(
        gated, image, densities=(), runtimes=("eager", "channels_last"), backend="auto"
    )
    table = Table("on one thread", "milliseconds", "compute")
    for variant in compared.variants:
        table.add_row(variant.name, f"{variant.milliseconds:.2f}", f"{variant.fraction:.1%}")
    return table


def draw(gated: nn.Module, recipe: Recipe, metrics: dict[str, Any]) -> list[Path]:
    """Save what the gated network sees on some scenes, and how open each of its sites is."""
    data = evaluation_data(recipe)
    scenes = [data[index] for index in range(min(SHOWN, len(data)))]
    images = torch.stack([scene["image"] for scene in scenes])
    with torch.no_grad(), pag.measure(gated) as measured:
        predictions = gated(images).argmax(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    panel = prediction_panel(
        images * std + mean,
        torch.stack([scene["label"] for scene in scenes]),
        predictions,
        relative_compute_map(measured),
        palette=data.palette,
        classes=data.classes,
        title=f"Gated to {metrics['budget']:.0%} of the compute",
    )
    plan = pag.plan(pag.remove(gated), metrics["budget"], example_input=tuple(images[:1].shape))
    chart = open_rates_chart(
        metrics["final"]["open_rates"],
        {site.name: site.macs / plan.total_macs for site in plan.sites},
        title=f"Which layers stay open at {metrics['budget']:.0%} of the compute",
    )
    folder = recipe.output
    pictures = {folder / "panel.png": panel, folder / "open_rates.png": chart}
    for path, figure in pictures.items():
        save_figure(figure, path)
    return list(pictures)


def next_steps(output: str) -> str:
    """What to try after the demo."""
    python = os.path.relpath(sys.executable)
    return f"""
What next:
  another budget      {python} examples/demo.py --output {output} gated.budgets=[0.7,0.5]
  better networks     {python} examples/demo.py --output runs/longer dense.epochs=80 gated.epochs=40
  your network        {python} examples/retrofit_smp.py, examples/custom_model.py
  your training loop  {python} examples/own_training_loop.py
  curves              {python} -m tensorboard.main --logdir {output}"""


if __name__ == "__main__":
    main()
