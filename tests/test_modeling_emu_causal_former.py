"""The causal former against a plain reference written here, and its causal order."""

import math

import pytest
import torch
from conftest import make_config
from torch.testing import assert_close

from modeling_emu.modeling_emu_causal_former import EmuCausalFormer, compute_position_buckets


def make_former(seed: int = 0, implementation: str = "sdpa", **sizes) -> EmuCausalFormer:
    config = make_config().causal_former_config
    for name, value in sizes.items():
        setattr(config, name, value)
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    return EmuCausalFormer(config).eval()


def compute_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """The bucket of one distance into the past."""
    num_exact = num_buckets // 2
    if distance < num_exact:
        return distance
    share = math.log(distance / num_exact) / math.log(max_distance / num_exact)
    return min(num_exact + int(share * (num_buckets - num_exact)), num_buckets - 1)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (4, 6), (2, 3)])
def test_position_buckets_equal_the_definition(num_buckets, max_distance):
    buckets = compute_position_buckets(150, num_buckets, max_distance)
    for query in range(0, 150, 7):
        for key in range(150):
            assert buckets[query, key] == compute_bucket(max(query - key, 0), num_buckets, max_distance)


def rms_norm(states: torch.Tensor, norm: torch.nn.RMSNorm) -> torch.Tensor:
    return states / (states.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def attend(attention, queries, keys, bias) -> torch.Tensor:
    """Attention of one image, head by head and query by query."""
    head_dim, outputs = attention.head_dim, []
    for head in range(attention.config.num_attention_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        query, key, value = (
            states @ projection.weight[rows].T
            for states, projection in (
                (queries, attention.q_proj),
                (keys, attention.k_proj),
                (keys, attention.v_proj),
            )
        )
        heads = []
        for i in range(len(query)):
            visible = range(len(key)) if bias is None else range(i + 1)
            scores = torch.stack([query[i] @ key[j] + (0 if bias is None else bias(head, i - j)) for j in visible])
            heads.append(sum(weight * value[j] for j, weight in zip(visible, scores.softmax(0), strict=True)))
        outputs.append(torch.stack(heads))
    return torch.cat(outputs, dim=-1) @ attention.o_proj.weight.T


@torch.no_grad()
def compute_reference(former: EmuCausalFormer, features: torch.Tensor) -> torch.Tensor:
    """`(E, encoder_hidden_size)` features of one image to `(N, projection_size)`."""
    config = former.config

    def bias(head, distance):
        bucket = compute_bucket(distance, config.num_position_buckets, config.max_position_distance)
        return former.relative_attention_bias.weight[bucket, head]

    states = former.queries[0]
    for layer in former.layers:
        normed = rms_norm(states, layer.self_attn_layer_norm)
        states = states + attend(layer.self_attn, normed, normed, bias)
        states = states + attend(layer.cross_attn, rms_norm(states, layer.cross_attn_layer_norm), features, None)
        hidden = (rms_norm(states, layer.mlp_layer_norm) @ layer.mlp.fc1.weight.T).clamp(min=0)
        states = states + hidden @ layer.mlp.fc2.weight.T
    return rms_norm(states, former.final_layer_norm) @ former.projection.weight.T + former.projection.bias


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [{}, {"num_image_tokens": 9, "num_attention_heads": 3, "head_dim": 5}])
def test_equals_a_plain_reference(implementation, sizes):
    former = make_former(implementation=implementation, **sizes)
    torch.nn.init.normal_(former.relative_attention_bias.weight)
    features = torch.randn(2, 5, 24)
    with torch.no_grad():
        outputs = former(features)
    for image in range(2):
        assert_close(outputs[image], compute_reference(former, features[image]), atol=1e-5, rtol=1e-4)


def test_an_output_does_not_depend_on_later_queries():
    former = make_former(num_image_tokens=6)
    features = torch.randn(1, 5, 24)
    with torch.no_grad():
        before = former(features)
        former.queries[:, 3:] += 1
        after = former(features)
    assert_close(after[:, :3], before[:, :3], atol=0, rtol=0)
    assert not torch.allclose(after[:, 3:], before[:, 3:])


def test_dropout_is_off_in_evaluation_and_on_in_training():
    former = make_former(dropout=0.5)
    features = torch.randn(1, 5, 24)
    assert torch.equal(former(features), former(features))
    former.train()
    assert not torch.equal(former(features), former(features))
