"""CogVLM2 on packed rows: no leak, every weight touched, checkpointing, LoRA, a falling loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cogvlm2_case import load_arrays, load_model, pack, text_loss
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from torch import Tensor

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration
from vistune.models.families.files import built_on_meta

# Packed and alone are the same sums in another order: float32 rounding and nothing else.
CLOSE = 1e-5
IMAGE = [500] * 6


def _samples() -> list[Tensor]:
    """Two samples with an image, one of text between them."""
    return [
        torch.tensor([501, *IMAGE, 236, 248, 87, 207]),
        torch.tensor([501, 12, 13, 14, 15, 16, 17, 18]),
        torch.tensor([501, *IMAGE, 175, 69, 216]),
    ]


def _run(
    model: CogVLM2ForConditionalGeneration, samples: list[Tensor], images: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns hidden states and the summed loss of a packed row."""
    row: dict[str, Any] = pack(samples)
    hidden = model.hidden_states(**row, pixel_values_NCYX=images)
    return hidden, text_loss(model, hidden, row)


def _gradients(model: CogVLM2ForConditionalGeneration) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def images() -> Tensor:
    return load_arrays()["images"]


def test_packed_is_one_by_one(images: Tensor) -> None:
    model, samples = load_model(), _samples()
    hidden, loss = _run(model, samples, images)
    loss.backward()
    packed = _gradients(model)
    alone, total = [], torch.zeros(())
    for sample, own in zip(samples, (images[:1], None, images[1:]), strict=True):
        one, one_loss = _run(model, [sample], own)
        one_loss.backward()
        alone.append(one)
        total = total + one_loss.detach()
    separate = _gradients(model)
    torch.testing.assert_close(hidden, torch.cat(alone, dim=1), rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(loss.detach(), total, rtol=CLOSE, atol=0)
    assert packed.keys() == separate.keys() == dict(model.named_parameters()).keys()
    for name, gradient in packed.items():
        scale = float(separate[name].abs().max())
        torch.testing.assert_close(
            gradient, separate[name], rtol=0, atol=CLOSE * max(scale, 1e-3), msg=name
        )


@torch.no_grad()
def test_packed_is_the_padded_forward(images: Tensor) -> None:
    model, (first, _, last) = load_model(), _samples()
    hidden, _ = _run(model, [first, last], images)
    padded = torch.nn.utils.rnn.pad_sequence([first, last], batch_first=True, padding_value=500)
    mask = torch.tensor([[1] * 11, [1] * 10 + [0]])
    out = model(padded, pixel_values=images, attention_mask=mask)
    torch.testing.assert_close(hidden[0], out.hidden_states[0][mask.bool()], rtol=CLOSE, atol=CLOSE)


@torch.no_grad()
def test_a_sample_knows_nothing_of_the_others(images: Tensor) -> None:
    model, samples = load_model(), _samples()
    before, _ = _run(model, samples, images)
    samples[0] = torch.tensor([501, *IMAGE, 1, 2, 3, 4])
    changed = images.clone()
    changed[0] = -changed[0]
    after, _ = _run(model, samples, changed)
    assert not torch.allclose(before[:, :11], after[:, :11])
    assert torch.equal(before[:, 11:], after[:, 11:])


def test_a_row_without_images_touches_every_weight() -> None:
    model = load_model()
    _, loss = _run(model, [_samples()[1]], None)
    loss.backward()
    gradients = _gradients(model)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        if "vision" in name:
            assert not gradient.any(), name
    assert gradients["model.layers.0.mlp.language_mlp.up_proj.weight"].any()


def test_a_stand_in_row_of_one_token_runs() -> None:
    model = load_model()
    hidden = model.hidden_states(**pack([torch.tensor([0])]), pixel_values_NCYX=None)
    assert hidden.shape == (1, 1, 64)


def test_images_that_do_not_fit_are_refused(images: Tensor) -> None:
    model, samples = load_model(), _samples()
    with pytest.raises(ModelError, match=r"12 image tokens .* and 1 images"):
        _run(model, samples, images[:1])
    with pytest.raises(ModelError, match=r"12 image tokens .* and 0 images"):
        _run(model, samples, None)
    with pytest.raises(ModelError, match="one size"):
        _run(model, samples, images[..., :42])


def test_checkpointing_changes_no_gradient(images: Tensor) -> None:
    model = load_model().train()
    _, loss = _run(model, _samples(), images)
    loss.backward()
    plain = _gradients(model)
    runs = []
    for layer in (model.model.layers[1], model.model.vision.transformer.layers[0]):
        assert _compat.set_recompute(layer, on=True)
        # Seen from inside the layer; recomputation stops before the last module has returned.
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    _, loss = _run(model, _samples(), images)
    loss.backward()
    assert len(runs) == 4, "both layers are computed once more in the backward pass"
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=CLOSE, atol=1e-7, msg=name)


def test_autocast_runs_trained_fp32_beside_frozen_bf16(images: Tensor) -> None:
    # How training holds weights: trained ones in float32, frozen ones in bfloat16.
    exact, _ = _run(load_model(), _samples(), images)
    model = load_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        trained = ".vision_expert_" in name or "linear_proj" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, loss = _run(model, _samples(), images)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    # bfloat16 rounds by 2^-8 at every product of three layers.
    assert (hidden - exact).abs().max() < 0.06 * exact.abs().max()


def test_lora_on_the_visual_projection_alone(images: Tensor) -> None:
    model = load_model()
    before, _ = _run(model, _samples(), images)
    peft = get_peft_model(model, _lora())
    trained = [name for name, p in peft.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3
    assert all("vision_expert_query_key_value.lora_" in name for name in trained)
    after, _ = _run(model, _samples(), images)
    assert torch.equal(before, after), "a new adapter adds nothing"
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=1.0)
    for samples, own in ((_samples(), images), ([_samples()[1]], None)):
        _, loss = _run(model, samples, own)
        loss.backward()
        # A row of text alone gives the adapter a gradient too: zero.
        assert all(p.grad is not None for p in peft.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    changed, _ = _run(model, _samples(), images)
    assert not torch.equal(before[:, 1:11], changed[:, 1:11])
    assert torch.equal(before[:, 11:19], changed[:, 11:19]), "text never meets the visual expert"
    tuned = peft.merge_and_unload()
    merged, _ = _run(tuned, _samples(), images)
    torch.testing.assert_close(merged, changed, rtol=1e-4, atol=1e-5)


def test_public_lora_trains_the_public_number_of_weights() -> None:
    model = built_on_meta(lambda: CogVLM2ForConditionalGeneration(CogVLM2Config()))
    with torch.device("meta"):
        peft = get_peft_model(model, _lora())
    trained, _ = peft.get_nb_trainable_parameters()
    assert trained == 2_621_440


def _lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=32, target_modules=["vision_expert_query_key_value"])


def _drawn(shape: str, colour: tuple[int, int, int]) -> Tensor:
    picture = Image.new("RGB", (56, 56), (20, 20, 20))
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "circle" else draw.rectangle)((12, 12, 44, 44), fill=colour)
    return torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)


@pytest.mark.parametrize("trained", ["all", "vision and connector", "visual expert LoRA"])
def test_twenty_steps_on_drawn_pictures(trained: str) -> None:
    torch.manual_seed(0)
    model = load_model().train()
    if trained == "visual expert LoRA":
        get_peft_model(model, _lora())
        rate = 2e-2
    else:
        rate = 2e-3
        for name, parameter in model.named_parameters():
            role = model.module_map.role_of(name)
            parameter.requires_grad_(trained == "all" or role in ("vision", "connector"))
    scenes = [("circle", (220, 30, 30)), ("circle", (30, 60, 220)), ("box", (30, 200, 60))]
    images = torch.stack([_drawn(*scene) for scene in scenes])
    words = {"circle": 40, "box": 41, (220, 30, 30): 50, (30, 60, 220): 51, (30, 200, 60): 52}
    samples = [
        torch.tensor([501, *IMAGE, 7, 8, words[shape], words[colour], 502])
        for shape, colour in scenes
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(20):
        _, loss = _run(model, samples, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
