"""`emu demo`: each ability once, judged whatever comes, printed and on one sheet."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFont
from rich.console import Console
from typer.testing import CliRunner

from modeling_emu import EmuConfig
from modeling_emu.cli import app
from modeling_emu.cli.demo import (
    MAX_LETTERS,
    describe_document,
    describe_model,
    judge_answer,
    make_document,
    print_row,
)
from modeling_emu.cli.loading import EMU_TINY, TINY, UNTRAINED
from modeling_emu.cli.sheet import COLUMNS, IMAGE_SIZE, MAX_LINES, Row, arrange, make_sheet, wrap
from modeling_emu.evaluation.shapes import ABILITIES, draw_tasks
from modeling_emu.shapes.documents import Task
from modeling_emu.shapes.render import render_scene
from modeling_emu.shapes.scenes import Item, Scene
from modeling_emu.training.tiny import make_untrained


FONT = ImageFont.load_default(14)
NOISE = "�` heheh [IMG]\n\n[red]" + "e" * 900


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.stdout

    return run


def make_text(text):
    return {"type": "text", "text": text}


def answer_rightly(task):
    """The target of a task in the form of a model's answer."""
    if task.kind == "story":
        return task.target
    if task.kind == "dialogue":
        return task.expected
    return task.target[0].get("text", task.target[0].get("image"))


def tasks_of(seed=0):
    return [draw_tasks(ability.kind, ability.split, 1, seed)[0] for ability in ABILITIES]


def test_the_packaged_model_shows_every_ability_on_one_sheet(demo, tmp_path):
    output = demo("--seed", 7, "--output", "shown")
    assert [path.name for path in (tmp_path / "shown").iterdir()] == ["image_0.png"]
    assert output.splitlines()[-1] == "shown/image_0.png"
    assert [ability.name for ability in ABILITIES if f"\n{ability.name}  " not in output] == []
    notice = describe_model(EmuConfig.from_pretrained(EMU_TINY).variant)
    assert output.startswith(notice)
    again = demo("--seed", 7, "--output", "again")
    assert re.sub(r", in \d+ s", "", again) == re.sub(r", in \d+ s", "", output).replace("shown", "again")
    assert (tmp_path / "again" / "image_0.png").read_bytes() == (tmp_path / "shown" / "image_0.png").read_bytes()


def test_a_network_of_the_small_models_sizes_is_asked_and_judged(demo, tmp_path):
    """Its pictures are of a size that the checker reads, and nothing that it makes of random weights is right."""
    make_untrained(tmp_path / "model", seed=0)
    output = demo("--model", tmp_path / "model")
    assert "UNTRAINED" in output.splitlines()[0]
    assert "not judged" not in output
    assert f"0 of {len(ABILITIES)} right" in output


def test_other_models_are_said_to_be_strangers():
    assert describe_model(TINY) == ""
    assert "UNTRAINED" in describe_model(UNTRAINED)
    assert "This model (instruct) was not trained in the shapes' world" in describe_model("instruct")


@pytest.mark.parametrize("seed", range(3))
def test_right_answers_are_right(seed):
    for task in tasks_of(seed):
        assert judge_answer(task, answer_rightly(task)) == (True, "right"), task.kind


@pytest.mark.parametrize("picture", [Image.new("RGB", (32, 32), "white"), Image.effect_noise((64, 64), 90)])
def test_answers_that_are_none_are_wrong(picture):
    """Texts that nothing can read, stories without pictures or without texts, pictures of nothing or of noise."""
    for task in tasks_of():
        if task.kind == "story":
            answers = [[], [make_text(NOISE)], [{"type": "image", "image": picture}] * 4]
        elif isinstance(answer_rightly(task), Image.Image):
            answers = [picture.convert("RGB")]
        else:
            answers = ["", NOISE] if task.kind != "dialogue" else [(NOISE,), ("",)]
        for answer in answers:
            assert judge_answer(task, answer)[0] is False
            assert describe_document(make_document(answer)) is not None


def test_pictures_that_the_checker_cannot_read_are_not_judged():
    [task] = draw_tasks("draw", "test", 1, 0)
    is_right, verdict = judge_answer(task, Image.new("RGB", (48, 40)))
    assert is_right is None
    assert verdict.startswith("not judged")


def test_the_verdict_names_what_of_a_picture_is_wrong():
    [item] = (scene := Scene((Item("ring", "blue", "large", "middle"),))).items
    task = Task("draw", [], [], scene, (scene,))
    for change, verdict in [
        ({"colour": "red"}, "wrong: colours"),
        ({"size": "small", "shape": "cross"}, "wrong: shapes, sizes"),
    ]:
        picture = render_scene(Scene((replace(item, **change),)), random.Random(0))
        assert judge_answer(task, picture) == (False, verdict)
    swapped = Scene((Item("ring", "red", "large", "top left"), Item("cross", "blue", "large", "top right")))
    scene = Scene((Item("ring", "blue", "large", "top left"), Item("cross", "red", "large", "top right")))
    picture = render_scene(swapped, random.Random(0))
    verdict = "wrong: which belongs to which, or something else is there"
    assert judge_answer(Task("draw", [], [], scene, (scene,)), picture) == (False, verdict)


def test_texts_are_printed_as_they_are_and_not_without_end(capsys):
    row = Row("captions", "wrong", False, [make_text("[red]x[/red]")], [make_text(NOISE)], [make_text("a ring.")])
    print_row(Console(width=2 * MAX_LETTERS), row)
    title, given, answered, right = capsys.readouterr().out.strip().splitlines()
    assert title == "captions  wrong"
    assert given.split() == ["given", "[red]x[/red]"]
    assert answered.strip().endswith(f"{'e' * 200}...")
    assert right.split() == ["right", "a", "ring."]


def test_pictures_are_printed_as_the_checker_reads_them():
    scene = Scene((Item("ring", "blue", "large", "middle"),))
    picture = render_scene(scene, random.Random(0))
    document = [{"type": "image", "image": picture}, {"type": "video", "video": [picture] * 8}]
    nothing = {"type": "image", "image": Image.new("RGB", (50, 32))}
    assert describe_document([*document, nothing]).splitlines() == [
        "[picture: a large blue ring in the middle]",
        "[video of 8 frames]",
        "[picture: nothing clear]",
    ]


@pytest.mark.parametrize("text", ["", "a", "a large red circle " * 20, NOISE])
def test_texts_are_wrapped_to_the_width(text):
    lines = wrap(text, FONT, 120)
    assert 1 <= len(lines) <= MAX_LINES
    assert all(FONT.getlength(line) <= 120 for line in lines)
    whole = "".join("".join(lines).split())
    assert "".join(text.split()).startswith(whole.removesuffix("..."))
    assert whole.endswith("...") or whole == "".join(text.split())


def test_tiles_keep_their_order_apart_and_in_the_column():
    """Documents of random parts: no two tiles share a pixel, and none leaves the column."""
    rng = random.Random(0)
    picture = Image.new("RGB", (32, 32))
    for _ in range(200):
        parts = [
            {"type": "image", "image": picture},
            {"type": "video", "video": [picture] * 8},
            make_text("and where is it?"),
            make_text("a large red circle at the top left " * 3),
            make_text(""),
        ]
        document, width = rng.choices(parts, k=rng.randint(0, 6)), rng.choice([width for _, width in COLUMNS[1:]])
        tiles, height = arrange(document, FONT, width)
        taken = np.zeros((height + 1, width + 1), dtype=int)
        for tile in tiles:
            if isinstance(tile.content, list):
                size = int(max(map(FONT.getlength, tile.content))), 19 * len(tile.content)
            else:
                size = tile.content.size
            assert tile.left + size[0] <= width
            assert tile.top + size[1] <= height
            taken[tile.top : tile.top + size[1], tile.left : tile.left + size[0]] += 1
        assert taken.max(initial=0) <= 1
        places = [(tile.top, tile.left) for tile in tiles]
        assert len(set(places)) == len(places)


def test_the_sheet_shows_pictures_enlarged_pixel_by_pixel():
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    red.putpixel((16, 16), (0, 255, 0))
    row = Row("blends", "right", True, [{"type": "image", "image": red}], [{"type": "image", "image": blue}], [])
    pixels = np.asarray(make_sheet("a title", [row, row]))
    outline = 4 * (IMAGE_SIZE - 1)
    scale = (IMAGE_SIZE // 32) ** 2
    assert (pixels == (255, 0, 0)).all(-1).sum() == 2 * (IMAGE_SIZE**2 - outline - scale)
    assert (pixels == (0, 255, 0)).all(-1).sum() == 2 * scale
    assert (pixels == (0, 0, 255)).all(-1).sum() == 2 * (IMAGE_SIZE**2 - outline)


def test_a_sheet_without_texts_or_rows_is_a_sheet():
    assert make_sheet("", []).height < make_sheet("", [Row("", "", None, [], [], [make_text("")])]).height
