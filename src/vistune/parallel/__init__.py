"""How one optimizer step is spread over processes. Knows modules and optimizers, no models."""

from vistune.parallel.single import SingleProcess
from vistune.parallel.strategy import OptimizerFactory, OptimizerState, Strategy, StrategyState
from vistune.parallel.world import World

__all__ = [
    "OptimizerFactory",
    "OptimizerState",
    "SingleProcess",
    "Strategy",
    "StrategyState",
    "World",
]
