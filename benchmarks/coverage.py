"""Retrofits one network of every CNN family of timm and SMP and writes down what came of it.

    python benchmarks/coverage.py --jobs 2                 # all that is not in the results yet
    python benchmarks/coverage.py --only 'timm/*' --redo failed
    python benchmarks/coverage.py --deployed               # the same of deployment
    python benchmarks/coverage_page.py                     # docs/coverage.md from the results

Which networks: of each timm module the entry with the fewest parameters (`test_*` left out) that
holds convolutions larger than 1x1 beyond stem and patch embedding, as a classifier, as
`features_only=True`, and re-parameterised where timm can; every SMP architecture with the smallest
native encoder of each encoder class and with each of those timm networks as `tu-` encoder (those
that take vision transformers with the smallest network of every timm module); every architecture
with a classification head; some large networks of timm, for the time of surgery. Weights are fresh:
shares do not depend on them.

Each network is tried in a process of its own. The results are written after each one, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from coverage_case import Case, examine, examine_deployed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from pag_retrofit.checkpoints import write_json
from pag_retrofit.stages import environment

RESULTS = Path(__file__).resolve().parent / "results"
SURGERY, DEPLOYMENT = RESULTS / "coverage.json", RESULTS / "coverage_deployed.json"
STEMS = ("stem", "patch_embed", "pixel_embed")
"""In the names of modules that make the first map or tokens out of the image."""
MERGED = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that timm's `reparameterize_model` calls."""
EXTRA = (
    "resnet50",
    "convnext_tiny",
    "repvgg_a0",
    "mobileone_s0",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
)
"""timm networks besides the smallest ones: well-known, merging branches, transformers."""
LARGE = (
    "resnet50",
    "resnet152",
    "densenet201",
    "nasnetalarge",
    "hrnet_w64",
    "maxvit_base_tf_224",
    "dm_nfnet_f4",
    "convnext_xlarge",
    "tf_efficientnet_l2",
)
"""timm networks of many modules or parameters, for the time of surgery."""
TOKEN_ARCHITECTURES = ("DPT", "Segformer", "UPerNet")
"""SMP architectures that take vision transformers as encoders."""
Examination = Callable[[Case], dict[str, Any]]
ACCEPTED = ("ok", "failed", "crashed", "timeout")
"""States of networks that the library itself builds."""


# --- which networks -------------------------------------------------------------------------------


def select(console: Console) -> dict[str, Any]:
    """Smallest network of every timm module and of every native encoder class; takes minutes."""
    smallest: dict[str, tuple[int, str]] = {}
    convolutional: dict[str, tuple[int, str]] = {}
    mergeable = []
    names = [name for name in timm.list_models() if not name.startswith("test_")]
    for name in _tracked(names, "looking at timm's networks", console):
        with torch.device("meta"):
            model = timm.create_model(name)
        module = _module_of(name)
        entry = (_size(model), name)
        smallest[module] = min(smallest.get(module, entry), entry)
        if _has_inner_convolutions(model):
            convolutional[module] = min(convolutional.get(module, entry), entry)
        if any(hasattr(m, method) for m in model.modules() for method in MERGED):
            mergeable.append(name)
    chosen = {name for _, name in convolutional.values()} | set(EXTRA)
    return {
        "timm_version": timm.__version__,
        "timm": {module: name for module, (_, name) in sorted(convolutional.items())},
        "any": {module: name for module, (_, name) in sorted(smallest.items())},
        "mergeable": sorted(chosen & set(mergeable)),
        "native": _native_encoders(),
    }


def _module_of(name: str) -> str:
    return str(timm.models.model_entrypoint(name).__module__).rpartition(".")[2]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _has_inner_convolutions(model: nn.Module) -> bool:
    """Whether a convolution reads overlapping windows of something else than the image."""
    return any(
        isinstance(module, nn.Conv2d)
        and max(module.kernel_size) > 1
        and module.kernel_size != module.stride
        and not any(stem in name for stem in STEMS)
        for name, module in model.named_modules()
    )


def _native_encoders() -> dict[str, str]:
    smallest: dict[str, tuple[int, str]] = {}
    for name, entry in smp.encoders.encoders.items():
        try:
            with torch.device("meta"):
                size = _size(smp.encoders.get_encoder(name, weights=None))
        except RuntimeError:  # it computes with values while it is built
            size = _size(smp.encoders.get_encoder(name, weights=None))
        kind = entry["encoder"].__name__
        smallest[kind] = min(smallest.get(kind, (size, name)), (size, name))
    return {kind: name for kind, (_, name) in sorted(smallest.items())}


def all_cases(selection: dict[str, Any]) -> list[Case]:
    """Every network, those of timm first."""
    chosen = [(name, module) for module, name in selection["timm"].items()]
    timm_names = chosen + [(name, _module_of(name)) for name in EXTRA]
    cases = [Case("timm", name, family=module) for name, module in timm_names]
    merged = [(name, _module_of(name)) for name in selection["mergeable"]]
    cases += [Case("timm-reparameterized", name, family=module) for name, module in merged]
    cases += [Case("timm-features", name, family=module) for name, module in timm_names]
    cases += [Case("timm-large", name, family=_module_of(name)) for name in LARGE]
    architectures = [a.__name__ for a in smp.MODEL_ARCHITECTURES_MAPPING.values()]
    for name in architectures:
        natives = selection["native"].items()
        cases += [Case("smp", name, encoder, kind) for kind, encoder in natives]
    cases += [Case("smp-aux", name, "resnet18", "ResNetEncoder") for name in architectures]
    everything = [(name, module) for module, name in selection["any"].items()]
    for name in architectures:
        encoders = everything if name in TOKEN_ARCHITECTURES else chosen
        cases += [Case("smp", name, f"tu-{encoder}", module) for encoder, module in encoders]
    return list({case.id: case for case in cases}.values())


# --- running them ---------------------------------------------------------------------------------


class Job:
    """One network in a process of its own, so that not even a crash stops the others."""

    def __init__(self, context: Any, case: Case, examine: Examination) -> None:
        """Start."""
        self.case = case
        self.started = time.monotonic()
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(case, examine, theirs))
        self.process.start()
        theirs.close()

    def result(self, timeout: float) -> dict[str, Any] | None:
        """The record once there is one; a process that takes too long is ended."""
        if self.connection.poll():
            try:
                record: dict[str, Any] = self.connection.recv()
            except EOFError:
                self.process.join()
                record = {"status": "crashed", "error": f"exit code {self.process.exitcode}"}
        elif time.monotonic() - self.started > timeout:
            self.process.kill()
            record = {"status": "timeout", "error": f"still running after {timeout:g} s"}
        else:
            return None
        self.process.join()
        self.connection.close()
        return {
            "family": self.case.family,
            "seconds": round(time.monotonic() - self.started, 1),
            **record,
        }


def _work(case: Case, examine: Examination, connection: Connection) -> None:
    connection.send(examine(case))


def run(
    cases: list[Case],
    results: dict[str, Any],
    *,
    path: Path,
    jobs: int,
    timeout: float,
    console: Console,
) -> None:
    """Try networks and write the results after each one."""
    examination = examine_deployed if path == DEPLOYMENT else examine
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coverage_case"])
    waiting = list(reversed(cases))
    running: list[Job] = []
    with _progress(console) as progress:
        task = progress.add_task("networks", total=len(cases))
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Job(context, waiting.pop(), examination))
            wait([job.connection for job in running], timeout=5)
            for job in list(running):
                record = job.result(timeout)
                if record is None:
                    continue
                running.remove(job)
                record |= {key: results["environment"][key] for key in ("commit", "cpu")}
                results["networks"][job.case.id] = record
                write_json(path, results)
                progress.update(task, advance=1, description=job.case.id)
                if record["status"] not in ("ok", "not offered"):
                    console.print(f"[red]{job.case.id}[/]: {_failure(record)}", markup=True)


def _failure(record: dict[str, Any]) -> str:
    from rich.markup import escape

    failures = {record["status"]: record["error"]} if "error" in record else record["failures"]
    return escape("; ".join(f"{name}: {message}" for name, message in failures.items()))


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console)


def _tracked(items: list[str], title: str, console: Console) -> Any:
    with _progress(console) as progress:
        yield from progress.track(items, description=title)


# --- results --------------------------------------------------------------------------------------


def load_results(path: Path) -> dict[str, Any]:
    """Results so far, or empty ones, which name the same networks as those of surgery."""
    if path.is_file():
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results
    return {**load_results(SURGERY), "networks": {}} if path != SURGERY else {"networks": {}}


def note_environment(results: dict[str, Any]) -> None:
    """Keep every pair of versions and processor that any of the networks was tried with."""
    now = {key: results["environment"][key] for key in ("packages", "cpu")}
    earlier = results.setdefault("environments", [])
    if now not in earlier:
        earlier.append(now)


def to_do(case: Case, results: dict[str, Any], redo: str) -> bool:
    """Whether a network is to be tried, given what was tried before."""
    record = results["networks"].get(case.id)
    if record is None or redo == "all":
        return True
    return redo == "failed" and record["status"] not in ("ok", "not offered")


def summarize(results: dict[str, Any], console: Console) -> None:
    """Print how many networks work, and the median of what can be gated, by kind."""
    kinds = sorted({name.split("/")[0] for name in results["networks"]})
    for kind in kinds:
        records = [r for n, r in results["networks"].items() if n.split("/")[0] == kind]
        offered = [record for record in records if record["status"] in ACCEPTED]
        shares = [record["gateable_share"] for record in offered if "gateable_share" in record]
        median = f", median gateable share {statistics.median(shares):.1%}" if shares else ""
        good = sum(record["status"] == "ok" for record in offered)
        console.print(f"{kind}: {good} of {len(offered)} work{median}")


def main() -> None:
    """Read the arguments, run, summarise."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0], epilog="Names of networks: --list."
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names, shell-style")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--redo", choices=("none", "failed", "all"), default="none")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per network")
    parser.add_argument("--deployed", action="store_true", help="try deployment, not surgery")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    path = DEPLOYMENT if arguments.deployed else SURGERY
    results = load_results(path)
    if results.get("selection", {}).get("timm_version") != timm.__version__:
        results["selection"] = select(console)
    results["environment"] = environment()
    note_environment(results)
    write_json(path, results)
    patterns = arguments.only or ["*"]
    cases = [
        case
        for case in all_cases(results["selection"])
        if any(fnmatch.fnmatchcase(case.id, pattern) for pattern in patterns)
    ]
    if arguments.list:
        print("\n".join(case.id for case in cases))
        return
    cases = [case for case in cases if to_do(case, results, arguments.redo)]
    run(
        cases,
        results,
        path=path,
        jobs=arguments.jobs,
        timeout=arguments.timeout,
        console=console,
    )
    summarize(results, console)


if __name__ == "__main__":
    main()
