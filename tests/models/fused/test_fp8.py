"""A trunk in FP8 stays close to the bf16 trunk, in values, gradients and generation."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

from vistune.models.fused import fp8, torch_ops
from vistune.models.fused.fp8 import Fp8Weight, largest_channels, num_channels, num_rounded
from vistune.models.fused.torch_ops import Operand
from vistune.models.fused.trunk import fuse
from vistune.models.memory import frozen_bytes

NO_GPU = not torch.cuda.is_available()


def multiplies_on_cpu():
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                not multiplies_on_cpu(), reason="this torch does not multiply FP8 on a CPU"
            ),
        ),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")],
        ),
    ]
)
def device(request):
    return torch.device(request.param)


def build(device, *, loud=()):
    """A small Llama in bf16; the channels `loud` of what its projections read are large."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[list(loud)] = 20.0
    return model.to(device, torch.bfloat16)


def run(trunk, x):
    device = x.device
    cu = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(40), torch.arange(56)])[None].to(device)
    leaf = x.clone().requires_grad_()
    out = trunk.hidden_states(leaf, positions, cu_seqlens=cu, max_seqlen=56)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(device)
    (grad,) = torch.autograd.grad((out.float() * weight).sum(), leaf)
    return out, grad


def drawn(device):
    torch.manual_seed(1)
    return torch.randn(1, 96, 512).to(device, torch.bfloat16)


def errors(expected, found):
    pairs = zip(expected, found, strict=True)
    return [((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in pairs]


def test_it_is_near_bf16_both_ways_and_frees_the_weights(device):
    x = drawn(device)
    exact = run(fuse(build(device).model, device=device), x)
    model = build(device)
    *rounded_layers, last = model.model.layers
    before = sum(p.numel() for layer in rounded_layers for p in layer.parameters())
    rounded = run(fuse(model.model, device=device, fp8=True), x)
    # e4m3 keeps 4 bits, so a product is off by about 4 %; beside residuals of unit size the layers
    # add little to the row (about 1 % computed).
    assert max(errors(exact, rounded)) <= 0.02
    assert sum(p.numel() for layer in rounded_layers for p in layer.parameters()) < before / 100
    assert isinstance(last.mlp.down_proj, torch.nn.Linear)


def test_the_decoder_generates_with_fp8_weights(device):
    model = build(device)
    ids = torch.arange(12, device=device)[None]
    with torch.no_grad():
        expected = model(ids).logits.float()
        fuse(model.model, device=device, fp8=True)
        found = model(ids).logits.float()
    # Embeddings of size 0.02 add nothing to the layers' own 4 % a product.
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_large_channels_are_found_and_lose_little(device, monkeypatch):
    loud, x = range(0, 512, 40), drawn(device)
    exact = run(fuse(build(device, loud=loud).model, device=device), x)
    trunk = fuse(build(device, loud=loud).model, device=device, fp8=True)
    for layer in trunk.layers[:-1]:
        for projection in (layer.qkv, layer.gate_up):
            assert set(loud) <= set(projection.channels.tolist())
    value, gradient = errors(exact, run(trunk, x))
    monkeypatch.setattr(fp8, "CHANNELS", 0)
    plain = fuse(build(device, loud=loud).model, device=device, fp8=True)
    plain_value, plain_gradient = errors(exact, run(plain, x))
    assert value < 0.7 * plain_value and gradient < 0.8 * plain_gradient


def test_what_is_held_twice_is_nearly_exact(device):
    torch.manual_seed(2)
    x, weight = torch.zeros(64, 256), torch.randn(128, 256)
    channels = torch.tensor([3, 50, 51, 77, 128, 200, 254, 255])
    x[:, channels] = torch.randn(64, 8) * 10.0 ** torch.arange(-3, 1).repeat(2)
    x, weight = x.to(device, torch.bfloat16), weight.to(device, torch.bfloat16)
    exact = x.float() @ weight.float().t()
    for held, least, most in ((channels, 0.0, 0.004), (None, 0.02, 0.06)):
        index = None if held is None else held.to(device, torch.int32)
        found = Fp8Weight.of(weight, index, torch_ops).product(Operand(x), torch_ops)
        (error,) = errors([exact], [found])
        assert least < error < most  # bf16 results alone: 0.2 %


def test_the_channels_are_the_base_models_whatever_its_adapters_are(device):
    found = []
    for scale in (None, 0.0, 1.0):
        model = build(device, loud=(1, 7))
        if scale is not None:
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            inject_adapter_in_model(config, model)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = scale * parameter.data.float()
        trunk = fuse(model.model, device=device, fp8=True)
        layers = trunk.layers[:-1]
        found.append([p.channels for a in layers for p in (a.qkv, a.out, a.gate_up, a.down)])
    for channels in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], channels, strict=True))


def test_adapters_drop_the_same_beside_fp8(device):
    x = drawn(device)

    def gradients(*, seed, fp8):
        model = build(device)
        config = LoraConfig(r=8, lora_dropout=0.3, target_modules="all-linear")
        inject_adapter_in_model(config, model)
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        draw = torch.Generator().manual_seed(2)
        for parameter in adapters:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=draw)).to(device)
        trunk = fuse(model.model.train(), device=device, fp8=fp8)
        cu = torch.tensor([0, 96], dtype=torch.int32, device=device)
        torch.manual_seed(seed)
        leaf, positions = x.clone().requires_grad_(), torch.arange(96, device=device)[None]
        out = trunk.hidden_states(leaf, positions, cu_seqlens=cu, max_seqlen=96)
        weight = torch.randn(out.shape, generator=draw).to(device)
        return [out, *torch.autograd.grad((out.float() * weight).sum(), [leaf, *adapters])]

    exact = gradients(seed=7, fp8=False)
    same = errors(exact, gradients(seed=7, fp8=True))
    other = errors(exact, gradients(seed=8, fp8=True))
    assert max(same) < 0.12 < 0.5 < min(other)  # measured: 0.07 and 0.8


def test_the_largest_channels():
    squares = torch.zeros(256)
    squares[::30] = 1 + torch.arange(9.0)
    found = largest_channels(squares)
    assert found.dtype is torch.int32 and len(found) == num_channels(256) == 32
    assert found.tolist() == sorted(found.tolist()) and set(range(0, 256, 30)) <= set(
        found.tolist()
    )
    assert [num_channels(n) for n in (32, 64, 576, 4096)] == [0, 8, 64, 64]
    assert largest_channels(squares[:32]) is None


def test_the_last_layers_stay_as_they_are():
    assert [n - num_rounded(n) for n in (1, 3, 18, 28, 32, 40, 80)] == [1, 1, 1, 2, 2, 2, 5]


def test_the_planner_counts_what_is_held(device):
    model = build(device)
    layer = model.model.layers[0]
    linear = [m.weight for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    counted = sum(frozen_bytes(weight, "fp8") for weight in linear)
    fused = fuse(model.model, device=device, fp8=True).layers[0]
    held = 0
    for projection in (fused.qkv, fused.out, fused.gate_up, fused.down):
        weight = projection.fp8
        held += sum(t.nbytes for t in (weight.values_OJ, weight.values_IO, weight.scale_O))
    assert held == counted
    assert layer.mlp.down_proj.values_OJ.data_ptr() == fused.down.fp8.values_OJ.data_ptr()
