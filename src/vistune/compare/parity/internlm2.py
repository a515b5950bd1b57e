"""InternLM2, loaded as Llama: logits, loss, gradient, greedy tokens, dynamic rotary scaling."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from vistune.compare.parity.ledger import Ledger
from vistune.models.families.files import read_tensors
from vistune.models.families.internlm2 import InternLM2Family, load_internlm2
from vistune.models.language.internlm2 import (
    internlm2_keys,
    internlm2_to_llama_config,
    public_frequencies,
)
from vistune.models.language.rotary import settle_rotary

NAME = "internlm2"
_SCALING = {"type": "dynamic", "factor": 2.0}
"""What a dump's `dynamic_*` arrays are made with where its config has no scaling."""


def matches(config: Mapping[str, Any], keys: Set[str]) -> bool:
    """Whether a directory holds an InternLM2."""
    return InternLM2Family().matches(config, keys)


def compare(directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
    """Compares one file; see `Case`."""
    model = load_internlm2(directory, ledger.dtype)
    _forward_and_backward(model, ledger)
    _greedy(model, ledger)
    if "long_input_ids" in ledger:
        _dynamic(directory, config, ledger)


def _forward_and_backward(model: LlamaForCausalLM, ledger: Ledger) -> None:
    ids, mask = ledger.take("input_ids"), ledger.take("attention_mask")
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    kept = mask.bool()
    ledger.compare("logits", out.logits, kept=kept)
    ledger.compare("hidden_last", out.hidden_states[-1], kept=kept)
    if not ledger.has("labels", "loss"):
        return
    labels = ledger.take("labels")
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    ledger.compare("loss", loss)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    fused = {
        entry.public: entry.form.join(tuple(gradients[name] for name in entry.own))
        for entry in internlm2_keys(model.config).entries
        if entry.public.endswith("attention.wqkv.weight")
    }
    ledger.closest("grad_wqkv", fused)


@torch.no_grad()
def _greedy(model: LlamaForCausalLM, ledger: Ledger) -> None:
    if ledger.has("greedy_prompt", "greedy_tokens"):
        prompt = ledger.take("greedy_prompt")
        told = model.generate(
            prompt,
            max_new_tokens=int(ledger.arrays["greedy_tokens"].numel()),
            do_sample=False,
        )
        ledger.compare_tokens("greedy_tokens", told[0, prompt.shape[1] :])


@torch.no_grad()
def _dynamic(directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
    scaled = {**config, "rope_scaling": config.get("rope_scaling") or _SCALING}
    config_of_scaled = internlm2_to_llama_config(scaled)
    keys = internlm2_keys(config_of_scaled)
    state = keys.from_public(dict(read_tensors(directory)), where=str(directory))
    long = ledger.take("long_input_ids")
    longest = int(long.shape[1])
    model = LlamaForCausalLM(config_of_scaled).eval()
    model.load_state_dict(state)
    model.to(ledger.dtype)
    settle_rotary(model)  # its tables are made anew, and stay in fp32
    ledger.compare("dynamic_ntk_long_logits", model(long).logits)
    # The public code keeps the long text's frequencies for whatever follows it; here each text has
    # its own, so the model is given them.
    model.model.rotary_emb.inv_freq = public_frequencies(model.config, longest_tokens=longest)
    first = ledger.take("input_ids")[:1]
    ledger.compare(
        "dynamic_ntk_short_logits", model(first).logits, note="frequencies kept, as in public code"
    )
