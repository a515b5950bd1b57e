import pytest
import torch
from train_fakes import VOCABULARY, FakeVLM, groups_of, make_row

from vistune.parallel import SingleProcess
from vistune.recipe import TrainConfig
from vistune.train.optim import build_optimizer
from vistune.train.step import LossModule, backward_step


def prepared(model: FakeVLM, sources: tuple[str, ...] = ("main",), num_logits: int = 1 << 20):
    strategy = SingleProcess()
    module = LossModule(model, sources=sources, vocabulary_size=VOCABULARY, num_logits=num_logits)
    train = TrainConfig(steps=1)
    wrapped = strategy.prepare(
        module, lambda _: build_optimizer(model.named_parameters(), groups_of(model), train)
    )
    return strategy, wrapped


def step(model, rows, *, sources=("main",), clip=None, num_logits=1 << 20):
    strategy, module = prepared(model, sources, num_logits)
    return strategy, backward_step(
        strategy,
        module,
        rows,
        sources=sources,
        device=torch.device("cpu"),
        autocast_dtype=None,
        clip_norm=clip,
    )


def fresh() -> FakeVLM:
    torch.manual_seed(0)
    return FakeVLM()


def test_loss_is_divided_by_the_targets_of_the_whole_step():
    rows = [make_row((7, 4), seed=0), make_row((9,), seed=1)]
    model = fresh()
    _, sums = step(model, rows)
    expected, count = 0.0, 0
    for row in rows:
        hidden_BTD = model.hidden_states(
            input_ids_BT=row.input_ids_BT,
            position_ids_BT=row.position_ids_BT,
            cu_seqlens=row.cu_seqlens,
            max_seqlen=row.max_seqlen,
            pixel_values_NCYX=row.pixel_values_NCYX,
        )
        log_p = model.logits(hidden_BTD[0, row.target_index_M]).log_softmax(-1)
        expected -= log_p.gather(1, row.target_ids_M[:, None]).sum().item()
        count += row.num_targets
    assert sums.num_targets == count == 8
    assert sums.loss == pytest.approx(expected / count, rel=1e-6)
    assert (sums.num_samples, sums.num_tokens, sums.num_image_tokens) == (3, 20, 2)


def test_two_rows_equal_their_samples_one_by_one():
    """The fake model keeps samples apart, so cutting a step differently must change nothing."""
    long, short = make_row((9,), seed=1), make_row((7,), seed=2)
    one, two = fresh(), fresh()
    _, together = step(one, [long, short])
    _strategy, module = prepared(two)
    total = long.num_targets + short.num_targets
    for row in (long, short):
        loss_sum, _ = module(row, None)
        (loss_sum / total).backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    norm = torch.nn.utils.get_total_norm(
        [dict(two.named_parameters())[n].grad for g in groups_of(two) for n in g.names]
    )
    # The fused loop reads float32 numbers: equal to its precision.
    assert together.grad_norm == pytest.approx(float(norm), rel=1e-6)


def test_loss_and_counts_per_source():
    rows = [make_row((7, 4), seed=0, sources=("a", "b")), make_row((9,), seed=1, sources=("a",))]
    _, sums = step(fresh(), rows, sources=("a", "b", "unused"))
    assert sums.targets_per_source == {"a": 7, "b": 1, "unused": 0}
    assert sums.tokens_per_source == {"a": 16, "b": 4, "unused": 0}
    assert sums.samples_per_source == {"a": 2, "b": 1, "unused": 0}
    assert (sums.num_targets, sums.num_tokens, sums.num_samples) == (8, 20, 3)
    assert set(sums.loss_per_source) == {"a", "b"}
    weighted = (7 * sums.loss_per_source["a"] + sums.loss_per_source["b"]) / 8
    assert sums.loss == pytest.approx(weighted)
    _, single = step(fresh(), rows[:1] + rows[1:], sources=("a", "b", "unused"), num_logits=40)
    # One target per chunk: the same loss up to the order of the sum.
    assert single.loss == pytest.approx(sums.loss, rel=1e-6)


def test_row_without_targets_touches_the_weights_with_zero():
    row = make_row((7, 4), seed=0)
    row.target_index_M = row.target_index_M[:0]
    row.target_ids_M = row.target_ids_M[:0]
    row.target_sample_M = row.target_sample_M[:0]
    model = fresh()
    _, sums = step(model, [row])
    assert sums.num_targets == 0 and sums.loss == 0.0
    for parameter in (model.connector.weight, model.embedding.weight, model.head.weight):
        assert parameter.grad is not None and not parameter.grad.any()


def test_clipping():
    rows = [make_row((7, 4), seed=0)]
    free, clipped = fresh(), fresh()
    _strategy, sums = step(free, rows)
    limit = sums.grad_norm / 4
    clipped_strategy, same = step(clipped, rows, clip=limit)
    assert same.grad_norm == sums.grad_norm  # reported before clipping
    # clip_grad_norm adds 1e-6 to the norm it divides by, hence the tolerance.
    assert float(clipped_strategy.clip_grad_norm(None)) == pytest.approx(limit, rel=1e-4)


def test_nothing_waits_for_the_device_between_rows(monkeypatch):
    """The step reads numbers back only at its end: all backward passes come first."""
    order: list[str] = []
    strategy, module = prepared(fresh())
    backward = strategy.backward
    monkeypatch.setattr(strategy, "backward", lambda x: (order.append("backward"), backward(x))[1])
    monkeypatch.setattr("vistune.train.step._read", lambda *args: order.append("read"))
    rows = [make_row((7,), seed=n) for n in range(3)]
    backward_step(
        strategy,
        module,
        rows,
        sources=("main",),
        device=torch.device("cpu"),
        autocast_dtype=None,
        clip_norm=1.0,
    )
    assert order == ["backward"] * 3 + ["read"]
