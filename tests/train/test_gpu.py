"""The loop on an accelerator: the parts that a CPU cannot show."""

import pytest
import torch
from test_loop import LORA, QUIET, losses, metrics, resolved

from loss_curve import relative_error
from vistune.train import train

pytestmark = pytest.mark.gpu

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")


@cuda
def test_losses_are_those_of_the_cpu(tiny, tmp_path):
    train(resolved(tiny, tmp_path / "cpu"), console=QUIET)
    gpu = resolved(tiny, tmp_path / "gpu", device="cuda", data={"workers": 2})
    train(gpu, console=QUIET)
    pairs = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("gpu", "cpu")]
    # fp32 on both; sums in another order, six steps long.
    assert relative_error(*pairs) < 1e-4
    assert metrics(tmp_path / "gpu")[0]["peak_memory_gib"] > 0


@cuda
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_goes_on_with_the_device_random_state(tiny, tmp_path, dtype):
    """With dropout: the mask of step 4 is that of an uninterrupted run, so the loss is too."""
    sections = {"device": "cuda", "dtype": dtype, "tune": LORA, "save": {"every_steps": 3}}
    train(resolved(tiny, tmp_path / "whole", **sections), console=QUIET)
    result = train(resolved(tiny, tmp_path / "parts", **sections), console=QUIET)
    (result.checkpoint / "COMPLETE").unlink()
    train(resolved(tiny, tmp_path / "parts", **sections), resume=True, console=QUIET)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [line[0] for line in parts] == [line[0] for line in whole]
    # Atomic additions may come in another order: equal to rounding, where another mask would
    # differ in the third digit.
    tolerance = 1e-5 if dtype == "fp32" else 2e-4
    for (_, loss, _), (_, expected, _) in zip(parts, whole, strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)
