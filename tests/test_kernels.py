"""The native kernels against their plain torch twins and against torch's dense operations."""

from __future__ import annotations

import copy
import functools
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from struct import Struct
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation import COMMAND, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pag_retrofit import functional as pf
from pag_retrofit import kernels
from pag_retrofit.errors import PagError
from pag_retrofit.functional import POINTWISE, Window
from pag_retrofit.kernels import Taps, native, operators, perforated, reference
from pag_retrofit.kernels.arguments import ConvolutionArguments
from pag_retrofit.kernels.packing import (
    compress,
    compressed_sizes,
    digits_sizes,
    expand,
    from_digits,
    in_digits,
    pack_strided,
    pack_weight,
    packed_size,
    transformed,
    unpack_strided,
    unpack_weight,
    untransformed,
)

OPS = torch.ops.pag_retrofit
UNTOUCHED = -12345.0
MASKS = ("all", "none", "single", "border", "checkerboard", "random", "list")

_CACHE = "SC_LEVEL2_CACHE_SIZE"
WIDE_ROWS_FIT = _CACHE in os.sysconf_names and os.sysconf(_CACHE) >= 1 << 20
"""Whether a core's cache holds some rows of the maps that are computed in bands here."""


def _has_library() -> bool:
    try:
        native.library()
    except PagError:
        return False
    return True


TASKS = Path("/proc/self/task")
needs_library = pytest.mark.skipif(not _has_library(), reason="the kernels were not compiled")


IMPLEMENTATIONS = ("reference", *native.INSTRUCTION_SETS, *(["emulated"] if COMMAND else []))


@contextmanager
def using(name: str) -> Iterator[ModuleType]:
    """Plain torch, or the native kernels with one instruction set."""
    if name == "reference":
        yield reference
        return
    if name == "emulated":
        with emulated() as module:
            yield module
        return
    if not _has_library():
        pytest.skip("the kernels were not compiled")
    best = kernels.instruction_set()
    try:
        kernels.use_instruction_set(name)
    except PagError:
        pytest.skip(f"this processor has no {name}")
    assert kernels.instruction_set() == name
    yield native
    kernels.use_instruction_set(best)


@pytest.fixture(params=IMPLEMENTATIONS)
def twin(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with using(request.param) as module:
        yield module


def mask_of(pattern: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    """A bool mask (B, 1, h, w)."""
    batch, height, width = shape
    mask = torch.zeros(batch, 1, height, width, dtype=torch.bool)
    if pattern == "all":
        return ~mask
    if pattern == "single":
        mask.view(-1)[seed % mask.numel()] = True
    elif pattern == "border":
        mask[:] = True
        mask[:, :, 1:-1, 1:-1] = False
    elif pattern == "checkerboard":
        mask[:, :, ::2, ::2] = True
        mask[:, :, 1::2, 1::2] = True
    elif pattern != "none":
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(mask.shape, generator=generator) < 0.4
    return mask


RESIDUALS = ["before", "after", "small before", "small after", "in place", "in place after"]


@dataclass(frozen=True)
class Case:
    """One convolution with everything around it."""

    channels: tuple[int, ...] = (5,)  # of each source
    upsampling: tuple[int, ...] = (1,)
    out_channels: int = 7
    groups: int = 1
    size: tuple[int, int] = (6, 7)
    window: Window = field(default=Window((3, 3), (1, 1), (1, 1), (1, 1)))
    batch: int = 2
    bias: bool = True
    activation: str = "none"
    residual: str = "none"  # or one of RESIDUALS
    scale: bool = False
    input_scale: bool = False
    winograd: bool = False
    compressed: bool = False
    digits: bool = False
    wider: int = 0  # channels of the buffers beside those in use
    mask: str = "random"
    seed: int = 0

    def out_size(self) -> tuple[int, int]:
        spans = [
            n + 2 * p - (k - 1) * d - 1
            for n, k, d, p in zip(
                self.size,
                self.window.kernel,
                self.window.dilation,
                self.window.padding,
                strict=True,
            )
        ]
        height, width = (max(n // s + 1, 1) for n, s in zip(spans, self.window.stride, strict=True))
        return height, width

    def weight(self) -> Tensor:
        own = sum(self.channels) // self.groups
        generator = torch.Generator().manual_seed(self.seed + 1)
        weight = torch.randn(self.out_channels, own, *self.window.kernel, generator=generator)
        return weight / math.sqrt(weight[0].numel())

    def packed_weight(self) -> Tensor:
        weight = self.weight()
        if self.winograd and self.window.stride == (2, 2):
            return pack_strided(weight)
        weight = transformed(weight) if self.winograd else weight
        packed, taps = pack_weight(weight, self.groups), weight[0, 0].numel()
        if self.compressed:
            return compress(packed, self.out_channels, sum(self.channels), taps)
        if self.digits:
            return in_digits(packed, self.out_channels, sum(self.channels), taps)
        return packed

    def arguments(self) -> ConvolutionArguments:
        generator = torch.Generator().manual_seed(self.seed)
        height, width = self.out_size()

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def buffer(height: int, width: int, channels: int) -> Tensor:
            whole = made(self.batch, height, width, channels + self.wider)
            return whole[..., self.wider // 2 : self.wider // 2 + channels]

        sources = [
            buffer(-(-self.size[0] // factor), -(-self.size[1] // factor), channels)
            for channels, factor in zip(self.channels, self.upsampling, strict=True)
        ]
        in_place = self.residual.startswith("in place")
        out = buffer(height, width, self.out_channels)
        if not in_place:
            out.fill_(UNTOUCHED)
        residual = None
        if self.residual != "none" and not in_place:
            common = math.gcd(height, width)
            factor = common & -common if self.residual.startswith("small") else 1
            residual = buffer(height // factor, width // factor, self.out_channels)
        pixels, length = None, None
        if self.mask != "all":
            mask = mask_of(self.mask, (self.batch, height, width), self.seed)
            pixels, length = reference.list_pixels(mask, True)
            if self.mask == "list":  # in any order, every entry valid
                pixels = pixels[: int(length)][torch.randperm(int(length), generator=generator)]
                length = None
        return ConvolutionArguments(
            out, sources, self.packed_weight(),
            made(self.out_channels) if self.bias else None, pixels, length,
            [n for pair in self.window[:4] for n in pair], list(self.size),
            self.groups, list(self.upsampling), self.activation, 0.1,
            made(self.batch, self.out_channels) if self.scale else None,
            made(self.batch, sum(self.channels)) if self.input_scale else None,
            residual,
            in_place, "after" in self.residual, self.winograd,
        )  # fmt: skip

    def dense(self, a: ConvolutionArguments) -> Tensor:
        """What torch computes, in float64, (B, h, w, C')."""
        maps = []
        for source, factor in zip(a.sources, self.upsampling, strict=True):
            larger = source.double().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            maps.append(larger[:, : self.size[0], : self.size[1]])
        x = torch.cat(maps, 3).permute(0, 3, 1, 2)
        if a.input_scale is not None:
            x = x * a.input_scale[:, :, None, None]
        _, stride, dilation, (top, left) = self.window[:4]
        x = F.pad(x, (left, 32, top, 32))  # what is too much is cut below
        y = F.conv2d(x, self.weight().double(), None, stride, 0, dilation, self.groups)
        y = y[:, :, : a.out.shape[1], : a.out.shape[2]].permute(0, 2, 3, 1)
        y = y if a.bias is None else y + a.bias
        y = y if a.scale is None else y * a.scale[:, None, None]
        added = a.out if a.accumulate else a.residual
        if a.residual is not None:
            height, width = (a.out.shape[axis] // a.residual.shape[axis] for axis in (1, 2))
            added = a.residual.repeat_interleave(height, 1).repeat_interleave(width, 2)
        if added is not None and not a.residual_after:
            y = y + added
        y = activated(y, self.activation)
        return y + added if added is not None and a.residual_after else y


def activated(x: Tensor, name: str) -> Tensor:
    """Activations by torch's modules."""
    modules = {
        "none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU(),
        "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "hardswish": nn.Hardswish(),
        "hardsigmoid": nn.Hardsigmoid(), "sigmoid": nn.Sigmoid(), "leaky_relu": nn.LeakyReLU(0.1),
    }  # fmt: skip
    return modules[name](x)


def check(case: Case, module: ModuleType) -> None:
    """The module's result at listed pixels is torch's; all others are as they were."""
    a = case.arguments()
    operators.check_convolution(a)
    expected, before, buffer = case.dense(a), a.out.clone(), a.out._base
    beside = None if buffer is None else buffer.clone()
    module.convolution(a)
    listed = torch.ones(a.out.shape[:3], dtype=torch.bool)
    if a.pixels is not None:
        valid = a.pixels if a.length is None else a.pixels[: int(a.length)]
        listed = torch.zeros(listed.shape, dtype=torch.bool)
        listed.view(-1)[valid.long()] = True
    magnitude = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(
        a.out[listed].double(), expected[listed], rtol=1e-4, atol=1e-5 * magnitude
    )
    assert torch.equal(a.out[~listed], before[~listed])
    if case.wider:
        assert beside is not None and buffer is not None
        half = case.wider // 2
        assert torch.equal(buffer[..., :half], beside[..., :half])
        assert torch.equal(
            buffer[..., half + case.out_channels :], beside[..., half + case.out_channels :]
        )


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
STEM = Window((7, 7), (2, 2), (1, 1), (3, 3))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = draw(st.tuples(st.integers(-1, 4), st.integers(-1, 4)))
    return Window(kernel, draw(PAIRS), draw(PAIRS), padding)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ungrouped convolutions of one to six sources, grouped ones, slim groups, depthwise ones."""
    kind = draw(st.sampled_from(["plain", "plain", "sources", "grouped", "slim", "depthwise"]))
    window = draw(windows())
    winograd = kind in ("plain", "sources") and draw(st.booleans())
    strided = winograd and draw(st.booleans())
    if strided:
        window = STEM._replace(padding=window.padding)
    elif winograd:
        window = window._replace(kernel=(3, 3), stride=(1, 1))
    channels: tuple[int, ...] = (draw(st.sampled_from([1, 3, 8, 9, 16, 33, 64])),)
    upsampling: tuple[int, ...] = (draw(st.sampled_from([1, 1, 1, 2])),)
    groups, out_channels = 1, draw(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 40, 65, 96]))
    if kind == "sources":
        sizes = st.integers(1, 20) if draw(st.booleans()) else st.just(64)
        channels = draw(st.lists(sizes, min_size=2, max_size=6).map(tuple))
        upsampling = tuple(draw(st.sampled_from([1, 1, 2, 4])) for _ in channels)
        channels = channels[:2] if strided else channels
    elif kind == "grouped":
        groups = draw(st.integers(2, 7))
        channels = (groups * draw(st.sampled_from([1, 2, 4, 8, 17])),)
        out_channels = groups * draw(st.sampled_from([1, 2, 3, 4, 8, 16, 20, 33]))
    elif kind == "slim":
        groups = draw(st.integers(2, 20))
        channels = (groups * draw(st.sampled_from([2, 4, 8])),)
        out_channels = channels[0]
    elif kind == "depthwise":
        groups = out_channels = draw(st.sampled_from([2, 3, 15, 16, 31, 64, 70, 144]))
        channels = (groups,)
    held = draw(st.sampled_from(["floats", "compressed", "digits"])) if groups == 1 else "floats"
    if strided:
        held, channels = "floats", tuple(min(count, 4 // len(channels)) for count in channels)
        upsampling = upsampling[: len(channels)]
    return Case(
        channels=channels,
        upsampling=upsampling,
        out_channels=out_channels,
        groups=groups,
        size=draw(st.tuples(*[st.integers(1, 40 if strided else 9)] * 2)),
        window=window,
        winograd=winograd,
        compressed=held == "compressed",
        digits=held == "digits" and not winograd,
        batch=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["none", "relu", *kernels.ACTIVATIONS])),
        residual=draw(st.sampled_from(["none", *RESIDUALS])),
        scale=draw(st.booleans()),
        input_scale=groups == 1 and draw(st.booleans()),
        wider=draw(st.sampled_from([0, 0, 3, 16])),
        mask=draw(st.sampled_from(MASKS)),
        seed=draw(st.integers(0, 99)),
    )


class TestConvolution:
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    @settings(max_examples=150)
    @given(case=cases())
    def test_agrees_with_torch(self, name: str, case: Case) -> None:
        with using(name) as module:
            check(case, module)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("channels, out_channels", [(16, 32), (20, 48), (70, 2), (12, 12)])
    @pytest.mark.parametrize("winograd", [False, True])
    def test_a_small_residual_is_read_upsampled(
        self, twin: ModuleType, winograd: bool, channels: int, out_channels: int, mask: str
    ) -> None:
        window = Window((3, 3), (1, 1), (1, 1), (1, 1)) if winograd else POINTWISE
        for residual, size in (("small before", (12, 20)), ("small after", (8, 40))):
            check(
                Case(
                    (channels,),
                    out_channels=out_channels,
                    size=size,
                    window=window,
                    winograd=winograd,
                    residual=residual,
                    activation="relu",
                    mask=mask,
                ),
                twin,
            )

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("pixels", [*range(1, 17), 27, 28, 29])
    def test_every_size_of_the_last_tile(self, twin: ModuleType, pixels: int, kernel: int) -> None:
        same = Window((kernel, kernel), (1, 1), (1, 1), (kernel // 2, kernel // 2))
        for out_channels in (16, 32, 48):
            check(Case((16,), out_channels=out_channels, size=(1, pixels), window=same), twin)
            check(
                Case((16,), out_channels=out_channels, size=(1, pixels), window=same, mask="all"),
                twin,
            )

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("channels, out_channels", [(64, 64), (100, 130), (16, 256)])
    def test_larger_maps(
        self, twin: ModuleType, channels: int, out_channels: int, mask: str
    ) -> None:
        check(Case((channels,), out_channels=out_channels, size=(17, 23), mask=mask), twin)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("out_channels", [1, 2, 3, 4, 11, 16])
    def test_few_output_channels(self, twin: ModuleType, out_channels: int, mask: str) -> None:
        case = Case((24,), out_channels=out_channels, size=(7, 47), mask=mask, activation="relu")
        check(case, twin)
        check(replace(case, channels=(8, 16), upsampling=(2, 1)), twin)
        check(replace(case, input_scale=True, residual="before"), twin)
        check(replace(case, channels=(37,), activation="none"), twin)
        check(replace(case, window=Window((5, 3), (2, 1), (2, 1), (1, 0))), twin)

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    @pytest.mark.parametrize("channels", [128, 203])
    @pytest.mark.parametrize("out_channels", [1, 2, 3, 5, 8, 12, 13])
    def test_few_output_channels_of_many(self, name: str, channels: int, out_channels: int) -> None:
        case = Case((channels,), out_channels=out_channels, size=(9, 17), window=POINTWISE)
        with using(name) as module:
            for mask in MASKS:
                check(replace(case, mask=mask, activation="silu"), module)
            check(replace(case, bias=False, wider=3), module)
            check(replace(case, residual="before", scale=True), module)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (1, 3)])
    def test_winograd(self, twin: ModuleType, dilation: tuple[int, int], mask: str) -> None:
        window = Window((3, 3), (1, 1), dilation, dilation)
        case = Case((64,), out_channels=80, size=(17, 46), window=window, winograd=True, mask=mask)
        check(case, twin)
        check(replace(case, channels=(24, 9, 33), upsampling=(2, 1, 2), size=(18, 46)), twin)
        check(replace(case, channels=(24,), upsampling=(4,), size=(16, 44)), twin)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_winograd_with_stride(self, twin: ModuleType, channels: int, mask: str) -> None:
        case = Case(
            (channels,), out_channels=80, size=(37, 94), window=STEM, winograd=True, mask=mask
        )
        check(case, twin)
        check(replace(case, out_channels=17, wider=3, activation="relu", residual="before"), twin)
        check(replace(case, channels=(1, 2), upsampling=(2, 1), input_scale=True, scale=True), twin)
        check(replace(case, channels=(1, 2), upsampling=(1, 1), wider=2), twin)
        check(replace(case, input_scale=True), twin)

    @pytest.mark.parametrize("mask", MASKS)
    def test_with_stride_what_no_listed_pixel_reads_may_be_anything(
        self, twin: ModuleType, mask: str
    ) -> None:
        case = Case((3,), out_channels=20, size=(27, 41), window=STEM, winograd=True, mask=mask)
        a = case.arguments()
        twin.convolution(a)
        expected = a.out.clone()
        open_ = mask_of(mask, a.out.shape[:3], case.seed)
        read = reference.needed_inputs(open_, [n for pair in STEM[:4] for n in pair], case.size)
        a.sources[0][~read[:, 0]] = math.nan
        twin.convolution(a)
        assert torch.equal(a.out, expected)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("winograd", [False, True])
    def test_what_no_listed_pixel_reads_may_be_anything(
        self, twin: ModuleType, winograd: bool, mask: str
    ) -> None:
        # Unwritten memory of sparse maps.
        case = Case((33,), out_channels=20, size=(9, 14), winograd=winograd, mask=mask)
        a = case.arguments()
        twin.convolution(a)
        expected = a.out.clone()
        open_ = mask_of(mask, (2, 9, 14), case.seed)
        read = reference.needed_inputs(open_, (3, 3, 1, 1, 1, 1, 1, 1), (9, 14))
        a.sources[0][~read[:, 0]] = math.nan
        twin.convolution(a)
        assert torch.equal(a.out, expected)

    def test_weights_larger_than_the_cache(self, twin: ModuleType) -> None:
        check(
            Case((1024,), out_channels=320, size=(5, 5), window=Window((3, 3), *[(1, 1)] * 3)), twin
        )

    @pytest.mark.parametrize("kernel", [3, 5, 7])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_depthwise(self, twin: ModuleType, kernel: int, stride: int) -> None:
        window = Window((kernel, kernel), (stride, stride), (1, 1), (kernel // 2, kernel // 2))
        case = Case((96,), out_channels=96, groups=96, size=(19, 21), window=window)
        check(case, twin)
        check(replace(case, mask="all", activation="relu6"), twin)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("window", [(1, 0), (1, -1), (2, 0), (3, -2)])
    def test_one_tap_of_few_channels(
        self, twin: ModuleType, window: tuple[int, int], mask: str
    ) -> None:
        (stride, padding), one = window, (1, 1)
        one_tap = Window(one, (1, stride), one, (0, padding))
        case = Case((16,), out_channels=32, size=(3, 97), window=one_tap, mask=mask)
        check(case, twin)
        check(replace(case, channels=(3,), out_channels=64, activation="relu6"), twin)
        check(replace(case, channels=(37,), out_channels=11, wider=3, residual="in place"), twin)
        check(replace(case, out_channels=40, activation="silu", residual="after"), twin)

    @pytest.mark.parametrize("tile", [3, 6, 14])
    def test_one_tap_in_an_order_that_looks_side_by_side(self, twin: ModuleType, tile: int) -> None:
        """The first and the last pixel of a tile lie where they would in a row, others do not."""
        weight = torch.randn(32, 16)
        layer = pointwise(weight)
        pixels = [0, 30, *range(2, tile), 31, 32, 33]
        listed = kernels.PixelList(
            torch.tensor(pixels, dtype=torch.int32), torch.tensor([len(pixels)], dtype=torch.int32)
        )
        x, out = torch.randn(1, 1, 40, 16), torch.full((1, 1, 40, 32), UNTOUCHED)
        with_module(twin, lambda: layer(out, x, listed))
        expected = torch.full_like(out, UNTOUCHED)
        expected[:, :, pixels] = (x @ weight.t())[:, :, pixels]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("channels", [3, 16, 40, 64, 70])
    def test_depthwise_of_one_tap(self, twin: ModuleType, channels: int, mask: str) -> None:
        one = Window((1, 1), (1, 1), (1, 1), (0, 0))
        case = Case(
            (channels,), (2,), channels, channels, (7, 73), one, mask=mask, activation="silu"
        )
        check(case, twin)
        check(replace(case, upsampling=(1,), bias=False, activation="none", wider=4), twin)
        check(replace(case, upsampling=(4,), window=one._replace(stride=(2, 3))), twin)
        check(replace(case, window=one._replace(padding=(-2, -5))), twin)
        check(replace(case, window=one._replace(padding=(1, 2)), residual="before"), twin)

    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
    @pytest.mark.parametrize("own", [4, 8, 16, 64])
    def test_grouped(self, twin: ModuleType, own: int, stride: tuple[int, int]) -> None:
        window = Window((3, 3), stride, (1, 1), (1, 1))
        check(Case((8 * own,), out_channels=8 * own, groups=8, size=(9, 11), window=window), twin)

    @pytest.mark.parametrize("groups", [2, 5, 8, 32])
    @pytest.mark.parametrize("own", [2, 4, 8])
    def test_slim_groups(self, twin: ModuleType, own: int, groups: int) -> None:
        channels = own * groups
        case = Case((channels,), (1,), channels, groups, (7, 43), TINY, activation="silu")
        check(case, twin)
        check(replace(case, mask="all", wider=4, bias=False, activation="none"), twin)
        check(replace(case, upsampling=(2,), residual="after", scale=True), twin)
        check(replace(case, window=Window((3, 2), (2, 1), (1, 2), (0, 3)), mask="random"), twin)

    def test_upsampled_and_concatenated_input(self, twin: ModuleType) -> None:
        case = Case((48, 24), (2, 1), out_channels=40, size=(12, 14), activation="relu")
        for mask in ("all", "random"):
            check(replace(case, mask=mask), twin)

    def test_a_map_larger_than_the_input_is_cut(self, twin: ModuleType) -> None:
        # An odd encoder map beside an upsampled one: 2 * 4 = 8 rows for an input of 7.
        check(Case((6, 10), (2, 1), size=(7, 5)), twin)

    @pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
    def test_activations_over_their_range(self, twin: ModuleType, activation: str) -> None:
        x = torch.cat([torch.linspace(-30, 30, 3001), torch.tensor([-1e4, -100, 0, 100, 1e4])])
        x = x.reshape(1, 1, -1, 1)
        out = torch.empty_like(x)
        layer = pointwise(torch.ones(1, 1), activation=activation, slope=0.1)
        with_module(twin, lambda: layer(out, x))
        expected = activated(x.double(), activation).float()
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
        x[0, 0, 0] = math.nan
        with_module(twin, lambda: layer(out, x))
        assert out[0, 0, 0].isnan() and not out[0, 0, 1:].isnan().any()

    @needs_library
    def test_several_threads_change_nothing(self) -> None:
        case = Case((64,), out_channels=96, size=(31, 29), activation="silu", residual="after")
        grouped = Case((96,), out_channels=96, groups=96, size=(63, 65), mask="all")
        slim = Case((64,), out_channels=64, groups=16, size=(63, 65), mask="all")
        few = Case((512,), out_channels=512, size=(2, 2), batch=1, mask="all")
        heavy = Case((64,), out_channels=256, size=(12, 13))
        bundles = Case((64,), out_channels=128, groups=4, size=(12, 13))
        stem = Case((3,), out_channels=64, size=(61, 87), window=STEM, winograd=True, mask="all")
        plain = (case, grouped, slim, few, heavy, bundles, replace(case, winograd=True), stem)
        compressed = [replace(c, compressed=True) for c in plain if c.groups == 1 and c is not stem]
        digits = [replace(c, digits=True) for c in plain if c.groups == 1 and not c.winograd]
        for each in (*plain, *compressed, *digits):
            results = []
            for threads in (1, 2, 5, 70):
                torch.set_num_threads(threads)
                a = each.arguments()
                native.convolution(a)
                results.append(a.out)
            assert all(torch.equal(results[0], others) for others in results[1:])

    @needs_library
    @pytest.mark.skipif(not TASKS.is_dir(), reason="the system does not list threads")
    def test_calls_of_any_size_keep_the_threads(self) -> None:
        torch.set_num_threads(5)
        sizes = (50, 50), (16, 16), (20, 20), (22, 22), (50, 50)  # for 5, 2, 3, 4 and 5 threads
        calls = [Case((16,), out_channels=16, size=size, mask="all").arguments() for size in sizes]
        native.convolution(calls[0])
        before = set(TASKS.iterdir())
        for a in calls:
            native.convolution(a)
        assert set(TASKS.iterdir()) <= before

    @needs_library
    def test_threads_of_its_own(self) -> None:
        library = native.library()
        library.pag_use_openmp(None)
        try:
            torch.set_num_threads(2)
            check(Case((64,), out_channels=96, size=(31, 29)), native)
        finally:
            native.library.cache_clear()
            native.library()  # finds torch's OpenMP runtime again

    def test_several_python_threads_at_once(self, twin: ModuleType) -> None:
        torch.set_num_threads(2)
        many = [
            Case((64,), out_channels=40, size=(15, 13), seed=1),
            Case((3,), out_channels=32, size=(33, 35), seed=2),
            Case((40,), out_channels=40, groups=40, size=(33, 35), seed=3),
            Case((8, 300), (2, 1), out_channels=24, size=(9, 9), seed=4),
            Case((40, 30), (2, 1), out_channels=24, size=(20, 20), winograd=True, seed=5),
            Case((3,), out_channels=24, size=(40, 44), window=STEM, winograd=True, seed=6),
        ]
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda case: check(case, twin), many * 6):
                pass


def pointwise(weight: Tensor, **options: Any) -> kernels.PerforatedConvolution:
    """A linear layer."""
    one = Window((1, 1), (1, 1), (1, 1), (0, 0))
    return kernels.PerforatedConvolution(weight[:, :, None, None], None, window=one, **options)


def with_module(module: ModuleType, function: Callable[[], object]) -> None:
    """Call a function while the operators run on `module`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "backend", lambda: module)
        function()


class TestRows:
    @pytest.mark.parametrize("channels", [1, 7, 16, 63, 96, 768])
    @pytest.mark.parametrize("mask", ["all", "none", "random"])
    def test_layer_norm(self, twin: ModuleType, channels: int, mask: str) -> None:
        x = torch.randn(2, 5, 6, channels + 3)[..., 2 : 2 + channels] + 3
        weight, bias = torch.randn(2, channels)
        open_ = mask_of(mask, (2, 5, 6), 0)
        listed = None if mask == "all" else reference.list_pixels(open_, True)
        expected = torch.where(
            open_[:, 0, :, :, None], F.layer_norm(x, (channels,), weight, bias, 1e-5), x
        )
        out = x.clone()
        twin.layer_norm(out, x, *(listed or (None, None)), weight, bias, 1e-5)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        twin.layer_norm(x, x, *(listed or (None, None)), weight, bias, 1e-5)
        assert torch.equal(x, out)

    @pytest.mark.parametrize("channels", [1, 16, 63, 64, 300])
    def test_masked_mean(self, twin: ModuleType, channels: int) -> None:
        x = torch.randn(3, 40, 41, channels + 3)[..., 2 : 2 + channels] + 1
        mask = torch.rand(3, 1, 40, 41) < 0.6
        mask[1] = False
        kept = x * mask[:, 0, :, :, None]
        expected = kept.double().sum((1, 2)) / mask.sum((1, 2, 3)).clamp_min(1)[:, None]
        mean = twin.masked_mean(x, *reference.list_pixels(mask, True))
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
        mean = twin.masked_mean(x, None, None)
        torch.testing.assert_close(mean.double(), x.double().mean((1, 2)), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("channels", [1, 16, 37])
    @pytest.mark.parametrize("size", [(7, 9), (6, 8), (1, 2), (2, 1), (1, 1), (5, 4)])
    @pytest.mark.parametrize("mask", ["all", "none", "random", "single"])
    def test_interpolate(
        self, twin: ModuleType, channels: int, size: tuple[int, int], mask: str
    ) -> None:
        x = torch.randn(2, *size, channels + 2)[..., 1 : 1 + channels]
        listed = mask_of(mask, (2, *size), 3)
        coarse = pf.coarse(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected = torch.where(listed[:, 0, :, :, None], coarse, x)
        activated = x.clone()
        twin.interpolate(x, *reference.list_pixels(listed, True), "none", 0.0)
        assert torch.equal(x, expected)
        twin.interpolate(activated, *reference.list_pixels(listed, True), "relu", 0.0)
        listed[:, :, ::2, ::2] = False  # those between which others are interpolated
        assert torch.equal(activated, torch.where(listed[:, 0, :, :, None], coarse.relu(), x))
        twin.interpolate(x, None, None, "none", 0.0)
        assert torch.equal(x, coarse)

    @pytest.mark.parametrize("channels", [1, 3, 15, 16, 64, 200])
    @pytest.mark.parametrize(
        "stride, offset", [((1, 1), (0, 0)), ((2, 2), (0, 0)), ((2, 3), (1, 2))]
    )
    def test_gate_mask(
        self, twin: ModuleType, channels: int, stride: tuple[int, int], offset: tuple[int, int]
    ) -> None:
        x = torch.randn(2, 9, 11, channels + 4)[..., 1 : 1 + channels]
        weight, bias = torch.randn(channels), torch.tensor([0.3])
        kept = x[:, offset[0] :: stride[0], offset[1] :: stride[1]]
        logits = kept.double() @ weight.double() + 0.3
        masks: list[Tensor] = []
        with_module(
            twin,
            lambda: masks.append(kernels.gate_mask(x, weight, bias, stride=stride, offset=offset)),
        )
        sure = logits.abs() > 1e-4
        assert masks[0].dtype is torch.bool and masks[0].shape == (2, 1, *logits.shape[1:])
        assert torch.equal(masks[0][:, 0][sure], (logits >= 0)[sure])
        assert sure.float().mean() > 0.9

    @pytest.mark.parametrize("scaled", [True, False])
    @pytest.mark.parametrize("channels", [(3, 16), (40, 5, 7), (1,), (3,), (40,)])
    def test_gate_on_parts(self, twin: ModuleType, channels: tuple[int, ...], scaled: bool) -> None:
        """Maps beside each other, the first of them upsampled, read at every second row."""
        factors = [2, 1, 1][: len(channels)]
        maps = [torch.randn(2, 10 // f, 14 // f, c) for f, c in zip(factors, channels, strict=True)]
        larger = maps[0].repeat_interleave(2, 1).repeat_interleave(2, 2)
        x = torch.cat([larger, *maps[1:]], 3)
        weight, bias = torch.randn(x.shape[3]), torch.tensor([-0.2])
        scale = torch.rand(2, x.shape[3]) if scaled else None
        scales = torch.ones(2, x.shape[3]) if scale is None else scale
        logits = (x * scales[:, None, None]).double()[:, ::2] @ weight.double() - 0.2
        masks: list[Tensor] = []
        with_module(
            twin,
            lambda: masks.append(
                kernels.gate_mask(
                    maps, weight, bias, stride=(2, 1), upsampling=factors, scale=scale
                )
            ),
        )
        sure = logits.abs() > 1e-4
        assert torch.equal(masks[0][:, 0][sure], (logits >= 0)[sure])
        assert sure.float().mean() > 0.9

    @pytest.mark.parametrize("activation", ["relu6", "silu", "leaky_relu"])
    @pytest.mark.parametrize("channels", [1, 3, 16, 40, 64])
    @pytest.mark.parametrize("computed", [None, 98, 99])
    def test_gate_activates_what_was_not(
        self, twin: ModuleType, activation: str, channels: int, computed: int | None
    ) -> None:
        x, weight, bias = 5 * torch.randn(1, 9, 11, channels), torch.randn(channels), torch.zeros(1)
        done = None if computed is None else torch.tensor([computed], dtype=torch.int32)
        seen = x if computed == 99 else activated(x, activation)
        logits = seen[:, ::2, ::2].double() @ weight.double()
        mask = twin.gate(
            [x], weight, bias, (2, 2), (0, 0), (5, 6), [1], None, None, activation, 0.1, done
        )
        sure = logits.abs() > 1e-4
        assert torch.equal(mask[:, 0][sure], (logits >= 0)[sure])

    def test_gate_is_open_at_zero(self, twin: ModuleType) -> None:
        x, nothing = torch.randn(1, 3, 3, 5), torch.zeros(5)
        mask = twin.gate([x], nothing, torch.zeros(1), (1, 1), (0, 0), (3, 3), [1], None, None)
        assert mask.all()

    @pytest.mark.parametrize("keep", [-1, 0, 1, 30, 98, 99, 500])
    @pytest.mark.parametrize("kind", ["random", "ties", "equal", "huge"])
    def test_gate_keeps_the_largest(self, twin: ModuleType, keep: int, kind: str) -> None:
        scores = torch.randn(2, 9, 11)
        if kind == "ties":  # zeros of both signs among them
            scores = (2 * scores).round() / 2 * 0.0 ** (scores > 1)
        elif kind == "equal":
            scores = torch.full_like(scores, -3.0)
        elif kind == "huge":
            scores = scores.sign() * (30 * scores).exp()
        one, none = torch.ones(1), torch.zeros(1)
        masks: list[Tensor] = []
        with_module(
            twin,
            lambda: masks.append(
                kernels.gate_mask(scores[..., None], one, none, keep=torch.tensor([keep]))
            ),
        )
        expected = scores[:, None] >= 0
        if keep >= 0:
            order = scores.flatten(1).sort(dim=1, descending=True, stable=True).indices
            expected = torch.zeros(2, 99, dtype=torch.bool)
            expected.scatter_(1, order[:, :keep], True)
        assert torch.equal(masks[0].flatten(1), expected.flatten(1))

    def test_several_threads_change_nothing(self, twin: ModuleType) -> None:
        x = torch.randn(2, 64, 64, 96)
        mask = torch.rand(2, 1, 64, 64) < 0.5
        pixels, length = reference.list_pixels(mask, True)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = torch.zeros_like(x)
            twin.layer_norm(out, x, pixels, length, None, None, 1e-6)
            gate = twin.gate(
                [x], torch.ones(96), torch.zeros(1), (1, 1), (0, 0), (64, 64), [1], None, None
            )
            results.append((out, twin.masked_mean(x, pixels, length), gate))
        if twin is native:
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestWholeMaps:
    @settings(max_examples=40)
    @given(
        window=windows(),
        size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        channels=st.sampled_from([1, 5, 16, 70]),
        seed=st.integers(0, 9),
    )
    def test_max_pool(
        self, window: Window, size: tuple[int, int], channels: int, seed: int
    ) -> None:
        (kernel, stride, dilation), padding = window[:3], tuple(max(n, 0) for n in window[3])
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            return  # torch refuses them
        if any(
            n + 2 * p < (k - 1) * d + 1
            for n, p, k, d in zip(size, padding, kernel, dilation, strict=True)
        ):
            return
        x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))
        expected = F.max_pool2d(x, kernel, stride, padding, dilation)
        flat = (*kernel, *stride, *dilation, *padding)
        for name in IMPLEMENTATIONS:
            with using(name) as module:
                out = torch.full_like(expected.permute(0, 2, 3, 1), UNTOUCHED).contiguous()
                module.max_pool(out, x.permute(0, 2, 3, 1).contiguous(), flat)
                assert torch.equal(out.permute(0, 3, 1, 2), expected)

    @pytest.mark.parametrize("channels", [3, 600, 1500])
    @pytest.mark.parametrize("way", ["aligned", "centred", "antialiased"])
    @pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 1), (12, 15)])
    @pytest.mark.parametrize("out_size", [(10, 14), (1, 1), (4, 9), (25, 3)])
    def test_resize(
        self,
        twin: ModuleType,
        size: tuple[int, int],
        out_size: tuple[int, int],
        way: str,
        channels: int,
    ) -> None:
        def resized(x: Tensor, to: Sequence[int]) -> Tensor:
            aligned, antialiased = way == "aligned", way == "antialiased"
            return F.interpolate(
                x, tuple(to), mode="bilinear", align_corners=aligned, antialias=antialiased
            )

        x = torch.randn(2, *size, channels + 2)[..., 1 : 1 + channels]
        out = torch.full((2, *out_size, channels), UNTOUCHED)
        taps = [
            Taps.of_matrix(resized(torch.eye(n)[None, None], (m, n))[0, 0])
            for n, m in zip(size, out_size, strict=True)
        ]
        twin.resize(out, x, *taps)
        expected = resized(x.permute(0, 3, 1, 2), out_size).permute(0, 2, 3, 1)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    @given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31 - 1))
    def test_taps_are_the_matrix(self, size: int, out_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(out_size, size, generator=generator)
        matrix *= torch.rand(out_size, size, generator=generator) < 0.4
        taps = Taps.of_matrix(matrix)
        taps.check(size, out_size)
        again = torch.zeros(out_size, size)
        for row, (first, weights) in enumerate(zip(*taps, strict=True)):
            again[row, int(first) : int(first) + taps.reach] = weights
        assert torch.equal(again, matrix)

    @pytest.mark.parametrize(
        "change",
        [
            {"first": torch.tensor([-1, 0], dtype=torch.int32)},
            {"first": torch.tensor([0, 3], dtype=torch.int32)},
            {"first": torch.tensor([0, 1])},
            {"first": torch.zeros(3, dtype=torch.int32)},
            {"weights": torch.ones(2, 2, dtype=torch.float64)},
            {"weights": torch.ones(2, 4)[:, ::2]},
            {"weights": torch.ones(3, 2)},
        ],
    )
    def test_taps_outside_are_refused(self, change: dict[str, Tensor]) -> None:
        fine = Taps(torch.tensor([0, 2], dtype=torch.int32), torch.ones(2, 2))
        x, out = torch.randn(1, 4, 4, 3), torch.zeros(1, 2, 2, 3)
        kernels.resize(out, x, fine, fine)
        for rows, columns in ((fine._replace(**change), fine), (fine, fine._replace(**change))):
            with pytest.raises(PagError, match="taps"):
                kernels.resize(out, x, rows, columns)

    @pytest.mark.parametrize("channels, groups", [(6, 1), (24, 3), (16, 8), (128, 32), (200, 8)])
    @pytest.mark.parametrize("size", [(1, 1), (5, 4), (31, 33)])
    def test_group_norm(
        self, twin: ModuleType, channels: int, groups: int, size: tuple[int, int]
    ) -> None:
        # Far from zero, where squares alone would lose all digits of a variance.
        x = torch.randn(2, *size, channels + 3)[..., 2 : 2 + channels]
        x = 3 * x + 100 * torch.randn(channels // groups).repeat(groups)
        weight, bias = torch.randn(2, channels)
        for affine in ((weight, bias), (None, None)):
            out = torch.full((2, *size, channels), UNTOUCHED)
            doubles = (None if parameter is None else parameter.double() for parameter in affine)
            expected = F.group_norm(x.permute(0, 3, 1, 2).double(), groups, *doubles)
            twin.group_norm(out, x, groups, *affine, 1e-5, "leaky_relu", 0.1)
            expected = F.leaky_relu(expected, 0.1).permute(0, 2, 3, 1).float()
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_group_norm_on_several_threads(self) -> None:
        x = torch.randn(2, 40, 41, 200)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.empty_like(x)
            kernels.group_norm(out, x, 8)
            results.append(out)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    def test_max_pool_passes_nan_on(self, twin: ModuleType) -> None:
        x = torch.randn(1, 4, 4, 20)
        x[0, 1, 1, 3] = torch.nan
        out = torch.empty(1, 2, 2, 20)
        twin.max_pool(out, x, (2, 2, 2, 2, 1, 1, 0, 0))
        assert out.isnan().nonzero().tolist() == [[0, 0, 0, 3]]

    @pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
    def test_activate(self, twin: ModuleType, activation: str) -> None:
        for floats in (1, 15, 16, 1000):
            x = torch.linspace(-9, 9, floats).view(1, 1, 1, -1)
            expected = activated(x, activation)
            twin.activate(x, None, None, activation, 0.1)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("mask", ["all", "none", "random", "single"])
    def test_activate_at_listed_pixels(self, twin: ModuleType, mask: str) -> None:
        x = torch.randn(2, 5, 7, 23)[..., 1:20]
        listed = mask_of(mask, (2, 5, 7), 3)
        expected = torch.where(listed[:, 0, :, :, None], x.relu(), x)
        twin.activate(x, *reference.list_pixels(listed, True), "relu", 0.0)
        assert torch.equal(x, expected)

    @pytest.mark.parametrize("mask", ["all", "none", "random", "single"])
    @pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 20)])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_activation_waits_for_what_lies_between(
        self, twin: ModuleType, mask: str, kernel: int, groups: int, batch: int
    ) -> None:
        """A convolution at all pixels activates them; one at some leaves that to `activate`."""
        listed = mask_of(mask, (batch, 6, 7), 3)
        pixels = kernels.PixelList(*reference.list_pixels(listed, True))
        x, out = torch.randn(batch, 6, 7, 20), torch.full((batch, 6, 7, 20), UNTOUCHED)
        window = Window((kernel,) * 2, (1, 1), (1, 1), (kernel // 2,) * 2)
        weight, bias = torch.randn(20, 20 // groups, kernel, kernel), torch.randn(20)
        layer = kernels.PerforatedConvolution(
            weight, bias, window=window, groups=groups, activation="silu", activate_if_all=True
        )
        with_module(twin, lambda: layer(out, x, pixels))
        sums = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=kernel // 2, groups=groups)
        linear = sums.permute(0, 2, 3, 1)
        here = listed[:, 0, :, :, None]
        expected = F.silu(linear) if listed.all() else torch.where(here, linear, UNTOUCHED)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        twin.activate(out, *pixels, "silu", 0.0, pixels.length)
        expected = torch.where(here, F.silu(linear), UNTOUCHED)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mask", ["all", "random", "checkerboard"])
    @pytest.mark.parametrize("out_channels", [1, 2, 3, 4])
    @pytest.mark.parametrize("channels", [16, 20, 70])
    def test_few_output_channels_of_one_tap(
        self, twin: ModuleType, mask: str, out_channels: int, channels: int
    ) -> None:
        """Enough pixels for dot products, in maps that are slices of wider ones."""
        listed = mask_of(mask, (2, 11, 13), 3)
        x = torch.randn(2, 11, 13, channels + 3)[..., 1 : 1 + channels]
        whole = torch.full((2, 11, 13, out_channels + 2), UNTOUCHED)
        weight, bias = torch.randn(out_channels, channels), torch.randn(out_channels)
        layer = kernels.PerforatedConvolution(
            weight[:, :, None, None], bias, window=Window(*[(1, 1)] * 3, (0, 0)),
            activation="sigmoid",
        )  # fmt: skip
        pixels = kernels.PixelList(*reference.list_pixels(listed, True))
        with_module(twin, lambda: layer(whole[..., 1 : 1 + out_channels], x, pixels))
        expected = torch.full_like(whole, UNTOUCHED)
        here = listed[:, 0, :, :, None]
        result = torch.where(here, (x @ weight.t() + bias).sigmoid(), UNTOUCHED)
        expected[..., 1 : 1 + out_channels] = result
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("pixels", [1, 63, 1000])
    def test_combine_and_copy(self, twin: ModuleType, pixels: int) -> None:
        a, b = torch.rand(2, 1, 1, 1, pixels) < 0.5
        assert torch.equal(twin.combine(a, b, "and"), a & b)
        assert torch.equal(twin.combine(a, b, "or"), a | b)
        assert torch.equal(twin.combine(a, None, "not"), ~a)
        x, out = torch.randn(1, 1, pixels, 3), torch.full((1, 1, pixels, 3), UNTOUCHED)
        twin.copy(out, x)
        assert torch.equal(out, x)
        twin.copy(out, None)
        assert not out.any()

    @pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 4), (1, 300, 300, 2)])
    @pytest.mark.parametrize("gaps", [(2, 0), (0, 5), (3, 3)])
    def test_copy_between_pixels_with_gaps(
        self, twin: ModuleType, shape: tuple[int, ...], gaps: tuple[int, int]
    ) -> None:
        *size, channels = shape
        whole, memory = (torch.full((*size, channels + gap), UNTOUCHED) for gap in gaps)
        out, x = whole[..., :channels], memory[..., :channels].copy_(torch.randn(shape))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            twin.copy(out.zero_(), x)
            assert torch.equal(out, x)
        torch.set_num_threads(1)
        twin.copy(out, None)
        assert not out.any()
        assert (whole[..., channels:] == UNTOUCHED).all()


@needs_library
class TestTape:
    def test_replays_follow_what_is_in_memory(self) -> None:
        """Calls, and Python between them."""
        layer = kernels.PerforatedConvolution(
            torch.randn(8, 4, 3, 3), None, window=Window((3, 3), *[(1, 1)] * 3)
        )
        x, out, mask = torch.randn(1, 5, 6, 4), torch.zeros(1, 5, 6, 8), torch.ones(1, 1, 5, 6) > 0
        tape = kernels.Tape()
        with kernels.record_on(tape):
            kernels.activate(x, "relu")
            tape.then(lambda: x.add_(1))
            x.add_(1)
            layer(out, x, kernels.list_pixels(mask))
        for density in (1.0, 0.5, 0.0):
            new = torch.randn_like(x)
            mask.copy_(torch.rand(mask.shape) < density)
            x.copy_(new)
            out.fill_(UNTOUCHED)
            kernels.replay(tape)
            expected = torch.full_like(out, UNTOUCHED)
            layer(expected, new.relu() + 1, kernels.list_pixels(mask))
            assert torch.equal(out, expected)

    def test_replays_use_other_memory_if_told_to(self) -> None:
        layer = pointwise(torch.randn(8, 4))
        x, out = torch.randn(1, 5, 6, 4), torch.zeros(1, 5, 6, 10)[..., 1:9]
        tape = kernels.Tape()
        with kernels.record_on(tape):
            layer(out, x)
            kernels.activate(out, "relu")
        first, other, apart = out.clone(), torch.zeros(1, 5, 6, 10), torch.randn_like(x)
        places = tape.pointers_into(out._base)
        assert [inside for _, inside in places] == [4, 4]  # one float from the first one
        assert tape.pointers_into(out._base, 1) == places[1:]
        tape.aim(places, other.data_ptr())
        tape.aim(tape.pointers_into(x), apart.data_ptr())
        kernels.replay(tape)
        assert torch.equal(out, first)
        expected = torch.zeros_like(other)
        kernels.activate(layer(expected[..., 1:9], apart), "relu")
        assert torch.equal(other, expected)

    def test_nothing_is_recorded_outside(self) -> None:
        tape = kernels.Tape()
        with kernels.record_on(tape):
            pass
        kernels.activate(torch.ones(1, 1, 1, 1), "relu")
        assert tape.last == -1 and kernels.recording() is None
        kernels.replay(tape)


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = Struct(native._STRUCTURES[1].format + "Pq")
    monkeypatch.setitem(native._STRUCTURES, 1, longer)
    with pytest.raises(PagError, match="bytes for a convolution, expected"):
        native.library.__wrapped__()


class TestLists:
    @given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
        wanted=st.booleans(),
        pattern=st.sampled_from(MASKS),
        dtype=st.sampled_from([torch.bool, torch.float32, torch.uint8]),
        operation=st.sampled_from(["", "and", "or"]),
    )
    def test_list_pixels(
        self,
        shape: tuple[int, int, int],
        wanted: bool,
        pattern: str,
        dtype: torch.dtype,
        operation: str,
    ) -> None:
        mask, other = mask_of(pattern, shape, 0), mask_of("random", shape, 1)
        found = {"": mask, "and": mask & other, "or": mask | other}[operation]
        expected = (found.flatten() == wanted).nonzero()[:, 0]
        combined = (other.to(dtype), operation) if operation else ()
        for module in (reference, operators.backend()):
            pixels, length = module.list_pixels(mask.to(dtype), wanted, *combined)
            assert pixels.dtype is length.dtype is torch.int32
            assert pixels.numel() == mask.numel() and int(length) == expected.numel()
            assert torch.equal(pixels[: int(length)].long(), expected)
            assert not pixels[int(length) :].any()

    @given(
        window=windows(),
        size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        batch=st.integers(1, 2),
        pattern=st.sampled_from(MASKS),
        upsampling=st.sampled_from([1, 1, 2, 4]),
    )
    def test_needed_inputs(
        self, window: Window, size: tuple[int, int], batch: int, pattern: str, upsampling: int
    ) -> None:
        case = Case(size=(size[0] * upsampling, size[1] * upsampling), window=window)
        mask = mask_of(pattern, (batch, *case.out_size()), 0)
        needed = torch.zeros(batch, 1, *size, dtype=torch.bool)
        for b, _, i, j in mask.nonzero().tolist():
            for tap in range(math.prod(window.kernel)):
                y = i * window.stride[0] - window.padding[0]
                y += tap // window.kernel[1] * window.dilation[0]
                x = j * window.stride[1] - window.padding[1]
                x += tap % window.kernel[1] * window.dilation[1]
                y, x = y // upsampling, x // upsampling
                if 0 <= y < size[0] and 0 <= x < size[1]:
                    needed[b, 0, y, x] = True
        assert torch.equal(kernels.needed_inputs(mask, window, size, upsampling), needed)
        flat = tuple(n for pair in window[:4] for n in pair)
        assert torch.equal(reference.needed_inputs(mask, flat, size, upsampling), needed)

    @given(
        entries=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 41), max_size=40),
        length=st.none() | st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 41),
        kind=st.sampled_from(["plain", "depthwise"]),
    )
    def test_bad_lists_are_refused_before_anything_is_written(
        self, entries: list[int], length: int | None, kind: str
    ) -> None:
        case = Case((6,), out_channels=6, groups=6 if kind == "depthwise" else 1, size=(4, 5))
        a = case.arguments()
        pixels = torch.tensor(entries, dtype=torch.int32)
        count = None if length is None else torch.tensor([length], dtype=torch.int32)
        a = a._replace(pixels=pixels, length=count)
        valid = len(entries) if length is None else length
        fine = 0 <= valid <= len(entries) and all(0 <= i < 40 for i in entries[:valid])
        x = a.sources[0]
        for module in (reference, operators.backend()):
            calls: list[Callable[[], object]] = [
                lambda module=module: module.convolution(a),
                lambda module=module: module.layer_norm(a.out, x, pixels, count, None, None, 1e-6),
                lambda module=module: module.masked_mean(x, pixels, count),
                lambda module=module: module.interpolate(a.out, pixels, count, "none", 0.0),
                lambda module=module: module.activate(a.out, pixels, count, "relu", 0.0),
            ]
            for call in calls:
                if fine:
                    call()
                    continue
                a.out.fill_(UNTOUCHED)
                with pytest.raises(PagError, match="expected"):
                    call()
                assert (a.out == UNTOUCHED).all()


class TestArguments:
    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda a: {"out": a.out.double()}, "out is torch.float64"),
            (lambda a: {"out": a.out.transpose(1, 2)}, "strides"),
            (lambda a: {"out": a.out.expand(2, -1, -1, -1)}, "strides"),
            (lambda a: {"out": a.out[:, :, :-1]}, "strides"),
            (lambda a: {"out": a.out[..., :0]}, "neither of them 0"),
            (lambda a: {"sources": []}, "0 sources"),
            (lambda a: {"sources": [*a.sources] * 7, "upsampling": [1] * 7}, "7 sources"),
            (lambda a: {"upsampling": [1, 1]}, "2 upsampling factors"),
            (lambda a: {"upsampling": [3]}, "power of two"),
            (lambda a: {"upsampling": [0]}, "power of two"),
            (lambda a: {"size": [7, 7]}, "does not cover"),
            (lambda a: {"sources": [a.sources[0].repeat(2, 1, 1, 1)]}, "does not cover"),
            (lambda a: {"weights": a.weights[:-1]}, "weights is"),
            (lambda a: {"weights": a.weights.half()}, "weights is"),
            (lambda a: {"weights": a.weights.int()}, "as compress returns it"),
            (lambda a: {"weights": a.weights.to(torch.int8)}, "as in_digits returns it"),
            (lambda a: {"bias": a.bias[:-1]}, "bias is"),
            (lambda a: {"scale": torch.ones(3, 7)}, "scale is"),
            (lambda a: {"input_scale": torch.ones(1, 7)}, "input_scale is"),
            (lambda a: {"groups": 2}, "groups=2"),
            (lambda a: {"groups": 0}, "groups=0"),
            (lambda a: {"activation": "tanh"}, "activation='tanh'"),
            (lambda a: {"window": [3, 3, 0, 1, 1, 1, 1, 1]}, "window="),
            (lambda a: {"window": [3, 3, 1, 1, 1, 1, 2**30, 1]}, "window="),
            (lambda a: {"window": [3, 3, 1, 1, 2**24, 1, 1, 1]}, "window="),
            (lambda a: {"window": [3, 3]}, "window="),
            (lambda a: {"pixels": a.pixels.long()}, "pixels is torch.int64"),
            (lambda a: {"pixels": a.pixels[::2]}, "pixels is"),
            (lambda a: {"length": a.length.expand(2)}, "length is"),
            (lambda a: {"length": a.pixels}, "length has"),
            (lambda a: {"pixels": None}, "length has"),
            (lambda a: {"residual": torch.ones(1, 6, 7, 6)}, "residual"),
            (lambda a: {"residual": torch.ones(2, 3, 7, 7)}, "residual"),
            (lambda a: {"residual": torch.ones(2, 12, 14, 7)}, "residual"),
            (lambda a: {"residual": torch.ones_like(a.out), "accumulate": True}, "residual"),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, change: Callable[[ConvolutionArguments], dict[str, Any]], message: str
    ) -> None:
        a = Case(batch=1).arguments()
        changed = a._replace(**change(a))
        before = a.out.clone()
        with pytest.raises(PagError, match=message):
            OPS.convolution(*changed)
        assert torch.equal(a.out, before)

    def test_groups_take_one_source_unscaled(self) -> None:
        a = Case((4,), out_channels=4, groups=2, batch=1).arguments()
        with pytest.raises(PagError, match="concatenate"):
            OPS.convolution(*a._replace(input_scale=torch.ones(1, 4)))

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda x: kernels.layer_norm(x[..., :3], x), "expected the shape of x"),
            (lambda x: kernels.layer_norm(x, x, weight=torch.ones(3)), "weight is"),
            (lambda x: kernels.masked_mean(x[0]), "x is"),
            (lambda x: kernels.gate_mask(x, torch.ones(3), torch.ones(1)), "weight is"),
            (lambda x: kernels.gate_mask(x, torch.ones(4), torch.ones(1), stride=(0, 1)), "stride"),
            (lambda x: kernels.gate_mask(x, torch.ones(4), torch.ones(1), size=(6, 6)), "inside x"),
            (lambda x: kernels.gate_mask(x, torch.ones(4), torch.ones(1), offset=(9, 0)), "offset"),
            (lambda x: OPS.gate(*decided(x), activation="tanh"), "activation='tanh'"),
            (lambda x: OPS.gate(*decided(x), computed=torch.ones(2)), "computed is"),
            (
                lambda x: kernels.gate_mask(
                    [x, x], torch.ones(8), torch.ones(1), activation="relu"
                ),
                "2 sources: expected one",
            ),
            (lambda x: kernels.list_pixels(x), "mask is"),
            (lambda x: kernels.list_pixels(x[:1, :1], other=x[:1, :1, :1]), "other is"),
            (lambda x: kernels.list_pixels(x[:, :1], other=x[:, :1], operation="not"), "'not'"),
            (lambda x: pointwise(torch.ones(2, 2), activation="tanh"), "activation="),
            (lambda x: kernels.needed_inputs(x[..., :1].mT, TINY, (0, 3)), "mask is|size="),
            (lambda x: kernels.needed_inputs(torch.ones(1, 1, 2, 2), TINY, (0, 3)), "size="),
        ],
    )
    def test_rows_too(self, call: Callable[[Tensor], object], message: str) -> None:
        with pytest.raises(PagError, match=message):
            call(torch.ones(1, 5, 6, 4))

    def test_nothing_to_do(self, twin: ModuleType) -> None:
        empty = torch.empty(0, 5, 6, 4)
        layer = pointwise(torch.ones(4, 4))
        with_module(twin, lambda: layer(torch.empty(0, 5, 6, 4), empty))
        assert twin.masked_mean(empty, None, None).shape == (0, 4)
        twin.layer_norm(empty, empty, None, None, None, None, 1e-6)
        assert (
            twin.gate(
                [empty], torch.ones(4), torch.ones(1), (1, 1), (0, 0), (5, 6), [1], None, None
            ).numel()
            == 0
        )


TINY = Window((3, 3), (1, 1), (1, 1), (1, 1))


@given(
    out_channels=st.integers(1, 70), own=st.integers(1, 9), groups=st.integers(1, 9),
    kernel=PAIRS,
)  # fmt: skip
def test_packing_keeps_every_weight(
    out_channels: int, own: int, groups: int, kernel: tuple[int, int]
) -> None:
    weight = torch.randn(out_channels * groups, own, *kernel)
    packed = pack_weight(weight, groups)
    sizes = (out_channels * groups, own * groups, groups)
    assert packed.shape == (packed_size(*sizes, math.prod(kernel)),)
    assert torch.equal(unpack_weight(packed, *sizes, kernel), weight)


def weight_of_many_sizes(
    out_channels: int, channels: int, kernel: tuple[int, int], seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_channels, channels, *kernel, generator=generator)
    weight *= 10.0 ** torch.randint(-44, 12, (out_channels, 1, 1, 1), generator=generator)
    weight[0] = 0
    return weight


@given(
    out_channels=st.integers(1, 70), channels=st.integers(1, 9), kernel=PAIRS,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_compressing_rounds_to_24_bits(
    out_channels: int, channels: int, kernel: tuple[int, int], seed: int
) -> None:
    weight, taps = weight_of_many_sizes(out_channels, channels, kernel, seed), math.prod(kernel)
    packed = pack_weight(weight)
    words = compress(packed, out_channels, channels, taps)
    begin, size = compressed_sizes(out_channels, packed.numel())
    assert words.shape == (size,)
    assert (words[begin:].view(torch.float32) >= torch.finfo(torch.float32).tiny).all()
    expanded = expand(words, out_channels, channels, taps)
    again = unpack_weight(expanded, out_channels, channels, 1, kernel).double()
    largest = weight.double().abs().amax((1, 2, 3), keepdim=True)
    step = 2.0 ** (largest.log2().floor() - 22).clamp(min=-118)  # or no float
    # Half a step; a whole one for what would round to 2^23 of them.
    assert ((again - weight).abs() <= torch.where(weight.abs() == largest, step, step / 2)).all()
    twice = compress(expanded, out_channels, channels, taps)
    assert torch.equal(expand(twice, out_channels, channels, taps), expanded)


@pytest.mark.parametrize("winograd", [False, True])
def test_compressed_weights_round_about_as_much_as_float32(
    twin: ModuleType, winograd: bool
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 200, 3, 3), torch.randn(1, 200, 20, 20)
    weight *= torch.rand(48, 1, 1, 1) * torch.rand(48, 200, 1, 1) ** 4  # a few large ones
    exact = F.conv2d(x.double(), weight.double(), padding=1).permute(0, 2, 3, 1)
    rows, errors = x.permute(0, 2, 3, 1).contiguous(), []
    for compressed in (False, True):
        layer = kernels.PerforatedConvolution(
            weight, None, window=TINY, winograd=winograd, compressed=compressed
        )
        assert (layer.weights.dtype is torch.int32) == compressed
        y = torch.empty(1, 20, 20, 48)
        with_module(twin, functools.partial(layer, y, rows))
        off = (y - exact).flatten(0, 2).norm(dim=0) / exact.flatten(0, 2).norm(dim=0)
        errors.append(float(off.max()))
    assert errors[1] < 3 * errors[0] < 3e-6


@pytest.mark.parametrize("mask", ["all", "random", "single"])
@pytest.mark.parametrize(
    "case",
    [
        Case((64,), out_channels=16),  # floats: each input is loaded once for three taps
        Case((64,), out_channels=3),  # floats: vectors along the input
        Case((64,), out_channels=3, window=POINTWISE),
        Case((32,), out_channels=48, window=POINTWISE),  # floats: one address for three pixels
        Case((16, 9), upsampling=(2, 1), out_channels=40, winograd=True),  # parts are left out
        Case((3,), out_channels=40),  # the input is copied together
        Case((70,), out_channels=40, activation="gelu", residual="after", scale=True),
    ],
)
def test_compressed_weights_in_every_way(twin: ModuleType, case: Case, mask: str) -> None:
    check(replace(case, size=(12, 40), compressed=True, mask=mask), twin)


@pytest.mark.parametrize("pixels", [1, 14, 15, 16, 17, 23, 28, 29, 42, 43, 57])
@pytest.mark.parametrize(
    "case",
    [
        Case((70,), out_channels=40),
        Case((20, 17), upsampling=(2, 1), out_channels=16, residual="before"),
        Case((33,), out_channels=70, window=POINTWISE, activation="gelu", residual="in place"),
        Case((24,), out_channels=33, input_scale=True, scale=True),
        Case((3,), out_channels=20),
    ],
)
def test_compressed_weights_at_any_number_of_pixels(
    twin: ModuleType, case: Case, pixels: int
) -> None:
    for mask in ("all", "list"):
        check(replace(case, size=(1, pixels), batch=1, compressed=True, mask=mask), twin)
        check(replace(case, size=(pixels, 1), batch=2, compressed=True, mask=mask), twin)


def test_compressed_weights_take_three_quarters() -> None:
    plain, layer = (
        kernels.PerforatedConvolution(torch.randn(64, 32, 3, 3), None, window=TINY, compressed=on)
        for on in (False, True)
    )
    assert layer.weights.nbytes < 0.76 * plain.weights.nbytes
    weights = layer.weights
    layer.replace_weight(torch.ones(64, 32, 3, 3))
    assert layer.weights is weights
    y = layer(torch.empty(1, 4, 4, 64), torch.ones(1, 4, 4, 32))
    assert y[0, 1, 1, 0] == 9 * 32
    kernels.lay_together([plain, layer])
    assert (plain.weights.dtype, layer.weights.dtype) == (torch.float32, torch.int32)
    assert torch.equal(layer(torch.empty(1, 4, 4, 64), torch.ones(1, 4, 4, 32)), y)


def test_only_one_group_may_be_compressed() -> None:
    with pytest.raises(PagError, match="compressed=True with groups=2: expected one group"):
        kernels.PerforatedConvolution(
            torch.randn(4, 2, 3, 3), None, window=TINY, groups=2, compressed=True
        )
    a = Case(channels=(6,), out_channels=6, groups=2).arguments()
    size = compressed_sizes(6, a.weights.numel())[1]
    with pytest.raises(PagError, match="weights from compress with groups=2"):
        operators.check_convolution(a._replace(weights=torch.zeros(size, dtype=torch.int32)))


def test_large_finite_weights_are_compressed() -> None:
    large = torch.ones(256, 512, 1, 1)
    large[7] = 0
    with kernels.using("auto"):
        assert kernels.prefers_compressed(large, 1) == (_has_library() and native.expands())
    assert not kernels.prefers_compressed(large[:255], 1)
    assert not kernels.prefers_compressed(large, 2)
    assert not kernels.prefers_compressed(torch.full((256, 512, 1, 1), torch.inf), 1)
    with kernels.using("reference"):
        assert not kernels.prefers_compressed(large, 1)
    large[3, 3] = 1000.0  # the others would lose most of their bits
    assert not kernels.prefers_compressed(large, 1)


# --- weights and input in digits ------------------------------------------------------------------


@given(
    out_channels=st.integers(1, 70), channels=st.integers(1, 40), kernel=PAIRS,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_digits_round_to_their_step(
    out_channels: int, channels: int, kernel: tuple[int, int], seed: int
) -> None:
    weight, taps = weight_of_many_sizes(out_channels, channels, kernel, seed), math.prod(kernel)
    stored = in_digits(pack_weight(weight), out_channels, channels, taps)
    begin, size = digits_sizes(out_channels, channels, taps)
    assert stored.shape == (size,)
    steps = stored[begin:].view(torch.float32)
    assert (steps >= torch.finfo(torch.float32).tiny).all()
    packed = from_digits(stored, out_channels, channels, taps)
    again = unpack_weight(packed, out_channels, channels, 1, kernel).double()
    step = 256 * steps.double()[:, None, None, None]
    largest = weight.double().abs().amax((1, 2, 3), keepdim=True)
    assert (step <= (largest / 2**22).clamp(min=2.0**-116)).all()
    rounding = weight.abs() * 2.0**-24  # of the result to float32
    assert ((again - weight).abs() <= 0.5001 * step + rounding).all()


@pytest.mark.parametrize("sizes", [(48, 200, 3), (64, 192, 3), (64, 320, 3), (40, 2048, 1)])
def test_digits_round_little(twin: ModuleType, sizes: tuple[int, int, int]) -> None:
    out_channels, channels, side = sizes
    torch.manual_seed(0)
    weight, x = torch.randn(out_channels, channels, side, side), torch.randn(1, channels, 20, 20)
    weight *= torch.rand(out_channels, 1, 1, 1) * torch.rand(out_channels, channels, 1, 1) ** 4
    x = x.relu() * torch.rand(1, channels, 1, 1) ** 4
    exact = F.conv2d(x.double(), weight.double(), padding=side // 2).permute(0, 2, 3, 1)
    rows = x.permute(0, 2, 3, 1).contiguous()
    window = POINTWISE if side == 1 else TINY
    layer = kernels.PerforatedConvolution(weight, None, window=window, digits=True)
    assert layer.weights.dtype is torch.int8
    y = torch.empty(1, 20, 20, out_channels)
    with_module(twin, functools.partial(layer, y, rows))
    off = (y - exact).flatten(0, 2).norm(dim=0) / exact.flatten(0, 2).norm(dim=0)
    assert off.max() < 4e-6  # floats: 1e-6; of numbers as even as most are, digits lose less
    even = torch.randn_like(x)
    exact = F.conv2d(even.double(), torch.ones_like(weight).double(), padding=side // 2)
    layer.replace_weight(torch.ones_like(weight))
    with_module(twin, lambda: layer(y, even.permute(0, 2, 3, 1).contiguous()))
    assert (y - exact.permute(0, 2, 3, 1)).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("mask", ["all", "random", "single", "list"])
@pytest.mark.parametrize(
    "case",
    [
        Case((64,), out_channels=16),  # neighbours share digits
        Case((128,), out_channels=40, window=Window((3, 3), (1, 1), (2, 2), (2, 2))),
        Case((64,), out_channels=33, window=Window((3, 3), (2, 2), (1, 1), (1, 1))),
        Case((64,), out_channels=16, window=Window((3, 3), (2, 2), (2, 2), (2, 2))),
        Case((64, 128), upsampling=(2, 1), out_channels=40, residual="small before"),
        Case((64,), out_channels=48, window=Window((7, 7), (1, 1), (1, 1), (3, 3))),  # in parts
        Case((256,), out_channels=70, activation="gelu", residual="after", scale=True),  # in parts
        Case(
            (192, 64), (1, 1), out_channels=20, activation="relu6", residual="in place"
        ),  # in parts
        Case((64,), out_channels=40, input_scale=True, activation="silu"),
        Case((48,), out_channels=40, activation="relu"),  # copied together: no whole steps
        Case((3,), out_channels=40),
        Case((64, 20), (1, 1), out_channels=40, window=POINTWISE, wider=16),
        Case((1024,), out_channels=65, window=POINTWISE, residual="before", activation="relu"),
    ],
)
def test_digits_in_every_way(twin: ModuleType, case: Case, mask: str) -> None:
    check(replace(case, size=(12, 40), digits=True, mask=mask), twin)


@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 31, 33, 48, 530])
@pytest.mark.parametrize(
    "case",
    [
        Case((64,), out_channels=40),
        Case((64,), out_channels=16, window=Window((7, 7), (1, 1), (1, 1), (3, 3))),
        Case((192,), out_channels=70, window=POINTWISE, activation="gelu", residual="in place"),
        Case((24,), out_channels=33, input_scale=True, scale=True),
        Case((256,), out_channels=70, activation="relu"),  # in parts, some of them padding
    ],
)
def test_digits_at_any_number_of_pixels(twin: ModuleType, case: Case, pixels: int) -> None:
    for mask in ("all", "list"):
        check(replace(case, size=(1, pixels), batch=1, digits=True, mask=mask), twin)
        check(replace(case, size=(pixels, 1), batch=2, digits=True, mask=mask), twin)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31, 1e-20, 1e20])
def test_digits_of_very_small_and_large_numbers(twin: ModuleType, size: float) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(20, 64, 3, 3), torch.randn(20)
    x = size * torch.randn(1, 5, 6, 64)
    layer = kernels.PerforatedConvolution(weight, bias, window=TINY, digits=True)
    y = torch.empty(1, 5, 6, 20)
    with_module(twin, lambda: layer(y, x))
    expected = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(
        y.double(), expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5 * size
    )


def test_many_products_of_digits_do_not_overflow(twin: ModuleType) -> None:
    # All digits are about as large as they get, and of the same sign.
    channels, largest = 1 << 15, 127 * 65536.0
    weight = torch.full((16, channels, 1, 1), -(126 * 65536.0 + 127 * 256 + 127))
    x = torch.full((1, 2, 3, channels), 126 * 65536.0 + 127 * 256 + 127)
    weight[:, 0], x[..., 0] = largest, largest
    layer = kernels.PerforatedConvolution(weight, None, window=POINTWISE, digits=True)
    y = torch.empty(1, 2, 3, 16)
    with_module(twin, lambda: layer(y, x))
    expected = x.double() @ weight[:, :, 0, 0].double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=0)  # floats are less exact


@pytest.mark.parametrize("window", [TINY, POINTWISE])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is(
    twin: ModuleType, window: Window, value: float
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64, *window.kernel), torch.randn(1, 1, 40, 64)
    layer = kernels.PerforatedConvolution(
        weight, None, window=window, activation="relu", digits=True
    )
    y, clean = torch.empty(1, 1, 40, 32), torch.empty(1, 1, 40, 32)
    with_module(twin, lambda: layer(clean, x))
    x[0, 0, 20, 3] = value
    with_module(twin, lambda: layer(y, x))
    reach = window.kernel[1] // 2
    reads = torch.zeros(40, dtype=torch.bool)
    reads[20 - reach : 21 + reach] = True
    torch.testing.assert_close(y[0, 0, ~reads], clean[0, 0, ~reads], rtol=1e-5, atol=1e-4)
    if twin is not reference:
        assert not y[0, 0, reads].isfinite().all()


def test_digits_take_three_quarters() -> None:
    plain, layer = (
        kernels.PerforatedConvolution(torch.randn(64, 64, 3, 3), None, window=TINY, digits=on)
        for on in (False, True)
    )
    assert layer.weights.nbytes < 0.76 * plain.weights.nbytes
    layer.replace_weight(torch.ones(64, 64, 3, 3))
    x = torch.ones(1, 4, 4, 64)
    y = layer(torch.empty(1, 4, 4, 64), x)
    torch.testing.assert_close(y[0, 1, 1, 0], torch.tensor(9 * 64.0))
    kernels.lay_together([plain, layer, plain])
    assert (plain.weights.dtype, layer.weights.dtype) == (torch.float32, torch.int8)
    assert torch.equal(layer(torch.empty(1, 4, 4, 64), x), y)


@pytest.mark.parametrize("other", [{"groups": 2}, {"winograd": True}, {"compressed": True}])
def test_digits_exclude_others(other: dict[str, Any]) -> None:
    with pytest.raises(PagError, match="digits=True with groups="):
        kernels.PerforatedConvolution(
            torch.randn(4, 2, 3, 3), None, window=TINY, digits=True, **other
        )


@pytest.mark.parametrize("groups", [1, 2])
def test_digits_exclude_others_in_the_operator(groups: int) -> None:
    case = Case(channels=(6,), out_channels=6, groups=groups, winograd=groups == 1)
    taps = 16 if groups == 1 else 9
    weights = torch.zeros(digits_sizes(6, 6, taps)[1], dtype=torch.int8)
    with pytest.raises(PagError, match="winograd with weights in digits|in_digits with groups=2"):
        operators.check_convolution(case.arguments()._replace(weights=weights))


def test_sums_of_digits_have_to_fit() -> None:
    a = Case(channels=((1 << 15) + 1,), out_channels=1, window=POINTWISE, digits=True).arguments()
    with pytest.raises(PagError, match="1 taps and 32769 channels: expected at most 32768"):
        operators.check_convolution(a)


def test_what_is_computed_in_digits() -> None:
    weight = torch.ones(16, 64, 3, 3)
    with kernels.using("auto"):
        able = _has_library() and native.multiplies_digits()
        assert kernels.prefers_digits(weight, 1) == able
        assert kernels.prefers_digits(weight[:, :33, :1, :1], 1) == able
    assert not kernels.prefers_digits(weight[:15], 1)
    assert not kernels.prefers_digits(weight[:, :63], 1)
    assert not kernels.prefers_digits(weight[:, :31, :1, :1], 1)
    assert not kernels.prefers_digits(weight, 2)
    assert not kernels.prefers_digits(weight.where(weight > 1, torch.nan), 1)
    with kernels.using("reference"):
        assert not kernels.prefers_digits(weight, 1)
    weight[3, 3] = 1000.0
    assert not kernels.prefers_digits(weight, 1)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
def test_even_weights_are_near_the_middle_of_their_channel(zeros: float) -> None:
    """The middle one of those that are not zero; the lower of two."""
    found = set()
    for count in range(1, 40):
        weight = torch.randn(3, count, 1, 1) ** 3 * (torch.rand(3, count, 1, 1) >= zeros)
        sizes = weight.abs().flatten(1)
        middle = sizes.where(sizes > 0, torch.nan).nanmedian(1).values
        even = not bool((sizes.amax(1) > 128 * middle).any())
        assert perforated._is_even(weight) == even
        found.add(even)
    assert found == ({True} if zeros == 1 else {True, False})


def test_transforming_keeps_every_weight() -> None:
    weight = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(untransformed(transformed(weight)), weight)
    weight = torch.randn(37, 3, 7, 7)
    torch.testing.assert_close(unpack_strided(pack_strided(weight), 37, 3), weight)


def test_winograd_is_for_few_windows() -> None:
    wide = Window((5, 3), (1, 1), (1, 1), (1, 1))
    with pytest.raises(PagError, match="expected kernel 3x3"):
        kernels.PerforatedConvolution(torch.randn(4, 4, 5, 3), None, window=wide, winograd=True)
    a = Case(winograd=True).arguments()
    with pytest.raises(PagError, match="expected kernel 3x3"):
        operators.check_convolution(a._replace(window=[3, 3, 2, 1, 1, 1, 1, 1]))
    with pytest.raises(PagError, match="weights is"):
        operators.check_convolution(a._replace(winograd=False))
    with pytest.raises(PagError, match="at most 4 channels"):
        kernels.PerforatedConvolution(torch.randn(4, 5, 7, 7), None, window=STEM, winograd=True)
    with pytest.raises(PagError, match="with winograd=True and .*: expected stride 1"):
        kernels.PerforatedConvolution(
            torch.randn(4, 3, 7, 7), None, window=STEM, winograd=True, compressed=True
        )
    a = Case((3,), out_channels=4, size=(9, 9), window=STEM, winograd=True).arguments()
    with pytest.raises(PagError, match="no dilation"):
        operators.check_convolution(a._replace(window=[7, 7, 2, 2, 1, 2, 3, 3]))
    words = torch.zeros(compressed_sizes(4, a.weights.numel())[1], dtype=torch.int32)
    with pytest.raises(PagError, match="compressed weights: expected floats"):
        operators.check_convolution(a._replace(weights=words))


@dataclass(frozen=True)
class Pooled:
    """Two convolutions that share the pixels of a map, and a max pool of it."""

    size: tuple[int, int] = (23, 300)
    window: Window = Window((3, 3), (2, 2), (1, 1), (1, 1))  # of the pool
    channels: int = 96
    kernels: tuple[int, int] = (3, 1)
    pattern: str = "random"

    def record(self) -> tuple[kernels.Tape, Tensor, Tensor]:
        """A first pass; the map between and the result."""
        (height, width), (kernel, stride, dilation, padding, *_) = self.size, self.window
        x, between = torch.randn(2, height, width, 3), torch.zeros(2, height, width, self.channels)
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        size = [
            (n + 2 * p - r) // s + 1
            for n, p, r, s in zip(self.size, padding, reach, stride, strict=True)
        ]
        out = torch.zeros(2, *size, self.channels)
        mask = mask_of(self.pattern, (2, height, width), 0)
        layers = [
            kernels.PerforatedConvolution(
                torch.randn(self.channels, 3, k, k),
                torch.randn(self.channels),
                window=Window((k, k), (1, 1), (1, 1), (k // 2, k // 2)),
                activation="relu",
            )
            for k in self.kernels
        ]
        lists = [kernels.PixelList(*native.list_pixels(mask, wanted)) for wanted in (True, False)]
        tape = kernels.Tape()
        with kernels.record_on(tape):
            kernels.in_bands([len(layers), 1])
            for layer, listed in zip(layers, lists, strict=True):
                layer(between, x, listed)
            kernels.max_pool(out, between, self.window)
        assert torch.equal(between.sum(3) > 0, torch.ones(2, height, width) > 0)
        return tape, between, out


@needs_library
class TestPoolsInBands:
    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("pattern", MASKS)
    @pytest.mark.parametrize(
        "window",
        [
            Window((3, 3), (2, 2), (1, 1), (1, 1)),
            Window((2, 2), (2, 2), (1, 1), (0, 0)),
            Window((2, 3), (3, 1), (1, 2), (0, 1)),
            Window((3, 3), (1, 1), (2, 1), (1, 0)),
        ],
    )
    def test_what_is_pooled_need_not_be_written(
        self, threads: int, pattern: str, window: Window
    ) -> None:
        torch.set_num_threads(threads)
        tape, between, out = Pooled(pattern=pattern, window=window).record()
        expected = out.clone()
        for _ in range(2):
            between.fill_(math.nan)
            out.fill_(math.nan)
            kernels.replay(tape)
            assert torch.equal(out, expected)
            assert between.isnan().all() or not WIDE_ROWS_FIT

    @pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 700), (61, 3)])
    def test_any_size(self, size: tuple[int, int]) -> None:
        tape, _, out = Pooled(size=size).record()
        expected = out.clone()
        kernels.replay(tape)
        assert torch.equal(out, expected)

    def test_lists_are_those_of_the_pass(self) -> None:
        tape, between, out = Pooled().record()
        expected = out.clone()
        between.fill_(math.nan)
        for _, kept in tape.calls():
            if kept and isinstance(kept[0], ConvolutionArguments):
                pixels, length = kept[0].pixels, kept[0].length
                assert pixels is not None and length is not None
                listed = pixels[: int(length)].clone()
                pixels[: len(listed)] = listed.flip(0)
        kernels.replay(tape)  # no longer row by row
        assert torch.equal(out, expected) and not between.isnan().any()
        pixels[0] = -1
        with pytest.raises(MemoryError):  # the only fault that is left in a replay
            kernels.replay(tape)

    def test_large_weights_are_not_read_for_every_few_rows(self) -> None:
        tape, between, out = Pooled((9, 9), channels=2048, kernels=(5, 1)).record()
        expected = out.clone()
        between.fill_(math.nan)
        kernels.replay(tape)
        assert torch.equal(out, expected) and not between.isnan().any()


@dataclass(frozen=True)
class Layer:
    """One stage of a run of convolutions: square, with a mask of its own to what it computes."""

    channels: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    padded: bool = True

    @property
    def window(self) -> Window:
        """In both directions alike."""
        padding = (self.kernel - 1) * self.dilation // 2 if self.padded else 0
        n = (self.kernel, self.stride, self.dilation, padding)
        return Window(*((value, value) for value in n))

    def convolution(self, channels: int, winograd: bool = False) -> kernels.PerforatedConvolution:
        """With random weights."""
        groups = self.channels if self.depthwise else 1
        return kernels.PerforatedConvolution(
            torch.randn(self.channels, channels // groups, self.kernel, self.kernel)
            / (channels // groups * self.kernel**2) ** 0.5,
            torch.randn(self.channels),
            window=self.window,
            groups=groups,
            activation="relu6",
            winograd=winograd,
        )


INVERTED = (Layer(96), Layer(96, 3, depthwise=True), Layer(24))


@dataclass(frozen=True)
class Chain:
    """Convolutions that read one another, at the pixels that the last one asks for."""

    layers: tuple[Layer, ...] = INVERTED
    size: tuple[int, int] = (30, 300)
    channels: int = 24
    mask: str = ""  # "": every pixel, without lists
    in_place: bool = False
    winograd: bool = False

    def record(self) -> Recorded:
        """A first pass."""
        x, maps, windows = torch.randn(2, *self.size, self.channels), [], []
        convolutions, channels, size = [], self.channels, self.size
        for layer in self.layers:
            tiles = self.winograd and not layer.depthwise and layer.kernel > 1
            convolutions.append(layer.convolution(channels, tiles))
            window, channels = layer.window, layer.channels
            sizes = [size]
            size = tuple(
                (n + 2 * p - (k - 1) * d - 1) // s + 1
                for n, k, s, d, p in zip(size, *window[:4], strict=True)
            )
            windows.append((window, sizes[0]))
            maps.append(torch.zeros(2, *size, channels))
        if self.in_place:
            maps[-1] = x
        lists: list[kernels.PixelList | None] = [None] * len(maps)
        if self.mask:
            needed = mask_of(self.mask, (2, *size), 0)
            for at in reversed(range(len(maps))):
                lists[at] = kernels.list_pixels(needed)
                needed = kernels.needed_inputs(needed, *windows[at])
        kept, tape = x.clone(), kernels.Tape()
        with kernels.record_on(tape):
            kernels.in_bands([1] * len(maps))
            read = x
            for convolution, written, listed in zip(convolutions, maps, lists, strict=True):
                adds = self.in_place and written is x
                convolution(written, read, listed, epilogue=kernels.Epilogue(accumulate=adds))
                read = written
        return Recorded(tape, x, kept, maps)


@dataclass(frozen=True)
class Recorded:
    """A tape, what its input was, and what it writes."""

    tape: kernels.Tape
    x: Tensor
    kept: Tensor
    maps: list[Tensor]

    def check(self, banded: bool) -> None:
        """Replays give what the first pass gave, and leave maps between alone if `banded`."""
        out, between = self.maps[-1], self.maps[:-1]
        expected = out.clone()
        for _ in range(2):
            out.zero_()
            self.x.copy_(self.kept)
            for written in between:
                written.fill_(math.nan)
            kernels.replay(self.tape)
            assert torch.equal(out, expected)
            left = [bool(written.isnan().all()) for written in between]
            assert left == [banded] * len(left) or (banded and not WIDE_ROWS_FIT)


@needs_library
class TestConvolutionsInBands:
    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("mask", ["", "all", "checkerboard", "random"])
    @pytest.mark.parametrize(
        "layers",
        [
            INVERTED,
            (Layer(96), Layer(96, 3, stride=2, depthwise=True), Layer(24)),
            (Layer(96), Layer(96, 5, depthwise=True)),
            (Layer(96, 3, stride=2), Layer(96, 3, depthwise=True), Layer(16), Layer(96)),
            (Layer(96), Layer(96, 3, dilation=2, depthwise=True), Layer(24)),
            (Layer(96), Layer(96, 3, padded=False, depthwise=True), Layer(32, 3)),
        ],
    )
    def test_maps_between_need_not_be_written(
        self, threads: int, mask: str, layers: tuple[Layer, ...]
    ) -> None:
        torch.set_num_threads(threads)
        Chain(layers, (60, 300), mask=mask).record().check(banded=True)

    def test_tiles_of_listed_pixels(self) -> None:
        layers = (Layer(96, 3), Layer(96, 3, depthwise=True), Layer(32, 3))
        Chain(layers, mask="random", winograd=True).record().check(banded=True)
        Chain(layers, winograd=True).record().check(banded=True)

    @pytest.mark.parametrize("threads", [1, 3, 5])
    @pytest.mark.parametrize("dilation", [1, 2])
    def test_tiles_are_those_of_the_whole_map(self, threads: int, dilation: int) -> None:
        torch.set_num_threads(threads)
        first = Layer(96, 3, dilation=dilation)
        for last in (Layer(96, 3, depthwise=True), Layer(96, 2, stride=3, depthwise=True)):
            Chain((first, last), (59, 300), winograd=True).record().check(banded=True)
            stem = (Layer(96, 7, stride=2), last)
            Chain(stem, (117, 600), channels=3, winograd=True).record().check(banded=True)
            behind = Chain((Layer(4), *stem), (117, 900), channels=3, winograd=True)
            for mask in ("", "random", "checkerboard"):
                replace(behind, mask=mask).record().check(banded=True)

    @pytest.mark.parametrize("mask", ["", "random"])
    def test_a_branch_is_added_in_place(self, mask: str) -> None:
        torch.set_num_threads(1)
        Chain(mask=mask, in_place=True).record().check(banded=True)
        wide = (Layer(96, 3), Layer(96, 3, depthwise=True), Layer(24))  # sees rows that are gone
        recorded = Chain(wide, mask=mask, in_place=True).record()
        recorded.maps[1:-1] = []
        recorded.check(banded=True)

    @pytest.mark.parametrize("mask", ["", "random"])
    def test_threads_do_not_overwrite_what_others_read(self, mask: str) -> None:
        torch.set_num_threads(4)
        recorded = Chain(mask=mask, in_place=True).record()
        recorded.maps[1:-1] = []  # is written, and then added
        recorded.check(banded=True)

    def test_a_result_may_lie_across_the_input(self) -> None:
        torch.set_num_threads(1)
        expand, depthwise, project = (layer.convolution(c) for layer, c in zip(
            INVERTED, (24, 96, 96), strict=True
        ))  # fmt: skip
        memory = torch.randn(31 * 300 * 24)
        line = 300 * 24
        x, out = memory[:-line].view(1, 30, 300, 24), memory[line:].view(1, 30, 300, 24)
        first, second = torch.zeros(1, 30, 300, 96), torch.zeros(1, 30, 300, 96)
        kept, tape = memory.clone(), kernels.Tape()
        with kernels.record_on(tape):
            kernels.in_bands([1, 1, 1])
            expand(first, x)
            depthwise(second, first)
            project(out, second)
        expected = out.clone()
        memory.copy_(kept)
        first.fill_(math.nan)
        kernels.replay(tape)
        assert torch.equal(out, expected)
        assert first.isnan().all() or not WIDE_ROWS_FIT

    @pytest.mark.parametrize("order", [(3, 1), (1, 3)])
    def test_calls_of_a_stage_see_different_windows(self, order: tuple[int, int]) -> None:
        torch.set_num_threads(1)
        x, first, out = (torch.zeros(1, 60, 300, n) for n in (24, 96, 96))
        x.normal_()
        open_pixels = mask_of("random", (1, 60, 300), 0)
        expand = INVERTED[0].convolution(24)
        followers = [Layer(96, kernel, depthwise=True).convolution(96) for kernel in order]
        lists = [
            kernels.PixelList(*native.list_pixels(open_pixels, wanted)) for wanted in (True, False)
        ]
        tape = kernels.Tape()
        with kernels.record_on(tape):
            kernels.in_bands([1, 2])
            expand(first, x)
            for follower, listed in zip(followers, lists, strict=True):
                follower(out, first, listed)
        Recorded(tape, x, x.clone(), [first, out]).check(banded=True)

    def test_a_map_between_may_be_added_to(self) -> None:
        torch.set_num_threads(1)
        x, first, out = (torch.zeros(1, 60, 300, n) for n in (24, 96, 96))
        x.normal_()
        expand, again = (INVERTED[0].convolution(24) for _ in range(2))
        depthwise = INVERTED[1].convolution(96)
        tape = kernels.Tape()
        with kernels.record_on(tape):
            kernels.in_bands([2, 1])
            expand(first, x)
            again(first, x, epilogue=kernels.Epilogue(accumulate=True))
            depthwise(out, first)
        Recorded(tape, x, x.clone(), [first, out]).check(banded=True)

    def test_small_maps_stay_in_the_cache_anyway(self) -> None:
        Chain(size=(12, 20)).record().check(banded=False)
        Chain(mask="single").record().check(banded=False)

    def test_wide_rows_do_not_fit(self) -> None:
        Chain(size=(2, 20_000)).record().check(banded=False)

    def test_other_calls_are_made_one_after_the_other(self) -> None:
        x, first, out = (torch.randn(1, 60, 300, n) for n in (24, 96, 96))
        expand, depthwise = (layer.convolution(c) for layer, c in zip(
            INVERTED[:2], (24, 96), strict=True
        ))  # fmt: skip
        for stages in ([1], [1, 2], [2, 1], [1, 1, 1, 1]):
            tape = kernels.Tape()
            with kernels.record_on(tape):
                kernels.in_bands(stages)
                expand(first, x)
                depthwise(out, first)
            expected = out.clone()
            first.fill_(math.nan)
            kernels.replay(tape)
            assert torch.equal(out, expected) and not first.isnan().any()


@needs_library
@given(
    st.lists(
        st.builds(
            Layer,
            channels=st.sampled_from([40, 64, 96]),
            kernel=st.integers(1, 5),
            stride=st.integers(1, 3),
            dilation=st.integers(1, 2),
            padded=st.booleans(),
        ),
        min_size=2,
        max_size=4,
    ),
    st.tuples(st.integers(30, 60), st.integers(200, 300)),
    st.sampled_from(["", *MASKS]),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_convolutions_in_bands(
    layers: list[Layer], size: tuple[int, int], mask: str, threads: int, depthwise: bool
) -> None:
    torch.set_num_threads(threads)
    second = replace(layers[1], channels=layers[0].channels, depthwise=depthwise)
    recorded = Chain((layers[0], second, *layers[2:]), size, mask=mask).record()
    expected = recorded.maps[-1].clone()
    recorded.maps[-1].zero_()
    for written in recorded.maps[:-1]:
        written.fill_(math.nan)
    kernels.replay(recorded.tape)
    torch.testing.assert_close(recorded.maps[-1], expected)


class Block(nn.Module):
    """A residual block at the pixels that a gate opens: the way a deployed network uses kernels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, second = (0.2 * torch.randn(12, 12, 3, 3, generator=generator) for _ in range(2))
        self.first = kernels.PerforatedConvolution(
            first, torch.ones(12), window=TINY, activation="relu"
        )
        self.second = kernels.PerforatedConvolution(second, None, window=TINY, activation="relu")
        self.register_buffer("gate", torch.randn(12, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        mask = kernels.gate_mask(x, self.gate, x.new_zeros(1))
        halo = kernels.list_pixels(kernels.needed_inputs(mask, TINY, size))
        inner = self.first(self.first.new_output(x, size), x, halo)
        return self.second(
            x.relu(), inner, kernels.list_pixels(mask), epilogue=kernels.Epilogue(accumulate=True)
        )

    def dense(self, x: Tensor) -> Tensor:
        image = x.permute(0, 3, 1, 2)
        first, second = (
            unpack_weight(layer.weights, 12, 12, 1, (3, 3)) for layer in (self.first, self.second)
        )
        inner = F.conv2d(image, first, self.first.bias, 1, 1).relu()
        branch = F.conv2d(inner, second, None, 1, 1) * (x @ self.gate >= 0)[:, None]
        return (image.relu() + branch).relu().permute(0, 2, 3, 1)


def decided(x: Tensor) -> tuple[Any, ...]:
    """Arguments with which a gate decides one pixel of a map."""
    channels = x.shape[-1]
    weight, bias = torch.ones(channels), torch.zeros(1)
    return [x], weight, bias, [1, 1], [0, 0], [1, 1], [1], None, None


class TestOperators:
    def test_block(self, twin: ModuleType) -> None:
        block, x = Block(), torch.randn(2, 7, 9, 12)
        results: list[Tensor] = []
        with_module(twin, lambda: results.append(block(x)))
        torch.testing.assert_close(results[0], block.dense(x), rtol=1e-4, atol=1e-5)

    def test_opcheck(self) -> None:
        a = Case((3, 8), (2, 1), residual="before", scale=True, input_scale=True).arguments()
        x, mask = torch.randn(2, 5, 6, 9), torch.rand(2, 1, 5, 6) < 0.5
        listed = reference.list_pixels(mask, True)
        weight, window = torch.randn(9), [3, 3, 1, 1, 1, 1, 1, 1]
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (OPS.convolution, tuple(a)),
            (OPS.layer_norm, (torch.empty_like(x), x, None, None, weight, None, 1e-6)),
            (OPS.masked_mean, (x, *listed)),
            (OPS.gate, ([x], weight, torch.ones(1), [2, 2], [1, 0], [2, 3], [1], None, None)),
            (
                OPS.gate,
                (
                    [x],
                    weight,
                    torch.ones(1),
                    [1, 1],
                    [0, 0],
                    [5, 6],
                    [1],
                    None,
                    None,
                    "relu",
                    0.0,
                    listed[1],
                ),
            ),
            (OPS.list_pixels, (mask, True)),
            (OPS.list_pixels, (mask, False, mask, "or")),
            (OPS.needed_inputs, (mask, window, [5, 6])),
        ]
        for operator, arguments in calls:
            torch.library.opcheck(operator.default, arguments)

    def test_compile_and_export(self) -> None:
        block, x = Block().eval(), torch.randn(2, 7, 9, 12)
        with torch.inference_mode():
            expected = block(x)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        exported = torch.export.export(block, (x,)).module()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(exported(x), expected)

    def test_coarse_bypass_is_a_depthwise_convolution(self) -> None:
        # The grid of every second pixel, read through 2x upsampling and averaged over 2x2.
        grid = torch.randn(2, 4, 5, 6)
        whole = grid.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :7, :9]
        expected = pf.coarse(whole.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        average = kernels.PerforatedConvolution(
            torch.full((6, 1, 2, 2), 0.25), None, groups=6,
            window=Window((2, 2), (1, 1), (1, 1), (0, 0)),
        )  # fmt: skip
        out = average(average.new_output(grid, (7, 9)), grid, upsampling=[2])
        torch.testing.assert_close(out, expected)

    def test_two_layers_fill_one_map(self) -> None:
        # A concatenation costs nothing where each part is written in place.
        x, whole = torch.randn(1, 4, 5, 8), torch.full((1, 4, 5, 7), UNTOUCHED)
        first, second = pointwise(torch.randn(3, 8)), pointwise(torch.randn(4, 8))
        first(whole[..., :3], x)
        second(whole[..., 3:], x)
        parts = [layer(layer.new_output(x, (4, 5)), x) for layer in (first, second)]
        torch.testing.assert_close(whole, torch.cat(parts, 3))

    def test_copies_and_saved_layers_compute_the_same(self) -> None:
        layer = kernels.PerforatedConvolution(torch.randn(5, 4, 3, 3), torch.randn(5), window=TINY)
        x = torch.randn(1, 6, 6, 4)
        expected = layer(layer.new_output(x, (6, 6)), x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(other.new_output(x, (6, 6)), x), expected)
        assert "4, 5" in repr(layer)


class TestLibrary:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        native.library.cache_clear()
        operators._best_backend.cache_clear()
        yield
        native.library.cache_clear()
        operators._best_backend.cache_clear()

    def test_without_a_library_plain_torch_runs_and_warns_once(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv(native.LIBRARY_VARIABLE, raising=False)
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
        layer, x = pointwise(torch.eye(3)), torch.randn(1, 2, 2, 3)
        with pytest.warns(UserWarning, match="were not built"):
            out = layer(layer.new_output(x, (2, 2)), x)
        assert torch.equal(out, x)
        layer(out, x)  # no second warning: it would be an error
        assert kernels.backend() is reference
        with pytest.raises(PagError, match="not built"):
            kernels.instruction_set()

    def test_a_broken_library_is_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = tmp_path / "broken.so"
        path.write_text("no library")
        monkeypatch.setenv(native.LIBRARY_VARIABLE, str(path))
        with pytest.raises(PagError, match=r"broken\.so cannot be loaded"):
            native.library()

    @needs_library
    def test_instruction_set_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        best = kernels.instruction_set()
        native.library.cache_clear()
        monkeypatch.setenv(native.INSTRUCTION_SET_VARIABLE, "portable")
        assert kernels.instruction_set() == "portable"
        kernels.use_instruction_set(best)
        native.library.cache_clear()
        monkeypatch.setenv(native.INSTRUCTION_SET_VARIABLE, "sse9")
        with pytest.raises(PagError, match="'sse9': expected one of"):
            native.library()
