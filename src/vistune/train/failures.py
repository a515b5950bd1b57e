"""What a run that cannot go on says: numbers, sample ids and the setting that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

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


@contextmanager
def out_of_memory_explained(
    *, what: str, where: str, fix: Callable[[], str], got: str = ""
) -> Iterator[None]:
    """Within this, a device that runs out of memory is an error that says what to turn.

    Args:
        what: When it happens.
        where: The device.
        fix: Says what would help; asked only when it happens.
        got: What was being computed.

    Raises:
        TrainingError: The device is out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(
            f"the device ran out of memory {what}",
            where=where,
            got="; ".join(filter(None, (got, said[0]))),
            fix=fix(),
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device (or the host, for a CPU) had no memory left.

    CUDA has a class of its own for it; other devices, a CPU and cuBLAS only say so.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return any(
        words in said for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def step_fix(
    recipe: Recipe, rows: Sequence[Batch], advice: Callable[[Sequence[Batch]], str] | None
) -> str:
    """Returns what makes a step fit that did not.

    Args:
        recipe: The recipe, settled.
        rows: The rows of the step.
        advice: Names the setting that is predicted to fit.
    """
    fix = (
        f"lower batch.max_tokens ({recipe.batch.max_tokens}) or raise train.checkpoint_layers"
        f" ({recipe.train.checkpoint_layers}); a step may be split into more rows without changing"
        " what is learnt"
    )
    if recipe.tune.vision.mode != "freeze":
        fix += (
            ". The tower trains: batch.max_image_tokens and train.checkpoint_tower_layers bound"
            " what it keeps"
        )
    return fix if advice is None else f"{fix}. {advice(rows)}"


def load_fix(recipe: Recipe) -> str:
    """Returns what makes a model fit whose weights alone did not."""
    language = recipe.tune.language
    if language.mode == "full":
        fewer = "tune.language.mode=lora holds them in 16 bits instead of 32, without gradients"
    elif language.frozen_format == "nf4":
        fewer = "take a smaller language model, or a larger device"
    else:
        fewer = "tune.language.frozen_format=nf4 holds them in about 4 bits (extra qlora)"
    return f"{fewer}. `vistune plan` says what weights take; see that nothing else is on the device"
