"""The preview shows what training uses, token by token."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_encoder, make_images
from PIL import Image

from vistune.data.image import load
from vistune.data.preview import ImagePiece, Preview, TextPiece, preview_sample
from vistune.data.preview_page import to_html
from vistune.errors import RowError
from vistune.types import ImageRef, Sample, Turn

ANSWER = "公园里有三只狗 🙂 <b>bold</b> & </s> end."


def sample(folder: Path) -> Sample:
    (name,) = make_images(folder, 1)
    turns = (Turn("user", (0, "\nWhat is <i>this</i>?")), Turn("assistant", (ANSWER,)))
    image = ImageRef(path=folder / name, name=name)
    return Sample("row <1>", "train", "t.jsonl:1", turns, (image,), ("leading_answer_dropped",))


@pytest.fixture
def preview(tmp_path: Path) -> Preview:
    return preview_sample(make_encoder(), sample(tmp_path), max_tokens=300, overlong="error")


def test_pieces_are_the_tokens_of_training(preview: Preview) -> None:
    encoder = make_encoder()
    tokens = encoder.tokenise(preview.sample)
    ids: list[int] = []
    mask: list[bool] = []
    for piece in preview.pieces:
        if isinstance(piece, ImagePiece):
            ids.extend([encoder.image_token_id] * piece.num_tokens)
            mask.extend([False] * piece.num_tokens)
        else:
            ids.extend(piece.ids)
            mask.extend([piece.is_target] * len(piece.ids))
    assert ids == tokens.ids.tolist()
    assert mask == tokens.mask.tolist()
    assert (preview.num_tokens, preview.num_image_tokens) == (len(ids), 4)
    assert preview.num_targets == sum(mask)


def test_text_is_readable(preview: Preview) -> None:
    # The legacy tokenizer writes a blank behind a special token.
    assert preview.target_text.replace("</s>  end", "</s> end") == f" {ANSWER}</s>"
    assert all("\ufffd" not in p.text for p in preview.pieces if isinstance(p, TextPiece))
    specials = [p.text for p in preview.pieces if isinstance(p, TextPiece) and p.is_special]
    assert specials == ["<s>", "</s>", "</s>"]
    assert preview.remarks == ("leading_answer_dropped", "special_token_in_text")


def test_picture_is_what_the_tower_gets(preview: Preview) -> None:
    plan = make_encoder().image_plan
    expected = plan.to_square(load(preview.sample.images[0], plan))
    page = to_html([preview], title="A & B")
    found = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert found is not None
    shown = Image.open(io.BytesIO(base64.b64decode(found[1])))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))


def test_page_stands_alone_and_escapes_what_it_shows(preview: Preview) -> None:
    page = to_html([preview, preview], title="A & B")
    assert "<title>A &amp; B</title>" in page
    assert page.count("<section>") == 2
    assert "<b>" not in page
    assert "<i>" not in page
    assert "row &lt;1&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "4 image tokens" in page


def test_row_that_is_not_trained_on_says_why(tmp_path: Path) -> None:
    row = sample(tmp_path)
    with pytest.raises(RowError) as caught:
        preview_sample(make_encoder(), row, max_tokens=20, overlong="drop")
    assert caught.value.reason == "overlong"
    cut = preview_sample(make_encoder(), row, max_tokens=80, overlong="truncate_text")
    assert cut.num_truncated > 0
    assert "truncated" in cut.remarks
