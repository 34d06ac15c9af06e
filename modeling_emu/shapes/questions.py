"""Questions about scenes and clips of the shapes' world, each with the one answer that is right, and dialogues.

An answer is a short text that follows from the scene alone. Yes and no are equally likely.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .captions import NUMBERS, add_article, describe_attribute, describe_change, describe_place, name_pair
from .scenes import CHANGES, COLOURS, HELD_OUT_PAIRS, PLACES, SHAPES, Clip, Item, Scene, is_above, is_left_of


RELATIONS: dict[str, Callable[[Item, Item], bool]] = {
    "to the left of": is_left_of,
    "to the right of": lambda a, b: is_left_of(b, a),
    "above": is_above,
    "below": lambda a, b: is_above(b, a),
}
ATTRIBUTE_QUESTIONS = {
    "colour": "what colour is {}",
    "shape": "what shape is {}",
    "size": "what size is {}",
    "place": "where is {}",
}
CLIP_ATTRIBUTES = ("colour", "size", "place")  # what can change


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        kind: one of `QUESTION_KINDS` or `CLIP_QUESTION_KINDS`; in a dialogue, the attribute that is asked for.
    """

    text: str
    answer: str
    kind: str


def list_names(scene: Scene, item: Item, asked: str) -> list[str]:
    """Every way to name one object of a scene so that it can be no other, without the attribute that is asked for."""
    names = [name_pair(item)] if asked not in ("colour", "shape") else []
    if asked != "shape" and sum(other.shape == item.shape for other in scene.items) == 1:
        names.append(f"the {item.shape}")
    if asked != "colour" and sum(other.colour == item.colour for other in scene.items) == 1:
        names.append(f"the {item.colour} object")
    if asked != "place":
        names.append(f"the object {describe_place(item.place)}")
    return names


def ask_attribute(scene: Scene, rng: random.Random, attribute: str) -> Question:
    """What colour, shape, size or place one object has."""
    item = rng.choice(scene.items)
    name = rng.choice(list_names(scene, item, attribute))
    return Question(f"{ATTRIBUTE_QUESTIONS[attribute].format(name)}?", describe_attribute(item, attribute), attribute)


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """How many objects there are, or how many of one colour or shape: one that is there, as often as any."""
    subject = rng.choice(("all", "colour", "shape"))
    if subject == "all":
        return Question("how many objects are there?", f"{NUMBERS[len(scene.items)]}.", "count")
    own = [getattr(item, subject) for item in scene.items]
    value = rng.choice(own if rng.random() < 0.5 else COLOURS if subject == "colour" else SHAPES)
    plural = f"{value} objects" if subject == "colour" else f"{value}{'es' if value.endswith('s') else 's'}"
    return Question(f"how many {plural} are there?", f"{NUMBERS[own.count(value)]}.", "count")


def ask_relation(scene: Scene, rng: random.Random) -> Question:
    """Whether one object is to the left of another, above it, ..."""
    first, second = rng.sample(scene.items, 2)
    is_true = rng.random() < 0.5
    relations = [relation for relation, holds in RELATIONS.items() if holds(first, second) == is_true]
    text = f"is {name_pair(first)} {rng.choice(relations)} {name_pair(second)}?"
    return Question(text, answer_yes_or_no(is_true), "relation")


def answer_yes_or_no(is_true: bool) -> str:
    """ "yes." or "no."."""
    return "yes." if is_true else "no."


def list_neighbour_questions(scene: Scene) -> list[Question]:
    """Which object is to the left of another, above it, ...: wherever there is exactly one."""
    questions = []
    for item in scene.items:
        for relation, holds in RELATIONS.items():
            others = [other for other in scene.items if holds(other, item)]
            if len(others) == 1:
                text = f"what is {relation} {name_pair(item)}?"
                questions.append(Question(text, f"{name_pair(others[0])}.", "neighbour"))
    return questions


def ask_existence(scene: Scene, rng: random.Random) -> Question:
    """Whether there is an object of a colour, of a shape, of both, or at a place.

    A pair that is missing shares its colour or shape with an object of the scene as often as not. Held-out pairs are
    named only where the scene has one.
    """
    may_name_all = any(item.pair in HELD_OUT_PAIRS for item in scene.items)
    pairs = [(c, s) for c in COLOURS for s in SHAPES if may_name_all or (c, s) not in HELD_OUT_PAIRS]
    is_there = rng.random() < 0.5
    subject = rng.choice(("pair", "colour", "shape", "place"))
    own = [getattr(item, subject) for item in scene.items]
    values = {"pair": pairs, "colour": COLOURS, "shape": SHAPES, "place": PLACES}[subject]
    missing = [value for value in values if value not in own]
    if subject == "pair" and rng.random() < 0.5:
        missing = [pair for pair in missing if any(pair[0] == c or pair[1] == s for c, s in own)]
    value = rng.choice(own if is_there else missing)
    thing = {
        "pair": lambda: add_article(" ".join(value)),
        "colour": lambda: f"{add_article(value)} object",
        "shape": lambda: add_article(value),
        "place": lambda: f"an object {describe_place(value)}",
    }[subject]()
    return Question(f"is there {thing}?", answer_yes_or_no(is_there), "existence")


def list_lasting_names(clip: Clip, before: Item, after: Item, asked: str) -> list[str]:
    """Names of an object that are its own from the clip's start to its end."""
    names = list_names(clip.end, after, asked)
    return [name for name in list_names(clip.start, before, asked) if name in names]


def pair_items(clip: Clip) -> list[tuple[Item, Item]]:
    """Every object of a clip, at its start and at its end."""
    return [(item, clip.after if item == clip.before else item) for item in clip.start.items]


def ask_change(clip: Clip, rng: random.Random) -> Question:
    """What changes."""
    answer = f"{name_pair(clip.before)} {describe_change(clip.change, clip.after)}."
    return Question("what changes?", answer, "change")


def ask_moment(clip: Clip, rng: random.Random, moment: str) -> Question:
    """What colour, size or place an object has at the start or at the end."""
    before, after, asked, name = rng.choice(
        [
            (before, after, asked, name)
            for before, after in pair_items(clip)
            for asked in CLIP_ATTRIBUTES
            for name in list_lasting_names(clip, before, after, asked)
        ]
    )
    answer = describe_attribute(before if moment == "start" else after, asked)
    return Question(f"{ATTRIBUTE_QUESTIONS[asked].format(name)} at the {moment}?", answer, moment)


def ask_action(clip: Clip, rng: random.Random) -> Question:
    """Whether an object moves, grows, ..."""
    changed = (clip.before, clip.after)
    pairs = pair_items(clip)
    is_true = rng.random() < 0.5
    wrong = [(pair, change) for pair in pairs for change in CHANGES if (pair, change) != (changed, clip.change)]
    (before, after), change = (changed, clip.change) if is_true else rng.choice(wrong)
    verb, *rest = change.split()
    name = rng.choice(list_lasting_names(clip, before, after, "size"))  # the size is no part of any name
    return Question(f"does {name} {' '.join([verb.removesuffix('s'), *rest])}?", answer_yes_or_no(is_true), "action")


SCENE_ASKERS: dict[str, Callable[[Scene, random.Random], Question]] = {
    "colour": lambda scene, rng: ask_attribute(scene, rng, "colour"),
    "shape": lambda scene, rng: ask_attribute(scene, rng, "shape"),
    "size": lambda scene, rng: ask_attribute(scene, rng, "size"),
    "place": lambda scene, rng: ask_attribute(scene, rng, "place"),
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
    "neighbour": lambda scene, rng: rng.choice(list_neighbour_questions(scene)),
}
CLIP_ASKERS: dict[str, Callable[[Clip, random.Random], Question]] = {
    "change": ask_change,
    "start": lambda clip, rng: ask_moment(clip, rng, "start"),
    "end": lambda clip, rng: ask_moment(clip, rng, "end"),
    "action": ask_action,
}
QUESTION_KINDS, CLIP_QUESTION_KINDS = tuple(SCENE_ASKERS), tuple(CLIP_ASKERS)
KINDS_OF_SEVERAL_ITEMS = ("relation", "neighbour")
YES_OR_NO_KINDS = ("existence", "relation", "action")
QUIZ_LENGTH, CLIP_QUIZ_LENGTH = 8, 6
# What lookups ask for, and how often each: a place is what is hardest to find by a name.
LOOKUPS = {"place": 5, "colour": 3, "shape": 1, "size": 1}
# What comparisons ask for; neighbours come out rarer, as a scene has few such questions.
COMPARISONS = {"relation": 4, "neighbour": 4, "count": 2}


def list_kinds(scene: Scene) -> list[str]:
    """The kinds of questions that a scene allows."""
    return [kind for kind in QUESTION_KINDS if len(scene.items) > 1 or kind not in KINDS_OF_SEVERAL_ITEMS]


def draw_question(scene: Scene, rng: random.Random) -> Question:
    """A question that has one exact answer for this scene; its kind is drawn evenly among those that the scene allows."""
    return SCENE_ASKERS[rng.choice(list_kinds(scene))](scene, rng)


def draw_clip_question(clip: Clip, rng: random.Random) -> Question:
    """A question that has one exact answer for this clip."""
    return CLIP_ASKERS[rng.choice(CLIP_QUESTION_KINDS)](clip, rng)


def draw_quiz(scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Eight different questions on one picture, each of which can be understood alone.

    Half of them are answered by yes or no: such answers say least each, and take the most examples to learn.
    """
    return draw_mixed(lambda kind: SCENE_ASKERS[kind](scene, rng), list_kinds(scene), QUIZ_LENGTH, rng)


def draw_clip_quiz(clip: Clip, rng: random.Random) -> tuple[Question, ...]:
    """Six different questions on one clip, half of them answered by yes or no."""
    return draw_mixed(lambda kind: CLIP_ASKERS[kind](clip, rng), CLIP_QUESTION_KINDS, CLIP_QUIZ_LENGTH, rng)


def draw_lookups(scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Eight different questions for one attribute of one object, half of them for its place.

    Captions name objects in reading order, so that they teach places in turn and no place of a thing by its name. What
    relations and neighbours build on is learned from these.
    """
    return draw_weighted(LOOKUPS, scene, rng)


def draw_comparisons(scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Eight different questions that take a look at several objects at once, for a scene of two or more.

    Quizzes ask them too seldom to be learned: not every scene allows them, and their answers join what lookups give.
    """
    return draw_weighted(COMPARISONS, scene, rng)


def draw_weighted(weights: dict[str, int], scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Eight different questions; each draw's kind is as likely as its weight says, and repeats are drawn again."""
    kinds = [kind for kind, weight in weights.items() for _ in range(weight)]
    return draw_different(lambda _: SCENE_ASKERS[rng.choice(kinds)](scene, rng), QUIZ_LENGTH, rng)


def draw_mixed(
    ask: Callable[[str], Question], kinds: Sequence[str], num_questions: int, rng: random.Random
) -> tuple[Question, ...]:
    """Different questions in random order, every other one of a kind that is answered by yes or no.

    Args:
        ask: gives a question of a kind.
        kinds: to choose from, both those of yes and no and others.
    """
    yes_or_no = [kind for kind in kinds if kind in YES_OR_NO_KINDS]
    others = [kind for kind in kinds if kind not in YES_OR_NO_KINDS]
    return draw_different(lambda place: ask(rng.choice(yes_or_no if place % 2 else others)), num_questions, rng)


def draw_different(ask: Callable[[int], Question], num_questions: int, rng: random.Random) -> tuple[Question, ...]:
    """Different questions in random order.

    Args:
        ask: gives a question, told how many there are so far; asked again where it repeats itself.
    """
    questions: dict[str, Question] = {}
    while len(questions) < num_questions:
        question = ask(len(questions))
        questions.setdefault(question.text, question)
    return tuple(rng.sample(list(questions.values()), num_questions))


def draw_dialogue(scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Two or three questions on one picture, of which only the first can be understood alone.

    Each later one asks for another attribute of the same object ("and where is it?"), or for the same attribute of
    another object ("and the ring?"), of which "it" speaks from then on.
    """
    item, asked = rng.choice(scene.items), rng.choice(tuple(ATTRIBUTE_QUESTIONS))
    name = rng.choice(list_names(scene, item, asked))
    turns = [Question(f"{ATTRIBUTE_QUESTIONS[asked].format(name)}?", describe_attribute(item, asked), asked)]
    said = {(item, asked)}
    for _ in range(rng.choice((1, 2))):
        others = [other for other in scene.items if (other, asked) not in said]
        unsaid = [a for a in ATTRIBUTE_QUESTIONS if (item, a) not in said and getattr(item, a) not in name]
        if not others and not unsaid:
            break
        if others and (not unsaid or rng.random() < 0.5):
            item = rng.choice(others)
            name = rng.choice(list_names(scene, item, asked))
            text = f"and {name}?"
        else:
            asked = rng.choice(unsaid)
            text = f"and {ATTRIBUTE_QUESTIONS[asked].format('it')}?"
        said.add((item, asked))
        turns.append(Question(text, describe_attribute(item, asked), asked))
    return tuple(turns)


def majority_baseline(questions: Iterable[Question]) -> dict[str, float]:
    """What always giving the commonest answer of a kind gets right, as a fraction per kind.

    Args:
        questions: as many as the figure is to be trusted; the commonest answers are those of these very questions.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][question.answer] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in sorted(answers.items())}
