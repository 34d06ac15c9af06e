"""Every kind of source, read from files in its real layout that the test writes; what is broken is named and counted."""

import base64
import csv
import gzip
import io
import itertools
import json
import logging
import random
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_processing_emu import make_processor

from modeling_emu.data import KINDS, EmuMixture, EmuSampleEncoder, EmuSource, Sample
from modeling_emu.data.source import BrokenSourceError, SourceStream


def make_png(level: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "png")
    return buffer.getvalue()


def make_video(num_frames: int) -> bytes:
    """A lossless video whose frame i is grey of level i."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "gray"
        for level in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32), level, dtype=np.uint8), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_json_lines(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read_all(
    kind: str, files, seed: int = 0, encoder=None, max_broken_fraction: float = 0.0, **kwargs
) -> list[Sample]:
    source = EmuSource(kind, str(files), max_broken_fraction=max_broken_fraction, **kwargs)
    return list(SourceStream(source, seed, repeat=False, encoder=encoder))


def describe(sample: Sample) -> list:
    """A document as plain values: texts, and the grey levels of images and frames."""
    described = []
    for part in sample.document:
        if part["type"] == "text":
            described.append(part["text"])
        elif part["type"] == "image":
            described.append(part["image"].getpixel((0, 0))[0])
        else:
            described.append([frame.getpixel((0, 0))[0] for frame in part["video"]])
    return described


def sort_parts(sample: Sample) -> list:
    """A pair with its media first."""
    return sorted(describe(sample), key=lambda part: isinstance(part, str))


@pytest.fixture(scope="module")
def measuring_encoder() -> EmuSampleEncoder:
    """Measures stretches, and leaves samples as they are."""

    class Measuring(EmuSampleEncoder):
        def __call__(self, sample):
            return [sample]

    return Measuring(make_processor())


# Pairs


def write_img2dataset(folder: Path, num_shards: int = 1, num_rows: int = 3) -> Path:
    for shard in range(num_shards):
        members = {}
        for row in range(num_rows):
            key = f"{shard:05d}{row:04d}"
            caption = f"caption {shard} {row}"
            members[f"{key}.jpg"] = make_png(10 * shard + row)  # the ending says little: PIL looks at the bytes
            members[f"{key}.txt"] = caption
            members[f"{key}.json"] = json.dumps({"caption": caption, "key": key, "status": "success"})
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def test_img2dataset_tars(tmp_path):
    samples = read_all("image_text", f"{write_img2dataset(tmp_path, 2)}/*.tar")
    assert sorted(map(sort_parts, samples)) == [[10 * s + r, f"caption {s} {r}"] for s in range(2) for r in range(3)]
    assert {sample.key for sample in samples} == {
        f"{tmp_path}/{s:05d}.tar:{s:05d}{r:04d}" for s in range(2) for r in range(3)
    }
    assert all(sample.answers is None for sample in samples)


def test_a_caption_only_in_the_json_of_a_tar(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": make_png(1), "a.json": json.dumps({"caption": " a dog "})})
    [sample] = read_all("image_text", tmp_path / "0.tar")
    assert sort_parts(sample) == [1, "a dog"]


def test_an_image_stands_before_or_after_its_text_at_random(tmp_path):
    samples = read_all("image_text", write_img2dataset(tmp_path, 1, 200) / "00000.tar")
    num_before = sum(sample.document[0]["type"] == "image" for sample in samples)
    assert 70 < num_before < 130


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_with_image_bytes(tmp_path, as_struct):
    images = [{"bytes": make_png(i), "path": None} if as_struct else make_png(i) for i in range(70)]
    pq.write_table(pa.table({"image": images, "caption": [f"text {i}" for i in range(70)]}), tmp_path / "0.parquet")
    samples = read_all("image_text", tmp_path / "0.parquet")
    assert [sort_parts(sample) for sample in samples] == [[i, f"text {i}"] for i in range(70)]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_imagefolder(tmp_path, ending):
    rows = [{"file_name": f"train/{i}.png", "text": f"text, {i}"} for i in range(3)]
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.png").write_bytes(make_png(i))
    if ending == "csv":
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "jsonl":
        write_json_lines(tmp_path / "metadata.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    assert [sort_parts(sample) for sample in read_all("image_text", tmp_path)] == [[i, f"text, {i}"] for i in range(3)]


def test_video2dataset_tars(tmp_path):
    members = {}
    for i, num_frames in enumerate((3, 40)):
        members |= {f"{i}.mp4": make_video(num_frames), f"{i}.txt": f"clip {i}", f"{i}.json": "{}"}
    path = write_tar(tmp_path / "00000.tar", members)
    short, long = (sort_parts(sample) for sample in read_all("video_text", path))
    assert (short[1], long[1]) == ("clip 0", "clip 1")
    for frames, num_frames in ((short[0], 3), (long[0], 40)):
        assert len(frames) == 8
        assert frames == sorted(frames)
        assert set(frames) <= set(range(num_frames))
    assert len(set(long[0])) == 8
    assert sort_parts(read_all("video_text", path)[1]) == long
    assert sort_parts(read_all("video_text", path, seed=1)[1]) != long


# Interleaved


def make_page(num_sentences: int, images: dict[int, list[tuple[int, float]]], form: str, folder: Path, name: str):
    """A page of MMC4; `images` gives per sentence the grey level and the similarity of each."""
    infos = []
    for index, entries in images.items():
        for level, similarity in entries:
            info = {"matched_text_index": index, "matched_sim": similarity, "raw_url": "https://example.org/a.png"}
            if form == "base64":
                info["image_base64"] = base64.b64encode(make_png(level)).decode()
            else:
                info["image_name"] = f"{name}_{level}.png"
                if form == "folder":
                    (folder / info["image_name"]).write_bytes(make_png(level))
            infos.append(info)
    return {"text_list": [f"sentence {i}." for i in range(num_sentences)], "image_info": infos, "url": "https://a.b"}


@pytest.mark.parametrize("form", ["base64", "folder", "tar"])
def test_mmc4_json_lines(tmp_path, form, measuring_encoder):
    media = tmp_path / "images"
    media.mkdir()
    images = {1: [(10, 0.32), (11, 0.5)], 2: [(20, 0.319)], 4: [(40, 0.9)]}
    page = make_page(6, images, form, media, "page")
    if form == "tar":
        write_tar(media / "shard_0.tar", {f"page_{level}.png": make_png(level) for level in (10, 11, 20, 40)})
    page["image_info"].append({"matched_text_index": 3, "matched_sim": 0.9, "image_name": "never_downloaded.png"})
    path = write_json_lines(tmp_path / "shard_0.jsonl", [page] * 20)
    samples = read_all("mmc4", path, encoder=measuring_encoder, media=str(media))
    assert len(samples) == 20
    seen = set()
    for sample in samples:
        levels = tuple(part for part in describe(sample) if isinstance(part, int))
        texts = tuple(part.strip() for part in describe(sample) if isinstance(part, str))
        seen.add((levels if len(levels) < 3 else tuple(sorted(levels)), texts))
    all_images, rest = (10, 11, 40), tuple(f"sentence {i}." for i in range(6))
    assert (
        seen
        == {
            (all_images, rest[1:]),  # a long stretch begins at a random sentence with an image
            ((40,), rest[4:]),
            (all_images, (rest[1], rest[4])),  # a short one is the images with their sentences
        }
    )
    for sample in samples:
        parts = describe(sample)
        for level, index in ((10, 1), (11, 1), (40, 4)):
            if level in parts:
                between = parts[min(parts.index(level), parts.index(f"sentence {index}. ")) :]
                between = between[: abs(parts.index(level) - parts.index(f"sentence {index}. "))]
                assert set(between) <= {10, 11, level, f"sentence {index}. "}


def test_mmc4_stretches_keep_their_lengths(tmp_path, measuring_encoder):
    page = make_page(400, {i: [(i % 200, 0.5)] for i in range(0, 400, 2)}, "base64", tmp_path, "")
    samples = read_all("mmc4", write_json_lines(tmp_path / "0.jsonl", [page] * 8), encoder=measuring_encoder)
    lengths = [measuring_encoder.count_tokens(sample) for sample in samples]
    kinds = set()
    for sample, length in zip(samples, lengths, strict=True):
        num_images = sum(part["type"] == "image" for part in sample.document)
        num_texts = len(sample.document) - num_images
        assert num_images == 5 or length > 900
        kinds.add(num_texts == num_images)
        assert length <= (512 if num_texts == num_images else 1024)
    assert kinds == {True, False}


@pytest.mark.parametrize("suffix", [".gz", ".zip"])
def test_compressed_json_lines(tmp_path, suffix, measuring_encoder):
    page = json.dumps(make_page(2, {0: [(7, 0.5)]}, "base64", tmp_path, "")).encode()
    path = tmp_path / f"docs_shard_0.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(page))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("docs_shard_0.jsonl", page)
    [sample] = read_all("mmc4", path, encoder=measuring_encoder)
    assert 7 in describe(sample)


def test_mmc4_without_an_encoder_says_what_it_needs(tmp_path):
    path = write_json_lines(tmp_path / "0.jsonl", [make_page(2, {0: [(7, 0.5)]}, "base64", tmp_path, "")])
    with pytest.raises(ValueError, match="source mmc4: got no encoder, expected one"):
        EmuMixture([EmuSource("mmc4", str(path))])


def test_obelics_parquet(tmp_path):
    (tmp_path / "b.png").write_bytes(make_png(2))
    rows = {
        "texts": [[None, "first", None], ["only text"], [None, "named"]],
        "images": [[make_png(1), None, make_png(9)], [None], [b"", None]],
    }
    pq.write_table(pa.table(rows), tmp_path / "0.parquet")
    named = {"texts": [[None, "named"]], "images": [["b.png", None]]}
    pq.write_table(pa.table(named), tmp_path / "1.parquet")
    samples = read_all("obelics", tmp_path / "*.parquet", max_broken_fraction=0.25)
    assert sorted(map(describe, samples), key=str) == [["only text"], [1, "first", 9], [2, "named"]]


def test_storyboard_tars(tmp_path):
    members = {"vid.0.txt": "", "vid.0.png": make_png(0), "vid.1.txt": "hello there", "vid.1.png": make_png(1)}
    members |= {"vid.2.txt": "the end", "vid.final_meta.json": "{}"}
    [sample] = read_all("storyboard", write_tar(tmp_path / "0000000.tar", members))
    assert describe(sample) == [0, "hello there", 1, "the end"]


# Instructions


def test_llava_json(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.png").write_bytes(make_png(1))
    (tmp_path / "coco" / "2.png").write_bytes(make_png(2))
    one = {
        "id": "1",
        "image": "coco/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Which?"},
            {"from": "gpt", "value": "A red one."},
        ],
    }
    two = {
        "id": "2",
        "image": ["coco/1.png", "coco/2.png"],
        "conversations": [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No."}],
    }
    (tmp_path / "llava.json").write_text(json.dumps([one, two], indent=1))
    first, second = read_all("instruction", tmp_path / "llava.json")
    assert (describe(first), first.answers) == ([1, "What is it?", "A dog.", "Which?", "A red one."], (2, 4))
    assert (describe(second), second.answers) == (["Is", 1, "like", 2, "?", "No."], (5,))


def test_sharegpt_and_alpaca_json(tmp_path):
    chat = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "bye"},
    ]
    alpaca = {"instruction": "Translate.", "input": "chien", "output": "dog"}
    bare = {"instruction": "Say yes.", "input": "", "output": "yes"}
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", "conversations": chat}, alpaca, bare]))
    first, second, third = read_all("instruction", tmp_path / "a.json")
    assert (describe(first), first.answers, first.system) == (["hi", "hello", "bye"], (1,), "Be brief.")
    assert (describe(second), second.answers) == (["Translate.\nchien", "dog"], (1,))
    assert describe(third) == ["Say yes.", "yes"]


def test_conversations_in_parquet_have_every_column(tmp_path):
    talk = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a dog"}]
    rows = [
        {"conversations": talk, "image": {"bytes": make_png(1), "path": "1.png"}, "instruction": None, "output": None},
        {"conversations": None, "image": None, "instruction": "Say yes.", "output": "yes"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    samples = read_all("instruction", tmp_path / "0.parquet")
    assert [describe(sample) for sample in samples] == [[1, "what?", "a dog"], ["Say yes.", "yes"]]


def test_video_chats_json(tmp_path):
    (tmp_path / "v_1.mkv").write_bytes(make_video(20))
    videochat = {"video": "v_1.mkv", "QA": [{"i": "Look.", "q": "who?", "a": "a man"}, {"q": "why?", "a": "fun"}]}
    video_chatgpt = {"q": "what?", "a": "a game", "video_id": "v_1"}
    (tmp_path / "a.json").write_text(json.dumps([videochat, video_chatgpt]))
    first, second = read_all("instruction", tmp_path / "a.json")
    frames = [1, 3, 6, 8, 11, 13, 15, 18]  # the frames of inference, segment 19 / 8
    assert (describe(first), first.answers) == ([frames, "Look.\nwho?", "a man", "why?", "fun"], (2, 4))
    assert (describe(second), second.answers) == ([frames, "what?", "a game"], (2,))


def write_every_kind(folder: Path, num_rows: int) -> dict[str, Path]:
    """A shard of each kind with so many rows, images of 256 pixels and videos of 60 frames."""
    photo = make_png(90, (256, 256))
    page = {"text_list": [f"sentence {i}." for i in range(20)], "image_info": []}
    page["image_info"] = [
        {"matched_text_index": i, "matched_sim": 0.5, "image_base64": base64.b64encode(photo).decode()}
        for i in range(5)
    ]
    video, frames = make_video(60), {f"{i}.{e}": c for i in range(16) for e, c in (("png", photo), ("txt", b"words"))}
    pairs = {f"{i}.{e}": c for i in range(num_rows) for e, c in (("png", photo), ("txt", f"dog {i}"))}
    clips = {f"{i}.{e}": c for i in range(num_rows) for e, c in (("mp4", video), ("txt", f"dog {i}"))}
    boards = {f"{i}.{name}": content for i in range(num_rows) for name, content in frames.items()}
    chats = [{"instruction": f"a dog {i}", "output": "yes"} for i in range(num_rows)]
    table = {"texts": [[None, f"dog {i}"] * 3 for i in range(num_rows)], "images": [[photo, None] * 3] * num_rows}
    pq.write_table(pa.table(table), folder / "d.parquet")
    files = {
        "image_text": write_tar(folder / "a.tar", pairs),
        "video_text": write_tar(folder / "b.tar", clips),
        "mmc4": write_json_lines(folder / "c.jsonl", [page] * num_rows),
        "obelics": folder / "d.parquet",
        "storyboard": write_tar(folder / "e.tar", boards),
        "instruction": write_json_lines(folder / "f.jsonl", chats),
    }
    assert files.keys() == KINDS.keys()
    return files


def test_samples_per_second_of_every_kind(tmp_path, capsys):
    """Printed, not judged: how fast one core reads and encodes each kind."""
    files = write_every_kind(tmp_path, 10)
    encoder = EmuSampleEncoder(make_processor("instruct"), max_length=256)
    rates = {}
    for kind, path in files.items():
        begin = time.perf_counter()
        num_samples = len(read_all(kind, path, encoder=encoder))
        rates[kind] = num_samples / (time.perf_counter() - begin)
        assert num_samples
    with capsys.disabled():
        print("\nsamples/s on one core:", {kind: round(rate) for kind, rate in rates.items()})  # noqa: T201


# What is broken


def read_broken(caplog, kind: str, files, **kwargs) -> tuple[list[Sample], str, dict[str, int]]:
    source = EmuSource(kind, str(files), max_broken_fraction=1.0, **kwargs)
    stream = SourceStream(source, 0, repeat=False)
    with caplog.at_level(logging.WARNING):
        samples = list(stream)
    return samples, caplog.text, stream.state_dict()


def test_broken_members_of_a_tar_are_named_and_left_out(tmp_path, caplog):
    members = {"a.png": make_png(1), "a.txt": "fine", "b.png": b"no image", "b.txt": "broken", "c.txt": "no image"}
    members |= {"d.png": make_png(2), "d.txt": " ", "e.png": make_png(3)[:40], "e.txt": "cut", "f.png": make_png(4)}
    members |= {"g.png": make_png(5), "g.txt": b"\xff\xfe", "h.png": make_png(6), "h.txt": "fine too"}
    path = write_tar(tmp_path / "0.tar", members)
    samples, log, state = read_broken(caplog, "image_text", path)
    assert [sort_parts(sample) for sample in samples] == [[1, "fine"], [6, "fine too"]]
    for key in "bcdefg":
        assert f"{path}:{key} is left out" in log
    assert (state["num_rows"], state["num_broken"]) == (8, 6)
    assert f"{path}:g is left out (6 of 7 so far)" in log


def test_members_with_names_outside_never_touch_the_disk(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    outside = tmp_path / "absolute.png"
    members = {"../evil.png": make_png(1), "../evil.txt": "a", str(outside): make_png(2), "a/../../b.txt": "b"}
    path = write_tar(folder / "0.tar", members | {"ok.png": make_png(3), "ok.txt": "fine"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
    samples, log, state = read_broken(caplog, "image_text", path)
    assert [sort_parts(sample) for sample in samples] == [[3, "fine"]]
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == [path]
    for name in ("../evil.png", "../evil.txt", str(outside).lstrip("/"), "a/../../b.txt", "link.png"):
        assert name in log
    assert state["num_broken"] == 5


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_names_in_rows_stay_inside_their_folder(tmp_path, caplog, name):
    (tmp_path / "secret.png").write_bytes(make_png(1))
    (tmp_path / "data").mkdir()
    path = write_json_lines(tmp_path / "data" / "metadata.jsonl", [{"file_name": name, "text": "a"}])
    samples, log, _ = read_broken(caplog, "image_text", path)
    assert samples == []
    assert "expected one inside its folder" in log


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "header overwritten", "no tar"])
def test_a_damaged_tar_is_named_and_read_as_far_as_it_goes(tmp_path, caplog, damage):
    write_img2dataset(tmp_path, 2, 4)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmember("000000002.jpg")
    data = path.read_bytes()
    if damage == "cut in a member":
        data = data[: third.offset_data + 10]
    elif damage == "cut in a header":
        data = data[: third.offset + 100]
    elif damage == "header overwritten":
        data = data[: third.offset] + bytes(range(256)) * 2 + data[third.offset + 512 :]
    else:
        data = b"<html>not found</html>"
    path.write_bytes(data)
    samples, log, state = read_broken(caplog, "image_text", f"{tmp_path}/*.tar")
    captions = sorted(sort_parts(sample)[1] for sample in samples)
    whole = [f"caption 1 {row}" for row in range(4)]
    kept = {"no tar": [], "cut in a member": ["caption 0 0", "caption 0 1"]}
    assert captions == kept.get(damage, ["caption 0 0", "caption 0 1"]) + whole
    assert str(path) in log
    assert state["num_broken"] == 1


def test_broken_json_lines_are_named_and_left_out(tmp_path, caplog):
    fine = {"instruction": "a", "output": "b"}
    rows = [fine, '{"instruction": "a", "out', "[1, 2]", {"other": 1}, {"instruction": 3, "output": "b"}, fine]
    path = write_json_lines(tmp_path / "0.jsonl", rows)
    samples, log, state = read_broken(caplog, "instruction", path)
    assert [sample.key for sample in samples] == [f"{path}:0", f"{path}:5"]
    for line in range(1, 5):
        assert f"{path}:{line} is left out" in log
    assert (state["num_rows"], state["num_broken"]) == (6, 4)


def test_mismatches_of_text_and_media_are_named(tmp_path, caplog):
    (tmp_path / "1.png").write_bytes(make_png(1))
    talk = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a"}]
    silent = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"conversations": talk},
        {"conversations": silent, "image": "1.png"},
        {"conversations": talk, "image": "2.png"},
        {"conversations": talk[1:]},
        {"conversations": talk[:1], "image": "1.png"},
        {"conversations": talk, "image": "1.png"},
    ]
    samples, log, state = read_broken(caplog, "instruction", write_json_lines(tmp_path / "0.jsonl", rows))
    assert [describe(sample) for sample in samples] == [[1, "what?", "a"]]
    assert state["num_broken"] == 5
    for message in (
        "got none for a <image>",
        "got 1 more than marks",
        "no file '2.png'",
        "role in turn 0",
        "no answer",
    ):
        assert message in log

    caplog.clear()
    table = {"texts": [["a"], ["a", None], ["a"]], "images": [[None, b"x"], [None, None], [b"x"]]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    samples, log, state = read_broken(caplog, "obelics", tmp_path / "0.parquet")
    assert (samples, state["num_broken"]) == ([], 3)
    assert "got 2, expected 1" in log
    assert "place 1: got neither" in log
    assert "place 0: got both" in log

    caplog.clear()
    members = {"v.0.txt": "a", "v.1.png": make_png(1), "w.0.png": make_png(1)}
    samples, log, state = read_broken(caplog, "storyboard", write_tar(tmp_path / "0.tar", members))
    assert (samples, state["num_broken"]) == ([], 2)
    assert "got numbers [1]" in log
    assert "got no 0.txt" in log


def test_a_broken_video_is_named(tmp_path, caplog):
    video = make_video(20)
    members = {"a.mp4": video[: len(video) // 2], "a.txt": "cut", "b.mp4": b"no video", "b.txt": "b"}
    path = write_tar(tmp_path / "0.tar", members | {"c.mp4": video, "c.txt": "fine"})
    samples, log, _ = read_broken(caplog, "video_text", path)
    assert [sample.key for sample in samples][-1] == f"{path}:c"
    assert f"{path}:b is left out" in log


def test_too_many_broken_rows_stop_the_run(tmp_path):
    fine, broken = {"instruction": "a", "output": "b"}, {"instruction": "a"}
    rows = [broken if index % 10 == 9 else fine for index in range(400)]
    path = write_json_lines(tmp_path / "0.jsonl", rows)
    assert len(read_all("instruction", path, max_broken_fraction=0.1)) == 360
    stream = SourceStream(EmuSource("instruction", str(path), max_broken_fraction=0.09), 0)
    with pytest.raises(BrokenSourceError, match=r"source instruction: got 10 broken rows of 1\d\d.*0.09"):
        list(stream)
    # a small source is judged when it has been read once
    path = write_json_lines(tmp_path / "1.jsonl", [fine] * 9 + [broken])
    with pytest.raises(BrokenSourceError, match="got 1 broken rows of 10"):
        read_all("instruction", path, max_broken_fraction=0.05)


def test_a_source_without_a_single_sample_is_an_error_and_no_endless_loop(tmp_path):
    path = write_json_lines(tmp_path / "0.jsonl", [{"other": 1}])
    stream = SourceStream(EmuSource("instruction", str(path), max_broken_fraction=1.0), 0)
    with pytest.raises(ValueError, match="got no sample in a whole pass"):
        list(stream)


def test_sources_refuse_what_they_cannot_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for kind, files, message in (
        ("images", "*.tar", f"got 'images', expected one of .*{min(KINDS)}"),
        ("mmc4", str(tmp_path / "*.tar"), "which matches nothing"),
        ("mmc4", str(tmp_path / "a.txt"), r"a\.txt', expected .tar"),
    ):
        with pytest.raises(ValueError, match=message):
            EmuSource(kind, files)
    with pytest.raises(ValueError, match="max_broken_fraction: got 2"):
        EmuSource("mmc4", "a", max_broken_fraction=2)


# Order and resumption


def test_a_mixture_of_every_kind_resumes_exactly_at_every_sample(tmp_path):
    """Also where one row gives several pieces, and across the end of a pass."""
    for name in ("pairs", "pages", "chats"):
        (tmp_path / name).mkdir()
    write_img2dataset(tmp_path / "pairs", 3, 4)
    page = make_page(12, {i: [(i, 0.5)] for i in range(12)}, "base64", tmp_path, "")
    write_json_lines(tmp_path / "pages" / "0.jsonl", [page] * 3)
    write_json_lines(tmp_path / "chats" / "0.jsonl", [{"instruction": "a", "output": str(i)} for i in range(5)])
    encoder = EmuSampleEncoder(make_processor("instruct"), max_length=64)

    def make_mixture(**kwargs) -> EmuMixture:
        sources = [
            EmuSource("image_text", f"{tmp_path}/pairs/*.tar"),
            EmuSource("mmc4", f"{tmp_path}/pages/*.jsonl"),
            EmuSource("instruction", f"{tmp_path}/chats/*.jsonl"),
        ]
        return EmuMixture(sources, weights=[1, 2, 1], encoder=encoder, seed=3, **kwargs)

    def describe_encoded(encoded) -> tuple:
        pixels = None if encoded.pixel_values is None else encoded.pixel_values.sum().item()
        return encoded.key, encoded.input_ids.tolist(), pixels

    whole, states = [], []
    mixture = make_mixture()
    iterator = iter(mixture)
    for _ in range(60):
        whole.append(describe_encoded(next(iterator)))
        states.append(json.loads(json.dumps(mixture.state_dict())))
    assert any("#1" in key for key, *_ in whole)
    assert states[-1]["streams"][2]["epoch"] >= 1
    for at in random.Random(0).sample(range(60), 12):
        resumed = make_mixture()
        resumed.load_state_dict(states[at])
        iterator = iter(resumed)
        assert [describe_encoded(next(iterator)) for _ in range(min(6, 59 - at))] == whole[at + 1 : at + 7]
        if at < 53:
            assert resumed.state_dict() == states[at + 6]


def test_every_kind_counts_its_rows_and_resumes_exactly_after_each(tmp_path):
    """Order and keys, and all that its reader draws: sides, frames and stretches."""
    encoder = EmuSampleEncoder(make_processor("instruct"), max_length=256)
    for kind, path in write_every_kind(tmp_path, 3).items():
        stream = SourceStream(EmuSource(kind, str(path)), 5, encoder=encoder)
        samples, states = [], [stream.state_dict()]
        for sample in itertools.islice(iter(stream), 8):
            samples.append((sample.key, sample.input_ids.tolist()))
            states.append(stream.state_dict())
        pieces = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample[0].split("#")[0])]
        assert [group[0][0].split("#")[0] for group in pieces[:3]] == [f"{path}:{row}" for row in range(3)]
        assert states[-1]["num_broken"] == 0
        for at in range(1, 5):
            resumed = SourceStream(EmuSource(kind, str(path)), 5, encoder=encoder)
            resumed.load_state_dict(states[at])
            again = [(sample.key, sample.input_ids.tolist()) for sample in itertools.islice(iter(resumed), 3)]
            assert again == samples[at : at + 3], kind
            assert resumed.state_dict() == states[at + 3]
