"""Dataset formats, one file each, behind one way to read a row."""

from __future__ import annotations

import functools

from vistune.data.formats import (
    alpaca,
    data_juicer,
    llava,
    messages,
    sharegpt,
    visualglm,
    xtuner,
)
from vistune.data.formats.base import RowReader, RowReaderFactory
from vistune.data.formats.captions_csv import CaptionsCsvReader
from vistune.data.formats.coco_captions import CocoCaptionsReader
from vistune.data.formats.cogvlm_sft import CogvlmSftReader
from vistune.data.formats.image_folder import ImageFolderReader
from vistune.data.formats.json_rows import JsonRowReader
from vistune.data.formats.webdataset import WebDatasetReader
from vistune.recipe import SourceConfig
from vistune.registry import Registry

__all__ = ["FORMATS", "RowReader", "RowReaderFactory", "open_source"]

FORMATS: Registry[RowReaderFactory] = Registry("data format")
"""Readers by the name a recipe gives them in `data.train[].format`."""

FORMATS.register("llava")(functools.partial(JsonRowReader, interpret=llava.interpret))
FORMATS.register("sharegpt")(functools.partial(JsonRowReader, interpret=sharegpt.interpret))
FORMATS.register("messages")(functools.partial(JsonRowReader, interpret=messages.interpret))
FORMATS.register("xtuner")(functools.partial(JsonRowReader, interpret=xtuner.interpret))
FORMATS.register("alpaca")(functools.partial(JsonRowReader, interpret=alpaca.interpret))
FORMATS.register("visualglm")(functools.partial(JsonRowReader, interpret=visualglm.interpret))
FORMATS.register("data_juicer")(
    functools.partial(JsonRowReader, interpret=data_juicer.interpret, absolute_images=True)
)
FORMATS.register("coco_captions")(CocoCaptionsReader)
FORMATS.register("cogvlm_sft")(CogvlmSftReader)
FORMATS.register("webdataset")(WebDatasetReader)
FORMATS.register("image_folder")(ImageFolderReader)
FORMATS.register("captions_csv")(CaptionsCsvReader)


def open_source(config: SourceConfig) -> RowReader:
    """Opens a source: finds its rows, reads none.

    Args:
        config: The source as the recipe describes it.

    Raises:
        DataError: The file or the image folder is not there, or the file is broken as a whole.
    """
    return FORMATS.get(config.format)(config)
