from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import composed, encoder

from vistune.data.encode import Encoder
from vistune.data.template.pieces import PieceTemplate
from vistune.generate import Prompt, generate, score_choices, stream
from vistune.generate import score as scoring
from vistune.models.compose import ComposedVLM
from vistune.types import Turn


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PROMPTS = [
    Prompt((Turn("user", (0, "What is it?")),), (picture(1),)),
    Prompt((Turn("user", ("Just text, and rather more of it than before.",)),)),
    Prompt((Turn("user", ("Two ", 0, " and ", 1)),), (picture(2), picture(3))),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def loaded(shelf: Path) -> tuple[ComposedVLM, Encoder]:
    model, facts = composed(shelf)
    return model, encoder(facts)


@pytest.mark.parametrize("text", ["llama", "gemma2", "mistral", "gpt2"])
def test_batch_equals_one_by_one(shelf: Path, text: str) -> None:
    model, facts = composed(shelf, text=text)
    coder = encoder(facts)
    together = generate(model, coder, PROMPTS, max_new_tokens=12)
    alone = [generate(model, coder, [p], max_new_tokens=12)[0] for p in PROMPTS]
    assert together == alone
    assert len(set(alone)) > 1 and all(alone)


def test_greedy_equals_transformers_without_a_cache(loaded: tuple[ComposedVLM, Encoder]) -> None:
    model, coder = loaded
    for prompt in PROMPTS:
        sample = coder.encode_prompt(prompt.turns, prompt.images)
        pixels = [torch.from_numpy(p) for p in sample.pixel_values]
        ids = torch.from_numpy(sample.input_ids)[None]
        theirs = model.generate(
            input_ids=ids,
            pixel_values=torch.stack(pixels) if pixels else None,
            max_new_tokens=10,
            do_sample=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=list(coder.stop_token_ids),
            suppress_tokens=[coder.image_token_id],
        )
        text = coder.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
        assert generate(model, coder, [prompt], max_new_tokens=10) == [text]


def test_stream_joins_to_the_answer(loaded: tuple[ComposedVLM, Encoder]) -> None:
    model, coder = loaded
    for prompt in PROMPTS:
        pieces = list(stream(model, coder, prompt, max_new_tokens=16))
        assert "".join(pieces) == generate(model, coder, [prompt], max_new_tokens=16)[0]


def test_sampling_follows_its_seed(loaded: tuple[ComposedVLM, Encoder]) -> None:
    model, coder = loaded

    def draw(seed: int, **kwargs: float) -> str:
        return generate(
            model, coder, PROMPTS[:1], max_new_tokens=12, temperature=1.5, seed=seed, **kwargs
        )[0]

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    greedy = generate(model, coder, PROMPTS[:1], max_new_tokens=12)[0]
    assert draw(1, top_p=1e-9) == greedy  # the likeliest token alone is kept


def test_stop_texts_end_an_answer(loaded: tuple[ComposedVLM, Encoder]) -> None:
    model, coder = loaded
    whole = generate(model, coder, PROMPTS[:1], max_new_tokens=12)[0]
    end = next(c for c in whole[1:] if c.isascii())
    cut = generate(model, coder, PROMPTS[:1], max_new_tokens=12, stop=[end])[0]
    assert cut == whole[: whole.index(end)]
    assert "".join(stream(model, coder, PROMPTS[0], max_new_tokens=12, stop=[end])) == cut


def test_template_stop_inside_a_token_ends_an_answer(shelf: Path) -> None:
    model, facts = composed(shelf)
    plain = encoder(facts)
    whole = generate(model, plain, PROMPTS[1:2], max_new_tokens=12)[0]
    end = next(c for c in whole[1:] if c.isascii())
    template = PieceTemplate(
        name="t", user_open="Q: ", user_close="\n", answer_cue="A:", stop=(end,)
    )
    coder = encoder(facts, template)
    assert generate(model, coder, PROMPTS[1:2], max_new_tokens=12)[0] == whole[: whole.index(end)]


def test_training_mode_is_left_as_it_was(loaded: tuple[ComposedVLM, Encoder]) -> None:
    model, coder = loaded
    model.train()
    generate(model, coder, PROMPTS[:1], max_new_tokens=2)
    list(stream(model, coder, PROMPTS[0], max_new_tokens=2))
    assert model.training
    pieces = stream(model, coder, PROMPTS[0], max_new_tokens=20)
    next(pieces)
    pieces.close()
    assert model.training
    model.eval()
    assert generate(model, coder, [], max_new_tokens=2) == []


def test_half_trained_model_answers(shelf: Path) -> None:
    model, facts = composed(shelf)
    model.to(torch.bfloat16)
    model.connector.float()
    assert generate(model, encoder(facts), PROMPTS, max_new_tokens=3)


@torch.no_grad()
def test_choices_are_scored_as_in_training(loaded: tuple[ComposedVLM, Encoder]) -> None:
    model, coder = loaded
    choices = ["yes", "no", "perhaps so"]
    scores = score_choices(model, coder, PROMPTS[0], choices, per_token=False)
    means = score_choices(model, coder, PROMPTS[0], choices)
    for choice, score, mean in zip(choices, scores, means, strict=True):
        prompt = coder.encode_prompt(PROMPTS[0].turns, PROMPTS[0].images)
        answer = coder.tokenizer.encode(f" {choice}</s>", add_special_tokens=False)
        ids = torch.tensor([[*prompt.input_ids.tolist(), *answer]])
        logits = model(
            input_ids=ids, pixel_values=torch.from_numpy(np.stack(prompt.pixel_values))
        ).logits[0]
        expected = sum(
            float(torch.log_softmax(logits[len(prompt.input_ids) + i - 1], -1)[token])
            for i, token in enumerate(answer)
        )
        assert score == pytest.approx(expected, rel=1e-4)
        assert mean == pytest.approx(expected / len(answer), rel=1e-4)


@torch.no_grad()
def test_scoring_never_holds_the_logits_of_all_choices(
    loaded: tuple[ComposedVLM, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 choices of 500 tokens and a vocabulary of 256k are 2 GiB in fp32, three times over.
    model, coder = loaded
    choices = ["yes", "no", "perhaps so"]
    whole = score_choices(model, coder, PROMPTS[0], choices)
    logits, asked = model.logits, []

    def counted(hidden_MD: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden_MD))
        return logits(hidden_MD)

    monkeypatch.setattr(model, "logits", counted)
    width = int(model.config.get_text_config().vocab_size)
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 3 * width + 1)
    assert score_choices(model, coder, PROMPTS[0], choices) == pytest.approx(whole, rel=1e-5)
    assert max(asked) == 3 and len(asked) > 3
