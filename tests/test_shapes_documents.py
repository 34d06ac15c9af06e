"""Tasks ask for what their split says and nothing else; shards are read by the package's own sources, pixel for pixel."""

import hashlib
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_emu.data import EmuMixture, EmuSampleEncoder, EmuSource, Sample
from modeling_emu.data.source import SourceStream
from modeling_emu.documents_emu import load_video
from modeling_emu.processing_emu import EmuProcessor
from modeling_emu.shapes.captions import parse_caption, parse_clip_caption, parse_panel
from modeling_emu.shapes.checker import read_clip, read_scene
from modeling_emu.shapes.documents import QUIZ_KINDS, STORY_SPLITS, TASK_KINDS, VALUES, Task, draw_task
from modeling_emu.shapes.scenes import HELD_OUT_PAIRS, SPLITS, UNSEEN, Clip, Scene, get_clip_split, get_split
from modeling_emu.shapes.shards import (
    NUM_SHARDS,
    PAGE_SUFFIX,
    SHARD_LAYOUTS,
    draw_tasks,
    encode_video,
    make_page,
    write_shards,
)


EMU_TINY = Path(__file__).parents[1] / "modeling_emu" / "emu_tiny"
ALL_SPLITS = (*SPLITS, UNSEEN)
ALL_KINDS = (*TASK_KINDS, *QUIZ_KINDS)
NUM_DOCUMENTS = 10


def draw_many(kind: str, num_tasks: int, split: str = "train", seed: int = 0) -> list[Task]:
    rng = random.Random(f"{kind}:{seed}")
    return [draw_task(kind, rng, split) for _ in range(num_tasks)]


def get_texts(task: Task) -> list[str]:
    return [part["text"] for part in task.document if part["type"] == "text"]


def get_split_of(shown: Scene | Clip) -> str:
    return get_clip_split(shown) if isinstance(shown, Clip) else get_split(shown)


def describe(document: list) -> list:
    """A document as plain values: texts, and the pixels of each image and frame."""
    described = []
    for part in document:
        if part["type"] == "text":
            described.append(part["text"])
        else:
            images = [part["image"]] if part["type"] == "image" else part["video"]
            described.append((part["type"], *(image.tobytes() for image in images)))
    return described


# Tasks


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_shows_training_scenes_alone(kind):
    for task in draw_many(kind, 300):
        assert {get_split_of(shown) for shown in task.shown} == {"train"}
        text = " ".join(get_texts(task))
        assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT_PAIRS)


@pytest.mark.parametrize("split", ["validation", "test", UNSEEN])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_is_asked_for_is_of_the_split(kind, split):
    for task in draw_many(kind, 40, split):
        *context, last = [get_split_of(shown) for shown in task.shown]
        if kind == "story":
            assert get_split_of(task.shown[0]) == split
            assert {*context, last} <= set(STORY_SPLITS[split])
        else:
            assert last == split
            assert set(context) <= {"train"}


def test_splits_ask_for_no_scene_of_another():
    for kind in ("caption", "draw", "pattern_image", "blend"):
        expected = [{task.expected for task in draw_many(kind, 100, split)} for split in ALL_SPLITS]
        assert sum(map(len, expected)) == len(set().union(*expected))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_document_has_its_media_in_order(kind):
    for task in draw_many(kind, 50):
        media = [part for part in task.document if part["type"] != "text"]
        assert [part["type"] for part in media] == [
            "video" if isinstance(shown, Clip) else "image" for shown in task.shown
        ]
        images = [image for part in media for image in part.get("video", [part.get("image")])]
        assert {(image.mode, image.size) for image in images} == {("RGB", (32, 32))}
        assert all(len(part["video"]) == 8 for part in media if part["type"] == "video")
        assert task.kind == kind
        assert all(text == text.strip() for text in get_texts(task))
        if task.answers is None:  # a text beside a text would not be read back as two
            types = [part["type"] for part in task.document]
            assert ("text", "text") not in itertools.pairwise(types)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_same_seed_draws_the_same_document(kind):
    first, again, other = (draw_many(kind, 3, seed=seed) for seed in (0, 0, 1))
    assert [describe(task.document) for task in first] == [describe(task.document) for task in again]
    assert [describe(task.document) for task in first] != [describe(task.document) for task in other]


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_captions_say_what_is_expected(split):
    for task in draw_many("caption", 50, split) + draw_many("draw", 50, split):
        assert parse_caption(get_texts(task)[0]) == task.expected == task.shown[0]
    for task in draw_many("clip_caption", 50, split):
        assert parse_clip_caption(task.target[0]["text"]) == task.expected == task.shown[0]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pictures_and_videos_show_what_the_task_says(kind):
    for task in draw_many(kind, 15):
        media = [part for part in task.document if part["type"] != "text"]
        read = [read_scene(part["image"]) if part["type"] == "image" else read_clip(part["video"]) for part in media]
        assert tuple(read) == task.shown


@pytest.mark.parametrize("kind", ["question", "clip_question", "pattern_text"])
def test_answers_are_expected(kind):
    for task in draw_many(kind, 100):
        assert task.target == [{"type": "text", "text": task.expected}]
        assert task.topic


@pytest.mark.parametrize("kind", ["dialogue", *QUIZ_KINDS])
def test_answers_of_several_turns_are_expected(kind):
    for task in draw_many(kind, 100):
        assert tuple(task.document[index]["text"] for index in task.answers) == task.expected
        assert [part["type"] for part in task.prompt] == ["video" if kind == "clip_quiz" else "image", "text"]
        assert all(text.endswith("?") for text in get_texts(task)[::2])


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_every_picture_of_a_story_agrees_with_its_text(split):
    lengths, events = set(), Counter()
    for task in draw_many("story", 150, split):
        panels = [parse_panel(text) for text in get_texts(task)]
        assert tuple(panel.scene for panel in panels) == task.expected == task.shown
        assert tuple(panel.before for panel in panels) == (None, *task.expected[:-1])
        lengths.add(len(panels))
        events.update(re.findall(r"\b(comes|moves|grows|shrinks|becomes)\b", " ".join(get_texts(task))))
        assert [part["type"] for part in task.document] == ["text", "image"] * len(panels)
    assert lengths == {2, 3}
    assert len(events) == 5
    assert min(events.values()) > 0.05 * events.total()


def test_examples_of_a_text_pattern_differ_in_what_is_named():
    topics = set()
    for task in draw_many("pattern_text", 200):
        *examples, _ = get_texts(task)
        assert len(set(examples)) == len(examples) in (2, 3)
        for text, scene in zip(get_texts(task), task.shown, strict=True):
            if task.topic == "number":
                assert text == ["one.", "two.", "three."][len(scene.items) - 1]
            else:
                [item] = scene.items
                assert text.rstrip(".").removeprefix("at the ").removeprefix("in the ") == getattr(item, task.topic)
        topics.add(task.topic)
    assert topics == {"colour", "shape", "place", "number"}


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_pictures_of_an_image_pattern_follow_its_rule(split):
    for task in draw_many("pattern_image", 100, split):
        items = [scene.items[0] for scene in task.shown]
        named = [re.sub(r"(at|in) the |\.", "", text) for text in get_texts(task)]
        assert named == [getattr(item, task.topic) for item in items]
        assert len(set(named)) == len(named) in (3, 4)
        for attribute in set(VALUES) - {task.topic}:
            assert len({getattr(item, attribute) for item in items}) == 1
        assert task.expected == task.shown[-1]


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_a_blend_is_the_second_object_in_the_colour_of_the_first(split):
    for task in draw_many("blend", 100, split):
        [first], [second], [blend] = [scene.items for scene in task.shown]
        assert (blend.shape, blend.size, blend.place) == (second.shape, second.size, second.place)
        assert blend.colour == first.colour != second.colour
        assert first.shape != second.shape
        assert task.expected == Scene((blend,))


def test_unknown_kinds_and_splits_are_refused():
    with pytest.raises(ValueError, match="kind of a task: got 'paint'"):
        draw_task("paint", random.Random(0))
    with pytest.raises(ValueError, match="split: got 'dev'"):
        draw_task("caption", random.Random(0), "dev")


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, dict.fromkeys(SHARD_LAYOUTS, NUM_DOCUMENTS), seed=3)
    return folder


def make_source(folder: Path, kind: str) -> EmuSource:
    source, files = SHARD_LAYOUTS[kind]
    return EmuSource(source, str(folder / kind / files), name=kind, max_broken_fraction=0.0)


def redraw(kind: str, split: str = "train") -> list[Task]:
    return [task for _, task in draw_tasks(kind, range(NUM_DOCUMENTS), 3, split)]


def as_page(document: list) -> list:
    """A document as a page of texts and images has it: frames one by one, and texts that stand side by side as one."""
    images = [
        {"type": "image", "image": image} if part["type"] == "video" else part
        for part in document
        for image in part.get("video", [None])
    ]
    page = []
    for kind, run in itertools.groupby(images, key=lambda part: part["type"]):
        parts = list(run)
        page += [{"type": kind, kind: " ".join(part[kind] for part in parts)}] if kind == "text" else parts
    return page


def get_written(task: Task, kind: str) -> list:
    """The parts of a task's document as its kind of shard has them."""
    return make_page(task) if kind.endswith(PAGE_SUFFIX) else task.document


def sort_media_first(document: list) -> list:
    """A pair, which is read in either order."""
    return sorted(document, key=lambda part: part["type"] == "text")


@pytest.mark.parametrize("kind", SHARD_LAYOUTS)
def test_shards_are_read_back_pixel_for_pixel(shards, kind):
    source = make_source(shards, kind)
    assert len(source.shards) == NUM_SHARDS
    samples: list[Sample] = list(SourceStream(source, seed=0, repeat=False))
    is_pair = source.kind in ("image_text", "video_text")
    read = [describe(sort_media_first(sample.document) if is_pair else sample.document) for sample in samples]
    is_page = source.kind == "obelics"
    expected = {
        repr(describe(as_page(task.document) if is_page else task.document)): None if is_page else task.answers
        for task in redraw(kind)
    }
    assert len(read) == NUM_DOCUMENTS
    assert {repr(described): sample.answers for described, sample in zip(read, samples, strict=True)} == expected


@pytest.mark.parametrize("variant", ["pretrain", "instruct"])
def test_shards_train_the_embedded_model(shards, variant):
    """Through the mixture and the encoder, every kind once, with the pixels that the processor makes of the pictures."""
    stock = EmuProcessor.from_pretrained(EMU_TINY)
    processor = EmuProcessor(stock.image_processor, stock.tokenizer, stock.num_image_tokens, variant=variant)
    kinds = [
        kind for kind, (source, _) in SHARD_LAYOUTS.items() if (source == "instruction") == (variant == "instruct")
    ]
    mixture = EmuMixture(
        [make_source(shards, kind) for kind in kinds], encoder=EmuSampleEncoder(processor), repeat=False
    )

    def digest(image: torch.Tensor) -> bytes:
        return hashlib.sha256(image.numpy().tobytes()).digest()

    pixels: Counter[bytes] = Counter()
    for encoded in mixture:
        pixels.update(map(digest, encoded.pixel_values))
        assert len(encoded.pixel_values) * processor.num_image_tokens == int(
            (encoded.input_ids == processor.tokenizer.convert_tokens_to_ids("<image>")).sum()
        )
    assert mixture.count_rows() == {kind: {"num_rows": NUM_DOCUMENTS, "num_broken": 0} for kind in kinds}
    images = [
        image
        for kind in kinds
        for task in redraw(kind)
        for part in task.document
        if part["type"] != "text"
        for image in part.get("video", [part.get("image")])
    ]
    made = (processor.image_processor(image, return_tensors="pt")["pixel_values"][0] for image in images)
    assert pixels == Counter(map(digest, made))


def test_the_same_seed_writes_the_same_bytes(shards, tmp_path):
    write_shards(tmp_path / "again", dict.fromkeys(SHARD_LAYOUTS, NUM_DOCUMENTS), seed=3)
    written = {path.relative_to(shards): path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path / "again"): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == again
    write_shards(tmp_path / "other", {"caption": NUM_DOCUMENTS}, seed=4)
    assert (tmp_path / "other" / "caption" / "00000.tar").read_bytes() != written[Path("caption/00000.tar")]


def test_more_documents_begin_with_the_same():
    few, many = (list(draw_tasks("story", range(count), 0, "train")) for count in (2, 4))
    assert [(key, describe(task.document)) for key, task in few] == [
        (key, describe(task.document)) for key, task in many[:2]
    ]


def test_shards_of_a_split_show_that_split(tmp_path):
    write_shards(tmp_path / "shapes", {"caption": 5}, seed=0, split=UNSEEN)
    source = make_source(tmp_path / "shapes", "caption")
    assert len(source.shards) == 5
    for sample in SourceStream(source, seed=0, repeat=False):
        [text] = [part["text"] for part in sample.document if part["type"] == "text"]
        assert get_split(parse_caption(text)) == UNSEEN


def test_a_page_reads_as_words_with_spaces_between():
    [(_, task)] = draw_tasks("question_page", [0], 0, "train")
    image, text = make_page(task)
    assert image["type"] == "image"
    assert text["text"] == f"{task.prompt[-1]['text']} {task.expected}"


def test_videos_are_lossless():
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    frames = load_video(noise, num_frames=None)
    decoded = load_video(encode_video(frames), num_frames=None)
    assert [frame.tobytes() for frame in decoded] == [frame.tobytes() for frame in frames]


def test_what_cannot_be_written_is_refused(tmp_path):
    for counts in ({"draw": 1}, {"caption": 0}, {"captions": 5}):
        with pytest.raises(ValueError, match="documents: got"):
            write_shards(tmp_path / "new", counts, seed=0)
    with pytest.raises(ValueError, match="split: got 'dev'"):
        write_shards(tmp_path / "new", {"caption": 1}, seed=0, split="dev")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for folder in (tmp_path / "full", tmp_path / "full" / "note.txt"):
        with pytest.raises(ValueError, match="output: got"):
            write_shards(folder, {"caption": 1}, seed=0)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]


def test_a_run_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr("modeling_emu.shapes.shards.encode_video", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_shards(tmp_path / "shapes", {"caption": 8, "clip_caption": 1}, seed=0)
    assert list(tmp_path.iterdir()) == []
