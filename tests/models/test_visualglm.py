"""VisualGLM against the reference dump: every array, and the sizes of the public model."""

from __future__ import annotations

import pytest
import torch
from visualglm_case import REL, load_arrays, load_model, public_tensors, relative_error

from vistune.errors import ModelError
from vistune.models.chatglm.attention import prefix_mask, rotary_tables
from vistune.models.chatglm.positions import padded_positions
from vistune.models.tune import apply_tuning
from vistune.models.visualglm import VisualGLMConfig, VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import hf_map, sat_map
from vistune.recipe import load_recipe


def test_forward_and_gradients_equal_the_reference() -> None:
    model, arrays = load_model(), load_arrays()
    features = model.vision_tower(arrays["images"]).last_hidden_state
    assert relative_error(features, arrays["vit_out"]) < REL
    assert relative_error(model.connector.queries(features), arrays["qformer_out"]) < REL
    assert relative_error(model.image_embeddings(arrays["images"]), arrays["image_embeds"]) < REL
    out = model(
        arrays["input_ids"],
        pixel_values=arrays["images"],
        labels=arrays["labels"],
        pre_image_length=int(arrays["pre_image_length"]),
    )
    assert relative_error(out.logits, arrays["logits"]) < REL
    assert relative_error(out.loss, arrays["loss"]) < REL
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    entry = next(
        entry
        for entry in hf_map(model.config).entries
        if entry.public == "transformer.layers.1.attention.query_key_value.weight"
    )
    fused = entry.form.join(tuple(gradients[name] for name in entry.own))
    assert relative_error(fused, arrays["grad_qkv"]) < REL
    projection = gradients["connector.projection.weight"]
    assert relative_error(projection, arrays["grad_glm_proj"]) < REL


def test_hidden_states_and_text_equal_the_reference() -> None:
    model, arrays = load_model(), load_arrays()
    embeds = model.embeddings(arrays["input_ids"], arrays["images"], pre_image_length=3)
    positions = padded_positions(arrays["input_ids"], None, model.config.text_config)
    hidden = model.language_model.model(position_ids=positions, inputs_embeds=embeds)
    assert relative_error(hidden.last_hidden_state, arrays["hidden_last"]) < REL
    text = model(arrays["text_input_ids"]).logits
    assert relative_error(text, arrays["text_logits"]) < REL


def test_positions_mask_and_frequencies_equal_the_reference() -> None:
    config, arrays = load_model().config.text_config, load_arrays()
    positions = padded_positions(arrays["input_ids"], None, config)
    assert torch.equal(positions, arrays["position_ids"])
    mask = prefix_mask(positions, None, num_past=0)
    assert torch.equal(~mask, arrays["masked_positions"].bool())
    ones = torch.ones(1, 2, 1, dtype=torch.int64)
    _, sin = rotary_tables(ones, config)
    frequencies = arrays["inv_freq"]
    assert torch.equal(sin[0, 0, 0, 0], torch.cat((frequencies, frequencies)).sin())


def test_image_tokens_mark_the_place_as_well_as_a_length_does() -> None:
    model, arrays = load_model(), load_arrays()
    ids = arrays["input_ids"].clone()
    ids[:, 3:11] = model.image_token_id
    with torch.no_grad():
        logits = model(ids, pixel_values=arrays["images"]).logits
    assert relative_error(logits, arrays["logits"]) < REL


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_the_reference(use_cache: bool) -> None:
    model, arrays = load_model(), load_arrays()
    prompt = arrays["prompt_ids"]
    out = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    assert out[0, prompt.shape[1] :].tolist() == arrays["greedy_tokens"].tolist()


def test_public_names_both_ways_are_bit_equal() -> None:
    model = load_model()
    public = public_tensors()
    back = hf_map(model.config).to_public(model.state_dict(), where="test")
    assert back.keys() == public.keys()
    assert all(torch.equal(back[name].float(), public[name]) for name in public)


@pytest.mark.parametrize(("vocab_size", "extra"), [(130_528, 0), (150_528, 2 * 20_000 * 4096)])
def test_public_parameter_counts(vocab_size: int, extra: int) -> None:
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(
            VisualGLMConfig(text_config={"vocab_size": vocab_size})
        )

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == 7_802_193_408 + extra
    assert count(model.language_model) == 6_707_929_088 + extra
    assert count(model.vision_tower) == 985_952_256
    assert count(model.connector.qformer) + model.connector.query_tokens.numel() == 105_162_240
    assert count(model.connector.projection) == 3_149_824
    unread = sat_map(model.config).unread["transformer.position_embeddings.weight"]
    assert unread.make is not None
    assert count(model) + unread.make().numel() == 7_810_582_016 + extra


def test_public_lora_trains_the_public_number_of_weights() -> None:
    tune = load_recipe("visualglm/fewshot-lora").recipe.tune
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(VisualGLMConfig())
        assert apply_tuning(model, tune, seed=0).num_trainable == 655_360


def test_wrong_input_is_refused() -> None:
    model, arrays = load_model(), load_arrays()
    ids = arrays["text_input_ids"].clone()
    ids[ids == 304] = 7
    with pytest.raises(ModelError, match="end the prompt"):
        model(ids)
    with pytest.raises(ModelError, match="do not match"):
        model(arrays["text_input_ids"], pixel_values=arrays["images"])
    cache = model(arrays["text_input_ids"], use_cache=True).past_key_values
    with pytest.raises(ModelError, match="whole prompt"):
        model(
            arrays["text_input_ids"],
            position_ids=torch.zeros(1, 2, 16, dtype=torch.int64),
            past_key_values=cache,
        )
