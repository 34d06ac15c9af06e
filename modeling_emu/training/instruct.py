"""Emu to Emu-I: the tokens of a conversation, LoRA on the language model's attention, and what is saved.

add_instruct_tokens(model, processor)
model = add_lora(model)
EmuTrainer(model=model, ...).train()
save_tuned(model, processor, "emu-i-adapter", merge=False)
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken

from ..hub.outputs import whole_folder
from ..modeling_emu import EmuForMultimodalGeneration
from ..processing_emu import EmuProcessor, get_chat_template


if TYPE_CHECKING:
    from peft import PeftModel

# token -> the word that it starts from; their order is that of their ids
INSTRUCT_TOKENS = {"[USER]": "user", "[ASSISTANT]": "assistant"}
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"


def add_instruct_tokens(model: EmuForMultimodalGeneration, processor: EmuProcessor) -> None:
    """Add `[USER]` and `[ASSISTANT]` to both, in place, and make both the variant "instruct".

    A new row, in the word embedding and in the head, is the mean of the rows of its word. The regression gets the weight
    0: only answers are learned. What is there already stays as it is.

    Raises:
        ValueError: if the tokenizer has more tokens than the model has rows, its own new ones apart.

    Source:
        baaivision/Emu, Emu1 (LoRA); that the rows start from the words is from a secondary source.
    """
    tokenizer = processor.tokenizer
    num_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ValueError(f"tokenizer: got {len(tokenizer)} tokens, expected at most the model's {num_rows} rows")
    new_tokens = [token for token in INSTRUCT_TOKENS if token not in tokenizer.get_vocab()]
    word_ids = {
        token: tokenizer.encode(INSTRUCT_TOKENS[token], add_special_tokens=False, return_tensors="pt")[0]
        for token in new_tokens
    }
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False, lstrip=True, rstrip=True) for token in new_tokens],
        special_tokens=True,
    )
    if len(tokenizer) > num_rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for token, ids in word_ids.items():
            row = tokenizer.convert_tokens_to_ids(token)
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                rows = module.get_parameter("weight")
                rows[row] = rows[ids.to(rows.device)].mean(0)
    model.config.variant = processor.variant = "instruct"
    model.config.regression_loss_weight = 0.0
    processor.chat_template = get_chat_template("instruct")


def add_lora(
    model: EmuForMultimodalGeneration, r: int = 16, lora_alpha: int = 16, lora_dropout: float = 0.05
) -> "PeftModel":
    """Freeze the model and put LoRA beside q, k, v and o of the language model; nothing else is touched.

    Source:
        baaivision/Emu, Emu1 (r, alpha and targets); the dropout is from a secondary source.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=LORA_TARGETS)
    return get_peft_model(model, config)


def save_tuned(
    model: "PeftModel",
    processor: EmuProcessor,
    folder: Path | str,
    merge: bool,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a Hub folder: the whole model with the adapter merged into it, or the adapter alone.

    An adapter's folder holds the word embeddings and the head too, since two of their rows are new: it is loaded by
    PEFT onto the base model, after `base.resize_token_embeddings(len(processor.tokenizer))`.

    Args:
        merge: merge the adapter into the weights; `model` has none afterwards, unless `state_dict` is given.
        state_dict: all weights of `model`, whole, where `model` itself has a part of them only.

    Raises:
        ValueError: if `folder` is there and not empty.
    """
    with whole_folder(Path(folder)) as output:
        if merge:
            whole = model if state_dict is None else rebuild(model, state_dict)
            whole.merge_and_unload().save_pretrained(output)
        else:
            model.save_pretrained(str(output), save_embedding_layers=True, state_dict=state_dict)
        processor.save_pretrained(output)


def rebuild(model: "PeftModel", state_dict: dict[str, torch.Tensor]) -> "PeftModel":
    """The same model and adapter with these weights, which are not copied; buffers outside of them stay empty."""
    from peft import get_peft_model

    base = model.get_base_model()
    with torch.device("meta"):
        empty = type(base)(base.config)
        empty.generation_config = base.generation_config
        rebuilt = get_peft_model(empty, model.peft_config["default"])
    rebuilt.load_state_dict(state_dict, assign=True)
    return rebuilt
