"""Deployed networks that write in place into memory which has several names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CustomNet, randomize
from test_deployment import agree, close, gate_all
from torch import Tensor, nn
from torch.nn import functional as F

import pag_retrofit as pag

VIEWS = {
    "slice": lambda x: x[..., 1::2, :],
    "corner": lambda x: x[..., :3, 2:],
    "select": lambda x: x[:, 1],
    "transpose": lambda x: x.transpose(-1, -2),
    "half": lambda x: x.chunk(2, -1)[-1],
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1),
    "flat": lambda x: x.reshape(x.shape[0], -1),
    "itself": lambda x: F.dropout(x, training=False),
}
WRITES = {
    "relu": lambda x: x.relu_(),
    "add": lambda x: x.add_(1.5),
    "fill": lambda x: x.fill_(0.5),
    "copy": lambda x: x.copy_(x.flip(-1)),
    "mask": lambda x: x.masked_fill_(x > 0, -1.0),
}
steps = st.tuples(
    st.sampled_from(sorted(VIEWS)), st.sampled_from(["", *sorted(WRITES)]), st.integers(0, 9)
)


class Painter(nn.Module):
    """Makes views of a map and of views of it, writes into some, and gives all of them back."""

    def __init__(self, chosen: list[tuple[str, str, int]]) -> None:
        super().__init__()
        self.net, self.chosen = CustomNet(), chosen

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.net(x)
        names = [y]
        for view, write, which in self.chosen:
            seen = names[which % len(names)]
            part = VIEWS[view](seen) if seen.dim() == 4 else seen
            if part.numel():
                seen = part
                names.append(seen)
            if write:
                names.append(WRITES[write](seen) * 2)
        return names


@given(st.lists(steps, min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.no_grad()
def test_all_names_of_memory_hold_what_was_written(chosen: list[tuple[str, str, int]]) -> None:
    torch.manual_seed(0)
    gated = gate_all(randomize(Painter(chosen)).eval(), (2, 3, 16, 12))
    agree(gated, pag.deploy(gated), torch.randn(2, 3, 16, 12), 0.5)


class Around(nn.Module):
    """Holds a network that is gated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CustomNet()


class Windows(Around):
    """Numbers the parts of a map in place, as networks of shifted windows do."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        parts = y.new_zeros(y.shape[-2:])
        for count, rows in enumerate((slice(0, 4), slice(4, -2), slice(-2, None))):
            parts[rows, 3:] = count
        return y * parts


@torch.no_grad()
def test_a_map_may_be_put_together_in_place() -> None:
    gated = gate_all(randomize(Windows()).eval(), (2, 3, 16, 12))
    deployed = pag.deploy(gated)
    for density in (1.0, 0.3):
        agree(gated, deployed, torch.randn(2, 3, 16, 12), density)


class Overwriting(Around):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x[:, :, :4] = 0.0
        result: Tensor = self.net(x)
        return result


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_input_is_written_to_in_a_copy(layout: torch.memory_format) -> None:
    gated = gate_all(randomize(Overwriting()).eval(), (2, 3, 16, 12))
    deployed = pag.deploy(gated)
    x = torch.randn(2, 3, 16, 12).contiguous(memory_format=layout)
    given_input = copy.deepcopy(x)
    result = deployed(x)
    assert torch.equal(x, given_input)
    close(result, gated(x))


class Retyped(Around):
    """Reads the bits of what was written."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        bits = y.view(torch.int32)
        y.add_(1.0)
        return bits + 1


@torch.no_grad()
def test_memory_of_two_types_is_refused() -> None:
    gated = gate_all(randomize(Retyped()).eval(), (2, 3, 16, 12))
    with pytest.raises(pag.PagError, match=r"float32 in place where view.* reads torch.int32"):
        pag.deploy(gated)(torch.randn(2, 3, 16, 12))


class Placed(Around):
    """Weighs a map by where its pixels are: operators that give views without saying so."""

    def __init__(self, places: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        rows = y.mean((0, 1, 3)) + 0.5
        columns = y.mean((0, 1, 2)) * 2
        first, second = self.places(rows, columns)
        shifted = columns.square().add(1.0).repeat(32)  # takes the memory of what is let go
        return y * first + second * shifted.mean()


@torch.no_grad()
@pytest.mark.parametrize(
    "places",
    [
        lambda rows, columns: torch.meshgrid(rows, columns, indexing="ij"),
        lambda rows, columns: torch.broadcast_tensors(rows[:, None], columns),
        lambda rows, columns: (
            torch.einsum("ij->ji", rows[:, None] * columns).T,
            rows[:, None],
        ),
    ],
    ids=["meshgrid", "broadcast_tensors", "einsum"],
)
def test_operators_may_give_views_without_saying_so(
    places: Callable[[Tensor, Tensor], Sequence[Tensor]],
) -> None:
    torch.manual_seed(0)
    gated = gate_all(randomize(Placed(places)).eval(), (2, 3, 16, 12))
    deployed = pag.deploy(gated)
    for _ in range(3):  # recorded, and repeated
        agree(gated, deployed, torch.randn(2, 3, 16, 12), 0.5)
