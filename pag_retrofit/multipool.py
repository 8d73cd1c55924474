"""MultiPool: each pixel chooses the one branch that computes it, out of several pooling fields.

Kong & Fowlkes, WACV 2019, section 3.3: the branches are one convolution at several dilations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pag_retrofit.cost import SelectorSpec, SiteCost
from pag_retrofit.functional import computed_choice, mix, one_hot_maximum, sample_choice, subsample
from pag_retrofit.gates import Gate

if TYPE_CHECKING:
    from typing_extensions import Self


class BranchSelector(Gate):
    """Per-pixel choice of one of K branches.

    1x1 -> norm -> ReLU -> 3x3 -> norm -> ReLU -> 1x1 gives K logits per *output* pixel of the
    site. In training the choice is drawn (`sample_choice`); in evaluation it is the largest logit.
    The last layer starts at zero with a bias that prefers one branch, for any input.

    The norm is a layer norm over the channels of each pixel. Batch statistics would mean little
    at a batch of one and would differ between training and evaluation, and any norm over pixels
    would let the choice of a pixel depend on all others, on the crop, and (inside a gated branch)
    on pixels that are not computed.

    Args:
        spec: Its shape and what its choices mean.
        cost: What the site costs as a function of the choice.
        site: Name of the site, as in the plan.
        inside: Name of the gated branch that it lies in, if it does.
        initial_probability: Of the branch preferred, before training.
    """

    priced: Tensor

    def __init__(
        self,
        spec: SelectorSpec,
        cost: SiteCost,
        *,
        site: str = "",
        inside: str = "",
        initial_probability: float = 0.99,
    ):
        """Build a selector that chooses `spec.start` everywhere."""
        super().__init__(cost, site, inside)
        self.spec = spec
        channels, width, branches = spec.channels, spec.width, len(spec.factors)
        # Weights of unit size, scaled by their fan-in: see PixelGate.
        self.reduce_weight = nn.Parameter(torch.randn(width, channels, 1, 1))
        self.spatial_weight = nn.Parameter(torch.randn(width, width, 3, 3))
        self.choose_weight = nn.Parameter(torch.zeros(branches, width, 1, 1))
        self.norm_scale = nn.Parameter(torch.ones(2, width))
        self.norm_shift = nn.Parameter(torch.zeros(2, width))
        bias = torch.zeros(branches)
        bias[spec.start] = math.log(
            initial_probability / (1 - initial_probability) * (branches - 1)
        )
        self.bias = nn.Parameter(bias)
        priced = torch.tensor(spec.priced, dtype=torch.float32).view(1, -1, 1, 1)
        self.register_buffer("priced", priced, persistent=False)
        self.forced_seed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map the site's input (B, C, H, W) to a one-hot float32 choice (B, K, h, w)."""
        logits = self._logits(subsample(x, self.cost.stride)) + self.offset * self.priced
        if self.forced_seed is not None:
            return self.certain(self._random_choice(logits, self.forced_seed), x)
        if self.override is not None:
            mask = self.override.mask(logits)
            start, closed = self._only(self.spec.start), self._only(self.spec.closed)
            return self.certain(mask * start + (1 - mask) * closed, x)
        if not self.training:
            return self.certain(one_hot_maximum(logits), x)
        self.remember(torch.softmax(logits / self.temperature, 1), x)
        return sample_choice(logits, self.temperature)

    def site_mask(self, decision: Tensor) -> Tensor:
        """All ones: every pixel is computed by some branch."""
        return torch.ones_like(decision[:, :1])

    def opened(self, decision: Tensor) -> Tensor:
        """Pixels (B, 1, h, w) whose branch costs more than the cheapest."""
        return (decision * self.priced).sum(1, keepdim=True)

    def factors_of(self, decision: Tensor) -> Tensor:
        """The factor on the dilation that each pixel chose, int64 (B, h, w)."""
        factors = torch.tensor(self.spec.factors, device=decision.device)
        return factors[decision.argmax(1)]

    def extra_repr(self) -> str:
        """Show the input channels, the hidden channels and the choices."""
        return f"{self.spec.channels}, {self.spec.width}, factors={self.spec.factors}"

    def _logits(self, x: Tensor) -> Tensor:
        for step, kernel in enumerate((self.reduce_weight, self.spatial_weight)):
            scaled = kernel * kernel[0].numel() ** -0.5
            x = F.conv2d(x, scaled, padding=kernel.shape[-1] // 2)
            scale, shift = self.norm_scale[step], self.norm_shift[step]
            normed = F.layer_norm(x.permute(0, 2, 3, 1), scale.shape, scale, shift)
            x = F.relu(normed.permute(0, 3, 1, 2))
        return F.conv2d(x, self.choose_weight * self.spec.width**-0.5, self.bias).float()

    def decided(self, probability: Tensor) -> Tensor:
        """The most probable branch, one-hot."""
        return one_hot_maximum(probability)

    def _random_choice(self, logits: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return one_hot_maximum(torch.rand(logits.shape, generator=generator)).to(logits.device)

    def _only(self, branch: int) -> Tensor:
        """One-hot (1, K, 1, 1)."""
        one = torch.arange(len(self.spec.factors), device=self.priced.device) == branch
        return one.float().view(1, -1, 1, 1)


class PoolSelector(BranchSelector):
    """The selector of a `MultiPoolConv2d`; it also knows which branches dense execution ran."""

    def overhead(self, decision: Tensor) -> int:
        """MACs per image that dense execution adds (or, if dilation 1 is not run, saves)."""
        operation, bypass = self.cost.operations[0].macs, self.cost.added
        if 0 in self.spec.factors and not bypass[0].macs:  # the block passes the input on
            run = [operation for _ in branches_run(computed_choice(decision))]
        else:
            macs = [operation if factor else bypass[0].macs for factor in self.spec.factors]
            run = [macs[branch] for branch in branches_run(decision)]
        pixels = decision.shape[2] * decision.shape[3]
        return pixels * (self.cost.gate_macs + sum(run) - operation)


def branches_run(choice: Tensor) -> tuple[int, ...]:
    """Branches that dense execution computes for a choice (B, K, H, W).

    All of them where gradients need them or a compiler cannot look at values; else those that
    some pixel chose.
    """
    if choice.requires_grad or torch.compiler.is_compiling():
        return tuple(range(choice.shape[1]))
    chosen = choice.amax((0, 2, 3)).tolist()
    return tuple(branch for branch, value in enumerate(chosen) if value > 0)


class BranchedConv2d(nn.Conv2d):
    """A convolution at several dilations.

    All branches start from the pretrained kernel. Dilation 0 is a 1x1 convolution whose kernel
    is the pretrained one summed over its taps: what a dilation of zero computes. Parameters of
    the original keep their names.
    """

    pag_factors: tuple[int, ...]
    pag_shared: bool

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, factors: tuple[int, ...], *, shared: bool = True) -> Self:
        """Add branches to a convolution; parameters and hooks are shared with it, not copied.

        Args:
            conv: A convolution that keeps the size, up to its stride.
            factors: Per branch, how often the convolution's own dilation; 0 for the 1x1 kernel.
            shared: All dilations use the kernel itself; else those above 1 get copies of it.
        """
        branched = cls.__new__(cls)
        branched.__dict__.update(conv.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            branched.__dict__[registry] = dict(conv.__dict__[registry])
        branched.pag_factors, branched.pag_shared = factors, shared
        kernel = conv.weight.detach()
        if 0 in factors:
            collapsed = nn.Parameter(kernel.sum((2, 3), keepdim=True))
            branched.register_parameter("pag_bypass_weight", collapsed)
        for factor in factors:
            if factor > 1 and not shared:
                branched.register_parameter(f"pag_weight_{factor}", nn.Parameter(kernel.clone()))
        return branched

    def branch(self, x: Tensor, factor: int) -> Tensor:
        """Convolve every pixel of (B, C, H, W) with one of the factors on the dilation."""
        if factor == 1:
            return self._conv_forward(x, self.weight, self.bias)
        if factor == 0:
            kept = subsample(x, (self.stride[0], self.stride[1]))
            collapsed = self.get_parameter("pag_bypass_weight")
            return F.conv2d(kept, collapsed, self.bias, groups=self.groups)
        weight = self.weight if self.pag_shared else self.get_parameter(f"pag_weight_{factor}")
        dilation = (self.dilation[0] * factor, self.dilation[1] * factor)
        padding = self.padding
        if not isinstance(padding, str):  # "same" follows the dilation by itself
            padding = (int(padding[0]) * factor, int(padding[1]) * factor)
        return F.conv2d(x, weight, self.bias, self.stride, padding, dilation, self.groups)


class MultiPoolConv2d(BranchedConv2d):
    """A convolution whose dilation each output pixel chooses.

    It holds its selector as `pag_pool`, unless the identity is the input itself, passed on after
    norm and activation: then the block around it chooses, and hands the choice in.
    """

    pag_pool: BranchSelector

    def ungated(self) -> nn.Conv2d:
        """Give the plain convolution back, with the current weights of dilation 1."""
        conv = nn.Conv2d.__new__(nn.Conv2d)
        plain = {key: v for key, v in self.__dict__.items() if not key.startswith("pag_")}
        conv.__dict__.update(plain)
        for registry in ("_parameters", "_buffers", "_modules"):
            kept = {k: v for k, v in self.__dict__[registry].items() if not k.startswith("pag_")}
            conv.__dict__[registry] = kept
        return conv

    def forward(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', h, w).

        Args:
            x: The input.
            choice: One-hot (B, K, h, w); default what the selector chooses.
        """
        if choice is None:
            choice = self.pag_pool(x)
        first, *others = branches_run(choice)
        result = self.branch(x, self.pag_factors[first])
        if choice.requires_grad:
            result = choice[:, first : first + 1].to(result.dtype) * result
        for k in others:
            output, chosen = self.branch(x, self.pag_factors[k]), choice[:, k : k + 1]
            if choice.requires_grad:
                result = result + chosen.to(output.dtype) * output
            else:
                result = mix(output, result, chosen)
        return result


class AveragedConv2d(BranchedConv2d):
    """The mean of all branches: what choosing one per pixel is compared with.

    A buffer notes the dilations, so that its weights are not mistaken for the plain network's.
    """

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, factors: tuple[int, ...], *, shared: bool = True) -> Self:
        """Add branches to a convolution, as `BranchedConv2d` does."""
        averaged = super().from_conv(conv, factors, shared=shared)
        averaged.register_buffer("pag_averaged", torch.tensor(factors))
        return averaged

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', h, w) once per branch."""
        total = self.branch(x, self.pag_factors[0])
        for factor in self.pag_factors[1:]:
            total = total + self.branch(x, factor)
        return total / len(self.pag_factors)


class BranchFill(nn.Module):
    """Puts a constant where a branch of an ASPP is not computed.

    The constant starts as what the branch's last norm and ReLU give on average if their input is
    Gaussian with the norm's running statistics, so that the projection after the concatenation
    sees maps of the size it was trained with. It folds into the projection's bias: a branch that
    is not computed costs the projection nothing either.

    Args:
        norm: The branch's last norm if a ReLU follows it; None starts at zero.
        channels: Of the branch.
        branches: The selector's choices that compute this branch.
    """

    def __init__(self, norm: nn.BatchNorm2d | None, channels: int, branches: tuple[int, ...]):
        """Start at the expected value."""
        super().__init__()
        self.branches = list(branches)
        mean = torch.zeros(channels) if norm is None else expected_relu(norm.weight, norm.bias)
        self.mean = nn.Parameter(mean.detach().clone().view(1, -1, 1, 1))

    def forward(self, branch: Tensor, choice: Tensor) -> Tensor:
        """Take `branch` (B, C, H, W) where the choice (B, K, H, W) computes it."""
        mask = choice[:, self.branches].sum(1, keepdim=True)
        return mix(branch, self.mean.to(branch.dtype), mask)


def expected_relu(scale: Tensor, shift: Tensor) -> Tensor:
    """Mean of relu(y) for y normal with mean `shift` and standard deviation |`scale`|."""
    deviation = scale.abs().clamp_min(torch.finfo(scale.dtype).tiny)
    normal = torch.distributions.Normal(torch.zeros_like(shift), torch.ones_like(shift))
    ratio = shift / deviation
    return shift * normal.cdf(ratio) + deviation * normal.log_prob(ratio).exp()
