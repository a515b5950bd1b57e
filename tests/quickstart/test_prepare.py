"""The whole preparation from a fake registry: stand-in, warm cache, interrupted conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from vistune.errors import AssetError
from vistune.quickstart import prepare
from vistune.quickstart.prepare import seal_holds


def product(folder: Path, made: list[str], *, stamp: str = "one") -> Path:
    def make(target: Path) -> None:
        made.append(stamp)
        (target / "file.txt").write_text(stamp)

    return prepare._product(
        folder, make, inputs={"stamp": stamp, "of": ("a", "b")}, say=lambda line: None
    )


def test_a_product_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []
    folder = product(tmp_path / "p", made)
    assert product(folder, made) == folder
    assert made == ["one"]


def test_a_product_is_made_again_when_its_inputs_change(tmp_path: Path) -> None:
    made: list[str] = []
    folder = product(tmp_path / "p", made)
    product(folder, made, stamp="two")
    assert made == ["one", "two"]
    assert (folder / "file.txt").read_text() == "two"


@pytest.mark.parametrize("damage", ["changed", "gone", "unsealed", "cut seal"])
def test_a_damaged_product_is_made_again(tmp_path: Path, damage: str) -> None:
    made: list[str] = []
    folder = product(tmp_path / "p", made)
    seal = folder / "seal.json"
    if damage == "changed":
        (folder / "file.txt").write_text("onE")
    elif damage == "gone":
        (folder / "file.txt").unlink()
    elif damage == "unsealed":
        seal.unlink()
    else:
        seal.write_text(seal.read_text()[:20])
    product(folder, made)
    assert made == ["one", "one"]
    assert (folder / "file.txt").read_text() == "one"


def test_an_interrupted_conversion_is_redone(tmp_path: Path) -> None:
    folder = tmp_path / "p"

    def killed(target: Path) -> None:
        (target / "file.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare._product(folder, killed, inputs={"stamp": "one"}, say=lambda line: None)
    assert not seal_holds(folder, {"version": prepare.PRODUCT_VERSION, "stamp": "one"})
    assert list(tmp_path.iterdir()) == []
    made: list[str] = []
    product(folder, made)
    assert made == ["one"]


def test_the_stand_in_is_taken_and_named_when_npm_is_absent() -> None:
    def asset(name: str) -> Path:
        if name == "minimind2-small":
            raise AssetError("npm is not installed")
        return Path(name)

    remarks: list[str] = []
    assert prepare._language_model_source(asset, remarks) == ("smollm2-135m", Path("smollm2-135m"))
    (remark,) = remarks
    assert "smollm2-135m stands in for minimind2-small (npm is not installed)" in remark


def test_nothing_stands_in_when_the_first_choice_is_there() -> None:
    remarks: list[str] = []
    assert prepare._language_model_source(Path, remarks)[0] == "minimind2-small"
    assert remarks == []
