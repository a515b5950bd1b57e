"""Errors say what, where, got, expected and fix, and survive the trip out of a worker process."""

import pickle

import pytest

from vistune.errors import DataError, MissingExtraError, NonFiniteError, VistuneError


def test_message_holds_every_part_in_order():
    error = DataError("2 images, 1 tag", where="a.json row 3", got=2, expected=1, fix="add a tag")
    assert str(error).splitlines() == [
        "a.json row 3: 2 images, 1 tag",
        "  got:      2",
        "  expected: 1",
        "  fix:      add a tag",
    ]


def test_false_values_are_still_shown():
    assert "got:      0" in str(DataError("nothing found", got=0))


@pytest.mark.parametrize("cls", [DataError, NonFiniteError, MissingExtraError])
def test_pickling_keeps_class_and_parts(cls):
    error = cls("broken", where="row 1", got=1, expected=2, fix="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)


def test_a_missing_extra_names_the_command():
    error = MissingExtraError.of("gguf", extra="gguf", purpose="reading GGUF weights")
    assert isinstance(error, VistuneError)
    assert "pip install 'vistune[gguf]'" in str(error)
