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
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout: both packages are beside this folder

import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase

import modeling_emu
from conversion.checkpoint import (
    NUMBERS_AT_ONCE,
    SAFETENSORS_DTYPES,
    Checkpoint,
    check_finite,
    compute_sha256,
    meta_tensors,
    open_checkpoint,
    write_safetensors,
)
from conversion.decoder import check_condition_width, check_decoder, convert_decoder
from conversion.key_table import (
    EMBEDDING_KEY,
    LORA_PARTS,
    Plan,
    adapter_key,
    canonical_name,
    has_adapter_names,
    list_keys,
    plan_conversion,
)
from conversion.sizes import build_config, read_text_config
from conversion.surgery import LORA_ALPHA, join_parts
from conversion.tokenizer import build_tokenizer, get_emu_tokens
from modeling_emu.configuration_emu import EmuConfig
from modeling_emu.hub.folders import check_free_space, check_output, whole_folder
from modeling_emu.hub.repository import ADAPTER_FOLDER, check_repository, write_repository_files
from modeling_emu.modeling_emu import EmuForMultimodalGeneration
from modeling_emu.processing_emu import EmuProcessor


MODEL_CARDS = Path(__file__).resolve().parents[1] / "model_cards"
VARIANTS = ("pretrain", "instruct")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENCODER_FOLDER = "multimodal_encoder"
LLAMA_FOLDER = "llama_config"
REPORT_FILE = "conversion_report.json"
SMALL_FILES_BYTES = 64 << 20  # tokenizer, code, report: what stands beside the weights
LORA_DROPOUT = 0.05  # published training recipe
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"  # the causal former has a q_proj too


@dataclass(frozen=True)
class Conversion:
    """Everything that is decided before a byte is written.

    Args:
        source: the mapped checkpoint.
        plan: which source keys make which parameter of the model.
        adapter: the same for the tensors of the adapter; empty where there is none or where it is merged.
        dropped: source keys dropped by name.
        dtype: of the weights written; None keeps each as it is.
        lora: "merge" or "adapter"; None without LoRA keys.
    """

    source: Checkpoint
    config: EmuConfig
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    adapter: Plan
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


def build_parameter(
    source: Mapping[str, torch.Tensor], parts: Mapping[str, str], dtype: torch.dtype | None
) -> torch.Tensor:
    """One parameter from its published tensors, in `dtype`, or in that of the first of them."""
    tensors = {part: source[key] for part, key in parts.items()}
    return join_parts(tensors).to(dtype or next(iter(tensors.values())).dtype)


def convert_state_dict(
    source: Mapping[str, torch.Tensor], plan: Plan, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The model's state dict from a published one. Pure: no reading, no writing, any device.

    Args:
        source: published keys and tensors.
        plan: from `plan_conversion`.
        dtype: of the result; None keeps each tensor's.
    """
    return {name: build_parameter(source, parts, dtype) for name, parts in plan.parts.items()}


def separate_adapter(plan: Plan) -> tuple[Plan, Plan]:
    """Split a plan into that of the unmerged model and that of a PEFT adapter beside it."""
    base = {
        name: {part: key for part, key in parts.items() if part not in LORA_PARTS}
        for name, parts in plan.parts.items()
    }
    adapter = {
        adapter_key(name, part): {"": key}
        for name, parts in plan.parts.items()
        for part, key in parts.items()
        if part in LORA_PARTS
    }
    return Plan(base, plan.dropped), Plan(adapter)


def check_shapes(source: Mapping[str, torch.Tensor], plan: Plan, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare every shape and kind of number with the model, before anything is read.

    Raises:
        ValueError: lists all keys whose shape or dtype cannot be.
    """
    metas = meta_tensors(source)
    problems = []
    for name, parts in plan.parts.items():
        keys = " + ".join(parts.values())
        if wrong := [str(metas[key].dtype) for key in parts.values() if metas[key].dtype not in SAFETENSORS_DTYPES]:
            problems.append(f"{keys} {', '.join(wrong)} instead of floating point")
            continue
        try:
            shape = tuple(build_parameter(metas, parts, None).shape)
        except ValueError as error:
            problems.append(f"{keys} ({error})")
            continue
        if shape != tuple(expected[name].shape):
            problems.append(f"{keys} {shape} instead of {tuple(expected[name].shape)}")
    if problems:
        raise ValueError(
            f"shapes of the checkpoint: got {list_keys(problems)}, expected those of the model (sizes come from "
            f"--model-config, --causal-former-config and --llama-config)"
        )


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

    Raises:
        ValueError: if anything does not fit; the message lists it.
    """
    checkpoint = open_checkpoint(source)
    names = list(checkpoint.tensors)
    embeddings = [name for name in names if canonical_name(name) == EMBEDDING_KEY]
    if not embeddings:
        raise ValueError(
            f"keys of {source}: got no {EMBEDDING_KEY} among {len(names)} keys, expected an Emu checkpoint"
        )
    num_pieces = len(build_tokenizer(llama_config)) - len(get_emu_tokens("pretrain"))
    variant = find_variant(names, checkpoint.tensors[embeddings[0]].shape[0], num_pieces, variant)
    tokenizer = build_tokenizer(llama_config, variant)
    config = build_config(tokenizer, read_text_config(llama_config), variant, model_config, causal_former_config)

    expected = build_meta_model(config).state_dict()
    plan = plan_conversion(names, expected)
    check_shapes(checkpoint.tensors, plan, expected)
    with_lora = any(part in LORA_PARTS for parts in plan.parts.values() for part in parts)
    if lora is not None and not with_lora:
        raise ValueError(f"--lora: got {lora}, expected none: the checkpoint has no LoRA keys")
    adapter = Plan({})
    if lora == "adapter":
        plan, adapter = separate_adapter(plan)
    return Conversion(checkpoint, config, tokenizer, plan, adapter, dtype, (lora or "merge") if with_lora else None)


def write_tensors(
    folder: Path,
    source: Mapping[str, torch.Tensor],
    plan: Plan,
    dtype: torch.dtype | None,
    stem: str,
    max_shard_size: str,
) -> dict[str, torch.Tensor]:
    """Write the tensors of a plan as safetensors, in shards with an index where one file is not enough.

    Returns:
        What was written, on the meta device.
    """
    layout = convert_state_dict(meta_tensors(source), plan, dtype)

    def build(name: str) -> torch.Tensor:
        for key in plan.parts[name].values():
            check_finite(key, source[key])
        tensor = build_parameter(source, plan.parts[name], dtype)
        if tensor.dtype != source[next(iter(plan.parts[name].values()))].dtype or len(plan.parts[name]) > 1:
            check_finite(f"{name} as {tensor.dtype}", tensor)
        return tensor

    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(layout, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: layout[name] for name in names}, build)
        print(f"wrote {file}: {len(names)} tensors")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return layout


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_adapter(folder: Path, conversion: Conversion, max_shard_size: str) -> None:
    """Write the LoRA as an adapter that PEFT loads onto the model."""
    folder.mkdir()
    write_tensors(
        folder, conversion.source.tensors, conversion.adapter, conversion.dtype, "adapter_model", max_shard_size
    )
    first = next(key for name, parts in conversion.adapter.parts.items() for key in parts.values() if "lora_A" in name)
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "r": conversion.source.tensors[first].shape[0],
            "lora_alpha": LORA_ALPHA,
            "lora_dropout": LORA_DROPOUT,
            "bias": "none",
            "target_modules": LORA_TARGETS,
            "inference_mode": True,
        },
    )


def read_written(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    """Map the weights of a folder."""
    tensors = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.offset_keys()}
    return tensors


def compare_tensors(
    written: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor], plan: Plan, dtype: torch.dtype | None
) -> float:
    """Compare every tensor written with what the source gives.

    Returns:
        The largest difference that a merge's or a cast's rounding made; 0 where the bits are the source's.

    Raises:
        RuntimeError: if a tensor is not what was to be written.
    """
    if written.keys() != plan.parts.keys():
        raise RuntimeError(f"tensors written: got {list_keys(written.keys() ^ plan.parts.keys())} too many or too few")
    largest = 0.0
    for name, parts in plan.parts.items():
        expected = build_parameter(source, parts, dtype)
        got = written[name]
        if got.dtype != expected.dtype or not torch.equal(bits(got), bits(expected)):
            raise RuntimeError(
                f"{name}: got other numbers in the file, expected those of {' + '.join(parts.values())}"
            )
        exact = join_parts({part: source[key] for part, key in parts.items()})
        if exact.dtype != got.dtype:
            pairs = zip(*(tensor.reshape(-1).split(NUMBERS_AT_ONCE) for tensor in (got, exact)), strict=True)
            largest = max(largest, *(float((left.double() - right.double()).abs().max()) for left, right in pairs))
    return largest


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def verify(folder: Path, conversion: Conversion) -> float:
    """Load strictly on the meta device, compare every tensor, check that the repository is whole.

    Returns:
        The largest difference, see `compare_tensors`.
    """
    source = conversion.source.tensors
    written = read_written(folder, "model*.safetensors")
    build_meta_model(conversion.config).load_state_dict(meta_tensors(written), strict=True, assign=True)
    largest = compare_tensors(written, source, conversion.plan, conversion.dtype)
    if conversion.adapter.parts:
        adapter = read_written(folder / ADAPTER_FOLDER, "*.safetensors")
        largest = max(largest, compare_tensors(adapter, source, conversion.adapter, conversion.dtype))
    check_repository(folder)
    return largest


def count_dtypes(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def convert(
    conversion: Conversion, output: Path, decoder: Path | None = None, max_shard_size: str = "5GB"
) -> dict[str, Any]:
    """Write the repository.

    Args:
        conversion: from `prepare`.
        output: new or empty folder.
        decoder: folder of the visual decoder.
        max_shard_size: of a weight file, such as "5GB".

    Returns:
        The report.

    Raises:
        ValueError: if the output folder is not free, the decoder does not fit, or a weight is not finite.
        OSError: if the disk is full.
    """
    check_output(output)
    components = check_decoder(decoder) if decoder else []
    config, tensors = conversion.config, conversion.source.tensors
    if decoder:
        check_condition_width(decoder, config.text_config.hidden_size)
    layout = convert_state_dict(meta_tensors(tensors), conversion.plan, conversion.dtype)
    config.dtype = Counter(
        {dtype: sum(t.nbytes for t in layout.values() if t.dtype == dtype) for dtype in DTYPES.values()}
    ).most_common(1)[0][0]
    processor = EmuProcessor(
        CLIPImageProcessor(
            size=dict.fromkeys(("height", "width"), config.vision_config.image_size), do_center_crop=False
        ),
        conversion.tokenizer,
        num_image_tokens=config.num_image_tokens,
        variant=config.variant,
    )
    with whole_folder(output) as folder, ThreadPoolExecutor(max_workers=1) as executor:
        check_free_space(folder, sum(tensor.nbytes for tensor in layout.values()) + SMALL_FILES_BYTES)
        started = time.perf_counter()
        hashes = executor.submit(compute_sha256, conversion.source.files)
        write_tensors(folder, tensors, conversion.plan, conversion.dtype, "model", max_shard_size)
        if conversion.adapter.parts:
            write_adapter(folder / ADAPTER_FOLDER, conversion, max_shard_size)
        decoder_files = convert_decoder(decoder, folder, components, conversion.dtype) if decoder else []
        write_repository_files(folder, config, processor, MODEL_CARDS / f"emu-{config.variant}.md")
        written = time.perf_counter()
        print("written; now comparing with the source")
        largest = verify(folder, conversion)
        report = {
            "source": hashes.result(),
            "decoder": compute_sha256(decoder_files),
            "variant": config.variant,
            "lora": conversion.lora,
            "tensors_read": len(tensors),
            "tensors_written": len(layout) + len(conversion.adapter.parts),
            "parameters": sum(tensor.numel() for tensor in layout.values()),
            "dtypes_read": count_dtypes(tensors.values()),
            "dtypes_written": count_dtypes(layout.values()),
            "dropped": conversion.plan.dropped,
            "maximum_difference": largest,
            "seconds": {"written": written - started, "verified": time.perf_counter() - written},
            "versions": {
                "modeling-emu": modeling_emu.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "diffusers": diffusers.__version__,
                "huggingface_hub": huggingface_hub.__version__,
            },
        }
        write_json(folder / REPORT_FILE, report)
    return report


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
