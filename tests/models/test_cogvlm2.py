"""CogVLM2 against the reference dump, against Llama, and at its real size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cogvlm2_case import FIXTURE, REL, load_arrays, load_config, load_model, relative_error
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vistune.errors import ModelError
from vistune.models.cogvlm2 import (
    CogVLM2Config,
    CogVLM2ForConditionalGeneration,
    CogVLM2VisionConfig,
    image_defaults,
)
from vistune.models.cogvlm2.rotary import inverse_frequencies, rotary_tables
from vistune.models.cogvlm2.tokens import position_ids, vision_expert_mask
from vistune.models.cogvlm2.vision import VisionBlock
from vistune.models.families.files import built_on_meta


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return load_arrays()


@pytest.fixture(scope="module")
def real_size() -> CogVLM2ForConditionalGeneration:
    return built_on_meta(lambda: CogVLM2ForConditionalGeneration(CogVLM2Config()))


class TestParity:
    def test_positions_and_expert_mask_are_the_references(self, arrays: dict[str, Tensor]) -> None:
        num_slots = load_config().num_image_tokens
        is_image = arrays["token_type_ids"] == 1
        mask = arrays["attention_mask"]
        masked = position_ids(is_image, num_image_tokens=num_slots, attention_mask_BT=mask)
        assert torch.equal(masked, arrays["position_ids"])
        plain = position_ids(is_image, num_image_tokens=num_slots)
        assert torch.equal(plain, arrays["position_ids_nomask"])
        experts = vision_expert_mask(is_image, num_image_tokens=num_slots)
        assert torch.equal(experts.long(), arrays["vision_expert_mask"])

    def test_left_padded_positions_are_the_references(self, arrays: dict[str, Tensor]) -> None:
        # The reference pads the 14 real tokens of row 1 with three tokens on the left.
        is_image = F.pad(arrays["token_type_ids"][1:, :14], (3, 0)) == 1
        mask = F.pad(arrays["attention_mask"][1:, :14], (3, 0))
        ours = position_ids(is_image, num_image_tokens=6, attention_mask_BT=mask)
        assert torch.equal(ours, arrays["left_pad_position_ids"])

    @pytest.mark.parametrize("rotary_precision", ["fp32", "public"])
    def test_forward_and_backward_are_the_references(
        self, arrays: dict[str, Tensor], rotary_precision: str
    ) -> None:
        model = load_model(rotary_precision=rotary_precision)
        features = model.model.image_features(arrays["images"])
        assert relative_error(features, arrays["vision_features"]) < REL
        out = model(
            arrays["input_ids"],
            pixel_values=arrays["images"],
            attention_mask=arrays["attention_mask"],
        )
        kept = arrays["attention_mask"].bool()
        assert relative_error(out.logits[kept], arrays["logits"][kept]) < REL
        assert relative_error(out.hidden_states[0][kept], arrays["hidden_last"][kept]) < REL
        logits, labels = out.logits[:, :-1].flatten(0, 1), arrays["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=-100)
        assert relative_error(loss, arrays["loss"]) < REL
        loss.backward()
        attention = model.model.layers[1].self_attn
        for parameter, name in (
            (attention.vision_expert_query_key_value.weight, "grad_qkv_vision"),
            (model.model.vision.boi, "grad_boi"),
            (model.model.embed_tokens.weight, "grad_embed"),
        ):
            assert parameter.grad is not None
            assert relative_error(parameter.grad, arrays[name]) < REL, name

    @torch.no_grad()
    def test_text_alone_is_the_references_and_llamas(self, arrays: dict[str, Tensor]) -> None:
        model, text = load_model(), arrays["input_ids"][:1, 7:]
        logits = model(text).logits
        assert relative_error(logits, arrays["text_only_logits"]) < REL
        llama = _language_half(model)
        assert relative_error(logits, llama(text).logits) < REL

    def test_greedy_tokens_are_the_references(self, arrays: dict[str, Tensor]) -> None:
        model = load_model()
        expected = arrays["greedy_tokens"]
        told = model.generate(
            arrays["input_ids"][:1],
            pixel_values=arrays["images"][:1],
            max_new_tokens=len(expected),
            do_sample=False,
        )
        assert torch.equal(told[0, -len(expected) :], expected)


def _language_half(model: CogVLM2ForConditionalGeneration) -> LlamaForCausalLM:
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_multi_query_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    ours, theirs = model.state_dict(), {}
    for name in llama.state_dict():
        layer, _, part = name.partition(".self_attn.")
        if part in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            fused = ours[f"{layer}.self_attn.language_expert_query_key_value.weight"]
            query, key, value = fused.split([64, 16, 16])
            theirs[name] = {"q": query, "k": key, "v": value}[part[0]]
        elif part == "o_proj.weight":
            theirs[name] = ours[f"{layer}.self_attn.language_expert_dense.weight"]
        else:
            theirs[name] = ours[name.replace(".mlp.", ".mlp.language_mlp.")]
    llama.load_state_dict(theirs, strict=True)
    return llama


class TestArchitecture:
    def test_blocks_norm_what_a_sublayer_returns(self) -> None:
        # The trap of this tower: the same names with the norm in front compute something else.
        config = CogVLM2VisionConfig(
            hidden_size=8, intermediate_size=16, num_heads=2, num_positions=17, image_size=56
        )
        block = VisionBlock(config)
        x = torch.randn(1, 5, 8)
        attended = x + block.input_layernorm(block.attention(x))
        expected = attended + block.post_attention_layernorm(block.mlp(attended))
        torch.testing.assert_close(block(x), expected)
        pre_norm = x + block.attention(block.input_layernorm(x))
        assert not torch.allclose(attended, pre_norm, atol=1e-2)

    @torch.no_grad()
    def test_no_expert_computes_a_token_of_the_other(self, arrays: dict[str, Tensor]) -> None:
        model, rows = load_model(), dict[str, int]()

        def count(name: str) -> None:
            def hook(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                rows[name] = inputs[0].shape[0]

            model.get_submodule(name).register_forward_hook(hook)

        for part in (
            "self_attn.{}_expert_query_key_value",
            "mlp.{}_mlp",
            "self_attn.{}_expert_dense",
        ):
            for expert in ("language", "vision"):
                count("model.layers.0." + part.format(expert))
        model(
            arrays["input_ids"],
            pixel_values=arrays["images"],
            attention_mask=arrays["attention_mask"],
        )
        num_vision = int(arrays["vision_expert_mask"].sum())
        num_tokens = arrays["input_ids"].numel()
        assert {n for name, n in rows.items() if "vision" in name} == {num_vision}
        assert {n for name, n in rows.items() if "language" in name} == {num_tokens - num_vision}
        rows.clear()
        model(arrays["input_ids"][:, 7:10])
        assert not any("vision" in name for name in rows)

    def test_public_rotary_shares_angles_in_bfloat16(self) -> None:
        config = load_config(rotary_precision="public")
        stored = inverse_frequencies(config).bfloat16()
        cos, _ = rotary_tables(
            torch.arange(2048)[None], stored, config=config, dtype=torch.bfloat16
        )
        _, sin = rotary_tables(
            torch.arange(2048)[None], stored, config=config, dtype=torch.bfloat16
        )
        assert cos.dtype == torch.bfloat16
        # 257 positions up to 256, then steps of 2, 4 and 8: 257 + 3 * 128.
        assert len(torch.unique(torch.cat([cos, sin], -1)[0, :, 0], dim=0)) == 641
        exact = load_config()
        cos, sin = rotary_tables(
            torch.arange(2048)[None], stored, config=exact, dtype=torch.bfloat16
        )
        assert cos.dtype == torch.float32
        assert len(torch.unique(torch.cat([cos, sin], -1)[0, :, 0], dim=0)) == 2048

    def test_half_precision_stays_close(self, arrays: dict[str, Tensor]) -> None:
        # bfloat16 keeps 8 bits, 2^-8 = 0.004 a rounding; three layers, residuals in bfloat16.
        model = load_model().to(torch.bfloat16)
        out = model(
            arrays["input_ids"],
            pixel_values=arrays["images"],
            attention_mask=arrays["attention_mask"],
        )
        kept = arrays["attention_mask"].bool()
        assert out.logits.dtype == torch.bfloat16
        assert relative_error(out.logits[kept].float(), arrays["logits"][kept]) < 0.05


class TestRealSize:
    def test_parameter_counts_are_the_public_ones(
        self, real_size: CogVLM2ForConditionalGeneration
    ) -> None:
        count = dict.fromkeys(("tower", "conv", "glu", "marks", "experts", "language"), 0)
        for name, parameter in real_size.named_parameters():
            if name.startswith(("model.vision.patch_embedding", "model.vision.transformer")):
                part = "tower"
            elif name.startswith("model.vision.conv"):
                part = "conv"
            elif name.startswith("model.vision.linear_proj"):
                part = "glu"
            elif name.startswith("model.vision."):
                part = "marks"
            else:
                part = "experts" if "vision_" in name else "language"
            count[part] += parameter.numel()
        assert count == {
            "tower": 4_296_961_536,
            "conv": 12_846_848,
            "glu": 183_508_992,
            "marks": 8_192,
            "experts": 6_979_518_464,
            "language": 8_030_261_248,
        }
        assert sum(count.values()) == 19_503_105_280
        block = real_size.model.vision.transformer.layers[0]
        assert sum(p.numel() for p in block.parameters()) == 67_926_784

    def test_roles_cover_every_parameter(self, real_size: CogVLM2ForConditionalGeneration) -> None:
        count = dict.fromkeys(("vision", "connector", "language", "head"), 0)
        for name, parameter in real_size.named_parameters():
            count[real_size.module_map.role_of(name)] += parameter.numel()
        assert count == {
            "vision": 4_296_961_536,
            "connector": 12_846_848 + 183_508_992 + 8_192,
            "language": 8_030_261_248 + 6_979_518_464 - 128256 * 4096,
            "head": 128256 * 4096,
        }

    def test_state_dict_is_the_public_table(
        self, real_size: CogVLM2ForConditionalGeneration
    ) -> None:
        ours = {name: tuple(tensor.shape) for name, tensor in real_size.state_dict().items()}
        table = dict(_public_table())
        assert len(table) == 1221
        assert ours == table
        # The public index: bfloat16 throughout.
        assert sum(2 * t.numel() for t in real_size.state_dict().values()) == 39_006_214_656

    def test_image_takes_2306_tokens(self, real_size: CogVLM2ForConditionalGeneration) -> None:
        assert real_size.grid.num_tokens(1344, 1344) == 2306
        assert real_size.config.num_image_tokens == 2306
        assert real_size.image_token_id == 128002
        assert image_defaults(real_size.config).size_px == 1344


def _public_table() -> Iterator[tuple[str, tuple[int, ...]]]:
    width, wide, heads, tower, tower_wide = 4096, 14336, 6144, 1792, 15360
    yield from {
        "model.embed_tokens.weight": (128256, width),
        "lm_head.weight": (128256, width),
        "model.norm.weight": (width,),
        "model.vision.boi": (1, 1, width),
        "model.vision.eoi": (1, 1, width),
        "model.vision.patch_embedding.cls_embedding": (1, tower),
        "model.vision.patch_embedding.position_embedding.weight": (9217, tower),
        "model.vision.patch_embedding.proj.weight": (tower, 3, 14, 14),
        "model.vision.patch_embedding.proj.bias": (tower,),
        "model.vision.conv.weight": (tower, tower, 2, 2),
        "model.vision.conv.bias": (tower,),
        "model.vision.linear_proj.linear_proj.weight": (width, tower),
        "model.vision.linear_proj.norm1.weight": (width,),
        "model.vision.linear_proj.norm1.bias": (width,),
        "model.vision.linear_proj.gate_proj.weight": (wide, width),
        "model.vision.linear_proj.dense_h_to_4h.weight": (wide, width),
        "model.vision.linear_proj.dense_4h_to_h.weight": (width, wide),
    }.items()
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (width,)
        yield prefix + "post_attention_layernorm.weight", (width,)
        yield prefix + "self_attn.rotary_emb.inv_freq", (64,)
        yield prefix + "self_attn.vision_expert_query_key_value.bias", (heads,)
        for expert in ("language", "vision"):
            yield prefix + f"self_attn.{expert}_expert_query_key_value.weight", (heads, width)
            yield prefix + f"self_attn.{expert}_expert_dense.weight", (width, width)
            yield prefix + f"mlp.{expert}_mlp.gate_proj.weight", (wide, width)
            yield prefix + f"mlp.{expert}_mlp.up_proj.weight", (wide, width)
            yield prefix + f"mlp.{expert}_mlp.down_proj.weight", (width, wide)
    for layer in range(63):
        prefix = f"model.vision.transformer.layers.{layer}."
        for name, shape in (
            ("attention.query_key_value", (3 * tower, tower)),
            ("attention.dense", (tower, tower)),
            ("mlp.fc1", (tower_wide, tower)),
            ("mlp.fc2", (tower, tower_wide)),
        ):
            yield f"{prefix}{name}.weight", shape
            yield f"{prefix}{name}.bias", shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (tower,)
            yield f"{prefix}{name}.bias", (tower,)


class TestConfig:
    def test_public_config_round_trips(self) -> None:
        config = load_config()
        again = CogVLM2Config(**json.loads(config.to_json_string(use_diff=False)))
        assert again.to_dict() == config.to_dict()
        assert isinstance(again.vision_config, CogVLM2VisionConfig)
        assert (again.rope_theta, again.rotary_precision) == (500000.0, "fp32")

    @pytest.mark.parametrize(
        ("changes", "where"),
        [
            ({"vision_config": {"image_size": 56}}, "num_positions"),
            ({"vision_config": {"image_size": 42, "num_positions": 10}}, "image_size"),
            ({"vision_config": {"num_heads": 15}}, "num_heads"),
            ({"vision_config": {"dropout_prob": 0.1}}, "dropout_prob"),
            ({"num_multi_query_heads": 5}, "num_multi_query_heads"),
            ({"num_attention_heads": 33}, "num_attention_heads"),
            ({"rotary_precision": "fp8"}, "rotary_precision"),
            ({"template_version": "llama3"}, "template_version"),
            ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ],
    )
    def test_impossible_shapes_are_refused(self, changes: dict[str, object], where: str) -> None:
        with pytest.raises(ModelError, match=where):
            CogVLM2Config(**changes)

    def test_from_pretrained_reads_what_save_pretrained_wrote(
        self, tmp_path: Path, arrays: dict[str, Tensor]
    ) -> None:
        model = load_model()
        model.save_pretrained(tmp_path)
        with safe_open(FIXTURE / "model.safetensors", "pt") as public:
            names = set(public.keys())
        with safe_open(tmp_path / "model.safetensors", "pt") as saved:
            assert set(saved.keys()) == names
        again, report = CogVLM2ForConditionalGeneration.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_new_weights_are_finite_and_not_zero(self) -> None:
        torch.manual_seed(0)
        model = CogVLM2ForConditionalGeneration(load_config())
        assert model.model.vision.boi.abs().sum() > 0
        assert model.model.vision.patch_embedding.cls_embedding.abs().sum() > 0
        assert all(torch.isfinite(p).all() for p in model.parameters())
