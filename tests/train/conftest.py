"""A tiny real LLaVA with drawn pictures, made once for all tests of whole runs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llava import make

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, num_samples=24)
    return folder
