"""ChatGLM-6B's tokenizer with a fast backend, which says where in a text its tokens stand.

Built from the sentencepiece file; the ids are those of `ChatGLMTokenizer`, which stays the plain
statement of the rules. Training needs this one: loss masks are made from token positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from vistune.errors import ModelError
from vistune.models.chatglm.tokenizer import ChatGLMTokenizer

_SPACE = "▁"
_UNIGRAM = 1
_LONGEST_BLANK = 80


def fast_tokenizer(vocab_file: str | Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Builds the fast tokenizer that fits a model.

    Args:
        vocab_file: The sentencepiece file, `ice_text.model`.
        vocab_size: Rows of the model's embedding; 150,528 is the release with image ids.

    Returns:
        A tokenizer that saves itself as `tokenizer.json` and needs the sentencepiece file no more.

    Raises:
        ModelError: The file cannot be read, is no unigram model, or does not fit the model.
    """
    slow = ChatGLMTokenizer.for_vocabulary(vocab_file, vocab_size=vocab_size)
    proto = _proto(Path(vocab_file))
    if proto.trainer_spec.model_type != _UNIGRAM:
        raise ModelError(
            "the sentencepiece file has no fast form: it is not a unigram model",
            where=str(vocab_file),
            got=f"model_type {proto.trainer_spec.model_type}",
            expected=f"model_type {_UNIGRAM}",
            fix="use ChatGLMTokenizer, which takes every sentencepiece file, where no positions of "
            "tokens are needed",
        )
    offset = slow.num_image_tokens
    lowest = min(piece.score for piece in proto.pieces)
    # The newline keeps text from ever being cut into image ids: no normalised text holds one.
    vocabulary = [(f"<image_{index}>\n", lowest) for index in range(offset)]
    # Sentencepiece's own symbols (<n>, <|tab|>, ...) have the score 0, which nothing beats.
    vocabulary += [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=slow.unk_token_id, byte_fallback=False))
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = _decoder()
    special = [*slow.all_special_tokens]
    backend.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    gmask, sop, eop = slow.gmask_token, slow.bos_token, slow.eos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {gmask} {sop}",
        pair=f"$A {gmask} {sop} $B {eop}",
        special_tokens=[(token, slow.convert_tokens_to_ids(token)) for token in (gmask, sop, eop)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=sop,
        eos_token=eop,
        unk_token=slow.unk_token,
        pad_token=slow.pad_token,
        mask_token=slow.mask_token,
        additional_special_tokens=[gmask],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _proto(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """White space becomes pieces, then sentencepiece's own normalisation runs."""
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace("\n", "<n>"),
        normalizers.Replace("\t", "<|tab|>"),
    ]
    steps += [
        normalizers.Replace(" " * length, f"<|blank_{length}|>")
        for length in range(_LONGEST_BLANK, 1, -1)
    ]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
            # At the end, and only there, sentencepiece takes its own mark for a space.
            normalizers.Replace(Regex(f"[ {_SPACE}]+$"), ""),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder() -> decoders.Decoder:
    blanks = [
        decoders.Replace(f"<|blank_{length}|>", " " * length)
        for length in range(2, _LONGEST_BLANK + 1)
    ]
    # Pieces are joined before the first space goes, or a space would be lost at every piece.
    return decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace("<n>", "\n"),
            decoders.Replace("<|tab|>", "\t"),
            *blanks,
        ]
    )
