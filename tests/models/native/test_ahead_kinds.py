"""Prompts of Gemma 3 and PaliGemma: ids, masks and pixels as transformers' processors make them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent))

from native_dirs import write_native

from vistune.assembly import Assembled, draw, load_assembled
from vistune.checkpoint.layouts import describe_directory
from vistune.data.collate import pack_row
from vistune.data.template import PrefixTemplate, load_template
from vistune.errors import DataError, ModelError, RowError
from vistune.models.native import NativeVLM
from vistune.recipe import Recipe
from vistune.types import EncodedSample, Sample, Turn

PICTURES = [
    Image.fromarray(np.random.RandomState(i).randint(0, 255, (*size, 3), dtype=np.uint8))
    for i, size in enumerate(((50, 90), (40, 21)))
]


def merging(folder: Path, **named: str) -> Any:
    """Gives a directory's tokenizer a token for two line breaks, and names for its marks."""
    # It takes the place of a byte that no text has, so that all other ids stay.
    alphabet = ["ĊĊ" if c == "Ā" else c for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
    old = transformers.AutoTokenizer.from_pretrained(folder)
    pieces = {piece: index for index, piece in enumerate(alphabet)}
    specials = sorted(old.added_tokens_decoder.items())
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = [token.content for _, token in specials]
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named.pop("bos_token", None),
        eos_token=named.pop("eos_token", "<|im_end|>"),
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    made.chat_template = old.chat_template or None
    made.save_pretrained(folder)
    return made


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembled, Any]:
    folder = write_native("gemma3", tmp_path_factory.mktemp("g") / "m")
    tokenizer = merging(
        folder,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    loaded = load_assembled(folder)
    assert loaded.encoder.layout is not None
    processor = transformers.Gemma3Processor(
        loaded.encoder.layout.image_processor, tokenizer, image_seq_length=4
    )
    return loaded, processor


def test_gemma3_line_breaks_join_their_neighbours(gemma3: tuple[Assembled, Any]) -> None:
    loaded, processor = gemma3
    encoder = loaded.encoder
    parts = ("see\n", 0, "\nand\n", 1, "then?")
    ours = encoder.encode_prompt([Turn("user", parts)], PICTURES)
    content = [
        {"type": "image"} if isinstance(p, int) else {"type": "text", "text": p} for p in parts
    ]
    text = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    out = processor(images=PICTURES, text=text, return_tensors="np")
    double = encoder.tokenizer.convert_tokens_to_ids("ĊĊ")
    assert (ours.input_ids == double).sum() == 2  # in front of both images
    assert out["input_ids"][0].tolist() == ours.input_ids.tolist()
    np.testing.assert_array_equal(out["pixel_values"], np.concatenate(ours.pixel_values))
    image = loaded.model.image_token_id
    assert (out["token_type_ids"][0] == (ours.input_ids == image)).all()


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembled, Any]:
    folder = write_native("paligemma", tmp_path_factory.mktemp("p") / "m")
    tokenizer = merging(folder, bos_token="<bos>", eos_token="<eos>", image_token="<image>")
    loaded = load_assembled(folder)
    assert loaded.encoder.layout is not None
    images = loaded.encoder.layout.image_processor
    images.image_seq_length = 16
    return loaded, transformers.PaliGemmaProcessor(images, tokenizer)


@pytest.mark.parametrize("number", [1, 2])
def test_paligemma_prompts_are_the_processors(
    paligemma: tuple[Assembled, Any], number: int
) -> None:
    loaded, processor = paligemma
    parts = (*range(number), "\nanswer en what is it?")
    turns = (Turn("user", parts), Turn("assistant", ("a cat",)))
    images: Any = tuple(PICTURES[:number])
    sample = Sample(id="s", source="s", where="w", turns=turns, images=images)
    ours = loaded.encoder.encode(sample, max_tokens=999, overlong="error")
    text = "<image>" * number + "answer en what is it?"
    out = processor(images=[list(images)], text=[text], suffix=["a cat"], return_tensors="np")
    assert out["input_ids"][0].tolist() == ours.input_ids.tolist()
    types = out["token_type_ids"][0]
    assert types.tolist() == (np.arange(types.size) >= ours.prompt_tokens).tolist()
    assert (out["labels"][0] != -100).tolist() == ours.target_mask.tolist()
    np.testing.assert_array_equal(out["pixel_values"], np.stack(ours.pixel_values)[:, 0])


def test_a_text_has_its_begin_in_front(paligemma: tuple[Assembled, Any]) -> None:
    encoder = paligemma[0].encoder
    prompt = encoder.encode_prompt([Turn("user", ("what?",))])
    bos = encoder.tokenizer.bos_token_id
    assert prompt.input_ids[0] == bos and (prompt.input_ids == bos).sum() == 1
    assert prompt.prompt_tokens == prompt.input_ids.size


def test_prompts_whose_length_is_not_said_are_refused(paligemma: tuple[Assembled, Any]) -> None:
    model: Any = paligemma[0].model
    assert isinstance(model, NativeVLM)
    ids = np.arange(5, dtype=np.int64)
    sample = EncodedSample(id="a", source="", input_ids=ids, target_mask=ids > 3)
    with pytest.raises(ModelError, match="0 lengths for 1 samples"):
        model.hidden_states(**pack_row([sample]).model_inputs())
    empty = pack_row([])
    assert torch.isfinite(model.hidden_states(**empty.model_inputs())).all()


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((Turn("system", ("be kind",)), Turn("user", ("what?",))), "system_not_supported"),
        (
            (Turn("user", ("a",)), Turn("assistant", ("b",)), Turn("user", ("c",))),
            "history_not_supported",
        ),
    ],
)
def test_what_a_prefix_has_no_place_for(turns: tuple[Turn, ...], reason: str) -> None:
    template = PrefixTemplate(name="paligemma")
    assert load_template(template.model_dump(mode="json")) == template
    with pytest.raises(RowError) as caught:
        template.segments(turns)
    assert caught.value.reason == reason


def test_templates_and_models_agree_on_the_direction(tmp_path: Path) -> None:
    for kind, template in (("gemma3", "paligemma"), ("paligemma", "chatml")):
        model = {"from_checkpoint": str(write_native(kind, tmp_path / kind))}
        tree = {
            "name": "x",
            "model": model,
            "data": {"train": [{"path": "x.json"}], "template": template},
            "batch": {"samples": 1},
            "train": {"steps": 1},
        }
        with pytest.raises(DataError, match=r"data\.template=auto"):
            draw(Recipe.model_validate(tree))


def test_directories_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_native("gemma3", tmp_path / "m")
    file = folder / "preprocessor_config.json"
    rewrite(file, do_pan_and_scan=True)
    with pytest.raises(ModelError, match="pan_and_scan"):
        describe_directory(folder)
    rewrite(file, do_pan_and_scan=False, size={"height": 32, "width": 32})
    with pytest.raises(ModelError, match="size of an image"):
        describe_directory(folder)
    rewrite(file, size={"height": 16, "width": 16})
    layout: Any = load_assembled(folder).encoder.layout
    assert layout.limited(4) == layout
    with pytest.raises(DataError, match="4 tokens"):
        layout.limited(3)
    assert [view.size for view in layout.pictures(PICTURES[0])] == [(16, 16)]
