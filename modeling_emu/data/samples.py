"""What a reader gets and gives: a row of a shard, the media beside it, and the document made of both."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from .files import is_safe_name, open_file, read_tar_member


Document = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One document of a source.

    Args:
        document: parts `{"type": "text" | "image" | "video", ...}`; images are PIL, videos lists of PIL frames.
        key: the shard and the row in it, so that an error can name them.
        answers: which parts the assistant says; the others are the user's. None: a document to learn as a whole.
        system: the system message of a conversation, where the source has one.
    """

    document: Document
    key: str
    answers: tuple[int, ...] | None = None
    system: str | None = None


@dataclass(frozen=True)
class Media:
    """Files that a shard's rows name.

    Args:
        shard: path or URL of the shard.
        folder: where the files are, or the tars of the shards, by the shard's own name (`00000.jsonl`, `00000.tar`).
            None: the shard's folder.
    """

    shard: str
    folder: str | None = None

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if there is no such file.

        Raises:
            ValueError: if the name leads out of the folder.
        """
        if not is_safe_name(name):
            raise ValueError(f"name of a media file: got {name!r}, expected one inside its folder")
        folder, _, shard_name = self.shard.rpartition("/")
        folder = self.folder or folder or "."
        try:
            with open_file(f"{folder}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return read_tar_member(f"{folder}/{shard_name.split('.')[0]}.tar", name)

    def get(self, source: Any) -> bytes:
        """The bytes of an image or video in any form that a row has it: bytes, `{"bytes", "path"}`, or a file's name.

        Raises:
            ValueError: if it is none of them, or there is no such file.
        """
        if isinstance(source, dict):
            source = source.get("bytes") or source.get("path")
        if isinstance(source, str):
            if "://" in source:
                raise ValueError(f"media: got the address {source!r}, expected the bytes or the name of a file")
            data = self.read(source)
            if data is None:
                raise ValueError(f"media: got no file {source!r}, expected it in {self.folder or 'the shard folder'}")
            return data
        if not isinstance(source, bytes):
            raise ValueError(f"media: got {type(source).__name__}, expected bytes or the name of a file")
        return source

    def get_video(self, stem: str) -> bytes:
        """The bytes of the video of this name, whichever of the usual suffixes it has."""
        names = (
            [stem] if PurePosixPath(stem).suffix else [stem + suffix for suffix in (".mp4", ".mkv", ".webm", ".avi")]
        )
        for name in names:
            if (data := self.read(name)) is not None:
                return data
        raise ValueError(f"media: got no video {stem!r}, expected one of {names}")


@dataclass(frozen=True)
class Row:
    """One row of a shard on its way to a document.

    Args:
        fields: its columns; of a tar, the bytes of each member by its ending ("jpg", "txt", "0.png").
        key: the shard and the row.
        media: the files beside the shard.
        rng: the only source of chance; the same whenever this row is read in this epoch.
        count_tokens: length of a document in tokens, `<s>` and `</s>` included; an error where there is no encoder.
    """

    fields: dict[str, Any]
    key: str
    media: Media
    rng: random.Random
    count_tokens: Callable[[Document], int]


def get_text(value: Any, name: str) -> str:
    """A text that is not empty, stripped, from a string or UTF-8 bytes.

    Raises:
        ValueError: if it is neither, or empty.
    """
    text = value.decode("utf-8") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: got {text!r}, expected a text")
    return text.strip()


def make_text(text: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": text}
