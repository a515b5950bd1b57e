"""How likely a model finds given answers: multiple choice without reading generated text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F

from vistune.data.collate import pack_row
from vistune.data.encode import Encoder
from vistune.generate.decode import AnsweringModel, Prompt, one_dtype
from vistune.models.contract import VisionLanguageModel
from vistune.models.splice import splice
from vistune.models.spliced import SplicedLanguageModel
from vistune.recipe.sizes import LOGITS_PER_CHUNK
from vistune.types import Batch, EncodedSample, ImageRef, Sample, Turn

_NO_LIMIT = 2**31


@torch.no_grad()
def score_choices(
    model: VisionLanguageModel,
    encoder: Encoder,
    prompt: Prompt,
    choices: Sequence[str],
    *,
    per_token: bool = True,
    max_tokens: int = 8192,
) -> list[float]:
    """Returns a score for every answer to a prompt; the highest is the likeliest.

    An answer's tokens include what the template puts at its end, as in training. The prompt stands
    in front of every answer, so that many answers make several rows.

    Args:
        model: The model, on its device.
        encoder: How conversations become tokens.
        prompt: The prompt.
        choices: The answers.
        per_token: Log-probability over the number of tokens, so that a long answer is not worse
            for being long; False for the sum.
        max_tokens: Most tokens of a row, images included; a longer answer has a row to itself.

    Returns:
        One number per answer, at most 0.

    Raises:
        RowError: The prompt cannot be rendered, or an image cannot be read.
    """
    samples = _conversations(encoder, prompt, choices)
    answering = cast("AnsweringModel", model)
    device = next(answering.parameters()).device
    training = answering.training
    answering.train(False)
    try:
        with one_dtype(answering, device):
            images_KD = _image_embeddings(model, samples[0], device) if samples else None
            found = [
                _scores(model, group, images_KD, device, per_token=per_token)
                for group in _rows(samples, max_tokens)
            ]
    finally:
        answering.train(training)
    return [score for scores_S in found for score in scores_S.tolist()]


def _rows(samples: Sequence[EncodedSample], max_tokens: int) -> Iterator[list[EncodedSample]]:
    """Yields the samples of each row, in order; at least one."""
    group: list[EncodedSample] = []
    num_tokens = 0
    for sample in samples:
        if group and num_tokens + sample.input_ids.size > max_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(sample)
        num_tokens += sample.input_ids.size
    if group:
        yield group


def _scores(
    model: VisionLanguageModel,
    samples: list[EncodedSample],
    images_KD: torch.Tensor | None,
    device: torch.device,
    *,
    per_token: bool,
) -> torch.Tensor:
    """Returns the scores [S] of the samples of one row."""
    if images_KD is not None:
        samples = [replace(sample, pixel_values=[]) for sample in samples]
    row = pack_row(samples).to(device)
    hidden_BTD = _hidden_states(model, row, images_KD)
    losses_M = _losses(model, hidden_BTD[0, row.target_index_M], row.target_ids_M)
    num = len(samples)
    sums_S = torch.zeros(num, device=device).index_add_(0, row.target_sample_M, -losses_M)
    if per_token:
        counts_S: Any = torch.bincount(row.target_sample_M, minlength=num).clamp(min=1)
        sums_S = sums_S / counts_S
    return sums_S


def _image_embeddings(
    model: VisionLanguageModel, sample: EncodedSample, device: torch.device
) -> torch.Tensor | None:
    """Returns the embeddings [K, D] of the prompt's images, which stand in front of every answer.

    None where there is no image, or where the model takes images only together with the text.
    """
    if not isinstance(model, SplicedLanguageModel) or not sample.pixel_values:
        return None
    row = pack_row([sample]).to(device)
    embeds_BTD = model.embed(row.input_ids_BT, row.pixel_values_NCYX, row.image_shapes)
    return embeds_BTD[row.input_ids_BT == model.image_token_id]


def _hidden_states(
    model: VisionLanguageModel, row: Batch, images_KD: torch.Tensor | None
) -> torch.Tensor:
    """Returns the hidden states [1, T, D] of a row whose samples all have the same images."""
    if images_KD is None:
        return model.hidden_states(**row.model_inputs())
    assert isinstance(model, SplicedLanguageModel)
    at_image_BT = row.input_ids_BT == model.image_token_id
    text_BTD = model.get_input_embeddings()(row.input_ids_BT.masked_fill(at_image_BT, 0))
    return model.decode(
        splice(text_BTD, at_image_BT, images_KD.repeat(row.num_samples, 1)),
        position_ids_BT=row.position_ids_BT,
        cu_seqlens=row.cu_seqlens,
        max_seqlen=row.max_seqlen,
    )


def _losses(
    model: VisionLanguageModel,
    hidden_MD: torch.Tensor,
    target_ids_M: torch.Tensor,
) -> torch.Tensor:
    """Returns the negative log-likelihood [M] of each target; few of the logits exist at once."""
    vocabulary = model.logits(hidden_MD[:1]).shape[-1]
    chunks = (
        torch.split(t, max(1, LOGITS_PER_CHUNK // vocabulary)) for t in (hidden_MD, target_ids_M)
    )
    return torch.cat(
        [
            F.cross_entropy(model.logits(hidden).float(), ids, reduction="none")
            for hidden, ids in zip(*chunks, strict=True)
        ]
    )


def _conversations(encoder: Encoder, prompt: Prompt, choices: Sequence[str]) -> list[EncodedSample]:
    """Returns the prompt with each answer; its images are read once."""
    samples: list[EncodedSample] = []
    for index, choice in enumerate(choices):
        sample = Sample(
            id=f"choice {index}",
            source="choices",
            where="choices",
            turns=(*prompt.turns, Turn("assistant", (choice,))),
            # `encode` takes opened pictures as well as files.
            images=cast("tuple[ImageRef, ...]", tuple(prompt.images)),
        )
        encoded = encoder.encode(
            sample, max_tokens=_NO_LIMIT, overlong="error", with_pixels=index == 0
        )
        samples.append(replace(encoded, pixel_values=(samples or [encoded])[0].pixel_values))
    return samples
