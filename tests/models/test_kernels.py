from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_parts import composed, packed_logits, row
from torch import Tensor, nn

from vistune.errors import DeviceError, ModelError
from vistune.models import kernels
from vistune.models.kernels import LigerOps, install_kernels
from vistune.models.tune import apply_tuning
from vistune.models.tune.quantize import quantize_frozen
from vistune.recipe import TuneConfig

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")
TUNES = {
    "lora": {"language": {"mode": "lora", "rank": 2, "dropout": 0.5}},
    "full": {part: {"mode": "full"} for part in ("connector", "language")},
}


class TorchOps:
    """The kernels' arithmetic in torch; counts its calls."""

    def __init__(self, error: float = 0.0) -> None:
        self.calls: dict[str, int] = {}
        self.error = error

    def _called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, casting: str
    ) -> Tensor:
        self._called(casting)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * (weight.float() + offset) * (1 + self.error)).to(x.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        self._called("silu")
        return F.silu(gate) * up

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        self._called("gelu")
        return F.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("llama", "2 LlamaMLP, 5 LlamaRMSNorm", {"llama", "silu"}),
        ("qwen3", "2 Qwen3MLP, 9 Qwen3RMSNorm", {"llama", "silu"}),
        ("gemma", "2 GemmaMLP, 5 GemmaRMSNorm", {"gemma", "gelu"}),
        ("gemma2", "2 Gemma2MLP, 9 Gemma2RMSNorm", {"gemma", "gelu"}),
        ("granite", "2 GraniteMLP, 5 GraniteRMSNorm", {"llama", "silu"}),
        ("olmo2", "2 Olmo2MLP, 9 Olmo2RMSNorm", {"gemma", "silu"}),
        ("phi3", "5 Phi3RMSNorm", {"llama"}),
    ],
)
@pytest.mark.parametrize("tune", TUNES)
def test_the_same_numbers_under_the_same_names(
    tmp_path: Path, text: str, said: str, calls: set[str], tune: str
) -> None:
    results = []
    for swapped in (False, True):
        model, facts = composed(tmp_path, text=text)
        apply_tuning(model, TuneConfig.model_validate(TUNES[tune]), seed=0)
        model.train()
        names = [name for name, _ in model.named_parameters()]
        ops = TorchOps()
        if swapped:
            before = torch.get_rng_state()
            done = install_kernels(model, wanted="auto", fused=False, device=CPU, ops=ops)
            assert str(done) == f"kernels: liger ({said})"
            assert torch.equal(torch.get_rng_state(), before)
            assert [name for name, _ in model.named_parameters()] == names
        torch.manual_seed(0)
        logits = torch.cat(packed_logits(model, row(facts)))
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((logits.detach(), gradients))
        assert not swapped or ops.calls.keys() == calls
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4)


def test_a_kernel_that_gives_other_numbers_stays_out(tmp_path: Path) -> None:
    model, _ = composed(tmp_path)
    ops = TorchOps(error=1e-3)
    done = install_kernels(model, wanted="liger", fused=False, device=CPU, ops=ops)
    assert done.reason == "2 LlamaMLP; as they are: 5 LlamaRMSNorm"
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 5


def test_weights_held_in_bits_are_no_numbers_to_try_a_kernel_in(tmp_path: Path) -> None:
    """A frozen language model in 8 bits has gates without a single floating-point parameter."""
    pytest.importorskip("bitsandbytes")
    model, facts = composed(tmp_path)
    frozen = {"mode": "freeze", "frozen_format": "int8"}
    tune = {"connector": {"mode": "full"}, "language": frozen}
    apply_tuning(model, TuneConfig.model_validate(tune), seed=0)
    quantize_frozen(model, "language", "int8", dtype=torch.float32, device=CPU)
    expected = torch.cat(packed_logits(model, row(facts)))
    ops = TorchOps()
    done = install_kernels(model, wanted="auto", fused=False, device=CPU, ops=ops)
    assert str(done) == "kernels: liger (2 LlamaMLP, 5 LlamaRMSNorm)"
    ops.calls.clear()
    # The same arithmetic around products of 8 bits: a number may round to the step beside it.
    found = torch.cat(packed_logits(model, row(facts)))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert ops.calls == {"llama": 5, "silu": 2}


def test_only_the_language_model_is_touched(tmp_path: Path) -> None:
    model, _ = composed(tmp_path)
    model.vision_tower.extra = type("ARMSNorm", (nn.RMSNorm,), {})(4)
    install_kernels(model, wanted="liger", fused=False, device=CPU, ops=TorchOps())
    assert type(model.vision_tower.extra).__name__ == "ARMSNorm"


def test_what_stands_in_the_way_is_said_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = composed(tmp_path)

    def install(wanted: str, *, fused: bool = False, device: torch.device = CPU) -> str:
        return str(install_kernels(model, wanted=wanted, fused=fused, device=device))  # type: ignore[arg-type]

    assert install("torch") == "kernels: torch (as the recipe says)"
    assert install("auto", fused=True) == "kernels: torch (fused layers bring their own)"
    assert install("auto") == "kernels: torch (Triton does not run on cpu)"
    with pytest.raises(ModelError, match="run fused"):
        install("liger", fused=True)
    with pytest.raises(DeviceError, match="Triton"):
        install("liger")
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if "liger" in name else name)
    assert "not installed: pip install" in install("auto", device=torch.device("cuda"))
    no_norms, _ = composed(tmp_path, text="gpt2")
    with pytest.raises(ModelError, match="no norm or gated MLP"):
        install_kernels(no_norms, wanted="liger", fused=False, device=CPU, ops=TorchOps())


@gpu
@needs_cuda
@pytest.mark.parametrize("text", ["llama", "qwen3", "gemma2", "granite", "olmo2"])
@pytest.mark.parametrize("tune", TUNES)
def test_gpu_liger_equals_transformers(tmp_path: Path, text: str, tune: str) -> None:
    pytest.importorskip("liger_kernel")
    results = []
    for swapped in (False, True):
        model, facts = composed(tmp_path, text=text)
        apply_tuning(model, TuneConfig.model_validate(TUNES[tune]), seed=0)
        model.cuda().eval()
        if swapped:
            done = install_kernels(
                model, wanted="auto", fused=False, device=torch.device("cuda"), ops=LigerOps()
            )
            assert done.name == "liger" and "as they are" not in done.reason
        packed = {
            name: value.cuda() if isinstance(value, Tensor) else value
            for name, value in row(facts).packed.items()
        }
        # Convolutions round to TF32 by default.
        with torch.backends.cudnn.flags(allow_tf32=False):
            logits = model.logits(model.hidden_states(**packed)[0])
            logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((logits.detach(), gradients))
    # fp32: sums in another order.
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert gradient is not None and other is not None
        assert float((gradient - other).abs().max()) <= 1e-4 * max(1.0, float(gradient.abs().max()))
