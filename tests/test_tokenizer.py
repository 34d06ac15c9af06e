"""The converted tokenizer gives the published ids, for the goldens' vocabulary and for others."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversion.tokenizer import add_emu_tokens, build_tokenizer


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
VARIANTS = ("pretrain", "instruct")
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a red ball lies on the wooden table near the window",
    "there are two dogs and three pandas in the picture",
    "what is the man doing with the umbrella in the rain",
]


def read_golden(variant: str) -> dict:
    return json.loads((GOLDENS / variant / "golden.json").read_text(encoding="utf-8"))


def reload(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def train_llama_config(folder: Path, **kwargs) -> Path:
    """A `llama_config` folder with a sentencepiece model trained here."""
    folder.mkdir(parents=True)
    settings = dict(vocab_size=340, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    settings |= dict(remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2) | kwargs
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10), model_prefix=str(folder / "tokenizer"), **settings
    )
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(variant: str) -> PreTrainedTokenizerFast:
    return build_tokenizer(GOLDENS / variant / "llama_config", variant)


@pytest.mark.parametrize("index", range(10))
def test_golden_ids_before_and_after_saving(tokenizer, variant, index, tmp_path):
    entry = read_golden(variant)["tokenization"][index]
    assert tokenizer(entry["text"])["input_ids"] == entry["input_ids"]
    assert reload(tokenizer, tmp_path)(entry["text"])["input_ids"] == entry["input_ids"]


def test_every_golden_entry_is_covered(variant):
    assert len(read_golden(variant)["tokenization"]) == 10


def test_ids_of_added_tokens_follow_the_vocabulary(tokenizer, variant, tmp_path):
    added = ["[PAD]", "[IMG]", "[/IMG]", "<image>"] + ["[USER]", "[ASSISTANT]"] * (variant == "instruct")
    for each in (tokenizer, reload(tokenizer, tmp_path)):
        assert each.convert_tokens_to_ids(added) == list(range(1000, 1000 + len(added)))
        assert len(each) == read_golden(variant)["vocab_size"]
        assert (each.unk_token_id, each.bos_token_id, each.eos_token_id, each.pad_token_id) == (0, 1, 2, 1000)
        assert each.padding_side == "left"
        assert each.model_max_length == 2048
        assert each.model_input_names == ["input_ids", "attention_mask"]


def test_saving_again_changes_nothing(tokenizer, tmp_path):
    first = reload(tokenizer, tmp_path / "first")
    first.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()


def random_text(generator: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz     ABCé世🙂\n\t.,'0123456789▁"
    words = [generator.choice(CORPUS).split()[generator.randrange(8)] for _ in range(4)]
    noise = "".join(generator.choices(letters, k=generator.randrange(12)))
    return generator.choice(["", " ", "  "]) + " ".join(words) + noise + " " * generator.randrange(3)


def test_text_is_encoded_as_by_sentencepiece(tokenizer, variant):
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(GOLDENS / variant / "llama_config/tokenizer.model")
    )
    generator = random.Random(0)
    texts = ["", " ", "\n", *(random_text(generator) for _ in range(500))]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == reference.encode(texts)


def test_text_beside_a_special_token_is_encoded_by_itself(tokenizer):
    generator = random.Random(1)
    for _ in range(50):
        left, right = random_text(generator).strip(), random_text(generator).strip()
        alone = tokenizer([left, right], add_special_tokens=False)["input_ids"]
        together = tokenizer(f"{left} <image>  {right}", add_special_tokens=False)["input_ids"]
        assert together == [*alone[0], tokenizer.convert_tokens_to_ids("<image>"), *alone[1]]


def test_decoding_gives_the_text_back(tokenizer):
    for text in (*CORPUS, "héllo  wörld\n\nnew line", "你好 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_another_vocabulary(tmp_path):
    folder = train_llama_config(tmp_path / "llama_config")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = build_tokenizer(folder, "instruct")
    assert tokenizer.convert_tokens_to_ids("[PAD]") == reference.get_piece_size()
    assert len(tokenizer) == reference.get_piece_size() + 6
    assert tokenizer.model_max_length == 77
    texts = [*CORPUS, "unseen wörds 世界"]
    for each in (tokenizer, reload(tokenizer, tmp_path / "saved")):
        assert each(texts, add_special_tokens=False)["input_ids"] == reference.encode(texts)


def test_a_missing_tokenizer_is_an_error(tmp_path):
    shutil.copy(GOLDENS / "pretrain/llama_config/config.json", tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.model, expected a sentencepiece model"):
        build_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no model", b"\x00" * 100])
def test_a_broken_tokenizer_is_an_error(tmp_path, content):
    shutil.copy(GOLDENS / "pretrain/llama_config/config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        build_tokenizer(tmp_path)


def test_a_truncated_tokenizer_is_an_error(tmp_path):
    shutil.copytree(GOLDENS / "pretrain/llama_config", tmp_path / "cut")
    model_file = tmp_path / "cut/tokenizer.model"
    model_file.chmod(0o644)
    model_file.write_bytes(model_file.read_bytes()[:5001])
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        build_tokenizer(tmp_path / "cut")


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"max_position_embeddings": "long"}'])
def test_a_broken_config_is_an_error(tmp_path, config):
    shutil.copy(GOLDENS / "pretrain/llama_config/tokenizer.model", tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json"):
        build_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        dict(model_type="unigram"),
        dict(add_dummy_prefix=False),
        dict(unk_id=2, bos_id=0, eos_id=1),
    ],
    ids=["unigram", "no prefix", "other order"],
)
def test_a_model_of_another_kind_is_an_error(tmp_path, kind):
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        build_tokenizer(train_llama_config(tmp_path / "llama_config", **kind))


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as other language models have, where [IMG] is a word already."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "[IMG]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_adding_emus_tokens_to_another_tokenizer(byte_tokenizer, tmp_path):
    length, text = len(byte_tokenizer), "a red ball, and  spaces "
    before = byte_tokenizer(text)["input_ids"]
    start = byte_tokenizer.convert_tokens_to_ids("[IMG]")
    assert add_emu_tokens(byte_tokenizer, "instruct") == 5
    for each in (byte_tokenizer, reload(byte_tokenizer, tmp_path)):
        assert each(text)["input_ids"] == before
        assert each.convert_tokens_to_ids("[IMG]") == start
        assert each.pad_token == "[PAD]"
        new = ["[PAD]", "[/IMG]", "<image>", "[USER]", "[ASSISTANT]"]
        assert each.convert_tokens_to_ids(new) == list(range(length, length + 5))
        ids = each("a red[IMG]<image>[/IMG] ball")["input_ids"]
        assert ids == [*each("a red")["input_ids"], start, length + 2, length + 1, *each(" ball")["input_ids"]]
        assert each.decode(ids, skip_special_tokens=True) == "a red ball"
        assert each.padding_side == "left"


def test_adding_emus_tokens_twice_adds_nothing(byte_tokenizer):
    add_emu_tokens(byte_tokenizer)
    vocabulary = byte_tokenizer.get_vocab()
    assert add_emu_tokens(byte_tokenizer) == 0
    assert byte_tokenizer.get_vocab() == vocabulary


def test_a_padding_token_is_kept(byte_tokenizer):
    byte_tokenizer.pad_token = "<|end|>"
    assert add_emu_tokens(byte_tokenizer) == 2
    assert byte_tokenizer.pad_token == "<|end|>"
    assert "[PAD]" not in byte_tokenizer.get_vocab()
