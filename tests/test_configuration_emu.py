"""EmuConfig: what goes to JSON comes back, and what cannot work is refused."""

import json
import subprocess
import sys

import pytest
from conftest import make_config

from modeling_emu import EmuConfig


def test_defaults_are_the_published_checkpoint():
    config = EmuConfig()
    vision, former, text = config.vision_config, config.causal_former_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (1408, 40, int(1408 * 4.3637))
    assert (former.hidden_size, former.num_hidden_layers, former.num_image_tokens) == (768, 12, 32)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (5120, 40, 32004)
    assert config.num_image_tokens == 32
    assert config.get_text_config() is text


def test_json_round_trip(tmp_path):
    config = make_config(variant="mine", regression_loss="cosine", text_loss_weight=0.5)
    config.save_pretrained(tmp_path)
    assert EmuConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["variant"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_token_id": 98}, "image_token_id: got 98, expected an id below text_config.vocab_size = 98"),
        ({"image_token_id": 95}, "expected three different ids"),
        ({"regression_loss": "l1"}, "regression_loss"),
        (
            {"regression_loss": "cosine", "normalize_regression_targets": True},
            "normalize_regression_targets: got True",
        ),
        ({"variant": 1}, "variant"),
        ({"text_config": {"hidden_size": 64}}, "projection_size: got 32, expected text_config.hidden_size = 64"),
        ({"text_config": {"tie_word_embeddings": True}}, "tie_word_embeddings: got False"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(Exception, match=message.replace("[", r"\[")):
        make_config(**arguments)


@pytest.mark.parametrize(
    ("field", "value"), [("num_image_tokens", 0), ("num_position_buckets", 1), ("max_position_distance", 2)]
)
def test_causal_former_sizes_that_cannot_be_are_refused(field, value):
    former = make_config().causal_former_config.to_dict() | {field: value}
    with pytest.raises(Exception, match=f"{field}: got {value}"):
        EmuConfig(causal_former_config=former)


@pytest.mark.parametrize("module", ["configuration_emu", "modeling_emu", "processing_emu", "pipeline_emu"])
def test_older_transformers_is_named(module):
    script = f"""
import sys, transformers
transformers.__version__ = "4.57.0"

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("transformers.", "diffusers")) and not name.startswith("transformers.utils"):
            raise ImportError(name + " is not in this version")

sys.meta_path.insert(0, Missing())
try:
    import modeling_emu.{module}
except ImportError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "transformers: got 4.57.0, Emu expects 5.20.0 or newer" in printed
