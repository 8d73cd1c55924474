"""The gate: each pixel decides whether a site computes it, and the state that gates share."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pag_retrofit.config import RetrofitConfig
from pag_retrofit.cost import SiteCost
from pag_retrofit.errors import PagError
from pag_retrofit.functional import (
    apply_mask,
    as_map,
    coarse,
    largest,
    mask_as,
    mix,
    pattern_mask,
    sample_mask,
    subsample,
)
from pag_retrofit.tracing import UntraceableError, in_mode

DIAL_PACE = 5.0
"""Logits by which a dial of slope 1 shifts gates at the lowest budget: a single slope has to move
as fast in training as all weights of a gate together."""


@dataclass(frozen=True)
class MaskOverride:
    """A made-up mask in place of a gate's own decision; see `override_gates`."""

    density: float
    pattern: str
    seed: int

    def mask(self, logits: Tensor) -> Tensor:
        """The mask (B, 1, h, w) in place of logits (B, K, h, w)."""
        batch, _, height, width = logits.shape
        mask = pattern_mask(self.pattern, self.density, (batch, height, width), self.seed)
        return mask.to(logits.device)


class Gate(nn.Module):
    """What gates and branch selectors have in common: the state that steers a decision.

    Args:
        cost: What the site costs as a function of the decision.
        site: Name of the site, as in the plan.
        inside: Name of the gated branch whose cost holds this one's too, if it lies in one.
    """

    temperature: Tensor
    offset: Tensor
    setting: Tensor
    layout = "BCHW"
    changes = 0
    """How often any gate was overridden or given another budget; deployed networks look at this
    instead of at all their gates."""

    def __init__(self, cost: SiteCost, site: str, inside: str = ""):
        """Start at temperature one, not calibrated."""
        super().__init__()
        self.cost = cost
        self.site = site
        self.inside = inside
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        self.register_buffer("offset", torch.zeros(()))
        self._override: MaskOverride | None = None
        self._rate: float | None = None
        self.last_probability: Tensor | None = None
        """Of each pixel in the last forward of the network, if the gate took part in it."""
        self.last_input_size = (0, 0)
        self.last_in_training = False

    @property
    def override(self) -> MaskOverride | None:
        """A made-up mask in place of the gate's own decision."""
        return self._override

    @override.setter
    def override(self, override: MaskOverride | None) -> None:
        self._override = override
        Gate.changes += 1

    @property
    def rate(self) -> float | None:
        """Share of every image's pixels to open, or None; see `set_budget`."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._rate = rate
        Gate.changes += 1

    def set_offset(self, offset: float) -> None:
        """Change what is added to all logits in evaluation."""
        self.offset.fill_(offset)
        Gate.changes += 1

    def certain(self, decision: Tensor, x: Tensor) -> Tensor:
        """Note a decision that was not drawn, for the losses of a network trained around it."""
        if torch.is_grad_enabled():
            self.remember(decision.detach(), x)
        return decision

    def remember(self, probability: Tensor, x: Tensor) -> None:
        """Note what losses ask for, given the input as a map."""
        self.last_probability = probability
        self.last_input_size = (x.shape[2], x.shape[3])
        self.last_in_training = self.training

    def site_mask(self, decision: Tensor) -> Tensor:
        """Mask of the whole site, for `SiteCost`, given what `forward` returned."""
        return decision

    def opened(self, decision: Tensor) -> Tensor:
        """Pixels (B, 1, h, w) that take more than the cheapest way."""
        return decision

    def decided(self, probability: Tensor) -> Tensor:
        """What evaluation would make of the probabilities of training."""
        return (probability >= 0.5).to(probability)

    def overhead(self, decision: Tensor) -> int:
        """MACs per image that dense execution adds to those of the original network."""
        pixels = decision.shape[2] * decision.shape[3]
        return pixels * (self.cost.gate_macs + self.cost.bypass_macs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one forward pass: it cannot be copied."""
        return {**self.__dict__, "last_probability": None}


class PixelGate(Gate):
    """Per-pixel decision whether to compute (Kong & Fowlkes, WACV 2019, section 3).

    A 1x1 convolution on the site's input gives, per output pixel of the site, the logit of
    computing minus that of skipping; a softmax over two classes depends on nothing else. In
    training the mask is drawn (`sample_mask`); in evaluation a pixel is open where
    logit + offset >= 0. Weights start at zero, so a new gate is open for any input.

    Args:
        channels: Of the site's input.
        cost: What the site costs as a function of the mask.
        layout: Axes of the site's input: `"BCHW"`, `"BHWC"` or `"BNC"`.
        site: Name of the site, as in the plan.
        initial_probability: Of computing a pixel, before training.
        dial: Have a slope by which the logit falls with the budget.
        copy_input: Keep a copy for the backward pass: the site changes its input in place.
    """

    def __init__(
        self,
        channels: int,
        cost: SiteCost,
        *,
        layout: str = "BCHW",
        site: str = "",
        initial_probability: float = 0.99,
        dial: bool = False,
        copy_input: bool = False,
    ):
        """Build an open gate."""
        super().__init__(cost, site)
        self.layout = layout
        self.copy_input = copy_input
        self.weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        # An adaptive optimiser moves every weight by about its learning rate, and so the logit by
        # that times the channels: scaled, one learning rate suits gates of 16 and of 500 channels.
        self.scale = channels**-0.5
        logit = math.log(initial_probability / (1 - initial_probability))
        self.bias = nn.Parameter(torch.full((1,), logit))
        self.common: Tensor | None = None  # see `count_changes_together`
        if dial:
            self.dial = nn.Parameter(torch.zeros(1))
            self.register_buffer("setting", torch.zeros(()))

    @property
    def shift(self) -> Tensor:
        """What is added to all logits: the calibrated offset, less what the dial is turned down."""
        if not self.has_dial:
            return self.offset
        return self.offset - DIAL_PACE * self.setting * self.dial

    @property
    def has_dial(self) -> bool:
        """Whether the budget has a say in the logit."""
        return "dial" in self._parameters

    def steering(self) -> dict[str, Tensor]:
        """What the logits depend on besides the input: own parameters and buffers, by name."""
        names = ("weight", "bias", "offset", "dial", "setting")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def watched(self) -> tuple[Tensor, ...]:
        """Tensors whose versions tell whether any of `steering` was changed."""
        return tuple(self.steering().values()) if self.common is None else (self.common,)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map the site's input to a float32 mask (B, 1, h, w) of zeros and ones.

        Args:
            x: Of the gate's layout; tokens (B, N, C) count as N rows of one pixel.
            size: (h, w), where it is not the input's divided by the stride and rounded up.
        """
        x = as_map(x, self.layout)
        # Subsampled first: torch 2.15 corrupts the heap in the backward pass of a strided 1x1
        # convolution to few channels (CPU, float32, channels_last, input without gradient).
        kept = subsample(x, self.cost.stride, self.cost.offset, size)
        if self.copy_input and torch.is_grad_enabled():
            kept = kept.clone()
        logits = self.logits(kept) + self.shift
        if self.override is not None:
            return self.certain(self.override.mask(logits), x)
        if not self.training:
            return self.certain(self.decide(logits), x)
        self.remember(self.expected(logits), x)
        return self.sample(logits)

    def logits(self, x: Tensor) -> Tensor:
        """Computing minus skipping, float32 (B, 1, h, w), given the input at those pixels."""
        return F.conv2d(x, self.weight * self.scale, self.bias).float()

    def decide(self, logits: Tensor) -> Tensor:
        """The mask of evaluation."""
        if self.rate is not None:
            return largest(logits, round(self.rate * logits.shape[2] * logits.shape[3]))
        return (logits >= 0).float()

    def probability(self, logits: Tensor) -> Tensor:
        """That a pixel is open in training."""
        return torch.sigmoid(logits / self.temperature)

    def expected(self, logits: Tensor) -> Tensor:
        """The same for the losses, with the gradient at temperature one.

        At low temperatures most probabilities are next to 0 or 1, and their own gradients next to
        0: gates would stay what they were when it fell, whatever the losses ask for.
        """
        slope = torch.sigmoid(logits)
        return self.probability(logits).detach() + (slope - slope.detach())

    def sample(self, logits: Tensor) -> Tensor:
        """Draw the mask of training."""
        return sample_mask(logits, self.temperature)

    def extra_repr(self) -> str:
        """Show the input channels and the stride."""
        return f"{self.weight.shape[1]}, stride={self.cost.stride}"


class GatedModule(nn.Module):
    """What all gated forms of single modules share; mixed in before the module's own class.

    A gated module is an instance of its original class too, with the attributes, parameters,
    children and hooks of the original, shared with it and not copied.
    """

    pag_gate: PixelGate

    def ungated(self) -> nn.Module:
        """Give the plain module back, with the current weights."""
        original: Any = type(self).__bases__[1]
        plain: nn.Module = original.__new__(original)
        plain.__dict__.update(self.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            kept = {k: v for k, v in self.__dict__[registry].items() if not k.startswith("pag_")}
            plain.__dict__[registry] = kept
        return plain

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the two classes that this one was made of."""
        return _new_gated, type(self).__bases__, dict(self.__dict__)


class GatedConv(GatedModule):
    """A convolution of which each output pixel is computed in full or gets a cheap bypass.

    The bypass is either *collapsed*, a 1x1 convolution whose kernel starts as the pretrained one
    summed over its taps: exact wherever the input is locally constant. Or it is *coarse*: the
    output at every second pixel of every second row, which is computed in any case, interpolated;
    this works for 1x1 convolutions too. Mixing before the norm and the activation equals mixing
    after them in evaluation, and lets batch statistics (and group norm) see the map that later
    layers see.
    """

    pag_bypass_weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', h, w)."""
        _check_batch(x, self.pag_gate)
        full = super().forward(x)
        size = (full.shape[2], full.shape[3])
        cost = self.pag_gate.cost
        mask = self.pag_gate(x, size)
        if cost.coarse:
            return mix(full, coarse(full), mask)
        kept = subsample(x, cost.stride, cost.offset, size)
        bypass = F.conv2d(kept, self.pag_bypass_weight, self.bias, groups=self.groups)  # type: ignore
        return mix(full, bypass, mask)


class GatedSeparable(GatedModule):
    """A depthwise convolution and the 1x1 behind it, with one gate and the coarse bypass.

    The gate reads what the depthwise one reads, and comes first: once deployed, neither is computed
    where pixels are closed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', h, w)."""
        _check_batch(x, self.pag_gate)
        mask = self.pag_gate(x)
        full = super().forward(x)
        return mix(full, coarse(full), mask)


def _check_batch(x: Tensor, gate: PixelGate) -> None:
    if x.dim() != 4:
        raise PagError(
            f"{gate.site} got an input of shape {tuple(x.shape)}: gated networks take batches "
            "(B, C, H, W), also of one image"
        )


class GatedBranchEnd(GatedModule):
    """A module at the end of a residual branch, whose closed pixels add nothing."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the original on a tensor of the gate's layout, and zero its closed pixels."""
        mask = mask_as(self.pag_gate(x), self.pag_gate.layout)
        return apply_mask(super().forward(x, *args, **kwargs), mask)


class _GatedSteps:
    """Of a gated `nn.Sequential`: the gate is no step of it."""

    _modules: dict[str, nn.Module | None]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._modules) - 1

    def __iter__(self) -> Iterator[nn.Module | None]:
        """Go through the steps."""
        return (module for name, module in self._modules.items() if name != "pag_gate")

    def __getitem__(self, index: slice | int) -> Any:
        """A step, or a plain sequence of some."""
        steps: list[Any] = list(self)
        return nn.Sequential(*steps[index]) if isinstance(index, slice) else steps[index]


class GatedSequenceEnd(_GatedSteps, GatedBranchEnd):
    """A sequence at the end of a residual branch."""


class GatedSeparableSequence(_GatedSteps, GatedSeparable):
    """A sequence of a depthwise convolution and a 1x1."""


def gate_convolution(conv: nn.Conv2d, gate: PixelGate, bypass: Tensor | None) -> GatedConv:
    """Gate a convolution, of `nn.Conv2d` itself or of a class derived from it.

    Args:
        conv: The convolution; it is not modified.
        gate: Its gate.
        bypass: Collapsed kernel (C', C / groups, 1, 1), or None for the coarse bypass.
    """
    gated: GatedConv = _gated_copy(GatedConv, conv, gate)
    if bypass is not None:
        gated.register_parameter("pag_bypass_weight", nn.Parameter(bypass))
    return gated


def collapsed_kernel(conv: nn.Conv2d) -> Tensor:
    """The kernel that a convolution convolves with, summed over its taps.

    Derived classes may compute it from their weight (weight standardisation, say), so it is
    taken from a call.

    Returns:
        (C', C / groups, 1, 1).

    Raises:
        UntraceableError: The convolution does not call `conv2d` exactly once.
    """
    spans = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    recorder = _KernelRecorder()
    with in_mode(conv), torch.no_grad(), recorder:
        conv(conv.weight.new_zeros(1, conv.in_channels, *spans))
    if len(recorder.kernels) != 1 or recorder.kernels[0].shape != conv.weight.shape:
        raise UntraceableError(
            f"{type(conv).__name__} convolves {len(recorder.kernels)} times, or not with a kernel "
            "of its weight's shape"
        )
    return recorder.kernels[0].detach().sum((2, 3), keepdim=True)


class _KernelRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            self.kernels.append(args[1] if len(args) > 1 else kwargs["weight"])
        return func(*args, **(kwargs or {}))


def gate_branch_end(module: nn.Module, gate: PixelGate) -> GatedBranchEnd:
    """Gate a module of one input and one output, which is not modified."""
    mixin = GatedSequenceEnd if isinstance(module, nn.Sequential) else GatedBranchEnd
    gated: GatedBranchEnd = _gated_copy(mixin, module, gate)
    return gated


def gate_separable(module: nn.Module, gate: PixelGate) -> GatedSeparable:
    """Gate a module that is a depthwise convolution and the 1x1 behind it; it is not modified."""
    mixin = GatedSeparableSequence if isinstance(module, nn.Sequential) else GatedSeparable
    gated: GatedSeparable = _gated_copy(mixin, module, gate)
    return gated


@functools.cache
def _gated_class(mixin: type, original: type) -> type:
    name = f"Gated{original.__name__}"
    return type(
        name, (mixin, original), {"__module__": original.__module__, "__doc__": mixin.__doc__}
    )


def _new_gated(mixin: type, original: type) -> Any:
    kind: Any = _gated_class(mixin, original)
    return kind.__new__(kind)


def _gated_copy(mixin: type, module: nn.Module, gate: PixelGate) -> Any:
    gated = _new_gated(mixin, type(module))
    gated.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        gated.__dict__[registry] = dict(module.__dict__[registry])
    gated.add_module("pag_gate", gate)
    return gated


@dataclass(frozen=True)
class SiteTime:
    """What a gate saves of the time, and between which counts.

    Args:
        saved: By closing every pixel, as a fraction of the time of the network without gates.
        opened: MACs of the site with every pixel open over those of its operations.
        closed: The same with every pixel closed.
        excess: What is not saved, in the same unit as `saved`, where half of the pixels are open:
            scattered ones take longer than half of all do.
    """

    saved: float
    opened: float
    closed: float
    excess: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        finite = all(math.isfinite(x) for x in (self.saved, self.opened, self.closed, self.excess))
        if not finite or min(self.saved, self.excess) < 0 or self.opened <= self.closed:
            raise PagError(f"{self}: expected saved and excess of 0 or more, and opened > closed")


@dataclass(frozen=True)
class NetworkTimes:
    """Time of a deployed network as a function of what its sites compute.

    Args:
        opened: With every pixel open, as a fraction of the time of the network without gates.
        sites: By name.
    """

    opened: float
    sites: Mapping[str, SiteTime]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkTimes:
        """Build them from plain values, as `dataclasses.asdict` gives them."""
        sites = {
            str(name): SiteTime(**{key: float(value) for key, value in of.items()})
            for name, of in values["sites"].items()
        }
        return cls(float(values["opened"]), sites)

    @property
    def floor(self) -> float:
        """Smallest fraction of the time: every pixel closed."""
        return self.opened - math.fsum(site.saved for site in self.sites.values())

    def fraction(self, ratios: Mapping[str, Any]) -> Any:
        """Time as a fraction of that of the network without gates.

        Args:
            ratios: Site -> its MACs over those of its operations if all pixels are computed,
                numbers or tensors.
        """
        left = self.opened
        for name, site in self.sites.items():
            skipped = (site.opened - ratios[name]) / (site.opened - site.closed)
            left = left - site.saved * skipped + site.excess * 4 * skipped * (1 - skipped)
        return left


@dataclass
class RetrofitState:
    """What a gated network knows about its retrofit; the attribute `pag_state` of the network.

    Args:
        config: Of the retrofit.
        budget: The fraction asked for: of the compute, or of the time.
        example_shape: (B, C, H, W) of the input the plan was made for.
        total_macs: Of the original network on that input.
        gateable_share: Of `total_macs` inside sites.
        gate_share: MACs of all gates over `total_macs`.
        floor: Smallest fraction the gated network can reach; above 1 where selectors of
            MultiPool have no identity to choose.
        rho: What the sparsity loss aims at now; moved by `Annealer`.
        operating_points: Budget -> logit offset of all gates, set by `calibrate`.
        active_budget: The operating point in use, if one is.
        open_rates: Budget -> site -> mean open rate on the images it was calibrated on.
        times: What gates save of the time, if budgets count that; see `use_times`.
    """

    config: RetrofitConfig
    budget: float
    example_shape: tuple[int, ...]
    total_macs: int
    gateable_share: float
    gate_share: float
    floor: float
    rho: float = 1.0
    operating_points: dict[float, float] = field(default_factory=dict)
    active_budget: float | None = None
    open_rates: dict[float, dict[str, float]] = field(default_factory=dict)
    times: NetworkTimes | None = None

    @property
    def lowest_budget(self) -> float:
        """Smallest budget that may be asked for; 1 asks for no saving at all."""
        return min(self.floor, 1.0)


def state_of(gated: nn.Module) -> RetrofitState:
    """The retrofit state of a gated network.

    Raises:
        PagError: The network is not gated.
    """
    state = getattr(gated, "pag_state", None)
    if not isinstance(state, RetrofitState):
        raise PagError(
            f"{type(gated).__name__} is not a gated network: expected what retrofit() or "
            "load_file() returns (unwrap DistributedDataParallel or torch.compile first)"
        )
    return state


def not_deployed(gated: nn.Module, done: str) -> RetrofitState:
    """The state of a gated network that can still be changed and looked into.

    Args:
        gated: The network.
        done: What is to be done with it.

    Raises:
        PagError: The network is deployed, or not gated.
    """
    state = state_of(gated)
    if getattr(gated, "pag_deployed", False):
        raise PagError(
            f"a deployed network cannot be {done}: take the gated one that it was made from, and "
            "deploy that afterwards"
        )
    return state


def named_gates(gated: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Gates and selectors with the names of their sites, in the order of the modules."""
    for module in gated.modules():
        if isinstance(module, Gate):
            yield module.site, module


def use_times(gated: nn.Module, times: NetworkTimes) -> None:
    """Let the budgets of a network count time.

    Raises:
        PagError: The times are not those of its sites.
    """
    wanted = {site for site, gate in named_gates(gated) if not gate.inside}
    if times.sites.keys() != wanted:
        different = sorted(times.sites.keys() ^ wanted)
        raise PagError(f"times of other sites than those of the network: {different[:5]}")
    state = state_of(gated)
    state.times, state.floor = times, times.floor


def forget_last_pass(gated: nn.Module, _inputs: tuple[Any, ...]) -> None:
    """Let no loss count what gates did in an earlier forward; a hook before that of the network."""
    for module in gated.modules():
        if isinstance(module, Gate) and module.last_probability is not None:
            module.last_probability = None


def turn_dials(gated: nn.Module, fraction: float) -> None:
    """Tell gates with a dial which compute fraction is wanted: 0 at 1, 1 at the floor."""
    state = state_of(gated)
    span = 1 - state.lowest_budget
    for _, gate in named_gates(gated):
        if isinstance(gate, PixelGate) and gate.has_dial:
            gate.setting.fill_((1 - fraction) / span if span > 0 else 0.0)
    Gate.changes += 1


def count_changes_together(gates: Iterable[Gate]) -> None:
    """Let one look tell whether any of many gates changed, where each look costs a cache miss.

    Tensors that look into one memory share its version: what steers the gates becomes part of one.
    """
    parts = [
        (gate, name, tensor)
        for gate in gates
        if isinstance(gate, PixelGate)
        for name, tensor in gate.steering().items()
    ]
    if not parts:
        return
    common = torch.cat([tensor.detach().flatten() for _, _, tensor in parts])
    pieces = common.split([tensor.numel() for _, _, tensor in parts])
    for (gate, name, tensor), piece in zip(parts, pieces, strict=True):
        own = piece.view(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            gate.register_parameter(name, nn.Parameter(own, requires_grad=False))
        else:
            gate.register_buffer(name, own)
        gate.common = common


def gate_parameters(gated: nn.Module) -> list[nn.Parameter]:
    """Parameters of all gates and selectors, if any, for a learning rate of their own."""
    return [parameter for _, gate in named_gates(gated) for parameter in gate.parameters()]
