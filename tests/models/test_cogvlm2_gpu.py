"""CogVLM2 on an accelerator: the same numbers, and packed rows through the varlen kernel."""

from __future__ import annotations

import pytest
import torch
from cogvlm2_case import REL, load_arrays, load_config, load_model, pack, relative_error
from torch import Tensor

from vistune.models.cogvlm2 import CogVLM2ForConditionalGeneration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
IMAGE = [500] * 6


@pytest.fixture
def arrays() -> dict[str, Tensor]:
    return {name: array.cuda() for name, array in load_arrays().items()}


def test_float32_is_the_reference(arrays: dict[str, Tensor]) -> None:
    model = load_model().cuda()
    out = model(
        arrays["input_ids"],
        pixel_values=arrays["images"],
        attention_mask=arrays["attention_mask"],
    )
    kept = arrays["attention_mask"].bool()
    assert relative_error(out.logits[kept], arrays["logits"][kept]) < REL
    logits, labels = out.logits[:, :-1].flatten(0, 1), arrays["labels"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    gradient = model.model.vision.boi.grad
    assert gradient is not None
    assert relative_error(gradient, arrays["grad_boi"]) < REL
    expected = arrays["greedy_tokens"]
    told = model.generate(
        arrays["input_ids"][:1],
        pixel_values=arrays["images"][:1],
        max_new_tokens=len(expected),
        do_sample=False,
    )
    assert torch.equal(told[0, -len(expected) :], expected)


def _packed(
    model: CogVLM2ForConditionalGeneration, samples: list[Tensor], images: Tensor | None
) -> Tensor:
    row = pack(samples)
    on_device = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in row.items()}
    return model.hidden_states(**on_device, pixel_values_NCYX=images)


def test_packed_bfloat16_does_not_leak(arrays: dict[str, Tensor]) -> None:
    # Heads of 8 are the least the varlen kernel takes; that is the fixture's width.
    model = load_model().to(torch.bfloat16).cuda()
    first = torch.tensor([501, *IMAGE, 236, 248, 87, 207])
    second = torch.tensor([501, *IMAGE, 175, 69, 216])
    images = arrays["images"]
    together = _packed(model, [first, second], images)
    alone = [_packed(model, [first], images[:1]), _packed(model, [second], images[1:])]
    # bfloat16 rounds by 2^-8; the kernel tiles one row and two rows alike, so this is generous.
    assert relative_error(together, torch.cat(alone, dim=1)) < 0.02
    changed = _packed(model, [torch.tensor([501, *IMAGE, 1, 2, 3, 4]), second], images)
    assert torch.equal(changed[:, 11:], together[:, 11:])
    together.float().pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_wrong_number_of_images_fails_in_forward_at_once(arrays: dict[str, Tensor]) -> None:
    from vistune.errors import ModelError

    model = CogVLM2ForConditionalGeneration(load_config()).cuda()
    with pytest.raises(ModelError, match="1 images"):
        model(arrays["input_ids"][:, :7], pixel_values=arrays["images"][:1])
