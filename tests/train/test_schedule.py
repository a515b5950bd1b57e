import pytest
import torch
from transformers import get_scheduler

from vistune.recipe import TrainConfig
from vistune.train.schedule import Schedule


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_frac", [0.0, 0.03, 0.25])
def test_equals_transformers_schedule(shape, warmup_frac):
    total = 37
    schedule = Schedule.of(
        TrainConfig(steps=total, schedule=shape, warmup_frac=warmup_frac), total_steps=total
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = get_scheduler(
        "constant_with_warmup" if shape == "constant" else shape,
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=total,
    )
    for step in range(total):
        # The same formula in double precision: equal up to rounding.
        assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        oracle.step()


def test_warmup_is_rounded_up_and_not_by_rounding_error():
    def warmup(frac: float, total: int) -> int:
        return Schedule.of(
            TrainConfig(steps=total, warmup_frac=frac), total_steps=total
        ).warmup_steps

    assert warmup(0.03, 100) == 3
    assert warmup(0.07, 100) == 7  # in floating point the product is above 7
    assert warmup(0.03, 101) == 4
    assert warmup(0.001, 10) == 1
    assert warmup(0.0, 10) == 0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_ends_at_the_floor(shape):
    schedule = Schedule(shape, total_steps=10, warmup_steps=2, min_factor=0.1)
    assert schedule.factor(2) == 1.0
    assert schedule.factor(10) == pytest.approx(0.1)
    assert schedule.factor(99) == pytest.approx(0.1)
