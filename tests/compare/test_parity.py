"""`compare parity`: the reference dumps, dumps of other sizes, and what must not pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistune.checkpoint.layouts.cogvlm2 import write_cogvlm2
from vistune.cli import main
from vistune.compare.parity import (
    TOLERANCE,
    TOLERANCES,
    compare_directory,
    internlm2,
    llava,
    mgm,
    visualglm,
)
from vistune.compare.parity.ledger import Ledger, read_arrays, relative_error
from vistune.errors import CheckpointError, WeightsError
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
COMPARED = {"cogvlm2": 13, "visualglm": 13, "internlm2": 7, "mgm_gemma": 88, "llava15": 21}
LEFT = {"position_ids_returned_is_none"}


def copied(name: str, folder: Path) -> Path:
    """A directory whose name says nothing."""
    shutil.copytree(PARITY / name, folder)
    return folder


def copied_in_short(name: str, folder: Path) -> Path:
    """The same with one of MGM's three runs, the one that has everything."""
    copied(name, folder)
    for run in ("io_grid1.npz", "io_grid2.npz"):
        (folder / run).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_reference_dumps_pass(name: str, tmp_path: Path) -> None:
    report = compare_directory(copied(name, tmp_path / "some dump"))
    assert not report.failed, report.failed
    assert len(report.compared) == COMPARED[name]
    rest = {c.array for c in report.checks if c.passed is None and c.note != "input"}
    assert rest <= LEFT
    assert all(c.error is not None and c.error <= TOLERANCE for c in report.compared)


@pytest.mark.parametrize("name", COMPARED)
def test_bfloat16_stays_within_what_it_rounds(name: str, tmp_path: Path) -> None:
    report = compare_directory(copied_in_short(name, tmp_path / "dump"), dtype=torch.bfloat16)
    assert report.tolerance == TOLERANCES[torch.bfloat16] == 5e-2
    assert not report.failed, report.failed
    errors = {check.array: check.error for check in report.compared}
    # It did run in bfloat16, and what a model says is not asked of it.
    assert max(error for error in errors.values() if error is not None) > 2e-3
    left = {c.array for c in report.checks if c.note == "rounded scores may tie"}
    assert left == ({"greedy_tokens"} if name in ("cogvlm2", "visualglm", "internlm2") else set())


@pytest.fixture
def other_size(tmp_path: Path) -> Path:
    """A CogVLM2 of another shape and seed, with outputs made by this implementation."""
    settings = json.loads((PARITY / "cogvlm2" / "config.json").read_text())
    settings |= {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    settings |= {"vocab_size": 530, "intermediate_size": 56}
    settings["vision_config"] |= {"image_size": 84, "num_positions": 37, "num_hidden_layers": 1}
    torch.manual_seed(11)
    model = CogVLM2ForConditionalGeneration(CogVLM2Config(**settings)).eval()
    write_cogvlm2(model, tmp_path / "dump", dtype=torch.float32)
    num_image, text = model.config.num_image_tokens, torch.randint(0, 480, (2, 9))
    image = torch.full((2, num_image), model.image_token_id)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    types = (ids == model.image_token_id).long()
    images = torch.randn(2, 3, 84, 84)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model(ids, pixel_values=images, attention_mask=mask)
    arrays = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask,
        "images": images,
        "logits": out.logits,
        "position_ids": model.prompt_positions(ids, mask),
    }
    np.savez(tmp_path / "dump" / "io.npz", **{k: v.numpy() for k, v in arrays.items()})
    return tmp_path / "dump"


def test_other_sizes_and_what_is_wrong_in_them(other_size: Path) -> None:
    report = compare_directory(other_size)
    assert {c.array: c.passed for c in report.compared} == {"logits": True, "position_ids": True}
    with np.load(other_size / "io.npz") as file:
        arrays = dict(file)
    arrays["logits"][0, 0, 0] += 1e-3 * np.abs(arrays["logits"]).max()
    arrays["position_ids"][1, -1] += 1
    arrays["something_else"] = np.zeros(3)
    np.savez(other_size / "io.npz", **arrays)
    report = compare_directory(other_size)
    assert {c.array for c in report.failed} == {"logits", "position_ids"}
    error = next(c.error for c in report.failed if c.array == "logits")
    assert error == pytest.approx(1e-3, rel=1e-2)
    unknown = next(c for c in report.checks if c.array == "something_else")
    assert unknown.passed is None and "not known" in unknown.note
    assert {c.array for c in compare_directory(other_size, tolerance=2e-3).failed} == {
        "position_ids"
    }


class Recorder(Ledger):
    """Notes what is computed here, so that it can be the reference of another run."""

    def compare(self, name: str, ours: Tensor, **more: Any) -> None:
        if name in self.arrays:
            assert isinstance(self.arrays, dict)
            self.arrays[name] = ours.detach().to(self.arrays[name].dtype)


@pytest.mark.parametrize(
    ("case", "section", "key", "layers"),
    [
        (visualglm, None, "num_layers", "transformer.layers.2."),
        (internlm2, None, "num_hidden_layers", "model.layers.2."),
        (mgm, "text", "num_hidden_layers", "model.layers.1."),
        (llava, "text", "num_hidden_layers", "model.layers.1."),
    ],
    ids=["visualglm", "internlm2", "mgm", "llava"],
)
def test_dumps_of_other_depth_and_seed(
    tmp_path: Path, case: Any, section: str | None, key: str, layers: str
) -> None:
    names = {visualglm: "visualglm", internlm2: "internlm2", mgm: "mgm_gemma", llava: "llava15"}
    folder = copied_in_short(names[case], tmp_path / "dump")
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section])[key] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    changed = {
        n: t + 0.02 * torch.randn_like(t) for n, t in tensors.items() if not n.startswith(layers)
    }
    save_file(changed, folder / "model.safetensors")
    # The old outputs do not fit ...
    assert {c.array.rpartition(".")[2] for c in compare_directory(folder).failed} >= {"logits"}
    for path in folder.glob("io*.npz"):
        recorder = Recorder(path.name, read_arrays(path))
        case.compare(folder, config, recorder)
        np.savez(path, **{n: t.numpy() for n, t in recorder.arrays.items()})
    # ... and the new ones do, all of them.
    report = compare_directory(folder)
    assert not report.failed
    assert len(report.compared) == {**COMPARED, "mgm_gemma": 29}[names[case]]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("visualglm", "image_encoder.glm_proj.weight"),
        ("internlm2", "model.layers.1.attention.wqkv.weight"),
        ("mgm_gemma", "model.vlm_uni_aux_projector.1.weight"),
        ("llava15", "model.mm_projector.2.weight"),
    ],
)
def test_one_wrong_weight_is_seen(name: str, key: str, tmp_path: Path) -> None:
    folder = copied_in_short(name, tmp_path / "dump")
    tensors = load_file(folder / "model.safetensors")
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    failed = {c.array.rpartition(".")[2] for c in compare_directory(folder).failed}
    assert "logits" in failed and "loss" in failed


def test_the_verb_says_it_by_its_exit_code(
    other_size: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> Any:
        monkeypatch.setattr("sys.argv", ["vistune", "compare", "parity", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    assert run(str(other_size)) == 0
    assert "2 of 2 arrays pass at 2e-05," in capsys.readouterr().out
    assert run(str(other_size), "--dtype", "bf16") == 0
    assert "2 of 2 arrays pass at 0.05 in bf16," in capsys.readouterr().out
    with np.load(other_size / "io.npz") as file:
        arrays = dict(file)
    arrays["logits"][0, 0, 0] += 1e-4 * np.abs(arrays["logits"]).max()
    np.savez(other_size / "io.npz", **arrays)
    assert run(str(other_size), "--tolerance", "1e-3") == 0
    assert run(str(other_size)) == 1
    assert "FAIL" in capsys.readouterr().out


def test_directories_that_cannot_be_compared(other_size: Path, tmp_path: Path) -> None:
    tensors = load_file(other_size / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, other_size / "model.safetensors")
    with pytest.raises(WeightsError, match="left over"):
        compare_directory(other_size)
    save_file(tensors, other_size / "model.safetensors")
    with np.load(other_size / "io.npz") as file:
        arrays = dict(file)
    np.savez(other_size / "io.npz", logits=arrays["logits"])
    with pytest.raises(CheckpointError, match="token_type_ids"):
        compare_directory(other_size)
    (other_size / "io.npz").write_bytes(b"no arrays")
    with pytest.raises(CheckpointError, match="cannot be read"):
        compare_directory(other_size)
    (other_size / "io.npz").unlink()
    with pytest.raises(CheckpointError, match="no reference outputs"):
        compare_directory(other_size)
    save_file({"a": torch.zeros(1)}, other_size / "model.safetensors")
    with pytest.raises(CheckpointError, match="no model that can be compared"):
        compare_directory(other_size)


def test_shapes_and_zero_references() -> None:
    ledger = Ledger("io.npz", {"a": torch.zeros(2), "b": torch.ones(3)})
    ledger.compare("a", torch.full((2,), 1e-6))
    ledger.compare("b", torch.ones(4))
    ledger.compare("c", torch.ones(4))
    first, second = ledger.checks()
    assert first.passed and first.error == pytest.approx(1e-6)
    assert second.passed is False and "(4,) here" in second.note
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
