"""Expert mask, positions and the experts' route, where neighbours would mislead."""

from __future__ import annotations

import random

import pytest
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


def _by_neighbours(types: list[int], real: list[int]) -> tuple[list[bool], list[int]]:
    """The public rules as they are told: every token asks the tokens beside it."""
    n = len(types)
    after = [*types[1:], 0]
    visual = [bool(types[i] and after[i]) for i in range(n)]
    kinds: list[int | None] = []
    for i in range(n):
        before = types[i - 1] if i and real[i - 1] else 0
        is_mark = types[i] and not (before and after[i])
        kinds.append(None if not real[i] else 0 if is_mark else types[i])
    positions = [0]
    for i in range(1, n):
        steps = kinds[i] == 0 or (kinds[i] == 1 and kinds[i - 1] == 0)
        positions.append(positions[-1] + int(steps))
    return visual, positions


@pytest.mark.parametrize("seed", range(20))
def test_separate_images_follow_the_rules_by_neighbours(seed: int) -> None:
    rng = random.Random(seed)
    body = "t"
    for _ in range(rng.randint(0, 3)):
        body += "i" * K + "t" * rng.randint(1, 4)
    left, right = rng.choice([(0, 0), (rng.randint(1, 5), 0), (0, rng.randint(1, 5))])
    slots = row("p" * left + body + "p" * right)
    real = [0] * left + [1] * len(body) + [0] * right
    visual, positions = _by_neighbours(slots[0].long().tolist(), real)
    assert vision_expert_mask(slots, num_image_tokens=K)[0].tolist() == visual
    ours = position_ids(slots, num_image_tokens=K, attention_mask_BT=torch.tensor([real]))
    assert ours[0].tolist() == positions


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
