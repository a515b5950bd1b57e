from __future__ import annotations

import pytest
import torch

from vistune.device.transfer import Transfer
from vistune.errors import DeviceError

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_there_and_back_on_a_cpu() -> None:
    transfer = Transfer(torch.device("cpu"))
    source = torch.arange(6.0).view(2, 3)
    host = transfer.host_empty(2, 3, dtype=torch.float32)
    arrived = transfer.copy_out(source, host)
    source.zero_()
    back, ready = transfer.copy_in(host, after=arrived)
    transfer.wait(ready)
    transfer.finish()
    assert back.tolist() == [[0, 1, 2], [3, 4, 5]] and back.data_ptr() != host.data_ptr()


def test_a_device_that_shares_the_hosts_memory_is_refused() -> None:
    with pytest.raises(DeviceError, match="nowhere to move") as raised:
        Transfer(torch.device("mps"))
    assert raised.value.where == "train.offload"


@gpu
@needs_cuda
def test_gpu_copies_wait_for_the_arithmetic_and_it_for_them() -> None:
    transfer = Transfer(torch.device("cuda", 0))
    a = torch.randn(4096, 4096, device="cuda")
    expected = (a @ a @ a).cpu()
    made = a @ a @ a  # long enough that a copy that did not wait would read old memory
    host = transfer.host_empty(4096, 4096, dtype=torch.float32)
    arrived = transfer.copy_out(made, host)
    transfer.wait(arrived)
    made.zero_()
    back, ready = transfer.copy_in(host, after=arrived)
    transfer.wait(ready)
    assert torch.equal(back.cpu(), expected)
    transfer.finish()
    assert host.is_pinned() and torch.equal(host, expected)
