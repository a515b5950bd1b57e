"""Images in tiles: composed models against transformers' LLaVA-NeXT, packed rows, what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import SIZE_PX, composed, encoder, parts
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from vistune.checkpoint.layouts.llava_hf import to_composed
from vistune.data.collate import pack_row
from vistune.data.encode import Encoder
from vistune.data.layout import load_layout
from vistune.errors import DataError, ModelError
from vistune.export.hf import write_hf
from vistune.generate import Prompt, generate
from vistune.models.anyres import grids_of, pinpoints_of, with_tiles
from vistune.models.build import build_model
from vistune.models.compose import ComposedVLM
from vistune.models.facts import ModelFacts, describe
from vistune.models.tune import apply_tuning
from vistune.recipe import ModelConfig, TilesConfig, TuneConfig
from vistune.types import EncodedSample, Sample, Turn

# fp32 sums in another order; relative to the largest value compared.
TOLERANCE = 2e-5
# height x width: wider and taller than any grid, enlarged, exact, square, thin.
SIZES = ((40, 90), (100, 35), (9, 12), (56, 56), (28, 28), (3, 80))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("parts")


def tiled_parts(shelf: Path, **kinds: Any) -> ModelConfig:
    values = parts(shelf, **kinds).model_dump()
    return ModelConfig.model_validate({**values, "tiles": {}})


def tiled(shelf: Path, **kinds: Any) -> tuple[ComposedVLM, ModelFacts, Encoder]:
    config = tiled_parts(shelf, **kinds)
    facts = describe(config)
    model = build_model(config, facts, seed=3, dtype=torch.float32)
    return model, facts, tiled_encoder(facts)


def tiled_encoder(facts: ModelFacts) -> Encoder:
    assert facts.layout is not None
    plain: Encoder = encoder(facts)
    return Encoder(
        tokenizer=plain.tokenizer,
        template=plain.template,
        image_plan=plain.image_plan,
        grid=plain.grid,
        image_token_id=plain.image_token_id,
        layout=load_layout(facts.layout),
    )


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    drawn = np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def sample_of(coder: Encoder, *sizes: tuple[int, int], text: str = "what?") -> EncodedSample:
    turns = (Turn("user", (*range(len(sizes)), text)), Turn("assistant", (f"it is {text}",)))
    images: Any = tuple(picture(size, seed) for seed, size in enumerate(sizes))
    sample = Sample(id=text, source="s", where="w", turns=turns, images=images)
    return coder.encode(sample, max_tokens=10**6, overlong="error")


def loss_of(model: Any, samples: list[EncodedSample]) -> Tensor:
    row = pack_row(samples)
    hidden = model.hidden_states(**row.model_inputs())
    logits = model.logits(hidden[0, row.target_index_M])
    return torch.nn.functional.cross_entropy(logits, row.target_ids_M, reduction="sum")


def gradients(model: Any, rows: list[list[EncodedSample]]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    losses = [loss_of(model, row) for row in rows]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(float(loss.detach()) for loss in losses), found


def assert_same(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys() and len(expected) > 30
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        # Key biases have gradient zero but for rounding, so a scale of their own means nothing.
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        assert float((found[name] - gradient).abs().max()) / scale < TOLERANCE, name


def test_packed_is_alone_in_loss_and_gradients(shelf: Path) -> None:
    model, _, coder = tiled(shelf)
    samples = [
        sample_of(coder, (40, 90), text="one"),
        sample_of(coder, text="no picture"),
        sample_of(coder, (100, 35), (28, 28), text="two pictures"),
    ]
    together, packed = gradients(model, [samples])
    apart, single = gradients(model, [[sample] for sample in samples])
    assert together == pytest.approx(apart, rel=2e-6)
    assert single["tiles.image_newline"].abs().max() > 0
    assert_same(single, packed)


def test_text_alone_touches_every_weight(shelf: Path) -> None:
    model, _, coder = tiled(shelf)
    _, found = gradients(model, [[sample_of(coder, text="no picture")]])
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not found["tiles.image_newline"].any()


def test_the_newline_trains_with_the_connector(shelf: Path) -> None:
    model, _, _ = tiled(shelf)
    assert model.module_map.role_of("tiles.image_newline") == "connector"
    tuning = apply_tuning(model, TuneConfig(), seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"tiles.image_newline"} | {n for n in trained if n.startswith("connector.")}
    assert any(row.module == "tiles" and row.num_trainable for row in tuning.table())


def test_another_seed_draws_another_newline(shelf: Path) -> None:
    config = tiled_parts(shelf)
    facts = describe(config)
    first, again, other = (
        build_model(config, facts, seed=seed, dtype=torch.float32).tiles for seed in (1, 1, 2)
    )
    assert first is not None and again is not None and other is not None
    assert torch.equal(first.image_newline, again.image_newline)
    assert not torch.equal(first.image_newline, other.image_newline)


@pytest.mark.parametrize("text", ["llama", "mistral", "gemma"])
def test_equals_transformers_llava_next(shelf: Path, tmp_path: Path, text: str) -> None:
    """Logits, loss and gradients of a row with two images, by their own forward pass."""
    model, _, coder = tiled(shelf, text=text)
    write_hf(model, coder, tmp_path)
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    sizes = ((40, 90), (100, 35))
    sample = sample_of(coder, *sizes)
    labels = np.where(sample.target_mask, sample.input_ids, -100)
    num_views = max(len(views) for views in sample.pixel_values)
    pixels = np.zeros((2, num_views, 3, SIZE_PX, SIZE_PX), dtype=np.float32)
    for place, views in zip(pixels, sample.pixel_values, strict=True):
        place[: len(views)] = views
    out = theirs(
        input_ids=torch.from_numpy(sample.input_ids)[None],
        pixel_values=torch.from_numpy(pixels),
        image_sizes=torch.tensor(sizes),
        labels=torch.from_numpy(labels)[None],
    )
    num_targets = int(sample.target_mask.sum())
    (out.loss * num_targets).backward()  # theirs is a mean
    row = pack_row([sample])
    ours = model.logits(model.hidden_states(**row.model_inputs())[0]).detach()
    expected = out.logits.detach()[0, :, : ours.shape[1]]
    assert float((ours - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    total, found = gradients(model, [[sample]])
    assert total / num_targets == pytest.approx(float(out.loss.detach()), rel=TOLERANCE)
    reference = {}
    for name, parameter in theirs.named_parameters():
        own = to_composed(name)
        # The export folds Gemma's scale of image embeddings into these.
        folded = own.startswith(("connector.2.", "tiles."))
        if parameter.grad is not None:
            scale = float(model.config.image_embed_scale) if folded else 1.0
            reference[own] = parameter.grad[: len(found[own])] * scale
    assert_same(reference, found)


def test_answers_in_a_batch_as_alone(shelf: Path) -> None:
    model, _, coder = tiled(shelf)
    prompts = [
        Prompt([Turn("user", (0, "what?"))], [picture((40, 90))]),
        Prompt([Turn("user", ("hi ", 0, " longer?", 1))], [picture((9, 12)), picture((100, 35))]),
        Prompt([Turn("user", ("no picture",))]),
    ]
    together = generate(model, coder, prompts, max_new_tokens=6)
    assert together == [generate(model, coder, [p], max_new_tokens=6)[0] for p in prompts]


def test_save_and_load_round_trip(shelf: Path, tmp_path: Path) -> None:
    model, _, coder = tiled(shelf)
    model.save_pretrained(tmp_path)
    again, info = ComposedVLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    sample = sample_of(coder, (40, 90))
    with torch.no_grad():
        assert torch.equal(loss_of(again.eval(), [sample]), loss_of(model, [sample]))


def test_fewer_tokens_leave_grids_out(shelf: Path) -> None:
    _, _, coder = tiled(shelf)
    layout: Any = coder.layout
    limited = layout.limited(20)
    assert limited.grids == ((1, 2), (2, 1), (1, 3))
    assert max(limited.num_tokens(*size) for size in SIZES) <= 20
    with pytest.raises(DataError, match="at least 14"):
        layout.limited(13)


def test_views_that_do_not_match_are_refused(shelf: Path) -> None:
    model, _, coder = tiled(shelf)
    row = pack_row([sample_of(coder, (40, 90))])
    inputs = {**row.model_inputs(), "image_shapes": ((2, 2, 0, 0),)}
    with pytest.raises(ModelError, match="views"):
        model.hidden_states(**inputs)


def test_what_cannot_be_cut_into_tiles(shelf: Path) -> None:
    tiles = TilesConfig()
    _, facts = composed(shelf, tower={"select": "cls_patch"})
    with pytest.raises(ModelError, match="class token"):
        with_tiles(facts, tiles, where="x")
    again = describe(tiled_parts(shelf))
    with pytest.raises(ModelError, match="form of their own"):
        with_tiles(again, tiles, where="x")
    with pytest.raises(ModelError, match="whole tiles"):
        grids_of([[336, 700]], 336, swapped=False, where="x")


def test_pinpoints_of_both_projects() -> None:
    pinpoints = [[336, 672], [1008, 336]]
    tiles = grids_of(pinpoints, 336, swapped=False, where="x")
    assert tiles.grids == ((1, 2), (3, 1))
    swapped = grids_of(pinpoints, 336, swapped=True, where="x")
    assert swapped.grids == ((2, 1), (1, 3))
    assert pinpoints_of(swapped.grids, 336, swapped=True) == pinpoints
