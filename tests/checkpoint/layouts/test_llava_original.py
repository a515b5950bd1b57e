"""The original LLaVA's numbers, from weights under its own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import PREPROCESSOR, row, tokenizer
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from vistune.checkpoint.layouts import describe_directory, llava_original, load_directory
from vistune.checkpoint.layouts.names import fill_model
from vistune.errors import ModelError, WeightsError
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.towers.families import plan_tower

FIXTURE = Path(__file__).parents[2] / "fixtures" / "parity" / "llava15"
PLACEHOLDER, IGNORED = -200, -100
IMAGE = 320  # one past the embedding table, where it must never be looked up
# The reference itself differs by 2e-6 between fp32 and fp64, on values of order 4.
TOLERANCE = 2e-5


def close(found: Tensor, expected: np.ndarray[Any, Any]) -> None:
    reference = torch.from_numpy(expected)
    scale = float(reference.abs().max())
    assert float((found - reference).abs().max()) <= TOLERANCE * scale


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(FIXTURE / "io.npz") as file:
        return {name: file[name] for name in file}


@pytest.fixture
def model() -> ComposedVLM:
    config = json.loads((FIXTURE / "config.json").read_text())
    tower = config["vision_tower"]
    known = {k: v for k, v in tower.items() if not k.startswith(("mm_", "kind"))}
    plan, vision_config = plan_tower(
        CLIPVisionConfig(**known),
        layer=tower["mm_vision_select_layer"],
        select=tower["mm_vision_select_feature"],
        where="fixture",
    )
    composed = ComposedConfig.compose(
        vision_config=vision_config,
        text_config=LlamaConfig(**config["text"]),
        tower=plan,
        connector_kind=config["mm_projector_type"],
        pixel_shuffle=1,
        image_token_id=IMAGE,
        image_embed_scale=1.0,
    )
    return fill_model(
        composed,
        load_file(FIXTURE / "model.safetensors"),
        llava_original.to_composed,
        llava_original.from_composed,
        dtype=torch.float32,
        where="fixture",
    )


def packed(
    values: dict[str, np.ndarray[Any, Any]], case: str, num_patches: int = 16
) -> tuple[dict[str, Any], Tensor, list[int]]:
    """The case's rows end to end: model inputs, spliced labels, length of each row."""
    ids, labels, images = [], [], []
    slots = list(values.get(f"{case}.image_slots", []))
    rows = zip(values[f"{case}.input_ids"], values[f"{case}.labels"], strict=True)
    masks = values.get(f"{case}.attention_mask", np.ones_like(values[f"{case}.input_ids"]))
    for (row_ids, row_labels), mask in zip(rows, masks, strict=True):
        row_ids, row_labels = row_ids[mask == 1], row_labels[mask == 1]
        is_image = row_ids == PLACEHOLDER
        times = np.where(is_image, num_patches, 1)
        ids.append(np.repeat(np.where(is_image, IMAGE, row_ids), times))
        labels.append(np.repeat(np.where(is_image, IGNORED, row_labels), times))
        # A row without an image still owns a slot there, and none here.
        taken = [slots.pop(0) for _ in range(max(1, int(is_image.sum()))) if slots]
        images += taken if is_image.any() else []
    lengths = [len(i) for i in ids]
    inputs = {
        "input_ids_BT": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids_BT": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "pixel_values_NCYX": torch.from_numpy(values["images_pad"][images]) if images else None,
    }
    return inputs, torch.from_numpy(np.concatenate(labels)), lengths


def loss_of(model: ComposedVLM, hidden: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    """Mean cross entropy over labels, each row shifted on its own."""
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    labels = labels.clone()
    labels[starts] = IGNORED
    index = (labels != IGNORED).nonzero()[:, 0]
    return torch.nn.functional.cross_entropy(model.logits(hidden[0, index - 1]), labels[index])


def test_tower_and_projector(model: ComposedVLM, values: dict[str, Any]) -> None:
    close(
        model.image_features(torch.from_numpy(values["images_pad"])).detach(), values["projected"]
    )


@pytest.mark.parametrize("case", ["main", "two_images_in_a_row"])
def test_hidden_logits_loss_and_gradients(
    model: ComposedVLM, values: dict[str, Any], case: str
) -> None:
    model.train()
    inputs, labels, lengths = packed(values, case)
    hidden = model.hidden_states(**inputs)
    loss = loss_of(model, hidden, labels, lengths)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(values[f"{case}.loss"]), rel=TOLERANCE)
    for found, name in ((hidden[0], "hidden_last"), (model.logits(hidden[0]), "logits")):
        expected = values[f"{case}.{name}"]
        for part, reference, length in zip(
            found.detach().split(lengths), expected, lengths, strict=True
        ):
            close(part, reference[:length])
    parameters = dict(model.named_parameters())
    checked = 0
    for key in values:
        if key.startswith(f"{case}.grad."):
            name = llava_original.to_composed(key.removeprefix(f"{case}.grad."))
            gradient = parameters[name].grad
            assert gradient is not None
            close(gradient, values[key])
            checked += 1
    assert checked >= 4


def test_text_only_batch_has_zero_projector_gradients(
    model: ComposedVLM, values: dict[str, Any]
) -> None:
    model.train()
    inputs, labels, lengths = packed(values, "text_only_batch")
    loss = loss_of(model, model.hidden_states(**inputs), labels, lengths)
    loss.backward()
    expected = float(values["text_only_batch.loss"])
    assert float(loss.detach()) == pytest.approx(expected, rel=TOLERANCE)
    for parameter in model.connector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_names_go_both_ways(model: ComposedVLM) -> None:
    original = load_file(FIXTURE / "model.safetensors")
    written = llava_original.public_state(model)
    assert all(torch.equal(original[name], tensor) for name, tensor in written.items())
    # What is not written lies behind the layer taken.
    assert {
        n.split("vision_model.")[1].split(".")[0] for n in original.keys() - written.keys()
    } == {
        "encoder",
        "post_layernorm",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released checkpoint: no tower inside, its encoder beside it."""
    config = json.loads((FIXTURE / "config.json").read_text())
    tower = config["vision_tower"]
    encoder = tmp_path / "encoder"
    vision = CLIPVisionConfig(**{k: v for k, v in tower.items() if not k.startswith(("mm_", "ki"))})
    CLIPVisionModel(vision).save_pretrained(encoder)
    sized = PREPROCESSOR | {"crop_size": 56, "size": 56}
    (encoder / "preprocessor_config.json").write_text(json.dumps(sized))
    made = tmp_path / "released"
    made.mkdir()
    weights = load_file(FIXTURE / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if "vision_tower" not in n}, made / "model.safetensors"
    )
    values = config["text"] | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": str(encoder),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
    }
    (made / "config.json").write_text(json.dumps(values))
    tokenizer().save_pretrained(made)
    return made


def test_released_checkpoint_takes_its_tower_from_the_encoder(folder: Path) -> None:
    facts = describe_directory(folder)
    assert facts.image_defaults.size_px == 56
    model = load_directory(folder, facts, dtype=torch.float32)
    encoder = CLIPVisionModel.from_pretrained(folder.parent / "encoder")
    for name, parameter in model.vision_tower.named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name)), name
    made = row(facts, num_text=(4,), with_image=(False,))
    assert model.hidden_states(**made.packed).shape == (1, 4, 64)


def test_own_tower_is_not_thrown_away(folder: Path) -> None:
    weights = load_file(FIXTURE / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    model = load_directory(folder, describe_directory(folder), dtype=torch.float32)
    name = "embeddings.class_embedding"
    theirs = weights[f"model.vision_tower.vision_tower.vision_model.{name}"]
    assert torch.equal(model.vision_tower.get_parameter(name), theirs)


def test_left_over_and_missing_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    facts = describe_directory(folder)
    weights["model.image_newline"] = torch.zeros(64)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_directory(folder, facts, dtype=torch.float32)
    assert "image_newline" in str(caught.value) and "up_proj" in str(caught.value)


def test_forms_that_do_not_compose(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"mm_patch_merge_type": "spatial"}))
    with pytest.raises(ModelError, match="mm_patch_merge_type=spatial"):
        describe_directory(folder)
    (folder / "config.json").write_text(json.dumps(values | {"mm_vision_tower": "/not/there"}))
    with pytest.raises(ModelError, match="no such directory"):
        describe_directory(folder)
