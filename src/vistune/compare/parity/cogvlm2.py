"""CogVLM2: positions, expert mask, tower, logits, loss, gradients, greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vistune.compare.parity.ledger import Ledger
from vistune.models.cogvlm2 import CogVLM2ForConditionalGeneration
from vistune.models.cogvlm2.tokens import position_ids, vision_expert_mask
from vistune.models.families.cogvlm2 import CogVLM2Family, load_cogvlm2

NAME = "cogvlm2"


def matches(config: Mapping[str, Any], keys: Set[str]) -> bool:
    """Whether a directory holds a CogVLM2."""
    return CogVLM2Family().matches(config, keys)


def compare(directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
    """Compares one file; see `Case`."""
    model = load_cogvlm2(directory, ledger.dtype)
    _positions(model, ledger)
    _forward_and_backward(model, ledger)
    _text_and_greedy(model, ledger)


def _positions(model: CogVLM2ForConditionalGeneration, ledger: Ledger) -> None:
    num_slots = model.config.num_image_tokens
    is_image, mask = ledger.take("token_type_ids") == 1, ledger.take("attention_mask")
    with_mask = position_ids(is_image, num_image_tokens=num_slots, attention_mask_BT=mask)
    ledger.compare("position_ids", with_mask)
    ledger.compare("position_ids_nomask", position_ids(is_image, num_image_tokens=num_slots))
    experts = vision_expert_mask(is_image, num_image_tokens=num_slots)
    ledger.compare("vision_expert_mask", experts)
    if "left_pad_position_ids" in ledger:
        # The real tokens of the last row, padded on the left to the length of the array.
        length = int(ledger.arrays["left_pad_position_ids"].shape[1])
        num_real = int(mask[-1].sum())
        pad = length - num_real
        row = F.pad(is_image[-1:, :num_real], (pad, 0))
        row_mask = F.pad(mask[-1:, :num_real], (pad, 0))
        padded = position_ids(row, num_image_tokens=num_slots, attention_mask_BT=row_mask)
        ledger.compare("left_pad_position_ids", padded)


def _forward_and_backward(model: CogVLM2ForConditionalGeneration, ledger: Ledger) -> None:
    ids, mask, images = (ledger.take(n) for n in ("input_ids", "attention_mask", "images"))
    ledger.compare("vision_features", model.model.image_features(images))
    out = model(ids, pixel_values=images, attention_mask=mask)
    kept = mask.bool()
    ledger.compare("logits", out.logits, kept=kept)
    assert out.hidden_states is not None
    ledger.compare("hidden_last", out.hidden_states[0], kept=kept)
    if not ledger.has("labels", "loss"):
        return
    labels = ledger.take("labels")
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    ledger.compare("loss", loss)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    suffix = "self_attn.vision_expert_query_key_value.weight"
    ledger.closest("grad_qkv_vision", {n: g for n, g in gradients.items() if n.endswith(suffix)})
    ledger.compare("grad_boi", gradients["model.vision.boi"])
    ledger.compare("grad_embed", gradients["model.embed_tokens.weight"])


@torch.no_grad()
def _text_and_greedy(model: CogVLM2ForConditionalGeneration, ledger: Ledger) -> None:
    ids, images = ledger.take("input_ids"), ledger.take("images")
    if "text_only_logits" in ledger:
        # The first row from behind its image on.
        start = ids.shape[1] - int(ledger.arrays["text_only_logits"].shape[1])
        ledger.compare("text_only_logits", model(ids[:1, start:]).logits)
    if "greedy_tokens" in ledger:
        told = model.generate(
            ids[:1],
            pixel_values=images[:1],
            max_new_tokens=int(ledger.arrays["greedy_tokens"].numel()),
            do_sample=False,
        )
        ledger.compare_tokens("greedy_tokens", told[0, ids.shape[1] :])
