"""What a model will be, from configs and tokenizer alone: no weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistune.errors import MissingExtraError, ModelError
from vistune.models.language.llava import is_original_llava
from vistune.models.towers.families import TWO_TOWER_TYPES, TowerPlan, plan_tower, tower_grid
from vistune.models.weights import hub_error, part_path, quiet_transformers
from vistune.recipe import LanguageModelConfig, ModelConfig, VisionTowerConfig
from vistune.types import ImageDefaults, VisionGrid

if TYPE_CHECKING:
    from vistune.models.families import LanguageFamily

IMAGE_TOKEN = "<image>"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
_PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ModelFacts:
    """A model that is described and not yet loaded.

    Args:
        tokenizer: The language model's tokenizer, with `<image>` as one token.
        image_token_id: That token's id. It may lie outside the embedding table, which it never
            reaches.
        grid: Image tokens as a function of pixels.
        image_defaults: What the tower's preprocessor file says.
        vision_config: Config of the part of the encoder that is used.
        text_config: Config of the language model.
        tower: Which part of the encoder is used; None for a model of a family, which is whole.
        template: Template that `data.template=auto` stands for; `auto` for the tokenizer's own.
        layout: How images of any size become tokens, as values of `data.layout`; None where every
            image becomes one square of `image_defaults`.
        image_marks: What the tokenizer's own chat template writes for an image part, and the text
            to put in front of and behind an image's tokens in its stead. None for a template of
            text alone.
        whole_config: Config of a model of a family, from which the whole model can be built.
        adds_bos: Whether the model's public processor puts the tokenizer's begin-of-text in front
            of what its chat template writes, unless that begins with it.
        prompts_both_ways: Whether all that stands in front of an answer is a prefix that the model
            reads both ways.
    """

    tokenizer: Any
    image_token_id: int
    grid: VisionGrid
    image_defaults: ImageDefaults
    vision_config: Any
    text_config: Any
    tower: TowerPlan | None
    template: str = "auto"
    layout: dict[str, Any] | None = None
    image_marks: tuple[str, str, str] | None = None
    whole_config: Any = None
    adds_bos: bool = False
    prompts_both_ways: bool = False


def describe(config: ModelConfig) -> ModelFacts:
    """Reads configs, preprocessor file and tokenizer of a model's parts.

    Args:
        config: The parts; `from_checkpoint` is read by `checkpoint.layouts`.

    Raises:
        ModelError: A part is not there, or is not of a kind that fits.
    """
    if config.vision_tower is None or config.language_model is None:
        raise ModelError(
            "only parts can be described here",
            where="model.from_checkpoint",
            fix="read a whole model with checkpoint.layouts.describe_directory",
        )
    if config.vision_tower_aux is not None:
        from vistune.models.families.mgm_parts import describe_mgm

        return describe_mgm(config)
    tower = config.vision_tower
    whole_vision_config = read_vision_config(tower)
    plan, vision_config = plan_tower(
        whole_vision_config,
        layer=tower.layer,
        select=tower.select,
        where=tower.path,
        scales=tower.s2 or (),
    )
    grid = tower_grid(
        vision_config, plan, pixel_shuffle=config.connector.pixel_shuffle, where=tower.path
    )
    defaults = read_image_defaults(tower.path, whole_vision_config, revision=tower.revision)
    defaults = at_largest_scale(defaults, plan)
    text_config = read_text_config(config.language_model)
    tokenizer, image_token_id = read_tokenizer(config.language_model)
    facts = ModelFacts(
        tokenizer=tokenizer,
        image_token_id=image_token_id,
        grid=grid,
        image_defaults=defaults,
        vision_config=vision_config,
        text_config=text_config,
        tower=plan,
    )
    if config.tiles is None:
        return facts
    from vistune.models.anyres import with_tiles

    return with_tiles(facts, config.tiles, where="model.tiles")


def at_largest_scale(defaults: ImageDefaults, plan: TowerPlan) -> ImageDefaults:
    """Returns how images are prepared for a tower that may see them at several sizes.

    Args:
        defaults: What its preprocessor file says.
        plan: Its plan.
    """
    return replace(defaults, size_px=plan.scales[-1]) if plan.scales else defaults


def _read_config(path: str, *, key: str, **arguments: Any) -> Any:
    from transformers import AutoConfig

    path = part_path(path, key=key)
    has_config = (Path(path) / "config.json").is_file() or arguments.get("gguf_file") is not None
    if Path(path).is_dir() and not has_config:
        raise ModelError(
            "this directory has no config.json",
            where=path,
            expected="a model in the hub's layout: config.json and its weights",
            fix=f"set {key} to the directory that holds them",
        )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path, trust_remote_code=False, **arguments)
    except ImportError as error:
        if "gguf" in str(error).lower():
            raise MissingExtraError.of("gguf", extra="gguf", purpose="a GGUF file") from error
        raise hub_error(error, path=path, key=key) from error
    except Exception as error:  # configs fail in many ways, all of them the user's to mend
        raise hub_error(error, path=path, key=key) from error


def vision_config_from(values: dict[str, Any]) -> Any:
    """Returns the config object of a vision encoder from a config file's values."""
    if values.get("model_type") == "efficientnet_lite":
        from vistune.models.towers.efficientnet_lite import EfficientNetLiteConfig

        return EfficientNetLiteConfig.from_dict(values)
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def read_vision_config(config: VisionTowerConfig) -> Any:
    """Returns the config of a vision encoder; of a two-tower model, its vision part's."""
    key = "model.vision_tower.path"
    path = part_path(config.path, key=key)
    file = Path(path) / "config.json"
    if file.is_file():
        values = read_json(file)
        if values.get("model_type") == "efficientnet_lite":
            return vision_config_from(values)
        if values.get("model_type") == "timm_wrapper" or "architecture" in values:
            _need_timm()
    revision = {} if config.revision is None else {"revision": config.revision}
    found = _read_config(path, key=key, **revision)
    return found.vision_config if found.model_type in TWO_TOWER_TYPES else found


def _need_timm() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        raise MissingExtraError.of("timm", extra="timm", purpose="a timm vision tower") from None


def read_text_config(config: LanguageModelConfig) -> Any:
    """Returns the config of a causal language model.

    Raises:
        ModelError: The directory holds something else.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    key = "model.language_model.path"
    family = language_family(config)
    if family is not None:
        folder = Path(config.path).expanduser()
        return family.transformers_config(read_json(folder / "config.json"))
    arguments: dict[str, Any] = {}
    if config.revision is not None:
        arguments["revision"] = config.revision
    if config.gguf_file is not None:
        folder = Path(config.path).expanduser()
        if folder.is_dir() and not (folder / config.gguf_file).is_file():
            raise ModelError(
                f"there is no file '{config.gguf_file}'",
                where=config.path,
                expected=", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "*.gguf",
                fix="set model.language_model.gguf_file",
            )
        arguments["gguf_file"] = config.gguf_file
    found = _read_config(config.path, key=key, **arguments)
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(found, "vision_config"):
        whole = hasattr(found, "vision_config")
        raise ModelError(
            f"a model of type '{found.model_type}' is no causal language model",
            where=config.path,
            fix="set model.from_checkpoint to go on from a whole vision-language model"
            if whole
            else f"set {key}",
        )
    return found


def language_family(config: LanguageModelConfig) -> LanguageFamily | None:
    """Returns the family of a language model that transformers cannot load by itself, else None.

    Args:
        config: Where the model is; only a local directory is looked into.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    folder = Path(config.path).expanduser()
    file = folder / "config.json"
    if config.gguf_file is not None or not file.is_file():
        return None
    values = read_json(file)
    # Released LLaVAs call themselves what transformers' own are called.
    if values.get("model_type") in CONFIG_MAPPING_NAMES and not is_original_llava(values):
        return None
    from vistune.models.families import LANGUAGE_FAMILIES, detect

    return detect(folder, LANGUAGE_FAMILIES)


def read_tokenizer(config: LanguageModelConfig) -> tuple[Any, int]:
    """Returns a tokenizer in which `<image>` is one token, and that token's id.

    Raises:
        ModelError: There is no tokenizer.
    """
    key = "model.language_model.path"
    path = part_path(config.path, key=key)
    family = language_family(config)
    if family is not None and family.reads_pieces:
        return _family_tokenizer(Path(path))
    arguments: dict[str, Any] = {}
    if config.revision is not None:
        arguments["revision"] = config.revision
    if config.gguf_file is not None:
        arguments["gguf_file"] = config.gguf_file
    return load_tokenizer(path, key=key, **arguments)


def _family_tokenizer(folder: Path) -> tuple[Any, int]:
    """Reads the tokenizer of a family whose own class is remote code.

    `AutoTokenizer` takes such a directory for something else and gives other ids.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        try:
            with quiet_transformers():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # tokenizer files fail in many ways, all the user's to mend
            raise hub_error(error, path=str(folder), key="model.language_model.path") from error
    else:
        from vistune.models.language.pieces import fast_from_pieces

        tokenizer = fast_from_pieces(folder)
    return tokenizer, image_token_of(tokenizer)


def load_tokenizer(path: str, *, key: str, **arguments: Any) -> tuple[Any, int]:
    """Loads a tokenizer and makes sure that it has the image token.

    Args:
        path: Directory or hub id.
        key: Its key in the recipe, for messages.
        arguments: For `AutoTokenizer.from_pretrained`.

    Raises:
        ModelError: It cannot be read.
    """
    from transformers import AutoTokenizer

    from vistune.models.language.pieces import own_tokenizer

    own = None if arguments else own_tokenizer(Path(path).expanduser())
    if own is not None:
        return own, image_token_of(own)
    try:
        with quiet_transformers():
            # Left out, transformers asks on the terminal whether to run a directory's own code.
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **arguments)
    except Exception as error:  # tokenizer files fail in many ways, all of them the user's to mend
        raise hub_error(error, path=path, key=key) from error
    return tokenizer, image_token_of(tokenizer)


def processor_template(folder: Path) -> str | None:
    """Returns the chat template of a directory's processor, None where it brings none.

    Args:
        folder: A model directory in the hub's layout.

    Raises:
        ModelError: The file cannot be read.
    """
    for name in _TEMPLATE_FILES:
        file = folder / name
        if file.suffix == ".jinja" and file.is_file():
            return file.read_text(encoding="utf-8")
        if file.is_file() and "chat_template" in (values := read_json(file)):
            return str(values["chat_template"])
    return None


def image_token_of(tokenizer: Any) -> int:
    """Returns the id of `<image>`, which is added as a special token where there is none."""
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found is None or (found == tokenizer.unk_token_id and tokenizer.unk_token != IMAGE_TOKEN):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return int(found)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: It is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError("this file cannot be read", where=str(file), got=str(error)) from error
    if not isinstance(values, dict):
        raise ModelError("this file holds no JSON object", where=str(file))
    return values


def read_image_defaults(
    path: str, vision_config: Any, *, revision: str | None = None
) -> ImageDefaults:
    """Reads how a tower's images are prepared.

    Args:
        path: Directory or hub id.
        vision_config: The encoder's config (timm keeps the values there).
        revision: Of a hub id.

    Raises:
        ModelError: There is no preprocessor file, or it says something vistune cannot do.
    """
    if getattr(vision_config, "model_type", "") == "timm_wrapper":
        timm_values = vision_config.to_dict().get("pretrained_cfg", {})
        return _timm_defaults(timm_values, where=path)
    for name in _PREPROCESSOR_FILES:
        file = _part_file(path, name, revision=revision)
        if file is None:
            continue
        values = read_json(file)
        values = values.get("image_processor", values)
        if "image_mean" in values or "size" in values:
            return parse_image_defaults(values, where=str(file))
    raise ModelError(
        "the vision tower has no preprocessor_config.json, so the size, mean and standard"
        " deviation of its images are not known",
        where=path,
        fix="put one beside its config.json, with the keys size, image_mean and image_std",
    )


def _part_file(path: str, name: str, *, revision: str | None) -> Path | None:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def parse_image_defaults(values: dict[str, Any], *, where: str) -> ImageDefaults:
    """Reads a preprocessor file's values, in the old spelling (numbers) or the new (objects).

    Args:
        values: Keys such as size, crop_size, image_mean, image_std, resample, do_normalize.
        where: File, for messages.

    Raises:
        ModelError: A value is missing or unusable.
    """
    size_px = None
    if values.get("do_center_crop", True):
        size_px = _side_px(values.get("crop_size"))
    size_px = size_px or _side_px(values.get("size"))
    mean, std = values.get("image_mean"), values.get("image_std")
    if not values.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = float(values.get("rescale_factor", 1 / 255))
    unusable = {
        "size": size_px is None,
        "image_mean": mean is None or len(mean) != 3,
        "image_std": std is None or len(std) != 3,
        "rescale_factor": abs(factor - 1 / 255) > 1e-6 or not values.get("do_rescale", True),
        "resample": values.get("resample", 3) not in _FILTERS,
    }
    wrong = [name for name, is_wrong in unusable.items() if is_wrong]
    if wrong or size_px is None or mean is None or std is None:
        raise ModelError(
            "the preprocessor file lacks values or has ones that vistune cannot use",
            where=where,
            got=", ".join(f"{name}={values.get(name)}" for name in wrong),
            fix=f"correct {', '.join(wrong)} there",
        )
    return ImageDefaults(
        size_px=size_px,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        resample=_FILTERS[values.get("resample", 3)],  # type: ignore[arg-type]
    )


def _side_px(size: Any) -> int | None:
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        return int(size)
    if isinstance(size, dict):
        if size.get("height") is not None and size.get("height") == size.get("width"):
            return int(size["height"])
        if size.get("shortest_edge") is not None:
            return int(size["shortest_edge"])
    return None


def _timm_defaults(values: dict[str, Any], *, where: str) -> ImageDefaults:
    filters = ("nearest", "bilinear", "bicubic", "lanczos")
    names = ("input_size", "mean", "std")
    missing = [name for name in names if values.get(name) is None]
    if missing or values.get("interpolation", "bicubic") not in filters:
        raise ModelError(
            "the timm config does not say how images are prepared",
            where=where,
            got=f"missing: {', '.join(missing) or 'a known interpolation'}",
            fix="add pretrained_cfg with input_size, mean, std and interpolation to config.json",
        )
    mean, std = values["mean"], values["std"]
    return ImageDefaults(
        size_px=int(values["input_size"][-1]),
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        resample=values.get("interpolation", "bicubic"),
    )
