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
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from tiny_parts import write_tower
from tokenizers import AddedToken, Tokenizer, models, normalizers

from vistune.assembly import load_assembled
from vistune.checkpoint.run_dir import RunDirectory
from vistune.errors import ModelError
from vistune.export import export_model
from vistune.generate import Prompt, generate
from vistune.models.connectors import build_connector
from vistune.models.facts import load_tokenizer, read_tokenizer
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


def xtuner_parts(folder: Path) -> dict[str, dict[str, str]]:
    """A checkpoint of a projector, an adapter by InternLM2's names; returns the recipe's keys."""
    torch.manual_seed(6)
    state = build_connector("mlp2x_gelu", num_in=24, num_out=64).state_dict()
    saved = {f"projector.model.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": saved, "meta": {"iter": 5}}, folder / "iter_5.pth")
    adapter = folder / "llm_adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.1.attention.wqkv"
    pair = {f"{module}.lora_A.weight": torch.randn(2, 64)}
    pair[f"{module}.lora_B.weight"] = torch.randn(96, 2)
    save_file(pair, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return {
        "connector": {"weights": str(folder / "iter_5.pth")},
        "language_model": {"adapter": str(adapter)},
    }


@pytest.mark.parametrize("mode", ["lora", "full", "int8", "nf4"])
@pytest.mark.parametrize("start", ["public", "xtuner"])
def test_internlm2_is_an_ordinary_part(
    internlm2: Path, tmp_path: Path, start: str, mode: str
) -> None:
    write_tower(tmp_path / "tower")
    language = {"mode": "full"} if mode == "full" else {"mode": "lora", "rank": 2}
    if mode in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
        language["frozen_format"] = mode
    more = xtuner_parts(tmp_path) if start == "xtuner" else {}
    tree = {
        "name": "internlm2",
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "model": {
            "vision_tower": {"path": str(tmp_path / "tower")},
            "language_model": {"path": str(internlm2), **more.get("language_model", {})},
            "connector": more.get("connector", {}),
        },
        "tune": {"language": language},
        "data": {
            "train": [write_pictures(tmp_path / "pictures")],
            "template": "internlm2_chat",
            "workers": 0,
        },
        "batch": {"samples": 2, "max_tokens": 512},
        "train": {"steps": 1, "schedule": "constant", "warmup_frac": 0.0},
        "log": {"tensorboard": False, "progress": False},
    }

    def run(steps: int, run_dir: str, *, resume: bool = False) -> list[float]:
        changed = {**tree, "run_dir": str(tmp_path / run_dir), "train": tree["train"]}
        recipe = Recipe.model_validate(changed | {"train": {**tree["train"], "steps": steps}})
        made = ResolvedRecipe(recipe=recipe, sources={}, origin="test")
        train(made, resume=resume, console=Console(quiet=True))
        lines = RunDirectory(tmp_path / run_dir).metrics.read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    run(1, "run")
    assert run(2, "run", resume=True) == run(2, "whole")
    trained = load_assembled(tmp_path / "run")
    picture = Image.new("RGB", (30, 40), (200, 40, 40))
    prompts = [
        Prompt((Turn("user", ("what is it",)),)),
        Prompt((Turn("user", (0, "what is it")),), (picture,)),
    ]
    told = generate(trained.model, trained.encoder, prompts, max_new_tokens=4)
    written = export_model(tmp_path / "run", to="vistune", output=tmp_path / "out")
    again = load_assembled(written)
    assert generate(again.model, again.encoder, prompts, max_new_tokens=4) == told
    state = trained.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_rules_of_a_tokenizer_file_are_not_made_anew(tmp_path: Path, model_type: str) -> None:
    # No blank in front of a text, as in Yi's; transformers' class puts one there.
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "▁": 2, "▁a": 3}, merges=[("▁", "a")]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer, _ = load_tokenizer(str(tmp_path), key="test")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("aa a")) == ["a", "a", "▁a"]
    # A begin of text that the settings alone state is put in front.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    tokenizer, _ = load_tokenizer(str(tmp_path), key="test")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a a")) == ["<s>", "a", "▁a"]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(str(tmp_path), key="test")
