"""Training data of the shapes' world as files, in the layouts that published data sets have.

    write_shards("shapes", {"caption": 50_000, "story": 10_000}, seed=0)

writes `shapes/caption/00000.tar` and so on, several shards per kind of task. Captions are img2dataset tars (a source
reads each pair in either order, so that they teach drawing too), captions of clips are video2dataset tars, stories,
patterns and blends are parquet as OBELICS has it, and questions and dialogues are JSON lines as LLaVA has them, with a
tar of their pictures beside each shard. Any task can be a parquet page too ("question_page"). All of it is lossless, and the same seed writes the same bytes.
"""

import io
import json
import os
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..hub.outputs import whole_folder
from .documents import QUIZ_KINDS, TASK_KINDS, Document, Task, draw_task
from .scenes import SPLITS, UNSEEN


NUM_SHARDS = 8
FRAMES_PER_SECOND = 8
# The kind of source that reads each kind of task, and which of its files are shards.
SHARD_LAYOUTS = {
    "caption": ("image_text", "*.tar"),
    "clip_caption": ("video_text", "*.tar"),
    "story": ("obelics", "*.parquet"),
    "pattern_text": ("obelics", "*.parquet"),
    "pattern_image": ("obelics", "*.parquet"),
    "blend": ("obelics", "*.parquet"),
    "question": ("instruction", "*.jsonl"),
    "clip_question": ("instruction", "*.jsonl"),
    "dialogue": ("instruction", "*.jsonl"),
    "quiz": ("instruction", "*.jsonl"),
    "clip_quiz": ("instruction", "*.jsonl"),
    "lookup": ("instruction", "*.jsonl"),
    "comparison": ("instruction", "*.jsonl"),
}
# The same tasks as pages of plain text and pictures, frames of a video one by one: what a model reads before it is tuned.
PAGE_SUFFIX = "_page"
SHARD_LAYOUTS |= {f"{kind}{PAGE_SUFFIX}": ("obelics", "*.parquet") for kind in (*TASK_KINDS, *QUIZ_KINDS)}


def write_shards(folder: str | os.PathLike, counts: Mapping[str, int], seed: int, split: str = "train") -> None:
    """Write documents of the shapes' world, each kind into a folder of its own name; all of them, or on an error nothing.

    Args:
        folder: new or empty.
        counts: documents per kind, the kinds being those of `SHARD_LAYOUTS`.
        seed: of all that is drawn. A document depends on it, its split, its kind and its number alone.
        split: as `draw_task` takes it.

    Raises:
        ValueError: for an unknown kind or split, a count below 1, or a folder with something in it.
        ImportError: if PyAV (videos) or pyarrow (parquet) is not installed.
    """
    for kind, count in counts.items():
        if kind not in SHARD_LAYOUTS or count < 1:
            raise ValueError(f"documents: got {count} of kind {kind!r}, expected 1 or more of {list(SHARD_LAYOUTS)}")
    if split not in (*SPLITS, UNSEEN):
        raise ValueError(f"split: got {split!r}, expected one of {(*SPLITS, UNSEEN)}")
    writers = {"image_text": write_pairs, "video_text": write_pairs, "obelics": write_pages}
    with whole_folder(Path(folder)) as root:
        for kind, count in counts.items():
            (root / kind).mkdir()
            write = writers.get(SHARD_LAYOUTS[kind][0], write_conversations)
            num_shards = min(NUM_SHARDS, count)
            for shard in range(num_shards):
                indices = range(count * shard // num_shards, count * (shard + 1) // num_shards)
                write(root / kind / f"{shard:05d}", draw_tasks(kind, indices, seed, split))


def draw_tasks(kind: str, indices: Iterable[int], seed: int, split: str) -> Iterator[tuple[str, Task]]:
    """The tasks with these numbers, each after its key."""
    kind = kind.removesuffix(PAGE_SUFFIX)
    for index in indices:
        yield f"{index:09d}", draw_task(kind, random.Random(f"{seed}:{split}:{kind}:{index}"), split)


def write_pairs(path: Path, tasks: Iterable[tuple[str, Task]]) -> None:
    """A tar of pictures or videos with their captions."""
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for key, task in tasks:
            [media], [text] = task.prompt, task.target
            add_media(tar, key, media)
            caption = {"key": key, "caption": text["text"]}
            add_member(tar, f"{key}.txt", text["text"].encode())
            add_member(tar, f"{key}.json", json.dumps(caption).encode())


def write_pages(path: Path, tasks: Iterable[tuple[str, Task]]) -> None:
    """A parquet file of aligned lists of texts and pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = [make_page(task) for _, task in tasks]
    texts = [[part.get("text") for part in document] for document in documents]
    images = [
        [
            {"bytes": encode_image(part["image"]), "path": None} if part["type"] == "image" else None
            for part in document
        ]
        for document in documents
    ]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"texts": pa.array(texts, pa.list_(pa.string())), "images": pa.array(images, pa.list_(image_type))}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))


def make_page(task: Task) -> Document:
    """A task's document with videos as their frames, and with neighbouring texts as one."""
    page: Document = []
    for part in task.document:
        if part["type"] == "video":
            page += [{"type": "image", "image": frame} for frame in part["video"]]
        elif part["type"] == "text" and page and page[-1]["type"] == "text":
            page[-1] = {"type": "text", "text": f"{page[-1]['text']} {part['text']}"}
        else:
            page.append(part)
    return page


def write_conversations(path: Path, tasks: Iterable[tuple[str, Task]]) -> None:
    """JSON lines of conversations about one picture or video each, and a tar of these."""
    rows = []
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for key, task in tasks:
            media, *texts = task.document
            kind = media["type"]
            if kind == "video":  # the segments of `load_video` end before the last of nine frames, and take the others
                media = {"type": "video", "video": [*media["video"], media["video"][-1]]}
            turns = [
                {"from": "gpt" if number % 2 else "human", "value": part["text"]} for number, part in enumerate(texts)
            ]
            turns[0]["value"] = f"<{kind}>\n{turns[0]['value']}"
            rows.append({"id": key, kind: add_media(tar, key, media), "conversations": turns})
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.with_suffix(".jsonl").write_text(lines, encoding="utf-8")


def add_media(tar: tarfile.TarFile, key: str, part: dict[str, Any]) -> str:
    """Put an image or video into a tar; returns its name there."""
    is_image = part["type"] == "image"
    name = f"{key}.{'png' if is_image else 'mp4'}"
    add_member(tar, name, encode_image(part["image"]) if is_image else encode_video(part["video"]))
    return name


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put a file into a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def encode_image(image: Image.Image) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def encode_video(frames: list[Image.Image]) -> bytes:
    """An MP4 file of frames as PNG: decoded, they are the same again.

    At a few kilobytes a video, what takes time is opening a codec; this one opens several times faster than codecs made
    for video, which start threads.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("png", rate=FRAMES_PER_SECOND)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "rgb24"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
