"""Tiny directories of the model families in their public layouts, tokenizer included. Not a test.

Weights and configs are the parity fixtures'; the tokenizers are made here, with the special tokens
at the ids that the configs name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from visualglm_case import train_pieces

from vistune.checkpoint.layouts.mgm import write_mgm
from vistune.checkpoint.layouts.visualglm_sat import write_visualglm_sat
from vistune.models.chatglm.tokenizer import ChatGLMTokenizer
from vistune.models.families.visualglm import VisualGLMFamily
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
LLAVA_KIND = "llava-1.5"
TILES_KIND = "llava-1.6"
LLAVA_KINDS = (LLAVA_KIND, TILES_KIND)
WIDE = 192
FAMILY_KINDS = ("cogvlm2", "visualglm", "visualglm-sat", "mgm-2b", "mgm-2b-hd")


def write_family(kind: str, folder: Path, *, wide: bool = False) -> Path:
    """Writes one family's directory; returns it.

    Args:
        kind: Which family.
        folder: Made here.
        wide: Give the language model an inner width of 192, so that every linear layer of it reads
            a multiple of 64 numbers, as real ones do.
    """
    folder.mkdir(parents=True)
    if kind in LLAVA_KINDS:
        write_llava_15(folder) if kind == LLAVA_KIND else write_llava_16(folder)
        if wide:
            _widen(folder, old=112, key="intermediate_size")
    elif kind == "cogvlm2":
        _copy("cogvlm2", folder)
        if wide:
            _widen(folder, old=96, key="intermediate_size")
        specials = {"<pad>": 500, "<|begin_of_text|>": 501, "<|end_of_text|>": 502}
        byte_tokenizer(specials, bos="<|begin_of_text|>", eos="<|end_of_text|>").save_pretrained(
            folder
        )
    elif kind == "visualglm":
        _write_visualglm(folder, wide=wide)
    elif kind == "visualglm-sat":
        hf = folder / "hf"
        hf.mkdir()
        _write_visualglm(hf, wide=wide)
        write_visualglm_sat(VisualGLMFamily().load(hf, torch.float32), folder, dtype=torch.float32)
        shutil.copy(hf / "ice_text.model", folder)
        shutil.rmtree(hf)
    else:
        _write_mgm(folder, hd=kind == "mgm-2b-hd", inner=WIDE if wide else 96)
    return folder


def write_llava_15(folder: Path) -> Path:
    """Writes a LLaVA-1.5 as it was released: no tower inside, its encoder beside; returns it."""
    values = json.loads((PARITY / "llava15" / "config.json").read_text())
    tower = {k: v for k, v in values["vision_tower"].items() if not k.startswith(("mm_", "kind"))}
    encoder = folder / "encoder"
    torch.manual_seed(4)
    CLIPVisionModel(CLIPVisionConfig(**tower)).save_pretrained(encoder)
    side = {"crop_size": 56, "size": 56, "resample": 3}
    means = {key: values[key] for key in ("image_mean", "image_std")}
    (encoder / "preprocessor_config.json").write_text(json.dumps({**side, **means}))
    weights = load_file(PARITY / "llava15" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    save_file(kept, folder / "model.safetensors")
    settings = {
        **values["text"],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": str(encoder),
        "mm_projector_type": values["mm_projector_type"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    specials = {"<pad>": 0, "<s>": 1, "</s>": 2}
    byte_tokenizer(specials, bos="<s>", eos="</s>").save_pretrained(folder)
    return folder


def write_llava_16(folder: Path) -> Path:
    """Writes a LLaVA-1.6 as it was released: tower and newline inside, images in tiles."""
    write_llava_15(folder)
    weights = load_file(PARITY / "llava15" / "model.safetensors")
    made = torch.Generator().manual_seed(6)
    width = weights["model.norm.weight"].shape
    weights["model.image_newline"] = torch.randn(width, generator=made) * 0.1
    save_file(weights, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
        "mm_patch_merge_type": "spatial_unpad",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _copy(name: str, folder: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(PARITY / name / file, folder / file)


def _widen(folder: Path, *, old: int, key: str) -> None:
    """Fills the language model's inner width up to `WIDE` with drawn numbers."""
    settings = json.loads((folder / "config.json").read_text())
    assert settings[key] == old
    (folder / "config.json").write_text(json.dumps(settings | {key: WIDE}))
    made = torch.Generator().manual_seed(9)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        in_mlp = ".mlp." in name and name.startswith(("model.layers.", "transformer.layers."))
        if not in_mlp and not name.startswith("model.vision.linear_proj."):
            continue
        shape = [WIDE if size == old else size for size in tensor.shape]
        filled = torch.randn(shape, generator=made) * tensor.float().std()
        filled[tuple(slice(size) for size in tensor.shape)] = tensor
        weights[name] = filled
    save_file(weights, folder / "model.safetensors")


def _write_mgm(folder: Path, *, hd: bool, inner: int) -> None:
    """MGM with a vocabulary that holds every byte and Gemma's marks; drawn weights."""
    torch.manual_seed(3)
    text = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "initializer_range": 0.1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    config = MGMConfig(
        text_config=text,
        vision_config=vision,
        aux_widths=[16, 32, 64, 128],
        aux_depths=[1, 1, 2, 1],
        image_size_aux=128 if hd else 64,
        image_grid=2 if hd else 1,
        image_global=hd,
    )
    write_mgm(MGMForConditionalGeneration(config), folder, dtype=torch.float32)
    specials = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 3, "<end_of_turn>": 4}
    byte_tokenizer(specials, bos="<bos>", eos="<eos>").save_pretrained(folder)


_CLIP = "model.vision_tower.vision_tower.vision_model."
_AUX = "model.vision_tower_aux.vision_"
_OF_THE_BIN = ("mm_projector", "vlm_uni", "vision_tower")


def write_mgm_parts(root: Path) -> None:
    """Writes an MGM (`whole/`), and the four things it is made of, each as it is published.

    `gemma/`, `clip/` and `aux/` are the models it is put together from, `mm_projector.bin` is what
    MGM's first stage leaves behind.
    """
    whole = write_family("mgm-2b", root / "whole")
    tensors = load_file(whole / "model.safetensors")
    settings = json.loads((whole / "config.json").read_text())
    gemma, clip, aux = (root / name for name in ("gemma", "clip", "aux"))
    for folder in (gemma, clip, aux):
        folder.mkdir()
    for file in whole.glob("tokenizer*"):
        shutil.copy(file, gemma)
    towers = ("vision_tower", "mm_", "image_")
    text = {k: v for k, v in settings.items() if not k.startswith(towers)}
    text |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}
    (gemma / "config.json").write_text(json.dumps(text))
    own = {n: t for n, t in tensors.items() if not any(part in n for part in _OF_THE_BIN)}
    save_file(own, gemma / "model.safetensors")
    vision = {k: v for k, v in settings["vision_tower"].items() if not k.startswith("mm_")}
    (clip / "config.json").write_text(json.dumps({**vision, "model_type": "clip_vision_model"}))
    of_clip = {n.removeprefix(_CLIP): t for n, t in tensors.items() if n.startswith(_CLIP)}
    extra = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file(
        {**{f"vision_model.{n}": t for n, t in of_clip.items()}, **extra},
        clip / "model.safetensors",
    )
    trunk = {n.removeprefix(_AUX): t for n, t in tensors.items() if n.startswith(_AUX)}
    others = {"visual.trunk.head.norm.weight": torch.ones(2), "text.positional": torch.ones(2)}
    trunk = {f"visual.trunk.{n}": t for n, t in trunk.items()}
    torch.save({**trunk, **others}, aux / "open_clip_pytorch_model.bin")
    left = {n: t for n, t in tensors.items() if any(part in n for part in _OF_THE_BIN)}
    torch.save(left, root / "mm_projector.bin")


def byte_tokenizer(specials: dict[str, int], *, bos: str, eos: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose special tokens have given ids."""
    vocab = dict(specials)
    free = (i for i in range(1 << 20) if i not in set(specials.values()))
    vocab |= {piece: next(free) for piece in sorted(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>"
    )


def _write_visualglm(folder: Path, *, wide: bool) -> None:
    _copy("visualglm", folder)
    if wide:
        _widen(folder, old=160, key="inner_hidden_size")
    pieces = ChatGLMTokenizer(str(train_pieces(folder)))
    (folder / "corpus.txt").unlink()
    # The weights know no special ids, so the config takes the ones this vocabulary has.
    settings = json.loads((folder / "config.json").read_text())
    names = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "gmask": "[gMASK]", "pad": "<pad>"}
    settings |= {f"{key}_token_id": pieces.convert_tokens_to_ids(t) for key, t in names.items()}
    (folder / "config.json").write_text(json.dumps(settings))


def write_pictures(folder: Path, *, num_rows: int = 4) -> dict[str, Any]:
    """Writes pictures and a LLaVA-format file; returns the recipe's source."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = [(200, 40, 40), (40, 160, 60), (50, 70, 210), (220, 190, 40)]
    rows = []
    for index in range(num_rows):
        name = f"{index}.png"
        Image.new("RGB", (40 + index, 30), colours[index % 4]).save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\nwhat is it"},
            {"from": "gpt", "value": f"a cat {index}"},
        ]
        rows.append({"id": str(index), "image": name, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return {"format": "llava", "path": str(folder / "train.json"), "images": str(folder)}
