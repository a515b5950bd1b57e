"""InternLM2's tokenizer from its sentencepiece file, and InternLM2 as an ordinary part."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from family_dirs import write_pictures
from rich.console import Console
from tiny_parts import write_tower

from vistune.assembly import load_assembled
from vistune.errors import ModelError
from vistune.export import export_model
from vistune.generate import Prompt, generate
from vistune.models.facts import read_tokenizer
from vistune.models.language.pieces import fast_from_pieces
from vistune.recipe import LanguageModelConfig, Recipe, ResolvedRecipe
from vistune.train import train
from vistune.types import Turn

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
PIECES = PARITY / "tokenizers" / "llama_like" / "tokenizer.model"
ALPHABET = (" ", "  ", "\n", "a", "the", "Image", "12", "é", "你好", "▁", "☃", ".", "\t", "<")


@pytest.fixture
def internlm2(tmp_path: Path) -> Path:
    """InternLM2's weights with a table of 320 rows, and a sentencepiece file that fits them."""
    folder = tmp_path / "language"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(PARITY / "internlm2" / name, folder / name)
    settings = json.loads((folder / "config.json").read_text())
    # The public files name remote code, which is not run.
    settings |= {"model_type": "internlm2", "auto_map": {"AutoConfig": "configuration.X"}}
    (folder / "config.json").write_text(json.dumps(settings))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a picture of a red cat on a mat\nwhat is it\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=310,
        hard_vocab_limit=False,
        user_defined_symbols=["[FREE_0]", "[FREE_1]"],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    ids = {3: "<|im_start|>", 4: "<|im_end|>"}
    added = {str(i): {"content": c, "special": True} for i, c in ids.items()}
    config = {"added_tokens_decoder": added, "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_ids_are_sentencepieces_own(tmp_path: Path) -> None:
    shutil.copy(PIECES, tmp_path / "tokenizer.model")
    fast = fast_from_pieces(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(PIECES))
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(ALPHABET, k=draw.randint(1, 12)))
        assert fast.encode(text, add_special_tokens=False) == theirs.encode(text), text
    assert fast.encode("hello")[0] == fast.bos_token_id == 1
    assert fast.decode(fast.encode("a\n  b 12 é"), skip_special_tokens=True) == "a\n  b 12 é"


def test_added_tokens_take_the_places_kept_for_them(internlm2: Path) -> None:
    tokenizer, image_token_id = read_tokenizer(LanguageModelConfig(path=str(internlm2)))
    text = "<|im_start|>a cat<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (ids[0], ids[-1]) == (3, 4)
    assert tokenizer.convert_tokens_to_ids("[FREE_0]") in (None, tokenizer.unk_token_id)
    assert image_token_id == len(tokenizer) - 1
    config = json.loads((internlm2 / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["9000"] = {"content": "<|far|>"}
    (internlm2 / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot have the ids"):
        fast_from_pieces(internlm2)


def test_other_tokenizers_are_refused(internlm2: Path, tmp_path: Path) -> None:
    (internlm2 / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        read_tokenizer(LanguageModelConfig(path=str(internlm2)))
    (internlm2 / "tokenizer.model").write_bytes(b"no pieces")
    with pytest.raises(ModelError):
        read_tokenizer(LanguageModelConfig(path=str(internlm2)))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_internlm2_is_an_ordinary_part(internlm2: Path, tmp_path: Path, mode: str) -> None:
    write_tower(tmp_path / "tower")
    language = {"mode": "lora", "rank": 2} if mode == "lora" else {"mode": "full"}
    recipe = Recipe.model_validate(
        {
            "name": "internlm2",
            "run_dir": str(tmp_path / "run"),
            "device": "cpu",
            "dtype": "fp32",
            "model": {
                "vision_tower": {"path": str(tmp_path / "tower")},
                "language_model": {"path": str(internlm2)},
            },
            "tune": {"language": language},
            "data": {
                "train": [write_pictures(tmp_path / "pictures")],
                "template": "internlm2_chat",
                "workers": 0,
            },
            "batch": {"samples": 2, "max_tokens": 512},
            "train": {"steps": 2},
            "log": {"tensorboard": False, "progress": False},
        }
    )
    train(ResolvedRecipe(recipe=recipe, sources={}, origin="test"), console=Console(quiet=True))
    trained = load_assembled(tmp_path / "run")
    prompts = [Prompt((Turn("user", ("what is it",)),))]
    told = generate(trained.model, trained.encoder, prompts, max_new_tokens=4)
    written = export_model(tmp_path / "run", to="vistune", output=tmp_path / "out")
    again = load_assembled(written)
    assert generate(again.model, again.encoder, prompts, max_new_tokens=4) == told
    state = trained.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())
