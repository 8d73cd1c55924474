"""Gate a network that neither timm nor SMP knows: your own module.

Sites are found on the exported graph, so residual blocks and convolutions need no annotations.
The plan gives the reason for every layer that stays dense. Loading takes a fresh, ungated
instance, as a checkpoint cannot build what it does not know.

    python examples/custom_model.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import pag_retrofit as pag

SHAPE = (1, 3, 64, 64)


class Block(nn.Module):
    """A residual block as anyone would write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Network(nn.Module):
    """A stem, residual blocks, and a head with one value per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.head = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 1, H/2, W/2)."""
        return self.head(self.blocks(self.stem(x)))


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    model = Network().eval()
    config = pag.RetrofitConfig(exclude=("stem",))  # say what shall stay dense
    print(pag.plan(model, budget=0.6, example_input=SHAPE, config=config))
    gated = pag.retrofit(model, budget=0.6, example_input=SHAPE, config=config)

    images = torch.rand(SHAPE)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        pag.save_pretrained(gated, folder)
        again = pag.from_pretrained(folder, model=Network())
        print("same outputs after loading:", torch.equal(again(images), gated(images)))


if __name__ == "__main__":
    main()
