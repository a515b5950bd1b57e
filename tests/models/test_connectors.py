from __future__ import annotations

import pytest
import torch
from torch import nn

from vistune.errors import ModelError
from vistune.models.connectors import build_connector, initialise_connector


@pytest.mark.parametrize(
    ("width", "expected"), [(4096, 20_979_712), (5120, 31_467_520), (2048, 6_295_552)]
)
def test_llava_sizes(width: int, expected: int) -> None:
    with torch.device("meta"):
        connector = build_connector("mlp2x_gelu", num_in=1024, num_out=width)
    assert sum(p.numel() for p in connector.parameters()) == expected


def test_parameter_names_are_llavas() -> None:
    names = {
        kind: [n for n, _ in build_connector(kind, num_in=4, num_out=6).named_parameters()]
        for kind in ("linear", "mlp1x_gelu", "mlp3x_gelu")
    }
    assert names == {
        "linear": ["weight", "bias"],
        "mlp1x_gelu": ["0.weight", "0.bias"],
        "mlp3x_gelu": ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
    }


def test_gelu_is_exact() -> None:
    connector = build_connector("mlp2x_gelu", num_in=4, num_out=4)
    assert isinstance(connector, nn.Sequential)
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(connector[1](x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))


def test_seed_decides_the_weights_and_nothing_else() -> None:
    def weights(seed: int) -> torch.Tensor:
        connector = build_connector("mlp2x_gelu", num_in=4, num_out=4)
        before = torch.random.get_rng_state()
        initialise_connector(connector, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return nn.utils.parameters_to_vector(connector.parameters()).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_identity() -> None:
    assert not list(build_connector("identity", num_in=4, num_out=4).parameters())
    with pytest.raises(ModelError, match="equal widths"):
        build_connector("identity", num_in=4, num_out=6)
    with pytest.raises(ModelError, match="unknown connector"):
        build_connector("mlp0x_gelu", num_in=4, num_out=6)
