"""What a run that cannot go on says: numbers, sample ids and the setting that helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vistune.errors import NonFiniteError, TrainingError
from vistune.recipe import Recipe
from vistune.train.step import StepSums
from vistune.types import Batch


def nonfinite_error(
    sums: StepSums, sample_ids: list[str], *, step: int, skipped: int
) -> NonFiniteError:
    """Returns the error of a loss or gradient norm that is no number.

    Args:
        sums: The step's sums.
        sample_ids: Ids of its samples.
        step: Its number.
        skipped: Steps skipped so far, this one included.
    """
    shown = ", ".join(sample_ids[:32])
    more = f" and {len(sample_ids) - 32} more" if len(sample_ids) > 32 else ""
    after = f" after {skipped - 1} skipped steps" if skipped > 1 else ""
    return NonFiniteError(
        f"loss or gradient norm is not finite at step {step}{after}: the weights were not changed",
        where=f"samples {shown}{more}",
        got=f"loss {sums.loss}, gradient norm {sums.grad_norm}",
        expected="finite numbers",
        fix="lower train.lr or raise train.warmup_frac; look at these samples; try dtype=fp32;"
        " train.nonfinite=skip leaves such steps out. --resume goes on from the last checkpoint",
    )


def out_of_memory_error(
    error: Exception,
    rows: Sequence[Batch],
    recipe: Recipe,
    *,
    what: str,
    where: str,
    advice: Callable[[Sequence[Batch]], str] | None,
) -> TrainingError:
    """Returns the error of a step that did not fit, with the setting that would.

    Args:
        error: What the device said.
        rows: The rows of the step.
        recipe: The recipe.
        what: When it happened.
        where: The device.
        advice: Names the setting that is predicted to fit.
    """
    longest = max(row.num_tokens for row in rows)
    return TrainingError(
        f"the device ran out of memory {what}",
        where=where,
        got=f"a row of {longest} tokens; {str(error).splitlines()[0]}",
        fix=f"lower batch.max_tokens ({recipe.batch.max_tokens}) or raise"
        f" train.checkpoint_layers ({recipe.train.checkpoint_layers}); a step may be"
        " split into more rows without changing what is learnt"
        + ("" if advice is None else f". {advice(rows)}"),
    )
