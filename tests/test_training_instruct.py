"""Instruction tuning: which modules LoRA touches, where the new tokens start, and what comes back from a folder."""

import pytest
import torch
from golden_emu import GOLDEN_EMU
from training_run import TinyCollator, make_arguments
from transformers import AutoModel

from modeling_emu import EmuForMultimodalGeneration, EmuProcessor
from modeling_emu.training.instruct import add_instruct_tokens, add_lora, save_tuned
from modeling_emu.training.trainer import EmuTrainer


CONVERSATION = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]


@pytest.fixture
def model_and_processor():
    return EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU), EmuProcessor.from_pretrained(GOLDEN_EMU)


def encode_conversation(processor: EmuProcessor) -> dict[str, torch.Tensor]:
    inputs = processor.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True, return_tensors="pt")
    return {"input_ids": inputs["input_ids"]}


def tune(model, processor, tmp_path, **kwargs):
    """LoRA for a few steps on one conversation; the adapter is far from nothing then."""
    add_instruct_tokens(model, processor)
    tuned = add_lora(model)
    ids = encode_conversation(processor)["input_ids"][0].tolist()
    sample = {"ids": ids, "labels": ids, "pixels": torch.empty(0, 3, 28, 28), "key": "a"}
    settings = {"num_train_epochs": 5, "optim": "adamw_torch", "learning_rate": 0.02, **kwargs}
    arguments = make_arguments(str(tmp_path / "run"), 1, **settings)
    trainer = EmuTrainer(model=tuned, args=arguments, train_dataset=[sample], data_collator=TinyCollator())
    trainer.train()
    return tuned.eval()


def test_lora_touches_exactly_these_modules(model_and_processor):
    tuned = add_lora(model_and_processor[0])
    touched = {name.split(".lora_A")[0] for name, _ in tuned.named_modules() if name.endswith("lora_A")}
    assert touched == {
        f"base_model.model.model.language_model.layers.{layer}.self_attn.{projection}_proj"
        for layer in range(2)
        for projection in "qkvo"
    }
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{half}.default.weight" for name in touched for half in "AB"}
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 16, 0.05)


def test_new_tokens_start_from_their_words(model_and_processor):
    model, processor = model_and_processor
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_rows = model.config.text_config.vocab_size
    add_instruct_tokens(model, processor)
    assert model.config.text_config.vocab_size == num_rows + 2 == len(processor.tokenizer)
    for token_id, word in zip((num_rows, num_rows + 1), ("user", "assistant"), strict=True):
        pieces = processor.tokenizer.encode(word, add_special_tokens=False)
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            rows = model.state_dict()[name]
            assert torch.equal(rows[token_id], before[name][pieces].mean(0))
            assert torch.equal(rows[:num_rows], before[name])
    assert processor.variant == model.config.variant == "instruct"
    assert model.config.regression_loss_weight == 0
    text = processor.apply_chat_template(CONVERSATION, tokenize=False)
    ids = processor.tokenizer(text)["input_ids"]
    assert [ids.count(num_rows), ids.count(num_rows + 1)] == [1, 1]
    add_instruct_tokens(model, processor)  # of an Emu-I: nothing more to add
    assert len(processor.tokenizer) == num_rows + 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_adapter_only(model_and_processor, tmp_path, checkpointing):
    model, processor = model_and_processor
    add_instruct_tokens(model, processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuned = tune(model, processor, tmp_path, activation_checkpointing=checkpointing)
    moved = 0
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            moved += "lora_B" in name and bool(parameter.abs().max() > 0)
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain]), name
    assert moved == 8


@torch.no_grad()
def test_adapter_and_merged_model_come_back_from_their_folders(model_and_processor, tmp_path):
    from peft import PeftModel

    model, processor = model_and_processor
    untuned_logits = EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU)(torch.tensor([[1, 5, 6]])).logits
    with torch.enable_grad():
        tuned = tune(model, processor, tmp_path)
    inputs = encode_conversation(processor)
    expected = tuned(**inputs).logits
    assert (tuned(torch.tensor([[1, 5, 6]])).logits[..., :1004] - untuned_logits).abs().max() > 1e-3

    save_tuned(tuned, processor, tmp_path / "adapter", merge=False)
    base = EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU)
    reloaded_processor = EmuProcessor.from_pretrained(tmp_path / "adapter")
    base.resize_token_embeddings(len(reloaded_processor.tokenizer), mean_resizing=False)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(plain(**encode_conversation(reloaded_processor)).logits, expected)

    save_tuned(tuned, processor, tmp_path / "merged", merge=True)
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    merged_processor = EmuProcessor.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(  # W x + B A x against (W + B A) x
        merged(**encode_conversation(merged_processor)).logits, expected, atol=1e-4, rtol=1e-4
    )
