"""Documents to token ids, labels and pixels, one by one, each within a number of tokens."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..configuration_emu import IMAGE_TOKEN
from ..processing_emu import VIDEO_TOKEN, EmuProcessor
from .samples import Document, Sample


IGNORED = -100
MARKS = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}


@dataclass(frozen=True)
class EncodedSample:
    """One document as tensors.

    Args:
        input_ids: `(length,)`, long.
        labels: `(length,)`, long: the ids to learn, -100 elsewhere, and at the first position, which nothing predicts.
        pixel_values: `(num_images, 3, height, width)`, float32, in reading order; None without images.
        key: as in `Sample`; a piece of a document that was split has its number added.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None
    key: str


class EmuSampleEncoder:
    """Samples to `EncodedSample`s.

    A document to learn as a whole gets `</s>` at its end, and all of its text is learned; a conversation is written in
    the processor's chat template, and its answers are learned, each with the `</s>` after it. What is longer than
    `max_length` is split where a part ends, or, in a conversation without images, where an answer ends; a part or a
    conversation with images that is too long by itself is refused, since neither can be cut without loss.

    Args:
        processor: its chat template must mark the answers where there are conversations.
        max_length: most tokens of an `EncodedSample`; None is the tokenizer's `model_max_length`.
    """

    def __init__(self, processor: EmuProcessor, max_length: int | None = None):
        longest = processor.tokenizer.model_max_length
        if max_length is not None and not 0 < max_length <= longest:
            raise ValueError(
                f"max_length: got {max_length}, expected 1 to {longest}, the tokenizer's model_max_length"
            )
        self.processor = processor
        self.max_length = longest if max_length is None else max_length

    def __call__(self, sample: Sample) -> list[EncodedSample]:
        """The sample whole, or in pieces.

        Raises:
            ValueError: if a piece is too long, or its text contains special tokens.
        """
        pieces = self.split(sample)
        if len(pieces) == 1:
            return [self.encode(sample)]
        return [self.encode(replace(piece, key=f"{sample.key}#{index}")) for index, piece in enumerate(pieces)]

    def encode(self, sample: Sample) -> EncodedSample:
        """The sample whole."""
        if sample.answers is None:
            inputs = self.processor(documents=[sample.document], num_frames=None, return_tensors="pt")
            end = torch.tensor([self.processor.tokenizer.eos_token_id])
            input_ids = torch.cat([inputs["input_ids"][0], end])
            labels = input_ids.clone()
        else:
            inputs = self.processor.apply_chat_template(
                make_messages(sample),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                return_tensors="pt",
                processor_kwargs={"num_frames": None},
            )
            input_ids = inputs["input_ids"][0]
            labels = input_ids.masked_fill(inputs["assistant_masks"][0] == 0, IGNORED)
            if (labels == IGNORED).all():
                raise ValueError(
                    "answers: got none in the chat template's mask, expected {% generation %} around them"
                )
        labels[0] = IGNORED
        return EncodedSample(input_ids, labels, inputs.get("pixel_values"), sample.key)

    def count_tokens(self, sample: Sample) -> int:
        """The length that `encode` gives, without the pixels."""
        media = [part for part in sample.document if part["type"] != "text"]
        if sample.answers is not None:
            return self.processor.count_tokens(self.processor.apply_chat_template(make_messages(sample)), media)
        return self.processor.count_tokens("".join(map(get_marked_text, sample.document)), media) + 1  # </s>

    def count_document_tokens(self, document: Document) -> int:
        """`count_tokens` of a document to learn as a whole, which is how stretches are measured."""
        return self.count_tokens(Sample(document, ""))

    def split(self, sample: Sample) -> list[Sample]:
        """Neighbouring parts, as many in each piece as have room."""
        length = self.count_tokens(sample)
        if length <= self.max_length:
            return [sample]
        has_media = any(part["type"] != "text" for part in sample.document)
        units = get_units(sample)
        if len(units) == 1 or (sample.answers is not None and has_media):
            raise ValueError(f"document: got {length} tokens that cannot be split, expected at most {self.max_length}")
        pieces = []
        while units:
            fitting, too_many = 0, len(units) + 1
            while too_many - fitting > 1:
                middle = (fitting + too_many) // 2
                if self.count_tokens(join_units(sample, units[:middle])) <= self.max_length:
                    fitting = middle
                else:
                    too_many = middle
            if fitting == 0:
                length = self.count_tokens(join_units(sample, units[:1]))
                raise ValueError(f"part of a document: got {length} tokens, expected at most {self.max_length}")
            pieces.append(join_units(sample, units[:fitting]))
            units = units[fitting:]
        return pieces


def get_marked_text(part: dict[str, Any]) -> str:
    """A part as text, with a mark for an image or a video."""
    return part["text"] if part["type"] == "text" else MARKS[part["type"]]


def get_units(sample: Sample) -> list[list[tuple[dict[str, Any], bool]]]:
    """What is not to be split: each part, or each question with its answer; with each part whether it is an answer."""
    if sample.answers is None:
        return [[(part, False)] for part in sample.document]
    units: list[list[tuple[dict[str, Any], bool]]] = []
    was_answer = True
    for index, part in enumerate(sample.document):
        is_answer = index in sample.answers
        if was_answer and not is_answer:
            units.append([])
        units[-1].append((part, is_answer))
        was_answer = is_answer
    return units


def join_units(sample: Sample, units: list[list[tuple[dict[str, Any], bool]]]) -> Sample:
    """A sample of some of its units."""
    parts = [entry for unit in units for entry in unit]
    answers = None
    if sample.answers is not None:
        answers = tuple(index for index, (_, is_answer) in enumerate(parts) if is_answer)
    return replace(sample, document=[part for part, _ in parts], answers=answers)


def make_messages(sample: Sample) -> list[dict[str, Any]]:
    """A conversation in the form of chat templates: neighbouring parts of the same speaker are one message."""
    answers = sample.answers or ()
    messages: list[dict[str, Any]] = []
    if sample.system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": sample.system}]})
    for is_answer, run in itertools.groupby(enumerate(sample.document), key=lambda entry: entry[0] in answers):
        messages.append({"role": "assistant" if is_answer else "user", "content": [part for _, part in run]})
    return messages
