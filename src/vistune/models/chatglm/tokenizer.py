"""ChatGLM-6B's tokenizer over its sentencepiece file, as a transformers tokenizer.

Newlines, tabs and runs of spaces become pieces of their own before sentencepiece sees the text.
A prompt is closed by `[gMASK]` and `<sop>`; batches are padded on the left. The first
release kept 20,000 ids in front of the text for images, which shifts every id; how many there are
is a setting here and is read from the model's vocabulary size where a model is at hand.

Source: the rules of ChatGLM-6B's `ice_text.model`; the code is our own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

from vistune.errors import ModelError
from vistune.models.chatglm.configuration import NUM_IMAGE_TOKENS_BY_VOCABULARY

VOCABULARY_NAME = "ice_text.model"
_NEWLINE, _TAB = "<n>", "<|tab|>"
_LONGEST_BLANK = 80
_BLANKS = re.compile(f" {{2,{_LONGEST_BLANK}}}")
_BLANK_PIECE = re.compile(r"<\|blank_(\d+)\|>")


class ChatGLMTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """Text to ids and back.

    Args:
        vocab_file: The sentencepiece file, `ice_text.model`.
        num_image_tokens: Ids in front of the text pieces (20,000 in the first release, else 0).
        bos_token: The token that starts an answer.
        eos_token: The token that ends an answer.
        unk_token: The token of what the vocabulary lacks.
        pad_token: The token of padding.
        mask_token: The short gap's token.
        gmask_token: The long gap's token, which ends a prompt.
        padding_side: Side of padding in a batch.
        kwargs: Passed on to transformers.

    Raises:
        ModelError: The file cannot be read, or lacks one of the special pieces.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_NAME}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        num_image_tokens: int = 0,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        unk_token: str = "<unk>",
        pad_token: str = "<pad>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        padding_side: str = "left",
        **kwargs: Any,
    ) -> None:
        self.vocab_file = str(vocab_file)
        self.num_image_tokens = num_image_tokens
        self.gmask_token = str(gmask_token)
        self._pieces = _read_pieces(self.vocab_file)
        special = (bos_token, eos_token, unk_token, pad_token, mask_token, gmask_token)
        missing = [str(token) for token in special if not self._has_piece(str(token))]
        if missing:
            raise ModelError(
                "the sentencepiece file is not ChatGLM-6B's: special pieces are missing",
                where=self.vocab_file,
                got=", ".join(missing),
            )
        super().__init__(
            num_image_tokens=num_image_tokens,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            mask_token=mask_token,
            gmask_token=gmask_token,
            padding_side=padding_side,
            **{"clean_up_tokenization_spaces": False, **kwargs},
        )
        self.add_tokens([self.gmask_token], special_tokens=True)

    @classmethod
    def for_vocabulary(cls, vocab_file: str | Path, *, vocab_size: int) -> ChatGLMTokenizer:
        """Builds the tokenizer that fits a model.

        Args:
            vocab_file: The sentencepiece file.
            vocab_size: Rows of the model's embedding; 150,528 is the release with image ids.

        Raises:
            ModelError: The vocabulary does not fit into the model's embedding.
        """
        offset = NUM_IMAGE_TOKENS_BY_VOCABULARY.get(vocab_size, 0)
        tokenizer = cls(str(vocab_file), num_image_tokens=offset)
        if tokenizer.vocab_size > vocab_size:
            raise ModelError(
                "the tokenizer has more ids than the model has embeddings",
                where=str(vocab_file),
                got=tokenizer.vocab_size,
                expected=f"at most {vocab_size}",
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Image ids and text pieces together."""
        return self.num_image_tokens + int(self._pieces.get_piece_size())

    @property
    def gmask_token_id(self) -> int:
        """The id that ends a prompt's text."""
        return self._convert_token_to_id(self.gmask_token)

    def get_vocab(self) -> dict[str, int]:
        """Returns every token with its id."""
        vocab = {self._convert_id_to_token(index): index for index in range(self.vocab_size)}
        return {**vocab, **self.added_tokens_encoder}

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Closes a prompt with `[gMASK] <sop>`; an answer, where given, follows with `<eop>`."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens to text; special tokens stay as they are written."""
        special = set(self.all_special_tokens)
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in special:
                run.append(token)
                continue
            text += _after_pieces(self._pieces.decode_pieces(run)) if run else ""
            text += token or ""
            run = []
        return text

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copies the sentencepiece file; returns its new path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{VOCABULARY_NAME}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def __getstate__(self) -> dict[str, Any]:
        # The sentencepiece object is rebuilt from its file, so that data workers can be started.
        return {**self.__dict__, "_pieces": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pieces = _read_pieces(self.vocab_file)

    def _has_piece(self, token: str) -> bool:
        index = self._pieces.piece_to_id(token)
        return bool(self._pieces.id_to_piece(index) == token)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces: list[str] = self._pieces.encode_as_pieces(_before_pieces(text))
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self.num_image_tokens + int(self._pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return str(self._pieces.id_to_piece(index - self.num_image_tokens))


def _read_pieces(vocab_file: str) -> Any:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.Load(vocab_file)
    except (OSError, RuntimeError, TypeError) as error:
        raise ModelError(
            "the sentencepiece file cannot be read",
            where=vocab_file,
            got=error,
            expected=f"{VOCABULARY_NAME} of the model directory",
        ) from error
    return pieces


def _before_pieces(text: str) -> str:
    """Writes newlines, tabs and runs of 2 to 80 spaces as the pieces they have."""
    text = text.replace("\n", _NEWLINE).replace("\t", _TAB)
    return _BLANKS.sub(lambda run: f"<|blank_{len(run.group())}|>", text)


def _after_pieces(text: str) -> str:
    text = text.replace(_NEWLINE, "\n").replace(_TAB, "\t")
    return _BLANK_PIECE.sub(lambda piece: " " * int(piece.group(1)), text)
