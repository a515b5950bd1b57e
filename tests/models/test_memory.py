"""Bytes predicted without weights are the bytes a real model keeps."""

from dataclasses import replace

import pytest
import torch
from family_dirs import write_family
from tiny_parts import composed, parts

from vistune.checkpoint.layouts import describe_directory, load_directory
from vistune.errors import ModelError
from vistune.models.facts import describe
from vistune.models.fused import layer as fused_layer
from vistune.models.fused.install import install_fused
from vistune.models.kept import kept_slope, peak_slope
from vistune.models.memory import RowSize, frozen_bytes, memory_model
from vistune.models.recompute import decoder_layers, set_checkpoint_layers
from vistune.models.tune import apply_tuning
from vistune.recipe import ModelConfig, TrainConfig, TuneConfig
from vistune.recipe.sizes import optimizer_bytes

STAGE1 = TuneConfig()
LORA = TuneConfig.model_validate({"language": {"mode": "lora", "rank": 2}})
FULL = TuneConfig.model_validate(
    {part: {"mode": "full"} for part in ("vision", "connector", "language", "head")}
)
DROPPED = TuneConfig.model_validate({"language": {"mode": "lora", "rank": 2, "dropout": 0.1}})
KINDS = {"stage 1": STAGE1, "lora": LORA, "full": FULL}


def planned(tmp_path, tune, *, fused, dtype=torch.float32, **train):
    config = parts(tmp_path)
    train = TrainConfig(steps=1, **train)
    return memory_model(config, describe(config), tune=tune, train=train, dtype=dtype, fused=fused)


def decode(model, num_tokens):
    """A forward pass of the decoder over one sample."""
    embeds = torch.zeros(1, num_tokens, 32, requires_grad=True)
    return model.language_model.base_model(
        inputs_embeds=embeds,
        attention_mask=None,
        position_ids=torch.arange(num_tokens)[None],
        use_cache=False,
    )


def really_kept(run):
    """Bytes of the distinct storages autograd keeps, on real tensors."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storages.values())


@pytest.mark.parametrize("name", KINDS)
def test_what_layers_keep_is_what_real_layers_keep(tmp_path, name):
    memory = planned(tmp_path, KINDS[name], fused=False)
    model, _ = composed(tmp_path)
    apply_tuning(model, KINDS[name], seed=0)
    model.train()
    kept = [really_kept(lambda n=n: decode(model, n)) for n in (64, 128)]
    assert memory.layer.kept * memory.num_layers * 64 == kept[1] - kept[0]


@pytest.mark.parametrize("name", ["stage 1", "lora", "lora with dropout"])
def test_what_fused_layers_keep_is_their_formula(tmp_path, name, monkeypatch):
    tune = (KINDS | {"lora with dropout": DROPPED})[name]
    memory = planned(tmp_path, tune, fused=True)
    model, _ = composed(tmp_path)
    apply_tuning(model, tune, seed=0)
    model.train()
    install_fused(model, mode="on", fp8=False)
    seen = []
    forward = fused_layer._forward

    def watched(*args):
        y, saved = forward(*args)
        seen.append(saved)
        return y, saved

    monkeypatch.setattr(fused_layer, "_forward", watched)
    num_tokens, trunk = 24, model.fused
    x = torch.randn(num_tokens, 32, requires_grad=True)
    cos, sin = trunk.rotary(x[None], torch.arange(num_tokens)[None])

    def attention(q, k, v):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    trunk(x, cos[0], sin[0], attention=attention, num_layers=1)
    (saved,) = seen
    mlp = saved.mlp
    tensors = [saved.x_TD, saved.rstd_T, saved.q, saved.attended]
    tensors += [mlp.h_TD, mlp.rstd_T, mlp.gate_up_TF]
    lowrank = [low for low in (*saved.lowrank, *mlp.lowrank) if low is not None]
    assert all((low.drop is not None) == name.endswith("dropout") for low in lowrank)
    tensors += [low.inner_TR for low in lowrank]
    real = sum(t.untyped_storage().nbytes() for t in tensors)
    assert saved.q.untyped_storage().data_ptr() == saved.v.untyped_storage().data_ptr()
    log_sums = 4 * 4 * num_tokens  # kept by attention itself: fp32 for each of 4 heads
    assert memory.layer.kept * num_tokens == real + log_sums


def test_fixed_bytes_are_those_of_the_parameters(tmp_path):
    memory = planned(tmp_path, LORA, fused=False, dtype=torch.bfloat16)
    model, _ = composed(tmp_path)
    model.to(torch.bfloat16)
    apply_tuning(model, LORA, seed=0)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(b.weights for b in memory.roles.values()) == held
    assert sum(b.gradients for b in memory.roles.values()) == 4 * trained
    assert sum(b.optimizer for b in memory.roles.values()) == 8 * trained


def test_recomputing_and_more_tokens_move_the_peak_the_right_way(tmp_path):
    memory = planned(tmp_path, STAGE1, fused=True)
    peaks = [memory.predict(RowSize(n, 8, 32, n)).peak for n in (1024, 4096, 8192)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    row = RowSize(65536, 8, 32, 65536)
    again = [memory.predict(row, checkpoint_layers=n).peak for n in (0, 1, 2)]
    assert again[0] >= again[1] >= again[2]


def test_offload_leaves_little_of_state_and_of_recomputed_inputs(tmp_path):
    plain = planned(tmp_path, LORA, fused=True)
    moved = planned(
        tmp_path,
        LORA,
        fused=True,
        checkpoint_layers="auto",
        offload={"activations": True, "optimizer": True},
    )
    assert sum(b.optimizer for b in moved.roles.values()) == 0
    trained = sum(b.optimizer for b in plain.roles.values()) // 8
    assert moved.visiting == 3 * 8 * trained and plain.visiting == 0
    row = RowSize(65536, 8, 32, 65536)
    deep = {name: replace(m, num_layers=41) for name, m in (("on", plain), ("off", moved))}
    kept = {name: m.predict(row, checkpoint_layers=40).activations for name, m in deep.items()}
    # Of 40 inputs three are on the device: one in use, two on their way.
    assert kept["on"] - kept["off"] == 37 * 65536 * plain.layer.kept_recomputed


@pytest.mark.parametrize("name", KINDS)
def test_what_an_image_keeps_is_what_a_real_one_keeps(tmp_path, name):
    memory = planned(tmp_path, KINDS[name], fused=False)
    model, _ = composed(tmp_path)
    apply_tuning(model, KINDS[name], seed=0)
    model.train()
    pixels = torch.randn(2, 3, 28, 28)
    kept = [really_kept(lambda n=n: model.image_features(pixels[:n].clone())) for n in (1, 2)]
    # The row's own fp32 pixels beside what is kept, which for a trained tower is a copy in the
    # format of the arithmetic (in fp32 the same tensor: counted twice, 0.1 % of what it keeps).
    assert memory.image_kept == kept[1] - kept[0] + pixels[0].nbytes


def test_recomputed_tower_blocks_keep_their_input_and_nothing_else(tmp_path):
    memory = planned(tmp_path, FULL, fused=False, checkpoint_tower_layers=2)
    model, _ = composed(tmp_path)
    apply_tuning(model, FULL, seed=0)
    model.train()
    set_checkpoint_layers(model, 2, role="vision")
    pixels = torch.randn(2, 3, 28, 28)
    kept = [really_kept(lambda n=n: model.image_features(pixels[:n].clone())) for n in (1, 2)]
    assert memory.image_kept == kept[1] - kept[0] + pixels[0].nbytes
    plain = planned(tmp_path, FULL, fused=False)
    assert memory.image_kept < plain.image_kept and memory.image_passing > plain.image_passing


def test_repeated_key_heads_are_counted_where_the_kernel_wants_them(tmp_path, monkeypatch):
    from vistune import _compat

    found = []
    for repeats in (False, True):
        monkeypatch.setattr(_compat, "varlen_repeats_groups", lambda repeats=repeats: repeats)
        found.append(planned(tmp_path, STAGE1, fused=True, dtype=torch.bfloat16).layer.kept)
    assert found[1] - found[0] == 2 * 2 * 4 * 8  # keys and values, bf16, 4 heads of 8


def test_compact_formats():
    weight = torch.empty(64, 512)
    assert frozen_bytes(weight, "same") == 4 * 64 * 512
    assert frozen_bytes(weight, "fp8") == 2 * 64 * 512 + 64 * (2 * 64 + 4)  # 64 columns twice
    assert frozen_bytes(weight, "int8") == 64 * 512 + 4 * 64
    assert frozen_bytes(weight, "nf4") == 64 * 256 + 512 + 8
    assert optimizer_bytes(512, "adamw") == 4096 and optimizer_bytes(512, "adamw_8bit") == 1040


class Pair(torch.nn.Module):
    """Two linear layers without biases, and a sine between them that keeps its input."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 16, bias=False)
        self.second = torch.nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.second(torch.sin(self.first(x)))


@pytest.mark.parametrize("trained", [False, True])
def test_the_most_bytes_of_a_pass_by_hand(trained):
    model = Pair().requires_grad_(trained)

    def run(num_rows):
        return model(torch.zeros(num_rows, 4, requires_grad=not trained))

    found = peak_slope(model, run, dtype=torch.float32, at=(64, 128))
    # Numbers of a row: the input 4, the inner values 16, the output 4 and its gradient 4; on the
    # way back the sine's gradient 16, the cosine 16 and their product 16 at once. The sine itself
    # is gone by then: what wanted it, if anything, has been computed.
    assert found == 4 * (4 + 16 + 4 + 4 + 16 + 16 + 16)


def test_layer_norms_are_counted_in_fp32_as_accelerators_compute_them():
    norm = torch.nn.LayerNorm(32)

    def run(num_rows):
        return norm(torch.zeros(num_rows, 32, dtype=torch.bfloat16))

    found = kept_slope(norm, run, dtype=torch.bfloat16, at=(64, 128))
    assert found == 4 * (32 + 1 + 1)  # the input, its mean and the root of its variance

    def run_without(num_rows):
        with torch.autocast("cpu", enabled=False):
            rows = torch.zeros(num_rows, 32, dtype=torch.bfloat16, requires_grad=True)
            return torch.nn.functional.layer_norm(rows, (32,))

    found = kept_slope(norm, run_without, dtype=torch.bfloat16, at=(64, 128))
    assert found == 2 * (32 + 1 + 1)  # a CPU keeps both sums in the format of the rows


@pytest.mark.parametrize("kind", ["cogvlm2", "visualglm", "mgm-2b", "mgm-2b-hd"])
def test_families_are_planned(tmp_path, kind):
    facts = describe_directory(write_family(kind, tmp_path / kind))
    memory = memory_model(
        ModelConfig(from_checkpoint=str(tmp_path / kind)),
        facts,
        tune=LORA,
        train=TrainConfig(steps=1),
        dtype=torch.float32,
        fused=False,
    )
    model = load_directory(tmp_path / kind, facts, dtype=torch.float32)
    apply_tuning(model, LORA, seed=0)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(b.weights for b in memory.roles.values()) == held
    assert memory.num_layers == len(decoder_layers(model)) and not memory.fused
    row = RowSize(65536, 1, 32, 65536)
    again = [memory.predict(row, checkpoint_layers=n).peak for n in range(memory.num_layers + 1)]
    assert again == sorted(again, reverse=True) and again[0] > again[-1] > held


def test_a_model_that_cannot_be_planned_says_so(tmp_path):
    config = parts(tmp_path)
    facts = replace(describe(config), tower=None)
    with pytest.raises(ModelError, match="cannot be predicted"):
        memory_model(
            config, facts, tune=LORA, train=TrainConfig(steps=1), dtype=torch.float32, fused=False
        )


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_tower_in_fewer_bits_is_counted_so(tmp_path, form):
    tunes = [
        TuneConfig.model_validate({"vision": {"mode": "freeze", "frozen_format": f}})
        for f in ("same", form)
    ]
    same, fewer = (planned(tmp_path, tune, fused=False).roles for tune in tunes)
    model, _ = composed(tmp_path)
    linear = [m.weight for m in model.vision_tower.modules() if type(m) is torch.nn.Linear]
    saved = sum(w.nbytes - frozen_bytes(w, form) for w in linear)
    assert saved > 0 and same["vision"].weights - fewer["vision"].weights == saved
    assert all(same[role] == fewer[role] for role in ("connector", "language", "head"))
