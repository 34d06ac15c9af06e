"""A new Emu from its parts: what is kept keeps its bits, what is new is what is said, and it loads as any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from PIL import Image
from published import Sizes, make_state_dict, write_sizes
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from conversion.assemble_emu import main as assemble_emu
from conversion.tokenizer import Piece, build_backend, read_sentencepiece
from modeling_emu import EmuForMultimodalGeneration, EmuProcessor
from modeling_emu.hub.repository import check_repository


DECODER = GOLDENS / "pretrain" / "pretrain"
HIDDEN = 40
SIZES = Sizes(num_image_tokens=5)
NEW_TOKENS = ["[PAD]", "[IMG]", "[/IMG]", "<image>"]


def make_llama(folder: Path, num_rows: int, tied: bool = False) -> None:
    """A LLaMA with a tokenizer of its own."""
    config = LlamaConfig(
        vocab_size=num_rows,
        hidden_size=HIDDEN,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    model = read_sentencepiece(GOLDENS / "pretrain" / "llama_config" / "tokenizer.model")
    pieces = [Piece(model.id_to_piece(index), model.get_score(index)) for index in range(model.get_piece_size())]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_backend(pieces), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def make_gpt2(folder: Path) -> None:
    """Another kind of language model: other parameter names, tied rows, byte-level tokenizer without padding."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=256, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="!", eos_token="!").save_pretrained(folder)


def make_other(folder: Path, config: PreTrainedConfig) -> None:
    """A language model of any kind, all of whose numbers count: biases begin as zero."""
    make_gpt2(folder)  # for its tokenizer
    torch.manual_seed(3)
    causal_lm = AutoModelForCausalLM.from_config(config)
    for parameter in causal_lm.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    causal_lm.save_pretrained(folder)


SMALL = dict(
    vocab_size=256,
    hidden_size=HIDDEN,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=5,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


@pytest.fixture
def vision(tmp_path):
    """An EVA-CLIP checkpoint: vision tower, text tower, temperature."""
    state_dict = {name: tensor for name, tensor in make_state_dict(SIZES).items() if name.startswith("visual.")}
    text = {"text.token_embedding.weight": torch.ones(4, 4), "logit_scale": torch.ones(())}
    torch.save(state_dict | text, tmp_path / "eva.pt")
    return tmp_path / "eva.pt"


def assemble(folder: Path, vision: Path, *options: str, output: str = "output") -> Path:
    sizes = folder / "sizes"
    names = (
        write_sizes(sizes, SIZES)[:2]
        if not sizes.exists()
        else [
            f"--model-config={sizes / 'Emu.json'}",
            f"--causal-former-config={sizes / 't5.json'}",
        ]
    )
    parts = [f"--language-model={folder / 'lm'}", f"--vision={vision}", f"--decoder={DECODER}"]
    assemble_emu([*parts, *names, f"--output={folder / output}", *options])
    return folder / output


@pytest.mark.parametrize(
    "make",
    [
        lambda f: make_llama(f, 1000),
        lambda f: make_llama(f, 1024, tied=True),
        make_gpt2,
        lambda f: make_other(f, Qwen2Config(**SMALL)),
        lambda f: make_other(f, OPTConfig(**SMALL, ffn_dim=56, word_embed_proj_dim=HIDDEN)),
    ],
    ids=["llama", "tied and padded", "gpt2", "qwen2", "opt"],
)
def test_assembled_model_keeps_its_parts(make, vision, tmp_path):
    make(tmp_path / "lm")
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    folder = assemble(tmp_path, vision)
    check_repository(folder)
    model = EmuForMultimodalGeneration.from_pretrained(folder).eval()
    processor = EmuProcessor.from_pretrained(folder)

    # the language model reads old text as before
    input_ids = torch.arange(5, 25)[None]
    num_rows = old.get_input_embeddings().num_embeddings
    with torch.no_grad():
        logits, expected = model(input_ids=input_ids).logits, old(input_ids=input_ids).logits
    report = json.loads((folder / "assembly_report.json").read_text())
    num_old_tokens = min(len(processor.tokenizer) - report["tokens_added"], num_rows)
    assert torch.equal(logits[..., :num_old_tokens], expected[..., :num_old_tokens])
    assert model.get_input_embeddings().num_embeddings == max(num_rows, len(processor.tokenizer))

    # the new tokens' rows are the mean of the old ones, in embedding and head
    for get in ("get_input_embeddings", "get_output_embeddings"):
        rows, old_rows = (getattr(emu, get)().weight.detach() for emu in (model, old))
        mean = old_rows[:num_old_tokens].double().mean(0).to(rows.dtype)
        for token in NEW_TOKENS[-3:]:
            index = processor.tokenizer.convert_tokens_to_ids(token)
            assert index >= num_old_tokens
            assert torch.equal(rows[index], mean)

    # the vision tower is EVA-CLIP's
    eva = torch.load(vision)
    tower = model.model.vision_model
    assert torch.equal(tower.embeddings.class_embedding, eva["visual.cls_token"].to(model.dtype))
    assert torch.equal(tower.encoder.layers[1].mlp.fc2.weight, eva["visual.blocks.1.mlp.fc2.weight"].to(model.dtype))
    # and it works as a whole
    inputs = processor(text="<image>", images=[Image.radial_gradient("L")], return_tensors="pt")
    outputs = model.generate(**inputs.to(model.dtype), generation_mode="image")
    assert outputs.image_embeds.shape == (1, SIZES.num_image_tokens, HIDDEN)
    assert outputs.image_embeds.isfinite().all()


def test_report_says_what_is_random(vision, tmp_path):
    make_llama(tmp_path / "lm", 1000)
    folder = assemble(tmp_path, vision, "--num-image-tokens=7", "--seed=4", "--dtype=float32")
    report = json.loads((folder / "assembly_report.json").read_text())
    weights = load_file(folder / "model.safetensors")
    random = {name for name in weights if name.startswith(("model.causal_former.", "regression_head."))}
    assert set(report["random"]) == random | {
        f"model.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")
    }
    assert report["seed"] == 4
    assert report["tokens_added"] == len(NEW_TOKENS)
    assert weights["model.causal_former.queries"].shape[1] == 7
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (folder / "README.md").read_text() == (
        Path(__file__).parents[1] / "model_cards" / "emu-assembled.md"
    ).read_text()


def test_a_seed_gives_the_same_model(vision, tmp_path):
    make_llama(tmp_path / "lm", 1000)
    folders = [
        assemble(tmp_path, vision, f"--seed={seed}", output=name) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for file in ("model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        first, again, other = (load_file(folder / file) for folder in folders)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_unet_gets_new_projections_and_keeps_the_rest(vision, tmp_path):
    make_llama(tmp_path / "lm", 1000)
    folder = assemble(tmp_path, vision)
    old = torch.load(DECODER / "unet" / "diffusion_pytorch_model.bin")
    new = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert old.keys() == new.keys()
    renewed = {name for name in old if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))}
    assert set(json.loads((folder / "assembly_report.json").read_text())["random_in_unet"]) == renewed
    for name, tensor in new.items():
        if name in renewed:
            assert tensor.shape == (len(old[name]), HIDDEN)
            assert tensor.abs().max() <= HIDDEN**-0.5
            assert tensor.std().item() == pytest.approx((3 * HIDDEN) ** -0.5, rel=0.1)
        else:
            assert torch.equal(tensor, old[name])
    assert json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"] == HIDDEN


def refuse(folder: Path, vision: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        assemble(folder, vision, *options)
    assert not (folder / "output").exists()
    assert not list(folder.glob(".output*"))
    return str(stop.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(**SMALL),
        GraniteConfig(**SMALL, logits_scaling=8.0),
        CohereConfig(**SMALL),
        Gemma2Config(**SMALL, head_dim=8),
    ],
    ids=["bias: phi", "scaled: granite", "scaled: cohere", "capped: gemma2"],
)
def test_language_models_with_more_than_a_weight_in_the_head_are_refused(config, dtype, vision, tmp_path):
    make_other(tmp_path / "lm", config)
    message = refuse(tmp_path, vision, f"--dtype={dtype}")
    assert f"language model {config.model_type}: got logits that are not" in message


def test_a_damaged_language_model_is_refused(vision, tmp_path):
    make_llama(tmp_path / "lm", 1000)
    file = tmp_path / "lm" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for changes, message in (
        ({name: None}, f"missing keys: {name}"),
        ({"lm_head.weight": None}, "missing keys: lm_head.weight"),
        (
            {"model.layers.2.mlp.up_proj.weight": weights[name].clone()},
            "unexpected keys: model.layers.2.mlp.up_proj.weight",
        ),
        ({name: weights[name][:-1].clone()}, name),
        ({name: weights[name] * torch.nan}, f"{name}: got {weights[name].numel()} numbers that are NaN"),
    ):
        changed = {key: tensor for key, tensor in (weights | changes).items() if tensor is not None}
        save_file(changed, file, metadata={"format": "pt"})
        refusal = refuse(tmp_path, vision)
        assert refusal.startswith("error: language model")
        assert message in refusal
        assert len(refusal.splitlines()) == 1
    file.write_bytes(file.read_bytes()[:5000])
    assert "expected a whole transformers folder" in refuse(tmp_path, vision)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_language_model_is_neither_run_nor_asked_about(file, vision, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    make_llama(tmp_path / "lm", 1000)
    code = f"open({str(tmp_path / 'exploded')!r}, 'w').close()\nclass A: pass\n"
    (tmp_path / "lm" / "code.py").write_text(code)
    content = json.loads((tmp_path / "lm" / file).read_text())
    if file == "config.json":
        content |= {"model_type": "own"}
        references = {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A"}
    else:
        content |= {"tokenizer_class": "Own"}
        references = {"AutoTokenizer": [None, "code.A"]}
    (tmp_path / "lm" / file).write_text(json.dumps(content | {"auto_map": references}))
    assert "trust_remote_code" in refuse(tmp_path, vision)
    assert not (tmp_path / "exploded").exists()


def test_parts_that_do_not_fit_are_refused(vision, tmp_path):
    make_llama(tmp_path / "lm", 1000)
    eva = torch.load(vision)
    for changes, message in (
        ({"visual.blocks.0.norm1.bias": None}, "missing keys: visual.blocks.0.norm1.bias"),
        ({"visual.blocks.9.norm1.bias": torch.ones(36)}, "unknown keys: visual.blocks.9.norm1.bias"),
        ({"visual.cls_token": torch.ones(1, 36)}, "visual.cls_token (1, 36)"),
        ({"visual.cls_token": torch.full((1, 1, 36), torch.nan)}, "class_embedding: got 36 numbers that are NaN"),
    ):
        torch.save({name: t for name, t in (eva | changes).items() if t is not None}, tmp_path / "bad.pt")
        assert message in refuse(tmp_path, tmp_path / "bad.pt")
    assert "num_image_tokens" in refuse(tmp_path, vision, "--num-image-tokens=0")
    shutil.rmtree(tmp_path / "lm")
    assert "language model" in refuse(tmp_path, vision)


def test_bare_names_are_the_same_tower(vision, tmp_path):
    make_llama(tmp_path / "lm", 1000)
    eva = {name.removeprefix("visual."): t for name, t in torch.load(vision).items() if name.startswith("visual.")}
    save_file(eva, tmp_path / "bare.safetensors")
    first, second = (
        load_file(assemble(tmp_path, file, output=name) / "model.safetensors")
        for name, file in (("a", vision), ("b", tmp_path / "bare.safetensors"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
