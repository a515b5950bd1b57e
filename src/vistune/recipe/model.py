"""The part of the recipe that says what the model is made of."""

from __future__ import annotations

import re
from typing import Literal, Self, TypeAlias

from pydantic import field_validator, model_validator

from vistune.recipe.base import Auto, PositiveInt, Section

QkvOrder: TypeAlias = Literal["blocks", "by_head"]

_CONNECTOR = re.compile(r"linear|identity|mlp[1-9][0-9]*x_gelu")


class VisionTowerConfig(Section):
    """The vision encoder."""

    path: str
    """Local directory in the hub's layout, or a hub id. The model is read from its config."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    layer: int | Auto = "auto"
    """Hidden state taken: an index into the encoder's hidden states (0 is the embedding, -1 the
    last layer before any final norm, -2 the usual choice with CLIP), or `auto`: -2 for CLIP, the
    normalised output otherwise."""
    adapter: str | None = None
    """LoRA adapters to fold in before anything trains: a PEFT directory, such as XTuner's
    `visual_encoder_adapter/`."""
    select: Literal["patch", "cls_patch"] = "patch"
    """`patch` drops the class token, `cls_patch` keeps it as one more image token."""
    s2: tuple[PositiveInt, ...] | None = None
    """Sides in pixels at which every image is seen (S2), such as 336, 672, 1008: the first is the
    tower's own, larger ones are cut into squares of it, and the features of all are joined by
    channel. The number of image tokens stays; the connector becomes wider."""

    @field_validator("s2")
    @classmethod
    def _rising(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (len(value) < 2 or list(value) != sorted(set(value))):
            raise ValueError("name at least two sides, smallest first")
        return value


class AuxTowerConfig(Section):
    """The second, high-resolution tower of an MGM: what it sees is mined patch by patch."""

    path: str | None = None
    """Directory of OpenCLIP's ConvNeXt (`open_clip_pytorch_model.bin` or safetensors). Left out
    where `model.connector.weights` holds the towers too, as MGM's `mm_projector.bin` does."""
    size_px: PositiveInt = 768
    """Side of the picture this tower sees; the other's are made from it."""
    grid: PositiveInt = 1
    """Crops of a side that the first tower sees: 1, or 2 for the HD models (with 1,536 px)."""
    whole: bool = False
    """With crops: the first tower sees the whole picture besides."""


class ConnectorConfig(Section):
    """The network between the tower's features and the language model's embeddings."""

    kind: str = "mlp2x_gelu"
    """`linear`, `identity` or `mlp{N}x_gelu` (N linear layers with exact GELU between them)."""
    pixel_shuffle: PositiveInt = 1
    """Side of the square of patches folded into one token before the connector (1: none)."""
    weights: str | None = None
    """Weights to start from, drawn from `seed` when left out: LLaVA's `mm_projector.bin`, XTuner's
    `projector/` or an `iter_*.pth` that holds the projector alone, `connector.safetensors` or
    the checkpoint of a run that trained the connector alone; for an MGM (`vision_tower_aux`) also
    its `mm_projector.bin` with mining and towers. With `from_checkpoint` they take the place of
    that model's own."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if not _CONNECTOR.fullmatch(value):
            raise ValueError(
                f"unknown connector '{value}'; known: linear, identity, mlp{{N}}x_gelu"
            )
        return value


class LanguageModelConfig(Section):
    """The causal language model."""

    path: str
    """Local directory in the hub's layout, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    gguf_file: str | None = None
    """File name inside `path` when the weights are GGUF (needs the extra `gguf`)."""
    adapter: str | None = None
    """LoRA adapters to fold in before anything trains: a PEFT directory, such as XTuner's
    `llm_adapter/` (InternLM2's own names are known)."""


class TilesConfig(Section):
    """Images cut into tiles (anyres, as in LLaVA-1.6).

    The whole image is one view and every tile another; the tiles' tokens are laid out in rows, each
    ended by a newline embedding that trains with the connector.
    """

    grids: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    """(rows, columns) of tiles an image may be cut into; the one that keeps most of its pixels is
    taken, the first of equals. A tile is `data.image.size_px` a side."""

    @field_validator("grids")
    @classmethod
    def _some(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one grid, and none twice")
        return value


class BasesConfig(Section):
    """The models that a directory stands on which holds only what was trained, such as XTuner's."""

    vision_tower: str | None = None
    """Local directory or hub id of the vision encoder; what the directory's own config says when
    left out. Also for an original LLaVA, whose config names its encoder."""
    language_model: str | None = None
    """Local directory or hub id of the language model; likewise."""
    model: str | None = None
    """Where the whole model is now that a run was trained from (its `from_checkpoint`), if it was
    moved."""


class ModelConfig(Section):
    """What the model is made of: three parts, or a model made before."""

    vision_tower: VisionTowerConfig | None = None
    """The vision encoder; needed unless `from_checkpoint` is set."""
    vision_tower_aux: AuxTowerConfig | None = None
    """A second tower, which makes the model an MGM; it needs CLIP and Gemma as the parts."""
    connector: ConnectorConfig = ConnectorConfig()
    """The network between tower and language model."""
    language_model: LanguageModelConfig | None = None
    """The language model; needed unless `from_checkpoint` is set."""
    tiles: TilesConfig | None = None
    """Cut images into tiles (`{}` for the grids of LLaVA-1.6); left out, every image becomes one
    square. With `from_checkpoint`: tiles for a model that had none; left out, as it was."""
    from_checkpoint: str | None = None
    """A run, a checkpoint of it, or a whole model (a directory or a hub id) to go on from: its
    parts, its connector and all weights it trained. Public layouts are recognised by their files,
    also those that hold only what was trained: XTuner's directories and `iter_*.pth`, and what
    LLaVA writes after its first stage and after LoRA. `vision_tower`, `vision_tower_aux`,
    `connector` (but for its `weights`) and `language_model` are then left out."""
    revision: str | None = None
    """Branch, tag or commit of `from_checkpoint` where that is a hub id."""
    bases: BasesConfig = BasesConfig()
    """Where the models are that `from_checkpoint` stands on, when its own config does not say so
    rightly."""
    sat_qkv: QkvOrder | None = None
    """With a VisualGLM in SwissArmyTransformer's layout: the order of its fused rows of queries,
    keys and values. `blocks` (also when left out): queries, then keys, then values. `by_head`: head
    by head, as SwissArmyTransformer wrote them before July 2023 and its Ascend version does. No
    file says which, and with the wrong one the model talks nonsense."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        parts = (self.vision_tower, self.language_model)
        if self.from_checkpoint is None and None in parts:
            raise ValueError("name both vision_tower and language_model, or from_checkpoint")
        if self.from_checkpoint is None and self.bases != BasesConfig():
            raise ValueError("bases belongs to from_checkpoint; name the parts themselves")
        if self.from_checkpoint is None and self.revision is not None:
            raise ValueError("revision belongs to from_checkpoint; the parts have their own")
        if self.from_checkpoint is None and self.sat_qkv is not None:
            raise ValueError("sat_qkv belongs to from_checkpoint")
        if self.from_checkpoint is not None:
            # What stands at its default says nothing: a resolved recipe writes every key.
            defaults = {
                "vision_tower": None,
                "vision_tower_aux": None,
                "connector": ConnectorConfig(weights=self.connector.weights),
                "language_model": None,
            }
            values = {name: getattr(self, name) for name in defaults}
            given = {name for name, value in values.items() if value != defaults[name]}
            if given:
                raise ValueError(
                    f"from_checkpoint already says what the model is; leave out {sorted(given)}"
                )
        tower = self.vision_tower
        if self.vision_tower_aux is not None and self.tiles is not None:
            raise ValueError("an MGM (vision_tower_aux) cuts images by its grid: leave tiles out")
        if self.tiles is not None and tower is not None:
            if tower.s2 is not None:
                raise ValueError("tiles and vision_tower.s2 do not go together: leave one out")
            if tower.select != "patch":
                raise ValueError("tiles have no place for a class token: vision_tower.select=patch")
        return self
