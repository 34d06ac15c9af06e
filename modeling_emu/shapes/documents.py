"""Tasks of the shapes' world: what a model is given, what should follow, and what is right, drawn from a split.

The same draw trains and judges: a training document is the prompt with its target behind it.

Of a split are the scenes and clips that a task asks for. In validation and test, what stands around them may be what
training shows: the examples of a pattern and the two pictures of a blend are training scenes always, and a story begins
with a scene of the split and may go on with one that is held back less. Training shows training scenes alone.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from .captions import (
    NUMBERS,
    Panel,
    describe_attribute,
    get_event,
    write_caption,
    write_clip_caption,
    write_panel,
)
from .questions import (
    Question,
    draw_clip_question,
    draw_clip_quiz,
    draw_comparisons,
    draw_dialogue,
    draw_lookups,
    draw_question,
    draw_quiz,
)
from .render import render_clip, render_scene
from .scenes import (
    COLOURS,
    MAX_ITEMS,
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
    get_split,
)


Document = list[dict[str, Any]]

VALUES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}
TEXT_PATTERNS = ("colour", "shape", "place", "number")
IMAGE_PATTERNS = ("colour", "shape", "place")
# Splits of a story's later scenes, by that of its first.
STORY_SPLITS = {split: SPLITS[: index + 1] for index, split in enumerate(SPLITS)} | {UNSEEN: (UNSEEN,)}
NUMBERS_OF_SEVERAL = (2, 3, 3)  # objects, of scenes that are asked about by name
STORY_EVENTS = ("arrival", "colour", "size", "place")


@dataclass(frozen=True)
class Task:
    """One thing to do, with what is right.

    Args:
        kind: one of `TASK_KINDS` or `QUIZ_KINDS`.
        prompt: parts `{"type": "text" | "image" | "video", ...}`, images PIL, videos lists of PIL frames. Texts stand side by
            side in conversations only.
        target: the parts that follow, in one form of several that may be right.
        expected: what must be said or shown. Of "caption", "draw", "pattern_image" and "blend" the scene, of
            "clip_caption" the clip, of "question", "clip_question" and "pattern_text" the answer, of "dialogue" and quizzes
            the answers in turn, of "story" the scenes in turn.
        shown: what each image and video of the document shows, in reading order.
        topic: the kind of the question, or what a pattern's texts name.
        answers: which parts of the document an assistant says; None for a document to learn as a whole.
    """

    kind: str
    prompt: Document
    target: Document
    expected: Scene | Clip | str | tuple[Scene, ...] | tuple[str, ...]
    shown: tuple[Scene | Clip, ...]
    topic: str = ""
    answers: tuple[int, ...] | None = None

    @property
    def document(self) -> Document:
        """Prompt and target: the document to train on."""
        return [*self.prompt, *self.target]


def make_text(text: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": text}


def make_image(scene: Scene, rng: random.Random) -> dict[str, Any]:
    """An image part that shows a scene."""
    image: Image.Image = render_scene(scene, rng)
    return {"type": "image", "image": image}


def make_video(clip: Clip, rng: random.Random) -> dict[str, Any]:
    """A video part that shows a clip."""
    frames: list[Image.Image] = render_clip(clip, rng)
    return {"type": "video", "video": frames}


def draw_caption_task(rng: random.Random, split: str) -> Task:
    """A picture, to be described."""
    scene = draw_scene(rng, split)
    target = [make_text(write_caption(scene, rng))]
    return Task("caption", [make_image(scene, rng)], target, scene, (scene,))


def draw_drawing_task(rng: random.Random, split: str) -> Task:
    """A description, to be drawn."""
    scene = draw_scene(rng, split)
    prompt = [make_text(write_caption(scene, rng))]
    return Task("draw", prompt, [make_image(scene, rng)], scene, (scene,))


def draw_question_task(rng: random.Random, split: str) -> Task:
    """A picture and a question about it."""
    scene = draw_scene(rng, split)
    question = draw_question(scene, rng)
    prompt, target = [make_image(scene, rng), make_text(question.text)], [make_text(question.answer)]
    return Task("question", prompt, target, question.answer, (scene,), question.kind, answers=(2,))


def draw_clip_caption_task(rng: random.Random, split: str) -> Task:
    """A clip, to be described."""
    clip = draw_clip(rng, split)
    target = [make_text(write_clip_caption(clip, rng))]
    return Task("clip_caption", [make_video(clip, rng)], target, clip, (clip,))


def draw_clip_question_task(rng: random.Random, split: str) -> Task:
    """A clip and a question about it."""
    clip = draw_clip(rng, split)
    question = draw_clip_question(clip, rng)
    prompt, target = [make_video(clip, rng), make_text(question.text)], [make_text(question.answer)]
    return Task("clip_question", prompt, target, question.answer, (clip,), question.kind, answers=(2,))


def make_turns_task(kind: str, media: dict[str, Any], shown: Scene | Clip, turns: tuple[Question, ...]) -> Task:
    """A picture or clip and a first question about it; the target has the later questions between the answers."""
    parts = [media, *(make_text(text) for turn in turns for text in (turn.text, turn.answer))]
    expected = tuple(turn.answer for turn in turns)
    return Task(kind, parts[:2], parts[2:], expected, (shown,), answers=tuple(range(2, len(parts), 2)))


def draw_dialogue_task(rng: random.Random, split: str) -> Task:
    """A picture and questions about it, of which only the first can be understood alone."""
    scene = draw_scene(rng, split)
    turns = draw_dialogue(scene, rng)
    return make_turns_task("dialogue", make_image(scene, rng), scene, turns)


def draw_quiz_task(rng: random.Random, split: str) -> Task:
    """A picture and many questions about it: more answers to learn from in as many tokens."""
    scene = draw_scene(rng, split)
    return make_turns_task("quiz", make_image(scene, rng), scene, draw_quiz(scene, rng))


def draw_lookup_task(rng: random.Random, split: str) -> Task:
    """A picture of several objects and many questions for their attributes."""
    scene = draw_scene(rng, split, rng.choice(NUMBERS_OF_SEVERAL))
    return make_turns_task("lookup", make_image(scene, rng), scene, draw_lookups(scene, rng))


def draw_comparison_task(rng: random.Random, split: str) -> Task:
    """A picture of several objects and many questions that take a look at several of them at once."""
    scene = draw_scene(rng, split, rng.choice(NUMBERS_OF_SEVERAL))
    return make_turns_task("comparison", make_image(scene, rng), scene, draw_comparisons(scene, rng))


def draw_clip_quiz_task(rng: random.Random, split: str) -> Task:
    """A clip and many questions about it."""
    clip = draw_clip(rng, split)
    return make_turns_task("clip_quiz", make_video(clip, rng), clip, draw_clip_quiz(clip, rng))


def draw_follower(scene: Scene, event: str, rng: random.Random) -> Scene | None:
    """What a scene becomes by an event of a story; None where a draw finds no such scene."""
    if event == "arrival":
        items = [*scene.items, Item(*(rng.choice(values) for values in VALUES.values()))]
    else:
        item = rng.choice(scene.items)
        changed = replace(item, **{event: rng.choice(VALUES[event])})
        items = [changed if other == item else other for other in scene.items]
    try:
        follower = Scene.of(items)
    except ValueError:  # too many objects, a place that is taken, or an object that is there already
        return None
    return None if follower == scene or get_event(scene, follower) is None else follower


def draw_story_scenes(rng: random.Random, split: str) -> tuple[Scene, ...]:
    """Two or three scenes, each one event after the one before."""
    events = rng.choices(STORY_EVENTS, k=rng.choice((1, 2)))
    max_items = MAX_ITEMS - events.count("arrival")
    scenes = [draw_scene(rng, split, rng.randint(1, max_items))]
    while len(scenes) <= len(events):
        follower = draw_follower(scenes[-1], events[len(scenes) - 1], rng)
        if follower is not None and get_split(follower) in STORY_SPLITS[split]:
            scenes.append(follower)
        elif rng.random() < 0.02:  # it may have none: begin again
            scenes = [draw_scene(rng, split, rng.randint(1, max_items))]
    return tuple(scenes)


def draw_story_task(rng: random.Random, split: str) -> Task:
    """The first text of a story, to be drawn and told on: every picture shows what the text before it says."""
    scenes = draw_story_scenes(rng, split)
    parts = []
    for scene, before in zip(scenes, (None, *scenes), strict=False):
        parts += [make_text(write_panel(Panel(scene, before), rng)), make_image(scene, rng)]
    return Task("story", parts[:1], parts[1:], scenes, scenes)


def describe_for_pattern(scene: Scene, topic: str) -> str:
    """What a pattern's text says of a picture: one attribute of its one object, or how many objects there are."""
    return f"{NUMBERS[len(scene.items)]}." if topic == "number" else describe_attribute(scene.items[0], topic)


def draw_text_pattern_task(rng: random.Random, split: str) -> Task:
    """Two or three pictures with texts that name one thing of each, and a last picture, of which to name the same.

    The examples differ in what is named.
    """
    topic = rng.choice(TEXT_PATTERNS)
    num_items = None if topic == "number" else 1
    scene = draw_scene(rng, split, num_items)
    examples: dict[str, Scene] = {}
    num_examples = rng.choice((2, 3))
    while len(examples) < num_examples:
        example = draw_scene(rng, "train", num_items)
        examples.setdefault(describe_for_pattern(example, topic), example)
    prompt = []
    for text, example in examples.items():
        prompt += [make_image(example, rng), make_text(text)]
    answer = describe_for_pattern(scene, topic)
    shown = (*examples.values(), scene)
    return Task("pattern_text", [*prompt, make_image(scene, rng)], [make_text(answer)], answer, shown, topic)


def draw_image_pattern_task(rng: random.Random, split: str) -> Task:
    """Two or three texts that name one attribute, each with a picture, and a last text, of which to draw the picture.

    The pictures show one object each, with all other attributes alike: the rule of the last picture. What is named differs
    from picture to picture.
    """
    num_examples = rng.choice((2, 3))
    while True:
        topic = rng.choice(IMAGE_PATTERNS)
        scene = draw_scene(rng, split, 1)
        [item] = scene.items
        others = [
            Scene((replace(item, **{topic: value}),)) for value in VALUES[topic] if value != getattr(item, topic)
        ]
        examples = [other for other in others if get_split(other) == "train"]
        if len(examples) >= num_examples:
            break
    prompt = []
    for example in (chosen := rng.sample(examples, num_examples)):
        prompt += [make_text(describe_for_pattern(example, topic)), make_image(example, rng)]
    prompt.append(make_text(describe_for_pattern(scene, topic)))
    return Task("pattern_image", prompt, [make_image(scene, rng)], scene, (*chosen, scene), topic)


def draw_blend_task(rng: random.Random, split: str) -> Task:
    """Two pictures of one object each, to be blended: the second picture, its object in the colour of the first's.

    They differ in colour and in shape.
    """
    while True:
        scene = draw_scene(rng, split, 1)
        [item] = scene.items
        shape = rng.choice([shape for shape in SHAPES if shape != item.shape])
        colour = rng.choice([colour for colour in COLOURS if colour != item.colour])
        first = Scene((Item(shape, item.colour, rng.choice(SIZES), rng.choice(PLACES)),))
        second = Scene((replace(item, colour=colour),))
        if get_split(first) == get_split(second) == "train":
            break
    prompt = [make_image(first, rng), make_image(second, rng)]
    return Task("blend", prompt, [make_image(scene, rng)], scene, (first, second, scene))


_DRAWERS: dict[str, Callable[[random.Random, str], Task]] = {
    "caption": draw_caption_task,
    "draw": draw_drawing_task,
    "question": draw_question_task,
    "clip_caption": draw_clip_caption_task,
    "clip_question": draw_clip_question_task,
    "dialogue": draw_dialogue_task,
    "quiz": draw_quiz_task,
    "clip_quiz": draw_clip_quiz_task,
    "lookup": draw_lookup_task,
    "comparison": draw_comparison_task,
    "story": draw_story_task,
    "pattern_text": draw_text_pattern_task,
    "pattern_image": draw_image_pattern_task,
    "blend": draw_blend_task,
}
# To learn from; what they ask, "question" and "clip_question" judge.
QUIZ_KINDS = ("quiz", "clip_quiz", "lookup", "comparison")
TASK_KINDS = tuple(kind for kind in _DRAWERS if kind not in QUIZ_KINDS)


def draw_task(kind: str, rng: random.Random, split: str = "train") -> Task:
    """Draw a task of a kind with its pictures.

    Args:
        kind: one of `TASK_KINDS` or `QUIZ_KINDS`.
        rng: all that is drawn comes from it, the pictures' jitter too.
        split: "train", "validation", "test", or "unseen", where what is asked for has a held-out pair.

    Raises:
        ValueError: if the kind or the split is none of these.
    """
    if kind not in _DRAWERS:
        raise ValueError(f"kind of a task: got {kind!r}, expected one of {', '.join(_DRAWERS)}")
    return _DRAWERS[kind](rng, split)
