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
"""Convert a published Emu checkpoint to a Hub repository that transformers and diffusers both load.

    python conversion/convert_emu_to_hub.py Emu-pretrain.pt --llama-config llama_config --output emu
    python conversion/convert_emu_to_hub.py pretrain --llama-config llama_config --output emu
    python conversion/convert_emu_to_hub.py Emu-instruct.pt --llama-config llama_config --lora adapter --output emu-i

SOURCE is a torch checkpoint, a published `pretrain/` folder (whose visual decoder is converted too), or safetensors,
one file or a folder of shards, under the published keys. Only tensors are read, never code. The checkpoint is mapped
and goes through memory tensor by tensor; the output folder appears whole, after a comparison with the source, or not
at all. What was found and done is in its `conversion_report.json`.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout: both packages are beside this folder

import diffusers
import torch
import transformers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

import modeling_emu
from conversion.card import make_card
from conversion.checkpoint import (
    Checkpoint,
    meta_tensors,
    open_checkpoint,
    read_safetensors,
    start_sha256,
)
from conversion.decoder import check_decoder, convert_decoder, report_decoder, verify_decoder
from conversion.key_table import (
    EMBEDDING_KEY,
    Plan,
    canonical_name,
    has_adapter_names,
    plan_conversion,
    separate_adapter,
)
from conversion.sizes import build_config, read_text_config
from conversion.tokenizer import build_tokenizer
from conversion.weights import (
    MODEL_DTYPES,
    check_dtypes,
    check_shapes,
    compare_weights,
    convert_state_dict,
    count_dtypes,
    parse_shard_size,
    write_adapter_config,
    write_json,
    write_weights,
)
from modeling_emu.configuration_emu import EmuConfig
from modeling_emu.hub.outputs import check_free_space, check_output, whole_folder
from modeling_emu.hub.repository import ADAPTER_FOLDER, check_repository, write_repository_files
from modeling_emu.hub.tokenizer import get_emu_tokens
from modeling_emu.modeling_emu import EmuForMultimodalGeneration
from modeling_emu.processing_emu import EmuProcessor


ROOT = Path(__file__).resolve().parents[1]
LICENCE = ROOT / "LICENSE"
MODEL_CARDS = ROOT / "model_cards"
CARDS = {  # file, and the name that stands for the repository in it
    "pretrain": (MODEL_CARDS / "emu-pretrain.md", "org/emu"),
    "instruct": (MODEL_CARDS / "emu-instruct.md", "org/emu-instruct"),
}
VARIANTS = tuple(CARDS)
PARTS: dict[str, str | tuple[str, ...]] = {
    "vision tower": "model.vision_model.",
    "causal former": "model.causal_former.",
    "language model": ("model.language_model.", "lm_head."),
    "regression head": "regression_head.",
    "adapter": "base_model.",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MODEL_DTYPES}
ENCODER_FOLDER = "multimodal_encoder"
LLAMA_FOLDER = "llama_config"
REPORT_FILE = "conversion_report.json"
SMALL_FILES_BYTES = 64 << 20  # tokenizer, code, report: what stands beside the weights


@dataclass(frozen=True)
class Conversion:
    """Everything that is decided before a byte is written.

    Args:
        source: the mapped checkpoint.
        config: of the model.
        tokenizer: with Emu's tokens.
        plan: which source keys make which parameter of the model.
        adapter: the same for the tensors of the adapter; empty where there is none or where it is merged.
        layout: the model's state dict on the meta device, in the dtypes that are written.
        dtype: of the weights written; None keeps each as it is.
        lora: "merge" or "adapter"; None without LoRA keys.
    """

    source: Checkpoint
    config: EmuConfig
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    adapter: Plan
    layout: dict[str, torch.Tensor]
    dtype: torch.dtype | None
    lora: str | None


def find_variant(names: Iterable[str], num_rows: int, num_pieces: int, expected: str | None) -> str:
    """Say from keys and vocabulary which weights these are.

    Args:
        names: keys of the checkpoint.
        num_rows: of its word embedding.
        num_pieces: vocabulary of the tokenizer without Emu's tokens.
        expected: what the user says; None to find out.

    Raises:
        ValueError: if keys and rows fit no variant, or not the expected one.
    """
    by_rows = {num_pieces + len(get_emu_tokens(variant)): variant for variant in VARIANTS}
    with_adapter = has_adapter_names(names)
    found = by_rows.get(num_rows)
    if found is None or (with_adapter and found != "instruct"):
        wanted = " or ".join(f"{rows} ({variant})" for rows, variant in by_rows.items())
        raise ValueError(
            f"rows of the word embedding: got {num_rows}{' and LoRA keys (instruct)' if with_adapter else ''}, expected "
            f"{wanted}: the {num_pieces} pieces of the tokenizer and Emu's tokens"
        )
    if expected not in (None, found):
        raise ValueError(
            f"--variant: got {expected}, expected {found}: the checkpoint has {num_rows} rows in its word embedding"
            f"{' and LoRA keys' if with_adapter else ''}"
        )
    return found


def build_meta_model(config: EmuConfig) -> EmuForMultimodalGeneration:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return EmuForMultimodalGeneration(config)


def prepare(
    source: Path,
    llama_config: Path,
    variant: str | None = None,
    model_config: Path | None = None,
    causal_former_config: Path | None = None,
    lora: str | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Check all that can be checked without reading weights.

    Args:
        source: the checkpoint, see `open_checkpoint`.
        llama_config: folder with LLaMA's `config.json` and `tokenizer.model`.
        variant: which weights these should be; None to find out.
        model_config: file in the form of the published `Emu-14B.json`; None for the published sizes.
        causal_former_config: T5 configuration file; None for T5-base.
        lora: "merge" or "adapter"; None merges where there is something to merge.
        dtype: of the weights written; None keeps each as it is.

    Raises:
        ValueError: if anything does not fit; the message lists it.
    """
    checkpoint = open_checkpoint(source)
    names = list(checkpoint.tensors)
    embedding = next((name for name in names if canonical_name(name) == EMBEDDING_KEY), None)
    if embedding is None:
        raise ValueError(
            f"keys of {source}: got no {EMBEDDING_KEY} among {len(names)} keys, expected an Emu checkpoint"
        )
    num_pieces = len(build_tokenizer(llama_config)) - len(get_emu_tokens("pretrain"))
    variant = find_variant(names, len(checkpoint.tensors[embedding]), num_pieces, variant)
    tokenizer = build_tokenizer(llama_config, variant)
    text_config = read_text_config(llama_config)
    config = build_config(tokenizer, text_config, len(tokenizer), variant, model_config, causal_former_config)

    expected = build_meta_model(config).state_dict()
    plan, adapter = plan_conversion(names, expected), Plan({})
    check_dtypes("the checkpoint", checkpoint.tensors, plan, dtype)
    check_shapes(checkpoint.tensors, plan, expected)
    if any(".lora_" in name for name in names):
        lora = lora or "merge"
    elif lora is not None:
        raise ValueError(f"--lora: got {lora}, expected none: the checkpoint has no LoRA keys")
    if lora == "adapter":
        plan, adapter = separate_adapter(plan)
        find_rank(checkpoint.tensors, adapter)
    layout = convert_state_dict(meta_tensors(checkpoint.tensors), plan, dtype)
    config.dtype = max(MODEL_DTYPES, key=lambda kind: count_bytes(t for t in layout.values() if t.dtype == kind))
    return Conversion(checkpoint, config, tokenizer, plan, adapter, layout, dtype, lora)


def convert(
    conversion: Conversion, output: Path, decoder: Path | None = None, max_shard_size: int | str = "5GB"
) -> dict[str, Any]:
    """Write the repository.

    Args:
        conversion: from `prepare`.
        output: new or empty folder.
        decoder: folder of the visual decoder.
        max_shard_size: of a weight file, in bytes or such as "5GB".

    Returns:
        The report.

    Raises:
        ValueError: if the output folder is not free, the decoder does not fit, or a weight is not finite.
        OSError: if the disk is full.
    """
    check_output(output)
    shard_bytes = parse_shard_size(max_shard_size)
    config, source, dtype = conversion.config, conversion.source, conversion.dtype
    components = check_decoder(decoder, config.text_config.hidden_size) if decoder else []
    with whole_folder(output) as folder:
        beside = [file for name in components for file in (decoder / name).iterdir()] if decoder else []
        num_bytes = count_bytes(conversion.layout.values()) + sum(file.stat().st_size for file in beside)
        check_free_space(output, num_bytes + SMALL_FILES_BYTES)
        started = time.perf_counter()
        hashes = start_sha256(source.files)  # whoever reads second finds the pages in the cache
        write_weights(folder, source.tensors, conversion.plan, dtype, "model", shard_bytes)
        if conversion.adapter.parts:
            write_adapter(folder / ADAPTER_FOLDER, conversion, shard_bytes)
        opened = convert_decoder(decoder, folder, components, dtype) if decoder else {}
        processor = build_processor(config, conversion.tokenizer)
        write_repository_files(folder, config, processor, LICENCE)
        written = time.perf_counter()

        print("written; comparing with the source")
        differences = [verify(folder, conversion)]
        if decoder:
            differences.append(verify_decoder(folder, opened, dtype))
        report = build_report(conversion) | {
            "maximum_difference": max(differences),
            "source": hashes.result(),
            "decoder": report_decoder(decoder, opened, dtype) if decoder else {},
            "seconds": {"written": written - started, "verified": time.perf_counter() - written},
        }
        write_json(folder / REPORT_FILE, report)
        card, name = CARDS[config.variant]
        (folder / "README.md").write_text(make_card(card, report, name), encoding="utf-8")
        check_repository(folder)
    return report


def build_processor(config: EmuConfig, tokenizer: PreTrainedTokenizerBase) -> EmuProcessor:
    """The processor of a model: pixels squashed to the vision tower's size, as published."""
    size = config.vision_config.image_size
    return EmuProcessor(
        CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        variant=config.variant,
    )


def write_adapter(folder: Path, conversion: Conversion, max_shard_size: int) -> None:
    """Write the LoRA of Emu-I as a folder that PEFT loads onto the model."""
    folder.mkdir()
    source, adapter = conversion.source.tensors, conversion.adapter
    write_weights(folder, source, adapter, conversion.dtype, "adapter_model", max_shard_size)
    write_adapter_config(folder, find_rank(source, adapter))


def find_rank(source: Mapping[str, torch.Tensor], adapter: Plan) -> int:
    """The rank of an adapter, which its configuration says once for all modules.

    Raises:
        ValueError: if its modules have several.
    """
    ranks = {len(source[parts[""]]) for name, parts in adapter.parts.items() if "lora_A" in name}
    if len(ranks) != 1:
        raise ValueError(f"--lora adapter: got LoRA of the ranks {sorted(ranks)}, expected one (merge takes any)")
    return ranks.pop()


def verify(folder: Path, conversion: Conversion) -> float:
    """Load strictly on the meta device, and compare every tensor with the source.

    Returns:
        The largest difference, see `compare_weights`.
    """
    source, dtype = conversion.source.tensors, conversion.dtype
    written = {
        name: tensor for file in folder.glob("model*.safetensors") for name, tensor in read_safetensors(file).items()
    }
    build_meta_model(conversion.config).load_state_dict(meta_tensors(written), strict=True, assign=True)
    difference = compare_weights(written, source, conversion.plan, dtype)
    if conversion.adapter.parts:
        adapter = open_checkpoint(folder / ADAPTER_FOLDER).tensors
        difference = max(difference, compare_weights(adapter, source, conversion.adapter, dtype))
    return difference


def build_report(conversion: Conversion) -> dict[str, Any]:
    """What was found and decided before anything is written."""
    adapter = convert_state_dict(meta_tensors(conversion.source.tensors), conversion.adapter, conversion.dtype)
    parts = {
        part: [tensor for name, tensor in (conversion.layout | adapter).items() if name.startswith(prefix)]
        for part, prefix in PARTS.items()
    }
    return {
        "variant": conversion.config.variant,
        "lora": conversion.lora,
        "tensors_read": len(conversion.source.tensors),
        "tensors_written": len(conversion.layout) + len(conversion.adapter.parts),
        "parameters": sum(tensor.numel() for tensor in conversion.layout.values()),
        "dtypes_read": count_dtypes(conversion.source.tensors.values()),
        "dtypes_written": count_dtypes(conversion.layout.values()),
        "parts": {
            part: {"parameters": sum(tensor.numel() for tensor in tensors), "dtypes_written": count_dtypes(tensors)}
            for part, tensors in parts.items()
            if tensors
        },
        "dropped": conversion.plan.dropped,
        "versions": {
            "modeling-emu": modeling_emu.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def main(arguments: list[str] | None = None) -> None:
    """The command line; an error of the user's is one line, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint, pretrain/ folder or safetensors")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--variant", choices=VARIANTS, help="which weights these are (default: found from the keys)")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="sizes in the form of Emu-14B.json")
    parser.add_argument(
        "--causal-former-config", type=Path, metavar="FILE", help="T5 configuration (default: T5-base)"
    )
    parser.add_argument(
        "--llama-config",
        type=Path,
        metavar="DIR",
        help="LLaMA's config.json and tokenizer.model (default: beside SOURCE)",
    )
    parser.add_argument("--decoder", type=Path, metavar="DIR", help="unet/, vae/, ... (default: those of pretrain/)")
    parser.add_argument("--lora", choices=("merge", "adapter"), help="what to do with LoRA weights (default: merge)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights written (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")
    options = parser.parse_args(arguments)

    published_folder = (options.source / ENCODER_FOLDER).is_dir()
    dtype = DTYPES[options.dtype] if options.dtype else None
    try:
        check_output(options.output)
        conversion = prepare(
            options.source / ENCODER_FOLDER if published_folder else options.source,
            options.llama_config or options.source.absolute().parent / LLAMA_FOLDER,
            options.variant,
            options.model_config,
            options.causal_former_config,
            options.lora,
            dtype,
        )
        decoder = options.decoder or (options.source if published_folder else None)
        report = convert(conversion, options.output, decoder, options.max_shard_size)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: Emu ({report['variant']}), {report['tensors_written']} tensors; see {REPORT_FILE}")


if __name__ == "__main__":
    main()
