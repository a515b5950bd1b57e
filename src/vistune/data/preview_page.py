"""A page of previews that needs nothing else: no script, no address, no font of its own.

What is learnt is underlined, bold and green: whoever sees no colour sees the line.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from vistune.data.plots import svg_histogram
from vistune.data.preview import ImagePiece, Piece, Preview
from vistune.data.stats import DataStats

_STYLE = """
:root{color-scheme:light dark;--text:#1c1c1e;--page:#fff;--dim:#5a5a60;--box:#f6f6f7;--line:#d4d4d8;
--p:#5f5f66;--po:#e9e9ec;--t:#0a3d1f;--tb:#cdeed7;--to:#b4e0c2;--i:#3a5ba9;--bar:#3a5ba9}
@media (prefers-color-scheme:dark){:root{--text:#e8e8ea;--page:#161618;--dim:#a5a5ad;--box:#202024;
--line:#3a3a40;--p:#a5a5ad;--po:#2c2c32;--t:#d6f5e0;--tb:#1d5233;--to:#286f46;--bar:#7f9de0}}
body{font:15px/1.6 system-ui,"Noto Sans CJK SC",sans-serif;margin:2rem auto;max-width:64rem;
padding:0 1rem;color:var(--text);background:var(--page)}
h1{font-size:1.4rem;margin-bottom:.2rem}h2{font-size:1.05rem;margin:2.2rem 0 .2rem}
.facts,figcaption,caption{color:var(--dim);font-size:.85rem}.facts{margin:.1rem 0 .6rem}
table{border-collapse:collapse;margin:1rem 0;width:100%}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}caption{text-align:left}
.row{display:flex;gap:1rem;align-items:flex-start;flex-wrap:wrap}
figure{margin:0}figure img{width:14rem;max-width:100%;border:1px solid var(--line)}
.row figure{max-width:14.5rem}figure img.tile{width:4.5rem}
figcaption{max-width:14rem;word-break:break-all}
pre{flex:1 1 24rem;margin:0;padding:.7rem .9rem;white-space:pre-wrap;word-break:break-word;
font:13px/2 ui-monospace,"Noto Sans Mono CJK SC",monospace;background:var(--box);border-radius:6px}
.p{color:var(--p)}.p.o{background:var(--po)}
.t{color:var(--t);background:var(--tb);font-weight:600;border-bottom:2px solid currentColor}
.t.o{background:var(--to)}.s{font-style:italic}
.i{color:#fff;background:var(--i);border-radius:3px;padding:.1em .4em}.b{opacity:.5}
.key span{padding:.1em .4em;margin-right:.6em}
svg{width:100%;height:auto}.bar{fill:var(--bar)}.tick{fill:var(--dim);font:11px system-ui}
.chart{margin:1rem 0}
"""


def to_html(
    previews: Sequence[Preview],
    *,
    title: str,
    stats: DataStats | None = None,
    refused: Sequence[str] = (),
) -> str:
    """Returns one page with all previews; pictures are inside it.

    Args:
        previews: From `preview_sample` or `preview_text`.
        title: Heading of the page.
        stats: Adds a table of sources and a histogram of lengths.
        refused: What is said of rows that cannot be shown.
    """
    head = html.escape(title)
    has_tokens = any(preview.num_tokens for preview in previews)
    parts = [f"<h1>{head}</h1>", _key(has_tokens=has_tokens)]
    if stats is not None:
        parts += [_sources(stats), _charts(stats)]
    parts += [_section(preview) for preview in previews]
    if refused:
        listed = "".join(
            f"<li>{html.escape(text).replace(chr(10), '<br>')}</li>" for text in refused
        )
        parts.append(f"<h2>Rows that cannot be used</h2><ul>{listed}</ul>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{head}</title><style>{_STYLE}</style></head>\n<body>{body}\n</body></html>\n"
    )


def _key(*, has_tokens: bool) -> str:
    special = "special token" if has_tokens else "speaker"
    last = " Shades alternate with the tokens; point at one to see its id." if has_tokens else ""
    return (
        '<p class="key"><span class="p">shown to the model</span><span class="t">learnt</span>'
        f'<span class="p s">{special}</span><span class="i">image</span>{last}</p>'
    )


def _sources(stats: DataStats) -> str:
    columns: dict[str, Sequence[int | None]] = {
        "rows": [source.num_rows for source in stats.sources],
        "usable": [source.num_ok for source in stats.sources],
        "unusable": [source.num_rows - source.num_ok for source in stats.sources],
        "images": [source.num_images for source in stats.sources],
        "tokens": [source.num_tokens for source in stats.sources],
        "image tokens": [source.num_image_tokens for source in stats.sources],
    }
    known = {name: values for name, values in columns.items() if values and None not in values}
    head = "".join(f"<th>{name}</th>" for name in ("source", *known))
    rows = "".join(
        f"<tr><td>{html.escape(source.name)}</td>"
        + "".join(f"<td>{values[k]:,}</td>" for values in known.values())
        + "</tr>"
        for k, source in enumerate(stats.sources)
    )
    return f"<table><caption>Sources</caption><tr>{head}</tr>{rows}</table>"


def _charts(stats: DataStats) -> str:
    if not stats.distributions:
        return ""
    found = stats.distributions[0]
    facts = ", ".join(f"{name} {value:,.0f}" for name, value in found.spread().items())
    return (
        f'<figure class="chart"><figcaption style="max-width:none">{html.escape(found.name)}:'
        f" {facts}</figcaption>{svg_histogram(found)}</figure>"
    )


def _section(preview: Preview) -> str:
    sample = preview.sample
    facts = [html.escape(f"{sample.source}, {sample.where}")]
    if preview.num_tokens:
        facts += [
            f"{preview.num_tokens} tokens",
            f"{preview.num_image_tokens} image tokens",
            f"{preview.num_targets} target tokens",
        ]
    if preview.num_truncated:
        facts.append(f"{preview.num_truncated} tokens cut off")
    facts.extend(html.escape(remark) for remark in preview.remarks)
    figures = "".join(
        _figure(k, sample.images[k].name, pictures) for k, pictures in enumerate(preview.images)
    )
    text = "".join(_span(piece, odd=k % 2 == 1) for k, piece in enumerate(preview.pieces))
    return (
        f"<section><h2>{html.escape(sample.id)}</h2>"
        f'<p class="facts">{" &middot; ".join(facts)}</p>'
        f'<div class="row">{figures}<pre>{text}</pre></div></section>'
    )


def _figure(index: int, name: str, pictures: Sequence[Image.Image]) -> str:
    first = pictures[0]
    tiles = "" if len(pictures) == 1 else f"{len(pictures)} tiles, "
    shown = "".join(
        f'<img{" class=tile" if tiles else ""} alt="image {index + 1}" src="{_data_url(picture)}">'
        for picture in pictures
    )
    return (
        f"<figure>{shown}<figcaption>{html.escape(name)}: {tiles}"
        f"{first.width} x {first.height} px</figcaption></figure>"
    )


def _span(piece: Piece, *, odd: bool) -> str:
    if isinstance(piece, ImagePiece):
        number = f" &times; {piece.num_tokens}" if piece.num_tokens else ""
        return f'<span class="i">image {piece.index + 1}{number}</span>'
    kinds = ["t" if piece.is_target else "p"]
    if odd and piece.ids:
        kinds.append("o")
    if piece.is_special:
        kinds.append("s")
    shown = html.escape(piece.text)
    if piece.ids:
        shown = shown.replace("\n", '<span class="b">&#9166;</span>\n')
    ids = ", ".join(map(str, piece.ids))
    title = f' title="{ids}"' if ids else ""
    return f'<span class="{" ".join(kinds)}"{title}>{shown}</span>'


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
