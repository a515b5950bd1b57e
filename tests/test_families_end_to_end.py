"""Every model family through the product: train, resume, answer, export, load again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "models"))

from family_dirs import (
    FAMILY_KINDS,
    LLAVA_KIND,
    LLAVA_KINDS,
    TILES_KIND,
    write_family,
    write_pictures,
)

from vistune.assembly import Assembled, Origin, load_assembled
from vistune.checkpoint.layouts import describe_directory
from vistune.checkpoint.layouts.visualglm_sat import write_visualglm_sat
from vistune.checkpoint.run_dir import RunDirectory
from vistune.cli import main
from vistune.errors import ModelError
from vistune.export import export_model
from vistune.generate import Prompt, generate
from vistune.models.hub import is_small
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train
from vistune.types import Turn

QUIET = Console(quiet=True)
TUNES: dict[str, dict[str, Any]] = {
    "lora": {"language": {"mode": "lora", "rank": 2}, "connector": {"mode": "full"}},
    "full": {
        "language": {"mode": "full"},
        "connector": {"mode": "full"},
        "vision": {"mode": "full"},
    },
}
FORMS = {
    "visualglm": ("vistune", "native", "sat"),
    "visualglm-sat": ("vistune", "native", "sat"),
    LLAVA_KIND: ("vistune", "llava"),
    TILES_KIND: ("vistune", "llava"),
}
EXPECTED = {
    "cogvlm2": ("cogvlm2_chat", "resize", 6),
    "visualglm": ("visualglm_zh", "resize", 8),
    "visualglm-sat": ("visualglm_zh", "resize", 8),
    "mgm-2b": ("gemma", "pad", 16),
    "mgm-2b-hd": ("gemma", "pad", 80),
    LLAVA_KIND: ("vicuna_v1", "pad", 16),
    TILES_KIND: ("vicuna_v1", "resize", 16),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("families")
    write_pictures(root / "pictures")
    for kind in (*FAMILY_KINDS, *LLAVA_KINDS):
        write_family(kind, root / kind)
    return root


@pytest.fixture(scope="module")
def wide_shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with layers that read multiples of 64 numbers."""
    root = tmp_path_factory.mktemp("wide")
    write_pictures(root / "pictures")
    for kind in (*FAMILY_KINDS, *LLAVA_KINDS):
        write_family(kind, root / kind, wide=True)
    return root


def recipe(shelf: Path, whole: Path, run_dir: Path, tune: dict[str, Any], **more: Any) -> Any:
    tree: dict[str, Any] = {
        "name": "family",
        "run_dir": str(run_dir),
        "device": "cpu",
        "dtype": "fp32",
        "model": {"from_checkpoint": str(whole)},
        "tune": tune,
        "data": {
            "train": [
                {
                    "format": "llava",
                    "path": str(shelf / "pictures" / "train.json"),
                    "images": str(shelf / "pictures"),
                }
            ],
            "workers": 0,
        },
        "batch": {"samples": 2, "max_tokens": 512},
        "train": {"steps": 2, "lr": 1e-3, "schedule": "constant", "warmup_frac": 0.0},
        "log": {"tensorboard": False, "progress": False},
    }
    tree = {
        key: {**value, **more.get(key, {})} if isinstance(value, dict) else value
        for key, value in tree.items()
    }
    return ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test")


def losses(run_dir: Path) -> list[float]:
    lines = RunDirectory(run_dir).metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@torch.no_grad()
def logits(assembled: Assembled) -> Tensor:
    picture = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    sample = assembled.encoder.encode_prompt([Turn("user", (0, "what is it"))], [picture])
    pixels = torch.from_numpy(sample.pixel_values[0])
    told = {"image_shapes": sample.image_shapes} if sample.image_shapes else {}
    out = assembled.model(
        input_ids=torch.from_numpy(sample.input_ids)[None],
        pixel_values=pixels if told else pixels[None],
        attention_mask=torch.ones(1, sample.input_ids.size, dtype=torch.int64),
        **told,
    )
    found: Tensor = out.logits
    return found


def answer(assembled: Assembled) -> list[str]:
    picture = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    asked = Prompt((Turn("user", (0, "what is it")),), (picture,))
    blind = Prompt((Turn("user", ("what is it",)),))
    return generate(assembled.model, assembled.encoder, [asked, blind], max_new_tokens=4)


@pytest.mark.parametrize("kind", [*FAMILY_KINDS, *LLAVA_KINDS])
def test_a_family_is_described_by_its_own_files(shelf: Path, kind: str) -> None:
    facts = describe_directory(shelf / kind)
    template, mode, num_image_tokens = EXPECTED[kind]
    side = facts.image_defaults.size_px
    found = (facts.template, facts.image_defaults.mode, facts.grid.num_tokens(side, side))
    assert found == (template, mode, num_image_tokens)
    encoder = load_assembled(shelf / kind).encoder
    assert (encoder.template.name, encoder.image_plan.mode) == (template, mode)


@pytest.mark.parametrize("kind", [*FAMILY_KINDS, *LLAVA_KINDS])
def test_a_run_reads_nothing_but_weights_from_its_base(
    shelf: Path, tmp_path: Path, kind: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(shelf / kind, base)
    started = recipe(shelf, base, tmp_path / "run", TUNES["lora"], train={"steps": 1})
    train(started, console=QUIET)
    trained = load_assembled(tmp_path / "run")
    expected, told = logits(trained), answer(trained)
    small = [file for file in base.iterdir() if is_small(file.name)]
    assert len(small) >= 2
    for file in small:
        file.write_bytes(b"of another release, and no JSON")
    again = load_assembled(tmp_path / "run")
    assert torch.equal(logits(again), expected) and answer(again) == told
    (note,) = [note for note in again.notes if str(base) in note]
    assert all(file.name in note for file in small)
    form = FORMS.get(kind, ("vistune", "native"))[1]
    written = export_model(tmp_path / "run", to=form, output=tmp_path / "out")  # type: ignore[arg-type]
    assert torch.equal(logits(load_assembled(written)), expected)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", [*FAMILY_KINDS, *LLAVA_KINDS])
def test_train_resume_answer_export(shelf: Path, tmp_path: Path, kind: str, mode: str) -> None:
    tune = TUNES[mode]
    train(recipe(shelf, shelf / kind, tmp_path / "whole", tune), console=QUIET)
    first = recipe(shelf, shelf / kind, tmp_path / "run", tune, train={"steps": 1})
    train(first, console=QUIET)
    train(recipe(shelf, shelf / kind, tmp_path / "run", tune), resume=True, console=QUIET)
    # The same arithmetic in the same order: bit for bit.
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    trained = load_assembled(tmp_path / "run")
    expected, told = logits(trained), answer(trained)
    assert not torch.equal(expected, logits(load_assembled(shelf / kind)))
    forms = FORMS.get(kind, ("vistune", "native"))
    for form in forms:
        written = export_model(tmp_path / "run", to=form, output=tmp_path / form)  # type: ignore[arg-type]
        again = load_assembled(written)
        assert torch.equal(logits(again), expected), form
        assert answer(again) == told
        assert again.encoder.to_state() == trained.encoder.to_state()


@pytest.mark.parametrize("kind", [*FAMILY_KINDS, *LLAVA_KINDS])
def test_packed_rows_give_the_loss_of_single_ones(shelf: Path, tmp_path: Path, kind: str) -> None:
    for pack in (True, False):
        one = recipe(
            shelf,
            shelf / kind,
            tmp_path / str(pack),
            TUNES["full"],
            batch={"pack": pack, "samples": 4},
        )
        train(one, console=QUIET)
    # The same sums in another order, twice rounded by an optimizer step.
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


# 8 bits keep a weight to one part in 254 of its row's largest; 16 levels in blocks of 64 are off by
# 0.09 of a weight's norm.
ROUNDED = {"int8": 2e-2, "nf4": 2e-1}


@pytest.mark.parametrize("form", list(ROUNDED))
@pytest.mark.parametrize("kind", [*FAMILY_KINDS, *LLAVA_KINDS])
def test_adapters_beside_rounded_weights(
    wide_shelf: Path, tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = {"int8": bitsandbytes.nn.Linear8bitLt, "nf4": bitsandbytes.nn.Linear4bit}[form]
    seen = []
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda me, x: seen.append(1) or forward(me, x))

    def run(name: str, held: str, steps: int = 2, *, resume: bool = False) -> list[float]:
        language = {**TUNES["lora"]["language"], "frozen_format": held}
        tune = {"language": language, "connector": {"mode": "full"}}
        made = recipe(wide_shelf, wide_shelf / kind, tmp_path / name, tune, train={"steps": steps})
        train(made, resume=resume, console=QUIET)
        return losses(tmp_path / name)

    plain = run("plain", "same")
    assert not seen
    rounded = run("rounded", form)
    assert seen and plain != rounded
    assert rounded == pytest.approx(plain, rel=ROUNDED[form])
    run("stopped", form, steps=1)
    # Rounded anew from the weights as they were loaded: bit for bit the same.
    assert run("stopped", form, resume=True) == rounded
    trained = load_assembled(tmp_path / "rounded")
    written = export_model(tmp_path / "rounded", to="vistune", output=tmp_path / "out")
    assert answer(load_assembled(written)) == answer(trained)
    # Adapters are merged into the weights as they were loaded, so what did not train is unchanged.
    before = load_assembled(wide_shelf / kind).model.state_dict()
    same = [n for n, t in trained.model.state_dict().items() if torch.equal(t, before[n])]
    # Biases that move all scores of a window alike change nothing: their gradients are zero.
    moved = [n for n in same if not n.startswith("connector.mining.key.") or "bias" not in n]
    assert same and not {trained.model.module_map.role_of(n) for n in moved} >= {"connector"}


def test_only_the_visual_experts_of_cogvlm2(shelf: Path, tmp_path: Path) -> None:
    targets = ["vision_expert_query_key_value", "vision_expert_dense"]
    tune = {
        "language": {"mode": "lora", "rank": 2, "targets": targets},
        "connector": {"mode": "freeze"},
    }
    train(recipe(shelf, shelf / "cogvlm2", tmp_path / "run", tune), console=QUIET)
    before, after = load_assembled(shelf / "cogvlm2"), load_assembled(tmp_path / "run")
    ours, theirs = after.model.state_dict(), before.model.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    expected = {
        f"model.layers.{n}.self_attn.{target}.weight" for n in range(3) for target in targets
    }
    # What the last layer writes at image tokens is read by no one.
    assert changed == expected - {"model.layers.2.self_attn.vision_expert_dense.weight"}


def test_forms_that_a_family_has_not(shelf: Path, tmp_path: Path) -> None:
    for form in ("hf", "adapter"):
        with pytest.raises(ModelError, match="cannot be written"):
            export_model(shelf / "mgm-2b", to=form, output=tmp_path / form)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="only VisualGLM"):
        export_model(shelf / "mgm-2b", to="sat", output=tmp_path / "sat")


def test_fused_layers_of_families(shelf: Path, tmp_path: Path) -> None:
    fused = {"fused": "on"}
    train(
        recipe(shelf, shelf / "mgm-2b", tmp_path / "run", TUNES["lora"], train=fused), console=QUIET
    )
    with pytest.raises(ModelError, match="no fused form"):
        train(
            recipe(shelf, shelf / "cogvlm2", tmp_path / "other", TUNES["lora"], train=fused),
            console=QUIET,
        )


def test_a_tokenizer_of_another_release_is_refused(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    write_family("visualglm", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["gmask_token_id"] += 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="other ids"):
        describe_directory(folder)
    (folder / "ice_text.model").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        describe_directory(folder)


@pytest.mark.parametrize("kind", ["cogvlm2", "visualglm", "mgm-2b"])
def test_a_second_stage_goes_on_from_the_first(shelf: Path, tmp_path: Path, kind: str) -> None:
    train(recipe(shelf, shelf / kind, tmp_path / "one", TUNES["lora"]), console=QUIET)
    connector = {"connector": {"mode": "full"}}
    train(recipe(shelf, tmp_path / "one", tmp_path / "two", connector), console=QUIET)
    first, second = load_assembled(tmp_path / "one"), load_assembled(tmp_path / "two")
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert {second.model.module_map.role_of(name) for name in changed} == {"connector"}
    written = export_model(tmp_path / "two", to="native", output=tmp_path / "out")
    assert torch.equal(logits(load_assembled(written)), logits(second))


def test_the_older_order_of_rows_in_a_sat_directory(shelf: Path, tmp_path: Path) -> None:
    newer = load_assembled(shelf / "visualglm-sat")
    older = shutil.copytree(shelf / "visualglm-sat", tmp_path / "older")
    write_visualglm_sat(newer.model, older, qkv="by_head", dtype=torch.float32)  # type: ignore[arg-type]
    assert not torch.equal(logits(load_assembled(older)), logits(newer))
    told = Origin(sat_qkv="by_head")
    assert torch.equal(logits(load_assembled(older, origin=told)), logits(newer))
    written = export_model(older, to="native", output=tmp_path / "native", origin=told)
    assert torch.equal(logits(load_assembled(written)), logits(newer))
    # A run remembers it: its parts are the directory and the order.
    losses_of = []
    for model, order in ((older, "by_head"), (shelf / "visualglm-sat", None)):
        run_dir = tmp_path / f"run-{order}"
        asked = {"from_checkpoint": str(model), "sat_qkv": order}
        made = recipe(shelf, model, run_dir, TUNES["lora"], model=asked, train={"steps": 1})
        train(made, console=QUIET)
        train(recipe(shelf, model, run_dir, TUNES["lora"], model=asked), resume=True, console=QUIET)
        losses_of.append(losses(run_dir))
    assert losses_of[0] == losses_of[1]
    runs = [load_assembled(tmp_path / f"run-{order}") for order in ("by_head", None)]
    assert torch.equal(logits(runs[0]), logits(runs[1]))
    for wrong in (shelf / "visualglm", tmp_path / "run-None"):
        with pytest.raises(ModelError, match="sat_qkv"):
            load_assembled(wrong, origin=told)


@pytest.mark.parametrize("kind", ["cogvlm2", "visualglm-sat", "mgm-2b-hd", *LLAVA_KINDS])
def test_the_command_line_takes_a_family(
    shelf: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["vistune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    picture = str(shelf / "pictures" / "0.png")
    run("chat", str(shelf / kind), "-i", picture, "-p", "what is it", "--max-new-tokens", "2")
    question = {"id": 1, "image": "0.png", "question": "what?", "answers": ["red"]}
    choice = {**question, "id": 2, "type": "choice", "choices": ["red", "blue"]}
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps(row) for row in ({**question, "type": "free"}, choice)))
    told = run(
        *("eval", str(shelf / kind), str(task), "--images", str(shelf / "pictures")),
        *("--output", str(tmp_path / "results"), "--max-new-tokens", "2"),
    )
    assert "no image" in told
