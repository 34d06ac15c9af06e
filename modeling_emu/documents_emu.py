# Copyright 2026 The Emu Hub-native developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Documents, and the images and videos in them: the forms that a user may write, and files to 8-bit RGB pixels.

A document is the ordered content of one sample: a list of parts `{"type": "text", "text": ...}`,
`{"type": "image", "image": ...}` and `{"type": "video", "video": ...}`. The module knows nothing of tokens or models.
"""

import io
import os
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps


MEDIA_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}
NUM_VIDEO_FRAMES = 8  # Emu1/inference.py
URL_TIMEOUT_S = 60
MAX_8_BIT, MAX_16_BIT = 255, 65535


def load_image(source: Any) -> Image.Image:
    """An image as 8-bit RGB, converted as the published code does: alpha is dropped, palettes, grey and CMYK follow PIL.

    Args:
        source: a PIL image (its EXIF rotation is not applied: a PIL object is taken as it stands); a path, the bytes
            of a file, or an http(s) or data URL (its EXIF rotation is applied); a uint8 array or tensor `(H, W, 3)`.

    Raises:
        ValueError: if it cannot be read, has no pixels, or holds more pixels than PIL allows.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return convert_array_to_image(source)
    if not isinstance(source, Image.Image | str | os.PathLike | bytes):
        raise ValueError(f"image: got {type(source).__name__}, expected a PIL image, path, bytes, URL or uint8 array")
    try:
        if isinstance(source, Image.Image):
            return convert_to_rgb(source)
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:image/")):
            with urlopen(source, timeout=URL_TIMEOUT_S) as response:
                source = response.read()
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return convert_to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a decoder raises whatever its parser of a broken file runs into
        raise ValueError(f"{describe('image', source)}: got {error!r}, expected a readable image") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """PIL's own conversion, but for more than 8 bits per value, which PIL would clip and which are scaled here.

    `I;16` has 16 bits. The modes `I` and `F` do not say how many: values up to 255 are taken as 8 bits, larger ones
    as 16.
    """
    if 0 in image.size:
        raise ValueError(f"size of image: got {image.size}, expected at least one pixel")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not (values.min() >= 0 and values.max() <= MAX_16_BIT):
            raise ValueError(
                f"values of a '{image.mode}' image: got {values.min()} to {values.max()}, expected 0 to {MAX_16_BIT}"
            )
        if image.mode.startswith("I;16") or values.max() > MAX_8_BIT:
            values = np.rint(values * (MAX_8_BIT / MAX_16_BIT))
        image = Image.fromarray(values.astype(np.uint8))
    return image.convert("RGB")


def convert_array_to_image(array: np.ndarray | torch.Tensor) -> Image.Image:
    """A uint8 array `(H, W, 3)` in the range 0 to 255 as an RGB image."""
    values = array.numpy(force=True) if isinstance(array, torch.Tensor) else array
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[-1] != 3 or 0 in values.shape:
        raise ValueError(f"image array: got {values.dtype} {values.shape}, expected uint8 (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(values))


def describe(kind: str, source: Any) -> str:
    """How an error message names a source: by its path or URL, its size in bytes, or its type."""
    if isinstance(source, bytes):
        return f"{kind} of {len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        return f"{kind} {name if len(name) < 200 else name[:200] + '...'}"
    return f"{kind} ({type(source).__name__})"


def get_frame_indices(num_source_frames: int, num_frames: int | None = NUM_VIDEO_FRAMES) -> list[int]:
    """The frames that stand for a video: one near the centre of each of `num_frames` equal segments.

    Args:
        num_source_frames: frames of the video. With fewer than `num_frames`, some are taken twice.
        num_frames: frames to take; None takes every frame once.

    Source:
        baaivision/Emu, Emu1: `s = (n - 1) / num_frames`, index `int(s / 2) + round(s * i)`.
    """
    if num_frames is None:
        return list(range(num_source_frames))
    if num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}, expected at least 1, or None for every frame")
    segment = (num_source_frames - 1) / num_frames
    return [int(segment / 2) + round(segment * index) for index in range(num_frames)]


def load_video(source: Any, num_frames: int | None = NUM_VIDEO_FRAMES) -> list[Image.Image]:
    """The frames of a video that the model sees, as 8-bit RGB images.

    Args:
        source: a path or the bytes of a file (needs PyAV), a list of frames (whatever `load_image` takes), or a uint8
            array or tensor `(T, H, W, 3)`.
        num_frames: how many, by `get_frame_indices`; None takes every frame.

    Raises:
        ValueError: if the video cannot be read or has no frames.
        ImportError: if a file is given and PyAV is not installed.
    """
    if isinstance(source, str | os.PathLike | bytes):
        return decode_video(source, lambda num_source_frames: get_frame_indices(num_source_frames, num_frames))
    if isinstance(source, np.ndarray | torch.Tensor) and source.ndim != 4:
        raise ValueError(f"video array: got shape {tuple(source.shape)}, expected (frames, height, width, 3)")
    if not isinstance(source, list | tuple | np.ndarray | torch.Tensor):
        raise ValueError(f"video: got {type(source).__name__}, expected a path, bytes, list of frames or uint8 array")
    if len(source) == 0:
        raise ValueError("video: got no frames, expected at least one")
    return [load_image(source[index]) for index in get_frame_indices(len(source), num_frames)]


def decode_video(source: str | os.PathLike | bytes, choose_frames: Callable[[int], list[int]]) -> list[Image.Image]:
    """`load_video` for a file; only the frames that are asked for are kept in memory.

    Args:
        choose_frames: the indices of the frames to take, in order, for so many frames of the file. It is called again
            where the file turns out to hold another number than it says.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("video files: got no PyAV, expected it (pip install modeling-emu[video])") from error

    def open_video() -> Any:
        return av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), "r")

    name = describe("video", source)
    try:
        with open_video() as container:
            num_source_frames = count_packets(container, name)
        while num_source_frames:
            indices = choose_frames(num_source_frames)
            with open_video() as container:
                frames, num_decoded = decode_frames(container, set(indices))
            if num_decoded == num_source_frames:
                return [frames[index] for index in indices]
            num_source_frames = num_decoded  # some packets show no frame: the decoder's count is the true one
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{name}: got {error!r}, expected a readable video") from error
    raise ValueError(f"{name}: got no frames, expected at least one")


def count_packets(container: Any, name: str) -> int:
    """Packets of the first video stream of an open PyAV container: its frames, with nothing decoded."""
    num_packets = 0
    for packet in container.demux(container.streams.video[0]) if container.streams.video else ():
        if packet.is_corrupt:
            raise ValueError(f"{name}: got a file that ends in the middle, expected a whole video")
        num_packets += packet.size > 0 and not packet.is_discard  # what an edit list hides is no frame
    return num_packets


def decode_frames(container: Any, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames of an open PyAV container, upright, and the number of all its frames."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frames: dict[int, Image.Image] = {}
    num_decoded = 0
    for frame in container.decode(stream):
        if num_decoded in wanted:
            frames[num_decoded] = frame.to_image().rotate(frame.rotation, expand=True)
        num_decoded += 1
    return frames, num_decoded


def prepare_documents(documents: Any) -> list[list[dict[str, Any]]]:
    """The batch of documents that a user's shorthand stands for, every part a dictionary.

    A `str` is a text, a PIL image (or uint8 array `(H, W, 3)`) an image, and inside a document a list of frames (or
    array `(T, H, W, 3)`) a video. One such part alone is a document; a list of parts is one document; a list of lists
    is a batch. Nothing is loaded here.

    Args:
        documents: a part, a document, or a batch of documents.

    Returns:
        A list of documents, each a list of `{"type": "text" | "image" | "video", ...}`.

    Raises:
        ValueError: for a list of several texts (one document or several?), empty lists, and parts of other forms.
    """
    if not isinstance(documents, list | tuple):
        return [[prepare_part(documents)]]
    if not documents:
        raise ValueError("documents: got an empty list, expected at least one part")
    if all(isinstance(entry, list | tuple) for entry in documents):
        for row, document in enumerate(documents):
            if not document:
                raise ValueError(f"document {row}: got an empty list, expected at least one part")
        return [[prepare_part(part) for part in document] for document in documents]
    if len(documents) > 1 and all(isinstance(entry, str) for entry in documents):
        raise ValueError(
            f"documents: got a list of {len(documents)} texts, which is one document or {len(documents)}; expected "
            f"[[text, text]] for one document of several parts, or [[text], [text]] for one document per text"
        )
    return [[prepare_part(part) for part in documents]]


def prepare_part(part: Any) -> dict[str, Any]:
    """One part of a document in its full form; see `prepare_documents`."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image.Image):
        return {"type": "image", "image": part}
    if isinstance(part, list | tuple):
        return {"type": "video", "video": list(part)}
    if isinstance(part, np.ndarray | torch.Tensor) and part.ndim in (3, 4):
        kind = "video" if part.ndim == 4 else "image"
        return {"type": kind, kind: part}
    if not isinstance(part, dict):
        raise ValueError(
            f"part of a document: got {type(part).__name__}, expected a text, a PIL image, a list of frames, or a "
            f'dictionary such as {{"type": "image", "image": path}}'
        )
    if part.get("type") == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"text part: got {type(part.get('text')).__name__} under 'text', expected str")
    elif part.get("type") in MEDIA_KEYS:
        get_media(part)
    else:
        raise ValueError(f"type of a part: got {part.get('type')!r}, expected 'text', 'image' or 'video'")
    return part


def get_media(part: dict[str, Any]) -> Any:
    """The source of an image or video part, under the key that transformers' chat messages have for it."""
    keys = MEDIA_KEYS[part["type"]]
    sources = [part[key] for key in keys if part.get(key) is not None]
    if len(sources) != 1:
        hint = ": embeddings cannot be read again, only pixels" if "image_embeds" in part else ""
        raise ValueError(f"{part['type']} part: got keys {sorted(part)}, expected exactly one of {keys}{hint}")
    return sources[0]
