"""The typed recipe: schema, loader and reference. Imports neither torch nor transformers."""

from vistune.recipe.base import Section
from vistune.recipe.loader import ResolvedRecipe, load_recipe, shipped_recipes
from vistune.recipe.model import (
    AuxTowerConfig,
    BasesConfig,
    ConnectorConfig,
    LanguageModelConfig,
    ModelConfig,
    TilesConfig,
    VisionTowerConfig,
)
from vistune.recipe.schema import (
    BatchConfig,
    DataConfig,
    FreezeTune,
    FullTune,
    ImageConfig,
    LogConfig,
    LoraTune,
    Recipe,
    RoleTune,
    SampleAnswersConfig,
    SaveConfig,
    SourceConfig,
    TrainConfig,
    TuneConfig,
    UrlConfig,
)

__all__ = [
    "AuxTowerConfig",
    "BasesConfig",
    "BatchConfig",
    "ConnectorConfig",
    "DataConfig",
    "FreezeTune",
    "FullTune",
    "ImageConfig",
    "LanguageModelConfig",
    "LogConfig",
    "LoraTune",
    "ModelConfig",
    "Recipe",
    "ResolvedRecipe",
    "RoleTune",
    "SampleAnswersConfig",
    "SaveConfig",
    "Section",
    "SourceConfig",
    "TilesConfig",
    "TrainConfig",
    "TuneConfig",
    "UrlConfig",
    "VisionTowerConfig",
    "load_recipe",
    "shipped_recipes",
]
