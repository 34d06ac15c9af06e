"""The processor: exact ids and pixels, every input form, and generated ids back to documents."""

import base64
import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_config
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, pipeline
from transformers.dynamic_module_utils import get_imports

from conversion.tokenizer import add_emu_tokens, build_tokenizer
from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.documents_emu import get_frame_indices, load_image, load_video, prepare_documents
from modeling_emu.generation_emu import EmuGenerateOutput
from modeling_emu.processing_emu import IMAGE_SYSTEM_MESSAGE, VIDEO_SYSTEM_MESSAGE, EmuProcessor


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
VARIANTS = ("pretrain", "instruct")
BOS, EOS, PAD, START, END, SLOT, USER, ASSISTANT = 1, 2, 1000, 1001, 1002, 1003, 1004, 1005
IMAGE = [START, SLOT, SLOT, SLOT, SLOT, END]
EXPANDED = "[IMG]<image><image><image><image>[/IMG]"
RED_DOG = [262, 352, 436, 935]  # "a red dog."


def make_processor(variant: str = "pretrain", **kwargs) -> EmuProcessor:
    image_processor = CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    tokenizer = build_tokenizer(GOLDENS / variant / "llama_config", variant)
    return EmuProcessor(image_processor, tokenizer, **{"num_image_tokens": 4, "variant": variant, **kwargs})


def read_golden(variant: str) -> dict:
    return json.loads((GOLDENS / variant / "golden.json").read_text(encoding="utf-8"))


def make_image(value: int = 0, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (value, 255 - value, 40))


def grey_levels(frames: list[Image.Image]) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in frames]


def write_video(path: Path, frames: list[np.ndarray], codec: str = "ffv1", pix_fmt: str = "gray", **options) -> Path:
    """A video of grey frames `(height, width)`, lossless as ffv1."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape
        stream.pix_fmt = pix_fmt
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="gray")))
        container.mux(stream.encode())
    return path


def make_frames(num_frames: int, size: int = 32) -> list[np.ndarray]:
    """Frame i is grey of level i."""
    return [np.full((size, size), level, dtype=np.uint8) for level in range(num_frames)]


MPEG4 = dict(codec="mpeg4", pix_fmt="yuv420p")


@pytest.fixture(scope="module")
def processor() -> EmuProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def instruct() -> EmuProcessor:
    return make_processor("instruct")


# Ids and pixels


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["made", "saved"])
def test_golden_ids_and_pixels(variant, form, tmp_path):
    processor = make_processor(variant)
    if form == "saved":
        processor.save_pretrained(tmp_path)
        processor = EmuProcessor.from_pretrained(tmp_path)
    for entry in read_golden(variant)["tokenization"]:
        assert processor.tokenizer(entry["text"])["input_ids"] == entry["input_ids"]
        text = entry["text"].replace(EXPANDED, "<image>")
        if EXPANDED in entry["text"] or "<image>" not in text:
            inputs = processor(text=text, images=[make_image()] * text.count("<image>"))
            assert inputs["input_ids"] == [entry["input_ids"]]

    images = [Image.open(GOLDENS / variant / f"image_{index}.png") for index in range(3)]
    assert [image.mode for image in images] == ["RGB", "RGBA", "L"]
    expected = load_file(GOLDENS / variant / "golden.safetensors")["pixel_values"]
    pixel_values = processor(text="<image>" * 3, images=images, return_tensors="pt")["pixel_values"]
    assert pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-6)


def test_a_prompt_of_every_kind(processor):
    inputs = processor(
        text=["<image>a red dog.<video>", "a red dog."],
        images=[make_image(1)],
        videos=[[make_image(2), make_image(3)]],
        num_frames=2,
        padding=True,
        return_tensors="pt",
    )
    first = [BOS, *IMAGE, *RED_DOG, *IMAGE, *IMAGE]
    second = [PAD] * 18 + [BOS, *RED_DOG]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["input_ids"].tolist() == [first, second]
    assert inputs["attention_mask"].tolist() == [[1] * 23, [0] * 18 + [1] * 5]
    assert inputs["pixel_values"].shape == (3, 3, 224, 224)


def test_a_bare_image_start_is_kept(processor):
    inputs = processor(text="a red dog.[IMG]", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[BOS, *RED_DOG, START]]
    assert "pixel_values" not in inputs


def test_images_are_in_reading_order_across_rows_and_kinds(processor):
    images, frames = [make_image(level) for level in (10, 20, 30)], [make_image(40), make_image(50)]
    text = ["<video>x<image>", "<image>y<image>"]
    got = processor(text=text, images=images, videos=[frames], num_frames=None)["pixel_values"]
    expected = processor(text="<image>" * 5, images=[*frames, *images])["pixel_values"]
    np.testing.assert_array_equal(got, expected)


def test_num_image_tokens(processor):
    one = make_processor(num_image_tokens=1)
    assert one(text="<image>", images=make_image())["input_ids"] == [[BOS, START, SLOT, END]]
    with pytest.raises(ValueError, match="num_image_tokens: got 0"):
        make_processor(num_image_tokens=0)


# Batches and padding


TEXTS = ["a red dog.", "<image>There are two dogs.<image>", "", "what is <image>it?"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_single_up_to_padding(processor, side):
    images = [make_image(level) for level in (1, 2, 3)]
    batch = processor(text=TEXTS, images=images, padding=True, padding_side=side, return_tensors="pt")
    remaining = iter(images)
    singles = [
        processor(text=text, images=list(itertools.islice(remaining, text.count("<image>"))), return_tensors="pt")
        for text in TEXTS
    ]
    for ids, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
        assert torch.equal(ids[mask.bool()], single["input_ids"][0])
        assert (ids[~mask.bool()] == PAD).all()
        assert mask.sum() == single["attention_mask"].sum()
        assert torch.equal(mask, mask.sort(descending=side == "right").values)
    pixels = torch.cat([single["pixel_values"] for single in singles if "pixel_values" in single])
    assert torch.equal(batch["pixel_values"], pixels)


def test_images_may_come_per_row(processor):
    images = [make_image(level) for level in (1, 2, 3)]
    flat = processor(text=TEXTS, images=images)
    nested = processor(text=TEXTS, images=[[], images[:2], [], images[2:]])
    assert flat["input_ids"] == nested["input_ids"]
    np.testing.assert_array_equal(flat["pixel_values"], nested["pixel_values"])


@pytest.mark.parametrize("empty", [dict(images=[]), dict(videos=[]), dict(audio=[]), dict(audios=[], images=None)])
def test_empty_media_is_no_media(processor, empty):
    assert processor(text="a red dog.", **empty)["input_ids"] == [[BOS, *RED_DOG]]


def test_images_alone_give_pixels(processor):
    images = [make_image(1), make_image(2)]
    alone = processor(images=images, return_tensors="pt")
    assert set(alone) == {"pixel_values"}
    assert torch.equal(
        alone["pixel_values"], processor(text="<image>" * 2, images=images, return_tensors="pt")["pixel_values"]
    )


def test_token_types_on_request(processor):
    inputs = processor(text="<image>a red dog.", images=make_image(), return_mm_token_type_ids=True)
    assert inputs["mm_token_type_ids"] == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]


# Marks that do not match


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(text="<image>", images=None), r"images: got 0, expected 1, one per <image> mark \(1 in row 0\)"),
        (dict(text="a", images=[make_image()]), r"images: got 1, expected 0"),
        (dict(text=["<image>", "<image>"], images=[make_image()]), r"got 1, expected 2.*1 in row 0, 1 in row 1"),
        (dict(text=["a", "<image>"], images=[[make_image()], []]), r"images of row 0: got 1, expected 0"),
        (dict(text=["<image>", "a"], images=[[make_image()]]), r"rows of images: got 1, expected 2"),
        (dict(text=["<image>", "<image>"], images=[make_image(), [make_image()]]), r"single ones and lists"),
        (dict(text="<video>"), r"videos: got 0, expected 1, one per <video> mark"),
        (dict(text="<image>", videos=[[make_image()]]), r"images: got 0, expected 1"),
        (dict(text=EXPANDED, images=[make_image()]), r"row 0: got '\[IMG\]<image>', expected one bare <image>"),
        (dict(text="[IMG] <video>", videos=[[make_image()]]), r"row 0: got '\[IMG\] <video>'"),
        (dict(text=[]), r"text: got an empty list"),
        (dict(text=[5]), r"text of row 0: got int, expected str"),
        (dict(), r"inputs: got no text"),
        (dict(videos=[[make_image()]]), r"inputs: got no text"),
        (dict(text="a", audio=[np.zeros(3)]), r"audio: got some"),
        (dict(text="a", audios=[np.zeros(3)]), r"audio: got some"),
        (dict(text="a", documents="a"), r"documents: got text, images or videos besides"),
    ],
)
def test_inputs_that_do_not_match_are_errors(processor, inputs, message):
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


# Truncation and the context


def test_truncation_cuts_text_but_no_image(processor):
    text, images = "<image>a red dog.", [make_image()]
    whole = processor(text=text, images=images, truncation=True, max_length=9)
    assert whole["input_ids"] == [[BOS, *IMAGE, *RED_DOG[:2]]]
    for max_length in range(1, 7):
        with pytest.raises(ValueError, match=r"row 0 after truncation: got .*, expected"):
            processor(text=text, images=images, truncation=True, max_length=max_length)


def test_truncation_from_the_left_keeps_the_start_of_an_image():
    processor = make_processor()
    processor.tokenizer.truncation_side = "left"
    with pytest.raises(ValueError, match=r"\[IMG\] tokens of row 0 after truncation: got 0, expected 1"):
        processor(text="<image>a red dog.", images=[make_image()], truncation=True, max_length=9)


def test_a_prompt_longer_than_the_context_is_an_error():
    processor = make_processor()
    processor.tokenizer.model_max_length = 12
    assert len(processor(text=["a red dog."] * 2, padding=True)["input_ids"]) == 2
    for kwargs in (dict(), dict(padding=True, return_tensors="pt")):
        with pytest.raises(ValueError, match="prompt of row 1: got 13 tokens, expected at most 12"):
            processor(text=["a", "a red dog." * 3], **kwargs)
    assert len(processor(text="a red dog." * 3, truncation=True)["input_ids"][0]) == 12


# Documents


def test_document_form_is_text_form(processor):
    images, frames = [make_image(1), make_image(2)], [make_image(3), make_image(4), make_image(5)]
    documents = [
        ["a red dog.", images[0], {"type": "text", "text": "what is"}, {"type": "video", "video": frames}],
        [{"type": "image", "image": images[1]}, "it?"],
        [""],
    ]
    kwargs = dict(num_frames=2, padding=True, return_tensors="pt")
    got = processor(documents=documents, **kwargs)
    text = ["a red dog.<image>what is<video>", "<image>it?", ""]
    expected = processor(text=text, images=images, videos=[frames], **kwargs)
    assert set(got) == set(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name])


def test_shorthand():
    image, frames = make_image(), [make_image(), make_image()]
    text_part, image_part = {"type": "text", "text": "a"}, {"type": "image", "image": image}
    video_part = {"type": "video", "video": frames}
    array, video = np.zeros((2, 2, 3), np.uint8), torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    for shorthand, expected in [
        ("a", [[text_part]]),
        (image, [[image_part]]),
        (image_part, [[image_part]]),
        (["a"], [[text_part]]),
        ([image, image], [[image_part, image_part]]),
        (["a", image, "a"], [[text_part, image_part, text_part]]),
        (["a", frames], [[text_part, video_part]]),
        ([["a"], ["a", image]], [[text_part], [text_part, image_part]]),
        ([["a", "a"]], [[text_part, text_part]]),
        ([["a", frames]], [[text_part, video_part]]),
        (array, [[{"type": "image", "image": array}]]),
        (["a", video], [[text_part, {"type": "video", "video": video}]]),
    ]:
        assert prepare_documents(shorthand) == expected


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["a cat", "a dog"], r"one document or 2; expected \[\[text, text\]\].*\[\[text\], \[text\]\]"),
        ([], r"documents: got an empty list"),
        ([["a"], []], r"document 1: got an empty list"),
        (5, r"part of a document: got int"),
        (b"png", r"part of a document: got bytes"),
        ({"type": "audio"}, r"type of a part: got 'audio'"),
        ({"type": "text"}, r"text part: got NoneType under 'text'"),
        ({"type": "image"}, r"image part: got keys \['type'\], expected exactly one of"),
        ({"type": "image", "image": make_image(), "path": "a.png"}, r"expected exactly one of"),
        ({"type": "image", "image_embeds": torch.zeros(4, 8)}, r"embeddings cannot be read again, only pixels"),
        (["a", []], r"video: got no frames"),
    ],
)
def test_documents_of_other_forms_are_errors(processor, documents, message):
    with pytest.raises(ValueError, match=message):
        processor(documents=documents)


@pytest.mark.parametrize("token", ["<image>", "[IMG]", "[/IMG]", "</s>", "<s>", "[PAD]", "<video>", "[USER]"])
def test_special_tokens_in_a_text_part_are_refused(instruct, token):
    with pytest.raises(ValueError, match="expected plain text"):
        instruct(documents=[f"before {token} after", make_image()])
    with pytest.raises(ValueError, match="expected plain text"):
        instruct(documents=["before " + token[:2], token[2:], make_image()])
    for content in (f"before {token}", [{"type": "text", "text": token}]):
        with pytest.raises(ValueError, match="expected plain text"):
            instruct.apply_chat_template([{"role": "user", "content": content}])


def test_only_special_tokens_are_refused(processor):
    assert processor(documents="a < b [USER] <b>")["input_ids"] == processor(text="a < b [USER] <b>")["input_ids"]


# Images


def pixels_of(source) -> list:
    return np.asarray(load_image(source)).reshape(-1, 3).tolist()


def test_conversion_to_rgb_is_pils():
    rgba = Image.new("RGBA", (2, 1), (200, 10, 30, 0))
    assert pixels_of(rgba) == [[200, 10, 30]] * 2, "alpha is dropped, not blended"
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert pixels_of(palette) == [[9, 8, 7]]
    generator = np.random.default_rng(0)
    rgb = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "RGBX"):
        image = rgb.convert(mode)
        assert load_image(image).tobytes() == image.convert("RGB").tobytes()


def test_more_than_8_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]])
    expected = [[level] * 3 for level in (0, 1, 128, 255)]
    for array in (values.astype(np.uint16), values.astype(np.int32), values.astype(np.float32)):
        image = Image.fromarray(array)
        assert image.mode in ("I;16", "I", "F")
        assert pixels_of(image) == expected
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    assert pixels_of(tmp_path / "deep.png") == expected
    assert pixels_of(Image.fromarray(np.array([[3, 200]], np.int32))) == [[3] * 3, [200] * 3]
    assert pixels_of(Image.fromarray(np.array([[3, 200]], np.uint16))) == [[0] * 3, [1] * 3]


@pytest.mark.parametrize("value", [-1.0, 70000.0, float("nan"), float("inf")])
def test_values_without_an_8_bit_meaning_are_an_error(value):
    with pytest.raises(ValueError, match="values of a 'F' image"):
        load_image(Image.fromarray(np.array([[0.0, value]], np.float32)))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 500)])
def test_an_image_of_few_pixels(processor, size):
    pixel_values = processor(images=make_image(9, size), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 224, 224)
    flat = processor(images=make_image(9, (224, 224)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, flat, rtol=0, atol=1e-6)


def test_exif_rotation_is_applied_to_files_only(tmp_path):
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 0), (0, 0, 255)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    data_url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), path.read_bytes(), data_url):
        assert load_image(source).size == (1, 2)
    with Image.open(path) as opened:
        assert load_image(opened).size == (2, 1)


def test_a_data_url_gives_what_its_bytes_give():
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)).save(buffer, format="PNG")
    data_url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert load_image(data_url).tobytes() == load_image(buffer.getvalue()).tobytes() == bytes([128] * 12)


def test_arrays_are_images():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for source in (array, torch.from_numpy(array), array[:, ::-1][:, ::-1]):
        assert np.array_equal(np.asarray(load_image(source)), array)
    for wrong in (array.astype(np.float32), array[..., :2], array[0], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="image array: got"):
            load_image(wrong)


def png(width: int, height: int) -> bytes:
    """A PNG that only claims a size."""
    header = struct.pack(">II", width, height) + b"\x08\x02\x00\x00\x00"
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header))


def test_broken_images_are_errors_that_name_the_file(tmp_path, processor):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    contents = {
        "empty.png": b"",
        "text.png": b"this is no image",
        "cut.png": buffer.getvalue()[:1000],
        "bomb.png": png(60000, 60000),
        "zero.png": png(0, 5),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"image .*{name}: got .*, expected a readable image"):
            processor(text="<image>", images=[tmp_path / name])
        with pytest.raises(ValueError, match=f"image of {len(content)} bytes: got"):
            load_image(content)
    for missing in (tmp_path / "missing.png", str(tmp_path)):
        with pytest.raises(ValueError, match=f"image {missing}"):
            load_image(missing)
    with pytest.raises(ValueError, match="expected at least one pixel"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match="image: got int"):
        load_image(5)


def test_other_back_ends_give_way_to_pils(processor):
    class OtherBackend(CLIPImageProcessorPil):
        backend = "torchvision"

    other = OtherBackend(size={"height": 98, "width": 98}, do_center_crop=False)
    made = EmuProcessor(other, processor.tokenizer, num_image_tokens=4)
    assert type(made.image_processor) is CLIPImageProcessorPil
    assert made(images=make_image(), return_tensors="pt")["pixel_values"].shape == (1, 3, 98, 98)


# Video


def test_frames_by_the_published_rule():
    assert get_frame_indices(8) == [0, 1, 2, 3, 4, 4, 5, 6]
    assert get_frame_indices(17) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert get_frame_indices(100) == [6, 18, 31, 43, 56, 68, 80, 93]
    assert get_frame_indices(1) == [0] * 8
    assert get_frame_indices(3) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert get_frame_indices(100, 1) == [49]
    assert get_frame_indices(3, None) == [0, 1, 2]
    for total, wanted in itertools.product(range(1, 200), range(1, 20)):
        indices = get_frame_indices(total, wanted)
        assert len(indices) == wanted
        assert indices == sorted(indices)
        assert 0 <= indices[0] <= indices[-1] < total
    with pytest.raises(ValueError, match="num_frames: got 0"):
        get_frame_indices(5, 0)


@pytest.mark.parametrize("num_source_frames", [1, 3, 8, 50])
@pytest.mark.parametrize("num_frames", [None, 1, 8])
def test_every_form_of_a_video_gives_the_same_frames(tmp_path, num_source_frames, num_frames):
    path = write_video(tmp_path / "video.mkv", make_frames(num_source_frames))
    array = np.stack([np.full((32, 32, 3), level, np.uint8) for level in range(num_source_frames)])
    frames = [Image.fromarray(frame) for frame in array]
    expected = get_frame_indices(num_source_frames, num_frames)
    for source in (path, str(path), path.read_bytes(), frames, tuple(frames), array, torch.from_numpy(array)):
        got = load_video(source, num_frames)
        assert grey_levels(got) == expected
        assert all(frame.mode == "RGB" and frame.size == (32, 32) for frame in got)


def test_a_video_in_a_prompt(processor, tmp_path):
    path = write_video(tmp_path / "video.mkv", make_frames(20))
    inputs = processor(text="a red dog.<video>", videos=[path], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[BOS, *RED_DOG, *IMAGE * 8]]
    assert inputs["pixel_values"].shape == (8, 3, 224, 224)
    document = processor(documents=["a red dog.", {"type": "video", "path": path}], return_tensors="pt")
    assert torch.equal(document["pixel_values"], inputs["pixel_values"])
    assert processor(text="<video>", videos=path, num_frames=3)["input_ids"] == [[BOS, *IMAGE * 3]]


def test_videos_are_told_from_frames(processor):
    one, two = [make_image(1)], [make_image(2), make_image(3)]
    text = ["<video>", "<video><video>"]
    flat = processor(text=text, videos=[one, two, one], num_frames=None)
    nested = processor(text=text, videos=[[one], [two, one]], num_frames=None)
    single = processor(text="<video>", videos=two, num_frames=None)
    assert flat["input_ids"] == nested["input_ids"] == [[BOS, *IMAGE], [BOS, *IMAGE * 3]]
    assert single["input_ids"] == [[BOS, *IMAGE * 2]]
    array = np.zeros((2, 4, 4, 3), np.uint8)
    assert processor(text="<video>", videos=array, num_frames=None)["input_ids"] == single["input_ids"]


def test_a_video_that_is_stored_turned(tmp_path):
    half_dark = np.repeat([[0] * 32 + [255] * 32], 64, axis=0).astype(np.uint8)
    content = bytearray(write_video(tmp_path / "video.mp4", [half_dark], **MPEG4).read_bytes())
    [shown] = load_video(bytes(content), 1)
    assert (shown.getpixel((5, 30))[0] < 50, shown.getpixel((58, 30))[0] > 200) == (True, True)

    matrix = content.index(b"tkhd") + 4 + 40
    assert content[matrix : matrix + 4] == b"\x00\x01\x00\x00"
    quarter_turn = (0, 0x10000, 0, -0x10000, 0, 0, 64 << 16, 0, 0x40000000)  # clockwise, as phones write it
    content[matrix : matrix + 36] = struct.pack(">9i", *quarter_turn)
    [turned] = load_video(bytes(content), 1)
    assert turned.tobytes() == shown.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path):
    content = bytearray(write_video(tmp_path / "video.mp4", make_frames(30), **MPEG4).read_bytes())
    whole = load_video(bytes(content), None)
    assert len(whole) == 30
    entry = content.index(b"elst") + 4 + 12
    content[entry : entry + 4] = struct.pack(">i", 12 * 1024)  # shown from frame 12 on, of 1024 ticks each
    for num_frames in (None, 8, 1):
        expected = [whole[12 + index].tobytes() for index in get_frame_indices(18, num_frames)]
        assert [frame.tobytes() for frame in load_video(bytes(content), num_frames)] == expected


def test_packets_that_show_no_frame_do_not_count(tmp_path):
    av = pytest.importorskip("av")
    frames = [np.full((32, 32), 8 * level, dtype=np.uint8) for level in range(20)]
    whole = load_video(write_video(tmp_path / "whole.webm", frames, codec="libvpx", pix_fmt="yuv420p"), None)
    hidden = {5, 6, 11}
    with av.open(str(tmp_path / "whole.webm")) as source, av.open(str(tmp_path / "hidden.webm"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            if index in hidden:
                content[0] &= ~0x10  # VP8's show_frame
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)
    shown = [frame.tobytes() for index, frame in enumerate(whole) if index not in hidden]
    for num_frames in (None, 8, 1):
        expected = [shown[index] for index in get_frame_indices(17, num_frames)]
        assert [frame.tobytes() for frame in load_video(tmp_path / "hidden.webm", num_frames)] == expected


def test_a_video_that_was_cut_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64), dtype=np.uint8)
    content = write_video(tmp_path / "video.mp4", list(noise), movflags="faststart", **MPEG4).read_bytes()
    assert len(load_video(content, None)) == 30
    for length in (len(content) // 2, len(content) - 100):
        with pytest.raises(ValueError, match=f"video of {length} bytes: got a file that ends in the middle"):
            load_video(content[:length])


def test_broken_videos_are_errors(tmp_path, processor):
    av = pytest.importorskip("av")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"this is no video" * 100)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    for name in ("empty.mp4", "text.mp4", "missing.mp4"):
        with pytest.raises(ValueError, match=f"video .*{name}: got .*, expected a readable video"):
            processor(text="<video>", videos=[str(tmp_path / name)])
    with pytest.raises(ValueError, match=r"sound\.wav: got no frames, expected at least one"):
        load_video(sound)
    with pytest.raises(ValueError, match="video: got no frames"):
        load_video(np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="video array: got shape"):
        load_video(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="video: got float"):
        load_video(5.0)


def test_only_the_wanted_frames_of_a_video_are_kept(tmp_path):
    path = write_video(tmp_path / "video.mkv", make_frames(200, 512))
    script = (
        "import resource, sys; from modeling_emu.documents_emu import load_video;"
        "load_video(sys.argv[1], 1);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; load_video(sys.argv[1], 8);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    growth = int(run.stdout) * 1024
    assert growth < 50 * 512 * 512 * 3, "200 frames would be kept"


def test_without_pyav_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"modeling-emu\[video\]"):
        load_video(tmp_path / "video.mp4")
    assert len(load_video([make_image()])) == 8


def test_the_hub_asks_for_no_optional_package():
    path = Path(sys.modules[EmuProcessor.__module__].__file__)
    assert {"av"}.isdisjoint(get_imports(path))


# Chat


def user(*parts) -> dict:
    return {"role": "user", "content": list(itertools.chain.from_iterable(prepare_documents(list(parts))))}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_golden_prompts_through_the_chat_template(instruct):
    entries = {entry["text"]: entry["input_ids"] for entry in read_golden("instruct")["tokenization"]}
    question = [user(make_image(), "what is the man doing?")]
    prompt = f"{IMAGE_SYSTEM_MESSAGE} [USER]: {EXPANDED}what is the man doing? [ASSISTANT]:"
    kwargs = dict(tokenize=True, return_dict=True, return_tensors="pt")
    inputs = instruct.apply_chat_template(question, add_generation_prompt=True, **kwargs)
    assert inputs["input_ids"].tolist() == [entries[prompt]]
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)

    request = "Please provide an accurate and concise description of the given image."
    begun = "The image depicts a photo of"
    messages = [user(make_image(), request), assistant(begun)]
    prompt = f"{IMAGE_SYSTEM_MESSAGE} [USER]: {EXPANDED}{request} [ASSISTANT]: {begun}"
    inputs = instruct.apply_chat_template(messages, continue_final_message=True, **kwargs)
    assert inputs["input_ids"].tolist() == [entries[prompt]]

    inputs = instruct.apply_chat_template([user("你好 🙂")], add_generation_prompt=True, **kwargs)
    assert inputs["input_ids"].tolist() == [entries["[USER]: 你好 🙂 [ASSISTANT]:"]]


def test_system_messages_are_chosen_by_content(instruct):
    image, video = make_image(), {"type": "video", "video": [make_image()]}
    system = {"role": "system", "content": "Answer briefly."}
    for messages, expected in [
        ([user("hi")], "[USER]: hi [ASSISTANT]:"),
        ([{"role": "user", "content": "hi"}], "[USER]: hi [ASSISTANT]:"),
        ([user(image, "hi")], f"{IMAGE_SYSTEM_MESSAGE} [USER]: <image>hi [ASSISTANT]:"),
        ([user(video, "hi")], f"{VIDEO_SYSTEM_MESSAGE} [USER]: <video>hi [ASSISTANT]:"),
        ([user(image, "a", image, "b")], "[USER]: <image>a<image>b [ASSISTANT]:"),
        ([user(image, "a", video)], "[USER]: <image>a<video> [ASSISTANT]:"),
        ([system, user(image, "hi")], "Answer briefly. [USER]: <image>hi [ASSISTANT]:"),
        (
            [{"role": "system", "content": [{"type": "text", "text": IMAGE_SYSTEM_MESSAGE}]}, user("hi")],
            f"{IMAGE_SYSTEM_MESSAGE} [USER]: hi [ASSISTANT]:",
        ),
    ]:
        assert instruct.apply_chat_template(messages, add_generation_prompt=True) == expected


def test_several_turns(instruct):
    dialog = [user(make_image()), user("is it red?"), assistant("yes."), user("why?")]
    expected = f"{IMAGE_SYSTEM_MESSAGE} [USER]: <image></s> [USER]: is it red? [ASSISTANT]: yes.</s> [USER]: why? [ASSISTANT]:"
    assert instruct.apply_chat_template(dialog, add_generation_prompt=True) == expected
    answered = [*dialog, assistant("it is paint.")]
    assert instruct.apply_chat_template(answered) == f"{expected} it is paint.</s>"


def test_the_base_template_joins_contents(processor):
    messages = [user("a ", make_image(), "red"), assistant(" dog"), user(make_image())]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == "a <image>red dog<image>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "role of a message: got 'tool'"),
        ([user("hi"), {"role": "system", "content": "late"}], "role of a message: got 'system'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type of a part: got 'audio'"),
    ],
)
def test_messages_of_other_forms_are_errors(instruct, messages, message):
    with pytest.raises(Exception, match=message):
        instruct.apply_chat_template(messages)


def test_a_batch_of_chats(instruct):
    chats = [[user("hi")], [user(make_image(3), "what?")], [user([make_image(1), make_image(2)], "what?")]]
    kwargs = dict(tokenize=True, return_dict=True, add_generation_prompt=True)
    processor_kwargs = dict(padding=True, num_frames=2)
    batch = instruct.apply_chat_template(chats, return_tensors="pt", processor_kwargs=processor_kwargs, **kwargs)
    assert batch["pixel_values"].shape[0] == 3
    for ids, mask, chat in zip(batch["input_ids"], batch["attention_mask"], chats, strict=True):
        single = instruct.apply_chat_template(chat, processor_kwargs=dict(num_frames=2), **kwargs)
        assert ids[mask.bool()].tolist() == single["input_ids"][0]


def test_the_mask_of_the_answers_is_theirs(instruct):
    messages = [user([make_image()] * 3, "a red dog."), assistant("a red dog."), user("why?"), assistant("a")]
    inputs = instruct.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    [ids], [mask] = inputs["input_ids"], inputs["assistant_masks"]
    answers = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    assert answers == [*RED_DOG, EOS, RED_DOG[0], EOS]


def test_a_template_of_ones_own(tmp_path):
    template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    processor = make_processor(chat_template=template)
    processor.save_pretrained(tmp_path)
    for each in (processor, EmuProcessor.from_pretrained(tmp_path)):
        assert each.apply_chat_template([{"role": "user", "content": "a"}]) == "a|"


# Outputs


def make_output(rows: list[list[int]], num_images: list[int]) -> EmuGenerateOutput:
    owners = [row for row, count in enumerate(num_images) for _ in range(count)]
    return EmuGenerateOutput(
        sequences=torch.tensor(rows),
        image_embeds=torch.arange(len(owners) * 4 * 2, dtype=torch.float32).reshape(-1, 4, 2),
        image_rows=torch.tensor(owners, dtype=torch.long),
    )


def test_generated_documents(processor):
    prompt = [[PAD, BOS, *IMAGE], [BOS, *RED_DOG, *RED_DOG[:3]]]
    new = [[*RED_DOG, *IMAGE, *RED_DOG[:2], *IMAGE, EOS], [*IMAGE, *RED_DOG, EOS, *[PAD] * 8]]
    output = make_output([a + b for a, b in zip(prompt, new, strict=True)], [2, 1])
    first, second = processor.decode_documents(output, prompt_length=8)
    assert [part["type"] for part in first] == ["text", "image", "text", "image"]
    assert [first[0]["text"], first[2]["text"]] == ["a red dog.", "a red"]
    assert torch.equal(first[1]["image_embeds"], output.image_embeds[0])
    assert torch.equal(first[3]["image_embeds"], output.image_embeds[1])
    assert [part["type"] for part in second] == ["image", "text"]
    assert torch.equal(second[0]["image_embeds"], output.image_embeds[2])


def test_generated_text_alone(processor):
    sequences = torch.tensor([[BOS, *RED_DOG, *RED_DOG, EOS], [BOS, *RED_DOG, EOS, PAD, PAD, PAD, PAD]])
    assert processor.decode_documents(sequences, prompt_length=5) == [[{"type": "text", "text": "a red dog."}], []]
    assert processor.batch_decode(sequences[:, 5:], skip_special_tokens=True) == ["a red dog.", ""]
    assert processor.post_process_image_text_to_text(sequences[:, 5:]) == ["a red dog.", ""]


def test_an_image_cut_short_is_left_out(processor):
    output = make_output([[BOS, *RED_DOG, START, SLOT, SLOT]], [0])
    with pytest.warns(UserWarning, match="an image of 2 slots out of 4 was cut short"):
        documents = processor.decode_documents(output, prompt_length=1)
    assert documents == [[{"type": "text", "text": "a red dog."}]]


@pytest.mark.parametrize(("rows", "num_images"), [([[BOS, *IMAGE]], [0]), ([[BOS, *RED_DOG]], [1])])
def test_embeddings_that_do_not_match_are_an_error(processor, rows, num_images):
    with pytest.raises(ValueError, match="generated images of row 0"):
        processor.decode_documents(make_output(rows, num_images), prompt_length=1)


def test_generated_text_can_be_read_again(processor):
    inputs = processor(documents=["a red dog.", make_image(), "what is it?"], return_tensors="pt")
    output = EmuGenerateOutput(
        sequences=inputs["input_ids"], image_embeds=torch.zeros(1, 4, 2), image_rows=torch.zeros(1, dtype=torch.long)
    )
    [document] = processor.decode_documents(output, prompt_length=1)
    document[1] = {"type": "image", "image": make_image()}
    again = processor(documents=[document], return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])


def test_candidates_are_encoded_without_a_start(processor):
    assert processor.encode_candidates(["a red dog.", "a"]) == [RED_DOG, RED_DOG[:1]]
    for wrong in ("", 5):
        with pytest.raises(ValueError, match="candidate 1: got"):
            processor.encode_candidates(["a", wrong])


def test_servers_learn_the_slots_per_image(processor):
    assert processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [5, 5]]).num_image_tokens == [4, 4]


# Saving and other libraries


def test_saving_keeps_everything(instruct, tmp_path):
    instruct.save_pretrained(tmp_path / "first")
    again = EmuProcessor.from_pretrained(tmp_path / "first")
    assert (again.variant, again.num_image_tokens) == ("instruct", 4)
    again.save_pretrained(tmp_path / "second")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "processing_emu.py"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_loading_by_its_own_class_asks_for_no_trust(instruct, tmp_path, monkeypatch):
    instruct.save_pretrained(tmp_path)
    config = make_config()
    config.auto_map = {"AutoConfig": "configuration_emu.EmuConfig"}
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for trust"))
    assert EmuProcessor.from_pretrained(tmp_path)(text="a red dog.")["input_ids"] == [[BOS, *RED_DOG]]


def test_the_calls_of_lmms_eval(instruct):
    messages = [[user(make_image(), "what?")], [user("why?")]]
    prompts = instruct.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    got = instruct(text=prompts, images=[make_image()], videos=[], audios=[], padding=True, return_tensors="pt")
    kwargs = dict(tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=dict(padding=True))
    expected = instruct.apply_chat_template(messages, add_generation_prompt=True, **kwargs)
    assert set(got) == set(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name])


def test_auto_classes_in_a_fresh_interpreter(instruct, tmp_path):
    """The interpreter cannot import this package: the saved code is all it has."""
    folder = tmp_path / "emu"
    instruct.save_pretrained(folder)
    config = make_config()
    config.auto_map = {"AutoConfig": "configuration_emu.EmuConfig"}
    config.save_pretrained(folder)
    script = f"""
import json, sys
sys.modules["modeling_emu"] = None  # an import of it fails, also where the package is installed
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
image = Image.new("RGB", (6, 4), (9, 246, 40))
messages = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": "what?"}}]}}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
same = (image_processor(image)["pixel_values"][0] == inputs["pixel_values"][0]).all()
print(json.dumps([inputs["input_ids"][0], tokenizer("[USER]: a</s>")["input_ids"], bool(same), processor.variant]))
"""
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kwargs = dict(tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = instruct.apply_chat_template([user(make_image(9), "what?")], **kwargs)["input_ids"][0]
    ids = instruct.tokenizer("[USER]: a</s>")["input_ids"]
    assert json.loads(run.stdout.splitlines()[-1]) == [expected, ids, True, "instruct"]


def test_a_tokenizer_without_emus_tokens_is_an_error(processor):
    tokenizer = build_tokenizer(GOLDENS / "pretrain/llama_config")
    bare = type(tokenizer)(tokenizer_object=tokenizer._tokenizer.from_str(json.dumps(strip_emu_tokens(tokenizer))))
    with pytest.raises(ValueError, match=r"tokenizer: got none of \['<image>', '\[IMG\]', '\[/IMG\]'\]"):
        EmuProcessor(processor.image_processor, bare)
    add_emu_tokens(bare)
    made = EmuProcessor(processor.image_processor, bare, num_image_tokens=4)
    ids = made(text="<image>a red dog.", images=[make_image()])["input_ids"]
    assert ids == [[BOS, *IMAGE, *RED_DOG]]


def strip_emu_tokens(tokenizer) -> dict:
    backend = json.loads(tokenizer._tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < 1000]
    return backend


def test_the_pipeline_of_transformers(instruct):
    torch.manual_seed(0)
    settings = make_config(text_config={"vocab_size": 1006, "max_position_embeddings": 2048}).to_dict()
    settings |= dict(image_token_id=SLOT, image_start_token_id=START, image_end_token_id=END)
    settings["causal_former_config"]["num_image_tokens"] = 4
    settings["vision_config"]["image_size"] = 224
    model = EmuForMultimodalGeneration(EmuConfig(**settings)).eval()
    model.generation_config.pad_token_id = PAD
    pipe = pipeline("image-text-to-text", model=model, processor=instruct)
    image, text = make_image(), "what is it?"

    [chat] = pipe(
        text=[user(image, text)], max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False}
    )
    kwargs = dict(tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")
    inputs = instruct.apply_chat_template([user(image, text)], **kwargs)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert chat["generated_text"].strip() == instruct.decode(ids[0], skip_special_tokens=True).strip()

    texts = ["<image>what", "<image>a red dog."]
    outputs = pipe(images=[image, image], text=texts, max_new_tokens=3)
    assert [output["input_text"] for output in outputs] == texts
