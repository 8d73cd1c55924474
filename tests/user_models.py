"""Networks as users write them: things that no library of models has, each in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from networks import Residual, conv
from timm.layers import BlurPool2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth


@dataclass(frozen=True)
class UserModel:
    """What is expected of a network.

    Args:
        build: Makes it; its input is (2, 3, 32, 32).
        sites: Names of the sites with `min_share=0`.
        reasons: Dense layer -> part of the reason given for it.
    """

    build: Callable[[], nn.Module]
    sites: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)


def stem(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU())


def with_stem(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(stem(), *blocks)


def branch(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(8, 8, 3), *between, nn.ReLU(), conv(8, 8, 3))


class UsedTwice(nn.Module):
    """One block called twice: weights shared over depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = stem(), Residual(branch())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x)))


class TiedWeights(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = stem(), conv(8, 8, 3), conv(8, 8, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(self.stem(x))))


class Functional(nn.Module):
    """Convolves with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kernel = stem(), nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.last = conv(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + F.conv2d(F.relu(x), self.kernel, padding=1))


class SeveralOutputs(nn.Module):
    """Returns features beside the sum, and takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = branch()

    def forward(
        self, x: Tensor, *, scale: float = 1.0, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        y = x + scale * self.branch(x)
        return y, (x if keep else None)


class CallsWithKeywords(nn.Module):
    """Calls a block with keyword arguments and unpacks what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = stem(), SeveralOutputs(), conv(16, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, kept = self.block(self.stem(x), scale=0.5, keep=True)
        assert kept is not None
        return self.head(torch.cat([y, kept], 1))


class Features(nn.Module):
    """Returns a dictionary and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = stem(), Residual(branch()), conv(8, 2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        low = self.stem(x)
        high = self.block(low)
        return {"out": self.head(high), "features": [low, high]}


class LooksAtValues(nn.Module):
    """Goes one way or the other by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dark, self.bright = stem(), conv(8, 8, 3), conv(8, 8, 3)
        self.block = Residual(branch())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.bright(x) if x.mean() > 0 else self.dark(x)
        return self.block(x)


class Checkpointed(nn.Module):
    """Recomputes its block in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = stem(), Residual(branch())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight, as big-transfer networks do."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / 9, self.bias, self.stride, self.padding, self.dilation)


class ScaledBranch(nn.Module):
    """Layer scale and stochastic depth on a branch whose norm is over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = conv(8, 8, 7, groups=8)
        self.norm, self.expand, self.reduce = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))
        self.drop = StochasticDepth(0.3, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.reduce(F.gelu(self.expand(y)))
        return x + self.drop(y.permute(0, 3, 1, 2))


class ChoosesByAttribute(nn.Module):
    """Loops and branches over plain attributes, which tracing can follow."""

    def __init__(self, depth: int = 2, scale: float | None = 0.5) -> None:
        super().__init__()
        self.depth, self.scale = depth, scale
        self.layers = nn.ModuleDict({f"conv{i}": conv(8, 8, 3) for i in range(depth)})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in range(self.depth):
            y = torch.relu(self.layers[f"conv{index}"](y))
        if self.scale is not None:
            y = y * self.scale
        return torch.add(x, y)


class BufferInside(nn.Module):
    """A branch that multiplies by a buffer of the size of the map: positions matter."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = branch()
        self.register_buffer("window", torch.rand(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) * self.window


class InPlace(nn.Module):
    """Starts its branch with an activation in place, so that the shortcut is activated too."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.branch = nn.SiLU(inplace=True), branch()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.act(x))


class AddsInPlace(nn.Module):
    """Adds the branch to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), conv(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x


class Hourglass(nn.Module):
    """Transposed convolutions, pixel shuffle and additions of maps from two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = conv(8, 16, 3, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.shuffled = nn.Sequential(conv(8, 32, 3), nn.PixelShuffle(2), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x))) + self.shuffled(x)


def norms_over_pixels() -> nn.Module:
    return with_stem(
        Residual(branch(nn.GroupNorm(2, 8))),
        Residual(branch(nn.InstanceNorm2d(8))),
        Residual(branch(nn.BatchNorm2d(8, track_running_stats=False))),
    )


MODELS = {
    "a block used twice": UserModel(
        UsedTwice,
        sites=("stem.0",),
        reasons={"block.branch.0": "more than once", "block.branch.2": "more than once"},
    ),
    "one weight in two layers": UserModel(TiedWeights, sites=("stem.0", "first", "second")),
    "functional convolution": UserModel(
        Functional,
        sites=("stem.0", "last"),
        reasons={"kernel": "the addition is in the forward of the network itself"},
    ),
    "several outputs and keywords": UserModel(CallsWithKeywords, sites=("block", "stem.0", "head")),
    "dictionary of outputs": UserModel(Features, sites=("block", "stem.0", "head")),
    "control flow by values": UserModel(
        LooksAtValues,
        sites=("stem.0", "bright", "block.branch.0", "block.branch.2"),
        reasons={"dark": "the forward pass does not use it"},
    ),
    "gradient checkpointing": UserModel(Checkpointed, sites=("block", "stem.0")),
    "grouped and depthwise": UserModel(
        lambda: with_stem(
            Residual(nn.Sequential(conv(8, 16, 3, groups=4), nn.ReLU(), conv(16, 8, 5, groups=8))),
            conv(8, 8, 3, groups=8),
        ),
        sites=("1", "0.0", "2"),
    ),
    "padding same": UserModel(
        lambda: with_stem(
            nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(2, 1)),
            Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU())),
            nn.Conv2d(8, 8, 4, padding="same"),
        ),
        sites=("2", "0.0", "1", "3"),
    ),
    "other padding modes": UserModel(
        lambda: with_stem(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))),
            nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(8, 8, 3)),
        ),
        sites=("0.0", "1", "2.branch.0", "3.1"),
    ),
    "anti-aliased pooling": UserModel(
        lambda: with_stem(
            nn.Sequential(conv(8, 8, 3), nn.ReLU(), BlurPool2d(8, stride=2)),
            Residual(
                nn.Sequential(conv(8, 8, 3), nn.ReLU(), BlurPool2d(8, stride=2)),
                nn.AvgPool2d(2, 2, ceil_mode=True),
            ),
        ),
        sites=("0.0", "1.0", "2.branch.0"),
        reasons={
            "1.2.filt": "its weight belongs to no layer",
            "2.branch.2.filt": "pads with something else than zeros",
        },
    ),
    "weight norm": UserModel(
        lambda: with_stem(
            parametrizations.weight_norm(conv(8, 8, 3)),
            Residual(nn.Sequential(parametrizations.weight_norm(conv(8, 8, 3)), nn.ReLU())),
        ),
        sites=("2", "0.0", "1"),
    ),
    "spectral norm": UserModel(
        lambda: with_stem(
            parametrizations.spectral_norm(conv(8, 8, 3)),
            Residual(nn.Sequential(parametrizations.spectral_norm(conv(8, 8, 3)), nn.ReLU())),
        ),
        sites=("2", "0.0", "1"),
    ),
    "standardised weights": UserModel(
        lambda: with_stem(
            Standardised(8, 8, 3, padding=1),
            Residual(nn.Sequential(Standardised(8, 8, 3, padding=1), nn.ReLU())),
        ),
        sites=("2", "0.0", "1"),
    ),
    "norms over pixels": UserModel(
        norms_over_pixels,  # of which only what comes after the norm is a branch
        sites=(
            *("1.branch.3", "2.branch.3", "3.branch.3"),
            *("0.0", "1.branch.0", "2.branch.0", "3.branch.0"),
        ),
    ),
    "layer scale and stochastic depth": UserModel(
        lambda: with_stem(ScaledBranch()), sites=("1", "0.0")
    ),
    "loops over attributes": UserModel(lambda: with_stem(ChoosesByAttribute()), sites=("1", "0.0")),
    "a buffer of positions": UserModel(lambda: with_stem(BufferInside()), sites=("1", "0.0")),
    "in-place activation first": UserModel(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), InPlace()), sites=("0", "1")
    ),
    "addition in place": UserModel(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), AddsInPlace()), sites=("0", "1")
    ),
    "hourglass": UserModel(
        lambda: with_stem(Hourglass()),
        sites=("0.0", "1.down", "1.shuffled.0"),
        reasons={"1.up": "conv transpose2d layer outside a residual branch"},
    ),
    "strides and dilations by axis": UserModel(
        lambda: with_stem(
            nn.Conv2d(8, 8, 3, (2, 1), (1, 2), (1, 2)),
            Residual(
                nn.Sequential(nn.Conv2d(8, 8, 3, (1, 2), 1), nn.ReLU(), conv(8, 8, 3)),
                nn.Conv2d(8, 8, 1, (1, 2)),
            ),
        ),
        sites=("2", "0.0", "1", "2.shortcut"),
    ),
    "one and three axes": UserModel(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 3)),
            nn.Conv3d(1, 4, 3, padding=1),
            nn.Flatten(1, 2),
            conv(12, 8, 3),
            Residual(branch()),
            nn.Flatten(2),
            nn.Conv1d(8, 4, 3, padding=1),
        ),
        sites=("4", "3"),
        reasons={"1": "conv3d layer outside", "6": "conv1d layer outside"},
    ),
}
