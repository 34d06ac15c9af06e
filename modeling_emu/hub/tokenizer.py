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
"""The tokenizer of a repository: Emu's tokens, the published way with white space, and learning a small vocabulary."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ..configuration_emu import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN


PAD_TOKEN = "[PAD]"
USER_TOKEN = "[USER]"
ASSISTANT_TOKEN = "[ASSISTANT]"
LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
WORD_START = "\u2581"


def get_emu_tokens(variant: str) -> tuple[str, ...]:
    """The tokens that Emu adds to a language model, in the order of their ids.

    Args:
        variant: "instruct" (Emu-I) has the marks of the two speakers besides.
    """
    tokens = (PAD_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN)
    return (*tokens, USER_TOKEN, ASSISTANT_TOKEN) if variant == "instruct" else tokens


def set_text_rules(backend: Tokenizer) -> None:
    """Let a byte-pair tokenizer read and write white space as LLaMA's sentencepiece does."""
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_START), normalizers.Replace(" ", WORD_START)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def add_tokens_and_wrap(backend: Tokenizer, variant: str, model_max_length: int) -> PreTrainedTokenizerFast:
    """Add the special tokens of LLaMA and Emu after a vocabulary that holds LLaMA's, and make it transformers' class.

    A special token drops the white space on both sides, as the published tokenizer does.
    """
    added_tokens = [
        AddedToken(token, special=True, normalized=False, lstrip=True, rstrip=True)
        for token in (*LLAMA_TOKENS, *get_emu_tokens(variant))
    ]
    backend.add_special_tokens(added_tokens)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    unknown, begin, end, pad, *others = added_tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=others,
        padding_side="left",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Learn the pieces of these texts. What is not in them is written in bytes, so no text is unknown.

    Args:
        vocab_size: most entries before Emu's tokens, of which 259 are LLaMA's and the bytes.
        model_max_length: longest sequence of the language model, in tokens.

    Returns:
        A tokenizer with the tokens of the variant "pretrain", padding on the left.

    Raises:
        ValueError: if `vocab_size` has no room for pieces.
    """
    fixed = [*LLAMA_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if vocab_size <= len(fixed):
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected more than {len(fixed)}, the bytes and {LLAMA_TOKENS}"
        )
    learner = Tokenizer(BPE())
    set_text_rules(learner)
    # No piece reaches over a word's end, and punctuation stands by itself.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORD_START, "merged_with_next"), pre_tokenizers.Punctuation()]
    )
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    )
    # What it learned, without its special tokens: the bytes are pieces, and no mark that a user may type.
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(
        BPE(vocab=learned["vocab"], merges=merges, unk_token=LLAMA_TOKENS[0], fuse_unk=True, byte_fallback=True)
    )
    set_text_rules(backend)
    return add_tokens_and_wrap(backend, "pretrain", model_max_length)
