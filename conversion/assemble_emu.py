# Copyright 2026 The Emu Hub-native developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Start a new Emu for pretraining from a language model, a vision tower and a Stable Diffusion decoder.

    python conversion/assemble_emu.py --language-model llama-13b --vision EVA01_CLIP_g_14_psz14_s11B.pt \\
        --decoder stable-diffusion-v1-5 --output emu-start

The language model is one of transformers that is a decoder and a head without bias, scale or soft cap: LLaMA, Mistral,
Qwen2, GPT-2 are; Phi, Granite, Cohere and Gemma 2 are not, and are refused. It needs memory for its weights, and its
tokenizer gets Emu's tokens, whose rows begin as the mean of the old ones. The vision tower is an EVA-CLIP checkpoint (`visual.*`, or
these names bare). The U-Net's cross-attention gets new projections of the language model's width. These, the causal
former, the norm after the vision tower, the projection and the regression head begin at random, from `--seed`.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout: both packages are beside this folder

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conversion.checkpoint import check_finite, compute_sha256, meta_tensors, open_checkpoint
from conversion.convert_emu_to_hub import DTYPES, LICENCE, MODEL_CARDS, build_meta_model, build_processor
from conversion.decoder import check_decoder, convert_decoder, renew_condition, report_decoder, verify_decoder
from conversion.key_table import list_keys, plan_conversion
from conversion.sizes import build_config
from conversion.tokenizer import add_emu_tokens
from conversion.weights import (
    check_dtypes,
    check_shapes,
    convert_state_dict,
    parse_shard_size,
    write_json,
    write_shards,
)
from modeling_emu.configuration_emu import EmuConfig
from modeling_emu.hub.outputs import check_output, whole_folder
from modeling_emu.hub.repository import check_repository, write_repository_files
from modeling_emu.modeling_emu import EmuForMultimodalGeneration


VARIANT = "assembled"
REPORT_FILE = "assembly_report.json"
VISION_PREFIX = "visual."
VISION_PARAMETERS = "model.vision_model."
HEAD = "lm_head.weight"
NUM_PROBES = 8
PROBE_FACTORS = (1, 0, 100)  # as it is; then a bias is all that is left; then a soft cap shows
FRESH_NORM = "model.vision_model.post_layernorm."  # Emu's own; EVA-CLIP's final norm is another
FRESH = ("model.causal_former.", FRESH_NORM, "regression_head.")


def load_language_model(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, whole, from a folder; no code of the folder is run.

    Args:
        folder: as `save_pretrained` writes it.
        dtype: of the weights; None for that of the folder.

    Raises:
        ValueError: if it cannot be loaded, tensors are missing, unknown or of another shape, or a number is not finite.
    """
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a damaged folder raises whatever its reader does
        reason = " ".join(str(error).split())
        raise ValueError(f"language model: got {folder} ({reason}), expected a whole transformers folder") from error
    if problems := [
        f"{name.replace('_', ' ')}: {list_keys(map(str, keys))}"
        for name, keys in found.items()
        if keys and name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ]:
        raise ValueError(
            f"language model {folder}: got {'; '.join(problems)}, expected the tensors of its config.json"
        )
    for name, tensor in causal_lm.state_dict().items():
        check_finite(f"language model: {name}", tensor)
    return causal_lm.eval(), tokenizer


@torch.no_grad()
def check_head(causal_lm: PreTrainedModel) -> None:
    """Refuse a language model whose logits are not the last hidden state times the head's weight, as Emu's are.

    A few tokens are read by the whole model, and as word embeddings by its decoder, as Emu does it.

    Raises:
        ValueError: if the logits differ: the head has a bias, or the logits are scaled or capped.
    """
    head, embeddings = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    kind = f"language model {causal_lm.config.model_type}"
    if head is None or causal_lm.base_model is causal_lm:
        raise ValueError(f"{kind}: got a model without a decoder and a head apart, expected both")
    input_ids = torch.linspace(0, embeddings.num_embeddings - 1, NUM_PROBES).long()[None]
    hidden_states = causal_lm.base_model(inputs_embeds=embeddings(input_ids)).last_hidden_state
    tolerance = max(1e-4, 2 * torch.finfo(hidden_states.dtype).eps)
    for factor in PROBE_FACTORS:
        with head.register_forward_pre_hook(lambda _, inputs, factor=factor: (inputs[0] * factor,)):
            logits = causal_lm(input_ids=input_ids).logits.float()
        expected = functional.linear(hidden_states * factor, head.weight).float()
        if (logits - expected).abs().max() > tolerance * expected.abs().max():
            raise ValueError(
                f"{kind}: got logits that are not its last hidden state times the head's weight, expected a head "
                f"without bias, scale or soft cap: Emu has no place for them"
            )


def read_vision(file: Path, config: EmuConfig) -> dict[str, torch.Tensor]:
    """Parameters of the vision tower from an EVA-CLIP checkpoint; its text tower is left alone.

    Raises:
        ValueError: if keys are missing, unknown or twice, a shape differs, or a number is not finite.
    """
    tensors = open_checkpoint(file).tensors
    if any(key.startswith(VISION_PREFIX) for key in tensors):
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(VISION_PREFIX)}
    else:
        tensors = {VISION_PREFIX + key: tensor for key, tensor in tensors.items()}
    expected = {
        name: tensor
        for name, tensor in build_meta_model(config).state_dict().items()
        if name.startswith(VISION_PARAMETERS) and not name.startswith(FRESH_NORM)
    }
    plan = plan_conversion(tensors, expected)
    check_dtypes(str(file), tensors, plan, config.dtype)
    check_shapes(tensors, plan, expected)
    parameters = convert_state_dict(tensors, plan, config.dtype)
    for name, parameter in parameters.items():
        check_finite(name, parameter)
    return parameters


def extend_vocabulary(language_model: PreTrainedModel, num_old_tokens: int, num_tokens: int) -> None:
    """Give the new tokens rows, the mean of the old ones, in the word embedding and in the head; in place.

    A vocabulary that is padded beyond its tokenizer keeps its size while it is large enough.

    Args:
        language_model: with its head.
        num_old_tokens: of the tokenizer before Emu's tokens.
        num_tokens: of the tokenizer with them.
    """
    num_rows = language_model.get_input_embeddings().num_embeddings
    num_old_rows = min(num_old_tokens, num_rows)
    if num_tokens > num_rows:
        language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            rows = layer.weight.detach()
            rows[num_old_rows:num_tokens] = rows[:num_old_rows].double().mean(0).to(rows.dtype)


def name_language_parameters(language_model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The language model's parameters under Emu's names: its decoder, and its head."""
    decoder = language_model.base_model.state_dict()
    parameters = {f"model.language_model.{name}": tensor for name, tensor in decoder.items()}
    return parameters | {HEAD: language_model.get_output_embeddings().weight.detach()}


def draw_fresh_parts(config: EmuConfig, seed: int) -> dict[str, torch.Tensor]:
    """Parameters of the parts that are Emu's own, initialised as the model defines it.

    They are drawn in a model whose other parts are as small as can be, always in the same order: transformers fills
    what a checkpoint lacks in the order of a set.
    """
    text_config = config.text_config
    small = EmuConfig(
        vision_config=config.vision_config.to_dict() | {"num_hidden_layers": 1},
        causal_former_config=config.causal_former_config.to_dict(),
        text_config=LlamaConfig(
            vocab_size=3,
            hidden_size=text_config.hidden_size,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            initializer_range=getattr(text_config, "initializer_range", LlamaConfig.initializer_range),
        ),
        image_token_id=0,
        image_start_token_id=1,
        image_end_token_id=2,
    )
    torch.manual_seed(seed)
    parameters = EmuForMultimodalGeneration(small).state_dict()
    return {name: tensor.to(config.dtype) for name, tensor in parameters.items() if name.startswith(FRESH)}


def check_parameters(parameters: Mapping[str, torch.Tensor], config: EmuConfig) -> None:
    """Refuse parts that are not all of the model, or more.

    Raises:
        ValueError: lists the parameters that are missing, left over or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in build_meta_model(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if strange := {name for name, _ in expected.items() ^ found.items()}:
        raise ValueError(
            f"language model {config.text_config.model_type}: got {list_keys(strange)} missing, left over or of another "
            f"shape, expected a causal language model that is a decoder and a head without bias"
        )


def assemble(
    language_model: Path,
    vision: Path,
    decoder: Path,
    output: Path,
    model_config: Path | None = None,
    causal_former_config: Path | None = None,
    num_image_tokens: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> dict[str, Any]:
    """Write the repository of a new Emu.

    Args:
        language_model: folder of a causal language model with its tokenizer.
        vision: EVA-CLIP checkpoint.
        decoder: folder of Stable Diffusion.
        output: new or empty folder.
        model_config: sizes of the vision tower and N, in the form of `Emu-14B.json`; None for the published ones.
        causal_former_config: T5 configuration file; None for T5-base.
        num_image_tokens: N, instead of that of `model_config`.
        seed: of all that begins at random.
        dtype: of all weights; None takes the language model's, and leaves the decoder's as they are.
        max_shard_size: of a weight file.

    Returns:
        The report.

    Raises:
        ValueError: if a part is missing, damaged or does not fit, or if the language model is of another kind.
        OSError: if the disk is full.
    """
    check_output(output)
    shard_bytes = parse_shard_size(max_shard_size)
    components = check_decoder(decoder, condition_size=None)
    causal_lm, tokenizer = load_language_model(language_model, dtype)
    check_head(causal_lm)
    num_old_tokens = len(tokenizer)
    add_emu_tokens(tokenizer)
    extend_vocabulary(causal_lm, num_old_tokens, len(tokenizer))
    config = build_config(
        tokenizer,
        causal_lm.config,
        causal_lm.get_input_embeddings().num_embeddings,
        VARIANT,
        model_config,
        causal_former_config,
        num_image_tokens,
    )
    config.dtype = causal_lm.dtype
    fresh = draw_fresh_parts(config, seed)
    parameters = name_language_parameters(causal_lm) | read_vision(vision, config) | fresh
    check_parameters(parameters, config)
    if config.tie_word_embeddings:
        del parameters[HEAD]

    with whole_folder(output) as folder:
        write_shards(folder, meta_tensors(parameters), parameters.__getitem__, "model", shard_bytes)
        opened = convert_decoder(decoder, folder, components, dtype)
        verify_decoder(folder, opened, dtype)
        renewed = renew_condition(folder, config.text_config.hidden_size, seed)
        processor = build_processor(config, tokenizer)
        write_repository_files(folder, config, processor, LICENCE)
        shutil.copyfile(MODEL_CARDS / f"emu-{VARIANT}.md", folder / "README.md")
        report = {
            "language_model": causal_lm.config.model_type,
            "vision": compute_sha256([vision]),
            "decoder": report_decoder(decoder, opened, dtype),
            "tokens_added": len(tokenizer) - num_old_tokens,
            "seed": seed,
            "dtype": str(config.dtype).removeprefix("torch."),
            "parameters": sum(tensor.numel() for tensor in parameters.values()),
            "random": list(fresh),
            "random_in_unet": renewed,
        }
        write_json(folder / REPORT_FILE, report)
        check_repository(folder)
    return report


def main(arguments: list[str] | None = None) -> None:
    """The command line; an error of the user's is one line, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", type=Path, required=True, metavar="DIR", help="causal LM and tokenizer")
    parser.add_argument("--vision", type=Path, required=True, metavar="FILE", help="EVA-CLIP checkpoint")
    parser.add_argument(
        "--decoder", type=Path, required=True, metavar="DIR", help="Stable Diffusion: unet/, vae/, ..."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="sizes in the form of Emu-14B.json")
    parser.add_argument(
        "--causal-former-config", type=Path, metavar="FILE", help="T5 configuration (default: T5-base)"
    )
    parser.add_argument("--num-image-tokens", type=int, metavar="N", help="embeddings per image (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of what begins at random (default: 0)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights written (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")
    options = vars(parser.parse_args(arguments))
    options["dtype"] = DTYPES[options["dtype"]] if options["dtype"] else None
    try:
        report = assemble(**options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options['output']}: a new Emu of {report['parameters']:,} parameters; see {REPORT_FILE}")


if __name__ == "__main__":
    main()
