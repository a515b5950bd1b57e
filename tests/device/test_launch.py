"""The environment of torchrun is read once and refused where it says nothing."""

import pytest

from vistune.device.launch import Launch, launched
from vistune.errors import DeviceError


def test_what_torchrun_says():
    assert launched({}) == Launch(0, 1, 0)
    assert launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Launch(5, 8, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-1"},
    ],
)
def test_what_cannot_be(environment):
    with pytest.raises(DeviceError, match="which process"):
        launched(environment)


def test_this_process(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == Launch(1, 2, 0)
