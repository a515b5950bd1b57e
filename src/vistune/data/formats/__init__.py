"""Dataset formats, one file each, behind one way to read a row."""

from __future__ import annotations

from vistune.data.formats.base import RowReader, RowReaderFactory
from vistune.data.formats.llava import LlavaReader
from vistune.recipe import SourceConfig
from vistune.registry import Registry

__all__ = ["FORMATS", "RowReader", "RowReaderFactory", "open_source"]

FORMATS: Registry[RowReaderFactory] = Registry("data format")
"""Readers by the name a recipe gives them in `data.train[].format`."""

FORMATS.register("llava")(LlavaReader)


def open_source(config: SourceConfig) -> RowReader:
    """Opens a source: finds its rows, reads none.

    Args:
        config: The source as the recipe describes it.

    Raises:
        DataError: The file or the image folder is not there, or the file is broken as a whole.
    """
    return FORMATS.get(config.format)(config)
