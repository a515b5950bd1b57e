"""What a check of the sources found, as numbers, as text and as files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistune.data.formats import RowReader
from vistune.types import Rejected

_EXAMPLES = 4


@dataclass
class CheckReport:
    """What a check found.

    Args:
        sources: Names of the sources, in order.
        num_rows: Rows of every source.
        accepted: int64 [rows] per source; numbers of the usable rows.
        lengths: int32 [samples]; tokens of every usable row, sources end to end.
        image_tokens: int32 [samples]; image tokens among them.
        rejected: Rows set aside, sources end to end.
        notes: How often a rule changed or remarked a usable row, by short name.
        note_rows: The first rows of every note.
        scripts: Usable rows by the script that most of their text is written in.
        num_image_tokens: Image tokens of all usable rows.
        num_target_tokens: Target tokens of all usable rows.
        num_images: Images of all usable rows.
        num_tokenised: Rows whose tokens could not be counted word by word.
        readers: The sources, still open, so that nobody has to find their rows again.
    """

    sources: tuple[str, ...]
    num_rows: tuple[int, ...]
    accepted: tuple[npt.NDArray[np.int64], ...]
    lengths: npt.NDArray[np.int32]
    image_tokens: npt.NDArray[np.int32]
    rejected: list[Rejected]
    notes: Counter[str] = field(default_factory=Counter)
    note_rows: dict[str, list[str]] = field(default_factory=dict)
    scripts: Counter[str] = field(default_factory=Counter)
    num_image_tokens: int = 0
    num_target_tokens: int = 0
    num_images: int = 0
    num_tokenised: int = 0
    readers: tuple[RowReader, ...] = field(default=(), repr=False)

    @property
    def total_rows(self) -> int:
        """Rows of all sources."""
        return sum(self.num_rows)

    @property
    def num_ok(self) -> int:
        """Usable rows of all sources."""
        return int(self.lengths.size)

    @property
    def num_tokens(self) -> int:
        """Tokens of all usable rows, image tokens included."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def rejected_frac(self) -> float:
        """Rows set aside as a fraction of all rows."""
        return len(self.rejected) / self.total_rows if self.total_rows else 0.0

    def by_reason(self) -> dict[str, int]:
        """Returns how many rows were set aside, by reason, most frequent first."""
        return dict(Counter(row.reason for row in self.rejected).most_common())

    def table(self) -> str:
        """Returns the reasons as lines of text, each with its first row and its fix."""
        rows: dict[str, list[Rejected]] = {}
        for row in self.rejected:
            rows.setdefault(row.reason, []).append(row)
        lines = []
        for reason, number in self.by_reason().items():
            row, *more = rows[reason][:_EXAMPLES]
            lines.append(f"{number:>8}  {reason}: {row.where}: {row.detail}")
            if more:
                lines.append(f"{'':>10}also: " + ", ".join(other.where for other in more))
            if row.fix:
                lines.append(f"{'':>10}fix: {row.fix}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns the report in JSON's types; lengths as five numbers."""
        spread = None
        if self.num_ok:
            names = ("min", "p50", "p90", "p99", "max")
            values = np.percentile(self.lengths, [0, 50, 90, 99, 100], method="nearest")
            spread = {name: int(v) for name, v in zip(names, values, strict=True)}
        return {
            "sources": [
                {"name": name, "rows": rows, "ok": int(ok.size)}
                for name, rows, ok in zip(self.sources, self.num_rows, self.accepted, strict=True)
            ],
            "num_rows": self.total_rows,
            "num_ok": self.num_ok,
            "num_rejected": len(self.rejected),
            "by_reason": self.by_reason(),
            "notes": dict(self.notes.most_common()),
            "note_rows": self.note_rows,
            "scripts": dict(self.scripts.most_common()),
            "num_images": self.num_images,
            "num_tokens": self.num_tokens,
            "num_image_tokens": self.num_image_tokens,
            "num_target_tokens": self.num_target_tokens,
            "tokens_per_row": spread,
        }

    def write_quarantine(self, path: Path) -> None:
        """Writes one JSON line for every row set aside; an empty file when there is none."""
        with path.open("w", encoding="utf-8") as file:
            for row in self.rejected:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
