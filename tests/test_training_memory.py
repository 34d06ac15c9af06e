"""What a training is said to need, against the tensors of real steps; refusing one that cannot fit; files of launchers."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed._tools.mem_tracker import MemTracker
from training_run import make_arguments
from transformers import TrainerCallback
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from typer.testing import CliRunner

import modeling_emu
from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.cli import app
from modeling_emu.cli.info import PUBLISHED, smallest_card_gb
from modeling_emu.training.activations import Batch, compute_activations, compute_logits, get_precision
from modeling_emu.training.decoder_memory import PUBLISHED_DECODER, DecoderConfigs
from modeling_emu.training.instruct import add_lora
from modeling_emu.training.memory import (
    Layout,
    build_empty_model,
    check_memory,
    compute_copies,
    compute_memory,
    compute_states,
)
from modeling_emu.training.parts import freeze_parts
from modeling_emu.training.plan import plan_training
from modeling_emu.training.recipes import (
    DataArguments,
    InstructArguments,
    PretrainArguments,
    parse_recipe,
)
from modeling_emu.training.run import instruct, pretrain
from modeling_emu.training.trainer import EmuTrainer


LAUNCHERS = Path(modeling_emu.__file__).parent / "training" / "launchers"
IMAGE, START, END, PAD = 501, 502, 503, 500
NUM_IMAGE_TOKENS = 8
SOURCES = [{"kind": "image_text", "files": "pairs/*.tar"}]
STATES = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")  # of torch; of bitsandbytes
FACTOR = 1.25  # between the estimate of activations and what autograd keeps
PEAK_FACTOR = 1.3  # between the sum and all that is alive at once


def make_config(**text_config) -> EmuConfig:
    """Small networks in which no term of the formulas is lost."""
    return EmuConfig(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 400,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        causal_former_config={
            "num_image_tokens": NUM_IMAGE_TOKENS,
            "encoder_hidden_size": 96,
            "projection_size": 128,
            "hidden_size": 48,
            "head_dim": 12,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            **text_config,
        },
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )


def make_data_arguments(lora: bool = False, **kwargs) -> DataArguments:
    return (InstructArguments if lora else PretrainArguments)(**{"model": "x", "sources": SOURCES, **kwargs})


def make_real_model(arguments: DataArguments, config: EmuConfig | None = None, frozen: tuple[str, ...] = ()):
    """The model with numbers that `build_empty_model` describes."""
    model = EmuForMultimodalGeneration(config or make_config())
    model = model.to(getattr(torch, arguments.dtype)).train()
    freeze_parts(model, frozen)
    if isinstance(arguments, InstructArguments):
        return add_lora(model, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout)
    return model


def make_rows(num_rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows of two images and text."""
    image = [START, *[IMAGE] * NUM_IMAGE_TOKENS, END]
    ids = torch.tensor([[1, *image, *image, *range(5, 85)]] * num_rows)
    pixels = torch.randn(2 * num_rows, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": ids}


def count_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


EXACT_CASES = {
    "all": {},
    "bfloat16": {"dtype": "bfloat16"},
    "frozen": {"freeze": ["vision", "language_model"]},
    "lora": {"lora": True},
    "lora in bfloat16": {"lora": True, "dtype": "bfloat16"},
    "sgd": {"optim": "sgd"},
    "8-bit states": {"optim": "adamw_8bit"},
    "grouped heads": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("case", EXACT_CASES.values(), ids=EXACT_CASES)
def test_exact_parts_are_the_bytes_of_a_real_step(tmp_path, case):
    case = {"optim": "adamw_torch", "freeze": [], "dtype": "float32", "lora": False, **case}
    training = make_arguments(str(tmp_path), max_steps=1, optim=case["optim"], freeze=case["freeze"])
    arguments = make_data_arguments(case["lora"], dtype=case["dtype"])
    config = make_config(**({"num_key_value_heads": 2} if "num_key_value_heads" in case else {}))
    config.variant = "instruct"  # with its tokens
    model = make_real_model(arguments, config)

    found = {}

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            found["gradients"] = count_bytes(p.grad for p in model.parameters() if p.grad is not None)

    batch = make_rows(1)
    trainer = EmuTrainer(
        model=model, args=training, train_dataset=[0], data_collator=lambda _: batch, callbacks=[Look()]
    )
    trainer.train()
    states = trainer.optimizer.optimizer.state.values()
    optimizer = count_bytes(value for state in states for name, value in state.items() if name in STATES)
    empty = build_empty_model(config, arguments, training)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    weights = count_bytes(model.parameters())
    assert compute_states(empty, arguments, training, Layout()) == (weights, found["gradients"], optimizer)


def get_saved_bytes(model, batch: dict[str, torch.Tensor], autocast: bool) -> int:
    """What autograd keeps of a forward pass without its heads, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    inner = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(inner.dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        inner(**inputs, use_cache=False)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", True)], ids=["fp32", "mixed", "bf16"]
)
def test_activations_are_estimated_within_a_factor(tmp_path, lora, dtype, autocast):
    arguments = make_data_arguments(lora, dtype=dtype, **({"lora_dropout": 0.0} if lora else {}))
    training = make_arguments(str(tmp_path), bf16=autocast)
    model = make_real_model(arguments)
    batch = make_rows()
    saved = get_saved_bytes(model, batch, autocast)
    precision = get_precision(model, training, is_sharded=False)
    estimate = compute_activations(model, arguments, training, precision, Batch("", 3, batch["input_ids"].shape[1], 6))
    assert estimate.recomputed == 0
    needed = estimate.kept + compute_copies(model, training, Layout(), 0)
    assert saved / FACTOR < needed < saved * FACTOR


def test_4_bit_weights_are_those_of_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    arguments = make_data_arguments(True, dtype="bfloat16", quantization="nf4")
    training = make_arguments(str(tmp_path))
    config = make_config()
    config.variant = "instruct"
    weights = 0
    for name, parameter in make_real_model(arguments, config).named_parameters():
        if ".language_model.layers." in name and name.endswith(
            "_proj.base_layer.weight" if "attn" in name else "_proj.weight"
        ):
            values, state = functional.quantize_4bit(parameter.detach(), quant_type="nf4")
            weights += count_bytes([values, state.absmax])
        else:
            weights += count_bytes([parameter])
    empty = build_empty_model(config, arguments, training)
    assert compute_states(empty, arguments, training, Layout())[0] == weights


def test_a_share_is_what_fsdp_gives_the_first_process():
    layout = Layout(3, is_sharded=True)
    for shape in [(7, 4), (9,), (2, 5), (6, 1, 2)]:
        pieces = torch.empty(shape).chunk(3)
        assert layout.get_share(torch.Size(shape)) == max(piece.numel() for piece in pieces)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(tmp_path):
    arguments, batch = make_data_arguments(), make_rows()
    training = make_arguments(str(tmp_path), activation_checkpointing=True)
    model = make_real_model(arguments)
    model.gradient_checkpointing_enable()
    saved = get_saved_bytes(model, batch, autocast=False)
    size = Batch("", 3, batch["input_ids"].shape[1], 6)
    estimate = compute_activations(model, arguments, training, get_precision(model, training, False), size)
    assert saved / FACTOR < estimate.kept < saved * FACTOR
    assert estimate.recomputed > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_peak_of_a_step_is_within_the_sum(tmp_path, checkpointing, autocast):
    """All that is alive at once in a real step, as PyTorch's tracker sees it."""
    arguments = make_data_arguments()
    config = make_config(vocab_size=2048)
    training = make_arguments(
        str(tmp_path), optim="adamw_torch", bf16=autocast, activation_checkpointing=checkpointing
    )
    model = make_real_model(arguments, config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batch = make_rows(8)

    def take_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    take_step()  # makes the states
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        take_step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    empty = build_empty_model(config, arguments, training)
    exact = compute_states(empty, arguments, training, Layout())
    size = Batch("", 8, batch["input_ids"].shape[1], 16)
    precision = get_precision(empty, training, False)
    estimate = sum(exact) + compute_copies(empty, training, Layout(), exact[1])
    activations = compute_activations(empty, arguments, training, precision, size)
    estimate += activations.kept + max(activations.recomputed, compute_logits(config, size))
    assert peak / PEAK_FACTOR < estimate < peak * PEAK_FACTOR


def make_folder(tmp_path) -> str:
    """A model that has a configuration and no weights."""
    make_config().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def refuse_decoder(model: str, decoder: str | None) -> DecoderConfigs:
    raise AssertionError("read a visual decoder to train Emu")


def make_plan(tmp_path, recipe: str, *settings: str):
    folder = make_folder(tmp_path)
    return plan_training(recipe, [f"model={folder}", *settings], EmuConfig.from_pretrained, refuse_decoder)


def test_a_plan_of_each_packaged_recipe_needs_a_configuration_only(tmp_path):
    kinds = {"emu-pretrain": "pretrain", "emu-i": "instruct", "instruct-24gb": "instruct", "pretrain-cpu": "pretrain"}
    for recipe, kind in kinds.items():
        plan = make_plan(tmp_path, recipe)
        assert plan.kind == kind
        alone, *many = plan.memory.values()
        assert (plan.num_trained == plan.num_parameters) == (kind == "pretrain")
        for memory in many:
            assert 0 < memory.weights <= alone.weights
        if recipe != "instruct-24gb":
            assert plan.memory["128 FSDP2"].exact < plan.memory["8 FSDP2"].exact < alone.exact


def test_batches_follow_the_kinds_of_sources(tmp_path):
    plan = make_plan(tmp_path, "emu-pretrain", "max_length=512")
    batches = {batch.name: batch for batch in plan.batches}
    assert batches["laion-2b"].num_images == batches["laion-2b"].num_rows == 128
    assert batches["webvid-10m"].num_images == 8 * batches["webvid-10m"].num_rows
    assert batches["webvid-10m"].length == 8 * (NUM_IMAGE_TOKENS + 2) + 64 + 2
    assert (batches["mmc4"].length, batches["mmc4"].num_images) == (512, 5 * 64)


def test_more_rows_need_more_and_checkpointing_less(tmp_path):
    def get_memory(*settings: str):
        return make_plan(tmp_path, "pretrain-cpu", *settings).memory["1"]

    few, many = get_memory(), get_memory("per_device_train_batch_size=4")
    assert (few.exact, 2 * few.activations, 2 * few.moment) == (many.exact, many.activations, many.moment)
    assert get_memory("activation_checkpointing=true").activations < few.activations / 2


def test_the_dtype_of_a_model_is_its_own_or_the_recipe_s(tmp_path):
    config = make_config()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    config = EmuConfig.from_pretrained(tmp_path)
    for dtype, expected in {"auto": torch.bfloat16, "float32": torch.float32}.items():
        model = build_empty_model(config, make_data_arguments(dtype=dtype), make_arguments(str(tmp_path)))
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
    with pytest.raises(ValueError, match="dtype: got 'int8', expected auto or one of float32"):
        build_empty_model(config, make_data_arguments(dtype="int8"), make_arguments(str(tmp_path)))


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim: got 'adafactor', expected one whose memory is known: adamw_torch"):
        make_plan(tmp_path, "emu-pretrain", "optim=adafactor")


@pytest.mark.parametrize("kind", ["pretrain", "instruct"])
def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path, monkeypatch, kind):
    """The folder has no weights: loading them would be another error."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    run, arguments_class = {"pretrain": (pretrain, PretrainArguments), "instruct": (instruct, InstructArguments)}[kind]
    settings = [f"model={make_folder(tmp_path)}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"free memory of cpu: got 1\.0 MB, expected at least .* MB \(weights "):
        run(*parse_recipe(f"{kind}-cpu", settings, arguments_class))


def test_only_the_exact_parts_refuse_and_estimates_warn(tmp_path, monkeypatch, caplog):
    arguments, training = make_data_arguments(), make_arguments(str(tmp_path), optim="adamw_torch")
    config = make_config()
    exact = compute_memory(build_empty_model(config, arguments, training), arguments, training, Layout()).exact

    def check(available: int) -> int:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        caplog.clear()
        check_memory(config, arguments, training)
        return len(caplog.records)

    assert check(exact) == 1
    assert "with activations" in caplog.text
    assert check(10 * exact + 10**9) == 0
    with pytest.raises(ValueError, match="optimiser states"):
        check(exact - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # they share what is free
    with pytest.raises(ValueError, match="optimiser states"):
        check(2 * exact - 2)


def test_the_command_prints_the_published_sizes():
    result = CliRunner().invoke(app, ["info", "--training", "emu-pretrain", "--set", f"model={PUBLISHED}"])
    assert result.exit_code == 0, result.output
    assert "14,182,355,456 parameters" in result.stdout
    assert "128 FSDP2" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training", "emu-i"], "model of the recipe: got 'emu-pretrain'"),
        (["--training", "nothing"], "recipe: got 'nothing'"),
        (["some", "--training", "emu-i"], "got 'some' and --training"),
        (["some", "--set", "a=b"], "--set: got it without --training"),
        ([], "got neither"),
    ],
)
def test_a_wrong_call_is_one_line(options, message):
    result = CliRunner().invoke(app, ["info", *options])
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_default_wrapping_of_accelerate_finds_its_layers(monkeypatch):
    """Instantiated; FSDP of accelerate is not run."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(make_real_model(make_data_arguments()))
    wrapped = {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == {"Blip2EncoderLayer", "Blip2VisionEmbeddings", "EmuCausalFormer", "LlamaDecoderLayer"}


def test_native_fsdp_shards_each_layer_of_each_part():
    model = make_real_model(make_data_arguments())
    assert set(model.fsdp_plan) == {
        "model.vision_model.encoder.layers.*",
        "model.causal_former.layers.*",
        "model.language_model.embed_tokens",
        "model.language_model.layers.*",
        "model.language_model.norm",
        "lm_head",
        "regression_head",
    }
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert set(model.fsdp_plan) <= names


def test_fsdp_file_of_accelerate(monkeypatch):
    """Parsed by the launcher, and instantiated from what it hands to the processes; not run."""
    options = ["--config_file", str(LAUNCHERS / "accelerate-fsdp2.yaml"), "--no_python", "emu", "train", "pretrain"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    assert options.use_fsdp
    for name, value in prepare_multi_gpu_env(options).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(make_real_model(make_data_arguments()))
    plugin.set_mixed_precision("bf16")
    wrapped = {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == {"Blip2EncoderLayer", "EmuCausalFormerLayer", "LlamaDecoderLayer"}
    assert (plugin.fsdp_version, plugin.mixed_precision_policy.param_dtype) == (2, torch.bfloat16)
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


class ParsedDeepSpeedFile(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """transformers' own parsing, which asks for an installed DeepSpeed only to begin."""

    def __init__(self, path: str):
        HfDeepSpeedConfig.__init__(self, path)
        self._dtype, self.mismatches = None, []


def fill_deepspeed_file() -> ParsedDeepSpeedFile:
    parsed = ParsedDeepSpeedFile(str(LAUNCHERS / "deepspeed-zero3.json"))
    settings = ["use_cpu=true", "fsdp=false", "per_device_train_batch_size=3", "gradient_accumulation_steps=2"]
    _, training = parse_recipe("emu-pretrain", settings, PretrainArguments)
    parsed.trainer_config_process(training)
    parsed.trainer_config_finalize(training, make_real_model(make_data_arguments()), 10_000)
    return parsed


def test_deepspeed_file():
    """Filled in from a recipe by transformers' class; not run."""
    parsed = fill_deepspeed_file()
    assert parsed.is_zero3()
    assert parsed.mismatches == []
    assert parsed.dtype() == torch.bfloat16
    assert '"auto"' not in json.dumps({**parsed.config, "fp16": None})
    assert (parsed.config["gradient_clipping"], parsed.config["train_batch_size"]) == (1.0, 6)


def test_deepspeed_takes_its_file():
    """Where DeepSpeed is installed: filled in as above, by DeepSpeed's own class."""
    runtime = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is not installed")
    parsed = runtime.DeepSpeedConfig(fill_deepspeed_file().config)
    assert parsed.zero_optimization_stage == 3
    assert parsed.bfloat16_config.enabled


@pytest.mark.parametrize("recipe", ["emu-pretrain", "emu-i", "instruct-24gb", "decoder", "decoder-24gb"])
def test_the_table_of_readme_is_what_is_computed(recipe):
    page = (Path(__file__).parents[1] / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {recipe} |"))
    memory = plan_training(recipe, ["model=published"], lambda _: EmuConfig(), lambda *_: PUBLISHED_DECODER).memory
    expected = []
    for name in ("1", "8 DDP", "8 FSDP2", "128 FSDP2"):
        card = smallest_card_gb(memory[name].total) if name in memory else None
        cell = f"{memory[name].total / 1e9:.1f}, {f'{card} GB' if card else 'none'}" if name in memory else ""
        expected.append(cell)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == expected
