"""Rotary scaling by length: every text by its own length, in batches, packed rows and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_parts import tokenizer, write_tower
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from vistune.models.attention import packing_mask, register_packed_attention
from vistune.models.build import build_model
from vistune.models.compose import ComposedVLM
from vistune.models.facts import describe
from vistune.models.families.internlm2 import load_internlm2
from vistune.models.fused.trunk import fuse
from vistune.models.language.internlm2 import public_frequencies
from vistune.models.language.rotary import (
    DynamicRotaryEmbedding,
    LongRotaryEmbedding,
    settle_rotary,
)
from vistune.recipe import ModelConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "internlm2"
LIMIT = 128
# Two implementations round sums of some hundred terms differently; other frequencies are off by
# more than 1e-2.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("internlm2")
    shutil.copy(FIXTURE / "model.safetensors", made)
    settings = json.loads((FIXTURE / "config.json").read_text())
    assert settings["max_position_embeddings"] == LIMIT
    settings["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (made / "config.json").write_text(json.dumps(settings))
    tokenizer().save_pretrained(made)
    return made


def loaded(folder: Path) -> LlamaForCausalLM:
    return load_internlm2(folder, torch.float32)


def text(num_tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randint(3, 320, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


class _OfLengths(nn.Module):
    """The public code's frequencies at lengths given for every position."""

    def __init__(self, model: LlamaForCausalLM, lengths: list[int]) -> None:
        super().__init__()
        self.frequencies = torch.stack(
            [public_frequencies(model.config, longest_tokens=length) for length in lengths]
        )

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [20, LIMIT, LIMIT + 1, 160, 500])
def test_tables_are_the_public_ones(folder: Path, num_tokens: int) -> None:
    model = loaded(folder)
    assert isinstance(model.model.rotary_emb, DynamicRotaryEmbedding)
    positions = torch.arange(num_tokens)[None]
    found = model.model.rotary_emb(torch.zeros(1, 1, 1), positions)
    expected = _OfLengths(model, [num_tokens] * num_tokens)(torch.zeros(1), positions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        if num_tokens <= LIMIT:
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_no_text_depends_on_another(folder: Path) -> None:
    model, middle, short = loaded(folder), text(140, seed=1), text(30, seed=2)
    alone = [loaded(folder)(ids).logits for ids in (middle, short)]
    longer = model(text(200)).logits
    behind = [model(ids).logits for ids in (middle, short)]
    assert all(torch.equal(a, b) for a, b in zip(alone, behind, strict=True))
    assert torch.equal(model(text(200)).logits, longer)
    # Padded on the left to the longer text's length, in one batch with it.
    ids = torch.cat((text(200), torch.cat((text(60), middle), dim=1)))
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(batch[:1], longer, **CLOSE)
    torch.testing.assert_close(batch[1:, 60:], alone[0], **CLOSE)


@torch.no_grad()
def test_packed_rows_give_what_each_text_gives(folder: Path) -> None:
    model = loaded(folder)
    texts = [text(30, seed=3), text(200), text(140, seed=1)]
    alone = torch.cat([model(ids).logits[0] for ids in texts])
    model.config._attn_implementation = register_packed_attention()
    starts = torch.tensor([0, 30, 230, 370])
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in texts])[None]
    packed = model(
        torch.cat(texts, dim=1), attention_mask=packing_mask(starts, 200), position_ids=positions
    ).logits[0]
    torch.testing.assert_close(packed, alone, **CLOSE)
    trunk = fuse(model.model, device=torch.device("cpu"))
    hidden = trunk.hidden_states(
        model.model.embed_tokens(torch.cat(texts, dim=1)),
        positions,
        cu_seqlens=starts.int(),
        max_seqlen=200,
    )
    torch.testing.assert_close(model.lm_head(hidden)[0], alone, **CLOSE)


@torch.no_grad()
def test_answers_beyond_the_limit_are_the_public_codes(folder: Path) -> None:
    model, prompt = loaded(folder), text(LIMIT - 8)
    model(text(300))  # what was read before says nothing
    told = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert told.shape[1] == LIMIT + 16
    # A key is turned by the length at which it was said: the prompt's by the prompt's.
    first = prompt.shape[1]
    lengths = [max(first, place + 1) for place in range(told.shape[1])]
    public = LlamaForCausalLM(model.config).eval()
    public.load_state_dict(model.state_dict())
    public.model.rotary_emb = _OfLengths(model, lengths)
    scores = public(told, use_cache=False).logits[0, first - 1 : -1]
    assert torch.equal(scores.argmax(-1), told[0, first:])


def test_composed_models_have_it_wherever_they_come_from(folder: Path, tmp_path: Path) -> None:
    parts = ModelConfig.model_validate(
        {
            "vision_tower": {"path": str(write_tower(tmp_path / "tower"))},
            "language_model": {"path": str(folder)},
        }
    )
    model = build_model(parts, describe(parts), seed=1, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = ComposedVLM.from_pretrained(tmp_path / "saved")
    for composed in (model, again, again.bfloat16()):
        rotary = composed.language_model.model.rotary_emb
        assert isinstance(rotary, DynamicRotaryEmbedding)
        assert torch.equal(rotary.inv_freq, loaded(folder).model.rotary_emb.inv_freq)
    settle_rotary(model.language_model)
    assert model.language_model.model.rotary_emb is not rotary


def test_other_scalings_are_left_alone() -> None:
    model = load_internlm2(FIXTURE, torch.float32)
    before = model.model.rotary_emb
    settle_rotary(model)
    assert model.model.rotary_emb is before and not isinstance(before, DynamicRotaryEmbedding)


def long_phi3(*, partial: float = 1.0) -> Phi3ForCausalLM:
    width = int(16 * partial) // 2
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4 * LIMIT,
        original_max_position_embeddings=LIMIT, partial_rotary_factor=partial, pad_token_id=0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(width)],
            "long_factor": [2.0 + i for i in range(width)],
        },
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_longrope_takes_each_texts_own_set_of_frequencies(partial: float) -> None:
    texts = [text(30, seed=3), text(200), text(LIMIT, seed=1), text(LIMIT + 1, seed=2)]
    theirs = torch.cat([long_phi3(partial=partial)(ids).logits[0] for ids in texts])
    model = long_phi3(partial=partial)
    settle_rotary(model)
    assert isinstance(model.model.rotary_emb, LongRotaryEmbedding)
    alone = torch.cat([model(ids).logits[0] for ids in texts])
    assert torch.equal(alone, theirs)
    lengths = [ids.shape[1] for ids in texts]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    packed = {}
    for name, one in (("ours", model), ("theirs", long_phi3(partial=partial))):
        one.config._attn_implementation = register_packed_attention()
        packed[name] = one(
            torch.cat(texts, dim=1),
            attention_mask=packing_mask(starts, max(lengths)),
            position_ids=positions,
        ).logits[0]
    torch.testing.assert_close(packed["ours"], alone, **CLOSE)
    assert not torch.allclose(packed["theirs"], alone, **CLOSE)  # what this is for
