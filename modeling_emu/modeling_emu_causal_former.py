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
"""The causal former: from the image features of the vision tower to N embeddings that the language model reads.

It is the decoder stack of T5, with learned queries as input and the image features as what its cross-attention reads.
T5's own classes cannot serve: their cross-attention cannot read another width. The module knows nothing of text.

Shapes: B images, N queries, H heads, D head_dim, E encoder positions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_emu import EmuCausalFormerConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with an additive bias, in plain matrix products: `(B, H, N, D)` in, `(B, N, H, D)` out."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def compute_position_buckets(
    num_positions: int, num_buckets: int, max_distance: int, device: torch.device | None = None
) -> torch.Tensor:
    """The bucket of every pair of positions: half of the buckets hold one distance each, the others grow by its log.

    Args:
        num_positions: N.
        num_buckets: number of buckets.
        max_distance: distances from here on share the last bucket.

    Returns:
        `(N, N)` long: the bucket of the distance from key (column) to query (row); 0 where the key is ahead.

    Source:
        T5's relative attention, causal form.
    """
    positions = torch.arange(num_positions, device=device)
    distance = (positions[:, None] - positions[None, :]).clamp(min=0)
    num_exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = (num_exact + (growth * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < num_exact, distance, logarithmic)


class EmuCausalFormerAttention(nn.Module):
    """T5's attention: no biases, no scaling; keys and values may come from another width."""

    def __init__(self, config: EmuCausalFormerConfig, key_value_size: int):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.is_causal = False  # the order of the queries is part of the additive bias
        self.attention_dropout = config.dropout
        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.k_proj = nn.Linear(key_value_size, inner_size, bias=False)
        self.v_proj = nn.Linear(key_value_size, inner_size, bias=False)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor, attention_bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend from `(B, N, hidden_size)` to `(B, E, key_value_size)`; the bias is `(1, H, N, E)` or None."""
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, N or E, D)
            for projection, states in (
                (self.q_proj, hidden_states),
                (self.k_proj, key_value_states),
                (self.v_proj, key_value_states),
            )
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask=attention_bias,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=1.0,
        )
        return self.o_proj(attended.flatten(2).contiguous())


class EmuCausalFormerMLP(nn.Module):
    """T5's feed-forward layer with ReLU."""

    def __init__(self, config: EmuCausalFormerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, hidden_size)` in and out."""
        return self.fc2(self.dropout(nn.functional.relu(self.fc1(hidden_states))))


class EmuCausalFormerLayer(GradientCheckpointingLayer):
    """Causal self-attention, cross-attention to the image, feed-forward; each normed before and added after."""

    def __init__(self, config: EmuCausalFormerConfig):
        super().__init__()
        self.self_attn_layer_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = EmuCausalFormerAttention(config, config.hidden_size)
        self.cross_attn_layer_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = EmuCausalFormerAttention(config, config.encoder_hidden_size)
        self.mlp_layer_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EmuCausalFormerMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, position_bias: torch.Tensor
    ) -> torch.Tensor:
        """`(B, N, hidden_size)` in and out; `encoder_hidden_states` `(B, E, encoder_hidden_size)`."""
        normed = self.self_attn_layer_norm(hidden_states)
        hidden_states = hidden_states + self.dropout(self.self_attn(normed, normed, position_bias))
        normed = self.cross_attn_layer_norm(hidden_states)
        hidden_states = hidden_states + self.dropout(self.cross_attn(normed, encoder_hidden_states, None))
        normed = self.mlp_layer_norm(hidden_states)
        return hidden_states + self.dropout(self.mlp(normed))


class EmuCausalFormer(PreTrainedModel):
    """N learned queries that look at an image one after the other, projected to the language model's width.

    Query i sees the queries up to itself, which gives an image the causal order that text has.

    Source:
        Emu, section 2.1; `Emu1/models/causal_former.py`.
    """

    config: EmuCausalFormerConfig
    base_model_prefix = "causal_former"
    main_input_name = "encoder_hidden_states"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmuCausalFormer"]  # its queries belong to no layer
    _can_compile_fullgraph = True
    _supports_sdpa = True

    def __init__(self, config: EmuCausalFormerConfig):
        super().__init__(config)
        self.queries = nn.Parameter(torch.empty(1, config.num_image_tokens, config.hidden_size))
        self.relative_attention_bias = nn.Embedding(config.num_position_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList([EmuCausalFormerLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(config.hidden_size, config.projection_size)
        self.gradient_checkpointing = False
        self.post_init()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return self.get_correct_attn_implementation(attn_implementation)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Eager where asked for, else sdpa: flash and flex attention take no additive bias, and N queries are few."""
        return "eager" if requested_attention == "eager" else "sdpa"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EmuCausalFormer):
            init.normal_(module.queries, mean=0.0, std=self.config.initializer_range)

    def compute_position_bias(self) -> torch.Tensor:
        """`(1, H, N, N)`: the learned bias of each distance, minus infinity where the key is ahead of the query."""
        num_queries = self.config.num_image_tokens
        device = self.queries.device
        buckets = compute_position_buckets(
            num_queries, self.config.num_position_buckets, self.config.max_position_distance, device
        )
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        ahead = torch.ones(num_queries, num_queries, dtype=torch.bool, device=device).triu(diagonal=1)
        return bias.masked_fill(ahead, float("-inf"))

    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """Turn image features into embeddings.

        Args:
            encoder_hidden_states: `(B, E, encoder_hidden_size)`, float: the features of B images.

        Returns:
            `(B, N, projection_size)` in the dtype of the weights.
        """
        encoder_hidden_states = encoder_hidden_states.to(self.queries.dtype)
        position_bias = self.compute_position_bias()
        hidden_states = self.dropout(self.queries.expand(encoder_hidden_states.shape[0], -1, -1))
        for layer in self.layers:
            hidden_states = layer(hidden_states, encoder_hidden_states, position_bias)
        return self.projection(self.dropout(self.final_layer_norm(hidden_states)))
