"""Counting gives what tokenising gives, for every template, tokenizer and text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from data_helpers import gemma_tokenizer, llama_tokenizer, make_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vistune.data.count import TokenCounter
from vistune.data.encode import Encoder
from vistune.data.template import TEMPLATES
from vistune.data.words import UncleanError, Words
from vistune.errors import RowError
from vistune.types import Turn

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CORPUS = [
    "The quick brown fox isn't jumping over 1234 lazy dogs, is it?\n\nNo: they're   asleep.",
    "What is in the picture?\nAnswer the question using a single word or phrase.\n你好，世界。",
    "system user assistant USER: ASSISTANT: def f(x):\n    return x + 1\n",
] * 20


def byte_level(expression: str | None) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    if expression is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(expression), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", *MARKERS],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


LLAMA = llama_tokenizer(extra=MARKERS)
ENCODERS: dict[str, Encoder] = {
    "llama/vicuna_v0": make_encoder("vicuna_v0", LLAMA),
    "llama/vicuna_v1": make_encoder("vicuna_v1", LLAMA),
    "llama/llama_2": make_encoder("llama_2", LLAMA),
    "llama/plain": make_encoder("plain", LLAMA),
    "llama/chatml": make_encoder("chatml", LLAMA),
    "llama-new/vicuna_v1": make_encoder("vicuna_v1", llama_tokenizer(legacy=False)),
    "llama/cogvlm2": make_encoder(
        TEMPLATES.get("cogvlm2_chat").model_copy(
            update={"markers": (), "answer_close": "</s>"}  # the marks of another vocabulary
        ),
        LLAMA,
    ),
    "gemma/chatml": make_encoder(
        TEMPLATES.get("chatml").model_copy(update={"markers": ()}), gemma_tokenizer()
    ),
    "bytes/qwen": make_encoder("qwen", byte_level(LLAMA3)),
    "bytes/llama3": make_encoder("llama3", byte_level(LLAMA3.replace("{1,3}", ""))),
    "gpt2/chatml": make_encoder("chatml", byte_level(None)),
}
PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            *(" ", "  ", "\n", " \n", "\n ", "\t", "\u3000", "\u00a0", "▁", "▁ ", " ▁", ""),
            *("dog", " dog", "dog ", "The cat's", "isn't", "12", " 3 ", "...", "你好", "，", "é"),
            *("</s>", "</s> ", " </s>", "<s>", "<|im_end|>", " <|im_end|> ", "</", "s>", "\u0301"),
        ]
    ),
)
TEXTS = st.lists(PIECES, min_size=1, max_size=8).map("".join)


def turns_of(texts: list[str], image_at: int) -> list[Turn]:
    out = []
    for k, text in enumerate(texts):
        parts: tuple[str | int, ...] = (text,) if text else ()
        if k == 0:
            parts = ((0, *parts), (*parts, 0), (*parts, 0, *parts), parts)[image_at]
        out.append(Turn("user" if k % 2 == 0 else "assistant", parts))
    return out


def exact(encoder: Encoder, turns: list[Turn]) -> tuple[int, int, int] | str:
    try:
        tokens = encoder.tokenise_turns(turns, [(20, 20)])
    except RowError as error:
        return error.reason
    images = tokens.num_image_tokens
    return tokens.ids.size - images, images, int(tokens.mask[1:].sum())


def counted(counter: TokenCounter, turns: list[Turn]) -> tuple[int, int, int] | str:
    try:
        found = counter.count(turns, [(20, 20)])
    except RowError as error:
        return error.reason
    return found.text_tokens, found.image_tokens, found.target_tokens


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=80, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=4), image_at=st.integers(0, 3))
def test_counting_is_tokenising(name: str, texts: list[str], image_at: int) -> None:
    encoder = ENCODERS[name]
    counter = TokenCounter(encoder)
    turns = turns_of(texts[: len(texts) // 2 * 2], image_at)
    first = counted(counter, turns)
    assert first == exact(encoder, turns)
    assert counted(counter, turns) == first  # from what it has learnt


@pytest.mark.parametrize("name", ENCODERS)
def test_common_text_is_not_tokenised(name: str) -> None:
    encoder = ENCODERS[name]
    counter = TokenCounter(encoder)
    assert counter.counts_words
    question = "\nWhat is the dog doing?\nAnswer the question using a single word or phrase."
    for answer in ("Running", "It is running, isn't it?", "它 在跑。", "One.\n\n1. Two  three"):
        texts = ["", answer] if "plain" in name else [question, answer, "And now?", answer]
        turns = turns_of(texts, 0)
        assert counted(counter, turns) == exact(encoder, turns)
    assert counter.num_tokenised == 0


def test_an_image_token_in_the_text_is_still_refused() -> None:
    tokenizer = llama_tokenizer(extra=("<img>",))
    encoder = make_encoder(
        "vicuna_v1", tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<img>")
    )
    for text in ("a <img> b", "<img>", "a b<img>"):
        assert counted(TokenCounter(encoder), turns_of([text, "Yes"], 3)) == "image_token_in_text"


def changed(change: Any, tokenizer: Any = None) -> Any:
    """A tokenizer whose description was changed, as `Words.of` sees it."""
    content = json.loads((tokenizer or llama_tokenizer()).backend_tokenizer.to_str())
    change(content)

    class Fake:
        class backend_tokenizer:  # noqa: N801
            @staticmethod
            def to_str() -> str:
                return json.dumps(content)

    return Fake()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"]["vocab"].update({"a▁b": 5000}),
        lambda c: c["model"].update(dropout=0.1),
        lambda c: c["model"].update(type="Unigram"),
        lambda c: c["model"].update(end_of_word_suffix="</w>"),
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
        lambda c: c["added_tokens"].append({"content": "two words"}),
    ],
)
def test_a_tokenizer_that_may_join_words_is_not_counted_by_words(change: Any) -> None:
    assert Words.of(changed(change), forbidden_id=-1) is None


@pytest.mark.parametrize("expression", [r"[\s\S]{1,3}|\s+", r"\w+ \w+|\s+", r"\p{L}+"])
def test_an_unknown_expression_is_not_counted_by_words(expression: str) -> None:
    tokenizer = byte_level(expression)
    assert Words.of(tokenizer, forbidden_id=-1) is None
    encoder = make_encoder("chatml", tokenizer)
    counter = TokenCounter(encoder)
    turns = turns_of(["What is it?", "A dog."], 0)
    assert counted(counter, turns) == exact(encoder, turns)
    assert counter.num_tokenised == 1


def test_special_tokens_that_take_blanks_with_them() -> None:
    tokenizer = byte_level(LLAMA3)
    tokenizer.add_tokens(
        [
            AddedToken("<|r|>", rstrip=True, special=True),
            AddedToken("<|l|>", lstrip=True, special=True),
        ]
    )
    encoder = make_encoder("chatml", tokenizer)
    counter = TokenCounter(encoder)
    for text in ("a<|r|> b", "a <|r|>  b c", "a <|l|> b", "a\n <|l|>b", "<|r|> ", " <|l|>"):
        turns = turns_of([text, f"x {text}"], 3)
        assert counted(counter, turns) == exact(encoder, turns)


WORDS = st.one_of(
    st.sampled_from(
        [
            *("What", "is", "dog,", "(12)", "isn't", "你好，", "x\nAnswer", "end.\n\n1.", "é"),
            *("0.25]", "<b>", "abc123", "12ab.", "iPhone15Pro,", "dogs'", "it's!", "3.14)"),
            *('x1y2z3?"', "é1.", "#a,", "don't.", "1234567,", "a'", "'s.", "12's"),
        ]
    ),
    st.text(alphabet="aBz019.,'\")#", min_size=1, max_size=7),
)
SENTENCES = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


@pytest.mark.parametrize("name", [name for name in ENCODERS if "plain" not in name])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(SENTENCES, min_size=2, max_size=6), image_at=st.integers(0, 3))
def test_plain_conversations_are_counted_turn_by_turn(
    name: str, texts: list[str], image_at: int
) -> None:
    encoder = ENCODERS[name]
    counter = TokenCounter(encoder)
    turns = turns_of(texts[: len(texts) // 2 * 2], image_at)
    assert counted(counter, turns) == exact(encoder, turns)
    rounds = counter._rounds
    assert (rounds is None) == (encoder.template.frame() is None or name == "gemma/chatml")
    if rounds is not None:
        tokens, learnt = rounds.count(turns)  # and not by falling back
        assert (tokens + encoder.num_leading_tokens, learnt) == exact(encoder, turns)[::2]


def test_a_token_that_reaches_across_a_blank() -> None:
    """Gemma has one, "> </": behind ">" there is no cut, and everywhere else there is."""
    content = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for text in (">▁", ">▁<", ">▁</"):
        vocabulary[text] = len(vocabulary)
    content["model"]["merges"] += [[">", "▁"], [">▁", "<"], [">▁<", "/"]]
    encoder = make_encoder("llama_2", _with_backend(content))
    counter = TokenCounter(encoder)
    assert counter.counts_words
    for text in ("<b> </b> x", "a > b", "a> </c d", "> ", ">", "x >  </ y", "a >, </b>"):
        for turns in (turns_of([text, "Yes"], 0), turns_of(["Hm?", f"{text} so", text, text], 3)):
            assert counted(counter, turns) == exact(encoder, turns)
            assert counted(counter, turns) == exact(encoder, turns)
    assert counter.num_tokenised == 0
    long = encoder.tokenise_turns(turns_of(["a", "<b> </b>"], 3), []).ids
    assert vocabulary[">▁"] in long.tolist()  # so the test is about something


def _with_backend(content: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_special_token_inside_another_is_no_place_to_cut() -> None:
    for other in ("<</s>>", "</s>>", "x</s>"):
        tokenizer = llama_tokenizer(extra=(other,))
        encoder = make_encoder("vicuna_v1", tokenizer)
        counter = TokenCounter(encoder)
        for texts in (["a <", "b <", "> c", "d"], ["a", "x", "> c", "x"], ["a", "b", "c", "d"]):
            turns = turns_of(texts, 3)
            assert counted(counter, turns) == exact(encoder, turns)


O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
PARTS = [
    *"abcXYZabcXYZ0190.,:;!?)]}'\"#/-_é你\u0301’\n▁<>",
    *("ing", "the", "'s", "'ll", "don't", "123", "</s>", "<|im_end|>", "\n\n", "。", "iPhone"),
]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "llama3", "o200k"])
def test_random_words_count_as_they_are_tokenised(name: str) -> None:
    made = {
        "llama": lambda: LLAMA,
        "gemma": gemma_tokenizer,
        "gpt2": lambda: byte_level(None),
        "llama3": lambda: byte_level(LLAMA3),
        "o200k": lambda: byte_level(O200K),
    }
    tokenizer = made[name]()
    words, backend = Words.of(tokenizer, forbidden_id=-1), tokenizer.backend_tokenizer
    assert words is not None
    draw, counted_texts = random.Random(0), 0

    def tokens(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False))

    while counted_texts < 2_000:
        drawn = ["".join(draw.choices(PARTS, k=draw.randint(1, 7))) for _ in range(3)]
        try:
            found = words.count(drawn[:-1]) + words.count_last(drawn[-1])
        except UncleanError:
            continue
        assert found == tokens(f"a {' '.join(drawn)}") - tokens("a"), drawn
        counted_texts += 1
