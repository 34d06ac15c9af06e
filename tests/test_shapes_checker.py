"""The reader of pictures: right about pictures of scenes, also poor ones, and never content with wrong ones."""

import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from modeling_emu.shapes.checker import (
    agrees,
    degrade,
    judge,
    measure_checker,
    read_clip,
    read_picture,
    read_scene,
)
from modeling_emu.shapes.render import CENTRES, DIAMETERS, PALETTE, Figure, paint, render_clip, render_scene
from modeling_emu.shapes.scenes import (
    CHANGES,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Clip,
    Item,
    Scene,
    draw_clip,
    draw_scene,
)


GREY = 246.0


def get_figure(item: Item) -> Figure:
    """The object as the rules of painting have it, without chance."""
    return Figure(item.shape, *CENTRES[item.place], DIAMETERS[item.size], PALETTE[item.colour])


def draw_item(rng: random.Random) -> Item:
    return draw_scene(rng, "train", 1).items[0]


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels + 0.5).clip(0, 255).astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_object_is_read_in_every_place(shape, size):
    for seed, colour in enumerate(COLOURS):
        for place in PLACES:
            scene = Scene((Item(shape, colour, size, place),))
            assert read_scene(render_scene(scene, random.Random(seed))) == scene


@pytest.mark.parametrize(
    ("noise", "blur", "limit"), [(0.0, 0.0, 0.005), (8.0, 0.5, 0.02), (10.0, 0.0, 0.02), (10.0, 0.8, 0.02)]
)
def test_errors_are_rare(noise, blur, limit):
    errors = measure_checker(200, seed=1, noise=noise, blur=blur)
    assert errors.num_items > 300
    assert errors.unreadable + errors.wrong <= limit
    assert max(errors.items.values()) <= 4 * limit


def test_measuring_counts_errors():
    """So much blur that much is lost: objects that cannot be read are counted, and what they were taken for."""
    errors = measure_checker(30, seed=0, blur=3.0)
    assert errors.unreadable > 0.5
    assert max(errors.items[size] for size in SIZES) > 0.5
    assert sum(errors.confusions.values()) <= errors.num_items
    assert all(painted != read for painted, read in errors.confusions)


def test_measuring_follows_from_the_seed():
    assert measure_checker(10, 3, 12.0, 1.0) == measure_checker(10, 3, 12.0, 1.0)


@pytest.mark.parametrize("arguments", [{"num_scenes": 0}, {"noise": -1.0}, {"blur": -0.5}])
def test_measuring_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="measurement of the checker: got"):
        measure_checker(**arguments)


def test_the_fit_finds_where_an_object_is():
    rng = random.Random(0)
    for _ in range(40):
        item = draw_item(rng)
        x, y = (centre + rng.uniform(-1, 1) for centre in CENTRES[item.place])
        diameter = DIAMETERS[item.size] + rng.uniform(-0.5, 0.5)
        (found,) = read_picture(paint([replace(get_figure(item), x=x, y=y, diameter=diameter)], GREY)).found
        assert (found.x, found.y, found.diameter) == pytest.approx((x, y, diameter), abs=0.1)
        assert found.colour_error < 5
        assert found.misfit < 0.002


def test_a_colour_that_is_a_little_off_is_read():
    rng = random.Random(0)
    for _ in range(60):
        item = draw_item(rng)
        colour = tuple(min(255.0, max(0.0, value + rng.choice((-20, 20)))) for value in PALETTE[item.colour])
        assert agrees(Scene((item,)), paint([replace(get_figure(item), colour=colour)], GREY))


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "place"])
def test_no_picture_with_a_wrong_attribute_agrees(attribute):
    words = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}[attribute]
    rng = random.Random(attribute)
    verdicts = {"shape": "shapes", "colour": "colours", "size": "sizes", "place": "places"}
    noise_rng = np.random.default_rng(0)
    count = 0
    while count < 60:
        scene = draw_scene(rng)
        item = rng.choice(scene.items)
        other = replace(item, **{attribute: rng.choice([word for word in words if word != getattr(item, attribute)])})
        try:
            wrong = Scene.of([other if each == item else each for each in scene.items])
        except ValueError:
            continue
        count += 1
        image = degrade(render_scene(wrong, rng), 4.0, 0.3, noise_rng)
        assert not agrees(scene, image)
        verdict = judge(scene, image)
        assert (verdict.right, verdict.clean, verdict.count) == (False, True, True)
        names = {"shapes", "colours", "sizes", "places"}
        assert {name for name in names if not getattr(verdict, name)} == {verdicts[attribute]}


def test_swapped_attributes_are_seen():
    """The words are all there, but not together."""
    scene = Scene((Item("circle", "red", "small", "top left"), Item("square", "blue", "small", "top right")))
    swapped = Scene((Item("square", "red", "small", "top left"), Item("circle", "blue", "small", "top right")))
    verdict = judge(scene, render_scene(swapped, random.Random(0)))
    assert verdict.shapes
    assert verdict.colours
    assert not verdict.right


@pytest.mark.parametrize("num_items", [1, 2])
def test_missing_and_additional_objects_are_seen(num_items):
    rng = random.Random(0)
    for _ in range(30):
        more = draw_scene(rng, "train", num_items + 1)
        fewer = Scene(more.items[:num_items])
        for scene, shown in ((more, fewer), (fewer, more)):
            verdict = judge(scene, render_scene(shown, rng))
            assert not verdict.right
            assert not verdict.count
            assert verdict.clean


def test_what_is_no_scene_is_none():
    corners = [place for place in PLACES if place != "middle"]
    four = [get_figure(Item("ring", "red", "small", place)) for place in corners]
    assert len(read_picture(paint(four, GREY)).found) == 4
    assert read_scene(paint(four, GREY)) is None
    assert len(read_picture(paint(four[:2], GREY)).found) == 2
    assert read_scene(paint(four[:2], GREY)) is None
    assert read_picture(paint([], GREY)).found == ()
    assert read_scene(paint([], GREY)) is None
    beside = [get_figure(Item("ring", "red", "small", place)) for place in ("middle", "top left")]
    assert read_scene(paint(beside, GREY)) is None


def test_pictures_of_something_else_are_none():
    rng = np.random.default_rng(0)
    assert read_scene(to_image(rng.uniform(0, 255, (32, 32, 3)))) is None
    assert read_scene(to_image(np.zeros((32, 32, 3)))) is None
    assert read_scene(to_image(np.full((32, 32, 3), 128.0))) is None
    item = Item("square", "red", "large", "middle")
    assert agrees(Scene((item,)), paint([get_figure(item)], 235.0))
    assert read_scene(paint([get_figure(item)], 210.0)) is None
    stripes = np.full((32, 32, 3), GREY)
    stripes[::4] = PALETTE["red"]
    assert read_scene(to_image(stripes)) is None


@pytest.mark.parametrize(("width", "strength"), [(2, 0.6), (3, 0.4), (3, 1.0), (5, 0.3), (5, 1.0), (8, 0.3)])
def test_stray_blobs_are_seen(width, strength):
    rng = random.Random(width)
    for _ in range(40):
        item = draw_item(rng)
        figure = get_figure(item)
        pixels = to_pixels(paint([figure], GREY))
        while True:
            x, y = rng.randint(0, 32 - width), rng.randint(0, 32 - width)
            around = pixels[max(y - 1, 0) : y + width + 1, max(x - 1, 0) : x + width + 1]
            if np.ptp(around) < 1:
                break
        blob = pixels[y : y + width, x : x + width]
        blob += strength * (np.array(PALETTE[rng.choice(COLOURS)]) - blob)
        assert not agrees(Scene((item,)), to_image(pixels))


@pytest.mark.parametrize("turns", range(4))
def test_half_a_shape_is_not_that_shape(turns):
    rng = random.Random(turns)
    for _ in range(30):
        item = draw_item(rng)
        pixels = np.rot90(to_pixels(paint([get_figure(item)], GREY)), turns).copy()
        rows = np.flatnonzero((pixels.min(axis=2) < 200).any(axis=1))
        pixels[rows[len(rows) // 2] :] = round(GREY)
        assert not agrees(Scene((item,)), to_image(np.rot90(pixels, -turns)))


@pytest.mark.parametrize("size", SIZES)
def test_halfway_between_two_shapes_is_neither(size):
    images = {shape: to_pixels(paint([get_figure(Item(shape, "blue", size, "middle"))], GREY)) for shape in SHAPES}
    for i, shape in enumerate(SHAPES):
        for other in SHAPES[:i]:
            image = to_image((images[shape] + images[other]) / 2)
            assert not agrees(Scene((Item(shape, "blue", size, "middle"),)), image)
            assert not agrees(Scene((Item(other, "blue", size, "middle"),)), image)


def test_halfway_between_two_colours_is_neither():
    item = Item("square", "red", "large", "middle")
    for i, colour in enumerate(COLOURS):
        for other in COLOURS[:i]:
            mixed = tuple((a + b) / 2 for a, b in zip(PALETTE[colour], PALETTE[other], strict=True))
            image = paint([replace(get_figure(item), colour=mixed)], GREY)
            assert not agrees(Scene((replace(item, colour=colour),)), image)
            assert not agrees(Scene((replace(item, colour=other),)), image)


def test_an_object_of_two_colours_is_neither():
    rng = random.Random(0)
    for shape in SHAPES:
        colour, other = rng.sample(COLOURS, 2)
        items = [Item(shape, each, "large", "middle") for each in (colour, other)]
        pixels = to_pixels(paint([get_figure(items[0])], GREY))
        pixels[:, :16] = to_pixels(paint([get_figure(items[1])], GREY))[:, :16]
        for item in items:
            assert not agrees(Scene((item,)), to_image(pixels))


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"diameter": 10.5}, "size"), ({"diameter": 6.0}, "size"), ({"x": 20.2}, "place"), ({"angle": 0.125}, "shape")],
)
def test_what_is_not_clear_is_named(change, problem):
    figure = replace(get_figure(Item("triangle", "blue", "small", "middle")), **change)
    reading = read_picture(paint([figure], GREY))
    assert reading.scene is None
    assert problem in {problem for found in reading.found for problem in found.problems}


def test_pale_objects_are_not_clear():
    rng = random.Random(0)
    for _ in range(20):
        item = draw_item(rng)
        pale = tuple(0.6 * value + 0.4 * GREY for value in PALETTE[item.colour])
        assert not agrees(Scene((item,)), paint([replace(get_figure(item), colour=pale)], GREY))


def test_larger_pictures_are_read_and_others_refused():
    rng = random.Random(0)
    scene = draw_scene(rng)
    assert agrees(scene, render_scene(scene, rng, size=128))
    assert agrees(scene, render_scene(scene, rng).convert("RGBA"))
    for size in ((32, 64), (40, 40), (16, 16)):
        with pytest.raises(ValueError, match=f"size of the picture: got {size[0]} x {size[1]}"):
            read_scene(Image.new("RGB", size))


@pytest.mark.parametrize("change", CHANGES)
def test_clips_are_read(change):
    rng, noise_rng = random.Random(change), np.random.default_rng(0)
    count = 0
    while count < 8:
        clip = draw_clip(rng)
        if clip.change != change:
            continue
        count += 1
        frames = [degrade(frame, 5.0, 0.3, noise_rng) for frame in render_clip(clip, rng, num_frames=4)]
        assert read_scene(frames[0]) == clip.start
        assert read_scene(frames[-1]) == clip.end
        assert read_clip(frames) == clip


def test_frames_in_which_nothing_or_too_much_happens_are_no_clip():
    rng = random.Random(0)
    heart = Item("heart", "red", "large", "top left")
    ring = Item("ring", "blue", "small", "bottom right")
    still = render_scene(Scene((heart, ring)), rng)
    assert read_clip([still] * 4) is None
    other = render_scene(Scene((replace(heart, size="small"), replace(ring, size="large"))), rng)
    assert read_clip([still, other]) is None
    assert read_clip([still, paint([], GREY)]) is None
    assert read_clip([still, paint([], GREY), still]) is None
    third = Item("cross", "black", "small", "top right")
    assert read_clip([render_scene(Scene((heart, third, ring)), rng)] * 2) is None
    with pytest.raises(ValueError, match="frames of a clip: got 1"):
        read_clip([still])


def test_a_clip_backwards_is_another_one():
    clip = Clip(
        Scene((Item("cross", "red", "small", "top left"),)),
        Scene((Item("cross", "red", "small", "top right"),)),
        "moves right",
    )
    frames = render_clip(clip, random.Random(0))
    assert read_clip(frames[::-1]) == Clip(clip.end, clip.start, "moves left")


def test_reading_is_fast():
    rng = random.Random(0)
    images = [render_scene(draw_scene(rng), rng) for _ in range(60)]
    read_picture(images[0])
    begin = time.process_time()
    for image in images:
        read_picture(image)
    assert time.process_time() - begin < 2 * 60 / 100


def test_the_checker_needs_no_network():
    """Neither of ours nor of others: what judges generated pictures must not share a mistake with what painted them."""
    program = "import sys, modeling_emu.shapes.checker; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = set(result.stdout.split())
    assert {"torch", "transformers", "diffusers", "scipy"} & modules == set()
    ours = {name for name in modules if name.startswith("modeling_emu.")}
    assert ours == {"modeling_emu.shapes"} | {
        f"modeling_emu.shapes.{name}" for name in ("scenes", "render", "checker")
    }


def test_an_object_that_is_not_clear_counts_for_nothing_it_is_not():
    item = Item("square", "red", "large", "middle")
    image = paint([replace(get_figure(item), diameter=10.5)], GREY)
    verdict = judge(Scene((item,)), image)
    assert (verdict.count, verdict.shapes, verdict.colours, verdict.places, verdict.clean) == (True,) * 5
    assert not verdict.sizes
    assert not verdict.right
