"""QLoRA and 8-bit AdamW as whole runs: learning, resuming, answering with unrounded weights."""

import io
import sys

import pytest
import torch
from devices import DEVICES, REPEATS
from rich.console import Console
from safetensors.torch import load_file
from test_loop import losses, resolved
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vistune.errors import MissingExtraError
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train

QUIET = Console(quiet=True)
DTYPE = {"cpu": "fp32", "cuda": "bf16"}


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """A language model whose layers read multiples of 64 numbers, as real ones do."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(**shape, **heads, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qlora(tiny, folder, form, language_model, *, device="cpu", **train_changes):
    language = {"mode": "lora", "rank": 4, "alpha": 8, "frozen_format": form}
    made = resolved(
        tiny,
        folder,
        device=device,
        dtype=DTYPE[device],
        tune={"connector": {"mode": "full"}, "language": language},
        train={"steps": 4, "schedule": "constant", "warmup_frac": 0, "lr": 1e-2, **train_changes},
    )
    model = made.recipe.model
    language = model.language_model.model_copy(update={"path": str(language_model)})
    model = model.model_copy(update={"language_model": language})
    return ResolvedRecipe(made.recipe.model_copy(update={"model": model}), {}, "test")


def longer(recipe, steps):
    changed = recipe.recipe.train.model_copy(update={"steps": steps})
    return ResolvedRecipe(recipe.recipe.model_copy(update={"train": changed}), {}, "test")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw"])
def test_a_run_learns_and_resumes_as_if_never_stopped(
    tiny, wide, tmp_path, optimizer, form, device
):
    pytest.importorskip("bitsandbytes")
    chosen = {"optimizer": optimizer, "device": device}
    whole = qlora(tiny, tmp_path / "a", form, wide, **chosen)
    train(whole, console=QUIET)
    parts = qlora(tiny, tmp_path / "b", form, wide, **chosen)
    train(longer(parts, 2), console=QUIET)
    train(parts, resume=True, console=QUIET)
    same = REPEATS[device]
    for one, other in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        # The gradient's norm moves more than the loss where additions change their order.
        assert other[:2] == pytest.approx(one[:2], rel=same, abs=0)
        assert other[2] == pytest.approx(one[2], rel=20 * same, abs=0)
    assert losses(tmp_path / "a")[-1][1] < losses(tmp_path / "a")[0][1]
    saved = [
        load_file(tmp_path / which / "checkpoints/step_00000004/weights.safetensors")
        for which in "ab"
    ]
    assert saved[0].keys() == saved[1].keys()
    # Adam's first steps are as large as the rate, whichever way a gradient of rounding points.
    if device == "cpu":
        assert all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])
    # Only what trains is saved: no rounded weight leaves the process.
    assert all(".lora_" in name or name.startswith("connector") for name in saved[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("form", "near"), [("int8", 1e-3), ("nf4", 1e-2)])
def test_losses_are_near_those_of_weights_that_are_not_rounded(
    tiny, wide, tmp_path, form, near, device
):
    pytest.importorskip("bitsandbytes")
    for name in ("same", form):
        train(qlora(tiny, tmp_path / name, name, wide, device=device), console=QUIET)
    plain, rounded = (losses(tmp_path / name) for name in ("same", form))
    assert plain != rounded
    for (_, expected, _), (_, loss, _) in zip(plain, rounded, strict=True):
        # Four and two times what a CPU shows in fp32 and bf16.
        assert loss == pytest.approx(expected, rel=near)


@pytest.mark.parametrize("device", DEVICES)
def test_tower_and_language_model_are_held_in_formats_of_their_own(tiny, wide, tmp_path, device):
    pytest.importorskip("bitsandbytes")
    whole = qlora(tiny, tmp_path / "a", "int8", wide, device=device)
    vision = {"mode": "lora", "rank": 2, "frozen_format": "nf4"}
    tree = whole.recipe.model_dump(mode="json", exclude_none=True)
    tree["tune"]["vision"] = vision
    said = Console(file=io.StringIO(), width=200)
    made = ResolvedRecipe(Recipe.model_validate(tree), {}, "test")
    train(longer(made, 2), console=said)
    train(made, resume=True, console=said)
    assert "frozen weights, vision: 18 linear layers held in nf4" in said.file.getvalue()
    assert "frozen weights, language: 14 linear layers held in int8" in said.file.getvalue()
    seen = losses(tmp_path / "a")
    assert len(seen) == 4 and seen[-1][1] < seen[0][1]
    saved = load_file(tmp_path / "a/checkpoints/step_00000004/weights.safetensors")
    assert any(name.startswith("vision_tower") for name in saved)
    assert all(".lora_" in name or name.startswith("connector") for name in saved)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_sample_answers_leave_gradients_through_rounded_layers_alone(tiny, wide, tmp_path, form):
    # On CPUs with AVX512-BF16 a pass without gradients once turned later products into ones that
    # have no backward pass: the connector's gradient was 0.0, and nothing said so.
    pytest.importorskip("bitsandbytes")
    image = str(next((tiny / "images").iterdir()))
    asked = {"prompts": ["What?"], "images": [image], "max_new_tokens": 2, "every_steps": 1}
    for which, sample in (("a", {}), ("b", asked)):
        tree = qlora(tiny, tmp_path / which, form, wide).recipe.model_dump(mode="json")
        tree["tune"] = {
            "connector": {"mode": "full"},
            "vision": {"mode": "lora", "rank": 2, "frozen_format": form},
            "language": {"mode": "freeze", "frozen_format": form},
        }
        tree["train"]["checkpoint_tower_layers"] = 2
        tree["sample"] |= sample
        train(ResolvedRecipe(Recipe.model_validate(tree), {}, "test"), console=QUIET)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(norm > 0 for _, _, norm in losses(tmp_path / "a"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_answers_come_from_adapters_merged_into_unrounded_weights(
    tiny, wide, tmp_path, form, device
):
    pytest.importorskip("bitsandbytes")
    from vistune.assembly import load_assembled

    train(qlora(tiny, tmp_path / "a", form, wide, device=device), console=QUIET)
    model = load_assembled(tmp_path / "a").model
    base = load_file(wide / "model.safetensors")
    saved = load_file(tmp_path / "a/checkpoints/step_00000004/weights.safetensors")
    name = next(n for n in saved if "q_proj.lora_A" in n)
    stem = name.split(".lora_A")[0]
    up = saved[next(n for n in saved if n.startswith(f"{stem}.lora_B"))]
    merged = model.get_parameter(f"{stem}.weight")
    assert merged.dtype is torch.float32
    original = base[f"{stem.removeprefix('language_model.')}.weight"]
    # alpha / rank = 2; fp32 rounding of one sum
    assert torch.allclose(merged, original + 2 * up @ saved[name], atol=1e-6)


def test_row_length_and_recomputed_layers_are_settled_and_kept_on_resume(tiny, tmp_path):
    auto = {"batch": {"samples": 4, "max_tokens": "auto"}}
    steps = {"schedule": "constant", "warmup_frac": 0, "checkpoint_layers": "auto"}
    whole = resolved(tiny, tmp_path / "a", train={"steps": 4, **steps}, **auto)
    train(longer(whole, 2), console=QUIET)
    train(whole, resume=True, console=QUIET)
    assert (tmp_path / "a/settled.json").is_file()
    fixed = {"batch": {"samples": 4, "max_tokens": 4096}}
    train(resolved(tiny, tmp_path / "b", train={"steps": 4, **steps}, **fixed), console=QUIET)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_8_bit_state_names_its_extra(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"vistune\[qlora\]"):
        train(resolved(tiny, tmp_path / "a", train={"optimizer": "adamw_8bit"}), console=QUIET)
