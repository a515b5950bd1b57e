"""What the model is shown and what it must learn to say, for a person to look at.

`preview_sample` gives it as data, `to_html` as one page that needs nothing else: the pictures as
the vision tower gets them, and the conversation token by token with the loss mask in colour. Both
come from the encoder that training uses; nothing is computed a second way.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.encode import Encoder, Overlong, Tokens, fit
from vistune.data.image import load
from vistune.errors import RowError
from vistune.types import Sample

_BROKEN = "\ufffd"  # what decoding gives for half a character


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A token, or the few tokens that only together make a character.

    Args:
        text: What it stands for.
        ids: Its token ids.
        is_target: Whether the model must learn to say it.
        is_special: Whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    is_target: bool
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class ImagePiece:
    """An image in the conversation.

    Args:
        index: Which of the sample's images.
        num_tokens: Tokens it takes.
    """

    index: int
    num_tokens: int


Piece: TypeAlias = TextPiece | ImagePiece


@dataclass(frozen=True)
class Preview:
    """A sample as the model is shown it.

    Args:
        sample: The sample.
        pieces: The conversation in order.
        images: The sample's images as the vision tower gets them, before normalisation.
        num_tokens: Tokens in all.
        num_image_tokens: Image tokens among them.
        num_targets: Target tokens among them.
        num_truncated: Tokens that were cut off the end.
        remarks: What a reader should know of this row, by short names.
    """

    sample: Sample
    pieces: tuple[Piece, ...]
    images: tuple[Image.Image, ...]
    num_tokens: int
    num_image_tokens: int
    num_targets: int
    num_truncated: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def target_text(self) -> str:
        """All that is learnt, as text."""
        return "".join(p.text for p in self.pieces if isinstance(p, TextPiece) and p.is_target)


def preview_sample(
    encoder: Encoder, sample: Sample, *, max_tokens: int, overlong: Overlong
) -> Preview:
    """Returns a sample as the model is shown it.

    Args:
        encoder: The run's encoder.
        sample: The sample.
        max_tokens: Tokens a row holds.
        overlong: What is done with longer ones.

    Raises:
        RowError: The sample would not be trained on; says why.
    """
    tokens = fit(encoder.tokenise(sample), max_tokens=max_tokens, policy=overlong)
    try:
        images = [load(image, encoder.image_plan) for image in sample.images]
    except RowError as error:
        raise error.at(f"{sample.where} (id {sample.id})") from error
    remarks = list(sample.notes)
    if encoder.special_text(sample.turns):
        remarks.append("special_token_in_text")
    if tokens.truncated:
        remarks.append("truncated")
    return Preview(
        sample=sample,
        pieces=tuple(_pieces(encoder, tokens)),
        images=tuple(encoder.image_plan.to_square(image) for image in images),
        num_tokens=int(tokens.ids.size),
        num_image_tokens=tokens.num_image_tokens,
        num_targets=int(tokens.mask[1:].sum()),
        num_truncated=tokens.truncated,
        remarks=tuple(remarks),
    )


def _pieces(encoder: Encoder, tokens: Tokens) -> Iterator[Piece]:
    at = 0
    runs = zip(tokens.image_starts, tokens.image_lengths, tokens.image_order, strict=True)
    for start, length, index in runs:
        yield from _text(encoder.tokenizer, tokens.ids[at:start], tokens.mask[at:start])
        yield ImagePiece(index=index, num_tokens=length)
        at = start + length
    yield from _text(encoder.tokenizer, tokens.ids[at:], tokens.mask[at:])


def _text(
    tokenizer: Any, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]
) -> Iterator[TextPiece]:
    # Decoders drop a blank in front of a text; behind another token they keep it.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    lead = len(_decode(tokenizer, anchor))
    special = set(tokenizer.all_special_ids)
    group: list[int] = []
    pairs = list(zip(ids.tolist(), mask.tolist(), strict=True))
    for k, (id, is_target) in enumerate(pairs):
        group.append(id)
        text = _decode(tokenizer, [*anchor, *group])[lead:]
        last = k + 1 == len(pairs) or pairs[k + 1][1] != is_target or pairs[k + 1][0] in special
        if text.endswith(_BROKEN) and len(group) < 8 and not last:
            continue  # half a character: the next token ends it
        yield TextPiece(text, tuple(group), is_target, id in special)
        group = []


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


_STYLE = """
body{font:15px/1.6 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;
color:#1c1c1e;background:#fff}
h1{font-size:1.3rem}h2{font-size:1rem;margin:2.2rem 0 .3rem}
.facts{color:#555;font-size:.85rem;margin:.1rem 0 .6rem}
.row{display:flex;gap:1rem;align-items:flex-start;flex-wrap:wrap}
figure{margin:0}figure img{max-width:14rem;image-rendering:auto;border:1px solid #ccc}
figcaption{font-size:.75rem;color:#555}
pre{flex:1 1 24rem;margin:0;padding:.7rem;white-space:pre-wrap;word-break:break-word;
font:13px/1.9 ui-monospace,monospace;background:#f6f6f7;border-radius:6px}
.p{color:#6b6b70}.p.o{background:#ececee}
.t{color:#0a3d1f;background:#bfe8cd}.t.o{background:#a5dcb8}
.s{font-weight:700}.i{color:#fff;background:#3a5ba9;border-radius:3px;padding:0 .3em}
.b{opacity:.45}
.key span{padding:0 .4em;margin-right:.6em}
@media (prefers-color-scheme:dark){body{color:#e8e8ea;background:#161618}pre{background:#202024}
.p{color:#9a9aa2}.p.o{background:#2a2a2f}.t{color:#d6f5e0;background:#1d5233}
.t.o{background:#256a42}.facts,figcaption{color:#aaa}}
"""
_KEY = (
    '<p class="key"><span class="p">shown</span><span class="t">learnt</span>'
    '<span class="p s">special token</span><span class="i">image</span></p>'
)


def to_html(previews: Sequence[Preview], *, title: str) -> str:
    """Returns one page with all previews; pictures are inside it.

    Args:
        previews: From `preview_sample`.
        title: Heading of the page.
    """
    head = html.escape(title)
    body = "\n".join(_section(preview) for preview in previews)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{head}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{head}</h1>{_KEY}\n{body}\n</body></html>\n"
    )


def _section(preview: Preview) -> str:
    sample = preview.sample
    facts = [
        html.escape(f"{sample.source}, {sample.where}"),
        f"{preview.num_tokens} tokens",
        f"{preview.num_image_tokens} image tokens",
        f"{preview.num_targets} target tokens",
    ]
    if preview.num_truncated:
        facts.append(f"{preview.num_truncated} tokens cut off")
    facts.extend(html.escape(remark) for remark in preview.remarks)
    figures = "".join(
        f'<figure><img alt="image {k + 1}" src="{_data_url(image)}">'
        f"<figcaption>{html.escape(sample.images[k].name)}: {image.width} x {image.height} px"
        "</figcaption></figure>"
        for k, image in enumerate(preview.images)
    )
    text = "".join(_span(piece, odd=k % 2 == 1) for k, piece in enumerate(preview.pieces))
    return (
        f"<section><h2>{html.escape(sample.id)}</h2>"
        f'<p class="facts">{" &middot; ".join(facts)}</p>'
        f'<div class="row">{figures}<pre>{text}</pre></div></section>'
    )


def _span(piece: Piece, *, odd: bool) -> str:
    if isinstance(piece, ImagePiece):
        return f'<span class="i">image {piece.index + 1} &times; {piece.num_tokens}</span>'
    kinds = ["t" if piece.is_target else "p"]
    if odd:
        kinds.append("o")
    if piece.is_special:
        kinds.append("s")
    shown = html.escape(piece.text).replace("\n", '<span class="b">&#9166;</span>\n')
    ids = ", ".join(map(str, piece.ids))
    return f'<span class="{" ".join(kinds)}" title="{ids}">{shown}</span>'


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
