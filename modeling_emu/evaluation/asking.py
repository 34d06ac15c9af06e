"""How a model is asked: many prompts at once, greedily; texts, pictures and documents as answers.

What is asked and what is right is the business of each benchmark.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import BatchFeature

from ..pipeline_emu import Document, EmuPipeline
from ..processing_emu import EmuProcessor


TEXTS_AT_ONCE = 50
PICTURES_AT_ONCE = 32
NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 1.0  # none: it made the small model add objects, and colours run

Entry = TypeVar("Entry")
Conversation = list[dict[str, Any]]


def split_batches(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    """Stretches of at most so many entries."""
    for first in range(0, len(entries), size):
        yield entries[first : first + size]


def encode_documents(processor: EmuProcessor, documents: Sequence[Document]) -> BatchFeature:
    """A batch of plain documents, without a chat template; of a video every frame is given."""
    return processor(documents=list(documents), num_frames=None, padding=True, return_tensors="pt")


def encode_conversations(processor: EmuProcessor, conversations: Sequence[Conversation]) -> BatchFeature:
    """A batch of conversations in the processor's chat template, up to where the assistant speaks next; of a video every
    frame is given."""
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": None, "padding": True},
    )


def generate_texts(pipeline: EmuPipeline, inputs: BatchFeature, max_new_tokens: int) -> list[str]:
    """Continue a batch of encoded prompts with text; without special tokens, and without white space around it."""
    model = pipeline.multimodal_encoder
    ids = model.generate(
        **inputs.to(model.device, model.dtype), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
    )
    texts = pipeline.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def continue_documents(pipeline: EmuPipeline, documents: Sequence[Document], max_new_tokens: int) -> list[str]:
    """The text that follows each document, of at most so many ids."""
    texts = []
    for batch in split_batches(documents, TEXTS_AT_ONCE):
        texts += generate_texts(pipeline, encode_documents(pipeline.processor, batch), max_new_tokens)
    return texts


def answer_conversations(
    pipeline: EmuPipeline, conversations: Sequence[Conversation], max_new_tokens: int
) -> list[str]:
    """The assistant's next message in each conversation, of at most so many ids.

    Args:
        conversations: messages `{"role": "user" | "assistant", "content": parts}`, the last one the user's.
    """
    texts = []
    for batch in split_batches(conversations, TEXTS_AT_ONCE):
        texts += generate_texts(pipeline, encode_conversations(pipeline.processor, batch), max_new_tokens)
    return texts


def draw_pictures(pipeline: EmuPipeline, documents: Sequence[Document], seeds: Sequence[int]) -> list[Image.Image]:
    """The picture that follows each document, its noise from the seed of its own."""
    embeds = [pipeline.regress_embeds(list(batch)) for batch in split_batches(documents, TEXTS_AT_ONCE)]
    pictures: list[Image.Image] = []
    batches = zip(torch.cat(embeds).split(PICTURES_AT_ONCE), split_batches(seeds, PICTURES_AT_ONCE), strict=True)
    for prompt_embeds, batch_seeds in batches:
        drawn: Any = pipeline(
            prompt_embeds=prompt_embeds,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(seed) for seed in batch_seeds],
        )
        pictures += drawn.images
    return pictures


def continue_with_pictures(
    pipeline: EmuPipeline, documents: Sequence[Document], seed: int, max_new_tokens: int, max_images: int
) -> list[Document]:
    """The texts and pictures that follow each document, where the model starts a picture itself.

    Args:
        seed: of all noise.
        max_new_tokens, max_images: at which a continuation is cut off.
    """
    generator = torch.Generator().manual_seed(seed)
    continued: list[Document] = []
    for batch in split_batches(documents, TEXTS_AT_ONCE):
        continuations: Any = pipeline.generate_document(
            list(batch),
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            do_sample=False,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generator,
            pictures_at_once=PICTURES_AT_ONCE,
        )
        continued += continuations
    return continued
