"""ChatGLM-6B: settings, decoder and tokenizer, written for today's transformers."""

from vistune.models.chatglm.configuration import ChatGLMConfig
from vistune.models.chatglm.modeling import ChatGLMForCausalLM, ChatGLMModel

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel"]
