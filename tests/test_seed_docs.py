"""What docs/seed-models.md tells a reader to type is what the commands take; both languages."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models"))

from family_dirs import LLAVA_KIND, write_family, write_pictures
from seed_recipes import seed_settings

from test_readme import parse_only
from vistune.cli import main
from vistune.recipe import load_recipe, shipped_recipes
from vistune.train import train

ROOT = Path(__file__).parents[1]
PAGES = ("seed-models.md", "seed-models.zh-CN.md")
SMALL = [
    *("device=cpu", "data.workers=0", "train.epochs=null", "train.steps=1", "batch.samples=2"),
    *("batch.max_tokens=1024", "log.tensorboard=false", "log.progress=false"),
]


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text_of(page), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_both_languages_give_the_same_commands() -> None:
    assert commands(PAGES[0]) == commands(PAGES[1]) and len(commands(PAGES[0])) > 30
    named = [
        re.findall(r"`(?:vistune train )?([a-z0-9.-]+/[a-z0-9.-]+)`", text_of(p)) for p in PAGES
    ]
    assert named[0] == named[1]
    assert {name for name in named[0] if "scripts" not in name} <= {*shipped_recipes()}


@pytest.mark.parametrize("words", commands(PAGES[0]), ids=" ".join)
def test_every_command_is_one_the_tools_take(words: list[str]) -> None:
    assert words[0] == "vistune"
    parse_only(words[1:])
    if words[1] in ("train", "plan") or words[1:3] == ["data", "check"]:
        name, *settings = words[3:] if words[1] == "data" else words[2:]
        assert name in shipped_recipes()
        settings = settings[: settings.index("--device")] if "--device" in settings else settings
        load_recipe(name, settings)
    if words[1:3] == ["compare", "parity"]:
        assert (ROOT / words[3] / "config.json").is_file()


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def written(page_words: list[list[str]], verb: str, to: str) -> list[str]:
    """The page's first command of a verb that holds a word."""
    return next(words for words in page_words if words[1] == verb and to in words)


def test_the_tutorials_way_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From XTuner's projector to a run, its answers, XTuner's layout, and merged from there."""
    monkeypatch.chdir(tmp_path)
    name = "xtuner/llava-internlm2-1.8b-finetune-qlora"
    own = next(w for w in commands(PAGES[0]) if w[1] == "train" and "name=own" in w)
    settings = seed_settings(name, tmp_path / "models")
    Path("checkpoints").mkdir()
    for target, setting in zip(
        ("iter_2181.pth", "clip-vit-large-patch14-336", "internlm2-chat-1_8b"),
        settings,
        strict=True,
    ):
        (tmp_path / "checkpoints" / target).symlink_to(setting.partition("=")[2])
    write_pictures(tmp_path / "images")
    shutil.copy("images/train.json", "unique_data.json")
    train(load_recipe(own[2], [*own[3:], *SMALL]), console=Console(quiet=True))
    shutil.copy("images/0.png", "photo.jpg")
    words = commands(PAGES[0])
    for asked in ("checkpoints/iter_2181.pth", "runs/own"):
        chat = next(w for w in words if w[1:3] == ["chat", asked])
        run([*chat, "--max-new-tokens", "2"], monkeypatch)
    # The projector alone, as one directory: XTuner's convert and merge in one step.
    before = written(words, "chat", "checkpoints/iter_2181.pth")[2:9]
    run(["vistune", "export", *before, "--to", "vistune", "-o", "before"], monkeypatch)
    run(["vistune", "chat", "before", "-p", "what", "--max-new-tokens", "2"], monkeypatch)
    to_xtuner = written(words, "export", "xtuner")
    merged = next(w for w in words if w[1:3] == ["export", "llava-internlm2"])
    run(["vistune", "export", "runs/own", *to_xtuner[3:]], monkeypatch)
    assert Path("llava-internlm2/projector/config.json").is_file()
    run(merged, monkeypatch)
    run(["vistune", "chat", merged[-1], "-p", "what", "--max-new-tokens", "2"], monkeypatch)
    capsys.readouterr()


def test_a_visualglm_goes_the_pages_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few-shot pictures in their own format, a run, an answer, and back to both layouts."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_family("visualglm", tmp_path / "checkpoints" / "visualglm-6b")
    write_pictures(tmp_path / "data" / "fewshot-data")
    rows = [
        {
            "img": f"fewshot-data/{i}.png",
            "prompt": "这张图片的背景里有什么内容？",
            "label": f"猫{i}",
        }
        for i in range(4)
    ]
    Path("data/fewshot-data/dataset.json").write_text(json.dumps(rows))
    name = "visualglm/fewshot-lora"
    train(load_recipe(name, [*SMALL, "tune.language.layers=[0, 2]"]), console=Console(quiet=True))
    shutil.copy("data/fewshot-data/0.png", "photo.jpg")
    words = [w for w in commands(PAGES[0]) if "runs/visualglm-fewshot-lora" in w]
    assert [w[1] for w in words] == ["chat", "export", "export"]
    for one in words:
        run(one, monkeypatch)
    assert Path("visualglm-sat/model_config.json").is_file()
    assert Path("visualglm-hf/config.json").is_file()
    run(["vistune", "chat", "visualglm-sat", "-i", "photo.jpg", "-p", "你好"], monkeypatch)
    capsys.readouterr()


def test_a_released_llava_goes_on_with_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    released = write_family(LLAVA_KIND, tmp_path / "checkpoints" / "llava-v1.5-7b")
    # The config names the encoder by its hub id; a local copy is named in the command.
    encoder = tmp_path / "checkpoints" / "clip-vit-large-patch14-336"
    shutil.move(released / "encoder", encoder)
    values = json.loads((released / "config.json").read_text())
    values["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (released / "config.json").write_text(json.dumps(values))
    write_pictures(tmp_path / "data" / "task" / "images")
    shutil.copy("data/task/images/train.json", "data/task/train.json")
    words = next(w for w in commands(PAGES[0]) if w[1:3] == ["train", "llava-1.5/7b-task-lora"])
    train(load_recipe(words[2], [*words[3:], *SMALL]), console=Console(quiet=True))
    for to in ("llava", "hf"):
        run(written(commands(PAGES[0]), "export", to), monkeypatch)
    exported = json.loads(Path("llava-task/config.json").read_text())
    assert exported["mm_vision_tower"] == str(encoder)
    run(["vistune", "chat", "llava-task", "-p", "what", "--max-new-tokens", "2"], monkeypatch)
    capsys.readouterr()
