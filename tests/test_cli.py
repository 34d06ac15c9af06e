"""The `emu` command on real files, with the small model that comes with the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import convert_golden
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.cli import app
from modeling_emu.cli.documents import read_document, write_images
from modeling_emu.cli.generate import encode_prompt, print_document, select_options
from modeling_emu.cli.info import (
    PartSize,
    compute_cache_bytes,
    compute_memory,
    count_parameters,
    read_all_shapes,
    smallest_card_gb,
)
from modeling_emu.cli.loading import (
    EMU_TINY,
    TINY,
    find_model,
    get_drawing_options,
    load_model,
    load_pipeline,
    load_processor,
)


SECONDS_TO_HELP = 0.5
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from modeling_emu.cli import main; main()"]


@pytest.fixture
def emu(tmp_path, monkeypatch):
    """Run the command in an empty folder; it fails the test where the exit code is another than expected."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, exit_code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == exit_code, result.output + repr(result.exception)
        return result

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path


@pytest.fixture
def clip(tmp_path):
    """An MP4 of 12 frames, written by a real encoder."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            pixels = np.full((48, 64, 3), 20 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def encoder_only(tmp_path):
    """A model folder without the visual decoder."""
    folder = tmp_path / "encoder-only"
    ignored = shutil.ignore_patterns("unet", "vae", "scheduler", "model_index.json")
    return shutil.copytree(EMU_TINY, folder, ignore=ignored)


@pytest.fixture(scope="module")
def converted_adapter(tmp_path_factory):
    """The repository of golden Emu-I with its LoRA beside the weights. Not to be changed."""
    return convert_golden(
        "instruct/Emu-instruct.pt", tmp_path_factory.mktemp("adapter") / "instruct", "--lora=adapter"
    )


def test_help_is_quick():
    """The best of several runs of the whole command, by the processor's time, which no other work on the machine adds to."""
    durations_s = []
    for _ in range(5):
        before = os.times()
        output = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
        after = os.times()
        durations_s.append(sum(after[2:4]) - sum(before[2:4]))  # of child processes: user and system
    assert "generate" in output
    assert min(durations_s) < SECONDS_TO_HELP


def test_text_is_printed_to_stdout_alone(picture, tmp_path):
    """A real process: what a shell would pipe on is the text, and nothing else."""
    command = [*COMMAND, "generate", str(picture), "the image shows", "--max-new-tokens", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    model, processor = load_model(EMU_TINY), load_processor(EMU_TINY)
    document = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "the image shows"}]
    inputs = encode_prompt(processor, document)
    ids = model.generate(**inputs, max_new_tokens=3)
    expected = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert result.stdout == expected + "\n"
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".gif", ".bmp", ".tif"])
def test_images_of_every_format_are_read(emu, tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.effect_noise((30, 20), 80).convert("L" if suffix == ".gif" else "RGB").save(path)
    emu("generate", path, "a text", "--max-new-tokens", 2)


def test_a_video_is_read(emu, clip):
    emu("generate", clip, "the video shows", "--max-new-tokens", 2)


def test_seed_makes_sampling_repeatable(emu):
    def sample(seed):
        return emu("generate", "a text", "--temperature", 1.5, "--max-new-tokens", 12, "--seed", seed).stdout

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_images_are_drawn_and_numbered_on(emu, tmp_path):
    arguments = ("generate", "--mode", "image", "a text", "--steps", 2, "--seed", 3, "--output", "drawn")
    first, second = emu(*arguments).stdout.strip(), emu(*arguments).stdout.strip()
    assert (first, second) == ("drawn/image_0.png", "drawn/image_1.png")
    one, two = (np.asarray(Image.open(tmp_path / path)) for path in (first, second))
    np.testing.assert_array_equal(one, two)
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["image_0.png", "image_1.png"]


def test_decoder_options_arrive(emu, tmp_path, picture):
    output = emu(
        "generate", "--mode", "image", picture, "a text", "--steps", 2, "--height", 64, "--width", 96,
        "--num-images", 2, "--guidance-scale", 3, "--negative-prompt", "blurred",
    ).stdout  # fmt: skip
    assert output.split() == ["outputs/image_0.png", "outputs/image_1.png"]
    for path in output.split():
        assert Image.open(tmp_path / path).size == (96, 64)


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_seeds_are_bounded(emu, command):
    """By what torch's generators take, before anything is loaded."""
    for seed in (-1, 2**63):
        assert "Invalid value for '--seed'" in emu(command, "--seed", seed, exit_code=2).stderr


def test_the_largest_seed_is_taken(emu):
    emu("generate", "a text", "--temperature", 1, "--max-new-tokens", 2, "--seed", 2**63 - 1)


def start_an_image_third(folder: Path) -> None:
    """Change the text head of a model so that, greedily after "a text", it says two tokens and starts an image."""
    model, processor = load_model(folder), load_processor(folder)
    inputs = processor(documents=[[{"type": "text", "text": "a text"}]], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    states = model.model(input_ids=ids).last_hidden_state[0, -3:]
    with torch.no_grad():
        scores = torch.tensor([[-100.0], [-100.0], [100.0]])
        row = torch.linalg.lstsq(states, scores).solution[:, 0]
        model.lm_head.weight[model.config.image_start_token_id] = row
    model.save_pretrained(folder)


def test_interleaved_prints_texts_and_paths_in_order(emu, tmp_path, converted_pretrain):
    """The command against the pipeline's own document: what it drew, where it drew it."""
    folder = shutil.copytree(converted_pretrain, tmp_path / "drawing")
    start_an_image_third(folder)
    output = emu(
        "generate", "--mode", "interleaved", "a text", "--max-images", 1, "--max-new-tokens", 12, "--temperature", 0,
        "--steps", 2, "--seed", 1, "--model", folder,
    ).stdout  # fmt: skip
    document = load_pipeline(folder).generate_document(
        "a text", max_images=1, max_new_tokens=12, do_sample=False, num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert [part["type"] for part in document] == ["text", "image", "text"]
    before, drawn, after = document
    assert output == f"{before['text'].strip()}\noutputs/image_0.png\n{after['text'].strip()}\n"
    written = np.asarray(Image.open(tmp_path / "outputs" / "image_0.png"))
    np.testing.assert_array_equal(written, np.asarray(drawn["image"]))


def test_interleaved_without_an_image_prints_the_text_alone(emu, tmp_path, converted_pretrain):
    arguments = ("generate", "a text", "--max-new-tokens", 8, "--temperature", 0, "--model", converted_pretrain)
    assert emu(*arguments, "--mode", "interleaved").stdout == emu(*arguments).stdout
    assert not (tmp_path / "outputs").exists()


def test_a_folder_without_decoder_gives_text_but_no_images(emu, encoder_only):
    emu("generate", "--model", encoder_only, "a text", "--max-new-tokens", 2)
    result = emu("generate", "--model", encoder_only, "--mode", "image", "a text", exit_code=2)
    assert "no visual decoder" in result.stderr


def test_a_model_of_the_hub_is_downloaded_as_far_as_needed(tmp_path):
    """Text needs no decoder, a picture does; code and unknown repositories are left alone."""
    repository = shutil.copytree(EMU_TINY, tmp_path / "hub" / "org" / "emu")
    (repository / "modeling_emu.py").write_text("raise RuntimeError('this code was run')\n")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}

        def run(*arguments: str) -> subprocess.CompletedProcess:
            command = [*COMMAND, "generate", "a text", *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

        assert run("--model", "org/emu", "--max-new-tokens", "2").returncode == 0
        [snapshot] = (tmp_path / "home").rglob("snapshots/*")
        weights = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.safetensors")]
        assert weights == ["model.safetensors"]
        assert not {path.name for path in snapshot.iterdir()} & {"vae", "modeling_emu.py"}

        assert run("--model", "org/emu", "--mode", "image", "--steps", "1").stdout == "outputs/image_0.png\n"

        unknown = run("--model", "org/nothing")
        (repository / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (repository / "model.safetensors").write_bytes(b"to be left where they are")
        other = run("--model", "org/emu")
    assert unknown.returncode == 2
    assert "org/nothing" in unknown.stderr.splitlines()[-1]
    assert "Traceback" not in unknown.stderr
    assert "got 'llama', expected 'emu'" in other.stderr.splitlines()[-1]
    assert not any(b"to be left" in path.read_bytes() for path in (tmp_path / "home").rglob("blobs/*"))


def test_model_folder_with_its_own_code_runs_none_of_it(emu, tmp_path):
    folder = shutil.copytree(EMU_TINY, tmp_path / "with-code")
    for name in ("modeling_emu", "processing_emu", "pipeline_emu", "configuration_emu"):
        (folder / f"{name}.py").write_text("raise RuntimeError('this code was run')\n")
    emu("generate", "--model", folder, "a text", "--max-new-tokens", 2)
    emu("generate", "--model", folder, "--mode", "image", "a text", "--steps", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "'missing.png', expected an existing file"),
        (["missing.MP4"], "'missing.MP4', expected an existing file"),
        ([" "], "got an empty text"),
        (["notes.txt"], "got the file 'notes.txt'"),
        (["broken.png"], "broken.png"),
        (["empty.jpg"], "empty.jpg"),
        (["broken.mp4"], "broken.mp4"),
        (["a", "--model", "no/such/folder"], "expected an existing folder or a Hub id"),
        (["a", "--model", "."], "config.json"),
        (
            ["a", "--steps", "3"],
            "--steps: got 3 with --mode text, expected it with --mode image or --mode interleaved",
        ),
        (["a", "--mode", "image", "--top-p", "0.5"], "--top-p: got 0.5 with --mode image"),
        (["a", "--mode", "image", "--guidance-scale", "nan"], "--guidance-scale: got nan, expected a finite number"),
        (["a", "--temperature", "inf"], "--temperature: got inf, expected a finite number"),
        (["a", "--length-penalty", "2"], "--length-penalty: got 2.0 without beams"),
        (["a", "--length-penalty", "2", "--num-beams", "1"], "--length-penalty: got 2.0 without beams"),
        (["a", "--repetition-penalty", "0"], "--repetition-penalty: got 0.0, expected a number above 0"),
        (["a", "--min-new-tokens", "5", "--max-new-tokens", "4"], "--min-new-tokens: got 5, expected at most 4"),
        (["a", "--min-new-tokens", "65"], "--min-new-tokens: got 65, expected at most 64"),
        (["a " * 2500], ", the context of the language model"),
        (["[IMG]"], "got special tokens ['[IMG]']"),
        (["a", "--device", "abacus"], "--device: got 'abacus'"),
        (["a", "--mode", "image", "--output", "notes.txt"], "got the file 'notes.txt', expected a folder"),
        (["a", "--mode", "image", "--output", "notes.txt/drawn"], "notes.txt', expected a folder"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(emu, tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("a note")
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "empty.jpg").touch()
    before = sorted(tmp_path.iterdir())
    result = emu("generate", *arguments, exit_code=2)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("emu: ")
    assert message in last_line
    assert "Traceback" not in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_documents_are_read_before_weights(emu, encoder_only):
    for path in encoder_only.glob("*.safetensors"):
        path.write_bytes(b"no weights")
    (encoder_only / "broken.png").touch()
    assert "broken.png" in emu("generate", encoder_only / "broken.png", "-m", encoder_only, exit_code=2).stderr
    assert "Traceback" not in emu("generate", "a text", "-m", encoder_only, exit_code=2).output


def test_traceback_on_request(emu, monkeypatch):
    monkeypatch.setenv("EMU_TRACEBACK", "1")
    result = emu("generate", "missing.png", exit_code=1)
    assert isinstance(result.exception, FileNotFoundError)


def test_only_what_begins_or_ends_in_text_is_a_turn(converted_instruct):
    """A picture to be described and a pattern to be completed are continued as they are by a tuned model, too."""
    processor = load_processor(converted_instruct)
    image, text = {"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": "red."}
    user = processor.tokenizer.convert_tokens_to_ids("[USER]")
    for document in ([text], [image, text], [text, image], [text, image, text]):
        assert user in encode_prompt(processor, document)["input_ids"]
    for document in ([image], [image, text, image], [{"type": "video", "video": [image["image"]] * 8}]):
        inputs = encode_prompt(processor, document)
        assert torch.equal(inputs["input_ids"], processor(documents=[document], return_tensors="pt")["input_ids"])
        assert user not in inputs["input_ids"]


def test_the_small_model_draws_as_it_is_evaluated_unless_told_otherwise(emu, tmp_path):
    """Of its variant, here said of the packaged model: steps and guidance that are not given are its own."""
    folder = shutil.copytree(EMU_TINY, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"variant": TINY}))

    def draw(*options):
        arguments = ("generate", "--mode", "image", "a large red circle in the middle.", "--seed", 1, "-m", folder)
        return np.asarray(Image.open(tmp_path / emu(*arguments, *options).stdout.strip()))

    by_default = draw()
    given = get_drawing_options(TINY)
    steps, scale = given["num_inference_steps"], given["guidance_scale"]
    np.testing.assert_array_equal(by_default, draw("--steps", steps, "--guidance-scale", scale))
    assert (by_default != draw("--steps", 2)).any()


def test_document_keeps_the_order_of_arguments(picture):
    assert read_document(["one", str(picture), "a.b two"]) == [
        {"type": "text", "text": "one"},
        {"type": "image", "image": str(picture)},
        {"type": "text", "text": "a.b two"},
    ]


def test_sampling_options_turn_sampling_on():
    assert select_options("text", {"temperature": 0.7, "top_k": None}) == {
        "max_new_tokens": 64,
        "temperature": 0.7,
        "do_sample": True,
    }
    assert select_options("text", {"temperature": 0.0}) == {"max_new_tokens": 64, "do_sample": False}
    assert "do_sample" not in select_options("text", {"num_beams": 5})


@pytest.mark.parametrize("length", [360, 5000])
@pytest.mark.parametrize("ending", ["", ".", ".png"])
def test_long_sentences_are_text(length, ending):
    """No file system has names so long; the suffix of the text is what follows its last full stop."""
    text = "This is a sentence. " + "And on it goes " * (length // 15) + ending
    if ending == ".png":
        with pytest.raises(FileNotFoundError, match="expected an existing file"):
            read_document([text])
    else:
        assert read_document([text]) == [{"type": "text", "text": text}]


class Unwritable(Image.Image):
    def save(self, *args, **kwargs):
        raise OSError("disk full")


def test_images_are_written_all_or_none(tmp_path):
    images = [Image.new("RGB", (4, 4)), Unwritable()]
    with pytest.raises(OSError, match="disk full"):
        write_images(images, tmp_path / "new" / "drawn")
    assert not (tmp_path / "new").exists()
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "image_6.png").touch()
    assert [path.name for path in write_images(images[:1], tmp_path / "drawn")] == ["image_7.png"]
    with pytest.raises(OSError, match="disk full"):
        write_images(images, tmp_path / "drawn")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["image_6.png", "image_7.png"]


def test_images_already_placed_are_removed_on_an_error(tmp_path, monkeypatch):
    """The second of three renames fails, in a folder that was there and in a new one."""
    replace, calls = os.replace, []

    def fail_at_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_second)
    images = [Image.new("RGB", (4, 4))] * 3
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old", tmp_path / "new"):
        calls.clear()
        with pytest.raises(OSError, match="disk gone"):
            write_images(images, folder)
    assert list((tmp_path / "old").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_commands_that_share_a_folder_overwrite_nothing(tmp_path):
    """Several processes at once, each with pictures of its own colour: every path reported holds that colour."""
    code = (
        "import sys; from pathlib import Path; from PIL import Image; "
        "from modeling_emu.cli.documents import write_images; sys.stdin.read(1); "
        "[print(p) for _ in range(4) for p in write_images([Image.new('L', (4, 4), int(sys.argv[1]))] * 3, Path('d'))]"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(colour)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
        )
        for colour in range(4)
    ]  # fmt: skip
    for process in processes:
        process.stdin.write("go")
        process.stdin.flush()
    paths = [process.communicate()[0].split() for process in processes]
    for colour, reported in enumerate(paths):
        assert len(reported) == 12
        assert {np.asarray(Image.open(tmp_path / path)).max() for path in reported} == {colour}
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted(
        Path(path).name for reported in paths for path in reported
    )


def test_no_images_make_no_folder(tmp_path, capsys):
    print_document([{"type": "text", "text": "a text"}], tmp_path / "outputs")
    assert capsys.readouterr().out == "a text\n"
    assert not (tmp_path / "outputs").exists()


def test_an_output_that_cannot_be_is_said_before_weights_are_read(emu, encoder_only, monkeypatch):
    for path in encoder_only.glob("*.safetensors"):
        path.write_bytes(b"no weights")
    Path("notes.txt").touch()
    arguments = ("generate", "a", "-m", encoder_only, "--mode", "interleaved", "-o")
    assert "notes.txt', expected a folder" in emu(*arguments, "notes.txt/a/b", exit_code=2).stderr
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    assert "expected a folder that can be written to" in emu(*arguments, "drawn", exit_code=2).stderr


def test_pictures_that_the_safety_checker_made_black_are_said(tmp_path, capsys):
    parts = [
        {"type": "image", "image": Image.new("RGB", (4, 4)), "nsfw_content_detected": flag} for flag in (True, False)
    ]
    print_document([{"type": "text", "text": " a text "}, *parts], tmp_path)
    captured = capsys.readouterr()
    assert captured.err == "The safety checker made 1 of the pictures black.\n"
    assert captured.out.splitlines() == ["a text", str(tmp_path / "image_0.png"), str(tmp_path / "image_1.png")]


def test_info_counts_what_the_networks_have(emu):
    model = load_model(EMU_TINY)
    parts = count_parameters(read_all_shapes(EMU_TINY))
    encoder = [parts[name].num_parameters for name in parts if name not in ("U-Net", "VAE", "safety checker")]
    assert sum(encoder) == sum(parameter.numel() for parameter in model.parameters())
    assert parts["language model"].num_quantisable == sum(
        module.weight.numel()
        for name, module in model.model.language_model.named_modules()
        if type(module).__name__ == "Linear"
    )
    output = emu("info", EMU_TINY).stdout
    assert EmuConfig.from_pretrained(EMU_TINY).variant in output
    assert f"{parts['U-Net'].num_parameters:,}" in output


def test_info_of_a_folder_without_weights_is_an_error(emu, encoder_only):
    for path in encoder_only.glob("*.safetensors"):
        path.unlink()
    assert "expected at least one" in emu("info", encoder_only, exit_code=2).stderr


def test_memory_of_the_published_sizes():
    """The whole published model without memory for it; the counts are those of its description, the bytes by hand."""
    with torch.device("meta"):
        model = EmuForMultimodalGeneration(EmuConfig())
    parts = count_parameters({"": {name: parameter.shape for name, parameter in model.named_parameters()}})
    counts = {name: part.num_parameters for name, part in parts.items()}
    assert sum(counts.values()) == 14_182_355_456
    assert counts["text head"] == 32_004 * 5120
    assert counts["regression head"] == 5120**2
    linear = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert parts["language model"].num_quantisable == linear
    assert counts["language model"] == linear + 32_004 * 5120 + (2 * 40 + 1) * 5120
    kept = 14_182_355_456 - linear
    assert compute_memory(parts) == {
        "float32": 56_729_421_824,
        "bfloat16": 28_364_710_912,
        "int8": 2 * kept + linear,
        "nf4": 2 * kept + linear // 2 + linear // 64 * 4,
    }
    cache = compute_cache_bytes(model.config.text_config)
    assert cache == 2 * 40 * 40 * 128 * 2048 * 2
    assert [smallest_card_gb(weights + cache) for weights in compute_memory(parts).values()] == [80, 40, 24, 16]


def test_memory_counts_what_is_quantised_apart():
    memory = compute_memory({"language model": PartSize(1000, 640), "heads": PartSize(24)})
    assert memory == {"float32": 4096, "bfloat16": 2048, "int8": 2 * 384 + 640, "nf4": 2 * 384 + 360}
    assert smallest_card_gb(int(7.2e9)) == 8
    assert smallest_card_gb(int(7.3e9)) == 12
    assert smallest_card_gb(int(1e12)) is None


def test_info_of_a_model_of_the_hub_reads_headers_only(tmp_path, converted_adapter, converted_pretrain):
    """The same tables as of the folder, decoder and adapter included; of every weight file a range was asked for."""
    repository = tmp_path / "hub" / "org" / "emu"
    shutil.copytree(converted_adapter, repository)
    for part in ("unet", "vae"):
        shutil.copytree(converted_pretrain / part, repository / part)
    shutil.copyfile(converted_pretrain / "model_index.json", repository / "model_index.json")
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}

        def describe(model):
            command = [*COMMAND, "info", str(model)]
            return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

        assert describe("org/emu") == describe(repository)
    requests = [request for request in hub.requests if ".safetensors" in request]
    assert len(requests) >= 4
    assert all('" 206 ' in request for request in requests), requests
    assert not [path for path in (tmp_path / "home").rglob("snapshots/*/**/*") if path.suffix == ".safetensors"]


def test_an_adapter_beside_the_weights_tunes_the_model(converted_instruct, converted_adapter):
    """Both forms of the same checkpoint say the same, and what is not loaded would be seen: the adapter changes much."""
    document = [{"type": "text", "text": "Describe the picture."}]
    inputs = encode_prompt(load_processor(converted_adapter), document)
    merged, adapted = load_model(converted_instruct), load_model(converted_adapter)
    untuned = EmuForMultimodalGeneration.from_pretrained(converted_adapter).eval()
    expected, got, without = (model(**inputs).logits.detach() for model in (merged, adapted, untuned))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # W + BA, added up in another order
    assert (without - expected).abs().max() > 1e-2
    assert not adapted.training
    assert load_model(converted_adapter, dtype="bfloat16")(**inputs.to(torch.bfloat16)).logits.dtype == torch.bfloat16


def test_the_command_uses_and_counts_an_adapter(emu, converted_instruct, converted_adapter):
    arguments = ("generate", "Describe the picture.", "--max-new-tokens", 8, "--num-beams", 2, "--model")
    assert emu(*arguments, converted_adapter).stdout == emu(*arguments, converted_instruct).stdout
    parts = count_parameters(read_all_shapes(converted_adapter))
    rank = json.loads((converted_adapter / "adapter" / "adapter_config.json").read_text())["r"]
    config = json.loads((converted_adapter / "config.json").read_text())["text_config"]
    pairs = 4 * config["num_hidden_layers"]
    assert parts["adapter"] == PartSize(pairs * rank * 2 * config["hidden_size"])
    output = emu("info", converted_adapter).stdout
    assert f"LORA of rank {rank}" in output
    assert f"{parts['adapter'].num_parameters:,}" in output


def test_info_describes_an_adapter_that_has_no_rank(emu, converted_adapter, tmp_path):
    folder = shutil.copytree(converted_adapter, tmp_path / "other")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    assert "IA3, beside the weights" in emu("info", folder).stdout


def test_an_adapter_without_peft_is_an_error(emu, converted_adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    error = emu("generate", "a text", "--model", converted_adapter, exit_code=2).stderr.splitlines()[-1]
    assert error.startswith("emu: peft: got none, expected it for the adapter in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("lm_head.weight"), "without 1 tensors (lm_head.weight)"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "with unknown 1 tensors (extra)"),
    ],
)
def test_weights_of_another_model_are_refused(emu, encoder_only, change, message):
    weights = load_file(encoder_only / "model.safetensors")
    change(weights)
    save_file(weights, encoder_only / "model.safetensors", metadata={"format": "pt"})
    result = emu("generate", "a text", "--model", encoder_only, exit_code=2)
    assert message in result.stderr.splitlines()[-1]
    assert len(result.stderr.splitlines()) <= 3


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "{}", "[1]", "{"])
@pytest.mark.parametrize("command", [("info",), ("generate", "a text", "--model")], ids=["info", "generate"])
def test_a_folder_of_another_model_is_refused(emu, encoder_only, content, command):
    (encoder_only / "config.json").write_text(content)
    error = emu(*command, encoder_only, exit_code=2).stderr.splitlines()[-1]
    assert "config.json: got" in error
    assert "mu" in error.partition("expected")[2]


@pytest.mark.parametrize("entry", [["diffusers", "NoSuchNetwork"], [None, None], None])
@pytest.mark.parametrize("component", ["unet", "vae", "scheduler"])
def test_an_unknown_class_in_the_index_is_refused(emu, tmp_path, converted_pretrain, component, entry):
    folder = shutil.copytree(converted_pretrain, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = entry
    if entry is None:
        del index[component]
    (folder / "model_index.json").write_text(json.dumps(index))
    error = emu("generate", "a text", "--mode", "image", "--model", folder, exit_code=2).stderr.splitlines()[-1]
    if component == "vae" and entry in (None, [None, None]):  # there may be none, but not for this U-Net
        assert "unet.config.in_channels: got 4 without a vae, expected 3" in error
    else:
        assert error == f"emu: {component} in model_index.json: got {entry}, expected a class of diffusers"


def test_find_model_prefers_a_folder(tmp_path):
    assert find_model(None, with_decoder=True) == EMU_TINY
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "emu"}))
    assert find_model(str(tmp_path), with_decoder=False) == tmp_path
