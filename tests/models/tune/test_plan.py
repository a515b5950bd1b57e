from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_parts import composed, packed_logits, row

from vistune.checkpoint.merge import merge_adapters
from vistune.errors import ModelError, WeightsError
from vistune.models.compose import ComposedVLM
from vistune.models.contract import ModuleMap
from vistune.models.facts import ModelFacts
from vistune.models.tune import Tuning, apply_tuning, load_trainable, trainable_state
from vistune.models.tune.lora import adapter_layers
from vistune.recipe import TrainConfig, TuneConfig
from vistune.types import ROLES

TRAIN = TrainConfig(steps=1, lr=1e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def tuned(shelf: Path, seed: int = 0, **tune: object) -> tuple[ComposedVLM, ModelFacts, Tuning]:
    model, facts = composed(shelf)
    return model, facts, apply_tuning(model, TuneConfig.model_validate(tune), seed=seed)


def trained_roles(model: ComposedVLM) -> set[str]:
    return {model.module_map.role_of(n) for n, p in model.named_parameters() if p.requires_grad}


def test_default_trains_the_connector_alone(shelf: Path) -> None:
    model, _, tuning = tuned(shelf)
    assert trained_roles(model) == {"connector"}
    assert tuning.num_trainable == sum(p.numel() for p in model.connector.parameters())


@pytest.mark.parametrize("role", ROLES)
def test_each_role_trains_alone(shelf: Path, role: str) -> None:
    model, _, _ = tuned(shelf, **({"connector": {"mode": "freeze"}} | {role: {"mode": "full"}}))
    assert trained_roles(model) == {role}


@pytest.mark.parametrize("extra", [{}, {"rslora": True}, {"dora": True}])
def test_lora_stays_inside_its_role(shelf: Path, extra: dict[str, bool]) -> None:
    lora = {"mode": "lora", "rank": 4, "alpha": 8.0, **extra}
    model, facts, _ = tuned(shelf, language=lora)
    made = row(facts)
    base, _ = composed(shelf)
    for a, b in zip(packed_logits(base, made), packed_logits(model, made), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # the second factor starts at 0
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora" in n]
    assert len(names) == 2 * 7 * (3 if extra.get("dora") else 2)  # layers x linears x factors
    assert all(n.startswith("language_model.model.") for n in names)
    assert trained_roles(model) == {"connector", "language"}


def test_lora_scales(shelf: Path) -> None:
    for extra, scale in (({}, 32 / 16), ({"rslora": True}, 32 / 16**0.5)):
        model, _, _ = tuned(shelf, language={"mode": "lora", "rank": 16, "alpha": 32.0, **extra})
        for layer in adapter_layers(model).values():
            assert layer.scaling["default"] == pytest.approx(scale)


def test_lora_in_the_vision_tower(shelf: Path) -> None:
    model, _, _ = tuned(shelf, vision={"mode": "lora", "rank": 2, "targets": ("q_proj", "v_proj")})
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora" in n]
    assert len(names) == 2 * 2 * 2
    assert all(n.startswith("vision_tower.") for n in names)


def test_lora_seed_decides_the_first_factor(shelf: Path) -> None:
    lora = {"mode": "lora", "rank": 2}
    states = [trainable_state(tuned(shelf, seed=s, language=lora)[0]) for s in (1, 1, 2)]
    name = "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_target_that_matches_nothing(shelf: Path) -> None:
    lora = {"mode": "lora", "targets": ("q_proj", "fc1")}  # fc1 is the vision tower's
    with pytest.raises(ModelError) as caught:
        tuned(shelf, language=lora)
    assert "fc1" in str(caught.value) and "down_proj" in str(caught.value)
    with pytest.raises(ModelError, match="lm_head"):
        tuned(shelf, language={"mode": "lora", "targets": ("lm_head",)})


def test_tied_head_has_no_role_of_its_own(shelf: Path) -> None:
    model, _ = composed(shelf, text="llama_tied")
    assert model.module_map.head == ()
    tuning = apply_tuning(model, TuneConfig(), seed=0)
    assert [r.mode for r in tuning.table() if r.role == "head"] == ["absent"]
    with pytest.raises(ModelError, match="tied"):
        apply_tuning(model, TuneConfig.model_validate({"head": {"mode": "full"}}), seed=0)


def test_groups_cover_every_trained_weight_once(shelf: Path) -> None:
    model, _, tuning = tuned(
        shelf,
        language={"mode": "full", "lr": 2e-5},
        head={"mode": "full", "weight_decay": 0.0},
    )
    groups = tuning.groups(TRAIN)
    named = [name for group in groups for name in group.names]
    assert sorted(named) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert group.lr == (2e-5 if group.role == "language" else 1e-3)
        if group.weight_decay:
            assert all(parameters[n].dim() >= 2 for n in group.names)
    assert {(g.role, g.weight_decay) for g in groups} == {
        ("connector", 0.1),
        ("connector", 0.0),
        ("language", 0.1),
        ("language", 0.0),
        ("head", 0.0),
    }


def test_table_adds_up(shelf: Path) -> None:
    model, _, tuning = tuned(shelf, language={"mode": "lora", "rank": 2})
    rows = tuning.table()
    roles = [r for r in rows if r.depth == 0]
    assert [r.role for r in roles] == list(ROLES)
    assert sum(r.num_total for r in roles) == sum(p.numel() for p in model.parameters())
    assert sum(r.num_trainable for r in roles) == tuning.num_trainable
    for r in roles:
        inner = [i for i in rows if i.role == r.role and i.depth == 1]
        assert not inner or sum(i.num_total for i in inner) == r.num_total


def test_trained_weights_are_fp32_and_frozen_ones_are_not(shelf: Path) -> None:
    model, _ = composed(shelf)
    model.to(torch.bfloat16)
    apply_tuning(model, TuneConfig.model_validate({"language": {"mode": "lora"}}), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_trainable_state_round_trip(shelf: Path) -> None:
    lora = {"mode": "lora", "rank": 2, "dora": True}
    model, facts, _ = tuned(shelf, language=lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    again, _, _ = tuned(shelf, seed=9, language=lora)
    load_trainable(again, trainable_state(model))
    made = row(facts)
    for a, b in zip(packed_logits(model, made), packed_logits(again, made), strict=True):
        assert torch.equal(a, b)


def test_load_trainable_is_strict(shelf: Path) -> None:
    model, _, _ = tuned(shelf)
    state = trainable_state(model)
    for broken in (
        {k: v for k, v in state.items() if k != "connector.0.bias"},
        {**state, "connector.9.bias": torch.zeros(1)},
        {**state, "connector.0.bias": torch.zeros(5)},
    ):
        with pytest.raises(WeightsError, match=r"connector\.\d\.bias"):
            load_trainable(model, broken)


def test_roles_that_share_their_root(shelf: Path) -> None:
    """Some models have no one module per role; adapters then go into the whole model, twice."""

    class Shared(ComposedVLM):
        @property
        def module_map(self) -> ModuleMap:
            return ModuleMap(
                ("vision_tower.encoder", "vision_tower.embeddings", "vision_tower.pre_layrnorm"),
                ("connector",),
                (
                    "language_model.model.layers",
                    "language_model.model.embed_tokens",
                    "language_model.model.norm",
                ),
                ("language_model.lm_head",),
            )

    model, facts = composed(shelf)
    model.__class__ = Shared
    made = row(facts)
    before = packed_logits(model, made)
    lora = {"mode": "lora", "rank": 2, "targets": ("q_proj",)}
    tune = TuneConfig.model_validate({"language": lora, "vision": lora | {"rank": 3}})
    apply_tuning(model, tune, seed=0)
    ranks = {n: layer.r["default"] for n, layer in adapter_layers(model).items()}
    assert sorted(ranks.values()) == [2, 2, 3, 3]
    assert all((rank == 3) == n.startswith("vision_tower") for n, rank in ranks.items())
    for a, b in zip(before, packed_logits(model, made), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert merge_adapters(model) == 4
    with pytest.raises(ModelError, match="already carries adapters"):
        for _ in range(2):
            apply_tuning(model, tune, seed=0)


def test_unreached_weights_stay_frozen(tmp_path: Path) -> None:
    model, _ = composed(tmp_path, vision="dinov2")
    apply_tuning(model, TuneConfig.model_validate({"vision": {"mode": "full"}}), seed=0)
    frozen = [n for n, p in model.vision_tower.named_parameters() if not p.requires_grad]
    assert frozen == ["embeddings.mask_token"]


def test_lora_in_some_layers(shelf: Path) -> None:
    lora = {"mode": "lora", "rank": 2, "targets": ["q_proj", "up_proj"], "layers": [1]}
    model, _, _ = tuned(shelf, language=lora)
    inside = "language_model.model.layers.1"
    expected = {f"{inside}.self_attn.q_proj", f"{inside}.mlp.up_proj"}
    assert adapter_layers(model).keys() == expected
    model, _, _ = tuned(shelf, vision={"mode": "lora", "rank": 2, "layers": [0]})
    assert {name.split(".")[3] for name in adapter_layers(model)} == {"0"}
    with pytest.raises(ModelError, match=r"no layer 2(.|\n)*from 0 to 1"):
        tuned(shelf, language={**lora, "layers": [0, 2]})


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["self_attn.*"], {f"{n}.self_attn.{p}_proj" for n in "01" for p in "qkvo"}),
        (["*.[qv]_proj"], {f"{n}.self_attn.{p}_proj" for n in "01" for p in "qv"}),
        (["layers.0.mlp.*_proj"], {f"0.mlp.{p}_proj" for p in ("gate", "up", "down")}),
        (
            ["1.self_attn.o_proj", "up_proj"],
            {"1.self_attn.o_proj", "0.mlp.up_proj", "1.mlp.up_proj"},
        ),
    ],
)
def test_lora_targets_by_pattern(shelf: Path, targets: list[str], expected: set[str]) -> None:
    lora = {"mode": "lora", "rank": 2, "targets": targets}
    model, _, _ = tuned(shelf, language=lora)
    names = {name.removeprefix("language_model.model.layers.") for name in adapter_layers(model)}
    assert names == expected


def test_a_pattern_stays_inside_its_role_and_begins_at_a_part_of_a_name(shelf: Path) -> None:
    model, _, _ = tuned(shelf, language={"mode": "lora", "rank": 2, "targets": ["*"]})
    assert all(name.startswith("language_model.model.") for name in adapter_layers(model))
    for nothing in ("roj", "self_attn", "encoder.*", "attn.q_proj"):
        with pytest.raises(ModelError, match="a pattern over names such as"):
            tuned(shelf, language={"mode": "lora", "targets": [nothing]})
