"""Connectors: small networks from a tower's features to a language model's embeddings.

Parameter names are LLaVA's: an MLP is a sequence with its linear layers at 0, 2, 4, ...; a single
linear layer has none of it.
"""

from __future__ import annotations

import torch
from torch import nn

from vistune.errors import ModelError


def build_connector(kind: str, *, num_in: int, num_out: int) -> nn.Module:
    """Builds a connector with fresh weights.

    Args:
        kind: `linear`, `identity` or `mlp{N}x_gelu`.
        num_in: Width of the features.
        num_out: Width of the language model.

    Raises:
        ModelError: `identity` between unequal widths, or an unknown kind.

    Source: LLaVA-1.5's projectors (exact GELU, biases on).
    """
    if kind == "identity":
        if num_in != num_out:
            raise ModelError(
                "an identity connector needs equal widths",
                where="model.connector.kind",
                got=f"features of {num_in}, embeddings of {num_out}",
                fix="set model.connector.kind=mlp2x_gelu",
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(num_in, num_out)
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{depth}x_gelu" or not depth.isdigit() or int(depth) < 1:
        raise ModelError(
            f"unknown connector '{kind}'",
            where="model.connector.kind",
            expected="linear, identity, mlp{N}x_gelu",
        )
    layers: list[nn.Module] = [nn.Linear(num_in, num_out)]
    for _ in range(int(depth) - 1):
        layers += [nn.GELU(), nn.Linear(num_out, num_out)]
    return nn.Sequential(*layers)


def initialise_connector(connector: nn.Module, *, seed: int) -> None:
    """Gives a connector weights that depend on `seed` alone (torch's default for linear layers)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in connector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def last_linear(connector: nn.Module) -> nn.Linear | None:
    """Returns the layer whose output the connector's output is, or None for `identity`."""
    linears = [module for module in connector.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None
