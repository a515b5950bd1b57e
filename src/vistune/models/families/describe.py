"""What a family's model will be, from its config and tokenizer files: `ModelFacts`, no weights.

The same for a public directory and for one that vistune wrote; only where the config comes from
differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import processors
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

from vistune.errors import ModelError
from vistune.models.chatglm.fast_tokenizer import fast_tokenizer
from vistune.models.chatglm.tokenizer import VOCABULARY_NAME
from vistune.models.cogvlm2 import CogVLM2Config
from vistune.models.cogvlm2.model import image_defaults as cogvlm2_image_defaults
from vistune.models.cogvlm2.model import vision_grid as cogvlm2_grid
from vistune.models.facts import ModelFacts
from vistune.models.mgm import MGMConfig
from vistune.models.mgm.configuration import image_defaults as mgm_image_defaults
from vistune.models.mgm.configuration import vision_grid as mgm_grid
from vistune.models.visualglm import VisualGLMConfig
from vistune.models.visualglm.configuration import image_defaults as visualglm_image_defaults
from vistune.models.visualglm.configuration import vision_grid as visualglm_grid
from vistune.models.weights import hub_error, quiet_transformers

FamilyConfig: TypeAlias = CogVLM2Config | MGMConfig | VisualGLMConfig
_KEY = "model.from_checkpoint"
_TOKENIZER_NAME = "tokenizer.json"
_PIECES_NAME = "tokenizer.model"


def facts_of(config: FamilyConfig, folder: Path) -> ModelFacts:
    """Describes a model of a family.

    Args:
        config: Its config.
        folder: Where its tokenizer's files are.

    Raises:
        ModelError: The tokenizer is missing or does not fit the model.
    """
    if isinstance(config, CogVLM2Config):
        return ModelFacts(
            tokenizer=_cogvlm2_tokenizer(config, folder),
            image_token_id=int(config.image_token_id),
            grid=cogvlm2_grid(config),
            image_defaults=cogvlm2_image_defaults(config),
            vision_config=config.vision_config,
            text_config=config,
            tower=None,
            template=f"cogvlm2_{config.template_version}",
            whole_config=config,
        )
    image_token_id = config.image_token_id
    assert image_token_id is not None
    if isinstance(config, MGMConfig):
        tokenizer = _gemma_tokenizer(config, folder)
        grid, defaults, template = mgm_grid(config), mgm_image_defaults(config), "gemma"
    else:
        tokenizer = _visualglm_tokenizer(config, folder)
        grid, defaults = visualglm_grid(config), visualglm_image_defaults(config)
        template = "visualglm_zh"
    return ModelFacts(
        tokenizer=tokenizer,
        image_token_id=image_token_id,
        grid=grid,
        image_defaults=defaults,
        vision_config=config.vision_config,
        text_config=config.text_config,
        tower=None,
        template=template,
        whole_config=config,
    )


def _cogvlm2_tokenizer(config: CogVLM2Config, folder: Path) -> Any:
    tokenizer = _read_fast(folder)
    return _begun_by(tokenizer, config.bos_token_id)


def _gemma_tokenizer(config: MGMConfig, folder: Path) -> Any:
    if (folder / _TOKENIZER_NAME).is_file() or not (folder / _PIECES_NAME).is_file():
        tokenizer = _read_fast(folder)
    else:
        try:
            with quiet_transformers():
                tokenizer = GemmaTokenizer.from_pretrained(folder)
        except Exception as error:  # tokenizer files fail in many ways, all the user's to mend
            raise hub_error(error, path=str(folder), key=_KEY) from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise ModelError(
            "the tokenizer has more tokens than the model has embeddings",
            where=str(folder),
            got=f"{len(tokenizer)} tokens, {config.text_config.vocab_size} embeddings",
            fix="use the tokenizer that belongs to the model",
        )
    text = config.text_config
    tokenizer = _begun_by(tokenizer, int(text.bos_token_id))
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(text.eos_token_id))
    return tokenizer


def _visualglm_tokenizer(config: VisualGLMConfig, folder: Path) -> Any:
    if (folder / _TOKENIZER_NAME).is_file():
        return _with_ids_of(config, _read_fast(folder), folder)
    pieces = folder / VOCABULARY_NAME
    if not pieces.is_file():
        raise ModelError(
            "the model directory has no tokenizer",
            where=str(folder),
            expected=f"{VOCABULARY_NAME}, or {_TOKENIZER_NAME} as vistune writes it",
            fix=f"put {VOCABULARY_NAME} of VisualGLM-6B beside the weights",
        )
    tokenizer = fast_tokenizer(pieces, vocab_size=config.text_config.vocab_size)
    return _with_ids_of(config, tokenizer, folder)


def _with_ids_of(config: VisualGLMConfig, tokenizer: Any, folder: Path) -> Any:
    """Proves that the marks of prompts and answers have the ids by which the model knows them."""
    text = config.text_config
    expected = {
        "[gMASK]": int(text.gmask_token_id),
        "<sop>": int(text.bos_token_id),
        "<eop>": int(text.eos_token_id),
    }
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected:
        raise ModelError(
            "tokenizer and config give the model's marks other ids",
            where=str(folder),
            got=found,
            expected=expected,
            fix="use the tokenizer and the config of one release",
        )
    return tokenizer


def _read_fast(folder: Path) -> Any:
    """Reads `tokenizer.json` by itself: these configs name classes that transformers has not."""
    if not (folder / _TOKENIZER_NAME).is_file():
        raise ModelError(
            "the model directory has no tokenizer",
            where=str(folder),
            expected=_TOKENIZER_NAME,
            fix=f"put the {_TOKENIZER_NAME} of the model beside its weights",
        )
    try:
        with quiet_transformers():
            return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizer files fail in many ways, all of them the user's to mend
        raise hub_error(error, path=str(folder), key=_KEY) from error


def _begun_by(tokenizer: Any, token_id: int) -> Any:
    """Returns a tokenizer that puts the family's begin of text in front of every text."""
    backend = tokenizer.backend_tokenizer
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        raise ModelError("the tokenizer lacks the model's begin of text", got=f"id {token_id}")
    if tokenizer.bos_token_id != token_id:
        tokenizer.bos_token = token
    if backend.encode("a").ids[:1] != [token_id]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A",
            pair=f"{token} $A {token} $B",
            special_tokens=[(token, token_id)],
        )
    return tokenizer
