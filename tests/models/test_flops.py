"""Operations: by hand, and as torch counts them on a tiny model."""

import pytest
import torch
from tiny_parts import composed, row
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vistune.models.flops import (
    Flops,
    ModelWork,
    RowLengths,
    TowerWork,
    Weights,
    attended_pairs,
    row_flops,
    work_of,
)
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig

STAGE1 = TuneConfig()
LORA = TuneConfig.model_validate(
    {"connector": {"mode": "freeze"}, "language": {"mode": "lora", "rank": 2}}
)
TOWER = TuneConfig.model_validate({"vision": {"mode": "lora", "rank": 2}})
FULL = TuneConfig.model_validate(
    {part: {"mode": "full"} for part in ("vision", "connector", "language", "head")}
)


def test_a_hand_count_of_a_frozen_trunk_with_a_trained_connector():
    work = ModelWork(
        inner=Weights(1000),
        last_key_value=Weights(100),
        last_rest=Weights(400),
        first_inputs=300,
        attention_width=8,
        windows=(None, None),
        head=50,
        connector=(20, 30),
        tower=TowerWork(forward=7000),
        tune=STAGE1,
    )
    lengths = RowLengths(
        samples=(3, 2), tails=(2, 1), num_targets=2, num_images=1, num_image_tokens=4
    )
    assert row_flops(work, lengths) == Flops(
        tower=7000,
        # first layer: forward and weight gradient; second: input gradient too
        connector=2 * 4 * (2 * 20 + 3 * 30),
        # forward and input gradient; the last layer beyond keys and values at 3 of 5 tokens
        language=4 * (1000 + 100) * 5 + 4 * 400 * 3,
        # layer 1: 6 + 3 pairs; layer 2: queries at positions 2, 3 and 2 see 2 + 3 + 2 keys
        attention=12 * 8 * (9 + 7),
        head=4 * 50 * 2,
    )


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_pairs_are_those_of_the_mask(window):
    for length in (1, 4, 7):
        for queries in range(1, length + 1):
            seen = [min(i, window or i) for i in range(length - queries + 1, length + 1)]
            assert attended_pairs(length, queries=queries, window=window) == sum(seen)


@pytest.mark.parametrize(
    ("name", "tune"), [("stage 1", STAGE1), ("lora", LORA), ("tower", TOWER), ("full", FULL)]
)
@pytest.mark.parametrize("text", ["llama", "gemma"])
def test_as_torch_counts_them(tmp_path, name, tune, text):
    if text == "gemma" and name == "full":
        tune = FULL.model_copy(update={"head": STAGE1.head})  # its head is tied
    model, facts = composed(tmp_path, text=text)
    apply_tuning(model, tune, seed=0)
    made = row(facts, with_image=(1, 1, 1))
    lengths = [len(ids) for ids in made.ids]
    num_images = 3
    image_tokens = facts.grid.num_tokens(28, 28) * num_images
    work = work_of(model, tune)
    ours = row_flops(
        work,
        RowLengths(
            samples=lengths,
            num_targets=sum(lengths),
            num_images=num_images,
            num_image_tokens=image_tokens,
        ),
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(**made.packed)
        model.logits(hidden[0]).sum().backward()
    # Torch's plain attention multiplies above the diagonal too: n^2 pairs for n (n + 1) / 2.
    pairs = sum(n * n - n * (n + 1) // 2 for n in lengths) * len(work.windows)
    expected = ours.total + 12 * work.attention_width * pairs
    assert counter.get_total_flops() == expected


def test_scales_are_so_many_squares(tmp_path):
    """S2 at one, two and three times the side: 1 + 4 + 9 passes over a square."""
    work = [
        work_of(composed(tmp_path, tower=tower)[0], TOWER).tower
        for tower in (None, {"s2": [28, 56, 84]})
    ]
    one, several = ([t.forward, t.first, t.inputs, t.attention] for t in work)
    assert several == [14 * flops for flops in one]


def test_a_tower_counted_without_weights_is_the_tower_run(tmp_path):
    model, _ = composed(tmp_path)
    work = work_of(model, STAGE1)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model.image_features(torch.randn(1, 3, 28, 28))
    connector = 2 * sum(work.connector) * 4  # 4 patches
    assert work.tower.forward == counter.get_total_flops() - connector
    assert work.tower.forward > 0
