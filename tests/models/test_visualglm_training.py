"""Training a tiny VisualGLM: packed rows, recomputation, adapters, a falling loss, generation."""

from __future__ import annotations

import copy

import pytest
import torch
from drawn import drawn_images
from torch import Tensor
from visualglm_case import (
    EOP,
    GMASK,
    IMAGE,
    SOP,
    answer_loss,
    load_arrays,
    load_model,
    pack,
    relative_error,
    sample,
)

from vistune.models.recompute import set_checkpoint_layers
from vistune.models.visualglm import VisualGLMForConditionalGeneration

# Sums of float32 numbers in another order; the values are of order 1.
CLOSE = 1e-5


def three_samples() -> tuple[list[Tensor], Tensor]:
    pixels = load_arrays()["images"]
    samples = [
        sample([20, 21, 22], [30, 31], num_image_tokens=8),
        sample([23, 24, 25, 26, 27], [32]),
        sample([28], [33, 34, 35, 36], num_image_tokens=8),
    ]
    return samples, pixels


def gradients(model: VisualGLMForConditionalGeneration) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(float(gradient.abs().max()), 1.0)
        assert float((ours[name] - gradient).abs().max()) < CLOSE * scale, name


def test_packed_equals_one_by_one() -> None:
    model = load_model()
    samples, pixels = three_samples()
    packed = answer_loss(model, samples, pixels)
    packed.backward()
    together = gradients(model)
    model.zero_grad()
    images = [pixels[:1], None, pixels[1:]]
    alone = sum(answer_loss(model, [s], p) for s, p in zip(samples, images, strict=True))
    assert isinstance(alone, Tensor)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=CLOSE)
    assert_close(together, gradients(model))


def test_packed_equals_a_padded_batch() -> None:
    model = load_model()
    samples, pixels = three_samples()
    hidden = model.hidden_states(**pack(samples), pixel_values_NCYX=pixels)[0]
    longest = max(len(ids) for ids in samples)
    ids = torch.stack([torch.nn.functional.pad(s, (longest - len(s), 0), value=3) for s in samples])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones(len(s)), (longest - len(s), 0)) for s in samples]
    )
    logits = model(ids, pixel_values=pixels, attention_mask=mask.long()).logits
    expected = logits[mask.bool()]
    assert relative_error(model.logits(hidden), expected.detach()) < CLOSE


def test_a_sample_does_not_see_another() -> None:
    model = load_model()
    samples, pixels = three_samples()
    changed = [samples[0].clone(), *samples[1:]]
    changed[0][-2] = 99
    changed[0][11] = 98
    with torch.no_grad():
        one = model.hidden_states(**pack(samples), pixel_values_NCYX=pixels)
        other = model.hidden_states(**pack(changed), pixel_values_NCYX=pixels)
    border = len(samples[0])
    assert torch.equal(one[:, border:], other[:, border:])
    assert not torch.allclose(one[:, :border], other[:, :border])


def test_prompts_look_both_ways_and_answers_back() -> None:
    model = load_model()
    ids = sample([20, 21, 22, 23], [30, 31, 32])
    prompt = ids.tolist().index(SOP)

    def hidden(place: int) -> Tensor:
        changed = ids.clone()
        changed[place] = 77
        with torch.no_grad():
            return model.hidden_states(**pack([changed]), pixel_values_NCYX=None)[0]

    with torch.no_grad():
        plain = model.hidden_states(**pack([ids]), pixel_values_NCYX=None)[0]
    # The last prompt word reaches the first token; an answer word reaches nothing before it.
    assert not torch.allclose(hidden(3)[0], plain[0])
    later = hidden(prompt + 2)
    assert torch.equal(later[: prompt + 2], plain[: prompt + 2])
    assert not torch.allclose(later[prompt + 2 :], plain[prompt + 2 :])


def test_a_text_row_touches_every_trained_weight() -> None:
    model = load_model()
    text = [sample([20, 21], [30])]
    loss = answer_loss(model, text, None)
    loss.backward()
    seeing = [p for n, p in model.named_parameters() if n.startswith(("vision_tower", "connector"))]
    assert all(p.grad is not None and not p.grad.any() for p in seeing)
    model.requires_grad_(False)
    model.language_model.requires_grad_(True)
    assert float(answer_loss(model, text, None)) == pytest.approx(float(loss), rel=1e-6)


def test_recomputed_layers_give_the_same_gradients() -> None:
    samples, pixels = three_samples()
    model = load_model().train()
    answer_loss(model, samples, pixels).backward()
    plain = gradients(model)
    model.zero_grad()
    set_checkpoint_layers(model, 2)  # type: ignore[arg-type]
    answer_loss(model, samples, pixels).backward()
    assert_close(gradients(model), plain)


def test_adapters_train_alone_and_merge() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    samples, pixels = three_samples()
    model = load_model().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    names = ["q_proj", "k_proj", "v_proj", "dense"]
    # One pair per projection, as SwissArmyTransformer adapts ChatGLM: alpha 1, scale 1 / rank.
    settings = LoraConfig(r=2, lora_alpha=1, target_modules=names, layers_to_transform=[0, 2])
    inject_adapter_in_model(settings, model.language_model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 4 * 2 * (64 + 64)
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = answer_loss(model, samples, pixels)
        loss.backward()
        optimizer.step()
    after = answer_loss(model, samples, pixels).detach()
    assert float(after) < float(loss)
    state = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(state[name], before[name]) for name in before)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.merge()
    merged = answer_loss(model, samples, pixels).detach()
    assert float(merged) == pytest.approx(float(after), rel=CLOSE)


def test_loss_falls_on_drawn_images() -> None:
    torch.manual_seed(0)
    model = load_model().train()
    pixels, colours = drawn_images(8, side_px=56, seed=1)
    samples = [sample([20, 21], [40 + colour], num_image_tokens=8) for colour in colours]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = answer_loss(model, samples, pixels) / (3 * len(samples))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]


def test_batched_generation_equals_one_by_one() -> None:
    model = load_model()
    pixels = load_arrays()["images"]
    prompts = [
        torch.tensor([10, 11, *[IMAGE] * 8, 20, 21, 22, 23, GMASK, SOP]),
        torch.tensor([10, 11, *[IMAGE] * 8, 24, GMASK, SOP]),
    ]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": EOP, "pad_token_id": 3}
    alone = [
        model.generate(ids[None], pixel_values=pixels[i : i + 1], **options)[0, len(ids) :]
        for i, ids in enumerate(prompts)
    ]
    width = len(prompts[0])
    padded = torch.stack(
        [torch.nn.functional.pad(ids, (width - len(ids), 0), value=3) for ids in prompts]
    )
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(i), (width - len(i), 0)) for i in prompts]
    )
    for use_cache in (True, False):
        out = model.generate(
            padded, pixel_values=pixels, attention_mask=mask, use_cache=use_cache, **options
        )
        for row, expected in zip(out[:, width:], alone, strict=True):
            assert row[: len(expected)].tolist() == expected.tolist()


def test_bfloat16_stays_near_float32() -> None:
    samples, pixels = three_samples()
    model = load_model()
    with torch.no_grad():
        exact = answer_loss(model, samples, pixels)
        rough = answer_loss(model.to(torch.bfloat16), samples, pixels)
    # 8 bits of mantissa over three layers: about one per cent in the loss.
    assert float(rough) == pytest.approx(float(exact), rel=2e-2)
