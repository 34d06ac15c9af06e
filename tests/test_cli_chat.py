"""`emu chat` from a pipe: turns, images in them, drawn pictures, and what it says of lines that it cannot take."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_emu.cli import app
from modeling_emu.cli.chat import COMMANDS, NUM_NEW_TOKENS, Chat, has_roles
from modeling_emu.cli.loading import TINY, UNTRAINED, get_drawing_options, load_model, load_processor
from modeling_emu.evaluation.asking import GUIDANCE_SCALE, NUM_INFERENCE_STEPS


def make_text(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(text):
    return {"role": "assistant", "content": [make_text(text)]}


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Run the command in an empty folder on lines from a pipe."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *lines, exit_code=0, seed=None):
        arguments = ["chat", "--model", str(folder), *([] if seed is None else ["--seed", str(seed)])]
        result = CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))
        assert result.exit_code == exit_code, result.output + repr(result.exception)
        return result

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my picture.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def tuned(converted_instruct):
    return load_model(converted_instruct), load_processor(converted_instruct)


@pytest.fixture(scope="module")
def base(converted_pretrain):
    return load_model(converted_pretrain), load_processor(converted_pretrain)


def answer(model, inputs):
    """What a model says, as it is printed, and as it is remembered."""
    ids = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


def answer_messages(pair, *messages):
    model, processor = pair
    inputs = processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return processor.batch_decode(answer(model, inputs), skip_special_tokens=True)[0]


def lines_of(result):
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


def test_a_tuned_model_answers_each_turn_in_its_chat_form(talk, tuned, converted_instruct, picture):
    given = user({"type": "image", "image": Image.open(picture)}, make_text("What is this?"))
    first = answer_messages(tuned, given)
    second = answer_messages(tuned, given, assistant(first.strip()), user(make_text("And why?")))
    result = talk(converted_instruct, f"/image {picture}", "What is this?", "", "  And why?  ", "/quit", "What next?")
    assert lines_of(result) == [line.strip() for text in (first, second) for line in text.splitlines() if line.strip()]
    assert "not tuned" not in result.stderr


def test_a_base_model_continues_all_that_was_said(talk, base, converted_pretrain):
    model, processor = base
    first = answer_messages(base, user(make_text("There are two")))
    inputs = processor(documents=[[make_text(f"There are two{first.strip()} and a third")]], return_tensors="pt")
    second = processor.batch_decode(answer(model, inputs), skip_special_tokens=True)[0]
    result = talk(converted_pretrain, "There are two", "and a third")
    assert lines_of(result) == [line.strip() for text in (first, second) for line in text.splitlines() if line.strip()]
    assert "not tuned for conversations: it continues" in result.stderr


def test_new_forgets_turns_and_images(talk, converted_instruct, picture):
    once = lines_of(talk(converted_instruct, "Hello."))
    again = lines_of(talk(converted_instruct, "What?", f"/image {picture}", "/new", "Hello."))
    assert again[-len(once) :] == once


def test_pictures_are_drawn_and_numbered_on(talk, converted_pretrain, tmp_path):
    for _ in range(2):
        paths = lines_of(talk(converted_pretrain, "/draw a red circle", "/draw a red circle", seed=3))
    assert paths == ["outputs/image_2.png", "outputs/image_3.png"]
    first, second, third, _ = (np.asarray(Image.open(tmp_path / f"outputs/image_{i}.png")) for i in range(4))
    np.testing.assert_array_equal(first, third)
    assert (first != second).any()


def test_lines_that_cannot_be_taken_are_one_line_each(talk, converted_instruct, picture, tmp_path):
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = {
        "/sing": "command: got '/sing', expected one of /image, /draw, /new, /help, /quit",
        "/image": "/image: got nothing behind it, expected a PATH",
        "/draw  ": "/draw: got nothing behind it, expected a TEXT",
        "/image missing.png": "got 'missing.png', expected an existing file",
        "/image broken.png": "broken.png",
        "/image notes.txt": "got the file 'notes.txt'",
        "/image a red circle": "expected the path of an image or a video",
        "say [IMG]": "got special tokens ['[IMG]']",
        "/draw a circle": "/draw: got a model without a visual decoder",
    }
    result = talk(converted_instruct, *lines, "Hello.")
    errors = [line for line in result.stderr.splitlines() if line.startswith("emu: ")]
    assert len(errors) == len(lines)
    for error, message in zip(errors, lines.values(), strict=True):
        assert message in error
    assert lines_of(result) == lines_of(talk(converted_instruct, "Hello."))
    assert not (tmp_path / "outputs").exists()


def test_help_lists_every_command(talk, converted_instruct):
    help_lines = lines_of(talk(converted_instruct, "/help"))
    assert [line.split()[0] for line in help_lines[:-1]] == list(COMMANDS)


def test_a_turn_beyond_the_context_is_not_taken(talk, converted_instruct):
    result = talk(converted_instruct, "Hello.", "on and " * 1500, "/new", "Hello.")
    once, again = lines_of(result)[: len(lines_of(result)) // 2], lines_of(result)[len(lines_of(result)) // 2 :]
    assert once == again
    [error] = [line for line in result.stderr.splitlines() if line.startswith("emu: ")]
    assert "expected fewer than 2048, the context of the language model" in error
    assert "nothing was dropped: /new begins again" in error
    assert "indexing errors" not in result.stderr


def test_an_answer_cut_by_the_context_says_so(base, capsys):
    """A turn that leaves room for a few tokens of the answer."""
    model, processor = base
    chat = Chat(model, processor)
    limit, text = processor.tokenizer.model_max_length, "one " * 100
    while chat.count_tokens([user(make_text(f"{text}one"))]) < limit - 2:
        text += "one "
    chat.take(text)
    assert "the answer was cut where the model's context ends" in capsys.readouterr().err
    with pytest.raises(ValueError, match="/new begins again"):
        chat.take("more")
    assert len(chat.messages) == 2
    chat.take("/new")
    assert chat.messages == []


@pytest.mark.parametrize("kind", ["base", "tuned"])
def test_tokens_are_counted_as_they_are_encoded(kind, request, picture):
    model, processor = request.getfixturevalue(kind)
    image = Image.open(picture)
    messages = [
        user({"type": "image", "image": image}, {"type": "video", "video": [image] * 5}, make_text("What?")),
        assistant("This."),
        user({"type": "image", "image": image}, make_text("And this ?")),
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": None},
    )
    assert Chat(model, processor).count_tokens(messages) == inputs["input_ids"].shape[1]
    assert has_roles(processor) == (kind == "tuned")


def test_the_packaged_model_is_talked_to_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["chat"], input="what colour is it?\n/draw a large red circle in the middle.\n")
    assert result.exit_code == 0, result.output
    assert lines_of(result)[-1] == "outputs/image_0.png"
    assert Path("outputs/image_0.png").is_file()


def test_the_small_model_draws_as_it_is_evaluated():
    expected = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}
    assert get_drawing_options(TINY) == expected
    assert get_drawing_options(UNTRAINED) == get_drawing_options("instruct") == {}
