"""Against transformers' own classes: decoders on packed rows, BLIP-2's parts, forward and backward.

Transformers' LLaVA as a whole is in test_compose.py, CogVLM2's language half in test_cogvlm2.py,
InternLM2 in checkpoint/test_layout_internlm2.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_parts import composed, packed_logits, row
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
)
from visualglm_case import load_arrays, load_model

# fp32 sums in another order; the values compared are of order 1.
TOLERANCE = 1e-5


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    # Key biases have gradient zero but for rounding, so a scale of their own means nothing.
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        assert float((ours[name] - gradient).abs().max()) < TOLERANCE * scale, name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gemma", "gemma2", "qwen3"])
def test_a_packed_row_is_transformers_own_decoder_sample_by_sample(
    tmp_path: Path, kind: str
) -> None:
    """Plain attention of transformers, one sample at a time, images among the text."""
    ours, facts = composed(tmp_path, text=kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / f"text_{kind}", attn_implementation="eager", dtype=torch.float32
    )
    made = row(facts)
    ours.train(), theirs.train()
    found = packed_logits(ours, made)
    expected = []
    for ids, image in zip(made.ids, made.images, strict=True):
        table = theirs.get_input_embeddings()
        at_image = ids == facts.image_token_id
        embeds = table(ids.masked_fill(at_image, 0))
        if image is not None:
            seen = ours.image_features(image)[0].detach()
            embeds = embeds.masked_scatter(at_image[:, None], seen)
        expected.append(theirs(inputs_embeds=embeds[None], use_cache=False).logits[0])
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0.05
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    sum(x.square().sum() for x in found).backward()
    sum(x.square().sum() for x in expected).backward()
    assert_same_gradients(gradients(ours.language_model), gradients(theirs))


def blip2() -> tuple[Blip2ForConditionalGeneration, dict[str, str]]:
    """Transformers' BLIP-2 with the weights of our VisualGLM, and the names: theirs -> ours."""
    ours = load_model()
    config = Blip2Config(
        vision_config=ours.config.vision_config.to_dict(),
        qformer_config=ours.config.qformer_config.to_dict(),
        text_config=OPTConfig(
            hidden_size=ours.config.text_config.hidden_size,
            word_embed_proj_dim=ours.config.text_config.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=32,
            vocab_size=32,
        ).to_dict(),
        num_query_tokens=ours.config.num_query_tokens,
    )
    theirs = Blip2ForConditionalGeneration(config).eval()
    places = {
        "vision_model.": "vision_tower.",
        "qformer.": "connector.qformer.",
        "language_projection.": "connector.projection.",
        "query_tokens": "connector.query_tokens",
    }
    names = {
        name: name.replace(prefix, own, 1)
        for name in theirs.state_dict()
        for prefix, own in places.items()
        if name.startswith(prefix)
    }
    state = ours.state_dict()
    missing = theirs.load_state_dict({n: state[o] for n, o in names.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("language_model.") for name in missing.missing_keys)
    # EVA-g's closing norm has an epsilon of its own.
    theirs.vision_model.post_layernorm.eps = ours.config.vision_norm_eps
    return theirs, names


def test_visualglm_sees_as_transformers_blip2() -> None:
    ours, pixels = load_model(), load_arrays()["images"]
    theirs, names = blip2()
    found = ours.image_embeddings(pixels)
    seen = theirs.vision_model(pixel_values=pixels)[0]
    asked = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(len(pixels), -1, -1),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
    )[0]
    expected = theirs.language_projection(asked)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    found.square().sum().backward()
    expected.square().sum().backward()
    theirs_by_our_names = {names[n]: g for n, g in gradients(theirs).items()}
    assert_same_gradients(gradients(ours), theirs_by_our_names)
    # With the epsilon of the blocks it would be another model.
    theirs.vision_model.post_layernorm.eps = ours.config.vision_config.layer_norm_eps
    assert not torch.equal(theirs.vision_model(pixel_values=pixels)[0], seen)
