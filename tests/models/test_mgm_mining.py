"""Mining in the absorbed form against keys and values of every position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mgm_case import RUNS, expanded, load_arrays, load_model
from torch import Tensor

from vistune.models.mgm.mining import PatchInfoMining, windows

# The same sums in float32 in another order.
CLOSE = 1e-5
LOW, HIGH = 24, 40


class PerPosition(PatchInfoMining):
    """MGM's own formula: a key and a value for every position of the map."""

    def forward(self, low_NPC: Tensor, maps_NCYX: Tensor) -> Tensor:
        window_NPWC = windows(maps_NCYX, num_patches=low_NPC.shape[1])
        query = self.query(low_NPC)[:, :, None]
        found = F.scaled_dot_product_attention(
            query, self.key(window_NPWC), self.value(window_NPWC)
        )
        return found[:, :, 0]


def drawn(*, seed: int = 0) -> PatchInfoMining:
    """A mining none of whose parameters is 0 or 1."""
    torch.manual_seed(seed)
    mining = PatchInfoMining(LOW, HIGH)
    with torch.no_grad():
        for parameter in mining.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        # Windows must differ in what they weigh most, or the softmax would not be seen.
        mining.key[1].weight.mul_(4.0)
    return mining


def per_position(mining: PatchInfoMining) -> PerPosition:
    reference = PerPosition(LOW, HIGH)
    reference.load_state_dict(mining.state_dict())
    return reference


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features of 2 x 9 patches and maps of 12 x 12, whose channels differ in mean and scale."""
    low, maps = torch.randn(2, 9, LOW), torch.randn(2, HIGH, 12, 12)
    scale, offset = torch.rand(2, 1, HIGH, 1, 1) + 0.5
    return low.to(dtype), (maps * scale + offset).to(dtype)


def differs(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("trained_map", [True, False])
def test_values_and_every_gradient_equal_keys_and_values_of_every_position(
    trained_map: bool,
) -> None:
    mining = drawn()
    reference = per_position(mining)
    low, maps = inputs()
    upstream = torch.randn(2, 9, LOW)
    found = {}
    for name, module in (("ours", mining), ("theirs", reference)):
        low_leaf = low.clone().requires_grad_()
        maps_leaf = maps.clone().requires_grad_(trained_map)
        out = module(low_leaf, maps_leaf)
        out.backward(upstream)
        found[name] = {"out": out, "low": low_leaf.grad, "maps": maps_leaf.grad}
        found[name] |= {n: p.grad for n, p in module.named_parameters()}
    # What moves all scores of a window alike: rounding there, exactly nothing here.
    for name in ("key.0.bias", "key.1.bias"):
        assert found["ours"][name] is not None and not found["ours"][name].any()
        beside = found["theirs"][name.replace("bias", "weight")]
        assert found["theirs"][name].abs().max() < CLOSE * beside.abs().max()
    for name, expected in found["theirs"].items():
        if expected is None:
            assert name == "maps" and not trained_map and found["ours"][name] is None
        elif not name.startswith("key.") or not name.endswith("bias"):
            assert differs(found["ours"][name], expected) < CLOSE, name


def test_bf16_is_as_exact_as_keys_and_values_of_every_position() -> None:
    """As training runs: fp32 weights, bf16 features and maps, autocast; fp32 is the truth."""
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(6):
        mining = drawn(seed=seed)
        low, maps = inputs(torch.bfloat16)
        upstream = torch.randn(2, 9, LOW)
        truth = gradients(per_position(mining), low.float(), maps.float(), upstream, half=False)
        for name, module in (("ours", mining), ("theirs", per_position(mining))):
            for what, tensor in gradients(module, low, maps, upstream, half=True).items():
                error = differs(tensor, truth[what])
                errors.setdefault(what, {}).setdefault(name, []).append(error)
    for what, by_form in errors.items():
        ours, theirs = (sum(by_form[form]) for form in ("ours", "theirs"))
        # Both round as often; sums of a few draws differ by chance.
        assert ours < 1.2 * theirs, (what, by_form)


def gradients(
    module: PatchInfoMining, low: Tensor, maps: Tensor, upstream: Tensor, *, half: bool
) -> dict[str, Tensor]:
    """What a module finds, and the gradients that are not zero."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        out = module(low, maps)
    names = [n for n, _ in module.named_parameters() if n not in ("key.0.bias", "key.1.bias")]
    parameters = [module.get_parameter(n) for n in names]
    found = torch.autograd.grad(out, parameters, upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("tower", [True, False], ids=["tower trained", "tower frozen"])
@pytest.mark.parametrize("run", RUNS)
def test_a_whole_model_learns_the_same(run: str, tower: bool) -> None:
    arrays = load_arrays(run)
    found = []
    for kind in (PatchInfoMining, PerPosition):
        model = load_model(run)
        mining = model.connector.mining
        model.connector.mining = kind(mining.query[1].out_features, mining.key[1].in_features)
        model.connector.mining.load_state_dict(mining.state_dict())
        model.requires_grad_(False)
        model.connector.requires_grad_(True)
        model.vision_tower_aux.requires_grad_(tower)
        rows = expanded(model, arrays)
        out = model(rows.ids, pixel_values=rows.pixels, attention_mask=rows.mask)
        labels = arrays["spliced_labels"][:, 1:].flatten()
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, ours), (expected_loss, theirs) = found
    assert float(loss) == pytest.approx(float(expected_loss), rel=CLOSE)
    assert {n for n, g in ours.items() if g is not None} == {
        n for n, g in theirs.items() if g is not None
    }
    for name, expected in theirs.items():
        if expected is None or name in (
            "connector.mining.key.0.bias",
            "connector.mining.key.1.bias",
        ):
            continue
        assert differs(ours[name], expected) < CLOSE, name
