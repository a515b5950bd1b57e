"""The typed recipe: schema, loader and reference. Imports neither torch nor transformers."""

from vistune.recipe.base import Section
from vistune.recipe.loader import ResolvedRecipe, load_recipe, shipped_recipes
from vistune.recipe.schema import (
    BatchConfig,
    ConnectorConfig,
    DataConfig,
    FreezeTune,
    FullTune,
    ImageConfig,
    LanguageModelConfig,
    LogConfig,
    LoraTune,
    ModelConfig,
    Recipe,
    RoleTune,
    SampleAnswersConfig,
    SaveConfig,
    SourceConfig,
    TrainConfig,
    TuneConfig,
    VisionTowerConfig,
)

__all__ = [
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
    "TrainConfig",
    "TuneConfig",
    "VisionTowerConfig",
    "load_recipe",
    "shipped_recipes",
]
