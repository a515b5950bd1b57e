"""What happens beside the steps: metrics, progress, TensorBoard, sample answers.

A hook only looks: with every hook on or off, the weights come out the same.
"""

from vistune.train.hooks.base import Hook
from vistune.train.hooks.console import ConsoleHook
from vistune.train.hooks.metrics import MetricsHook
from vistune.train.hooks.samples import SampleAnswersHook
from vistune.train.hooks.tensorboard import TensorBoardHook

__all__ = ["ConsoleHook", "Hook", "MetricsHook", "SampleAnswersHook", "TensorBoardHook"]
