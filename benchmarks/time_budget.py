"""Budgets in time: what `Measurement.time_fraction` tells beside what the clock says.

    python benchmarks/time_budget.py --trained runs/camvid_long

Made-up masks at several densities, and the trained networks of a recipe's folder on its validation
images. Deployed networks with and without gates take turns. Writes
benchmarks/results/time_budget.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pag_retrofit as pag
from pag_retrofit.building import evaluation_data
from pag_retrofit.checkpoints import write_json
from pag_retrofit.io import ModelSpec
from pag_retrofit.recipe import load_recipe
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results" / "time_budget.json"
CASES = (
    ("smp:Unet:resnet34", (1, 3, 384, 480)),
    ("smp:Unet:tu-mobilenetv2_100", (1, 3, 384, 480)),
    ("smp:DeepLabV3Plus:resnet50", (1, 3, 384, 480)),
    ("smp:FPN:tu-convnext_tiny", (1, 3, 384, 480)),
    ("timm:resnet50", (1, 3, 224, 224)),
    ("timm:mobilenetv2_100", (1, 3, 224, 224)),
    ("timm:efficientnet_b0", (1, 3, 224, 224)),
)
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.1)
IMAGES = 8


def _measured(gated: nn.Module, images: Sequence[Tensor]) -> tuple[float, float]:
    """Fractions of the compute and of the time, as `measure` tells them."""
    with pag.measure(gated) as measured:
        for image in images:
            gated(image)
    assert measured.time_fraction is not None
    return measured.fraction, measured.time_fraction


def _clocked(
    fast: nn.Module, plain: nn.Module, images: Sequence[Tensor], rounds: int
) -> dict[str, float]:
    """Median milliseconds of an image, and the median of the ratios of neighbouring calls."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        for image in images:
            pair = []
            for network in (fast, plain):
                begin = time.perf_counter()
                network(image)
                pair.append(1e3 * (time.perf_counter() - begin))
            if turn:  # the first one warms up
                times.append((pair[0], pair[1]))
    gated, dense = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    return {"gated": gated, "dense": dense, "clocked": ratio}


def _rows(
    gated: nn.Module, images: Sequence[Tensor], densities: Sequence[float | None], rounds: int
) -> Iterator[dict[str, Any]]:
    """One row per density of made-up masks; None for the gates' own."""
    pag.budget_in_time(gated, example_input=tuple(images[0].shape))
    fast, plain = pag.deploy(gated), pag.deploy(pag.remove(copy.deepcopy(gated)))
    laid_out = [image.contiguous(memory_format=torch.channels_last) for image in images]
    for density in densities:
        with contextlib.ExitStack() as masks:
            for network in (gated, fast) if density is not None else ():
                masks.enter_context(pag.override_gates(network, density))
            fraction, told = _measured(gated, images)
            times = _clocked(fast, plain, laid_out, rounds)
        row = {"density": density, "fraction": fraction, "told": told, **times}
        print(row, flush=True)
        yield row


def _trained(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """The gated networks of a recipe's folder."""
    for stage in sorted(folder.glob("gated-*")):
        data = evaluation_data(load_recipe(stage / "recipe.yaml"))
        images = [data[k * len(data) // IMAGES]["image"][None] for k in range(IMAGES)]
        images = [image for image in images if image.shape == images[0].shape]
        gated = pag.from_pretrained(stage)
        gated.pag_state.budget = 1.0  # only its time is of interest
        name = f"{folder.name}/{stage.name}"
        for row in _rows(gated, images, [None], max(1, rounds // 8)):
            yield {"network": name, "input": list(images[0].shape), **row}


@torch.no_grad()
def main() -> None:
    """Tell, clock, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--trained", type=Path, help="output folder of a recipe")
    parser.add_argument("--rounds", type=int, default=32, help="calls of each network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for model, shape in CASES:
        library, name, *encoder = model.split(":")
        options = {"encoder_name": encoder[0]} if encoder else {}
        network = ModelSpec(library=library, name=name, arguments=options).build().eval()
        gated = pag.retrofit(network, 1.0, example_input=shape, inplace=True)
        for row in _rows(gated, [torch.randn(shape)], DENSITIES, arguments.rounds):
            rows.append({"network": model, "input": list(shape), **row})
    if arguments.trained is not None:
        rows += _trained(arguments.trained, arguments.rounds)
    write_json(RESULTS, {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
