"""Pictures of scenes and clips: where things are, what varies, and what stays."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from modeling_emu.shapes.render import CENTRES, GROUND, MAX_TINT, PALETTE, render_clip, render_scene
from modeling_emu.shapes.scenes import CHANGES, COLOURS, PLACES, SHAPES, SIZES, Item, Scene, draw_clip, draw_scene


def ink(image) -> np.ndarray:
    """Difference of every pixel from the ground, the largest of the three channels."""
    pixels = np.asarray(image, dtype=float)
    return np.abs(pixels - np.median(pixels[pixels.min(axis=2) > 200], axis=0)).max(axis=2)


def draw_clip_with(change: str, rng: random.Random, num_items: int = 2):
    while True:
        clip = draw_clip(rng)
        if clip.change == change and len(clip.start.items) == num_items:
            return clip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_objects_stay_within_their_quarters(place, size):
    rng = random.Random(0)
    x, y = (int(centre) for centre in CENTRES[place])
    for shape in SHAPES:
        for _ in range(20):
            found = ink(render_scene(Scene((Item(shape, "black", size, place),)), rng)) > 0
            assert found[y - 8 : y + 8, x - 8 : x + 8].any()
            found[y - 8 : y + 8, x - 8 : x + 8] = False
            assert not found.any()


def test_quarters_without_an_object_are_empty():
    rng = random.Random(0)
    for _ in range(100):
        scene = draw_scene(rng, "train", rng.randint(2, 3))
        found = ink(render_scene(scene, rng)) > 0
        for place in set(PLACES) - {"middle"}:
            x, y = (int(centre) for centre in CENTRES[place])
            quarter = found[y - 8 : y + 8, x - 8 : x + 8]
            assert quarter.any() == any(item.place == place for item in scene.items)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_inside_of_an_object_has_its_colour(colour):
    rng = random.Random(0)
    for shape in sorted(set(SHAPES) - {"ring"}):
        pixels = np.asarray(render_scene(Scene((Item(shape, colour, "large", "middle"),)), rng), dtype=float)
        assert np.abs(pixels[16, 16] - PALETTE[colour]).max() <= MAX_TINT + 0.5
        assert GROUND[0] - 0.5 <= pixels[0, 0].min() == pixels[0, 0].max() <= GROUND[1] + 0.5


def test_tints_need_no_clipping():
    values = np.array(list(PALETTE.values()))
    assert values.min() - MAX_TINT >= 0
    assert values.max() + MAX_TINT <= 255


def test_colours_and_the_ground_are_far_apart():
    values = np.array([*PALETTE.values(), (GROUND[0],) * 3], dtype=float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=2) + 1e9 * np.eye(len(values))
    assert distances.min() > 100


def test_large_objects_are_larger():
    for shape in SHAPES:
        areas = {
            size: [
                (ink(render_scene(Scene((Item(shape, "black", size, "middle"),)), random.Random(i))) / 220).sum()
                for i in range(30)
            ]
            for size in SIZES
        }
        assert min(areas["large"]) > 1.7 * max(areas["small"])


def test_pictures_follow_from_the_seed_in_every_process():
    program = (
        "import random, hashlib; from modeling_emu.shapes import render, scenes; rng = random.Random(3);"
        "pictures = [render.render_scene(scenes.draw_scene(rng), rng) for _ in range(20)];"
        "pictures += [frame for _ in range(5) for frame in render.render_clip(scenes.draw_clip(rng), rng)];"
        "print(hashlib.sha256(b''.join(picture.tobytes() for picture in pictures)).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(printed) == 1


def test_two_pictures_of_a_scene_differ():
    rng = random.Random(0)
    scene = draw_scene(rng)
    assert render_scene(scene, rng).tobytes() != render_scene(scene, rng).tobytes()


def test_a_larger_picture_shows_the_same():
    rng = random.Random(0)
    for _ in range(20):
        scene, seed = draw_scene(rng), rng.random()
        small = np.asarray(render_scene(scene, random.Random(seed)), dtype=float)
        large = render_scene(scene, random.Random(seed), size=96).reduce(3)
        assert np.abs(small - np.asarray(large, dtype=float)).max() < 60
        assert np.abs(small - np.asarray(large, dtype=float)).mean() < 1


@pytest.mark.parametrize("size", [0, 16, 33, -32])
def test_other_sizes_are_refused(size):
    rng = random.Random(0)
    with pytest.raises(ValueError, match=f"size of the picture: got {size}"):
        render_scene(draw_scene(rng), rng, size=size)
    with pytest.raises(ValueError, match=f"size of the picture: got {size}"):
        render_clip(draw_clip(rng), rng, size=size)


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_object_that_changes_does(change):
    rng = random.Random(0)
    for _ in range(5):
        clip = draw_clip_with(change, rng)
        (still,) = [item for item in clip.start.items if item != clip.before]
        x, y = (int(centre) for centre in CENTRES[still.place])
        frames = np.stack([np.asarray(frame, dtype=int) for frame in render_clip(clip, rng, 5)])
        # A large heart that turns may reach into the outermost pixels of its neighbour's quarter.
        quarter = frames[:, y - 7 : y + 7, x - 7 : x + 7]
        assert (quarter == quarter[0]).all()
        steps = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2, 3))
        assert steps.min() > 20 or change == "changes colour"
        assert steps.min() > 5


def test_a_turn_ends_as_it_began_and_is_seen_between():
    clip = draw_clip_with("turns", random.Random(0), num_items=1)
    for num_frames in range(3, 10):
        frames = render_clip(clip, random.Random(1), num_frames)
        assert len(frames) == num_frames
        assert frames[0].tobytes() == frames[-1].tobytes()
        for frame in frames[1:-1]:
            assert (np.abs(ink(frame) - ink(frames[0])) > 60).sum() > 5


def test_too_few_frames_are_refused():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="turns: got 2, expected 3 or more"):
        render_clip(draw_clip_with("turns", rng), rng, 2)
    with pytest.raises(ValueError, match="grows: got 1, expected 2 or more"):
        render_clip(draw_clip_with("grows", rng), rng, 1)
    assert len(render_clip(draw_clip_with("grows", rng), rng, 2)) == 2


def test_a_thousand_scenes_take_less_than_a_second():
    rng = random.Random(0)
    scenes = [draw_scene(rng, "train", 3) for _ in range(300)]
    begin = time.process_time()
    for scene in scenes:
        render_scene(scene, rng)
    assert time.process_time() - begin < 0.3
