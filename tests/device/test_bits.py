"""The optional package for rounded numbers: one notice of it is silenced, the others are not."""

import logging
import subprocess
import sys

import pytest
import torch

from vistune.device.bits import quiet_kernel_notice, require_fp8
from vistune.errors import DeviceError


def test_one_notice_is_silenced_and_no_other(caplog):
    quiet_kernel_notice()
    quiet_kernel_notice()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from %s", "somewhere")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert len(logger.filters) == 1


@pytest.mark.slow
def test_importing_the_package_prints_nothing():
    pytest.importorskip("bitsandbytes")
    code = "from vistune.device.bits import import_bitsandbytes; import_bitsandbytes('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in done.stderr + done.stdout


def test_fp8_is_asked_of_nvidia_alone(monkeypatch):
    # An MI300 says (9, 4), which is no compute capability of NVIDIA's.
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", None)
    require_fp8(gpu)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(DeviceError, match="does not multiply FP8"):
        require_fp8(gpu)
