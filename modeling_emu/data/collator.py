"""EmuDataCollator: documents to the tensors of one forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing_emu import EmuProcessor
from .encoding import IGNORED, EmuSampleEncoder, EncodedSample
from .samples import Sample


class EmuDataCollator:
    """A batch of documents, one per row and padded on the right, or packed, several per row.

    Works with any DataLoader and with transformers' Trainer, which must be told `remove_unused_columns=False` and
    `accelerator_config={"dispatch_batches": False}`: it would cut `pixel_values`, which has a row per image, to the number
    of documents.

    Args:
        processor: encodes `Sample`s; `EncodedSample`s come ready.
        return_keys: give the documents' `keys` besides, for messages; a model does not take them.
    """

    def __init__(self, processor: EmuProcessor, return_keys: bool = False):
        self.encoder = EmuSampleEncoder(processor)
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.return_keys = return_keys

    def __call__(self, features: Sequence[Sample | EncodedSample | list[EncodedSample]]) -> dict[str, Any]:
        """Collate one row per feature.

        Args:
            features: all documents, or all lists of documents, which makes the packed form.

        Returns:
            `input_ids` and `labels`, `(rows, length)`, long, padded with `[PAD]` and -100; `pixel_values`,
            `(num_images, 3, height, width)`, float32, all images in reading order, where there are any. Padded form:
            `attention_mask`, `(rows, length)`, long. Packed form: `position_ids`, `(rows, length)`, long, which begin
            at 0 with every document, padding included, and `use_cache`, False: with neither mask nor cache, transformers
            reads from the positions what may attend to what.

        Raises:
            ValueError: if there are no features, or of both kinds.
        """
        is_packed = [isinstance(feature, list) for feature in features]
        if not features or any(is_packed) != all(is_packed):
            raise ValueError(f"features: got {sum(is_packed)} packed rows of {len(features)}, expected all or none")
        rows = [
            [self.encode(document) for document in (feature if isinstance(feature, list) else [feature])]
            for feature in features
        ]
        ids = [torch.cat([document.input_ids for document in row]) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(
                [torch.cat([document.labels for document in row]) for row in rows],
                batch_first=True,
                padding_value=IGNORED,
            ),
        }
        length = batch["input_ids"].shape[1]
        if is_packed[0]:
            batch["position_ids"] = torch.stack([make_position_ids(row, length) for row in rows])
            batch["use_cache"] = False
        else:
            batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        pixels = [doc.pixel_values for row in rows for doc in row if doc.pixel_values is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if self.return_keys:
            batch["keys"] = [document.key for row in rows for document in row]
        return batch

    def encode(self, document: Sample | EncodedSample) -> EncodedSample:
        """A document as tensors, whole: the encoder of a mixture splits what is too long, a collator cannot."""
        return document if isinstance(document, EncodedSample) else self.encoder.encode(document)


def make_position_ids(row: Sequence[EncodedSample], length: int) -> torch.Tensor:
    """Positions of a packed row `(length,)`: from 0 in every document, and in the padding after the last."""
    lengths = [len(document.input_ids) for document in row]
    return torch.cat([torch.arange(count) for count in (*lengths, length - sum(lengths))])
