"""CogVLM2's generation: the cache changes nothing, padding changes nothing, pad is no image."""

from __future__ import annotations

import pytest
import torch
from cogvlm2_case import load_arrays, load_model, relative_error
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.cogvlm2 import CogVLM2ForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> CogVLM2ForConditionalGeneration:
    return load_model()


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return load_arrays()


def _say(model: CogVLM2ForConditionalGeneration, ids: Tensor, **inputs: object) -> list[list[int]]:
    told = model.generate(ids, max_new_tokens=8, do_sample=False, **inputs)
    return told[:, ids.shape[1] :].tolist()


def _left_padded(arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both prompts of the fixture, the shorter one moved to the right."""
    ids, mask = arrays["input_ids"].clone(), arrays["attention_mask"].clone()
    ids[1], mask[1] = ids[1].roll(5), mask[1].roll(5)
    return ids, mask


@pytest.mark.parametrize("row", [0, 1])
def test_cache_changes_no_token(
    model: CogVLM2ForConditionalGeneration, arrays: dict[str, Tensor], row: int
) -> None:
    ids = arrays["input_ids"][row : row + 1, : [19, 14][row]]
    image = arrays["images"][row : row + 1]
    cached = _say(model, ids, pixel_values=image)
    assert cached == _say(model, ids, pixel_values=image, use_cache=False)
    assert len(cached[0]) == 8


def test_left_padded_batch_is_one_by_one(
    model: CogVLM2ForConditionalGeneration, arrays: dict[str, Tensor]
) -> None:
    ids, mask = _left_padded(arrays)
    together = _say(model, ids, pixel_values=arrays["images"], attention_mask=mask)
    alone = [
        _say(model, arrays["input_ids"][:1], pixel_values=arrays["images"][:1])[0],
        _say(model, arrays["input_ids"][1:, :14], pixel_values=arrays["images"][1:])[0],
    ]
    assert together == alone


@torch.no_grad()
def test_cached_scores_are_those_of_the_whole_text(
    model: CogVLM2ForConditionalGeneration, arrays: dict[str, Tensor]
) -> None:
    ids, mask = _left_padded(arrays)
    whole = model(ids, pixel_values=arrays["images"], attention_mask=mask)
    seen = model(
        ids[:, :15], pixel_values=arrays["images"], attention_mask=mask[:, :15], use_cache=True
    )
    last = model.prompt_positions(ids[:, :15], mask[:, :15])[:, -1:]
    # Row 0: 15 tokens, three of them share a position. Row 1: five pads, then from 1.
    assert last.tolist() == [[11], [7]]
    for step in range(15, 19):
        last = last + 1
        seen = model(
            ids[:, step : step + 1],
            attention_mask=mask[:, : step + 1],
            position_ids=last,
            past_key_values=seen.past_key_values,
            use_cache=True,
        )
        # Sums over 19 keys in another order.
        assert relative_error(seen.logits[:, 0], whole.logits[:, step]) < 2e-5


def test_a_said_image_token_is_text(
    model: CogVLM2ForConditionalGeneration, arrays: dict[str, Tensor]
) -> None:
    # Force the image token to be the answer: it must not be looked for among the images.
    def only_image_token(ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, model.image_token_id] = 0.0
        return forced

    for use_cache in (True, False):
        told = _say(
            model,
            arrays["input_ids"][:1],
            pixel_values=arrays["images"][:1],
            logits_processor=[only_image_token],
            use_cache=use_cache,
        )
        assert told == [[500] * 8]


def test_text_only_generation_needs_no_image(model: CogVLM2ForConditionalGeneration) -> None:
    ids = torch.tensor([[501, 5, 6, 7, 8, 9, 10, 11]])
    assert _say(model, ids) == _say(model, ids, use_cache=False)


def test_forgotten_images_and_masks_are_refused(
    model: CogVLM2ForConditionalGeneration, arrays: dict[str, Tensor]
) -> None:
    with pytest.raises(ModelError, match="0 images"):
        _say(model, arrays["input_ids"][:1])
    with pytest.raises(ModelError, match="attention_mask where there is padding"):
        model(arrays["input_ids"], pixel_values=arrays["images"])


def test_both_end_tokens_reach_the_generation_config() -> None:
    model = load_model(eos_token_id=[502, 509])
    assert model.generation_config.eos_token_id == [502, 509]
