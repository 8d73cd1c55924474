"""Procedurally rendered indoor scenes with exact labels, depth, normals and boundaries.

A ray caster in numpy: a closed room with boxes, spheres and cylinders under a point light, seen
by a pinhole camera. All solids are convex, so that a ray meets each in one interval and the
nearest start of an interval (for the room: the nearest end) is what the camera sees.

    draw solids and camera -> trace camera rays -> maps -> textures -> light, shadows -> sensor

World coordinates are in metres, z up, the floor at z = 0. Camera coordinates are those of
OpenCV: x right, y down, z forward along the optical axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .base import PixelDataset, Sample

SCENE_CLASSES = ("floor", "wall", "ceiling", "box", "sphere", "cylinder")
"""The 6 classes, in the order of their label values."""

_FLOOR, _WALL, _CEILING, _BOX, _SPHERE, _CYLINDER = range(6)
_PALETTE = (
    (125, 108, 92),
    (176, 190, 206),
    (238, 232, 213),
    (203, 75, 22),
    (38, 139, 210),
    (133, 153, 0),
)
_HORIZONTAL_VIEW = math.radians(65.0)
_FACES = 6  # of a box; the other solids have fewer
_CAP, _SIDE = 4, 0  # faces of a cylinder: 0 the side, 4 and 5 its ends, as for a box
_CLEARANCE = 0.45  # metres from the camera to the nearest solid, measured on the floor

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Scenes(PixelDataset):
    """Random rooms with boxes, spheres and cylinders, rendered on request.

    Scene `index` depends only on (seed, index): it is the same in every instance, process and
    data set length. Data sets of different seeds share no scene; use one seed for training and
    another for validation. Colours and textures are drawn alike for all classes, so that a class
    shows in shape and context but not in colour.

    Items:
        `image` (3, H, W) float32 in [0, 1]: with shadows, slight blur and sensor noise.
        `label` (H, W) int64: the class at the centre of the pixel; there is no void.
        `depth` (1, H, W) float32: z along the optical axis in metres (not along the ray).
        `normals` (3, H, W) float32: unit normals in the camera frame (x right, y down,
            z forward), towards the camera.
        `boundary` (1, H, W) float32: 1 where one of the four neighbours shows another smooth
            surface, 0 elsewhere. Smooth surfaces are the planes of the room, the faces of a box,
            a sphere, and the side and the two ends of a cylinder. Hence boundaries are all
            discontinuities of depth and of normals, on both of their sides.

    Attributes:
        K: Camera intrinsics, (3, 3) float32, the same for all scenes: square pixels and a
            horizontal view of 65 degrees. A point (X, Y, Z) of the
            camera frame is seen at column `K[0,0] X/Z + K[0,2]` and row `K[1,1] Y/Z + K[1,2]`;
            pixel centres have integer coordinates.

    Args:
        count: Number of scenes.
        size: Height and width in pixels. Default: (96, 128).
        seed: Seed, at least 0. Default: 0.
        cache: Keep rendered scenes in memory: 0.26 MB per scene of the default size, in each
            worker process of a data loader. Default: True.

    Raises:
        ValueError: If the count is below 1.
        ValueError: If a side of the size is below 8 pixels.
        ValueError: If the seed is negative.

    Example:
        >>> scene = Scenes(4, size=(48, 64))[0]
        >>> {key: tuple(value.shape) for key, value in scene.items()}  # doctest: +ELLIPSIS
        {'image': (3, 48, 64), 'label': (48, 64), 'depth': (1, 48, 64), ...}
    """

    classes = SCENE_CLASSES

    def __init__(
        self, count: int, *, size: tuple[int, int] = (96, 128), seed: int = 0, cache: bool = True
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if len(size) != 2 or min(size) < 8:
            raise ValueError(f"size must be (height, width) of at least 8 pixels, got {size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.count = count
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        self.palette = np.array(_PALETTE, dtype=np.uint8)
        self.K = torch.from_numpy(_intrinsics(*self.size)).to(torch.float32)
        self._cache: dict[int, dict[str, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of scenes."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Renders one scene, or takes it from the cache.

        Raises:
            IndexError: If the index is out of range.
        """
        position = self._position(index)
        if self._cache is None:
            maps = _render(self.seed, position, self.size)
        else:
            if position not in self._cache:
                self._cache[position] = _render(self.seed, position, self.size)
            maps = self._cache[position]
        # Each of these copies, so that a caller may write into the tensors.
        return {
            "image": torch.from_numpy(maps["image"]).to(torch.float32).div_(255.0),
            "label": torch.from_numpy(maps["label"]).to(torch.int64),
            "depth": torch.from_numpy(maps["depth"]).clone(),
            "normals": torch.from_numpy(maps["normals"]).clone(),
            "boundary": torch.from_numpy(maps["boundary"]).to(torch.float32),
        }


@dataclass(frozen=True)
class _Solid:
    """A convex solid, or the room, which is a box seen from inside.

    Attributes:
        shape: `_BOX`, `_SPHERE` or `_CYLINDER`; the cylinder's axis is its own z.
        centre: (3,) world coordinates.
        axes: (3, 3), the rows are the solid's own axes in world coordinates.
        half: (3,) half extents along these axes; a radius for the round ones.
    """

    shape: int
    centre: Array
    axes: Array
    half: Array

    @property
    def radius(self) -> float:
        """Radius of the bounding sphere around the centre."""
        if self.shape == _BOX:
            return float(np.linalg.norm(self.half))
        if self.shape == _SPHERE:
            return float(self.half[0])
        return float(math.hypot(self.half[0], self.half[2]))


@dataclass(frozen=True)
class _Scene:
    """What is drawn at random before rendering.

    Attributes:
        room: The room.
        solids: What stands, hangs and flies in it.
        eye: (3,) camera position.
        camera: (3, 3), the rows are the camera's right, down and forward in world coordinates.
        light: (3,) position of the point light.
    """

    room: _Solid
    solids: tuple[_Solid, ...]
    eye: Array
    camera: Array
    light: Array


@dataclass(frozen=True)
class _Hits:
    """First hits of N rays.

    Attributes:
        distance: (N,) in multiples of the ray's direction.
        owner: (N,) 0 for the room, 1 + i for solid i.
        face: (N,) face of the owner, see `_FACES`.
    """

    distance: Array
    owner: Indices
    face: Indices


def _intrinsics(height: int, width: int) -> Array:
    """Intrinsics of a camera with square pixels and the principal point in the middle."""
    focal = 0.5 * width / math.tan(0.5 * _HORIZONTAL_VIEW)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def _render(seed: int, index: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Renders all maps of a scene, channels first; image, label and boundary as uint8."""
    rng = np.random.default_rng((seed, index))
    scene = _draw_scene(rng)
    height, width = size
    intrinsics = _intrinsics(height, width)
    rows, columns = np.mgrid[0:height, 0:width].reshape(2, -1)
    rays = np.stack(
        [
            (columns - intrinsics[0, 2]) / intrinsics[0, 0],
            (rows - intrinsics[1, 2]) / intrinsics[1, 1],
            np.ones(rows.size),
        ],
        axis=1,
    )  # (N, 3); with z = 1 the distance along a ray is the depth
    directions = rays @ scene.camera
    hits = _trace(scene, scene.eye, directions)
    points = scene.eye + hits.distance[:, None] * directions
    normals, coordinates = _surfaces(scene, hits, points)

    footprint = _footprint(hits.distance, directions, normals, intrinsics[0, 0])
    colours = _textures(rng, scene, hits, coordinates, footprint)
    image = _expose(rng, colours * _light(rng, scene, points, normals)[:, None])
    return {
        "image": _sensor(rng, image.reshape(height, width, 3)),
        "label": _labels(scene, hits).astype(np.uint8).reshape(height, width),
        "depth": hits.distance.astype(np.float32).reshape(1, height, width),
        "normals": (scene.camera @ normals.T).astype(np.float32).reshape(3, height, width),
        "boundary": _boundaries((hits.owner * _FACES + hits.face).reshape(height, width))[None],
    }


# --- the random scene ---------------------------------------------------------------------------


def _draw_scene(rng: np.random.Generator) -> _Scene:
    """Draws a room, a camera in it, solids in the camera's view, and a light."""
    half = np.array([rng.uniform(2.2, 4.0), rng.uniform(2.2, 4.0), rng.uniform(1.25, 1.75)])
    room = _Solid(_BOX, np.array([0, 0, half[2]]), np.eye(3), half)
    eye = np.array([*(rng.uniform(-1, 1, 2) * (half[:2] - 0.5)), rng.uniform(0.9, 1.9)])
    # Roughly towards the middle of the room, so that there is space in front of the camera.
    heading = math.atan2(-eye[1], -eye[0]) + rng.normal(0, 0.35)
    camera = _look(heading, rng.uniform(-0.08, 0.42), rng.normal(0, 0.05))

    solids: list[_Solid] = []
    for _ in range(rng.integers(9, 16)):
        for _attempt in range(8):
            solid = _draw_solid(rng, room, eye, heading)
            if _is_free(solid, solids, room, eye):
                solids.append(solid)
                break
    light = np.array([*(rng.uniform(-0.8, 0.8, 2) * half[:2]), 2 * half[2] - 0.4])
    return _Scene(room, tuple(solids), eye, camera, light)


def _look(heading: float, pitch: float, roll: float) -> Array:
    """Camera axes for a heading in the floor's plane, a downward pitch and a roll, in radians."""
    forward = np.array(
        [
            math.cos(heading) * math.cos(pitch),
            math.sin(heading) * math.cos(pitch),
            -math.sin(pitch),
        ]
    )
    right = np.array([math.sin(heading), -math.cos(heading), 0.0])
    down = np.cross(forward, right)
    return np.stack(
        [
            math.cos(roll) * right + math.sin(roll) * down,
            math.cos(roll) * down - math.sin(roll) * right,
            forward,
        ]
    )


def _draw_solid(rng: np.random.Generator, room: _Solid, eye: Array, heading: float) -> _Solid:
    """Draws a solid in front of the camera: standing, flying at any angle, or thin."""
    shape = int(rng.integers(_BOX, _CYLINDER + 1))
    size = math.exp(rng.uniform(math.log(0.08), math.log(0.5)))
    half = size * np.exp(rng.uniform(-0.6, 0.6, 3))
    angle = rng.uniform(0, 2 * math.pi)
    axes = np.array(
        [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    posture = rng.choice(("standing", "flying", "thin"), p=(0.55, 0.2, 0.25))
    if posture == "thin" and shape != _SPHERE:
        half[:2] = rng.uniform(0.015, 0.05, 2)
        half[2] = rng.uniform(0.3, room.half[2])
    if shape == _SPHERE:
        half[:] = half[0] * (0.5 if posture == "thin" else 1.3)
    elif shape == _CYLINDER:
        half[1] = half[0]
    elif posture == "thin" and rng.random() < 0.3:
        half[1] *= 10  # a board
    height = half[2]
    if posture == "flying":
        axes = _random_rotation(rng)
        height = rng.uniform(0.4, 2 * room.half[2] - 0.4)
    distance, bearing = rng.uniform(0.8, 5.0), heading + rng.uniform(-0.6, 0.6)
    place = eye[:2] + distance * np.array([math.cos(bearing), math.sin(bearing)])
    return _Solid(shape, np.array([*place, height]), axes, half)


def _random_rotation(rng: np.random.Generator) -> Array:
    """A uniformly distributed rotation, from a random unit quaternion."""
    w, x, y, z = (quaternion := rng.normal(size=4)) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _is_free(solid: _Solid, others: list[_Solid], room: _Solid, eye: Array) -> bool:
    """Whether a solid lies within the room, away from the camera and touching no other one."""
    # World-aligned bounding box; it bounds round solids too.
    reach = np.abs(solid.axes).T @ solid.half
    if np.any(np.abs(solid.centre - room.centre) + reach > room.half + 1e-9):
        return False
    footing = math.hypot(reach[0], reach[1])
    if math.dist(solid.centre[:2], eye[:2]) < footing + _CLEARANCE:
        return False
    for other in others:
        gap = np.abs(solid.centre - other.centre) - reach - np.abs(other.axes).T @ other.half
        if gap.max() < 0:
            return False
    return True


# --- geometry -----------------------------------------------------------------------------------


def _trace(scene: _Scene, origin: Array, directions: Array) -> _Hits:
    """First hits of rays (N, 3) from one origin in the room; a solid around it is not seen."""
    _, distance, _, face = _box_interval(scene.room.half, origin - scene.room.centre, directions)
    owner = np.zeros(len(directions), dtype=np.int64)
    # Only rays within the cone around a solid's bounding sphere can meet it.
    lengths = np.linalg.norm(directions, axis=1)
    offsets = np.array([solid.centre - origin for solid in scene.solids]).reshape(-1, 3)
    along = offsets @ directions.T  # (number of solids, N)
    for number, solid in enumerate(scene.solids):
        square = float(offsets[number] @ offsets[number])
        if square > solid.radius**2:
            candidates = np.flatnonzero(
                along[number] >= lengths * math.sqrt(square - solid.radius**2)
            )
        else:
            candidates = np.arange(len(directions))
        entry, leave, solid_face = _interval(
            solid, -(solid.axes @ offsets[number]), directions[candidates] @ solid.axes.T
        )
        nearer = (entry < leave) & (entry > 0) & (entry < distance[candidates])
        chosen = candidates[nearer]
        distance[chosen] = entry[nearer]
        owner[chosen] = number + 1
        face[chosen] = solid_face[nearer]
    return _Hits(distance, owner, face)


def _interval(solid: _Solid, origin: Array, directions: Array) -> tuple[Array, Array, Indices]:
    """Where rays, in the solid's own frame, enter and leave it, and the face they enter by.

    A ray misses the solid if it does not enter before it leaves.
    """
    if solid.shape == _BOX:
        entry, leave, face, _ = _box_interval(solid.half, origin, directions)
        return entry, leave, face
    if solid.shape == _SPHERE:
        entry, leave = _round_interval(float(solid.half[0]), origin, directions)
        return entry, leave, np.zeros(len(directions), dtype=np.int64)
    side_entry, side_leave = _round_interval(float(solid.half[0]), origin[:2], directions[:, :2])
    height = solid.half[2:]
    cap_entry, cap_leave, cap, _ = _box_interval(height, origin[2:], directions[:, 2:])
    face = np.where(cap_entry > side_entry, _CAP + cap, _SIDE)
    return np.maximum(cap_entry, side_entry), np.minimum(cap_leave, side_leave), face


def _box_interval(
    half: Array, origin: Array, directions: Array
) -> tuple[Array, Array, Indices, Indices]:
    """Entry and exit of a box around 0 in any dimension, and the faces: 2 axis + (upper side)."""
    # A ray parallel to a face is bent by an amount that no pixel shows.
    directions = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    inverse = 1.0 / directions
    upward = directions > 0
    reach = half * np.abs(inverse)
    middle = -origin * inverse
    near, far = middle - reach, middle + reach
    axis_in, axis_out = near.argmax(axis=1), far.argmin(axis=1)
    every = np.arange(len(directions))
    face_in = 2 * axis_in + ~upward[every, axis_in]
    face_out = 2 * axis_out + upward[every, axis_out]
    return near[every, axis_in], far[every, axis_out], face_in, face_out


def _round_interval(radius: float, origin: Array, directions: Array) -> tuple[Array, Array]:
    """Entry and exit of a disc or ball around 0; the exit is -inf where the ray misses."""
    square = np.maximum(np.einsum("ij,ij->i", directions, directions), 1e-24)
    nearest = -(directions @ origin) / square
    # From the closest approach rather than from b^2 - 4ac, which cancels for small, far solids.
    offset = origin + nearest[:, None] * directions
    room_left = radius**2 - np.einsum("ij,ij->i", offset, offset)
    half_chord = np.sqrt(np.maximum(room_left, 0) / square)
    return nearest - half_chord, np.where(room_left > 0, nearest + half_chord, -np.inf)


def _surfaces(scene: _Scene, hits: _Hits, points: Array) -> tuple[Array, Array]:
    """World normals (N, 3), and texture coordinates (N, 2) in metres along the surface."""
    normals = np.empty_like(points)
    coordinates = np.empty((len(points), 2))
    for number, solid in enumerate((scene.room, *scene.solids)):
        chosen = np.flatnonzero(hits.owner == number)
        if chosen.size == 0:
            continue
        local = (points[chosen] - solid.centre) @ solid.axes.T
        face = hits.face[chosen]
        if solid.shape == _SPHERE:
            normal = local / solid.half
            coordinates[chosen, 0] = np.arctan2(local[:, 1], local[:, 0]) * solid.half[0]
            coordinates[chosen, 1] = np.arcsin(np.clip(normal[:, 2], -1, 1)) * solid.half[0]
        else:
            axis = face // 2
            normal = np.zeros_like(local)
            normal[np.arange(len(local)), axis] = 2.0 * (face % 2) - 1.0
            coordinates[chosen] = np.where(
                (axis == 2)[:, None],
                local[:, :2],
                np.where((axis == 1)[:, None], local[:, ::2], local[:, 1:]),
            )
        if solid.shape == _CYLINDER:
            side = np.flatnonzero(face == _SIDE)
            normal[side] = local[side] / solid.half * (1, 1, 0)
            coordinates[chosen[side], 0] = (
                np.arctan2(local[side, 1], local[side, 0]) * solid.half[0]
            )
            coordinates[chosen[side], 1] = local[side, 2]
        # The room is seen from inside.
        normals[chosen] = (normal if number else -normal) @ solid.axes
    return normals, coordinates


def _labels(scene: _Scene, hits: _Hits) -> Indices:
    """Class of each hit, (N,)."""
    room = np.array([_WALL, _WALL, _WALL, _WALL, _FLOOR, _CEILING])
    solids = np.array([-1, *(solid.shape for solid in scene.solids)])
    return np.where(hits.owner == 0, room[hits.face], solids[hits.owner])


def _boundaries(surfaces: Indices) -> NDArray[np.uint8]:
    """1 where one of the four neighbours belongs to another surface, (H, W)."""
    boundary = np.zeros(surfaces.shape, dtype=np.uint8)
    across = surfaces[:, 1:] != surfaces[:, :-1]
    boundary[:, 1:] |= across
    boundary[:, :-1] |= across
    down = surfaces[1:] != surfaces[:-1]
    boundary[1:] |= down
    boundary[:-1] |= down
    return boundary


# --- appearance ---------------------------------------------------------------------------------


def _footprint(distance: Array, directions: Array, normals: Array, focal: float) -> Array:
    """Size in metres of what a pixel sees of its surface, (N,), for fading textures."""
    lengths = np.linalg.norm(directions, axis=1)
    slant = np.abs(np.einsum("ij,ij->i", directions, normals)) / lengths
    return distance / focal / np.maximum(slant, 0.05)


def _textures(
    rng: np.random.Generator, scene: _Scene, hits: _Hits, coordinates: Array, footprint: Array
) -> Array:
    """Linear RGB reflectance of each hit, (N, 3)."""
    # Materials 0..5 belong to the planes of the room, the others to one solid each.
    count = _FACES + len(scene.solids)
    material = np.where(hits.owner == 0, hits.face, _FACES - 1 + hits.owner)
    extents = [1.0] * _FACES + [2 * float(np.median(solid.half)) for solid in scene.solids]
    period = np.array(extents) * np.exp(rng.uniform(math.log(0.25), math.log(0.9), count))
    kind = rng.integers(0, len(_PATTERNS), count)
    turn = rng.uniform(0, 2 * math.pi, count)
    shift = rng.uniform(0, 64, (count, 2))
    pair = _colour_pairs(rng, count)

    cosine, sine = np.cos(turn), np.sin(turn)
    rotation = np.stack([cosine, sine, -sine, cosine], axis=1).reshape(count, 2, 2)
    turned = np.einsum("nij,nj->ni", rotation[material], coordinates)
    uv = turned / period[material, None] + shift[material]
    noise = _fractal_noise(rng, uv)
    blend = np.empty(len(uv))
    for number, pattern in enumerate(_PATTERNS):
        chosen = np.flatnonzero(kind[material] == number)
        blend[chosen] = pattern(uv[chosen], noise[chosen])
    # Towards the mean where a pixel spans half a period or more: no moire in the distance.
    visible = np.clip(1.5 - 2 * footprint / period[material], 0, 1)
    blend = 0.5 + (blend - 0.5) * visible
    colours = pair[material, 0] + blend[:, None] * (pair[material, 1] - pair[material, 0])
    return colours * (0.85 + 0.3 * noise[:, None])


def _colour_pairs(rng: np.random.Generator, count: int) -> Array:
    """Two linear RGB colours for each material, (count, 2, 3), of any hue and moderate contrast."""
    hue = rng.uniform(0, 2 * math.pi, (count, 1)) + rng.normal(0, 0.5, (count, 2))
    saturation = rng.beta(1.3, 2.6, (count, 1)) * np.ones((1, 2))
    value = rng.uniform(0.2, 0.85, (count, 1)) * np.exp(rng.normal(0, 0.35, (count, 2)))
    wheel = 0.5 + 0.5 * np.cos(hue[..., None] - np.array([0, 2, 4]) * math.pi / 3)
    rgb = value[..., None] * (1 - saturation[..., None] * (1 - wheel))
    return np.clip(rgb, 0.02, 0.95) ** 2.2


def _checker(uv: Array, noise: Array) -> Array:
    return np.floor(uv).sum(axis=1) % 2


def _stripes(uv: Array, noise: Array) -> Array:
    return np.clip(0.5 + 3 * np.sin(2 * math.pi * uv[:, 0]), 0, 1)


def _cloud(uv: Array, noise: Array) -> Array:
    return np.clip(0.5 + 2.2 * (noise - 0.5), 0, 1)


def _wood(uv: Array, noise: Array) -> Array:
    rings = 2.0 * uv[:, 0] + 0.25 * uv[:, 1] + 1.6 * noise
    return (rings - np.floor(rings)) ** 1.5


def _bricks(uv: Array, noise: Array) -> Array:
    row = np.floor(2 * uv[:, 1])
    u = uv[:, 0] + 0.5 * (row % 2)
    in_brick = (np.abs(u - np.floor(u) - 0.5) < 0.46) & (np.abs(2 * uv[:, 1] - row - 0.5) < 0.42)
    return np.where(in_brick, 0.75 * noise, 1.0)


def _plain(uv: Array, noise: Array) -> Array:
    return 0.3 * noise


_PATTERNS = (_checker, _stripes, _cloud, _wood, _bricks, _plain)


def _fractal_noise(rng: np.random.Generator, uv: Array) -> Array:
    """Value noise of three octaves in [0, 1], (N,), repeating every 64 units."""
    lattice = rng.random((64, 64))
    total = np.zeros(len(uv))
    for octave, weight in enumerate((0.5, 0.3, 0.2)):
        scaled = uv * (2 << octave)
        corner = np.floor(scaled)
        x, y = ((t := scaled - corner) * t * (3 - 2 * t)).T
        column, row = corner.astype(np.int64).T & 63
        right, below = (column + 1) & 63, (row + 1) & 63
        top = lattice[row, column] * (1 - x) + lattice[row, right] * x
        bottom = lattice[below, column] * (1 - x) + lattice[below, right] * x
        total += weight * (top * (1 - y) + bottom * y)
    return total


def _light(rng: np.random.Generator, scene: _Scene, points: Array, normals: Array) -> Array:
    """Ambient plus Lambertian light with shadows and a mild falloff, (N,)."""
    ambient = rng.uniform(0.2, 0.4)
    towards = points - scene.light
    distance = np.linalg.norm(towards, axis=1)
    cosine = -np.einsum("ij,ij->i", towards, normals) / np.maximum(distance, 1e-6)
    facing = np.flatnonzero(cosine > 0)
    diffuse = np.zeros(len(points))
    # A lit point is the first thing that the ray from the light meets, at distance 1.
    lit = facing[_trace(scene, scene.light, towards[facing]).distance > 1 - 1e-6]
    diffuse[lit] = cosine[lit] / (1 + (distance[lit] / 4) ** 2)
    # Surfaces that look up get a little more ambient light than those that look down.
    return ambient * (1 + 0.3 * normals[:, 2]) + diffuse


def _expose(rng: np.random.Generator, radiance: Array) -> Array:
    """Scales to a random mean brightness, rolls highlights off, and tints the light."""
    tint = np.exp(rng.normal(0, 0.06, 3))
    target = rng.uniform(0.24, 0.42)
    exposed = radiance * tint * (target / max(float(radiance.mean()), 1e-6))
    return exposed / (1 + 0.5 * exposed)


def _sensor(rng: np.random.Generator, linear: Array) -> NDArray[np.uint8]:
    """A lens's blur, display gamma, noise and quantisation: (H, W, 3) linear to (3, H, W)."""
    padded = np.pad(linear, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.15 * (padded[:-2] + padded[2:]) + 0.7 * padded[1:-1]
    blurred = 0.15 * (rows[:, :-2] + rows[:, 2:]) + 0.7 * rows[:, 1:-1]
    image = blurred ** (1 / 2.2)
    image += rng.uniform(0.005, 0.02) * rng.standard_normal(image.shape, dtype=np.float32)
    quantised = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(quantised.transpose(2, 0, 1))
