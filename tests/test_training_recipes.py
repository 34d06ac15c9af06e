"""Recipes: what they may say, what they say by default, and a run of each kind from files to a folder."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from golden_emu import GOLDEN_EMU
from PIL import Image
from python_processes import TESTS, TWO_PROCESSES, run_python
from safetensors.torch import load_file
from transformers import AutoModel, TrainingArguments

from modeling_emu import EmuForMultimodalGeneration, EmuProcessor
from modeling_emu.training.recipes import (
    PACKAGED_RECIPES,
    InstructArguments,
    PretrainArguments,
    find_recipe,
    parse_recipe,
    read_recipe,
)
from modeling_emu.training.run import FINAL_FOLDER, instruct, pretrain


LANGUAGE_RECIPES = [path for path in sorted(PACKAGED_RECIPES.glob("*.yaml")) if "decoder" not in path.stem]
COLOURS = {"red": (214, 64, 54), "blue": (56, 108, 214)}


def write_pairs(folder) -> str:
    """An image folder of two coloured squares with their captions."""
    folder.mkdir()
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "text": f"a {name} square"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "metadata.jsonl")


def write_instructions(folder) -> str:
    rows = [{"instruction": f"Name the colour {name}.", "input": "", "output": f"It is {name}."} for name in COLOURS]
    folder.mkdir()
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return str(folder / "alpaca.json")


def make_settings(tmp_path, files: str, kind: str, *more: str) -> list[str]:
    return [
        f"model={GOLDEN_EMU}",
        f"sources=[{{kind: {kind}, files: '{files}'}}]",
        f"output_dir={tmp_path / 'out'}",
        "max_steps=3",
        "save_strategy=no",
        "logging_steps=1",
        "disable_tqdm=true",
        *more,
    ]


def make_recipe(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", LANGUAGE_RECIPES, ids=lambda path: path.stem)
def test_packaged_recipes_are_complete_and_known(path):
    arguments_class = InstructArguments if "emu-i" in path.stem or "instruct" in path.stem else PretrainArguments
    arguments, training = parse_recipe(path.stem, ["use_cpu=true", "fsdp=false"], arguments_class)
    assert arguments.sources
    assert training.max_steps > 0


def test_published_values_of_pretraining():
    _, training = parse_recipe("emu-pretrain", ["use_cpu=true", "fsdp=false"], PretrainArguments)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (training.weight_decay, training.lr_scheduler_type, training.max_steps) == (0.05, "cosine", 10000)
    rates = {part: training.get_part_learning_rate(part) for part in ("vision", "causal_former", "language_model")}
    assert rates == {"vision": 4e-5, "causal_former": 1e-4, "language_model": 3e-5}
    assert training.get_warmup_steps(10000) == 2000


def test_fsdp_of_the_published_pretraining_finds_its_layers():
    """Parsed and instantiated; not run."""
    recipe = read_recipe("emu-pretrain")
    training = TrainingArguments("out", fsdp=recipe["fsdp"], fsdp_config=recipe["fsdp_config"], use_cpu=True)
    plugin = FullyShardedDataParallelPlugin(**training.fsdp_plugin_args)
    plugin.set_auto_wrap_policy(EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU))
    assert plugin.fsdp_version == 2
    wrapped = {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == {"Blip2EncoderLayer", "EmuCausalFormerLayer", "LlamaDecoderLayer"}


def test_published_values_of_instruction_tuning():
    arguments, _ = parse_recipe("emu-i", ["use_cpu=true"], InstructArguments)
    assert (arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout) == (16, 16, 0.05)


def test_settings_replace_values_and_reach_into_mappings(tmp_path):
    name = make_recipe(tmp_path, "save_strategy: no\nlearning_rate: 1e-5\nobjective: {text_loss_weight: 1}\n")
    recipe = read_recipe(name, ["objective.regression_loss_weight=0.5", "bf16=true", "optim=sgd"])
    assert recipe == {
        "save_strategy": "no",
        "learning_rate": 1e-5,
        "objective": {"text_loss_weight": 1, "regression_loss_weight": 0.5},
        "bf16": True,
        "optim": "sgd",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "got 'learning_rat', expected a known one; the nearest is 'learning_rate'"),
        ("vison_learning_rate: 1", "the nearest is 'vision_learning_rate'"),
        ("sources: [{kind: mmc4, file: x}]", "key of the source: got 'file', .* nearest is 'files'"),
        ("sources: [{kind: mmc4}]", "expected both kind and files"),
        ("sources: []", "sources: got none"),
        ("objective: {text_weight: 1}\nsources: [{kind: a, files: b}]", "nearest is 'text_loss_weight'"),
        ("sources: [{kind: a, files: b, batch_size: 2}, {kind: c, files: d}]", "expected it for all or none"),
        ("sources: [{kind: a, files: b, batch_size: 2}]", "packing: got true with a batch_size"),
        ("- a", "got list, expected keys with values"),
        ("a: [", "got broken YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, text, message):
    name = make_recipe(tmp_path, text)
    settings = [] if text.startswith(("-", "a:")) else ["model=x", "output_dir=y"]
    if text.startswith(("learning_rat:", "vison")):
        settings.append("sources=[{kind: a, files: b}]")
    with pytest.raises(ValueError, match=message):
        parse_recipe(name, settings, PretrainArguments)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("weight", "abc", "a positive number"),
        ("weight", "0", "a positive number"),
        ("weight", "true", "a positive number"),
        ("weight", ".inf", "a positive number"),
        ("batch_size", "2.5", "a positive whole number"),
        ("batch_size", "0", "a positive whole number"),
        ("max_broken_fraction", "few", "a number from 0 to 1"),
        ("max_broken_fraction", "1.5", "a number from 0 to 1"),
        ("files", "3", "a text or a list of texts"),
        ("files", "[]", "a text or a list of texts"),
        ("files", "[a, 3]", "a text or a list of texts"),
        ("kind", "[mmc4]", "a text"),
        ("media", "[a]", "a text or null"),
        ("name", "3", "a text or null"),
    ],
)
@pytest.mark.parametrize("sources", ["sources", "eval_sources"])
def test_a_value_of_a_source_that_cannot_be_is_refused_by_key(sources, key, value, expected):
    fields = ", ".join(f"{name}: {text}" for name, text in {"kind": "mmc4", "files": "x", key: value}.items())
    with pytest.raises(ValueError, match=f"^{key} of the source: got .*, expected {expected}$"):
        parse_recipe("pretrain-cpu", [f"{sources}=[{{{fields}}}]"], PretrainArguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("packing=no", "packing: got 'no', expected true or false"),
        ("fsdp=true", "fsdp: got True with use_cpu, expected false"),
        ("bf16=off", "bf16: got 'off', expected true or false"),
        ("tf32=no", "tf32: got 'no', expected true or false or null"),
        ("max_steps=ten", "max_steps: got 'ten', expected a whole number"),
        ("max_steps=2.5", "max_steps: got 2.5, expected a whole number"),
        ("max_length=true", "max_length: got True, expected a whole number or null"),
        ("learning_rate=abc", "learning_rate: got 'abc', expected a number"),
        ("freeze=vision", "freeze: got 'vision', expected a list"),
        ("sources=images", "sources: got 'images', expected a list"),
        ("sources=[images]", r"sources: got \['images'\], expected a list"),
        ("objective=mse", "objective: got 'mse', expected keys with values"),
        ("objective.regression_loss=l1", "objective: .*expected one of .*mse.* got l1"),
        ("objective.text_loss_weight=much", "objective: .*text_loss_weight"),
    ],
)
def test_a_value_of_another_kind_is_refused(setting, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parse_recipe("pretrain-cpu", [setting], PretrainArguments)


def test_a_missing_key_file_or_value_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none of the keys \['model', 'output_dir'\]"):
        parse_recipe(make_recipe(tmp_path, "sources: [{kind: a, files: b}]"), [], PretrainArguments)
    with pytest.raises(ValueError, match=r"got 'nothing', expected a file, or one of .*emu-i, emu-pretrain"):
        find_recipe("nothing")
    with pytest.raises(ValueError, match="--set: got 'bf16', expected key=value"):
        read_recipe("emu-i", ["bf16"])
    with pytest.raises(ValueError, match=r"--set sources: got broken YAML in '\[a, b'"):
        read_recipe("emu-i", ["sources=[a, b"])
    with pytest.raises(ValueError, match="merge_adapter: got true"):
        parse_recipe("instruct-24gb", ["use_cpu=true", "merge_adapter=true"], InstructArguments)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_pretraining_from_files_to_a_folder(tmp_path, packing):
    files = write_pairs(tmp_path / "pairs")
    settings = make_settings(tmp_path, files, "image_text", f"packing={packing}", "objective.text_loss_weight=0.5")
    folder = pretrain(*parse_recipe("pretrain-cpu", settings, PretrainArguments))
    assert folder == tmp_path / "out" / FINAL_FOLDER
    before = EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU)
    after = EmuForMultimodalGeneration.from_pretrained(folder)
    assert after.config.text_loss_weight == 0.5
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert EmuProcessor.from_pretrained(folder).num_image_tokens == after.config.num_image_tokens
    assert list((tmp_path / "out").rglob("events.out.tfevents*")), "TensorBoard's file"


def test_one_source_per_step_with_its_own_batch_size(tmp_path):
    files = write_pairs(tmp_path / "pairs")
    sources = f"sources=[{{kind: image_text, files: '{files}', batch_size: 3}}]"
    settings = [*make_settings(tmp_path, files, "image_text", "packing=false"), sources]
    eval_sources = f"eval_sources=[{{kind: image_text, files: '{files}'}}]"
    settings += [eval_sources, "eval_strategy=steps", "eval_steps=3", "save_strategy=steps", "save_steps=3"]
    pretrain(*parse_recipe("pretrain-cpu", settings, PretrainArguments))
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    first, evaluation = state["log_history"][0], state["log_history"][-1]
    assert first["num_regression_targets"] == 3 * 5  # 4 slots and [/IMG]
    assert evaluation["eval_num_regression_targets"] == 2 * 5


def test_a_stream_needs_a_number_of_steps(tmp_path):
    files = write_pairs(tmp_path / "pairs")
    settings = [*make_settings(tmp_path, files, "image_text"), "max_steps=-1"]
    with pytest.raises(ValueError, match="max_steps: got -1"):
        pretrain(*parse_recipe("pretrain-cpu", settings, PretrainArguments))


def test_instruction_tuning_from_files_to_an_adapter_or_a_model(tmp_path):
    files = write_instructions(tmp_path / "data")
    folders = []
    for merge in ("false", "true"):  # the second run overwrites what the first one wrote
        settings = make_settings(tmp_path, files, "instruction", f"merge_adapter={merge}")
        folders.append(instruct(*parse_recipe("instruct-cpu", settings, InstructArguments)))
        assert (folders[-1] / "adapter_config.json").is_file() == (merge == "false")
    assert folders[0] == folders[1]
    merged = AutoModel.from_pretrained(folders[1], trust_remote_code=True)
    assert merged.config.variant == "instruct"
    processor = EmuProcessor.from_pretrained(folders[1])
    assert processor.tokenizer.convert_tokens_to_ids(["[USER]", "[ASSISTANT]"]) == [1004, 1005]


@pytest.mark.parametrize("weight", [None, 0.5])
def test_tuning_regresses_images_only_if_the_recipe_says_so(tmp_path, weight):
    """Beside conversations, documents may be learned as a whole."""
    answers, pairs = write_instructions(tmp_path / "data"), write_pairs(tmp_path / "pairs")
    sources = f"[{{kind: instruction, files: '{answers}'}}, {{kind: image_text, files: '{pairs}'}}]"
    settings = [*make_settings(tmp_path, answers, "instruction"), f"sources={sources}", "merge_adapter=true"]
    settings += ["save_strategy=steps", "save_steps=3"]
    if weight is not None:
        settings.append(f"objective.regression_loss_weight={weight}")
    folder = instruct(*parse_recipe("instruct-cpu", settings, InstructArguments))
    assert json.loads((folder / "config.json").read_text())["regression_loss_weight"] == (weight or 0)
    log = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("num_regression_targets", 0) for entry in log) > 0
    for entry in log[:3]:
        expected = entry["text_loss"] + (weight or 0) * entry["regression_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_zero_3_is_refused_for_instruction_tuning(tmp_path):
    settings = make_settings(tmp_path, write_instructions(tmp_path / "data"), "instruction", "model=not-there")
    arguments, training = parse_recipe("instruct-cpu", settings, InstructArguments)
    training.deepspeed_plugin = SimpleNamespace(zero_stage=3)  # DeepSpeed itself need not be installed
    with pytest.raises(ValueError, match=r"deepspeed: got ZeRO-3 for instruction tuning, expected FSDP2"):
        instruct(arguments, training)


def read_folder(folder) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """The tensors of a folder, and its other files."""
    tensors, others = {}, {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            others[file.name] = file.read_bytes()
    return tensors, others


def test_a_sharded_run_writes_the_folder_of_one_process(tmp_path):
    """accelerate's FSDP2 from a recipe, with gloo. Each document is the same, so any split has the same gradients."""
    text = json.dumps([{"instruction": "Name a colour.", "input": "", "output": "It is red."}] * 2)
    (tmp_path / "alpaca.json").write_text(text)
    layers = "[Blip2EncoderLayer, EmuCausalFormerLayer, LlamaDecoderLayer]"
    sharded = ["use_cpu=false", "fsdp=true", f"fsdp_config={{version: 2, transformer_layer_cls_to_wrap: {layers}}}"]
    folders, settings_files = {}, []
    for merge in ("false", "true"):
        settings = make_settings(tmp_path, str(tmp_path / "alpaca.json"), "instruction", f"merge_adapter={merge}")
        settings += ["lora_dropout=0", "optim=sgd", "learning_rate=1", "lr_scheduler_type=constant", "warmup_steps=0"]
        alone = parse_recipe("instruct-cpu", [*settings, f"output_dir={tmp_path}/1-{merge}"], InstructArguments)
        folders[instruct(*alone)] = tmp_path / f"2-{merge}" / FINAL_FOLDER
        settings_files.append(tmp_path / f"{merge}.json")
        settings_files[-1].write_text(json.dumps([*settings, *sharded, f"output_dir={tmp_path}/2-{merge}"]))
    # Each in new processes: at its end a run leaves its group, and gloo may not join again.
    for settings_file in settings_files:
        arguments = [*TWO_PROCESSES, str(TESTS / "training_instruct_run.py"), str(settings_file)]
        process = run_python(*arguments, env={"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""})
        assert process.returncode == 0, process.stderr[-6000:]
    for alone, together in folders.items():
        expected, expected_files = read_folder(alone)
        got, got_files = read_folder(together)
        assert got_files == expected_files
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
    adapter, _ = read_folder(next(iter(folders)))
    assert all(tensor.abs().max() > 1e-3 for name, tensor in adapter.items() if "lora_B" in name)
