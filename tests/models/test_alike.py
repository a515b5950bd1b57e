"""Passes in which blocks that are alike are followed once take what whole passes take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.models.alike import Alike, NotAlike, kinds_of
from vistune.models.shadow import pass_bytes, shadow_of

WIDTH = 16


class Block(nn.Module):
    """Normed linear layers beside a residual, in windows or over all."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        parts = self.norm(x).split(edges.diff().tolist())
        return x + self.down(torch.cat([nn.functional.gelu(self.up(part)) for part in parts]))


class Tower(nn.Module):
    """Blocks of two kinds by what they are given, two of another size, and a tap in the middle."""

    def __init__(self, num_blocks: int = 12) -> None:
        super().__init__()
        self.embed, self.tap = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(24 if n < 2 else 40) for n in range(num_blocks))

    def forward(self, pixels: Tensor) -> Tensor:
        x, taps = self.embed(pixels), []
        windows, whole = torch.arange(0, len(x) + 1, 8), torch.tensor([0, len(x)])
        for number, block in enumerate(self.blocks):
            x = block(x, whole if number % 4 == 3 else windows)
            if number == 5:
                taps.append(self.tap(x))
        return x + taps[0]


def found_kinds(tower: Tower) -> tuple[int, ...]:
    def look(pixels: Tensor) -> Any:
        return kinds_of(list(tower.blocks), lambda: tower(pixels))

    with torch.device("meta"):
        pixels = torch.empty(32, 4)
    out, kinds = shadow_of(tower, look, (pixels,))
    assert out.shape == (32, WIDTH)
    return kinds


def tower_of(mode: str) -> Tower:
    with torch.device("meta"):
        tower = Tower()
    tower.requires_grad_(mode != "frozen")
    if mode == "blocks":  # as with adapters: the first block's input has no gradient
        tower.embed.requires_grad_(False)
    if mode == "recomputed":
        for block in tower.blocks:
            forward = block.forward
            block.forward = lambda *args, of=forward: _compat._recomputed(None, of, *args)
    return tower


@pytest.mark.parametrize("mode", ["frozen", "full", "blocks", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shortened_pass_takes_what_the_whole_takes(mode: str, dtype: torch.dtype) -> None:
    tower = tower_of(mode)
    kinds = found_kinds(tower)
    assert len(set(kinds[4:])) == 2 and kinds[3] == kinds[7] == kinds[11]
    if mode == "recomputed" and dtype is torch.bfloat16:
        pytest.skip("layer norms in fp32 are not recomputed so")
    for rows in (64, 128):
        with torch.device("meta"):
            pixels = torch.empty(rows, 4)
        whole = pass_bytes(tower, tower, (pixels,), dtype=dtype)
        ran = [0] * len(tower.blocks)
        for number, block in enumerate(tower.blocks):

            def count(*_: Any, at: int = number, ran: list[int] = ran) -> None:
                ran[at] += 1

            block.up.register_forward_hook(count)
        alike = Alike(list(tower.blocks), kinds)
        short = pass_bytes(tower, tower, (pixels,), dtype=dtype, alike=alike)
        # Casts that nobody keeps go with the pass; of a block that did not run they are counted.
        biases = 0 if dtype is torch.float32 else 2 * (40 + WIDTH) * ran.count(0)
        assert whole.forward == short.forward
        assert 0 <= short.kept - whole.kept <= biases
        assert 0 <= short.backward - whole.backward <= biases
        assert ran[6] == 0 and ran[1] > 0 and ran[11] > 0


def test_blocks_that_differ_after_all_are_refused() -> None:
    tower = tower_of("full")
    kinds = [0] * 12
    with torch.device("meta"):
        pixels = torch.empty(64, 4)
    with pytest.raises(NotAlike):
        pass_bytes(
            tower, tower, (pixels,), dtype=torch.float32, alike=Alike(list(tower.blocks), kinds)
        )
    # Afterwards blocks are what they were.
    assert "forward" not in vars(tower.blocks[0])


def test_a_tower_that_skips_or_repeats_blocks_has_no_kinds() -> None:
    tower = tower_of("full")

    class Twice(Tower):
        def forward(self, pixels: Tensor) -> Tensor:
            return self.blocks[0](super().forward(pixels), torch.tensor([0, len(pixels)]))

    assert found_kinds(Twice().to("meta")) == ()
    tower.blocks.append(Block(8).to("meta"))
    tower.forward = lambda pixels: tower.blocks[0](tower.embed(pixels), torch.tensor([0, 32]))  # type: ignore[method-assign]
    assert found_kinds(tower) == ()
