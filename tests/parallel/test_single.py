import pytest
import torch

from vistune.errors import CheckpointError
from vistune.parallel import SingleProcess


def factory(module):
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    named = dict(module.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [named[name] for name in names],
                "names": names,
                "lr": 0.1,
                "peak_lr": 0.1,
            }
        ]
    )


def net():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    module[0].requires_grad_(False)
    return module


def one_step(strategy, module, seed, lr_factor=0.5):
    torch.manual_seed(seed)
    with strategy.no_sync(last=True):
        strategy.backward(module(torch.randn(5, 3)).pow(2).sum())
    norm = strategy.clip_grad_norm(1.0)
    strategy.step(lr_factor=lr_factor)
    return float(norm)


def test_state_goes_on_exactly():
    whole, module = SingleProcess(), net()
    module = whole.prepare(module, factory)
    for seed in range(2):
        one_step(whole, module, seed)
    state = whole.state()
    assert set(state.weights) == set(state.optimizer) == {"1.weight", "1.bias"}
    assert set(state.optimizer["1.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    fresh, again = SingleProcess(), net()
    again.load_state_dict(module.state_dict())
    again = fresh.prepare(again, factory, restored=state.optimizer)
    assert one_step(whole, module, 7) == one_step(fresh, again, 7)
    assert torch.equal(module[1].weight, again[1].weight)
    # A state is a copy: going on has not changed it.
    assert not torch.equal(state.weights["1.weight"], module[1].weight)


def test_skipping_clears_gradients_and_changes_nothing():
    strategy, module = SingleProcess(), net()
    module = strategy.prepare(module, factory)
    before = module[1].weight.detach().clone()
    one_step(strategy, module, 0, lr_factor=None)
    assert torch.equal(before, module[1].weight) and module[1].weight.grad is None
    assert not strategy.state().optimizer


def test_learning_rate_is_the_factor_of_the_peak():
    strategy, module = SingleProcess(), net()
    strategy.prepare(module, factory)
    one_step(strategy, module, 0, lr_factor=0.25)
    assert strategy.optimizer.param_groups[0]["lr"] == 0.025


def test_state_of_other_parameters_is_refused():
    strategy, module = SingleProcess(), net()
    strategy.prepare(module, factory)
    one_step(strategy, module, 0)
    state = strategy.state().optimizer
    wrong_names = {f"x.{name}": entries for name, entries in state.items()}
    with pytest.raises(CheckpointError, match="not that of the parameters"):
        SingleProcess().prepare(net(), factory, restored=wrong_names)
    wrong_shape = state | {"1.weight": {**state["1.weight"], "exp_avg": torch.zeros(2, 9)}}
    with pytest.raises(CheckpointError, match="another shape"):
        SingleProcess().prepare(net(), factory, restored=wrong_shape)
