"""Transformers' own vision-language models, trained behind vistune's contract."""

from vistune.models.native import (
    gemma,
    idefics3,
    internvl,
    llava_onevision,
    minicpmv,
    mistral3,
    paddleocr,
    qwen,
)
from vistune.models.native.contract import NATIVE, NativeFamily
from vistune.models.native.describe import (
    describe_native,
    is_native,
    is_native_config,
    load_native,
    native_skeleton,
)
from vistune.models.native.model import NativeVLM

__all__ = [
    "NATIVE",
    "NativeFamily",
    "NativeVLM",
    "describe_native",
    "gemma",
    "idefics3",
    "internvl",
    "is_native",
    "is_native_config",
    "llava_onevision",
    "load_native",
    "minicpmv",
    "mistral3",
    "native_skeleton",
    "paddleocr",
    "qwen",
]
