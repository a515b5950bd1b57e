"""MGM against the reference dump: every array of every run, and the public sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mgm_case import (
    REL,
    RUNS,
    expanded,
    load_arrays,
    load_config,
    load_model,
    public_tensors,
    relative_error,
    settings,
)

from vistune.errors import ModelError
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.keys import mgm_map, open_clip_map
from vistune.models.mgm.mining import windows


@pytest.mark.parametrize("run", RUNS)
def test_towers_and_mining_equal_the_reference(run: str) -> None:
    model, arrays = load_model(run), load_arrays(run)
    pixels, num_crops = arrays["images_aux"], model.config.num_crops
    crops, whole = model.low_resolution(pixels)
    pictures = crops if whole is None else torch.cat((crops, whole[:, None]), dim=1)
    # Only resampling: equal but for the last bit.
    assert torch.allclose(pictures.reshape(arrays["images"].shape), arrays["images"], atol=3e-7)
    stages = model.vision_tower_aux(pixels)
    for stage, maps in enumerate(stages):
        assert relative_error(maps[0], arrays[f"aux_stage_{stage}_row0"]) < REL
    joined = model.high_features(pixels)
    if "aux_map_row0" in arrays:
        assert relative_error(joined[0], arrays["aux_map_row0"]) < REL
    assert relative_error(joined.mean((2, 3)), arrays["aux_map_mean_per_channel"]) < REL
    assert relative_error(joined.mean(1), arrays["aux_map_mean_per_position"]) < REL
    low, maps, whole_maps = model.paired_features(pixels)
    features = low[:, -num_crops:].flatten(0, 1)
    mined = model.connector.mining(features, maps)
    assert relative_error(mined, arrays["mined"]) < REL
    asked, found = low, mined.reshape(low.shape[0], -1, *mined.shape[1:])
    if whole_maps is not None:
        strided = whole_maps[0, :, ::4, ::4]
        assert relative_error(strided, arrays["aux_global_map_row0_strided"]) < REL
        mined_global = model.connector.mining(low[:, 0], whole_maps)
        assert relative_error(mined_global, arrays["mined_global"]) < REL
        # The reference lists all crops of all rows, then all whole pictures.
        features = torch.cat((features, low[:, 0]))
        found = torch.cat((mined_global[:, None], found), dim=1)
    assert relative_error(features, arrays["lr_features"]) < REL
    assert relative_error((asked + found).flatten(1, 2), arrays["projector_input"]) < REL
    assert relative_error(model.image_embeddings(pixels), arrays["projected"]) < REL


@pytest.mark.parametrize("run", RUNS)
def test_language_model_and_gradients_equal_the_reference(run: str) -> None:
    model, arrays = load_model(run), load_arrays(run)
    rows = expanded(model, arrays)
    assert torch.equal(rows.mask, arrays["spliced_attention_mask"])
    real = rows.mask.bool()
    embeds = model.embed(rows.ids, rows.pixels)
    assert relative_error(embeds[real], arrays["scaled_embeds"][real]) < REL
    assert relative_error(embeds[real] / 8.0, arrays["inputs_embeds"][real]) < REL
    out = model(
        rows.ids, pixel_values=rows.pixels, attention_mask=rows.mask, output_hidden_states=True
    )
    assert relative_error(out.hidden_states[-1][real], arrays["hidden_last"][real]) < REL
    assert relative_error(out.logits[real], arrays["logits"][real]) < REL
    loss = F.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), arrays["spliced_labels"][:, 1:].flatten()
    )
    assert relative_error(loss, arrays["loss"]) < REL
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    own = {entry.public: entry.own[0] for entry in mgm_map(model.config).entries}
    names = [name for name in arrays if name.startswith("grad.")]
    assert len(names) >= 9
    for name in names:
        gradient = gradients[own[name.removeprefix("grad.")]]
        assert gradient is not None
        assert relative_error(gradient, arrays[name]) < REL, name


def test_the_exact_gelu_of_older_transformers_equals_the_reference() -> None:
    model, arrays = load_model("grid1", gemma_erf_gelu=True), load_arrays("grid1")
    rows = expanded(model, arrays)
    with torch.no_grad():
        out = model(rows.ids, pixel_values=rows.pixels, attention_mask=rows.mask)
    real = rows.mask[0].bool()
    expected = arrays["logits_row0_act_gelu_erf"]
    assert relative_error(out.logits[0][real], expected[real]) < REL
    loss = F.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), arrays["spliced_labels"][:, 1:].flatten()
    )
    assert relative_error(loss, arrays["loss_act_gelu_erf"]) < REL
    # The two forms differ by 7e-4, which the tolerance above would notice.
    assert relative_error(out.logits[0][real], arrays["logits"][0][real]) > 2 * REL


def test_public_names_both_ways_are_bit_equal() -> None:
    model, public = load_model("grid1"), public_tensors()
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("lm_head.weight")}
    back = mgm_map(model.config).to_public(own, where="test")
    assert back.keys() == public.keys()
    assert all(torch.equal(back[name], public[name]) for name in public)
    counted = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    mgm_map(model.config).from_public({**public, counted: torch.arange(17)}, where="test")


def test_open_clip_names_cover_the_tower() -> None:
    model = load_model("grid1")
    own = {name for entry in open_clip_map(model.config).entries for name in entry.own}
    assert own == {f"vision_tower_aux.{name}" for name in model.vision_tower_aux.state_dict()}


def test_public_sizes() -> None:
    config = MGMConfig()
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # Stage 1 trains the connector: mining and projector.
    assert count(model.connector) == 13_259_008
    assert count(model.connector.projector) == 6_295_552
    assert count(model.connector.mining) == 1_051_648 + 2 * 2_955_904
    # Gemma-2B with its head tied, and CLIP-L/14 at 336 pixels.
    assert count(model.language_model) == 2_506_172_416
    assert count(model.vision_tower) == 303_507_456
    assert sum(config.aux_widths or ()) == 2880
    assert model.grid.num_tokens(768, 768) == 576
    hd = MGMConfig(image_size_aux=1536, image_grid=2, image_global=True)
    with torch.device("meta"):
        assert MGMForConditionalGeneration(hd).grid.num_tokens(1536, 1536) == 2880
        hd.image_global = False
        assert MGMForConditionalGeneration(hd).grid.num_tokens(1536, 1536) == 2304


def test_settings_come_back(tmp_path: Any) -> None:
    config = load_config("grid2_global")
    config.save_pretrained(tmp_path)
    loaded = MGMConfig.from_pretrained(tmp_path)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert (loaded.aux_widths, loaded.aux_depths) == ([16, 32, 64, 128], [1, 1, 2, 1])
    assert (loaded.image_grid, loaded.image_global, loaded.image_size_aux) == (2, True, 128)
    shapes = {name: tuple(tensor.shape) for name, tensor in public_tensors().items()}
    again = MGMConfig.from_public(config.to_public(), shapes, where="test")
    assert again.to_dict() == config.to_dict()


def test_sizes_that_the_config_lacks_are_read_off_the_tensors() -> None:
    everything = settings("grid1")
    flat = {**everything["text"], "rope_theta": 50_000.0, "hidden_act": "gelu"}
    flat |= {"mm_projector_type": "mlp2x_gelu", "image_size_aux": 64}
    flat |= {"mm_vision_tower": "openai/clip", "mm_vision_tower_aux": "openclip"}
    shapes = {name: tuple(tensor.shape) for name, tensor in public_tensors().items()}
    config = MGMConfig.from_public(flat, shapes, where="config.json")
    vision = config.vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (32, 64, 3)
    assert (vision.image_size, vision.patch_size, vision.hidden_act) == (56, 14, "quick_gelu")
    assert config.text_config.rope_parameters["rope_theta"] == 50_000.0
    assert config.text_config.hidden_act == "gelu_pytorch_tanh"
    with pytest.raises(ModelError, match="high-resolution tower"):
        MGMConfig.from_public(flat, {k: v for k, v in shapes.items() if "_aux" not in k}, where="f")
    with pytest.raises(ModelError, match="whole MGM"):
        MGMConfig.from_public(flat, {k: v for k, v in shapes.items() if "_aux" in k}, where="f")


def test_windows_are_cut_in_reading_order() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    maps = (10 * rows + columns)[None, None]
    found = windows(maps, num_patches=4)[0, :, :, 0].tolist()
    assert found == [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]


def test_wrong_input_is_refused() -> None:
    model, arrays = load_model("grid1"), load_arrays("grid1")
    rows = expanded(model, arrays)
    with pytest.raises(ModelError, match="one size"):
        model(rows.ids, pixel_values=rows.pixels[..., :32])
    with pytest.raises(ModelError, match="do not match"):
        model(rows.ids, pixel_values=rows.pixels[:1])
    with pytest.raises(ModelError, match="labels"):
        model(rows.ids, pixel_values=rows.pixels, labels=rows.ids)
    with pytest.raises(ModelError, match="one window per patch"):
        MGMForConditionalGeneration(MGMConfig(image_size_aux=800))
