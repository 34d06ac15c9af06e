"""The tokenizer that is learned for a small model."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_emu.hub.tokenizer import train_tokenizer


TEXTS = ["a large red circle at the top left.", "what colour is the circle?"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 20, vocab_size=400, model_max_length=64)


def test_known_words_are_single_pieces_and_no_piece_crosses_them(tokenizer):
    assert tokenizer.tokenize("a large red circle.") == ["▁a", "▁large", "▁red", "▁circle", "."]
    inner = [piece for piece in tokenizer.get_vocab() if "▁" in piece[1:]]
    assert not inner


@pytest.mark.parametrize("text", ["Zürich, 東京!", "a  red\n\ncircle", "<0x41> </ s>"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_white_space_beside_an_image_is_dropped_as_in_the_published_tokenizer(tokenizer):
    assert tokenizer("a <image> red")["input_ids"] == tokenizer("a<image>red")["input_ids"]


def test_it_is_the_same_after_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a large red <image> Zürich [IMG]"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.padding_side == "left"
    assert again.model_max_length == 64


def test_no_room_for_pieces_is_refused():
    with pytest.raises(ValueError, match="vocab_size: got 259, expected more than 259"):
        train_tokenizer(TEXTS, vocab_size=259, model_max_length=64)
