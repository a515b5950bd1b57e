"""Registries take exact names and name the nearest when there is none."""

import pytest

from vistune.errors import RegistryError
from vistune.registry import Registry, nearest


def test_an_unknown_name_lists_the_known_and_the_nearest():
    registry: Registry[int] = Registry("number")
    registry.register("seven")(7)
    registry.register("eight")(8)
    assert registry.get("seven") == 7
    assert list(registry) == ["eight", "seven"]
    with pytest.raises(RegistryError, match="unknown number 'sevn'; did you mean 'seven'"):
        registry.get("sevn")


def test_nothing_is_matched_by_part_of_a_name():
    registry: Registry[int] = Registry("number")
    registry.register("seven")(7)
    assert "seve" not in registry
    with pytest.raises(RegistryError):
        registry.get("seve")


def test_nearest_gives_none_when_nothing_is_close():
    assert nearest("xyz", ["connector", "language"]) is None
