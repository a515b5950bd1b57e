from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_parts import (
    SIZE_PX,
    TEXT_KINDS,
    VISION_KINDS,
    VOCAB,
    composed,
    one_by_one,
    packed_logits,
    parts,
    row,
    text_config,
    vision_model,
)
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vistune.errors import ModelError
from vistune.models.build import build_model
from vistune.models.compose import ComposedVLM
from vistune.models.facts import describe
from vistune.models.recompute import set_checkpoint_layers

# fp32 sums in another order; the values compared are of order 1.
TOLERANCE = 1e-5


def assert_same_gradients(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    # Key biases have gradient zero but for rounding, so a scale of their own means nothing.
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        error = float((found[name] - gradient).abs().max()) / scale
        assert error < TOLERANCE, (name, error)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_packed_row_equals_samples_one_by_one(shelf: Path, kind: str) -> None:
    model, facts = composed(shelf, text=kind)
    made = row(facts)
    alone = one_by_one(model, made)
    together = packed_logits(model, made)
    for a, b in zip(alone, together, strict=True):
        assert a.abs().max() > 0.05
        torch.testing.assert_close(b, a, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("num_recomputed", [0, 1])
def test_packed_gradients_equal_samples_one_by_one(
    shelf: Path, kind: str, num_recomputed: int
) -> None:
    model, facts = composed(shelf, text=kind)
    model.train()
    set_checkpoint_layers(model, num_recomputed)
    made = row(facts)

    def gradients(logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(x.square().sum() for x in logits).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = gradients(one_by_one(model, made))
    together = gradients(packed_logits(model, made))
    assert alone.keys() == together.keys() and len(alone) > 30
    assert_same_gradients(alone, together)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2", "vit"])
def test_recomputed_tower_blocks_give_the_same_gradients_and_keep_less(
    shelf: Path, vision: str
) -> None:
    kept, gradients = [], []
    for num_layers in (0, 2):
        model, facts = composed(shelf, vision=vision)
        model.train()
        set_checkpoint_layers(model, num_layers, role="vision")
        num_bytes = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_bytes
            num_bytes += tensor.nbytes
            return tensor.detach()

        pixels = torch.cat([image for image in row(facts).images if image is not None])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.image_features(pixels)
        features.square().sum().backward()
        kept.append(num_bytes)
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert kept[1] < 0.7 * kept[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
    with pytest.raises(ModelError, match="the vision tower has") as raised:
        set_checkpoint_layers(model, 30, role="vision")
    assert raised.value.where == "train.checkpoint_tower_layers"


def test_a_sample_does_not_see_another(shelf: Path) -> None:
    model, facts = composed(shelf)
    made = row(facts)
    before = packed_logits(model, made)
    made.ids[0][-1] = (made.ids[0][-1] + 7) % 200 + 3
    made.images[0] = made.images[0] + 1.0
    after = packed_logits(model, made)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_samples_of_one_length_take_the_batched_path(shelf: Path) -> None:
    model, facts = composed(shelf)
    made = row(facts, num_text=(6, 6), with_image=(True, True))
    for a, b in zip(one_by_one(model, made), packed_logits(model, made), strict=True):
        torch.testing.assert_close(b, a, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_long_window_is_cut_into_blocks(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vistune.models.attention.per_sample._QUERY_BLOCK_TOKENS", 3)
    model, facts = composed(shelf, text="gemma2")
    made = row(facts)
    for a, b in zip(one_by_one(model, made), packed_logits(model, made), strict=True):
        torch.testing.assert_close(b, a, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("vision", VISION_KINDS)
def test_every_trained_weight_gets_a_gradient(shelf: Path, vision: str) -> None:
    model, facts = composed(shelf, vision=vision)
    model.train()
    made = row(facts)
    sum(x.square().sum() for x in packed_logits(model, made)).backward()
    idle = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert idle == set()
    assert any(n.startswith("vision_tower") for n, p in model.named_parameters())


@pytest.mark.parametrize("vision", VISION_KINDS)
def test_save_and_load_round_trip(shelf: Path, vision: str, tmp_path: Path) -> None:
    model, facts = composed(shelf, vision=vision)
    made = row(facts)
    expected = packed_logits(model, made)
    model.save_pretrained(tmp_path)
    again, info = ComposedVLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for a, b in zip(expected, packed_logits(again.eval(), made), strict=True):
        assert torch.equal(a, b)


def _llava(vision: str, text: str, layer: int) -> LlavaForConditionalGeneration:
    tower = vision_model(vision)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config(text),
        image_token_index=VOCAB - 1,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    torch.manual_seed(5)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("vision", "layer"), [("clip", -2), ("siglip", -1), ("siglip", -2)])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_equals_transformers_llava(shelf: Path, vision: str, layer: int, text: str) -> None:
    theirs = _llava(vision, text, layer)
    config = parts(shelf, vision=vision, text=text, tower={"layer": layer})
    facts = describe(config)
    ours = build_model(config, facts, seed=0, dtype=torch.float32)
    ours.image_token_id = VOCAB - 1
    names = _copy_llava(theirs, ours)
    made = row(facts, with_image=(True, False, True))
    for ids in made.ids:
        ids[ids == facts.image_token_id] = VOCAB - 1
    ours.train(), theirs.train()
    loss = sum(x.square().sum() for x in packed_logits(ours, made))
    expected = [
        theirs(input_ids=ids[None], pixel_values=image).logits[0]
        for ids, image in zip(made.ids, made.images, strict=True)
    ]
    for a, b in zip(expected, packed_logits(ours, made), strict=True):
        torch.testing.assert_close(b, a, atol=TOLERANCE, rtol=TOLERANCE)
    loss.backward()
    sum(x.square().sum() for x in expected).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    reference = {names[n]: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys() and len(gradients) > 40
    assert_same_gradients(reference, gradients)


def _copy_llava(theirs: LlavaForConditionalGeneration, ours: ComposedVLM) -> dict[str, str]:
    """Copies weights and returns their names: theirs -> ours."""
    names = {}
    for name in theirs.state_dict():
        new = name.removeprefix("model.")
        new = new.replace("multi_modal_projector.linear_1", "connector.0")
        new = new.replace("multi_modal_projector.linear_2", "connector.2")
        new = new.replace("language_model.", "language_model.model.")
        names[name] = new.replace("lm_head", "language_model.lm_head") if new == name else new
    state = {names[name]: tensor for name, tensor in theirs.state_dict().items()}
    own = ours.state_dict()
    ours.load_state_dict({name: state.get(name, own[name]) for name in own})
    assert len(state.keys() & own.keys()) > 0.8 * len(own)
    return names


def test_cached_generation_equals_no_cache_and_transformers_generate(shelf: Path) -> None:
    model, facts = composed(shelf)
    made = row(facts)
    ids, image = made.ids[0][None], made.images[0]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 263}
    cached = model.generate(input_ids=ids, pixel_values=image, use_cache=True, **kwargs)
    plain = model.generate(input_ids=ids, pixel_values=image, use_cache=False, **kwargs)
    assert torch.equal(cached, plain)
    assert cached.shape[1] == ids.shape[1] + 6


def test_text_only_row_touches_vision_and_connector(shelf: Path) -> None:
    model, facts = composed(shelf)
    made = row(facts, num_text=(5,), with_image=(False,))
    sum(x.sum() for x in packed_logits(model, made)).backward()
    for part in (model.vision_tower, model.connector):
        for parameter in part.parameters():
            assert parameter.grad is not None and not parameter.grad.any()
    model.zero_grad()
    model.vision_tower.requires_grad_(False)
    sum(x.sum() for x in packed_logits(model, made)).backward()
    assert all(p.grad is not None for p in model.connector.parameters())
    assert all(p.grad is None for p in model.vision_tower.parameters())


def test_wrong_number_of_images(shelf: Path) -> None:
    model, facts = composed(shelf)
    made = row(facts)
    inputs = made.packed | {"pixel_values_NCYX": torch.randn(1, 3, SIZE_PX, SIZE_PX)}
    with pytest.raises(ModelError, match="do not match"):
        model.hidden_states(**inputs)
    with pytest.raises(ModelError, match="do not match"):
        model.hidden_states(**(inputs | {"pixel_values_NCYX": None}))
    with pytest.raises(ModelError, match="labels never enter"):
        model(input_ids=made.ids[1][None], labels=made.ids[1][None])


def test_gemma_scales_images_like_text(shelf: Path) -> None:
    model, facts = composed(shelf, text="gemma")
    assert model.config.image_embed_scale == pytest.approx(
        model.config.text_config.hidden_size**0.5
    )
    made = row(facts)
    embeds = model.embed(made.ids[0][None], made.images[0])
    model.config.image_embed_scale = 1.0
    bare = model.image_features(made.images[0])[0]
    at_image = made.ids[0] == facts.image_token_id
    torch.testing.assert_close(embeds[0, at_image], bare * 32**0.5)


@pytest.mark.parametrize("fold", [1, 2])
def test_pixel_shuffle_folds_squares_of_patches(shelf: Path, fold: int) -> None:
    model, facts = composed(shelf, connector={"pixel_shuffle": fold})
    assert facts.grid.num_tokens(SIZE_PX, SIZE_PX) == 4 // fold**2
    made = row(facts)
    assert model.image_features(made.images[0]).shape == (1, 4 // fold**2, 32)
    assert len(packed_logits(model, made)) == 3


def test_class_token_is_kept_in_front(shelf: Path) -> None:
    for vision in ("clip", "dinov2_registers"):
        model, facts = composed(shelf, vision=vision, tower={"select": "cls_patch"})
        assert facts.grid.num_tokens(SIZE_PX, SIZE_PX) == 5
        only_patches, _ = composed(shelf, vision=vision)
        pixels = torch.randn(1, 3, SIZE_PX, SIZE_PX)
        whole = model.image_features(pixels)
        torch.testing.assert_close(whole[:, 1:], only_patches.image_features(pixels))


def test_too_many_recomputed_layers(shelf: Path) -> None:
    model, _ = composed(shelf)
    with pytest.raises(ModelError, match="has 2 layers"):
        set_checkpoint_layers(model, 3)
