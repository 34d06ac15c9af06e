"""The networks and the two losses: properties that hold for any weights."""

import itertools

import pytest
import torch
from conftest import (
    BOS,
    END,
    EOS,
    NUM_IMAGE_TOKENS,
    SLOT,
    START,
    image_ids,
    make_batch,
    make_config,
    make_model,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from modeling_emu import EmuForMultimodalGeneration


ROWS = [[BOS, 5, *image_ids(), 6, 7, EOS], [BOS, *image_ids(), 8, *image_ids(), 9, 10, 11, EOS], [BOS, 12, 13, EOS]]


def make_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


@torch.no_grad()
def test_cached_equals_uncached(tiny_model):
    batch = make_batch([ROWS[1]], num_images=2)
    whole = tiny_model(**batch)
    cache = DynamicCache()
    embeds = tiny_model.model(**batch).inputs_embeds
    for t in range(embeds.shape[1]):
        step = tiny_model(inputs_embeds=embeds[:, t : t + 1], past_key_values=cache)
        assert_close(step.logits[:, 0], whole.logits[:, t], atol=1e-5, rtol=1e-4)
        assert_close(step.regressed_embeds[:, 0], whole.regressed_embeds[:, t], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_model, side):
    batch = make_batch(ROWS, num_images=3, side=side)
    padded = tiny_model(**batch)
    first_image = 0
    for row, ids in enumerate(ROWS):
        num_images = ids.count(START)
        single = make_batch([ids])
        if num_images:
            single["pixel_values"] = batch["pixel_values"][first_image : first_image + num_images]
        first_image += num_images
        alone = tiny_model(**single)
        real = batch["attention_mask"][row].bool()
        assert_close(padded.logits[row, real], alone.logits[0], atol=2e-5, rtol=1e-4)
        assert_close(padded.regressed_embeds[row, real], alone.regressed_embeds[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_without_images_it_is_the_language_model(tiny_model):
    plain = AutoModelForCausalLM.from_config(tiny_model.config.text_config).eval()
    plain.model.load_state_dict(tiny_model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(tiny_model.lm_head.state_dict())
    batch = make_batch([ROWS[2]])
    assert torch.equal(tiny_model(**batch).logits, plain(**batch).logits)


@torch.no_grad()
def test_image_embeds_stand_in_the_slots_in_reading_order(tiny_model):
    batch = make_batch(ROWS, num_images=3)
    outputs = tiny_model.model(**batch)
    slots = outputs.inputs_embeds[batch["input_ids"] == SLOT].unflatten(0, (3, NUM_IMAGE_TOKENS))
    expected = torch.stack(tiny_model.get_image_features(batch["pixel_values"]).pooler_output)
    assert torch.equal(slots, expected)
    assert torch.equal(outputs.image_hidden_states, expected)


def compute_losses_plainly(model, batch, labels, outputs):
    """Both losses, target by target."""
    config = model.config
    embeds = model.model(**{k: v for k, v in batch.items() if k != "labels"}).inputs_embeds
    text, regression = [], []
    for row, t in itertools.product(range(labels.shape[0]), range(labels.shape[1] - 1)):
        ids, next_id = batch["input_ids"][row], int(labels[row, t + 1])
        learned = next_id not in (-100, SLOT, END) and (next_id != START or config.supervise_image_start)
        if learned:
            text.append(-outputs.logits[row, t].log_softmax(-1)[next_id])
        if ids[t] == SLOT or (ids[t] == START and ids[t + 1] == SLOT):
            prediction, target = outputs.regressed_embeds[row, t], embeds[row, t + 1]
            if config.normalize_regression_targets:
                scale = target.square().mean().sqrt()
                prediction, target = prediction / scale, target / scale
            if config.regression_loss == "cosine":
                regression.append(1 - prediction @ target / (prediction.norm() * target.norm()))
            else:
                regression.append((prediction - target).square().mean())
    return text, regression


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"supervise_image_start": True},
        {"regression_loss": "cosine", "regression_loss_weight": 0.3},
        {"normalize_regression_targets": True, "text_loss_weight": 2},
    ],
)
def test_losses_equal_their_definition(options):
    model = make_model(**options)
    batch = make_batch(ROWS, num_images=3, side="right")
    labels = make_labels(batch)
    labels[1, :3] = -100
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
        text, regression = compute_losses_plainly(model, batch, labels, outputs)
    assert outputs.num_regression_targets == len(regression) == 3 * (NUM_IMAGE_TOKENS + 1)
    assert outputs.num_text_targets == len(text)
    assert_close(outputs.text_loss_sum, sum(text), rtol=1e-5, atol=1e-5)
    assert_close(outputs.regression_loss_sum, sum(regression), rtol=1e-5, atol=1e-5)
    assert_close(outputs.text_loss, outputs.text_loss_sum / len(text))
    assert_close(outputs.regression_loss, outputs.regression_loss_sum / len(regression))
    config = model.config
    expected = config.text_loss_weight * outputs.text_loss + config.regression_loss_weight * outputs.regression_loss
    assert_close(outputs.loss, expected)


@pytest.mark.parametrize("options", [{}, {"supervise_image_start": True}])
def test_sums_over_parts_are_the_sum_over_the_whole(options):
    model = make_model(**options)
    batch = make_batch(ROWS, num_images=3)
    fields = ("text_loss_sum", "regression_loss_sum", "num_text_targets", "num_regression_targets")
    with torch.no_grad():
        whole = model(**batch, labels=make_labels(batch))
        parts, first_image = [], 0
        for ids in ROWS:
            part = make_batch([ids])
            if num_images := ids.count(START):
                part["pixel_values"] = batch["pixel_values"][first_image : first_image + num_images]
                first_image += num_images
            parts.append(model(**part, labels=make_labels(part)))
    for field in fields:
        assert_close(sum(part[field] for part in parts), whole[field], rtol=1e-5, atol=1e-5)


def test_a_bare_image_start_is_no_regression_position(tiny_model):
    batch = make_batch([[BOS, START, 5, END, 6, *image_ids(), EOS]], num_images=1)
    outputs = tiny_model(**batch, labels=make_labels(batch))
    assert outputs.num_regression_targets == NUM_IMAGE_TOKENS + 1


def test_regression_targets_are_detached(tiny_model):
    batch = make_batch([[BOS, *image_ids()]], num_images=1)
    labels = torch.full_like(batch["input_ids"], -100)
    outputs = tiny_model(**batch, labels=labels)
    embeds = tiny_model.model(**batch).inputs_embeds.detach()
    predictions = outputs.regressed_embeds
    by_hand = (predictions[:, 1:5] - embeds[:, 2:6]).square().mean(-1).mean()
    weights = (tiny_model.model.causal_former.queries, tiny_model.regression_head.weight)
    got = torch.autograd.grad(outputs.loss, weights, retain_graph=True)
    expected = torch.autograd.grad(by_hand, weights)
    for left, right in zip(got, expected, strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_no_targets_give_a_loss_of_zero_with_gradients(tiny_model):
    batch = make_batch([ROWS[2]])
    outputs = tiny_model(**batch, labels=torch.full_like(batch["input_ids"], -100))
    assert outputs.loss == outputs.text_loss == outputs.regression_loss == 0
    assert outputs.loss.requires_grad


def compute_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=make_labels(batch)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_gets_a_gradient():
    model = make_model()
    gradients = compute_gradients(model, make_batch(ROWS, num_images=3))
    without = [name for name, _ in model.named_parameters() if not gradients[name].any()]
    assert without == []
    size = model.config.vision_config.hidden_size
    for name, gradient in gradients.items():
        if name.endswith("qkv.bias"):  # softmax does not see the key's bias
            assert gradient[size : 2 * size].abs().max() < 1e-4 * gradient.abs().max()
            assert gradient[:size].any()
            assert gradient[2 * size :].any()


def test_gradient_checkpointing_changes_nothing():
    model = make_model().train()
    batch = make_batch(ROWS, num_images=3)
    plain = compute_gradients(model, batch)
    calls = []
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, f=function: (calls.append(1), f(*a))[1]
    checkpointed = compute_gradients(model, batch)
    config = model.config
    assert len(calls) == sum(
        part.num_hidden_layers for part in (config.vision_config, config.causal_former_config, config.text_config)
    )
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@torch.no_grad()
@pytest.mark.parametrize(
    "implementation",
    ["eager", "flex_attention", {"text_config": "eager", "vision_config": "sdpa", "causal_former_config": "eager"}],
)
def test_attention_implementations_agree(implementation, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    batch = make_batch(ROWS, num_images=3, side="right")
    expected = model(**batch)
    other = EmuForMultimodalGeneration.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    got = other(**batch)
    real = batch["attention_mask"].bool()
    assert_close(got.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)
    assert_close(got.image_hidden_states, expected.image_hidden_states, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_shards", [1, 3])
def test_save_and_load_are_equal(tmp_path, num_shards):
    model = make_model()
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size if num_shards == 1 else size // num_shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (num_shards > 1)
    loaded, report = EmuForMultimodalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    built = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, built[name]), f"{name}: loaded and constructed differ"
    batch = make_batch(ROWS, num_images=3)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_saving_names_every_auto_class_and_copies_the_code(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    reference = "modeling_emu.EmuForMultimodalGeneration"
    auto_map = EmuForMultimodalGeneration.from_pretrained(tmp_path).config.auto_map
    assert auto_map == {
        "AutoConfig": "configuration_emu.EmuConfig",
        "AutoModel": reference,
        "AutoModelForCausalLM": reference,
        "AutoModelForImageTextToText": reference,
        "AutoModelForMultimodalLM": reference,
    }
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "configuration_emu.py",
        "generation_emu.py",
        "modeling_emu.py",
        "modeling_emu_causal_former.py",
    }


OTHER_LANGUAGE_MODELS = {
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8},
    "gpt2": {"model_type": "gpt2", "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
}


@pytest.mark.parametrize("name", OTHER_LANGUAGE_MODELS)
def test_other_language_models_train_and_generate(name, tmp_path):
    text_config = OTHER_LANGUAGE_MODELS[name] | {"tie_word_embeddings": False}
    torch.manual_seed(0)
    model = EmuForMultimodalGeneration(make_config(text_config=text_config)).eval()
    batch = make_batch(ROWS[:2], num_images=3)
    gradients = compute_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    model.save_pretrained(tmp_path)
    loaded = EmuForMultimodalGeneration.from_pretrained(tmp_path)
    batch = make_batch([ROWS[0][:-1], ROWS[1][:-1]], num_images=3)
    expected = model.generate(**batch, generation_mode="image").image_embeds
    assert expected.shape == (2, NUM_IMAGE_TOKENS, 32)
    assert torch.equal(loaded.generate(**batch, generation_mode="image").image_embeds, expected)
    assert model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[0] == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_word_embeddings_are_stored_once(name, tmp_path):
    text_config = OTHER_LANGUAGE_MODELS.get(name, {}) | {"tie_word_embeddings": True}
    model = EmuForMultimodalGeneration(make_config(text_config=text_config, tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = EmuForMultimodalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@torch.no_grad()
def test_resizing_the_vocabulary_keeps_both_heads(tiny_model):
    model = make_model()
    batch = make_batch(ROWS, num_images=3)
    expected = model(**batch).logits
    model.resize_token_embeddings(110, mean_resizing=False)
    got = model(**batch).logits
    assert got.shape[-1] == 110
    assert torch.equal(got[..., :98], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(tmp_path, dtype):
    model = make_model()
    model.save_pretrained(tmp_path)
    half = EmuForMultimodalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    batch = make_batch([ROWS[0][:-1]], num_images=1)
    embeds = half.generate(**batch, generation_mode="image").image_embeds
    assert embeds.dtype == dtype
    exact = model.generate(**batch, generation_mode="image").image_embeds
    assert (embeds.float() - exact).norm() < 0.1 * exact.norm()


def test_plain_trainer_trains(tmp_path):
    model = make_model()
    rows = [make_batch([ROWS[0]], num_images=1, seed=seed) for seed in range(2)]
    data = [
        {k: v if k == "pixel_values" else v[0] for k, v in row.items()} | {"labels": make_labels(row)[0]}
        for row in rows
    ]

    def collate(features):
        stacked = {k: torch.stack([f[k] for f in features]) for k in features[0] if k != "pixel_values"}
        return stacked | {"pixel_values": torch.cat([f["pixel_values"] for f in features])}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got both or none of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 32)}, "got both or none"),
        ({"inputs_embeds": torch.ones(1, 2, 32), "pixel_values": torch.ones(1, 3, 28, 28)}, "beside ready embeddings"),
        ({"input_ids": torch.tensor([[BOS, SLOT]])}, "image slots in input_ids: got 1, expected 0"),
        (
            {"input_ids": torch.tensor([[BOS, *image_ids()]]), "pixel_values": torch.ones(2, 3, 28, 28)},
            r"got 3, expected 6 \(2 images of 3 slots\)",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)},
            "labels: got",
        ),
        (
            {"input_ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)}
            | {"logits_to_keep": 1},
            "logits_to_keep: got 1",
        ),
    ],
)
def test_inputs_that_exclude_each_other_are_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_forward_compiles_as_one_graph(tiny_model):
    torch.compiler.reset()
    batch = make_batch(ROWS, num_images=3)
    compiled = torch.compile(tiny_model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(**batch).logits, tiny_model(**batch).logits, atol=1e-5, rtol=1e-4)


def test_lora_touches_the_named_modules_only():
    from peft import LoraConfig, get_peft_model

    model = make_model()
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    trained = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.model.language_model.layers.{layer}.self_attn.{which}_proj"
        for layer in range(2)
        for which in "qkvo"
    }
    batch = make_batch([ROWS[0]], num_images=1)
    adapted(**batch, labels=make_labels(batch)).loss.backward()
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora_B" in name)


def test_layers_kept_on_disk_change_nothing(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.vision_model": "disk",
        "model.causal_former": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
        "regression_head": "disk",
    }
    offloaded = EmuForMultimodalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.regression_head.weight.device.type == "meta"
    batch = make_batch([[BOS, *image_ids(), 5], [BOS, 6]], num_images=1)
    for mode in ("image", "interleaved"):
        options = {} if mode == "image" else {"max_new_tokens": 12, "sequence_bias": {(START,): 6.0}}
        got = offloaded.generate(**batch, generation_mode=mode, **options)
        expected = model.generate(**batch, generation_mode=mode, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert_close(got.image_embeds, expected.image_embeds, atol=1e-6, rtol=1e-5)


def test_a_module_that_may_not_be_split_is_named():
    names = {"Blip2EncoderLayer", "EmuCausalFormer", "LlamaDecoderLayer"}
    assert names <= set(make_model()._no_split_modules)
