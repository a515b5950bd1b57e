"""What stands in for other packages' kernels keeps, in a prediction, what these really keep."""

from pathlib import Path

import pytest
import torch
from tiny_parts import composed, parts

from vistune.models import stand_in_liger
from vistune.models.facts import describe
from vistune.models.kept import LiveBytes, kept_slope, peak_slope
from vistune.models.memory import MemoryModel, memory_model, skeleton
from vistune.models.probes import decoder_probe
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.tune import apply_tuning
from vistune.models.tune.quantize import quantize_frozen
from vistune.recipe import TrainConfig, TuneConfig

WIDTH, INNER, LAYERS = 32, 48, 2
CPU = torch.device("cpu")


def lora(frozen_format: str = "same", dropout: float = 0.0) -> TuneConfig:
    language = {"mode": "lora", "rank": 2, "dropout": dropout, "frozen_format": frozen_format}
    return TuneConfig.model_validate({"connector": {"mode": "full"}, "language": language})


def planned(
    folder: Path, tune: TuneConfig, *, dtype=torch.float32, kind="cpu", fused=False, **train
) -> MemoryModel:
    config = parts(folder)
    return memory_model(
        config,
        describe(config),
        tune=tune,
        train=TrainConfig(steps=1, **train),
        dtype=dtype,
        fused=fused,
        kind=kind,
    )


def alive(folder: Path, frozen_format: str, *, recomputed: int, half: bool) -> list[float]:
    """Bytes a token of a real decoder, after a forward pass and after the backward pass."""
    model, _ = composed(folder)
    if half:
        model.to(torch.bfloat16)
    apply_tuning(model, lora(frozen_format), seed=0)
    dtype = torch.bfloat16 if half else torch.float32
    if frozen_format == "int8":
        quantize_frozen(model, "language", "int8", dtype=dtype, device=CPU)
    model.train()
    set_checkpoint_layers(model, recomputed)

    def run(num_tokens: int) -> list[int]:
        embeds = torch.zeros(1, num_tokens, WIDTH, dtype=dtype, requires_grad=True)
        places = torch.arange(num_tokens)[None]
        with LiveBytes(beside=[embeds]) as live:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                out = model.language_model.base_model(
                    inputs_embeds=embeds, attention_mask=None, position_ids=places, use_cache=False
                )
                loss = out.last_hidden_state.float().sum()
            del out
            found = [live.now()]
            loss.backward()
            model.zero_grad()
            embeds.grad = None
            return [*found, live.now()]

    run(64)  # what the package makes of weights once
    few, many = run(64), run(128)
    return [(after - before) / 64 for before, after in zip(few, many, strict=True)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("recomputed", [0, LAYERS])
def test_8_bit_products_keep_no_more_than_others(tmp_path, recomputed, half):
    """Bitsandbytes holds each product's input on its node; nothing of it may stay."""
    pytest.importorskip("bitsandbytes")
    same, in_8_bits = (
        alive(tmp_path, f, recomputed=recomputed, half=half) for f in ("same", "int8")
    )
    assert same[0] > 0
    assert in_8_bits == pytest.approx(same)


def test_the_most_of_a_decoder_grows_with_its_tokens_alone(tmp_path):
    """A mask of all pairs of tokens, which packed kernels have none of, would bend it."""
    config = parts(tmp_path)
    with torch.device("meta"):
        model = skeleton(config, describe(config))
    apply_tuning(model, lora(), seed=0)
    run = decoder_probe(model.train(), stream=torch.float32, below=True)
    few, many = (
        peak_slope(model, run, dtype=torch.float32, at=at) for at in ((64, 128), (2048, 4096))
    )
    assert few == many


def test_dropout_keeps_a_byte_for_each_number():
    layer = torch.nn.Dropout(0.3)

    def run(num_rows):
        return layer(torch.zeros(num_rows, 32, requires_grad=True))

    assert kept_slope(layer, run, dtype=torch.float32, at=(64, 128)) == 32
    # The input, the result and its mask; on the way back the gradients of both.
    most = peak_slope(layer, run, dtype=torch.float32, at=(64, 128))
    assert most == 32 * (4 + 4 + 1 + 4 + 4)
    layer.eval()
    assert kept_slope(layer, run, dtype=torch.float32, at=(64, 128)) == 0


def test_dropout_of_adapters_keeps_a_byte_for_each_of_their_inputs(tmp_path):
    without, with_it = (
        planned(tmp_path, lora(dropout=p), dtype=torch.bfloat16).layer.kept for p in (0.0, 0.3)
    )
    assert with_it - without == 6 * WIDTH + INNER


def test_liger_is_counted_where_a_run_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in_liger, "has_liger", lambda: True)
    own = planned(tmp_path, lora(), kind="cuda", kernels="torch").layer
    taken = planned(tmp_path, lora(), kind="cuda").layer
    # A gate keeps its two inputs, and not what lies between them and its result.
    assert taken.kept <= own.kept - 4 * INNER and taken.backward < own.backward
    assert planned(tmp_path, lora(), kernels="liger").layer == taken
    assert planned(tmp_path, lora(), kind="cpu").layer == own
    fused = [planned(tmp_path, lora(), kind=kind, fused=True).layer for kind in ("cuda", "cpu")]
    assert fused[0] == fused[1]
    monkeypatch.setattr(stand_in_liger, "has_liger", lambda: False)
    assert planned(tmp_path, lora(), kind="cuda").layer == own
