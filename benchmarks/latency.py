"""Times deployed networks beside every dense runtime, and draws what came of it: `make latency`.

    python benchmarks/latency.py                     # all that is not in the results yet
    python benchmarks/latency.py --only Unet --redo
    python benchmarks/latency.py --trained runs/camvid_mobilenetv2   # also with trained gates
    python benchmarks/latency.py --results benchmarks/results/latency_xeon.json   # another machine

Each network is timed in a process of its own, by `pag-retrofit benchmark latency`. Writes
benchmarks/results/latency.json after each, and draws docs/images/latency.png of that at the end.
Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pag_retrofit import from_pretrained
from pag_retrofit.building import evaluation_data
from pag_retrofit.checkpoints import write_json
from pag_retrofit.latency import compare_latency
from pag_retrofit.pictures import latency_chart, save_figure
from pag_retrofit.recipe import load_recipe
from pag_retrofit.stages import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
SHOWN = 20
"""Validation image that trained networks are timed on."""
PICTURE = ROOT / "docs" / "images" / "latency.png"


@dataclass(frozen=True)
class Case:
    """A network, its input, and the threads of every runtime."""

    model: str
    input: str
    threads: int = 1
    pattern: str = "blobs"

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"{self.model} {self.input} threads={self.threads} {self.pattern}"


CASES = (
    Case("smp:Unet:resnet34", "1x3x384x480"),
    Case("timm:resnet50", "1x3x224x224"),
    Case("timm:convnext_tiny", "1x3x224x224"),
    Case("timm:mobilenetv2_100", "1x3x224x224"),
    Case("smp:Unet:tu-mobilenetv2_100", "1x3x384x480"),
    Case("smp:DeepLabV3Plus:resnet50", "1x3x384x480"),
    Case("smp:FPN:tu-convnext_tiny", "1x3x384x480"),
    Case("smp:UPerNet:tu-convnext_tiny", "1x3x384x480"),
    Case("timm:efficientnet_b0", "1x3x224x224"),
    Case("timm:resnet50", "1x3x512x512"),
    Case("timm:resnext50_32x4d", "1x3x224x224"),
    Case("timm:resnet50", "8x3x224x224"),
    Case("timm:convnext_tiny", "8x3x224x224"),
    Case("timm:mobilenetv2_100", "8x3x224x224"),
    Case("smp:Unet:resnet34", "1x3x384x480", pattern="random"),
    Case("smp:Unet:resnet34", "1x3x384x480", threads=2),
    Case("timm:resnet50", "1x3x224x224", threads=2),
    Case("smp:Unet:resnet34", "1x3x256x256"),
    Case("smp:Unet:resnet34", "1x3x512x512"),
    Case("smp:Unet:resnet34", "1x3x1024x1024"),
)


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """One run of the command.

    Raises:
        SystemExit: It failed.
    """
    command = [
        *(sys.executable, "-m", "pag_retrofit", "benchmark", "latency", "--json"),
        *("--model", case.model, "--input", case.input, "--threads", str(case.threads)),
        *("--pattern", case.pattern, "--rounds", str(rounds)),
    ]
    own = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return {**measured, "pattern": case.pattern, "model": case.model}


def measure_trained(run: Path, rounds: int) -> dict[str, Any]:
    """Networks of a run of a recipe, with their own gates, on one of its validation images."""
    measured = {}
    for folder in sorted(config.parent for config in run.glob("gated-*/config.json")):
        image = evaluation_data(load_recipe(folder / "recipe.yaml"))[SHOWN]["image"]
        compared = compare_latency(
            from_pretrained(folder), image[None], densities=(), threads=1, rounds=rounds
        )
        measured[folder.name] = compared.to_dict()
    return measured


def draw(results: dict[str, Any]) -> None:
    """Speed-up against compute fraction, one line per network."""
    lines = {}
    for case in CASES:
        run = results["runs"].get(case.name)
        if run is None or case.threads > 1 or case.pattern != "blobs":
            continue
        label = f"{case.model.partition(':')[2]}, {case.input.removeprefix('1x3x')}"
        lines[label] = [
            (variant["fraction"], variant["speed_up"])
            for variant in run["variants"]
            if variant["name"].startswith("deployed blobs")
        ]
    if lines:
        figure = latency_chart(lines, title="Speed-up over the fastest dense runtime, one thread")
        save_figure(figure, PICTURE)
        Image.open(PICTURE).convert("RGB").quantize(256).save(PICTURE, optimize=True)


def main() -> None:
    """Measure, write after each network, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--redo", action="store_true", help="also what is in the results")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of another machine")
    parser.add_argument("--trained", type=Path, help="output folder of a recipe's run")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"runs": {}}
    if arguments.results.is_file():
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    for case in CASES:
        if arguments.only not in case.name or (case.name in results["runs"] and not arguments.redo):
            continue
        print(case.name, flush=True)
        results["environment"] = environment()
        run = measure_case(case, arguments.rounds)
        results["runs"][case.name] = {**run, "environment": results["environment"]}
        write_json(arguments.results, results)
    if arguments.trained:
        results["trained"] = measure_trained(arguments.trained, arguments.rounds)
        write_json(arguments.results, results)
    if arguments.results == RESULTS:
        draw(results)


if __name__ == "__main__":
    main()
