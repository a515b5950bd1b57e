"""Attention over packed rows: one interface, several ways of computing it, chosen by name."""

from vistune.models.attention.ahead import (
    ahead_mask,
    reach_of_prefixes,
    reach_of_runs,
    register_ahead_attention,
)
from vistune.models.attention.auto import AUTO, attend_packed, attend_tail, backend_of
from vistune.models.attention.contract import Backend, Packing, Scoring
from vistune.models.attention.interface import (
    PACKED_ATTENTION,
    packed_attention,
    packing_mask,
    register_packed_attention,
)
from vistune.models.attention.patches import is_patch_name, register_patch_attention

__all__ = [
    "AUTO",
    "PACKED_ATTENTION",
    "Backend",
    "Packing",
    "Scoring",
    "ahead_mask",
    "attend_packed",
    "attend_tail",
    "backend_of",
    "is_patch_name",
    "packed_attention",
    "packing_mask",
    "reach_of_prefixes",
    "reach_of_runs",
    "register_ahead_attention",
    "register_packed_attention",
    "register_patch_attention",
]
