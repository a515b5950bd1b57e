"""One of transformers' own vision-language models behind vistune's contract.

The model is transformers' class; its language model attends within samples of a packed row through
the attention registered in `models.attention`. Of its modules only projections of patches are
replaced, by ones that compute the same (`patch_product`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import (
    ahead_mask,
    packing_mask,
    reach_of_prefixes,
    reach_of_runs,
    register_ahead_attention,
    register_packed_attention,
    register_patch_attention,
)
from vistune.models.contract import ModuleMap
from vistune.models.native.contract import LooksAhead, NativeFamily, SplicedApart, TakesPatches
from vistune.models.native.patch_product import multiply_patches
from vistune.types import ImageShape, VisionGrid

INNER = "inner"
_FEATURES = ("pooler_output", "deepstack_features")  # Qwen3-VL adds some at deeper layers


class NativeVLM(nn.Module):
    """A whole model of transformers.

    Args:
        inner: The model, such as `Qwen2VLForConditionalGeneration`.
        family: What is known of it.

    Raises:
        ModelError: Its language model does not take its attention from transformers' interface.
    """

    def __init__(self, inner: Any, family: NativeFamily) -> None:
        super().__init__()
        self.inner = inner
        self.family = family
        self.config = inner.config
        self.grid: VisionGrid = family.grid(inner.config)
        self.image_token_id = family.image_token_id(inner.config)
        self.touch_vision_always = False
        if not family.is_recurrent and not _compat.uses_attention_interface(inner):
            raise ModelError(
                f"{type(inner).__name__} cannot keep the samples of a packed row apart",
                fix="use a model that takes its attention from transformers' interface",
            )
        self._ahead = family if isinstance(family, LooksAhead) else None
        self._first_position = 0 if self._ahead is None else self._ahead.first_position
        inner.config.get_text_config()._attn_implementation = self._attention_name()
        if isinstance(family, TakesPatches):
            for tower in family.roles.vision:
                inner.get_submodule(tower).config._attn_implementation = register_patch_attention()
                multiply_patches(inner.get_submodule(tower))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeVLM:
        """Moves and casts the model, but leaves tables such as rotary frequencies in fp32."""
        _compat.apply_exactly(self, lambda: super(NativeVLM, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules. A head tied to the embeddings belongs to the language model."""
        roles = self.family.roles
        head = self.inner.get_output_embeddings()
        tied = head is None or head.weight is self.inner.get_input_embeddings().weight
        language = tuple(f"{INNER}.{name}" for name in roles.language)
        heads = tuple(f"{INNER}.{name}" for name in roles.head)
        return ModuleMap(
            vision=tuple(f"{INNER}.{name}" for name in roles.vision),
            connector=tuple(f"{INNER}.{name}" for name in roles.connector),
            language=(*language, *heads) if tied else language,
            head=() if tied else heads,
        )

    @property
    def never_trained(self) -> frozenset[str]:
        """Parameters that no gradient reaches."""
        unused = tuple(f"{INNER}.{name}" for name in self.family.untrained(self.config))
        return frozenset(
            name
            for name, _ in self.named_parameters()
            if any(name == path or name.startswith(path + ".") for path in unused)
        )

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's embedding table."""
        found = self.inner.get_input_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head."""
        found = self.inner.get_output_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def hidden_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
        image_shapes: tuple[ImageShape, ...] = (),
        prompt_lengths: tuple[int, ...] = (),
    ) -> Tensor:
        """Runs one packed row up to and including the final norm; see `models.contract`."""
        images = {}
        if pixel_values_NCYX is not None:
            images = self.family.image_inputs(self._cast(pixel_values_NCYX), image_shapes)
            images |= self.family.text_inputs(input_ids_BT, self.image_token_id)
        if self.family.is_recurrent:
            hidden = self._one_by_one(input_ids_BT, position_ids_BT, cu_seqlens, images)
        else:
            mask = self.packed_mask(input_ids_BT, cu_seqlens, max_seqlen, prompt_lengths)
            hidden = self._together(input_ids_BT, position_ids_BT, mask, images)
        idle = None if images else self._idle_vision(hidden)
        return hidden if idle is None else hidden + idle

    def _together(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, mask: Tensor, images: Any
    ) -> Tensor:
        """Runs the model over a packed row whose mask keeps its samples apart."""
        inputs = {"input_ids": input_ids_BT, **images}
        if images and isinstance(self.family, SplicedApart):
            inputs = {"inputs_embeds": self._spliced(input_ids_BT, images)}
        out = self.inner.model(
            attention_mask=mask,
            position_ids=position_ids_BT + self._first_position,
            use_cache=False,
            **inputs,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _one_by_one(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, cu_seqlens: Tensor, images: Any
    ) -> Tensor:
        """Runs the language model over every sample of a packed row by itself."""
        embeds_BTD = self._spliced(input_ids_BT, images)
        parts = [
            self.inner.model.language_model(
                inputs_embeds=embeds_BTD[:, start:end],
                position_ids=position_ids_BT[..., start:end],
                use_cache=False,
            ).last_hidden_state
            for start, end in itertools.pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, dim=1)

    def _spliced(self, input_ids_BT: Tensor, images: Any) -> Tensor:
        """Returns embeddings with the images' features at their places: [B, T, D]."""
        embeds_BTD: Tensor = self.inner.get_input_embeddings()(input_ids_BT)
        if not images:
            return embeds_BTD
        found = _tensors(self.inner.model.get_image_features(**images).pooler_output)
        features_KD = torch.cat([part.flatten(0, -2) for part in found]).to(embeds_BTD)
        at_image = (input_ids_BT == self.image_token_id)[..., None]
        return embeds_BTD.masked_scatter(at_image, features_KD)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the output head: [M, D] -> [M, V]."""
        out = self.get_output_embeddings()(hidden_MD)
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        assert isinstance(out, Tensor)
        return out if cap is None else torch.tanh(out / cap) * cap

    def forward(self, **inputs: Any) -> Any:
        """Runs transformers' model on a padded batch; for generation."""
        return self.inner(**inputs)

    def generation_inputs(
        self,
        *,
        input_ids_BT: Tensor,
        pixel_values: Tensor | None,
        image_shapes: tuple[ImageShape, ...],
    ) -> dict[str, Any]:
        """Returns what the forward pass is given for the images of a batch of prompts."""
        images = {}
        if pixel_values is not None:
            images = self.family.image_inputs(self._cast(pixel_values), image_shapes)
        return images | self.family.text_inputs(input_ids_BT, self.image_token_id)

    def _attention_name(self) -> str:
        if self._ahead is None:
            return register_packed_attention()
        return register_ahead_attention(window_binds=not self._ahead.reads_prompts_both_ways)

    def packed_mask(
        self,
        input_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        prompt_lengths: tuple[int, ...],
    ) -> Tensor:
        """Returns what stands in for the attention mask of a packed row.

        Args:
            input_ids_BT: int64 [1, T].
            cu_seqlens: int32 [S + 1].
            max_seqlen: Tokens of the longest sample.
            prompt_lengths: Tokens of each sample's prompt, where prompts are read both ways.

        Raises:
            ModelError: They are, and nobody said how long they are.
        """
        if self._ahead is None:
            return packing_mask(cu_seqlens, max_seqlen)
        if not self._ahead.reads_prompts_both_ways:
            reach_T = reach_of_runs(input_ids_BT[0] == self.image_token_id)
            return ahead_mask(cu_seqlens, max_seqlen, reach_T)
        # A row whose samples all failed holds one token and says nothing.
        is_empty = not prompt_lengths and input_ids_BT.shape[1] == 1
        lengths = (1,) if is_empty else prompt_lengths
        if len(lengths) != cu_seqlens.shape[0] - 1:
            raise ModelError(
                "this model reads prompts both ways and was not told how long they are",
                got=f"{len(prompt_lengths)} lengths for {cu_seqlens.shape[0] - 1} samples",
                fix="set data.template=paligemma",
            )
        lengths_S = torch.tensor(lengths, device=cu_seqlens.device)
        return ahead_mask(cu_seqlens, max_seqlen, reach_of_prefixes(cu_seqlens, lengths_S))

    def prepare_inputs_for_generation(self, *arguments: Any, **kwargs: Any) -> Any:
        """Hands the generation hook of transformers' model on."""
        return self.inner.prepare_inputs_for_generation(*arguments, **kwargs)

    def _prepare_position_ids_for_generation(self, *arguments: Any, **kwargs: Any) -> Any:
        return self.inner._prepare_position_ids_for_generation(*arguments, **kwargs)

    def _update_model_kwargs_for_generation(self, *arguments: Any, **kwargs: Any) -> Any:
        return self.inner._update_model_kwargs_for_generation(*arguments, **kwargs)

    def _cast(self, pixel_values: Tensor) -> Tensor:
        dtype = next(p.dtype for n, p in self.named_parameters() if self._sees(n))
        return pixel_values if dtype.itemsize < 2 else pixel_values.to(dtype)

    def _sees(self, name: str) -> bool:
        return self.module_map.role_of(name) == "vision"

    def _idle_vision(self, like: Tensor) -> Tensor | None:
        """Zero that depends on every trained vision and connector weight, when there are any.

        Without it a row of text alone would leave gradients missing, and with several processes
        the others would wait for them for ever.
        """
        trains = any(
            p.requires_grad and self.module_map.role_of(n) in ("vision", "connector")
            for n, p in self.named_parameters()
        )
        if not torch.is_grad_enabled() or not (trains or self.touch_vision_always):
            return None
        shape, shapes = self.family.blank(self.config)
        # Not of zeros: some models take an image of zeros for padding and drop it.
        blank = self._cast(torch.ones(shape, device=like.device))
        out = self.inner.model.get_image_features(**self.family.image_inputs(blank, shapes))
        parts = [part for name in _FEATURES for part in _tensors(getattr(out, name, None))]
        return torch.stack([part.float().sum() for part in parts]).sum().to(like.dtype) * 0.0


def _tensors(value: Any) -> list[Tensor]:
    """Returns the tensors of a nest of lists."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [] if value is None else [value]
