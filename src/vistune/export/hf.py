"""Writes transformers' LLaVA, or LLaVA-NeXT (1.6) where images are cut into tiles, with processor.

Only models whose function that class computes are written; for others the error names what does not
fit. Weights get the names the hub uses, which serving engines expect.

Transformers prepares images with torchvision where that is installed, whose resize gives slightly
other pixels than the model was trained on, and no file can ask for Pillow: load the processor with
`AutoProcessor.from_pretrained(folder, backend="pil")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistune.checkpoint.layouts.llava_hf import TOWER_TYPES, from_composed
from vistune.checkpoint.layouts.names import NEWLINE, VISION, model_state
from vistune.data.encode import Encoder
from vistune.data.layout import AnyresLayout
from vistune.errors import ModelError
from vistune.export.files import (
    image_processor_values,
    write_json,
    write_tokenizer,
    write_weights,
)
from vistune.export.jinja import chat_template
from vistune.export.tower import WholeTower
from vistune.models.anyres import pinpoints_of
from vistune.models.compose import ComposedVLM
from vistune.models.connectors import last_linear
from vistune.models.facts import IMAGE_TOKEN
from vistune.models.tune.lora import adapter_layers

_HEAD_EXTRAS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def misfits(model: ComposedVLM) -> list[str]:
    """Returns what keeps a model from being transformers' LLaVA; empty when nothing does."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config, plan = model.config, model.plan
    text = config.text_config
    head: Any = model.get_output_embeddings()
    found = []
    if plan.family not in TOWER_TYPES:
        found.append(f"a '{plan.family}' tower (it takes CLIP and SigLIP)")
    if plan.normalised:
        found.append(
            "features behind the tower's final norm (train with model.vision_tower.layer=-1 or -2)"
        )
    if plan.scales:
        found.append(f"a tower that sees images at {len(plan.scales)} scales")
    if config.connector_kind != "mlp2x_gelu" or config.pixel_shuffle != 1:
        found.append(
            f"a connector {config.connector_kind} with pixel_shuffle {config.pixel_shuffle} (it"
            " takes mlp2x_gelu without)"
        )
    if type(text) not in MODEL_MAPPING or model.language_model.base_model_prefix != "model":
        found.append(f"a language model of type '{text.model_type}'")
    scaled = [name for name in _HEAD_EXTRAS if getattr(text, name, None) not in (None, 1, 1.0)]
    if scaled or getattr(head, "bias", None) is not None:
        found.append(f"a head with {', '.join(scaled) or 'a bias'}, which it would leave out")
    if adapter_layers(model):
        found.append("adapters that are not merged")
    return found


def write_hf(
    model: ComposedVLM, encoder: Encoder, folder: Path, *, tower: WholeTower | None = None
) -> None:
    """Writes a model as a transformers LLaVA directory.

    Args:
        model: Adapters merged.
        encoder: Its encoder.
        folder: An empty directory.
        tower: The whole vision encoder; what the model uses of it alone is written when None.

    Raises:
        ModelError: The model is not one that class can compute.
        TemplateError: The chat template has no jinja form.
    """
    wrong = misfits(model)
    if wrong:
        raise ModelError(
            "this model is not one that transformers' LLaVA can compute",
            got="; ".join(wrong),
            fix="export with --to vistune",
        )
    state = {from_composed(name): tensor for name, tensor in model_state(model).items()}
    num_rows = _widen(state, model)
    _scale_connector(state, model)
    if tower is None:
        _add_unused_norm(state, model)
    else:
        dtype = next(model.vision_tower.parameters()).dtype
        state |= {from_composed(f"{VISION}{n}"): t.to(dtype) for n, t in tower.rest.items()}
    write_weights(folder, state)
    _write_configs(model, encoder, folder, num_rows=num_rows, tower=tower)
    _write_processor(model, encoder, folder)


def _widen(state: dict[str, Tensor], model: ComposedVLM) -> int:
    """Adds zero rows for an image token outside the vocabulary; returns the rows there are."""
    embeddings: Any = model.get_input_embeddings()
    num_rows = int(embeddings.weight.shape[0])
    extra = model.image_token_id + 1 - num_rows
    if extra <= 0:
        return num_rows
    names = {id(embeddings.weight), id(model.get_output_embeddings().weight)}
    for name, tensor in model_state(model).items():
        parameter = dict(model.named_parameters()).get(name)
        if parameter is not None and id(parameter) in names:
            rows = tensor.new_zeros(extra, tensor.shape[1])
            state[from_composed(name)] = torch.cat((tensor, rows))
    return num_rows + extra


def _scale_connector(state: dict[str, Tensor], model: ComposedVLM) -> None:
    """Moves a factor on image embeddings into the last layer, whose output they are."""
    scale = model.config.image_embed_scale
    layer = last_linear(model.connector)
    if scale == 1.0 or layer is None:
        return
    newline = from_composed(NEWLINE)
    if newline in state:
        state[newline] = (state[newline].float() * scale).to(state[newline].dtype)
    for name in ("weight", "bias"):
        key = f"multi_modal_projector.linear_2.{name}"
        state[key] = (state[key].float() * scale).to(state[key].dtype)


def _add_unused_norm(state: dict[str, Tensor], model: ComposedVLM) -> None:
    """Adds the norm that features do not pass but that the class has a place for."""
    prefix = f"vision_tower.vision_model.{model.plan.traits.final_norm}"
    width = int(model.config.vision_config.hidden_size)
    like = next(iter(state.values()))
    state[f"{prefix}.weight"] = torch.ones(width, dtype=like.dtype)
    state[f"{prefix}.bias"] = torch.zeros(width, dtype=like.dtype)


def _write_configs(
    model: ComposedVLM,
    encoder: Encoder,
    folder: Path,
    *,
    num_rows: int,
    tower: WholeTower | None,
) -> None:
    from transformers import GenerationConfig, LlavaConfig, LlavaNextConfig

    config = model.config
    text = config.text_config.to_dict()
    known_rows = int(text["vocab_size"])
    text["vocab_size"] = num_rows
    layout, kind = encoder.layout, LlavaConfig
    own: dict[str, Any] = {}
    if isinstance(layout, AnyresLayout):
        pinpoints = pinpoints_of(layout.grids, layout.plan.size_px, swapped=False)
        kind, own = LlavaNextConfig, {"image_grid_pinpoints": pinpoints}
    side = encoder.image_plan.size_px
    llava = kind(
        vision_config=(config.vision_config if tower is None else tower.config).to_dict(),
        text_config=text,
        image_token_index=model.image_token_id,
        image_seq_length=model.grid.num_tokens(side, side),
        projector_hidden_act="gelu",
        vision_feature_layer=-1 if tower is None else tower.layer(model),
        vision_feature_select_strategy=_strategy(model),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        architectures=[_class_name(model)],
        dtype=next(model.parameters()).dtype,
        **own,
    )
    llava.save_pretrained(folder)
    # Rows without a meaning must never be answered with: they would win over negative logits.
    never = sorted({model.image_token_id, *range(known_rows, num_rows)})
    GenerationConfig(
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=list(encoder.stop_token_ids) or None,
        pad_token_id=encoder.tokenizer.pad_token_id,
        suppress_tokens=never,
    ).save_pretrained(folder)


def _class_name(model: ComposedVLM) -> str:
    return f"Llava{'' if model.tiles is None else 'Next'}ForConditionalGeneration"


def _strategy(model: ComposedVLM) -> str:
    drops_class = model.plan.traits.class_token and model.plan.select == "patch"
    return "default" if drops_class else "full"


def _write_processor(model: ComposedVLM, encoder: Encoder, folder: Path) -> None:
    write_tokenizer(folder, encoder)
    (folder / "chat_template.jinja").write_text(chat_template(encoder), encoding="utf-8")
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": f"Llava{'' if model.tiles is None else 'Next'}Processor",
            "image_processor": image_processor_values(encoder),
            "image_token": IMAGE_TOKEN,
            "patch_size": model.grid.patch_px,
            "vision_feature_select_strategy": _strategy(model),
            # The processor subtracts the class token again when the strategy drops it.
            "num_additional_image_tokens": int(model.plan.traits.class_token),
        },
    )


@torch.no_grad()
def compare_hf(model: ComposedVLM, encoder: Encoder, folder: Path) -> float:
    """Loads what was written with transformers and compares its logits.

    Args:
        model: The model that was written.
        encoder: Its encoder.
        folder: The directory.

    Returns:
        The largest difference of the logits on one prompt with an image, relative to the largest
        logit.
    """
    import transformers
    from PIL import Image

    from vistune.models.weights import quiet_transformers
    from vistune.types import Turn

    size = encoder.image_plan.size_px
    picture = Image.linear_gradient("L").resize((size, 2 * size)).convert("RGB")
    sample = encoder.encode_prompt([Turn("user", (0, "What is this?"))], [picture])
    pixels = torch.from_numpy(sample.pixel_values[0])
    inputs = {
        "input_ids": torch.from_numpy(sample.input_ids)[None],
        "pixel_values": pixels if sample.image_shapes else pixels[None],
    }
    told: dict[str, Any] = {"image_shapes": sample.image_shapes} if sample.image_shapes else {}
    dtype = next(model.parameters()).dtype
    with quiet_transformers():
        kind = getattr(transformers, _class_name(model))
        theirs = kind.from_pretrained(folder, dtype=dtype).eval()
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in inputs.items()}
    ours = model(**given, **told).logits.cpu().float()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    if told:  # all views of one image
        inputs["pixel_values"] = inputs["pixel_values"][None]
        inputs["image_sizes"] = torch.tensor([[picture.height, picture.width]])
    found = theirs(**inputs).logits.float()
    return float((found[..., : ours.shape[-1]] - ours).abs().max() / ours.abs().max())
