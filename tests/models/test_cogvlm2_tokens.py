"""Expert mask, positions and the experts' route, where neighbours would mislead."""

from __future__ import annotations

import torch

from vistune.models.cogvlm2.tokens import (
    ExpertRoute,
    permute_rows,
    position_ids,
    vision_expert_mask,
)

K = 5  # begin, three patches, end


def row(text: str) -> torch.Tensor:
    """Image slots of a row written as a string: `i` is an image slot."""
    return torch.tensor([[letter == "i" for letter in text]])


def test_begin_and_patches_are_visual_and_the_end_is_not() -> None:
    mask = vision_expert_mask(row("tiiiiitt"), num_image_tokens=K)
    assert mask[0].tolist() == [False, True, True, True, True, False, False, False]


def test_an_image_takes_three_positions() -> None:
    positions = position_ids(row("tiiiiitt"), num_image_tokens=K)
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 3, 4, 5]


def test_images_side_by_side_keep_their_own_marks() -> None:
    slots = row("tiiiiiiiiiit")
    assert vision_expert_mask(slots, num_image_tokens=K)[0].long().tolist() == [
        0, *[1, 1, 1, 1, 0], *[1, 1, 1, 1, 0], 0,
    ]  # fmt: skip
    assert position_ids(slots, num_image_tokens=K)[0].tolist() == [
        0, *[1, 2, 2, 2, 3], *[4, 5, 5, 5, 6], 7,
    ]  # fmt: skip


def test_packed_positions_restart_and_know_nothing_of_neighbours() -> None:
    # The second sample starts with its image, right behind the end mark of the first.
    samples = ["ttiiiii", "iiiiit", "ttt"]
    cu_seqlens = torch.tensor([0, 7, 13, 16], dtype=torch.int32)
    packed = row("".join(samples))
    positions = position_ids(packed, num_image_tokens=K, cu_seqlens=cu_seqlens)
    alone = [position_ids(row(sample), num_image_tokens=K)[0] for sample in samples]
    assert torch.equal(positions[0], torch.cat(alone))
    mask = vision_expert_mask(packed, num_image_tokens=K)
    masks = [vision_expert_mask(row(sample), num_image_tokens=K)[0] for sample in samples]
    assert torch.equal(mask[0], torch.cat(masks))


def test_padding_does_not_advance_positions() -> None:
    slots = row("tiiiiitpp")
    right = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0]])
    positions = position_ids(slots, num_image_tokens=K, attention_mask_BT=right)
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 4]
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    positions = position_ids(row("pptiiiiit"), num_image_tokens=K, attention_mask_BT=left)
    assert positions[0].tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 5]


def test_route_puts_language_first_and_back() -> None:
    is_vision = torch.tensor([False, True, True, False, True, False])
    route = ExpertRoute.of(is_vision, num_vision=3)
    x = torch.arange(6.0)[:, None]
    routed = route.to_route(x)
    assert routed[:, 0].tolist() == [0, 3, 5, 1, 2, 4]
    assert (route.num_language, route.num_vision) == (3, 3)
    assert torch.equal(route.to_text(routed), x)
    assert torch.equal(ExpertRoute.text(6).to_route(x), x)


def test_permuted_gradient_is_that_of_indexing() -> None:
    order = torch.randperm(7)
    weight = torch.randn(7, 3, dtype=torch.float64)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    (permute_rows(x, order, order.argsort()) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[order], weight)
