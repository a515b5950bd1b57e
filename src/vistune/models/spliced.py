"""A language model of transformers that reads text with image embeddings among it.

What composed models and MGM share: training on packed rows, the padded forward pass, generation.
How pixels become embeddings is left to them. It computes no loss.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import packing_mask
from vistune.models.fused.trunk import FusedTrunk
from vistune.models.language.decoder import logits_of
from vistune.types import ImageShape, Tail


class SplicedLanguageModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The half of a vision-language model that knows no pixels.

    A subclass sets `language_model` (a causal language model with the packed attention), `fused`
    and `touch_vision_always`, and says what an input's embeddings are.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    language_model: Any
    fused: FusedTrunk | None
    touch_vision_always: bool

    @abstractmethod
    def embed(
        self,
        input_ids_BT: Tensor,
        pixel_values_NCYX: Tensor | None,
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """Looks up text embeddings and puts image embeddings where the image token stands.

        Without images the result still depends on every trained vision and connector weight, with
        weight zero.

        Args:
            input_ids_BT: int64 [B, T].
            pixel_values_NCYX: Images in reading order over the whole batch, or None.
            image_shapes: Of each image, where they are cut into tiles.

        Returns:
            [B, T, D].

        Raises:
            ModelError: Image tokens and image embeddings are not equally many.
        """

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's embedding table."""
        found = self.language_model.get_input_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head."""
        found = self.language_model.get_output_embeddings()
        assert isinstance(found, nn.Module)
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def hidden_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """Runs one packed row up to and including the final norm; see `contract`."""
        return self.decode(
            self.embed(input_ids_BT, pixel_values_NCYX, image_shapes),
            position_ids_BT=position_ids_BT,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )

    def decode(
        self,
        embeds_BTD: Tensor,
        *,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Runs the language model over a packed row of embeddings, up to the final norm.

        Args:
            embeds_BTD: [1, T, D]; see `embed`.
            position_ids_BT: int64 [1, T], restarting with every sample.
            cu_seqlens: int32 [S + 1].
            max_seqlen: Tokens of the longest sample.

        Returns:
            [1, T, D].
        """
        if self.fused is not None:
            return self.fused.hidden_states(
                embeds_BTD, position_ids_BT, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
        out = _compat.decoder_of(self.language_model)(
            inputs_embeds=embeds_BTD,
            attention_mask=packing_mask(cu_seqlens, max_seqlen),
            position_ids=position_ids_BT,
            use_cache=False,
        )
        hidden = out.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    def target_states(
        self,
        *,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values_NCYX: Tensor | None,
        tail: Tail,
        image_shapes: tuple[ImageShape, ...] = (),
    ) -> Tensor:
        """As `hidden_states`, at the target positions only: [M, D]. Needs the fused layers."""
        assert self.fused is not None
        return self.fused.target_states(
            self.embed(input_ids_BT, pixel_values_NCYX, image_shapes),
            position_ids_BT,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            tail=tail,
        )

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Applies the output head as the language model does: [M, D] -> [M, V]."""
        return logits_of(self.language_model)(hidden_MD)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_shapes: tuple[ImageShape, ...] = (),
        labels: None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs a padded batch, with or without a cache.

        Args:
            input_ids: int64 [B, T], image tokens expanded.
            pixel_values: Images in reading order over the batch, [N, 3, Y, X].
            attention_mask: [B, past + T], 0 on padding.
            position_ids: int64 [B, T].
            past_key_values: Key-value cache.
            inputs_embeds: [B, T, D] instead of `input_ids` and `pixel_values`.
            use_cache: Whether to return a cache.
            logits_to_keep: Positions at the end whose logits are wanted; 0 for all.
            image_shapes: Of each image, where they are cut into tiles.
            labels: Not taken: the loss is computed outside the model.
            kwargs: For the language model.

        Returns:
            Logits [B, T', V] and the cache.

        Raises:
            ModelError: Both or neither of ids and embeddings are given, or labels, or a number of
                images that does not fit the text.
        """
        if labels is not None:
            raise ModelError("labels never enter the model; compute the loss from the logits")
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, pixel_values, image_shapes)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def generation_inputs(
        self,
        *,
        input_ids_BT: Tensor,
        pixel_values: Tensor | None,
        image_shapes: tuple[ImageShape, ...],
    ) -> dict[str, Any]:
        """Returns what the forward pass is given for the images of a batch of prompts."""
        return {"pixel_values": pixel_values, "image_shapes": image_shapes}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_shapes: tuple[ImageShape, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Gives images to the first pass only; afterwards the cache holds them."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = kwargs.get("past_key_values")
        if pixel_values is not None and (cache is None or cache.get_seq_length() == 0):
            inputs |= {"pixel_values": pixel_values, "image_shapes": image_shapes}
        return inputs
