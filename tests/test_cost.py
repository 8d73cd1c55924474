"""The cost model against brute-force pixel counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import conv, needed_pixels
from torch import nn

from pag_retrofit.cost import GatedOperation, SiteCost
from pag_retrofit.functional import Window


def window(layer: nn.Conv2d) -> Window:
    return Window(layer.kernel_size, layer.stride, layer.dilation, layer.padding)  # type: ignore


def chain_cost(chain: list[nn.Conv2d], gate_macs: int = 7, bypass_macs: int = 11) -> SiteCost:
    """The cost of a branch that is a chain: each operation is read through all later ones."""
    operations = tuple(
        GatedOperation(
            str(i), layer.weight[0].numel() * layer.out_channels,
            (tuple(window(later) for later in reversed(chain[i + 1 :])),),
        )
        for i, layer in enumerate(chain)
    )  # fmt: skip
    stride = math.prod(layer.stride[0] for layer in chain)
    return SiteCost(operations, gate_macs, bypass_macs, (stride, stride))


layers = st.builds(
    lambda kernel, stride, dilation: conv(2, 2, kernel, stride, dilation=dilation),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 1, 2]),
    st.integers(1, 2),
)


@given(
    st.lists(layers, min_size=1, max_size=4),
    st.tuples(st.integers(9, 21), st.integers(9, 21)),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_active_macs_count_every_needed_pixel(
    chain: list[nn.Conv2d], size: tuple[int, int], density: float, seed: int
) -> None:
    cost = chain_cost(chain)
    stride = cost.stride[0]
    shape = (2, 1, -(-size[0] // stride), -(-size[1] // stride))
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()
    needed = needed_pixels(chain, size, mask)
    for ours, theirs in zip(cost.operation_masks(mask, size), needed, strict=True):
        assert torch.equal(ours.bool(), theirs)
    expected = 7 * shape[2] * shape[3] + 11 * (1 - mask).sum((1, 2, 3)).double()
    for operation, pixels in zip(cost.operations, needed, strict=True):
        expected = expected + operation.macs * pixels.sum((1, 2, 3))
    assert cost.active_macs(mask, size).double().tolist() == expected.tolist()


@given(st.lists(layers, min_size=1, max_size=3), st.tuples(st.integers(8, 17), st.integers(8, 17)))
def test_full_and_floor_are_the_counts_of_the_plain_network(
    chain: list[nn.Conv2d], size: tuple[int, int]
) -> None:
    cost = chain_cost(chain)
    x, full = torch.zeros(1, 2, *size), 0
    for layer in chain:
        x = layer(x)
        full += x.numel() * layer.weight[0].numel()
    output_size = (x.shape[2], x.shape[3])
    pixels = math.prod(output_size)
    assert cost.full_macs(size, output_size) == full
    assert cost.gate_macs_total(output_size) == 7 * pixels
    assert cost.floor_macs(output_size) == (7 + 11) * pixels
    closed = torch.zeros(1, 1, *x.shape[2:])
    assert cost.active_macs(closed, size).item() == cost.floor_macs(output_size)
    # A stride can leave pixels that no output reads, never the other way round.
    opened = cost.active_macs(1 - closed, size).item()
    assert opened <= full + 7 * pixels
    if cost.stride == (1, 1):
        assert opened == full + 7 * pixels


def test_pixels_needed_on_two_ways_count_once() -> None:
    near, far = window(conv(1, 1, 3)), window(conv(1, 1, 3, dilation=3))
    cost = SiteCost((GatedOperation("shared", 1, ((near,), (far,))),), gate_macs=0)
    mask = torch.zeros(1, 1, 11, 11)
    mask[0, 0, 5, 5] = 1
    assert cost.active_macs(mask, (11, 11)).item() == 9 + 9 - 1  # the centre is in both


@pytest.mark.parametrize(
    ("chain", "halo"),
    [
        ([conv(1, 1, 3)], 0),
        ([conv(1, 1, 1), conv(1, 1, 3), conv(1, 1, 1)], 1),
        ([conv(1, 1, 3), conv(1, 1, 5), conv(1, 1, 3, dilation=2)], 4),
    ],
)
def test_halo(chain: list[nn.Conv2d], halo: int) -> None:
    assert chain_cost(chain).halo == halo


def test_soft_masks_cost_between_the_hard_ones_with_a_gradient() -> None:
    cost = chain_cost([conv(2, 2, 3), conv(2, 2, 3)])
    soft = torch.full((1, 1, 9, 9), 0.5, requires_grad=True)
    macs = cost.active_macs(soft, (9, 9))
    assert cost.floor_macs((9, 9)) < macs.item() < cost.full_macs((9, 9), (9, 9))
    macs.sum().backward()
    assert (soft.grad != 0).any()
