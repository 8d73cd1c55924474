"""Surface normals from depth: planes fitted to what lies around each pixel."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import channels_first

_FAR = 0.05  # relative depth difference to the pixel itself beyond which a neighbour is left out
_OFF_PLANE = 0.01  # and, in the second fit, to the plane of the first
_FEWEST = 0.3  # share of the window that has to take part
_RIDGE = 1e-9


def normals_from_depth(
    depth: Tensor, intrinsics: Tensor, *, radius: int = 4, step: int = 2
) -> Tensor:
    """Unit normals that face the camera.

    The inverse depth of a plane is linear in pixel coordinates, so a least-squares fit to the
    inverse depths in a window gives the plane. It is done twice: first with all neighbours that
    are about as far away as the pixel, then with those that lie on the plane found.

    Args:
        depth: Metres (1, H, W), 0 where there is no reading.
        intrinsics: (3, 3) in pixels; a pixel's centre has whole coordinates.
        radius: Of the window, pixels. Default 4.
        step: Between pixels of the window that are looked at. Default 2.

    Returns:
        (3, H, W) float32 in the camera frame (x right, y down, z forward); 0 where the pixel has
        no reading, or too few neighbours on one plane.
    """
    known = depth > 0
    inverse = torch.where(known, 1 / depth.double().clamp(min=1e-6), 0.0)
    offsets = [
        (down, right)
        for down in range(-radius, radius + 1, step)
        for right in range(-radius, radius + 1, step)
    ]
    plane = torch.cat((torch.zeros_like(inverse).repeat(2, 1, 1), inverse))  # slopes, value
    for limit in (_FAR, _OFF_PLANE):
        plane, share = _fit(inverse, known, plane, offsets, limit)
    focal = torch.stack((intrinsics[0, 0], intrinsics[1, 1])).double()
    height, width = depth.shape[1:]
    rows = torch.arange(height, dtype=torch.float64).view(-1, 1)
    columns = torch.arange(width, dtype=torch.float64).view(1, -1)
    # 1/z = (n . ray) / distance, and ray = ((u - cx) / fx, (v - cy) / fy, 1).
    x, y = plane[0] * focal[0], plane[1] * focal[1]
    z = plane[2] - (columns - intrinsics[0, 2]) * plane[0] - (rows - intrinsics[1, 2]) * plane[1]
    normal = -torch.stack((x, y, z))
    good = known & (share >= _FEWEST) & (normal.norm(dim=0, keepdim=True) > 0)
    return torch.where(good, F.normalize(normal, dim=0), 0.0).float()


def normals_from_colours(
    colours: np.ndarray, missing: int, axes: tuple[int, int, int] = (1, 1, 1)
) -> Tensor:
    """Unit normals that are stored as 8-bit colours around 127.5.

    Args:
        colours: (H, W, 3) uint8.
        missing: Value of all channels where there is no normal.
        axes: 1, or -1 where a channel points the other way. Default: all 1.

    Returns:
        (3, H, W) float32; 0 where there is none.
    """
    there = (colours != missing).any(-1, keepdims=True)
    vectors = (colours.astype(np.float32) - 127.5) * np.array(axes, dtype=np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)  # never 0: no value is 127.5
    return channels_first(np.where(there, vectors / length, np.float32(0)))


def _fit(
    inverse: Tensor,
    known: Tensor,
    plane: Tensor,
    offsets: list[tuple[int, int]],
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Fit planes to the neighbours near given ones; planes (3, H, W) and the share that took part.

    Args:
        inverse: Inverse depth (1, H, W).
        known: Where there is one.
        plane: Slopes along columns and rows, and the value at the pixel, (3, H, W).
        offsets: Of neighbours, (down, right).
        limit: Largest relative difference from the given plane.
    """
    margin = max(max(abs(down), abs(right)) for down, right in offsets)
    padded = F.pad(torch.where(known, inverse, torch.nan), (margin,) * 4, value=torch.nan)
    height, width = inverse.shape[1:]
    moments = inverse.new_zeros(9, height, width)  # of 1, u, v, uu, uv, vv, w, wu, wv
    for down, right in offsets:
        there = padded[:, margin + down :, margin + right :][:, :height, :width]
        expected = plane[2:] + right * plane[:1] + down * plane[1:2]
        near = (there - expected).abs() < limit * expected.abs()  # False where not known
        value = torch.where(near, there, 0.0)[0]
        one = near[0].double()
        for moment, term in zip(
            moments,
            (1, right, down, right * right, right * down, down * down),
            strict=False,
        ):
            moment += term * one
        moments[6] += value
        moments[7] += right * value
        moments[8] += down * value
    count, u, v, uu, uv, vv, w, wu, wv = moments
    matrix = torch.stack((uu, uv, u, uv, vv, v, u, v, count), -1).unflatten(-1, (3, 3))
    side = torch.stack((wu, wv, w), -1)
    matrix = matrix + _RIDGE * torch.eye(3, dtype=torch.float64)
    solved = torch.linalg.solve(matrix, side)  # (H, W, 3)
    return solved.permute(2, 0, 1), (count / len(offsets))[None]
