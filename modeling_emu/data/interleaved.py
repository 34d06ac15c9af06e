"""Interleaved documents: web pages (MMC4, OBELICS), and videos as storyboards with their subtitles."""

import base64
import re
from collections.abc import Sequence
from typing import Any

from ..documents_emu import load_image
from .samples import Document, Row, Sample, get_text, make_text


MIN_SIMILARITY = 0.32
# published_emu.md 6: tokens and images of MMC4's two kinds of stretch
LONG_STRETCH_TOKENS, SHORT_STRETCH_TOKENS, STRETCH_IMAGES = 1024, 512, 5
FRAME_MEMBER = re.compile(r"(\d+)\.(?:png|jpg|jpeg|webp)")


def read_mmc4(row: Row) -> Sample:
    """A stretch of a web page of MMC4: with equal chance one of 1024 tokens with its first 5 images, or one of 512
    tokens of 5 random images with their sentences.

    Columns: `text_list`, and `image_info` with `matched_text_index`, `matched_sim` and the image as `image_base64`,
    `image_bytes`, or a file `image_name` in the folder or in the tar of the shard. Images below the similarity
    threshold, and those that were never downloaded, are left out. An image stands before or after its sentence at
    random, as in a pair; how often which stretch is taken, and where an image stands, is not published.

    Raises:
        ValueError: if no image is left, one cannot be read, or one is matched to a sentence that does not exist.
    """
    sentences = row.fields["text_list"]
    images: dict[int, list[dict[str, Any]]] = {}
    for info in row.fields["image_info"]:
        index = info["matched_text_index"]
        if not 0 <= index < len(sentences):
            raise ValueError(f"matched_text_index: got {index}, expected one of {len(sentences)} sentences")
        if info["matched_sim"] >= MIN_SIMILARITY and has_image(row, info):
            images.setdefault(index, []).append(info)
    if not images:
        raise ValueError(f"images: got none with a similarity of {MIN_SIMILARITY} or more, expected at least one")
    take_stretch = take_long_stretch if row.rng.random() < 0.5 else take_short_stretch
    return Sample(take_stretch(row, sentences, images), row.key)


def has_image(row: Row, info: dict[str, Any]) -> bool:
    """Whether an image of a page is there; it is kept in `info` when it has been read for that."""
    if info.get("image_bytes") is None and info.get("image_base64"):
        info["image_bytes"] = base64.b64decode(info["image_base64"], validate=True)
    if info.get("image_bytes") is None and info.get("image_name"):
        info["image_bytes"] = row.media.read(info["image_name"])
    return info.get("image_bytes") is not None


def make_sentence(row: Row, sentence: str, images: Sequence[dict[str, Any]]) -> Document:
    """A sentence with its images, each before or after it."""
    before: Document = []
    after: Document = []
    for info in images:
        side = before if row.rng.random() < 0.5 else after
        side.append({"type": "image", "image": load_image(info["image_bytes"])})
    return [*before, make_text(get_text(sentence, "sentence") + " "), *after]


def take_long_stretch(row: Row, sentences: list[str], images: dict[int, list[dict[str, Any]]]) -> Document:
    """Neighbouring sentences from a random one with an image on, with the first images among them."""
    document: Document = []
    num_images = 0
    for index in range(row.rng.choice(sorted(images)), len(sentences)):
        taken = images.get(index, [])[: STRETCH_IMAGES - num_images]
        longer = [*document, *make_sentence(row, sentences[index], taken)]
        if row.count_tokens(longer) > LONG_STRETCH_TOKENS:
            break
        document, num_images = longer, num_images + len(taken)
    return check_stretch(document, LONG_STRETCH_TOKENS)


def take_short_stretch(row: Row, sentences: list[str], images: dict[int, list[dict[str, Any]]]) -> Document:
    """Random images with their sentences, in the order of the page."""
    pairs = [(index, info) for index in sorted(images) for info in images[index]]
    chosen = sorted(row.rng.sample(range(len(pairs)), min(STRETCH_IMAGES, len(pairs))))
    by_sentence: dict[int, list[dict[str, Any]]] = {}
    for index, info in (pairs[choice] for choice in chosen):
        by_sentence.setdefault(index, []).append(info)
    document: Document = []
    for index, infos in by_sentence.items():
        longer = [*document, *make_sentence(row, sentences[index], infos)]
        if row.count_tokens(longer) <= SHORT_STRETCH_TOKENS:
            document = longer
    return check_stretch(document, SHORT_STRETCH_TOKENS)


def check_stretch(document: Document, num_tokens: int) -> Document:
    """Refuse a stretch in which nothing had room."""
    if not document:
        raise ValueError(f"sentence with its images: got more than {num_tokens} tokens, expected at most so many")
    return document


def read_obelics(row: Row) -> Sample:
    """A whole web page of OBELICS.

    Columns: `texts` and `images`, aligned lists of which exactly one has a value at each place; an image is bytes,
    `{"bytes", "path"}` or the name of a file.

    Raises:
        ValueError: if the lists do not match, or an image cannot be read.
    """
    texts, images = row.fields["texts"], row.fields["images"]
    if len(texts) != len(images):
        raise ValueError(f"images: got {len(images)}, expected {len(texts)}, as many as texts (None where a text is)")
    document: Document = []
    for index, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise ValueError(f"place {index}: got {'both' if text else 'neither'}, expected a text or an image")
        if text is not None:
            document.append(make_text(get_text(text, f"text {index}")))
        else:
            document.append({"type": "image", "image": load_image(row.media.get(image))})
    return Sample(document, row.key)


def read_storyboard(row: Row) -> Sample:
    """A video as its storyboard's frames, each after the subtitles that are spoken before it.

    Columns: `i.txt`, which may be empty, and `i.png` (or .jpg, .webp) with i from 0; a last text may have no frame.

    Raises:
        ValueError: if a frame is missing or has no text member, or cannot be read.

    Source:
        baaivision/Emu, `data/yt-sb-1b`: the layout that its `video_webdataset_maker_YT1b_sb.py` writes.
    """
    frames = {int(match[1]): name for name in row.fields if (match := FRAME_MEMBER.fullmatch(name))}
    if not frames or sorted(frames) != list(range(len(frames))):
        raise ValueError(f"frames: got numbers {sorted(frames)[:20]}, expected 0, 1, 2, ...")
    document: Document = []
    for index in range(len(frames) + 1):
        text = row.fields.get(f"{index}.txt")
        if text is None and index < len(frames):
            raise ValueError(f"frame {index}: got no {index}.txt, expected the text before it")
        if text is not None and text.strip():
            document.append(make_text(get_text(text, f"text {index}")))
        if index < len(frames):
            document.append({"type": "image", "image": load_image(row.fields[frames[index]])})
    return Sample(document, row.key)
