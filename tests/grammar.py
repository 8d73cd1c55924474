"""Random small networks from a grammar of blocks, and what each computes when it is masked.

Blocks are ordinary modules; what the tests need to know of them (which module ends a branch, what
a block gives under a mask) stands in methods of their own that `forward` does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pag_retrofit as pag

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.ReLU6,
    nn.SiLU,
    lambda: nn.SiLU(inplace=True),
    nn.GELU,
    lambda: nn.Hardswish(inplace=True),
    lambda: nn.LeakyReLU(0.1),
    nn.ELU,
    nn.PReLU,
    nn.Mish,
    nn.Softplus,
    nn.Tanh,
    nn.Hardsigmoid,
    nn.SELU,
    nn.Softsign,
    nn.Identity,
)
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shortcut + branch": lambda branch, shortcut: shortcut + branch,
    "branch + shortcut": lambda branch, shortcut: branch + shortcut,
    "branch += shortcut": lambda branch, shortcut: branch.add_(shortcut),
    "shortcut += branch": lambda branch, shortcut: shortcut.add_(branch),
    "torch.add": lambda branch, shortcut: torch.add(branch, shortcut),
    "Tensor.add": lambda branch, shortcut: shortcut.add(branch),
}


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """Scales channels by a parameter."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drops a whole branch of an image in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.7) / 0.7


class SqueezeExcite(nn.Module):
    """Scales channels by what a global mean says; with a mask, a mean over open pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 4, 1)
        self.excite = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales(x.mean((2, 3), keepdim=True))

    def scales(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum((2, 3), keepdim=True).clamp_min(1)
        return x * self.scales((x * mask).sum((2, 3), keepdim=True) / count)


class ToLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToFirst(nn.Module):
    """(B, H, W, C) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Something with residual branches: the tests' view of it."""

    def branches(self) -> list[nn.Module]:
        """Modules whose output is what each addition adds, in their order."""
        raise NotImplementedError

    def masked(self, x: Tensor, masks: list[Tensor | None]) -> Tensor:
        """The output if branch i is computed where masks[i] is open, everywhere if it is None."""
        raise NotImplementedError


def masked_branch(branch: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """A branch of simple layers under a mask; means are those of the open pixels."""
    if mask is None:
        return branch(x)
    for layer in branch if isinstance(branch, nn.Sequential) else [branch]:
        x = layer.masked(x, mask) if isinstance(layer, SqueezeExcite) else layer(x)
    return torch.where(mask > 0, x, 0)


class Residual(Block):
    """post(shortcut(pre(x)) + branch(pre(x)))."""

    def __init__(
        self, branch: nn.Sequential, shortcut: nn.Module, pre: nn.Module, post: nn.Module, join: str
    ):
        super().__init__()
        self.pre = pre
        self.branch = branch
        self.shortcut = shortcut
        self.post = post
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        return self.post(JOINS[self.join](self.branch(x), self.shortcut(x)))

    def branches(self) -> list[nn.Module]:
        return [self.branch]

    def masked(self, x: Tensor, masks: list[Tensor | None]) -> Tensor:
        x = self.pre(x)
        branch = masked_branch(self.branch, x, masks[0])
        return self.post(branch + self.shortcut(x))


class TwoResiduals(Block):
    """Two additions in one forward, as transformer-like blocks have them."""

    def __init__(self, first: nn.Sequential, second: nn.Sequential, channels: int):
        super().__init__()
        self.first, self.second = first, second
        self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), 0.6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.gamma * self.second(x)

    def branches(self) -> list[nn.Module]:
        return [self.first, self.second]

    def masked(self, x: Tensor, masks: list[Tensor | None]) -> Tensor:
        x = x + masked_branch(self.first, x, masks[0])
        return x + self.gamma * masked_branch(self.second, x, masks[1])


class DenseLayer(nn.Module):
    """DenseNet: new channels beside those that came in."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class Separable(nn.Module):
    """A depthwise convolution and a 1x1, by a forward of its own."""

    def __init__(self, depthwise: nn.Conv2d, pointwise: nn.Conv2d):
        super().__init__()
        self.depthwise, self.pointwise = depthwise, pointwise

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Pyramid(nn.Module):
    """Down, up again, beside what was there, and a convolution on both: a decoder step."""

    def __init__(self, down: nn.Module, fuse: nn.Module, mode: str):
        super().__init__()
        self.steps = nn.ModuleDict({"down": down, "fuse": fuse})
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        low = self.steps["down"](x)
        up = F.interpolate(low, size=x.shape[2:], mode=self.mode)
        return self.steps["fuse"](torch.cat([up, x], dim=1))


class Listed(nn.Module):
    """Blocks in a ModuleList."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Network(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, stem: nn.Module, blocks: nn.Module, head: nn.Module):
        super().__init__()
        self.stem = stem
        self.blocks = blocks
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


@dataclass(frozen=True)
class Case:
    """A network in evaluation mode, the shape of an input, and how to gate it."""

    model: nn.Module
    shape: tuple[int, int, int, int]
    config: pag.RetrofitConfig


class Grammar:
    """Draws blocks; keeps track of channels and of the smaller side of the map."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        self.channels = 3
        self.side = 0

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def case(self) -> Case:
        sides = self.draw(st.integers(16, 40)), self.draw(st.integers(16, 40))
        self.side = min(sides)
        stem = self.plain(self.pick(8, 12, 16))
        blocks = [self.block() for _ in range(self.draw(st.integers(1, 3)))]
        nest = self.pick(nn.Sequential, lambda *b: Listed(list(b)), lambda *b: nn.Sequential(*b))
        network = Network(stem, nest(*blocks), nn.Conv2d(self.channels, 2, 1))
        torch.manual_seed(self.draw(st.integers(0, 99)))
        bypass = self.pick("auto", "auto", "identity", "coarse")
        config = {"scope": self.pick("branch", "branch", "conv"), "bypass": bypass}
        return Case(enliven(network), (2, 3, *sides), pag.RetrofitConfig(min_share=0.0, **config))

    def block(self) -> nn.Module:
        kind = self.pick(
            "plain", "basic", "bottleneck", "inverted", "preactivation", "convnext",
            "two_residuals", "dense", "pyramid", "nested", "separable",
        )  # fmt: skip
        return getattr(self, kind)()

    # --- leaves -----------------------------------------------------------------------------------

    def norm(self, channels: int) -> list[nn.Module]:
        make = self.pick(
            nn.BatchNorm2d, nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), ChannelNorm, None
        )
        return [make(channels)] if make else []

    def activation(self) -> nn.Module:
        return self.pick(*ACTIVATIONS)()

    def conv(self, c_in: int, c_out: int, *, stride: int = 1, keep: bool = True) -> nn.Conv2d:
        """A convolution larger than 1x1; it keeps the size unless told that it need not."""
        kernel, dilation = self.pick((3, 1), (3, 2), (3, 3), (5, 1), (7, 1), ((1, 5), 1))
        tall, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = ((tall - 1) * dilation // 2, (wide - 1) * dilation // 2)
        if not keep and self.side > 20 and self.pick(False, True):
            padding = "valid"
            self.side -= (wide - 1) * dilation
        elif stride == 1 and self.pick(False, True):
            padding = "same"
        groups = self.pick(1, 1, 2, 4)
        if c_in % groups or c_out % groups:
            groups = 1
        bias = self.pick(True, False)
        return nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups=groups, bias=bias)

    def depthwise(self, channels: int, stride: int = 1) -> nn.Conv2d:
        kernel = self.pick(3, 5, 7)
        return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)

    def stride(self) -> int:
        stride = self.pick(1, 1, 2) if self.side >= 12 else 1
        self.side = -(-self.side // stride)
        return stride

    # --- blocks -----------------------------------------------------------------------------------

    def plain(self, channels: int = 0) -> nn.Module:
        c_in, c_out = self.channels, channels or self.pick(8, 12, 16)
        conv = self.conv(c_in, c_out, stride=self.stride(), keep=False)
        self.channels = c_out
        if not channels and self.pick(False, True):
            return nn.Sequential(*self.norm(c_in), self.activation(), conv)
        return nn.Sequential(conv, *self.norm(c_out), self.activation())

    def residual(
        self, branch: list[nn.Module], stride: int, pre: nn.Module | None = None
    ) -> Residual:
        if self.pick(False, True):
            branch.append(LayerScale(self.channels))
        if self.pick(False, True):
            branch.append(DropPath())
        shortcut: nn.Module = nn.Identity()
        if stride > 1 or self.pick(False, False, True):
            shortcut = nn.Sequential(
                nn.Conv2d(self.channels, self.channels, 1, stride), *self.norm(self.channels)
            )
        post = self.pick(nn.Identity, lambda: nn.ReLU(inplace=True), nn.ReLU, nn.GELU)()
        return Residual(
            nn.Sequential(*branch), shortcut, pre or nn.Identity(), post, self.pick(*JOINS)
        )

    def basic(self) -> nn.Module:
        c, stride = self.channels, self.stride()
        first, second = self.conv(c, c, stride=stride), self.conv(c, c)
        layers = [first, *self.norm(c), self.activation(), second, *self.norm(c)]
        return self.residual(layers, stride)

    def bottleneck(self) -> nn.Module:
        c, stride = self.channels, self.stride()
        layers = [nn.Conv2d(c, 8, 1), *self.norm(8), self.activation()]
        layers += [self.conv(8, 8, stride=stride), *self.norm(8), self.activation()]
        return self.residual([*layers, nn.Conv2d(8, c, 1), *self.norm(c)], stride)

    def inverted(self) -> nn.Module:
        c, stride, wide = self.channels, self.stride(), 2 * self.channels
        layers = [nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), self.activation()]
        layers += [self.depthwise(wide, stride), *self.norm(wide), self.activation()]
        if self.pick(False, True):
            layers.append(SqueezeExcite(wide))
        return self.residual([*layers, nn.Conv2d(wide, c, 1), *self.norm(c)], stride)

    def preactivation(self) -> nn.Module:
        c, stride = self.channels, self.stride()
        pre = nn.Sequential(*self.norm(c), self.activation())
        layers = [self.conv(c, c, stride=stride), *self.norm(c), self.activation(), self.conv(c, c)]
        if self.pick(False, True):  # the shortcut starts before the first activation
            return self.residual([*pre, *layers], stride)
        return self.residual(layers, stride, pre)

    def convnext(self) -> nn.Module:
        c = self.channels
        layers = [self.depthwise(c), ToLast(), nn.LayerNorm(c), nn.Linear(c, 2 * c)]
        layers += [self.activation_of_pixels(), nn.Linear(2 * c, c), ToFirst()]
        return self.residual(layers, 1)

    def activation_of_pixels(self) -> nn.Module:
        return self.pick(nn.GELU, nn.SiLU, nn.ReLU)()

    def two_residuals(self) -> nn.Module:
        c = self.channels
        first = nn.Sequential(*self.norm(c), self.depthwise(c), nn.Conv2d(c, c, 1))
        second = nn.Sequential(ChannelNorm(c), nn.Conv2d(c, 2 * c, 1), nn.GELU())
        second.append(nn.Conv2d(2 * c, c, 1))
        return TwoResiduals(first, second, c)

    def dense(self) -> nn.Module:
        layers = []
        for _ in range(self.draw(st.integers(1, 2))):
            c = self.channels
            layer = nn.Sequential(*self.norm(c), self.activation(), self.conv(c, 8))
            layers.append(DenseLayer(layer))
            self.channels += 8
        return nn.Sequential(*layers)

    def pyramid(self) -> nn.Module:
        c = self.channels
        down = nn.Sequential(self.conv(c, 12, stride=2), *self.norm(12), self.activation())
        fuse = nn.Sequential(self.conv(12 + c, 8), *self.norm(8), self.activation())
        self.channels = 8
        return Pyramid(down, fuse, self.pick("nearest", "bilinear"))

    def separable(self) -> nn.Module:
        c_in, c_out, stride = self.channels, self.pick(8, 12, 16), self.stride()
        kernel, dilation = self.pick((3, 1), (3, 2), (5, 1))
        padding = (kernel - 1) * dilation // 2
        if stride == 1 and self.side > 20 and self.pick(False, True):  # the 1x1 is a site alone
            padding = 0
            self.side -= (kernel - 1) * dilation
        first = nn.Conv2d(c_in, c_in, kernel, stride, padding, dilation, groups=c_in)
        pair = self.pick(nn.Sequential, Separable)(first, nn.Conv2d(c_in, c_out, 1, bias=False))
        self.channels = c_out
        return nn.Sequential(pair, *self.norm(c_out), self.activation())

    def nested(self) -> nn.Module:
        return nn.Sequential(nn.Sequential(self.basic()), Listed([self.plain()]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Grammar(draw).case()


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Make every norm, scale and slope count; evaluation mode."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(-0.5, 0.5) if name.endswith("bias") else parameter.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.5, 0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()
