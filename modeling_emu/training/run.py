"""From a recipe to a trained folder: the model, its data, the trainer, and what is written at the end."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, set_seed

from ..configuration_emu import EmuConfig
from ..data import EmuDataCollator, EmuMixture, EmuSampleEncoder, EmuSource, PackedDocuments
from ..modeling_emu import EmuForMultimodalGeneration
from ..processing_emu import EmuProcessor
from .arguments import EmuTrainingArguments
from .instruct import add_instruct_tokens, add_lora, save_tuned
from .memory import check_memory
from .recipes import DataArguments, InstructArguments, PretrainArguments
from .samples import EmuSamplesCallback, has_decoder
from .trainer import EmuTrainer


FINAL_FOLDER = "final"


def load_model(arguments: DataArguments, **kwargs: Any) -> EmuForMultimodalGeneration:
    """Load the model that a recipe names, with the recipe's objective."""
    model = EmuForMultimodalGeneration.from_pretrained(
        arguments.model, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation, **kwargs
    )
    for name, value in arguments.objective.items():
        setattr(model.config, name, value)
    model.config.validate_architecture()
    return model


def make_dataset(
    arguments: DataArguments, sources: list[dict[str, Any]], processor: EmuProcessor, seed: int, repeat: bool
) -> EmuMixture | PackedDocuments:
    """Make the stream of documents, or of packed rows, of a recipe's sources."""
    names = ("kind", "files", "media", "name", "max_broken_fraction")
    mixture = EmuMixture(
        [EmuSource(**{key: value for key, value in source.items() if key in names}) for source in sources],
        weights=[source.get("weight", 1.0) for source in sources],
        batch_sizes=[source["batch_size"] for source in sources] if repeat and "batch_size" in sources[0] else None,
        encoder=EmuSampleEncoder(processor, arguments.max_length),
        seed=seed,
        repeat=repeat,
    )
    return PackedDocuments(mixture) if arguments.packing else mixture


def make_trainer(
    model: Any, processor: EmuProcessor, arguments: DataArguments, training_arguments: EmuTrainingArguments
) -> EmuTrainer:
    """Put a model and the data of its recipe into a trainer, with samples where the recipe has prompts for them.

    Raises:
        ValueError: if `max_steps` is not given: a stream has no end; or if there are prompts, but no evaluation.
    """
    if training_arguments.max_steps <= 0:
        raise ValueError(f"max_steps: got {training_arguments.max_steps}, expected at least 1: the data has no end")
    if arguments.sample_prompts and training_arguments.eval_strategy == "no":
        raise ValueError(
            "sample_prompts: got some with eval_strategy no, expected steps or epoch: evaluation asks them"
        )
    seed = training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed
    eval_dataset = None
    if arguments.eval_sources:
        eval_dataset = make_dataset(arguments, arguments.eval_sources, processor, seed, repeat=False)
    trainer = EmuTrainer(
        model=model,
        args=training_arguments,
        train_dataset=make_dataset(arguments, arguments.sources, processor, seed, repeat=True),
        eval_dataset=eval_dataset,
        data_collator=EmuDataCollator(processor, return_keys=True),
    )
    if arguments.sample_prompts:
        # Instruction tuning learns answers alone: pictures would show nothing of it.
        draws = model.config.regression_loss_weight > 0 and has_decoder(arguments.model)
        decoder = arguments.model if draws else None
        trainer.add_callback(EmuSamplesCallback(trainer, processor, arguments.sample_prompts, decoder))
    return trainer


def finish(trainer: EmuTrainer) -> None:
    """Leave together: a process that ends while others still talk to it takes them down."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def pretrain(arguments: PretrainArguments, training_arguments: EmuTrainingArguments) -> Path:
    """Train all that is not frozen on both losses; gives the Hub folder with the trained model.

    Raises:
        ValueError: before anything is loaded, if a step cannot fit into memory.
    """
    check_memory(EmuConfig.from_pretrained(arguments.model), arguments, training_arguments)
    processor = EmuProcessor.from_pretrained(arguments.model)
    trainer = make_trainer(load_model(arguments), processor, arguments, training_arguments)
    # `true` in a recipe: from the last complete checkpoint
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    folder = Path(str(training_arguments.output_dir)) / FINAL_FOLDER
    trainer.save_model(str(folder))  # every process has a part of a sharded model
    if training_arguments.should_save:
        processor.save_pretrained(folder)
    finish(trainer)
    return folder


def instruct(arguments: InstructArguments, training_arguments: EmuTrainingArguments) -> Path:
    """Train LoRA on answers; gives the folder with the adapter, or with the model that it is merged into.

    Raises:
        ValueError: before anything is loaded, if a step cannot fit into memory, or with ZeRO-3, which divides the weights
            while they are loaded, before the new tokens' rows are there.
    """
    plugin = training_arguments.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("deepspeed: got ZeRO-3 for instruction tuning, expected FSDP2 (fsdp: true), or no sharding")
    check_memory(EmuConfig.from_pretrained(arguments.model), arguments, training_arguments)
    processor = EmuProcessor.from_pretrained(arguments.model)
    kwargs: dict[str, Any] = {}
    if arguments.quantization:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = load_model(arguments, **kwargs)
    add_instruct_tokens(model, processor)
    model.config.regression_loss_weight = arguments.objective.get("regression_loss_weight", 0.0)
    set_seed(training_arguments.seed)  # processes that shard the adapter draw the same one
    tuned = add_lora(model, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout)
    trainer = make_trainer(tuned, processor, arguments, training_arguments)
    # `true` in a recipe: from the last complete checkpoint
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    folder = Path(str(training_arguments.output_dir)) / FINAL_FOLDER
    state_dict = None
    if trainer.is_fsdp_enabled:  # every process gives its part of the weights
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if training_arguments.should_save:
        if folder.exists():
            shutil.rmtree(folder)  # of the run before this one in the same folder, as Trainer overwrites its own
        save_tuned(tuned, processor, folder, merge=arguments.merge_adapter, state_dict=state_dict)
    finish(trainer)
    return folder
