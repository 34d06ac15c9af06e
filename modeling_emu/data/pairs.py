"""Image-text and video-text pairs: img2dataset and video2dataset tars, parquet, and image folders with metadata."""

import json
from typing import Any

from ..documents_emu import NUM_VIDEO_FRAMES, decode_video, load_image
from .samples import Row, Sample, get_text, make_text


IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
VIDEO_ENDINGS = ("mp4", "mkv", "webm", "avi")
CAPTION_COLUMNS = ("txt", "caption", "text")


def read_image_text(row: Row) -> Sample:
    """An image and its caption, in this order or the other.

    Columns: the image under its ending (`jpg`, ...; img2dataset), `image` (bytes or `{"bytes", "path"}`; parquet) or
    `file_name` (imagefolder); its caption under `txt`, `caption` or `text`, or in the `json` of a tar.

    Raises:
        ValueError: if the image cannot be read or the caption is empty.

    Source:
        published_emu.md 6 names the rule: the image of a pair goes before or after its text at random.
    """
    source = get_column(row, (*IMAGE_ENDINGS, "image", "file_name"), "image")
    return make_pair(row, {"type": "image", "image": load_image(row.media.get(source))})


def read_video_text(row: Row) -> Sample:
    """A video, of which 8 random frames are taken in their order, and its caption, in this order or the other.

    Columns as in `read_image_text`, with the video under its ending (`mp4`, ...; video2dataset), `video` or
    `file_name`.

    Raises:
        ValueError: if the video cannot be read or the caption is empty.
    """
    source = get_column(row, (*VIDEO_ENDINGS, "video", "file_name"), "video")

    def choose_frames(num_source_frames: int) -> list[int]:
        if num_source_frames < NUM_VIDEO_FRAMES:
            return sorted(row.rng.choices(range(num_source_frames), k=NUM_VIDEO_FRAMES))
        return sorted(row.rng.sample(range(num_source_frames), NUM_VIDEO_FRAMES))

    return make_pair(row, {"type": "video", "video": decode_video(row.media.get(source), choose_frames)})


def get_column(row: Row, names: tuple[str, ...], what: str) -> Any:
    """The first of these columns that the row has.

    Raises:
        ValueError: if it has none.
    """
    for name in names:
        if row.fields.get(name) is not None:
            return row.fields[name]
    raise ValueError(f"columns: got {sorted(row.fields)}, expected the {what} under one of {names}")


def make_pair(row: Row, media: dict[str, Any]) -> Sample:
    """Image or video and caption in a random order."""
    caption = next((row.fields[name] for name in CAPTION_COLUMNS if row.fields.get(name) is not None), None)
    if caption is None and row.fields.get("json") is not None:
        caption = json.loads(row.fields["json"]).get("caption")
    document = [media, make_text(get_text(caption, "caption"))]
    if row.rng.random() < 0.5:
        document.reverse()
    return Sample(document, row.key)
