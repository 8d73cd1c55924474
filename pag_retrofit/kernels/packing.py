"""The layout in which the kernels read weights.

A *block* is up to 32 output channels: a matrix (taps * input channels, 32), or 16 wide where the
last block needs no more, zeros in columns that do not exist. Groups with fewer than 16 output
channels are computed in *bundles* that fill 16 columns as well as they can, with zeros between
groups; larger groups, and ungrouped convolutions, are one bundle each. A depthwise weight is a
matrix (taps, channels rounded up to 16). Taps go row by row, input channels inside a tap.

*Slim* groups, of 2, 4 or 8 input channels and as many output channels, lie by 16 input channels
and by tap: a matrix (channels of a group, 16). Row t holds what each input channel contributes to
that output channel of its group whose number differs from its own by the bits of t: so a vector of
input channels is multiplied as it lies.

A 3x3 weight may be transformed first, to 4x4 (`transformed`), for convolution in tiles of 2x2
output pixels: F(2x2, 3x3) of Lavin & Gray, CVPR 2016 (arXiv 1509.09308). So may a 7x7 weight for
windows two pixels apart, to 9x9 (`pack_strided`): even taps by F(2, 4), odd ones by F(2, 3). Blocks
are 16 wide then, and the parts of an input channel lie column by column.

A packed weight may be compressed (`compress`) to whole numbers of 24 bits, multiples of a step of
each output channel: the power of two with which its largest weight just fits. Weights are off by at
most 2^-23 of that one; adding up products in float32 loses as much. All blocks are 16 wide then.

Or it is held in digits (`in_digits`): whole numbers of a step with which the largest weight of an
output channel just fits, as three digits of 8 bits with signs, for instructions that multiply
matrices of bytes. Blocks are 16 wide, too, and the matrix of each is cut into steps of 64 rows,
filled up with zeros: the high, the middle and the low digits of a step, each (rows / 4, 16, 4).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WIDE, NARROW = 32, 16
WEIGHT_BYTES = 3
_MOST = 2**23 - 1  # of 24 bits, one of them the sign
_LEAST = -95  # exponent, below which what is divided by 256 would lose bits: of weights of 1e-29
_BEHIND = 16  # bytes that may be read behind the last number
_WORDS = 16  # of a cache line, at which the steps begin
_DIGITS, _BASE = 3, 256
_SLIM = (2, 4, 8)
_MOST_IN_DIGITS = 127 * _BASE**2  # a little less than 127, 127, 127
DIGITS_DEPTH, _FOUR = 64, 4  # rows of a step, and those that lie together
MOST_DEPTH_IN_DIGITS = 1 << 15  # rows: so many products of digits still add up in 32 bits
TRANSFORMED_SIDE = 4
TRANSFORMED_PARTS = TRANSFORMED_SIDE**2
_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_BACK = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, -1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
STRIDED_SIDE = 9
_STRIDED_TRANSFORM = (  # even taps at 0, 1, -1, infinity and 2; odd ones at the first four
    (1 / 2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (-1 / 2, 0.0, -1 / 2, 0.0, -1 / 2, 0.0, -1 / 2),
    (-1 / 6, 0.0, 1 / 6, 0.0, -1 / 6, 0.0, 1 / 6),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    (1 / 6, 0.0, 1 / 3, 0.0, 2 / 3, 0.0, 4 / 3),
    (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 1 / 2, 0.0, 1 / 2, 0.0, 1 / 2, 0.0),
    (0.0, 1 / 2, 0.0, -1 / 2, 0.0, 1 / 2, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0),
)


def is_depthwise(out_channels: int, channels: int, groups: int) -> bool:
    """Whether each output channel reads the input channel of its number, and no other."""
    return groups > 1 and groups == channels == out_channels


def packed_size(out_channels: int, channels: int, groups: int, taps: int) -> int:
    """Number of floats of a packed weight."""
    if is_depthwise(out_channels, channels, groups):
        return taps * _rounded(channels)
    if slim := _slim_group(out_channels, channels, groups):
        return taps * slim * _rounded(channels)
    own_columns, own_channels = out_channels // groups, channels // groups
    joined = _joined(own_columns, groups)
    full, rest = divmod(groups, joined)
    size = full * joined * _rounded(joined * own_columns) + rest * _rounded(rest * own_columns)
    return taps * own_channels * size


def pack_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Bring the weight of a convolution into the layout of the kernels.

    Args:
        weight: (out, in / groups, kh, kw).
        groups: Default 1.

    Returns:
        float32, one axis.
    """
    out_channels, own_channels, *kernel = weight.shape
    channels, taps = own_channels * groups, kernel[0] * kernel[1]
    weight = weight.detach().float()
    packed = weight.new_zeros(packed_size(out_channels, channels, groups, taps))
    if slim := _slim_group(out_channels, channels, groups):
        padded = weight.new_zeros(slim, _rounded(channels), taps)
        split = weight.reshape(groups, slim, slim, taps)
        padded[:, :channels] = split.transpose(0, 1).reshape(slim, channels, taps)
        blocks = _turned(padded).view(slim, -1, NARROW, taps)
        packed.view(-1, taps, slim, NARROW).copy_(blocks.permute(1, 3, 0, 2))
        return packed
    rows = weight.permute(2, 3, 1, 0).reshape(taps, own_channels, out_channels)
    for part, columns in _parts(packed, out_channels, channels, groups, taps):
        part.copy_(rows[:, :, columns])
    return packed


def unpack_weight(
    packed: Tensor, out_channels: int, channels: int, groups: int, kernel: tuple[int, int]
) -> Tensor:
    """Undo `pack_weight`: the weight (out, in / groups, kh, kw)."""
    taps = kernel[0] * kernel[1]
    if slim := _slim_group(out_channels, channels, groups):
        blocks = packed.view(-1, taps, slim, NARROW).permute(2, 0, 3, 1)
        split = _turned(blocks.reshape(slim, -1, taps))[:, :channels].unflatten(1, (groups, slim))
        return split.transpose(0, 1).reshape(out_channels, slim, *kernel)
    rows = _rows(packed, out_channels, channels, groups, taps)
    return rows.reshape(*kernel, -1, out_channels).permute(3, 2, 0, 1)


def compressed_sizes(out_channels: int, floats: int) -> tuple[int, int]:
    """Words of a compressed weight: where its steps begin, and how many there are with them."""
    begin = -(-(floats * WEIGHT_BYTES + _BEHIND) // (4 * _WORDS)) * _WORDS
    return begin, begin + out_channels


def compress(packed: Tensor, out_channels: int, channels: int, taps: int) -> Tensor:
    """A packed weight of one group in three quarters of the memory.

    Args:
        packed: By `pack_weight`, finite.
        out_channels: Of the convolution.
        channels: Of its input.
        taps: Of its kernel, or parts of a transformed one.

    Returns:
        int32, one axis: the numbers, three bytes each, and from a cache line on the steps, float32,
        divided by 256.
    """
    begin, size = compressed_sizes(out_channels, packed.numel())
    words = packed.new_zeros(size, dtype=torch.int32)
    steps = words[begin:].view(torch.float32)
    rows = _rows(packed, out_channels, channels, 1, taps)
    numbers = torch.zeros(packed.numel(), dtype=torch.int32)
    for place, columns in _parts(numbers, out_channels, channels, 1, taps, NARROW):
        part = rows[:, :, columns]
        _, exponent = torch.frexp(part.abs().amax((0, 1)))
        step = torch.ldexp(torch.ones(exponent.shape), exponent.clamp(min=_LEAST) - 23)
        place.copy_((part / step).round().clamp(-_MOST, _MOST))
        steps[columns] = step / 256
    stored = numbers.view(torch.uint8).view(-1, 4)[:, :WEIGHT_BYTES].reshape(-1)
    words.view(torch.uint8)[: stored.numel()] = stored
    return words


def expand(words: Tensor, out_channels: int, channels: int, taps: int) -> Tensor:
    """Undo `compress`, up to what it rounded."""
    floats = packed_size(out_channels, channels, 1, taps)
    begin, _ = compressed_sizes(out_channels, floats)
    steps = words[begin:].view(torch.float32)
    numbers = words.new_zeros(floats)
    stored = words.view(torch.uint8)[: floats * WEIGHT_BYTES].view(-1, WEIGHT_BYTES)
    numbers.view(torch.uint8).view(-1, 4)[:, 1:] = stored  # times 256, with its sign
    rows = _rows(numbers, out_channels, channels, 1, taps, NARROW) * steps[:out_channels]
    packed = rows.new_zeros(floats)
    for part, columns in _parts(packed, out_channels, channels, 1, taps):
        part.copy_(rows[:, :, columns])
    return packed


def digits_sizes(out_channels: int, channels: int, taps: int) -> tuple[int, int]:
    """Bytes of a weight in digits: where its steps begin, and how many there are with them."""
    begin = _rounded(out_channels) * -(-channels * taps // DIGITS_DEPTH) * DIGITS_DEPTH * _DIGITS
    return begin, begin + 4 * out_channels


def in_digits(packed: Tensor, out_channels: int, channels: int, taps: int) -> Tensor:
    """A packed weight of one group as digits.

    Args:
        packed: By `pack_weight`, finite.
        out_channels: Of the convolution.
        channels: Of its input.
        taps: Of its kernel.

    Returns:
        int8, one axis: the digits, and behind them the steps, float32, divided by 256.
    """
    rows = _rows(packed, out_channels, channels, 1, taps).reshape(-1, out_channels)
    step = rows.abs().amax(0).double().clamp(min=2.0**_LEAST) / _MOST_IN_DIGITS
    step = step.float().double()
    numbers = (rows.double() / step).round().to(torch.int32)
    begin, size = digits_sizes(out_channels, channels, taps)
    stored = packed.new_zeros(size, dtype=torch.int8)
    stored[begin:].view(torch.float32).copy_(step / 256)
    places = _digit_places(stored[:begin], out_channels)
    padded = numbers.new_zeros(places.shape[2:4].numel() * _FOUR, _rounded(out_channels))
    padded[: len(numbers), :out_channels] = numbers
    for place in reversed(places.unbind(0)):  # the low digits first
        digit = (padded + _BASE // 2) % _BASE - _BASE // 2
        place.copy_(digit.view(*place.shape[1:3], _FOUR, -1, NARROW).permute(3, 0, 1, 4, 2))
        padded = (padded - digit) // _BASE
    return stored


def from_digits(stored: Tensor, out_channels: int, channels: int, taps: int) -> Tensor:
    """Undo `in_digits`, up to what it rounded."""
    begin, _ = digits_sizes(out_channels, channels, taps)
    places = _digit_places(stored[:begin], out_channels).double()
    numbers = (places[0] * _BASE + places[1]) * _BASE + places[2]
    rows = numbers.permute(1, 2, 4, 0, 3).reshape(-1, _rounded(out_channels))
    rows = rows[: taps * channels, :out_channels] * 256 * stored[begin:].view(torch.float32)
    weight = rows.float().reshape(taps, channels, out_channels)
    packed = weight.new_zeros(packed_size(out_channels, channels, 1, taps))
    for part, columns in _parts(packed, out_channels, channels, 1, taps):
        part.copy_(weight[:, :, columns])
    return packed


def _slim_group(out_channels: int, channels: int, groups: int) -> int:
    """Channels of a group if it is slim, else 0."""
    slim = groups > 1 and channels == out_channels and channels // groups in _SLIM
    return channels // groups if slim else 0


def _turned(weight: Tensor) -> Tensor:
    """Turn the weight of slim groups into what the kernels multiply, or back.

    Of (output channel of its group, input channel, taps) it becomes (t, input channel, taps): row t
    is that of output channel t XOR the input channel's place in its group.
    """
    slim = weight.shape[0]
    groups = weight.unflatten(1, (-1, slim)).transpose(1, 2)
    places = torch.arange(slim)
    turned = groups[places[:, None] ^ places, places]
    return turned.transpose(1, 2).flatten(1, 2)


def _digit_places(stored: Tensor, out_channels: int) -> Tensor:
    """Digits as (digit, block, step, fours, column, 4): the high ones first."""
    blocks = _rounded(out_channels) // NARROW
    shape = (blocks, -1, _DIGITS, DIGITS_DEPTH // _FOUR, NARROW, _FOUR)
    return stored.view(shape).movedim(2, 0)


def transformed(weight: Tensor) -> Tensor:
    """A weight (out, in, 3, 3) as (out, in, 4, 4), for tiles of 2x2 output pixels."""
    return _on_both_axes(_TRANSFORM, weight)


def untransformed(weight: Tensor) -> Tensor:
    """Undo `transformed`, up to rounding."""
    return _on_both_axes(_BACK, weight)


def pack_strided(weight: Tensor) -> Tensor:
    """Transform and pack a weight (out, in, 7, 7) for windows two pixels apart: one axis."""
    parts = _on_both_axes(_STRIDED_TRANSFORM, weight)
    padded = parts.new_zeros(_rounded(weight.shape[0]), *parts.shape[1:])
    padded[: weight.shape[0]] = parts
    return padded.unflatten(0, (-1, NARROW)).permute(0, 4, 2, 3, 1).flatten()


def unpack_strided(packed: Tensor, out_channels: int, channels: int) -> Tensor:
    """Undo `pack_strided`, up to rounding."""
    blocks = packed.view(-1, STRIDED_SIDE, channels, STRIDED_SIDE, NARROW)
    parts = blocks.permute(0, 4, 2, 3, 1).flatten(0, 1)[:out_channels]
    back = torch.linalg.pinv(torch.tensor(_STRIDED_TRANSFORM, dtype=torch.float64))
    return _on_both_axes(back, parts)


def _on_both_axes(matrix: tuple[tuple[float, ...], ...] | Tensor, weight: Tensor) -> Tensor:
    transform = torch.as_tensor(matrix, dtype=torch.float64)
    return (transform @ weight.detach().double() @ transform.t()).float()


def _rounded(columns: int) -> int:
    return -(-columns // NARROW) * NARROW


def _joined(own_columns: int, groups: int) -> int:
    """Groups of a bundle."""
    return max(1, NARROW // own_columns) if groups > 1 else 1


def _rows(
    packed: Tensor, out_channels: int, channels: int, groups: int, taps: int, widest: int = WIDE
) -> Tensor:
    """A packed weight as (taps, in / groups, out)."""
    rows = packed.new_empty(taps, channels // groups, out_channels)
    for part, columns in _parts(packed, out_channels, channels, groups, taps, widest):
        rows[:, :, columns] = part
    return rows


def _parts(
    packed: Tensor, out_channels: int, channels: int, groups: int, taps: int, widest: int = WIDE
) -> Iterator[tuple[Tensor, slice]]:
    """Views (taps, in / groups, columns) of a packed weight, with the output channels they hold."""
    if is_depthwise(out_channels, channels, groups):
        yield packed.reshape(taps, 1, -1)[:, :, :channels], slice(0, channels)
        return
    own_columns, own_channels = out_channels // groups, channels // groups
    joined = _joined(own_columns, groups)
    offset = 0
    for first in range(0, groups, joined):
        count = min(joined, groups - first)
        depth = count * own_channels
        for at in range(0, count * own_columns, widest):
            columns = min(widest, count * own_columns - at)
            width = _rounded(columns)
            block = packed[offset : offset + taps * depth * width].reshape(taps, depth, width)
            offset += block.numel()
            for group in range(count):
                begin = max(group * own_columns, at)
                end = min((group + 1) * own_columns, at + columns)
                if begin < end:
                    rows = slice(group * own_channels, (group + 1) * own_channels)
                    start = first * own_columns
                    yield (
                        block[:, rows, begin - at : end - at],
                        slice(start + begin, start + end),
                    )
