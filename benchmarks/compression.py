"""Deployed networks with weights as whole numbers, and with all in float32, side by side.

    python benchmarks/compression.py

Whole numbers are compressed ones, or with AMX digits. Both of a network are called in turn, in one
process per instruction set, with the same made-up masks; and how far their outputs are from those
of the masked network in float64. Writes benchmarks/results/compression.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pag_retrofit import deploy, kernels, override_gates, retrofit
from pag_retrofit.checkpoints import write_json
from pag_retrofit.io import ModelSpec
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results" / "compression.json"
CASES = (
    ("timm:resnet50", (1, 3, 224, 224)),
    ("timm:convnext_tiny", (1, 3, 224, 224)),
    ("timm:mobilenetv2_100", (1, 3, 224, 224)),
    ("smp:Unet:resnet34", (1, 3, 384, 480)),
)
DENSITIES = (1.0, 0.5, 0.3, 0.1)
INSTRUCTION_SETS = ("amx", "avx512", "avx2")
ROUNDS, CALLS = 7, 3


def error(output: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest output."""
    return float((output - exact).abs().max() / exact.abs().max())


@torch.no_grad()
def measure(model: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Milliseconds and errors of a network, both ways, at each density."""
    library, architecture, *encoder = model.split(":")
    options = {"encoder_name": encoder[0]} if encoder else {}
    network = ModelSpec(library=library, name=architecture, arguments=options).build().eval()
    gated = retrofit(network, 1.0, example_input=shape, inplace=True).eval()
    exact = copy.deepcopy(gated).double()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    compressed, plain = deploy(gated), deploy(gated)
    compressed(x)
    never = {"return_value": False}
    with (
        mock.patch.object(kernels, "prefers_compressed", **never),
        mock.patch.object(kernels, "prefers_digits", **never),
    ):
        plain(x)
    ways: dict[str, nn.Module] = {"compressed": compressed, "float32": plain}
    rows = {}
    for density in DENSITIES:
        row = {}
        with override_gates(exact, density):
            expected = exact(x.double())
        for name, way in ways.items():
            with override_gates(way, density):
                row[f"{name}_error"] = error(way(x), expected)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                with override_gates(way, density):
                    times[name].append(turn(way, x))
        rows[f"{density:g}"] = row | {name: statistics.median(t) for name, t in times.items()}
    return {"model": model, "input": list(shape), "densities": rows}


def turn(network: nn.Module, x: Tensor) -> float:
    """Milliseconds of a call, the median of some; the first does not count."""
    network(x)
    taken = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        network(x)
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


def main() -> None:
    """Measure all cases on each instruction set, in a process of its own."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="this process, printed")
    if parser.parse_args().json:
        torch.set_num_threads(1)
        print(json.dumps([measure(model, shape) for model, shape in CASES]))
        return
    runs = {}
    for name in INSTRUCTION_SETS:
        own = {**os.environ, "OMP_NUM_THREADS": "1", "PAG_RETROFIT_INSTRUCTION_SET": name}
        command = [sys.executable, __file__, "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=own)
        runs[name] = json.loads(done.stdout)
    write_json(RESULTS, {"runs": runs, "environment": environment()})


if __name__ == "__main__":
    main()
