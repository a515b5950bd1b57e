"""How likely a model finds given answers: multiple choice without reading generated text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from vistune.data.collate import pack_row
from vistune.data.encode import Encoder
from vistune.generate.decode import AnsweringModel, Prompt, one_dtype
from vistune.models.contract import VisionLanguageModel
from vistune.recipe.sizes import LOGITS_PER_CHUNK
from vistune.types import EncodedSample, ImageRef, Sample, Turn

_NO_LIMIT = 2**31


@torch.no_grad()
def score_choices(
    model: VisionLanguageModel,
    encoder: Encoder,
    prompt: Prompt,
    choices: Sequence[str],
    *,
    per_token: bool = True,
) -> list[float]:
    """Returns a score for every answer to a prompt; the highest is the likeliest.

    An answer's tokens include what the template puts at its end, as in training.

    Args:
        model: The model, on its device.
        encoder: How conversations become tokens.
        prompt: The prompt.
        choices: The answers.
        per_token: Log-probability over the number of tokens, so that a long answer is not worse
            for being long; False for the sum.

    Returns:
        One number per answer, at most 0.

    Raises:
        RowError: The prompt cannot be rendered, or an image cannot be read.
    """
    samples = _conversations(encoder, prompt, choices)
    answering = cast("AnsweringModel", model)
    device = next(answering.parameters()).device
    row = pack_row(samples).to(device)
    training = answering.training
    answering.train(False)
    try:
        with one_dtype(answering, device):
            hidden = model.hidden_states(**row.model_inputs())
            losses_M = _losses(model, hidden[0, row.target_index_M], row.target_ids_M)
    finally:
        answering.train(training)
    num = len(samples)
    sums = torch.zeros(num, device=device).index_add_(0, row.target_sample_M, -losses_M)
    if per_token:
        counts: Any = torch.bincount(row.target_sample_M, minlength=num).clamp(min=1)
        sums = sums / counts
    return [float(value) for value in sums]


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
    return [
        encoder.encode(
            Sample(
                id=f"choice {index}",
                source="choices",
                where="choices",
                turns=(*prompt.turns, Turn("assistant", (choice,))),
                # `encode` takes opened pictures as well as files.
                images=cast("tuple[ImageRef, ...]", tuple(prompt.images)),
            ),
            max_tokens=_NO_LIMIT,
            overlong="error",
        )
        for index, choice in enumerate(choices)
    ]
