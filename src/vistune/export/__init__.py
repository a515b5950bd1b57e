"""Writes a trained model in a form others read: transformers, PEFT, or vistune itself."""

from vistune.export.next_step import next_step
from vistune.export.run import export_model

__all__ = ["export_model", "next_step"]
