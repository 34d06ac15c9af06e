"""Random checkpoints in the published layout, of any size, and what the published network computes with them.

Written from the description of the published code, key by key and in plain torch; it shares nothing with `conversion/`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM


TEXT = (
    "There are two dogs in the picture. The animal in the first image, surrounded with the plant in the second image. "
    "Please provide an accurate and concise description of the given image: the image depicts a photo of a cat. "
)


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint's shapes follow from; `num_tokens` is the tokenizer's vocabulary without Emu's tokens."""

    width: int = 36
    head_width: int = 12
    mlp_ratio: float = 2.25
    vision_layers: int = 2
    image_size: int = 42
    patch_size: int = 14
    num_image_tokens: int = 3
    former_size: int = 20
    former_head: int = 6
    former_heads: int = 4
    former_layers: int = 3
    former_mlp: int = 28
    num_buckets: int = 8
    hidden_size: int = 48
    llama_heads: int = 4
    llama_layers: int = 3
    llama_mlp: int = 56
    num_tokens: int = 300
    lora_rank: int = 0
    lora_keys: str = "weight"
    """`weight` as peft 0.4 names the base weight beside LoRA, `base_layer.weight` as newer versions do."""

    @property
    def vision_mlp(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def num_rows(self) -> int:
        return self.num_tokens + (6 if self.lora_rank else 4)

    @property
    def lm(self) -> str:
        return "decoder.lm.base_model.model." if self.lora_rank else "decoder.lm."


PUBLISHED = Sizes(
    width=1408,
    head_width=88,
    mlp_ratio=4.3637,
    vision_layers=40,
    image_size=224,
    num_image_tokens=32,
    former_size=768,
    former_head=64,
    former_heads=12,
    former_layers=12,
    former_mlp=3072,
    num_buckets=32,
    hidden_size=5120,
    llama_heads=40,
    llama_layers=40,
    llama_mlp=13824,
    num_tokens=32000,
)


def get_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every key of a published state dict, in its order, with its shape."""
    s = sizes
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def linear(name: str, out_size: int, in_size: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (out_size, in_size)
        if bias:
            shapes[f"{name}.bias"] = (out_size,)

    shapes["visual.cls_token"] = (1, 1, s.width)
    shapes["visual.pos_embed"] = (1, (s.image_size // s.patch_size) ** 2 + 1, s.width)
    shapes["visual.patch_embed.proj.weight"] = (s.width, 3, s.patch_size, s.patch_size)
    shapes["visual.patch_embed.proj.bias"] = (s.width,)
    for layer in range(s.vision_layers):
        block = f"visual.blocks.{layer}"
        norm(f"{block}.norm1", s.width)
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (s.width,)
        linear(f"{block}.attn.qkv", 3 * s.width, s.width)
        linear(f"{block}.attn.proj", s.width, s.width, bias=True)
        norm(f"{block}.norm2", s.width)
        linear(f"{block}.mlp.fc1", s.vision_mlp, s.width, bias=True)
        linear(f"{block}.mlp.fc2", s.width, s.vision_mlp, bias=True)
    norm("visual.norm", s.width)
    linear("visual.head", 7, s.width, bias=True)
    norm("ln_visual", s.width)

    linear(f"{s.lm}model.embed_tokens", s.num_rows, s.hidden_size)
    for layer in range(s.llama_layers):
        block = f"{s.lm}model.layers.{layer}"
        for name in "qkvo":
            projection = f"{block}.self_attn.{name}_proj"
            if s.lora_rank:
                shapes[f"{projection}.{s.lora_keys}"] = (s.hidden_size, s.hidden_size)
                linear(f"{projection}.lora_A.default", s.lora_rank, s.hidden_size)
                linear(f"{projection}.lora_B.default", s.hidden_size, s.lora_rank)
            else:
                linear(projection, s.hidden_size, s.hidden_size)
        shapes[f"{block}.self_attn.rotary_emb.inv_freq"] = (s.hidden_size // s.llama_heads // 2,)
        linear(f"{block}.mlp.gate_proj", s.llama_mlp, s.hidden_size)
        linear(f"{block}.mlp.up_proj", s.llama_mlp, s.hidden_size)
        linear(f"{block}.mlp.down_proj", s.hidden_size, s.llama_mlp)
        shapes[f"{block}.input_layernorm.weight"] = (s.hidden_size,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (s.hidden_size,)
    shapes[f"{s.lm}model.norm.weight"] = (s.hidden_size,)
    linear(f"{s.lm}lm_head", s.num_rows, s.hidden_size)
    linear(f"{s.lm}stu_regress_head", s.hidden_size, s.hidden_size)

    shapes["cformer.causal_tokens"] = (1, s.num_image_tokens, s.former_size)
    linear("cformer.cformer.embed_tokens", 11, s.former_size)
    inner = s.former_heads * s.former_head
    for layer in range(s.former_layers):
        block = f"cformer.cformer.block.{layer}.layer"
        for name, place, read_size in (("SelfAttention", 0, s.former_size), ("EncDecAttention", 1, s.width)):
            linear(f"{block}.{place}.{name}.q", inner, s.former_size)
            linear(f"{block}.{place}.{name}.k", inner, read_size)
            linear(f"{block}.{place}.{name}.v", inner, read_size)
            linear(f"{block}.{place}.{name}.o", s.former_size, inner)
        linear(f"{block}.2.DenseReluDense.wi", s.former_mlp, s.former_size)
        linear(f"{block}.2.DenseReluDense.wo", s.former_size, s.former_mlp)
        for place in range(3):
            shapes[f"{block}.{place}.layer_norm.weight"] = (s.former_size,)
    bias = "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias"
    linear(bias, s.num_buckets, s.former_heads)
    shapes["cformer.cformer.final_layer_norm.weight"] = (s.former_size,)
    linear("cformer.projection", s.hidden_size, s.former_size, bias=True)
    return shapes


def make_state_dict(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A random published state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight"))).to(dtype)
        for name, shape in get_shapes(sizes).items()
    }


def train_tokenizer(folder: Path, num_tokens: int) -> None:
    """Write a small `tokenizer.model` of LLaMA-1's kind."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(". ") * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=num_tokens,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def write_sizes(folder: Path, sizes: Sizes) -> list[str]:
    """Write the files that say a checkpoint's sizes, and give the options that name them."""
    s = sizes
    vision = {
        "image_size": s.image_size,
        "patch_size": s.patch_size,
        "layers": s.vision_layers,
        "width": s.width,
        "head_width": s.head_width,
        "mlp_ratio": s.mlp_ratio,
    }
    count = {"n_causal": s.num_image_tokens}
    emu = {"vision_cfg": vision, "multimodal_cfg": count, "vladapter_cfg": count}
    t5 = {
        "d_model": s.former_size,
        "d_kv": s.former_head,
        "d_ff": s.former_mlp,
        "num_layers": 1,
        "num_decoder_layers": s.former_layers,
        "num_heads": s.former_heads,
        "relative_attention_num_buckets": s.num_buckets,
        "relative_attention_max_distance": 12,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    }
    llama = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 128, "rms_norm_eps": 1e-6}
    llama |= {"hidden_size": s.hidden_size, "intermediate_size": s.llama_mlp, "num_hidden_layers": s.llama_layers}
    llama |= {"num_attention_heads": s.llama_heads, "pad_token_id": 0, "torch_dtype": "float16"}
    (folder / "llama_config").mkdir(parents=True)
    for name, content in (("Emu.json", emu), ("t5.json", t5), ("llama_config/config.json", llama)):
        (folder / name).write_text(json.dumps(content))
    train_tokenizer(folder / "llama_config", s.num_tokens)
    return [
        f"--model-config={folder / 'Emu.json'}",
        f"--causal-former-config={folder / 't5.json'}",
        f"--llama-config={folder / 'llama_config'}",
    ]


def get_position_bias(table: torch.Tensor, length: int, max_distance: int = 12) -> torch.Tensor:
    """T5's causal relative position bias, `(heads, length, length)`, position by position."""
    half = len(table) // 2
    bias = torch.zeros(table.shape[1], length, length)
    for query in range(length):
        for key in range(length):
            distance = max(query - key, 0)
            far = half + int(math.log(max(distance, 1) / half) / math.log(max_distance / half) * half)
            bias[:, query, key] = table[distance if distance < half else min(far, len(table) - 1)]
    return bias


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float, bias=0.0):
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) * scale + bias).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class PublishedEmu:
    """The published forward pass over a state dict."""

    def __init__(self, state_dict: dict[str, torch.Tensor], sizes: Sizes):
        self.weights, self.sizes = state_dict, sizes

    def linear(self, name: str, inputs: torch.Tensor, bias: bool = False) -> torch.Tensor:
        return functional.linear(
            inputs, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"] if bias else None
        )

    def layer_norm(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(inputs, weight.shape, weight, bias, eps=1e-6)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(num_images, 3, S, S)` to features after `ln_visual`, `(num_images, patches + 1, width)`."""
        weights, sizes = self.weights, self.sizes
        patch = [weights[f"visual.patch_embed.proj.{kind}"] for kind in ("weight", "bias")]
        hidden = functional.conv2d(pixel_values, *patch, stride=sizes.patch_size).flatten(2).transpose(1, 2)
        hidden = torch.cat([weights["visual.cls_token"].expand(len(hidden), -1, -1), hidden], 1)
        hidden = hidden + weights["visual.pos_embed"]
        for layer in range(sizes.vision_layers):
            block = f"visual.blocks.{layer}"
            q_bias, v_bias = weights[f"{block}.attn.q_bias"], weights[f"{block}.attn.v_bias"]
            qkv = functional.linear(
                self.layer_norm(f"{block}.norm1", hidden),
                weights[f"{block}.attn.qkv.weight"],
                torch.cat([q_bias, torch.zeros_like(v_bias), v_bias]),
            )
            attended = attend(*qkv.chunk(3, -1), heads=sizes.width // sizes.head_width, scale=sizes.head_width**-0.5)
            hidden = hidden + self.linear(f"{block}.attn.proj", attended, bias=True)
            inner = functional.gelu(self.linear(f"{block}.mlp.fc1", self.layer_norm(f"{block}.norm2", hidden), True))
            hidden = hidden + self.linear(f"{block}.mlp.fc2", inner, bias=True)
        return self.layer_norm("ln_visual", hidden)

    def form(self, features: torch.Tensor) -> torch.Tensor:
        """Features to `(num_images, N, hidden_size)`."""
        weights, heads = self.weights, self.sizes.former_heads
        hidden = weights["cformer.causal_tokens"].expand(len(features), -1, -1)
        length = hidden.shape[1]
        table = weights["cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = get_position_bias(table, length) + torch.full((length, length), -torch.inf).triu(1)
        for layer in range(self.sizes.former_layers):
            block = f"cformer.cformer.block.{layer}.layer"
            for place, name, bias_here in ((0, "SelfAttention", bias), (1, "EncDecAttention", 0.0)):
                inputs = rms_norm(hidden, weights[f"{block}.{place}.layer_norm.weight"])
                read = inputs if place == 0 else features
                attention = f"{block}.{place}.{name}"
                query, key, value = (
                    self.linear(f"{attention}.{kind}", source)
                    for kind, source in (("q", inputs), ("k", read), ("v", read))
                )
                hidden = hidden + self.linear(f"{attention}.o", attend(query, key, value, heads, 1.0, bias_here))
            inputs = rms_norm(hidden, weights[f"{block}.2.layer_norm.weight"])
            inner = self.linear(f"{block}.2.DenseReluDense.wi", inputs).relu()
            hidden = hidden + self.linear(f"{block}.2.DenseReluDense.wo", inner)
        hidden = rms_norm(hidden, weights["cformer.cformer.final_layer_norm.weight"])
        return self.linear("cformer.projection", hidden, bias=True)

    def read(self, input_ids: torch.Tensor, slots: torch.Tensor, image_embeds: torch.Tensor):
        """Mixed sequence to logits and regressed embeddings; LoRA is applied beside its base weight."""
        sizes, lm = self.sizes, self.sizes.lm
        state = {}
        for name, tensor in self.weights.items():
            if name.startswith(lm) and ".lora_" not in name and "inv_freq" not in name and "stu_" not in name:
                state[name.removeprefix(lm).replace(".base_layer", "")] = tensor
        for name in [name for name in self.weights if "lora_A" in name]:
            target = name.removeprefix(lm).replace(".lora_A.default", "")
            update = self.weights[name.replace("lora_A", "lora_B")] @ self.weights[name]
            state[target] = state[target] + 16 / sizes.lora_rank * update
        config = LlamaConfig(
            vocab_size=sizes.num_rows,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.llama_mlp,
            num_hidden_layers=sizes.llama_layers,
            num_attention_heads=sizes.llama_heads,
            max_position_embeddings=128,
            rms_norm_eps=1e-6,
        )
        llama = LlamaForCausalLM(config).eval()
        llama.load_state_dict(state)
        embeds = llama.model.embed_tokens(input_ids)
        embeds[slots] = image_embeds.flatten(0, 1)
        outputs = llama(inputs_embeds=embeds, output_hidden_states=True)
        return outputs.logits, self.linear(f"{lm}stu_regress_head", outputs.hidden_states[-1])
