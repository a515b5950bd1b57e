from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_parts import composed, row
from torch import Tensor, nn

from vistune.models.fused.install import install_fused
from vistune.models.offload import IN_FLIGHT, InputStore
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")


class Counting(InputStore):
    """Counts what goes out and comes back."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.out: list[tuple[int, ...]] = []
        self.back = 0

    def _store(self, source: Tensor):  # type: ignore[no-untyped-def]
        self.out.append(tuple(source.shape))
        return super()._store(source)

    def _fetch(self, moved) -> None:  # type: ignore[no-untyped-def]
        self.back += 1
        super()._fetch(moved)


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("mode", ["lora", "freeze"])
def test_the_same_gradients_and_only_inputs_move(tmp_path: Path, fused: str, mode: str) -> None:
    gradients = []
    for offloaded in (False, True):
        model, facts = composed(tmp_path)
        language = {"mode": mode, "rank": 2} if mode == "lora" else {"mode": mode}
        apply_tuning(model, TuneConfig.model_validate({"language": language}), seed=0)
        store = Counting() if offloaded else None
        model.train()
        set_checkpoint_layers(model, 2, store=store)
        install_fused(model, mode=fused, fp8=False, num_recomputed=2)  # type: ignore[arg-type]
        if model.fused is not None:
            model.fused.store = store
        made = row(facts)
        hidden = model.hidden_states(**made.packed)
        if store is not None:
            assert [torch.Size(shape).numel() for shape in store.out] == [hidden.numel()] * 2
        model.logits(hidden[0]).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name


def stack(width: int, depth: int) -> list[nn.Sequential]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]


def chain(store: InputStore | None, x: Tensor, layers: list[nn.Sequential]) -> Tensor:
    for layer in layers:
        with nullcontext() if store is None else store.moving(x):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    return x


def test_only_the_last_inputs_stay_and_each_is_fetched_once_ahead() -> None:
    layers = stack(4, 6)
    store = Counting()
    out = chain(store, torch.randn(3, 4, requires_grad=True), layers)
    assert len(store._leaving) == IN_FLIGHT and len(store.out) == 6
    out.sum().backward()
    # The inputs that had not left need not come back.
    assert store.back == 6 - IN_FLIGHT and not store._leaving
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


def test_nothing_holds_an_input_that_has_left() -> None:
    store, x, alive = Counting(), torch.randn(3, 4, requires_grad=True), []
    for layer in stack(4, 6):
        x = chain(store, x, [layer])
        alive.append(weakref.ref(x))
    # The last one is in use; those on their way out are held as copies without a graph.
    assert [ref() is not None for ref in alive] == [False] * 5 + [True]
    assert len(store._leaving) == IN_FLIGHT


def test_a_result_saved_by_its_own_function_is_let_go() -> None:
    store, x = Counting(), torch.randn(3, 4, requires_grad=True)
    with store.moving(x):
        result = x.exp()  # saves its result
    ref = weakref.ref(result)
    del result
    assert ref() is None and store.out == []


def test_a_forward_pass_without_backward_leaves_nothing_behind() -> None:
    store = Counting()
    layers = stack(4, 5)
    chain(store, torch.randn(3, 4, requires_grad=True), layers)
    gc.collect()
    assert store._last is not None and len(store._leaving) == IN_FLIGHT
    x = torch.randn(3, 4, requires_grad=True)
    twice = chain(store, x, layers).sum()
    twice.backward(retain_graph=True)
    first = x.grad.clone()  # type: ignore[union-attr]
    twice.backward()
    assert torch.equal(x.grad, 2 * first)  # type: ignore[arg-type]


@gpu
@needs_cuda
def test_gpu_same_gradients_in_less_memory() -> None:
    width, tokens, depth = 1024, 8192, 24
    torch.manual_seed(0)
    layers = [layer.cuda() for layer in stack(width, depth)]
    x = torch.randn(tokens, width, device="cuda", requires_grad=True)
    peaks, gradients = [], []
    for offloaded in (False, True):
        for layer in layers:
            layer.zero_grad()
        x.grad = None
        store = InputStore(x.device) if offloaded else None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = chain(store, x, layers)
        out.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append([x.grad, *(p.grad for layer in layers for p in layer.parameters())])
        del out, store
    for a, b in zip(*gradients, strict=True):
        assert a is not None and torch.equal(a, b)
    each = tokens * width * 4
    # Of the inputs, which were all kept, three are left.
    assert peaks[0] - peaks[1] > (depth - 6) * each
