from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import VOCAB, packed_logits, parts, row, tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vistune.errors import ModelError, WeightsError
from vistune.models.build import build_model
from vistune.models.facts import describe
from vistune.models.language.decoder import check_model
from vistune.recipe import ModelConfig


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def changed(
    shelf: Path, tmp_path: Path, part: str, change: Callable[[dict[str, Tensor]], None]
) -> ModelConfig:
    """The parts with the weights of one of them changed."""
    config = parts(shelf)
    source = config.vision_tower if part == "vision_tower" else config.language_model
    assert source is not None
    folder = tmp_path / part
    shutil.copytree(source.path, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig.model_validate(config.model_dump() | {part: {"path": str(folder)}})


def refusal(config: ModelConfig) -> str:
    with pytest.raises(WeightsError) as caught:
        build_model(config, describe(config), seed=0, dtype=torch.float32)
    return str(caught.value)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[next(key for key in state if key.endswith(name))]

    return change


def shrink(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        key = next(key for key in state if key.endswith(name))
        state[key] = state[key][:-1].contiguous()

    return change


def add(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = torch.zeros(3)

    return change


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_weights_that_do_not_fit(shelf: Path, tmp_path: Path, part: str) -> None:
    name = "layers.0.self_attn.q_proj.weight"
    for index, (change, counted, named) in enumerate(
        [
            (drop(name), "1 missing", name),
            (shrink(name), "1 of another shape", name),
            (add("rogue.weight"), "1 unexpected", "rogue.weight"),
        ]
    ):
        said = refusal(changed(shelf, tmp_path / str(index), part, change))
        assert counted in said and named in said


def test_head_missing_without_tie(shelf: Path, tmp_path: Path) -> None:
    assert "lm_head.weight" in refusal(
        changed(shelf, tmp_path, "language_model", drop("lm_head.weight"))
    )


def test_cut_layers_may_be_missing_and_may_be_there(shelf: Path, tmp_path: Path) -> None:
    def cut(state: dict[str, Tensor]) -> None:
        for key in list(state):
            if "layers.2." in key or "post_layernorm" in key:
                del state[key]

    config = changed(shelf, tmp_path, "vision_tower", cut)
    whole = parts(shelf)
    models = [build_model(c, describe(c), seed=0, dtype=torch.float32) for c in (config, whole)]
    states = [model.vision_tower.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any("layers.2." in name or "post_layernorm" in name for name in states[0])


def test_damaged_and_absent_weight_files(shelf: Path, tmp_path: Path) -> None:
    config = changed(shelf, tmp_path, "language_model", lambda state: None)
    assert config.language_model is not None
    file = Path(config.language_model.path) / "model.safetensors"
    facts = describe(config)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        build_model(config, facts, seed=0, dtype=torch.float32)
    file.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        build_model(config, facts, seed=0, dtype=torch.float32)


def test_dtype_and_seed(shelf: Path) -> None:
    config = parts(shelf)
    facts = describe(config)
    half = build_model(config, facts, seed=1, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not half.training
    states = [
        build_model(config, facts, seed=s, dtype=torch.float32).connector.state_dict()
        for s in (1, 1, 2)
    ]
    assert torch.equal(states[0]["0.weight"], states[1]["0.weight"])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_casting_equals_loading_in_that_format(shelf: Path) -> None:
    config = parts(shelf, text="gemma")
    facts = describe(config)
    loaded = build_model(config, facts, seed=0, dtype=torch.bfloat16)
    cast = build_model(config, facts, seed=0, dtype=torch.float32).to(torch.bfloat16)
    frequencies = cast.language_model.model.rotary_emb.inv_freq
    assert frequencies.dtype is torch.float32
    assert not torch.equal(frequencies, frequencies.bfloat16().float())
    made = row(facts, num_text=(60,), with_image=(True,))
    assert torch.equal(packed_logits(loaded, made)[0], packed_logits(cast, made)[0])


def test_sharded_and_bin_weights(shelf: Path, tmp_path: Path) -> None:
    config = parts(shelf)
    assert config.language_model is not None
    expected = LlamaForCausalLM.from_pretrained(config.language_model.path)
    shards, pickled = tmp_path / "shards", tmp_path / "bin"
    expected.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    pickled.mkdir()
    expected.config.save_pretrained(pickled)
    torch.save(expected.state_dict(), pickled / "pytorch_model.bin")
    for folder in (shards, pickled):
        tokenizer().save_pretrained(folder)
        other = ModelConfig.model_validate(
            config.model_dump() | {"language_model": {"path": str(folder)}}
        )
        model = build_model(other, describe(other), seed=0, dtype=torch.float32)
        found = model.language_model.state_dict()
        assert all(torch.equal(found[n], t) for n, t in expected.state_dict().items())


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "blk.0.attn_norm.weight",
    "post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "mlp.down_proj.weight": "blk.0.ffn_down.weight",
}
"""Names of a Llama of one layer -> those of a GGUF file."""


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """Writes a Llama of one layer of width 32 with two heads, as llama.cpp would."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        public = _GGUF_NAMES[name.removeprefix("model.layers.0.")]
        array = tensor.numpy()
        if public in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
            # llama.cpp keeps the halves of a rotary pair side by side.
            array = array.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(public, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any) -> None:
    """A byte-level one with two merges, filled up to the width of the head."""
    known = tokenizer().convert_ids_to_tokens(range(259))
    pieces = [*known, "ab", "cd", *(f"[{i}]" for i in range(261, VOCAB))]
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_gguf_weights(shelf: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    write_gguf(tmp_path / "m.gguf", model)
    config = ModelConfig.model_validate(
        parts(shelf).model_dump()
        | {"language_model": {"path": str(tmp_path), "gguf_file": "m.gguf"}}
    )
    facts = describe(config)
    built = build_model(config, facts, seed=0, dtype=torch.float32)
    ids = torch.tensor([[1, 20, 30, 40]])
    torch.testing.assert_close(
        built(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )
    assert len(packed_logits(built, row(facts))) == 3


def test_decoder_with_attention_of_its_own_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        _supports_attention_backend = False

    tiny = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ModelError, match="brings its own attention"):
        check_model(Odd(tiny), where="x")


def test_unproved_decoder_that_leaks_is_refused() -> None:
    class LeakyConfig(LlamaConfig):
        model_type = "leaky"

    class Leaky(LlamaForCausalLM):
        """Mixes neighbouring positions outside attention, as a convolution would."""

        def get_input_embeddings(self):  # type: ignore[no-untyped-def]
            return self.model.embed_tokens

    from vistune.models.attention import register_packed_attention

    model = Leaky(
        LeakyConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
            attn_implementation=register_packed_attention(),
        )
    )
    check_model(model, where="x")  # as it is, it does not leak
    model.model.norm.register_forward_hook(lambda _, __, out: out + out.roll(1, dims=1))
    with pytest.raises(ModelError, match="other results for a packed row"):
        check_model(model, where="x")
