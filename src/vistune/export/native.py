"""Writes one of transformers' own vision-language models as transformers itself does.

Weights get the names of the hub; config, generation config, tokenizer, chat template and the files
of the processors lie beside them. It changes no model: what is written loads with
`AutoModelForImageTextToText`.

Transformers prepares images with torchvision where that is installed, whose resize gives slightly
other pixels than the model was trained on, and no file can ask for Pillow: load the processor with
`AutoProcessor.from_pretrained(folder, backend="pil")`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from vistune.data.encode import Encoder
from vistune.errors import ModelError
from vistune.export.files import MAX_SHARD, write_json
from vistune.export.jinja import chat_template
from vistune.models.facts import read_json
from vistune.models.native import NativeVLM, is_native
from vistune.models.tune.lora import adapter_layers
from vistune.models.weights import quiet_transformers

_FORMS = ("hf", "adapter", "vistune")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_COPIED = ("video_preprocessor_config.json",)
_IMAGE_FILE = "preprocessor_config.json"
_PROCESSOR_FILE = "processor_config.json"


def is_native_directory(folder: Path) -> bool:
    """Whether a directory holds one of transformers' own models."""
    file = folder / "config.json"
    return file.is_file() and is_native(read_json(file))


def check_native_form(to: str) -> None:
    """Refuses a form that transformers' own models do not have.

    Args:
        to: The form.

    Raises:
        ModelError: There is no such form of them.
    """
    if to not in _FORMS:
        raise ModelError(
            "one of transformers' own models cannot be written in this form",
            where=f"--to {to}",
            expected=", ".join(_FORMS),
            fix="export with --to hf, which is the layout it was published in",
        )


def write_native(model: NativeVLM, encoder: Encoder, folder: Path, *, origin: Path | None) -> None:
    """Writes a model as a transformers directory.

    Args:
        model: Adapters merged.
        encoder: Its encoder.
        folder: An empty directory.
        origin: The directory the model came from, whose processor files are taken along.

    Raises:
        ModelError: The model still carries adapters.
        TemplateError: The chat template has no jinja form.
    """
    if adapter_layers(model):
        raise ModelError("the model still carries adapters", fix="merge them first")
    inner: Any = model.inner
    _drop_unused(inner.generation_config)
    with quiet_transformers():
        inner.save_pretrained(folder, max_shard_size=MAX_SHARD)
    write_processor(model, encoder, folder, origin=origin)


def _drop_unused(generation: Any) -> None:
    """Drops settings of sampling from a config that does not sample: some releases refuse them."""
    if not generation.do_sample:
        for name in _SAMPLING:
            setattr(generation, name, None)


def write_processor(
    model: NativeVLM, encoder: Encoder, folder: Path, *, origin: Path | None
) -> None:
    """Writes tokenizer, chat template and the files of the processors.

    Args:
        model: The model.
        encoder: Its encoder, whose bounds on images and template are written.
        folder: A directory.
        origin: The directory the model came from.
    """
    assert encoder.layout is not None
    encoder.tokenizer.save_pretrained(folder)
    if not encoder.template.both_ways:  # PaliGemma has none: its processor writes the prompt
        template = chat_template(encoder, image_text=model.family.image_marks[0])
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / _IMAGE_FILE, encoder.layout.processor)
    if origin is None:
        return
    for name in _COPIED:
        if (origin / name).is_file():
            shutil.copy(origin / name, folder / name)
    if (origin / _PROCESSOR_FILE).is_file():
        values = read_json(origin / _PROCESSOR_FILE)
        values.pop("chat_template", None)
        if "image_processor" in values:  # newer files hold it inside, and it goes before the other
            values["image_processor"] = encoder.layout.processor
        write_json(folder / _PROCESSOR_FILE, values)


@torch.no_grad()
def compare_native(model: NativeVLM, encoder: Encoder, folder: Path) -> float:
    """Loads what was written with transformers and compares its logits.

    Args:
        model: The model that was written.
        encoder: Its encoder.
        folder: The directory.

    Returns:
        The largest difference of the logits on one prompt with an image, relative to the largest
        logit.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from vistune.types import Turn

    picture = Image.linear_gradient("L").resize((112, 84)).convert("RGB")
    sample = encoder.encode_prompt([Turn("user", (0, "What is this?"))], [picture])
    ids = torch.from_numpy(sample.input_ids)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **model.generation_inputs(
            input_ids_BT=ids,
            pixel_values=torch.from_numpy(sample.pixel_values[0]),
            image_shapes=sample.image_shapes,
        ),
    }
    dtype = next(model.parameters()).dtype
    with quiet_transformers():
        # Its SDPA leaves out the cap on scores that some models have (5.17).
        theirs = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
    device = next(model.parameters()).device
    here = {name: value.to(device) for name, value in inputs.items()}
    ours = model(**here).logits.cpu().float()
    found = theirs(**inputs).logits.float()
    return float((found - ours).abs().max() / ours.abs().max())
