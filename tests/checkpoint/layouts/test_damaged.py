"""Damaged and foreign files in every layout: one clear error each, and nothing in them is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_dirs import FAMILY_KINDS, LLAVA_KIND, write_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistune.assembly import load_assembled
from vistune.errors import VistuneError, WeightsError
from vistune.export import export_model
from vistune.models.adapters import fold_adapter

OWN = {"vistune-mgm": "mgm-2b", "vistune-visualglm": "visualglm", "vistune-llava": LLAVA_KIND}
KINDS = (*FAMILY_KINDS, LLAVA_KIND, *OWN)
SAT = "1/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for kind in (*FAMILY_KINDS, LLAVA_KIND):
        write_family(kind, root / kind)
    for kind, origin in OWN.items():
        export_model(root / origin, to="vistune", output=root / kind)
    return root


@pytest.fixture(params=KINDS)
def copy(request: pytest.FixtureRequest, shelf: Path, tmp_path: Path) -> Path:
    """A copy of one model, to be damaged."""
    shutil.copytree(shelf / request.param, tmp_path / request.param)
    folder = tmp_path / str(request.param)
    assert weights(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    if (folder / SAT).is_file():
        found: dict[str, Tensor] = torch.load(folder / SAT, weights_only=True)["module"]
        return found
    return load_file(folder / "model.safetensors")


def write(folder: Path, changed: dict[str, Tensor]) -> None:
    if (folder / SAT).is_file():
        torch.save({"module": changed}, folder / SAT)
    else:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(VistuneError) as caught:
        load_assembled(folder)
    text = str(caught.value)
    assert str(folder) in text and all(word in text for word in words), text


def some_name(found: dict[str, Tensor]) -> str:
    """A matrix in the middle of the language model."""
    names = [n for n, t in sorted(found.items()) if "layers.1." in n and t.dim() == 2]
    return next(n for n in names if "vision" not in n and "vit" not in n and "qformer" not in n)


def test_names_that_are_missing_or_left_over(copy: Path) -> None:
    found = weights(copy)
    name = some_name(found)
    write(copy, {n: t for n, t in found.items() if n != name})
    refused(copy, name, "missing")
    write(copy, {**found, "model.layers.1.unheard_of.weight": torch.zeros(2)})
    refused(copy, "unheard_of")
    write(copy, {**found, name: torch.zeros(found[name].shape[0] + 1, found[name].shape[1])})
    refused(copy, "another shape")


def test_files_that_are_damaged(copy: Path) -> None:
    file = copy / SAT if (copy / SAT).is_file() else copy / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"", b"<html>not found</html>"):
        file.write_bytes(damaged)
        refused(copy, "damaged" if "vistune" not in copy.name else "")
    file.unlink()
    refused(copy)


class _Trap:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return _spring, (str(self.folder),)


def _spring(folder: str) -> None:
    (Path(folder) / "was here").touch()


def test_code_in_a_pickle_is_not_run(copy: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = dict(weights(copy))
    if (copy / SAT).is_file():
        torch.save({"module": {**found, "trap": _Trap(tmp_path)}}, copy / SAT)
    else:
        (copy / "model.safetensors").unlink()
        torch.save({**found, "trap": _Trap(tmp_path)}, copy / "pytorch_model.bin")
    refused(copy, "damaged" if "vistune" not in copy.name else "")
    assert not (tmp_path / "was here").exists()


def sharded(folder: Path) -> list[Path]:
    """Splits a model's weights in two files with an index."""
    found = weights(folder)
    (folder / "model.safetensors").unlink()
    names, files = sorted(found), ["model-00001-of-00002.safetensors"] * 2
    files[1] = "model-00002-of-00002.safetensors"
    placed = {n: files[i >= len(names) // 2] for i, n in enumerate(names)}
    for file in files:
        part = {n: found[n] for n in names if placed[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in found.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def test_shards_are_all_there_and_hold_each_name_once(copy: Path) -> None:
    if (copy / SAT).is_file():
        pytest.skip("this layout is one file")
    before = load_assembled(copy).model.state_dict()
    first, second = sharded(copy)
    after = load_assembled(copy).model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    kept = second.read_bytes()
    second.unlink()
    refused(copy, second.name)
    second.write_bytes(kept[: len(kept) // 2])
    refused(copy, second.name if "vistune" not in copy.name else "")
    if "vistune" not in copy.name:
        save_file({**load_file(first), **_as_dict(kept, copy)}, first, metadata={"format": "pt"})
        second.write_bytes(kept)
        refused(copy, "twice")
    second.write_bytes(kept)
    (copy / "model.safetensors.index.json").write_text("{")
    refused(copy)


def _as_dict(content: bytes, folder: Path) -> dict[str, Tensor]:
    file = folder / "part"
    file.write_bytes(content)
    found = load_file(file)
    file.unlink()
    return dict([next(iter(found.items()))])


def test_configs_that_do_not_belong(copy: Path) -> None:
    file = next(f for f in (copy / "config.json", copy / "model_config.json") if f.is_file())
    for content in ("{", "[]", '{"model_type": "gpt2"}'):
        file.write_text(content)
        refused(copy)


def test_pytorch_files_in_both_of_their_formats(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cogvlm2"
    shutil.copytree(shelf / "cogvlm2", folder)
    found = weights(folder)
    (folder / "model.safetensors").unlink()
    for new in (True, False):
        file = folder / "pytorch_model.bin"
        torch.save(found, file, _use_new_zipfile_serialization=new)
        state = load_assembled(folder).model.state_dict()
        assert all(torch.equal(state[name], found[name]) for name in found)
    torch.save([found], file)
    refused(folder, "no tensors by name")


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_adapters_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file = tmp_path / "adapter_model.bin"
    if content is None:
        torch.save({"trap": _Trap(tmp_path)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(WeightsError):
        fold_adapter(torch.nn.Linear(2, 2), tmp_path, key="adapter")
    assert not (tmp_path / "was here").exists()


def another_vocabulary(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"vocab_size": settings["vocab_size"] + 20_000}


@pytest.mark.parametrize("kind", ["visualglm", "visualglm-sat", "cogvlm2", LLAVA_KIND])
def test_another_vocabulary(shelf: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    shutil.copytree(shelf / kind, folder)
    file = next(f for f in (folder / "config.json", folder / "model_config.json") if f.is_file())
    file.write_text(json.dumps(another_vocabulary(json.loads(file.read_text()))))
    words = {"visualglm": ("130528", "150528"), "visualglm-sat": ("130528",)}
    refused(folder, *words.get(kind, ("another shape",)))
