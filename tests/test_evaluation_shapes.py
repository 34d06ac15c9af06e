"""The shapes' benchmark: right answers score 1 and every kind of wrong one 0; baselines; the report; the whole command."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from typer.testing import CliRunner

from modeling_emu.cli import app
from modeling_emu.cli.loading import load_pipeline
from modeling_emu.data import EmuSampleEncoder, Sample
from modeling_emu.evaluation import Figure, Report, compute_wilson_interval, evaluate_shapes
from modeling_emu.evaluation.asking import (
    answer_conversations,
    draw_pictures,
    encode_conversations,
    encode_documents,
)
from modeling_emu.evaluation.shapes import (
    ABILITIES,
    ANSWERED_KINDS,
    BASELINES,
    CAPTION_KINDS,
    CHAT_KINDS,
    CONSTANT,
    CRITERIA,
    DRAWN_KINDS,
    FIRST,
    LEADS,
    MAJORITY,
    PICTURE_PARTS,
    SECOND,
    SHUFFLED,
    STORY_LENGTHS,
    ask,
    ask_dialogues,
    compute_room,
    draw_tasks,
    find_commonest_answers,
    is_right,
    is_story,
    list_turns,
    make_message,
    score_answers,
    score_descriptions,
    score_pictures,
    shift,
)
from modeling_emu.generation_emu import EmuGenerateOutput
from modeling_emu.shapes.captions import Panel, list_captions, list_clip_captions, write_panel
from modeling_emu.shapes.documents import TASK_KINDS, Task, make_image, make_text
from modeling_emu.shapes.questions import QUESTION_KINDS, Question, majority_baseline
from modeling_emu.shapes.scenes import Item, Scene, get_clip_split, get_split
from modeling_emu.training import add_instruct_tokens
from modeling_emu.training.tiny import make_untrained


NUM_TASKS = 20


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """The small Emu's folder before training. Not to be changed."""
    folder = tmp_path_factory.mktemp("evaluation") / "untrained"
    make_untrained(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def pipeline(untrained):
    """The untrained network with the tokens and the template of a tuned one. Not to be changed."""
    pipeline = load_pipeline(untrained)
    pipeline.set_progress_bar_config(disable=True)
    add_instruct_tokens(pipeline.multimodal_encoder, pipeline.processor)
    return pipeline


@pytest.fixture
def emu():
    """Run the command; it fails the test where the exit code is another than expected."""

    def run(*arguments, exit_code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == exit_code, result.output + repr(result.exception)
        return result

    return run


def get_right_answers(tasks: list[Task]) -> list:
    """What the world's own writer and renderer give."""
    kind = tasks[0].kind
    if kind == "story":
        return [task.target for task in tasks]
    if kind == "dialogue":
        return [tuple(part["text"] for part in task.target[::2]) for task in tasks]
    return [task.target[0]["image" if kind in DRAWN_KINDS else "text"] for task in tasks]


def score(tasks: list[Task], answers: list) -> list[Figure]:
    kind = tasks[0].kind
    if kind in DRAWN_KINDS:
        return score_pictures("ability", tasks, answers)
    if kind in ANSWERED_KINDS:
        return score_answers("ability", tasks, answers, draw_tasks(kind, "train", 50, seed=1))
    return score_descriptions("ability", tasks, answers)


def change_item(scene: Scene, **attributes: str) -> Scene:
    """The scene with its first object changed."""
    first, *others = scene.items
    return Scene.of([replace(first, **attributes), *others])


# Tasks


@pytest.mark.parametrize("ability", ABILITIES, ids=lambda ability: ability.name)
def test_tasks_are_of_the_split_and_depend_on_their_number_alone(ability):
    tasks = draw_tasks(ability.kind, ability.split, 6, seed=3)
    assert [task.expected for task in tasks[:2]] == [
        task.expected for task in draw_tasks(ability.kind, ability.split, 2, seed=3)
    ]
    assert [task.expected for task in tasks] != [
        task.expected for task in draw_tasks(ability.kind, ability.split, 6, seed=4)
    ]
    for task in tasks:
        asked = task.shown[0 if ability.kind == "story" else -1]
        assert (get_split(asked) if isinstance(asked, Scene) else get_clip_split(asked)) == ability.split


def test_every_kind_of_task_is_asked():
    assert {ability.kind for ability in ABILITIES} == set(TASK_KINDS) == set(CRITERIA)
    assert {ability.kind for ability in ABILITIES if ability.split == "unseen"} == {"caption", "draw"}


# Scoring


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_right_answers_are_right_and_those_of_other_samples_are_not(kind):
    tasks = draw_tasks(kind, "test", NUM_TASKS, seed=0)
    answers = get_right_answers(tasks)
    for figure in score(tasks, answers):
        assert figure.share == 1
        assert figure.criterion
    whole = score(tasks, answers)[0]
    assert (whole.num_right, whole.num_samples, whole.part) == (NUM_TASKS, NUM_TASKS, "")
    if SHUFFLED in whole.baselines:
        shuffled = score(tasks, shift(answers))[0]
        assert whole.baselines[SHUFFLED] == shuffled.share < 0.2


@pytest.mark.parametrize("kind", CAPTION_KINDS)
def test_captions_are_right_in_every_wording_and_otherwise_wrong(kind):
    for task in draw_tasks(kind, "test", NUM_TASKS, seed=0):
        wordings = list_captions(task.expected) if kind == "caption" else list_clip_captions(task.expected)
        for text in wordings:
            assert is_right(task, text)
            colour = task.shown[0].items[0].colour if kind == "caption" else task.expected.start.items[0].colour
            other = "black" if colour != "black" else "red"
            words = text.split()
            for wrong in (
                "",
                text[:-1],
                f"{text} {text}",
                text.replace(colour, other),
                " ".join(words[:-3]) + ".",
                text.upper(),
            ):
                assert not is_right(task, wrong)


@pytest.mark.parametrize("kind", ["question", "clip_question", "pattern_text"])
def test_answers_are_right_to_the_letter_alone(kind):
    for task in draw_tasks(kind, "test", NUM_TASKS, seed=0):
        assert is_right(task, task.expected)
        for wrong in ("", task.expected[:-1], f"{task.expected} {task.expected}", "the answer is " + task.expected):
            assert not is_right(task, wrong)


def test_a_dialogue_is_right_if_all_its_turns_are():
    for task in draw_tasks("dialogue", "test", NUM_TASKS, seed=0):
        assert is_right(task, task.expected)
        for turn in range(len(task.expected)):
            assert not is_right(task, (*task.expected[:turn], "none.", *task.expected[turn + 1 :]))
            assert not is_right(task, task.expected[:turn])


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_a_picture_of_which_one_attribute_is_wrong_is_wrong_in_this_part_alone(kind):
    rng = random.Random(0)
    tasks = [task for task in draw_tasks(kind, "test", 3 * NUM_TASKS, seed=0) if len(task.expected.items) == 1]
    others = {
        "shapes": lambda item: {"shape": "ring" if item.shape != "ring" else "square"},
        "colours": lambda item: {"colour": "cyan" if item.colour != "cyan" else "black"},
        "sizes": lambda item: {"size": "large" if item.size == "small" else "small"},
        "places": lambda item: {"place": "middle" if item.place != "middle" else "top left"},
    }
    for part, change in others.items():
        wrong = [change_item(task.expected, **change(task.expected.items[0])) for task in tasks]
        pictures = [make_image(scene, rng)["image"] for scene in wrong]
        shares = {figure.part: figure.share for figure in score_pictures("ability", tasks, pictures)}
        assert shares == {name: 0.0 if name in ("", part) else 1.0 for name in ("", *PICTURE_PARTS)}


def test_objects_too_many_too_few_and_swapped_are_wrong():
    rng = random.Random(0)
    two = Scene((Item("circle", "red", "small", "top left"), Item("ring", "blue", "large", "bottom right")))
    swapped = Scene((Item("circle", "blue", "small", "top left"), Item("ring", "red", "large", "bottom right")))
    more = Scene.of([*two.items, Item("heart", "black", "small", "top right")])
    fewer = Scene(two.items[:1])
    task = Task("draw", [make_text("")], [], two, (two,))
    verdicts = {
        name: {
            figure.part: figure.share
            for figure in score_pictures("ability", [task], [make_image(scene, rng)["image"]])
        }
        for name, scene in {"swapped": swapped, "more": more, "fewer": fewer}.items()
    }
    assert verdicts["swapped"] == {"": 0.0} | dict.fromkeys(PICTURE_PARTS, 1.0)
    assert verdicts["more"] == verdicts["fewer"] == dict.fromkeys(("", *PICTURE_PARTS), 0.0)


def make_story(*scenes: Scene) -> list:
    rng = random.Random(0)
    parts = []
    for scene, before in zip(scenes, (None, *scenes), strict=False):
        parts += [make_text(write_panel(Panel(scene, before), rng)), make_image(scene, rng)]
    return parts


def test_a_story_is_right_if_every_picture_agrees_with_its_text():
    """Another course than the task's is right too; what breaks off, runs on or contradicts itself is not."""
    first = Scene((Item("circle", "red", "small", "top left"),))
    second = change_item(first, size="large")
    third = change_item(second, colour="black")
    fourth = change_item(third, place="top right")
    assert is_story(make_story(first, second))
    assert is_story(make_story(first, second, third))
    assert is_story(make_story(first, change_item(first, place="bottom left")))

    story = make_story(first, second, third)
    skipped = [*story[:2], *story[4:]]
    unknown = [*story[:2], make_text("then all is well."), *story[3:]]
    for wrong in (
        make_story(first),
        make_story(first, second, third, fourth),
        story[:-1],
        [*story, make_text("the end.")],
        [story[0], *story[2:]],
        [*story[:2], story[1], *story[3:]],
        skipped,
        unknown,
        [],
    ):
        assert not is_story(wrong)
    for index in (1, 3, 5):
        for other in {1: second, 3: first, 5: second}[index], fourth:
            assert not is_story([*story[:index], make_image(other, random.Random(1)), *story[index + 1 :]])


def test_a_story_begins_with_the_first_picture_of_the_model():
    [task] = draw_tasks("story", "test", 1, seed=0)
    assert is_right(task, task.target)
    assert not is_right(task, task.target[1:])
    assert not is_right(task, [])


# Baselines


def test_shuffled_is_what_another_sample_would_get():
    """Two scenes, alternating: the next sample's answer is never right; in pairs, it is right half of the time."""
    scenes = [Scene((Item("circle", colour, "small", "top left"),)) for colour in ("red", "blue")]
    tasks = [Task("caption", [make_image(s, random.Random(0))], [], s, (s,)) for s in scenes]
    [figure] = score_descriptions("ability", tasks * 4, [list_captions(s)[0] for s in scenes] * 4)
    assert (figure.share, figure.baselines) == (1.0, {SHUFFLED: 0.0, CONSTANT: 0.5})
    paired = [tasks[i // 2 % 2] for i in range(8)]
    [figure] = score_descriptions("ability", paired, [list_captions(task.expected)[0] for task in paired])
    assert (figure.share, figure.baselines) == (1.0, {SHUFFLED: 0.5, CONSTANT: 0.5})


def test_majority_is_what_the_commonest_training_answer_gets():
    def make(topic: str, *answers: str) -> list[Task]:
        return [Task("question", [], [], answer, (), topic) for answer in answers]

    training = [*make("colour", "red.", "red.", "blue."), *make("size", "small.", "large.", "large.")]
    tasks = [*make("colour", "red.", "blue.", "blue.", "blue."), *make("size", "large."), *make("place", "there.")]
    whole, *parts = score_answers("ability", tasks, ["red."] * 6, training)
    assert (whole.num_right, whole.baselines) == (1, {MAJORITY: 2 / 6})
    found = {part.part: (part.num_right, part.num_samples, part.baselines[MAJORITY]) for part in parts}
    assert found == {"colour": (1, 4, 0.25), "place": (0, 1, 0.0), "size": (0, 1, 1.0)}


def test_majority_of_dialogues_goes_by_what_each_turn_asks_for():
    def make(*answers: str) -> Task:
        return Task("dialogue", [], [], answers, ())

    training = [make("red.", "in the middle."), make("red.", "large."), make("blue.", "in the middle.", "ring.")]
    assert find_commonest_answers(training) == {
        "colour": "red.",
        "place": "in the middle.",
        "size": "large.",
        "shape": "ring.",
    }
    tasks = [make("red.", "ring."), make("in the middle.", "red.", "large."), make("red.", "small.")]
    [figure] = score_answers("ability", tasks, [("",)] * 3, training)
    assert figure.baselines == {MAJORITY: 2 / 3}


def test_every_turn_of_a_dialogue_asks_for_what_its_question_names():
    words = {"colour": "what colour", "shape": "what shape", "size": "what size", "place": "where is"}
    for task in draw_tasks("dialogue", "train", 50, seed=0):
        topics = [topic for topic, _ in list_turns(task)]
        questions = [task.prompt[1], *task.target[1::2]]
        for topic, question in zip(topics, questions, strict=True):
            asked = [name for name, word in words.items() if word in question["text"]]
            assert asked in ([], [topic])


def test_majority_agrees_with_that_of_the_world():
    """On the very questions that it was taken from."""
    tasks = draw_tasks("question", "train", 200, seed=0)
    expected = majority_baseline(Question("", task.expected, task.topic) for task in tasks)
    _, *parts = score_answers("ability", tasks, get_right_answers(tasks), tasks)
    assert {part.part: part.baselines[MAJORITY] for part in parts} == expected
    assert set(expected) == set(QUESTION_KINDS)


def test_a_copy_is_no_blend():
    tasks = draw_tasks("blend", "test", NUM_TASKS, seed=0)
    baselines = {figure.part: figure.baselines for figure in score_pictures("a", tasks, get_right_answers(tasks))}
    assert (baselines[""][FIRST], baselines[""][SECOND]) == (0, 0)
    assert (baselines["colours"][FIRST], baselines["colours"][SECOND]) == (1, 0)
    assert (baselines["shapes"][FIRST], baselines["shapes"][SECOND]) == (0, 1)
    assert baselines["places"][SECOND] == baselines["sizes"][SECOND] == 1


# Report


@pytest.mark.parametrize(
    ("num_right", "num_samples"), [(0, 2), (1, 2), (2, 2), (0, 200), (7, 200), (193, 200), (200, 200)]
)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_wilson_interval_is_that_of_scipy(num_right, num_samples, confidence):
    expected = binomtest(num_right, num_samples).proportion_ci(confidence, method="wilson")
    found = compute_wilson_interval(num_right, num_samples, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found[0] <= num_right / num_samples <= found[1]


@pytest.mark.parametrize("arguments", [(-1, 2), (3, 2), (0, 0), (1, 2, 0.0), (1, 2, 1.0)])
def test_wilson_interval_refuses_what_is_no_share(arguments):
    with pytest.raises(ValueError, match="got"):
        compute_wilson_interval(*arguments)


def make_report() -> Report:
    figures = [
        Figure("pictures", "shows all", 190, 200, {SHUFFLED: 0.005}),
        Figure("pictures", "the same colours", 198, 200, {SHUFFLED: 0.12}, "colours"),
        Figure("stories", "agrees", 0, 200, {}),
    ]
    return Report("shapes", {"seed": 1, "num_samples": 200}, BASELINES, figures)


def test_report_survives_json():
    report = make_report()
    text = report.to_json()
    assert Report.from_json(text) == report
    entry = json.loads(text)["figures"][0]
    assert entry["share"] == 0.95
    assert entry["interval"] == list(report.figures[0].interval)


def test_report_gives_figures_by_name():
    report = make_report()
    assert report.get("pictures") is report.figures[0]
    assert report.get("pictures", "colours") is report.figures[1]
    with pytest.raises(ValueError, match="got \\('songs', ''\\)"):
        report.get("songs")


def test_markdown_has_abilities_then_parts_then_baselines():
    text = make_report().to_markdown()
    abilities, parts, baselines = text.replace("Baselines:", "In parts:").split("In parts:")
    assert abilities.startswith("`emu evaluate shapes`: seed 1, num_samples 200.\n")
    assert "| pictures | 190 / 200 | 95.0% | 91.0% to 97.3% | shuffled 0.5% | shows all |" in abilities
    assert "| pictures | colours | 198 / 200 | 99.0% | 96.4% to 99.7% | shuffled 12.0% | the same colours |" in parts
    assert baselines.strip().splitlines() == [f"- {name}: {what}" for name, what in BASELINES.items()]
    for table in (abilities, parts):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1


# Asking


@pytest.fixture
def few_steps(monkeypatch):
    """Pictures in fewer steps than are good for them."""
    monkeypatch.setattr("modeling_emu.evaluation.asking.NUM_INFERENCE_STEPS", 2)


@pytest.mark.parametrize("kind", [kind for kind in TASK_KINDS if kind not in (*CHAT_KINDS, "dialogue")])
def test_documents_are_asked_as_they_are_learned(pipeline, kind):
    """Every frame of a video included; what follows a document to be drawn is the start of an image."""
    encoder = EmuSampleEncoder(pipeline.processor)
    for task in draw_tasks(kind, "test", 3, seed=0):
        learned = encoder.encode(Sample(task.document, "key"))
        asked = encode_documents(pipeline.processor, [task.prompt])
        length = asked["input_ids"].shape[1]
        assert torch.equal(asked["input_ids"][0], learned.input_ids[:length])
        if "pixel_values" in asked:
            assert torch.equal(asked["pixel_values"], learned.pixel_values[: len(asked["pixel_values"])])
        if task.target[0]["type"] == "image":
            assert learned.input_ids[length] == pipeline.multimodal_encoder.config.image_start_token_id
        else:
            rest = pipeline.processor.tokenizer.decode(learned.input_ids[length:], skip_special_tokens=True)
            assert rest == task.target[0]["text"]


@pytest.mark.parametrize("kind", CAPTION_KINDS)
def test_a_caption_goes_on_from_its_first_words(pipeline, kind):
    """They are ids that training learns, and the answer has them."""
    encoder = EmuSampleEncoder(pipeline.processor)
    [task] = draw_tasks(kind, "test", 1, seed=0)
    wordings = list_captions(task.expected) if kind == "caption" else list_clip_captions(task.expected)
    [text] = [text for text in wordings if text.startswith(LEADS[kind])]
    learned = encoder.encode(Sample([*task.prompt, make_text(text)], "key")).input_ids
    asked = encode_documents(pipeline.processor, [[*task.prompt, make_text(LEADS[kind])]])["input_ids"][0]
    assert torch.equal(asked, learned[: len(asked)])
    assert all(answer.startswith(LEADS[kind]) for answer in ask(pipeline, [task], seed=0))


@pytest.mark.parametrize("kind", ["question", "clip_question", "dialogue"])
def test_conversations_are_asked_as_they_are_learned(pipeline, kind):
    encoder = EmuSampleEncoder(pipeline.processor)
    for task in draw_tasks(kind, "test", 3, seed=0):
        learned = encoder.encode(Sample(task.document, "key", answers=task.answers))
        messages = [make_message("user", task.prompt)]
        messages += [make_message(("assistant", "user")[i % 2], [part]) for i, part in enumerate(task.target[:-1])]
        asked = encode_conversations(pipeline.processor, [messages])
        length = asked["input_ids"].shape[1]
        assert torch.equal(asked["input_ids"][0], learned.input_ids[:length])
        assert torch.equal(asked["pixel_values"], learned.pixel_values)
        rest = pipeline.processor.tokenizer.decode(learned.input_ids[length:], skip_special_tokens=True)
        assert rest.strip() == task.target[-1]["text"]


def test_dialogues_go_on_with_the_models_own_answers_until_one_is_wrong(pipeline):
    """What an untrained network says is taken for right, once, so that it is asked on."""
    tasks = [task for task in draw_tasks("dialogue", "test", 8, seed=0) if len(task.expected) > 1][:3]
    firsts = [answers[0] for answers in ask_dialogues(pipeline, tasks, 4)]
    assert [len(answers) for answers in ask_dialogues(pipeline, tasks, 4)] == [1] * 3
    going_on, *others = [
        replace(task, expected=(first, *task.expected[1:])) for task, first in zip(tasks, firsts, strict=True)
    ]
    others[0] = tasks[1]
    answers = ask_dialogues(pipeline, [going_on, *others], 4)
    assert [len(entry) for entry in answers] == [2, 1, 2]
    conversation = [
        make_message("user", going_on.prompt),
        make_message("assistant", [make_text(firsts[0])]),
        make_message("user", [going_on.target[1]]),
    ]
    assert answers[0] == (firsts[0], *answer_conversations(pipeline, [conversation], 4))


def test_answers_have_room_for_other_wordings(pipeline):
    """Every wording of a scene fits where any wording of it does."""
    tokenizer = pipeline.processor.tokenizer
    for task in draw_tasks("caption", "test", NUM_TASKS, seed=0):
        lengths = [
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in list_captions(task.expected)
        ]
        assert max(lengths) < compute_room(pipeline, [task])


def test_the_noise_of_a_picture_is_its_own(pipeline, few_steps, monkeypatch):
    """In batches of another size, numbers round a little differently."""
    tasks = draw_tasks("draw", "test", 3, seed=0)
    documents, seeds = [task.prompt for task in tasks], [5, 6, 7]
    pictures = draw_pictures(pipeline, documents, seeds)
    monkeypatch.setattr("modeling_emu.evaluation.asking.TEXTS_AT_ONCE", 2)
    monkeypatch.setattr("modeling_emu.evaluation.asking.PICTURES_AT_ONCE", 1)
    for one, other in zip(pictures, draw_pictures(pipeline, documents, seeds), strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2
    again = draw_pictures(pipeline, documents[:1], [8])
    assert np.abs(np.asarray(pictures[0], dtype=int) - np.asarray(again[0], dtype=int)).max() > 20


def test_a_story_is_read_back_from_the_ids_that_are_learned(pipeline):
    """Texts after a picture too, whose pictures are put in by hand."""
    processor, config = pipeline.processor, pipeline.multimodal_encoder.config
    for task in draw_tasks("story", "test", 5, seed=0):
        sequences = EmuSampleEncoder(processor).encode(Sample(task.document, "key")).input_ids[None]
        pictures = [part["image"] for part in task.target if part["type"] == "image"]
        embeds = torch.zeros(len(pictures), config.num_image_tokens, config.get_text_config().hidden_size)
        outputs = EmuGenerateOutput(
            sequences=sequences, image_embeds=embeds, image_rows=torch.zeros(len(pictures), dtype=torch.long)
        )
        prompt_length = encode_documents(processor, [task.prompt])["input_ids"].shape[1]
        [document] = processor.decode_documents(outputs, prompt_length)
        for part, picture in zip(document[::2], pictures, strict=True):
            part["image"] = picture
        assert is_right(task, document)


def test_stories_are_told_until_they_have_too_many_pictures(pipeline, few_steps):
    """By a network whose head starts an image at every chance."""
    model = pipeline.multimodal_encoder
    weight = model.lm_head.weight
    before = weight.detach().clone()
    tasks = draw_tasks("story", "test", 2, seed=0)
    try:
        with torch.no_grad():
            weight[model.config.get_text_config().eos_token_id] = 0
            states = model.model(**encode_documents(pipeline.processor, [tasks[0].prompt])).last_hidden_state
            weight[model.config.image_start_token_id] = states[0, -1] * 100
        documents = ask(pipeline, tasks, seed=0)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    num_pictures = [sum(part["type"] == "image" for part in document) for document in documents]
    assert max(num_pictures) == max(STORY_LENGTHS) + 1
    assert documents[0][0]["image"].size == (32, 32)


# The command


def test_the_whole_benchmark_runs_and_is_repeatable(emu, untrained, tmp_path, few_steps):
    """An untrained network is right nowhere."""
    files = [tmp_path / "new" / "report.json", tmp_path / "report.md"]
    output = emu(
        "evaluate", "shapes", "--model", untrained, "--num-samples", 2, "--seed", 1, "-o", files[0], "-o", files[1]
    )  # fmt: skip
    report = Report.from_json(files[0].read_text())
    names = [ability.name for ability in ABILITIES]
    assert [figure.ability for figure in report.figures if not figure.part] == names
    assert {(figure.num_right, figure.num_samples) for figure in report.figures if not figure.part} == {(0, 2)}
    assert all(set(figure.baselines) <= set(BASELINES) for figure in report.figures)
    assert files[1].read_text() == report.to_markdown()
    assert [line.rpartition(":")[0] for line in output.stderr.splitlines() if line.endswith(" s")] == names
    assert "seed 1, num_samples 2" in output.stdout
    pipeline = load_pipeline(untrained)
    pipeline.set_progress_bar_config(disable=True)
    assert evaluate_shapes(pipeline, num_samples=2, seed=1) == report


@pytest.mark.parametrize("name", ["report.txt", "report"])
def test_a_report_has_a_known_form(emu, tmp_path, name):
    error = emu("evaluate", "shapes", "-o", tmp_path / name, exit_code=2).stderr
    assert "expected a file that ends in one of .json, .md" in error


def test_no_file_is_overwritten_or_named_twice(emu, tmp_path):
    file = tmp_path / "report.md"
    assert "expected each file once" in emu("evaluate", "shapes", "-o", file, "-o", file, exit_code=2).stderr
    file.write_text("mine")
    assert "which exists" in emu("evaluate", "shapes", "-o", file, exit_code=2).stderr
    assert "expected a folder" in emu("evaluate", "shapes", "-o", file / "report.md", exit_code=2).stderr
    assert file.read_text() == "mine"


def test_too_few_samples_are_refused(emu, pipeline):
    assert "Invalid value for '--num-samples'" in emu("evaluate", "shapes", "--num-samples", 1, exit_code=2).stderr
    with pytest.raises(ValueError, match="num_samples: got 1, expected 2 or more"):
        evaluate_shapes(pipeline, num_samples=1)


def test_a_model_without_a_decoder_is_refused(emu, untrained, tmp_path):
    folder = shutil.copytree(
        untrained, tmp_path / "model", ignore=shutil.ignore_patterns("unet", "scheduler", "model_index.json")
    )
    error = emu("evaluate", "shapes", "--model", folder, exit_code=2).stderr
    assert "which has no visual decoder" in error


def test_pictures_that_the_checker_cannot_read_are_refused(emu, untrained, tmp_path):
    folder = shutil.copytree(untrained, tmp_path / "model")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 24}))
    error = emu("evaluate", "shapes", "--model", folder, "--num-samples", 2, exit_code=2).stderr
    assert "pictures of the visual decoder: got 24 x 24 pixels, expected a square of a multiple of 32" in error


def test_a_benchmark_has_to_be_named(emu):
    assert "shapes" in emu("evaluate", exit_code=2).output
    assert "No such command 'songs'" in emu("evaluate", "songs", exit_code=2).stderr
