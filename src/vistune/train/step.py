"""One optimizer step: rows in, gradients and sums out. The only place where loss is divided.

Labels never enter the model. Every row's summed loss is divided by the number of target tokens of
the whole step over all processes, so a step is the same however it is cut into rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from vistune.data.collate import tail_of
from vistune.parallel import Strategy
from vistune.recipe.sizes import LOGITS_PER_CHUNK
from vistune.train.loss import target_nll
from vistune.train.padding import padded
from vistune.types import Batch, Tail


class TrainableModel(Protocol):
    """What the step needs of a model (see `models.contract`)."""

    def hidden_states(
        self,
        *,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        pixel_values_NCYX: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns hidden states [1, T, D] after the final norm."""
        ...

    def target_states(
        self,
        *,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        pixel_values_NCYX: torch.Tensor | None,
        tail: Tail,
    ) -> torch.Tensor:
        """Returns hidden states [M, D] at the targets; asked only where `tail` is given."""
        ...

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Returns logits [M, V]."""
        ...


class LossModule(nn.Module):
    """A model and its loss as one module, so that a strategy wraps a single forward.

    Args:
        model: A `TrainableModel` that is an `nn.Module`.
        sources: Names of the data sources, in the order of the per-source sums.
        vocabulary_size: Width of the logits, about.
        num_logits: Logits held at once (targets of a chunk x vocabulary).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sources: Sequence[str],
        vocabulary_size: int,
        num_logits: int = LOGITS_PER_CHUNK,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_sources = len(sources)
        self.chunk_targets = max(1, num_logits // vocabulary_size)

    def forward(
        self, row: Batch, source_of_target_M: torch.Tensor | None, tail: Tail | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs one packed row.

        Args:
            row: The row, on the model's device.
            source_of_target_M: int64 source number of each target; None with a single source.
            tail: Where the last layer is read, for a model that computes it only there.

        Returns:
            The summed negative log-likelihood of the row's targets (float32 scalar with graph),
            and the same per source (float32, without graph).
        """
        model: TrainableModel = self.model  # type: ignore[assignment]
        inputs = row.model_inputs()
        if tail is not None:
            hidden_MD = model.target_states(**inputs, tail=tail)
            return self._loss(hidden_MD, row, source_of_target_M)
        hidden_BTD = model.hidden_states(**inputs)
        if row.num_targets == 0:
            # Every trained weight must still get a (zero) gradient, or other processes would wait.
            zero = model.logits(hidden_BTD[0, :1]).float().sum() * 0.0
            return zero, zero.new_zeros(self.num_sources)
        # Not indexing: its backward pass would sort the positions, which are already unique.
        hidden_MD = hidden_BTD.squeeze(0).index_select(0, row.target_index_M)
        return self._loss(hidden_MD, row, source_of_target_M)

    def _loss(
        self, hidden_MD: torch.Tensor, row: Batch, source_of_target_M: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model: TrainableModel = self.model  # type: ignore[assignment]
        nll_M = target_nll(
            hidden_MD, row.target_ids_M, model.logits, chunk_targets=self.chunk_targets
        )
        loss_sum = nll_M.sum()
        if source_of_target_M is None:
            return loss_sum, loss_sum.detach().reshape(1)
        per_source = nll_M.new_zeros(self.num_sources)
        return loss_sum, per_source.index_add_(0, source_of_target_M, nll_M.detach())


@dataclass(frozen=True)
class StepSums:
    """What one step's backward passes came to, over all processes; read from the device once.

    Args:
        num_targets: Target tokens.
        nll_per_source: Summed negative log-likelihood by source.
        targets_per_source: Target tokens by source.
        tokens_per_source: Tokens of samples by source, image tokens included.
        samples_per_source: Samples by source.
        grad_norm: Global gradient norm before clipping.
        num_samples: Samples.
        num_tokens: Tokens, image tokens included.
        num_image_tokens: Image tokens.
    """

    num_targets: int
    nll_per_source: dict[str, float]
    targets_per_source: dict[str, int]
    tokens_per_source: dict[str, int]
    samples_per_source: dict[str, int]
    grad_norm: float
    num_samples: int
    num_tokens: int
    num_image_tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the step's target tokens, in nats."""
        return sum(self.nll_per_source.values()) / max(1, self.num_targets)

    @property
    def loss_per_source(self) -> dict[str, float]:
        """The same by source, for the sources that had targets in this step."""
        return {
            name: self.nll_per_source[name] / count
            for name, count in self.targets_per_source.items()
            if count > 0
        }

    @property
    def is_finite(self) -> bool:
        """Whether both loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def backward_step(
    strategy: Strategy,
    module: nn.Module,
    rows: Sequence[Batch],
    *,
    sources: Sequence[str],
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    clip_norm: float | None,
    reads_tail: bool = False,
    pad_tokens: int | None = None,
) -> StepSums:
    """Runs forward and backward of all rows of one step and clips; weights are not changed.

    Args:
        strategy: How gradients are summed.
        module: What `strategy.prepare` returned for a `LossModule`.
        rows: The step's rows on this process, on the CPU.
        sources: Names of the data sources.
        device: Where to compute.
        autocast_dtype: Number format of the arithmetic, or None for the weights' own.
        clip_norm: Largest gradient norm, or None.
        reads_tail: Tell the model where its last layer is read.
        pad_tokens: Length every row is padded to, or None.

    Returns:
        The step's sums. The device is waited for once, at the end.
    """
    numbered = {name: number for number, name in enumerate(sources)}
    source_of_target = [_source_of_target(row, numbered) for row in rows]
    counts = _count(rows, numbered)
    # The one reduction before the first backward: what every loss is divided by.
    counts = strategy.world.sum(counts.to(device, non_blocking=True))
    num_targets = counts[: len(sources)].sum().clamp(min=1).float()

    nll_per_source = torch.zeros(len(sources), dtype=torch.float32, device=device)
    for index, (row, numbers) in enumerate(zip(rows, source_of_target, strict=True)):
        tail = tail_of(row).to(device) if reads_tail and row.num_targets else None
        row = row.to(device)
        if pad_tokens is not None:
            row = padded(row, pad_tokens)
        if numbers is not None:
            numbers = numbers.to(device, non_blocking=True)
        with strategy.no_sync(last=index == len(rows) - 1):
            with torch.autocast(
                device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
            ):
                loss_sum, row_nll = module(row, numbers, tail)
            strategy.backward(loss_sum / num_targets)
        nll_per_source += row_nll
    norm = strategy.clip_grad_norm(clip_norm)
    return _read(counts, strategy.world.sum(nll_per_source), norm, sources)


def _count(rows: Sequence[Batch], numbered: dict[str, int]) -> torch.Tensor:
    """Returns int64 [3 * sources + 1]: targets, tokens, samples by source, then image tokens.

    A row that stands for nothing (all its samples failed) holds one token, which is not counted.
    """
    counts = torch.zeros(3, len(numbered), dtype=torch.int64)
    for row in rows:
        if not row.num_samples:
            continue
        source_S = torch.tensor([numbered[name] for name in row.sources], dtype=torch.int64)
        targets_S = torch.bincount(row.target_sample_M, minlength=row.num_samples)
        tokens_S = row.cu_seqlens.diff().long()
        of_samples = torch.stack([targets_S, tokens_S, torch.ones_like(tokens_S)])
        counts.index_add_(1, source_S, of_samples)
    images = torch.tensor([sum(row.num_image_tokens for row in rows)])
    return torch.cat([counts.reshape(-1), images])


def _source_of_target(row: Batch, numbered: dict[str, int]) -> torch.Tensor | None:
    """Returns the source number of each target of a row on the CPU; None with a single source."""
    if len(numbered) == 1:
        return None
    per_sample = torch.tensor([numbered[name] for name in row.sources], dtype=torch.int64)
    return per_sample[row.target_sample_M.long()]


def _read(
    counts: torch.Tensor, nll: torch.Tensor, norm: torch.Tensor, sources: Sequence[str]
) -> StepSums:
    """Brings a step's sums to the host: the step's one wait for the device."""
    counted = counts.tolist()
    *per_source, grad_norm = torch.cat([nll, norm.detach().float().reshape(1)]).tolist()
    number = len(sources)
    targets, tokens, samples = (
        dict(zip(sources, counted[k * number : (k + 1) * number], strict=True)) for k in range(3)
    )
    return StepSums(
        num_targets=sum(targets.values()),
        nll_per_source=dict(zip(sources, per_source, strict=True)),
        targets_per_source=targets,
        tokens_per_source=tokens,
        samples_per_source=samples,
        grad_norm=grad_norm,
        num_samples=sum(samples.values()),
        num_tokens=sum(tokens.values()),
        num_image_tokens=counted[-1],
    )
