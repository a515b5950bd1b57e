"""The fused trunk computes what transformers' layers compute: values, gradients, adapters."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config

from vistune.data.collate import pack_row, tail_of
from vistune.models.fused.trunk import NotFusable, fuse
from vistune.types import EncodedSample

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 32,
    "attn_implementation": "sdpa",
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
}


def build(name, *, lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).requires_grad_(False)
    for path, parameter in model.named_parameters():
        if "norm" in path or "bias" in path:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    if lora:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.layers\..*_proj")
        inject_adapter_in_model(config, model)
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.data = torch.randn_like(parameter) * 0.05
    return model.train()


def causal(q, k, v):
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def run_both(model, trunk, x):
    """Returns (output, gradient of the input, gradients of the adapters) of both paths."""
    decoder = model.model
    trained = [p for p in model.parameters() if p.requires_grad]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(x.shape[0])[None]
    cos, sin = decoder.rotary_emb(x[None], positions)

    def reference(x):
        hidden = x[None]
        for layer in decoder.layers:
            hidden = layer(
                hidden, position_embeddings=(cos, sin), position_ids=positions, attention_mask=None
            )
        return hidden[0]

    results = []
    for path in (reference, lambda x: trunk(x, cos[0], sin[0], attention=causal)):
        leaf = x.clone().requires_grad_()
        out = path(leaf)
        results.append((out, *torch.autograd.grad(out, [leaf, *trained], grad)))
    return results


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_transformers(name, lora):
    model = build(name, lora=lora)
    trunk = fuse(model.model, device=torch.device("cpu"))
    x = torch.randn(21, 64, generator=torch.Generator().manual_seed(1))
    reference, ours = run_both(model, trunk, x)
    assert len(ours) == (2 + 28 if lora else 2)
    for a, b in zip(reference, ours, strict=True):
        # float32 with another order of sums
        assert (a - b).norm() <= 2e-6 * a.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_layer_at_the_targets_only_is_the_same_function(name, lora):
    model = build(name, lora=lora)
    trunk = fuse(model.model, device=torch.device("cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(3)
    samples = [
        EncodedSample(
            id=str(n),
            source="s",
            input_ids=np.arange(n),
            target_mask=np.arange(n) >= (first if first is not None else n),
        )
        for n, first in [(7, 3), (5, None), (9, 8), (4, 1)]
    ]
    row = pack_row(samples)
    tail = tail_of(row)
    assert tail.index_U.tolist() == [2, 3, 4, 5, 6, 19, 20, 21, 22, 23, 24]
    embeds = torch.randn(1, row.num_tokens, 64, generator=draw)
    grad = torch.randn(row.num_targets, 64, generator=draw)
    where = {"cu_seqlens": row.cu_seqlens, "max_seqlen": row.max_seqlen}
    results = []
    for only_targets in (False, True):
        leaf = embeds.clone().requires_grad_()
        if only_targets:
            out = trunk.target_states(leaf, row.position_ids_BT, tail=tail, **where)
        else:
            out = trunk.hidden_states(leaf, row.position_ids_BT, **where)[0, row.target_index_M]
        results.append((out, *torch.autograd.grad(out, [leaf, *trained], grad)))
    for a, b in zip(*results, strict=True):
        # float32 with another order of sums
        assert (a - b).norm() <= 2e-6 * a.norm()


def test_recomputing_changes_nothing():
    model = build("llama", lora=True)
    trunk = fuse(model.model, device=torch.device("cpu"))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    _, kept = run_both(model, trunk, x)
    trunk.num_recomputed = 1
    _, again = run_both(model, trunk, x)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_the_decoder_keeps_working_on_the_merged_weights():
    model = build("qwen2", lora=False)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    names = {n: p.clone() for n, p in model.state_dict().items()}
    fuse(model.model, device=torch.device("cpu"))
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(p, names[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.model.layers[1].mlp.up_proj.requires_grad_(True), "base weights train"),
        (lambda m: m.model.layers.append(torch.nn.Linear(2, 2)), "class Linear have no fused form"),
    ],
)
def test_what_is_not_understood_is_refused_before_anything_changes(change, reason):
    model = build("llama", lora=False)
    change(model)
    storage = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    with pytest.raises(NotFusable, match=reason):
        fuse(model.model, device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == storage


def test_heads_that_the_kernels_cannot_turn_are_refused():
    shape = SIZES | {"hidden_size": 48, "head_dim": 12}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).requires_grad_(False)
    with pytest.raises(NotFusable, match="12 wide"):
        fuse(model.model, device=torch.device("cpu"))


def test_adapters_with_dropout_are_refused():
    model = build("llama", lora=False)
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])
    inject_adapter_in_model(config, model)
    with pytest.raises(NotFusable, match="dropout"):
        fuse(model.model, device=torch.device("cpu"))
