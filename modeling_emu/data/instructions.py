"""Instruction data: conversations of LLaVA and ShareGPT, Alpaca's tasks, VideoChat's and Video-ChatGPT's questions.

A row's columns say which of them it is. A video here is the frames that the model sees when it is asked.
"""

import re
from typing import Any

from ..documents_emu import load_image, load_video
from .samples import Document, Row, Sample, get_text, make_text


MEDIA_MARK = re.compile(r"<image>|<video>")
USER_ROLES, ASSISTANT_ROLES = ("human", "user"), ("gpt", "assistant")


def read_instruction(row: Row) -> Sample:
    """A conversation with its answers marked.

    Columns: `conversations` with `from` and `value`, and `image` or `video` where `<image>` or `<video>` stands in them
    (LLaVA, ShareGPT); `instruction`, `input`, `output` (Alpaca); `video` and `QA` with `i`, `q`, `a` (VideoChat);
    `video_id`, `q`, `a` (Video-ChatGPT).

    Raises:
        ValueError: if it is none of them, turns and media do not match, or a medium cannot be read.
    """
    fields = {name: value for name, value in row.fields.items() if value is not None}  # parquet has every column
    if "conversations" in fields:
        return read_conversation(row)
    if "QA" in fields:
        turns = [("\n".join(text for text in (qa.get("i"), qa["q"]) if text), qa["a"]) for qa in fields["QA"]]
        return make_video_chat(row, fields["video"], turns)
    if "video_id" in fields:
        return make_video_chat(row, fields["video_id"], [(fields["q"], fields["a"])])
    if "instruction" in fields and "output" in fields:
        question = get_text(fields["instruction"], "instruction")
        if (fields.get("input") or "").strip():
            question += "\n" + get_text(fields["input"], "input")
        return Sample([make_text(question), make_text(get_text(fields["output"], "output"))], row.key, answers=(1,))
    raise ValueError(f"columns: got {sorted(fields)}, expected those of LLaVA, ShareGPT, Alpaca or a video chat")


def read_conversation(row: Row) -> Sample:
    """`conversations` of LLaVA or ShareGPT."""
    media = [*list_media(row.fields, "image"), *list_media(row.fields, "video")]
    document: Document = []
    answers: list[int] = []
    system = None
    for index, turn in enumerate(row.fields["conversations"]):
        role, value = turn["from"], turn["value"]
        if role == "system" and index == 0:
            system = get_text(value, "system message") if value.strip() else None
        elif role in USER_ROLES:
            document += read_question(row, value, media)
        elif role in ASSISTANT_ROLES and document:
            answers.append(len(document))
            document.append(make_text(get_text(value, f"answer in turn {index}")))
        else:
            raise ValueError(f"role in turn {index}: got {role!r}, expected {USER_ROLES}, then {ASSISTANT_ROLES}")
    if media:
        raise ValueError(f"images and videos: got {len(media)} more than marks in the conversation, expected as many")
    if not answers:
        raise ValueError("conversation: got no answer, expected at least one")
    return Sample(document, row.key, tuple(answers), system)


def list_media(fields: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    """The images or videos of a row: one, several or none."""
    value = fields.get(kind)
    sources = value if isinstance(value, list) else [] if value is None else [value]
    return [(kind, source) for source in sources]


def read_question(row: Row, value: str, media: list[tuple[str, Any]]) -> Document:
    """The parts of a question; the media that it uses are taken out of the list."""
    document: Document = []
    texts, marks = MEDIA_MARK.split(value), MEDIA_MARK.findall(value)
    for text, mark in zip(texts, [*marks, None], strict=True):
        if text.strip():
            document.append(make_text(text.strip()))
        if mark is None:
            continue
        place = next((i for i, (kind, _) in enumerate(media) if mark == f"<{kind}>"), None)
        if place is None:
            raise ValueError(f"images and videos: got none for a {mark} in the conversation, expected one per mark")
        kind, source = media.pop(place)
        data = row.media.get(source)
        document.append({"type": kind, kind: load_image(data) if kind == "image" else load_video(data)})
    if not document:
        raise ValueError(f"question: got {value!r}, expected text, image or video")
    return document


def make_video_chat(row: Row, video: str, turns: list[tuple[str, str]]) -> Sample:
    """Questions about one video, which stands before the first."""
    document: Document = [{"type": "video", "video": load_video(row.media.get_video(video))}]
    answers = []
    for question, answer in turns:
        document.append(make_text(get_text(question, "question")))
        answers.append(len(document))
        document.append(make_text(get_text(answer, "answer")))
    if not answers:
        raise ValueError("QA: got no questions, expected at least one")
    return Sample(document, row.key, tuple(answers))
