"""Looks up the tokens that stand for images, and around them, in a model's own tokenizer."""

from __future__ import annotations

from typing import Any

from vistune.errors import ModelError


def token_id(tokenizer: Any, text: str) -> int:
    """Returns the id of a text that has to be one token.

    Args:
        tokenizer: The model's tokenizer.
        text: Such as `<row_1_col_1>`.

    Raises:
        ModelError: The tokenizer splits it.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(
            f"the tokenizer does not have {text!r}, which stands for an image or around one",
            where="tokenizer.json",
            got=f"{len(ids)} tokens",
            expected="one token",
            fix="use the tokenizer that the model was published with",
        )
    return int(ids[0])


def image_token_id(config: Any, tokenizer: Any, text: str) -> int:
    """Returns the id at whose places image embeddings go, once it is known to be usable.

    Args:
        config: The model's config, with `image_token_id`.
        tokenizer: The model's tokenizer.
        text: What its chat template writes for an image.

    Raises:
        ModelError: Config and tokenizer disagree, or the embedding table has no such row.
    """
    found, said = token_id(tokenizer, text), int(config.image_token_id)
    if found != said:
        raise ModelError(
            f"config and tokenizer disagree on the id of {text!r}",
            where="config.json: image_token_id",
            got=said,
            expected=found,
            fix="use the tokenizer that the model was published with",
        )
    rows = int(config.get_text_config().vocab_size)
    if said >= rows:
        raise ModelError(
            f"the embedding table ends before the image token {text!r}, and transformers looks it"
            " up there",
            where="config.json: image_token_id",
            got=said,
            expected=f"less than vocab_size {rows:,}",
            fix="resize the embeddings with transformers and save the model again",
        )
    return said


def between(tokenizer: Any, mark: str, text: str) -> list[int]:
    """Returns the ids of a text that stands between two special tokens.

    Args:
        tokenizer: The model's tokenizer.
        mark: A special token.
        text: Such as a line break; some tokenizers write it otherwise where it stands first.
    """
    ids: list[int] = tokenizer.encode(f"{mark}{text}{mark}", add_special_tokens=False)
    return ids[1:-1]


def size_px(processor: Any, name: str, key: str, *, default: int) -> int:
    """Returns a length from one of the nested values of an image processor's file.

    Args:
        processor: The values of the file.
        name: Such as `size`.
        key: Such as `longest_edge`.
        default: What the public image processor takes where the file says nothing.

    Raises:
        ModelError: The value is there and has no such key.
    """
    values = processor.get(name)
    if values is None:
        return default
    if not isinstance(values, dict) or key not in values:
        raise ModelError(
            f"the image processor's {name} is not given by its {key}",
            where=f"preprocessor_config.json: {name}",
            got=values,
            expected=f"a {key}",
        )
    return int(values[key])
