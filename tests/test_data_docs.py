"""What docs/data.md shows works as it says, in both languages: every example and every command."""

import io
import re
import shlex
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from test_readme import parse_only
from vistune.cli.app import main
from vistune.data.detect import detect
from vistune.data.formats import FORMATS, open_source
from vistune.recipe import Recipe, SourceConfig

ROOT = Path(__file__).parents[1] / "docs"
PAGES = ("data.md", "data.zh-CN.md")
_EXAMPLE = re.compile(
    r"^`([\w./-]+\.(?:jsonl?|csv|txt))`[^\n]*\n\n```\w+\n(.*?)```", flags=re.DOTALL | re.MULTILINE
)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def examples(name):
    return dict(_EXAMPLE.findall(text_of(name)))


def commands(name):
    blocks = re.findall(r"```bash\n(.*?)```", text_of(name), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), "red").save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The examples as the page tells to write them, and the names that its commands use."""
    found = examples("data.md")
    for name, content in found.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name in ("cat.jpg", "images/cat.jpg", "cogvlm/images/cat.jpg", "folder/cat.jpg"):
        picture(tmp_path / name)
    (tmp_path / "train.json").write_text(f"[{found['llava.jsonl']}]", encoding="utf-8")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "train-000.tar", "w") as archive:
        for name, content in (("1.jpg", (tmp_path / "cat.jpg").read_bytes()), ("1.txt", b"A cat.")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_both_languages_show_the_same():
    assert examples("data.md") == examples("data.zh-CN.md")
    assert commands("data.md") == commands("data.zh-CN.md")
    assert len(commands("data.md")) > 10


def test_every_format_has_an_example_that_is_found_out_and_read(folder):
    named = re.findall(r"^\*\*`(\w+)`\*\*", text_of("data.md"), flags=re.MULTILINE)
    assert sorted(named) == sorted(FORMATS.names())
    assert named == re.findall(r"^\*\*`(\w+)`\*\*", text_of("data.zh-CN.md"), flags=re.MULTILINE)
    seen = {"webdataset"}
    for name in examples("data.md"):
        target = name if "/" not in name else name.partition("/")[0]
        found = detect(target)
        sample = open_source(SourceConfig(path=found.path, format=found.format)).read(0)
        assert len(sample.images) == 1 and sample.images[0].path.is_file()
        assert sample.turns[-1].text
        seen.add(found.format)
    assert seen == set(named)


@pytest.mark.parametrize("words", commands("data.md"), ids=" ".join)
def test_every_command_does_what_it_says(folder, words, monkeypatch, capsys):
    assert words[0] == "vistune"
    parse_only(words[1:])
    if any(word.endswith(".yaml") for word in words):
        return  # needs a model
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_recipes_shown_are_recipes(page):
    import yaml

    shown = re.findall(r"```yaml\n(.*?)```", text_of(page), flags=re.DOTALL)
    assert len(shown) == 2
    for text in shown:
        tree = {"batch": {"samples": 1}, **yaml.safe_load(text)}
        part = Recipe.model_fields["data"].annotation
        assert part.model_validate(tree["data"]).train
