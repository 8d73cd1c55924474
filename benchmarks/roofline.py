"""Where the time of a deployed network goes, call by call, against what the core can do.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --results FILE  # of another machine

For each kind of kernel call, its time; for the convolutions also what they would take at the
least: each the larger of its multiply-accumulates (where Winograd's algorithm is used, those of the
parts that the listed pixels of its tiles are made of) at the rate of the best convolution, and what
it must read and write once (weights, input rows, output rows) at the rate of reading memory. One
thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pag_retrofit import deploy, override_gates, retrofit
from pag_retrofit.checkpoints import write_json
from pag_retrofit.io import ModelSpec
from pag_retrofit.kernels.arguments import ConvolutionArguments
from pag_retrofit.kernels.packing import STRIDED_SIDE
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results" / "roofline.json"
CASES = (
    ("smp:Unet:resnet34", (1, 3, 384, 480)),
    ("timm:resnet50", (1, 3, 224, 224)),
    ("timm:resnet50", (1, 3, 512, 512)),
    ("timm:convnext_tiny", (1, 3, 224, 224)),
    ("smp:DeepLabV3Plus:resnet50", (1, 3, 384, 480)),
    ("timm:mobilenetv2_100", (1, 3, 224, 224)),
    ("smp:Unet:tu-mobilenetv2_100", (1, 3, 384, 480)),
    ("smp:FPN:tu-convnext_tiny", (1, 3, 384, 480)),
)
DENSITIES = (1.0, 0.1)
PASSES = 9
SLOWEST = 8
REPEATED = 2  # row and column of the parts that are zero where the input is read upsampled


def reading(threads: int) -> float:
    """Bytes per second that so many threads together read in order from memory."""
    torch.set_num_threads(threads)
    x = torch.ones(1 << 26)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(1)
    return 4 * x.numel() / min(times)


def facts(call: ConvolutionArguments) -> dict[str, Any]:
    """Shape, multiply-accumulates and least bytes of a convolution."""
    pixels = call.out.shape[:3].numel() if call.length is None else int(call.length)
    channels = sum(source.shape[3] for source in call.sources)
    out_channels, (kernel, _, stride, *_) = call.out.shape[3], call.window
    inputs = sum(source.numel() for source in call.sources)
    dense = call.out.shape[:3].numel()
    floats = pixels * out_channels + min(inputs * pixels / dense, inputs)
    groups = f" in {call.groups} groups" if call.groups > 1 else ""
    return {
        "layer": f"{channels} to {out_channels}, {kernel}x{kernel}, stride {stride}{groups}, "
        f"{call.out.shape[1]}x{call.out.shape[2]}",
        "pixels": pixels,
        "macs": multiplications(call) * out_channels // call.groups,
        "bytes": call.weights.nbytes + 4 * floats,
    }


def multiplications(call: ConvolutionArguments) -> int:
    """Of all its listed pixels together, for one output channel and one group."""
    channels = sum(source.shape[3] for source in call.sources)
    if not call.winograd:
        pixels = call.out.shape[:3].numel() if call.length is None else int(call.length)
        return pixels * call.window[0] * call.window[1] * channels
    if call.strided:
        corners = listed_corners(call)
        parts = torch.tensor([0, 7, STRIDED_SIDE])  # along an axis: of no pixel, of one and of both
        down, across = (parts[corners.any(axis).sum(1)] for axis in (2, 1))
        return int((down * across).sum()) * channels
    upsampled = itertools.takewhile(
        lambda pair: pair[1] > 1, zip(call.sources, call.upsampling, strict=True)
    )
    repeating = sum(source.shape[3] for source, _ in upsampled)
    needed = needed_parts(listed_corners(call))
    repeated = torch.arange(4) == REPEATED
    left_out = needed[:, repeated[:, None] | repeated].sum()
    return int(needed.sum()) * channels - int(left_out) * repeating


def listed_corners(call: ConvolutionArguments) -> torch.Tensor:
    """Which pixels of its tiles of 2x2 a convolution computes: bool (tiles, 2, 2)."""
    batch, height, width = call.out.shape[:3]
    listed = torch.ones(batch * height * width, dtype=torch.bool)
    if call.pixels is not None and call.length is not None:
        listed[:] = False
        listed[call.pixels[: int(call.length)].long()] = True
    down, across = call.window[4], call.window[5]  # pixels of a tile lie as far apart as the taps
    beyond = (-width % (2 * across), -height % (2 * down))
    mask = F.pad(listed.view(batch, height, width), (0, beyond[0], 0, beyond[1]))
    mask = mask.view(batch, -1, 2, down, mask.shape[2] // (2 * across), 2, across)
    return mask.permute(0, 1, 3, 4, 6, 2, 5).flatten(0, 4)


def needed_parts(corners: torch.Tensor) -> torch.Tensor:
    """Which of 16 parts tiles are made of, bool (tiles, 4, 4): three by three for each corner."""
    parts = corners.new_zeros(len(corners), 4, 4)
    for i, j in itertools.product(range(2), repeat=2):
        parts[:, i : i + 3, j : j + 3] |= corners[:, i, j, None, None]
    return parts


@torch.no_grad()
def profile(model: str, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """A network's profile at each density."""
    library, architecture, *encoder = model.split(":")
    options = {"encoder_name": encoder[0]} if encoder else {}
    network = ModelSpec(library=library, name=architecture, arguments=options).build().eval()
    deployed = deploy(retrofit(network, 1.0, example_input=shape, inplace=True).eval())
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    result = []
    for density in DENSITIES:
        with override_gates(deployed, density):
            passes = [deployed.profile(x) for _ in range(PASSES)]
        seconds = [statistics.median(times) for times in zip(*map(_times, passes), strict=True)]
        kinds: dict[str, float] = defaultdict(float)
        layers = []
        for (kind, kept, _), taken in zip(passes[-1], seconds, strict=True):
            kinds[kind] += taken
            if kind == "convolution":
                layers.append({**facts(kept[0]), "seconds": taken})
        layers.sort(key=lambda layer: -layer["seconds"])
        result.append(
            {
                "model": model,
                "input": list(shape),
                "density": density,
                "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
                "layers": layers,
            }
        )
    return result


def _times(calls: list[tuple[str, tuple[Any, ...], float]]) -> list[float]:
    return [seconds for _, _, seconds in calls]


def main() -> None:
    """Profile all cases, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    results: Path = parser.parse_args().results
    torch.set_num_threads(1)
    runs = [run for model, shape in CASES for run in profile(model, shape)]
    rates = [
        layer["macs"] / layer["seconds"] for run in runs for layer in run["layers"] if layer["macs"]
    ]
    limits = {
        "macs_per_second": max(rates),
        "bytes_per_second": reading(1),
        "bytes_per_second_of_two": reading(2),
    }
    for run in runs:
        least = [
            (layer["macs"] / limits["macs_per_second"], layer["bytes"] / limits["bytes_per_second"])
            for layer in run["layers"]
        ]
        run["least_by_compute"], run["least_by_memory"] = map(sum, zip(*least, strict=True))
        run["least"] = sum(map(max, least))
        run["layers"] = run["layers"][:SLOWEST]
    write_json(results, {"limits": limits, "runs": runs, "environment": environment()})


if __name__ == "__main__":
    main()
