"""Peak memory of one forward pass: a deployed network beside the dense one it was made from.

    python benchmarks/memory.py

Each in a process of its own, after two passes to warm up: what the process holds for the network,
and the most it held during a third pass (Linux). What libraries load when the first network is
built, exported and run is the same for all, and not counted: a tiny network goes before.
Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pag_retrofit import deploy, override_gates, retrofit
from pag_retrofit.checkpoints import write_json
from pag_retrofit.io import ModelSpec
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
CASES = (
    ("smp:Unet:resnet34", (1, 3, 384, 480)),
    ("smp:Unet:resnet34", (1, 3, 1024, 1024)),
    ("smp:Unet:tu-mobilenetv2_100", (1, 3, 384, 480)),
    ("smp:DeepLabV3Plus:resnet50", (1, 3, 384, 480)),
    ("timm:resnet50", (1, 3, 224, 224)),
    ("timm:convnext_tiny", (1, 3, 224, 224)),
)
VARIANTS = ("dense", "deployed 1.0", "deployed 0.5")


def resident(field: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Start counting the peak anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@torch.no_grad()
def load_libraries() -> None:
    """Build, run, gate, deploy and forget a tiny network."""
    network = ModelSpec(library="timm", name="test_resnet").build().eval()
    x = torch.zeros(1, 3, 64, 64)
    network(x)
    deploy(retrofit(network, 1.0, example_input=tuple(x.shape), inplace=True).eval())(x)
    del network
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


@torch.no_grad()
def measure(model: str, shape: tuple[int, ...], variant: str) -> dict[str, float]:
    """Megabytes of this process, before the network was built and around a pass."""
    torch.set_num_threads(1)
    load_libraries()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    empty = resident("VmRSS")
    library, architecture, *encoder = model.split(":")
    options = {"encoder_name": encoder[0]} if encoder else {}
    network = ModelSpec(library=library, name=architecture, arguments=options).build().eval()
    kind, _, density = variant.partition(" ")
    if kind == "deployed":
        network = deploy(retrofit(network, 1.0, example_input=shape, inplace=True).eval())
    else:
        network = network.to(memory_format=torch.channels_last)
    masks = override_gates(network, float(density)) if density else contextlib.nullcontext()
    with masks:
        for _ in range(2):
            network(x)
        gc.collect()
        forget_peak()
        network(x)
    return {
        "before": empty,
        "held": resident("VmRSS") - empty,
        "peak": resident("VmHWM") - empty,
    }


def main() -> None:
    """Measure all cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("CASE", "VARIANT"), help="used by this script")
    arguments = parser.parse_args()
    if arguments.one:
        case, variant = arguments.one
        print(json.dumps(measure(*CASES[int(case)], variant)))
        return
    runs: list[dict[str, Any]] = []
    for index, (model, shape) in enumerate(CASES):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--one", str(index), variant]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            runs.append({"model": model, "input": list(shape), "variant": variant, **measured})
            print(runs[-1], flush=True)
    write_json(RESULTS, {"runs": runs, "environment": environment()})


if __name__ == "__main__":
    main()
