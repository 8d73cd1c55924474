"""Tiny networks for the tests, and what their convolutions cost, counted by brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from timm.models.metaformer import MetaFormer
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Tiny:
    """A row of the table: a network, and another size that it accepts."""

    name: str
    build: Callable[[], nn.Module]
    other_size: tuple[int, int]
    sweep: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (2, 3, 64, 64)


def _timm(
    name: str, sweep: bool = False, other_size: tuple[int, int] = (75, 53), **arguments: Any
) -> Tiny:
    build = lambda: timm.create_model(name, num_classes=5, **arguments)  # noqa: E731
    return Tiny(name, build, other_size, sweep)


def _smp(architecture: str, encoder: str, sweep: bool = False) -> Tiny:
    build = lambda: smp.create_model(architecture, encoder, encoder_weights=None, classes=3)  # noqa: E731
    other_size = (75, 53) if architecture == "Unet" else (96, 64)  # the others want multiples of 32
    return Tiny(f"{architecture}-{encoder}", build, other_size, sweep)


ONE_EACH = (1, 1, 1, 1)
NETWORKS = (
    _timm("resnet18", layers=ONE_EACH),
    _timm("resnet50", layers=ONE_EACH),
    _timm("resnext50_32x4d", layers=ONE_EACH),
    _timm("seresnet50", layers=ONE_EACH),
    _timm("resnet50d", layers=ONE_EACH, drop_path_rate=0.5),
    _timm("mobilenetv2_035"),
    _timm("mobilenetv3_small_050"),
    _timm("test_efficientnet", drop_rate=0.3),
    _timm("tf_mobilenetv3_small_minimal_100"),
    _timm("regnetx_002"),
    _timm("regnety_002"),
    _timm("convnext_atto", depths=ONE_EACH, dims=(16, 32, 48, 64), drop_path_rate=0.5),
    _timm("resnetv2_50", layers=ONE_EACH, channels=(16, 32, 48, 64)),
    _timm("test_nfnet"),
    _timm("test_byobnet"),
    _timm("convnextv2_atto", depths=ONE_EACH, dims=(16, 32, 48, 64)),
    _timm("test_mambaout"),
    _timm("test_efficientnet_gn"),
    _timm("densenet121", block_config=(1, 2, 2), growth_rate=8),
    Tiny(
        "metaformer",
        lambda: MetaFormer(depths=ONE_EACH, dims=(16, 32, 48, 64), num_classes=5),
        (75, 53),
    ),
    _timm("mobilenetv4_conv_small_035"),
    _timm("ghostnet_050"),
    _timm(
        "swin_tiny_patch4_window7_224",
        other_size=(64, 64),
        img_size=64,
        window_size=2,
        embed_dim=16,
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 2, 2),
    ),
    _timm("test_vit", other_size=(64, 64), img_size=64),
    _timm("test_maxvit", other_size=(64, 64), img_size=64),
    _smp("Unet", "resnet18"),
    _smp("Unet", "mobilenet_v2"),
    _smp("Segformer", "mit_b0"),
    _smp("Unet", "tu-mobilenetv3_small_050"),
    _smp("FPN", "resnet18"),
    _smp("DeepLabV3Plus", "resnet18"),
    _smp("Linknet", "resnet18"),
    _smp("UPerNet", "resnet18"),
    _smp("Unet", "efficientnet-b0"),
    _timm("efficientnet_b0", sweep=True),
    _timm("tf_efficientnet_b0", sweep=True),
    _timm("mobilenetv2_100", sweep=True),
    _timm("mobilenetv3_large_100", sweep=True),
    _timm("convnext_tiny", sweep=True),
    _timm("regnety_004", sweep=True),
    _timm("resnet50", sweep=True),
    *(
        _smp(architecture, encoder, sweep=True)
        for architecture in ("Unet", "FPN", "DeepLabV3Plus", "Linknet", "UPerNet")
        for encoder in ("mobilenet_v2", "tu-efficientnet_b0", "tu-resnet18", "tu-convnext_atto")
        if (architecture, encoder) != ("Unet", "mobilenet_v2")
    ),
)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every norm and layer scale count: fresh ones are often one or zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(noise - 0.5 if name.endswith("bias") else noise + 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(noise - 0.5 if name.endswith("mean") else noise + 0.5)
    return model


class SqueezeExcite(nn.Module):
    """Scales channels by what a global mean over the pixels says."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 4, 1)
        self.excite = nn.Conv2d(4, channels, 1)

    def weights(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x.mean((2, 3), keepdim=True))


class Residual(nn.Module):
    """post(shortcut + branch), as user code would write it."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module | None = None):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()
        self.post = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.post(self.shortcut(x) + self.branch(x))


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, **arguments: Any) -> nn.Conv2d:
    """A convolution that keeps the size, or rounds it up when it divides it."""
    padding = (kernel - 1) * arguments.get("dilation", 1) // 2
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, **arguments)


class CustomNet(nn.Module):
    """User code with a residual add and plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Residual(
            nn.Sequential(conv(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8, 3))
        )
        self.head = nn.Sequential(conv(8, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def coarse_by_hand(x: Tensor) -> Tensor:
    """Every second pixel of every second row, and bilinear interpolation between them."""
    grid = x[:, :, ::2, ::2]
    size = [2 * n - 1 for n in grid.shape[2:]]
    between = F.interpolate(grid, size, mode="bilinear", align_corners=True)
    missing = (0, x.shape[3] - size[1], 0, x.shape[2] - size[0])
    return F.pad(between, missing, mode="replicate")


def needed_pixels(chain: Sequence[nn.Conv2d], size: tuple[int, int], mask: Tensor) -> list[Tensor]:
    """Which output pixels of each convolution of a chain the pixels of a mask depend on.

    Counted by gradients through convolutions whose weights are all one, so that nothing cancels.
    """
    x = torch.zeros(mask.shape[0], 1, *size, dtype=torch.float64, requires_grad=True)
    outputs = []
    for layer in chain:
        ones = x.new_ones(1, 1, *layer.kernel_size)
        x = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation)
        outputs.append(x)
    gradients = torch.autograd.grad((x * mask).sum(), outputs)
    return [gradient != 0 for gradient in gradients]
