"""What of a run waits in the host's memory."""

from __future__ import annotations

from vistune.recipe.base import Section


class OffloadConfig(Section):
    """What waits in the host's page-locked memory, so that a small card has room; never guessed."""

    activations: bool = False
    """Keep the inputs of recomputed layers (`train.checkpoint_layers`) on the host between forward
    and backward pass. They travel beside the arithmetic; the numbers stay the same."""
    optimizer: bool = False
    """Keep AdamW's state on the host: 8 bytes for each trained weight. It visits the device piece
    by piece at each update; the numbers stay the same. Torch rounds page-locked memory up, so that
    the host may need up to twice as much."""
