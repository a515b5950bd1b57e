"""What an index was made of, as one short name: another file or another tokenizer, another index.

A dataset file counts by its size, its time of change and samples of its content (64 blocks of
4 KiB from one end to the other): reading all of a file of gigabytes would take longer than what is
saved, and a change that leaves size, time and every sample as they were is no accident. Image
files are not part of it: whether they are still there is seen when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from vistune.data.cache import file_mark
from vistune.data.encode import Encoder
from vistune.data.formats.paths import files_of
from vistune.recipe import SourceConfig

_LAYOUT = 2
"""Raised when what stands in an index changes."""


def source_key(source: SourceConfig, encoder: Encoder, *, deep: bool) -> str:
    """Returns the name of the index of a source as an encoder sees it.

    Args:
        source: The source; how often it is seen does not matter.
        encoder: How rows become tokens.
        deep: Whether images were decoded.
    """
    content = {
        "layout": _LAYOUT,
        "file": [file_mark(path) for path in files_of(source.path)],
        "path": os.path.realpath(source.path),
        "images": source.images and os.path.realpath(source.images),
        "source": source.model_dump(
            mode="json", exclude={"path", "images", "epochs", "weight", "max_samples"}
        ),
        "encoder": encoder.to_state(),
        "tokenizer": tokenizer_mark(encoder.tokenizer),
        "deep": deep,
    }
    return short_hash(content)


def short_hash(content: Any) -> str:
    """Returns a file name for a value of JSON's types."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def tokenizer_mark(tokenizer: Any) -> str:
    """Returns a hash of all that decides a tokenizer's ids."""
    state = tokenizer.backend_tokenizer.to_str()
    special = sorted(map(str, tokenizer.all_special_tokens))
    return hashlib.blake2b(f"{state}\0{special}".encode(), digest_size=16).hexdigest()
