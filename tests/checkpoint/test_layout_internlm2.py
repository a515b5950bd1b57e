"""InternLM2 as Llama: the reference dump, the layout both ways, dynamic scaling, the real size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from vistune.checkpoint.layouts.internlm2 import from_public, to_public, write_internlm2
from vistune.errors import ModelError, WeightsError
from vistune.models.attention import packing_mask, register_packed_attention
from vistune.models.families import FAMILIES, LANGUAGE_FAMILIES, detect
from vistune.models.families.files import built_on_meta
from vistune.models.families.internlm2 import load_internlm2
from vistune.models.language.decoder import check_config, check_model
from vistune.models.language.internlm2 import (
    grouped_heads,
    internlm2_to_llama_config,
    llama_to_internlm2_config,
    public_frequencies,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "internlm2"
# Float32 on a CPU: sums of up to 128 terms over three layers, in another order.
REL = 2e-5
PUBLIC_1_8B = {
    "model_type": "internlm2",
    "vocab_size": 92544,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(FIXTURE / "io.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "any name"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, copy / name)
    return copy


def _settings(**changes: Any) -> dict[str, Any]:
    return {**json.loads((FIXTURE / "config.json").read_text()), **changes}


def _relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def test_forward_and_backward_are_the_references(arrays: dict[str, Tensor]) -> None:
    model = load_internlm2(FIXTURE, torch.float32)
    out = model(
        arrays["input_ids"], attention_mask=arrays["attention_mask"], output_hidden_states=True
    )
    kept = arrays["attention_mask"].bool()
    assert _relative(out.logits[kept], arrays["logits"][kept]) < REL
    assert _relative(out.hidden_states[-1][kept], arrays["hidden_last"][kept]) < REL
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), arrays["labels"][:, 1:].flatten())
    assert _relative(loss, arrays["loss"]) < REL
    loss.backward()
    errors = [_relative(_fused_gradient(model, layer), arrays["grad_wqkv"]) for layer in range(3)]
    assert min(errors) < REL


def _fused_gradient(model: LlamaForCausalLM, layer: int) -> Tensor:
    """Gradients of queries, keys and values in the order of the public matrix."""
    attention = model.model.layers[layer].self_attn
    parts = [getattr(attention, f"{name}_proj").weight.grad for name in "qkv"]
    return grouped_heads(num_groups=2, head_dim=8).join(tuple(parts))


def test_greedy_tokens_are_the_references(arrays: dict[str, Tensor]) -> None:
    model = load_internlm2(FIXTURE, torch.float32)
    prompt, expected = arrays["greedy_prompt"], arrays["greedy_tokens"]
    told = model.generate(prompt, max_new_tokens=len(expected), do_sample=False)
    assert torch.equal(told[0, prompt.shape[1] :], expected)


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_dynamic_scaling_is_the_references(
    folder: Path, arrays: dict[str, Tensor], spelling: str
) -> None:
    scaling = {spelling: "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(_settings(rope_scaling=scaling)))
    model = load_internlm2(folder, torch.float32)
    long, short = arrays["long_input_ids"], arrays["input_ids"][:1]
    assert _relative(model(long).logits, arrays["dynamic_ntk_long_logits"]) < REL
    # A short text behind a long one is not scaled ...
    assert _relative(model(short).logits, arrays["logits"][:1]) < REL
    # ... but in the public code, which the reference ran after the long text, it stays scaled.
    stuck = load_internlm2(folder, torch.float32)
    stuck.model.rotary_emb.inv_freq = public_frequencies(stuck.config, longest_tokens=160)
    assert _relative(stuck(short).logits, arrays["dynamic_ntk_short_logits"]) < REL
    plain = load_internlm2(FIXTURE, torch.float32)
    assert _relative(plain(long).logits, arrays["dynamic_ntk_long_logits"]) > 1e-2


def test_layout_round_trip_is_bit_equal() -> None:
    public = load_file(FIXTURE / "model.safetensors")
    config = internlm2_to_llama_config(_settings())
    llama = from_public(public, config, where="here")
    back = to_public(llama, config, where="here")
    assert back.keys() == public.keys()
    assert all(torch.equal(back[name], public[name]) for name in public)
    assert llama.keys() == LlamaForCausalLM(config).state_dict().keys()


def test_fused_rows_are_grouped_by_key_head() -> None:
    # Two groups of two queries, a key and a value; one row a head, numbered as they are stored.
    query, key, value = grouped_heads(num_groups=2, head_dim=1).split(torch.arange(8.0)[:, None])
    assert query[:, 0].tolist() == [0, 1, 4, 5]
    assert (key[:, 0].tolist(), value[:, 0].tolist()) == ([2, 6], [3, 7])


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_written_directory_is_the_one_read(folder: Path, tmp_path: Path, scaling: object) -> None:
    (folder / "config.json").write_text(json.dumps(_settings(rope_scaling=scaling)))
    write_internlm2(load_internlm2(folder, torch.float32), tmp_path / "out", dtype=torch.float32)
    public = load_file(folder / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == public.keys()
    assert all(torch.equal(written[name], public[name]) for name in public)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = _settings(rope_scaling=scaling)
    del original["attn_implementation"]
    assert {key: config[key] for key in original} == original
    assert config["model_type"] == "internlm2"


def test_directory_is_recognised_by_its_content(folder: Path) -> None:
    family = detect(folder, LANGUAGE_FAMILIES)
    assert family is not None and family.name == "internlm2"
    assert detect(folder, FAMILIES) is None
    assert family.transformers_config(_settings()).num_key_value_heads == 2
    model = family.load(folder, torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in [*model.buffers(), *model.parameters()])
    (folder / "config.json").write_text(json.dumps(_settings(model_type="llama")))
    assert detect(folder, LANGUAGE_FAMILIES) is None


def test_a_llama_of_another_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.attention.wqkv.bias"] = torch.zeros(96)
    del tensors["output.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_internlm2(folder, torch.float32)
    assert "wqkv.bias" in str(caught.value.got)
    assert "output.weight" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"bias": True}, "bias"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling"),
    ],
)
def test_unknown_configs_are_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ModelError, match=where):
        internlm2_to_llama_config(_settings(**changes))


def test_a_llama_internlm2_cannot_hold_is_not_written() -> None:
    config = internlm2_to_llama_config(_settings())
    config.attention_bias = True
    with pytest.raises(ModelError, match="attention_bias"):
        llama_to_internlm2_config(config)


def test_real_size_is_the_public_one() -> None:
    config = internlm2_to_llama_config(PUBLIC_1_8B)
    model = built_on_meta(lambda: LlamaForCausalLM(config))
    assert sum(p.numel() for p in model.parameters()) == 1_889_110_016
    public = to_public(model.state_dict(), config, where="meta")
    assert tuple(public["model.layers.23.attention.wqkv.weight"].shape) == (4096, 2048)
    assert len(public) == 3 + 24 * 7
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}


@torch.no_grad()
def test_it_is_an_ordinary_language_part_on_packed_rows(arrays: dict[str, Tensor]) -> None:
    model = load_internlm2(FIXTURE, torch.float32)
    alone = [
        model(ids[None]).logits[0] for ids in (arrays["input_ids"][0], arrays["input_ids"][1, :15])
    ]
    model.config._attn_implementation = register_packed_attention()
    check_config(model.config, where="internlm2")
    check_model(model, where="internlm2")
    ids = torch.cat([arrays["input_ids"][0], arrays["input_ids"][1, :15]])[None]
    packed = model(
        ids,
        attention_mask=packing_mask(torch.tensor([0, 21, 36]), 21),
        position_ids=torch.cat([torch.arange(21), torch.arange(15)])[None],
    )
    # The same sums in another order.
    torch.testing.assert_close(packed.logits[0], torch.cat(alone), rtol=1e-5, atol=1e-5)
