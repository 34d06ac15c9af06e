"""Reads a scene back from a picture, by arithmetic alone: no network that could share a mistake with the one it judges.

Each quarter of the picture is compared with the paintings of every shape at many places and diameters, the best of them is
fitted, and what is found is painted again. A picture is read as a scene only if this second picture explains the first: a
stray blob, half a shape, a colour between two or a size between two makes it unreadable.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from .render import CANVAS_SIZE, CENTRES, DIAMETERS, PALETTE, Figure, compute_coverage, render_scene
from .scenes import COLOURS, MIDDLE, SHAPES, SIZES, TURNING_SHAPE, Clip, Item, Scene, draw_scene, get_change


# Pixels of a window around the centre of a place: a quarter of the canvas.
_WINDOW = CANVAS_SIZE // 2
_CORNERS = tuple(place for place in CENTRES if place != MIDDLE)

# Pixels at least this bright in every channel belong to the ground; no object has such. Their median must be near white.
_MIN_GROUND = 200
_MIN_GROUND_MEDIAN = 220
# A picture whose ground takes less than this share of it shows no scene: three large squares leave 45 %.
_MIN_GROUND_SHARE = 0.3
# Difference from the ground, of 255, that counts as ink; and the pixels of ink that make an object rather than a speck.
_INK = 60
_MIN_INK_PIXELS = 8
# Share of all ink within the central window above which the object is in the middle. Of an object in a corner, less than
# half is there.
_MIN_MIDDLE_SHARE = 0.75

# What an object may be and still be clear. Distance from its palette colour, of 255, and at most so much of the distance
# from the next one; misfit: share of its ink that the fitted shape does not explain; clearness: 0 halfway to another shape.
_MAX_COLOUR_ERROR = 45.0
_MAX_COLOUR_RATIO = 0.75
_MAX_MISFIT = 0.06
_MIN_CLEARNESS = 0.3
# How far from the nominal diameter and centre, in pixels.
_MAX_DIAMETER_ERROR = 1.25
_MAX_SHIFT = 3.0
# Of 255: the largest mean difference over 3 x 3 pixels between a picture and what was read from it.
_MAX_LEFTOVER = 35.0
# Share of the difference between neighbouring pixels that an outline may be off.
_EDGE_TOLERANCE = 0.5

# Where the search begins, in pixels; the fit refines it.
_SHIFTS = tuple(np.arange(-2.5, 2.6, 0.5))
_DIAMETERS = (6.25, 7.25, 8.0, 8.75, 9.75, 10.75, 11.75, 12.5, 13.25, 14.0, 15.0)
# Differences over which slopes are taken: x, y and diameter in pixels, and blur: the share of a pixel that goes to each of its
# neighbours in a line.
_PROBES = (0.25, 0.25, 0.25, 0.05)
_MAX_BLUR = 0.2
_MAX_STEPS, _MAX_STEP, _MIN_GAIN = 6, 0.75, 0.02
# Angles at which a turning heart is looked for, in parts of a turn; turned is what is two of them or more from upright.
_NUM_ANGLES = 16
# A second shape is fitted too if its score comes this near to the best.
_NEAR = 0.03


@dataclass(frozen=True)
class Found:
    """An object read from a picture.

    Args:
        item: the nearest that a scene can have.
        x, y, diameter: as fitted, pixels of the canvas.
        colour_error: distance of the fitted colour from the palette's, of 255.
        misfit: share of its ink that the fitted shape does not explain, 0 to 1.
        problems: what keeps it from being clear: "shape", "colour", "size", "place".
    """

    item: Item
    x: float
    y: float
    diameter: float
    colour_error: float
    misfit: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What was read from a picture.

    Args:
        found: objects in reading order, clear or not.
        leftover: the largest mean difference over 3 x 3 pixels between the picture and what was found, of 255.
        scene: None if an object is not clear, if anything else is on the canvas, or if what was found is no scene.
    """

    found: tuple[Found, ...]
    leftover: float
    scene: Scene | None


@dataclass(frozen=True)
class Verdict:
    """What of a scene a picture shows. Attributes are compared as they are counted over all objects, whichever has them.

    Args:
        count, shapes, colours, sizes, places: whether these are the same; a part of an object that is not clear never is.
        clean: whether nothing else is on the canvas.
        right: whether the picture is read as exactly the scene.
    """

    count: bool
    shapes: bool
    colours: bool
    sizes: bool
    places: bool
    clean: bool
    right: bool


@dataclass(frozen=True)
class _Fit:
    shape: str
    x: float
    y: float
    diameter: float
    template: np.ndarray
    strength: float
    error: float

    @property
    def painted(self) -> np.ndarray:
        return self.strength * self.template


@lru_cache(maxsize=2)
def _get_laplacian(size: int) -> np.ndarray:
    """`(size, size)`: what every pixel of a line gets from its two neighbours, less what it gives to them."""
    laplacian = np.eye(size, k=1) + np.eye(size, k=-1)
    return laplacian - np.diag(laplacian.sum(axis=1))


def _blur(image: np.ndarray, share: float) -> np.ndarray:
    """Give a share of every pixel to each neighbour, along both of the last two axes, of one length."""
    kernel = np.eye(image.shape[-1]) + share * _get_laplacian(image.shape[-1])
    return kernel @ image @ kernel


def _compute_template(shape: str, x: float, y: float, diameter: float, angle: float = 0.0) -> np.ndarray:
    """Coverage of the pixels of a window, `(_WINDOW, _WINDOW)`, by a shape around a point of it."""
    top, left, coverage = compute_coverage(Figure(shape, x, y, diameter, (0.0, 0.0, 0.0), angle))
    window = np.zeros((_WINDOW, _WINDOW))
    first_row, first_column = max(top, 0), max(left, 0)
    last_row, last_column = min(top + coverage.shape[0], _WINDOW), min(left + coverage.shape[1], _WINDOW)
    window[first_row:last_row, first_column:last_column] = coverage[
        first_row - top : last_row - top, first_column - left : last_column - left
    ]
    return window


@lru_cache(maxsize=1)
def _get_bank() -> tuple[list[tuple[str, float, float, float]], np.ndarray]:
    """Shape, x, y and diameter of the paintings where the search begins, and these `(num_templates, pixels)`, of length 1."""
    middle = _WINDOW / 2
    keys = [(shape, middle + x, middle + y, d) for shape, d, y, x in product(SHAPES, _DIAMETERS, _SHIFTS, _SHIFTS)]
    templates = np.stack([_compute_template(*key).ravel() for key in keys]).astype(np.float32)
    return keys, templates / np.linalg.norm(templates, axis=1, keepdims=True)


def _read_pixels(image: Image.Image) -> np.ndarray:
    """`(CANVAS_SIZE, CANVAS_SIZE, 3)`, float, 0 to 255."""
    width, height = image.size
    if width != height or width % CANVAS_SIZE:
        raise ValueError(
            f"size of the picture: got {width} x {height}, expected a square of a multiple of {CANVAS_SIZE} pixels"
        )
    image = image.convert("RGB")
    return np.asarray(image.reduce(width // CANVAS_SIZE) if width > CANVAS_SIZE else image, dtype=float)


def _read_difference(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """What a picture has beside its ground, `(CANVAS_SIZE, CANVAS_SIZE, 3)`, and the ground's colour, None if it has none."""
    pixels = _read_pixels(image)
    bright = pixels.min(axis=2) >= _MIN_GROUND
    if bright.mean() < _MIN_GROUND_SHARE:
        return pixels, None
    ground = np.median(pixels[bright], axis=0)
    return pixels - ground, ground if ground.min() >= _MIN_GROUND_MEDIAN else None


def _get_window(place: str) -> tuple[slice, slice]:
    x, y = (int(centre) - _WINDOW // 2 for centre in CENTRES[place])
    return slice(y, y + _WINDOW), slice(x, x + _WINDOW)


def _get_places(ink: np.ndarray) -> list[str]:
    """Where there are objects, from a map of the pixels that differ from the ground."""
    if ink[_get_window(MIDDLE)].sum() > max(_MIN_MIDDLE_SHARE * ink.sum(), _MIN_INK_PIXELS):
        return [MIDDLE]
    return [place for place in _CORNERS if ink[_get_window(place)].sum() >= _MIN_INK_PIXELS]


def _get_coverage(difference: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """How much each pixel is covered by the one palette colour that explains a window best, `(_WINDOW, _WINDOW)`."""
    directions = np.array([PALETTE[colour] for colour in COLOURS]) - ground
    shares = (difference @ directions.T) / (directions**2).sum(axis=1)
    shares = shares.clip(0, 1.15)
    errors = ((difference[:, :, None] - shares[..., None] * directions) ** 2).sum(axis=(0, 1, 3))
    return shares[:, :, errors.argmin()]


def _fit(target: np.ndarray, key: tuple[str, float, float, float]) -> _Fit:
    """Refine place, diameter and blur of a shape by Gauss-Newton steps, as long as they explain a window better."""
    shape, *start = key

    def compute(values: np.ndarray) -> np.ndarray:
        return _blur(_compute_template(shape, *values[:3]), values[3]).ravel()

    aim = target.ravel()
    values = np.array([*start, _PROBES[3]])
    template = compute(values)
    strength = aim @ template / (template @ template)
    error = ((aim - strength * template) ** 2).sum()
    for _ in range(_MAX_STEPS):
        changes = [compute(values + probe) - template for probe in np.diag(_PROBES)]
        slopes = np.stack(
            [*(change / probe for change, probe in zip(changes, _PROBES, strict=True)), template], axis=1
        )
        slopes[:, :-1] *= strength
        step = np.linalg.lstsq(slopes, aim - strength * template, rcond=None)[0][:-1].clip(-_MAX_STEP, _MAX_STEP)
        for share in (1.0, 0.4):
            new_values = values + share * step
            new_values[3] = new_values[3].clip(0, _MAX_BLUR)
            new_template = compute(new_values)
            new_strength = aim @ new_template / max(new_template @ new_template, 1e-9)
            new_error = ((aim - new_strength * new_template) ** 2).sum()
            if new_error < error:
                break
        else:
            break
        gain = error - new_error
        values, template, strength, error = new_values, new_template, new_strength, new_error
        if gain < _MIN_GAIN * error:
            break
    x, y, diameter, _ = values
    template = template.reshape(target.shape)
    return _Fit(shape, float(x), float(y), float(diameter), template, float(strength), float(error))


def _find_shape(target: np.ndarray) -> tuple[_Fit, float]:
    """The shape, with its place and diameter in the window, that explains a map of coverage best.

    Returns:
        Its fit, and how clear it is: 1 if the map is the shape, 0 if it is halfway between this and another one.
    """
    keys, bank = _get_bank()
    scores = (bank @ (target.ravel() / np.linalg.norm(target)).astype(np.float32)).reshape(len(SHAPES), -1)
    near = np.flatnonzero(scores.max(axis=1) > scores.max() - _NEAR)
    fits = [_fit(target, keys[i * scores.shape[1] + scores[i].argmax()]) for i in near]
    best = min(fits, key=lambda fit: fit.error)
    # For a mixture a + w (b - a) of two shapes, the errors are w^2 d and (1 - w)^2 d, where d is the squared distance from
    # a to b: this is 1 - 2 w, and noise, which is in both errors alike, has no influence.
    clearness = [
        (fit.error - best.error) / float(((fit.painted - best.painted) ** 2).sum()) for fit in fits if fit is not best
    ]
    return best, min(clearness, default=1.0)


def _read_object(difference: np.ndarray, ground: np.ndarray, place: str) -> tuple[Found, np.ndarray]:
    """The object of a window, and what it adds to the ground there, `(_WINDOW, _WINDOW, 3)`."""
    target = _get_coverage(difference, ground)
    fit, clearness = _find_shape(target)
    change = np.tensordot(fit.template, difference, axes=2) / (fit.template**2).sum()
    painted = fit.template[:, :, None] * change

    distances = {colour: float(np.linalg.norm(ground + change - PALETTE[colour])) for colour in COLOURS}
    colour, next_colour = sorted(COLOURS, key=distances.__getitem__)[:2]
    size = min(SIZES, key=lambda size: abs(DIAMETERS[size] - fit.diameter))
    shift = max(abs(fit.x - _WINDOW / 2), abs(fit.y - _WINDOW / 2))
    misfit = fit.error / float((target**2).sum())

    problems = []
    if misfit > _MAX_MISFIT or clearness < _MIN_CLEARNESS:
        problems.append("shape")
    if distances[colour] > min(_MAX_COLOUR_ERROR, _MAX_COLOUR_RATIO * distances[next_colour]):
        problems.append("colour")
    if abs(DIAMETERS[size] - fit.diameter) > _MAX_DIAMETER_ERROR:
        problems.append("size")
    if shift > _MAX_SHIFT:
        problems.append("place")
    x, y = (centre - _WINDOW / 2 for centre in CENTRES[place])
    item = Item(fit.shape, colour, size, place)
    return Found(item, x + fit.x, y + fit.y, fit.diameter, distances[colour], misfit, tuple(problems)), painted


def _compute_leftover(rest: np.ndarray, painted: np.ndarray) -> float:
    """The largest mean over 3 x 3 pixels of what a picture has beside the objects found, or lacks of them, 0 to 255.

    At the edge of an object, outlines that are a little off are no leftover.
    """
    padded = np.pad(painted, [(1, 1), (1, 1), (0, 0)], mode="edge")
    neighbours = np.stack([padded[y : y + CANVAS_SIZE, x : x + CANVAS_SIZE] for y, x in product(range(3), range(3))])
    allowed = _EDGE_TOLERANCE * np.abs(neighbours - painted).max(axis=0)
    excess = np.sign(rest) * (np.abs(rest) - allowed).clip(0)
    return float(np.abs(_blur(excess.transpose(2, 0, 1), 1 / 3)).max())


def read_picture(image: Image.Image) -> Reading:
    """Read all that can be said about a picture.

    Args:
        image: square, of 32 x 32 pixels or a multiple.

    Raises:
        ValueError: if it has another size.
    """
    difference, ground = _read_difference(image)
    if ground is None:
        return Reading((), 255.0, None)
    rest = difference.copy()
    found = []
    for place in _get_places(np.abs(difference).max(axis=2) > _INK):
        window = _get_window(place)
        item, painted = _read_object(difference[window], ground, place)
        found.append(item)
        rest[window] -= painted
    leftover = _compute_leftover(rest, difference - rest)
    scene = None
    if leftover <= _MAX_LEFTOVER and not any(item.problems for item in found):
        try:
            scene = Scene(tuple(item.item for item in found))
        except ValueError:
            # Nothing, four objects, or two alike: readable, but no scene.
            scene = None
    return Reading(tuple(found), leftover, scene)


def read_scene(image: Image.Image) -> Scene | None:
    """The scene that a picture shows, None if it shows none without doubt. Arguments and errors as of `read_picture`."""
    return read_picture(image).scene


def agrees(scene: Scene, image: Image.Image) -> bool:
    """Whether a picture shows every attribute of every object, and nothing else."""
    return read_scene(image) == scene


def judge(scene: Scene, image: Image.Image) -> Verdict:
    """What of a scene a picture shows, attribute by attribute."""
    reading = read_picture(image)

    def is_same(attribute: str) -> bool:
        clear = [found.item for found in reading.found if attribute not in found.problems]
        same = Counter(getattr(item, attribute) for item in clear) == Counter(
            getattr(item, attribute) for item in scene.items
        )
        return same and len(clear) == len(reading.found)

    return Verdict(
        count=len(reading.found) == len(scene.items),
        shapes=is_same("shape"),
        colours=is_same("colour"),
        sizes=is_same("size"),
        places=is_same("place"),
        clean=reading.leftover <= _MAX_LEFTOVER,
        right=reading.scene == scene,
    )


def _is_turned(frame: Image.Image, upright: Found) -> bool:
    """Whether a frame shows an object at another angle than upright, where an earlier frame showed it upright."""
    difference, ground = _read_difference(frame)
    if ground is None:
        return False
    rows, columns = window = _get_window(upright.item.place)
    target = _get_coverage(difference[window], ground)
    key = (upright.item.shape, upright.x - columns.start, upright.y - rows.start, upright.diameter)
    templates = [_compute_template(*key, angle=i / _NUM_ANGLES) for i in range(_NUM_ANGLES)]
    best = int(np.argmin([((target - template) ** 2).sum() for template in templates]))
    return 2 <= best <= _NUM_ANGLES - 2


def read_clip(frames: Sequence[Image.Image]) -> Clip | None:
    """The clip that some frames show, None if it is none without doubt.

    Start, end and change are read from the first frame and the last. Between equal ones, the frames must show the same colours
    in the same places, and the heart turned in one of them at least.

    Args:
        frames: at least two, of the size that `read_picture` takes.

    Raises:
        ValueError: if there are fewer, or they have another size.
    """
    if len(frames) < 2:
        raise ValueError(f"frames of a clip: got {len(frames)}, expected 2 or more")
    first = read_picture(frames[0])
    start, end = first.scene, read_scene(frames[-1])
    if start is None or end is None or max(len(start.items), len(end.items)) > 2:
        return None
    change = get_change(start, end)
    if change is None:
        return None
    if change == "turns":
        there = [(item.colour, item.place) for item in start.items]
        between = [read_picture(frame) for frame in frames[1:-1]]
        if any([(found.item.colour, found.item.place) for found in reading.found] != there for reading in between):
            return None
        heart = next(found for found in first.found if found.item.shape == TURNING_SHAPE)
        if not any(_is_turned(frame, heart) for frame in frames[1:-1]):
            return None
    return Clip(start, end, change)


def degrade(image: Image.Image, noise: float, blur: float, rng: np.random.Generator) -> Image.Image:
    """A picture as a small generator may paint it.

    Args:
        image: RGB.
        noise: standard deviation of Gaussian noise, of 255, added after the blur.
        blur: standard deviation of a Gaussian, in pixels.
        rng: of the noise.
    """
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    pixels = pixels + rng.normal(0.0, noise, pixels.shape)
    return Image.fromarray((pixels + 0.5).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class CheckerErrors:
    """How often the checker is wrong about pictures whose scenes are known.

    Args:
        num_scenes, num_items: that were read; half of the scenes have a held-out pair.
        unreadable: share of scenes that were not read at all.
        wrong: share of scenes that were read as another one.
        items: share of objects with any attribute wrong, missing or not clear; by size and by shape.
        confusions: (shape painted, shape read): number of objects; read is "none" where there was none, or not clear.
    """

    num_scenes: int
    num_items: int
    unreadable: float
    wrong: float
    items: dict[str, float]
    confusions: dict[tuple[str, str], int]


def measure_checker(num_scenes: int = 2000, seed: int = 0, noise: float = 0.0, blur: float = 0.0) -> CheckerErrors:
    """Measure the checker against pictures whose scenes are known.

    Args:
        num_scenes: to draw, with 1 to 3 objects.
        seed: of scenes, pictures and noise.
        noise, blur: as `degrade` takes them.

    Raises:
        ValueError: if there is no scene to measure, or noise or blur are negative.
    """
    if num_scenes < 1 or noise < 0 or blur < 0:
        got = f"num_scenes {num_scenes}, noise {noise}, blur {blur}"
        raise ValueError(f"measurement of the checker: got {got}, expected at least one scene and nothing negative")
    rng, noise_rng = random.Random(seed), np.random.default_rng(seed)
    unreadable = wrong = 0
    totals: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    confusions: Counter[tuple[str, str]] = Counter()
    for i in range(num_scenes):
        scene = draw_scene(rng, "unseen" if i % 2 else "train")
        reading = read_picture(degrade(render_scene(scene, rng), noise, blur, noise_rng))
        unreadable += reading.scene is None
        wrong += reading.scene not in (None, scene)
        at = {found.item.place: found for found in reading.found}
        for item in scene.items:
            found = at.get(item.place)
            totals.update((item.size, item.shape))
            if found is None or found.item != item or found.problems:
                failures.update((item.size, item.shape))
            read = "none" if found is None or "shape" in found.problems else found.item.shape
            if read != item.shape:
                confusions[item.shape, read] += 1
    return CheckerErrors(
        num_scenes,
        sum(totals[size] for size in SIZES),
        unreadable / num_scenes,
        wrong / num_scenes,
        {word: failures[word] / totals[word] for word in (*SIZES, *SHAPES) if totals[word]},
        dict(confusions),
    )
