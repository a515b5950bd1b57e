"""Writes a trained model in a form others read: transformers, PEFT, or vistune itself."""

from vistune.export.run import export_model

__all__ = ["export_model"]
