"""Pictures and clips of scenes: flat shapes on a near-white ground, with soft edges and a little chance in everything."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes import Clip, Item, Scene


# All lengths are in pixels of a picture of this size.
CANVAS_SIZE = 32
# Where the centre of an object is (x, y), but for a shift of up to so much in both.
CENTRES = {
    "top left": (8.0, 8.0),
    "top right": (24.0, 8.0),
    "middle": (16.0, 16.0),
    "bottom left": (8.0, 24.0),
    "bottom right": (24.0, 24.0),
}
MAX_SHIFT = 1.0
# From edge to edge, and how much more or less it may be.
DIAMETERS = {"small": 8.0, "large": 13.0}
MAX_GROWTH = 0.5
# Red, green, blue, 0 to 255, and how much each may differ; far enough from both ends for that.
PALETTE = {
    "red": (215, 22, 40),
    "green": (28, 150, 50),
    "blue": (35, 75, 220),
    "yellow": (246, 225, 35),
    "orange": (245, 125, 15),
    "purple": (140, 45, 175),
    "cyan": (35, 200, 225),
    "black": (28, 28, 32),
}
MAX_TINT = 8.0
# Lowest and highest grey of the ground.
GROUND = (240.0, 252.0)

# Samples per pixel, in both directions.
_SAMPLES = 2
# Half the width of an edge, in pixels.
_SOFT = 0.5 / _SAMPLES
# How far the corners of a shape may be from its centre, in radii: as far as it reaches while it turns.
_MAX_REACH = math.sqrt(2)
# Painted around the canvas and cut off: a large heart that turns reaches a little over the edge.
_MARGIN = 4


@dataclass(frozen=True)
class Figure:
    """An object with everything that chance decides: what is painted.

    Args:
        shape: one of `SHAPES`.
        x, y: centre, pixels to the right and down.
        diameter: pixels from edge to edge.
        colour: red, green, blue, 0 to 255.
        angle: clockwise, in turns.
    """

    shape: str
    x: float
    y: float
    diameter: float
    colour: tuple[float, float, float]
    angle: float = 0.0


def compute_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far points are from the edge of a shape that fills the square from -1 to 1.

    Args:
        shape: one of `SHAPES`.
        u, v: to the right and down; of shapes that broadcast together.

    Returns:
        Negative inside, of the broadcast shape; exact near an edge, a bound of the right sign elsewhere.
    """
    side, height = np.abs(u), np.abs(v)
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(side, height) - 0.92
    if shape == "triangle":
        return np.maximum((2 * side - v - 1) / math.sqrt(5), v - 1)
    if shape == "diamond":
        return (side + height - 1) / math.sqrt(2)
    if shape == "cross":
        return np.maximum(np.minimum(side, height) - 0.34, np.maximum(side, height) - 1)
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.76) - 0.24
    # A heart: two round lobes above, and a wedge whose sides touch them.
    lobes = np.hypot(side - 0.5, v + 0.4) - 0.5
    wedge = np.maximum((side - 0.72 * (1 - v)) / math.hypot(1, 0.72), np.maximum(side - 0.96, -0.4 - v))
    return np.minimum(lobes, wedge)


def compute_coverage(figure: Figure, scale: int = 1) -> tuple[int, int, np.ndarray]:
    """How much of each pixel a figure covers.

    Args:
        figure: what is painted, in pixels of the canvas.
        scale: pixels of the picture per pixel of the canvas.

    Returns:
        First row and first column of the pixels that it can reach, and the coverage of these, float64 from 0 to 1,
        `(height, width)`.
    """
    radius = figure.diameter / 2 * scale
    reach = radius if figure.angle == 0 else radius * _MAX_REACH
    spans = []
    for centre in (figure.y * scale, figure.x * scale):
        first, last = math.floor(centre - reach - _SOFT), math.ceil(centre + reach + _SOFT)
        points = first + (np.arange((last - first) * _SAMPLES) + 0.5) / _SAMPLES
        spans.append((first, (points - centre) / radius))
    (top, v), (left, u) = spans
    v, u = v[:, None], u[None, :]
    if figure.angle:
        cos, sin = math.cos(2 * math.pi * figure.angle), math.sin(2 * math.pi * figure.angle)
        u, v = cos * u + sin * v, cos * v - sin * u
    # A sample at the edge is half covered: the picture changes smoothly as the figure moves.
    samples = (0.5 - compute_distance(figure.shape, u, v) * radius * _SAMPLES).clip(0, 1)
    height, width = samples.shape[0] // _SAMPLES, samples.shape[1] // _SAMPLES
    coverage = samples.reshape(height, _SAMPLES, width, _SAMPLES).mean(axis=(1, 3))
    return top, left, coverage


def paint(figures: Sequence[Figure], ground: float, size: int = CANVAS_SIZE) -> Image.Image:
    """The picture of some figures, later ones over earlier ones.

    Args:
        figures: all within the canvas.
        ground: its grey, 0 to 255.
        size: of the picture in pixels, a multiple of `CANVAS_SIZE`.

    Returns:
        RGB picture of size x size pixels.
    """
    scale = size // CANVAS_SIZE
    margin = _MARGIN * scale
    canvas = np.full((size + 2 * margin, size + 2 * margin, 3), float(ground))
    for figure in figures:
        top, left, coverage = compute_coverage(figure, scale)
        height, width = coverage.shape
        patch = canvas[top + margin : top + margin + height, left + margin : left + margin + width]
        patch += coverage[:, :, None] * (np.asarray(figure.colour) - patch)
    picture = canvas[margin : margin + size, margin : margin + size]
    return Image.fromarray((picture + 0.5).astype(np.uint8))


@dataclass(frozen=True)
class _Chance:
    """What chance decides about one object; the same in every frame of a clip."""

    shift: tuple[float, float]
    growth: float
    tint: tuple[float, float, float]

    @classmethod
    def draw(cls, rng: random.Random) -> "_Chance":
        shift = (rng.uniform(-MAX_SHIFT, MAX_SHIFT), rng.uniform(-MAX_SHIFT, MAX_SHIFT))
        growth = rng.uniform(-MAX_GROWTH, MAX_GROWTH)
        tint = (rng.uniform(-MAX_TINT, MAX_TINT), rng.uniform(-MAX_TINT, MAX_TINT), rng.uniform(-MAX_TINT, MAX_TINT))
        return cls(shift, growth, tint)

    def get_figure(self, item: Item) -> Figure:
        (x, y), (red, green, blue) = CENTRES[item.place], PALETTE[item.colour]
        return Figure(
            item.shape,
            x + self.shift[0],
            y + self.shift[1],
            DIAMETERS[item.size] + self.growth,
            (red + self.tint[0], green + self.tint[1], blue + self.tint[2]),
        )


def _check_size(size: int) -> None:
    if size <= 0 or size % CANVAS_SIZE:
        raise ValueError(f"size of the picture: got {size}, expected a multiple of {CANVAS_SIZE}")


def render_scene(scene: Scene, rng: random.Random, size: int = CANVAS_SIZE) -> Image.Image:
    """Paint a scene. Objects stay within the quarters of their places, so they never overlap.

    Args:
        scene: what is shown.
        rng: position, size and colour of each object and the grey of the ground vary a little with it.
        size: of the picture in pixels, a multiple of 32.

    Returns:
        RGB picture of size x size pixels.

    Raises:
        ValueError: if the size is no such multiple.
    """
    _check_size(size)
    ground = rng.uniform(*GROUND)
    return paint([_Chance.draw(rng).get_figure(item) for item in scene.items], ground, size)


def _blend(start: Figure, end: Figure, share: float, turns: float) -> Figure:
    def between(a: float, b: float) -> float:
        return a + share * (b - a)

    red, green, blue = (between(a, b) for a, b in zip(start.colour, end.colour, strict=True))
    x, y = between(start.x, end.x), between(start.y, end.y)
    # A whole turn is none: the last frame is then exactly the first.
    return Figure(start.shape, x, y, between(start.diameter, end.diameter), (red, green, blue), share * turns % 1)


def render_clip(clip: Clip, rng: random.Random, num_frames: int = 8, size: int = CANVAS_SIZE) -> list[Image.Image]:
    """Paint a clip, its change spread evenly over the frames.

    Args:
        clip: what happens.
        rng: as for a scene, once for the whole clip: nothing flickers.
        num_frames: the first shows the start, the last the end. A turn needs three to be seen.
        size: of each picture in pixels, a multiple of 32.

    Returns:
        `num_frames` RGB pictures of size x size pixels.

    Raises:
        ValueError: if the size is no such multiple, or there are too few frames.
    """
    _check_size(size)
    least = 3 if clip.change == "turns" else 2
    if num_frames < least:
        raise ValueError(
            f"frames of a clip in which an object {clip.change}: got {num_frames}, expected {least} or more"
        )
    ground = rng.uniform(*GROUND)
    still, changing = [], []
    for item in clip.start.items:
        chance = _Chance.draw(rng)
        if item == clip.before:
            changing = [chance.get_figure(item), chance.get_figure(clip.after)]
        else:
            still.append(chance.get_figure(item))
    start, end = changing
    turns = 1.0 if clip.change == "turns" else 0.0
    return [paint([*still, _blend(start, end, i / (num_frames - 1), turns)], ground, size) for i in range(num_frames)]
