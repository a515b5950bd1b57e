"""The fused trunk computes what transformers' layers compute: values, gradients, adapters."""

import pytest
import torch
from fused_case import CONFIGS, build, error, packed_row, trained_by

from vistune.models.attention import packing_mask
from vistune.models.fused.trunk import NotFusable, fuse

MODES = ("frozen", "lora", "full")


def three_ways(model, trunk, *, dtype=None):
    """Values at the targets and all gradients: transformers' layers, fused, fused with a tail."""
    row, tail = packed_row()
    draw = torch.Generator().manual_seed(3)
    width = model.config.hidden_size
    embeds = torch.randn(1, row.num_tokens, width, generator=draw)
    grad = torch.randn(row.num_targets, width, generator=draw)
    where = {"cu_seqlens": row.cu_seqlens, "max_seqlen": row.max_seqlen}

    def reference(leaf):
        mask = packing_mask(row.cu_seqlens, row.max_seqlen)
        out = model.model(
            inputs_embeds=leaf, attention_mask=mask, position_ids=row.position_ids_BT,
            use_cache=False,
        )  # fmt: skip
        return out.last_hidden_state[0, row.target_index_M]

    paths = [
        reference,
        lambda leaf: trunk.hidden_states(leaf, row.position_ids_BT, **where)[0, row.target_index_M],
        lambda leaf: trunk.target_states(leaf, row.position_ids_BT, tail=tail, **where),
    ]
    results = []
    for path in paths:
        leaf = embeds.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out = path(leaf).float()
        results.append((out, *torch.autograd.grad(out, [leaf, *trained_by(model)], grad)))
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_transformers(name, mode):
    model = build(name, mode)
    trunk = fuse(model.model, device=torch.device("cpu"))
    reference, whole, tail = three_ways(model, trunk)
    per_layer = {"llama": 9, "qwen2": 12, "qwen3": 15, "gemma2": 11}.get(name, 9)
    assert len(reference) == 2 + {"frozen": 0, "lora": 28, "full": 2 * per_layer + 1}[mode]
    for expected, *found in zip(reference, whole, tail, strict=True):
        # float32 with another order of sums; a bias before a norm of keys has almost no gradient
        assert all(error(a, expected) <= 5e-6 or (a - expected).norm() < 1e-5 for a in found)


def test_trained_weights_in_bf16_arithmetic_are_as_near_to_fp32_as_transformers_are():
    model = build("llama", "full")
    trunk = fuse(model.model, device=torch.device("cpu"))
    exact = three_ways(model, trunk)[0]
    reference, whole, tail = three_ways(model, trunk, dtype=torch.bfloat16)
    for expected, theirs, *ours in zip(exact, reference, whole, tail, strict=True):
        for found in ours:
            assert found.dtype is torch.float32
            # The stream between layers is rounded to bf16 here (2^-9) and fp32 there.
            assert error(found, expected) <= 1.5 * error(theirs, expected) + 2**-7
            assert error(found, expected) <= 0.03


def test_a_large_key_bias_costs_no_precision():
    """Qwen2.5's first layer has key biases of up to 354, where heads turn slowest."""
    model = build("qwen2", "frozen")
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.data.mul_(8)  # so that what is attended to makes a difference
        attention.k_proj.bias.data.view(2, 2, 8)[..., 6:] += 300 * torch.randn(2, 2, 2)
    model.model.rotary_emb.inv_freq[6:] = 1e-5
    model = model.bfloat16().float()
    _, exact, _ = three_ways(model, fuse(model.model, device=torch.device("cpu")))
    half = model.bfloat16()
    half.model.rotary_emb.float()
    trunk = fuse(half.model, device=torch.device("cpu"))
    theirs, *ours = three_ways(half, trunk, dtype=torch.bfloat16)
    for found in ours:
        # A few roundings to 2^-9; transformers' layers round keys of 300 to steps of 2.
        assert error(found[0], exact[0]) <= 0.02 < 0.05 < error(theirs[0], exact[0])
        assert error(found[1], exact[1]) <= 0.04 < 0.1 < error(theirs[1], exact[1])


def test_gradients_of_several_rows_add_up():
    model = build("llama", "full")
    trunk = fuse(model.model, device=torch.device("cpu"))
    row, _ = packed_row()
    embeds = torch.randn(1, row.num_tokens, 64)
    where = {"cu_seqlens": row.cu_seqlens, "max_seqlen": row.max_seqlen}
    found = []
    for _ in range(2):
        trunk.hidden_states(embeds, row.position_ids_BT, **where).square().sum().backward()
        found.append([p.grad.clone() for p in trained_by(model)])
    for once, twice in zip(*found, strict=True):
        assert torch.allclose(2 * once, twice, rtol=1e-6)


def test_an_optimizer_step_reaches_the_merged_weights():
    model = build("qwen2", "full")
    trunk = fuse(model.model, device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.mul_(0.9).add_(0.01)
    reference, whole, _ = three_ways(model, trunk)
    assert error(whole[0], reference[0]) <= 5e-6


def test_weights_replaced_after_fusing_are_noticed():
    model = build("qwen2", "full")
    trunk = fuse(model.model, device=torch.device("cpu"))
    bias = model.model.layers[1].self_attn.k_proj.bias
    bias.data = bias.data.clone()
    with pytest.raises(AssertionError, match="after it was fused"):
        three_ways(model, trunk)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_recomputing_changes_nothing(mode):
    model = build("qwen3", mode)
    trunk = fuse(model.model, device=torch.device("cpu"))
    _, kept, _ = three_ways(model, trunk)
    trunk.num_recomputed = 1
    _, again, _ = three_ways(model, trunk)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_the_decoder_keeps_working_on_the_merged_weights():
    model = build("qwen2", "frozen")
    ids = torch.arange(8)[None]
    before = model(ids).logits
    names = {n: p.clone() for n, p in model.state_dict().items()}
    fuse(model.model, device=torch.device("cpu"))
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(p, names[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.model.layers[1].mlp.up_proj.requires_grad_(True), "only some base weights"),
        (lambda m: m.requires_grad_(True).to(torch.bfloat16), "not held in fp32"),
        (lambda m: m.model.layers.append(torch.nn.Linear(2, 2)), "class Linear have no fused form"),
    ],
)
def test_what_is_not_understood_is_refused_before_anything_changes(change, reason):
    model = build("llama", "frozen")
    change(model)
    storage = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    with pytest.raises(NotFusable, match=reason):
        fuse(model.model, device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == storage
