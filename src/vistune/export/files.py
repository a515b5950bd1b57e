"""What every export writes: weights in shards, tokenizer, preprocessor file; all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vistune.checkpoint.files import follow_umask
from vistune.data.encode import Encoder
from vistune.data.layout import AnyresLayout
from vistune.errors import CheckpointError
from vistune.models.anyres import pinpoints_of

MAX_SHARD = "5GB"
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@contextmanager
def new_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a directory beside `output` to write into and moves it there when all went well.

    Args:
        output: Where the directory shall be.
        overwrite: Replace what is there.

    Raises:
        CheckpointError: Something is there, or the place cannot be written.
    """
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            "there is something here already",
            where=str(output),
            fix="add --overwrite, or name another --output",
        )
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            "this place cannot be written", where=str(output), got=str(error)
        ) from error
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    follow_umask(partial)
    if output.is_dir():
        shutil.rmtree(output)
    elif output.exists():
        output.unlink()
    partial.rename(output)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    text = json.dumps(values, ensure_ascii=False, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes safetensors, in shards when they are large."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder,
        max_shard_size=MAX_SHARD,
    )


def image_processor_values(encoder: Encoder) -> dict[str, Any]:
    """Returns how an encoder prepares images, as the values of transformers' image processor."""
    if isinstance(encoder.layout, AnyresLayout):
        return _anyres_values(encoder.layout)
    plan = encoder.image_plan
    side = {"height": plan.size_px, "width": plan.size_px}
    square = plan.mode == "resize"
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": plan.mode == "pad",
        "do_resize": True,
        "size": side if square else {"shortest_edge": plan.size_px},
        "resample": _FILTERS[plan.resample],
        "do_center_crop": not square,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(plan.mean),
        "image_std": list(plan.std),
    }


def _anyres_values(layout: AnyresLayout) -> dict[str, Any]:
    plan, side = layout.plan, layout.plan.size_px
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _FILTERS[plan.resample],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(plan.mean),
        "image_std": list(plan.std),
        "image_grid_pinpoints": pinpoints_of(layout.grids, side, swapped=False),
    }


def write_tokenizer(folder: Path, encoder: Encoder) -> None:
    """Writes tokenizer and preprocessor file."""
    encoder.tokenizer.save_pretrained(folder)
    name_class(folder)
    write_json(folder / "preprocessor_config.json", image_processor_values(encoder))


def name_class(folder: Path) -> None:
    """Names a saved tokenizer's class so that transformers 4 knows it too.

    Args:
        folder: Holds what `save_pretrained` wrote.
    """
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # its name since transformers 5
        write_json(file, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
