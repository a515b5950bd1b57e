"""Writes adapters on InternLM2's Llama form as a PEFT directory by InternLM2's own names.

InternLM2 has one `wqkv` where the Llama form has queries, keys and values. Their adapters together
are one adapter whose rank is the sum of theirs: the first factors stand one below the other, each
second factor has its columns to itself, and its rows go where the fused weight has them. The
product is the same, number by number. DoRA adapters are not written.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from vistune.device.bits import quiet_kernel_notice
from vistune.export.adapter import target_names
from vistune.models.keymap import Entry
from vistune.models.language.internlm2 import internlm2_keys
from vistune.models.tune.lora import adapter_layers

_ADAPTER = "default"


@dataclass(frozen=True)
class _Factors:
    """One public module's adapter: `alpha / rank * second @ first`, or over the root of the rank.

    Args:
        first_RI: [rank, inputs].
        second_OR: [outputs, rank].
        alpha: PEFT's `lora_alpha` of this module.
    """

    first_RI: Tensor
    second_OR: Tensor
    alpha: float

    @property
    def size(self) -> tuple[int, float]:
        """Rank and alpha."""
        return self.first_RI.shape[0], self.alpha


def write_internlm2_adapter(model: LlamaForCausalLM, *, base: str, folder: Path) -> None:
    """Writes the adapters inside an InternLM2 as a PEFT directory for the public model.

    Args:
        model: InternLM2 as a Llama, LoRA adapters not merged.
        base: Where its own weights are.
        folder: Made here.
    """
    quiet_kernel_notice()
    from peft import LoraConfig

    own: Any = model.peft_config[_ADAPTER]
    layers = adapter_layers(model)
    modules: list[str] = []
    adapters: dict[str, _Factors] = {}
    for entry in internlm2_keys(model.config).entries:
        module = entry.public.removesuffix(".weight")
        modules.append(module)
        if any(name.removesuffix(".weight") in layers for name in entry.own):
            adapters[module] = _factors(model, entry, layers, rslora=own.use_rslora)
    sizes = _patterns(adapters, (own.r, float(own.lora_alpha)))
    folder.mkdir()
    LoraConfig(
        r=own.r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        target_modules=target_names(adapters, [m for m in modules if m not in adapters]),
        use_rslora=own.use_rslora,
        bias="none",
        rank_pattern={pattern: rank for pattern, (rank, _) in sizes.items()},
        alpha_pattern={pattern: alpha for pattern, (_, alpha) in sizes.items()},
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)
    state: dict[str, Tensor] = {}
    for module, factors in adapters.items():
        state[f"base_model.model.{module}.lora_A.weight"] = factors.first_RI
        state[f"base_model.model.{module}.lora_B.weight"] = factors.second_OR
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _factors(
    model: LlamaForCausalLM, entry: Entry, layers: dict[str, Any], *, rslora: bool
) -> _Factors:
    """Returns the adapter of one public module; a layer without one has rows of zeros."""
    names = [name.removesuffix(".weight") for name in entry.own]
    adapted = [layers[name] for name in names if name in layers]
    first_RI = torch.cat([layer.lora_A[_ADAPTER].weight.detach().cpu() for layer in adapted])
    rank = first_RI.shape[0]
    # One scale for all: what a layer's own differs by goes into its second factor.
    scale = adapted[0].scaling[_ADAPTER]
    blocks: list[Tensor] = []
    start = 0
    for name in names:
        layer: Any = model.get_submodule(name)
        block_OR = first_RI.new_zeros(layer.out_features, rank)
        if name in layers:
            second = layer.lora_B[_ADAPTER].weight.detach().cpu()
            if layer.scaling[_ADAPTER] != scale:
                # Only a power of two would leave 16 bits unrounded.
                second = second.float() * (layer.scaling[_ADAPTER] / scale)
            block_OR = block_OR.to(second.dtype)
            block_OR[:, start : start + second.shape[1]] = second
            start += second.shape[1]
        blocks.append(block_OR)
    widest = max((block.dtype for block in blocks), key=lambda dtype: dtype.itemsize)
    second_OR = entry.form.join(tuple(block.to(widest) for block in blocks))
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return _Factors(first_RI.contiguous(), second_OR.contiguous(), alpha)


def _patterns(
    adapters: dict[str, _Factors], usual: tuple[int, float]
) -> dict[str, tuple[int, float]]:
    """Returns PEFT's patterns of names -> rank and alpha, of the modules that have others.

    A pattern is a module's last name, where all of that name are alike; else its path, without the
    first level: older releases of PEFT want something in front of a pattern.
    """
    alike: dict[str, set[tuple[int, float]]] = {}
    for module, factors in adapters.items():
        alike.setdefault(module.rpartition(".")[2], set()).add(factors.size)
    found: dict[str, tuple[int, float]] = {}
    for module, factors in adapters.items():
        last = module.rpartition(".")[2]
        if factors.size != usual:
            path = re.escape(module.partition(".")[2])
            found[last if len(alike[last]) == 1 else path] = factors.size
    return found
