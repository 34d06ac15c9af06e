"""The shapes' world as a benchmark: what is asked, what is right, and what is right without looking.

Pictures are judged by the world's checker and texts by its grammar, never by a network. Scenes come from a seed, of the
test split or with a pair of colour and shape that training never shows. Captions, drawings, patterns, blends and stories
are asked as plain documents, questions and dialogues in the processor's chat template. Of a caption, the first words are given.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..pipeline_emu import Document, EmuPipeline
from ..shapes.captions import parse_caption, parse_clip_caption, parse_panel
from ..shapes.checker import Verdict, agrees, judge
from ..shapes.documents import VALUES, Task, draw_task, make_text
from ..shapes.render import CANVAS_SIZE
from ..shapes.scenes import UNSEEN
from .asking import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    answer_conversations,
    continue_documents,
    continue_with_pictures,
    draw_pictures,
)
from .report import Figure, Report


NAME = "shapes"
TRAIN, TEST = "train", "test"
DRAWN_KINDS = ("draw", "pattern_image", "blend")
CAPTION_KINDS = ("caption", "clip_caption")
CHAT_KINDS = ("question", "clip_question")
# Those with short answers, of which some are commoner than others.
ANSWERED_KINDS = (*CHAT_KINDS, "pattern_text", "dialogue")
# The words of a caption that are given: after a picture alone, a pattern or a question may follow as well.
LEADS = {"caption": "a picture of", "clip_caption": "a video of"}
# How many pictures a story of this world may have.
STORY_LENGTHS = (2, 3)
# Ids that an answer may take, for each of the longest target: wordings differ, and one that rambles on must show it.
ROOM = 2
# Training tasks from which the commonest answers are taken, for each sample.
NUM_TRAINING_TASKS = 5

SHUFFLED, CONSTANT, MAJORITY, FIRST, SECOND = "shuffled", "constant", "majority", "first picture", "second picture"
BASELINES = {
    SHUFFLED: "the model's own answer to the next sample, taken for that to this one.",
    CONSTANT: "always what is the commonest right answer of these very samples.",
    MAJORITY: "always the commonest answer that training tasks have to this kind of question.",
    FIRST: "the first of the two pictures, copied.",
    SECOND: "the second of the two pictures, copied.",
}
CRITERIA = {
    "caption": "names every object with all its attributes, and nothing else",
    "clip_caption": "names every object with all its attributes, and what changes",
    "question": "exactly the right answer",
    "clip_question": "exactly the right answer",
    "draw": "shows every object with all its attributes, and nothing else",
    "pattern_text": "exactly the right answer",
    "pattern_image": "shows what the last text says, all else as in the pictures before",
    "blend": "the second picture, its object in the colour of the first",
    "story": "two or three pictures, each with all that its text says, each text one event after the one before",
    "dialogue": "exactly the right answer in every turn",
}
# Of a verdict on a picture, what is reported beside the whole, in words.
PICTURE_PARTS = {
    "count": "as many objects",
    "shapes": "the same shapes",
    "colours": "the same colours",
    "sizes": "the same sizes",
    "places": "the same places",
}


@dataclass(frozen=True)
class Ability:
    """Something that a model is asked to do.

    Args:
        name: in the report.
        kind: of the tasks, one of `TASK_KINDS`.
        split: of the scenes, "test" or "unseen".
    """

    name: str
    kind: str
    split: str = TEST


ABILITIES = (
    Ability("captions", "caption"),
    Ability("captions, unseen pairs", "caption", UNSEEN),
    Ability("questions", "question"),
    Ability("video captions", "clip_caption"),
    Ability("video questions", "clip_question"),
    Ability("pictures", "draw"),
    Ability("pictures, unseen pairs", "draw", UNSEEN),
    Ability("patterns, text to come", "pattern_text"),
    Ability("patterns, picture to come", "pattern_image"),
    Ability("blends", "blend"),
    Ability("stories", "story"),
    Ability("dialogues", "dialogue"),
)


def evaluate_shapes(
    pipeline: EmuPipeline,
    num_samples: int = 200,
    seed: int = 0,
    on_ability: Callable[[str, float], None] = lambda name, duration_s: None,
) -> Report:
    """Ask a model for everything that there is to do in the shapes' world, and count what is right.

    Args:
        pipeline: whole: encoder, processor, and a decoder of square pictures of a multiple of 32 pixels.
        num_samples: tasks per ability, 2 or more.
        seed: of scenes, wordings, pictures and noise. The same seed gives the same report.
        on_ability: called with the name of each ability that is done, and the seconds that it took.

    Raises:
        ValueError: if there are too few samples, or the checker cannot read pictures of the decoder's size.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: got {num_samples}, expected 2 or more")
    height, width = pipeline.default_size
    if height != width or height % CANVAS_SIZE:
        raise ValueError(
            f"pictures of the visual decoder: got {height} x {width} pixels, expected a square of a multiple of "
            f"{CANVAS_SIZE}, which the checker reads"
        )
    figures = []
    for ability in ABILITIES:
        start = time.perf_counter()
        figures += evaluate_ability(pipeline, ability, num_samples, seed)
        on_ability(ability.name, time.perf_counter() - start)
    settings = {
        "seed": seed,
        "num_samples": num_samples,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }
    return Report(NAME, settings, BASELINES, figures)


def evaluate_ability(pipeline: EmuPipeline, ability: Ability, num_samples: int, seed: int) -> list[Figure]:
    """The figures of one ability; arguments as of `evaluate_shapes`."""
    tasks = draw_tasks(ability.kind, ability.split, num_samples, seed)
    answers = ask(pipeline, tasks, seed)
    if ability.kind in DRAWN_KINDS:
        return score_pictures(ability.name, tasks, answers)
    if ability.kind in ANSWERED_KINDS:
        training_tasks = draw_tasks(ability.kind, TRAIN, NUM_TRAINING_TASKS * num_samples, seed)
        return score_answers(ability.name, tasks, answers, training_tasks)
    return score_descriptions(ability.name, tasks, answers)


def draw_tasks(kind: str, split: str, num_tasks: int, seed: int) -> list[Task]:
    """Tasks of a kind; each depends on seed, kind, split and its number alone."""
    return [draw_task(kind, random.Random(f"{seed}:{kind}:{index}"), split) for index in range(num_tasks)]


# Asking


def ask(pipeline: EmuPipeline, tasks: Sequence[Task], seed: int) -> list[Any]:
    """What a model gives for tasks of one kind.

    Returns:
        Per task a picture, a text, the document that follows a story's beginning, or the answers of a dialogue.
    """
    kind, prompts = tasks[0].kind, [task.prompt for task in tasks]
    if kind in DRAWN_KINDS:
        return draw_pictures(pipeline, prompts, [draw_noise_seed(seed, kind, index) for index in range(len(tasks))])
    room = compute_room(pipeline, tasks)
    if kind == "story":
        return continue_with_pictures(pipeline, prompts, draw_noise_seed(seed, kind), room, max(STORY_LENGTHS) + 1)
    if kind == "dialogue":
        return ask_dialogues(pipeline, tasks, room)
    if kind in CHAT_KINDS:
        return answer_conversations(pipeline, [[make_message("user", prompt)] for prompt in prompts], room)
    if kind in LEADS:
        lead = LEADS[kind]
        prompts = [[*prompt, make_text(lead)] for prompt in prompts]
        return [f"{lead} {text}" for text in continue_documents(pipeline, prompts, room)]
    return continue_documents(pipeline, prompts, room)


def draw_noise_seed(seed: int, kind: str, index: int | None = None) -> int:
    """The seed of a picture's noise, or of a kind's; other than that of what the picture should show."""
    return random.Random(f"noise:{seed}:{kind}:{index}").getrandbits(63)


def compute_room(pipeline: EmuPipeline, tasks: Sequence[Task]) -> int:
    """Ids that an answer may take."""
    processor = pipeline.processor

    def count_ids(part: dict[str, Any]) -> int:
        if part["type"] == "image":
            return processor.num_image_tokens + 2
        return len(processor.tokenizer(part["text"], add_special_tokens=False)["input_ids"])

    return ROOM * max(sum(map(count_ids, task.target)) for task in tasks)


def make_message(role: str, parts: Document) -> dict[str, Any]:
    """A message of a conversation."""
    return {"role": role, "content": parts}


def ask_dialogues(pipeline: EmuPipeline, tasks: Sequence[Task], max_new_tokens: int) -> list[tuple[str, ...]]:
    """The answers of each dialogue, turn by turn, the model's own before the next question.

    A dialogue ends at its first wrong answer: it is lost, whatever would follow.
    """
    expected: list[Any] = [task.expected for task in tasks]
    answers: list[tuple[str, ...]] = [() for _ in tasks]
    conversations = [[make_message("user", task.prompt)] for task in tasks]
    going_on = list(range(len(tasks)))
    while going_on:
        texts = answer_conversations(pipeline, [conversations[index] for index in going_on], max_new_tokens)
        for index, text in zip(going_on, texts, strict=True):
            answers[index] += (text,)
        going_on = [
            index
            for index in going_on
            if answers[index] != expected[index] and answers[index] == expected[index][: len(answers[index])]
        ]
        for index in going_on:
            question = tasks[index].target[2 * len(answers[index]) - 1]
            conversations[index] += [
                make_message("assistant", [make_text(answers[index][-1])]),
                make_message("user", [question]),
            ]
    return answers


# Scoring


def is_right(task: Task, answer: Any) -> bool:
    """Whether a text, a continued story or the answers of a dialogue are right."""
    if task.kind == "caption":
        return parse_caption(answer) == task.expected
    if task.kind == "clip_caption":
        return parse_clip_caption(answer) == task.expected
    if task.kind == "story":
        return is_story([*task.prompt, *answer])
    return answer == task.expected


def is_story(document: Document) -> bool:
    """Whether texts and pictures alternate, each text is one event after the one before, and each picture is as its text says."""
    num_pictures = len(document) // 2
    if num_pictures not in STORY_LENGTHS or [part["type"] for part in document] != ["text", "image"] * num_pictures:
        return False
    before = None
    for text, picture in zip(document[::2], document[1::2], strict=True):
        panel = parse_panel(text["text"].strip())
        if panel is None or panel.before != before or not agrees(panel.scene, picture["image"]):
            return False
        before = panel.scene
    return True


def shift(answers: Sequence[Any]) -> list[Any]:
    """Give each sample the answer to the next one, and the last that to the first."""
    return [*answers[1:], *answers[:1]]


def compute_share(verdicts: Sequence[bool]) -> float:
    """Right ones of all, 0 to 1."""
    return sum(verdicts) / len(verdicts)


def score_descriptions(ability: str, tasks: Sequence[Task], answers: Sequence[Any]) -> list[Figure]:
    """Captions, or stories.

    Args:
        ability: its name.
        tasks: of one kind.
        answers: per task a text, or the document that follows a story's beginning.
    """
    kind = tasks[0].kind
    verdicts = [is_right(task, answer) for task, answer in zip(tasks, answers, strict=True)]
    baselines = {SHUFFLED: compute_share([is_right(*pair) for pair in zip(tasks, shift(answers), strict=True)])}
    if kind in CAPTION_KINDS:
        [(_, count)] = Counter(task.expected for task in tasks).most_common(1)
        baselines[CONSTANT] = count / len(tasks)
    return [Figure(ability, CRITERIA[kind], sum(verdicts), len(tasks), baselines)]


def score_pictures(ability: str, tasks: Sequence[Task], pictures: Sequence[Image.Image]) -> list[Figure]:
    """Pictures, as a whole and attribute by attribute.

    Args:
        ability: its name.
        tasks: of one kind.
        pictures: per task.
    """
    kind = tasks[0].kind
    scenes: list[Any] = [task.expected for task in tasks]
    guesses = {SHUFFLED: shift(pictures)}
    if kind == "blend":
        guesses |= {name: [task.prompt[i]["image"] for task in tasks] for i, name in enumerate((FIRST, SECOND))}

    def judge_all(images: Sequence[Image.Image]) -> list[Verdict]:
        return [judge(scene, image) for scene, image in zip(scenes, images, strict=True)]

    verdicts, guessed = judge_all(pictures), {name: judge_all(images) for name, images in guesses.items()}
    figures = []
    for part, criterion in {"": CRITERIA[kind], **PICTURE_PARTS}.items():
        attribute = part or "right"
        baselines = {
            name: compute_share([getattr(verdict, attribute) for verdict in of_guess])
            for name, of_guess in guessed.items()
        }
        num_right = sum(getattr(verdict, attribute) for verdict in verdicts)
        figures.append(Figure(ability, criterion, num_right, len(tasks), baselines, part))
    return figures


def score_answers(
    ability: str, tasks: Sequence[Task], answers: Sequence[Any], training_tasks: Sequence[Task]
) -> list[Figure]:
    """Short answers, as a whole and by what is asked.

    Args:
        ability: its name.
        tasks: of one kind.
        answers: per task a text, or the texts of all turns of a dialogue.
        training_tasks: of the same kind, for the commonest answers.
    """
    commonest = find_commonest_answers(training_tasks)
    topics = sorted({task.topic for task in tasks} - {""})
    figures = []
    for part in ("", *topics):
        pairs = [pair for pair in zip(tasks, answers, strict=True) if part in ("", pair[0].topic)]
        num_right = sum(is_right(*pair) for pair in pairs)
        guessed = [all(commonest.get(topic) == answer for topic, answer in list_turns(task)) for task, _ in pairs]
        baselines = {MAJORITY: compute_share(guessed)}
        figures.append(Figure(ability, CRITERIA[tasks[0].kind], num_right, len(pairs), baselines, part))
    return figures


def list_turns(task: Task) -> list[tuple[str, str]]:
    """What is asked for in each turn of a task, and the right answer; in a dialogue it is an attribute always."""
    expected: Any = task.expected
    if task.kind != "dialogue":
        return [(task.topic, expected)]
    return [
        (next(name for name, values in VALUES.items() if any(value in answer for value in values)), answer)
        for answer in expected
    ]


def find_commonest_answers(tasks: Sequence[Task]) -> dict[str, str]:
    """What is asked for -> the answer that is right most often."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for task in tasks:
        for topic, answer in list_turns(task):
            counts[topic][answer] += 1
    return {topic: answers.most_common(1)[0][0] for topic, answers in counts.items()}
