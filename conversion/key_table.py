"""Which published key becomes which parameter: one table, read in both directions, that no key gets past.

Names only; what happens to the numbers is in `surgery.py`. "{}" stands for a layer index. A target "weight#part" is one
of several tensors that `surgery.py` joins into `weight`. None is a key that is dropped on purpose. A key of Emu-I is
first brought to base Emu's form (`canonical_name`), so that the table says everything once.

Source: baaivision/Emu, `Emu1/models/modeling_emu.py`, `causal_former.py`, `modeling_llama.py`; peft 0.4 for the
adapter's names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


VISION = "model.vision_model.encoder.layers.{}"
FORMER = "model.causal_former.layers.{}"
LANGUAGE = "model.language_model.layers.{}"

KEY_TABLE: dict[str, str | None] = {
    # vision tower: EVA-CLIP g/14
    "visual.cls_token": "model.vision_model.embeddings.class_embedding",
    "visual.pos_embed": "model.vision_model.embeddings.position_embedding",
    "visual.patch_embed.proj.weight": "model.vision_model.embeddings.patch_embedding.weight",
    "visual.patch_embed.proj.bias": "model.vision_model.embeddings.patch_embedding.bias",
    "visual.blocks.{}.norm1.weight": f"{VISION}.layer_norm1.weight",
    "visual.blocks.{}.norm1.bias": f"{VISION}.layer_norm1.bias",
    "visual.blocks.{}.attn.qkv.weight": f"{VISION}.self_attn.qkv.weight",
    "visual.blocks.{}.attn.q_bias": f"{VISION}.self_attn.qkv.bias#query",
    "visual.blocks.{}.attn.v_bias": f"{VISION}.self_attn.qkv.bias#value",
    "visual.blocks.{}.attn.proj.weight": f"{VISION}.self_attn.projection.weight",
    "visual.blocks.{}.attn.proj.bias": f"{VISION}.self_attn.projection.bias",
    "visual.blocks.{}.norm2.weight": f"{VISION}.layer_norm2.weight",
    "visual.blocks.{}.norm2.bias": f"{VISION}.layer_norm2.bias",
    "visual.blocks.{}.mlp.fc1.weight": f"{VISION}.mlp.fc1.weight",
    "visual.blocks.{}.mlp.fc1.bias": f"{VISION}.mlp.fc1.bias",
    "visual.blocks.{}.mlp.fc2.weight": f"{VISION}.mlp.fc2.weight",
    "visual.blocks.{}.mlp.fc2.bias": f"{VISION}.mlp.fc2.bias",
    "visual.norm.weight": None,  # EVA-CLIP's own final norm and head are not applied in Emu
    "visual.norm.bias": None,
    "visual.head.weight": None,
    "visual.head.bias": None,
    "visual.rope.freqs_cos": None,  # computed, and unused by this tower
    "visual.rope.freqs_sin": None,
    "ln_visual.weight": "model.vision_model.post_layernorm.weight",
    "ln_visual.bias": "model.vision_model.post_layernorm.bias",
    # causal former: the decoder stack of T5
    "cformer.causal_tokens": "model.causal_former.queries",
    "cformer.cformer.embed_tokens.weight": None,  # T5's word embeddings; the queries are given as embeddings
    "cformer.cformer.block.{}.layer.0.SelfAttention.q.weight": f"{FORMER}.self_attn.q_proj.weight",
    "cformer.cformer.block.{}.layer.0.SelfAttention.k.weight": f"{FORMER}.self_attn.k_proj.weight",
    "cformer.cformer.block.{}.layer.0.SelfAttention.v.weight": f"{FORMER}.self_attn.v_proj.weight",
    "cformer.cformer.block.{}.layer.0.SelfAttention.o.weight": f"{FORMER}.self_attn.o_proj.weight",
    "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
        "model.causal_former.relative_attention_bias.weight"
    ),
    "cformer.cformer.block.{}.layer.0.layer_norm.weight": f"{FORMER}.self_attn_layer_norm.weight",
    "cformer.cformer.block.{}.layer.1.EncDecAttention.q.weight": f"{FORMER}.cross_attn.q_proj.weight",
    "cformer.cformer.block.{}.layer.1.EncDecAttention.k.weight": f"{FORMER}.cross_attn.k_proj.weight",
    "cformer.cformer.block.{}.layer.1.EncDecAttention.v.weight": f"{FORMER}.cross_attn.v_proj.weight",
    "cformer.cformer.block.{}.layer.1.EncDecAttention.o.weight": f"{FORMER}.cross_attn.o_proj.weight",
    "cformer.cformer.block.{}.layer.1.layer_norm.weight": f"{FORMER}.cross_attn_layer_norm.weight",
    "cformer.cformer.block.{}.layer.2.DenseReluDense.wi.weight": f"{FORMER}.mlp.fc1.weight",
    "cformer.cformer.block.{}.layer.2.DenseReluDense.wo.weight": f"{FORMER}.mlp.fc2.weight",
    "cformer.cformer.block.{}.layer.2.layer_norm.weight": f"{FORMER}.mlp_layer_norm.weight",
    "cformer.cformer.final_layer_norm.weight": "model.causal_former.final_layer_norm.weight",
    "cformer.projection.weight": "model.causal_former.projection.weight",
    "cformer.projection.bias": "model.causal_former.projection.bias",
    # language model: LLaMA
    "decoder.lm.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    **{
        f"decoder.lm.model.layers.{{}}.self_attn.{name}_proj.{source}": f"{LANGUAGE}.self_attn.{name}_proj.{target}"
        for name in "qkvo"
        for source, target in (
            ("weight", "weight"),
            ("lora_A.default.weight", "weight#lora_A"),
            ("lora_B.default.weight", "weight#lora_B"),
        )
    },
    "decoder.lm.model.layers.{}.self_attn.rotary_emb.inv_freq": None,  # computed from the configuration
    "decoder.lm.model.layers.{}.mlp.gate_proj.weight": f"{LANGUAGE}.mlp.gate_proj.weight",
    "decoder.lm.model.layers.{}.mlp.up_proj.weight": f"{LANGUAGE}.mlp.up_proj.weight",
    "decoder.lm.model.layers.{}.mlp.down_proj.weight": f"{LANGUAGE}.mlp.down_proj.weight",
    "decoder.lm.model.layers.{}.input_layernorm.weight": f"{LANGUAGE}.input_layernorm.weight",
    "decoder.lm.model.layers.{}.post_attention_layernorm.weight": f"{LANGUAGE}.post_attention_layernorm.weight",
    "decoder.lm.model.norm.weight": "model.language_model.norm.weight",
    # heads
    "decoder.lm.lm_head.weight": "lm_head.weight",
    "decoder.lm.stu_regress_head.weight": "regression_head.weight",
}

EMBEDDING_KEY = "decoder.lm.model.embed_tokens.weight"
LANGUAGE_PREFIX = "decoder.lm."
PEFT_PREFIX = "decoder.lm.base_model.model."
LORA_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Plan:
    """How each parameter is made, and which keys are left.

    Args:
        parts: per parameter, the source key of each of its parts: "" alone where it is taken as it is, "query" and
            "value", or "", "lora_A" and "lora_B".
        dropped: source keys that are dropped by name.
    """

    parts: dict[str, dict[str, str]]
    dropped: list[str] = field(default_factory=list)


def canonical_name(name: str) -> str:
    """Name of a key in base Emu's form: without peft's prefix, and without the `base_layer` of newer peft versions."""
    if name.startswith(PEFT_PREFIX):
        name = LANGUAGE_PREFIX + name.removeprefix(PEFT_PREFIX)
    return re.sub(r"(\.self_attn\.[qkvo]_proj)\.base_layer\.weight$", r"\1.weight", name)


def has_adapter_names(names: Iterable[str]) -> bool:
    """Whether peft has named these keys, as in the published Emu-I."""
    return any(name.startswith(PEFT_PREFIX) or ".lora_" in name for name in names)


def peft_name(name: str) -> str:
    """Name of a canonical key as peft 0.4 wrote it: the form of the published Emu-I."""
    return PEFT_PREFIX + name.removeprefix(LANGUAGE_PREFIX) if name.startswith(LANGUAGE_PREFIX) else name


def adapter_key(parameter: str, part: str) -> str:
    """Name of an adapter's tensor in `adapter_model.safetensors`: `part` is "lora_A" or "lora_B"."""
    return f"base_model.model.{parameter.removesuffix('.weight')}.{part}.weight"


def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))


_DROPPED = [_matcher(source) for source, target in KEY_TABLE.items() if target is None]
_PARTS_OF: list[tuple[re.Pattern[str], dict[str, str]]] = []
for _target in dict.fromkeys(target.partition("#")[0] for target in KEY_TABLE.values() if target is not None):
    _parts = {
        target.partition("#")[2]: source
        for source, target in KEY_TABLE.items()
        if target is not None and target.partition("#")[0] == _target
    }
    _PARTS_OF.append((_matcher(_target), _parts))


def published_parts(parameter: str, with_lora: bool) -> dict[str, str]:
    """Canonical published keys of a parameter, by part; empty if the published model has no such parameter."""
    for matcher, parts in _PARTS_OF:
        if match := matcher.fullmatch(parameter):
            return {
                part: source.format(*match.groups())
                for part, source in parts.items()
                if with_lora or part not in LORA_PARTS
            }
    return {}


def list_keys(names: Iterable[str]) -> str:
    """Keys for a message, all of them."""
    return ", ".join(sorted(names))


def plan_conversion(source_names: Iterable[str], parameters: Iterable[str]) -> Plan:
    """Say for every parameter of the model which published keys make it.

    Args:
        source_names: keys of the checkpoint, in base Emu's or in Emu-I's form.
        parameters: names of the model's parameters.

    Raises:
        ValueError: lists the keys that are there twice, unknown or missing.
    """
    by_canonical: dict[str, list[str]] = {}
    for name in source_names:
        by_canonical.setdefault(canonical_name(name), []).append(name)
    with_lora = any(".lora_" in name for name in by_canonical)

    parts = {parameter: published_parts(parameter, with_lora) for parameter in parameters}
    expected = {source for sources in parts.values() for source in sources.values()}
    dropped = [name for name in by_canonical if any(matcher.fullmatch(name) for matcher in _DROPPED)]

    problems: Mapping[str, Iterable[str]] = {
        "keys that are there twice": [name for names in by_canonical.values() if len(names) > 1 for name in names],
        "unknown keys": by_canonical.keys() - expected - set(dropped),
        "missing keys": expected - by_canonical.keys(),
        "parameters without a published key": [name for name, sources in parts.items() if not sources],
    }
    found = [f"{problem}: {list_keys(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(
            "keys of the checkpoint: got " + "; ".join(found) + "; expected each published key once "
            "(if whole layers are named, the sizes differ: see --model-config, --causal-former-config, --llama-config)"
        )
    return Plan(
        parts={
            parameter: {part: by_canonical[source][0] for part, source in sources.items()}
            for parameter, sources in parts.items()
        },
        dropped=[by_canonical[name][0] for name in dropped],
    )


def separate_adapter(plan: Plan) -> tuple[Plan, Plan]:
    """Split a plan into that of the unmerged model and that of a PEFT adapter beside it."""
    base: dict[str, dict[str, str]] = {}
    adapter: dict[str, dict[str, str]] = {}
    for name, parts in plan.parts.items():
        base[name] = {part: key for part, key in parts.items() if part not in LORA_PARTS}
        adapter |= {adapter_key(name, part): {"": key} for part, key in parts.items() if part in LORA_PARTS}
    return Plan(base, plan.dropped), Plan(adapter)
