"""Latency of a deployed network and of every dense runtime at hand, side by side in one run.

All variants are called in turn, round after round, so that a busy machine slows them alike. In its
turn a variant is called several times and the first call does not count: it brings weights back
into the caches, from which the others have pushed them. Dense runtimes get the original network
with the same weights. Under made-up masks the gates decide all the same; putting masks on is not
timed.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pag_retrofit.deployment import deploy
from pag_retrofit.errors import PagError
from pag_retrofit.measurement import measure, override_gates
from pag_retrofit.surgery import remove
from pag_retrofit.tracing import in_mode

OWN_GATES = "gates"
"""Name of the masks that the network's own gates make."""
_TOLERANCE = 1e-3
_TURN, _MOST_CALLS = 30.0, 7
"""A turn of a variant ends after so many milliseconds, or calls."""

Run = Callable[[], Any]


class _Variant(NamedTuple):
    """What is timed.

    Args:
        run: The call.
        masks: What it is called in.
    """

    run: Run
    masks: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Latency:
    """What a variant took.

    Args:
        name: Runtime, or `"deployed"` and its masks; with its own gates also `"masked"`, the gated
            network that computes all and masks, and `"reference"`, deployed in plain torch.
        dense: Whether it is a runtime of the original network.
        milliseconds: Median.
        low: First decile, milliseconds.
        high: Last decile, milliseconds.
        fraction: Compute fraction, 1 for a dense runtime.
        error: Largest difference from the gated (dense: from the original) network, relative to
            the largest output.
    """

    name: str
    dense: bool
    milliseconds: float
    low: float
    high: float
    fraction: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """All variants of one run.

    Args:
        variants: In the order they were called.
        left_out: Runtime -> why it is missing.
        threads: Of every variant.
        rounds: How often each had its turn.
        input: Its shape.
    """

    variants: tuple[Latency, ...]
    left_out: Mapping[str, str]
    threads: int
    rounds: int
    input: tuple[int, ...]

    @property
    def best_dense(self) -> Latency:
        """The fastest runtime of the original network."""
        return min((v for v in self.variants if v.dense), key=lambda v: v.milliseconds)

    def speed_up(self, variant: Latency) -> float:
        """Over the best dense runtime."""
        return self.best_dense.milliseconds / variant.milliseconds

    def efficiency(self, variant: Latency) -> float:
        """1 where time is exactly proportional to compute."""
        return self.speed_up(variant) * variant.fraction

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "input": list(self.input),
            "threads": self.threads,
            "rounds": self.rounds,
            "left_out": dict(self.left_out),
            "variants": [
                {
                    **asdict(variant),
                    "speed_up": self.speed_up(variant),
                    "efficiency": self.efficiency(variant),
                }
                for variant in self.variants
            ],
        }


@torch.no_grad()
def compare_latency(
    gated: nn.Module,
    x: Tensor,
    *,
    densities: Sequence[float] = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1),
    pattern: str = "blobs",
    runtimes: Sequence[str] = ("eager", "channels_last", "compile", "onnxruntime", "openvino"),
    backend: str = "cpu",
    threads: int = 1,
    rounds: int = 20,
    seconds: float = 120.0,
) -> Comparison:
    """Time a gated network, deployed, against dense runtimes of the network it was made from.

    Args:
        gated: A gated network; timed with its own gates and with made-up masks.
        x: Its input, (B, C, H, W).
        densities: Of the made-up masks.
        pattern: Of the made-up masks; see `override_gates`.
        runtimes: Dense ones; those that are not installed are left out.
        backend: Of `deploy`.
        threads: Of every variant.
        rounds: How often each variant has its turn, at most; two or more.
        seconds: Time for all rounds together, of which there are three at least.

    Raises:
        PagError: A runtime is unknown, none runs here, or an argument does not fit the network.
    """
    if rounds < 2:
        raise PagError(f"rounds={rounds!r}: expected two or more, whose spread can be told")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with in_mode(gated):
            original = remove(copy.deepcopy(gated)).eval()
            dense, left_out = _dense_runs(original, x, runtimes, threads)
            if not dense:
                raise PagError(
                    f"runtimes={list(runtimes)}: expected at least one that runs here, to compare "
                    f"with; left out: {left_out or 'none'}"
                )
            facts = {name: (True, 1.0) for name in dense}
            errors = {name: _difference(run(), original(x)) for name, run in dense.items()}
            wrong = {name: error for name, error in errors.items() if error > _TOLERANCE}
            if wrong:
                raise PagError(f"dense runtimes differ from the network by {wrong}")
            variants = {name: _Variant(run) for name, run in dense.items()}
            for name, variant, fraction, error in _deployed(gated, x, densities, pattern, backend):
                variants[name], facts[name], errors[name] = variant, (False, fraction), error
            times = _time(variants, rounds, seconds)
    finally:
        torch.set_num_threads(before)
    latencies = []
    for name, taken in times.items():
        is_dense, fraction = facts[name]
        low, *_, high = statistics.quantiles(taken, n=10)
        middle = statistics.median(taken)
        latencies.append(Latency(name, is_dense, middle, low, high, fraction, errors[name]))
    done = len(next(iter(times.values())))
    return Comparison(tuple(latencies), left_out, threads, done, tuple(x.shape))


@torch.no_grad()
def time_networks(
    networks: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    *,
    threads: int = 1,
    rounds: int = 16,
) -> dict[str, dict[str, float]]:
    """Time networks side by side: deployed, and those without gates in every dense runtime, too.

    Args:
        networks: By name.
        images: Of one shape; each is given to deployed networks in turn, as their time depends on
            it, and the first to dense runtimes.
        threads: Of every variant.
        rounds: How often each has its turn.

    Returns:
        Name -> runtime (`"deployed"`, or a dense one) -> median milliseconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    runs: dict[str, Run] = {}
    try:
        for name, network in networks.items():
            runs[f"{name}|deployed"] = _in_turn(deploy(network), images)
            if not hasattr(network, "pag_state"):
                found, _ = _dense_runs(network, images[0], list(_RUNTIMES), threads)
                runs |= {f"{name}|{runtime}": run for runtime, run in found.items()}
        times = _time({key: _Variant(run) for key, run in runs.items()}, rounds, math.inf)
    finally:
        torch.set_num_threads(before)
    result: dict[str, dict[str, float]] = {name: {} for name in networks}
    for key, taken in times.items():
        name, _, runtime = key.rpartition("|")
        result[name][runtime] = statistics.median(taken)
    return result


def _in_turn(network: nn.Module, images: Sequence[Tensor]) -> Run:
    laid_out = [image.contiguous(memory_format=torch.channels_last) for image in images]
    following = itertools.cycle(laid_out)
    return lambda: network(next(following))


def _time(variants: Mapping[str, _Variant], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each variant, round by round: the median of the calls of its turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, variant in variants.items():
            with variant.masks():
                times[name].append(_turn(variant.run))
    return times


def _turn(run: Run) -> float:
    run()
    taken: list[float] = []
    while len(taken) < _MOST_CALLS and sum(taken) < _TURN:
        started = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def _deployed(
    gated: nn.Module, x: Tensor, densities: Sequence[float], pattern: str, backend: str
) -> Iterator[tuple[str, _Variant, float, float]]:
    """Name, variant, compute fraction and error: gated, in plain torch, and per kind of masks."""
    deployed = deploy(gated, backend)
    run = functools.partial(deployed, x.contiguous(memory_format=torch.channels_last))
    with measure(gated) as measured:
        expected = gated(x)
    fraction = measured.fraction
    plain = functools.partial(deploy(gated, "reference"), x)
    yield f"masked {OWN_GATES}", _Variant(functools.partial(gated, x)), fraction, 0.0
    yield f"reference {OWN_GATES}", _Variant(plain), fraction, _difference(plain(), expected)
    yield f"deployed {OWN_GATES}", _Variant(run), fraction, _difference(run(), expected)
    for density in densities:
        with override_gates(gated, density, pattern=pattern), measure(gated) as measured:
            expected = gated(x)
        masks = functools.partial(override_gates, deployed, density, pattern=pattern)
        with masks():
            error = _difference(run(), expected)
        yield f"deployed {pattern} {density:g}", _Variant(run, masks), measured.fraction, error


def _difference(output: Any, expected: Any) -> float:
    first, second = _first(output), _first(expected)
    largest = float(second.abs().max())
    return float((first - second).abs().max()) / max(largest, 1e-12)


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output.float()


# --- dense runtimes -----------------------------------------------------------------------


def _dense_runs(
    model: nn.Module, x: Tensor, wanted: Sequence[str], threads: int
) -> tuple[dict[str, Run], dict[str, str]]:
    """Calls of the dense runtimes, and why others are left out."""
    unknown = [name for name in wanted if name not in _RUNTIMES]
    if unknown:
        raise PagError(f"runtimes {unknown}: expected some of {list(_RUNTIMES)}")
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for name in wanted:
        package, build = _RUNTIMES[name]
        if importlib.util.find_spec(package) is None:
            left_out[name] = f"{package} is not installed (pip install 'pag-retrofit[bench]')"
            continue
        try:
            runs[name] = build(model, x, threads)
            runs[name]()
        except Exception as error:  # other people's compilers: say so, and compare with the rest
            runs.pop(name, None)
            line = (str(error).splitlines() or [""])[0][:200]
            left_out[name] = f"{type(error).__name__}: {line}"
    return runs, left_out


def _eager(model: nn.Module, x: Tensor, threads: int) -> Run:
    return functools.partial(model, x)


def _channels_last(model: nn.Module, x: Tensor, threads: int) -> Run:
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return functools.partial(laid_out, x.contiguous(memory_format=torch.channels_last))


def _compiled(model: nn.Module, x: Tensor, threads: int) -> Run:
    """Inductor with frozen weights: batch norms folded, weights packed."""
    from torch._inductor import config

    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model))
    image = x.contiguous(memory_format=torch.channels_last)
    with config.patch(freezing=True):  # what is compiled later keeps following its weights
        compiled(image)
    return functools.partial(compiled, image)


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    name = session.get_inputs()[0].name
    image = x.contiguous().numpy()
    return lambda: [torch.from_numpy(output) for output in session.run(None, {name: image})]


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else it rounds to bfloat16 where the machine can
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=x, input=[list(x.shape)]), "CPU", settings
    )
    image = x.contiguous().numpy()
    return lambda: [torch.from_numpy(output) for output in compiled([image]).values()]


_RUNTIMES: dict[str, tuple[str, Callable[[nn.Module, Tensor, int], Run]]] = {
    "eager": ("torch", _eager),
    "channels_last": ("torch", _channels_last),
    "compile": ("torch", _compiled),
    "onnxruntime": ("onnxruntime", _onnxruntime),
    "openvino": ("openvino", _openvino),
}
