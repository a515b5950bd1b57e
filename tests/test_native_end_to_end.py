"""Every one of transformers' own models through the product: train, resume, answer, export."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "models" / "native"))

from devices import DEVICES, REPEATS
from native_dirs import KINDS, write_native

from vistune.assembly import Assembled, Origin, load_assembled
from vistune.checkpoint.run_dir import RunDirectory
from vistune.cli import main
from vistune.errors import CheckpointError, ModelError
from vistune.export import export_model
from vistune.generate import Prompt, generate
from vistune.models.hub import is_small
from vistune.models.native import NativeVLM
from vistune.recipe import BasesConfig, Recipe, ResolvedRecipe
from vistune.train import train
from vistune.types import Turn

QUIET = Console(quiet=True)
FULL = {role: {"mode": "full"} for role in ("vision", "connector", "language")}
LORA = {
    "vision": {"mode": "lora", "rank": 3, "alpha": 6.0, "lr": 2e-3},
    "connector": {"mode": "full", "lr": 5e-4},
    "language": {"mode": "lora", "rank": 2, "alpha": 8.0},
}

EXPERTS = {"qwen3_vl_moe", "minicpmv4_6", "mistral3", "pixtral"}
"""Kinds whose operations are not known."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("native")
    write_rows(root / "pictures")
    for kind in KINDS:
        write_native(kind, root / kind)
    return root


def write_rows(folder: Path) -> None:
    """Writes pictures of several shapes and a file of rows with none, one and two of them."""
    folder.mkdir()
    for index, size in enumerate([(50, 90), (90, 30), (33, 33), (64, 40)]):
        drawn = np.random.RandomState(index).randint(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(folder / f"{index}.png")
    rows = []
    for number, images in enumerate(([0], [1, 2], [], [3])):
        asked = "".join("<image>\n" for _ in images) + "what is it"
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"a cat {number}"}]
        row: dict[str, Any] = {"id": str(number), "conversations": said}
        if images:
            row["image"] = [f"{index}.png" for index in images]
        rows.append(row)
    (folder / "train.json").write_text(json.dumps(rows))


def recipe(shelf: Path, model: Path, run_dir: Path, tune: dict[str, Any], **more: Any) -> Any:
    source = {
        "path": str(shelf / "pictures" / "train.json"),
        "images": str(shelf / "pictures"),
    }
    tree: dict[str, Any] = {
        "name": "native",
        "run_dir": str(run_dir),
        "device": "cpu",
        "dtype": "fp32",
        "model": {"from_checkpoint": str(model)},
        "tune": tune,
        "data": {"train": [source], "workers": 0},
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


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((50, 40)).convert("RGB")


def inputs_of(assembled: Assembled) -> dict[str, Any]:
    """Returns what transformers' class takes for one question about a picture."""
    model = assembled.model
    assert isinstance(model, NativeVLM)
    sample = assembled.encoder.encode_prompt([Turn("user", (0, "what is it"))], [picture()])
    ids = torch.from_numpy(sample.input_ids)[None]
    images = model.generation_inputs(
        input_ids_BT=ids,
        pixel_values=torch.from_numpy(np.concatenate(sample.pixel_values)),
        image_shapes=sample.image_shapes,
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


@torch.no_grad()
def logits(assembled: Assembled) -> Tensor:
    found: Tensor = assembled.model(**inputs_of(assembled)).logits
    return found


def answers(assembled: Assembled) -> list[str]:
    asked = Prompt((Turn("user", (0, "what is it")),), (picture(),))
    blind = Prompt((Turn("user", ("what is it",)),))
    return generate(assembled.model, assembled.encoder, [asked, blind], max_new_tokens=4)


def changed_roles(before: Assembled, after: Assembled) -> set[str]:
    ours = dict(after.model.named_parameters())
    theirs = dict(before.model.named_parameters())
    names = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    return {after.model.module_map.role_of(name) for name in names}


@pytest.mark.parametrize("kind", ["gemma3", "internvl", "qwen2_5_vl"])
def test_a_run_reads_nothing_but_weights_from_its_base(
    shelf: Path, tmp_path: Path, kind: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(shelf / kind, base)
    tune = {"language": {"mode": "lora", "rank": 2}, "connector": {"mode": "freeze"}}
    train(recipe(shelf, base, tmp_path / "run", tune, train={"steps": 1}), console=QUIET)
    trained = load_assembled(tmp_path / "run")
    expected, told = logits(trained), answers(trained)
    for file in base.iterdir():
        if is_small(file.name):
            file.write_bytes(b"of another release, and no JSON")
    again = load_assembled(tmp_path / "run")
    assert torch.equal(logits(again), expected) and answers(again) == told
    for form in ("hf", "adapter"):
        export_model(tmp_path / "run", to=form, output=tmp_path / form)  # type: ignore[arg-type]
    assert torch.equal(logits(load_assembled(tmp_path / "hf")), expected)
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= names
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"not there any more(.|\n)*--base-model"):
        load_assembled(tmp_path / "run")
    moved = Origin(BasesConfig(model=str(tmp_path / "moved")))
    assert torch.equal(logits(load_assembled(tmp_path / "run", origin=moved)), expected)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_all_of_it_trains_resumes_and_is_exported(shelf: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForImageTextToText

    tied = not load_assembled(shelf / kind).model.module_map.head
    tune = FULL if tied else {**FULL, "head": {"mode": "full"}}
    again = {"checkpoint_layers": 1}
    train(recipe(shelf, shelf / kind, tmp_path / "whole", tune), console=QUIET)
    part = recipe(shelf, shelf / kind, tmp_path / "run", tune, train={"steps": 1, **again})
    train(part, console=QUIET)
    rest = recipe(shelf, shelf / kind, tmp_path / "run", tune, train=again)
    train(rest, resume=True, console=QUIET)
    # The same arithmetic in the same order, a layer of it twice: bit for bit.
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    metrics = RunDirectory(tmp_path / "whole").metrics.read_text().splitlines()
    known = json.loads(metrics[-1])["useful_tflops"] is not None
    assert known == (kind not in EXPERTS)

    trained = load_assembled(tmp_path / "run")
    roles = {"vision", "connector", "language"} | ({"head"} if not tied else set())
    assert changed_roles(load_assembled(shelf / kind), trained) == roles
    expected, told = logits(trained), answers(trained)
    for form in ("vistune", "hf"):
        written = export_model(tmp_path / "run", to=form, output=tmp_path / form)  # type: ignore[arg-type]
        loaded = load_assembled(written)
        assert torch.equal(logits(loaded), expected), form
        assert answers(loaded) == told
        assert loaded.encoder.to_state() == trained.encoder.to_state()
    theirs = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = theirs.eval()(**inputs_of(trained)).logits
    # Another order of operations in attention.
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    before, after = (weight_names(folder) for folder in (shelf / kind, tmp_path / "hf"))
    assert before == after


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_half_precision_gives_nearly_the_same_losses(
    shelf: Path, tmp_path: Path, kind: str
) -> None:
    found = []
    for dtype in ("fp32", "bf16"):
        one = recipe(shelf, shelf / kind, tmp_path / dtype, FULL, train={"steps": 1})
        cast = one.recipe.model_copy(update={"dtype": dtype})
        train(ResolvedRecipe(recipe=cast, sources={}, origin="test"), console=QUIET)
        found += losses(tmp_path / dtype)
    # 8 bits of mantissa, through a few layers.
    assert found[1] == pytest.approx(found[0], rel=1e-2) and found[0] != found[1]
    half = load_assembled(tmp_path / "bf16", dtype=torch.bfloat16)
    assert len(answers(half)) == 2


def weight_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names |= set(weights.keys())
    return names


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_adapters_with_rates_of_their_own(shelf: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    result = recipe(shelf, shelf / kind, tmp_path / "run", LORA)
    train(result, console=QUIET)
    trained = load_assembled(tmp_path / "run")
    assert changed_roles(load_assembled(shelf / kind), trained) == {
        "vision",
        "connector",
        "language",
    }
    expected = logits(trained)
    merged = export_model(tmp_path / "run", to="hf", output=tmp_path / "hf")
    assert answers(load_assembled(merged)) == answers(trained)
    weights = dict(trained.model.named_parameters())
    if any(name in weights for name in trained.model.module_map.connector):
        with pytest.raises(ModelError, match="no module, which a PEFT adapter cannot hold"):
            export_model(tmp_path / "run", to="adapter", output=tmp_path / "adapter")
        return
    written = export_model(tmp_path / "run", to="adapter", output=tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(
        shelf / kind, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, str(written)).eval()
    with torch.no_grad():
        found = theirs(**inputs_of(trained)).logits
        with theirs.disable_adapter():
            plain = theirs(**inputs_of(trained)).logits
    # Adapters beside the weights, not merged into them, and another attention.
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_adapters_beside_rounded_weights(shelf: Path, tmp_path: Path, kind: str, form: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_native(kind, tmp_path / "model", wide=True) if form == "nf4" else shelf / kind

    def run(name: str, held: str) -> float:
        language = {"mode": "lora", "rank": 2, "frozen_format": held}
        tune = {"connector": {"mode": "freeze"}, "language": language}
        made = recipe(shelf, folder, tmp_path / name, tune, train={"steps": 1})
        train(made, console=QUIET)
        return losses(tmp_path / name)[0]

    plain, rounded = run("plain", "same"), run(form, form)
    assert plain != rounded
    # 8 bits keep a weight to one part in 254 of its row's largest; 16 levels in blocks of 64 are
    # off by 0.09 of a weight's norm.
    assert rounded == pytest.approx(plain, rel={"int8": 2e-2, "nf4": 2e-1}[form])
    assert changed_roles(load_assembled(folder), load_assembled(tmp_path / form)) == {"language"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_runs_beside_rounded_weights_learn_resume_and_are_merged(
    shelf: Path, tmp_path: Path, kind: str, form: str, device: str
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_native(kind, tmp_path / "model", wide=True)

    def run(name: str, held: str, steps: int, *, resume: bool = False) -> list[float]:
        language = {"mode": "lora", "rank": 4, "alpha": 8.0, "frozen_format": held}
        tune = {"connector": {"mode": "full"}, "language": language}
        changes = {"steps": steps, "lr": 5e-3}
        # All rows in every step, so that losses of different steps compare.
        made = recipe(
            shelf, folder, tmp_path / name, tune, train=changes, batch={"samples": 4}
        ).recipe
        chosen = {"device": device, "dtype": {"cpu": "fp32", "cuda": "bf16"}[device]}
        changed = ResolvedRecipe(made.model_copy(update=chosen), {}, "test")
        train(changed, resume=resume, console=QUIET)
        return losses(tmp_path / name)

    plain, rounded = run("plain", "same", 6), run("whole", form, 6)
    assert rounded[-1] < rounded[0] and rounded != plain
    # As in the test above.
    assert rounded == pytest.approx(plain, rel={"int8": 2e-2, "nf4": 2e-1}[form])
    run("parts", form, 3)
    assert run("parts", form, 6, resume=True) == pytest.approx(rounded, rel=REPEATS[device], abs=0)

    # What answers are adapters merged into weights that were never rounded.
    merged = load_assembled(tmp_path / "whole")
    assert changed_roles(load_assembled(folder), merged) == {"connector", "language"}
    written = export_model(tmp_path / "whole", to="hf", output=tmp_path / "hf")
    assert torch.equal(logits(load_assembled(written)), logits(merged))
    beside = export_model(tmp_path / "whole", to="adapter", output=tmp_path / "adapter")
    expected = logits_of_adapter(folder, beside, merged)
    assert float((logits(merged) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@torch.no_grad()
def logits_of_adapter(base: Path, adapter: Path, asked: Assembled) -> Tensor:
    """Returns what transformers and peft make of an exported adapter on its unrounded base."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    found: Tensor = PeftModel.from_pretrained(plain, str(adapter)).eval()(**inputs_of(asked)).logits
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_command_line(
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
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    file = str(shelf / "pictures" / "0.png")
    run("chat", str(shelf / kind), "-i", file, "-p", "what is it", "--max-new-tokens", "2")
    task = tmp_path / "task.jsonl"
    question = {"id": 1, "image": "0.png", "question": "what?", "answers": ["red"]}
    task.write_text(json.dumps(question))
    told = run(
        *("eval", str(shelf / kind), str(task), "--images", str(shelf / "pictures")),
        *("--output", str(tmp_path / "results"), "--max-new-tokens", "2"),
    )
    assert "no image" in told
    written = tmp_path / "recipe.yaml"
    made = recipe(shelf, shelf / kind, tmp_path / "run", LORA).recipe
    written.write_text(json.dumps(made.model_dump(mode="json", exclude_unset=True)))
    assert "4" in run("data", "check", str(written))
    page = tmp_path / "page.html"
    run("data", "preview", str(written), "--html", str(page))
    assert page.read_text().count("<img") >= 3
    shown = run("data", "preview", str(written), "--rows", "1")
    assert "a cat 0" in shown


def test_a_second_stage_goes_on_from_the_first(shelf: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    kind = "qwen3_vl"  # its connector is several modules, some of them in a list
    samples = {"prompts": ["what is it"], "images": [str(shelf / "pictures" / "0.png")]}
    asked = {"sample": {**samples, "every_steps": 1, "max_new_tokens": 2}}
    first = recipe(shelf, shelf / kind, tmp_path / "one", {"connector": {"mode": "full"}})
    train(first, console=QUIET)
    tune = {"connector": {"mode": "freeze"}, "language": {"mode": "lora", "rank": 2}}
    second = recipe(shelf, tmp_path / "one", tmp_path / "two", tune).recipe
    second = Recipe.model_validate({**second.model_dump(), **asked})
    train(ResolvedRecipe(recipe=second, sources={}, origin="test"), console=QUIET)
    assert list(RunDirectory(tmp_path / "two").samples.iterdir())

    trained = load_assembled(tmp_path / "two")
    assert changed_roles(load_assembled(tmp_path / "one"), trained) == {"language"}
    assert changed_roles(load_assembled(shelf / kind), trained) == {"language", "connector"}
    # The adapter brings the connector along, which the base model does not have.
    written = export_model(tmp_path / "two", to="adapter", output=tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(
        shelf / kind, dtype=torch.float32, attn_implementation="eager"
    )
    expected = logits(trained)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, str(written)).eval()(**inputs_of(trained)).logits
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    # Adapters on adapters stand on weights that no directory has.
    tune = {"connector": {"mode": "freeze"}, "language": {"mode": "lora", "rank": 2}}
    train(recipe(shelf, tmp_path / "two", tmp_path / "three", tune), console=QUIET)
    with pytest.raises(CheckpointError, match="an earlier run trained"):
        export_model(tmp_path / "three", to="adapter", output=tmp_path / "none")


def test_what_an_adapter_cannot_hold_is_said(shelf: Path, tmp_path: Path) -> None:
    tunes = {
        "head weights were trained in full": {**LORA, "head": {"mode": "full"}},
        "trained no adapters": {"connector": {"mode": "full"}},
        "one setting for all": {**LORA, "vision": {"mode": "lora", "rank": 2, "rslora": True}},
    }
    for number, (said, tune) in enumerate(tunes.items()):
        run_dir = tmp_path / str(number)
        made = recipe(shelf, shelf / "qwen3_vl", run_dir, tune, train={"steps": 1})
        train(made, console=QUIET)
        with pytest.raises(ModelError, match=said):
            export_model(run_dir, to="adapter", output=tmp_path / "out")


def test_an_export_is_what_the_hub_has(shelf: Path, tmp_path: Path) -> None:
    folder = write_native("qwen2_5_vl", tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.7, "eos_token_id": [258, 256]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "video_preprocessor_config.json").write_text('{"patch_size": 4}')
    images = json.loads((folder / "preprocessor_config.json").read_text())
    inside = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": images}
    (folder / "processor_config.json").write_text(json.dumps(inside))
    tune = {"connector": {"mode": "full"}}
    bounds = {"image": {"max_tokens": 12}}
    train(recipe(shelf, folder, tmp_path / "run", tune, data=bounds), console=QUIET)
    written = export_model(tmp_path / "run", to="hf", output=tmp_path / "hf")

    def read(name: str) -> Any:
        return json.loads((written / name).read_text())

    # Settings of sampling are left out where nothing is sampled: some releases refuse them.
    assert read("generation_config.json")["eos_token_id"] == [258, 256]
    assert "temperature" not in read("generation_config.json")
    assert read("video_preprocessor_config.json") == {"patch_size": 4}
    for values in (
        read("preprocessor_config.json"),
        read("processor_config.json")["image_processor"],
    ):
        assert values["size"] == {"shortest_edge": 8 * 8, "longest_edge": 12 * 8 * 8}
        assert "max_pixels" not in values
    assert read("processor_config.json")["processor_class"] == "Qwen2_5_VLProcessor"
    template = (folder / "chat_template.jinja").read_text()
    assert (written / "chat_template.jinja").read_text() == template


def test_forms_that_these_models_have_not(shelf: Path, tmp_path: Path) -> None:
    for form in ("native", "sat", "llava", "xtuner"):
        with pytest.raises(ModelError, match="cannot be written in this form"):
            export_model(shelf / "qwen2_vl", to=form, output=tmp_path / form)  # type: ignore[arg-type]
