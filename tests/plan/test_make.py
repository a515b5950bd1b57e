"""A plan by the public function and by the command, for devices that are not here."""

import json
from dataclasses import replace

import pytest
import yaml
from family_dirs import write_family
from PIL import Image
from tiny_parts import parts
from typer.testing import CliRunner

from vistune.assembly import draw
from vistune.cli.app import app
from vistune.data.check import check_sources
from vistune.errors import RegistryError, VistuneError
from vistune.plan import make_plan, settle
from vistune.plan.devices import KNOWN_DEVICES
from vistune.recipe import Recipe


@pytest.fixture
def tree(tmp_path):
    return {
        "name": "t",
        "device": "cpu",
        "model": parts(tmp_path).model_dump(),
        "data": {"train": [{"path": "d.json"}], "template": "plain"},
        "batch": {"samples": 4, "max_tokens": "auto"},
        "train": {"steps": 10, "checkpoint_layers": "auto"},
    }


def test_a_named_device(tree):
    tree["batch"] = {"tokens": 2 * 32768, "max_tokens": "auto"}
    made = make_plan(Recipe.model_validate(tree), device="h200", price_per_hour=3.6)
    assert made.fits and made.room.memory.fused
    assert made.settled.max_tokens == 32768 and made.settled.checkpoint_layers == 0
    assert made.row_seconds == made.row_tflop / (790 * 0.74)
    assert made.step_seconds == made.row_seconds * 2
    assert made.run_seconds == made.step_seconds * 10
    assert made.cost == pytest.approx(made.run_seconds / 1000)


def test_how_many_rows_samples_fill_is_in_the_data_alone(tree, tmp_path):
    # 4 samples in rows of 32,768 tokens, or 4,000 in rows of 2,048: a row a step is no estimate.
    made = make_plan(Recipe.model_validate(tree), device="h200", price_per_hour=3.6)
    assert made.row_seconds is not None and made.num_steps == 10
    assert made.step_seconds is None and made.run_seconds is None and made.cost is None
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["plan", str(file), "--device", "h200", "--price", "3"])
    assert done.exit_code == 0 and "add --data" in done.output and "s a step" not in done.output
    done = CliRunner().invoke(app, ["plan", str(file), "--device", "npu-64", "--price", "3"])
    assert "cost: not known, as the speed of npu-64" in done.output


def test_what_is_not_known_stays_open(tree):
    made = make_plan(Recipe.model_validate(tree), device="npu-64")
    assert made.row_seconds is None and made.run_seconds is None and made.cost is None
    assert made.prediction.peak > 0


def test_memory_may_be_given_and_may_be_too_little(tree):
    made = make_plan(Recipe.model_validate(tree), device="4090", memory_gib=0.5)
    assert not made.fits


def test_an_unknown_device_lists_the_known_ones(tree):
    with pytest.raises(RegistryError, match="did you mean 'h100'"):
        make_plan(Recipe.model_validate(tree), device="h1000")
    assert {"h200", "a100-80", "4090", "dcu-32"} <= set(KNOWN_DEVICES.names())


def test_the_present_device_settles_a_recipe(tree):
    from vistune.assembly import draw

    recipe = Recipe.model_validate(tree)
    assert settle(recipe, draw(recipe)).batch.row_tokens == 4096


def test_the_command(tree, tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["plan", str(file), "--device", "h200"])
    assert done.exit_code == 0, done.output
    assert "batch.max_tokens 32,768" in done.output and "peak:" in done.output
    done = CliRunner().invoke(app, ["plan", str(file), "--device", "h200", "--memory-gib", "0.5"])
    assert done.exit_code == 1 and "does not fit" in done.output


def test_lengths_are_read_when_asked_for(tree, tmp_path):
    texts = ["a" * n for n in (10, 40, 25, 30, 20, 15)]
    rows = [
        {
            "id": str(number),
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}],
        }
        for number, text in enumerate(texts)
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    tree["data"] = {
        "train": [{"path": str(tmp_path / "d.json")}],
        "template": "vicuna_v1",
        "workers": 0,
    }
    tree["batch"] = {"samples": 2, "max_tokens": 4096}
    tree["train"] = {"epochs": 2}
    made = make_plan(Recipe.model_validate(tree), device="h200", read_data=True)
    assert made.num_steps == 6 and made.which == "the longest row"
    assert made.row.num_images == 0 and made.row.num_rows == 1
    # Bytes are tokens here: the longest of three pairs holds the row of 40 and another.
    assert 2 * 40 < made.row.num_tokens < 4096
    # Time goes by tokens: two epochs of all of them, in rows as long as the longest.
    report = check_sources(
        Recipe.model_validate(tree).data.train,
        draw(Recipe.model_validate(tree)).encoder,
        max_tokens=4096,
        overlong="error",
        workers=0,
    )
    in_rows = report.num_tokens / made.row.num_tokens
    assert 2 < in_rows < 3
    assert made.run_seconds == pytest.approx(made.row_seconds * 2 * in_rows)
    assert made.step_seconds == pytest.approx(made.run_seconds / 6)
    tree["train"] |= {"compile": "static_blocks", "fused": "off"}
    padded = make_plan(Recipe.model_validate(tree), device="h200", read_data=True)
    assert padded.row.num_tokens == 4096 and padded.row.num_targets == made.row.num_targets
    assert padded.step_seconds == pytest.approx(padded.row_seconds)


def with_rows(tree, tmp_path, texts, *, images=()):
    """Gives a recipe rows of these answers, some of them with images."""
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    rows = []
    for number, text in enumerate(texts):
        question = "<image>\nq" if number in images else "q"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
        picture = {"image": "0.png"} if number in images else {}
        rows.append({"id": str(number), "conversations": turns} | picture)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    source = {"path": str(tmp_path / "d.json"), "images": str(tmp_path)}
    tree["data"] = {"train": [source], "template": "vicuna_v1", "workers": 0, "shuffle": False}
    tree["train"] = {"epochs": 1}


def test_a_shorter_row_behind_another_may_need_more_than_the_longest(tree, tmp_path):
    # Two steps: the longest sample, and two rows nearly as long, one beside the other's gradients.
    with_rows(tree, tmp_path, ["a" * 400, "a" * 390, "a" * 380])
    tree["tune"] = {"language": {"mode": "full"}}
    tree["batch"] = {"tokens": 1400, "max_tokens": 700}
    recipe = Recipe.model_validate(tree)
    made = make_plan(recipe, device="h200", read_data=True)
    report = check_sources(
        recipe.data.train,
        draw(recipe).encoder,
        max_tokens=700,
        overlong="error",
        workers=0,
    )
    assert made.which == "the longest row behind another" and made.row.num_rows == 2
    assert made.row.num_tokens < report.lengths.max()
    first = replace(made.row, num_tokens=int(report.lengths.max()), num_rows=1)
    assert made.prediction.peak > made.room.memory.predict(first).peak
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["plan", str(file), "--device", "h200", "--data"])
    assert done.exit_code == 0 and "longest row behind another" in " ".join(done.output.split())


def test_images_of_a_row_are_its_own(tree, tmp_path):
    # Of two rows about as long the one with images needs more, and all images are in it.
    with_rows(tree, tmp_path, ["a" * 9, "a", "a"], images=(1, 2))
    tree["batch"] = {"samples": 1, "max_tokens": 700}
    tree["tune"] = {"vision": {"mode": "full"}}
    made = make_plan(Recipe.model_validate(tree), device="h200", read_data=True)
    assert (made.which, made.row.num_images) == ("the row with most image tokens", 1)
    with_rows(tree, tmp_path, ["a" * 400, "a", "a"], images=(1, 2))
    made = make_plan(Recipe.model_validate(tree), device="h200", read_data=True)
    assert (made.which, made.row.num_images) == ("the longest row", 0)


@pytest.mark.parametrize("kind", ["cogvlm2", "visualglm", "mgm-2b"])
def test_a_family_is_planned_from_its_directory(tree, tmp_path, kind):
    tree["model"] = {"from_checkpoint": str(write_family(kind, tmp_path / kind))}
    tree["data"] = {"train": [{"path": "d.json"}]}
    tree["tune"] = {"connector": {"mode": "freeze"}, "language": {"mode": "lora", "rank": 2}}
    made = make_plan(Recipe.model_validate(tree), device="a100-40")
    assert made.fits and made.settled.max_tokens > 2048
    assert made.prediction.activations > 0 and made.prediction.tower > 0


@pytest.mark.parametrize("mode", ["freeze", "lora", "full"])
@pytest.mark.parametrize("fused", ["auto", "off"])
def test_whatever_trains_has_a_time(tree, mode, fused):
    tree["tune"] = {"language": {"mode": mode}}
    tree["train"]["fused"] = fused
    made = make_plan(Recipe.model_validate(tree), device="h200")
    assert made.room.memory.fused == (fused == "auto")
    assert made.row_seconds is not None and made.row_seconds >= made.row_tflop / 790


FP8 = {"connector": {"mode": "full"}, "language": {"mode": "freeze", "frozen_format": "fp8"}}
DROPPED = {"mode": "lora", "rank": 2, "dropout": 0.1, "frozen_format": "fp8"}
DORA = {"mode": "lora", "rank": 2, "dora": True, "frozen_format": "fp8"}


@pytest.mark.parametrize(
    ("device", "tune", "train", "where"),
    [
        ("a100-80", FP8, {}, "tune.language.frozen_format: this device does not multiply FP8"),
        ("npu-64", FP8, {}, "tune.language.frozen_format: this device does not multiply FP8"),
        ("h200", FP8, {"fused": "off"}, "tune.language.frozen_format: FP8 runs in fused layers"),
        ("h200", {"language": DORA}, {}, "tune.language.frozen_format: FP8 runs in fused"),
        ("4090", {}, {"attention": "cudnn"}, "train.attention: attention 'cudnn' cannot be used"),
        ("npu-64", {}, {"attention": "varlen"}, "train.attention: attention 'varlen' cannot be"),
        ("h200", {}, {"checkpoint_layers": 3}, "train.checkpoint_layers: the language model has 2"),
    ],
)
def test_what_a_run_would_refuse_there_is_no_plan(tree, device, tune, train, where):
    tree["tune"] = tune
    tree["train"] |= train
    with pytest.raises(VistuneError, match=where):
        make_plan(Recipe.model_validate(tree), device=device)


def test_what_runs_there_is_planned(tree):
    for tune in (FP8, {"language": DROPPED}):
        tree["tune"] = tune
        assert make_plan(Recipe.model_validate(tree), device="4090").room.memory.fused
    tree["train"] |= {"attention": "cudnn", "checkpoint_layers": 2}
    assert make_plan(Recipe.model_validate(tree), device="h100").settled.checkpoint_layers == 2
