import io
import os
import re
import signal
import threading

import pytest
from rich.console import Console
from train_fakes import FakeData, resolved_recipe, run

from vistune.checkpoint.fingerprint import fingerprint, fingerprint_parts
from vistune.errors import CheckpointError
from vistune.recipe import ModelConfig
from vistune.train.hooks import MetricsHook
from vistune.train.interrupt import StopRequest
from vistune.train.opening import keep_lines, require_same_recipe


def test_lines_are_cut_after_the_last_step_and_torn_ones_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(path, key="step", last=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_lines(path, key="step", last=0)
    assert path.read_text() == ""
    keep_lines(tmp_path / "not there", key="step", last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_killed_before_the_first_checkpoint_starts_again_and_says_so(tmp_path):
    recipe = resolved_recipe(tmp_path / "r", save={"every_steps": 100})

    class Dying(FakeData):
        def steps(self, start_step=0):
            for number, rows in enumerate(super().steps(start_step)):
                if number == 3:
                    raise RuntimeError("power cut")
                yield rows

    with pytest.raises(RuntimeError, match="power cut"):
        run(recipe, data=Dying())
    (tmp_path / "r" / "checkpoints").mkdir()
    (tmp_path / "r" / "checkpoints" / ".tmp_step_00000008_1").mkdir()
    console = Console(file=io.StringIO(), record=True, width=200)
    run(recipe, resume=True, console=console)
    run(resolved_recipe(tmp_path / "whole", save={"every_steps": 100}))
    text = console.export_text()
    assert "starting again from step 0" in text and "unfinished checkpoint" in text
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("r", "whole")
    ]
    assert len(lines[0]) == len(lines[1]) == 8


def test_write_error_of_a_hook_is_explained(tmp_path, monkeypatch):
    def refuse(self, record):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricsHook, "on_record", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(resolved_recipe(tmp_path / "r"))


def test_stop_request_remembers_and_puts_handlers_back():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_stop_request_in_another_thread_does_nothing():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append(stop.signal_name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def test_fingerprint_sees_any_retraining(tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 4096)
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    for at in (0, 500_000, -1):
        data = bytearray(bytes(range(256)) * 4096)
        data[at] ^= 1
        weights.write_bytes(data)
        # One changed byte is seen where it is sampled; in files this small every byte is.
        assert fingerprint(folder) != first
    (folder / "config.json").write_text("{}")
    weights.write_bytes(bytes(range(256)) * 4096)
    assert fingerprint(folder) == first
    parts = ModelConfig.model_validate(
        {"vision_tower": {"path": str(folder)}, "language_model": {"path": "some/hub-id"}}
    )
    assert fingerprint_parts(parts) == {"vision": first}


def test_keys_that_did_not_exist_at_the_start_count_at_their_defaults(tmp_path):
    recorded = resolved_recipe(tmp_path).recipe.model_dump(mode="json")
    for key in ("attention", "kernels", "compile", "offload", "checkpoint_tower_layers"):
        del recorded["train"][key]
    require_same_recipe(recorded, resolved_recipe(tmp_path), where=tmp_path)
    length = {"steps": 8, "schedule": "cosine", "warmup_frac": 0.2}
    for train, said in (
        ({"attention": "sdpa"}, "train.attention: 'auto' -> 'sdpa'"),
        ({"kernels": "torch"}, "train.kernels: 'auto' -> 'torch'"),
        ({"compile": "blocks"}, "train.compile: False -> 'blocks'"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            now = resolved_recipe(tmp_path, train=length | train)
            require_same_recipe(recorded, now, where=tmp_path)
    # The same bits with or without: free to change.
    moved = {"offload": {"optimizer": True, "activations": True}, "checkpoint_layers": 2}
    now = resolved_recipe(tmp_path, train=length | moved)
    require_same_recipe(recorded, now, where=tmp_path)
    recorded["train"]["gone"] = 1
    with pytest.raises(CheckpointError, match=r"train\.gone"):
        require_same_recipe(recorded, resolved_recipe(tmp_path), where=tmp_path)
