"""ChatGLM's tokenizer and VisualGLM's prompt, over a sentencepiece file trained here."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from visualglm_case import train_pieces

from vistune.errors import ModelError
from vistune.models.chatglm.tokenizer import ChatGLMTokenizer
from vistune.models.visualglm.prompt import encode_conversation


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def tokenizer(pieces: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(str(pieces))


def test_prompts_end_with_gmask_and_sop(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.encode("你好")
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["[gMASK]", "<sop>"]
    pair = tokenizer.encode("你好", "a dog")
    answer = tokenizer.encode("a dog", add_special_tokens=False)
    assert pair == [*ids, *answer, tokenizer.eos_token_id]


def test_white_space_becomes_pieces(tokenizer: ChatGLMTokenizer) -> None:
    text = "a\n\tb   c" + " " * 85 + "d"
    tokens = tokenizer.tokenize(text)
    kept = [token for token in tokens if token.startswith("<")]
    # 85 spaces are one longest run of 80 and one of 5.
    assert kept == ["<n>", "<|tab|>", "<|blank_3|>", "<|blank_80|>", "<|blank_5|>"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["你好，图片里有什么", "The lazy dog", "a cat\na dog", "<img></img>"]
)
def test_text_survives(tokenizer: ChatGLMTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text)) == f"{text}[gMASK]<sop>"


def test_batches_are_padded_on_the_left(tokenizer: ChatGLMTokenizer) -> None:
    batch = tokenizer(["a", "the quick brown fox"], padding=True)
    short, long = batch["input_ids"]
    num_pad = len(long) - len(tokenizer.encode("a"))
    assert num_pad > 0
    assert short == [3] * num_pad + tokenizer.encode("a")
    assert batch["attention_mask"] == [[0] * num_pad + [1] * (len(long) - num_pad), [1] * len(long)]


def test_the_first_release_shifts_every_id(pieces: Path, tokenizer: ChatGLMTokenizer) -> None:
    first = ChatGLMTokenizer.for_vocabulary(pieces, vocab_size=150_528)
    text = "a cat\n你好"
    assert first.encode(text) == [i + 20_000 for i in tokenizer.encode(text)]
    assert first.pad_token_id == 20_003
    assert first.decode(first.encode(text), skip_special_tokens=True) == text
    assert first.convert_ids_to_tokens(17) == "<image_17>"
    assert ChatGLMTokenizer.for_vocabulary(pieces, vocab_size=130_528).num_image_tokens == 0
    with pytest.raises(ModelError, match="more ids than"):
        ChatGLMTokenizer.for_vocabulary(pieces, vocab_size=64)


@pytest.mark.parametrize("num_image_tokens", [0, 20_000])
def test_save_load_and_pickle(pieces: Path, tmp_path: Path, num_image_tokens: int) -> None:
    tokenizer = ChatGLMTokenizer(str(pieces), num_image_tokens=num_image_tokens)
    tokenizer.save_pretrained(tmp_path)
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "问：a cat\n答："
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text)
        assert len(other) == len(tokenizer)
        assert other.gmask_token_id == tokenizer.gmask_token_id


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        ChatGLMTokenizer(str(tmp_path / "ice_text.model"))


def test_conversations_are_built_as_published(tokenizer: ChatGLMTokenizer) -> None:
    built = encode_conversation(
        tokenizer,
        "what is it",
        num_image_tokens=4,
        image_token_id=999,
        history=[("a cat", "a dog")],
        answer="a red disc",
        language="en",
    )

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    head = plain("<img>")
    prompt = [
        *head,
        *[999] * 4,
        *plain("</img>Q:a cat\nA:a dog\nQ:what is it\nA:"),
        tokenizer.gmask_token_id,
    ]
    answer = [tokenizer.bos_token_id, *plain("a red disc"), tokenizer.eos_token_id]
    assert list(built.input_ids) == prompt + answer
    assert list(built.target_mask) == [False] * len(prompt) + [True] * len(answer)
    assert built.pre_image_length == len(head)
    asked = encode_conversation(tokenizer, "问", num_image_tokens=0, image_token_id=999)
    assert list(asked.input_ids) == tokenizer.encode("问：问\n答：")
    assert not any(asked.target_mask)
    assert asked.pre_image_length is None


def test_text_that_steers_the_model_is_refused(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(ModelError, match="steer"):
        encode_conversation(tokenizer, "a <sop> b", num_image_tokens=0, image_token_id=999)
