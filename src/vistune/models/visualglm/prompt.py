"""The text around VisualGLM's image: what a conversation becomes before the model sees it.

    <img> | image | </img> question answer question ... | [gMASK] | <sop> answer <eop>

One image per conversation, always in front. Each `|` is a border at which text is cut into
tokens separately. The answer's targets start at `<sop>` itself.

Source: VisualGLM-6B. `<img>` and `</img>` are plain text to its vocabulary, not special tokens,
so how many tokens stand in front of the image is counted, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vistune.errors import ModelError
from vistune.models.chatglm.tokenizer import ChatGLMTokenizer

_ASK = {"zh": "问：{question}\n答：", "en": "Q:{question}\nA:"}


@dataclass(frozen=True)
class VisualGLMPrompt:
    """A conversation as ids.

    Args:
        input_ids: Ids; an image stands as a run of the image token.
        target_mask: True where the token is one the model must learn to say.
        pre_image_length: Tokens in front of the image; None without an image.
    """

    input_ids: tuple[int, ...]
    target_mask: tuple[bool, ...]
    pre_image_length: int | None


def encode_conversation(
    tokenizer: ChatGLMTokenizer,
    question: str,
    *,
    num_image_tokens: int,
    image_token_id: int,
    history: Sequence[tuple[str, str]] = (),
    answer: str | None = None,
    language: Literal["zh", "en"] = "zh",
) -> VisualGLMPrompt:
    """Builds the ids of a conversation.

    Args:
        tokenizer: ChatGLM's tokenizer.
        question: The last question.
        num_image_tokens: Tokens of the image (32 in the public model); 0 for no image.
        image_token_id: The id that stands for them.
        history: Earlier questions and answers, in order.
        answer: The answer to train on; None to end with the generation prompt.
        language: Which words mark questions and answers.

    Raises:
        ModelError: The text holds special tokens, which would end the prompt early.
    """
    ask = _ASK[language]
    rounds = "".join(f"{ask.format(question=q)}{a}\n" for q, a in history)
    rounds += ask.format(question=question)
    head = _plain(tokenizer, "<img>") if num_image_tokens else []
    image = [image_token_id] * num_image_tokens
    tail = _plain(tokenizer, f"</img>{rounds}" if num_image_tokens else rounds)
    prompt = [*head, *image, *tail, tokenizer.gmask_token_id]
    said = [tokenizer.bos_token_id]
    if answer is not None:
        said += [*_plain(tokenizer, answer), tokenizer.eos_token_id]
    return VisualGLMPrompt(
        input_ids=(*prompt, *said),
        target_mask=(False,) * len(prompt) + (answer is not None,) * len(said),
        pre_image_length=len(head) if num_image_tokens else None,
    )


def _plain(tokenizer: ChatGLMTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    found = [token_id for token_id in ids if token_id in special]
    if found:
        raise ModelError(
            "the text holds tokens that steer the model",
            got=tokenizer.convert_ids_to_tokens(found),
            fix="take them out of the text",
        )
    return ids
