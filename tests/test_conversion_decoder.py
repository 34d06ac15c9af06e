"""The visual decoder's part of a conversion: every weight, under today's names, and only what fits together."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, convert_golden
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from conversion.checkpoint import write_safetensors
from conversion.convert_emu_to_hub import main as convert_emu_to_hub


WEIGHTS = {
    "unet": ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    "vae": ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    "safety_checker": ("pytorch_model.bin", "model.safetensors"),
}


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden `pretrain/` folder that a test may change, with its sizes beside it."""
    shutil.copytree(GOLDENS / "pretrain", tmp_path / "golden", copy_function=shutil.copyfile)
    for folder in (tmp_path / "golden").rglob("*"):
        folder.chmod(0o755)
    return tmp_path / "golden" / "pretrain"


def convert(source: Path, output: Path, *options: str) -> Path:
    golden = source.parent
    sizes = [f"--model-config={golden / 'Emu.json'}", f"--causal-former-config={golden / 'causal_former_t5.json'}"]
    convert_emu_to_hub([str(source), *sizes, f"--output={output}", *options])
    return output


def refuse(source: Path, output: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        convert(source, output, *options)
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))
    return str(stop.value)


def change_weights(source: Path, name: str, change: dict[str, torch.Tensor | None]) -> None:
    file = source / name / WEIGHTS[name][0]
    weights = torch.load(file) | change
    torch.save({key: tensor for key, tensor in weights.items() if tensor is not None}, file)


def test_every_weight_of_the_decoder_keeps_its_bits(converted_pretrain):
    for name, (old_file, new_file) in WEIGHTS.items():
        old = torch.load(GOLDENS / "pretrain" / "pretrain" / name / old_file)
        new = load_file(converted_pretrain / name / new_file)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
    for file in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert (converted_pretrain / file).read_bytes() == (GOLDENS / "pretrain" / "pretrain" / file).read_bytes()
    report = json.loads((converted_pretrain / "conversion_report.json").read_text())
    assert report["decoder"].keys() == WEIGHTS.keys()
    for name, (old_file, _) in WEIGHTS.items():
        old = torch.load(GOLDENS / "pretrain" / "pretrain" / name / old_file)
        part = report["decoder"][name]
        assert list(part["source"]) == [f"{name}/{old_file}"]
        assert part["tensors_read"] == part["tensors_written"] == len(old)
        assert part["parameters"] == sum(tensor.numel() for tensor in old.values())
        assert part["dtypes_read"] == part["dtypes_written"] == {"float32": len(old)}
        assert part["dropped"] == []


def test_dtype_reaches_the_decoder(source, tmp_path):
    folder = convert(source, tmp_path / "output", "--dtype=bfloat16")
    report = json.loads((folder / "conversion_report.json").read_text())
    for name, (_, file) in WEIGHTS.items():
        weights = load_file(folder / name / file)
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert report["decoder"][name]["dtypes_read"] == {"float32": len(weights)}
        assert report["decoder"][name]["dtypes_written"] == {"bfloat16": len(weights)}


def test_what_lies_in_the_decoder_is_compared_with_the_source(source, tmp_path, monkeypatch):
    """As a disk that gives back other bytes than it got: one number is changed after writing."""

    def write_and_damage(file, layout, build):
        write_safetensors(file, layout, build)
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr("conversion.decoder.write_safetensors", write_and_damage)
    with pytest.raises(RuntimeError, match="got other numbers in the file"):
        convert(source, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_rounding_of_the_decoder_is_in_the_report(source, tmp_path):
    change_weights(source, "unet", {"conv_in.bias": torch.full((16,), 4097.0)})  # 4096 in bfloat16
    report = json.loads(
        (convert(source, tmp_path / "output", "--dtype=bfloat16") / "conversion_report.json").read_text()
    )
    assert report["maximum_difference"] == 1.0


def test_a_decoder_of_its_own_folder_joins_instruct(source, tmp_path):
    output = convert_golden("instruct/Emu-instruct.pt", tmp_path / "output", f"--decoder={source}")
    index = json.loads((output / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert (output / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_safetensors_and_names_from_before_diffusers_0_13_are_read(source, converted_pretrain, tmp_path):
    file = source / "vae" / "diffusion_pytorch_model.bin"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in torch.load(file).items():
        for new, former in names.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{former}.")
        old[key] = tensor
    assert any("proj_attn" in key for key in old)
    file.unlink()
    save_file(old, file.with_suffix(".safetensors"))
    folder = convert(source, tmp_path / "output")
    got, expected = (load_file(path / "vae" / WEIGHTS["vae"][1]) for path in (folder, converted_pretrain))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_position_ids_of_an_older_safety_checker_are_dropped(source, tmp_path):
    ids = {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    change_weights(source, "safety_checker", ids)
    folder = convert(source, tmp_path / "output")
    weights = load_file(folder / "safety_checker" / "model.safetensors")
    assert not ids.keys() & weights.keys()
    part = json.loads((folder / "conversion_report.json").read_text())["decoder"]["safety_checker"]
    assert part["dropped"] == list(ids)
    assert part["tensors_read"] == part["tensors_written"] + 1 == len(weights) + 1


def test_a_decoder_without_safety_checker_is_a_decoder(source, tmp_path):
    shutil.rmtree(source / "safety_checker")
    assert "feature_extractor alone" in refuse(source, tmp_path / "output")
    shutil.rmtree(source / "feature_extractor")
    index = json.loads((convert(source, tmp_path / "output") / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_a_missing_component_is_named(source, tmp_path, name):
    shutil.rmtree(source / name)
    assert f"no {name}" in refuse(source, tmp_path / "output")


def test_a_unet_that_works_on_pixels_needs_no_vae(source, tmp_path):
    unet_config = UNet2DConditionModel.load_config(source / "unet") | {"in_channels": 3, "out_channels": 3}
    shutil.rmtree(source / "unet")
    UNet2DConditionModel.from_config(unet_config).save_pretrained(source / "unet")
    shutil.rmtree(source / "vae")
    folder = convert(source, tmp_path / "output")
    assert json.loads((folder / "model_index.json").read_text())["vae"] == [None, None]
    assert not (folder / "vae").exists()
    assert load_file(folder / "unet" / WEIGHTS["unet"][1])["conv_in.weight"].shape[1] == 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet", {"conv_in.bias": None}, "missing keys: conv_in.bias"),
        ("vae", {"surprise": torch.ones(1)}, "unknown keys: surprise"),
        ("unet", {"conv_in.bias": torch.ones(3)}, "conv_in.bias (3,) instead of"),
        ("unet", {"conv_in.bias": torch.full((16,), torch.nan)}, "unet: conv_in.bias: got 16 numbers that are NaN"),
        ("safety_checker", {"concept_embeds": None}, "missing keys: concept_embeds"),
        ("vae", {"quant_conv.bias": torch.ones(8, dtype=torch.int64)}, "quant_conv.bias torch.int64"),
        ("unet", {"conv_in.bias": torch.ones(16, dtype=torch.float64)}, "conv_in.bias torch.float64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(source, tmp_path, name, change, message):
    change_weights(source, name, change)
    assert message in refuse(source, tmp_path / "output")


def test_a_unet_of_another_width_is_refused(source, tmp_path):
    file = source / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 768}))
    assert "cross_attention_dim 768, expected 64" in refuse(source, tmp_path / "output")
