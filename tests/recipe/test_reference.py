"""The reference is complete and made from the schema."""

from __future__ import annotations

import json

import pytest

from vistune.errors import RecipeError
from vistune.recipe import Recipe, load_recipe
from vistune.recipe.reference import json_schema, markdown, references


def test_every_key_has_help() -> None:
    assert [r.key for r in references() if not r.help] == []


def test_defaults_and_types() -> None:
    by_key = {(r.key, r.form): r for r in references()}
    assert by_key["train.lr", None].default == "0.001"
    assert by_key["train.lr", None].type == "number > 0"
    assert by_key["batch.max_tokens", None].type == "integer >= 1 or auto"
    assert by_key["name", None].default is None
    assert by_key["train.betas", None].default == "[0.9, 0.999]"
    assert by_key["data.train.N.path", None].default is None
    assert by_key["tune.language.rank", "lora"].default == "64"
    assert by_key["tune.language", None].default == "{mode: freeze}"
    assert by_key["data.image.size_px", None].type == "integer >= 1 or auto"
    assert by_key["data.train", None].type == "list of sections"


def test_every_value_of_a_resolved_recipe_is_in_the_reference() -> None:
    def keys(value: object, prefix: str) -> list[str]:
        if isinstance(value, dict):
            return [k for name, v in value.items() for k in keys(v, f"{prefix}.{name}")]
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            return keys(value[0], f"{prefix}.N")
        return [prefix[1:]]

    recipe = load_recipe("llava-1.5/7b-pretrain").recipe
    known = {r.key for r in references()}
    assert set(keys(recipe.model_dump(), "")) <= known


def test_one_section_or_key() -> None:
    assert {r.key for r in references("save")} == {"save", "save.every_steps", "save.keep"}
    assert [r.key for r in references("data.train.0.path")] == ["data.train.N.path"]
    with pytest.raises(RecipeError, match=r"did you mean 'train\.lr'"):
        references("train.lrr")


def test_markdown_and_json() -> None:
    text = markdown()
    assert "## tune.language (mode: lora)" in text
    assert "| `train.schedule` | cosine, linear, constant | `cosine` |" in text
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields) | {"base"}
    json.dumps(schema)
