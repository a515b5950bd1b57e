"""Models that see images in tiles: ids and pixels of the public processors, and clear refusals."""

from __future__ import annotations

import copy
import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing

sys.path.insert(0, str(Path(__file__).parent))

from native_dirs import write_native
from tile_kinds import TILE_KINDS

from vistune.assembly import Assembled, load_assembled
from vistune.data.count import TokenCounter
from vistune.data.layout import ImageLayout, PatchLayout, RowBreakLayout, SliceLayout
from vistune.data.layout.slices import Slicing
from vistune.errors import DataError, ImageError, ModelError, RowError
from vistune.types import ImageRef, Sample, Turn

EXTREMES = [(1, 1), (1, 400), (400, 1), (16, 16), (17, 16), (64, 64), (65, 64), (31, 500), (700, 9)]
"""(height, width): a dot, lines, whole tiles and one pixel more."""


def some_sizes(number: int, seed: int) -> list[tuple[int, int]]:
    """Returns the extremes and as many drawn sizes, small ones and large ones."""
    draw = random.Random(seed)
    sides = [draw.choice((4, 30, 90, 250)) for _ in range(2 * number)]
    drawn = [draw.randint(1, side) for side in sides]
    return [*EXTREMES, *zip(drawn[::2], drawn[1::2], strict=True)]


@pytest.fixture(scope="module", params=sorted(TILE_KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    torch.set_num_threads(1)
    return load_assembled(write_native(kind, tmp_path_factory.mktemp("n") / kind))


@pytest.fixture(scope="module")
def processor(kind: str, loaded: Assembled) -> Any:
    """Transformers' own processor, without the part for videos, which needs torchvision."""
    layout, tokenizer = loaded.encoder.layout, copy.deepcopy(loaded.encoder.tokenizer)
    assert layout is not None
    values: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if kind == "internvl":
        tokenizer.start_image_token, tokenizer.end_image_token = "<img>", "</img>"
        tokenizer.start_image_token_id, tokenizer.end_image_token_id = 0, 0
        tokenizer.context_image_token, tokenizer.video_token = "<IMG_CONTEXT>", "<video>"
        tokenizer.context_image_token_id = loaded.encoder.image_token_id
        values |= {"image_seq_length": 4, "video_processor": None}
        name = "InternVLProcessor"
    elif kind == "llava_onevision":
        more = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
        values |= {"num_image_tokens": 16, "video_processor": None, **more}
        name = "LlavaOnevisionProcessor"
    elif kind in ("mistral3", "pixtral"):
        return Pixtral(layout.image_processor, tokenizer, merge=2 if kind == "mistral3" else 1)
    elif kind == "paddleocr_vl":
        tokenizer.image_token = "<|IMAGE_PLACEHOLDER|>"
        tokenizer.image_token_id = loaded.encoder.image_token_id
        name = "PaddleOCRVLProcessor"
    elif kind == "minicpmv4_6":
        marks = {"image": "image", "slice": "slice", "image_id": "image_id"}
        for name, mark in marks.items():
            setattr(tokenizer, f"{name}_start_token", f"<{mark}>")
            setattr(tokenizer, f"{name}_end_token", f"</{mark}>")
        tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
        tokenizer.image_token_id, tokenizer.video_token_id = loaded.encoder.image_token_id, 0
        videos = SimpleNamespace(slice_mode=True, downsample_mode="16x")
        values |= {"video_processor": videos}
        name = "MiniCPMV4_6Processor"
    else:  # SmolVLM's own writes images the same, and needs a package for its videos
        values |= {"image_seq_len": 4}
        name = "Idefics3Processor"
    made = type(name, (getattr(transformers, name),), {"check_argument_for_proper_class": _any})
    return made(image_processor=layout.image_processor, **values)


@dataclass(frozen=True)
class Pixtral:
    """What Pixtral's processor is documented to do; the class itself asks for torchvision."""

    image_processor: Any
    tokenizer: Any
    merge: int

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, **kwargs))

    def __call__(self, *, images: Any, text: list[str], **_: Any) -> dict[str, Any]:
        written = text[0]
        shown = []
        merge, side = self.merge, 4 * self.merge
        for image in images[0]:
            out = self.image_processor(images=[image], patch_size=side, return_tensors="np")
            pixels = out["pixel_values"][0]
            rows, columns = pixels.shape[1] // side, pixels.shape[2] // side
            block = (("[I]" * columns + "[IMG_BREAK]") * rows).removesuffix("[IMG_BREAK]")
            written = written.replace("[IMG]", f"{block}[IMG_END]", 1)
            patches = pixels.reshape(3, rows * merge, 4, columns * merge, 4)
            patches = patches.transpose(1, 3, 0, 2, 4)
            shown.append(patches.reshape(-1, 3, 4, 4))
        ids = self.tokenizer(written.replace("[I]", "[IMG]"), add_special_tokens=False)
        return {"input_ids": [ids["input_ids"]], "pixel_values": np.concatenate(shown)}


def _any(*_: Any) -> None:
    """Processors check the classes of their parts, also of those that are left out here."""


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    drawn = np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def parts_of(message: tuple[int | str, ...]) -> list[dict[str, str]]:
    return [
        {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
        for part in message
    ]


def as_inputs(kind: str, pixels: Any) -> Any:
    """Returns a processor's pixels with the axis in front that a layout counts."""
    if kind in ("internvl", "paddleocr_vl", "mistral3", "pixtral"):
        return pixels
    if kind != "minicpmv4_6":
        return pixels[0]
    line = pixels[0]  # patches side by side
    return line.reshape(*line.shape[:2], -1, line.shape[1]).transpose(2, 0, 1, 3)


def theirs(processor: Any, turns: list[Turn], images: list[Image.Image], **kwargs: Any) -> Any:
    messages = [{"role": turn.speaker, "content": parts_of(turn.parts)} for turn in turns]
    text = processor.apply_chat_template(messages, tokenize=False, **kwargs)
    return processor(images=[images], text=[text], return_tensors="np", do_pad=True)


def test_ids_and_pixels_are_the_processors(kind: str, loaded: Assembled, processor: Any) -> None:
    for index, size in enumerate(some_sizes(30, seed=3)):
        turns = [Turn("user", (0, "what?") if index % 2 else ("look: ", 0))]
        image = picture(size)
        is_small = kind in ("mistral3", "pixtral") and max(size) <= (8 if kind == "mistral3" else 4)
        is_line = kind in ("mistral3", "pixtral") and max(size) > 64 * min(size)
        if is_small or is_line or (kind == "paddleocr_vl" and max(size) > 200 * min(size)):
            if not is_small:
                with pytest.raises(ValueError, match=r"aspect ratio|height=0|width=0"):
                    theirs(processor, turns, [image], add_generation_prompt=True)
            with pytest.raises(ImageError, match=r"200 times|would vanish|a single token"):
                loaded.encoder.encode_prompt(turns, [image])
            continue
        out = theirs(processor, turns, [image], add_generation_prompt=True)
        ours = loaded.encoder.encode_prompt(turns, [image])
        assert np.array_equal(out["input_ids"][0], ours.input_ids), size
        pixels = out["pixel_values"]
        assert np.array_equal(as_inputs(kind, pixels), ours.pixel_values[0]), size


def test_a_conversation_with_images_is_the_processors(
    kind: str, loaded: Assembled, processor: Any
) -> None:
    turns = [
        Turn("system", ("be brief",)),
        Turn("user", (0, "what?")),
        Turn("assistant", ("a thing",)),
        Turn("user", ("and ", 1, "this, or ", 2, "\nthat?")),
        Turn("assistant", ("both",)),
    ]
    images = [picture(size, seed) for seed, size in enumerate(((50, 90), (200, 40), (9, 9)))]
    out = theirs(processor, turns, images)
    content: Any = tuple(images)
    sample = Sample(id="s", source="s", where="w", turns=tuple(turns), images=content)
    ours = loaded.encoder.encode(sample, max_tokens=10**6, overlong="error")
    assert np.array_equal(out["input_ids"][0], ours.input_ids)
    tokenizer = loaded.encoder.tokenizer
    learnt = tokenizer.decode(ours.input_ids[ours.target_mask])
    assert learnt == {
        "internvl": "a thing<|im_end|>both<|im_end|>",
        "minicpmv4_6": "a thing<|im_end|>both<|im_end|>",
        "paddleocr_vl": "a thing<|im_end|>both<|im_end|>",
        "mistral3": "a thing<|im_end|>both<|im_end|>",
        "pixtral": "a thing<|im_end|>both<|im_end|>",
        "llava_onevision": "\na thing<|im_end|>\nboth<|im_end|>",
    }.get(kind, " a thing<end_of_utterance> both<end_of_utterance>")
    end = "<end_of_utterance>" if kind in ("idefics3", "smolvlm") else "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(end) in loaded.encoder.stop_token_ids
    pixels = out["pixel_values"]
    # LLaVA-OneVision shows several images whole: one tile each.
    pixels = pixels[:, 0] if kind == "llava_onevision" else as_inputs(kind, pixels)
    assert np.array_equal(pixels, np.concatenate(ours.pixel_values))


def num_tiles(layout: ImageLayout, size: tuple[int, int]) -> int:
    if isinstance(layout, (PatchLayout, RowBreakLayout)):
        return 1
    if isinstance(layout, SliceLayout):  # its inputs are patches
        return len(Slicing(*layout.shape(*size)).tiles())
    return layout.num_inputs(*size)


def test_a_bound_on_tokens_holds(loaded: Assembled) -> None:
    layout = loaded.encoder.layout
    assert layout is not None
    sizes = some_sizes(60, seed=5)
    if isinstance(layout, PatchLayout):
        pytest.skip("tests/data/layout/test_patches.py has it")
    if isinstance(layout, RowBreakLayout):
        sizes = [size for size in sizes if max(size) <= 9 * min(size) and min(size) > 8]
    if isinstance(layout, SliceLayout):  # lines have many tokens, cut or not: they are refused
        with pytest.raises(ImageError, match="even when it is not cut"):
            layout.limited(20).block(400, 1)
        sizes = [size for size in sizes if max(size) <= 4 * min(size)]
    most = max(layout.num_tokens(*size) for size in sizes)
    smallest = None
    for bound in range(most, 0, -1):
        try:
            limited = layout.limited(bound)
        except DataError as error:
            smallest = bound
            assert str(bound + 1) in str(error)
            break
        assert type(layout).model_validate_json(limited.model_dump_json()) == limited
        for size in sizes if bound % 5 == 0 else sizes[:12]:
            block = limited.block(*size)
            assert block.size == limited.num_tokens(*size) <= bound
    assert smallest is not None and smallest + 1 < most
    for bound in (smallest + 1, most // 2):
        limited = layout.limited(bound)
        for size in sizes[:20]:
            pixels = limited.pixels(picture(size))
            assert pixels.shape[0] == limited.num_inputs(*size)
            assert len(limited.pictures(picture(size))) == num_tiles(limited, size)


def test_a_bounded_model_takes_what_it_is_given(kind: str, tmp_path: Path) -> None:
    from vistune.data.collate import pack_row

    loaded = load_assembled(write_native(kind, tmp_path / "m"))
    layout = loaded.encoder.layout
    assert layout is not None
    bounds = {"internvl": 14, "llava_onevision": 40}
    limited = layout.limited(bounds.get(kind, 40))
    encoder: Any = type(loaded.encoder)(**{**vars_of(loaded.encoder), "layout": limited})
    samples = []
    for index, size in enumerate(((90, 200), (300, 20), (60, 60))):
        turns = (Turn("user", (0, "?")), Turn("assistant", ("x",)))
        sample = Sample(
            id=str(index),
            source="s",
            where="w",
            turns=turns,
            images=(picture(size),),  # type: ignore[arg-type]
        )
        samples.append(encoder.encode(sample, max_tokens=10**6, overlong="error"))
    row = pack_row(samples)
    with torch.no_grad():
        hidden = loaded.model.hidden_states(**row.model_inputs())
    assert hidden.shape[1] == sum(sample.input_ids.size for sample in samples)
    assert bool(hidden.isfinite().all())


def vars_of(encoder: Any) -> dict[str, Any]:
    return {name: getattr(encoder, name) for name in encoder.__dataclass_fields__}


def test_the_pictures_are_the_image(loaded: Assembled) -> None:
    layout = loaded.encoder.layout
    assert layout is not None
    image = Image.new("RGB", (90, 50), (200, 30, 90))
    tiles = layout.pictures(image)
    assert len(tiles) == num_tiles(layout, (50, 90))
    # Padding is black in some; what shows the image shows its colour, to one level of rounding.
    middle = [np.asarray(tile)[tile.height // 2, tile.width // 2].astype(int) for tile in tiles]
    same = [np.abs(pixel - (200, 30, 90)).max() <= 1 for pixel in middle]
    assert sum(same) >= min(2, len(tiles))


def test_the_preview_names_the_tiles_of_every_image(kind: str, loaded: Assembled) -> None:
    from vistune.data.preview import preview_sample
    from vistune.data.preview_page import to_html

    for sizes in ([(50, 90)], [(90, 90), (200, 30)]):
        images: Any = tuple(picture(size) for size in sizes)
        turns = (Turn("user", (*range(len(sizes)), "?")), Turn("assistant", ("x",)))
        sample = Sample(id="s", source="s", where="w", turns=turns, images=images)
        limits: Any = {"max_tokens": 10**6, "overlong": "error"}
        layout = loaded.encoder.layout
        assert layout is not None
        expected = [num_tiles(layout.among(len(sizes)), size) for size in sizes]
        shown = preview_sample(loaded.encoder, sample, **limits)
        assert [len(tiles) for tiles in shown.images] == expected
    files: Any = tuple(ImageRef(name=f"{i}.png", path=Path(f"{i}.png")) for i in range(2))
    page = to_html([replace(shown, sample=replace(sample, images=files))], title="T")
    assert page.count("<figure>") == 2
    # Several images, or all, are one tile.
    whole = kind in ("llava_onevision", "paddleocr_vl", "mistral3", "pixtral")
    assert ("tiles, " in page) == (not whole)


def test_counting_agrees_with_encoding(loaded: Assembled) -> None:
    counter = TokenCounter(loaded.encoder)
    for number in (0, 1, 2, 12):  # a template may number images: 10 and 11 have two digits
        drawn = some_sizes(number, seed=number)[-number:] if number else []
        sizes = [(height + 8, width + 8) for height, width in drawn]
        asked: tuple[int | str, ...] = ("look ", *range(number), "which?")
        turns = (
            Turn("user", asked),
            Turn("assistant", ("that one",)),
            Turn("user", ("why?",)),
            Turn("assistant", ("because",)),
        )
        counts = counter.count(turns, sizes)
        tokens = loaded.encoder.tokenise_turns(turns, sizes)
        assert counts.tokens == tokens.ids.size
        assert counts.image_tokens == tokens.num_image_tokens


def test_shrinking_is_refused_where_it_saves_nothing(kind: str, loaded: Assembled) -> None:
    layout = loaded.encoder.layout
    assert layout is not None
    published: dict[str, dict[str, int]] = {
        "internvl": {"tile_height_px": 448, "tile_width_px": 448, "max_tiles": 12},
        "idefics3": {"tile_px": 364, "longest_px": 1456},
        "smolvlm": {"tile_px": 512, "longest_px": 2048},
        "minicpmv4_6": {"patch_px": 14, "slice_px": 448},
        "mistral3": {"patch_px": 14, "longest_px": 1540},
        "pixtral": {"patch_px": 16, "longest_px": 1024},
    }
    if kind not in published:
        pytest.skip("as for kinds that are not skipped")
    encoder = replace(loaded.encoder, layout=layout.model_copy(update=published[kind]))
    if kind not in ("idefics3", "smolvlm"):
        encoder.require_policy("shrink_image")
        return
    with pytest.raises(DataError, match="whatever its size"):
        encoder.require_policy("shrink_image")


def test_turns_left_out_may_show_the_rest_in_another_way(kind: str, loaded: Assembled) -> None:
    turns = (
        Turn("user", (0, "?")),
        Turn("assistant", ("x",)),
        Turn("user", (1, "?")),
        Turn("assistant", ("y",)),
    )
    images: Any = (picture((40, 40)), picture((41, 40)))
    sample = Sample(id="s", source="s", where="w", turns=turns, images=images)
    encoder: Any = loaded.encoder
    alone = replace(sample, turns=turns[:2], images=images[:1])
    first = encoder.encode(alone, max_tokens=10**6, overlong="error")
    whole = encoder.encode(sample, max_tokens=10**6, overlong="error").input_ids.size
    if kind == "llava_onevision":  # one image is cut, so the first round alone is the longer one
        assert first.input_ids.size > whole
        with pytest.raises(RowError, match="shown in another way"):
            encoder.encode(sample, max_tokens=whole - 18, overlong="truncate_text")
        return
    kept = encoder.encode(sample, max_tokens=whole - 1, overlong="drop_turn")
    assert np.array_equal(kept.input_ids, first.input_ids)
    assert len(kept.pixel_values) == len(kept.image_shapes) == 1
    cut = encoder.encode(sample, max_tokens=first.input_ids.size + 9, overlong="truncate_text")
    assert len(cut.pixel_values) == 1


def test_files_that_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    folder = write_native(kind, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    key = "image_token_index" if "image_token_index" in config else "image_token_id"
    right = config[key]

    def refused(file: str, values: dict[str, Any], match: str) -> None:
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps({**json.loads(before), **values}))
        with pytest.raises(ModelError, match=match):
            load_assembled(folder)
        (folder / file).write_text(before)

    refused("config.json", {key: right - 1}, "disagree on the id")
    text = {**config["text_config"], "vocab_size": right}
    refused("config.json", {"text_config": text}, "embedding table ends")
    processor = "preprocessor_config.json"
    if kind in ("mistral3", "pixtral"):
        refused(processor, {"size": {"height": 32}}, "is not given by its")
        return
    if kind == "paddleocr_vl":
        refused(processor, {"patch_size": 8}, "disagree on the patches")
        refused(processor, {"size": {"height": 32}}, "is not given by its")
        return
    if kind == "minicpmv4_6":
        refused(processor, {"downsample_mode": "4x"}, "form of MiniCPM-V is not known")
        return
    key = "max_image_size" if kind in ("idefics3", "smolvlm") else "size"
    wrong = {"longest_edge": 32} if key != "size" else {"height": 32, "width": 32}
    refused(processor, {key: wrong}, "disagree on the size of a tile")
    refused(processor, {key: {"shortest_edge": 16}}, "is not given by its")


@pytest.mark.skipif("minicpmv4_6" not in TILE_KINDS, reason="this version is the refused one")
def test_a_version_that_computes_wrongly_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_native("minicpmv4_6", tmp_path / "m")
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    with pytest.raises(ModelError, match=r"5\.23"):
        load_assembled(folder)


def test_the_begin_of_text_stands_in_front_once(tmp_path: Path) -> None:
    folder = write_native("internvl", tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    plain = tokenizer.chat_template
    for template in (plain, "{{ bos_token }}" + plain):  # processors add what is not written
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        encoder = load_assembled(folder).encoder
        ids = encoder.encode_prompt([Turn("user", ("hi",))], []).input_ids.tolist()
        assert ids.index(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_places_is_refused(tmp_path: Path) -> None:
    folder = write_native("smolvlm", tmp_path / "m")
    values = json.loads((folder / "preprocessor_config.json").read_text())
    values["size"] = {"longest_edge": 80}  # a fifth row
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="row_1_col_5"):
        load_assembled(folder)
