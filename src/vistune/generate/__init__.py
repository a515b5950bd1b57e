"""Answers from a model: batched, streamed, or chosen among given ones. It loads nothing."""

from vistune.generate.decode import Prompt, generate, stream
from vistune.generate.score import score_choices

__all__ = ["Prompt", "generate", "score_choices", "stream"]
