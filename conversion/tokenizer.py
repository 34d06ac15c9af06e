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
"""LLaMA-1's sentencepiece tokenizer with Emu's tokens, as one fast tokenizer that gives the published ids.

The published code reads sentencepiece through a "legacy" handling: the text after every special token is encoded as
if it began a text, and white space beside a special token is dropped. A normalizer that prepends the word-start mark
and special tokens that strip both sides do the same.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from modeling_emu.hub.tokenizer import (
    LLAMA_TOKENS,
    PAD_TOKEN,
    WORD_START,
    add_tokens_and_wrap,
    get_emu_tokens,
    set_text_rules,
)


class Piece(NamedTuple):
    """One entry of a sentencepiece vocabulary; its id is its place in the list."""

    text: str
    score: float


def build_tokenizer(llama_config: str | Path, variant: str = "pretrain") -> PreTrainedTokenizerFast:
    """Emu's tokenizer from a folder with LLaMA's `tokenizer.model` and `config.json`.

    Args:
        llama_config: the folder. `config.json` gives the longest prompt, `max_position_embeddings`. Its `vocab_size`
            is not looked at: compare `len(tokenizer)` with the rows of a checkpoint's embedding instead.
        variant: "pretrain" or "instruct"; any other name has the tokens of "pretrain".

    Returns:
        A tokenizer that pads on the left. The ids of the added tokens follow the vocabulary of `tokenizer.model`.

    Raises:
        ValueError: if a file is missing or unreadable, or if `tokenizer.model` is not of LLaMA's kind (byte-pair
            encoding, word-start prefix, `<unk> <s> </s>` first), which this form cannot reproduce.
    """
    folder = Path(llama_config)
    model_max_length = read_max_length(folder / "config.json")
    model_file = folder / "tokenizer.model"
    reference = read_sentencepiece(model_file)
    pieces = [Piece(reference.id_to_piece(i), reference.get_score(i)) for i in range(reference.get_piece_size())]
    if tuple(piece.text for piece in pieces[: len(LLAMA_TOKENS)]) != LLAMA_TOKENS:
        raise ValueError(
            f"first pieces of {model_file}: got {[piece.text for piece in pieces[: len(LLAMA_TOKENS)]]}, "
            f"expected {list(LLAMA_TOKENS)}"
        )

    backend = build_backend(pieces)
    verify_backend(backend, reference, model_file)
    return add_tokens_and_wrap(backend, variant, model_max_length)


def add_emu_tokens(tokenizer: PreTrainedTokenizerFast, variant: str = "pretrain") -> int:
    """Add Emu's tokens to the fast tokenizer of another language model, in place.

    A token that the tokenizer has already keeps its id and becomes special. A padding token is added only where there
    is none. White space beside the new tokens stays text, as the language model is used to.

    Args:
        tokenizer: any fast tokenizer. It pads on the left afterwards.
        variant: "pretrain" or "instruct".

    Returns:
        The number of ids added after the old ones.

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, expected a fast tokenizer")
    length = len(tokenizer)
    settings = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    for name, value in settings.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # what is saved
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    tokens = [AddedToken(token, special=True, normalized=False) for token in get_emu_tokens(variant)[1:]]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    return len(tokenizer) - length


def read_max_length(config_file: Path) -> int:
    """The longest sequence of the language model, in tokens."""
    try:
        max_length = json.loads(config_file.read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{config_file}: got {error}, expected the configuration of a language model") from error
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_position_embeddings of {config_file}: got {max_length}, expected a positive integer")
    return max_length


def read_sentencepiece(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    """The sentencepiece model in a file.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    if not model_file.is_file():
        raise ValueError(f"tokenizer: got no file {model_file}, expected a sentencepiece model")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"tokenizer: got an unreadable {model_file} ({error}), expected a sentencepiece model"
        ) from error


def build_backend(pieces: list[Piece]) -> Tokenizer:
    """A byte-pair tokenizer that encodes text as sentencepiece does, without any special token."""
    backend = Tokenizer(
        BPE(
            vocab={piece.text: index for index, piece in enumerate(pieces)},
            merges=get_merges(pieces),
            unk_token=LLAMA_TOKENS[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    set_text_rules(backend)
    return backend


def get_merges(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """All splits of a piece into two pieces, the best-scored piece first, equal scores in the order of ids."""
    pieces = list(pieces)
    vocabulary = {piece.text for piece in pieces}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        splits = ((piece.text[:position], piece.text[position:]) for position in range(1, len(piece.text)))
        merges.extend((left, right) for left, right in splits if left in vocabulary and right in vocabulary)
    return merges


def verify_backend(backend: Tokenizer, reference: sentencepiece.SentencePieceProcessor, model_file: Path) -> None:
    """Encode every piece's own text both ways; a model of another kind (unigram, no prefix) shows here."""
    texts = [reference.id_to_piece(index).replace(WORD_START, " ") for index in range(reference.get_piece_size())]
    for text, encoding in zip(texts, backend.encode_batch(texts), strict=True):
        if encoding.ids != (expected := reference.encode(text)):
            raise ValueError(
                f"ids of {text!r}: got {encoding.ids}, expected {expected} as {model_file} gives; only a model of "
                f"LLaMA's kind (byte-pair encoding, word-start prefix) can be converted"
            )
