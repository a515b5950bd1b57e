"""What is shown of an answer: VisualGLM's chat, and the blanks that templates write themselves."""

from __future__ import annotations

import random

import pytest

from vistune.data.template import TEMPLATES
from vistune.data.template.glm import visualglm_template


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (" 你好,世界! \n", "你好，世界！"),
        ("图中:一只猫;好吗?", "图中：一只猫；好吗？"),
        ("a,b! c: d; e?", "a,b! c: d; e?"),
        ("a,猫 b:狗", "a，猫 b：狗"),
        ("中,,中", "中，，中"),
        ("中,!a", "中，!a"),
        ("于[[训练时间]]训练,好", "于2023年训练，好"),
        ("[[训练时间", "[[训练时间"),
        ("", ""),
    ],
)
def test_punctuation_beside_chinese_becomes_full_width(said: str, shown: str) -> None:
    assert visualglm_template("zh").shown(said) == shown


ALPHABET = ("中", "国", "a", ",", "!", "?", " ", "\n", "[[", "训练", "时间", "]]", "2", ";")


@pytest.mark.parametrize("name", ["visualglm_zh", "cogvlm2_chat", "vicuna_v1", "chatml"])
def test_what_was_shown_of_a_part_stays(name: str) -> None:
    template = TEMPLATES.get(name)
    draw = random.Random(0)
    for _ in range(400):
        said = "".join(draw.choices(ALPHABET, k=draw.randint(0, 12)))
        whole, told = template.shown(said), ""
        for end in range(len(said) + 1):
            part = said[:end]
            shown = template.shown(part[: template.num_settled(part)])
            assert shown.startswith(told) or told.startswith(shown), (said, part)
            told = max(told, shown, key=len)
            assert whole.startswith(told), (said, part)


def test_the_blank_in_front_of_an_answer_is_the_templates() -> None:
    # In the next round the template writes it again.
    for name in ("cogvlm2_chat", "cogvlm2_vqa", "vicuna_v1"):
        template = TEMPLATES.get(name)
        assert template.shown(" a cat") == template.shown("a cat") == "a cat"
    assert TEMPLATES.get("cogvlm2_base").shown(" a cat") == " a cat"
