"""The loop on an accelerator: the parts that a CPU cannot show."""

import gc
import json
import math
import re
import time

import pytest
import torch
from test_loop import LORA, QUIET, losses, metrics, resolved
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loss_curve import relative_error
from vistune.errors import TrainingError
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train

pytestmark = pytest.mark.gpu

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")


@cuda
def test_losses_are_those_of_the_cpu(tiny, tmp_path):
    train(resolved(tiny, tmp_path / "cpu"), console=QUIET)
    gpu = resolved(tiny, tmp_path / "gpu", device="cuda", data={"workers": 2})
    train(gpu, console=QUIET)
    pairs = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("gpu", "cpu")]
    # fp32 on both; sums in another order, six steps long.
    assert relative_error(*pairs) < 1e-4
    assert metrics(tmp_path / "gpu")[0]["peak_memory_gib"] > 0


@cuda
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_goes_on_with_the_device_random_state(tiny, tmp_path, dtype):
    """With dropout: the mask of step 4 is that of an uninterrupted run, so the loss is too."""
    sections = {"device": "cuda", "dtype": dtype, "tune": LORA, "save": {"every_steps": 3}}
    train(resolved(tiny, tmp_path / "whole", **sections), console=QUIET)
    result = train(resolved(tiny, tmp_path / "parts", **sections), console=QUIET)
    (result.checkpoint / "COMPLETE").unlink()
    train(resolved(tiny, tmp_path / "parts", **sections), resume=True, console=QUIET)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [line[0] for line in parts] == [line[0] for line in whole]
    # Atomic additions may come in another order: equal to rounding, where another mask would
    # differ in the third digit.
    tolerance = 1e-5 if dtype == "fp32" else 2e-4
    for (_, loss, _), (_, expected, _) in zip(parts, whole, strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)


@cuda
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_figures_of_a_run_are_those_of_the_device(tiny, tmp_path, mode):
    sections = LORA if mode == "lora" else {role: {"mode": "full"} for role in ("language", "head")}
    made = resolved(
        tiny, tmp_path / "r", device="cuda", dtype="bf16", data={"workers": 2}, tune=sections
    )
    started_s = time.perf_counter()
    result = train(made, console=QUIET)
    taken_s = time.perf_counter() - started_s
    lines = metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        assert 0 < line["mfu"] < 1.5 and 0 < line["useful_tflops"] < math.inf
        assert line["mfu"] == pytest.approx(line["useful_tflops"] / result.peak_tflops)
        assert 0 <= line["data_wait_frac"] <= 1 and line["padding_frac"] == 0
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_s"])
        assert line["samples_per_s"] == pytest.approx(line["samples"] / line["step_s"])
    assert sum(line["step_s"] for line in lines) < taken_s
    peaks = [line["peak_memory_gib"] for line in lines]
    assert peaks == sorted(peaks) and peaks[0] > 0
    # Nothing but the copy of the weights for the checkpoint, on the host, comes after the steps.
    assert peaks[-1] == pytest.approx(torch.cuda.max_memory_allocated() / 2**30, rel=0.05)
    # More than a small device's products, less than any's.
    assert 1 < result.peak_tflops < 20_000


CAP_GIB = 2.0


@pytest.fixture
def capped():
    """A card of which this process may take 2 GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < 2**28, "an earlier test of this process keeps memory"
    total_gib = torch.cuda.mem_get_info()[1] / 2**30
    torch.cuda.set_per_process_memory_fraction(CAP_GIB / total_gib)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def long_rows(tiny, tmp_path_factory):
    """Twelve layers and rows of 14,000 tokens: 2.3 GiB on an H200 without recomputation."""
    folder = tmp_path_factory.mktemp("long")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}
    config = LlamaConfig(
        **shape, num_attention_heads=8, vocab_size=len(tokenizer), max_position_embeddings=4096
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    said = " ".join(["There is a red square in the middle."] * 230)
    rows = json.loads((tiny / "train.json").read_text())[:16]
    for row in rows:
        row["conversations"][1]["value"] = said
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def long_recipe(tiny, folder, run_dir, **train_changes):
    made = resolved(
        tiny,
        run_dir,
        device="cuda",
        dtype="bf16",
        tune={"connector": {"mode": "full"}, "language": LORA["language"]},
        batch={"samples": 8, "max_tokens": 16384},
        train={"steps": 2, "schedule": "constant", "warmup_frac": 0.0, **train_changes},
        save={"every_steps": 1},
    )
    tree = made.recipe.model_dump(mode="json", exclude_none=True)
    tree["model"]["language_model"]["path"] = str(folder / "llama")
    tree["data"]["train"][0]["path"] = str(folder / "train.json")
    return ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test")


@cuda
def test_a_row_that_does_not_fit_is_said_before_step_1_and_the_advice_fits(
    tiny, long_rows, tmp_path, capped
):
    folder = tmp_path / "r"
    with pytest.raises(TrainingError, match="before the first step") as caught:
        train(long_recipe(tiny, long_rows, folder), console=QUIET)
    said = str(caught.value)
    assert "out of memory" in said and "while rehearsing the " in said
    assert "batch.max_tokens (16384)" in said and "train.checkpoint_layers (0)" in said
    advised = re.search(
        r"train\.checkpoint_layers=(\d+) is predicted to need ([\d.]+) of ([\d.]+) GiB", said
    )
    assert advised is not None, said
    layers, needed_gib, device_gib = int(advised[1]), float(advised[2]), float(advised[3])
    assert 1 <= layers <= 12 and needed_gib < device_gib <= CAP_GIB
    assert not list((folder / "checkpoints").glob("*"))
    assert not (folder / "metrics.jsonl").exists() or not metrics(folder)
    del caught
    gc.collect()
    assert torch.cuda.memory_allocated() < 0.25 * 2**30  # libraries' workspaces stay

    # The same directory, with nothing but the advised setting.
    changed = long_recipe(tiny, long_rows, folder, checkpoint_layers=layers)
    result = train(changed, console=QUIET)
    assert result.steps == 2 and [line["step"] for line in metrics(folder)] == [1, 2]
    peak_gib = metrics(folder)[-1]["peak_memory_gib"]
    assert peak_gib < CAP_GIB
    assert needed_gib == pytest.approx(peak_gib, rel=0.2)  # said to a tenth


@cuda
def test_a_start_that_does_not_fit_leaves_the_earlier_run_as_it_was(
    tiny, long_rows, tmp_path, capped
):
    folder = tmp_path / "r"
    fits = long_recipe(tiny, long_rows, folder, checkpoint_layers=12)
    train(fits, console=QUIET)
    before = {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    with pytest.raises(TrainingError, match="before the first step"):
        train(long_recipe(tiny, long_rows, folder), overwrite=True, console=QUIET)
    gc.collect()  # the error's frames hold the model
    kept = {name: (folder / name).read_bytes() for name in before if (folder / name).is_file()}
    assert kept == before
    assert train(fits, resume=True, console=QUIET).steps == 2  # complete, as it was


@cuda
def test_what_is_planned_stays_within_a_cap(tiny, long_rows, tmp_path, capped):
    recipe = long_recipe(tiny, long_rows, tmp_path / "r", checkpoint_layers="auto")
    result = train(recipe, console=QUIET)
    settled = json.loads((tmp_path / "r" / "settled.json").read_text())
    assert result.steps == 2 and 1 <= settled["train.checkpoint_layers"] <= 12
