"""What there is to see: objects, scenes of one to three of them, and clips in which one object changes.

A scene says everything about a picture that a caption can say. It knows nothing of pixels or words.
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "heart")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "black")
SIZES = ("small", "large")
# In reading order. Only an object that is alone may be in the middle.
PLACES = ("top left", "top right", "middle", "bottom left", "bottom right")
MIDDLE = "middle"
MAX_ITEMS = 3

# (colour, shape): never shown in training. Every shape once, no colour more than once.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "cross"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "ring"),
        ("orange", "diamond"),
        ("purple", "square"),
        ("cyan", "heart"),
    }
)

SPLITS = ("train", "validation", "test")
UNSEEN = "unseen"
# Percent of the scenes without a held-out pair.
SPLIT_SHARES = {"train": 90, "validation": 5, "test": 5}

MOVES = ("moves left", "moves right", "moves up", "moves down")
CHANGES = (*MOVES, "grows", "shrinks", "changes colour", "turns")
# The one shape that differs from itself at every angle of a full turn: a turned square looks like a diamond, a turned
# circle like itself, a triangle after a third of a turn and a cross after a quarter like themselves.
TURNING_SHAPE = "heart"

_SEEN_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_PAIRS)
_UNSEEN_PAIRS = tuple(sorted(HELD_OUT_PAIRS))
_CORNERS = tuple(place for place in PLACES if place != MIDDLE)
# Column and row, to the right and downwards.
_POSITIONS = {
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "middle": (0.5, 0.5),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
}
_DIRECTIONS = {"moves left": (-1.0, 0.0), "moves right": (1.0, 0.0), "moves up": (0.0, -1.0), "moves down": (0.0, 1.0)}
_PLACE_AT = {position: place for place, position in _POSITIONS.items()}
_RANKS = {place: rank for rank, place in enumerate(PLACES)}


def _check(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what}: got {value!r}, expected one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Item:
    """One object of a scene.

    Args:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: one of `SIZES`.
        place: one of `PLACES`.

    Raises:
        ValueError: if a word is none of these.
    """

    shape: str
    colour: str
    size: str
    place: str

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("colour", self.colour, COLOURS)
        _check("size", self.size, SIZES)
        _check("place", self.place, PLACES)

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """One to three objects that all differ in colour or shape, each in a place of its own.

    There are 5,396,720 scenes: 3,236,165 of the training split, 179,110 of validation, 179,071 of the test, and 1,802,374
    with a held-out pair. Of one object 560 (430, 33, 27 and 70), of two 73,920 (50,791, 2,815, 2,842 and 17,472).

    Args:
        items: in reading order of their places; `Scene.of` takes any order.

    Raises:
        ValueError: if there are no or too many objects, two in one place, one in the middle beside another, two of the
            same colour and shape, or if they are not in reading order.
    """

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.items) <= MAX_ITEMS:
            raise ValueError(f"objects of a scene: got {len(self.items)}, expected 1 to {MAX_ITEMS}")
        ranks = [_RANKS[item.place] for item in self.items]
        places = [item.place for item in self.items]
        if len(set(places)) < len(places):
            raise ValueError(f"places of a scene: got {places}, expected each at most once")
        if len(places) > 1 and MIDDLE in places:
            raise ValueError(f"places of a scene: got {places}, expected {MIDDLE!r} for an object that is alone only")
        if ranks != sorted(ranks):
            raise ValueError(f"places of a scene: got {places}, expected reading order (`Scene.of` makes it)")
        pairs = [item.pair for item in self.items]
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"colours and shapes of a scene: got {pairs}, expected each at most once")

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Scene":
        """The scene of these objects, put in reading order."""
        return cls(tuple(sorted(items, key=lambda item: _RANKS[item.place])))


@dataclass(frozen=True)
class Clip:
    """One object of one or two changes; all else stays. A turn is a full turn, so its start and end are equal.

    Args:
        start, end: of one or two objects, the same but for what the change says.
        change: one of `CHANGES`. Only an object in a corner moves, to the next corner if that is free. Only a heart turns,
            if it is the only one in the scene.

    Raises:
        ValueError: if the change is none of these, or is not what lies between start and end.
    """

    start: Scene
    end: Scene
    change: str

    def __post_init__(self) -> None:
        _check("change", self.change, CHANGES)
        for scene in (self.start, self.end):
            if len(scene.items) > 2:
                raise ValueError(f"objects of a clip: got {len(scene.items)}, expected 1 or 2")
        found = get_change(self.start, self.end)
        if found != self.change:
            raise ValueError(f"change from start to end: got {self.change!r}, expected {found!r}")

    @property
    def before(self) -> Item:
        """The object that changes, as it is at the start."""
        return _get_changed(self.start, self.end)

    @property
    def after(self) -> Item:
        """The object that changes, as it is at the end."""
        return _get_changed(self.end, self.start)


def _get_changed(scene: Scene, other: Scene) -> Item:
    if scene == other:
        return next(item for item in scene.items if item.shape == TURNING_SHAPE)
    return next(item for item in scene.items if item not in other.items)


def get_change(start: Scene, end: Scene) -> str | None:
    """The one change that leads from a scene to another, None if no single one does. Equal scenes: a turn, if one can."""
    if start == end:
        return "turns" if [item.shape for item in start.items].count(TURNING_SHAPE) == 1 else None
    gone = [item for item in start.items if item not in end.items]
    come = [item for item in end.items if item not in start.items]
    if len(gone) != 1 or len(come) != 1:
        return None
    before, after = gone[0], come[0]
    differences = [field.name for field in fields(Item) if getattr(before, field.name) != getattr(after, field.name)]
    if differences == ["colour"]:
        return "changes colour"
    if differences == ["size"]:
        return "grows" if after.size == "large" else "shrinks"
    if differences == ["place"]:
        return next((move for move in MOVES if _get_neighbour(before.place, move) == after.place), None)
    return None


def _get_neighbour(place: str, move: str) -> str | None:
    column, row = _POSITIONS[place]
    right, down = _DIRECTIONS[move]
    return _PLACE_AT.get((column + right, row + down))


def is_left_of(a: Item, b: Item) -> bool:
    """Whether `a` is further to the left than `b`, by their places."""
    return _POSITIONS[a.place][0] < _POSITIONS[b.place][0]


def is_above(a: Item, b: Item) -> bool:
    """Whether `a` is further up than `b`, by their places."""
    return _POSITIONS[a.place][1] < _POSITIONS[b.place][1]


def get_split(scene: Scene) -> str:
    """The split that a scene belongs to, by a hash of what it says: the same everywhere and for ever.

    Returns:
        One of `SPLITS`, or "unseen" for a scene with a held-out pair.
    """
    if any(item.pair in HELD_OUT_PAIRS for item in scene.items):
        return UNSEEN
    text = "; ".join(f"{item.size} {item.colour} {item.shape} {item.place}" for item in scene.items)
    percent = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
    for split, share in SPLIT_SHARES.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("the shares of the splits make up less than 100 percent")


def get_clip_split(clip: Clip) -> str:
    """The split that a clip belongs to: of its two scenes' splits the one that is held back more.

    So training shows no scene of another split, validation none of the test's, and a clip of the test begins or ends with
    one of the test's.
    """
    order = (*SPLITS, UNSEEN)
    return max(get_split(clip.start), get_split(clip.end), key=order.index)


def _check_split(split: str) -> None:
    _check("split", split, (*SPLITS, UNSEEN))


def draw_scene(rng: random.Random, split: str = "train", num_items: int | None = None) -> Scene:
    """Draw a scene of a split.

    Args:
        rng: all that is drawn comes from it.
        split: one of `SPLITS`, or "unseen": then exactly one object has a held-out pair.
        num_items: 1 to 3 objects; None draws their number too, each alike.

    Raises:
        ValueError: if the split or the number is none of these.
    """
    _check_split(split)
    if num_items is not None and not 1 <= num_items <= MAX_ITEMS:
        raise ValueError(f"num_items: got {num_items}, expected 1 to {MAX_ITEMS} or None")
    count = rng.randint(1, MAX_ITEMS) if num_items is None else num_items
    while True:
        if split == UNSEEN:
            pairs = [rng.choice(_UNSEEN_PAIRS), *rng.sample(_SEEN_PAIRS, count - 1)]
        else:
            pairs = rng.sample(_SEEN_PAIRS, count)
        places = rng.sample(_CORNERS if count > 1 else PLACES, count)
        scene = Scene.of(
            Item(shape, colour, rng.choice(SIZES), place) for (colour, shape), place in zip(pairs, places, strict=True)
        )
        if get_split(scene) == split:
            return scene


def _draw_after(item: Item, change: str, rng: random.Random) -> Item | None:
    """What an object becomes by a change, None if it cannot change so."""
    if change in MOVES:
        place = _get_neighbour(item.place, change)
        return None if place is None else replace(item, place=place)
    if change == "grows":
        return replace(item, size="large") if item.size == "small" else None
    if change == "shrinks":
        return replace(item, size="small") if item.size == "large" else None
    if change == "changes colour":
        return replace(item, colour=rng.choice([colour for colour in COLOURS if colour != item.colour]))
    return item if item.shape == TURNING_SHAPE else None


def draw_clip(rng: random.Random, split: str = "train") -> Clip:
    """Draw a clip of a split (`get_clip_split`), with a start of that split: every change alike often, of one or two objects.

    Args:
        rng: all that is drawn comes from it.
        split: one of `SPLITS`, or "unseen": then exactly one object has a held-out pair at the start and at the end, so
            that it is never this object that changes colour.

    Raises:
        ValueError: if the split is none of these.
    """
    _check_split(split)
    change, num_items = rng.choice(CHANGES), rng.randint(1, 2)
    if split == UNSEEN and change == "changes colour":
        num_items = 2
    while True:
        start = draw_scene(rng, split, num_items)
        before = rng.choice(start.items)
        after = _draw_after(before, change, rng)
        others = [item for item in start.items if item != before]
        if after is None or any(other.place == after.place or other.pair == after.pair for other in others):
            continue
        end = Scene.of([*others, after])
        if get_change(start, end) != change or _count_held_out(end) != (split == UNSEEN):
            continue
        clip = Clip(start, end, change)
        if get_clip_split(clip) == split:
            return clip


def _count_held_out(scene: Scene) -> int:
    return sum(item.pair in HELD_OUT_PAIRS for item in scene.items)
