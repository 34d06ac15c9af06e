"""The grammar of the shapes' world: scenes, clips and panels of stories in words, and read back from them exactly.

All is lower case and ends in a full stop, and objects stand in reading order. A text is read by finding the objects it
names and asking whether any wording of what they make is this very text, so that reading is the inverse of writing.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .scenes import COLOURS, MIDDLE, PLACES, SHAPES, SIZES, Clip, Item, Scene, get_change, is_left_of


NUMBERS = ("none", "one", "two", "three")

PLACE = rf"(?:in|at) the (?P<place>{'|'.join(PLACES)})"
NAME = rf"a (?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
ITEM = re.compile(rf"{NAME} {PLACE}")
ITEM_PLACE_FIRST = re.compile(rf"{PLACE} is {NAME}")


@dataclass(frozen=True)
class Panel:
    """One picture of a story, and what came before it.

    Args:
        scene: what the picture shows.
        before: the scene of the panel before it, which has one object less, or one that is different in one attribute;
            None for the first panel.

    Raises:
        ValueError: if more lies between the two scenes, or nothing.
    """

    scene: Scene
    before: Scene | None = None

    def __post_init__(self) -> None:
        if self.before is not None and (self.before == self.scene or get_event(self.before, self.scene) is None):
            raise ValueError(f"panels of a story: got {self.before}, then {self.scene}, expected one change")


def add_article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe_place(place: str) -> str:
    """A place with its preposition, as "at the top left"."""
    return f"{'in' if place == MIDDLE else 'at'} the {place}"


def describe_item(item: Item) -> str:
    """An object with all its attributes, as "a large red circle at the top left"."""
    return f"a {item.size} {item.colour} {item.shape} {describe_place(item.place)}"


def describe_attribute(item: Item, attribute: str) -> str:
    """Shape, colour, size or place of an object as an answer, as "red." or "at the top left."."""
    value = getattr(item, attribute)
    return f"{describe_place(value) if attribute == 'place' else value}."


def describe_change(change: str, after: Item) -> str:
    """A change as a verb, as "moves right" or "becomes blue"."""
    return f"becomes {after.colour}" if change == "changes colour" else change


def name_pair(item: Item) -> str:
    """An object by colour and shape, which no other of its scene shares: "the red circle"."""
    return f"the {item.colour} {item.shape}"


def get_event(before: Scene, after: Scene) -> str | None:
    """What leads from a scene to another, as "the red circle moves right" or "a red circle comes"; None if it is more
    than one change."""
    come = [item for item in after.items if item not in before.items]
    if len(come) == 1 and len(after.items) == len(before.items) + 1:
        return f"{add_article(f'{come[0].colour} {come[0].shape}')} comes"
    change = get_change(before, after)
    if change is None or not come:
        return None
    [gone] = [item for item in before.items if item not in after.items]
    return f"{name_pair(gone)} {describe_change(change, come[0])}"


def join_words(words: list[str]) -> str:
    """An enumeration: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def join_items(scene: Scene) -> str:
    """All objects of a scene with all their attributes."""
    return join_words([describe_item(item) for item in scene.items])


def list_captions(scene: Scene) -> list[str]:
    """Every wording of a scene."""
    items = [describe_item(item) for item in scene.items]
    captions = [f"{opening}{join_words(items)}." for opening in ("", "there is ", "a picture of ")]
    by_place = [f"{describe_place(item.place)} is a {item.size} {item.colour} {item.shape}" for item in scene.items]
    captions.append(f"{join_words(by_place)}.")
    if len(items) > 1:
        captions.append(f"{'; '.join(f'there is {item}' for item in items)}.")
    if len(items) == 2:
        relation = "to the left of" if is_left_of(*scene.items) else "above"
        captions.append(f"{items[0]}, {relation} {items[1]}.")
    return captions


def write_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that describes exactly this scene, in one of several wordings."""
    return rng.choice(list_captions(scene))


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption describes exactly; None for any other text."""
    for pattern in (ITEM, ITEM_PLACE_FIRST):
        scene = find_scene(text, pattern)
        if scene is not None and text in list_captions(scene):
            return scene
    return None


def find_scene(text: str, pattern: re.Pattern[str] = ITEM) -> Scene | None:
    """The scene of the objects that a text names, whatever else it says; None if they make none."""
    try:
        return Scene(tuple(Item(**match.groupdict()) for match in pattern.finditer(text)))
    except ValueError:
        return None


def list_neighbours(scene: Scene) -> Iterator[Scene]:
    """Every scene that is one change away: an object with another colour or size, or moved to a corner next to it."""
    for item in scene.items:
        others = [other for other in scene.items if other != item]
        for attribute, values in (("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
            for value in values:
                try:
                    neighbour = Scene.of([*others, replace(item, **{attribute: value})])
                except ValueError:  # a place that is taken, or an object that is there already
                    continue
                if neighbour != scene and get_change(scene, neighbour) is not None:
                    yield neighbour


def list_clip_captions(clip: Clip) -> list[str]:
    """Every wording of a clip."""
    change = describe_change(clip.change, clip.after)
    verbs = [change if item == clip.before else "stays" for item in clip.start.items]
    items = [describe_item(item) for item in clip.start.items]
    return [
        f"{join_words([f'{item} {verb}' for item, verb in zip(items, verbs, strict=True)])}.",
        f"a video of {join_words([f'{item} that {verb}' for item, verb in zip(items, verbs, strict=True)])}.",
        f"there is {join_words(items)}. {name_pair(clip.before)} {change}.",
    ]


def write_clip_caption(clip: Clip, rng: random.Random) -> str:
    """A caption that describes exactly this clip, how it begins and what changes, in one of several wordings."""
    return rng.choice(list_clip_captions(clip))


def parse_clip_caption(text: str) -> Clip | None:
    """The clip that a caption describes exactly; None for any other text."""
    start = find_scene(text)
    if start is None or len(start.items) > 2:
        return None
    for end in (start, *list_neighbours(start)):
        change = get_change(start, end)
        if change is not None and text in list_clip_captions(clip := Clip(start, end, change)):
            return clip
    return None


def list_panel_texts(panel: Panel) -> list[str]:
    """Every wording of a story's panel."""
    items = join_items(panel.scene)
    if panel.before is None:
        return [f"first there is {items}.", f"the story begins with {items}."]
    event = get_event(panel.before, panel.scene)
    return [f"then {event}. now there is {items}.", f"next {event}, so there is {items}."]


def write_panel(panel: Panel, rng: random.Random) -> str:
    """The text before a story's picture: what has happened, and all that is there now."""
    return rng.choice(list_panel_texts(panel))


def parse_panel(text: str) -> Panel | None:
    """The panel that a text of a story describes exactly; None for any other text."""
    scene = find_scene(text)
    if scene is None:
        return None
    before: list[Scene | None] = [None, *list_neighbours(scene)]
    if len(scene.items) > 1:
        before += [Scene(tuple(other for other in scene.items if other != item)) for item in scene.items]
    return next((panel for panel in (Panel(scene, b) for b in before) if text in list_panel_texts(panel)), None)
