import pytest
import torch
import torch.nn.functional as F

from vistune.train.loss import target_nll


@pytest.mark.parametrize("chunk_targets", [1, 4, 10, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk_targets):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, dtype=torch.float64)
    hidden_MD = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    ids_M = torch.randint(0, 50, (10,))
    expected = F.cross_entropy(head(hidden_MD).float(), ids_M, reduction="none")
    wanted = torch.autograd.grad(expected.sum(), [hidden_MD, head.weight])
    nll_M = target_nll(hidden_MD, ids_M, head, chunk_targets=chunk_targets)
    assert nll_M.dtype == torch.float32
    got = torch.autograd.grad(nll_M.sum(), [hidden_MD, head.weight])
    torch.testing.assert_close(nll_M, expected)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_all_logits_are_never_held_at_once():
    widths: list[int] = []

    def head(hidden_MD: torch.Tensor) -> torch.Tensor:
        widths.append(hidden_MD.shape[0])
        return hidden_MD @ torch.ones(4, 9)

    hidden_MD = torch.randn(10, 4, requires_grad=True)
    target_nll(
        hidden_MD, torch.zeros(10, dtype=torch.int64), head, chunk_targets=3
    ).sum().backward()
    assert max(widths) == 3


def test_half_precision_logits_are_summed_in_float32():
    head = torch.nn.Linear(8, 50, dtype=torch.bfloat16)
    hidden_MD = torch.randn(3, 8, dtype=torch.bfloat16)
    nll_M = target_nll(hidden_MD, torch.tensor([1, 2, 3]), head, chunk_targets=2)
    assert nll_M.dtype == torch.float32
