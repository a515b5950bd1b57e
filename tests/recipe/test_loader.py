"""Reading, merging and explaining recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vistune.errors import RecipeError
from vistune.recipe import TrainConfig, load_recipe, shipped_recipes
from vistune.recipe.loader import find_recipe

MINIMAL = """\
name: tiny
model:
  vision_tower: {path: tower}
  language_model: {path: lm}
data:
  train:
    - path: rows.json
batch: {samples: 4}
train: {steps: 2}
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    return str(caught.value)


def test_minimal_recipe_and_sources(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    resolved = load_recipe(str(path))
    assert resolved.recipe.data.train[0].path == "rows.json"
    assert resolved.source_of("data.train.0.path") == f"{path}:7"
    assert resolved.source_of("model.vision_tower.path") == f"{path}:3"
    assert resolved.source_of("train.lr") == "default"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_resolves_and_reads_back(name: str, tmp_path: Path) -> None:
    resolved = load_recipe(name)
    for with_sources in (False, True):
        text = resolved.to_yaml(with_sources=with_sources)
        again = load_recipe(str(write(tmp_path, text)))
        assert again.recipe == resolved.recipe
    assert resolved.recipe.description


def test_written_sources_survive_awkward_texts(tmp_path: Path) -> None:
    description = "a # b: 'c' " + "long " * 40 + "\nsecond line，中文"
    path = write(tmp_path, MINIMAL + "description: " + yaml.safe_dump(description, width=50))
    resolved = load_recipe(str(path))
    assert resolved.recipe.description == description
    text = resolved.to_yaml(with_sources=True)
    assert load_recipe(str(write(tmp_path, text, "again.yaml"))).recipe == resolved.recipe
    assert "中文" in text
    lines = [line for line in text.splitlines() if line.lstrip().startswith("steps:")]
    assert lines[0].endswith(f"# {path}:9")


def test_overrides_values_and_origin(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    resolved = load_recipe(
        str(path),
        [
            "train.lr=1e-4",
            "data.train.0.epochs=2.5",
            "train.betas=[0.9, 0.95]",
            "model.connector.kind=linear",
            "sample.prompts=[这是什么？]",
            "tune={language: {mode: lora, rank: 4}}",
            "data.system=",
        ],
    )
    recipe = resolved.recipe
    assert recipe.train.lr == 1e-4
    assert recipe.train.steps == 2
    assert recipe.data.train[0].epochs == 2.5
    assert recipe.train.betas == (0.9, 0.95)
    assert recipe.sample.prompts == ("这是什么？",)
    assert recipe.tune.language.mode == "lora"
    assert recipe.tune.connector.mode == "full"
    assert recipe.data.system == ""
    assert resolved.source_of("train.lr") == "command line (train.lr=1e-4)"
    assert resolved.source_of("train.betas.1").startswith("command line")
    assert resolved.source_of("train.steps") == f"{path}:9"
    assert resolved.source_of("tune.language.rank").startswith("command line (tune=")


def test_override_of_a_mapping_keeps_the_other_keys_and_their_origin(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    resolved = load_recipe(str(path), ["train={lr: 0.5}"])
    assert (resolved.recipe.train.lr, resolved.recipe.train.steps) == (0.5, 2)
    assert resolved.source_of("train.steps") == f"{path}:9"


def test_override_of_a_whole_list_forgets_the_old_entries(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("path: rows.json", "{path: rows.json, epochs: 3}"))
    resolved = load_recipe(str(path), ["data.train=[{path: other.json}]"])
    assert [s.path for s in resolved.recipe.data.train] == ["other.json"]
    assert resolved.recipe.data.train[0].epochs == 1.0
    assert resolved.source_of("data.train.0.epochs") == "default"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("data.train.1.path=x", "a list of 1 has no entry '1'"),
        ("data.train.-1.path=x", "has no entry '-1'"),
        ("data.train.first=x", "has no entry 'first'"),
        ("train.lr", "is not key=value"),
        ("=3", "is not key=value"),
        ("train..lr=3", "is not key=value"),
        ("train.lr=[1", "not valid YAML"),
        ("train.lr={a: 1, a: 2}", "not valid YAML"),
        ("base=other.yaml", "base cannot be set on the command line"),
        ("train.epohcs=1", "did you mean 'epochs'?"),
        ("train.offload=true", "it holds the keys activations, optimizer, not a value (got True)"),
        ("train.offload.weights=true", "known here: activations, optimizer"),
        ("train.epochs=1", "exactly one of train.epochs and train.steps"),
        ("name=../x", "letters, digits"),
        ("train.lr=nan", "finite"),
        ("tune.language.rank=3", "'tune.language.mode' is missing; set it to one of: freeze, full"),
        ("tune.head.mode=lora", "tune.head takes freeze or full"),
        ("tune.connector.mode=freeze", "every role is frozen"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, part: str) -> None:
    assert part in failure(write(tmp_path, MINIMAL), override)


def test_a_null_section_can_be_filled_from_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("language_model: {path: lm}", "language_model:"))
    resolved = load_recipe(str(path), ["model.language_model.path=there"])
    assert resolved.recipe.model.language_model is not None
    assert resolved.recipe.model.language_model.path == "there"


# --- bases -----------------------------------------------------------------------------------


def test_base_chain_order_and_origin(tmp_path: Path) -> None:
    low = write(tmp_path, MINIMAL + "seed: 1\n", "low.yaml")
    other = write(tmp_path, "seed: 2\nsave: {keep: 7}\n", "other.yaml")
    top = write(tmp_path, "base: [low.yaml, other.yaml]\nname: top\n", "top.yaml")
    resolved = load_recipe(str(top))
    recipe = resolved.recipe
    assert (recipe.name, recipe.seed, recipe.save.keep, recipe.train.steps) == ("top", 2, 7, 2)
    assert resolved.source_of("seed") == f"{other}:1"
    assert resolved.source_of("train.steps") == f"{low}:9"
    assert resolved.source_of("name") == f"{top}:2"


def test_base_may_be_a_shipped_name(tmp_path: Path) -> None:
    path = write(tmp_path, "base: llava-1.5/7b-pretrain\nname: mine\n")
    resolved = load_recipe(str(path))
    assert resolved.recipe.batch.samples == 256
    assert re.fullmatch(
        r"shipped llava-1\.5/7b-pretrain\.yaml:\d+", resolved.source_of("batch.samples")
    )


def test_another_tune_mode_replaces_the_section_below(tmp_path: Path) -> None:
    lora = "tune: {language: {mode: lora, rank: 8, lr: 0.1}, connector: {mode: full, lr: 0.2}}\n"
    write(tmp_path, MINIMAL + lora, "low.yaml")
    path = write(tmp_path, "base: low.yaml\ntune: {language: {mode: full}}\n")
    resolved = load_recipe(str(path))
    assert resolved.recipe.tune.language.mode == "full"
    assert resolved.recipe.tune.connector.model_dump()["lr"] == 0.2
    assert resolved.source_of("tune.language.lr") == "default"
    frozen = load_recipe(str(tmp_path / "low.yaml"), ["tune.language.mode=freeze"]).recipe
    assert frozen.tune.language.mode == "freeze"
    assert "rank" not in frozen.tune.language.model_dump()


def test_same_tune_mode_is_merged_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "tune: {language: {mode: lora, rank: 8}}\n", "low.yaml")
    path = write(tmp_path, "base: low.yaml\ntune: {language: {alpha: 3}}\n")
    tune = load_recipe(str(path), ["tune.language.mode=lora"]).recipe.tune.language.model_dump()
    assert (tune["rank"], tune["alpha"]) == (8, 3.0)


def test_another_image_mode_keeps_the_other_image_keys(tmp_path: Path) -> None:
    low = MINIMAL.replace("data:", "data:\n  image: {mode: crop, size_px: 64}")
    write(tmp_path, low, "low.yaml")
    path = write(tmp_path, "base: low.yaml\ndata: {image: {mode: pad}}\n")
    image = load_recipe(str(path)).recipe.data.image
    assert (image.mode, image.size_px) == ("pad", 64)
    assert load_recipe(str(path), ["data.image.mode=resize"]).recipe.data.image.size_px == 64


def test_a_list_replaces_the_list_below(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL.replace("- path: rows.json", "- {path: a, images: i}"), "low.yaml")
    path = write(tmp_path, "base: low.yaml\ndata: {train: [{path: b}]}\n")
    resolved = load_recipe(str(path))
    assert resolved.recipe.data.train[0].images is None
    assert resolved.source_of("data.train.0.images") == "default"


def test_base_cycle_is_named(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    text = failure(tmp_path / "a.yaml")
    assert "a base of itself" in text
    assert "a.yaml -> b.yaml -> a.yaml" in text


def test_two_bases_may_share_one(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "root.yaml")
    write(tmp_path, "base: root.yaml\nseed: 3\n", "a.yaml")
    write(tmp_path, "base: root.yaml\nsave: {keep: 5}\n", "b.yaml")
    recipe = load_recipe(str(write(tmp_path, "base: [a.yaml, b.yaml]\n"))).recipe
    assert (recipe.seed, recipe.save.keep) == (3, 5)


def test_missing_base_names_the_line_that_asks_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nbase: nowhere.yaml\n")
    text = failure(path)
    assert text.startswith(f"{path}:2: no recipe 'nowhere.yaml'")


@pytest.mark.parametrize("value", ["5", "{a: b}", "[1, 2]", "null"])
def test_base_of_a_wrong_kind(tmp_path: Path, value: str) -> None:
    text = failure(write(tmp_path, f"base: {value}\n" + MINIMAL))
    assert "base names one recipe or a list" in text


# --- files that are not recipes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "an empty file"),
        ("# only a comment\n", "an empty file"),
        ("- a\n- b\n", "list"),
        ("just words\n", "str"),
        ("name: a\nname: b\n", ":2: not valid YAML: key 'name' is written twice"),
        ("train:\n  lr: 1\n  lr: 2\n", ":3: not valid YAML: key 'lr' is written twice"),
        ("name: [a\n", "not valid YAML"),
        ("name: a\n\tseed: 1\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "a key is a single word"),
        ("name: a\n---\nname: b\n", "not valid YAML"),
        ("name: !!python/object:os.system {}\n", "not valid YAML"),
        ("name: *nothing\n", "not valid YAML"),
        ("name: &a [*a]\n", ""),
        ("name: \x07bell\n", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text)
    message = failure(path)
    assert part in message
    assert str(path) in message


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(str(path)).recipe.name == "tiny"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("name: 中文\n".encode("gbk"))
    assert "not UTF-8" in failure(path)


def test_a_folder_and_an_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "dir.yaml").mkdir()
    assert "no recipe" in failure(tmp_path / "dir.yaml")
    with pytest.raises(RecipeError) as caught:
        find_recipe("llava-1.5/7b-pretrian")
    assert "did you mean 'llava-1.5/7b-pretrain'?" in str(caught.value)
    assert "vistune recipe list" in str(caught.value)


# --- messages --------------------------------------------------------------------------------


def test_one_problem_is_one_sentence_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "sede: 3\n")
    assert failure(path).splitlines()[0] == f"{path}:10: unknown key 'sede'; did you mean 'seed'?"


def test_a_key_of_another_section_is_found(tmp_path: Path) -> None:
    text = failure(write(tmp_path, MINIMAL + "warmup_frac: 0.1\n"))
    assert "did you mean 'train.warmup_frac'?" in text


def test_all_problems_are_listed(tmp_path: Path) -> None:
    broken = MINIMAL.replace("steps: 2", "steps: 0, lrr: 1").replace("path: tower", "pth: tower")
    text = failure(write(tmp_path, broken))
    assert "4 values do not fit" in text
    for part in (
        ":3: the key 'model.vision_tower.path' is missing",
        ":3: unknown key 'model.vision_tower.pth'; did you mean 'path'?",
        ":9: train.steps: Input should be greater than or equal to 1 (got 0)",
        ":9: unknown key 'train.lrr'; did you mean 'lr'?",
    ):
        assert part in text, text


def test_union_members_are_one_problem_under_the_key_as_written(tmp_path: Path) -> None:
    text = failure(write(tmp_path, MINIMAL), "data.image.size_px=big")
    first = text.splitlines()[0]
    assert first.startswith("command line (data.image.size_px=big): data.image.size_px: ")
    assert "'auto'" in first
    assert "constrained" not in text


def test_wrong_tag_lists_the_forms(tmp_path: Path) -> None:
    text = failure(write(tmp_path, MINIMAL + "tune: {language: {mode: lroa}}\n"))
    assert "'tune.language.mode' is 'lroa'; set it to one of: freeze, full, lora" in text


def test_unknown_key_inside_a_tagged_section(tmp_path: Path) -> None:
    text = failure(write(tmp_path, MINIMAL + "tune: {language: {mode: lora, rnak: 4}}\n"))
    assert text.splitlines()[0].endswith("unknown key 'tune.language.rnak'; did you mean 'rank'?")


def test_a_key_of_another_mode_is_no_unknown_key(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "tune: {language: {mode: lora, rank: 4}}\n")
    text = failure(path, "tune.language.mode=full", "tune.language.rank=null")
    assert text.splitlines()[0] == (
        "command line (tune.language.rank=null): 'tune.language.rank' belongs to"
        " tune.language.mode=lora, and the mode is 'full': leave it out or set that mode"
    )
    # The mode alone drops what the file says of the other one, and null is no rank of lora.
    assert load_recipe(str(path), ["tune.language.mode=full"]).recipe.tune.language.mode == "full"
    assert "(got null)" in failure(path, "tune.language.rank=null")
    # A key of no mode is unknown as before.
    unknown = failure(path, "tune.language.mode=full", "tune.language.rnk=3")
    assert "unknown key 'tune.language.rnk'" in unknown


def test_a_missing_section_points_at_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("train: {steps: 2}\n", ""))
    assert failure(path).startswith(f"{path}: the key 'train' is missing")


def test_long_values_are_cut(tmp_path: Path) -> None:
    text = failure(write(tmp_path, MINIMAL), "train.lr=[" + "1," * 500 + "]")
    assert len(text.splitlines()[0]) < 300


def test_from_checkpoint_and_parts_together(tmp_path: Path) -> None:
    text = failure(write(tmp_path, MINIMAL), "model.from_checkpoint=runs/x")
    assert "leave out ['language_model', 'vision_tower']" in text


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("'off'", "off")])
def test_train_fused_reads_on_and_off_as_yaml_gives_them(written: str, read: str) -> None:
    train = TrainConfig.model_validate({"steps": 1, **yaml.safe_load(f"fused: {written}")})
    assert train.fused == read


def test_recomputed_blocks_of_a_frozen_tower_are_refused(tmp_path: Path) -> None:
    base = "name: a\nmodel: {vision_tower: {path: v}, language_model: {path: l}}\n"
    base += "data: {train: [{path: d}]}\nbatch: {samples: 1}\n"
    file = tmp_path / "r.yaml"
    file.write_text(base + "train: {steps: 1, checkpoint_tower_layers: 2}\n")
    with pytest.raises(RecipeError, match="no effect on a frozen tower"):
        load_recipe(str(file))
    trained = load_recipe(str(file), ["tune.vision.mode=full"]).recipe
    assert trained.train.checkpoint_tower_layers == 2
