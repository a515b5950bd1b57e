"""A fast tokenizer from a sentencepiece file, for directories that hold nothing newer.

Llama's kind: byte-pair merges, blanks written as `▁`. The ids are proved against sentencepiece
itself when the tokenizer is built. Transformers' own classes give others: for some types of models
it leaves out the blank in front of a text, and it merges runs of blanks in another order.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from vistune.errors import ModelError

PIECES_NAME = "tokenizer.model"
_SETTINGS_NAME = "tokenizer_config.json"
_SPECIAL_NAME, _ADDED_NAME = "special_tokens_map.json", "added_tokens.json"
_FAST_NAME = "tokenizer.json"
_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_BPE = 2
_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4
_SPACE = "▁"
_PROBES = (
    "hello",
    " a  b ",
    "line\n\nline\ttab",
    "你好，世界 12.5",
    "def f(x):\n    return x",
    "☃é",
)


def fast_from_pieces(folder: Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a directory that holds a sentencepiece file.

    Args:
        folder: Holds `tokenizer.model` and, as a rule, `tokenizer_config.json`, of which the
            added tokens, the names of special tokens, the chat template and `legacy` are read:
            whether a text behind a special token is one of its own, with a blank in front.

    Raises:
        ModelError: The file is missing, of another kind, or its ids cannot be reproduced.
    """
    path = folder / PIECES_NAME
    if not path.is_file():
        raise ModelError(
            "the model directory has no tokenizer",
            where=str(folder),
            expected=f"tokenizer.json or {PIECES_NAME}",
            fix="put the tokenizer's files beside the weights",
        )
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own kind of error differs between its versions
        raise ModelError("the tokenizer cannot be read", where=str(path), got=error) from error
    _check(proto, where=str(path))
    settings = {**_settings(folder, _SPECIAL_NAME), **_set(_settings(folder, _SETTINGS_NAME))}
    added = _added_tokens(settings, where=str(folder / _SETTINGS_NAME))
    added |= {index: name for name, index in _settings(folder, _ADDED_NAME).items()}
    backend = _backend(proto, added, where=str(folder), legacy=bool(settings.get("legacy", True)))
    bos, eos, unk = (_piece(proto, index) for index in _special_ids(proto))
    bos, eos = _name(settings, "bos_token", bos), _name(settings, "eos_token", eos)
    if settings.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=_name(settings, "pad_token", eos),
        chat_template=settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
    )
    _prove(backend, path, added)
    return tokenizer


def _check(proto: Any, *, where: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    found = (trainer.model_type, normalizer.remove_extra_whitespaces)
    if not proto.pieces or found != (_BPE, False):
        raise ModelError(
            "the sentencepiece file is not of Llama's kind",
            where=where,
            got=f"model_type {found[0]}, remove_extra_whitespaces {found[1]}",
            expected=f"model_type {_BPE} (merges), remove_extra_whitespaces False",
            fix="save the tokenizer as tokenizer.json and put that beside the weights",
        )


def own_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """Reads a tokenizer of Llama's kind as its files state it, None for one of another kind.

    Transformers' class makes the rules around the vocabulary anew instead: it puts a blank in front
    of texts where `tokenizer.json` says there is none (Yi), and one too few where a text starts
    with a blank (Llama-2).

    Args:
        folder: A model directory.

    Raises:
        ModelError: A file cannot be read, or is not what it should be.
    """
    if has_only_pieces(folder):
        return fast_from_pieces(folder)
    settings = _settings(folder, _SETTINGS_NAME)
    if not (folder / _FAST_NAME).is_file() or settings.get("tokenizer_class") not in _CLASSES:
        return None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizer files fail in many ways, all the user's to mend
        raise ModelError(
            "the tokenizer cannot be read", where=str(folder / _FAST_NAME), got=error
        ) from error
    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    if settings.get("add_bos_token") and bos and backend.encode("a").tokens[:1] != [bos]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def has_only_pieces(folder: Path) -> bool:
    """Whether a directory's tokenizer is Llama's and stands in its sentencepiece file alone.

    Args:
        folder: A model directory.

    Raises:
        ModelError: Its settings cannot be read.
    """
    if (folder / _FAST_NAME).is_file() or not (folder / PIECES_NAME).is_file():
        return False
    return _settings(folder, _SETTINGS_NAME).get("tokenizer_class") in _CLASSES


def copy_pieces(source: Path, folder: Path) -> None:
    """Copies a tokenizer of `has_only_pieces` as it is."""
    for name in (PIECES_NAME, _SETTINGS_NAME, _SPECIAL_NAME, _ADDED_NAME):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _set(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _settings(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError("this file cannot be read", where=str(path), got=error) from error
    return values if isinstance(values, dict) else {}


def _added_tokens(settings: dict[str, Any], *, where: str) -> dict[int, str]:
    found = settings.get("added_tokens_decoder", {})
    try:
        return {int(index): str(entry["content"]) for index, entry in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError("the added tokens cannot be read", where=where, got=error) from error


def _special_ids(proto: Any) -> tuple[int, int, int]:
    trainer = proto.trainer_spec
    return int(trainer.bos_id), int(trainer.eos_id), int(trainer.unk_id)


def _piece(proto: Any, index: int) -> str:
    return str(proto.pieces[index].piece)


def _name(settings: dict[str, Any], key: str, default: str) -> str:
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return default if value is None else str(value)


def _backend(proto: Any, added: dict[int, str], *, where: str, legacy: bool) -> Tokenizer:
    # An added token inside the table takes the place of a piece that was kept free for it.
    names = [added.get(index, str(piece.piece)) for index, piece in enumerate(proto.pieces)]
    vocabulary = {name: index for index, name in enumerate(names)}
    ranked = {str(p.piece): p.score for p in proto.pieces if p.type not in (_CONTROL, _UNKNOWN)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges({n: s for n, s in ranked.items() if n in vocabulary}, vocabulary),
            unk_token=_piece(proto, _special_ids(proto)[2]),
            fuse_unk=True,
            byte_fallback=bool(proto.trainer_spec.byte_fallback),
        )
    )
    steps: list[normalizers.Normalizer] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    prefixed = bool(proto.normalizer_spec.add_dummy_prefix)
    if prefixed and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    elif prefixed:  # in front of the whole text only, unless it has a blank there
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=False)
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    undo += [decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    control = [str(p.piece) for p in proto.pieces if p.type in (_CONTROL, _UNKNOWN)]
    special = [n for n in control if n in vocabulary] + [added[i] for i in sorted(added)]
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in special])
    own = [str(p.piece) for p in proto.pieces if p.type == _USER_DEFINED]
    backend.add_tokens([AddedToken(n, normalized=False) for n in own if n in vocabulary])
    wrong = {i: n for i, n in added.items() if backend.token_to_id(n) != i}
    if wrong:
        raise ModelError(
            "added tokens cannot have the ids that the tokenizer's settings name",
            where=where,
            got=", ".join(f"{n!r} at {backend.token_to_id(n)}" for n in wrong.values()),
            expected=", ".join(f"{n!r} at {i}" for i, n in wrong.items()),
        )
    return backend


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the merges that make the pieces, best first: a piece's score is its merge's rank."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _prove(backend: Tokenizer, path: Path, added: dict[int, str]) -> None:
    """Compares ids with sentencepiece's own on texts with blanks, line breaks and other scripts."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in _PROBES:
        # A text's own first blank stands for the one in front, where that is not `legacy`.
        text = text if backend.pre_tokenizer is None else text.lstrip()
        ours = backend.encode(text, add_special_tokens=False).ids
        theirs = processor.encode(text)
        if ours != theirs and not set(theirs) & set(added):
            raise ModelError(
                "the tokenizer's fast form gives other ids than sentencepiece",
                where=str(path),
                got=f"{text!r}: {ours}",
                expected=theirs,
                fix="save the tokenizer as tokenizer.json and put that beside the weights",
            )
