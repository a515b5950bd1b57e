"""VisualGLM's data path: fast tokenizer, template and encoder give the published input."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from visualglm_case import train_pieces

from vistune.data.encode import Encoder
from vistune.data.image import ImagePlan
from vistune.data.template.glm import visualglm_template
from vistune.errors import ModelError, RowError
from vistune.models.chatglm.fast_tokenizer import fast_tokenizer
from vistune.models.chatglm.tokenizer import ChatGLMTokenizer
from vistune.models.visualglm import VisualGLMConfig
from vistune.models.visualglm.prompt import encode_conversation
from vistune.types import ImageRef, Sample, Turn, VisionGrid

IMAGE, SIDE_PX, NUM_IMAGE_TOKENS = 500, 28, 4
ALPHABET = ("a", "b", "你", "好", " ", "  ", "\n", "\t", "☃", "<n>", "<sop>", "[gMASK]", "lazy")
ALPHABET += ("dog ", "<img>", "▁", "   ", " " * 90, "<image_5>")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def encoder(pieces: Path) -> Encoder:
    return Encoder(
        tokenizer=fast_tokenizer(pieces, vocab_size=130_528),
        template=visualglm_template("en"),
        image_plan=ImagePlan(mode="resize", size_px=SIDE_PX, mean=(0.5,) * 3, std=(0.5,) * 3),
        grid=VisionGrid(
            patch_px=SIDE_PX + 1, num_extra_tokens=NUM_IMAGE_TOKENS, fixed_size_px=SIDE_PX
        ),
        image_token_id=IMAGE,
    )


@pytest.mark.parametrize("vocab_size", [130_528, 150_528])
def test_fast_ids_equal_the_plain_rules(pieces: Path, vocab_size: int) -> None:
    fast = fast_tokenizer(pieces, vocab_size=vocab_size)
    plain = ChatGLMTokenizer.for_vocabulary(pieces, vocab_size=vocab_size)
    draw = random.Random(0)
    texts = ["", " ", "  x ", "\nabc", "<|blank_3|>", "▁x <n>"]
    texts += ["".join(draw.choices(ALPHABET, k=draw.randint(1, 14))) for _ in range(200)]
    for text in texts:
        assert fast.encode(text) == plain.encode(text), text
    assert fast.encode("a", "b") == plain.encode("a", "b")
    assert fast(["a", "a b c"], padding=True)["input_ids"][0][0] == plain.pad_token_id
    for text in ("你好", "a\n\tb   c", "The lazy dog"):
        assert fast.decode(fast.encode(text), skip_special_tokens=True) == text


def test_the_fast_tokenizer_is_saved_whole(pieces: Path, tmp_path: Path) -> None:
    fast = fast_tokenizer(pieces, vocab_size=130_528)
    fast.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.encode("你好\n a") == fast.encode("你好\n a")
    assert (loaded.eos_token_id, loaded.padding_side) == (fast.eos_token_id, "left")


def test_other_sentencepiece_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        fast_tokenizer(tmp_path / "ice_text.model", vocab_size=130_528)


def test_a_training_row_is_the_published_one(
    encoder: Encoder, pieces: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.png")
    turns = (
        Turn("user", (0, "\nwhat is it")),
        Turn("assistant", ("a red disc",)),
        Turn("user", ("is it a cat",)),
        Turn("assistant", ("a dog",)),
    )
    images = (ImageRef(tmp_path / "a.png", "a.png"),)
    row = encoder.encode(
        Sample(id="1", source="s", where="w", turns=turns, images=images),
        max_tokens=200,
        overlong="error",
    )
    published = encode_conversation(
        ChatGLMTokenizer(str(pieces)),
        "is it a cat",
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_token_id=IMAGE,
        history=[("what is it", "a red disc")],
        answer="a dog",
        language="en",
    )
    assert row.input_ids.tolist() == list(published.input_ids)
    assert row.target_mask.tolist() == list(published.target_mask)
    assert [pixels.shape for pixels in row.pixel_values] == [(3, SIDE_PX, SIDE_PX)]


def test_a_prompt_ends_with_sop(encoder: Encoder, pieces: Path) -> None:
    row = encoder.encode_prompt(
        [Turn("user", (0, "\nwhat is it"))], [Image.new("RGB", (9, 9), (1, 2, 3))]
    )
    published = encode_conversation(
        ChatGLMTokenizer(str(pieces)),
        "what is it",
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_token_id=IMAGE,
        language="en",
    )
    assert row.input_ids.tolist() == list(published.input_ids)
    assert encoder.stop_token_ids == (encoder.tokenizer.eos_token_id,)


def test_rows_it_cannot_say_are_refused(encoder: Encoder) -> None:
    template = visualglm_template()
    two = [Turn("user", (0, 1, "两张")), Turn("assistant", ("好",))]
    with pytest.raises(RowError, match="takes one image"):
        template.segments(two)
    with pytest.raises(RowError, match="system prompt"):
        template.segments([Turn("user", ("问",))], "be kind")
    text = "".join(s.text for s in template.segments([Turn("user", ("图",))]))
    assert text == "问：图\n答："


def test_the_public_grid_has_as_many_tokens_as_queries() -> None:
    import torch

    from vistune.models.visualglm import VisualGLMForConditionalGeneration

    with torch.device("meta"):
        grid = VisualGLMForConditionalGeneration(VisualGLMConfig()).grid
    assert (grid.num_tokens(224, 224), grid.fixed_size_px) == (32, 224)
