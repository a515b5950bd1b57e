import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vistune.checkpoint import save as save_module
from vistune.checkpoint.files import SEAL_NAME, verify
from vistune.checkpoint.load import (
    list_checkpoints,
    newest_checkpoint,
    read_trainer_state,
    read_weights,
    resolve_checkpoint,
)
from vistune.checkpoint.manifest import Manifest
from vistune.checkpoint.save import CheckpointContent, remove_stale, save_checkpoint
from vistune.errors import CheckpointError, ModelError


def content(step: int, *, num: int = 10) -> CheckpointContent:
    return CheckpointContent(
        step=step,
        weights={"a.weight": torch.full((num,), float(step)), "b": torch.eye(2)},
        trainer={"step": step, "moments": {"a": torch.zeros(num)}, "list": [1, None, "x"]},
        manifest=Manifest(vistune_version="0", kind="checkpoint", step=step),
        inherited={},
    )


def save(parent: Path, step: int, *, keep: int = 9, num: int = 10) -> Path:
    return save_checkpoint(parent / f"step_{step:08d}", content(step, num=num), keep=keep)


def test_round_trip(tmp_path):
    folder = save(tmp_path, 3)
    assert verify(folder).step == 3
    assert torch.equal(read_weights(folder)["a.weight"], torch.full((10,), 3.0))
    state = read_trainer_state(folder)
    assert state["step"] == 3 and state["list"] == [1, None, "x"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "COMPLETE",
        "trainer.pt",
        "vistune.json",
        "weights.safetensors",
    ]
    seal = json.loads((folder / SEAL_NAME).read_text())
    assert set(seal["files"]) == {"trainer.pt", "vistune.json", "weights.safetensors"}


def test_newest_are_kept(tmp_path):
    for step in (2, 10, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000004"]
    # An older step written now, as after going back to an earlier checkpoint, is never removed.
    save(tmp_path, 3, keep=2)
    assert (tmp_path / "step_00000003").is_dir()


def test_writing_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, num=4)
    folder = save(tmp_path, 3, num=6)
    assert read_weights(folder)["a.weight"].shape == (6,)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(save_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, num=1_000_000)
    message = str(caught.value)
    assert "step 2" in message and "1000 bytes free" in message and "8000" not in message
    assert str(2 * 4_000_000 + 16 + (1 << 20)) in message  # what was needed, in bytes
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


_WRITE_INTO_A_LIMIT = """
import resource, sys
sys.path.insert(0, {here!r})
import test_save_load as t
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    t.save(Path({parent!r}), 2, num=1_000_000)
except t.CheckpointError as error:
    print(error)
"""


def test_write_that_fails_halfway_leaves_the_earlier_checkpoint(tmp_path):
    """A real short write: the system refuses files beyond 64 KiB, as a full disk would."""
    save(tmp_path, 1)
    script = _WRITE_INTO_A_LIMIT.format(here=str(Path(__file__).parent), parent=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout and "earlier checkpoints" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert newest_checkpoint(tmp_path).step == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 16


def test_directory_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 1


def test_interrupted_writers_are_cleaned_up(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp_step_00000002_99").mkdir()
    (tmp_path / ".tmp_step_00000002_99" / "weights.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path).step == 1
    assert [path.name for path in remove_stale(tmp_path)] == [".tmp_step_00000002_99"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("name", ["weights.safetensors", "trainer.pt", "vistune.json", "COMPLETE"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damage_of_any_file_is_named_and_the_one_before_taken(tmp_path, name, how):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x15
        path.write_bytes(data)
    found = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert len(found.damaged) == 1 and "step_00000002" in found.damaged[0]
    with pytest.raises(CheckpointError):
        resolve_checkpoint(tmp_path / "step_00000002")


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 1) / "trainer.pt").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint of the run is damaged"):
        newest_checkpoint(tmp_path)


def test_training_state_runs_no_code(tmp_path):
    folder = save(tmp_path, 1)
    torch.save({"x": _Evil()}, folder / "trainer.pt")
    with pytest.raises(CheckpointError, match="training state cannot be read"):
        read_trainer_state(folder)
    assert not (tmp_path / "owned").exists()


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def test_evil_is_evil(tmp_path, monkeypatch):
    """The object of the test above really acts when loaded carelessly."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(_Evil()))
    assert (tmp_path / "owned").is_dir()


def test_resolve(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        resolve_checkpoint(run)
    folder = save(run / "checkpoints", 5)
    assert resolve_checkpoint(run) == folder == resolve_checkpoint(folder)
    moved = folder.rename(run / "any name will do")
    assert resolve_checkpoint(moved) == moved
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run"):
        resolve_checkpoint(tmp_path / "empty")


def test_a_name_that_is_neither_here_nor_on_the_hub_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        resolve_checkpoint("Qwen/Qwen2.5-VL-3B-Instruct")
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct" in str(caught.value.fix)
    # What can only be a folder of ours is never asked of the hub.
    for name in ("runs/mine", "models/Qwen2.5-VL-3B-Instruct", "mine"):
        with pytest.raises(CheckpointError, match="no such directory"):
            resolve_checkpoint(name)
