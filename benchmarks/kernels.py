"""Time of the native kernels per layer shape, against torch's own dense convolution (oneDNN).

    python benchmarks/kernels.py                 # all shapes, some minutes, one thread
    python benchmarks/kernels.py --only unet     # names that contain a word; nothing is written
    python benchmarks/kernels.py --results FILE  # of another machine

All variants of a shape run in one interleaved loop, so that a busy machine slows them alike. Dense
is the faster of contiguous and channels_last. The kernels compute as deployed networks do: in
digits, or by Winograd's algorithm where that is faster, and with large weights compressed.
Efficiency is (dense time / sparse time) * density: 1 where time falls as the number of pixels.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pag_retrofit import kernels
from pag_retrofit.checkpoints import write_json
from pag_retrofit.functional import Window, pattern_mask

RESULTS = Path(__file__).parent / "results" / "kernels.json"
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.1)
SHORTEST = 2e-3  # seconds of one timed sample: short calls are repeated
SAMPLES = 15


@dataclass(frozen=True)
class Shape:
    """A layer: channels, size of its input, square kernel."""

    name: str
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    groups: int = 1


SHAPES = (
    Shape("resnet50 stage 1, 3x3", 64, 64, 56, 56, 3),
    Shape("resnet50 stage 2, 3x3", 128, 128, 28, 28, 3),
    Shape("resnet50 stage 3, 3x3", 256, 256, 14, 14, 3),
    Shape("resnet50 stage 4, 3x3", 512, 512, 7, 7, 3),
    Shape("resnet50 stage 3, 3x3, 384x480", 256, 256, 24, 30, 3),
    Shape("resnet50 stage 4, 3x3, 384x480", 512, 512, 12, 15, 3),
    Shape("resnet50 stage 2, 3x3 stride 2", 128, 128, 56, 56, 3, 2),
    Shape("resnet50 stage 1, expand", 64, 256, 56, 56, 1),
    Shape("resnet50 stage 1, reduce", 256, 64, 56, 56, 1),
    Shape("resnet50 stage 3, expand", 256, 1024, 14, 14, 1),
    Shape("resnet50 stage 3, reduce", 1024, 256, 14, 14, 1),
    Shape("resnet50 stem, 7x7 stride 2", 3, 64, 224, 224, 7, 2),
    Shape("resnext50 stage 1, 3x3 in 32 groups", 128, 128, 56, 56, 3, 1, 32),
    Shape("resnext50 stage 3, 3x3 in 32 groups", 512, 512, 14, 14, 3, 1, 32),
    Shape("convnext_tiny stage 1, depthwise 7x7", 96, 96, 56, 56, 7, 1, 96),
    Shape("convnext_tiny stage 3, depthwise 7x7", 384, 384, 14, 14, 7, 1, 384),
    Shape("convnext_tiny stage 1, expand", 96, 384, 56, 56, 1),
    Shape("convnext_tiny stage 1, reduce", 384, 96, 56, 56, 1),
    Shape("convnext_tiny stage 3, expand", 384, 1536, 14, 14, 1),
    Shape("mobilenetv2 block 2, expand", 24, 144, 56, 56, 1),
    Shape("mobilenetv2 block 2, depthwise 3x3", 144, 144, 56, 56, 3, 1, 144),
    Shape("mobilenetv2 block 2, reduce", 144, 24, 56, 56, 1),
    Shape("mobilenetv2 block 14, depthwise 3x3", 960, 960, 7, 7, 3, 1, 960),
    Shape("unet decoder 1, 3x3", 768, 256, 24, 30, 3),
    Shape("unet decoder 2, 3x3", 384, 128, 48, 60, 3),
    Shape("unet decoder 3, 3x3", 192, 64, 96, 120, 3),
    Shape("unet decoder 4, 3x3", 128, 32, 192, 240, 3),
    Shape("unet decoder 4, second 3x3", 32, 32, 192, 240, 3),
    Shape("unet decoder 5, second 3x3", 16, 16, 384, 480, 3),
)


def variants(shape: Shape) -> tuple[dict[str, Callable[[], object]], int]:
    """Name -> what to time, and the FLOPs of the dense layer."""
    generator = torch.Generator().manual_seed(0)
    padding = shape.kernel // 2
    weight = torch.randn(
        shape.out_channels,
        shape.channels // shape.groups,
        shape.kernel,
        shape.kernel,
        generator=generator,
    )
    bias = torch.randn(shape.out_channels, generator=generator)
    x = torch.randn(1, shape.channels, shape.height, shape.width, generator=generator)
    last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    settings = (shape.stride, padding, 1, shape.groups)
    pair = [(n, n) for n in (shape.kernel, shape.stride, 1, padding)]
    window, rows = Window(*pair), last.permute(0, 2, 3, 1)
    dense = F.conv2d(last, weight_last, bias, *settings)
    pixels = dense.shape[2] * dense.shape[3]
    digits = kernels.prefers_digits(weight, shape.groups)
    winograd = not digits and kernels.prefers_winograd(weight, window, shape.groups, pixels)
    layer = kernels.PerforatedConvolution(
        weight, bias, window=window, groups=shape.groups, winograd=winograd, digits=digits,
        compressed=not digits and kernels.prefers_compressed(weight, shape.groups),
    )  # fmt: skip
    out = torch.empty_like(dense.permute(0, 2, 3, 1))
    size = (dense.shape[2], dense.shape[3])
    result: dict[str, Callable[[], object]] = {
        "dense contiguous": lambda: F.conv2d(x, weight, bias, *settings),
        "dense channels_last": lambda: F.conv2d(last, weight_last, bias, *settings),
        "all": recorded(lambda: layer(out, rows)),
    }
    for pattern in ("blobs", "random"):
        for density in DENSITIES:
            if density == 1 and pattern == "random":
                continue  # the same list
            listed = kernels.list_pixels(pattern_mask(pattern, density, (1, *size), 0))
            result[f"{pattern} {density}"] = recorded(
                lambda listed=listed: layer(out, rows, listed)
            )
    return result, 2 * dense.numel() * weight[0].numel()


def recorded(function: Callable[[], object]) -> Callable[[], object]:
    """The kernel calls of a function, made as deployed networks make them."""
    tape = kernels.Tape()
    with kernels.record_on(tape):
        function()
    return functools.partial(kernels.replay, tape)


def interleaved(functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds per call, `SAMPLES` of each function, taken in turns.

    One thread is timed by the processor time it got, so that other programs do not count.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, function in functions.items():
        function()
        start = clock()
        function()
        repeats[name] = max(1, round(SHORTEST / (clock() - start)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(SAMPLES):
        for name, function in functions.items():
            start = clock()
            for _ in range(repeats[name]):
                function()
            times[name].append((clock() - start) / repeats[name])
    return times


def measure(shape: Shape) -> dict[str, Any]:
    """Measure one shape: medians in ms, spread, GFLOP/s, efficiency."""
    functions, flops = variants(shape)
    times = interleaved(functions)
    middle = {name: statistics.median(samples) for name, samples in times.items()}
    dense = min(middle["dense contiguous"], middle["dense channels_last"])
    rows = {}
    for name, samples in times.items():
        word = name.split()[-1]
        density = float(word) if word[0].isdigit() else 1.0
        quartiles = statistics.quantiles(samples, n=4)
        rows[name] = {
            "ms": middle[name] * 1e3,
            "least_ms": min(samples) * 1e3,
            "interquartile_ms": (quartiles[2] - quartiles[0]) * 1e3,
            "gflops_per_second": flops * density / middle[name] / 1e9,
            "efficiency": dense / middle[name] * density,
        }
    return {"shape": asdict(shape), "mflops": flops / 1e6, "times": rows}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "instruction_set": kernels.instruction_set(),
        "threads": torch.get_num_threads(),
        "samples": SAMPLES,
        "commit": commit,
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure shapes whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of another machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with torch.inference_mode():
        for shape in SHAPES:
            if arguments.only not in shape.name:
                continue
            results.append(measure(shape))
            times = results[-1]["times"]
            columns = [f"{key} {row['efficiency']:.2f}" for key, row in times.items()]
            speed = max(times[key]["gflops_per_second"] for key in list(times)[:2])
            print(f"{shape.name}: dense {speed:.0f} GFLOP/s; " + ", ".join(columns[2:]), flush=True)
    if not arguments.only:
        write_json(arguments.results, {"machine": machine(), "layers": results})


if __name__ == "__main__":
    main()
