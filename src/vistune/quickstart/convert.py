"""Turns fetched weight files into ordinary model directories that transformers reads.

It knows three sources: an int8 ONNX export of a Llama-type language model, a GGUF file of one, and
a PyTorch state dict of EfficientNet-Lite0. It is no general converter: each function accepts the
one layout it was written for and says what it found otherwise. Every function writes into a fresh
directory; making that atomic is the business of `assets`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vistune.errors import MissingExtraError, WeightsError
from vistune.models.towers.efficientnet_lite import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    import_weights,
)

if TYPE_CHECKING:
    import onnx

_PROJECTION = re.compile(r"^/(?P<path>lm_head|model/layers\.\d+/(?:self_attn|mlp)/\w+)/MatMul")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_PREPROCESSOR = "preprocessor_config.json"


def dequantize_onnx(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Recovers the float weights of a dynamically quantised Llama export.

    A linear layer is stored transposed, as [in, out] integers q with one scale s and one zero
    point z; its weight is ((q - z) * s)^T. The embedding is stored untransposed. Norm weights are
    stored as floats under their own names.

    Args:
        model: The loaded ONNX graph.

    Returns:
        Weights by Llama key, float32; linear weights [out, in].

    Raises:
        WeightsError: A matrix product names no projection, or a projection appears twice.
    """
    from onnx import numpy_helper

    stored = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in model.graph.initializer
    }
    weights: dict[str, Tensor] = {}

    def add(key: str, value: Tensor) -> None:
        if key in weights:
            raise WeightsError("a weight appears twice in the graph", where=key)
        weights[key] = value.contiguous()

    def dequantize(name: str) -> Tensor:
        zero_point = stored[f"{name}_zero_point"].float()
        return (stored[f"{name}_quantized"].float() - zero_point) * stored[f"{name}_scale"].float()

    for name, value in stored.items():
        if name.startswith("model.") and name.endswith("norm.weight"):
            add(name, value.float())
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            match = _PROJECTION.match(node.name)
            if match is None:
                raise WeightsError("a quantised product belongs to no layer", where=node.name)
            key = match["path"].replace("/", ".") + ".weight"
            add(key, dequantize(node.input[1].removesuffix("_quantized")).T)
        elif node.op_type == "DequantizeLinear":
            name = node.input[1].removesuffix("_scale")
            add(name, dequantize(name))
    return weights


def language_model_from_onnx(source: Path, destination: Path) -> None:
    """Writes a transformers directory from an int8 ONNX export of a Llama-type model.

    Args:
        source: Folder with `config.json`, `tokenizer.json`, `tokenizer_config.json` and
            `onnx/model_quantized.onnx`.
        destination: Empty folder to fill: config, float32 weights, tokenizer.

    Raises:
        MissingExtraError: The package onnx is not installed.
        WeightsError: A weight is missing, left over or of another shape than the config says.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    try:
        import onnx
    except ImportError:
        raise MissingExtraError.of(
            "onnx", extra="quickstart", purpose="reading the embedded language model"
        ) from None
    weights = dequantize_onnx(onnx.load(str(source / "onnx" / "model_quantized.onnx")))
    fields = json.loads((source / "config.json").read_text("utf-8"))
    config = LlamaConfig.from_dict(fields)
    config.dtype = torch.float32
    head = weights.pop("lm_head.weight", None)
    if not config.tie_word_embeddings:
        if head is None:
            raise WeightsError("the graph has no output head", where="lm_head")
        weights["lm_head.weight"] = head
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _check_complete(weights, model.state_dict(), tied=config.tie_word_embeddings)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(destination)
    save_file(weights, str(destination / "model.safetensors"), metadata={"format": "pt"})
    _copy_tokenizer(source, destination)


def language_model_from_gguf(source: Path, destination: Path) -> None:
    """Writes a transformers directory from a GGUF file.

    Args:
        source: The `.gguf` file.
        destination: Empty folder to fill: config, float32 weights, tokenizer.

    Raises:
        MissingExtraError: The package gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401  (transformers reads the file through it)
    except ImportError:
        raise MissingExtraError.of(
            "gguf", extra="quickstart", purpose="reading the stand-in language model"
        ) from None
    where: dict[str, Any] = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
    # A model read from GGUF refuses `save_pretrained`; its weights are ordinary floats by now.
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    config = type(model.config).from_dict(fields)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {
        key: value.float().contiguous()
        for key, value in model.state_dict().items()
        if key not in tied
    }
    config.save_pretrained(destination)
    save_file(weights, str(destination / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(destination)


def vision_tower_from_state_dict(
    source: Path, destination: Path, *, feature_maps: tuple[str, ...], image_size_px: int
) -> None:
    """Writes a vision tower directory from an EfficientNet-Lite0 state dict.

    Args:
        source: The `.pth` file; it is read as plain tensors, no code of it is run.
        destination: Empty folder to fill: config, weights, image preprocessing.
        feature_maps: The maps a patch's features are made of, see `EfficientNetLiteConfig`.
        image_size_px: Edge of the input images, a multiple of 32.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape.
    """
    tensors: dict[str, Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    config = EfficientNetLiteConfig(image_size=image_size_px, feature_maps=feature_maps)
    weights = import_weights(tensors, config=config)
    model = EfficientNetLiteModel(config)
    _check_complete(weights, model.state_dict(), tied=False)
    model.load_state_dict(weights)
    model.save_pretrained(destination)
    write_json(destination / _PREPROCESSOR, preprocessor_fields(image_size_px))


def preprocessor_fields(image_size_px: int) -> dict[str, object]:
    """Fields of `preprocessor_config.json` for EfficientNet-Lite.

    The released weights expect (x - 127) / 128 for x in 0..255. With x rescaled by 1/255 first,
    that is mean 127/255 and standard deviation 128/255.

    Args:
        image_size_px: Edge of the square input.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size_px, "width": image_size_px},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
    }


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented UTF-8 JSON, keys in the order given."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, destination: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def _check_complete(found: dict[str, Tensor], wanted: dict[str, Tensor], *, tied: bool) -> None:
    expected = set(wanted) - ({"lm_head.weight"} if tied else set())
    _refuse("weights are missing", expected - set(found))
    _refuse("weights are left over", set(found) - expected)
    _refuse(
        "weights have another shape than the config says",
        (key for key in expected if found[key].shape != wanted[key].shape),
    )


def _refuse(what: str, keys: Iterable[str]) -> None:
    listed = sorted(keys)
    if listed:
        raise WeightsError(f"{len(listed)} {what}", got=", ".join(listed[:4]))
