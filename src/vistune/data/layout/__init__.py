"""Image layouts: the token blocks and tower inputs of models that take images of any size."""

from __future__ import annotations

from typing import Any

from vistune.data.layout.anyres import AnyresLayout
from vistune.data.layout.base import ImageLayout, make_image_processor, unusual_shape
from vistune.data.layout.fixed import FixedLayout
from vistune.data.layout.onevision import OneVisionLayout
from vistune.data.layout.patches import PatchLayout
from vistune.data.layout.ratio_tiles import RatioTileLayout
from vistune.data.layout.row_breaks import RowBreakLayout
from vistune.data.layout.row_tiles import RowTileLayout
from vistune.data.layout.slices import SliceLayout
from vistune.errors import DataError

_KINDS: dict[str, type[ImageLayout]] = {
    "anyres": AnyresLayout,
    "fixed": FixedLayout,
    "onevision": OneVisionLayout,
    "patches": PatchLayout,
    "ratio_tiles": RatioTileLayout,
    "row_breaks": RowBreakLayout,
    "row_tiles": RowTileLayout,
    "slices": SliceLayout,
}


def load_layout(values: dict[str, Any]) -> ImageLayout:
    """Returns the layout that `model_dump` described.

    Args:
        values: What a checkpoint or a model's description says; `kind` names the form.

    Raises:
        DataError: There is no such form.
    """
    kind = values.get("kind")
    if kind not in _KINDS:
        raise DataError(
            "this image layout is not known",
            where="layout.kind",
            got=kind,
            expected=", ".join(_KINDS),
            fix="use the vistune version that wrote it, or a newer one",
        )
    return _KINDS[kind].model_validate(values)


__all__ = [
    "AnyresLayout",
    "FixedLayout",
    "ImageLayout",
    "OneVisionLayout",
    "PatchLayout",
    "RatioTileLayout",
    "RowBreakLayout",
    "RowTileLayout",
    "SliceLayout",
    "load_layout",
    "make_image_processor",
    "unusual_shape",
]
