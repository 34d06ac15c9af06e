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
"""EmuProcessor: documents to tensors, and what the model generated back to documents.

Documents come in the forms of `documents_emu.py`; in raw text, a mark stands for an image or a video. The tokenizer
writes the ids, a stock image processor makes the pixels, and a video is its frames.
"""

from .configuration_emu import (  # first: it checks transformers' version
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
)


# isort: split
import itertools
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .documents_emu import NUM_VIDEO_FRAMES, get_media, load_image, load_video, prepare_documents, prepare_part


VIDEO_TOKEN = "<video>"
MEDIA_MARK = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)}")
WRAPPED_MARK = re.compile(rf"{re.escape(IMAGE_START_TOKEN)}\s*(?:{MEDIA_MARK.pattern})")

IMAGE_SYSTEM_MESSAGE = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the image after I provide "
    "it to you. Please answer my questions based on the given image."
)
VIDEO_SYSTEM_MESSAGE = (
    "You are a helpful assistant and you will be presented with a video consisting of multiple chronological images: "
    "[IMG]ImageContent[/IMG]. You will be able to see the video after I provide it to you. Please answer my questions "
    "based on the given video."
)

RENDER_CONTENT = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif part.type == 'image' -%}<image>
{%- elif part.type == 'video' -%}<video>
{%- else -%}{{ raise_exception("type of a part: got '" ~ part.type ~ "', expected text, image or video") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

BASE_CHAT_TEMPLATE = RENDER_CONTENT + "{%- for message in messages -%}{{ render(message.content) }}{%- endfor -%}"

# An answer is followed by </s>, and so is a user's message that nobody answered before the next one (VisDial).
INSTRUCT_CHAT_TEMPLATE = (
    RENDER_CONTENT
    + """\
{%- set ns = namespace(images=0, videos=0, turns=0) -%}
{%- for message in messages if message.content is not string -%}
{%- set ns.images = ns.images + message.content | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set ns.videos = ns.videos + message.content | selectattr('type', 'equalto', 'video') | list | length -%}
{%- endfor -%}
{%- if messages and messages[0].role == 'system' -%}{{ render(messages[0].content) ~ ' ' }}
{%- elif ns.images == 1 and ns.videos == 0 -%}{{ '"""
    + IMAGE_SYSTEM_MESSAGE
    + """ ' }}
{%- elif ns.images == 0 and ns.videos == 1 -%}{{ '"""
    + VIDEO_SYSTEM_MESSAGE
    + """ ' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ (' ' if ns.turns else '') ~ '[USER]: ' ~ render(message.content) }}
{%- if loop.nextitem is defined and loop.nextitem.role == 'user' -%}{{ eos_token }}{%- endif -%}
{%- set ns.turns = ns.turns + 1 -%}
{%- elif message.role == 'assistant' -%}
{{ (' ' if ns.turns else '') ~ '[ASSISTANT]:' }}
{%- generation -%}{{ ' ' ~ render(message.content) ~ eos_token }}{%- endgeneration -%}
{%- set ns.turns = ns.turns + 1 -%}
{%- elif message.role != 'system' or not loop.first -%}
{{ raise_exception("role of a message: got '" ~ message.role ~ "', expected system (first message), user or assistant") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ (' ' if ns.turns else '') ~ '[ASSISTANT]:' }}{%- endif -%}
"""
)


def get_chat_template(variant: str) -> str:
    """The published prompt form of a variant, as a jinja template.

    Args:
        variant: "instruct" is `{system} [USER]: ... [ASSISTANT]: ...</s>`, its system message chosen by the content
            (one image, one video, neither) unless the first message has the role "system". Every other variant is a
            base model: the contents follow each other and roles are not written.

    Source:
        `Emu1/inference.py` and `Emu1/evaluation` (VisDial).
    """
    return INSTRUCT_CHAT_TEMPLATE if variant == "instruct" else BASE_CHAT_TEMPLATE


def match_media(media: Any, counts: list[int], mark: str) -> list[Any]:
    """The images or videos of a batch in reading order, after a check that each has its mark.

    Args:
        media: one for all, a flat list in reading order of all rows, or a list per row.
        counts: marks in the text of each row.
        mark: the mark that stands for each.
    """
    kind = "images" if mark == IMAGE_TOKEN else "videos"
    is_single = is_single_image if mark == IMAGE_TOKEN else is_single_video
    media = [] if media is None else [media] if is_single(media) else list(media)
    if all(is_single(entry) for entry in media):
        if len(media) != sum(counts):
            rows = ", ".join(f"{count} in row {row}" for row, count in enumerate(counts))
            raise ValueError(f"{kind}: got {len(media)}, expected {sum(counts)}, one per {mark} mark ({rows})")
        return media
    if any(is_single(entry) for entry in media):
        raise ValueError(f"{kind}: got single ones and lists of them, expected a flat list or one list per row")
    if len(media) != len(counts):
        raise ValueError(f"rows of {kind}: got {len(media)}, expected {len(counts)}, one per text")
    for row, (entries, count) in enumerate(zip(media, counts, strict=True)):
        if len(entries) != count:
            raise ValueError(f"{kind} of row {row}: got {len(entries)}, expected {count}, one per {mark} mark")
    return [entry for entries in media for entry in entries]


def is_single_image(source: Any) -> bool:
    """Whether this is one image and no list of them."""
    return not isinstance(source, list | tuple)


def is_single_video(source: Any) -> bool:
    """Whether this is one video, a list of frames included, and no list of videos. A list of paths is no video."""
    if not isinstance(source, list | tuple):
        return True
    frames = (isinstance(entry, Image.Image) or getattr(entry, "ndim", None) == 3 for entry in source)
    return len(source) > 0 and all(frames)


class EmuProcessor(ProcessorMixin):
    """Text with images and videos to `input_ids` and `pixel_values`, and generated ids back to documents.

    Args:
        image_processor: transformers' `CLIPImageProcessor` that squashes to the vision tower's size, without a crop.
            Of its two back ends Emu takes PIL's, whose pixels are the published ones.
        tokenizer: a fast tokenizer with `<image>`, `[IMG]` and `[/IMG]`.
        num_image_tokens: N, the slots of one image.
        variant: which weights this serves ("pretrain", "instruct", ...); chooses the chat template.
        chat_template: a jinja template of your own instead.

    Raises:
        ValueError: if the tokenizer lacks one of Emu's tokens.

    Source:
        Emu, section 2.1; baaivision/Emu, Emu1.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 32,
        variant: str = "pretrain",
        chat_template: str | None = None,
    ):
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens: got {num_image_tokens}, expected at least 1")
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN) if token not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer: got none of {missing}, expected a tokenizer with Emu's tokens")
        if image_processor.backend != "pil":  # torchvision's resize differs in the second digit
            image_processor = CLIPImageProcessorPil.from_dict(image_processor.to_dict())

        self.num_image_tokens = num_image_tokens
        self.variant = variant
        self.image_token, self.image_token_id = IMAGE_TOKEN, vocabulary[IMAGE_TOKEN]
        self.image_start_token, self.image_start_token_id = IMAGE_START_TOKEN, vocabulary[IMAGE_START_TOKEN]
        self.image_end_token, self.image_end_token_id = IMAGE_END_TOKEN, vocabulary[IMAGE_END_TOKEN]
        self.video_token = VIDEO_TOKEN
        template = get_chat_template(variant) if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        documents: Any = None,
        num_frames: int | None = NUM_VIDEO_FRAMES,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode texts with their images and videos, or documents, as a batch.

        Args:
            images: in reading order, one per `<image>` mark: a flat list for all rows, or a list per row. Whatever
                `load_image` takes.
            text: one text or one per row. Each `<image>` becomes `[IMG]`, N slots and `[/IMG]`; each `<video>`
                becomes so many images as it has frames. Other special tokens may be written, too.
            videos: as `images`, one per `<video>` mark. Whatever `load_video` takes.
            audio: nothing but empty; harnesses pass it.
            documents: instead of the three: see `prepare_documents`. A special token in a text part is an error.
            num_frames: frames per video, by `get_frame_indices`; None takes every frame that is given.
            return_mm_token_type_ids: give `mm_token_type_ids` besides: 1 for a slot, 0 for the rest.
            return_text_replacement_offsets: give `text_replacement_offsets` besides: where marks stood in the text.
            kwargs: of the tokenizer (`padding`, `padding_side`, `truncation`, `max_length`, `return_tensors`, ...)
                and the image processor.

        Returns:
            `input_ids` and `attention_mask`, `(batch, length)`, where there is text; `pixel_values`,
            `(num_images, 3, height, width)`, float32, all images in reading order, where there are images.

        Raises:
            ValueError: if marks and images do not match, an image or video cannot be read, truncation would cut an
                image, or a row is longer than the tokenizer's `model_max_length`.
        """
        if is_given(audio) or is_given(kwargs.pop("audios", None)):
            raise ValueError("audio: got some, expected none, since Emu reads text, images and videos")
        images, videos = (media if is_given(media) else None for media in (images, videos))
        if documents is not None:
            if text is not None or images is not None or videos is not None:
                raise ValueError("documents: got text, images or videos besides, expected one or the other")
            text, media = self._read_documents(documents, num_frames)
        elif text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not text:
                raise ValueError("text: got an empty list, expected at least one text")
            media = self._read_media(text, images, videos, num_frames)
        elif images is not None and videos is None:
            rows = [images] if is_single_image(images) else images
            media = [[load_image(image)] for row in rows for image in ([row] if is_single_image(row) else row)]
        else:
            raise ValueError("inputs: got no text, expected text or documents (or images alone, for pixel_values)")

        merged_kwargs = self._merge_kwargs(
            ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        data: dict[str, Any] = {}
        if text is not None:
            expanded, offsets = self._expand_marks(text, media)
            data.update(self.tokenizer(expanded, **merged_kwargs["text_kwargs"]))
            self._check_rows(expanded, data["input_ids"])
            if return_mm_token_type_ids:
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
            if return_text_replacement_offsets:
                data["text_replacement_offsets"] = offsets
        if pixels := [image for images_of_mark in media for image in images_of_mark]:
            data.update(self.image_processor(pixels, **merged_kwargs["images_kwargs"]))
        return BatchFeature(
            data,
            tensor_type=merged_kwargs["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _read_documents(self, documents: Any, num_frames: int | None) -> tuple[list[str], list[list[Image.Image]]]:
        """Texts with marks, and the images of each mark in reading order."""
        texts, media = [], []
        for document in prepare_documents(documents):
            text = ""
            for is_text, parts in itertools.groupby(document, key=is_text_part):
                if is_text:
                    run = "".join(part["text"] for part in parts)
                    self._refuse_special_tokens(run)
                    text += run
                    continue
                for part in parts:
                    text += IMAGE_TOKEN if part["type"] == "image" else VIDEO_TOKEN
                    source = get_media(part)
                    media.append([load_image(source)] if part["type"] == "image" else load_video(source, num_frames))
            texts.append(text)
        return texts, media

    def _read_media(
        self, texts: list[str], images: Any, videos: Any, num_frames: int | None
    ) -> list[list[Image.Image]]:
        """The images of each mark in reading order, after a check of the marks."""
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text of row {row}: got {type(text).__name__}, expected str")
            if wrapped := WRAPPED_MARK.search(text):
                raise ValueError(
                    f"text of row {row}: got {wrapped.group()!r}, expected one bare {IMAGE_TOKEN} per image: the "
                    f"processor writes {IMAGE_START_TOKEN}, the slots and {IMAGE_END_TOKEN} (text that has them "
                    f"already goes to processor.tokenizer)"
                )
        images = iter(match_media(images, [text.count(IMAGE_TOKEN) for text in texts], IMAGE_TOKEN))
        videos = iter(match_media(videos, [text.count(VIDEO_TOKEN) for text in texts], VIDEO_TOKEN))
        marks = (mark for text in texts for mark in MEDIA_MARK.findall(text))
        return [
            [load_image(next(images))] if mark == IMAGE_TOKEN else load_video(next(videos), num_frames)
            for mark in marks
        ]

    def _expand_marks(self, texts: list[str], media: list[list[Image.Image]]) -> tuple[list[str], list[list[dict]]]:
        """Put `[IMG]`, slots and `[/IMG]` in place of the marks, once per image of each; with the places in the text."""
        slots = self.replace_image_token({}, 0)
        marks = [mark for text in texts for mark in MEDIA_MARK.findall(text)]
        expanded = [slots * len(images) for images in media]
        return self.get_text_with_replacements(
            list(texts),
            images_replacements=[text for mark, text in zip(marks, expanded, strict=True) if mark == IMAGE_TOKEN],
            videos_replacements=[text for mark, text in zip(marks, expanded, strict=True) if mark == VIDEO_TOKEN],
        )

    def _check_rows(self, texts: list[str], input_ids: Any) -> None:
        """Refuse a row whose images truncation has cut, and one that the language model cannot read whole."""
        limit = self.tokenizer.model_max_length
        image_tokens = {
            self.image_start_token: self.image_start_token_id,
            self.image_token: self.image_token_id,
            self.image_end_token: self.image_end_token_id,
        }
        for row, (text, ids) in enumerate(zip(texts, input_ids, strict=True)):
            ids = np.asarray(ids).tolist()
            for token, token_id in image_tokens.items():
                got, expected = ids.count(token_id), text.count(token)
                if got != expected:
                    raise ValueError(
                        f"{token} tokens of row {row} after truncation: got {got}, expected {expected}: an image "
                        f"cannot be cut; shorten the text or raise max_length"
                    )
            length = len(ids) - ids.count(self.tokenizer.pad_token_id)
            if length > limit:
                raise ValueError(
                    f"prompt of row {row}: got {length} tokens, expected at most {limit}, the context of the language "
                    f"model (tokenizer.model_max_length); shorten it, or pass truncation=True"
                )

    def _refuse_special_tokens(self, text: str) -> None:
        """Refuse a text part that would be read as more than text."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        if typed := sorted(token for token in {*special, VIDEO_TOKEN} if token in text):
            raise ValueError(
                f"text part {text[:80]!r}: got special tokens {typed}, expected plain text (raw `text=` and chat "
                f"templates may contain them)"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "EmuProcessor":
        """Load from a folder or the Hub; see `ProcessorMixin.from_pretrained`.

        This class is all the code that is needed: none of the repository's runs, nor is it asked for, unless
        `trust_remote_code` is passed.
        """
        kwargs.setdefault("trust_remote_code", False)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What the tokenizer reads in place of an image's mark; the same for every image."""
        return IMAGE_START_TOKEN + IMAGE_TOKEN * self.num_image_tokens + IMAGE_END_TOKEN

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Write a conversation in the form of `chat_template`; see `ProcessorMixin.apply_chat_template`.

        Raises:
            ValueError: besides, if a message of the user or the assistant contains a special token. A message with
                the role "system" may, since the published ones do.
        """
        if not conversation:
            raise ValueError("conversation: got no messages, expected at least one")
        is_batched = isinstance(conversation[0], list | tuple)
        for message in itertools.chain.from_iterable(conversation) if is_batched else conversation:
            content = message.get("content") or ""
            if message.get("role") == "system":
                continue
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for is_text, run in itertools.groupby(parts, key=is_text_part):
                if is_text:
                    self._refuse_special_tokens("".join(prepare_part(part)["text"] for part in run))
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def count_tokens(self, text: str, media: Sequence[dict[str, Any]]) -> int:
        """How many ids a text has when its images and videos are in it; no pixel is looked at.

        Args:
            text: with a mark for each image and video.
            media: the parts that the marks stand for, in reading order; videos are lists of frames.
        """
        frames = [part["video"] if part["type"] == "video" else [part["image"]] for part in media]
        for part, images in zip(media, frames, strict=True):
            if part["type"] == "video":
                text = text.replace(VIDEO_TOKEN, IMAGE_TOKEN * len(images), 1)
        # The text has one token of each image; N slots stand between two others.
        return len(self.tokenizer(text)["input_ids"]) + sum(map(len, frames)) * (self.num_image_tokens + 1)

    def encode_candidates(self, candidates: Sequence[str]) -> list[list[int]]:
        """Ids of answers to rank after a prompt: each encoded by itself, without `<s>`.

        Raises:
            ValueError: if a candidate is no text or has no tokens.

        Source:
            baaivision/Emu, Emu1, VisDial evaluation.
        """
        for index, candidate in enumerate(candidates):
            if not isinstance(candidate, str) or not candidate:
                raise ValueError(f"candidate {index}: got {candidate!r}, expected a text")
        return self.tokenizer(list(candidates), add_special_tokens=False)["input_ids"]

    def decode_documents(self, outputs: Any, prompt_length: int) -> list[list[dict[str, Any]]]:
        """Generated text and images as documents, one per row.

        Args:
            outputs: ids `(batch, length)` of text generation, or an `EmuGenerateOutput`.
            prompt_length: columns of the prompt, `inputs["input_ids"].shape[1]`, which are left out.

        Returns:
            Per row a list of parts `{"type": "text", "text": ...}` and `{"type": "image", "image_embeds": ...}`,
            the embeddings `(num_image_tokens, hidden_size)`. An image that generation cut short has none and is left
            out, with a warning.

        Raises:
            ValueError: if images and embeddings of a row do not match in number.
        """
        sequences, image_embeds = outputs, defaultdict(list)
        if not isinstance(outputs, torch.Tensor):
            sequences = outputs.sequences
            for row, embeds in zip(outputs.image_rows.tolist(), outputs.image_embeds, strict=True):
                image_embeds[row].append(embeds)
        return [
            self._decode_row(row, ids, image_embeds[row])
            for row, ids in enumerate(sequences[:, prompt_length:].tolist())
        ]

    def _decode_row(self, row: int, ids: list[int], image_embeds: list[torch.Tensor]) -> list[dict[str, Any]]:
        """One document of `decode_documents`."""
        runs = [
            (is_slot, list(run)) for is_slot, run in itertools.groupby(ids, key=lambda i: i == self.image_token_id)
        ]
        num_images = sum(1 for is_slot, run in runs if is_slot and len(run) == self.num_image_tokens)
        if num_images != len(image_embeds):
            raise ValueError(
                f"generated images of row {row}: got {len(image_embeds)} embeddings, expected {num_images}, one per "
                f"image among the ids after prompt_length"
            )
        parts: list[dict[str, Any]] = []
        remaining = iter(image_embeds)
        for is_slot, run in runs:
            if not is_slot:
                if text := self.tokenizer.decode(run, skip_special_tokens=True):
                    parts.append({"type": "text", "text": text})
            elif len(run) == self.num_image_tokens:
                parts.append({"type": "image", "image_embeds": next(remaining)})
            else:
                warnings.warn(
                    f"row {row}: an image of {len(run)} slots out of {self.num_image_tokens} was cut short and is "
                    f"left out; raise max_new_tokens",
                    stacklevel=3,
                )
        return parts

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Slots per image, for servers that reserve room: the same for every size."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def is_text_part(part: dict[str, Any]) -> bool:
    """Whether a part of a document or message is text."""
    return part.get("type") == "text"


def is_given(media: Any) -> bool:
    """Whether a call passes something, and not None or an empty list."""
    return media is not None and not (isinstance(media, list | tuple) and len(media) == 0)


EmuProcessor.register_for_auto_class()
