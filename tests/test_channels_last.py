"""Random networks whose maps have their channels last, or are tokens: deployed and masked alike."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import randomize
from test_deployment import agree, gate_all
from torch import Tensor, nn
from torch.nn import functional as F

import pag_retrofit as pag


class Depthwise(nn.Module):
    """Of a map (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return result


class Scaled(nn.Module):
    """Channels times numbers that are learned, or made of the mean over all pixels."""

    def __init__(self, channels: int, by_mean: bool) -> None:
        super().__init__()
        self.scale = nn.Linear(channels, channels) if by_mean else None
        self.constant = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x * self.constant
        return x * torch.sigmoid(self.scale(x.mean(tuple(range(1, x.dim() - 1)), keepdim=True)))


class GatedLinear(nn.Module):
    """A linear layer half of whose channels gate the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, -1)
        return first * F.silu(second)


class Joined(nn.Module):
    """post(shortcut(x) + branch(x))."""

    def __init__(self, shortcut: nn.Module, branch: nn.Module, post: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.branch, self.post = shortcut, branch, post

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.post(self.shortcut(x) + self.branch(x))
        return result


class Last(nn.Module):
    """Patches, blocks on (B, H, W, C) or (B, N, C), and a linear layer."""

    def __init__(self, tokens: bool, blocks: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.tokens, self.stem = tokens, nn.Conv2d(3, channels, 4, 4)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = self.blocks(x.flatten(1, 2) if self.tokens else x)
        return self.head(x), x


LAYERS: dict[str, Any] = {
    "linear": lambda c: nn.Linear(c, c),
    "glu": GatedLinear,
    "gelu": lambda c: nn.GELU(),
    "tanh": lambda c: nn.Tanh(),
    "norm": nn.LayerNorm,
    "scale": lambda c: Scaled(c, by_mean=False),
    "squeeze": lambda c: Scaled(c, by_mean=True),
    "depthwise": Depthwise,
    "dropout": lambda c: nn.Dropout(0.5),
}
ENDS = ("norm", "gelu", "scale", "squeeze", "norm", "dropout", "tanh")


@st.composite
def last_networks(draw: st.DrawFn) -> Last:
    channels, tokens = draw(st.sampled_from([8, 12])), draw(st.sampled_from([False, False, True]))
    inner = [name for name in LAYERS if not (tokens and name == "depthwise")]

    def branch() -> nn.Sequential:
        names = draw(st.lists(st.sampled_from(inner), max_size=4))
        names += ["linear", *draw(st.lists(st.sampled_from(ENDS), max_size=2))]
        return nn.Sequential(*(LAYERS[name](channels) for name in names))

    def block() -> nn.Module:
        shortcut = draw(st.sampled_from([nn.Identity, lambda: nn.Linear(channels, channels)]))()
        post = draw(st.sampled_from([nn.Identity, nn.ReLU, lambda: nn.LayerNorm(channels)]))()
        return Joined(shortcut, branch(), post)

    return Last(tokens, [block() for _ in range(draw(st.integers(1, 3)))], channels)


@given(
    last_networks(),
    st.sampled_from([(48, 48), (20, 36), (4, 4), (4, 40)]),
    st.floats(0, 1),
    st.sampled_from(["auto", "reference"]),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@torch.no_grad()
def test_channels_last_and_tokens(
    network: Last, size: tuple[int, int], density: float, backend: str
) -> None:
    torch.manual_seed(0)
    shape = (2, 3, *size)
    gated = gate_all(randomize(network).eval(), shape)
    deployed = pag.deploy(gated, backend)
    for share in (1.0, density):
        agree(gated, deployed, torch.randn(shape), share, "random")
