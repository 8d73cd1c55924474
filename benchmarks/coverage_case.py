"""Everything that `benchmarks/coverage.py` checks of one network, in one process of its own."""

from __future__ import annotations

import copy
import math
import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch._dynamo  # what torch.export would import anew in every process
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import pag_retrofit as pag
from pag_retrofit.gates import MaskOverride, named_gates

SIZES = (128, 224, 256, 384)
"""Sides of the input in pixels; the first that the network accepts is taken."""
CLASSES = 10
TOP_REASONS = 5
TOLERANCE, TIMES = 1e-4, 3.0
"""How far outputs may be off, relative to the largest: TOLERANCE from the gated network's or from
exact ones, or TIMES as far as rounding takes the gated network's from those."""
LAST_PLACE, OTHERS = 1e-7, 3
"""Other inputs that rounding is tried on, and how far they are from the first."""
MASKS = ((1.0, "all"), (0.5, "blobs"), (0.1, "random"))
"""Share and pattern of open pixels."""
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


class NotOfferedError(Exception):
    """The library itself does not build or run this network."""


@dataclass(frozen=True)
class Case:
    """One network to try.

    Args:
        kind: `"timm"`, `"timm-features"` (features_only=True), `"timm-reparameterized"`,
            `"timm-large"` (only what needs no training), `"smp"` or `"smp-aux"` (with a
            classification head).
        name: timm model or SMP architecture.
        encoder: Of an SMP network.
        family: timm module, or class of SMP's native encoder.
    """

    kind: str
    name: str
    encoder: str = ""
    family: str = ""

    @property
    def id(self) -> str:
        """Name in the results."""
        return "/".join(part for part in (self.kind, self.name, self.encoder) if part)

    def build(self) -> nn.Module:
        """Build the network with fresh weights.

        Raises:
            NotOfferedError: The library refuses.
        """
        try:
            return self._build()
        except Exception as error:
            raise NotOfferedError(_message(error)) from error

    def _build(self) -> nn.Module:
        if self.kind.startswith("smp"):
            arguments = {"aux_params": {"classes": CLASSES}} if self.kind == "smp-aux" else {}
            return smp.create_model(
                self.name, self.encoder, encoder_weights=None, classes=CLASSES, **arguments
            )
        if self.kind == "timm-features":
            return timm.create_model(self.name, features_only=True)
        model = timm.create_model(self.name, num_classes=CLASSES)
        return reparameterized(model) if self.kind == "timm-reparameterized" else model


def reparameterized(model: nn.Module) -> nn.Module:
    """The form of a network for inference, its parallel branches merged.

    Raises:
        NotOfferedError: The network has one form only.
    """
    merged: nn.Module = reparameterize_model(model.eval())
    if list(merged.state_dict()) == list(model.state_dict()):
        raise NotOfferedError("there is nothing to merge")
    return merged


@dataclass
class Subject:
    """A network under test, in evaluation mode, with two images; the checks work on copies.

    `flops` holds the MACs of one image by operator, counted from outside the package.
    """

    original: nn.Module
    gated: nn.Module
    plan: pag.Plan
    x: Tensor
    flops: dict[str, int] = field(default_factory=dict)


def examine(case: Case) -> dict[str, Any]:
    """Try one network; plain values for the results."""
    return _prepared(case, _examine_surgery)


def examine_deployed(case: Case) -> dict[str, Any]:
    """Try one network deployed; plain values for the results."""
    return _prepared(case, _examine_deployed)


def _prepared(case: Case, examine: Callable[[Case, nn.Module, int], dict[str, Any]]) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    try:
        original = case.build()
        size = accepted_size(original)
    except NotOfferedError as error:
        return {"status": "not offered", "error": str(error)}
    try:
        enliven(original, size)
    except Exception as error:
        return {"size": size, "status": "failed", "error": _message(error)}
    return {"size": size, **examine(case, original, size)}


def _examine_surgery(case: Case, original: nn.Module, size: int) -> dict[str, Any]:
    record: dict[str, Any] = {"parameters": sum(p.numel() for p in original.parameters())}
    try:
        plan = pag.plan(original, 1.0, example_input=(1, 3, size, size))
        record |= describe(original, plan)
        started = time.perf_counter()
        gated = pag.retrofit(original, 1.0, example_input=(1, 3, size, size))
        record["surgery_seconds"] = round(time.perf_counter() - started, 2)
    except Exception as error:
        return {**record, "status": "failed", "error": _message(error)}
    images = 1 if case.kind == "timm-large" else 2
    subject = Subject(original, gated, plan, torch.randn(images, 3, size, size))
    subject.flops = operator_macs(original, subject.x[:1])
    record["hybrid"] = any(name in subject.flops for name in ("bmm", "baddbmm"))
    failures = run_checks(subject, LIGHT_CHECKS if case.kind == "timm-large" else tuple(CHECKS))
    return {**record, "status": "failed" if failures else "ok", "failures": failures}


# --- deployment -----------------------------------------------------------------------------------


@torch.no_grad()
def _examine_deployed(case: Case, original: nn.Module, size: int) -> dict[str, Any]:
    """Largest difference to the masked network, and the share of MACs that torch computes."""
    record: dict[str, Any] = {}
    x = torch.randn(2, 3, size, size)
    try:
        gated = pag.retrofit(original, 1.0, example_input=(1, 3, size, size)).eval()
        started = time.perf_counter()
        deployed = pag.deploy(gated)
        deployed(x)
        record["deployment_seconds"] = round(time.perf_counter() - started, 2)
        found = [compare(gated, deployed, x, *mask) for mask in MASKS]
        record["difference"] = max(difference for difference, _ in found)
        record["rounding"] = max(rounding for _, rounding in found)
        counted = operator_macs(original, x)
        with FlopCounterMode(display=False) as counter:
            deployed(x)
        record["by_torch"] = round(counter.get_total_flops() / 2 / sum(counted.values()), 4)
    except Exception as error:
        return {**record, "status": "failed", "error": _message(error)}
    return {**record, "status": "ok"}


def compare(
    gated: nn.Module, deployed: nn.Module, x: Tensor, density: float, pattern: Any
) -> tuple[float, float]:
    """How far outputs are from the masked network's, and that from itself in float64.

    Fresh networks of many layers may magnify rounding. The second number is 0 where nobody asked:
    the first is small.

    Raises:
        AssertionError: It is more than rounding.
    """
    expected = masked(gated, x, density, pattern)
    results = masked(deployed, x, density, pattern)
    results += masked(deployed, x, density, pattern)  # a repetition of the pass that was recorded
    difference = largest_difference(results, expected * 2)
    if difference <= TOLERANCE:
        return difference, 0.0
    exact = masked(copy.deepcopy(gated).double(), x.double(), density, pattern)
    # Where rounding is magnified, one result tells little of how far it may go.
    close = [x, *(x * (1 + LAST_PLACE * torch.randn_like(x)) for _ in range(OTHERS))]
    rounding = max(largest_difference(masked(gated, c, density, pattern), exact) for c in close)
    off = largest_difference(results, exact * 2)
    most = max(TOLERANCE, TIMES * rounding)
    expect(off <= most, f"{off:.1e} off at {density}, rounding makes {rounding:.1e}")
    return difference, rounding


def masked(model: nn.Module, x: Tensor, density: float, pattern: Any) -> list[Tensor]:
    """Outputs under made-up masks."""
    with pag.override_gates(model, density, pattern=pattern):
        return tensors(model(x))


def largest_difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """Of any output, relative to the largest number in it."""
    differences = []
    for result, wanted in zip(results, expected, strict=True):
        expect(
            result.shape == wanted.shape, f"shape {tuple(result.shape)}, not {tuple(wanted.shape)}"
        )
        largest = wanted.abs().max().clamp_min(1e-12)
        difference = float((result.to(wanted.dtype) - wanted).abs().max() / largest)
        expect(math.isfinite(difference), "an output is not finite")
        differences.append(difference)
    return max(differences)


# --- the library's networks -----------------------------------------------------------------------


@torch.no_grad()
def accepted_size(model: nn.Module) -> int:
    """Side of the smallest of SIZES that the network runs on.

    Raises:
        NotOfferedError: There is none.
    """
    model.eval()
    for size in SIZES:
        try:
            model(torch.zeros(2, 3, size, size))
            return size
        except Exception as caught:
            error = caught
    raise NotOfferedError(_message(error))


@torch.no_grad()
def enliven(model: nn.Module, size: int) -> None:
    """Give every parameter a say and norms real statistics.

    Fresh networks hold residual branches that start at zero: masking them would show nothing.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            spread = torch.rand_like(parameter)
            parameter.copy_((spread - 0.5) / 2 if name.endswith("bias") else spread + 0.5)
        elif not parameter.any():
            parameter.normal_(std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(torch.randn(4, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def describe(model: nn.Module, plan: pag.Plan) -> dict[str, Any]:
    """Shares of a plan, and the heaviest reasons for what stays dense."""
    listed = sum(site.macs for site in plan.sites) + sum(layer.macs for layer in plan.dense)
    paths = {name for name, _ in model.named_modules() if "." in name}
    reasons: dict[str, int] = defaultdict(int)
    for layer in plan.dense:
        reasons[general_reason(layer.reason, paths)] += layer.macs
    if listed < plan.total_macs:
        reasons["matrix products outside layers (attention)"] = plan.total_macs - listed
    shares = {reason: round(macs / plan.total_macs, 4) for reason, macs in reasons.items() if macs}
    heaviest = sorted(shares.items(), key=lambda item: -item[1])[:TOP_REASONS]
    return {
        "total_macs": plan.total_macs,
        "sites": len(plan.sites),
        "gateable_share": round(plan.gateable_share, 4),
        "gate_share": round(plan.gate_share, 4),
        "floor": round(plan.floor, 4),
        "reasons": {reason: share for reason, share in heaviest if share},
    }


def general_reason(reason: str, paths: set[str]) -> str:
    """A reason without the names of modules and nodes, so that equal reasons add up."""
    words = ("*" if word.strip(":;,") in paths else word for word in reason.split(" "))
    return re.sub(r"_\d+\b", "", " ".join(words))


def operator_macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    """MACs of one forward pass by ATen operator, from outside the package.

    Attention is computed as products of matrices: not all versions of torch count it otherwise.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    macs: dict[str, int] = defaultdict(int)
    for operator, flops in counter.get_flop_counts()["Global"].items():
        macs[str(operator).split(".")[-1]] += flops // 2
    return dict(macs)


# --- the checks -----------------------------------------------------------------------------------


def run_checks(subject: Subject, names: tuple[str, ...]) -> dict[str, str]:
    """Messages of the checks that fail, by name."""
    failures = {}
    for name in names:
        try:
            CHECKS[name](subject)
        except Exception as error:
            failures[name] = _message(error)
    return failures


@torch.no_grad()
def check_identical(s: Subject) -> None:
    """Open gates: the same bits, the same keys, also at another size if the network takes it."""
    expect(same(s.gated(s.x), s.original(s.x)), "outputs differ")
    own = [key for key in s.gated.state_dict() if ".pag_" not in f".{key}"]
    expect(own == list(s.original.state_dict()), "state-dict keys differ")
    expect(type(s.gated) is type(s.original), "the class differs")
    other = torch.randn(1, 3, s.x.shape[2] + 64, s.x.shape[3])
    try:
        wanted = s.original(other)
    except Exception:
        return
    expect(same(s.gated(other), wanted), "outputs differ at another size")


def check_training(s: Subject) -> None:
    """Random gates: finite outputs and gradients, wherever the original has gradients."""
    original, gated = copy.deepcopy(s.original).train(), copy.deepcopy(s.gated).train()
    with torch.no_grad():
        for parameter in pag.gate_parameters(gated):
            parameter.normal_()
    loss(original(s.x)).backward()
    wanted = [name for name, p in original.named_parameters() if p.grad is not None]
    del original
    (loss(gated(s.x)) + pag.sparsity_loss(gated)).backward()
    gradients = {name: p.grad for name, p in gated.named_parameters()}
    missing = [name for name in wanted if gradients[name] is None]
    missing += [n for n, p in gated.named_parameters() if ".pag_gate" in n and p.grad is None]
    expect(not missing, f"no gradient: {missing[:5]}")
    wild = [n for n, g in gradients.items() if g is not None and not torch.isfinite(g).all()]
    expect(not wild, f"gradients are not finite: {wild[:5]}")


@torch.no_grad()
def check_counts(s: Subject) -> None:
    """All open, all closed, and random masks on convolution sites, against other counts."""
    x, total = s.x[:1], sum(s.flops.values())
    with pag.override_gates(s.gated, pattern="all"), pag.measure(s.gated) as opened:
        s.gated(x)
    expect(opened.total_macs == total, f"total {opened.total_macs}, FlopCounterMode says {total}")
    expect(s.plan.total_macs == total, f"total {total}, the plan says {s.plan.total_macs}")
    # A stride may leave pixels of a halo that no output reads, so slightly less is right.
    most = 1 + s.plan.gate_share
    expect(most - 0.05 <= opened.fraction <= most + 1e-9, f"open: {opened.fraction}, not {most}")
    with pag.override_gates(s.gated, pattern="none"), pag.measure(s.gated) as closed:
        s.gated(x)
    expect(abs(closed.fraction - s.plan.floor) < 1e-9, f"closed: {closed.fraction}")
    with forced_conv_gates(s), pag.measure(s.gated) as mixed:
        s.gated(x)
    saved = opened.macs - mixed.macs
    wanted = sum(saved_by_conv(s, site, mixed.masks[site.name]) for site in conv_sites(s))
    expect(saved == wanted, f"random masks on convolutions save {saved} MACs, not {wanted}")


def conv_sites(s: Subject) -> list[Any]:
    """Sites that are one convolution, or a depthwise one with the 1x1 behind it."""
    return [site for site in s.plan.sites if site.kind == "conv"]


class forced_conv_gates:  # noqa: N801, used like a function
    """Random masks on convolution sites, all open elsewhere."""

    def __init__(self, subject: Subject) -> None:
        names = {site.name for site in conv_sites(subject)}
        self.gates = [(gate, site in names) for site, gate in named_gates(subject.gated)]

    def __enter__(self) -> None:
        for gate, forced in self.gates:
            pattern = "random" if forced else "all"
            gate.override = MaskOverride(density=0.5, pattern=pattern, seed=1)

    def __exit__(self, *_: object) -> None:
        for gate, _ in self.gates:
            gate.override = None


def saved_by_conv(s: Subject, site: Any, mask: Tensor) -> int:
    """MACs that closed pixels of a gated convolution save, from its weights alone."""
    weights = [s.original.get_submodule(layer).weight for layer in site.layers]
    full = sum(weight.numel() for weight in weights)
    closed = ~mask
    if site.bypass == "coarse":  # computed at every second pixel of every second row
        closed[..., ::2, ::2] = False
    collapsed = weights[0][..., 0, 0].numel()
    bypass = {"identity": 0, "coarse": 0, "collapsed": collapsed}[site.bypass]
    return int(closed.sum()) * (full - bypass)


@torch.no_grad()
def check_round_trip(s: Subject) -> None:
    """Saved and loaded: the same tensors, the same outputs under the same masks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gated.safetensors"
        pag.save_file(s.gated, path)
        loaded = pag.load_file(path, model=s.original)
    first, second = s.gated.state_dict(), loaded.state_dict()
    expect(list(first) == list(second), "keys differ")
    expect(all(torch.equal(first[k], second[k]) for k in first), "tensors differ")
    with pag.override_gates(s.gated), pag.override_gates(loaded):
        masked = s.gated(s.x)
        expect(same(loaded(s.x), masked), "outputs differ")
    expect(all(torch.isfinite(t).all() for t in tensors(masked)), "masked outputs not finite")


def check_plan(s: Subject) -> None:
    """Every layer stands in the plan once, with its MACs and, if dense, a reason."""
    layers = {n for n, m in s.original.named_modules() if isinstance(m, _LAYERS)}
    dense = [layer.name for layer in s.plan.dense]
    gated = [operation.name for site in s.plan.sites for operation in site.cost.operations]
    twice = {name for name in dense + gated if (dense + gated).count(name) > 1}
    expect(not twice, f"listed more than once: {sorted(twice)[:5]}")
    expect(layers <= {*dense, *gated}, f"not listed: {sorted(layers - {*dense, *gated})[:5]}")
    nameless = [layer.name for layer in s.plan.dense if not layer.reason]
    expect(not nameless, f"dense without a reason: {nameless[:5]}")
    listed = sum(site.macs for site in s.plan.sites) + sum(layer.macs for layer in s.plan.dense)
    # Without "mm": attention has products of that name too (halonet's with relative positions).
    counted = s.flops.get("convolution", 0) + s.flops.get("addmm", 0)
    expect(listed <= s.plan.total_macs, f"listed {listed} MACs of {s.plan.total_macs}")
    expect(listed >= s.flops.get("convolution", 0), "convolutions are missing")
    unlisted = counted - listed
    expect(unlisted <= 0.001 * counted, f"{unlisted} of {counted} MACs of layers are not listed")


@torch.no_grad()
def check_remove(s: Subject) -> None:
    """Without its gates the network is what it was; a gated one is not gated again."""
    try:
        pag.plan(s.gated, 1.0, example_input=tuple(s.x.shape))
    except pag.PagError as error:
        expect("gated already" in str(error), f"refused with: {error}")
    else:
        raise AssertionError("a gated network was planned again")
    restored = pag.remove(copy.deepcopy(s.gated))
    expect(list(restored.state_dict()) == list(s.original.state_dict()), "keys differ")
    first, second = ([type(m) for m in model.modules()] for model in (restored, s.original))
    expect(first == second, "classes differ")
    expect(same(restored(s.x), s.original(s.x)), "outputs differ")


CHECKS: dict[str, Callable[[Subject], None]] = {
    "identical": check_identical,
    "training": check_training,
    "counts": check_counts,
    "round trip": check_round_trip,
    "plan": check_plan,
    "remove": check_remove,
}
LIGHT_CHECKS = ("identical", "plan", "remove")


def expect(condition: bool, message: str) -> None:
    """Fail a check; unlike `assert` also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output, whatever holds them."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def same(first: Any, second: Any) -> bool:
    """Whether two outputs are equal bit by bit; what is not finite equals nothing."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def loss(output: Any) -> Tensor:
    """A scalar that every output enters."""
    return torch.stack([t.square().mean() for t in tensors(output)]).sum()


def _message(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:400]}"
