"""Templates render what the public models were trained on, and say exactly what is learnt."""

from __future__ import annotations

from typing import Any

import pytest
from data_helpers import gemma_tokenizer, llama_tokenizer

from vistune.data.template import (
    TEMPLATES,
    JinjaTemplate,
    Segment,
    load_template,
    resolve_template,
    template_of,
)
from vistune.errors import RegistryError, RowError, TemplateError
from vistune.types import Turn

TURNS = (
    Turn("user", (0, "\nQ1")),
    Turn("assistant", ("A1",)),
    Turn("user", ("Q2",)),
    Turn("assistant", ("A2",)),
)
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)


def show(segments: list[Segment]) -> str:
    """The text, targets in ⟦ ⟧."""
    out, inside = "", False
    for segment in segments:
        if segment.is_target != inside:
            out += "⟧" if inside else "⟦"
            inside = segment.is_target
        out += "<image>" if segment.image is not None else segment.text
    return out + ("⟧" if inside else "")


GOLDEN = {
    "vicuna_v0": f"{CURIOUS.replace('user', 'human')}\n\n⟦### Human⟧: <image>\nQ1\n"
    "⟦### Assistant: A1\n### Human⟧: Q2\n⟦### Assistant: A2\n### ⟧",
    "vicuna_v1": f"{CURIOUS} USER: <image>\nQ1 ASSISTANT:⟦ A1</s>⟧USER: Q2 ASSISTANT:⟦ A2</s>⟧",
    "mpt": "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The"
    " assistant gives helpful and honest answers.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
    "<|im_start|>assistant\n⟦A1<|im_end|>⟧<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    "⟦A2<|im_end|>⟧",
    "chatml": "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧\n",
    "internlm2_chat": "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n"
    "⟦A1<|im_end|>⟧\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
    "\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n<|im_start|>user\nQ2<|im_end|>\n"
    "<|im_start|>assistant\n⟦A2<|im_end|>⟧\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n⟦A1<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nQ2"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A2<|eot_id|>⟧",
    "gemma": "<start_of_turn>user\n<image>\nQ1<end_of_turn>\n<start_of_turn>model\n"
    "⟦A1<end_of_turn>\n<eos>⟧<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n"
    "⟦A2<end_of_turn>\n<eos>⟧",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_named_templates(name: str) -> None:
    assert show(TEMPLATES.get(name).segments(TURNS)) == GOLDEN[name]


def test_llama_2_holds_the_system_prompt_in_the_first_question() -> None:
    text = show(TEMPLATES.get("llama_2").segments(TURNS, "S"))
    assert text == (
        "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nQ1 [/INST]⟦ A1 </s>⟧<s>[INST] Q2 [/INST]⟦ A2 </s>⟧"
    )
    assert "language and vision assistant" in show(TEMPLATES.get("llama_2").segments(TURNS))


def test_every_template_is_listed_and_survives_a_checkpoint() -> None:
    cogvlm2 = {"cogvlm2_base", "cogvlm2_chat", "cogvlm2_vqa"}
    others = {"visualglm_zh", "visualglm_en", "llama_2", "plain", "paligemma"}
    assert set(TEMPLATES) == {*GOLDEN, *cogvlm2, *others}
    for name in TEMPLATES:
        template = TEMPLATES.get(name)
        assert load_template(template.model_dump(mode="json")) == template
    with pytest.raises(TemplateError, match="not known"):
        load_template({"kind": "later"})
    with pytest.raises(RegistryError, match="vicuna_v1"):
        resolve_template("vicuna", llama_tokenizer())


def test_generation_prompt_is_the_training_prompt_cut_before_the_answer() -> None:
    for name in TEMPLATES:
        if name in ("plain", "cogvlm2_base", "paligemma"):  # one question, or none
            continue
        if name.startswith(("visualglm", "vicuna_v0")):  # what opens an answer is learnt as well
            continue
        template = TEMPLATES.get(name)
        whole = show(template.segments(TURNS))
        prompt = show(template.segments(TURNS[:3], add_generation_prompt=True))
        assert whole.startswith(prompt), name
        assert whole[len(prompt)] == "⟦", name


def test_vicuna_v0_asks_with_the_words_it_learns() -> None:
    template = TEMPLATES.get("vicuna_v0")
    whole = show(template.segments(TURNS))
    prompt = show(template.segments(TURNS[:3], add_generation_prompt=True))
    assert prompt.endswith(": Q2\n### Assistant:")
    assert (
        whole.replace("⟦", "").replace("⟧", "").startswith(prompt.replace("⟦", "").replace("⟧", ""))
    )
    assert template.shown(" A2") == "A2" and template.stop == ("\n###",)
    # An answer without words is closed, and answered with nothing but its marks.
    empty = show(template.segments((TURNS[2], Turn("assistant", ("",)))))
    assert empty.endswith("Q2\n⟦### Assistant: \n### ⟧")


def test_system_prompts_of_row_recipe_and_template() -> None:
    chatml, vicuna = TEMPLATES.get("chatml"), TEMPLATES.get("vicuna_v1")
    own = (Turn("system", ("OWN",)), *TURNS)
    assert show(chatml.segments(TURNS, "S")).startswith("<|im_start|>system\nS<|im_end|>\n")
    assert show(chatml.segments(own, "S")).startswith("<|im_start|>system\nOWN<|im_end|>\n")
    assert show(vicuna.segments(own)).startswith("OWN USER: ")
    assert show(vicuna.segments(TURNS, "")).startswith("USER: ")


def test_plain_is_images_and_caption() -> None:
    plain = TEMPLATES.get("plain")
    turns = (Turn("user", ("Describe", 0, 1, "this")), Turn("assistant", ("A dog.",)))
    assert show(plain.segments(turns)) == "<image><image>⟦A dog.\n⟧"
    for bad in (TURNS, (Turn("user", ("hi",)), Turn("assistant", ("x",)))):
        with pytest.raises(RowError) as caught:
            plain.segments(bad)
        assert caught.value.reason == "not_a_caption"


@pytest.mark.parametrize("name", ["vicuna_v1", "tokenizer"])
def test_turns_out_of_order_are_refused(name: str) -> None:
    template = make_jinja(CHATML) if name == "tokenizer" else TEMPLATES.get(name)
    for turns, reason in (
        ((), "empty_conversation"),
        (TURNS[1:], "roles_not_alternating"),
        ((TURNS[0], TURNS[2]), "roles_not_alternating"),
        ((TURNS[0], Turn("assistant", ("see", 0))), "image_token_in_answer"),
        ((Turn("system", (0,)), *TURNS), "image_in_system_turn"),
    ):
        with pytest.raises(RowError) as caught:
            template.segments(turns)
        assert caught.value.reason == reason


# --- the tokenizer's own ------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
LAST_ONLY = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages %}{% if loop.last %}"
).replace("{% endfor %}", "{% endif %}{% endfor %}")
NO_END = CHATML.replace("<|im_end|>", ".")
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def make_jinja(source: str) -> JinjaTemplate:
    return JinjaTemplate(
        name="tokenizer",
        source=source,
        variables={"bos_token": "<s>", "eos_token": "</s>"},
        special_tokens=("</s>", "<s>", "<|im_end|>", "<|im_start|>"),
    )


def test_own_template_equals_the_named_one() -> None:
    assert show(make_jinja(CHATML).segments(TURNS)) == GOLDEN["chatml"]
    prompt = make_jinja(CHATML).segments(TURNS[:3], add_generation_prompt=True)
    assert show(prompt) == show(
        TEMPLATES.get("chatml").segments(TURNS[:3], "", add_generation_prompt=True)
    )


def test_own_template_learns_from_where_a_generation_prompt_ends() -> None:
    assert show(make_jinja(MISTRAL).segments(TURNS)) == (
        "<s>[INST] <image>\nQ1 [/INST]⟦ A1</s>⟧[INST] Q2 [/INST]⟦ A2</s>⟧"
    )


def test_generation_blocks_are_followed() -> None:
    turns = (*TURNS[:3], Turn("assistant", ("  A2 ",)))
    text = show(make_jinja(GENERATION).segments(turns))
    assert text.endswith("<|im_start|>assistant\n⟦A2<|im_end|>⟧\n")


def test_the_token_that_ends_an_answer_is_learnt_behind_a_block_that_stops_short() -> None:
    short = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert short != GENERATION
    text = show(make_jinja(short).segments((*TURNS[:3], Turn("assistant", ("A2",)))))
    assert text.endswith("<|im_start|>assistant\n⟦A2<|im_end|>⟧\n")


def test_repeated_answers_are_told_apart() -> None:
    turns = (TURNS[2], Turn("assistant", ("Q2",)), TURNS[2], Turn("assistant", ("Q2",)))
    text = show(make_jinja(CHATML).segments(turns))
    assert text.count("⟦Q2<|im_end|>⟧") == 2
    assert text.count("user\nQ2<|im_end|>") == 2


@pytest.mark.parametrize(
    ("source", "turns", "reason"),
    [
        (TRIMMING, (TURNS[0], Turn("assistant", (" A ",))), "template_inexact"),
        (LAST_ONLY, TURNS, "template_inexact"),
        (NO_END, TURNS, "template_inexact"),
        (MISTRAL, (Turn("system", ("S",)), *TURNS), "template_refused"),
        (CHATML, (Turn("user", ("a\ue0f0b",)), TURNS[1]), "reserved_character"),
    ],
)
def test_what_allows_no_exact_mask_is_refused(
    source: str, turns: tuple[Turn, ...], reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        make_jinja(source).segments(turns)
    assert caught.value.reason == reason


def test_trimming_is_fine_where_it_changes_nothing() -> None:
    assert show(make_jinja(TRIMMING).segments(TURNS[2:])) == show(
        make_jinja(CHATML).segments(TURNS[2:])
    )


def test_own_template_renders_as_transformers_does() -> None:
    tokenizer = gemma_tokenizer()
    messages = [
        {"role": "user", "content": 'Q1 "quoted" {{ x }}'},
        {"role": "assistant", "content": "A1"},
    ]
    turns = tuple(Turn(m["role"], (m["content"],)) for m in messages)  # type: ignore[arg-type]
    for source in (
        CHATML,
        MISTRAL,
        "\n  {% for m in messages %}\n{{ m | tojson }}</s>\n{% endfor %}",
    ):
        expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
        template = make_jinja(source).model_copy(
            update={"variables": {"bos_token": "<bos>", "eos_token": "<eos>"}}
        )
        specials = (*template.special_tokens, "<eos>")
        template = template.model_copy(update={"special_tokens": specials})
        text = "".join(segment.text for segment in template.segments(turns))
        assert text == expected


def test_an_answer_that_only_the_next_turn_ends() -> None:
    class Stub:
        chat_template: Any = (
            "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
        special_tokens_map = {"eos_token": "<|end|>"}
        added_tokens_decoder: dict[int, Any] = {}
        all_special_tokens = ["[gMASK]", "<|user|>", "<|assistant|>", "<|end|>"]
        eos_token = "<|end|>"

    template = template_of(Stub())
    assert (template.closing, template.stop) == ("<|user|>", ("<|user|>", "<|end|>"))
    turns = (TURNS[0], TURNS[1], TURNS[2], TURNS[3])
    text = show(template.segments(turns))
    assert text == (
        "[gMASK]<|user|>\n<image>\nQ1<|assistant|>\n⟦A1<|user|>⟧\nQ2<|assistant|>\n⟦A2<|user|>⟧"
    )
    # While the model is asked, nothing is put behind the question.
    asked = show(template.segments(turns[:3], add_generation_prompt=True))
    assert asked.endswith("\nQ2<|assistant|>\n")


def test_a_processor_puts_the_begin_of_text_in_front_unless_it_is_there() -> None:
    class Stub:
        chat_template: Any = CHATML
        special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}
        added_tokens_decoder: dict[int, Any] = {}
        all_special_tokens = ["<s>", "</s>", "<|im_end|>", "<|im_start|>"]
        eos_token = "</s>"

    assert not resolve_template("auto", Stub()).add_bos
    assert resolve_template("auto", Stub(), adds_bos=True).add_bos
    Stub.chat_template = "{{ bos_token }}" + CHATML
    assert not resolve_template("auto", Stub(), adds_bos=True).add_bos


# As processors' templates are: messages are lists of parts, images stand first.
OF_PARTS = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] if p['type'] =="
    " 'image' %}<image>\n{% endfor %}{% for p in m['content'] if p['type'] == 'text' %}"
    "@OPEN@{{ p['text'] }}@CLOSE@ {% endfor %}{% endfor %}{% if add_generation_prompt %}"
    "ASSISTANT:{% endif %}"
)


def stub_of(source: str) -> Any:
    class Stub:
        chat_template: Any = source
        special_tokens_map = {"eos_token": "</s>"}
        added_tokens_decoder: dict[int, Any] = {}
        all_special_tokens = ["</s>"]
        eos_token = "</s>"

    return Stub()


def test_a_template_of_parts_is_given_parts() -> None:
    plain = template_of(stub_of(OF_PARTS.replace("@OPEN@", "").replace("@CLOSE@", "")))
    prompt = show(plain.segments(TURNS[:1], add_generation_prompt=True))
    assert prompt == "USER: <image>\n\nQ1 ASSISTANT:"
    with pytest.raises(RowError, match="learn to stop"):
        plain.segments(TURNS)
    ended = OF_PARTS.replace("@OPEN@", "").replace("@CLOSE@", "{{ eos_token }}")
    text = show(template_of(stub_of(ended)).segments(TURNS[:2]))
    assert text == "USER: <image>\n\nQ1</s> ASSISTANT:⟦ A1</s>⟧ "


def test_blocks_that_never_end_are_for_asking_only() -> None:
    blocks = OF_PARTS.replace("@OPEN@", "{% generation %}").replace(
        "@CLOSE@", "{% endgeneration %}"
    )
    template = template_of(stub_of(blocks))
    assert show(template.segments(TURNS[:1], add_generation_prompt=True)).endswith("ASSISTANT:")
    with pytest.raises(RowError, match="learn to stop"):
        template.segments(TURNS)


def test_a_template_that_leaves_out_what_is_asked_is_refused() -> None:
    for source in ("{% for m in messages %}USER: {% endfor %}", OF_PARTS.replace("<image>", "")):
        with pytest.raises(TemplateError, match="leaves out"):
            template_of(stub_of(source))


def test_template_of_a_tokenizer() -> None:
    class Stub:
        chat_template: Any = CHATML
        special_tokens_map = {"eos_token": "</s>", "additional_special_tokens": ["<x>"]}
        added_tokens_decoder: dict[int, Any] = {}
        all_special_tokens = ["</s>", "<|im_end|>", "<|im_start|>"]
        eos_token = "</s>"

    template = template_of(Stub())
    assert (template.name, template.source) == ("tokenizer", CHATML)
    assert template.stop == ("<|im_end|>", "</s>")  # what ends an answer, then the end of text
    assert not template.add_bos
    assert load_template(template.model_dump(mode="json")) == template
    Stub.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        resolve_template("auto", Stub())
    Stub.chat_template = "{% for %}"
    with pytest.raises(TemplateError, match="cannot be parsed"):
        template_of(Stub())
