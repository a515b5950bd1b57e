"""A run goes by the small files of its parts as they were when it started."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_loop import LORA, QUIET, losses, resolved

from vistune.assembly import Origin, load_assembled
from vistune.errors import CheckpointError
from vistune.export import export_model
from vistune.recipe import BasesConfig, Recipe, ResolvedRecipe
from vistune.train import train
from vistune.types import Turn


@pytest.fixture
def moved_tiny(tiny: Path, tmp_path: Path) -> Path:
    """The tiny parts where a test may change them."""
    for part in ("clip", "llama", "images"):
        shutil.copytree(tiny / part, tmp_path / part)
    shutil.copy(tiny / "train.json", tmp_path / "train.json")
    return tmp_path


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite_base(folder: Path) -> None:
    """What a newer release of the base might change: rotary base, normalisation, a token's id."""
    config = json.loads((folder / "llama" / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_theta": 77.0}
    edit(folder / "llama" / "config.json", rope_parameters=rope, rms_norm_eps=0.5)
    edit(folder / "clip" / "preprocessor_config.json", image_mean=[0.0, 0.0, 0.0])
    tokenizer = json.loads((folder / "llama" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "llama" / "tokenizer.json").write_text(json.dumps(tokenizer))


@torch.no_grad()
def logits(run: Path, origin: Origin | None = None) -> torch.Tensor:
    found = load_assembled(run, origin=origin or Origin())
    turns = [Turn("user", ("What do you see in the picture?",))]
    ids = torch.from_numpy(found.encoder.encode_prompt(turns, []).input_ids)
    count = len(ids)
    hidden = found.model.hidden_states(
        input_ids_BT=ids[None],
        position_ids_BT=torch.arange(count)[None],
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        max_seqlen=count,
        pixel_values_NCYX=None,
    )
    return found.model.logits(hidden[0])


def test_a_run_goes_on_and_answers_by_its_own_configs_and_tokenizer(moved_tiny, tmp_path):
    run = tmp_path / "r"
    recipe = resolved(moved_tiny, run, save={"every_steps": 3}, tune=LORA)
    result = train(recipe, console=QUIET)
    whole, expected = losses(run), logits(run)
    kept = {p.relative_to(result.checkpoint).as_posix() for p in result.checkpoint.rglob("*")}
    assert {
        "part_files/vision/config.json",
        "part_files/vision/preprocessor_config.json",
        "part_files/language/config.json",
        "part_files/language/tokenizer.json",
    } <= kept
    rewrite_base(moved_tiny)
    assert torch.equal(logits(run), expected)
    (result.checkpoint / "COMPLETE").unlink()
    console = Console(file=io.StringIO(), record=True, width=400)
    again = train(recipe, resume=True, console=console)
    said = console.export_text()
    assert "config.json (rms_norm_eps: 1e-06 -> 0.5; rope_parameters.rope_theta" in said
    assert "tokenizer.json" in said and "the checkpoint goes by its own copies" in said
    assert losses(run) == whole and torch.equal(logits(run), expected)
    assert (again.checkpoint / "part_files" / "language" / "tokenizer.json").is_file()
    # What is exported, and what goes on from the run, goes by them too.
    written = export_model(run, to="vistune", output=tmp_path / "out")
    assert torch.allclose(logits(written), expected, atol=1e-5)
    further = resolved(
        moved_tiny, tmp_path / "further", model={"from_checkpoint": str(run)}, train={"steps": 1}
    )
    train(further, console=QUIET)
    shutil.rmtree(run)
    tokens = load_assembled(tmp_path / "further").encoder.tokenizer.get_vocab()
    assert tokens == load_assembled(written).encoder.tokenizer.get_vocab()
    # Nothing written down names a place that is gone.
    for file in (tmp_path / "further").rglob("*.json"):
        assert "vistune-" not in file.read_text(), file


def test_a_run_whose_base_was_moved_goes_on(moved_tiny, tmp_path):
    train(resolved(moved_tiny, tmp_path / "whole", tune=LORA), console=QUIET)
    first = resolved(moved_tiny, tmp_path / "r", tune=LORA, save={"every_steps": 3})
    (train(first, console=QUIET).checkpoint / "COMPLETE").unlink()
    shutil.move(moved_tiny / "llama", moved_tiny / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.language_model\.path with --resume"):
        train(first, resume=True, console=QUIET)
    tree = first.recipe.model_dump(mode="json")
    for place, weights in (("clip", "were changed since"), ("elsewhere", None)):
        tree["model"]["language_model"]["path"] = str(moved_tiny / place)
        now = ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test")
        if weights is None:
            train(now, resume=True, console=QUIET)
        else:
            with pytest.raises(CheckpointError, match=weights):
                train(now, resume=True, console=QUIET)
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")
    # From here on the run knows where it is.
    train(now, resume=True, console=QUIET)
    assert torch.equal(logits(tmp_path / "r"), logits_of(tmp_path / "whole", moved_tiny))


def logits_of(run: Path, folder: Path) -> torch.Tensor:
    return logits(run, Origin(BasesConfig(language_model=str(folder / "elsewhere"))))


def test_a_moved_base_is_named_anew_and_must_be_the_same(moved_tiny, tmp_path):
    run = tmp_path / "r"
    train(resolved(moved_tiny, run, train={"steps": 1}, tune=LORA), console=QUIET)
    expected = logits(run)
    shutil.move(moved_tiny / "llama", moved_tiny / "elsewhere")
    with pytest.raises(CheckpointError, match=r"not there any more(.|\n)*--language-model"):
        load_assembled(run)
    moved = Origin(BasesConfig(language_model=str(moved_tiny / "elsewhere")))
    assert torch.equal(logits(run, moved), expected)
    adapter = export_model(run, to="adapter", output=tmp_path / "a", origin=moved)
    config = json.loads((adapter / "language_model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved_tiny / "elsewhere")
    weights = moved_tiny / "elsewhere" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100:] = bytes(100)
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="language were changed"):
        load_assembled(run, origin=moved)


def test_a_checkpoint_of_an_earlier_version_still_goes_by_its_bases(moved_tiny, tmp_path):
    """Those kept no small files: they load as long as the tokenizer is the one they record."""
    from vistune.checkpoint.files import write_seal

    run = tmp_path / "r"
    recipe = resolved(moved_tiny, run, train={"steps": 2}, save={"every_steps": 1})
    result = train(recipe, console=QUIET)
    expected = logits(run)
    for folder in (run, *(run / "checkpoints").iterdir()):
        shutil.rmtree(folder / "part_files")
    for folder in (run / "checkpoints").iterdir():
        (folder / "COMPLETE").unlink()
        write_seal(folder, step=int(folder.name[-8:]))
    assert torch.equal(logits(run), expected)
    (result.checkpoint / "COMPLETE").unlink()
    again = train(recipe, resume=True, console=QUIET)
    assert (again.checkpoint / "part_files" / "language" / "tokenizer.json").is_file()
    shutil.rmtree(again.checkpoint)
    rewrite_base(moved_tiny)
    with pytest.raises(CheckpointError, match="files of tokenizer were changed"):
        load_assembled(run)
