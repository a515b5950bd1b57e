"""Training a tiny MGM: packed rows, roles, recomputation, a falling loss, generation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn_images
from mgm_case import RUNS, expanded, load_arrays, load_model, pack
from torch import Tensor

from vistune.models.mgm import MGMForConditionalGeneration
from vistune.models.mgm.convnext import ConvNeXtStages
from vistune.models.recompute import set_checkpoint_layers

# Sums of float32 numbers in another order; the values are of order 1.
CLOSE = 1e-5
ANSWER_TOKENS = 3


def sample(answer: list[int], *, num_image_tokens: int) -> Tensor:
    assert len(answer) == ANSWER_TOKENS
    return torch.tensor([2, *[256] * num_image_tokens, 20, 21, *answer])


def answer_loss(
    model: MGMForConditionalGeneration, samples: list[Tensor], pixels: Tensor | None
) -> Tensor:
    """Summed cross-entropy of the last tokens of each sample of a packed row."""
    row = pack(samples)
    hidden = model.hidden_states(**row, pixel_values_NCYX=pixels)
    ids = row["input_ids_BT"][0]
    at = torch.cat([torch.arange(end - ANSWER_TOKENS, end) for end in row["cu_seqlens"][1:]])
    return F.cross_entropy(model.logits(hidden[0, at - 1]).float(), ids[at], reduction="sum")


def gradients(model: MGMForConditionalGeneration) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(float(gradient.abs().max()), 1.0)
        assert float((ours[name] - gradient).abs().max()) < CLOSE * scale, name


@pytest.mark.parametrize("run", RUNS)
def test_packed_equals_a_padded_batch(run: str) -> None:
    model, arrays = load_model(run), load_arrays(run)
    rows = expanded(model, arrays)
    samples = [ids[mask.bool()] for ids, mask in zip(rows.ids, rows.mask, strict=True)]
    with torch.no_grad():
        hidden = model.hidden_states(**pack(samples), pixel_values_NCYX=rows.pixels)
        logits = model.logits(hidden[0])
        expected = arrays["logits"][rows.mask.bool()]
    assert float((logits - expected).abs().max()) < CLOSE * float(expected.abs().max())


def test_packed_equals_one_by_one() -> None:
    model, pixels = load_model("grid1"), load_arrays("grid1")["images_aux"][:2]
    samples = [
        sample([30, 31, 32], num_image_tokens=16),
        sample([33, 34, 35], num_image_tokens=0),
        sample([36, 37, 38], num_image_tokens=16),
    ]
    packed = answer_loss(model, samples, pixels)
    packed.backward()
    together = gradients(model)
    model.zero_grad()
    images = [pixels[:1], None, pixels[1:]]
    losses = [answer_loss(model, [s], p) for s, p in zip(samples, images, strict=True)]
    torch.stack(losses).sum().backward()
    assert packed.item() == pytest.approx(sum(loss.item() for loss in losses), rel=CLOSE)
    assert_close(together, gradients(model))


def test_roles_cover_every_parameter_and_the_head_is_tied() -> None:
    model = load_model("grid1")
    roles = {model.module_map.role_of(name) for name, _ in model.named_parameters()}
    assert roles == {"vision", "connector", "language"}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_text_row_touches_every_trained_weight() -> None:
    model = load_model("grid2_global")
    answer_loss(model, [sample([30, 31, 32], num_image_tokens=0)], None).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    expected = {n for n, _ in model.named_parameters()} - model.never_trained
    assert reached == expected
    assert {n.split(".")[1] for n in model.never_trained} == {"encoder", "post_layernorm"}
    connector = [p.grad for p in model.connector.parameters()]
    assert all(g is not None and not g.any() for g in connector)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model, pixels = load_model("grid1").train(), load_arrays("grid1")["images_aux"][:1]
    samples = [sample([30, 31, 32], num_image_tokens=16)]
    answer_loss(model, samples, pixels).backward()
    plain = gradients(model)
    model.zero_grad()
    set_checkpoint_layers(model, 2)  # type: ignore[arg-type]
    answer_loss(model, samples, pixels).backward()
    assert_close(gradients(model), plain)


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_falls_on_drawn_images(stage: int) -> None:
    model = load_model("grid1").train()
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    if stage == 2:
        model.language_model.requires_grad_(True)
    pixels, colours = drawn_images(8, side_px=64, seed=1)
    samples = [sample([40 + c, 50 + c, 1], num_image_tokens=16) for c in colours]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = answer_loss(model, samples, pixels) / (ANSWER_TOKENS * len(samples))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Stage 1 bends only the images towards a random language model; stage 2 trains that too.
    assert losses[-1] < (0.9 if stage == 1 else 0.25) * losses[0]


def test_generation_with_and_without_a_cache_in_batches_and_alone() -> None:
    model, pixels = load_model("grid1"), load_arrays("grid1")["images_aux"][:2]
    prompts = [torch.tensor([2, *[256] * 16, *text]) for text in ([20, 21, 22], [23])]
    width = len(prompts[0])
    padded = torch.stack([F.pad(ids, (width - len(ids), 0)) for ids in prompts])
    mask = torch.stack([F.pad(torch.ones_like(ids), (width - len(ids), 0)) for ids in prompts])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(ids[None], pixel_values=pixels[i : i + 1], **options)[0, len(ids) :]
        for i, ids in enumerate(prompts)
    ]
    for use_cache in (True, False):
        out = model.generate(
            padded, pixel_values=pixels, attention_mask=mask, use_cache=use_cache, **options
        )
        for row, expected in zip(out[:, width:], alone, strict=True):
            assert row[: len(expected)].tolist() == expected.tolist()


def test_stochastic_depth_is_off_unless_asked_for() -> None:
    maps = torch.randn(2, 3, 64, 64)
    still = ConvNeXtStages([16, 32], [1, 2]).train()
    assert all(map(torch.equal, still(maps), still(maps)))
    moving = ConvNeXtStages([16, 32], [1, 2], drop_path_rate=0.1)
    rates = [block.drop_path_rate for stage in moving.vision_stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])
    model = load_model("grid1", aux_drop_path_rate=0.1)
    rates = [
        block.drop_path_rate
        for stage in model.vision_tower_aux.vision_stages
        for block in stage.blocks
    ]
    # MGM's own rates: 0 at the first block, then as listed in the fixture's settings.
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert all(map(torch.equal, moving.eval()(maps), moving(maps)))
