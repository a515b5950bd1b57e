"""CogVLM2's three prompts: their exact text, what is learnt, where images stand."""

from __future__ import annotations

import pytest

from vistune.data.template.question import QuestionTemplate, cogvlm2_template
from vistune.errors import RowError
from vistune.types import Turn

ASK = Turn("user", (0, "\nWhat is this?"))
SAY = Turn("assistant", ("A cat.",))
MORE = Turn("user", ("Which colour?",))
RED = Turn("assistant", ("Red.",))


def _text(template: QuestionTemplate, *turns: Turn, prompt: bool = False) -> str:
    segments = template.segments(turns, add_generation_prompt=prompt)
    return "".join("<image>" if s.image is not None else s.text for s in segments)


def _learnt(template: QuestionTemplate, *turns: Turn) -> str:
    return "".join(s.text for s in template.segments(turns) if s.is_target)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("chat", "<image>Question: What is this? Answer:"),
        ("vqa", "<image>Question: What is this? Short answer:"),
        ("base", "<image>What is this?"),
    ],
)
def test_generation_prompts_are_the_public_ones(version: str, expected: str) -> None:
    assert _text(cogvlm2_template(version), ASK, prompt=True) == expected


def test_history_is_the_public_one() -> None:
    assert _text(cogvlm2_template("chat"), ASK, SAY, MORE, prompt=True) == (
        "<image>Question: What is this? Answer: A cat.\nQuestion: Which colour? Answer:"
    )
    assert _text(cogvlm2_template("vqa"), ASK, SAY, MORE, prompt=True) == (
        "<image>Question: What is this? Short answer: A cat.\nQuestion: Which colour? Short answer:"
    )


def test_only_the_last_answer_is_learnt() -> None:
    template = cogvlm2_template()
    text = _text(template, ASK, SAY, MORE, RED)
    assert text.endswith("Question: Which colour? Answer: Red.<|end_of_text|>")
    assert _learnt(template, ASK, SAY, MORE, RED) == " Red.<|end_of_text|>"
    assert _learnt(template, ASK, SAY) == " A cat.<|end_of_text|>"


def test_training_text_starts_with_the_generation_prompt() -> None:
    for version in ("base", "chat", "vqa"):
        template = cogvlm2_template(version)
        prompt = _text(template, ASK, prompt=True)
        assert _text(template, ASK, SAY) == prompt + _learnt(template, ASK, SAY)


def test_images_stand_in_front_whatever_the_turn() -> None:
    later = Turn("user", ("And ", 1, "here?"))
    assert _text(cogvlm2_template(), ASK, SAY, later, prompt=True).startswith(
        "<image><image>Question: What is this? Answer: A cat.\nQuestion: And here?"
    )


def test_template_survives_a_checkpoint() -> None:
    template = cogvlm2_template("vqa")
    assert QuestionTemplate.model_validate(template.model_dump(mode="json")) == template
    assert template.stop == ("<|end_of_text|>", "<|eot_id|>")


def test_what_it_cannot_say_is_refused() -> None:
    with pytest.raises(RowError) as caught:
        cogvlm2_template().segments([ASK], "Be kind.")
    assert caught.value.reason == "system_not_supported"
    with pytest.raises(RowError) as caught:
        cogvlm2_template("base").segments([ASK, SAY, MORE])
    assert caught.value.reason == "history_not_supported"
    with pytest.raises(RowError) as caught:
        cogvlm2_template().segments([SAY])
    assert caught.value.reason == "roles_not_alternating"


def test_an_empty_answer_teaches_nothing() -> None:
    assert _learnt(cogvlm2_template(), ASK, Turn("assistant", ("",))) == ""
