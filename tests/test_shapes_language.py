"""The grammar is read back exactly, and every answer is worked out a second time from the scene and the question's words."""

import random
import re
from collections import Counter

import pytest

from modeling_emu.shapes.captions import (
    Panel,
    list_captions,
    list_clip_captions,
    list_neighbours,
    list_panel_texts,
    parse_caption,
    parse_clip_caption,
    parse_panel,
    write_caption,
    write_clip_caption,
    write_panel,
)
from modeling_emu.shapes.questions import (
    CLIP_ASKERS,
    CLIP_QUESTION_KINDS,
    QUESTION_KINDS,
    SCENE_ASKERS,
    Question,
    draw_clip_question,
    draw_clip_quiz,
    draw_comparisons,
    draw_dialogue,
    draw_lookups,
    draw_question,
    draw_quiz,
    majority_baseline,
)
from modeling_emu.shapes.scenes import (
    CHANGES,
    COLOURS,
    HELD_OUT_PAIRS,
    PLACES,
    SHAPES,
    UNSEEN,
    Clip,
    Item,
    Scene,
    draw_clip,
    draw_scene,
)


CIRCLE = Item("circle", "red", "large", "top left")
RING = Item("ring", "blue", "small", "bottom right")
HEART = Item("heart", "red", "small", "bottom right")
NUMBER_WORDS = ["none", "one", "two", "three"]


def draw_scenes(num_scenes: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng, rng.choice(("train", "test", UNSEEN))) for _ in range(num_scenes)]


def draw_clips(num_clips: int, seed: int = 0) -> list[Clip]:
    rng = random.Random(seed)
    return [draw_clip(rng, rng.choice(("train", "train", UNSEEN))) for _ in range(num_clips)]


def draw_panels(num_panels: int, seed: int = 0) -> list[Panel]:
    rng = random.Random(seed)
    panels = []
    for scene in draw_scenes(num_panels, seed):
        before: list[Scene | None] = [None, *list_neighbours(scene)]
        if len(scene.items) > 1:
            before += [Scene(tuple(other for other in scene.items if other != item)) for item in scene.items] * 5
        panels.append(Panel(scene, rng.choice(before)))
    return panels


# Captions


def test_wordings_of_a_scene():
    assert list_captions(Scene((CIRCLE, RING))) == [
        "a large red circle at the top left and a small blue ring at the bottom right.",
        "there is a large red circle at the top left and a small blue ring at the bottom right.",
        "a picture of a large red circle at the top left and a small blue ring at the bottom right.",
        "at the top left is a large red circle and at the bottom right is a small blue ring.",
        "there is a large red circle at the top left; there is a small blue ring at the bottom right.",
        "a large red circle at the top left, to the left of a small blue ring at the bottom right.",
    ]
    assert list_captions(Scene((Item("ring", "blue", "small", "middle"),)))[0] == "a small blue ring in the middle."


def test_wordings_of_a_clip():
    after = Item("circle", "red", "large", "top right")
    assert list_clip_captions(Clip(Scene((CIRCLE, RING)), Scene((after, RING)), "moves right")) == [
        "a large red circle at the top left moves right and a small blue ring at the bottom right stays.",
        "a video of a large red circle at the top left that moves right and a small blue ring at the bottom right that "
        "stays.",
        "there is a large red circle at the top left and a small blue ring at the bottom right. the red circle moves "
        "right.",
    ]
    heart = Scene((HEART,))
    assert list_clip_captions(Clip(heart, heart, "turns"))[0] == "a small red heart at the bottom right turns."


def test_wordings_of_a_panel():
    assert list_panel_texts(Panel(Scene((CIRCLE, RING)), before=Scene((CIRCLE,)))) == [
        "then a blue ring comes. now there is a large red circle at the top left and a small blue ring at the bottom "
        "right.",
        "next a blue ring comes, so there is a large red circle at the top left and a small blue ring at the bottom "
        "right.",
    ]
    yellow = Item("ring", "yellow", "small", "bottom right")
    texts = list_panel_texts(Panel(Scene((yellow,)), before=Scene((RING,))))
    assert texts[0] == "then the blue ring becomes yellow. now there is a small yellow ring at the bottom right."


def test_every_wording_of_a_scene_is_read_back():
    for scene in draw_scenes(3000):
        captions = list_captions(scene)
        assert len(set(captions)) == len(captions)
        assert {parse_caption(caption) for caption in captions} == {scene}


def test_every_wording_of_a_clip_is_read_back():
    clips = draw_clips(1000)
    assert {clip.change for clip in clips} == set(CHANGES)
    for clip in clips:
        assert {parse_clip_caption(caption) for caption in list_clip_captions(clip)} == {clip}


def test_every_wording_of_a_panel_is_read_back():
    for panel in draw_panels(1000):
        assert {parse_panel(text) for text in list_panel_texts(panel)} == {panel}


def test_every_wording_is_written():
    rng = random.Random(0)
    scene, [clip], [panel] = Scene((CIRCLE, RING)), draw_clips(1), draw_panels(1)
    assert {write_caption(scene, rng) for _ in range(100)} == set(list_captions(scene))
    assert {write_clip_caption(clip, rng) for _ in range(100)} == set(list_clip_captions(clip))
    assert {write_panel(panel, rng) for _ in range(100)} == set(list_panel_texts(panel))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a large red circle at the top left",
        "A large red circle at the top left.",
        "a large red circle at the top left. ",
        "a red circle at the top left.",
        "a large pink circle at the top left.",
        "a large red circle at the middle.",
        "a large red circle in the top left.",
        "a large red circle at the top left and a small blue ring at the top left.",
        "a small blue ring at the bottom right and a large red circle at the top left.",
        "a large red circle at the top left and a small blue ring in the middle.",
        "a large red circle at the top left, to the left of a small blue ring at the bottom left.",
        "there is a large red circle at the top left and there is a small blue ring at the bottom right.",
        "a large red circle at the top left moves right.",
    ],
)
def test_what_is_no_caption_is_refused(text):
    assert parse_caption(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle at the top left.",
        "a large red circle at the top left moves up.",
        "a large red circle at the top left grows.",
        "a large red circle at the top left turns.",
        "a large red circle at the top left becomes red.",
        "a large red circle at the top left stays.",
        "a large red circle at the top left moves right and a small blue ring at the top right stays.",
        "there is a large red circle at the top left. the blue ring shrinks.",
    ],
)
def test_what_is_no_caption_of_a_clip_is_refused(text):
    assert parse_clip_caption(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "then a blue ring comes. now there is a large red circle at the top left.",
        "then the red circle grows. now there is a small red circle at the top left.",
        "then the red circle moves left. now there is a small red circle at the top right.",
        "now there is a small red circle at the top right.",
    ],
)
def test_what_is_no_text_of_a_panel_is_refused(text):
    assert parse_panel(text) is None


def test_a_panel_is_one_change_away_from_the_one_before():
    for before in (Scene((RING,)), Scene((CIRCLE,)), Scene((CIRCLE, RING))):
        with pytest.raises(ValueError, match="panels of a story"):
            Panel(Scene((CIRCLE,)), before=before)


# Answers, worked out from the words


def resolve(name: str, scene: Scene) -> Item:
    """The one object that a name fits."""
    [item] = [
        item
        for item in scene.items
        if name
        in (
            f"the {item.shape}",
            f"the {item.colour} object",
            f"the {item.colour} {item.shape}",
            f"the object at the {item.place}",
            f"the object in the {item.place}",
        )
    ]
    return item


def get_value(item: Item, question_word: str) -> str:
    if question_word == "where":
        return "in the middle." if item.place == "middle" else f"at the {item.place}."
    return {"colour": item.colour, "shape": item.shape, "size": item.size}[question_word] + "."


def holds(first: Item, relation: str, second: Item) -> bool:
    columns = ["right" in item.place for item in (first, second)]
    rows = ["bottom" in item.place for item in (first, second)]
    return {
        "to the left of": columns == [False, True],
        "to the right of": columns == [True, False],
        "above": rows == [False, True],
        "below": rows == [True, False],
    }[relation]


def find_answer(text: str, scene: Scene) -> str:
    relation = r"(to the left of|to the right of|above|below)"
    if match := re.fullmatch(r"what (colour|shape|size) is (the .+)\?", text):
        return get_value(resolve(match[2], scene), match[1])
    if match := re.fullmatch(r"where is (the .+)\?", text):
        return get_value(resolve(match[1], scene), "where")
    if match := re.fullmatch(r"how many (.+) are there\?", text):
        kinds = [{"objects", f"{item.colour} objects", f"{item.shape}s", f"{item.shape}es"} for item in scene.items]
        return NUMBER_WORDS[sum(match[1] in kind for kind in kinds)] + "."
    if match := re.fullmatch(rf"is (the .+) {relation} (the .+)\?", text):
        return "yes." if holds(resolve(match[1], scene), match[2], resolve(match[3], scene)) else "no."
    if match := re.fullmatch(rf"what is {relation} (the .+)\?", text):
        [other] = [item for item in scene.items if holds(item, match[1], resolve(match[2], scene))]
        return f"the {other.colour} {other.shape}."
    match = re.fullmatch(r"is there an? (.+)\?", text)
    words = set(match[1].split()) - {"object", "at", "in", "the"}
    return "yes." if any(words <= {item.shape, item.colour, *item.place.split()} for item in scene.items) else "no."


def find_clip_answer(text: str, clip: Clip) -> str:
    if match := re.fullmatch(r"(.+) at the (start|end)\?", text):
        return find_answer(f"{match[1]}?", clip.start if match[2] == "start" else clip.end)
    verb = f"becomes {clip.after.colour}" if clip.change == "changes colour" else clip.change
    if text == "what changes?":
        return f"the {clip.before.colour} {clip.before.shape} {verb}."
    name, action = re.fullmatch(r"does (the .+?) (move .+|grow|shrink|change colour|turn)\?", text).groups()
    infinitive = clip.change.replace("s", "", 1) if clip.change.startswith("moves") else clip.change
    infinitive = {"grows": "grow", "shrinks": "shrink", "turns": "turn", "changes colour": "change colour"}.get(
        infinitive, infinitive
    )
    return "yes." if resolve(name, clip.start) == clip.before and action == infinitive else "no."


def find_dialogue_answers(texts: list[str], scene: Scene) -> list[str]:
    answers, item, question_word = [], None, None
    for text in texts:
        if match := re.fullmatch(r"and (what (colour|shape|size)|where) is it\?", text):
            question_word = match[2] or "where"
        elif match := re.fullmatch(r"and (the .+)\?", text):
            item = resolve(match[1], scene)
        else:
            match = re.fullmatch(r"(?:what (colour|shape|size)|where) is (the .+)\?", text)
            question_word, item = match[1] or "where", resolve(match[2], scene)
        answers.append(get_value(item, question_word))
    return answers


def has_held_out_pair(text: str) -> bool:
    return any(f"{colour} {shape}" in text for colour, shape in HELD_OUT_PAIRS)


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_follow_from_the_scene(kind):
    rng = random.Random(kind)
    for scene in draw_scenes(1500, seed=1):
        if len(scene.items) == 1 and kind in ("relation", "neighbour"):
            continue
        question = SCENE_ASKERS[kind](scene, rng)
        assert question.kind == kind
        assert question.answer == find_answer(question.text, scene), (scene, question)


@pytest.mark.parametrize("kind", CLIP_QUESTION_KINDS)
def test_answers_follow_from_the_clip(kind):
    rng = random.Random(kind)
    for clip in draw_clips(1000, seed=1):
        question = CLIP_ASKERS[kind](clip, rng)
        assert question.kind == kind
        assert question.answer == find_clip_answer(question.text, clip), (clip, question)


def test_a_name_in_a_question_about_a_clip_is_the_same_object_s_from_start_to_end():
    rng = random.Random(0)
    for clip in draw_clips(500, seed=2):
        question = CLIP_ASKERS["end"](clip, rng)
        name = re.search(r"is (the .+) at the end", question.text)[1]
        start, end = resolve(name, clip.start), resolve(name, clip.end)
        assert start == end or (start, end) == (clip.before, clip.after)


def test_answers_of_a_dialogue_follow_from_the_scene_and_the_turns_before():
    rng = random.Random(0)
    lengths: Counter[int] = Counter()
    for scene in draw_scenes(2000, seed=3):
        dialogue = draw_dialogue(scene, rng)
        texts = [question.text for question in dialogue]
        assert [question.answer for question in dialogue] == find_dialogue_answers(texts, scene)
        assert len(set(texts)) == len(texts)
        assert all(text.startswith("and ") for text in texts[1:])
        lengths[len(dialogue)] += 1
    assert set(lengths) == {2, 3}


def test_a_quiz_has_different_questions_that_stand_alone_and_half_of_them_ask_for_yes_or_no():
    rng = random.Random(0)
    scenes, clips = draw_scenes(500, seed=7), draw_clips(300, seed=7)
    quizzes = [(draw_quiz(scene, rng), find_answer, scene, 8) for scene in scenes]
    quizzes += [(draw_clip_quiz(clip, rng), find_clip_answer, clip, 6) for clip in clips]
    for quiz, find, shown, length in quizzes:
        assert len({question.text for question in quiz}) == length
        assert [question.answer for question in quiz] == [find(question.text, shown) for question in quiz]
        assert sum(question.answer in ("yes.", "no.") for question in quiz) == length / 2
    kinds = {question.kind for quiz, *_ in quizzes for question in quiz}
    assert kinds == {*QUESTION_KINDS, *CLIP_QUESTION_KINDS}


@pytest.mark.parametrize(
    ("draw", "kinds", "main_kind"),
    [
        (draw_lookups, {"place", "colour", "shape", "size"}, "place"),
        (draw_comparisons, {"relation", "neighbour", "count"}, "relation"),
    ],
)
def test_pages_have_different_questions_and_about_half_are_of_their_main_kind(draw, kinds, main_kind):
    rng = random.Random(0)
    asked: Counter[str] = Counter()
    for scene in [scene for scene in draw_scenes(900, seed=7) if len(scene.items) > 1]:
        page = draw(scene, rng)
        assert len({question.text for question in page}) == len(page) == 8
        assert [question.answer for question in page] == [find_answer(question.text, scene) for question in page]
        asked.update(question.kind for question in page)
    assert set(asked) == kinds
    assert 0.4 < asked[main_kind] / asked.total() < 0.6


def test_no_pronoun_asks_for_what_the_name_before_it_has_said():
    rng = random.Random(0)
    for scene in draw_scenes(1000, seed=4):
        name = ""
        for question in draw_dialogue(scene, rng):
            name = (re.search(r"the .+(?=\?)", question.text) or [name])[0]
            said = re.sub(r"(at|in) the ", "", question.answer.rstrip("."))
            assert not re.search(rf"\b{said}\b", name)


def test_yes_and_no_are_balanced():
    rng = random.Random(0)
    scenes, clips = draw_scenes(4000, seed=5), draw_clips(2000, seed=5)
    several = [scene for scene in scenes if len(scene.items) > 1]
    questions = [SCENE_ASKERS["existence"](scene, rng) for scene in scenes]
    questions += [SCENE_ASKERS["relation"](scene, rng) for scene in several]
    questions += [CLIP_ASKERS["action"](clip, rng) for clip in clips]
    assert {question.answer for question in questions} == {"yes.", "no."}
    for share in majority_baseline(questions).values():
        assert share < 0.54


def test_kinds_of_questions_are_drawn_alike():
    rng = random.Random(0)
    several = [scene for scene in draw_scenes(4000, seed=6) if len(scene.items) > 1]
    kinds = Counter(draw_question(scene, rng).kind for scene in several)
    assert set(kinds) == set(QUESTION_KINDS)
    assert max(kinds.values()) < 1.4 * min(kinds.values())
    alone = {draw_question(Scene((CIRCLE,)), rng).kind for _ in range(200)}
    assert alone == set(QUESTION_KINDS) - {"relation", "neighbour"}
    assert {draw_clip_question(clip, rng).kind for clip in draw_clips(100)} == set(CLIP_QUESTION_KINDS)


def test_held_out_pairs_are_named_only_where_one_is_seen():
    rng = random.Random(0)
    for _ in range(3000):
        scene, clip = draw_scene(rng), draw_clip(rng)
        questions = [draw_question(scene, rng), draw_clip_question(clip, rng), *draw_dialogue(scene, rng)]
        assert not any(has_held_out_pair(question.text + question.answer) for question in questions)
    texts = [draw_question(draw_scene(rng, UNSEEN), rng).text for _ in range(1000)]
    assert any(has_held_out_pair(text) for text in texts)


def test_the_same_seed_says_the_same():
    def draw(seed: int) -> list:
        rng = random.Random(seed)
        scene, clip = draw_scene(rng), draw_clip(rng)
        return [write_caption(scene, rng), draw_question(scene, rng), draw_clip_question(clip, rng)]

    assert draw(0) == draw(0) != draw(1)


def test_majority_baseline():
    answers = {"a": ["yes.", "yes.", "no.", "yes."], "b": ["one."]}
    questions = [Question("?", answer, kind) for kind, given in answers.items() for answer in given]
    assert majority_baseline(questions) == {"a": 0.75, "b": 1.0}


def test_the_vocabulary_is_small():
    rng = random.Random(0)
    texts = [caption for scene in draw_scenes(1000) for caption in list_captions(scene)]
    texts += [caption for clip in draw_clips(300) for caption in list_clip_captions(clip)]
    texts += [text for panel in draw_panels(300) for text in list_panel_texts(panel)]
    for scene, clip in zip(draw_scenes(2000, 1), draw_clips(2000, 1), strict=True):
        questions = [draw_question(scene, rng), draw_clip_question(clip, rng), *draw_dialogue(scene, rng)]
        texts += [text for question in questions for text in (question.text, question.answer)]
    words = set(re.findall(r"[a-z]+", " ".join(texts)))
    assert all(re.fullmatch(r"[a-z,;.? ]+", text) for text in texts)
    assert {*SHAPES, *COLOURS, *" ".join(PLACES).split()} <= words
    assert len(words) < 100
