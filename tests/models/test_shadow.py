"""A pass without storage needs, to the byte, what the same pass needs with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistune.models.kept import LiveBytes
from vistune.models.shadow import PassBytes, pass_bytes, shadow_of

WIDTH = 16
IDS = torch.tensor([3, 5, 5, 5, 3, 3, 5, 3])
AT_IMAGE = 5


class Model(nn.Module):
    """Reads lengths and places off integers, drops empty images, and computes a block again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH)
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU())
        self.out = nn.Linear(64, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def run(self, images: Tensor, *, again: bool) -> Tensor:
        is_empty = (images == 0).flatten(1).sum(1) == images[0].numel()
        seen = images[~is_empty] * self.scale
        assert int(is_empty.sum()) == 0
        mask = IDS == AT_IMAGE
        embeds = self.table(IDS).masked_scatter(mask[:, None], seen)
        embeds[mask] = embeds[mask] + 1
        lengths: list[int] = [int(mask.sum()), int((~mask).sum())]
        parts = [checkpoint(self.block, x, use_reentrant=False) if again else self.block(x)
                 for x in embeds.split(lengths)]  # fmt: skip
        result: Tensor = self.out(torch.cat(parts))
        return result


def really(model: Model, images: Tensor, *, again: bool) -> PassBytes:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    beside = [*model.parameters(), *model.buffers(), images]
    with LiveBytes(beside=beside) as live:
        result = model.run(images, again=again)
        kept, forward = live.now(), live.most
        live.most = kept
        result.backward(torch.empty_like(result))
    return PassBytes(kept, forward, live.most)


@pytest.mark.parametrize("again", [False, True])
def test_it_needs_what_a_real_pass_needs(again: bool) -> None:
    images = torch.ones(4, WIDTH)
    with torch.device("meta"):
        described = Model()
    found = pass_bytes(
        described,
        lambda given: described.run(given, again=again),
        (torch.empty(4, WIDTH, device="meta"),),
        dtype=torch.float32,
    )
    expected = really(Model(), images, again=again)
    # Whether any image is empty is worked out in bytes of its own, a few dozen.
    assert abs(found.kept - expected.kept) <= 64
    assert abs(found.forward - expected.forward) <= 64
    assert abs(found.backward - expected.backward) <= 64
    assert found.kept > 1000 and found.backward > found.kept


def test_layers_computed_again_keep_less() -> None:
    with torch.device("meta"):
        model = Model()
    images = torch.empty(4, WIDTH, device="meta")
    plain, again = (
        pass_bytes(model, lambda x, a=a: model.run(x, again=a), (images,), dtype=torch.float32)
        for a in (False, True)
    )
    assert again.kept < plain.kept


def test_trained_weights_are_cast_for_16_bit() -> None:
    with torch.device("meta"):
        linear = nn.Linear(64, 64, bias=False)
    row = torch.empty(1, 64, device="meta", requires_grad=True)
    found = pass_bytes(linear, linear, (row,), dtype=torch.bfloat16)
    # The weight and the row in 16 bit, and the result.
    assert found.kept == 2 * 64 * 64 + 2 * 64 + 2 * 64


def test_nothing_is_computed_and_shapes_are_known() -> None:
    with torch.device("meta"):
        model = Model()
    found = shadow_of(model, lambda x: model.run(x, again=False), (torch.empty(4, WIDTH),))
    assert tuple(found.shape) == (8, WIDTH) and model.table.weight.device.type == "meta"
