"""VisualGLM: tower, Q-Former, positions, mask, logits, loss, gradients, greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from vistune.compare.parity.ledger import Ledger
from vistune.models.chatglm.attention import prefix_mask, rotary_tables
from vistune.models.chatglm.positions import padded_positions
from vistune.models.families.visualglm import VisualGLMFamily
from vistune.models.visualglm import VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import hf_map

NAME = "visualglm"


def matches(config: Mapping[str, Any], keys: Set[str]) -> bool:
    """Whether a directory holds a VisualGLM."""
    return VisualGLMFamily().matches(config, keys)


def compare(directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
    """Compares one file; see `Case`."""
    model = VisualGLMFamily().load(directory, ledger.dtype)
    _positions(model, ledger)
    _forward_and_backward(model, ledger)
    _text_and_greedy(model, ledger)


def _positions(model: VisualGLMForConditionalGeneration, ledger: Ledger) -> None:
    text = model.config.text_config
    positions = padded_positions(ledger.take("input_ids"), None, text)
    ledger.compare("position_ids", positions)
    ledger.compare("masked_positions", ~prefix_mask(positions, None, num_past=0))
    if "inv_freq" in ledger:
        # The frequencies are not kept; the angles at position 1 are they.
        _, sin = rotary_tables(torch.ones(1, 2, 1, dtype=torch.int64), text)
        half = sin[0, 0, 0, 0]
        ledger.compare("inv_freq", torch.asin(half[: half.numel() // 2].double()).float())


def _forward_and_backward(model: VisualGLMForConditionalGeneration, ledger: Ledger) -> None:
    ids, images = ledger.take("input_ids"), ledger.take("images")
    start = int(ledger.take("pre_image_length"))
    features = model.vision_tower(images).last_hidden_state
    ledger.compare("vit_out", features)
    ledger.compare("qformer_out", model.connector.queries(features))
    ledger.compare("image_embeds", model.image_embeddings(images))
    embeds = model.embeddings(ids, images, pre_image_length=start)
    positions = padded_positions(ids, None, model.config.text_config)
    hidden = model.language_model.model(position_ids=positions, inputs_embeds=embeds)
    ledger.compare("hidden_last", hidden.last_hidden_state)
    labels = ledger.take("labels") if "labels" in ledger else None
    out = model(ids, pixel_values=images, labels=labels, pre_image_length=start)
    ledger.compare("logits", out.logits)
    if labels is None or "loss" not in ledger:
        return
    ledger.compare("loss", out.loss)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    fused = {
        entry.public: entry.form.join(tuple(gradients[name] for name in entry.own))
        for entry in hf_map(model.config).entries
        if entry.public.startswith("transformer.layers.")
        and entry.public.endswith("attention.query_key_value.weight")
    }
    ledger.closest("grad_qkv", fused)
    ledger.compare("grad_glm_proj", gradients["connector.projection.weight"])


@torch.no_grad()
def _text_and_greedy(model: VisualGLMForConditionalGeneration, ledger: Ledger) -> None:
    if ledger.has("text_input_ids", "text_logits"):
        ledger.compare("text_logits", model(ledger.take("text_input_ids")).logits)
    if ledger.has("prompt_ids", "greedy_tokens"):
        prompt = ledger.take("prompt_ids")
        told = model.generate(
            prompt,
            max_new_tokens=int(ledger.arrays["greedy_tokens"].numel()),
            do_sample=False,
        )
        ledger.compare_tokens("greedy_tokens", told[0, prompt.shape[1] :])
