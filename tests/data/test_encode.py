"""Token ids, loss mask and pixels of whole samples."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import gemma_tokenizer, llama_tokenizer, make_encoder, make_images, make_plan
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from vistune.data.encode import Encoder, fit
from vistune.data.image import pixels_of
from vistune.data.template import TEMPLATES
from vistune.errors import DataError, ImageError, RowError, TemplateError
from vistune.types import ImageRef, Sample, Turn, VisionGrid

TURNS = (
    Turn("user", (0, "\nWhat is the colour of the bus?")),
    Turn("assistant", ("The bus is red.",)),
)


def sample(folder: Path, turns: tuple[Turn, ...] = TURNS, *, number: int = 1) -> Sample:
    names = make_images(folder, number)
    images = tuple(ImageRef(path=folder / name, name=name) for name in names)
    return Sample(id="s1", source="train", where="t.jsonl:1", turns=turns, images=images)


def text_of(encoder: Encoder, ids: Any, mask: Any) -> str:
    text: str = encoder.tokenizer.decode(ids[mask])
    return text


def test_encode_is_tokens_mask_and_pixels(tmp_path: Path) -> None:
    encoder, row = make_encoder(), sample(tmp_path)
    encoded = encoder.encode(row, max_tokens=500, overlong="error")
    assert encoded.input_ids.dtype == np.int64
    assert encoded.target_mask.dtype == np.bool_
    assert encoded.num_image_tokens == 4  # 28 px at 14 px a patch
    assert int((encoded.input_ids == encoder.image_token_id).sum()) == 4
    assert encoder.count_tokens(row) == encoded.input_ids.size
    assert text_of(encoder, encoded.input_ids, encoded.target_mask) == "The bus is red.</s>"
    np.testing.assert_array_equal(
        encoded.pixel_values[0], pixels_of(row.images[0], encoder.image_plan)
    )
    bare = encoder.encode(row, max_tokens=500, overlong="error", with_pixels=False)
    np.testing.assert_array_equal(bare.input_ids, encoded.input_ids)
    assert bare.pixel_values == []


def test_several_images_in_reading_order(tmp_path: Path) -> None:
    turns = (Turn("user", ("One ", 1, " or ", 0, 1, "?")), Turn("assistant", ("Two.",)))
    encoder, row = make_encoder(), sample(tmp_path, turns, number=2)
    encoded = encoder.encode(row, max_tokens=500, overlong="error")
    assert encoded.num_image_tokens == 12
    first, second = (pixels_of(image, encoder.image_plan) for image in row.images)
    for seen, expected in zip(encoded.pixel_values, (second, first, second), strict=True):
        np.testing.assert_array_equal(seen, expected)


def test_prompt_is_the_training_ids_before_the_answer(tmp_path: Path) -> None:
    for name, tokenizer in (("vicuna_v1", llama_tokenizer()), ("gemma", gemma_tokenizer())):
        encoder, row = make_encoder(name, tokenizer), sample(tmp_path)
        encoded = encoder.encode(row, max_tokens=500, overlong="error")
        prompt = encoder.encode_prompt(row.turns[:1], row.images)
        assert not prompt.target_mask.any()
        answer = int(np.flatnonzero(encoded.target_mask)[0])
        np.testing.assert_array_equal(prompt.input_ids, encoded.input_ids[:answer])
        loaded = [Image.open(image.path) for image in row.images]
        again = encoder.encode_prompt(row.turns[:1], loaded)
        np.testing.assert_array_equal(again.pixel_values[0], prompt.pixel_values[0])


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_overlong_rows_are_refused(tmp_path: Path, policy: Any) -> None:
    encoder, row = make_encoder(), sample(tmp_path)
    total = encoder.count_tokens(row)
    encoder.encode(row, max_tokens=total, overlong=policy)
    with pytest.raises(RowError) as caught:
        encoder.encode(row, max_tokens=total - 1, overlong=policy)
    assert caught.value.reason == "overlong"
    assert caught.value.what == f"1 image = 4 + {total - 4} text tokens > {total - 1}"
    assert caught.value.where == "t.jsonl:1 (id s1)"


def test_truncation_cuts_text_but_never_an_image(tmp_path: Path) -> None:
    turns = (
        *TURNS,
        Turn("user", ("And ", 1, "?")),
        Turn("assistant", ("A cat and a dog and a bus.",)),
    )
    encoder, row = make_encoder(), sample(tmp_path, turns, number=2)
    whole = encoder.tokenise(row)
    total, second = whole.ids.size, whole.image_starts[1]
    for limit in range(total, 0, -1):
        try:
            cut = fit(whole, max_tokens=limit, policy="truncate_text")
        except RowError as error:
            assert error.reason == "overlong_no_target"
            assert not whole.mask[1:limit].any()
            continue
        inside = second < limit < second + 4
        assert cut.ids.size == (second if inside else limit)
        assert int((cut.ids == encoder.image_token_id).sum()) == cut.num_image_tokens
        assert cut.truncated == total - cut.ids.size
        np.testing.assert_array_equal(cut.ids, whole.ids[: cut.ids.size])
    encoded = encoder.encode(row, max_tokens=second + 3, overlong="truncate_text")
    assert len(encoded.pixel_values) == 1
    assert encoded.num_image_tokens == 4


def test_row_without_a_target_is_refused(tmp_path: Path) -> None:
    row = sample(tmp_path, (TURNS[0], Turn("assistant", ("",))))
    with pytest.raises(RowError) as caught:
        make_encoder().encode(row, max_tokens=500, overlong="drop")
    assert caught.value.reason == "no_target"


def test_an_images_error_names_row_and_image(tmp_path: Path) -> None:
    row = sample(tmp_path)
    row.images[0].path.write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        make_encoder().encode(row, max_tokens=500, overlong="drop")
    assert caught.value.reason == "image_empty"
    assert caught.value.where == "t.jsonl:1 (id s1)"
    assert "0.jpg" in caught.value.what


def test_more_marks_than_images_is_refused(tmp_path: Path) -> None:
    row = replace(sample(tmp_path), images=())
    with pytest.raises(RowError) as caught:
        make_encoder().tokenise(row)
    assert caught.value.reason == "image_count_mismatch"


def test_special_tokens_in_text_are_encoded_and_reported() -> None:
    encoder = make_encoder()
    turns = (Turn("user", ("What ends it?",)), Turn("assistant", ("The mark </s> ends it.",)))
    row = Sample(id="1", source="s", where="w", turns=turns)
    ids = encoder.tokenise(row).ids
    assert int((ids == encoder.tokenizer.eos_token_id).sum()) == 2
    assert encoder.special_text(turns[1].text) == ["</s>"]
    assert encoder.special_text(turns[0].text) == []


def test_text_cannot_forge_an_image() -> None:
    tokenizer = llama_tokenizer(extra=("<picture>",))
    encoder = make_encoder(
        tokenizer=tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<picture>")
    )
    turns = (Turn("user", ("See <picture> here",)), Turn("assistant", ("No.",)))
    with pytest.raises(RowError) as caught:
        encoder.tokenise(Sample(id="1", source="s", where="w", turns=turns))
    assert caught.value.reason == "image_token_in_text"


def test_template_must_fit_the_tokenizer() -> None:
    with pytest.raises(TemplateError, match="im_start"):
        make_encoder("chatml")
    make_encoder("chatml", llama_tokenizer(extra=("<|im_start|>", "<|im_end|>")))


def test_plan_must_fit_the_tower() -> None:
    with pytest.raises(DataError, match="one size only"):
        make_encoder(grid=VisionGrid(patch_px=14, fixed_size_px=336))


def test_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TemplateError, match="fast backend"):
        replace(make_encoder(), tokenizer=Slow())


def test_state_survives_and_is_plain_data(tmp_path: Path) -> None:
    import json

    encoder = make_encoder(system="Be brief.")
    state = json.loads(json.dumps(encoder.to_state()))
    again = Encoder.from_state(state, encoder.tokenizer)
    assert again.to_state() == encoder.to_state()
    assert again == encoder
    row = sample(tmp_path)
    np.testing.assert_array_equal(again.tokenise(row).ids, encoder.tokenise(row).ids)
    pickled = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(pickled.tokenise(row).ids, encoder.tokenise(row).ids)


def test_stop_ids() -> None:
    assert make_encoder().stop_token_ids == (2,)
    assert make_encoder("plain").stop_token_ids == (2, 13)  # 13 is the newline byte's piece
    gemma = gemma_tokenizer()
    expected = tuple(gemma.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    assert make_encoder("gemma", gemma).stop_token_ids == expected


def test_state_left_in_the_tokenizer_by_others_does_no_harm(tmp_path: Path) -> None:
    encoder, row = make_encoder(), sample(tmp_path)
    expected = encoder.tokenise(row).ids
    encoder.tokenizer.backend_tokenizer.enable_truncation(3)
    encoder.tokenizer.backend_tokenizer.enable_padding(length=900)
    np.testing.assert_array_equal(encoder.tokenise(row).ids, expected)


def byte_level(*, trim_offsets: bool) -> Any:
    """A byte-level tokenizer without merges: one token a byte, a blank is one too."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: k for k, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("answer", ["yes", " yes ", "   ", "公园 里", "🙂 ok 👍🏽", "\n\n a"])
def test_mask_of_byte_level_tokenizers_is_exact(trim_offsets: bool, answer: str) -> None:
    # Blanks around every boundary: tokenizers that report tokens without their blanks ("trimmed"
    # offsets) must not move the mask.
    template = TEMPLATES.get("vicuna_v1").model_copy(
        update={
            "markers": (),
            "stop": (),
            "answer_cue": "A:  ",
            "answer_open": "",
            "answer_close": " .",
            "answer_gap": "  ",
        }
    )
    encoder = make_encoder(
        tokenizer=byte_level(trim_offsets=trim_offsets), template=template, image_token_id=999
    )
    turns = (Turn("user", ("q ",)), Turn("assistant", (answer,)))
    tokens = encoder.tokenise(Sample(id="1", source="s", where="w", turns=(*turns, *turns)))
    answers = text_of(encoder, tokens.ids, tokens.mask)
    assert answers == f"{answer} .{answer} ."
    assert int(tokens.mask.sum()) == 2 * len(f"{answer} .".encode())


def test_plan_and_grid_decide_the_number_of_tokens() -> None:
    image = Image.new("RGB", (100, 50))
    for side, downsample, expected in ((28, 1, 4), (56, 1, 16), (56, 2, 4)):
        encoder = make_encoder(
            image_plan=make_plan(size_px=side),
            grid=VisionGrid(patch_px=14, downsample=downsample),
        )
        prompt = encoder.encode_prompt((Turn("user", (0, "What?")),), [image])
        assert prompt.num_image_tokens == expected
