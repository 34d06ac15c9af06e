"""Conversion both ways: the same function for any size, the same bits back, and an error for everything else."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, make_config
from golden_emu import GOLDEN_EMU
from huggingface_hub import ModelCard
from peft import PeftModel
from published import PublishedEmu, Sizes, make_state_dict, write_sizes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion import convert_hub_to_emu
from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.convert_emu_to_hub import PARTS, build_meta_model
from conversion.convert_emu_to_hub import main as convert_emu_to_hub
from conversion.key_table import KEY_TABLE, canonical_name, peft_name
from conversion.surgery import fuse_qkv_bias, merge_lora, split_qkv_bias
from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.hub.outputs import whole_folder


ROOT = Path(__file__).parents[1]
PRETRAIN = Sizes()
INSTRUCT = Sizes(lora_rank=4)
OTHER_SIZES = {
    "narrow": PRETRAIN,
    "more images tokens than buckets": Sizes(num_image_tokens=17, num_buckets=6, former_layers=1, former_heads=2),
    "deep, other heads, patches and vocabulary": Sizes(
        width=40,
        head_width=8,
        vision_layers=4,
        patch_size=7,
        image_size=28,
        llama_heads=6,
        llama_layers=1,
        num_tokens=333,
    ),
    "instruct": INSTRUCT,
    "instruct of newer peft": Sizes(lora_rank=16, lora_keys="base_layer.weight", num_tokens=310),
}
EMBEDDING = "decoder.lm.model.embed_tokens.weight"


class Workshop:
    """A folder with the files of one set of sizes, in which checkpoints are saved and converted."""

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes
        folder.mkdir(exist_ok=True)
        self.options = write_sizes(folder, sizes)
        self.output = folder / "output"

    def save(self, state_dict: object, name: str = "Emu.pt") -> Path:
        torch.save(state_dict, self.folder / name)
        return self.folder / name

    def convert(self, source: Path, *options: str, output: Path | None = None) -> Path:
        convert_emu_to_hub([str(source), *self.options, f"--output={output or self.output}", *options])
        return output or self.output

    def refuse(self, source: Path, *options: str) -> str:
        """Convert what must be refused; give the message, after a look that nothing is left."""
        before = sorted(self.folder.iterdir())
        with pytest.raises(SystemExit) as stop:
            self.convert(source, *options)
        assert sorted(self.folder.iterdir()) == before
        message = str(stop.value)
        assert message.startswith("error: ")
        assert "got" in message
        assert "expected" in message
        return message


@pytest.fixture
def pretrain(tmp_path):
    return Workshop(tmp_path / "pretrain", PRETRAIN)


@pytest.fixture
def instruct(tmp_path):
    return Workshop(tmp_path / "instruct", INSTRUCT)


@pytest.fixture
def instruct_adapter(tmp_path) -> Path:
    """A repository of Emu-I with its adapter beside it, of the published rank."""
    workshop = Workshop(tmp_path / "instruct", Sizes(lora_rank=16))
    return workshop.convert(workshop.save(make_state_dict(workshop.sizes)), "--lora=adapter")


def read_report(folder: Path) -> dict:
    return json.loads((folder / "conversion_report.json").read_text())


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


# -- the same function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "module"])
@pytest.mark.parametrize("sizes", OTHER_SIZES.values(), ids=OTHER_SIZES)
def test_converted_model_computes_what_the_published_one_does(sizes, wrapped, tmp_path):
    workshop = Workshop(tmp_path, sizes)
    state_dict = make_state_dict(sizes)
    folder = workshop.convert(workshop.save({"module": state_dict} if wrapped else state_dict))
    model = EmuForMultimodalGeneration.from_pretrained(folder).eval()
    published = PublishedEmu(state_dict, sizes)
    pixel_values = torch.randn(2, 3, sizes.image_size, sizes.image_size, generator=torch.Generator().manual_seed(1))
    config = model.config
    image = [config.image_start_token_id, *[config.image_token_id] * sizes.num_image_tokens, config.image_end_token_id]
    input_ids = torch.tensor([[1, 5, *image, 7, 8, *image, 9, 2]])
    with torch.no_grad():
        features = published.encode(pixel_values)
        embeds = published.form(features)
        logits, regressed = published.read(input_ids, input_ids == config.image_token_id, embeds)
        images = model.get_image_features(pixel_values)
        outputs = model(input_ids=input_ids, pixel_values=pixel_values)
    # Another order of the same float32 operations.
    torch.testing.assert_close(images.last_hidden_state, features, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.stack(tuple(images.pooler_output)), embeds, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.regressed_embeds, regressed, rtol=1e-4, atol=1e-4)
    assert len(config.architectures) == 1
    assert config.variant == ("instruct" if sizes.lora_rank else "pretrain")


def test_adapter_gives_what_merging_gives(instruct):
    source = instruct.save({"module": make_state_dict(INSTRUCT)})
    merged = EmuForMultimodalGeneration.from_pretrained(instruct.convert(source)).eval()
    unmerged = instruct.convert(source, "--lora=adapter", output=instruct.folder / "unmerged")
    base = EmuForMultimodalGeneration.from_pretrained(unmerged).eval()
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = merged(input_ids=input_ids).logits
        assert not torch.allclose(base(input_ids=input_ids).logits, expected, atol=1e-2)
        adapted = PeftModel.from_pretrained(base, unmerged / "adapter").eval()
        torch.testing.assert_close(adapted(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    lora = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A") and "lora_" not in name]
    assert len(lora) == 4 * INSTRUCT.llama_layers
    assert all(".language_model.layers." in name for name in lora)


# -- the way back --------------------------------------------------------------------------------------------------


def without_dropped(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dropped = ("visual.norm.", "visual.head.", "cformer.cformer.embed_tokens.")
    return {k: v for k, v in state_dict.items() if not k.startswith(dropped) and not k.endswith("rotary_emb.inv_freq")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [(PRETRAIN, []), (Sizes(lora_rank=16), ["--lora=adapter"])],
    ids=["pretrain", "instruct"],
)
def test_every_kept_tensor_comes_back_unchanged(sizes, options, dtype, tmp_path):
    workshop = Workshop(tmp_path, sizes)
    state_dict = make_state_dict(sizes, dtype=dtype)
    folder = workshop.convert(workshop.save(state_dict), *options, "--max-shard-size=30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    convert_hub_to_emu.main([str(folder), f"--output={tmp_path / 'back.pt'}"])
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_bits(back, without_dropped(state_dict))
    # and it is a source again
    again = workshop.convert(tmp_path / "back.pt", *options, output=tmp_path / "again")
    assert_same_bits(load_file(again / "model.safetensors"), read_model(folder))


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("source", "options"), [("pretrain/pretrain", []), ("instruct/Emu-instruct.pt", ["--lora=adapter"])]
)
def test_goldens_come_back_unchanged(source, options, tmp_path):
    golden = GOLDENS / source.split("/")[0]
    sizes = [f"--model-config={golden / 'Emu.json'}", f"--causal-former-config={golden / 'causal_former_t5.json'}"]
    # --llama-config is found beside the source
    convert_emu_to_hub([str(GOLDENS / source), *sizes, *options, f"--output={tmp_path / 'hub'}"])
    convert_hub_to_emu.main([str(tmp_path / "hub"), f"--output={tmp_path / 'back.pt'}"])
    file = GOLDENS / source
    file = file if file.is_file() else file / "multimodal_encoder" / "pytorch_model.bin"
    expected = torch.load(file, weights_only=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_bits(back, without_dropped(expected.get("module", expected)))


def test_key_bias_is_left_out_and_said(pretrain, capsys):
    folder = pretrain.convert(pretrain.save(make_state_dict(PRETRAIN)))
    weights = load_file(folder / "model.safetensors")
    name = "model.vision_model.encoder.layers.1.self_attn.qkv.bias"
    assert weights[name].chunk(3)[1].count_nonzero() == 0
    weights[name][PRETRAIN.width] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    convert_hub_to_emu.main([str(folder), f"--output={pretrain.folder / 'back.pt'}"])
    assert name in capsys.readouterr().out


def refuse_back(folder: Path) -> str:
    output = folder.with_name("back.pt")
    with pytest.raises(SystemExit) as stop:
        convert_hub_to_emu.main([str(folder), f"--output={output}"])
    assert not output.exists()
    message = str(stop.value)
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.extra.weight": torch.ones(2)}, "unknown keys: model.extra.weight"),
        (
            {"lm_head.weight": None, "regression_head.weight": None},
            "missing keys: lm_head.weight, regression_head.weight",
        ),
        ({"regression_head.weight": torch.ones(48, 47)}, "regression_head.weight (48, 47) instead of (48, 48)"),
    ],
    ids=["extra", "missing", "shape"],
)
def test_way_back_refuses_what_its_configuration_does_not_say(pretrain, changes, message):
    folder = pretrain.convert(pretrain.save(make_state_dict(PRETRAIN)))
    weights = change(load_file(folder / "model.safetensors"), **changes)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert message in refuse_back(folder)


def test_way_back_refuses_another_language_model_and_another_model(pretrain, tmp_path):
    config = make_config({"model_type": "qwen2"})
    EmuForMultimodalGeneration(config).save_pretrained(tmp_path / "qwen")
    assert "model.language_model.layers.0.self_attn.q_proj.bias, " in refuse_back(tmp_path / "qwen")
    config.text_config.save_pretrained(tmp_path / "text")
    assert "got 'qwen2', expected 'emu'" in refuse_back(tmp_path / "text")
    folder = pretrain.convert(pretrain.save(make_state_dict(PRETRAIN)))
    content = json.loads((folder / "config.json").read_text())
    content["causal_former_config"]["num_image_tokens"] = 0
    (folder / "config.json").write_text(json.dumps(content))
    assert "num_image_tokens" in refuse_back(folder)


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_alpha": 32},
        {"r": 8},
        {"bias": "lora_only"},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 8}},
        {"peft_type": "IA3"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_way_back_refuses_an_adapter_that_the_published_code_would_apply_otherwise(instruct_adapter, setting):
    file = instruct_adapter / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    assert next(iter(setting)) in refuse_back(instruct_adapter)


def test_way_back_refuses_an_adapter_on_other_modules_or_of_another_rank(instruct_adapter):
    file = instruct_adapter / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    layer = "base_model.model.model.language_model.layers.1"
    name = f"{layer}.self_attn.o_proj.lora_A.weight"
    for changes, message in (
        ({f"{layer}.mlp.up_proj.lora_A.weight": torch.ones(16, 48)}, "mlp.up_proj.lora_A"),
        ({name: None}, f"got no {name}"),
        ({name: torch.ones(4, 48)}, f"'{name}': 4"),
    ):
        save_file(change(weights, **changes), file)
        assert message in refuse_back(instruct_adapter)


def test_an_adapter_of_several_ranks_is_refused_and_can_be_merged(instruct):
    key = f"{INSTRUCT.lm}model.layers.2.self_attn.o_proj.lora_{{}}.default.weight"
    changes = {key.format("A"): torch.ones(3, 48), key.format("B"): torch.ones(48, 3)}
    source = instruct.save(make_state_dict(INSTRUCT) | changes)
    assert "ranks [3, 4]" in instruct.refuse(source, "--lora=adapter")
    instruct.convert(source, "--lora=merge")


def test_way_back_keeps_an_existing_file(converted_pretrain, tmp_path):
    (tmp_path / "back.pt").write_text("precious")
    with pytest.raises(SystemExit, match="exists"):
        convert_hub_to_emu.main([str(converted_pretrain), f"--output={tmp_path / 'back.pt'}"])
    assert (tmp_path / "back.pt").read_text() == "precious"


# -- table and surgery ---------------------------------------------------------------------------------------------


def test_table_is_one_to_one():
    targets = [target for target in KEY_TABLE.values() if target is not None]
    assert len(set(targets)) == len(targets)
    for source, target in KEY_TABLE.items():
        assert target is None or source.count("{}") == target.count("{}")


def test_names_of_emu_i_lead_to_those_of_base_emu_and_back():
    for sizes in (INSTRUCT, OTHER_SIZES["instruct of newer peft"]):
        names = list(make_state_dict(sizes))
        canonical = [canonical_name(name) for name in names]
        assert len(set(canonical)) == len(names)
        assert [peft_name(name) for name in canonical] == [name.replace(".base_layer", "") for name in names]


def test_surgery_pairs_are_inverses():
    query, value = torch.randn(2, 6, dtype=torch.bfloat16)
    bias = fuse_qkv_bias(query, value)
    assert bias.shape == (18,)
    assert_same_bits(split_qkv_bias(bias), {"query": query, "value": value})
    weight, lora_a, lora_b = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    torch.testing.assert_close(merge_lora(merge_lora(weight, lora_a, lora_b), lora_a, -lora_b), weight)
    with pytest.raises(ValueError, match="LoRA"):
        merge_lora(weight, lora_a, lora_b.T)


# -- sources and options -------------------------------------------------------------------------------------------


def test_every_form_of_source_gives_the_same_weights(pretrain, tmp_path):
    state_dict = make_state_dict(PRETRAIN)
    expected = read_model(pretrain.convert(pretrain.save(state_dict)))
    single = pretrain.folder / "Emu.safetensors"
    save_file(state_dict, single)
    shards = tmp_path / "shards"
    shards.mkdir()
    names = list(state_dict)
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state_dict[name] for name in names if files[name] == file}, shards / file)
    (shards / "Emu.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    folder = tmp_path / "pretrain" / "published" / "multimodal_encoder"
    folder.mkdir(parents=True)
    torch.save(state_dict, folder / "pytorch_model.bin")
    for number, source in enumerate((single, shards, folder)):
        output = pretrain.convert(source, output=tmp_path / f"output-{number}")
        assert_same_bits(read_model(output), expected)


def test_shards_hold_each_weight_once_under_the_limit(pretrain):
    source = pretrain.save(make_state_dict(PRETRAIN))
    whole = load_file(pretrain.convert(source) / "model.safetensors")
    folder = pretrain.convert(source, "--max-shard-size=100KB", output=pretrain.folder / "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in folder.glob("*.safetensors"):
        shard = load_file(file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 100_000
        assert dict.fromkeys(shard, file.name).items() <= index["weight_map"].items()
        assert not found.keys() & shard.keys()
        found |= shard
    assert_same_bits(found, whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    loaded = EmuForMultimodalGeneration.from_pretrained(folder)
    assert_same_bits(dict(loaded.state_dict()), whole)


def test_safetensors_are_read_by_the_library(pretrain):
    """Written by ourselves, tensor by tensor; mixed dtypes must lie where the library looks."""
    state_dict = make_state_dict(PRETRAIN)
    state_dict["cformer.projection.bias"] = state_dict["cformer.projection.bias"].half()
    state_dict["ln_visual.weight"] = state_dict["ln_visual.weight"].bfloat16()
    folder = pretrain.convert(pretrain.save(state_dict))
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for source, name in (
            ("cformer.projection.bias", "model.causal_former.projection.bias"),
            ("ln_visual.weight", "model.vision_model.post_layernorm.weight"),
            (EMBEDDING, "model.language_model.embed_tokens.weight"),
        ):
            assert_same_bits({name: opened.get_tensor(name)}, {name: state_dict[source]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_asked_for_and_the_difference_is_reported(pretrain, dtype):
    state_dict = make_state_dict(PRETRAIN)
    folder = pretrain.convert(pretrain.save(state_dict), f"--dtype={dtype}")
    weights = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    head = state_dict["decoder.lm.lm_head.weight"].to(getattr(torch, dtype))
    assert_same_bits({"": weights["lm_head.weight"]}, {"": head})
    largest = max(
        float((tensor - tensor.to(head.dtype)).abs().max()) for tensor in without_dropped(state_dict).values()
    )
    assert read_report(folder)["maximum_difference"] == pytest.approx(largest)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_merging_in_bfloat16_rounds_once(instruct):
    state_dict = make_state_dict(INSTRUCT, dtype=torch.bfloat16)
    folder = instruct.convert(instruct.save(state_dict))
    key = f"{INSTRUCT.lm}model.layers.1.self_attn.v_proj"
    exact = state_dict[f"{key}.weight"].float() + 16 / 4 * (
        state_dict[f"{key}.lora_B.default.weight"].float() @ state_dict[f"{key}.lora_A.default.weight"].float()
    )
    merged = load_file(folder / "model.safetensors")["model.language_model.layers.1.self_attn.v_proj.weight"]
    assert torch.equal(merged, exact.bfloat16())


def test_report_accounts_for_everything(converted_pretrain, converted_instruct):
    for folder, variant, dropped in ((converted_pretrain, "pretrain", 7), (converted_instruct, "instruct", 7)):
        report = read_report(folder)
        golden = GOLDENS / variant
        file = golden / (
            "Emu-instruct.pt" if variant == "instruct" else "pretrain/multimodal_encoder/pytorch_model.bin"
        )
        sha256 = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
        assert report["source"] == {file.name: sha256}
        assert report["variant"] == variant
        assert report["maximum_difference"] == 0
        assert len(report["dropped"]) == dropped
        assert report["tensors_written"] == len(load_file(folder / "model.safetensors"))
        fused = 3 + (16 if variant == "instruct" else 0)  # biases; LoRA pairs
        assert report["tensors_read"] == report["tensors_written"] + dropped + fused
        parameters = [part["parameters"] for part in report["parts"].values()]
        assert sum(parameters) == report["parameters"]
        assert len(parameters) == 4


# -- the card ------------------------------------------------------------------------------------------------------


def test_card_says_what_the_folder_holds(converted_pretrain, converted_instruct, pretrain):
    without_decoder = pretrain.convert(pretrain.save(make_state_dict(PRETRAIN)), "--dtype=bfloat16")
    for folder, has_decoder in ((converted_pretrain, True), (converted_instruct, False), (without_decoder, False)):
        card, report = ModelCard.load(folder / "README.md"), read_report(folder)
        template = ModelCard.load(ROOT / "model_cards" / f"emu-{report['variant']}.md")
        assert card_template_place(template) not in card.text
        dtype = "bfloat16" if folder == without_decoder else "float32"
        for part, facts in (report["parts"] | report["decoder"]).items():
            assert f"| {part} | {facts['parameters']:,} | {dtype} |" in card.text
        assert f"`{next(iter(report['source']))}`" in card.text
        assert (folder / "unet").is_dir() == has_decoder
        assert ("DiffusionPipeline" in card.text) == has_decoder
        assert ("no visual decoder" in card.text) == (not has_decoder)
        assert ("diffusers" in card.data.tags) == has_decoder
        assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        before, after = template.text.split(card_template_place(template))
        assert card.text.startswith(before)
        assert card.text.endswith(after)


def card_template_place(template: ModelCard) -> str:
    [line] = [line for line in template.text.splitlines() if line.startswith("*Conversion writes here")]
    return line


def test_sizes_in_the_cards_are_those_of_the_published_configuration():
    parameters = build_meta_model(EmuConfig()).state_dict()
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in parameters.items():
        sizes[next(part for part, prefix in PARTS.items() if name.startswith(prefix))] += tensor.numel()
    assert sizes["vision tower"] == 1_011_202_432
    for card in ("emu-pretrain.md", "emu-instruct.md"):
        table = re.findall(
            r"^\| (.*?) \| .* \| (\d\.\d{3}|\d{2}\.\d{3}) B \|$", (ROOT / "model_cards" / card).read_text(), re.M
        )
        assert dict(table) == {part: f"{size / 1e9:.3f}" for part, size in sizes.items() if part != "adapter"}
        assert f"{sum(sizes.values()) * 2 / 1e9:.1f} GB in bfloat16" in (ROOT / "model_cards" / card).read_text()


def test_card_of_an_adapter_says_how_to_load_it(instruct):
    """Its line is run as it stands, and gives what merging gives."""
    source = instruct.save(make_state_dict(INSTRUCT))
    merged = instruct.convert(source)
    assert "load_adapter" not in (merged / "README.md").read_text()
    folder = instruct.convert(source, "--lora=adapter", output=instruct.folder / "unmerged")
    [line] = [
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("model.load_adapter")
    ]
    model = EmuForMultimodalGeneration.from_pretrained(folder)
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = EmuForMultimodalGeneration.from_pretrained(merged)(input_ids=input_ids).logits
        assert not torch.allclose(model(input_ids=input_ids).logits, expected, atol=1e-2)
        exec(line.replace("org/emu-instruct", str(folder)), {"model": model})
        torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-4)


# -- refusals ------------------------------------------------------------------------------------------------------


def change(state_dict: dict, **changes: torch.Tensor | None) -> dict:
    state_dict = {**state_dict, **changes}
    return {name: tensor for name, tensor in state_dict.items() if tensor is not None}


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.blocks.1.mlp.fc1.bias": None}, "missing keys: visual.blocks.1.mlp.fc1.bias"),
        ({"visual.blocks.0.attn.v_bias": None}, "missing keys: visual.blocks.0.attn.v_bias"),
        ({"decoder.lm.lm_head.weight": None, "ln_visual.bias": None}, "decoder.lm.lm_head.weight, ln_visual.bias"),
        ({EMBEDDING: None}, "no decoder.lm.model.embed_tokens.weight"),
        ({"visual.surprise": torch.ones(1)}, "unknown keys: visual.surprise"),
        ({"visual.blocks.2.norm1.bias": torch.ones(36)}, "unknown keys: visual.blocks.2.norm1.bias"),
        ({"visual.blocks.0.attn.k_bias": torch.ones(36)}, "unknown keys: visual.blocks.0.attn.k_bias"),
        ({"decoder.lm.model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(48, 48)}, "there twice"),
        ({"decoder.lm.base_model.model.lm_head.weight": torch.ones(306, 48)}, "LoRA"),
        ({"visual.pos_embed": torch.ones(1, 9, 36)}, "visual.pos_embed (1, 9, 36) instead of (1, 10, 36)"),
        ({"visual.blocks.0.attn.q_bias": torch.ones(35)}, "visual.blocks.0.attn.q_bias"),
        ({"cformer.projection.weight": torch.ones(20, 48)}, "(20, 48) instead of (48, 20)"),
        ({"ln_visual.weight": torch.ones(36, dtype=torch.int64)}, "ln_visual.weight torch.int64"),
        ({"ln_visual.weight": torch.ones(36, dtype=torch.float64)}, "got ln_visual.weight torch.float64, expected"),
        (
            {"visual.blocks.0.attn.q_bias": torch.ones(36).bfloat16()},
            "visual.blocks.0.attn.q_bias torch.bfloat16 + visual.blocks.0.attn.v_bias torch.float32",
        ),
        ({"ln_visual.weight": with_value(torch.ones(36), torch.nan)}, "ln_visual.weight: got 1 numbers that are NaN"),
        ({"ln_visual.weight": with_value(torch.ones(36), -torch.inf)}, "ln_visual.weight: got 1 numbers that are NaN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keys_shapes_and_numbers_are_accounted_for(pretrain, changes, message):
    source = pretrain.save(change(make_state_dict(PRETRAIN), **changes))
    assert message in pretrain.refuse(source)


def test_dtype_casts_what_is_refused_without(pretrain):
    query = "visual.blocks.0.attn.q_bias"
    state_dict = make_state_dict(PRETRAIN)
    changes = {query: state_dict[query].bfloat16(), "ln_visual.weight": state_dict["ln_visual.weight"].double()}
    folder = pretrain.convert(pretrain.save(state_dict | changes), "--dtype=float32")
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["model.vision_model.post_layernorm.weight"], state_dict["ln_visual.weight"])
    bias = weights["model.vision_model.encoder.layers.0.self_attn.qkv.bias"]
    assert torch.equal(bias.chunk(3)[0], changes[query].float())


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_an_adapter_is_refused(instruct, part):
    key = f"{INSTRUCT.lm}model.layers.2.self_attn.o_proj.{part}.default.weight"
    message = instruct.refuse(instruct.save(change(make_state_dict(INSTRUCT), **{key: None})))
    assert f"missing keys: {canonical_name(key)}" in message


def test_lora_of_another_shape_is_refused(instruct):
    key = f"{INSTRUCT.lm}model.layers.2.self_attn.o_proj.lora_B.default.weight"
    message = instruct.refuse(instruct.save(change(make_state_dict(INSTRUCT), **{key: torch.ones(48, 5)})))
    assert key in message


def test_weights_too_large_for_the_dtype_are_refused(pretrain):
    source = pretrain.save(change(make_state_dict(PRETRAIN), **{"ln_visual.weight": torch.full((36,), 1e6)}))
    assert "post_layernorm.weight as torch.float16" in pretrain.refuse(source, "--dtype=float16")


def test_instruct_weights_are_not_taken_for_pretrain_nor_the_reverse(pretrain, instruct, tmp_path):
    assert "expected pretrain" in pretrain.refuse(pretrain.save(make_state_dict(PRETRAIN)), "--variant=instruct")
    assert "expected instruct" in instruct.refuse(instruct.save(make_state_dict(INSTRUCT)), "--variant=pretrain")
    assert "--lora" in pretrain.refuse(pretrain.save(make_state_dict(PRETRAIN)), "--lora=merge")
    folder = pretrain.convert(pretrain.save(make_state_dict(PRETRAIN)), "--variant=pretrain")
    assert read_report(folder)["variant"] == "pretrain"


def test_a_tokenizer_that_does_not_fit_the_rows_is_refused(pretrain):
    rows = torch.ones(PRETRAIN.num_rows + 1, PRETRAIN.hidden_size)
    source = pretrain.save(change(make_state_dict(PRETRAIN), **{EMBEDDING: rows, "decoder.lm.lm_head.weight": rows}))
    assert "got 305" in pretrain.refuse(source)


def test_published_sizes_are_the_default(pretrain):
    source = pretrain.save(make_state_dict(PRETRAIN))
    with pytest.raises(SystemExit, match=r"visual\.blocks\.39"):
        convert_emu_to_hub([str(source), f"--output={pretrain.output}", pretrain.options[-1]])


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def make_bad_file(kind: str, file: Path) -> None:
    state_dict = make_state_dict(PRETRAIN)
    if kind == "truncated":
        torch.save(state_dict, file)
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "empty":
        file.touch()
    elif kind == "text":
        file.write_text("<html>not found</html>")
    elif kind == "zip with code":
        torch.save(state_dict | {"bomb": Bomb(file.with_name("exploded"))}, file)
    elif kind == "pickle with code":
        file.write_bytes(pickle.dumps(Bomb(file.with_name("exploded"))))
    elif kind == "before torch 1.6":
        torch.save(state_dict, file, _use_new_zipfile_serialization=False)
    elif kind == "list":
        torch.save(list(state_dict.values()), file)
    elif kind == "no tensors":
        torch.save({"epoch": 3} | state_dict, file)
    elif kind == "beside module":
        torch.save({"module": state_dict, "optimizer": {}}, file)
    elif kind == "no entries":
        torch.save({}, file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("truncated", "truncated"),
        ("empty", "empty"),
        ("text", "no torch checkpoint"),
        ("zip with code", "nothing of it was run"),
        ("pickle with code", "no torch checkpoint"),
        ("before torch 1.6", "no torch checkpoint"),
        ("list", "list"),
        ("no tensors", "epoch"),
        ("beside module", "optimizer"),
        ("no entries", "without entries"),
    ],
)
def test_what_is_no_checkpoint_is_refused(pretrain, kind, message):
    file = pretrain.folder / "Emu.pt"
    make_bad_file(kind, file)
    assert message in pretrain.refuse(file)
    assert not (pretrain.folder / "exploded").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ln_visual.bias": torch.eye(36).to_sparse()}, "ln_visual.bias torch.sparse_coo, expected dense"),
        ({"ln_visual.bias": torch.ones(36).to(torch.float8_e4m3fn)}, "ln_visual.bias torch.float8_e4m3fn, expected"),
        ({"ln_visual.bias": torch.ones(36, device="meta")}, "ln_visual.bias without data"),
        ({7: torch.ones(36)}, "the keys 7, expected text"),
    ],
    ids=["sparse", "float8", "meta", "number as key"],
)
def test_entries_that_no_weight_can_be_are_refused(pretrain, entry, message):
    file = pretrain.save(make_state_dict(PRETRAIN) | entry)
    refusal = pretrain.refuse(file)
    assert message in refusal
    assert str(file) in refusal


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map"'])
def test_a_broken_index_is_refused_by_name(pretrain, tmp_path, content):
    (tmp_path / "Emu.safetensors.index.json").write_text(content)
    assert "Emu.safetensors.index.json" in pretrain.refuse(tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_damaged_safetensors_are_refused(pretrain, kind):
    file = pretrain.folder / "Emu.safetensors"
    save_file(make_state_dict(PRETRAIN), file)
    if kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_text("" if kind == "empty" else "hello, safetensors")
    assert "cannot be read" in pretrain.refuse(file)


def test_a_key_in_two_shards_is_refused(pretrain, tmp_path):
    state_dict = make_state_dict(PRETRAIN)
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(state_dict)}
    for file in set(files.values()):
        kept = {name: state_dict[name] for name in state_dict if files[name] == file} | {
            EMBEDDING: state_dict[EMBEDDING]
        }
        save_file(kept, tmp_path / file)
    (tmp_path / "Emu.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert EMBEDDING in pretrain.refuse(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    assert "part-1.safetensors" in pretrain.refuse(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.model"])
def test_an_incomplete_llama_folder_is_refused(pretrain, missing):
    source = pretrain.save(make_state_dict(PRETRAIN))
    (pretrain.folder / "llama_config" / missing).unlink()
    assert missing in pretrain.refuse(source)


# -- outputs appear whole or not at all ----------------------------------------------------------------------------


def test_an_output_folder_with_something_in_it_is_refused(pretrain):
    pretrain.output.mkdir()
    source = pretrain.save(make_state_dict(PRETRAIN))
    pretrain.convert(source)  # empty: fine
    files = {file.name: file.stat().st_mtime_ns for file in pretrain.output.iterdir()}
    assert "not empty" in pretrain.refuse(source)
    assert {file.name: file.stat().st_mtime_ns for file in pretrain.output.iterdir()} == files


def test_two_conversions_into_one_folder_do_not_mix(pretrain):
    source = pretrain.save(make_state_dict(PRETRAIN))
    with whole_folder(pretrain.output) as folder:
        (folder / "file").touch()
        assert "another process" in pretrain.refuse(source)
    assert [file.name for file in pretrain.output.iterdir()] == ["file"]


def test_what_a_killed_conversion_left_is_removed(pretrain):
    left = pretrain.folder / ".output.partial-abc"
    left.mkdir()
    (left / "model.safetensors").touch()
    pretrain.convert(pretrain.save(make_state_dict(PRETRAIN)))
    assert sorted(file.name for file in pretrain.folder.iterdir() if file.name.startswith(".")) == []


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from conversion.{script} import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("script", ["convert_emu_to_hub", "convert_hub_to_emu"])
def test_a_disk_that_fills_up_leaves_nothing(pretrain, script):
    source = pretrain.save(make_state_dict(PRETRAIN))
    arguments = [str(source), *pretrain.options]
    if script == "convert_hub_to_emu":
        arguments = [str(pretrain.convert(source, output=pretrain.folder / "whole"))]
    before = sorted(pretrain.folder.iterdir())
    process = subprocess.run(
        [sys.executable, "-c", LIMITED.format(script=script), *arguments, f"--output={pretrain.folder / 'output'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "disk full while writing" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert sorted(pretrain.folder.iterdir()) == before


def test_a_disk_that_is_too_small_is_seen_before_writing(pretrain, monkeypatch):
    usage = type("usage", (), {"free": 100_000_000 - (64 << 20)})
    monkeypatch.setattr("modeling_emu.hub.outputs.shutil.disk_usage", lambda folder: usage)
    assert f"free disk space for {pretrain.output}: " in pretrain.refuse(pretrain.save(make_state_dict(PRETRAIN)))


@pytest.mark.parametrize("size", ["0", "0GB", "-5GB", "0.1", "5 apples", "nanGB"])
def test_a_shard_size_that_is_none_is_refused(pretrain, size):
    assert f"--max-shard-size: got {size}, " in pretrain.refuse(
        pretrain.save(make_state_dict(PRETRAIN)), f"--max-shard-size={size}"
    )


def test_what_is_refused_does_not_wait_for_the_checksum(pretrain, monkeypatch):
    """The file is a pipe that nobody writes to: reading it never ends."""
    state_dict = make_state_dict(PRETRAIN)
    state_dict["ln_visual.weight"] = with_value(state_dict["ln_visual.weight"], torch.nan)
    source = pretrain.save(state_dict)
    pipe = pretrain.folder / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(
        "conversion.convert_emu_to_hub.open_checkpoint", lambda path: Checkpoint(open_checkpoint(path).tensors, [pipe])
    )
    assert "NaN" in pretrain.refuse(source)


def test_the_script_runs_from_a_checkout(pretrain):
    source = pretrain.save(make_state_dict(PRETRAIN))
    command = [sys.executable, ROOT / "conversion" / "convert_emu_to_hub.py", source, *pretrain.options]
    process = subprocess.run(
        [*command, f"--output={pretrain.output}"], cwd=pretrain.folder, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert (pretrain.output / "config.json").is_file()


def test_the_model_of_the_training_tests_is_the_converted_golden(converted_pretrain):
    """Only the variant and the safety checker set it apart."""
    for path in GOLDEN_EMU.rglob("*.safetensors"):
        expected = load_file(converted_pretrain / path.relative_to(GOLDEN_EMU))
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("tokenizer.json", "chat_template.jinja", "unet/config.json", "vae/config.json"):
        assert (GOLDEN_EMU / name).read_text() == (converted_pretrain / name).read_text()
    config = json.loads((GOLDEN_EMU / "config.json").read_text())
    assert config.pop("variant") == json.loads((GOLDEN_EMU / "processor_config.json").read_text())["variant"]
    assert config["text_config"] == json.loads((converted_pretrain / "config.json").read_text())["text_config"]
    index = json.loads((GOLDEN_EMU / "model_index.json").read_text())
    assert [name for name in index if index[name] == [None, None]] == ["feature_extractor", "safety_checker"]
