"""What is missing, left over or of another shape is named as the public directory names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_dirs import PARITY, write_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistune.assembly import load_assembled
from vistune.checkpoint.layouts import describe_directory, load_directory
from vistune.errors import ModelError, VistuneError, WeightsError
from vistune.export import export_model
from vistune.models.families.internlm2 import load_internlm2
from vistune.models.families.visualglm import read_sat_tensors

KEYS = {
    "cogvlm2": (
        "model.vision.linear_proj.norm1.weight",
        "model.layers.0.self_attn.vision_expert_query_key_value.weight",
        "model.vision.boi",
        "lm_head.weight",
    ),
    "visualglm": (
        "transformer.word_embeddings.weight",
        "transformer.layers.0.attention.query_key_value.weight",
        "transformer.layers.2.attention.query_key_value.bias",
        "image_encoder.qformer.transformer.layers.1.input_layernorm.weight",
        "image_encoder.glm_proj.weight",
    ),
    "visualglm-sat": (
        "transformer.layers.0.attention.query_key_value.weight",
        "mixins.chatglm-final.lm_head.weight",
        "mixins.eva.model.glm_proj.weight",
        "mixins.eva.model.vit.mixins.cls.ln_vision.bias",
    ),
    "mgm-2b": (
        "model.vlm_uni_query_projector.0.weight",
        "model.vision_tower_aux.vision_stem.0.weight",
        "model.vision_tower_aux.vision_stages.1.blocks.0.mlp.fc1.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.layer_norm1.weight",
        "model.mm_projector.0.weight",
    ),
    "llava-1.6": (
        "model.image_newline",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.layers.1.mlp.up_proj.weight",
    ),
    "internlm2": (
        "model.layers.0.attention.wqkv.weight",
        "model.layers.1.feed_forward.w2.weight",
        "output.weight",
    ),
}
CASES = [(kind, key) for kind, keys in KEYS.items() for key in keys]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    for kind in KEYS:
        if kind == "internlm2":
            shutil.copytree(PARITY / kind, root / kind)
        else:
            write_family(kind, root / kind)
    return root


class Opened:
    """A directory whose weights can be changed for one load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_sat = folder.name == "visualglm-sat"
        self._file = folder / (
            "1/mp_rank_00_model_states.pt" if self._is_sat else "model.safetensors"
        )
        self.weights = read_sat_tensors(folder) if self._is_sat else load_file(self._file)
        self.weights = {name: tensor.clone() for name, tensor in self.weights.items()}

    def error_with(self, weights: dict[str, Tensor]) -> str:
        self._write(weights)
        try:
            with pytest.raises(VistuneError) as caught:
                self._load()
        finally:
            self._write(self.weights)
        return str(caught.value)

    def _write(self, weights: dict[str, Tensor]) -> None:
        write: Callable[..., None] = torch.save if self._is_sat else save_file
        write({"module": weights} if self._is_sat else weights, self._file)

    def _load(self) -> None:
        if self.folder.name == "internlm2":
            load_internlm2(self.folder, torch.float32)
        else:
            facts = describe_directory(self.folder)
            load_directory(self.folder, facts, dtype=torch.float32)


@pytest.mark.parametrize(("kind", "key"), CASES)
def test_every_key_is_named_as_it_is_written(shelf: Path, kind: str, key: str) -> None:
    opened = Opened(shelf / kind)
    tensor = opened.weights[key]
    assert key in opened.error_with({n: t for n, t in opened.weights.items() if n != key})
    assert key in opened.error_with({**opened.weights, key: torch.zeros(*tensor.shape, 2)})
    if tensor.shape[0] > 1:
        assert key in opened.error_with({**opened.weights, key: tensor[:-1].clone()})
    assert f"{key}.more" in opened.error_with({**opened.weights, f"{key}.more": torch.ones(2)})


@pytest.mark.parametrize("kind", ["cogvlm2", "visualglm", "mgm-2b", "internlm2"])
def test_quantised_directories_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "any name"
    if kind == "internlm2":
        shutil.copytree(PARITY / kind, folder)
    else:
        write_family(kind, folder)
    file = folder / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    with pytest.raises(ModelError, match=r"bitsandbytes(.|\n)*frozen_format"):
        if kind == "internlm2":
            load_internlm2(folder, torch.float32)
        else:
            load_assembled(folder)


def test_a_tied_head_that_is_written_out_is_accounted_for(tmp_path: Path) -> None:
    source = write_family("mgm-2b", tmp_path / "any name")
    expected = load_assembled(source).model.state_dict()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    # As PyTorch files hold it: the same numbers under both names.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    found = load_assembled(source).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        load_assembled(source)


def test_what_sat_never_reads_comes_back_too(tmp_path: Path) -> None:
    source = write_family("visualglm-sat", tmp_path / "any name")
    file = source / "1" / "mp_rank_00_model_states.pt"
    tensors = {name: tensor.half() for name, tensor in read_sat_tensors(source).items()}
    table = tensors["transformer.position_embeddings.weight"]
    tensors["transformer.position_embeddings.weight"] = torch.randn(table.shape).half()
    torch.save({"module": tensors}, file)
    out = export_model(source, to="sat", output=tmp_path / "out")
    written = read_sat_tensors(out)
    assert written.keys() == tensors.keys()
    assert all(t.dtype == torch.float16 and torch.equal(t, tensors[n]) for n, t in written.items())
