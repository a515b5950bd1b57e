"""MGM's tensor names in its public checkpoints, and the ConvNeXt's in OpenCLIP's."""

from __future__ import annotations

from vistune.models.keymap import Entry, KeyMap, Unread, pairs
from vistune.models.mgm.configuration import MGMConfig

_BOTH = ("weight", "bias")
_CLIP_LAYER = (
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
    "self_attn.k_proj",
    "self_attn.out_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
_GEMMA_LAYER = (
    "input_layernorm",
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "post_attention_layernorm",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
_MINING = (("query", "query"), ("aux", "key"), ("val", "value"))
_BLOCK = ("conv_dw", "norm", "mlp.fc1", "mlp.fc2")


def mgm_map(config: MGMConfig) -> KeyMap:
    """Returns the names of a whole MGM on Gemma.

    The head is tied to the embedding and has no tensor of its own.
    """
    clip = "model.vision_tower.vision_tower.vision_model."
    # A buffer of older transformers versions, which some checkpoints carry.
    counted = Unread(reason="position numbers 0, 1, 2, ... are counted, not learned")
    entries = (
        *_gemma(config),
        *_clip(config, clip),
        *_convnext(config, "model.vision_tower_aux.vision_"),
        *_connector(config),
    )
    return KeyMap(
        layout="MGM",
        entries=entries,
        unread={f"{clip}embeddings.position_ids": counted},
    )


def open_clip_map(config: MGMConfig) -> KeyMap:
    """Returns the names of the ConvNeXt in an OpenCLIP checkpoint (`visual.trunk.*`).

    Only the stem and the stages; the caller takes those names out of the file.
    """
    return KeyMap(layout="OpenCLIP ConvNeXt", entries=tuple(_convnext(config, "visual.trunk.")))


def _gemma(config: MGMConfig) -> list[Entry]:
    own = "language_model."
    entries = [
        Entry(f"model.{name}.weight", (f"{own}model.{name}.weight",))
        for name in ("embed_tokens", "norm")
    ]
    for layer in range(config.text_config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        names = [(name, name) for name in _GEMMA_LAYER]
        entries += pairs(prefix, f"{own}{prefix}", names, kinds=("weight",))
    return entries


def _clip(config: MGMConfig, public: str) -> list[Entry]:
    own = "vision_tower."
    alone = (
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
    )
    edges = [(name, name) for name in ("pre_layrnorm", "post_layernorm")]
    entries = [Entry(f"{public}{name}", (f"{own}{name}",)) for name in alone]
    entries += pairs(public, own, edges, kinds=_BOTH)
    for layer in range(config.vision_config.num_hidden_layers):
        prefix = f"encoder.layers.{layer}."
        names = [(name, name) for name in _CLIP_LAYER]
        entries += pairs(f"{public}{prefix}", f"{own}{prefix}", names, kinds=_BOTH)
    return entries


def _convnext(config: MGMConfig, public: str) -> list[Entry]:
    own = "vision_tower_aux.vision_"
    entries = pairs(
        f"{public}stem.", f"{own}stem.", [(str(i), str(i)) for i in range(2)], kinds=_BOTH
    )
    assert config.aux_depths is not None
    for stage, depth in enumerate(config.aux_depths):
        if stage:
            halving = [(f"downsample.{i}", f"downsample.{i}") for i in range(2)]
            entries += pairs(
                f"{public}stages.{stage}.", f"{own}stages.{stage}.", halving, kinds=_BOTH
            )
        for block in range(depth):
            prefix = f"stages.{stage}.blocks.{block}."
            names = [(name, name) for name in _BLOCK]
            entries += pairs(f"{public}{prefix}", f"{own}{prefix}", names, kinds=_BOTH)
            entries.append(Entry(f"{public}{prefix}gamma", (f"{own}{prefix}gamma",)))
    return entries


def _connector(config: MGMConfig) -> list[Entry]:
    parts = ("0", "1")
    entries: list[Entry] = []
    for theirs, ours in _MINING:
        public = f"model.vlm_uni_{theirs}_projector."
        names = [(part, part) for part in parts]
        entries += pairs(public, f"connector.mining.{ours}.", names, kinds=_BOTH)
    depth = int(config.connector.removeprefix("mlp").removesuffix("x_gelu"))
    linears = [(str(2 * i), str(2 * i)) for i in range(depth)]
    return entries + pairs("model.mm_projector.", "connector.projector.", linears, kinds=_BOTH)
