"""From a scene to pixels: each solid by the distance to its outline, with soft edges and a light from the upper left.

    coverage = clip(1/2 - d, 0, 1)                                                                                  (1)

with d the signed distance to the outline in pixels, negative inside: the share of a pixel that the solid covers, to
first order. Solids are laid over each other from back to front with (1) as their opacity.
"""

from typing import NamedTuple

import numpy as np

from diffjax.data.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Object, Scene

SIDE = 64  # pixels


class Picture(NamedTuple):
    """A scene drawn. In `segmentation` 0 is the background and i the i-th object of the scene where it is seen."""

    image: np.ndarray  # uint8 [H, W, 3]
    segmentation: np.ndarray  # uint8 [H, W]
    edges: np.ndarray  # uint8 [H, W], 255 where what is seen changes to the right or below
    boxes: np.ndarray  # float32 [objects, 4]: top, left, bottom, right as fractions, of the whole object


def draw(scene: Scene, side: int = SIDE) -> Picture:
    """The scene at `side` x `side` pixels."""
    grid = (np.arange(side, dtype=np.float64) + 0.5) / side
    y, x = np.meshgrid(grid, grid, indexing='ij')
    image = background(scene.background, x, y)
    reach = REACH + 1 / side  # nothing of a solid lies farther out
    segmentation = np.zeros((side, side), np.uint8)
    boxes = np.zeros((len(scene.objects), 4), np.float32)
    for i, thing in enumerate(scene.objects):
        around = tuple(
            slice(max(int((centre - reach * thing.radius) * side), 0), int((centre + reach * thing.radius) * side) + 2)
            for centre in (thing.y, thing.x)
        )
        coverage, shaded = layer(thing, x[around], y[around], 1 / side)
        image[around] += coverage * (shaded - image[around])
        seen = coverage[..., 0] > 0.5
        segmentation[around][seen] = i + 1
        offset = [part.start / side for part in around]
        boxes[i] = np.add(_box(seen, side), offset * 2)
    return Picture(np.rint(image).astype(np.uint8), segmentation, edge_map(segmentation), boxes)


def layer(thing: Object, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """(opacity [..., 1] by (1), colour [..., 3]) of a solid at points [...] of a picture; pixel: their distance."""
    distance, light = solid(thing, x, y)
    coverage = np.clip(0.5 - distance * thing.radius / pixel, 0, 1)[..., None]
    color = np.array(list(COLORS.values())[thing.color], np.float64)
    shaded = color * np.clip(light, 0, 1)[..., None] + 70 * np.clip(light - 1, 0, 1)[..., None]
    return coverage, np.clip(shaded, 0, 255)


def background(background, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Flat, or a linear gradient over the picture along the angle. [H, W, 3] float64."""
    first, second = (np.array(BACKGROUNDS[name], np.float64) for name in (background.first, background.second))
    cos, sin = np.cos(background.angle), np.sin(background.angle)
    along = ((x - 0.5) * cos + (y - 0.5) * sin) / (abs(cos) + abs(sin)) + 0.5  # 0 and 1 at opposite corners
    return first + along[..., None] * (second - first)


def edge_map(segmentation: np.ndarray) -> np.ndarray:
    edges = np.zeros(segmentation.shape, bool)
    edges[:, :-1] |= segmentation[:, 1:] != segmentation[:, :-1]
    edges[:-1] |= segmentation[1:] != segmentation[:-1]
    return np.where(edges, 255, 0).astype(np.uint8)


def _box(seen: np.ndarray, side: int) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return rows[0] / side, columns[0] / side, (rows[-1] + 1) / side, (columns[-1] + 1) / side


# Solids, in coordinates where the object has radius 1: (u right, v down) -> (distance, light). Light 1 is the colour
# itself; above 1 it turns towards white.


def _polygon(u: np.ndarray, v: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Distance to a convex polygon whose corners run clockwise on the screen: the largest of those to its sides."""
    sides = []
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
        length = np.hypot(x1 - x0, y1 - y0)
        sides.append(((u - x0) * (y1 - y0) - (v - y0) * (x1 - x0)) / length)
    return np.maximum.reduce(sides)


def _ellipse(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    """Distance to an ellipse around 0, to first order: the implicit function over the length of its gradient."""
    level = np.hypot(u / a, v / b)
    return level * (level - 1) / np.maximum(np.hypot(u / a**2, v / b**2), 1e-9)


def _sphere(u, v):
    bright = 1.25 - 0.75 * np.hypot(u + 0.35, v + 0.35)
    return np.hypot(u, v) - 1, bright


def _cube(u, v):
    """A cube seen along its diagonal: a hexagon of three faces."""
    c = np.sqrt(3) / 2
    distance = _polygon(u, v, [(0, -1), (c, -0.5), (c, 0.5), (0, 1), (-c, 0.5), (-c, -0.5)])
    top = np.clip(0.5 - 20 * (v + np.abs(u) / np.sqrt(3)), 0, 1)
    right = np.clip(0.5 + 20 * u, 0, 1)
    return distance, top * 1.25 + (1 - top) * (right * 0.6 + (1 - right) * 0.9)


def _cone(u, v):
    triangle = _polygon(u, v, [(0, -1), (0.85, 0.7), (-0.85, 0.7)])
    base = _ellipse(u, v - 0.7, 0.85, 0.28)
    across = u / np.maximum(0.5 * (v + 1), 0.15)
    return np.minimum(triangle, base), 1.05 - 0.4 * np.clip(across, -1, 1)


def _cylinder(u, v):
    wall = _polygon(u, v, [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)])
    lid, bottom = _ellipse(u, v + 0.7, 0.7, 0.27), _ellipse(u, v - 0.7, 0.7, 0.27)
    on_lid = np.clip(0.5 - 20 * lid, 0, 1)
    return np.minimum(np.minimum(wall, lid), bottom), on_lid * 1.3 + (1 - on_lid) * (0.95 - 0.45 * u)


REACH = 1.05  # of any solid from its centre, in radii
SOLIDS = {'cube': _cube, 'sphere': _sphere, 'cone': _cone, 'cylinder': _cylinder}


def solid(thing: Object, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distance to the outline in radii, light) of an object at points of the picture."""
    return SOLIDS[SHAPES[thing.shape]]((x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
