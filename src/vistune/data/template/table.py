"""The templates by name, as data. Every string is what the public models were trained on."""

from __future__ import annotations

from vistune.data.template.base import ChatTemplate
from vistune.data.template.glm import visualglm_template
from vistune.data.template.pieces import PieceTemplate
from vistune.data.template.prefix import paligemma_template
from vistune.data.template.question import cogvlm2_template
from vistune.registry import Registry

_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the human's questions."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
_LLM_BASED = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and"
    " honest answers."
)

_PLAIN = PieceTemplate(
    # LLaVA's stage 1: images and caption; the question is dropped, and no end of text is learnt.
    name="plain",
    answer_close="\n",
    close_empty=True,
    caption_only=True,
    stop=("\n",),
)
_VICUNA_V0 = PieceTemplate(
    # The first LLaVA and Vicuna v0. No token ends an answer: the mark of the next turn does, so the
    # marks are learnt, a person's too.
    name="vicuna_v0",
    system_default=_CURIOUS_HUMAN,
    system_close="\n\n",
    user_mark="### Human",
    user_open=": ",
    user_close="\n",
    answer_cue="### Assistant:",
    learn_cue=True,
    answer_open=" ",
    answer_close="\n",
    end="### ",
    close_empty=True,
    stop=("\n###",),
)
_VICUNA_V1 = PieceTemplate(
    # LLaVA-1.5 and Vicuna v1.1. No space after the colon of a generation prompt: the space is the
    # first thing learnt. No space between the end of an answer and the next question either.
    name="vicuna_v1",
    system_default=_CURIOUS_USER,
    system_close=" ",
    user_open="USER: ",
    user_close=" ",
    answer_cue="ASSISTANT:",
    answer_open=" ",
    answer_close="</s>",
    stop=("</s>",),
    markers=("</s>",),
)
_LLAMA_2 = PieceTemplate(
    # LLaVA on Llama-2-chat.
    name="llama_2",
    system_default=_LANGUAGE_AND_VISION,
    system_open="<<SYS>>\n",
    system_close="\n<</SYS>>\n\n",
    system_in_user=True,
    user_open="[INST] ",
    user_reopen="<s>[INST] ",
    user_close=" [/INST]",
    answer_open=" ",
    answer_close=" </s>",
    stop=("</s>",),
    markers=("<s>", "</s>"),
)
_MPT = PieceTemplate(
    # LLaVA's ChatML without newlines behind the end marks.
    name="mpt",
    system_default=_LLM_BASED,
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>",
    answer_cue="<|im_start|>assistant\n",
    answer_close="<|im_end|>",
    stop=("<|im_end|>",),
    markers=("<|im_start|>", "<|im_end|>"),
)
_CHATML = PieceTemplate(
    # ChatML proper: a newline behind every end mark, no system prompt of its own.
    name="chatml",
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>\n",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
    answer_cue="<|im_start|>assistant\n",
    answer_close="<|im_end|>",
    answer_gap="\n",
    stop=("<|im_end|>",),
    markers=("<|im_start|>", "<|im_end|>"),
)
_INTERNLM2_CHAT = _CHATML.model_copy(update={"name": "internlm2_chat"})
_QWEN = _CHATML.model_copy(
    update={"name": "qwen", "system_default": "You are a helpful assistant."}
)
_LLAMA3 = PieceTemplate(
    name="llama3",
    system_open="<|start_header_id|>system<|end_header_id|>\n\n",
    system_close="<|eot_id|>",
    user_open="<|start_header_id|>user<|end_header_id|>\n\n",
    user_close="<|eot_id|>",
    answer_cue="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer_close="<|eot_id|>",
    stop=("<|eot_id|>", "<|end_of_text|>"),
    markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_GEMMA = PieceTemplate(
    # MGM's Gemma: the end of text is learnt behind every answer. Gemma has no system role; a system
    # prompt stands in front of the first question.
    name="gemma",
    system_close="\n\n",
    system_in_user=True,
    user_open="<start_of_turn>user\n",
    user_close="<end_of_turn>\n",
    answer_cue="<start_of_turn>model\n",
    answer_close="<end_of_turn>\n<eos>",
    stop=("<end_of_turn>", "<eos>"),
    markers=("<start_of_turn>", "<end_of_turn>", "<eos>"),
)

TEMPLATES: Registry[ChatTemplate] = Registry("chat template")
"""The named templates. `tokenizer` is no entry: it is read from the tokenizer at hand."""

for _template in (
    _PLAIN,
    _VICUNA_V0,
    _VICUNA_V1,
    _LLAMA_2,
    _MPT,
    _CHATML,
    _INTERNLM2_CHAT,
    _QWEN,
    _LLAMA3,
    _GEMMA,
    cogvlm2_template("chat"),
    cogvlm2_template("vqa"),
    cogvlm2_template("base"),
    visualglm_template("zh"),
    visualglm_template("en"),
    paligemma_template(),
):
    TEMPLATES.register(_template.name)(_template)
