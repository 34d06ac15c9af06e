"""Scenes and clips: their rules, their splits, and drawing them."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from modeling_emu.shapes.scenes import (
    CHANGES,
    COLOURS,
    HELD_OUT_PAIRS,
    MIDDLE,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN,
    Clip,
    Item,
    Scene,
    draw_clip,
    draw_scene,
    get_change,
    get_clip_split,
    get_split,
    is_above,
    is_left_of,
)


ALL_SPLITS = (*SPLITS, UNSEEN)
RED = Item("circle", "red", "small", "top left")
BLUE = Item("square", "blue", "large", "bottom right")


def held_out(scene: Scene) -> int:
    return sum(item.pair in HELD_OUT_PAIRS for item in scene.items)


def all_scenes(num_items: int):
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    corners = [place for place in PLACES if place != MIDDLE or num_items == 1]
    for places in itertools.combinations(corners, num_items):
        for chosen in itertools.permutations(pairs, num_items):
            for sizes in itertools.product(SIZES, repeat=num_items):
                yield Scene(
                    tuple(
                        Item(shape, colour, size, place)
                        for (colour, shape), size, place in zip(chosen, sizes, places, strict=True)
                    )
                )


@pytest.mark.parametrize("field", ["shape", "colour", "size", "place"])
def test_words_that_are_none_are_refused(field):
    words = {"shape": "circle", "colour": "red", "size": "small", "place": "middle", field: "wobbly"}
    with pytest.raises(ValueError, match=f"{field}: got 'wobbly', expected one of"):
        Item(**words)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "objects of a scene: got 0"),
        (
            tuple(Item("ring", "red", "small", place) for place in PLACES if place != MIDDLE),
            "objects of a scene: got 4",
        ),
        ((RED, Item("ring", "blue", "small", "top left")), "each at most once"),
        ((RED, Item("ring", "blue", "small", "middle")), "alone only"),
        ((BLUE, RED), "reading order"),
        ((RED, Item("circle", "red", "large", "top right")), "colours and shapes of a scene"),
    ],
)
def test_scenes_against_the_rules_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        Scene(items)


def test_reading_order_is_made():
    assert Scene.of([BLUE, RED]) == Scene((RED, BLUE))


def test_held_out_pairs_take_every_shape_once_and_no_colour_twice():
    colours, shapes = zip(*sorted(HELD_OUT_PAIRS), strict=True)
    assert sorted(shapes) == sorted(SHAPES)
    assert len(set(colours)) == len(colours)
    assert set(colours) < set(COLOURS)


@pytest.mark.parametrize(
    ("num_items", "counts"),
    [
        (1, {"train": 430, "validation": 33, "test": 27, "unseen": 70}),
        (2, {"train": 50791, "validation": 2815, "test": 2842, "unseen": 17472}),
    ],
)
def test_every_scene_is_in_one_split(num_items, counts):
    """The numbers are those of the docstring: a change of them would move scenes from one split to another."""
    assert Counter(get_split(scene) for scene in all_scenes(num_items)) == counts


@pytest.mark.slow
def test_scenes_of_three_objects_fill_up_the_numbers_of_the_docstring():
    counts = Counter(get_split(scene) for scene in all_scenes(3))
    assert counts == {"train": 3184944, "validation": 176262, "test": 176202, "unseen": 1784832}


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_drawn_scenes_are_of_their_split(split):
    rng = random.Random(split)
    for scene in (draw_scene(rng, split) for _ in range(5000)):
        assert get_split(scene) == split
        assert held_out(scene) == (split == UNSEEN)


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_drawn_clips_are_of_their_split(split):
    rng = random.Random(split)
    for clip in (draw_clip(rng, split) for _ in range(1000)):
        assert get_clip_split(clip) == get_split(clip.start) == split
        assert held_out(clip.start) == held_out(clip.end) == (split == UNSEEN)
        assert get_change(clip.start, clip.end) == clip.change


def test_training_clips_show_no_scene_of_another_split():
    rng = random.Random(0)
    for clip in (draw_clip(rng, "train") for _ in range(1000)):
        assert get_split(clip.start) == get_split(clip.end) == "train"
    for clip in (draw_clip(rng, "validation") for _ in range(300)):
        assert "test" not in {get_split(clip.start), get_split(clip.end)}


@pytest.mark.parametrize("num_items", [1, 2, 3])
def test_drawing_reaches_every_word_and_place(num_items):
    rng = random.Random(num_items)
    items = [item for _ in range(2000) for item in draw_scene(rng, "train", num_items).items]
    assert len(items) == 2000 * num_items
    assert {item.pair for item in items} == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT_PAIRS
    assert {item.size for item in items} == set(SIZES)
    assert {item.place for item in items} == {place for place in PLACES if num_items == 1 or place != MIDDLE}


def test_unseen_pairs_are_drawn_in_every_place_of_the_scene():
    rng = random.Random(0)
    scenes = [draw_scene(rng, UNSEEN, 3) for _ in range(2000)]
    ranks = Counter(i for scene in scenes for i, item in enumerate(scene.items) if item.pair in HELD_OUT_PAIRS)
    assert min(ranks.values()) > 550
    assert {
        pair for scene in scenes for item in scene.items if (pair := item.pair) in HELD_OUT_PAIRS
    } == HELD_OUT_PAIRS


def test_every_change_is_drawn_alike_often_on_one_or_two_objects():
    rng = random.Random(0)
    clips = [draw_clip(rng) for _ in range(2000)]
    counts = Counter((clip.change, len(clip.start.items)) for clip in clips)
    assert set(counts) == set(itertools.product(CHANGES, (1, 2)))
    assert min(counts.values()) > 80


@pytest.mark.parametrize("draw", ["draw_scene", "draw_clip"])
def test_drawing_is_the_same_in_every_process(draw):
    program = (
        "import random; from modeling_emu.shapes import scenes; rng = random.Random(7);"
        f"print([scenes.{draw}(rng, split) for split in {ALL_SPLITS} for _ in range(20)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(printed) == 1


@pytest.mark.parametrize(
    ("arguments", "message"), [(("training",), "split: got 'training'"), (("train", 4), "num_items: got 4")]
)
def test_drawing_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(random.Random(0), *arguments)
    if len(arguments) == 1:
        with pytest.raises(ValueError, match=message):
            draw_clip(random.Random(0), *arguments)


def test_relations_follow_places():
    left, right = Item("ring", "red", "small", "bottom left"), Item("ring", "blue", "small", "top right")
    assert is_left_of(left, right)
    assert not is_left_of(right, left)
    assert is_above(right, left)
    assert not is_above(left, right)
    assert not is_left_of(RED, left)
    assert not is_left_of(left, RED)


@pytest.mark.parametrize(
    ("after", "change"),
    [
        (Item("circle", "red", "small", "top right"), "moves right"),
        (Item("circle", "red", "small", "bottom left"), "moves down"),
        (Item("circle", "red", "large", "top left"), "grows"),
        (Item("circle", "cyan", "small", "top left"), "changes colour"),
        (Item("ring", "red", "small", "top left"), None),
        (Item("circle", "red", "large", "top right"), None),
        (Item("circle", "red", "small", "bottom right"), None),
    ],
)
def test_the_change_between_two_scenes_is_named(after, change):
    end = Scene.of([after] if after.place == BLUE.place else [after, BLUE])
    start = Scene.of([RED] if after.place == BLUE.place else [RED, BLUE])
    assert get_change(start, end) == change
    if change is not None:
        clip = Clip(start, end, change)
        assert (clip.before, clip.after) == (RED, after)
    with pytest.raises(ValueError, match="change from start to end"):
        Clip(start, end, "turns")


def test_only_a_heart_that_is_the_only_one_turns():
    heart = Item("heart", "red", "small", "top left")
    scene = Scene((heart, BLUE))
    assert get_change(scene, scene) == "turns"
    assert Clip(scene, scene, "turns").before == Clip(scene, scene, "turns").after == heart
    assert get_change(Scene((RED, BLUE)), Scene((RED, BLUE))) is None
    two = Scene((heart, Item("heart", "blue", "small", "top right")))
    assert get_change(two, two) is None


def test_clips_against_the_rules_are_refused():
    three = Scene((RED, Item("ring", "blue", "small", "top right"), BLUE))
    with pytest.raises(ValueError, match="objects of a clip: got 3"):
        Clip(three, three, "grows")
    with pytest.raises(ValueError, match="change: got 'jumps', expected one of"):
        Clip(Scene((RED,)), Scene((RED,)), "jumps")
