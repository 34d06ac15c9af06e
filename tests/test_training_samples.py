"""Samples to the trackers: they are what the model gives, they change nothing of the run, and two processes report once."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_emu import GOLDEN_EMU
from PIL import Image
from python_processes import TESTS, TWO_PROCESSES, run_python
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_recipes import make_settings, write_instructions, write_pairs

from modeling_emu import EmuForMultimodalGeneration, EmuPipeline, EmuProcessor
from modeling_emu.training.recipes import PACKAGED_RECIPES, InstructArguments, PretrainArguments, parse_recipe
from modeling_emu.training.run import instruct, pretrain
from modeling_emu.training.samples import describe_prompt, has_decoder, load_decoder, read_prompt


QUESTION = "What is this?"
SEED = 42  # TrainingArguments' own


def make_sample_settings(tmp_path, files: str, kind: str, image, *more: str) -> list[str]:
    return make_settings(
        tmp_path,
        files,
        kind,
        "eval_strategy=steps",
        "eval_steps=2",
        f"eval_sources=[{{kind: {kind}, files: '{files}'}}]",
        f"sample_prompts=[a red square, [{{type: image, image: '{image}'}}, '{QUESTION}']]",
        *more,
    )


def run_pretraining(tmp_path, name: str, *more: str) -> Path:
    if not (tmp_path / "pairs").exists():
        write_pairs(tmp_path / "pairs")
    files, image = str(tmp_path / "pairs" / "metadata.jsonl"), tmp_path / "pairs" / "red.png"
    settings = make_sample_settings(tmp_path / name, files, "image_text", image, *more)
    return pretrain(*parse_recipe("pretrain-cpu", settings, PretrainArguments))


def read_events(folder: Path) -> EventAccumulator:
    [path] = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(path))
    events.Reload()
    return events


def read_texts(events: EventAccumulator, number: int) -> list[tuple[int, str]]:
    found = events.Tensors(f"samples/{number}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def read_pictures(events: EventAccumulator, number: int) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(f"samples/{number}")
    ]


def test_tensorboard_has_what_the_model_gives(tmp_path):
    """The last evaluation is after the last step: the saved model gives the same text and the same pictures."""
    folder = run_pretraining(tmp_path, "run")
    events = read_events(tmp_path / "run")
    model, processor = EmuForMultimodalGeneration.from_pretrained(folder), EmuProcessor.from_pretrained(folder)
    parts = {name: getattr(load_decoder(str(GOLDEN_EMU)), name) for name in ("unet", "vae", "scheduler")}
    pipeline = EmuPipeline(multimodal_encoder=model.eval(), processor=processor, **parts)
    image = tmp_path / "pairs" / "red.png"
    documents = [[{"type": "text", "text": "a red square"}]]
    documents.append([{"type": "image", "image": str(image)}, {"type": "text", "text": QUESTION}])
    for number, (document, words) in enumerate(
        zip(documents, ("a red square", f"[image {image}] {QUESTION}"), strict=True)
    ):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": document}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=64)
        [text] = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        [first, last] = read_texts(events, number)
        assert (first[0], last) == (2, (3, f"{words}\n\n{text.strip()}"))
        picture = pipeline(document, generator=torch.Generator().manual_seed(SEED)).images[0]
        pictures = read_pictures(events, number)
        assert len(pictures) == 2
        assert np.array_equal(pictures[1], np.asarray(picture))
        assert not np.array_equal(pictures[1], pictures[0]), "the model has moved between the evaluations"


def test_a_run_with_samples_is_the_run_without(tmp_path):
    """Dropout and the order of samples draw random numbers after each evaluation."""
    assert json.loads((GOLDEN_EMU / "config.json").read_text())["causal_former_config"]["dropout"] > 0
    weights = {}
    for name, more in (("with", ()), ("without", ("sample_prompts=[]",))):
        weights[name] = load_file(run_pretraining(tmp_path, name, "max_steps=4", *more) / "model.safetensors")
    assert weights["with"].keys() == weights["without"].keys()
    for name, tensor in weights["without"].items():
        assert torch.equal(tensor, weights["with"][name]), name
    assert read_texts(read_events(tmp_path / "with"), 0)
    assert "samples/0" not in read_events(tmp_path / "without").Tags()["images"]


def test_instruction_tuning_samples_answers_alone(tmp_path):
    files = write_instructions(tmp_path / "data")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    settings = make_sample_settings(tmp_path, files, "instruction", tmp_path / "a.png")
    instruct(*parse_recipe("instruct-cpu", settings, InstructArguments))
    events = read_events(tmp_path)
    assert [step for step, _ in read_texts(events, 1)] == [2, 3]
    assert events.Tags()["images"] == []


def test_shards_on_two_processes_give_the_samples_of_one_process(tmp_path):
    """FSDP2: both generate, since each has half of every weight; one of them reports."""
    write_pairs(tmp_path / "pairs")
    process = run_python(*TWO_PROCESSES, str(TESTS / "training_samples_run.py"), str(tmp_path))
    assert process.returncode == 0, process.stderr[-4000:]
    events = {name: read_events(tmp_path / name) for name in ("whole", "sharded")}
    assert read_texts(events["whole"], 0) == read_texts(events["sharded"], 0)
    for number in (0, 1):
        [whole], [sharded] = (read_pictures(events[name], number) for name in ("whole", "sharded"))
        assert np.abs(whole.astype(int) - sharded).max() <= 1  # float32, other orders of summation


@pytest.mark.parametrize("name", ["pretrain-cpu", "instruct-cpu"])
def test_the_example_in_a_recipe_is_one(tmp_path, name):
    text = (PACKAGED_RECIPES / f"{name}.yaml").read_text()
    _, example = text.split("every 50 steps:\n")
    lines = itertools.takewhile(lambda line: line.startswith("#   "), example.splitlines())
    (tmp_path / "recipe.yaml").write_text(text + "\n".join(line.removeprefix("#   ") for line in lines))
    arguments_class = PretrainArguments if name.startswith("pretrain") else InstructArguments
    arguments, training = parse_recipe(str(tmp_path / "recipe.yaml"), [], arguments_class)
    assert (training.eval_strategy, training.eval_steps) == ("steps", 50)
    assert arguments.eval_sources
    documents = [read_prompt(prompt) for prompt in arguments.sample_prompts]
    assert describe_prompt(documents[-1]) == "[image my/photo.png] What is this?"


def test_wrong_prompts_are_refused_before_training(tmp_path):
    def run(*more: str) -> None:
        run_pretraining(tmp_path, "run", *more)

    with pytest.raises(ValueError, match="sample_prompts: got some with eval_strategy no, expected steps or epoch"):
        run("eval_strategy=no")
    with pytest.raises(ValueError, match="expected a readable image"):
        run("sample_prompts=[[{type: image, image: nothing.png}]]")
    with pytest.raises(ValueError, match="type of a part: got 'sound'"):
        run("sample_prompts=[[{type: sound, sound: a.wav}]]")
    with pytest.raises(ValueError, match="got special tokens"):
        run("sample_prompts=['a <image>']")


def test_samples_without_a_tracker_that_shows_them_are_said_to_go_nowhere(tmp_path, caplog):
    run_pretraining(tmp_path, "run", "report_to=none", "max_steps=2")
    assert "samples go nowhere: set report_to to tensorboard, wandb or trackio" in caplog.text


def test_a_decoder_is_found_by_the_index_of_its_folder(tmp_path):
    assert has_decoder(str(GOLDEN_EMU))
    assert not has_decoder(str(tmp_path))
    index = json.loads((GOLDEN_EMU / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))
    assert not has_decoder(str(tmp_path))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_texts_and_pictures(tmp_path, monkeypatch, tracker):
    """Without an account and without a network: both keep their runs in files then."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "files"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "files"))  # read when it is imported
    (tmp_path / "files").mkdir()
    pytest.importorskip(tracker)
    folder = run_pretraining(tmp_path, "run", f"report_to={tracker}", "max_steps=2")
    model, processor = EmuForMultimodalGeneration.from_pretrained(folder), EmuProcessor.from_pretrained(folder)
    parts = {name: getattr(load_decoder(str(GOLDEN_EMU)), name) for name in ("unet", "vae", "scheduler")}
    pipeline = EmuPipeline(multimodal_encoder=model.eval(), processor=processor, **parts)
    picture = pipeline("a red square", generator=torch.Generator().manual_seed(SEED)).images[0]
    if tracker == "wandb":
        [table] = (tmp_path / "files").rglob("*.table.json")
        [row, _] = json.loads(table.read_text())["data"]
        assert row[0] == "a red square"
    written = [np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "files").rglob("*.png")]
    assert len(written) == 2
    assert any(np.array_equal(pixels, np.asarray(picture)) for pixels in written)
